"""The thread that owns the consumer, without Kafka: what it fetches reaches the ledger, or is fetched again."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from aiokafka.structs import TopicPartition as KafkaPartition

from agents.consumer import LedgerConsumer
from agents.kafka_thread import LedgerThread, Ownership
from tests.unit.test_delivery import BULK, GENERATION, Bench

PLACE = KafkaPartition(BULK, 0)


class Log:
    """Stands in for aiokafka's consumer and for its parts: one partition of ten records, read two at a time."""

    def __init__(self) -> None:
        self.position = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self._closed = False
        self._fetcher = self._subscriptions = self
        state = SimpleNamespace(tps={PLACE}, state_value=self._state)
        self._subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=state))

    def _state(self, _: KafkaPartition) -> Any:
        return SimpleNamespace(position=self.position, has_valid_position=True)

    def assignment(self) -> set[KafkaPartition]:
        return {PLACE}

    def seek(self, _: KafkaPartition, offset: int) -> None:
        self.position = offset

    @contextlib.contextmanager
    def fetch_context(self) -> Iterator[None]:
        yield

    async def fetched_records(self, *_: object, **__: object) -> dict[KafkaPartition, list[Any]]:
        await self.answers.wait()
        offsets = range(self.position, min(10, self.position + 2))
        self.position = offsets.stop
        record = {"topic": BULK, "partition": 0, "timestamp": 0, "key": None, "value": b"x", "headers": ()}
        return {PLACE: [SimpleNamespace(**record, offset=offset) for offset in offsets]} if offsets else {}


class Worker:
    """A thread and a consumer with only what reading needs."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.log = Log()
        self.consumer = SimpleNamespace(
            delivery=self.bench.delivery,
            flow_active=True,
            fetches=deque(),
            ownership=None,
            callback=self._receive,
            _to_message=lambda _, record: record,
        )
        self.thread = object.__new__(LedgerThread)
        self.thread.consumer = self.consumer  # type: ignore[assignment]
        self.thread._ensure_consumer = lambda: self.log
        self.thread._held, self.thread._went_back, self.thread._begun = {}, {}, None

    async def _receive(self, record: Any) -> None:
        self.bench.delivery.received((BULK, 0), GENERATION, record.offset)

    def assign(self) -> None:
        self.bench.assign(BULK, committed=0)
        self.consumer.ownership = Ownership(GENERATION, {(BULK, 0): 0})

    async def fetch(self, times: int = 1) -> None:
        for _ in range(times):
            await self.thread._fetch(0.1)
            while self.consumer.fetches:
                await LedgerConsumer._pass_on(self.consumer, self.consumer.fetches.popleft())  # type: ignore[arg-type]

    async def offsets(self) -> list[int]:
        return [delivered.record.offset for delivered in await self.bench.take(100)]


async def test_nothing_is_read_before_the_ledger_is_there() -> None:
    """A flow that Faust resumes for an older generation reads nothing of the next one before it is owned."""
    worker = Worker()
    await worker.fetch(2)
    assert worker.log.position == 0
    worker.assign()
    await worker.fetch(6)
    assert await worker.offsets() == list(range(10))


async def test_a_fetch_that_outlasts_its_ownership_is_fetched_again() -> None:
    """Records that come after a rebalance are not the new ownership's, though its generation is the same."""
    worker = Worker()
    worker.assign()
    await worker.fetch(2)
    worker.log.answers.clear()
    fetching = asyncio.create_task(worker.fetch())
    await asyncio.sleep(0)
    worker.consumer.ownership = None
    await worker.bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1)
    worker.assign()
    worker.log.answers.set()
    await fetching
    await worker.fetch(6)
    assert await worker.offsets() == list(range(10))
