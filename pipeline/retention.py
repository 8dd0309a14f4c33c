"""Deleting what is old or unwanted: rows first, then the objects they pointed to.

The transaction that deletes a row queues its object (`object_deletions`), so a crash at any point leaves
nothing behind: the next run goes on. Only objects that Millrace made are deleted, never others that a
`ce_dataref` points to.
"""

import re
from datetime import datetime

import msgspec

from pipeline import logs
from pipeline.database import Database
from pipeline.objects import DEAD_LETTERS_PREFIX, IMAGES_PREFIX, ObjectStore

log = logs.get(__name__)

# Rows of each kind per transaction: few locks, little write-ahead log, writers wait for milliseconds.
BATCH_ROWS = 1000
# Exactly what `image_key` and `dead_letter_key` make: the store may hold others' folders of the same names.
_OUR_KEY = re.compile(
    rf"{IMAGES_PREFIX}/[0-9a-f]{{2}}/[0-9a-f]{{64}}/(?:[0-9a-f]{{64}}|picture)|{DEAD_LETTERS_PREFIX}/[0-9a-f]{{2}}/[0-9a-f]{{64}}"
)


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of retention removed."""

    images: int = 0
    predictions: int = 0
    dead_letters: int = 0
    objects: int = 0
    #: Of models, from the history; and the files that no version has any more.
    model_versions: int = 0
    model_files: int = 0


async def remove_expired(
    database: Database, objects: ObjectStore, before: datetime, *, batch_rows: int = BATCH_ROWS
) -> Removed:
    """Delete everything that was stored before a moment; may be stopped anywhere and run again.

    Raises:
        DependencyError: database or object store do not answer; what is done is done.
    """
    counts = Removed()
    while True:
        batch = await database.expire(before, batch_rows)
        counts = msgspec.structs.replace(
            counts,
            images=counts.images + batch.images,
            predictions=counts.predictions + batch.predictions,
            dead_letters=counts.dead_letters + batch.dead_letters,
            objects=counts.objects + await remove_queued_objects(database, objects, batch_rows),
        )
        if batch.is_empty:
            break
    orphans = await remove_orphans(database, objects, before)
    return msgspec.structs.replace(
        counts,
        objects=counts.objects + orphans,
        model_versions=await database.expire_models(before),
    )


async def delete_image(database: Database, objects: ObjectStore, image_id: str) -> bool:
    """Delete everything of one image; False if nothing is known of it.

    When this raises after the rows are gone, retention deletes the objects later.

    Raises:
        DependencyError: database or object store do not answer.
    """
    keys = await database.delete_image(image_id)
    if keys is None:
        return False
    await _remove(database, objects, keys)
    return True


async def remove_queued_objects(database: Database, objects: ObjectStore, batch: int = BATCH_ROWS) -> int:
    """Delete the objects whose rows are gone; return how many were queued."""
    count = 0
    while keys := await database.queued_objects(batch):
        await _remove(database, objects, keys)
        count += len(keys)
    return count


async def remove_orphans(database: Database, objects: ObjectStore, before: datetime) -> int:
    """Delete our objects from before a moment that no row points to: uploads that were never published."""
    count = 0
    for prefix in (IMAGES_PREFIX, DEAD_LETTERS_PREFIX):
        async for page in objects.list(prefix):
            old = [item.key for item in page if item.modified_at < before and _OUR_KEY.fullmatch(item.key)]
            orphans = set(old) - await database.objects_in_use(old) if old else set()
            await objects.delete(sorted(orphans))
            count += len(orphans)
    return count


async def _remove(database: Database, objects: ObjectStore, keys: list[str]) -> None:
    await objects.delete(keys)
    await database.forget_objects(keys)
    log.info("objects deleted", objects=len(keys))
