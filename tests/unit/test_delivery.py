"""Delivery without Kafka: what is handed out, paused, handed over and committed."""

import asyncio
import time
from collections.abc import Mapping, Sequence

import pytest
from prometheus_client import REGISTRY

from agents import inbox
from agents.delivery import CommitResult, Delivered, Delivery, Start, TopicPartition
from pipeline.errors import DependencyError, FatalError, MillraceError
from pipeline.events import Record
from pipeline.topics import Lane

REALTIME, BULK = "images.realtime.v1", "images.bulk.v1"
GENERATION = 3


class Broker:
    """Remembers commits as a group coordinator does."""

    def __init__(self) -> None:
        self.committed: dict[TopicPartition, tuple[int, str]] = {}
        self.answer: CommitResult | None = "ok"
        self.answers = asyncio.Event()
        self.answers.set()

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> CommitResult:
        await self.answers.wait()
        if self.answer is None:
            raise DependencyError("no answer")
        if self.answer == "ok":
            self.committed.update(offsets)
        return self.answer


class Bench:
    """A delivery with a broker, and records at hand."""

    def __init__(self, *, max_open_records: int = 100, max_open_bytes: int = 10_000) -> None:
        self.broker = Broker()
        self.rejected: list[tuple[int, str]] = []
        self.delivery = Delivery(
            step="test",
            committer=self.broker,
            reject=self._reject,
            max_open_records=max_open_records,
            max_open_bytes=max_open_bytes,
        )

    async def _reject(self, delivered: Delivered, error: MillraceError) -> None:
        self.rejected.append((delivered.record.offset, error.code))
        delivered.finish("dead_lettered")

    def assign(self, *topics: str, committed: int | None = None, metadata: str = "", end: int = 1000) -> None:
        starts = {(topic, 0): Start(committed, metadata, 0, end) for topic in topics}
        self.delivery.assigned(starts, GENERATION)

    def fetch(
        self, topic: str, *offsets: int, generation: int = GENERATION, size: int = 1
    ) -> Sequence[Record]:
        records = [
            Record(topic=topic, partition=0, offset=o, timestamp_ms=0, value=b"x" * size) for o in offsets
        ]
        return self.delivery.fetched((topic, 0), generation, records, offsets[-1] + 1)

    def deliver(self, topic: str, *offsets: int, generation: int = GENERATION, size: int = 1) -> None:
        if opened := self.fetch(topic, *offsets, generation=generation, size=size):
            self.delivery.received((topic, 0), generation, opened[-1].offset)

    async def take(self, count: int = 10) -> list[Delivered]:
        return await asyncio.wait_for(self.delivery.take(count, 1_000_000), 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
async def test_records_that_are_put_back_keep_their_order(order: Sequence[int]) -> None:
    """What is put back is taken again in the order of its partition: what goes first can be committed first."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, *range(6))
    taken = await bench.take(4)
    for index in order:
        taken[index].put_back()
    assert [delivered.record.offset for delivered in await bench.take(6)] == list(range(6))


async def test_records_are_taken_from_lanes_with_room() -> None:
    """A lane without room waits, the other one does not; once it has room, a caller that waits gets its records."""
    bench = Bench()
    bench.assign(REALTIME, BULK)
    room: list[Lane] = ["realtime"]
    bench.deliver(BULK, 0)
    bench.deliver(REALTIME, 0)
    [first] = await bench.delivery.take(10, 1_000_000, lambda: room)
    assert first.lane == "realtime"
    taking = asyncio.ensure_future(bench.delivery.take(10, 1_000_000, lambda: room))
    await asyncio.sleep(0)
    assert not taking.done()
    room.append("bulk")
    bench.delivery.look_again()
    [second] = await asyncio.wait_for(taking, 1)
    assert second.lane == "bulk"


async def test_commits_only_the_finished_prefix() -> None:
    """Finishing out of order commits up to the first unfinished record."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1, 2)
    first, second, third = await bench.take()
    assert second.claim()
    assert third.claim()
    second.finish("predicted")
    third.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed.get((BULK, 0), (0, ""))[0] == 0
    assert first.claim()
    first.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed[BULK, 0] == (3, "")


async def test_an_unclaimed_record_cannot_be_finished() -> None:
    """Finishing without claiming acknowledges nothing."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0)
    (delivered,) = await bench.take()
    delivered.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed.get((BULK, 0), (0, ""))[0] == 0


async def test_a_record_the_agent_never_saw_blocks_the_commit() -> None:
    """A record that was fetched and dropped on its way to the agent is never passed."""
    bench = Bench()
    bench.assign(BULK)
    bench.fetch(BULK, 0, 1)
    bench.fetch(BULK, 2, 3)
    bench.delivery.received((BULK, 0), GENERATION, 1)  # the event of 2 and 3 got lost in between
    for delivered in await bench.take():
        assert delivered.claim()
        delivered.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed[BULK, 0][0] == 2


async def test_an_event_stands_for_what_was_fetched_before_it() -> None:
    """One event brings all records of its partition up to its own, each once and in order, and no others."""
    bench = Bench()
    bench.assign(BULK, REALTIME)
    bench.fetch(BULK, 0, 1, 3)
    bench.fetch(BULK, 4, 5)
    bench.fetch(REALTIME, 0)
    bench.delivery.received((BULK, 0), GENERATION, 4)
    bench.delivery.received((BULK, 0), GENERATION, 4)
    assert [delivered.record.offset for delivered in await bench.take()] == [0, 1, 3, 4]
    bench.delivery.received((BULK, 0), GENERATION, 5)
    assert [delivered.record.offset for delivered in await bench.take()] == [5]


async def test_hand_over_forgets_unclaimed_and_waits_for_claimed() -> None:
    """At a hand-over unclaimed records go back to Kafka, claimed ones finish and are committed."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1, 2)
    first, second = await bench.take(2)
    assert first.claim()
    handing_over = asyncio.create_task(bench.delivery.hand_over([(BULK, 0)], deadline_seconds=5))
    await asyncio.sleep(0)
    assert not second.claim()
    assert second.is_forgotten
    assert not handing_over.done()
    first.finish("predicted")
    await asyncio.wait_for(handing_over, 1)
    assert bench.broker.committed[BULK, 0] == (1, "")


async def test_hand_over_ends_at_its_deadline() -> None:
    """What is still unfinished at the deadline is abandoned unacknowledged, and finishing it later does nothing."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0)
    (delivered,) = await bench.take()
    assert delivered.claim()
    await asyncio.wait_for(bench.delivery.hand_over([(BULK, 0)], deadline_seconds=0.01), 1)
    bench.assign(BULK)
    delivered.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed.get((BULK, 0), (0, ""))[0] == 0


async def test_an_older_ownership_is_ignored() -> None:
    """Records fetched for an older generation are neither opened nor handed out."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, generation=GENERATION - 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.delivery.take(1, 100), 0.01)


async def test_realtime_goes_first_and_bulk_never_starves() -> None:
    """Real-time records overtake bulk ones, and bulk keeps one turn in eight."""
    bench = Bench()
    bench.assign(REALTIME, BULK)
    bench.deliver(BULK, *range(20))
    bench.deliver(REALTIME, *range(20))
    order = [(await bench.take(1))[0].lane for _ in range(16)]
    assert order.count("bulk") == 2
    assert order[0] == "realtime"


async def test_a_full_lane_is_paused_alone_and_resumes_at_half() -> None:
    """A lane above its budget is not fetched; the other one is; below half it is again."""
    bench = Bench(max_open_records=4)
    bench.assign(REALTIME, BULK)
    places = [(REALTIME, 0), (BULK, 0)]
    bench.deliver(BULK, *range(5))
    assert bench.delivery.fetchable(places) == {(REALTIME, 0)}
    batch = await bench.take(3)
    for delivered in batch[:2]:
        assert delivered.claim()
        delivered.finish("predicted")
    assert bench.delivery.fetchable(places) == {(REALTIME, 0)}
    assert batch[2].claim()
    batch[2].finish("predicted")
    assert bench.delivery.fetchable(places) == set(places)


async def test_bytes_pause_a_lane_too() -> None:
    """A lane's budget counts bytes, and finished records give theirs back although elders are open."""
    bench = Bench(max_open_bytes=100)
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1, 2, size=40)
    assert bench.delivery.fetchable([(BULK, 0)]) == set()
    for delivered in (await bench.take())[1:]:
        assert delivered.claim()
        delivered.finish("predicted")
    assert bench.delivery.fetchable([(BULK, 0)]) == {(BULK, 0)}


