"""What a made-up fleet is used for: jobs on hosts, with their phases. Plain data from a seed, no GPUs, no faults.

A job holds whole hosts or single GPUs: it starts up, works with the pauses of its kind, may crash and start again,
and ends. Times are seconds since the fleet's beginning.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["training", "inference", "batch", "notebook"]
Floats = npt.NDArray[np.float64]

_DAY = 86_400.0
# Median and spread (sigma of the logarithm) of how long jobs run: large clusters report medians of an hour or two
# with tails of days (Meta, Llama 3; Microsoft, Philly traces).
_RUN_SECONDS: dict[Kind, tuple[float, float]] = {
    "training": (3.0 * 3600, 0.8),
    "inference": (12.0 * 3600, 0.5),
    "batch": (1.0 * 3600, 0.7),
    "notebook": (1.5 * 3600, 0.6),
}
_GAP_SECONDS = 900.0
_CRASHES_PER_JOB = 0.03
# Xids that an application's own mistakes raise.
_APPLICATION_XIDS = (13, 31, 43)


@dataclass
class Job:
    """One job on some GPUs."""

    kind: Kind
    gpus: npt.NDArray[np.int64]
    begin: float
    end: float
    #: Share of the time in which kernels run, and of the full power that they need.
    activity: float
    intensity: float
    memory_share: float
    startup_seconds: float
    #: Checkpoints of training, loading of batches, bursts of notebooks.
    period_seconds: float
    pause_seconds: float
    phase: float
    #: Crashes: from when to when it is gone, and the Xid that its first GPU reports.
    crashes: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def is_synchronous(self) -> bool:
        """Whether its GPUs wait for each other in each step."""
        return self.kind == "training" and len(self.gpus) > 1

    def age(self, time: float) -> float | None:
        """Return for how long it has run without a break; None while it is down."""
        started = self.begin
        for begin, end, _ in self.crashes:
            if begin <= time < end:
                return None
            if time >= end:
                started = end
        return time - started

    def demand(self, time: float, noise: Floats) -> tuple[Floats, float, float]:
        """Return activity by GPU, intensity, and the share of memory that it holds now.

        Args:
            time: Now.
            noise: Slowly moving, about normal, of each of its GPUs.
        """
        age = self.age(time)
        if age is None:
            return np.zeros(len(self.gpus)), 0.0, 0.0
        loaded = min(1.0, age / self.startup_seconds)
        if loaded < 1.0:
            return np.clip(0.04 + 0.02 * noise, 0.0, 1.0), 0.3, self.memory_share * loaded
        if (age + self.phase) % self.period_seconds < self.pause_seconds:
            paused = np.clip(0.03 + 0.02 * noise, 0.0, 1.0)
            return paused, 0.3, self.memory_share
        if self.kind == "training":
            return np.clip(self.activity + 0.005 * noise, 0.0, 1.0), self.intensity, self.memory_share
        if self.kind == "inference":
            # By night two thirds less than by day; one that serves nobody for hours is a fault, not a night.
            daily = 1.0 + 0.5 * math.sin(2 * math.pi * (time + self.phase) / _DAY)
            return np.clip(self.activity * daily + 0.05 * noise, 0.10, 1.0), self.intensity, self.memory_share
        return np.clip(self.activity + 0.10 * noise, 0.05, 1.0), self.intensity, self.memory_share


def draw(kind: Kind, gpus: npt.NDArray[np.int64], begin: float, end: float, rng: np.random.Generator) -> Job:
    """Draw a job of a kind."""
    if kind == "training":
        return Job(
            kind, gpus, begin, end,
            activity=rng.uniform(0.95, 1.0), intensity=rng.uniform(0.6, 1.0),
            memory_share=rng.uniform(0.55, 0.96), startup_seconds=rng.uniform(60, 300),
            period_seconds=rng.uniform(1200, 3600), pause_seconds=rng.uniform(15, 90), phase=rng.uniform(0, 3600),
        )  # fmt: skip
    if kind == "inference":
        return Job(
            kind, gpus, begin, end,
            activity=rng.uniform(0.3, 0.65), intensity=rng.uniform(0.35, 0.6),
            memory_share=rng.uniform(0.85, 0.93), startup_seconds=rng.uniform(40, 180),
            period_seconds=2 * _DAY, pause_seconds=0.0, phase=rng.uniform(0, _DAY),
        )  # fmt: skip
    if kind == "batch":
        return Job(
            kind, gpus, begin, end,
            activity=rng.uniform(0.6, 0.95), intensity=rng.uniform(0.45, 0.85),
            memory_share=rng.uniform(0.2, 0.8), startup_seconds=rng.uniform(20, 90),
            period_seconds=rng.uniform(120, 900), pause_seconds=rng.uniform(5, 40), phase=rng.uniform(0, 900),
        )  # fmt: skip
    # Somebody thinks for some minutes between two cells; who forgets a notebook for hours is a fault.
    return Job(
        kind, gpus, begin, end,
        activity=rng.uniform(0.3, 0.8), intensity=rng.uniform(0.3, 0.8),
        memory_share=rng.uniform(0.1, 0.5), startup_seconds=rng.uniform(10, 40),
        period_seconds=rng.uniform(300, 700), pause_seconds=rng.uniform(60, 240), phase=rng.uniform(0, 600),
    )  # fmt: skip


class Schedule:
    """The jobs of a fleet, place by place: a place is what one job after the other holds.

    Args:
        hosts: The GPUs of each host, by index; hosts that follow each other and are alike may share a job.
        kinds: What distinguishes hosts: only alike ones share.
        seconds: How long the fleet is looked at.
        rng: Draws everything.
        is_small: Each host is a place of its own.
    """

    def __init__(
        self,
        hosts: Sequence[npt.NDArray[np.int64]],
        kinds: Sequence[object],
        seconds: float,
        rng: np.random.Generator,
        *,
        is_small: bool = False,
    ) -> None:
        self._rng = rng
        self._seconds = seconds
        self._is_small = is_small
        self.places = list(self._places(hosts, kinds))
        self.jobs = [list(self._timeline(place)) for place in self.places]

    def require(self, kind: Kind, place: int, begin: float, end: float) -> Job:
        """Make sure that one job of a kind holds a place for a while, by moving others out of its way."""
        found = next(
            (
                job
                for job in self.jobs[place]
                if job.kind == kind and job.begin + job.startup_seconds <= begin and job.end >= end
            ),
            None,
        )
        if found is None:
            found = draw(kind, self.places[place], begin - 600.0, end, self._rng)
        found.crashes = []
        others = []
        for job in self.jobs[place]:
            if job is found:
                continue
            if job.begin < found.begin < job.end:
                others.append(
                    replace(job, end=found.begin, crashes=[c for c in job.crashes if c[1] < found.begin])
                )
            elif job.end <= found.begin or job.begin >= found.end:
                others.append(job)
        self.jobs[place] = sorted([*others, found], key=lambda job: job.begin)
        return found

    def active(self, time: float) -> Iterator[Job]:
        """Yield the jobs that hold their GPUs now."""
        for jobs in self.jobs:
            while jobs and jobs[0].end <= time:
                jobs.pop(0)
            if jobs and jobs[0].begin <= time:
                yield jobs[0]

    def _places(
        self, hosts: Sequence[npt.NDArray[np.int64]], kinds: Sequence[object]
    ) -> Iterator[npt.NDArray[np.int64]]:
        index = 0
        while index < len(hosts):
            alike = 1
            while index + alike < len(hosts) and kinds[index + alike] == kinds[index]:
                alike += 1
            drawn = (1, 2, 4, 8)[int(np.searchsorted((0.5, 0.75, 0.9), self._rng.random()))]
            size = 1 if self._is_small else min(alike, drawn)
            if size == 1 and not self._is_small and self._rng.random() < 0.3:
                # A host that is shared by jobs of one or two GPUs.
                gpus = hosts[index]
                while len(gpus):
                    some = min(len(gpus), int(self._rng.integers(1, 3)))
                    yield gpus[:some]
                    gpus = gpus[some:]
            else:
                yield np.concatenate([hosts[index + number] for number in range(size)])
            index += size

    def _timeline(self, gpus: npt.NDArray[np.int64]) -> Iterator[Job]:
        rng = self._rng
        # The fleet is looked at in the middle of its life.
        time = -float(rng.exponential(3600.0))
        while time < self._seconds:
            kind: Kind
            if len(gpus) > 8:
                kind = "training"
            elif len(gpus) == 8:
                kind = rng.choice(["training", "inference", "batch"], p=[0.6, 0.25, 0.15])
            else:
                kind = rng.choice(["batch", "inference", "notebook"], p=[0.5, 0.25, 0.25])
            median, spread = _RUN_SECONDS[kind]
            end = time + float(median * np.exp(spread * rng.standard_normal()))
            job = draw(kind, gpus, time, max(end, time + 600.0), rng)
            if kind in ("training", "batch") and rng.random() < _CRASHES_PER_JOB:
                crash = float(rng.uniform(time + 300.0, job.end))
                job.crashes.append(
                    (crash, crash + float(rng.uniform(60, 240)), _APPLICATION_XIDS[int(rng.integers(3))])
                )
            yield job
            time = job.end + float(rng.exponential(_GAP_SECONDS))
