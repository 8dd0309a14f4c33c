"""ScaledObjects, HPA and TriggerAuthentication as the overlays render them."""

import json
import os
import re
from functools import reduce
from pathlib import Path

import pytest
import yaml

from loadtest.autoscale import bench, policies, traces
from loadtest.autoscale.cluster import Pods
from loadtest.autoscale.expression import compile_formula
from loadtest.autoscale.optimum import optimum
from loadtest.autoscale.simulate import run
from pipeline.settings import load
from pipeline.topics import MODELS, TOPICS
from tests.support import manifests, scaling
from tests.support.manifests import Manifest

pytestmark = manifests.MAY_BUILD
BENCHMARKS = Path(__file__).parents[2] / "docs/benchmarks"
NAMES = ("archive", "notify", "predict-default", "record", "store", "watch")
#: What has nothing to do without records.
MAY_SLEEP = {"archive", "predict-default", "watch"}
#: By ScaledObject and trigger: where the rate of one replica is kept, and how many seconds of its work may wait.
_ENGINE = "engine.json models mobilenet_v3_small offline pipeline_images_per_second"
_RECORD = "telemetry.json record many record records_per_second"
MEASURED = {
    ("predict-default", "realtime"): (_ENGINE, 150.0),
    ("predict-default", "bulk"): (_ENGINE, 150.0),
    ("archive", "realtime"): ("steps.json archive records_per_second", 30.0),
    ("archive", "bulk"): ("steps.json archive records_per_second", 30.0),
    ("store", "predictions"): ("steps.json store records_per_second", 15.0),
    ("record", "samples"): (_RECORD, 15.0),
    ("record", "windows"): (_RECORD, 1.5),
}
EVERY = pytest.mark.parametrize("name", NAMES)
ANY = pytest.mark.parametrize("overlay", manifests.overlays(), ids=lambda path: path.name)
KAFKA_SECURED = {"scram": {"tls": "enable", "sasl": "scram_sha512"}, "mtls": {"tls": "enable"}}


def production() -> tuple[Manifest, ...]:
    return manifests.render(manifests.OVERLAYS / "production")


def scaled(name: str) -> Manifest:
    return manifests.find(production(), "ScaledObject", name)


def triggers(rendered: tuple[Manifest, ...], trigger_type: str) -> list[Manifest]:
    return [
        trigger
        for each in manifests.of_kind(rendered, "ScaledObject")
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == trigger_type
    ]


