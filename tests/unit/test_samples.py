"""Judging the sample pictures of `millrace up`."""

from datetime import UTC, datetime
from typing import Any

import pytest

from loadtest.images import draw
from millrace.samples import Samples
from pipeline import deadletters, events
from pipeline.broker import Place
from pipeline.errors import UndecodableImageError
from pipeline.settings import load

COUNT = 12


class Takes:
    """Stands where the broker is, and remembers."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, events.Outgoing]] = []

    async def publish(self, topic: str, outgoing: events.Outgoing) -> Place:
        self.taken.append((topic, outgoing))
        return Place(topic, 0, len(self.taken), 0)


@pytest.fixture
async def published() -> tuple[Samples, Takes]:
    samples, takes = Samples(load(), 7, COUNT), Takes()
    await samples.publish(takes)  # type: ignore[arg-type]
    return samples, takes


def prediction(image_id: str, label: str, **changes: Any) -> events.Prediction:
    def result(model: str, label: str | None) -> events.ModelResult:
        return events.ModelResult(model=model, version="1", digest="0", task="score", label=label)

    values: dict[str, Any] = {
        "id": image_id,
        "image_id": image_id,
        "deployment": "default",
        "lane": "bulk",
        "outcome": "predicted",
        "time": datetime.now(UTC),
        "receipt": events.Receipt(topic="t", partition=0, offset=0),
        "models": (result("builtin:quality", label), result("builtin:fingerprint", None)),
    }
    return events.Prediction(**values | changes)


def expected_labels(samples: Samples) -> dict[str, str]:
    labels = [picture.expected_label for picture in draw(7, COUNT)]
    return dict(zip(samples.ids, labels, strict=True))


async def test_samples_go_to_both_lanes_with_ids_of_their_run(published: tuple[Samples, Takes]) -> None:
    """Each kind of picture goes to both lanes; a second run has the same bytes under other ids."""
    samples, takes = published
    lanes = {topic for topic, _ in takes.taken}
    assert lanes == {"images.bulk.v1", "images.realtime.v1"}
    again, others = Samples(load(), 7, COUNT), Takes()
    await again.publish(others)  # type: ignore[arg-type]
    assert not set(samples.ids) & set(again.ids)
    assert sorted(out.value or b"" for _, out in takes.taken) == sorted(
        out.value or b"" for _, out in others.taken
    )


async def test_all_right_is_no_fault(published: tuple[Samples, Takes]) -> None:
    """Predictions with the expected labels from every model leave nothing to say."""
    samples, _ = published
    for image_id, label in expected_labels(samples).items():
        assert not samples.are_done
        samples.see(prediction(image_id, label))
    assert samples.are_done
    assert list(samples.faults()) == []


async def test_every_kind_of_fault_is_told(published: tuple[Samples, Takes]) -> None:
    """A wrong label, a missing model, an expiry, a dead letter and a silence are each named with their sample."""
    samples, _ = published
    labels = expected_labels(samples)
    wrong, partial, expired, dead, silent, other, *right = samples.ids
    samples.see(prediction(wrong, "nonsense"))
    samples.see(prediction(partial, labels[partial], models=prediction(partial, labels[partial]).models[:1]))
    samples.see(prediction(expired, "", outcome="expired", reason="late", models=()))
    record = events.Record(
        topic="t", partition=0, offset=0, timestamp_ms=0, headers=(("ce_id", dead.encode()),)
    )
    error = UndecodableImageError("broken")
    samples.see_dead_letter(deadletters.from_error("predict.default", record, error, datetime.now(UTC)))
    samples.see(prediction(other, "nonsense", deployment="canary"))  # not ours to judge
    samples.see(prediction("somebody's", "nonsense"))
    for image_id in right:
        samples.see(prediction(image_id, labels[image_id]))
    faults = dict(line.split(": ", 1) for line in samples.faults())
    assert faults == {
        wrong: f"builtin:quality says nonsense, expected {labels[wrong]}",
        partial: "1 of 2 models answered",
        expired: "expired: late",
        dead: "dead-lettered by predict.default: undecodable_image: broken",
        silent: "no prediction came",
        other: "no prediction came",
    }
    assert not samples.are_done
