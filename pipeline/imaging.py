"""Bytes of a picture -> RGB uint8 as the models want to see it; every limit on Pillow lives here.

The invariant: no pixel is allocated before bytes and header are within the limits, and whatever a decoder
raises comes out as `UndecodableImageError`. Pure apart from two process-wide settings that `decode` makes:
Pillow's own bomb check, which stays as a second line, is raised where our limit is higher
(`Image.MAX_IMAGE_PIXELS`), and Pillow's warnings are ignored (odd metadata is no fault, even where warnings
are errors). Colour profiles are ignored: pixels are taken as sRGB.
"""

import math
import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pipeline import formats, jpeg
from pipeline.errors import ImageTooLargeError, MillraceError, UndecodableImageError
from pipeline.jpeg import Pixels, Size

#: Transparent pixels show this: what a page shows behind a picture, and what JPEG exports of one have.
BACKGROUND = (255, 255, 255)
# Reduce to at least this multiple of the wanted size before the exact resize. Pillow's documentation calls
# the result of 2.0 hard to tell from a resize of the full picture.
REDUCING_GAP = 2.0
# libjpeg decodes at 1/2, 1/4 or 1/8, the smallest that still has this multiple of the wanted size. Textured
# pictures then differ from a full decode by 0.8 of 255 in the mean and 11 at the 99th percentile at most, less than
# JPEG itself changes; sizes that come nearer to an exact fraction reach 2.3 and 32.
# A 1280 x 960 picture for 224 pixels takes 3.9 ms; 6.9 ms with 2.0, 11.7 ms with a full decode and resize.
JPEG_GAP = 1.5
# A picture this large holds up to 4 bytes a pixel while it is decoded; one at a time, or a pool of 16 threads
# could hold 6 GiB of them.
LARGE_PIXELS = 16_000_000
# A progressive JPEG is decoded once per scan, each a pass over all pixels for a few bytes of file: cameras write
# 10, thousands are an attack on the processor (libjpeg-turbo's own fuzzers stop at 500).
MAX_JPEG_SCANS = 100
# What a crop leaves out above and to its left, once resized: of a file of a kilobyte, 1 x 65,535 pixels large, that
# were 6 GB. In pictures up to 30 times as long as wide it is less, for a crop of 224 of 256 pixels.
MAX_CUT_OFF_PIXELS = 1_000_000
MAX_REASON_CHARACTERS = 200

Window = tuple[float, float, float, float]  # left, top, right, bottom in pixels

