"""Dead letters: reading one never fails, redriving keeps the identity; the limiter tells models from inputs."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.predict import Predict
from pipeline import deadletters, events, settings
from pipeline.deadletters import DeadLetter, FaultLimiter
from pipeline.errors import (
    ContractError,
    ImageTooLargeError,
    MissingImageError,
    ModelError,
    RecordTooLargeError,
    UndecodableImageError,
)
from pipeline.events import ImageEvent, Outgoing, Receipt, Record
from pipeline.inference import Expired, Failed, Outcome, Predicted
from pipeline.topics import MAX_DEAD_LETTER_RECORD_BYTES, MAX_IMAGE_RECORD_BYTES

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
RECEIPT = Receipt(topic="images.bulk.v1", partition=0, offset=0)
header_values = st.binary(max_size=60) | st.integers().map(lambda number: str(number).encode())
headers = st.lists(
    st.tuples(
        st.sampled_from(
            [deadletters.PREFIX + name for name in ("partition", "offset", "timestamp-ms", "attempts", "failed-at",
            "group", "topic", "code", "reason", "image-id", "value-ref", "headers-dropped")] + ["ce_id"]
        ) | st.text(max_size=20),
        header_values | st.datetimes().map(lambda moment: moment.isoformat().encode()),
    ),
    max_size=14,
).map(tuple)  # fmt: skip
records = st.builds(
    Record,
    topic=st.sampled_from(["images.bulk.v1", "predictions.v1"]),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**62 - 1),
    timestamp_ms=st.integers(0, 2**62 - 1),
    key=st.none() | st.binary(max_size=40),
    value=st.none() | st.binary(max_size=100),
    headers=headers,
)


def as_record(outgoing: Outgoing, topic: str = "dead-letters.v1", offset: int = 7) -> Record:
    return Record(
        topic=topic,
        partition=1,
        offset=offset,
        timestamp_ms=1_769_860_800_000,
        key=outgoing.key,
        value=outgoing.value,
        headers=outgoing.headers,
    )


def image_record(*extra: tuple[str, bytes], event_id: str | None = "cat-1", offset: int = 42) -> Record:
    named = (("ce_id", event_id.encode()),) if event_id is not None else ()
    return Record(
        topic="images.bulk.v1",
        partition=3,
        offset=offset,
        timestamp_ms=1_700_000_000_000,
        key=b"k",
        value=b"picture",
        headers=(*named, *extra),
    )


@given(records)
def test_decoding_never_raises(record: Record) -> None:
    """Whatever is on the dead-letter topic is a dead letter: there is no other place for it."""
    letter = deadletters.decode_dead_letter(record)
    assert letter.attempts >= 1
    assert letter.failed_at.tzinfo is UTC


@given(records, st.text(st.characters(codec=None)))
def test_dead_letters_round_trip(record: Record, message: str) -> None:
    """A dead letter comes out of its record as it went in, less headers that are ours."""
    letter = deadletters.from_error("predict.default", record, UndecodableImageError(message), NOW)
    kept = tuple(header for header in record.headers if not header[0].startswith(deadletters.PREFIX))
    expected = msgspec.structs.replace(letter, record=msgspec.structs.replace(record, headers=kept))
    assert expected == deadletters.decode_dead_letter(as_record(deadletters.encode_dead_letter(letter)))


def test_the_largest_input_fits_its_topic() -> None:
    """The largest record with the longest reason and far too many headers makes a dead letter that fits."""
    record = msgspec.structs.replace(
        image_record(),
        value=b"x" * MAX_IMAGE_RECORD_BYTES,
        headers=tuple((f"h{number}", b"y" * 1000) for number in range(1000)),
    )
    letter = deadletters.from_error("g" * 200, record, ContractError("\U0001f63f" * 100_000), NOW)
    outgoing = deadletters.encode_dead_letter(letter)
    size = len(outgoing.value or b"") + sum(len(name) + len(value) + 10 for name, value in outgoing.headers)
    assert size < MAX_DEAD_LETTER_RECORD_BYTES
    dropped = dict(outgoing.headers)["millrace-headers-dropped"]
    assert int(dropped) == 1000 - sum(name.startswith("h") for name, _ in outgoing.headers)


def test_a_redriven_record_keeps_its_identity() -> None:
    """Redriving keeps id, key, value and foreign headers, addresses the group, and counts attempts."""
    letter = deadletters.from_error(
        "predict.default", image_record(("x-camera", b"7")), UndecodableImageError("no"), NOW
    )
    outgoing = deadletters.redriven(letter)
    event = events.decode_image(as_record(outgoing, "images.bulk.v1"))
    assert (event.id, event.only_group, event.attempts) == ("cat-1", "predict.default", 1)
    assert (outgoing.key, outgoing.value) == (b"k", b"picture")
    assert ("x-camera", b"7") in outgoing.headers


def test_every_redrive_counts() -> None:
    """A record that fails again and again says how often, and carries each of our headers once."""
    record = image_record()
    for attempts in range(1, 5):
        letter = deadletters.from_error("predict.default", record, UndecodableImageError("no"), NOW)
        assert letter.attempts == attempts
        stored = deadletters.decode_dead_letter(as_record(deadletters.encode_dead_letter(letter)))
        record = as_record(deadletters.redriven(stored), "images.bulk.v1", offset=42 + attempts)
        names = [name for name, _ in record.headers]
        assert len(names) == len(set(names))
    assert events.image_id(record) == "cat-1"


@pytest.mark.parametrize("given_id", [None, b"", b"\xff", b"a\x00b", b"x" * 10_000])
def test_a_record_without_a_usable_id_keeps_its_place(given_id: bytes | None) -> None:
    """A redriven record is known by its first place when it does not name itself, or cannot be named so."""
    named = () if given_id is None else (("ce_id", given_id),)
    record = image_record(*named, event_id=None)
    letter = deadletters.from_error("predict.default", record, ContractError("no"), NOW)
    assert letter.image_id == record.default_id
    stored = deadletters.decode_dead_letter(as_record(deadletters.encode_dead_letter(letter)))
    again = as_record(deadletters.redriven(stored), "images.bulk.v1", offset=99)
    assert events.image_id(again) == record.default_id


def test_a_redriven_prediction_keeps_its_own_id() -> None:
    """The id of a prediction that could not be stored is not replaced by its picture's."""
    record = msgspec.structs.replace(image_record(event_id="prediction-1"), topic="predictions.v1")
    letter = deadletters.from_error("store", record, ContractError("no"), NOW)
    letter = msgspec.structs.replace(letter, image_id="cat-1")
    outgoing = deadletters.redriven(letter)
    assert [value for name, value in outgoing.headers if name == "ce_id"] == [b"prediction-1"]


