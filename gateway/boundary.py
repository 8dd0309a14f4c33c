"""What happens to every request before a route sees it, and to every answer after.

Owns: ids in paths (a percent-encoded slash stays part of its segment), refusal of requests that a browser was
tricked into, HEAD, failures nobody foresaw, and the request metric. Knows no route and reads no body.

On loopback without API keys any web page in the user's browser could reach this port. So there the `Host`
must name this machine (DNS rebinding), and an `Origin` must be a loopback page (a form on another site can
post a picture without asking). With API keys a page of another site lacks the key, and neither is checked.
"""

import time
import uuid
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.problems import Problem
from gateway.unread import UnreadBody
from pipeline import logs, metrics
from pipeline.settings import LOOPBACK_HOSTS, Settings

CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that left; only ever seen in metrics
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NOSNIFF = (b"x-content-type-options", b"nosniff")

log = logs.get(__name__)


class Boundary:
    """ASGI middleware, the outermost of the gateway."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        open_to_browsers = settings.api_keys_file is None
        named = urlsplit(settings.resolved_gateway).hostname
        self._hosts = LOOPBACK_HOSTS | ({named} if named else set()) if open_to_browsers else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at, status = time.monotonic(), 0
        body = UnreadBody(scope, receive, send)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), _NOSNIFF]
            await body.send(message)

        inner = dict(scope)
        try:
            await self._answer(inner, body.receive, send_and_note)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:
            occurrence = f"urn:uuid:{uuid.uuid4()}"
            log.exception("request failed", method=scope["method"], path=scope["path"], occurrence=occurrence)
            if status:
                raise  # the answer has begun: cutting the connection is the only truth left to tell
            problem = Problem(
                "internal", "The gateway failed; its log says why.", members={"instance": occurrence}
            )
            await problem.response()(inner, body.receive, send_and_note)
        finally:
            # The template, never the path: label values must stay few.
            route = getattr(inner.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.REQUEST_SECONDS.labels(method, route, str(status or CLIENT_CLOSED_REQUEST)).observe(
                time.monotonic() - started_at
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._hosts is not None:
                check_host(Headers(scope=scope), self._hosts)
            scope["path"] = undecoded_path(scope)
            check_query(scope["query_string"])
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
            send = _without_body(send)
        await self.app(scope, receive, send)


def undecoded_path(scope: Scope) -> str:
    """Return the path still percent-encoded, so that `/v1/images/a%2Fb/content` has one segment per name.

    Raises:
        Problem: the path is not what a URL may contain.
    """
    raw: bytes | None = scope.get("raw_path")
    if raw is None:  # a server that does not pass it on; ids with slashes are then out of reach
        path: str = scope["path"]
        return path
    try:
        return raw.partition(b"?")[0].decode("ascii")
    except UnicodeDecodeError:
        raise Problem("malformed_request", "The path contains bytes that must be percent-encoded.") from None


def check_query(query: bytes) -> None:
    """Refuse a query that would be read as something else than was sent.

    Raises:
        Problem: not percent-encoded UTF-8, or absurdly many parameters.
    """
    try:
        parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise Problem("malformed_request", "The query is not percent-encoded UTF-8.") from None


def check_host(headers: Headers, hosts: frozenset[str]) -> None:
    """Refuse what a browser was tricked into sending.

    Raises:
        Problem: `Host` or `Origin` is not one of `hosts`.
    """
    if _hostname("//" + headers.get("host", "")) not in hosts:
        raise Problem(
            "forbidden_host",
            "Without API keys the gateway answers only to names of this machine, such as localhost.",
        )
    origin = headers.get("origin")
    if origin is not None and _hostname(origin) not in hosts:
        raise Problem("forbidden_origin", "Without API keys only pages of this machine may use the gateway.")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _without_body(send: Send) -> Send:
    """Send the headers a GET would get, as RFC 9110 asks of HEAD."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_headers
