"""The models of a deployment, from the setting that names them; nothing but tensors is ever unpickled.

A specification is `SOURCE:NAME?option=value`, several are separated by commas:
`torchvision:mobilenet_v3_small,builtin:fingerprint`. `docs/models.md` says what each source takes.
`python:MODULE:ATTRIBUTE` calls the attribute with the device (and with the options as keyword arguments, all
text); it runs whatever code is there and needs a setting of its own.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import cast

import torch

from pipeline.errors import ConfigurationError
from pipeline.models.builtin import FingerprintModel, QualityModel
from pipeline.models.modules import ModuleModel
from pipeline.models.protocol import Model, Output, Task, WrongOutputError
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.weights import one_line

__all__ = [
    "LoadOptions",
    "Model",
    "Output",
    "Task",
    "WrongOutputError",
    "load_models",
    "resolve_device",
    "torch_threads",
]

_BUILTIN: dict[str, Callable[[torch.device], Model]] = {
    QualityModel.name: QualityModel,
    FingerprintModel.name: FingerprintModel,
}
# Each is a module that is imported when it is asked for: their libraries take seconds.
_SOURCES = {
    "torchvision": "torchvision:NAME",
    "timm": "timm:NAME",
    "hf": "hf:REPOSITORY",
    "file": "file:PATH#ARCHITECTURE",
    "python": "python:MODULE:ATTRIBUTE",
}
_DEFAULTS = LoadOptions()


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a `MILLRACE_DEVICE` value; `auto` prefers a GPU, which nothing has proved yet.

    Raises:
        ConfigurationError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = ConfigurationError(
        f"MILLRACE_DEVICE: {device!r} is not auto, cpu, cuda or cuda:N (only predict takes several, or cuda:all)"
    )
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise wrong from None
    if resolved.type not in ("cpu", "cuda"):
        raise wrong
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"MILLRACE_DEVICE: {device!r} is not there, torch sees {torch.cuda.device_count()} GPUs"
        )
    return resolved


def torch_threads(models: Sequence[Model], wanted: int) -> int:
    """Return the CPU threads of a forward pass: `wanted`, else what suits the models; 0: torch decides.

    The built-in ones look at two pictures at a time, too little to share. On two cores a second thread made a
    pass slower, not faster (1.2 instead of 0.9 ms a picture in batches, 1.3 instead of 0.8 for one alone) and
    took the core from the decoder. Small networks lose the same way.
    """
    is_little = (
        model.name in _BUILTIN or (isinstance(model, ModuleModel) and model.is_small) for model in models
    )
    return wanted or (1 if all(is_little) else 0)


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


def _load(text: str, device: torch.device, options: LoadOptions) -> Model:
    specification = Specification.parse(text)
    if specification.source == "python":
        if not options.allow_python:
            raise specification.error("it runs code; MILLRACE_ALLOW_PYTHON_MODELS=true allows it")
        return _load_python(specification, device)
    if text not in _BUILTIN and (specification.source not in _SOURCES or not specification.name):
        raise ConfigurationError(f"MILLRACE_MODELS: unknown model {text!r}; known: {_known()}")
    try:
        if text in _BUILTIN:
            return _BUILTIN[text](device)
        source = importlib.import_module(f"pipeline.models.{specification.source}_source")
        return cast(Model, source.load(specification, device, options))
    except ConfigurationError:
        raise
    except Exception as error:  # libraries raise anything about a file that is not what they expect
        raise specification.error(f"does not load: {type(error).__name__}: {one_line(error)}") from error


def _load_python(specification: Specification, device: torch.device) -> Model:
    module_name, _, attribute = specification.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        return cast(Model, factory(device, **specification.options))
    except Exception as error:  # the code of the model may raise anything
        raise specification.error(f"does not load: {type(error).__name__}: {one_line(error)}") from error


def _known() -> str:
    return ", ".join([*_BUILTIN, *_SOURCES.values()])
