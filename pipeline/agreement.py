"""How far two models agree on the same pictures, gathered picture by picture in bounded memory. Pure.

Results are compared with those of the same task: of models with the same name first, then in their order.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from pipeline.events import Box, ModelResult

# Two boxes of the same label are one find from here on: what detection benchmarks call AP50.
MATCHING_IOU = 0.5
MAX_EXAMPLES = 5
# Of two vocabularies of a thousand labels each there could be a million pairs.
_MAX_LABEL_PAIRS = 10_000
# Quantiles are right within 1 %: buckets grow by this factor, some 2,000 of them from a nanosecond to years.
_GROWTH = 1.02
_LEAST, _MOST = 1e-9, 1e9


class Distribution:
    """Numbers from 0 up: their mean and largest exactly, their quantiles within 1 %."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0
        self._sum = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, number: float) -> None:
        """Take one in."""
        self.count += 1
        self._sum += number
        self.largest = max(self.largest, number)
        self._buckets[math.ceil(math.log(min(max(number, _LEAST), _MOST), _GROWTH))] += 1

    @property
    def mean(self) -> float:
        """Their mean; of none it is 0."""
        return self._sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Return the number that this share of them does not exceed; of none it is 0."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                middle = 2 * _GROWTH**bucket / (1 + _GROWTH)
                return 0.0 if middle <= _LEAST else min(middle, self.largest)
        return 0.0


class LabelPair(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures that two classifiers take for different things."""

    a: str
    b: str
    images: int
    #: The first of them.
    example: str


class Agreement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a model of one deployment and one of another agree; each task has numbers of its own."""

    task: str
    #: Name and version.
    a: str
    b: str
    #: Pictures that both have judged.
    images: int
    #: classify: the share of pictures with the same best label.
    same_label: float | None = None
    #: classify, score: how far the (best) scores are apart, on average and for all but a hundredth.
    score_difference: float | None = None
    score_difference_p99: float | None = None
    #: score: how much higher b's are, on average.
    score_bias: float | None = None
    #: embed: the cosine between the two vectors, on average and for all but a hundredth.
    cosine: float | None = None
    cosine_p01: float | None = None
    #: embed: pictures whose vectors have different lengths or are nothing but zeros.
    incomparable: int = 0
    #: detect: the share of all boxes that the other has too, with the same label and an IoU of at least a half;
    #: and the mean IoU of those.
    same_boxes: float | None = None
    iou: float | None = None
    boxes_a: int | None = None
    boxes_b: int | None = None
    #: classify: what they disagree on most.
    disagreements: tuple[LabelPair, ...] = ()


@dataclass
class Tally:
    """What is gathered of one model beside another."""

    task: str
    a: str
    b: str
    images: int = 0
    same: int = 0
    bias: float = 0.0
    incomparable: int = 0
    boxes_a: int = 0
    boxes_b: int = 0
    differences: Distribution = field(default_factory=Distribution)
    distances: Distribution = field(default_factory=Distribution)
    ious: Distribution = field(default_factory=Distribution)
    labels: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, image_id: str, a: ModelResult, b: ModelResult) -> None:
        """Take in what both say of a picture; the cosine of embeddings comes by itself."""
        self.images += 1
        if a.score is not None and b.score is not None:
            self.differences.add(abs(b.score - a.score))
            self.bias += b.score - a.score
        if self.task == "classify":
            self._add_labels(image_id, (a.label or "", b.label or ""))
        if self.task == "detect":
            self.boxes_a += len(a.boxes)
            self.boxes_b += len(b.boxes)
            for overlap in matched(a.boxes, b.boxes):
                self.ious.add(overlap)

    def add_cosine(self, cosine: float | None) -> None:
        """Take in the cosine of a picture's vectors; None or NaN: there is none."""
        if cosine is None or math.isnan(cosine):
            self.incomparable += 1
        else:
            self.distances.add(max(0.0, 1 - cosine))

    def result(self) -> Agreement:
        """Say how far they agree."""
        numbers: dict[str, float | int | None] = {}
        if self.differences.count:
            numbers["score_difference"] = self.differences.mean
            numbers["score_difference_p99"] = self.differences.quantile(0.99)
        if self.task == "classify":
            numbers["same_label"] = self.same / self.images
        if self.task == "score" and self.differences.count:
            numbers["score_bias"] = self.bias / self.differences.count
        if self.distances.count:
            numbers["cosine"] = 1 - self.distances.mean
            numbers["cosine_p01"] = 1 - self.distances.quantile(0.99)
        if self.task == "detect":
            boxes = self.boxes_a + self.boxes_b
            numbers |= {"boxes_a": self.boxes_a, "boxes_b": self.boxes_b}
            numbers["same_boxes"] = 2 * self.ious.count / boxes if boxes else None
            numbers["iou"] = self.ious.mean if self.ious.count else None
        rounded = {name: round(value, 6) for name, value in numbers.items() if value is not None}
        return Agreement(
            task=self.task, a=self.a, b=self.b, images=self.images, incomparable=self.incomparable,
            disagreements=tuple(
                LabelPair(a=pair[0], b=pair[1], images=count, example=self.examples[pair])
                for pair, count in self.labels.most_common(MAX_EXAMPLES)
            ),
            **rounded,  # type: ignore[arg-type]
        )  # fmt: skip

    def _add_labels(self, image_id: str, pair: tuple[str, str]) -> None:
        if pair[0] == pair[1]:
            self.same += 1
        elif pair in self.labels or len(self.labels) < _MAX_LABEL_PAIRS:
            self.labels[pair] += 1
            self.examples.setdefault(pair, image_id)


def paired(a: Sequence[ModelResult], b: Sequence[ModelResult]) -> Iterator[tuple[ModelResult, ModelResult]]:
    """Return results that can be compared, each at most once."""
    left = {(result.task, result.model): result for result in b}
    others = []
    for result in a:
        same = left.pop((result.task, result.model), None)
        if same is None:
            others.append(result)
        else:
            yield result, same
    for result in others:
        key = next((key for key in left if key[0] == result.task), None)
        if key is not None:
            yield result, left.pop(key)


def matched(a: Sequence[Box], b: Sequence[Box]) -> list[float]:
    """Return the IoU of each pair of boxes that are one find; a's best boxes choose first."""
    left = list(b)
    ious = []
    for box in sorted(a, key=lambda box: -box.score):
        chosen, best = None, MATCHING_IOU
        for other in left:
            if other.label == box.label and (overlap := iou(box, other)) >= best:
                chosen, best = other, overlap
        if chosen is not None:
            left.remove(chosen)
            ious.append(best)
    return ious


def iou(a: Box, b: Box) -> float:
    """Return the area that two boxes share, of the area of both."""
    across = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    down = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    if across <= 0 or down <= 0:
        return 0.0
    both = across * down
    return both / (_area(a) + _area(b) - both)


def _area(box: Box) -> float:
    return (box.x_max - box.x_min) * (box.y_max - box.y_min)
