"""The event contracts: what round-trips, what is refused, and that nothing else is ever raised."""

import contextlib
import string
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import deadletters, events
from pipeline.errors import ContractError
from pipeline.events import ImageEvent, ModelResult, Outgoing, Prediction, Receipt, Record

SHA256 = "0f" * 32
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

moments = st.datetimes(timezones=st.just(UTC))
numbers = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=40)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=events.MAX_ID_CHARACTERS)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
object_keys = st.from_regex(events.OBJECT_KEY, fullmatch=True).filter(
    lambda key: len(key) <= events.MAX_OBJECT_KEY_CHARACTERS
)
offsets = st.integers(0, 2**63 - 1)
maybe_numbers = st.none() | numbers
maybe_integers = st.none() | st.integers(0, 2**31 - 1)
HEADER_NAMES = (
    "ce_specversion", "ce_type", "ce_id", "ce_source", "ce_time", "content-type", "ce_dataref",
    "ce_datasha256", "ce_expirytime", "ce_purpose", "traceparent", "ce_traceparent", "millrace-only-group",
    "millrace-attempts", *(deadletters.PREFIX + name for name in ("group", "topic", "partition", "offset",
    "timestamp-ms", "code", "reason", "failed-at", "attempts", "image-id", "value-ref")),
)  # fmt: skip
header_values = (
    st.binary(max_size=80)
    | st.sampled_from([b"1.0", events.IMAGE_TYPE.encode(), events.PREDICTION_TYPE.encode(), SHA256.encode()])
    | st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.isoformat().encode())
    | st.datetimes().map(lambda moment: moment.isoformat().encode())
    | st.integers().map(lambda number: str(number).encode())
)
#: Anything a client can put on a topic.
records = st.builds(
    Record,
    topic=st.sampled_from(["images.bulk.v1", "predictions.v1", "dead-letters.v1"]),
    partition=st.integers(0, 2**31 - 1),
    offset=offsets,
    timestamp_ms=st.integers(-(2**63), 2**63 - 1),
    key=st.none() | st.binary(max_size=40),
    value=st.none() | st.binary(max_size=200),
    headers=st.lists(st.tuples(st.sampled_from(HEADER_NAMES) | text, header_values), max_size=12).map(tuple),
)
image_events = st.builds(
    ImageEvent,
    id=ids,
    data=st.binary(min_size=1, max_size=100),
    sha256=st.none() | digests,
    source=words,
    time=moments,
    content_type=st.none() | words,
    expires_at=st.none() | moments,
    traceparent=st.none() | st.just(TRACEPARENT),
    purpose=st.none() | words,
    only_group=st.none() | words,
    attempts=st.integers(0, 99_999),
)
referring_events = st.builds(
    lambda event, key: msgspec.structs.replace(event, data=b"", dataref=key), image_events, object_keys
)
predictions = st.builds(
    Prediction,
    id=words,
    image_id=ids,
    deployment=words,
    lane=st.sampled_from(["realtime", "bulk"]),
    outcome=st.sampled_from(["predicted", "expired"]),
    time=moments,
    receipt=st.builds(
        Receipt,
        topic=words,
        partition=st.integers(0, 2**31 - 1),
        offset=offsets,
        input_sha256=st.none() | digests,
        batch_size=maybe_integers,
        batch_cut=st.none() | words,
        queue_seconds=maybe_numbers,
        forward_seconds=maybe_numbers,
    ),
    models=st.lists(
        st.builds(
            ModelResult,
            model=words,
            version=words,
            digest=words,
            task=st.sampled_from(["classify", "detect", "embed", "score"]),
            label=st.none() | words,
            score=maybe_numbers,
            scores=st.dictionaries(words, numbers, max_size=3),
            boxes=st.lists(
                st.builds(events.Box, words, numbers, numbers, numbers, numbers, numbers), max_size=2
            ).map(tuple),
            embedding=st.none() | st.binary(max_size=32).map(events.encode_embedding),
            dimension=maybe_integers,
        ),
        max_size=3,
    ).map(tuple),
    reason=st.none() | words,
    traceparent=st.none() | words,
)


def as_record(outgoing: Outgoing, topic: str = "images.bulk.v1") -> Record:
    return Record(
        topic=topic,
        partition=3,
        offset=42,
        timestamp_ms=1_700_000_000_123,
        key=outgoing.key,
        value=outgoing.value,
        headers=outgoing.headers,
    )


def bare(*headers: tuple[str, bytes], value: bytes | None = b"picture", key: bytes | None = None) -> Record:
    return Record(
        topic="images.bulk.v1",
        partition=3,
        offset=42,
        timestamp_ms=1_700_000_000_123,
        key=key,
        value=value,
        headers=headers,
    )


