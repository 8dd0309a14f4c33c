"""Every part of an installation at its work, each as a Kafka user of its own on a guarded broker.

`WORK` does all that a user's rights are for; whoever adds work that needs another right adds it here too.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError
from aiokafka.structs import OffsetAndMetadata

from millrace import operations
from pipeline import admin, deadletters, events, readers, registry, telemetry
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.errors import UndecodableImageError
from pipeline.events import Outgoing, Record
from pipeline.settings import Settings, load
from pipeline.telemetry import Condition, GpuWindow, Sample, Samples, Windows
from pipeline.topics import (
    DEAD_LETTERS,
    GPU_ALERTS,
    GPU_SAMPLES,
    GPU_WINDOWS,
    IMAGES_BULK,
    LANES,
    MODELS,
    PREDICTIONS,
    TOPICS,
)
from tests.support.eventually import eventually
from tests.support.gateway import serving
from tests.support.guarded import Guarded
from tests.support.pictures import jpeg
from tests.support.receivers import SECRET, ReceiverServer, alert, receiving
from tests.support.spine import environment, picture
from tests.support.workers import WorkerProcess, Workers, workers

#: Each step's process and group by its user, and the topic of which it can reject a record.
STEPS = {
    "predict-default": ("predict", "predict.default", IMAGES_BULK),
    "archive": ("archive", "archive", IMAGES_BULK),
    "store": ("store", "store", PREDICTIONS),
    "watch": ("watch", "watch", None),
    "record": ("record", "record", GPU_SAMPLES),
    "notify": ("notify", "notify", GPU_ALERTS),
}
PUBLISHED = ("collect", "publish")
#: Until what should happen has happened, on a machine with other things to do.
PATIENCE_SECONDS = 60.0


@dataclass
class Scene:
    """A whole installation, seen by an administrator."""

    broker: Guarded
    settings: Settings
    crew: Workers
    database: Database
    publisher: Publisher
    receiver: ReceiverServer
    patience: float = PATIENCE_SECONDS
    seen: list[Record] = field(default_factory=list)

    def as_user(self, user: str, **changes: Any) -> Settings:
        """Return the settings that a user has."""
        return load(**self.settings.model_dump(exclude_unset=True) | self.broker.values(user) | changes)

    def start(self, user: str, tag: str) -> WorkerProcess:
        """Start a user's step."""
        more = {"MILLRACE_REPLICA": f"replica-{tag}"} | self.broker.environment(user)
        return self.crew.start("-m", "agents", STEPS[user][0], **more)

    async def publish(self, topic: str, outgoing: Outgoing) -> None:
        await self.publisher.publish(topic, outgoing)

    async def condemn(self, user: str) -> None:
        """Put a record first before a step that is said to have killed it three times: it dead-letters it."""
        _, group, topic = STEPS[user]
        if topic is None:
            return
        offset = (await self.publisher.publish(topic.name, Outgoing(b"poison", b"poison", ()))).offset
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.settings.resolved_kafka, group_id=group, enable_auto_commit=False
        )
        await consumer.start()
        place = TopicPartition(topic.name, 0)
        consumer.assign([place])
        mark = OffsetAndMetadata(offset, f"careful {offset} 3 {offset + 1}")

        async def committed() -> bool:
            try:
                await consumer.commit({place: mark})
            except CommitFailedError:  # a member that was killed is one until its session ends
                return False
            return True

        await eventually(committed, PATIENCE_SECONDS)
        await consumer.stop()

    async def wait_record(self, topic: str, holds: Callable[[Record], bool]) -> None:
        """Wait for a record."""

        def found() -> bool:
            return any(holds(record) for record in self.seen if record.topic == topic)

        await eventually(found, self.patience)

    async def place_of(self, topic: str, image_id: str) -> Record:
        """Return the record of a picture."""
        key = image_id.encode()
        await self.wait_record(topic, lambda record: record.key == key)
        return next(record for record in self.seen if record.topic == topic and record.key == key)

    async def wait(self, check: Callable[[], Awaitable[object]]) -> None:
        await eventually(check, self.patience)

    async def was_condemned(self, user: str, since: int) -> None:
        """Wait for the dead letter of a condemned record."""
        group = STEPS[user][1]

        def is_its(record: Record) -> bool:
            return deadletters.decode_dead_letter(record).group == group

        def found() -> bool:
            return any(is_its(each) for each in self.seen[since:] if each.topic == DEAD_LETTERS.name)

        await eventually(found, self.patience)


