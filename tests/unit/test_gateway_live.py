"""Results find the requests that wait for them."""

from datetime import UTC, datetime

import pytest

from gateway import live
from gateway.live import Live
from pipeline import deadletters, events
from pipeline.errors import UndecodableImageError
from pipeline.events import Outgoing, Prediction, Receipt, Record
from pipeline.settings import load

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def a_prediction(image_id: str, deployment: str = "default") -> Prediction:
    receipt = Receipt(topic="images.realtime.v1", partition=0, offset=1)
    return Prediction(
        id="p", image_id=image_id, deployment=deployment, lane="realtime", outcome="predicted", time=NOW,
        receipt=receipt,
    )  # fmt: skip


def a_letter(image_id: str, group: str) -> deadletters.DeadLetter:
    record = Record(
        topic="x-images.realtime.v1",
        partition=0,
        offset=1,
        timestamp_ms=0,
        headers=(("ce_id", image_id.encode()),),
    )
    return deadletters.from_error(group, record, UndecodableImageError("truncated"), NOW)


def as_record(topic: str, outgoing: Outgoing) -> Record:
    return Record(
        topic=topic, partition=0, offset=0, timestamp_ms=0, key=outgoing.key, value=outgoing.value,
        headers=outgoing.headers,
    )  # fmt: skip


def a_live() -> Live:
    return Live(load(topic_prefix="x-"))


async def test_the_first_result_of_the_deployment_counts() -> None:
    """A watch takes the first result of its image in its deployment, and no other's."""
    results = a_live()
    with results.watch("cat", "default") as watch, results.watch("cat", "wildlife") as other:
        assert watch is not None
        assert other is not None
        for prediction in (a_prediction("dog"), a_prediction("cat", "wildlife"), a_prediction("cat")):
            results.deliver(as_record("x-predictions.v1", events.encode_prediction(prediction)))
        letter = deadletters.encode_dead_letter(a_letter("cat", "x-predict.default"))
        results.deliver(as_record("x-dead-letters.v1", letter))
        assert watch.result.result() == a_prediction("cat")
        assert other.result.result() == a_prediction("cat", "wildlife")


async def test_a_dead_letter_is_a_result_of_its_group() -> None:
    """A dead letter of the deployment's own group ends the wait, another group's does not."""
    results = a_live()
    with results.watch("cat", "default") as watch:
        assert watch is not None
        for group in ("x-archive", "x-predict.wildlife", "predict.default"):
            letter = deadletters.encode_dead_letter(a_letter("cat", group))
            results.deliver(as_record("x-dead-letters.v1", letter))
        assert not watch.result.done()
        letter = deadletters.encode_dead_letter(a_letter("cat", "x-predict.default"))
        results.deliver(as_record("x-dead-letters.v1", letter))
        assert watch.result.result() == a_letter("cat", "x-predict.default")


async def test_what_cannot_be_read_is_passed_by() -> None:
    """Garbage on the topics disturbs nobody who waits."""
    results = a_live()
    with results.watch("cat", "default") as watch:
        assert watch is not None
        for topic in ("x-predictions.v1", "x-dead-letters.v1"):
            for key in (None, b"", b"\xff", b"cat"):
                results.deliver(as_record(topic, Outgoing(key, b"\x00garbage", (("ce_type", b"\xff"),))))
        assert not watch.result.done()


async def test_watches_are_bounded_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound a wait is declined, and a finished request leaves no trace."""
    monkeypatch.setattr(live, "MAX_WATCHES", 2)
    results = a_live()
    with results.watch("cat", "default") as first, results.watch("cat", "default") as second:
        assert None not in (first, second)
        with results.watch("dog", "default") as third:
            assert third is None
    assert (results._watches, results._count) == ({}, 0)
