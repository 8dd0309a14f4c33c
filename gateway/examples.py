"""Examples for the API's description: real shapes, made-up values."""

from datetime import UTC, datetime

from gateway.views import (
    DeploymentState,
    ImageView,
    Predictions,
    PredictionView,
    SearchedWith,
    Similar,
    SimilarImage,
    links,
)
from pipeline import examples
from pipeline.agreement import Agreement, LabelPair
from pipeline.comparison import Comparison, Outcomes, Seconds, Side
from pipeline.deployments import DeploymentView, Desired, Registry, Status, encode
from pipeline.events import ModelResult, Receipt, Record
from pipeline.results import TracedImage
from pipeline.trace import DeploymentTrace, Step, Trace, TracedBatch

_ID = "0b0fb4c5e1b84c9b8d2f8a52c8f3f0c1"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_TIME = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)

_PREDICTION = PredictionView(
    id="5f2b51ca2fdc5baa31ec02e002f69aec",
    deployment="default",
    outcome="predicted",
    time=_TIME,
    receipt=Receipt(
        topic="images.realtime.v1", partition=4, offset=1207, input_sha256=_SHA256, input_bytes=48_213,
        width=640, height=480, batch_id="b-91", batch_size=4, batch_cut="idle", device="cpu",
        queue_seconds=0.0012, decode_seconds=0.0041, forward_seconds=0.0107,
    ),
    models=(
        ModelResult(
            model="builtin:quality", version="1", digest=_SHA256, task="classify", label="keep",
            score=0.91, scores={"sharpness": 0.88, "exposure": 0.47, "contrast": 0.21, "noise": 0.002},
        ),
    ),
)  # fmt: skip


def _wildlife() -> DeploymentView:
    known = Registry()
    values: tuple[Desired | Status, ...] = (examples.desired(), *examples.statuses())
    for value in values:
        outgoing = encode(value)
        known.apply(
            Record(
                topic="models.v1",
                partition=0,
                offset=0,
                timestamp_ms=0,
                key=outgoing.key,
                value=outgoing.value,
            )
        )
    return known["wildlife"].view(examples.statuses()[-1].time)


ACCEPTED = ImageView(
    id=_ID, state="accepted", links=links(_ID), lane="realtime", content_type="image/jpeg", size_bytes=48_213,
    sha256=_SHA256,
)  # fmt: skip
PREDICTED = ImageView(
    id=_ID, state="predicted", links=links(_ID), lane="realtime", content_type="image/jpeg",
    size_bytes=48_213, sha256=_SHA256, published_at=_TIME,
    deployments={"default": DeploymentState("predicted")},
    predictions=(_PREDICTION,),
)  # fmt: skip
WILDLIFE = _wildlife()
PREDICTIONS = Predictions(_ID, (_PREDICTION,))
SIMILAR = Similar(
    query=SearchedWith(
        deployment="default", model="builtin:fingerprint", version="1", dimension=256, image_id=_ID
    ),
    mode="approximate",
    images=tuple(
        SimilarImage(
            id=image_id, score=score, links=links(image_id), published_at=_TIME, source="millrace/gateway",
            labels={"builtin:quality": "keep"},
        )
        for image_id, score in ((_ID, 1.0), ("cat-7", 0.9931), ("dog-2", 0.4127))
    ),
    next_cursor="hKZmb3JtYXQB",
)  # fmt: skip
TRACE = Trace(
    id=_ID,
    image=TracedImage(
        lane="realtime", topic="images.realtime.v1", partition=4, offset=1207, published_at=_TIME,
        size_bytes=48_213, source="millrace/gateway", stored_at=_TIME,
    ),
    deployments=(
        DeploymentTrace(
            deployment="default",
            state="predicted",
            steps=(
                Step(step="decoded", at=_TIME, seconds=0.0041, detail="640 x 480"),
                Step(
                    step="batched", at=_TIME, seconds=0.0008,
                    detail="with 3 others, cut because the device was free",
                    batch=TracedBatch(id="b-91", size=4, cut="idle", companions=("cat-7", "cat-8", "dog-2")),
                ),
                Step(step="forwarded", at=_TIME, seconds=0.0107, detail="builtin:quality 1 on cpu"),
                Step(step="published", at=_TIME, seconds=0.004, detail="the prediction, to Kafka"),
            ),
        ),
    ),
)  # fmt: skip

COMPARISON = Comparison(
    a=Side(
        name="default", images=1000, alone=4, queue_seconds=Seconds(0.0031, 0.0192),
        decode_seconds=Seconds(0.0048, 0.0113), forward_seconds=Seconds(0.0215, 0.0447), batch_size=6.2,
        forward_seconds_per_image=0.0034, devices={"cpu": 996},
    ),
    b=Side(
        name="wildlife@4", images=996, alone=0, queue_seconds=Seconds(0.0102, 0.0711),
        decode_seconds=Seconds(0.0047, 0.0115), forward_seconds=Seconds(0.1302, 0.2544), batch_size=11.8,
        forward_seconds_per_image=0.011, devices={"cpu": 996},
    ),
    both=996,
    outcomes=(Outcomes("predicted", "predicted", 996), Outcomes("predicted", "dead_lettered", 4)),
    models=(
        Agreement(
            task="classify", images=996, a="torchvision:resnet18 5c1f09f4be11",
            b="torchvision:resnet50 11ad3fa68b90",
            same_label=0.912, score_difference=0.081, score_difference_p99=0.43,
            disagreements=(LabelPair(a="red fox", b="kit fox", images=12, example=_ID),),
        ),
    ),
)  # fmt: skip
