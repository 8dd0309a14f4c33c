"""Nearest images by cosine distance, exactly or through an HNSW index of pgvector.

The invariant: a page holds every image that the filters leave, up to its limit. An index that gives fewer
than were asked for (strict filters, the end of the list, none built yet) is followed by an exact search, and
the answer says which of the two it is.
"""

from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec

from pipeline.events import ModelResult
from pipeline.postgres import QUERIES, Connection, Pool
from pipeline.vectors import After, Embedding, Filters, Found, Hit, Mode, Space

# Candidates that HNSW keeps while it looks; constant, so that the pages of one search follow the same walk.
# `docs/benchmarks/search.json` has what it finds.
EF_SEARCH = 200
# The walk ends after so many vectors, about 0.2 s; what is rarer among them is found faster by looking at all.
MAX_SCAN_TUPLES = 20_000
_PREFERENCES = {
    "hnsw.ef_search": str(EF_SEARCH),
    # pgvector 0.8: go on walking until enough pass the filters, nearest first. An older one ignores it, and
    # then fewer are found and an exact search follows.
    "hnsw.iterative_scan": "strict_order",
    "hnsw.max_scan_tuples": str(MAX_SCAN_TUPLES),
    # The planner knows nothing of the cost of computing distances, and would at times sort all of them.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    "jit": "off",
}

_models_decoder = msgspec.json.Decoder(tuple[ModelResult, ...])


async def vectors_of_image(pool: Pool, image_id: str, deployment: str) -> list[Embedding]:
    """Return the vectors of an image's newest prediction in a deployment, in the order of its models."""
    return [_embedding(row) for row in await pool.rows("vectors_of_image", image_id, deployment)]


async def vector_of_prediction(pool: Pool, prediction_id: str, model: str) -> Embedding | None:
    """Return one model's vector of a prediction, newest or not."""
    rows = await pool.rows("vector_of_prediction", prediction_id, model)
    return _embedding(rows[0]) if rows else None


async def nearest(
    pool: Pool,
    space: Space,
    numbers: Sequence[float],
    deployment: str,
    filters: Filters,
    *,
    mode: Mode,
    limit: int,
    after: After | None = None,
) -> Found:
    """Return up to `limit` images nearest to a vector, behind `after`; none of them twice.

    An image is represented by its newest prediction in the deployment, and only if that was made by the same
    version of the model. Vectors of zeros are never found.
    """
    arguments: tuple[Any, ...] = (
        numbers, space.model, space.version, space.dimension, deployment,
        filters.label, filters.source, filters.since, filters.until,
        after.distance if after else None, after.image_id if after else None,
        limit + 1,
    )  # fmt: skip
    async with pool.transaction() as connection:
        if mode == "approximate" and (rows := await _approximate(connection, space, arguments)) is not None:
            return _found("approximate", rows, limit)
    return _found("exact", await pool.rows("nearest_exact", *arguments), limit)


async def _approximate(
    connection: Connection, space: Space, arguments: Sequence[Any]
) -> list[asyncpg.Record] | None:
    """Return what the index finds, or None when there is none or it finds fewer than were asked for."""
    if space.index_type is None:
        return None
    if not await connection.fetchval(QUERIES["index_is_valid"], space.index_name):
        return None
    await connection.execute(QUERIES["prefer_index"], list(_PREFERENCES), list(_PREFERENCES.values()))
    query = QUERIES["nearest_approximate"].replace("vector(0)", space.index_type)
    rows = await connection.fetch(query, *arguments)
    return rows if len(rows) == arguments[-1] else None


def _found(mode: Mode, rows: Sequence[asyncpg.Record], limit: int) -> Found:
    return Found(mode=mode, hits=tuple(_hit(row) for row in rows[:limit]), has_more=len(rows) > limit)


def _hit(row: asyncpg.Record) -> Hit:
    results = _models_decoder.decode(row["models"])
    return Hit(
        image_id=row["image_id"],
        prediction_id=row["prediction_id"],
        distance=row["distance"],
        published_at=row["published_at"],
        source=row["source"],
        labels={result.model: result.label for result in results if result.label is not None},
    )


def _embedding(row: asyncpg.Record) -> Embedding:
    return Embedding(
        prediction_id=row["prediction_id"],
        image_id=row["image_id"],
        deployment=row["deployment"],
        space=Space(row["model"], row["version"], row["dimension"]),
        numbers=row["numbers"],
    )
