"""What breaks in a made-up fleet: each fault by what it does to one GPU, never by what would notice it.

A fault writes into `Stress`, from which the fleet computes what sensors then show. `Injected` is the truth that a
detector is judged by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from loadtest.fleet_models import GpuModel

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Errors after which a GPU must be reset or a machine restarted (NVIDIA's XID catalogue).
_CRITICAL_XIDS = (79, 119, 74, 95, 62, 48, 140)
_BENIGN_XIDS = (13, 31, 43)


@dataclass
class Injected:
    """One fault of one GPU, as it was injected."""

    fault: str
    gpu: int
    gpu_uuid: str
    host: str
    begin: datetime
    end: datetime
    #: Of what it can vary in, 0 to 1.
    severity: float
    #: Which of its two forms.
    variant: bool
    #: The first sample that shows it to whoever knows what would have been without; None: none did.
    visible: datetime | None = None


@dataclass
class Stress:
    """What faults do at this moment, one value per GPU; set back before each step."""

    gpus: int
    resistance: Floats = field(init=False)
    power_limit: Floats = field(init=False)
    clock: Floats = field(init=False)
    #: How fast work reaches it.
    feed: Floats = field(init=False)
    fan: Floats = field(init=False)
    link: Floats = field(init=False)
    corrected_per_second: Floats = field(init=False)
    nvlink_errors_per_second: Floats = field(init=False)
    replays_per_second: Floats = field(init=False)
    leaked_share: Floats = field(init=False)
    brake: Flags = field(init=False)
    hung: Flags = field(init=False)
    lost: Flags = field(init=False)
    silent: Flags = field(init=False)
    xids: dict[int, list[int]] = field(init=False)
    #: Uncorrected errors that happen now, whose rows are then remapped (or cannot be).
    uncorrected: dict[int, bool] = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Set everything back to healthy."""
        ones, zeros = np.ones(self.gpus), np.zeros(self.gpus)
        self.resistance, self.power_limit, self.clock = ones.copy(), ones.copy(), ones.copy()
        self.feed, self.fan, self.link = ones.copy(), ones.copy(), ones.copy()
        self.corrected_per_second, self.nvlink_errors_per_second = zeros.copy(), zeros.copy()
        self.replays_per_second, self.leaked_share = zeros.copy(), zeros.copy()
        no = np.zeros(self.gpus, dtype=np.bool_)
        self.brake, self.hung, self.lost, self.silent = no.copy(), no.copy(), no.copy(), no.copy()
        self.xids = {}
        self.uncorrected = {}


@dataclass(frozen=True)
class Moment:
    """A fault that is on: for how long, and whether this is its first step."""

    fault: Injected
    age_seconds: float
    is_first: bool

    def between(self, lowest: float, highest: float) -> float:
        """Return where its severity lies between two values."""
        return lowest + self.fault.severity * (highest - lowest)


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    help: str
    apply: Callable[[Stress, Moment], None]
    seconds: tuple[float, float] = (1200.0, 2400.0)
    #: Which GPUs can have it.
    of: Callable[["GpuModel"], bool] = lambda _: True
    #: Whether the job on its GPUs ends with it, and starts again somewhere else or after a while.
    crashes: bool = False


def _thermal(stress: Stress, now: Moment) -> None:
    ramp = min(1.0, now.age_seconds / now.between(300.0, 60.0))
    stress.resistance[now.fault.gpu] = 1.0 + now.between(0.6, 1.2) * ramp


def _power_cap(stress: Stress, now: Moment) -> None:
    if now.fault.variant:
        stress.brake[now.fault.gpu] = True
    stress.power_limit[now.fault.gpu] = now.between(0.65, 0.4)


def _clock_stuck(stress: Stress, now: Moment) -> None:
    stress.clock[now.fault.gpu] = now.between(0.6, 0.2)


def _straggler(stress: Stress, now: Moment) -> None:
    if now.fault.variant:
        stress.clock[now.fault.gpu] = now.between(0.8, 0.6)
    else:
        stress.feed[now.fault.gpu] = now.between(0.8, 0.5)


