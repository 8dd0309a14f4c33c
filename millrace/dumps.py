"""DCGM dumps: rows of the long CSV format, one value each, gathered into the samples of one moment after another.

A dump is streamed, never loaded. What a row cannot mean is left out, counted and listed with its line; its
neighbours are unharmed. Values stay as they are written. Rows may be out of order by `LOOKAHEAD_ROWS`, as in dumps
that are written metric by metric.
"""

import csv
import gzip
import heapq
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pipeline import dcgm, telemetry
from pipeline.errors import ContractError

# About 25 MB of rows that wait for their moment to be complete.
LOOKAHEAD_ROWS = 200_000
_LINES_KEPT = 5
_REQUIRED = ("timestamp", "metric_name", "value")
_METRIC = re.compile(r"[A-Za-z_:][A-Za-z0-9_:.]{0,127}")
# Labels that say what the GPU is, in the spellings of dcgm-exporter's versions, by our column.
_IDENTITY = {
    "UUID": "uuid", "uuid": "uuid", "gpu_uuid": "uuid", "Hostname": "hostname", "hostname": "hostname",
    "gpu": "gpu_id", "device": "device", "modelName": "modelname", "model_name": "modelname",
    "pci_bus_id": "pci_bus_id", "DCGM_FI_DRIVER_VERSION": "driver_version", "__name__": "metric_name",
}  # fmt: skip
# Labels of one series, not of the GPU.
_OF_A_SERIES = frozenset(
    {"GPU_I_ID", "GPU_I_PROFILE", "err_code", "err_msg", "xid", "window_size_in_ms", "clock_event"}
)
_NOT_LABELS = _OF_A_SERIES | frozenset(_IDENTITY)
_KNOWN_COLUMNS = frozenset({*_REQUIRED, *_IDENTITY.values(), "labels_raw"})


class Moment(NamedTuple):
    """All values that a dump has of one moment: by host, GPU and field."""

    time: datetime
    hosts: Mapping[str, Mapping[str, Mapping[str, float]]]
    rows: int


class _Identity(NamedTuple):
    host: str
    gpu_uuid: str


