"""Results: an image's state and predictions, and waiting for them.

The database is the truth; the live reader only makes waiting quick. A wait asks both, so it neither misses a
result that came before it nor one that the live reader skipped.
"""

import asyncio
import re
import time
from collections.abc import Awaitable
from contextlib import nullcontext
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

import msgspec
from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import Response

from gateway import examples
from gateway.auth import KeyRequired
from gateway.live import Live, Result, Watch
from gateway.problems import Problem, responses
from gateway.views import (
    DeploymentState,
    Failure,
    ImageView,
    JSONResponse,
    Predictions,
    PredictionView,
    State,
    describe,
    links,
)
from pipeline import events, trace
from pipeline.database import Database
from pipeline.errors import ContractError, DependencyError
from pipeline.events import Prediction
from pipeline.results import ImageState
from pipeline.trace import Trace

# Proxies commonly cut a silent connection after 60 s.
MAX_WAIT_SECONDS = 60
# A page that waits for the database this long is broken for a person.
READ_SECONDS = 5.0
# The database's answers, and what is asked of Kafka beside them.
TRACE_SECONDS = READ_SECONDS + trace.KAFKA_SECONDS
# How often a wait looks at the database; with a working live reader a result is there long before.
POLL_SECONDS = 2.0
MAX_DEPLOYMENTS = 100

_PREFERENCE = re.compile(
    r'\s*(?P<name>[!#$%&\'*+.^_`|~0-9A-Za-z-]+)\s*(?:=\s*"?(?P<value>[^";]*)"?\s*)?(?:;.*)?'
)
T = TypeVar("T")
EveryVersion = Annotated[
    bool,
    Query(
        alias="all",
        description="Also what older versions of a deployment's models said, not only the newest.",
    ),
]

router = APIRouter(tags=["images"], dependencies=[KeyRequired])


async def decoded_id(
    segment: Annotated[
        str,
        Path(alias="id", description="The image's id, percent-encoded as one segment (a slash is `%2F`)."),
    ],
) -> str:
    """Return the id a path names; `Boundary` leaves the path encoded.

    Raises:
        Problem: 404, as nothing can have such an id.
    """
    try:
        image_id = unquote(segment, errors="strict")
        events.check_id(image_id)
    except (UnicodeDecodeError, ContractError):
        raise unknown_image() from None
    return image_id


ImageId = Annotated[str, Depends(decoded_id)]
Prefer = Annotated[
    list[str] | None,
    Header(
        description="`wait=N`: answer when the result is there, or after N seconds (at most 60; RFC 7240)."
    ),
]


def wait_seconds(prefer: list[str] | None) -> int:
    """Return the seconds of a `Prefer: wait=N`, at most `MAX_WAIT_SECONDS`; 0 without one.

    Preferences that cannot be read are ignored, as RFC 7240 asks; of several, the first counts.
    """
    for preference in ",".join(prefer or ()).split(","):
        match = _PREFERENCE.fullmatch(preference)
        if match and match["name"].lower() == "wait":
            value = (match["value"] or "").strip()
            is_number = value.isascii() and value.isdigit() and len(value) < 10
            return min(int(value), MAX_WAIT_SECONDS) if is_number else 0
    return 0


@router.get(
    "/v1/images/{id}",
    responses=describe(200, ImageView, "What is known of the image.", examples.PREDICTED)
    | responses("unauthorized", "not_found", "dependency"),
    summary="State and predictions of an image",
)
async def get_image(
    request: Request, image_id: ImageId, prefer: Prefer = None, every_version: EveryVersion = False
) -> Response:
    """Return the image's state in the default deployment, its predictions, and its state in each deployment.

    There is one prediction per deployment: that of the newest version of its models, or with `all=true` each.

    States: `accepted`, then `predicted`, `expired` or `dead_lettered`. With `Prefer: wait=N` the answer is
    held back until the state is no longer `accepted`.
    """
    state = request.app.state
    deployment: str = state.settings.deployment
    seconds = wait_seconds(prefer)
    with state.live.watch(image_id, deployment) if seconds else nullcontext() as watch:
        view = await read_view(state.database, image_id, deployment, every_version)
        headers = {}
        if watch is not None and view.state == "accepted":
            result = await outcome(state.database, state.live, watch, image_id, deployment, seconds)
            if isinstance(result, ImageState):
                view = await read_view(state.database, image_id, deployment, every_version)
            elif result is not None:
                view = with_result(view, result, deployment)
        if watch is not None:
            headers["Preference-Applied"] = f"wait={seconds}"
    return JSONResponse(view, headers=headers)


@router.get(
    "/v1/images/{id}/predictions",
    responses=describe(200, Predictions, "The predictions; none yet is an empty list.", examples.PREDICTIONS)
    | responses("unauthorized", "not_found", "dependency"),
    summary="Predictions of an image",
)
async def get_predictions(
    request: Request, image_id: ImageId, every_version: EveryVersion = False
) -> Response:
    """Return what the newest models of every deployment said about the image, oldest first; or all of them."""
    state = request.app.state
    stored = await bounded(state.database.predictions(image_id, every_version=every_version))
    if not stored and await bounded(state.database.state(image_id, state.settings.deployment)) is None:
        raise unknown_image()
    return JSONResponse(Predictions(image_id, tuple(prediction_view(row.prediction) for row in stored)))