def _ecc(stress: Stress, now: Moment) -> None:
    # From one a minute it doubles every few minutes, as a failing row does, up to some a second.
    grown = 2.0 ** (now.age_seconds / now.between(300.0, 120.0)) / 60.0
    stress.corrected_per_second[now.fault.gpu] = min(grown, now.between(0.5, 5.0))


def _row_remap(stress: Stress, now: Moment) -> None:
    if now.is_first:
        fails = now.fault.severity > 0.8
        stress.uncorrected[now.fault.gpu] = fails
        xids = [94] if now.fault.variant else []
        stress.xids[now.fault.gpu] = [*xids, 64 if fails else 63]


def _xid_critical(stress: Stress, now: Moment) -> None:
    xid = _CRITICAL_XIDS[int(now.fault.severity * len(_CRITICAL_XIDS)) % len(_CRITICAL_XIDS)]
    if now.is_first:
        stress.xids[now.fault.gpu] = [xid]
    elif xid == 79:
        stress.lost[now.fault.gpu] = True


def _xid_benign(stress: Stress, now: Moment) -> None:
    if now.is_first:
        stress.xids[now.fault.gpu] = [_BENIGN_XIDS[int(now.fault.severity * 3) % 3]]


def _nvlink(stress: Stress, now: Moment) -> None:
    stress.nvlink_errors_per_second[now.fault.gpu] = 10.0 ** now.between(-0.7, 1.3)
    stress.link[now.fault.gpu] = now.between(0.9, 0.5)


def _pcie(stress: Stress, now: Moment) -> None:
    stress.replays_per_second[now.fault.gpu] = 10.0 ** now.between(-0.3, 1.7)
    stress.link[now.fault.gpu] = now.between(0.9, 0.5)


def _idle(stress: Stress, now: Moment) -> None:
    stress.hung[now.fault.gpu] = True


def _leak(stress: Stress, now: Moment) -> None:
    stress.leaked_share[now.fault.gpu] = now.age_seconds / now.between(7200.0, 2700.0)


def _lost(stress: Stress, now: Moment) -> None:
    if now.fault.variant:
        stress.silent[now.fault.gpu] = True
    else:
        stress.lost[now.fault.gpu] = True


def _fan(stress: Stress, now: Moment) -> None:
    stress.fan[now.fault.gpu] = 0.0


FAULTS: Mapping[str, FaultKind] = {
    "thermal": FaultKind("Heat leaves the GPU badly: a loose heat sink, a clogged cold plate.", _thermal),
    "power_cap": FaultKind("Its power is limited to about half, by setting or by the power brake.", _power_cap),
    "clock_stuck": FaultKind("Its clock stays low, and no reason is given.", _clock_stuck),
    "straggler": FaultKind("It does its share slower than the others, for whom it lets wait.", _straggler),
    "ecc": FaultKind("Corrected memory errors, more and more.", _ecc, of=lambda model: model.has_ecc),
    "row_remap": FaultKind(
        "An uncorrected memory error: its row is to be remapped at the next reset, or cannot be.",
        _row_remap, of=lambda model: model.has_ecc,
    ),
    "xid_critical": FaultKind(
        "The driver reports what needs a reset or a restart.", _xid_critical, crashes=True
    ),
    "xid_benign": FaultKind(
        "The driver reports an application's mistake.", _xid_benign, (60.0, 180.0), crashes=True
    ),
    "nvlink": FaultKind("An NVLink has errors.", _nvlink, of=lambda model: model.has_nvlink),
    "pcie": FaultKind("PCIe sends packets again and again.", _pcie),
    "idle_waste": FaultKind("A process holds memory and does nothing.", _idle, (7200.0, 9000.0)),
    "memory_leak": FaultKind("A process needs ever more memory.", _leak, (2700.0, 7200.0)),
    "lost": FaultKind("The driver does not find it any more, or nothing reports it.", _lost),
    "fan": FaultKind("Its fan stands still.", _fan, of=lambda model: model.has_fan),
}  # fmt: skip
