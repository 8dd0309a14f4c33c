"""Nearest images in a real PostgreSQL: exactly what is near, nothing that must not be found, and the indexes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import msgspec
import numpy as np
import pytest

from loadtest.report import Circumstances
from loadtest.search import Plan, SearchBench, rows
from pipeline import vector_indexes
from pipeline.database import Database
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.events import Box, ModelResult
from pipeline.settings import load
from pipeline.vectors import After, Filters, Found, Mode, Space
from tests.support import services
from tests.support.eventually import eventually
from tests.support.samples import NOW, image_row
from tests.support.vectors import clustered, distances, embedded, fill, space

MODES: tuple[Mode, ...] = ("exact", "approximate")


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(load(database_url=database))
    yield opened
    await opened.close()


def ids(found: Found) -> list[str]:
    return [hit.image_id for hit in found.hits]


async def indexes(dsn: str) -> dict[str, bool]:
    """Return our indexes, and whether each is valid."""
    connection = await asyncpg.connect(dsn)
    try:
        return await vector_indexes._present(connection)
    finally:
        await connection.close()


async def scans(dsn: str, index: str) -> int:
    """Return how often an index was walked, once the server's statistics have it."""
    connection = await asyncpg.connect(dsn)
    try:
        query = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = $1"
        return int(await connection.fetchval(query, index) or 0)
    finally:
        await connection.close()


async def all_pages(db: Database, where: Space, query: list[float], mode: Mode, limit: int) -> list[str]:
    """Follow the pages of a search to its end."""
    after: After | None = None
    seen: list[str] = []
    while True:
        found = await db.nearest(where, query, mode=mode, limit=limit, after=after)
        seen += ids(found)
        if not found.has_more:
            return seen
        after = found.last


# What is found


async def test_exact_search_is_what_brute_force_finds(db: Database) -> None:
    """Exact mode returns the images and scores that computing every cosine in double precision returns."""
    vectors = clustered(400, 24)
    names = await fill(db, vectors)
    for number in range(0, 400, 57):
        found = await db.nearest(space(24), vectors[number].tolist(), mode="exact", limit=20)
        expected = distances(vectors, vectors[number])
        order = np.argsort(expected)[:20]
        assert found.mode == "exact"
        assert ids(found) == [names[index] for index in order]
        assert np.allclose([hit.score for hit in found.hits], np.maximum(0, 1 - expected[order]), atol=2e-6)
        assert (found.hits[0].image_id, found.hits[0].score) == (names[number], 1.0)


async def test_opposite_directions_count_as_nothing_in_common(db: Database) -> None:
    """A score is between 0 and 1: length does not matter, and an opposite vector has 0."""
    await db.save(
        [
            embedded(name, numbers)
            for name, numbers in {
                "same": [2.0, 0.0],
                "half": [1.0, 3**0.5],
                "across": [0.0, 5.0],
                "back": [-1.0, 0.0],
            }.items()
        ],
        [],
    )
    found = await db.nearest(space(2), [7.0, 0.0])
    assert [(hit.image_id, hit.score) for hit in found.hits] == [
        ("same", 1.0), ("half", 0.5), ("across", 0.0), ("back", 0.0),
    ]  # fmt: skip


async def test_an_empty_database_finds_nothing(db: Database) -> None:
    """Without any vectors a search has no hits, in either mode."""
    nothing = Found(mode="exact", hits=(), has_more=False)
    for mode in MODES:
        assert await db.nearest(space(3), [1.0, 2.0, 3.0], mode=mode) == nothing


async def test_only_the_newest_prediction_of_an_image_counts(db: Database) -> None:
    """An image is found where its newest prediction puts it, once, and never by an older version's vector."""
    await db.save([embedded("moved", [1.0, 0.0]), embedded("stayed", [1.0, 0.1])], [])
    await db.save(
        [embedded("moved", [0.0, 1.0], version="2"), embedded("other", [1.0, 0.0], version="2")], []
    )
    old = await db.nearest(space(2), [1.0, 0.0])
    new = await db.nearest(space(2, "2"), [1.0, 0.0])
    assert (ids(old), ids(new)) == (["stayed"], ["other", "moved"])
    (vector,) = await db.vectors("moved", "default")
    assert (vector.space, list(vector.numbers)) == (space(2, "2"), [0.0, 1.0])


