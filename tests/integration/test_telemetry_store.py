"""GPU telemetry in a real PostgreSQL: the tables, samples, windows with the life of alerts, retention."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from pipeline import dcgm, examples, telemetry, telemetry_retention
from pipeline.errors import StorageRefusedError
from pipeline.events import Record
from pipeline.known_gpus import KnownGpus
from pipeline.partitions import GPU_SAMPLES, GPU_WINDOWS
from pipeline.plain_samples import AnySamples, PlainSamples, SampleReader
from pipeline.settings import load
from pipeline.telemetry import Condition, Gpu, GpuWindow, Sample, Samples, Windows
from pipeline.telemetry_database import SILENT_HOURS, TelemetryDatabase
from pipeline.telemetry_retention import RemovedTelemetry
from pipeline.telemetry_writes import SavedSamples, SavedWindows

START = datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC)
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)


@pytest.fixture
async def db(database: str) -> AsyncIterator[TelemetryDatabase]:
    opened = await TelemetryDatabase.open(load(database_url=database))
    yield opened
    await opened.close()


async def fetch(database: TelemetryDatabase, statement: str, *arguments: Any) -> list[Any]:
    async with database.pool.transaction() as connection:
        return [tuple(row) for row in await connection.fetch(statement, *arguments)]


def batch(*samples: Sample, host: str = "node-1", gpus: tuple[Gpu, ...] = ()) -> list[tuple[str, Samples]]:
    return [(host, Samples(host=host, samples=samples, gpus=gpus))]


def sample(uuid: str = "GPU-1", seconds: float = 0, **more: Any) -> Sample:
    values = more.pop("values", {"temperature_celsius": 50.0})
    return Sample(gpu_uuid=uuid, time=START + seconds * SECOND, values=values, **more)


async def columns(dsn: str, table: str) -> list[str]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped "
            "AND atttypid = 'double precision'::regtype ORDER BY attnum",
            table,
        )
        return [row["attname"] for row in rows]
    finally:
        await connection.close()


async def test_samples_have_a_column_for_each_field(database: str) -> None:
    """The table of samples has the fields of the field table, in their order."""
    assert await columns(database, "gpu_samples") == list(dcgm.NAMES)


async def test_rollups_have_columns_for_each_field(database: str) -> None:
    """A roll-up has minimum and maximum of every field, and the mean of those that have one."""
    expected = ["seconds", "idle_seconds", "joules"]
    for field in dcgm.FIELDS:
        expected += [f"{field.name}_min", f"{field.name}_max"]
        expected += [f"{field.name}_mean"] if field.kind == "gauge" else []
    assert await columns(database, "gpu_minutes") == expected
    assert await columns(database, "gpu_hours") == expected


async def test_samples_come_back_value_for_value(db: TelemetryDatabase) -> None:
    """Every field, unknown ones, XIDs, state and source time are stored as given, over midnight and time zones."""
    values = {name: number + 0.1 for number, name in enumerate(dcgm.NAMES)}
    source_time = datetime(2025, 7, 18, 13, 42, 33, 123456, UTC)
    full = sample(
        values=values | {"acme:fan.rpm": 1200.0}, xids=(79, 13), state="lost", source_time=source_time
    )
    bare = sample("GPU-2", 20, values={}, source_time=datetime(1, 1, 1, tzinfo=UTC))
    saved = await db.save_samples(batch(full, bare))
    assert saved == SavedSamples(stored=2)
    (found,) = await fetch(db, f"SELECT {', '.join(dcgm.NAMES)} FROM gpu_samples WHERE lost")
    assert found == tuple(values.values())
    rest = "SELECT gpu_uuid, time, xids, other, source_time FROM gpu_samples JOIN gpus USING (gpu_id) ORDER BY time"
    assert await fetch(db, rest) == [
        ("GPU-1", START, [79, 13], '{"acme:fan.rpm": 1200.0}', source_time),
        ("GPU-2", START + 20 * SECOND, None, None, None),
    ]
    assert await db.partitions.expired(GPU_SAMPLES, START + timedelta(days=9)) == [
        "gpu_samples_20260131", "gpu_samples_20260201",
    ]  # fmt: skip


async def test_the_first_value_of_a_gpu_and_a_time_stays(db: TelemetryDatabase) -> None:
    """Repeats change nothing, new fields of a known sample are added, other values are counted and left out."""
    first = sample(values={"temperature_celsius": 50.0})
    assert await db.save_samples(batch(first, first)) == SavedSamples(stored=1, repeats=1)
    assert await db.save_samples(batch(first, sample(seconds=1))) == SavedSamples(stored=1, repeats=1)
    more = sample(values={"power_watts": 300.0})
    assert await db.save_samples(batch(more)) == SavedSamples(repeats=1)
    other = sample(values={"temperature_celsius": 99.0, "power_watts": 300.0})
    assert await db.save_samples(batch(other)) == SavedSamples(conflicts=1)
    stored = await fetch(
        db, "SELECT temperature_celsius, power_watts FROM gpu_samples WHERE time = $1", START
    )
    assert stored == [(50.0, 300.0)]


async def test_samples_of_other_columns_meet(db: TelemetryDatabase) -> None:
    """Of a batch with records of other columns the first value stays too, in the order of the batch."""
    reader = SampleReader()

    def read(*samples: Sample) -> tuple[str, AnySamples]:
        value = telemetry.encode_samples(Samples(host="node-1", samples=samples)).value
        record = Record(
            topic="t", partition=0, offset=0, timestamp_ms=int(START.timestamp() * 1000), value=value
        )
        return ("node-1", reader.decode(record)[0])

    hot, late = sample(values={"temperature_celsius": 90.0}), sample(seconds=20, values={})
    odd = sample(values={"power_watts": 300.0, "temperature_celsius": 50.0, "acme": 1.0})
    read(hot, sample(values={"fan_speed_percent": 1.0}))
    batch = [read(sample(seconds=1)), read(odd), read(hot, late)]
    assert [isinstance(samples, PlainSamples) for _, samples in batch] == [True, False, True]
    assert await db.save_samples(batch) == SavedSamples(stored=3, conflicts=1)
    assert await db.save_samples(batch) == SavedSamples(repeats=3, conflicts=1)
    statement = "SELECT time, temperature_celsius, power_watts, other FROM gpu_samples ORDER BY time"
    assert await fetch(db, statement) == [
        (START, 50.0, 300.0, '{"acme": 1.0}'),
        (START + SECOND, 50.0, None, None),
        (START + 20 * SECOND, None, None, None),
    ]
    assert await fetch(db, "SELECT DISTINCT fan_speed_percent FROM gpu_samples") == [(None,)]


async def test_writers_of_the_same_samples(database: str, db: TelemetryDatabase) -> None:
    """Two processes that write overlapping batches at once, of GPUs nobody knew, store each sample once."""
    other = await TelemetryDatabase.open(load(database_url=database))
    batches = [batch(*(sample(f"GPU-{n}", s) for n in range(8) for s in range(k, k + 6))) for k in range(6)]

    async def write(to: TelemetryDatabase) -> None:
        for each in batches:
            await to.save_samples(each)

    try:
        await asyncio.gather(write(db), write(other))
    finally:
        await other.close()
    count = "SELECT count(*), count(DISTINCT (gpu_id, time)), count(DISTINCT gpu_id) FROM gpu_samples"
    assert await fetch(db, count) == [(8 * 11, 8 * 11, 8)]
    assert await fetch(db, "SELECT count(*) FROM gpus") == [(8,)]


async def test_what_a_gpu_is(db: TelemetryDatabase) -> None:
    """A description stays until another one comes; state and the time of the last sample follow the samples."""
    gpu = Gpu(gpu_uuid="GPU-1", index=3, model="H100", labels={"pod": "a"})
    await db.save_samples(batch(sample(), gpus=(gpu,)))
    await db.save_samples(batch(sample(seconds=60)))
    await db.save_samples(
        batch(sample(seconds=61, state="lost"), gpus=(Gpu(gpu_uuid="GPU-1", device="nvidia3"),))
    )
    row = "SELECT host, peer_key, index, model, device, labels, state, first_seen, last_seen, conflicts FROM gpus"
    assert await fetch(db, row) == [
        ("node-1", "node-1", 3, "H100", "nvidia3", '{"pod": "a"}', "lost", START, START + 61 * SECOND, 0)
    ]


async def test_a_uuid_on_two_hosts(db: TelemetryDatabase) -> None:
    """Two hosts that name one UUID at a time are noted now and then, all samples kept; later the card has moved."""
    await db.save_samples(batch(sample()))
    for seconds in range(1, 20, 2):
        await db.save_samples(batch(sample(seconds=seconds), host="node-2"))
        await db.save_samples(batch(sample(seconds=seconds + 1)))
    row = "SELECT host, conflict_host, conflicts FROM gpus"
    assert await fetch(db, row) == [("node-1", "node-2", 1)]
    await db.save_samples(batch(sample(seconds=700), host="node-2"))
    assert await fetch(db, row) == [("node-2", "node-2", 1)]
    assert await fetch(db, "SELECT count(*) FROM gpu_samples") == [(22,)]


async def test_a_gpu_takes_one_number(database: str, db: TelemetryDatabase) -> None:
    """Bringing a GPU up to date takes no number of the sequence, which two hosts or processes would use up."""
    for seconds in range(0, 1000, 50):
        await db.gpus.identify(batch(sample(seconds=seconds)))
        await KnownGpus(db.pool).identify(batch(sample(seconds=seconds)))
    assert await db.gpus.identify(batch(sample("GPU-2"), sample("GPU-1", 1000))) == {"GPU-1": 1, "GPU-2": 2}


async def test_what_the_database_refuses_is_named(db: TelemetryDatabase) -> None:
    """A number that no column takes is the data's fault, and nothing of its batch is stored."""
    with pytest.raises(StorageRefusedError):
        await db.save_samples(batch(sample(), sample(seconds=1, xids=(2**40,))))
    assert await fetch(db, "SELECT count(*) FROM gpu_samples") == [(0,)]


