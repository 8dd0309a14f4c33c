"""`millrace up`: the whole of Millrace on one machine, from the services up to sample predictions.

Services whose addresses are set are somebody else's and stay untouched. Order matters: services, topics and
tables, then processes, then samples; and back again at the end, so that every step can finish what it began.
"""

import asyncio
import shlex
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from millrace import alerts, ports, processes
from millrace.fleet import GPUS, SampleFleet
from millrace.folders import require_unused
from millrace.local import EmbeddedKafka, EmbeddedPostgres, LocalServices, local_services
from millrace.output import EXIT_FAILED, EXIT_INTERRUPTED, counted, emit, say, show
from millrace.parts import describe_parts, wait_until_ready
from millrace.results import line_of
from millrace.samples import Samples
from millrace.supervisor import Event, Exited, Restarting, supervise
from pipeline import broker, deadletters, events, registry, telemetry
from pipeline.connections import backoff_seconds
from pipeline.database import Database, migrate
from pipeline.errors import EXIT_CONFIGURATION, ConfigurationError, ContractError, DependencyError
from pipeline.settings import PREFIX, Settings
from pipeline.topics import DEAD_LETTERS, GPU_ALERTS, IMAGES_BULK, PREDICTIONS

# Without any outcome for so long, the samples are not coming.
_SAMPLE_QUIET_SECONDS = 60.0
_STORED_SECONDS = 30.0
# The fleet's past takes a fifth of it.
_ALERT_SECONDS = 60.0
_LINES_PER_SECOND = 20
_UNPRINTED_TOLD_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    replicas: dict[str, int] = field(default_factory=dict)
    once: bool = False
    samples: int = 24
    seed: int = 7
    as_json: bool = False
    fleet: bool = True


def up(settings: Settings, wishes: Wishes) -> int:
    """Run everything until Ctrl-C or SIGTERM, or until the samples are through; return the exit code.

    Raises:
        ConfigurationError, DependencyError: something cannot be started; everything else was stopped.
    """
    begun = time.monotonic()
    if settings.kafka_bootstrap_servers is None:
        # Before the ports: a second start must name the first one, not the child of it that holds a port.
        require_unused(settings.data_dir)
    ports.require_free(settings.gateway_host, settings.gateway_port, f"{PREFIX}GATEWAY_PORT")
    own = [
        name
        for name, address in (
            ("Kafka", settings.kafka_bootstrap_servers),
            ("PostgreSQL", settings.database_url),
        )
        if address is None
    ]
    if own:
        say(f"starting {' and '.join(own)} in {settings.data_dir}")
    with local_services(settings, on_progress=_tell_fetching) as services:
        resolved = settings.model_copy(
            update={
                "kafka_bootstrap_servers": services.kafka.bootstrap_servers
                if services.kafka
                else settings.resolved_kafka,
                "database_url": services.postgres.dsn if services.postgres else settings.resolved_database,
                "object_store_url": settings.resolved_object_store,
                "data_dir": settings.data_dir.absolute(),
            }
        )
        code = asyncio.run(_Stack(resolved, services, wishes, begun).run())
        say("stopping")
    return code


def _tell_fetching(done: int, needed: int) -> None:
    if done == needed or done % 10 == 1:
        say(f"fetching Kafka: {done} of {needed} files")


