"""When to cut a batch and of what; pure, the caller passes the clock and says what is coming.

The policy, for a device that is free:

1. Real-time first, except that bulk has one of every `BULK_EVERY` turns while it waits. A batch is never of
   both lanes: padding a real-time batch with bulk work would make it longer.
2. First in, first out within a lane. A record that cannot be done by its deadline is handed back.
3. As many as are ready, up to the limits of count and of bytes, and no more than the nearest deadline allows. While
   real-time records come, a bulk batch is as short as costs its records a tenth more: it is what they wait for.
4. Less than a full batch goes at once, unless waiting pays: when what is being decoded will fill the batch, or
   when the pass that the next record would otherwise need costs more than the time that all of them lose. The
   device waits no longer for company than a full batch takes, nor past the moment when a deadline needs it.

Costs are learned (`pipeline/cost_model.py`); until then nothing waits.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from pipeline.cost_model import CostModel
from pipeline.topics import Lane

#: Why a batch was cut: a limit was reached (`full`; `memory` when memory had lowered it or its bytes are the
#: limit; `realtime` when bulk is kept short for real-time), the device was free and waiting would not have paid
#: (`idle`), a deadline or the wait for company was up (`deadline`), or the worker is stopping (`drain`).
CutReason = Literal["full", "idle", "deadline", "drain", "memory", "realtime"]

# Bulk's floor: one turn in eight. It costs real-time at most an eighth of the device and a wait of one batch;
# a floor by time would let one slow batch starve the other lane.
BULK_EVERY = 8
# After a real-time record more are expected for so long, and bulk batches are kept short: as short as costs a
# record no more than this, of what it costs in a full batch. In quarters of one: costs do not see all of it, and
# oneDNN makes code for each size.
REALTIME_COMES_SECONDS = 10.0
SHORT_COSTS = 1.1
STEPS_OF_FULL = 4
# A limit lowered by memory is tried a quarter higher after this many batches that filled it: seldom enough
# that running out again costs under 2 % of the work.
GROW_AFTER_BATCHES = 64
# Of the records that would be late by what passes are believed to cost, one in so many is tried all the same: a
# belief that was never put to the test could refuse work for ever.
TRY_EVERY = 8

T = TypeVar("T")


class Turns:
    """Whose turn it is when both lanes wait: real-time's, save every `BULK_EVERY`-th."""

    def __init__(self) -> None:
        self._passed_over = 0

    def peek(self, *, realtime: bool, bulk: bool) -> Lane | None:
        """Return the lane that goes next of those that wait."""
        if not realtime and not bulk:
            return None
        return "bulk" if bulk and (not realtime or self._passed_over >= BULK_EVERY - 1) else "realtime"

    def next(self, *, realtime: bool, bulk: bool) -> Lane | None:
        """Return the lane that goes next of those that wait, and count its turn."""
        lane = self.peek(realtime=realtime, bulk=bulk)
        if lane is not None:
            self._passed_over = self._passed_over + 1 if lane == "realtime" and bulk else 0
        return lane


@dataclass(frozen=True, slots=True)
class Coming:
    """Records that are being decoded, by lane, and how often one becomes ready."""

    records: Mapping[Lane, int] = field(default_factory=dict)
    seconds_each: float = 0.0


@dataclass(frozen=True, slots=True)
class Cut(Generic[T]):
    """One batch of one lane and why it was cut there, with the records found too late on the way.

    Without items and with `wait_until`, nothing is cut now: ask again when a record becomes ready, or then.
    """

    items: list[T]
    expired: list[T]
    reason: CutReason
    wait_until: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Ready(Generic[T]):
    item: T
    deadline: float | None
    size_bytes: int


