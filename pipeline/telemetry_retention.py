"""Which partitions of GPU telemetry must be there and which are too old; safe from several processes at once."""

from datetime import UTC, datetime, timedelta

import msgspec

from pipeline import notifications
from pipeline.partitions import GPU_HOURS, GPU_MINUTES, GPU_SAMPLES, GPU_WINDOWS, Partitioned
from pipeline.settings import Settings
from pipeline.telemetry_database import TelemetryDatabase

# Alerts of one transaction.
_BATCH_ROWS = 1000
# A publisher's clock may be ahead, and a process that makes partitions may be away for a while.
_AHEAD = timedelta(days=2)


class RemovedTelemetry(msgspec.Struct, frozen=True, kw_only=True):
    """What retention removed of GPU telemetry."""

    #: By name; each holds a day of samples or windows, or a month of roll-ups.
    partitions: tuple[str, ...] = ()
    alerts: int = 0


def limits(settings: Settings, now: datetime) -> dict[Partitioned, datetime]:
    """Return before which moment each table's rows are too old."""
    ages = {
        GPU_SAMPLES: settings.sample_retention_days,
        GPU_WINDOWS: settings.result_retention_days,
        GPU_MINUTES: settings.minute_retention_days,
        GPU_HOURS: settings.hour_retention_days,
    }
    return {table: now - timedelta(days=days) for table, days in ages.items()}


async def make_ahead(database: TelemetryDatabase, now: datetime | None = None) -> None:
    """Make the partitions of the next days, so that nobody has to wait for one.

    Raises:
        DependencyError: try again.
    """
    today = (now or datetime.now(UTC)).date()
    for table in (GPU_SAMPLES, GPU_WINDOWS, GPU_MINUTES, GPU_HOURS):
        await database.partitions.ensure(
            table, {today + timedelta(days=day) for day in range(_AHEAD.days + 1)}
        )


async def expired(
    database: TelemetryDatabase, settings: Settings, now: datetime | None = None
) -> RemovedTelemetry:
    """Say what `remove_expired` would remove; removes nothing."""
    now = now or datetime.now(UTC)
    names: list[str] = []
    for table, before in limits(settings, now).items():
        names += await database.partitions.expired(table, before)
    before = now - timedelta(days=settings.result_retention_days)
    return RemovedTelemetry(partitions=tuple(names), alerts=await database.count_expired_alerts(before))


async def remove_expired(
    database: TelemetryDatabase, settings: Settings, now: datetime | None = None
) -> RemovedTelemetry:
    """Drop partitions that are wholly too old, delete alerts that were resolved long ago and who was told of them.

    Raises:
        DependencyError: somebody reads a table all the time, or the database does not answer; what is done is done.
    """
    now = now or datetime.now(UTC)
    names: list[str] = []
    for table, before in limits(settings, now).items():
        names += await database.partitions.drop(table, before)
    alerts = 0
    before = now - timedelta(days=settings.result_retention_days)
    while count := await database.expire_alerts(before, _BATCH_ROWS):
        alerts += count
    while await notifications.expire(database.pool, before, _BATCH_ROWS):
        pass
    return RemovedTelemetry(partitions=tuple(names), alerts=alerts)
