"""Models over HTTP: what runs where, another version, the history, two deployments side by side.

Only what cannot run code is activated here: whoever has an API key may choose between weights, and not what a
worker executes. Files are put into the object store by the command line alone.
"""

import asyncio
import re
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Request
from pydantic import AwareDatetime
from starlette.responses import Response

from gateway import examples
from gateway.auth import KeyRequired
from gateway.bodies import read_json
from gateway.predictions import Prefer, bounded, wait_seconds
from gateway.problems import Problem, responses
from gateway.views import JSONResponse, describe
from pipeline import registry
from pipeline.comparison import Comparison, SideName
from pipeline.deployments import DeploymentView, Registry, check_models
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.registry import Follower
from pipeline.results import ModelVersion

# Until this gateway itself has read what it has published.
READ_BACK_SECONDS = 5.0
# They took 0.7 s, in pieces of a thousand between which other requests are answered.
MAX_COMPARED = 10_000
COMPARE_SECONDS = 30.0

_DEPLOYMENT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_REFUSED = (
    "{name!r} runs code of its own when it is loaded, so an API key does not suffice to activate it. "
    "Use `millrace models activate` on a machine that may reach Kafka."
)

router = APIRouter(tags=["models"], dependencies=[KeyRequired])

Deployment = Annotated[str, Path(description="Name of a deployment, such as `default`.")]


class Deployments(msgspec.Struct, frozen=True, omit_defaults=True):
    """Every deployment that has a version or a replica."""

    deployments: tuple[DeploymentView, ...]
    #: Deployments over whose version something was written that cannot be read, and why it cannot.
    unreadable: dict[str, str] = {}


class History(msgspec.Struct, frozen=True):
    """The versions of a deployment's models, newest first."""

    deployment: str
    versions: tuple[ModelVersion, ...]


