"""The `watch` step: samples of GPUs in, closed windows with scores and conditions out, XID errors at once.

Samples of an open window are held, not started: a hand-over forgets them. A window is published to the partition
number its samples came from and acknowledged before the last of them is finished. What a worker knows of its GPUs
travels in the windows: on assignment it reads the latest ones back. Broken records are for `record` to judge.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from agents.delivery import Delivered, Delivery
from agents.ownership import Partition
from agents.window_log import MAX_GPUS, WindowLog, read_windows
from pipeline import events, logs, metrics, telemetry
from pipeline.broker import Publisher
from pipeline.connections import backoff_seconds
from pipeline.detection import (
    Closed,
    Closing,
    Fed,
    Watch,
    WatchOptions,
    WindowModel,
    close_round,
    load_rules,
    load_window_model,
    rounds_of,
)
from pipeline.errors import ContractError, DependencyError, MillraceError, RecordTooLargeError
from pipeline.models import resolve_device
from pipeline.settings import Settings
from pipeline.topics import GPU_SAMPLES, GPU_WINDOWS

log = logs.get(__name__)

# Records of one turn: enough that windows close together, few enough that a lane's budget is not needed.
BATCH_RECORDS = 256
BATCH_BYTES = 16 * 1024 * 1024
# Between two looks for silent keys; they take at least eight of them.
MAX_TICK_SECONDS = 5.0
# Two observations further apart than this say nothing of the time between them: we or the broker were away.
MAX_GAP_SECONDS = 15.0


@dataclass(eq=False)
class Owned:
    """One ownership of one partition of the samples."""

    partition: Partition
    watch: Watch
    log: WindowLog
    #: Of records that are held: how many windows with their samples are not published.
    unpublished: dict[Delivered, int] = field(default_factory=dict)
    #: For how long it is known that nothing came for a key with open windows.
    quiet_seconds: dict[str, float] = field(default_factory=dict)
    observed_at: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether a hand-over has begun: what is held belongs to the next owner."""
        return self.partition.closing or not self.partition.live


@dataclass(frozen=True)
class Seen:
    """What a record did to its partition's windows; `fed` is None for one that is not for us."""

    owned: Owned
    delivered: Delivered
    fed: Fed | None


