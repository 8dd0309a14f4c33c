"""The publisher and the readers against a real broker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import OutOfOrderSequenceNumber

from millrace.kafka import EmbeddedKafka
from pipeline import broker, readers
from pipeline.broker import LiveReader, Place, Publisher
from pipeline.errors import DependencyError, RecordTooLargeError
from pipeline.events import Outgoing, Record
from pipeline.settings import Settings, load
from pipeline.topics import MAX_IMAGE_RECORD_BYTES, Topic
from tests.support.eventually import eventually

pytestmark = pytest.mark.asyncio

PLAIN = Topic(
    name="plain.v1",
    key="any",
    description="For tests.",
    partitions=3,
    max_record_bytes=MAX_IMAGE_RECORD_BYTES,
    retention_seconds=3600,
    producers=("test",),
    consumers=("test",),
)
MEBIBYTE = 1024 * 1024


@pytest.fixture
async def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, with the topic `plain.v1`."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix)
    await broker.apply_topics(settings, [PLAIN])
    return settings


@contextlib.asynccontextmanager
async def publishing(settings: Settings, **options: float) -> AsyncIterator[Publisher]:
    publisher = Publisher(settings, client_id="test", **options)  # type: ignore[arg-type]
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


def outgoing(value: bytes | None, key: bytes | None = b"k") -> Outgoing:
    return Outgoing(key, value, (("ce_id", b"1"), ("n", b"")))


async def read(reader: LiveReader, count: int, timeout_seconds: float = 20.0) -> list[Record]:
    found: list[Record] = []
    async with asyncio.timeout(timeout_seconds):
        async for record in reader:
            found.append(record)
            if len(found) == count:
                break
    return found


async def test_publish_answers_where_the_record_is(settings: Settings) -> None:
    """A published record can be read back by the place that publishing returned."""
    async with publishing(settings) as publisher:
        place = await publisher.publish(settings.topic(PLAIN.name), outgoing(b"picture"))
    record = await broker.read_back(settings, place.topic, place.partition, place.offset)
    expected = Record(
        topic=place.topic, partition=place.partition, offset=place.offset, timestamp_ms=place.timestamp_ms,
        key=b"k", value=b"picture", headers=(("ce_id", b"1"), ("n", b"")),
    )  # fmt: skip
    assert expected == record
    assert await broker.read_back(settings, place.topic, place.partition, place.offset + 1) is None
    assert await broker.read_back(settings, place.topic, 99, 0) is None


async def test_concurrent_records_share_batches_and_keep_their_own_times(settings: Settings) -> None:
    """A thousand records published at once are all acknowledged, each with its own place and time."""
    async with publishing(settings) as publisher, asyncio.timeout(20):
        topic = settings.topic(PLAIN.name)
        places = await asyncio.gather(
            *(publisher.publish(topic, outgoing(b"%d" % number, b"%d" % number)) for number in range(1000))
        )
    assert len({(place.partition, place.offset) for place in places}) == 1000
    first, last = places[0], places[-1]
    for number, place in ((0, first), (999, last)):
        record = await broker.read_back(settings, place.topic, place.partition, place.offset)
        assert record is not None
        assert (record.value, record.timestamp_ms) == (b"%d" % number, place.timestamp_ms)


async def test_records_without_key_or_value_are_published(settings: Settings) -> None:
    """A dead letter may have neither key nor value and is still published."""
    async with publishing(settings) as publisher:
        place = await publisher.publish(settings.topic(PLAIN.name), outgoing(None, None))
    record = await broker.read_back(settings, place.topic, place.partition, place.offset)
    assert record is not None
    assert not record.value


async def test_five_mebibytes_are_accepted(settings: Settings) -> None:
    """A 5 MB record arrives whole."""
    value = b"x" * (5 * MEBIBYTE)
    async with publishing(settings) as publisher:
        place = await publisher.publish(settings.topic(PLAIN.name), outgoing(value))
    record = await broker.read_back(settings, place.topic, place.partition, place.offset)
    assert record is not None
    assert value == record.value


@pytest.mark.parametrize("mebibytes", [8.1, 9.5], ids=["by the broker", "by the client"])
async def test_a_record_above_the_limit_is_refused_and_told(settings: Settings, mebibytes: float) -> None:
    """A record above the topic's limit is refused with its size; the partition's next one goes through."""
    topic = settings.topic(PLAIN.name)
    async with publishing(settings) as publisher:
        before = await publisher.publish(topic, outgoing(b"small"))
        with pytest.raises(RecordTooLargeError, match=r"\d,\d{3},\d{3} bytes"):
            await publisher.publish(topic, outgoing(b"x" * int(mebibytes * MEBIBYTE)))
        after = await publisher.publish(topic, outgoing(b"small"))
    assert (before.partition, before.offset + 1) == (after.partition, after.offset)


async def test_large_records_at_once_stay_below_the_request_limit(settings: Settings) -> None:
    """Twenty 7 MB records published at once arrive, although together they exceed what a request may hold."""
    async with publishing(settings, timeout_seconds=60) as publisher:
        topic = settings.topic(PLAIN.name)
        value = b"x" * (7 * MEBIBYTE)
        places = await asyncio.gather(
            *(publisher.publish(topic, outgoing(value, b"%d" % number)) for number in range(20))
        )
    assert len({(place.partition, place.offset) for place in places}) == 20


async def test_an_unknown_topic_is_named(settings: Settings) -> None:
    """Publishing to a topic that does not exist fails soon, says how to create it, and does not create it."""
    async with publishing(settings) as publisher:
        for _ in range(2):
            with pytest.raises(DependencyError, match="millrace topics apply"):
                await publisher.publish(settings.topic("missing.v1"), outgoing(b"x"))
        assert await publisher.publish(settings.topic(PLAIN.name), outgoing(b"x"))
    with pytest.raises(DependencyError, match="millrace topics apply"):
        await LiveReader(settings, [settings.topic("missing.v1")]).start(wait=False)


async def test_an_absent_broker_is_told_in_time() -> None:
    """Without a broker, start(wait=False), publish and ping end with an error that names the address."""
    settings = load(kafka_bootstrap_servers="127.0.0.1:9")
    publisher = Publisher(settings, client_id="test", timeout_seconds=0.5)
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9"):
        await publisher.start(wait=False)
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9"):
        await publisher.publish("x", outgoing(b"x"))
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9"):
        await broker.ping(settings, 1.0)
    await publisher.stop()
    with pytest.raises(DependencyError, match="stopped"):
        await publisher.publish("x", outgoing(b"x"))


async def test_a_dead_producer_is_replaced(settings: Settings) -> None:
    """A producer whose sequence numbers went wrong, or whose sender died, is replaced without an error."""
    topic = settings.topic(PLAIN.name)
    async with publishing(settings) as publisher:
        await publisher.publish(topic, outgoing(b"1"))
        first = publisher._connection
        assert first is not None
        # What aiokafka #1017 leaves behind: a batch counted by the producer that the broker never took.
        for partition in range(PLAIN.partitions):
            first.producer._txn_manager.increment_sequence_number(TopicPartition(topic, partition), 7)
        await publisher.publish(topic, outgoing(b"2"))
        second = publisher._connection
        assert second is not None
        assert second is not first
        second.producer._message_accumulator.fail_all(OutOfOrderSequenceNumber())
        await publisher.publish(topic, outgoing(b"3"))
        assert publisher._connection is not second
    reader = LiveReader(settings, [topic], start="earliest")
    await reader.start()
    assert [record.value for record in await read(reader, 3)] == [b"1", b"2", b"3"]
    await reader.stop()


async def test_a_record_that_waits_for_metadata_outlives_its_producer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record whose producer is given up before the topic's metadata has come is sent by the next one."""
    topic = settings.topic(PLAIN.name)
    async with publishing(settings) as publisher:
        await publisher.publish(topic, outgoing(b"first"))
        first = publisher._connection
        assert first is not None
        client = first.producer.client
        never = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(client.cluster, "partitions_for_topic", lambda _: None)
        monkeypatch.setattr(client, "force_metadata_update", lambda: never)
        waiting = asyncio.ensure_future(publisher.publish(topic, outgoing(b"second")))
        await eventually(lambda: bool(first.unacknowledged), 5)
        publisher._give_up(first, seconds=0.0)
        assert (await asyncio.wait_for(waiting, 20)).topic == topic
        assert publisher._connection is not first


