"""Kafka's part of the manifests: limits that fit the topic table, and every workload connected as its own user."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from millrace import kafka
from pipeline import rights
from pipeline.settings import PREFIX, load
from pipeline.topics import TOPICS
from tests.support import manifests, operators
from tests.support.manifests import BASE, COMPONENTS, OVERLAYS, Manifest

MOUNTS = {"kafka-ca": "/etc/millrace/kafka/ca", "kafka-user": "/etc/millrace/kafka/user"}
SECURED = {
    "secured": ("scram-sha-512", {"password"}),
    "secured-mtls": ("tls", {"user.crt", "user.key"}),
}


@pytest.mark.parametrize("component", ["kafka-single", "kafka-production"])
def test_brokers_fit_the_topic_table(component: str, tmp_path: Path) -> None:
    """Brokers take what topics allow, make no topic by themselves, and keep the place of groups that sleep."""
    rendered = manifests.render_with(tmp_path, [COMPONENTS / component], [BASE])
    (spec,) = (each["spec"]["kafka"] for each in manifests.of_kind(rendered, "Kafka"))
    config = spec["config"]
    largest = max(int(topic.config()["max.message.bytes"]) for topic in TOPICS)
    assert largest <= config["message.max.bytes"] <= config["replica.fetch.max.bytes"]
    assert config["auto.create.topics.enable"] is False
    assert config["offsets.retention.minutes"] == kafka._OFFSETS_RETENTION_MINUTES
    assert config["message.max.bytes"] == kafka._MAX_RECORD_BYTES
    # Each version of the operator knows other versions of Kafka, and refuses the rest: its own default is right.
    assert not spec.keys() & {"version", "metadataVersion"}
    # Default quotas bind the topic operator, too, which alone makes topics.
    assert "controllerMutationRate" not in spec.get("quotas", {})
    pools = manifests.of_kind(rendered, "KafkaNodePool")
    brokers = sum(pool["spec"]["replicas"] for pool in pools if "broker" in pool["spec"]["roles"])
    replicas = config["default.replication.factor"]
    assert config["min.insync.replicas"] == max(1, replicas - 1)
    assert replicas == brokers


def test_topics_are_those_of_the_table() -> None:
    """An overlay has a KafkaTopic for each topic of the table, with its partitions and configuration."""
    found = {
        each["metadata"]["name"]: (each["spec"]["partitions"], each["spec"]["config"])
        for each in manifests.of_kind(manifests.render(OVERLAYS / "production"), "KafkaTopic")
    }
    texts = {
        name: (count, {key: str(value) for key, value in config.items()})
        for name, (count, config) in found.items()
    }
    assert texts == {topic.name: (topic.partitions, topic.config()) for topic in TOPICS}


@pytest.mark.parametrize("component", SECURED)
def test_every_workload_connects_as_its_own_user(component: str, tmp_path: Path) -> None:
    """Each workload has a KafkaUser of its name, and mounts its secret where the shared settings look for it."""
    rendered = secured(component, tmp_path, "default", "wildlife")
    kind, files = SECURED[component]
    users = {each["metadata"]["name"]: each["spec"] for each in manifests.of_kind(rendered, "KafkaUser")}
    assert users.keys() == {user.name for user in rights.users(["default", "wildlife"])}
    assert {spec["authentication"]["type"] for spec in users.values()} == {kind}
    found = manifests.workloads(rendered)
    assert {"predict-default", "predict-wildlife", "collect", "retention", "gateway"} <= {
        each["metadata"]["name"] for each, _ in found
    }
    for workload, template in found:
        name = workload["metadata"]["name"]
        assert name in users
        (container,) = template["spec"]["containers"]
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert MOUNTS.items() <= mounts.items(), name
        volumes = {
            each["name"]: each.get("secret", {}).get("secretName") for each in template["spec"]["volumes"]
        }
        assert (volumes["kafka-ca"], volumes["kafka-user"]) == ("millrace-cluster-ca-cert", name)
        values = {each["name"]: each.get("value") for each in container["env"]}
        assert values[PREFIX + "KAFKA_SASL_USERNAME"] == name
    settings = shared_settings(rendered, tmp_path, {"ca.crt"}, files)
    loaded = load(**settings, kafka_sasl_username="archive")
    listener = {"secured": "9093", "secured-mtls": "9094"}[component]
    host, _, port = loaded.resolved_kafka.partition(":")
    assert (host.split(".")[0], port) == ("millrace-kafka-bootstrap", listener)


def test_a_deployments_user_has_its_own_group(tmp_path: Path) -> None:
    """The user of a deployment that somebody adds has the rights of the table, under its own name."""
    rendered = secured("secured", tmp_path, "default", "wildlife")
    for deployment in ("default", "wildlife"):
        found = manifests.find(rendered, "KafkaUser", f"predict-{deployment}")["spec"]["authorization"][
            "acls"
        ]
        assert [
            (acl["resource"]["type"], acl["resource"]["name"], tuple(acl["operations"])) for acl in found
        ] == [(acl.resource, acl.name, acl.operations) for acl in rights.predict(deployment).acls]


def test_listeners_let_workloads_in(tmp_path: Path) -> None:
    """Listeners have the ports that `secured` and `secured-mtls` use, and let workloads and any KEDA in."""
    rendered = manifests.render_with(tmp_path, [COMPONENTS / "kafka-production"], [BASE])
    (spec,) = (each["spec"]["kafka"] for each in manifests.of_kind(rendered, "Kafka"))
    listeners = {each["port"]: each for each in spec["listeners"]}
    assert {port: each["authentication"]["type"] for port, each in listeners.items()} == {
        9093: "scram-sha-512", 9094: "tls"
    }  # fmt: skip
    assert spec["authorization"] == {"type": "simple"}
    for listener in listeners.values():
        assert listener["tls"] is True
        own = [
            peer["podSelector"] for peer in listener["networkPolicyPeers"] if "namespaceSelector" not in peer
        ]
        for workload, template in manifests.workloads(rendered):
            labels = template["metadata"]["labels"]
            assert any(manifests.selects(peer, labels) for peer in own), workload["metadata"]["name"]
        there = {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}
        (scaler,) = (
            peer["podSelector"]
            for peer in listener["networkPolicyPeers"]
            if peer.get("namespaceSelector") == there
        )
        for way, labels in operators.KEDA.items():
            assert manifests.selects(scaler, labels), way


def secured(component: str, tmp_path: Path, *deployments: str) -> tuple[Manifest, ...]:
    """Render an installation with several deployments of models, as its owner would write it."""
    folders = []
    for name in deployments:
        folder = tmp_path / f"predict-{name}"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "configMapGenerator": [
                        {"name": f"predict-{name}", "literals": [f"MILLRACE_DEPLOYMENT={name}"]}
                    ],
                    "components": [
                        relative(folder, COMPONENTS / each) for each in ("deployment", "secured-deployment")
                    ],
                }
            )
        )
        folders.append(folder)
    components = [COMPONENTS / each for each in ("collector", "kafka-production", component)]
    return manifests.render_with(tmp_path, components, [BASE, *folders])


def relative(folder: Path, target: Path) -> str:
    return os.path.relpath(target, folder.resolve())


def shared_settings(rendered: tuple[Manifest, ...], folder: Path, *files: set[str]) -> dict[str, Any]:
    """Return Kafka's settings in the ConfigMap that all workloads take, with files in a folder of the test's."""
    for name in set().union(*files):
        (folder / name).write_text("secret")
    (data,) = (
        each["data"]
        for each in manifests.of_kind(rendered, "ConfigMap")
        if f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS" in each["data"]
    )
    values = {name.removeprefix(PREFIX).lower(): value for name, value in data.items() if "_KAFKA_" in name}
    for name, value in values.items():
        if name.endswith("_file"):
            mount, _, file = value.rpartition("/")
            assert mount in MOUNTS.values()
            values[name] = str(folder / file)
    return values
