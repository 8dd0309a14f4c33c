"""What gateway and command line read of GPU telemetry: GPUs, hosts, samples, roll-ups, alerts, energy.

Fields have our names (`pipeline/dcgm.py`). Times are inclusive at both ends. Pages follow keys, not offsets: what
is added or removed in between neither repeats nor hides a row.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from pipeline import dcgm
from pipeline.gpu_views import (
    AlertView,
    EnergyRow,
    Firing,
    GpuView,
    HostView,
    Latest,
    Point,
    Rolled,
    Sampled,
    energy_row,
    values_type,
)
from pipeline.postgres import QUERIES, Connection, Pool
from pipeline.telemetry import Condition

# A dump has some ten rows of each GPU a round, each with other fields; a hundred take 1 ms.
_FIRST_SAMPLES = 100
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
# Shown of every GPU, as nvidia-smi does.
SHOWN = (
    "utilization_percent", "memory_used_mebibytes", "memory_total_mebibytes", "temperature_celsius", "power_watts",
    "power_limit_watts",
)  # fmt: skip
# A GPU is brought up to date every few seconds, and its last sample is not much older.
_LATEST_WITHIN = timedelta(minutes=2)
# A dump has each field at a moment of its own; an XID error is a sample without values. Exporters are asked once
# a minute at the least: what has had no value in two minutes is not measured any more.
_VALUES_WITHIN = timedelta(minutes=2)
# Replays may be as far ahead of the clock that `last_seen` keeps to.
_AHEAD = timedelta(days=1)
# Rows whose hour may not be rolled up yet are read by the minute.
_HOURS_SETTLE = timedelta(hours=2)

_condition = msgspec.json.Decoder(Condition)
_object: "msgspec.json.Decoder[dict[str, Any]]" = msgspec.json.Decoder(dict[str, Any])


class GpuFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which GPUs."""

    host: str | None = None
    model: str | None = None
    state: str | None = None
    peer_key: str | None = None
    gpu_uuid: str | None = None


class AlertFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which alerts; `since` leaves out what began before."""

    states: tuple[str, ...] = ()
    severities: tuple[str, ...] = ()
    rule: str | None = None
    host: str | None = None
    gpu_uuid: str | None = None
    since: datetime | None = None


async def gpus(
    pool: Pool,
    chosen: GpuFilter,
    limit: int,
    after: tuple[str, str] | None = None,
    fields: Sequence[str] = SHOWN,
) -> list[GpuView]:
    """Return GPUs by host and UUID, each with its latest values of these fields."""
    host, uuid = after or (None, None)
    async with pool.transaction() as connection:
        rows = await connection.fetch(
            QUERIES["gpu_list"], chosen.host, chosen.model, chosen.state, chosen.peer_key, host, uuid,
            chosen.gpu_uuid, limit,
        )  # fmt: skip
        latest: dict[int, asyncpg.Record] = {}
        if rows and fields:
            ids, seen = [row["gpu_id"] for row in rows], [row["last_seen"] for row in rows]
            # The planner is given moments, not sums of them: it then leaves other days out.
            since, until = min(seen) - _LATEST_WITHIN - _VALUES_WITHIN, max(seen) + _AHEAD
            found = await connection.fetch(
                _latest(fields), ids, seen, _LATEST_WITHIN, _VALUES_WITHIN, _AHEAD, since, until
            )
            latest = {row["gpu_id"]: row for row in found}
    return [_gpu(row, latest.get(row["gpu_id"]), fields) for row in rows]


async def hosts(pool: Pool, limit: int, after: str | None = None) -> list[HostView]:
    """Return hosts by name."""
    return [
        HostView(
            host=row["host"], gpus=row["gpus"], lost=row["lost"], models=tuple(row["models"] or ()),
            peer_keys=tuple(row["peer_keys"]), last_seen=row["last_seen"], firing=_firing(row),
        )
        for row in await pool.rows("host_list", after, limit)
    ]  # fmt: skip


async def gpu_id(pool: Pool, gpu_uuid: str) -> int | None:
    """Return a GPU's number in the database."""
    rows = await pool.rows("gpu_id", gpu_uuid)
    return rows[0]["gpu_id"] if rows else None


async def has_field(pool: Pool, gpu: int, start: datetime, end: datetime, name: str) -> bool:
    """Whether a GPU has values of a field that the table of fields does not know."""
    return bool((await pool.rows("has_other_field", gpu, start, end, name))[0][0])


async def samples(
    pool: Pool, gpu: int, start: datetime, end: datetime, fields: Sequence[str] | None, limit: int
) -> Sequence[Point | Sampled]:
    """Return samples as they were taken, oldest first; without `fields` everything that is known."""
    every = fields is None
    others = [] if fields is None else [name for name in fields if name not in dcgm.PLAIN]
    first = "other" if every or others else "NULL"
    async with pool.transaction() as connection:
        if fields is None:
            known, rows = await _samples_of_all_fields(connection, gpu, start, end, limit)
        else:
            known = [name for name in fields if name in dcgm.PLAIN]
            rows = await connection.fetch(_samples(first, known), gpu, start, end, limit)
    make = values_type(tuple(known))
    return [
        Sampled(time=time, values=make(*numbers), xids=tuple(xids or ()), lost=lost, source_time=source_time)
        if other is None
        else _sample(row, known, None if every else others)
        for row in rows
        for other, _, time, lost, source_time, xids, *numbers in (row,)
    ]


