"""The models of a deployment, from the setting that names them; nothing is downloaded or unpickled.

A specification is `SOURCE:NAME`, several are separated by commas: `builtin:quality,builtin:fingerprint`.
`python:MODULE:ATTRIBUTE` calls the attribute with the device (and with `?name=value&…` as keyword
arguments, all text); it runs whatever code is there and needs a setting of its own.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import parse_qsl

import torch

from pipeline.errors import ConfigurationError
from pipeline.models.builtin import FingerprintModel, QualityModel
from pipeline.models.protocol import Model, Output, Task
from pipeline.models.specification import LoadOptions

__all__ = ["LoadOptions", "Model", "Output", "Task", "load_models", "resolve_device", "torch_threads"]

_BUILTIN: dict[str, Callable[[torch.device], Model]] = {
    QualityModel.name: QualityModel,
    FingerprintModel.name: FingerprintModel,
}

_DEFAULTS = LoadOptions()


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a `MILLRACE_DEVICE` value; `auto` prefers a GPU.

    Raises:
        ConfigurationError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigurationError(f"MILLRACE_DEVICE: {device!r} is not auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"MILLRACE_DEVICE: {device!r} is not auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"MILLRACE_DEVICE: {device!r} is not there, torch sees {torch.cuda.device_count()} GPUs"
        )
    return resolved


def torch_threads(models: Sequence[Model], wanted: int) -> int:
    """Return the CPU threads of a forward pass: `wanted`, else what suits the models; 0: torch decides.

    The built-in ones look at two pictures at a time, too little to share. On two cores a second thread made a
    pass slower, not faster (1.2 instead of 0.9 ms a picture in batches, 1.3 instead of 0.8 for one alone) and
    took the core from the decoder.
    """
    if wanted or not all(model.name in _BUILTIN for model in models):
        return wanted
    return 1


def load_models(spec: str, device: torch.device, options: LoadOptions = _DEFAULTS) -> list[Model]:
    """Load the models of a comma-separated specification, in its order.

    Raises:
        ConfigurationError: an unknown, repeated or forbidden model, or one that does not load.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if not names:
        raise ConfigurationError(f"MILLRACE_MODELS: names no model; known: {_known()}")
    models = [_load(name, device, options) for name in names]
    seen: set[str] = set()
    for model in models:
        if model.name in seen:
            raise ConfigurationError(f"MILLRACE_MODELS: {model.name!r} is there twice")
        seen.add(model.name)
    return models


def _load(name: str, device: torch.device, options: LoadOptions) -> Model:
    if name in _BUILTIN:
        return _BUILTIN[name](device)
    source, _, rest = name.partition(":")
    if source != "python":
        raise ConfigurationError(f"MILLRACE_MODELS: unknown model {name!r}; known: {_known()}")
    if not options.allow_python:
        raise ConfigurationError(
            f"MILLRACE_MODELS: {name!r} runs code; MILLRACE_ALLOW_PYTHON_MODELS=true allows it"
        )
    return _load_python(name, rest, device)


def _load_python(name: str, rest: str, device: torch.device) -> Model:
    path, _, query = rest.partition("?")
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        return cast(Model, factory(device, **dict(parse_qsl(query, strict_parsing=bool(query)))))
    except Exception as error:  # the code of the model may raise anything
        raise ConfigurationError(
            f"MILLRACE_MODELS: {name!r} does not load: {type(error).__name__}: {error}"
        ) from error


def _known() -> str:
    return ", ".join(_BUILTIN) + ", python:MODULE:ATTRIBUTE"
