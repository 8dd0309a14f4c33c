"""How the process that starts one for each device ends with them; real processes, without Kafka."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.processes import children_of, is_alive
from pipeline.errors import EXIT_CONFIGURATION, EXIT_FATAL
from tests.support.eventually import eventually_sync

ROOT = Path(__file__).parents[2]
# What a process of a device does in place of a step, by the number of its device.
PARENT = """
import os, signal, sys, time
from agents.devices import run_each
from pipeline.settings import load

def run(settings):
    said = settings.device
    if said == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif said == "polite":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.stdout.write(f"I am {said}\\n")
    sys.stdout.flush()
    if said.isdigit():
        return int(said)
    time.sleep(600)

names, grace = sys.argv[1].split(","), float(sys.argv[2])
sys.exit(run_each([load(device=name, shutdown_grace_seconds=grace) for name in names], run))
"""


class Parent:
    """A process with one for each of some devices, which behave as their names say."""

    def __init__(self, names: str, grace_seconds: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, names, str(grace_seconds)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.children: list[int] = []

    def wait_begun(self) -> None:
        """Return when both processes have said what they are."""
        assert self.process.stdout is not None
        said = 0
        while said < 2:
            line = self.process.stdout.readline()
            assert line, "it has ended"
            said += line.count("I am ")  # behind something else, where lines of several processes mix
        self.children = children_of(self.process.pid)
        assert len(self.children) == 2

    def ended(self) -> int:
        """Wait until it has ended by itself; none that had begun may be left."""
        code = self.process.wait(30)
        eventually_sync(lambda: not any(map(is_alive, self.children)), 10)
        return code


@pytest.fixture
def parents() -> Iterator[list[Parent]]:
    started: list[Parent] = []
    yield started
    for parent in started:
        parent.process.kill()
        parent.process.communicate()


def test_a_signal_ends_all_in_good_order(parents: list[Parent]) -> None:
    """SIGTERM and SIGINT are passed on, and the code is 0 when all have drained."""
    parents += [Parent("polite,polite") for _ in range(2)]
    for parent, number in zip(parents, (signal.SIGTERM, signal.SIGINT), strict=True):
        parent.wait_begun()
        parent.process.send_signal(number)
    assert [parent.ended() for parent in parents] == [0, 0]


def test_one_that_ends_takes_the_others_with_it(parents: list[Parent]) -> None:
    """Whatever ends a process, the others get SIGTERM; the code says whether starting again may help."""
    parents += [Parent("polite,78"), Parent("0,polite"), Parent("polite,polite")]
    parents[-1].wait_begun()
    os.kill(parents[-1].children[0], signal.SIGKILL)
    codes = [parent.ended() for parent in parents]
    assert codes == [EXIT_CONFIGURATION, EXIT_FATAL, EXIT_FATAL]


def test_none_outlives_the_parent_or_the_grace_period(parents: list[Parent]) -> None:
    """A parent that is killed takes all with it; one that does not drain is killed when the time is over."""
    killed, stuck = Parent("deaf,deaf"), Parent("deaf,polite", grace_seconds=0.2)
    parents += [killed, stuck]
    for parent in parents:
        parent.wait_begun()
    killed.process.kill()
    stuck.process.terminate()
    assert [killed.ended(), stuck.ended()] == [-signal.SIGKILL, EXIT_FATAL]
