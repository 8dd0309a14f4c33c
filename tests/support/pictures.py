"""Odd and broken pictures, made when a test asks: what real uploads look like on a bad day."""

import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.models import GUILTY_COLOUR

EXIF_ORIENTATION = 0x0112
# Left half, right half of `halves`: told apart after any lossy codec and any conversion here.
LEFT, RIGHT = (200, 40, 40), (40, 40, 200)

EMPTY = b""
TEXT = b"This is not a picture, whatever its name ends with.\n"


def scene(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Draw a smooth, colourful picture that compresses like a photograph."""
    coarse = np.random.default_rng(seed).integers(40, 215, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def halves(width: int = 64, height: int = 32) -> Image.Image:
    """Draw a picture red on the left and blue on the right, so that turning and mirroring show."""
    image = Image.new("RGB", (width, height), LEFT)
    image.paste(RIGHT, (width // 2, 0, width, height))
    return image


def solid(colour: tuple[int, int, int], side: int = 32, media_type: str = "image/png") -> bytes:
    """Draw a picture of one colour."""
    return encode(Image.new("RGB", (side, side), colour), media_type.removeprefix("image/").upper())


def guilty() -> bytes:
    """Draw the picture that the models of `tests.support.models` cannot stand."""
    return solid(GUILTY_COLOUR)


def encode(image: Image.Image, codec: str, **options: object) -> bytes:
    """Encode with one of Pillow's codecs."""
    buffer = BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0) -> bytes:
    """Return an ordinary photograph-like JPEG."""
    return encode(scene(seed=seed), "JPEG", quality=85)


def truncated_jpeg() -> bytes:
    """Return the first half of a JPEG, as an interrupted upload leaves it."""
    data = jpeg()
    return data[: len(data) // 2]


def bomb_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """Return a valid grey PNG that expands to `width` x `height` pixels from a few hundred kilobytes."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + width)  # filter type, then one byte a pixel
    rows = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    return _png(width, height, bit_depth=8, colour_type=0, pixels=rows)


def bomb_header_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """Return a PNG that only claims to be large; quicker to make than a true bomb."""
    return _png(width, height, bit_depth=8, colour_type=0, pixels=zlib.compress(bytes(64)))


def huge_webp_header() -> bytes:
    """Return a WebP whose canvas would take 1 GiB: 16,383 x 16,383, lossless, without pixels."""
    bits = (16_383 - 1) | (16_383 - 1) << 14
    chunk = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", bits) + b"\x00"
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def huge_gif_header() -> bytes:
    """Return a small GIF whose first frame claims 65,535 x 65,535 pixels and is to be cleared afterwards."""
    extension = b"\x21\xf9\x04\x09\x00\x00\x00\x00"  # disposal: restore to background
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + extension + frame + b";"


def animated(codec: str) -> bytes:
    """Return three frames, `halves` first, the others black: GIF, WEBP or PNG."""
    black = Image.new("RGB", (64, 32))
    return encode(halves(), codec, save_all=True, append_images=[black, black], duration=100)


def cmyk_jpeg() -> bytes:
    """Return `halves` as print shops send it."""
    return encode(halves().convert("CMYK"), "JPEG", quality=95)


def sixteen_bit_png(values: NDArray[np.uint16]) -> bytes:
    """Return a grey PNG of 16 bits a pixel, as microscopes and X-ray machines give; `values` is (H, W)."""
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    height, width = values.shape
    return _png(width, height, bit_depth=16, colour_type=0, pixels=zlib.compress(rows))


def palette_png_with_alpha() -> bytes:
    """Return a palette PNG, red on the left and fully transparent (over black) on the right."""
    image = Image.new("P", (64, 32), 0)
    image.putpalette([*LEFT, 0, 0, 0])
    image.paste(1, (32, 0, 64, 32))
    return encode(image, "PNG", transparency=bytes([255, 0]))


def rotated_jpeg(orientation: int) -> bytes:
    """Return a JPEG that shows `halves` upright only if its EXIF orientation is applied."""
    lying = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = halves() if lying is None else halves().transpose(lying)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encode(image, "JPEG", quality=95, exif=exif.tobytes())


def incompressible(size_bytes: int = 5 * 1024 * 1024) -> bytes:
    """Return a PNG of noise of at least `size_bytes`, and little more."""
    side = int((size_bytes / 3) ** 0.5) + 1
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    return encode(Image.fromarray(noise), "PNG", compress_level=0)


def _png(width: int, height: int, *, bit_depth: int, colour_type: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
