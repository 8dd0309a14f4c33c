"""Alerts and silences over HTTP."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from gateway import gpu_examples as examples
from gateway import tables
from gateway.auth import KeyRequired
from gateway.bodies import read_json
from gateway.cursors import is_moment
from gateway.predictions import bounded
from gateway.problems import Problem, responses
from gateway.tables import NO_CONTROLS, Accept, Cursor, Format, Host, Limit
from gateway.telemetry import Uuid, pool_of, unknown_gpu
from gateway.views import JSONResponse, describe
from pipeline import notifications, telemetry_reads
from pipeline.gpu_views import AlertView
from pipeline.notifications import Notification, Silence
from pipeline.receivers import check_match
from pipeline.telemetry_reads import AlertFilter

router = APIRouter(tags=["alerts"], dependencies=[KeyRequired, tables.KnownParameters])

MAX_SILENCE = timedelta(days=366)
_PROBLEMS = ("unauthorized", "invalid_request", "dependency")

State = Annotated[
    list[Literal["pending", "firing", "resolved"]] | None,
    Query(description="Only in these states; may be repeated."),
]
Severity = Annotated[
    list[Literal["info", "warning", "critical"]] | None, Query(description="Only of these; may be repeated.")
]
Rule = Annotated[str | None, Query(max_length=255, pattern=NO_CONTROLS, description="Only of this rule.")]
Since = Annotated[
    str | None, Query(max_length=60, description="Only those that began then or later, such as now-1d.")
]


class AlertPage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Alerts, the latest begun first."""

    alerts: tuple[AlertView, ...]
    next_cursor: str | None = None


class AlertDetail(msgspec.Struct, frozen=True):
    """An alert, and who was told of it or is to be."""

    alert: AlertView
    notifications: tuple[Notification, ...]


class SilencePage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Silences, newest first."""

    silences: tuple[Silence, ...]
    next_cursor: str | None = None


class SilenceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What nobody is told of: the body of a silence."""

    #: Labels with a pattern, or several; `*` and `?` are wildcards, and each label must fit.
    match: dict[str, str | tuple[str, ...]]
    ends_at: datetime
    starts_at: datetime | None = None
    comment: Annotated[str, msgspec.Meta(max_length=1000, pattern=r"^[^\x00]*$")] = ""
    created_by: Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")] = "gateway"


_decoder = msgspec.json.Decoder(SilenceBody)
_SILENCE_BODY: dict[str, Any] = {
    "required": True,
    "content": describe(200, SilenceBody, "", SilenceBody(**examples.SILENCE_BODY))[200]["content"],
}