def test_reasons_can_be_stored() -> None:
    """What PostgreSQL or UTF-8 refuse is replaced in a reason, and a long reason is cut."""
    letter = deadletters.from_error("g", image_record(), ContractError("a\x00b\ud800" + "c" * 10_000), NOW)
    assert letter.reason.startswith("a\\0b?c")
    assert len(letter.reason) <= deadletters.MAX_REASON_CHARACTERS + 1


# The limiter


def limiter(**changes: Any) -> FaultLimiter:
    return FaultLimiter(**{"max_faults": 20, "probe_seconds": 60.0} | changes)


def test_model_faults_open_the_limiter() -> None:
    """Twenty model faults open it, nineteen do not."""
    tested = limiter()
    for number in range(19):
        tested.failed(number * 1.0)
    assert not tested.is_open
    tested.failed(19.0)
    assert tested.is_open


def test_a_slow_step_that_fails_on_everything_is_paused() -> None:
    """Faults that are hours apart open it as well: a slow step drains a topic too."""
    tested = limiter()
    for number in range(20):
        tested.failed(number * 3600.0)
    assert tested.is_open


def test_a_long_good_history_does_not_delay_it() -> None:
    """After any number of records that went well, twenty-one faults in a row open it."""
    tested = limiter()
    for _ in range(10_000):
        tested.went_well()
    for _ in range(21):
        assert not tested.is_open
        tested.failed(0.0)
    assert tested.is_open


def test_old_faults_are_forgotten() -> None:
    """Faults that enough good records came after no longer count."""
    tested = limiter()
    for _ in range(10):
        for _ in range(19):
            tested.failed(0.0)
        for _ in range(39):
            tested.went_well()
    assert not tested.is_open


def test_a_minority_of_faults_does_not_open_the_limiter() -> None:
    """While the model does well on as many records as it fails on, it stays closed."""
    tested = limiter()
    for number in range(500):
        tested.went_well()
        tested.failed(number * 0.01)
    assert not tested.is_open


