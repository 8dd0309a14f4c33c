"""The spine under test: predict, store and archive as real processes, what was sent, and the accounting.

Every test ends in `settled`: all that was sent is in the database exactly once, and nothing else is.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest import faults
from pipeline import admin, events
from pipeline.broker import Place, Publisher
from pipeline.database import Database
from pipeline.objects import ObjectStore
from pipeline.results import Accounting as Stored
from pipeline.settings import PREFIX, Settings, load
from pipeline.topics import LANES, TOPICS, Lane, Topic
from tests.support import pictures, services
from tests.support.eventually import eventually
from tests.support.workers import WorkerProcess, Workers, workers

STEPS = ("predict", "store", "archive")
_SCENES = tuple(pictures.jpeg(seed) for seed in range(8))


def environment(kafka: str, database: str, objects: object, prefix: str, **more: str) -> dict[str, str]:
    """Return the settings of an installation for tests: few partitions, short timeouts, one thread of each."""
    return {
        "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": kafka,
        "MILLRACE_DATABASE_URL": database,
        "MILLRACE_OBJECT_STORE_URL": str(objects),
        "MILLRACE_TOPIC_PREFIX": prefix,
        "MILLRACE_TOPIC_PARTITIONS": "4",
        "MILLRACE_SESSION_TIMEOUT_SECONDS": "3",
        "MILLRACE_SHUTDOWN_GRACE_SECONDS": "15",
        "MILLRACE_MISSING_OBJECT_GRACE_SECONDS": "1",
        "MILLRACE_DECODE_THREADS": "1",
        "MILLRACE_TORCH_THREADS": "1",
    } | more


def picture(image_id: str, number: int = 0) -> events.ImageEvent:
    """Return an event with a small photograph-like picture."""
    return events.ImageEvent(id=image_id, data=_SCENES[number % len(_SCENES)])


@dataclass
class Spine:
    """One installation: where it is, its processes, and the journal of what was sent to it."""

    settings: Settings
    crew: Workers
    database: Database
    publisher: Publisher
    journal: faults.Journal = field(default_factory=faults.Journal)

    async def start(self, *steps: str, **more: str) -> list[WorkerProcess]:
        """Start steps as processes and wait until each is ready; `more` is environment for these alone."""
        started = [self.crew.start("-m", "agents", step, **more) for step in steps]
        await asyncio.gather(*(asyncio.to_thread(worker.wait_ready) for worker in started))
        return started

    def running(self, *steps: str) -> list[WorkerProcess]:
        """Return the processes of these steps that run, oldest first."""
        return [worker for worker in self.crew.running if worker.step in steps]

    async def stop(self, *workers: WorkerProcess) -> None:
        """SIGTERM processes at once and check that each drains within its grace period."""
        ended = await asyncio.gather(*(asyncio.to_thread(worker.terminate) for worker in workers))
        for worker, (code, seconds) in zip(workers, ended, strict=True):
            assert code == 0, f"{worker.step} ended with {code}"
            assert seconds < self.settings.shutdown_grace_seconds

    async def send(self, event: events.ImageEvent, *, lane: Lane = "bulk", key: bytes | None = None) -> Place:
        """Publish an event and journal it; with `key`, on the partition of that key."""
        outgoing = events.encode_image(event)
        if key is not None:
            outgoing = events.Outgoing(key, outgoing.value, outgoing.headers)
        return await self.send_raw(outgoing, event.id, lane=lane)

    async def send_raw(
        self, outgoing: events.Outgoing, image_id: str | None = None, *, lane: Lane = "bulk"
    ) -> Place:
        """Publish anything; without `image_id` it is journalled under its place."""
        topic = self.settings.topic(LANES[lane].name)
        place = await self.publisher.publish_forever(topic, outgoing, step="test")
        self.journal.add(image_id or default_id(place), place)
        return place

    async def send_many(self, prefix: str, count: int, *, lane: Lane = "bulk") -> None:
        """Publish `count` good pictures with ids that start so."""
        await asyncio.gather(*(self.send(picture(f"{prefix}-{n}", n), lane=lane) for n in range(count)))

    async def stored(self) -> Stored:
        """Return what the database has of everything that was sent."""
        return await self.database.accounting(image_ids=list(self.journal.places))

    async def wait_stored(self, count: int, timeout_seconds: float = 90.0) -> None:
        """Wait until so many of the ids that were sent have a result or a dead letter."""

        async def enough() -> bool:
            return len(faults.seen_ids(self.settings, await self.stored())) >= count

        await eventually(enough, timeout_seconds)

    async def wait_caught_up(self, *steps: str, timeout_seconds: float = 90.0) -> None:
        """Wait until these steps have committed everything."""

        async def caught_up() -> bool:
            return await self.lag(*steps) == 0

        await eventually(caught_up, timeout_seconds)

    async def lag(self, *steps: str) -> int:
        """Return how many records these steps have not committed."""
        groups = [self.settings.group(step) for step in steps]
        return sum(row.lag for row in await admin.lag(self.settings, groups))

    async def settled(
        self,
        *steps: str,
        timeout_seconds: float = 90.0,
        dead_letters: Iterable[str] = (),
        max_repeated: int = 0,
        max_superseded: int = 0,
        whole: bool = False,
    ) -> faults.Accounting:
        """Wait until all that was sent is stored and committed by `steps`, account, and check.

        `dead_letters` are the ids that must be dead letters; all others must be results. With `whole` the
        installation is this test's own, and what nobody sent is an error too.
        """

        async def all_stored() -> bool:
            missing = set(self.journal.places) - faults.seen_ids(self.settings, await self.stored())
            assert not missing, f"{len(missing)} of {len(self.journal)} are not stored: {sorted(missing)[:5]}"
            return True

        await eventually(all_stored, timeout_seconds)
        await self.wait_caught_up(*(steps or STEPS), timeout_seconds=timeout_seconds)
        accounting = await faults.account_database(self.settings, self.database, self.journal, whole=whole)
        print(accounting.line())
        assert accounting.is_clean, accounting
        assert accounting.repeated <= max_repeated
        assert accounting.superseded <= max_superseded
        letters = {row.image_id for row in (await self.stored()).dead_letters}
        assert letters == set(dead_letters)
        return accounting

    async def check_pictures(self) -> None:
        """Check that each picture that was sent is in the object store, whole, and its row says so."""
        objects = ObjectStore.open(self.settings)
        for image_id in self.journal.places:
            row = await self.database.image(image_id)
            assert row is not None
            assert row.object_key is not None
            data = await objects.get(row.object_key, self.settings.max_image_bytes)
            assert row.sha256 in {None, hashlib.sha256(data).hexdigest()}
        objects.close()

    async def codes(self) -> dict[str, str]:
        """Return the code of each dead letter by image id."""
        return {str(row.image_id): row.code for row in (await self.stored()).dead_letters}


def default_id(place: Place) -> str:
    """Return the id of a record that names none."""
    return f"{place.topic}:{place.partition}:{place.offset}:{place.timestamp_ms}"


@dataclass(frozen=True)
class Installation:
    """Where an installation is, and its processes; synchronous, so that a module's tests can share it."""

    settings: Settings
    environment: dict[str, str]
    crew: Workers

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Spine]:
        """Connect publisher and database in this event loop."""
        publisher = Publisher(self.settings, client_id="test")
        await publisher.start()
        try:
            database = await Database.open(self.settings)
            try:
                yield Spine(self.settings, self.crew, database, publisher)
            finally:
                await database.close()
        finally:
            await publisher.stop(2.0)


@contextmanager
def installation(
    environment: dict[str, str], folder: Path, topics: Sequence[Topic] = TOPICS
) -> Iterator[Installation]:
    """Make an installation's topics, all or some; no process that is started in it outlives the block."""
    given = {name.removeprefix(PREFIX).lower(): value for name, value in environment.items()}
    settings = load(**given)
    services.run_apart(admin.apply_topics(settings, topics))
    with workers(environment, folder) as crew:
        yield Installation(settings, environment, crew)


@asynccontextmanager
async def under_load(
    spine: Spine,
    prefix: str,
    *,
    rate_per_second: float,
    make: Callable[[str, int], events.ImageEvent] = picture,
) -> AsyncIterator[None]:
    """Publish good pictures at a rate, however slow the system is, until the block ends; then await them all."""
    pending: set[asyncio.Task[Place]] = set()
    stop = asyncio.Event()

    async def publish() -> None:
        number = 0
        while not stop.is_set():
            pending.add(asyncio.create_task(spine.send(make(f"{prefix}-{number}", number))))
            number += 1
            await asyncio.sleep(1 / rate_per_second)

    publishing = asyncio.create_task(publish())
    try:
        yield
    finally:
        stop.set()
        await publishing
        await asyncio.gather(*pending)
