"""`millrace collect`: read GPUs at a rate of their own, publish what was read per interval.

An XID error is published at once, with what was read before it. The event loop never waits for a driver, nor
reading for Kafka: samples wait in the outbox. SIGTERM publishes what is held, for five seconds at most.
"""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

import msgspec

from millrace.collect_sources import ExporterSource, NvmlSource, Reading, Source
from millrace.outbox import STEP, Outbox
from millrace.output import EXIT_UNAVAILABLE, counted, emit, say
from pipeline import metrics
from pipeline.broker import Place, Publisher, client_options
from pipeline.errors import DependencyError
from pipeline.settings import Settings
from pipeline.telemetry import Gpu, Sample, Samples, Why, encode_samples
from pipeline.topics import GPU_SAMPLES

# What GPUs are is told so often; who begins to read the topic knows them after this.
DESCRIBE_SECONDS = 60.0
# Within a pod's grace period, with what it takes to close everything.
DRAIN_SECONDS = 5.0
# A driver that does not return for so long is stuck; reading a lost GPU may take seconds.
STUCK_SECONDS = 60.0
# Kafka was away for so long: say so.
_KAFKA_AWAY_SECONDS = 15.0
# A record of so many samples is far below the topic's limit, with every field and MIG.
_MAX_SAMPLES_PER_RECORD = 1_000
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class Wishes:
    """What was asked for on the command line."""

    host: str
    interval_seconds: float
    sample_interval_seconds: float
    #: Record key; None: the host.
    peers: str | None = None
    exporter_url: str | None = None
    #: A host that was named, rather than this machine's name.
    has_host: bool = False
    once: bool = False
    as_json: bool = False


class _Published(msgspec.Struct, frozen=True):
    """A line of `--json`."""

    topic: str
    partition: int
    offset: int
    value: Samples


@dataclass(slots=True)
class _Host:
    """What was read of a host and not put into a record yet."""

    samples: list[Sample] = field(default_factory=list)
    gpus: tuple[Gpu, ...] = ()
    told: tuple[Gpu, ...] = ()
    told_at: float = float("-inf")