async def test_suspects_are_read_alone_with_the_attempt_written_first() -> None:
    """After a death without progress records start one at a time, each attempt committed before it starts."""
    bench = Bench()
    bench.assign(BULK, committed=0, metadata="assigned 0", end=2)
    bench.deliver(BULK, 0, 1, 2, 3)
    (first,) = await bench.take()
    assert first.record.offset == 0
    assert bench.broker.committed[BULK, 0] == (0, "careful 0 1 2")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.delivery.take(1, 100), 0.01)
    assert first.claim()
    first.finish("predicted")
    (second,) = await bench.take()
    assert second.claim()
    second.finish("predicted")
    rest = await bench.take()
    assert [delivered.record.offset for delivered in rest] == [2, 3]
    for delivered in rest:
        assert delivered.claim()
        delivered.finish("predicted")
    await bench.delivery.commit()
    assert bench.broker.committed[BULK, 0] == (4, "")


async def test_other_partitions_go_on_beside_suspects() -> None:
    """While one partition is read carefully, healthy records of others get their turns."""
    bench = Bench()
    bench.delivery.assigned(
        {(BULK, 0): Start(0, "assigned 0", 0, 9), (REALTIME, 0): Start(0, "", 0, 9)}, GENERATION
    )
    bench.deliver(BULK, 0, 1)
    bench.deliver(REALTIME, 0)
    seen = []
    for _ in range(3):
        (delivered,) = await asyncio.wait_for(bench.delivery.take(10, 1000), 5)
        seen.append((delivered.lane, delivered.record.offset))
        assert delivered.claim()
        delivered.finish("predicted")
    assert set(seen) == {("bulk", 0), ("bulk", 1), ("realtime", 0)}


