"""How far two models agree: numbers worked out by hand, and laws."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement import Distribution, LabelPair, Tally, matched, paired
from pipeline.events import Box, ModelResult


def said(task: str = "classify", model: str = "m", **values: Any) -> ModelResult:
    return ModelResult(model=model, version="1", digest="d", task=task, **values)  # type: ignore[arg-type]


def box(label: str, *corners: float, score: float = 0.9) -> Box:
    return Box(label, score, *corners)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_right_within_a_hundredth(numbers: list[float], share: float) -> None:
    """A quantile is that of the sorted numbers within 1 %, the mean and the largest are exact."""
    gathered = Distribution()
    for number in numbers:
        gathered.add(number)
    expected = sorted(numbers)[max(0, math.ceil(share * len(numbers)) - 1)]
    assert gathered.quantile(share) == pytest.approx(expected, rel=0.0101)
    assert gathered.mean == pytest.approx(math.fsum(numbers) / len(numbers))
    assert gathered.largest == max(numbers)


def test_memory_does_not_grow_with_numbers_or_labels() -> None:
    """However many different numbers and labels come, what is kept stays small."""
    gathered, tally = Distribution(), Tally("classify", "a", "b")
    for number in range(20_000):
        gathered.add(number * 1e-12 if number % 2 else number * 1e12)
        tally.add(f"image-{number}", said(label=f"a{number}"), said(label=f"b{number}"))
    assert len(gathered._buckets) < 3000
    assert len(tally.labels) == len(tally.examples) == 10_000
    assert (tally.result().images, tally.result().same_label) == (20_000, 0.0)


def test_classifiers_agree_on_the_best_label() -> None:
    """Agreement is the share of the same best label; what they differ in most comes with an example."""
    tally = Tally("classify", "a 1", "b 1")
    for number, (a, b) in enumerate(
        [("cat", "cat"), ("dog", "cat"), ("dog", "cat"), ("cat", "dog"), ("dog", "dog")]
    ):
        tally.add(f"image-{number}", said(label=a, score=0.5), said(label=b, score=0.75))
    found = tally.result()
    assert (found.images, found.same_label, found.score_difference) == (5, 0.4, 0.25)
    assert found.disagreements == (
        LabelPair(a="dog", b="cat", images=2, example="image-1"),
        LabelPair(a="cat", b="dog", images=1, example="image-3"),
    )


def test_scores_differ_by_so_much_and_in_which_direction() -> None:
    """The mean distance of two scores and their mean difference are two things."""
    tally = Tally("score", "a", "b")
    for a, b in ((1.0, 2.0), (5.0, 2.0)):
        tally.add("image", said("score", score=a), said("score", score=b))
    found = tally.result()
    assert (found.score_difference, found.score_bias) == (2.0, -1.0)
    assert found.score_difference_p99 == pytest.approx(3.0, rel=0.01)
    assert found.same_label is None


def test_vectors_that_point_nowhere_are_counted_apart() -> None:
    """A cosine that there is none of neither counts as agreement nor spoils the mean."""
    tally = Tally("embed", "a", "b")
    for cosine in (1.0, 0.5, None, math.nan):
        tally.add("image", said("embed"), said("embed"))
        tally.add_cosine(cosine)
    found = tally.result()
    assert (found.images, found.incomparable, found.cosine) == (4, 2, 0.75)
    assert found.cosine_p01 == pytest.approx(0.5, abs=0.01)


def test_boxes_are_one_find_from_an_iou_of_a_half() -> None:
    """A box is found by both when label and place agree; each box once, the best IoU is taken."""
    square = box("cat", 0, 0, 10, 10)
    assert matched([square], [square]) == [1.0]
    assert matched([square], [box("dog", 0, 0, 10, 10)]) == []
    assert matched([square], [box("cat", 0, 0, 10, 5)]) == [0.5]
    assert matched([square], [box("cat", 0, 0, 10, 4.9)]) == []
    assert matched([square], [box("cat", 20, 20, 30, 30)]) == []
    assert matched([square, square], [box("cat", 0, 0, 10, 8), square]) == [1.0, 0.8]
    tally = Tally("detect", "a", "b")
    tally.add(
        "image", said("detect", boxes=(square, square)), said("detect", boxes=(box("cat", 0, 0, 10, 8),))
    )
    found = tally.result()
    assert (found.boxes_a, found.boxes_b, found.same_boxes, found.iou) == (2, 1, 0.666667, 0.8)
    nothing = Tally("detect", "a", "b")
    nothing.add("image", said("detect"), said("detect"))
    assert nothing.result().same_boxes is None


def test_what_is_compared_with_what() -> None:
    """Results of one task meet: of the same model first, the others in their order, each once."""
    a = [said(model="x"), said(model="same"), said("embed", model="e"), said("score", model="alone")]
    b = [said(model="same"), said("embed", model="f"), said(model="y"), said(model="z")]
    assert sorted((one.model, other.model) for one, other in paired(a, b)) == [
        ("e", "f"), ("same", "same"), ("x", "y"),
    ]  # fmt: skip
