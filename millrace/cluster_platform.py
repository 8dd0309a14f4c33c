"""What a cluster must bring before Millrace is there: a part of `millrace k8s doctor`. Pure."""

import re
from collections.abc import Iterator

from millrace.cluster import EXTERNAL_METRICS, KEDA, KEDA_ADAPTERS, PROMETHEUS, STRIMZI, Cluster, label
from millrace.doctor import Finding

_OLDEST_KUBERNETES = (1, 33)
_TOLERANCE_KUBERNETES = (1, 35)  # HPAConfigurableTolerance is on from here
_OLDEST_STRIMZI = (1, 0)
_OLDEST_KEDA = (2, 20)
_STRIMZI_PAGE = "https://strimzi.io/docs/operators/latest/deploying"
_KEDA_PAGE = "https://keda.sh/docs/latest/deploy/"


def kubernetes(cluster: Cluster) -> Iterator[Finding]:
    """Look at the version of the API server."""
    version = _number(cluster.version)
    if version < _OLDEST_KUBERNETES:
        yield Finding("kubernetes", "fault", cluster.version, "upgrade the cluster to 1.33 or newer")
    elif version < _TOLERANCE_KUBERNETES:
        yield Finding(
            "kubernetes", "off", f"{cluster.version} ignores `tolerance` of HPAs",
            "upgrade to 1.35 or newer, or expect up to a tenth fewer replicas than the policy wants",
        )  # fmt: skip
    else:
        yield Finding("kubernetes", "ok", cluster.version)


def strimzi(cluster: Cluster) -> Iterator[Finding]:
    """Look for Strimzi: its API and its operator."""
    served = cluster.groups.get(STRIMZI)
    if not served:
        yield Finding("strimzi", "fault", "is not installed", f"install 1.0 or newer: {_STRIMZI_PAGE}")
    elif "v1" not in served:
        yield Finding(
            "strimzi", "fault", f"serves {', '.join(served)}, not v1",
            "upgrade it to 1.0 or newer (0.49 converts what is there)",
        )  # fmt: skip
    else:
        yield from _operator(cluster, "strimzi", "strimzi-cluster-operator", _OLDEST_STRIMZI)


def keda(cluster: Cluster) -> Iterator[Finding]:
    """Look for KEDA: its API, its operators, and the API that HPAs ask."""
    if "v1alpha1" not in cluster.groups.get(KEDA, []):
        yield Finding("keda", "fault", "is not installed", f"install 2.20 or newer: {_KEDA_PAGE}")
        return
    yield from _operator(cluster, "keda", "keda-operator", _OLDEST_KEDA)
    there = {label(each, "app") for each in cluster.operators}
    adapter = next((name for name in KEDA_ADAPTERS if name in there), KEDA_ADAPTERS[0])
    yield from _operator(cluster, "keda", adapter, _OLDEST_KEDA)
    if EXTERNAL_METRICS not in cluster.groups:
        yield Finding(
            "keda", "fault", f"the API {EXTERNAL_METRICS} does not answer, so that no HPA sees a lag",
            "kubectl describe apiservice v1beta1.external.metrics.k8s.io",
        )  # fmt: skip


def _operator(cluster: Cluster, check: str, name: str, oldest: tuple[int, int]) -> Iterator[Finding]:
    """Look at the Deployment of an operator: labels are those of its own manifests and charts."""
    found = next((each for each in cluster.operators if label(each, "app") == name), None) or next(
        (each for each in cluster.operators if each["metadata"]["name"].endswith(name)), None
    )
    if found is None:
        yield Finding(
            check, "off", f"no Deployment {name} was found in any namespace", "look whether it runs elsewhere"
        )
        return
    where = f"--namespace {found['metadata']['namespace']} deployment/{found['metadata']['name']}"
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    version = image.partition("@")[0].rpartition(":")[2]
    if not found.get("status", {}).get("availableReplicas"):
        yield Finding(check, "fault", f"{name} does not run", f"kubectl describe {where}")
    elif re.match(r"v?\d", version) and _number(version) < oldest:
        wanted = ".".join(map(str, oldest))
        yield Finding(check, "fault", f"{name} {version}", f"upgrade it to {wanted} or newer")
    else:
        yield Finding(check, "ok", f"{name} {version}")


def monitoring(cluster: Cluster) -> Iterator[Finding]:
    """Look for the Prometheus Operator."""
    if PROMETHEUS in cluster.groups:
        yield Finding("monitoring", "ok", "PodMonitors and PrometheusRules are known")
        return
    yield Finding(
        "monitoring", "off", "there is no Prometheus Operator",
        "install it, or leave the component `monitoring` out; the deadline policy then goes by lag alone",
    )  # fmt: skip


def namespace(cluster: Cluster) -> Iterator[Finding]:
    """Look at the namespace and its pod security."""
    if not cluster.namespaces:
        yield Finding(
            "namespace", "fault", f"{cluster.namespace} is not there",
            "apply an overlay: kubectl apply -k k8s/strimzi/overlays/dev",
        )  # fmt: skip
        return
    level = label(cluster.namespaces[0], "pod-security.kubernetes.io/enforce")
    if level == "restricted":
        yield Finding("namespace", "ok", f"{cluster.namespace}, pod security restricted")
    else:
        yield Finding(
            "namespace", "off", f"{cluster.namespace} enforces {level or 'no'} pod security",
            f"kubectl label namespace {cluster.namespace} pod-security.kubernetes.io/enforce=restricted",
        )  # fmt: skip


def _number(version: str) -> tuple[int, int]:
    """Read the first two parts of a version, such as v1.36.3+k3s1; what is none is the oldest."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
