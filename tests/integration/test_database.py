"""The database against a real PostgreSQL: identity, concurrency, faults, states, deletion."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from millrace.postgres import EmbeddedPostgres
from pipeline import postgres
from pipeline.database import Database, migrate
from pipeline.deadletters import DeadLetter, decode_dead_letter
from pipeline.errors import ConfigurationError, DependencyError, StorageRefusedError
from pipeline.events import ModelResult, Prediction, Receipt, Record, encode_embedding
from pipeline.results import ImageRow, ImageState, Saved, SavedImage
from pipeline.settings import load
from pipeline.writes import storable
from tests.support import services
from tests.support.eventually import eventually
from tests.support.samples import GROUP, SHA_A, SHA_B, dead_letter, embedding, image_row, prediction

Replace = msgspec.structs.replace


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(load(database_url=database))
    yield opened
    await opened.close()


async def count(dsn: str, table: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table}"))
    finally:
        await connection.close()


# Migrations and connecting


async def test_migrations_apply_once_however_many_processes_apply_them(postgres: str) -> None:
    """Several processes that migrate at once apply each file exactly once, and again applies none."""
    await services.execute(postgres, "CREATE DATABASE migrated_at_once")
    dsn = services.with_database(postgres, "migrated_at_once")
    applied = await asyncio.gather(*(migrate(dsn) for _ in range(4)))
    files = sorted(resources.files("pipeline").joinpath("migrations").iterdir(), key=lambda file: file.name)
    expected = [file.name.removesuffix(".sql") for file in files]
    assert expected[0] == "0001_images"
    assert expected == sorted(name for names in applied for name in names)
    assert await migrate(dsn) == []


async def test_a_changed_migration_is_refused(database: str) -> None:
    """A file that was changed after it was applied stops everything with one line that names it."""
    await services.execute(
        database, "UPDATE schema_migrations SET sha256 = 'x' WHERE name = '0002_predictions'"
    )
    with pytest.raises(ConfigurationError, match="0002_predictions was changed"):
        await migrate(database)


async def test_a_failed_migration_leaves_nothing(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that fails half-way leaves the database as it was."""
    await services.execute(postgres, "CREATE DATABASE half_migrated")
    dsn = services.with_database(postgres, "half_migrated")
    broken = [("0001_x", "CREATE TABLE half (); SELECT nothing FROM nowhere", "digest")]
    monkeypatch.setattr("pipeline.postgres._migrations", lambda: broken)
    with pytest.raises(ConfigurationError, match="0001_x cannot be applied"):
        await migrate(dsn)
    with pytest.raises(asyncpg.UndefinedTableError):
        await count(dsn, "half")


async def test_an_unmigrated_database_is_waited_for(postgres: str) -> None:
    """A step that starts before the migrations waits for them and says so."""
    await services.execute(postgres, "CREATE DATABASE unmigrated")
    with pytest.raises(DependencyError, match="run `millrace migrate`: 0001_images"):
        await Database.open(load(database_url=services.with_database(postgres, "unmigrated")))


@pytest.mark.parametrize("change", [{"path": "/nowhere"}, {"netloc": "postgres:wrong@{host}"}])
async def test_a_refused_login_is_a_configuration_error(postgres: str, change: dict[str, str]) -> None:
    """A wrong password or database name ends the start with one line that names the setting."""
    from urllib.parse import urlsplit

    parts = urlsplit(postgres)
    host = parts.netloc.rpartition("@")[2]
    wrong = parts._replace(query="", **{name: value.format(host=host) for name, value in change.items()})
    if "path" in change:
        wrong = parts._replace(path="/nowhere")
    with pytest.raises(ConfigurationError, match="MILLRACE_DATABASE_URL"):
        await Database.open(load(database_url=wrong.geturl()))
    with pytest.raises(ConfigurationError, match="MILLRACE_DATABASE_URL"):
        await migrate(wrong.geturl())


async def test_an_absent_server_is_a_dependency_error() -> None:
    """A server that is not there is waited for: at opening, or lazily at each call."""
    absent = load(database_url="postgresql://postgres@127.0.0.1:1/millrace")
    with pytest.raises(DependencyError):
        await Database.open(absent)
    lazy = await Database.open(absent, check=False)
    for call in (lazy.ping(1.0), lazy.image("a"), lazy.save([prediction("a")], [])):
        with pytest.raises(DependencyError):
            await call
    await lazy.close()


