"""The bridge to Faust: a transport whose consumer leaves delivery to `delivery.py`.

Stock Faust decides from acknowledgements what to commit, and can lose records in several ways
(docs/decisions/0002-faust-bridge.md). Here it keeps what it is good at (group membership, rebalancing,
agents) and loses the rest: what was fetched is opened in the ledger inside the fetch, offsets come from
the ledger alone, acknowledgements through Faust mean nothing, and partitions are handed over before Faust
forgets them. `tests/unit/test_faust_canary.py` fails when the internals used here change.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.subscription_state import IllegalStateError
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, KafkaError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata
from aiokafka.structs import TopicPartition as KafkaPartition
from faust.transport.consumer import Fetcher
from faust.transport.drivers import aiokafka as driver
from faust.transport.producer import Producer

from agents.delivery import CommitResult, Delivery, Start, TopicPartition
from pipeline import logs
from pipeline.connections import client_options
from pipeline.errors import DependencyError
from pipeline.readers import to_record
from pipeline.settings import Settings
from pipeline.topics import MAX_DEAD_LETTER_RECORD_BYTES

log = logs.get(__name__)

# One answer to a fetch; a record that is larger alone still comes.
MAX_FETCH_BYTES = 32 * 1024 * 1024
MAX_PARTITION_FETCH_BYTES = MAX_DEAD_LETTER_RECORD_BYTES
# Records handed over from one fetch at a time, so that pausing a lane takes effect soon.
MAX_POLL_RECORDS = 500
# Commits and look-ups inside a hand-over must leave time for others within the rebalance timeout.
REQUEST_SECONDS = 10.0
# Faust's own consumer asks for this; half as long halves the wait of a lone record for an empty fetch.
FETCH_WAIT_MILLISECONDS = 500
# Without it aiokafka leaves the group after five minutes without records; a day is "never" with a margin.
MAX_POLL_INTERVAL_MILLISECONDS = 24 * 3600 * 1000


@dataclass(frozen=True)
class _Fetch:
    generation: int
    records: Mapping[KafkaPartition, list[ConsumerRecord]]
    positions: Mapping[KafkaPartition, int]


class LedgerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """The thread that owns the aiokafka consumer; heartbeats go on here whatever the main loop does."""

    consumer: "LedgerConsumer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[KafkaPartition, int] = {}  # where the next fetch must begin
        self._went_back: dict[KafkaPartition, int] = {}

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
            heartbeat_interval_ms=int(min(3.0, settings.session_timeout_seconds / 4) * 1000),
            metadata_max_age_ms=30_000,
        )

    async def fetch(self, timeout_seconds: float) -> None:
        """Fetch into the consumer's queue, with the positions that belong to exactly these records."""
        await self.call_thread(self._fetch, timeout_seconds)

    async def _fetch(self, timeout_seconds: float) -> None:
        kafka = self._ensure_consumer()
        fetcher = kafka._fetcher
        if kafka._closed or fetcher._closed:
            raise ConsumerStoppedError
        owned = ((tp.topic, tp.partition) for tp in kafka.assignment())
        places = {KafkaPartition(*place) for place in self.consumer.delivery.fetchable(owned)}
        self._hold_positions(kafka)
        generation = self.app.consumer_generation_id
        with fetcher._subscriptions.fetch_context():  # even for nothing: aiokafka must not take us for dead
            if not self.consumer.flow_active or not places:
                return
            records = await fetcher.fetched_records(
                places, timeout=timeout_seconds, max_records=MAX_POLL_RECORDS
            )
        # No await from here on: positions and records must be of one moment.
        if not self.consumer.flow_active or generation != self.app.consumer_generation_id:
            # The wait above can outlast a rebalance and its seek. These will not be passed on: go back.
            for partition, fetched in records.items():
                kafka.seek(partition, fetched[0].offset)
            return
        positions = _positions(kafka)
        self._held.update(positions)
        self.consumer.fetches.append(_Fetch(generation, records, positions))

    def _hold_positions(self, kafka: AIOKafkaConsumer) -> None:
        """Go back where a position moved on without a fetch of ours, so that nothing is skipped.

        It may only happen when retention deleted what we were to read next; then going back changes nothing
        and the new position is taken (the loss is counted by `Delivery.observe_ends`).
        """
        for partition, position in _positions(kafka).items():
            held = self._held.get(partition)
            if held is None or position <= held:
                continue
            place = {"topic": partition.topic, "partition": partition.partition, "offset": held}
            log.error("a fetch position moved by itself", **place, position=position)
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
        result: CommitResult = await self.call_thread(self._commit_marked, offsets)
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
        found: dict[TopicPartition, Start] = await self.call_thread(self._starts, list(places))
        return found

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
            starts[place] = Start(
                committed=left.offset if known else None,
                metadata=(left.metadata or "") if known else "",
                beginning=beginnings[partition],
                end=ends[partition],
            )
        return starts

    async def seek_to(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Set fetch positions; what was fetched before is dropped."""
        await self.call_thread(self._seek_to, offsets)

    async def _seek_to(self, offsets: Mapping[TopicPartition, int]) -> None:
        kafka = self._ensure_consumer()
        self._held.clear()
        for place, offset in offsets.items():
            if (partition := KafkaPartition(*place)) in kafka.assignment():
                kafka.seek(partition, offset)
                self._held[partition] = offset


class LedgerConsumer(driver.Consumer):  # type: ignore[misc]
    """Faust's consumer with delivery taken out of its hands."""

    _thread: LedgerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delivery: Delivery = self.app.delivery
        # Filled by the thread inside the fetch: a cancelled wait cannot lose records that moved the position.
        self.fetches: deque[_Fetch] = deque()
        self._starts: dict[TopicPartition, Start] = {}

    def _new_consumer_thread(self) -> LedgerThread:
        return LedgerThread(self, loop=self.loop, beacon=self.beacon)

    # Reading: the ledger opens records before Faust's flow control or buffers can drop them

    async def _drain_messages(self, fetcher: Fetcher) -> None:
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active:
                    await self.wait(self.can_resume_flow)
                elif not self.delivery.fetchable((tp.topic, tp.partition) for tp in self.assignment()):
                    await self._thread.fetch(0)
                    await self.delivery.wait_for_room(timeout_seconds=1.0)
                else:
                    await self._thread.fetch(1.0)
                while self.fetches:
                    await self._pass_on(self.fetches.popleft())
        except (ConsumerStoppedError, asyncio.CancelledError):
            if not self.app.should_stop:
                raise

    async def _pass_on(self, fetch: _Fetch) -> None:
        if not self.flow_active:
            return  # a rebalance has begun: `perform_seek` will set new positions before the flow resumes
        for tp in fetch.positions.keys() | fetch.records.keys():
            given = [to_record(record) for record in fetch.records.get(tp, ())]
            opened = self.delivery.fetched(
                (tp.topic, tp.partition), fetch.generation, given, fetch.positions.get(tp)
            )
            new = {record.offset for record in opened}
            for record in fetch.records.get(tp, ()):
                if record.offset not in new:
                    continue
                if not self.flow_active or self.app.consumer_generation_id != fetch.generation:
                    break  # being handed over: the next owner fetches the rest again
                await self.callback(self._to_message(tp, record))

    async def perform_seek(self) -> None:
        """Go to where this ownership begins, offset 0 included (Faust's own skips that)."""
        owned = {(tp.topic, tp.partition) for tp in self.assignment()}
        await self._thread.seek_to(
            {
                place: start.beginning if start.committed is None else max(start.committed, start.beginning)
                for place, start in self._starts.items()
                if place in owned
            }
        )

    # Acknowledging: the ledger's business alone

    def track_message(self, message: Any) -> None:
        """Track nothing: the ledger does."""

    def ack(self, message: Any) -> bool:
        """Ignore Faust's acknowledgements: some are sent for records that failed."""
        return False

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit what the ledger says is finished."""
        return await self.delivery.commit()

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit what the ledger says is finished."""
        return await self.delivery.commit()

    async def wait_empty(self) -> None:
        """Return at once: `hand_over` has already waited, with a deadline."""

    def verify_event_path(self, now: float, tp: Any) -> None:
        """Check nothing: it would warn about acknowledgements that never pass through Faust."""

    # Ownership

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        """Hand over before the base class forgets anything."""
        self.stop_flow()
        self.app.flow_control.suspend()
        deadline_seconds = self.app.settings.rebalance_timeout_seconds * 0.8 - REQUEST_SECONDS
        await self.delivery.hand_over(
            [(tp.topic, tp.partition) for tp in revoked], deadline_seconds=max(deadline_seconds, 1.0)
        )
        await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[Any], generation_id: int = 0) -> None:
        """Open a ledger for each partition, then let Faust go on."""
        places = [(tp.topic, tp.partition) for tp in assigned]
        self._starts = {}
        while places and not self.should_stop:
            try:
                self._starts = await self._thread.starts(places)
                break
            except DependencyError as error:
                log.warning("waiting for the broker to say where partitions begin", reason=error.message)
                await self.sleep(1.0)
        self.delivery.assigned(self._starts, generation_id)
        await self.delivery.mark_started(self._starts)
        await super().on_partitions_assigned(assigned, generation_id)

    # What the process wants to know

    async def starts(self) -> dict[TopicPartition, Start]:
        """Ask where the owned partitions begin and end now."""
        return await self._thread.starts([(tp.topic, tp.partition) for tp in self.assignment()])

    def is_member(self) -> bool:
        """Whether the broker counts this worker as a member of its group."""
        kafka = self._thread._consumer
        return kafka is not None and kafka._coordinator is not None and kafka._coordinator.generation > 0


