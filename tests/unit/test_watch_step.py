"""The `watch` step without Kafka: windows that are too large for a record."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from agents.careful import Mark
from agents.ownership import LaneBudget, Partition
from agents.watch import Owned, WatchStep
from agents.window_log import WindowLog
from pipeline.broker import Place
from pipeline.detection import Watch, load_rules
from pipeline.detection.roster import Roster
from pipeline.errors import RecordTooLargeError
from pipeline.events import Outgoing, Record
from pipeline.settings import load
from pipeline.telemetry import GpuWindow, Windows

START = datetime(2026, 3, 1, tzinfo=UTC)


class SmallTopic:
    """Keeps records up to a size and refuses the others, as a broker does."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.records: list[Record] = []

    async def publish_forever(self, topic: str, outgoing: Outgoing, **_: object) -> Place:
        if len(outgoing.value or b"") > self.max_bytes:
            raise RecordTooLargeError("too large")
        offset = len(self.records)
        self.records.append(
            Record(
                topic=topic,
                partition=0,
                offset=offset,
                timestamp_ms=0,
                key=outgoing.key,
                value=outgoing.value,
                headers=outgoing.headers,
            )
        )
        return Place(topic, 0, offset, 0)


def windows_of(sizes: list[int]) -> Windows:
    """Return a window whose GPUs have so much state."""
    gpus = tuple(
        GpuWindow(gpu_uuid=f"GPU-{number}", host="h", state={"x": "x" * size})
        for number, size in enumerate(sizes)
    )
    return Windows(key="job", start=START, end=START + timedelta(minutes=1), gpus=gpus)


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ([10] * 8, set()),
        ([400] * 8, set()),
        ([10, 10, 10, 10, 10, 900, 10], set()),
        ([10, 10, 2000, 10, 400, 400, 400], {"GPU-2"}),
        ([2000], {"GPU-0"}),
    ],
)
async def test_a_window_that_is_too_large_is_published_in_parts(sizes: list[int], missing: set[str]) -> None:
    """Parts are halved until they fit; a GPU that does not fit alone is left out, and the others arrive."""
    step, topic = WatchStep(load()), SmallTopic(1200)
    cast(Any, step)._publisher = topic
    watch = Watch(load_rules())
    watch.rosters["job"] = Roster(watch.plan, "job")
    lane = LaneBudget("realtime", 100, 10_000)
    partition = Partition("gpu.samples.v1", 0, 1, lane=lane, mark=Mark(), committed=None, first=0)
    owned = Owned(partition, watch, WindowLog(0))
    await step._publish(owned, windows_of(sizes))
    found = WindowLog(0)
    for record in topic.records:
        found.read(record)
    read = [gpu.gpu_uuid for part in found.take_windows() for gpu in part.gpus]
    assert read == [f"GPU-{n}" for n in range(len(sizes)) if f"GPU-{n}" not in missing]
