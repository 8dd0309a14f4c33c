"""What a model is to the engine: a name, a version, an input size, and a forward pass over pixels.

Normalisation is the model's own business: it gets the pixels as decoded, so that several models share one
decode. A model is called from one thread only.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.events import Box
from pipeline.imaging import View

Task = Literal["classify", "detect", "embed", "score"]


@dataclass(frozen=True, slots=True)
class Output:
    """What a model says about one picture; the engine refuses numbers that are not finite."""

    label: str | None = None
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()  # in pixels of what the model was given
    embedding: NDArray[np.float32] | None = None  # (D,)
    #: False when something this was made of is not a finite number: a detector's NaN is below any threshold.
    is_finite: bool = True


class WrongOutputError(Exception):
    """What a network returned for this batch is not what its task means; a record or the model is at fault."""


class Model(Protocol):
    """One model, loaded on its device."""

    @property
    def name(self) -> str:
        """Its specification, as in `MILLRACE_MODELS`."""

    @property
    def version(self) -> str:
        """Changes whenever outputs may change."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, or of what stands for them."""

    @property
    def task(self) -> Task:
        """What kind of output it gives."""

    @property
    def view(self) -> View:
        """How it wants to see a picture; models that agree share one decode and one tensor."""

    def warm_up(self) -> None:
        """Do once what makes a first pass slow; called before readiness, in the thread of `forward`.

        Raises:
            Exception: the model cannot work here; the process ends with a `ConfigurationError`.
        """

    def forward(self, batch: Any) -> list[Output]:
        """Evaluate a batch and return one output per picture, in order, off the device.

        `batch` is RGB on the model's device, channels last in memory: a tensor (N, 3, H, W) uint8, or for a view
        that lets the size vary (`inside`) a list of N tensors (3, H, W) uint8.

        Raises:
            WrongOutputError: what comes out has another shape than it must have.
        """
