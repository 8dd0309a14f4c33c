"""Partitions by time: made before they are needed, dropped whole when they are old.

A table that is partitioned by day or month has one partition per period in UTC, named after its first day
(`gpu_samples_20260131`). Safe from several processes at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal

from pipeline import logs
from pipeline.postgres import Connection, Pool

log = logs.get(__name__)

# "partitio" in ASCII: one process at a time makes or drops partitions.
_LOCK = 0x706172746974696F
# Dropping waits for readers of the whole table, and everybody waits behind it: rather try again later.
_DROP_LOCK_TIMEOUT = "2s"


@dataclass(frozen=True)
class Partitioned:
    """A table with a partition per period."""

    table: str
    period: Literal["day", "month"]

    def first_day(self, day: date) -> date:
        """Return with which day the period of a day begins."""
        return day if self.period == "day" else day.replace(day=1)

    def next(self, first_day: date) -> date:
        """Return with which day the period after one begins."""
        return (
            first_day + timedelta(days=1)
            if self.period == "day"
            else (first_day + timedelta(days=32)).replace(day=1)
        )

    def name(self, first_day: date) -> str:
        """Return the name of a period's partition."""
        return f"{self.table}_{first_day:%Y%m%d}"


GPU_SAMPLES = Partitioned("gpu_samples", "day")
GPU_WINDOWS = Partitioned("gpu_windows", "day")
GPU_MINUTES = Partitioned("gpu_minutes", "month")
GPU_HOURS = Partitioned("gpu_hours", "month")


class Partitions:
    """What one process knows to exist, so that it asks the database once per partition."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: set[str] = set()

    def forget(self) -> None:
        """Ask the database again: retention may have dropped what is known here."""
        self._known.clear()

    async def ensure(self, table: Partitioned, days: Iterable[date]) -> None:
        """Return when there is a partition for each of the days.

        Raises:
            DependencyError: try again.
        """
        periods = sorted({table.first_day(day) for day in days})
        missing = [first_day for first_day in periods if table.name(first_day) not in self._known]
        if not missing:
            return
        async with self._pool.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            for first_day in missing:
                await _create(connection, table, first_day)
        self._known.update(table.name(first_day) for first_day in missing)

    async def drop(self, table: Partitioned, before: datetime) -> list[str]:
        """Drop the partitions whose period ended at or before a moment; return their names.

        Raises:
            DependencyError: somebody reads the table all the time, or the database does not answer.
        """
        dropped = []
        for name in await self.expired(table, before):
            async with self._pool.transaction() as connection:
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
                await connection.execute(f"SET LOCAL lock_timeout = '{_DROP_LOCK_TIMEOUT}'")
                await connection.execute(f"DROP TABLE IF EXISTS {name}")
            self._known.discard(name)
            log.info("dropped a partition", partition=name)
            dropped.append(name)
        return dropped

    async def expired(self, table: Partitioned, before: datetime) -> list[str]:
        """Return the names of the partitions whose period ended at or before a moment, oldest first."""
        async with self._pool.transaction() as connection:
            rows = await connection.fetch(
                "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::text::regclass",
                table.table,
            )
        names = sorted(row["name"] for row in rows)
        return [name for name in names if _end(table, name) <= before]


async def _create(connection: Connection, table: Partitioned, first_day: date) -> None:
    """Make one partition; `ATTACH` keeps readers and writers of the others going, `PARTITION OF` would not."""
    name = table.name(first_day)
    if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
        return
    await connection.execute(
        f"CREATE TABLE {name} (LIKE {table.table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)"
    )
    await connection.execute(
        f"ALTER TABLE {table.table} ATTACH PARTITION {name} "
        f"FOR VALUES FROM ('{first_day} 00:00+00') TO ('{table.next(first_day)} 00:00+00')"
    )


def _end(table: Partitioned, name: str) -> datetime:
    first_day = date.fromisoformat(name.rpartition("_")[2])
    return datetime.combine(table.next(first_day), datetime.min.time(), UTC)
