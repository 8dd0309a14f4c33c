"""Pictures of every kind and state come out as pixels of the wanted size, or as one plain reason."""

import resource
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Literal
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from loadtest import images
from pipeline import formats, imaging, jpeg
from pipeline.errors import ImageError, ImageTooLargeError, UndecodableImageError
from pipeline.imaging import View
from tests.support import pictures

VIEW = View(64, 32)
CODECS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")
SMALL = {codec: pictures.encode(pictures.scene(40, 30), codec) for codec in CODECS}
LOSSY = 30  # of 255: what the codecs and the resize may change


def halves_of(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the mean colours of the left and right half, less their border."""
    pixels = imaging.decode(data, [VIEW]).pixels[0]
    assert pixels.shape == (32, 64, 3)
    assert pixels.dtype == np.uint8
    left, right = pixels[:, 4:28].mean((0, 1)), pixels[:, 36:60].mean((0, 1))
    return tuple(map(round, left)), tuple(map(round, right))


def is_close(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= LOSSY for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        *(pictures.encode(pictures.halves(), codec) for codec in CODECS),
        pictures.animated("GIF"),
        pictures.animated("WEBP"),
        pictures.animated("PNG"),
        pictures.cmyk_jpeg(),
        pictures.encode(pictures.halves().convert("P"), "PNG"),
        pictures.encode(pictures.halves().convert("RGBA"), "PNG"),
        pictures.encode(pictures.halves().convert("RGBA"), "WEBP", lossless=True),
        pictures.encode(pictures.halves(640, 320), "JPEG", progressive=True),
        *(pictures.rotated_jpeg(orientation) for orientation in range(1, 9)),
    ],
)
def test_every_kind_of_picture_is_decoded_upright(data: bytes) -> None:
    """Codec, palette, CMYK, animation (its first frame) and orientation make no difference."""
    left, right = halves_of(data)
    assert is_close(left, pictures.LEFT)
    assert is_close(right, pictures.RIGHT)


@pytest.mark.parametrize("codec", ["PNG", "WEBP", "AVIF"])
def test_orientation_counts_outside_jpeg(codec: str) -> None:
    """An EXIF orientation is applied wherever the format carries one."""
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = 6
    lying = pictures.halves().transpose(Image.Transpose.ROTATE_90)
    data = pictures.encode(lying, codec, exif=exif)
    left, right = halves_of(data)
    assert is_close(left, pictures.LEFT)
    assert is_close(right, pictures.RIGHT)
    decoded = imaging.decode(data, [VIEW])
    assert (decoded.width, decoded.height) == (64, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_reported_is_the_upright_one(orientation: int) -> None:
    """Width and height are as a person sees the picture."""
    decoded = imaging.decode(pictures.rotated_jpeg(orientation), [VIEW])
    assert (decoded.width, decoded.height) == (64, 32)


def test_unreadable_exif_is_ignored() -> None:
    """Broken metadata is no reason to refuse good pixels."""
    data = pictures.encode(pictures.halves(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff\x00")
    assert is_close(halves_of(data)[0], pictures.LEFT)


def test_transparency_shows_the_background() -> None:
    """A transparent part is white, whatever colour hides behind it."""
    left, right = halves_of(pictures.palette_png_with_alpha())
    assert is_close(left, pictures.LEFT)
    assert right == imaging.BACKGROUND


def test_grey_with_alpha_is_blended() -> None:
    """Half-transparent black over white is middle grey."""
    data = pictures.encode(Image.new("LA", (8, 8), (0, 128)), "PNG")
    assert imaging.decode(data, [View(4, 4)]).pixels[0].mean() == pytest.approx(127, abs=2)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """A 16-bit ramp from black to white comes out as an 8-bit ramp from black to white."""
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (16, 1))
    pixels = imaging.decode(pictures.sixteen_bit_png(ramp), [View(256, 16)]).pixels[0]
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_black_and_white_is_averaged() -> None:
    """A one-bit chessboard shrinks to grey, not to whichever pixel was hit."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2).astype(bool))
    pixels = imaging.decode(pictures.encode(board, "PNG"), [View(8, 8)]).pixels[0]
    assert np.abs(pixels.astype(int) - 127).max() < 20


def test_several_sizes_come_from_one_decode() -> None:
    """Each wanted size gives an array, in order."""
    decoded = imaging.decode(pictures.jpeg(), [View(64, 48), View(7, 9)])
    assert [array.shape for array in decoded.pixels] == [(48, 64, 3), (9, 7, 3)]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (301, 300), (1000, 130)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
def test_a_crop_is_the_centre_of_a_resize(
    size: tuple[int, int], orientation: int, resampling: Literal["bilinear", "bicubic"]
) -> None:
    """A cropped view shows what a resize of the shorter side and a cut of the centre give."""
    upright = pictures.scene(*size)
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = orientation
    stored = upright.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else upright
    view = View(112, 96, "crop", 128, resampling)
    pixels = imaging.decode(pictures.encode(stored, "PNG", exif=exif), [view]).pixels[0]
    scale = 128 / min(size)
    resized = upright.resize(
        (int(size[0] * scale), int(size[1] * scale)), Image.Resampling[resampling.upper()]
    )
    left, top = round((resized.width - 112) / 2), round((resized.height - 96) / 2)
    expected = np.asarray(resized.crop((left, top, left + 112, top + 96)))
    assert pixels.shape == expected.shape
    # Turned pictures are cut where they lie: the odd pixel may fall to the other side.
    assert np.abs(pixels.astype(int) - expected).mean() < (1 if orientation == 6 else 0.01)


@pytest.mark.parametrize(
    ("size", "shown"), [((400, 300), (133, 100)), ((300, 400), (100, 133)), ((1000, 100), (200, 20))]
)
def test_inside_keeps_the_aspect_ratio(size: tuple[int, int], shown: tuple[int, int]) -> None:
    """The shorter side is what was asked for, unless the longer one would be too long."""
    decoded = imaging.decode(pictures.encode(pictures.scene(*size), "JPEG"), [View(200, 100, "inside")])
    assert decoded.pixels[0].shape == (shown[1], shown[0], 3)


@pytest.mark.parametrize(("fit", "shorter_side"), [("crop", None), ("stretch", 64), ("crop", 63)])
def test_a_view_that_makes_no_sense_is_refused(fit: Literal["stretch", "crop"], shorter_side: int) -> None:
    """A crop says what it is cut from, and is not larger."""
    with pytest.raises(ValueError, match="crop"):
        View(64, 32, fit, shorter_side)
    for size in ((0, 32), (64, -1)):
        with pytest.raises(ValueError, match="shows nothing"):
            View(*size)


@pytest.mark.parametrize("view", [View(224, 224), View(224, 224, "crop", 256), View(320, 200, "inside")])
@pytest.mark.parametrize("size", [(1280, 960), (1150, 1150), (600, 900)])
def test_a_fraction_shows_what_the_whole_picture_shows(view: View, size: tuple[int, int]) -> None:
    """A JPEG decoded at a fraction differs from its full decode by less than JPEG changes the picture."""
    data = images.draw_photo(5, 0, *size)
    whole = pictures.encode(Image.open(BytesIO(data)), "PNG")
    seen, expected = (imaging.decode(one, [view]).pixels[0].astype(int) for one in (data, whole))
    difference = np.abs(seen - expected)
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) <= 12


