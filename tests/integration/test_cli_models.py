"""`millrace models` as a process, on a real broker, database and object store."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import admin, artefacts, deployments, registry
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.deployments import Desired, Refusal, Status
from pipeline.objects import ObjectStore
from pipeline.settings import PREFIX, Settings, load
from pipeline.topics import MODELS
from tests.support.eventually import eventually

Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def environment(kafka: str, database: str, topic_prefix: str, tmp_path: Path) -> dict[str, str]:
    return {
        "kafka_bootstrap_servers": kafka,
        "database_url": database,
        "object_store_url": str(tmp_path / "objects"),
        "topic_prefix": topic_prefix,
    }


@pytest.fixture
async def settings(environment: dict[str, str]) -> Settings:
    settings = load(**environment)
    await admin.apply_topics(settings, [MODELS])
    return settings


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Command:
    """Start `millrace models ARGUMENTS`."""
    variables = {f"{PREFIX}{name.upper()}": value for name, value in environment.items()}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def command(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "millrace", "models", *arguments], env=os.environ | variables | paths,
            cwd=tmp_path, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return command


async def ran(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(process.communicate, timeout=60)
    return process.returncode, out, err


async def report(settings: Settings, replica: str, **values: object) -> None:
    """Stand in for a replica of `wildlife`."""
    status = Status(**{"deployment": "wildlife", "replica": replica, "time": datetime.now(UTC)} | values)  # type: ignore[arg-type]
    publisher = Publisher(settings, client_id="test")
    await publisher.start(wait=False)
    await publisher.publish(settings.topic(MODELS.name), deployments.encode(status))
    await publisher.stop()


async def test_activating_waits_for_the_replicas(settings: Settings, start: Command) -> None:
    """It ends with 0 when every replica runs the version, with 1 and the reason when one refused it."""
    for replica in ("r-0", "r-1"):
        await report(settings, replica, revision=0)
    for revision, refusal, code in ((1, None, 0), (2, "out of memory", 1)):
        process = start("activate", "wildlife", f"builtin:{revision}", "--note", "a try", "--wait", "40")

        async def is_activated(wanted: int = revision) -> bool:
            return (await registry.read(settings))["wildlife"].revision == wanted

        await eventually(is_activated, 40.0)
        await report(settings, "r-0", revision=revision)
        await asyncio.sleep(1.0)
        assert process.poll() is None, "it does not wait for the second replica"
        if refusal is None:
            await report(settings, "r-1", revision=revision)
        else:
            await report(settings, "r-1", revision=1, refused=Refusal(revision, refusal, datetime.now(UTC)))
        ended, _, err = await ran(process)
        assert ended == code, err
        assert f"activated revision {revision} of wildlife" in err
    assert "r-1 refused it and runs revision 1: out of memory" in err
    code, out, _ = await ran(start("list"))
    assert code == 0
    rows = [line.split() for line in out.splitlines() if "r-" in line]
    assert [row[:4] for row in rows] == [
        ["wildlife", "r-0", "runs", "2"],
        ["wildlife", "r-1", "refused", "1"],
    ]
    code, out, _ = await ran(start("list", "--deployment", "wildlife", "--json"))
    assert [replica["state"] for replica in json.loads(out)["replicas"]] == ["runs", "refused"]


async def test_what_activating_refuses(settings: Settings, start: Command) -> None:
    """What is no specification, another revision than expected, a file that is not here: nothing is published."""
    assert (await ran(start("activate", "wildlife", "nothing")))[0] == 2
    code, _, err = await ran(start("activate", "wildlife", "builtin:a", "--expect", "3", "--no-wait"))
    assert code == 1
    assert "is at revision 0, not 3" in err
    code, _, err = await ran(start("activate", "wildlife", "file:gone.safetensors#timm:x", "--no-wait"))
    assert (code, "there is no such file on this machine" in err) == (2, True)
    assert (await ran(start("list", "--deployment", "wildlife")))[0] == 1
    assert list(await registry.read(settings)) == []


async def test_a_file_goes_by_way_of_the_object_store(
    settings: Settings, start: Command, tmp_path: Path
) -> None:
    """Weights on this machine are in the object store under their digest, and named the same for every replica."""
    (tmp_path / "otters.safetensors").write_bytes(b"weights")
    (tmp_path / "otters.safetensors.json").write_text("[]")
    code, out, _ = await ran(
        start("activate", "wildlife", "file:otters.safetensors#torchvision:resnet18", "--no-wait", "--json")
    )
    assert code == 0
    version = json.loads(out)["desired"]["version"]
    assert version["models"] == ["file:otters.safetensors#torchvision:resnet18"]
    assert {file["name"] for file in version["artefacts"]} == {
        "otters.safetensors",
        "otters.safetensors.json",
    }
    running = (await registry.read(settings))["wildlife"]
    assert running.desired is not None
    folder = await artefacts.fetch(
        ObjectStore.open(settings), running.desired.version.artefacts, tmp_path / "cache"
    )
    assert (folder / "otters.safetensors").read_bytes() == b"weights"


async def test_the_history_is_shown(settings: Settings, start: Command) -> None:
    """`models history` says what was activated, by whom, and what came of it; 1 if there is nothing."""
    assert (await ran(start("history", "wildlife")))[0] == 1
    made: Desired = await registry.activate(
        settings, "wildlife", ["builtin:a"], activated_by="ann", note="first"
    )
    status = Status(
        deployment="wildlife", replica="r-0", time=datetime.now(UTC), revision=0,
        refused=Refusal(1, "out of memory", datetime.now(UTC)),
    )  # fmt: skip
    database = await Database.open(settings)
    await database.save_models([made, status])
    await database.close()
    code, out, _ = await ran(start("history", "wildlife"))
    assert code == 0
    assert "ann  builtin:a  1 replica refused it: out of memory  first" in " ".join(out.split("\n"))
    code, out, _ = await ran(start("history", "wildlife", "--json"))
    assert (json.loads(out)["revision"], json.loads(out)["note"]) == (1, "first")