async def test_models_that_are_activated_again_count_again(db: Database) -> None:
    """The newest is the prediction of the highest revision of the models, not the one stored last."""
    await db.save([embedded("cat", [1.0, 0.0], revision=2)], [])
    await db.save([embedded("cat", [0.0, 1.0], version="2", revision=1)], [])
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == ["cat"]
    await db.save([embedded("cat", [0.0, 1.0], version="2", revision=3)], [])
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == []
    assert ids(await db.nearest(space(2, "2"), [1.0, 0.0])) == ["cat"]
    (shown,) = await db.predictions("cat")
    assert [shown.prediction.id] == [one.prediction_id for one in await db.vectors("cat", "default")]


async def test_a_newer_expiry_does_not_hide_a_prediction(db: Database) -> None:
    """`expired` after `predicted` says nothing about the picture, which is still found."""
    await db.save([embedded("cat", [1.0, 0.0])], [])
    await db.save([embedded("cat", [], version="2", outcome="expired", models=(), reason="late")], [])
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == ["cat"]


async def test_deployments_models_and_dimensions_are_apart(db: Database) -> None:
    """Vectors of another deployment, version or length are never compared, and disturb nobody."""
    await db.save([
        embedded("here", [1.0, 0.0]),
        embedded("elsewhere", [1.0, 0.0], deployment="wildlife"),
        embedded("longer", [1.0, 0.0, 0.0]),
        embedded("both", [0.0, 1.0]), embedded("both", [1.0, 0.0], deployment="wildlife"),
    ], [])  # fmt: skip
    assert ids(await db.nearest(space(2), [1.0, 0.0], mode="exact")) == ["here", "both"]
    assert ids(await db.nearest(space(2), [1.0, 0.0], "wildlife")) == ["both", "elsewhere"]
    assert ids(await db.nearest(space(3), [1.0, 0.0, 0.0])) == ["longer"]


async def test_deleted_images_are_not_found(db: Database) -> None:
    """A deleted image is gone from searches at once, and a late repeat of its prediction brings it not back."""
    kept, gone = embedded("kept", [1.0, 0.0]), embedded("gone", [1.0, 0.0])
    await db.save([kept, gone], [])
    await db.delete_image("gone")
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == ["kept"]
    await db.save([gone], [])
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == ["kept"]
    assert await db.vectors("gone", "default") == []


async def test_filters_leave_what_they_say(db: Database) -> None:
    """Label (of a picture or of something in it), source, and times of publication, alone and together."""
    boxes = ModelResult(
        model="test:detector", version="1", digest="d", task="detect", boxes=(Box("cat", 0.9, 0, 0, 5, 5),)
    )
    boxed = embedded("boxed", [1.0, 0.2])
    await db.save(
        [
            embedded("cat", [1.0, 0.0], label="cat"),
            embedded("dog", [1.0, 0.1], label="dog"),
            msgspec.structs.replace(boxed, models=(boxes, *boxed.models)),
            embedded("plain", [1.0, 0.3], time=NOW + timedelta(days=3)),
        ],
        [],
    )
    await db.save_images([
        image_row("cat", source="camera-1", published_at=NOW - timedelta(hours=1)),
        image_row("dog", source="camera-2", published_at=NOW + timedelta(hours=1)),
    ])  # fmt: skip
    expected: list[tuple[Filters, list[str]]] = [
        (Filters(), ["cat", "dog", "boxed", "plain"]),
        (Filters(label="cat"), ["cat", "boxed"]),
        (Filters(label="'; --"), []),
        (Filters(source="camera-2"), ["dog"]),
        (Filters(since=NOW), ["dog", "boxed", "plain"]),
        (Filters(until=NOW), ["cat"]),
        # Without an `images` row the moment of the prediction stands for that of publication.
        (Filters(since=NOW, until=NOW + timedelta(days=1)), ["dog", "boxed"]),
        (Filters(label="cat", source="camera-1", until=NOW), ["cat"]),
        (Filters(label="cat", source="camera-2"), []),
    ]
    for filters, names in expected:
        for mode in MODES:
            found = await db.nearest(space(2), [1.0, 0.0], "default", filters, mode=mode)
            assert ids(found) == names, filters
    (cat,) = (await db.nearest(space(2), [1.0, 0.0], limit=1)).hits
    assert (cat.labels, cat.source) == ({"test:labeller": "cat"}, "camera-1")


