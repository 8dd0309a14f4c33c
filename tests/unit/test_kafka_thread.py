"""The thread that owns the consumer, without Kafka: what it fetches reaches the ledger, or is fetched again."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer import fetcher as aiokafka_fetcher
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition as KafkaPartition

from agents import kafka_thread
from agents.consumer import LedgerConsumer
from agents.kafka_thread import LedgerThread, Ownership
from pipeline.errors import DependencyError, FatalError
from tests.unit.test_delivery import BULK, GENERATION, REALTIME, Bench

PLACE = KafkaPartition(BULK, 0)


class Log:
    """Stands in for aiokafka's consumer and for its parts: one partition of ten records, read two at a time."""

    def __init__(self) -> None:
        self.position = 0
        self._prefetch_backoff, self._fetch_max_wait_ms, self._fetch_min_bytes = 0.1, 500, 1
        self.answers = asyncio.Event()
        self.answers.set()
        self._closed = False
        self._fetcher = self._subscriptions = self._coordinator = self
        self._coordination_task = self._fetch_task = asyncio.get_running_loop().create_future()
        self.trouble: KafkaError | None = None  # what the group's coordination waits to report
        self.fails = False  # the next fetch raises after its records were drained
        state = SimpleNamespace(tps={PLACE}, state_value=self._state)
        self._subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=state))

    def _state(self, _: KafkaPartition) -> Any:
        return SimpleNamespace(position=self.position, has_valid_position=True)

    def assignment(self) -> set[KafkaPartition]:
        return {PLACE}

    def seek(self, _: KafkaPartition, offset: int) -> None:
        self.position = offset

    def check_errors(self) -> None:
        error, self.trouble = self.trouble, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def fetch_context(self) -> Iterator[None]:
        yield

    async def fetched_records(
        self, *_: object, timeout: float, **__: object
    ) -> dict[KafkaPartition, list[Any]]:
        self.waits_seconds = timeout
        await self.answers.wait()
        offsets = range(self.position, min(10, self.position + 2))
        self.position = offsets.stop
        if self.fails:
            raise KafkaError("another partition failed")
        record = {
            "topic": BULK,
            "partition": 0,
            "timestamp": 0,
            "timestamp_type": 0,
            "key": None,
            "value": b"x",
            "headers": (),
        }
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
        self.thread._usual_bytes = 1.0

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


@pytest.mark.parametrize("flow_active", [True, False])
async def test_trouble_with_the_group_is_looked_at(flow_active: bool) -> None:
    """An error that the group's coordination reports is taken from it, even while nothing may be read."""
    worker = Worker()
    worker.consumer.flow_active = flow_active
    worker.log.trouble = KafkaError("unexpected error in join group response")
    await worker.fetch()
    assert worker.log.trouble is None


@pytest.mark.parametrize("task", ["_coordination_task", "_fetch_task"])
async def test_a_task_of_the_consumer_that_ended_is_fatal(task: str) -> None:
    """When aiokafka's own task has ended, the worker ends too: it would stand still as a healthy member."""
    worker = Worker()
    worker.assign()
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended.set_exception(RuntimeError("gone"))
    setattr(worker.log, task, ended)
    with pytest.raises(FatalError, match="gone"):
        await worker.fetch()


async def test_a_fetch_that_fails_skips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drained from one partition before another one failed is fetched again, however often."""
    monkeypatch.setattr(kafka_thread, "RETRY_SECONDS", 0.0)
    worker = Worker()
    worker.assign()
    await worker.fetch(1)
    worker.log.fails = True
    await worker.fetch(3)
    worker.log.fails = False
    await worker.fetch(6)
    assert await worker.offsets() == list(range(10))


class Fetched:
    """Stands in for aiokafka's fetcher: what lies there, by partition."""

    def __init__(self, **sizes: list[int]) -> None:
        self.there = {
            KafkaPartition(topic.replace("_", "."), 0): [SimpleNamespace(value=bytes(size)) for size in each]
            for topic, each in sizes.items()
        }

    async def fetched_records(
        self, partitions: set[KafkaPartition], timeout: float, max_records: int
    ) -> dict[KafkaPartition, list[Any]]:
        assert partitions, "to aiokafka, none would mean all"
        taken = {}
        for place, records in self.there.items():
            if place in partitions and records and max_records:
                taken[place], self.there[place] = records[:max_records], records[max_records:]
                max_records -= len(taken[place])
        return taken


async def drain(fetched: Fetched) -> list[dict[str, int]]:
    """Take everything that lies there; return how many records of each topic came at a time."""
    thread, times = Worker().thread, []
    while records := await thread._drain(fetched, set(fetched.there), 0.0):
        times.append({place.topic: len(taken) for place, taken in records.items()})
    return times


async def test_realtime_is_not_kept_behind_bulk_of_the_same_fetch() -> None:
    """Real-time records are handed over at once, and before the bulk ones that were fetched earlier."""
    times = await drain(Fetched(images_bulk_v1=[1] * 600, images_realtime_v1=[1] * 3))
    assert list(times[0].items()) == [("images.realtime.v1", 3), ("images.bulk.v1", 500)]
    assert times[1:] == [{"images.bulk.v1": 100}]


