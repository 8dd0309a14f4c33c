"""Kafka and PostgreSQL killed under load: everything waits and goes on by itself, and lag tells the truth.

The module has services of its own to kill; its workers are never restarted by hand, but where the test says so.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Set
from pathlib import Path

import pytest

from agents.senders import MOST_AT_ONCE
from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres
from pipeline.database import migrate
from pipeline.events import ImageEvent
from pipeline.objects import ObjectStore
from tests.support import pictures, services
from tests.support.eventually import eventually
from tests.support.fleet import Fleet
from tests.support.receivers import ReceiverServer, receiving
from tests.support.spine import STEPS as ALL_STEPS
from tests.support.spine import Installation, Spine, environment, installation, under_load

pytestmark = pytest.mark.timeout(240)

Killable = tuple[EmbeddedKafka, EmbeddedPostgres, Installation]


@pytest.fixture(scope="module")
def killable(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Killable]:
    """Yield a broker and a database of the module's own, and an installation on them."""
    folder = tmp_path_factory.mktemp("killable")
    kafka, postgres = services.embedded_kafka(folder), services.embedded_postgres(folder)
    kafka.start()
    postgres.start()
    try:
        services.run_apart(migrate(postgres.dsn))
        settings = environment(
            kafka.bootstrap_servers, postgres.dsn, folder / "objects", "", MILLRACE_SHUTDOWN_GRACE_SECONDS="6"
        )
        with installation(settings, folder) as made:
            yield kafka, postgres, made
    finally:
        kafka.stop()
        postgres.stop()


@pytest.fixture
async def spine(killable: Killable) -> AsyncIterator[Spine]:
    """Connect to the installation, with every step running."""
    kafka, postgres, made = killable
    for service in (kafka, postgres):
        await asyncio.to_thread(service.start)  # where a test failed before it did
    async with made.connect() as connected:
        await connected.start(*(step for step in ALL_STEPS if not connected.running(step)))
        yield connected


async def check_unharmed(spine: Spine) -> None:
    """Check that every process is the one it was before, alive and ready."""
    for step in ALL_STEPS:
        (worker,) = spine.running(step)
        assert worker.get("/livez")[0] == 200
        assert worker.get("/readyz")[0] == 200


async def test_kafka_is_killed(spine: Spine, killable: Killable) -> None:
    """Kafka killed under load and started again: every step goes on by itself, and nothing is lost."""
    kafka, _, _ = killable
    workers = {worker.pid for worker in spine.crew.running}
    async with under_load(spine, "kafka", rate_per_second=40):
        await spine.wait_stored(20)
        await asyncio.to_thread(kafka.kill)
        await asyncio.sleep(4)  # longer than the session timeout
        await asyncio.to_thread(kafka.start)
        await spine.wait_stored(60)
    # What a broker's death repeats: what was finished and not committed before it.
    await spine.settled(max_repeated=60)
    assert {worker.pid for worker in spine.crew.running} == workers
    await check_unharmed(spine)


async def test_postgres_is_killed(spine: Spine, killable: Killable) -> None:
    """PostgreSQL killed under load and started again: who writes to it waits and goes on, `predict` never stops."""
    _, postgres, _ = killable
    workers = {worker.pid for worker in spine.crew.running}
    async with under_load(spine, "postgres", rate_per_second=40):
        await spine.wait_stored(20)
        await asyncio.to_thread(postgres.kill)
        await asyncio.sleep(2)
    await spine.wait_caught_up("predict")
    for step in ("store", "archive"):
        assert await spine.lag(step) > 0
    for worker in spine.running(*ALL_STEPS):
        assert worker.get("/livez")[0] == 200
    await asyncio.to_thread(postgres.start)
    await spine.settled(max_repeated=0)
    assert {worker.pid for worker in spine.crew.running} == workers
    await check_unharmed(spine)


async def test_killed_while_postgres_is_away(spine: Spine, killable: Killable) -> None:
    """`store` and `archive` killed while they wait for PostgreSQL lose no result and no picture."""
    _, postgres, _ = killable
    await asyncio.to_thread(postgres.kill)
    await spine.send_many("waiting", 60)
    await spine.wait_caught_up("predict")
    await asyncio.sleep(1)  # several commit intervals with the results in hand
    for worker in spine.running("store", "archive"):
        worker.kill()
    await asyncio.to_thread(postgres.start)
    await spine.start("store", "archive")
    await spine.settled()
    await spine.check_pictures()


