"""Topics that change under the spine: outputs that are missing or too small, and records that retention took."""

import asyncio
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from loadtest import faults
from pipeline import admin
from pipeline.broker import Place
from pipeline.events import ImageEvent
from pipeline.objects import ObjectStore
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, IMAGES_REALTIME, MODELS, PREDICTIONS
from tests.support import pictures
from tests.support.eventually import eventually
from tests.support.spine import Spine, environment, installation, picture

pytestmark = pytest.mark.timeout(180)


async def test_results_that_cannot_be_produced(
    kafka: str, database: str, topic_prefix: str, tmp_path: Path
) -> None:
    """Without its output topic `predict` waits; a result that the topic refuses is a dead letter; both pass."""
    settings = environment(kafka, database, tmp_path / "objects", topic_prefix)
    inputs = (IMAGES_REALTIME, IMAGES_BULK, DEAD_LETTERS, MODELS)
    with installation(settings, tmp_path, inputs) as made:
        async with made.connect() as spine:
            (worker,) = await spine.start("predict")
            await spine.send_many("early", 20)

            def waits() -> bool:
                return worker.metric("millrace_retries_total", dependency="broker") > 0

            await eventually(waits, 60)
            assert await spine.lag("predict") == 20
            assert (worker.get("/livez")[0], worker.exit_code) == (200, None)
            await admin.apply_topics(made.settings)
            await spine.start("store")
            await spine.settled("predict", "store", whole=True)

            predictions = made.settings.topic(PREDICTIONS.name)
            await configure(kafka, predictions, **{"max.message.bytes": "300"})
            await spine.send_many("refused", 5)
            refused = {f"refused-{number}" for number in range(5)}
            await spine.wait_stored(25)
            await configure(kafka, predictions, **PREDICTIONS.config())
            await spine.send_many("late", 5)
            await spine.settled("predict", "store", dead_letters=refused, whole=True)
            assert set((await spine.codes()).values()) == {"record_too_large"}


async def test_retention_took_what_nobody_read(spine: Spine) -> None:
    """Records that retention deleted while a group was away are counted and logged, and the rest is predicted."""
    topic = spine.settings.topic(IMAGES_BULK.name)
    await commit_ends(spine, spine.settings.group("predict"), topic)
    places = [
        await spine.send(picture(f"away-{number}", number), key=b"one partition") for number in range(30)
    ]
    await delete_before(spine, topic, places[12].partition, places[12].offset)
    for number in range(12):
        del spine.journal.places[f"away-{number}"]
    worker, _, _ = await spine.start("predict", "store", "archive")
    await spine.settled(whole=True)
    assert worker.metric("millrace_offsets_expired_total", step="predict", topic=topic) == 12
    assert "retention deleted records this group had not read" in worker.log()


async def test_retention_overtakes_a_worker(spine: Spine) -> None:
    """Records that retention deletes before a stalled worker has read them are counted and logged by it."""
    topic = spine.settings.topic(IMAGES_BULK.name)
    limits = {"MILLRACE_MAX_OPEN_RECORDS": "20", "MILLRACE_MISSING_OBJECT_GRACE_SECONDS": "600"}
    worker, _ = await spine.start("predict", "store", **limits)

    async def send(first: int, count: int) -> Place:
        events = [ImageEvent(id=f"late-{n}", dataref="late/picture.jpg") for n in range(first, first + count)]
        return [await spine.send(event, key=b"one partition") for event in events][-1]

    def is_paused() -> bool:
        return worker.metric("millrace_lane_paused", lane="bulk") == 1

    await send(0, 40)
    await eventually(is_paused, 60)
    # Something of this may have been fetched ahead, but not what follows: the lane is at its budget.
    await send(40, 5)
    await asyncio.sleep(1)
    last = await send(45, 30)
    await delete_before(spine, topic, last.partition, last.offset)
    objects = ObjectStore.open(spine.settings)
    await objects.put("late/picture.jpg", pictures.jpeg())
    objects.close()
    await spine.wait_caught_up("predict", "store")
    seen = {row.image_id for row in (await spine.stored()).results}
    taken = [image_id for image_id in spine.journal.places if image_id not in seen]
    assert "late-74" in seen
    assert len(taken) >= 29

    def counted() -> bool:
        return worker.metric("millrace_offsets_expired_total", step="predict", topic=topic) == len(taken)

    await eventually(counted, 30)
    assert "retention deleted records this group had not read" in worker.log()
    for image_id in taken:
        del spine.journal.places[image_id]
    await spine.settled("predict", "store", whole=True)


async def test_a_topic_is_created_again(spine: Spine) -> None:
    """What a topic holds after it was deleted and created again is predicted, whatever was read of the old one."""
    running = await spine.start("predict", "store", "archive")
    for number in range(20):
        await spine.send(picture(f"old-{number}", number), key=b"one partition")
    await spine.settled()
    client = AIOKafkaAdminClient(bootstrap_servers=spine.settings.resolved_kafka)
    await client.start()
    try:
        await client.delete_topics([spine.settings.topic(IMAGES_BULK.name)])
    finally:
        await client.close()
    await admin.apply_topics(spine.settings)
    for number in range(5):
        await spine.send(picture(f"new-{number}", number), key=b"one partition")

    async def stored() -> bool:
        for worker in running:
            if worker.exit_code is not None:
                assert worker.exit_code == 70, worker.log()[-2000:]
                worker.start()  # as its supervisor does
        return len(faults.seen_ids(spine.settings, await spine.stored())) == 25

    await eventually(stored, 90)
    await spine.settled()


async def configure(bootstrap_servers: str, topic: str, **config: str) -> None:
    """Set a topic's configuration, and nothing but this."""
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await client.start()
    try:
        await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, config)])
    finally:
        await client.close()


async def delete_before(spine: Spine, topic: str, partition: int, offset: int) -> None:
    """Delete a partition's records before an offset, as retention does."""
    client = AIOKafkaAdminClient(bootstrap_servers=spine.settings.resolved_kafka)
    await client.start()
    try:
        await client.delete_records({TopicPartition(topic, partition): RecordsToDelete(before_offset=offset)})
    finally:
        await client.close()


async def commit_ends(spine: Spine, group: str, topic: str) -> None:
    """Commit the present ends of a topic for a group, as a worker that has read everything leaves them."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=spine.settings.resolved_kafka, group_id=group, enable_auto_commit=False
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for number in range(spine.settings.topic_partitions)]
        consumer.assign(partitions)
        await consumer.commit(await consumer.end_offsets(partitions))
    finally:
        await consumer.stop()
