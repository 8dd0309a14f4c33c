"""The `record` step: samples, windows and the life of alerts into PostgreSQL, and from there to `gpu.alerts.v1`.

Samples are copied, a batch per transaction, two batches at a time; windows go one batch after the other, because
alerts follow them in order. A step in the life of an alert is queued in the transaction that makes it and
published after the commit: a crash in between repeats its record and loses none. What the database refuses is
halved until the guilty record is alone.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec

from agents.delivery import Delivered, Delivery
from agents.durable import forever, isolate, publish_dead_letter
from pipeline import events, logs, metrics, readers, telemetry, telemetry_retention
from pipeline.broker import Publisher
from pipeline.errors import ContractError, MillraceError, RecordTooLargeError
from pipeline.plain_samples import AnySamples, PlainSamples, SampleReader
from pipeline.settings import Settings
from pipeline.telemetry import MAX_AHEAD, Alert, GpuWindow, Windows
from pipeline.telemetry_database import TelemetryDatabase
from pipeline.telemetry_writes import SavedSamples
from pipeline.topics import GPU_ALERTS, GPU_SAMPLES, GPU_WINDOWS

log = logs.get(__name__)

# While one batch waits for the database, the next one is decoded.
BATCHES_AT_ONCE = 2
# Steps of one transaction; it stays open until the broker has them all.
OUTBOX_STEPS = 100
# How soon steps that another replica, or a worker that died, left behind are published.
OUTBOX_INTERVAL_SECONDS = 2.0
ROLLUP_INTERVAL_SECONDS = 5.0
TEND_INTERVAL_SECONDS = 3600.0
# GPUs of one transaction.
SILENT_GPUS = 1000
# No sample is from before 2000, and a window lasts a day at most.
EARLIEST = datetime(1999, 12, 31, tzinfo=UTC)
_MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Measured:
    """A record of samples."""

    delivered: Delivered
    key: str
    samples: AnySamples


@dataclass(frozen=True, eq=False)
class Closed:
    """A record of windows."""

    delivered: Delivered
    windows: Windows


Item = TypeVar("Item", Measured, Closed)


class Record:
    """Keeps what GPUs measure and what was found in it."""

    name = "record"
    topics = (GPU_SAMPLES, GPU_WINDOWS)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._windows_topic = settings.topic(GPU_WINDOWS.name)
        self._alerts_topic = settings.topic(GPU_ALERTS.name)
        self._sample_retention = timedelta(days=settings.sample_retention_days)
        self._window_retention = timedelta(days=settings.result_retention_days)
        self._publisher = Publisher(settings, client_id=self.name)
        self._reader = SampleReader()
        self._opened: TelemetryDatabase | None = None
        self._outbox_filled = asyncio.Event()
        self._windows_in_order = asyncio.Lock()

    @property
    def _database(self) -> TelemetryDatabase:
        assert self._opened is not None
        return self._opened

    async def start(self) -> None:
        """Wait for the migrated database and for the broker."""
        self._opened = await forever(
            lambda: TelemetryDatabase.open(self._settings), step=self.name, dependency="database"
        )
        await self._publisher.start()
        for state in ("pending", "firing", "resolved"):
            for severity in ("info", "warning", "critical"):
                metrics.ALERT_STEPS.labels(state, severity)

    async def stop(self) -> None:
        """Close both."""
        await self._publisher.stop()
        if self._opened is not None:
            await self._opened.close()

    def unready(self) -> str | None:
        """Waiting for the database is not being unready: lag tells."""
        return None

    async def run(self, delivery: Delivery) -> None:
        """Write batches, and publish what alerts did."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(delivery, group))
            group.create_task(self._publish_steps())
            group.create_task(self._again(self._roll_up, ROLLUP_INTERVAL_SECONDS))
            group.create_task(self._again(self._tend_partitions, TEND_INTERVAL_SECONDS))
            group.create_task(self._again(self._resolve_silent, TEND_INTERVAL_SECONDS))

    async def _again(self, work: Callable[[], Awaitable[None]], interval_seconds: float) -> None:
        """Do what keeps the database in order now and then; whatever goes wrong with it, recording goes on."""
        while True:
            try:
                await work()
            except MillraceError as error:
                log.warning("to be tried again", work=work.__name__, error=error.message)
            except Exception:
                log.exception("to be tried again", work=work.__name__)
            # Replicas that began together do not ask together.
            await asyncio.sleep(interval_seconds * random.uniform(0.75, 1.25))

    async def _roll_up(self) -> None:
        await self._database.rollups.advance()

    async def _tend_partitions(self) -> None:
        await telemetry_retention.make_ahead(self._database)
        await telemetry_retention.remove_expired(self._database, self._settings)

    async def _resolve_silent(self) -> None:
        # While the broker is away nobody is silent.
        await readers.partitions_of(self._settings, [self._windows_topic])
        while steps := await self._database.resolve_silent(SILENT_GPUS):
            self._note(steps)

    async def _pump(self, delivery: Delivery, group: asyncio.TaskGroup) -> None:
        free = asyncio.Semaphore(BATCHES_AT_ONCE)
        while True:
            await free.acquire()
            batch = await delivery.take(self._settings.store_batch_records, self._settings.store_batch_bytes)
            claimed = [delivered for delivered in batch if delivered.claim()]
            # Tasks begin in the order they were made in, and the lock is taken first: windows stay in order.
            group.create_task(self._record(claimed)).add_done_callback(lambda _: free.release())

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Dead-letter a record that killed us, or that is none, unopened."""
        await publish_dead_letter(self._publisher, self._settings, self.name, delivered.record, error)
        delivered.finish("dead_lettered")

    async def _record(self, batch: Sequence[Delivered]) -> None:
        """Make everything these records cause durable, then finish them."""
        windows = [each for each in batch if each.record.topic == self._windows_topic]
        samples = [each for each in batch if each.record.topic != self._windows_topic]
        if windows:
            async with self._windows_in_order:
                await self._record_windows(windows)
        if samples:
            await self._record_samples(samples)

    async def _record_samples(self, batch: Sequence[Delivered]) -> None:
        measured: list[Measured] = []
        faults: list[tuple[Delivered, MillraceError]] = []
        dropped: Counter[str] = Counter()
        for delivered in batch:
            if not self._is_ours(delivered):
                delivered.finish("skipped")
                continue
            try:
                samples, left_out = self._reader.decode(delivered.record)
            except ContractError as error:
                faults.append((delivered, error))
                continue
            dropped.update(left_out)
            kept = self._within_retention(samples, delivered)
            dropped["expired"] += len(samples.samples) - (len(kept.samples) if kept else 0)
            if kept is None:
                delivered.finish("skipped")
            else:
                measured.append(Measured(delivered, telemetry.key_of(delivered.record, samples.host), kept))
        for reason, count in dropped.items():
            metrics.SAMPLES_DROPPED.labels(self.name, reason).inc(count)
        faults += await self._isolated(measured, self._save_samples)
        await asyncio.gather(*(self.reject(*fault) for fault in faults))

    def _within_retention(self, samples: AnySamples, delivered: Delivered) -> AnySamples | None:
        """Leave out what is too old, by the record's own time: a second reading says the same."""
        earliest = delivered.record.published_at - self._sample_retention
        if isinstance(samples, PlainSamples) and samples.earliest >= earliest:
            return samples
        kept = tuple(sample for sample in samples.samples if sample.time >= earliest)
        return msgspec.structs.replace(samples, samples=kept) if kept else None

    async def _save_samples(self, items: Sequence[Measured]) -> None:
        async def save() -> SavedSamples:
            with metrics.STORE_SECONDS.time():
                return await self._database.save_samples([(item.key, item.samples) for item in items])

        saved = await forever(save, step=self.name, dependency="database")
        metrics.SAMPLES_STORED.inc(saved.stored)
        metrics.SAMPLES_REPEATED.labels("repeat").inc(saved.repeats)
        metrics.SAMPLES_REPEATED.labels("conflict").inc(saved.conflicts)
        if saved.conflicts:
            log.warning("kept the first values of a GPU and a time", conflicts=saved.conflicts)

    async def _record_windows(self, batch: Sequence[Delivered]) -> None:
        closed: list[Closed] = []
        faults: list[tuple[Delivered, MillraceError]] = []
        for delivered in batch:
            if not self._is_ours(delivered):
                delivered.finish("skipped")
                continue
            try:
                windows = self._checked(delivered)
            except ContractError as error:
                faults.append((delivered, error))
                continue
            if windows.start >= delivered.record.published_at - self._window_retention:
                closed.append(Closed(delivered, windows))
            else:
                # `watch` closes windows of whatever samples it is given, a replay of years ago included.
                metrics.WINDOWS_LEFT_OUT.labels("expired").inc(len(windows.gpus))
                delivered.finish("skipped")
        faults += await self._isolated(closed, self._save_windows)
        await asyncio.gather(*(self.reject(*fault) for fault in faults))

    def _checked(self, delivered: Delivered) -> Windows:
        record = delivered.record
        windows = telemetry.decode_windows(record)
        if windows.end < windows.start:
            raise ContractError(f"the window ends at {windows.end}, before it begins at {windows.start}")
        if windows.start < EARLIEST or windows.end > record.published_at + MAX_AHEAD:
            raise ContractError(f"there is no window of {windows.start} at {record.published_at}")
        if not all(map(_is_storable, windows.gpus)):
            raise ContractError("a number or a time of the windows is beyond all bounds")
        return windows

    async def _save_windows(self, items: Sequence[Closed]) -> None:
        database = self._database
        saved = await forever(
            lambda: database.save_windows([item.windows for item in items]),
            step=self.name,
            dependency="database",
        )
        metrics.WINDOWS_LEFT_OUT.labels("foreign").inc(saved.foreign)
        self._note(saved.steps)

    def _note(self, steps: Sequence[Alert]) -> None:
        for step in steps:
            metrics.ALERT_STEPS.labels(step.state, step.condition.severity).inc()
        if steps:
            self._outbox_filled.set()

    async def _isolated(
        self, items: Sequence[Item], save: Callable[[Sequence[Item]], Awaitable[None]]
    ) -> list[tuple[Delivered, MillraceError]]:
        """Save items and finish those that the database takes; return the others."""
        refused = await isolate(items, save)
        guilty = {item for item, _ in refused}
        for item in items:
            if item not in guilty:
                item.delivered.finish("stored")
        return [(item.delivered, error) for item, error in refused]

    async def _publish_steps(self) -> None:
        """Publish what alerts did, in order, one replica at a time; what fails is tried again."""
        while True:
            # Cleared first: what is queued while this reads asks for another round.
            self._outbox_filled.clear()
            try:
                while await self._publish_some():
                    pass
            except MillraceError as error:
                log.warning("steps of alerts wait", error=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OUTBOX_INTERVAL_SECONDS * random.uniform(0.75, 1.25)):
                    await self._outbox_filled.wait()

    async def _publish_some(self) -> int:
        async with self._database.outbox(OUTBOX_STEPS) as steps:
            by_alert: dict[str, list[Alert]] = {}
            for step in steps:
                by_alert.setdefault(step.id, []).append(step)
            await asyncio.gather(*(self._publish_in_order(some) for some in by_alert.values()))
        return len(steps)

    async def _publish_in_order(self, steps: Sequence[Alert]) -> None:
        for step in steps:
            try:
                await self._publisher.publish(self._alerts_topic, telemetry.encode_alert(step))
            except RecordTooLargeError as error:
                log.error("an alert is too large to tell of", alert_id=step.id, error=error.message)

    def _is_ours(self, delivered: Delivered) -> bool:
        return events.only_group(delivered.record) in {None, self._group}


def _is_storable(gpu: GpuWindow) -> bool:
    """Whether the database has room for the numbers, and the calendar for the times."""
    return all(0 <= number <= _MAX_INTEGER for number in (gpu.samples, *gpu.xids)) and all(
        1970 <= condition.since.year < 9999 for condition in gpu.conditions
    )
