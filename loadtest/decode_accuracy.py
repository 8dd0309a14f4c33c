"""Does decoding JPEGs at a fraction of their size change what a trained network says?

`python -m loadtest.decode_accuracy` draws textures whose direction and fineness vary continuously, trains a small
network on their full decodes to tell twelve classes of them, and asks it about other pictures, decoded as the
engine does and in full. Many lie near a border between two classes, and the finest stripes are near what the view
can show, so that small differences are seen; a decode that is too coarse, for comparison, is.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline import imaging
from pipeline.imaging import View

_DIRECTIONS, _FINENESSES = 4, 3
#: Period of the stripes in pixels of the view; 2 are the least that pixels can show.
_FINEST, _COARSEST = 2.4, 9.6
_BATCH = 50
_PASSES = 30

Pixels = NDArray[np.uint8]
Decode = Callable[[bytes, View], Pixels]


@dataclass(frozen=True)
class Agreement:
    """How one way of decoding compares with the full decode."""

    #: Share of pictures with the same best class.
    same_class: float
    #: Share of pictures whose class is right.
    accuracy: float
    #: Of the best class's probability, on average.
    probability_difference: float


@dataclass(frozen=True)
class Accuracy:
    """What a network says of pictures decoded in full, as the engine does, and too coarsely."""

    pictures: int
    view_pixels: int
    full_accuracy: float
    fraction: Agreement
    too_coarse: Agreement


def draw(rng: np.random.Generator, view: View) -> tuple[bytes, int]:
    """Draw a JPEG of stripes on a coloured scene, and say its class."""
    assert view.shorter_side is not None
    # What is decoded at a fraction of 1/4 has from 1.5 to 3 times the size that is wanted of it.
    shorter = int(rng.uniform(1.0, 2.0) * 4 * imaging.JPEG_GAP * view.shorter_side) + 1
    height, width = shorter, int(shorter * rng.uniform(1.0, 1.4))
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    fineness = rng.uniform(0, 1)
    period = _FINEST * (_COARSEST / _FINEST) ** fineness * shorter / view.shorter_side
    rate = np.float32(2 * np.pi / period)
    phase = (across * np.float32(np.cos(angle)) + down * np.float32(np.sin(angle))) * rate
    stripes = np.tanh(2 * np.sin(phase + np.float32(rng.uniform(0, 6)))) * np.float32(rng.uniform(12, 45))
    light = rng.uniform(-40, 40, 2).astype(np.float32)
    scene = (
        128 + light[0] * (down / height - 0.5) + light[1] * (across / width - 0.5) + stripes
    )  # (H, W) float32
    grain = rng.standard_normal((height, width), dtype=np.float32) * 6
    picture = (scene + grain)[..., None] + rng.uniform(-45, 45, 3).astype(np.float32)  # (H, W, 3) float32
    for _ in range(3):  # what lies in front
        top, left = rng.integers(0, height), rng.integers(0, width)
        sides = rng.integers(shorter // 12, shorter // 4, 2)
        picture[top : top + sides[0], left : left + sides[1]] = rng.integers(0, 256, 3)
    buffer = BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    kind = int(angle / np.pi * _DIRECTIONS) % _DIRECTIONS * _FINENESSES + int(fineness * _FINENESSES)
    return buffer.getvalue(), kind


def decode_fully(data: bytes, view: View) -> Pixels:
    """Decode every pixel and resize once, as libraries do that networks are trained with."""
    return _decoded(data, view, 1)


def decode_too_coarsely(data: bytes, view: View) -> Pixels:
    """Decode at an eighth, where a quarter would do."""
    return _decoded(data, view, 8)


def decode(data: bytes, view: View) -> Pixels:
    """Decode as the engine does."""
    return imaging.decode(data, [view]).pixels[0]


def measure(*, seed: int, train: int, test: int, view: View) -> Accuracy:
    """Train on `train` pictures and compare on `test` others; the same seed draws the same pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network gives a second one nothing to do but wait
    try:
        return _measured(seed, train, test, view)
    finally:
        torch.set_num_threads(threads)


def _measured(seed: int, train: int, test: int, view: View) -> Accuracy:
    rng = np.random.default_rng(seed)
    drawn = [draw(rng, view) for _ in range(train)]
    network = _trained(
        _tensor([decode_fully(data, view) for data, _ in drawn]), [kind for _, kind in drawn], seed
    )
    drawn = [draw(rng, view) for _ in range(test)]
    kinds = torch.tensor([kind for _, kind in drawn])
    full, fraction, coarse = (
        _asked(network, _tensor([one(data, view) for data, _ in drawn]))
        for one in (decode_fully, decode, decode_too_coarsely)
    )
    return Accuracy(
        pictures=test,
        view_pixels=view.width,
        full_accuracy=_share(full.argmax(1) == kinds),
        fraction=_agreement(full, fraction, kinds),
        too_coarse=_agreement(full, coarse, kinds),
    )


def _decoded(data: bytes, view: View, divisor: int) -> Pixels:
    with Image.open(BytesIO(data)) as image:
        stored = image.size
        if divisor > 1:
            image.draft(None, (stored[0] // divisor, stored[1] // divisor))
        scale = image.width / stored[0], image.height / stored[1]
        left, top, right, bottom = view.window_of(stored)
        box = (
            left * scale[0],
            top * scale[1],
            min(right * scale[0], image.width),
            min(bottom * scale[1], image.height),
        )
        return np.asarray(image.resize((view.width, view.height), Image.Resampling.BILINEAR, box=box))


def _tensor(pictures: Sequence[Pixels]) -> Tensor:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    return (pixels.float() - 128) / 64  # (N, 3, H, W) float32


def _trained(pictures: Tensor, kinds: Sequence[int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels, following in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(channels, following, 3, padding=1),
            nn.BatchNorm2d(following),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, _DIRECTIONS * _FINENESSES)
    )
    labels = torch.tensor(kinds)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    steps = _PASSES * (len(pictures) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
    for _ in range(_PASSES):
        order = torch.randperm(len(pictures))
        for chosen in torch.split(order, _BATCH)[: len(pictures) // _BATCH]:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(network(pictures[chosen]), labels[chosen])
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return network.eval()


def _asked(network: nn.Module, pictures: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat(
            [network(batch).softmax(1) for batch in torch.split(pictures, _BATCH)]
        )  # (N, 12) float32


def _agreement(full: Tensor, other: Tensor, kinds: Tensor) -> Agreement:
    best = full.argmax(1, keepdim=True)
    return Agreement(
        same_class=_share(best.squeeze(1) == other.argmax(1)),
        accuracy=_share(other.argmax(1) == kinds),
        probability_difference=round((full.gather(1, best) - other.gather(1, best)).abs().mean().item(), 4),
    )


def _share(held: Tensor) -> float:
    return round(held.float().mean().item(), 4)


def main() -> None:
    """Measure and print JSON; an argument is the seed."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    started = time.monotonic()
    found = measure(seed=seed, train=1000, test=2000, view=View(64, 64, "crop", 72))
    print(json.dumps({"seed": seed, **asdict(found), "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
