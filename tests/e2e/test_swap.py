"""Models swapped under load on a real broker: none lost, none predicted twice, no bad version gets to work."""

import asyncio
import json
import shutil
import signal
import statistics
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from pipeline import artefacts, events, registry
from pipeline.deployments import Desired, Running
from pipeline.objects import ObjectStore
from pipeline.readers import read_all
from pipeline.registry import Follower
from pipeline.settings import Settings
from pipeline.topics import MODELS, PREDICTIONS
from tests.support.eventually import eventually
from tests.support.spine import Spine, under_load

pytestmark = pytest.mark.timeout(240)

# Nothing here is about pictures that are kept: no `archive` runs.
STEPS = ("predict", "store")
PYTHON = {"MILLRACE_ALLOW_PYTHON_MODELS": "true"}


def versioned(version: int, **options: object) -> str:
    text = "".join(f"&{name}={value}" for name, value in options.items())
    return f"python:tests.support.models:versioned?version={version}{text}"


ENVIRONMENT = PYTHON | {"MILLRACE_MODELS": versioned(1), "MILLRACE_MAX_BATCH_SIZE": "8"}


async def activate(spine: Spine, model: str, deployment: str = "default") -> Desired:
    return await registry.activate(spine.settings, deployment, [model], activated_by="test")


def following(settings: Settings) -> Follower:
    return Follower(settings, client_id="test")


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


async def test_a_swap_under_load(spine: Spine) -> None:
    """Two replicas go over to another version under load: every id has one result, and nothing mixes afterwards."""
    await spine.start("predict", "predict", "store", **ENVIRONMENT)
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
    accounting = await spine.settled(*STEPS, max_repeated=0, whole=True)
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


async def test_versions_that_cannot_run_are_refused(spine: Spine) -> None:
    """A version that fails to load or to warm up is refused with its reason, and the old one goes on."""
    await spine.start("predict", "store", **ENVIRONMENT)
    bad = {
        "python:tests.support.models:failing_to_load": "no memory for 7,000,000,000 parameters",
        "python:tests.support.models:failing_warm_up": "no kernel image is available",
        "builtin:nothing": "unknown model",
    }
    async with following(spine.settings) as follower, under_load(spine, "refused", rate_per_second=20):
        for revision, (model, reason) in enumerate(bad.items(), start=1):
            await activate(spine, model)
            running = await settled(follower, revision, replicas=1)
            (status,) = running.replicas.values()
            assert status.refused is not None
            assert (status.refused.revision, status.revision) == (revision, 0)
            assert reason in status.refused.reason
        await spine.wait_stored(len(spine.journal) + 20)
        await activate(spine, versioned(2))
        running = await settled(follower, 4, replicas=1)
        (status,) = running.replicas.values()
        assert (status.revision, status.refused) == (4, None)
        assert running.desired is not None
        assert running.desired.predecessor is None, "what everybody refused is no predecessor"
    (worker,) = spine.running("predict")
    assert worker.metric("millrace_model_swaps_total", result="refused") == 3
    assert worker.metric("millrace_model_swaps_total", result="swapped") == 2  # the first and the last
    assert worker.metric("millrace_models_revision") == 4
    await spine.settled(*STEPS, max_repeated=0, whole=True)
    made = {prediction.models[0].version: prediction.revision for _, prediction in await predictions(spine)}
    assert made.items() <= {"1": 0, "2": 4}.items()
    history = await spine.database.model_history("default", 10)
    assert [version.revision for version in history] == [4, 3, 2, 1]
    assert [[report.state for report in version.reports] for version in history] == [
        ["runs"],
        *[["refused"]] * 3,
    ]


async def test_python_models_need_the_workers_leave(spine: Spine) -> None:
    """Models that run code are refused by a worker that was not told to allow them, and garbage does nothing."""
    await spine.start("predict", "store")
    async with following(spine.settings) as follower:
        await activate(spine, versioned(2))
        (status,) = (await settled(follower, 1, replicas=1)).replicas.values()
        assert status.refused is not None
        assert "MILLRACE_ALLOW_PYTHON_MODELS=true allows it" in status.refused.reason
        topic = spine.settings.topic(MODELS.name)
        for value in (b"\xff", b"{}", b"[" * 5_000):
            await spine.publisher.publish(topic, events.Outgoing(b"default", value, (("x", b"\xff"),)))
        await spine.send_many("garbage", 10)
        await spine.settled(*STEPS, whole=True)
        assert follower.registry["default"].revision == 1


