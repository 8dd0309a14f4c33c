"""`millrace publish images`: find pictures, publish each one, account for every file.

Memory does not grow with the number of files. Publishing the same pictures twice gives one result, because an
id is made from the bytes unless told otherwise; so a run that was broken off is simply run again.
"""

import asyncio
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

from millrace.folders import require_stack_folder
from millrace.output import EXIT_FAILED, counted, emit, say
from millrace.progress import Progress
from pipeline import events, formats
from pipeline.broker import Place, Publisher
from pipeline.errors import (
    ConfigurationError,
    DependencyError,
    ImageTooLargeError,
    MillraceError,
    UndecodableImageError,
)
from pipeline.objects import ObjectStore, image_key
from pipeline.settings import PREFIX, Settings
from pipeline.topics import LANES, MAX_INLINE_IMAGE_BYTES, Lane

IdFrom = Literal["content", "path", "random"]
SOURCE = "millrace/publish"

# Enough to fill the producer's batches; each holds one file.
_AT_ONCE = 16
# Files above the inline limit are up to 32 MiB each.
_LARGE_AT_ONCE = 2
# A broker that restarts is back within this; then the run ends, and can be repeated.
_PUBLISH_SECONDS = 60.0
_MAX_FAILURES_KEPT = 1_000
# A file with such a name in a folder claims to be a picture: if it is not, that is a failure, not a skip.
_PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff",
     ".heic", ".heif", ".jxl", ".jp2"}
)  # fmt: skip


