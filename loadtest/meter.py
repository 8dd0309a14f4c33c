"""The measuring of one worker from outside: how fast it empties a topic, how long a picture takes.

It takes addresses: Kafka from the settings, under which a worker runs, and the address of the worker's HTTP site.

Offline: pictures are preloaded into the bulk lane in one transaction, so that the worker sees all of them at
the moment of its commit; the clock runs from there until a reader has seen the last prediction.
Online: pictures are published at seeded arrivals, whatever the worker does; the latency of each runs from its
publication until a reader has seen its prediction.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from loadtest.drive import arrivals, paced
from loadtest.report import CpuSeconds, Timing, read_metrics
from pipeline import deadletters, events
from pipeline.broker import MAX_BATCH_BYTES, MAX_REQUEST_BYTES, LiveReader
from pipeline.connections import client_options
from pipeline.errors import DependencyError
from pipeline.events import Record
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, LANES, PREDICTIONS, Lane

# Without any outcome for so long, the rest is not coming.
QUIET_SECONDS = 60.0
# A transaction may stay open this long, the most that a broker allows unless told otherwise: 100,000 pictures
# take a minute or two.
TRANSACTION_SECONDS = 900.0
# A produce request of one picture costs client and broker 2.1 ms of processor time together, with four in it 1.2 ms
# each. Kafka's own clients wait 5 ms for company since 4.0.
TOGETHER_SECONDS = 0.01
# What is published at once while preloading: below the producer's own limits.
PRELOAD_RECORDS = 200


class Outcomes:
    """What a reader of the output topics has seen, with the moment it saw it.

    `on_prediction` gets each prediction with its record, repeats included.
    """

    def __init__(self, on_prediction: Callable[[Record, events.Prediction], None] | None = None) -> None:
        self.seen: dict[str, float] = {}
        self.dead: set[str] = set()
        self._on_prediction = on_prediction
        self._changed = asyncio.Event()

    async def read(self, reader: LiveReader, dead_letters_topic: str) -> None:
        """Take records until cancelled."""
        async for record in reader:
            now = time.monotonic()
            if record.topic == dead_letters_topic:
                letter = deadletters.decode_dead_letter(record)
                self.dead.add(letter.image_id or letter.record.default_id)
            else:
                prediction = events.decode_prediction(record)
                self.seen.setdefault(prediction.image_id, now)
                if self._on_prediction is not None:
                    self._on_prediction(record, prediction)
            self._changed.set()

    async def wait(self, ids: Sequence[str], *, share: float = 1.0) -> None:
        """Return when all ids, or that share of them, have an outcome, or none has come for `QUIET_SECONDS`."""
        missing = set(ids)
        left = round(len(missing) * (1 - share))
        known = 0
        while True:
            self._changed.clear()
            # Only once enough have come can they be all: a look at each of 100,000 after each batch takes time.
            if len(self.seen) + len(self.dead) >= known + len(missing) - left:
                missing -= self.seen.keys() | self.dead
                known = len(self.seen) + len(self.dead)
            if len(missing) <= left:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), QUIET_SECONDS)
            except TimeoutError:
                return


class Online(msgspec.Struct, frozen=True, kw_only=True):
    """What an open-loop run saw; latencies in the order of publication, without those that have none."""

    latencies: list[float]
    receipts: list[events.Receipt]
    sent: int
    dead_letters: int
    #: How much later than its arrival each picture was published.
    lateness: list[float]
    #: From the first arrival to the last outcome, by process.
    cpu_seconds: dict[str, float]


class Together:
    """Publishes records, those that come close together in one request; leaving waits for the broker.

    A record leaves at once unless the last request did within `TOGETHER_SECONDS`: then it waits for the rest of
    that time, as records do in Kafka's own clients. aiokafka waits too, but for each partition apart.
    """

    def __init__(self, producer: AIOKafkaProducer, topic: str) -> None:
        self._producer = producer
        self._topic = topic
        self._waiting: list[events.Outgoing] = []
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = float("-inf")
        self._sending: list[asyncio.Task[object]] = []

    async def __aenter__(self) -> "Together":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._send()
        await asyncio.gather(*self._sending)

    def add(self, outgoing: events.Outgoing) -> None:
        """Publish a record soon."""
        self._waiting.append(outgoing)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._sent_at + TOGETHER_SECONDS), self._send)

    def _send(self) -> None:
        self._timer = None
        self._sent_at = asyncio.get_running_loop().time()
        for out in self._waiting:
            send = self._producer.send_and_wait(self._topic, out.value, out.key, headers=list(out.headers))
            self._sending.append(asyncio.create_task(send))
        self._waiting = []


class Meter:
    """Measures the worker that runs under the settings; `pids` are processes whose processor time counts."""

    def __init__(
        self, settings: Settings, *, worker_url: str | None = None, pids: Mapping[str, int] | None = None
    ) -> None:
        self.settings = settings
        self._worker_url = worker_url
        self._pids = dict(pids or {})
        # Results of earlier runs on the same topics are not taken for this one's.
        self._token = secrets.token_hex(4)
        self._runs = itertools.count()

    async def offline(self, pictures: Sequence[bytes], count: int) -> Timing:
        """Send so many through the worker, all there from the start, and return how long they took.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        ids = self.new_ids(count)
        async with self.reading() as outcomes, self.preloaded(pictures, ids) as commit:
            cpu, started = CpuSeconds(self._pids), time.monotonic()
            await commit()
            await outcomes.wait(ids)
            spent = cpu.spent()
        require_all(outcomes, ids)
        return Timing(count, max(outcomes.seen[image_id] for image_id in ids) - started, spent.get("worker"))

    async def online(
        self,
        pictures: Sequence[bytes],
        rate_per_second: float,
        seconds: float,
        seed: int,
        lane: Lane = "realtime",
    ) -> Online:
        """Publish at Poisson arrivals for a time, and return what became of them."""
        receipts: dict[str, events.Receipt] = {}

        def keep(_: Record, prediction: events.Prediction) -> None:
            receipts[prediction.image_id] = prediction.receipt

        async with self.reading(keep) as outcomes:
            seen = await self.arrive(
                outcomes, pictures, rate_per_second, seed, lane, until=lambda: asyncio.sleep(seconds)
            )
        return msgspec.structs.replace(seen, receipts=list(receipts.values()))

    async def arrive(
        self,
        outcomes: Outcomes,
        pictures: Sequence[bytes],
        rate_per_second: float,
        seed: int,
        lane: Lane,
        *,
        until: Callable[[], Awaitable[None]],
    ) -> Online:
        """Publish at Poisson arrivals until something has happened, and return what became of them.

        Raises:
            DependencyError: nothing became of any of them.
        """
        prefix = self._new_prefix()
        topic = self.settings.topic(LANES[lane].name)
        published: list[float] = []
        cpu = CpuSeconds(self._pids)
        async with self._producing() as producer, Together(producer, topic) as publishing:

            async def publish() -> None:
                async for number in paced(rate_per_second, seed):
                    published.append(time.monotonic())
                    data = pictures[number % len(pictures)]
                    publishing.add(events.encode_image(events.ImageEvent(id=f"{prefix}{number}", data=data)))

            arriving = asyncio.create_task(publish())
            await until()
            arriving.cancel()
            await asyncio.wait({arriving})
            if not arriving.cancelled():
                arriving.result()
        moments = {f"{prefix}{number}": at for number, at in enumerate(published)}
        await outcomes.wait(list(moments))
        latencies = [
            outcomes.seen[image_id] - at for image_id, at in moments.items() if image_id in outcomes.seen
        ]
        if not latencies:
            raise DependencyError(
                f"none of {len(moments)} pictures has a prediction: does a predict worker run?"
            )
        return Online(
            latencies=latencies,
            receipts=[],
            sent=len(moments),
            dead_letters=len(outcomes.dead & moments.keys()),
            lateness=lateness(published, rate_per_second, seed),
            cpu_seconds=cpu.spent(),
        )

    def new_ids(self, count: int) -> list[str]:
        """Return ids that no run before has used."""
        prefix = self._new_prefix()
        return [f"{prefix}{number}" for number in range(count)]

    @asynccontextmanager
    async def preloaded(
        self, pictures: Sequence[bytes], ids: Iterable[str]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Put pictures under these ids into the bulk lane, where nobody sees them before the call that is yielded.

        Raises:
            DependencyError: Kafka does not take them.
        """
        topic = self.settings.topic(IMAGES_BULK.name)
        records = (
            events.encode_image(events.ImageEvent(id=image_id, data=picture))
            for image_id, picture in zip(ids, itertools.cycle(pictures), strict=False)
        )
        async with self._producing(
            linger_ms=5,
            transactional_id=f"{self.settings.topic_prefix}bench-{self._token}",
            transaction_timeout_ms=int(TRANSACTION_SECONDS * 1000),
        ) as producer:
            await producer.begin_transaction()
            while some := list(itertools.islice(records, PRELOAD_RECORDS)):
                await asyncio.gather(*[
                    producer.send_and_wait(topic, out.value, out.key, headers=list(out.headers))
                    for out in some
                ])  # fmt: skip
            yield producer.commit_transaction

    @asynccontextmanager
    async def _producing(self, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
        """Open a bare producer: what publishes must not take the cores from what is measured."""
        producer = AIOKafkaProducer(
            **client_options(self.settings),
            acks="all",
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            **options,
        )
        try:
            await producer.start()
            yield producer
        except KafkaError as error:
            raise DependencyError(f"Kafka does not take the pictures: {error!r}") from error
        finally:
            await producer.stop()

    @asynccontextmanager
    async def reading(
        self, on_prediction: Callable[[Record, events.Prediction], None] | None = None
    ) -> AsyncIterator[Outcomes]:
        """Read outcomes from now on."""
        outcomes = Outcomes(on_prediction)
        topics = [self.settings.topic(topic.name) for topic in (PREDICTIONS, DEAD_LETTERS)]
        reader = LiveReader(self.settings, topics, client_id="millrace-bench")
        await reader.start(wait=False)
        reading = asyncio.create_task(outcomes.read(reader, topics[1]))
        try:
            yield outcomes
        finally:
            reading.cancel()
            await asyncio.wait({reading})
            await reader.stop()
            if not reading.cancelled():
                reading.result()  # what ended it: without a reader nothing was measured

    async def worker(self) -> dict[str, float]:
        """Return the worker's metrics by name with labels."""
        assert self._worker_url is not None
        return await asyncio.to_thread(read_metrics, self._worker_url)

    def _new_prefix(self) -> str:
        return f"bench-{self._token}-{next(self._runs)}-"


def require_all(outcomes: Outcomes, ids: Sequence[str]) -> None:
    """Insist that each id has its prediction.

    Raises:
        DependencyError: some have none.
    """
    missing = [image_id for image_id in ids if image_id not in outcomes.seen]
    if missing:
        raise DependencyError(
            f"{len(missing)} of {len(ids)} pictures have no prediction after {QUIET_SECONDS:g} s without news "
            f"({len(outcomes.dead)} dead letters): does a predict worker run and keep up?"
        )


def lateness(published: Sequence[float], rate_per_second: float, seed: int) -> list[float]:
    """Return how much later than its arrival each picture was published, the first one taken as punctual."""
    due = list(itertools.islice(arrivals(rate_per_second, seed), len(published)))
    return [at - published[0] - (moment - due[0]) for at, moment in zip(published, due, strict=True)]