async def test_a_replica_that_starts_later(spine: Spine) -> None:
    """It begins with the version that was activated before, or with that one's predecessor, and says so."""
    await activate(spine, versioned(2))
    await spine.start("store")
    (first,) = await spine.start("predict", **ENVIRONMENT)
    async with following(spine.settings) as follower:
        await settled(follower, 1, replicas=1)
        await spine.send_many("early", 10)
        await spine.wait_stored(10)
        await activate(spine, "python:tests.support.models:failing_warm_up")
        await settled(follower, 2, replicas=1)
        await spine.start("predict", **ENVIRONMENT)
        running = await settled(follower, 2, replicas=2)
        assert {"refused"} == set(running.states(datetime.now(UTC)).values())
        assert [status.revision for status in running.replicas.values()] == [1, 1]
        await spine.send_many("both", 10)
        await spine.wait_stored(20)
        await spine.stop(first)
        # A clean end takes a replica off the topic.
        await eventually(lambda: len(follower.registry["default"].replicas) == 1, 20.0)
        await spine.send_many("late", 10)
        await spine.settled(*STEPS, whole=True)
    assert {"2"} == {prediction.models[0].version for _, prediction in await predictions(spine)}
    assert {1} == {prediction.revision for _, prediction in await predictions(spine)}


async def test_a_version_that_kills_its_process(spine: Spine) -> None:
    """A replica that dies over a version again and again gives it up, and begins with the one before."""
    own = ENVIRONMENT | {"MILLRACE_REPLICA": "predict-0"}
    await activate(spine, versioned(2))
    await activate(spine, "python:tests.support.models:aborting_at_load")
    await spine.start("store")
    for _ in range(3):
        worker = spine.crew.start("-m", "agents", "predict", **own)
        await asyncio.to_thread(worker.wait, 60.0)
        assert worker.exit_code == -signal.SIGABRT
    await spine.start("predict", **own)
    async with following(spine.settings) as follower:
        (status,) = (await settled(follower, 2, replicas=1)).replicas.values()
        assert status.refused is not None
        assert "died 3 times in a row" in status.refused.reason
        assert status.revision == 1
        await spine.send_many("survived", 10)
        await spine.settled(*STEPS, whole=True)


async def test_a_replica_killed_during_the_swap(spine: Spine) -> None:
    """A replica that is killed while it loads holds nobody up; it comes back with the new version."""
    names = [{"MILLRACE_REPLICA": f"predict-{number}"} for number in range(2)]
    await spine.start("store")
    victim, _ = [(await spine.start("predict", **ENVIRONMENT, **name))[0] for name in names]
    async with following(spine.settings) as follower, under_load(spine, "killed", rate_per_second=40):
        await spine.wait_stored(40)
        await activate(spine, "python:tests.support.models:slow_to_load?version=2&seconds=2")

        def loads() -> bool:
            running = follower.registry["default"]
            return running.state(running.replicas["predict-0"], datetime.now(UTC)) == "loads"

        await eventually(loads, 20.0)
        victim.kill()
        await eventually(lambda: follower.registry["default"].replicas["predict-1"].revision == 1, 60.0)
        await spine.start("predict", **ENVIRONMENT, **names[0])
        running = await settled(follower, 1, replicas=2)
        assert {"runs"} == set(running.states(datetime.now(UTC)).values())
        reported_ms = datetime.now(UTC).timestamp() * 1000
        await spine.wait_stored(len(spine.journal) + 40)
    # What was in flight at the kill is done again, perhaps by the other version.
    accounting = await spine.settled(*STEPS, max_repeated=60, max_superseded=60, whole=True)
    assert accounting.results == accounting.sent
    after = [each for at, each in await predictions(spine) if at > reported_ms]
    assert {"2"} == {each.models[0].version for each in after}


