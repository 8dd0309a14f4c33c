"""`millrace up` as a user runs it: the whole stack as one command, twice on the same data, and stopped."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from millrace import ports
from tests.support.eventually import eventually_sync

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A data folder and ports of the test's own."""
    names = ("KAFKA_PORT", "KAFKA_CONTROLLER_PORT", "POSTGRES_PORT", "GATEWAY_PORT")
    return {
        **os.environ,
        "MILLRACE_DATA_DIR": str(tmp_path / "data"),
        **{f"MILLRACE_{name}": str(ports.find_free()) for name in names},
    }


def up(environment: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "millrace", "up", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    """Return the processes that have this parent."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(folder.name))
            except (OSError, ValueError):
                continue
    return found


def test_everything_on_one_machine(environment: dict[str, str]) -> None:
    """All samples and the alert come as expected, twice; data stay, Ctrl-C ends with 0, and no process is left."""
    hot: set[str] = set()
    for _ in range(2):
        once = up(environment, "--once", "--samples", "12", "--json")
        out, messages = once.communicate(timeout=180)
        assert once.returncode == 0, messages
        lines = [json.loads(line) for line in out.splitlines()]
        results = [line for line in lines if "image_id" in line]
        assert len(results) == 12
        assert "12 of 12 samples" in messages
        firing = {line["gpu_uuid"] for line in lines if line.get("state") == "firing"}
        # A second alert of the run before may come only now: the first one ended that run.
        assert len(firing - hot) == 1
        hot |= firing

    serving = up(environment, "--samples", "1", "--replicas", "predict=2", "--no-fleet")
    gateway = f"http://127.0.0.1:{environment['MILLRACE_GATEWAY_PORT']}"
    try:
        assert serving.stdout is not None

        def is_ready() -> bool:
            assert serving.poll() is None
            try:
                with urllib.request.urlopen(f"{gateway}/readyz", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        eventually_sync(is_ready, 90)
        first = results[0]["image_id"]
        with urllib.request.urlopen(f"{gateway}/v1/images/{first}", timeout=5) as answer:
            assert json.load(answer)["state"] == "predicted"
        children = children_of(serving.pid)
        # Kafka, PostgreSQL, the gateway, two of predict, store, archive; watch, record and notify come later.
        assert len(children) >= 7
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)
    finally:
        if serving.poll() is None:
            serving.kill()
    assert serving.returncode == 0
    eventually_sync(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)
