"""The whole way of one picture: published, decoded, batched with whom and why, forwarded, stored, or where it is.

Told by PostgreSQL and, for what is not stored, by Kafka: how far a deployment has read, and outcomes that
`store` has yet to write. Without Kafka the trace says less; it never waits long. Moments are from several
machines' clocks, durations of decode and forward from one worker's own.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec

from pipeline import admin, deadletters, events, logs
from pipeline.database import Database
from pipeline.deadletters import DeadLetter
from pipeline.errors import ContractError, DependencyError
from pipeline.events import Prediction, Receipt, Record
from pipeline.readers import read_all
from pipeline.results import State, StoredDeadLetter, StoredPrediction, TracedImage
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, PREDICTIONS

T = TypeVar("T")

# What a person waits for an answer about one picture.
KAFKA_SECONDS = 8.0
MAX_COMPANIONS = 256
MAX_DEAD_LETTERS = 100
# A publisher's clock may be ahead of the broker's that stamped the outcome.
_CLOCKS_DIFFER = timedelta(minutes=5)
#: Why a batch was cut, for a person; a cut that is not here is told by its name.
CUTS = {
    "full": "it was full",
    "idle": "the device was free",
    "deadline": "a deadline was near",
    "drain": "the worker was stopping",
    "memory": "more did not fit into memory",
    "realtime": "real-time pictures were coming",
}

log = logs.get(__name__)


class TracedBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The batch a picture rode in."""

    #: `BATCH.N` is a part of a batch that failed or did not fit, and was run again in parts.
    id: str
    size: int
    cut: str
    #: The others whose predictions are stored; at most `MAX_COMPANIONS`.
    companions: tuple[str, ...] = ()


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One station of the way."""

    step: str
    #: When it was over; None where only its length is known.
    at: datetime | None = None
    #: How long it took.
    seconds: float | None = None
    detail: str = ""
    prediction_id: str | None = None
    dead_letter_id: int | None = None
    batch: TracedBatch | None = None


class DeploymentTrace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The way through one deployment, in the order of time."""

    deployment: str
    state: State
    steps: tuple[Step, ...] = ()


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything known of one picture's way."""

    id: str
    image: TracedImage
    deployments: tuple[DeploymentTrace, ...]
    #: What could not be asked, and so may be missing.
    unknown: str | None = None


async def trace(settings: Settings, database: Database, image_id: str) -> Trace | None:
    """Return a picture's way; None if nothing is stored of it.

    Raises:
        DependencyError: the database does not answer.
    """
    image = await database.traced_image(image_id)
    stored = await database.predictions(image_id, every_version=True)
    letters = await database.dead_letters(image_id=image_id, open_only=False, limit=MAX_DEAD_LETTERS)
    if image == TracedImage() and not stored and not letters:
        return None
    on_kafka, unknown = await _on_kafka(settings, image_id, image, stored, letters)
    names = {one.prediction.deployment for one in stored} | on_kafka.keys()
    names |= {name for letter in letters if (name := _deployment(settings, letter.letter.group))}
    if not names and image.deleted_at is None:
        names = {settings.deployment}
    deployments = []
    for name in sorted(names, key=lambda name: (name != settings.deployment, name)):
        steps = [step for one in stored if one.prediction.deployment == name
                 for step in await _predicted(database, one, image)]  # fmt: skip
        steps += [step for one in letters if _deployment(settings, one.letter.group) == name
                  for step in _dead_lettered(one)]  # fmt: skip
        steps += on_kafka.get(name, [])
        state = await database.state(image_id, name)
        deployments.append(
            DeploymentTrace(deployment=name, state=state.state if state else "accepted", steps=_sorted(steps))
        )
    return Trace(id=image_id, image=image, deployments=tuple(deployments), unknown=unknown)


async def _predicted(database: Database, one: StoredPrediction, image: TracedImage) -> list[Step]:
    """Return the stations of a stored prediction."""
    prediction = one.prediction
    batch_id = prediction.receipt.batch_id
    companions: Sequence[str] = ()
    if batch_id is not None:
        found = await database.companions(batch_id, prediction.deployment, MAX_COMPANIONS + 1)
        companions = [name for name in found if name != prediction.image_id][:MAX_COMPANIONS]
    what = "consumed and written to PostgreSQL"
    stored = Step(
        step="stored", at=one.stored_at, seconds=_between(one.published_at or prediction.time, one.stored_at),
        detail=what if one.published_at else f"published, {what}", prediction_id=prediction.id,
    )  # fmt: skip
    return [
        *_computed(prediction, image.published_at, companions),
        *_published(prediction, one.published_at),
        stored,
    ]


