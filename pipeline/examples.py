"""One event of each kind with made-up values: the examples of the AsyncAPI document, which really decode."""

import base64
import hashlib
from datetime import UTC, datetime, timedelta

from pipeline import deadletters, events, telemetry, topics
from pipeline.deployments import Artefact, Desired, ModelIdentity, Refusal, Status, Version
from pipeline.errors import UndecodableImageError

# 4 x 4 pixels, PNG: small enough to read, and a picture that decodes.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAGElEQVR42mNkYGiwYWCAIBYGGwY4wM0BAEqkAfbPNfiIAAAAAElFTkSuQmCC"
)
TIME = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
_TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def inline_image() -> events.ImageEvent:
    """Return a picture that travels in the value."""
    return events.ImageEvent(
        id="cat-1",
        data=PICTURE,
        sha256=hashlib.sha256(PICTURE).hexdigest(),
        source="example/camera-7",
        time=TIME,
        content_type="image/png",
        expires_at=TIME + timedelta(seconds=30),
        traceparent=_TRACEPARENT,
    )


def referred_image() -> events.ImageEvent:
    """Return a picture that lies in the object store."""
    return events.ImageEvent(
        id="big-1",
        dataref="incoming/2026/big-1.jpg",
        sha256=hashlib.sha256(b"big").hexdigest(),
        source="example/scanner",
        time=TIME,
        content_type="image/jpeg",
    )


def predictions() -> tuple[events.Prediction, ...]:
    """Return one prediction of each outcome."""
    models = (("builtin:quality", "1"),)
    receipt = events.Receipt(
        topic=topics.IMAGES_REALTIME.name, partition=4, offset=1207, input_sha256=inline_image().sha256,
        input_bytes=len(PICTURE), width=4, height=4, batch_id="b-91", batch_size=3, batch_cut="idle",
        device="cpu", queue_seconds=0.0012, decode_seconds=0.0041, forward_seconds=0.0107,
    )  # fmt: skip
    predicted = events.Prediction(
        id=events.prediction_id("cat-1", "default", models), image_id="cat-1", deployment="default",
        lane="realtime", outcome="predicted", time=TIME + timedelta(seconds=1), receipt=receipt,
        models=(
            events.ModelResult(
                model="builtin:quality", version="1", digest="sha256:0f1e", task="classify", label="keep",
                score=0.91, scores={"sharpness": 0.88, "exposure": 0.47, "contrast": 0.21, "noise": 0.002},
            ),
        ),
        traceparent=_TRACEPARENT,
    )  # fmt: skip
    expired = events.Prediction(
        id=events.prediction_id("cat-2", "default", models), image_id="cat-2", deployment="default",
        lane="bulk", outcome="expired", time=TIME + timedelta(seconds=40),
        receipt=events.Receipt(topic=topics.IMAGES_BULK.name, partition=0, offset=88),
        reason=f"past its deadline, {TIME.isoformat()}",
    )  # fmt: skip
    return predicted, expired


def dead_letter() -> deadletters.DeadLetter:
    """Return the dead letter of a text that somebody published as a picture."""
    text = b"this is not a picture"
    outgoing = events.encode_image(events.ImageEvent(id="cat-3", data=text, time=TIME))
    record = events.Record(
        topic=topics.IMAGES_BULK.name,
        partition=7,
        offset=42,
        timestamp_ms=int(TIME.timestamp() * 1000),
        key=outgoing.key,
        value=outgoing.value,
        headers=outgoing.headers,
    )
    error = UndecodableImageError("the first bytes are of no known picture format")
    return deadletters.from_error("predict.default", record, error, TIME + timedelta(seconds=1))


def desired() -> Desired:
    """Return the activation of a model from a file, with one from a library beside it."""
    artefact = Artefact("otters.safetensors", hashlib.sha256(b"weights").hexdigest(), 44_730_120)
    return Desired(
        deployment="wildlife",
        version=Version(
            revision=4,
            models=("file:otters.safetensors#torchvision:resnet18", "builtin:fingerprint"),
            artefacts=(artefact,),
        ),
        activated_by="ann@workstation",
        activated_at=TIME,
        predecessor=Version(revision=3, models=("torchvision:resnet18", "builtin:fingerprint")),
        note="trained on the otters of 2025",
    )


