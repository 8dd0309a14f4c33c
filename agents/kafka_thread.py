"""The thread that owns the aiokafka consumer: fetches, commits, look-ups, and heartbeats beside them.

It keeps the rule that a fetch position never moves past a record that was not handed to the main loop.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer import fetcher as aiokafka_fetcher
from aiokafka.consumer.subscription_state import IllegalStateError
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, KafkaError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata
from aiokafka.structs import TopicPartition as KafkaPartition
from faust.transport.drivers import aiokafka as driver
from mode import Service

from agents.delivery import CommitResult, Start, TopicPartition
from pipeline import logs
from pipeline.connections import client_options
from pipeline.errors import DependencyError, FatalError
from pipeline.topics import MAX_DEAD_LETTER_RECORD_BYTES, lane_of

if TYPE_CHECKING:
    from agents.consumer import LedgerConsumer

log = logs.get(__name__)

# One answer to a fetch; a record that is larger alone still comes. While an answer is read nothing else is, and a
# real-time record waits behind it: 32 MiB took half a second on two busy cores.
MAX_FETCH_BYTES = 2 * 1024 * 1024
MAX_PARTITION_FETCH_BYTES = MAX_DEAD_LETTER_RECORD_BYTES
# What is handed over at a time, by the usual size of records: pausing a lane takes effect soon, and real-time
# records have their turn in between.
MAX_POLL_BYTES = 2 * 1024 * 1024
MAX_POLL_RECORDS = 500
# Of what was handed over last in that usual size.
USUAL_BYTES_WEIGHT = 0.2
# Commits and look-ups inside a hand-over must leave time for others within the rebalance timeout.
REQUEST_SECONDS = 10.0
# Between two tries of a fetch that failed; a partition without rights or leader stays so for a while.
RETRY_SECONDS = 1.0
# Faust's own consumer asks for this; half as long halves the wait of a lone record for an empty fetch.
FETCH_WAIT_MILLISECONDS = 500
# While a lane is paused: it may read on at any moment, and nothing else ends a wait for the other lane. With waits
# of a second a worker with a bulk backlog ran out of pictures every few seconds.
PAUSED_FETCH_WAIT_MILLISECONDS = 50
# While so many records are open the step is busy, and a fetch waits for company: with one for nearly every picture,
# broker and worker take a tenth more processor time, and batches wait for it.
BUSY_RECORDS = 16
BUSY_FETCH_BYTES = MAX_FETCH_BYTES // 2
BUSY_FETCH_WAIT_MILLISECONDS = 20
# A member hears of a rebalance by its next heartbeat, and until then the whole group stands still: with Kafka's
# usual 3 s that is half of what a scale-out costs; a heartbeat is 50 bytes.
HEARTBEAT_SECONDS = 1.0
# aiokafka's own: how long a broker is asked for nothing while something fetched from it is not taken.
PREFETCH_BACKOFF_SECONDS = 0.1
# Without it aiokafka leaves the group after five minutes without records; a day is "never" with a margin.
MAX_POLL_INTERVAL_MILLISECONDS = 24 * 3600 * 1000


@dataclass(frozen=True, eq=False)
class Ownership:
    """One assignment, and where reading begins; told apart by identity, for Kafka may repeat a generation."""

    generation: int
    beginnings: Mapping[TopicPartition, int]


@dataclass(frozen=True)
class Fetch:
    """What one fetch returned: records, and the positions right after them."""

    ownership: Ownership
    records: Mapping[KafkaPartition, list[ConsumerRecord]]
    positions: Mapping[KafkaPartition, int]


class RealtimeFirstRequest(FetchRequest):  # type: ignore[misc]
    """A fetch that asks for real-time topics first.

    A broker answers in the order it was asked, and with nothing once the answer is full (KIP-74). aiokafka asks in
    a random order: a bulk backlog then fills every other answer before the real-time lane has its turn.
    """

    def __init__(
        self,
        max_wait_ms: int,
        min_bytes: int,
        max_bytes: int,
        isolation_level: int,
        topics: list[tuple[str, list[tuple[int, int, int]]]],
        rack_id: str = "",
    ) -> None:
        ordered = sorted(topics, key=lambda each: lane_of(each[0]) != "realtime")
        super().__init__(max_wait_ms, min_bytes, max_bytes, isolation_level, ordered, rack_id)


aiokafka_fetcher.FetchRequest = RealtimeFirstRequest


class LedgerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """The thread that owns the aiokafka consumer; heartbeats go on here whatever the main loop does."""

    consumer: "LedgerConsumer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[KafkaPartition, int] = {}  # where the next fetch must begin
        self._went_back: dict[KafkaPartition, int] = {}
        self._begun: Ownership | None = None
        self._usual_bytes = 1.0

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        settings = self.app.settings
        return AIOKafkaConsumer(
            **client_options(settings),
            client_id=f"millrace-{settings.group(self.app.step_name)}",
            group_id=self.app.conf.id,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_poll_records=MAX_POLL_RECORDS,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MILLISECONDS,
            max_partition_fetch_bytes=MAX_PARTITION_FETCH_BYTES,
            fetch_max_bytes=MAX_FETCH_BYTES,
            fetch_max_wait_ms=FETCH_WAIT_MILLISECONDS,
            request_timeout_ms=int(self.app.conf.broker_request_timeout * 1000),
            session_timeout_ms=int(settings.session_timeout_seconds * 1000),
            rebalance_timeout_ms=int(settings.rebalance_timeout_seconds * 1000),
            heartbeat_interval_ms=int(min(HEARTBEAT_SECONDS, settings.session_timeout_seconds / 4) * 1000),
            metadata_max_age_ms=30_000,
        )

    @Service.task
    async def _look_after_joining(self) -> None:
        """Let the first joining of the group go on after an error: before it nothing is fetched."""
        while not self.should_stop and self.consumer.ownership is None:
            if self._consumer is not None:
                _look_after(self._consumer)
            await asyncio.sleep(RETRY_SECONDS)

    async def fetch(self, timeout_seconds: float) -> None:
        """Fetch into the consumer's queue, with the positions that belong to exactly these records."""
        await self.call_thread(self._fetch, timeout_seconds)

    async def _fetch(self, timeout_seconds: float) -> None:
        kafka = self._ensure_consumer()
        fetcher = kafka._fetcher
        if kafka._closed or fetcher._closed:
            raise ConsumerStoppedError
        _look_after(kafka)
        ownership = self.consumer.ownership
        with fetcher._subscriptions.fetch_context():  # even for nothing: aiokafka must not take us for dead
            if ownership is None or not self.consumer.flow_active:
                return
            fetchable = self.consumer.delivery.fetchable(ownership.beginnings)
            places = {KafkaPartition(*place) for place in fetchable}
            if not places:
                return
            self._begin(kafka, ownership)
            self._hold_positions(kafka)
            if is_paused := len(places) < len(ownership.beginnings):
                timeout_seconds = min(timeout_seconds, PAUSED_FETCH_WAIT_MILLISECONDS / 1000)
            _pace(fetcher, is_paused=is_paused, is_busy=self.consumer.delivery.open_records >= BUSY_RECORDS)
            try:
                records = await self._drain(fetcher, places, timeout_seconds)
            except KafkaError as error:
                self._go_back(kafka)
                log.warning("broker trouble while reading, trying again", error=repr(error))
                await asyncio.sleep(RETRY_SECONDS)
                return
        # No await from here on: positions and records must be of one moment.
        if not self.consumer.flow_active or ownership is not self.consumer.ownership:
            # The wait above can outlast a rebalance. These will not be passed on: go back.
            for partition, fetched in records.items():
                kafka.seek(partition, fetched[0].offset)
            return
        positions = _positions(kafka)
        self._held.update(positions)
        self.consumer.fetches.append(Fetch(ownership, records, positions))

    async def _drain(
        self, fetcher: aiokafka_fetcher.Fetcher, places: set[KafkaPartition], timeout_seconds: float
    ) -> dict[KafkaPartition, list[ConsumerRecord]]:
        """Take what was fetched from these partitions, real-time first; wait for something if there is nothing."""
        urgent = {place for place in places if lane_of(place.topic) == "realtime"}
        most = max(1, min(MAX_POLL_RECORDS, int(MAX_POLL_BYTES / self._usual_bytes)))
        records: dict[KafkaPartition, list[ConsumerRecord]] = {}
        if urgent:  # to aiokafka, none would mean all
            records |= await fetcher.fetched_records(urgent, timeout=0, max_records=most)
        if others := places - urgent if records else places:
            timeout = 0.0 if records else timeout_seconds
            records |= await fetcher.fetched_records(others, timeout=timeout, max_records=most)
        sizes = [len(record.value or b"") for fetched in records.values() for record in fetched]
        if sizes:
            self._usual_bytes += (sum(sizes) / len(sizes) - self._usual_bytes) * USUAL_BYTES_WEIGHT
        return records

    def _begin(self, kafka: AIOKafkaConsumer, ownership: Ownership) -> None:
        """Go where an ownership begins, before its first fetch; what was fetched before is dropped."""
        if self._begun is ownership:
            return
        self._begun = ownership
        self._held.clear()
        self._went_back.clear()
        for place, offset in ownership.beginnings.items():
            if (partition := KafkaPartition(*place)) in kafka.assignment():
                kafka.seek(partition, offset)
                self._held[partition] = offset

    def _go_back(self, kafka: AIOKafkaConsumer) -> None:
        """Drop what a failed fetch had drained from some partitions before it failed at another."""
        for partition, position in _positions(kafka).items():
            if position > self._held.get(partition, position):
                kafka.seek(partition, self._held[partition])

    def _hold_positions(self, kafka: AIOKafkaConsumer) -> None:
        """Go back where a position moved on without a fetch of ours, so that nothing is skipped.

        It may only happen when retention deleted what we were to read next; then going back changes nothing
        and the new position is taken (`Delivery.fetched` notes the gap, `observe_ends` counts it).
        """
        for partition, position in _positions(kafka).items():
            held = self._held.get(partition)
            if held is None or position <= held:
                continue
            log.error("a fetch position moved by itself", **_named(partition), offset=held, position=position)
            if self._went_back.get(partition) != held:
                self._went_back[partition] = held
                kafka.seek(partition, held)
            else:
                self._held[partition] = position

    async def commit_marked(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        """Commit offsets with metadata.

        Raises:
            DependencyError: no answer in time.
        """
        result: CommitResult = await self._ask(self._commit_marked, offsets)
        return result

    async def _commit_marked(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        wanted = {KafkaPartition(*place): OffsetAndMetadata(*value) for place, value in offsets.items()}
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._ensure_consumer().commit(wanted)
        except (CommitFailedError, IllegalStateError):
            return "refused"
        except (KafkaError, TimeoutError) as error:
            raise DependencyError(f"Kafka does not take commits: {error or 'no answer'}") from error
        return "ok"

    async def starts(self, places: Iterable[TopicPartition]) -> dict[TopicPartition, Start]:
        """Ask Kafka where partitions begin, end and were left.

        Raises:
            DependencyError: no answer in time.
        """
        found: dict[TopicPartition, Start] = await self._ask(self._starts, list(places))
        return found

    async def _ask(self, method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Call a method in the thread.

        Raises:
            DependencyError: the thread stops meanwhile. It cancels what it was asked, and mode hands that on as if
                the caller were cancelled; passed on, that would end aiokafka's coordination, and with it the
                thread, before anybody is told that it has stopped.
        """
        try:
            return await self.call_thread(method, *args)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise DependencyError("the Kafka consumer was closed") from None

    async def _starts(self, places: list[TopicPartition]) -> dict[TopicPartition, Start]:
        kafka = self._ensure_consumer()
        partitions = [KafkaPartition(*place) for place in places]
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                committed = await kafka._coordinator.fetch_committed_offsets(partitions)
                beginnings = await kafka.beginning_offsets(partitions)
                ends = await kafka.end_offsets(partitions)
        except (KafkaError, TimeoutError) as error:
            reason = f"Kafka does not say where partitions begin: {error or 'no answer'}"
            raise DependencyError(reason) from error
        starts = {}
        for place, partition in zip(places, partitions, strict=True):
            left = committed.get(partition)
            known = left is not None and left.offset >= 0
            if known and left.offset > ends[partition]:
                # The topic was created again, or its log was cut off: what it holds now was never read.
                log.error("the committed offset is beyond the end", **_named(place), committed=left.offset)
                known = False
            starts[place] = Start(
                committed=left.offset if known else None,
                metadata=(left.metadata or "") if known else "",
                beginning=beginnings[partition],
                end=ends[partition],
            )
        return starts


def _pace(fetcher: aiokafka_fetcher.Fetcher, *, is_paused: bool, is_busy: bool) -> None:
    """Say how long the next fetch waits, and for how much.

    A lane that is paused, whose records lie fetched and not taken, must not hold up the other one: a fetch asks for
    the partitions of which nothing lies here, and aiokafka puts it off for as long as anything does. It must end
    soon, for meanwhile the paused lane may read on. Else a step with nothing to do gets what there is at once, and
    a busy one what came within a moment.
    """
    backoff, least, wait = PREFETCH_BACKOFF_SECONDS, 1, FETCH_WAIT_MILLISECONDS
    if is_paused:
        backoff, wait = 0.0, PAUSED_FETCH_WAIT_MILLISECONDS
    elif is_busy:
        least, wait = BUSY_FETCH_BYTES, BUSY_FETCH_WAIT_MILLISECONDS
    fetcher._prefetch_backoff, fetcher._fetch_min_bytes, fetcher._fetch_max_wait_ms = backoff, least, wait


def _look_after(kafka: AIOKafkaConsumer) -> None:
    """Let the group's coordination go on after an error it reported, as aiokafka's unused `getmany` does.

    Until someone looks it stands still: no rebalance is joined any more, whatever the heartbeats say.

    Raises:
        FatalError: one of aiokafka's own tasks has ended; nothing would ever be fetched or joined again.
    """
    for task in (kafka._coordinator._coordination_task, kafka._fetcher._fetch_task):
        if task.done():
            reason = "cancelled" if task.cancelled() else repr(task.exception())
            raise FatalError(f"a task of the Kafka consumer ended: {reason}")
    try:
        kafka._coordinator.check_errors()
    except KafkaError as error:
        log.warning("trouble with the consumer group, trying again", error=repr(error))


def _named(place: TopicPartition | KafkaPartition) -> dict[str, Any]:
    topic, number = place
    return {"topic": topic, "partition": number}


def _positions(kafka: AIOKafkaConsumer) -> dict[KafkaPartition, int]:
    subscription = kafka._subscription.subscription
    assignment = subscription.assignment if subscription else None
    if assignment is None:
        return {}
    states = {partition: assignment.state_value(partition) for partition in assignment.tps}
    return {tp: state.position for tp, state in states.items() if state and state.has_valid_position}
