"""What goes into the engine and what comes out: a request, and one of four outcomes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from pipeline.errors import MillraceError
from pipeline.events import ImageEvent, ModelResult, Receipt, Record
from pipeline.imaging import Picture, View
from pipeline.topics import Lane


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One record to predict; `received_at` is on the monotonic clock."""

    event: ImageEvent
    record: Record
    lane: Lane
    received_at: float
    #: Called once on the event loop, right before the record costs or causes anything that others can see;
    #: False means that it is no longer ours and is dropped.
    claim: Callable[[], bool]
    #: The caller's own; comes back with the outcome.
    context: Any = None
    #: True once `claim` would say False; asked before each attempt to fetch.
    is_forgotten: Callable[[], bool] = _never


@dataclass(frozen=True, slots=True)
class Predicted:
    """Every model has spoken; results are in the order of the models."""

    results: tuple[ModelResult, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed before the forward pass."""

    reason: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """The record's own fault, or the models' on this record alone."""

    error: MillraceError


@dataclass(frozen=True, slots=True)
class Dropped:
    """Given back before it was claimed; nothing was caused."""


Outcome = Predicted | Expired | Failed | Dropped


@dataclass(slots=True, eq=False)
class Work:
    """A request on its way through the engine; each stage fills in its part."""

    request: Request
    data: bytes
    #: On the monotonic clock.
    deadline: float | None = None
    sha256: str | None = None
    input_bytes: int | None = None
    picture: Picture | None = None
    #: How `picture` is decoded; empty before that begins.
    views: tuple[View, ...] = ()
    error: MillraceError | None = None
    is_expired: bool = False
    is_claimed: bool = False
    decode_started_at: float = 0.0
    decode_ended_at: float = 0.0
    fetch_attempts: int = 0
    missing_since: float | None = None
    fetch_slot: bool = False

    @classmethod
    def of(cls, request: Request) -> "Work":
        """Start a request's way; its wall-clock deadline becomes a monotonic one."""
        expires_at = request.event.expires_at
        deadline = None
        if expires_at is not None:
            deadline = time.monotonic() + (expires_at - datetime.now(UTC)).total_seconds()
        return cls(request, request.event.data, deadline)

    @property
    def pixel_bytes(self) -> int:
        """Size of what was decoded."""
        return 0 if self.picture is None else sum(pixels.nbytes for pixels in self.picture.pixels)

    def is_past_deadline(self) -> bool:
        """Whether working on it is worth nothing."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def expired(self) -> Expired:
        """Return the outcome of a record that nobody waits for any more."""
        expires_at = self.request.event.expires_at
        when = expires_at.isoformat() if expires_at else "unknown"
        reason = "past its deadline" if self.is_past_deadline() else "cannot be ready by its deadline"
        return Expired(f"{reason}, {when}", self._unfinished_receipt())

    def _unfinished_receipt(self) -> Receipt:
        """Say how far it came; all waiting up to now is `queue_seconds`."""
        record, now = self.request.record, time.monotonic()
        place = Receipt(
            topic=record.topic, partition=record.partition, offset=record.offset,
            queue_seconds=round(max(0.0, now - self.request.received_at), 6),
        )  # fmt: skip
        if self.picture is None:
            return place
        decode, wait = self.decode_ended_at - self.decode_started_at, max(0.0, now - self.decode_ended_at)
        queue = max(0.0, self.decode_started_at - self.request.received_at + wait)
        return msgspec.structs.replace(
            place, width=self.picture.width, height=self.picture.height, queue_seconds=round(queue, 6),
            batch_wait_seconds=round(wait, 6), decode_seconds=round(decode, 6),
        )  # fmt: skip
