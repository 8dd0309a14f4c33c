"""The rights in the manifests are enough and no more: every part works as its own KafkaUser on a guarded broker.

Each part gets exactly the ACLs that the production overlay gives its user, does all of its work for real, and is
refused whatever is not its business.
"""

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline import admin
from pipeline.settings import load
from pipeline.topics import (
    DEAD_LETTERS,
    GPU_ALERTS,
    IMAGES_BULK,
    IMAGES_REALTIME,
    MODELS,
    PREDICTIONS,
    TOPICS,
)
from tests.support import guarded, manifests, services
from tests.support.eventually import eventually
from tests.support.guarded import Guarded, Right
from tests.support.parts import PATIENCE_SECONDS, STEPS, WORK, Scene, begin, do, playing
from tests.support.workers import WorkerProcess

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("guarded broker")]


@pytest.fixture(scope="module")
def users() -> list[manifests.Manifest]:
    return manifests.of_kind(manifests.render(manifests.OVERLAYS / "production"), "KafkaUser")


@pytest.fixture(scope="module")
def broker(users: list[manifests.Manifest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("guarded"), [user["metadata"]["name"] for user in users])
    made.kafka.start()
    settings = load(kafka_bootstrap_servers=made.kafka.bootstrap_servers, topic_partitions=1)
    services.run_apart(admin.apply_topics(settings))
    services.run_apart(made.grant(guarded.rights_of(users)))
    yield made
    made.kafka.stop()


async def test_every_user_does_its_work_with_its_rights(
    broker: Guarded, users: list[manifests.Manifest], database: str, tmp_path: Path
) -> None:
    """All parts work with their ACLs alone, and a step that lacked one goes on as soon as it has it."""
    assert WORK.keys() == {user["metadata"]["name"] for user in users}
    async with playing(broker, database, tmp_path) as scene:
        # One right comes late, as Strimzi's operator may be slower than a pod.
        late = Right("notify", "group", "notify", "literal", "Read")
        await broker.revoke(late)
        started = await asyncio.gather(*(begin(scene, user, f"{user}-1") for user in STEPS))
        notify = started[list(STEPS).index("notify")]
        await eventually(lambda: "GroupAuthorizationFailedError" in notify.log(), PATIENCE_SECONDS)
        await broker.grant([late])
        await asyncio.gather(*(asyncio.to_thread(worker.wait_ready) for worker in started))
        await asyncio.gather(*(do(scene, user, f"{user}-1") for user in STEPS))
        await asyncio.gather(
            *(do(scene, user, f"{user}-1") for user in WORK.keys() - STEPS.keys() - {"operator"})
        )
        await do(scene, "operator", "operator-1")
        ended = await asyncio.gather(*(asyncio.to_thread(worker.terminate) for worker in started))
        assert [code for code, _ in ended] == [0] * len(started)


_REFUSED = re.compile(r"\w*AuthorizationFailed\w*|may not be seen|waiting for topics")
#: Until work counts as failing: long enough for a step to start and to be refused.
IMPATIENCE_SECONDS = 20.0
#: The users behind the names in the topic table.
NAMES = {"predict": "predict-default", "CLI": "operator", "replay": "collect", "simulate": "collect"}
READS_BESIDE = {
    "gateway": {IMAGES_REALTIME.name, IMAGES_BULK.name},
    "operator": {PREDICTIONS.name, DEAD_LETTERS.name, GPU_ALERTS.name},
    "retention": {MODELS.name},
}
WRITES_BESIDE = {"operator": {topic.name for topic in TOPICS} - {DEAD_LETTERS.name}}
ACTIVATES = {"gateway", "operator"}
TOPIC_REFUSED, GROUP_REFUSED = "TopicAuthorizationFailedError", "GroupAuthorizationFailedError"


@pytest.mark.parametrize("user", WORK)
async def test_what_is_not_a_users_business_is_refused(user: str, broker: Guarded) -> None:
    """Nobody writes or reads a topic, a group or a deployment's version that is not its own, or changes a topic."""
    settings = load(**broker.values(user))
    async with guarded.connected(settings) as client:
        for topic in TOPICS:
            writers = {NAMES.get(name, name) for name in topic.producers}
            if user not in writers and topic.name not in WRITES_BESIDE.get(user, set()):
                assert await guarded.write(client, topic.name) == TOPIC_REFUSED, topic.name
            followers = {NAMES.get(name, name) for name in topic.consumers + topic.followers}
            if user not in followers and topic.name not in READS_BESIDE.get(user, set()):
                assert await guarded.read(client, topic.name) == TOPIC_REFUSED, topic.name
            if user != "operator":
                assert await guarded.describe_configs(client, topic.name) == TOPIC_REFUSED, topic.name
            for what, answer in (await guarded.destructive(client, topic.name)).items():
                assert answer.endswith("AuthorizationFailedError"), (topic.name, what, answer)
        groups = {group for _, group, _ in STEPS.values()} | {"predict.other", "somebody"}
        for group in groups - {STEPS.get(user, ("", "", None))[1]}:
            assert await guarded.commit(client, group, IMAGES_BULK.name) == GROUP_REFUSED, group
        if user not in ACTIVATES:
            refused = "TransactionalIdAuthorizationFailed"
            assert await guarded.activate(client, "models.default") == refused


async def test_a_user_without_rights_sees_nothing(broker: Guarded) -> None:
    """The broker of these tests refuses by itself: what it allows comes from the ACLs alone."""
    right = Right("publish", "topic", IMAGES_BULK.name, "literal", "Write")
    async with guarded.connected(load(**broker.values("publish"))) as client:
        assert await guarded.write(client, IMAGES_BULK.name) == "NoError"
        await broker.revoke(right)

        async def refused() -> bool:
            return await guarded.write(client, IMAGES_BULK.name) == TOPIC_REFUSED

        await eventually(refused, 10)
        await broker.grant([right])

        async def allowed() -> bool:
            return await guarded.write(client, IMAGES_BULK.name) == "NoError"

        await eventually(allowed, 10)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not os.environ.get("MILLRACE_TEST_EVERY_RIGHT"),
    reason="takes minutes: `make rights` takes each right away",
)
async def test_no_right_can_be_spared(
    broker: Guarded, users: list[manifests.Manifest], database: str, tmp_path: Path
) -> None:
    """Without any one of its rights a user is refused and some of its work fails, and with it again it goes on."""
    chosen = os.environ["MILLRACE_TEST_EVERY_RIGHT"].split(",")
    rights = [each for each in guarded.rights_of(users) if each.user in chosen or chosen == ["all"]]
    names = list(dict.fromkeys(right.user for right in rights))
    assert chosen == ["all"] or names, f"there are no users {chosen}"
    async with playing(broker, database, tmp_path) as scene:
        # The gateway waits for predictions, and the operator reads what all have written.
        running = {user: await begin(scene, user, f"{user}-0") for user in STEPS}
        await asyncio.gather(*(asyncio.to_thread(worker.wait_ready) for worker in running.values()))
        await asyncio.gather(*(do(scene, user, f"{user}-0") for user in STEPS))
        found: list[Found] = []

        async def take_away(user: str) -> None:
            for number, right in enumerate(each for each in rights if each.user == user):
                found.append(await work_without(scene, right, f"{user}-{number + 1}", running))
                print(found[-1].line(), flush=True)

        await asyncio.gather(*(take_away(user) for user in names if user in STEPS))
        await asyncio.gather(*(take_away(user) for user in names if user not in STEPS))
    for user in names:
        of_user = [each for each in found if each.right.user == user]
        print(f"{user}: {len(of_user)} rights, {sum(each.is_needed for each in of_user)} needed")
    assert [each.line() for each in found if not each.is_needed] == []


