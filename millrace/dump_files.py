"""The file of a dump: named or a pipe, plain or gzipped, read as text or looked at here and there.

A pipe is read once, and its reader can be stopped while it waits. Nothing here knows what a row means.
"""

import gzip
import io
import itertools
import os
import select
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from pipeline.errors import ContractError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Names standard input.
STDIN = Path("-")
#: What goes wrong while a file is read; a gzip file that was cut off ends with EOFError.
READ_ERRORS = (OSError, EOFError, zlib.error)

_GZIP = b"\x1f\x8b"  # RFC 1952
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_POLL_SECONDS = 0.2
# Enough to know how long one is.
_HEAD_LINES = 100
# Of a plain file: about a tenth of a second of seeks on a disk without moving parts.
_MOST_SAMPLES = 512


class _Pipe(io.RawIOBase):
    """What comes out of a pipe; its end as soon as nobody wants more."""

    def __init__(self, descriptor: int, stopped: threading.Event) -> None:
        self._descriptor = descriptor
        self._stopped = stopped

    def readable(self) -> bool:
        """Yes: what `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Wait for bytes; 0 is the end."""
        while not self._stopped.is_set():
            if select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
                return os.readv(self._descriptor, [buffer])
        return 0

    def close(self) -> None:
        """Close the pipe once."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class DumpFile:
    """A file that may be opened again and again, or a pipe that may not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopped = threading.Event()
        self.is_pipe = path == STDIN or (path.exists() and not path.is_file())

    def __str__(self) -> str:
        return "standard input" if self._path == STDIN else str(self._path)

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """Open as text, whatever its name says.

        Raises:
            ContractError: it is UTF-16.
        """
        with self._binary() as (file, _), io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="replace", newline=""
        ) as text:  # fmt: skip
            yield text

    def stop(self) -> None:
        """End what waits for a pipe; any thread may call this."""
        self._stopped.set()

    @property
    def lines(self) -> Callable[[], Iterator[object]] | None:
        """Yields about as many items as there are rows; None for a pipe."""
        return None if self.is_pipe else self._counted_lines

    def _counted_lines(self) -> Iterator[object]:
        with self.text() as text:
            next(text, None)
            yield from text

    def sample(self, rows_apart: int, rows: int | None) -> tuple[list[str], float]:
        """Return lines from all over a file, and how many rows about lie between two of them.

        A gzipped file has to be unpacked for that, a plain one is not read.

        Args:
            rows_apart: Between two of them; more in a large file.
            rows: Look no further than at so many.
        """
        found: list[str] = []
        with self._binary() as (file, size):
            head = b"".join(itertools.islice(_whole_lines(file), _HEAD_LINES))
            row_bytes = len(head) / max(1, head.count(b"\n"))
            stride = max(int(rows_apart * row_bytes), (size or 0) // _MOST_SAMPLES, 1)
            positions: Iterable[int] = itertools.count(0, stride)
            if size is not None:
                # And what somebody appended.
                positions = sorted({*range(0, size, stride), max(0, size - int(4 * row_bytes))})
            for position in positions:
                if rows is not None and position > rows * row_bytes:
                    break
                lines = list(itertools.islice(_whole_lines(file, position), 2))
                if len(lines) < 2:
                    break
                found.append(lines[1].decode("utf-8", "replace"))
        return found, stride / row_bytes

    @contextmanager
    def _binary(self) -> Iterator[tuple[BinaryIO, int | None]]:
        """Open it unpacked, and say how large it is where that is known."""
        with ExitStack() as opened:
            raw = self._opened()
            file = opened.enter_context(io.BufferedReader(raw, io.DEFAULT_BUFFER_SIZE))
            head = file.peek(2)[:2]
            if head in _UTF16:
                raise ContractError(f"{self}: UTF-16, and not UTF-8 text")
            if head == _GZIP:
                yield opened.enter_context(gzip.GzipFile(fileobj=file)), None  # type: ignore[misc]
            else:
                yield file, None if self.is_pipe else os.fstat(file.fileno()).st_size

    def _opened(self) -> io.RawIOBase:
        if not self.is_pipe:
            return self._path.open("rb", buffering=0)
        if self._path == STDIN:
            return _Pipe(os.dup(0), self._stopped)
        # Without waiting for somebody to open the other end; that is waited for where it can be stopped.
        return _Pipe(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK), self._stopped)


def _whole_lines(file: BinaryIO, position: int = 0) -> Iterator[bytes]:
    """Yield lines from a position on, the first one cut; no more where the file is broken, as `Lines` will tell."""
    with suppress(*READ_ERRORS):
        file.seek(position)
        while line := file.readline():
            yield line
