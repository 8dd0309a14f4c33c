"""The event contracts: frozen values, and the codec between a Kafka record and an event.

CloudEvents 1.0 in Kafka binary mode: attributes are `ce_*` headers, the value is the data. A bare
record (no headers, no key) is a valid image event. Arbitrary bytes raise `ContractError` and nothing
else; what decodes today decodes for ever (`tests/golden/`).
"""

import base64
import binascii
import hashlib
import re
import sys
from array import array
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec

from pipeline.errors import ContractError

IMAGE_TYPE = "millrace.image.v1"
#: `ce_purpose` of a picture that is only searched with: neither it nor what becomes of it is kept.
QUERY = "query"
PREDICTION_TYPE = "millrace.prediction.v1"

MAX_ID_CHARACTERS = 512  # an id is a name, not a payload; it is a primary key in PostgreSQL
SHA256_HEX = re.compile(r"[0-9a-f]{64}")
TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, version 00
# Half of what an object store allows (1,024 bytes), and nothing that a file system reads as a path trick.
OBJECT_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*")
MAX_OBJECT_KEY_CHARACTERS = 512
_MAX_TIMESTAMP_MS = 253_370_764_800_000  # 9999-01-01T00:00:00Z; datetime ends within that year

Headers = tuple[tuple[str, bytes], ...]
Outcome = Literal["predicted", "expired"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What Kafka delivers, undecoded."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = ()
    #: Whether `timestamp_ms` is when the broker appended it, and not what its producer says.
    is_stamped_by_broker: bool = False

    @property
    def default_id(self) -> str:
        """Identity of a record that names none: its place in Kafka, with its time (topics may be recreated)."""
        return f"{self.topic}:{self.partition}:{self.offset}:{self.timestamp_ms}"

    @property
    def published_at(self) -> datetime:
        """The record's timestamp; a producer may write any number, the result is between 1970 and 9999."""
        return datetime.fromtimestamp(min(max(self.timestamp_ms, 0), _MAX_TIMESTAMP_MS) / 1000, UTC)

    @property
    def appended_at(self) -> datetime | None:
        """When the broker appended it, to the millisecond; None where the topic keeps the producer's time."""
        return self.published_at if self.is_stamped_by_broker else None

    def header(self, name: str) -> bytes | None:
        """Return the last header of that name, as Kafka's own clients do."""
        return next((value for key, value in reversed(self.headers) if key == name), None)


class Outgoing(msgspec.Struct, frozen=True):
    """A record to publish: key, value and headers; the caller knows the topic."""

    key: bytes | None
    value: bytes | None
    headers: Headers


class ImageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A picture somebody wants predictions for: the bytes, or where they are."""

    id: str
    data: bytes = b""
    #: Object key in the configured object store; set when `data` is empty.
    dataref: str | None = None
    #: SHA-256 of the encoded picture, lower-case hex; checked when given.
    sha256: str | None = None
    source: str = "millrace"
    time: datetime | None = None
    content_type: str | None = None
    #: Work after this moment is worth nothing: the outcome is `expired`.
    expires_at: datetime | None = None
    traceparent: str | None = None
    purpose: str | None = None
    #: Redriven records address one consumer group; all others pass them by.
    only_group: str | None = None
    #: How often this picture was dead-lettered and redriven before.
    attempts: int = 0


class Box(msgspec.Struct, frozen=True):
    """A detection in pixels of the original image."""

    label: str
    score: float
    x_min: float
    y_min: float
    x_max: float
    y_max: float


class ModelResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model says about one image."""

    model: str
    version: str
    digest: str
    task: Literal["classify", "detect", "embed", "score"]
    label: str | None = None
    score: float | None = None
    scores: dict[str, float] = {}
    boxes: tuple[Box, ...] = ()
    #: base64 of little-endian float32, `dimension` numbers.
    embedding: str | None = None
    dimension: int | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a prediction came about: the input, the batch it rode in, and where the time went."""

    topic: str
    partition: int
    offset: int
    input_sha256: str | None = None
    input_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    #: Of the pass that this came from: `BATCH`, or `BATCH.N` for a part of it that was run again; `batch_size`
    #: counts that part.
    batch_id: str | None = None
    batch_size: int | None = None
    batch_cut: str | None = None
    device: str | None = None
    #: From this worker's receipt of the record to the start of its decode, plus the wait for a batch.
    queue_seconds: float | None = None
    #: The part of `queue_seconds` behind the decode: waiting for a batch and for the device.
    batch_wait_seconds: float | None = None
    decode_seconds: float | None = None
    forward_seconds: float | None = None
    gpu_uuid: str | None = None
    #: This picture's share of what the pass is charged for: an equal part of the batch's, an allocation.
    joules: float | None = None
    #: The part of `joules` that the GPU would have drawn in that time had it stood idle.
    idle_joules: float | None = None


class Prediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image's outcome in one deployment: value of `predictions.v1`."""

    id: str
    image_id: str
    deployment: str
    lane: str
    outcome: Outcome
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    receipt: Receipt
    models: tuple[ModelResult, ...] = ()
    #: Of the deployment's models (`models.v1`); 0 is what `MILLRACE_MODELS` said.
    revision: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    reason: str | None = None
    traceparent: str | None = None
    #: The image event's; the outcome of a `query` is for whoever waits for it, and is not stored.
    purpose: str | None = None


_prediction_encoder = msgspec.json.Encoder()
_prediction_decoder = msgspec.json.Decoder(Prediction)


def prediction_id(image_id: str, deployment: str, models: tuple[tuple[str, str], ...]) -> str:
    """Derive the identity of a prediction, the same however often the record is read.

    `models` are (name, version) pairs in the deployment's order.
    """
    text = msgspec.json.encode([image_id, deployment, models])
    return hashlib.sha256(text).hexdigest()[:32]


def encode_embedding(values: bytes) -> str:
    """Encode little-endian float32 bytes for a `ModelResult`."""
    return base64.b64encode(values).decode("ascii")


def decode_embedding(encoded: str, dimension: int | None) -> "array[float]":
    """Read the `embedding` of a `ModelResult`.

    Raises:
        ContractError: it is not base64 of float32 numbers, or not as many as it says.
    """
    numbers = array("f")
    try:
        numbers.frombytes(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError) as error:
        raise ContractError(f"an embedding is not base64 of float32 numbers: {error}") from None
    if not numbers or len(numbers) != dimension:
        raise ContractError(f"an embedding has {len(numbers)} numbers and says it has {dimension}")
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def encode_image(event: ImageEvent) -> Outgoing:
    """Encode an image event in CloudEvents binary mode; the key is the image id."""
    headers = [
        ("ce_specversion", "1.0"),
        ("ce_type", IMAGE_TYPE),
        ("ce_id", event.id),
        ("ce_source", event.source),
        ("ce_time", _rfc3339(event.time or datetime.now(UTC))),
    ]
    optional = (
        ("content-type", event.content_type),
        ("ce_dataref", event.dataref),
        ("ce_datasha256", event.sha256),
        ("ce_expirytime", _rfc3339(event.expires_at) if event.expires_at else None),
        ("ce_purpose", event.purpose),
        ("traceparent", event.traceparent),
        ("millrace-only-group", event.only_group),
        ("millrace-attempts", str(event.attempts) if event.attempts else None),
    )
    headers += [(name, value) for name, value in optional if value is not None]
    return Outgoing(
        event.id.encode(), event.data or None, tuple((name, value.encode()) for name, value in headers)
    )


def decode_image(record: Record) -> ImageEvent:
    """Read an image event from any client's record.

    Raises:
        ContractError: an attribute is unreadable or of an unknown type or version, or there is no picture.
    """
    version = _text(record, "ce_specversion")
    if version is not None and version != "1.0":
        raise ContractError(f"ce_specversion is {version[:40]!r}, this reads 1.0")
    _check_type(_text(record, "ce_type"), IMAGE_TYPE)
    dataref = _text(record, "ce_dataref")
    if not record.value and dataref is None:
        raise ContractError("the value is empty and there is no ce_dataref")
    if dataref is not None:
        _check_object_key(dataref)
    sha256 = _text(record, "ce_datasha256")
    if sha256 is not None and not SHA256_HEX.fullmatch(sha256):
        raise ContractError("ce_datasha256 is not 64 lower-case hexadecimal digits")
    return ImageEvent(
        id=image_id(record),
        data=record.value or b"",
        dataref=None if record.value else dataref,
        sha256=sha256,
        source=_text(record, "ce_source") or f"kafka:{record.topic}",
        time=_time(record, "ce_time") or record.published_at,
        content_type=_text(record, "content-type"),
        expires_at=_time(record, "ce_expirytime"),
        traceparent=_traceparent(record),
        purpose=_text(record, "ce_purpose"),
        only_group=only_group(record),
        attempts=attempts(record),
    )


def image_id(record: Record) -> str:
    """Return the event id alone, or the record's place when it names none.

    Raises:
        ContractError: the id cannot be an identity (empty, too long, not UTF-8, control characters).
    """
    given = _text(record, "ce_id")
    if given is None:
        return record.default_id
    check_id(given)
    return given


def check_id(given: str) -> None:
    """Refuse what cannot be an identity.

    Raises:
        ContractError: with the reason.
    """
    if not given:
        raise ContractError("the event id is empty")
    if len(given) > MAX_ID_CHARACTERS:
        raise ContractError(f"the event id has {len(given):,} characters, the limit is {MAX_ID_CHARACTERS}")
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in given):
        raise ContractError("the event id contains control characters")