# One decoder is tried, the one the first bytes name: Pillow has many more, some of them never fuzzed.
_DECODERS = {
    "image/jpeg": JpegImagePlugin.JpegImageFile.format,
    "image/png": PngImagePlugin.PngImageFile.format,
    "image/webp": WebPImagePlugin.WebPImageFile.format,
    "image/gif": GifImagePlugin.GifImageFile.format,
    "image/avif": AvifImagePlugin.AvifImageFile.format,
    "image/bmp": BmpImagePlugin.BmpImageFile.format,
}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_START_OF_SCAN = b"\xff\xda"
_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> what undoes it (JEITA CP-3451, 4.6.4.A).
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_one_large_picture = threading.Lock()


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before any pixel is allocated."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True)
class View:
    """How a model wants to see a picture.

    stretch: the whole picture at `width` x `height`, its aspect ratio not kept. crop: its centre, after a
    resize of its shorter side to `shorter_side`. inside: the whole picture with its aspect ratio, the shorter
    side `height` unless the longer one would exceed `width`; the size varies from picture to picture.
    """

    width: int
    height: int
    fit: Literal["stretch", "crop", "inside"] = "stretch"
    shorter_side: int | None = None  # crop only
    resampling: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        """Refuse what cannot be seen."""
        if min(self.width, self.height) < 1:
            raise ValueError(f"a view of {self.width} x {self.height} shows nothing")
        if (self.fit == "crop") != (self.shorter_side is not None):
            raise ValueError("`shorter_side` belongs to crop, and to crop alone")
        if self.shorter_side is not None and self.shorter_side < max(self.width, self.height):
            raise ValueError("a crop is larger than what it is cut from")

    def size_of(self, picture: Size) -> Size:
        """Return the width and height at which a picture is shown."""
        if self.fit != "inside":
            return self.width, self.height
        shorter, longer = min(picture), max(picture)
        scale = min(self.height / shorter, self.width / longer)
        return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))

    def cut_of(self, picture: Size) -> tuple[Size, Size]:
        """Return what the whole of a picture is resized to, and the left and top of what is shown of that."""
        if self.shorter_side is None:
            return self.size_of(picture), (0, 0)
        # Rounded as torchvision's Resize and CenterCrop do: half a pixel beside it is another picture to a model.
        width, height = (int(self.shorter_side * side / min(picture)) for side in picture)
        return (width, height), (round((width - self.width) / 2), round((height - self.height) / 2))

    def window_of(self, picture: Size) -> Window:
        """Return the part of a picture that is shown."""
        whole, corner = self.cut_of(picture)
        across, down = picture[0] / whole[0], picture[1] / whole[1]
        width, height = self.size_of(picture)
        left, top = corner[0] * across, corner[1] * down
        return left, top, left + width * across, top + height * down


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: one array per view, and the size it had, upright."""

    pixels: tuple[NDArray[np.uint8], ...]  # each (H, W, 3)
    width: int
    height: int


def decode(data: bytes, views: Sequence[View], limits: Limits = Limits()) -> Picture:
    """Decode the first frame of a picture, upright, over `BACKGROUND`, in each of `views`.

    Thread-safe; Pillow releases the GIL for most of the work.

    Raises:
        UndecodableImageError: not a picture, not a format of `formats.DECODABLE`, or broken.
        ImageTooLargeError: more bytes or pixels than `limits`.
    """
    if not data:
        raise UndecodableImageError("the picture is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"the picture has {len(data):,} bytes, the limit is {limits.max_bytes:,}")
    media = formats.media_type(data[: formats.HEAD_BYTES])
    if media not in formats.DECODABLE:
        known = f"{media} is not supported" if media else f"not a picture: the data begin with {data[:12]!r}"
        raise UndecodableImageError(known)
    _set_pillow_up(limits)
    try:
        return _decode(data, media, views, limits)
    except MillraceError:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLargeError(
            f"the picture has too many pixels, the limit is {limits.max_pixels:,} in all"
        ) from None
    except Exception as error:  # decoders raise nearly every class there is, on bytes made for it
        raise UndecodableImageError(_reason(media, error)) from None


def _decode(data: bytes, media: str, views: Sequence[View], limits: Limits) -> Picture:
    if (canvas := formats.canvas_size(data, media)) is not None:
        _check_pixels(canvas, limits)
    with Image.open(BytesIO(data), formats=(_DECODERS[media],)) as image:
        _check_pixels(image.size, limits)
        if media == "image/jpeg":
            return _decode_jpeg(image, data, views)
        with _turn(image.size):
            image.load()
            # Only now: the tag may come after the pixels, or be applied by `load`.
            return _show(image, image.size, _orientation(image), views)


def _decode_jpeg(image: Image.Image, data: bytes, views: Sequence[View]) -> Picture:
    is_one_scan = _is_one_scan(data)
    stored, orientation = image.size, _orientation(image)
    lying = [_lying(view, orientation) for view in views]
    image.draft(None, _enough(stored, lying))
    # Of several scans libjpeg keeps all coefficients, up to 6 bytes a pixel, whatever the fraction it decodes at.
    with _turn(image.size if is_one_scan else stored):
        is_usual = is_one_scan and image.mode == "RGB" and not any(_is_sliver(stored, view) for view in lying)
        if is_usual and (found := jpeg.decode(data, image.size)) is not None:
            shown = (
                jpeg.resize(found, *view.cut_of(stored), view.size_of(stored), view.resampling)
                for view in lying
            )
            return _upright(shown, stored, orientation)
        image.load()
        return _show(image, stored, orientation, views)


def _is_one_scan(data: bytes) -> bool:
    """Whether a JPEG has all of its pixels in one scan.

    Raises:
        UndecodableImageError: it has very many of them.
    """
    if jpeg.is_one_scan(data):
        return True
    if data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise UndecodableImageError(f"image/jpeg: more than {MAX_JPEG_SCANS} scans")
    return False


def _is_sliver(picture: Size, view: View) -> bool:
    """Whether so much lies above and to the left of what is shown that it is not to be made (see `jpeg.resize`)."""
    (left, top), (width, height) = view.cut_of(picture)[1], view.size_of(picture)
    return (left + width) * (top + height) - width * height > MAX_CUT_OFF_PIXELS


def _turn(size: Size) -> AbstractContextManager[object]:
    """Return what is held while a picture is decoded at a size: a large one waits for others to be done."""
    return _one_large_picture if math.prod(size) > LARGE_PIXELS else nullcontext()


def _enough(stored: Size, views: Sequence[View]) -> Size:
    """Return the least size of the whole picture that has the detail of every view."""
    scale = 0.0
    for view in views:
        left, top, right, bottom = view.window_of(stored)
        width, height = view.size_of(stored)
        scale = max(scale, width / (right - left), height / (bottom - top))
    return math.ceil(stored[0] * scale * JPEG_GAP), math.ceil(stored[1] * scale * JPEG_GAP)


def _check_pixels(size: Size, limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UndecodableImageError(f"the picture has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"the picture has {width:,} x {height:,} pixels, the limit is {limits.max_pixels:,} in all"
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # unreadable metadata is no reason to refuse readable pixels
        return 1
    return value if isinstance(value, int) and value in _UNDO else 1


def _lying(view: View, orientation: int) -> View:
    """Return `view` as the stored, possibly rotated picture lies."""
    if orientation not in _ON_ITS_SIDE or view.fit == "inside":
        return view
    return replace(view, width=view.height, height=view.width)


def _to_plain_mode(image: Image.Image) -> Image.Image:
    """Convert to a mode that can be averaged over pixels: L, LA, RGB, RGBA, CMYK or YCbCr."""
    transparent = "transparency" in image.info
    if image.mode.startswith("I"):  # 16-bit grey; a transparent grey of it is taken as opaque
        return Image.fromarray(_SIXTEEN_TO_EIGHT[np.clip(np.asarray(image), 0, 65535)])
    if image.mode in ("P", "PA") or transparent:
        return image.convert("RGBA" if transparent or image.mode == "PA" else "RGB")
    return image.convert("L") if image.mode == "1" else image


def _show(image: Image.Image, stored: Size, orientation: int, views: Sequence[View]) -> Picture:
    """Show a loaded picture, which may be a fraction of the stored size by now, in each of `views`."""
    flat = _to_plain_mode(image)
    lying = (_lying(view, orientation) for view in views)
    return _upright((_render(flat, stored, view) for view in lying), stored, orientation)


def _render(image: Image.Image, stored: Size, view: View) -> Pixels:
    left, top, right, bottom = view.window_of(stored)
    across, down = image.width / stored[0], image.height / stored[1]
    image = image.resize(
        view.size_of(stored),
        _RESAMPLING[view.resampling],
        box=(left * across, top * down, min(right * across, image.width), min(bottom * down, image.height)),
        reducing_gap=REDUCING_GAP,
    )
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        image = image.convert("RGBA")
        backdrop = Image.new("RGB", image.size, BACKGROUND)
        backdrop.paste(image, mask=image.getchannel("A"))
        image = backdrop
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image)  # (H, W, 3) uint8


def _upright(shown: Iterable[Pixels], stored: Size, orientation: int) -> Picture:
    """Turn what is shown of a picture as a person sees it."""
    if orientation in _UNDO:
        shown = (np.asarray(Image.fromarray(pixels).transpose(_UNDO[orientation])) for pixels in shown)
    width, height = stored[::-1] if orientation in _ON_ITS_SIDE else stored
    return Picture(tuple(shown), width, height)


def _set_pillow_up(limits: Limits) -> None:
    if (Image.MAX_IMAGE_PIXELS or 0) < limits.max_pixels:
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
    # Not `catch_warnings`: it swaps process-wide state and is not safe in several threads at once. Looked at
    # every time because test runners put their own filters in front.
    if warnings.filters[:1] != [_IGNORE_PILLOW]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _reason(media: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is the address of our buffer
        text = "the header cannot be read"
    if isinstance(error, MemoryError):
        text = "the decoder ran out of memory"
    return f"{media}: {text}"[:MAX_REASON_CHARACTERS]


# Rounded, not cut: 65535 -> 255 and 257 * n -> n.
_SIXTEEN_TO_EIGHT = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