@dataclass
class Rejects:
    """What was left out: how much by reason, and in which lines first."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Count a row."""
        self.counts[reason] += 1
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
        #: What each GPU is, by host and UUID.
        self.gpus: dict[str, dict[str, telemetry.Gpu]] = {}
        self.rejects = Rejects()
        #: Values that mean "no value": left out, and no fault.
        self.blanks = 0
        self.rows = 0
        with open_text(path) as file:
            try:
                self._columns = _columns(next(csv.reader(file), []))
            except csv.Error as error:
                raise ContractError(f"{path}: not CSV: {error}") from None
            except UnicodeDecodeError:
                raise ContractError(f"{path}: not UTF-8 text") from None
            except (OSError, EOFError, zlib.error) as error:
                raise ContractError(f"{path}: {error}") from None

    def moments(self) -> Iterator[Moment]:
        """Read the file once, and yield its moments in order of time."""
        waiting: list[datetime] = []
        gathered: dict[datetime, dict[str, dict[str, dict[str, float]]]] = {}
        sizes: Counter[datetime] = Counter()
        held = 0
        newest_out = datetime.min.replace(tzinfo=UTC)

        def oldest() -> Moment:
            time = heapq.heappop(waiting)
            return Moment(time, gathered.pop(time), sizes.pop(time))

        for line, row in self._numbered_rows():
            read = self._read(row, line)
            if read is None:
                continue
            time, identity, name, value = read
            if time <= newest_out:
                self.rejects.add("its moment is past: sort the dump by time", line)
                continue
            hosts = gathered.get(time)
            if hosts is None:
                hosts = gathered[time] = {}
                heapq.heappush(waiting, time)
            values = hosts.setdefault(identity.host, {}).setdefault(identity.gpu_uuid, {})
            if name in values:
                self.rejects.add("the same metric of the same GPU and moment again", line)
                continue
            values[name] = value
            sizes[time] += 1
            held += 1
            if held > self._lookahead_rows and len(waiting) > 1:
                moment = oldest()
                newest_out = moment.time
                held -= moment.rows
                yield moment
        while waiting:
            yield oldest()

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield rows with their line; what is not CSV is counted."""
        with open_text(self._path) as file:
            reader = csv.reader(file)
            next(reader, None)
            left = math.inf if self._limit is None else self._limit
            while left > 0:
                line = reader.line_num + 1
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    self.rejects.add("not CSV", line)
                    continue
                except (OSError, EOFError, zlib.error) as error:
                    # A gzip file that was cut off: what came before it is good.
                    self.rejects.add(f"the file ends too early: {error}", line)
                    return
                if row:
                    self.rows += 1
                    left -= 1
                    yield line, row

    def _read(self, row: list[str], line: int) -> tuple[datetime, _Identity, str, float] | None:
        columns = self._columns
        if len(row) != columns.count:
            self.rejects.add("another number of columns than the first line", line)
            return None
        text = row[columns.value].strip()
        if not text:
            self.blanks += 1
            return None
        try:
            value = float(text)
            time = _moment(row[columns.timestamp].strip())
            name = _field_name(row[columns.metric_name].strip())
            if not math.isfinite(value) or "_" in text:
                raise ValueError("the value is not a number")
            identity = self._identity(row, line)
        except ValueError as error:
            reason = str(error)
            self.rejects.add("the value is not a number" if "could not convert" in reason else reason, line)
            return None
        why = dcgm.why_dropped(name, value)
        if why == "blank":
            self.blanks += 1
            return None
        if why is not None:
            self.rejects.add(f"the value is {why.replace('_', ' ')} of {name}", line)
            return None
        return time, identity, name, value

    def _identity(self, row: list[str], line: int) -> _Identity:
        """Say whose value it is, and remember what its GPU is."""
        columns = self._columns
        labels: Mapping[str, str] = {}
        if columns.labels_raw is not None and row[columns.labels_raw]:
            try:
                labels = _labels(row[columns.labels_raw])
            except ValueError as error:
                self.rejects.add(f"{error} (the value is kept)", line)
        found = {_IDENTITY[name]: text for name, text in labels.items() if name in _IDENTITY}
        found |= {name: text for name, index in columns.identity if (text := row[index].strip())}
        host, gpu_uuid = found.get("hostname", ""), found.get("uuid", "")
        instance = labels.get("GPU_I_ID")
        if instance and gpu_uuid:
            # As `millrace collect --from-exporter` calls it: dcgm-exporter gives instances the UUID of their GPU.
            found["parent"], gpu_uuid = gpu_uuid, f"MIG-{gpu_uuid}:{instance}"
            found["device"] = labels.get("GPU_I_PROFILE") or found.get("device", "")
        if gpu_uuid in self.gpus.get(host, {}):
            return _Identity(host, gpu_uuid)
        if not gpu_uuid:
            raise ValueError("no GPU UUID")
        if not host:
            raise ValueError("no host name")
        more = {name: text for name, text in labels.items() if name not in _NOT_LABELS}
        more |= {name: text for name, index in columns.others if (text := row[index].strip())}
        gpu = _gpu(host, gpu_uuid, found, more)
        self.gpus.setdefault(host, {})[gpu_uuid] = gpu
        return _Identity(host, gpu_uuid)


@dataclass(frozen=True)
class _Columns:
    count: int
    timestamp: int
    metric_name: int
    value: int
    labels_raw: int | None
    identity: Sequence[tuple[str, int]]
    #: Kept as labels of the GPU, under the name in the header.
    others: Sequence[tuple[str, int]]


def _columns(header: list[str]) -> _Columns:
    """Find the columns, in any order and case.

    Raises:
        ContractError: one is missing or there twice.
    """
    given = [name.strip() for name in header]
    names = [_IDENTITY.get(name, name.casefold()) for name in given]
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise ContractError(f"the dump's first line has no column {', '.join(missing)}: not a DCGM dump")
    for identity in ("uuid", "hostname"):
        if identity not in names and "labels_raw" not in names:
            raise ContractError(f"the dump has neither a column {identity} nor labels_raw")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ContractError(f"the dump's first line has the column {twice[0]!r} twice")
    identities = {*_IDENTITY.values()} - {"metric_name"}
    return _Columns(
        count=len(names),
        timestamp=names.index("timestamp"),
        metric_name=names.index("metric_name"),
        value=names.index("value"),
        labels_raw=names.index("labels_raw") if "labels_raw" in names else None,
        identity=[(name, index) for index, name in enumerate(names) if name in identities],
        others=[
            (given[index], index)
            for index, name in enumerate(names)
            if name not in _KNOWN_COLUMNS and given[index] not in _OF_A_SERIES
        ],
    )


def _gpu(host: str, gpu_uuid: str, found: Mapping[str, str], labels: Mapping[str, str]) -> telemetry.Gpu:
    described: dict[str, Any] = {
        "gpu_uuid": gpu_uuid, "model": found.get("modelname"), "device": found.get("device"),
        "pci_bus_id": found.get("pci_bus_id"), "parent_uuid": found.get("parent"),
        "driver_version": found.get("driver_version"),
        "labels": {name: text for name, text in labels.items() if text},
    }  # fmt: skip
    index = found.get("gpu_id", "")
    if index.isdecimal():
        described["index"] = int(index)
    try:
        msgspec.convert(host, telemetry.Name)
        return msgspec.convert(described, telemetry.Gpu)
    except msgspec.ValidationError as error:
        raise ValueError(f"the GPU or its host cannot be called so: {error}") from None


@lru_cache(maxsize=4096)
def _field_name(metric: str) -> str:
    """Return our name of a metric, or its own if nobody knows it."""
    known = dcgm.find(metric)
    if known is not None:
        return known.name
    if not _METRIC.fullmatch(metric):
        raise ValueError("no name of a metric")
    return metric


@lru_cache(maxsize=4096)
def _moment(text: str) -> datetime:
    """Read ISO 8601 (UTC without a zone), or seconds, milli-, micro- or nanoseconds since 1970."""
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    try:
        seconds = float(text)
        while abs(seconds) > 1e11:  # the year 5138 in seconds, 1973 in milliseconds
            seconds /= 1000
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("the timestamp is no time") from None


@lru_cache(maxsize=65_536)
def _labels(body: str) -> Mapping[str, str]:
    """Read a label body as Prometheus writes it, with commas and quotes in its values."""
    if "\n" in body or "\r" in body:
        raise ValueError("labels_raw cannot be read")
    body = body.removeprefix("{").removesuffix("}")
    # A body may bring the name of its metric along; the parser wants exactly one.
    line = f"{{{body}}} 0\n" if re.search(r"(^|,)\s*__name__\s*=", body) else f"x{{{body}}} 0\n"
    try:
        found = [sample for family in text_string_to_metric_families(line) for sample in family.samples]
    except ValueError:
        raise ValueError("labels_raw cannot be read") from None
    if len(found) != 1:
        raise ValueError("labels_raw cannot be read")
    return found[0].labels


def open_text(path: Path) -> TextIO:
    """Open as text whatever its name says: gzip files are told by their first bytes."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open("r", encoding="utf-8-sig", errors="replace", newline="")
