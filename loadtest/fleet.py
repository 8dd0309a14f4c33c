"""A made-up fleet of GPUs with known faults: what its sensors would say, step by step, from a seed.

Jobs need power, power makes heat, heat and limits slow clocks, and GPUs that work together wait for the slowest.
Nothing here knows how faults are detected: physics and public descriptions only, so that a detector's score on it
is honest. The same plan always gives the same samples. No clock, no I/O.
"""

import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec
import numpy as np

from loadtest.fleet_faults import FAULTS, Injected, Moment, Stress
from loadtest.fleet_jobs import Job, Kind, Schedule
from loadtest.fleet_models import MODELS, GpuModel
from loadtest.fleet_physics import Physics
from pipeline.telemetry import Gpu, Samples

GPUS_PER_HOST = 8
SOURCE = "simulate"
# What a GPU is, is repeated so often, for whoever begins to read later.
_DESCRIBE_EVERY_SECONDS = 300.0
# Without faults too: records that come late or twice, collectors that restart.
_LATE_PER_RECORD = 0.002
_TWICE_PER_RECORD = 0.002
_RESTARTS_PER_HOST_HOUR = 0.01
# A fault comes when the fleet has been looked at for a while.
_WARM_SECONDS = 1200.0
_AFTER_SECONDS = 600.0


@dataclass(frozen=True)
class Plan:
    """A fleet, how long it is looked at, and what breaks."""

    begin: datetime
    seconds: float
    gpus: int = 64
    seed: int = 7
    interval_seconds: float = 10.0
    #: Kinds of faults, each as often as it stands here, on GPUs that have nothing else.
    faults: tuple[str, ...] = ()
    #: When faults begin, in seconds since the beginning; None: at any time that leaves room for them.
    fault_window: tuple[float, float] | None = None
    models: tuple[GpuModel, ...] = MODELS
    #: What makes hosts and GPUs others than those of another run of the same fleet.
    identity: str = ""


class Step(NamedTuple):
    """What is published at one moment."""

    time: datetime
    records: list[Samples]


@dataclass
class _Host:
    name: str
    model: GpuModel
    gpus: np.ndarray  # (8,) int64
    silent_until: float = 0.0
    described_at: float = -1e9
    #: Records that come with the next ones.
    held: list[Samples] = field(default_factory=list)