async def test_what_is_finished_is_written_down_before_the_next_attempt() -> None:
    """A suspect that finished is never blamed for the death of its worker at a suspect of another partition."""
    bench = Bench()
    bench.assign(BULK, REALTIME, committed=0, metadata="assigned 0", end=1)
    for topic in (BULK, REALTIME):
        bench.deliver(topic, 0)
    (innocent,) = await bench.take()
    assert innocent.claim()
    innocent.finish("predicted")
    (guilty,) = await bench.take()
    assert guilty.claim()
    assert bench.broker.committed[innocent.record.topic, 0] == (1, "")
    assert bench.broker.committed[guilty.record.topic, 0] == (0, "careful 0 1 1")


async def test_a_condemned_record_is_rejected_unopened() -> None:
    """A record that was alone in flight at three deaths is dead-lettered, and the next ones go on."""
    bench = Bench()
    bench.assign(BULK, committed=0, metadata="careful 0 3 2", end=2)
    bench.deliver(BULK, 0, 1)
    (delivered,) = await bench.take()
    assert delivered.record.offset == 1
    assert bench.rejected == [(0, "process_killed")]


async def test_a_clean_hand_over_keeps_suspects_and_their_attempts() -> None:
    """A rebalance during a crash loop neither forgets earlier attempts nor counts as a death."""
    bench = Bench()
    bench.assign(BULK, committed=0, metadata="careful 0 2 9", end=9)
    bench.deliver(BULK, 0)
    await bench.take()
    await bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1)
    assert bench.broker.committed[BULK, 0] == (0, "careful 0 2 9")


async def test_a_clean_hand_over_without_progress_leaves_no_suspicion() -> None:
    """A partition handed over in good order where it began is not careful for its next owner."""
    bench = Bench()
    bench.assign(BULK, committed=5)
    await bench.delivery.mark_started({(BULK, 0): Start(5, "", 0, 9)})
    assert bench.broker.committed[BULK, 0] == (5, "assigned 5")
    await bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1)
    assert bench.broker.committed[BULK, 0] == (5, "")


@pytest.mark.parametrize("answer", ["refused", None])
async def test_a_commit_that_fails_is_sent_again(answer: CommitResult | None) -> None:
    """A commit that is refused or unanswered is repeated by the next one."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0)
    (delivered,) = await bench.take()
    assert delivered.claim()
    delivered.finish("predicted")
    bench.broker.answer = answer
    assert not await bench.delivery.commit()
    bench.broker.answer = "ok"
    assert await bench.delivery.commit()
    assert bench.broker.committed[BULK, 0] == (1, "")


async def test_put_back_keeps_the_record() -> None:
    """A record put back is handed out again and still blocks the commit."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1)
    first, _ = await bench.take()
    first.put_back()
    assert not first.claim()
    assert (await bench.take())[0] is first
    assert first.claim()