@router.get(
    "/v1/alerts",
    responses=describe(200, AlertPage, "A page of alerts.", AlertPage((examples.ALERT,)))
    | responses(*_PROBLEMS),
    summary="Alerts",
)
async def get_alerts(
    request: Request,
    state: State = None,
    severity: Severity = None,
    rule: Rule = None,
    host: Host = None,
    since: Since = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return alerts, the latest begun first, with what was seen, against what limit, and what to do."""
    began = None if since is None else tables.moment("since", since, datetime.now(UTC))
    chosen = AlertFilter(
        states=tuple(state or ()), severities=tuple(severity or ()), rule=rule, host=host, since=began
    )
    return await _page(request, chosen, limit, cursor, wanted)


@router.get(
    "/v1/gpus/{uuid}/alerts",
    responses=describe(200, AlertPage, "A page of its alerts.", AlertPage((examples.ALERT,)))
    | responses(*_PROBLEMS, "not_found"),
    summary="Alerts of a GPU",
)
async def get_alerts_of_gpu(
    request: Request,
    uuid: Uuid,
    state: State = None,
    severity: Severity = None,
    rule: Rule = None,
    since: Since = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    wanted: Annotated[Format, Query(alias="format")] = None,
    accept: Accept = None,
) -> Response:
    """Return a GPU's alerts, the latest begun first."""
    if await bounded(telemetry_reads.gpu_id(pool_of(request), uuid)) is None:
        raise unknown_gpu()
    began = None if since is None else tables.moment("since", since, datetime.now(UTC))
    chosen = AlertFilter(
        states=tuple(state or ()), severities=tuple(severity or ()), rule=rule, gpu_uuid=uuid, since=began
    )
    return await _page(request, chosen, limit, cursor, wanted)


@router.get(
    "/v1/alerts/{id}",
    responses=describe(200, AlertDetail, "The alert.", AlertDetail(examples.ALERT, (examples.NOTIFICATION,)))
    | responses(*_PROBLEMS, "not_found"),
    summary="An alert, and who was told",
)
async def get_alert(
    request: Request,
    identity: Annotated[str, Path(alias="id", max_length=400, description="The alert's id.")],
) -> Response:
    """Return an alert as it is now, and what became of telling each receiver."""
    pool = pool_of(request)
    found = await bounded(telemetry_reads.alert(pool, tables.unquoted(identity)))
    if found is None:
        raise Problem("not_found", "There is no alert with this id.")
    told = await bounded(notifications.notifications(pool, [found.id]))
    return JSONResponse(AlertDetail(found, tuple(told)))


@router.get(
    "/v1/silences",
    responses=describe(200, SilencePage, "A page of silences.", SilencePage((examples.SILENCE,)))
    | responses(*_PROBLEMS),
    summary="Silences",
)
async def get_silences(
    request: Request,
    every: Annotated[bool, Query(alias="all", description="Those that are over, too.")] = False,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """Return silences that hold or will hold, newest first."""
    before = tables.after(cursor, Annotated[int, msgspec.Meta(ge=0, le=2**62)])
    found = await bounded(
        notifications.silences(pool_of(request), every=every, limit=limit + 1, before=before)
    )
    following = tables.cursor_of(found[limit - 1].id) if len(found) > limit else None
    return JSONResponse(SilencePage(tuple(found[:limit]), following))


@router.post(
    "/v1/silences",
    status_code=201,
    responses=describe(201, Silence, "It holds from now on, or from when it says.", examples.SILENCE)
    | responses(
        "malformed_request", "unauthorized", "unsupported_media_type", "invalid_request", "dependency"
    ),
    openapi_extra={"requestBody": _SILENCE_BODY},
    summary="Begin a silence",
)
async def post_silence(request: Request) -> Response:
    """Have nobody told of what fits, for a while; alerts themselves stay as they are."""
    wanted = await _read_silence(request)
    now = datetime.now(UTC)
    starts_at = wanted.starts_at or now
    if not (is_moment(wanted.ends_at) and is_moment(starts_at)):
        raise Problem("invalid_request", "starts_at, ends_at: a time needs its zone (RFC 3339).")
    if not max(now, starts_at) < wanted.ends_at <= now + MAX_SILENCE:
        raise Problem("invalid_request", "ends_at: a silence ends after it begins, and within a year.")
    made = await bounded(
        notifications.silence(
            pool_of(request), wanted.match, starts_at, wanted.ends_at, wanted.comment, wanted.created_by
        )
    )
    return JSONResponse(made, status=201, headers={"Location": f"/v1/silences/{made.id}"})


@router.delete(
    "/v1/silences/{id}",
    responses=describe(200, Silence, "It is over.", examples.SILENCE) | responses(*_PROBLEMS, "not_found"),
    summary="End a silence",
)
async def delete_silence(
    request: Request,
    identity: Annotated[int, Path(alias="id", ge=0, le=2**62, description="The silence's number.")],
) -> Response:
    """End a silence now; what it held back and still fires is told."""
    ended = await bounded(notifications.end_silence(pool_of(request), identity))
    if ended is None:
        raise Problem("not_found", "There is no silence with this number that goes on.")
    return JSONResponse(ended)


async def _page(
    request: Request, chosen: AlertFilter, limit: int, cursor: str | None, wanted: str | None
) -> Response:
    after = tables.after(cursor, tuple[datetime, str])
    found = await bounded(telemetry_reads.alerts(pool_of(request), chosen, limit + 1, after))
    columns = (
        "id", "state", "severity", "rule", "host", "gpu_uuid", "model", "since", "seen_at", "fired_at",
        "resolved_at", "condition.value", "condition.limit", "condition.field", "condition.message",
        "condition.action", "condition.runbook",
    )  # fmt: skip
    return tables.page(request, found, limit, lambda row: (row.since, row.id), AlertPage, columns, wanted)


async def _read_silence(request: Request) -> SilenceBody:
    wanted = await read_json(request, _decoder, "silence")
    try:
        check_match(wanted.match)
    except ValueError as error:
        raise Problem("invalid_request", f"match: {error}.") from None
    if not wanted.match:
        raise Problem("invalid_request", "match: without a label it would silence everything.")
    return wanted
