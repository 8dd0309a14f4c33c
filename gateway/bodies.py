"""Small JSON bodies of requests, read within a bound and decoded, or refused with the reason."""

from typing import TypeVar

import msgspec
from fastapi import Request

from gateway.problems import Problem

MAX_BODY_BYTES = 64 * 1024

Body = TypeVar("Body")


async def read_json(request: Request, decoder: "msgspec.json.Decoder[Body]", what: str) -> Body:
    """Read a body; `what` names it in the refusal.

    Raises:
        Problem: 415 for another media type, 400 for what is too large or no JSON, 422 for JSON of another shape.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem("unsupported_media_type", "The body must be application/json.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Problem("malformed_request", f"The body has more than {MAX_BODY_BYTES:,} bytes.")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        code = "invalid_request" if isinstance(error, msgspec.ValidationError) else "malformed_request"
        raise Problem(code, f"The body is no {what}: {error}") from None
