"""Writing batches inside a transaction that the caller holds: one statement per table.

A statement may not meet the same key twice, so duplicates within a batch are settled here, by the same rules
as those against stored rows.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from pipeline.deadletters import MAX_COPIED_HEADER_BYTES, MAX_REASON_CHARACTERS, DeadLetter
from pipeline.deployments import Desired, Status
from pipeline.errors import ContractError, StorageRefusedError
from pipeline.events import (
    MAX_ID_CHARACTERS,
    MAX_OBJECT_KEY_CHARACTERS,
    OBJECT_KEY,
    Prediction,
    decode_embedding,
)
from pipeline.postgres import QUERIES, Connection
from pipeline.results import ImageRow, SavedImage, encode_headers

_MAX_NAME_CHARACTERS = 255
_MAX_INTEGER = 2**31 - 1
_MAX_BIGINT = 2**63 - 1
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)


async def save_predictions(
    connection: Connection, predictions: Sequence[Prediction], published_at: Sequence[datetime | None]
) -> Counter[str]:
    """Store predictions with their embeddings; count `stored`, `repeats`, `conflicts` and `deleted`.

    Raises:
        StorageRefusedError: an embedding is not what it says.
    """
    #: By id the place in the batch of the one that counts.
    first: dict[str, int] = {}
    revisions: dict[str, int] = {}
    for place, prediction in enumerate(predictions):
        revisions[prediction.id] = max(prediction.revision, revisions.get(prediction.id, 0))
        known = first.get(prediction.id)
        if known is None or _replaces(prediction, predictions[known]):
            first[prediction.id] = place
    columns = _transposed([_prediction(predictions[place], published_at[place]) for place in first.values()])
    stored = {row["prediction_id"] for row in await connection.fetch(QUERIES["save_predictions"], *columns)}
    await _save_embeddings(connection, [predictions[place] for key, place in first.items() if key in stored])
    counts = Counter(stored=len(stored))
    if len(stored) == len(predictions):
        return counts
    # A statement of its own sees what other writers committed meanwhile.
    await connection.execute(QUERIES["raise_revisions"], *_transposed(sorted(revisions.items())))
    found = await connection.fetch(QUERIES["prediction_identities"], list(first))
    kept = {row["prediction_id"]: (row["image_id"], row["input_sha256"]) for row in found}
    for place, prediction in enumerate(predictions):
        if prediction.id in stored and first[prediction.id] == place:
            stored.remove(prediction.id)  # the others of the batch met this one
        else:
            counts[_met(prediction, kept.get(prediction.id))] += 1
    return counts


def _replaces(new: Prediction, old: Prediction) -> bool:
    """Whether `predicted` takes the place of `expired`; the statement decides the same for stored rows."""
    return (
        (old.outcome, new.outcome) == ("expired", "predicted")
        and (old.image_id, old.deployment) == (new.image_id, new.deployment)
        and not _differ(old.receipt.input_sha256, new.receipt.input_sha256)
    )


def _met(prediction: Prediction, kept: tuple[str, str | None] | None) -> str:
    """Name what a prediction that was not stored met: (image id, digest) of the stored one."""
    if kept is None:
        return "deleted"
    image_id, sha256 = kept
    another = image_id != prediction.image_id or _differ(sha256, prediction.receipt.input_sha256)
    return "conflicts" if another else "repeats"


def _differ(old: str | None, new: str | None) -> bool:
    return old is not None and new is not None and old != new


def _prediction(prediction: Prediction, published_at: datetime | None) -> tuple[Any, ...]:
    """Return one row in the order of `save_predictions`."""
    models = [msgspec.structs.replace(result, embedding=None) for result in prediction.models]
    return (
        prediction.id,
        prediction.image_id,
        prediction.deployment,
        prediction.lane,
        prediction.outcome,
        msgspec.json.encode(models).decode(),
        msgspec.json.encode(prediction.receipt).decode(),
        prediction.receipt.input_sha256,
        prediction.reason,
        prediction.traceparent,
        prediction.time,
        prediction.revision,
        published_at,
    )


async def _save_embeddings(connection: Connection, predictions: Sequence[Prediction]) -> None:
    # One flat array of all numbers: asyncpg encodes it in C, and no type of pgvector must be known to it.
    numbers = array("f")
    rows: list[tuple[str, str, str, int, int]] = []
    for prediction in predictions:
        for result in prediction.models:
            if result.embedding is not None:
                start = len(numbers)
                numbers.extend(_floats(result.embedding, result.dimension))
                rows.append((prediction.id, result.model, result.version, start, len(numbers)))
    if rows:
        await connection.execute(QUERIES["save_embeddings"], *_transposed(rows), numbers)


def _floats(encoded: str, dimension: int | None) -> "array[float]":
    """Decode a vector; one that is none is refused like any row that the table does not take."""
    try:
        return decode_embedding(encoded, dimension)
    except ContractError as error:
        raise StorageRefusedError(error.message) from None


async def save_dead_letters(connection: Connection, letters: Sequence[DeadLetter]) -> int:
    """Store dead letters; return how many were new."""
    first = {(*letter.place, letter.record.timestamp_ms): letter for letter in reversed(letters)}
    columns = _transposed([_dead_letter(letter) for letter in first.values()])
    return len(await connection.fetch(QUERIES["save_dead_letters"], *columns))


def _dead_letter(letter: DeadLetter) -> tuple[Any, ...]:
    """Return one row in the order of `save_dead_letters`."""
    record = letter.record
    return (
        *letter.place,
        record.timestamp_ms,
        letter.image_id,
        letter.code,
        letter.reason,
        letter.attempts,
        record.key,
        record.value,
        letter.value_ref,
        encode_headers(record.headers),
        letter.failed_at,
    )


def storable(letter: DeadLetter) -> DeadLetter:
    """Cut what the table refuses out of a dead letter that anybody may have written; the value stays."""
    record = letter.record
    return msgspec.structs.replace(
        letter,
        group=_plain(letter.group, _MAX_NAME_CHARACTERS),
        record=msgspec.structs.replace(
            record,
            topic=_plain(record.topic, _MAX_NAME_CHARACTERS),
            partition=min(max(record.partition, 0), _MAX_BIGINT),
            offset=min(max(record.offset, 0), _MAX_BIGINT),
            timestamp_ms=min(max(record.timestamp_ms, 0), _MAX_BIGINT),
            headers=tuple((_plain(name, MAX_COPIED_HEADER_BYTES), value) for name, value in record.headers),
        ),
        image_id=_plain(letter.image_id, MAX_ID_CHARACTERS) if letter.image_id else None,
        code=_plain(letter.code, _MAX_NAME_CHARACTERS),
        reason=_plain(letter.reason, MAX_REASON_CHARACTERS),
        attempts=min(max(letter.attempts, 1), _MAX_INTEGER),
        # A shortened key would be another object's.
        value_ref=letter.value_ref if letter.value_ref and _is_object_key(letter.value_ref) else None,
        failed_at=min(max(letter.failed_at, _EARLIEST), _LATEST),
    )


def _is_object_key(text: str) -> bool:
    return len(text) <= MAX_OBJECT_KEY_CHARACTERS and OBJECT_KEY.fullmatch(text) is not None


def _plain(text: str, max_characters: int) -> str:
    return text.encode("utf-8", "replace").decode().replace("\x00", "\\0")[:max_characters]


async def save_images(connection: Connection, images: Sequence[ImageRow]) -> list[SavedImage]:
    """Store images; say of each, in the given order, what became of it and where the kept picture is."""
    first = {image.image_id: image for image in reversed(images)}
    columns = _transposed([_image(image) for image in first.values()])
    written = await connection.fetch(QUERIES["save_images"], *columns)
    inserted = {row["image_id"] for row in written if row["inserted"]}
    # A statement of its own sees what other writers committed meanwhile.
    kept = {
        row["image_id"]: ImageRow(**row) for row in await connection.fetch(QUERIES["images"], list(first))
    }
    saved = []
    for image in images:
        old = kept.get(image.image_id)
        if old is None:
            saved.append(SavedImage("deleted"))
        elif image.image_id in inserted:
            inserted.remove(image.image_id)  # the others of the batch met this one
            saved.append(SavedImage("stored", old.object_key))
        else:
            saved.append(SavedImage("conflict" if _another_picture(old, image) else "repeat", old.object_key))
    return saved


def _another_picture(old: ImageRow, new: ImageRow) -> bool:
    """Compare digests or, where one is unknown, objects; the statement decides the same."""
    if old.sha256 and new.sha256:
        return old.sha256 != new.sha256
    return _differ(old.object_key, new.object_key)


def _image(image: ImageRow) -> tuple[Any, ...]:
    """Return one row in the order of `save_images`."""
    return (
        image.image_id,
        image.lane,
        image.topic,
        image.partition,
        image.offset,
        image.published_at,
        image.sha256,
        image.size_bytes,
        image.content_type,
        image.object_key,
        image.source,
        image.expires_at,
    )


async def save_models(connection: Connection, values: Sequence[Desired | Status]) -> None:
    """Add versions and what replicas say of them to the history."""
    versions = {_version_key(value): value for value in reversed(values) if isinstance(value, Desired)}
    if versions:
        rows = [_version(version) for version in versions.values()]
        await connection.execute(QUERIES["save_model_versions"], *_transposed(rows))
    reports = {
        report[:5]: report for value in values if isinstance(value, Status) for report in _reports(value)
    }
    if reports:
        await connection.execute(QUERIES["save_model_reports"], *_transposed(list(reports.values())))


def _version_key(desired: Desired) -> tuple[str, int, datetime]:
    return desired.deployment, desired.version.revision, desired.activated_at


def _version(desired: Desired) -> tuple[Any, ...]:
    """Return one row in the order of `save_model_versions`."""
    version = desired.version
    return (
        desired.deployment,
        version.revision,
        desired.activated_at,
        desired.activated_by,
        msgspec.json.encode(version.models).decode(),
        msgspec.json.encode(version.artefacts).decode(),
        desired.predecessor.revision if desired.predecessor else None,
        desired.note,
    )


def _reports(status: Status) -> Iterator[tuple[Any, ...]]:
    """Return rows in the order of `save_model_reports`: what runs, and what was refused."""
    if status.revision is not None and status.since is not None:
        models = msgspec.json.encode(status.models).decode()
        yield status.deployment, status.revision, status.replica, "runs", status.since, models, None
    if (refused := status.refused) is not None:
        reason = refused.reason[:500]
        yield status.deployment, refused.revision, status.replica, "refused", refused.time, "[]", reason


def _transposed(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Turn rows into one array per column."""
    return [list(column) for column in zip(*rows, strict=True)]
