"""`millrace collect` against a real broker: GPUs by NVML's stand-in or a local exporter, XID errors, faults."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from millrace.collect_sources import ExporterSource
from millrace.outbox import Outbox
from pipeline import broker, telemetry
from pipeline.broker import Publisher
from pipeline.errors import DependencyError
from pipeline.settings import Settings, load
from pipeline.telemetry import Sample, Samples
from pipeline.topics import GPU_SAMPLES
from tests.support import exporter, nvml, workers
from tests.support.eventually import eventually
from tests.support.nvml import Script

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, with the topic of samples."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_partitions=2)
    await broker.apply_topics(settings, [GPU_SAMPLES])
    return settings


@pytest.fixture
def environment(settings: Settings, nvml_library: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a collector: the installation, and a script for a library in a folder of its own."""
    library = tmp_path / "library"
    library.mkdir()
    (library / nvml.NAME).write_bytes(nvml_library.read_bytes())
    return {
        "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": settings.resolved_kafka,
        "MILLRACE_TOPIC_PREFIX": settings.topic_prefix,
        "NVML_STAND_IN": str(tmp_path / "script"),
        "LD_LIBRARY_PATH": str(library),
    }


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Return a script of two GPUs."""
    return Script(tmp_path / "script")


@pytest.fixture
def running(environment: dict[str, str], tmp_path: Path) -> Iterator[workers.Workers]:
    """Start collectors, which end with the test."""
    with workers.workers(environment, tmp_path) as started:
        yield started


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[AsyncIterator[tuple[bytes | None, Samples]]]:
    """Read records as a consumer would, and check that nothing of them is left out."""
    reader = broker.LiveReader(settings, [settings.topic(GPU_SAMPLES.name)], start="earliest")
    await reader.start()

    async def records() -> AsyncIterator[tuple[bytes | None, Samples]]:
        async for record in reader:
            samples, dropped = telemetry.decode_samples(record)
            assert dropped == {}
            yield record.key, samples

    try:
        async with asyncio.timeout(60):
            yield records()
    finally:
        await reader.stop()


def states(samples: Samples) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sample in samples.samples:
        found.setdefault(sample.gpu_uuid, []).append(sample.state)
    return found


@pytest.mark.timeout(180)
async def test_a_collector_publishes_events_at_once_and_the_rest_when_it_ends(
    settings: Settings, script: Script, running: workers.Workers, environment: dict[str, str], tmp_path: Path
) -> None:
    """XID errors do not wait; a lost GPU and a replaced driver are survived; SIGTERM publishes what is held."""
    collector = running.start(
        "-m", "millrace", "collect", "--interval", "1h", "--sample-interval", "100ms", "--peers", "job-7",
        "--host", "node-7",
    )  # fmt: skip
    collector.wait_ready()
    await eventually(lambda: collector.metric("millrace_collect_seconds_count") >= 3, 30)
    first, second = script.uuid(0), script.uuid(1)
    async with reading(settings) as records:
        script.xid(0, 31)
        key, record = await anext(records)
        assert (key, record.host, record.source) == (b"job-7", "node-7", "nvml")
        assert [gpu.gpu_uuid for gpu in record.gpus] == [first, second]
        times = [sample.time for sample in record.samples if sample.gpu_uuid == first]
        assert times == sorted(set(times))
        assert len(times) >= 4
        assert [(sample.gpu_uuid, sample.xids) for sample in record.samples if sample.xids] == [
            (first, (31,))
        ]
        assert states(record)[second] == ["ok"] * len(states(record)[second])

        script.set({"gpu.1.lost": 1})
        await eventually(lambda: collector.metric("millrace_collected_gpus", state="lost") == 1, 30)
        script.xid(0, 31)
        _, record = await anext(records)
        assert states(record)[second][-1] == "lost"
        assert set(states(record)[first]) == {"ok"}

        # A driver of another version: the library in the process no longer fits, the one on disk does.
        nvml.build(tmp_path / "new", library=2).rename(Path(environment["LD_LIBRARY_PATH"]) / nvml.NAME)
        script.set({"gpu.1.lost": None, "library": 2, "driver_version": "600.1"})
        await eventually(lambda: "answers again" in collector.log(), 30)
        await eventually(lambda: collector.metric("millrace_collected_gpus", state="ok") == 2, 30)
        code, _ = collector.terminate()
        assert code == 0, collector.log()
        _, record = await anext(records)
        assert {gpu.driver_version for gpu in record.gpus} == {"600.1"}
        assert [found[-1] for found in states(record).values()] == ["ok", "ok"]


async def test_without_nvml_there_is_one_line(environment: dict[str, str], script: Script) -> None:
    """A machine without GPUs ends the command with 69 and one line that says why."""

    def collect() -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-m", "millrace", "collect", "--once", "--json"],
            env=os.environ | environment, text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert ran.stdout == ""
        return ran.returncode, ran.stderr

    script.set({"init": "!12"})
    code, said = await asyncio.to_thread(collect)
    assert code == 69
    assert said.startswith("millrace: there is no NVML here")
    assert said.count("\n") == 1


async def test_an_exporter_is_scraped(settings: Settings, environment: dict[str, str]) -> None:
    """`--from-exporter --once --json` publishes a page's samples and shows what was published."""

    def collect(url: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "millrace", "collect", "--once", "--json", "--from-exporter", url],
            env=os.environ | environment, text=True, capture_output=True, timeout=60, check=True,
        ).stdout  # fmt: skip

    with exporter.serving(exporter.page()) as server:
        shown = await asyncio.to_thread(collect, server.url)
    async with reading(settings) as records:
        key, record = await anext(records)
    assert (key, record.host, record.source) == (b"node-7", "node-7", "dcgm-exporter")
    values = {sample.gpu_uuid: sample.values for sample in record.samples}
    assert values[exporter.UUIDS[0]]["power_watts"] == 71.456
    assert len(shown.splitlines()) == 1
    assert exporter.UUIDS[1] in shown


