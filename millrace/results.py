"""`millrace predictions`: one image's results from the database, everybody's from Kafka as they come."""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import msgspec

from millrace import durations, tailing
from millrace.output import EXIT_FAILED, emit, say, show
from pipeline import events
from pipeline.broker import LiveReader
from pipeline.database import Database
from pipeline.results import ImageState
from pipeline.settings import Settings
from pipeline.topics import PREDICTIONS

Start = Literal["latest", "earliest"] | datetime

_FIRST_POLL_SECONDS = 0.05
_MOST_POLL_SECONDS = 1.0
TRIAGE_MODEL = "builtin:quality"


class Found(msgspec.Struct, frozen=True):
    """What `predictions get --json` prints."""

    id: str
    state: str
    code: str | None
    reason: str | None
    dead_letter: int | None
    predictions: tuple[events.Prediction, ...]


def parse_start(text: str) -> Start:
    """Read `latest`, `earliest`, how long ago (5m) or a moment (ISO 8601, UTC without a zone).

    Raises:
        ValueError: It is none of them.
    """
    if text == "latest":
        return "latest"
    if text == "earliest":
        return "earliest"
    try:
        return durations.moment(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not latest, earliest, an age such as 5m or a time such as 2026-01-31T12:00Z"
        ) from None


async def get(
    settings: Settings,
    image_id: str,
    wait_seconds: float,
    deployment: str,
    as_json: bool,
    every_version: bool = False,
) -> int:
    """Print an image's state and predictions; 0 only if the deployment has predicted it.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    database = await Database.open(settings)
    try:
        state = await _wait_for_outcome(database, image_id, deployment, wait_seconds)
        if state is None:
            say(f"nothing is known of {image_id!r}")
            return EXIT_FAILED
        found = await database.predictions(image_id, every_version=every_version)
        predictions = tuple(stored.prediction for stored in found)
    finally:
        await database.close()
    if as_json:
        emit(Found(image_id, state.state, state.code, state.reason, state.dead_letter_id, predictions))
    else:
        _show(image_id, state, predictions)
    return 0 if state.state == "predicted" else EXIT_FAILED


async def _wait_for_outcome(
    database: Database, image_id: str, deployment: str, wait_seconds: float
) -> ImageState | None:
    deadline = time.monotonic() + wait_seconds
    pause = _FIRST_POLL_SECONDS
    while True:
        state = await database.state(image_id, deployment)
        left = deadline - time.monotonic()
        if (state is not None and state.state != "accepted") or left <= 0:
            return state
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, _MOST_POLL_SECONDS)


def _show(image_id: str, state: ImageState, predictions: tuple[events.Prediction, ...]) -> None:
    show(f"{image_id}  {state.state}" + (f"  {state.code}: {state.reason}" if state.reason else ""))
    for prediction in predictions:
        show(f"  {line_of(prediction, with_id=False)}")
        for result in prediction.models:
            show(f"    {result.model} {result.version}  {_says(result)}")


def _says(result: events.ModelResult) -> str:
    parts = []
    if result.label is not None:
        parts.append(result.label if result.score is None else f"{result.label} {result.score:.2f}")
    parts += [f"{name} {score:.2f}" for name, score in result.scores.items()]
    parts += [f"{box.label} {box.score:.2f} at {box.x_min:.0f},{box.y_min:.0f}" for box in result.boxes]
    if result.embedding is not None or result.dimension is not None:
        parts.append(f"embedding of {result.dimension}")
    return "  ".join(parts)


@dataclass(frozen=True)
class TailWishes:
    """What `predictions tail` was told."""

    limit: int | None = None
    deployment: str | None = None
    #: Also of pictures that somebody only searched with.
    queries: bool = False
    as_json: bool = False


async def tail(settings: Settings, start: Start, wishes: TailWishes) -> int:
    """Print predictions as they are published, until cancelled or `limit` were printed.

    Raises:
        DependencyError: no broker answers, or the topic is missing.
    """
    reader = LiveReader(settings, [settings.topic(PREDICTIONS.name)], start=start, client_id="millrace-tail")

    def show_prediction(record: events.Record) -> bool:
        if events.is_query(record) and not wishes.queries:
            return False
        prediction = events.decode_prediction(record)
        if wishes.deployment not in (None, prediction.deployment):
            return False
        if wishes.as_json:
            emit(prediction)
        else:
            show(line_of(prediction))
        return True

    return await tailing.tail(reader, show_prediction, wishes.limit)


def line_of(prediction: events.Prediction, *, with_id: bool = True) -> str:
    """Return a prediction in one line: id, lane, deployment, what it says, where the time went, its batch."""
    receipt = prediction.receipt
    parts = [f"{prediction.image_id:<36}"] if with_id else []
    parts += [f"{prediction.lane:<8}", f"{prediction.deployment:<8}"]
    if prediction.outcome == "predicted":
        parts.append(f"{_headline(prediction):<18}")
    else:
        parts.append(f"{prediction.outcome}: {prediction.reason or ''}")
    stages = (
        ("queue", receipt.queue_seconds),
        ("decode", receipt.decode_seconds),
        ("forward", receipt.forward_seconds),
    )
    parts += [f"{name} {seconds * 1000:7.1f} ms" for name, seconds in stages if seconds is not None]
    if receipt.batch_size is not None:
        parts.append(f"batch {receipt.batch_size:>3}")
    return "  ".join(parts).rstrip()


def _headline(prediction: events.Prediction) -> str:
    """The triage label if there is one, else the first label of any model."""
    labelled = [result for result in prediction.models if result.label is not None]
    chosen = next(
        (result for result in labelled if result.model == TRIAGE_MODEL), labelled[0] if labelled else None
    )
    if chosen is None:
        return ", ".join(result.model for result in prediction.models)
    return f"{chosen.label:<12}" + ("" if chosen.score is None else f" {chosen.score:.2f}")
