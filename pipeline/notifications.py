"""Who is told of alerts: the queue of `notify` in the database, and silences.

One row per receiver and transition. A message is formed once, in a transaction of its own, before anything is sent;
a process that dies after that leaves it to whoever finds it overdue, with the same members and the same id. The
database's clock decides, and one transaction at a time decides for a receiver.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

import asyncpg
import msgspec

from pipeline.postgres import QUERIES, Connection, Pool
from pipeline.receivers import Match, Receiver, fits, labels_of
from pipeline.telemetry import Alert

# "note" in ASCII: the first half of the key of advisory locks, a receiver's name is the second.
_LOCK = 0x6E6F7465
_MAX_REASON = 1000

Settled = Literal["delivered", "failed"]

_encoder = msgspec.json.Encoder()
_alert = msgspec.json.Decoder(Alert)
_match: "msgspec.json.Decoder[dict[str, str | tuple[str, ...]]]" = msgspec.json.Decoder(
    dict[str, str | tuple[str, ...]]
)


class Transition(msgspec.Struct, frozen=True):
    """A step in the life of an alert that a receiver is to be told of, and when Kafka got it."""

    receiver: Receiver
    alert: Alert
    published_at: datetime


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Transitions that a receiver is told of together: an attempt to deliver it begins now."""

    id: str
    alerts: tuple[Alert, ...]
    #: Attempts, this one included.
    attempts: int = 1
    #: Since when it should have been told.
    age_seconds: float = 0.0


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to do for a receiver; how many transitions ended unsent, by status."""

    message: Message | None = None
    #: Until something is due; None: nothing is.
    wait_seconds: float | None = None
    unsent: Mapping[str, int] = {}


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """What nobody is told of for a while: alerts whose labels fit all of `match`."""

    id: int
    match: dict[str, str | tuple[str, ...]]
    starts_at: datetime
    ends_at: datetime
    comment: str
    created_by: str
    created_at: datetime


class Notification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether a receiver was told of a transition."""

    receiver: str
    alert_id: str
    state: str
    status: str
    attempts: int
    since: datetime
    settled_at: datetime | None = None
    silence_id: int | None = None
    reason: str | None = None


def message_id(receiver: str, alerts: Sequence[Alert]) -> str:
    """Derive a message's identity from its receiver and its transitions."""
    text = _encoder.encode([receiver, sorted((alert.id, alert.state) for alert in alerts)])
    return hashlib.sha256(text).hexdigest()[:32]


async def save(pool: Pool, transitions: Sequence[Transition]) -> int:
    """Note who is to be told of what, in one transaction; return how many of it are new.

    What comes of it does not depend on the order in which an alert's transitions arrive.

    Raises:
        StorageRefusedError: some transition is at fault; nothing was noted.
        DependencyError: try again.
    """
    rows = [
        (
            each.receiver.name, each.alert.id, each.alert.state, _encoder.encode(each.alert).decode(),
            each.receiver.group_key(each.alert), each.receiver.group_wait_seconds, each.published_at,
        )
        for each in transitions
    ]  # fmt: skip
    receivers = {each.receiver.name: each.receiver for each in transitions}
    async with pool.transaction() as connection:
        await connection.execute(QUERIES["lock_receivers"], _LOCK, list(receivers))
        columns = [list(column) for column in zip(*rows, strict=True)]
        saved = await connection.fetch(QUERIES["save_notifications"], *columns)
        for name, receiver in receivers.items():
            new = [row for row in saved if row["receiver"] == name]
            begun = [row["alert_id"] for row in new if row["state"] == "firing"]
            await connection.execute(QUERIES["revive_ends"], name, begun)
            await _release(connection, receiver, [row["alert_id"] for row in new])
    return len(saved)


async def claim(pool: Pool, receiver: Receiver, most_alerts: int) -> Claimed:
    """Begin the next attempt that is due for a receiver, or say when to come back.

    The attempt has twice the receiver's timeout; after that, whoever asks gets the message again.
    """
    lease_seconds = receiver.timeout_seconds * 2
    async with pool.transaction() as connection:
        await connection.execute(QUERIES["lock_receivers"], _LOCK, [receiver.name])
        due = await connection.fetchrow(QUERIES["next_due"], receiver.name)
        if due is None or due["seconds"] > 0:
            return Claimed(wait_seconds=None if due is None else due["seconds"])
        if due["status"] == "sending":
            rows = await connection.fetch(
                QUERIES["repeat_message"], receiver.name, due["message_id"], lease_seconds
            )
            message = Message(
                id=due["message_id"],
                alerts=_alerts(rows),
                attempts=max(row["attempts"] for row in rows),
                age_seconds=max(row["age_seconds"] for row in rows),
            )
            return Claimed(message=message)
        rows = await connection.fetch(
            QUERIES["group_due"], receiver.name, due["group_key"], most_alerts, receiver.give_up_seconds
        )
        rows, unsent = await _leave_out(connection, receiver, rows)
        if not rows:
            return Claimed(wait_seconds=0.0, unsent=unsent)
        message = Message(id=message_id(receiver.name, _alerts(rows)), alerts=_alerts(rows))
        keys = [row["alert_id"] for row in rows], [row["state"] for row in rows]
        await connection.execute(QUERIES["begin_message"], receiver.name, message.id, *keys, lease_seconds)
    return Claimed(message=message, unsent=unsent)


