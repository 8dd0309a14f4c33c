"""Reading Kafka without a consumer group: a live reader of whole topics, and one record by its place.

Nothing is ever committed here, so any number of processes may read the same topic. Steps that must finish
each record once read through `agents/delivery.py` instead.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import ConsumerStoppedError, KafkaError

from pipeline import logs, record_batches
from pipeline.connections import (
    CONNECT_SECONDS,
    backoff_seconds,
    client_options,
    unreachable,
)
from pipeline.errors import DependencyError
from pipeline.events import Record
from pipeline.settings import PREFIX, Settings
from pipeline.topics import MEBIBYTE

# New partitions are seen within this; each look costs one metadata request.
METADATA_SECONDS = 30.0
_FETCH_BYTES = 16 * MEBIBYTE
_POLL_MS = 500
_LOG_APPEND_TIME = 1  # of a record's timestamp: KIP-32
_MAX_RECORDS = 500

# aiokafka's own parser ends every reader at a header name that is not UTF-8.
record_batches.install()

_log = logs.get(__name__)


def to_record(message: Any) -> Record:
    """Convert aiokafka's record; a header without a value counts as absent."""
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=message.timestamp,
        key=message.key,
        value=message.value,
        headers=tuple((name, value) for name, value in message.headers if value is not None),
        is_stamped_by_broker=message.timestamp_type == _LOG_APPEND_TIME,
    )


async def partitions_of(settings: Settings, topics: Sequence[str]) -> set[TopicPartition]:
    """Return every partition of topics that must exist; never has one created.

    Raises:
        DependencyError: a topic is missing, or no broker answers.
    """
    client = AIOKafkaClient(**client_options(settings))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await client.bootstrap()
            cluster = await client.fetch_all_metadata()
    except (KafkaError, OSError, TimeoutError) as error:
        raise unreachable(settings, error) from None
    finally:
        await client.close()
    found: set[TopicPartition] = set()
    for topic in topics:
        numbers = cluster.partitions_for_topic(topic)
        if not numbers:
            raise DependencyError(
                f"topic {topic} does not exist or may not be seen: run `millrace topics apply`, "
                f"check {PREFIX}TOPIC_PREFIX"
            )
        found |= {TopicPartition(topic, number) for number in numbers}
    return found


class LiveReader:
    """Iterate over the committed records of whole topics, without a consumer group.

    Positions are resolved in `start`: no record published after it returned is missed. Per partition, records
    come in order and once; the reader survives broker restarts, rotated credentials and added partitions. One
    task iterates; breaking off and iterating again goes on where it stopped.

    Args:
        settings: Where the brokers are.
        topics: Names on the broker.
        start: From where: only what is new, everything that is kept, or what has a timestamp from then on.
        client_id: Shown in the broker's logs and quotas.
    """

    def __init__(
        self,
        settings: Settings,
        topics: Sequence[str],
        *,
        start: Literal["latest", "earliest"] | datetime = "latest",
        client_id: str = "millrace-reader",
    ) -> None:
        self._settings = settings
        self._topics = tuple(topics)
        self._start = start
        self._client_id = client_id
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._ready: deque[Record] = deque()
        self._stopped = False

    async def start(self, *, wait: bool = True) -> None:
        """Connect and fix where each partition is read from; with `wait`, for as long as it takes.

        Raises:
            ConfigurationError: TLS or SASL files cannot be used.
            DependencyError: no broker answers or a topic is missing, without `wait`.
        """
        for delay in backoff_seconds():
            try:
                await self._open()
                return
            except DependencyError as error:
                if not wait:
                    raise
                _log.warning("waiting for the broker", error=error.message)
                await asyncio.sleep(delay)

    async def stop(self) -> None:
        """Release the connection; a running iteration ends."""
        self._stopped = True
        await self._close()

    async def __aiter__(self) -> AsyncIterator[Record]:
        delays = backoff_seconds()
        while not self._stopped:
            while self._ready:
                yield self._ready.popleft()
            try:
                if self._consumer is None:
                    await self._open()
                await self._fetch()
                delays = backoff_seconds()
            except ConsumerStoppedError:
                continue
            except (KafkaError, OSError, TimeoutError, DependencyError) as error:
                if self._stopped:
                    return
                _log.warning("reading again", topics=self._topics, error=repr(error))
                await self._close()
                await asyncio.sleep(next(delays))

    async def _fetch(self) -> None:
        consumer = self._consumer
        assert consumer is not None
        self._assign_new_partitions(consumer)
        fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)
        for partition, messages in fetched.items():
            # Remembered here and not asked of aiokafka: a new consumer goes on from what was handed out.
            self._positions[partition] = messages[-1].offset + 1
            self._ready.extend(to_record(message) for message in messages)

    def _assign_new_partitions(self, consumer: AIOKafkaConsumer) -> None:
        known = {
            TopicPartition(topic, number)
            for topic in self._topics
            for number in consumer.partitions_for_topic(topic) or ()
        }
        added = known - self._positions.keys()
        if added:
            # All of what a new partition holds came after start().
            self._positions |= dict.fromkeys(added, 0)
            self._assign(consumer)

    def _assign(self, consumer: AIOKafkaConsumer) -> None:
        consumer.assign(list(self._positions))
        for partition, offset in self._positions.items():
            consumer.seek(partition, offset)

    async def _open(self) -> None:
        partitions = await partitions_of(self._settings, self._topics)
        consumer = AIOKafkaConsumer(
            **client_options(self._settings),
            client_id=self._client_id,
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
            # For a position that retention has deleted meanwhile: go on with the oldest record there is.
            auto_offset_reset="earliest",
            fetch_max_bytes=_FETCH_BYTES,
            metadata_max_age_ms=int(METADATA_SECONDS * 1000),
        )
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await consumer.start()
                # Lets aiokafka's own tasks begin: stopping a consumer before they did raises CancelledError.
                await asyncio.sleep(0)
                if not self._positions:
                    self._positions = await self._first_positions(consumer, partitions)
                self._assign(consumer)
        except (KafkaError, OSError, TimeoutError) as error:
            await consumer.stop()
            raise unreachable(self._settings, error) from None
        except BaseException:
            await consumer.stop()
            raise
        self._consumer = consumer

    async def _first_positions(
        self, consumer: AIOKafkaConsumer, partitions: set[TopicPartition]
    ) -> dict[TopicPartition, int]:
        if self._start == "earliest":
            return dict(await consumer.beginning_offsets(partitions))
        # Before the search by time, so that records published meanwhile lie after it.
        ends: dict[TopicPartition, int] = dict(await consumer.end_offsets(partitions))
        if isinstance(self._start, datetime):
            since_ms = int(self._start.timestamp() * 1000)
            found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
            ends |= {partition: place.offset for partition, place in found.items() if place is not None}
        return ends

    async def _close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()


