"""Topics as the topic table wants them, and how far behind each consumer group is.

Applying is idempotent and only ever adds: it creates topics, adds partitions and mends configuration, and
never deletes a topic or a record. A topic with more partitions than the table says is left as it is.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import CoordinationType
from aiokafka.errors import (
    InvalidReplicationFactorError,
    KafkaError,
    PolicyViolationError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.protocol.commit import OffsetFetchRequest

from pipeline import logs
from pipeline.connections import client_options, unreachable
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.settings import PREFIX, Settings
from pipeline.topics import TOPICS, Topic

ADMIN_SECONDS = 30.0
_RETRY_SECONDS = 0.25
# What `lag` is asked of by default.
STEPS = ("predict", "store", "archive", "watch", "record", "notify")
_DYNAMIC_TOPIC_CONFIG = 1  # DescribeConfigsResponse: ConfigSource.TOPIC_CONFIG, set on the topic itself

_log = logs.get(__name__)


class TopicState(msgspec.Struct, frozen=True, kw_only=True):
    """One topic of the table as it is on the broker, under the broker's name for it."""

    topic: str
    partitions: int
    wanted_partitions: int
    replication_factor: int
    #: Partitions with fewer in-sync replicas than replicas, or without a leader.
    unhealthy_partitions: int
    #: Setting -> (on the broker, in the table), only where they differ.
    differences: dict[str, tuple[str | None, str]]

    @property
    def exists(self) -> bool:
        """Whether the broker has the topic."""
        return self.partitions > 0

    @property
    def is_right(self) -> bool:
        """Whether `apply_topics` has nothing to do."""
        return self.partitions >= self.wanted_partitions and not self.differences


class TopicChange(msgspec.Struct, frozen=True, kw_only=True):
    """What `apply_topics` did to one topic."""

    topic: str
    change: Literal["created", "partitions added", "configuration mended", "kept"]
    detail: str = ""


class PartitionLag(msgspec.Struct, frozen=True, kw_only=True):
    """How far a group is behind in one partition; `committed` is None before its first commit."""

    group: str
    topic: str
    partition: int
    committed: int | None
    #: Oldest record that is still kept.
    start: int
    end: int
    #: Offsets from the committed one (or the oldest kept) to the end; an upper bound of the records to come.
    lag: int


def wanted_partitions(settings: Settings, topic: Topic) -> int:
    """Return how many partitions a topic should have in this installation."""
    return settings.topic_partitions or topic.partitions


async def describe_topics(settings: Settings, topics: Sequence[Topic] = TOPICS) -> list[TopicState]:
    """Compare the broker's topics with the table.

    Raises:
        DependencyError: no broker answers, or it refuses.
    """
    async with _admin(settings) as admin:
        return await _describe(admin, settings, topics)


async def missing_topics(settings: Settings, topics: Sequence[Topic] = TOPICS) -> list[str]:
    """Return the broker's names of topics that are not there, or that this user may not see.

    Whoever may read or write a topic may ask this; `describe_topics` needs DescribeConfigs in addition.

    Raises:
        DependencyError: no broker answers, or it refuses.
    """
    async with _admin(settings) as admin:
        found = {topic["topic"] for topic in await admin.describe_topics()}
    return [name for topic in topics if (name := settings.topic(topic.name)) not in found]


async def apply_topics(settings: Settings, topics: Sequence[Topic] = TOPICS) -> list[TopicChange]:
    """Make the broker's topics what the table says; idempotent, safe to run in several places at once.

    Raises:
        ConfigurationError: the broker refuses the replication factor or a policy.
        DependencyError: no broker answers, or it refuses.
    """
    changes = []
    async with _admin(settings) as admin:
        states = await _describe(admin, settings, topics)
        for topic, state in zip(topics, states, strict=True):
            done = []
            if not state.exists:
                done.append(await _create(admin, settings, topic))
            elif state.partitions < state.wanted_partitions:
                await admin.create_partitions({state.topic: NewPartitions(state.wanted_partitions)})
                detail = f"{state.partitions} -> {state.wanted_partitions}"
                done.append(TopicChange(topic=state.topic, change="partitions added", detail=detail))
            if state.exists and state.differences:
                await _mend(admin, state)
                detail = ", ".join(
                    f"{name}: {old} -> {new}" for name, (old, new) in state.differences.items()
                )
                done.append(TopicChange(topic=state.topic, change="configuration mended", detail=detail))
            changes += done or [TopicChange(topic=state.topic, change="kept")]
        # A broker answers before it has learnt of the change itself; whoever publishes next must find it.
        while not all(state.is_right for state in await _describe(admin, settings, topics)):  # noqa: ASYNC110
            await asyncio.sleep(_RETRY_SECONDS)
    return changes


