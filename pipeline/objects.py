"""The object store: pictures too large for Kafka, archived pictures, values no broker would take.

A folder, S3, Google Cloud Storage or Azure behind one small interface. Keys must match `events.OBJECT_KEY`:
nothing outside the store's root can be named. A put is atomic: an object is there whole or not at all.
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url
from obstore.store import ObjectStore as Backend

from pipeline.errors import (
    ConfigurationError,
    ContractError,
    DependencyError,
    ImageTooLargeError,
    MillraceError,
    MissingImageError,
)
from pipeline.events import MAX_OBJECT_KEY_CHARACTERS, OBJECT_KEY
from pipeline.rotation import Rotated
from pipeline.settings import PREFIX, Settings

T = TypeVar("T")

IMAGES_PREFIX = "images"
DEAD_LETTERS_PREFIX = "dead-letters"

_SCHEMES = frozenset({"s3", "gs", "az"})
# Uploads and downloads at once; they wait for the network, not for a core.
_THREADS = 16
# We retry for ever ourselves, and say so in a metric; the client only bridges a dropped connection.
_RETRIES = 2
_RETRY_SECONDS = timedelta(seconds=20)
_PIECE_BYTES = 4 * 1024 * 1024


class StoredObject(NamedTuple):
    """What a listing says about one object."""

    key: str
    size_bytes: int
    modified_at: datetime


def image_key(image_id: str, sha256: str | None = None) -> str:
    """Return where a picture is kept: by the digests of its id and of its bytes, never by the id itself.

    Without its own digest, pictures of the same id share one key.
    """
    digest = hashlib.sha256(image_id.encode()).hexdigest()
    return f"{IMAGES_PREFIX}/{digest[:2]}/{digest}/{sha256 or 'picture'}"


def dead_letter_key(group: str, topic: str, partition: int, offset: int) -> str:
    """Return where a dead letter's value is kept when the broker refuses to carry it."""
    digest = hashlib.sha256("\0".join((group, topic, str(partition), str(offset))).encode()).hexdigest()
    return f"{DEAD_LETTERS_PREFIX}/{digest[:2]}/{digest}"


