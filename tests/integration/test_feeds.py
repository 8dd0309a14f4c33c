"""`millrace replay` and `millrace simulate` against a real broker: what is published is what a reader decodes."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from millrace import replay
from millrace.dumps import Dump
from pipeline import broker, telemetry
from pipeline.settings import Settings, load
from pipeline.telemetry import Samples
from pipeline.topics import GPU_SAMPLES
from tests.support.dumps import piped, series, values, write
from tests.support.eventually import eventually

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, with the topic of samples."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, topic_partitions=2)
    await broker.apply_topics(settings, [GPU_SAMPLES])
    return settings


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": settings.resolved_kafka,
        "MILLRACE_TOPIC_PREFIX": settings.topic_prefix,
    }


def millrace(settings: Settings, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millrace", *map(str, arguments)],
        env=environment(settings), input=stdin, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@contextmanager
def terminal(
    settings: Settings, shown: list[str], *arguments: str | Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with a terminal for its messages, and keep what it shows there."""
    ours, its = os.openpty()

    def keep() -> None:
        # EIO: the command has ended.
        with suppress(OSError):
            while text := os.read(ours, 4096):
                shown.append(text.decode(errors="replace"))

    process = subprocess.Popen(
        [sys.executable, "-m", "millrace", *map(str, arguments)],
        env=environment(settings) | {"TERM": "xterm", "COLUMNS": "120"}, stdout=subprocess.DEVNULL, stderr=its,
    )  # fmt: skip
    os.close(its)
    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        keeper.join()
        os.close(ours)


def plain(shown: list[str]) -> str:
    """Return what a terminal shows without its colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(shown))


def values_of(records: list[tuple[bytes | None, Samples]]) -> list[tuple[datetime, str, str, float]]:
    return [
        (sample.time, sample.gpu_uuid, name, value)
        for _, record in records
        for sample in record.samples
        for name, value in sample.values.items()
    ]


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
    """With a key of their own the GPUs of all hosts are in one partition; a dump may come from a pipe."""
    rows = values(gpus=17)
    path = write(tmp_path / "dump.csv", [row.row() for row in rows])
    options = ("--speed", "max", "--keep-time", "--peers", "cluster-7", "--json")
    ran = await asyncio.to_thread(millrace, settings, "replay", "-", *options, stdin=path.read_text())
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len({line["partition"] for line in lines}) == 1
    found = await read(settings, len(lines))
    assert {key for key, _ in found} == {b"cluster-7"}
    assert {record.host for _, record in found} == {row.host for row in rows}
    assert {s.time for _, record in found for s in record.samples} == {row.time for row in rows}


async def test_a_dump_in_another_order(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dump of one series after the other is sorted and arrives whole; a row that comes too late fails a run."""
    monkeypatch.setattr(replay, "Dump", partial(Dump, lookahead_rows=50))
    rows = series(gpus=2, steps=12)
    wishes = replay.Wishes(speed=None, keep_time=True, strict=True)
    path = write(tmp_path / "series.csv", [row.row() for row in rows])
    assert await replay.replay(settings, path, wishes) == 0
    said = capsys.readouterr().err
    assert f"{path}: sorting it first, as its rows are far from the order of time" in said
    assert f"{path}: sorted 240 rows in " in said
    assert "replayed 240 values of 240 rows" in said
    expected = {(row.time, row.gpu_uuid, row.name, row.value) for row in rows}
    times = {row.time for row in rows}
    assert set(values_of(await read(settings, len(times)))) == expected

    # Of a pipe only the first fifty rows are looked at.
    in_order = sorted(rows, key=lambda row: row.time)
    late = [row.row() for row in [*in_order[1:-30], in_order[0], *in_order[-30:]]]
    text = write(tmp_path / "late.csv", late).read_bytes()
    with piped(text) as pipe:
        assert await replay.replay(settings, pipe, replace(wishes, strict=False)) == 1
    said = capsys.readouterr().err
    assert "sorting" not in said
    assert f"{pipe}: 1 row: its moment is past (--sort puts any dump in order) (line 211)" in said
    with piped(text) as pipe:
        assert await replay.replay(settings, pipe, replace(wishes, sort=True)) == 0
    assert "sorting it first, as --sort asks for" in capsys.readouterr().err
    found = values_of(await read(settings, 3 * len(times)))
    first = in_order[0]
    missing = (first.time, first.gpu_uuid, first.name, first.value)
    assert Counter(found) == {value: 3 - (value == missing) for value in expected}


async def test_a_loop_on_a_terminal(settings: Settings, tmp_path: Path) -> None:
    """On a terminal a bar shows the progress of a loop, which goes on faster than life until Ctrl-C ends it."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=1)])
    options = ("--loop", "--speed", "100x", "--interval", "100ms")
    shown: list[str] = []
    with terminal(settings, shown, "replay", path, *options) as process:
        found = await read(settings, 8)
        await eventually(lambda: re.search(r"replaying .* [1-9][0-9,]*/\? [0-9,]+/s ", plain(shown)), 20)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 20) == 130
    times = [sample.time for _, record in found for sample in record.samples]
    assert times == sorted(set(times))
    # Several rounds of four moments each, of 4 s and one average step at a hundred times the speed.
    sources = [sample.source_time for _, record in found for sample in record.samples]
    assert sources[:12] == sorted({row.time for row in values(gpus=1)}) * 3
    assert max(later - earlier for earlier, later in pairwise(times)) < timedelta(seconds=0.02)
    assert "Traceback" not in "".join(shown)


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
