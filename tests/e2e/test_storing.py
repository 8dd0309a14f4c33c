"""`store` and `archive` as real processes: what they keep, what they refuse, what they outlive.

Records are published straight to the topics the steps read, so that storing is proved apart from inference.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from millrace.postgres import EmbeddedPostgres
from pipeline import admin
from pipeline.broker import Publisher
from pipeline.database import Database, migrate
from pipeline.deadletters import encode_dead_letter
from pipeline.errors import DependencyError
from pipeline.events import ImageEvent, ModelResult, Outgoing, encode_image, encode_prediction
from pipeline.objects import ObjectStore, image_key
from pipeline.settings import Settings, load
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, IMAGES_REALTIME, PREDICTIONS
from tests.support.eventually import eventually
from tests.support.samples import dead_letter, embedding, prediction
from tests.support.workers import WorkerProcess, Workers, workers

STORE = ("-m", "agents", "store")
ARCHIVE = ("-m", "agents", "archive")

pytestmark = pytest.mark.timeout(240)


@dataclass
class Installation:
    """Topics, a database and an object store of the test's own."""

    settings: Settings
    environment: dict[str, str]
    database: Database
    objects: ObjectStore
    publisher: Publisher

    async def publish(self, topic: str, *outgoing: Outgoing) -> None:
        """Publish in order, all at once."""
        name = self.settings.topic(topic)
        await asyncio.gather(*(self.publisher.publish(name, one) for one in outgoing))

    async def caught_up(self, step: str) -> None:
        """Wait until the step has committed everything there is."""

        async def done() -> bool:
            rows = await admin.lag(self.settings, [self.settings.group(step)])
            return bool(rows) and sum(row.lag for row in rows) == 0

        await eventually(done, 90.0)


