"""GPU telemetry over HTTP: GPUs, hosts, samples and roll-ups of a GPU, energy. As JSON or as CSV."""

from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, cast

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from gateway import gpu_examples as examples
from gateway import tables
from gateway.auth import KeyRequired
from gateway.predictions import bounded
from gateway.problems import Problem, responses
from gateway.tables import NO_CONTROLS, Accept, Cursor, Format, Host, Limit
from gateway.views import JSONResponse, describe
from pipeline import dcgm, telemetry_reads
from pipeline.gpu_views import (
    EnergyRow,
    GpuView,
    HostView,
    Point,
    Rolled,
    Sampled,
    by_host,
    priced,
    summed,
    values_of,
)
from pipeline.postgres import Pool
from pipeline.telemetry_reads import GpuFilter

router = APIRouter(tags=["telemetry"], dependencies=[KeyRequired, tables.KnownParameters])

Uuid = Annotated[str, Depends(tables.uuid_of)]
# Of a roll-up that no table has: all its samples are read.
MOST_SAMPLED = timedelta(days=1)
MOST_ROWS = 10_000
_PROBLEMS = ("unauthorized", "invalid_request", "dependency")


class GpuPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """GPUs, by host and UUID."""

    gpus: tuple[GpuView, ...]
    next_cursor: str | None = None


class HostPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Hosts, by name."""

    hosts: tuple[HostView, ...]
    next_cursor: str | None = None


class TelemetryPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one GPU measured, oldest first, in DCGM's units."""

    gpu_uuid: str
    start: datetime
    end: datetime
    samples: tuple[Point, ...]
    #: Seconds that a point stands for; absent: samples as they were taken.
    step_seconds: float | None = None
    next_cursor: str | None = None


class PredictionEnergy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What pictures took, as far as receipts say so."""

    predictions: int
    joules: float = 0.0
    joules_per_prediction: float | None = None
    cost_per_prediction: float | None = None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy and idle time, the most energy first."""

    start: datetime
    end: datetime
    by: str
    currency: str
    total: EnergyRow
    rows: tuple[EnergyRow, ...]
    predictions: PredictionEnergy