async def test_live_reader_starts_where_it_is_told(settings: Settings) -> None:
    """`latest` sees what comes after start(), `earliest` everything, a timestamp what is younger."""
    topic = settings.topic(PLAIN.name)
    async with publishing(settings) as publisher:
        old = await publisher.publish(topic, outgoing(b"old"))
        between = datetime.fromtimestamp(old.timestamp_ms / 1000, UTC) + timedelta(milliseconds=1)
        await asyncio.sleep(0.01)
        await publisher.publish(topic, outgoing(b"young"))
        latest, earliest = LiveReader(settings, [topic]), LiveReader(settings, [topic], start="earliest")
        since = LiveReader(settings, [topic], start=between)
        readers = (latest, earliest, since)
        await asyncio.gather(*(reader.start() for reader in readers))
        await publisher.publish(topic, outgoing(b"new"))
        found = [
            [record.value for record in await read(reader, count)]
            for reader, count in zip(readers, (1, 3, 2), strict=True)
        ]
        assert found == [[b"new"], [b"old", b"young", b"new"], [b"young", b"new"]]
        await publisher.publish(topic, outgoing(b"newer"))
        assert [record.value for record in await read(latest, 1)] == [b"newer"]
        await asyncio.gather(*(reader.stop() for reader in readers))


