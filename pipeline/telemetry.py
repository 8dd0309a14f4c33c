"""The contracts of GPU telemetry: samples in, windows and alerts out, as CloudEvents in Kafka's binary mode.

`gpu.samples.v1` may be written by anyone: one JSON object with the samples of a host. Arbitrary bytes raise
`ContractError` and nothing else; one bad sample does not harm its neighbours, it is left out and counted. Values
have the names and units of `pipeline/dcgm.py`; a value that is not known is absent. No I/O.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pipeline import dcgm, telemetry_samples
from pipeline.errors import ContractError
from pipeline.events import Outgoing, Record
from pipeline.telemetry_samples import FAULTS, Moment
from pipeline.telemetry_samples import MAX_SAMPLES as MAX_SAMPLES
from pipeline.telemetry_samples import Gpu as Gpu
from pipeline.telemetry_samples import GpuUuid as GpuUuid
from pipeline.telemetry_samples import Name as Name
from pipeline.telemetry_samples import Sample as Sample
from pipeline.telemetry_samples import Samples as Samples
from pipeline.telemetry_samples import Why as Why

SAMPLES_TYPE = "millrace.gpu.samples.v1"
WINDOWS_TYPE = "millrace.gpu.windows.v1"
ALERT_TYPE = "millrace.gpu.alert.v1"

# What a name that DCGM does not know may look like: a label and a query parameter at once.
_FIELD_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:.]{0,127}")
MAX_UNKNOWN_FIELDS = 64
# What a `Name` must not hold.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A publisher's clock may be ahead of Kafka's by so much; beyond it the time is wrong.
MAX_AHEAD = timedelta(minutes=5)
#: GPUs have no earlier samples.
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)

AlertId = GpuUuid
Text = Annotated[str, msgspec.Meta(max_length=1000, pattern=r"^[^\x00]*$")]
Severity = Literal["info", "warning", "critical"]


class Aggregate(msgspec.Struct, frozen=True, array_like=True):
    """One field of one GPU over a window; of a counter the minimum is its first value and the maximum its last."""

    count: int
    minimum: float
    maximum: float
    mean: float
    last: float


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a GPU was compared with."""

    count: int
    median: float
    #: Median absolute deviation, not below its floor.
    deviation: float
    #: Modified z-score of this GPU.
    score: float


class Condition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A rule that holds for a GPU at a window's end."""

    rule: Name
    severity: Severity
    #: `pending` until it has held for `for_seconds`.
    state: Literal["pending", "firing"]
    #: Start of the window with which it began: with GPU and rule the identity of an alert.
    since: Moment
    for_seconds: float = 0.0
    #: What was seen, of which field, against what limit.
    value: float | None = None
    limit: float | None = None
    field: Name | None = None
    peers: Peers | None = None
    #: For a person: what was seen against what limit, for how long, compared with whom.
    message: Text = ""
    #: What to do next: `ignore`, `restart_app`, `reset_gpu`, `restart_machine`, `inspect`, …
    action: Name | None = None
    runbook: Text | None = None
    labels: dict[Name, Name] = {}


class GpuWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU over one window, and what the detector knows after it."""

    gpu_uuid: GpuUuid
    host: Name
    model: Name | None = None
    samples: int = 0
    values: dict[str, Aggregate] = {}
    #: By detector, higher is stranger.
    scores: dict[Name, float] = {}
    #: All conditions that hold, not only new ones; one that is not listed any more is over.
    conditions: tuple[Condition, ...] = ()
    xids: tuple[int, ...] = ()
    #: For `watch` alone: any JSON object.
    state: dict[str, Any] = {}


class Windows(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A closed window of all GPUs that share a record key: value of `gpu.windows.v1`.

    Identity is (GPU UUID, start). A window of zero length is an event, such as an XID error: its conditions add to
    those that hold and end none.
    """

    key: Name
    start: Moment
    end: Moment
    gpus: Annotated[tuple[GpuWindow, ...], msgspec.Meta(min_length=1)]
    #: Of the rules that were applied.
    rules_version: Name = "0"
    #: Which of how many records of the same window this is: a key with very many GPUs needs several.
    part: Annotated[int, msgspec.Meta(ge=0)] = 0
    parts: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def is_event(self) -> bool:
        """Whether it has no length."""
        return self.start == self.end