@router.get(
    "/v1/gpus",
    responses=describe(200, GpuPage, "A page of GPUs.", GpuPage((examples.GPU,))) | responses(*_PROBLEMS),
    summary="GPUs",
)
async def get_gpus(
    request: Request,
    host: Host = None,
    model: Annotated[
        str | None, Query(max_length=255, pattern=NO_CONTROLS, description="Only this model.")
    ] = None,
    state: Annotated[Literal["ok", "lost"] | None, Query(description="Only in this state.")] = None,
    peer_key: Annotated[
        str | None,
        Query(max_length=255, pattern=NO_CONTROLS, description="Only those compared with each other."),
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return GPUs with their latest values and how many alerts fire on each."""
    chosen = GpuFilter(host=host, model=model, state=state, peer_key=peer_key)
    after = tables.after(cursor, tuple[str, str])
    found = await bounded(telemetry_reads.gpus(pool_of(request), chosen, limit + 1, after))
    columns = (
        "gpu_uuid", "host", "index", "model", "state", "peer_key", "first_seen", "last_seen", "device",
        "pci_bus_id", "parent_uuid", "driver_version", "firing.critical", "firing.warning", "firing.info",
        "latest.time", *(f"latest.values.{name}" for name in telemetry_reads.SHOWN),
    )  # fmt: skip
    return tables.page(request, found, limit, lambda row: (row.host, row.gpu_uuid), GpuPage, columns, wanted)


@router.get(
    "/v1/gpus/{uuid}",
    responses=describe(200, GpuView, "The GPU.", examples.GPU) | responses(*_PROBLEMS, "not_found"),
    summary="A GPU",
)
async def get_gpu(request: Request, uuid: Uuid) -> Response:
    """Return what a GPU is, its latest values and how many alerts fire on it."""
    found = await bounded(telemetry_reads.gpus(pool_of(request), GpuFilter(gpu_uuid=uuid), 1))
    if not found:
        raise unknown_gpu()
    return JSONResponse(found[0])


@router.get(
    "/v1/hosts",
    responses=describe(200, HostPage, "A page of hosts.", HostPage((examples.HOST,))) | responses(*_PROBLEMS),
    summary="Hosts with GPUs",
)
async def get_hosts(
    request: Request,
    limit: Limit = 100,
    cursor: Cursor = None,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return hosts with their GPUs, those that are lost, and how many alerts fire."""
    found = await bounded(telemetry_reads.hosts(pool_of(request), limit + 1, tables.after(cursor, str)))
    columns = (
        "host", "gpus", "lost", "models", "peer_keys", "last_seen", "firing.critical", "firing.warning",
        "firing.info",
    )  # fmt: skip
    return tables.page(request, found, limit, lambda row: row.host, HostPage, columns, wanted)


@router.get(
    "/v1/gpus/{uuid}/telemetry",
    responses=describe(200, TelemetryPage, "Samples, or roll-ups.", TelemetryPage(**examples.TELEMETRY))
    | responses(*_PROBLEMS, "not_found"),
    summary="What a GPU measured",
)
async def get_telemetry(
    request: Request,
    uuid: Uuid,
    start: Annotated[
        str, Query(max_length=60, description="From then on: RFC 3339, or such as now-15m.")
    ] = "now-1h",
    end: Annotated[str, Query(max_length=60, description="Until then, inclusive.")] = "now",
    fields: Annotated[
        str | None,
        Query(
            max_length=8000, description="Comma-separated, by our names or DCGM's; none: all that are known."
        ),
    ] = None,
    step: Annotated[
        str | None,
        Query(max_length=20, description="Roll up: 1m, 5m, 1h, 1d …; none: samples as they were taken."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS, description="Samples on a page.")] = 1000,
    cursor: Cursor = None,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return samples between two moments, both inclusive, oldest first; a replayed value is what the dump said.

    With `step` each point has count, minimum, maximum and mean of what was measured from its time on; of a counter
    the minimum is the first value and the maximum the last.
    """
    first, last = tables.span(start, end, datetime.now(UTC))
    width, asked = tables.step_of(step), tables.fields_of(fields)
    if width is not None and width % telemetry_reads.MINUTE and last - first > MOST_SAMPLED:
        raise Problem("invalid_request", "step: one that is not of whole minutes goes over a day at most.")
    pool = pool_of(request)
    gpu = await bounded(telemetry_reads.gpu_id(pool, uuid))
    if gpu is None:
        raise unknown_gpu()
    for name in asked[1] if asked is not None else ():
        if width is not None:
            raise tables.not_rolled_up(name)
        if not await bounded(telemetry_reads.has_field(pool, gpu, first, last, name)):
            raise tables.unknown_field(name)
    names = None if asked is None else [*asked[0], *asked[1]]
    from_here = first
    if (seen := tables.after(cursor, datetime)) is not None:
        from_here = max(first, seen + (width or timedelta(microseconds=1)))
    reading: Coroutine[Any, Any, Sequence[Point | Sampled]]
    if width is None:
        reading = telemetry_reads.samples(pool, gpu, from_here, last, names, limit + 1)
    else:
        reading = telemetry_reads.rolled(pool, gpu, from_here, last, names, width, limit + 1)
    found = await bounded(reading)
    page = found[:limit]
    following = tables.cursor_of(page[-1].time) if len(found) > limit else None
    view = TelemetryPage(
        gpu_uuid=uuid, start=first, end=last, samples=cast("tuple[Point, ...]", tuple(page)), next_cursor=following,
        step_seconds=None if width is None else width.total_seconds(),
    )  # fmt: skip
    return tables.answer(
        request, view, map(_row, page), lambda: _columns(page, names, is_rolled=width is not None), wanted=wanted,
        next_cursor=following,
    )  # fmt: skip


@router.get(
    "/v1/energy",
    responses=describe(200, Energy, "Energy and idle time.") | responses(*_PROBLEMS),
    summary="Energy and idle GPU-hours",
)
async def get_energy(
    request: Request,
    by: Annotated[Literal["gpu", "host"], Query(description="A row for each of these.")] = "host",
    start: Annotated[str, Query(max_length=60, description="From this minute on.")] = "now-24h",
    end: Annotated[str, Query(max_length=60, description="Until this minute.")] = "now",
    host: Host = None,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS, description="Rows; the total is of all.")] = 1000,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return joules, kilowatt-hours and idle GPU-hours, with costs where prices are set, the most energy first."""
    settings = request.app.state.settings
    first, last = tables.span(start, end, datetime.now(UTC))
    pool = pool_of(request)
    prices = settings.energy_price_per_kwh, settings.gpu_hour_price
    rows = await bounded(telemetry_reads.energy(pool, first, last, host))
    count, joules = await bounded(telemetry_reads.energy_of_predictions(pool, first, last))
    each = (joules or 0.0) / count if count else None
    price = settings.energy_price_per_kwh
    shown = sorted(rows if by == "gpu" else by_host(rows), key=lambda row: -row.joules)[:limit]
    page = tuple(priced(row, *prices) for row in shown)
    view = Energy(
        start=first, end=last, by=by, currency=settings.currency, total=priced(summed(rows), *prices), rows=page,
        predictions=PredictionEnergy(
            count, joules or 0.0, each, None if each is None or price is None else each / 3.6e6 * price
        ),
    )  # fmt: skip
    columns = [
        name for name in EnergyRow.__struct_fields__ if by == "gpu" or name not in {"gpu_uuid", "model"}
    ]
    return tables.answer(request, view, tables.plain(page), columns, wanted=wanted)


def unknown_gpu() -> Problem:
    """Return the answer to a UUID that no sample had."""
    return Problem("not_found", "There is no GPU with this UUID.")


def pool_of(request: Request) -> Pool:
    """Return the connections to the database."""
    pool: Pool = request.app.state.database.pool
    return pool


def _columns(page: Sequence[Point | Sampled], names: list[str] | None, *, is_rolled: bool) -> list[str]:
    """Return the columns of a CSV: with no fields asked for, those that occur, in the order of the table."""
    if names is None:
        found = {name for point in page for name in values_of(point)}
        names = [name for name in dcgm.NAMES if name in found] + sorted(found - set(dcgm.NAMES))
    if is_rolled:
        return [
            "time",
            "samples",
            *(f"{name}.{part}" for name in names for part in Rolled.__struct_fields__),
            "xids",
        ]
    return ["time", *names, "xids", "lost", "source_time"]


def _row(point: Point | Sampled) -> dict[str, object]:
    row: dict[str, object] = {"time": point.time.isoformat(), "xids": point.xids}
    if isinstance(point, Point) and point.samples is not None:
        row["samples"] = point.samples
    else:
        row |= {"lost": point.lost, "source_time": point.source_time and point.source_time.isoformat()}
    for name, value in values_of(point).items():
        if isinstance(value, Rolled):
            row |= {f"{name}.{part}": getattr(value, part) for part in Rolled.__struct_fields__}
        else:
            row[name] = value
    return row