async def test_what_the_driver_refuses_is_named(db: TelemetryDatabase) -> None:
    """An argument that the driver itself refuses is the data's fault too, and not tried again for ever."""
    with pytest.raises(StorageRefusedError):
        await db.pool.rows("gpu_ids", 37.5)


def closed(
    minute: int, *conditions: Condition, length: int = 1, uuid: str = "GPU-1", host: str = "node-1"
) -> Windows:
    start = START + minute * MINUTE
    gpu = GpuWindow(gpu_uuid=uuid, host=host, model="H100", samples=6, conditions=conditions, xids=(79,))
    return Windows(key=host, start=start, end=start + length * MINUTE, gpus=(gpu,), rules_version="1")


def condition(state: Any, rule: str = "hot") -> Condition:
    return Condition(rule=rule, severity="critical", state=state, since=START, message="91 C, limit 90")


async def test_windows_and_the_life_of_an_alert(db: TelemetryDatabase) -> None:
    """Windows are stored once, and what follows from them is queued once, in order, however often they come."""
    story = [closed(0, condition("pending")), closed(1, condition("firing")), closed(2)]
    for windows in [*story, *story, story[0]]:
        await db.save_windows([windows])
    assert await fetch(db, "SELECT count(*), min(samples), min(xids) FROM gpu_windows") == [(3, 6, [79])]
    alert = "SELECT rule, severity, state, host, model, since, fired_at, resolved_at, seen_at FROM gpu_alerts"
    assert await fetch(db, alert) == [
        ("hot", "critical", "resolved", "node-1", "H100", START, START + 2 * MINUTE, START + 3 * MINUTE,
         START + 2 * MINUTE),
    ]  # fmt: skip
    async with db.outbox(10) as steps:
        assert [step.state for step in steps] == ["pending", "firing", "resolved"]
        assert {step.condition.message for step in steps} == {"91 C, limit 90"}
    async with db.outbox(10) as steps:
        assert steps == []