async def read_back(
    settings: Settings, topic: str, partition: int, offset: int, *, timeout_seconds: float = CONNECT_SECONDS
) -> Record | None:
    """Read one record by its place; None when retention or compaction took it, or it never was.

    Raises:
        DependencyError: no broker answers, or the topic is missing.
    """
    place = TopicPartition(topic, partition)
    if place not in await partitions_of(settings, [topic]):
        return None
    consumer = AIOKafkaConsumer(
        **client_options(settings), group_id=None, enable_auto_commit=False, isolation_level="read_committed",
        auto_offset_reset="none",
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_seconds):
            await consumer.start()
            first = (await consumer.beginning_offsets([place]))[place]
            end = (await consumer.end_offsets([place]))[place]
            if not first <= offset < end:
                return None
            consumer.assign([place])
            consumer.seek(place, offset)
            message = await consumer.getone()
            return to_record(message) if message.offset == offset else None
    except TimeoutError:
        # The offset lies below the end, yet nothing comes: only markers and aborted records follow it.
        return None
    except (KafkaError, OSError) as error:
        raise unreachable(settings, error) from None
    finally:
        await consumer.stop()


async def read_from(
    settings: Settings, topic: str, partition: int, first: Callable[[int, int], int]
) -> AsyncIterator[Record]:
    """Yield the committed records of a partition up to its present end.

    `first` is given where the partition begins and ends, and says where to begin.

    Raises:
        DependencyError: no broker answers, or the partition is missing.
    """
    place = TopicPartition(topic, partition)
    if place not in await partitions_of(settings, [topic]):
        raise DependencyError(f"topic {topic} has no partition {partition}")
    consumer = AIOKafkaConsumer(
        **client_options(settings), group_id=None, enable_auto_commit=False, isolation_level="read_committed",
        auto_offset_reset="earliest", fetch_max_bytes=_FETCH_BYTES, fetch_max_wait_ms=100,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await consumer.start()
            # Lets aiokafka's own tasks begin: stopping a consumer before they did raises CancelledError.
            await asyncio.sleep(0)
            beginning = (await consumer.beginning_offsets([place]))[place]
            end = (await consumer.end_offsets([place]))[place]
        consumer.assign([place])
        consumer.seek(place, max(beginning, first(beginning, end)))
        while await consumer.position(place) < end:
            fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)
            for message in fetched.get(place, ()):
                if message.offset < end:
                    yield to_record(message)
    except (KafkaError, OSError, TimeoutError) as error:
        raise unreachable(settings, error) from None
    finally:
        await consumer.stop()


async def read_all(
    settings: Settings,
    topic: str,
    *,
    since: datetime | None = None,
    wanted: Callable[[Record], bool] = lambda record: True,
) -> list[Record]:
    """Return the committed records of a topic from its oldest to its present end, in memory.

    With `since` only those published from then on; of those only the wanted ones are kept.

    Raises:
        DependencyError: a topic is missing, or no broker answers.
    """
    partitions = await partitions_of(settings, [topic])
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        group_id=None,
        isolation_level="read_committed",
        fetch_max_bytes=_FETCH_BYTES,
    )
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await consumer.start()
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        if since is not None:
            places = await consumer.offsets_for_times(
                dict.fromkeys(partitions, max(0, int(since.timestamp() * 1000)))
            )
            starts = {place: found.offset if found else ends[place] for place, found in places.items()}
        consumer.assign(list(partitions))
        for partition, offset in starts.items():
            consumer.seek(partition, offset)
        records: list[Record] = []
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)
            for messages in fetched.values():
                records.extend(filter(wanted, map(to_record, messages)))
        return records
    except (KafkaError, OSError, TimeoutError) as error:
        raise unreachable(settings, error) from None
    finally:
        await consumer.stop()
