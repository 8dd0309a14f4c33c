"""The device thread: one batch at a time, and the watch over it.

Whatever happens in the thread is reported to the event loop, and nothing in it touches the engine. A thread
cannot be ended, so a pass that takes too long is reported as fatal while it still runs.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import FatalError
from pipeline.inference.forward import Batch, Forward, Report


class Device:
    """Runs batches in a thread of its own; all methods are called on the event loop.

    `call_soon` has a callback run on the loop, from any thread; `on_done` gets the report of each batch, `on_hang`
    the error of one that does not end.
    """

    def __init__(
        self,
        *,
        hang_seconds: float,
        call_soon: Callable[..., None],
        on_done: Callable[[Report], None],
        on_hang: Callable[[FatalError], None],
    ) -> None:
        self._hang_seconds = hang_seconds
        self._call_soon = call_soon
        self._on_done = on_done
        self._on_hang = on_hang
        self._queue: queue.SimpleQueue[tuple[Forward, Batch] | None] = queue.SimpleQueue()
        self._at_work: tuple[Forward, Batch] | None = None
        self._given_at = 0.0
        self._hang_timer: asyncio.TimerHandle | None = None

    @property
    def is_free(self) -> bool:
        """Whether it waits for a batch."""
        return self._at_work is None

    async def start(self, forward: Forward) -> None:
        """Start the thread and warm models up in it.

        Raises:
            ConfigurationError: a model fails its warm-up.
        """
        self._loop = asyncio.get_running_loop()
        warm: asyncio.Future[None] = self._loop.create_future()
        # A daemon: a pass that hangs must not keep the process from ending.
        threading.Thread(target=self._run, args=(forward, warm), name="device", daemon=True).start()
        await warm

    def run(self, forward: Forward, batch: Batch) -> None:
        """Give it a batch; it is free."""
        self._at_work = forward, batch
        self._queue.put(self._at_work)
        self._given_at = time.monotonic()
        if self._hang_timer is None:  # one timer, whatever the rate of batches
            self._hang_timer = self._loop.call_later(self._hang_seconds, self._check_hang)

    def stop(self) -> None:
        """Have the thread end after its batch, and watch it no more; does not wait."""
        self._queue.put(None)
        if self._hang_timer is not None:
            self._hang_timer.cancel()

    def _done(self, report: Report) -> None:
        self._at_work = None
        self._on_done(report)

    def _check_hang(self) -> None:
        """Look whether one pass takes too long; a batch that is being bisected has many."""
        self._hang_timer = None
        if self._at_work is None:
            return
        forward, batch = self._at_work
        ran = time.monotonic() - max(self._given_at, forward.pass_started_at)
        if ran >= self._hang_seconds:
            size = len(batch.works)
            self._on_hang(FatalError(f"a forward pass of a batch of {size} has run for {ran:.0f} s"))
            return
        self._hang_timer = self._loop.call_later(self._hang_seconds - ran, self._check_hang)

    def _run(self, forward: Forward, warm: "asyncio.Future[None]") -> None:
        """Warm up, then run batches until told to end; the body of the thread."""
        usual_threads = torch.get_num_threads()
        try:
            forward.warm_up()
        except BaseException as error:  # handed to the caller of `start`
            self._call_soon(_settle, warm, warm.set_exception, error)
            return
        self._call_soon(_settle, warm, warm.set_result, None)
        while (given := self._queue.get()) is not None:
            forward, batch = given
            threads = forward.torch_threads or usual_threads
            if threads != torch.get_num_threads():  # other models took over
                torch.set_num_threads(threads)
            try:
                report = forward.run(batch)
            except BaseException as error:  # nothing may end this thread silently
                reason = f"the device thread failed: {type(error).__name__}: {error}"
                report = Report(batch, fatal=FatalError(reason))
            self._call_soon(self._done, report)


def _settle(future: "asyncio.Future[None]", settle: Callable[[Any], None], value: object) -> None:
    if not future.done():
        settle(value)