@dataclass(frozen=True)
class Found:
    """What came of taking one right away."""

    right: Right
    #: What failed without it; None if nothing did.
    failure: str | None
    #: What shows that it was refused, and not just slow.
    evidence: str | None
    #: What failed with the right given back.
    afterwards: str | None

    @property
    def is_needed(self) -> bool:
        """Whether it is the lack of this right that made something fail."""
        return self.failure is not None and self.evidence is not None and self.afterwards is None

    def line(self) -> str:
        if self.failure is None:
            return f"{self.right}: CAN BE SPARED"
        fault = "" if self.is_needed else " NOT PROVEN:" if self.evidence is None else " NOT MENDED:"
        return f"{self.right}:{fault} {self.failure} | {self.evidence} | {self.afterwards or 'works again'}"


async def work_without(scene: Scene, right: Right, tag: str, running: dict[str, WorkerProcess]) -> Found:
    """Take a right away and do the user's work, give it back and do it again, a step in the same process."""
    user = right.user
    if user in running:
        await asyncio.to_thread(running[user].kill)
    await scene.broker.revoke(right)
    since, impatient = len(scene.seen), replace(scene, patience=IMPATIENCE_SECONDS)
    try:
        if user in running:
            running[user] = await begin(scene, user, tag)
        failure = await failing(impatient, user, tag, since)
        evidence = await refusal(scene, right, failure or "", running.get(user))
    finally:
        await scene.broker.grant([right])
    if user in running and running[user].exit_code is not None:
        running[user] = scene.start(user, tag)
    afterwards = await failing(scene, user, tag, since) if failure else None
    return Found(right, failure, evidence, afterwards)


async def failing(scene: Scene, user: str, tag: str, since: int) -> str | None:
    """Do a user's work; return what failed."""
    try:
        await do(scene, user, tag, since)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return None


async def refusal(scene: Scene, right: Right, failure: str, worker: WorkerProcess | None) -> str | None:
    """Return what shows that it was refused, or None."""
    if scene.broker.denied(right):
        return "the broker's authorizer denied it"
    # Of a question about all topics, or whether any may be written, the authorizer notes nothing.
    said = [failure, *(worker.log().splitlines() if worker else [])]
    told = (match[0] for line in said if (match := _REFUSED.search(line)))
    return next(told, None)
