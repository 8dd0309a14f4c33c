"""What `store` and `archive` share: waiting out faults, isolating what is refused, dead-lettering it.

Nothing here gives a record up: it is written, or it is a dead letter that the broker has, or it is still
being tried.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from pipeline import deadletters, logs, metrics
from pipeline.broker import Publisher
from pipeline.connections import backoff_seconds
from pipeline.errors import DependencyError, MillraceError, RecordTooLargeError, StorageRefusedError
from pipeline.events import Headers, Record
from pipeline.objects import ObjectStore, dead_letter_key
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS

T = TypeVar("T")
Item = TypeVar("Item")

log = logs.get(__name__)


async def forever(call: Callable[[], Awaitable[T]], *, step: str, dependency: str) -> T:
    """Repeat a call while its dependency fails, waiting up to 30 s in between; other errors pass through."""
    for delay in backoff_seconds():
        try:
            return await call()
        except DependencyError as error:
            metrics.RETRIES.labels(step, dependency).inc()
            log.warning("waiting for a dependency", dependency=dependency, error=error.message)
            await asyncio.sleep(delay)
    raise AssertionError("backoff_seconds never ends")


async def isolate(
    items: Sequence[Item], save: Callable[[Sequence[Item]], Awaitable[None]]
) -> list[tuple[Item, StorageRefusedError]]:
    """Save a batch whole or in ever smaller halves; return the items that are refused alone, with the reason.

    One guilty item in a batch of N costs about 2 log2(N) more calls.
    """
    if not items:
        return []
    try:
        await save(items)
    except StorageRefusedError as error:
        if len(items) == 1:
            return [(items[0], error)]
        middle = len(items) // 2
        return await isolate(items[:middle], save) + await isolate(items[middle:], save)
    return []


async def publish_dead_letter(
    publisher: Publisher,
    settings: Settings,
    step: str,
    record: Record,
    error: MillraceError,
    image_id: str | None = None,
    objects: ObjectStore | None = None,
) -> None:
    """Return when the broker has the dead letter; `image_id` where it is not what the record itself names.

    A value that the broker refuses to carry goes to the object store first, where there is one.
    """
    letter = deadletters.from_error(settings.group(step), record, error, datetime.now(UTC))
    if image_id is not None:
        letter = msgspec.structs.replace(letter, image_id=image_id)
    topic = settings.topic(DEAD_LETTERS.name)
    log.warning(
        "dead-lettering",
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        event_id=letter.image_id,
        code=error.code,
        reason=error.message,
    )
    try:
        await publisher.publish_forever(topic, deadletters.encode_dead_letter(letter), step=step)
    except RecordTooLargeError as too_large:
        # Only where an operator made the topic's limit smaller than the table says.
        key = None
        if objects is not None and record.value:
            value, key = record.value, dead_letter_key(*letter.place)
            await forever(lambda: objects.put(key, value), step=step, dependency="object_store")
        bare = msgspec.structs.replace(
            letter,
            value_ref=key,
            reason=f"{letter.reason} (its value is not here: {too_large.message})",
            record=msgspec.structs.replace(record, value=None, headers=_identifying(record)),
        )
        await publisher.publish_forever(topic, deadletters.encode_dead_letter(bare), step=step)
    metrics.DEAD_LETTERS.labels(step, error.code).inc()


def _identifying(record: Record) -> Headers:
    """Keep the headers that a redrive or `store` needs and that are small by contract."""
    kept = {"ce_id", "ce_purpose"}
    return tuple((name, value) for name, value in record.headers if name in kept and len(value) < 2048)
