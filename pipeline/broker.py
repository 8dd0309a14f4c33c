"""The door to Kafka: an idempotent producer that replaces itself; readers, topics and lag beside it.

`connections.py` reaches the brokers, `readers.py` reads without a consumer group, `admin.py` knows topics and
lag. The invariant: a record counts as published only when every in-sync replica has it; everything else is an
error the caller sees.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from pipeline import logs, metrics
from pipeline.admin import (
    PartitionLag,
    TopicChange,
    TopicState,
    apply_topics,
    describe_topics,
    lag,
)
from pipeline.connections import (
    CONNECT_SECONDS,
    UnreachableError,
    backoff_seconds,
    client_options,
    ping,
    unreachable,
)
from pipeline.errors import DependencyError, RecordTooLargeError
from pipeline.events import Outgoing
from pipeline.readers import LiveReader, read_back
from pipeline.settings import PREFIX, Settings
from pipeline.topics import MAX_DEAD_LETTER_RECORD_BYTES

__all__ = [
    "LiveReader",
    "PartitionLag",
    "Place",
    "Publisher",
    "TopicChange",
    "TopicState",
    "apply_topics",
    "client_options",
    "describe_topics",
    "lag",
    "ping",
    "read_back",
]

# The largest record any topic allows, with what the record format adds; brokers set the limit per topic.
MAX_REQUEST_BYTES = MAX_DEAD_LETTER_RECORD_BYTES + 16 * 1024
# A quarter of the smallest topic limit: a batch of small records is never refused for its size.
MAX_BATCH_BYTES = 256 * 1024
# One produce request carries a batch per partition and must stay below the broker's
# socket.request.max.bytes (100 MB): above it the broker cuts the connection, again on every retry.
MAX_UNACKNOWLEDGED_BYTES = 64 * 1024 * 1024
REQUEST_SECONDS = 30.0
_REFUSED_FOR_SIZE = (MessageSizeTooLargeError, RecordListTooLargeError)
_REFUSED_FOR_RIGHTS = (TopicAuthorizationFailedError, ClusterAuthorizationFailedError, InvalidTopicError)

_log = logs.get(__name__)


class Place(msgspec.Struct, frozen=True):
    """Where the broker put a record; the offset is -1 if it only remembers that it has the record."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int