class Committer:
    """Commits through the app's consumer, once there is one."""

    def __init__(self) -> None:
        self.app: faust.App | None = None

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        """Commit; see `agents.delivery.Committer`."""
        if self.app is None:
            return "refused"
        thread: LedgerThread = self.app.consumer._thread
        # Twice the inner limit: the thread's queue may be busy with a fetch first.
        try:
            return await asyncio.wait_for(thread.commit_marked(offsets), 2 * REQUEST_SECONDS)
        except TimeoutError:
            raise DependencyError("Kafka does not take commits: no answer") from None


class NoProducer(Producer):  # type: ignore[misc]
    """Faust publishes nothing here: outputs go through `pipeline.broker.Publisher`, which awaits them."""

    async def flush(self) -> None:
        """Flush nothing."""

    def supports_headers(self) -> bool:
        """Headers are supported."""
        return True


class LedgerTransport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport with our consumer and no producer."""

    Consumer = LedgerConsumer
    Producer = NoProducer


class StepApp(faust.App):  # type: ignore[misc]
    """One step's Faust app: its id is the consumer group."""

    def __init__(self, step_name: str, settings: Settings, delivery: Delivery, *, datadir: str) -> None:
        self.step_name = step_name
        self.settings = settings
        self.delivery = delivery
        super().__init__(
            settings.group(step_name),
            broker=[f"kafka://{server}" for server in settings.resolved_kafka.split(",")],
            autodiscover=False,
            datadir=datadir,
            web_enabled=False,
            key_serializer="raw",
            value_serializer="raw",
            store="memory://",
            processing_guarantee="at_least_once",
            broker_commit_interval=settings.commit_interval_seconds,
            # Above every other timeout: aiokafka's requests must not give up before the group does.
            broker_request_timeout=max(90.0, settings.session_timeout_seconds + 5),
            broker_session_timeout=settings.session_timeout_seconds,
            broker_rebalance_timeout=settings.rebalance_timeout_seconds,
            stream_buffer_maxsize=4096,
            stream_wait_empty=False,
            table_standby_replicas=0,
            topic_disable_leader=True,
            topic_allow_declare=False,
            worker_redirect_stdouts=False,
        )

    def _new_transport(self) -> LedgerTransport:
        return LedgerTransport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> LedgerTransport:
        return LedgerTransport(self.conf.broker_producer, self)

    def read(self, topic: str) -> None:
        """Add the agent that reads one topic; it never waits and never raises."""

        async def read(stream: Any) -> None:
            async for event in stream.noack().events():
                message = event.message
                place = (message.topic, message.partition)
                self.delivery.received(place, message.generation_id, message.offset)

        name = f"read-{topic}"
        self.agent(self.topic(topic, key_type=bytes, value_type=bytes), name=name, concurrency=1)(read)


def _positions(kafka: AIOKafkaConsumer) -> dict[KafkaPartition, int]:
    subscription = kafka._subscription.subscription
    assignment = subscription.assignment if subscription else None
    if assignment is None:
        return {}
    states = {partition: assignment.state_value(partition) for partition in assignment.tps}
    return {tp: state.position for tp, state in states.items() if state and state.has_valid_position}