class Published(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one file, a line of `--json`: published (a place), failed (an error) or skipped."""

    path: str
    id: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    bytes: int | None = None
    media_type: str | None = None
    sha256: str | None = None
    code: str | None = None
    error: str | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Found:
    """A file to look at; `name` is its path below the folder that was named, for ids."""

    path: Path
    name: str
    #: Named by the user, rather than met in a folder.
    is_named: bool


@dataclass(frozen=True)
class Picture:
    """A file that is a picture by its first bytes; `path` is for printing."""

    file: Found
    path: str
    media_type: str | None
    size_bytes: int


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    lane: Lane = "bulk"
    rate_per_second: float | None = None
    limit: int | None = None
    deadline_seconds: float | None = None
    id_from: IdFrom = "content"
    as_json: bool = False


@dataclass
class Tally:
    """Counts of one run, and its first failures."""

    published: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[Published] = field(default_factory=list)

    def add(self, result: Published) -> None:
        """Count one file."""
        if result.error is not None:
            self.failed += 1
            if len(self.failures) < _MAX_FAILURES_KEPT:
                self.failures.append(result)
        elif result.skipped is not None:
            self.skipped += 1
        else:
            self.published += 1


def find(arguments: list[Path]) -> Iterator[Found]:
    """Yield named files, and what lies below named folders in order of names, without hidden ones.

    Links to files are followed, links to folders are not: they may lead round in a circle.
    """
    for argument in arguments:
        if not argument.is_dir():
            yield Found(argument, argument.name, is_named=True)
            continue
        for folder, folders, files in os.walk(argument):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith("."):
                    path = Path(folder, name)
                    yield Found(path, path.relative_to(argument).as_posix(), is_named=False)


def content_id(sha256: str) -> str:
    """Return the id that a picture gets by its bytes: `img-` and the first half of their SHA-256."""
    return f"img-{sha256[:32]}"


async def publish_images(settings: Settings, arguments: list[Path], wishes: Wishes) -> int:
    """Publish and report; return the exit code.

    Raises:
        DependencyError: the broker or the object store stopped answering; what was published stays so.
        ConfigurationError: a setting is wrong.
    """
    publisher = Publisher(settings, client_id="millrace-publish", timeout_seconds=_PUBLISH_SECONDS)
    await publisher.start(wait=False)
    run = _Run(settings, publisher, wishes)
    started = time.monotonic()
    try:
        with Progress("publishing", lambda: find(arguments), wishes.limit) as progress:
            await run.publish_all(find(arguments), progress)
    except BaseExceptionGroup as errors:
        expected, others = errors.split(MillraceError)
        if expected is None or others is not None:
            raise
        # Several files in flight meet the same dead broker: one error says it.
        raise expected.exceptions[0] from None
    finally:
        await publisher.stop()
        run.close()
        _report(run.tally, time.monotonic() - started)
    return EXIT_FAILED if run.tally.failed else 0


class Sender:
    """Publishes pictures, large ones by way of the object store."""

    def __init__(self, settings: Settings, publisher: Publisher) -> None:
        self._settings = settings
        self._publisher = publisher
        self._objects: ObjectStore | None = None

    async def send(self, event: events.ImageEvent, lane: Lane) -> Place:
        """Publish a picture and return when the broker has it.

        Raises:
            ContractError, DependencyError: as publisher and object store say.
            ConfigurationError: no worker would find a large picture.
        """
        if len(event.data) > MAX_INLINE_IMAGE_BYTES:
            if self._objects is None:
                if not self._settings.kafka_bootstrap_servers and not self._settings.object_store_url:
                    require_stack_folder(self._settings.data_dir)
                self._objects = ObjectStore.open(self._settings)
                if self._settings.kafka_bootstrap_servers and not self._settings.object_store_url:
                    kept = self._settings.resolved_object_store
                    say(f"large pictures go to {kept}, which the workers must see: {PREFIX}OBJECT_STORE_URL")
            key = image_key(event.id, event.sha256)
            await self._objects.put(key, event.data)
            event = msgspec.structs.replace(event, data=b"", dataref=key)
        return await self._publisher.publish(
            self._settings.topic(LANES[lane].name), events.encode_image(event)
        )

    def close(self) -> None:
        """Release the object store."""
        if self._objects is not None:
            self._objects.close()


class _Run:
    """One run: at most `_AT_ONCE` files are open at any time."""

    def __init__(self, settings: Settings, publisher: Publisher, wishes: Wishes) -> None:
        self.tally = Tally()
        self._settings = settings
        self._wishes = wishes
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._sender = Sender(settings, publisher)
        self._next_at = time.monotonic()

    def close(self) -> None:
        """Release the object store."""
        self._sender.close()

    async def publish_all(self, files: Iterator[Found], progress: Progress) -> None:
        """Look at the files one by one, publish the pictures side by side."""
        slots = asyncio.Semaphore(_AT_ONCE)
        candidates = self._judge(files)

        def account(result: Published) -> None:
            self.tally.add(result)
            progress.advance(failed=self.tally.failed)
            if self._wishes.as_json:
                emit(result)

        async def publish(picture: Picture) -> None:
            try:
                account(await self._publish(picture))
            finally:
                slots.release()

        async with asyncio.TaskGroup() as group:
            begun = 0
            while self._wishes.limit is None or begun < self._wishes.limit:
                judged = await asyncio.to_thread(next, candidates, None)
                if judged is None:
                    break
                if isinstance(judged, Published):
                    account(judged)
                    continue
                begun += 1
                await slots.acquire()
                await self._wait_for_turn()
                group.create_task(publish(judged))

    def _judge(self, files: Iterator[Found]) -> Iterator[Picture | Published]:
        """Tell pictures by their first bytes; others are failures, or skipped if nothing claims they are."""
        limit = self._settings.max_image_bytes
        for file in files:
            path = printable_path(file.path)
            try:
                head, size = _look(file.path)
            except OSError as error:
                yield Published(path, code="unreadable", error=error.strerror or str(error))
                continue
            if head is None:
                if file.is_named:
                    yield Published(path, code="unreadable", error="not a regular file")
                else:
                    yield Published(path, skipped="not a regular file")
                continue
            media_type = formats.media_type(head)
            if media_type in formats.DECODABLE:
                if size <= limit:
                    yield Picture(file, path, media_type, size)
                    continue
                code = ImageTooLargeError.code
                reason = f"{size:,} bytes, {PREFIX}MAX_IMAGE_BYTES allows {limit:,}"
                yield Published(path, code=code, error=reason)
            elif file.is_named or media_type is not None or file.path.suffix.lower() in _PICTURE_SUFFIXES:
                yield Published(path, code=UndecodableImageError.code, error=_why_not(size, media_type))
            else:
                yield Published(path, skipped="not a picture")

    async def _publish(self, picture: Picture) -> Published:
        try:
            if picture.size_bytes > MAX_INLINE_IMAGE_BYTES:
                async with self._large:
                    return await self._send(picture)
            return await self._send(picture)
        except (DependencyError, ConfigurationError):
            raise
        except MillraceError as error:
            return Published(picture.path, code=error.code, error=error.message)
        except OSError as error:
            return Published(picture.path, code="unreadable", error=error.strerror or str(error))

    async def _send(self, picture: Picture) -> Published:
        data = await asyncio.to_thread(picture.file.path.read_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        image_id = self._id(picture.file, sha256)
        events.check_id(image_id)
        now = datetime.now(UTC)
        deadline = self._wishes.deadline_seconds
        event = events.ImageEvent(
            id=image_id,
            data=data,
            sha256=sha256,
            source=SOURCE,
            time=now,
            content_type=picture.media_type,
            expires_at=now + timedelta(seconds=deadline) if deadline else None,
        )
        place = await self._sender.send(event, self._wishes.lane)
        return Published(
            picture.path, id=image_id, topic=place.topic, partition=place.partition, offset=place.offset,
            bytes=len(data), media_type=picture.media_type, sha256=sha256,
        )  # fmt: skip

    def _id(self, file: Found, sha256: str) -> str:
        if self._wishes.id_from == "random":
            return str(uuid.uuid4())
        if self._wishes.id_from == "content":
            return content_id(sha256)
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise UndecodableImageError("the file's name is not UTF-8, so it cannot be an id") from None
        return file.name

    async def _wait_for_turn(self) -> None:
        if self._wishes.rate_per_second is None:
            return
        now = time.monotonic()
        # Time lost is not made up for: a pause must not end in a burst.
        mine = max(self._next_at, now)
        self._next_at = mine + 1 / self._wishes.rate_per_second
        await asyncio.sleep(mine - now)


def printable_path(path: Path) -> str:
    """Return a path as text that can be encoded, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _look(path: Path) -> tuple[bytes | None, int]:
    """Return a file's first bytes and its size; no bytes for a pipe or device, which might never give any."""
    if not stat.S_ISREG(path.stat().st_mode):
        return None, 0
    with path.open("rb") as file:
        return file.read(formats.HEAD_BYTES), os.fstat(file.fileno()).st_size


def _why_not(size: int, media_type: str | None) -> str:
    if size == 0:
        return "the file is empty"
    if media_type is not None:
        return f"{media_type} is not supported"
    return "its first bytes are not those of a picture"


def _report(tally: Tally, seconds: float) -> None:
    for failure in tally.failures:
        say(f"{failure.path}: {failure.error}")
    if tally.failed > len(tally.failures):
        say(f"... and {tally.failed - len(tally.failures):,} more")
    parts = [f"published {counted(tally.published, 'picture')} in {seconds:.1f} s"]
    if tally.published and seconds > 0:
        parts[0] += f" ({tally.published / seconds:,.0f} per second)"
    if tally.failed:
        parts.append(f"{tally.failed:,} failed")
    if tally.skipped:
        parts.append(f"{tally.skipped:,} skipped as no pictures")
    say("; ".join(parts))