async def lag(
    settings: Settings, groups: Sequence[str] | None = None, *, steps: Sequence[str] = STEPS
) -> list[PartitionLag]:
    """Return each partition's lag for groups (full names); None: of these steps, every deployment's among them.

    A group that never committed is behind by everything that is kept, as a new consumer would be.

    Raises:
        DependencyError: no broker answers, or it refuses.
    """
    async with _admin(settings) as admin:
        existing = {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics()}
        names = sorted(set(groups)) if groups is not None else await _own_groups(admin, settings, steps)
        committed: dict[str, dict[TopicPartition, int]] = {}
        wanted: dict[str, set[TopicPartition]] = {}
        for group in names:
            committed[group] = await _committed(admin, group)
            # All partitions of a topic: one that was just added has no commit yet, and may have a backlog.
            read = {place.topic for place in committed[group]} | set(_topics_of(settings, group))
            wanted[group] = {
                TopicPartition(topic, number) for topic in read for number in range(existing.get(topic, 0))
            }
        starts, ends = await _bounds(settings, set().union(*wanted.values()))
    return [
        _lag(group, place, committed[group].get(place), starts[place], ends[place])
        for group in names
        for place in sorted(wanted[group])
    ]


def _lag(group: str, place: TopicPartition, committed: int | None, start: int, end: int) -> PartitionLag:
    next_offset = start if committed is None else max(committed, start)
    return PartitionLag(
        group=group, topic=place.topic, partition=place.partition, committed=committed, start=start, end=end,
        lag=max(0, end - next_offset),
    )  # fmt: skip


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**client_options(settings), client_id="millrace-admin")
    try:
        async with asyncio.timeout(ADMIN_SECONDS):
            await admin.start()
            yield admin
    except (OSError, TimeoutError) as error:
        raise unreachable(settings, error) from None
    except KafkaError as error:
        if error.retriable:
            raise unreachable(settings, error) from None
        raise DependencyError(f"Kafka at {settings.resolved_kafka} refuses: {error!r}") from None
    finally:
        await admin.close()


async def _describe(
    admin: AIOKafkaAdminClient, settings: Settings, topics: Sequence[Topic]
) -> list[TopicState]:
    # All topics, not ours by name: asking for a missing topic by name may create it with defaults.
    found = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
    states = []
    for topic in topics:
        name = settings.topic(topic.name)
        partitions = found.get(name, [])
        set_on_broker = (
            {key: value for key, (value, _) in (await _config(admin, name)).items()} if partitions else {}
        )
        states.append(
            TopicState(
                topic=name,
                partitions=len(partitions),
                wanted_partitions=wanted_partitions(settings, topic),
                replication_factor=min((len(partition["replicas"]) for partition in partitions), default=0),
                unhealthy_partitions=sum(
                    partition["leader"] < 0 or len(partition["isr"]) < len(partition["replicas"])
                    for partition in partitions
                ),
                differences={
                    key: (set_on_broker.get(key), value)
                    for key, value in topic.config().items()
                    if partitions and set_on_broker.get(key) != value
                },
            )
        )
    return states


