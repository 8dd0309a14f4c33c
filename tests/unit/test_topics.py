"""The topic table agrees with itself and with the steps."""

import pytest

from agents.archive import Archive
from agents.predict import Predict
from agents.store import Store
from pipeline import topics
from pipeline.topics import LANES, TOPICS


def test_names_are_told_apart() -> None:
    """Every name is used once and ends in its contract version."""
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    assert all(topic.name.endswith(".v1") for topic in TOPICS)


def test_lanes_are_alike() -> None:
    """Both lanes have the same partitions, limits and readers, so that a record may move between them."""
    assert list(LANES) == ["realtime", "bulk"]
    alike = {
        (topic.key, topic.partitions, topic.max_record_bytes, topic.retention_seconds, topic.consumers)
        for topic in LANES.values()
    }
    assert len(alike) == 1


@pytest.mark.parametrize("prefix", ["", "t1-", "images.realtime.v1-"])
def test_a_lane_is_told_by_the_topic(prefix: str) -> None:
    """The lane follows from a topic's name with or without a prefix; other topics count as bulk."""
    for lane, topic in LANES.items():
        assert topics.lane_of(prefix + topic.name) == lane
    assert topics.lane_of(prefix + topics.PREDICTIONS.name) == "bulk"


def test_a_dead_letter_has_room_for_the_largest_input() -> None:
    """The dead-letter topic takes any input with 64 KiB of headers, and keeps it at least as long."""
    dead = topics.DEAD_LETTERS
    for topic in TOPICS:
        if topic is not dead:
            assert dead.max_record_bytes >= topic.max_record_bytes + 64 * 1024
            assert dead.retention_seconds >= topic.retention_seconds


def test_configuration_is_kafkas() -> None:
    """What is set on the broker follows from the table: clean-up, retention, and room for a batch's header."""
    for topic in TOPICS:
        config = topic.config()
        kept, age = ("compact", "min.compaction.lag.ms") if topic.compacted else ("delete", "retention.ms")
        assert config["cleanup.policy"] == kept
        assert int(config[age]) == topic.retention_seconds * 1000
        assert int(config["max.message.bytes"]) > topic.max_record_bytes
    assert [topic for topic in TOPICS if topic.compacted] == [topics.MODELS]
    stamped = [topic for topic in TOPICS if topic.config().get("message.timestamp.type") == "LogAppendTime"]
    assert stamped == [topics.PREDICTIONS]


def test_steps_read_what_the_table_says() -> None:
    """A step reads exactly the topics that name it as a consumer."""
    for step in (Predict, Store, Archive):
        named = {topic.name for topic in TOPICS if step.name in topic.consumers}
        assert named == {topic.name for topic in step.topics}
