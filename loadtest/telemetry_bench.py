"""How fast GPU telemetry goes through Kafka into PostgreSQL, beside a bare loop, and how that grows.

It takes the settings of a stack with an empty, migrated database, and a way to run a worker on it. Each section is
a function of its own in `SECTIONS`, gives a part of the result, and can be measured alone.
"""

import asyncio
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from loadtest import detection, loop_process, telemetry_loop, telemetry_watch
from loadtest.report import median, percentile, read_metrics, rounded
from pipeline import admin, telemetry
from pipeline.broker import Publisher
from pipeline.detection import load_rules
from pipeline.errors import DependencyError
from pipeline.rollups import Rollups
from pipeline.settings import Settings
from pipeline.telemetry import Sample, Samples
from pipeline.telemetry_database import TelemetryDatabase
from pipeline.topics import DEAD_LETTERS, GPU_ALERTS, GPU_SAMPLES, GPU_WINDOWS

Say = Callable[[str], None]
#: Runs a step on a stack; yields the address of its HTTP site.
Worker = Callable[[Settings, str], AbstractContextManager[str]]

# As dcgm-exporter's default, without what needs a profiler.
FIELDS = (
    "sm_clock_mhz", "memory_clock_mhz", "memory_temperature_celsius", "temperature_celsius", "power_watts",
    "energy_millijoules", "pcie_replays", "utilization_percent", "memory_copy_percent", "encoder_percent",
    "decoder_percent", "memory_free_mebibytes", "memory_used_mebibytes", "memory_reserved_mebibytes",
    "rows_remapped_uncorrected", "rows_remapped_corrected", "row_remap_failed", "graphics_engine_ratio",
    "tensor_active_ratio", "dram_active_ratio",
)  # fmt: skip
QUERIED = (
    "power_watts", "temperature_celsius", "sm_clock_mhz", "utilization_percent", "memory_used_mebibytes",
)  # fmt: skip
QUERIED_STEP = "5m"
# A day at 10 s has 8,640.
_MOST_POINTS = 10_000
_STALL_SECONDS = 120.0
# At once, as a worker with a backlog does.
_INSERTED_SAMPLES = 10_000
_WATCHED_SINCE = datetime(2026, 1, 31, 12, tzinfo=UTC)
# Asked less often, the end would be seen late; more often, asking would be what is measured.
_POLL_SECONDS = 0.1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    seed: int = 7
    gpus_per_host: int = 64
    hosts: int = 16
    records: int = 3_000
    single_records: int = 20_000
    repeats: int = 3
    watched_seconds: int = 300
    scored_gpus: int = 10_000
    #: Values in the database, of a day: where insertion and queries are measured.
    growth_values: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    growth_interval_seconds: float = 10.0


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one way was: medians over the repeats."""

    samples_per_second: float
    values_per_second: float
    records_per_second: float
    #: Processor time of the worker per sample; the database's is not in it.
    cpu_microseconds_per_sample: float


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Kafka to PostgreSQL, one worker."""

    samples_per_record: int
    fields: int
    record: Rate
    bare: Rate
    ratio_to_bare: float


def samples_of(plan: Plan, tick: int, host: int, gpus: int, start: datetime, interval: timedelta) -> Samples:
    """Return one record's samples."""
    drawn = random.Random(plan.seed * 1_000_003 + tick * 1_009 + host)
    return Samples(
        host=f"node-{host}",
        source="bench",
        samples=tuple(
            Sample(
                gpu_uuid=f"GPU-{host:04d}-{gpu:03d}",
                time=start + tick * interval,
                values={name: round(drawn.uniform(0, 1), 3) for name in FIELDS},
            )
            for gpu in range(gpus)
        ),
    )


def record(settings: Settings, plan: Plan, worker: Worker, say: Say) -> dict[str, Any]:
    """Measure `record` beside a bare loop, many samples per record and one."""
    many = _recorded(settings, plan, worker, say, plan.gpus_per_host, plan.records)
    single = _recorded(settings, plan, worker, say, 1, plan.single_records)
    return {"ratio_to_bare": many.ratio_to_bare, "many": many, "single": single}