async def test_all_of_a_batch_of_windows_or_nothing(db: TelemetryDatabase) -> None:
    """Windows that follow each other in one batch make the steps they would make alone."""
    saved = await db.save_windows(
        [closed(0, condition("pending")), closed(1, condition("firing")), closed(2)]
    )
    assert [step.state for step in saved.steps] == ["pending", "firing", "resolved"]
    bad = closed(3, condition("firing", "new"))
    bad = msgspec.structs.replace(bad, gpus=(msgspec.structs.replace(bad.gpus[0], xids=(2**40,)),))
    with pytest.raises(StorageRefusedError):
        await db.save_windows([closed(3, condition("firing", "other")), bad])
    assert await fetch(db, "SELECT count(*) FROM gpu_alerts") == [(1,)]


async def test_writers_of_the_same_windows(database: str, db: TelemetryDatabase) -> None:
    """Two processes that take the same windows into account at once make each step once."""
    other = await TelemetryDatabase.open(load(database_url=database))
    gpus = [f"GPU-{number}" for number in range(6)]
    story = [
        [closed(minute, *conditions, uuid=uuid) for uuid in gpus]
        for minute, conditions in enumerate([[condition("pending")], [condition("firing")], []])
    ]
    try:
        for windows in story:
            made = await asyncio.gather(db.save_windows(windows), other.save_windows(windows[::-1]))
            assert sorted(len(saved.steps) for saved in made) == [0, 6]
    finally:
        await other.close()
    async with db.outbox(100) as steps:
        assert len(steps) == len({(step.id, step.state) for step in steps}) == 18


