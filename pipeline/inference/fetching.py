"""Get the bytes behind datarefs: a few at a time per lane, and patiently.

A failing store is asked again for ever; an object that is not there is asked for during a grace, because a
publisher may publish the record before the object is visible. A record that waits for its next attempt
holds no slot, so that missing objects do not keep present ones waiting.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable

from pipeline import logs, metrics
from pipeline.errors import DependencyError, MillraceError, MissingImageError
from pipeline.inference.outcomes import Work
from pipeline.topics import Lane

# Fetched pictures wait for the decoder in memory, up to `max_image_bytes` (32 MiB) each: 256 MiB a lane.
SLOTS_PER_LANE = 8
FIRST_RETRY_SECONDS = 0.25
MAX_RETRY_SECONDS = 30.0

_log = logs.get(__name__)


class Fetcher:
    """Fetches on the event loop; `on_fetched` gets the work with its `data` or its `error` set."""

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        missing_object_grace_seconds: float,
        on_fetched: Callable[[Work], None],
        on_dropped: Callable[[Work], None],
    ) -> None:
        self._fetch = fetch
        self._grace_seconds = missing_object_grace_seconds
        self._on_fetched = on_fetched
        self._on_dropped = on_dropped
        self._queued: dict[Lane, deque[Work]] = {"realtime": deque(), "bulk": deque()}
        self._free_slots: dict[Lane, int] = {"realtime": SLOTS_PER_LANE, "bulk": SLOTS_PER_LANE}
        self._retries: dict[Work, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    def add(self, work: Work) -> None:
        """Queue a record whose bytes are in the object store."""
        self._queued[work.request.lane].append(work)
        self._start_next(work.request.lane)

    def release(self, work: Work) -> None:
        """Give back the slot that a fetched record holds until it is decoded; others have none."""
        if work.fetch_slot:
            work.fetch_slot = False
            lane = work.request.lane
            self._free_slots[lane] += 1
            self._start_next(lane)

    def drain(self) -> None:
        """Drop what waits for another attempt, now and from now on."""
        self._draining = True
        for work, timer in self._retries.items():
            timer.cancel()
            self._on_dropped(work)
        self._retries.clear()

    def stop(self) -> None:
        """Cancel everything; the caller accounts for the records."""
        self.drain()
        for queue in self._queued.values():
            queue.clear()
        for task in self._tasks:
            task.cancel()

    def _start_next(self, lane: Lane) -> None:
        queue = self._queued[lane]
        while queue and self._free_slots[lane]:
            work = queue.popleft()
            if work.request.is_forgotten():
                self._on_dropped(work)
                continue
            self._free_slots[lane] -= 1
            work.fetch_slot = True
            task = asyncio.get_running_loop().create_task(self._attempt(work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _attempt(self, work: Work) -> None:
        work.is_expired = work.is_past_deadline()
        retry_seconds = None if work.is_expired else await self._fetch_once(work)
        if retry_seconds is None:
            self._on_fetched(work)
            return
        self.release(work)
        if self._draining:
            self._on_dropped(work)
            return
        self._retries[work] = asyncio.get_running_loop().call_later(retry_seconds, self._retry, work)

    async def _fetch_once(self, work: Work) -> float | None:
        """Set the work's `data` or `error`, or return after how many seconds to try again."""
        assert work.request.event.dataref is not None
        try:
            work.data = await self._fetch(work.request.event.dataref)
        except MissingImageError as error:
            now = asyncio.get_running_loop().time()
            work.missing_since = work.missing_since or now
            left_seconds = work.missing_since + self._grace_seconds - now
            if left_seconds > 0:
                return min(self._backoff_seconds(work), left_seconds)
            work.error = error
        except DependencyError as error:
            return self._dependency_failed(work, error)
        except MillraceError as error:
            work.error = error
        except Exception as error:  # a client library's own error: not the record's fault, so never its end
            return self._dependency_failed(work, error)
        return None

    def _dependency_failed(self, work: Work, error: Exception) -> float:
        metrics.RETRIES.labels(step="predict", dependency="object_store").inc()
        record = work.request.record
        _log.warning(
            "fetch failed, will try again",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            attempts=work.fetch_attempts + 1,
            error=f"{type(error).__name__}: {error}",
        )
        return self._backoff_seconds(work)

    @staticmethod
    def _backoff_seconds(work: Work) -> float:
        seconds = min(FIRST_RETRY_SECONDS * 2.0 ** min(work.fetch_attempts, 10), MAX_RETRY_SECONDS)
        work.fetch_attempts += 1
        return seconds * random.uniform(0.5, 1.0)  # records that failed together do not come back together

    def _retry(self, work: Work) -> None:
        del self._retries[work]
        self.add(work)