class Alert(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step in the life of an alert: value of `gpu.alerts.v1`, keyed by its id."""

    id: AlertId
    state: Literal["pending", "firing", "resolved"]
    gpu_uuid: GpuUuid
    host: Name
    #: When the condition began, when this state did.
    since: Moment
    time: Moment
    #: As it was last seen; of a resolved alert, as it was when it last held.
    condition: Condition
    model: Name | None = None


Judged = tuple[Samples, Mapping[Why, int]]
Decoded = TypeVar("Decoded")

_encoder = msgspec.json.Encoder()
_windows_decoder = msgspec.json.Decoder(Windows)
_alert_decoder = msgspec.json.Decoder(Alert)


def alert_id(gpu_uuid: str, rule: str, since: datetime) -> str:
    """Derive the identity of an alert: a condition that ends and comes back is another one."""
    text = msgspec.json.encode([gpu_uuid, rule, since.astimezone(UTC)])
    return hashlib.sha256(text).hexdigest()[:32]


def encode_samples(samples: Samples, key: str | None = None) -> Outgoing:
    """Encode for `gpu.samples.v1`; GPUs that share a key (the host by default) are compared with each other."""
    return _outgoing(
        key or samples.host, SAMPLES_TYPE, samples, f"{samples.host}/{samples.samples[-1].time.isoformat()}"
    )


def encode_windows(windows: Windows) -> Outgoing:
    """Encode for `gpu.windows.v1`."""
    return _outgoing(
        windows.key,
        WINDOWS_TYPE,
        windows,
        f"{windows.key}/{windows.start.isoformat()}/{windows.end.isoformat()}",
    )


def encode_alert(alert: Alert) -> Outgoing:
    """Encode for `gpu.alerts.v1`."""
    return _outgoing(alert.id, ALERT_TYPE, alert, f"{alert.id}/{alert.state}")


def key_of(record: Record, host: str) -> str:
    """Return what the GPUs of a record share, whatever bytes its key is; the host where it has none."""
    text = (record.key or b"").decode("utf-8", "replace")
    return _CONTROL.sub("\ufffd", text)[:255] or host


def decode_samples(record: Record) -> Judged:
    """Read samples with our field names, without what cannot be; and how much was left out, by reason.

    What is ahead or ancient is judged by the record's own time, so that a second reading says the same.

    Raises:
        ContractError: another type, not JSON of samples, or nothing of it can be used.
    """
    _check_type(record, SAMPLES_TYPE)
    dropped: Counter[Why] = Counter()
    samples = telemetry_samples.read(record.value or b"", dropped)
    latest = record.published_at + MAX_AHEAD
    kept = []
    for sample in samples.samples:
        if sample.time > latest:
            dropped["ahead"] += 1
        elif sample.time < EARLIEST:
            dropped["ancient"] += 1
        else:
            kept.append(_named(sample, dropped))
    if not kept:
        raise ContractError(f"no sample can be used: {dict(dropped)}")
    return msgspec.structs.replace(samples, samples=tuple(kept)), dropped


def decode_windows(record: Record) -> Windows:
    """Read windows.

    Raises:
        ContractError: another type, or not windows.
    """
    return _decode(record, WINDOWS_TYPE, _windows_decoder, "closed windows")


def decode_alert(record: Record) -> Alert:
    """Read a step in the life of an alert.

    Raises:
        ContractError: another type, or not an alert.
    """
    return _decode(record, ALERT_TYPE, _alert_decoder, "an alert")


def _named(sample: Sample, dropped: "Counter[Why]") -> Sample:
    """Give values our names; leave out blanks, what cannot be, and unknown names beyond a few."""
    plain = dcgm.PLAIN
    for name, value in sample.values.items():
        limits = plain.get(name)
        if limits is None or not limits[0] <= value <= limits[1]:
            return _renamed(sample, dropped)
    return sample


def _renamed(sample: Sample, dropped: "Counter[Why]") -> Sample:
    values: dict[str, float] = {}
    unknown = 0
    for name, value, reason in dcgm.judged(sample.values):
        is_ours = name in dcgm.PLAIN
        unknown += not is_ours
        if reason is not None:
            dropped[reason] += 1
        elif is_ours or (unknown <= MAX_UNKNOWN_FIELDS and _FIELD_NAME.fullmatch(name)):
            values[name] = value
        else:
            dropped["malformed"] += 1
    return msgspec.structs.replace(sample, values=values)


def _outgoing(key: str, event_type: str, value: msgspec.Struct, event_id: str) -> Outgoing:
    headers = (
        ("ce_specversion", "1.0"),
        ("ce_type", event_type),
        ("ce_id", event_id),
        ("ce_source", "millrace/telemetry"),
        ("content-type", "application/json"),
    )
    return Outgoing(
        key.encode(), _encoder.encode(value), tuple((name, text.encode()) for name, text in headers)
    )


def _decode(record: Record, event_type: str, decoder: "msgspec.json.Decoder[Decoded]", what: str) -> Decoded:
    _check_type(record, event_type)
    try:
        return decoder.decode(record.value or b"")
    except FAULTS as error:
        raise ContractError(f"not {what}: {error}") from error


def is_of_type(record: Record, expected: str) -> bool:
    """Whether a record says that it is of a type, or says nothing."""
    given = record.header("ce_type")
    return given is None or given == expected.encode()


def _check_type(record: Record, expected: str) -> None:
    if not is_of_type(record, expected):
        given = (record.header("ce_type") or b"")[:80].decode("utf-8", "replace")
        raise ContractError(f"ce_type is {given!r}, this reads {expected}")
