"""Reading and writing `models.v1`: a follower that keeps its state, and the activation of a version.

Writers of one deployment exclude each other through the broker: each is the one holder of a transactional id,
so whoever began earlier and has not committed is fenced off. What an activation has read is therefore still
true when its record becomes visible. Nothing here judges models: that is each replica's own affair.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, ProducerFenced, TopicAuthorizationFailedError

from pipeline import deployments, logs
from pipeline.connections import backoff_seconds, client_options, unreachable
from pipeline.deployments import Artefact, Desired, Registry, Version
from pipeline.errors import ConflictError, ContractError, DependencyError
from pipeline.events import Outgoing, Record
from pipeline.readers import LiveReader, read_all
from pipeline.settings import Settings
from pipeline.topics import MODELS

# The broker ends the transaction of a writer that died after this; the next one need not wait for it.
TRANSACTION_SECONDS = 10.0
# For the whole of an activation: a broker that makes its transaction log first takes a second or two.
ACTIVATION_SECONDS = 30.0

_log = logs.get(__name__)


async def read(settings: Settings) -> Registry:
    """Return the present state of the topic.

    Raises:
        DependencyError: no broker answers, or the topic is missing.
    """
    registry = Registry()
    for record in await read_all(settings, settings.topic(MODELS.name)):
        _apply(registry, record)
    return registry


class Follower:
    """The state of the topic, kept up to date.

    Losing the broker only delays it. One task at a time waits for changes.
    """

    def __init__(self, settings: Settings, *, client_id: str) -> None:
        self._settings = settings
        self._topic = settings.topic(MODELS.name)
        self._reader = LiveReader(settings, [self._topic], client_id=client_id)
        self._following: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self.registry = Registry()
        #: Whether everything that was there has been read.
        self.is_caught_up = False

    async def start(self, *, wait: bool = True) -> None:
        """Read everything that is kept; with `wait`, for as long as it takes a broker to answer.

        Raises:
            DependencyError: no broker answers or the topic is missing, without `wait`.
        """
        # First where the reader begins, then everything up to now: what lies in both is taken once.
        await self._reader.start(wait=wait)
        for delay in backoff_seconds():
            try:
                records = await read_all(self._settings, self._topic)
                break
            except DependencyError as error:
                if not wait:
                    raise
                _log.warning("waiting for the models topic", error=error.message)
                await asyncio.sleep(delay)
        for record in records:
            _apply(self.registry, record)
        self.is_caught_up = True
        self._following = asyncio.create_task(self._follow({_place(record) for record in records}))

    async def __aenter__(self) -> "Follower":
        """Start without waiting for a broker; raises as `start` does."""
        try:
            await self.start(wait=False)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End reading."""
        await self.stop()

    async def stop(self) -> None:
        """End reading; safe to call at any time."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._reader.stop()

    async def wait_until(self, holds: Callable[[Registry], bool], seconds: float | None = None) -> bool:
        """Return whether a condition holds in time; it is asked after each change, and each second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not holds(self.registry):
                    await self.wait_for_change(1.0)
        return holds(self.registry)

    async def wait_for_change(self, seconds: float | None = None) -> None:
        """Return after the next change, or in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait()

    async def _follow(self, known: set[tuple[int, int]]) -> None:
        while True:
            try:
                async for record in self._reader:
                    if _place(record) not in known:
                        _apply(self.registry, record)
                        async with self._changed:
                            self._changed.notify_all()
                return
            except Exception:
                # Without this task a replica would run its models for ever, whatever is activated.
                _log.exception("reading the models topic failed, reading on")
                await asyncio.sleep(1.0)


async def activate(
    settings: Settings,
    deployment: str,
    models: Sequence[str],
    *,
    activated_by: str,
    artefacts: Sequence[Artefact] = (),
    note: str | None = None,
    expected_revision: int | None = None,
) -> Desired:
    """Make these the models that a deployment should run; return when every reader can see it.

    Raises:
        ConflictError: another activation was under way, or the revision is not the expected one.
        ContractError: a name or text is longer than the contract allows or has control characters.
        DependencyError: no broker answers, or it is not known whether it took the record.
    """
    async with _sole_writer(settings, deployment) as producer:
        running = (await read(settings))[deployment]
        if expected_revision is not None and running.revision != expected_revision:
            raise ConflictError(
                f"{deployment} is at revision {running.revision}, not {expected_revision}: {_who(running.desired)}"
            )
        desired = Desired(
            deployment=deployment,
            version=Version(revision=running.next_revision, models=tuple(models), artefacts=tuple(artefacts)),
            activated_by=activated_by,
            activated_at=datetime.now(UTC),
            predecessor=running.good_version(),
            note=note,
        )
        try:
            await _publish(producer, settings.topic(MODELS.name), deployments.encode(desired))
        except ProducerFenced:
            raise ConflictError(
                f"another activation for {deployment} began meanwhile: look at `millrace models list` and repeat"
            ) from None
        except TopicAuthorizationFailedError as error:
            raise DependencyError(f"the broker refuses: {error!r}") from None
        except (KafkaError, OSError, TimeoutError) as error:
            raise DependencyError(
                f"not known whether Kafka has the activation, see `millrace models list`: {error!r}"
            ) from None
    return desired


async def _publish(producer: AIOKafkaProducer, topic: str, outgoing: Outgoing) -> None:
    """Publish one record in a transaction of its own."""
    async with asyncio.timeout(ACTIVATION_SECONDS), producer.transaction():
        await producer.send_and_wait(
            topic, outgoing.value, outgoing.key, headers=list(outgoing.headers), partition=0
        )


@contextlib.asynccontextmanager
async def _sole_writer(settings: Settings, deployment: str) -> AsyncIterator[AIOKafkaProducer]:
    """Open the one producer that may write a deployment's version; whoever had it loses it.

    Raises:
        DependencyError: no broker answers, or it refuses.
    """
    producer = AIOKafkaProducer(
        **client_options(settings),
        client_id="millrace-models",
        transactional_id=f"{settings.topic_prefix}models.{deployment}",
        transaction_timeout_ms=int(TRANSACTION_SECONDS * 1000),
    )
    try:
        async with asyncio.timeout(ACTIVATION_SECONDS):
            await producer.start()  # returns when the transactions of earlier writers have ended
    except (KafkaError, OSError, TimeoutError) as error:
        await producer.stop()
        raise unreachable(settings, error) from None
    except BaseException:
        await producer.stop()
        raise
    try:
        yield producer
    finally:
        # A writer that was fenced off has learnt it from its record; aiokafka says it here, too, and asyncio
        # would log that nobody listened.
        waiter = producer._txn_manager._transaction_waiter
        if waiter is not None and waiter.done():
            waiter.exception()
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(5.0):
                await producer.stop()


def _apply(registry: Registry, record: Record) -> None:
    try:
        registry.apply(record)
    except ContractError as error:
        _log.warning("passing over a record of the models topic", offset=record.offset, error=error.message)


def _place(record: Record) -> tuple[int, int]:
    # With its time: a topic that was made anew counts its offsets from 0 again.
    return record.offset, record.timestamp_ms


def _who(desired: Desired | None) -> str:
    if desired is None:
        return "nobody has activated a version"
    models = ", ".join(desired.version.models)
    return f"{desired.activated_by} activated {models} at {desired.activated_at:%F %T} UTC"
