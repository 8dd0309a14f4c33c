"""Numbers of every GPU over a window, from its samples in whatever order they came.

Samples are kept as columns until the window closes, then sorted by GPU and time: order of arrival and repeats
change nothing, not even the last digit of a mean. A field that was not measured is NaN here, absent elsewhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.detection.plan import Plan

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples with the same fields: rows of GPUs, times in microseconds, columns of the plan."""

    rows: Integers  # (n,)
    times: Integers  # (n,)
    columns: Integers  # (k,)
    values: Floats  # (n, k)


@dataclass
class Aggregates:
    """Of N GPUs, all of the plan's F columns; NaN where nothing was measured."""

    samples: Integers  # (N,)
    last_time: Integers  # (N,) of the last sample; -1 without
    count: Integers  # (N, F)
    minimum: Floats  # (N, F); of a counter its first value
    maximum: Floats  # (N, F); of a counter its last value
    mean: Floats  # (N, F)
    last: Floats  # (N, F)
    increase: Floats  # (N, C) of the counters, resets counted as such
    share: Floats  # (N, M) of samples with any bit of a mask
    #: (row, time, code) where the last XID became another one.
    xid_changes: list[tuple[int, int, int]] = field(default_factory=list)


def aggregate(
    plan: Plan, count: int, chunks: Sequence[Chunk], carried: Floats, known: NDArray[np.bool_]
) -> Aggregates:
    """Aggregate the chunks of `count` GPUs.

    Args:
        plan: What the columns mean.
        count: How many GPUs there are.
        chunks: Their samples.
        carried: (count, K) the last value of what is carried.
        known: (count,) which had samples before, and not only in the window before this one.
    """
    found = _empty(plan, count)
    if not chunks:
        return found
    rows, times, columns, values = _gather(chunks, len(plan.columns))
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    ends = np.r_[starts[1:], len(rows)] - 1
    gpus = rows[starts]
    found.samples[gpus] = ends - starts + 1
    found.last_time[gpus] = times[ends]
    if not len(columns):
        return found
    valid = ~np.isnan(values)
    where = np.ix_(gpus, columns)
    number = np.add.reduceat(valid, starts, axis=0, dtype=np.int64)
    found.count[where] = number
    with np.errstate(invalid="ignore"):
        total = np.add.reduceat(np.where(valid, values, 0.0), starts, axis=0)
        found.mean[where] = total / np.where(number, number, np.nan)
    found.minimum[where] = np.fmin.reduceat(values, starts, axis=0)
    found.maximum[where] = np.fmax.reduceat(values, starts, axis=0)
    last = _edge(values, valid, starts, ends, last=True)
    found.last[where] = last
    _add_shares(plan, found, gpus, columns, values, valid, starts)
    _add_carried(plan, found, _Sorted(gpus, columns, values, valid, starts, ends, times), carried, known)
    return found


@dataclass(frozen=True, slots=True)
class _Sorted:
    gpus: Integers
    columns: Integers
    values: Floats
    valid: NDArray[np.bool_]
    starts: Integers
    ends: Integers
    times: Integers


def _empty(plan: Plan, count: int) -> Aggregates:
    def missing(width: int) -> Floats:
        return np.full((count, width), np.nan)

    width = len(plan.columns)
    return Aggregates(
        np.zeros(count, np.int64), np.full(count, -1, np.int64), np.zeros((count, width), np.int64),
        missing(width), missing(width), missing(width), missing(width), missing(len(plan.counters)),
        missing(len(plan.masks)),
    )  # fmt: skip


def _gather(chunks: Iterable[Chunk], width: int) -> tuple[Integers, Integers, Integers, Floats]:
    """Sort all samples by GPU and time, one for each moment; columns are those that any of them has."""
    chunks = list(chunks)
    used = np.zeros(width, np.bool_)
    for chunk in chunks:
        used[chunk.columns] = True
    columns = np.flatnonzero(used)
    place = np.cumsum(used) - 1
    rows = np.concatenate([chunk.rows for chunk in chunks])
    times = np.concatenate([chunk.times for chunk in chunks])
    values = np.full((len(rows), len(columns)), np.nan)
    at = 0
    for chunk in chunks:
        n = len(chunk.rows)
        values[at : at + n, place[chunk.columns]] = chunk.values
        at += n
    order = np.lexsort((times, rows))
    rows, times, values = rows[order], times[order], values[order]
    first = np.r_[True, (rows[1:] != rows[:-1]) | (times[1:] != times[:-1])]
    if not first.all():
        # Repeats, or one moment told in several samples; the larger one where they disagree, whichever came first.
        values = np.fmax.reduceat(values, np.flatnonzero(first), axis=0)
        rows, times = rows[first], times[first]
    return rows, times, columns, values


