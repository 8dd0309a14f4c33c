"""GPU telemetry in a real PostgreSQL: the tables, samples, windows with the life of alerts, roll-ups, retention."""

import asyncpg

from pipeline import dcgm


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
