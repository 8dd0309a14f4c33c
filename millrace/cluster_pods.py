"""What pods need, and what keeps them from working: a part of `millrace k8s doctor`. Pure."""

from collections.abc import Iterator

from millrace.cluster import Cluster
from millrace.doctor import Finding
from millrace.kubectl import Item
from millrace.output import EXIT_CODES

_GPU = "nvidia.com/"
_IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError"})
_OUT_OF_MEMORY = "OOMKilled"

#: secret or configmap, its name, and the key that must be in it; None: any.
Reference = tuple[str, str, str]


def template(workload: Item) -> Item:
    """Return the pod's part of a Deployment, DaemonSet or CronJob."""
    spec: Item = workload["spec"]
    if workload["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    found: Item = spec["template"]["spec"]
    return found


def containers(pod: Item) -> list[Item]:
    """Return all containers of a pod's spec, those that run first first."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def references(workload: Item) -> Iterator[Reference]:
    """Tell which secrets and config maps a workload's pods cannot start without; an empty key means any."""
    pod = template(workload)
    for container in containers(pod):
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            for kind, field in (("secret", "secretKeyRef"), ("configmap", "configMapKeyRef")):
                if (chosen := source.get(field)) and not chosen.get("optional"):
                    yield kind, chosen["name"], chosen["key"]
        for whole in container.get("envFrom", []):
            for kind, field in (("secret", "secretRef"), ("configmap", "configMapRef")):
                if (chosen := whole.get(field)) and not chosen.get("optional"):
                    yield kind, chosen["name"], ""
    yield from _named_files(pod)
    for volume in pod.get("volumes", []):
        yield from _mounted(volume)
        for source in volume.get("projected", {}).get("sources", []):
            yield from _mounted(source)


def _named_files(pod: Item) -> Iterator[Reference]:
    """Tell which keys of mounted secrets are named by a variable, as in PASSWORD_FILE=/etc/secret/password."""
    secrets = {
        each["name"]: each["secret"]["secretName"] for each in pod.get("volumes", []) if "secret" in each
    }
    for container in containers(pod):
        files = [each["value"] for each in container.get("env", []) if "/" in each.get("value", "")]
        for mount in container.get("volumeMounts", []):
            for path in files:
                if mount["name"] in secrets and path.startswith(f"{mount['mountPath']}/"):
                    yield "secret", secrets[mount["name"]], path.removeprefix(f"{mount['mountPath']}/")


def _mounted(volume: Item) -> Iterator[Reference]:
    for kind, field, name in (("secret", "secret", "secretName"), ("configmap", "configMap", "name")):
        chosen = volume.get(field)
        if not chosen or chosen.get("optional"):
            continue
        called = chosen.get(name) or chosen["name"]  # a projected secret has `name`
        for key in [each["key"] for each in chosen.get("items", [])] or [""]:
            yield kind, called, key


def gpus(workload: Item) -> set[str]:
    """Return the GPU resources that a workload's pods are limited to, such as nvidia.com/gpu."""
    return {
        name
        for container in containers(template(workload))
        for name in container.get("resources", {}).get("limits", {})
        if name.startswith(_GPU)
    }


def claims_devices(workload: Item) -> bool:
    """Say whether a workload's pods get their GPUs by dynamic resource allocation."""
    return bool(template(workload).get("resourceClaims"))


def check(cluster: Cluster) -> Iterator[Finding]:
    """Find pods that do not work, each with the first reason for it, and workloads that have too few."""
    sound = 0
    for pod in cluster.pods:
        if pod.get("status", {}).get("phase") == "Succeeded" or "deletionTimestamp" in pod["metadata"]:
            continue
        finding = _unscheduled(pod) or _stopped(cluster, pod) or _unready(cluster, pod)
        if finding is None:
            sound += 1
        else:
            yield finding
    for each in cluster.workloads:
        wanted, ready = _counts(each)
        if ready < wanted:
            name = f"{each['kind'].lower()}/{each['metadata']['name']}"
            yield Finding(
                "pods", "fault", f"{name} has {ready} of {wanted} replicas ready",
                f"see its pods above, or kubectl describe {name} --namespace {cluster.namespace}",
            )  # fmt: skip
    if sound:
        yield Finding("pods", "ok", f"{sound} ready")


def _counts(workload: Item) -> tuple[int, int]:
    status = workload.get("status", {})
    if workload["kind"] == "Deployment":
        return workload["spec"].get("replicas", 1), status.get("readyReplicas", 0)
    if workload["kind"] == "DaemonSet":
        return status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    return 0, 0


def _unscheduled(pod: Item) -> Finding | None:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            said = condition.get("message", condition.get("reason", ""))
            return Finding(
                "pods", "fault", f"{pod['metadata']['name']} fits no node: {said}",
                "add nodes, or change limits, tolerations or affinity (docs/kubernetes.md)",
            )  # fmt: skip
    return None


def _stopped(cluster: Cluster, pod: Item) -> Finding | None:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE_REASONS:
            return Finding(
                "pods", "fault", f"{name} cannot get the image {container['image']}: {message or reason}",
                "push it, give the node the right to pull it, or name another (millrace k8s render --image)",
            )  # fmt: skip
        if reason in _CONFIG_REASONS:
            return Finding("pods", "fault", f"{name}: {message or reason}", "see what `secrets` says")
        ended = container.get("lastState", {}).get("terminated") or container.get("state", {}).get(
            "terminated"
        )
        if ended and not container.get("ready") and ended.get("exitCode"):
            return Finding("pods", "fault", f"{name} ended: {_ending(ended)}", _log(cluster, name, ended))
    return None


def _ending(ended: Item) -> str:
    if ended.get("reason") == _OUT_OF_MEMORY:
        return "out of memory"
    code = ended["exitCode"]
    return f"exit code {code}, {EXIT_CODES[code]}" if code in EXIT_CODES else f"exit code {code}"


def _log(cluster: Cluster, name: str, ended: Item) -> str:
    if ended.get("reason") == _OUT_OF_MEMORY:
        return "raise its memory limit, or lower MILLRACE_MAX_OPEN_BYTES and MILLRACE_MAX_BATCH_BYTES"
    return f"kubectl logs --previous {name} --namespace {cluster.namespace}"


def _unready(cluster: Cluster, pod: Item) -> Finding | None:
    conditions = {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions", [])}
    if conditions.get("Ready") == "True":
        return None
    name = pod["metadata"]["name"]
    return Finding(
        "pods", "off", f"{name} is not ready yet",
        f"kubectl logs {name} --namespace {cluster.namespace}; `/readyz` says what it waits for",
    )  # fmt: skip