JPEG_VIEWS = (
    View(96, 96, "crop", 128),
    View(160, 90),
    View(300, 200, "inside"),
    View(90, 70, "crop", 90, "bicubic"),
)


@pytest.mark.parametrize("size", [(640, 480), (301, 517), (1000, 130), (71, 54), (128, 128)])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_the_usual_jpeg_looks_as_pillow_shows_it(
    size: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every view of it is what Pillow makes of it, but for roundings: enlarged, reduced, cut and turned."""
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = orientation
    data = pictures.encode(pictures.scene(*size), "JPEG", exif=exif)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", None)
        usual = imaging.decode(data, JPEG_VIEWS)
    monkeypatch.setattr(jpeg, "decode", lambda *_: None)
    monkeypatch.setattr(imaging, "REDUCING_GAP", None)  # Pillow's own short cut
    pillows = imaging.decode(data, JPEG_VIEWS)
    assert (usual.width, usual.height) == (pillows.width, pillows.height)
    for mine, other in zip(usual.pixels, pillows.pixels, strict=True):
        assert mine.shape == other.shape
        assert np.abs(mine.astype(int) - other).max() <= 1


def test_a_decoded_jpeg_stays_as_it_is() -> None:
    """The memory that a thread decodes into is not what it gives out, even if nothing was to be resized."""
    first, second = (pictures.encode(pictures.scene(64, 32, seed), "JPEG") for seed in (0, 1))
    pixels = imaging.decode(first, [VIEW]).pixels[0]
    before = pixels.copy()
    imaging.decode(second, [VIEW])
    np.testing.assert_array_equal(pixels, before)


def test_a_large_jpeg_is_decoded_at_a_fraction() -> None:
    """A JPEG of many megapixels never has all its pixels in memory."""
    data = pictures.encode(pictures.scene(4000, 3000), "JPEG")
    exact = pictures.scene(4000, 3000).resize((256, 256), Image.Resampling.BOX)
    pixels = imaging.decode(data, [View(256, 256)]).pixels[0]
    assert np.abs(pixels.astype(int) - np.asarray(exact)).mean() < 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pictures.EMPTY, "the picture is empty (0 bytes)"),
        (pictures.TEXT, "not a picture: the data begin with b'This is not '"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "image/heic is not supported"),
        (pictures.encode(pictures.halves(), "TIFF"), "image/tiff is not supported"),
        (b"\x89PNG\r\n\x1a\n", "image/png: the header cannot be read"),
        (b"\xff\xd8\xff\xe0", "image/jpeg: the header cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_plain_line(data: bytes, reason: str) -> None:
    """The reason says what is wrong, without a class name or an address."""
    with pytest.raises(UndecodableImageError) as refused:
        imaging.decode(data, [VIEW])
    assert refused.value.message == reason


@pytest.mark.parametrize("codec", CODECS)
def test_half_a_file_is_refused(codec: str) -> None:
    """An interrupted upload is not passed off as a picture."""
    data = pictures.encode(pictures.scene(), codec)
    with pytest.raises(UndecodableImageError):
        imaging.decode(data[: len(data) // 2], [VIEW])


@pytest.mark.parametrize(
    "data", [pictures.bomb_header_png(), pictures.huge_webp_header(), pictures.huge_gif_header()]
)
def test_too_many_pixels_are_refused_before_any_is_allocated(data: bytes) -> None:
    """A small file that expands to hundreds of megapixels costs no memory."""
    before = peak_kibibytes()
    with pytest.raises(ImageTooLargeError, match="pixels, the limit is 100,000,000 in all"):
        imaging.decode(data, [VIEW])
    assert peak_kibibytes() - before < 16 * 1024


def peak_kibibytes() -> int:
    """Return the most memory this process has ever had; what a C decoder allocates counts."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """A few kilobytes cannot keep a decoder thread busy for minutes."""
    data = pictures.encode(pictures.scene(), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(UndecodableImageError, match="more than 100 scans"):
        imaging.decode(data[:-2] + last_scan * 100 + data[-2:], [VIEW])
    imaging.decode(data, [VIEW])


def test_scans_behind_a_whole_picture_cost_nothing() -> None:
    """Where the first scan holds all components a second one is damage; where it does not, scans are counted."""
    data = pictures.encode(pictures.scene(), "JPEG")
    start = data.index(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(UndecodableImageError, match="broken data stream"):
        imaging.decode(data[:-2] + scan * 200 + data[-2:], [VIEW])
    one_component = bytearray(scan)
    one_component[4] = 1
    with pytest.raises(UndecodableImageError, match="more than 100 scans"):
        imaging.decode(data[:start] + bytes(one_component) * 200 + data[-2:], [VIEW])


def test_scans_cannot_be_hidden() -> None:
    """What a marker without length is followed by is seen as libjpeg sees it, whatever lies further behind."""
    data = pictures.encode(pictures.scene(), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    one_scan = pictures.jpeg()
    hidden = one_scan[2 : one_scan.index(b"\xff\xda") + 64]
    # A restart marker; with its comment's marker taken for a length, what is read next is what is hidden.
    data = b"\xff\xd8\xff\xd0" + comment(bytes(40_000)) + comment(bytes(25_526) + hidden) + data[2:-2]
    assert jpeg.is_one_scan(one_scan)
    assert data[4 + 0xFFFE :].startswith(hidden)
    imaging.decode(data + b"\xff\xd9", [VIEW])
    with pytest.raises(UndecodableImageError, match="more than 100 scans"):
        imaging.decode(data + last_scan * 100 + b"\xff\xd9", [VIEW])


def comment(text: bytes) -> bytes:
    """Return a segment of a JPEG that says nothing."""
    return b"\xff\xfe" + (2 + len(text)).to_bytes(2, "big") + text


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_middle_of_a_sliver_costs_no_more(size: tuple[int, int], orientation: int) -> None:
    """A crop of a picture of one by very many pixels does not resize all of it."""
    exif = Image.Exif()
    exif[pictures.EXIF_ORIENTATION] = orientation
    data = pictures.encode(Image.new("RGB", size, pictures.LEFT), "JPEG", exif=exif)
    before = peak_kibibytes()
    pixels = imaging.decode(data, [View(224, 224, "crop", 256)]).pixels[0]
    assert pixels.shape == (224, 224, 3)
    assert is_close(tuple(pixels.mean((0, 1)).astype(int)), pictures.LEFT)
    assert peak_kibibytes() - before < 64 * 1024


@pytest.mark.parametrize(
    ("codec", "options", "turns"), [("JPEG", {}, 0), ("JPEG", {"progressive": True}, 1), ("PNG", {}, 1)]
)
def test_large_pictures_wait_for_each_other(
    codec: str, options: dict[str, bool], turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG takes memory for the pixels it is decoded to; one of several scans, for all that it has."""
    lock = MagicMock()
    monkeypatch.setattr(imaging, "_one_large_picture", lock)
    monkeypatch.setattr(imaging, "LARGE_PIXELS", 600 * 400 - 1)
    imaging.decode(pictures.encode(pictures.scene(600, 400), codec, **options), [VIEW])
    assert lock.__enter__.call_count == turns


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (17, 4001)])
def test_odd_shapes_are_pictures_too(codec: str, size: tuple[int, int]) -> None:
    """One pixel, or one row of them, is stretched like any other picture."""
    decoded = imaging.decode(pictures.encode(Image.new("RGB", size, pictures.LEFT), codec), [VIEW])
    assert (decoded.width, decoded.height) == size
    assert is_close(tuple(decoded.pixels[0].mean((0, 1)).astype(int)), pictures.LEFT)


