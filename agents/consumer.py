"""The bridge to Faust: a transport whose consumer leaves delivery to `delivery.py`.

Stock Faust decides from acknowledgements what to commit, and can lose records in several ways
(docs/decisions/0002-faust-bridge.md). Here it keeps what it is good at (group membership, rebalancing,
agents) and loses the rest: what was fetched is opened in the ledger inside the fetch, offsets come from
the ledger alone, acknowledgements through Faust mean nothing, and partitions are handed over before Faust
forgets them. `tests/unit/test_faust_canary.py` fails when the internals used here change.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import faust
from aiokafka.errors import ConsumerStoppedError
from aiokafka.structs import TopicPartition as KafkaPartition
from faust.transport.consumer import Fetcher
from faust.transport.drivers import aiokafka as driver
from faust.transport.producer import Producer

from agents.delivery import CommitResult, Delivery, Start, TopicPartition
from agents.kafka_thread import REQUEST_SECONDS, Fetch, LedgerThread, Ownership
from pipeline import logs
from pipeline.errors import DependencyError
from pipeline.readers import to_record
from pipeline.settings import Settings
from pipeline.topics import lane_of

log = logs.get(__name__)


def _is_bulk(partition: KafkaPartition) -> bool:
    return lane_of(partition.topic) == "bulk"


class LedgerConsumer(driver.Consumer):  # type: ignore[misc]
    """Faust's consumer with delivery taken out of its hands."""

    _thread: LedgerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delivery: Delivery = self.app.delivery
        # Filled by the thread inside the fetch: a cancelled wait cannot lose records that moved the position.
        self.fetches: deque[Fetch] = deque()
        # Set when everything is ready for it, None from the moment it is taken away; read by the thread.
        self.ownership: Ownership | None = None

    def _new_consumer_thread(self) -> LedgerThread:
        return LedgerThread(self, loop=self.loop, beacon=self.beacon)

    # Reading: the ledger opens records before Faust's flow control or buffers can drop them

    async def _drain_messages(self, fetcher: Fetcher) -> None:
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active:
                    await self.wait(self.can_resume_flow, timeout=1.0)
                    await self._thread.fetch(0)  # reads nothing yet, but looks after aiokafka
                elif self.ownership is None:
                    # Faust may resume the flow for a generation that is already over.
                    await self.sleep(0.1)
                    await self._thread.fetch(0)
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

    async def _pass_on(self, fetch: Fetch) -> None:
        if not self.flow_active or fetch.ownership is not self.ownership:
            return  # a rebalance has begun: the next ownership's first fetch goes to its beginning
        generation = fetch.ownership.generation
        # What somebody waits for does not wait for the rest of its fetch.
        for tp in sorted(fetch.positions.keys() | fetch.records.keys(), key=_is_bulk):
            given = [to_record(record) for record in fetch.records.get(tp, ())]
            opened = self.delivery.fetched(
                (tp.topic, tp.partition), generation, given, fetch.positions.get(tp)
            )
            if not opened:
                continue
            if not self.flow_active or fetch.ownership is not self.ownership:
                return  # being handed over: the next owner fetches the rest again
            # One event for all of them: the way through Faust costs 50 microseconds, whatever it carries.
            await self.callback(self._to_message(tp, fetch.records[tp][-1]))

    async def perform_seek(self) -> None:
        """Seek nothing: an ownership's first fetch does, whenever Faust resumes the flow, and for whom."""

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
        self.ownership = None
        self.stop_flow()
        self.app.flow_control.suspend()
        deadline_seconds = self.app.settings.rebalance_timeout_seconds * 0.8 - REQUEST_SECONDS
        async with self._crashing():
            await self.delivery.hand_over(
                [(tp.topic, tp.partition) for tp in revoked], deadline_seconds=max(deadline_seconds, 1.0)
            )
            await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[Any], generation_id: int = 0) -> None:
        """Open a ledger for each partition, then let Faust go on."""
        async with self._crashing():
            await self._own(assigned, generation_id)
            await super().on_partitions_assigned(assigned, generation_id)

    async def _own(self, assigned: set[Any], generation_id: int) -> None:
        places = [(tp.topic, tp.partition) for tp in assigned]
        starts: dict[TopicPartition, Start] = {}
        while places and not self.should_stop:
            try:
                starts = await self._thread.starts(places)
                break
            except DependencyError as error:
                log.warning("waiting for the broker to say where partitions begin", reason=error.message)
                await self.sleep(1.0)
        self.delivery.assigned(starts, generation_id)
        await self.delivery.mark_started(starts)
        self.ownership = Ownership(generation_id, {place: start.first for place, start in starts.items()})

    @contextlib.asynccontextmanager
    async def _crashing(self) -> AsyncIterator[None]:
        """End the worker when the body fails: aiokafka only logs it, and stays a member that reads nothing."""
        try:
            yield
        except Exception as error:
            await self.crash(error)
            raise

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
        """Commit; see `agents.commits.Committer`."""
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
        """Add the agent that reads one topic; it never waits and never raises.

        An event stands for all records of a partition up to its own: the ledger holds what was fetched.
        """

        async def read(stream: Any) -> None:
            async for event in stream.noack().events():
                message = event.message
                place = (message.topic, message.partition)
                self.delivery.received(place, message.generation_id, message.offset)

        name = f"read-{topic}"
        self.agent(self.topic(topic, key_type=bytes, value_type=bytes), name=name, concurrency=1)(read)