@pytest.fixture
async def made(
    request: pytest.FixtureRequest,
    kafka: str,
    topic_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Installation]:
    if "own_postgres" in request.fixturenames:
        dsn = request.getfixturevalue("own_postgres").dsn
        await migrate(dsn)
    else:
        dsn = request.getfixturevalue("database")
    environment = {
        "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "MILLRACE_TOPIC_PREFIX": topic_prefix,
        "MILLRACE_TOPIC_PARTITIONS": "3",
        "MILLRACE_SESSION_TIMEOUT_SECONDS": "4",
        "MILLRACE_SHUTDOWN_GRACE_SECONDS": "15",
        "MILLRACE_DATABASE_URL": dsn,
        "MILLRACE_OBJECT_STORE_URL": str(tmp_path / "objects"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load()
    await admin.apply_topics(settings)
    publisher = Publisher(settings, client_id="test")
    await publisher.start()
    database = await Database.open(settings)
    objects = ObjectStore.open(settings)
    yield Installation(settings, environment, database, objects, publisher)
    await publisher.stop()
    await database.close()
    objects.close()


@pytest.fixture
def crew(made: Installation, tmp_path: Path) -> Iterator[Workers]:
    with workers(made.environment, tmp_path) as started:
        yield started


async def ready(worker: WorkerProcess) -> WorkerProcess:
    return await asyncio.to_thread(worker.wait_ready)


async def waiting_for_database(worker: WorkerProcess) -> None:
    """Return when the worker's metrics say that it waits."""

    async def told() -> bool:
        return 'dependency="database"' in (await asyncio.to_thread(worker.get, "/metrics"))[1]

    await eventually(told, 30.0)


async def test_every_record_ends_where_it_belongs(made: Installation, crew: Workers) -> None:
    """Good predictions are stored, each bad one is exactly one dead letter, and no neighbour is harmed."""
    poison = {
        "nul-text": prediction("nul-text", reason="\x00"),
        "nul-json": prediction(
            "nul-json", models=(ModelResult(model="\x00", version="1", digest="d", task="score"),)
        ),
        "lane": prediction("lane", lane="express"),
        "vector": prediction("vector", models=(msgspec.structs.replace(embedding(1.0), embedding="?"),)),
    }
    good = [prediction(f"good-{number}") for number in range(60)]
    mixed = [encode_prediction(one) for one in good]
    for place, one in enumerate(poison.values()):
        mixed.insert(place * 12, encode_prediction(one))
    undecodable = Outgoing(b"garbage", b"{not json", ())
    other_group = encode_prediction(prediction("elsewhere"))
    addressed = Outgoing(
        other_group.key, other_group.value, (*other_group.headers, ("millrace-only-group", b"another"))
    )
    await made.publish(PREDICTIONS.name, *mixed, undecodable, addressed, *map(encode_prediction, good[:20]))
    odd_letter = Outgoing(
        b"\x00",
        b"\x00",
        (("millrace-group", b"g" * 9000), ("millrace-image-id", b"i" * 9000), ("x", b"\xff")),
    )
    letters = [
        encode_dead_letter(dead_letter("letter")),
        odd_letter,
        Outgoing(None, b"not a dead letter", ()),
    ]
    await made.publish(DEAD_LETTERS.name, *letters, *letters[:1])
    await ready(crew.start(*STORE))

    async def all_there() -> bool:
        return len(await made.database.dead_letters(limit=100)) == len(poison) + 1 + 3

    await eventually(all_there, 60.0)
    await made.caught_up("store")
    accounting = await made.database.accounting()
    assert sorted(row.image_id for row in accounting.results) == sorted(one.image_id for one in good)
    own = {
        row.image_id: row.code for row in accounting.dead_letters if row.group == made.settings.group("store")
    }
    assert own == {**dict.fromkeys(poison, "storage_refused"), "garbage": "contract"}
    assert len(accounting.dead_letters) == len(poison) + 1 + 3
    for image_id in poison:
        state = await made.database.state(image_id)
        assert state is not None
        assert (state.state, state.code) == ("dead_lettered", "storage_refused")


async def test_store_killed_again_and_again_stores_everything_once(made: Installation, crew: Workers) -> None:
    """SIGKILL of `store` in the middle of its work, twice, with a second replica: nothing lost, nothing twice."""
    total = 6000
    replicas = [crew.start(*STORE, MILLRACE_STORE_BATCH_RECORDS="20") for _ in range(2)]
    await asyncio.gather(*map(ready, replicas))

    async def feed() -> None:
        for start in range(0, total, 200):
            await made.publish(
                PREDICTIONS.name,
                *(encode_prediction(prediction(f"i{number}")) for number in range(start, start + 200)),
            )

    feeding = asyncio.create_task(feed())
    for number in range(2):
        already = len(await made.database.recent_predictions(total))

        async def moved(already: int = already) -> bool:
            return len(await made.database.recent_predictions(total)) > already + 200

        await eventually(moved, 60.0)
        replicas[number].kill()
        replicas[number] = crew.start(*STORE, MILLRACE_STORE_BATCH_RECORDS="20")
    await feeding

    async def complete() -> bool:
        return len(await made.database.recent_predictions(total + 1)) == total

    await eventually(complete, 90.0)
    await made.caught_up("store")
    accounting = await made.database.accounting()
    assert len({row.image_id for row in accounting.results}) == len(accounting.results) == total
    assert accounting.dead_letters == ()


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_steps_outlive_the_database(
    own_postgres: EmbeddedPostgres, made: Installation, crew: Workers, how: str
) -> None:
    """PostgreSQL killed or stopped under load: both steps wait and go on when it is back, never restarted."""
    steps = [crew.start(*STORE), crew.start(*ARCHIVE)]
    await asyncio.gather(*map(ready, steps))

    async def publish(first: int, last: int) -> None:
        numbers = range(first, last)
        await made.publish(PREDICTIONS.name, *(encode_prediction(prediction(f"i{n}")) for n in numbers))
        await made.publish(
            IMAGES_BULK.name, *(encode_image(ImageEvent(id=f"i{n}", data=b"%d" % n)) for n in numbers)
        )

    async def stored() -> int:
        try:
            rows = await made.database.recent_predictions(10_000)
            images = [await made.database.image(row.prediction.image_id) for row in rows]
        except DependencyError:
            return 0
        return len([image for image in images if image is not None and image.object_key is not None])

    async def reached(count: int) -> None:
        async def check() -> bool:
            return await stored() == count

        await eventually(check, 90.0)

    await publish(0, 300)
    await reached(300)
    during = asyncio.create_task(publish(300, 600))
    await asyncio.to_thread(getattr(own_postgres, how))
    await during
    await publish(600, 700)
    for step in steps:
        assert step.get("/livez")[0] == 200
        await waiting_for_database(step)
    await asyncio.to_thread(own_postgres.start)
    await reached(700)
    for name in ("store", "archive"):
        await made.caught_up(name)
    assert [step.exit_code for step in steps] == [None, None]


async def test_pictures_are_kept_once(made: Installation, crew: Workers) -> None:
    """Inline pictures get a row and an object, others a row or nothing; the first picture of an id stays."""
    inline = ImageEvent(id="../../inline", data=b"picture", content_type="image/png", source="test")
    by_reference = ImageEvent(id="reference", dataref="uploads/x.jpg")
    query = ImageEvent(id="query", data=b"query", purpose="query")
    elsewhere = ImageEvent(id="elsewhere", data=b"x", only_group="predict.default")
    await made.publish(IMAGES_REALTIME.name, encode_image(inline))
    worker = await ready(crew.start(*ARCHIVE))
    await made.caught_up("archive")
    unreadable = Outgoing(b"k", b"x", (("ce_type", b"another.type.v1"),))
    bare = Outgoing(None, b"bare", ())
    again = [encode_image(ImageEvent(id="../../inline", data=b"another picture")), encode_image(inline)]
    others = [encode_image(event) for event in (by_reference, query, elsewhere)]
    await made.publish(IMAGES_BULK.name, *again, *others, unreadable, bare)
    await made.caught_up("archive")
    row = await made.database.image("../../inline")
    assert row is not None
    assert row.object_key == image_key("../../inline", row.sha256)
    assert await made.objects.get(row.object_key, 100) == b"picture"
    assert (row.lane, row.content_type, row.source) == ("realtime", "image/png", "test")
    reference = await made.database.image("reference")
    assert reference is not None
    assert reference.object_key == "uploads/x.jpg"
    assert [await made.database.image(name) for name in ("query", "elsewhere")] == [None, None]
    kept = [item async for page in made.objects.list("images") for item in page]
    assert len(kept) == 2  # the inline picture and the bare one
    assert 'millrace_duplicates_total{kind="conflict"} 1.0' in worker.get("/metrics")[1]
    assert await made.database.dead_letters() == []


async def test_archive_killed_again_and_again_keeps_everything(made: Installation, crew: Workers) -> None:
    """SIGKILL of `archive` in the middle of its work: every picture ends with its row and its object."""
    total = 1500
    for start in range(0, total, 100):
        events_ = (
            ImageEvent(id=f"i{number}", data=b"%d" % number * 2000) for number in range(start, start + 100)
        )
        await made.publish(IMAGES_BULK.name, *(encode_image(event) for event in events_))
    for _ in range(3):
        worker = crew.start(*ARCHIVE)

        async def working() -> bool:
            return any([page async for page in made.objects.list("images")])

        await eventually(working, 60.0)
        await asyncio.sleep(0.3)
        worker.kill()
    crew.start(*ARCHIVE)
    await made.caught_up("archive")
    for number in range(total):
        row = await made.database.image(f"i{number}")
        assert row is not None
        assert row.object_key is not None
        assert await made.objects.get(row.object_key, 10_000) == b"%d" % number * 2000


async def test_steps_end_within_the_grace_period_while_the_database_is_away(
    own_postgres: EmbeddedPostgres, made: Installation, crew: Workers
) -> None:
    """SIGTERM while a write waits for the database ends the process in time, and the record is kept later."""
    step = await ready(crew.start(*STORE, MILLRACE_SHUTDOWN_GRACE_SECONDS="5"))
    await asyncio.to_thread(own_postgres.kill)
    await made.publish(PREDICTIONS.name, encode_prediction(prediction("a")))
    await waiting_for_database(step)
    _, seconds = await asyncio.to_thread(step.terminate)
    assert seconds < 6.0
    await asyncio.to_thread(own_postgres.start)
    crew.start(*STORE)

    async def stored() -> bool:
        try:
            return await made.database.state("a") is not None
        except DependencyError:
            return False

    await eventually(stored, 60.0)
