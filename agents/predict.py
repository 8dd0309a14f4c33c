"""The `predict` step: pictures of both lanes in, one prediction or one dead letter each out.

The engine computes; this file decides what an outcome becomes, and finishes a record only when the broker
has what it became. It is the one judge of image envelopes. Which models compute is `replica.py`'s affair; a
prediction is named after those that made it, so a swap in between changes nothing.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime

import torch

from agents.delivery import Delivered, Delivery
from agents.durable import publish_dead_letter
from agents.replica import Replica, in_thread
from pipeline import events, garbage, logs, metrics, topics
from pipeline.broker import Publisher
from pipeline.deadletters import FaultLimiter
from pipeline.deployments import Version
from pipeline.energy import EnergyMeter
from pipeline.errors import ContractError, MillraceError, ModelError, RecordTooLargeError
from pipeline.inference import Dropped, Engine, EngineOptions, Expired, Failed, Outcome, Predicted, Request
from pipeline.inference.proof import load_where_proved
from pipeline.models import LoadOptions, Model, load_models, resolve_device
from pipeline.objects import ObjectStore
from pipeline.settings import Settings

log = logs.get(__name__)

#: Models with their versions, in the deployment's order.
Identities = tuple[tuple[str, str], ...]

# Of the grace period: how long the engine may finish what is on the device after the hand-over is over.
ENGINE_STOP_SECONDS = 2.0


class Predict:
    """Feeds the engine from Kafka and publishes what comes out."""

    name = "predict"
    topics = (topics.IMAGES_REALTIME, topics.IMAGES_BULK)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._predictions_topic = settings.topic(topics.PREDICTIONS.name)
        # The outcomes of a batch are sent together, so nothing is gained by waiting for more: 2 ms of latency.
        self._publisher = Publisher(settings, client_id=self.name, linger_ms=0)
        self._objects = ObjectStore.open(settings)
        self._limiter = self._new_limiter()
        self._replica = Replica(settings, self._objects, self._load)
        self._device = torch.device("cpu")
        self._meter: EnergyMeter | None = None
        self._engine: Engine | None = None
        self._delivery: Delivery | None = None
        #: What ran so far: models with their versions -> the latest revision they ran as.
        self._revisions: dict[Identities, int] = {}
        self._identities: Identities = ()
        self._probe: Delivered | None = None
        self._publishing: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None
        self._broken: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Wait for the broker, which knows what to run; load it and warm it up."""
        self._device = resolve_device(self._settings.device)
        await self._replica.start(self._open)
        await self._publisher.start()
        self._broken = asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        """Stop the engine; what is on the device gets no outcome and is delivered again."""
        self._stop_tidying()
        if self._engine is not None:  # else the signal came while the models were loading
            await self._engine.stop(ENGINE_STOP_SECONDS)
        if self._publishing:
            await asyncio.wait(self._publishing, timeout=ENGINE_STOP_SECONDS)
        await self._publisher.stop()
        await self._replica.stop()

    def unready(self) -> str | None:
        """Say so while model faults have paused the step."""
        return "paused: the models fail on most records" if self._limiter.is_open else None

    async def run(self, delivery: Delivery) -> None:
        """Submit records while the engine has room."""
        assert self._engine is not None
        assert self._broken is not None
        self._delivery = delivery
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(delivery, self._engine))
            group.create_task(_watch(self._engine.fatal))
            group.create_task(_watch(self._broken))
            group.create_task(self._replica.run(self._swap))

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Dead-letter a record unopened."""
        await self._dead_letter(delivered, error)

    def _load(self, specifications: Sequence[str]) -> Sequence[Model]:
        """Load models; blocks.

        Until the engine runs, a GPU that nobody asked for is proved with each version, and if it fails left alone.
        """
        specification, options = ",".join(specifications), LoadOptions.from_settings(self._settings)
        if self._engine is None and self._settings.device == "auto" and self._device.type == "cuda":
            placed = load_where_proved(specification, self._device, options)
            self._device, self._meter = placed.device, placed.meter
            return placed.models
        return load_models(specification, self._device, options)

    async def _open(self, version: Version, models: Sequence[Model]) -> None:
        """Begin with these models.

        Raises:
            ConfigurationError: one of them fails its warm-up.
        """
        engine = Engine(
            models,
            EngineOptions.from_settings(self._settings, self._device),
            fetch=lambda key: self._objects.get(key, self._settings.max_image_bytes),
            deliver=self._deliver,
            on_room=self._on_room,
            meter=self._meter,
        )
        try:
            await engine.start()
        except BaseException:
            await engine.stop(0.0)
            raise
        self._note(version, models)
        self._engine = engine

    async def _swap(self, version: Version, models: Sequence[Model]) -> None:
        """Go over to these models; return when the last prediction of the old ones is with the broker."""
        engine = self._engine
        assert engine is not None
        await in_thread(lambda: engine.warm_up(models))
        # Before the first outcome of the new ones.
        self._note(version, models)
        await engine.swap(models)
        # A version that was activated to mend a bad one is not to wait for the bad one's probes.
        self._limiter, self._probe = self._new_limiter(), None
        metrics.LIMITER_OPEN.labels(self.name).set(False)
        if self._publishing:
            await asyncio.wait(set(self._publishing))
        self._stop_tidying()
        self._tidying = asyncio.create_task(garbage.set_apart_again(lambda: engine.idle_seconds))

    def _stop_tidying(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()

    def _note(self, version: Version, models: Sequence[Model]) -> None:
        self._identities = tuple((model.name, model.version) for model in models)
        self._revisions[self._identities] = version.revision

    def _new_limiter(self) -> FaultLimiter:
        return FaultLimiter(
            max_faults=self._settings.max_model_faults, probe_seconds=self._settings.fault_probe_seconds
        )

    async def _pump(self, delivery: Delivery, engine: Engine) -> None:
        while True:
            while not self._limiter.may_try(time.monotonic()):  # noqa: ASYNC110 (the clock decides)
                await asyncio.sleep(min(1.0, self._settings.fault_probe_seconds / 10))
            may_try_one = self._limiter.is_open
            for delivered in await delivery.take(1, self._settings.max_open_bytes, engine.room):
                if self._limiter.is_open and not may_try_one:
                    delivered.put_back()  # it opened while there was no room
                else:
                    self._submit(delivered, engine)

    def _on_room(self) -> None:
        if self._delivery is not None:
            self._delivery.look_again()

    def _submit(self, delivered: Delivered, engine: Engine) -> None:
        record = delivered.record
        if events.only_group(record) not in (None, self._group):
            self._limiter.said_nothing(time.monotonic())
            if delivered.claim():
                delivered.finish("skipped")
            return
        try:
            event = events.decode_image(record)
        except ContractError as error:
            self._limiter.said_nothing(time.monotonic())
            if delivered.claim():
                self._spawn(self._dead_letter(delivered, error))
            return
        if self._limiter.is_open:
            self._probe = delivered
        engine.submit(
            Request(
                event=event,
                record=record,
                lane=delivered.lane,
                received_at=delivered.received_at,
                claim=lambda: self._claim(delivered),
                context=delivered,
                is_forgotten=lambda: delivered.is_forgotten,
            )
        )

    def _claim(self, delivered: Delivered) -> bool:
        """Claim; while the limiter is open, everything but the probe waits outside the engine."""
        if self._limiter.is_open and delivered is not self._probe:
            delivered.put_back()
        return delivered.claim()

    def _deliver(self, outcomes: Sequence[tuple[Request, Outcome]]) -> None:
        """Take the outcomes of a batch from the engine; must not block."""
        now = time.monotonic()
        for request, outcome in outcomes:
            if isinstance(outcome, Predicted):
                self._limiter.went_well()
            elif isinstance(outcome, Failed) and isinstance(outcome.error, ModelError):
                self._limiter.failed(now)
            elif self._probe is not None and request.context is self._probe:
                self._limiter.said_nothing(now)
        if self._limiter.is_open:
            log.error("the models fail on most records", probe_seconds=self._settings.fault_probe_seconds)
        metrics.LIMITER_OPEN.labels(self.name).set(self._limiter.is_open)
        self._spawn(self._publish([pair for pair in outcomes if not isinstance(pair[1], Dropped)]))

    async def _publish(self, outcomes: Sequence[tuple[Request, Outcome]]) -> None:
        started = time.monotonic()
        await asyncio.gather(*(self._publish_one(request, outcome) for request, outcome in outcomes))
        metrics.PUBLISH_SECONDS.labels(self.name).observe(time.monotonic() - started)

    async def _publish_one(self, request: Request, outcome: Outcome) -> None:
        delivered: Delivered = request.context
        if isinstance(outcome, Failed):
            await self._dead_letter(delivered, outcome.error)
            return
        assert isinstance(outcome, Predicted | Expired)
        prediction = self._prediction(request, outcome)
        try:
            await self._publisher.publish_forever(
                self._predictions_topic, events.encode_prediction(prediction), step=self.name
            )
        except RecordTooLargeError as error:
            await self._dead_letter(delivered, error)
            return
        delivered.finish(prediction.outcome)

    def _prediction(self, request: Request, outcome: Predicted | Expired) -> events.Prediction:
        event = request.event
        identities = self._identities
        if isinstance(outcome, Predicted):
            identities = tuple((result.model, result.version) for result in outcome.results)
        return events.Prediction(
            id=events.prediction_id(event.id, self._settings.deployment, identities),
            image_id=event.id,
            deployment=self._settings.deployment,
            revision=self._revisions[identities],
            lane=request.lane,
            outcome="predicted" if isinstance(outcome, Predicted) else "expired",
            time=datetime.now(UTC),
            receipt=outcome.receipt,
            models=outcome.results if isinstance(outcome, Predicted) else (),
            reason=None if isinstance(outcome, Predicted) else outcome.reason,
            traceparent=event.traceparent,
            purpose=event.purpose,
        )

    async def _dead_letter(self, delivered: Delivered, error: MillraceError) -> None:
        await publish_dead_letter(
            self._publisher, self._settings, self.name, delivered.record, error, objects=self._objects
        )
        delivered.finish("dead_lettered")

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._publishing.add(task)
        task.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        """A publication that fails for an unforeseen reason ends the step: the record is not finished."""
        self._publishing.discard(task)
        if not task.cancelled() and (error := task.exception()) and self._broken and not self._broken.done():
            self._broken.set_exception(error)


async def _watch(future: "asyncio.Future[None]") -> None:
    await future
