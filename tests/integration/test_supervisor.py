"""The supervisor, with real child processes and pauses of milliseconds."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from millrace import processes
from millrace.supervisor import Backoff, ChildSpec, Event, Exited, Restarting, Started, supervise
from pipeline.errors import ConfigurationError
from tests.support.eventually import eventually, eventually_sync

QUICK = Backoff(first_seconds=0.01, most_seconds=0.04)
IDLE = "import time; print('up', flush=True); time.sleep(600)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(600)"
)
POLITE = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    "print('up', flush=True); time.sleep(600)"
)


def child(tmp_path: Path, program: str, name: str = "step", stop_seconds: float = 10.0) -> ChildSpec:
    argv = [sys.executable, "-c", program]
    return ChildSpec(name=name, argv=argv, log_path=tmp_path / f"{name}.log", stop_seconds=stop_seconds)


def up(spec: ChildSpec) -> bool:
    return spec.log_path.exists() and "up" in spec.log_path.read_text()


async def test_restarts_a_child_that_ends_after_growing_pauses(tmp_path: Path) -> None:
    """A child that keeps ending is started again and again, and waited for longer each time up to a limit."""
    events: list[Event] = []
    stopping = asyncio.Event()
    spec = child(tmp_path, "raise SystemExit(3)")
    running = asyncio.create_task(supervise([spec], events.append, stopping, QUICK))

    await eventually(lambda: sum(isinstance(event, Restarting) for event in events) >= 4, timeout_seconds=20)
    stopping.set()
    await running

    pauses = [event.after_seconds for event in events if isinstance(event, Restarting)]
    assert pauses[:4] == [0.01, 0.02, 0.04, 0.04]
    codes = [event.code for event in events if isinstance(event, Exited) and not event.expected]
    assert {3} == set(codes)


async def test_restarts_a_child_that_was_killed(tmp_path: Path) -> None:
    """A child that somebody kills comes back as another process."""
    events: list[Event] = []
    stopping = asyncio.Event()
    spec = child(tmp_path, IDLE)
    running = asyncio.create_task(supervise([spec], events.append, stopping, QUICK))

    await eventually(lambda: up(spec), timeout_seconds=20)
    first = next(event.pid for event in events if isinstance(event, Started))
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: sum(isinstance(event, Started) for event in events) == 2, timeout_seconds=20)
    stopping.set()
    await running

    killed = next(event for event in events if isinstance(event, Exited))
    assert (killed.code, killed.expected) == (-signal.SIGKILL, False)


async def test_wrong_configuration_ends_the_stack_with_its_last_line(tmp_path: Path) -> None:
    """A child that exits 78 is not restarted: everything stops and the child's own last line is the error."""
    events: list[Event] = []
    wrong = child(
        tmp_path,
        "import sys; print('starting'); sys.exit(print('MILLRACE_X: no', file=sys.stderr) or 78)",
        "wrong",
    )
    with pytest.raises(ConfigurationError) as raised:
        await supervise([child(tmp_path, IDLE, "idle"), wrong], events.append, asyncio.Event(), QUICK)

    assert raised.value.message == "wrong: MILLRACE_X: no"
    assert not any(isinstance(event, Restarting) for event in events)
    pids = [event.pid for event in events if isinstance(event, Started)]
    assert [processes.is_alive(pid) for pid in pids] == [False, False]


async def test_wrong_configuration_without_a_word_shows_no_older_line(tmp_path: Path) -> None:
    """The error of a child that exits 78 in silence is not the last line of an earlier run."""
    spec = child(tmp_path, "raise SystemExit(78)")
    spec.log_path.write_text("a line of yesterday\n")
    with pytest.raises(ConfigurationError) as raised:
        await supervise([spec], lambda _: None, asyncio.Event(), QUICK)
    assert raised.value.message == "step: (no message)"


