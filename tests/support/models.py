"""Models that misbehave on purpose, for `python:tests.support.models:NAME?option=value`.

A picture is guilty when its mean colour is close to `GUILTY_COLOUR`; `pictures.solid` draws one. Each
factory takes the device and text options, as `pipeline.models.load_models` passes them.
"""

import os
import time
from collections.abc import Callable

import torch

from pipeline.imaging import View
from pipeline.models import Output, Task

GUILTY_COLOUR = (255, 0, 255)
COLOUR_TOLERANCE = 12  # of 255: JPEG moves a solid colour by less
SIDE_PIXELS = 32

Behaviour = Callable[[torch.Tensor], list[Output]]


class BehavingModel:
    """A model that does what a function says with each batch of (N, 3, 32, 32) uint8.

    It behaves well for as long as it is warmed up: the first batch after `warm_up`, which is the engine's
    reference picture, is neither noted nor given to the function.
    """

    version = "1"
    task: Task = "score"
    view = View(SIDE_PIXELS, SIDE_PIXELS)

    def __init__(self, name: str, behave: Behaviour, warm_up: Callable[[], None] = lambda: None) -> None:
        self.name = f"test:{name}"
        self.digest = "0" * 64
        self.batch_sizes: list[int] = []
        self._behave = behave
        self._warm_up = warm_up
        self._is_warming = False

    def warm_up(self) -> None:
        self._warm_up()
        self._is_warming = True

    def forward(self, batch: torch.Tensor) -> list[Output]:
        if self._is_warming:
            self._is_warming = False
            return _ones(batch)
        self.batch_sizes.append(len(batch))
        return self._behave(batch)


def is_guilty(batch: torch.Tensor) -> list[bool]:
    """Tell which pictures of a batch have the guilty colour."""
    mean = batch.float().mean((2, 3))  # (N, 3)
    guilty: list[bool] = ((mean - torch.tensor(GUILTY_COLOUR)).abs() < COLOUR_TOLERANCE).all(1).tolist()
    return guilty


def doing_nothing(device: torch.device) -> BehavingModel:
    """Give each picture the same score."""
    return BehavingModel("doing_nothing", _ones)


def versioned(device: torch.device, version: str = "1", seconds: str = "0") -> BehavingModel:
    """Score every picture with the model's own version, after a time per batch."""

    def behave(batch: torch.Tensor) -> list[Output]:
        time.sleep(float(seconds))
        return [Output(score=float(version))] * len(batch)

    model = BehavingModel("versioned", behave)
    model.version = version
    return model


def slow_to_load(device: torch.device, version: str = "1", seconds: str = "5") -> BehavingModel:
    """Take a time to load."""
    time.sleep(float(seconds))
    return versioned(device, version)


def aborting_at_load(device: torch.device) -> BehavingModel:
    """End the process at once, as the kernel does when memory runs out."""
    os.abort()


def failing_to_load(device: torch.device) -> BehavingModel:
    """Raise when it is made."""
    raise MemoryError("no memory for 7,000,000,000 parameters")


def sleeping(device: torch.device, seconds: str = "1") -> BehavingModel:
    """Take a time per batch, however large."""

    def behave(batch: torch.Tensor) -> list[Output]:
        time.sleep(float(seconds))
        return _ones(batch)

    return BehavingModel("sleeping", behave)


def failing_on_guilty(device: torch.device) -> BehavingModel:
    """Raise for the whole batch that has a guilty picture in it."""

    def behave(batch: torch.Tensor) -> list[Output]:
        if any(is_guilty(batch)):
            raise ValueError("a picture of a colour this model cannot stand")
        return _ones(batch)

    return BehavingModel("failing_on_guilty", behave)


def failing(device: torch.device) -> BehavingModel:
    """Raise on every batch; its warm-up goes well."""

    def behave(batch: torch.Tensor) -> list[Output]:
        raise RuntimeError("this model fails on everything")

    return BehavingModel("failing", behave)


def failing_warm_up(device: torch.device) -> BehavingModel:
    """Raise at warm-up."""

    def warm_up() -> None:
        raise RuntimeError("no kernel image\nis available")

    return BehavingModel("failing_warm_up", _ones, warm_up)


def aborting_on_guilty(device: torch.device) -> BehavingModel:
    """End the process at once on a batch with a guilty picture, as a crash in native code does."""

    def behave(batch: torch.Tensor) -> list[Output]:
        if any(is_guilty(batch)):
            os.abort()
        return _ones(batch)

    return BehavingModel("aborting_on_guilty", behave)


def not_a_number(device: torch.device, spoils_batch: str = "false", always: str = "false") -> BehavingModel:
    """Score guilty pictures NaN; or with them, when asked, everything in their batch, or just everything."""

    def behave(batch: torch.Tensor) -> list[Output]:
        guilty = is_guilty(batch)
        if spoils_batch == "true":
            guilty = [any(guilty)] * len(guilty)
        if always == "true":
            guilty = [True] * len(guilty)
        return [Output(score=float("nan") if one else 1.0) for one in guilty]

    return BehavingModel("not_a_number", behave)


def miscounting(device: torch.device) -> BehavingModel:
    """Return one output too few for a batch with a guilty picture."""

    def behave(batch: torch.Tensor) -> list[Output]:
        return _ones(batch)[any(is_guilty(batch)) :]

    return BehavingModel("miscounting", behave)


def out_of_memory(device: torch.device, above: str = "4") -> BehavingModel:
    """Run out of memory on batches of more than `above` pictures."""

    def behave(batch: torch.Tensor) -> list[Output]:
        if len(batch) > int(above):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _ones(batch)

    return BehavingModel("out_of_memory", behave)


def losing_the_device(device: torch.device) -> BehavingModel:
    """Fail as CUDA does once its context is lost."""

    def behave(batch: torch.Tensor) -> list[Output]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    return BehavingModel("losing_the_device", behave)


def _ones(batch: torch.Tensor) -> list[Output]:
    return [Output(score=1.0)] * len(batch)
