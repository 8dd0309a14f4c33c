"""`millrace k8s doctor`: what an installation needs of its cluster, whether it is there, and how to mend it.

Pure: looks at what `millrace.cluster` has read. Each finding is one line. A fault is what keeps records from being
predicted or replicas from being scaled; what only might is `off`.
"""

from collections.abc import Callable, Iterable, Iterator

from millrace import cluster_platform, cluster_pods
from millrace.cluster import DEVICES, EXTERNAL_METRICS, KEDA, PROMETHEUS, STRIMZI, Cluster, label
from millrace.doctor import Finding
from millrace.kubectl import Item
from millrace.output import EXIT_FAILED, emit, say, show_table
from pipeline.topics import TOPICS

_STEPS = ("gateway", "predict", "archive", "store", "watch", "record", "notify")
_NAME, _COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"

Check = Callable[[Cluster], Iterable[Finding]]


def examine(cluster: Cluster) -> list[Finding]:
    """Run all checks, from what the others need to what needs them."""
    checks: dict[str, tuple[Check, tuple[str, ...]]] = {
        "kubernetes": (cluster_platform.kubernetes, ()),
        "strimzi": (cluster_platform.strimzi, (f"API group {STRIMZI}", "strimzi")),
        "keda": (cluster_platform.keda, (f"API group {KEDA}", "keda")),
        "monitoring": (cluster_platform.monitoring, (f"API group {PROMETHEUS}",)),
        "namespace": (cluster_platform.namespace, ("namespaces",)),
        "workloads": (_workloads, ("workloads",)),
        "secrets": (_secrets, ("workloads", "secrets", "config_maps")),
        "kafka": (_kafka, ("kafkas",)),
        "topics": (_topics, ("topics",)),
        "users": (_users, ("users",)),
        "scaling": (_scaling, ("scaled_objects",)),
        "lag": (_lag, ("scaled_objects", f"API group {EXTERNAL_METRICS}")),
        "gpus": (_gpus, ("workloads", "nodes")),
        "volumes": (_volumes, ("claims",)),
        "pods": (cluster_pods.check, ("pods", "workloads")),
    }
    found = []
    for name, (check, needs) in checks.items():
        reason = next((cluster.refused[need] for need in needs if need in cluster.refused), None)
        if reason is not None:
            found.append(Finding(name, "off", f"not known: {reason}", "ask with a user who may read it"))
        else:
            found.extend(check(cluster))
    return found


def report(findings: list[Finding], *, as_json: bool) -> int:
    """Print each finding in one line, with what to do about it; return the exit code."""
    if as_json:
        for finding in findings:
            emit(finding)
    else:
        lines = (
            (each.check, each.status, ": ".join(filter(None, (each.detail, each.mend)))) for each in findings
        )
        show_table(("CHECK", "STATUS", "DETAIL"), lines)
    faults = list(dict.fromkeys(each.check for each in findings if each.status == "fault"))
    say(f"at fault: {', '.join(faults)}" if faults else "nothing is at fault")
    return EXIT_FAILED if faults else 0


def _workloads(cluster: Cluster) -> Iterator[Finding]:
    ours = [each for each in cluster.workloads if label(each, _NAME) == "millrace"]
    there = {label(each, _COMPONENT) for each in ours}
    missing = [step for step in _STEPS if step not in there]
    if missing:
        yield Finding(
            "workloads", "fault", f"not there: {', '.join(missing)}",
            "apply an overlay: kubectl apply -k k8s/strimzi/overlays/dev",
        )  # fmt: skip
    for each in ours:
        for condition in each.get("status", {}).get("conditions", []):
            # Such as pod security, a quota, or a service account that does not exist.
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                yield Finding(
                    "workloads", "fault", f"{each['metadata']['name']}: {condition.get('message', '')}",
                    "the API server refuses its pods; mend what it names",
                )  # fmt: skip
    if ours and not missing:
        names = sorted(each["metadata"]["name"] for each in ours)
        yield Finding("workloads", "ok", ", ".join(names))


