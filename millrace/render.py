"""`millrace k8s render`: the manifests of an overlay for other names, images and deployments.

The kustomize tree stays the one source of truth: a copy of it is changed as a person would change it, and
kustomize prints what comes of it. `--save` keeps the copy, to go on with by hand.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.autoscale.policies import Facts
from millrace.output import say
from millrace.plan import Policy, plan, remarks
from millrace.tree import Tree
from pipeline.errors import ConfigurationError
from pipeline.topics import IMAGES_BULK

_RENDER_SECONDS = 60.0
# Older ones cannot do all that the tree asks for.
_OLDEST_KUSTOMIZE = (5, 0)
_INSTALL = "install kustomize 5 or kubectl 1.27 or newer (https://kubernetes.io/docs/tasks/tools/)"
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# `predict-NAME` must still be a name of pods with what Deployments add to it.
_LONGEST_DEPLOYMENT = 40
_SERVER = r"[A-Za-z0-9.-]+:[0-9]{1,5}"


@dataclass(frozen=True)
class Rates:
    """What `millrace plan` wants to know for every deployment."""

    images_per_second: float
    deadline_seconds: float
    pod_images_per_second: float
    start_seconds: float


@dataclass(frozen=True)
class Wishes:
    """What shall differ from the overlay; None and nothing leave it as it is."""

    overlay: str = "dev"
    namespace: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    deployments: Mapping[str, str] = field(default_factory=dict)
    kafka: str | None = None
    gpu: bool | None = None
    policy: Policy | None = None
    rates: Rates | None = None
    runbook: str | None = None


def render(wishes: Wishes, save: Path | None) -> int:
    """Print the manifests, or with `save` write the changed tree into a new folder; return the exit code.

    Raises:
        ConfigurationError: a wish cannot be fulfilled, or there is no kustomize.
    """
    if save is not None:
        tree = Tree(save, wishes.overlay)
        change(tree, wishes)
        say(f"kubectl apply -k {tree.overlay}")
        return 0
    command = kustomize()
    with tempfile.TemporaryDirectory(prefix="millrace-render-") as folder:
        tree = Tree(Path(folder) / "strimzi", wishes.overlay)
        change(tree, wishes)
        sys.stdout.write(build(command, tree.overlay))
    return 0


def change(tree: Tree, wishes: Wishes) -> None:
    """Change a copy of the tree as wished.

    Raises:
        ConfigurationError: a wish cannot be fulfilled.
    """
    for name, models in wishes.deployments.items():
        if not _DNS_LABEL.fullmatch(name) or len(name) > _LONGEST_DEPLOYMENT:
            raise ConfigurationError(
                f"{name!r} cannot name a deployment: at most {_LONGEST_DEPLOYMENT} lower-case letters, digits and -"
            )
        tree.set_deployment(name, models)
    if wishes.policy is not None:
        tree.set_policy(wishes.policy)
    if wishes.rates is not None:
        _plan(tree, wishes.rates, wishes.policy or tree.policy())
    if wishes.gpu is not None:
        tree.set_gpu(wishes.gpu)
    if wishes.kafka is not None:
        _set_kafka(tree, wishes.kafka)
    known = tree.images()
    for image, reference in wishes.images.items():
        if image not in known:
            raise ConfigurationError(f"there is no image {image!r}: one of {', '.join(sorted(known))}")
        tree.set_image(image, reference)
    if wishes.runbook is not None:
        if not re.fullmatch(r"https?://[^\s#'\"]+", wishes.runbook):
            raise ConfigurationError(
                f"{wishes.runbook!r} is no address such as https://example.org/runbook.md"
            )
        tree.set_runbook(wishes.runbook)
    if wishes.namespace is not None:
        if not _DNS_LABEL.fullmatch(wishes.namespace):
            raise ConfigurationError(f"{wishes.namespace!r} cannot name a namespace")
        # Last: what was put in before is moved, too.
        tree.set_namespace(wishes.namespace)


def _plan(tree: Tree, rates: Rates, policy: Policy) -> None:
    for name in tree.deployments():
        facts = Facts(
            pod_images_per_second=rates.pod_images_per_second,
            start_seconds=rates.start_seconds,
            deadline_seconds=rates.deadline_seconds,
            deployment=name,
        )
        found = plan(rates.images_per_second, facts, policy, price_per_hour=0)
        if name == "default":
            for line in remarks(found, rates.images_per_second, facts)[:3]:
                say(line)
        tree.set_scaled_object(name, found.manifest)
    if found.partitions != IMAGES_BULK.partitions:
        tree.set_partitions(found.partitions)


def _set_kafka(tree: Tree, kafka: str) -> None:
    """Tell a cluster's name from addresses by the port."""
    if re.fullmatch(rf"{_SERVER}(,{_SERVER})*", kafka):
        tree.set_kafka_address(kafka)
    elif _DNS_LABEL.fullmatch(kafka):
        tree.set_kafka_cluster(kafka)
    else:
        raise ConfigurationError(f"{kafka!r} is neither the name of a Strimzi cluster nor HOST:PORT,…")


def kustomize() -> list[str]:
    """Return the command that renders a folder, which comes after it.

    Raises:
        ConfigurationError: neither kustomize nor a kubectl that is new enough is on PATH.
    """
    old = []
    for program, ask, build in (
        ("kustomize", ["version"], "build"),
        ("kubectl", ["version", "--client"], "kustomize"),
    ):
        found = shutil.which(program)
        if found is None:
            continue
        before = "Kustomize Version: " if program == "kubectl" else "^.*?"
        version = re.search(rf"{before}v(\d+)\.(\d+)", _run([found, *ask]))
        if version and (int(version[1]), int(version[2])) >= _OLDEST_KUSTOMIZE:
            return [found, build]
        old.append(found)
    reason = f"{' and '.join(old)} on PATH is too old" if old else "neither kustomize nor kubectl is on PATH"
    raise ConfigurationError(f"{reason}: {_INSTALL}")


def build(command: list[str], folder: Path) -> str:
    """Return what kustomize makes of a folder.

    Raises:
        ConfigurationError: it refuses.
    """
    return _run([*command, str(folder)])


def _run(command: list[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_RENDER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"cannot run {command[0]}: {error}") from None
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines()
        raise ConfigurationError(
            f"{Path(command[0]).name}: {lines[-1] if lines else f'exit code {ran.returncode}'}"
        )
    return ran.stdout
