"""A picture that is only searched with: published as a query, embedded by a worker, kept nowhere.

The deployment's own workers embed it, so that it is compared with vectors of the same model version and
preprocessing. The interest in the result is registered before the query is published; a query has a short
deadline, so that nobody works for a client that has gone.
"""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from fastapi import Request

from gateway.intake import check_picture
from gateway.live import Live, Result, Watch
from gateway.problems import KINDS, Problem
from gateway.uploads import Begun, Field, Held, Picture, read_parts, too_large
from pipeline import events
from pipeline.errors import DependencyError
from pipeline.events import Prediction
from pipeline.vectors import Embedding, Space


def choose(found: list[Embedding], model: str | None, owner: str) -> Embedding:
    """Return the embedding of the model that was asked for, or the first."""
    chosen = next((one for one in found if model in (None, one.space.model)), None)
    if chosen is None:
        known = ", ".join(one.space.model for one in found)
        raise Problem("invalid_request", f"model: {owner} has no embedding by {model}; it has {known}.")
    if not any(chosen.numbers):
        detail = f"{chosen.space.model} embeds this picture as nothing but zeros, which point nowhere."
        raise Problem("no_embedding", detail, status=422)
    return chosen


async def embed(request: Request, deployment: str, model: str | None) -> Embedding:
    """Return the embedding of the picture in the body, made by a worker of the deployment.

    Raises:
        Problem: no picture, or the worker could not use it, or there was no answer in time.
    """
    state = request.app.state
    settings, live = state.settings, state.live
    with state.memory.hold() as held:
        picture = await _read_picture(request, held)
        check_picture(picture)
        image_id = f"query-{uuid4().hex}"
        seconds = settings.search_timeout_seconds
        deadline = time.monotonic() + seconds
        await _until_reading(live, seconds)
        with live.watch(image_id, deployment) as watch:
            if watch is None:
                raise Problem("overloaded", "As many requests wait for results as the gateway can hold.")
            lent = state.intake.lend(
                picture,
                image_id,
                group=f"{settings.topic_prefix}predict.{deployment}",
                expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
            )
            async with lent:
                result = await _await(live, watch, deadline - time.monotonic())
    return _embedding_in(result, deployment, model, seconds)


async def _until_reading(live: Live, seconds: float) -> None:
    """Wait for the live reader: no result of a query is told by anybody else."""
    try:
        async with asyncio.timeout(seconds):
            await live.reading.wait()
    except TimeoutError:
        raise DependencyError("the live reader has not reached the broker yet") from None


async def _read_picture(request: Request, held: Held) -> Picture:
    picture: Picture | None = None
    begun = 0
    max_bytes = request.app.state.settings.max_image_bytes
    async for part in read_parts(request, max_bytes, held):
        if isinstance(part, Field):
            raise Problem(
                "invalid_request",
                f"Unknown form field `{part.name[:80]}`: a search has `file`; all else are query parameters.",
            )
        if isinstance(part, Begun):
            begun += 1
            if begun > 1:
                raise Problem("invalid_request", "Search with one picture at a time.")
        elif isinstance(part, Picture):
            picture = part
        else:
            raise too_large(max_bytes)
    if picture is None:
        raise Problem("invalid_request", "There is no picture: send it as `file`, or as the body.")
    return picture


async def _await(live: Live, watch: Watch, seconds: float) -> Result | None:
    """Wait for a query's result; None when there is none in time."""
    stopping = asyncio.ensure_future(live.stopping.wait())
    try:
        waited: list[asyncio.Future[Any]] = [watch.result, stopping]
        await asyncio.wait(waited, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if watch.result.done():
        return watch.result.result()
    if live.stopping.is_set():
        raise Problem("stopping", "The gateway is shutting down; search again.")
    return None


def _embedding_in(result: Result | None, deployment: str, model: str | None, seconds: float) -> Embedding:
    if result is None or (isinstance(result, Prediction) and result.outcome == "expired"):
        raise Problem(
            "search_timeout",
            f"No worker of deployment {deployment} embedded the picture within {seconds:g} s: "
            "none runs, or they are busy. Nothing was kept.",
        )
    if not isinstance(result, Prediction):
        raise Problem(result.code if result.code in KINDS else "internal", result.reason)
    found = [
        Embedding(
            prediction_id=result.id,
            image_id=result.image_id,
            deployment=result.deployment,
            space=Space(said.model, said.version, said.dimension or 0),
            numbers=events.decode_embedding(said.embedding, said.dimension),
        )
        for said in result.models
        if said.embedding is not None
    ]
    if not found:
        detail = f"No model of deployment {deployment} embeds pictures."
        raise Problem("no_embedding", detail)
    return choose(found, model, f"deployment {deployment}")
