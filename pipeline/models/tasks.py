"""What the raw output of a network means: labels, boxes, a vector or a number; one transfer off the device.

Each reader takes the output for a batch and returns one `Output` per picture, in order. What is not of the shape
that its task has is a `WrongOutputError`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.events import Box
from pipeline.models.protocol import Output, Task, WrongOutputError
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
        """Read the output of a batch.

        Raises:
            WrongOutputError: it is not of the shape that it must have.
        """


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
        shape = _shape(raw)
        if len(shape) != 2 or shape[1] != len(self.labels):
            raise WrongOutputError(f"an output of shape {shape} for {len(self.labels)} labels")
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
        shape = _shape(raw)
        if len(shape) not in (2, 4):
            raise WrongOutputError(f"an output of shape {shape} is not one vector per picture")
        raw = raw.float()
        if raw.ndim == 4:
            raw = raw.mean((2, 3))
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
        shape = _shape(raw)
        if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
            raise WrongOutputError(f"an output of shape {shape} is not one number per picture")
        return [Output(score=round(value, _DIGITS)) for value in raw.float().flatten().cpu().tolist()]


@dataclass(frozen=True, slots=True)
class Detect:
    """Dictionaries of `boxes` (K, 4) as x, y, x, y, `scores` (K,) and `labels` (K,), one per picture.

    Who leaves boxes out before this sees them says in `is_finite`, a boolean (), whether all numbers were.
    """

    labels: dict[int, str]
    threshold: float

    task: ClassVar[Task] = "detect"

    def facts(self) -> dict[str, Any]:
        """Return labels and threshold."""
        labels = [[index, self.labels[index]] for index in sorted(self.labels)]
        return {"task": self.task, "labels": labels, "threshold": self.threshold, "boxes": MAX_BOXES}

    def __call__(self, raw: Sequence[Mapping[str, Tensor]]) -> list[Output]:
        """Read what torchvision's detectors return, and transformers' post-processing."""
        parts = [_rows(found) for found in raw]  # N of (1 + K, 6)
        rows = torch.cat(parts).cpu().tolist()
        outputs, start = [], 0
        for part in parts:
            outputs.append(self._output(rows[start : start + len(part)]))
            start += len(part)
        return outputs

    def _output(self, rows: list[list[float]]) -> Output:
        (is_finite, *_), *found = rows
        if not is_finite:
            return Output(is_finite=False)
        kept = sorted((row for row in found if row[4] >= self.threshold), key=lambda row: -row[4])[:MAX_BOXES]
        return Output(
            boxes=tuple(
                Box(self.labels.get(int(label), str(int(label))), round(score, _DIGITS), *corners)
                for *corners, score, label in kept
            )
        )


def _rows(found: Mapping[str, Tensor]) -> Tensor:
    """Return a row of ones if all numbers are finite, else of zeros; then the boxes with score and label.

    Raises:
        WrongOutputError: that is not what was found.
    """
    shapes = [_shape(found.get(name)) for name in ("boxes", "scores", "labels")]
    count = shapes[0][:1]
    if shapes != [(*count, 4), count, count]:
        raise WrongOutputError(f"boxes, scores and labels of shapes {', '.join(map(str, shapes))}")
    boxes, scores, labels = found["boxes"], found["scores"][:, None], found["labels"][:, None]
    rows = torch.cat([boxes.float(), scores.float(), labels.float()], dim=1)  # (K, 6)
    is_finite = rows.isfinite().all()
    if "is_finite" in found:
        is_finite = is_finite & found["is_finite"]
    return torch.cat([is_finite.expand(1, 6).float(), rows])  # (1 + K, 6) float32


def _shape(raw: Any) -> tuple[int, ...]:
    """Return the shape of what should be a tensor.

    Raises:
        WrongOutputError: It is none.
    """
    if not isinstance(raw, Tensor):
        raise WrongOutputError(f"a {type(raw).__name__} where there should be a tensor")
    return tuple(raw.shape)


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
