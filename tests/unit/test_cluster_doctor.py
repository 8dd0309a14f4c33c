"""`millrace k8s doctor`: what it makes of a cluster. On a real API server: tests/cluster."""

import gzip
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from millrace.cli import app
from millrace.cluster import KEDA_ADAPTERS, Cluster, Metric
from millrace.cluster_doctor import examine
from millrace.cluster_pods import references
from millrace.doctor import Finding
from millrace.kubectl import AbsentError, Kubectl, RefusedError
from millrace.output import EXIT_CODES
from pipeline.errors import DependencyError
from pipeline.topics import TOPICS
from tests.support import manifests

READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def deployment(name: str, component: str, **container: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "millrace", "app.kubernetes.io/component": component}
    pod = {"containers": [{"name": "millrace", "image": "millrace/steps:0.1.0"} | container]}
    return {
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "millrace", "labels": labels},
        "spec": {"replicas": 1, "template": {"metadata": {"labels": labels}, "spec": pod}},
        "status": {"replicas": 1, "readyReplicas": 1},
    }


def operator(name: str, label: str, image: str) -> dict[str, Any]:
    pod = {"containers": [{"image": image}]}
    return {
        "metadata": {"name": name, "namespace": "operators", "labels": {"app": label}},
        "spec": {"template": {"spec": pod}},
        "status": {"availableReplicas": 1},
    }


def pod(name: str, **status: Any) -> dict[str, Any]:
    ready = {"phase": "Running"} | READY
    return {"metadata": {"name": name}, "spec": {}, "status": status or ready}


def resource(kind: str, name: str) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name}, "spec": {}, "status": READY}


