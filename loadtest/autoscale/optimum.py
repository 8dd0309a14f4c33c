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
_KEPT_SECONDS = 600
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


def unforeseeable(trace: Trace, pods: Pods, deadline_seconds: float, most_pod_seconds: float) -> float:
    """Return the least share of late records for `most_pod_seconds`, if no rise is known before it comes.

    Of a family that is better than a real policy can be: it never has fewer pods than a floor (0, 1, 2, ...), sees
    arrivals at once, has what they need `start_seconds` later and keeps it for ten minutes, works off at once what
    waited till then, and pays only for the floor or the work, whichever is more. Keys are spread evenly.
    """
    rates = trace.rates / pods.images_per_second
    padded = np.concatenate([np.full(_KEPT_SECONDS + int(pods.start_seconds), rates[0]), rates])
    recent = np.lib.stride_tricks.sliding_window_view(padded, _KEPT_SECONDS + 1).max(axis=1)[: len(rates)]
    late = []
    for floor in range(trace.partitions + 1):
        if np.maximum(floor, rates).sum() <= most_pod_seconds:
            missing = np.clip(rates - np.maximum(np.ceil(recent), floor), 0.0, None)
            # In time is what arrives so shortly before the pods do.
            short = np.append(missing > 0, np.zeros(int(deadline_seconds), dtype=bool))
            still = np.lib.stride_tricks.sliding_window_view(short, int(deadline_seconds) + 1).all(axis=1)
            late.append(float(missing[still].sum() / rates.sum()))
    return min(late, default=1.0)
