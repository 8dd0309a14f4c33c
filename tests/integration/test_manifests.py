"""The manifests under k8s/strimzi: they render, are valid, fit together, and say what the code says."""

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import pytest
import typer.main
import yaml

from agents.app import STEPS
from agents.site import Site
from gateway.app import create_app
from millrace.cli import app as command_line
from pipeline import settings
from pipeline.settings import PREFIX, Settings
from tests.support import manifests, operators, pods, schemas
from tests.support.manifests import COMPONENTS, Manifest, find, name_of, of_kind, pod_template, selects

pytestmark = manifests.MAY_BUILD

# What a user makes before, see docs/kubernetes.md: secrets and the keys that pods read of them.
BROUGHT: Mapping[str, Mapping[str, frozenset[str]]] = {
    "dev": {},
    "production": {
        "millrace-database": frozenset({"url", "password"}),
        "millrace-api-keys": frozenset({"keys"}),
        "millrace-object-store": frozenset(),
        "millrace-receivers": frozenset({"receivers.yaml"}),
    },
}
# Made by Strimzi for each Kafka and each user.
CLUSTER_SECRETS = {"millrace-cluster-ca-cert": frozenset({"ca.crt"})}
USER_KEYS = frozenset({"password", "ca.crt", "user.crt", "user.key"})
# Components that a deployment of models lists in its own folder.
OF_A_DEPLOYMENT = {"deployment", "gpu-dra", "scaling-deadline", "scaling-lag", "secured-deployment"}
# Part of base.
NOT_LISTED = {"pods"}
# Newer than the oldest Kubernetes that the rest is for.
VERSIONS = {"gpu-dra": "1.34"}

OVERLAYS = [path.name for path in manifests.overlays()]
LISTED = [
    path.relative_to(COMPONENTS).as_posix() for path in manifests.components() if path.name not in NOT_LISTED
]


# Production with client certificates instead of passwords: what the comments of its overlay offer.
MTLS = "production-mtls"
TAKE_THE_PLACE_OF = {"secured": "secured-mtls", "keda-scram": "keda-mtls"}


@functools.cache
def overlay(name: str) -> tuple[Manifest, ...]:
    if name != MTLS:
        return manifests.render(manifests.OVERLAYS / name)
    production = manifests.OVERLAYS / "production"
    listed = [TAKE_THE_PLACE_OF.get(each, each) for each in components_of(production)]
    with tempfile.TemporaryDirectory() as folder:
        return manifests.render_with(
            Path(folder),
            [COMPONENTS / each for each in listed],
            [manifests.BASE, production / "predict-default"],
        )


