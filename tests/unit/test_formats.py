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


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=formats.HEAD_BYTES))
def test_any_bytes_have_an_answer(head: bytes) -> None:
    """No bytes raise."""
    found = formats.media_type(head)
    assert found is None or "/" in found
