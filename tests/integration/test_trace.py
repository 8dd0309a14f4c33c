"""The way of one picture, told by a real PostgreSQL and a real Kafka."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline.broker import Publisher
from pipeline.connections import client_options
from pipeline.database import Database
from pipeline.deadletters import encode_dead_letter
from pipeline.events import ImageEvent, Prediction, Receipt, encode_image, encode_prediction
from pipeline.results import ImageRow
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, PREDICTIONS
from pipeline.trace import Step, Trace, trace
from tests.support.gateway import installed, serving
from tests.support.samples import NOW, dead_letter, image_row, prediction

RECEIPT = Receipt(
    topic="images.bulk.v1", partition=0, offset=7, width=640, height=480, batch_id="b-1", batch_size=3,
    batch_cut="idle", device="cpu", queue_seconds=0.5, batch_wait_seconds=0.2, decode_seconds=0.1,
    forward_seconds=0.4,
)  # fmt: skip


@pytest.fixture
async def settings(kafka: str, topic_prefix: str, database: str, tmp_path: Path) -> Settings:
    return await installed(kafka, topic_prefix, database, tmp_path)


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    opened = await Database.open(settings)
    yield opened
    await opened.close()


@pytest.fixture
async def publisher(settings: Settings) -> AsyncIterator[Publisher]:
    opened = Publisher(settings, client_id="test")
    await opened.start()
    yield opened
    await opened.stop()


async def traced(settings: Settings, db: Database, image_id: str) -> Trace:
    found = await trace(settings, db, image_id)
    assert found is not None
    return found


def steps_of(found: Trace, deployment: str = "default") -> Sequence[Step]:
    return next(one.steps for one in found.deployments if one.deployment == deployment)


def names(steps: Sequence[Step]) -> list[str]:
    return [step.step for step in steps]


async def publish(settings: Settings, publisher: Publisher, db: Database, image_id: str) -> ImageRow:
    """Publish a picture and store its row, as `archive` does."""
    topic = settings.topic(IMAGES_BULK.name)
    place = await publisher.publish(topic, encode_image(ImageEvent(id=image_id, data=b"x")))
    moment = datetime.fromtimestamp(place.timestamp_ms / 1000, NOW.tzinfo)
    row = image_row(image_id, topic=topic, offset=place.offset, published_at=moment)
    await db.save_images([row])
    return row


async def commit(settings: Settings, group: str, offset: int) -> None:
    """Have a group go on from an offset of the bulk lane."""
    consumer = AIOKafkaConsumer(**client_options(settings), group_id=group, enable_auto_commit=False)
    await consumer.start()
    place = TopicPartition(settings.topic(IMAGES_BULK.name), 0)
    consumer.assign([place])
    await consumer.commit({place: offset})
    await consumer.stop()


async def test_a_prediction_tells_its_way(settings: Settings, db: Database) -> None:
    """Each station has its moment and its length, counted back from the outcome, and the batch its company."""
    ridden = [
        prediction(name, receipt=RECEIPT, deployment=deployment)
        for name, deployment in (("dog", "default"), ("cat", "default"), ("cow", "default"), ("ape", "other"))
    ]
    again = msgspec.structs.replace(RECEIPT, batch_id="b-1.2", batch_size=1)  # run again, without the others
    pig = prediction("pig", receipt=again)
    published = NOW + timedelta(milliseconds=12)
    await db.save([*ridden, pig], [], [None, published, None, None, None])
    await db.save_images([image_row("cat", published_at=NOW - timedelta(seconds=2))])
    found = await traced(settings, db, "cat")
    (deployment,) = found.deployments
    assert (found.unknown, deployment.deployment, deployment.state) == (None, "default", "predicted")
    assert found.image.published_at == NOW - timedelta(seconds=2)
    assert found.image.stored_at is not None

    def at(seconds: float) -> datetime:
        return NOW - timedelta(seconds=seconds)

    steps = deployment.steps
    assert [(step.step, step.at, step.seconds) for step in steps[:5]] == [
        ("received", at(1.0), 1.0), ("queued", at(0.7), 0.3), ("decoded", at(0.6), 0.1),
        ("batched", at(0.4), 0.2), ("forwarded", at(0.0), 0.4),
    ]  # fmt: skip
    assert [(step.step, step.at, step.seconds) for step in steps[5:6]] == [("published", published, 0.012)]
    assert names(steps[6:]) == ["stored"]
    assert found.image.stored_at is not None
    batch = steps[3].batch
    assert batch is not None
    assert (batch.id, batch.size, batch.cut, batch.companions) == ("b-1", 3, "idle", ("cow", "dog"))
    assert steps[3].detail == "with 2 others, cut because the device was free"
    assert steps[4].detail == "builtin:fingerprint 1 on cpu"
    batched = next(step for step in steps_of(await traced(settings, db, "pig")) if step.step == "batched")
    assert batched.detail == "alone, in a part of batch b-1, which was cut because the device was free"
    assert batched.batch is not None
    assert (batched.batch.size, batched.batch.companions) == (1, ())


async def test_a_receipt_of_an_older_worker(settings: Settings, db: Database) -> None:
    """Without the wait for the batch both waits are told together, and the order stays."""
    old = msgspec.structs.replace(RECEIPT, batch_wait_seconds=None, batch_size=1)
    bare = Receipt(topic="images.bulk.v1", partition=0, offset=7)
    late = prediction("ape", receipt=bare, outcome="expired", reason="past its deadline")
    await db.save([prediction("cat", receipt=old), prediction("dog", receipt=bare), late], [])
    steps = steps_of(await traced(settings, db, "cat"))
    assert names(steps) == ["received", "queued", "decoded", "batched", "forwarded", "stored"]
    assert [steps[1].seconds, steps[1].at, steps[2].seconds, steps[2].at] == [0.5, None, 0.1, None]
    assert steps[3].detail.startswith("alone")
    assert names(steps_of(await traced(settings, db, "dog")))[-1] == "stored"
    assert names(steps_of(await traced(settings, db, "ape"))) == ["expired", "stored"]


async def test_how_far_an_expired_picture_came(settings: Settings, db: Database) -> None:
    """One that was decoded says how long it waited before and after that; one that was not, how long at all."""
    place: dict[str, Any] = {"topic": "images.bulk.v1", "partition": 0, "offset": 7, "queue_seconds": 0.5}
    waited = Receipt(**place)
    decoded = Receipt(**place, batch_wait_seconds=0.2, decode_seconds=0.1, width=640, height=480)
    expired: dict[str, Any] = {"outcome": "expired", "reason": "past its deadline"}
    await db.save(
        [prediction("cat", receipt=waited, **expired), prediction("dog", receipt=decoded, **expired)], []
    )
    await db.save_images([image_row("dog", published_at=NOW - timedelta(seconds=1))])
    steps = steps_of(await traced(settings, db, "cat"))
    half = NOW - timedelta(seconds=0.5)
    assert [(step.step, step.at, step.seconds) for step in steps[:-1]] == [
        ("received", half, None), ("queued", NOW, 0.5), ("expired", NOW, None),
    ]  # fmt: skip
    steps = steps_of(await traced(settings, db, "dog"))
    assert [(step.step, step.seconds, step.detail) for step in steps[:-1]] == [
        ("received", 0.4, "from images.bulk.v1[0] at 7"), ("queued", 0.3, "before the decode"),
        ("decoded", 0.1, "640 x 480"), ("queued", 0.2, "for a batch"), ("expired", None, "past its deadline"),
    ]  # fmt: skip
    assert [steps[2].at, steps[-1].step] == [NOW - timedelta(seconds=0.2), "stored"]


async def test_every_version_is_told(settings: Settings, db: Database) -> None:
    """A picture that two versions of the models have seen has both ways in its trace."""
    new = prediction("cat", id="newer", receipt=RECEIPT, revision=4, time=NOW + timedelta(days=1))
    await db.save([prediction("cat", receipt=RECEIPT), new], [])
    forwarded = [step for step in steps_of(await traced(settings, db, "cat")) if step.step == "forwarded"]
    assert [step.detail.endswith(", revision 4") for step in forwarded] == [False, True]


async def test_failures_and_what_came_after(settings: Settings, db: Database) -> None:
    """Dead letters, their redrive and the prediction after it are one way, in order; another deployment its own."""
    group = settings.group("predict")
    failed = dead_letter("cat", group=group, failed_at=NOW - timedelta(minutes=1))
    late = prediction("cat", deployment="wildlife", outcome="expired", reason="past its deadline")
    await db.save([prediction("cat", receipt=RECEIPT), late], [failed])
    (stored,) = await db.dead_letters(image_id="cat")
    await db.mark_redriven(stored.id)
    found = await traced(settings, db, "cat")
    assert [(one.deployment, one.state) for one in found.deployments] == [
        ("default", "predicted"), ("wildlife", "expired"),
    ]  # fmt: skip
    steps = steps_of(found)
    assert names(steps)[:2] == ["dead_lettered", "received"]
    assert {"redriven", "forwarded", "stored"} <= set(names(steps))
    assert (steps[0].detail, steps[0].dead_letter_id) == ("undecodable_image: it is text", stored.id)
    assert names(steps_of(found, "wildlife")) == ["expired", "stored"]


async def test_a_picture_that_waits(settings: Settings, db: Database, publisher: Publisher) -> None:
    """Each deployment without an outcome says how many records are before the picture."""
    for number in range(4):
        await publish(settings, publisher, db, f"image-{number}")
    await commit(settings, f"{settings.topic_prefix}predict.wildlife", 1)
    found = await traced(settings, db, "image-3")
    lane = settings.topic(IMAGES_BULK.name)
    assert [(one.deployment, one.state, names(one.steps)) for one in found.deployments] == [
        ("default", "accepted", ["waiting"]), ("wildlife", "accepted", ["waiting"]),
    ]  # fmt: skip
    unread = f"3 records before it in {lane}[0], of which this deployment has read nothing yet"
    assert steps_of(found)[0].detail == unread
    assert steps_of(found, "wildlife")[0].detail == f"2 records before it in {lane}[0]"


async def test_a_trace_of_what_is_only_on_kafka(
    settings: Settings, db: Database, publisher: Publisher
) -> None:
    """An outcome that `store` has not written yet is told from its topic, whatever lies around it."""
    cat, dog = [await publish(settings, publisher, db, name) for name in ("cat", "dog")]
    await publish(settings, publisher, db, "ape")
    await commit(settings, settings.group("predict"), 3)
    made: Prediction = prediction("cat", receipt=RECEIPT, time=cat.published_at + timedelta(seconds=3))
    outputs = settings.topic(PREDICTIONS.name)
    for outgoing in (encode_prediction(prediction("cow")), encode_prediction(made)):
        await publisher.publish(outputs, outgoing)
    garbage = msgspec.structs.replace(encode_prediction(made), value=b"garbage")
    await publisher.publish(outputs, garbage)
    letter = dead_letter("dog", group=settings.group("predict"), failed_at=dog.published_at)
    await publisher.publish(settings.topic(DEAD_LETTERS.name), encode_dead_letter(letter))

    steps = steps_of(await traced(settings, db, "cat"))
    assert names(steps) == ["received", "queued", "decoded", "batched", "forwarded", "published", "waiting"]
    assert steps[0].seconds == 2.0
    # Its worker's clock is ahead of the broker's, who stamped it: it counts as published when it was made.
    assert (steps[5].at, steps[5].seconds) == (made.time, 0.0)
    assert "for store" in steps[-1].detail
    (only,) = steps_of(await traced(settings, db, "dog"))
    assert (only.step, only.detail) == ("dead_lettered", "undecodable_image: it is text; not stored yet")
    (only,) = steps_of(await traced(settings, db, "ape"))
    assert only.step == "passed"


async def test_unknown_and_deleted(settings: Settings, db: Database) -> None:
    """Nothing is said of what nobody knows; of a deleted picture only that."""
    assert await trace(settings, db, "nobody") is None
    await db.save([prediction("cat")], [])
    await db.delete_image("cat")
    found = await traced(settings, db, "cat")
    assert found.deployments == ()
    assert found.image.deleted_at is not None


async def test_kafka_is_not_needed(settings: Settings, db: Database) -> None:
    """While Kafka is away what is stored is told, and what is missing is said."""
    await db.save_images([image_row("cat")])
    away = settings.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:9"})
    found = await traced(away, db, "cat")
    assert found.unknown is not None
    assert [one.state for one in found.deployments] == ["accepted"]


async def test_the_gateway_tells_it_too(settings: Settings, db: Database) -> None:
    """`GET /v1/images/{id}/trace` returns the same document, or 404."""
    await db.save([prediction("a/b", receipt=RECEIPT)], [])
    async with serving(settings) as gateway:
        response = await gateway.http.get("/v1/images/a%2Fb/trace")
        assert response.status_code == 200
        answer: dict[str, Any] = response.json()
        assert msgspec.convert(answer, Trace) == await traced(settings, db, "a/b")
        assert (await gateway.http.get("/v1/images/nobody/trace")).status_code == 404
