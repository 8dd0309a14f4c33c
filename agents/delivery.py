"""Delivery: records from Kafka to a step, and offsets back, without losing or repeating one.

The rule: a record is finished only when everything it causes is durable, and offsets are committed only
up to the first record that is not finished. This module knows neither Faust nor aiokafka; `consumer.py`
is the bridge. Everything here runs on one event loop.

A record's way: `fetched` (the ledger opens it before any library can drop it) -> `received` (the agent
saw it) -> `take` (a step has it) -> `claim` (work with effects began) -> `finish`. A hand-over forgets
what is not claimed (the next owner fetches it again) and waits for the rest.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from agents.careful import CAREFUL_TURN_SECONDS, Mark
from pipeline import logs, metrics, topics
from pipeline.errors import DependencyError, MillraceError, ProcessKilledError
from pipeline.events import Record
from pipeline.ledger import PartitionLedger
from pipeline.topics import Lane

log = logs.get(__name__)

TopicPartition = tuple[str, int]
CommitResult = Literal["ok", "refused"]

# One take in eight begins with the bulk lane, so that a full real-time lane never starves it.
BULK_TURN = 8
# Before a refused or unanswered commit of an attempt is tried again; long against a round trip.
RETRY_SECONDS = 0.5


class State(Enum):
    """Where a record is on its way; see the module's docstring."""

    WAITING = "waiting"
    TAKEN = "taken"
    CLAIMED = "claimed"
    FINISHED = "finished"
    FORGOTTEN = "forgotten"


class Committer(Protocol):
    """Commits offsets with metadata for the current generation of the group."""

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        """Commit; `refused` when the group has moved on. Raises DependencyError if nothing answers."""
        ...


@dataclass(frozen=True)
class Start:
    """What Kafka knows of a partition at its assignment."""

    committed: int | None
    metadata: str
    beginning: int
    end: int


@dataclass(slots=True)
class _Partition:
    topic: str
    number: int
    generation: int
    lane: "_LaneState"
    ledger: PartitionLedger = field(default_factory=PartitionLedger)
    pending: dict[int, "Delivered"] = field(default_factory=dict)  # fetched, not through the agent yet
    taken: set["Delivered"] = field(default_factory=set)  # in a step's hands, not claimed
    committed: int | None = None
    beginning: int = -1  # the highest one seen
    mark: Mark = field(default_factory=Mark)
    marked: bool = False  # the committed metadata says that this ownership may end badly
    attempting: bool = False  # the mark's last attempt has neither finished nor killed us
    claimed: int = 0
    uncommitted_since: float | None = None
    closing: bool = False  # a hand-over has begun: nothing new enters
    live: bool = True


@dataclass(slots=True)
class _LaneState:
    name: Lane
    waiting: deque["Delivered"] = field(default_factory=deque)
    open_records: int = 0
    open_bytes: int = 0
    paused: bool = False


