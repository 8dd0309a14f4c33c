"""Topics and lag against a real broker."""

from dataclasses import replace

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline import broker
from pipeline.admin import PartitionLag
from pipeline.broker import Publisher
from pipeline.errors import ConfigurationError
from pipeline.events import Outgoing
from pipeline.settings import Settings, load
from pipeline.topics import IMAGES_BULK, TOPICS

pytestmark = pytest.mark.asyncio


@pytest.fixture
def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, without topics."""
    return load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix)


async def test_apply_creates_the_table_and_is_idempotent(settings: Settings) -> None:
    """Applying creates every topic with its partitions and configuration; applying again changes nothing."""
    assert [0] * len(TOPICS) == [state.partitions for state in await broker.describe_topics(settings)]
    assert {"created"} == {change.change for change in await broker.apply_topics(settings)}
    states = await broker.describe_topics(settings)
    assert [topic.partitions for topic in TOPICS] == [state.partitions for state in states]
    assert all(state.is_right and state.replication_factor == 1 for state in states)
    assert {"kept"} == {change.change for change in await broker.apply_topics(settings)}


async def test_apply_mends_drift_and_keeps_what_it_does_not_own(settings: Settings) -> None:
    """A setting that differs is mended, one set by somebody else stays, missing partitions are added."""
    before = replace(IMAGES_BULK, partitions=2, retention_seconds=60)
    await broker.apply_topics(settings, [before])
    await _set(settings, settings.topic(IMAGES_BULK.name), before.config() | {"segment.ms": "3600000"})
    (state,) = await broker.describe_topics(settings, [IMAGES_BULK])
    assert state.differences == {"retention.ms": ("60000", "604800000")}
    changes = await broker.apply_topics(settings, [IMAGES_BULK])
    assert [change.change for change in changes] == ["partitions added", "configuration mended"]
    (state,) = await broker.describe_topics(settings, [replace(IMAGES_BULK, partitions=3)])
    assert (state.partitions, state.is_right) == (12, True)
    assert await _get(settings, settings.topic(IMAGES_BULK.name), "segment.ms") == "3600000"
    # More partitions than the table says are somebody's decision.
    (change,) = await broker.apply_topics(settings, [replace(IMAGES_BULK, partitions=3)])
    assert change.change == "kept"


async def test_a_replication_factor_above_the_brokers_names_the_setting(
    kafka: str, topic_prefix: str
) -> None:
    """Too many replicas for the cluster is a configuration error that names the variable."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_replication_factor=5)
    with pytest.raises(ConfigurationError, match="MILLRACE_TOPIC_REPLICATION_FACTOR"):
        await broker.apply_topics(settings, [IMAGES_BULK])


async def test_lag_counts_from_the_commit_or_from_the_start(kafka: str, topic_prefix: str) -> None:
    """A group is behind by what it has not committed, one that never committed by everything that is kept."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_partitions=1)
    await broker.apply_topics(settings)
    publisher = Publisher(settings, client_id="test")
    await publisher.start()
    bulk = settings.topic(IMAGES_BULK.name)
    for _ in range(5):
        await publisher.publish(bulk, Outgoing(b"k", b"v", ()))
    await publisher.stop()
    await _commit(kafka, settings.group("archive"), bulk, 3)
    await _commit(kafka, settings.topic_prefix + "predict.canary", bulk, 5)
    found = await broker.lag(settings)
    figures = {(row.group.removeprefix(topic_prefix), row.committed, row.start, row.end, row.lag)
               for row in found if row.topic == bulk}  # fmt: skip
    assert {
        ("archive", 3, 0, 5, 2),
        ("predict.canary", 5, 0, 5, 0),
        ("predict.default", None, 0, 5, 5),
    } == figures
    assert [
        PartitionLag(
            group=settings.group("archive"), topic=bulk, partition=0, committed=3, start=0, end=5, lag=2
        ),
    ] == [row for row in await broker.lag(settings, [settings.group("archive")]) if row.topic == bulk]
    other = await broker.lag(settings, [settings.group("never-heard-of")])
    assert other == []


async def _commit(kafka: str, group: str, topic: str, offset: int) -> None:
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, group_id=group, enable_auto_commit=False)
    await consumer.start()
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.commit({TopicPartition(topic, 0): offset})
    await consumer.stop()


async def _set(settings: Settings, topic: str, config: dict[str, str]) -> None:
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    from pipeline.admin import _admin

    async with _admin(settings) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, config)])


async def _get(settings: Settings, topic: str, name: str) -> str | None:
    from pipeline.admin import _admin, _config

    async with _admin(settings) as admin:
        return (await _config(admin, topic))[name][0]