def _published(prediction: Prediction, appended_at: datetime | None) -> list[Step]:
    """Return the station at which the broker had the prediction, where its topic keeps that time."""
    if appended_at is None:
        return []
    # The broker's clock counts milliseconds, and may be behind the worker's: none is before what it is of.
    step = Step(
        step="published", at=max(appended_at, prediction.time), seconds=_between(prediction.time, appended_at),
        detail="the prediction, to Kafka", prediction_id=prediction.id,
    )  # fmt: skip
    return [step]


def _computed(
    prediction: Prediction, published_at: datetime | None, companions: Sequence[str] = ()
) -> list[Step]:
    """Return the stations that a prediction itself tells of, counted back from when its outcome was known."""
    receipt, known_at = prediction.receipt, prediction.time
    if prediction.outcome == "expired":
        return _expired(prediction, published_at)
    forward, decode = receipt.forward_seconds or 0.0, receipt.decode_seconds or 0.0
    queue, wait = receipt.queue_seconds or 0.0, receipt.batch_wait_seconds
    forward_at = known_at - timedelta(seconds=forward)
    received_at = forward_at - timedelta(seconds=queue + decode)
    decoded_at = None if wait is None else forward_at - timedelta(seconds=wait)
    models = ", ".join(f"{result.model} {result.version}" for result in prediction.models)
    revision = f", revision {prediction.revision}" if prediction.revision else ""
    batch = None
    if receipt.batch_id is not None:
        batch = TracedBatch(
            id=receipt.batch_id,
            size=receipt.batch_size or 1,
            cut=receipt.batch_cut or "",
            companions=tuple(companions),
        )
    steps = [
        _received(receipt, published_at, received_at),
        Step(step="queued", at=None if decoded_at is None else decoded_at - timedelta(seconds=decode),
             seconds=queue if wait is None else max(0.0, queue - wait),
             detail="before the decode" if wait is not None else "before the decode and for a batch"),
        Step(step="decoded", at=decoded_at, seconds=receipt.decode_seconds, detail=_size(receipt)),
        Step(step="batched", at=forward_at, seconds=wait, detail=_company(batch), batch=batch),
        Step(step="forwarded", at=known_at, seconds=receipt.forward_seconds,
             detail=" on ".join(filter(None, (models, receipt.device))) + revision),
    ]  # fmt: skip
    return [msgspec.structs.replace(step, prediction_id=prediction.id) for step in steps]


def _expired(prediction: Prediction, published_at: datetime | None) -> list[Step]:
    """Return how far a picture came before its deadline; a receipt of an older worker does not tell."""
    receipt, known_at = prediction.receipt, prediction.time
    expired = Step(step="expired", at=known_at, detail=prediction.reason or "")
    steps = [expired]
    if receipt.queue_seconds is not None:
        decode, wait = receipt.decode_seconds, receipt.batch_wait_seconds or 0.0
        decoded_at = known_at - timedelta(seconds=wait)
        decoding_at = known_at if decode is None else decoded_at - timedelta(seconds=decode)
        queue = max(0.0, receipt.queue_seconds - wait)
        steps = [_received(receipt, published_at, decoding_at - timedelta(seconds=queue)),
                 Step(step="queued", at=decoding_at, seconds=queue, detail="before the decode")]  # fmt: skip
        if decode is not None:
            steps += [Step(step="decoded", at=decoded_at, seconds=decode, detail=_size(receipt)),
                      Step(step="queued", at=known_at, seconds=wait, detail="for a batch")]  # fmt: skip
        steps.append(expired)
    return [msgspec.structs.replace(step, prediction_id=prediction.id) for step in steps]


def _received(receipt: Receipt, published_at: datetime | None, at: datetime) -> Step:
    return Step(step="received", at=at, seconds=_between(published_at, at),
                detail=f"from {receipt.topic}[{receipt.partition}] at {receipt.offset}")  # fmt: skip


def _size(receipt: Receipt) -> str:
    return f"{receipt.width} x {receipt.height}" if receipt.width and receipt.height else ""


def _company(batch: TracedBatch | None) -> str:
    if batch is None:
        return ""
    others = f"with {batch.size - 1} others" if batch.size > 2 else "with 1 other"
    company = others if batch.size > 1 else "alone"
    whole, _, part = batch.id.partition(".")
    in_part = f" in a part of batch {whole}, which was" if part else ""
    return f"{company},{in_part} cut because {CUTS.get(batch.cut, batch.cut)}"


