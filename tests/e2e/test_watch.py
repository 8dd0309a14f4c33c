"""`watch` on a real Kafka: every window has the numbers of an undisturbed run, whatever is killed."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from millrace.kafka import EmbeddedKafka
from pipeline import admin, telemetry
from pipeline.broker import Publisher
from pipeline.detection import Watch, WatchOptions, load_rules
from pipeline.readers import read_all
from pipeline.settings import Settings
from pipeline.telemetry import GpuWindow, Samples, Windows
from pipeline.topics import DEAD_LETTERS, GPU_SAMPLES, GPU_WINDOWS
from tests.support.eventually import eventually
from tests.support.gpus import feed, record, uuid
from tests.support.spine import Installation, environment, installation
from tests.support.workers import WorkerProcess

TOPICS = (GPU_SAMPLES, GPU_WINDOWS, DEAD_LETTERS)
HOSTS = ("node-1", "node-2", "node-3", "node-4", "node-5")
BOOK = load_rules()
Identity = tuple[str, str, str]

pytestmark = pytest.mark.timeout(180)


def made(kafka: str, prefix: str, folder: Path, **more: str) -> Iterator[Installation]:
    settings = environment(kafka, "postgresql://nowhere", folder / "objects", prefix, **more)
    with installation(settings, folder, TOPICS) as ready:
        yield ready


@pytest.fixture
def own(own_kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Installation]:
    yield from made(own_kafka.bootstrap_servers, "", tmp_path)


@pytest.fixture
def shared(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Installation]:
    yield from made(kafka, topic_prefix, tmp_path, MILLRACE_WATCH_SILENCE_SECONDS="2")


def host_records(host: str, minutes: int) -> list[Samples]:
    """Return a host's records: every ten seconds two samples of each GPU, one GPU with growing trouble."""

    def fault(gpu: int, at: float) -> Mapping[str, float]:
        hot = {"temperature_margin_celsius": 1.0} if gpu == 1 and 300 < at < 700 else {}
        return {**hot, "ecc_corrected_volatile": at // 60 if gpu == 2 else 0.0}

    records = [record(10.0 * n + 5, fault, gpus=5, host=host, every=5.0, count=2) for n in range(minutes * 6)]
    xid = msgspec.structs.replace(records[20].samples[-1], xids=(79,))
    records[20] = msgspec.structs.replace(records[20], samples=(*records[20].samples[:-1], xid))
    return records


def expected(records: Mapping[str, Sequence[Samples]]) -> dict[Identity, GpuWindow]:
    """Return what an undisturbed run says of every window that closes."""
    closed = [
        w for host, of_host in records.items() for w in feed(Watch(BOOK, WatchOptions()), of_host, host)
    ]
    return {
        (gpu.gpu_uuid, w.windows.start.isoformat(), w.windows.end.isoformat()): gpu
        for w in closed for gpu in w.windows.gpus
    }  # fmt: skip


async def published(settings: Settings) -> tuple[dict[Identity, GpuWindow], Counter[Identity]]:
    """Return windows by identity, and how often each was published; all copies must be the same."""
    found: dict[Identity, GpuWindow] = {}
    copies: Counter[Identity] = Counter()
    samples_at = {
        record.key: record.partition for record in await read_all(settings, settings.topic(GPU_SAMPLES.name))
    }
    for each in await read_all(settings, settings.topic(GPU_WINDOWS.name)):
        windows: Windows = telemetry.decode_windows(each)
        assert each.partition == samples_at[each.key]
        for gpu in windows.gpus:
            identity = (gpu.gpu_uuid, windows.start.isoformat(), windows.end.isoformat())
            assert found.setdefault(identity, gpu) == gpu
            copies[identity] += 1
    return found, copies


async def publish(settings: Settings, records: Mapping[str, Sequence[Samples]], seconds: float) -> None:
    """Publish the records of all hosts in turn, evenly over some time."""
    publisher = Publisher(settings, client_id="test")
    await publisher.start()
    topic = settings.topic(GPU_SAMPLES.name)
    count = len(next(iter(records.values())))
    try:
        for number in range(count):
            outgoing = [telemetry.encode_samples(of_host[number]) for of_host in records.values()]
            await asyncio.gather(*(publisher.publish_forever(topic, each, step="test") for each in outgoing))
            await asyncio.sleep(seconds / count)
    finally:
        await publisher.stop(2.0)


async def ready(*workers: WorkerProcess) -> None:
    await asyncio.gather(*(asyncio.to_thread(worker.wait_ready) for worker in workers))


async def test_windows_are_the_same_whatever_is_killed(own: Installation, own_kafka: EmbeddedKafka) -> None:
    """SIGKILL of workers, joins, a SIGTERM and a broker's death: no window is missing, none has other numbers."""
    draw = random.Random(5)
    records = {host: host_records(host, 30) for host in HOSTS}
    first, second = own.crew.start("-m", "agents", "watch"), own.crew.start("-m", "agents", "watch")
    await ready(first)
    sending = asyncio.create_task(publish(own.settings, records, 8.0))
    await asyncio.sleep(draw.uniform(0.5, 1.5))
    first.kill()
    third = own.crew.start("-m", "agents", "watch")
    await ready(second, third)
    await asyncio.sleep(draw.uniform(0.5, 1.5))
    second.kill()
    own_kafka.kill()
    await asyncio.to_thread(own_kafka.start)
    fourth = own.crew.start("-m", "agents", "watch")
    await ready(fourth)
    await asyncio.to_thread(third.terminate)
    await sending
    wanted = expected(records)

    async def all_there() -> bool:
        found, _ = await published(own.settings)
        assert len(wanted.keys() - found.keys()) == 0, f"{len(wanted.keys() - found.keys())} are missing"
        return True

    await eventually(all_there, 60)
    found, copies = await published(own.settings)
    whole = {identity: gpu for identity, gpu in found.items() if identity[1] != identity[2]}
    assert whole == wanted
    events = {identity: gpu for identity, gpu in found.items() if identity[1] == identity[2]}
    assert {identity[0] for identity in events} == {uuid(4, host) for host in HOSTS}
    print(f"{len(wanted)} windows of GPUs, {copies.total() - len(copies)} published again")


async def test_silence_and_hand_over(shared: Installation) -> None:
    """Joining and leaving repeats no window; what is left open closes once nothing comes any more."""
    settings = shared.settings
    records = {host: host_records(host, 12) for host in HOSTS}
    first = shared.crew.start("-m", "agents", "watch")
    await ready(first)
    sending = asyncio.create_task(publish(settings, records, 4.0))
    await asyncio.sleep(1.0)
    await ready(shared.crew.start("-m", "agents", "watch"))
    code, _ = await asyncio.to_thread(first.terminate)
    assert code == 0
    await sending
    last = {host: of_host[-1].samples[-1].time for host, of_host in records.items()}

    async def all_closed() -> bool:
        found, _ = await published(settings)
        return all(
            any(end > last[host].isoformat() for uuid_, _, end in found if host in uuid_) for host in HOSTS
        )

    await eventually(all_closed, 60)

    async def all_finished() -> bool:
        return sum(row.lag for row in await admin.lag(settings, [settings.group("watch")])) == 0

    await eventually(all_finished, 30)
    found, copies = await published(settings)
    assert max(copies.values()) == 1
    wanted = expected(records)
    assert {identity: found[identity] for identity in wanted} == wanted
