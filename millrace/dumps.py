"""DCGM dumps: rows of the long CSV format, one value each, gathered into the samples of one moment after another.

A dump is streamed, never loaded. Rows may be out of order by `LOOKAHEAD_ROWS`; whoever wants more of a dump has it
sorted on disk first. What a row cannot mean is left out, counted and listed with its line; its neighbours are
unharmed. Values stay as they are written.
"""

import csv
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import chain, islice
from operator import itemgetter
from typing import NamedTuple

import msgspec

from millrace import dump_rows
from millrace.dump_files import DumpFile
from millrace.dump_lines import Lines, Rejects
from millrace.dump_rows import Columns, Value
from millrace.dump_sort import SortedValues, rows_behind
from millrace.dump_xids import COUNT, MAX_CODE, GpuXids
from pipeline import dcgm
from pipeline.errors import ContractError
from pipeline.telemetry import Gpu

# About 25 MB of rows that wait for their moment to be complete.
LOOKAHEAD_ROWS = 200_000
# Of the lookahead. To sort without need only takes time, and of a pipe that holds one series after the other, each
# shorter than the lookahead, at least half of the first rows lie behind each other.
_MENDABLE = 0.5
# Of a pipe's first rows so many are looked at.
_LOOKS = 2_000
_PAST = "its moment is past (--sort puts any dump in order)"
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