@router.get(
    "/v1/images/{id}/trace",
    responses=describe(200, Trace, "Its way so far.", examples.TRACE)
    | responses("unauthorized", "not_found", "dependency"),
    summary="The whole way of an image",
)
async def get_trace(request: Request, image_id: ImageId) -> Response:
    """Return each station of the image's way through each deployment, with moments and durations.

    Published, received, queued, decoded, batched (with whom, and why then), forwarded, stored; or expired,
    dead-lettered, redriven; or where it waits. Stations are told from what is stored and, for outcomes that
    are not stored yet, from Kafka.
    """
    state = request.app.state
    found = await bounded(trace.trace(state.settings, state.database, image_id), TRACE_SECONDS)
    if found is None:
        raise unknown_image()
    return JSONResponse(found)


async def read_view(
    database: Database, image_id: str, deployment: str, every_version: bool = False
) -> ImageView:
    """Return what the database knows of an image.

    Raises:
        Problem: 404, it knows nothing.
        DependencyError: it does not answer in time.
    """
    state = await bounded(database.state(image_id, deployment))
    if state is None:
        raise unknown_image()
    row = await bounded(database.image(image_id))
    found_predictions = await bounded(database.predictions(image_id, every_version=every_version))
    predictions = [stored.prediction for stored in found_predictions]
    letters = await bounded(database.dead_letters(image_id=image_id, limit=MAX_DEPLOYMENTS))
    if state.state == "accepted" and (predictions or letters):
        # Stored since the state was read: an answer must not show a prediction and deny it.
        state = await bounded(database.state(image_id, deployment)) or state
    groups = (stored.letter.group.rpartition("predict.") for stored in letters)
    names = {prediction.deployment for prediction in predictions} | {
        name for _, found, name in groups if found
    }
    others = sorted(names - {deployment})[:MAX_DEPLOYMENTS]
    states = {deployment: state}
    for name in others:
        if (other := await bounded(database.state(image_id, name))) is not None:
            states[name] = other
    return ImageView(
        id=image_id,
        state=state.state,
        failure=_failure(state),
        links=links(image_id),
        lane=row.lane if row else None,
        content_type=row.content_type if row else None,
        size_bytes=row.size_bytes if row else None,
        sha256=row.sha256 if row else None,
        published_at=row.published_at if row else None,
        expires_at=row.expires_at if row else None,
        deployments={name: DeploymentState(found.state, _failure(found)) for name, found in states.items()},
        predictions=tuple(prediction_view(prediction) for prediction in predictions),
    )


async def outcome(
    database: Database, live: Live, watch: Watch, image_id: str, deployment: str, seconds: float
) -> Result | ImageState | None:
    """Wait for an image's result, from the live reader or the database; None when there is none in time."""
    deadline = time.monotonic() + seconds
    stopping = asyncio.ensure_future(live.stopping.wait())
    try:
        while (left := deadline - time.monotonic()) > 0 and not stopping.done():
            waited: list[asyncio.Future[Any]] = [watch.result, stopping]
            await asyncio.wait(waited, timeout=min(left, POLL_SECONDS), return_when=asyncio.FIRST_COMPLETED)
            if watch.result.done():
                return watch.result.result()
            try:
                found = await bounded(database.state(image_id, deployment), seconds=POLL_SECONDS)
            except DependencyError:
                continue  # the live reader may still tell
            if found is not None and found.state != "accepted":
                return found
    finally:
        stopping.cancel()
    return None


def with_result(view: ImageView, result: Result, deployment: str) -> ImageView:
    """Return the view as it will be once the result is stored."""
    if isinstance(result, Prediction):
        state: State = result.outcome
        failure = Failure("expired", result.reason or "") if state == "expired" else None
        predictions = (*view.predictions, prediction_view(result))
    else:
        state, failure, predictions = "dead_lettered", Failure(result.code, result.reason), view.predictions
    return msgspec.structs.replace(
        view,
        state=state,
        failure=failure,
        deployments=view.deployments | {deployment: DeploymentState(state, failure)},
        predictions=predictions,
    )


def prediction_view(prediction: Prediction) -> PredictionView:
    """Return a prediction as the API shows it: without embeddings, which only search needs."""
    return PredictionView(
        id=prediction.id,
        deployment=prediction.deployment,
        outcome=prediction.outcome,
        revision=prediction.revision,
        time=prediction.time,
        receipt=prediction.receipt,
        models=tuple(msgspec.structs.replace(model, embedding=None) for model in prediction.models),
        reason=prediction.reason,
    )


async def bounded(answer: Awaitable[T], seconds: float = READ_SECONDS) -> T:
    """Return the database's answer.

    Raises:
        DependencyError: not within the time.
    """
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise DependencyError(f"the database did not answer within {seconds:g} s") from None


def unknown_image() -> Problem:
    """Return the answer to an id nobody has used."""
    return Problem("not_found", "There is no image with this id.")


def _failure(state: ImageState) -> Failure | None:
    return Failure(state.code, state.reason or "") if state.code else None
