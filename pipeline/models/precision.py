"""Which precision a network runs in, decided where it runs: fewer bits only if faster and as good.

Fewer bits means autocast: matrix products and convolutions in bfloat16 or float16, what needs more in float32.
The weights of those layers are converted once, where autocast alone converts them for every batch.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pipeline import logs
from pipeline.models.disagreement import disagreement
from pipeline.models.protocol import Output
from pipeline.models.specification import Precision
from pipeline.models.weights import one_line

# It must gain more than a timing on a busy machine errs by.
WORTHWHILE = 0.95
# A timing of this many pictures, or as many as take a second, tells which is faster.
_TIMED_PICTURES = 8
_TIMED_SECONDS = 1.0
_TIMED_RUNS = 7

Run = Callable[[Any], list[Output]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CONVERTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_log = logs.get(__name__)


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return what a network could run in beside float32 here; None: nothing that could be faster."""
    if precision in _DTYPES:
        return _DTYPES[precision]
    if precision == "fp32":
        return None
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; emulated before
        return torch.bfloat16 if has_bfloat16 else torch.float16
    # Without instructions for it bfloat16 is slower on a CPU, float16 nearly everywhere.
    return torch.bfloat16 if _cpu_has_bfloat16() else None


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose convolutions and linear layers have their weights in `dtype`, for use under autocast."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, _CONVERTED):
            layer.to(dtype)
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            layer.in_proj_weight.data = layer.in_proj_weight.data.to(dtype)
            if layer.in_proj_bias is not None:
                layer.in_proj_bias.data = layer.in_proj_bias.data.to(dtype)
    return module


def is_worthwhile(
    name: str, full: Run, fewer: Run, pictures: Callable[[int], Any], device: torch.device
) -> bool:
    """Whether `fewer` bits are faster here than `full`, and its outputs as good; `pictures(n)` draws a batch.

    The two are timed in turns and the shortest of each counts, since a device may be at work for others
    meanwhile: the models that these are to replace.
    """
    one = pictures(1)
    full(one)
    with _clock(device) as clock:
        seconds = _seconds(clock, full, one)
        count = max(1, min(_TIMED_PICTURES, int(_TIMED_SECONDS / max(seconds, 1e-6))))
        batch = pictures(count)
        reference = full(batch)
        try:
            difference = disagreement(reference, fewer(batch))
        except Exception as error:  # libraries raise anything where an operation has no such kernel
            _log.info("not in fewer bits: the network fails in them", model=name, error=one_line(error))
            return False
        timings = [(_seconds(clock, full, batch), _seconds(clock, fewer, batch)) for _ in range(_TIMED_RUNS)]
    before, after = (min(column) for column in zip(*timings, strict=True))
    taken = difference <= 1 and after < before * WORTHWHILE
    _log.info(
        "precision chosen",
        model=name,
        fewer_bits=taken,
        of_tolerance=round(difference, 3),
        full_seconds=round(before, 5),
        fewer_seconds=round(after, 5),
        pictures=count,
    )
    return taken


@contextlib.contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield what to time a device's work with.

    On a CPU that is the time this thread was computing, all of it in this thread, so that neither decoding nor the
    models at work count: in seconds of the wall a network beside them could look slower in fewer bits.
    """
    if device.type != "cpu":
        yield time.perf_counter
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time
    finally:
        torch.set_num_threads(threads)


def _seconds(clock: Callable[[], float], run: Run, batch: Any) -> float:
    started = clock()
    run(batch)  # ends with a transfer to the host: what is on the device is done
    return clock() - started


def _cpu_has_bfloat16() -> bool:
    if not torch._C._has_mkldnn:
        return False
    ops: Any = torch.ops
    return bool(ops.mkldnn._is_mkldnn_bf16_supported())
