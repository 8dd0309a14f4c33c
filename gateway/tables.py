"""What lists of telemetry share: times as people write them, fields by any name, pages, and CSV.

A cursor is the key of the last row, opaque to clients and nothing they could not ask for themselves.
"""

import base64
import binascii
import csv
import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote, urlencode

import msgspec
from fastapi import Depends, Header, Path, Query, Request
from starlette.responses import Response

from gateway.cursors import is_moment
from gateway.problems import Problem
from gateway.views import JSONResponse
from pipeline import dcgm

Row = TypeVar("Row", bound=msgspec.Struct)

NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
MAX_LIMIT = 1000
_RELATIVE = re.compile(r"now(?:-([0-9]{1,9})(ms|s|m|h|d|w))?")
_DURATION = re.compile(r"([0-9]{1,9})(s|m|h|d)")
MAX_FIELDS = 200
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_FIELD = re.compile(r"[A-Za-z_:][A-Za-z0-9_:.]{0,127}")
_UUID = re.compile(r"[!-~]{1,128}")

Host = Annotated[str | None, Query(max_length=255, pattern=NO_CONTROLS, description="Only on this host.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Rows on a page.")]
Cursor = Annotated[
    str | None, Query(max_length=1000, description="`next_cursor` of the page before; all else as it was.")
]
Format = Annotated[
    str | None, Query(pattern="^(json|csv)$", description="`csv` or `json`; none: as `Accept` says.")
]
Accept = Annotated[str | None, Header(description="`text/csv` for CSV.")]


def uuid_of(
    segment: Annotated[
        str, Path(alias="uuid", description="The GPU's UUID, percent-encoded as one segment.")
    ],
) -> str:
    """Return the UUID that a path names.

    Raises:
        Problem: 422, nothing can have it.
    """
    given = _unquoted(segment)
    if given is None:
        raise Problem(
            "invalid_request", "uuid: a GPU's UUID is 1 to 128 printable characters without spaces."
        )
    return given


def unquoted(segment: str) -> str:
    """Return the id that a path names.

    Raises:
        Problem: 404, as nothing can have such an id.
    """
    given = _unquoted(segment)
    if given is None:
        raise Problem("not_found", "There is nothing with this id.")
    return given


def _unquoted(segment: str) -> str | None:
    try:
        given = unquote(segment, errors="strict")
    except UnicodeDecodeError:
        return None
    return given if _UUID.fullmatch(given) else None


def moment(name: str, given: str, now: datetime) -> datetime:
    """Read `now`, `now-15m` or a time with a zone (RFC 3339).

    Raises:
        Problem: 422, it is neither.
    """
    # A plus that nobody encoded arrives as a space.
    text = given.strip().replace(" ", "+") if re.search(r"\d \d\d:?\d\d$", given) else given.strip()
    if found := _RELATIVE.fullmatch(text):
        seconds = int(found[1]) * _SECONDS[found[2]] if found[1] else 0.0
        try:
            return now - timedelta(seconds=seconds)
        except OverflowError:
            raise _no_moment(name, given) from None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise _no_moment(name, given) from None
    if not is_moment(read) or read.astimezone(UTC).year < 1:
        raise _no_moment(name, given)
    return read.astimezone(UTC)


def span(start: str, end: str, now: datetime) -> tuple[datetime, datetime]:
    """Read a time from one moment to another.

    Raises:
        Problem: 422, one of them is none, or the end comes first.
    """
    first, last = moment("start", start, now), moment("end", end, now)
    if last < first:
        raise Problem("invalid_request", f"start, end: {end} is before {start}.")
    return first, last


def step_of(given: str | None) -> timedelta | None:
    """Read a step such as 30s, 5m, 1h or 1d.

    Raises:
        Problem: 422, it is none.
    """
    if given is None:
        return None
    found = _DURATION.fullmatch(given.strip())
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not 0 < seconds <= 31 * _SECONDS["d"]:
        raise Problem(
            "invalid_request", f"step: {given[:40]!r} is none such as 30s, 5m, 1h or 1d, at most 31 days."
        )
    return timedelta(seconds=seconds)


