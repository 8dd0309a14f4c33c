"""A real API server takes every overlay and component as it is: fields, CEL rules, defaults, pod security."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from millrace.tree import Tree
from tests.cluster.control_plane import ControlPlane
from tests.support import manifests, operators

pytestmark = pytest.mark.timeout(600)

# Parts of others, which are here without them or tried with them.
_PARTS = {"pods", "deployment"}
# For the folder of a deployment of models; all others are for an overlay.
_OF_A_DEPLOYMENT = {"gpu", "gpu-mig", "gpu-dra", "scaling-lag", "scaling-deadline", "secured-deployment"}


def lost(given: Any, got: Any, path: str = "") -> Iterator[str]:
    """Yield where what was given is not in what the server keeps; it may add defaults and write numbers its way."""
    if isinstance(given, dict):
        for key, value in given.items():
            if value is None or value in ({}, []):
                continue
            if not isinstance(got, dict) or key not in got:
                yield f"{path}.{key}"
            else:
                yield from lost(value, got[key], f"{path}.{key}")
    elif isinstance(given, list):
        if not isinstance(got, list) or len(got) < len(given):
            yield path
        else:
            for number, (one, other) in enumerate(zip(given, got, strict=False)):
                yield from lost(one, other, f"{path}[{number}]")


Applied = tuple[ControlPlane, tuple[manifests.Manifest, ...]]


@pytest.fixture(scope="module")
def applied(plane: ControlPlane, request: pytest.FixtureRequest) -> Applied:
    """Apply an overlay, the second one over the first: without controllers no namespace is ever emptied."""
    rendered = manifests.render(request.param)
    text = yaml.safe_dump_all(rendered)
    ran = plane.try_kubectl("apply", "--server-side", "--validate=strict", "--filename=-", stdin=text)
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr, ran.stderr
    return plane, rendered


@pytest.mark.parametrize("applied", manifests.overlays(), ids=lambda path: path.name, indirect=True)
def test_every_overlay_is_taken_whole(applied: Applied) -> None:
    """The API server refuses nothing, warns of nothing, and drops no field of what it is given."""
    plane, rendered = applied
    for each in rendered:
        group = each["apiVersion"].rpartition("/")[0]
        kind = f"{each['kind']}.{group}" if group else each["kind"]
        where = [f"--namespace={each['metadata']['namespace']}"] if "namespace" in each["metadata"] else []
        got = plane.items(kind, each["metadata"]["name"], *where)[0]
        assert list(lost({"spec": each.get("spec")}, got)) == [], manifests.name_of(each)


@pytest.mark.parametrize("applied", manifests.overlays(), ids=lambda path: path.name, indirect=True)
def test_pod_security_admits_every_pod(applied: Applied) -> None:
    """In a namespace that enforces `restricted` each workload's pod can be made, and those that Strimzi makes."""
    plane, rendered = applied
    namespace = manifests.of_kind(rendered, "Namespace")[0]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    here = namespace["metadata"]["name"]
    plane.try_kubectl("create", "serviceaccount", "default", f"--namespace={here}")  # a controller's work
    pods = [
        *((manifests.name_of(workload), pod_of(workload)) for workload, _ in manifests.workloads(rendered)),
        *((pod["metadata"]["labels"]["strimzi.io/name"], pod) for pod in operators.strimzi_pods(rendered)),
    ]
    for name, pod in pods:
        metadata = pod["metadata"] | {"name": "trial", "namespace": here}
        trial = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        ran = plane.try_kubectl(
            "create", "--dry-run=server", "--validate=strict", "--filename=-", stdin=json.dumps(trial)
        )
        assert ran.returncode == 0, f"{name}: {ran.stderr}"
        assert "Warning" not in ran.stderr, f"{name}: {ran.stderr}"


def pod_of(workload: manifests.Manifest) -> manifests.Manifest:
    """Return the pod that a workload's controller would make."""
    template: manifests.Manifest = json.loads(json.dumps(manifests.pod_template(workload)))
    # A StatefulSet's controller adds the volumes of its claims.
    for claim in workload["spec"].get("volumeClaimTemplates", []):
        volume = {"name": claim["metadata"]["name"], "emptyDir": {}}
        template["spec"].setdefault("volumes", []).append(volume)
    return template


def test_pod_security_refuses_a_pod_that_asks_for_more(plane: ControlPlane) -> None:
    """The trial above can fail: a pod that may write its root as root is refused."""
    plane.kubectl("create", "namespace", "strict")
    plane.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    plane.kubectl("create", "serviceaccount", "default", "--namespace=strict")
    ran = plane.try_kubectl("run", "bold", "--image=any", "--namespace=strict", "--dry-run=server")
    assert ran.returncode != 0
    assert "violates PodSecurity" in ran.stderr


def test_an_unknown_field_is_refused(plane: ControlPlane) -> None:
    """The trial above can fail: a custom resource may have no field that is not known."""
    topic = {
        "apiVersion": "kafka.strimzi.io/v1",
        "kind": "KafkaTopic",
        "metadata": {"name": "wrong"},
        "spec": {"partitions": 1, "replicas": 1, "partition": 2},
    }
    ran = plane.try_kubectl(
        "create",
        "--dry-run=server",
        "--validate=strict",
        "--namespace=default",
        "--filename=-",
        stdin=json.dumps(topic),
    )
    assert ran.returncode != 0
    assert 'unknown field "spec.partition"' in ran.stderr


@pytest.mark.parametrize(
    "component",
    [
        path
        for path in manifests.components()
        if path.relative_to(manifests.COMPONENTS).parts[0] not in _PARTS
    ],
    ids=lambda path: str(path.relative_to(manifests.COMPONENTS)),
)
def test_every_component_is_taken(plane: ControlPlane, tmp_path: Path, component: Path) -> None:
    """On top of the base and a deployment of models each component renders, and the API server takes the result."""
    tree = Tree(tmp_path / "tree", "production")
    name, deployment = component.relative_to(manifests.COMPONENTS), tree.overlay / "predict-default"
    kustomization = yaml.safe_load((deployment / "kustomization.yaml").read_text())
    own = {"deployment", "secured-deployment"} | ({str(name)} if str(name) in _OF_A_DEPLOYMENT else set())
    kustomization["components"] = [f"../../../components/{each}" for each in sorted(own)]
    (deployment / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    wanted = [] if str(name) in own else [tree.folder / "components" / name]
    rendered = manifests.render_with(tmp_path, wanted, [tree.folder / "base", deployment])
    plane.try_kubectl("create", "namespace", "millrace")
    ran = plane.try_kubectl(
        "apply", "--server-side", "--force-conflicts", "--validate=strict", "--dry-run=server", "--filename=-",
        stdin=yaml.safe_dump_all(rendered),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr, ran.stderr
