"""A learned model that scores windows, when one is configured: `MILLRACE_WATCH_MODEL`.

It is a model as pictures have them (`pipeline/models/protocol.py`), task `score`, but for the view: instead of
pixels `forward` gets (N, F) float32, the mean over the window of each field in the order of `dcgm.NAMES`, NaN where
it was not measured. `file:PATH` is an autoencoder in safetensors, whose score is how badly it restores a window;
`python:MODULE:ATTRIBUTE` is anything, and runs the code it names.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import dcgm
from pipeline.errors import ConfigurationError
from pipeline.models import LoadOptions, Output, Task, load_models

SETTING = "MILLRACE_WATCH_MODEL"


class WindowModel(Protocol):
    """What a model of windows offers."""

    @property
    def name(self) -> str:
        """Its specification."""

    @property
    def version(self) -> str:
        """Changes whenever scores may change."""

    @property
    def task(self) -> Task:
        """`score`."""

    def warm_up(self) -> None:
        """Do once what makes a first pass slow."""

    def forward(self, batch: Any) -> list[Output]:
        """Score a batch (N, F) float32 on the model's device; higher is stranger."""


class Autoencoder:
    """Restores the fields it was trained on; what it cannot restore is strange.

    The file's tensors: `mean` and `scale` (D,) of the training data, `0.weight` (H, D), `0.bias` (H,) and so on;
    ReLU between layers, none after the last, which gives D again. The metadata's `features` is a JSON list of D
    field names. A field that was not measured counts as being at its mean.
    """

    task: Task = "score"

    def __init__(self, path: Path, device: torch.device) -> None:
        from safetensors import SafetensorError, safe_open

        self.name = f"file:{path}"
        try:
            self.version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            with safe_open(path, framework="pt") as file:
                features = msgspec.json.decode((file.metadata() or {}).get("features", ""), type=list[str])
                tensors = {name: file.get_tensor(name).to(device, torch.float32) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise ConfigurationError(f"{SETTING}: {path}: {error}") from None
        self._columns = torch.tensor(_columns(features, path), device=device)
        try:
            self._mean, self._scale = tensors.pop("mean"), tensors.pop("scale").clamp(min=1e-6)
            count = len(tensors) // 2
            self._layers = [(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in range(count)]
        except KeyError as error:
            raise ConfigurationError(f"{SETTING}: {path}: it has no tensor {error}") from None
        self._device = device

    def warm_up(self) -> None:
        """Restore nothing once: shapes that do not fit show here."""
        try:
            self.forward(torch.full((2, len(dcgm.NAMES)), torch.nan, device=self._device))
        except (RuntimeError, IndexError) as error:
            raise ConfigurationError(f"{SETTING}: {self.name}: {error}") from None

    def forward(self, batch: torch.Tensor) -> list[Output]:
        """Score windows by the root of the mean squared error, in deviations of the training data."""
        with torch.inference_mode():
            given = torch.nan_to_num((batch[:, self._columns] - self._mean) / self._scale)  # (N, D)
            hidden = given
            for number, (weight, bias) in enumerate(self._layers):
                hidden = torch.nn.functional.linear(hidden, weight, bias)
                if number < len(self._layers) - 1:
                    hidden = hidden.relu()
            errors = (hidden - given).square().mean(dim=1).sqrt()
        return [Output(score=score) for score in errors.tolist()]


def load_window_model(specification: str, device: torch.device, *, allow_python: bool) -> WindowModel:
    """Load a model of windows and warm it up.

    Raises:
        ConfigurationError: it is unknown or forbidden, does not load, or does not score.
    """
    source, _, name = specification.partition(":")
    model: WindowModel
    if source == "file" and name:
        model = Autoencoder(Path(name), device)
    elif source == "python":
        try:
            (loaded,) = load_models(specification, device, LoadOptions(allow_python=allow_python))
        except ConfigurationError as error:
            raise ConfigurationError(error.message.replace("MILLRACE_MODELS", SETTING)) from error
        model = cast(WindowModel, loaded)
    else:
        raise ConfigurationError(
            f"{SETTING}: {specification!r} is neither file:PATH nor python:MODULE:ATTRIBUTE"
        )
    if model.task != "score":
        raise ConfigurationError(f"{SETTING}: {specification} is for {model.task}, not score")
    model.warm_up()
    return model


def score_windows(
    model: WindowModel, means: NDArray[np.float64], device: torch.device
) -> NDArray[np.float64]:
    """Return the score of each window, (N,); NaN where the model gives none or no number."""
    batch = torch.from_numpy(means[:, : len(dcgm.NAMES)].astype(np.float32)).to(device)
    return np.array([_finite(output.score) for output in model.forward(batch)], np.float64)


def _finite(score: float | None) -> float:
    return score if score is not None and math.isfinite(score) else math.nan


def _columns(features: Sequence[str], path: Path) -> list[int]:
    unknown = [name for name in features if name not in dcgm.NAMES]
    if unknown or not features:
        raise ConfigurationError(f"{SETTING}: {path}: there is no field {', '.join(unknown) or 'at all'}")
    return [dcgm.NAMES.index(name) for name in features]