async def test_vectors_of_zeros_are_not_found(db: Database, database: str) -> None:
    """A vector without a direction has no cosine: it is left out, with and without an index."""
    await db.save([embedded("zero", [0.0, 0.0]), embedded("one", [1.0, 1.0])], [])
    assert ids(await db.nearest(space(2), [1.0, 0.0], mode="exact")) == ["one"]
    await vector_indexes.maintain(database, min_rows=1)
    assert ids(await db.nearest(space(2), [1.0, 0.0])) == ["one"]


@pytest.mark.parametrize("mode", MODES)
async def test_pages_hold_every_image_once(db: Database, database: str, mode: Mode) -> None:
    """Following the pages gives each image once and in order, also where many are at the same distance."""
    vectors = clustered(300, 8)
    vectors[100:160] = vectors[100]  # sixty copies of one picture
    names = await fill(db, vectors)
    await vector_indexes.maintain(database, min_rows=100)
    query = vectors[100].tolist()
    pages = await all_pages(db, space(8), query, mode, 7)
    assert sorted(pages) == names
    assert set(pages[:60]) == set(names[100:160])
    whole = await db.nearest(space(8), query, mode="exact", limit=300)
    assert pages == ids(whole)


# Indexes


async def test_an_index_is_built_when_it_is_worth_it_and_used(db: Database, database: str) -> None:
    """From the set number of vectors on there is one index per model version and dimension, and it is walked."""
    vectors = clustered(600, 16)
    await fill(db, vectors)
    await db.save([embedded("another", [1.0, 2.0], version="2")], [])
    assert await vector_indexes.maintain(database, min_rows=601) == []
    assert (await db.nearest(space(16), vectors[3].tolist())).mode == "exact"
    assert await vector_indexes.maintain(database, min_rows=600) == [space(16).index_name]
    assert await vector_indexes.maintain(database, min_rows=600) == []
    assert await indexes(database) == {space(16).index_name: True}
    found = await db.nearest(space(16), vectors[3].tolist())
    assert (found.mode, found.hits[0].image_id) == ("approximate", "image-00003")

    async def was_walked() -> bool:
        return await scans(database, space(16).index_name) > 0

    await eventually(was_walked, 10.0)


async def test_images_stored_after_the_build_are_found(db: Database, database: str) -> None:
    """The index follows what is stored and deleted."""
    vectors = clustered(300, 8)
    await fill(db, vectors)
    await vector_indexes.maintain(database, min_rows=1)
    await db.save([embedded("late", (vectors[9] * 2).tolist())], [])
    found = await db.nearest(space(8), vectors[9].tolist(), limit=2)
    assert (found.mode, set(ids(found))) == ("approximate", {"image-00009", "late"})
    await db.delete_image("image-00009")
    found = await db.nearest(space(8), vectors[9].tolist(), limit=2)
    assert found.hits[0].image_id == "late"
    assert "image-00009" not in ids(found)


async def test_strict_filters_do_not_starve_an_approximate_search(db: Database, database: str) -> None:
    """With few matches far from the query every one of them is found, whatever lies in between."""
    vectors = clustered(3000, 16)
    order = np.argsort(distances(vectors, vectors[0]))
    rare = {f"image-{index:05d}" for index in order[[700, 1500, 2200, 2800, 2999]]}
    names = await fill(db, vectors)
    await db.save_images([image_row(name, source="rare" if name in rare else "common") for name in names])
    await vector_indexes.maintain(database, min_rows=1)
    for limit, mode in ((3, "approximate"), (5, "exact"), (50, "exact")):
        found = await db.nearest(
            space(16), vectors[0].tolist(), "default", Filters(source="rare"), limit=limit
        )
        assert len(found.hits) == min(limit, 5)
        assert {*ids(found)} <= rare
        assert (found.mode, found.has_more) == (mode, limit < 5)


async def test_replicas_build_an_index_together(db: Database, database: str) -> None:
    """Of several replicas that begin at once one builds, and none fails."""
    await fill(db, clustered(500, 32))
    built = await asyncio.gather(*(vector_indexes.maintain(database, min_rows=1) for _ in range(4)))
    assert sorted(built, key=len) == [[], [], [], [space(32).index_name]]
    assert await indexes(database) == {space(32).index_name: True}