async def rolled(
    pool: Pool,
    gpu: int,
    start: datetime,
    end: datetime,
    fields: Sequence[str] | None,
    step: timedelta,
    limit: int,
) -> list[Point]:
    """Return roll-ups, each from its time on, oldest first; the first is the one that `start` falls into.

    Whole hours come from the hours, whole minutes from the minutes, any other step from the samples.
    """
    names = list(dcgm.NAMES if fields is None else fields)
    source = (
        "gpu_hours" if step % HOUR == timedelta() else "gpu_minutes" if step % MINUTE == timedelta() else None
    )
    async with pool.transaction() as connection:
        rows = await connection.fetch(_rollup(names, source), gpu, start, end, step, limit)
    return [_rolled(row, names) for row in rows]


async def alerts(
    pool: Pool, chosen: AlertFilter, limit: int, after: tuple[datetime, str] | None = None
) -> list[AlertView]:
    """Return alerts, the latest begun first."""
    since, identity = after or (None, None)
    rows = await pool.rows(
        "alert_list", list(chosen.states) or None, list(chosen.severities) or None, chosen.rule, chosen.host,
        chosen.gpu_uuid, chosen.since, since, identity, limit,
    )  # fmt: skip
    return [_alert(row) for row in rows]


async def alert(pool: Pool, alert_id: str) -> AlertView | None:
    """Return one alert."""
    rows = await pool.rows("alert", alert_id)
    return _alert(rows[0]) if rows else None


async def alerts_that_begin(pool: Pool, prefix: str) -> list[str]:
    """Return the ids of alerts that begin so, two at most."""
    return [row["alert_id"] for row in await pool.rows("alerts_that_begin", prefix)]


async def energy(
    pool: Pool, start: datetime, end: datetime, host: str | None = None, now: datetime | None = None
) -> list[EnergyRow]:
    """Return what each GPU took between two moments, to the minute; GPUs that nothing is known of are left out."""
    first, last = _floor(start, MINUTE), _ceiling(end, MINUTE)
    settled = _floor((now or datetime.now(UTC)) - _HOURS_SETTLE, HOUR)
    whole_from = _ceiling(first, HOUR)
    whole_to = max(whole_from, min(_floor(last, HOUR), settled))
    rows = await pool.rows("energy_of_gpus", first, whole_from, whole_to, last, host)
    return [
        energy_row(
            row["joules"] or 0.0, row["seconds"], row["idle_seconds"],
            gpu_uuid=row["gpu_uuid"], host=row["host"], model=row["model"],
        )
        for row in rows
    ]  # fmt: skip


async def energy_of_predictions(pool: Pool, start: datetime, end: datetime) -> tuple[int, float | None]:
    """Return how many predictions stored between two moments say what they took, and how much it is together."""
    (row,) = await pool.rows("energy_of_predictions", start, end)
    return row["predictions"], row["joules"]


def _samples(other: str, names: Sequence[str], has_more: str = "NULL") -> str:
    """Return the statement for samples with these fields, and whether they have more."""
    return (
        f"SELECT {', '.join([other, has_more, 'time', 'lost', 'source_time', 'xids', *names])} FROM gpu_samples "
        "WHERE gpu_id = $1 AND time >= $2 AND time <= $3 ORDER BY time LIMIT $4"
    )


async def _samples_of_all_fields(
    connection: Connection, gpu: int, start: datetime, end: datetime, limit: int
) -> tuple[list[str], list[asyncpg.Record]]:
    """Return which fields samples have, and these: most GPUs lack most, and what is always NULL costs a third.

    What the first samples have is asked for; where a later one has more, everything is read.
    """
    everything = _samples("other", dcgm.NAMES)
    rows = await connection.fetch(everything, gpu, start, end, min(limit, _FIRST_SAMPLES))
    if len(rows) < _FIRST_SAMPLES or limit <= _FIRST_SAMPLES:
        return list(dcgm.NAMES), rows
    known = [name for name in dcgm.NAMES if any(row[name] is not None for row in rows)]
    absent = ", ".join(name for name in dcgm.NAMES if name not in known)
    if absent:
        has_more = f"CASE WHEN num_nonnulls({absent}) > 0 THEN true END AS has_more"
        found = await connection.fetch(_samples("other", known, has_more), gpu, start, end, limit)
        if not any(row["has_more"] for row in found):
            return known, found
    return list(dcgm.NAMES), await connection.fetch(everything, gpu, start, end, limit)


