"""GPU telemetry as gateway and command line show it: one struct per thing, and energy in the units people pay by.

The wire names are these fields; additions are compatible, renames are not. No I/O.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import msgspec

from pipeline.telemetry import Condition


class Firing(msgspec.Struct, frozen=True):
    """How many alerts fire."""

    critical: int = 0
    warning: int = 0
    info: int = 0


class Latest(msgspec.Struct, frozen=True):
    """When a GPU's latest sample was, and the latest values of a few fields; each may be of a sample before it."""

    time: datetime
    values: dict[str, float]


class GpuView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A GPU as it was last seen."""

    gpu_uuid: str
    host: str
    #: GPUs that share it are compared with each other.
    peer_key: str
    state: str
    first_seen: datetime
    last_seen: datetime
    firing: Firing
    latest: Latest | None = None
    index: int | None = None
    model: str | None = None
    device: str | None = None
    pci_bus_id: str | None = None
    #: Of a MIG instance: the GPU that it is a part of.
    parent_uuid: str | None = None
    driver_version: str | None = None
    labels: dict[str, str] = {}
    #: Times that another host named the same UUID, and which one did last.
    conflicts: int = 0
    conflict_host: str | None = None


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host with GPUs."""

    host: str
    gpus: int
    lost: int
    models: tuple[str, ...]
    peer_keys: tuple[str, ...]
    last_seen: datetime
    firing: Firing


# Without `gc` an answer of 10,000 points is not walked by the collector again and again while it is made.
class Rolled(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A field over a step; a counter, a bitmask or a state has no mean."""

    count: int
    min: float
    max: float
    mean: float | None = None


class Point(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A sample, or with a step what samples were from a time on."""

    time: datetime
    values: dict[str, float | Rolled]
    #: Of a roll-up: how many.
    samples: int | None = None
    xids: tuple[int, ...] = ()
    #: The driver did not answer for the GPU.
    lost: bool = False
    #: Of a replay: when the source says that this was.
    source_time: datetime | None = None


class Sampled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A sample that becomes the same JSON as a `Point` does, for a third of the price; see `values_type`."""

    time: datetime
    values: msgspec.Struct
    xids: tuple[int, ...] = ()
    lost: bool = False
    source_time: datetime | None = None


@functools.lru_cache(maxsize=256)
def values_type(fields: tuple[str, ...]) -> Callable[..., msgspec.Struct]:
    """Return what takes the values of these fields, in order; None is absent. A day of one GPU is 8,640 of them."""
    return msgspec.defstruct(
        "Values", [(name, float | None, None) for name in fields], omit_defaults=True, frozen=True, gc=False
    )


def values_of(point: Point | Sampled) -> Mapping[str, float | Rolled]:
    """Return what is known at a point, by field."""
    if isinstance(point, Point):
        return point.values
    return {name: value for name, value in msgspec.structs.asdict(point.values).items() if value is not None}


class AlertView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An alert as it is now."""

    id: str
    state: str
    severity: str
    rule: str
    gpu_uuid: str
    host: str
    since: datetime
    #: The latest window in which the condition held.
    seen_at: datetime
    condition: Condition
    model: str | None = None
    fired_at: datetime | None = None
    resolved_at: datetime | None = None


class EnergyRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a GPU, a host or all of them took, and how long they were idle."""

    joules: float
    kilowatt_hours: float
    #: How long measured, and of it idle (utilization below 5 %).
    gpu_hours: float
    idle_gpu_hours: float
    gpu_uuid: str | None = None
    host: str | None = None
    model: str | None = None
    energy_cost: float | None = None
    idle_cost: float | None = None


def energy_row(
    joules: float,
    seconds: float,
    idle_seconds: float,
    *,
    gpu_uuid: str | None = None,
    host: str | None = None,
    model: str | None = None,
) -> EnergyRow:
    """Return energy and time in the units people pay by."""
    return EnergyRow(
        joules=joules, kilowatt_hours=joules / 3.6e6, gpu_hours=seconds / 3600,
        idle_gpu_hours=idle_seconds / 3600, gpu_uuid=gpu_uuid, host=host, model=model,
    )  # fmt: skip


def summed(rows: Sequence[EnergyRow], host: str | None = None) -> EnergyRow:
    """Return rows as one."""
    return energy_row(
        sum(row.joules for row in rows),
        sum(row.gpu_hours for row in rows) * 3600,
        sum(row.idle_gpu_hours for row in rows) * 3600,
        host=host,
    )


def by_host(rows: Sequence[EnergyRow]) -> list[EnergyRow]:
    """Return the rows of GPUs as rows of hosts."""
    of: dict[str, list[EnergyRow]] = {}
    for row in rows:
        of.setdefault(row.host or "", []).append(row)
    return [summed(together, host=host) for host, together in of.items()]


def priced(row: EnergyRow, per_kilowatt_hour: float | None, per_gpu_hour: float | None) -> EnergyRow:
    """Return a row with what it costs, as far as prices are known."""
    return msgspec.structs.replace(
        row,
        energy_cost=None if per_kilowatt_hour is None else row.kilowatt_hours * per_kilowatt_hour,
        idle_cost=None if per_gpu_hour is None else row.idle_gpu_hours * per_gpu_hour,
    )