async def test_what_retention_took_is_counted_once() -> None:
    """Offsets passed over below the partition's beginning are counted; markers and compacted ones are not."""
    bench = Bench()

    def expired() -> float:
        return (
            REGISTRY.get_sample_value("millrace_offsets_expired_total", {"step": "test", "topic": BULK})
            or 0.0
        )

    before = expired()
    bench.delivery.assigned({(BULK, 0): Start(10, "", 15, 100)}, GENERATION)
    assert expired() == before + 5  # deleted while nobody read
    bench.deliver(BULK, 15, 16, 19)  # 17 and 18 are markers
    bench.deliver(BULK, 21)  # and 20 is one
    bench.delivery.observe_ends({(BULK, 0): Start(10, "", 15, 100)})
    assert expired() == before + 5
    bench.deliver(BULK, 40)
    bench.delivery.observe_ends({(BULK, 0): Start(10, "", 35, 100)})
    assert expired() == before + 5 + 35 - 22  # 22 to 34 are gone, 35 to 39 were something else
    bench.delivery.observe_ends({(BULK, 0): Start(10, "", 50, 100)})
    assert expired() == before + 5 + 35 - 22


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"step": "test", **labels}) or 0.0


async def test_lag_of_partitions_that_went_to_another_worker_is_not_counted() -> None:
    """A worker that owns nothing of a topic any more says 0, not what it saw last."""
    bench = Bench()
    bench.assign(REALTIME, BULK)
    starts = {(topic, 0): Start(None, "", 0, 100) for topic in (REALTIME, BULK)}
    bench.delivery.observe_ends(starts)
    assert [sample("millrace_lag_records", topic=topic) for topic in (REALTIME, BULK)] == [100, 100]
    await bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1.0)
    bench.delivery.observe_ends({(REALTIME, 0): starts[REALTIME, 0]})
    assert [sample("millrace_lag_records", topic=topic) for topic in (REALTIME, BULK)] == [100, 0]


async def test_the_age_of_what_is_finished_is_observed() -> None:
    """A record's age counts from its timestamp in Kafka; a publisher whose clock is ahead makes it 0."""
    bench = Bench()
    bench.assign(BULK)
    count, total = (sample(f"millrace_age_seconds_{kind}", lane="bulk") for kind in ("count", "sum"))
    now = time.time()
    for offset, timestamp in enumerate((now - 100, now + 100)):
        record = Record(topic=BULK, partition=0, offset=offset, timestamp_ms=int(timestamp * 1000))
        bench.delivery.fetched((BULK, 0), GENERATION, [record], offset + 1)
        bench.delivery.received((BULK, 0), GENERATION, offset)
    for delivered in await bench.take():
        assert delivered.claim()
        delivered.finish("predicted")
    assert sample("millrace_age_seconds_count", lane="bulk") == count + 2
    assert 100 <= sample("millrace_age_seconds_sum", lane="bulk") - total < 150