class _Stack:
    """Everything above the services."""

    def __init__(self, settings: Settings, services: LocalServices, wishes: Wishes, begun: float) -> None:
        self._settings = settings
        self._services = services
        self._wishes = wishes
        self._begun = begun
        self._parts = describe_parts(settings, wishes.replicas)
        self._samples = Samples(settings, wishes.seed, wishes.samples)
        self._fleet = SampleFleet(settings, wishes.seed) if wishes.fleet else None
        self._images_ready = asyncio.Event()
        self._asked_to_stop = asyncio.Event()
        self._printed: list[float] = []
        self._unprinted = 0
        self._told_unprinted_at = begun

    async def run(self) -> int:
        """Serve; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        stopping = asyncio.Event()
        await self._unless_stopped(self._prepare())
        if self._asked_to_stop.is_set():
            return EXIT_INTERRUPTED if self._wishes.once else 0
        supervising = {
            asyncio.create_task(self._supervise(stopping)),
            asyncio.create_task(self._supervise_telemetry(stopping)),
        }
        keeping = asyncio.create_task(self._keep_services())
        working = asyncio.create_task(self._unless_stopped(self._work()))
        try:
            # The supervisor ends by itself only when a child's settings are wrong.
            await asyncio.wait({*supervising, working}, return_when=asyncio.FIRST_COMPLETED)
            if not any(task.done() for task in supervising):
                code = await working
                return EXIT_INTERRUPTED if code is None and self._wishes.once else code or 0
        finally:
            working.cancel()
            keeping.cancel()
            await asyncio.wait({working, keeping})
            stopping.set()
            say(f"stopping {len(self._parts)} processes")
            await asyncio.wait(supervising)
            for task in supervising:
                task.result()
        raise AssertionError("a supervisor that ends by itself says why")

    async def _supervise(self, stopping: asyncio.Event) -> None:
        await supervise([part.spec for part in self._parts if not part.is_telemetry], self._tell, stopping)

    async def _supervise_telemetry(self, stopping: asyncio.Event) -> None:
        """Run the steps of telemetry from when those of images are ready."""
        waiting = [asyncio.create_task(event.wait()) for event in (self._images_ready, stopping)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not stopping.is_set():
            await supervise([part.spec for part in self._parts if part.is_telemetry], self._tell, stopping)

    def _stop(self) -> None:
        if self._asked_to_stop.is_set():
            say("still stopping; started work is finished first")
        self._asked_to_stop.set()

    async def _unless_stopped(self, work: Coroutine[object, object, int | None]) -> int | None:
        """Run something to its end, or to the signal; None then."""
        task = asyncio.create_task(work)
        signal_came = asyncio.create_task(self._asked_to_stop.wait())
        try:
            await asyncio.wait({task, signal_came}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, signal_came):
                each.cancel()
            await asyncio.wait({task, signal_came})

    async def _prepare(self) -> None:
        """Apply topics and migrations."""
        async with asyncio.TaskGroup() as group:
            topics = group.create_task(broker.apply_topics(self._settings))
            group.create_task(
                migrate(self._settings.resolved_database, self._settings.database_password_file)
            )
        created = [change.topic for change in topics.result() if change.change != "kept"]
        if created:
            say(f"applied topics: {', '.join(created)}")

    async def _work(self) -> int | None:
        images = [part for part in self._parts if not part.is_telemetry]
        say(f"starting {', '.join(part.spec.name for part in images)}")
        await wait_until_ready(images)
        say(f"ready after {time.monotonic() - self._begun:.1f} s")
        self._images_ready.set()
        await self._say_what_runs()
        async with self._watching():
            faults = await self._publish_samples() if self._wishes.samples else []
            await wait_until_ready([part for part in self._parts if part.is_telemetry])
            if self._fleet is None:
                return await self._serve(faults)
            async with self._living(self._fleet):
                return await self._serve(faults)

    async def _serve(self, faults: list[str]) -> int:
        """Wait for the fleet's alert if that is asked for; else serve for ever."""
        if self._wishes.once:
            if self._fleet is not None and not await self._fleet.wait(_ALERT_SECONDS):
                faults = [*faults, f"no alert came for {self._fleet.fault.gpu_uuid}"]
                say(faults[-1])
            return EXIT_FAILED if faults else 0
        self._say_where()
        await asyncio.Event().wait()
        return 0

    @asynccontextmanager
    async def _living(self, fleet: SampleFleet) -> AsyncIterator[None]:
        """Publish the fleet's telemetry."""
        fault = fleet.fault
        say(
            f"publishing the telemetry of {counted(GPUS, 'made-up GPU')}; {fault.gpu_uuid} of {fault.host} gets hot"
        )
        living = asyncio.create_task(fleet.publish())
        living.add_done_callback(_tell_end)
        try:
            yield
        finally:
            living.cancel()
            await asyncio.wait({living})

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Print predictions as they come, from now on."""
        topics = [self._settings.topic(topic.name) for topic in (PREDICTIONS, DEAD_LETTERS, GPU_ALERTS)]
        reader = broker.LiveReader(self._settings, topics, client_id="millrace-up")
        await reader.start()
        watching = asyncio.create_task(self._watch(reader))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await reader.stop()

    async def _watch(self, reader: broker.LiveReader) -> None:
        async for record in reader:
            if record.topic == self._settings.topic(DEAD_LETTERS.name):
                letter = deadletters.decode_dead_letter(record)
                name = letter.image_id or letter.record.default_id
                say(f"{name}  dead letter  {letter.code}: {letter.reason}")
                self._samples.see_dead_letter(letter)
                continue
            if record.topic == self._settings.topic(GPU_ALERTS.name):
                with suppress(ContractError):
                    self._print_alert(telemetry.decode_alert(record))
                continue
            with suppress(ContractError):
                prediction = events.decode_prediction(record)
                self._print(prediction)
                self._samples.see(prediction)

    def _print(self, prediction: events.Prediction) -> None:
        if self._wishes.as_json:
            emit(prediction)
            return
        # A load of hundreds a second would scroll everything else away.
        now = time.monotonic()
        self._printed = [moment for moment in self._printed if moment > now - 1.0]
        if len(self._printed) >= _LINES_PER_SECOND and not self._samples.has(prediction.image_id):
            self._unprinted += 1
            return
        self._printed.append(now)
        show(line_of(prediction))

    def _print_alert(self, alert: telemetry.Alert) -> None:
        if self._fleet is not None:
            self._fleet.see(alert)
        if self._wishes.as_json:
            emit(alert)
        elif alert.state != "pending":
            show(alerts.line_of(alert))

    def _tell_unprinted(self) -> None:
        now = time.monotonic()
        if self._unprinted and now >= self._told_unprinted_at + _UNPRINTED_TOLD_EVERY_SECONDS:
            say(f"... and {counted(self._unprinted, 'prediction')} more")
            self._unprinted = 0
            self._told_unprinted_at = now

    async def _publish_samples(self) -> list[str]:
        """Publish the samples and wait for their results; return what is wrong with them."""
        say(f"publishing {counted(self._wishes.samples, 'sample picture')} to both lanes")
        publisher = broker.Publisher(self._settings, client_id="millrace-up")
        await publisher.start()
        try:
            await self._samples.publish(publisher)
        finally:
            await publisher.stop()
        await self._samples.wait(_SAMPLE_QUIET_SECONDS)
        database = await Database.open(self._settings)
        try:
            await self._samples.check_stored(database, _STORED_SECONDS)
        finally:
            await database.close()
        faults = list(self._samples.faults())
        for fault in faults:
            say(fault)
        right = self._wishes.samples - len(faults)
        say(f"{right} of {counted(self._wishes.samples, 'sample')} came out as expected")
        return faults

    async def _say_what_runs(self) -> None:
        """Say so if an activated version counts, and not what this command was told."""
        deployment = self._settings.deployment
        desired = (await registry.read(self._settings))[deployment].desired
        if desired is not None:
            version, by = desired.version, desired.activated_by
            say(
                f"{deployment} runs revision {version.revision}, activated by {by}: {','.join(version.models)}"
            )

    def _say_where(self) -> None:
        settings = self._settings
        gateway, kafka = settings.resolved_gateway, settings.resolved_kafka
        bulk = settings.topic(IMAGES_BULK.name)
        say(
            f"\nMillrace is up.\n"
            f"  gateway   {gateway}  (documentation: {gateway}/docs)\n"
            f"  Kafka     {kafka}\n"
            f"  database  {_without_password(settings.resolved_database)}\n"
            f"  pictures  {settings.resolved_object_store}\n"
            f"  logs      {settings.data_dir / 'logs'}\n"
            f"Try, in another terminal:\n"
            f"  curl -F file=@picture.jpg '{gateway}/v1/images'\n"
            f"  kcat -P -b {kafka} -t {bulk} -X message.max.bytes=8388608 picture.jpg\n"
            f"  millrace publish images FOLDER\n"
            f"  millrace simulate --gpus 64 --fault ecc,straggler\n"
            f"  millrace lag\n"
            f"Ctrl-C stops everything.\n"
        )

    def _tell(self, event: Event) -> None:
        # A wrong setting ends everything, and its line is the last one printed.
        if isinstance(event, Exited) and not event.expected and event.code != EXIT_CONFIGURATION:
            log = next(part.spec.log_path for part in self._parts if part.spec.name == event.name)
            say(f"{event.name} ended with code {event.code} after {event.ran_seconds:.0f} s; {log} ends:")
            say(processes.tail(log, lines=3))
        elif isinstance(event, Restarting):
            say(f"starting {event.name} again in {event.after_seconds:g} s")

    async def _keep_services(self) -> None:
        """Each second: start an embedded service again that ended, as the steps wait for it."""
        kept: list[EmbeddedKafka | EmbeddedPostgres] = [
            service for service in (self._services.kafka, self._services.postgres) if service is not None
        ]
        delays = backoff_seconds()
        while True:
            await asyncio.sleep(1.0)
            self._tell_unprinted()
            for service in kept:
                if service.running:
                    continue
                name = "Kafka" if isinstance(service, EmbeddedKafka) else "PostgreSQL"
                say(f"{name} ended; starting it again; see {service.log_path}")
                try:
                    await asyncio.to_thread(service.start)
                    say(f"{name} is back")
                    delays = backoff_seconds()
                except (ConfigurationError, DependencyError) as error:
                    say(error.message)
                    await asyncio.sleep(next(delays))


def _tell_end(living: "asyncio.Task[None]") -> None:
    if not living.cancelled() and (error := living.exception()) is not None:
        say(f"the made-up fleet ended: {error}")


def _without_password(url: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.password is None:
        return shlex.quote(url) if "?" in url else url
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()
