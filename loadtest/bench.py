"""How fast the spine is: beside bare loops over the same pictures, and from publication to prediction.

It takes addresses: Kafka from the settings, where one `predict` worker of the same settings must run, and the
address of its HTTP site, to ask for its processor time. It starts nothing but the loops, each in a process of
its own.

Offline: pictures are preloaded into the bulk lane in one transaction, so that the worker sees all of them at
the moment of its commit; the clock runs from there until a reader has seen the last prediction. As many of
the same pictures go through the loops in turn with it, and medians are compared.
Online: pictures are published to the real-time lane at seeded arrivals, whatever the spine does; the latency
of each runs from its publication until a reader has seen its prediction.
"""

import asyncio
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from loadtest.drive import Driver, arrivals
from loadtest.images import SamplePicture, draw
from loadtest.report import Circumstances, Timing, median, percentile, read_metrics, rounded
from loadtest.results import ARMS, Offline, Online, Pictures, Plan, Result, compare, in_turn
from pipeline import deadletters, events
from pipeline.broker import MAX_REQUEST_BYTES, LiveReader
from pipeline.connections import client_options
from pipeline.errors import DependencyError, FatalError
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, IMAGES_BULK, PREDICTIONS

# Without any outcome for so long, the rest is not coming.
QUIET_SECONDS = 60.0
# A transaction may stay open this long; preloading takes seconds.
TRANSACTION_SECONDS = 300.0
# What is published at once while preloading: below the producer's own limits.
PRELOAD_RECORDS = 200
LOOP_TIMEOUT_SECONDS = 900.0

#: For the loops as for the worker (`agents/app.py`): OpenMP threads that wait sleep instead of spinning.
LOOP_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}

Say = Callable[[str], None]


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


