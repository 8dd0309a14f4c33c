"""The value of `gpu.samples.v1`, and what is left of one of which some part is bad. No I/O."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pipeline.errors import ContractError

# A record of `gpu.samples.v1`; about 1,000 GPUs of a cluster's shared key, with room.
MAX_SAMPLES = 10_000
# Of one GPU at one moment. Every code becomes a condition with its runbook.
MAX_XIDS = 64

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
# `$` alone takes a newline at the end. Printable and without spaces; NVIDIA's are GPU-<uuid> and MIG-<uuid>.
GpuUuid = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,128}$(?!\n)")]
# No control characters: shown in terminals, and PostgreSQL has no U+0000.
_PLAIN = r"^[^\x00-\x1f\x7f]*$(?!\n)"
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PLAIN)]
Xid = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Why = Literal["malformed", "ahead", "ancient", "blank", "below_minimum", "above_maximum"]
Decoded = TypeVar("Decoded")


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a GPU is; its UUID is its identity, index and device name are not stable."""

    gpu_uuid: GpuUuid
    index: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    model: Name | None = None
    #: `nvidia0`, or the MIG profile.
    device: Name | None = None
    pci_bus_id: Name | None = None
    #: Of a MIG instance: the GPU that it is a part of.
    parent_uuid: GpuUuid | None = None
    driver_version: Name | None = None
    #: Who uses it: container, pod, namespace, job.
    labels: dict[Name, Name] = {}


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU at one moment."""

    gpu_uuid: GpuUuid
    time: Moment
    #: By field name, in DCGM's units.
    values: dict[str, float] = {}
    #: XID errors that were reported at this moment, in order.
    xids: Annotated[tuple[Xid, ...], msgspec.Meta(max_length=MAX_XIDS)] = ()
    #: `lost`: the driver no longer answers for this GPU.
    state: Literal["ok", "lost"] = "ok"
    #: Of a replay: when the source says that this was.
    source_time: Moment | None = None


class Samples(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The samples of one host over one publish interval: value of `gpu.samples.v1`."""

    host: Name
    samples: Annotated[tuple[Sample, ...], msgspec.Meta(min_length=1, max_length=MAX_SAMPLES)]
    #: What is known of the GPUs; a publisher repeats it now and then, not in every record.
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=MAX_SAMPLES)] = ()
    #: nvml, dcgm-exporter, replay, simulate or whoever publishes.
    source: Name = "unknown"


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """`Samples` of which some part is bad."""

    host: Name
    samples: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=MAX_SAMPLES)]
    gpus: list[msgspec.Raw] | None = None
    source: Annotated[str, msgspec.Meta(max_length=255, pattern=_PLAIN)] | None = None


class _LooseSample(msgspec.Struct, frozen=True, kw_only=True):
    """A `Sample` of which some value is bad."""

    gpu_uuid: GpuUuid
    time: Moment
    values: dict[str, msgspec.Raw] | None = None
    xids: list[msgspec.Raw] | None = None
    state: Literal["ok", "lost"] | None = None
    source_time: Moment | None = None


_samples_decoder = msgspec.json.Decoder(Samples)
_envelope_decoder = msgspec.json.Decoder(_Envelope)
_sample_decoder = msgspec.json.Decoder(Sample)
_loose_decoder = msgspec.json.Decoder(_LooseSample)
_number_decoder = msgspec.json.Decoder(float | None)
_xid_decoder = msgspec.json.Decoder(Xid | None)
_gpu_decoder = msgspec.json.Decoder(dict[str, Any])
_GPU_PARTS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Gpu)}
FAULTS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read(value: bytes, dropped: "Counter[Why]") -> Samples:
    """Read samples; what is bad of them is left out and counted.

    Raises:
        ContractError: not JSON of samples, or nothing of it can be used.
    """
    try:
        return _samples_decoder.decode(value)
    except FAULTS as error:
        return _piecewise(_without_nan(value), error, dropped)


