"""Search by image: the nearest images to one that is known, or to one that is uploaded.

Owns what the parameters mean and how pages follow each other. An uploaded picture becomes an embedding in
`queries.py`; what is nearest is for `pipeline/search.py` to say.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from pydantic import AwareDatetime
from starlette.responses import Response

from gateway import cursors, examples
from gateway.auth import KeyRequired
from gateway.cursors import Cursor
from gateway.predictions import ImageId, bounded, unknown_image
from gateway.problems import Problem, responses
from gateway.queries import choose, embed
from gateway.uploads import read_document
from gateway.views import JSONResponse, SearchedWith, Similar, SimilarImage, describe, links
from pipeline import events, metrics
from pipeline.errors import ContractError
from pipeline.vectors import Embedding, Filters, Found, Mode

MAX_LIMIT = 100
# An exact search reads every vector of its model: a million of 256 dimensions take some seconds.
SEARCH_SECONDS = 30.0
# A cursor carries a vector of at most 16,000 dimensions (pgvector's limit): 85 kB in base64.
MAX_DOCUMENT_BYTES = 128 * 1024
_TEXT = r"^[^\x00]+$"  # PostgreSQL takes no U+0000
_BESIDE_CURSOR = frozenset({"cursor", "limit"})

router = APIRouter(tags=["search"], dependencies=[KeyRequired])


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON body of a search; exactly one of its fields is there."""

    image_id: str | None = None
    cursor: str | None = None


@dataclass(frozen=True)
class Asked:
    """The parameters of a search."""

    limit: int
    mode: Mode
    deployment: str
    model: str | None
    filters: Filters
    #: Names of parameters that cannot stand beside a cursor, which carries them.
    beside_cursor: tuple[str, ...]


async def asked(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Images on a page.")] = 10,
    mode: Annotated[
        Literal["exact", "approximate"],
        Query(
            description="`approximate` goes through an index where there is one; `exact` compares with all."
        ),
    ] = "approximate",
    deployment: Annotated[
        str | None,
        Query(max_length=255, pattern=_TEXT, description="Whose predictions; none: the gateway's own."),
    ] = None,
    model: Annotated[
        str | None,
        Query(max_length=512, pattern=_TEXT, description="Whose embedding; none: the first that embeds."),
    ] = None,
    label: Annotated[
        str | None,
        Query(
            max_length=512,
            pattern=_TEXT,
            description="Only images that a model of the deployment labels so, or detects it in.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        Query(max_length=2048, pattern=_TEXT, description="Only images from this `ce_source`."),
    ] = None,
    since: Annotated[
        AwareDatetime | None,
        Query(alias="from", description="Only images published then or later (RFC 3339)."),
    ] = None,
    until: Annotated[
        AwareDatetime | None, Query(alias="to", description="Only images published before (RFC 3339).")
    ] = None,
) -> Asked:
    """Read the parameters that both routes have.

    Raises:
        Problem: 422, the times are out of range or leave nothing.
    """
    first, end = _utc("from", since), _utc("to", until)
    if first is not None and end is not None and first >= end:
        raise Problem("invalid_request", "from, to: nothing is published at or after `from` and before `to`.")
    return Asked(
        limit,
        mode,
        deployment or request.app.state.settings.deployment,
        model,
        Filters(label=label, source=source, since=first, until=end),
        tuple(sorted(request.query_params.keys() - _BESIDE_CURSOR)),
    )


AskedFor = Annotated[Asked, Depends(asked)]
_PROBLEMS = ("unauthorized", "not_found", "no_embedding", "invalid_request", "dependency")
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"description": "The picture.", "type": "string", "format": "binary"}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
                "properties": {
                    "image_id": {"description": "Search with an image that is known.", "type": "string"},
                    "cursor": {"description": "The next page of any search.", "type": "string"},
                },
            },
            "example": {"image_id": "cat-1"},
        },
    },
}


