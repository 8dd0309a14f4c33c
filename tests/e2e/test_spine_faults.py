"""Processes of the spine killed, stopped and joined mid-batch, with the real engine and the built-in models.

All tests share one `store` and one `archive`; each starts the `predict` workers it needs.
"""

import asyncio
import signal

import pytest

from tests.support.eventually import eventually
from tests.support.spine import Spine, under_load

STEPS = ("store", "archive")
ENVIRONMENT = {"MILLRACE_MAX_BATCH_SIZE": "8"}

pytestmark = pytest.mark.timeout(240)


async def work(spine: Spine, prefix: str, count: int = 120) -> None:
    """Publish a backlog and return when the workers are in the middle of it."""
    before = len(spine.journal)
    await spine.send_many(prefix, count)
    await spine.wait_stored(before + count // 6)


async def test_sigkill_of_predict(shared_spine: Spine) -> None:
    """SIGKILL of three `predict` workers mid-batch, with others going on, loses nothing and shows nothing twice."""
    replicas = await shared_spine.start("predict", "predict", "predict")
    for number, victim in enumerate(list(replicas)):
        await work(shared_spine, f"kill-{number}")
        victim.kill()
        if number == 0:
            replicas += await shared_spine.start("predict")
    # What a kill repeats: the batches in flight, and what was finished since the last commit.
    accounting = await shared_spine.settled(max_repeated=3 * 60)
    assert accounting.sent == 360


async def test_sigterm_in_the_middle_of_a_join(shared_spine: Spine) -> None:
    """SIGTERM while the group hands partitions to a new member ends a worker in time and repeats nothing."""
    (first,) = await shared_spine.start("predict")
    # Ready as soon as it has its partitions; the first one is still being told of those that it keeps.
    (second,) = await shared_spine.start("predict")
    await shared_spine.stop(first)
    await work(shared_spine, "handed-over", 40)
    await shared_spine.settled(max_repeated=0)
    assert second.exit_code is None


async def test_sigterm_and_join_of_predict(shared_spine: Spine) -> None:
    """A `predict` worker that joins, and one that gets SIGTERM mid-batch, repeat nothing."""
    (first,) = await shared_spine.start("predict")
    async with under_load(shared_spine, "join", rate_per_second=25):
        await work(shared_spine, "join-backlog")
        (second,) = await shared_spine.start("predict")
        await work(shared_spine, "leave-backlog")
        await shared_spine.stop(first)
        await work(shared_spine, "after-backlog")
    assert second.exit_code is None
    accounting = await shared_spine.settled(max_repeated=0)
    assert accounting.sent >= 360


async def test_workers_that_are_frozen(shared_spine: Spine) -> None:
    """Workers frozen for longer than the session timeout, mid-batch, come back as members; nothing is lost."""
    frozen, other = await shared_spine.start("predict", "predict")
    (store,) = shared_spine.running("store")
    await work(shared_spine, "frozen")
    for worker in (frozen, store):
        worker.send(signal.SIGSTOP)
    await asyncio.sleep(shared_spine.settings.session_timeout_seconds + 2)
    for worker in (frozen, store):
        worker.send(signal.SIGCONT)
    await work(shared_spine, "thawed")
    # What a frozen worker had not committed is done by its successor too, and what it fetched when it came back
    # before it heard that it is no member any more: of both backlogs its share, half of them or a few more.
    await shared_spine.settled(max_repeated=150)

    def are_ready() -> bool:
        return all(worker.get("/readyz")[0] == 200 for worker in (frozen, other, store))

    await eventually(are_ready, 60)
    assert frozen.metric("millrace_assigned_partitions") > 0


async def test_sigkill_of_store_and_archive(shared_spine: Spine) -> None:
    """SIGKILL of `store` and `archive` mid-batch loses no result and no picture, and shows nothing twice."""
    await shared_spine.start("predict")
    async with under_load(shared_spine, "write", rate_per_second=25):
        for number, step in enumerate(("store", "archive", "store")):
            await work(shared_spine, f"write-{number}", 60)
            (victim,) = shared_spine.running(step)
            victim.kill()
            await shared_spine.start(step)
    await shared_spine.settled(max_repeated=0)
    await shared_spine.check_pictures()
