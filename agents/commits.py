"""Commits: what is finished, and the marks of careful mode, written to Kafka one after the other.

The invariant: no offset is committed above the longest finished prefix of its partition's ledger, and once a
hand-over has begun its own commit is the last word.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from agents.ownership import Partition, TopicPartition
from pipeline import logs, metrics
from pipeline.errors import DependencyError

log = logs.get(__name__)

CommitResult = Literal["ok", "refused"]


class Committer(Protocol):
    """Commits offsets with metadata for the current generation of the group."""

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        """Commit; `refused` when the group has moved on. Raises DependencyError if nothing answers."""
        ...


class Commits:
    """Writes down how far the partitions that a worker owns are finished."""

    def __init__(
        self, step: str, committer: Committer, partitions: Mapping[TopicPartition, Partition]
    ) -> None:
        """Take the owned partitions as they are kept by whoever owns them, who may add and remove some."""
        self._step = step
        self._committer = committer
        self._partitions = partitions
        self._lock = asyncio.Lock()

    async def commit(self, clean: Sequence[Partition] = ()) -> bool:
        """Commit what is finished; `clean` partitions lose their mark even if they did not move.

        False when the broker does not answer or the group has moved on; nothing is lost by that.
        """
        async with self._lock:
            partitions = {}
            offsets: dict[TopicPartition, tuple[int, str]] = {}
            for place, partition in self._partitions.items():
                offset = partition.ledger.committable
                moved = offset is not None and (partition.committed is None or offset > partition.committed)
                if partition in clean and partition.marked and not moved:
                    offset = partition.committed
                elif not moved:
                    continue
                if offset is not None:
                    partitions[place] = partition
                    offsets[place] = (offset, partition.mark.at_commit(offset))
            done = not offsets or await self._commit(offsets)
            if done:
                for place, partition in partitions.items():
                    partition.committed = offsets[place][0]
                    partition.marked = False
                    partition.uncommitted_since = None
        self._observe()
        return done

    async def mark(self, marks: Mapping[Partition, tuple[int, str]]) -> bool:
        """Commit offsets with metadata, unless a hand-over of one of them has begun."""
        async with self._lock:
            if not marks or any(partition.closing for partition in marks):
                return False
            for partition in marks:
                partition.marked = True  # even if no answer comes: Kafka may have it
            return await self._commit({partition.place: mark for partition, mark in marks.items()})

    async def _commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> bool:
        try:
            result = await self._committer.commit(offsets)
        except DependencyError as error:
            metrics.COMMITS.labels(self._step, "failed").inc()
            log.warning("commit failed, trying again", reason=error.message)
            return False
        metrics.COMMITS.labels(self._step, result).inc()
        return result == "ok"

    def _observe(self) -> None:
        now = time.monotonic()
        times = [partition.uncommitted_since for partition in self._partitions.values()]
        oldest = min((since for since in times if since is not None), default=now)
        metrics.COMMIT_AGE_SECONDS.labels(self._step).set(now - oldest)
