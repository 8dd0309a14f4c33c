"""What `record` writes: samples, windows with the life of alerts, and steps on their way to `gpu.alerts.v1`.

Every write is idempotent and right under concurrent writers. Reading is not done here.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import asyncpg
import msgspec

from pipeline import telemetry_writes
from pipeline.errors import DependencyError, StorageRefusedError
from pipeline.known_gpus import KnownGpus
from pipeline.partitions import GPU_SAMPLES, GPU_WINDOWS, Partitions
from pipeline.plain_samples import AnySamples
from pipeline.postgres import QUERIES, Connection, Pool
from pipeline.rollups import Rollups
from pipeline.sample_rows import SampleRows
from pipeline.settings import Settings
from pipeline.telemetry import Alert, Windows
from pipeline.telemetry_writes import SavedSamples, SavedWindows

# "outboxes" in ASCII: one process at a time publishes, so that the steps of an alert stay in order.
_OUTBOX_LOCK = 0x6F7574626F786573
# A machine that is down for a night or repaired in a day keeps its alerts.
SILENT_HOURS = 24


class TelemetryDatabase:
    """One process's connections to PostgreSQL for GPU telemetry."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.gpus = KnownGpus(pool)
        self.partitions = Partitions(pool)
        self.rollups = Rollups(pool, self.partitions)

    @classmethod
    async def open(cls, settings: Settings) -> "TelemetryDatabase":
        """Connect, and see that the database is migrated; raises as `Database.open` does."""
        pool = await Pool.open(settings)
        try:
            await pool.check()
        except BaseException:
            await pool.close()
            raise
        return cls(pool)

    async def close(self) -> None:
        """Close all connections."""
        await self.pool.close()

    async def save_samples(self, batch: Sequence[tuple[str, AnySamples]]) -> SavedSamples:
        """Store samples, given with their records' keys, in one transaction; of each field the first value stays.

        Raises:
            StorageRefusedError: some sample of the batch is at fault; none was stored.
            DependencyError: try again; whether they were stored does not matter.
        """
        with self._partitions_may_be_gone():
            gpu_ids = await self.gpus.identify(batch)
            rows = SampleRows([samples for _, samples in batch], gpu_ids)
            await self.partitions.ensure(GPU_SAMPLES, rows.days)
            try:
                async with self.pool.transaction() as connection:
                    await telemetry_writes.copy_samples(connection, rows)
                    await telemetry_writes.mark_rollups(connection, rows.minutes)
                return SavedSamples(stored=rows.count)
            except StorageRefusedError as error:
                if not isinstance(error.__cause__, asyncpg.UniqueViolationError):
                    raise
            async with self.pool.transaction() as connection:
                saved = await telemetry_writes.merge_samples(connection, rows)
                await telemetry_writes.mark_rollups(connection, rows.minutes)
            return saved

    async def save_windows(self, batch: Sequence[Windows]) -> SavedWindows:
        """Store windows and what follows for alerts in one transaction.

        Raises:
            StorageRefusedError, DependencyError: as `save_samples` does.
        """
        with self._partitions_may_be_gone():
            gpu_ids: Mapping[str, int] = await self.gpus.identify_windows(batch)
            await self.partitions.ensure(
                GPU_WINDOWS, {windows.start.astimezone(UTC).date() for windows in batch}
            )
            async with self.pool.transaction() as connection:
                return await telemetry_writes.save_windows(connection, batch, gpu_ids)

    async def resolve_silent(self, limit: int, now: datetime | None = None) -> list[Alert]:
        """Resolve alerts of up to `limit` GPUs that no window came of for a day; return the steps that they made.

        Call it every hour, and until it returns none: only hours in which it is called count, so that nothing is
        resolved because `record` was away.
        """
        async with self.pool.transaction() as connection:
            await connection.execute(QUERIES["note_silence"])
            return await telemetry_writes.resolve_silent(
                connection, SILENT_HOURS, limit, now or datetime.now(UTC)
            )

    @contextlib.asynccontextmanager
    async def outbox(self, limit: int) -> AsyncIterator[list[Alert]]:
        """Yield the oldest steps that wait to be published; leaving without an error takes them off.

        Empty while another process publishes.
        """
        async with self.pool.transaction() as connection:
            rows = await _waiting(connection, limit)
            yield [msgspec.json.decode(row["value"], type=Alert) for row in rows]
            if rows:
                await connection.execute(QUERIES["clear_outbox"], [row["position"] for row in rows])

    async def count_expired_alerts(self, before: datetime) -> int:
        """Count alerts that were resolved before a moment."""
        (row,) = await self.pool.rows("count_expired_alerts", before)
        return int(row["rows"])

    async def expire_alerts(self, before: datetime, limit: int) -> int:
        """Delete up to `limit` alerts that were resolved before a moment; call until it is 0."""
        (row,) = await self.pool.rows("expire_alerts", before, limit)
        return int(row["rows"])

    @contextlib.contextmanager
    def _partitions_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except DependencyError:
            self.partitions.forget()
            raise


async def _waiting(connection: Connection, limit: int) -> list[asyncpg.Record]:
    if not await connection.fetchval(QUERIES["outbox_alone"], _OUTBOX_LOCK):
        return []
    return list(await connection.fetch(QUERIES["outbox"], limit))
