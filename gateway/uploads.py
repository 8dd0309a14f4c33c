"""Reading an upload's body: raw or multipart, as a stream of parts, never more than one picture at a time.

Owns the limits on what a client may make this process hold: bytes per picture, bytes of all open uploads
together, fields, and how long a silent client is waited for. Knows nothing of Kafka and never looks inside
a picture.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from gateway.problems import Problem

# Longer than any hiccup of a mobile network that is not a disconnect; a held connection costs memory.
STALL_SECONDS = 30.0
# Eight uploads of the default size limit at once; more wait for room at the client (503, Retry-After).
MIN_HELD_BYTES = 256 * 1024 * 1024
MAX_FILES = 1_000
MAX_FIELD_BYTES = 4 * 1024
MAX_FIELDS = 20
MAX_NAME_CHARACTERS = 255
FILE_FIELD = "file"


@dataclass(frozen=True)
class Field:
    """A form field that is no picture."""

    name: str
    value: str


@dataclass(frozen=True)
class Begun:
    """A picture begins; its bytes have not been read yet."""


@dataclass(frozen=True)
class Picture:
    """A whole picture; `name` is what the client calls its file."""

    data: bytes
    sha256: str
    name: str | None = None


@dataclass(frozen=True)
class Oversized:
    """A picture above the limit; its bytes were dropped."""

    name: str | None = None


Part = Field | Begun | Picture | Oversized


class Held:
    """Bytes that one upload holds, counted against those of all uploads."""

    def __init__(self, memory: "Memory") -> None:
        self._memory = memory
        self.bytes = 0

    def take(self, count: int) -> None:
        """Count bytes before they are kept.

        Raises:
            Problem: all uploads together hold too much; the client should come again.
        """
        if self._memory.held_bytes + count > self._memory.max_bytes:
            raise Problem("overloaded", "The gateway holds as many uploads as fit into memory; try again.")
        self.bytes += count
        self._memory.held_bytes += count

    def give_back(self, count: int) -> None:
        """Count bytes as dropped."""
        self.bytes -= count
        self._memory.held_bytes -= count


class Memory:
    """What all open uploads of this process may hold together."""

    def __init__(self, max_image_bytes: int) -> None:
        self.max_bytes = max(MIN_HELD_BYTES, 4 * max_image_bytes)
        self.held_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Account for one upload; everything it still holds at the end counts as dropped."""
        held = Held(self)
        try:
            yield held
        finally:
            held.give_back(held.bytes)


async def read_parts(request: Request, max_image_bytes: int, held: Held) -> AsyncIterator[Part]:
    """Yield the parts of the body as they complete; a `Picture` stays counted in `held` until given back.

    Raises:
        Problem: the body's kind is not read here, it is malformed, too large or stalls.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise Problem("unsupported_media_type", "A compressed body (Content-Encoding) is not read here.")
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind == b"multipart/form-data":
        parts = _read_form(request, options.get(b"boundary", b""), max_image_bytes, held)
    elif kind.startswith(b"image/") or kind in {b"", b"application/octet-stream"}:
        parts = _read_raw(request, max_image_bytes, held)
    else:
        raise Problem(
            "unsupported_media_type",
            "Send multipart/form-data with the picture in the field `file`, or the picture itself as the "
            "body with Content-Type image/… or application/octet-stream.",
        )
    async for part in parts:
        yield part


async def read_document(request: Request, max_bytes: int) -> bytes:
    """Return a whole body that is no picture.

    Raises:
        Problem: it is larger than allowed, or stalls.
    """
    body = bytearray()
    async for chunk in _chunks(request):
        body += chunk
        if len(body) > max_bytes:
            raise Problem("malformed_request", f"The body has more than {max_bytes:,} bytes.", status=413)
    return bytes(body)


def too_large(max_image_bytes: int) -> Problem:
    """Return the refusal of a picture above the limit."""
    detail = f"The picture has more than {max_image_bytes:,} bytes."
    return Problem("image_too_large", detail, members={"max_image_bytes": max_image_bytes})


async def _read_raw(request: Request, max_image_bytes: int, held: Held) -> AsyncIterator[Part]:
    if int(_content_length(request) or 0) > max_image_bytes:
        raise too_large(max_image_bytes)
    yield Begun()
    chunks, size, digest = [], 0, hashlib.sha256()
    async for chunk in _chunks(request):
        size += len(chunk)
        if size > max_image_bytes:
            raise too_large(max_image_bytes)
        held.take(len(chunk))
        digest.update(chunk)
        chunks.append(chunk)
    yield Picture(b"".join(chunks), digest.hexdigest())


async def _read_form(
    request: Request, boundary: bytes, max_image_bytes: int, held: Held
) -> AsyncIterator[Part]:
    form = _Form(boundary, max_image_bytes, held)
    async for chunk in _chunks(request):
        form.feed(chunk)
        while form.parts:
            yield form.parts.popleft()
    if not form.complete:
        raise Problem("malformed_request", "The multipart body ends before its closing boundary.")


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives.

    Raises:
        Problem: nothing arrived for `STALL_SECONDS`.
    """
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem("upload_stalled", f"Nothing arrived for {STALL_SECONDS:g} seconds.") from None
        if chunk:
            yield chunk