class Collector:
    """Reads a source and fills an outbox, until stopped."""

    def __init__(self, source: Source, wishes: Wishes, put: Callable[[Samples], None]) -> None:
        self._source = source
        self._wishes = wishes
        self._put = put
        self._hosts: dict[str, _Host] = {}
        self._host_of: dict[str, str] = {}
        self._last: dict[str, datetime] = {}
        self._lost: frozenset[str] = frozenset()
        self._nameless = 0
        self._reading_since: float | None = None
        #: The source answered when it was last asked.
        self.is_well = True

    async def run(self, stop: asyncio.Event) -> None:
        """Read and publish until `stop` is set."""
        tasks = [asyncio.ensure_future(self._read_always()), asyncio.ensure_future(self._flush_always())]
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([*tasks, stopping], return_when="FIRST_COMPLETED")
        for task in (*tasks, stopping):
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.flush()

    async def read_once(self) -> None:
        """Read every GPU once.

        Raises:
            DependencyError: the source does not answer.
        """
        started_at = self._reading_since = self._loop_time()
        try:
            readings = await self._source.read()
        finally:
            self._reading_since = None
        metrics.COLLECT_SECONDS.observe(self._loop_time() - started_at)
        for reading in readings:
            self._take(reading)
        self._tell_lost(readings)

    def xid_happened(self, uuid: str, code: int, moment: datetime) -> None:
        """Publish an XID error now."""
        say(f"XID {code} of {uuid}")
        name = self._host_of.get(uuid, self._wishes.host)
        host = self._hosts.setdefault(name, _Host())
        host.samples.append(Sample(gpu_uuid=uuid, time=self._distinct(uuid, moment), xids=(code,)))
        self._flush_host(name, host)

    def flush(self) -> None:
        """Put what was read into records."""
        for name, host in self._hosts.items():
            self._flush_host(name, host)

    @property
    def is_stuck(self) -> bool:
        """Whether the source neither answers nor fails, as a driver may that waits for a broken GPU."""
        return self._reading_since is not None and self._loop_time() > self._reading_since + STUCK_SECONDS

    async def _read_always(self) -> None:
        due = self._loop_time()
        while True:
            try:
                await self.read_once()
                self._tell_health(None)
            except DependencyError as error:
                self._tell_health(error)
            interval = self._wishes.sample_interval_seconds
            # A reading that took longer than the interval leaves out the ones it made impossible.
            due = max(due + interval, self._loop_time())
            await asyncio.sleep(due - self._loop_time())

    async def _flush_always(self) -> None:
        due = self._loop_time()
        while True:
            due = max(due + self._wishes.interval_seconds, self._loop_time())
            await asyncio.sleep(due - self._loop_time())
            self.flush()

    def _take(self, reading: Reading) -> None:
        host = self._hosts.setdefault(reading.host, _Host())
        host.gpus = reading.gpus
        for sample in reading.samples:
            self._host_of[sample.gpu_uuid] = reading.host
            moment = self._distinct(sample.gpu_uuid, sample.time)
            host.samples.append(
                sample if moment == sample.time else msgspec.structs.replace(sample, time=moment)
            )

    def _distinct(self, uuid: str, moment: datetime) -> datetime:
        """Return the moment, or the next one if the GPU has a sample of this one: they would be taken for one."""
        if self._last.get(uuid) == moment:
            moment += _TICK
        self._last[uuid] = moment
        return moment

    def _flush_host(self, name: str, host: _Host) -> None:
        samples = sorted(host.samples, key=lambda sample: sample.time)
        host.samples = []
        now = self._loop_time()
        for begin in range(0, len(samples), _MAX_SAMPLES_PER_RECORD):
            gpus: tuple[Gpu, ...] = ()
            if host.gpus != host.told or now >= host.told_at + DESCRIBE_SECONDS:
                gpus = host.told = host.gpus
                host.told_at = now
            part = tuple(samples[begin : begin + _MAX_SAMPLES_PER_RECORD])
            self._put(Samples(host=name, samples=part, gpus=gpus, source=self._source.name))

    def _tell_lost(self, readings: list[Reading]) -> None:
        samples = [sample for reading in readings for sample in reading.samples]
        lost = frozenset(sample.gpu_uuid for sample in samples if sample.state == "lost")
        for uuid in sorted(lost - self._lost):
            say(f"{uuid} does not answer any more")
        for uuid in sorted(self._lost - lost):
            say(f"{uuid} answers again")
        nameless = sum(reading.nameless for reading in readings)
        if nameless > self._nameless:
            say(
                f"{counted(nameless, 'GPU')} did not answer once; without a UUID nothing is published of them"
            )
        self._lost, self._nameless = lost, nameless
        metrics.COLLECTED_GPUS.labels("lost").set(len(lost) + nameless)
        metrics.COLLECTED_GPUS.labels("ok").set(len({sample.gpu_uuid for sample in samples} - lost))

    def _tell_health(self, error: DependencyError | None) -> None:
        if error is not None:
            metrics.RETRIES.labels(STEP, "source").inc()
        if error is not None and self.is_well:
            say(f"{error.message}; trying again")
        elif error is None and not self.is_well:
            say("reading again")
        self.is_well = error is None

    def _loop_time(self) -> float:
        return asyncio.get_running_loop().time()


