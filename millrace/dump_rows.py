"""One row of a DCGM dump: its columns, its time, its labels, and whose value it is; no I/O.

`job` and `instance` are Prometheus's own and say nothing of a GPU; nor does the pod in which the exporter runs.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pipeline import dcgm, telemetry
from pipeline.errors import ContractError

_REQUIRED = ("timestamp", "metric_name", "value")
_METRIC = re.compile(r"[A-Za-z_:][A-Za-z0-9_:.]{0,127}")
_LABELS_OF_METRIC = re.compile(r"^[A-Za-z_:][A-Za-z0-9_:.]*(?=\{)")
# Labels that say what the GPU is, in the spellings of dcgm-exporter's versions, by our column; the first counts.
_IDENTITY = {
    "UUID": "uuid", "uuid": "uuid", "gpu_uuid": "uuid", "Hostname": "hostname", "hostname": "hostname",
    "host": "hostname", "gpu_id": "gpu_id", "gpu": "gpu_id", "device": "device", "modelName": "modelname",
    "model_name": "modelname", "pci_bus_id": "pci_bus_id", "DCGM_FI_DRIVER_VERSION": "driver_version",
    "driver_version": "driver_version",
}  # fmt: skip
# Labels of one series, not of the GPU. A GPU has several series of a metric with one of the last three.
_KINDS = ("clock_event", "health_status", "p2p_status")
_LINKS = ("nvlink", "link")
_OF_A_SERIES = (
    "GPU_I_ID",
    "GPU_I_PROFILE",
    "err_code",
    "err_msg",
    "xid",
    "window_size_in_ms",
    *_LINKS,
    *_KINDS,
)
_OF_THE_SCRAPE = ("job", "instance", "__name__")
_USERS = ("pod", "namespace", "container")
# A column's name, of any case.
_IDENTITY_COLUMNS = {name.casefold(): ours for name, ours in _IDENTITY.items()}
_SERIES_COLUMNS = {name.casefold(): name for name in _OF_A_SERIES}
_COLUMN_ORDER = {name.casefold(): place for place, name in enumerate(_IDENTITY)}

# Of nine digits on a number is of seconds and less; `20250718` is a date.
_NUMBER = re.compile(r"[+-]?(\d{9,}(\.\d*)?|\d+(\.\d*)?[eE][+-]?\d+)")
# As Go (with its monotonic clock), log files and people write it.
_WRITTEN = re.compile(
    r"(\d{4})[-/](\d\d)[-/](\d\d)[ T](\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?)\s*"
    r"(?:([+-]\d\d:?\d\d)(?: (?:[A-Z]{2,5}|[+-]\d\d(?:\d\d)?))?|UTC|GMT|Z)?(?: m=\S+)?"
)


class Identity(NamedTuple):
    """Whose value it is."""

    host: str
    gpu_uuid: str
    gpu: telemetry.Gpu
    #: The labels that tell this series from others of the GPU.
    series: Mapping[str, str]
    #: Whether its labels could be read.
    is_whole: bool

    @property
    def kind(self) -> str:
        """What the series counts, where a GPU has one for each kind."""
        return next(filter(None, map(self.series.get, _KINDS)), "")

    @property
    def link(self) -> str:
        """The NVLink, where the GPU has a series for each."""
        return next(filter(None, map(self.series.get, _LINKS)), "")


class Value(NamedTuple):
    """What one row says."""

    time: datetime
    line: int
    identity: Identity
    name: str
    value: float
    #: Of a count of XID errors.
    xid: int | None


@dataclass(frozen=True)
class Columns:
    """Where everything is in a row."""

    count: int
    timestamp: int
    metric_name: int
    value: int
    #: What says whose value it is: index, what it is (`labels_raw`, `identity`, `series`, `other`), and its name.
    describing: Sequence[tuple[int, str, str]]

    def identified(self, cells: tuple[str, ...]) -> Identity:
        """Say whose the describing cells are (there may be more of them); equal GPUs are the same object.

        Raises:
            ValueError: nobody's.
        """
        given: dict[str, dict[str, str]] = {"identity": {}, "series": {}, "other": {}}
        labels: Mapping[str, str] = {}
        is_whole = True
        for (_, meaning, name), cell in zip(self.describing, cells, strict=False):
            if not (text := cell.strip()):
                continue
            if meaning != "labels_raw":
                given[meaning].setdefault(name, text)
                continue
            try:
                labels = _labels(text)
            except (ValueError, KeyError, IndexError):
                is_whole = False
        found: dict[str, str] = {}
        for name, ours in _IDENTITY.items():
            if text := labels.get(name, "").strip():
                found.setdefault(ours, text)
        found |= given["identity"]
        series = {name: labels[name] for name in _OF_A_SERIES if labels.get(name)} | given["series"]
        own = {n: text for n, text in labels.items() if n not in _IDENTITY and n not in _OF_A_SERIES}
        return _identity(found, series, _users(own | given["other"]), is_whole)


def columns(header: list[str]) -> Columns:
    """Find the columns, in any order and case.

    Raises:
        ContractError: one is missing or there twice.
    """
    # Of files that were joined each has its byte order mark.
    given = [name.strip().removeprefix("\ufeff") for name in header]
    names = ["metric_name" if name == "__name__" else name.casefold() for name in given]
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        if len(given) == 1 and (separator := next((s for s in ";\t|" if s in given[0]), None)):
            raise ContractError(f"columns are separated by {separator!r}, and not by commas")
        raise ContractError(f"no column {', '.join(missing)}: not the header of a DCGM dump")
    ours = {_IDENTITY_COLUMNS.get(name) for name in names}
    for identity in ("uuid", "hostname"):
        if identity not in ours and "labels_raw" not in names:
            raise ContractError(f"neither a column {identity} nor labels_raw")
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ContractError(f"the column {twice[0]!r} twice")
    describing = []
    for index in sorted(range(len(names)), key=lambda index: _COLUMN_ORDER.get(names[index], 0)):
        name = names[index]
        if name == "labels_raw":
            describing.append((index, "labels_raw", name))
        elif name in _IDENTITY_COLUMNS:
            describing.append((index, "identity", _IDENTITY_COLUMNS[name]))
        elif name in _SERIES_COLUMNS:
            describing.append((index, "series", _SERIES_COLUMNS[name]))
        elif name and name not in _REQUIRED and not name.startswith("unnamed:"):
            describing.append((index, "other", given[index]))
    time, metric, value = (names.index(name) for name in _REQUIRED)
    return Columns(len(names), time, metric, value, tuple(describing))


def _identity(
    found: Mapping[str, str], series: Mapping[str, str], labels: Mapping[str, str], is_whole: bool
) -> Identity:
    host, gpu_uuid = found.get("hostname", ""), found.get("uuid", "")
    if not gpu_uuid:
        raise ValueError("no GPU UUID")
    if not host:
        raise ValueError("no host name")
    parent, device = None, found.get("device")
    if instance := series.get("GPU_I_ID"):
        # As `millrace collect --from-exporter` calls it: dcgm-exporter gives instances the UUID of their GPU.
        parent, gpu_uuid = gpu_uuid, f"MIG-{gpu_uuid}:{instance}"
        device = series.get("GPU_I_PROFILE") or device
    index = found.get("gpu_id", "")
    described: dict[str, Any] = {
        "gpu_uuid": gpu_uuid, "model": found.get("modelname"), "device": device, "parent_uuid": parent,
        "pci_bus_id": found.get("pci_bus_id"), "driver_version": found.get("driver_version"),
        "index": int(index) if index.isdecimal() and len(index) < 7 else None, "labels": labels,
    }  # fmt: skip
    try:
        msgspec.convert(host, telemetry.Name)
        gpu = interned(msgspec.json.encode(described))
    except msgspec.ValidationError as error:
        raise ValueError(f"the GPU or its host cannot be called so: {error}") from None
    return Identity(host, gpu_uuid, gpu, series, is_whole)


@lru_cache(maxsize=65_536)
def interned(described: bytes) -> telemetry.Gpu:
    """Return the one object for a GPU described so."""
    return msgspec.json.decode(described, type=telemetry.Gpu)


def _users(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Say who uses the GPU, and not who exports it.

    Prometheus renames the labels of dcgm-exporter that its own would hide: a pod's `pod` is `exported_pod`.
    """
    exported = {name: text for name in _USERS if (text := labels.get(f"exported_{name}"))}
    is_the_exporter = bool(exported) or "dcgm-exporter" in labels.get("pod", "")
    own = {
        name: text
        for name, text in labels.items()
        if text
        and name not in _OF_THE_SCRAPE
        and name.removeprefix("exported_") not in (_USERS if is_the_exporter else ())
    }
    return own | exported


