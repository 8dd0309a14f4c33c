"""DCGM dumps: rows of the long CSV format, one value each, gathered into the samples of one moment after another.

A dump is streamed, never loaded. What a row cannot mean is left out, counted and listed with its line; its
neighbours are unharmed. Values stay as they are written. Rows may be out of order by `LOOKAHEAD_ROWS`, as in dumps
that are written metric by metric.
"""

import csv
import gzip
import heapq
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TextIO

import msgspec

from millrace import dump_rows
from millrace.dump_rows import Identity
from millrace.dump_xids import COUNT, MAX_CODE, GpuXids
from pipeline import dcgm
from pipeline.errors import ContractError
from pipeline.telemetry import Gpu

# About 25 MB of rows that wait for their moment to be complete.
LOOKAHEAD_ROWS = 200_000
_LINES_KEPT = 5
# What `watch` and `record` take; a dump from a clock that is a little ahead is one, too.
_EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
_AHEAD = timedelta(days=1)


@dataclass(slots=True)
class Reading:
    """What a dump has of one GPU at one moment; there are very many, so what most lack is None."""

    #: By field.
    values: dict[str, float] = field(default_factory=dict)
    #: Errors that were not there at the moment before.
    xids: tuple[int, ...] = ()
    #: By code: how often within the exporter's window.
    xid_counts: dict[int, int] | None = None
    #: What its rows say of the GPU, all of them when the moment is complete.
    gpu: Gpu | None = None
    #: What others of its rows say of it.
    gpus: list[Gpu] | None = None
    #: What a row with unreadable labels says, if nothing better is known.
    partly: Gpu | None = None
    #: Whose values were added up.
    links: set[tuple[str, str]] | None = None


class Moment(NamedTuple):
    """All that a dump has of one moment: by host and GPU."""

    time: datetime
    hosts: Mapping[str, Mapping[str, Reading]]
    rows: int


class _Value(NamedTuple):
    """What one row says."""

    time: datetime
    identity: Identity
    name: str
    value: float
    #: Of a count of XID errors.
    xid: int | None


