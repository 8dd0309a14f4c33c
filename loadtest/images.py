"""Sample pictures drawn from a seed: scenes with edges and texture, and what is wrong with them.

The same seed draws the same scenes for ever; the encoded bytes may change with the codec's version. Every
picture says which label `builtin:quality` must give it: the classes are drawn far from its thresholds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Kind = Literal["sharp", "blurred", "dark", "overexposed", "noisy", "near_duplicate"]
Label = Literal["keep", "blurred", "dark", "overexposed", "noisy"]

#: One of each in every six pictures, in this order.
KINDS: tuple[Kind, ...] = ("sharp", "blurred", "dark", "overexposed", "noisy", "near_duplicate")
EXPECTED_LABELS: dict[Kind, Label] = {
    "sharp": "keep",
    "blurred": "blurred",
    "dark": "dark",
    "overexposed": "overexposed",
    "noisy": "noisy",
    "near_duplicate": "keep",
}
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")

_MIN_SIDE_PIXELS, _MAX_SIDE_PIXELS = 288, 512
_Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class SamplePicture:
    """An encoded picture, the label it must get, and the id of the picture it is nearly the same as."""

    id: str
    data: bytes
    media_type: str
    expected_label: Label
    near_duplicate_of: str | None = None


def draw(seed: int, count: int) -> Iterator[SamplePicture]:
    """Draw `count` pictures: all kinds in turn, each kind in every media type, each one a new scene."""
    for index in range(count):
        yield draw_one(seed, index)


def draw_one(seed: int, index: int) -> SamplePicture:
    """Draw the picture at one place of the sequence, independently of the others."""
    kind = KINDS[index % len(KINDS)]
    media_type = MEDIA_TYPES[(index + index // len(KINDS)) % len(MEDIA_TYPES)]
    original = index - index % len(KINDS) if kind == "near_duplicate" else None
    scene = _scene(np.random.default_rng([seed, index if original is None else original]))
    rng = np.random.default_rng([seed, index, 1])
    picture = _SPOIL[kind](scene, rng)
    return SamplePicture(
        id=sample_id(seed, index),
        data=_encode(picture, media_type, rng),
        media_type=media_type,
        expected_label=EXPECTED_LABELS[kind],
        near_duplicate_of=None if original is None else sample_id(seed, original),
    )


def draw_photo(seed: int, index: int, width: int = 1280, height: int = 960) -> bytes:
    """Draw what a camera sends: a JPEG of quality 88, about 150 kB at 1280 x 960, the same for the same seed."""
    rng = np.random.default_rng([seed, index, 2])
    scene = _scene(rng, (width, height), shapes=26).filter(ImageFilter.GaussianBlur(1.0))  # a lens
    grain = rng.normal(0.0, 2.0, (height, width, 1)).astype(np.float32)  # a sensor in daylight
    buffer = BytesIO()
    _to_image(np.asarray(scene, dtype=np.float32) + grain).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def sample_id(seed: int, index: int) -> str:
    """Return the id of the picture at one place of a seed's sequence."""
    return f"sample-{seed}-{index:06d}"


