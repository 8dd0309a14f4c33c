"""What this replica of `predict` runs: follows `models.v1`, tries versions, and reports there.

The desired version of the deployment wins over `MILLRACE_MODELS`. One that cannot be loaded or warmed up is
refused with its reason and what ran before goes on; nothing that is on the topic, and no lack of a broker,
stops a replica that works.
"""

import asyncio
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from pipeline import artefacts, deployments, logs, metrics
from pipeline.broker import Publisher
from pipeline.connections import backoff_seconds
from pipeline.deployments import (
    REPORT_SECONDS,
    ModelIdentity,
    Refusal,
    Running,
    Status,
    Version,
    replica_name,
)
from pipeline.errors import ConfigurationError, DependencyError, FatalError, MillraceError
from pipeline.models import Model
from pipeline.objects import ObjectStore
from pipeline.registry import Follower
from pipeline.settings import Settings
from pipeline.topics import MODELS

# A version that killed its process so often while it was loaded is not tried again: as records are.
MAX_ATTEMPTS = 3
# For one report: it must not hold up a start, and the next one comes soon.
_REPORT_TIMEOUT_SECONDS = 5.0
_FAREWELL_SECONDS = 2.0
_FORGET_SECONDS = 24 * 3600.0
_MAX_REASON_CHARACTERS = 500

T = TypeVar("T")
#: Loads the models that specifications name; blocks, runs in a thread of its own.
Load = Callable[[Sequence[str]], Sequence[Model]]
#: Puts loaded models of a version to work.
Use = Callable[[Version, Sequence[Model]], Awaitable[None]]

log = logs.get(__name__)


class _SupersededError(Exception):
    """Another version was activated meanwhile."""


