"""`millrace replay` and `millrace simulate` against a real broker: what is published is what a reader decodes."""

import asyncio
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline import broker, telemetry
from pipeline.settings import Settings, load
from pipeline.telemetry import Samples
from pipeline.topics import GPU_SAMPLES
from tests.support.dumps import values, write

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, with the topic of samples."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_partitions=2)
    await broker.apply_topics(settings, [GPU_SAMPLES])
    return settings


def millrace(settings: Settings, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": settings.resolved_kafka,
        "MILLRACE_TOPIC_PREFIX": settings.topic_prefix,
    }
    return subprocess.run(
        [sys.executable, "-m", "millrace", *map(str, arguments)],
        env=environment, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


async def read(settings: Settings, count: int) -> list[tuple[bytes | None, Samples]]:
    """Read so many records as a consumer would, and check that nothing of them was left out."""
    reader = broker.LiveReader(settings, [settings.topic(GPU_SAMPLES.name)], start="earliest")
    await reader.start()
    found = []
    try:
        async with asyncio.timeout(20):
            async for record in reader:
                samples, dropped = telemetry.decode_samples(record)
                assert dropped == {}
                found.append((record.key, samples))
                if len(found) == count:
                    break
    finally:
        await reader.stop()
    return found


async def test_a_replayed_dump_is_what_a_reader_decodes(settings: Settings, tmp_path: Path) -> None:
    """Each value of a dump arrives once with its host, GPU and source time; the replay's times follow the pace."""
    rows = values()
    cells = [row.row() for row in rows]
    path = write(tmp_path / "dump.csv", [*cells, cells[0] | {"value": "warm"}])
    options = ("--interval", "100ms", "--speed", "10x", "--strict", "--json")
    ran = await asyncio.to_thread(millrace, settings, "replay", path, *options)
    assert ran.returncode == 1
    assert "1 row: the value is not a number (line 2472)" in ran.stderr
    assert "replayed 2,470 values of 2,471 rows" in ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    found = await read(settings, len(lines))
    assert sorted(line["host"] for line in lines) == sorted(samples.host for _, samples in found)
    assert all(key == samples.host.encode() for key, samples in found)
    samples = [(record.host, sample) for _, record in found for sample in record.samples]
    assert sorted(
        (sample.source_time, host, sample.gpu_uuid, name, value)
        for host, sample in samples
        if sample.source_time
        for name, value in sample.values.items()
    ) == sorted((row.time, row.host, row.gpu_uuid, row.name, row.value) for row in rows)
    times = sorted({sample.time for _, sample in samples})
    sources = sorted({row.time for row in rows})
    paces = [
        (time - times[0]) * 10 - (source - sources[0]) for time, source in zip(times, sources, strict=True)
    ]
    assert max(abs(pace.total_seconds()) for pace in paces) < 0.001


async def test_peers_across_hosts(settings: Settings, tmp_path: Path) -> None:
    """With a key of their own the GPUs of all hosts are in one partition; the times may be the dump's."""
    rows = values(gpus=17)
    path = write(tmp_path / "dump.csv", [row.row() for row in rows])
    options = ("--speed", "max", "--keep-time", "--peers", "cluster-7", "--json")
    ran = await asyncio.to_thread(millrace, settings, "replay", path, *options)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len({line["partition"] for line in lines}) == 1
    found = await read(settings, len(lines))
    assert {key for key, _ in found} == {b"cluster-7"}
    assert {record.host for _, record in found} == {row.host for row in rows}
    assert {s.time for _, record in found for s in record.samples} == {row.time for row in rows}


async def test_a_simulated_fleet(settings: Settings, tmp_path: Path) -> None:
    """The samples of the whole time arrive, end now, and show the fault that the truth tells of."""
    truth = tmp_path / "truth.jsonl"
    options = (
        "--gpus",
        "16",
        "--fault",
        "lost",
        "--duration",
        "20m",
        "--speed",
        "max",
        "--truth",
        truth,
        "--json",
    )
    before = datetime.now(UTC)
    ran = await asyncio.to_thread(millrace, settings, "simulate", *options)
    after = datetime.now(UTC)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    found = [sample for _, record in await read(settings, len(lines)) for sample in record.samples]
    assert len(found) == sum(line["samples"] for line in lines)
    (injected,) = [json.loads(line) for line in truth.read_text().splitlines()]
    assert injected["gpu_uuid"] in ran.stderr
    begin, end = (datetime.fromisoformat(injected[name]) for name in ("begin", "end"))
    times = {gpu: [s.time for s in found if s.gpu_uuid == gpu] for gpu in {s.gpu_uuid for s in found}}
    assert len(times) == 16
    assert before - timedelta(seconds=12) <= max(map(max, times.values())) <= after
    assert (
        before - timedelta(minutes=20, seconds=1)
        <= min(map(min, times.values()))
        <= after - timedelta(minutes=19)
    )
    mine = [sample for sample in found if sample.gpu_uuid == injected["gpu_uuid"]]
    assert any(sample.time < begin for sample in mine)
    assert not any(begin <= sample.time < end and sample.state == "ok" for sample in mine)
