"""What pods of the manifests may do: the restricted pod security standard, and the network, no more than needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.app import create_app
from pipeline import settings
from pipeline.settings import PREFIX
from tests.support import manifests, operators, pods
from tests.support.manifests import Manifest, name_of, of_kind, selects

pytestmark = manifests.MAY_BUILD
OVERLAYS = [path.name for path in manifests.overlays()]
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
# Where processes write: what tells libraries where, and our own.
WRITTEN = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_HOME",
           f"{PREFIX}DATA_DIR", f"{PREFIX}MODEL_CACHE")  # fmt: skip
DNS = 53
POSTGRESQL = 5432
HTTPS = 443
# Receivers of alerts: what notify calls is the operator's word.
CALLS_OTHERS = {"notify"}
# What opens the object store; `predict` fetches weights of models, too.
USES_OBJECTS = {"gateway", "archive", "predict", "retention"}


def overlay(name: str) -> tuple[Manifest, ...]:
    return manifests.render(manifests.OVERLAYS / name)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    """Every pod passes the restricted pod security standard, which the namespace enforces, and more."""
    rendered = overlay(name)
    namespace = of_kind(rendered, "Namespace")[0]
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"
    found = [
        f"{name_of(workload)}: {fault}"
        for workload, template in manifests.workloads(rendered)
        for fault in faults(template)
    ]
    assert found == []


def faults(template: Manifest) -> Iterator[str]:
    """Say what the standard, or our own rules beyond it, refuse."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} is set"
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume} is of a kind that is not allowed"
    if pod.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "there is no seccomp profile"
    if not pod.get("runAsNonRoot") or pod.get("runAsUser", 0) == 0:
        yield "it may run as root"
    if pod.get("sysctls") or pod.get("seLinuxOptions"):
        yield "sysctls or SELinux options are set"
    if spec.get("automountServiceAccountToken") is not False:
        yield "a token is mounted"
    if spec.get("enableServiceLinks") is not False:
        yield "services become variables"
    for container in manifests.containers(template):
        yield from (f"{container['name']}: {fault}" for fault in container_faults(container))


def container_faults(container: Manifest) -> Iterator[str]:
    """Say what is refused of one container."""
    context = container.get("securityContext", {})
    yield from context_faults(context)
    if context.get("readOnlyRootFilesystem") is not True:
        yield "its root can be written"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "it takes a port of the host"
    resources = container.get("resources", {})
    for resource in ("cpu", "memory", "ephemeral-storage"):
        if resource not in resources.get("requests", {}):
            yield f"it requests no {resource}"
    for resource in ("memory", "ephemeral-storage"):
        if resource not in resources.get("limits", {}):
            yield f"it has no limit of {resource}"
    image, _, tag = container["image"].rpartition(":")
    if not image or "/" in tag or tag == "latest":
        yield f"the image {container['image']} has no version"


def context_faults(context: Manifest) -> Iterator[str]:
    """Say what the standard refuses of a container, whatever the pod says."""
    if context.get("allowPrivilegeEscalation") is not False:
        yield "privilege escalation is allowed"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "it keeps capabilities"
    if context.get("privileged") or context.get("procMount", "Default") != "Default":
        yield "it is privileged"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield "it runs as root"


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_strimzi_makes_keeps_to_the_restricted_standard(name: str) -> None:
    """The namespace admits the pods that Strimzi makes, and their volumes can be written by Strimzi's group."""
    made = list(operators.strimzi_pods(overlay(name)))
    assert {pods.labels(pod)["strimzi.io/component-type"] for pod in made} >= {"kafka", "entity-operator"}
    for pod in made:
        whole = pod["spec"]["securityContext"]
        for container in manifests.containers(pod):
            context = {**whole, **container["securityContext"]}
            where = (pods.labels(pod)["strimzi.io/name"], container["name"])
            assert list(context_faults(context)) == [], where
            assert context.get("runAsNonRoot") is True, where
            assert context.get("seccompProfile", {}).get("type") == "RuntimeDefault", where
        if pods.labels(pod)["strimzi.io/component-type"] == "kafka":
            assert whole.get("fsGroup") == 0