@given(image_events | referring_events)
def test_image_events_round_trip(event: ImageEvent) -> None:
    """An image event comes out of its record as it went in."""
    assert events.decode_image(as_record(events.encode_image(event))) == event


@given(predictions)
def test_predictions_round_trip(prediction: Prediction) -> None:
    """A prediction comes out of its record as it went in."""
    assert events.decode_prediction(as_record(events.encode_prediction(prediction))) == prediction


@given(records)
def test_arbitrary_records_raise_only_contract_errors(record: Record) -> None:
    """Whatever is on an input topic is an event or a ContractError, and its id can be an identity."""
    with contextlib.suppress(ContractError):
        event = events.decode_image(record)
        events.check_id(event.id)
        assert bool(event.data) != (event.dataref is not None)
        assert events.decode_image(as_record(events.encode_image(event))).id == event.id


@given(records, st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([*Prediction.__struct_fields__, *ModelResult.__struct_fields__]), inner, max_size=12
    ),
).map(msgspec.json.encode))  # fmt: skip
def test_arbitrary_predictions_raise_only_contract_errors(record: Record, value: bytes) -> None:
    """Whatever is on the predictions topic is a prediction or a ContractError."""
    with contextlib.suppress(ContractError):
        events.decode_prediction(msgspec.structs.replace(record, value=value))


@given(records)
def test_addressing_never_raises(record: Record) -> None:
    """Which group a record addresses, and how often it was tried, can be asked of any record."""
    assert events.attempts(record) >= 0
    assert events.only_group(record) != ""
    assert datetime(1970, 1, 1, tzinfo=UTC) <= record.published_at


@pytest.mark.parametrize("opening", [b'{"x":', b"["])
def test_deeply_nested_json_is_refused(opening: bytes) -> None:
    """JSON nested so deep that a parser gives up is a ContractError too."""
    record = bare(value=b'{"id":' + opening * 100_000)
    with pytest.raises(ContractError):
        events.decode_prediction(record)


def test_a_bare_record_is_an_image_event() -> None:
    """Without headers the id is the record's place, and time and source are the record's own."""
    event = events.decode_image(bare())
    assert event == ImageEvent(
        id="images.bulk.v1:3:42:1700000000123",
        data=b"picture",
        source="kafka:images.bulk.v1",
        time=datetime.fromtimestamp(1_700_000_000.123, UTC),
    )


def test_the_key_means_nothing() -> None:
    """A key that is not UTF-8, or another id's, changes no event: the id alone decides."""
    without = events.decode_image(bare(("ce_id", b"cat-1")))
    assert events.decode_image(bare(("ce_id", b"cat-1"), key=b"\xff\xfe")) == without
    assert events.decode_image(bare(("ce_id", b"cat-1"), key=b"dog-1")) == without


def test_the_last_header_of_a_name_counts() -> None:
    """Of two headers with one name the last is read, as Kafka's own clients do."""
    assert events.decode_image(bare(("ce_id", b"first"), ("ce_id", b"last"))).id == "last"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (("ce_specversion", b"0.3"), "ce_specversion is '0.3', this reads 1.0"),
        (("ce_type", b"millrace.image.v2"), "unknown version in ce_type 'millrace.image.v2'"),
        (("ce_type", b"com.example.cat"), "unknown type in ce_type 'com.example.cat'"),
        (("ce_type", b""), "unknown type"),
        (("ce_type", b"\xff"), "header ce_type is not UTF-8"),
        (("ce_id", b""), "the event id is empty"),
        (("ce_id", b"a\x00b"), "control characters"),
        (("ce_id", b"a\nb"), "control characters"),
        (("ce_id", "a\x85b".encode()), "control characters"),
        (("ce_id", b"x" * 10_000), "10,000 characters, the limit is 512"),
        (("ce_id", b"\xff\xfe"), "header ce_id is not UTF-8"),
        (("ce_source", b"\xc3"), "header ce_source is not UTF-8"),
        (("content-type", b"\xe9"), "header content-type is not UTF-8"),
        (("ce_time", b"yesterday"), "ce_time is not an RFC 3339 time"),
        (("ce_time", b"2026-01-31"), "ce_time is not an RFC 3339 time"),
        (("ce_time", b"2026-01-31T12:00:00"), "ce_time has no time zone"),
        (("ce_time", b"0001-01-01T00:00:00+14:00"), "ce_time is out of range"),
        (("ce_expirytime", b"1767225600"), "ce_expirytime is not an RFC 3339 time"),
        (("ce_expirytime", b"9999-12-31T23:59:59-12:00"), "ce_expirytime is out of range"),
        (("ce_datasha256", b"abc"), "ce_datasha256 is not 64 lower-case hexadecimal digits"),
        (("ce_datasha256", SHA256.upper().encode()), "ce_datasha256 is not 64 lower-case"),
    ],
)
def test_unreadable_attributes_are_refused(header: tuple[str, bytes], reason: str) -> None:
    """A wrong attribute is a ContractError whose one-line message names it."""
    with pytest.raises(ContractError) as caught:
        events.decode_image(bare(header))
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "dataref",
    [
        "../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "a/", ".", "..", ".hidden", "a/.b", "a\\b", "a b",
        "s3://bucket/key", "file:///etc/passwd", "a\x00b", "", "ü", "a/b?versionId=1", "x" * 513,
    ],
)  # fmt: skip
def test_path_tricks_in_a_dataref_are_refused(dataref: str) -> None:
    """A reference is a plain object key of this installation's store, or a ContractError."""
    with pytest.raises(ContractError, match="ce_dataref is not an object key"):
        events.decode_image(bare(("ce_dataref", dataref.encode()), value=None))


