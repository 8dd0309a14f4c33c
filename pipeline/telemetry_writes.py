"""Writing GPU telemetry inside a transaction that the caller holds: samples by `COPY`, windows with alerts."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Any

import asyncpg
import msgspec

from pipeline import sample_rows, telemetry
from pipeline.alerting import MOVED_AFTER, AlertRow, GpuAlerts
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


class SavedWindows(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a batch of windows."""

    #: What alerts did, in order.
    steps: Sequence[telemetry.Alert] = ()
    #: Of a GPU that is another host's.
    foreign: int = 0


async def copy_samples(connection: Connection, rows: SampleRows) -> None:
    """Add samples to their partitions.

    Raises:
        asyncpg.UniqueViolationError: some are there already, or twice in the batch; nothing was added.
    """
    for day, columns, alike in rows.by_columns():
        partition = GPU_SAMPLES.name(GPU_SAMPLES.first_day(day))
        await _copy(connection, partition, alike, columns)


async def merge_samples(connection: Connection, rows: SampleRows) -> SavedSamples:
    """Add samples to those that are there: of each field the first value stays."""
    counts = SavedSamples()
    for day, columns, of_day in rows.in_order():
        once, within = sample_rows.merged(of_day)
        stored, conflicts = await _merge(connection, day, columns, once)
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
) -> SavedWindows:
    """Store windows and take them into account, in order; those of a GPU that is another host's are left out."""
    everything = [(windows, gpu) for windows in batch for gpu in windows.gpus]
    owners = await _lock(connection, sorted({gpu_ids[gpu.gpu_uuid] for _, gpu in everything}))
    gpus = [
        (windows, gpu)
        for windows, gpu in everything
        if not _is_foreign(gpu, windows.end, owners[gpu_ids[gpu.gpu_uuid]])
    ]
    if not gpus:
        return SavedWindows(foreign=len(everything))
    columns = [list(column) for column in zip(*[_window(w, gpu, gpu_ids) for w, gpu in gpus], strict=True)]
    await connection.execute(QUERIES["save_gpu_windows"], *columns)
    reconciled = {gpu_ids[gpu.gpu_uuid]: owners[gpu_ids[gpu.gpu_uuid]]["reconciled"] for _, gpu in gpus}
    named = [telemetry.alert_id(gpu.gpu_uuid, c.rule, c.since) for _, gpu in gpus for c in gpu.conditions]
    states = await _alerts(connection, reconciled, named)
    for windows, gpu in gpus:
        states[gpu_ids[gpu.gpu_uuid]].apply(gpu, windows.start, windows.end)
    steps = await _save_steps(connection, states.values())
    await connection.execute(
        QUERIES["save_progress"], list(states), [state.reconciled for state in states.values()]
    )
    return SavedWindows(steps=steps, foreign=len(everything) - len(gpus))


async def resolve_silent(
    connection: Connection, hours: int, limit: int, now: datetime
) -> list[telemetry.Alert]:
    """Resolve the alerts of up to `limit` GPUs that had no window for so many hours; return the steps."""
    locked = await connection.fetch(QUERIES["lock_silent_gpus"], hours, limit)
    states = await _alerts(connection, {row["gpu_id"]: row["reconciled"] for row in locked}, [])
    for state in states.values():
        state.give_up(now)
    return await _save_steps(connection, states.values())


async def _lock(connection: Connection, gpu_ids: Sequence[int]) -> dict[int, asyncpg.Record]:
    """Lock the GPUs' alerts; return up to where they follow windows, and whose the GPUs are."""
    locked = await connection.fetch(QUERIES["lock_gpus"], gpu_ids)
    if len(locked) < len(gpu_ids):
        await connection.execute(QUERIES["begin_progress"], gpu_ids)
        locked = await connection.fetch(QUERIES["lock_gpus"], gpu_ids)
    return {row["gpu_id"]: row for row in locked}


def _is_foreign(gpu: GpuWindow, end: datetime, owner: asyncpg.Record) -> bool:
    # Two hosts that name one GPU have two streams of its windows: each would end the alerts of the other.
    return bool(gpu.host != owner["host"] and end < owner["last_seen"] + MOVED_AFTER)


async def _alerts(
    connection: Connection, reconciled: Mapping[int, datetime], named: Sequence[str]
) -> dict[int, GpuAlerts]:
    """Return the alerts of GPUs that are locked, by GPU: those that are open and those that are named."""
    known: dict[int, dict[str, AlertRow]] = {gpu_id: {} for gpu_id in reconciled}
    for row in await connection.fetch(QUERIES["alerts_of_gpus"], list(reconciled), named):
        known.setdefault(row["gpu_id"], {})[row["alert_id"]] = AlertRow(
            **{**row, "condition": _condition_decoder.decode(row["condition"])}
        )
    return {gpu_id: GpuAlerts(gpu_id, time, known[gpu_id]) for gpu_id, time in reconciled.items()}


async def _save_steps(connection: Connection, states: Iterable[GpuAlerts]) -> list[telemetry.Alert]:
    """Store what became of alerts and queue their steps, which are returned."""
    states = list(states)
    await _save_alerts(connection, [row for state in states for row in state.changed.values()])
    steps = [step for state in states for step in state.steps]
    if steps:
        await connection.execute(
            QUERIES["save_outbox"],
            [step.id for step in steps],
            [step.state for step in steps],
            [telemetry.encode_alert(step).value for step in steps],
        )
    return steps


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