async def test_a_broken_build_is_repaired(db: Database, database: str) -> None:
    """An index whose build was killed is dropped and built again; searches are exact meanwhile."""
    vectors = clustered(4000, 64)
    await fill(db, vectors)
    building = asyncio.create_task(vector_indexes.maintain(database, min_rows=1))

    async def has_begun() -> bool:
        return space(64).index_name in await indexes(database)

    await eventually(has_begun, 20.0)
    await services.execute(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND query LIKE 'CREATE INDEX CONCURRENTLY%'",
    )
    with pytest.raises(DependencyError):
        await building
    assert await indexes(database) == {space(64).index_name: False}
    assert (await db.nearest(space(64), vectors[0].tolist())).mode == "exact"
    assert await vector_indexes.maintain(database, min_rows=1) == [space(64).index_name]
    assert (await db.nearest(space(64), vectors[0].tolist())).mode == "approximate"


async def test_a_build_under_way_is_left_alone(db: Database, database: str) -> None:
    """An unfinished index that somebody still builds is neither dropped nor built by others."""
    await fill(db, clustered(200, 8))
    name = space(8).index_name
    blocker = await asyncpg.connect(database)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("INSERT INTO embeddings SELECT * FROM embeddings WHERE false")
    # The build waits for this transaction, which wrote to the table before it.
    what = "embeddings USING hnsw ((embedding::vector(8)) vector_cosine_ops)"
    building = asyncio.create_task(services.execute(database, f"CREATE INDEX CONCURRENTLY {name} ON {what}"))

    async def has_begun() -> bool:
        return await indexes(database) == {name: False}

    await eventually(has_begun, 20.0)
    assert await vector_indexes.maintain(database, min_rows=1) == []
    assert await indexes(database) == {name: False}
    await transaction.rollback()
    await blocker.close()
    await building
    assert await indexes(database) == {name: True}


async def test_an_index_without_vectors_is_dropped(db: Database, database: str) -> None:
    """When the last vector of a model version is gone its index goes too."""
    await db.save([embedded("cat", [1.0, 0.0])], [])
    await vector_indexes.maintain(database, min_rows=1)
    assert await indexes(database) == {space(2).index_name: True}
    await db.delete_image("cat")
    await vector_indexes.maintain(database, min_rows=1)
    assert await indexes(database) == {}


@pytest.mark.parametrize(("dimension", "mode"), [(2500, "approximate"), (4500, "exact")])
async def test_long_vectors(db: Database, database: str, dimension: int, mode: str) -> None:
    """Above 2,000 dimensions the index is in half precision, above 4,000 there is none; both find the right one."""
    vectors = clustered(30, dimension)
    names = await fill(db, vectors)
    built = await vector_indexes.maintain(database, min_rows=1)
    assert built == ([space(dimension).index_name] if mode == "approximate" else [])
    found = await db.nearest(space(dimension), vectors[4].tolist(), limit=5)
    assert (found.mode, found.hits[0].image_id) == (mode, names[4])
    assert abs(found.hits[0].score - 1.0) < 1e-3


@pytest.mark.parametrize("model", ["it's", 'say "hi"; --', "back\\slash", "x" * 512, "模型/🐈"])
async def test_a_model_may_have_any_name(db: Database, database: str, model: str) -> None:
    """Names of models and versions reach the index as they are."""
    vector = embedded("cat", [1.0, 0.0]).models[0]
    result = ModelResult(
        model=model, version="v'1", digest="d", task="embed", embedding=vector.embedding, dimension=2
    )
    await db.save([embedded("cat", [], models=(result,)), embedded("dog", [0.0, 1.0])], [])
    where = Space(model, "v'1", 2)
    assert where.index_name in await vector_indexes.maintain(database, min_rows=1)
    found = await db.nearest(where, [1.0, 0.0], limit=1)
    assert ids(found) == ["cat"]


async def test_the_index_finds_nearly_everything(database: str) -> None:
    """Over a few thousand vectors recall@10 is at least 0.95, exact mode is right, and near-duplicates are next."""
    plan = Plan(pictures=240, vectors=3_000, centres=40, queries=60)
    settings = load(database_url=database)
    bench = SearchBench(settings, plan)
    result = await bench.run(Circumstances.now(0.0))
    print(rows(result))
    assert result.pictures.recall_at_10 >= 0.95
    assert result.clustered.recall_at_10 >= 0.95
    for measured in (result.pictures, result.clustered, result.unstructured):
        assert (measured.exact_is_right, measured.itself_first) == (1.0, 1.0)
    assert result.pictures.near_duplicate_next == 1.0
    with pytest.raises(ConfigurationError, match="empty database"):
        await bench.run(Circumstances.now(0.0))
