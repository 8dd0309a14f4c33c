"""What names a model, `SOURCE:NAME?option=value`, and what the settings say about loading it; loads nothing."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

import torch

from pipeline.errors import ConfigurationError
from pipeline.settings import Settings

#: Below this a box is not reported, unless the specification says otherwise.
THRESHOLD = 0.5

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What all models of a process have in common."""

    #: Folder with weights; what is downloaded is put there.
    cache: Path = Path(".millrace/models")
    allow_python: bool = False
    allow_exported: bool = False
    precision: Precision = "auto"
    compile: bool = False
    #: Warm-up runs a batch of this size.
    max_batch_size: int = 32

    @classmethod
    def from_settings(cls, settings: Settings) -> "LoadOptions":
        """Take the settings of the inference section."""
        return cls(
            cache=settings.resolved_model_cache,
            allow_python=settings.allow_python_models,
            allow_exported=settings.allow_exported_models,
            precision=settings.precision,
            compile=settings.torch_compile,
            max_batch_size=settings.max_batch_size,
        )


@dataclass(frozen=True, slots=True)
class Specification:
    """A model's name, taken apart."""

    #: As written; the name of the model.
    text: str
    source: str
    #: What the source calls it; of `file:PATH#ARCHITECTURE` the path.
    name: str
    architecture: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Specification":
        """Take a specification apart.

        Raises:
            ConfigurationError: The part after `?` is not `name=value&…`.
        """
        source, _, rest = text.partition(":")
        rest, _, query = rest.partition("?")
        name, _, architecture = rest.partition("#")
        try:
            options = dict(parse_qsl(query, strict_parsing=bool(query)))
        except ValueError:
            raise ConfigurationError(
                f"MILLRACE_MODELS: {text!r}: what follows the question mark is not name=value&…"
            ) from None
        return cls(text, source, name, architecture, options)

    def error(self, reason: str) -> ConfigurationError:
        """Return an error that names the setting, the model and the reason."""
        return ConfigurationError(f"MILLRACE_MODELS: {self.text!r}: {reason}")

    def check_options(self, *known: str) -> None:
        """Refuse options that mean nothing to a source.

        Raises:
            ConfigurationError: there is one.
        """
        for name in self.options:
            if name not in known:
                raise self.error(f"there is no option {name!r}; known: {', '.join(sorted(known))}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return the number an option says.

        Raises:
            ConfigurationError: It is not a number from `low` to `high`.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise self.error(f"{name}={text} is not a number from {low:g} to {high:g}")
        return value

    def with_task(self, task: str | None) -> "Specification":
        """Return a specification that asks for a task, unless it asks for one already."""
        if task is None or "task" in self.options:
            return self
        return replace(self, options={**self.options, "task": task})

    def threshold(self) -> float:
        """Return the score that a box must have to be reported."""
        return self.number("threshold", THRESHOLD, 0, 1)

    def unknown(self, name: str, known: Iterable[str]) -> ConfigurationError:
        """Return an error that says which known name may be meant."""
        near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
        meant = f"; meant is perhaps {', '.join(near)}" if near else ""
        return self.error(f"{self.source} has no model {name!r}{meant}")

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw random weights from the seed of the specification, and leave torch's generator as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.number("seed", 0, 0, 2**31 - 1)))
            yield
