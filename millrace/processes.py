"""Child processes that never outlive their parent, and what /proc says about those of others.

Linux only, as the embedded stack is. The invariant: every process started by `spawn` is killed by the kernel
when this process ends, however it ends.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_LAUNCH = Path(__file__).with_name("launch.py")
_POLL_SECONDS = 0.02

# PR_SET_PDEATHSIG fires when the *thread* that forked ends, not its process. One thread that lives as long as
# the process does all the forking, so that a child started from a short-lived worker thread survives it.
_launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="millrace-launcher")


@dataclass(frozen=True)
class RunAs:
    """The user a child runs as; only root may ask for one."""

    user_id: int
    group_id: int
    # Linux capability kept across the change of user, by number; None keeps none.
    capability: int | None = None


def spawn(
    argv: Sequence[str | Path],
    *,
    log_path: Path,
    death_signal: signal.Signals = signal.SIGKILL,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    run_as: RunAs | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, with stdout and stderr appended to `log_path`.

    The session keeps a terminal's Ctrl-C from reaching the child: the parent decides in which order things
    stop. The child gets `death_signal` when this process ends. Any thread may call this; it blocks a few
    milliseconds.

    Raises:
        OSError: The program is not there, or the log file cannot be opened.
    """
    who = run_as or RunAs(-1, -1)
    capability = -1 if who.capability is None else who.capability
    wishes = (os.getpid(), int(death_signal), who.user_id, who.group_id, capability)
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(argv[0]))
    launch = [sys.executable, "-I", "-S", str(_LAUNCH), *map(str, wishes), "--"]
    command = [*launch, program, *map(str, argv[1:])]

    def start() -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                env=None if env is None else dict(env),
                cwd=cwd,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )

    return _launcher.submit(start).result()


def stop(
    process: subprocess.Popen[bytes],
    first: signal.Signals,
    seconds: float,
    then: signal.Signals = signal.SIGKILL,
) -> bool:
    """Ask a child to end, force it at the deadline, and reap it; True if it ended by itself."""
    if process.poll() is None:
        process.send_signal(first)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(then)
        process.wait()
        return False
    return True


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for a child to end by itself; return its exit code, or None if the deadline killed it."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def wait_until(check: Callable[[], bool], seconds: float) -> bool:
    """Poll until the check holds, blocking; False if it never did within the time."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return _stat_fields(stat)[0] != "Z"


def _stat_fields(stat: str) -> list[str]:
    """Split /proc/PID/stat after the command name, which may itself hold spaces and brackets: proc(5)."""
    return stat.rpartition(")")[2].split()


def children_of(pid: int) -> list[int]:
    """List the direct children of a process."""
    children = []
    for entry in _pids():
        try:
            parent = int(_stat_fields(Path(f"/proc/{entry}/stat").read_text())[1])
        except OSError:
            continue  # it ended while we looked
        if parent == pid:
            children.append(entry)
    return children


def _pids() -> Iterable[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def name_of(pid: int) -> str:
    """Name a process for a message: `java (pid 42)`, or `pid 42` if it cannot be read."""
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"


def tail(path: Path, lines: int = 12) -> str:
    """Read the end of a log for an error message, less Java's stack frames; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if not line.startswith("\tat ")][-lines:])
