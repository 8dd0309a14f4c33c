"""`predict` on several devices: real processes of one pod, here all on the CPU."""

import asyncio
import copy
import os
import signal

import pytest

from millrace import ports
from millrace.processes import children_of, is_alive
from pipeline.errors import EXIT_FATAL, ConfigurationError
from pipeline.events import decode_prediction
from pipeline.readers import read_all
from pipeline.registry import Follower
from pipeline.topics import PREDICTIONS
from tests.support.eventually import eventually
from tests.support.spine import Spine
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.timeout(120)


def two_ports() -> int:
    """Return a free port whose next one is free, too."""
    while True:
        port = ports.find_free()
        try:
            ports.require_free("127.0.0.1", port + 1, "")
        except ConfigurationError:
            continue
        return port


def start(spine: Spine) -> tuple[WorkerProcess, WorkerProcess]:
    """Start a pod with two devices; return it as the site of its first and of its second process show it."""
    port = str(two_ports())
    more = {"MILLRACE_DEVICE": "cpu,cpu", "MILLRACE_WORKER_PORT": port, "MILLRACE_REPLICA": "pod"}
    first = spine.crew.start("-m", "agents", "predict", **more)
    second = copy.copy(first)
    second.port += 1
    return first, second


def predicted(process: WorkerProcess) -> float:
    return process.metric("millrace_records_finished_total", step="predict", outcome="predicted")


async def test_a_process_for_each_device(spine: Spine) -> None:
    """Both are members and work; SIGTERM drains both: what they predicted is committed, and nothing else is."""
    pod, other = start(spine)
    await asyncio.gather(*(asyncio.to_thread(one.wait_ready) for one in (pod, other)))
    async with Follower(spine.settings, client_id="test") as follower:
        names = {"pod-0", "pod-1"}
        assert await follower.wait_until(lambda known: known["default"].replicas.keys() == names, 20)

    def shared() -> bool:
        held = [one.metric("millrace_assigned_partitions", step="predict") for one in (pod, other)]
        return held == [4, 4]  # of two lanes

    await eventually(shared, 30)
    await spine.send_many("first", 40)
    await eventually(lambda: predicted(pod) + predicted(other) == 40, 30)
    assert min(predicted(pod), predicted(other)) > 0

    await spine.send_many("drained", 200)
    await eventually(lambda: predicted(pod) + predicted(other) > 60, 30)
    await spine.stop(pod)
    records = await read_all(spine.settings, spine.settings.topic(PREDICTIONS.name))
    found = [decode_prediction(record).image_id for record in records]
    assert len(set(found)) == len(found)
    assert set(found) <= set(spine.journal.places)
    assert await spine.lag("predict") == len(spine.journal) - len(found)


async def test_a_killed_process_ends_the_pod(spine: Spine) -> None:
    """SIGKILL of one process ends the other and the pod, with the code that asks for another start."""
    pod, _ = start(spine)
    await eventually(lambda: len(children_of(pod.pid)) == 2, 30)
    children = children_of(pod.pid)
    os.kill(children[0], signal.SIGKILL)
    await asyncio.to_thread(pod.wait, 30)
    assert pod.exit_code == EXIT_FATAL
    assert not any(map(is_alive, children))
