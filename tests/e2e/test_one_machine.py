"""`millrace up` as a user runs it: the whole stack as one command, twice on the same data, and stopped."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def up(environment: dict[str, str], folder: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the command until the block ends; what it prints goes to files named as the streams."""
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "millrace", "up", *arguments],
            env=environment,
            stdout=out,
            stderr=messages,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def printed(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines that the command has printed so far."""
    whole, _, _ = (folder / "stdout").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def firing(lines: list[dict[str, Any]]) -> set[str]:
    """Return the GPUs that alerts fire for."""
    return {line["gpu_uuid"] for line in lines if line.get("state") == "firing"}


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


def test_everything_on_one_machine(environment: dict[str, str], tmp_path: Path) -> None:
    """All samples and the alert come as expected, twice; data stay, Ctrl-C ends with 0, and no process is left."""
    with up(environment, tmp_path, "--once", "--samples", "12", "--json") as once:
        once.wait(timeout=180)
    messages = (tmp_path / "stderr").read_text()
    assert once.returncode == 0, messages
    results = [line for line in printed(tmp_path) if "image_id" in line]
    assert len(results) == 12
    assert "12 of 12 samples" in messages
    (hot,) = firing(printed(tmp_path))

    # Again on the same data, and to stay.
    with up(environment, tmp_path, "--samples", "12", "--json", "--replicas", "predict=2") as serving:

        def is_through() -> bool:
            assert serving.poll() is None, (tmp_path / "stderr").read_text()
            lines = printed(tmp_path)
            # A second alert of the run before may come only now: the first one ended that run.
            return (
                len([line for line in lines if "image_id" in line]) == 12
                and "12 of 12 samples" in (tmp_path / "stderr").read_text()
                and len(firing(lines) - {hot}) == 1
            )

        eventually_sync(is_through, 180)
        gateway = f"http://127.0.0.1:{environment['MILLRACE_GATEWAY_PORT']}"
        with urllib.request.urlopen(f"{gateway}/readyz", timeout=5) as answer:
            assert answer.status == 200
        first = results[0]["image_id"]
        with urllib.request.urlopen(f"{gateway}/v1/images/{first}", timeout=5) as answer:
            assert json.load(answer)["state"] == "predicted"
        children = children_of(serving.pid)
        # Kafka, PostgreSQL, the gateway, two of predict, store, archive, watch, record, notify.
        assert len(children) >= 10
        serving.send_signal(signal.SIGINT)
        serving.wait(timeout=60)
    assert serving.returncode == 0
    eventually_sync(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)