class Replica:
    """One worker's part in its deployment."""

    def __init__(self, settings: Settings, objects: ObjectStore, load: Load) -> None:
        self._settings = settings
        self._objects = objects
        self._load = load
        self._topic = settings.topic(MODELS.name)
        self._follower = Follower(settings, client_id="predict-models")
        # Of its own: a broker that refuses reports must not disturb predictions.
        self._publisher = Publisher(
            settings, client_id="predict-models", timeout_seconds=_REPORT_TIMEOUT_SECONDS
        )
        self._name = settings.replica or replica_name(str(os.getpid()))
        self._specified = Version(revision=0, models=_split(settings.models))
        self._running: Version | None = None
        self._refused: Version | None = None
        self._status = Status(deployment=settings.deployment, replica=self._name, time=datetime.now(UTC))
        self._reporting = asyncio.Lock()
        self._heart: asyncio.Task[None] | None = None

    async def start(self, use: Use) -> None:
        """Wait for the broker, then begin: with the desired version, else the one before, else the setting.

        Raises:
            ConfigurationError: none of them can be used.
        """
        await self._follower.start()
        await self._publisher.start()
        before = self._deployment.replicas.get(self._name)
        if before is not None:
            self._status = Status(
                deployment=self._status.deployment, replica=self._name, time=before.time,
                loading=before.loading, attempts=before.attempts,
            )  # fmt: skip
        self._heart = asyncio.create_task(self._beat())
        try:
            while self._running is None:
                await self._begin(use)
        except ConfigurationError:
            await self.stop()  # the process ends with one line, and not with clients that nobody closed
            raise

    async def run(self, use: Use) -> None:
        """Follow the desired version until cancelled.

        Raises:
            FatalError: as `use` does.
        """
        while True:
            wanted = self._wanted
            metrics.MODELS_WANTED_REVISION.set(wanted.revision)
            if wanted not in (self._running, self._refused):
                with contextlib.suppress(_SupersededError):
                    await self._try(wanted, use)
                continue
            await self._follower.wait_for_change(1.0)

    async def stop(self) -> None:
        """Take this replica off the topic; brief, whatever the broker does."""
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
            with contextlib.suppress(MillraceError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await self._publisher.publish(
                        self._topic, deployments.tombstone(deployments.key_of(self._status))
                    )
        await self._follower.stop()
        await self._publisher.stop(_FAREWELL_SECONDS)

    @property
    def _deployment(self) -> Running:
        return self._follower.registry[self._settings.deployment]

    @property
    def _wanted(self) -> Version:
        desired = self._deployment.desired
        return desired.version if desired else self._specified

    async def _begin(self, use: Use) -> None:
        """Try what there is in its order, until something runs or another version is activated."""
        error: Exception | None = None
        for version in self._candidates():
            try:
                error = await self._try(version, use)
            except _SupersededError:
                return
            if error is None:
                return
        assert error is not None, "there is always a candidate"
        raise (
            error if isinstance(error, ConfigurationError) else ConfigurationError(_reason(error))
        ) from error

    def _candidates(self) -> Iterator[Version]:
        desired = self._deployment.desired
        if desired is not None:
            log.info(
                "models.v1 says what to run, MILLRACE_MODELS does not count",
                revision=desired.version.revision,
                models=desired.version.models,
            )
            yield desired.version
            if desired.predecessor is not None:
                yield desired.predecessor
        elif reason := self._follower.registry.unreadable.get(self._settings.deployment):
            log.error(
                "what models.v1 says cannot be read, MILLRACE_MODELS counts until another version is activated",
                reason=reason,
            )
        yield self._specified

    async def _try(self, version: Version, use: Use) -> Exception | None:
        """Load a version and put it to work; return why that is impossible, and refuse it.

        Raises:
            FatalError: as `use` does.
            _SupersededError: another version was activated before this one was loaded.
        """
        attempts = self._status.attempts if self._status.loading == version.revision else 0
        try:
            if version.revision and attempts >= MAX_ATTEMPTS:
                raise ConfigurationError(
                    f"the process died {attempts} times in a row while it loaded this version"
                )
            # Before the work begins: if it kills the process, the topic knows.
            await self._report(loading=version.revision, attempts=attempts + 1)
            models = await self._loaded(version)
            await use(version, models)
        except (FatalError, _SupersededError):
            raise
        except Exception as error:  # models and the libraries that load them raise anything
            await self._refuse(version, error)
            return error
        # One that it fell back to does not make the refused one worth another try.
        self._running, self._refused = version, self._refused if version != self._wanted else None
        metrics.MODEL_SWAPS.labels("swapped").inc()
        metrics.MODELS_REVISION.set(version.revision)
        log.info("runs models", revision=version.revision, models=[model.name for model in models])
        await self._report(
            revision=version.revision,
            since=datetime.now(UTC),
            models=tuple(
                ModelIdentity(model.name, model.version, model.digest, model.task) for model in models
            ),
            loading=None,
            attempts=0,
            refused=self._status.refused if version != self._wanted else None,
        )
        return None

    async def _refuse(self, version: Version, error: Exception) -> None:
        # What was loaded half-way is garbage by now, and may be most of the memory.
        gc.collect()
        reason = _reason(error)
        log.error("cannot run a version of its models", revision=version.revision, reason=reason)
        metrics.MODEL_SWAPS.labels("refused").inc()
        changes: dict[str, Any] = {"loading": None, "attempts": 0}
        if version == self._wanted:
            self._refused = version
            changes["refused"] = Refusal(version.revision, reason, datetime.now(UTC))
        await self._report(**changes)

    async def _loaded(self, version: Version) -> Sequence[Model]:
        if not version.artefacts:
            return await in_thread(lambda: self._load(version.models))
        folder = await self._fetched(version)
        names = {artefact.name for artefact in version.artefacts}
        local = {
            artefacts.with_path(name, str(folder / path)): name
            for name in version.models
            if (path := artefacts.path_of(name)) in names and path is not None
        }
        wanted = {name: path for path, name in local.items()}
        models = await in_thread(lambda: self._load([wanted.get(name, name) for name in version.models]))
        for model in models:
            if model.name in local:  # the name that all replicas know it by, wherever its file lies here
                cast(Any, model).name = local[model.name]
        return models

    async def _fetched(self, version: Version) -> Path:
        """Fetch files, for as long as the object store does not answer and nobody activates another version."""
        wanted = self._wanted
        for delay in backoff_seconds():
            try:
                return await artefacts.fetch(
                    self._objects, version.artefacts, self._settings.resolved_model_cache
                )
            except DependencyError as error:
                metrics.RETRIES.labels("predict", "object_store").inc()
                log.warning("fetching models again", revision=version.revision, error=error.message)
            await asyncio.sleep(delay)
            if wanted != self._wanted:
                raise _SupersededError
        raise AssertionError("backoff_seconds never ends")

    async def _report(self, **changes: Any) -> None:
        """Say on the topic how this replica is; a report that is not taken is made up for by the next."""
        async with self._reporting:
            self._status = msgspec.structs.replace(self._status, time=datetime.now(UTC), **changes)
            try:
                await self._publisher.publish(self._topic, deployments.encode(self._status))
            except MillraceError as error:
                log.warning("could not report what runs here", error=error.message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            try:
                await self._report()
                await self._forget_others()
            except Exception:  # without reports the replica would count as gone
                log.exception("a report failed")

    async def _forget_others(self) -> None:
        """Take replicas off the topic that ended without a word long ago."""
        now = datetime.now(UTC)
        for status in list(self._deployment.replicas.values()):
            if (now - status.time).total_seconds() > _FORGET_SECONDS:
                with contextlib.suppress(MillraceError):
                    await self._publisher.publish(
                        self._topic, deployments.tombstone(deployments.key_of(status))
                    )


async def in_thread(work: Callable[[], T]) -> T:
    """Run something long in a thread that does not keep the process from ending, as those of asyncio do."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[..., None], value: object) -> None:
        if not done.done():
            settle(value)

    def run() -> None:
        try:
            with _yielding():
                settle, value = done.set_result, work()
        except BaseException as error:
            settle, value = done.set_exception, error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, settle, value)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await done


@contextlib.contextmanager
def _yielding() -> Iterator[None]:
    """Leave the interpreter to the threads that predict: importing a library alone takes seconds of it.

    While timm was imported on two busy cores, no prediction came for up to 490 ms; for up to 150 ms with
    threads that change places ten times as often and without full collections of garbage.
    """
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(interval / 10)
    gc.set_threshold(*thresholds[:2], 1_000_000)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


def _split(models: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in models.split(",") if name.strip())


def _reason(error: BaseException) -> str:
    """Say in one line what is wrong; the topic takes no control characters, and nothing endless."""
    text = error.message if isinstance(error, MillraceError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.removeprefix("MILLRACE_MODELS: ").encode("utf-8", "replace").decode().split())
    return "".join(letter for letter in text if letter.isprintable())[:_MAX_REASON_CHARACTERS]