def _latest(fields: Sequence[str]) -> str:
    """Return the statement for the latest values of GPUs $1 last seen at $2, of samples from $6 on, before $7.

    What the newest sample has is not looked for in others; of a GPU that is lost the values before are not its own.
    """
    known = [name for name in fields if name in dcgm.PLAIN]
    values = [
        f"coalesce(newest.{name}, (SELECT {name} FROM gpu_samples AS before WHERE NOT newest.lost "
        "AND before.gpu_id = newest.gpu_id AND time < newest.time AND time >= newest.time - $4::interval "
        f"AND time >= $6 AND time < $7 AND {name} IS NOT NULL ORDER BY time DESC LIMIT 1)) AS {name}"
        for name in known
    ]
    return (
        f"SELECT {', '.join(['newest.gpu_id', 'newest.time', *values])} "
        "FROM unnest($1::integer[], $2::timestamptz[]) AS asked (gpu_id, seen), "
        f"LATERAL (SELECT {', '.join(['gpu_id', 'time', 'lost', *known])} FROM gpu_samples "
        "WHERE gpu_samples.gpu_id = asked.gpu_id AND time >= asked.seen - $3::interval "
        "AND time < asked.seen + $5::interval AND time >= $6 AND time < $7 "
        "ORDER BY time DESC LIMIT 1) AS newest"
    )


def _rollup(names: Sequence[str], source: str | None) -> str:
    """Return the statement that rolls fields up, from a table of roll-ups or from the samples."""
    columns = ["date_bin($4, time, '2000-01-01Z') AS bucket"]
    samples_count, suffix = ("sum(samples)::bigint", "_count") if source else ("count(*)", "")
    columns += [
        f"{samples_count} AS samples",
        "string_agg(array_to_string(xids, ','), ',' ORDER BY time) FILTER (WHERE xids <> '{}') AS xids",
    ]
    for name in names:
        lowest, highest = (f"{name}_min", f"{name}_max") if source else (name, name)
        field = dcgm.BY_NAME[name]
        calls = ("min({})", "max({})")
        if field.kind == "bitmask":  # the bits that were always and ever set
            calls = ("bit_and({}::bigint)::float8", "bit_or({}::bigint)::float8")
        count = f"sum({name}{suffix})::bigint" if source else f"count({name})"
        mean = "NULL::float8"
        if field.kind == "gauge":
            mean = f"sum({name}_mean * {name}_count) / sum({name}_count)" if source else f"avg({name})"
        columns += [count, calls[0].format(lowest), calls[1].format(highest), mean]
    return (
        f"SELECT {', '.join(columns)} FROM {source or 'gpu_samples'} "
        "WHERE gpu_id = $1 AND time >= date_bin($4, $2, '2000-01-01Z') AND time <= $3 "
        "GROUP BY bucket ORDER BY bucket LIMIT $5"
    )


def _sample(row: asyncpg.Record, known: Sequence[str], wanted: Sequence[str] | None) -> Point:
    """Make a point with fields that are not in the table: all of them, or those that are wanted."""
    other, _, time, lost, source_time, xids, *numbers = row
    values: dict[str, float | Rolled] = {
        name: value for name, value in zip(known, numbers, strict=True) if value is not None
    }
    unknown = _object.decode(other)
    values |= {name: unknown[name] for name in (unknown if wanted is None else wanted) if name in unknown}
    return Point(time=time, values=values, xids=tuple(xids or ()), lost=lost, source_time=source_time)


def _rolled(row: asyncpg.Record, names: Sequence[str]) -> Point:
    values: dict[str, float | Rolled] = {}
    for number, name in enumerate(names):
        count, lowest, highest, mean = row[3 + 4 * number : 7 + 4 * number]
        if count:
            values[name] = Rolled(count, lowest, highest, mean)
    xids = tuple(int(xid) for xid in row["xids"].split(",")) if row["xids"] else ()
    return Point(time=row["bucket"], samples=row["samples"], values=values, xids=xids)


def _gpu(row: asyncpg.Record, latest: asyncpg.Record | None, fields: Sequence[str]) -> GpuView:
    names = (
        "gpu_uuid", "host", "peer_key", "state", "first_seen", "last_seen", "index", "model", "device",
        "pci_bus_id", "parent_uuid", "driver_version", "conflicts", "conflict_host",
    )  # fmt: skip
    seen = None
    if latest is not None:
        values = {name: latest[name] for name in fields if latest[name] is not None}
        seen = Latest(latest["time"], values)
    return GpuView(
        **{name: row[name] for name in names},
        labels=_object.decode(row["labels"]),
        firing=_firing(row),
        latest=seen,
    )


def _firing(row: asyncpg.Record) -> Firing:
    return Firing(row["critical"], row["warning"], row["info"])


def _alert(row: asyncpg.Record) -> AlertView:
    names = (
        "state", "severity", "rule", "gpu_uuid", "host", "since", "seen_at", "model", "fired_at", "resolved_at",
    )  # fmt: skip
    condition = _condition.decode(row["condition"])
    return AlertView(id=row["alert_id"], condition=condition, **{name: row[name] for name in names})


def _floor(moment: datetime, step: timedelta) -> datetime:
    return moment - (moment - datetime(2000, 1, 1, tzinfo=UTC)) % step


def _ceiling(moment: datetime, step: timedelta) -> datetime:
    floor = _floor(moment, step)
    return floor if floor == moment else floor + step
