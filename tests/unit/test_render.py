"""`millrace k8s render`: how a copy of the kustomize tree is changed, before kustomize makes anything of it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from millrace import render
from millrace.cli import app
from millrace.plan import Policy
from millrace.render import Rates, Wishes
from millrace.tree import SOURCE, Tree, overlays
from pipeline.errors import ConfigurationError


@pytest.fixture(params=overlays())
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """Copy the tree, once for each overlay."""
    return Tree(tmp_path / "tree", request.param)


def kustomization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return found


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_the_tree_itself_is_never_changed(tree: Tree) -> None:
    """All wishes together change the copy and leave the original as it was."""
    before = digest(SOURCE)
    wishes = Wishes(
        namespace="pictures",
        images={"worker": "registry.example.org/worker:2"},
        deployments={"default": "builtin:quality", "wildlife": "torchvision:resnet18"},
        kafka="events",
        gpu=True,
        policy="deadline",
        rates=Rates(50, 300, 120, 90),
    )
    render.change(tree, wishes)
    assert digest(SOURCE) == before
    assert digest(tree.folder) != before


def test_models_of_a_deployment(tree: Tree) -> None:
    """Other models for `default` change one setting of its own, and no other deployment's."""
    tree.set_deployment("wildlife", "torchvision:resnet18")
    tree.set_deployment("default", "builtin:quality")
    literals = {
        name: kustomization(tree.overlay / f"predict-{name}")["configMapGenerator"][0]["literals"]
        for name in tree.deployments()
    }
    assert literals == {
        "default": ["MILLRACE_DEPLOYMENT=default", "MILLRACE_MODELS=builtin:quality"],
        "wildlife": ["MILLRACE_DEPLOYMENT=wildlife", "MILLRACE_MODELS=torchvision:resnet18"],
    }


def test_a_new_deployment_is_the_default_once_more(tree: Tree) -> None:
    """Another deployment is a folder with the same components, in the overlay's list."""
    tree.set_deployment("wildlife", "builtin:quality")
    default, wildlife = (kustomization(tree.overlay / f"predict-{name}") for name in ("default", "wildlife"))
    assert "predict-wildlife" in kustomization(tree.overlay)["resources"]
    assert wildlife["configMapGenerator"][0]["name"] == "predict-wildlife"
    assert wildlife["components"] == default["components"]


def test_policies_and_gpus_of_all_deployments(tree: Tree) -> None:
    """Each deployment gets the one policy and GPUs or none, once, right after what they change."""
    tree.set_deployment("wildlife", "builtin:quality")
    wishes: list[tuple[Policy, bool]] = [
        ("lag", True),
        ("deadline", False),
        ("lag", False),
        ("deadline", True),
    ]
    for policy, gpu in wishes:
        tree.set_policy(policy)
        tree.set_gpu(gpu)
        assert tree.policy() == policy
        for name in tree.deployments():
            paths = [
                Path(each).name for each in kustomization(tree.overlay / f"predict-{name}")["components"]
            ]
            assert paths[0] == "deployment"
            assert [each for each in paths if each.startswith("scaling-")] == [f"scaling-{policy}"]
            assert [each for each in paths if each.startswith("gpu")] == ["gpu"] * gpu


@pytest.mark.parametrize(
    ("reference", "entry"),
    [
        ("registry.example.org/worker", {"newName": "registry.example.org/worker"}),
        (
            "registry.example.org:5000/a/worker:1.2",
            {"newName": "registry.example.org:5000/a/worker", "newTag": "1.2"},
        ),
        ("worker@sha256:" + "0" * 64, {"newName": "worker", "digest": "sha256:" + "0" * 64}),
    ],
)
def test_images(tree: Tree, reference: str, entry: dict[str, str]) -> None:
    """An image comes from another registry, by tag, by digest, or by neither; the last wish for it counts."""
    tree.set_image("worker", "other:1")
    tree.set_image("worker", reference)
    images = [each for each in kustomization(tree.overlay)["images"] if each["name"] == "millrace/worker"]
    assert images == [{"name": "millrace/worker"} | entry]


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (Wishes(namespace="Upper"), "'Upper' cannot name a namespace"),
        (Wishes(deployments={"-wild": "builtin:quality"}), "'-wild' cannot name a deployment"),
        (Wishes(deployments={"w" * 41: "builtin:quality"}), "cannot name a deployment: at most 40"),
        (Wishes(images={"wrker": "a:1"}), "there is no image 'wrker': one of gateway, steps, worker"),
        (Wishes(images={"worker": "a b"}), "'a b' is no image"),
        (Wishes(kafka="one two"), "neither the name of a Strimzi cluster nor HOST:PORT"),
        (Wishes(rates=Rates(1e9, 300, 1, 90)), "partitions"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(tree: Tree, wishes: Wishes, said: str) -> None:
    """A wish that makes no sense is refused in one line that names it."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        render.change(tree, wishes)
    assert "\n" not in caught.value.message


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """`--save` never writes into somebody's files."""
    with pytest.raises(ConfigurationError, match="is there already"):
        Tree(tmp_path, "dev")


def test_without_kustomize_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither kustomize nor kubectl: exit 78 and one line."""
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["k8s", "render"])
    assert result.exit_code == 78
    assert result.stdout == ""
    assert result.stderr.startswith("millrace: neither kustomize nor kubectl is on PATH: install")
    assert len(result.stderr.splitlines()) == 1


def test_a_kustomize_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Version 4 would fail somewhere in the middle with a message of its own."""
    program = tmp_path / "kustomize"
    program.write_text("#!/bin/sh\necho '{Version:kustomize/v4.5.7 GitCommit:56d82a8}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="too old"):
        render.kustomize()


@pytest.mark.parametrize(
    "line",
    [
        "--deployment wildlife",
        "--deployment =x",
        "--deployment a=b --deployment a=c",
        "--image worker",
        "--overlay staging",
        "--rate 50/s",
        "--rate fast --deadline 5m --pod-rate 1/s --start 90s",
    ],
)
def test_wrong_command_lines(line: str) -> None:
    """What is no option's value is a wrong command line: 2, before anything is looked for."""
    assert CliRunner().invoke(app, ["k8s", "render", *line.split()]).exit_code == 2