@pytest.mark.parametrize("value", [None, b""])
def test_nothing_at_all_is_refused(value: bytes | None) -> None:
    """An empty value without a reference is a ContractError."""
    with pytest.raises(ContractError, match="the value is empty and there is no ce_dataref"):
        events.decode_image(bare(("ce_id", b"cat-1"), value=value))


def test_the_value_goes_before_the_reference() -> None:
    """A record with both a value and a reference means its value."""
    event = events.decode_image(bare(("ce_dataref", b"images/cat")))
    assert (event.data, event.dataref) == (b"picture", None)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((("traceparent", TRACEPARENT.encode()),), TRACEPARENT),
        ((("ce_traceparent", TRACEPARENT.encode()),), TRACEPARENT),
        ((("traceparent", b"garbage"), ("ce_traceparent", TRACEPARENT.encode())), None),
        ((("traceparent", b"\xff"),), None),
        ((("traceparent", TRACEPARENT.upper().encode()),), None),
        ((), None),
    ],
)
def test_trace_context_is_never_worth_a_record(
    headers: tuple[tuple[str, bytes], ...], expected: str | None
) -> None:
    """Trace context is read from either header; what is unreadable is absent."""
    assert events.decode_image(bare(*headers)).traceparent == expected


def test_times_are_utc() -> None:
    """A time in another zone is the same moment, told in UTC."""
    event = events.decode_image(bare(("ce_time", b"2026-01-31T14:00:00+02:00")))
    assert event.time == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert event.time is not None
    assert event.time.tzinfo is UTC
    elsewhere = datetime(2026, 1, 31, 14, tzinfo=timezone(timedelta(hours=2)))
    outgoing = events.encode_image(ImageEvent(id="a", data=b"x", time=elsewhere))
    assert dict(outgoing.headers)["ce_time"] == b"2026-01-31T12:00:00Z"


def test_a_prediction_needs_a_time_zone() -> None:
    """A prediction whose time has no zone is refused: the database could not order it."""
    value = events.encode_prediction(_prediction()).value or b""
    with pytest.raises(ContractError, match="not a prediction"):
        events.decode_prediction(bare(value=value.replace(b"12:00:00Z", b"12:00:00")))


def test_another_version_of_a_prediction_is_refused() -> None:
    """A prediction of another contract version is not guessed at."""
    value = events.encode_prediction(_prediction()).value
    with pytest.raises(ContractError, match="unknown version"):
        events.decode_prediction(bare(("ce_type", b"millrace.prediction.v2"), value=value))


def test_prediction_ids_are_deterministic_and_told_apart() -> None:
    """The same image, deployment and models give the same id; any difference gives another."""
    models = (("a", "1"), ("b", "2"))
    ids = {
        events.prediction_id("x", "default", models),
        events.prediction_id("y", "default", models),
        events.prediction_id("x", "canary", models),
        events.prediction_id("x", "default", (("a", "2"), ("b", "2"))),
        events.prediction_id("x", "default", (("a", "1"),)),
    }
    assert len(ids) == 5
    assert events.prediction_id("x", "default", models) == events.prediction_id("x", "default", models)
    assert all(set(id_) <= set(string.hexdigits.lower()) for id_ in ids)


def _prediction() -> Prediction:
    return Prediction(
        id="p",
        image_id="cat-1",
        deployment="default",
        lane="bulk",
        outcome="predicted",
        time=datetime(2026, 1, 31, 12, tzinfo=UTC),
        receipt=Receipt(topic="images.bulk.v1", partition=0, offset=1),
    )
