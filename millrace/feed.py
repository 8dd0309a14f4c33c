"""Publish samples at their pace: what `millrace replay` and `millrace simulate` have in common.

A tick is what one publish interval brings. Its records are published side by side, and all of them are on the
broker before the next tick begins, so that no key is out of order. Time lost to a slow broker is not made up for
by waiting less than nothing: the feed is then simply behind.
"""

import asyncio
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from millrace.output import emit
from millrace.progress import Progress
from pipeline import telemetry
from pipeline.broker import Publisher
from pipeline.settings import Settings
from pipeline.telemetry import Samples
from pipeline.topics import GPU_SAMPLES

# A broker that restarts is back within this; then the run ends.
PUBLISH_SECONDS = 60.0
_AT_ONCE = 32
# One record has at most so many samples: every field of these is 1.5 MB of the topic's 4.
_MAX_SAMPLES = 1_000


class Tick(NamedTuple):
    """What is published at one moment."""

    #: Since the first tick, on the clock on the wall.
    offset_seconds: float
    records: list[Samples]
    #: What the progress bar counts.
    size: int


class Published(msgspec.Struct, frozen=True):
    """A record that the broker has: a line of `--json`."""

    host: str
    topic: str
    partition: int
    offset: int
    samples: int


class Feed:
    """Publishes ticks and counts.

    Args:
        settings: Where the broker is.
        publisher: Started.
        peers: The key of all records, `host`: each host's own.
        as_json: Print a line for each record.
    """

    def __init__(self, settings: Settings, publisher: Publisher, *, peers: str, as_json: bool) -> None:
        self._topic = settings.topic(GPU_SAMPLES.name)
        self._publisher = publisher
        self._key = None if peers == "host" else peers
        self._as_json = as_json
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.records = 0
        self.samples = 0
        self.values = 0

    async def run(self, ticks: Iterator[Tick], progress: Progress, *, is_paced: bool) -> None:
        """Publish each tick when it is due, or one after the other.

        Raises:
            DependencyError: the broker stopped answering; what was published stays so.
        """
        began: float | None = None
        while (tick := await asyncio.to_thread(next, ticks, None)) is not None:
            began = began or time.monotonic()
            if is_paced:
                await asyncio.sleep(began + tick.offset_seconds - time.monotonic())
            async with asyncio.TaskGroup() as group:
                for record in tick.records:
                    for part in _parts(record):
                        await self._slots.acquire()
                        group.create_task(self._publish(part))
            progress.advance(count=tick.size)

    async def _publish(self, record: Samples) -> None:
        try:
            place = await self._publisher.publish(self._topic, telemetry.encode_samples(record, self._key))
        finally:
            self._slots.release()
        self.records += 1
        self.samples += len(record.samples)
        self.values += sum(len(sample.values) for sample in record.samples)
        if self._as_json:
            emit(Published(record.host, place.topic, place.partition, place.offset, len(record.samples)))


def _parts(record: Samples) -> Iterator[Samples]:
    if len(record.samples) <= _MAX_SAMPLES:
        yield record
        return
    for begin in range(0, len(record.samples), _MAX_SAMPLES):
        samples = record.samples[begin : begin + _MAX_SAMPLES]
        gpus = record.gpus[begin : begin + _MAX_SAMPLES]
        yield msgspec.structs.replace(record, samples=samples, gpus=gpus)