def sound(**changes: Any) -> Cluster:
    """Return an installation as its operators would have it, but for the changes."""
    url = {"name": "URL", "valueFrom": {"secretKeyRef": {"name": "millrace-database", "key": "url"}}}
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    steps = ["archive", "gateway", "watch", "record", "notify"]
    workloads = [
        *(deployment(step, step) for step in steps),
        deployment("predict-default", "predict", resources=gpu),
        deployment("store", "store", env=[url]),
    ]
    whole = Cluster(
        namespace="millrace",
        version="v1.36.3",
        groups={
            "kafka.strimzi.io": ["v1"],
            "keda.sh": ["v1alpha1"],
            "external.metrics.k8s.io": ["v1beta1"],
            "monitoring.coreos.com": ["v1"],
        },
        operators=[
            operator("strimzi-cluster-operator", "strimzi", "quay.io/strimzi/operator:1.2.0"),
            operator("keda-operator", "keda-operator", "ghcr.io/kedacore/keda:2.21.0"),
            operator(
                "keda-operator-metrics-apiserver", "keda-operator-metrics-apiserver", "keda:2.21.0@sha256:00"
            ),
        ],
        namespaces=[
            {"metadata": {"name": "millrace", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
        ],
        workloads=workloads,
        pods=[pod("store-1")],
        claims=[{"metadata": {"name": "model-cache"}, "spec": {}, "status": {"phase": "Bound"}}],
        secrets={"millrace-database": ["url"]},
        config_maps={},
        kafkas=[resource("Kafka", "millrace")],
        topics=[resource("KafkaTopic", topic.name) for topic in TOPICS],
        users=[resource("KafkaUser", "store")],
        scaled_objects=[resource("ScaledObject", "store")],
        metrics=[Metric("store", "s0-kafka-predictions-v1", "7")],
        nodes=[{"metadata": {"name": "one"}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}}],
        refused={},
    )
    return msgspec.structs.replace(whole, **changes)


def faults(cluster: Cluster) -> list[Finding]:
    return [each for each in examine(cluster) if each.status != "ok"]


def test_a_sound_installation_has_no_finding_but_ok() -> None:
    """Each check says something, and nothing of it is a fault."""
    found = examine(sound())
    assert {each.status for each in found} == {"ok"}
    assert len({each.check for each in found}) == 15


@pytest.mark.parametrize("name", KEDA_ADAPTERS)
def test_keda_is_found_however_it_was_installed(name: str) -> None:
    """Its metrics API is called one thing by its own YAML and another by its chart."""
    operators = [*sound().operators[:2], operator(name, name, "keda:2.21.0")]
    said = [each.detail for each in examine(sound(operators=operators)) if each.check == "keda"]
    assert said == ["keda-operator 2.21.0", f"{name} 2.21.0"]


def recorded() -> Cluster:
    """Return what kubectl told of `production` on a real API server, see tests/cluster/record.py."""
    path = Path(manifests.__file__).with_name("cluster.json.gz")
    return msgspec.json.decode(gzip.decompress(path.read_bytes()), type=Cluster)


def test_a_recorded_installation_is_sound() -> None:
    """Of what a real API server and kubectl answered nothing is at fault, and every check looked."""
    found = examine(recorded())
    # Topics and steps are compared with tables that may have grown since.
    assert [each for each in found if each.status != "ok" and each.check not in ("topics", "workloads")] == []
    assert {each.check for each in found} == {each.check for each in examine(sound())}


def test_each_secret_of_a_recorded_installation_is_needed() -> None:
    """Whichever secret that pods name is taken away, it is missed by name."""
    cluster = recorded()
    named = {name for item in cluster.workloads for kind, name, _ in references(item) if kind == "secret"}
    assert len(named) > 5
    for name in named:
        secrets = {other: keys for other, keys in cluster.secrets.items() if other != name}
        found = examine(msgspec.structs.replace(cluster, secrets=secrets))
        missed = [each.detail for each in found if each.check == "secrets" and each.status == "fault"]
        assert missed == [f"secret {name} is missing"]


def status(**containers: Any) -> dict[str, Any]:
    return {
        "phase": "Running",
        "containerStatuses": [{"name": "millrace", "image": "millrace/steps:0.1.0"} | containers],
    }


def ended(**how: Any) -> dict[str, Any]:
    return status(
        ready=False, state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState={"terminated": how}
    )


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
    ],
}
UNREADY = {"conditions": [{"type": "NotReady", "status": "True", "message": "no brokers"}]}
FALLBACK = {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Fallback", "status": "True"}]}
BROKEN: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "an old Kubernetes": ({"version": "v1.32.9"}, "kubernetes", "fault", "v1.32.9", "upgrade"),
    "one without tolerance": ({"version": "v1.34.1-gke.100"}, "kubernetes", "off", "tolerance", "1.35"),
    "no KEDA": (
        {"groups": {"kafka.strimzi.io": ["v1"], "monitoring.coreos.com": ["v1"]}},
        "keda",
        "fault",
        "not installed",
        "install",
    ),
    "an old Strimzi": (
        {"groups": sound().groups | {"kafka.strimzi.io": ["v1beta2"]}},
        "strimzi",
        "fault",
        "v1beta2",
        "1.0",
    ),
    "an old KEDA": (
        {
            "operators": [
                operator("keda-operator", "keda-operator", "keda:2.19.0"),
                sound().operators[0],
                sound().operators[2],
            ]
        },
        "keda",
        "fault",
        "2.19.0",
        "2.20",
    ),
    "an operator that is down": (
        {"operators": [sound().operators[0] | {"status": {}}, *sound().operators[1:]]},
        "strimzi",
        "fault",
        "does not run",
        "kubectl describe --namespace operators deployment/strimzi-cluster-operator",
    ),
    "no external metrics": (
        {
            "groups": {
                name: each for name, each in sound().groups.items() if name != "external.metrics.k8s.io"
            }
        },
        "keda",
        "fault",
        "external.metrics.k8s.io",
        "kubectl describe apiservice",
    ),
    "no namespace": ({"namespaces": []}, "namespace", "fault", "not there", "kubectl apply -k"),
    "lax pod security": (
        {"namespaces": [{"metadata": {"name": "millrace"}}]},
        "namespace",
        "off",
        "no pod security",
        "restricted",
    ),
    "a step that is missing": (
        {"workloads": sound().workloads[1:]},
        "workloads",
        "fault",
        "archive",
        "kubectl apply -k",
    ),
    "a secret that is missing": (
        {"secrets": {}},
        "secrets",
        "fault",
        "millrace-database is missing",
        "--from-file url=FILE",
    ),
    "a key that is missing": (
        {"secrets": {"millrace-database": ["uri"]}},
        "secrets",
        "fault",
        "no key url",
        "add it",
    ),
    "a topic that is missing": ({"topics": sound().topics[1:]}, "topics", "fault", TOPICS[0].name, "apply"),
    "a topic that is not ready": (
        {"topics": [*sound().topics[1:], resource("KafkaTopic", TOPICS[0].name) | {"status": UNREADY}]},
        "topics",
        "fault",
        "no brokers",
        "kubectl describe kafkatopic",
    ),
    "a user nobody looked at": (
        {"users": [{"kind": "KafkaUser", "metadata": {"name": "store"}}]},
        "users",
        "fault",
        "not looked",
        "kubectl",
    ),
    "Kafka elsewhere": ({"kafkas": []}, "kafka", "off", "no Kafka", "elsewhere"),
    "a fallback": (
        {
            "scaled_objects": [
                resource("ScaledObject", "store")
                | {"status": FALLBACK | {"health": {"s0": {"status": "Failing"}}}}
            ]
        },
        "scaling",
        "fault",
        "fallback: s0",
        "kubectl describe scaledobject store",
    ),
    "a lag that KEDA cannot read": (
        {"metrics": [Metric("store", "s0-kafka-predictions-v1", None, "no matching metrics found")]},
        "lag",
        "fault",
        "no matching metrics found",
        "log of keda-operator",
    ),
    "a ScaledObject without metric": ({"metrics": []}, "lag", "fault", "store", "scaling"),
    "no GPU": (
        {"nodes": [{"metadata": {"name": "one"}, "status": {}}]},
        "gpus",
        "fault",
        "no node has nvidia.com/gpu",
        "operator",
    ),
    "a volume that waits": (
        {
            "claims": [
                {
                    "metadata": {"name": "model-cache"},
                    "spec": {"accessModes": ["ReadWriteMany"]},
                    "status": {"phase": "Pending"},
                }
            ]
        },
        "volumes",
        "fault",
        "model-cache is Pending",
        "ReadWriteMany",
    ),
    "an image that is not there": (
        {
            "pods": [
                pod(
                    "store-1",
                    **status(state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}),
                )
            ]
        },
        "pods",
        "fault",
        "cannot get the image millrace/steps:0.1.0: not found",
        "push it",
    ),
    "a wrong setting": (
        {"pods": [pod("store-1", **ended(exitCode=78, reason="Error"))]},
        "pods",
        "fault",
        EXIT_CODES[78],
        "--previous",
    ),
    "out of memory": (
        {"pods": [pod("store-1", **ended(exitCode=137, reason="OOMKilled"))]},
        "pods",
        "fault",
        "out of memory",
        "limit",
    ),
    "no node for it": (
        {"pods": [pod("store-1", **UNSCHEDULABLE)]},
        "pods",
        "fault",
        "Insufficient nvidia.com/gpu",
        "nodes",
    ),
    "one that is loading": (
        {"pods": [pod("store-1", phase="Running")]},
        "pods",
        "off",
        "not ready yet",
        "/readyz",
    ),
    "something not allowed": (
        {"refused": {"nodes": "nodes is forbidden"}},
        "gpus",
        "off",
        "nodes is forbidden",
        "may read",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(what: str) -> None:
    """One thing that is wrong makes one finding, which names it and says what to do."""
    changes, check, state, detail, mend = BROKEN[what]
    (found,) = faults(sound(**changes))
    assert (found.check, found.status) == (check, state)
    assert detail in found.detail
    assert mend in found.mend
    assert "\n" not in found.detail + found.mend


def test_pods_that_are_too_few_are_told_beside_the_reason() -> None:
    """A Deployment whose pods the API server refuses has none, so it is looked at, too."""
    refused = {"type": "ReplicaFailure", "status": "True", "message": "violates PodSecurity"}
    store = sound().workloads[-1] | {"status": {"conditions": [refused]}}
    found = faults(sound(workloads=[*sound().workloads[:-1], store], pods=[]))
    assert [(each.check, each.status) for each in found] == [("workloads", "fault"), ("pods", "fault")]
    assert "violates PodSecurity" in found[0].detail
    assert "0 of 1" in found[1].detail


def test_pods_that_are_done_or_on_their_way_out_are_no_fault() -> None:
    """Neither a finished CronJob's pod nor one that is being deleted is expected to be ready."""
    leaving = pod("b", phase="Running")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert faults(sound(pods=[pod("a", phase="Succeeded"), leaving, pod("c")])) == []


def test_what_pods_cannot_start_without() -> None:
    """Variables, environments, volumes, projected ones and named files count; what is optional does not."""
    container = {
        "env": [
            {"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "k"}}},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "b", "key": "k", "optional": True}}},
            {"name": "C", "value": "/etc/j/password"},
        ],
        "volumeMounts": [{"name": "j", "mountPath": "/etc/j"}],
        "envFrom": [{"configMapRef": {"name": "c"}}, {"secretRef": {"name": "d", "optional": True}}],
    }
    workload = deployment("store", "store", **container)
    workload["spec"]["template"]["spec"]["volumes"] = [
        {"name": "e", "secret": {"secretName": "e", "items": [{"key": "k", "path": "p"}]}},
        {"name": "f", "projected": {"sources": [{"secret": {"name": "f"}}, {"configMap": {"name": "g"}}]}},
        {"name": "h", "secret": {"secretName": "h", "optional": True}},
        {"name": "i", "emptyDir": {}},
        {"name": "j", "secret": {"secretName": "j"}},
    ]
    assert set(references(workload)) == {
        ("secret", "a", "k"), ("configmap", "c", ""), ("secret", "e", "k"), ("secret", "f", ""),
        ("configmap", "g", ""),
        ("secret", "j", ""),
        ("secret", "j", "password"),
    }  # fmt: skip


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, code: int) -> None:
    """Put a kubectl on PATH that says what a real one has said."""
    program = folder / "kubectl"
    program.write_text(
        f"#!/bin/sh\ncat <<'OUT'\n{stdout}\nOUT\ncat >&2 <<'ERR'\n{stderr}\nERR\nexit {code}\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("The connection to the server 127.0.0.1:9 was refused - did you specify …", DependencyError),
        ("Unable to connect to the server: net/http: TLS handshake timeout", DependencyError),
        ("error: You must be logged in to the server (Unauthorized)", DependencyError),
        ('error: the server doesn\'t have a resource type "kafkas"', AbsentError),
        ("Error from server (NotFound): the server could not find the requested resource", AbsentError),
        ('Error from server (Forbidden): pods is forbidden: User "x" cannot list resource "pods"', RefusedError),
    ],
)  # fmt: skip
def test_what_kubectl_says_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]
) -> None:
    """No answer, nothing there and not allowed are told apart, by what kubectl 1.36 and 1.32 print."""
    answering(tmp_path, monkeypatch, "", said, 1)
    with pytest.raises(error):
        Kubectl().items("pods")


def test_no_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without kubectl: exit 78, and one line that says where to get it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["k8s", "doctor"])
    assert result.exit_code == 78
    assert result.stderr.startswith("millrace: no kubectl on PATH: install it")
    assert len(result.stderr.splitlines()) == 1


def test_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no API server answers: exit 69, and one line with kubectl's reason."""
    answering(
        tmp_path,
        monkeypatch,
        "",
        "Unable to connect to the server: dial tcp: lookup k8s.example.org: no such host",
        1,
    )
    result = CliRunner().invoke(app, ["k8s", "doctor"])
    assert result.exit_code == 69
    assert "no such host" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_steps_that_are_looked_for_are_in_the_base() -> None:
    """Each step that the doctor misses when it is not there is in the base, or is `predict`."""
    (found,) = (each for each in examine(sound(workloads=[])) if each.check == "workloads")
    looked_for = found.detail.removeprefix("not there: ").split(", ")
    files = "".join(path.read_text() for path in manifests.BASE.glob("*.yaml"))
    assert [step for step in looked_for if f"component: {step}" not in files] == ["predict"]