async def test_a_gap_is_looked_at_soon() -> None:
    """A gap wakes whoever asks Kafka where partitions begin, and a look ends the waiting."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0)
    waiting = asyncio.ensure_future(bench.delivery.wait_for_gap(20.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.deliver(BULK, 5)
    await asyncio.wait_for(waiting, 1)
    bench.delivery.observe_ends({})
    await bench.delivery.wait_for_gap(0.0)


@pytest.mark.parametrize("turns", [(0, 3, 2), (1, 4, 3), (3, 0, 2), (4, 1, 4)])
async def test_a_hand_over_ends_with_the_last_claimed_record(turns: tuple[int, ...]) -> None:
    """A hand-over never sleeps past the end of the last claimed record, in whatever turn of the loop that comes."""
    bench = Bench()
    bench.assign(BULK, REALTIME)
    bench.deliver(BULK, 0, 1, 2)
    batch = await bench.take()
    assert all(delivered.claim() for delivered in batch)
    taking = asyncio.create_task(bench.delivery.take(1, 100))
    await asyncio.sleep(0)
    handing_over = asyncio.create_task(bench.delivery.hand_over([(BULK, 0)], deadline_seconds=5))

    async def finish(delivered: Delivered, turn: int) -> None:
        for _ in range(turn):
            await asyncio.sleep(0)
        delivered.finish("predicted")

    await asyncio.gather(*(finish(delivered, turn) for delivered, turn in zip(batch, turns, strict=True)))
    await asyncio.wait_for(handing_over, 0.2)
    taking.cancel()


async def test_a_suspect_that_is_put_back_has_not_died() -> None:
    """A suspect that its step puts back again and again counts as one attempt, and is never condemned."""
    bench = Bench()
    bench.assign(BULK, committed=0, metadata="assigned 0", end=1)
    bench.deliver(BULK, 0)
    for _ in range(5):
        (delivered,) = await bench.take()
        delivered.put_back()
    assert bench.rejected == []
    assert bench.broker.committed[BULK, 0] == (0, "careful 0 1 1")


async def test_no_attempt_is_written_down_after_a_hand_over() -> None:
    """A hand-over that begins while an attempt is being prepared leaves the count of attempts as it was."""
    bench = Bench()
    bench.delivery.assigned(
        {(REALTIME, 0): Start(0, "", 0, 9), (BULK, 0): Start(0, "careful 0 1 9", 0, 9)}, GENERATION
    )
    bench.deliver(REALTIME, 0)
    (healthy,) = await bench.take()
    assert healthy.claim()
    healthy.finish("predicted")
    bench.broker.answers.clear()  # the commit that precedes the attempt gets no answer yet
    bench.deliver(BULK, 0)
    taking = asyncio.create_task(bench.delivery.take(1, 100))
    await asyncio.sleep(0)
    handing_over = asyncio.create_task(bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1))
    await asyncio.sleep(0)
    bench.broker.answers.set()
    await asyncio.wait_for(handing_over, 1)
    await asyncio.sleep(0.01)
    assert bench.broker.committed.get((BULK, 0), (0, "careful 0 1 9")) == (0, "careful 0 1 9")
    taking.cancel()


async def test_what_is_assigned_while_stopping_is_not_owned() -> None:
    """A rebalance that ends after SIGTERM marks nothing, opens nothing and commits nothing."""
    bench = Bench()
    await bench.delivery.stop(deadline_seconds=1)
    bench.assign(BULK, committed=5)
    await bench.delivery.mark_started({(BULK, 0): Start(5, "", 0, 9)})
    bench.deliver(BULK, 5)
    await bench.delivery.commit()
    assert bench.broker.committed == {}


async def test_a_fresh_partition_handed_over_at_once_leaves_no_suspicion() -> None:
    """A partition without a commit that is handed over before its first fetch is not careful for the next owner."""
    bench = Bench()
    bench.assign(BULK)
    await bench.delivery.mark_started({(BULK, 0): Start(None, "", 0, 9)})
    assert bench.broker.committed[BULK, 0] == (0, "assigned 0")
    await bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1)
    assert bench.broker.committed[BULK, 0] == (0, "")


async def test_a_rejection_that_fails_ends_the_step() -> None:
    """A condemned record that cannot be rejected ends the step: alone in flight, it would block all others."""

    class Broken(Bench):
        async def _reject(self, delivered: Delivered, error: MillraceError) -> None:
            raise RuntimeError("no")

    bench = Broken()
    bench.assign(BULK, committed=0, metadata="careful 0 3 1", end=1)
    bench.deliver(BULK, 0)
    with pytest.raises(FatalError, match="RuntimeError"):
        await bench.take()


async def test_healthy_records_go_on_while_suspects_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record in flight that takes for ever keeps suspects waiting, not the healthy records beside it."""
    monkeypatch.setattr(inbox, "CAREFUL_TURN_SECONDS", 0.02)
    bench = Bench()
    bench.delivery.assigned(
        {(BULK, 0): Start(0, "assigned 0", 0, 9), (REALTIME, 0): Start(0, "", 0, 9)}, GENERATION
    )
    bench.deliver(REALTIME, 0)
    (endless,) = await bench.take()
    assert endless.lane == "realtime"
    bench.deliver(BULK, 0)
    bench.deliver(REALTIME, 1, 2)
    assert [delivered.record.offset for delivered in await bench.take()] == [1, 2]


async def test_an_assignment_replaces_what_was_not_revoked() -> None:
    """A partition assigned again without a revocation does not keep its lane's budget or its old records."""
    bench = Bench(max_open_records=4)
    bench.assign(BULK)
    bench.deliver(BULK, *range(5))
    assert bench.delivery.fetchable([(BULK, 0)]) == set()
    bench.assign(BULK)
    assert bench.delivery.fetchable([(BULK, 0)]) == {(BULK, 0)}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.delivery.take(1, 100), 0.01)


