"""What is published of a model's output: numbers checked, boxes in pixels of the picture, vectors as text."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.events import Box, ModelResult, encode_embedding
from pipeline.imaging import Picture, View
from pipeline.models import Model, Output


def result_of(model: Model, output: Output, picture: Picture) -> ModelResult | None:
    """Return what is published of an output, or None when a number in it is not finite."""
    if not output.is_finite:
        return None
    numbers = [*output.scores.values()]
    for box in output.boxes:
        numbers += (box.score, box.x_min, box.y_min, box.x_max, box.y_max)
    if output.score is not None:
        numbers.append(output.score)
    if not all(map(math.isfinite, numbers)):
        return None
    embedding = None
    if output.embedding is not None:
        if not np.isfinite(output.embedding).all():
            return None
        embedding = np.ascontiguousarray(output.embedding, dtype="<f4")
    return ModelResult(
        model=model.name,
        version=model.version,
        digest=model.digest,
        task=model.task,
        label=output.label,
        score=output.score,
        scores=output.scores,
        boxes=in_picture(output.boxes, model.view, picture),
        embedding=None if embedding is None else encode_embedding(embedding.tobytes()),
        dimension=None if embedding is None else embedding.size,
    )


def in_picture(boxes: Sequence[Box], view: View, picture: Picture) -> tuple[Box, ...]:
    """Map boxes from pixels of a view to pixels of the upright picture, cut off at its edges."""
    if not boxes:
        return ()
    size = (picture.width, picture.height)
    left, top, right, bottom = view.window_of(size)
    width, height = view.size_of(size)
    across, down = (right - left) / width, (bottom - top) / height

    def x(value: float) -> float:
        return round(min(max(left + value * across, 0.0), size[0]), 2)

    def y(value: float) -> float:
        return round(min(max(top + value * down, 0.0), size[1]), 2)

    return tuple(
        Box(box.label, box.score, x(box.x_min), y(box.y_min), x(box.x_max), y(box.y_max)) for box in boxes
    )
