"""`millrace gpus`: what GPUs are and do, worst first, and what they take; from the database."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from millrace.output import EXIT_FAILED, counted, emit, printable, say, show, show_table
from pipeline import telemetry_reads
from pipeline.database import Database
from pipeline.errors import DependencyError
from pipeline.gpu_views import EnergyRow, GpuView, by_host, priced, summed
from pipeline.postgres import Pool
from pipeline.settings import Settings
from pipeline.telemetry_reads import AlertFilter, GpuFilter

if TYPE_CHECKING:
    from rich.table import Table

PAGE_ROWS = 1000
# A GPU that said nothing for so long is shown as silent: six intervals of the collector.
SILENT_SECONDS = 60.0
_MEBIBYTES_PER_GIBIBYTE = 1024

_COLUMNS = ("GPU", "HOST", "#", "MODEL", "STATE", "ALERTS", "UTIL", "MEMORY GiB", "TEMP", "POWER W", "SEEN")


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Pool]:
    """Connect to the database.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    database = await Database.open(settings)
    try:
        yield database.pool
    finally:
        await database.close()


async def show_list(settings: Settings, chosen: GpuFilter, limit: int, as_json: bool) -> int:
    """Print GPUs by host; raises as `connected` does."""
    async with connected(settings) as pool:
        found = await _all(pool, chosen, limit)
    _print(found, as_json)
    return 0


async def show_one(settings: Settings, gpu_uuid: str, as_json: bool) -> int:
    """Print all that is known of a GPU, with its open alerts; 1 if nothing is. Raises as `connected` does."""
    async with connected(settings) as pool:
        found = await telemetry_reads.gpus(pool, GpuFilter(gpu_uuid=gpu_uuid), 1)
        chosen = AlertFilter(states=("pending", "firing"), gpu_uuid=gpu_uuid)
        alerts = await telemetry_reads.alerts(pool, chosen, 100)
    if not found:
        say(f"nothing is known of {gpu_uuid}")
        return EXIT_FAILED
    if as_json:
        emit(found[0])
        return 0
    gpu = found[0]
    show(f"{gpu.gpu_uuid}  {gpu.host}  {gpu.state}")
    facts = {
        "model": gpu.model, "index": gpu.index, "device": gpu.device, "PCI": gpu.pci_bus_id,
        "part of": gpu.parent_uuid,
        "driver": gpu.driver_version, "peers": gpu.peer_key,
        "labels": ", ".join(f"{name}={value}" for name, value in gpu.labels.items()) or None,
        "seen": f"{_moment(gpu.first_seen)} to {_moment(gpu.last_seen)}",
        "conflicts": f"{gpu.conflicts:,}, last with {gpu.conflict_host}" if gpu.conflicts else None,
    }  # fmt: skip
    for name, value in facts.items():
        if value is not None:
            show(f"  {name:<10} {value}")
    for name, number in (gpu.latest.values if gpu.latest else {}).items():
        show(f"  {name:<28} {number:g}")
    for alert in alerts:
        show(
            f"  {alert.state} {alert.severity} {alert.rule} since {_moment(alert.since)}: {alert.condition.message}"
        )
    return 0


async def top(
    settings: Settings, chosen: GpuFilter, limit: int, *, interval_seconds: float, once: bool, as_json: bool
) -> int:
    """Print GPUs, worst first, again and again on a terminal; raises as `connected` does."""
    async with connected(settings) as pool:
        if once or as_json or not sys.stdout.isatty():
            while True:
                _print((await _worst(pool, chosen))[:limit], as_json)
                if once or not as_json:
                    return 0
                await asyncio.sleep(interval_seconds)
        from rich.live import Live

        with Live(screen=True, auto_refresh=False) as live:
            while True:
                begun = time.monotonic()
                try:
                    found = await _worst(pool, chosen)
                    live.update(_table(found, min(limit, max(1, live.console.height - 4))), refresh=True)
                except DependencyError as error:  # it may come back
                    live.update(printable(error.message), refresh=True)
                await asyncio.sleep(max(0.1, interval_seconds - (time.monotonic() - begun)))


