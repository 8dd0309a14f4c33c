"""The table of rights, and the manifests that are made from it and from the topic table."""

from pathlib import Path

import pytest
import yaml

from pipeline import rights, strimzi
from pipeline.rights import GROUPS, Acl, User
from pipeline.topics import TOPICS, Topic

ROOT = Path(__file__).resolve().parents[2]
USERS = {user.name: user for user in rights.users()}
#: What the topic table calls by another name.
NAMES = {"predict": "predict-default", "CLI": "operator", "replay": "collect", "simulate": "collect"}
OUTSIDE = {"any client"}


def may(user: User, topic: Topic, operation: str) -> bool:
    return any(
        acl.resource == "topic" and acl.name == topic.name and operation in acl.operations
        for acl in user.acls
    )


@pytest.mark.parametrize("which", strimzi.FILES)
def test_generated_manifests_are_up_to_date(which: str) -> None:
    """The KafkaTopics and KafkaUsers in k8s/ say what the tables say: else `make manifests`."""
    assert (ROOT / strimzi.FILES[which]).read_text() == strimzi.render(which)


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_who_writes_and_reads_a_topic_may(topic: Topic) -> None:
    """Producers of the topic table may write their topic, consumers and followers read it."""
    for operation, names in (("Write", topic.producers), ("Read", topic.consumers + topic.followers)):
        for name in set(names) - OUTSIDE:
            assert may(USERS[NAMES.get(name, name)], topic, operation), (name, operation)


def test_each_step_reads_with_its_own_group_alone() -> None:
    """A worker is a member of the group of its own name, and of no other."""
    steps = {"predict-default": "predict.default"} | {step: step for step in GROUPS}
    for name, user in USERS.items():
        groups = {acl.name for acl in user.acls if acl.resource == "group" and "Read" in acl.operations}
        assert groups == ({steps[name]} if name in steps else set())


def test_nobody_may_change_topics_or_delete_records() -> None:
    """No user has a right beyond reading, writing and looking, and none on the cluster."""
    acls = [acl for user in USERS.values() for acl in user.acls]
    assert {acl.resource for acl in acls} == {"topic", "group", "transactionalId"}
    assert {each for acl in acls for each in acl.operations} == {
        "Describe", "DescribeConfigs", "Read", "Write"
    }  # fmt: skip


def test_a_deployment_has_a_user_of_its_own() -> None:
    """Each deployment's workers get a user that cannot read with another deployment's group."""
    names = [user.name for user in rights.users(["default", "wildlife"])]
    assert names[:2] == ["predict-default", "predict-wildlife"]
    assert Acl("group", "p-predict.wildlife", ("Read",)) in rights.predict("wildlife", "p-").acls


def test_a_prefix_is_part_of_every_name() -> None:
    """With a prefix every right is about this installation's topics, groups and transactional ids."""
    acls = [acl for user in rights.users(prefix="Stage_") for acl in user.acls]
    assert all(acl.name.startswith("Stage_") for acl in acls)
    made = strimzi.topic(TOPICS[0], "Stage_")
    assert made["metadata"]["name"] == "stage-images.realtime.v1"
    assert made["spec"]["topicName"] == "Stage_images.realtime.v1"


def test_a_table_of_users_is_well_formed() -> None:
    """Every user is there once and has quotas; no resource is named twice with the same pattern."""
    documents = [
        each for which in ("users", "deployment") for each in yaml.safe_load_all(strimzi.render(which))
    ]
    assert len(documents) == len(USERS) == len({each["metadata"]["name"] for each in documents})
    for document in documents:
        assert all(value > 0 for value in document["spec"]["quotas"].values())
        resources = [tuple(acl["resource"].values()) for acl in document["spec"]["authorization"]["acls"]]
        assert len(resources) == len(set(resources))
