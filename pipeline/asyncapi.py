"""The AsyncAPI 3.0 document for people who publish pictures or telemetry, or consume what comes of them.

Made from the topic table and the event types, written by `make asyncapi` to `docs/asyncapi.json`; a test
fails when that file is not current. Operations are the reader's own: you send images, you receive results.
"""

import base64
import sys
from typing import Any

import msgspec

from pipeline import deadletters, deployments, events, examples, telemetry, topics
from pipeline.asyncapi_notes import NOTES
from pipeline.topics import Topic

JsonObject = dict[str, Any]

BINDING_VERSION = "0.5.0"  # of the AsyncAPI Kafka bindings
_DESCRIPTION = """Pictures in, predictions out. Publish an encoded picture to one of the two image topics; its \
outcome comes back on `predictions.v1`, or, when the picture or its envelope cannot be used, on \
`dead-letters.v1`.

GPU telemetry: publish the samples of a host as JSON to `gpu.samples.v1`; closed windows and alerts come out. \
Fields have the names of `docs/telemetry.md`; DCGM's own names are understood too.

Events are CloudEvents 1.0 in Kafka's binary mode: attributes are headers, the value is the data. No header is \
required: a bare record is a valid image event, with `topic:partition:offset:timestamp_ms` for an id. The id \
alone decides identity; publishing an id twice gives one result, the first stored wins.

An installation may put a prefix before every topic name (`MILLRACE_TOPIC_PREFIX`)."""


