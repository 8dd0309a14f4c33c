"""Dead letters: the record that says why another one could not be finished, and the limiter.

A dead letter keeps the original key, value and headers, so that redriving it is publishing it again.
Nothing here does I/O; publishing is `broker.py`, storing is the `store` step. Decoding never raises:
a dead letter is the last station, it has no other place to go.
"""

from collections import deque
from datetime import UTC, datetime

import msgspec

from pipeline import events
from pipeline.errors import ContractError, MillraceError

PREFIX = "millrace-"
# Room that the dead-letter topic grants above the largest input (64 KiB), less our own headers.
MAX_COPIED_HEADER_BYTES = 32 * 1024
MAX_REASON_CHARACTERS = 2_000


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """Why one record of one consumer group could not be finished, with the record itself."""

    group: str
    record: events.Record
    code: str
    reason: str
    failed_at: datetime
    #: Times this record was dead-lettered, this one included.
    attempts: int = 1
    image_id: str | None = None
    #: Object key of the value when the broker refused to carry it.
    value_ref: str | None = None

    @property
    def place(self) -> tuple[str, str, int, int]:
        """Identity: (group, topic, partition, offset) of the record that failed."""
        return (self.group, self.record.topic, self.record.partition, self.record.offset)


def from_error(group: str, record: events.Record, error: MillraceError, now: datetime) -> DeadLetter:
    """Describe why `group` cannot finish `record`."""
    return DeadLetter(
        group=group,
        record=record,
        code=error.code,
        reason=_plain(error.message[:MAX_REASON_CHARACTERS]),
        failed_at=now,
        attempts=events.attempts(record) + 1,
        image_id=_identity(record),
    )


def encode_dead_letter(letter: DeadLetter) -> events.Outgoing:
    """Encode for `dead-letters.v1`: the original key, value and (capped) headers, plus ours."""
    record = letter.record
    ours = {
        "group": letter.group,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp-ms": record.timestamp_ms,
        "code": letter.code,
        "reason": letter.reason,
        "failed-at": letter.failed_at.astimezone(UTC).isoformat(),
        "attempts": letter.attempts,
        "image-id": letter.image_id,
        "value-ref": letter.value_ref,
    }
    headers = [(PREFIX + name, str(value).encode()) for name, value in ours.items() if value is not None]
    room, dropped = MAX_COPIED_HEADER_BYTES, 0
    for name, value in record.headers:
        size = len(name.encode()) + len(value or b"")
        if name.startswith(PREFIX):
            continue
        if size > room:
            dropped += 1
            continue
        room -= size
        headers.append((name, value))
    if dropped:
        headers.append((PREFIX + "headers-dropped", str(dropped).encode()))
    return events.Outgoing(record.key, None if letter.value_ref else record.value, tuple(headers))


def decode_dead_letter(record: events.Record) -> DeadLetter:
    """Read a dead letter; what is missing or unreadable falls back to the record's own place."""

    def text(name: str, default: str) -> str:
        value = record.header(PREFIX + name)
        return default if value is None else value.decode("utf-8", "replace").replace("\x00", "\\0")

    def number(name: str, default: int) -> int:
        try:
            value = int(text(name, str(default)))
        except ValueError:
            return default
        return value if 0 <= value < 2**62 else default

    try:
        failed_at = msgspec.convert(text("failed-at", ""), datetime).astimezone(UTC)
    except (msgspec.ValidationError, ValueError, OverflowError):
        failed_at = record.published_at
    original = events.Record(
        topic=text("topic", record.topic),
        partition=number("partition", record.partition),
        offset=number("offset", record.offset),
        timestamp_ms=number("timestamp-ms", record.timestamp_ms),
        key=record.key,
        value=record.value,
        headers=tuple(header for header in record.headers if not header[0].startswith(PREFIX)),
    )
    return DeadLetter(
        group=text("group", "unknown"),
        record=original,
        code=text("code", "unknown"),
        reason=text("reason", "this dead letter does not say why"),
        failed_at=failed_at,
        attempts=max(1, min(number("attempts", 1), 2**31 - 1)),
        image_id=text("image-id", "") or None,
        value_ref=text("value-ref", "") or None,
    )


def redriven(letter: DeadLetter) -> events.Outgoing:
    """Return the record to publish on the original topic: same identity, one group, attempts counted."""
    headers = [header for header in letter.record.headers if not header[0].startswith(PREFIX)]
    if letter.image_id and not _names_itself(letter.record):
        headers = [header for header in headers if header[0] != "ce_id"]
        headers.append(("ce_id", letter.image_id.encode()))
    headers.append((PREFIX + "only-group", letter.group.encode()))
    headers.append((PREFIX + "attempts", str(letter.attempts).encode()))
    return events.Outgoing(letter.record.key, letter.record.value, tuple(headers))


def _plain(text: str) -> str:
    """Replace what neither a header nor PostgreSQL takes; a library's error may say anything."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\\0")


def _identity(record: events.Record) -> str | None:
    """Return the image id the record claims, or its place when what it claims cannot be an identity."""
    try:
        return events.image_id(record)
    except ContractError:
        return record.default_id


def _names_itself(record: events.Record) -> bool:
    """Whether the record has a `ce_id` that can be an identity; else a redrive must not take its new place."""
    try:
        return record.header("ce_id") is not None and bool(events.image_id(record))
    except ContractError:
        return False


class FaultLimiter:
    """Stop a step whose model or code fails on everything, before it drains a topic into dead letters.

    Counts only faults laid on the model or our code, against records that went well; faults of the input
    count as neither. It opens when `max_faults` of the last records, and more than half of them, failed:
    records are counted, not seconds, so that neither a slow step nor a long good history hides a bad release.
    Pure: the caller passes the monotonic clock. Open means: try one record per `probe_seconds`; the first
    that goes well closes it, and one that says nothing of the model (expired, itself at fault) does not count.
    """

    def __init__(self, *, max_faults: int = 20, probe_seconds: float = 60.0) -> None:
        self._max_faults = max_faults
        self._probe_seconds = probe_seconds
        self._last: deque[bool] = deque(maxlen=2 * max_faults)  # whether each of the last records failed
        self._is_open = False
        self._next_probe_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the step should pause and be unready."""
        return self._is_open

    def went_well(self) -> None:
        """Count a record the model finished; closes an open limiter."""
        if self._is_open:
            self._is_open = False
            self._last.clear()
        self._last.append(False)

    def failed(self, now: float) -> None:
        """Count a fault laid on the model; opens when they are many and the majority."""
        self._last.append(True)
        faults = sum(self._last)
        if not self._is_open and faults >= self._max_faults and faults * 2 > len(self._last):
            self._is_open = True
            self._next_probe_at = now + self._probe_seconds

    def said_nothing(self, now: float) -> None:
        """Note that the probe ended without a word about the model: the next one need not wait."""
        self._next_probe_at = now

    def may_try(self, now: float) -> bool:
        """Whether a record may start now; while open, claims the one probe of this interval."""
        if not self._is_open:
            return True
        if now < self._next_probe_at:
            return False
        self._next_probe_at = now + self._probe_seconds
        return True