def deployment_folder(tmp_path: Path, name: str, policy: str) -> Path:
    """Make the folder of a deployment of models, as components/deployment says."""
    folder = tmp_path / f"predict-{name}"
    folder.mkdir()
    parts = [manifests.COMPONENTS / "deployment", manifests.COMPONENTS / f"scaling-{policy}"]
    kustomization = {
        "configMapGenerator": [{"name": folder.name, "literals": [f"MILLRACE_DEPLOYMENT={name}"]}],
        "components": [os.path.relpath(each, folder.resolve()) for each in parts],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


@ANY
def test_what_is_rendered_is_what_keda_takes(overlay: Path) -> None:
    """ScaledObjects and TriggerAuthentications are valid for KEDA, without a field or parameter unknown to it."""
    rendered = manifests.of_kind(manifests.render(overlay), "ScaledObject", "TriggerAuthentication")
    assert {each["metadata"]["name"] for each in rendered} >= set(NAMES)
    for each in rendered:
        scaling.check(each)


@ANY
def test_each_workload_is_scaled_by_one(overlay: Path) -> None:
    """Every Deployment of ours has one ScaledObject, the gateway an HPA, and none counts its replicas itself."""
    rendered = manifests.render(overlay)
    ours = [
        each
        for each in manifests.of_kind(rendered, "Deployment")
        if each["metadata"]["labels"]["app.kubernetes.io/name"] == "millrace"
    ]
    targets = [
        each["spec"]["scaleTargetRef"]["name"]
        for each in manifests.of_kind(rendered, "ScaledObject", "HorizontalPodAutoscaler")
    ]
    assert sorted(targets) == sorted(each["metadata"]["name"] for each in ours)
    assert [each["metadata"]["name"] for each in ours if "replicas" in each["spec"]] == []
    assert manifests.find(rendered, "HorizontalPodAutoscaler", "gateway")["spec"]["minReplicas"] > 0


@EVERY
def test_triggers_ask_for_what_the_step_reads(name: str) -> None:
    """Groups, topics and the most replicas are the code's: all lanes, and as many replicas as partitions."""
    step = name.partition("-")[0]
    topics = {topic.name: topic for topic in TOPICS if step in topic.consumers}
    # One partition and a few records a minute: no second replica could help.
    wanted = {each for each in topics if each != MODELS.name}
    kafka = [each["metadata"] for each in scaled(name)["spec"]["triggers"] if each["type"] == "kafka"]
    assert {each["topic"] for each in kafka} == wanted
    assert {each["consumerGroup"] for each in kafka} == {load().group(step)}
    assert scaled(name)["spec"]["maxReplicaCount"] == max(topics[each].partitions for each in wanted)
    for each in kafka:
        assert each["offsetResetPolicy"] == "earliest"
        assert each["allowIdleConsumers"] == "true"
        assert {"excludePersistentLag", "limitToPartitionsWithLag"} & set(each) == set()


@EVERY
def test_who_may_sleep_and_who_holds_still(name: str) -> None:
    """Steps with work of their own never sleep; the way up is quicker than down; without Kafka nothing changes."""
    found = scaling.read(scaled(name))
    assert found.min_replicas == (0 if name in MAY_SLEEP else 1)
    assert found.behavior.up.window_seconds < found.behavior.down.window_seconds
    assert found.behavior.up.tolerance == 0
    # KEDA puts to sleep what it cannot look at if there are no replicas to fall back on.
    assert found.fallback is not None
    assert found.fallback.replicas > 0
    # What is not above it is put to sleep whatever the HPA wants.
    kafka = [each["metadata"] for each in scaled(name)["spec"]["triggers"] if each["type"] == "kafka"]
    assert {each["activationLagThreshold"] for each in kafka} == {"0"}


@pytest.mark.parametrize(("name", "trigger"), MEASURED)
def test_thresholds_are_what_was_measured(name: str, trigger: str) -> None:
    """A lagThreshold is the measured rate of one replica times the seconds that its comment says."""
    (file, *path), seconds = MEASURED[name, trigger][0].split(), MEASURED[name, trigger][1]
    rate: float = reduce(lambda value, key: value[key], path, json.loads((BENCHMARKS / file).read_bytes()))
    (found,) = (each for each in scaled(name)["spec"]["triggers"] if each["name"] == trigger)
    # Another run of the benchmark may differ a little; a threshold needs no third digit.
    assert int(found["metadata"]["lagThreshold"]) == pytest.approx(rate * seconds, rel=0.25)


@ANY
def test_addresses_are_in_one_place(overlay: Path) -> None:
    """KEDA asks Kafka where the pods find it, by a name that is good in another namespace, and one Prometheus."""
    rendered = manifests.render(overlay)
    kafka = {each["metadata"]["bootstrapServers"] for each in triggers(rendered, "kafka")}
    (settings,) = (
        each["data"]
        for each in manifests.of_kind(rendered, "ConfigMap")
        if re.fullmatch(r"millrace(-[a-z0-9]{10})?", each["metadata"]["name"])
    )
    assert kafka == {settings["MILLRACE_KAFKA_BOOTSTRAP_SERVERS"]}
    assert all(re.search(r"\.millrace\.svc:[0-9]+$", address) for address in kafka)
    known = yaml.safe_load((manifests.COMPONENTS / "scaling-addresses/addresses.yaml").read_text())
    asked = {each["metadata"]["serverAddress"] for each in triggers(rendered, "prometheus")}
    assert asked <= {known["data"]["prometheus"]}
    assert "scaling-addresses" not in {each["metadata"]["name"] for each in rendered}


@pytest.mark.parametrize("way", KAFKA_SECURED)
def test_keda_proves_who_it_is(way: str, tmp_path: Path) -> None:
    """With TLS every trigger of Kafka has the one TriggerAuthentication, whose parts are Strimzi's secrets."""
    folder = deployment_folder(tmp_path, "wildlife", "lag")
    rendered = manifests.render_with(
        tmp_path, [manifests.COMPONENTS / f"keda-{way}"], [manifests.BASE, folder]
    )
    found = triggers(rendered, "kafka")
    assert len(found) == 10
    authentication = manifests.find(rendered, "TriggerAuthentication", "kafka")
    for trigger in found:
        assert trigger["authenticationRef"] == {"name": "kafka"}
        assert {k: v for k, v in trigger["metadata"].items() if k in {"tls", "sasl"}} == KAFKA_SECURED[way]
    secrets = {
        each["parameter"]: (each["name"], each["key"]) for each in authentication["spec"]["secretTargetRef"]
    }
    mine = {"scram": {"password": "password"}, "mtls": {"cert": "user.crt", "key": "user.key"}}[way]
    assert secrets == {
        "ca": ("millrace-cluster-ca-cert", "ca.crt"),
        **{parameter: ("keda", key) for parameter, key in mine.items()},
    }
    given = set(secrets)
    if way == "scram":
        (user,) = authentication["spec"]["configMapTargetRef"]
        assert manifests.find(rendered, "ConfigMap", user["name"])["data"][user["key"]] == "keda"
        given.add(user["parameter"])
    scaling.check(authentication)
    for trigger in found:
        scaling.check_trigger(trigger)
    known = scaling.parameters("kafka")
    assert all(known[name].get("triggerAuthenticationVariableReadable") for name in given)


@ANY
def test_keys_are_where_kafka_wants_them(overlay: Path) -> None:
    """Where pods prove who they are KEDA does too, in every trigger of Kafka; without that it has no key."""
    rendered = manifests.render(overlay)
    is_secured = manifests.of_kind(rendered, "KafkaUser") != []
    assert is_secured == (overlay.name == "production")
    found = [each.get("authenticationRef") for each in triggers(rendered, "kafka")]
    assert found == [{"name": "kafka"} if is_secured else None] * 10
    assert len(manifests.of_kind(rendered, "TriggerAuthentication")) == int(is_secured)


@pytest.mark.parametrize("policy", ["lag", "deadline"])
def test_another_deployment_is_scaled_by_its_own_lag(policy: str, tmp_path: Path) -> None:
    """A deployment's folder scales its own Deployment, by its own group, pods and metrics, as planned."""
    rendered = manifests.render(deployment_folder(tmp_path, "wild-life", policy))
    (found,) = manifests.of_kind(rendered, "ScaledObject")
    (target,) = manifests.of_kind(rendered, "Deployment")
    assert found["spec"]["scaleTargetRef"]["name"] == target["metadata"]["name"] == "predict-wild-life"
    facts = policies.Facts(pod_images_per_second=227.0, deployment="wild-life")
    planned = policies.deadline(facts) if policy == "deadline" else policies.lag(facts)
    assert found == planned.manifest()
    for trigger in found["spec"]["triggers"]:
        if trigger["type"] == "kubernetes-workload":
            labels = target["spec"]["template"]["metadata"]["labels"]
            wanted = dict(each.split("=") for each in trigger["metadata"]["podSelector"].split(","))
            assert wanted.items() <= labels.items()
            assert target["spec"]["selector"]["matchLabels"] == wanted


def test_queries_name_the_pods_of_one_deployment() -> None:
    """What is asked of Prometheus is about this Deployment's pods: not those of another that begins like it."""
    queries = {each["name"]: each["metadata"]["query"] for each in triggers(production(), "prometheus")}
    patterns = {pattern for query in queries.values() for pattern in re.findall(r'pod=~"([^"]+)"', query)}
    (pattern,) = patterns
    assert re.fullmatch(pattern, "predict-default-5d9c7bdb8b-x2x7q")
    assert not re.fullmatch(pattern, "predict-default-two-5d9c7bdb8b-x2x7q")
    (group,) = re.findall(r'consumergroup=~"([^"]+)"', queries["waited"])
    assert re.fullmatch(group.replace("\\\\", "\\"), load().group("predict"))


def test_the_shipped_formula_holds() -> None:
    """KEDA's webhook computes the formula with every trigger at -1; while one is away it gives replicas, too."""
    found = scaling.read(scaled("predict-default"))
    assert found.modifiers is not None
    compute = compile_formula(found.modifiers.formula)
    names = [trigger.name for trigger in found.triggers]
    assert compute(dict.fromkeys(names, -1.0)) < found.max_replicas
    usual = dict.fromkeys(names, 1.0)
    for gone in names:
        if gone != "pods":  # from the API server itself
            assert 0 <= compute(usual | {gone: None}) <= found.max_replicas


@pytest.mark.parametrize(("overlay", "kept"), [("production", True), ("dev", False)])
def test_the_shipped_scaled_objects_in_the_simulator(overlay: str, kept: bool) -> None:
    """Production's ScaledObject keeps its deadline at a price; development's, by lag alone, keeps not both."""
    found = scaling.read(
        manifests.find(manifests.render(manifests.OVERLAYS / overlay), "ScaledObject", "predict-default")
    )
    facts = policies.Facts(pod_images_per_second=227.0)
    pods = Pods(facts.pod_images_per_second, facts.start_seconds)
    trace = traces.make("burst", 1, seconds=5400)
    ended = run(trace, found, facts.deadline_seconds, pods=pods, seed=1)
    cost = ended.gpu_seconds / optimum(trace, pods, facts.deadline_seconds)
    is_kept = ended.violations_ratio <= bench.MOST_VIOLATIONS and cost <= bench.MOST_COST
    assert is_kept == kept, (ended.violations_ratio, cost)
