"""Problems: every answer that is an error, as RFC 9457 `application/problem+json`.

`code` is the stable, machine-readable name: that of the error tree (`pipeline/errors.py`) or one of HTTP's
own below. A problem never carries a traceback, a secret or an internal address; `detail` is for a person.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from pipeline import errors, logs

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:millrace:problem:"
# A broker or database that restarts is back within seconds; sooner would only add load to its start.
RETRY_AFTER_SECONDS = 5
MAX_DETAIL_CHARACTERS = 1_000

#: code -> (HTTP status, title). The title never changes with the occurrence (RFC 9457, 3.1.3).
KINDS: dict[str, tuple[int, str]] = {
    # The error tree's
    errors.ContractError.code: (422, "The event breaks the published contract"),
    errors.RecordTooLargeError.code: (413, "The record is larger than its topic allows"),
    errors.ImageError.code: (422, "The image cannot be used"),
    errors.UndecodableImageError.code: (422, "Not a picture that can be decoded"),
    errors.ImageTooLargeError.code: (413, "The image has more bytes or pixels than allowed"),
    errors.MissingImageError.code: (422, "The image is not in the object store, or is another one"),
    errors.ExpiredError.code: (422, "The deadline has passed"),
    errors.ModelError.code: (500, "The model failed on this image"),
    errors.ProcessKilledError.code: (500, "The image killed the worker that opened it"),
    errors.StorageRefusedError.code: (422, "The database refuses this data"),
    errors.ConflictError.code: (409, "Somebody else changed it first"),
    errors.DependencyError.code: (503, "A service this needs does not answer"),
    # HTTP's own
    "malformed_request": (400, "The request cannot be read"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden_host": (403, "The request was not meant for this host"),
    "forbidden_origin": (403, "A page of another site may not do this"),
    "not_found": (404, "There is no such resource"),
    "method_not_allowed": (405, "The resource does not know this method"),
    "upload_stalled": (408, "The upload stopped half-way"),
    "id_conflict": (409, "The id belongs to another picture"),
    "no_embedding": (409, "The image has no embedding to search with"),
    "gone": (410, "The picture is no longer kept"),
    "unsupported_media_type": (415, "The body is of a kind that is not read here"),
    "invalid_request": (422, "A parameter is not valid"),
    "idempotency_key_reused": (422, "The idempotency key belongs to another picture"),
    "batch_refused": (422, "No picture of the batch was accepted"),
    "models_refused": (422, "These models cannot be activated over HTTP"),
    "internal": (500, "The gateway failed"),
    "overloaded": (503, "More requests are open than the gateway can hold"),
    "stopping": (503, "The gateway is shutting down"),
    "search_timeout": (504, "No worker embedded the picture in time"),
    "http": (400, "The request failed"),
}
_BY_STATUS = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    415: "unsupported_media_type",
}

log = logs.get(__name__)


class Problem(Exception):  # noqa: N818  RFC 9457's word
    """An answer that is an error; raise it anywhere below a route.

    Args:
        code: a key of `KINDS`.
        detail: what is wrong with this request, for a person.
        status: overrides the code's own HTTP status.
        headers: additional response headers.
        members: extension members of the document.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code if code in KINDS else "http"
        self.detail = detail[:MAX_DETAIL_CHARACTERS]
        self.status = status or KINDS[self.code][0]
        self.headers = dict(headers or {})
        self.members = dict(members or {})
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))

    def document(self) -> dict[str, Any]:
        """Return the problem as RFC 9457 writes it."""
        return {
            "type": TYPE_PREFIX + self.code,
            "title": KINDS[self.code][1],
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        } | self.members

    def response(self) -> Response:
        """Return the HTTP answer."""
        body = msgspec.json.encode(self.document())
        return Response(body, self.status, self.headers | {"Cache-Control": "no-store"}, MEDIA_TYPE)


def from_error(error: errors.MillraceError) -> Problem:
    """Describe an error of the tree; what is neither the client's nor a dependency's fault says no more."""
    if error.code not in KINDS or isinstance(error, errors.FatalError | errors.ConfigurationError):
        return Problem("internal", "The gateway failed; its log says why.")
    if isinstance(error, errors.DependencyError):
        # The message may name hosts and accounts: it belongs into the log.
        log.warning("dependency does not answer", error=error.message)
        return Problem(error.code, "A service this needs does not answer; try again later (see /readyz).")
    return Problem(error.code, error.message)


def from_http(error: HTTPException) -> Problem:
    """Describe what the framework refuses."""
    code = _BY_STATUS.get(error.status_code, "http")
    detail = str(error.detail or HTTPStatus(error.status_code).phrase)
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = "There is nothing at this path; an id in a path must be percent-encoded (a slash is %2F)."
    return Problem(code, detail, status=error.status_code, headers=error.headers)


def from_validation(error: RequestValidationError) -> Problem:
    """Describe parameters that do not fit, each by its place and name."""
    faults = []
    for fault in error.errors():
        place, *names = (str(part) for part in fault["loc"])
        faults.append({"in": place, "name": ".".join(names), "detail": str(fault["msg"])})
    said = "; ".join(f"{fault['name'] or fault['in']}: {fault['detail']}" for fault in faults)
    return Problem("invalid_request", said, members={"errors": faults})


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Answer every error of `app`, whose routes are these routers', as a problem."""

    async def on_problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    async def on_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, errors.MillraceError)
        return from_error(error).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        problem = from_http(error)
        if problem.status == HTTPStatus.METHOD_NOT_ALLOWED:
            # Starlette names only the methods of the first route with this path.
            problem.headers["Allow"] = ", ".join(_methods_of(request, routers))
        return problem.response()

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(errors.MillraceError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)


def _methods_of(request: Request, routers: Sequence[APIRouter]) -> list[str]:
    """Return the methods that the request's path knows."""
    methods: set[str] = set()
    for route in (route for router in routers for route in router.routes if isinstance(route, APIRoute)):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of these problems, one entry per HTTP status, an example each."""
    described: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, title = KINDS[code]
        entry = described.setdefault(
            status,
            {
                "description": title,
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        example = Problem(code, title + ".").document()
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": title, "value": example}
    return described


#: The schema of a problem document, for OpenAPI.
SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457 problem details; `code` is stable and machine-readable.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "enum": sorted(KINDS)},
    },
    "additionalProperties": True,
}