async def test_live_reader_ends_when_stopped(settings: Settings) -> None:
    """Stopping a reader ends an iteration that waits."""
    reader = LiveReader(settings, [settings.topic(PLAIN.name)])
    await reader.start()

    async def exhaust() -> list[Record]:
        return [record async for record in reader]

    waiting = asyncio.create_task(exhaust())
    await asyncio.sleep(0.1)
    await reader.stop()
    async with asyncio.timeout(5):
        assert await waiting == []


async def test_live_reader_sees_only_what_was_committed(settings: Settings) -> None:
    """Records of an aborted transaction are passed by, those of a committed one are seen."""
    topic = settings.topic(PLAIN.name)
    reader = LiveReader(settings, [topic])
    await reader.start()
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.resolved_kafka, transactional_id=settings.topic("test")
    )
    await producer.start()
    for value, commits in ((b"aborted", False), (b"committed", True)):
        await producer.begin_transaction()
        await producer.send_and_wait(topic, value, partition=0)
        await (producer.commit_transaction() if commits else producer.abort_transaction())
    await producer.stop()
    assert [record.value for record in await read(reader, 1)] == [b"committed"]
    await reader.stop()


async def test_live_reader_picks_up_new_partitions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions added while a reader runs are read from their beginning."""
    monkeypatch.setattr(readers, "METADATA_SECONDS", 0.5)
    topic = settings.topic(PLAIN.name)
    reader = LiveReader(settings, [topic])
    await reader.start()
    await broker.apply_topics(settings, [replace(PLAIN, partitions=6)])
    producer = AIOKafkaProducer(bootstrap_servers=settings.resolved_kafka)
    await producer.start()
    for partition in range(6):
        await producer.send_and_wait(topic, b"%d" % partition, partition=partition)
    await producer.stop()
    assert {record.value for record in await read(reader, 6)} == {b"%d" % number for number in range(6)}
    await reader.stop()


async def test_stopping_ends_in_time_while_the_broker_is_away(own_kafka: EmbeddedKafka) -> None:
    """A publisher stops within its time although records wait for a broker that is gone; they fail."""
    settings = load(kafka_bootstrap_servers=own_kafka.bootstrap_servers)
    await broker.apply_topics(settings, [PLAIN])
    publisher = Publisher(settings, client_id="test", timeout_seconds=60)
    await publisher.start()
    await publisher.publish(PLAIN.name, outgoing(b"1"))
    await asyncio.to_thread(own_kafka.kill)
    waiting = asyncio.create_task(publisher.publish(PLAIN.name, outgoing(b"2")))
    await asyncio.sleep(1.0)
    async with asyncio.timeout(15):
        await publisher.stop(timeout_seconds=2.0)
        with pytest.raises(DependencyError):
            await waiting


async def test_a_broker_killed_while_publishing_loses_nothing(own_kafka: EmbeddedKafka) -> None:
    """Records published across a SIGKILL of the broker are each acknowledged, kept once and read once."""
    settings = load(kafka_bootstrap_servers=own_kafka.bootstrap_servers)
    await broker.apply_topics(settings, [PLAIN])
    places: dict[int, Place] = {}
    async with publishing(settings) as publisher:
        reader = LiveReader(settings, [PLAIN.name])
        await reader.start()
        seen: list[int] = []

        async def watch() -> None:
            async for record in reader:
                seen.append(int(record.value or b"-1"))  # noqa: PERF401 - read by others meanwhile

        async def publish(number: int) -> None:
            value = outgoing(b"%d" % number, b"%d" % number)
            places[number] = await publisher.publish_forever(PLAIN.name, value, step="test")

        async def publish_all() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(600):
                    group.create_task(publish(number))
                    await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        publishing_all = asyncio.create_task(publish_all())
        await eventually(lambda: len(places) >= 100, 20)
        await asyncio.to_thread(own_kafka.kill)
        with pytest.raises(DependencyError):
            await broker.ping(settings, 2.0)
        await asyncio.to_thread(own_kafka.start)
        async with asyncio.timeout(60):
            await publishing_all
        assert set(range(600)) == set(places)
        # The idempotent producer repeats batches, the broker drops the copies: none is seen twice.
        await eventually(lambda: len(seen) >= 600, 30)
        assert list(range(600)) == sorted(seen)
        watching.cancel()
        await reader.stop()