async def test_a_log_that_begins_again_is_not_taken_for_repeats() -> None:
    """Offsets that come again stand for other records: the worker must ask Kafka anew where to begin."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1, 2)
    with pytest.raises(FatalError, match=r"images\.bulk\.v1:0 goes on at offset 0 after 3"):
        bench.deliver(BULK, 0)


async def test_held_records_leave_room_and_commit_nothing() -> None:
    """Records that are held do not pause their lane, keep no value, and are not committed past."""
    bench = Bench(max_open_records=4)
    bench.assign(BULK)
    bench.deliver(BULK, *range(6), size=10)
    assert bench.delivery.fetchable([(BULK, 0)]) == set()
    batch = await bench.take()
    for delivered in batch:
        delivered.buffer()
    assert bench.delivery.fetchable([(BULK, 0)]) == {(BULK, 0)}
    assert {delivered.record.value for delivered in batch} == {None}
    assert batch[1].claim()
    batch[1].finish("watched")
    await bench.delivery.commit()
    assert bench.broker.committed.get((BULK, 0), (0, ""))[0] == 0
    assert batch[0].claim()
    batch[0].finish("watched")
    await bench.delivery.commit()
    assert bench.broker.committed[BULK, 0][0] == 2
    await bench.delivery.hand_over([(BULK, 0)], deadline_seconds=1)
    assert all(delivered.is_forgotten for delivered in batch[2:])
    bench.assign(BULK, committed=2)
    bench.deliver(BULK, 2, 3, 4, 5, size=10)
    assert len(await bench.take()) == 4  # the budget is as it was: all of it is free


async def test_a_hand_over_waits_for_work_on_held_records_and_then_takes_them_back() -> None:
    """A released record is unfinished; one released after a hand-over began is given back to Kafka."""
    bench = Bench()
    bench.assign(BULK)
    bench.deliver(BULK, 0, 1)
    first, second = await bench.take()
    first.buffer()
    second.buffer()
    assert first.claim()
    first.release()
    assert first.claim()
    handing_over = asyncio.create_task(bench.delivery.hand_over([(BULK, 0)], deadline_seconds=5))
    await asyncio.sleep(0)
    assert second.is_forgotten
    assert not handing_over.done()
    first.release()
    await asyncio.wait_for(handing_over, 1)
    assert first.is_forgotten
    assert not first.claim()
    assert bench.broker.committed.get((BULK, 0), (0, ""))[0] == 0


async def test_suspects_that_are_held_let_the_next_one_begin() -> None:
    """Careful mode goes on to the next record when one is held, and never commits past it."""
    bench = Bench()
    bench.assign(BULK, committed=0, metadata="assigned 0", end=3)
    bench.deliver(BULK, 0, 1, 2, 3)
    for offset in range(3):
        (delivered,) = await bench.take()
        assert delivered.record.offset == offset
        committed, metadata = bench.broker.committed[BULK, 0]
        assert (committed, metadata.split()[:3]) == (0, ["alone" if offset else "careful", str(offset), "1"])
        delivered.buffer()
    (delivered,) = await bench.take()
    assert delivered.record.offset == 3


async def test_a_killer_behind_records_that_are_held_is_found() -> None:
    """Of many records that are held without a commit the one that kills is condemned, and none beside it."""
    killer, broker = 100, Broker()
    for _ in range(10):
        bench = Bench()
        bench.delivery = Delivery(
            step="test", committer=broker, reject=bench._reject, max_open_records=1000, max_open_bytes=10_000
        )
        committed, metadata = broker.committed.get((BULK, 0), (0, ""))
        bench.assign(BULK, committed=committed, metadata=metadata, end=130)
        await bench.delivery.mark_started({(BULK, 0): Start(committed, metadata, 0, 130)})
        bench.deliver(BULK, *range(130))
        opened: set[int] = set()
        while len(opened) < 130 - len(bench.rejected):
            batch = await bench.take(20)
            opened |= {delivered.record.offset for delivered in batch}
            if killer in opened:
                break
            for delivered in batch:
                delivered.buffer()
        if killer not in opened:
            break
    assert killer not in opened
    assert bench.rejected == [(killer, "process_killed")]
