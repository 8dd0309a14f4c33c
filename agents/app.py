"""One step as a process: settings, signals, health, the Faust app, and how it ends.

Exit codes: 0 drained; 70 the process could no longer be trusted, or SIGTERM's deadline passed (both
unacknowledged: Kafka delivers again); 78 a wrong setting. A step never acknowledges on its way out.
"""

import asyncio
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from agents import devices
from agents.consumer import Committer, StepApp
from agents.delivery import Delivered, Delivery
from agents.site import Site
from pipeline import admin, allocator, garbage, logs, metrics
from pipeline.connections import ping
from pipeline.errors import (
    EXIT_CONFIGURATION,
    EXIT_FATAL,
    ConfigurationError,
    DependencyError,
    FatalError,
    MillraceError,
)
from pipeline.settings import Settings
from pipeline.topics import Topic

log = logs.get(__name__)

STEPS = {
    "predict": "agents.predict:Predict",
    "store": "agents.store:Store",
    "archive": "agents.archive:Archive",
    "watch": "agents.watch:WatchStep",
    "record": "agents.record:Record",
    "notify": "agents.notify:Notify",
}

# They may be given several devices, and then are a process for each.
ON_SEVERAL_DEVICES = frozenset({"predict"})

# They compute on blocks of megabytes, again and again.
KEEP_FREED = frozenset({"predict"})

# Membership may be lost during a broker's restart; minutes without, when the broker answers, are a fault.
LOST_MEMBERSHIP_SECONDS = 180.0
MONITOR_SECONDS = 15.0
# At least so long between two looks: a topic with transactions has a gap in every fetch.
MONITOR_PAUSE_SECONDS = 1.0
# A fetched record reaches the agent within milliseconds; one that does not was dropped on the way by a library.
LOST_RECORD_SECONDS = 60.0
# Of the grace period after SIGTERM: for started work; the rest is for leaving the group and closing clients.
DRAIN_SHARE = 0.8


class Step(Protocol):
    """What a step must offer; see `predict.py` for the largest one."""

    name: str

    @property
    def topics(self) -> tuple[Topic, ...]:
        """The topics it reads."""

    async def start(self) -> None:
        """Connect, load and warm up. Raises ConfigurationError; waits for dependencies."""

    async def run(self, delivery: Delivery) -> None:
        """Take, claim and finish records until cancelled. Raises FatalError only."""

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Dead-letter a record unopened and finish it."""

    async def stop(self) -> None:
        """Close what `start` opened."""

    def unready(self) -> str | None:
        """Say why the step cannot work now, or None."""


def load(name: str, settings: Settings) -> Step:
    """Make a step by name, importing only what it needs.

    Raises:
        ConfigurationError: there is no such step.
    """
    if name not in STEPS:
        raise ConfigurationError(f"there is no step {name!r}; there are {', '.join(STEPS)}")
    module, _, attribute = STEPS[name].partition(":")
    step: Step = getattr(importlib.import_module(module), attribute)(settings)
    return step


def run(name: str, settings: Settings) -> int:
    """Run a step of the table until SIGTERM or SIGINT; return the exit code.

    Raises:
        ConfigurationError: several devices are named, and not rightly.
    """

    def run_one(settings: Settings) -> int:
        return run_step(lambda: load(name, settings), settings)

    if name in KEEP_FREED:
        allocator.keep_freed()
    if name not in ON_SEVERAL_DEVICES:
        return run_one(settings)
    found = devices.listed(settings.device)
    if len(found) == 1:
        return run_one(settings.model_copy(update={"device": found[0]}))
    logs.configure(settings)
    return devices.run_each(devices.shares(settings, found), run_one)


def leave(code: int) -> NoReturn:
    """End the process at once, after the last line of its log.

    A thread that loads models or is stuck on the device may be in native code, which aborts when the interpreter
    is taken down around it; a step that has drained has nothing left to tidy up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_step(make: Callable[[], Step], settings: Settings) -> int:
    """Run the step that `make` returns until SIGTERM or SIGINT; return the exit code."""
    logs.configure(settings)
    try:
        return asyncio.run(_run(make, settings))
    except ConfigurationError as error:
        print(f"millrace: {error.message}", file=sys.stderr)
        return EXIT_CONFIGURATION


async def _run(make: Callable[[], Step], settings: Settings) -> int:
    step = make()
    garbage.resume()
    return await Worker(step, settings).run()