# What each part does when all is well; raises AssertionError or a DependencyError when something is not.


async def predict(scene: Scene, tag: str) -> None:
    for lane in LANES.values():
        await scene.publish(lane.name, events.encode_image(picture(f"{tag}-{lane.lane}")))
        key = f"{tag}-{lane.lane}".encode()
        await scene.wait_record(PREDICTIONS.name, lambda record, key=key: record.key == key)  # type: ignore[misc]
    replica = f"default/replica-{tag}".encode()
    await scene.wait_record(MODELS.name, lambda record: record.key == replica)


async def archive(scene: Scene, tag: str) -> None:
    for lane in LANES.values():
        image_id = f"{tag}-{lane.lane}"
        await scene.publish(lane.name, events.encode_image(picture(image_id)))

        async def kept(image_id: str = image_id) -> bool:
            row = await scene.database.image(image_id)
            return row is not None and row.object_key is not None

        await scene.wait(kept)


async def store(scene: Scene, tag: str) -> None:
    prediction = events.Prediction(
        id=events.prediction_id(tag, tag, ()), image_id=tag, deployment=tag, lane="bulk", outcome="predicted",
        time=datetime.now(UTC), receipt=events.Receipt(topic=IMAGES_BULK.name, partition=0, offset=0),
    )  # fmt: skip
    await scene.publish(PREDICTIONS.name, events.encode_prediction(prediction))
    await registry.activate(scene.settings, tag, ["builtin:quality"], activated_by="test")
    failed = Record(
        topic=IMAGES_BULK.name, partition=0, offset=1, timestamp_ms=1, key=tag.encode(), value=b"x", headers=()
    )  # fmt: skip
    letter = deadletters.from_error(tag, failed, UndecodableImageError("no picture"), datetime.now(UTC))
    await scene.publish(DEAD_LETTERS.name, deadletters.encode_dead_letter(letter))

    async def stored() -> bool:
        database = scene.database
        letters = await database.dead_letters(
            code=None, group=tag, topic=None, image_id=None, open_only=False, limit=1, before=None
        )
        return bool(
            await database.predictions(tag) and await database.model_history(tag, 1, None) and letters
        )

    await scene.wait(stored)


async def watch(scene: Scene, tag: str) -> None:
    start = datetime.now(UTC) - timedelta(minutes=1)
    for second in range(6):
        await scene.publish(GPU_SAMPLES.name, samples(tag, start + timedelta(seconds=second)))
    await scene.wait_record(GPU_WINDOWS.name, lambda record: record.key == tag.encode())


def samples(tag: str, time: datetime) -> Outgoing:
    sample = Sample(gpu_uuid=f"GPU-{tag}", time=time, values={"temperature_celsius": 50.0})
    return telemetry.encode_samples(Samples(host=tag, samples=(sample,)), None)


def windows(tag: str, start: datetime, *conditions: Condition) -> Outgoing:
    gpu = GpuWindow(gpu_uuid=f"GPU-{tag}", host=tag, samples=1, conditions=conditions)
    return telemetry.encode_windows(
        Windows(key=tag, start=start, end=start + timedelta(minutes=1), gpus=(gpu,))
    )


