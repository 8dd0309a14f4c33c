"""What the first bytes of real files say."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import formats
from tests.support import pictures


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP"])
def test_encoded_pictures_are_recognised(codec: str) -> None:
    """Whatever Pillow encodes is recognised by its first bytes, and is decodable."""
    found = formats.media_type(pictures.encode(pictures.halves(), codec)[: formats.HEAD_BYTES])
    assert found == f"image/{codec.lower()}"
    assert found in formats.DECODABLE


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "image/heic"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heix", "image/heic"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf", "image/avif"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1miaf", "image/heif"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "image/jxl"),
        (b"II*\x00\x08\x00\x00\x00", "image/tiff"),
        (b"MM\x00*\x00\x00\x00\x08", "image/tiff"),
        (b"%PDF-1.7", "application/pdf"),
    ],
)
def test_formats_that_are_not_decoded_still_have_a_name(head: bytes, expected: str) -> None:
    """A refusal can say what the file is."""
    assert formats.media_type(head) == expected
    assert (expected in formats.DECODABLE) == (expected == "image/avif")


@pytest.mark.parametrize(
    "head",
    [
        pictures.EMPTY,
        pictures.TEXT,
        b"BMW is a maker of cars and motorcycles",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom",
        b"\xff\xd8",
        b"\x89PNG",
    ],
)
def test_other_bytes_are_no_picture(head: bytes) -> None:
    """Text, sound, film and beginnings too short to tell are nothing we know."""
    assert formats.media_type(head) is None


@pytest.mark.parametrize(
    ("data", "media", "expected"),
    [
        (pictures.encode(pictures.halves(), "GIF"), "image/gif", (64, 32)),
        (pictures.animated("GIF"), "image/gif", (64, 32)),
        (pictures.encode(pictures.halves(), "WEBP"), "image/webp", (64, 32)),
        (pictures.encode(pictures.halves(), "WEBP", lossless=True), "image/webp", (64, 32)),
        (pictures.animated("WEBP"), "image/webp", (64, 32)),
        (pictures.encode(pictures.halves(), "PNG"), "image/png", (64, 32)),
        (pictures.bomb_header_png(), "image/png", (20_000, 20_000)),
        (pictures.huge_gif_header(), "image/gif", (65_535, 65_535)),
        (pictures.huge_webp_header(), "image/webp", (16_383, 16_383)),
        (pictures.jpeg(), "image/jpeg", None),
    ],
)
def test_the_canvas_is_read_from_the_header(
    data: bytes, media: str, expected: tuple[int, int] | None
) -> None:
    """Width and height of what allocates early are known without decoding."""
    assert formats.canvas_size(data, media) == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=400), st.sampled_from([b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X", b"RIFF\0\0\0\0WEBPVP8L"])
)
def test_any_header_has_a_canvas_or_none(rest: bytes, start: bytes) -> None:
    """No header raises or runs for ever."""
    media = "image/gif" if start == b"GIF89a" else "image/webp"
    size = formats.canvas_size(start + rest, media)
    assert size is None or all(side >= 0 for side in size)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=formats.HEAD_BYTES))
def test_any_bytes_have_an_answer(head: bytes) -> None:
    """No bytes raise."""
    found = formats.media_type(head)
    assert found is None or "/" in found
