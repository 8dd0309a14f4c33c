"""The lanes share a worker and nothing else: what stops the bulk lane does not slow the real-time one down."""

import asyncio
import time

import pytest

from pipeline.events import ImageEvent, decode_prediction
from pipeline.objects import ObjectStore
from pipeline.readers import LiveReader
from tests.support import pictures
from tests.support.eventually import eventually
from tests.support.spine import Spine, picture

RATE_PER_SECOND = 30
COUNT = 120
# Two runs of the same on a busy machine differ by half of this; a lane that waits for the other never ends.
FACTOR = 4.0

pytestmark = pytest.mark.timeout(180)


async def realtime_p99_seconds(spine: Spine, prefix: str, count: int = COUNT) -> float:
    """Publish real-time pictures at a rate; return the 99th percentile from publishing to the prediction."""
    reader = LiveReader(spine.settings, [spine.settings.topic("predictions.v1")])
    await reader.start()
    sent: dict[str, float] = {}
    seconds: dict[str, float] = {}

    async def receive() -> None:
        async for record in reader:
            image_id = decode_prediction(record).image_id
            if image_id in sent:
                seconds[image_id] = time.monotonic() - sent[image_id]
            if len(seconds) == count:
                return

    receiving = asyncio.create_task(receive())
    started, sending = time.monotonic(), []
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number / RATE_PER_SECOND - time.monotonic()))
        event = picture(f"{prefix}-{number}", number)
        sent[event.id] = time.monotonic()
        sending.append(asyncio.create_task(spine.send(event, lane="realtime")))
    await asyncio.gather(*sending)
    async with asyncio.timeout(60):
        await receiving
    await reader.stop()
    return sorted(seconds.values())[int(count * 0.99)]


async def test_a_stalled_bulk_lane(spine: Spine) -> None:
    """A bulk lane that is full of records whose objects do not come leaves real-time's p99 as it was."""
    patient = {"MILLRACE_MAX_OPEN_RECORDS": "50", "MILLRACE_MISSING_OBJECT_GRACE_SECONDS": "600"}
    worker, _ = await spine.start("predict", "store", **patient)
    await realtime_p99_seconds(spine, "warm-up", 30)
    before = await realtime_p99_seconds(spine, "before")

    stalled = [ImageEvent(id=f"stalled-{n}", dataref="late/picture.jpg") for n in range(400)]
    await asyncio.gather(*(spine.send(event) for event in stalled))

    def is_paused() -> bool:
        return worker.metric("millrace_lane_paused", lane="bulk") == 1

    await eventually(is_paused, 60)
    during = await realtime_p99_seconds(spine, "during")
    assert is_paused()
    assert not any(row.image_id.startswith("stalled") for row in (await spine.stored()).results)

    objects = ObjectStore.open(spine.settings)
    await objects.put("late/picture.jpg", pictures.jpeg())
    objects.close()
    await spine.settled("predict", "store", whole=True)
    after = await realtime_p99_seconds(spine, "after")
    print(
        f"real-time p99: {before:.3f} s before, {during:.3f} s beside a stalled bulk lane, {after:.3f} s after"
    )
    await spine.settled("predict", "store", whole=True)
    assert during <= FACTOR * max(before, after)