class _Connection:
    """One aiokafka producer, the topics it has seen, and whether it was given up."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self.producer = producer
        self.topics: set[str] = set()
        #: Sent and not yet acknowledged, or about to be; cancelled when this producer will never send them.
        self.unacknowledged: set[asyncio.Future[Any]] = set()

    async def require(self, topic: str) -> None:
        """Refuse a topic that does not exist: aiokafka would wait for it, or have it created with defaults.

        Raises:
            DependencyError: with the way out.
        """
        if topic in self.topics:
            return
        for wait in (0.1, 0.3, 0.6, 0.0):  # a topic created a moment ago reaches all brokers within this
            cluster = await self.producer.client.fetch_all_metadata()
            if cluster.partitions_for_topic(topic):
                self.topics.add(topic)
                return
            await asyncio.sleep(wait)
        raise DependencyError(
            f"topic {topic} does not exist or may not be seen: run `millrace topics apply`, "
            f"check {PREFIX}TOPIC_PREFIX"
        )

    async def unless_closed(
        self, sending: "Coroutine[Any, Any, asyncio.Future[Any]]"
    ) -> "asyncio.Future[Any] | None":
        """Hand a record over when the topic's metadata has to come first; None if this producer is closed before.

        A closed aiokafka client never says that the metadata will not come.
        """
        task = asyncio.ensure_future(sending)
        self.unacknowledged.add(task)
        task.add_done_callback(self.unacknowledged.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        return None if task.cancelled() else task.result()

    async def close(self, seconds: float) -> None:
        """Flush for at most `seconds`, then drop what is left and release everything."""
        stopping = asyncio.ensure_future(self.producer.stop())
        done, _ = await asyncio.wait({stopping}, timeout=seconds)
        if not done:
            # stop() flushes for ever while the broker is away; it goes on when the sender has ended.
            sender = self.producer._sender.sender_task
            if sender is not None:
                sender.cancel()
            done, _ = await asyncio.wait({stopping}, timeout=2.0)
        if not done:
            stopping.cancel()
            await asyncio.wait({stopping})
            await self.producer.client.close()
        elif not stopping.cancelled() and (error := stopping.exception()):
            _log.debug("producer ended with an error", error=repr(error))
        for future in tuple(self.unacknowledged):
            future.cancel()


class Publisher:
    """Publish records and wait for the broker's acknowledgement; safe to share between tasks.

    Concurrent publishers share batches. A producer that became unusable (a sequence gap, fencing, a dead
    sender: aiokafka #1017) is replaced, and records it did not deliver are sent again by the new one.
    """

    def __init__(
        self, settings: Settings, *, client_id: str, linger_ms: int = 2, timeout_seconds: float = 30.0
    ) -> None:
        self._settings = settings
        self._client_id = client_id
        self._linger_ms = linger_ms
        self._timeout_seconds = timeout_seconds
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._held_bytes = 0
        self._room = asyncio.Event()

    async def start(self, *, wait: bool = True) -> None:
        """Connect; with `wait`, for as long as it takes a broker to answer.

        Raises:
            ConfigurationError: TLS or SASL files cannot be used.
            DependencyError: no broker answers, without `wait`.
        """
        for delay in backoff_seconds():
            try:
                await self._connect()
                return
            except DependencyError as error:
                if not wait:
                    raise
                _log.warning("waiting for the broker", error=error.message)
                await asyncio.sleep(delay)

    async def stop(self, timeout_seconds: float = 10.0) -> None:
        """Send what is still held, for at most `timeout_seconds`; later publishes are refused."""
        self._stopped = True
        if self._connection is not None:
            self._give_up(self._connection, timeout_seconds)
        if self._closing:
            await asyncio.wait(self._closing, timeout=timeout_seconds + 3.0)

    async def publish(self, topic: str, outgoing: Outgoing) -> Place:
        """Publish and return when the broker has the record; `topic` is the name on the broker.

        Raises:
            RecordTooLargeError: client or broker refuse the size.
            DependencyError: not acknowledged in time; it may still arrive, a repeat may add a second copy.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._deliver(topic, outgoing)
        except TimeoutError:
            raise DependencyError(
                f"no Kafka broker at {self._settings.resolved_kafka} acknowledged a record for {topic} "
                f"within {self._timeout_seconds:g} s"
            ) from None

    async def publish_forever(
        self, topic: str, outgoing: Outgoing, *, step: str, partition: int | None = None
    ) -> Place:
        """Publish, waiting out every failure of the broker; a record that waits is not sent twice.

        Without `partition` the key decides.

        Raises:
            RecordTooLargeError: client or broker refuse the size.
        """
        delays = backoff_seconds()
        while True:
            with self._telling(topic, step):
                try:
                    return await self._deliver(topic, outgoing, partition)
                except DependencyError as error:
                    if self._stopped:
                        raise
                    metrics.RETRIES.labels(step, "broker").inc()
                    _log.warning("publishing again", topic=topic, error=error.message)
            await asyncio.sleep(next(delays))

    @contextmanager
    def _telling(self, topic: str, step: str) -> Iterator[None]:
        """Say now and then that a record still waits; a timer, as every record passes here."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def tell() -> None:
            nonlocal timer
            metrics.RETRIES.labels(step, "broker").inc()
            _log.warning("still waiting for the broker's acknowledgement", topic=topic)
            timer = loop.call_later(self._timeout_seconds, tell)

        timer = loop.call_later(self._timeout_seconds, tell)
        try:
            yield
        finally:
            timer.cancel()

    async def _deliver(self, topic: str, outgoing: Outgoing, partition: int | None = None) -> Place:
        """Send until acknowledged or refused, by as many producers as it takes."""
        size = record_bytes(outgoing)
        while self._held_bytes and self._held_bytes + size > MAX_UNACKNOWLEDGED_BYTES:
            self._room.clear()
            await self._room.wait()
        self._held_bytes += size
        try:
            for delay in backoff_seconds(longest=2.0):
                try:
                    connection = await self._connect()
                    place = await self._try(connection, topic, outgoing, size, partition)
                    if place is not None:
                        return place
                except (KafkaError, OSError, TimeoutError, UnreachableError) as error:
                    _log.warning("broker trouble while publishing", topic=topic, error=repr(error))
                    await asyncio.sleep(delay)
            raise AssertionError("backoff_seconds never ends")
        finally:
            self._held_bytes -= size
            self._room.set()

    async def _try(
        self, connection: _Connection, topic: str, outgoing: Outgoing, size: int, partition: int | None
    ) -> Place | None:
        """Send by one producer; None when it was given up before the record arrived."""
        await connection.require(topic)
        timestamp_ms = time.time_ns() // 1_000_000
        # aiokafka refuses a record without key and value; an empty value reads the same to every step.
        value = b"" if outgoing.key is None and outgoing.value is None else outgoing.value
        sending = connection.producer.send(
            topic,
            value,
            outgoing.key,
            partition,
            timestamp_ms=timestamp_ms,
            headers=list(outgoing.headers),
        )
        try:
            if connection.producer.client.cluster.partitions_for_topic(topic) is not None:
                future = await sending
            elif (future := await connection.unless_closed(sending)) is None:
                return None
        except MessageSizeTooLargeError:
            raise RecordTooLargeError(
                f"the record has {size:,} bytes, no topic takes more than {MAX_REQUEST_BYTES:,}"
            ) from None
        except KafkaError:
            self._give_up(connection)
            raise
        connection.unacknowledged.add(future)
        future.add_done_callback(connection.unacknowledged.discard)
        future.add_done_callback(_retrieve)
        await asyncio.wait({future})
        if future.cancelled():
            return None
        error = future.exception()
        if error is None:
            sent = future.result()
            # Type 1: the broker stamped it. Else aiokafka gives the time of the batch's first record.
            stamped = sent.timestamp if sent.timestamp_type == 1 else timestamp_ms
            return Place(topic, sent.partition, sent.offset, stamped)
        # aiokafka never takes back the sequence number of a batch that failed (Java does), so the next
        # batch for that partition would be out of order: this producer is used up.
        self._give_up(connection)
        if isinstance(error, _REFUSED_FOR_SIZE):
            raise RecordTooLargeError(
                f"the broker refuses a record of {size:,} bytes for topic {topic}"
            ) from None
        if isinstance(error, _REFUSED_FOR_RIGHTS):
            raise DependencyError(f"the broker refuses records for topic {topic}: {error!r}") from None
        raise error

    async def _connect(self) -> _Connection:
        """Return the current producer, or make one.

        Raises:
            DependencyError: no broker answers, or this publisher was stopped.
        """
        async with self._connecting:
            if self._stopped:
                raise DependencyError("this publisher was stopped")
            if self._connection is None:
                self._connection = await self._open()
            return self._connection

    async def _open(self) -> _Connection:
        producer = AIOKafkaProducer(
            **client_options(self._settings),
            client_id=self._client_id,
            enable_idempotence=True,
            acks="all",
            linger_ms=self._linger_ms,
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            request_timeout_ms=int(REQUEST_SECONDS * 1000),
        )
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await producer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await producer.stop()
            raise unreachable(self._settings, error) from None
        except BaseException:
            await producer.stop()
            raise
        return _Connection(producer)

    def _give_up(self, connection: _Connection, seconds: float = REQUEST_SECONDS) -> None:
        """Use the producer no more, but let it deliver what it holds."""
        if connection is not self._connection:
            return
        self._connection = None
        task = asyncio.ensure_future(connection.close(seconds))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def record_bytes(outgoing: Outgoing) -> int:
    """Count key, value and headers, as a publisher thinks of a record's size."""
    headers = sum(len(name.encode()) + len(value or b"") for name, value in outgoing.headers)
    return len(outgoing.key or b"") + len(outgoing.value or b"") + headers


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Mark an error as seen: the caller may have stopped waiting, and asyncio would log it as forgotten."""
    if not future.cancelled():
        future.exception()
