"""Values for tests of what is stored: valid ones, each with what the test cares about changed."""

import array
from datetime import UTC, datetime
from typing import Any

from pipeline.deadletters import DeadLetter
from pipeline.events import ModelResult, Prediction, Receipt, Record, encode_embedding, prediction_id
from pipeline.results import ImageRow

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SHA_A = "a" * 64
SHA_B = "b" * 64
GROUP = "predict.default"


def embedding(*numbers: float) -> ModelResult:
    """Return one model's result with these numbers as its vector."""
    return ModelResult(
        model="builtin:fingerprint",
        version="1",
        digest="d",
        task="embed",
        embedding=encode_embedding(array.array("f", numbers).tobytes()),
        dimension=len(numbers),
    )


def prediction(image_id: str, sha256: str | None = SHA_A, **changes: Any) -> Prediction:
    """Return a prediction of one picture, by default with one vector."""
    receipt = Receipt(topic="images.bulk.v1", partition=0, offset=7, input_sha256=sha256, batch_size=3)
    values: dict[str, Any] = {
        "id": prediction_id(image_id, changes.get("deployment", "default"), (("builtin:fingerprint", "1"),)),
        "image_id": image_id,
        "deployment": "default",
        "lane": "bulk",
        "outcome": "predicted",
        "time": NOW,
        "receipt": receipt,
        "models": () if changes.get("outcome") == "expired" else (embedding(0.5, -1.0, 0.25),),
    }
    return Prediction(**{**values, **changes})


def dead_letter(image_id: str | None, offset: int = 7, **changes: Any) -> DeadLetter:
    """Return a dead letter of `predict`; `timestamp_ms` and `topic` change its record."""
    record = Record(
        topic=changes.pop("topic", "images.bulk.v1"),
        partition=0,
        offset=offset,
        timestamp_ms=changes.pop("timestamp_ms", int(NOW.timestamp() * 1000)),
        key=b"\xff\x00key",
        value=b"\x00not a picture",
        headers=(("ce_id", b"x"), ("name\x00", b"\xff\x00")),
    )
    values: dict[str, Any] = {
        "group": GROUP,
        "record": record,
        "code": "undecodable_image",
        "reason": "it is text",
        "failed_at": NOW,
        "image_id": image_id,
    }
    return DeadLetter(**{**values, **changes})


def image_row(image_id: str, sha256: str | None = SHA_A, **changes: Any) -> ImageRow:
    """Return the row of an inline picture that nobody has archived yet."""
    values: dict[str, Any] = {
        "image_id": image_id,
        "lane": "bulk",
        "topic": "images.bulk.v1",
        "partition": 0,
        "offset": 7,
        "published_at": NOW,
        "source": "test",
        "sha256": sha256,
        "size_bytes": 100,
    }
    return ImageRow(**{**values, **changes})
