"""What waits for a step: two lanes, and suspects that are read alone.

Real-time goes first and bulk never starves. A suspect (see `careful.py`) starts only with nothing else in
flight, and the rest of its partition waits behind it; suspects and healthy records of other partitions take
turns by time. Not thread-safe.
"""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Collection

from agents.careful import CAREFUL_TURN_SECONDS, HEALTHY_TURN_SECONDS
from agents.ownership import Delivered, Partition, State
from pipeline.topics import LANES, Lane

# One take in eight begins with the bulk lane, so that a full real-time lane never starves it.
BULK_TURN = 8


class Inbox:
    """Records between Kafka and the step."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[Delivered]] = {lane: deque() for lane in LANES}
        # By distance from the partition's start: what killed the last owner is near the head of its partition.
        self._suspects: list[tuple[int, int, Delivered]] = []
        self._order = itertools.count()
        self._alone: Delivered | None = None
        self._in_flight = 0
        self._takes = 0
        self._is_suspects_turn = False
        self._turn_ends = 0.0

    def add(self, delivered: Delivered) -> None:
        """Queue a record."""
        partition, offset = delivered.partition, delivered.record.offset
        if partition.mark.suspects(offset):
            partition.open_suspects += 1
            heapq.heappush(self._suspects, (offset - partition.mark.first, next(self._order), delivered))
        elif partition.open_suspects:
            partition.behind_suspects.append(delivered)
        else:
            self._lanes[delivered.lane].append(delivered)

    def put_back(self, delivered: Delivered) -> None:
        """Queue a taken record again, before the younger ones of its partition.

        One that is done before its elders is done again by the partition's next owner.
        """
        self._in_flight -= 1
        if self._alone is delivered:
            self._alone = None
            delivered.partition.open_suspects -= 1
            self.add(delivered)
        else:
            waiting, offset = self._lanes[delivered.lane], delivered.record.offset
            elders = [
                place
                for place, other in enumerate(waiting)
                if other.partition is delivered.partition and other.record.offset < offset
            ]
            waiting.insert(elders[-1] + 1 if elders else 0, delivered)

    def pick(
        self, max_records: int, max_bytes: int, lanes: Collection[Lane] = LANES.keys()
    ) -> list[Delivered]:
        """Take healthy records of these lanes, at least one if any may start now."""
        if self._alone is not None or self._suspects_wait():
            return []  # let what is in flight finish: a suspect must be alone
        self._takes += 1
        order: list[Lane] = ["realtime", "bulk"]
        if self._takes % BULK_TURN == 0:
            order.reverse()
        order = [lane for lane in order if lane in lanes]
        batch: list[Delivered] = []
        size_bytes = 0
        for lane in order:
            waiting = self._lanes[lane]
            while waiting and len(batch) < max_records:
                if batch and size_bytes + waiting[0].size_bytes > max_bytes:
                    return batch
                delivered = waiting.popleft()
                size_bytes += delivered.size_bytes
                self._start(delivered)
                batch.append(delivered)
        return batch

    def turn_seconds(self) -> float | None:
        """Return how long the suspects' turn lasts while healthy records wait for it to end, else None."""
        if self._alone is not None or not self._suspects or not any(self._lanes.values()):
            return None
        return max(0.0, self._turn_ends - time.monotonic())

    def next_suspect(self) -> Delivered | None:
        """Return the suspect that may start now, without taking it."""
        return self._suspects[0][2] if self._suspects and not self._in_flight else None

    def start_alone(self, delivered: Delivered) -> None:
        """Take the suspect that `next_suspect` returned; nothing else starts until it has ended."""
        heapq.heappop(self._suspects)
        self._start(delivered)
        self._alone = delivered

    def finished(self, delivered: Delivered) -> None:
        """Note that a record in flight has ended or is held; without suspects left a partition is read normally."""
        self._in_flight -= 1
        if self._alone is not delivered:
            return
        self._alone = None
        partition = delivered.partition
        partition.open_suspects -= 1
        if not partition.open_suspects:
            self._lanes[delivered.lane].extend(partition.behind_suspects)
            partition.behind_suspects.clear()

    def forget(self, partitions: Collection[Partition]) -> int:
        """Drop what these partitions have waiting or taken and not claimed; return how many."""
        forgotten = 0
        for lane, waiting in self._lanes.items():
            kept = deque(delivered for delivered in waiting if delivered.partition not in partitions)
            forgotten += len(waiting) - len(kept)
            self._lanes[lane] = kept
        suspects = [entry for entry in self._suspects if entry[2].partition not in partitions]
        forgotten += len(self._suspects) - len(suspects)
        heapq.heapify(suspects)
        self._suspects = suspects
        for partition in partitions:
            forgotten += len(partition.taken) + len(partition.behind_suspects)
            partition.behind_suspects.clear()
            for delivered in partition.taken:
                delivered.state = State.FORGOTTEN
                self._in_flight -= not delivered.is_buffered
                if self._alone is delivered:
                    self._alone = None
            partition.taken.clear()
        return forgotten

    def _start(self, delivered: Delivered) -> None:
        delivered.state = State.TAKEN
        delivered.partition.taken.add(delivered)
        self._in_flight += 1

    def _suspects_wait(self) -> bool:
        if not self._suspects:
            return False
        if not any(self._lanes.values()):
            return True
        now = time.monotonic()
        if now >= self._turn_ends:
            self._is_suspects_turn = not self._is_suspects_turn
            self._turn_ends = now + (CAREFUL_TURN_SECONDS if self._is_suspects_turn else HEALTHY_TURN_SECONDS)
        return self._is_suspects_turn
