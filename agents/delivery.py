"""Delivery: records from Kafka to a step, and offsets back, without losing or repeating one.

The rule: a record is finished only when everything it causes is durable, and offsets are committed only
up to the first record that is not finished. This module knows neither Faust nor aiokafka; `consumer.py`
is the bridge. Everything here runs on one event loop.

A record's way: `fetched` (the ledger opens it before any library can drop it) -> `received` (the agent
saw it) -> `take` (a step has it) -> `claim` (work with effects began) -> `finish`. A hand-over forgets
what is not claimed (the next owner fetches it again) and waits for the rest. A step that needs later records
before it can work on one holds it: `take` -> `buffer` -> `claim` -> `release` or `finish`.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

from agents.careful import Mark
from agents.commits import CommitResult, Commits, Committer
from agents.inbox import Inbox
from agents.ownership import Delivered, LaneBudget, Partition, Start, TopicPartition
from agents.suspects import Suspects
from pipeline import logs, metrics, topics
from pipeline.errors import FatalError, MillraceError
from pipeline.events import Record
from pipeline.topics import LANES, Lane

__all__ = ["CommitResult", "Committer", "Delivered", "Delivery", "Start", "TopicPartition"]

log = logs.get(__name__)


class Delivery:
    """All partitions one worker owns, and the queue its step takes records from."""

    def __init__(
        self,
        *,
        step: str,
        committer: Committer,
        reject: Callable[[Delivered, MillraceError], Awaitable[None]],
        max_open_records: int,
        max_open_bytes: int,
    ) -> None:
        self._step = step
        self._partitions: dict[TopicPartition, Partition] = {}
        self._commits = Commits(step, committer, self._partitions)
        self._lanes: dict[Lane, LaneBudget] = {
            lane: LaneBudget(lane, max_open_records, max_open_bytes) for lane in topics.LANES
        }
        self._inbox = Inbox()
        self._handing_over = 0
        self._stopped = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._gap = asyncio.Event()
        self._suspects = Suspects(
            step,
            self._partitions,
            self._inbox,
            self._commits,
            commit=self.commit,
            reject=reject,
            changed=self._changed.set,
        )
        self._topics_with_lag: set[str] = set()
        self.joined = False

    # What a step uses

    async def take(
        self, max_records: int, max_bytes: int, room: Callable[[], Collection[Lane]] = LANES.keys
    ) -> list[Delivered]:
        """Wait for records and take up to so many, real-time first; safe to cancel.

        One caller at a time. At least one record is returned however large it is. Healthy records are taken from
        the lanes in `room()` alone; `look_again` has it asked again.

        Raises:
            FatalError: a record that kills its worker could not be rejected.
        """
        while True:
            self._changed.clear()
            self._suspects.check()
            turn_seconds = None
            if not (self._stopped or self._handing_over) and not await self._suspects.pass_over():
                batch = self._inbox.pick(max_records, max_bytes, room())
                if batch:
                    return batch
                suspect = self._inbox.next_suspect()
                if suspect is not None and await self._suspects.begin(suspect, self._may_start):
                    return [suspect]
                turn_seconds = self._inbox.turn_seconds()
            with contextlib.suppress(TimeoutError):
                # What is in flight may never end: the suspects' turn must end without it.
                async with asyncio.timeout(turn_seconds):
                    await self._changed.wait()

    def look_again(self) -> None:
        """Have a `take` that waits ask for room again."""
        self._changed.set()

    # What the consumer uses

    def assigned(self, starts: Mapping[TopicPartition, Start], generation: int) -> None:
        """Take ownership of partitions, each with a new ledger; of none once stopped."""
        if self._stopped:
            return
        # An assignment is whole, so these were lost without a word: kept, they would hold their lane's budget,
        # and every commit would be refused for them.
        lost = list(self._partitions.values())
        self._close(lost)
        for partition in lost:
            self._drop(partition)
        for (topic, number), start in starts.items():
            partition = Partition(
                topic,
                number,
                generation,
                lane=self._lanes[topics.lane_of(topic)],
                mark=Mark.read(start.metadata, start.committed, start.end),
                committed=start.committed,
                first=start.first,
            )
            self._partitions[topic, number] = partition
            if start.committed is not None and start.committed < start.first:
                self._note_expired(partition, start.committed, start.first - start.committed)
        self.joined = True
        metrics.REBALANCES.labels(self._step, "assigned").inc()
        metrics.ASSIGNED_PARTITIONS.labels(self._step).set(len(self._partitions))
        self._changed.set()
        self._room.set()

    async def mark_started(self, starts: Mapping[TopicPartition, Start]) -> None:
        """Note in the commit metadata that an ownership began: if it ends without a trace, Kafka tells."""
        marks: dict[Partition, tuple[int, str]] = {}
        for place, start in starts.items():
            partition = self._partitions.get(place)
            if partition is not None:
                offset = start.beginning if start.committed is None else start.committed
                marks[partition] = (offset, partition.mark.at_start(offset))
        if await self._commits.mark(marks):
            for partition, (offset, _) in marks.items():
                partition.committed = offset

    def fetched(
        self, place: TopicPartition, generation: int, records: Sequence[Record], position: int | None
    ) -> list[Record]:
        """Open a fetch's records in the ledger and return the new ones; [] if the partition is not owned.

        `position` is the fetch position right after these records.

        Raises:
            FatalError: the log begins again below what was read of it.
        """
        partition = self._partitions.get(place)
        if partition is None or partition.generation != generation or partition.closing:
            return []
        expected = max(partition.first, partition.ledger.next_offset)
        found = records[0].offset if records else position
        if found is not None and found > expected:
            partition.gaps.append((expected, found))
            self._gap.set()
        if records and records[0].offset < expected:
            # Its offsets mean other records now; the next ownership asks Kafka anew where to begin.
            raise FatalError(
                f"{partition.topic}:{partition.number} goes on at offset {records[0].offset} after {expected}: "
                "the topic was deleted and created again, or its log was cut off"
            )
        new, size_bytes = [], 0
        for record in records:
            delivered = Delivered(partition, record, self)
            if partition.ledger.open(record.offset, delivered.size_bytes):
                partition.pending[record.offset] = delivered
                size_bytes += delivered.size_bytes
                new.append(record)
        if position is not None:
            partition.ledger.advance(position)
        partition.lane.add(len(new), size_bytes)
        if new:
            metrics.RECORDS_OPENED.labels(self._step, partition.lane.name).inc(len(new))
        return new

    def received(self, place: TopicPartition, generation: int, offset: int) -> None:
        """Queue what was fetched up to an offset, which came through the agent; ignored of an older ownership."""
        partition = self._partitions.get(place)
        if partition is None or partition.generation != generation:
            return
        now, pending = time.monotonic(), partition.pending
        while pending and (first := next(iter(pending))) <= offset:
            delivered = pending.pop(first)
            delivered.received_at = now
            self._inbox.add(delivered)
        self._changed.set()

    @property
    def open_records(self) -> int:
        """How many records were fetched and are neither finished nor held."""
        return sum(lane.open_records for lane in self._lanes.values())

    def fetchable(self, places: Iterable[TopicPartition]) -> set[TopicPartition]:
        """Return the partitions whose lane has room."""
        return {place for place in places if not self._lanes[topics.lane_of(place[0])].paused}

    async def wait_for_room(self, timeout_seconds: float) -> None:
        """Return when a paused lane may read on, or after the timeout."""
        self._room.clear()
        try:
            await asyncio.wait_for(self._room.wait(), timeout_seconds)
        except TimeoutError:
            return

    async def hand_over(self, places: Iterable[TopicPartition], *, deadline_seconds: float) -> None:
        """Give partitions up: forget what is not claimed, let the rest finish, commit, drop.

        What is still unfinished at the deadline is abandoned unacknowledged: its next owner repeats it.
        """
        partitions = [p for place in places if (p := self._partitions.get(place)) is not None]
        started = time.monotonic()
        self._handing_over += 1
        try:
            self._close(partitions)
            while any(partition.claimed for partition in partitions):
                remaining = started + deadline_seconds - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.clear()
                try:
                    # Not `wait_for`: it begins to wait a turn of the loop later, when `take` may have cleared it.
                    async with asyncio.timeout(remaining):
                        await self._changed.wait()
                except TimeoutError:
                    break
            for partition in partitions:
                if partition.attempting:
                    partition.mark = partition.mark.survived()
            await self.commit(clean=partitions)
        finally:
            for partition in partitions:
                self._drop(partition)
            self._handing_over -= 1
            self._changed.set()
        metrics.REBALANCES.labels(self._step, "revoked").inc()
        metrics.HANDOVER_SECONDS.labels(self._step).observe(time.monotonic() - started)
        metrics.ASSIGNED_PARTITIONS.labels(self._step).set(len(self._partitions))

    async def stop(self, *, deadline_seconds: float) -> None:
        """Hand everything over and hand out nothing more."""
        self._stopped = True
        await self.hand_over(list(self._partitions), deadline_seconds=deadline_seconds)

    async def commit(self, *, clean: Sequence[Partition] = ()) -> bool:
        """Commit what is finished; `clean` partitions lose their mark even if they did not move.

        False when the broker does not answer or the group has moved on; nothing is lost by that.
        """
        done = await self._commits.commit(clean)
        for lane in self._lanes.values():
            metrics.LEDGER_RECORDS.labels(self._step, lane.name).set(lane.open_records)
            metrics.LEDGER_BYTES.labels(self._step, lane.name).set(lane.open_bytes)
            metrics.LANE_PAUSED.labels(self._step, lane.name).set(lane.paused)
        return done

    def progress(self) -> dict[TopicPartition, int]:
        """Return, per owned partition, the offset up to which everything is finished, where known."""
        return {
            place: offset
            for place, partition in self._partitions.items()
            if (offset := partition.ledger.committable) is not None
        }

    def oldest_pending_seconds(self) -> float:
        """Return how long the oldest record has been on its way from the fetch to the agent: milliseconds."""
        firsts = [next(iter(p.pending.values())) for p in self._partitions.values() if p.pending]
        return time.monotonic() - min((d.received_at for d in firsts), default=time.monotonic())

    def ask_for_ends(self) -> None:
        """Have `observe_ends` called soon: a step wants to know whether it has read everything."""
        self._gap.set()

    async def wait_for_gap(self, timeout_seconds: float) -> None:
        """Return when fetching passed over offsets that `observe_ends` should explain, or after the timeout."""
        try:
            await asyncio.wait_for(self._gap.wait(), timeout_seconds)
        except TimeoutError:
            return

    def observe_ends(self, starts: Mapping[TopicPartition, Start]) -> None:
        """Compare progress with where the partitions begin and end now: lag, and what retention took.

        Fetching also passes over offsets that hold no record (transaction markers, compaction): of a gap only
        what lies below the partition's beginning was deleted unread.
        """
        self._gap.clear()
        # A topic of which nothing is owned any more is another worker's to count.
        lag = dict.fromkeys(self._topics_with_lag, 0)
        for place, start in starts.items():
            partition = self._partitions.get(place)
            if partition is None:
                continue
            for passed, found in partition.gaps:
                if passed < start.beginning:
                    self._note_expired(partition, passed, min(found, start.beginning) - passed)
            partition.gaps.clear()
            done = partition.ledger.committable
            if done is None:
                done = partition.first
            behind = max(0, start.end - max(done, start.beginning))
            partition.end, partition.end_seen_at = start.end, time.monotonic()
            lag[partition.topic] = lag.get(partition.topic, 0) + behind
        self._topics_with_lag = {topic for topic, _ in self._partitions}
        for topic, records in lag.items():
            metrics.LAG_RECORDS.labels(self._step, topic).set(records)

    # Inside

    def finished(self, delivered: Delivered, outcome: str) -> None:
        """See `Owner`."""
        partition = delivered.partition
        if not delivered.is_buffered:
            self._inbox.finished(delivered)
        self._changed.set()
        if not partition.live:
            return
        if not delivered.is_buffered:
            partition.attempting = False
        partition.ledger.finish(delivered.record.offset)
        if partition.uncommitted_since is None:
            partition.uncommitted_since = time.monotonic()
        metrics.RECORDS_FINISHED.labels(self._step, delivered.lane, outcome).inc()
        if delivered.record.timestamp_ms > 0:  # a producer may leave it out
            # Wall clocks of two machines: a publisher that is ahead is not in the future.
            age_seconds = max(0.0, time.time() - delivered.record.timestamp_ms / 1000)
            metrics.AGE_SECONDS.labels(self._step, delivered.lane).observe(age_seconds)
        if delivered.is_buffered:
            partition.buffered -= 1
            partition.buffered_bytes -= delivered.size_bytes
        else:
            self._make_room(partition.lane, -1, -delivered.size_bytes)

    def was_buffered(self, delivered: Delivered) -> None:
        """See `Owner`."""
        partition = delivered.partition
        self._suspects.settle(delivered)
        self._inbox.finished(delivered)
        partition.buffered += 1
        partition.buffered_bytes += delivered.size_bytes
        self._make_room(partition.lane, -1, -delivered.size_bytes)
        self._changed.set()

    def was_released(self, delivered: Delivered) -> None:
        """See `Owner`."""
        self._changed.set()

    def was_put_back(self, delivered: Delivered) -> None:
        """See `Owner`."""
        self._suspects.settle(delivered)
        self._inbox.put_back(delivered)
        self._changed.set()

    def _may_start(self) -> bool:
        return not self._handing_over

    def _close(self, partitions: Sequence[Partition]) -> None:
        """Let nothing new in and give back to Kafka what is not claimed."""
        for partition in partitions:
            partition.closing = True
            partition.pending.clear()
        metrics.RECORDS_FORGOTTEN.labels(self._step).inc(self._inbox.forget(partitions))

    def _drop(self, partition: Partition) -> None:
        if not partition.live:
            return
        partition.live = False
        metrics.RECORDS_ABANDONED.labels(self._step).inc(partition.claimed)
        if self._partitions.get(partition.place) is partition:
            del self._partitions[partition.place]
        open_records = partition.ledger.open_records - partition.buffered
        open_bytes = partition.ledger.open_bytes - partition.buffered_bytes
        self._make_room(partition.lane, -open_records, -open_bytes)

    def _make_room(self, lane: LaneBudget, records: int, size_bytes: int) -> None:
        if lane.add(records, size_bytes):
            self._room.set()

    def _note_expired(self, partition: Partition, offset: int, records: int) -> None:
        metrics.OFFSETS_EXPIRED.labels(self._step, partition.topic).inc(records)
        place = {"topic": partition.topic, "partition": partition.number, "offset": offset}
        log.error("retention deleted records this group had not read", **place, records=records)
