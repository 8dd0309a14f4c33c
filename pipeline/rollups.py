"""Roll-ups: each GPU's samples of a minute and of an hour, kept right however late a sample comes.

Whoever stores samples notes their minutes as due, in the same transaction. A minute is computed anew from all its
samples once it is over, an hour from its minutes, so nothing is ever added twice. One process does it at a time.
Energy is what the counter gained, a reset included, else power times time; it, and idle time (utilization below
5 %), counts from the sample before that has the same field, which may be in an earlier minute: exporters read each
field at a moment of its own. Of two samples more than five minutes apart nothing is known in between; a counter
still counts for a day in which the GPU was silent. Where a counter was read within five minutes before the newest
sample of an earlier minute, power is not counted beside it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pipeline import dcgm, logs
from pipeline.dcgm import Field
from pipeline.errors import MillraceError
from pipeline.partitions import GPU_HOURS, GPU_MINUTES, Partitioned, Partitions
from pipeline.postgres import QUERIES, Connection, Pool

log = logs.get(__name__)

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
# After a minute's end its last samples are still on their way: a publish interval of 10 s, and Kafka.
SETTLE = timedelta(seconds=15)
# Between two computations of an hour that is not over: sixty minutes would compute it sixty times.
HOUR_INTERVAL = timedelta(minutes=5)
# Of GPUs in one statement: an hour at 100 ms is 6 million samples with 200.
GPUS_AT_ONCE = 200
# So far back a counter counts. The planner is given moments, not sums of them: it then leaves other days out.
_REACH = timedelta(days=1)
# "rollups" in ASCII: two that compute the same minute at once could leave the older result.
_LOCK = 0x726F6C6C757073


def _columns(field: Field) -> dict[str, tuple[str, str]]:
    """Return a field's columns: how each is made from samples, and from minutes."""
    name = field.name
    lowest, highest = f"min({name})", f"max({name})"
    if field.kind == "bitmask":  # the bits that were always and ever set
        lowest, highest = (f"{call}({name}::bigint)::double precision" for call in ("bit_and", "bit_or"))
    columns = {
        f"{name}_count": (f"nullif(count({name}), 0)", f"sum({name}_count)"),
        f"{name}_min": (lowest, lowest.replace(name, f"{name}_min")),
        f"{name}_max": (highest, highest.replace(name, f"{name}_max")),
    }
    if field.kind == "gauge":
        mean = f"sum({name}_mean * {name}_count) / sum({name}_count)"
        columns[f"{name}_mean"] = (f"avg({name})", mean)
    return columns


_COLUMNS = {name: made for field in dcgm.FIELDS for name, made in _columns(field).items()}


def _upsert(table: str, key: str, values: dict[str, str], tail: str) -> str:
    names = ["gpu_id", "time", *values]
    return (
        f"INSERT INTO {table} ({', '.join(names)}) SELECT {key}, {', '.join(values.values())} {tail} "
        f"ON CONFLICT (gpu_id, time) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in names[2:])}"
    )


_MINUTES = QUERIES["samples_of_minute"] + _upsert(
    "gpu_minutes",
    "gpu_id, $2",
    {
        "samples": "count(*)",
        "seconds": "coalesce(min(spans.seconds), 0)",
        "idle_seconds": "coalesce(min(spans.idle_seconds), 0)",
        "joules": "min(spans.joules)",
        "xids": "min(errors.xids)",
        **{name: made[0] for name, made in _COLUMNS.items()},
    },
    "FROM inside LEFT JOIN spans USING (gpu_id) LEFT JOIN errors USING (gpu_id) GROUP BY gpu_id",
)
_HOURS = QUERIES["minutes_of_hour"] + _upsert(
    "gpu_hours",
    "gpu_id, $2",
    {
        "samples": "sum(samples)",
        "seconds": "sum(seconds)",
        "idle_seconds": "sum(idle_seconds)",
        "joules": "sum(joules)",
        "xids": "min(errors.xids)",
        **{name: made[1] for name, made in _COLUMNS.items()},
    },
    "FROM inside LEFT JOIN errors USING (gpu_id) GROUP BY gpu_id",
)


class Rollups:
    """Keeps the roll-ups of one database."""

    def __init__(self, pool: Pool, partitions: Partitions) -> None:
        self._pool = pool
        self._partitions = partitions

    async def advance(self, now: datetime | None = None) -> int:
        """Compute what is due and over by `now`; return how many minutes and hours that were.

        0 while another process does it, or when nothing is due. Raises DependencyError: try again.
        """
        now = now or datetime.now(UTC)
        count = 0
        for step in ("minute", "hour"):
            for time in await self._due(step, now):
                count += await self._attempt(step, time)
        return count

    async def _attempt(self, step: str, time: datetime) -> bool:
        """Compute a minute or an hour; one that cannot be computed stays due and keeps no other waiting."""
        try:
            return await self._compute(step, time)
        except MillraceError as error:
            await self._pool.check()  # raises when no other would do better
            log.warning("a roll-up is to be tried again", step=step, time=time, error=error.message)
            return False

    async def _due(self, step: str, now: datetime) -> list[datetime]:
        if step == "minute":
            rows = await self._pool.rows("minutes_due", now - MINUTE - SETTLE)
        else:
            rows = await self._pool.rows("hours_due", now - HOUR - 2 * SETTLE, now - HOUR_INTERVAL)
        return [row["time"] for row in rows]

    async def _compute(self, step: str, time: datetime) -> bool:
        table: Partitioned = GPU_MINUTES if step == "minute" else GPU_HOURS
        await self._partitions.ensure(table, {time.date(), (time + timedelta(days=1)).date()})
        async with self._pool.transaction() as connection:
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                return False
            # Compiling two hundred aggregates takes longer than running them.
            await connection.execute("SET LOCAL jit = off")
            rows = await connection.fetch(QUERIES["take_due"], step, time)
            gpu_ids = sorted({gpu_id for row in rows for gpu_id in row["gpu_ids"]})
            for first in range(0, len(gpu_ids), GPUS_AT_ONCE):
                some = gpu_ids[first : first + GPUS_AT_ONCE]
                if step == "minute":
                    await _compute_minutes(connection, time, some)
                else:
                    await connection.execute(_HOURS, some, time)
        return bool(gpu_ids)


async def _compute_minutes(connection: Connection, minute: datetime, gpu_ids: Sequence[int]) -> None:
    await connection.execute(_MINUTES, gpu_ids, minute, minute - _REACH)
    hours = [(minute, gpu_ids)]
    # The next samples' time and energy count from the last ones of this minute, which may be late ones.
    for row in await connection.fetch(QUERIES["minutes_after"], gpu_ids, minute, minute + _REACH):
        await connection.execute(_MINUTES, row["gpu_ids"], row["minute"], row["minute"] - _REACH)
        hours.append((row["minute"], row["gpu_ids"]))
    await connection.executemany(
        QUERIES["mark_rollups"],
        [("hour", time.replace(minute=0), some) for time, some in hours],
    )