def fields_of(given: str | None) -> tuple[list[str], list[str]] | None:
    """Read comma-separated fields by any of their names: ours of those in the table, and the others.

    Raises:
        Problem: 422, one cannot be a field's name.
    """
    if given is None:
        return None
    known: list[str] = []
    others: list[str] = []
    names = dict.fromkeys(part.strip() for part in given.split(","))
    if len(names) > MAX_FIELDS:
        raise Problem("invalid_request", f"fields: at most {MAX_FIELDS} at once.")
    for name in names:
        field = dcgm.find(name)
        if field is None and not _FIELD.fullmatch(name):
            raise Problem("invalid_request", f"fields: {name[:80]!r} cannot be the name of a field.")
        (others if field is None else known).append(name if field is None else field.name)
    return list(dict.fromkeys(known)), others


def unknown_field(name: str) -> Problem:
    """Return the answer to a field that the GPU does not have."""
    return Problem("invalid_request", f"fields: this GPU has no {name} in that time.{_near(name)}")


def not_rolled_up(name: str) -> Problem:
    """Return the answer to a step with a field that the table does not have."""
    return Problem(
        "invalid_request", f"fields: with step, only fields of the table: {name} is none.{_near(name)}"
    )


async def only_known_parameters(request: Request) -> None:
    """Refuse a parameter that would be passed over: whoever misspells `start` gets another time than they think.

    Raises:
        Problem: 422, the route has none of this name.
    """
    known = _parameters(request.scope["route"].dependant)
    if unknown := [name for name in dict.fromkeys(request.query_params) if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Is {near[0]} meant?" if near else ""
        shown = ", ".join(repr(name[:40]) for name in unknown[:5])
        raise Problem("invalid_request", f"{shown}: there is no such parameter here.{hint}")


def _parameters(dependant: Any) -> set[str]:
    inner = (_parameters(each) for each in dependant.dependencies)
    return {field.alias for field in dependant.query_params}.union(*inner)


KnownParameters = Depends(only_known_parameters)


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, list(dcgm.BY_NAME), n=1)
    return f" Is {near[0]} meant?" if near else ""


def after(cursor: str | None, kind: Any) -> Any:
    """Read a cursor.

    Raises:
        Problem: 422, it is none of this list.
    """
    if cursor is None:
        return None
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        key = msgspec.json.decode(data, type=kind)
    except (binascii.Error, ValueError, msgspec.DecodeError, UnicodeError, RecursionError):
        raise Problem("invalid_request", "cursor: it is not one that this list returned.") from None
    if b"\\u0000" in data or any(isinstance(part, datetime) and not is_moment(part) for part in _parts(key)):
        raise Problem("invalid_request", "cursor: it is not one that this list returned.")
    return key


def cursor_of(key: object) -> str:
    """Return the cursor behind a row."""
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def page(
    request: Request,
    found: Sequence[Row],
    limit: int,
    key: Callable[[Row], object],
    view: Callable[[tuple[Row, ...], str | None], msgspec.Struct],
    columns: Sequence[str],
    wanted: str | None,
) -> Response:
    """Return the first `limit` of `found`; one row more than that says that another page follows, from `key` on."""
    rows = tuple(found[:limit])
    following = cursor_of(key(rows[-1])) if len(found) > limit else None
    return answer(request, view(rows, following), plain(rows), columns, wanted=wanted, next_cursor=following)


def answer(
    request: Request,
    view: msgspec.Struct,
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str] | Callable[[], Sequence[str]],
    *,
    wanted: str | None,
    next_cursor: str | None = None,
) -> Response:
    """Return a page as JSON, or its rows (read for this alone, as `columns` are) as CSV; a `Link` leads on."""
    headers = {"Vary": "Accept"}
    if next_cursor is not None:
        query = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
        query.append(("cursor", next_cursor))
        headers["Link"] = f'<{request.scope["path"]}?{urlencode(query)}>; rel="next"'
    accept = request.headers.get("accept", "")
    if wanted != "csv" and (wanted == "json" or "text/csv" not in accept.lower()):
        return JSONResponse(view, headers=headers)
    names = columns() if callable(columns) else columns
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return Response(
        text.getvalue(), headers=headers | {"Cache-Control": "no-store"}, media_type="text/csv; charset=utf-8"
    )


def plain(rows: Iterable[msgspec.Struct]) -> Iterable[dict[str, Any]]:
    """Yield structs as rows of a table, as CSV wants them: what is nested gets a name with a dot."""
    return (dict(_flat("", msgspec.to_builtins(row))) for row in rows)


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _parts(key: object) -> Iterable[object]:
    return key if isinstance(key, tuple | list) else (key,)


def _no_moment(name: str, given: str) -> Problem:
    return Problem(
        "invalid_request",
        f"{name}: {given[:60]!r} is neither now, nor such as now-15m, nor a time with a zone (RFC 3339).",
    )
