"""The two models that need no weights and no network: triage by quality, and a perceptual fingerprint.

Plain tensor arithmetic over a whole batch; the same picture gives the same result in any batch. Both look
at 256 x 256 pixels: a fault that cannot be seen at that size is not seen.

How the thresholds were measured: over 720 pictures of `loadtest.images` (20 seeds), and over its sharp ones
blurred or made noisy by a known amount. Every class keeps its distance from every threshold that decides on
it by a factor of two or more; `tests/unit/test_models.py` holds them to it.
"""

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.imaging import View
from pipeline.models.protocol import Output, Task

SIDE_PIXELS = 256

# Luminance is 0 (black) to 1 (white), ITU-R BT.601 weights over sRGB values, as JPEG has it.
DARK_EXPOSURE = 0.15  # mean luminance; dark samples reach 0.08, well-exposed ones begin at 0.41
BRIGHT_EXPOSURE = 0.80  # mean luminance; blown-out samples begin at 0.97, others end at 0.60
# Standard deviation of luminance. A night street or a printed page is dark or bright on the whole, but has
# contrast (0.2 and more); underexposed samples reach 0.03, blown-out ones 0.07.
EXPOSURE_FAULT_CONTRAST = 0.12
FLAT_CONTRAST = (
    0.02  # standard deviation of luminance, 5 of 255: fog, a lens cap; blurred samples begin at 0.05
)
# Standard deviation of noise in luminance, 5 of 255. Clean samples end at 0.001, noisy ones begin at 0.04;
# grain of 8 of 255 added to a clean picture measures 0.03.
NOISE = 0.02
# Share of fine detail that a further blur would take away. Sharp samples begin at 0.75, blurred ones end at
# 0.02; the median crosses 0.35 at a Gaussian blur of 1.8 pixels (of 256).
SHARPNESS = 0.35

# Pictures at a time on a CPU, so that their planes (256 KiB each) stay in its cache: 0.5 ms a picture instead
# of 1.4 ms in batches of 32 (2 threads).
CPU_CHUNK = 2

NOISE_BLOCK_PIXELS = 16
NOISE_QUANTILE = 0.1  # texture fills many blocks of a picture, noise fills all of them
REBLUR_PIXELS = 9  # width of the further blur, as in Crété-Roffet 2007
# A smooth ramp becomes steps of 1 of 255 when it is stored; without this floor those count as fine detail
# (blurred samples would reach 0.47 instead of 0.02).
STEP_FLOOR = 2 / 255

# Most decisive first: a dark picture also looks blurred, a noisy one sharp.
FAULTS = ("dark", "overexposed", "noisy", "flat", "blurred")
LABELS = ("keep", *FAULTS)

FINGERPRINT_DIMENSION = 256
_GRID = 32  # cells a side that the fingerprint averages over; finer detail does not survive re-encoding
_LUMA_COEFFICIENTS = 199
_CHROMA_COEFFICIENTS = 28
# A picture of one colour has no other component; far below any real one after the square root.
_CONSTANT_COMPONENT = 0.05


