"""What a replica begins with when somebody wrote over its deployment's version, on a real broker."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from agents.replica import Replica
from millrace.models import show_list
from pipeline import admin
from pipeline.broker import Publisher
from pipeline.deployments import Version
from pipeline.events import Outgoing
from pipeline.models import Model
from pipeline.objects import ObjectStore
from pipeline.registry import activate
from pipeline.settings import Settings, load
from pipeline.topics import MODELS
from tests.support.engines import CPU
from tests.support.models import doing_nothing


@pytest.fixture
async def settings(kafka: str, topic_prefix: str, tmp_path: Path) -> Settings:
    settings = load(
        kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, object_store_url=str(tmp_path),
        models="builtin:own",
    )  # fmt: skip
    await admin.apply_topics(settings, [MODELS])
    return settings


@asynccontextmanager
async def beginning(settings: Settings) -> AsyncIterator[Version]:
    """Start a replica and yield what it begins with."""
    used: list[Version] = []

    async def use(version: Version, models: Sequence[Model]) -> None:
        used.append(version)

    objects = ObjectStore.open(settings)
    replica = Replica(settings, objects, lambda names: [doing_nothing(CPU)])
    await replica.start(use)
    try:
        (version,) = used
        yield version
    finally:
        await replica.stop()
        objects.close()


def _swapped() -> float:
    return REGISTRY.get_sample_value("millrace_model_swaps_total", {"result": "swapped"}) or 0.0


async def test_a_replica_that_starts_over_garbage(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins with the latest version that can be read, or with its setting, and `models list` says so."""
    await activate(settings, "default", ["builtin:a"], activated_by="ann")
    publisher = Publisher(settings, client_id="test")
    await publisher.start(wait=False)
    # The second deployment is as compaction leaves one: of a key that was written over, only the latest record.
    for key in (b"default", b"compacted"):
        await publisher.publish(settings.topic(MODELS.name), Outgoing(key, b"garbage", ()))
    await publisher.stop()
    swapped = _swapped()
    async with beginning(settings) as version:
        assert (version.revision, version.models) == (1, ("builtin:a",))
    assert _swapped() == swapped + 1
    compacted = settings.model_copy(update={"deployment": "compacted"})
    async with beginning(compacted) as version:
        assert (version.revision, version.models) == (0, ("builtin:own",))
    capsys.readouterr()
    assert await show_list(settings, None, as_json=False) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["default", "compacted"]
    assert "the version before it counts" in told[0]
    assert "MILLRACE_MODELS counts" in told[1]
    await activate(compacted, "compacted", ["builtin:b"], activated_by="ben")
    async with beginning(compacted) as version:
        assert (version.revision, version.models) == (1, ("builtin:b",))
