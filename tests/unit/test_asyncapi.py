"""`docs/asyncapi.json`: current, valid AsyncAPI 3.0, and its examples really decode.

`tests/support/asyncapi-3.0.0.schema.json.gz` is the AsyncAPI project's own schema (npm package
`@asyncapi/specs` 6.11.1, `schemas/3.0.0-without-$id.json`, Apache-2.0), unchanged.
"""

import base64
import gzip
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from pipeline import asyncapi, deadletters, deployments, events, examples, imaging, telemetry, topics
from pipeline.events import Record

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "tests" / "support" / "asyncapi-3.0.0.schema.json.gz"
DOCUMENT: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(asyncapi.document()))
EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{example['name']}")
    for name, message in DOCUMENT["components"]["messages"].items()
    for example in message["examples"]
]


def test_the_committed_document_is_current() -> None:
    """docs/asyncapi.json says what the topic table and the event types say; `make asyncapi` writes it."""
    assert msgspec.json.decode((ROOT / "docs" / "asyncapi.json").read_bytes()) == DOCUMENT


def test_the_document_is_asyncapi_3() -> None:
    """The document is valid by the AsyncAPI project's own schema."""
    schema = msgspec.json.decode(gzip.decompress(SCHEMA.read_bytes()))
    faults = jsonschema.Draft7Validator(schema).iter_errors(DOCUMENT)
    assert [f"{list(fault.absolute_path)}: {fault.message[:200]}" for fault in faults] == []


def test_every_reference_leads_somewhere() -> None:
    """Each `$ref` of the document points to a part of it."""

    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [found for item in value for found in references(item)]
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [found for item in value.values() for found in references(item)]
        return []

    for reference in references(DOCUMENT):
        part: Any = DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
        assert part


def test_channels_are_the_topic_table() -> None:
    """Every topic is a channel with its partitions, retention and largest record."""
    assert [topic.name for topic in topics.TOPICS] == list(DOCUMENT["channels"])
    for topic in topics.TOPICS:
        binding = DOCUMENT["channels"][topic.name]["bindings"]["kafka"]
        assert topic.partitions == binding["partitions"]
        configuration = binding["topicConfiguration"]
        age = "min.compaction.lag.ms" if topic.compacted else "retention.ms"
        assert topic.retention_seconds * 1000 == configuration[age]
        assert topic.max_record_bytes < configuration["max.message.bytes"]


def test_operations_are_the_users() -> None:
    """People send images and telemetry, receive what comes of them, and follow what runs."""
    operations = {
        operation["channel"]["$ref"].removeprefix("#/channels/"): operation["action"]
        for operation in DOCUMENT["operations"].values()
    }
    assert operations == {
        "images.realtime.v1": "send",
        "images.bulk.v1": "send",
        "predictions.v1": "receive",
        "dead-letters.v1": "receive",
        "models.v1": "receive",
        "gpu.samples.v1": "send",
        "gpu.windows.v1": "receive",
        "gpu.alerts.v1": "receive",
    }


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_fit_their_schemas(name: str, example: dict[str, Any]) -> None:
    """Headers and payload of each example are what the schemas next to them say, and no header is unknown."""
    message = DOCUMENT["components"]["messages"][name]
    closed = {"additionalProperties": False} | message["headers"]
    jsonschema.validate(example["headers"], closed, format_checker=jsonschema.FormatChecker())
    with_schemas = message["payload"] | {"components": DOCUMENT["components"]}
    jsonschema.validate(example["payload"], with_schemas, format_checker=jsonschema.FormatChecker())


def key_of(payload: Any) -> bytes | None:
    """Return the key of an example of `models.v1`, as its binding says."""
    if not isinstance(payload, dict) or "deployment" not in payload:
        return None
    return "/".join(payload[name] for name in ("deployment", "replica") if name in payload).encode()


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_decode(name: str, example: dict[str, Any]) -> None:
    """A client that publishes an example as it is shown publishes a valid event."""
    payload = example["payload"]
    is_bytes = name in {"image", "deadLetter"}
    value = base64.b64decode(payload) if is_bytes else msgspec.json.encode(payload)
    record = Record(
        topic="any",
        partition=0,
        offset=0,
        timestamp_ms=int(examples.TIME.timestamp() * 1000),
        key=key_of(payload),
        value=value or None,
        headers=tuple((header, text.encode()) for header, text in example["headers"].items()),
    )
    if name == "prediction":
        assert events.decode_prediction(record) in examples.predictions()
    elif name in {"desiredModels", "replicaStatus"}:
        assert deployments.decode(record) in (examples.desired(), *examples.statuses())
    elif name == "gpuSamples":
        assert telemetry.decode_samples(record) in [(samples, {}) for samples in examples.samples()]
    elif name == "gpuWindows":
        assert telemetry.decode_windows(record) in examples.windows()
    elif name == "gpuAlert":
        assert telemetry.decode_alert(record) in examples.alerts()
    elif name == "deadLetter":
        assert deadletters.decode_dead_letter(record).code == "undecodable_image"
    else:
        event = events.decode_image(record)
        assert (event.data == examples.PICTURE) != bool(event.dataref)


def test_the_example_picture_is_one() -> None:
    """The picture of the examples can be decoded."""
    picture = imaging.decode(examples.PICTURE, [imaging.View(4, 4)])
    assert (picture.width, picture.height) == (4, 4)
