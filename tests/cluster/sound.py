"""Plays the parts that a control plane without nodes lacks: operators, controllers and the kubelet.

Sets what they would set, so that an installation looks sound to whoever asks the API server.
"""

import json
import subprocess
import sys
from typing import Any

from millrace.cluster_pods import references
from tests.cluster.control_plane import ControlPlane
from tests.support import manifests

_STATUS = "--subresource=status"
_READY = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}
_OPERATORS = {
    ("strimzi", "strimzi-cluster-operator"): ("strimzi", "quay.io/strimzi/operator:1.2.0"),
    ("keda", "keda-operator"): ("keda-operator", "ghcr.io/kedacore/keda:2.21.0"),
    ("keda", "keda-metrics-apiserver"): (
        "keda-metrics-apiserver",
        "ghcr.io/kedacore/keda-metrics-apiserver:2.21.0",
    ),
}


def install(plane: ControlPlane, namespace: str) -> None:
    """Apply `production` to a namespace of its own, and play all parts but KEDA's metrics."""
    command = [
        sys.executable,
        "-m",
        "millrace",
        "k8s",
        "render",
        "--overlay",
        "production",
        "--namespace",
        namespace,
    ]
    ran = subprocess.run(command, env=plane.environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    plane.kubectl("apply", "--server-side", "--filename=-", stdin=ran.stdout)
    plane.try_kubectl("create", "serviceaccount", "default", f"--namespace={namespace}")
    run_operators(plane)
    add_node(plane, "gpu-1", **{"nvidia.com/gpu": "4"})
    run_workloads(plane, namespace)
    run_kafka(plane, namespace)
    run_scaling(plane, namespace)


def create(plane: ControlPlane, *items: dict[str, Any]) -> None:
    """Create or change objects."""
    for item in items:
        plane.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=json.dumps(item))


def set_status(
    plane: ControlPlane, kind: str, name: str, namespace: str | None, status: dict[str, Any]
) -> None:
    """Set an object's status, as its controller would."""
    where = [] if namespace is None else [f"--namespace={namespace}"]
    patch = json.dumps({"status": status})
    plane.kubectl("patch", kind, name, *where, _STATUS, "--type=merge", f"--patch={patch}")


def run_operators(plane: ControlPlane) -> None:
    """Let Strimzi and KEDA seem to run."""
    for (namespace, name), (app, image) in _OPERATORS.items():
        plane.try_kubectl("create", "namespace", namespace)
        labels = {"app": app}
        template = {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "main", "image": image}]},
        }
        create(
            plane,
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"selector": {"matchLabels": labels}, "template": template},
            },
        )
        set_status(
            plane, "deployment", name, namespace, {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1}
        )


def add_node(plane: ControlPlane, name: str, **allocatable: str) -> None:
    """Add a node, with what it has to give."""
    create(plane, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    resources = {"cpu": "16", "memory": "64Gi", "pods": "110"} | allocatable
    set_status(plane, "node", name, None, {"capacity": resources, "allocatable": resources})


def run_workloads(plane: ControlPlane, namespace: str) -> None:
    """Make every secret, bind every claim, and have each workload run one pod that is ready."""
    workloads = plane.items("deployments,daemonsets,cronjobs", f"--namespace={namespace}")
    keys: dict[str, set[str]] = {}
    for workload in workloads:
        for kind, name, key in references(workload):
            if kind == "secret":
                keys.setdefault(name, set()).add(key or "any")
    there = {each["metadata"]["name"]: each for each in plane.items("secrets", f"--namespace={namespace}")}
    for name, wanted in keys.items():
        data = there.get(name, {}).get("data", {})
        secret = {
            "metadata": {"name": name, "namespace": namespace},
            "stringData": dict.fromkeys(wanted - set(data), "x"),
        }
        create(plane, {"apiVersion": "v1", "kind": "Secret"} | secret)
    for claim in plane.items("persistentvolumeclaims", f"--namespace={namespace}"):
        set_status(plane, "persistentvolumeclaim", claim["metadata"]["name"], namespace, {"phase": "Bound"})
    for workload in workloads:
        _run(plane, workload, namespace)


def _run(plane: ControlPlane, workload: dict[str, Any], namespace: str) -> None:
    name, kind = workload["metadata"]["name"], workload["kind"]
    if kind == "CronJob":
        return
    if kind == "Deployment":
        status = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1}
    else:
        status = {
            "desiredNumberScheduled": 1,
            "currentNumberScheduled": 1,
            "numberReady": 1,
            "numberMisscheduled": 0,
        }
    set_status(plane, kind.lower(), name, namespace, status)
    template = manifests.pod_template(workload)
    assert template is not None
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
    create(
        plane,
        pod
        | {
            "metadata": {
                "name": f"{name}-1",
                "namespace": namespace,
                "labels": template["metadata"]["labels"],
            }
        },
    )
    set_status(plane, "pod", f"{name}-1", namespace, {"phase": "Running", "conditions": [_READY]})


def run_kafka(plane: ControlPlane, namespace: str) -> None:
    """Let every resource of Strimzi's be ready."""
    for kind in ("kafka", "kafkatopic", "kafkauser"):
        for each in plane.items(kind, f"--namespace={namespace}"):
            set_status(plane, kind, each["metadata"]["name"], namespace, {"conditions": [_READY]})


def run_scaling(plane: ControlPlane, namespace: str) -> None:
    """Let every ScaledObject be ready, with the metrics that KEDA would name."""
    for each in plane.items("scaledobjects", f"--namespace={namespace}"):
        names = [
            f"s{number}-kafka-{trigger['metadata']['topic'].replace('.', '-')}"
            for number, trigger in enumerate(each["spec"]["triggers"])
            if trigger["type"] == "kafka"
        ]
        status: dict[str, Any] = {
            "conditions": [{"type": "Ready", "status": "True"}],
            "externalMetricNames": names,
        }
        if "scalingModifiers" in each["spec"].get("advanced", {}):
            status["compositeScalerName"] = "composite-metric"
        set_status(plane, "scaledobject", each["metadata"]["name"], namespace, status)
