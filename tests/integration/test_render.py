"""`millrace k8s render` with kustomize: what comes out for other names, images and deployments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from millrace.render import Rates, Wishes, change
from millrace.tree import Tree, overlays
from pipeline.topics import IMAGES_BULK, IMAGES_REALTIME
from tests.support import manifests
from tests.support.manifests import Manifest

pytestmark = manifests.MAY_BUILD
ROOT = Path(__file__).parents[2]
RUNBOOK = "https://example.org/millrace/runbook.md"
WORKER = "registry.example.org:5000/worker@sha256:" + "0" * 64


def rendered(folder: Path, wishes: Wishes) -> list[Manifest]:
    tree = Tree(folder, wishes.overlay)
    change(tree, wishes)
    return list(manifests.render(tree.overlay))


@pytest.fixture(scope="module", params=overlays())
def changed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Render each overlay with many wishes at once."""
    wishes = Wishes(
        overlay=request.param,
        namespace="pictures",
        images={"worker": WORKER, "steps": "registry.example.org/steps:2"},
        deployments={"wildlife": "torchvision:resnet18"},
        kafka="events",
        gpu=True,
        runbook=RUNBOOK,
    )
    return rendered(tmp_path_factory.mktemp("render") / "tree", wishes)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Have the kustomize of the other tests on PATH."""
    folder = Path(manifests.kustomize()[0]).parent
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def run(environment: dict[str, str], *options: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-m", "millrace", "k8s", "render", *options]
    ran = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("overlay", overlays())
def test_without_wishes_it_is_the_overlay(environment: dict[str, str], overlay: str) -> None:
    """What is printed is what `kubectl apply -k` applies."""
    printed = yaml.load_all(run(environment, "--overlay", overlay), Loader=yaml.CSafeLoader)
    assert list(printed) == list(manifests.render(manifests.OVERLAYS / overlay))


def test_another_deployment_has_all_that_default_has(changed: list[Manifest]) -> None:
    """A new deployment gets every object that `default` has, the same but for its name and models."""
    settings = {
        each["data"]["MILLRACE_DEPLOYMENT"]: each
        for each in manifests.of_kind(changed, "ConfigMap")
        if "MILLRACE_DEPLOYMENT" in each["data"]
    }
    assert settings["wildlife"]["data"]["MILLRACE_MODELS"] == "torchvision:resnet18"
    assert settings["default"]["data"]["MILLRACE_MODELS"] != "torchvision:resnet18"

    def of(name: str) -> dict[str, str]:
        # The end of a ConfigMap's name is a hash of what is in it.
        old = settings[name]["metadata"]["name"]
        return {
            each["kind"]: yaml.safe_dump(each).replace(old, f"predict-{name}-HASH")
            for each in changed
            if each["metadata"]["name"] == f"predict-{name}"
        }

    default = {
        # In queries the name stands alone between empty groups.
        kind: text.replace("predict-default", "predict-wildlife")
        .replace("predict.default", "predict.wildlife")
        .replace("(?:)default(?:)", "(?:)wildlife(?:)")
        for kind, text in of("default").items()
    }
    assert of("wildlife") == default
    assert {"Deployment", "PodDisruptionBudget", "ScaledObject"} <= set(default)


def test_another_namespace_leaves_nothing_in_the_old_one(changed: list[Manifest]) -> None:
    """Every object moves, and every address, policy and query that names the namespace with it."""
    assert manifests.of_kind(changed, "Namespace")[0]["metadata"]["name"] == "pictures"
    assert {each["metadata"].get("namespace", "pictures") for each in changed} == {"pictures"}
    text = yaml.safe_dump_all(changed, width=10_000)
    for old in ("kubernetes.io/metadata.name: millrace\n", ".millrace.svc", 'namespace="millrace"'):
        assert old not in text


def test_alerts_lead_to_a_page_that_can_be_opened(changed: list[Manifest]) -> None:
    """Every alert of an overlay that has any leads to its heading on the page that was named."""
    rules = [
        rule
        for each in manifests.of_kind(changed, "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    monitored = bool(manifests.of_kind(changed, "PodMonitor"))
    assert bool(rules) is monitored
    wanted = [f"{RUNBOOK}#{rule['alert'].lower()}" for rule in rules]
    assert [rule["annotations"]["runbook_url"] for rule in rules] == wanted


def test_another_name_of_the_kafka_cluster(changed: list[Manifest]) -> None:
    """The cluster's name is in resources, labels, addresses and secrets, and nowhere is the old one left."""
    assert [each["metadata"]["name"] for each in manifests.of_kind(changed, "Kafka")] == ["events"]
    text = yaml.safe_dump_all(changed, width=10_000)
    assert "events-kafka-bootstrap" in text
    for old in ("millrace-kafka-", "millrace-cluster-ca", "strimzi.io/cluster: millrace"):
        assert old not in text