async def record(scene: Scene, tag: str) -> None:
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    await scene.publish(GPU_SAMPLES.name, samples(tag, start))
    condition = Condition(rule="hot", severity="warning", state="firing", since=start)
    await scene.publish(GPU_WINDOWS.name, windows(tag, start, condition))
    key = telemetry.alert_id(f"GPU-{tag}", "hot", start).encode()
    await scene.wait_record(GPU_ALERTS.name, lambda record: record.key == key)

    async def stored() -> int:
        statement = "SELECT 1 FROM gpu_samples JOIN gpus USING (gpu_id) WHERE gpu_uuid = $1"
        return len(await fetch(scene.settings.resolved_database, statement, f"GPU-{tag}"))

    await scene.wait(stored)


async def fetch(dsn: str, statement: str, *values: object) -> list[Any]:
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch(statement, *values))
    finally:
        await connection.close()


async def notify(scene: Scene, tag: str) -> None:
    step = alert(zlib.crc32(tag.encode()))
    await scene.publish(GPU_ALERTS.name, telemetry.encode_alert(step))
    await eventually(lambda: (step.id, step.state) in scene.receiver.told(), scene.patience)


async def gateway(scene: Scene, tag: str) -> None:
    settings = scene.as_user("gateway")
    async with serving(settings) as running:
        live = running.app.state.live
        try:
            await eventually(lambda: live._reader._consumer is not None, scene.patience)
        except AssertionError:
            await readers.partitions_of(settings, [PREDICTIONS.name, DEAD_LETTERS.name])  # which says why
            raise
        for lane in LANES:
            files = {"file": jpeg(zlib.crc32(tag.encode()) % 100)}
            answer = await running.http.post(
                f"/v1/images?lane={lane}", files=files, headers={"Prefer": f"wait={int(scene.patience)}"}
            )
            assert answer.status_code == 200, answer.text
            image_id = answer.json()["id"]
            # What GET .../content does as long as `archive` has not been there.
            place = await scene.place_of(LANES[lane].name, image_id)
            assert await readers.read_back(settings, LANES[lane].name, place.partition, place.offset)
        # The dead letter comes live: of a picture that proves to be none.
        garbage = {"file": b"\xff\xd8\xff\xe0" + tag.encode() * 20}
        answer = await running.http.post(
            "/v1/images?lane=realtime", files=garbage, headers={"Prefer": f"wait={int(scene.patience)}"}
        )
        assert answer.status_code == 422, answer.text
        body = {"models": ["builtin:quality", "builtin:fingerprint"]}
        answer = await running.http.put("/v1/models/default", json=body)
        assert answer.status_code == 202, answer.text
        answer = await running.http.get(f"/v1/images/{image_id}/trace")
        assert answer.status_code == 200, answer.text
        assert answer.json().get("unknown") is None, answer.text


async def collect(scene: Scene, tag: str) -> None:
    await publish_as(scene, "collect", {GPU_SAMPLES.name: samples(tag, datetime.now(UTC))})


async def publish(scene: Scene, tag: str) -> None:
    made = events.encode_image(picture(f"{tag}-published"))
    await publish_as(scene, "publish", {lane.name: made for lane in LANES.values()})


async def publish_as(scene: Scene, user: str, outgoing: dict[str, Outgoing]) -> None:
    publisher = Publisher(scene.as_user(user), client_id="test", timeout_seconds=min(scene.patience, 20.0))
    await publisher.start(wait=False)
    try:
        await asyncio.gather(*(publisher.publish(topic, one) for topic, one in outgoing.items()))
    finally:
        await publisher.stop(1.0)


async def retention(scene: Scene, tag: str) -> None:
    known = await registry.read(scene.as_user("retention"))
    assert "default" in known


