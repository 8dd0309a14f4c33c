"""The data folder of the one-machine stack, and the locks that keep two stacks out of one folder."""

import fcntl
import os
from pathlib import Path

from millrace.processes import is_alive, name_of, wait_until
from pipeline.errors import ConfigurationError
from pipeline.settings import PREFIX

# A child is told of its parent's death by the kernel at once; a Java machine is gone well within this.
_DYING_SECONDS = 10.0


class FolderLock:
    """An exclusive lock on a service's data that its child processes hold too.

    The children inherit the open file, and the kernel drops a `flock` when the last holder is gone. So
    whoever gets the lock knows that no process of an earlier run, however it ended, still writes there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> int:
        """Take the lock and return the descriptor to pass on to children; idempotent.

        Blocks for up to ten seconds if the holder's owner is dead, and its children are on their way out.

        Raises:
            ConfigurationError: Another stack uses the folder, or it cannot be written.
        """
        if self._descriptor is not None:
            return self._descriptor
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write the data folder {self._path.parent} ({error.strerror}): set MILLRACE_DATA_DIR"
            ) from None

        def take() -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _owner_lives(descriptor)
            return True

        taken = wait_until(take, _DYING_SECONDS) and _holds(descriptor)
        if not taken:
            owners = _owners(descriptor)
            os.close(descriptor)
            living = [pid for pid in owners if is_alive(pid)]
            names = ", ".join(name_of(pid) for pid in living) or "a process that is not known"
            raise ConfigurationError(
                f"{self._path.parent} is already in use by {names}: "
                f"stop that ({' '.join(['kill', *map(str, living)])}), or set another MILLRACE_DATA_DIR"
            )
        self._descriptor = descriptor
        self.record(os.getpid())
        return descriptor

    def record(self, *pids: int) -> None:
        """Write down who holds the lock, for the message somebody else will get; the owner comes first."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, "\n".join(map(str, pids)).encode(), 0)

    def release(self) -> None:
        """Give the lock back; idempotent. Children that still run keep it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def require_unused(data_dir: Path) -> None:
    """Make sure that no stack runs in this data folder; blocks as `FolderLock.acquire` does.

    Raises:
        ConfigurationError: One does, and the message names it; or the folder cannot be written.
    """
    lock = FolderLock(data_dir / "kafka" / ".lock")
    lock.acquire()
    lock.release()


def require_stack_folder(data_dir: Path) -> None:
    """Make sure that the embedded Kafka that runs is the one of this data folder.

    Raises:
        ConfigurationError: It is not: objects put here would be seen by nobody.
    """
    if not is_stack_folder(data_dir):
        raise ConfigurationError(
            f"{PREFIX}DATA_DIR: no Millrace runs in {data_dir.absolute()}: "
            "run this where `millrace up` runs, or name its data folder"
        )


def is_stack_folder(data_dir: Path) -> bool:
    """Tell whether an embedded Kafka runs in this data folder."""
    try:
        descriptor = os.open(data_dir / "kafka" / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _holds(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owners(descriptor: int) -> list[int]:
    return [int(line) for line in os.pread(descriptor, 256, 0).decode().split() if line.isdigit()]


def _owner_lives(descriptor: int) -> bool:
    owners = _owners(descriptor)
    return bool(owners) and is_alive(owners[0])
