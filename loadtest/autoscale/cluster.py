"""Pods, a consumer group and two lanes of partitions, one second after the other.

A pod costs from the moment it is ordered until it has drained. The group stops for every change of its members.
Within a lane and partition records are served in order; real-time goes before bulk, which keeps an eighth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.autoscale.keda import Partition
from loadtest.autoscale.objects import Signal
from loadtest.autoscale.traces import LANES, Trace

Floats = npt.NDArray[np.float64]
BULK_FLOOR = 1 / 8  # of a pod's batches, while bulk waits: pipeline/batching.py
SCRAPE_SECONDS = 15
RATE_WINDOW_SECONDS = 60
SPEED_WINDOW_SECONDS = 300
SKEW_WINDOW_SECONDS = 900


@dataclass(frozen=True)
class Pods:
    """What a pod can do, and how long it takes to come and to go."""

    images_per_second: float = 120.0
    #: From the order to readiness: a node, the image, the weights, the warm-up.
    start_seconds: float = 90.0
    start_spread: float = 0.1
    #: How much pods differ from each other, and one pod from second to second.
    speed_spread: float = 0.03
    speed_noise: float = 0.1
    #: The group stops for this long when its members change.
    rebalance_seconds: float = 5.0
    drain_seconds: float = 3.0
    #: A record waits for the batch before its own, then for its own.
    batch_seconds: float = 0.27


@dataclass
class _Pod:
    number: int
    ready_at: float
    speed: float
    leaves_at: float | None = None


def assignment(partitions: int, members: int) -> npt.NDArray[np.int64]:
    """Return which member has each partition: shared evenly by number, whatever is in them, as assignors do."""
    return np.arange(partitions) * members // partitions


class Cluster:
    """What runs, and what can be seen of it from outside."""

    def __init__(self, trace: Trace, pods: Pods, seed: int) -> None:
        self.trace = trace
        self.now = 0
        self.pod_seconds = 0.0
        self.changes = 0
        self.rebalances = 0
        self.outages: dict[str, tuple[int, int]] = {}
        self._kind = pods
        self._draw = np.random.default_rng(seed)
        self._pods: list[_Pod] = []
        self._ordered = 0
        self._members: tuple[int, ...] = ()
        self._paused_until = 0.0
        self._owner = np.full(trace.partitions, -1)
        self._speed = np.zeros(0)
        seconds = trace.seconds
        #: Records by the end of each second, by lane and partition; row 0 is the beginning.
        self.arrived = np.zeros((seconds + 1, LANES, trace.partitions))
        np.cumsum(trace.arrivals, axis=0, out=self.arrived[1:])
        self.served = np.zeros((seconds + 1, LANES, trace.partitions))
        self._done = np.zeros(seconds + 1)
        self._busy = np.zeros(seconds + 1)
        self._ready = np.zeros(seconds + 1)
        self._noise = np.clip(self._draw.normal(1.0, pods.speed_noise, seconds + 1), 0.5, 1.5)

    @property
    def replicas(self) -> int:
        """Return the pods that were ordered and not given up."""
        return sum(pod.leaves_at is None for pod in self._pods)

    def scale(self, replicas: int, *, ready: bool = False) -> None:
        """Order pods, or let some go: those that have not started first, then the youngest."""
        present = [pod for pod in self._pods if pod.leaves_at is None]
        if replicas != len(present):
            self.changes += 1
        for _ in range(replicas - len(present)):
            start = self._kind.start_seconds * self._draw.uniform(
                1 - self._kind.start_spread, 1 + self._kind.start_spread
            )
            speed = max(0.5, self._draw.normal(1.0, self._kind.speed_spread)) * self._kind.images_per_second
            self._pods.append(_Pod(self._ordered, self.now if ready else self.now + start, speed))
            self._ordered += 1
        victims = sorted(present, key=lambda pod: (pod.ready_at > self.now, pod.ready_at), reverse=True)
        for pod in victims[: max(0, len(present) - replicas)]:
            started = pod.ready_at <= self.now
            pod.leaves_at = self.now + (self._kind.drain_seconds if started else 0.0)

    def step(self) -> None:
        """Let one second pass."""
        self._pods = [pod for pod in self._pods if pod.leaves_at is None or pod.leaves_at > self.now]
        self._settle()
        self.pod_seconds += len(self._pods)
        self.now += 1
        before = self.served[self.now - 1]
        self.served[self.now] = before
        self._ready[self.now] = len(self._members)
        if self.now > self._paused_until and len(self._members):
            self._serve(self.arrived[self.now] - before)

    def _settle(self) -> None:
        members = tuple(
            pod.number for pod in self._pods if pod.ready_at <= self.now and pod.leaves_at is None
        )
        if members == self._members:
            return
        self._members = members
        self.rebalances += 1
        self._paused_until = self.now + self._kind.rebalance_seconds
        partitions = self.trace.partitions
        # Balanced by count, as Kafka's assignors do; more members than partitions are idle.
        active = min(len(members), partitions)
        self._owner = assignment(partitions, active) if active else np.full(partitions, -1)
        speeds = {pod.number: pod.speed for pod in self._pods}
        self._speed = np.array([speeds[number] for number in members[:active]])

    def _serve(self, backlog: Floats) -> None:
        capacity = self._speed * self._noise[self.now]
        realtime, bulk = (np.bincount(self._owner, lane, len(capacity)) for lane in backlog)
        first = np.minimum(realtime, np.maximum(capacity - bulk, capacity * (1 - BULK_FLOOR)))
        second = np.minimum(bulk, capacity - first)
        for lane, (taken, waiting) in enumerate(((first, realtime), (second, bulk))):
            share = np.divide(taken, waiting, out=np.zeros_like(taken), where=waiting > 0)
            self.served[self.now, lane] += backlog[lane] * share[self._owner]
        self._done[self.now] = first.sum() + second.sum()
        # A pod is busy for as long as its work takes at its own speed.
        self._busy[self.now] = ((first + second) / capacity).sum()

    # What KEDA sees

    def partitions(self, lane: int) -> list[Partition] | None:
        """Return the offsets of a lane as they are now; the group commits within the second."""
        if self._is_out("kafka"):
            return None
        ends, committed = self.arrived[self.now, lane], self.served[self.now, lane]
        return [Partition(int(c), int(e)) for c, e in zip(committed, ends, strict=True)]

    def pods(self) -> int:
        """Return how many pods exist, started or not."""
        return self.replicas

    def signal(self, name: Signal) -> float | None:
        """Return what Prometheus answers: as of the last scrape, over its window."""
        if self._is_out("prometheus"):
            return None
        at = self.now // SCRAPE_SECONDS * SCRAPE_SECONDS
        if name == "speed":
            since = max(0, at - SPEED_WINDOW_SECONDS)
            busy = self._busy[since + 1 : at + 1].sum()
            done = self._done[since + 1 : at + 1].sum()
            return float(done / busy) if busy > 0 else self._kind.images_per_second
        since = max(0, at - RATE_WINDOW_SECONDS)
        rates = (self.arrived[at] - self.arrived[since]) / max(1, at - since)
        if name == "arrival":
            # irate: of the last two scrapes alone, and so at once where a minute's mean would take a minute.
            before = max(0, at - SCRAPE_SECONDS)
            return float((self.arrived[at] - self.arrived[before]).sum() / max(1, at - before))
        if name == "skew":
            since = max(0, at - SKEW_WINDOW_SECONDS)
            came = (self.arrived[at] - self.arrived[since]).sum(axis=0)
            return float(came.max() / came.sum()) if came.sum() > 0 else 1 / self.trace.partitions
        if name == "ready":
            return float(self._ready[at])
        if name == "waited":
            lag = self.arrived[at] - self.served[at]
            return float((lag / np.maximum(rates, 0.1)).max())
        raise ValueError(name)

    def _is_out(self, name: str) -> bool:
        start, end = self.outages.get(name, (0, 0))
        return start <= self.now < end

    def oldest(self, times: Sequence[int]) -> Floats:
        """Return how long the oldest record of any partition had waited at each of these seconds."""
        at = np.asarray(times)
        waited = np.zeros(len(at))
        for arrived, served in zip(_columns(self.arrived), _columns(self.served[at]), strict=True):
            # Rounding may leave a millionth of a record.
            came = np.searchsorted(arrived, served + 1e-6, side="right")
            waited = np.maximum(waited, at - came + 1)
        return waited

    def late(self, deadline_seconds: float) -> float:
        """Return how many records waited longer than the deadline, those that never finished included.

        The last records need not be served within the trace: only those count whose deadline lies in it.
        """
        allowed = max(0, int(deadline_seconds - 2 * self._kind.batch_seconds))
        arrivals, ends = self.trace.arrivals, self.arrived[1:]
        judged = self.trace.seconds - allowed
        waiting = ends[:judged] - self.served[1 + allowed :]
        return float(np.clip(waiting, 0.0, arrivals[:judged]).sum())

    def judged(self, deadline_seconds: float) -> float:
        """Return how many records `late` looked at."""
        allowed = max(0, int(deadline_seconds - 2 * self._kind.batch_seconds))
        return float(self.trace.arrivals[: self.trace.seconds - allowed].sum())


def _columns(by_second: Floats) -> Floats:
    """Return a row of its own for each lane and partition."""
    return by_second.reshape(len(by_second), -1).T
