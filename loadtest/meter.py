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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from loadtest.drive import Driver, arrivals
from loadtest.report import Timing, read_metrics
from pipeline import deadletters, events
from pipeline.broker import MAX_REQUEST_BYTES, LiveReader
from pipeline.connections import client_options
from pipeline.errors import DependencyError
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, PREDICTIONS, Lane

# Without any outcome for so long, the rest is not coming.
QUIET_SECONDS = 60.0
# A transaction may stay open this long; preloading takes seconds.
TRANSACTION_SECONDS = 300.0
# What is published at once while preloading: below the producer's own limits.
PRELOAD_RECORDS = 200


class Outcomes:
    """What a reader of the output topics has seen, with the moment it saw it."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.receipts: dict[str, events.Receipt] = {}
        self.dead: set[str] = set()
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
                self.receipts[prediction.image_id] = prediction.receipt
                self.seen.setdefault(prediction.image_id, now)
            self._changed.set()

    async def wait(self, ids: Sequence[str]) -> None:
        """Return when all ids have an outcome, or none has come for `QUIET_SECONDS`."""
        missing = set(ids)
        while missing := missing - self.seen.keys() - self.dead:
            self._changed.clear()
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


class Meter:
    """Measures the worker that runs under the settings."""

    def __init__(self, settings: Settings, *, worker_url: str | None = None) -> None:
        self.settings = settings
        self._worker_url = worker_url
        # Results of earlier runs on the same topics are not taken for this one's.
        self._token = secrets.token_hex(4)
        self._runs = itertools.count()

    async def offline(self, pictures: Sequence[bytes], count: int) -> Timing:
        """Send so many through the worker, all there from the start, and return how long they took.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        run = next(self._runs)
        sent = [
            events.ImageEvent(id=f"bench-{self._token}-{run}-{number}", data=picture)
            for number, picture in zip(range(count), itertools.cycle(pictures), strict=False)
        ]
        ids = [event.id for event in sent]
        async with self._reading() as outcomes, self._preloaded(sent) as commit:
            cpu_started, started = await self._cpu_seconds(), time.monotonic()
            await commit()
            await outcomes.wait(ids)
            cpu_ended = await self._cpu_seconds()
        missing = [image_id for image_id in ids if image_id not in outcomes.seen]
        if missing:
            raise DependencyError(
                f"{len(missing)} of {count} pictures have no prediction after {QUIET_SECONDS:g} s without news "
                f"({len(outcomes.dead)} dead letters): does a predict worker run and keep up?"
            )
        cpu = None if cpu_started is None or cpu_ended is None else cpu_ended - cpu_started
        return Timing(count, max(outcomes.seen[image_id] for image_id in ids) - started, cpu)

    async def online(
        self,
        pictures: Sequence[bytes],
        rate_per_second: float,
        seconds: float,
        seed: int,
        lane: Lane = "realtime",
    ) -> Online:
        """Publish at Poisson arrivals for a time, and return what became of them."""
        run = next(self._runs)
        published: list[float] = []

        def picture(number: int) -> events.ImageEvent:
            published.append(time.monotonic())
            data = pictures[number % len(pictures)]
            return events.ImageEvent(id=f"bench-{self._token}-{run}-{number}", data=data)

        async with self._reading() as outcomes:
            driver = Driver(self.settings, picture, rate_per_second=rate_per_second, lane=lane, seed=seed)
            async with driver:
                await asyncio.sleep(seconds)
                journal = await driver.stop()
            await outcomes.wait(list(journal.places))
        moments = {f"bench-{self._token}-{run}-{number}": at for number, at in enumerate(published)}
        latencies = [
            outcomes.seen[image_id] - at for image_id, at in moments.items() if image_id in outcomes.seen
        ]
        if not latencies:
            raise DependencyError(
                f"none of {len(journal)} pictures has a prediction: does a predict worker run?"
            )
        return Online(
            latencies=latencies,
            receipts=[outcomes.receipts[image_id] for image_id in moments if image_id in outcomes.receipts],
            sent=len(journal),
            dead_letters=len(outcomes.dead & moments.keys()),
            lateness=lateness(published, rate_per_second, seed),
        )

    @asynccontextmanager
    async def _preloaded(
        self, sent: Sequence[events.ImageEvent]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Put records into the topic where nobody sees them before the call that is yielded."""
        producer = AIOKafkaProducer(
            **client_options(self.settings),
            transactional_id=f"{self.settings.topic_prefix}bench-{self._token}",
            transaction_timeout_ms=int(TRANSACTION_SECONDS * 1000),
            acks="all",
            linger_ms=5,
            max_request_size=MAX_REQUEST_BYTES,
        )
        topic = self.settings.topic(IMAGES_BULK.name)
        try:
            await producer.start()
            await producer.begin_transaction()
            for start in range(0, len(sent), PRELOAD_RECORDS):
                await asyncio.gather(*[
                    producer.send_and_wait(topic, out.value, out.key, headers=list(out.headers))
                    for out in map(events.encode_image, sent[start : start + PRELOAD_RECORDS])
                ])  # fmt: skip
            yield producer.commit_transaction
        except KafkaError as error:
            raise DependencyError(f"Kafka does not take the preloaded pictures: {error!r}") from error
        finally:
            await producer.stop()

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Outcomes]:
        """Read outcomes from now on."""
        outcomes = Outcomes()
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

    async def batches(self) -> float:
        """Return how many forward passes the worker has made."""
        assert self._worker_url is not None
        return (await asyncio.to_thread(read_metrics, self._worker_url))["millrace_batch_size_count"]

    async def _cpu_seconds(self) -> float | None:
        if self._worker_url is None:
            return None
        return (await asyncio.to_thread(read_metrics, self._worker_url))["process_cpu_seconds_total"]


def lateness(published: Sequence[float], rate_per_second: float, seed: int) -> list[float]:
    """Return how much later than its arrival each picture was published, the first one taken as punctual."""
    due = list(itertools.islice(arrivals(rate_per_second, seed), len(published)))
    return [at - published[0] - (moment - due[0]) for at, moment in zip(published, due, strict=True)]