def only_group(record: Record) -> str | None:
    """Return the one consumer group a redriven record addresses, if any; never raises."""
    value = record.header("millrace-only-group")
    return value.decode("utf-8", "replace") if value else None


def is_query(record: Record) -> bool:
    """Whether the record is a picture that is only searched with, or what became of it; never raises."""
    return record.header("ce_purpose") == QUERY.encode()


def attempts(record: Record) -> int:
    """Return how often this record was redriven before; never raises, unreadable counts as 0."""
    value = record.header("millrace-attempts") or b"0"
    return int(value) if value.isdigit() and len(value) < 6 else 0


def encode_prediction(prediction: Prediction) -> Outgoing:
    """Encode a prediction; the key is the image id, `ce_id` the prediction's own."""
    headers = [
        ("ce_specversion", "1.0"),
        ("ce_type", PREDICTION_TYPE),
        ("ce_id", prediction.id),
        ("ce_source", f"millrace/predict/{prediction.deployment}"),
        ("ce_time", _rfc3339(prediction.time)),
        ("content-type", "application/json"),
    ]
    if prediction.traceparent:
        headers.append(("traceparent", prediction.traceparent))
    if prediction.purpose:  # as a header too, so that it can be passed by unread
        headers.append(("ce_purpose", prediction.purpose))
    return Outgoing(
        prediction.image_id.encode(),
        _prediction_encoder.encode(prediction),
        tuple((name, value.encode()) for name, value in headers),
    )


