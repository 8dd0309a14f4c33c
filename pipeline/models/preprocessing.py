"""What belongs to the weights of a model and comes before it: a view, then mean and deviation.

The view is made by the decoder, mean and deviation by one operation on the device. `check_against` compares
both with what the library that the weights come from would do; a model whose preprocessing cannot be had so
is refused, because it would predict, only worse.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import imaging
from pipeline.imaging import View
from pipeline.models.specification import Specification

# Mean difference, of a pixel range of 0..1, between our input of a model and its library's own, on a smooth
# picture. Other resize code differs by 0.001 to 0.003; a wrong view, mean or channel order by 0.05 and more.
TOLERANCE = 0.012
_PROBE_SIZES = ((640, 448), (416, 608))  # both ways round: a view that mixes up width and height shows
# How libraries call what Pillow does; Lanczos is nearest to bicubic, and on photographs hard to tell from it.
_RESAMPLING = {
    2: "bilinear",
    3: "bicubic",
    1: "bicubic",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "bicubic",
}
_own = threading.local()


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become a model's input; mean and deviation are of 0..1, per channel."""

    view: View
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse a deviation that would divide by nothing."""
        if not all(math.isfinite(value) for value in self.mean) or not all(value > 0 for value in self.std):
            raise ValueError("`mean` must be three numbers, `std` three numbers above 0")


class Normaliser:
    """Makes (N, 3, H, W) uint8 into float32 with mean and deviation taken out; both channels last."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        # A row of pixels long: on a CPU ten times faster than with one number per channel (1.9 ms instead of
        # 20 for 32 pictures of 224 x 224, one thread).
        width = max(preprocessing.view.width, preprocessing.view.height)
        self._scale = (1 / (255 * std)).float().repeat(width).to(device)  # (W * 3,)
        self._bias = (-mean / std).float().repeat(width).to(device)  # (W * 3,)

    def __call__(self, batch: Tensor, *, in_place_of_last: bool = False) -> Tensor:
        """Normalise a batch; `in_place_of_last` takes the memory of the last batch of this thread that did so.

        It is the largest tensor of most passes. Where the heap had no hole for it between others, memory grew by
        one: in 20,000 pictures five times, by 5 to 19 MB.
        """
        count, channels, height, width = batch.shape
        row = width * channels
        rows = batch.permute(0, 2, 3, 1).reshape(count * height, row)
        kept = None
        if in_place_of_last:
            kept = _kept_for(rows)
            # Not left to the operation: on a CPU it would make another tensor for it, on a GPU converts as it goes.
            rows = kept.copy_(rows)
        rows = torch.addcmul(self._bias[:row], rows, self._scale[:row], out=kept)  # (N * H, W * 3) float32
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _kept_for(rows: Tensor) -> Tensor:
    """Return this thread's memory for so many float32 numbers, used again for every batch of every model."""
    if getattr(_own, "kept", rows[:0]).numel() < rows.numel():
        _own.kept = None  # first, so that there are never two
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
            _own.kept = torch.empty(rows.numel(), device=rows.device)
    kept: Tensor = _own.kept
    return kept[: rows.numel()].view(rows.shape)


def resampling_of(specification: Specification, name: Any) -> Any:
    """Return our name of a filter that a library names or numbers.

    Raises:
        ConfigurationError: there is no such filter here.
    """
    found = _RESAMPLING.get(name)
    if found is None:
        raise specification.error(f"its pictures are resized by {name!r}, which is not supported")
    return found


def check_against(
    specification: Specification, ours: Preprocessing, theirs: Callable[[Image.Image], Tensor]
) -> None:
    """Compare a model's input with its library's own preprocessing; `theirs` returns (3, H, W) float32.

    Raises:
        ConfigurationError: They are different.
    """
    normalise = Normaliser(ours, torch.device("cpu"))
    for size in _PROBE_SIZES:
        probe = probe_picture(size)
        buffer = BytesIO()
        probe.save(buffer, "PNG", compress_level=1)
        pixels = imaging.decode(buffer.getvalue(), [ours.view]).pixels[0]
        mine = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]  # (3, H, W)
        other = theirs(probe)
        difference = _difference(mine, other, ours)
        if difference > TOLERANCE:
            raise specification.error(
                "its preprocessing cannot be reproduced: the input of a picture of "
                f"{size[0]} x {size[1]} is {tuple(mine.shape)}, its library's own {tuple(other.shape)}, and they "
                f"differ by {difference:.3f} of the pixel range ({TOLERANCE} is allowed)"
            )


def probe_picture(size: tuple[int, int]) -> Image.Image:
    """Draw a smooth picture that is different in every direction and channel."""
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    channels = (
        0.15 + 0.5 * across + 0.25 * np.sin(9 * down),
        0.55 + 0.35 * np.sin(7 * across + 3 * down),
        0.85 - 0.6 * down * across + 0.1 * np.cos(11 * across),
    )
    return Image.fromarray((np.clip(np.stack(channels, 2), 0, 1) * 255).round().astype(np.uint8))


def _difference(mine: Tensor, other: Tensor, preprocessing: Preprocessing) -> float:
    """Return the mean difference, of a pixel range of 0..1; infinite when the shapes differ."""
    if mine.shape[0] != other.shape[0] or any(
        abs(a - b) > 1 for a, b in zip(mine.shape[1:], other.shape[1:], strict=False)
    ):
        return math.inf
    height, width = (min(a, b) for a, b in zip(mine.shape[1:], other.shape[1:], strict=True))
    std = torch.tensor(preprocessing.std)[:, None, None]
    return float(((mine[:, :height, :width] - other[:, :height, :width]).abs() * std).mean())