# Predictions


async def test_a_prediction_comes_back_as_it_was(db: Database) -> None:
    """What is stored is what is read, the vectors beside it."""
    given = prediction("a", reason="why", traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    assert await db.save([given], []) == Saved(stored=1)
    (stored,) = await db.predictions("a")
    bare = tuple(Replace(result, embedding=None) for result in given.models)
    assert stored.prediction == Replace(given, models=bare)
    assert await db.embeddings(given.id) == {"builtin:fingerprint": [0.5, -1.0, 0.25]}


async def test_the_first_stored_wins(db: Database) -> None:
    """A repeat and another picture of the same id change nothing and are counted apart."""
    first = prediction("a")
    await db.save([first], [])
    other = prediction("a", SHA_B, models=(embedding(9.0),))
    assert await db.save([first, other, prediction("b")], []) == Saved(stored=1, repeats=1, conflicts=1)
    (stored,) = await db.predictions("a")
    assert stored.prediction.receipt.input_sha256 == SHA_A
    assert await db.embeddings(first.id) == {"builtin:fingerprint": [0.5, -1.0, 0.25]}


@pytest.mark.parametrize("in_one_batch", [True, False])
async def test_predicted_replaces_expired(db: Database, in_one_batch: bool) -> None:
    """A late prediction takes the place of `expired`, never the other way round, in whatever batches."""
    expired, late = prediction("a", None, outcome="expired", reason="late"), prediction("a")
    if in_one_batch:
        await db.save([expired, late, expired], [])
    else:
        for one in (expired, late, expired):
            await db.save([one], [])
    (stored,) = await db.predictions("a")
    assert stored.prediction.outcome == "predicted"
    assert await db.embeddings(late.id) != {}


async def test_another_picture_never_replaces_expired(db: Database) -> None:
    """`expired` of one picture is not replaced by a prediction of another."""
    await db.save([prediction("a", SHA_A, outcome="expired")], [])
    assert await db.save([prediction("a", SHA_B)], []) == Saved(conflicts=1)


async def test_concurrent_writers_of_the_same_rows_agree(db: Database, database: str) -> None:
    """Many writers of the same keys in different orders neither deadlock nor store anything twice."""
    letters = [dead_letter(f"l{n}", offset=n) for n in range(50)]
    batches = []
    for writer in range(8):
        rows = [prediction(f"i{n}") for n in range(200)]
        batches.append((rows[::-1] if writer % 2 else rows, letters[::-1] if writer % 3 else letters))
    other = await Database.open(load(database_url=database))
    saved = await asyncio.gather(
        *((db, other)[number % 2].save(*batch) for number, batch in enumerate(batches))
    )
    await other.close()
    assert sum(one.stored for one in saved) == 200
    assert sum(one.repeats for one in saved) == 7 * 200
    assert sum(one.dead_letters for one in saved) == 50
    assert await count(database, "predictions") == await count(database, "embeddings") == 200


NOT_A_NUMBER = encode_embedding(b"\x00\x00\xc0\x7f")
REFUSED: dict[str, Any] = {
    "U+0000 in the id": {"image_id": "a\x00b"},
    "U+0000 in a text": {"reason": "\x00"},
    "U+0000 in JSON": {"models": (ModelResult(model="m\x00", version="1", digest="d", task="score"),)},
    "no such lane": {"lane": "fast"},
    "an endless id": {"id": "x" * 5000},
    "an empty image id": {"image_id": ""},
    "a time before all time": {"time": datetime.fromisoformat("0001-01-01T00:00:00+14:00")},
    "a vector that is not base64": {"models": (Replace(embedding(1.0), embedding="?"),)},
    "a vector of another length": {"models": (Replace(embedding(1.0), dimension=2),)},
    "a vector without numbers": {"models": (embedding(),)},
    "a vector of NaN": {"models": (Replace(embedding(1.0), embedding=NOT_A_NUMBER),)},
    "a vector above pgvector's limit": {"models": (embedding(*[0.0] * 17_000),)},
    "a digest that is none": {"receipt": Receipt(topic="t", partition=0, offset=0, input_sha256="x")},
}


@pytest.mark.parametrize("fault", REFUSED)
async def test_bad_data_is_refused_as_a_whole(db: Database, database: str, fault: str) -> None:
    """Data that PostgreSQL refuses says so with its own error, and nothing of the batch is stored."""
    bad = Replace(prediction("bad"), **REFUSED[fault])
    with pytest.raises(StorageRefusedError) as refused:
        await db.save([prediction("good"), bad], [dead_letter("l")])
    assert "\x00" not in refused.value.message
    assert await count(database, "predictions") == 0
    assert await count(database, "dead_letters") == 0


numbers = strategies.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    score=numbers,
    scores=strategies.dictionaries(strategies.text(), numbers, max_size=3),
    offset=strategies.integers(-(2**63), 2**63 - 1),
    label=strategies.text(),
    image_id=strategies.text(),
)
async def test_whatever_is_stored_can_be_read(
    db: Database, score: float, scores: dict[str, float], offset: int, label: str, image_id: str
) -> None:
    """Any prediction that decodes is either refused or comes back equal: nothing stored breaks a reader."""
    result = ModelResult(
        model="m", version="1", digest="d", task="classify", label=label, score=score, scores=scores
    )
    given = prediction(
        image_id,
        models=(result,),
        receipt=Receipt(topic=label, partition=0, offset=offset, queue_seconds=score),
    )
    try:
        await db.save([given], [])
    except StorageRefusedError:
        return
    assert (await db.predictions(image_id))[0].prediction.models