@pytest.mark.parametrize(
    "fault", ["hostNetwork", "volume", "seccomp", "root", "token", "capabilities", "writable"]
)
def test_the_check_of_the_standard_sees_what_is_wrong(fault: str) -> None:
    """Each rule refuses a pod that breaks it: the check can fail."""
    template = next(template for _, template in pods.of_ours(overlay("dev")))
    spec = {**template["spec"], "containers": [dict(each) for each in template["spec"]["containers"]]}
    container = spec["containers"][0]
    container["securityContext"] = dict(container["securityContext"])
    spec["securityContext"] = dict(spec["securityContext"])
    match fault:
        case "hostNetwork":
            spec["hostNetwork"] = True
        case "volume":
            spec["volumes"] = [{"name": "host", "hostPath": {"path": "/"}}]
        case "seccomp":
            del spec["securityContext"]["seccompProfile"]
        case "root":
            spec["securityContext"]["runAsNonRoot"] = False
        case "token":
            del spec["automountServiceAccountToken"]
        case "capabilities":
            container["securityContext"]["capabilities"] = {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
        case "writable":
            del container["securityContext"]["readOnlyRootFilesystem"]
    assert len(list(faults({**template, "spec": spec}))) == 1
    assert list(faults(template)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_whatever_is_written_lies_on_a_volume(name: str) -> None:
    """Every folder that a process is told to write into is a volume that it may write to."""
    rendered = overlay(name)
    for workload, template in pods.of_ours(rendered):
        for container in manifests.containers(template):
            writable = [
                mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
            ]
            assert "/tmp" in writable, name_of(workload)
            values = pods.environment(container, rendered)
            for variable in WRITTEN:
                if variable in values:
                    path = Path(values[variable])
                    assert any(path.is_relative_to(mount) for mount in writable), (
                        name_of(workload),
                        variable,
                    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_is_closed_by_default(name: str) -> None:
    """A policy that allows nothing selects every pod of ours, in both directions."""
    rendered = overlay(name)
    for workload, template in manifests.workloads(rendered):
        denying = [
            policy
            for policy in policies(rendered, template)
            if set(policy["policyTypes"]) == {"Ingress", "Egress"}
            and not policy.keys() & {"ingress", "egress"}
        ]
        assert len(denying) == 1, name_of(workload)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_reach_what_they_need_and_no_more(name: str) -> None:
    """Kafka and DNS for all; PostgreSQL and the object store for those that have settings for them."""
    rendered = overlay(name)
    for workload, template in pods.of_ours(rendered):
        values = pods.environment(pods.main_container(template), rendered)
        broker = int(values[f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS"].rpartition(":")[2])
        wanted = {DNS, broker}
        if f"{PREFIX}DATABASE_URL" in values:
            wanted.add(POSTGRESQL)
        component = pods.component(template)
        if component in CALLS_OTHERS | USES_OBJECTS:
            wanted.add(HTTPS)
        allowed = {
            port["port"]
            for policy in policies(rendered, template)
            for rule in policy.get("egress", [])
            for port in rule["ports"]
        }
        # All client listeners are allowed in one line; the broker decides whom it lets in at which.
        assert allowed - {9092, 9093, 9094} == wanted - {broker}, name_of(workload)
        assert broker in allowed, name_of(workload)


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_is_let_in(name: str) -> None:
    """Prometheus reads every pod that has metrics; only the gateway lets others in, on its one port."""
    rendered = overlay(name)
    for workload, template in pods.of_ours(rendered):
        served = {port["name"] for port in pods.main_container(template).get("ports", [])}
        let_in = [
            (source, port["port"])
            for policy in policies(rendered, template)
            for rule in policy.get("ingress", [])
            for source in rule["from"]
            for port in rule["ports"]
        ]
        monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
        scraped = {port for source, port in let_in if source.get("namespaceSelector") == monitoring}
        assert served <= scraped, name_of(workload)
        others = {port for source, port in let_in if source.get("namespaceSelector") != monitoring}
        assert others <= ({"http"} if pods.component(template) == "gateway" else set()), name_of(workload)


@pytest.mark.parametrize("component", ["objects-volume", "object-store-credentials"])
def test_the_object_store_is_given_to_those_that_use_it(component: str, tmp_path: Path) -> None:
    """A volume with objects, or a bucket's credentials, go to the pods that open the store and to no others."""
    deployment = manifests.write_deployment(tmp_path / "predict-default", "default")
    plain = manifests.render_with(tmp_path / "without", [], [manifests.BASE, deployment])
    given = manifests.render_with(
        tmp_path / "with", [manifests.COMPONENTS / component], [manifests.BASE, deployment]
    )
    before = {name_of(workload): template for workload, template in pods.of_ours(plain)}
    changed = {
        pods.component(template)
        for workload, template in pods.of_ours(given)
        if template["spec"]["volumes"] != before[name_of(workload)]["spec"]["volumes"]
    }
    assert changed == USES_OBJECTS


def test_the_clouds_credentials_are_for_those_that_use_the_object_store(tmp_path: Path) -> None:
    """With the component, pods that open the store reach their node's credentials, and no other pod does."""
    deployment = manifests.write_deployment(tmp_path / "predict-default", "default")
    rendered = manifests.render_with(
        tmp_path, [manifests.COMPONENTS / "cloud-identity"], [manifests.BASE, deployment]
    )
    reached = {
        pods.component(template)
        for _, template in pods.of_ours(rendered)
        for policy in policies(rendered, template)
        for rule in policy.get("egress", [])
        for peer in rule.get("to", [])
        if peer.get("ipBlock", {}).get("cidr") == "169.254.169.254/32"
    }
    assert reached == USES_OBJECTS


def test_what_asks_for_no_key_stays_inside(tmp_path: Path) -> None:
    """The Ingress passes on what clients need, and neither health nor metrics, which ask for no key."""
    rendered = manifests.render_with(tmp_path, [manifests.COMPONENTS / "ingress"], [manifests.BASE])
    (ingress,) = of_kind(rendered, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    passed = [(each["path"], each["pathType"]) for each in rule["http"]["paths"]]

    def passes(path: str) -> bool:
        return any(
            path == start or (kind == "Prefix" and path.startswith(f"{start}/")) for start, kind in passed
        )

    app = create_app(settings.load(data_dir=tmp_path))
    served = {*app.openapi()["paths"], "/docs", "/docs/swagger-ui.css", "/openapi.json"}
    assert {path for path in served if not passes(path)} == {"/livez", "/readyz", "/metrics"}


def policies(rendered: tuple[Manifest, ...], template: Manifest) -> list[Manifest]:
    """Return the specs of the policies that select a pod."""
    return [
        policy["spec"]
        for policy in of_kind(rendered, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pods.labels(template))
    ]
