"""Dockerfile, docker-compose.yml and manifests agree with the code; nothing here needs Docker."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from millrace import cli, parts
from millrace.kafka import EmbeddedKafka
from pipeline.settings import PREFIX, Settings, load
from tests.unit.test_docs import commands as commands_of

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
USER = "10001:10001"
#: What runs in which image; `millrace` stands for what operators and the cluster run of it.
RUNS = {
    "gateway": {"gateway"},
    "steps": {"store", "archive", "record", "notify", "millrace"},
    "worker": {"predict", "watch"},
    "worker-cpu": {"predict", "watch"},
}
MODULES = {
    "gateway": ["gateway.__main__", "gateway.server", "gateway.app"],
    "steps": [
        *("agents.app", "agents.store", "agents.archive", "agents.record", "agents.notify"),
        *(
            "millrace.cli",
            "millrace.operations",
            "millrace.collect",
            "millrace.models",
            "millrace.deadletters",
        ),
        *("millrace.alerts", "millrace.gpus", "millrace.replay", "pynvml"),
    ],
    "worker": [
        *("agents.app", "agents.predict", "agents.watch", "pipeline.models.timm_source"),
        *("pipeline.models.torchvision_source", "pipeline.models.hf_source", "pipeline.models.file_source"),
    ],
}
_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")


def read_dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage, the first of which is its FROM."""
    text = re.sub(r"\\\n(\s*#.*\n)*", " ", (ROOT / "Dockerfile").read_text())
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = [("FROM", base)]
        else:
            stages[name].append((instruction, rest.strip()))
    return stages


STAGES = read_dockerfile()


def instructions(target: str, wanted: str) -> list[str]:
    """Return what a stage and those it is made from say with one instruction, in order."""
    base = STAGES[target][0][1]
    inherited = instructions(base, wanted) if base in STAGES else []
    return inherited + [rest for instruction, rest in STAGES[target] if instruction == wanted]


def environment_of(target: str) -> dict[str, str]:
    """Return the settings that an image has of its own."""
    words = [word for text in instructions(target, "ENV") for word in shlex.split(text)]
    pairs = dict(word.split("=", 1) for word in words)
    return {name: value for name, value in pairs.items() if name.startswith(PREFIX)}


def default(text: object) -> str:
    """Return a value of docker-compose.yml as it is without variables."""
    return _VARIABLE.sub(r"\1", str(text))


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environment.items():
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields, name
        monkeypatch.setenv(name, default(value))
    return load()


def what_runs(command: list[str]) -> str:
    """Return the step, or the program, that a command runs; it must be one that there is."""
    if command[:3] == ["python", "-m", "agents"]:
        return command[3]
    if command == ["python", "-m", "gateway"]:
        return "gateway"
    assert command[0] == "millrace", command
    words = " ".join(command)
    known = commands_of(typer.main.get_command(cli.app))
    assert any(words == name or words.startswith(f"{name} ") for name in known), words
    return "millrace"


@pytest.mark.parametrize("target", RUNS)
def test_images_need_no_rights(target: str) -> None:
    """Each image runs as a user by number, has its command in exec form, and builds nothing on its last stage."""
    assert instructions(target, "USER") == [USER]
    (command,) = instructions(target, "CMD")
    assert isinstance(json.loads(command), list)
    own = [instruction for instruction, _ in STAGES[target]]
    assert set(own) <= {"FROM", "LABEL", "ENV", "COPY", "EXPOSE", "CMD"}
    labels = " ".join(instructions(target, "LABEL"))
    for name in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels


@pytest.mark.parametrize("target", RUNS)
def test_images_have_settings_that_there_are(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an image sets is a setting, and the port it exposes is the one its processes listen on."""
    settings = settings_of(environment_of(target), monkeypatch)
    port = settings.gateway_port if target == "gateway" else settings.worker_port
    assert instructions(target, "EXPOSE") == [str(port)]
    assert settings.worker_host == "0.0.0.0"
    written = [text for text in instructions(target, "RUN") if str(settings.data_dir) in text]
    assert written, "the data folder is not made"


def test_dockerfile_copies_what_is_there() -> None:
    """Each file that is copied exists and is sent to the builder; no address of a registry is written down."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in STAGES.values():
        for instruction, rest in stage:
            if instruction == "COPY" and "--from=" not in rest:
                for source in rest.split()[:-1]:
                    assert list(ROOT.glob(source)), source
                    assert source.split("/")[0] in sent, source
    assert "://" not in (ROOT / "Dockerfile").read_text()
    installs = re.findall(
        r"pip --python \S+ install[^\n]*(?:\n +\S[^\n]*)*", (ROOT / "Dockerfile").read_text()
    )
    assert len(installs) == len(MODULES) + 3
    assert all("--require-hashes" in line or "--no-index --no-deps" in line for line in installs)


def test_the_version_is_the_projects() -> None:
    """Images are labelled with the version of the project, and compose and manifests ask for that."""
    assert ("ARG", f"VERSION={VERSION}") in STAGES["runtime"]
    tags = [
        default(service["image"]).partition(":")[2] for service in SERVICES.values() if "build" in service
    ]
    assert set(tags) == {VERSION}


def manifest_containers() -> Iterator[tuple[str, list[str]]]:
    """Yield image and command of each container of ours in k8s/, components and patches included."""

    def walk(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if str(value.get("image", "")).startswith("millrace/"):
                yield value
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            for container in walk(document):
                yield container["image"], container.get("command", [])


def test_manifests_use_the_images() -> None:
    """Each container of ours runs an image that is built, of this version, with a command that is in it."""
    found = list(manifest_containers())
    assert {image.removeprefix("millrace/").partition(":")[0] for image, _ in found} == set(RUNS)
    for image, command in found:
        target, _, tag = image.removeprefix("millrace/").partition(":")
        assert tag == VERSION, image
        # A patch that only changes the image has no command.
        assert not command or what_runs(command) in RUNS[target], (image, command)


@pytest.mark.parametrize("target", MODULES)
def test_images_have_what_their_commands_import(target: str) -> None:
    """All that runs in an image imports nothing but what its requirements pin."""
    program = """
import sys, importlib, importlib.metadata as metadata, re
target, *modules = sys.argv[1:]
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
text = open(f"requirements/{target}.txt").read()
pinned = {canonical(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)}
owners = metadata.packages_distributions()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        of = {canonical(owner) for owner in owners.get(top, [])}
        if of and not of & pinned and "millrace" not in of:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

sys.meta_path.insert(0, Refuse())
for module in modules:
    importlib.import_module(module)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, target, *MODULES[target]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_compose_runs_what_up_runs(tmp_path: Path) -> None:
    """Compose runs the processes of `millrace up`, with the same settings, each in an image that has it."""
    described = parts.describe_parts(load(data_dir=tmp_path), {})
    ours = {name: service for name, service in SERVICES.items() if "build" in service and name != "prepare"}
    assert {part.spec.name: list(part.spec.argv[1:]) for part in described} == {
        name: service["command"][1:] for name, service in ours.items()
    }
    for name, service in ours.items():
        target = default(service["build"]["target"])
        assert service["command"][0] == "python"
        assert name in RUNS[target]
        assert default(service["image"]) == f"millrace/{target}:{VERSION}"
    # The data folder and the port are the image's, a container's host name and process id name a replica.
    elsewhere = {f"{PREFIX}{name}" for name in ("DATA_DIR", "WORKER_PORT", "REPLICA")}
    given = set().union(*(part.spec.env for part in described)) - elsewhere
    assert given <= set(SERVICES["predict"]["environment"])


def test_compose_has_settings_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each process of docker-compose.yml starts with settings that are right, and ends before it is killed."""
    (tmp_path / "api-keys").write_text("key")
    for service in SERVICES.values():
        if "build" not in service:
            continue
        target = default(service["build"]["target"])
        environment = environment_of(target) | service["environment"]
        if f"{PREFIX}API_KEYS_FILE" in environment:
            assert environment[f"{PREFIX}API_KEYS_FILE"].startswith(environment[f"{PREFIX}DATA_DIR"])
            environment[f"{PREFIX}API_KEYS_FILE"] = str(tmp_path / "api-keys")
        with monkeypatch.context() as context:
            settings = settings_of(environment, context)
        assert settings.kafka_bootstrap_servers == "kafka:19092"
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.shutdown_grace_seconds
        if service["healthcheck"] != {"disable": True}:
            port = settings.gateway_port if target == "gateway" else settings.worker_port
            assert f"127.0.0.1:{port}/readyz" in service["healthcheck"]["test"][-1]


def test_compose_prepares_with_commands_that_there_are() -> None:
    """`prepare` applies topics and migrations, and makes the file of keys that the gateway reads."""
    script = SERVICES["prepare"]["command"][-1]
    for line in script.splitlines():
        if line.startswith("millrace "):
            assert what_runs(shlex.split(line)) == "millrace"
    assert SERVICES["gateway"]["environment"][f"{PREFIX}API_KEYS_FILE"] in script


def test_compose_gives_no_rights_away() -> None:
    """Our containers have a read-only root and no capabilities; what is published is for this machine alone."""
    for service in SERVICES.values():
        if "build" in service:
            assert service["read_only"] is True
            assert service["tmpfs"] == ["/tmp"]
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_compose_has_the_broker_of_up(tmp_path: Path) -> None:
    """Kafka is set up as in `millrace up`, but for addresses and what concerns the size of the machine."""
    embedded = EmbeddedKafka(tmp_path)._chosen_properties(tmp_path)
    given = {
        name.removeprefix("KAFKA_").replace("_", ".").lower(): str(value)
        for name, value in SERVICES["kafka"]["environment"].items()
    }
    addresses = {
        *("listeners", "advertised.listeners", "controller.quorum.voters", "inter.broker.listener.name"),
        *("listener.security.protocol.map", "log.dirs"),
    }
    small = {
        *("offsets.topic.num.partitions", "transaction.state.log.num.partitions"),
        *("share.coordinator.state.topic.num.partitions", "num.network.threads", "num.io.threads"),
        *("log.cleaner.dedupe.buffer.size", "log.cleaner.backoff.ms", "log.index.size.max.bytes"),
        *("group.min.session.timeout.ms", "broker.session.timeout.ms", "broker.heartbeat.interval.ms"),
    }
    assert given.keys() - addresses == embedded.keys() - addresses - small
    assert all(value == embedded[name] for name, value in given.items() if name not in addresses)