async def test_pages_are_stable(db: Database) -> None:
    """Paging newest first sees every prediction once, also those of one transaction."""
    await db.save([prediction(f"i{n}") for n in range(25)], [])
    await db.save([prediction("other", deployment="canary")], [])
    seen: list[str] = []
    before = None
    while page := await db.recent_predictions(10, before):
        seen += [stored.prediction.image_id for stored in page]
        before = page[-1].position
    assert seen[0] == "other"
    assert sorted(seen[1:]) == sorted(f"i{n}" for n in range(25))
    assert [row.prediction.image_id for row in await db.recent_predictions(9, deployment="canary")] == [
        "other"
    ]


# Dead letters


async def test_a_dead_letter_comes_back_as_it_was(db: Database) -> None:
    """Bytes, headers that are no text, and all the rest survive storing; lists leave the value out."""
    letter = dead_letter("a", attempts=3, value_ref="dead-letters/ab/c")
    assert await db.save([], [letter, letter]) == Saved(dead_letters=1)
    (listed,) = await db.dead_letters()
    assert listed.value_bytes == len(letter.record.value or b"")
    assert listed.letter == Replace(letter, record=Replace(letter.record, value=None))
    stored = await db.dead_letter(listed.id)
    assert stored is not None
    assert stored.letter == letter


async def test_a_dead_letter_is_stored_once(db: Database) -> None:
    """The same place is stored once; another group, offset or incarnation of the topic is another letter."""
    letter = dead_letter("a")
    await db.save([], [letter])
    others = [Replace(letter, group="archive"), dead_letter("a", offset=8), dead_letter("a", timestamp_ms=1)]
    assert await db.save([], [Replace(letter, code="model"), *others]) == Saved(dead_letters=3)
    codes = {stored.letter.code for stored in await db.dead_letters(group=GROUP, topic="images.bulk.v1")}
    assert codes == {"undecodable_image"}


async def test_dead_letters_are_filtered_and_paged(db: Database) -> None:
    """Each filter finds its letters, newest first; redriven ones only when asked for."""
    await db.save([], [dead_letter(f"i{n}", offset=n) for n in range(5)])
    await db.save(
        [], [dead_letter("model", offset=9, code="model", topic="images.realtime.v1", group="other")]
    )
    newest = (await db.dead_letters(limit=1))[0]
    assert newest.letter.image_id == "model"
    for filters in (
        {"code": "model"},
        {"group": "other"},
        {"topic": "images.realtime.v1"},
        {"image_id": "model"},
    ):
        assert [row.id for row in await db.dead_letters(**filters)] == [newest.id]  # type: ignore[arg-type]
    page = await db.dead_letters(limit=3, before=newest.id)
    assert [row.letter.image_id for row in page] == ["i4", "i3", "i2"]
    assert await db.mark_redriven(newest.id)
    assert not await db.mark_redriven(newest.id)
    assert await db.dead_letters(code="model") == []
    assert len(await db.dead_letters(code="model", open_only=False)) == 1
    assert await db.dead_letter(10**12) is None


