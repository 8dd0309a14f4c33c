"""Kafka's part of the manifests, made from the tables of topics and rights: KafkaTopics and KafkaUsers.

`make manifests` writes them into k8s/; a test holds the files equal to the tables. Nothing here talks to anybody.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pipeline import rights
from pipeline.rights import Acl, Quotas, User
from pipeline.topics import TOPICS, Topic

API_VERSION = "kafka.strimzi.io/v1"
#: The Kafka resource to which topics and users belong.
CLUSTER = "millrace"
#: Where the generated files are, in the repository.
FILES = {
    "topics": "k8s/strimzi/base/topics.yaml",
    "users": "k8s/strimzi/components/kafka-users/users.yaml",
    # Of any deployment of models: kustomize puts its name in.
    "deployment": "k8s/strimzi/components/secured-deployment/user.yaml",
}

Authentication = Literal["scram-sha-512", "tls"]
Manifest = dict[str, Any]

_MADE = "# Made by `make manifests` from {table}: change that and make it again.\n"


def topic(topic: Topic, prefix: str = "", cluster: str = CLUSTER) -> Manifest:
    """Return the KafkaTopic of one topic; how many replicas it has is the brokers' own default."""
    name = prefix + topic.name
    config = {key: int(value) if value.isdigit() else value for key, value in topic.config().items()}
    # A resource's name has neither capitals nor underscores, a topic's may.
    resource = name.lower().replace("_", "-").strip("-.")
    return _manifest("KafkaTopic", resource, cluster) | {
        "spec": ({} if resource == name else {"topicName": name})
        | {"partitions": topic.partitions, "config": config}
    }


def user(user: User, authentication: Authentication = "scram-sha-512", cluster: str = CLUSTER) -> Manifest:
    """Return the KafkaUser of one user."""
    return _manifest("KafkaUser", user.name, cluster) | {
        "spec": {
            "authentication": {"type": authentication},
            "authorization": {"type": "simple", "acls": [_acl(acl) for acl in user.acls]},
            "quotas": _quotas(user.quotas),
        }
    }


def _manifest(kind: str, name: str, cluster: str) -> Manifest:
    labels = {
        "strimzi.io/cluster": cluster,
        "app.kubernetes.io/name": "millrace",
        "app.kubernetes.io/part-of": "millrace",
        "app.kubernetes.io/component": "kafka",
    }
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name, "labels": labels}}


def _acl(acl: Acl) -> Manifest:
    pattern = "prefix" if acl.is_prefix else "literal"
    return {
        "resource": {"type": acl.resource, "name": acl.name, "patternType": pattern},
        "operations": list(acl.operations),
    }


def _quotas(quotas: Quotas) -> Manifest:
    return {
        "producerByteRate": quotas.producer_bytes_per_second,
        "consumerByteRate": quotas.consumer_bytes_per_second,
        "requestPercentage": quotas.request_percentage,
    }


def render(which: str) -> str:
    """Return the text of one of the files."""
    if which == "topics":
        topics = [(each.description, topic(each)) for each in TOPICS]
        return _MADE.format(table="pipeline/topics.py") + _text(topics)
    known = [rights.predict("default")] if which == "deployment" else rights.users(deployments=())
    users = [(f"{each.name}: {each.purpose}.", user(each)) for each in known]
    return _MADE.format(table="pipeline/rights.py") + _text(users)


def _text(documents: Iterable[tuple[str, Manifest]]) -> str:
    import yaml  # imported late: whoever only wants the tables need not have it

    return "".join(
        # Flow style where a collection holds nothing but scalars.
        f"---\n# {comment}\n{yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=160)}"
        for comment, document in documents
    )


def main() -> None:
    """Write the files into the repository that is the working directory, or the one named."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    for which, path in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(render(which))


if __name__ == "__main__":
    main()
