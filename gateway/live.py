"""Results as they happen: one reader of `predictions.v1` and `dead-letters.v1` for all waiting requests.

A request registers its image before it publishes it, so no result can slip through between the two. The
reader has no consumer group and commits nothing: every gateway replica sees every result. What it misses (a
broker restart at the wrong moment) the database still tells; waiting looks there too (`predictions.py`).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import deadletters, events, logs
from pipeline.deadletters import DeadLetter
from pipeline.errors import ContractError
from pipeline.events import Prediction, Record
from pipeline.readers import LiveReader
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, PREDICTIONS

# A waiting request costs a connection and some kilobytes; above this a wait is declined, as RFC 7240 allows.
MAX_WATCHES = 2_000
RESTART_SECONDS = 1.0

Result = Prediction | DeadLetter

log = logs.get(__name__)


class Watch:
    """One request's interest in the result of one image in one deployment."""

    def __init__(self, deployment: str, group: str) -> None:
        self._deployment = deployment
        self._group = group
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def offer(self, result: Result) -> None:
        """Take the result if it is the first of this deployment."""
        if isinstance(result, Prediction):
            wanted = result.deployment == self._deployment
        else:
            wanted = result.group == self._group
        if wanted and not self.result.done():
            self.result.set_result(result)


class Live:
    """Hands results to the requests that wait for them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dead_letters = settings.topic(DEAD_LETTERS.name)
        topics = [settings.topic(PREDICTIONS.name), self._dead_letters]
        self._reader = LiveReader(settings, topics, client_id="millrace-gateway")
        self._watches: dict[str, set[Watch]] = {}
        self._count = 0
        self._task: asyncio.Task[None] | None = None
        #: Set once results are being read: whatever is published from then on is seen.
        self.reading = asyncio.Event()
        #: Set when the gateway shuts down: whoever waits should answer with what there is.
        self.stopping = asyncio.Event()

    def start(self) -> None:
        """Begin reading, as soon as a broker answers; returns at once."""
        self._task = asyncio.create_task(self._follow(), name="live results")

    async def stop(self) -> None:
        """End reading."""
        self.stopping.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._reader.stop()

    @contextmanager
    def watch(self, image_id: str, deployment: str) -> Iterator[Watch | None]:
        """Collect the first result of an image in a deployment; None when too many requests wait already."""
        if self._count >= MAX_WATCHES:
            yield None
            return
        watch = Watch(deployment, f"{self._settings.topic_prefix}predict.{deployment}")
        watches = self._watches.setdefault(image_id, set())
        watches.add(watch)
        self._count += 1
        try:
            yield watch
        finally:
            self._count -= 1
            watches.discard(watch)
            if not watches and self._watches.get(image_id) is watches:
                del self._watches[image_id]

    def deliver(self, record: Record) -> None:
        """Offer a record's result to the requests that wait for its image; skip what cannot be read."""
        if not self._watches:
            return
        if record.topic == self._dead_letters:
            image_id = (record.header(deadletters.PREFIX + "image-id") or b"").decode("utf-8", "replace")
        else:
            image_id = (record.key or b"").decode("utf-8", "replace")
        watches = self._watches.get(image_id)
        if not watches:
            return
        try:
            result: Result = (
                deadletters.decode_dead_letter(record)
                if record.topic == self._dead_letters
                else events.decode_prediction(record)
            )
        except ContractError as error:
            log.warning("not a result", topic=record.topic, offset=record.offset, error=error.message)
            return
        for watch in watches:
            watch.offer(result)

    async def _follow(self) -> None:
        await self._reader.start()
        self.reading.set()
        while True:
            try:
                async for record in self._reader:
                    self.deliver(record)
                return
            except Exception:
                # Without this task every waiting request would fall back to the database for good.
                log.exception("live reader failed, reading on")
                await asyncio.sleep(RESTART_SECONDS)