async def test_stops_with_sigterm_and_kills_at_the_deadline(tmp_path: Path) -> None:
    """Stopping lets a child end by itself and kills one that does not within its time."""
    events: list[Event] = []
    stopping = asyncio.Event()
    specs = [child(tmp_path, POLITE, "polite"), child(tmp_path, DEAF, "deaf", stop_seconds=0.2)]
    running = asyncio.create_task(supervise(specs, events.append, stopping, QUICK))
    await eventually(lambda: all(map(up, specs)), timeout_seconds=20)

    stopping.set()
    await running

    ends = {event.name: (event.code, event.expected) for event in events if isinstance(event, Exited)}
    assert ends == {"polite": (0, True), "deaf": (-signal.SIGKILL, True)}


async def test_cancelling_stops_the_children(tmp_path: Path) -> None:
    """Cancelling the supervisor stops its children before it ends."""
    events: list[Event] = []
    spec = child(tmp_path, POLITE)
    running = asyncio.create_task(supervise([spec], events.append, asyncio.Event(), QUICK))
    await eventually(lambda: up(spec), timeout_seconds=20)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    ends = [(event.code, event.expected) for event in events if isinstance(event, Exited)]
    assert ends == [(0, True)]


async def test_takes_the_children_of_a_child_along(tmp_path: Path) -> None:
    """A process that a child started does not outlive that child."""
    program = (
        f"import subprocess, sys, time; print(subprocess.Popen(["
        f"sys.executable, '-c', {IDLE!r}]).pid, flush=True)"
    )
    stopping = asyncio.Event()
    spec = child(tmp_path, f"{program}; time.sleep(600)")
    running = asyncio.create_task(supervise([spec], lambda _: None, stopping, QUICK))
    await eventually(lambda: up(spec), timeout_seconds=20)
    grandchild = int(spec.log_path.read_text().split()[0])

    stopping.set()
    await running
    await eventually(lambda: not processes.is_alive(grandchild), timeout_seconds=5)


async def test_adds_to_logs_and_puts_long_ones_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's output is added to its log; a log over the limit is kept under another name at a start."""
    monkeypatch.setattr("millrace.supervisor._MAX_LOG_BYTES", 100)
    spec = child(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(78)")
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            await supervise([spec], lambda _: None, asyncio.Event(), QUICK)
    assert sorted(["out", "err"] * 2) == sorted(spec.log_path.read_text().split())

    spec.log_path.write_text("x" * 101)
    with pytest.raises(ConfigurationError):
        await supervise([spec], lambda _: None, asyncio.Event(), QUICK)
    assert tmp_path.joinpath("step.log.1").read_text() == "x" * 101
    assert len(spec.log_path.read_text().split()) == 2


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    """SIGKILL of the process that supervises ends its children, even one that ignores SIGTERM."""
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from millrace.supervisor import ChildSpec, supervise\n"
        f"spec = ChildSpec('deaf', [sys.executable, '-c', {DEAF!r}], Path({str(tmp_path)!r}) / 'deaf.log')\n"
        "asyncio.run(supervise([spec], lambda event: print(event.pid, flush=True), asyncio.Event()))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        eventually_sync(lambda: up(child(tmp_path, DEAF, "deaf")), timeout_seconds=20)
        parent.kill()
    eventually_sync(lambda: not processes.is_alive(pid), timeout_seconds=5)


def test_a_child_survives_the_thread_that_started_it(tmp_path: Path) -> None:
    """A child is not told of its parent's death when only the thread that asked for it has ended."""
    log = tmp_path / "log"
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(processes.spawn([sys.executable, "-c", POLITE], log_path=log))
        eventually_sync(lambda: log.read_text() == "up\n", timeout_seconds=20)

    thread = threading.Thread(target=start)
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    thread.join()
    eventually_sync(lambda: not task.exists(), timeout_seconds=5)

    (process,) = started
    # Ctrl-C in a terminal goes to the whole session, so the child must have one of its own.
    assert process.pid == os.getsid(process.pid)
    assert processes.stop(process, signal.SIGTERM, seconds=10)
    assert process.returncode == 0
