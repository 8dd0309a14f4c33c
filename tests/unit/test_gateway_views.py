"""What the gateway says of an image while its results are being stored."""

from datetime import UTC, datetime
from typing import cast

from gateway.predictions import read_view
from pipeline import examples
from pipeline.database import Database
from pipeline.results import ImageState, StoredPrediction


class StoredMeanwhile:
    """A database that stores a prediction right after the first look at the state."""

    def __init__(self) -> None:
        self._states = iter([ImageState(state="accepted"), ImageState(state="predicted")])

    async def state(self, image_id: str, deployment: str) -> ImageState:
        return next(self._states)

    async def image(self, image_id: str) -> None:
        return None

    async def predictions(self, image_id: str, *, every_version: bool) -> list[StoredPrediction]:
        prediction = examples.predictions()[0]
        return [StoredPrediction(position=1, stored_at=datetime.now(UTC), prediction=prediction)]

    async def dead_letters(self, image_id: str, limit: int) -> list[object]:
        return []


async def test_a_view_never_denies_the_prediction_it_shows() -> None:
    """A prediction that is stored between two queries of one answer changes the state in that answer too."""
    view = await read_view(cast("Database", StoredMeanwhile()), "cat-1", "default")
    assert len(view.predictions) == 1
    assert (view.state, view.deployments["default"].state) == ("predicted", "predicted")