@router.get(
    "/v1/images/{id}/similar",
    responses=describe(200, Similar, "The nearest images, itself first.", examples.SIMILAR)
    | responses(*_PROBLEMS),
    summary="Images like this one",
)
async def get_similar(
    request: Request,
    image_id: ImageId,
    parameters: AskedFor,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> Response:
    """Return the images whose embeddings are nearest to this image's, by cosine similarity.

    The image itself comes first, with a score of 1. Of each image the newest prediction in the deployment
    counts. Images embedded by another version of the model cannot be compared and are not found.
    """
    if cursor is not None:
        return await _next_page(request, cursor, parameters, image_id)
    embedding = await _embedding_of(request, image_id, parameters)
    return await _search(request, _begin(parameters, embedding), embedding.numbers, parameters.limit)


@router.post(
    "/v1/search",
    responses=describe(200, Similar, "The nearest images.", examples.SIMILAR)
    | responses(
        "malformed_request", "upload_stalled", "image_too_large", "unsupported_media_type",
        "undecodable_image", "model", "overloaded", "stopping", "search_timeout", *_PROBLEMS,
    ),
    openapi_extra={"requestBody": _BODY},
    summary="Search with a picture",
)  # fmt: skip
async def search(request: Request, parameters: AskedFor) -> Response:
    """Return the images most like the one that is sent, or than one that is known.

    Send a picture as an upload is sent (`curl -F file=@cat.jpg`), or JSON: `{"image_id": "cat-1"}`. The
    picture is embedded by a worker and then forgotten: it is neither archived nor found by later searches.
    For the next page send `{"cursor": "..."}`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        document = _document(await read_document(request, MAX_DOCUMENT_BYTES))
        if document.cursor is not None:
            return await _next_page(request, document.cursor, parameters)
        assert document.image_id is not None
        embedding = await _embedding_of(request, document.image_id, parameters)
        return await _search(request, _begin(parameters, embedding), embedding.numbers, parameters.limit)
    embedding = await embed(request, parameters.deployment, parameters.model)
    cursor = _begin(parameters, embedding)
    vector = cursors.pack(embedding.numbers)
    cursor = msgspec.structs.replace(cursor, prediction_id=None, image_id=None, vector=vector)
    return await _search(request, cursor, embedding.numbers, parameters.limit)


def _document(body: bytes) -> Document:
    try:
        document = msgspec.json.decode(body, type=Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("malformed_request", f"The JSON cannot be read: {error}.") from None
    if (document.image_id is None) == (document.cursor is None):
        raise Problem("invalid_request", "Send one of `image_id` and `cursor`.")
    if document.image_id is not None:
        try:
            events.check_id(document.image_id)
        except ContractError:
            raise unknown_image() from None
    return document


async def _embedding_of(request: Request, image_id: str, parameters: Asked) -> Embedding:
    """Return the embedding of an image that is known.

    Raises:
        Problem: 404 nobody knows it, 409 it has none (yet), 422 it has none of this model.
    """
    database = request.app.state.database
    found: list[Embedding] = await bounded(database.vectors(image_id, parameters.deployment))
    if found:
        return choose(found, parameters.model, f"the prediction of deployment {parameters.deployment}")
    state = await bounded(database.state(image_id, parameters.deployment))
    if state is None:
        raise unknown_image()
    why = {
        "accepted": "There is no prediction of it yet.",
        "predicted": "No model of the deployment embeds pictures.",
        "expired": "It was not predicted: its deadline had passed.",
        "dead_lettered": f"It could not be predicted: {state.reason}",
    }[state.state]
    raise Problem(
        "no_embedding",
        f"Deployment {parameters.deployment} has no embedding of this image. {why}",
        members={"id": image_id, "state": state.state, "deployment": parameters.deployment},
    )


def _begin(parameters: Asked, embedding: Embedding) -> Cursor:
    return Cursor(
        deployment=parameters.deployment,
        space=embedding.space,
        mode=parameters.mode,
        filters=parameters.filters,
        prediction_id=embedding.prediction_id,
        image_id=embedding.image_id,
    )


async def _next_page(
    request: Request, given: str, parameters: Asked, image_id: str | None = None
) -> Response:
    """Go on with a search; with `image_id`, only with one that began there."""
    if parameters.beside_cursor:
        names = ", ".join(parameters.beside_cursor)
        raise Problem(
            "invalid_request", f"{names}: a cursor carries its search; send only `limit` beside it."
        )
    cursor = cursors.decode(given)
    if image_id is not None and cursor.image_id != image_id:
        raise Problem("invalid_request", "cursor: it belongs to another search.")
    if cursor.prediction_id is None:
        return await _search(request, cursor, cursors.unpack(cursor.vector), parameters.limit)
    database = request.app.state.database
    embedding = await bounded(database.vector(cursor.prediction_id, cursor.space.model))
    if embedding is None or embedding.space != cursor.space or embedding.image_id != cursor.image_id:
        raise Problem("not_found", "The image that this search began with is no longer there.")
    return await _search(request, cursor, embedding.numbers, parameters.limit)


async def _search(request: Request, cursor: Cursor, numbers: Any, limit: int) -> Response:
    started_at = time.monotonic()
    found: Found = await bounded(
        request.app.state.database.nearest(
            cursor.space, numbers, cursor.deployment, cursor.filters,
            mode=cursor.mode, limit=limit, after=cursor.after,
        ),
        SEARCH_SECONDS,
    )  # fmt: skip
    metrics.SEARCH_SECONDS.labels(found.mode).observe(time.monotonic() - started_at)
    images = tuple(
        SimilarImage(
            id=hit.image_id,
            score=hit.score,
            links=links(hit.image_id),
            published_at=hit.published_at,
            source=hit.source,
            labels=hit.labels,
        )
        for hit in found.hits
    )
    query = SearchedWith(
        deployment=cursor.deployment,
        model=cursor.space.model,
        version=cursor.space.version,
        dimension=cursor.space.dimension,
        image_id=cursor.image_id,
    )
    following = cursors.encode(cursor, found) if found.has_more else None
    return JSONResponse(Similar(query=query, mode=found.mode, images=images, next_cursor=following))


def _utc(name: str, moment: datetime | None) -> datetime | None:
    if moment is not None and not cursors.is_moment(moment):
        raise Problem("invalid_request", f"{name}: is out of range")
    return None if moment is None else moment.astimezone(UTC)
