"""How far two outputs are from each other is told in terms of their task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.events import Box
from pipeline.models import LoadOptions, Output, load_models
from pipeline.models.disagreement import BOX_TOLERANCE, disagreement, structured_pictures
from tests.support.twins import GPU

CPU = torch.device("cpu")
OPTIONS = LoadOptions(allow_python=True)


def test_labels_that_flip_are_no_disagreement() -> None:
    """Of random weights' thousand labels other five may be the best, no better than the rest."""
    models = [
        load_models("python:tests.support.twins:classifier?on_gpu=rounds", device, OPTIONS)[0]
        for device in (CPU, GPU)
    ]
    ours, theirs = (model.forward(structured_pictures(model.view, 4, CPU)) for model in models)
    assert all(set(one.scores) != set(other.scores) for one, other in zip(ours, theirs, strict=True))
    assert disagreement(ours, theirs) < 0.1


def test_scores_of_either_side_count() -> None:
    """A label that only one of the two has among its best must be about as good as the other's last."""
    one = Output(label="a", score=0.5, scores={"a": 0.5, "b": 0.5})
    other = Output(label="c", score=0.9, scores={"c": 0.9, "a": 0.5})
    for pair in ((one, other), (other, one)):
        assert disagreement(*([output] for output in pair)) == pytest.approx(0.4 / 0.02)


def found(*boxes: tuple[str, float, float]) -> Output:
    """Return 100 x 100 boxes of these labels, scores and left edges."""
    return Output(boxes=tuple(Box(label, score, left, 0, left + 100, 100) for label, score, left in boxes))


CAT, DOG, FAINT = ("cat", 0.9, 0.0), ("dog", 0.8, 200.0), ("cat", 0.51, 500.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "lacking"),
    [
        ([CAT, DOG], [("cat", 0.89, 10.0), ("dog", 0.81, 190.0)], 0),  # moved
        ([CAT, FAINT], [CAT], 0),  # just above the threshold on one side
        ([CAT], [], 1),
        ([CAT, DOG], [CAT], 1 / 3),  # of three boxes on either side one has no like
        ([CAT], [("dog", 0.9, 0.0)], 1),
        ([CAT], [("cat", 0.9, 60.0)], 1),
        ([CAT], [("cat", 0.8, 0.0)], 1),
        ([CAT], [("cat", 0.9, float("nan"))], 1),
        ([], [], 0),
        ([("cat", 0.3, 0.0), ("cat", 0.1, 200.0)], [("cat", 0.3, 0.0)], 0),  # thresholds may be lower
        ([("cat", 0.8, 300.0 * n) for n in range(100)], [("cat", 0.8, 300.0 * n) for n in range(50, 150)], 0),
    ],
)  # fmt: skip
def test_boxes_are_looked_for_on_either_side(
    ours: Sequence[Any], theirs: Sequence[Any], lacking: float
) -> None:
    """Boxes clear of the threshold must be on both sides, with the same label, about the same place and score."""
    expected = pytest.approx(lacking / BOX_TOLERANCE)
    assert disagreement([found(*ours)], [found(*theirs)]) == expected
    assert disagreement([found(*theirs)], [found(*ours)]) == expected


@pytest.mark.parametrize(("other", "apart"), [((30.0, 40.0), 0), ((-3.0, -4.0), 1000), ((4.0, -3.0), 500)])
def test_vectors_are_compared_by_their_directions(other: tuple[float, float], apart: float) -> None:
    """As a search does, whatever their lengths; code of one's own need not make them 1."""
    ours, theirs = (Output(embedding=np.array(each, np.float32)) for each in ((3.0, 4.0), other))
    assert disagreement([ours], [theirs]) == pytest.approx(apart, abs=1e-3)


def test_what_is_not_finite_never_agrees() -> None:
    """An overflow in fewer bits is a disagreement, wherever it is."""
    good = Output(label="a", score=0.5, scores={"a": 0.5, "b": 0.5})
    for bad in ({"a": float("nan"), "b": 0.5}, {"a": 0.5, "b": float("inf")}):
        assert disagreement([good], [Output(label="a", score=0.5, scores=bad)]) == float("inf")
    vector = Output(embedding=np.array([0.6, 0.8], np.float32))
    other = Output(embedding=np.array([np.nan, 0.8], np.float32))
    assert disagreement([vector], [other]) == float("inf")
    assert disagreement([Output(score=1.0)], [Output(score=1.01)]) == pytest.approx(0.5)