def test_ycck_jpegs_are_decoded() -> None:
    """A JPEG as Photoshop stores it (Adobe marker, transform 2) comes out in colour."""
    data = bytearray(pictures.cmyk_jpeg())
    data[data.index(b"Adobe") + 11] = 2
    assert imaging.decode(bytes(data), [VIEW]).pixels[0].shape == (32, 64, 3)


def test_pillows_own_check_is_a_second_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What slips past our look at the header is still refused for its size."""
    monkeypatch.setattr(formats, "canvas_size", lambda data, media: None)
    with pytest.raises(ImageTooLargeError, match="too many pixels, the limit is 100,000,000 in all"):
        imaging.decode(pictures.huge_gif_header(), [VIEW])


def test_limits_are_the_callers() -> None:
    """Pillow's own limits neither add to ours nor take from them."""
    data = pictures.jpeg()
    with pytest.raises(ImageTooLargeError, match=r"bytes, the limit is 1,000"):
        imaging.decode(data, [VIEW], imaging.Limits(max_bytes=1000))
    with pytest.raises(ImageTooLargeError, match=r"320 x 240 pixels"):
        imaging.decode(data, [VIEW], imaging.Limits(max_pixels=320 * 240 - 1))
    imaging.decode(data, [VIEW], imaging.Limits(max_bytes=len(data), max_pixels=320 * 240))