async def test_an_exporter_that_fails_is_an_error_that_passes() -> None:
    """Another status, nonsense, no GPU and no answer are errors with the address; a good page is read again."""
    with exporter.serving(exporter.page()) as server:
        source = ExporterSource(server.url, "node-1")
        try:
            await source.start(lambda uuid, code, moment: None)
            server.body = "{ nonsense"
            with pytest.raises(DependencyError, match=f"{server.url} answers with what is not Prometheus"):
                await source.read()
            server.status = 503
            with pytest.raises(DependencyError, match="status 503"):
                await source.read()
            server.status, server.body = 200, exporter.page(xids={79: 1})
            [reading] = await source.read()
            assert reading.host == "node-1"
            assert [sample.xids for sample in reading.samples if sample.xids] == [(79,)]
            server.body = "process_cpu_seconds_total 1\n"
            with pytest.raises(DependencyError, match="names a GPU"):
                await source.start(lambda uuid, code, moment: None)
        finally:
            await source.stop()
    gone = ExporterSource(server.url, None)
    with pytest.raises(DependencyError, match="does not answer"):
        await gone.read()
    await gone.stop()


async def test_what_waits_for_kafka_is_bounded_and_in_order(kafka: str, topic_prefix: str) -> None:
    """While Kafka takes nothing the oldest goes first, XID errors last; the rest arrives in order, once each."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_partitions=1)
    publisher = Publisher(settings, client_id="test")
    arrived: list[Samples] = []
    outbox = Outbox(
        publisher, settings.topic(GPU_SAMPLES.name), lambda place, samples: arrived.append(samples), 2_000
    )
    task = asyncio.create_task(outbox.run())
    begin = datetime.now(UTC)
    moments = [begin + timedelta(seconds=second) for second in range(40)]
    for number, moment in enumerate(moments):
        sample = Sample(gpu_uuid="GPU-1", time=moment, xids=(79,) if number in (2, 5) else ())
        outbox.put(Samples(host="node-1", samples=(sample,)), None)
        await asyncio.sleep(0)
    assert outbox.dropped > 0
    await eventually(lambda: outbox.stuck_seconds > 0, 10)
    assert outbox.published == 0
    assert outbox.held == len(moments) - outbox.dropped
    await broker.apply_topics(settings, [GPU_SAMPLES])
    assert await outbox.drain(30)
    task.cancel()
    await publisher.stop()
    kept = [moments.index(samples.samples[0].time) for samples in arrived]
    # The first was on its way when there was room for it; the newest stay, and the two with XID errors.
    newest = list(range(len(moments) - (len(kept) - 3), len(moments)))
    assert kept == [0, 2, 5, *newest]
    async with reading(settings) as records:
        read = [moments.index((await anext(records))[1].samples[0].time) for _ in kept]
    assert read == kept


async def test_a_signal_ends_a_collector_while_kafka_and_the_driver_are_stuck(
    script: Script, running: workers.Workers, tmp_path: Path
) -> None:
    """SIGTERM ends a collector with Kafka away and a driver that does not return, and it says what was lost."""
    calls = tmp_path / "calls"
    collector = running.start(
        "-m", "millrace", "collect", "--interval", "100ms",
        MILLRACE_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:9", NVML_STAND_IN_CALLS=str(calls),
    )  # fmt: skip
    await eventually(lambda: collector.metric("millrace_collect_seconds_count") >= 2, 30)
    script.set({"gpu.0.hang": 3600})
    await eventually(lambda: "0 hang" in calls.read_text(), 30)
    collector.send(signal.SIGTERM)
    await asyncio.to_thread(collector.wait, 60)
    assert collector.exit_code == 69
    assert "could not be published" in collector.log()