headers = strategies.lists(
    strategies.tuples(
        strategies.one_of(
            strategies.sampled_from(
                ["millrace-" + name for name in
                 ("group", "topic", "partition", "offset", "timestamp-ms", "code", "reason", "failed-at",
                  "attempts", "image-id", "value-ref")]
            ),
            strategies.text(),
        ),
        strategies.one_of(
            strategies.binary(),
            strategies.text(min_size=250).map(str.encode),
            strategies.integers(-(2**70), 2**70).map(lambda number: str(number).encode()),
            strategies.datetimes().map(lambda time: (time.isoformat() + "+14:00").encode()),
        ),
    ),
    max_size=12,
)  # fmt: skip


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    headers=headers,
    value=strategies.none() | strategies.binary(),
    key=strategies.none() | strategies.binary(),
)
async def test_any_record_can_be_stored_as_a_dead_letter(
    db: Database, headers: list[tuple[str, bytes]], value: bytes | None, key: bytes | None
) -> None:
    """Whatever lies on the dead-letter topic, cut down, is storable: there is no place after this one."""
    record = Record(
        topic="dead-letters.v1",
        partition=0,
        offset=0,
        timestamp_ms=0,
        key=key,
        value=value,
        headers=tuple(headers),
    )
    letter = storable(decode_dead_letter(record))
    await db.save([], [letter])
    stored = [row for row in await db.dead_letters(limit=1000) if row.letter.place == letter.place]
    assert stored


# Images and their states


async def test_a_second_writer_fills_in_what_the_first_did_not_know(db: Database) -> None:
    """Gateway and archive write the same row: what either knows ends up in it."""
    early = image_row("a", size_bytes=None, sha256=None)
    assert await db.save_images([early]) == [SavedImage("stored")]
    full = image_row("a", object_key="images/aa/a/a", content_type="image/png")
    assert await db.save_images([full]) == [SavedImage("repeat", "images/aa/a/a")]
    assert await db.save_images([early]) == [SavedImage("repeat", "images/aa/a/a")]
    assert await db.image("a") == full
    assert await db.image("b") is None


async def test_the_first_picture_of_an_id_stays(db: Database) -> None:
    """Another picture under the same id is a conflict, in one batch or in two, and changes nothing."""
    row, other = image_row("a"), image_row("a", SHA_B, object_key="images/bb/b/b")
    assert [saved.status for saved in await db.save_images([row, other, row])] == [
        "stored",
        "conflict",
        "repeat",
    ]
    assert await db.save_images([other]) == [SavedImage("conflict")]
    by_reference = [image_row("r", None, object_key=key) for key in ("one", "two", "one")]
    statuses = [saved.status for saved in await db.save_images(by_reference)]
    assert statuses == ["stored", "conflict", "repeat"]
    assert await db.image("a") == row


async def test_concurrent_writers_of_an_image_agree(db: Database) -> None:
    """Of many writers of one id with two pictures, one stores it and the rest learn which one stayed."""
    rows = [image_row("a", SHA_A if number % 2 else SHA_B) for number in range(10)]
    saved = [
        one for answer in await asyncio.gather(*(db.save_images([row]) for row in rows)) for one in answer
    ]
    kept = await db.image("a")
    assert kept is not None
    expected = ["repeat" if row.sha256 == kept.sha256 else "conflict" for row in rows]
    statuses = [one.status for one in saved]
    assert statuses.count("stored") == 1
    expected[statuses.index("stored")] = "stored"
    assert statuses == expected


async def test_states(db: Database) -> None:
    """Accepted, expired, dead-lettered and predicted follow from what is stored, per deployment."""
    assert await db.state("a") is None
    await db.save_images([image_row("a")])
    assert await db.state("a") == ImageState(state="accepted")
    await db.save([prediction("a", None, outcome="expired", reason="2 s late")], [])
    assert await db.state("a") == ImageState(state="expired", code="expired", reason="2 s late")
    await db.save([], [dead_letter("a")])
    (letter,) = await db.dead_letters()
    dead = ImageState(
        state="dead_lettered", code="undecodable_image", reason="it is text", dead_letter_id=letter.id
    )
    assert await db.state("a") == dead
    assert await db.state("a", "canary") == ImageState(state="accepted")
    await db.save([prediction("a")], [])
    assert await db.state("a") == ImageState(state="predicted")