async def energy(
    settings: Settings, by: str, start: datetime, end: datetime, host: str | None, limit: int, as_json: bool
) -> int:
    """Print what GPUs or hosts took, the most first; raises as `connected` does."""
    async with connected(settings) as pool:
        rows = await telemetry_reads.energy(pool, start, end, host)
    prices = settings.energy_price_per_kwh, settings.gpu_hour_price
    shown = sorted(rows if by == "gpu" else by_host(rows), key=lambda row: -row.joules)[:limit]
    shown = [priced(row, *prices) for row in shown]
    if as_json:
        for row in shown:
            emit(row)
        return 0
    if not shown:
        say("nothing is known of that time: roll-ups follow the samples by a minute")
        return 0
    lines = [(row.gpu_uuid or row.host, *_energy(row)) for row in shown]
    lines.append(("all", *_energy(priced(summed(rows), *prices))))
    currency = settings.currency
    show_table(
        (by.upper(), "kWh", "GPU-HOURS", "IDLE", f"ENERGY {currency}", f"IDLE {currency}"), lines
    )  # fmt: skip
    return 0


def badness(gpu: GpuView, now: datetime) -> tuple[bool, int, int, bool, float]:
    """Return what GPUs are sorted by, the worst highest: lost, what fires, silent, hot."""
    temperature = gpu.latest.values.get("temperature_celsius", 0.0) if gpu.latest else 0.0
    silent = (now - gpu.last_seen).total_seconds() > SILENT_SECONDS
    return (gpu.state == "lost", gpu.firing.critical, gpu.firing.warning, silent, temperature)


async def _all(pool: Pool, chosen: GpuFilter, limit: int | None = None) -> list[GpuView]:
    found: list[GpuView] = []
    after = None
    while limit is None or len(found) < limit:
        size = PAGE_ROWS if limit is None else min(PAGE_ROWS, limit - len(found))
        page = await telemetry_reads.gpus(pool, chosen, size, after)
        found += page
        if len(page) < size:
            break
        after = page[-1].host, page[-1].gpu_uuid
    return found


async def _worst(pool: Pool, chosen: GpuFilter) -> list[GpuView]:
    now = datetime.now(UTC)
    return sorted(await _all(pool, chosen), key=lambda gpu: badness(gpu, now), reverse=True)


def _print(found: Sequence[GpuView], as_json: bool) -> None:
    if as_json:
        for gpu in found:
            emit(gpu)
    elif found:
        now = datetime.now(UTC)
        show_table(_COLUMNS, [_cells(gpu, now) for gpu in found])
    else:
        say("there is no such GPU")


def _table(found: Sequence[GpuView], limit: int) -> "Table":
    from rich.table import Table

    now = datetime.now(UTC)
    firing = sum(gpu.firing.critical + gpu.firing.warning for gpu in found)
    lost = sum(gpu.state == "lost" for gpu in found)
    title = (
        f"{counted(len(found), 'GPU')}, {lost:,} lost, {counted(firing, 'alert')} firing, {_moment(now)} UTC"
    )
    table = Table(title=title, box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(
            name, no_wrap=True, justify="right" if name in {"#", "UTIL", "TEMP", "POWER W"} else "left"
        )
    for gpu in found[:limit]:
        style = (
            "red" if gpu.state == "lost" or gpu.firing.critical else "yellow" if gpu.firing.warning else ""
        )
        table.add_row(
            *(printable("" if cell is None else str(cell)) for cell in _cells(gpu, now)), style=style
        )
    return table


def _cells(gpu: GpuView, now: datetime) -> tuple[object, ...]:
    values = gpu.latest.values if gpu.latest else {}
    used, total = values.get("memory_used_mebibytes"), values.get("memory_total_mebibytes")
    memory = None if used is None else f"{used / _MEBIBYTES_PER_GIBIBYTE:.1f}"
    if memory is not None and total is not None:
        memory += f"/{total / _MEBIBYTES_PER_GIBIBYTE:.0f}"
    counts = {"critical": gpu.firing.critical, "warning": gpu.firing.warning, "info": gpu.firing.info}
    return (
        gpu.gpu_uuid, gpu.host, None if gpu.index is None else str(gpu.index), gpu.model, gpu.state,
        ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        _number(values.get("utilization_percent")), memory, _number(values.get("temperature_celsius")),
        _number(values.get("power_watts")), _ago((now - gpu.last_seen).total_seconds()),
    )  # fmt: skip


def _energy(row: EnergyRow) -> tuple[str | None, ...]:
    numbers = (row.kilowatt_hours, row.gpu_hours, row.idle_gpu_hours, row.energy_cost, row.idle_cost)
    return tuple(None if number is None else f"{number:,.2f}" for number in numbers)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