def test_warnings_are_nobodys_fault() -> None:
    """A decoder's warning fails nothing, even where warnings are errors, in any thread."""
    data = pictures.encode(pictures.halves(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            decoded = list(pool.map(lambda _: imaging.decode(data, [VIEW]), range(16)))
    assert len(decoded) == 16


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_image_errors(data: bytes) -> None:
    """Bytes decode or raise an `ImageError`; nothing else gets out."""
    decode_or_refuse(data)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_pictures_raise_only_image_errors(data: st.DataObject) -> None:
    """A picture cut, overwritten or stretched anywhere decodes or raises an `ImageError`."""
    picture = bytearray(SMALL[data.draw(st.sampled_from(CODECS))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(picture)))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        if data.draw(st.booleans()):
            picture[at : at + len(patch)] = patch
        else:
            picture[at:at] = patch
    end = data.draw(st.integers(0, len(picture)))
    decode_or_refuse(bytes(picture[:end] if data.draw(st.booleans()) else picture))


def decode_or_refuse(data: bytes) -> None:
    try:
        decoded = imaging.decode(
            data, [View(8, 8)], imaging.Limits(max_bytes=1_000_000, max_pixels=1_000_000)
        )
    except ImageError as error:
        assert error.message  # noqa: PT017
        assert "\n" not in error.message  # noqa: PT017
    else:
        assert decoded.pixels[0].shape == (8, 8, 3)