def document() -> JsonObject:
    """Return the document as plain JSON values."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Millrace topics",
            "version": "1",  # of the contracts: the v1 in topic names and ce_type
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "local": {
                "host": "127.0.0.1:9092",
                "protocol": "kafka",
                "description": "The embedded Kafka of `millrace up`; no authentication.",
            }
        },
        "channels": {topic.name: _channel(topic) for topic in topics.TOPICS},
        "operations": {
            "publishRealtimeImage": _operation(
                "send", topics.IMAGES_REALTIME, "Publish a picture that somebody is waiting for."
            ),
            "publishBulkImage": _operation(
                "send", topics.IMAGES_BULK, "Publish a picture that nobody is waiting for."
            ),
            "receivePrediction": _operation(
                "receive", topics.PREDICTIONS, "Receive what became of pictures."
            ),
            "receiveDeadLetter": _operation(
                "receive", topics.DEAD_LETTERS, "Receive what could not be finished, and why."
            ),
            "receiveModels": _operation(
                "receive", topics.MODELS, "Follow which models should run, and which do."
            ),
            "publishGpuSamples": _operation("send", topics.GPU_SAMPLES, "Publish what GPUs measure."),
            "receiveGpuWindows": _operation(
                "receive", topics.GPU_WINDOWS, "Receive closed windows with scores and conditions."
            ),
            "receiveGpuAlerts": _operation(
                "receive", topics.GPU_ALERTS, "Receive what alerts begin, fire and end."
            ),
        },
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channel(topic: Topic) -> JsonObject:
    return {
        "address": topic.name,
        "description": f"{topic.description} Producers: {', '.join(topic.producers)}. "
        f"Consumers: {', '.join((*topic.consumers, *topic.followers))}.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _message_names(topic)},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": _topic_configuration(topic),
                "bindingVersion": BINDING_VERSION,
            }
        },
    }


def _topic_configuration(topic: Topic) -> JsonObject:
    config = topic.config()
    return {
        name: [value] if name == "cleanup.policy" else int(value) if value.isdigit() else value
        for name, value in sorted(config.items())
    }


def _operation(action: str, topic: Topic, summary: str) -> JsonObject:
    channel = f"#/channels/{topic.name}"
    return {
        "action": action,
        "channel": {"$ref": channel},
        "summary": summary,
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in _message_names(topic)],
    }


def _message_names(topic: Topic) -> tuple[str, ...]:
    if topic.lane:
        return ("image",)
    return {
        topics.PREDICTIONS: ("prediction",),
        topics.DEAD_LETTERS: ("deadLetter",),
        topics.MODELS: ("desiredModels", "replicaStatus"),
        topics.GPU_SAMPLES: ("gpuSamples",),
        topics.GPU_WINDOWS: ("gpuWindows",),
        topics.GPU_ALERTS: ("gpuAlert",),
    }[topic]


def _messages() -> JsonObject:
    image_bytes = {"type": "string", "format": "binary"}
    return {
        "image": {
            "title": "A picture",
            "summary": "The encoded picture, or an empty value and `ce_dataref`.",
            "description": f"At most {topics.MAX_IMAGE_RECORD_BYTES:,} bytes; put larger pictures into the "
            "installation's object store and name the object in `ce_dataref`. The examples show the value in "
            "base64; on Kafka it is the bytes themselves.",
            "contentType": "application/octet-stream",
            "headers": _image_headers(),
            "payload": image_bytes,
            "correlationId": {"location": "$message.header#/ce_id", "description": "The event id."},
            "bindings": _key("The event id by convention; any key, or none, is accepted."),
            "examples": _image_examples(),
        },
        "prediction": {
            "title": "What became of a picture in one deployment",
            "contentType": "application/json",
            "headers": _prediction_headers(),
            "payload": {"$ref": "#/components/schemas/Prediction"},
            "correlationId": {"location": "$message.payload#/image_id", "description": "The event id."},
            "bindings": _key("The id of the image event."),
            "examples": _prediction_examples(),
        },
        "deadLetter": {
            "title": "A record that could not be finished",
            "summary": "The original key, value and headers, with the reason in `millrace-` headers.",
            "contentType": "application/octet-stream",
            "headers": _dead_letter_headers(),
            "payload": image_bytes,
            "bindings": _key("The original record's key."),
            "examples": [_dead_letter_example()],
        },
        "desiredModels": {
            "title": "The version of its models that a deployment should run",
            "summary": "The latest record of a deployment counts; an empty value takes it back.",
            "contentType": "application/json",
            "headers": _models_headers(deployments.DESIRED_TYPE),
            "payload": {"$ref": "#/components/schemas/Desired"},
            "bindings": _key("The deployment."),
            "examples": [_models_example("activated", examples.desired())],
        },
        "replicaStatus": {
            "title": "What one replica runs",
            "summary": "Repeated every few seconds; an empty value says that the replica has ended.",
            "contentType": "application/json",
            "headers": _models_headers(deployments.STATUS_TYPE),
            "payload": {"$ref": "#/components/schemas/Status"},
            "bindings": _key("deployment/replica"),
            "examples": [
                _models_example(name, status)
                for name, status in zip(("runs", "refused"), examples.statuses(), strict=True)
            ],
        },
    } | _telemetry_messages()


def _telemetry_messages() -> JsonObject:
    def message(
        title: str, schema: str, event_type: str, key: str, named: dict[str, events.Outgoing]
    ) -> JsonObject:
        return {
            "title": title,
            "contentType": "application/json",
            "headers": _telemetry_headers(event_type),
            "payload": {"$ref": f"#/components/schemas/{schema}"},
            "bindings": _key(key),
            "examples": [
                {"name": name} | _example(outgoing) | {"payload": msgspec.json.decode(outgoing.value or b"")}
                for name, outgoing in named.items()
            ],
        }

    samples = map(telemetry.encode_samples, examples.samples())
    windows = map(telemetry.encode_windows, examples.windows())
    alerts = map(telemetry.encode_alert, examples.alerts())
    return {
        "gpuSamples": message(
            "The samples of a host's GPUs over one publish interval", "Samples", telemetry.SAMPLES_TYPE,
            "The host, or the job or cluster whose GPUs are compared with each other.",
            dict(zip(("full", "least"), samples, strict=True)),
        ),
        "gpuWindows": message(
            "A closed window of the GPUs that share a key", "Windows", telemetry.WINDOWS_TYPE,
            "The key of the samples.", dict(zip(("closed", "event"), windows, strict=True)),
        ),
        "gpuAlert": message(
            "A step in the life of an alert", "Alert", telemetry.ALERT_TYPE, "The alert's id.",
            dict(zip(("firing", "resolved"), alerts, strict=True)),
        ),
    }  # fmt: skip


def _key(description: str) -> JsonObject:
    return {
        "kafka": {"key": {"type": "string", "description": description}, "bindingVersion": BINDING_VERSION}
    }


def _headers(properties: dict[str, JsonObject], required: tuple[str, ...] = ()) -> JsonObject:
    header = {name: {"type": "string"} | schema for name, schema in properties.items()}
    return {"type": "object", "properties": header, "required": sorted(required)}


def _image_headers() -> JsonObject:
    return _headers(
        {
            "ce_specversion": {"const": "1.0"},
            "ce_type": {"const": events.IMAGE_TYPE},
            "ce_id": {
                "minLength": 1,
                "maxLength": events.MAX_ID_CHARACTERS,
                "description": "Identity; no control characters. Default: topic:partition:offset:timestamp_ms.",
            },
            "ce_source": {"description": "Who publishes. Default: kafka:TOPIC."},
            "ce_time": _TIMESTAMP | {"description": "Default: the record's time."},
            "content-type": {"description": "A claim; the first bytes decide."},
            "ce_dataref": {
                "pattern": f"^{events.OBJECT_KEY.pattern}$",
                "maxLength": events.MAX_OBJECT_KEY_CHARACTERS,
                "description": "Object key in the installation's object store, when the value is empty.",
            },
            "ce_datasha256": {
                "pattern": f"^{events.SHA256_HEX.pattern}$",
                "description": "SHA-256 of the encoded picture; checked when given.",
            },
            "ce_expirytime": _TIMESTAMP | {"description": "After this the outcome is `expired`."},
            "ce_purpose": {"description": "`query`: predicted, but neither stored nor archived."},
            "traceparent": _TRACE,
            "ce_traceparent": _TRACE | {"description": "Read when there is no `traceparent`."},
            "millrace-only-group": {"description": "Only this consumer group acts on the record."},
            "millrace-attempts": {"description": "How often the picture was dead-lettered before."},
        }
    )


def _prediction_headers() -> JsonObject:
    return _headers(
        {
            "ce_specversion": {"const": "1.0"},
            "ce_type": {"const": events.PREDICTION_TYPE},
            "ce_id": {"description": "As `id` in the value."},
            "ce_source": {"description": "millrace/predict/DEPLOYMENT"},
            "ce_time": _TIMESTAMP,
            "content-type": {"const": "application/json"},
            "traceparent": _TRACE,
            "ce_purpose": {"description": "As `purpose` in the value."},
        },
        required=("ce_specversion", "ce_type", "ce_id", "ce_source", "ce_time", "content-type"),
    )


def _models_headers(event_type: str) -> JsonObject:
    return _headers(
        {
            "ce_specversion": {"const": "1.0"},
            "ce_type": {"const": event_type},
            "ce_id": {"description": "The key with the revision, or the time of the report."},
            "ce_source": {"description": "millrace/models/KEY"},
            "ce_time": _TIMESTAMP,
            "content-type": {"const": "application/json"},
        }
    )


def _telemetry_headers(event_type: str) -> JsonObject:
    return _headers(
        {
            "ce_specversion": {"const": "1.0"},
            "ce_type": {"const": event_type},
            "ce_id": {"description": "Whose, and when."},
            "ce_source": {"description": "millrace/telemetry"},
            "content-type": {"const": "application/json"},
        }
    )


def _dead_letter_headers() -> JsonObject:
    own = {
        "group": {"description": "The consumer group that gave the record up."},
        "topic": {"description": "Where the record was, with partition and offset its identity."},
        "partition": {"pattern": _INTEGER},
        "offset": {"pattern": _INTEGER},
        "timestamp-ms": {"pattern": _INTEGER},
        "code": {"description": "Stable error code, such as undecodable_image; see docs/delivery.md."},
        "reason": {"description": "For a person."},
        "failed-at": _TIMESTAMP,
        "attempts": {
            "pattern": _INTEGER,
            "description": "How often it was dead-lettered, this time included.",
        },
        "image-id": {"description": "The event id, where there is one."},
        "value-ref": {"description": "Object key of the value, when the broker refused to carry it."},
        "headers-dropped": {"pattern": _INTEGER, "description": "Original headers that did not fit."},
    }
    optional = {"image-id", "value-ref", "headers-dropped"}
    prefixed = {deadletters.PREFIX + name: schema for name, schema in own.items()}
    return _headers(prefixed, tuple(deadletters.PREFIX + name for name in own.keys() - optional)) | {
        "additionalProperties": {"type": "string", "description": "The original record's headers."}
    }


_INTEGER = "^-?[0-9]+$"
_TIMESTAMP: JsonObject = {"format": "date-time"}
_TRACE: JsonObject = {"pattern": f"^{events.TRACEPARENT.pattern}$", "description": "W3C trace context."}


def _schemas() -> JsonObject:
    _, schemas = msgspec.json.schema_components(
        [
            events.Prediction, deployments.Desired, deployments.Status,
            telemetry.Samples, telemetry.Windows, telemetry.Alert,
        ],
        ref_template="#/components/schemas/{name}",
    )  # fmt: skip
    for place, note in NOTES.items():
        struct, _, field = place.partition(".")
        schemas[struct]["properties"][field]["description"] = note
    return dict(sorted(schemas.items()))


def _image_examples() -> list[JsonObject]:
    return [
        {"name": "inline", "summary": "The picture in the value."}
        | _example(events.encode_image(examples.inline_image())),
        {
            "name": "bare",
            "summary": "No headers at all.",
            "headers": {},
            "payload": _base64(examples.PICTURE),
        },
        {"name": "byReference", "summary": "The picture in the object store."}
        | _example(events.encode_image(examples.referred_image())),
    ]


def _prediction_examples() -> list[JsonObject]:
    return [
        {"name": prediction.outcome}
        | _example(outgoing)
        | {"payload": msgspec.json.decode(outgoing.value or b"")}
        for prediction in examples.predictions()
        for outgoing in [events.encode_prediction(prediction)]
    ]


def _dead_letter_example() -> JsonObject:
    return {"name": "undecodable"} | _example(deadletters.encode_dead_letter(examples.dead_letter()))


def _models_example(name: str, value: deployments.Desired | deployments.Status) -> JsonObject:
    outgoing = deployments.encode(value)
    return {"name": name} | _example(outgoing) | {"payload": msgspec.json.decode(outgoing.value or b"")}


def _example(outgoing: events.Outgoing) -> JsonObject:
    headers = {name: value.decode() for name, value in outgoing.headers}
    return {"headers": headers, "payload": _base64(outgoing.value or b"")}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def main() -> None:
    """Write the document to stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(document()), indent=2) + b"\n")


if __name__ == "__main__":
    main()