def components_of(folder: Path) -> list[str]:
    """Return the names of the components that an overlay lists."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))["components"]
    return [Path(each).name for each in listed]


def with_component(folder: Path, name: str) -> tuple[Manifest, ...]:
    """Render base, a deployment of models and one component, where it belongs."""
    within = OF_A_DEPLOYMENT & set(name.split("/"))
    own = [COMPONENTS / name] if within and name != "deployment" else []
    deployment = manifests.write_deployment(folder / "predict-default", "default", own)
    return manifests.render_with(folder, [] if within else [COMPONENTS / name], [manifests.BASE, deployment])


@pytest.mark.parametrize("name", [*OVERLAYS, MTLS])
def test_every_overlay_is_valid(name: str) -> None:
    """An API server that refuses unknown fields takes every object of every overlay."""
    rendered = overlay(name)
    assert_valid(rendered, schemas.OLDEST_KUBERNETES)
    assert {each["metadata"].get("namespace", "millrace") for each in rendered} >= {"millrace"}


@pytest.mark.parametrize("name", LISTED)
def test_every_component_is_valid(name: str, tmp_path: Path) -> None:
    """Every component renders on top of base and a deployment of models, and is valid."""
    version = max(VERSIONS.get(part, schemas.OLDEST_KUBERNETES) for part in name.split("/"))
    assert_valid(with_component(tmp_path, name), version)


def assert_valid(rendered: Sequence[Manifest], version: str) -> None:
    found: list[str] = []
    unchecked: set[str] = set()
    for each in rendered:
        try:
            found += schemas.faults(each, version)
        except schemas.NoSchemaError as error:
            unchecked.add(str(error))
    assert found == []
    if unchecked:
        pytest.skip("; ".join(sorted(unchecked)))


@pytest.mark.parametrize("name", OVERLAYS)
def test_objects_are_there_once(name: str) -> None:
    """No object of an overlay replaces another."""
    identities = [(each["apiVersion"], name_of(each)) for each in overlay(name)]
    assert sorted(identities) == sorted(set(identities))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_step_has_its_workload(name: str) -> None:
    """Each step of the code is a Deployment that runs it, and nothing is run that is not there."""
    run = {tuple(pods.main_container(template)["command"]) for _, template in pods.of_ours(overlay(name))}
    steps = {command[3] for command in run if command[:3] == ("python", "-m", "agents")}
    assert steps == set(STEPS)
    others = {command for command in run if command[:3] != ("python", "-m", "agents")}
    assert ("python", "-m", "gateway") in others
    for command in others - {("python", "-m", "gateway")}:
        assert_parses(command)
    for each in manifests.containers(find(overlay(name), "Deployment", "store")["spec"]["template"]):
        if each["name"] == "migrate":
            assert_parses(tuple(each["command"]))


def assert_parses(command: tuple[str, ...]) -> None:
    """The command line takes these words; it ends the test where it does not."""
    program, subcommand, *arguments = command
    assert program == "millrace"
    group = typer.main.get_command(command_line)
    found = group.get_command(typer.Context(group), subcommand)  # type: ignore[attr-defined]
    assert found is not None, subcommand
    found.make_context(subcommand, list(arguments))


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select_their_own_pods(name: str) -> None:
    """A workload's selector selects its pods and no other workload's; so does what spreads them."""
    every = manifests.workloads(overlay(name))
    for workload, _ in every:
        if workload["kind"] == "CronJob":
            continue
        selector = workload["spec"]["selector"]
        assert [name_of(other) for other, template in every if selects(selector, pods.labels(template))] == [
            name_of(workload)
        ]
        for spread in workload["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selects(spread["labelSelector"], pods.labels(workload["spec"]["template"]))


@pytest.mark.parametrize("name", [*OVERLAYS, MTLS])
def test_nothing_points_into_the_void(name: str) -> None:
    """Budgets guard one workload, policies and monitors select pods, scalers scale what is there."""
    rendered = overlay(name)
    every = [
        (name_of(workload), pods.labels(template)) for workload, template in manifests.workloads(rendered)
    ]
    guarded: list[str] = []
    for budget in of_kind(rendered, "PodDisruptionBudget"):
        found = [owner for owner, labels in every if selects(budget["spec"]["selector"], labels)]
        assert len(found) == 1, (name_of(budget), found)
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        guarded += found
    deployments = [name_of(each) for each, _ in pods.of_ours(rendered) if each["kind"] == "Deployment"]
    assert sorted(guarded) == sorted(deployments)
    strimzi = [pods.labels(template) for template in operators.strimzi_pods(rendered)]
    keda = list(operators.KEDA.values())
    for policy in of_kind(rendered, "NetworkPolicy", "PodMonitor"):
        selector = policy["spec"].get("podSelector", policy["spec"].get("selector"))
        if "namespaceSelector" in policy["spec"]:
            assert all(selects(selector, labels) for labels in keda), name_of(policy)
            continue
        known = [labels for _, labels in every] + strimzi
        assert any(selects(selector, labels) for labels in known), name_of(policy)
    for scaler in of_kind(rendered, "ScaledObject", "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        scaled = find(rendered, target.get("kind", "Deployment"), target["name"])
        assert "replicas" not in scaled["spec"], (
            f"{name_of(scaled)}: applying it again would undo the scaling"
        )
    for service in of_kind(rendered, "Service"):
        chosen = [
            template
            for _, template in manifests.workloads(rendered)
            if selects({"matchLabels": service["spec"]["selector"]}, pods.labels(template))
        ]
        assert len(chosen) == 1
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(pods.main_container(chosen[0]))


@pytest.mark.parametrize("name", [*OVERLAYS, MTLS])
def test_what_pods_need_is_there(name: str) -> None:
    """Whatever a pod names (ConfigMap, Secret, key, claim) is rendered, Strimzi's, or the user's to bring."""
    rendered = overlay(name)
    users = {each["metadata"]["name"]: USER_KEYS for each in of_kind(rendered, "KafkaUser")}
    for workload, template in manifests.workloads(rendered):
        for kind, wanted, key in pods.references(workload, template):
            where = f"{name_of(workload)} needs {kind} {wanted}, key {key}"
            given = {**BROUGHT[name.removesuffix("-mtls")], **CLUSTER_SECRETS, **users}
            if kind == "Secret" and wanted in given:
                assert key is None or key in given[wanted], where
                continue
            found = [each for each in of_kind(rendered, kind) if each["metadata"]["name"] == wanted]
            assert found, where
            assert key is None or key in found[0]["data"], where


@pytest.mark.parametrize("name", [*OVERLAYS, MTLS])
def test_pods_start_with_their_settings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable of ours is a setting, together they are accepted, and ports and times agree with them."""
    rendered = overlay(name)
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for workload, template in pods.of_ours(rendered):
        for container in manifests.containers(template):
            named = {key for key in pods.environment(container, rendered) if key.startswith(PREFIX)}
            assert named <= known, f"{name_of(workload)}: {named - known}"
            with monkeypatch.context() as patch:
                read = pods.settings_of(container, rendered, patch, tmp_path)
            ports = ports_of(container)
            assert ports.get("metrics", read.worker_port) == read.worker_port
            assert ports.get("http", read.gateway_port) == read.gateway_port
            if "http" in ports:
                assert read.gateway_host == "0.0.0.0"
            if "metrics" in ports:
                assert read.worker_host == "0.0.0.0"
            sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            # A tenth more: a process that is late ends itself first, and says so.
            assert (
                template["spec"]["terminationGracePeriodSeconds"] >= sleep + 1.1 * read.shutdown_grace_seconds
            )
            if pods.component(template) == "predict":
                assert workload["metadata"]["name"] == f"predict-{read.deployment}"


