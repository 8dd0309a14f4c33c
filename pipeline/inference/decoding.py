"""The decode pool: threads that check the digest and decode, real-time first.

A thread picks its record when it starts, not when the record was queued, so that real-time overtakes bulk
until the last moment. Nothing here raises: what is wrong with a record is noted on its work.
"""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline import imaging, metrics
from pipeline.batching import Coming, Turns
from pipeline.errors import ContractError, MillraceError, MissingImageError, UndecodableImageError
from pipeline.inference.outcomes import Work
from pipeline.topics import Lane

# Of the newest decode in the running mean: a few dozen pictures are remembered.
DECODE_SECONDS_WEIGHT = 0.05


class Decoder:
    """Decodes in threads; finished work is appended to `finished`, then `on_finished` is called there."""

    def __init__(
        self,
        views: Sequence[imaging.View],
        limits: imaging.Limits,
        threads: int,
        on_finished: Callable[[], None],
    ) -> None:
        self.finished: deque[Work] = deque()
        self._inside: dict[Lane, int] = {"realtime": 0, "bulk": 0}
        self._threads = threads
        self._seconds = 0.0
        self.views = tuple(views)
        self._limits = limits
        self._on_finished = on_finished
        self._waiting: dict[Lane, deque[Work]] = {"realtime": deque(), "bulk": deque()}
        self._turns = Turns()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def show(self, views: Iterable[imaging.View]) -> None:
        """Decode in these views from now on; records that were begun before say so in their own `views`."""
        with self._lock:
            self.views = tuple(views)

    def add(self, work: Work) -> None:
        """Queue a record whose bytes are here."""
        self._inside[work.request.lane] += 1
        self._waiting[work.request.lane].append(work)
        self._pool.submit(self._decode_next)

    def take_finished(self) -> Work | None:
        """Return the next record that is decoded or failed to; called by the thread that adds."""
        if not self.finished:
            return None
        work = self.finished.popleft()
        self._inside[work.request.lane] -= 1
        if work.decode_ended_at:
            spent = work.decode_ended_at - work.decode_started_at
            self._seconds += (spent - self._seconds) * DECODE_SECONDS_WEIGHT
        return work

    def coming(self) -> Coming:
        """Return what is still in here, and how often one comes out."""
        return Coming(self._inside, self._seconds / self._threads)

    def stop(self) -> None:
        """Take no new work and forget what no thread has started; does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode_next(self) -> None:
        with self._lock:
            lane = self._turns.next(
                realtime=bool(self._waiting["realtime"]), bulk=bool(self._waiting["bulk"])
            )
            assert lane is not None, "as many calls as records"
            work = self._waiting[lane].popleft()
            work.views = self.views
        work.decode_started_at = time.monotonic()
        try:
            self._decode(work)
        except MillraceError as error:
            work.error = error
        except Exception as error:  # a record must not vanish with its thread's exception
            work.error = UndecodableImageError(f"{type(error).__name__}: {error}")
        work.data = b""
        self.finished.append(work)
        self._on_finished()

    def _decode(self, work: Work) -> None:
        if work.is_past_deadline():
            work.is_expired = True
            return
        _check_digest(work)
        work.picture = imaging.decode(work.data, work.views, self._limits)
        work.decode_ended_at = time.monotonic()
        metrics.DECODE_SECONDS.observe(work.decode_ended_at - work.decode_started_at)


def _check_digest(work: Work) -> None:
    event = work.request.event
    work.input_bytes = len(work.data)
    work.sha256 = hashlib.sha256(work.data).hexdigest()
    if event.sha256 is None or event.sha256 == work.sha256:
        return
    if event.dataref is not None:
        raise MissingImageError(f"the object behind ce_dataref has SHA-256 {work.sha256}, not {event.sha256}")
    raise ContractError(f"the value has SHA-256 {work.sha256}, ce_datasha256 says {event.sha256}")
