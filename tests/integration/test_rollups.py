"""Roll-ups in a real PostgreSQL: a minute and an hour say what their samples say, however late one comes."""

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.rollups import Rollups
from pipeline.settings import load
from pipeline.telemetry import Sample, Samples
from pipeline.telemetry_database import TelemetryDatabase

START = datetime(2026, 1, 31, 23, 58, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LATER = START + timedelta(days=1)


@pytest.fixture
async def db(database: str) -> AsyncIterator[TelemetryDatabase]:
    opened = await TelemetryDatabase.open(load(database_url=database))
    yield opened
    await opened.close()


def sample(seconds: float, uuid: str = "GPU-1", xids: tuple[int, ...] = (), **values: float) -> Sample:
    return Sample(gpu_uuid=uuid, time=START + seconds * SECOND, values=values, xids=xids)


async def store(db: TelemetryDatabase, *samples: Sample) -> None:
    await db.save_samples([("node", Samples(host="node", samples=samples))])


async def rows(db: TelemetryDatabase, table: str, columns: str) -> list[tuple[Any, ...]]:
    async with db.pool.transaction() as connection:
        found = await connection.fetch(f"SELECT {columns} FROM {table} ORDER BY gpu_id, time")
    return [tuple(row) for row in found]


async def rolled(db: TelemetryDatabase, table: str, columns: str) -> list[tuple[Any, ...]]:
    await Rollups(db.pool, db.partitions).advance(LATER)
    return await rows(db, table, columns)


async def test_a_minute_and_an_hour(db: TelemetryDatabase) -> None:
    """Count, least, most, mean; a bitmask's common and united bits; XIDs; over midnight and the end of a month."""
    await store(
        db,
        sample(0, temperature_celsius=50, clock_event_reasons=5, xids=(13,)),
        sample(30, temperature_celsius=60, clock_event_reasons=4),
        sample(150, temperature_celsius=70, xids=(79, 31)),
    )
    columns = (
        "time, samples, temperature_celsius_count, temperature_celsius_min, temperature_celsius_max, "
        "temperature_celsius_mean, clock_event_reasons_min, clock_event_reasons_max, xids, power_watts_count"
    )
    midnight = START + 120 * SECOND
    assert await rolled(db, "gpu_minutes", columns) == [
        (START, 2, 2, 50, 60, 55, 4, 5, [13], None),
        (midnight, 1, 1, 70, 70, 70, None, None, [79, 31], None),
    ]
    assert await rows(db, "gpu_hours", columns) == [
        (START - 58 * 60 * SECOND, 2, 2, 50, 60, 55, 4, 5, [13], None),
        (midnight, 1, 1, 70, 70, 70, None, None, [79, 31], None),
    ]
    await store(db, sample(90, temperature_celsius=90))
    await rolled(db, "gpu_minutes", "1")
    assert (await rows(db, "gpu_hours", columns))[0][1:6] == (3, 3, 50, 90, pytest.approx(200 / 3))


async def test_errors_of_an_hour_stay_in_order(db: TelemetryDatabase) -> None:
    """Whichever minute came first, an hour's XIDs are in the order of time, those of one sample in its order."""
    xids = [tuple(range(10 * minute, 10 * minute + 10)) for minute in range(4)]
    for minute in (3, 1, 2, 0):
        await store(db, sample(120 + 60 * minute, xids=xids[minute]))
        await rolled(db, "gpu_minutes", "1")
    async with db.pool.transaction() as connection:
        await connection.execute("ANALYZE gpu_minutes")  # so that they are read as they lie there
    await store(db, sample(121))
    assert await rolled(db, "gpu_minutes", "xids") == [(list(each),) for each in xids]
    assert await rows(db, "gpu_hours", "xids") == [([xid for each in xids for xid in each],)]


async def test_energy_is_what_the_counter_gained(db: TelemetryDatabase) -> None:
    """A reset begins at zero, a jump that no GPU makes is power times time, an XID in between disturbs nothing."""
    counter = [(0, 1e6), (10, 1.5e6), (20, 2e6), (30, 3e5), (40, 9e15)]
    await store(
        db,
        *(sample(at, energy_millijoules=value, power_watts=40) for at, value in counter),
        sample(15, xids=(13,)),
    )
    assert await rolled(db, "gpu_minutes", "joules, seconds") == [(500 + 500 + 300 + 400, 40)]


async def test_power_stands_in_for_a_counter(db: TelemetryDatabase) -> None:
    """Without a counter energy is power times time, idle time that below 5 %; of long silence nothing is known."""
    await store(
        db,
        sample(0, power_watts=100, utilization_percent=90),
        sample(20, power_watts=200, utilization_percent=4),
        sample(50, power_watts=200, utilization_percent=50),
        sample(1000, power_watts=200, utilization_percent=0),
    )
    expected = [(150 * 20 + 200 * 30, 50, 20), (None, 0, 0)]
    assert await rolled(db, "gpu_minutes", "joules, seconds, idle_seconds") == expected


async def test_each_field_at_a_moment_of_its_own(db: TelemetryDatabase) -> None:
    """Energy and idle time are whole where each field has rows of its own, over the end of a minute too."""
    for start in range(0, 120, 15):
        await store(
            db,
            sample(start, utilization_percent=0 if start <= 60 else 50),
            sample(start + 1.3, temperature_celsius=50),
            sample(start + 2.7, power_watts=100 if start < 60 else 300),
            sample(start + 4, memory_used_mebibytes=7),
        )
    # In the first minute 45 s from one power to the next, in the second one step to 300 W and 45 s at it.
    assert await rolled(db, "gpu_minutes", "joules, seconds, idle_seconds") == [
        (4500, pytest.approx(47.7), 45), (3000 + 13500, pytest.approx(60), 15),
    ]  # fmt: skip


async def test_power_beside_a_counter(db: TelemetryDatabase) -> None:
    """Energy is counted once where power and counter come apart; power stands in when the counter ends."""
    gained = {0: 1e6, 60: 1.6e6, 120: 2.2e6}  # 10 W; power says 50 W
    for at in range(0, 660, 30):
        if at in gained:
            await store(db, sample(at, energy_millijoules=gained[at]))
        await store(db, sample(at + 2, power_watts=50))
    # Five minutes after its last value the counter is no more.
    assert [joules for (joules,) in await rolled(db, "gpu_minutes", "joules")] == [
        None, 600, 600, None, None, None, None, None, 3000, 3000, 3000,
    ]  # fmt: skip


async def test_a_late_sample_corrects_the_minute_after(db: TelemetryDatabase) -> None:
    """In whatever order samples come and roll-ups are made, the result is the one of samples in order."""
    samples = [
        sample(n * 7, uuid, energy_millijoules=n * n * 1000.0, utilization_percent=n % 9, power_watts=n)
        for n in range(60) for uuid in ("GPU-1", "GPU-2")
    ]  # fmt: skip
    columns = "gpu_id, time, samples, joules, seconds, idle_seconds, power_watts_mean, energy_millijoules_max"
    await store(db, *samples)
    expected = await rolled(db, "gpu_minutes", columns), await rows(db, "gpu_hours", columns)
    async with db.pool.transaction() as connection:
        await connection.execute("TRUNCATE gpu_samples, gpu_minutes, gpu_hours")
    random.shuffle(samples)
    for first in range(0, len(samples), 13):
        await store(db, *samples[first : first + 13])
        await Rollups(db.pool, db.partitions).advance(LATER)
    found = await rows(db, "gpu_minutes", columns), await rows(db, "gpu_hours", columns)
    for some, others in zip(found, expected, strict=True):
        assert len(some) == len(others)
        for one, other in zip(some, others, strict=True):
            assert one[:3] == other[:3]
            assert one[3:] == pytest.approx(other[3:])


async def test_a_late_value_corrects_the_minutes_after(db: TelemetryDatabase) -> None:
    """Where each field has rows of its own, any one that comes late leaves the result that it has in order."""
    moments = [
        *((at, {"utilization_percent": at / 100 % 7}) for at in (*range(0, 400, 40), *range(400, 1500, 200))),
        *((at + 2.7, {"power_watts": 100.0 + at}) for at in range(0, 1500, 130)),
        *((at + 4, {"energy_millijoules": 1e6 + at * at}) for at in range(0, 400, 130)),
        (1450, {"energy_millijoules": 1e9}),
    ]  # fmt: skip
    for late in (False, True):
        await store(
            db,
            *(
                sample(at, f"GPU-{gpu:02}", **values)
                for gpu in range(len(moments) + 1)  # nothing of the last one is late
                for number, (at, values) in enumerate(moments)
                if (gpu == number) is late
            ),
        )
        await rolled(db, "gpu_minutes", "1")
    of_gpus: dict[int, list[Any]] = {}
    for gpu_id, *row in await rows(db, "gpu_minutes", "gpu_id, time, joules, seconds, idle_seconds"):
        of_gpus.setdefault(gpu_id, []).append(tuple(row))
    *each, in_order = of_gpus.values()
    assert len(each) == len(moments)
    assert sum(joules is not None for _, joules, _, _ in in_order) > 6
    assert [gpu for gpu, found in enumerate(each) if found != in_order] == []


async def test_a_minute_that_fails_keeps_no_other_waiting(db: TelemetryDatabase) -> None:
    """A minute that the database refuses stays due, and those after it are computed."""
    await store(db, sample(0), sample(60), sample(200))
    async with db.pool.transaction() as connection:
        await connection.execute(f"ALTER TABLE gpu_minutes ADD CHECK (time <> '{START + 60 * SECOND}')")
    assert await rolled(db, "gpu_minutes", "time") == [(START,), (START + 180 * SECOND,)]
    async with db.pool.transaction() as connection:
        due = await connection.fetch("SELECT time FROM gpu_rollups_due WHERE step = 'minute'")
    assert [row["time"] for row in due] == [START + 60 * SECOND]


async def test_a_minute_that_is_not_over_waits(db: TelemetryDatabase) -> None:
    """A minute is computed once it is over, an hour some minutes after the first of its minutes."""
    await store(db, sample(0, power_watts=100))
    rollups = Rollups(db.pool, db.partitions)
    assert await rollups.advance(START + 60 * SECOND) == 0
    assert await rollups.advance(START + 80 * SECOND) == 1
    assert await rows(db, "gpu_hours", "time") == []
    assert await rollups.advance(LATER) == 1
    assert await rollups.advance(LATER) == 0
