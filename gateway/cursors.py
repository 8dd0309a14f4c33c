"""Cursors of a search: everything the next page needs, so that any replica can serve it.

Opaque to clients, and nothing they could not ask for themselves: a forged one is another search. The search
with an uploaded picture carries the picture's vector, as nobody keeps it.
"""

import base64
import binascii
import math
import sys
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec

from gateway.problems import Problem
from pipeline.vectors import After, Filters, Found, Mode, Space

MAX_DIMENSIONS = 16_000  # pgvector's limit
MAX_YEAR = 9999

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]


class Cursor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A search and how far it came; exactly one of `prediction_id` and `vector` is there."""

    format: Literal[1] = 1
    deployment: Name
    space: Space
    mode: Mode
    filters: Filters
    after: After | None = None
    prediction_id: Name | None = None
    image_id: Name | None = None
    #: Little-endian float32.
    vector: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Cursor)


def encode(cursor: Cursor, found: Found) -> str:
    """Return the cursor of the page behind the last hit."""
    # What an index could not do for this page, it cannot do for the next one.
    following = msgspec.structs.replace(cursor, mode=found.mode, after=found.last)
    return base64.urlsafe_b64encode(_encoder.encode(following)).decode().rstrip("=")


def decode(given: str) -> Cursor:
    """Read a cursor.

    Raises:
        Problem: 422, it is none.
    """
    try:
        data = base64.b64decode(given + "=" * (-len(given) % 4), altchars=b"-_", validate=True)
        cursor = _decoder.decode(data)
    except (binascii.Error, ValueError, msgspec.DecodeError, UnicodeError, RecursionError):
        raise _unusable() from None
    if not _is_sound(cursor):
        raise _unusable()
    return cursor


def pack(numbers: Sequence[float]) -> bytes:
    """Return a vector as little-endian float32."""
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(vector: bytes) -> "array[float]":
    """Read what `pack` made."""
    numbers = array("f")
    numbers.frombytes(vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def is_moment(moment: datetime) -> bool:
    """Whether a time has a zone and is not in the first or last hours that a datetime can say."""
    try:
        return moment.tzinfo is not None and moment.astimezone(UTC).year < MAX_YEAR
    except OverflowError:
        return False


def _is_sound(cursor: Cursor) -> bool:
    """Whether the database can take everything in it."""
    space, filters, after = cursor.space, cursor.filters, cursor.after
    texts = (space.model, space.version, filters.label, filters.source, after.image_id if after else None)
    moments = (filters.since, filters.until)
    if any("\x00" in text for text in texts if text is not None):
        return False
    if not all(is_moment(moment) for moment in moments if moment is not None):
        return False
    if after is None or not math.isfinite(after.distance):
        return False
    if cursor.prediction_id is not None:
        return not cursor.vector and cursor.image_id is not None
    if not 0 < space.dimension <= MAX_DIMENSIONS or len(cursor.vector) != 4 * space.dimension:
        return False
    numbers = unpack(cursor.vector)
    return any(numbers) and all(map(math.isfinite, numbers))


def _unusable() -> Problem:
    return Problem("invalid_request", "cursor: it is not one that a search returned.")