async def test_the_object_store_is_away(spine: Spine) -> None:
    """While the object store fails, who needs it waits, killed or not, and pictures in records are predicted."""
    folder = Path(spine.settings.resolved_object_store)
    away = folder.with_name("away")
    objects = ObjectStore.open(spine.settings)
    await objects.put("given/picture.jpg", pictures.jpeg())
    take_away(folder, away)
    await spine.send_many("inline", 20)
    await spine.wait_stored(20)
    for number in range(5):
        await spine.send(ImageEvent(id=f"given-{number}", dataref="given/picture.jpg"))
    await asyncio.sleep(2 * spine.settings.missing_object_grace_seconds)
    assert await spine.codes() == {}
    assert await spine.lag("predict") == 5
    assert await spine.lag("archive") > 0
    (archive,) = spine.running("archive")
    archive.kill()
    bring_back(folder, away)
    await spine.start("archive")
    await spine.settled()
    await spine.check_pictures()
    objects.close()


def take_away(folder: Path, away: Path) -> None:
    folder.rename(away)
    folder.touch()  # a file in place of the folder: every call fails, none says "not found"


def bring_back(folder: Path, away: Path) -> None:
    folder.unlink()
    away.rename(folder)


async def test_sigterm_while_kafka_is_away(spine: Spine, killable: Killable) -> None:
    """SIGTERM while the broker is away ends every step within its grace period; afterwards nothing is lost."""
    kafka, _, _ = killable
    async with under_load(spine, "away", rate_per_second=40):
        await spine.wait_stored(20)
    await asyncio.to_thread(kafka.kill)
    await asyncio.sleep(0.5)
    ending = spine.running(*ALL_STEPS)
    ended = await asyncio.gather(*(asyncio.to_thread(worker.terminate) for worker in ending))
    for worker, (code, seconds) in zip(ending, ended, strict=True):
        print(f"{worker.step}: exit code {code} after {seconds:.1f} s")
        # The timer rings in time; a busy machine may need a moment to hear it. What hangs takes for ever.
        assert seconds < spine.settings.shutdown_grace_seconds + 2
        assert code in {0, 70}
    await asyncio.to_thread(kafka.start)
    await spine.start(*ALL_STEPS)
    await spine.settled(max_repeated=60)


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[tuple[ReceiverServer, Path]]:
    """Yield a receiver of alerts, and the file that names it."""
    async with receiving() as server:
        file = tmp_path / "receivers.yaml"
        file.write_text(f'receivers: [{{name: pager, kind: webhook, url: "{server.url}"}}]')
        yield server, file


async def test_telemetry_outlives_kafka_and_postgres(
    spine: Spine, killable: Killable, receiver: tuple[ReceiverServer, Path]
) -> None:
    """Both killed under load, one by one: `record` keeps each sample and step once, `notify` tells each step."""
    kafka, postgres, _ = killable
    pager, file = receiver
    fleet = Fleet(spine, "outage")
    workers = await spine.start("record", "notify", MILLRACE_RECEIVERS_FILE=str(file))
    stop = asyncio.Event()

    async def send() -> None:
        while not stop.is_set():
            await fleet.tick(3)
            await fleet.close_window()
            await asyncio.sleep(0.1)

    async def told() -> bool:
        return len(pager.taken) > 0

    sending = asyncio.create_task(send())
    await fleet.wait_stored(100)
    await eventually(told, 60.0)
    await asyncio.to_thread(postgres.kill)
    await asyncio.sleep(1)
    await asyncio.to_thread(kafka.kill)
    await asyncio.to_thread(postgres.start)
    await asyncio.to_thread(kafka.start)
    await fleet.wait_stored(len(fleet.samples))
    stop.set()
    await sending
    # The producer of the test is idempotent, so no sample or window is in Kafka twice; a step that the dying broker
    # took and did not acknowledge may be.
    await fleet.settled(max_repeated_steps=3 * len(fleet.steps))
    await check_told(pager, {step for step in fleet.steps if step[1] != "pending"})
    assert [worker.exit_code for worker in workers] == [None, None]
    await spine.stop(*workers)


async def check_told(receiver: ReceiverServer, steps: Set[tuple[str, str]]) -> None:
    """Check that a receiver is told of each step once, an alert's in order; a message may come again by its id."""

    async def everything() -> bool:
        return set(receiver.told()) >= steps

    await eventually(everything, 90.0)
    told = receiver.told()
    assert sorted(told) == sorted(steps)
    place = {step: number for number, step in enumerate(told)}
    assert all(
        place[identity, "firing"] < place[identity, state] for identity, state in steps if state != "firing"
    )
    # What was on its way when the database died, and could not be noted in time.
    assert receiver.repeats() <= MOST_AT_ONCE
