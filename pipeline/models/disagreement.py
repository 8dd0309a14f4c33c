"""How far outputs of a model in fewer bits, or on a GPU, are from those in float32, or on the CPU.

Told as a share of what is tolerated for the task, so that up to 1 they are as good; and the pictures to tell it on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.agreement import MATCHING_IOU, iou
from pipeline.events import Box
from pipeline.imaging import View
from pipeline.models.protocol import Output
from pipeline.models.specification import THRESHOLD
from pipeline.models.tasks import MAX_BOXES

# How far outputs in fewer bits may be from float32. 8 bits of mantissa move a probability of trained and of random
# networks by 0.001 to 0.01; 0.02 changes a label only where two were as good as equal.
SCORE_TOLERANCE = 0.02
# Of a regressed number, relative to its size (or to 1, if it is smaller).
NUMBER_TOLERANCE = 0.02
# A search ranks by cosine; near-duplicates are 0.99 apart, bfloat16 moves a vector by 0.0001 to 0.0005.
COSINE_TOLERANCE = 0.002
# Of a detector's boxes: which of two that overlap is kept may hang on the last digit, and what follows on that.
BOX_TOLERANCE = 0.1


def disagreement(reference: Sequence[Output], other: Sequence[Output]) -> float:
    """Return the largest difference between outputs, as a share of what is tolerated."""
    pairs = list(zip(reference, other, strict=True))
    return max([_boxes_lacking(pairs), *(_disagreement(one, two) for one, two in pairs)])


def _disagreement(reference: Output, other: Output) -> float:
    shares = [0.0 if reference.is_finite and other.is_finite else float("inf")]
    if reference.embedding is not None and other.embedding is not None:
        lengths = np.linalg.norm(reference.embedding) * np.linalg.norm(other.embedding)
        cosine = float(reference.embedding @ other.embedding) / max(float(lengths), 1e-30)
        shares.append((1 - cosine) / COSINE_TOLERANCE)
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