class Activation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to run: the body of an activation."""

    #: Specifications, in the order of the results.
    models: tuple[str, ...]
    note: str | None = None
    #: Only if this revision is the active one; 0: none was activated.
    expected_revision: int | None = None


_decoder = msgspec.json.Decoder(Activation)
_EXAMPLE = Activation(("torchvision:resnet18", "builtin:fingerprint"), expected_revision=3)
_ACTIVATION_BODY: dict[str, Any] = {
    "required": True,
    "content": describe(200, Activation, "", _EXAMPLE)[200]["content"],
}


@router.get(
    "/v1/models",
    responses=describe(200, Deployments, "What runs where.", Deployments((examples.WILDLIFE,)))
    | responses("unauthorized", "dependency"),
    summary="Deployments and their models",
)
async def get_deployments(request: Request) -> Response:
    """Return what each deployment should run, and what each of its replicas runs."""
    now = datetime.now(UTC)
    known = _known(request)
    return JSONResponse(Deployments(tuple(running.view(now) for running in known), known.unreadable))


@router.get(
    "/v1/models/{deployment}",
    responses=describe(200, DeploymentView, "What runs there.", examples.WILDLIFE)
    | responses("unauthorized", "not_found", "dependency"),
    summary="A deployment and its models",
)
async def get_deployment(request: Request, deployment: Deployment) -> Response:
    """Return what the deployment should run, and what each of its replicas runs."""
    known = _known(request)
    if deployment not in known:
        raise _unknown()
    return JSONResponse(known[deployment].view(datetime.now(UTC)))


@router.put(
    "/v1/models/{deployment}",
    status_code=202,
    responses=describe(202, DeploymentView, "Activated; the replicas go over to it.", examples.WILDLIFE)
    | describe(200, DeploymentView, "Every replica has said what became of it, within `Prefer: wait`.")
    | responses(
        "malformed_request", "unauthorized", "conflict", "unsupported_media_type", "invalid_request",
        "models_refused", "dependency",
    ),
    openapi_extra={"requestBody": _ACTIVATION_BODY},
    summary="Activate other models",
)  # fmt: skip
async def activate(request: Request, deployment: Deployment, prefer: Prefer = None) -> Response:
    """Have every replica of a deployment go over to other models, between two batches.

    A replica that cannot load them goes on with what it has, and says why. With `Prefer: wait=N` the answer is
    held back until every replica has gone over or refused.
    """
    state = request.app.state
    following: Follower = state.following
    if not _DEPLOYMENT.fullmatch(deployment):
        raise Problem("invalid_request", "A deployment's name has lower-case letters, digits and hyphens.")
    wanted = await read_json(request, _decoder, "activation")
    desired = await registry.activate(
        state.settings,
        deployment,
        _checked(wanted.models),
        activated_by="gateway",
        note=wanted.note,
        expected_revision=wanted.expected_revision,
    )
    revision = desired.version.revision
    await following.wait_until(lambda known: known[deployment].revision >= revision, READ_BACK_SECONDS)
    headers = {"Location": f"/v1/models/{deployment}"}
    is_settled = False
    if seconds := wait_seconds(prefer):
        headers["Preference-Applied"] = f"wait={seconds}"
        is_settled = await _settled(following, state.live.stopping, deployment, seconds)
    view = following.registry[deployment].view(datetime.now(UTC))
    return JSONResponse(view, status=200 if is_settled else 202, headers=headers)


@router.get(
    "/v1/models/{deployment}/history",
    responses=describe(200, History, "What was activated, and what came of it.")
    | responses("unauthorized", "not_found", "invalid_request", "dependency"),
    summary="History of a deployment's models",
)
async def get_history(
    request: Request,
    deployment: Deployment,
    limit: Annotated[int, Query(ge=1, le=200, description="Newest so many.")] = 50,
    before: Annotated[
        int | None, Query(ge=0, le=2**53, description="Only revisions below this one, for the next page.")
    ] = None,
) -> Response:
    """Return the versions that were activated, newest first, with what each replica said of them."""
    versions = await bounded(request.app.state.database.model_history(deployment, limit, before))
    if not versions and before is None:
        raise _unknown()
    return JSONResponse(History(deployment, tuple(versions)))


@router.get(
    "/v1/compare",
    responses=describe(200, Comparison, "How they compare.", examples.COMPARISON)
    | responses("unauthorized", "invalid_request", "dependency"),
    summary="Two deployments side by side",
)
async def get_comparison(
    request: Request,
    a: Annotated[
        str, Query(max_length=100, description="A deployment, or a revision of its models: `default@3`.")
    ],
    b: Annotated[str, Query(max_length=100, description="Another one.")],
    since: Annotated[
        AwareDatetime | None, Query(description="Only results stored then or later (RFC 3339).")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_COMPARED, description="Latest so many results of `a`.")] = 1000,
) -> Response:
    """Compare two deployments on the images that both have seen: agreement, latency, cost.

    `both` is 0 where there is no such image. `millrace compare` looks at more than this does.
    """
    try:
        one, other = SideName.parse(a), SideName.parse(b)
    except ValueError as error:
        raise Problem("invalid_request", f"a, b: {error}.") from None
    if one == other:
        raise Problem("invalid_request", f"a, b: both are {one}.")
    database = request.app.state.database
    return JSONResponse(
        await bounded(database.compare(one, other, since=since, limit=limit), COMPARE_SECONDS)
    )


def _known(request: Request) -> Registry:
    following: Follower = request.app.state.following
    if not following.is_caught_up:
        raise DependencyError("the models topic has not been read yet")
    return following.registry


def _checked(models: tuple[str, ...]) -> list[str]:
    """Return specifications that may be activated here.

    Raises:
        Problem: 422, one may not be.
    """
    for name in models:
        if "," in name:
            raise Problem(
                "invalid_request", f"{name!r} must be one specification; `models` is a list of them."
            )
        path = name.partition("?")[0].partition("#")[0]
        if name.startswith("python:") or (name.startswith("file:") and not path.endswith(".safetensors")):
            raise Problem("models_refused", _REFUSED.format(name=name))
    try:
        return check_models(",".join(models))
    except ConfigurationError as error:
        raise Problem("invalid_request", error.message) from None


async def _settled(following: Follower, stopping: asyncio.Event, deployment: str, seconds: float) -> bool:
    """Wait until every replica has gone over or refused; False when it takes longer or the gateway stops."""
    waiting = asyncio.ensure_future(
        following.wait_until(lambda known: known[deployment].is_settled(datetime.now(UTC)), seconds)
    )
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.done() and waiting.result()
    finally:
        for task in (waiting, stopped):
            task.cancel()


def _unknown() -> Problem:
    return Problem("not_found", "There is no deployment with this name.")
