"""The topic table: the one place that declares every topic, its key, limits and readers.

Topic creation, manifests, the AsyncAPI document and the docs are made from it or checked against it.
"""

from dataclasses import dataclass
from typing import Literal

Lane = Literal["realtime", "bulk"]

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS
MEBIBYTE = 1024 * 1024
MAX_IMAGE_RECORD_BYTES = 8 * MEBIBYTE
# A dead letter carries the largest input plus the headers that explain it.
MAX_DEAD_LETTER_RECORD_BYTES = MAX_IMAGE_RECORD_BYTES + 64 * 1024
# Larger pictures go to the object store first: Kafka's own default record limit less headers and overhead.
MAX_INLINE_IMAGE_BYTES = 900_000
# What a reader from the beginning reads at most beside the compacted part, in a second or less.
COMPACTED_SEGMENT_BYTES = 16 * MEBIBYTE


@dataclass(frozen=True)
class Topic:
    """One topic as it must exist on the broker; `name` is without the installation's prefix."""

    name: str
    key: str
    description: str
    partitions: int
    max_record_bytes: int
    retention_seconds: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    #: Who reads all of it without a consumer group.
    followers: tuple[str, ...] = ()
    #: The latest record of each key is kept for ever, an older one at least for `retention_seconds`.
    compacted: bool = False
    #: The broker writes its own time over the producer's when it appends: how long publishing took can be told.
    stamped_by_broker: bool = False
    lane: Lane | None = None

    def config(self) -> dict[str, str]:
        """Return the broker-side topic configuration."""
        common = {"max.message.bytes": str(self.max_record_bytes + 16 * 1024)}  # batch and header overhead
        if self.stamped_by_broker:
            common["message.timestamp.type"] = "LogAppendTime"
        if self.compacted:
            return common | {
                "cleanup.policy": "compact",
                "min.compaction.lag.ms": str(self.retention_seconds * 1000),
                # Kafka compacts no segment that is still written to, and by default writes to one for a week.
                "segment.ms": str(self.retention_seconds * 1000),
                "segment.bytes": str(COMPACTED_SEGMENT_BYTES),
            }
        return common | {"cleanup.policy": "delete", "retention.ms": str(self.retention_seconds * 1000)}


IMAGES_REALTIME = Topic(
    name="images.realtime.v1",
    key="image id",
    description="Pictures somebody is waiting for: the encoded image, or empty with ce_dataref.",
    partitions=12,
    max_record_bytes=MAX_IMAGE_RECORD_BYTES,
    retention_seconds=7 * DAY_SECONDS,
    producers=("gateway", "publish", "any client"),
    consumers=("predict", "archive"),
    lane="realtime",
)
IMAGES_BULK = Topic(
    name="images.bulk.v1",
    key="image id",
    description="Pictures nobody is waiting for: the encoded image, or empty with ce_dataref.",
    partitions=12,
    max_record_bytes=MAX_IMAGE_RECORD_BYTES,
    retention_seconds=7 * DAY_SECONDS,
    producers=("gateway", "publish", "any client"),
    consumers=("predict", "archive"),
    lane="bulk",
)
PREDICTIONS = Topic(
    name="predictions.v1",
    key="image id",
    description="One record per image and deployment: the outcome, one entry per model, the receipt.",
    partitions=12,
    max_record_bytes=MEBIBYTE,
    retention_seconds=7 * DAY_SECONDS,
    producers=("predict",),
    consumers=("store", "gateway", "any client"),
    # When a prediction was made is in its value.
    stamped_by_broker=True,
)
DEAD_LETTERS = Topic(
    name="dead-letters.v1",
    key="original key",
    description="The original value of a record that could not be finished; why, where and how often in headers.",
    partitions=4,
    max_record_bytes=MAX_DEAD_LETTER_RECORD_BYTES,
    retention_seconds=30 * DAY_SECONDS,
    producers=("predict", "store", "archive", "record", "notify"),
    consumers=("store", "gateway"),
)

MODELS = Topic(
    name="models.v1",
    key="deployment, or deployment/replica",
    description="The version of its models that a deployment should run, and what each of its replicas runs.",
    # One order for everything: a status after the version it speaks of, and the later of two activations after
    # the earlier one. A deployment changes its models a few times a day, and a replica reports every few
    # seconds; one partition takes thousands a second.
    partitions=1,
    max_record_bytes=64 * 1024,
    # So long `store` may be away and misses nothing of the history.
    retention_seconds=HOUR_SECONDS,
    producers=("CLI", "gateway", "predict"),
    consumers=("store",),
    followers=("predict", "gateway", "CLI"),
    compacted=True,
)

GPU_SAMPLES = Topic(
    name="gpu.samples.v1",
    key="host (or job, or cluster: whose GPUs are compared with each other)",
    description="What GPUs measure: the samples of all GPUs of one host over one publish interval.",
    partitions=12,
    # 1,000 samples with every field are 1.5 MB.
    max_record_bytes=4 * MEBIBYTE,
    retention_seconds=2 * DAY_SECONDS,
    producers=("collect", "replay", "simulate", "any client"),
    consumers=("watch", "record"),
)
GPU_WINDOWS = Topic(
    name="gpu.windows.v1",
    key="as gpu.samples.v1",
    description="Closed windows: aggregates, scores, conditions that hold, and the detector's state after them.",
    # As many as the samples have: a window is published to the partition that its samples came from, and read
    # back from there by the next worker that gets the partition.
    partitions=12,
    max_record_bytes=8 * MEBIBYTE,
    retention_seconds=7 * DAY_SECONDS,
    producers=("watch",),
    consumers=("record",),
    followers=("watch",),
)
GPU_ALERTS = Topic(
    name="gpu.alerts.v1",
    key="alert id",
    description="A step in the life of an alert: pending, firing, resolved.",
    partitions=4,
    max_record_bytes=64 * 1024,
    retention_seconds=30 * DAY_SECONDS,
    producers=("record",),
    consumers=("notify",),
)

TOPICS = (
    IMAGES_REALTIME, IMAGES_BULK, PREDICTIONS, DEAD_LETTERS, MODELS, GPU_SAMPLES, GPU_WINDOWS, GPU_ALERTS,
)  # fmt: skip
LANES: dict[Lane, Topic] = {"realtime": IMAGES_REALTIME, "bulk": IMAGES_BULK}


def lane_of(topic_name: str) -> Lane:
    """Return the lane of a topic name, with or without prefix; anything else counts as bulk."""
    return "realtime" if topic_name.endswith(IMAGES_REALTIME.name) else "bulk"