def _content_length(request: Request) -> str | None:
    given: str | None = request.headers.get("content-length")
    return given if given and given.isascii() and given.isdigit() and len(given) < 20 else None


class _Form:
    """Callbacks of the multipart parser: bytes in, finished parts out."""

    def __init__(self, boundary: bytes, max_image_bytes: int, held: Held) -> None:
        if not boundary:
            raise Problem("malformed_request", "The Content-Type names no multipart boundary.")
        self.parts: deque[Part] = deque()
        self.complete = False
        self._max_image_bytes = max_image_bytes
        self._held = held
        self._files = self._fields = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise Problem("malformed_request", f"The multipart boundary cannot be used: {error}.") from None
        self._begin()

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes.

        Raises:
            Problem: they are no multipart form, or one above the limits.
        """
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Problem("malformed_request", f"The body is not a multipart form: {error}.") from None

    def _begin(self) -> None:
        self._disposition = ""
        self._name = ""
        self._file_name: str | None = None
        self._header, self._value = b"", b""
        self._chunks: list[bytes] = []
        self._size = 0
        self._digest = hashlib.sha256()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        name = options.get(b"filename")
        self._file_name = name.decode("utf-8", "replace")[:MAX_NAME_CHARACTERS] if name is not None else None
        if self._name == FILE_FIELD:
            self._files += 1
            if self._files > MAX_FILES:
                raise Problem("invalid_request", f"A batch has at most {MAX_FILES:,} pictures.")
            self.parts.append(Begun())
        elif self._file_name is not None:
            raise Problem(
                "invalid_request", f"A picture's form field is called `file`, not `{self._name[:80]}`."
            )
        else:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise Problem("invalid_request", f"A form has at most {MAX_FIELDS} other fields.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._name != FILE_FIELD:
            if self._size > MAX_FIELD_BYTES:
                raise Problem("invalid_request", f"The form field `{self._name[:80]}` is too long.")
            self._chunks.append(data[start:end])
        elif self._size <= self._max_image_bytes:
            self._held.take(end - start)
            self._digest.update(memoryview(data)[start:end])
            self._chunks.append(data[start:end])
        elif self._files == 1:
            raise too_large(self._max_image_bytes)  # at once: nothing was accepted that an answer must list
        else:
            self._held.give_back(sum(map(len, self._chunks)))
            self._chunks.clear()

    def _end(self) -> None:
        if self._name != FILE_FIELD:
            value = b"".join(self._chunks).decode("utf-8", "replace")
            self.parts.append(Field(self._name, value))
        elif self._size > self._max_image_bytes:
            self.parts.append(Oversized(self._file_name))
        else:
            self.parts.append(Picture(b"".join(self._chunks), self._digest.hexdigest(), self._file_name))
        self._chunks.clear()

    def _finish(self) -> None:
        self.complete = True