def _secrets(cluster: Cluster) -> Iterator[Finding]:
    wanted: dict[tuple[str, str], set[str]] = {}
    for item in cluster.workloads:
        for kind, name, key in cluster_pods.references(item):
            wanted.setdefault((kind, name), set()).update({key} - {""})
    sound = True
    for (kind, name), keys in sorted(wanted.items()):
        there = (cluster.secrets if kind == "secret" else cluster.config_maps).get(name)
        if there is None:
            sound = False
            yield Finding("secrets", "fault", f"{kind} {name} is missing", _origin(cluster, kind, name, keys))
        elif missing := sorted(keys - set(there)):
            sound = False
            yield Finding("secrets", "fault", f"{kind} {name} has no key {', '.join(missing)}", "add it")
    if wanted and sound:
        names = sorted({name for _, name in wanted})
        yield Finding("secrets", "ok", f"all that pods need: {', '.join(names)}")


def _origin(cluster: Cluster, kind: str, name: str, keys: set[str]) -> str:
    """Say who makes a secret, or how."""
    if kind == "configmap":
        return "apply the overlay again"
    if name.endswith("-cluster-ca-cert"):
        return f"Strimzi makes it with the cluster: kubectl describe kafka {name.removesuffix('-cluster-ca-cert')}"
    if any(each["metadata"]["name"] == name for each in cluster.users):
        return f"Strimzi makes it for the user: kubectl describe kafkauser {name} --namespace {cluster.namespace}"
    content = " ".join(f"--from-file {key}=FILE" for key in sorted(keys) or ["KEY"])
    return (
        f"kubectl create secret generic {name} --namespace {cluster.namespace} {content} (docs/kubernetes.md)"
    )


def _kafka(cluster: Cluster) -> Iterator[Finding]:
    if not cluster.kafkas:
        yield Finding(
            "kafka", "off", f"no Kafka of Strimzi's in {cluster.namespace}",
            "right if it is elsewhere; else apply an overlay",
        )  # fmt: skip
    yield from _ready(cluster, "kafka", cluster.kafkas)


def _topics(cluster: Cluster) -> Iterator[Finding]:
    names = [each.get("spec", {}).get("topicName") or each["metadata"]["name"] for each in cluster.topics]
    missing = [topic.name for topic in TOPICS if not any(name.endswith(topic.name) for name in names)]
    if missing and cluster.kafkas:
        yield Finding(
            "topics", "fault", f"no KafkaTopic for {', '.join(missing)}",
            "apply the overlay again, or `millrace topics apply`",
        )  # fmt: skip
    yield from _ready(cluster, "topics", cluster.topics)


def _users(cluster: Cluster) -> Iterator[Finding]:
    yield from _ready(cluster, "users", cluster.users)


def _ready(cluster: Cluster, check: str, items: list[Item]) -> Iterator[Finding]:
    faults = [each for each in items if _condition(each, "Ready") != "True"]
    for each in faults:
        name = each["metadata"]["name"]
        said = _said(each, "Ready") or "the operator has not looked at it yet"
        yield Finding(
            check, "fault", f"{name} is not ready: {said}",
            f"kubectl describe {each['kind'].lower()} {name} --namespace {cluster.namespace}",
        )  # fmt: skip
    if items and not faults:
        yield Finding(check, "ok", f"{len(items)} ready")


