"""What the database keeps, as values: one struct per table row, and the reading of rows. No SQL, no I/O."""

from datetime import datetime
from typing import Literal

import asyncpg
import msgspec

from pipeline.deadletters import DeadLetter
from pipeline.deployments import Artefact, ModelIdentity
from pipeline.events import Headers, ModelResult, Prediction, Receipt, Record

State = Literal["accepted", "predicted", "dead_lettered", "expired"]


class ImageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One image: where its record is, whose picture it was, where its bytes are kept."""

    image_id: str
    lane: str
    topic: str
    partition: int
    offset: int
    published_at: datetime
    source: str
    sha256: str | None = None
    size_bytes: int | None = None
    content_type: str | None = None
    #: None until the object is really there.
    object_key: str | None = None
    expires_at: datetime | None = None


class TracedImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an image came from, when it was kept, and whether a person deleted it; None: not stored."""

    lane: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    published_at: datetime | None = None
    size_bytes: int | None = None
    source: str | None = None
    object_key: str | None = None
    #: When its row was written, by `archive` or the gateway.
    stored_at: datetime | None = None
    deleted_at: datetime | None = None


class SavedImage(msgspec.Struct, frozen=True):
    """What became of one image that was to be saved.

    `conflict`: another picture has this id already, and stays. `deleted`: a person deleted the id after this
    record was published, so it was not stored.
    """

    status: Literal["stored", "repeat", "conflict", "deleted"]
    #: Where the stored picture is; None while nobody put it there.
    object_key: str | None = None


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one batch. Predictions: each is counted once in the first four."""

    #: Inserted, or an `expired` replaced by `predicted`.
    stored: int = 0
    #: Already there for the same picture.
    repeats: int = 0
    #: Already there for another picture, which stays.
    conflicts: int = 0
    #: Of images that a person deleted.
    deleted: int = 0
    #: Dead letters inserted; the others were there, or their image was deleted.
    dead_letters: int = 0


class StoredPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction without its embeddings, and its place in the order of storing (the cursor for paging)."""

    position: int
    stored_at: datetime
    prediction: Prediction
    #: When the broker appended its record; None where its topic keeps no such time.
    published_at: datetime | None = None


class StoredDeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter with its number; in lists the record's value is left out."""

    id: int
    stored_at: datetime
    letter: DeadLetter
    value_bytes: int | None = None
    redriven_at: datetime | None = None


class ImageState(msgspec.Struct, frozen=True, kw_only=True):
    """State of an image in one deployment.

    A prediction wins over a dead letter, an open dead letter over `expired`; a redriven one counts no more.
    """

    state: State
    code: str | None = None
    reason: str | None = None
    dead_letter_id: int | None = None


class Expired(msgspec.Struct, frozen=True, kw_only=True):
    """What one round of retention deleted; the objects are queued, not yet gone."""

    images: int = 0
    predictions: int = 0
    dead_letters: int = 0
    object_keys: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was left to delete."""
        return not (self.images or self.predictions or self.dead_letters)


class ModelReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a version on one replica."""

    replica: str
    state: Literal["runs", "refused"]
    #: Since when it ran there, or when it was refused.
    since: datetime
    models: tuple[ModelIdentity, ...] = ()
    reason: str | None = None


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A version of a deployment's models, as the history has it."""

    deployment: str
    revision: int
    models: tuple[str, ...]
    activated_by: str
    activated_at: datetime
    artefacts: tuple[Artefact, ...] = ()
    predecessor: int | None = None
    note: str | None = None
    #: In the order of their times.
    reports: tuple[ModelReport, ...] = ()


class ResultPlace(msgspec.Struct, frozen=True):
    """One result, for accounting."""

    image_id: str
    deployment: str
    outcome: str
    prediction_id: str
    #: False: results of a newer version of the deployment's models are shown in its place.
    is_newest: bool


class DeadLetterPlace(msgspec.Struct, frozen=True):
    """One dead letter, for accounting."""

    image_id: str | None
    group: str
    topic: str
    partition: int
    offset: int
    code: str
    redriven: bool


class Accounting(msgspec.Struct, frozen=True):
    """Everything stored about some images."""

    results: tuple[ResultPlace, ...]
    dead_letters: tuple[DeadLetterPlace, ...]


_models_decoder = msgspec.json.Decoder(tuple[ModelResult, ...])
_receipt_decoder = msgspec.json.Decoder(Receipt)
_headers_decoder = msgspec.json.Decoder(Headers)
_strings_decoder = msgspec.json.Decoder(tuple[str, ...])
_artefacts_decoder = msgspec.json.Decoder(tuple[Artefact, ...])
_reports_decoder = msgspec.json.Decoder(tuple[ModelReport, ...])


def read_prediction(row: asyncpg.Record) -> StoredPrediction:
    """Read a row of `predictions`."""
    return StoredPrediction(
        position=row["position"],
        stored_at=row["stored_at"],
        published_at=row["published_at"],
        prediction=Prediction(
            id=row["prediction_id"],
            image_id=row["image_id"],
            deployment=row["deployment"],
            lane=row["lane"],
            outcome=row["outcome"],
            time=row["predicted_at"],
            receipt=_receipt_decoder.decode(row["receipt"]),
            models=_models_decoder.decode(row["models"]),
            revision=row["revision"],
            reason=row["reason"],
            traceparent=row["traceparent"],
        ),
    )


def read_dead_letter(row: asyncpg.Record) -> StoredDeadLetter:
    """Read a row of `dead_letters`."""
    return StoredDeadLetter(
        id=row["id"],
        stored_at=row["stored_at"],
        redriven_at=row["redriven_at"],
        value_bytes=row["value_bytes"],
        letter=DeadLetter(
            group=row["consumer_group"],
            record=Record(
                topic=row["topic"],
                partition=row["partition"],
                offset=row["offset"],
                timestamp_ms=row["timestamp_ms"],
                key=row["key"],
                value=row["value"],
                headers=_headers_decoder.decode(row["headers"]),
            ),
            code=row["code"],
            reason=row["reason"],
            failed_at=row["failed_at"],
            attempts=row["attempts"],
            image_id=row["image_id"],
            value_ref=row["value_ref"],
        ),
    )


def read_model_version(row: asyncpg.Record) -> ModelVersion:
    """Read a row of `model_history`."""
    return ModelVersion(
        **{
            name: row[name]
            for name in ("deployment", "revision", "activated_by", "activated_at", "predecessor", "note")
        },
        models=_strings_decoder.decode(row["models"]),
        artefacts=_artefacts_decoder.decode(row["artefacts"]),
        reports=_reports_decoder.decode(row["reports"]),
    )


def encode_headers(headers: Headers) -> str:
    """Encode headers for a `json` column: values as base64, a null value as an empty one."""
    return msgspec.json.encode([(name, value or b"") for name, value in headers]).decode()
