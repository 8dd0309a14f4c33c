"""What a worker owns: partitions with their ledgers, lanes with their budgets, and records on their way.

State only; `delivery.py` moves it.
"""

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec

from agents.careful import Mark
from pipeline.events import Record
from pipeline.ledger import PartitionLedger
from pipeline.topics import Lane

TopicPartition = tuple[str, int]


class State(Enum):
    """Where a record is between its fetch and its end."""

    WAITING = "waiting"
    TAKEN = "taken"  # in a step's hands; a hand-over may still take it back
    CLAIMED = "claimed"  # work with effects has begun
    FINISHED = "finished"
    FORGOTTEN = "forgotten"  # given back to Kafka


@dataclass(frozen=True)
class Start:
    """What Kafka knows of a partition: where it begins and ends, and what this group committed."""

    committed: int | None
    metadata: str
    beginning: int
    end: int

    @property
    def first(self) -> int:
        """Where reading begins: retention may have deleted what was to be read next."""
        return self.beginning if self.committed is None else max(self.committed, self.beginning)


@dataclass(slots=True)
class LaneBudget:
    """What one lane holds of what it may hold; paused above the budget, resumed below half of it."""

    name: Lane
    max_records: int
    max_bytes: int
    open_records: int = 0
    open_bytes: int = 0
    paused: bool = False

    def add(self, records: int, size_bytes: int) -> bool:
        """Account for records opened (or, negative, ended); True when the lane may be read again."""
        self.open_records += records
        self.open_bytes += size_bytes
        was_paused = self.paused
        if self.open_records > self.max_records or self.open_bytes > self.max_bytes:
            self.paused = True
        elif self.open_records * 2 <= self.max_records and self.open_bytes * 2 <= self.max_bytes:
            self.paused = False
        return was_paused and not self.paused


@dataclass(slots=True, eq=False)
class Partition:
    """One ownership of one partition, from its assignment to its hand-over."""

    topic: str
    number: int
    generation: int
    lane: LaneBudget
    mark: Mark
    committed: int | None
    first: int  # where reading began
    ledger: PartitionLedger = field(default_factory=PartitionLedger)
    pending: dict[int, "Delivered"] = field(default_factory=dict)  # fetched, not through the agent yet
    taken: set["Delivered"] = field(default_factory=set)
    claimed: int = 0
    buffered: int = 0  # records in a step's hands without work under way, outside the lane's budget
    buffered_bytes: int = 0
    open_suspects: int = 0
    behind_suspects: list["Delivered"] = field(default_factory=list)
    marked: bool = False  # the committed metadata says that this ownership may end badly
    attempting: bool = False  # the mark's last attempt has neither finished nor killed us
    uncommitted_since: float | None = None
    gaps: list[tuple[int, int]] = field(
        default_factory=list
    )  # offsets that fetching passed over, unexplained
    end: int | None = None  # the offset after the last record, when it was last asked for
    end_seen_at: float = 0.0  # monotonic
    closing: bool = False  # a hand-over has begun: nothing new enters
    live: bool = True

    @property
    def place(self) -> TopicPartition:
        """Topic and partition number."""
        return (self.topic, self.number)


class Owner(Protocol):
    """Whom a record tells what becomes of it."""

    def finished(self, delivered: "Delivered", outcome: str) -> None:
        """All that it causes is durable."""

    def was_put_back(self, delivered: "Delivered") -> None:
        """It waits again."""

    def was_buffered(self, delivered: "Delivered") -> None:
        """It is held without work under way."""

    def was_released(self, delivered: "Delivered") -> None:
        """Work on it has ended and more is to come."""


class Delivered:
    """One record in a step's hands."""

    __slots__ = ("_owner", "is_buffered", "partition", "received_at", "record", "size_bytes", "state")

    def __init__(self, partition: Partition, record: Record, owner: Owner) -> None:
        self._owner = owner
        self.is_buffered = False
        self.partition = partition
        self.record = record
        self.received_at = time.monotonic()
        self.size_bytes = len(record.value or b"") + len(record.key or b"")
        self.state = State.WAITING

    @property
    def lane(self) -> Lane:
        """The lane it came by."""
        return self.partition.lane.name

    @property
    def is_forgotten(self) -> bool:
        """Whether a hand-over gave the record back to Kafka."""
        return self.state is State.FORGOTTEN

    def claim(self) -> bool:
        """Begin work that has effects; False when a hand-over gave the record back to Kafka: drop it."""
        if self.state is State.TAKEN:
            self.state = State.CLAIMED
            self.partition.taken.discard(self)
            self.partition.claimed += 1
        return self.state is State.CLAIMED

    def put_back(self) -> None:
        """Return a record that was taken and not claimed to the head of its queue."""
        if self.state is State.TAKEN:
            self.partition.taken.discard(self)
            self.state = State.WAITING
            self._owner.was_put_back(self)

    def buffer(self) -> None:
        """Hold a record that was taken until others have come; a hand-over may still take it back.

        The step has drawn from it what it needs: its value is let go, it counts neither as in flight nor against
        the budget of its lane, and it has proved that it does not kill its worker.
        """
        if self.state is State.TAKEN and not self.is_buffered:
            self.is_buffered = True
            self.record = msgspec.structs.replace(self.record, value=None, headers=())
            self._owner.was_buffered(self)

    def release(self) -> None:
        """End work on a claimed, buffered record that is not finished by it: a hand-over may take it back again."""
        if self.state is State.CLAIMED:
            self.partition.claimed -= 1
            if self.partition.closing:
                self.state = State.FORGOTTEN
            else:
                self.state = State.TAKEN
                self.partition.taken.add(self)
            self._owner.was_released(self)

    def finish(self, outcome: str) -> None:
        """Acknowledge a claimed record: all it causes is durable. Ignored after a hand-over's deadline."""
        if self.state is State.CLAIMED:
            self.partition.claimed -= 1
            self.state = State.FINISHED
            self._owner.finished(self, outcome)
