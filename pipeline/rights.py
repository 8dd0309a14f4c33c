"""The table of rights: what each user of the brokers may do, and how much of a broker it may take.

The KafkaUsers of the manifests are made from it. The invariant: everything works with these rights
(`tests/e2e/test_rights.py`); `make rights` takes each away in turn, to see whether it can be spared. Read and Write
imply Describe; an idempotent producer needs no more than Write (KIP-679). Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.topics import (
    DEAD_LETTERS,
    GPU_ALERTS,
    GPU_SAMPLES,
    GPU_WINDOWS,
    IMAGES_BULK,
    IMAGES_REALTIME,
    MEBIBYTE,
    MODELS,
    PREDICTIONS,
    TOPICS,
    Topic,
)

Resource = Literal["topic", "group", "transactionalId"]
#: The operations that somebody needs, as Strimzi and Kafka's own tools write them.
Operation = Literal["Describe", "DescribeConfigs", "Read", "Write"]

LANES = (IMAGES_REALTIME, IMAGES_BULK)
#: Consumer groups beside those of the deployments.
GROUPS = ("archive", "store", "watch", "record", "notify")
#: Before the name of a deployment: its consumer group, and who may write its version (`registry.py`).
DEPLOYMENT_GROUP, DEPLOYMENT_WRITER = "predict.", "models."


@dataclass(frozen=True)
class Acl:
    """What may be done with one resource, or with all whose names begin so."""

    resource: Resource
    name: str
    operations: tuple[Operation, ...]
    is_prefix: bool = False


@dataclass(frozen=True)
class Quotas:
    """What a user may take of each broker before it is slowed down; all its processes together."""

    producer_bytes_per_second: int | None = None
    consumer_bytes_per_second: int | None = None
    #: Of one request-handler or network thread; 100 is a whole one.
    request_percentage: int | None = None


@dataclass(frozen=True)
class User:
    """Somebody who connects to the brokers."""

    name: str
    purpose: str
    acls: tuple[Acl, ...]
    quotas: Quotas


def users(deployments: Sequence[str] = ("default",), prefix: str = "") -> tuple[User, ...]:
    """Return every user of an installation whose topics and groups begin with `prefix`."""
    return (
        *(predict(deployment, prefix) for deployment in deployments),
        User(
            "archive",
            "the step that keeps pictures: one row and one object each",
            (*_topics(LANES, "Read", prefix=prefix), *_dead_letters(prefix), _group("archive", prefix)),
            _WORKER,
        ),
        User(
            "store",
            "the step that writes results, dead letters and the history of models to PostgreSQL",
            # It keeps dead letters, and makes some: of results that nobody can store.
            (
                *_topics((PREDICTIONS, MODELS), "Read", prefix=prefix),
                *_topics((DEAD_LETTERS,), "Read", "Write", prefix=prefix),
                _group("store", prefix),
            ),
            _WORKER,
        ),
        User(
            "watch",
            "the step that makes windows of samples and reads its own windows back",
            (
                *_topics((GPU_SAMPLES,), "Read", prefix=prefix),
                *_topics((GPU_WINDOWS,), "Read", "Write", prefix=prefix),
                _group("watch", prefix),
            ),
            _WORKER,
        ),
        User(
            "record",
            "the step that writes telemetry to PostgreSQL and publishes the life of alerts",
            (
                *_topics((GPU_SAMPLES, GPU_WINDOWS), "Read", prefix=prefix),
                *_topics((GPU_ALERTS,), "Write", prefix=prefix),
                *_dead_letters(prefix),
                _group("record", prefix),
            ),
            _WORKER,
        ),
        User(
            "notify",
            "the step that tells people of alerts",
            (*_topics((GPU_ALERTS,), "Read", prefix=prefix), *_dead_letters(prefix), _group("notify", prefix)),
            _WORKER,
        ),
        User(
            "gateway",
            "HTTP: takes pictures, answers with results, activates models",
            # It reads a picture back that `archive` has not kept yet, and asks how far behind deployments are.
            (
                *_topics(LANES, "Read", "Write", prefix=prefix),
                *_topics((PREDICTIONS, DEAD_LETTERS), "Read", prefix=prefix),
                *_topics((MODELS,), "Read", "Write", prefix=prefix),
                Acl("group", prefix + DEPLOYMENT_GROUP, ("Describe",), is_prefix=True),
                _activates(prefix),
            ),
            Quotas(64 * MEBIBYTE, 128 * MEBIBYTE, 200),
        ),
        User(
            "collect",
            "who measures GPUs: `millrace collect` on each node, replays and simulations",
            _topics((GPU_SAMPLES,), "Write", prefix=prefix),
            Quotas(16 * MEBIBYTE, MEBIBYTE, 100),
        ),
        User(
            "publish",
            "an example of a producer outside: publishes pictures and sees nothing else",
            _topics(LANES, "Write", prefix=prefix),
            Quotas(32 * MEBIBYTE, MEBIBYTE, 50),
        ),
        User(
            "retention",
            "the nightly job: reads which files of models are in use before it deletes others",
            _topics((MODELS,), "Read", prefix=prefix),
            Quotas(MEBIBYTE, 16 * MEBIBYTE, 50),
        ),
        User(
            "keda",
            "the autoscaler: sees how far behind groups are, and no record",
            (
                *_topics(_consumed(), "Describe", prefix=prefix),
                *_groups_seen(prefix),
            ),
            Quotas(MEBIBYTE, MEBIBYTE, 50),
        ),
        User(
            "operator",
            "people with the `millrace` command; topics are changed by KafkaTopics, so not by them",
            # Redriving a dead letter publishes it to the topic it came from; nothing redrives a dead letter's own.
            (
                *_topics((PREDICTIONS, MODELS, GPU_ALERTS), "DescribeConfigs", "Read", "Write", prefix=prefix),
                *_topics((*LANES, GPU_SAMPLES, GPU_WINDOWS), "DescribeConfigs", "Write", prefix=prefix),
                *_topics((DEAD_LETTERS,), "DescribeConfigs", "Read", prefix=prefix),
                *_groups_seen(prefix),
                _activates(prefix),
            ),
            Quotas(32 * MEBIBYTE, 32 * MEBIBYTE, 100),
        ),
    )  # fmt: skip


def predict(deployment: str, prefix: str = "") -> User:
    """Return the user of one deployment's workers: its own group, and no other's."""
    return User(
        f"predict-{deployment}",
        f"the workers of the deployment `{deployment}`: predict pictures, follow and report their models",
        (
            *_topics(LANES, "Read", prefix=prefix),
            *_topics((PREDICTIONS,), "Write", prefix=prefix),
            *_dead_letters(prefix),
            *_topics((MODELS,), "Read", "Write", prefix=prefix),
            _group(DEPLOYMENT_GROUP + deployment, prefix),
        ),
        _WORKER,
    )


# Workers that catch up read as fast as they can: 128 MiB/s of each of three brokers are 400 pictures of 1 MB a
# second, and leave most of a 10 Gbit/s card to replication and producers. 200: two of a broker's 11 threads.
_WORKER = Quotas(64 * MEBIBYTE, 128 * MEBIBYTE, 200)


def _consumed() -> tuple[Topic, ...]:
    """Return the topics that some consumer group reads, whose lag is of interest."""
    steps = {*GROUPS, "predict"}
    return tuple(topic for topic in TOPICS if steps & set(topic.consumers))


def _topics(topics: Iterable[Topic], *operations: Operation, prefix: str) -> tuple[Acl, ...]:
    return tuple(Acl("topic", prefix + topic.name, operations) for topic in topics)


def _dead_letters(prefix: str) -> tuple[Acl, ...]:
    return _topics((DEAD_LETTERS,), "Write", prefix=prefix)


def _group(name: str, prefix: str) -> Acl:
    return Acl("group", prefix + name, ("Read",))


def _groups_seen(prefix: str) -> tuple[Acl, ...]:
    """Return the right to see how far every group is, the deployments' of any name among them."""
    literal = tuple(Acl("group", prefix + name, ("Describe",)) for name in GROUPS)
    return (*literal, Acl("group", prefix + DEPLOYMENT_GROUP, ("Describe",), is_prefix=True))


def _activates(prefix: str) -> Acl:
    return Acl("transactionalId", prefix + DEPLOYMENT_WRITER, ("Write",), is_prefix=True)
