"""Open-loop load: publish at seeded arrival times whatever the system does, and journal what was acknowledged.

Open loop means that a slow system does not slow the arrivals down, so its latency is seen whole.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator

from loadtest.faults import Journal
from pipeline import events
from pipeline.broker import Publisher
from pipeline.settings import Settings
from pipeline.topics import LANES, Lane


def arrivals(rate_per_second: float, seed: int) -> Iterator[float]:
    """Yield seconds since the start of a Poisson process; without end, the same for the same seed."""
    draw = random.Random(seed)
    moment = 0.0
    while True:
        moment += draw.expovariate(rate_per_second)
        yield moment


async def paced(rate_per_second: float, seed: int) -> AsyncIterator[int]:
    """Yield 0, 1, 2, … at the arrival times; late arrivals follow at once."""
    started = time.monotonic()
    for number, moment in enumerate(arrivals(rate_per_second, seed)):
        wait = started + moment - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        yield number


class Driver:
    """Publishes image events at a rate until stopped; `journal` holds what the broker acknowledged."""

    def __init__(
        self,
        settings: Settings,
        picture: Callable[[int], events.ImageEvent],
        *,
        rate_per_second: float,
        lane: Lane = "bulk",
        seed: int = 1,
    ) -> None:
        self.journal = Journal()
        self._settings = settings
        self._picture = picture
        self._rate_per_second = rate_per_second
        self._topic = settings.topic(LANES[lane].name)
        self._seed = seed
        self._publisher = Publisher(settings, client_id="millrace-drive")
        self._pending: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Driver":
        await self._publisher.start()
        self._task = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def stop(self) -> Journal:
        """Stop arrivals, wait until the broker has acknowledged everything, and return the journal."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
            if self._pending:
                await asyncio.wait(self._pending)
            await self._publisher.stop()
        return self.journal

    async def publish_keyed(self, event: events.ImageEvent, *, key: bytes) -> None:
        """Publish one event outside the arrivals, on the partition of another key, and journal it."""
        await self._send(event, key)

    async def _drive(self) -> None:
        async for number in paced(self._rate_per_second, self._seed):
            task = asyncio.create_task(self._send(self._picture(number)))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def _send(self, event: events.ImageEvent, key: bytes | None = None) -> None:
        outgoing = events.encode_image(event)
        if key is not None:
            outgoing = events.Outgoing(key, outgoing.value, outgoing.headers)
        place = await self._publisher.publish_forever(self._topic, outgoing, step="drive")
        self.journal.add(event.id, place)