def _dead_lettered(one: StoredDeadLetter) -> list[Step]:
    letter = one.letter
    steps = [
        Step(step="dead_lettered", at=letter.failed_at, detail=_fault(letter), dead_letter_id=one.id),
        Step(step="stored", at=one.stored_at, seconds=_between(letter.failed_at, one.stored_at),
             detail="as a dead letter", dead_letter_id=one.id),
    ]  # fmt: skip
    if one.redriven_at is not None:
        again = Step(step="redriven", at=one.redriven_at, dead_letter_id=one.id,
                     detail=f"published again for {letter.group}")  # fmt: skip
        steps.append(again)
    return steps


def _fault(letter: DeadLetter) -> str:
    times = f" (attempt {letter.attempts})" if letter.attempts > 1 else ""
    return f"{letter.code}: {letter.reason}{times}"


async def _on_kafka(
    settings: Settings,
    image_id: str,
    image: TracedImage,
    stored: Sequence[StoredPrediction],
    letters: Sequence[StoredDeadLetter],
) -> tuple[dict[str, list[Step]], str | None]:
    """Return what only Kafka knows, by deployment, and what could not be asked."""
    if image.topic is None or image.published_at is None or image.deleted_at is not None:
        return {}, None
    done = {one.prediction.deployment for one in stored}
    done |= {name for one in letters if (name := _deployment(settings, one.letter.group))}
    steps: dict[str, list[Step]] = {}
    try:
        async with asyncio.timeout(KAFKA_SECONDS):
            groups = await admin.lag(settings, steps=("predict",))
            behind = [
                (name, row) for row in groups
                if (row.topic, row.partition) == (image.topic, image.partition)
                and (name := _deployment(settings, row.group)) and name not in done
            ]  # fmt: skip
            passed = set()
            for name, row in behind:
                ahead = (image.offset or 0) - (row.start if row.committed is None else row.committed)
                if ahead >= 0:
                    detail = f"{ahead:,} records before it in {image.topic}[{image.partition}]"
                    if row.committed is None:
                        detail += ", of which this deployment has read nothing yet"
                    steps[name] = [Step(step="waiting", detail=detail)]
                else:
                    passed.add(name)
            if passed:
                found = await _outcomes(settings, image_id, image.published_at)
                for name in passed:
                    steps[name] = found.get(name) or [Step(
                        step="passed", detail="read and finished, with no outcome stored or on Kafka: another "
                        "record of this id was meant, or retention took the outcome")]  # fmt: skip
    except (DependencyError, TimeoutError) as error:
        log.warning("trace without Kafka", error=str(error))
        return steps, "Kafka does not answer in time: where the picture waits is not known"
    return steps, None


async def _outcomes(settings: Settings, image_id: str, since: datetime) -> dict[str, list[Step]]:
    """Return outcomes of a picture that are on Kafka, by deployment."""
    key = image_id.encode()
    steps: dict[str, list[Step]] = {}
    for record in await read_all(
        settings,
        settings.topic(PREDICTIONS.name),
        since=since - _CLOCKS_DIFFER,
        wanted=lambda record: record.key == key,
    ):
        try:
            prediction = events.decode_prediction(record)
        except ContractError:
            continue
        if prediction.image_id == image_id:
            waits = Step(step="waiting", detail="for store to write it to PostgreSQL")
            told = _published(prediction, record.appended_at)
            steps[prediction.deployment] = [*_computed(prediction, since), *told, waits]
    header = deadletters.PREFIX + "image-id"

    def is_its(record: Record) -> bool:
        return record.header(header) == key

    topic = settings.topic(DEAD_LETTERS.name)
    for record in await read_all(settings, topic, since=since - _CLOCKS_DIFFER, wanted=is_its):
        letter = deadletters.decode_dead_letter(record)
        if name := _deployment(settings, letter.group):
            steps.setdefault(name, []).append(
                Step(step="dead_lettered", at=letter.failed_at, detail=_fault(letter) + "; not stored yet")
            )
    return steps


def _deployment(settings: Settings, group: str) -> str | None:
    prefix = f"{settings.topic_prefix}predict."
    return group.removeprefix(prefix) if group.startswith(prefix) else None


def _between(start: datetime | None, end: datetime) -> float | None:
    """Return the seconds between two moments of different clocks; never less than none."""
    return None if start is None else round(max(0.0, (end - start).total_seconds()), 6)


def _sorted(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Order by time; a step without one stays behind the step before it."""
    keyed, latest = [], None
    for step in steps:
        latest = step.at or latest
        keyed.append((latest, step))
    return tuple(step for _, step in sorted(keyed, key=lambda pair: (pair[0] is None, pair[0] or 0)))