class Bench:
    """Runs a plan against one worker."""

    def __init__(
        self, settings: Settings, plan: Plan, *, worker_url: str | None = None, say: Say = print
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._worker_url = worker_url
        self._say = say
        # Results of earlier runs on the same topics are not taken for this one's.
        self._token = secrets.token_hex(4)

    async def run(self, load_before: float) -> Result:
        """Measure everything.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan = self._plan
        self._say(f"drawing {plan.pictures} pictures")
        pictures = await asyncio.to_thread(lambda: list(draw(plan.seed, plan.pictures)))
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
            folder = Path(name)
            for picture in pictures:
                (folder / picture.id).write_bytes(picture.data)
            offline = await self._offline(pictures, folder)
        online = await self._online(pictures)
        return Result(
            circumstances=Circumstances.now(load_before),
            plan=plan,
            models=self._settings.models,
            pictures=await asyncio.to_thread(Pictures.of, pictures),
            offline=offline,
            online=online,
            load_after=round(os.getloadavg()[0], 2),
        )

    async def _offline(self, pictures: Sequence[SamplePicture], folder: Path) -> Offline:
        plan = self._plan
        await self._spine(pictures, "warm-up", min(plan.offline_images, 10 * self._settings.max_batch_size))
        timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
        for number in range(plan.offline_repeats):
            for arm in in_turn(ARMS, number):
                if arm == "spine":
                    timing = await self._spine(pictures, str(number), plan.offline_images)
                else:
                    timing = await self._loop(arm, folder)
                self._say(
                    f"{arm} {number + 1}/{plan.offline_repeats}: {timing.images_per_second:.0f} images/s"
                )
                timings[arm].append(timing)
        return compare(timings, plan.offline_images, self._settings.max_batch_size)

    async def _spine(self, pictures: Sequence[SamplePicture], part: str, count: int) -> Timing:
        """Send pictures through the worker, all there from the start."""
        sent = [
            events.ImageEvent(id=f"bench-{self._token}-{part}-{number}", data=picture.data)
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

    @asynccontextmanager
    async def _preloaded(
        self, sent: Sequence[events.ImageEvent]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Put records into the topic where nobody sees them before the call that is yielded."""
        producer = AIOKafkaProducer(
            **client_options(self._settings),
            transactional_id=f"{self._settings.topic_prefix}bench-{self._token}",
            transaction_timeout_ms=int(TRANSACTION_SECONDS * 1000),
            acks="all",
            linger_ms=5,
            max_request_size=MAX_REQUEST_BYTES,
        )
        topic = self._settings.topic(IMAGES_BULK.name)
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

    async def _loop(self, arm: str, folder: Path) -> Timing:
        """Run one of the bare loops in a process of its own."""
        kind = arm.removesuffix("_loop")
        size = self._settings.max_batch_size
        arguments = [kind, str(folder), str(self._plan.offline_images), str(size)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadtest.loops", *arguments,
            env=LOOP_ENVIRONMENT | os.environ | _given(self._settings), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(LOOP_TIMEOUT_SECONDS):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise FatalError(f"the {kind} loop ended with code {process.returncode}")
        return msgspec.json.decode(out, type=Timing)

    async def _online(self, pictures: Sequence[SamplePicture]) -> Online:
        plan = self._plan
        published: list[float] = []

        def picture(number: int) -> events.ImageEvent:
            published.append(time.monotonic())
            data = pictures[number % len(pictures)].data
            return events.ImageEvent(id=f"bench-{self._token}-online-{number}", data=data)

        rate = plan.online_images_per_second
        self._say(f"online: {rate:g} images/s for {plan.online_seconds:g} s")
        async with self._reading() as outcomes:
            driver = Driver(self._settings, picture, rate_per_second=rate, lane="realtime", seed=plan.seed)
            async with driver:
                await asyncio.sleep(plan.online_seconds)
                journal = await driver.stop()
            await outcomes.wait(list(journal.places))
        moments = {f"bench-{self._token}-online-{number}": at for number, at in enumerate(published)}
        latencies = [
            outcomes.seen[image_id] - at for image_id, at in moments.items() if image_id in outcomes.seen
        ]
        if not latencies:
            raise DependencyError(
                f"none of {len(journal)} pictures has a prediction: does a predict worker run?"
            )
        receipts = [outcomes.receipts[image_id] for image_id in moments if image_id in outcomes.receipts]
        dead = len(outcomes.dead & moments.keys())
        return Online(
            images_per_second=rate,
            p50_seconds=rounded(percentile(latencies, 0.50)),
            p95_seconds=rounded(percentile(latencies, 0.95)),
            p99_seconds=rounded(percentile(latencies, 0.99)),
            max_seconds=rounded(max(latencies)),
            sent=len(journal),
            received=len(latencies),
            dead_letters=dead,
            lost=len(journal) - len(latencies) - dead,
            driver_late_p99_seconds=rounded(percentile(lateness(published, rate, plan.seed), 0.99)),
            queue_p50_seconds=rounded(median(receipt.queue_seconds or 0.0 for receipt in receipts)),
            decode_p50_seconds=rounded(median(receipt.decode_seconds or 0.0 for receipt in receipts)),
            forward_p50_seconds=rounded(median(receipt.forward_seconds or 0.0 for receipt in receipts)),
        )

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Outcomes]:
        """Read outcomes from now on."""
        outcomes = Outcomes()
        topics = [self._settings.topic(topic.name) for topic in (PREDICTIONS, DEAD_LETTERS)]
        reader = LiveReader(self._settings, topics, client_id="millrace-bench")
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

    async def _cpu_seconds(self) -> float | None:
        if self._worker_url is None:
            return None
        return (await asyncio.to_thread(read_metrics, self._worker_url))["process_cpu_seconds_total"]


def lateness(published: Sequence[float], rate_per_second: float, seed: int) -> list[float]:
    """Return how much later than its arrival each picture was published, the first one taken as punctual."""
    due = list(itertools.islice(arrivals(rate_per_second, seed), len(published)))
    return [at - published[0] - (moment - due[0]) for at, moment in zip(published, due, strict=True)]


def _given(settings: Settings) -> dict[str, str]:
    """Hand the loops what decides about models and threads, wherever the settings came from."""
    names = (
        "models", "allow_python_models", "allow_exported_models", "device", "precision", "torch_compile",
        "max_batch_size", "decode_threads", "torch_threads",
    )  # fmt: skip
    given = {f"MILLRACE_{name.upper()}": str(getattr(settings, name)) for name in names}
    return given | {"MILLRACE_MODEL_CACHE": str(settings.resolved_model_cache)}
