"""Keeps Millrace's own processes (steps, gateway) running: starts them, restarts them, stops them all.

It knows nothing of what they do. Two exit codes mean something: 78 (a wrong setting) ends everything, as no
restart would mend it; every other end, 0 included, is answered by a restart after a growing pause. The
invariant: no child outlives `supervise`, and none outlives the process that runs it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from millrace import processes
from pipeline.errors import EXIT_CONFIGURATION, ConfigurationError

_POLL_SECONDS = 0.05  # how late an exit may be seen; pidfd would need Linux 5.3
_MAX_LOG_BYTES = 20_000_000  # a log longer than this is put aside when its child starts; one old one is kept


@dataclass(frozen=True)
class ChildSpec:
    """One process to keep running."""

    name: str
    argv: Sequence[str]
    log_path: Path
    # Added to this process's environment.
    env: Mapping[str, str] = field(default_factory=dict)
    # Between SIGTERM and SIGKILL; longer than the child's own grace period.
    stop_seconds: float = 35.0


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a restart: doubling from `first_seconds`, and anew after good health."""

    first_seconds: float = 1.0
    most_seconds: float = 30.0
    healthy_seconds: float = 60.0

    def next_pause(self, pause_seconds: float, ran_seconds: float) -> float:
        """Return the pause after a run; `pause_seconds` is the one before it, 0 before the first."""
        if pause_seconds == 0 or ran_seconds >= self.healthy_seconds:
            return self.first_seconds
        return min(pause_seconds * 2, self.most_seconds)


@dataclass(frozen=True)
class Started:
    """A child runs."""

    name: str
    pid: int


@dataclass(frozen=True)
class Exited:
    """A child ended; `expected` if it was told to, `code` is negative for a signal as in `subprocess`."""

    name: str
    code: int
    ran_seconds: float
    expected: bool


@dataclass(frozen=True)
class Restarting:
    """A child will be started again."""

    name: str
    after_seconds: float


Event = Started | Exited | Restarting

DEFAULT_BACKOFF = Backoff()


async def supervise(
    specs: Sequence[ChildSpec],
    on_event: Callable[[Event], None],
    stopping: asyncio.Event,
    backoff: Backoff = DEFAULT_BACKOFF,
) -> None:
    """Run children until `stopping` is set, then stop them all at once, each within its `stop_seconds`.

    Safe to cancel, which stops the children in the same way; a second cancellation kills them. `on_event` is
    called on the event loop.

    Raises:
        ConfigurationError: A child ended with code 78; the message is its last line. All are stopped.
    """
    try:
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(_keep_running(spec, on_event, backoff)) for spec in specs]
            await stopping.wait()
            for keeper in keepers:
                keeper.cancel()
    except BaseExceptionGroup as errors:
        wrong, others = errors.split(ConfigurationError)
        if wrong is None or others is not None:
            raise
        # Several wrong children mostly have the same wrong setting: the first line is enough to act on.
        raise wrong.exceptions[0] from None


async def _keep_running(spec: ChildSpec, on_event: Callable[[Event], None], backoff: Backoff) -> None:
    pause_seconds = 0.0
    while True:
        started_at = time.monotonic()
        await _run_once(spec, on_event)
        pause_seconds = backoff.next_pause(pause_seconds, time.monotonic() - started_at)
        on_event(Restarting(spec.name, pause_seconds))
        await asyncio.sleep(pause_seconds)


async def _run_once(spec: ChildSpec, on_event: Callable[[Event], None]) -> None:
    """Run a child to its end; when cancelled, end it first."""
    _put_aside_long_log(spec.log_path)
    log_bytes = spec.log_path.stat().st_size
    started_at = time.monotonic()
    process = processes.spawn(spec.argv, log_path=spec.log_path, env={**os.environ, **spec.env})
    expected = False
    try:
        on_event(Started(spec.name, process.pid))
        await _ended(process)
    except asyncio.CancelledError:
        expected = True
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_ended(process), spec.stop_seconds)
        raise
    finally:
        # What is left of its session: the child itself past its deadline, and its own children. Before it is
        # reaped, as its number may be somebody else's afterwards.
        os.killpg(process.pid, signal.SIGKILL)
        on_event(Exited(spec.name, process.wait(), time.monotonic() - started_at, expected))
    if process.returncode == EXIT_CONFIGURATION:
        said = (
            processes.tail(spec.log_path, lines=1)
            if spec.log_path.stat().st_size > log_bytes
            else "(no message)"
        )
        # A child begins its line with the name of its program.
        said = said.removeprefix("millrace: ").removeprefix("gateway: ")
        raise ConfigurationError(f"{spec.name}: {said}")


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child's end without reaping it."""

    def has_ended() -> bool:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    while not has_ended():  # noqa: ASYNC110  # nobody could set an event
        await asyncio.sleep(_POLL_SECONDS)


def _put_aside_long_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    path.touch()
