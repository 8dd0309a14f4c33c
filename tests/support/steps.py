"""A step that computes nothing: each record becomes a prediction without models, after a delay.

`python -m tests.support.steps` runs it as a real worker process; the options come from the environment.
It exists so that delivery is proved apart from inference.
"""

import asyncio
import os
import sys
from datetime import UTC, datetime

from agents.app import run_step
from agents.delivery import Delivered, Delivery
from pipeline import deadletters, events, topics
from pipeline.broker import Publisher
from pipeline.errors import MillraceError
from pipeline.settings import Settings, load

BATCH_RECORDS = int(os.environ.get("TEST_BATCH_RECORDS", "32"))
BATCH_SECONDS = float(os.environ.get("TEST_BATCH_SECONDS", "0.05"))
OVERLAP = int(os.environ.get("TEST_OVERLAP", "2"))
# Stops at this record for ever, without finishing it: the head of a partition that never ends.
STUCK_ID = os.environ.get("TEST_STUCK_ID")
# Ends the process at this record, as a crashing decoder would.
ABORT_PREFIX = os.environ.get("TEST_ABORT_PREFIX")


class Copy:
    """Copies image ids to the predictions topic, in overlapping batches."""

    name = "copy"
    topics = (topics.IMAGES_REALTIME, topics.IMAGES_BULK)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._publisher = Publisher(settings, client_id="copy")

    async def start(self) -> None:
        await self._publisher.start()

    async def stop(self) -> None:
        await self._publisher.stop()

    def unready(self) -> str | None:
        return None

    async def run(self, delivery: Delivery) -> None:
        free = asyncio.Semaphore(OVERLAP)
        async with asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                batch = await delivery.take(BATCH_RECORDS, 32 * 1024 * 1024)
                started = [delivered for delivered in batch if delivered.claim()]
                group.create_task(self._copy(started)).add_done_callback(lambda _: free.release())

    async def _copy(self, batch: list[Delivered]) -> None:
        await asyncio.sleep(BATCH_SECONDS)
        for delivered in batch:
            image_id = events.image_id(delivered.record)
            if ABORT_PREFIX and image_id.startswith(ABORT_PREFIX):
                os.abort()
            if image_id == STUCK_ID:
                await asyncio.Event().wait()
        await asyncio.gather(*(self._publish(delivered) for delivered in batch))
        for delivered in batch:
            delivered.finish("predicted")

    async def _publish(self, delivered: Delivered) -> None:
        record = delivered.record
        image_id = events.image_id(record)
        prediction = events.Prediction(
            id=events.prediction_id(image_id, "copy", ()),
            image_id=image_id,
            deployment="copy",
            lane=delivered.lane,
            outcome="predicted",
            time=datetime.now(UTC),
            receipt=events.Receipt(topic=record.topic, partition=record.partition, offset=record.offset),
        )
        topic = self._settings.topic(topics.PREDICTIONS.name)
        await self._publisher.publish_forever(topic, events.encode_prediction(prediction), step=self.name)

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        letter = deadletters.from_error(
            self._settings.group(self.name), delivered.record, error, datetime.now(UTC)
        )
        topic = self._settings.topic(topics.DEAD_LETTERS.name)
        await self._publisher.publish_forever(topic, deadletters.encode_dead_letter(letter), step=self.name)
        delivered.finish("dead_lettered")


if __name__ == "__main__":
    settings = load()
    sys.exit(run_step(lambda: Copy(settings), settings))
