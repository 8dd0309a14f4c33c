"""The engine's event-loop side: accepts records, cuts batches for a free device, delivers outcomes.

The invariant: each submitted request gets exactly one outcome, unless the engine has reported a fatal error
or was stopped with a batch on the device. Nothing here awaits per record: stages call back, and the calls of
other threads are gathered into one wake-up of the loop.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import torch

from pipeline import logs, metrics
from pipeline.batching import Batcher
from pipeline.cost_model import CostModel
from pipeline.energy import EnergyMeter, meter_of
from pipeline.errors import FatalError
from pipeline.imaging import Limits
from pipeline.inference.decoding import Decoder
from pipeline.inference.device import Device
from pipeline.inference.fetching import Fetcher
from pipeline.inference.forward import Batch, Forward, Report
from pipeline.inference.outcomes import Dropped, Failed, Outcome, Request, Work
from pipeline.inference.swapping import Swap
from pipeline.models import Model, torch_threads
from pipeline.settings import Settings
from pipeline.topics import LANES, Lane

# Of each lane: one batch being decoded while another is on the device; more is only memory.
DECODE_AHEAD_BATCHES = 2
# Of each lane, for models with large inputs: the pixels of all records that wait, whatever the size of a batch.
DECODE_AHEAD_BYTES = 256 * 1024 * 1024

Deliver = Callable[[Sequence[tuple[Request, Outcome]]], None]

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine runs; 0 threads means one per core for decoding, what suits the models for torch."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_batch_size: int = 32
    max_batch_bytes: int = 256 * 1024 * 1024
    decode_threads: int = 0
    torch_threads: int = 0
    limits: Limits = field(default_factory=Limits)
    missing_object_grace_seconds: float = 60.0
    batch_hang_seconds: float = 600.0

    @classmethod
    def from_settings(cls, settings: Settings, device: torch.device) -> "EngineOptions":
        """Take the settings of the inference section."""
        return cls(
            device=device,
            max_batch_size=settings.max_batch_size,
            max_batch_bytes=settings.max_batch_bytes,
            decode_threads=settings.decode_threads,
            torch_threads=settings.torch_threads,
            limits=Limits(settings.max_image_bytes, settings.max_image_pixels),
            missing_object_grace_seconds=settings.missing_object_grace_seconds,
            batch_hang_seconds=settings.batch_hang_seconds,
        )


class Engine:
    """Turns requests into outcomes; all methods are called on one event loop.

    `fetch` gets the bytes of a dataref (raising `MissingImageError`, `ImageTooLargeError` or
    `DependencyError`); `deliver` gets the outcomes of a batch together and must not block. `on_room` is called
    when a lane that `room` left out has room again. `meter` is the device's, if passes went before this.
    """

    #: Fails with a `FatalError` when the device hangs or is lost; outcomes end then. Set by `start`.
    fatal: "asyncio.Future[None]"

    def __init__(
        self,
        models: Sequence[Model],
        options: EngineOptions,
        *,
        fetch: Callable[[str], Awaitable[bytes]],
        deliver: Deliver,
        on_room: Callable[[], None],
        meter: EnergyMeter | None = None,
    ) -> None:
        self._options = options
        self._deliver_outcomes = deliver
        # Made before any pass, as it takes what the GPU draws for idle.
        self._meter = meter or meter_of(options.device)
        self._swap = Swap(self._forward_of(models))
        self._device = Device(
            hang_seconds=options.batch_hang_seconds,
            call_soon=self._call_soon,
            on_done=self._on_batch_done,
            on_hang=self._fail,
        )
        self._batcher: Batcher[Work] = Batcher(options.max_batch_size, options.max_batch_bytes)
        # Of the machine's cores a container may have a few.
        threads = options.decode_threads or len(os.sched_getaffinity(0))
        self._decoder = Decoder(self._swap.views, options.limits, threads, self._wake)
        self._fetcher = Fetcher(
            fetch,
            missing_object_grace_seconds=options.missing_object_grace_seconds,
            on_fetched=self._on_fetched,
            on_dropped=self._drop,
        )
        self._room_records = self._room()
        self._open: set[Work] = set()
        self._idle_since = time.monotonic()  # if nothing is open
        # Waiting for the decoder, in it, or decoded and not dispatched.
        self._ahead: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._on_room = on_room
        self._shut: list[Lane] = []  # what `room` left out
        self._all_done: asyncio.Future[None] | None = None
        self._wait_timer: asyncio.TimerHandle | None = None
        self._wake_is_coming = False
        self._draining = False
        self._stopped = False
        self._batch_prefix = secrets.token_hex(4)
        self._batch_number = 0

    async def start(self) -> None:
        """Start the threads and warm every model up.

        Raises:
            ConfigurationError: a model fails its warm-up.
        """
        self._loop = asyncio.get_running_loop()
        self.fatal = self._loop.create_future()
        try:
            await self._device.start(self._swap.forward)
        except BaseException:
            self._stopped = True
            raise

    @property
    def idle_seconds(self) -> float:
        """How long nothing that was submitted has waited for its outcome."""
        return 0.0 if self._open else time.monotonic() - self._idle_since

    def room(self) -> Sequence[Lane]:
        """Return the lanes of which fewer records wait for the device than it takes to keep it busy.

        Each for itself: a real-time record never waits for bulk ones to leave.
        """
        self._shut = [lane for lane in LANES if not self._has_room(lane)]
        return [lane for lane in LANES if lane not in self._shut]

    def submit(self, request: Request) -> None:
        """Accept a request; never blocks, its outcome is delivered later."""
        work = Work.of(request)
        self._open.add(work)
        if self._stopped:
            self._drop(work)
        elif request.event.dataref is not None:
            self._fetcher.add(work)
        else:
            self._decode(work)

    def warm_up(self, models: Sequence[Model]) -> None:
        """Warm models up that are to take over; blocks, in a thread of the caller's.

        Raises:
            ConfigurationError: one of them fails.
        """
        self._forward_of(models).warm_up()

    async def swap(self, models: Sequence[Model]) -> None:
        """Go over to other models between two batches; they are loaded and warm.

        Records that are decoded for the old models only are finished by them first. Returns when the next batch
        is the new models', or the engine has stopped.
        """
        async with self._swap.turn:
            if self._stopped:
                return
            over = self._swap.begin(self._forward_of(models))
            self._decoder.show(self._swap.views)
            self._room_records = self._room()  # until they take over, pictures are decoded for both
            self._take_over()
            await asyncio.wait((over, self.fatal), return_when="FIRST_COMPLETED")

    async def stop(self, drain_seconds: float) -> None:
        """Finish what was submitted within `drain_seconds`, then drop what is not on the device.

        A fetch that has to be tried again is dropped at once. Records on the device at the deadline get no
        outcome.
        """
        self._draining = True
        self._fetcher.drain()
        if not self._stopped:
            self._dispatch()  # what waits for company
        if self._open and not self._stopped and not self.fatal.done():
            self._all_done = self._loop.create_future()
            await asyncio.wait(
                (self._all_done, self.fatal), timeout=drain_seconds, return_when="FIRST_COMPLETED"
            )
        self._stopped = True
        self._swap.end()
        self._fetcher.stop()
        self._decoder.stop()
        self._device.stop()
        if self._wait_timer is not None:
            self._wait_timer.cancel()
        self._deliver([(work, Dropped()) for work in self._open if not work.is_claimed])
        self._open_room()

    def _forward_of(self, models: Sequence[Model]) -> Forward:
        device, threads = self._options.device, torch_threads(models, self._options.torch_threads)
        return Forward(models, device, threads if device.type == "cpu" else 0, self._meter)

    def _has_room(self, lane: Lane) -> bool:
        return self._stopped or self._ahead[lane] < self._room_records

    def _room(self) -> int:
        """Return how many records of a lane may wait for the device; a picture larger than all of it goes alone."""
        bytes_each = sum(view.width * view.height * 3 for view in self._decoder.views)
        records = DECODE_AHEAD_BATCHES * self._options.max_batch_size
        return max(1, min(records, DECODE_AHEAD_BYTES // bytes_each))

    def _take_over(self) -> None:
        """Let the next models take over, if there are any and it is time for them."""
        if self._device.is_free and self._swap.take_over(self._open):
            self._batcher.costs = CostModel()
            self._decoder.show(self._swap.views)
            self._room_records = self._room()

    def _decode(self, work: Work) -> None:
        self._ahead[work.request.lane] += 1
        self._decoder.add(work)

    def _on_fetched(self, work: Work) -> None:
        if self._stopped:
            return
        if work.error is None and not work.is_expired:
            self._decode(work)
            return
        self._fetcher.release(work)
        self._deliver([self._settle(work)])

    def _drop(self, work: Work) -> None:
        self._deliver([(work, Dropped())])

    def _wake(self) -> None:
        """Have `_advance` run on the loop soon; called from any thread."""
        if not self._wake_is_coming:  # set before the call, cleared before the work: no wake-up is lost
            self._wake_is_coming = True
            self._call_soon(self._advance)

    def _call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stopped = True

    def _advance(self) -> None:
        """Take over what the decode threads have finished, and feed the device."""
        self._wake_is_coming = False
        if self._stopped:
            return
        settled = []
        while (work := self._decoder.take_finished()) is not None:
            self._fetcher.release(work)
            if work.error is None and not work.is_expired:
                self._batcher.add(work, work.request.lane, work.deadline, work.pixel_bytes)
            else:
                self._ahead[work.request.lane] -= 1
                settled.append(self._settle(work))
        self._dispatch()
        self._deliver(settled)
        self._open_room()

    def _settle(self, work: Work) -> tuple[Work, Outcome]:
        """Return the outcome of a record that needs no forward pass."""
        if not self._claim(work):
            return work, Dropped()
        return work, (work.expired() if work.error is None else Failed(work.error))

    def _claim(self, work: Work) -> bool:
        try:
            work.is_claimed = work.request.claim()
        except Exception as error:  # the caller's bug; an exception here would leave the device idle for ever
            _log.exception("a record could not be claimed")
            self._fail(FatalError(f"a record could not be claimed: {type(error).__name__}: {error}"))
        return work.is_claimed

    def _dispatch(self) -> None:
        """Give the device its next batch, if it is free and something is ready."""
        settled: list[tuple[Work, Outcome]] = []
        self._take_over()
        while self._device.is_free and len(self._batcher) and not self._stopped and not self.fatal.done():
            now = time.monotonic()
            cut = self._batcher.cut(now, self._decoder.coming(), draining=self._draining)
            for work in (*cut.items, *cut.expired):
                self._ahead[work.request.lane] -= 1
            settled += [self._settle(work) for work in cut.expired]
            ours = [work for work in cut.items if self._claim(work)]
            settled += [(work, Dropped()) for work in cut.items if not work.is_claimed]
            if ours:
                self._batch_number += 1
                batch = Batch(f"{self._batch_prefix}-{self._batch_number}", ours, cut.reason)
                metrics.BATCH_SIZE.observe(len(ours))
                metrics.BATCHES.labels(cut=cut.reason).inc()
                self._device.run(self._swap.forward, batch)
            elif cut.wait_until is not None:
                self._wait(cut.wait_until - now)
                break
        self._deliver(settled)

    def _wait(self, seconds: float) -> None:
        """Dispatch again after a time; the latest word counts, since a deadline that came meanwhile is nearer."""
        if self._wait_timer is not None:
            self._wait_timer.cancel()
        self._wait_timer = self._loop.call_later(max(0.0, seconds), self._end_wait)

    def _end_wait(self) -> None:
        """Dispatch what has waited for company long enough."""
        self._wait_timer = None
        self._dispatch()
        self._open_room()

    def _on_batch_done(self, report: Report) -> None:
        if self._stopped or self.fatal.done():
            return
        if report.fatal is not None:
            self._fail(report.fatal)
            return
        if report.out_of_memory_at is not None:
            self._batcher.ran_out_of_memory(report.out_of_memory_at)
            _log.warning(
                "batch did not fit into memory", size=report.out_of_memory_at, limit=self._batcher.limit
            )
        else:
            self._batcher.fitted(len(report.batch.works))
            if report.seconds is not None:
                self._batcher.costs.observe(len(report.batch.works), report.seconds)
        # A caller that sees failures may claim nothing more; else the device goes first, publication can wait.
        has_failed = any(isinstance(outcome, Failed) for _, outcome in report.outcomes)
        if has_failed:
            self._deliver(report.outcomes)
        self._dispatch()
        if not has_failed:
            self._deliver(report.outcomes)
        self._open_room()

    def _deliver(self, outcomes: Sequence[tuple[Work, Outcome]]) -> None:
        delivered = [(work, outcome) for work, outcome in outcomes if work in self._open]
        if not delivered:
            return
        self._open.difference_update(work for work, _ in delivered)
        self._idle_since = time.monotonic()
        self._take_over()
        try:
            self._deliver_outcomes([(work.request, outcome) for work, outcome in delivered])
        except Exception as error:  # the caller's bug; going on would lose these outcomes silently
            _log.exception("outcomes could not be delivered")
            self._fail(FatalError(f"outcomes could not be delivered: {type(error).__name__}: {error}"))
            return
        if self._all_done is not None and not self._open and not self._all_done.done():
            self._all_done.set_result(None)

    def _open_room(self) -> None:
        if any(self._has_room(lane) for lane in self._shut):
            self._shut = []
            self._on_room()

    def _fail(self, error: FatalError) -> None:
        if not self.fatal.done():
            _log.error("engine failed", error=error.message)
            self.fatal.set_exception(error)
            self.fatal.exception()  # seen: a caller that is ending anyway need not retrieve it
