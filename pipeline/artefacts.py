"""Files of models in the object store, by digest: put there by the command line, fetched by replicas.

A file is never overwritten by another one, as its digest is part of its key, and never used before its digest
was checked, however it came into the folder. It stays for as long as a version names it.
"""

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline import logs
from pipeline.deployments import Artefact, Registry
from pipeline.errors import ConfigurationError
from pipeline.objects import ObjectStore

ARTEFACTS_PREFIX = "models"
FILE_SOURCE = "file:"
# What tensors do not say about themselves may lie beside them (`pipeline/models/file_source.py`).
CARD_ENDING = ".json"
# A file is uploaded before the version that names it is activated, the first of many large ones long before.
UPLOAD_SECONDS = 24 * 3600.0
# Exactly what `object_key` makes: others may keep folders of the same name in the store.
_OUR_KEY = re.compile(rf"{ARTEFACTS_PREFIX}/[0-9a-f]{{64}}/[A-Za-z0-9_-][A-Za-z0-9._-]{{0,127}}")

_log = logs.get(__name__)


def object_key(artefact: Artefact) -> str:
    """Return where a file is kept."""
    return f"{ARTEFACTS_PREFIX}/{artefact.sha256}/{artefact.name}"


def path_of(specification: str) -> str | None:
    """Return the path in a `file:` specification; None for the other sources."""
    if not specification.startswith(FILE_SOURCE):
        return None
    return specification.removeprefix(FILE_SOURCE).partition("?")[0].partition("#")[0]


def with_path(specification: str, path: str) -> str:
    """Return a `file:` specification with another path."""
    old = path_of(specification)
    assert old is not None
    return FILE_SOURCE + path + specification[len(FILE_SOURCE) + len(old) :]


async def upload(objects: ObjectStore, specifications: Sequence[str]) -> tuple[list[str], list[Artefact]]:
    """Put the files that `file:` specifications name, and their cards, into the object store.

    Returns the specifications with bare file names, as they are the same for every replica, and the files.

    Raises:
        ConfigurationError: a file is not there, or two of different contents have the same name.
        DependencyError: the store does not take it now.
    """
    bare: list[str] = []
    found: dict[str, Artefact] = {}
    for specification in specifications:
        path = path_of(specification)
        if path is None:
            bare.append(specification)
            continue
        bare.append(with_path(specification, Path(path).name))
        for file in _with_card(Path(path)):
            artefact = await asyncio.to_thread(_describe, file)
            if found.setdefault(artefact.name, artefact) != artefact:
                raise ConfigurationError(f"two different files are named {artefact.name}: rename one")
            await objects.put_file(object_key(artefact), file)
    return bare, list(found.values())


async def fetch(objects: ObjectStore, artefacts: Sequence[Artefact], cache: Path) -> Path:
    """Return the folder with these files, fetching what is not there; a wrong digest is fetched again once.

    Raises:
        MissingImageError: the store does not have one of them.
        ConfigurationError: what the store has is another file, or the folder cannot be written.
        DependencyError: the store does not answer now.
    """
    identity = "\0".join(f"{artefact.name}\0{artefact.sha256}" for artefact in artefacts)
    folder = cache / "artefacts" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for artefact in artefacts:
            path = folder / artefact.name
            if await asyncio.to_thread(_has_digest, path, artefact):
                continue
            # Another replica on this machine may do the same: each writes its own, the last one stays.
            partial = folder / f".{artefact.name}.{secrets.token_hex(4)}"
            try:
                await objects.get_file(object_key(artefact), partial, artefact.size_bytes)
                if not await asyncio.to_thread(_has_digest, partial, artefact):
                    raise ConfigurationError(
                        f"the object {object_key(artefact)} is not the file that was activated: its digest differs"
                    )
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"MILLRACE_MODEL_CACHE: {folder}: {error.strerror or error}") from error
    return folder


def named_in(registry: Registry) -> set[Artefact]:
    """Return the files of what deployments should run, and of what they would fall back to."""
    versions = [desired.version for running in registry if (desired := running.desired)]
    versions += [
        desired.predecessor for running in registry if (desired := running.desired) and desired.predecessor
    ]
    return {artefact for version in versions for artefact in version.artefacts}


async def remove_unused(
    objects: ObjectStore, before: datetime, used: Callable[[], Awaitable[Iterable[Artefact]]]
) -> int:
    """Delete files from before a moment that no version names, and return how many; those of the last day stay.

    `used` is asked after the files were listed, and each is looked at again right before it goes, in case somebody
    has just uploaded it once more.

    Raises:
        DependencyError: the store does not answer now; also whatever `used` raises.
    """
    before = min(before, datetime.now(UTC) - timedelta(seconds=UPLOAD_SECONDS))
    old = await _older(objects, ARTEFACTS_PREFIX, before)
    unused = old - {object_key(artefact) for artefact in await used()} if old else old
    count = 0
    for key in sorted(unused):
        if key in await _older(objects, key.rpartition("/")[0], before):
            await objects.delete([key])
            _log.info("a file of a model was deleted", key=key)
            count += 1
    return count


async def _older(objects: ObjectStore, folder: str, before: datetime) -> set[str]:
    """Return our files in a folder that were put there before a moment."""
    return {
        item.key
        async for page in objects.list(folder)
        for item in page
        if item.modified_at < before and _OUR_KEY.fullmatch(item.key)
    }


def _with_card(path: Path) -> list[Path]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: there is no such file on this machine")
    card = path.with_name(path.name + CARD_ENDING)
    return [path, card] if card.is_file() else [path]


def _describe(path: Path) -> Artefact:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Artefact(path.name, digest, file.tell())
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None


def _has_digest(path: Path, artefact: Artefact) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != artefact.size_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == artefact.sha256
    except FileNotFoundError:
        return False
