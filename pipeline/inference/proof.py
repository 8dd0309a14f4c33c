"""Whether a GPU that nobody asked for may predict: what models say there, beside what they say on the CPU.

The reference is plain float32, and only its outputs are kept: there is never more than one copy of the models.
A GPU that raises anything or disagrees is not taken; that is no fault of the models. It is proved for the models
that it was tried with, and by pictures that are drawn.
"""

import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline import logs
from pipeline.energy import EnergyMeter, meter_of
from pipeline.errors import MillraceError
from pipeline.inference.forward import Forward
from pipeline.models import LoadOptions, Model, Output, load_models
from pipeline.models.disagreement import disagreement, structured_pictures

# A batch, small enough for large models on a CPU.
_PICTURES = 4
_CPU = torch.device("cpu")
_MAX_REASON_CHARACTERS = 500

_log = logs.get(__name__)


class _DisagreesError(Exception):
    """A model does not say on the GPU what it says on the CPU."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Models on the device that they are to run on; `meter` is the device's, from before their first pass."""

    device: torch.device
    models: Sequence[Model]
    meter: EnergyMeter | None = None


def load_where_proved(specification: str, gpu: torch.device, options: LoadOptions) -> Placed:
    """Load models on a GPU, warm, if they work there as they do on the CPU, else on the CPU; blocks.

    Raises:
        ConfigurationError: they do not load or work on the CPU, so that nothing can be said about the GPU.
    """
    started = time.monotonic()
    expected = _on_cpu(specification, options)
    try:
        placed, share = _on_gpu(specification, gpu, options, expected)
    except Exception as error:  # models, the libraries that load them and CUDA raise anything
        reason = _reason(error)
    else:
        seconds = round(time.monotonic() - started, 2)
        _log.info("the GPU is proved", device=str(gpu), of_tolerance=round(share, 3), seconds=seconds)
        return placed
    gc.collect()  # what was loaded half-way
    with contextlib.suppress(Exception):  # the device may be lost
        torch.cuda.empty_cache()
    _log.warning(
        "the GPU is not proved: predicting on the CPU; MILLRACE_DEVICE=cuda takes the GPU unproved",
        device=str(gpu),
        reason=reason,
        seconds=round(time.monotonic() - started, 2),
    )
    return Placed(_CPU, load_models(specification, _CPU, options))


def _on_cpu(specification: str, options: LoadOptions) -> list[list[Output]]:
    """Return what each model says in float32."""
    plain = replace(options, precision="fp32", compile=False, max_batch_size=1)
    models = load_models(specification, _CPU, plain)
    Forward(models, _CPU).warm_up()
    return [_outputs(model, _CPU, options) for model in models]


def _on_gpu(
    specification: str, gpu: torch.device, options: LoadOptions, expected: Sequence[Sequence[Output]]
) -> tuple[Placed, float]:
    """Return the models as they will run, and the largest difference as a share of what is tolerated."""
    models = load_models(specification, gpu, options)
    meter = meter_of(gpu)
    Forward(models, gpu).warm_up()
    shares = []
    for model, reference in zip(models, expected, strict=True):
        try:
            share = disagreement(reference, _outputs(model, gpu, options))
        except Exception as error:
            raise _DisagreesError(f"{model.name!r}: {type(error).__name__}: {error}") from error
        if share > 1:
            raise _DisagreesError(
                f"{model.name!r}: its outputs are {share:.3g} times as far from the CPU's as is tolerated"
            )
        shares.append(share)
    return Placed(gpu, models, meter), max(shares)


def _outputs(model: Model, device: torch.device, options: LoadOptions) -> list[Output]:
    pictures = structured_pictures(model.view, min(_PICTURES, options.max_batch_size), device)
    with torch.inference_mode(), _in_float32() if model.task == "detect" else contextlib.nullcontext():
        return model.forward(pictures)


def _in_float32() -> contextlib.AbstractContextManager[None]:
    """Keep cuDNN from TensorFloat-32, its default.

    That moves scores by thousandths, and with them what a detector looks at twice: rounded to it on a CPU, a
    faster R-CNN with made-up weights found other boxes in 62 to 84 of 100 places, and to float32 in 3 at most.
    """
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _reason(error: Exception) -> str:
    """Say in one line which model and why."""
    known = isinstance(error, MillraceError | _DisagreesError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return " ".join(text.removeprefix("MILLRACE_MODELS: ").split())[:_MAX_REASON_CHARACTERS]
