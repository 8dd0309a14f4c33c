"""When to cut a batch and of what; pure, the caller passes the clock.

The policy: the device takes what is ready the moment it is free, up to the limit, so that under light load
no record waits for company and under heavy load batches fill by themselves. Real-time first; a real-time
batch is never padded with bulk work, which would make it longer. While bulk work waits, at least one of
every `BULK_EVERY` batches is bulk's. First in, first out within a lane. A record past its deadline is
handed back instead of dispatched.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pipeline.topics import Lane

#: Why a batch was cut: the limit was reached (`full`; `memory` when memory had lowered it), the device was
#: free (`idle`), or the worker is stopping (`drain`). `deadline` is for a policy that waits for company.
CutReason = Literal["full", "idle", "deadline", "drain", "memory"]

# Bulk's floor: one turn in eight. It costs real-time at most an eighth of the device and a wait of one batch;
# a floor by time would let one slow batch starve the other lane.
BULK_EVERY = 8
# A limit lowered by memory is tried a quarter higher after this many batches that filled it: seldom enough
# that running out again costs under 2 % of the work.
GROW_AFTER_BATCHES = 64

T = TypeVar("T")


class Turns:
    """Whose turn it is when both lanes wait: real-time's, save every `BULK_EVERY`-th."""

    def __init__(self) -> None:
        self._passed_over = 0

    def next(self, *, realtime: bool, bulk: bool) -> Lane | None:
        """Return the lane that goes next of those that wait, and count its turn."""
        if not realtime and not bulk:
            return None
        if bulk and (not realtime or self._passed_over >= BULK_EVERY - 1):
            self._passed_over = 0
            return "bulk"
        self._passed_over = self._passed_over + 1 if bulk else 0
        return "realtime"


@dataclass(frozen=True, slots=True)
class Cut(Generic[T]):
    """One batch of one lane and why it was cut there, with the records found expired on the way."""

    items: list[T]
    expired: list[T]
    reason: CutReason


class Batcher(Generic[T]):
    """Ready records by lane, and the size limit of a batch."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._limit = max_batch_size
        self._filled = 0
        self._turns = Turns()
        self._ready: dict[Lane, deque[tuple[T, float | None]]] = {"realtime": deque(), "bulk": deque()}

    def __len__(self) -> int:
        """Count the records that wait."""
        return len(self._ready["realtime"]) + len(self._ready["bulk"])

    @property
    def limit(self) -> int:
        """Most records in the next batch."""
        return self._limit

    def add(self, item: T, lane: Lane, deadline: float | None = None) -> None:
        """Queue a record that is ready; `deadline` is on the clock that `cut` gets."""
        self._ready[lane].append((item, deadline))

    def cut(self, now: float, *, draining: bool = False) -> Cut[T]:
        """Take the next batch for a device that is free; no items when nothing is ready."""
        items: list[T] = []
        expired: list[T] = []
        for lane in ("realtime", "bulk"):
            self._drop_expired(self._ready[lane], now, expired)
        lane_next = self._turns.next(realtime=bool(self._ready["realtime"]), bulk=bool(self._ready["bulk"]))
        if lane_next is not None:
            queue = self._ready[lane_next]
            while queue and len(items) < self._limit:
                item, deadline = queue.popleft()
                (expired if deadline is not None and deadline <= now else items).append(item)
        return Cut(items, expired, self._reason(len(items), draining))

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

    def _reason(self, size: int, draining: bool) -> CutReason:
        if size == self._limit:
            return "full" if self._limit == self._max_batch_size else "memory"
        return "drain" if draining else "idle"

    @staticmethod
    def _drop_expired(queue: deque[tuple[T, float | None]], now: float, expired: list[T]) -> None:
        """Move expired records at the head of a lane out, so that they cost it no turn."""
        while queue:
            item, deadline = queue[0]
            if deadline is None or deadline > now:
                return
            expired.append(item)
            queue.popleft()