async def keda(scene: Scene, tag: str) -> None:
    """KEDA asks for offsets of its groups and the ends of their topics."""
    rows = await admin.lag(scene.as_user("keda"))
    wanted = {("predict.default", lane.name) for lane in LANES.values()}
    wanted |= {(step, topic.name) for topic in TOPICS for step in topic.consumers if step in admin.STEPS}
    wanted -= {("predict", lane.name) for lane in LANES.values()}
    assert wanted <= {(row.group, row.topic) for row in rows}


async def operator(scene: Scene, tag: str) -> None:
    settings = scene.as_user("operator")
    assert await operations.list_topics(settings, as_json=False) == 0
    assert {change.change for change in await admin.apply_topics(settings)} == {"kept"}
    groups = {row.group for row in await admin.lag(settings)}
    assert groups == {"predict.default", *(set(admin.STEPS) - {"predict"})}
    for topic in (PREDICTIONS, DEAD_LETTERS, MODELS, GPU_ALERTS):  # tail, trace, models list
        assert await readers.read_all(settings, topic.name)
    await registry.activate(settings, f"{tag}-o", ["builtin:quality"], activated_by="operator")
    redriven = (Outgoing(tag.encode(), b"x", (("millrace-only-group", b"nobody"),)),)
    topics = set(TOPICS) - {DEAD_LETTERS}
    await publish_as(scene, "operator", {topic.name: one for topic in topics for one in redriven})


WORK: dict[str, Callable[[Scene, str], Awaitable[None]]] = {
    "predict-default": predict, "archive": archive, "store": store, "watch": watch, "record": record,
    "notify": notify, "gateway": gateway, "collect": collect, "publish": publish, "retention": retention,
    "keda": keda, "operator": operator,
}  # fmt: skip


@asynccontextmanager
async def playing(broker: Guarded, database: str, folder: Path) -> AsyncIterator[Scene]:
    """Set the scene: topics with a window to read back, a receiver, and an eye on everything published."""
    variables = environment(
        broker.kafka.bootstrap_servers, database, folder / "objects", "",
        MILLRACE_TOPIC_PARTITIONS="1", MILLRACE_WATCH_WINDOW_SECONDS="1", MILLRACE_WATCH_LATENESS_SECONDS="0",
        MILLRACE_WATCH_SILENCE_SECONDS="1", MILLRACE_RECEIVERS_FILE=str(folder / "receivers.yaml"),
    )  # fmt: skip
    async with receiving() as receiver:
        (folder / "secret").write_text(SECRET)
        (folder / "receivers.yaml").write_text(
            f"receivers: [{{name: all, kind: webhook, url: '{receiver.url}', secret_file: '{folder}/secret'}}]"
        )
        given = {name.removeprefix("MILLRACE_").lower(): value for name, value in variables.items()}
        settings = load(**given)
        publisher = Publisher(settings, client_id="test")
        await publisher.start(wait=False)
        known = await Database.open(settings)
        reader = readers.LiveReader(settings, [topic.name for topic in TOPICS])
        await reader.start(wait=False)
        with workers(variables, folder) as crew:
            scene = Scene(broker, settings, crew, known, publisher, receiver)
            following = asyncio.create_task(remember(reader, scene.seen))
            try:
                yield scene
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                await reader.stop()
                await known.close()
                await publisher.stop(2.0)


async def remember(reader: readers.LiveReader, seen: list[Record]) -> None:
    async for each in reader:
        seen.append(each)  # noqa: PERF401 -- others look at it meanwhile


async def begin(scene: Scene, user: str, tag: str) -> WorkerProcess:
    """Start a step with work before it: a window to read back, and a record to reject."""
    if user == "watch":
        await scene.publish(GPU_WINDOWS.name, windows(f"{tag}-before", datetime.now(UTC)))
    await scene.condemn(user)
    return scene.start(user, tag)


async def do(scene: Scene, user: str, tag: str, since: int = 0) -> None:
    """Do a user's whole work."""
    if user in STEPS and STEPS[user][2] is not None:
        await scene.was_condemned(user, since)
    await WORK[user](scene, tag)
