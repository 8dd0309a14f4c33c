"""The cheapest that anyone could do who knows the arrivals, with the same start time, partitions and deadline.

Dynamic programming over (replicas, backlog) in ticks of 15 s. Kept: a pod costs from its order on and serves only
`start_seconds` later; replicas that share partitions unevenly do no more than their busiest one; no record waits
longer than the deadline; nothing is served before it has arrived. Left out, which makes it cheaper than what is
possible: rebalances, noise, drains, waits for a batch, and records within a tick. Where keys are spread evenly a
ratio to it is therefore never too low. Where they are not, it lets all partitions wait alike, and takes the counts
that share partitions evenly (`any_count` others, some of which happen to suit an assignment).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loadtest.autoscale.cluster import Pods, assignment
from loadtest.autoscale.traces import Trace

TICK_SECONDS = 15
#: Work is counted in so many parts of what one pod does in a tick.
_UNITS = 16
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def useful_counts(partitions: int) -> tuple[int, ...]:
    """Return the replica counts whose busiest replica has fewer partitions than with one replica less."""
    busiest = {count: math.ceil(partitions / count) for count in range(1, partitions + 1)}
    return tuple(count for count, most in busiest.items() if count == 1 or most < busiest[count - 1])


def capacities(counts: Sequence[int], weights: Floats) -> list[float]:
    """Return how many pods' worth of evenly growing load each count of replicas can carry.

    The busiest replica limits it, under the assignment that the group makes.
    """
    partitions = len(weights)
    return [1.0 / np.bincount(assignment(partitions, count), weights).max() for count in counts]


def optimum(
    trace: Trace, pods: Pods, deadline_seconds: float, *, min_replicas: int = 0, any_count: bool = False
) -> float:
    """Return the fewest pod-seconds in which no record is late; infinite if there is no way."""
    per_tick = pods.images_per_second * TICK_SECONDS
    unit = per_tick / _UNITS
    allowed = int(deadline_seconds // TICK_SECONDS)
    totals = np.concatenate([[0.0], np.cumsum(trace.arrivals.sum(axis=(1, 2)))])
    ends = totals[np.minimum(np.arange(0, trace.seconds + TICK_SECONDS, TICK_SECONDS), trace.seconds)]
    # Arrivals are rounded up and what is due is rounded down: both make it easier.
    arrived = np.ceil(ends / unit).astype(np.int64)
    due = np.zeros_like(arrived)
    due[allowed:] = np.floor(ends[: len(ends) - allowed] / unit).astype(np.int64)
    counts = [0, *(range(1, trace.partitions + 1) if any_count else useful_counts(trace.partitions))]
    limits = [0.0, *capacities(counts[1:], trace.weights)]
    # Rounded up, which makes it easier; what is whole but for the last bit of a float stays what it is.
    served = [math.ceil(limit * _UNITS - 1e-6) for limit in limits]
    keep = [index for index, count in enumerate(counts) if count >= min_replicas]
    return _cheapest([counts[i] for i in keep], [served[i] for i in keep], arrived, due, pods.start_seconds)


def _cheapest(counts: list[int], served: list[int], arrived: Ints, due: Ints, start_seconds: float) -> float:
    """Return the least cost over all ways: `best[i, b]` is that of having counts[i] and b units waiting."""
    size = int((arrived - due).max()) + 1
    best = np.full((len(counts), size), np.inf)
    # The first pods are there at the beginning, as they are for the policies.
    best[:, 0] = 0.0
    orders = np.array([[max(0, b - a) * start_seconds for a in counts] for b in counts])  # (to, from)
    running = np.array(counts) * float(TICK_SECONDS)
    for tick in range(1, len(arrived)):
        came = int(arrived[tick] - arrived[tick - 1])
        most = int(arrived[tick] - due[tick])
        following = np.full_like(best, np.inf)
        for to in range(len(counts)):
            # (from, b) -> b: the cheapest way to have this count now.
            reached = (best + orders[to][:, None]).min(axis=0) + running[to]
            shift = came - served[to]
            room = following[to]
            if shift >= 0:
                room[shift:] = reached[: size - shift] if shift < size else room[shift:]
            else:
                room[: size + shift] = reached[-shift:] if -shift < size else room[: size + shift]
                room[0] = min(room[0], reached[: min(size, 1 - shift)].min())
            room[most + 1 :] = np.inf
        best = following
    return float(best.min())


def unforeseeable(trace: Trace, pods: Pods, deadline_seconds: float, margin: float) -> float:
    """Return the share of records that are late under one who cannot know of a rise before it comes.

    It holds `margin` times what the most of the last ten minutes needed, sees arrivals at once, and has what it
    orders `start_seconds` later; no rebalances, no noise, keys spread evenly. Whoever holds no more than that and
    does not know the future does no better.
    """
    rates = trace.rates / pods.images_per_second
    levels = np.array([0, *useful_counts(trace.partitions)])
    recent = np.array([rates[max(0, at - 600) : at + 1].max() for at in range(trace.seconds)])
    held = levels[np.minimum(np.searchsorted(levels, margin * recent), len(levels) - 1)]
    delay = int(pods.start_seconds)
    capacity = np.concatenate([np.full(delay, held[0]), held[: len(held) - delay]]) * pods.images_per_second
    arrived = np.cumsum(trace.rates)
    served = np.zeros(trace.seconds)
    done = 0.0
    for at in range(trace.seconds):
        done = served[at] = min(arrived[at], done + capacity[at])
    allowed = int(deadline_seconds)
    judged = trace.seconds - allowed
    late = np.clip(arrived[:judged] - served[allowed:], 0.0, trace.rates[:judged]).sum()
    return float(late / trace.rates.sum())