def _edge(
    values: Floats, valid: NDArray[np.bool_], starts: Integers, ends: Integers, *, last: bool
) -> Floats:
    """Return each GPU's first or last value that was measured, (n, k)."""
    edge = ends if last else starts
    if valid[edge].all():
        return values[edge]
    numbers = np.arange(len(values))[:, None]
    if last:
        place = np.maximum.reduceat(np.where(valid, numbers, -1), starts, axis=0)
    else:
        place = np.minimum.reduceat(np.where(valid, numbers, len(values)), starts, axis=0)
    known = (place >= 0) & (place < len(values))
    taken = np.take_along_axis(values, np.where(known, place, 0), axis=0)
    return np.where(known, taken, np.nan)


def _add_shares(
    plan: Plan, found: Aggregates, gpus: Integers, columns: Integers, values: Floats,
    valid: NDArray[np.bool_], starts: Integers,
) -> None:  # fmt: skip
    reasons = plan.column["clock_event_reasons"]
    at = np.flatnonzero(columns == reasons)
    if not len(at):
        return
    known = valid[:, at[0]]
    bits = np.where(known, values[:, at[0]], 0.0).astype(np.int64)
    number = np.add.reduceat(known, starts, dtype=np.int64)
    for index, mask in enumerate(plan.masks):
        held = np.add.reduceat((bits & mask) != 0, starts, dtype=np.int64)
        found.share[gpus, index] = held / np.where(number, number, np.nan)


def _add_carried(
    plan: Plan, found: Aggregates, given: _Sorted, carried: Floats, known_before: NDArray[np.bool_]
) -> None:
    """Count increases from the last value before the window on; a counter that fell began again at zero."""
    wanted = plan.columns_of(plan.carried)
    kept = [(index, np.flatnonzero(given.columns == column)) for index, column in enumerate(wanted)]
    present = [(index, int(at[0])) for index, at in kept if len(at)]
    if not present:
        return
    indices = np.array([index for index, _ in present])
    places = np.array([at for _, at in present])
    values, valid = given.values[:, places], given.valid[:, places]
    previous = _previous(values, valid, given.starts, carried[given.gpus][:, indices])
    with np.errstate(invalid="ignore"):
        step = np.where(values >= previous, values - previous, values)
        changed = values != previous
    step = np.where(valid & ~np.isnan(previous), step, 0.0)
    increase = np.add.reduceat(step, given.starts, axis=0)
    any_valid = np.logical_or.reduceat(valid, given.starts, axis=0)
    first = _edge(values, valid, given.starts, given.ends, last=False)
    xid = len(plan.counters)
    for column, index in enumerate(indices):
        if index == xid:
            first_ever = np.isnan(previous[:, column])
            events = changed[:, column] & valid[:, column] & ~first_ever
            events |= _late_firsts(given, values[:, column], first_ever, known_before)
            _add_xids(found, given, values[:, column], events)
            continue
        known = any_valid[:, column]
        found.increase[given.gpus[known], index] = increase[known, column]
        place = wanted[index]
        found.minimum[given.gpus, place] = first[:, column]
        found.maximum[given.gpus, place] = found.last[given.gpus, place]


def _previous(values: Floats, valid: NDArray[np.bool_], starts: Integers, carried: Floats) -> Floats:
    """Return, for each value, the one measured before it, of the GPU's last window if there is none in this."""
    numbers = np.arange(len(values))[:, None]
    latest = np.maximum.accumulate(np.where(valid, numbers, -1), axis=0)
    before = np.vstack([np.full((1, values.shape[1]), -1), latest[:-1]])
    sizes = np.diff(np.r_[starts, len(values)])
    segment = np.repeat(starts, sizes)[:, None]
    inside = before >= segment
    earlier = np.take_along_axis(values, np.where(inside, before, 0), axis=0)
    return np.where(inside, earlier, np.repeat(carried, sizes, axis=0))


def _late_firsts(
    given: _Sorted, codes: Floats, first_ever: NDArray[np.bool_], known: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Say which first XIDs of a GPU are news: those of one that was sampled before without the field.

    Some exporters show the gauge only once there was an error. Parts of one scrape may have moments of their own,
    so that a scrape is known to be over when a field of it comes again, or after the next window's end.
    """
    news = np.zeros(len(codes), np.bool_)
    segment = np.repeat(np.arange(len(given.starts)), np.diff(np.r_[given.starts, len(codes)]))
    for place in np.flatnonzero(first_ever & (codes > 0)):
        gpu = segment[place]
        if not np.isnan(codes[given.starts[gpu] : place]).all():
            continue
        before = given.valid[given.starts[gpu] : place + 1].sum(axis=0)
        news[place] = known[given.gpus[gpu]] or (before > 1).any()
    return news


def _add_xids(found: Aggregates, given: _Sorted, codes: Floats, events: NDArray[np.bool_]) -> None:
    rows = np.repeat(given.gpus, np.diff(np.r_[given.starts, len(codes)]))
    for place in np.flatnonzero(events):
        if codes[place] > 0:
            found.xid_changes.append((int(rows[place]), int(given.times[place]), int(codes[place])))
