"""`notify` as a real process: every receiver is told of every step of every alert, whatever dies or fails."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from millrace import alerts
from pipeline import admin, telemetry
from pipeline.broker import Publisher
from pipeline.events import Outgoing
from pipeline.postgres import Pool
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, GPU_ALERTS
from tests.support.eventually import eventually
from tests.support.receivers import SECRET, ReceiverServer, alert, at_random, receiving
from tests.support.spine import environment, installation
from tests.support.workers import Workers

NOTIFY = ("-m", "agents", "notify")

pytestmark = pytest.mark.timeout(180)


@dataclass
class Made:
    """Topics and a database of the test's own, and two receivers: one that fails at random, one that is down."""

    settings: Settings
    crew: Workers
    publisher: Publisher
    pool: Pool
    flaky: ReceiverServer
    down: ReceiverServer
    file: Path

    async def publish(self, *alerts: telemetry.Alert) -> None:
        topic = self.settings.topic(GPU_ALERTS.name)
        for one in alerts:
            await self.publisher.publish(topic, telemetry.encode_alert(one))

    async def statuses(self, receiver: str) -> dict[str, int]:
        rows = await self.pool.rows("count_notifications", receiver)
        return {row["status"]: row["count"] for row in rows}

    async def reached(self, receiver: str, **statuses: int) -> None:
        async def check() -> bool:
            found = await self.statuses(receiver)
            assert found == statuses, found
            return True

        await eventually(check, 90.0)


@pytest.fixture
async def made(kafka: str, database: str, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Made]:
    async with receiving(at_random(11, 0.15)) as flaky, receiving(lambda _: 503) as down:
        (tmp_path / "secret").write_text(SECRET)
        file = tmp_path / "receivers.yaml"
        file.write_text(
            f"""
            receivers:
              - {{name: flaky, kind: webhook, url: "{flaky.url}/hook", secret_file: "{tmp_path}/secret",
                  timeout_seconds: 1}}
              - {{name: down, kind: webhook, url: "{down.url}", match: {{severity: critical}}}}
            """
        )
        settings = environment(
            kafka, database, tmp_path / "objects", topic_prefix, MILLRACE_RECEIVERS_FILE=str(file)
        )
        with installation(settings, tmp_path, [GPU_ALERTS, DEAD_LETTERS]) as one:
            publisher = Publisher(one.settings, client_id="test")
            await publisher.start()
            pool = await Pool.open(one.settings)
            yield Made(one.settings, one.crew, publisher, pool, flaky, down, file)
            await pool.close()
            await publisher.stop()


async def test_sigkill_of_notify(made: Made) -> None:
    """Killed under load, with a receiver that fails at random: each step is told, in order, repeats by their id."""
    count, kills = 60, 2
    workers = [made.crew.start(*NOTIFY) for _ in range(kills + 1)]
    await asyncio.gather(*(asyncio.to_thread(worker.wait_ready) for worker in workers))

    async def feed() -> None:
        for number in range(0, count, 10):
            batch = [alert(each) for each in range(number, number + 10)]
            ends = [alert(each, "resolved") for each in range(number, number + 10)]
            # Each end comes twice, as after a crash of `record`.
            await made.publish(*batch, *ends, *ends)

    feeding = asyncio.create_task(feed())
    for number in range(kills):
        already = len(made.flaky.taken)

        async def moved(already: int = already) -> bool:
            return len(made.flaky.taken) >= already + 20

        await eventually(moved, 60.0)
        await asyncio.to_thread(workers[number].kill)
    await feeding
    pending = alert(1000, "pending")
    await made.publish(pending)
    garbage = Outgoing(b"key", b"not an alert", ())
    await made.publisher.publish(made.settings.topic(GPU_ALERTS.name), garbage)
    await made.reached("flaky", delivered=2 * count)
    told = made.flaky.told()
    assert sorted(told) == sorted(
        {(alert(number).id, state) for number in range(count) for state in ("firing", "resolved")}
    )
    for number in range(count):
        identity = alert(number).id
        assert told.index((identity, "firing")) < told.index((identity, "resolved"))
    lost_answers = sum(request.status == -2 for request in made.flaky.requests)
    print(f"{len(made.flaky.requests)} requests, {made.flaky.repeats()} repeats, {lost_answers} answers lost")
    assert made.flaky.repeats() <= lost_answers + kills * 4
    assert all(request.is_signed() for request in made.flaky.requests)
    bodies = {(request.id, request.body) for request in made.flaky.requests}
    assert len(bodies) == len({request.id for request in made.flaky.requests})
    assert sum(row.lag for row in await admin.lag(made.settings, [made.settings.group("notify")])) == 0
    assert (
        sum(
            worker.metric("millrace_dead_letters_total", step="notify", code="contract") for worker in workers
        )
        == 1
    )
    code, seconds = await asyncio.to_thread(workers[-1].terminate)
    assert code == 0
    assert seconds < made.settings.shutdown_grace_seconds
    # The receiver that is down has held up nobody, and nothing of what it is to be told is lost.
    statuses = await made.statuses("down")
    assert sum(statuses.values()) == 2 * count
    assert set(statuses) == {"waiting", "sending"}


async def test_steps_of_alerts_are_printed(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """`millrace alerts tail` prints steps as they are in Kafka, those of one severity if asked, and no garbage."""
    garbage = Outgoing(b"key", b"not an alert", ())
    await made.publisher.publish(made.settings.topic(GPU_ALERTS.name), garbage)
    await made.publish(alert(1), alert(2, severity="warning"), alert(1, "resolved"))
    assert await alerts.tail(made.settings, "earliest", 2, "critical", as_json=True) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["id"], line["state"]) for line in lines] == [
        (alert(1).id, "firing"), (alert(1).id, "resolved"),
    ]  # fmt: skip


async def test_receivers_are_changed(made: Made) -> None:
    """A changed file of receivers is acted on without a restart; one that cannot be used changes nothing."""
    notify = made.crew.start(*NOTIFY)
    await asyncio.to_thread(notify.wait_ready)
    whole = made.file.read_text()
    made.file.write_text(whole[: len(whole) // 2])

    async def passed_over() -> bool:
        return "changed secret cannot be used" in notify.log()

    await eventually(passed_over, 30.0)
    await made.publish(alert(1))
    await made.reached("flaky", delivered=1)
    # Beside the file and then moved over it, as an editor or Kubernetes does.
    beside = made.file.with_suffix(".new")
    beside.write_text(f'receivers: [{{name: other, kind: webhook, url: "{made.flaky.url}/other"}}]')
    beside.rename(made.file)

    async def acted_on() -> bool:
        return "no longer sending to a receiver as it was" in notify.log()

    await eventually(acted_on, 30.0)
    await made.publish(alert(2))
    await made.reached("other", delivered=1)
    assert await made.statuses("flaky") == {"delivered": 1}
    assert notify.exit_code is None
