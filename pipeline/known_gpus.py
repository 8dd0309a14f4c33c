"""The GPUs that a process has met: their ids, and what of them the table `gpus` does not say yet.

A GPU belongs to the first host that names it, until that host has been silent about it for a while: two hosts that
name one UUID at a time are a fault of theirs, which is counted and hidden from nobody.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from pipeline import logs
from pipeline.alerting import MOVED_AFTER
from pipeline.plain_samples import AnySamples
from pipeline.postgres import QUERIES, Pool
from pipeline.telemetry import Gpu, Windows

log = logs.get(__name__)

# How old `gpus.last_seen` may be: an update per GPU and sample would cost more than the samples.
LAST_SEEN_INTERVAL = timedelta(seconds=30)


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch says of one GPU."""

    host: str
    peer_key: str
    time: datetime
    state: str = "ok"
    gpu: Gpu


class _Known(msgspec.Struct):
    gpu_id: int
    host: str
    #: What was written last, by host: two that name one GPU must not have it written with every batch.
    sightings: dict[str, Sighting] = msgspec.field(default_factory=dict)


class KnownGpus:
    """Gives ids to UUIDs, asking the database only when there is something new."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[str, _Known] = {}

    async def identify(self, batch: Iterable[tuple[str, AnySamples]]) -> dict[str, int]:
        """Return the ids of all GPUs of samples, given with their record's key; store what is new of them.

        Raises:
            StorageRefusedError, DependencyError: as every write.
        """
        sightings = _sightings(batch)
        news = [s for uuid, s in sightings.items() if _is_news(s, self._known.get(uuid))]
        if news:
            await self._save(news)
        return {uuid: self._known[uuid].gpu_id for uuid in sightings}

    async def identify_windows(self, batch: Iterable[Windows]) -> dict[str, int]:
        """Return the ids of all GPUs of windows; a GPU without a sample so far is stored as the window names it."""
        sightings = {
            gpu.gpu_uuid: Sighting(
                host=gpu.host,
                peer_key=windows.key,
                time=windows.end,
                gpu=Gpu(gpu_uuid=gpu.gpu_uuid, model=gpu.model),
            )
            for windows in batch
            for gpu in windows.gpus
        }
        await self._look_up([uuid for uuid in sightings if uuid not in self._known])
        if unknown := [s for uuid, s in sightings.items() if uuid not in self._known]:
            await self._save(unknown)
        return {uuid: self._known[uuid].gpu_id for uuid in sightings}

    async def _save(self, sightings: Sequence[Sighting]) -> None:
        others = [s for s in sightings if (k := self._known.get(s.gpu.gpu_uuid)) is None or k.host != s.host]
        columns = [list(column) for column in zip(*map(_row, sightings), strict=True)]
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["add_gpus"], *columns)
            await connection.execute(QUERIES["lock_known_gpus"], columns[0])
            conflicts = await connection.fetch(
                QUERIES["gpu_conflicts"],
                [s.gpu.gpu_uuid for s in others],
                [s.host for s in others],
                [s.time for s in others],
                MOVED_AFTER,
            )
            await connection.execute(QUERIES["save_gpus"], *columns, MOVED_AFTER)
        if conflicts:
            log.warning(
                "a GPU is named by two hosts at a time",
                gpus=len(conflicts),
                gpu_uuid=conflicts[0]["gpu_uuid"],
                host=conflicts[0]["host"],
            )
        await self._look_up([sighting.gpu.gpu_uuid for sighting in sightings])
        for sighting in sightings:
            self._known[sighting.gpu.gpu_uuid].sightings[sighting.host] = sighting

    async def _look_up(self, uuids: Sequence[str]) -> None:
        if uuids:
            for row in await self._pool.rows("gpu_ids", uuids):
                self._known.setdefault(row["gpu_uuid"], _Known(row["gpu_id"], row["host"])).host = row["host"]


def _sightings(batch: Iterable[tuple[str, AnySamples]]) -> dict[str, Sighting]:
    """Return what a batch says of each GPU: the newest sample and the last description."""
    sightings: dict[str, Sighting] = {}
    for key, samples in batch:
        described = {gpu.gpu_uuid: gpu for gpu in samples.gpus}
        for uuid, sample in {sample.gpu_uuid: sample for sample in samples.samples}.items():
            before = sightings.get(uuid)
            gpu = described.get(uuid) or (before.gpu if before else Gpu(gpu_uuid=uuid))
            if before is not None and before.time > sample.time:
                sightings[uuid] = msgspec.structs.replace(before, gpu=gpu)
            else:
                sightings[uuid] = Sighting(
                    host=samples.host, peer_key=key, time=sample.time, state=sample.state, gpu=gpu
                )
    return sightings


def _is_news(new: Sighting, known: _Known | None) -> bool:
    if known is None or (old := known.sightings.get(new.host)) is None:
        return True
    return (
        new.peer_key != old.peer_key
        or new.state != old.state
        or new.time - old.time >= LAST_SEEN_INTERVAL
        or (new.gpu != old.gpu and _describes(new.gpu))
    )


def _describes(gpu: Gpu) -> bool:
    return gpu != Gpu(gpu_uuid=gpu.gpu_uuid)


def _row(sighting: Sighting) -> tuple[Any, ...]:
    gpu = sighting.gpu
    return (
        gpu.gpu_uuid, sighting.host, sighting.peer_key, sighting.time, sighting.state, gpu.index, gpu.model,
        gpu.device, gpu.pci_bus_id, gpu.parent_uuid, gpu.driver_version, msgspec.json.encode(gpu.labels).decode(),
    )  # fmt: skip