def ports_of(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


@pytest.mark.parametrize("name", OVERLAYS)
async def test_probes_ask_what_is_served(name: str, tmp_path: Path) -> None:
    """Every probe of a pod that runs for ever names a path and a port that its process serves."""
    asked: dict[str, set[str]] = {"http": set(), "metrics": set()}
    for workload, template in pods.of_ours(overlay(name)):
        container = pods.main_container(template)
        if workload["kind"] == "CronJob":
            continue
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            request = container[probe]["httpGet"]
            assert request["port"] in ports_of(container)
            asked[request["port"]].add(request["path"])
        # Dependencies that are away kill no pod.
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert asked["http"] <= set(create_app(settings.load(data_dir=tmp_path)).openapi()["paths"])
    site = Site(settings.load(), live=lambda: None, ready=lambda: None)
    await site.start()
    try:
        async with aiohttp.ClientSession() as session:
            for path in asked["metrics"]:
                async with session.get(f"http://127.0.0.1:{site.port}{path}") as response:
                    assert response.status == 200, path
    finally:
        await site.stop()


def test_scarce_gpus_are_not_asked_for_twice() -> None:
    """With GPUs, a rollout ends an old pod before it starts a new one, and none falls back to the CPU."""
    for workload, template in pods.of_ours(overlay("production")):
        if pods.component(template) == "predict":
            container = pods.main_container(template)
            assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
            assert pods.environment(container, overlay("production"))["MILLRACE_DEVICE"] == "cuda"


@pytest.mark.parametrize(("name", "limits"), [("gpu-mig", {"nvidia.com/mig-1g.10gb"}), ("gpu-dra", set())])
def test_variants_of_gpus_take_the_place_of_the_whole(name: str, limits: set[str], tmp_path: Path) -> None:
    """A slice or a claim stands instead of nvidia.com/gpu, not beside it."""
    rendered = with_component(tmp_path, name)
    template = pod_template(find(rendered, "Deployment", "predict-default"))
    assert template is not None
    resources = pods.main_container(template)["resources"]
    assert {each for each in resources["limits"] if each.startswith("nvidia.com/")} == limits
    if name == "gpu-dra":
        assert resources["claims"] == [{"name": "gpu"}]
        assert template["spec"]["resourceClaims"] == [
            {"name": "gpu", "resourceClaimTemplateName": find(rendered, "ResourceClaimTemplate", "predict-default")
             ["metadata"]["name"]}
        ]  # fmt: skip


def test_a_deployment_of_models_is_a_few_lines(tmp_path: Path) -> None:
    """The example in components/deployment, as it stands there, adds a second deployment to production."""
    folder = tmp_path / "predict-wildlife"
    folder.mkdir()
    example = yaml.safe_load(example_of(COMPONENTS / "deployment" / "kustomization.yaml"))
    example["components"] = [
        os.path.relpath(COMPONENTS / Path(each).name, folder.resolve()) for each in example["components"]
    ]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(example))
    production = manifests.OVERLAYS / "production"
    rendered = manifests.render_with(
        tmp_path,
        [COMPONENTS / each for each in components_of(production)],
        [manifests.BASE, production / "predict-default", folder],
    )
    wildlife = pod_template(find(rendered, "Deployment", "predict-wildlife"))
    default = pod_template(find(rendered, "Deployment", "predict-default"))
    assert wildlife is not None
    assert default is not None
    values = pods.environment(pods.main_container(wildlife), rendered)
    assert values["MILLRACE_DEPLOYMENT"] == "wildlife"
    assert values["MILLRACE_MODELS"] == "torchvision:efficientnet_v2_s"
    assert values["MILLRACE_KAFKA_SASL_USERNAME"] == "predict-wildlife"
    budget = find(rendered, "PodDisruptionBudget", "predict-wildlife")["spec"]["selector"]
    assert [selects(budget, pods.labels(each)) for each in (wildlife, default)] == [True, False]
    monitors = [each["spec"]["selector"] for each in of_kind(rendered, "PodMonitor")]
    assert any(selects(each, pods.labels(wildlife)) for each in monitors)
    scaler = find(rendered, "ScaledObject", "predict-wildlife")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "predict-wildlife"
    groups = {trigger["metadata"].get("consumerGroup") for trigger in scaler["spec"]["triggers"]} - {None}
    assert groups == {"predict.wildlife"}
    user = find(rendered, "KafkaUser", "predict-wildlife")
    readable = [
        acl["resource"] for acl in user["spec"]["authorization"]["acls"] if acl["resource"]["type"] == "group"
    ]
    assert [each["name"] for each in readable] == ["predict.wildlife"]
    # Nothing of the one's name is left in the other's objects.
    for each in rendered:
        if each["metadata"]["name"].startswith("predict-wildlife"):
            assert "default" not in yaml.safe_dump(each).replace("defaultMode", ""), name_of(each)


@functools.cache
def example_of(file: Path) -> str:
    """Return the YAML that a comment of a file shows, indented by three."""
    lines = [line[4:] for line in file.read_text("utf-8").splitlines() if line.startswith("#   ")]
    assert lines, file
    return "\n".join(lines)
