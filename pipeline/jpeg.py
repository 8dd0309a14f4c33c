"""The usual JPEG, in two thirds of Pillow's time: libjpeg-turbo into an array, and torch's resize.

Pillow decodes with the same library, pixel for pixel, into memory of its own, and copies from there; its resize
is plain C, torch's has vector instructions and comes to the same but for roundings. Whatever is not usual here
is left to Pillow, and so is what to say of a broken picture.
"""

import math
import threading
from typing import Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

Size = tuple[int, int]  # width and height in pixels
Pixels = NDArray[np.uint8]  # (H, W, 3)

# Kept by a thread from picture to picture; a larger picture gets memory of its own.
_KEPT_BYTES = 16 * 1024 * 1024
# How many source pixels beside its centre an output pixel is made of, in units of the scale.
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
_OTHER_FRAMES = frozenset({0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})  # JPEG, table B.1
# Or fill, where another byte follows. A reader that took what comes next for a length would miss what libjpeg sees.
_WITHOUT_LENGTH = frozenset({*range(0xD0, 0xDA), 0xFF})

_own = threading.local()


def is_one_scan(data: bytes) -> bool:
    """Whether the first scan of a JPEG is all of it, as in nearly every one: libjpeg then takes no second one.

    Looking through the whole file for scans takes 4 % of a decode.
    """
    at, components = 2, 0
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan, with the number of components in it
            return data[at + 4] == components > 0
        if marker in (0xC0, 0xC1):  # a sequential frame, with the number of components of the picture
            components = data[at + 9]
        elif marker < 0xC4 or marker in _OTHER_FRAMES or marker in _WITHOUT_LENGTH:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def decode(data: bytes, size: Size) -> Pixels | None:
    """Decode a JPEG of three components at the fraction that has this size; None if it is broken in any way.

    The array is valid until the same thread decodes its next picture.
    """
    width, height = size
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_width=width, min_height=height, buffer=_buffer(width * height * 3)
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def resize(
    pixels: Pixels, whole: Size, corner: Size, size: Size, resampling: Literal["bilinear", "bicubic"]
) -> Pixels:
    """Return what is `size` large from `corner` (left, top) on in a picture that is resized to `whole`.

    Antialiased, within 1 of Pillow's. No more is made than that and what lies above it and to its left.
    """
    height, width = pixels.shape[:2]
    reach = _SUPPORT[resampling]
    across, needed_across = _needed(width, whole[0], corner[0] + size[0], reach)
    down, needed_down = _needed(height, whole[1], corner[1] + size[1], reach)
    # Channels last and without gaps, as torch takes it: else it makes a copy, in threads of its own.
    part = np.ascontiguousarray(pixels[:needed_down, :needed_across])
    source = torch.from_numpy(part).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
    with torch.inference_mode():
        resized = interpolate(
            source,
            scale_factor=(down, across),
            mode=resampling,
            antialias=True,
            recompute_scale_factor=False,
        )
    left, top = corner
    shown: Pixels = resized[0].permute(1, 2, 0).numpy()[top : top + size[1], left : left + size[0]]
    return shown


def _needed(there: int, wanted: int, end: int, reach: float) -> tuple[float, int]:
    """Return the scale from `there` to `wanted` pixels, and how many of those there the first `end` are made of."""
    scale = wanted / there * (1 + 1e-9)  # torch cuts size times scale to an integer
    return scale, min(there, math.ceil(end * there / wanted + reach * max(1.0, there / wanted)) + 1)


def _buffer(size_bytes: int) -> bytearray | None:
    """Return memory of this thread's for so many bytes; None: there is none to keep."""
    if size_bytes > _KEPT_BYTES:
        return None
    if size_bytes > len(getattr(_own, "buffer", b"")):
        _own.buffer = bytearray(size_bytes)
    buffer: bytearray = _own.buffer
    return buffer
