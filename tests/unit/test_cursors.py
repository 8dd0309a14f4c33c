"""Cursors of a search: what was encoded comes back, and anything else is refused."""

import base64
import contextlib
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import cursors
from gateway.cursors import Cursor
from gateway.problems import Problem
from pipeline.vectors import After, Filters, Found, Hit, Space
from tests.support.samples import NOW

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=40)
distances = st.floats(0.0, 2.0)
numbers = st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=20).filter(any)


def page(distance: float, image_id: str) -> Found:
    hit = Hit(
        image_id=image_id, prediction_id="p", distance=distance, published_at=NOW, source=None, labels={}
    )
    return Found(mode="exact", hits=(hit,), has_more=True)


@given(numbers, names, names, distances, names)
def test_a_cursor_comes_back_as_it_was(
    vector: list[float], model: str, label: str, distance: float, image_id: str
) -> None:
    """The search, its vector and its place survive exactly: pages neither overlap nor leave gaps."""
    cursor = Cursor(
        deployment="default", space=Space(model, "1", len(vector)), mode="exact",
        filters=Filters(label=label, since=NOW), vector=cursors.pack(vector),
    )  # fmt: skip
    again = cursors.decode(cursors.encode(cursor, page(distance, image_id)))
    assert again == msgspec.structs.replace(cursor, after=After(distance, image_id))
    assert list(cursors.unpack(again.vector)) == vector


@given(
    st.text(max_size=200) | st.binary(max_size=200).map(lambda data: base64.urlsafe_b64encode(data).decode())
)
def test_anything_else_is_refused(given_text: str) -> None:
    """Whatever a client sends for a cursor is a cursor or a 422, never another error."""
    with contextlib.suppress(Problem):
        assert cursors.decode(given_text).after is not None


@pytest.mark.parametrize("vector", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_a_vector_without_a_direction_is_refused(vector: list[float]) -> None:
    """A forged vector that has no cosine is refused like any other garbage."""
    cursor = Cursor(
        deployment="default",
        space=Space("m", "1", 2),
        mode="exact",
        filters=Filters(),
        vector=cursors.pack(vector),
    )
    with pytest.raises(Problem):
        cursors.decode(cursors.encode(cursor, page(0.5, "cat")))