async def collect(settings: Settings, wishes: Wishes) -> int:
    """Collect until SIGTERM or Ctrl-C, or once; return the exit code.

    Raises:
        ConfigurationError: TLS or SASL files, or the address of the HTTP site, cannot be used.
        DependencyError: nothing to read, or with `once` no Kafka.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    source = _source(wishes)
    publisher = Publisher(settings, client_id="millrace-collect")
    try:
        return await (_once if wishes.once else _serve)(settings, wishes, source, publisher, stop)
    finally:
        await source.stop()
        await publisher.stop()


async def _once(
    settings: Settings, wishes: Wishes, source: Source, publisher: Publisher, stop: asyncio.Event
) -> int:
    records: list[Samples] = []
    collector = Collector(source, wishes, records.append)
    await source.start(lambda uuid, code, moment: None)
    await collector.read_once()
    collector.flush()
    for samples in records:
        outgoing = encode_samples(samples, wishes.peers)
        place = await publisher.publish(settings.topic(GPU_SAMPLES.name), outgoing)
        _show(wishes, place, samples)
    say(f"published {counted(sum(len(samples.samples) for samples in records), 'sample')}")
    return 0


async def _serve(
    settings: Settings, wishes: Wishes, source: Source, publisher: Publisher, stop: asyncio.Event
) -> int:
    outbox = Outbox(publisher, settings.topic(GPU_SAMPLES.name), partial(_show, wishes))
    collector = Collector(source, wishes, lambda samples: outbox.put(samples, wishes.peers))

    client_options(settings)  # wrong files are said now, not while samples wait
    await source.start(collector.xid_happened)
    say(f"collecting every {wishes.interval_seconds:g} s as host {wishes.host}, from {source.name}")
    try:
        async with _site(settings, collector, outbox), asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(outbox.run())
            telling = tasks.create_task(_tell_kafka(settings, outbox))
            await collector.run(stop)
            drained = await outbox.drain(DRAIN_SECONDS)
            sending.cancel()
            telling.cancel()
    except BaseExceptionGroup as group:  # the reader of stdout went away, or a bug: one is enough to say
        raise group.exceptions[0] from None
    lost = f"; {counted(outbox.held, 'sample')} could not be published" if not drained else ""
    dropped = f"; {counted(outbox.dropped, 'sample')} dropped" if outbox.dropped else ""
    say(f"published {counted(outbox.published, 'sample')}{dropped}{lost}")
    return 0 if drained else EXIT_UNAVAILABLE


@contextlib.asynccontextmanager
async def _site(settings: Settings, collector: Collector, outbox: Outbox) -> AsyncIterator[None]:
    """Serve health and metrics if a port was set: whoever types the command asks for none."""
    if not settings.worker_port:
        yield
        return
    from agents.site import Site

    def live() -> str | None:
        return "the source does not return" if collector.is_stuck else None

    def ready() -> str | None:
        if not collector.is_well:
            return "the source does not answer"
        away = outbox.stuck_seconds
        return f"Kafka has not answered for {away:.0f} s" if away > _KAFKA_AWAY_SECONDS else None

    site = Site(settings, live=live, ready=ready)
    await site.start()
    try:
        yield
    finally:
        await site.stop()


async def _tell_kafka(settings: Settings, outbox: Outbox) -> None:
    """Say when Kafka has been away for a while, and when it is back."""
    is_told = False
    while True:
        await asyncio.sleep(1.0)
        is_away = outbox.stuck_seconds > _KAFKA_AWAY_SECONDS
        if is_away and not is_told:
            say(
                f"Kafka at {settings.resolved_kafka} takes nothing; {counted(outbox.held, 'sample')} wait here "
                f"(is it up? does {settings.topic(GPU_SAMPLES.name)} exist? see `millrace doctor`)"
            )
        elif is_told and not is_away:
            say("Kafka is back")
        is_told = is_away


def _show(wishes: Wishes, place: Place, samples: Samples) -> None:
    if wishes.as_json:
        emit(_Published(place.topic, place.partition, place.offset, samples))


def _source(wishes: Wishes) -> Source:
    if wishes.exporter_url is None:
        return NvmlSource(wishes.host)

    def count_dropped(reasons: "Counter[Why]") -> None:
        for reason, count in reasons.items():
            metrics.SAMPLES_DROPPED.labels(STEP, reason).inc(count)

    return ExporterSource(wishes.exporter_url, wishes.host if wishes.has_host else None, count_dropped)
