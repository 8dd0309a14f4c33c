"""Images built from the Dockerfile, and their containers on the host's network; everything here needs Docker.

`MILLRACE_TEST_IMAGES` names the targets to build (`all` for every one); without it they are the small ones, and
none in CI. `MILLRACE_TEST_BASE_IMAGE`, `MILLRACE_TEST_BUILD_IMAGE` and the files `MILLRACE_TEST_PIP_CONF` and
`MILLRACE_TEST_CA` say how to build where neither a registry nor PyPI is reached directly.
"""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from millrace import ports
from tests.support.eventually import eventually_sync

ROOT = Path(__file__).parents[2]
TARGETS = ("gateway", "steps", "worker-cpu", "worker")
SMALL = ("gateway", "steps")
BASE_IMAGE = os.environ.get("MILLRACE_TEST_BASE_IMAGE", "python:3.11-slim")
DATA = "/var/lib/millrace"
_TAG = "test"
_LOG_BYTES = 4000


def wanted() -> tuple[str, ...]:
    """Return the targets that this run builds."""
    named = os.environ.get("MILLRACE_TEST_IMAGES", "")
    if not named:
        return () if os.environ.get("CI") else SMALL
    return TARGETS if named == "all" else tuple(named.split(","))


def reason_without() -> str | None:
    """Say why no image can be built here, or None."""
    if not wanted():
        return "images are built by `make images`, not in CI"
    docker = shutil.which("docker")
    if docker is None:
        return "there is no docker command"
    if subprocess.run([docker, "version"], capture_output=True).returncode != 0:
        return "no Docker engine answers"
    known = subprocess.run([docker, "image", "inspect", BASE_IMAGE], capture_output=True)
    if known.returncode != 0 and subprocess.run([docker, "pull", BASE_IMAGE], capture_output=True).returncode:
        return f"{BASE_IMAGE} is neither here nor in a registry (MILLRACE_TEST_BASE_IMAGE names another)"
    return None


def build(target: str) -> str:
    """Build a target and return the image's name; fast when nothing has changed."""
    name = f"millrace/{target}:{_TAG}"
    build_image = os.environ.get("MILLRACE_TEST_BUILD_IMAGE", BASE_IMAGE)
    command = ["docker", "build", "--network", "host", "--target", target, "--tag", name]
    command += ["--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "--build-arg", f"BUILD_IMAGE={build_image}"]
    for secret in ("pip_conf", "ca"):
        if path := os.environ.get(f"MILLRACE_TEST_{secret.upper()}"):
            command += ["--secret", f"id={secret.removesuffix('_conf')},src={path}"]
    built = subprocess.run(
        [*command, str(ROOT)], env={**os.environ, "DOCKER_BUILDKIT": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-_LOG_BYTES:]
    return name


def with_password(dsn: str) -> str:
    """Return a database's URL without a file of passwords, which a container does not have."""
    parts = urlsplit(dsn)
    files = parse_qs(parts.query).get("passfile")
    if not files:
        return dsn
    password = Path(files[0]).read_text().strip().rpartition(":")[2]
    return parts._replace(
        netloc=f"{parts.username}:{password}@{parts.hostname}:{parts.port}", query=""
    ).geturl()


@dataclass
class Running:
    """A container of ours; `raw` is docker-py's."""

    raw: Any
    port: int

    def log(self) -> str:
        return str(self.raw.logs().decode(errors="replace"))

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command in the container; return its exit code and what it printed."""
        done = self.raw.exec_run(list(command))
        return done.exit_code, done.output.decode(errors="replace")

    def wait_ready(self, timeout_seconds: float = 120) -> "Running":
        def ready() -> bool:
            self.raw.reload()
            assert self.raw.status == "running", f"{self.raw.status}:\n{self.log()[-_LOG_BYTES:]}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                return False

        eventually_sync(ready, timeout_seconds)
        return self

    def wait(self) -> int:
        """Return the exit code once it has ended by itself."""
        return int(self.raw.wait(timeout=120)["StatusCode"])

    def terminate(self, grace_seconds: int) -> int:
        """SIGTERM, and SIGKILL after the grace period as Docker does it (137); return the exit code."""
        self.raw.stop(timeout=grace_seconds)
        return self.wait()


@dataclass
class Containers:
    """The containers of one test, all with the same settings and one data volume, none with any right."""

    environment: Mapping[str, str]
    volume: str
    keys: Path
    started: list[Any] = field(default_factory=list)

    def start(self, image: str, command: Sequence[str] | None, **more: str) -> Running:
        """Start the image's own command, or another, as a pod with restricted rights would run."""
        from testcontainers.core.container import DockerContainer

        port = ports.find_free()
        which = "MILLRACE_GATEWAY_PORT" if "gateway" in image else "MILLRACE_WORKER_PORT"
        container = DockerContainer(
            image,
            env={**self.environment, which: str(port), **more},
            volumes=[(self.volume, DATA, "rw"), (str(self.keys), "/etc/millrace/api-keys", "ro")],
            network_mode="host",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
        )
        container.with_tmpfs_mount("/tmp")
        if command is not None:
            container.with_command(list(command))
        self.started.append(container)
        container.start()
        return Running(container.get_wrapped_container(), port)


@contextmanager
def containers(environment: Mapping[str, str], folder: Path) -> Iterator[Containers]:
    """Give a test its containers; they and their volume go with it, and their logs are printed on failure."""
    import docker  # type: ignore[import-untyped]
    from testcontainers.core.config import testcontainers_config

    # What cleans up after a killed test run is an image of its own, which not every machine can fetch.
    testcontainers_config.ryuk_disabled = True
    keys = folder / "api-keys"
    keys.write_text("a-key-for-tests\n")
    keys.chmod(0o644)
    client = docker.from_env()
    volume = client.volumes.create()
    made = Containers(environment, volume.name, keys)
    try:
        yield made
    except BaseException:
        for container in made.started:
            stdout, stderr = container.get_logs()
            print(f"== {container.image}\n{(stdout + stderr).decode(errors='replace')[-_LOG_BYTES:]}")
        raise
    finally:
        for container in made.started:
            container.stop()
        volume.remove()
        client.close()