class Delivered:
    """One record in a step's hands."""

    __slots__ = ("_delivery", "_partition", "lane", "received_at", "record", "size_bytes", "state")

    def __init__(self, delivery: "Delivery", partition: _Partition, record: Record) -> None:
        self._delivery = delivery
        self._partition = partition
        self.record = record
        self.lane: Lane = partition.lane.name
        self.received_at = time.monotonic()
        self.size_bytes = len(record.value or b"") + len(record.key or b"")
        self.state = State.WAITING

    def claim(self) -> bool:
        """Begin work that has effects; False when a hand-over gave the record back to Kafka: drop it."""
        if self.state is State.TAKEN:
            self.state = State.CLAIMED
            self._partition.taken.discard(self)
            self._partition.claimed += 1
        return self.state is State.CLAIMED

    @property
    def is_forgotten(self) -> bool:
        """Whether a hand-over gave the record back to Kafka."""
        return self.state is State.FORGOTTEN

    def put_back(self) -> None:
        """Return an unclaimed record to the head of its queue."""
        self._delivery._put_back(self)

    def finish(self, outcome: str) -> None:
        """Acknowledge a claimed record: all it causes is durable. Ignored after a hand-over's deadline."""
        self._delivery._finish(self, outcome)


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
        self._committer = committer
        self._reject = reject
        self._max_open_records = max_open_records
        self._max_open_bytes = max_open_bytes
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._lanes: dict[Lane, _LaneState] = {lane: _LaneState(lane) for lane in topics.LANES}
        self._careful: deque[Delivered] = deque()
        self._careful_turn = False
        self._turn_ends = 0.0
        self._alone: Delivered | None = None
        self._in_flight = 0
        self._takes = 0
        self._handing_over = 0
        self._stopped = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._commit_lock = asyncio.Lock()
        self._rejections: set[asyncio.Future[None]] = set()
        self.joined = False

    # What a step uses

    async def take(self, max_records: int, max_bytes: int) -> list[Delivered]:
        """Wait for records and take up to so many, real-time first; safe to cancel.

        One caller at a time. At least one record is returned however large it is.
        """
        while True:
            self._changed.clear()
            batch = self._pick(max_records, max_bytes)
            if batch:
                return batch
            careful = self._careful_candidate()
            if careful is not None and await self._begin_careful(careful):
                return [careful]
            await self._changed.wait()

    # What the consumer uses

    def assigned(self, starts: Mapping[TopicPartition, Start], generation: int) -> None:
        """Take ownership of partitions, each with a new ledger."""
        for (topic, number), start in starts.items():
            partition = _Partition(topic, number, generation, self._lanes[topics.lane_of(topic)])
            partition.committed = start.committed
            partition.mark = Mark.read(start.metadata, start.committed, start.end)
            self._partitions[topic, number] = partition
            self._note_expired(partition, start)
        self.joined = True
        metrics.REBALANCES.labels(self._step, "assigned").inc()
        metrics.ASSIGNED_PARTITIONS.labels(self._step).set(len(self._partitions))
        self._changed.set()
        self._room.set()

    async def mark_started(self, starts: Mapping[TopicPartition, Start]) -> None:
        """Note in the commit metadata that an ownership began: if it ends without a trace, Kafka tells."""
        marks = {}
        for place, start in starts.items():
            partition = self._partitions.get(place)
            if partition is not None:
                offset = start.beginning if start.committed is None else start.committed
                marks[place] = (offset, partition.mark.at_start(offset))
        if marks and await self._send(marks):
            for place in marks:
                if (partition := self._partitions.get(place)) is not None:
                    partition.marked = True

    def fetched(
        self, place: TopicPartition, generation: int, records: Sequence[Record], position: int | None
    ) -> list[Record]:
        """Open a fetch's records in the ledger and return the new ones; [] if the partition is not owned.

        `position` is the fetch position right after these records.
        """
        partition = self._partitions.get(place)
        if partition is None or partition.generation != generation or partition.closing:
            return []
        new = []
        lane = partition.lane
        for record in records:
            delivered = Delivered(self, partition, record)
            if partition.ledger.open(record.offset, delivered.size_bytes):
                partition.pending[record.offset] = delivered
                lane.open_records += 1
                lane.open_bytes += delivered.size_bytes
                new.append(record)
        if position is not None:
            partition.ledger.advance(position)
        metrics.RECORDS_OPENED.labels(self._step, lane.name).inc(len(new))
        self._balance(lane)
        return new

    def received(self, place: TopicPartition, generation: int, offset: int) -> None:
        """Queue a record that came through the agent; ignored when it is of an older ownership."""
        partition = self._partitions.get(place)
        if partition is None or partition.generation != generation:
            return
        delivered = partition.pending.pop(offset, None)
        if delivered is None:
            return
        delivered.received_at = time.monotonic()
        (self._careful if partition.mark.suspects(offset) else partition.lane.waiting).append(delivered)
        self._changed.set()

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
            self._forget(partitions)
            while any(partition.claimed for partition in partitions):
                remaining = started + deadline_seconds - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), remaining)
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

    async def commit(self, *, clean: Sequence[_Partition] = ()) -> bool:
        """Commit what is finished; `clean` partitions lose their mark even if they did not move.

        False when the broker does not answer or the group has moved on; nothing is lost by that.
        """
        async with self._commit_lock:
            partitions = {}
            offsets: dict[TopicPartition, tuple[int, str]] = {}
            for place, partition in self._partitions.items():
                offset = partition.ledger.committable
                moved = offset is not None and (partition.committed is None or offset > partition.committed)
                if partition in clean and partition.marked and not moved:
                    offset = partition.committed
                elif not moved:
                    continue
                if offset is not None:
                    partitions[place] = partition
                    offsets[place] = (offset, partition.mark.at_commit(offset))
            done = not offsets or await self._commit_now(offsets)
            if done:
                for place, partition in partitions.items():
                    partition.committed = offsets[place][0]
                    partition.marked = False
                    partition.uncommitted_since = None
        self._observe()
        return done

    def progress(self) -> dict[TopicPartition, int]:
        """Return, per owned partition, the offset up to which everything is finished, where known."""
        return {
            place: offset
            for place, partition in self._partitions.items()
            if (offset := partition.ledger.committable) is not None
        }

    def observe_ends(self, starts: Mapping[TopicPartition, Start]) -> None:
        """Compare progress with where the partitions begin and end now: lag, and what retention took."""
        lag: dict[str, int] = {}
        for place, start in starts.items():
            partition = self._partitions.get(place)
            if partition is None:
                continue
            self._note_expired(partition, start)
            done = partition.ledger.committable
            if done is None:
                done = start.beginning if partition.committed is None else partition.committed
            behind = max(0, start.end - max(done, start.beginning))
            lag[partition.topic] = lag.get(partition.topic, 0) + behind
        for topic, records in lag.items():
            metrics.LAG_RECORDS.labels(self._step, topic).set(records)

    # Inside

    def _finish(self, delivered: Delivered, outcome: str) -> None:
        partition = delivered._partition
        if delivered.state is not State.CLAIMED:
            return
        partition.claimed -= 1
        delivered.state = State.FINISHED
        self._in_flight -= 1
        if self._alone is delivered:
            self._alone = None
        self._changed.set()
        if not partition.live:
            return
        lane = partition.lane
        partition.attempting = False
        partition.ledger.finish(delivered.record.offset)
        lane.open_records -= 1
        lane.open_bytes -= delivered.size_bytes
        if partition.uncommitted_since is None:
            partition.uncommitted_since = time.monotonic()
        metrics.RECORDS_FINISHED.labels(self._step, lane.name, outcome).inc()
        self._balance(lane)

    def _pick(self, max_records: int, max_bytes: int) -> list[Delivered]:
        if self._stopped or self._handing_over or self._alone is not None:
            return []
        if self._is_careful_turn():
            return []  # let what is in flight finish: the next record must be alone
        self._takes += 1
        order: list[Lane] = ["realtime", "bulk"]
        if self._takes % BULK_TURN == 0:
            order.reverse()
        batch: list[Delivered] = []
        size_bytes = 0
        for lane in order:
            waiting = self._lanes[lane].waiting
            while waiting and len(batch) < max_records:
                if batch and size_bytes + waiting[0].size_bytes > max_bytes:
                    return batch
                delivered = waiting.popleft()
                self._take(delivered)
                size_bytes += delivered.size_bytes
                batch.append(delivered)
        return batch

    def _take(self, delivered: Delivered) -> None:
        delivered.state = State.TAKEN
        delivered._partition.taken.add(delivered)
        self._in_flight += 1

    def _put_back(self, delivered: Delivered) -> None:
        if delivered.state is not State.TAKEN:
            return
        partition = delivered._partition
        delivered.state = State.WAITING
        partition.taken.discard(delivered)
        self._in_flight -= 1
        if self._alone is delivered:
            self._alone = None
            self._careful.appendleft(delivered)
        else:
            partition.lane.waiting.appendleft(delivered)
        self._changed.set()

    def _is_careful_turn(self) -> bool:
        """Suspects and healthy records take turns by time while both wait."""
        if not self._careful:
            return False
        if not any(lane.waiting for lane in self._lanes.values()):
            return True
        now = time.monotonic()
        if now >= self._turn_ends:
            self._careful_turn = not self._careful_turn
            self._turn_ends = now + CAREFUL_TURN_SECONDS
        return self._careful_turn

    def _careful_candidate(self) -> Delivered | None:
        if self._stopped or self._handing_over or self._in_flight or not self._careful:
            return None
        return self._careful[0]

    async def _begin_careful(self, delivered: Delivered) -> bool:
        """Write the attempt down, then let the record start alone; reject what has died too often."""
        partition, offset = delivered._partition, delivered.record.offset
        if partition.mark.is_condemned(offset):
            self._start_alone(delivered)
            delivered.claim()
            deaths = partition.mark.attempts
            error = ProcessKilledError(f"its worker died {deaths} times with this record alone in flight")
            rejection = asyncio.ensure_future(self._reject(delivered, error))
            self._rejections.add(rejection)
            rejection.add_done_callback(self._rejections.discard)
            return False
        attempt = partition.mark.attempt(offset)
        written = await self._send({(partition.topic, partition.number): (offset, attempt.at_commit(offset))})
        if not written:
            await asyncio.sleep(RETRY_SECONDS)  # the group is moving on, or the broker is away
        elif self._careful_candidate() is delivered:
            partition.mark, partition.committed, partition.marked = attempt, offset, True
            partition.attempting = True
            self._start_alone(delivered)
            metrics.CAREFUL_RECORDS.labels(self._step).inc()
            return True
        self._changed.set()
        return False

    def _start_alone(self, delivered: Delivered) -> None:
        self._careful.popleft()
        self._take(delivered)
        self._alone = delivered

    def _forget(self, partitions: Sequence[_Partition]) -> None:
        """Give back what no step has claimed, taken or not; their next owner fetches it again."""
        gone = {id(partition) for partition in partitions}
        forgotten = 0
        for queue in (*(lane.waiting for lane in self._lanes.values()), self._careful):
            kept = [d for d in queue if id(d._partition) not in gone]
            forgotten += len(queue) - len(kept)
            queue.clear()
            queue.extend(kept)
        for partition in partitions:
            partition.closing = True
            partition.pending.clear()
            forgotten += len(partition.taken)
            for delivered in partition.taken:
                delivered.state = State.FORGOTTEN
                self._in_flight -= 1
                if self._alone is delivered:
                    self._alone = None
            partition.taken.clear()
        metrics.RECORDS_FORGOTTEN.labels(self._step).inc(forgotten)

    def _drop(self, partition: _Partition) -> None:
        if not partition.live:
            return
        partition.live = False
        lane = partition.lane
        lane.open_records -= partition.ledger.open_records
        lane.open_bytes -= partition.ledger.open_bytes
        metrics.RECORDS_ABANDONED.labels(self._step).inc(partition.claimed)
        if self._partitions.get((partition.topic, partition.number)) is partition:
            del self._partitions[partition.topic, partition.number]
        self._balance(lane)

    def _balance(self, lane: _LaneState) -> None:
        """Pause a lane above its budget, resume it below half."""
        if lane.open_records > self._max_open_records or lane.open_bytes > self._max_open_bytes:
            lane.paused = True
        elif lane.open_records * 2 <= self._max_open_records and lane.open_bytes * 2 <= self._max_open_bytes:
            if lane.paused:
                self._room.set()
            lane.paused = False

    async def _send(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> bool:
        async with self._commit_lock:
            return await self._commit_now(offsets)

    async def _commit_now(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> bool:
        try:
            result = await self._committer.commit(offsets)
        except DependencyError as error:
            metrics.COMMITS.labels(self._step, "failed").inc()
            log.warning("commit failed, trying again", reason=error.message)
            return False
        metrics.COMMITS.labels(self._step, result).inc()
        return result == "ok"

    def _note_expired(self, partition: _Partition, start: Start) -> None:
        """Count records below the partition's beginning that this group had not read, each once."""
        read = max(partition.ledger.next_offset, partition.committed or 0, partition.beginning)
        if (partition.committed is not None or partition.beginning >= 0) and read < start.beginning:
            lost = start.beginning - read
            metrics.OFFSETS_EXPIRED.labels(self._step, partition.topic).inc(lost)
            place = {"topic": partition.topic, "partition": partition.number, "offset": read}
            log.error("retention deleted records this group had not read", **place, records=lost)
        partition.beginning = max(partition.beginning, start.beginning)

    def _observe(self) -> None:
        now = time.monotonic()
        times = [partition.uncommitted_since for partition in self._partitions.values()]
        oldest = min((since for since in times if since is not None), default=now)
        metrics.COMMIT_AGE_SECONDS.labels(self._step).set(now - oldest)
        for lane in self._lanes.values():
            metrics.LEDGER_RECORDS.labels(self._step, lane.name).set(lane.open_records)
            metrics.LEDGER_BYTES.labels(self._step, lane.name).set(lane.open_bytes)
            metrics.LANE_PAUSED.labels(self._step, lane.name).set(lane.paused)
