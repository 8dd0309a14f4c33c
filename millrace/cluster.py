"""What a cluster says of itself, read once through kubectl and looked at by `millrace k8s doctor`.

Only reads, and of secrets only the names and keys. What the user may not read is kept as the reason why, so
that a check can say that it does not know instead of that something is missing.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import quote

import msgspec

from millrace.kubectl import AbsentError, Item, Kubectl, RefusedError

STRIMZI = "kafka.strimzi.io"
KEDA = "keda.sh"
#: What serves KEDA's metrics: the name that its own YAML gives, and that of its chart.
KEDA_ADAPTERS = ("keda-metrics-apiserver", "keda-operator-metrics-apiserver")
EXTERNAL_METRICS = "external.metrics.k8s.io"
PROMETHEUS = "monitoring.coreos.com"
DEVICES = "resource.k8s.io"
_GROUPS = (STRIMZI, KEDA, EXTERNAL_METRICS, PROMETHEUS, DEVICES)

# A call is a process that mostly waits for the API server.
_CALLS_AT_ONCE = 8
_KEYS = '{{range .items}}{{.metadata.name}}{{range $key, $value := .data}} {{$key}}{{end}}{{"\\n"}}{{end}}'

T = TypeVar("T")


class Metric(msgspec.Struct, frozen=True):
    """One metric that KEDA offers to the HPA; `value` is None if it could not be read, `reason` says why."""

    scaled_object: str
    name: str
    value: str | None = None
    reason: str = ""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is looked at; lists hold objects as the API server gives them."""

    namespace: str
    version: str
    #: API group → its versions that are served; a group that is not installed is missing.
    groups: dict[str, list[str]]
    operators: list[Item]
    namespaces: list[Item]
    workloads: list[Item]
    pods: list[Item]
    claims: list[Item]
    #: Name of a secret or config map → its keys.
    secrets: dict[str, list[str]]
    config_maps: dict[str, list[str]]
    kafkas: list[Item]
    topics: list[Item]
    users: list[Item]
    scaled_objects: list[Item]
    metrics: list[Metric]
    nodes: list[Item]
    #: What was not allowed, by the name of the field above, with the API server's reason.
    refused: dict[str, str]


def label(item: Item, name: str) -> str:
    """Return an object's label, or nothing."""
    return str(item["metadata"].get("labels", {}).get(name, ""))


def read(kubectl: Kubectl, namespace: str) -> Cluster:
    """Ask for everything, several calls at a time.

    Raises:
        DependencyError: no API server answers, or it does not know us.
    """
    refused: dict[str, str] = {}

    def asked(name: str, ask: Callable[[], T], nothing: T) -> T:
        try:
            return ask()
        except AbsentError:
            return nothing
        except RefusedError as error:
            refused[name] = str(error)
            return nothing

    # First and alone: without an answer nothing else needs to be asked.
    version: str = kubectl.version().get("serverVersion", {}).get("gitVersion", "")
    here = f"--namespace={namespace}"
    kinds: dict[str, tuple[str, ...]] = {
        "namespaces": ("namespaces", f"--field-selector=metadata.name={namespace}"),
        "workloads": ("deployments,daemonsets,cronjobs", here),
        "pods": ("pods", here),
        "claims": ("persistentvolumeclaims", here),
        "kafkas": (f"kafkas.{STRIMZI}", here),
        "topics": (f"kafkatopics.{STRIMZI}", here),
        "users": (f"kafkausers.{STRIMZI}", here),
        "scaled_objects": (f"scaledobjects.{KEDA}", here),
        "nodes": ("nodes",),
    }
    operators = {
        "strimzi": ("deployments", "--all-namespaces", "--selector=app=strimzi"),
        "keda": (
            "deployments",
            "--all-namespaces",
            f"--selector=app in (keda-operator, {', '.join(KEDA_ADAPTERS)})",
        ),
    }
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        groups = {
            group: pool.submit(asked, f"API group {group}", lambda group=group: _versions(kubectl, group), [])
            for group in _GROUPS
        }
        found = {
            name: pool.submit(asked, name, lambda what=what: kubectl.items(*what), [])
            for name, what in (kinds | operators).items()
        }
        keys = {
            name: pool.submit(asked, name, lambda kind=kind: _keys(kubectl, kind, here), {})
            for name, kind in (("secrets", "secrets"), ("config_maps", "configmaps"))
        }
        items = {name: future.result() for name, future in found.items()}
        metrics = pool.map(lambda each: _metric(kubectl, namespace, *each), _names(items["scaled_objects"]))
        return Cluster(
            namespace=namespace,
            version=version,
            groups={group: future.result() for group, future in groups.items() if future.result()},
            operators=[*items.pop("strimzi"), *items.pop("keda")],
            metrics=list(metrics),
            secrets=keys["secrets"].result(),
            config_maps=keys["config_maps"].result(),
            refused=refused,
            **items,
        )


def _versions(kubectl: Kubectl, group: str) -> list[str]:
    return [each["version"] for each in kubectl.raw(f"/apis/{group}").get("versions", [])]


def _keys(kubectl: Kubectl, kind: str, here: str) -> dict[str, list[str]]:
    lines = kubectl.get(kind, here, f"--output=go-template={_KEYS}").splitlines()
    return {name: keys for name, *keys in (line.split() for line in lines if line)}


def _names(scaled_objects: list[Item]) -> list[tuple[str, str]]:
    """Return what the HPAs of ScaledObjects ask for: one metric per trigger, or the formula's."""
    asked: list[tuple[str, str]] = []
    for each in scaled_objects:
        status = each.get("status", {})
        formula = status.get("compositeScalerName")
        names = [formula] if formula else status.get("externalMetricNames", [])
        asked.extend((each["metadata"]["name"], name) for name in names)
    return asked


def _metric(kubectl: Kubectl, namespace: str, scaled_object: str, name: str) -> Metric:
    selector = quote(f"scaledobject.keda.sh/name={scaled_object}", safe="")
    path = f"/apis/{EXTERNAL_METRICS}/v1beta1/namespaces/{namespace}/{name}?labelSelector={selector}"
    try:
        items = kubectl.raw(path).get("items", [])
    except (AbsentError, RefusedError) as error:
        return Metric(scaled_object, name, reason=str(error))
    if not items:
        return Metric(scaled_object, name, reason="the answer is empty")
    return Metric(scaled_object, name, value=str(items[0].get("value", "")))
