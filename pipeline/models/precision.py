"""Which precision a network runs in, decided where it runs: fewer bits only if faster and as good.

Fewer bits means autocast: matrix products and convolutions in bfloat16 or float16, what needs more in float32.
The weights of those layers are converted once, where autocast alone converts them for every batch.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import logs
from pipeline.agreement import MATCHING_IOU, iou
from pipeline.events import Box
from pipeline.imaging import View
from pipeline.models.protocol import Output
from pipeline.models.specification import THRESHOLD, Precision
from pipeline.models.tasks import MAX_BOXES

# How far outputs in fewer bits may be from float32 on structured pictures. 8 bits of mantissa move a probability
# of trained and of random networks by 0.001 to 0.01; 0.02 changes a label only where two were as good as equal.
SCORE_TOLERANCE = 0.02
# Of a regressed number, relative to its size (or to 1, if it is smaller).
NUMBER_TOLERANCE = 0.02
# A search ranks by cosine; near-duplicates are 0.99 apart, bfloat16 moves a vector by 0.0001 to 0.0005.
COSINE_TOLERANCE = 0.002
# Of a detector's boxes: which of two that overlap is kept may hang on the last digit, and what follows on that.
BOX_TOLERANCE = 0.1
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
        reference, other = full(batch), fewer(batch)
        difference = disagreement(reference, other)
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


def disagreement(reference: Sequence[Output], other: Sequence[Output]) -> float:
    """Return the largest difference between outputs, as a share of what is tolerated."""
    pairs = list(zip(reference, other, strict=True))
    return max([_boxes_lacking(pairs), *(_disagreement(one, two) for one, two in pairs)])


def structured_pictures(view: View, count: int, device: torch.device, seed: int = 0) -> Any:
    """Draw seeded pictures with shapes, edges and colours, as a model with this view gets them."""
    generator = np.random.default_rng(seed)
    height, width = view.height, view.width
    if view.fit == "inside":  # a picture of four by three
        height, width = view.height, min(view.width, view.height * 4 // 3)
    pictures = [_structured(generator, height, width) for _ in range(count)]
    batch = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W) uint8
    return list(batch) if view.fit == "inside" else batch


def _structured(generator: np.random.Generator, height: int, width: int) -> "np.ndarray[Any, Any]":
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    picture = np.empty((height, width, 3))
    for channel in range(3):
        rates, phase = generator.uniform(1, 12, 2), generator.uniform(0, 6)
        picture[..., channel] = 128 + 60 * np.sin(rates[0] * down + rates[1] * across + phase)
    for _ in range(6):
        top, left = generator.integers(0, max(1, height - 8)), generator.integers(0, max(1, width - 8))
        sides = generator.integers(4, max(5, min(height, width) // 2), 2)
        picture[top : top + sides[0], left : left + sides[1]] = generator.integers(0, 256, 3)
    picture += generator.normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def _disagreement(reference: Output, other: Output) -> float:
    shares = [0.0 if reference.is_finite and other.is_finite else float("inf")]
    if reference.embedding is not None and other.embedding is not None:
        shares.append(float(1 - reference.embedding @ other.embedding) / COSINE_TOLERANCE)
    elif reference.scores:
        for ours, theirs in ((reference.scores, other.scores), (other.scores, reference.scores)):
            # A label that is not among the other's best is there no better than the last of them.
            least = min(theirs.values(), default=0.0)
            shares += [
                abs(score - theirs.get(label, least)) / SCORE_TOLERANCE for label, score in ours.items()
            ]
    elif reference.score is not None and other.score is not None:
        size = max(1.0, abs(reference.score))
        shares.append(abs(reference.score - other.score) / (size * NUMBER_TOLERANCE))
    return max(shares) if np.isfinite(shares).all() else float("inf")  # `max` passes over NaN


def _boxes_lacking(pairs: Sequence[tuple[Output, Output]]) -> float:
    """Return how many boxes the other output lacks, of those that it should have, as a share of the tolerance.

    It should have those whose scores are clear of the threshold, which is no higher than the lowest that is there,
    and of the last one in a list that is full.
    """
    threshold = min([THRESHOLD, *(box.score for pair in pairs for output in pair for box in output.boxes)])
    is_there = []
    for pair in pairs:
        for ours, theirs in (pair, pair[::-1]):
            least = theirs.boxes[-1].score if len(theirs.boxes) >= MAX_BOXES else threshold
            clear = [box for box in ours.boxes if not box.score <= least + SCORE_TOLERANCE]  # NaN is, too
            is_there += [any(_are_one(box, like) for like in theirs.boxes) for box in clear]
    return is_there.count(False) / len(is_there) / BOX_TOLERANCE if is_there else 0.0


def _are_one(a: Box, b: Box) -> bool:
    return a.label == b.label and abs(a.score - b.score) <= SCORE_TOLERANCE and iou(a, b) >= MATCHING_IOU


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