class Batcher(Generic[T]):
    """Ready records by lane, and the limits of a batch."""

    def __init__(
        self, max_batch_size: int, max_batch_bytes: int | None = None, costs: CostModel | None = None
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_batch_bytes = max_batch_bytes
        self.costs = costs or CostModel()
        self._limit = max_batch_size
        self._filled = 0
        self._turns = Turns()
        self._realtime_comes_until = float("-inf")
        self._waiting_since: float | None = None
        self._presumed_late = 0
        self._ready: dict[Lane, deque[_Ready[T]]] = {"realtime": deque(), "bulk": deque()}

    def __len__(self) -> int:
        """Count the records that wait."""
        return len(self._ready["realtime"]) + len(self._ready["bulk"])

    @property
    def limit(self) -> int:
        """Most records in the next batch."""
        return self._limit

    def add(self, item: T, lane: Lane, deadline: float | None = None, size_bytes: int = 0) -> None:
        """Queue a record that is ready; `deadline` is on the clock that `cut` gets."""
        self._ready[lane].append(_Ready(item, deadline, size_bytes))

    def cut(self, now: float, coming: Coming = Coming(), *, draining: bool = False) -> Cut[T]:
        """Take the next batch for a device that is free, or say until when waiting pays."""
        expired = [*self._take_late("realtime", now), *self._take_late("bulk", now)]
        waiting = {"realtime": bool(self._ready["realtime"]), "bulk": bool(self._ready["bulk"])}
        lane = self._turns.peek(**waiting)
        if lane is None:
            self._waiting_since = None
            return Cut([], expired, "idle")
        if waiting["realtime"]:
            self._realtime_comes_until = now + REALTIME_COMES_SECONDS
        most = self._limit if lane == "realtime" else self._most_of_bulk(now)
        count, reason = self._count(self._ready[lane], now, most)
        if reason is None:
            until = None if draining else self._wait_until(lane, count, most, now, coming)
            if until is not None and now < until:
                return Cut([], expired, "idle", until)
            reason = "drain" if draining else "deadline" if until is not None else "idle"
        self._waiting_since = None
        self._turns.next(**waiting)
        queue = self._ready[lane]
        return Cut([queue.popleft().item for _ in range(count)], expired, reason)

    def ran_out_of_memory(self, size: int) -> None:
        """Lower the limit after a batch of `size` did not fit."""
        self._limit = max(1, min(self._limit, size // 2))
        self._filled = 0

    def fitted(self, size: int) -> None:
        """Count a batch that fitted; raises a lowered limit again in time."""
        if self._limit == self._max_batch_size or size < self._limit:
            return
        self._filled += 1
        if self._filled >= GROW_AFTER_BATCHES:
            self._filled = 0
            self._limit = min(self._max_batch_size, self._limit + max(1, self._limit // 4))

    def _most_of_bulk(self, now: float) -> int:
        """Return how many bulk records may go together: fewer while real-time ones come."""
        costs, limit = self.costs, self._limit
        if now >= self._realtime_comes_until or not costs.pass_seconds:
            return limit
        spare_seconds = SHORT_COSTS * costs.seconds(limit) / limit - costs.record_seconds
        quarter = max(1, limit // STEPS_OF_FULL)
        return min(limit, quarter * math.ceil(costs.pass_seconds / spare_seconds / quarter))

    def _count(self, queue: deque[_Ready[T]], now: float, most: int) -> tuple[int, CutReason | None]:
        """Return how many of a lane go together, and which limit says so; at least one."""
        count = size_bytes = 0
        nearest: float | None = None
        for ready in queue:
            if count == most:
                break
            size_bytes += ready.size_bytes
            if count and self._max_batch_bytes is not None and size_bytes > self._max_batch_bytes:
                return count, "memory"
            if ready.deadline is not None:
                nearest = ready.deadline if nearest is None else min(nearest, ready.deadline)
            if count and nearest is not None and now + self.costs.seconds(count + 1) > nearest:
                return count, "deadline"
            count += 1
        if count < most:
            return count, None
        if most < self._limit:
            return count, "realtime"
        return count, "full" if self._limit == self._max_batch_size else "memory"

    def _wait_until(self, lane: Lane, count: int, most: int, now: float, coming: Coming) -> float | None:
        """Return until when it pays to wait for company; None if it does not."""
        next_ones = coming.records.get(lane, 0)
        costs, each = self.costs, coming.seconds_each
        if not next_ones or not costs.seconds(most):
            return None
        fills = count + next_ones >= most
        pays = costs.pass_seconds > each + count * (each + costs.record_seconds)
        if not fills and not pays:
            return None
        if self._waiting_since is None:
            self._waiting_since = now
        until = self._waiting_since + costs.seconds(most)
        for ready in self._ready[lane]:
            if ready.deadline is not None:
                until = min(until, ready.deadline - costs.seconds(count + 1))
        return until

    def _take_late(self, lane: Lane, now: float) -> list[T]:
        """Take the records out that would be late even alone, so that they cost the lane no turn."""
        queue = self._ready[lane]
        late = [ready for ready in queue if ready.deadline is not None and self._is_late(ready.deadline, now)]
        if late:
            self._ready[lane] = deque(ready for ready in queue if ready not in late)
        return [ready.item for ready in late]

    def _is_late(self, deadline: float, now: float) -> bool:
        if deadline <= now:
            return True
        if deadline > now + self.costs.seconds(1):
            return False
        self._presumed_late += 1
        return self._presumed_late % TRY_EVERY != 0
