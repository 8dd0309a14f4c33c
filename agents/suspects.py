"""Suspects: records that may kill their worker, started one at a time with each attempt written down first.

`careful.py` says what is written, `inbox.py` keeps them apart from healthy records; this is what happens between.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from agents.commits import Commits
from agents.inbox import Inbox
from agents.ownership import Delivered, Partition, TopicPartition
from pipeline import metrics
from pipeline.errors import FatalError, MillraceError, ProcessKilledError

# Before a refused or unanswered commit of an attempt is tried again; long against a round trip.
RETRY_SECONDS = 0.5


class Suspects:
    """Starts the suspects of the partitions that a worker owns; `changed` says that it is time to look again."""

    def __init__(
        self,
        step: str,
        partitions: Mapping[TopicPartition, Partition],
        inbox: Inbox,
        commits: Commits,
        *,
        commit: Callable[[], Awaitable[bool]],
        reject: Callable[[Delivered, MillraceError], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self._step = step
        self._partitions = partitions
        self._inbox = inbox
        self._commits = commits
        self._commit = commit
        self._reject = reject
        self._changed = changed
        self._rejections: set[asyncio.Future[None]] = set()
        self._broken: BaseException | None = None

    def check(self) -> None:
        """Look whether a rejection has failed: its record is alone in flight and blocks the others.

        Raises:
            FatalError: a record that kills its worker could not be rejected.
        """
        if self._broken is not None:
            error = f"{type(self._broken).__name__}: {self._broken}"
            raise FatalError(f"a record could not be rejected: {error}") from self._broken

    async def pass_over(self) -> bool:
        """Suspect the next records once all suspects are held; True: something was written, look again.

        Elder records that are held keep the committed offset back. Without a word the next owner would suspect
        the last of these again, whatever kills us after them.
        """
        for partition in self._partitions.values():
            mark, head = partition.mark, partition.ledger.committable
            if head is None or not max(head, mark.first) < mark.until or partition.closing:
                continue
            is_waiting = partition.open_suspects or next(iter(partition.pending), mark.until) < mark.until
            if is_waiting or partition.ledger.next_offset < mark.until:
                continue
            beyond = mark.beyond()
            if await self._commits.mark({partition: (head, beyond.at_commit(head))}):
                partition.mark, partition.committed = beyond, head
            else:
                await asyncio.sleep(RETRY_SECONDS)  # the group is moving on, or the broker is away
            self._changed()
            return True
        return False

    async def begin(self, delivered: Delivered, may_start: Callable[[], bool]) -> bool:
        """Write the attempt down, then let the record start alone; reject what has died too often."""
        partition, offset = delivered.partition, delivered.record.offset
        if partition.mark.is_condemned(offset):
            self._inbox.start_alone(delivered)
            delivered.claim()
            deaths = partition.mark.attempts
            error = ProcessKilledError(f"its worker died {deaths} times with this record alone in flight")
            rejection = asyncio.ensure_future(self._reject(delivered, error))
            self._rejections.add(rejection)
            rejection.add_done_callback(self._rejected)
            return False
        attempt = partition.mark.attempt(offset)
        # Elder records may be held, and only the first of them may be committed.
        held = partition.ledger.committable
        head = offset if held is None else min(held, offset)
        # First what is finished elsewhere: a suspect whose end is not written down when the next one kills us
        # would count as one more death with it alone in flight, and be condemned in its stead.
        written = await self._commit() and await self._commits.mark(
            {partition: (head, attempt.at_commit(head))}
        )
        if not written:
            await asyncio.sleep(RETRY_SECONDS)  # the group is moving on, or the broker is away
        elif self._inbox.next_suspect() is delivered and may_start():
            partition.mark, partition.committed = attempt, head
            partition.attempting = True
            self._inbox.start_alone(delivered)
            metrics.CAREFUL_RECORDS.labels(self._step).inc()
            return True
        self._changed()
        return False

    def settle(self, delivered: Delivered) -> None:
        """Note that a record has not killed its worker: it was put back, or is held."""
        partition = delivered.partition
        if partition.attempting and partition.mark.offset == delivered.record.offset:
            partition.mark, partition.attempting = partition.mark.survived(), False

    def _rejected(self, rejection: asyncio.Future[None]) -> None:
        self._rejections.discard(rejection)
        if not rejection.cancelled() and (error := rejection.exception()) is not None:
            self._broken = error
            self._changed()