class WatchStep:
    """Keeps an eye on GPUs."""

    name = "watch"
    topics = (GPU_SAMPLES,)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._windows_topic = settings.topic(GPU_WINDOWS.name)
        self._publisher = Publisher(settings, client_id=self.name, linger_ms=0)
        self._book = load_rules(settings.rules_file)
        self._options = WatchOptions(
            window_seconds=settings.watch_window_seconds,
            lateness_seconds=settings.watch_lateness_seconds,
            silence_seconds=settings.watch_silence_seconds,
            max_samples=settings.watch_max_samples,
        )
        self._device = torch.device("cpu")
        self._model: WindowModel | None = None
        self._tick_seconds = min(MAX_TICK_SECONDS, settings.watch_silence_seconds / 8)
        self._owned: dict[Partition, Owned] = {}

    async def start(self) -> None:
        """Wait for the broker."""
        settings = self._settings
        if settings.device != "auto":  # the CPU is enough, and no GPU is taken that nobody asked for
            self._device = resolve_device(settings.device)
        # Tensors of some hundred GPUs: a second thread costs more than it gives.
        torch.set_num_threads(settings.torch_threads or 1)
        if settings.watch_model is not None:
            self._model = load_window_model(
                settings.watch_model, self._device, allow_python=settings.allow_python_models
            )
            log.info("windows are scored by a model", model=self._model.name, version=self._model.version)
        await self._publisher.start()

    async def stop(self) -> None:
        """Close the publisher."""
        await self._publisher.stop()

    def unready(self) -> str | None:
        """Waiting for the broker is not being unready: lag tells."""
        return None

    async def run(self, delivery: Delivery) -> None:
        """Take records, close windows, publish them; look for silent keys in between."""
        taking: asyncio.Task[list[Delivered]] | None = None
        try:
            while True:
                taking = taking or asyncio.create_task(delivery.take(BATCH_RECORDS, BATCH_BYTES))
                await asyncio.wait({taking}, timeout=self._tick_seconds)
                if taking.done():
                    batch, taking = taking.result(), None
                    await self._work(batch)
                await self._look_for_silence(delivery)
        finally:
            if taking is not None:
                taking.cancel()

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Pass by a record that killed us: samples are for `record` to judge."""
        record = delivered.record
        log.error(
            "passing by",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            reason=error.message,
        )
        metrics.SAMPLES_DROPPED.labels(self.name, error.code).inc()
        delivered.finish("skipped")

    async def _work(self, batch: Sequence[Delivered]) -> None:
        """Bring a batch into its windows; publish what closes and what cannot wait."""
        self._owned = {partition: owned for partition, owned in self._owned.items() if not owned.is_over}
        await self._own({delivered.partition for delivered in batch})
        known = [
            (self._owned[d.partition], d) for d in batch if not d.is_forgotten and d.partition in self._owned
        ]
        seen = await asyncio.to_thread(lambda: [Seen(owned, d, self._feed(owned, d)) for owned, d in known])
        for each in seen:
            self._hold(each)
        await asyncio.gather(*(self._tell(each) for each in seen))
        await self._close([closing for each in seen if each.fed for closing in each.fed.closings])
        metrics.WATCH_HELD_SAMPLES.set(sum(owned.watch.held_samples for owned in self._owned.values()))
        metrics.WATCH_GPUS.set(sum(owned.watch.gpus for owned in self._owned.values()))

    async def _own(self, partitions: set[Partition]) -> None:
        """Take up partitions that are new to us where the last owner left them."""
        new = [
            partition for partition in partitions if partition not in self._owned and not partition.closing
        ]
        for owned in await asyncio.gather(*(self._restored(partition) for partition in new)):
            if not owned.is_over:
                self._owned[owned.partition] = owned

    async def _restored(self, partition: Partition) -> Owned:
        watch = Watch(self._book, self._options)
        found = WindowLog(0)
        for delay in backoff_seconds():
            try:
                found = await read_windows(self._settings, self._windows_topic, partition.number)
                break
            except DependencyError as error:
                metrics.RETRIES.labels(self.name, "broker").inc()
                log.warning("waiting to read windows back", error=error.message)
                if partition.closing:
                    break
                await asyncio.sleep(delay)
        watch.restore(found.take_windows())
        return Owned(partition, watch, found)

    def _feed(self, owned: Owned, delivered: Delivered) -> Fed | None:
        """Bring one record's samples into their windows; blocks for some milliseconds."""
        record = delivered.record
        if events.only_group(record) not in {None, self._group}:
            return None
        try:
            samples, dropped = telemetry.decode_samples(record)
        except ContractError as error:
            metrics.SAMPLES_DROPPED.labels(self.name, error.code).inc()
            return None
        key = telemetry.key_of(record, samples.host)
        owned.quiet_seconds.pop(key, None)
        fed = owned.watch.feed(delivered, key, samples, record.timestamp_ms)
        for reason, count in (*dropped.items(), *fed.dropped.items()):
            metrics.SAMPLES_DROPPED.labels(self.name, reason).inc(count)
        return fed

    def _hold(self, seen: Seen) -> None:
        """Hold a record whose samples are in windows that are not published yet."""
        fed, delivered = seen.fed, seen.delivered
        if fed is None or delivered.is_forgotten:
            return
        windows = fed.windows + sum(delivered in closing.window.tokens for closing in fed.closings)
        if windows:
            seen.owned.unpublished[delivered] = windows
            delivered.buffer()

    async def _tell(self, seen: Seen) -> None:
        """Publish a record's XID errors; finish it when none of its samples is in a window."""
        fed, delivered = seen.fed, seen.delivered
        is_held = delivered in seen.owned.unpublished
        if (is_held and not (fed and fed.events)) or not delivered.claim():
            return
        for event in fed.events if fed else ():
            metrics.WINDOWS_CLOSED.labels("event").inc()
            await self._publish(seen.owned, event)
        if is_held:
            delivered.release()
        else:
            delivered.finish("late" if fed else "skipped")

    async def _close(self, closings: Sequence[Closing]) -> None:
        """Score and publish windows that take no more samples, each key's in their order."""
        for together in rounds_of(closings):
            with metrics.WINDOW_SCORE_SECONDS.time():
                scored = await asyncio.to_thread(close_round, together, self._device, self._model)
            await asyncio.gather(*(self._finish(closed) for closed in scored))

    async def _finish(self, closed: Closed) -> None:
        """Publish a window, then finish the records of which it was the last one."""
        tokens = [token for token in closed.tokens if isinstance(token, Delivered)]
        owned = self._owned.get(tokens[0].partition)
        if owned is None or owned.is_over or not all(token.claim() for token in tokens):
            return
        metrics.WINDOWS_CLOSED.labels(closed.cause).inc()
        await self._publish(owned, closed.windows)
        for token in tokens:
            owned.unpublished[token] -= 1
            if owned.unpublished[token]:
                token.release()
            else:
                del owned.unpublished[token]
                token.finish("watched")

    async def _publish(self, owned: Owned, windows: telemetry.Windows) -> None:
        """Return when the broker has a window, all parts of it."""
        first, max_gpus = None, MAX_GPUS
        with metrics.PUBLISH_SECONDS.labels(self.name).time():
            while windows.gpus:
                first, refused = await self._publish_parts(owned, windows, max_gpus)
                if refused is None:
                    break
                if len(refused) > 1:
                    max_gpus = len(refused) // 2
                    continue
                gpu_uuid = refused[0].gpu_uuid
                log.error("a GPU's window is too large to publish", gpu_uuid=gpu_uuid, start=windows.start)
                metrics.SAMPLES_DROPPED.labels(self.name, RecordTooLargeError.code).inc()
                rest = tuple(gpu for gpu in windows.gpus if gpu.gpu_uuid != gpu_uuid)
                windows = msgspec.structs.replace(windows, gpus=rest)
        owned.log.published(windows, -1 if first is None else first)

    async def _publish_parts(
        self, owned: Owned, windows: telemetry.Windows, max_gpus: int
    ) -> tuple[int | None, Sequence[telemetry.GpuWindow] | None]:
        """Publish a window in parts of so many GPUs; return where it begins, and of whom a part is too large."""
        first = None
        for part, outgoing in owned.log.outgoing(windows, owned.watch.rosters, max_gpus):
            try:
                place = await self._publisher.publish_forever(
                    self._windows_topic, outgoing, step=self.name, partition=owned.partition.number
                )
            except RecordTooLargeError:
                return None, part.gpus
            first = place.offset if first is None else first
        return first, None

    async def _look_for_silence(self, delivery: Delivery) -> None:
        """Close the windows of keys of which nothing comes, once it is sure that nothing is on its way.

        The broker must have said again and again that there is nothing that we have not read: while it is away,
        or we are, publishers may have more to say.
        """
        closings: list[Closing] = []
        for owned in list(self._owned.values()):
            keys = owned.watch.open_keys
            if not keys or owned.is_over:
                continue
            delivery.ask_for_ends()
            closings += owned.watch.close_silent(self._silent(owned, keys))
        await self._close(closings)

    def _silent(self, owned: Owned, keys: set[str]) -> list[str]:
        """Count how long keys are silent, by observations; return those that are for long enough."""
        partition = owned.partition
        if partition.end_seen_at <= owned.observed_at:
            return []
        elapsed, owned.observed_at = partition.end_seen_at - owned.observed_at, partition.end_seen_at
        has_all = partition.end is not None and partition.end <= partition.ledger.next_offset
        is_idle = partition.ledger.open_records == partition.buffered
        if not (has_all and is_idle) or elapsed > MAX_GAP_SECONDS:
            owned.quiet_seconds.clear()
            return []
        for key in keys:
            owned.quiet_seconds[key] = owned.quiet_seconds.get(key, 0.0) + elapsed
        return sorted(key for key in keys if owned.quiet_seconds[key] > self._options.silence_seconds)
