"""Activations on a real broker: each is seen by everybody, and none silently overwrites another."""

import asyncio
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from aiokafka import AIOKafkaProducer

from pipeline import admin, deployments, registry
from pipeline.broker import Publisher
from pipeline.connections import client_options
from pipeline.deployments import Desired, Registry, Status
from pipeline.errors import ConflictError, ContractError, DependencyError
from pipeline.events import Outgoing
from pipeline.registry import Follower, activate
from pipeline.settings import Settings, load
from pipeline.topics import MODELS
from tests.support.eventually import eventually


@pytest.fixture
async def settings(kafka: str, topic_prefix: str) -> Settings:
    """Settings of an installation of its own, with its topics."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix)
    await admin.apply_topics(settings, [MODELS])
    return settings


async def publish(settings: Settings, *records: Outgoing) -> None:
    publisher = Publisher(settings, client_id="test")
    await publisher.start(wait=False)
    for record in records:
        await publisher.publish(settings.topic(MODELS.name), record)
    await publisher.stop()


async def test_activations_count_up_and_are_seen(settings: Settings) -> None:
    """Each activation is the next revision, names the one before, and is read back when it returns."""
    await activate(settings, "wildlife", ["builtin:a"], activated_by="ann")
    async with Follower(settings, client_id="test") as follower:
        assert follower.registry["wildlife"].revision == 1
        await activate(settings, "wildlife", ["builtin:b"], activated_by="ben", note="better")
        await activate(settings, "default", ["builtin:c"], activated_by="ben")
        known = await registry.read(settings)
        assert await follower.wait_until(lambda seen: list(seen) == list(known), 20.0)
    second = known["wildlife"].desired
    assert second is not None
    assert (second.version.models, second.activated_by, second.note) == (("builtin:b",), "ben", "better")
    assert second.predecessor is not None
    assert (second.predecessor.revision, second.predecessor.models) == (1, ("builtin:a",))
    assert known["default"].revision == 1


async def test_concurrent_activations_do_not_overwrite_each_other(settings: Settings) -> None:
    """Of activations at the same time each either has a revision of its own or is told that it has none."""
    names = [f"builtin:{number}" for number in range(6)]
    made = await asyncio.gather(
        *(activate(settings, "default", [name], activated_by=name) for name in names), return_exceptions=True
    )
    won = [each for each in made if isinstance(each, Desired)]
    assert won
    assert all(isinstance(each, Desired | ConflictError) for each in made)
    won.sort(key=lambda each: each.version.revision)
    assert [each.version.revision for each in won] == list(range(1, len(won) + 1))
    # Each knew the one before it: nobody overwrote what it had not seen.
    for before, after in pairwise(won):
        assert after.predecessor == before.version
    assert (await registry.read(settings))["default"].desired == won[-1]


async def test_an_activation_may_insist_on_what_it_replaces(settings: Settings) -> None:
    """With an expected revision somebody else's activation is a conflict that names it, and nothing changes."""
    await activate(settings, "default", ["builtin:a"], activated_by="ann", expected_revision=0)
    with pytest.raises(ConflictError, match=r"at revision 1, not 0: ann activated builtin:a"):
        await activate(settings, "default", ["builtin:b"], activated_by="ben", expected_revision=0)
    assert (await registry.read(settings))["default"].revision == 1
    await activate(settings, "default", ["builtin:b"], activated_by="ben", expected_revision=1)


async def test_a_writer_that_died_half_way_changes_nothing(settings: Settings) -> None:
    """A record whose writer never committed is not seen, and the next activation does not wait for it."""
    left = AIOKafkaProducer(
        **client_options(settings), transactional_id=f"{settings.topic_prefix}models.default"
    )
    await left.start()
    await left.begin_transaction()
    version = deployments.Version(revision=9, models=("builtin:x",))
    half = Desired(deployment="default", version=version, activated_by="x", activated_at=datetime.now(UTC))
    outgoing = deployments.encode(half)
    await left.send_and_wait(settings.topic(MODELS.name), outgoing.value, outgoing.key)
    done = await asyncio.wait_for(activate(settings, "default", ["builtin:a"], activated_by="ann"), 20.0)
    assert done.version.revision == 1
    assert (await registry.read(settings))["default"].desired == done
    await left.stop()


async def test_garbage_is_passed_over(settings: Settings) -> None:
    """Nothing that anybody publishes on the topic stops a reader or hides what is readable."""
    await activate(settings, "default", ["builtin:a"], activated_by="ann")
    later = b'{"deployment":"default","replica":"r","time":"2026-01-01T00:00:00Z"}'
    # The broker itself refuses a record without a key on a compacted topic.
    garbage = [
        Outgoing(b"default", b"\xff\x00{", ()),
        Outgoing(b"default", b"{}", (("ce_type", b"millrace.models.desired.v9"),)),
        Outgoing(b"default/r", b"[" * 10_000, ()),
        Outgoing(b"default/r", later, (("\xff", b"x"),)),
        Outgoing(b"\xff/\xff", b"null", ()),
        Outgoing(b"", b"an empty key", ()),
        deployments.encode(Status(deployment="default", replica="r", time=datetime.now(UTC), revision=1)),
    ]
    async with Follower(settings, client_id="test") as follower:
        await publish(settings, *garbage)

        def is_read(known: Registry) -> bool:
            return [status.revision for status in known["default"].replicas.values()] == [1]

        assert await follower.wait_until(is_read, 20.0)
        assert follower.registry["default"].revision == 1
        # Whoever starts now reads the same.
        assert list(await registry.read(settings)) == list(follower.registry)


async def test_what_breaks_the_contract_is_not_published(settings: Settings) -> None:
    """A name or a note that nobody could read is refused before anything is on the topic."""
    for deployment, note in (("Not A Name", None), ("default", "two\nlines")):
        with pytest.raises(ContractError):
            await activate(settings, deployment, ["builtin:a"], activated_by="ann", note=note)
    assert list(await registry.read(settings)) == []


async def test_a_follower_waits_for_the_topic(kafka: str, topic_prefix: str) -> None:
    """Without the topic a reader that may wait does so, one that may not says what to do."""
    settings = load(kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix)
    with pytest.raises(DependencyError, match="millrace topics apply"):
        await registry.read(settings)
    follower = Follower(settings, client_id="test")
    starting = asyncio.create_task(follower.start())
    await admin.apply_topics(settings, [MODELS])
    try:
        await asyncio.wait_for(starting, 30.0)
        await activate(settings, "default", ["builtin:a"], activated_by="ann")
        await eventually(lambda: follower.registry["default"].revision == 1, 20.0)
    finally:
        await follower.stop()