class QualityModel:
    """Triage without a reference picture: a label of `LABELS`, and how sure it is.

    `score` is 0.5 at the threshold that decides the label and nears 1 away from it. `scores` are
    `sharpness` (0..1), `exposure` (mean luminance, 0..1), `contrast` and `noise` (standard deviations of
    luminance).
    """

    name = "builtin:quality"
    version = "1"
    task: Task = "classify"
    view = View(SIDE_PIXELS, SIDE_PIXELS)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.digest = _digest(
            self.name, self.version, DARK_EXPOSURE, BRIGHT_EXPOSURE, EXPOSURE_FAULT_CONTRAST, FLAT_CONTRAST,
            NOISE, SHARPNESS, NOISE_BLOCK_PIXELS, NOISE_QUANTILE, REBLUR_PIXELS, STEP_FLOOR,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Run once, so that kernels are chosen and memory is there."""
        self.forward(torch.zeros(2, 3, SIDE_PIXELS, SIDE_PIXELS, dtype=torch.uint8, device=self._device))

    def forward(self, batch: Tensor) -> list[Output]:
        """Measure and label each picture of (N, 3, 256, 256) uint8."""
        chunk = CPU_CHUNK if batch.device.type == "cpu" else len(batch)
        return [output for part in torch.split(batch, chunk) for output in self._measure(part)]

    def _measure(self, batch: Tensor) -> list[Output]:
        luma = _luma(batch)  # (N, H, W) float32
        exposure, contrast = luma.mean((1, 2)), luma.std((1, 2), correction=0)
        noise, sharpness = _noise(luma), _sharpness(luma)
        ordinary = _excess(contrast, EXPOSURE_FAULT_CONTRAST)
        faults = torch.stack(
            [
                torch.minimum(1 - _excess(exposure, DARK_EXPOSURE), 1 - ordinary),
                torch.minimum(1 - _excess(1 - exposure, 1 - BRIGHT_EXPOSURE), 1 - ordinary),
                _excess(noise, NOISE),
                1 - _excess(contrast, FLAT_CONTRAST),
                1 - _excess(sharpness, SHARPNESS),
            ],
            dim=1,
        )  # (N, 5) in the order of FAULTS
        measured = torch.stack([sharpness, exposure, contrast, noise], dim=1)  # (N, 4)
        return [
            _triage(*row) for row in zip(faults.double().tolist(), measured.double().tolist(), strict=True)
        ]


class FingerprintModel:
    """A perceptual embedding: the low frequencies of brightness and colour, L2-normalised.

    Re-encoding, resizing and slight changes of brightness or contrast keep the cosine above 0.99; samples of
    different scenes stay below 0.5. It does not see through cropping, turning or mirroring.
    """

    name = "builtin:fingerprint"
    version = "1"
    task: Task = "embed"
    view = View(SIDE_PIXELS, SIDE_PIXELS)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.digest = _digest(
            self.name, self.version, FINGERPRINT_DIMENSION, _GRID, _LUMA_COEFFICIENTS, _CHROMA_COEFFICIENTS,
            _CONSTANT_COMPONENT,
        )  # fmt: skip
        self._dct = _dct_matrix(_GRID).to(device)  # (32, 32)
        self._zigzag = _zigzag(_GRID).to(device)  # (32 * 32,)
        # JFIF: RGB -> Y, Cb, Cr
        self._ycc = torch.tensor(
            [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], device=device
        )

    def warm_up(self) -> None:
        """Run once, so that kernels are chosen and memory is there."""
        self.forward(torch.zeros(2, 3, SIDE_PIXELS, SIDE_PIXELS, dtype=torch.uint8, device=self._device))

    def forward(self, batch: Tensor) -> list[Output]:
        """Embed each picture of (N, 3, 256, 256) uint8 in `FINGERPRINT_DIMENSION` numbers."""
        colours = self._ycc @ _cells(batch).flatten(1, 2).transpose(1, 2)  # (N, 3, 32 * 32)
        planes = colours.reshape(-1, 3, _GRID, _GRID)  # (N, 3, 32, 32)
        frequencies = (self._dct @ planes @ self._dct.T).flatten(2)[:, :, self._zigzag]  # (N, 3, 32 * 32)
        luma = frequencies[:, 0, 1 : 1 + _LUMA_COEFFICIENTS]  # without the mean, which is brightness
        chroma = frequencies[:, 1:, :_CHROMA_COEFFICIENTS].flatten(1)
        components = torch.cat([luma, chroma], dim=1)  # (N, 255)
        # Spectra fall as 1 / frequency: the root lets fine structure count beside coarse.
        components = components.sign() * components.abs().sqrt()
        constant = components.new_full((len(components), 1), _CONSTANT_COMPONENT)
        embedding = functional.normalize(torch.cat([components, constant], dim=1))  # (N, 256)
        return [Output(embedding=row) for row in embedding.cpu().numpy()]


def _triage(faults: list[float], measured: list[float]) -> Output:
    sharpness, exposure, contrast, noise = measured
    label, score = "keep", 1 - max(faults)
    for name, degree in zip(FAULTS, faults, strict=True):
        if degree >= 0.5:
            label, score = name, degree
            break
    scores = {"sharpness": sharpness, "exposure": exposure, "contrast": contrast, "noise": noise}
    return Output(
        label=label, score=round(score, 4), scores={key: round(value, 5) for key, value in scores.items()}
    )


def _excess(value: Tensor, threshold: float) -> Tensor:
    """Map a measure to 0..1: 0.5 at the threshold, 0.8 at twice and 0.2 at half of it."""
    squared = (value / threshold) ** 2
    return squared / (1 + squared)


def _luma(batch: Tensor) -> Tensor:
    luma = torch.mul(batch[:, 0], 0.299 / 255)
    return luma.add_(batch[:, 1], alpha=0.587 / 255).add_(batch[:, 2], alpha=0.114 / 255)  # (N, H, W) float32


def _noise(luma: Tensor) -> Tensor:
    """Estimate the standard deviation of noise (Immerkær 1996), in the quieter blocks of each picture."""
    rows = luma[:, 2:] + luma[:, :-2]
    rows.sub_(luma[:, 1:-1], alpha=2)
    both = rows[:, :, 2:] + rows[:, :, :-2]
    both.sub_(rows[:, :, 1:-1], alpha=2).abs_()  # (N, H - 2, W - 2): blind to ramps and straight edges
    blocks = functional.avg_pool2d(both[:, None], NOISE_BLOCK_PIXELS).flatten(1)  # (N, blocks)
    quiet = blocks.kthvalue(int(blocks.shape[1] * NOISE_QUANTILE), dim=1).values
    return quiet * (math.sqrt(math.pi / 2) / 6)  # (N,)


def _sharpness(luma: Tensor) -> Tensor:
    """Return the share of fine detail that a further blur takes away, in the worse direction.

    After Crété-Roffet et al. 2007, "The Blur Effect": what blurring hardly changes was blurred already.
    """
    return torch.minimum(_detail_lost(luma, 1), _detail_lost(luma, 2))  # (N,)


def _detail_lost(luma: Tensor, dim: int) -> Tensor:
    length = luma.shape[dim] - REBLUR_PIXELS
    middle = REBLUR_PIXELS // 2
    steps = luma.narrow(dim, middle + 1, length) - luma.narrow(dim, middle, length)
    steps = steps.abs_().sub_(STEP_FLOOR).relu_()
    # Steps of the box-blurred picture, without blurring it: neighbouring boxes differ in their ends only.
    blurred = (luma.narrow(dim, REBLUR_PIXELS, length) - luma.narrow(dim, 0, length)).abs_()
    lost = steps.sub(blurred, alpha=1 / REBLUR_PIXELS).relu_()
    return lost.sum((1, 2)) / steps.sum((1, 2)).clamp_(min=1.0)  # (N,); no detail at all is not sharp


def _cells(batch: Tensor) -> Tensor:
    """Average each cell of a 32 x 32 grid; exact, in integers, without a float copy of the pixels."""
    side = SIDE_PIXELS // _GRID
    rows = batch.permute(0, 2, 3, 1).reshape(-1, _GRID, side, SIDE_PIXELS * 3).sum(2, dtype=torch.int32)
    cells = rows.reshape(-1, _GRID, _GRID, side, 3).sum(3)
    return cells.float() / (side * side * 255)  # (N, 32, 32, 3) float32


def _dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II as a matrix."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (index + 0.5)[None] * index[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _zigzag(size: int) -> Tensor:
    """Return flat indices of a square, lowest frequencies first."""
    cells = sorted(
        ((row, column) for row in range(size) for column in range(size)), key=lambda at: (sum(at), at)
    )
    return torch.tensor([row * size + column for row, column in cells])


def _digest(*parts: object) -> str:
    """Stand in for a digest of weights: what the arithmetic depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