class Dump:
    """What one file says; what is known of its GPUs and rows grows while it is read.

    Any one thread at a time may use it, and any other may close it meanwhile.

    Raises:
        ContractError: it has no usable header.
    """

    def __init__(
        self, file: DumpFile, *, limit: int | None = None, lookahead_rows: int = LOOKAHEAD_ROWS
    ) -> None:
        self._file = file
        self._limit = limit
        self._lookahead_rows = lookahead_rows
        self._latest = datetime.now(UTC) + _AHEAD
        #: What each GPU is, by host and UUID, as the last moment that was read has it.
        self.gpus: defaultdict[str, dict[str, Gpu]] = defaultdict(dict)
        self.rejects = Rejects()
        #: Values that mean "no value": left out, and no fault.
        self.blanks = 0
        self.rows = 0
        self._moment = lru_cache(maxsize=4096)(self._time_of)
        self._lines = Lines(file, self.rejects)
        self._header = self._lines.columns
        self._follow(self._header)
        #: The first rows of a pipe and what comes after them.
        self._begun: Iterator[Value] | None = None
        self._sorted: SortedValues | None = None

    @property
    def past(self) -> int:
        """How many rows came after their moment was given away."""
        return self.rejects.counts[_PAST]

    def close(self) -> None:
        """End what waits for a pipe or sorts, and leave nothing on disk."""
        self._file.stop()
        if self._sorted is not None:
            self._sorted.close()

    def seems_in_order(self) -> bool:
        """Look at lines from all over a file, or at the first rows of a pipe: whether the lookahead will do."""
        if self._file.is_pipe:
            values = self._read_all()
            first = deque(islice(values, self._lookahead_rows))
            rows_apart: float = max(1, self._lookahead_rows // _LOOKS)
            times = [value.time for value in islice(first, 0, None, int(rows_apart))]
            self._begun = chain(_drained(first), values)
        else:
            lines, rows_apart = self._file.sample(self._lookahead_rows // 8 or 1, self._limit)
            times = list(self._times_in(lines))
        return rows_behind(times) * rows_apart <= _MENDABLE * self._lookahead_rows

    def sort(self, advance: Callable[[int], None]) -> None:
        """Read it all and put it in order of time; `advance` is told how many rows more, time and again.

        Raises:
            MillraceError: there is no room for it.
        """
        self._sorted = SortedValues()
        values = self._begun or self._read_all()
        self._sorted.add(values, advance)

    def moments(self) -> Iterator[Moment]:
        """Read it once, and yield its moments in order of time.

        Raises:
            MillraceError: there is no room to sort them.
        """
        waiting: list[datetime] = []
        gathered: dict[datetime, dict[str, dict[str, Reading]]] = {}
        sizes: Counter[datetime] = Counter()
        xids: defaultdict[tuple[str, str], GpuXids] = defaultdict(GpuXids)
        held = 0
        lookahead_rows = 0 if self._sorted is not None else self._lookahead_rows
        newest_out = datetime.min.replace(tzinfo=UTC)

        def oldest() -> Moment:
            time = heapq.heappop(waiting)
            return self._completed(Moment(time, gathered.pop(time), sizes.pop(time)), xids)

        for value in self._values():
            time = value.time
            if time <= newest_out:
                self.rejects.add(_PAST, value.line)
                continue
            hosts = gathered.get(time)
            if hosts is None:
                hosts = gathered[time] = {}
                heapq.heappush(waiting, time)
            gpus = hosts.setdefault(value.identity.host, {})
            reading = gpus.get(value.identity.gpu_uuid)
            if reading is None:
                reading = gpus[value.identity.gpu_uuid] = Reading()
            if not _put(reading, value):
                self.rejects.add("the same metric of the same GPU and moment again", value.line)
                continue
            sizes[time] += 1
            held += 1
            if held > lookahead_rows and len(waiting) > 1:
                moment = oldest()
                newest_out = moment.time
                held -= moment.rows
                yield moment
        while waiting:
            yield oldest()

    def _values(self) -> Iterator[Value]:
        if self._sorted is not None:
            return self._sorted.values()
        begun, self._begun = self._begun, None
        return begun or self._read_all()

    def _read_all(self) -> Iterator[Value]:
        """Yield what the rows mean, up to the limit, as they come."""
        if self._columns != self._header:
            self._follow(self._header)
        for line, row in islice(self._lines.rows(), self._limit):
            self.rows += 1
            value = self._read(row, line)
            if value is not None:
                yield value

    def _follow(self, columns: Columns) -> None:
        """Read rows by these columns from here on."""
        self._columns = self._lines.columns = columns
        describing = [index for index, _, _ in columns.describing]
        # The last one twice: of a single one this would return no tuple.
        self._describing = itemgetter(*describing, describing[-1])
        self._identified = lru_cache(maxsize=65_536)(columns.identified)

    def _is_header(self, row: list[str]) -> bool:
        """Whether another file begins here, as where dumps were joined; then its columns count."""
        try:
            columns = dump_rows.columns(row)
        except ContractError:
            return False
        self.rows -= 1
        if columns != self._columns:
            self._follow(columns)
        return True

    def _times_in(self, lines: Iterable[str]) -> Iterator[datetime]:
        """Yield the times of lines; some may be parts of rows, or none."""
        for line in lines:
            try:
                row = next(csv.reader([line]), [])
                if len(row) == self._columns.count:
                    yield self._moment(row[self._columns.timestamp])
            except (csv.Error, ValueError):
                continue

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

    def _read(self, row: list[str], line: int) -> Value | None:
        if len(row) != self._columns.count:
            if not self._is_header(row):
                self.rejects.add("another number of columns than the header", line)
            return None
        text = row[self._columns.value].strip()
        if not text:
            self.blanks += 1
            return None
        try:
            read = self._meant(row, text, line)
        except ValueError as error:
            if self._is_header(row):
                return None
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

    def _meant(self, row: list[str], text: str, line: int) -> Value | None:
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
            return Value(time, line, identity, name, value, None)
        if metric == COUNT and (code := identity.series.get("xid")):
            if not code.isdecimal() or len(code) > 6 or int(code) > MAX_CODE or value < 0:
                raise ValueError("no count of an XID error")
            return Value(time, line, identity, name, value, int(code))
        return Value(time, line, identity, dump_rows.field_name(metric, identity.kind), value, None)


def _put(reading: Reading, read: Value) -> bool:
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


def _drained(values: deque[Value]) -> Iterator[Value]:
    while values:
        yield values.popleft()


def _merged(gpus: Sequence[Gpu]) -> Gpu:
    """Return what several series say of one GPU."""
    described: dict[str, object] = {}
    for gpu in gpus:
        described = msgspec.to_builtins(gpu) | described
    described["labels"] = {name: text for gpu in gpus for name, text in gpu.labels.items()}
    return dump_rows.interned(msgspec.json.encode(described))