async def test_large_records_are_handed_over_few_at_a_time() -> None:
    """Once it is known that records are large, a few are passed on before others may come in between."""
    times = await drain(Fetched(images_bulk_v1=[kafka_thread.MAX_POLL_BYTES // 4] * 900))
    sizes = [size for time in times for size in time.values()]
    assert sizes[0] == 500
    assert sum(sizes) == 900
    assert max(sizes[1:]) <= 4 / kafka_thread.USUAL_BYTES_WEIGHT


async def test_a_paused_lane_keeps_no_fetch_of_the_other_waiting() -> None:
    """While a lane is paused aiokafka asks for the other one at once, and soon again: it may read on by then."""
    worker = Worker()
    worker.assign()
    worker.consumer.ownership = Ownership(GENERATION, {(BULK, 0): 0, (REALTIME, 0): 0})
    await worker.fetch(5)  # all there is
    await worker.thread._fetch(1.0)
    assert worker.log._prefetch_backoff == kafka_thread.PREFETCH_BACKOFF_SECONDS
    assert worker.log.waits_seconds == 1.0
    worker.bench.delivery._lanes["bulk"].paused = True
    await worker.thread._fetch(1.0)
    assert worker.log._prefetch_backoff == 0.0
    assert worker.log._fetch_max_wait_ms == kafka_thread.PAUSED_FETCH_WAIT_MILLISECONDS
    assert worker.log.waits_seconds == kafka_thread.PAUSED_FETCH_WAIT_MILLISECONDS / 1000


async def test_a_busy_step_is_given_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While enough is open a fetch waits for company, a moment and no longer; else it ends at the first record."""
    monkeypatch.setattr(kafka_thread, "BUSY_RECORDS", 2)
    worker = Worker()
    worker.assign()
    worker.consumer.ownership = Ownership(GENERATION, {(BULK, 0): 0, (REALTIME, 0): 0})
    await worker.fetch()
    assert (worker.log._fetch_min_bytes, worker.log._fetch_max_wait_ms) == (1, 500)
    await worker.fetch()
    assert worker.log._fetch_min_bytes == kafka_thread.BUSY_FETCH_BYTES
    assert worker.log._fetch_max_wait_ms == kafka_thread.BUSY_FETCH_WAIT_MILLISECONDS
    worker.bench.delivery._lanes["bulk"].paused = True
    await worker.fetch()
    assert worker.log._fetch_min_bytes == 1
    worker.bench.delivery._lanes["bulk"].paused = False
    for delivered in await worker.bench.take(100):
        assert delivered.claim()
        delivered.finish("predicted")
    await worker.fetch()
    assert (worker.log._fetch_min_bytes, worker.log._fetch_max_wait_ms) == (1, 500)


@pytest.mark.parametrize(
    "callback", [LedgerConsumer.on_partitions_assigned, LedgerConsumer.on_partitions_revoked]
)
async def test_a_rebalance_that_fails_ends_the_worker(callback: Callable[..., Awaitable[None]]) -> None:
    """What a rebalance raises reaches the process: aiokafka would only log it and stay in the group."""
    crashed: list[BaseException] = []

    async def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    async def crash(error: BaseException) -> None:
        crashed.append(error)

    consumer = object.__new__(LedgerConsumer)
    flow = SimpleNamespace(suspend=lambda: None)
    parts = {
        "app": SimpleNamespace(settings=SimpleNamespace(rebalance_timeout_seconds=60.0), flow_control=flow),
        "delivery": SimpleNamespace(hand_over=fail),
        "_thread": SimpleNamespace(starts=fail),
        "_stopped": asyncio.Event(),
        "_crashed": asyncio.Event(),
        "stop_flow": lambda: None,
        "crash": crash,
    }
    consumer.__dict__.update(parts)
    with pytest.raises(KeyError):
        await callback(consumer, {PLACE})
    assert [repr(error) for error in crashed] == ["KeyError('unforeseen')"]


async def test_a_question_to_a_thread_that_stops_is_not_a_cancellation() -> None:
    """What the thread was asked and cancels as it stops fails the question; only the asker's own end cancels it."""
    worker = Worker()

    async def stops(*_: object) -> None:
        raise asyncio.CancelledError

    async def never_answers(*_: object) -> None:
        await asyncio.Event().wait()

    worker.thread.call_thread = stops
    with pytest.raises(DependencyError, match="closed"):
        await worker.thread.starts([(BULK, 0)])
    with pytest.raises(DependencyError, match="closed"):
        await worker.thread.commit_marked({(BULK, 0): (1, "")})
    worker.thread.call_thread = never_answers
    asking = asyncio.ensure_future(worker.thread.starts([(BULK, 0)]))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


def test_a_full_answer_still_has_the_realtime_lane() -> None:
    """A consumer of both lanes asks for real-time first, whatever order aiokafka has drawn."""
    bulk, realtime = ("x-images.bulk.v1", [(0, 5, 1), (1, 6, 1)]), ("x-images.realtime.v1", [(2, 7, 1)])
    for drawn in ([bulk, realtime], [realtime, bulk]):
        asked = aiokafka_fetcher.FetchRequest(500, 1, 32, 1, drawn)
        assert asked.topics == [realtime, bulk]
