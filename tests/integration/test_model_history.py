"""Versions of models in the database: which result is shown, and the history of what was activated."""

import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from pipeline import examples
from pipeline.database import Database
from pipeline.deployments import Desired, Status, Version
from pipeline.events import Prediction
from pipeline.results import Saved
from pipeline.settings import load
from tests.support.samples import prediction

Replace = msgspec.structs.replace


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(load(database_url=database))
    yield opened
    await opened.close()


def versioned(image_id: str, version: str, revision: int, **changes: Any) -> Prediction:
    """A prediction of another version of the models, as a later revision of the deployment makes it."""
    return prediction(image_id, id=f"{image_id}-{version}", revision=revision, **changes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_the_newest_version_is_shown(db: Database, order: tuple[int, ...]) -> None:
    """Of several versions of one deployment the newest is shown, however they came; all are kept."""
    versions = [
        versioned("a", "1", 0),
        versioned("a", "2", 1),
        versioned("a", "3", 2, outcome="expired", models=()),
    ]
    for index in order:
        await db.save([versions[index]], [])
    await db.save([versioned("a", "x", 0, deployment="other")], [])
    shown = [stored.prediction.id for stored in await db.predictions("a")]
    assert sorted(shown) == ["a-2", "a-x"]
    every = [stored.prediction.id for stored in await db.predictions("a", every_version=True)]
    assert sorted(every) == ["a-1", "a-2", "a-3", "a-x"]
    accounted = {row.prediction_id: row.is_newest for row in (await db.accounting()).results}
    assert accounted == {"a-1": False, "a-2": True, "a-3": False, "a-x": True}


async def test_models_that_are_activated_again_are_shown_again(db: Database) -> None:
    """After a way back to older models, what they said of a picture is its result again, stored once."""
    await db.save([versioned("a", "1", 1), versioned("a", "2", 2)], [])
    assert await db.save([versioned("a", "1", 3)], []) == Saved(repeats=1)
    (shown,) = await db.predictions("a")
    assert (shown.prediction.id, shown.prediction.revision) == ("a-1", 3)
    assert await db.save([versioned("a", "1", 1)], []) == Saved(repeats=1)
    (shown,) = await db.predictions("a")
    assert shown.prediction.revision == 3


async def test_the_history_has_each_version_once(db: Database) -> None:
    """Versions and what replicas say of them are kept once, however often the topic is read, newest first."""
    second = examples.desired()
    first = Replace(second, version=Version(revision=3, models=("builtin:quality",)), note=None, predecessor=None,
                    activated_at=second.activated_at - timedelta(hours=1))  # fmt: skip
    runs, refused = examples.statuses()
    later = Replace(runs, time=runs.time + timedelta(seconds=10))
    batches: list[list[Desired | Status]] = [
        [first, second, runs, refused],
        [later, second],
        [first, refused, runs],
    ]
    for batch in batches:
        await db.save_models(batch)
    newest, oldest = await db.model_history("wildlife", 10)
    assert (newest.revision, newest.models, newest.note) == (4, second.version.models, second.note)
    assert (newest.predecessor, newest.artefacts) == (3, second.version.artefacts)
    assert [(report.replica, report.state, report.reason) for report in newest.reports] == [
        (runs.replica, "runs", None),
        (refused.replica, "refused", refused.refused.reason if refused.refused else None),
    ]
    assert newest.reports[0].models == runs.models
    assert (oldest.revision, oldest.predecessor) == (3, None)
    assert [report.replica for report in oldest.reports] == [refused.replica]
    assert await db.model_history("wildlife", 1) == [newest]
    assert await db.model_history("wildlife", 10, before=4) == [oldest]
    assert await db.model_history("nobody", 10) == []