def test_one_record_a_minute_is_tried() -> None:
    """While open, one record may start per probe interval, the first after one interval."""
    tested = limiter(max_faults=1)
    tested.failed(0.0)
    assert [second for second in range(200) if tested.may_try(float(second))] == [60, 120, 180]


def test_a_probe_that_says_nothing_does_not_count() -> None:
    """A probe that is expired, at fault itself or taken back by a hand-over does not use up its interval."""
    tested = limiter(max_faults=1)
    tested.failed(0.0)
    assert tested.may_try(60.0)
    assert not tested.may_try(61.0)
    tested.said_nothing(62.0)
    assert tested.is_open
    assert tested.may_try(62.0)
    assert not tested.may_try(63.0)


def test_a_probe_that_goes_well_closes_the_limiter() -> None:
    """The first record that goes well closes it, with a clean slate."""
    tested = limiter()
    for _ in range(20):
        tested.failed(0.0)
    assert tested.may_try(60.0)
    tested.failed(60.5)
    assert tested.is_open
    assert tested.may_try(120.0)
    tested.went_well()
    assert not tested.is_open
    assert tested.may_try(120.6)
    for _ in range(10):
        tested.failed(121.0)
    assert not tested.is_open


@given(st.lists(st.sampled_from(["well", "fault", "try"]), max_size=300), st.integers(1, 30))
def test_it_opens_only_after_enough_faults(steps: list[str], max_faults: int) -> None:
    """However records end, it opens at a fault only, never with fewer than `max_faults` of them."""
    tested = limiter(max_faults=max_faults)
    faults = 0
    for number, step in enumerate(steps):
        was_open = tested.is_open
        if step == "well":
            tested.went_well()
            faults = 0 if was_open else faults
            assert not tested.is_open
        elif step == "fault":
            tested.failed(number * 0.1)
            faults += 1
            assert not tested.is_open or faults >= max_faults
        else:
            assert tested.may_try(number * 0.1) or was_open


@pytest.fixture
def delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Predict, Callable[[Outcome], None]]:
    """The predict step and a way to give it the engine's outcomes; what it would publish is dropped."""
    step = Predict(settings.load(data_dir=tmp_path))
    monkeypatch.setattr(step, "_spawn", lambda coroutine: coroutine.close())
    request: Any = None
    return step, lambda outcome: step._deliver([(request, outcome)])


def test_a_thousand_input_faults_do_not_pause_the_step(
    delivered: tuple[Predict, Callable[[Outcome], None]],
) -> None:
    """Garbage in a row, of every kind, leaves the step ready: it is the input's fault."""
    step, deliver = delivered
    kinds = (
        UndecodableImageError, ImageTooLargeError, MissingImageError, ContractError, RecordTooLargeError,
    )  # fmt: skip
    for number in range(1000):
        deliver(Failed(kinds[number % len(kinds)]("garbage")))
        deliver(Expired("late", RECEIPT))
    assert step.unready() is None


def test_a_model_that_fails_on_everything_pauses_the_step(
    delivered: tuple[Predict, Callable[[Outcome], None]],
) -> None:
    """Model faults make the step unready; the first record that goes well makes it ready again."""
    step, deliver = delivered
    for _ in range(20):
        deliver(Failed(UndecodableImageError("garbage")))
        deliver(Failed(ModelError("it broke")))
    assert step.unready() == "paused: the models fail on most records"
    deliver(Failed(UndecodableImageError("garbage")))
    assert step.unready() is not None
    deliver(Predicted((), RECEIPT))
    assert step.unready() is None


def test_an_identity_fits_a_dead_letter() -> None:
    """A dead letter's identity is the group and the place, not the image id."""
    letters = [
        deadletters.from_error(group, image_record(offset=offset), ContractError("no"), NOW)
        for group in ("archive", "predict.default")
        for offset in (1, 2)
    ]
    assert len({letter.place for letter in letters}) == 4
    assert {letter.image_id for letter in letters} == {"cat-1"}


def test_a_dead_letter_is_described_by_its_error() -> None:
    """Code and reason are the error's, the identity is the event's, the first time is attempt 1."""
    record = as_record(events.encode_image(ImageEvent(id="cat-1", data=b"x", time=NOW)), "images.bulk.v1")
    expected = DeadLetter(
        group="predict.default",
        record=record,
        code="undecodable_image",
        reason="no picture",
        failed_at=NOW,
        attempts=1,
        image_id="cat-1",
    )
    error = UndecodableImageError("no picture")
    assert expected == deadletters.from_error("predict.default", record, error, NOW)
