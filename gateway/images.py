"""Images: upload one or a batch, get the picture back, delete it.

Owns what an upload's parameters mean and how a picture travels back. Reading the body is `uploads.py`,
publishing is `intake.py`, the answer to an upload is `batches.py`, results are `predictions.py`.
"""

import re
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from gateway import examples
from gateway.auth import KeyRequired
from gateway.batches import Asked, Upload, named_twice
from gateway.intake import MAX_IDEMPOTENCY_KEY_CHARACTERS, Terms, check_given_id
from gateway.predictions import ImageId, Prefer, bounded, unknown_image, wait_seconds
from gateway.problems import Problem, responses
from gateway.uploads import read_parts
from gateway.views import Batch, ImageView, describe
from pipeline import events, formats, metrics, retention
from pipeline.errors import ContractError, ImageTooLargeError, MissingImageError
from pipeline.events import ImageEvent
from pipeline.objects import ObjectStore
from pipeline.readers import read_back
from pipeline.results import ImageRow
from pipeline.settings import Settings
from pipeline.topics import Lane

MAX_DEADLINE_SECONDS = 7 * 24 * 3600  # the image topics keep records no longer
FETCH_SECONDS = 30.0
DELETE_SECONDS = 30.0
_SUFFIXES = {"image/jpeg": ".jpg", "image/tiff": ".tif", "application/octet-stream": ".bin"}

router = APIRouter(tags=["images"], dependencies=[KeyRequired])

_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {
                        "description": "The picture; several make a batch (at most 1,000).",
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                    },
                    "id": {
                        "description": "As the query parameter; before or after the picture.",
                        "type": "string",
                    },
                },
            },
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture as it was sent.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "The picture with the given ETag (its SHA-256) is the current one."},
}


@router.post(
    "/v1/images",
    status_code=202,
    responses=describe(202, ImageView, "Accepted: Kafka has it and nothing will lose it.", examples.ACCEPTED)
    | describe(200, ImageView, "The result came within `Prefer: wait`.", examples.PREDICTED)
    | describe(207, Batch, "A batch whose pictures fared differently.")
    | responses(
        "malformed_request", "unauthorized", "upload_stalled", "id_conflict", "image_too_large",
        "unsupported_media_type", "undecodable_image", "invalid_request", "idempotency_key_reused",
        "batch_refused", "dependency", "overloaded",
    ),
    openapi_extra={"requestBody": _UPLOAD_BODY},
    summary="Upload a picture, or a batch",
)  # fmt: skip
async def upload_images(
    request: Request,
    lane: Annotated[
        Lane, Query(description="`realtime` if somebody waits for the result, else `bulk`.")
    ] = "realtime",
    image_id: Annotated[
        str | None, Query(alias="id", description="The event id; none: a new one is made.")
    ] = None,
    deadline: Annotated[
        float | None,
        Query(
            gt=0,
            le=MAX_DEADLINE_SECONDS,
            allow_inf_nan=False,
            description="Seconds after which the result is worth nothing: the state is then `expired`.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Makes repeating safe: the same key and picture are one event, another picture is "
            "refused."
        ),
    ] = None,
    prefer: Prefer = None,
    traceparent: Annotated[
        str | None, Header(description="W3C trace context, passed on to the prediction.")
    ] = None,
) -> Response:
    """Publish a picture, and answer when Kafka has acknowledged it.

    Send it as the form field `file` (`curl -F file=@cat.jpg`) or as the body. `Prefer: wait=10` holds the
    answer back for the result; a picture found undecodable is then answered 422. Several `file` fields are a
    batch: each is accepted or refused on its own, and the answer lists them in order.
    """
    state = request.app.state
    asked = Asked(
        Terms(
            lane,
            datetime.now(UTC) + timedelta(seconds=deadline) if deadline else None,
            traceparent if traceparent and events.TRACEPARENT.fullmatch(traceparent) else None,
        ),
        wait_seconds(prefer),
        check_given_id(image_id) if image_id is not None else None,
        parse_idempotency_key(idempotency_key) if idempotency_key is not None else None,
    )
    if asked.image_id is not None and asked.idempotency_key is not None:
        raise named_twice()
    with state.memory.hold() as held, ExitStack() as watches:
        upload = Upload(state.settings, state.intake, state.live, state.database, asked, held, watches)
        try:
            async for part in read_parts(request, state.settings.max_image_bytes, held):
                await upload.take(part)
        except Problem as problem:
            if upload.items:
                problem.members |= upload.listed()
            metrics.UPLOADS.labels(lane, str(problem.status)).inc()
            raise
        return await upload.finish()