class Fleet:
    """One fleet; iterate once.

    Raises:
        ValueError: a fault is not known, or there is no room for all of them.
    """

    def __init__(self, plan: Plan) -> None:
        unknown = set(plan.faults) - FAULTS.keys()
        if unknown:
            raise ValueError(f"no fault is called {min(unknown)}: there are {', '.join(FAULTS)}")
        self.plan = plan
        self._rng = np.random.default_rng(plan.seed)
        self._hosts = list(self._make_hosts())
        self.uuids = [_uuid(plan.seed, plan.identity, number) for number in range(plan.gpus)]
        self.models = [host.model for host in self._hosts for _ in host.gpus]
        schedule_rng, physics_rng = self._rng.spawn(2)
        self._schedule = Schedule(
            [host.gpus for host in self._hosts], [host.model.name for host in self._hosts],
            plan.seconds, schedule_rng, is_small=len(self._hosts) <= 3 * len(plan.faults),
        )  # fmt: skip
        self._host_of = {int(gpu): host for host in self._hosts for gpu in host.gpus}
        #: The truth; complete from the beginning, but for when faults become visible.
        self.injected = self._inject()
        self._stress = Stress(plan.gpus)
        self._physics = Physics(self.models, physics_rng)

    def __iter__(self) -> Iterator[Step]:
        plan = self.plan
        for number in range(int(plan.seconds / plan.interval_seconds)):
            seconds = number * plan.interval_seconds
            time = plan.begin + timedelta(seconds=seconds)
            self._stress.clear()
            jobs = list(self._schedule.active(seconds))
            self._break(time, seconds, jobs)
            self._physics.step(seconds, plan.interval_seconds, jobs, self._stress)
            self._see(time)
            yield Step(time, list(self._records(time, seconds)))

    def _make_hosts(self) -> Iterator[_Host]:
        """Hosts of one kind are beside each other, as in racks."""
        count = -(-self.plan.gpus // GPUS_PER_HOST)
        prefix = f"sim-{self.plan.identity}" if self.plan.identity else "sim"
        shares = np.cumsum([model.share for model in self.plan.models])
        for number in range(count):
            place = (number + 0.5) / count * shares[-1]
            model = self.plan.models[int(np.searchsorted(shares, place))]
            first = number * GPUS_PER_HOST
            gpus = np.arange(first, min(first + GPUS_PER_HOST, self.plan.gpus))
            yield _Host(f"{prefix}-{number:04d}", model, gpus)

    def _inject(self) -> list[Injected]:
        """Choose a GPU and a time for each fault; no job has two."""
        free = list(range(len(self._schedule.places)))
        self._rng.shuffle(free)
        # What few GPUs can have is placed first.
        order = sorted(
            self.plan.faults, key=lambda name: sum(FAULTS[name].of(model) for model in self.models)
        )
        found = []
        for name in order:
            able = [place for place in free if FAULTS[name].of(self.models[self._schedule.places[place][0]])]
            whole = (place for place in able if len(self._schedule.places[place]) >= GPUS_PER_HOST)
            place = next(whole, able[0] if able else None)
            if place is None:
                raise ValueError(f"the fleet has no place for a fault of the kind {name}: take more GPUs")
            free.remove(place)
            found.append(self._inject_at(name, place))
        return sorted(found, key=lambda fault: (fault.begin, fault.gpu))

    def _inject_at(self, name: str, place: int) -> Injected:
        kind, plan, rng = FAULTS[name], self.plan, self._rng
        gpu = int(rng.choice(self._schedule.places[place]))
        seconds = float(rng.uniform(*kind.seconds))
        warm = min(_WARM_SECONDS, 0.2 * plan.seconds)
        window = plan.fault_window or (warm, max(warm, plan.seconds - seconds - _AFTER_SECONDS))
        begin = float(rng.uniform(*window))
        begin = round(begin / plan.interval_seconds) * plan.interval_seconds
        severity, variant = float(rng.uniform()), bool(rng.random() < 0.5)
        if name == "memory_leak":
            # It lasts until the memory is full.
            seconds = 7200.0 + severity * (2700.0 - 7200.0)
        # One of independent workers hangs; of synchronous ones all would.
        use: Kind = "batch" if name == "idle_waste" else "training"
        job = self._schedule.require(use, place, begin - 300.0, begin + seconds + 300.0)
        if name == "memory_leak":
            job.memory_share = min(job.memory_share, 0.6)
            job.crashes = [(begin + seconds * (1.0 - job.memory_share), begin + seconds + 120.0, 0)]
        if kind.crashes:
            job.crashes = [(begin, begin + seconds, 0)]
        return Injected(
            name, gpu, self.uuids[gpu], self._host_of[gpu].name,
            plan.begin + timedelta(seconds=begin), plan.begin + timedelta(seconds=begin + seconds),
            severity, variant,
        )  # fmt: skip

    def _break(self, time: datetime, seconds: float, jobs: Sequence[Job]) -> None:
        interval = self.plan.interval_seconds
        for job in jobs:
            for begin, _, xid in job.crashes:
                if xid and begin <= seconds < begin + interval:
                    self._stress.xids[int(job.gpus[0])] = [xid]
        for fault in self.injected:
            if fault.begin <= time < fault.end:
                age = (time - fault.begin).total_seconds()
                FAULTS[fault.fault].apply(self._stress, Moment(fault, age, age < interval))

    def _see(self, time: datetime) -> None:
        """Note which faults show by now."""
        for fault in self.injected:
            if fault.visible is None and fault.begin <= time and self._physics.shows(fault.fault, fault.gpu):
                fault.visible = time

    def _records(self, time: datetime, seconds: float) -> Iterator[Samples]:
        samples = self._physics.samples(self.uuids, time, self._stress)
        draws = self._rng.random((len(self._hosts), 3))
        for host, (restart, late, twice) in zip(self._hosts, draws, strict=True):
            held, host.held = host.held, []
            restarts = restart < _RESTARTS_PER_HOST_HOUR * self.plan.interval_seconds / 3600.0
            # The driver is loaded anew where nothing runs: what it counts begins at zero.
            if restarts and self._physics.reload_if_idle(host.gpus):
                host.silent_until = seconds + 40.0
            mine = [found for gpu in host.gpus.tolist() if (found := samples[gpu]) is not None]
            if seconds < host.silent_until or not mine:
                yield from held
                continue
            record = Samples(
                host=host.name, source=SOURCE, samples=tuple(mine), gpus=self._describe(host, seconds)
            )
            if late < _LATE_PER_RECORD:
                host.held = [*held, record]
                continue
            # What was late comes in one record with what is new, as from a collector that could not publish.
            before = tuple(sample for late_record in held for sample in late_record.samples)
            record = msgspec.structs.replace(record, samples=before + record.samples)
            yield record
            if twice < _TWICE_PER_RECORD:
                host.held = [record]

    def _describe(self, host: _Host, seconds: float) -> tuple[Gpu, ...]:
        if seconds - host.described_at < _DESCRIBE_EVERY_SECONDS:
            return ()
        host.described_at = seconds
        return tuple(
            Gpu(
                gpu_uuid=self.uuids[gpu], index=index, model=host.model.name, device=f"nvidia{index}",
                pci_bus_id=f"00000000:{0x10 + 8 * index:02X}:00.0", driver_version="570.124.06",
            )
            for index, gpu in enumerate(host.gpus.tolist())
        )  # fmt: skip


def _uuid(seed: int, identity: str, number: int) -> str:
    return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'millrace fleet {seed} {identity} {number}')}"


def by_fault(injected: Sequence[Injected]) -> dict[str, list[Injected]]:
    """Group the truth by kind."""
    found: dict[str, list[Injected]] = defaultdict(list)
    for fault in injected:
        found[fault.fault].append(fault)
    return dict(found)