def _without_nan(value: bytes) -> bytes:
    """Return JSON with null for the NaN and Infinity that JSON does not have and Python and others write."""
    if b"NaN" not in value and b"Infinity" not in value:
        return value
    try:
        return msgspec.json.encode(json.loads(value, parse_constant=lambda _: None))
    except (ValueError, OverflowError, RecursionError):
        return value


def _piecewise(value: bytes, first: Exception, dropped: "Counter[Why]") -> Samples:
    """Read each part alone and leave out the bad ones."""
    try:
        envelope = _envelope_decoder.decode(value)
    except FAULTS as error:
        raise ContractError(f"not samples: {error}") from error
    samples = []
    for raw in envelope.samples:
        try:
            samples.append(_sample(raw, dropped))
        except FAULTS as error:
            first = error
            dropped["malformed"] += 1
    if not samples:
        raise ContractError(f"no sample can be used: {first}") from first
    described = (_description(raw, dropped) for raw in (envelope.gpus or ())[:MAX_SAMPLES])
    return Samples(
        host=envelope.host,
        source=envelope.source or "unknown",
        samples=tuple(samples),
        gpus=tuple(gpu for gpu in described if gpu is not None),
    )


def _sample(raw: msgspec.Raw, dropped: "Counter[Why]") -> Sample:
    """Read a sample; a value that is null is blank, one that is no number does not harm the others."""
    with contextlib.suppress(*FAULTS):
        return _sample_decoder.decode(raw)
    loose = _loose_decoder.decode(raw)
    values = {name: _part(_number_decoder, part, dropped) for name, part in (loose.values or {}).items()}
    codes = [_part(_xid_decoder, part, dropped) for part in loose.xids or ()]
    known = [code for code in codes if code is not None]
    if len(known) > MAX_XIDS:
        dropped["malformed"] += len(known) - MAX_XIDS
    return Sample(
        gpu_uuid=loose.gpu_uuid,
        time=loose.time,
        values={name: value for name, value in values.items() if value is not None},
        xids=fitting(known),
        state=loose.state or "ok",
        source_time=loose.source_time,
    )


def fitting(codes: Sequence[int]) -> tuple[int, ...]:
    """Return as many XIDs as a moment has room for, repeats last: one that comes often must not hide another."""
    if len(codes) <= MAX_XIDS:
        return tuple(codes)
    once = dict.fromkeys(codes)
    repeats = Counter(codes) - Counter(once.keys())
    return (*once, *repeats.elements())[:MAX_XIDS]


def _part(
    decoder: "msgspec.json.Decoder[Decoded | None]", raw: msgspec.Raw, dropped: "Counter[Why]"
) -> Decoded | None:
    try:
        value = decoder.decode(raw)
    except FAULTS:
        dropped["malformed"] += 1
        return None
    if value is None:
        dropped["blank"] += 1
    return value


def _description(raw: msgspec.Raw, dropped: "Counter[Why]") -> Gpu | None:
    """Read what a GPU is, without what is empty or bad of it; an index may be text."""
    parts: dict[str, Any] = {}
    try:
        given = _gpu_decoder.decode(raw)
        msgspec.convert(given.get("gpu_uuid"), GpuUuid)
    except FAULTS:
        dropped["malformed"] += 1
        return None
    labels = given.pop("labels", None)
    for name in _GPU_PARTS.keys() & given.keys():
        parts |= _converted(name, given[name], _GPU_PARTS[name], dropped, strict=name != "index")
    if isinstance(labels, dict):
        parts["labels"] = {}
        for name, text in labels.items():
            parts["labels"] |= _converted(name, text, Name, dropped)
    elif labels is not None:
        dropped["malformed"] += 1
    return Gpu(**parts)


def _converted(
    name: str, value: object, kind: Any, dropped: "Counter[Why]", *, strict: bool = True
) -> dict[str, Any]:
    """Return one entry, or none."""
    if value is None or value == "":
        return {}
    try:
        return {msgspec.convert(name, Name): msgspec.convert(value, kind, strict=strict)}
    except FAULTS:
        dropped["malformed"] += 1
        return {}