async def test_redelivery_after_a_swap(spine: Spine) -> None:
    """What was predicted, not committed and is predicted again by newer models is shown once: the newest."""
    # Nothing is committed before the kill.
    own = ENVIRONMENT | {"MILLRACE_COMMIT_INTERVAL_SECONDS": "600"}
    await spine.start("store")
    (worker,) = await spine.start("predict", **own)
    await spine.send_many("again", 40)
    await spine.wait_stored(40)
    worker.kill()
    await activate(spine, versioned(2))
    await spine.start("predict", **ENVIRONMENT)
    accounting = await spine.settled(*STEPS, max_repeated=40, max_superseded=40, whole=True)
    assert (accounting.results, accounting.superseded) == (40, 40)
    for image_id in spine.journal.places:
        (shown,) = await spine.database.predictions(image_id)
        assert shown.prediction.models[0].version == "2"
        every = await spine.database.predictions(image_id, every_version=True)
        assert [stored.prediction.models[0].version for stored in every] == ["1", "2"]


async def test_two_deployments_side_by_side(spine: Spine) -> None:
    """Two deployments predict the same pictures with models of their own; activating one leaves the other alone."""
    wild = ENVIRONMENT | {"MILLRACE_DEPLOYMENT": "wildlife", "MILLRACE_MODELS": versioned(7)}
    await spine.start("store")
    await asyncio.gather(spine.start("predict", **ENVIRONMENT), spine.start("predict", **wild))
    other = Spine(
        spine.settings.model_copy(update={"deployment": "wildlife"}), spine.crew, spine.database, spine.publisher,
        spine.journal,
    )  # fmt: skip
    await spine.send_many("both", 30)
    await asyncio.gather(spine.wait_stored(30), other.wait_stored(30))
    await activate(spine, versioned(8), "wildlife")
    async with following(spine.settings) as follower:
        await settled(follower, 1, replicas=1, deployment="wildlife")
        assert follower.registry["default"].revision == 0
    await spine.send_many("after", 30)
    for one in (spine, other):
        accounting = await one.settled(*STEPS, whole=True, max_repeated=0)
        assert accounting.results == 60
    shown = [stored.prediction for stored in await spine.database.predictions("after-0")]
    assert {each.deployment: each.models[0].version for each in shown} == {"default": "1", "wildlife": "8"}


async def test_weights_from_another_machine(spine: Spine, tmp_path: Path) -> None:
    """Weights that lie where a version is activated reach every replica, under one name and with their digest.

    Those that have no number for anything are refused, and the version before them goes on.
    """
    torch.manual_seed(1)
    network = torchvision.models.mobilenet_v3_small(num_classes=2)
    source = tmp_path / "training"
    source.mkdir()
    card = json.dumps({"labels": ["otter", "badger"]})
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, source / "otters.safetensors", {"millrace": card})
    tensors["classifier.3.bias"] = torch.full((2,), torch.nan)
    safetensors.torch.save_file(tensors, source / "nothing.safetensors", {"millrace": card})
    named = "file:{}#torchvision:mobilenet_v3_small"
    objects = ObjectStore.open(spine.settings)
    names, files = await artefacts.upload(objects, [named.format(source / "otters.safetensors")])
    bad_names, bad_files = await artefacts.upload(objects, [named.format(source / "nothing.safetensors")])
    objects.close()
    shutil.rmtree(source)
    caches = [{"MILLRACE_MODEL_CACHE": str(tmp_path / f"cache-{number}")} for number in range(2)]
    await spine.start("store")
    await asyncio.gather(*(spine.start("predict", **cache) for cache in caches))
    async with following(spine.settings) as follower:
        await registry.activate(spine.settings, "default", names, activated_by="test", artefacts=files)
        await settled(follower, 1, replicas=2)
        await registry.activate(
            spine.settings, "default", bad_names, activated_by="test", artefacts=bad_files
        )
        running = await settled(follower, 2, replicas=2)
    refusals = {status.refused.reason for status in running.replicas.values() if status.refused is not None}
    assert refusals == {
        f"'{bad_names[0]}' fails its warm-up: its output is not a finite number for a reference picture"
    }
    identities = {status.models for status in running.replicas.values()}
    ((identity,),) = identities
    assert identity.model == named.format("otters.safetensors")
    assert identity.version == identity.digest[:12]
    await spine.send_many("otter", 20)
    await spine.settled(*STEPS, whole=True)
    results = [prediction.models[0] for _, prediction in await predictions(spine)]
    assert {(result.model, result.digest) for result in results} == {(identity.model, identity.digest)}
    assert {result.label for result in results} <= {"otter", "badger"}