async def test_windows_of_another_host(db: TelemetryDatabase) -> None:
    """Of two hosts that name one GPU the first one's windows count, until it is silent."""
    await db.save_samples(batch(sample(seconds=600)))
    await db.save_windows([closed(0, condition("firing"))])
    assert await db.save_windows([closed(1, host="node-2"), closed(18, host="node-2")]) == SavedWindows(
        foreign=2
    )
    assert await fetch(db, "SELECT state FROM gpu_alerts") == [("firing",)]
    assert await fetch(db, "SELECT count(*) FROM gpu_windows") == [(1,)]
    (step,) = (await db.save_windows([closed(20, host="node-2")])).steps
    assert step.state == "resolved"


async def test_alerts_of_gpus_that_are_gone(db: TelemetryDatabase) -> None:
    """Alerts of a GPU that no window came of for a day of hours are resolved once; those of the others stay."""
    for uuid in ("GPU-1", "GPU-2"):
        await db.save_windows([closed(0, condition("firing"), uuid=uuid)])
    gone = "UPDATE gpu_progress SET touched_at = touched_at - interval '61 minutes' RETURNING silent_hours"
    now = START + timedelta(days=2)
    for hour in range(SILENT_HOURS - 1):
        assert sorted(await fetch(db, gone)) == [(0,), (hour,)]
        assert await db.resolve_silent(10, now) == []
        # Asked again at once, by a process that began or by another replica, it counts no other hour.
        assert await db.resolve_silent(10, now) == []
        await db.save_windows([closed(hour + 1, condition("firing"), uuid="GPU-2")])
    await fetch(db, gone)
    steps = await db.resolve_silent(10, now)
    assert [(step.gpu_uuid, step.state, step.time) for step in steps] == [("GPU-1", "resolved", now)]
    assert await db.resolve_silent(10, now) == []
    assert await fetch(db, "SELECT gpu_uuid FROM gpu_alerts WHERE state = 'firing'") == [("GPU-2",)]
    async with db.outbox(10) as queued:
        assert [step.state for step in queued] == ["firing", "firing", "resolved"]


