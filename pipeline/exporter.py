"""What dcgm-exporter shows at /metrics, as samples and descriptions of GPUs; no I/O.

Any metric that names a GPU by its UUID is kept, under our name where the table (`pipeline/dcgm.py`) knows it; one
that names none (the exporter's own) is passed by. Blanks, lines that cannot be read and what cannot be are left out
and counted. An XID error is a count that grew, never the gauge of the last code, which stays and does not show a
repeat.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from prometheus_client.parser import text_string_to_metric_families

from pipeline import dcgm
from pipeline.errors import ContractError
from pipeline.telemetry import Gpu, Sample, Why
from pipeline.telemetry_samples import MAX_XIDS, fitting

# Before and since dcgm-exporter 4.5 (#655), and of the metrics of NVLink.
_UUID = ("UUID", "uuid", "gpu_uuid", "Uuid")
_HOST = ("Hostname", "hostname", "host")
_MODEL = ("modelName", "model_name", "modelname")
_DRIVER = ("DCGM_FI_DRIVER_VERSION", "driver_version")
# By link there may be many series; the table's fields are of all links together.
_LINK = ("nvlink", "link")
_XID_COUNT = "DCGM_EXP_XID_ERRORS_COUNT"
_XID = "xid"
# One series for each of the label's values, none of them the GPU's alone.
_KINDS = ("clock_event", "health_status", "p2p_status")
_KNOWN = frozenset(
    {*_UUID, *_HOST, *_MODEL, *_DRIVER, *_LINK, *_KINDS, _XID, "gpu", "device", "pci_bus_id", "GPU_I_PROFILE"}
    | {"err_code", "err_msg", "window_size_in_ms", "instance", "job_name"}
)
_MAX_LABEL = 255

# What the parser raises.
_UNREADABLE = (ValueError, KeyError, IndexError, OverflowError)
_Series = tuple[str, Mapping[str, str], float]

#: By host, GPU and code: how often within the exporter's window.
XidCounts = Mapping[tuple[str, str, int], int]


@dataclass(slots=True)
class Scraped:
    """What one scrape said of one host; sample and description of each GPU have the same position."""

    host: str
    samples: list[Sample] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)


@dataclass(slots=True)
class _Seen:
    """The series of one GPU."""

    host: str
    labels: Mapping[str, str]
    values: dict[str, float] = field(default_factory=dict)
    xids: list[int] = field(default_factory=list)


def parse(
    text: str, moment: datetime, host: str, xids_before: XidCounts | None
) -> tuple[list[Scraped], XidCounts, Counter[Why]]:
    """Read a page; `host` is for series that name none, `xids_before` what the page before returned.

    Without a page before, no XID count is known to have grown: an error of the minutes before is not repeated with
    every start. Returned are hosts, the XID counts of this page, and how many values were left out.

    Raises:
        ContractError: it is no such page.
    """
    seen: dict[tuple[str, str], _Seen] = {}
    xids: dict[tuple[str, str, int], int] = {}
    dropped: Counter[Why] = Counter()
    for name, labels, value in _series(text, dropped):
        uuid = _first(labels, _UUID)
        if uuid is None:
            continue
        instance = labels.get("GPU_I_ID")
        uuid = f"MIG-{uuid}:{instance}" if instance else uuid
        if not _is_uuid(uuid):
            dropped["malformed"] += 1
            continue
        at = _first(labels, _HOST) or host
        gpu = seen.setdefault((at, uuid), _Seen(at, labels))
        if name == _XID_COUNT:
            code = labels.get(_XID, "")
            if code.isdecimal() and math.isfinite(value):
                xids[at, uuid, int(code)] = int(value)
                before = value if xids_before is None else xids_before.get((at, uuid, int(code)), 0)
                gpu.xids += [int(code)] * min(MAX_XIDS, max(0, int(value - before)))
        elif not math.isfinite(value):
            dropped["blank"] += 1
        else:
            _put(gpu, name, labels, value)
    return _by_host(seen, moment, dropped), xids, dropped


def _put(gpu: _Seen, name: str, labels: Mapping[str, str], value: float) -> None:
    kind = _first(labels, _KINDS)
    if kind is not None:
        name = f"{name}:{kind}"
    if name not in gpu.values:
        gpu.values[name] = value
    elif _first(labels, _LINK) is not None and not dcgm.is_blank(value):
        gpu.values[name] += value


def _by_host(
    seen: Mapping[tuple[str, str], _Seen], moment: datetime, dropped: "Counter[Why]"
) -> list[Scraped]:
    hosts: dict[str, Scraped] = {}
    for (host, uuid), gpu in seen.items():
        values = {}
        for name, value, reason in dcgm.judged(gpu.values):
            if reason is None:
                values[name] = value
            else:
                dropped[reason] += 1
        scraped = hosts.setdefault(host, Scraped(host))
        scraped.samples.append(Sample(gpu_uuid=uuid, time=moment, values=values, xids=fitting(gpu.xids)))
        scraped.gpus.append(_described(uuid, gpu.labels))
    return list(hosts.values())


def _described(uuid: str, labels: Mapping[str, str]) -> Gpu:
    index = labels.get("gpu", "")
    others = {
        _clean(name): _clean(value) for name, value in labels.items() if name not in _KNOWN and _clean(value)
    }
    return Gpu(
        gpu_uuid=uuid,
        index=int(index) if index.isdecimal() and len(index) < 7 else None,
        model=_clean(_first(labels, _MODEL)) or None,
        device=_clean(labels.get("GPU_I_PROFILE") or labels.get("device")) or None,
        pci_bus_id=_clean(labels.get("pci_bus_id")) or None,
        parent_uuid=_first(labels, _UUID) if labels.get("GPU_I_ID") else None,
        driver_version=_clean(_first(labels, _DRIVER)) or None,
        labels=others,
    )


def _series(text: str, dropped: "Counter[Why]") -> list[_Series]:
    # Without the types: the parser adds `_total` to the name of a counter that has none, as DCGM's have.
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    try:
        return list(_read("\n".join(lines)))
    except _UNREADABLE as error:
        return _by_line(lines, dropped, error)


def _by_line(lines: Iterable[str], dropped: "Counter[Why]", first: Exception) -> list[_Series]:
    """Read a page on which something is wrong: one bad line does not hide the others."""
    found: list[_Series] = []
    for line in lines:
        try:
            found += _read(line)
        except _UNREADABLE:
            dropped["malformed"] += 1
    if not found:
        raise ContractError(f"not Prometheus metrics: {first}") from first
    return found


def _read(text: str) -> Iterator[_Series]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, float(sample.value)  # whole numbers come as int


def _first(labels: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    for name in names:
        if found := labels.get(name, "").strip():
            return found
    return None


def _is_uuid(text: str) -> bool:
    return len(text) <= 128 and all("!" <= character <= "~" for character in text)


def _clean(text: str | None) -> str:
    return "".join(character for character in text or "" if character.isprintable()).strip()[:_MAX_LABEL]
