"""From a whole picture to an acknowledged event: what the `202` of an upload promises.

The order is the promise: the object store has a large picture before its record names it, and the broker has
acknowledged the record before anybody is told. The `images` row comes after, best effort: `archive` writes
the same row, so a database that is down delays a GET and never fails an upload.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from gateway.problems import Problem
from gateway.uploads import Picture
from pipeline import events, formats, logs
from pipeline.broker import Place, Publisher
from pipeline.database import Database
from pipeline.errors import ContractError, DependencyError, MillraceError
from pipeline.events import ImageEvent
from pipeline.objects import ObjectStore, image_key
from pipeline.results import ImageRow
from pipeline.settings import Settings
from pipeline.topics import IMAGES_REALTIME, LANES, MAX_INLINE_IMAGE_BYTES, Lane

SOURCE = "millrace/gateway"
# A broker that leads takes milliseconds; a client should hear of one that does not before it gives up itself.
PUBLISH_SECONDS = 5.0
OBJECT_SECONDS = 30.0
# How long an answer is held back for the row, which makes a GET right after it succeed.
ROW_SECONDS = 0.5
# A second look at the database for a repeated id; without an answer the event is published again, harmlessly.
LOOKUP_SECONDS = 1.0
MAX_IDEMPOTENCY_KEY_CHARACTERS = 255
MAX_REMEMBERED_IDS = 10_000
ROWS_PER_WRITE = 500

Naming = Literal["made", "given", "key"]

log = logs.get(__name__)


@dataclass(frozen=True)
class Terms:
    """What the client asks for, beside the picture."""

    lane: Lane
    expires_at: datetime | None = None
    traceparent: str | None = None


@dataclass(frozen=True)
class Accepted:
    """An event the broker has acknowledged, now or, if `replayed`, earlier."""

    image_id: str
    lane: Lane
    sha256: str
    size_bytes: int
    content_type: str
    replayed: bool = False


def id_of_key(key: str, index: int = 0) -> str:
    """Derive the event id from an `Idempotency-Key`, the same for every replica and for ever.

    It is `key-` and the first 40 hexadecimal digits of the SHA-256 of `INDEX:KEY`, where INDEX is the
    picture's place in the request, from 0.
    """
    return "key-" + hashlib.sha256(f"{index}:{key}".encode()).hexdigest()[:40]


def check_picture(picture: Picture) -> str:
    """Return the media type that the first bytes show.

    Raises:
        Problem: 422 for nothing at all, 415 for what no decoder reads.
    """
    if not picture.data:
        raise Problem("invalid_request", "The picture is empty.")
    media_type = formats.media_type(picture.data[: formats.HEAD_BYTES])
    if media_type in formats.DECODABLE:
        return media_type
    seen = f"This is {media_type}" if media_type else "The first bytes are not those of a picture"
    known = ", ".join(sorted(name.removeprefix("image/") for name in formats.DECODABLE))
    raise Problem("undecodable_image", f"{seen}; send one of {known}.", status=415)


class Intake:
    """Publishes pictures as events."""

    def __init__(
        self,
        settings: Settings,
        publisher: Publisher,
        objects: ObjectStore,
        rows: "RowWriter",
        database: Database,
    ) -> None:
        self._settings = settings
        self._publisher = publisher
        self._objects = objects
        self._rows = rows
        self._database = database
        # Tells two pictures under one id apart before either has a row; this process's latest only.
        self._seen: OrderedDict[str, str] = OrderedDict()

    async def accept(self, picture: Picture, terms: Terms, image_id: str, naming: Naming) -> Accepted:
        """Publish the picture and return when the broker has it.

        An id the client chose (`naming` other than `made`) that already belongs to this very picture is
        answered without publishing again.

        Raises:
            Problem: not a picture, or the id belongs to another one.
            RecordTooLargeError, DependencyError: as the publisher and the object store say.
        """
        content_type = check_picture(picture)
        accepted = Accepted(image_id, terms.lane, picture.sha256, len(picture.data), content_type)
        if naming != "made":
            known = await self._known(image_id, picture.sha256, naming)
            if known is not None:
                return Accepted(
                    image_id, known, picture.sha256, len(picture.data), content_type, replayed=True
                )
        dataref = await self._keep_large(picture, image_id)
        event = ImageEvent(
            id=image_id,
            data=b"" if dataref else picture.data,
            dataref=dataref,
            sha256=picture.sha256,
            source=SOURCE,
            time=datetime.now(UTC),
            content_type=content_type,
            expires_at=terms.expires_at,
            traceparent=terms.traceparent,
        )
        topic = self._settings.topic(LANES[terms.lane].name)
        place = await self._publisher.publish(topic, events.encode_image(event))
        await self._rows.write(_row(event, accepted, place))
        return accepted

    @asynccontextmanager
    async def lend(
        self, picture: Picture, image_id: str, *, group: str, expires_at: datetime
    ) -> AsyncIterator[None]:
        """Publish a picture that one group shall look at and nobody shall keep; after the block it is gone.

        Only Kafka has its record until retention takes it; no group but this one reads it.

        Raises:
            Problem, RecordTooLargeError, DependencyError: as `accept` does.
        """
        content_type = check_picture(picture)
        dataref = await self._keep_large(picture, image_id)
        try:
            event = ImageEvent(
                id=image_id,
                data=b"" if dataref else picture.data,
                dataref=dataref,
                sha256=picture.sha256,
                source=SOURCE,
                time=datetime.now(UTC),
                content_type=content_type,
                expires_at=expires_at,
                purpose=events.QUERY,
                only_group=group,
            )
            topic = self._settings.topic(IMAGES_REALTIME.name)
            await self._publisher.publish(topic, events.encode_image(event))
            yield
        finally:
            if dataref is not None:
                await self._drop(dataref)

    async def _keep_large(self, picture: Picture, image_id: str) -> str | None:
        """Put a picture that is too large for a record into the object store, and return its key there."""
        if len(picture.data) <= MAX_INLINE_IMAGE_BYTES:
            return None
        key = image_key(image_id, picture.sha256)
        try:
            async with asyncio.timeout(OBJECT_SECONDS):
                await self._objects.put(key, picture.data)
        except TimeoutError:
            raise DependencyError(f"the object store took longer than {OBJECT_SECONDS:g} s") from None
        return key

    async def _drop(self, key: str) -> None:
        try:
            async with asyncio.timeout(OBJECT_SECONDS):
                await self._objects.delete([key])
        except (DependencyError, TimeoutError):
            log.warning("a query's picture is left to retention", object_key=key)

    def forget(self, image_id: str) -> None:
        """Let a deleted id be used for another picture."""
        self._seen.pop(image_id, None)

    async def _known(self, image_id: str, sha256: str, naming: Naming) -> Lane | None:
        """Return the lane of this very picture if the database has its row.

        Raises:
            Problem: the id belongs to another picture.
        """
        seen = self._seen.setdefault(image_id, sha256)
        self._seen.move_to_end(image_id)
        if len(self._seen) > MAX_REMEMBERED_IDS:
            self._seen.popitem(last=False)
        if seen != sha256:
            raise _conflict(naming)
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                row = await self._database.image(image_id)
        except (MillraceError, TimeoutError):
            return None
        if row is None or row.sha256 is None:
            return None
        if row.sha256 != sha256:
            self._seen[image_id] = row.sha256
            raise _conflict(naming)
        return "realtime" if row.lane == "realtime" else "bulk"


class RowWriter:
    """Writes `images` rows, many uploads' rows in one transaction; gives up rather than hold anybody up."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue: asyncio.Queue[tuple[ImageRow, asyncio.Event]] = asyncio.Queue(maxsize=2 * ROWS_PER_WRITE)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._task = asyncio.create_task(self._run(), name="image rows")

    async def stop(self) -> None:
        """End writing; rows not yet written are `archive`'s to write."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def write(self, row: ImageRow | None) -> None:
        """Return when the row is written, or when that takes too long; never raises."""
        if row is None:
            return
        written = asyncio.Event()
        try:
            self._queue.put_nowait((row, written))
            async with asyncio.timeout(ROW_SECONDS):
                await written.wait()
        except (asyncio.QueueFull, TimeoutError):
            pass

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty() and len(batch) < ROWS_PER_WRITE:
                batch.append(self._queue.get_nowait())
            try:
                await self._database.save_images([row for row, _ in batch])
            except MillraceError as error:
                log.info("image rows left to archive", rows=len(batch), error=error.message)
            except Exception:
                log.exception("image rows left to archive", rows=len(batch))
            for _, written in batch:
                written.set()


def check_given_id(image_id: str) -> str:
    """Return an id that a client chose, if it can be an identity and the last segment of a URL.

    Raises:
        Problem: 422.
    """
    try:
        events.check_id(image_id)
    except ContractError as error:
        raise Problem("invalid_request", f"id: {error.message}") from None
    if image_id in {".", ".."}:
        raise Problem("invalid_request", f"id: {image_id} cannot be part of a URL")
    return image_id


def _conflict(naming: Naming) -> Problem:
    if naming == "key":
        return Problem("idempotency_key_reused", "This Idempotency-Key was used for another picture.")
    return Problem("id_conflict", "This id was used for another picture; the first one stays.")


def _row(event: ImageEvent, accepted: Accepted, place: Place) -> ImageRow | None:
    if place.offset < 0:  # only a repeat was acknowledged; `archive` knows the place
        return None
    return ImageRow(
        image_id=event.id,
        lane=accepted.lane,
        topic=place.topic,
        partition=place.partition,
        offset=place.offset,
        published_at=datetime.fromtimestamp(place.timestamp_ms / 1000, UTC),
        sha256=accepted.sha256,
        size_bytes=accepted.size_bytes,
        content_type=accepted.content_type,
        object_key=event.dataref,
        source=event.source,
        expires_at=event.expires_at,
    )
