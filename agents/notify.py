"""The `notify` step: tells receivers of alerts that fire and of those that are over.

A record is finished when the database knows whom to tell of it (`pipeline/notifications.py`); sending goes on from
there, whoever owns the partition, so that a receiver that is down holds up neither Kafka nor another receiver. A
message may arrive twice when a process dies between the receiver's answer and its own note of it: with the same
`webhook-id`. Of a pending alert nobody is told.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from agents.delivery import Delivered, Delivery
from agents.durable import forever, isolate, publish_dead_letter
from agents.senders import Sender
from pipeline import events, logs, metrics, notifications, receivers, telemetry
from pipeline.broker import Publisher
from pipeline.errors import ContractError, MillraceError
from pipeline.notifications import Transition
from pipeline.postgres import Pool
from pipeline.receivers import Receiver
from pipeline.settings import Settings
from pipeline.telemetry import Alert
from pipeline.topics import GPU_ALERTS

log = logs.get(__name__)

# Of the grace period after SIGTERM: for the answers to what was just sent.
DRAIN_SHARE = 0.1
BATCH_RECORDS = 500
BATCH_BYTES = 8 * 1024 * 1024
# A changed file of receivers is acted on within this.
LOOK_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class Decoded:
    """A record and the transition that it is."""

    delivered: Delivered
    alert: Alert


class Notify:
    """Tells receivers what `record` says of alerts."""

    name = "notify"
    topics = (GPU_ALERTS,)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._file = receivers.follow(settings.receivers_file) if settings.receivers_file else None
        self._receivers = self._file.newest() if self._file else ()
        self._publisher = Publisher(settings, client_id=self.name)
        self._senders: dict[str, tuple[Receiver, Sender, asyncio.Task[None]]] = {}
        self._pool: Pool | None = None

    async def start(self) -> None:
        """Wait for the migrated database and for the broker."""
        if not self._receivers:
            log.info("no receiver is set: nobody is told of alerts")
        pool = self._pool = await Pool.open(self._settings)
        await forever(pool.check, step=self.name, dependency="database")
        await self._publisher.start()

    async def stop(self) -> None:
        """Close both."""
        await self._publisher.stop()
        if self._pool is not None:
            await self._pool.close()

    def unready(self) -> str | None:
        """Waiting for a receiver or the database is not being unready."""
        return None

    async def run(self, delivery: Delivery) -> None:
        """Note whom to tell, and tell them."""
        assert self._pool is not None
        drain_seconds = self._settings.shutdown_grace_seconds * DRAIN_SHARE
        # Through a proxy where the environment names one, as clusters without a way out do.
        async with (
            aiohttp.ClientSession(trust_env=True, cookie_jar=aiohttp.DummyCookieJar()) as http,
            asyncio.TaskGroup() as group,
        ):
            await self._employ(group, self._pool, http, drain_seconds)
            group.create_task(self._pump(delivery))
            while self._file is not None:
                await asyncio.sleep(LOOK_SECONDS)
                self._receivers = self._file.newest()
                await self._employ(group, self._pool, http, drain_seconds)

    async def _employ(
        self, group: asyncio.TaskGroup, pool: Pool, http: aiohttp.ClientSession, drain_seconds: float
    ) -> None:
        """Have one sender for each receiver as it is now, and none for those that were changed or are gone."""
        wanted = {receiver.name: receiver for receiver in self._receivers}
        for name, (receiver, _, task) in list(self._senders.items()):
            if wanted.get(name) != receiver:
                log.info("no longer sending to a receiver as it was", receiver=name)
                del self._senders[name]
                task.cancel()
                await asyncio.wait({task})
                with contextlib.suppress(KeyError):  # until it is sent something there is none
                    metrics.RECEIVER_FAILING.remove(name)
        for name in wanted.keys() - self._senders.keys():
            sender = Sender(wanted[name], pool, http, drain_seconds)
            self._senders[name] = wanted[name], sender, group.create_task(sender.run())

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Dead-letter a record that killed us, unopened."""
        await self._dead_letter(delivered, error)

    async def _pump(self, delivery: Delivery) -> None:
        while True:
            batch = await delivery.take(BATCH_RECORDS, BATCH_BYTES)
            await self._note([delivered for delivered in batch if delivered.claim()])

    async def _note(self, batch: Sequence[Delivered]) -> None:
        """Make whom to tell of these records durable, then finish them."""
        decoded: list[Decoded] = []
        for delivered in batch:
            if events.only_group(delivered.record) not in {None, self._group}:
                delivered.finish("skipped")
                continue
            try:
                decoded.append(Decoded(delivered, telemetry.decode_alert(delivered.record)))
            except ContractError as error:
                await self._dead_letter(delivered, error)
        refused = dict(await isolate(decoded, self._save))
        for item in decoded:
            if item in refused:
                await self._dead_letter(item.delivered, refused[item])
            else:
                item.delivered.finish("stored")
        for _, sender, _ in self._senders.values():
            sender.wake()

    async def _save(self, items: Sequence[Decoded]) -> None:
        transitions = []
        for item in items:
            wanted = [receiver for receiver in self._receivers if receiver.wants(item.alert)]
            if not wanted:
                log.info("nobody is told of this", alert=item.alert.id, state=item.alert.state)
            published_at = item.delivered.record.published_at
            transitions += [Transition(receiver, item.alert, published_at) for receiver in wanted]
        if transitions:
            pool = self._pool
            assert pool is not None
            await forever(
                lambda: notifications.save(pool, transitions), step=self.name, dependency="database"
            )

    async def _dead_letter(self, delivered: Delivered, error: MillraceError) -> None:
        await publish_dead_letter(self._publisher, self._settings, self.name, delivered.record, error)
        delivered.finish("dead_lettered")