@router.get(
    "/v1/images/{id}/content",
    response_class=Response,
    responses=_CONTENT | responses("unauthorized", "not_found", "gone", "dependency"),
    summary="The picture itself",
)
async def get_content(
    request: Request,
    image_id: ImageId,
    if_none_match: Annotated[str | None, Header(description="An ETag seen before.")] = None,
) -> Response:
    """Return the picture, from the object store or, before it is archived, from Kafka."""
    state = request.app.state
    row: ImageRow | None = await bounded(state.database.image(image_id))
    if row is None:
        raise unknown_image()
    etag = f'"{row.sha256}"' if row.sha256 else None
    # Always asked again: a deleted picture must not live on in caches.
    headers = {"Cache-Control": "private, no-cache"} | ({"ETag": etag} if etag else {})
    if etag and if_none_match and etag in re.split(r"\s*,\s*|W/", if_none_match):
        return Response(status_code=304, headers=headers)
    data = await bounded(_fetch(state.settings, state.objects, row), FETCH_SECONDS)
    if data is None:
        raise Problem("gone", "The picture is no longer kept; its predictions are.")
    media_type = formats.media_type(data[: formats.HEAD_BYTES])
    if media_type not in formats.DECODABLE:
        media_type = "application/octet-stream"
    headers["Content-Disposition"] = content_disposition(image_id, media_type)
    headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    return Response(data, headers=headers, media_type=media_type)


@router.delete(
    "/v1/images/{id}",
    status_code=204,
    response_class=Response,
    responses=responses("unauthorized", "not_found", "dependency"),
    summary="Delete an image",
)
async def delete_image(request: Request, image_id: ImageId) -> Response:
    """Delete the picture, its predictions and dead letters; what is still under way will not bring them back.

    The records in Kafka stay until their retention takes them.
    """
    state = request.app.state
    deletion = retention.delete_image(state.database, state.objects, image_id)
    if not await bounded(deletion, DELETE_SECONDS):
        raise unknown_image()
    state.intake.forget(image_id)
    return Response(status_code=204)


def parse_idempotency_key(given: str) -> str:
    r"""Return the key of an `Idempotency-Key`: a structured-field string (`"…"`), or bare as many send it.

    Raises:
        Problem: 422, empty, too long or not printable ASCII.
    """
    key = given.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = re.sub(r'\\(["\\])', r"\1", key[1:-1])
    if not key or len(key) > MAX_IDEMPOTENCY_KEY_CHARACTERS or not (key.isascii() and key.isprintable()):
        raise Problem(
            "invalid_request",
            f"Idempotency-Key: must be 1 to {MAX_IDEMPOTENCY_KEY_CHARACTERS} printable ASCII characters.",
        )
    return key


def content_disposition(image_id: str, media_type: str) -> str:
    """Return a header that shows a picture and names it on saving, whatever the id contains (RFC 6266)."""
    kind = "inline" if media_type in formats.DECODABLE else "attachment"
    suffix = _SUFFIXES.get(media_type) or "." + media_type.removeprefix("image/").replace(
        "application/octet-stream", "bin"
    )
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)[:80] or "image"
    return f"{kind}; filename=\"{plain}{suffix}\"; filename*=UTF-8''{quote(image_id[:80], safe='')}{suffix}"


async def _fetch(settings: Settings, objects: ObjectStore, row: ImageRow) -> bytes | None:
    """Return the picture from where it is kept; None if nobody keeps it any more."""
    if row.object_key is not None and (data := await _get(settings, objects, row.object_key)) is not None:
        return data
    record = await read_back(settings, row.topic, row.partition, row.offset)
    if record is None:
        return None
    try:
        event: ImageEvent = events.decode_image(record)
    except ContractError:
        return None
    if event.id != row.image_id:  # the topic was made anew, and its offsets with it
        return None
    if event.dataref is not None:
        return await _get(settings, objects, event.dataref)
    return event.data


async def _get(settings: Settings, objects: ObjectStore, key: str) -> bytes | None:
    try:
        return await objects.get(key, settings.max_image_bytes)
    except (MissingImageError, ImageTooLargeError):
        return None