class ObjectStore:
    """One process's way to the object store; safe to use from many tasks at once."""

    def __init__(self, store: Backend | Rotated[Backend], root: Path | None = None) -> None:
        self._given = store
        self._root = root
        # obstore's own coroutines abort the process when it ends just after one (tried: 1 in 25); its
        # blocking calls do not, and release the GIL.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    @classmethod
    def open(cls, settings: Settings) -> "ObjectStore":
        """Prepare the store that the settings name; a folder is made, a bucket must exist.

        Credentials come from where the provider's own tools look for them (`AWS_*`, `GOOGLE_*`, `AZURE_*`), and
        from the folder that the settings name, which is followed.

        Raises:
            ConfigurationError: the URL names no store, or its settings are incomplete.
        """
        if settings.object_store_credentials is not None:
            return cls(_follow(settings.resolved_object_store, settings.object_store_credentials))
        url = settings.resolved_object_store
        try:
            parts = urlsplit(url)
            if parts.scheme in _SCHEMES:
                return cls(_bucket(url, {}))
            if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
                return cls._local(Path(unquote(parts.path)))
            if parts.scheme or not url:
                raise ValueError("must be a folder or start with file:///, s3://, gs:// or az://")
            return cls._local(Path(url))
        except (BaseError, OSError, ValueError) as error:
            raise ConfigurationError(
                f"{PREFIX}OBJECT_STORE_URL: {_first_line(error)} (got {url[:80]!r})"
            ) from None

    @classmethod
    def _local(cls, folder: Path) -> "ObjectStore":
        folder.mkdir(parents=True, exist_ok=True)
        root = folder.resolve()
        return cls(LocalStore(root, automatic_cleanup=True), root)

    @property
    def _store(self) -> Backend:
        return self._given.newest() if isinstance(self._given, Rotated) else self._given

    def close(self) -> None:
        """Start no more calls; those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def put(self, key: str, data: bytes) -> None:
        """Store an object whole, over an older one; it is durable when this returns.

        Raises:
            ContractError: the key is not an object key.
            DependencyError: the store does not take it now.
        """
        _check_key(key)
        await self._run(lambda: self._put(key, data))

    async def get(self, key: str, max_bytes: int) -> bytes:
        """Return an object; its size is known before its bytes are read.

        Raises:
            ContractError: the key is not an object key.
            MissingImageError: there is no such object.
            ImageTooLargeError: it has more than `max_bytes`; nothing was read.
            DependencyError: the store does not answer now.
        """
        _check_key(key)
        return await self._run(lambda: self._get(key, max_bytes))

    async def put_file(self, key: str, path: Path) -> None:
        """Store a file as `put` does, without reading all of it into memory."""
        _check_key(key)
        await self._run(lambda: self._put(key, path))

    async def get_file(self, key: str, path: Path, max_bytes: int) -> None:
        """Write an object to a file, piece by piece.

        Raises:
            OSError: the file cannot be made.
            ContractError, MissingImageError, ImageTooLargeError, DependencyError: as `get` does.
        """
        _check_key(key)
        with path.open("wb") as file:
            await self._run(lambda: self._get_file(key, file, max_bytes))

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error.

        Raises:
            ContractError, DependencyError: as `put` does.
        """
        for key in keys:
            _check_key(key)
        if keys:
            await self._run(lambda: self._delete(keys))

    async def list(self, prefix: str) -> AsyncIterator[list[StoredObject]]:
        """Yield pages of the objects in a folder and below it, in no order.

        Raises:
            DependencyError: the store does not answer now.
        """
        stream = obstore.list(self._store, prefix, chunk_size=1000)
        while page := await self._run(lambda: next(stream, None)):
            yield [StoredObject(item["path"], item["size"], item["last_modified"]) for item in page]

    async def ping(self) -> None:
        """See that the store answers; that a certain object is not there is an answer.

        Raises:
            DependencyError: it does not.
        """
        await self._run(self._head)

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except MillraceError:
            raise
        except (BaseError, OSError) as error:
            raise DependencyError(f"object store: {_first_line(error)}") from error

    def _put(self, key: str, data: bytes | Path) -> None:
        # One request, never multipart: atomic everywhere, and an abandoned one leaves nothing to pay for.
        obstore.put(self._store, key, data, use_multipart=False)
        if self._root is not None:
            _sync(self._root, self._root / key)

    def _get(self, key: str, max_bytes: int) -> bytes:
        return self._found(key, max_bytes).bytes().to_bytes()

    def _get_file(self, key: str, file: BinaryIO, max_bytes: int) -> None:
        file.writelines(self._found(key, max_bytes).stream(min_chunk_size=_PIECE_BYTES))

    def _found(self, key: str, max_bytes: int) -> "obstore.GetResult":
        try:
            found = obstore.get(self._store, key)
        except FileNotFoundError:
            raise MissingImageError(f"there is no object {key}") from None
        size = found.meta["size"]
        if size > max_bytes:
            raise ImageTooLargeError(f"object {key} has {size:,} bytes, the limit is {max_bytes:,}")
        return found

    def _delete(self, keys: Sequence[str]) -> None:
        try:
            obstore.delete(self._store, keys)  # one request for a thousand, where the provider can
        except FileNotFoundError:
            # Only some providers say so, and stop there.
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, key)

    def _head(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.head(self._store, f"{IMAGES_PREFIX}/ping")


def _bucket(url: str, config: Mapping[str, str]) -> Backend:
    """Open a bucket, with what is given in place of what the environment says."""
    # No client options: they would replace those from the environment (AWS_ALLOW_HTTP for MinIO).
    retries = {"max_retries": _RETRIES, "retry_timeout": _RETRY_SECONDS}
    return from_url(url, config=dict(config), retry_config=retries)  # type: ignore[call-overload, no-any-return]


def _follow(url: str, folder: Path) -> Rotated[Backend]:
    """Open a bucket with the variables that the files of a folder are named as; again when they change."""
    setting = f"{PREFIX}OBJECT_STORE_CREDENTIALS"

    def names() -> list[str]:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))

    def read() -> Backend:
        try:
            config = {name: (folder / name).read_text("utf-8").strip() for name in names()}
            if not config or not all(config.values()):
                raise ValueError("there is no file in it, or an empty one")
            return _bucket(url, config)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigurationError(f"{setting}: {folder}: {_first_line(error)}") from None

    if urlsplit(url).scheme not in _SCHEMES:
        raise ConfigurationError(f"{setting}: is for buckets, and {PREFIX}OBJECT_STORE_URL is none")
    try:
        files = [folder / name for name in names()]
    except OSError as error:
        raise ConfigurationError(f"{setting}: {folder}: {error.strerror}") from None
    # The folder too: Kubernetes changes a link in it.
    return Rotated(setting, [folder, *files], read)


def _check_key(key: str) -> None:
    if len(key) > MAX_OBJECT_KEY_CHARACTERS or not OBJECT_KEY.fullmatch(key):
        raise ContractError(f"not an object key: {key[:80]!r}")


def _sync(root: Path, path: Path) -> None:
    """Survive a power cut: obstore renames the file into place but leaves writing it to the system."""
    for place in (path, *path.relative_to(root).parents):
        descriptor = os.open(root / place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
