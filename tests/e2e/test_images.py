"""The images of the Dockerfile, built and run for real against Kafka and PostgreSQL; skipped without Docker."""

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, pictures, services
from tests.support.eventually import eventually_sync
from tests.support.images import Containers, Running
from tests.support.spine import environment
from tests.support.workers import workers

# The first build of `worker` fetches and unpacks gigabytes.
pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

KEY = "a-key-for-tests"
GRACE_SECONDS = 15
NO_TOOLS = """
import importlib.util, shutil, sys
found = [name for name in ("pip", "uv", "gcc", "cc", "make", "ld") if shutil.which(name)]
found += [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) and sys.argv[1] == "strict"]
sys.exit(", ".join(found) or 0)
"""
WHERE_IT_WRITES = """
import os, pathlib
refused = []
for folder in ("/", "/opt/millrace", "/etc", "/usr/bin", "/var/lib"):
    try:
        pathlib.Path(folder, "x").touch()
    except OSError:
        refused.append(folder)
for folder in ("/tmp", "/var/lib/millrace"):
    pathlib.Path(folder, "x").touch()
print(os.getuid(), os.getgid(), *refused)
"""


# Of the widest scope and automatic, so that a skip comes before the services are started.
@pytest.fixture(scope="session", autouse=True)
def built() -> dict[str, str]:
    """Names of the images that this run builds, by target."""
    if (reason := images.reason_without()) is not None:
        pytest.skip(reason)
    return {target: images.build(target) for target in images.wanted()}


@pytest.fixture
def empty_database(postgres: str) -> Iterator[str]:
    """URL of a database without tables."""
    name = f"test_{secrets.token_hex(6)}"
    services.run_apart(services.execute(postgres, f"CREATE DATABASE {name}"))
    yield images.with_password(services.with_database(postgres, name))
    services.run_apart(services.execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def crew(kafka: str, empty_database: str, topic_prefix: str, tmp_path: Path) -> Iterator[Containers]:
    """Containers of an installation of the test's own."""
    settings = environment(kafka, empty_database, f"{images.DATA}/objects", topic_prefix)
    more = {
        "MILLRACE_API_KEYS_FILE": "/etc/millrace/api-keys",
        "MILLRACE_GATEWAY_HOST": "0.0.0.0",
        "MILLRACE_SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS),
    }
    with images.containers(settings | more, tmp_path) as made:
        yield made


def ask(gateway: Running, method: str, path: str, body: bytes | None = None) -> Any:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/octet-stream"}
    url = f"http://127.0.0.1:{gateway.port}{path}"
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()}") from None


def run_once(crew: Containers, image: str, *command: str) -> str:
    container = crew.start(image, command)
    assert container.wait() == 0, container.log()
    return container.log()


def test_pictures_go_through_the_images(built: dict[str, str], crew: Containers, tmp_path: Path) -> None:
    """Pictures uploaded to the gateway are predicted and stored, and SIGTERM ends each container with 0."""
    steps = built["steps"]
    run_once(crew, steps, "millrace", "topics", "apply")
    run_once(crew, steps, "millrace", "migrate")
    gateway = crew.start(built["gateway"], None)
    running = [crew.start(steps, ["python", "-m", "agents", step]) for step in ("store", "archive", "record")]
    # One deployment for each image with torch; without those a process outside predicts.
    deployments: list[str] = [target for target in ("worker-cpu", "worker") if target in built]
    running += [crew.start(built[target], None, MILLRACE_DEPLOYMENT=target) for target in deployments]
    if "worker-cpu" in built:
        running.append(crew.start(built["worker-cpu"], ["python", "-m", "agents", "watch"]))
    # The second is too large for a record: it goes through the volume that the containers share.
    sent = [pictures.jpeg(1), pictures.incompressible(1_200_000), pictures.jpeg(3)]
    own = {
        "MILLRACE_DEPLOYMENT": "outside",
        "MILLRACE_API_KEYS_FILE": "",
        "MILLRACE_GATEWAY_HOST": "127.0.0.1",
    }
    with workers({**crew.environment, **own}, tmp_path) as outside:
        if not deployments:
            del sent[1]
            outside.start("-m", "agents", "predict").wait_ready()
        for container in (gateway, *running):
            container.wait_ready()
        ids = [ask(gateway, "POST", "/v1/images", picture)["id"] for picture in sent]

        def stored() -> bool:
            for image_id in ids:
                found = ask(gateway, "GET", f"/v1/images/{image_id}/predictions")["predictions"]
                assert {each["deployment"] for each in found} == set(deployments or ["outside"])
                assert {each["outcome"] for each in found} == {"predicted"}
            return True

        eventually_sync(stored, 120)
    assert "images.bulk.v1" in run_once(crew, steps, "millrace", "lag", "--total")
    run_once(crew, steps, "millrace", "retention", "--dry-run")
    ended = {
        container.raw.attrs["Config"]["Image"]: container.terminate(GRACE_SECONDS) for container in running
    }
    assert set(ended.values()) == {0}, ended
    assert gateway.terminate(GRACE_SECONDS) == 0


@pytest.mark.parametrize("target", images.TARGETS)
def test_an_image_has_no_rights_and_no_tools(built: dict[str, str], crew: Containers, target: str) -> None:
    """A container runs as a user by number, writes only where it must, has no build tools, and says what it is."""
    if target not in built:
        pytest.skip(f"{target} is built by `make images`")
    container = crew.start(built[target], ["sleep", "600"])
    code, printed = container.run("python", "-c", WHERE_IT_WRITES)
    assert (code, printed.split()) == (
        0,
        ["10001", "10001", "/", "/opt/millrace", "/etc", "/usr/bin", "/var/lib"],
    )
    code, printed = container.run(
        "python", "-c", NO_TOOLS, "lenient" if target.startswith("worker") else "strict"
    )
    assert code == 0, printed
    image = container.raw.image
    assert image.labels["org.opencontainers.image.title"] == f"millrace/{target}"
    print(f"{target}: {image.attrs['Size'] / 1e6:,.0f} MB")


def test_a_container_that_starts_can_be_stopped(built: dict[str, str], crew: Containers) -> None:
    """SIGTERM ends the first process of a container while it waits for Kafka, and a command that runs for ever."""
    away = {"MILLRACE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    waiting = crew.start(built["steps"], ["python", "-m", "agents", "store"], **away)
    eventually_sync(lambda: "waiting for" in waiting.log(), 60)
    assert waiting.terminate(GRACE_SECONDS) == 0
    run_once(crew, built["steps"], "millrace", "topics", "apply")
    watching = crew.start(built["steps"], ["millrace", "lag", "--watch", "--total"])
    eventually_sync(lambda: "images.bulk.v1" in watching.log(), 60)
    assert watching.terminate(GRACE_SECONDS) == 130


def test_wrong_settings_are_one_line(built: dict[str, str], crew: Containers) -> None:
    """A gateway without keys, a node without GPUs: an exit code and one line that says why, no traceback."""
    without_keys = crew.start(built["gateway"], None, MILLRACE_API_KEYS_FILE="")
    assert without_keys.wait() == 78
    assert "MILLRACE_API_KEYS_FILE" in without_keys.log()
    without_gpus = crew.start(built["steps"], ["millrace", "collect", "--once"])
    assert without_gpus.wait() in {69, 78}
    for container in (without_keys, without_gpus):
        assert "Traceback" not in container.log()
        assert len(container.log().strip().splitlines()) == 1
