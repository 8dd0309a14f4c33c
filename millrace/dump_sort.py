"""A dump in order of time, on disk: for dumps of which a part is too far from where it belongs.

SQLite sorts, as it does so with a bounded memory. Its files have no name from the moment they are opened: however
the process ends, nothing is left of them.
"""

import sqlite3
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice

import msgspec

from millrace.dump_rows import Identity, Value, interned
from pipeline.errors import MillraceError

# Of SQLite's page cache, and as much again while it sorts.
MEMORY_KIBIBYTES = 65_536
_AT_ONCE = 10_000
_POLL_SECONDS = 0.1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TABLES = """
CREATE TABLE series (number INTEGER PRIMARY KEY, described BLOB UNIQUE);
CREATE TABLE readings (time INTEGER, line INTEGER, series INTEGER, value REAL);
"""
_IN_ORDER = "SELECT time, line, series, value FROM readings ORDER BY time, line"


class _Series(msgspec.Struct, frozen=True, array_like=True):
    """What readings of one metric of one GPU have in common."""

    identity: Identity
    name: str
    xid: int | None


class SortedValues:
    """Values in order of time, and of their lines within a moment; as often as wanted.

    Any one thread at a time may use it, and any other may close it meanwhile.
    """

    def __init__(self, memory_kibibytes: int = MEMORY_KIBIBYTES) -> None:
        # An empty name: a database of our own in SQLITE_TMPDIR, TMPDIR or /var/tmp, without a name.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        self._is_closed = False
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(f"PRAGMA cache_size=-{memory_kibibytes}")
        self._database.executescript(_TABLES)
        # One for all: at the end of each SQLite looks at every page that it holds.
        self._database.execute("BEGIN")
        self._number = lru_cache(maxsize=65_536)(self._new_number)
        self._of_number = lru_cache(maxsize=65_536)(self._known_series)

    def add(self, values: Iterable[Value], advance: Callable[[int], None]) -> None:
        """Take values; `advance` is told how many more, time and again.

        Raises:
            MillraceError: there is no room for them.
        """
        numbered = self._numbered(values)
        while True:
            with self._lock, _explained():
                if self._is_closed or not (batch := list(islice(numbered, _AT_ONCE))):
                    return
                self._database.executemany("INSERT INTO readings VALUES (?, ?, ?, ?)", batch)
            advance(len(batch))

    def values(self) -> Iterator[Value]:
        """Yield them all; the first one takes as long as sorting does.

        Raises:
            MillraceError: there is no room to sort them.
        """
        rows: sqlite3.Cursor | None = None
        latest, time = None, _EPOCH
        while True:
            with self._lock, _explained():
                if self._is_closed:
                    return
                rows = rows or self._database.execute(_IN_ORDER)
                batch = rows.fetchmany(_AT_ONCE)
                series = [self._of_number(row[2]) for row in batch]
            if not batch:
                return
            for (since, line, _, value), (identity, name, xid) in zip(batch, series, strict=True):
                if since != latest:
                    latest, time = since, _EPOCH + timedelta(microseconds=since)
                yield Value(time, line, identity, name, value, xid)

    def close(self) -> None:
        """Give the room back; what another thread does with them ends at once."""
        self._is_closed = True
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            self._database.interrupt()
        self._database.close()
        self._lock.release()

    def _numbered(self, values: Iterable[Value]) -> Iterator[tuple[int, int, int, float]]:
        latest: Value | None = None
        number = 0
        for value in values:
            # One series after the other, as such dumps are: nothing to look up.
            if (
                latest is None
                or value.identity is not latest.identity
                or value.name is not latest.name
                or value.xid != latest.xid
            ):
                series = _Series(value.identity, value.name, value.xid)
                number = self._number(msgspec.json.encode(series))
            latest = value
            since = value.time - _EPOCH
            microseconds = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
            yield microseconds, value.line, number, value.value

    def _new_number(self, described: bytes) -> int:
        self._database.execute("INSERT OR IGNORE INTO series (described) VALUES (?)", (described,))
        (number,) = self._database.execute(
            "SELECT number FROM series WHERE described = ?", (described,)
        ).fetchone()
        return int(number)

    def _known_series(self, number: int) -> tuple[Identity, str, int | None]:
        (described,) = self._database.execute(
            "SELECT described FROM series WHERE number = ?", (number,)
        ).fetchone()
        series = msgspec.json.decode(described, type=_Series)
        # The one object of a GPU, by which readings tell whether it changed.
        gpu = interned(msgspec.json.encode(series.identity.gpu))
        return series.identity._replace(gpu=gpu), series.name, series.xid


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise MillraceError(
            f"cannot sort the dump: {error}. It is sorted in the folder that SQLITE_TMPDIR or TMPDIR names, else in"
            " /var/tmp, and takes about 60 bytes there for each row"
        ) from None


def rows_behind(times: Sequence[datetime]) -> int:
    """Return before which of these times the most later ones stand: how many."""
    before: list[datetime] = []
    most = 0
    for time in times:
        most = max(most, len(before) - bisect_right(before, time))
        insort(before, time)
    return most