async def test_steps_stay_queued_until_they_are_published(database: str, db: TelemetryDatabase) -> None:
    """Steps leave the queue only without an error, and one process publishes at a time."""
    await db.save_windows([closed(0, condition("firing"))])
    with pytest.raises(ZeroDivisionError):
        async with db.outbox(10) as steps:
            raise ZeroDivisionError
    other = await TelemetryDatabase.open(load(database_url=database))
    try:
        async with db.outbox(10) as steps, other.outbox(10) as none:
            assert (len(steps), none) == (1, [])
    finally:
        await other.close()


async def test_examples_are_stored(db: TelemetryDatabase) -> None:
    """What the contract's golden records say fits the tables."""
    for samples in examples.samples():
        assert (await db.save_samples([(samples.host, samples)])).stored == len(samples.samples)
    for windows in examples.windows():
        await db.save_windows([windows])
    assert await fetch(db, "SELECT count(*) FROM gpu_alerts WHERE state = 'firing'") == [(2,)]


async def test_old_days_are_dropped(db: TelemetryDatabase) -> None:
    """Retention drops whole days once they are over and old; what arrives for a day that is gone makes it again."""
    await db.save_samples(batch(sample(), sample(seconds=20)))
    assert await db.partitions.drop(GPU_SAMPLES, START) == []
    assert await db.partitions.drop(GPU_SAMPLES, START + 10 * SECOND) == ["gpu_samples_20260131"]
    assert await fetch(db, "SELECT time FROM gpu_samples") == [(START + 20 * SECOND,)]
    await db.save_samples(batch(sample(seconds=-1)))
    assert await fetch(db, "SELECT count(*) FROM gpu_samples") == [(2,)]
    assert await db.partitions.expired(GPU_WINDOWS, START) == []


async def test_a_partition_that_another_process_dropped(database: str, db: TelemetryDatabase) -> None:
    """A partition that is gone is a reason to try again, and the second attempt makes it anew."""
    await db.save_samples(batch(sample()))
    connection = await asyncpg.connect(database)
    await connection.execute("DROP TABLE gpu_samples_20260131")
    await connection.close()
    with pytest.raises(Exception, match="42P01"):
        await db.save_samples(batch(sample()))
    assert (await db.save_samples(batch(sample()))).stored == 1


async def test_retention_by_each_table(database: str, db: TelemetryDatabase) -> None:
    """What is needed soon is made; what its setting calls too old is counted, then removed, and nothing else."""
    settings = load(
        database_url=database, sample_retention_days=2, result_retention_days=10, minute_retention_days=40,
        hour_retention_days=400,
    )  # fmt: skip
    await telemetry_retention.make_ahead(db, START)
    await telemetry_retention.make_ahead(db, START)
    assert (await telemetry_retention.remove_expired(db, settings, START)).partitions == ()
    for windows in (closed(0, condition("firing")), closed(1), closed(2, condition("firing", "other"))):
        await db.save_windows([windows])
    for days, names, alerts in (
        (2, ("gpu_samples_20260131",), 0),
        (10, ("gpu_samples_20260201", "gpu_samples_20260202", "gpu_windows_20260131"), 1),
        (60, ("gpu_windows_20260201", "gpu_windows_20260202", "gpu_minutes_20260101"), 0),
    ):
        now = START + timedelta(days=days, minutes=3)
        expected = RemovedTelemetry(partitions=names, alerts=alerts)
        assert await telemetry_retention.expired(db, settings, now) == expected
        assert await telemetry_retention.remove_expired(db, settings, now) == expected
    assert await fetch(db, "SELECT rule FROM gpu_alerts") == [("other",)]
