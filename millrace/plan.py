"""`millrace plan`: from a rate, a deadline and what a pod can do to partitions, replicas, cost and a ScaledObject.

What it prints is YAML that can be applied; what it found out stands above it in comments.
"""

import math
import re
from dataclasses import replace
from typing import Any, Literal

import msgspec
import yaml

from loadtest.autoscale import policies
from loadtest.autoscale.objects import ScaledObject
from loadtest.autoscale.optimum import useful_counts
from millrace.output import counted, emit, show
from pipeline.errors import ConfigurationError
from pipeline.settings import Settings

# Counts with many divisors: replicas can share them evenly. Never fewer than the topic table has.
_PARTITIONS = (12, 24, 60, 120, 360)
# Partitions can be added, but then keys move to others: begin with room for twice the rate.
_GROWTH = 2.0
_PER_SECOND = {"s": 1.0, "m": 60.0, "h": 3600.0}

Policy = Literal["deadline", "lag"]


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` gives."""

    partitions: int
    useful_replicas: tuple[int, ...]
    replicas: int
    min_replicas: int
    max_replicas: int
    lag_threshold: int
    #: Pods that are ordered when work arrives can do it within the deadline.
    starts_in_time: bool
    dead_seconds: float
    gpu_hours_per_million: float
    cost_per_million: float
    manifest: dict[str, Any]


def parse_rate(text: str) -> float:
    """Read images per second: 50/s, 3000/m, 50.

    Raises:
        ValueError: It is none; the message says what is.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?:/([smh]))?", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no rate such as 50/s, 3000/m or 0.5/s")
    return float(match[1]) / _PER_SECOND[match[2] or "s"]


def plan(rate: float, facts: policies.Facts, policy: Policy, price_per_hour: float) -> Planned:
    """Work out everything for `rate` images/s; partitions are chosen here.

    Raises:
        ConfigurationError: no number of partitions carries the rate.
    """
    pods = rate / facts.pod_images_per_second
    partitions = next((count for count in _PARTITIONS if count >= pods * _GROWTH), None)
    if partitions is None:
        most = int(_PARTITIONS[-1] / _GROWTH * facts.pod_images_per_second)
        raise ConfigurationError(
            f"{rate:g} images/s need more than {_PARTITIONS[-1]} partitions; {most} are planned for"
        )
    facts = replace(facts, partitions=partitions)
    counts = useful_counts(partitions)
    wanted = pods * (1.0 if facts.can_wait else policies.HEADROOM)
    replicas = next(count for count in counts if partitions / math.ceil(partitions / count) >= wanted)
    scaled: ScaledObject = policies.deadline(facts) if policy == "deadline" else policies.lag(facts)
    hours = replicas * 1e6 / rate / 3600
    return Planned(
        partitions=partitions,
        useful_replicas=counts,
        replicas=replicas,
        min_replicas=scaled.min_replicas,
        max_replicas=scaled.max_replicas,
        lag_threshold=facts.lag_threshold,
        starts_in_time=facts.can_wait,
        dead_seconds=round(facts.dead_seconds, 1),
        gpu_hours_per_million=round(hours, 2),
        cost_per_million=round(hours * price_per_hour, 2),
        manifest=scaled.manifest(),
    )


def remarks(found: Planned, rate: float, facts: policies.Facts, price: str = "") -> list[str]:
    """Put a plan in words; `price` says what an hour of a GPU costs, with its currency."""
    counts = ", ".join(map(str, found.useful_replicas))
    replicas = counted(found.replicas, "replica")
    lines = [
        f"{found.partitions} partitions in each lane; replicas share them evenly at {counts}",
        f"{replicas} for {rate:g} images/s; {found.min_replicas} to {found.max_replicas} in all",
        f"lagThreshold {found.lag_threshold}: what one replica works off in half the deadline",
        f"for a million images at this rate {found.gpu_hours_per_million:g} GPU hours"
        + (f", {found.cost_per_million:.2f} at {price} an hour" if price else ""),
    ]
    if found.starts_in_time:
        lines.append(
            f"new pods work {found.dead_seconds:g} s after a rise of arrivals at most, within the deadline"
        )
    else:
        lines.append(
            f"new pods work {found.dead_seconds:g} s after a rise of arrivals, past the deadline of "
            f"{facts.deadline_seconds:g} s: {policies.HEADROOM:g} times what arrives is kept ready, and what rises "
            "faster is late"
        )
    return lines


def show_plan(
    settings: Settings,
    rate: float,
    facts: policies.Facts,
    policy: Policy,
    price_per_hour: float,
    *,
    as_json: bool,
) -> int:
    """Print a plan; return the exit code."""
    facts = replace(facts, topic_prefix=settings.topic_prefix)
    found = plan(rate, facts, policy, price_per_hour)
    if as_json:
        emit(found)
        return 0
    for line in remarks(found, rate, facts, f"{price_per_hour:g} {settings.currency}"):
        show(f"# {line}")
    show(yaml.safe_dump(found.manifest, sort_keys=False, width=10_000).rstrip())
    return 0