def decode_prediction(record: Record) -> Prediction:
    """Read a prediction.

    Raises:
        ContractError: another type or version, or JSON that is not a prediction.
    """
    _check_type(_text(record, "ce_type"), PREDICTION_TYPE)
    try:
        return _prediction_decoder.decode(record.value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"not a prediction: {error}") from error


def _text(record: Record, name: str) -> str | None:
    value = record.header(name)
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ContractError(f"header {name} is not UTF-8") from None


def _check_type(given: str | None, expected: str) -> None:
    if given is None or given == expected:
        return
    stem = expected.rpartition(".")[0]
    what = "version" if given.rpartition(".")[0] == stem else "type"
    raise ContractError(f"unknown {what} in ce_type {given[:80]!r}, this reads {expected}")


def _check_object_key(dataref: str) -> None:
    if len(dataref) > MAX_OBJECT_KEY_CHARACTERS or not OBJECT_KEY.fullmatch(dataref):
        raise ContractError("ce_dataref is not an object key of this installation's object store")


def _time(record: Record, name: str) -> datetime | None:
    text = _text(record, name)
    if text is None:
        return None
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        raise ContractError(f"{name} is not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise ContractError(f"{name} has no time zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # the first or last hours that a datetime can say, in another time zone
        raise ContractError(f"{name} is out of range") from None


def _traceparent(record: Record) -> str | None:
    """Trace context is never worth a record: unreadable means absent."""
    value = record.header("traceparent") or record.header("ce_traceparent") or b""
    text = value.decode("ascii", "replace")
    return text if TRACEPARENT.fullmatch(text) else None


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
