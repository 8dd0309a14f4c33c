"""Images with made-up vectors, stored as `store` stores them, and what a search must find among them."""

import array
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.database import Database
from pipeline.events import ModelResult, Prediction, Receipt, encode_embedding, prediction_id
from pipeline.vectors import Space
from tests.support.samples import NOW

Vectors = NDArray[np.float32]
MODEL = "test:embedder"


def space(dimension: int, version: str = "1", model: str = MODEL) -> Space:
    """Return the space of made-up vectors."""
    return Space(model, version, dimension)


def clustered(count: int, dimension: int, seed: int = 7) -> Vectors:
    """Draw vectors around a few dozen centres, as embeddings of real pictures lie: (count, dimension)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, dimension))
    spread = rng.normal(scale=0.7, size=(count, dimension))
    return (centres[rng.integers(0, len(centres), count)] + spread).astype(np.float32)


def embedded(
    image_id: str, numbers: Iterable[float], *, version: str = "1", label: str | None = None, **changes: Any
) -> Prediction:
    """Return a prediction with one vector, and a label when given."""
    values = array.array("f", numbers)
    vector = ModelResult(
        model=MODEL, version=version, digest="d", task="embed", dimension=len(values),
        embedding=encode_embedding(values.tobytes()),
    )  # fmt: skip
    labels = (
        ()
        if label is None
        else (ModelResult(model="test:labeller", version="1", digest="d", task="classify", label=label),)
    )
    deployment = changes.get("deployment", "default")
    given: dict[str, Any] = {
        "id": prediction_id(image_id, deployment, ((MODEL, version),)),
        "image_id": image_id,
        "deployment": deployment,
        "lane": "bulk",
        "outcome": "predicted",
        "time": NOW,
        "receipt": Receipt(topic="images.bulk.v1", partition=0, offset=7),
        "models": (*labels, vector),
    }
    return Prediction(**{**given, **changes})


async def fill(database: Database, vectors: Vectors, **changes: Any) -> list[str]:
    """Store one image per vector, a second apart; return their ids in the order of the vectors."""
    ids = [f"image-{number:05d}" for number in range(len(vectors))]
    predictions = [
        embedded(image_id, vector, **({"time": NOW + timedelta(seconds=number)} | changes))
        for number, (image_id, vector) in enumerate(zip(ids, vectors.tolist(), strict=True))
    ]
    for start in range(0, len(predictions), 1000):
        await database.save(predictions[start : start + 1000], [])
    return ids


def distances(vectors: Vectors, query: Sequence[float] | Vectors) -> NDArray[np.float64]:
    """Compute the cosine distance of each vector from a query, in double precision: (count,)."""
    wide, wanted = vectors.astype(np.float64), np.asarray(query, np.float64)
    cosine: NDArray[np.float64] = (wide @ wanted) / (np.linalg.norm(wide, axis=1) * np.linalg.norm(wanted))
    return 1 - cosine