def statuses() -> tuple[Status, ...]:
    """Return a replica that runs a version, and one that has refused it."""
    runs = Status(
        deployment="wildlife", replica="predict-wildlife-0-1", time=TIME + timedelta(seconds=20), revision=4,
        since=TIME + timedelta(seconds=3),
        models=(
            ModelIdentity(
                "file:otters.safetensors#torchvision:resnet18", "0f1e2d3c4b5a", "0f1e2d3c4b5a" + "0" * 52,
                "classify",
            ),
            ModelIdentity("builtin:fingerprint", "1", hashlib.sha256(b"fingerprint").hexdigest(), "embed"),
        ),
    )  # fmt: skip
    refused = Status(
        deployment="wildlife", replica="predict-wildlife-1-1", time=TIME + timedelta(seconds=21), revision=3,
        since=TIME - timedelta(days=1), models=runs.models[1:],
        refused=Refusal(
            4, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", TIME + timedelta(seconds=4)
        ),
    )  # fmt: skip
    return runs, refused


_GPU = "GPU-5fd4f087-86f3-7a43-b711-4771313afc50"
_PEER = "GPU-0c2ba5a4-8f2d-4f39-9c0e-6d1b6b5a8f11"


def samples() -> tuple[telemetry.Samples, ...]:
    """Return a host's samples with an XID error, and the least that a record may say."""
    full = telemetry.Samples(
        host="node-7",
        source="nvml",
        gpus=(
            telemetry.Gpu(
                gpu_uuid=_GPU, index=0, model="NVIDIA H100 80GB HBM3", device="nvidia0",
                pci_bus_id="00000000:1B:00.0", driver_version="580.65.06", labels={"namespace": "training"},
            ),
        ),
        samples=(
            telemetry.Sample(
                gpu_uuid=_GPU, time=TIME,
                values={"temperature_celsius": 67.0, "power_watts": 612.5, "utilization_percent": 98.0},
            ),
            telemetry.Sample(gpu_uuid=_PEER, time=TIME, xids=(79,), state="lost"),
        ),
    )  # fmt: skip
    least = telemetry.Samples(
        host="node-8",
        samples=(telemetry.Sample(gpu_uuid="GPU-1", time=TIME, values={"temperature_celsius": 51.0}),),
    )
    return full, least


def condition() -> telemetry.Condition:
    """Return a rule that holds for a GPU that is hotter than its peers."""
    return telemetry.Condition(
        rule="thermal_margin", severity="critical", state="firing", since=TIME, for_seconds=120.0, value=2.0,
        limit=5.0, field="temperature_margin_celsius",
        peers=telemetry.Peers(count=7, median=21.0, deviation=1.5, score=-8.5),
        message="2 C left to the slowdown threshold, limit 5, for 2 min; the median of 7 peers is 21 C",
        action="inspect", runbook="Check fans, air flow and dust; compare with the GPUs beside it.",
    )  # fmt: skip


def windows() -> tuple[telemetry.Windows, ...]:
    """Return a closed window with a condition, and an XID error as a window of zero length."""
    hot = telemetry.GpuWindow(
        gpu_uuid=_GPU, host="node-7", model="NVIDIA H100 80GB HBM3", samples=6,
        values={"temperature_margin_celsius": telemetry.Aggregate(6, 1.0, 3.0, 2.0, 2.0)},
        scores={"peers": 8.5}, conditions=(condition(),),
    )  # fmt: skip
    xid = telemetry.Condition(
        rule="xid_79", severity="critical", state="firing", since=TIME, value=79.0, action="restart_machine",
        message="XID 79: the GPU has fallen off the bus",
    )  # fmt: skip
    closed = telemetry.Windows(
        key="node-7", start=TIME, end=TIME + timedelta(minutes=1), gpus=(hot,), rules_version="1"
    )
    event = telemetry.Windows(
        key="node-7",
        start=TIME,
        end=TIME,
        gpus=(telemetry.GpuWindow(gpu_uuid=_PEER, host="node-7", conditions=(xid,), xids=(79,)),),
        rules_version="1",
    )
    return closed, event


def alerts() -> tuple[telemetry.Alert, ...]:
    """Return the beginning and the end of an alert."""
    held = condition()
    identity = telemetry.alert_id(_GPU, held.rule, held.since)
    firing = telemetry.Alert(
        id=identity, state="firing", gpu_uuid=_GPU, host="node-7", since=TIME, time=TIME + timedelta(minutes=2),
        condition=held, model="NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    resolved = telemetry.Alert(
        id=identity, state="resolved", gpu_uuid=_GPU, host="node-7", since=TIME,
        time=TIME + timedelta(minutes=9), condition=held, model="NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    return firing, resolved