def test_gpus_and_images(changed: list[Manifest]) -> None:
    """Workers get a GPU, and images come from where they are said to be."""
    for name in ("default", "wildlife"):
        found = manifests.find(changed, "Deployment", f"predict-{name}")
        (container,) = found["spec"]["template"]["spec"]["containers"]
        assert container["image"] == WORKER
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (store,) = manifests.find(changed, "Deployment", "store")["spec"]["template"]["spec"]["containers"]
    assert store["image"] == "registry.example.org/steps:2"


@pytest.mark.parametrize("overlay", overlays())
def test_brokers_that_run_elsewhere(tmp_path: Path, overlay: str) -> None:
    """Nothing of Strimzi's is left, and everybody asks and may reach the brokers that were named."""
    servers = "a.example.org:9192,b.example.org:9192"
    found = rendered(tmp_path / "tree", Wishes(overlay=overlay, kafka=servers, gpu=False))
    assert [each for each in found if each["apiVersion"].startswith("kafka.strimzi.io/")] == []
    assert "nvidia.com/gpu:" not in yaml.safe_dump_all(manifests.of_kind(found, "Deployment"))
    common = [each["data"] for each in manifests.of_kind(found, "ConfigMap")]
    assert [
        each["MILLRACE_KAFKA_BOOTSTRAP_SERVERS"]
        for each in common
        if "MILLRACE_KAFKA_BOOTSTRAP_SERVERS" in each
    ] == [servers]
    policy = manifests.find(found, "NetworkPolicy", "kafka")
    assert policy["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": 9192}]}]
    triggers = [
        trigger["metadata"]
        for each in manifests.of_kind(found, "ScaledObject")
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "kafka"
    ]
    assert {each["bootstrapServers"] for each in triggers} == {servers}


@pytest.mark.parametrize("policy", ["lag", "deadline"])
def test_policies_with_numbers_of_a_plan(tmp_path: Path, policy: str) -> None:
    """Every deployment is scaled as `millrace plan` says for these rates, over as many partitions."""
    wishes = Wishes(
        deployments={"wildlife": "builtin:quality"},
        policy="lag" if policy == "lag" else "deadline",
        rates=Rates(
            images_per_second=2000, deadline_seconds=300, pod_images_per_second=120, start_seconds=90
        ),
    )
    found = rendered(tmp_path / "tree", wishes)
    for name in ("default", "wildlife"):
        scaled = manifests.find(found, "ScaledObject", f"predict-{name}")
        assert scaled["spec"]["maxReplicaCount"] == 60
        kafka = [each["metadata"] for each in scaled["spec"]["triggers"] if each["type"] == "kafka"]
        assert {each["lagThreshold"] for each in kafka} == {"18000"}
        assert {each["consumerGroup"] for each in kafka} == {f"predict.{name}"}
        assert ("scalingModifiers" in scaled["spec"]["advanced"]) == (policy == "deadline")
    partitions = {
        each["spec"].get("topicName", each["metadata"]["name"]): each["spec"]["partitions"]
        for each in manifests.of_kind(found, "KafkaTopic")
    }
    assert {name for name, count in partitions.items() if count == 60} == {
        IMAGES_REALTIME.name,
        IMAGES_BULK.name,
    }


def test_what_is_saved_can_be_applied(environment: dict[str, str], tmp_path: Path) -> None:
    """`--save` writes a tree that gives the same as what is printed."""
    options = ("--deployment", "wildlife=builtin:quality", "--namespace", "pictures")
    folder = tmp_path / "mine"
    assert run(environment, *options, "--save", str(folder)) == ""
    printed = list(yaml.load_all(run(environment, *options), Loader=yaml.CSafeLoader))
    assert list(manifests.render(folder / "overlays" / "dev")) == printed


def test_an_installed_wheel_has_the_tree(environment: dict[str, str], tmp_path: Path) -> None:
    """From a wheel, without the checkout, every file of the tree is there and renders."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "agents", "gateway", "loadtest", "millrace", "k8s"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    there = installed / "millrace" / "manifests"
    files = {path.relative_to(manifests.TREE) for path in manifests.TREE.rglob("*") if path.is_file()}
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == files
    printed = run(environment | {"PYTHONPATH": str(installed)}, cwd=installed)
    assert list(yaml.load_all(printed, Loader=yaml.CSafeLoader)) == list(
        manifests.render(manifests.OVERLAYS / "dev")
    )