async def retry(pool: Pool, receiver: Receiver, message: Message, seconds: float, reason: str) -> None:
    """Have a message sent again in so many seconds."""
    await pool.rows("retry_message", receiver.name, message.id, seconds, reason[:_MAX_REASON])


async def settle(
    pool: Pool,
    receiver: Receiver,
    message: Message,
    status: Settled,
    reason: str | None = None,
) -> None:
    """End a message; what waited for it is told next, or not at all."""
    # An Alertmanager forgets what is not said again.
    again = receiver.resend_seconds if (receiver.kind, status) == ("alertmanager", "delivered") else None
    async with pool.transaction() as connection:
        await connection.execute(QUERIES["lock_receivers"], _LOCK, [receiver.name])
        reason = reason and reason[:_MAX_REASON]
        rows = await connection.fetch(
            QUERIES["settle_message"], receiver.name, message.id, status, reason, again
        )
        await _release(connection, receiver, [row["alert_id"] for row in rows])


async def notifications(pool: Pool, alert_ids: Sequence[str]) -> list[Notification]:
    """Return who was told of these alerts, or is to be."""
    return [Notification(**row) for row in await pool.rows("notifications_of_alerts", list(alert_ids))]


async def expire(pool: Pool, before: datetime, limit: int) -> int:
    """Delete up to so many transitions settled before a moment, and silences that ended; call until it is 0."""
    (row,) = await pool.rows("expire_notifications", before, limit)
    return int(row["rows"])


async def silences(pool: Pool, *, every: bool, limit: int, before: int | None = None) -> list[Silence]:
    """Return silences that hold or will, or `every` one, newest first."""
    return [_silence(row) for row in await pool.rows("silences", every, limit, before)]


async def silence(
    pool: Pool, match: Match, starts_at: datetime, ends_at: datetime, comment: str, created_by: str
) -> Silence:
    """Begin a silence."""
    text = _encoder.encode(match).decode()
    (row,) = await pool.rows("save_silence", text, starts_at, ends_at, comment, created_by)
    return _silence(row)


async def end_silence(pool: Pool, silence_id: int) -> Silence | None:
    """End a silence now; what still fires is told. None if there is none that goes on."""
    rows = await pool.rows("end_silence", silence_id)
    return _silence(rows[0]) if rows else None


async def _release(connection: Connection, receiver: Receiver, alert_ids: Sequence[str]) -> None:
    """Decide about the ends of these alerts, now that something of them is known."""
    if alert_ids:
        await connection.execute(
            QUERIES["release_ends"], receiver.name, sorted(set(alert_ids)), receiver.group_wait_seconds
        )


async def _leave_out(
    connection: Connection, receiver: Receiver, rows: Sequence[asyncpg.Record]
) -> tuple[list[asyncpg.Record], dict[str, int]]:
    """End what is silenced or too old, and return the rest. The end of what was told is always told."""
    in_force = [_silence(row) for row in await connection.fetch(QUERIES["silences_in_force"])]
    kept: list[asyncpg.Record] = []
    unsent: Counter[str] = Counter()
    for row in rows:
        labels = labels_of(_alert.decode(row["alert"]))
        held = [each for each in in_force if fits(each.match, labels)] if row["state"] == "firing" else []
        if row["is_too_old"]:
            reason = f"nobody could be told for {receiver.give_up_seconds:g} s"
            ended: tuple[object, ...] = ("failed", reason, None, None)
        elif held and row["status"] != "delivered":
            last = max(held, key=lambda each: each.ends_at)
            ended = ("silenced", last.comment or None, last.ends_at, last.id)
        else:
            kept.append(row)
            continue
        unsent[str(ended[0])] += 1
        await connection.execute(
            QUERIES["settle_unsent"], receiver.name, row["alert_id"], row["state"], *ended
        )
        await _release(connection, receiver, [row["alert_id"]])
    return kept, unsent


def _alerts(rows: Sequence[asyncpg.Record]) -> tuple[Alert, ...]:
    return tuple(_alert.decode(row["alert"]) for row in rows)


def _silence(row: asyncpg.Record) -> Silence:
    return Silence(
        id=row["silence_id"],
        match=_match.decode(row["match"]),
        starts_at=row["starts_at"],
        ends_at=row["ends_at"],
        comment=row["comment"],
        created_by=row["created_by"],
        created_at=row["created_at"],
    )
