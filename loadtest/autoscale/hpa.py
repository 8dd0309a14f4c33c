"""The horizontal pod autoscaler of Kubernetes 1.36 for metrics of type AverageValue, one call per sync.

After pkg/controller/podautoscaler/{horizontal,replica_calculator}.go; `behavior` is always given, as KEDA's users
do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.autoscale.objects import MAX_REPLICAS, Behavior, Rules

SYNC_SECONDS = 15


@dataclass(frozen=True)
class Metric:
    """One external metric: its value over all pods, and the target for each; None when it could not be had."""

    value: float | None
    target: float


def wanted_by(metric: Metric, pods: int, behavior: Behavior) -> int:
    """Return how many replicas one metric asks for; `pods` exist, started or not."""
    value, target = metric.value, metric.target
    assert value is not None
    if math.isnan(value) or value < 0:
        return MAX_REPLICAS  # a negative sum is read as an overflow
    if math.isinf(value):
        return MAX_REPLICAS
    if pods > 0:
        usage = value / (target * pods)
        # The same arithmetic on floats as in Go: 1.1 - 1.0 is more than 0.1.
        if 1.0 - behavior.down.tolerance <= usage <= 1.0 + behavior.up.tolerance:
            return pods
    return math.ceil(value / target)


@dataclass
class Autoscaler:
    """The state of one HPA: its recommendations and scale events."""

    minimum: int
    maximum: int
    behavior: Behavior
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _added: list[tuple[float, int]] = field(default_factory=list)
    _removed: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, current: int, metrics: Sequence[Metric]) -> int:
        """Return how many replicas there should be from now on; 0 are left alone."""
        if current == 0:
            return 0
        if not self._recommended:
            self._recommended.append((now, current))  # what a controller remembers when it starts
        if current > self.maximum:
            return self._changed(now, current, self.maximum)
        if current < self.minimum:
            return self._changed(now, current, self.minimum)
        known = [wanted_by(metric, current, self.behavior) for metric in metrics if metric.value is not None]
        if not known:
            return current
        desired = max(known)
        if len(known) < len(metrics) and desired < current:
            return current  # with a metric missing, nothing shrinks
        return self._changed(
            now, current, self._limited(now, current, self._stabilized(now, current, desired))
        )

    def _stabilized(self, now: float, current: int, desired: int) -> int:
        up, down = self.behavior.up.window_seconds, self.behavior.down.window_seconds
        lowest = min([desired, *(n for at, n in self._recommended if at > now - up)])
        highest = max([desired, *(n for at, n in self._recommended if at > now - down)])
        self._recommended = [(at, n) for at, n in self._recommended if at > now - max(up, down)]
        self._recommended.append((now, desired))
        return min(max(current, lowest), highest)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        if wanted > current:
            return min(
                wanted, self.maximum, max(current, self._limit(now, current, self.behavior.up, up=True))
            )
        if wanted < current:
            return max(
                wanted, self.minimum, min(current, self._limit(now, current, self.behavior.down, up=False))
            )
        return wanted

    def _limit(self, now: float, current: int, rules: Rules, *, up: bool) -> int:
        if rules.select == "Disabled":
            return current
        limits = []
        for step in rules.steps:
            added = sum(n for at, n in self._added if at > now - step.period_seconds)
            removed = sum(n for at, n in self._removed if at > now - step.period_seconds)
            start = current - added + removed
            if step.kind == "Pods":
                limits.append(start + step.value if up else start - step.value)
            elif up:
                limits.append(math.ceil(start * (1 + step.value / 100)))
            else:
                limits.append(int(start * (1 - step.value / 100)))
        return max(limits) if (rules.select == "Max") == up else min(limits)

    def _changed(self, now: float, current: int, desired: int) -> int:
        longest = max(
            step.period_seconds for rules in (self.behavior.up, self.behavior.down) for step in rules.steps
        )
        self._added = [(at, n) for at, n in self._added if at > now - longest]
        self._removed = [(at, n) for at, n in self._removed if at > now - longest]
        if desired > current:
            self._added.append((now, desired - current))
        elif desired < current:
            self._removed.append((now, current - desired))
        return desired