@lru_cache(maxsize=4096)
def field_name(metric: str, kind: str = "") -> str:
    """Return our name of a metric, or its own if nobody knows it.

    Raises:
        ValueError: it cannot be one.
    """
    known = dcgm.find(metric)
    name = (metric if known is None else known.name) + (f":{kind}" if kind else "")
    if not _METRIC.fullmatch(name):
        raise ValueError("no name of a metric")
    return name


@lru_cache(maxsize=4096)
def moment(text: str) -> datetime:
    """Read ISO 8601 and its like (UTC without a zone), or seconds, milli-, micro- or nanoseconds since 1970.

    Raises:
        ValueError: it is no time.
    """
    try:
        if _NUMBER.fullmatch(text):
            seconds = float(text)
            if not math.isfinite(seconds):
                raise ValueError
            while abs(seconds) > 1e11:  # the year 5138 in seconds, 1973 in milliseconds
                seconds /= 1000
            return datetime.fromtimestamp(seconds, UTC)
        if written := _WRITTEN.fullmatch(text):
            year, month, day, clock, zone = written.groups(default="")
            text = f"{year}-{month}-{day}T{clock}{zone}"
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("the timestamp is no time") from None


def _labels(body: str) -> Mapping[str, str]:
    """Read a label body as Prometheus writes it, with commas and quotes in its values."""
    if "\n" in body or "\r" in body:
        raise ValueError
    body = _LABELS_OF_METRIC.sub("", body).removeprefix("{").removesuffix("}")
    # A body may bring the name of its metric along; the parser wants exactly one.
    line = f"{{{body}}} 0\n" if re.search(r"(^|,)\s*__name__\s*=", body) else f"x{{{body}}} 0\n"
    found = [sample for family in text_string_to_metric_families(line) for sample in family.samples]
    if len(found) != 1:
        raise ValueError
    return found[0].labels
