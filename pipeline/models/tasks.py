"""What the raw output of a network means: labels, boxes, a vector or a number; one transfer off the device.

Each reader takes the output for a batch and returns one `Output` per picture, in order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.events import Box
from pipeline.models.protocol import Output, Task
from pipeline.models.specification import Specification

TOP = 5
# As torchvision's detectors keep by default; a crowd of a thousand boxes would fill a record.
MAX_BOXES = 100
_DIGITS = 6  # of a score; float32 has 7

Activation = Literal["softmax", "sigmoid", "none"]


class Reader(Protocol):
    """Makes outputs of what a network returns for a batch."""

    #: What kind of output it gives.
    task: ClassVar[Task]

    def facts(self) -> dict[str, Any]:
        """Return everything that changes outputs, for the digest."""

    def __call__(self, raw: Any) -> list[Output]:
        """Read the output of a batch."""


@dataclass(frozen=True, slots=True)
class Classify:
    """(N, C) logits become the best label, its score, and the scores of the `TOP` best."""

    labels: tuple[str, ...]
    activation: Activation = "softmax"

    task: ClassVar[Task] = "classify"

    def facts(self) -> dict[str, Any]:
        """Return labels and activation."""
        return {"task": self.task, "labels": self.labels, "activation": self.activation}

    def __call__(self, raw: Tensor) -> list[Output]:
        """Read (N, C) logits."""
        if raw.ndim != 2 or raw.shape[1] != len(self.labels):
            raise ValueError(f"an output of shape {tuple(raw.shape)} for {len(self.labels)} labels")
        scores = raw.float()  # (N, C)
        if self.activation == "softmax":
            scores = scores.softmax(1)
        elif self.activation == "sigmoid":
            scores = scores.sigmoid()
        best = scores.topk(min(TOP, len(self.labels)))
        # Class indices are exact in float32 up to 2^24; both in one transfer.
        rows = torch.stack([best.values, best.indices.float()], dim=1).cpu().tolist()  # (N, 2, 5)
        return [self._output(values, [int(index) for index in indices]) for values, indices in rows]

    def _output(self, values: list[float], indices: list[int]) -> Output:
        scores = {
            self.labels[index]: round(value, _DIGITS) for index, value in zip(indices, values, strict=True)
        }
        label = self.labels[indices[0]]
        return Output(label=label, score=scores[label], scores=scores)


@dataclass(frozen=True, slots=True)
class Embed:
    """(N, D), or a map (N, D, H, W) that is averaged, becomes vectors of length one."""

    task: ClassVar[Task] = "embed"

    def facts(self) -> dict[str, Any]:
        """Return the task; there is nothing else."""
        return {"task": self.task}

    def __call__(self, raw: Tensor) -> list[Output]:
        """Read (N, D) or (N, D, H, W)."""
        raw = raw.float()
        if raw.ndim == 4:
            raw = raw.mean((2, 3))
        if raw.ndim != 2:
            raise ValueError(f"an output of shape {tuple(raw.shape)} is not one vector per picture")
        return [Output(embedding=row) for row in functional.normalize(raw).cpu().numpy()]


@dataclass(frozen=True, slots=True)
class Score:
    """(N, 1) or (N,) becomes a number, as the network gives it."""

    task: ClassVar[Task] = "score"

    def facts(self) -> dict[str, Any]:
        """Return the task; there is nothing else."""
        return {"task": self.task}

    def __call__(self, raw: Tensor) -> list[Output]:
        """Read (N, 1) or (N,)."""
        if raw.ndim > 2 or raw[:1].numel() != min(len(raw), 1):
            raise ValueError(f"an output of shape {tuple(raw.shape)} is not one number per picture")
        return [Output(score=round(value, _DIGITS)) for value in raw.float().flatten().cpu().tolist()]


@dataclass(frozen=True, slots=True)
class Detect:
    """Dictionaries of `boxes` (K, 4) as x, y, x, y, `scores` (K,) and `labels` (K,), one per picture."""

    labels: dict[int, str]
    threshold: float

    task: ClassVar[Task] = "detect"

    def facts(self) -> dict[str, Any]:
        """Return labels and threshold."""
        labels = [[index, self.labels[index]] for index in sorted(self.labels)]
        return {"task": self.task, "labels": labels, "threshold": self.threshold, "boxes": MAX_BOXES}

    def __call__(self, raw: Sequence[dict[str, Tensor]]) -> list[Output]:
        """Read what torchvision's detectors return, and transformers' post-processing."""
        parts = [
            torch.cat(
                [found["boxes"].float(), found["scores"][:, None].float(), found["labels"][:, None].float()],
                dim=1,
            )
            for found in raw
        ]  # N of (K, 6)
        rows = torch.cat(parts).cpu().tolist()
        outputs, start = [], 0
        for part in parts:
            outputs.append(self._output(rows[start : start + len(part)]))
            start += len(part)
        return outputs

    def _output(self, rows: list[list[float]]) -> Output:
        kept = sorted((row for row in rows if row[4] >= self.threshold), key=lambda row: -row[4])[:MAX_BOXES]
        return Output(
            boxes=tuple(
                Box(self.labels.get(int(label), str(int(label))), round(score, _DIGITS), *corners)
                for *corners, score, label in kept
            )
        )


def reader_of(
    specification: Specification, labels: tuple[str, ...], activation: Activation = "softmax"
) -> Reader:
    """Return what reads a network with one output per label: a score of one, else a choice between them.

    Raises:
        ConfigurationError: the task that the specification asks for is not one that it can do.
    """
    usual = "score" if len(labels) == 1 else "classify"
    task = specification.options.get("task", usual)
    if task == "embed":
        return Embed()
    if task != usual or not labels:
        raise specification.error(f"with {len(labels)} outputs it cannot {task}; it can {usual}, or embed")
    return Score() if task == "score" else Classify(labels, activation)


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels with the class index behind those that are there twice, as ImageNet's cranes are."""
    count = Counter(labels)
    return tuple(f"{label} ({index})" if count[label] > 1 else label for index, label in enumerate(labels))


def numbered(count: int) -> tuple[str, ...]:
    """Return class indices as labels, for weights that come without."""
    return tuple(map(str, range(count)))
