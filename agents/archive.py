"""The `archive` step: the `images` row of every picture, and inline bytes into the object store.

A row gets its object key only when the object is there: first the row, then the object, then the key. The
first picture of an id stays. Whether an envelope or a picture is any good is for `predict` to say.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from agents.delivery import Delivered, Delivery
from agents.durable import forever, isolate, publish_dead_letter
from pipeline import events, logs, metrics
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.errors import ContractError, MillraceError
from pipeline.events import ImageEvent, Record
from pipeline.objects import ObjectStore, image_key
from pipeline.results import ImageRow, SavedImage
from pipeline.settings import Settings
from pipeline.topics import IMAGES_BULK, IMAGES_REALTIME

T = TypeVar("T")

log = logs.get(__name__)

# Rows of one transaction, and objects under way at once; the bytes are bounded by `store_batch_bytes`.
BATCH_RECORDS = 128
# What the table takes; headers anybody wrote may be longer.
MAX_CONTENT_TYPE_CHARACTERS = 255
MAX_SOURCE_CHARACTERS = 2048

_NOT_SAVED = SavedImage("deleted")


@dataclass(eq=False)
class Picture:
    """A record on its way: its row, and what the database made of it."""

    delivered: Delivered
    event: ImageEvent
    row: ImageRow
    saved: SavedImage = _NOT_SAVED

    @property
    def is_kept(self) -> bool:
        """Whether this very picture is the one its id stands for."""
        return self.saved.status in {"stored", "repeat"}

    @property
    def lacks_object(self) -> bool:
        """Whether its bytes are still nowhere but in Kafka."""
        return self.is_kept and self.saved.object_key is None and bool(self.event.data)


class Archive:
    """Keeps pictures."""

    name = "archive"
    topics = (IMAGES_REALTIME, IMAGES_BULK)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._objects = ObjectStore.open(settings)
        self._publisher = Publisher(settings, client_id=self.name)
        self._database: Database | None = None

    async def start(self) -> None:
        """Wait for the migrated database, the object store and the broker."""
        self._database = await self._forever(lambda: Database.open(self._settings), "database")
        await self._forever(self._objects.ping, "object_store")
        await self._publisher.start()

    async def stop(self) -> None:
        """Close all three."""
        await self._publisher.stop()
        self._objects.close()
        if self._database is not None:
            await self._database.close()

    def unready(self) -> str | None:
        """Waiting for a dependency is not being unready: lag tells."""
        return None

    async def run(self, delivery: Delivery) -> None:
        """Keep one batch after the other."""
        while True:
            batch = await delivery.take(BATCH_RECORDS, self._settings.store_batch_bytes)
            await self._keep([delivered for delivered in batch if delivered.claim()])

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Dead-letter a record that killed us, unopened."""
        await publish_dead_letter(self._publisher, self._settings, self.name, delivered.record, error)
        delivered.finish("dead_lettered")

    async def _keep(self, batch: Sequence[Delivered]) -> None:
        """Make rows and objects of these records durable, then finish them."""
        pictures: list[Picture] = []
        for delivered in batch:
            event = self._wanted(delivered.record)
            if event is None:
                delivered.finish("skipped")
            else:
                pictures.append(Picture(delivered, event, image_row(event, delivered.record, delivered.lane)))
        pictures = await self._save(pictures)
        without_object = [picture for picture in pictures if picture.lacks_object]
        await asyncio.gather(*(self._put(picture) for picture in without_object))
        kept = await self._save(without_object)
        # Deleted by a person between row and object: nothing points to the object any more.
        orphans = [str(p.row.object_key) for p in kept if p.saved.object_key != p.row.object_key]
        await self._forever(lambda: self._objects.delete(orphans), "object_store")
        for picture in pictures:
            self._finish(picture)

    def _wanted(self, record: Record) -> ImageEvent | None:
        """Return the event to keep, if any."""
        if events.only_group(record) not in {None, self._group}:
            return None
        try:
            event = events.decode_image(record)
        except ContractError:
            return None
        return None if event.purpose == events.QUERY else event

    async def _save(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Store rows and note what became of them; return those that were not refused, which are finished."""
        refused = await isolate(pictures, self._write)
        for picture, error in refused:
            await self.reject(picture.delivered, error)
        guilty = {picture for picture, _ in refused}
        return [picture for picture in pictures if picture not in guilty]

    async def _write(self, pictures: Sequence[Picture]) -> None:
        assert self._database is not None
        database = self._database
        rows = [picture.row for picture in pictures]
        saved = await self._forever(lambda: database.save_images(rows), "database")
        for picture, result in zip(pictures, saved, strict=True):
            picture.saved = result

    async def _put(self, picture: Picture) -> None:
        assert picture.row.sha256 is not None
        key = image_key(picture.row.image_id, picture.row.sha256)
        await self._forever(lambda: self._objects.put(key, picture.event.data), "object_store")
        picture.row = msgspec.structs.replace(picture.row, object_key=key)

    def _finish(self, picture: Picture) -> None:
        record = picture.delivered.record
        if picture.saved.status == "conflict":
            metrics.DUPLICATES.labels("conflict").inc()
            log.warning(
                "the id has another picture already, which stays",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                event_id=picture.row.image_id,
            )
        picture.delivered.finish("archived" if picture.is_kept else "skipped")

    async def _forever(self, call: Callable[[], Awaitable[T]], dependency: str) -> T:
        return await forever(call, step=self.name, dependency=dependency)


def image_row(event: ImageEvent, record: Record, lane: str) -> ImageRow:
    """Return the row of a picture; its own bytes are not there yet, an object that it refers to may be."""
    return ImageRow(
        image_id=event.id,
        lane=lane,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        published_at=record.published_at,
        # The digest of what is there, not of what was promised; for that `predict` dead-letters.
        sha256=hashlib.sha256(event.data).hexdigest() if event.data else event.sha256,
        size_bytes=len(event.data) if event.data else None,
        content_type=_plain(event.content_type, MAX_CONTENT_TYPE_CHARACTERS) if event.content_type else None,
        object_key=event.dataref,
        source=_plain(event.source, MAX_SOURCE_CHARACTERS),
        expires_at=event.expires_at,
    )


def _plain(text: str, max_characters: int) -> str:
    return text.replace("\x00", "")[:max_characters]