async def test_a_redriven_dead_letter_counts_as_accepted(db: Database) -> None:
    """After a redrive the image is accepted again, until it fails again."""
    await db.save([], [dead_letter("a")])
    (letter,) = await db.dead_letters()
    await db.mark_redriven(letter.id)
    assert await db.state("a") == ImageState(state="accepted")
    await db.save([], [dead_letter("a", offset=20, attempts=2, reason="again")])
    state = await db.state("a")
    assert state is not None
    assert (state.state, state.reason) == ("dead_lettered", "again")


async def test_a_refused_result_is_a_state(database: str) -> None:
    """An image whose prediction could not be stored is dead-lettered, under the installation's own groups."""
    db = await Database.open(load(database_url=database, topic_prefix="p-"))
    await db.save_images([image_row("a"), image_row("b"), image_row("c")])
    groups = {"a": "p-store", "b": "p-predict.default", "c": "predict.default"}
    await db.save(
        [],
        [dead_letter(image_id, offset=n, group=group) for n, (image_id, group) in enumerate(groups.items())],
    )
    states = {image_id: state.state for image_id in groups if (state := await db.state(image_id))}
    assert states == {"a": "dead_lettered", "b": "dead_lettered", "c": "accepted"}
    await db.close()


async def test_accounting(db: Database) -> None:
    """Accounting lists every result and dead letter of the ids asked for, and no other."""
    await db.save([prediction("run-1"), prediction("run-1", deployment="canary"), prediction("x")], [])
    await db.save([], [dead_letter("run-2"), dead_letter(None, offset=9)])
    by_prefix = await db.accounting("run-")
    assert {(row.image_id, row.deployment) for row in by_prefix.results} == {
        ("run-1", "default"),
        ("run-1", "canary"),
    }
    assert [(row.image_id, row.group, row.offset, row.redriven) for row in by_prefix.dead_letters] == [
        ("run-2", GROUP, 7, False)
    ]
    by_list = await db.accounting(image_ids=["x", "run-2"])
    assert [row.image_id for row in by_list.results] == ["x"]
    assert len(by_list.dead_letters) == 1
    assert len((await db.accounting()).dead_letters) == 2


# Outages


async def test_a_killed_connection_is_a_dependency_error_and_the_next_call_works(
    db: Database, database: str
) -> None:
    """An administrator's disconnect fails the call that is under way, and only that one."""
    blocker = await asyncpg.connect(database)
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE predictions IN ACCESS EXCLUSIVE MODE")
        saving = asyncio.ensure_future(db.save([prediction("a")], []))

        async def kill() -> int:
            return int(
                await blocker.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            )

        await eventually(kill, 10.0)
        with pytest.raises(DependencyError, match="administrator command"):
            await saving
    await blocker.close()
    assert await db.save([prediction("a")], []) == Saved(stored=1)


async def test_a_serialization_fault_or_full_server_is_a_dependency_error(db: Database) -> None:
    """Every SQLSTATE that may pass with time is retryable, and those that blame the data are not."""
    retryable = [
        "40001",
        "40P01",
        "57P01",
        "57P02",
        "57P03",
        "57014",
        "08006",
        "08003",
        "53300",
        "53100",
        "25006",
        "42P01",
    ]
    refused = ["22021", "22P05", "22003", "23505", "23514", "54000"]
    for state in retryable + refused:
        with pytest.raises(DependencyError if state in retryable else StorageRefusedError, match=state):
            async with db._pool.transaction() as connection:
                await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$")