async def _config(admin: AIOKafkaAdminClient, name: str) -> dict[str, tuple[str | None, bool]]:
    """Return a topic's configuration as setting -> (value, whether it is set on the topic itself)."""
    (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    found: dict[str, Any] = response.to_object()["resources"][0]
    _check(found["error_code"], found["error_message"])
    return {
        entry["config_names"]: (
            entry["config_value"],
            entry["config_source"] == _DYNAMIC_TOPIC_CONFIG
            if "config_source" in entry
            else not entry["is_default"],
        )
        for entry in found["config_entries"]
    }


async def _create(admin: AIOKafkaAdminClient, settings: Settings, topic: Topic) -> TopicChange:
    name, partitions = settings.topic(topic.name), wanted_partitions(settings, topic)
    new = NewTopic(name, partitions, settings.topic_replication_factor, topic_configs=topic.config())
    response = await admin.create_topics([new])
    _, code, message = response.topic_errors[0]
    try:
        _check(code, message)
    except TopicAlreadyExistsError:
        return TopicChange(topic=name, change="kept", detail="created by somebody else meanwhile")
    except InvalidReplicationFactorError:
        raise ConfigurationError(
            f"{PREFIX}TOPIC_REPLICATION_FACTOR: {settings.topic_replication_factor} cannot be had ({message})"
        ) from None
    except PolicyViolationError:
        raise ConfigurationError(f"the brokers' policy refuses topic {name}: {message}") from None
    return TopicChange(topic=name, change="created", detail=f"{partitions} partitions")


async def _mend(admin: AIOKafkaAdminClient, state: TopicState) -> None:
    # AlterConfigs replaces everything that is set on the topic: what others set must be sent along.
    kept = {key: value for key, (value, is_own) in (await _config(admin, state.topic)).items() if is_own}
    wanted = kept | {key: value for key, (_, value) in state.differences.items()}
    (response,) = await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, state.topic, wanted)])
    code, message, *_ = response.resources[0]
    _check(code, message)


def _check(code: int, message: str | None) -> None:
    if code:
        raise for_code(code)(message)


def _topics_of(settings: Settings, group: str) -> list[str]:
    """Return what a group reads by the topic table; nothing for groups that are not ours."""
    if not group.startswith(settings.topic_prefix):
        return []
    step = group.removeprefix(settings.topic_prefix)
    step = "predict" if step.startswith("predict.") else step
    return [settings.topic(topic.name) for topic in TOPICS if step in topic.consumers]


async def _own_groups(admin: AIOKafkaAdminClient, settings: Settings, steps: Sequence[str]) -> list[str]:
    own = {settings.group(step) for step in steps}
    if "predict" in steps:
        deployments = settings.group("predict").removesuffix(settings.deployment)
        known = {str(group) for group, _ in await admin.list_consumer_groups()}
        own |= {group for group in known if group.startswith(deployments)}
    return sorted(own)


async def _committed(admin: AIOKafkaAdminClient, group: str) -> dict[TopicPartition, int]:
    """Return a group's committed offsets.

    aiokafka's own `list_consumer_group_offsets` overlooks an error of the whole answer (coordinator moving or
    still loading), and a group would look as if it had never committed.
    """
    client = admin._client
    while True:
        try:
            node = await client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await client.send(node, OffsetFetchRequest(group, None))
            _check(getattr(response, "error_code", 0), None)
            found = {}
            for topic, partitions in response.topics:
                for partition, offset, _, code in partitions:
                    _check(code, None)
                    if offset >= 0:
                        found[TopicPartition(topic, partition)] = offset
            return found
        except KafkaError as error:
            if not error.retriable:
                raise
            _log.debug("asking for offsets again", group=group, error=repr(error))
            await asyncio.sleep(_RETRY_SECONDS)  # bounded by ADMIN_SECONDS around the whole


async def _bounds(
    settings: Settings, places: set[TopicPartition]
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    if not places:
        # Besides saving a connection: an aiokafka consumer that is stopped as soon as it started raises
        # CancelledError, from a task of its own that never ran.
        return {}, {}
    consumer = AIOKafkaConsumer(**client_options(settings), group_id=None, enable_auto_commit=False)
    try:
        await consumer.start()
        return await consumer.beginning_offsets(places), await consumer.end_offsets(places)
    finally:
        await consumer.stop()
