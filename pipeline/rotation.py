"""Secrets in files that change under a running process.

A file is looked at again whenever its secret is needed, so that Kubernetes, cert-manager or an administrator may
replace it at any time. The invariant: what could be read once is never given up for what cannot be read, such as
a file that is half-written or half of a new pair.
"""

import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pipeline import logs, metrics
from pipeline.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")

_Stamp = tuple[tuple[int, int, int], ...]

_log = logs.get(__name__)


class Rotated(Generic[T]):
    """What some files say now, and what of it worked last; safe to share between threads.

    Args:
        setting: Which setting names them, for the log and the metric.
        files: Whose change is looked for.
        read: Makes the value of them; raises ConfigurationError or OSError when they cannot be used.

    Raises:
        ConfigurationError: they cannot be used from the start; as `read` says, or one that is not there.
    """

    def __init__(self, setting: str, files: Sequence[Path], read: Callable[[], T]) -> None:
        self._setting = setting
        self._files = tuple(files)
        self._read = read
        self._lock = threading.Lock()
        # Before reading: what changes meanwhile is read again.
        try:
            self._stamp = stamp(self._files)
            self._value = read()
        except OSError as error:
            raise ConfigurationError(f"{setting}: {error.filename}: {error.strerror}") from None
        self._accepted = self._value
        # What was said already: of a file that cannot be used, and of a value that is refused.
        self._passed_over: str | None = None
        self._is_refused = False

    def newest(self) -> T:
        """Return what the files say now, or the last that could be read; the same object until it changes."""
        with self._lock:
            try:
                found = stamp(self._files)
                if found != self._stamp or self._passed_over is not None:
                    value = self._read()
                    self._stamp, self._value = found, value
                    self._passed_over, self._is_refused = None, False
                    metrics.SECRETS_PASSED_OVER.labels(self._setting).set(0)
                    _log.info("changed secret was read", setting=self._setting)
            except (OSError, ConfigurationError) as error:
                reason = error.message if isinstance(error, ConfigurationError) else str(error)
                if self._passed_over != reason:
                    self._passed_over = reason
                    metrics.SECRETS_PASSED_OVER.labels(self._setting).set(1)
                    _log.warning(
                        "changed secret cannot be used, keeping the former",
                        setting=self._setting,
                        reason=reason,
                    )
            return self._value

    async def attempt(self, use: Callable[[T], Awaitable[R]], refusal: type[Exception]) -> R:
        """Use the newest; if that raises the refusal, use what was accepted last, where that is another.

        Raises: what the last use raises.
        """
        value, accepted = self.newest(), self._accepted
        try:
            used = await use(value)
        except refusal:
            if value == accepted:
                raise
            value = accepted
            used = await use(value)
        self._accept(value)
        return used

    def _accept(self, value: T) -> None:
        with self._lock:
            if value == self._value:
                self._accepted = value
                if self._is_refused:  # what accepts it was changed, too
                    self._is_refused = False
                    metrics.SECRETS_PASSED_OVER.labels(self._setting).set(0)
            elif not self._is_refused:
                self._is_refused = True
                metrics.SECRETS_PASSED_OVER.labels(self._setting).set(1)
                _log.warning("changed secret is refused, the former one is not", setting=self._setting)


def password(setting: str, path: Path) -> Rotated[str]:
    """Follow a file that holds a password and nothing else.

    Raises:
        ConfigurationError: it cannot be read, or is empty; the message names the setting.
    """

    def read() -> str:
        try:
            found = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not text"
            raise ConfigurationError(f"{setting}: {path}: {reason}") from None
        if not found:
            raise ConfigurationError(f"{setting}: {path}: is empty")
        return found

    return Rotated(setting, [path], read)


def stamp(files: Sequence[Path]) -> _Stamp:
    """Tell one state of files from the next.

    Raises:
        OSError: one is not there.
    """
    # Inode and size too: Kubernetes swaps a symbolic link, and the new file may be as old as the one before.
    found = (os.stat(path) for path in files)
    return tuple((file.st_mtime_ns, file.st_size, file.st_ino) for file in found)
