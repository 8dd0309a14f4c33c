"""KEDA 2.21: what its triggers see, what the HPA is told, and the poll loop between zero and one.

After pkg/scalers/kafka_scaler.go, pkg/scaling/{scale_handler,modifiers,fallback}, pkg/scaling/executor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.autoscale.expression import FormulaError, compile_formula
from loadtest.autoscale.hpa import Metric
from loadtest.autoscale.objects import KafkaTrigger, PrometheusTrigger, ScaledObject, Signal, Trigger

NO_OFFSET = -1


@dataclass(frozen=True)
class Partition:
    """What Kafka says of one partition; `committed` is -1 before the group's first commit."""

    committed: int
    end: int
    start: int = 0


class Observed(Protocol):
    """What can be asked from outside; None when it does not answer."""

    def partitions(self, lane: int) -> Sequence[Partition] | None:
        """Return the offsets of a lane."""

    def signal(self, name: Signal) -> float | None:
        """Return the newest result of a Prometheus query."""

    def pods(self) -> int:
        """Return how many pods exist, started or not."""


def lag_of(partition: Partition, trigger: KafkaTrigger) -> int:
    """Return the lag of one partition; a group that never committed has all of it, or 1 with `latest`."""
    if partition.committed == NO_OFFSET:
        return 1 if trigger.offset_reset_policy == "latest" else partition.end - partition.start
    return partition.end - partition.committed


def total_lag(partitions: Sequence[Partition], trigger: KafkaTrigger) -> tuple[int, int]:
    """Return the lag as the HPA sees it, capped, and as activation sees it."""
    lags = [lag_of(partition, trigger) for partition in partitions]
    whole = capped = sum(lags)
    if not trigger.allow_idle_consumers or trigger.limit_to_partitions_with_lag:
        upper = sum(lag > 0 for lag in lags) if trigger.limit_to_partitions_with_lag else len(lags)
        if capped // trigger.lag_threshold > upper:  # whole numbers, hence partitions + 1 replicas
            capped = upper * trigger.lag_threshold
    return max(0, capped), whole


class Keda:
    """One ScaledObject's scaler."""

    def __init__(self, scaled: ScaledObject) -> None:
        self.scaled = scaled
        self._formula = compile_formula(scaled.modifiers.formula) if scaled.modifiers else None
        if self._formula:
            # The admission webhook computes it once so.
            self._formula(dict.fromkeys((trigger.name for trigger in scaled.triggers), -1.0))
        self._failures = dict.fromkeys((trigger.name for trigger in scaled.triggers), 0)
        self._last_active = -math.inf

    def metrics(self, observed: Observed) -> list[Metric]:
        """Return what the HPA is told, once for each of its requests."""
        values = self._read(observed)
        if self.scaled.modifiers is None:
            pods = observed.pods()
            return [self._plain(trigger, values[trigger.name], pods) for trigger in self.scaled.triggers]
        return [Metric(self._composite(values), self.scaled.modifiers.target)]

    def poll(self, now: float, replicas: int, observed: Observed) -> int:
        """Return the replicas after one turn of the poll loop, which knows only none, some and the minimum."""
        active, failed = self._active(observed)
        minimum = self.scaled.min_replicas
        if active:
            self._last_active = now if not failed else self._last_active
            return max(replicas, minimum, 1)
        if failed:
            return replicas
        if minimum == 0 and replicas > 0 and now - self._last_active >= self.scaled.cooldown_seconds:
            return 0
        return max(replicas, minimum)

    def _plain(self, trigger: Trigger, value: float | None, pods: int) -> Metric:
        target = float(trigger.lag_threshold) if isinstance(trigger, KafkaTrigger) else 1.0
        fallback = self.scaled.fallback
        if value is None and fallback and self._failures[trigger.name] > fallback.failure_threshold:
            replicas = pods if fallback.behavior == "currentReplicas" else fallback.replicas
            return Metric(target * replicas, target)
        return Metric(value, target)

    def _composite(self, values: dict[str, float | None]) -> float | None:
        """Compute the formula; whatever is not clamped there is not clamped here."""
        assert self._formula is not None
        assert self.scaled.modifiers is not None
        fallback = self.scaled.fallback
        failed = [name for name, value in values.items() if value is None]
        if failed:
            if fallback is None or max(self._failures[name] for name in failed) <= fallback.failure_threshold:
                return None
            if fallback.behavior == "static":
                return float(fallback.replicas * self.scaled.modifiers.target)
        try:
            return self._formula(values)
        except FormulaError:
            return None

    def _active(self, observed: Observed) -> tuple[bool, bool]:
        """Return whether there is work, and whether some trigger could not say."""
        values = self._read(observed)
        failed = any(value is None for value in values.values())
        if self.scaled.modifiers is not None:
            value = self._composite(values)
            return (
                value is not None and value > self.scaled.modifiers.activation_target,
                failed and value is None,
            )
        found = False
        for trigger in self.scaled.triggers:
            partitions = observed.partitions(trigger.lane) if isinstance(trigger, KafkaTrigger) else None
            if isinstance(trigger, KafkaTrigger) and partitions is not None:
                found |= total_lag(partitions, trigger)[1] > trigger.activation_lag_threshold
            elif not isinstance(trigger, KafkaTrigger):
                found |= (values[trigger.name] or 0.0) > 0.0
        return found, failed

    def _read(self, observed: Observed) -> dict[str, float | None]:
        """Ask every trigger; failures are counted whoever asks, the HPA or the poll loop."""
        values = {trigger.name: self._value(trigger, observed) for trigger in self.scaled.triggers}
        for name, value in values.items():
            self._failures[name] = self._failures[name] + 1 if value is None else 0
        return values

    def _value(self, trigger: Trigger, observed: Observed) -> float | None:
        if isinstance(trigger, KafkaTrigger):
            partitions = observed.partitions(trigger.lane)
            return None if partitions is None else float(total_lag(partitions, trigger)[0])
        if isinstance(trigger, PrometheusTrigger):
            return observed.signal(trigger.signal)
        return float(observed.pods())
