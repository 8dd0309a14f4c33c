"""Models swapped under load on a real broker: none lost, none predicted twice, no bad version gets to work."""

import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from pipeline import events, registry
from pipeline.deployments import Desired, Running
from pipeline.readers import read_all
from pipeline.registry import Follower
from pipeline.settings import Settings
from pipeline.topics import PREDICTIONS
from tests.support.eventually import eventually
from tests.support.spine import Spine, under_load

pytestmark = pytest.mark.timeout(240)

PYTHON = {"MILLRACE_ALLOW_PYTHON_MODELS": "true"}


def versioned(version: int, **options: object) -> str:
    text = "".join(f"&{name}={value}" for name, value in options.items())
    return f"python:tests.support.models:versioned?version={version}{text}"


ENVIRONMENT = PYTHON | {"MILLRACE_MODELS": versioned(1), "MILLRACE_MAX_BATCH_SIZE": "8"}


async def activate(spine: Spine, model: str, deployment: str = "default") -> Desired:
    return await registry.activate(spine.settings, deployment, [model], activated_by="test")


@asynccontextmanager
async def following(settings: Settings) -> AsyncIterator[Follower]:
    follower = Follower(settings, client_id="test")
    await follower.start(wait=False)
    try:
        yield follower
    finally:
        await follower.stop()


async def settled(
    follower: Follower, revision: int, *, replicas: int, deployment: str = "default"
) -> Running:
    """Wait until so many replicas have come to an end with a revision, and return what they say."""

    def are_settled() -> bool:
        running = follower.registry[deployment]
        states = list(running.states(datetime.now(UTC)).values())
        done = sum(state in ("runs", "refused") for state in states)
        return running.revision == revision and done >= replicas and running.is_settled(datetime.now(UTC))

    await eventually(are_settled, 60.0)
    return follower.registry[deployment]


async def predictions(spine: Spine) -> list[tuple[int, events.Prediction]]:
    """Return every prediction on the topic with its time of publication in milliseconds, in this order."""
    records = await read_all(spine.settings, spine.settings.topic(PREDICTIONS.name))
    found = [(record.timestamp_ms, events.decode_prediction(record)) for record in records]
    return sorted(found, key=lambda each: each[0])


async def test_a_swap_under_load(spine: Spine) -> None:
    """Two replicas go over to another version under load: every id has one result, and nothing mixes afterwards."""
    await spine.start("predict", "predict", "store", "archive", **ENVIRONMENT)
    async with following(spine.settings) as follower:
        async with under_load(spine, "swap", rate_per_second=60):
            await spine.wait_stored(120)
            desired = await activate(spine, versioned(2))
            running = await settled(follower, 1, replicas=2)
            reported = max(status.since for status in running.replicas.values() if status.since)
            stored = len(spine.journal)
            await spine.wait_stored(stored + 120)
        assert {"runs"} == set(running.states(reported).values())
        assert [model.version for status in running.replicas.values() for model in status.models] == [
            "2",
            "2",
        ]
    accounting = await spine.settled(max_repeated=0, whole=True)
    assert accounting.results == accounting.sent
    made = await predictions(spine)
    # Each names the version that made it: the model's score is its version.
    for _, prediction in made:
        (result,) = prediction.models
        assert float(result.version) == result.score
        assert prediction.revision == int(result.version) - 1
    versions = [prediction.models[0].version for _, prediction in made]
    assert {"1", "2"} == set(versions)
    after = [each for at, each in made if at > reported.timestamp() * 1000]
    assert {"2"} == {each.models[0].version for each in after}
    before = [each for at, each in made if at < desired.activated_at.timestamp() * 1000]
    assert {"1"} == {each.models[0].version for each in before}
    report_gaps(made, desired, reported.timestamp() * 1000)


def report_gaps(made: list[tuple[int, events.Prediction]], desired: Desired, until_ms: float) -> None:
    """Print the longest silences between predictions during the swap and otherwise."""
    begun = desired.activated_at.timestamp() * 1000
    gaps = [
        (second - first, begun - 100 < second < until_ms + 500) for (first, _), (second, _) in pairwise(made)
    ]
    during = max((gap for gap, is_during in gaps if is_during), default=0)
    otherwise = [gap for gap, is_during in gaps if not is_during]
    print(
        f"gaps between predictions: at most {during} ms during the swap, else {max(otherwise)} ms, "
        f"median {statistics.median(otherwise):.0f} ms"
    )