def _recorded(settings: Settings, plan: Plan, worker: Worker, say: Say, gpus: int, records: int) -> Recorded:
    rates: dict[str, list[tuple[float, float]]] = {"record": [], "bare": []}
    for repeat in range(plan.repeats):
        own = settings.model_copy(update={"topic_prefix": f"bench-{gpus}-{repeat}-"})
        say(f"{gpus} samples per record, repeat {repeat + 1}: publishing {records} records")
        asyncio.run(_publish(own, plan, gpus, records))
        ways = [("record", _time_record), ("bare", _time_bare)]
        for name, measure in ways if repeat % 2 == 0 else reversed(ways):
            asyncio.run(_empty(own))
            rates[name].append(measure(own, worker, gpus * records))
            say(f"  {name}: {rounded(rates[name][-1][0])} samples/s")
    made = {
        name: Rate(
            samples_per_second=rounded(median(rate for rate, _ in found)),
            values_per_second=rounded(median(rate for rate, _ in found) * len(FIELDS)),
            records_per_second=rounded(median(rate for rate, _ in found) / gpus),
            cpu_microseconds_per_sample=rounded(median(cpu for _, cpu in found) * 1e6),
        )
        for name, found in rates.items()
    }
    # Each pair was measured right after each other: what else runs on the machine touches both.
    pairs = zip(rates["record"], rates["bare"], strict=True)
    return Recorded(
        samples_per_record=gpus,
        fields=len(FIELDS),
        record=made["record"],
        bare=made["bare"],
        ratio_to_bare=rounded(median(ours / bare for (ours, _), (bare, _) in pairs)),
    )


