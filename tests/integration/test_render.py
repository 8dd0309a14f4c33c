"""`millrace k8s render` with kustomize: what comes out for other names, images and deployments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from millrace.tree import overlays
from tests.support import manifests
from tests.support.manifests import Manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Have the kustomize of the other tests on PATH."""
    folder = Path(manifests.kustomize()[0]).parent
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def render(environment: dict[str, str], *options: str, cwd: Path = ROOT) -> list[Manifest]:
    command = [sys.executable, "-m", "millrace", "k8s", "render", *options]
    ran = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.load_all(ran.stdout, Loader=yaml.CSafeLoader))


def names(rendered: list[Manifest]) -> set[str]:
    return {manifests.name_of(each) for each in rendered}


@pytest.mark.parametrize("overlay", overlays())
def test_without_wishes_it_is_the_overlay(environment: dict[str, str], overlay: str) -> None:
    """What is printed is what `kubectl apply -k` applies."""
    assert render(environment, "--overlay", overlay) == list(manifests.render(manifests.OVERLAYS / overlay))


@pytest.mark.parametrize("overlay", overlays())
def test_another_deployment_has_all_that_default_has(environment: dict[str, str], overlay: str) -> None:
    """A new deployment gets every object that `default` has, the same but for its name and models."""
    rendered = render(environment, "--overlay", overlay, "--deployment", "wildlife=torchvision:resnet18")

    def of(name: str) -> list[str]:
        found = [
            each
            for each in rendered
            if each["metadata"]["name"] == f"predict-{name}" and each["kind"] != "ConfigMap"
        ]
        return sorted(yaml.safe_dump(each) for each in found)

    # The end of a ConfigMap's name is a hash of what is in it.
    hashes = {
        each["metadata"]["name"].rpartition("-")[2]
        for each in rendered
        if each["kind"] == "ConfigMap" and each["metadata"]["name"].startswith("predict-")
    }
    assert len(hashes) == 2

    def plain(text: str) -> str:
        for each in hashes:
            text = text.replace(each, "HASH")
        return text

    renamed = {"predict-default": "predict-wildlife", "predict.default": "predict.wildlife"}
    default = [plain(text) for text in of("default")]
    for old, new in renamed.items():
        default = [text.replace(old, new) for text in default]
    assert [plain(text) for text in of("wildlife")] == default
    models = {
        each["data"]["MILLRACE_DEPLOYMENT"]: each["data"]["MILLRACE_MODELS"]
        for each in rendered
        if each["kind"] == "ConfigMap" and "MILLRACE_MODELS" in each["data"]
    }
    assert models["wildlife"] == "torchvision:resnet18"


@pytest.mark.parametrize("overlay", overlays())
def test_another_namespace_leaves_nothing_in_the_old_one(environment: dict[str, str], overlay: str) -> None:
    """Every object moves, and every address and policy that names the namespace with it."""
    rendered = render(environment, "--overlay", overlay, "--namespace", "pictures")
    assert manifests.of_kind(rendered, "Namespace")[0]["metadata"]["name"] == "pictures"
    spaces = {each["metadata"].get("namespace", "pictures") for each in rendered}
    text = yaml.safe_dump_all(rendered, width=10_000)
    assert spaces == {"pictures"}
    assert "kubernetes.io/metadata.name: millrace\n" not in text
    assert ".millrace.svc" not in text
    assert 'namespace="millrace"' not in text


@pytest.mark.parametrize("overlay", overlays())
def test_another_name_of_the_kafka_cluster(environment: dict[str, str], overlay: str) -> None:
    """The cluster's name is in resources, labels, addresses and secrets, and nowhere is the old one left."""
    rendered = render(environment, "--overlay", overlay, "--kafka", "events")
    text = yaml.safe_dump_all(rendered, width=10_000)
    assert "events-kafka-bootstrap" in text
    for old in ("millrace-kafka-", "millrace-cluster-ca", "strimzi.io/cluster: millrace"):
        assert old not in text
    assert {each["metadata"]["name"] for each in manifests.of_kind(rendered, "Kafka")} <= {"events"}


@pytest.mark.parametrize("overlay", overlays())
def test_brokers_that_run_elsewhere(environment: dict[str, str], overlay: str) -> None:
    """Nothing of Strimzi's is left, and everybody asks and may reach the brokers that were named."""
    servers = "a.example.org:9192,b.example.org:9192"
    rendered = render(environment, "--overlay", overlay, "--kafka", servers)
    assert [each for each in rendered if each["apiVersion"].startswith("kafka.strimzi.io/")] == []
    common = [
        each
        for each in manifests.of_kind(rendered, "ConfigMap")
        if each["metadata"]["name"].startswith("millrace-")
    ]
    assert {each["data"].get("MILLRACE_KAFKA_BOOTSTRAP_SERVERS", servers) for each in common} == {servers}
    policy = manifests.find(rendered, "NetworkPolicy", "kafka")
    assert policy["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": 9192}]}]
    triggers = [
        trigger
        for each in manifests.of_kind(rendered, "ScaledObject")
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "kafka"
    ]
    assert {each["metadata"]["bootstrapServers"] for each in triggers} <= {servers}


def test_gpus_and_images(environment: dict[str, str]) -> None:
    """Workers get a GPU or none, and images come from where they are said to be."""
    options = ("--image", "worker=registry.example.org/w:1", "--image", "worker-cpu=registry.example.org/c:1")

    def worker(*more: str) -> tuple[str, bool]:
        found = manifests.find(render(environment, *more, *options), "Deployment", "predict-default")
        container = next(manifests.containers({"spec": found["spec"]["template"]["spec"]}))
        return container["image"], "nvidia.com/gpu" in container["resources"]["limits"]

    assert worker("--overlay", "dev", "--gpu") == ("registry.example.org/w:1", True)
    assert worker("--overlay", "production", "--no-gpu") == ("registry.example.org/c:1", False)


def test_what_is_saved_can_be_applied(environment: dict[str, str], tmp_path: Path) -> None:
    """`--save` writes a tree that gives the same as what is printed."""
    options = ("--deployment", "wildlife=builtin:quality", "--namespace", "pictures")
    folder = tmp_path / "mine"
    command = [sys.executable, "-m", "millrace", "k8s", "render", *options, "--save", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert list(manifests.render(folder / "overlays" / "dev")) == render(environment, *options)


def test_an_installed_wheel_has_the_tree(environment: dict[str, str], tmp_path: Path) -> None:
    """From a wheel, without the checkout, every file of the tree is there and renders."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "tests", "docs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    there = installed / "millrace" / "manifests"
    files = {path.relative_to(manifests.TREE) for path in manifests.TREE.rglob("*") if path.is_file()}
    tests = {path for path in files if path.name.endswith("_test.yaml")}
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} >= files - tests
    found = render(environment | {"PYTHONPATH": str(installed)}, cwd=installed)
    assert found == list(manifests.render(manifests.OVERLAYS / "dev"))
