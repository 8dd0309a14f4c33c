"""Writing GPU telemetry inside a transaction that the caller holds: samples by `COPY`, windows with alerts."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import asyncpg
import msgspec

from pipeline import sample_rows, telemetry
from pipeline.alerting import AlertRow, GpuAlerts
from pipeline.errors import StorageRefusedError
from pipeline.partitions import GPU_SAMPLES
from pipeline.postgres import QUERIES, Connection
from pipeline.sample_rows import KEY_COLUMNS, SampleRows
from pipeline.telemetry import Condition, GpuWindow, Windows

_condition_decoder = msgspec.json.Decoder(Condition)


class SavedSamples(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a batch of samples."""

    stored: int = 0
    #: Of a GPU and a time that are there already, with nothing else to say.
    repeats: int = 0
    #: … with another value of a field; the first one stayed.
    conflicts: int = 0


async def copy_samples(connection: Connection, rows: SampleRows) -> None:
    """Add samples to their partitions.

    Raises:
        asyncpg.UniqueViolationError: some are there already, or twice in the batch; nothing was added.
    """
    for day, of_day in rows.by_day.items():
        partition = GPU_SAMPLES.name(GPU_SAMPLES.first_day(day))
        await _copy(connection, partition, of_day, rows.columns)


async def merge_samples(connection: Connection, rows: SampleRows) -> SavedSamples:
    """Add samples to those that are there: of each field the first value stays."""
    counts = SavedSamples()
    for day, of_day in rows.by_day.items():
        once, within = sample_rows.merged(of_day)
        stored, conflicts = await _merge(connection, day, rows.columns, once)
        counts = SavedSamples(
            stored=counts.stored + stored,
            conflicts=counts.conflicts + conflicts + within,
            repeats=counts.repeats + len(of_day) - stored - conflicts - within,
        )
    return counts


async def _merge(
    connection: Connection, day: date, columns: Sequence[str], rows: Sequence[sample_rows.Row]
) -> tuple[int, int]:
    table = GPU_SAMPLES.name(GPU_SAMPLES.first_day(day))
    # Two columns always have a value: one that differs is no reason to write a row again.
    filling = [name for name in columns if name not in {*KEY_COLUMNS, "lost"}]
    names = ", ".join(columns)
    await connection.execute(
        f"CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS SELECT {names} FROM {table} WITH NO DATA"
    )
    await _copy(connection, "incoming", rows, columns)
    differs = " OR ".join(f"old.{name} <> new.{name}" for name in columns if name not in KEY_COLUMNS)
    conflicts = await connection.fetchval(
        f"SELECT count(*) FROM incoming AS new JOIN {table} AS old USING (gpu_id, time) WHERE {differs}"
    )
    added = await connection.fetch(
        f"INSERT INTO {table} AS old ({names}) SELECT {names} FROM incoming ORDER BY gpu_id, time "
        f"ON CONFLICT (gpu_id, time) DO UPDATE SET "
        + ", ".join(f"{name} = coalesce(old.{name}, excluded.{name})" for name in filling)
        + " WHERE "
        + " OR ".join(f"(old.{name} IS NULL AND excluded.{name} IS NOT NULL)" for name in filling)
        + " RETURNING (xmax = 0) AS is_new"
    )
    await connection.execute("DROP TABLE incoming")
    return sum(row["is_new"] for row in added), conflicts


async def _copy(
    connection: Connection, table: str, rows: Sequence[sample_rows.Row], columns: Sequence[str]
) -> None:
    try:
        await connection.copy_records_to_table(table, records=rows, columns=columns)
    except (TypeError, ValueError, OverflowError) as error:
        # The driver encodes a COPY without sorting its own errors; its interface errors are ValueErrors too.
        if isinstance(error, asyncpg.InterfaceError):
            raise
        raise StorageRefusedError(f"{table} has no room for a value: {error}") from error


async def mark_rollups(connection: Connection, minutes: Mapping[datetime, set[int]]) -> None:
    """Note which minutes' roll-ups change."""
    await connection.executemany(
        QUERIES["mark_rollups"], [("minute", minute, sorted(ids)) for minute, ids in minutes.items()]
    )


async def save_windows(
    connection: Connection, batch: Sequence[Windows], gpu_ids: Mapping[str, int]
) -> list[telemetry.Alert]:
    """Store windows and take them into account, in order; return the steps that alerts made."""
    gpus = [(windows, gpu) for windows in batch for gpu in windows.gpus]
    columns = [list(column) for column in zip(*[_window(w, gpu, gpu_ids) for w, gpu in gpus], strict=True)]
    await connection.execute(QUERIES["save_gpu_windows"], *columns)
    states = await _alerts(connection, [gpu for _, gpu in gpus], gpu_ids)
    for windows, gpu in gpus:
        states[gpu_ids[gpu.gpu_uuid]].apply(gpu, windows.start, windows.end)
    await _save_alerts(connection, [row for state in states.values() for row in state.changed.values()])
    steps = [step for state in states.values() for step in state.steps]
    if steps:
        await connection.execute(
            QUERIES["save_outbox"],
            [step.id for step in steps],
            [step.state for step in steps],
            [telemetry.encode_alert(step).value for step in steps],
        )
    await connection.execute(
        QUERIES["save_progress"], list(states), [state.reconciled for state in states.values()]
    )
    return steps


async def _alerts(
    connection: Connection, gpus: Sequence[GpuWindow], gpu_ids: Mapping[str, int]
) -> dict[int, GpuAlerts]:
    """Lock the GPUs' alerts and return them by GPU."""
    ids = sorted({gpu_ids[gpu.gpu_uuid] for gpu in gpus})
    locked = await connection.fetch(QUERIES["lock_gpus"], ids)
    if len(locked) < len(ids):
        await connection.execute(QUERIES["begin_progress"], ids)
        locked = await connection.fetch(QUERIES["lock_gpus"], ids)
    named = [telemetry.alert_id(gpu.gpu_uuid, c.rule, c.since) for gpu in gpus for c in gpu.conditions]
    known: dict[int, dict[str, AlertRow]] = {gpu_id: {} for gpu_id in ids}
    for row in await connection.fetch(QUERIES["alerts_of_gpus"], ids, named):
        known.setdefault(row["gpu_id"], {})[row["alert_id"]] = AlertRow(
            **{**row, "condition": _condition_decoder.decode(row["condition"])}
        )
    return {
        row["gpu_id"]: GpuAlerts(row["gpu_id"], row["reconciled"], known[row["gpu_id"]]) for row in locked
    }


async def _save_alerts(connection: Connection, rows: Sequence[AlertRow]) -> None:
    if not rows:
        return
    values = [
        (
            row.alert_id, row.gpu_id, row.gpu_uuid, row.host, row.model, row.condition.rule, row.condition.severity,
            row.state, row.since, row.seen_at, row.fired_at, row.resolved_at, _json(row.condition),
        )
        for row in rows
    ]  # fmt: skip
    columns = [list(column) for column in zip(*values, strict=True)]
    await connection.execute(QUERIES["save_alerts"], *columns)


def _window(windows: Windows, gpu: GpuWindow, gpu_ids: Mapping[str, int]) -> tuple[Any, ...]:
    return (
        gpu_ids[gpu.gpu_uuid],
        windows.start,
        windows.end,
        gpu.samples,
        _json(gpu.values),
        _json(gpu.scores),
        _json(gpu.conditions),
        ",".join(map(str, gpu.xids)),  # an array of arrays must be rectangular
        windows.rules_version,
    )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