async def test_a_connection_to_a_replica_is_not_kept(database: str) -> None:
    """After a failover no connection to a server that only reads is used a second time."""
    name = database.partition("?")[0].rpartition("/")[2]
    await services.execute(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    db = await Database.open(load(database_url=database, database_pool_size=1))
    await services.execute(
        database,
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {name} RESET default_transaction_read_only",
    )
    with pytest.raises(DependencyError, match="25006"):
        await db.save([prediction("a")], [])
    assert await db.save([prediction("a")], []) == Saved(stored=1)
    await db.close()


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_restarted_server_needs_no_restart_of_ours(own_postgres: EmbeddedPostgres, how: str) -> None:
    """After the server is back, what was acknowledged is there and calls work again."""
    await migrate(own_postgres.dsn)
    db = await Database.open(load(database_url=own_postgres.dsn))
    await db.save([prediction("before")], [])
    await asyncio.to_thread(getattr(own_postgres, how))
    with pytest.raises(DependencyError):
        await db.save([prediction("during")], [])
    with pytest.raises(DependencyError):
        await db.ping(5.0)
    await asyncio.to_thread(own_postgres.start)

    async def works() -> bool:
        try:
            return (await db.save([prediction("during")], [])).stored == 1
        except DependencyError:
            return False

    await eventually(works, 20.0)
    assert [row.prediction.image_id for row in await db.recent_predictions(9)] == ["during", "before"]
    await db.close()


async def test_a_frozen_server_is_noticed(
    own_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is there and says nothing fails a call in bounded time."""
    monkeypatch.setattr(postgres, "STATEMENT_SECONDS", 1.0)
    monkeypatch.setattr(postgres, "CONNECT_SECONDS", 1.0)
    await migrate(own_postgres.dsn)
    db = await Database.open(load(database_url=own_postgres.dsn))
    own = await asyncpg.connect(own_postgres.dsn)
    clients = (
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    backends = [row["pid"] for row in await own.fetch(clients)]
    assert own_postgres.pid is not None
    frozen = [own_postgres.pid, *backends]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DependencyError):
            await db.save([prediction("a")], [])
        with pytest.raises(DependencyError):
            await db.ping(0.5)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert await db.save([prediction("a")], []) == Saved(stored=1)
    await own.close()
    await db.close()


async def test_a_cancelled_save_leaves_nothing(db: Database, database: str) -> None:
    """Cancelling a save, as a shutdown does, rolls it back and leaves the pool whole."""
    blocker = await asyncpg.connect(database)
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE dead_letters IN ACCESS EXCLUSIVE MODE")
        saving = asyncio.ensure_future(db.save([prediction("a")], [dead_letter("b")]))
        await asyncio.sleep(0.2)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
    await blocker.close()
    assert await count(database, "predictions") == 0
    assert await db.save([prediction("a")], [dead_letter("b")]) == Saved(stored=1, dead_letters=1)


# Deletion


async def everything(
    db: Database, image_id: str
) -> tuple[ImageRow | None, list[Prediction], list[DeadLetter]]:
    return (
        await db.image(image_id),
        [stored.prediction for stored in await db.predictions(image_id)],
        [stored.letter for stored in await db.dead_letters(image_id=image_id, open_only=False)],
    )


async def test_what_is_deleted_does_not_come_back(db: Database) -> None:
    """Late records of a deleted image are dropped and counted, even a prediction made after the deletion."""
    await db.save_images([image_row("a")])
    await db.save([prediction("a"), prediction("other")], [dead_letter("a")])
    assert await db.delete_image("a") == []
    assert await db.delete_image("a") is None
    made_later = prediction("a", time=datetime.now(UTC) + timedelta(hours=1), deployment="canary")
    assert await db.save([prediction("a"), made_later], [dead_letter("a", offset=99)]) == Saved(deleted=2)
    assert await db.save_images([image_row("a")]) == [SavedImage("deleted")]
    assert await everything(db, "a") == (None, [], [])
    assert await db.state("a") is None
    assert await db.state("other") is not None


async def test_a_deleted_id_may_be_used_again(db: Database) -> None:
    """A picture published after the deletion, at another place, is stored as any other."""
    await db.save_images([image_row("a")])
    await db.delete_image("a")
    later = datetime.now(UTC) + timedelta(seconds=1)
    row = image_row("a", SHA_B, published_at=later, offset=8)
    result = prediction("a", time=later, receipt=Receipt(topic="images.bulk.v1", partition=0, offset=8))
    letter = dead_letter("a", timestamp_ms=int(later.timestamp() * 1000))
    assert await db.save_images([row]) == [SavedImage("stored")]
    assert await db.save([result], [letter]) == Saved(stored=1, dead_letters=1)


async def test_a_deletion_misses_nothing_that_is_being_written(db: Database, database: str) -> None:
    """A deletion waits for writers under way, so that a row they commit meanwhile does not survive it."""
    await db.save_images([image_row("a")])
    blocker = await asyncpg.connect(database)
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE dead_letters IN ACCESS EXCLUSIVE MODE")
        saving = asyncio.ensure_future(db.save([prediction("a")], [dead_letter("b")]))
        await asyncio.sleep(0.2)
        deleting = asyncio.ensure_future(db.delete_image("a"))
        await asyncio.sleep(0.2)
        assert not deleting.done()
    await blocker.close()
    assert await saving == Saved(stored=1, dead_letters=1)
    assert await deleting == []
    assert await everything(db, "a") == (None, [], [])
