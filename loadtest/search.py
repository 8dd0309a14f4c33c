"""How well and how fast search finds: the index beside an exact search, and that beside computing everything.

It takes the settings of an empty, migrated database and fills it. Three sets: fingerprints of drawn pictures,
one in six nearly the same as another; many more made-up vectors around a few hundred centres; and as many of
no structure at all, which no index of this kind does well on and no embedding of pictures looks like. Recall
is the share of the ten nearest, by an exact search, that the index finds too.
"""

import array
import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from loadtest.images import SamplePicture, draw
from loadtest.report import Circumstances, Machine, percentile, rounded
from pipeline import imaging, vector_indexes
from pipeline.database import Database
from pipeline.errors import ConfigurationError
from pipeline.events import ModelResult, Prediction, Receipt, encode_embedding, prediction_id
from pipeline.models import load_models
from pipeline.search import EF_SEARCH
from pipeline.settings import Settings
from pipeline.vectors import Found, Mode, Space

Vectors = NDArray[np.float32]
Say = Callable[[str], None]

NEAREST = 10
_MODEL = "builtin:fingerprint"
# How far vectors are from their centres, as a share of how far the centres are from each other.
_SPREAD = 0.5
_SAVE_ROWS = 1_000
_FORWARD_PICTURES = 32
# Of the distance: what single precision and another order of summation may differ by.
_TOLERANCE = 2e-6


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    seed: int = 7
    pictures: int = 3_000
    vectors: int = 50_000
    centres: int = 500
    queries: int = 200


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one search, from the client's side."""

    p50_seconds: float
    p99_seconds: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One set of vectors."""

    vectors: int
    dimension: int
    queries: int
    recall_at_10: float
    #: Share of queries whose ten nearest in exact mode are those of a computation in double precision.
    exact_is_right: float
    #: Share of queries that find themselves first, with a score of 1.
    itself_first: float
    #: Share of near-duplicates, and of their originals, that find each other right behind themselves.
    near_duplicate_next: float | None = None
    exact: Latency
    approximate: Latency
    index_build_seconds: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and on what."""

    commit: str | None
    machine: Machine
    seed: int
    circumstances: Circumstances
    plan: Plan
    ef_search: int
    #: Fingerprints of drawn pictures.
    pictures: Measured
    #: Made-up vectors around centres.
    clustered: Measured
    #: Made-up vectors in all directions alike.
    unstructured: Measured
    others_busy_cores: float | None = None


