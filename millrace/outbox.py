"""What is collected and not yet on Kafka: in order, one after another, and no more than fits.

While Kafka is away records wait here. When they fill the room the oldest goes first, as what a GPU does now matters
more than what it did; one with an XID error goes last, since nothing will say it again. What goes is counted.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline import logs, metrics
from pipeline.broker import Place, Publisher
from pipeline.errors import RecordTooLargeError
from pipeline.events import Outgoing
from pipeline.telemetry import Samples, encode_samples

STEP = "collect"
# A host of 8 GPUs writes 8 kB a time: a day at 10 s, a quarter of an hour at 100 ms.
MAX_HELD_BYTES = 64 * 1024 * 1024

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A record that waits."""

    samples: Samples
    outgoing: Outgoing
    has_xids: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.outgoing.value or b"")


class Outbox:
    """Publishes records in the order they come; `told` is called for each with its place."""

    def __init__(
        self,
        publisher: Publisher,
        topic: str,
        told: Callable[[Place, Samples], None],
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._publisher = publisher
        self._topic = topic
        self._told = told
        self._max_held_bytes = max_held_bytes
        self._waiting: deque[Held] = deque()
        self._waiting_bytes = 0
        self._sending: Held | None = None
        self._since: float | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.published = 0
        self.dropped = 0

    @property
    def held(self) -> int:
        """Samples that wait."""
        records = [*self._waiting, *([self._sending] if self._sending else [])]
        return sum(len(record.samples.samples) for record in records)

    @property
    def stuck_seconds(self) -> float:
        """How long the record that is being sent has waited for Kafka."""
        return 0.0 if self._since is None else asyncio.get_running_loop().time() - self._since

    def put(self, samples: Samples, key: str | None) -> None:
        """Have a record published; never blocks."""
        record = Held(samples, encode_samples(samples, key), any(sample.xids for sample in samples.samples))
        self._waiting.append(record)
        self._waiting_bytes += record.size
        while self._waiting_bytes > self._max_held_bytes and len(self._waiting) > 1:
            self._drop(next((held for held in self._waiting if not held.has_xids), self._waiting[0]))
        self._idle.clear()
        self._wake.set()

    async def run(self) -> None:
        """Publish for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._send(self._waiting.popleft())
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Wait until everything is published; whether it was within `seconds`."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _send(self, record: Held) -> None:
        self._waiting_bytes -= record.size
        self._sending, self._since = record, asyncio.get_running_loop().time()
        count = len(record.samples.samples)
        try:
            place = await self._publisher.publish_forever(self._topic, record.outgoing, step=STEP)
        except RecordTooLargeError as error:
            _log.error("samples are too large for the topic", error=error.message)
            self._count_dropped(count, "too_large")
            return
        finally:
            self._sending = self._since = None
        self.published += count
        metrics.SAMPLES_COLLECTED.inc(count)
        self._told(place, record.samples)

    def _drop(self, record: Held) -> None:
        self._waiting.remove(record)
        self._waiting_bytes -= record.size
        self._count_dropped(len(record.samples.samples), "outbox_full")

    def _count_dropped(self, count: int, reason: str) -> None:
        self.dropped += count
        metrics.SAMPLES_DROPPED.labels(STEP, reason).inc(count)