@dataclass
class Rejects:
    """What was left out or doubted: how much by reason, and in which lines first."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)
    #: Rows that were left out.
    rows: int = 0

    def add(self, reason: str, line: int, *, is_kept: bool = False) -> None:
        """Count a row; `is_kept` if its value was."""
        self.counts[reason] += 1
        self.rows += not is_kept
        kept = self.lines.setdefault(reason, [])
        if len(kept) < _LINES_KEPT:
            kept.append(line)


class Dump:
    """One file, plain or gzipped; what is known of its GPUs and rows grows while it is read.

    Raises:
        ContractError: it has no usable header.
    """

    def __init__(self, path: Path, *, limit: int | None = None, lookahead_rows: int = LOOKAHEAD_ROWS) -> None:
        self._path = path
        self._limit = limit
        self._lookahead_rows = lookahead_rows
        self._latest = datetime.now(UTC) + _AHEAD
        #: What each GPU is, by host and UUID, as the last moment that was read has it.
        self.gpus: defaultdict[str, dict[str, Gpu]] = defaultdict(dict)
        self.rejects = Rejects()
        #: Values that mean "no value": left out, and no fault.
        self.blanks = 0
        self.rows = 0
        with open_text(path) as file:
            try:
                self._columns = dump_rows.columns(next(csv.reader(file), []))
            except csv.Error as error:
                raise ContractError(f"{path}: not CSV: {error}") from None
            except UnicodeDecodeError:
                raise ContractError(f"{path}: not UTF-8 text") from None
            except (OSError, EOFError, zlib.error) as error:
                raise ContractError(f"{path}: {error}") from None
        describing = [index for index, _, _ in self._columns.describing]
        # The last one twice: of a single one this would return no tuple.
        self._describing = itemgetter(*describing, describing[-1])
        self._moment = lru_cache(maxsize=4096)(self._time_of)
        self._identified = lru_cache(maxsize=65_536)(self._columns.identified)

    def moments(self) -> Iterator[Moment]:
        """Read the file once, and yield its moments in order of time."""
        waiting: list[datetime] = []
        gathered: dict[datetime, dict[str, dict[str, Reading]]] = {}
        sizes: Counter[datetime] = Counter()
        xids: defaultdict[tuple[str, str], GpuXids] = defaultdict(GpuXids)
        held = 0
        newest_out = datetime.min.replace(tzinfo=UTC)

        def oldest() -> Moment:
            time = heapq.heappop(waiting)
            return self._completed(Moment(time, gathered.pop(time), sizes.pop(time)), xids)

        for line, row in self._numbered_rows():
            read = self._read(row, line)
            if read is None:
                continue
            time = read.time
            if time <= newest_out:
                self.rejects.add("its moment is past: sort the dump by time", line)
                continue
            hosts = gathered.get(time)
            if hosts is None:
                hosts = gathered[time] = {}
                heapq.heappush(waiting, time)
            gpus = hosts.setdefault(read.identity.host, {})
            reading = gpus.get(read.identity.gpu_uuid)
            if reading is None:
                reading = gpus[read.identity.gpu_uuid] = Reading()
            if not _put(reading, read):
                self.rejects.add("the same metric of the same GPU and moment again", line)
                continue
            sizes[time] += 1
            held += 1
            if held > self._lookahead_rows and len(waiting) > 1:
                moment = oldest()
                newest_out = moment.time
                held -= moment.rows
                yield moment
        while waiting:
            yield oldest()

    def _completed(self, moment: Moment, xids: Mapping[tuple[str, str], GpuXids]) -> Moment:
        """Say what the GPUs are at this moment, and which errors are new."""
        for host, readings in moment.hosts.items():
            known = self.gpus[host]
            for gpu_uuid, reading in readings.items():
                if reading.gpu is not None:
                    known[gpu_uuid] = _merged([reading.gpu, *reading.gpus]) if reading.gpus else reading.gpu
                elif reading.partly is not None:
                    known.setdefault(gpu_uuid, reading.partly)
                reading.gpu = known[gpu_uuid]
                reading.xids = xids[host, gpu_uuid].step(reading.values, reading.xid_counts or {})
        return moment

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield rows with their line, up to the limit."""
        left = math.inf if self._limit is None else self._limit
        with open_text(self._path) as file:
            for line, row in self._rows_of(file) if left else ():
                self.rows += 1
                left -= 1
                yield line, row
                if left <= 0:
                    return

    def _rows_of(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        """Yield what is not empty; what is not CSV is counted, and lines that a quote joins are parted again."""
        lines: list[str] = []

        def remembered() -> Iterator[str]:
            for line in file:
                lines.append(line)
                yield line

        reader = csv.reader(remembered())
        next(reader, None)
        while True:
            begin = reader.line_num + 1
            lines.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield from self._apart(begin, lines)
                continue
            except (OSError, EOFError, zlib.error) as error:
                # A gzip file that was cut off: what came before it is good.
                self.rejects.add(f"the file ends too early: {error}", begin)
                return
            if len(lines) > 1 and self._is_joined(row, lines):
                yield from self._apart(begin, lines)
            elif row:
                yield begin, row

    def _is_joined(self, row: list[str], lines: Sequence[str]) -> bool:
        """Whether it is several rows, of which one has a quote that nothing closes."""
        if len(row) != self._columns.count:
            return True
        for line in lines[1:]:
            try:
                alone = next(csv.reader([line]), [])
                if len(alone) == self._columns.count and dump_rows.moment(
                    alone[self._columns.timestamp].strip()
                ):
                    return True
            except (csv.Error, ValueError):
                continue
        return False

    def _apart(self, begin: int, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines, begin):
            try:
                row = next(csv.reader([line]), [])
            except csv.Error:
                self.rejects.add("not CSV", number)
                continue
            if row:
                yield number, row

    def _read(self, row: list[str], line: int) -> _Value | None:
        if len(row) != self._columns.count:
            self.rejects.add("another number of columns than the first line", line)
            return None
        text = row[self._columns.value].strip()
        if not text:
            self.blanks += 1
            return None
        try:
            read = self._meant(row, text)
        except ValueError as error:
            reason = str(error)
            self.rejects.add("the value is not a number" if "could not convert" in reason else reason, line)
            return None
        if read is not None and not read.identity.is_whole:
            self.rejects.add("labels_raw cannot be read (the value is kept)", line, is_kept=True)
        return read

    def _time_of(self, text: str) -> datetime:
        time = dump_rows.moment(text.strip())
        if not _EARLIEST <= time <= self._latest:
            raise ValueError("the time is far in the past or the future")
        return time

    def _meant(self, row: list[str], text: str) -> _Value | None:
        """Say what a row means; None is a blank.

        Raises:
            ValueError: it cannot mean anything.
        """
        value = float(text)
        time = self._moment(row[self._columns.timestamp])
        metric = row[self._columns.metric_name].strip()
        name = dump_rows.field_name(metric)
        if not math.isfinite(value) or "_" in text:
            raise ValueError("the value is not a number")
        identity = self._identified(self._describing(row))
        why = dcgm.why_dropped(name, value)
        if why == "blank":
            self.blanks += 1
            return None
        if why is not None:
            raise ValueError(f"the value is {why.replace('_', ' ')} of {name}")
        if not identity.series:
            return _Value(time, identity, name, value, None)
        if metric == COUNT and (code := identity.series.get("xid")):
            if not code.isdecimal() or len(code) > 6 or int(code) > MAX_CODE or value < 0:
                raise ValueError("no count of an XID error")
            return _Value(time, identity, name, value, int(code))
        return _Value(time, identity, dump_rows.field_name(metric, identity.kind), value, None)


def _put(reading: Reading, read: _Value) -> bool:
    """Add a value; of NVLinks the sum. False: it is there already."""
    name, identity = read.name, read.identity
    if read.xid is not None:
        counts = reading.xid_counts = reading.xid_counts or {}
        if read.xid in counts:
            return False
        counts[read.xid] = int(read.value)
    elif identity.series and (link := identity.link):
        links = reading.links = reading.links or set()
        if (name, link) in links or (name in reading.values and all(other != name for other, _ in links)):
            return False
        links.add((name, link))
        reading.values[name] = reading.values.get(name, 0.0) + read.value
    elif name in reading.values:
        return False
    else:
        reading.values[name] = read.value
    gpu = identity.gpu
    if not identity.is_whole:
        reading.partly = gpu
    elif reading.gpu is None:
        reading.gpu = gpu
    elif reading.gpu is not gpu:
        reading.gpus = reading.gpus or []
        if not any(other is gpu for other in reading.gpus):
            reading.gpus.append(gpu)
    return True


def _merged(gpus: Sequence[Gpu]) -> Gpu:
    """Return what several series say of one GPU."""
    described: dict[str, object] = {}
    for gpu in gpus:
        described = msgspec.to_builtins(gpu) | described
    described["labels"] = {name: text for gpu in gpus for name, text in gpu.labels.items()}
    return dump_rows.interned(msgspec.json.encode(described))


def open_text(path: Path) -> TextIO:
    """Open as text whatever its name says: gzip files are told by their first bytes."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open("r", encoding="utf-8-sig", errors="replace", newline="")
