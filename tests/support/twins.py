"""Models that may be another on the GPU, for `python:tests.support.twins:NAME?on_gpu=WHAT`.

The tests' GPU is the CPU by another name, `GPU`: everything runs for real, and a factory can tell the two apart.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.imaging import View
from pipeline.models import LoadOptions
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.specification import Specification
from pipeline.models.tasks import Classify, Detect, Embed, Reader, Score, numbered

GPU = torch.device("cpu:0")
_BATCH = 4
_FINDS = 60


class Unpackable(nn.Conv2d):
    """Leaves one way to run its network, so that nothing races and passes can be counted."""


class _Network(nn.Module):
    """Makes numbers of mean colours, and goes wrong as it is told."""

    def __init__(self, outputs: int, wrong: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = Unpackable(3, 8, 3)
        self.head = nn.Linear(8, outputs)
        self._wrong = wrong
        self._full_batches = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self._full_batches += len(pixels) == _BATCH
        if self._wrong == "small":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self._wrong == "lost" and self._full_batches == 2:  # the first one is the warm-up's
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        numbers: Tensor = self.head(self.convolution(pixels).mean((2, 3)))
        if self._wrong == "rounds":
            return numbers + 1e-4 * torch.randn(numbers.shape)
        if self._wrong == "overflows":
            return numbers * float("inf")
        return numbers.flip(-1) + 0.1 if self._wrong == "errs" else numbers


class _Finder(nn.Module):
    """Finds the same in every picture: boxes of scores from 0.4 to 0.9, some on top of each other."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self._wrong = wrong

    def forward(self, pixels: Tensor) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        corners = 200 * torch.rand(_FINDS, 2, generator=generator)
        boxes = torch.cat([corners, corners + 20 + 100 * torch.rand(_FINDS, 2, generator=generator)], 1)
        scores = torch.linspace(0.4, 0.9, _FINDS)
        if (
            self._wrong == "rounds"
        ):  # more of them are above the threshold, and of two alike the other is kept
            boxes, scores = boxes + 0.5, scores + 0.01
            boxes[-1] += 100
        if self._wrong == "errs" or (self._wrong == "rounds" and torch.backends.cudnn.allow_tf32):
            boxes = boxes.roll(_FINDS // 2, 0)
        if self._wrong == "overflows":
            boxes = boxes * float("inf")
        return [{"boxes": boxes, "scores": scores, "labels": torch.ones(_FINDS)}] * len(pixels)


def classifier(device: torch.device, on_gpu: str = "right") -> ModuleModel:
    """Classify as random weights do: into a thousand classes of which none stands out."""
    network = _Network(1000, _here(device, on_gpu))
    network.head.weight.data *= 1e-4
    network.head.bias.data *= 1e-4
    return _twin(Classify(numbered(1000)), network, device)


def embedder(device: torch.device, on_gpu: str = "right") -> ModuleModel:
    """Embed in 16 numbers."""
    return _twin(Embed(), _Network(16, _here(device, on_gpu)), device)


def scorer(device: torch.device, on_gpu: str = "right") -> ModuleModel:
    """Score."""
    return _twin(Score(), _Network(1, _here(device, on_gpu)), device)


def detector(device: torch.device, on_gpu: str = "right") -> ModuleModel:
    """Detect."""
    return _twin(Detect({1: "cat"}, 0.5), _Finder(_here(device, on_gpu)), device)


def _here(device: torch.device, on_gpu: str) -> str:
    """Return what is wrong on this device.

    Raises:
        RuntimeError: nothing can be loaded onto it.
    """
    if device != GPU:
        return "right"
    if on_gpu == "old":
        raise RuntimeError("CUDA error: no kernel image is available")
    return on_gpu


def _twin(reader: Reader, network: nn.Module, device: torch.device) -> ModuleModel:
    options = LoadOptions(Path("nowhere"), precision="fp32", max_batch_size=_BATCH)
    specification = Specification.parse(f"test:{reader.task}")
    return ModuleModel(specification, network, Preprocessing(View(24, 16)), reader, {}, device, options)
