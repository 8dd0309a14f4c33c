"""The quick way to read samples: records of which every value is under our name and within its limits.

Most are. Their values become tuples, checked while they are parsed, at half the price of dictionaries that are
looked through afterwards. Whatever is odd of a record has it read by `telemetry.decode_samples`, which alone knows
what is left of it: both say the same of every record. No I/O.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

from pipeline import dcgm, telemetry
from pipeline.events import Record
from pipeline.telemetry import EARLIEST, MAX_AHEAD, Samples, Why
from pipeline.telemetry_samples import FAULTS, MAX_SAMPLES, MAX_XIDS, Gpu, GpuUuid, Moment, Name, Xid

Values = TypeVar("Values", bound=msgspec.Struct)


# Nothing of these can refer back to them: there is nothing for the garbage collector to find.
class PlainSample(msgspec.Struct, Generic[Values], frozen=True, kw_only=True, gc=False):
    """A `telemetry.Sample` whose values have a place each."""

    gpu_uuid: GpuUuid
    time: Moment
    #: Of a lost GPU there may be none.
    values: Values | None = None
    xids: Annotated[tuple[Xid, ...], msgspec.Meta(max_length=MAX_XIDS)] = ()
    state: Literal["ok", "lost"] = "ok"
    source_time: Moment | None = None


class _Plain(msgspec.Struct, Generic[Values], frozen=True, kw_only=True, gc=False):
    host: Name
    samples: Annotated[tuple[PlainSample[Values], ...], msgspec.Meta(min_length=1, max_length=MAX_SAMPLES)]
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=MAX_SAMPLES)] = ()
    source: Name = "unknown"


class PlainSamples(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`telemetry.Samples` of which nothing is odd."""

    host: str
    samples: Sequence[PlainSample[msgspec.Struct]]
    gpus: tuple[Gpu, ...]
    #: Of each sample's values, in order; None: absent.
    fields: tuple[str, ...]
    #: Times of the samples.
    earliest: datetime
    latest: datetime


AnySamples = Samples | PlainSamples


class SampleReader:
    """Reads records of samples; knows the fields that there were so far."""

    def __init__(self) -> None:
        self._fields: tuple[str, ...] = ()
        self._decoder = _decoder_of(())

    def decode(self, record: Record) -> tuple[AnySamples, dict[Why, int]]:
        """Read samples, and say how many of what were left out; raises as `telemetry.decode_samples` does."""
        if (plain := self._plain(record)) is not None:
            return plain, {}
        samples, dropped = telemetry.decode_samples(record)
        self._learn(samples)
        return samples, dict(dropped)

    def _plain(self, record: Record) -> PlainSamples | None:
        if not telemetry.is_of_type(record, telemetry.SAMPLES_TYPE):
            return None
        try:
            found = self._decoder.decode(record.value or b"")
        except FAULTS:
            return None
        times = [sample.time for sample in found.samples]
        earliest, latest = min(times), max(times)
        if earliest < EARLIEST or latest > record.published_at + MAX_AHEAD:
            return None
        return PlainSamples(
            host=found.host, samples=found.samples, gpus=found.gpus, fields=self._fields, earliest=earliest,
            latest=latest,
        )  # fmt: skip

    def _learn(self, samples: Samples) -> None:
        """Give every field of ours a place: at most as often as there are fields."""
        known = set(self._fields).union(*(sample.values for sample in samples.samples))
        fields = tuple(name for name in dcgm.NAMES if name in known)
        if fields != self._fields:
            self._fields, self._decoder = fields, _decoder_of(fields)


def _decoder_of(fields: Sequence[str]) -> "msgspec.json.Decoder[_Plain[msgspec.Struct]]":
    # A default is not checked against its type: None is what an absent value is, and nothing that JSON can say.
    values = msgspec.defstruct(
        "Values",
        [
            (name, Annotated[float, msgspec.Meta(ge=low, le=high)], None)
            for name in fields
            for low, high in [dcgm.PLAIN[name]]
        ],
        forbid_unknown_fields=True,
        frozen=True,
        gc=False,
    )
    return msgspec.json.Decoder(_Plain[values])  # type: ignore[valid-type]