class Worker:
    """Runs one step in this process."""

    def __init__(self, step: Step, settings: Settings) -> None:
        self._step = step
        self._settings = settings
        self._committer = Committer()
        self._delivery = Delivery(
            step=step.name,
            committer=self._committer,
            reject=step.reject,
            max_open_records=settings.max_open_records,
            max_open_bytes=settings.max_open_bytes,
        )
        self._stopping = asyncio.Event()
        self._app: StepApp | None = None
        self._warm = False
        self._lost_since: float | None = None
        self._site = Site(settings, live=self._dead, ready=self._unready)

    async def run(self) -> int:
        """Serve until a signal; return the exit code, or end the process at once when it is fatal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin_stop)
        metrics.show_zeros(self._step.name, [self._settings.topic(topic.name) for topic in self._step.topics])
        await self._site.start()
        ended = await self._until_stopped(self._serve())
        if ended is not None:
            self._end_if_fatal(ended)
        try:
            await self._drain()
        finally:
            log.info("stopped")
        return 0

    async def _serve(self) -> None:
        await self._step.start()
        await self._wait_for_kafka()
        datadir = tempfile.mkdtemp(prefix="millrace-faust-")  # Faust insists on a folder; it stays empty
        self._app = StepApp(self._step.name, self._settings, self._delivery, datadir=datadir)
        self._committer.app = self._app
        for topic in self._step.topics:
            self._app.read(self._settings.topic(topic.name))
        try:
            garbage.set_apart()  # before this worker is a member, for nothing goes on meanwhile
            await self._app.start()
            self._warm = True
            log.info("started", group=self._settings.group(self._step.name))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._step.run(self._delivery))
                group.create_task(self._watch_app())
                group.create_task(self._monitor())
        finally:
            shutil.rmtree(datadir, ignore_errors=True)

    async def _watch_app(self) -> None:
        assert self._app is not None
        await self._app.wait_until_stopped()
        raise FatalError(f"the Kafka consumer ended: {self._app.crash_reason!r}")

    async def _until_stopped(self, coroutine: object) -> BaseException | None:
        """Run until the coroutine fails or a signal comes; return what it failed with."""
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            return _first(error)
        self._serving = task
        return None

    def _end_if_fatal(self, error: BaseException) -> None:
        if isinstance(error, ConfigurationError):
            raise error
        log.critical("ending without acknowledging", error=repr(error), exc_info=error)
        sys.stderr.flush()
        os._exit(EXIT_FATAL)

    async def _drain(self) -> None:
        """Finish started work, commit, leave the group, close; a timer ends the process at the deadline."""
        grace = self._settings.shutdown_grace_seconds
        if self._app is not None and self._app.started:
            consumer = self._app.consumer
            consumer.stop_flow()
            await self._delivery.stop(deadline_seconds=grace * DRAIN_SHARE)
        self._serving.cancel()
        await asyncio.wait({self._serving})
        await self._step.stop()
        if self._app is not None:
            await self._app.stop()
        await self._site.stop()

    def _begin_stop(self) -> None:
        if self._stopping.is_set():
            return
        log.info("stopping")
        self._stopping.set()
        metrics.READY.labels(self._step.name).set(False)
        timer = threading.Timer(self._settings.shutdown_grace_seconds * 0.95, _exit_hard)
        timer.daemon = True
        timer.start()

    async def _wait_for_kafka(self) -> None:
        while True:
            try:
                await ping(self._settings)
                missing = await admin.missing_topics(self._settings, self._step.topics)
            except DependencyError as error:
                log.warning("waiting for Kafka", reason=error.message)
            else:
                if not missing:
                    return
                log.warning("waiting for topics: run `millrace topics apply`", missing=missing)
            await asyncio.sleep(1.0)

    async def _monitor(self) -> None:
        """Keep lag and membership up to date; say when retention overtakes the group."""
        assert self._app is not None
        while True:
            consumer = self._app.consumer
            if self._delivery.oldest_pending_seconds() > LOST_RECORD_SECONDS:
                raise FatalError("records were fetched and did not reach the agent")
            if consumer.is_member():
                self._lost_since = None
            elif self._lost_since is None:
                self._lost_since = time.monotonic()
            try:
                self._delivery.observe_ends(await consumer.starts())
            except DependencyError:
                self._lost_since = None  # the broker does not answer: not our fault
            metrics.READY.labels(self._step.name).set(self._unready() is None)
            await asyncio.sleep(MONITOR_PAUSE_SECONDS)
            await self._delivery.wait_for_gap(MONITOR_SECONDS - MONITOR_PAUSE_SECONDS)

    def _dead(self) -> str | None:
        if self._lost_since is not None and time.monotonic() - self._lost_since > LOST_MEMBERSHIP_SECONDS:
            return "not a member of the consumer group for minutes although the broker answers"
        return None

    def _unready(self) -> str | None:
        if self._stopping.is_set():
            return "stopping"
        if not self._warm:
            return "starting"
        if not self._delivery.joined:
            return "joining the consumer group"
        return self._step.unready()


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _exit_hard() -> None:
    # Not sys.exit: the loop, a forward pass or a client may be stuck. Unfinished records are delivered again.
    print("millrace: the grace period is over, ending without acknowledging", file=sys.stderr, flush=True)
    os._exit(EXIT_FATAL)
