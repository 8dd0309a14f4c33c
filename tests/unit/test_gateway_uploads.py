"""Reading upload bodies: parts come out whole however they arrive, and nothing else is kept."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from gateway.problems import Problem
from gateway.uploads import Begun, Field, Memory, Oversized, Part, Picture, read_parts

LIMIT = 1_000
BOUNDARY = "multipart/form-data; boundary=b"


def a_request(chunks: Sequence[bytes], content_type: str | None) -> Request:
    """Return a request whose body arrives in these chunks."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    headers = [(b"content-type", content_type.encode())] if content_type is not None else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def read(
    chunks: Sequence[bytes], content_type: str | None = BOUNDARY, memory: Memory | None = None
) -> list[Part]:
    """Read a whole body, giving no picture back."""
    memory = memory or Memory(LIMIT)

    async def collect() -> list[Part]:
        with memory.hold() as held:
            return [part async for part in read_parts(a_request(chunks, content_type), LIMIT, held)]

    try:
        return asyncio.run(collect())
    finally:
        assert memory.held_bytes == 0


def file_part(data: bytes, name: str = "cat.jpg") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


def field_part(name: str, value: str) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 200))
def test_a_form_gives_the_same_parts_however_it_arrives(pictures: list[bytes], size: int) -> None:
    """Pictures, boundaries look-alikes included, come out as they went in, for any cut into chunks."""
    pictures = [picture.replace(b"--b", b"--c") for picture in pictures]
    body = field_part("id", "x") + b"".join(map(file_part, pictures)) + b"--b--\r\n"
    parts = read([body[start : start + size] for start in range(0, len(body), size)])
    assert parts[0] == Field("id", "x")
    assert [part.data for part in parts if isinstance(part, Picture)] == pictures
    assert parts[1::2] == [Begun()] * len(pictures)


@given(
    st.binary(max_size=400), st.integers(1, 50), st.sampled_from([BOUNDARY, "image/png", None, "text/plain"])
)
def test_any_body_gives_parts_or_a_problem(body: bytes, size: int, content_type: str | None) -> None:
    """Arbitrary bytes never raise anything but a problem, and leave nothing held."""
    for data in (body, b"--b\r\n" + body, file_part(body)):
        with contextlib.suppress(Problem):
            read([data[start : start + size] for start in range(0, len(data), size)], content_type)


def test_a_raw_body_is_one_picture() -> None:
    """The body itself is the picture, with its digest, up to the limit and not beyond."""
    for content_type in ("image/png", "application/octet-stream", None):
        parts = read([b"a" * 600, b"b" * 400], content_type)
        assert parts[0] == Begun()
        assert isinstance(parts[1], Picture)
        assert parts[1].data == b"a" * 600 + b"b" * 400
    with pytest.raises(Problem, match="image_too_large"):
        read([b"a" * 600, b"b" * 401], "image/png")


def test_a_picture_above_the_limit_is_dropped_alone() -> None:
    """The first picture above the limit refuses the request at once; a later one only itself."""
    large = b"x" * (LIMIT + 1)
    with pytest.raises(Problem, match="image_too_large"):
        read([file_part(large) + b"--b--\r\n"])
    body = file_part(b"small") + file_part(large, "big.jpg") + file_part(b"last") + b"--b--\r\n"
    parts = [part for part in read([body]) if not isinstance(part, Begun)]
    assert [type(part) for part in parts] == [Picture, Oversized, Picture]
    assert [getattr(part, "name", None) for part in parts] == ["cat.jpg", "big.jpg", "cat.jpg"]


def test_forms_have_limits() -> None:
    """Too many pictures, fields or header lines are refused, not collected."""
    for parts in (file_part(b"x") * 1_001, field_part("id", "x") * 21, field_part("id", "x" * 5_000)):
        with pytest.raises(Problem, match="invalid_request"):
            read([parts + b"--b--\r\n"])
    with pytest.raises(Problem, match="malformed_request"):
        read([b"--b\r\n" + b"X-Header: y\r\n" * 1_000])


def test_all_uploads_together_have_a_limit() -> None:
    """When open uploads hold what fits into memory, the next one is told to come again."""
    memory = Memory(LIMIT)
    memory.held_bytes = memory.max_bytes - 10
    with pytest.raises(Problem, match="overloaded") as caught, memory.hold() as held:
        held.take(11)
    assert caught.value.headers["Retry-After"]
    assert memory.held_bytes == memory.max_bytes - 10


def test_a_silent_client_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that stops arriving is a 408."""
    monkeypatch.setattr("gateway.uploads.STALL_SECONDS", 0.01)

    async def silence() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, silence)

    async def collect() -> None:
        with Memory(LIMIT).hold() as held:
            async for _ in read_parts(request, LIMIT, held):
                pass

    with pytest.raises(Problem, match="upload_stalled"):
        asyncio.run(collect())