class SearchBench:
    """Fills a database and searches it."""

    def __init__(self, settings: Settings, plan: Plan, say: Say = print) -> None:
        self._settings = settings
        self._plan = plan
        self._say = say

    async def run(self, circumstances: Circumstances) -> Result:
        """Measure both sets.

        Raises:
            ConfigurationError: the database is not empty.
            DependencyError: it does not answer.
        """
        plan = self._plan
        database = await Database.open(self._settings)
        try:
            if await database.recent_predictions(1):
                raise ConfigurationError("search is measured in an empty database, and this one has results")
            self._say(f"drawing {plan.pictures} pictures")
            ids, vectors, twins = await asyncio.to_thread(self._fingerprints)
            pictures = await self._measure(database, _MODEL, ids, vectors, twins)
            made_up = {}
            for name, centres in (("clustered", plan.centres), ("unstructured", 0)):
                self._say(f"making up {plan.vectors} {name} vectors")
                vectors = _made_up(plan, centres)
                names = [f"{name}-{number:06d}" for number in range(len(vectors))]
                made_up[name] = await self._measure(database, f"bench:{name}", names, vectors, {})
        finally:
            await database.close()
        return Result(
            commit=circumstances.commit,
            machine=circumstances.machine,
            seed=plan.seed,
            circumstances=circumstances,
            plan=plan,
            ef_search=EF_SEARCH,
            pictures=pictures,
            clustered=made_up["clustered"],
            unstructured=made_up["unstructured"],
        )

    def _fingerprints(self) -> tuple[list[str], Vectors, dict[str, str]]:
        """Draw pictures and embed them as `predict` does; return ids, vectors, and who is whose twin."""
        (model,) = load_models(_MODEL, torch.device("cpu"))
        ids: list[str] = []
        twins: dict[str, str] = {}
        parts: list[Vectors] = []
        drawn = draw(self._plan.seed, self._plan.pictures)
        while batch := list(itertools.islice(drawn, _FORWARD_PICTURES)):
            pixels = np.stack([_pixels(picture, model.view) for picture in batch])
            with torch.inference_mode():
                outputs = model.forward(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            parts.append(np.stack([output.embedding for output in outputs if output.embedding is not None]))
            for picture in batch:
                ids.append(picture.id)
                if picture.near_duplicate_of is not None:
                    twins |= {picture.id: picture.near_duplicate_of, picture.near_duplicate_of: picture.id}
        return ids, np.concatenate(parts), twins

    async def _measure(
        self, database: Database, model: str, ids: Sequence[str], vectors: Vectors, twins: dict[str, str]
    ) -> Measured:
        space = Space(model, "1", vectors.shape[1])
        self._say(f"storing {len(ids)} predictions")
        for rows in _predictions(ids, vectors, space):
            await database.save(rows, [])
        self._say("building the index")
        began = time.monotonic()
        built = await vector_indexes.maintain(
            self._settings.resolved_database, len(ids), self._settings.database_password_file
        )
        seconds = time.monotonic() - began
        if space.index_name not in built:
            raise AssertionError(f"no index was built: {built}")
        rng = np.random.default_rng(self._plan.seed)
        queries = rng.choice(len(ids), min(self._plan.queries, len(ids)), replace=False).tolist()
        exact, exact_seconds = await _search(database, space, vectors, queries, "exact")
        found, found_seconds = await _search(database, space, vectors, queries, "approximate")
        recalls = [_recall(one, other) for one, other in zip(found, exact, strict=True)]
        right = [_is_right(one, vectors, ids, query) for one, query in zip(exact, queries, strict=True)]
        first = [
            one.hits[0].image_id == ids[query] and one.hits[0].score > 1 - _TOLERANCE
            for one, query in zip(found, queries, strict=True)
        ]
        paired = [
            one.hits[1].image_id == twins[ids[query]]
            for one, query in zip(found, queries, strict=True)
            if ids[query] in twins
        ]
        return Measured(
            vectors=len(ids),
            dimension=space.dimension,
            queries=len(queries),
            recall_at_10=_share(recalls),
            exact_is_right=_share(right),
            itself_first=_share(first),
            near_duplicate_next=_share(paired) if paired else None,
            exact=_latency(exact_seconds),
            approximate=_latency(found_seconds),
            index_build_seconds=rounded(seconds),
        )


def rows(result: Result) -> list[tuple[str, str]]:
    """Return the result as a table: what, and how much."""
    table = []
    for name, measured in (
        ("drawn pictures", result.pictures),
        ("clustered vectors", result.clustered),
        ("unstructured vectors", result.unstructured),
    ):
        table += [
            (f"{name}: vectors", f"{measured.vectors:,} of {measured.dimension} dimensions"),
            (f"{name}: recall@10 of the index", f"{measured.recall_at_10:.4f}"),
            (f"{name}: exact mode is right", f"{measured.exact_is_right:.4f}"),
            (f"{name}: itself first", f"{measured.itself_first:.4f}"),
            (f"{name}: exact p50 / p99", _milliseconds(measured.exact)),
            (f"{name}: approximate p50 / p99", _milliseconds(measured.approximate)),
            (f"{name}: building the index", f"{measured.index_build_seconds:.3g} s"),
        ]
        if measured.near_duplicate_next is not None:
            table.append((f"{name}: near-duplicate next", f"{measured.near_duplicate_next:.4f}"))
    return table


def _pixels(picture: SamplePicture, view: imaging.View) -> NDArray[np.uint8]:
    return imaging.decode(picture.data, [view]).pixels[0]


def _made_up(plan: Plan, centres: int) -> Vectors:
    """Draw vectors in all directions alike, or around centres that are: (plan.vectors, 256) float32."""
    rng = np.random.default_rng(plan.seed)
    vectors = rng.normal(size=(plan.vectors, 256))
    if centres:
        middles = rng.normal(size=(centres, 256))
        vectors = middles[rng.integers(0, centres, plan.vectors)] + _SPREAD * vectors
    return vectors.astype(np.float32)


def _predictions(ids: Sequence[str], vectors: Vectors, space: Space) -> Iterator[list[Prediction]]:
    """Yield the predictions of these vectors, in batches."""
    now = datetime.now(UTC)
    receipt = Receipt(topic="images.bulk.v1", partition=0, offset=0)
    for start in range(0, len(ids), _SAVE_ROWS):
        yield [
            Prediction(
                id=prediction_id(name, "default", ((space.model, space.version),)),
                image_id=name,
                deployment="default",
                lane="bulk",
                outcome="predicted",
                time=now,
                receipt=receipt,
                models=(
                    ModelResult(
                        model=space.model, version=space.version, digest="bench", task="embed",
                        embedding=encode_embedding(array.array("f", vector).tobytes()),
                        dimension=space.dimension,
                    ),
                ),
            )
            for name, vector in zip(
                ids[start : start + _SAVE_ROWS], vectors[start : start + _SAVE_ROWS].tolist(), strict=True
            )
        ]  # fmt: skip


async def _search(
    database: Database, space: Space, vectors: Vectors, queries: Sequence[int], mode: Mode
) -> tuple[list[Found], list[float]]:
    """Search with each query, one after the other; return what was found, and how long each took."""
    found, seconds = [], []
    for query in [queries[0], *queries]:  # the first one twice: it warms caches
        began = time.monotonic()
        found.append(await database.nearest(space, vectors[query].tolist(), mode=mode, limit=NEAREST))
        seconds.append(time.monotonic() - began)
        if found[-1].mode != mode:
            raise AssertionError(f"searched {found[-1].mode}, not {mode}")
    return found[1:], seconds[1:]


def _recall(found: Found, exact: Found) -> float:
    """Return the share of the nearest that were found; of equally distant ones any will do."""
    reach = exact.hits[-1].distance + _TOLERANCE
    return sum(hit.distance <= reach for hit in found.hits) / len(exact.hits)


def _is_right(found: Found, vectors: Vectors, ids: Sequence[str], query: int) -> bool:
    """Whether the distances are those of the nearest, computed in double precision."""
    wide = vectors.astype(np.float64)
    cosine = (wide @ wide[query]) / (np.linalg.norm(wide, axis=1) * np.linalg.norm(wide[query]))
    expected = dict(zip(ids, (1 - cosine).tolist(), strict=True))
    nearest = np.sort(1 - cosine)[: len(found.hits)]
    distances = [hit.distance for hit in found.hits]
    own = [expected[hit.image_id] for hit in found.hits]
    return bool(
        np.allclose(distances, nearest, atol=_TOLERANCE) and np.allclose(distances, own, atol=_TOLERANCE)
    )


def _share(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _latency(seconds: Sequence[float]) -> Latency:
    return Latency(
        p50_seconds=rounded(percentile(seconds, 0.5)), p99_seconds=rounded(percentile(seconds, 0.99))
    )


def _milliseconds(latency: Latency) -> str:
    return f"{latency.p50_seconds * 1000:.3g} / {latency.p99_seconds * 1000:.3g} ms"