async def _publish(settings: Settings, plan: Plan, gpus: int, records: int) -> None:
    await admin.apply_topics(settings, (GPU_SAMPLES, GPU_WINDOWS, GPU_ALERTS, DEAD_LETTERS))
    hosts = plan.hosts if gpus > 1 else plan.hosts * plan.gpus_per_host
    # The present minute: a worker in step with its fleet rolls up the minute before, not the one that it writes.
    start, interval = datetime.now(UTC), timedelta(milliseconds=100)
    publisher = Publisher(settings, client_id="bench")
    await publisher.start()
    try:
        topic = settings.topic(GPU_SAMPLES.name)
        for first in range(0, records, 500):
            batch = [
                telemetry.encode_samples(samples_of(plan, n // hosts, n % hosts, gpus, start, interval))
                for n in range(first, min(first + 500, records))
            ]
            await asyncio.gather(*(publisher.publish_forever(topic, each, step="bench") for each in batch))
    finally:
        await publisher.stop()


async def _empty(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.resolved_database)
    try:
        await connection.execute("TRUNCATE gpu_samples, gpu_rollups_due")
        await connection.execute("DROP TABLE IF EXISTS bare_samples")
        await connection.execute("CREATE TABLE bare_samples (LIKE gpu_samples INCLUDING ALL)")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def _time_record(settings: Settings, worker: Worker, samples: int) -> tuple[float, float]:
    """Return samples/s from the first batch stored to the last, and processor seconds per sample."""
    with worker(settings, "record") as url:
        points = list(_stored(url, samples))
    # A run that is over before it is first looked at counts from before its first batch.
    (begun, first, cpu_first), (ended, last, cpu_last) = points[min(1, len(points) - 2)], points[-1]
    return (last - first) / (ended - begun), (cpu_last - cpu_first) / (last - first)


def _stored(url: str, samples: int) -> Iterator[tuple[float, float, float]]:
    """Yield (time, samples stored, processor seconds) at once, then from the first batch to the last."""
    started = time.monotonic()
    deadline = started + _STALL_SECONDS
    stored = 0.0
    yield started, 0.0, 0.0
    while stored < samples:
        found = read_metrics(url)
        now, stored = time.monotonic(), found["millrace_samples_stored_total"]
        if stored:
            yield now, stored, found["process_cpu_seconds_total"]
        if now > deadline:
            raise DependencyError(f"{stored:.0f} of {samples} samples stored after {_STALL_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


def _time_bare(settings: Settings, worker: Worker, samples: int) -> tuple[float, float]:
    plan = telemetry_loop.LoopPlan(
        bootstrap_servers=settings.resolved_kafka,
        topic=settings.topic(GPU_SAMPLES.name),
        dsn=settings.resolved_database,
        table="bare_samples",
        fields=FIELDS,
        samples=samples,
    )
    out = asyncio.run(loop_process.output_of("loadtest.telemetry_loop", msgspec.json.encode(plan).decode()))
    done = msgspec.json.decode(out, type=telemetry_loop.Done)
    return done.samples / done.seconds, done.cpu_seconds / done.samples


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """The database with a day of so many GPUs in it; answers come from the gateway, over HTTP."""

    values: int
    gpus: int
    insert_samples_per_second: float
    #: All samples of one GPU over 24 h as JSON: all fields, and 5; and these by 5 minutes.
    whole_24h_seconds: float
    raw_24h_seconds: float
    rolled_24h_seconds: float


def growth(settings: Settings, plan: Plan, worker: Worker, say: Say) -> dict[str, Any]:
    """Measure insertion, queries and roll-ups with a day of ever more GPUs in the database."""
    with worker(settings, "gateway") as url:
        return asyncio.run(_growth(settings, plan, url, say))


async def _growth(settings: Settings, plan: Plan, url: str, say: Say) -> dict[str, Any]:
    database = await TelemetryDatabase.open(settings)
    day, interval = timedelta(days=1), timedelta(seconds=plan.growth_interval_seconds)
    start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - day
    steps = []
    try:
        for values in plan.growth_values:
            await _empty(settings)
            # A whole day of so many GPUs, so that the answers are always of the same size.
            gpus = max(1, round(values / len(FIELDS) / (day // interval)))
            ticks = max(1, _INSERTED_SAMPLES // gpus)
            rates, stored = [], 0
            for first in range(0, day // interval, ticks):
                batch = [
                    ("bench", samples_of(plan, tick, 9_999, gpus, start, interval))
                    for tick in range(first, min(first + ticks, day // interval))
                ]
                begun = time.monotonic()
                saved = await database.save_samples(batch)
                rates.append(saved.stored / (time.monotonic() - begun))
                stored += saved.stored
            begun = time.monotonic()
            minutes = await Rollups(database.pool, database.partitions).advance(start + 2 * day)
            rolled = time.monotonic() - begun
            fields = ",".join(QUERIED)
            whole = await asyncio.to_thread(_query_seconds, url, gpus, start)
            raw = await asyncio.to_thread(_query_seconds, url, gpus, start, fields=fields)
            rolled_up = await asyncio.to_thread(
                _query_seconds, url, gpus, start, fields=fields, step=QUERIED_STEP
            )
            step = Growth(
                values=stored * len(FIELDS),
                gpus=gpus,
                insert_samples_per_second=rounded(median(rates)),
                whole_24h_seconds=rounded(whole),
                raw_24h_seconds=rounded(raw),
                rolled_24h_seconds=rounded(rolled_up),
            )
            say(f"  {step}; {minutes} roll-ups in {rolled:.1f} s")
            steps.append(step)
        return {"steps": steps}
    finally:
        await database.close()


def _query_seconds(url: str, gpus: int, start: datetime, **asked: str) -> float:
    """Return how long the answer of `/v1/gpus/{uuid}/telemetry` takes, to the last byte; a median over GPUs."""
    taken = []
    span = {
        "start": start.isoformat(),
        "end": (start + timedelta(days=1)).isoformat(),
        "limit": str(_MOST_POINTS),
    }
    query = urllib.parse.urlencode(span | asked)
    for number in range(min(gpus, 20)):
        begun = time.monotonic()
        with urllib.request.urlopen(
            f"{url}/v1/gpus/GPU-9999-{number:03d}/telemetry?{query}", timeout=60
        ) as answer:
            answer.read()
        taken.append(time.monotonic() - begun)
    return percentile(taken, 0.5)


def detect(settings: Settings, plan: Plan, worker: Worker, say: Say) -> dict[str, Any]:
    """Score detection on fleets whose faults are known, on seeds of its own; of the stack it needs nothing."""
    found: dict[str, Any] = msgspec.to_builtins(
        detection.measure(load_rules(), detection.DetectionPlan(), lambda text: say(f"  {text}"))
    )
    return found


def watch(settings: Settings, plan: Plan, worker: Worker, say: Say) -> dict[str, Any]:
    """Measure samples to windows in this process: five minutes of some hosts, a sample per second and GPU."""
    second = timedelta(seconds=1)
    records = [
        samples_of(plan, tick, host, plan.gpus_per_host, _WATCHED_SINCE, second)
        for tick in range(plan.watched_seconds)
        for host in range(2)
    ]
    found = telemetry_watch.measure_watch(records, plan.repeats)
    say(f"  {found}")
    return msgspec.structs.asdict(found)


def score(settings: Settings, plan: Plan, worker: Worker, say: Say) -> dict[str, Any]:
    """Measure one window of very many GPUs in this process."""
    hosts = [
        samples_of(plan, 0, host, 8, _WATCHED_SINCE, timedelta(seconds=1))
        for host in range(plan.scored_gpus // 8)
    ]
    found = telemetry_watch.measure_score(hosts, max(plan.repeats, 3))
    say(f"  {found}")
    return msgspec.structs.asdict(found)


Section = Callable[[Settings, Plan, Worker, Say], dict[str, Any]]
SECTIONS: dict[str, Section] = {
    "record": record, "growth": growth, "watch": watch, "score": score, "detection": detect,
}  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a person wants to read of a result."""
    plain = msgspec.to_builtins(result)
    return [(".".join(path), str(value)) for path, value in _leaves(plain, ())]


def _leaves(value: Any, path: Sequence[str]) -> Iterator[tuple[Sequence[str], Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(number)))
    else:
        yield path, value