def _scene(rng: _Rng, size: tuple[int, int] | None = None, shapes: int | None = None) -> Image.Image:
    """Draw a well-exposed, sharp scene: a soft background, then flat, striped and lettered shapes."""
    width, height = size or (int(side) for side in rng.integers(_MIN_SIDE_PIXELS, _MAX_SIDE_PIXELS, 2))
    image = Image.fromarray(_background(rng, width, height))
    pen = ImageDraw.Draw(image)
    for _ in range(shapes or int(rng.integers(14, 24))):
        x, y = int(rng.integers(-20, width)), int(rng.integers(-20, height))
        w, h = (int(side) for side in rng.integers(24, max(25, min(width, height) // 3), 2))
        shape = int(rng.integers(0, 5))
        if shape == 0:
            pen.rectangle((x, y, x + w, y + h), fill=_colour(rng), outline=_colour(rng), width=2)
        elif shape == 1:
            pen.ellipse((x, y, x + w, y + h), fill=_colour(rng), outline=_colour(rng), width=2)
        elif shape == 2:
            corners = [(x + int(dx), y + int(dy)) for dx, dy in rng.integers(0, 90, (4, 2))]
            pen.polygon(corners, fill=_colour(rng), outline=_colour(rng))
        elif shape == 3:
            _stripes(pen, rng, (x, y, x + w, y + h))
        else:
            _letters(pen, rng, (x, y, x + w, y + h))
    return image


def _background(rng: _Rng, width: int, height: int) -> NDArray[np.uint8]:
    """Blend a few colours over a coarse grid, so that no two scenes share their light."""
    grid = rng.integers(50, 200, (3, 4, 3)).astype(np.uint8)
    soft = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(soft)  # (H, W, 3) uint8


def _colour(rng: _Rng) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(15, 236, 3))
    return red, green, blue


def _stripes(pen: ImageDraw.ImageDraw, rng: _Rng, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    pen.rectangle(box, fill=_colour(rng))
    step, colour = int(rng.integers(8, 16)), _colour(rng)
    for x in range(left, right, step):
        pen.rectangle((x, top, min(x + step // 2, right), bottom), fill=colour)


def _letters(pen: ImageDraw.ImageDraw, rng: _Rng, box: tuple[int, int, int, int]) -> None:
    """Draw rows of short bars, as a page of print looks from afar."""
    left, top, right, bottom = box
    pen.rectangle(box, fill=(225, 225, 220))
    for y in range(top + 4, bottom - 3, 8):
        x = left + 4
        while x < right - 12:
            length = int(rng.integers(4, 12))
            pen.rectangle((x, y, x + length, y + 3), fill=(35, 35, 45))
            x += length + 4


def _sharp(scene: Image.Image, rng: _Rng) -> Image.Image:
    return scene


def _blurred(scene: Image.Image, rng: _Rng) -> Image.Image:
    # 2.5 to 4 % of the long side: a lens far out of focus, whatever size the picture is looked at.
    return scene.filter(ImageFilter.GaussianBlur(max(scene.size) * float(rng.uniform(0.025, 0.04))))


def _dark(scene: Image.Image, rng: _Rng) -> Image.Image:
    return _scaled(scene, float(rng.uniform(0.06, 0.14)))


def _overexposed(scene: Image.Image, rng: _Rng) -> Image.Image:
    return _scaled(scene, float(rng.uniform(2.5, 4.0)), float(rng.uniform(90, 130)))


def _noisy(scene: Image.Image, rng: _Rng) -> Image.Image:
    values = np.asarray(scene, dtype=np.float32)  # (H, W, 3) float32
    grain = rng.normal(
        0.0, float(rng.uniform(54, 74)), values.shape[:2]
    )  # luminance noise, as of a dim sensor
    return _to_image(values + grain[..., None])


def _near_duplicate(scene: Image.Image, rng: _Rng) -> Image.Image:
    scale = float(rng.uniform(0.75, 1.25))
    resized = scene.resize(
        (round(scene.width * scale), round(scene.height * scale)), Image.Resampling.LANCZOS
    )
    return _scaled(resized, float(rng.uniform(0.93, 1.07)), float(rng.uniform(-6, 6)))


_SPOIL: dict[Kind, Callable[[Image.Image, _Rng], Image.Image]] = {
    "sharp": _sharp,
    "blurred": _blurred,
    "dark": _dark,
    "overexposed": _overexposed,
    "noisy": _noisy,
    "near_duplicate": _near_duplicate,
}


def _scaled(scene: Image.Image, gain: float, offset: float = 0.0) -> Image.Image:
    return _to_image(np.asarray(scene, dtype=np.float32) * gain + offset)


def _to_image(values: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, media_type: str, rng: _Rng) -> bytes:
    buffer = BytesIO()
    quality = int(rng.integers(82, 95))
    if media_type == "image/png":
        image.save(buffer, "PNG", compress_level=1)  # the fastest of each codec: a load test draws thousands
    elif media_type == "image/webp":
        image.save(buffer, "WEBP", quality=quality, method=1)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