def _scaling(cluster: Cluster) -> Iterator[Finding]:
    if not cluster.scaled_objects:
        yield Finding(
            "scaling", "off", "no ScaledObject: replicas stay as they are", "add the component `scaling-lag`"
        )
        return
    sound = True
    for each in cluster.scaled_objects:
        name, status = each["metadata"]["name"], each.get("status", {})
        describe = f"kubectl describe scaledobject {name} --namespace {cluster.namespace}"
        if _condition(each, "Ready") != "True":
            sound = False
            yield Finding("scaling", "fault", f"{name} is not ready: {_said(each, 'Ready')}", describe)
        elif _condition(each, "Fallback") == "True":
            sound = False
            yield Finding("scaling", "fault", f"{name} goes by its fallback: {_failing(status)}", describe)
        elif _condition(each, "Paused") == "True":
            sound = False
            yield Finding(
                "scaling", "off", f"{name} is paused",
                f"kubectl annotate scaledobject {name} --namespace {cluster.namespace} "
                "autoscaling.keda.sh/paused- autoscaling.keda.sh/paused-replicas-",
            )  # fmt: skip
    if sound:
        yield Finding("scaling", "ok", f"{len(cluster.scaled_objects)} ScaledObjects are ready")


def _failing(status: Item) -> str:
    health = status.get("health", {})
    return (
        ", ".join(name for name, each in health.items() if each.get("status") != "Happy") or "see its events"
    )


def _lag(cluster: Cluster) -> Iterator[Finding]:
    dark = [each for each in cluster.metrics if each.value is None]
    for each in dark:
        yield Finding(
            "lag", "fault", f"KEDA has no value of {each.name} for {each.scaled_object}: {each.reason}",
            "look into the log of keda-operator; usual are rights of its Kafka user and a NetworkPolicy",
        )  # fmt: skip
    silent = sorted(
        each["metadata"]["name"]
        for each in cluster.scaled_objects
        if not any(metric.scaled_object == each["metadata"]["name"] for metric in cluster.metrics)
    )
    if silent:
        yield Finding(
            "lag", "fault", f"KEDA has made no metric for {', '.join(silent)}", "see what `scaling` says"
        )
    if cluster.metrics and not dark and not silent:
        values = ", ".join(f"{each.scaled_object} {each.name} {each.value}" for each in cluster.metrics)
        yield Finding("lag", "ok", values)


def _gpus(cluster: Cluster) -> Iterator[Finding]:
    wanted = sorted({name for each in cluster.workloads for name in cluster_pods.gpus(each)})
    if any(cluster_pods.claims_devices(each) for each in cluster.workloads) and DEVICES not in cluster.groups:
        yield Finding(
            "gpus", "fault", "pods claim devices, and the cluster has no DRA",
            "use a cluster of 1.34 or newer, or the component `gpu`",
        )  # fmt: skip
    for name in wanted:
        free = {
            each["metadata"]["name"]: int(each["status"].get("allocatable", {}).get(name, "0"))
            for each in cluster.nodes
        }
        nodes = [node for node, number in free.items() if number]
        if nodes:
            yield Finding("gpus", "ok", f"{sum(free.values())} {name} on {len(nodes)} nodes")
        else:
            yield Finding(
                "gpus", "fault", f"no node has {name} to allocate",
                "install NVIDIA's GPU operator or device plugin, and see `kubectl describe node` of a GPU node "
                "(docs/kubernetes.md)",
            )  # fmt: skip


def _volumes(cluster: Cluster) -> Iterator[Finding]:
    lost = [each for each in cluster.claims if each.get("status", {}).get("phase") != "Bound"]
    for each in lost:
        name = each["metadata"]["name"]
        yield Finding(
            "volumes", "fault", f"{name} is {each.get('status', {}).get('phase', 'new')}",
            f"kubectl describe pvc {name} --namespace {cluster.namespace}; a storage class must offer "
            f"{'/'.join(each['spec'].get('accessModes', []))}",
        )  # fmt: skip
    if cluster.claims and not lost:
        yield Finding("volumes", "ok", f"{len(cluster.claims)} bound")


def _condition(item: Item, kind: str) -> str:
    return next((str(each["status"]) for each in _conditions(item) if each["type"] == kind), "")


def _said(item: Item, kind: str) -> str:
    return next(
        (str(each.get("message", "")) for each in _conditions(item) if each["type"] in (kind, "NotReady")), ""
    )


def _conditions(item: Item) -> list[Item]:
    found: list[Item] = item.get("status", {}).get("conditions", [])
    return found
