"""Batches are cut within their limits, lose nothing and keep each lane's order, whatever arrives when."""

import itertools
import math
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.batching import (
    BULK_EVERY,
    GROW_AFTER_BATCHES,
    REALTIME_COMES_SECONDS,
    SHORT_COSTS,
    TRY_EVERY,
    Batcher,
    Coming,
    Cut,
    Turns,
)
from pipeline.cost_model import CostModel
from pipeline.topics import Lane


class Arrival(NamedTuple):
    number: int
    lane: Lane
    deadline: float | None


lanes: st.SearchStrategy[Lane] = st.sampled_from(["realtime", "bulk"])
arrivals = st.tuples(st.just("arrive"), lanes, st.none() | st.floats(0, 30))
moves = st.lists(
    arrivals
    | st.tuples(st.just("cut"), st.integers(0, 9))
    | st.tuples(st.just("wait"), st.floats(0, 5))
    | st.just(("no memory",)),
    max_size=60,
)
costs = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 2)), max_size=5)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def filled(realtime: int, bulk: int, limit: int = 4) -> Batcher[Arrival]:
    """Return a batcher with records waiting in both lanes."""
    batcher: Batcher[Arrival] = Batcher(limit)
    for number in range(max(realtime, bulk)):
        if number < realtime:
            batcher.add(Arrival(number, "realtime", None), "realtime")
        if number < bulk:
            batcher.add(Arrival(number, "bulk", None), "bulk")
    return batcher


@relaxed
@given(moves, st.integers(1, 9), costs)
def test_any_order_of_arrivals_is_cut_within_the_law(
    script: list[tuple[object, ...]], limit: int, passes: list[tuple[int, float]]
) -> None:
    """Nothing is lost or taken twice, no batch is too large or of two lanes, none holds an expired record."""
    batcher: Batcher[Arrival] = Batcher(limit, 9 * limit - 4, learned(*passes))
    added: list[Arrival] = []
    taken: list[Arrival] = []
    expired: list[Arrival] = []
    now = 0.0

    def check(cut: Cut[Arrival]) -> None:
        one = batcher.costs.seconds(1)
        assert len(cut.items) <= batcher.limit <= limit
        assert len({item.lane for item in cut.items}) <= 1
        assert all(item.deadline is None or item.deadline > now for item in cut.items)
        assert all(item.deadline is not None and item.deadline <= now + one for item in cut.expired)
        # A free device is left idle beside ready work only for a moment that is still to come.
        assert cut.items or not len(batcher) or (cut.wait_until is not None and cut.wait_until > now)
        assert cut.reason in ("full", "memory") or len(cut.items) < batcher.limit
        assert len(cut.items) <= 1 or 10 * len(cut.items) <= 9 * limit - 4
        taken.extend(cut.items)
        expired.extend(cut.expired)

    for move in script:
        if move[0] == "arrive":
            _, lane, deadline = move
            arrival = Arrival(len(added), lane, deadline)  # type: ignore[arg-type]
            added.append(arrival)
            batcher.add(arrival, arrival.lane, arrival.deadline, 10)
        elif move[0] == "cut":
            decoding = int(str(move[1]))
            check(batcher.cut(now, Coming({"realtime": decoding, "bulk": decoding}, 0.01)))
        elif move[0] == "no memory":
            batcher.ran_out_of_memory(batcher.limit)
        else:
            now += float(str(move[1]))
    while len(batcher):
        check(batcher.cut(now))
    assert sorted(taken + expired) == sorted(added)
    for lane in ("realtime", "bulk"):
        in_order = [item.number for item in taken if item.lane == lane]
        assert in_order == sorted(in_order)


@relaxed
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200))
def test_bulk_keeps_its_floor_and_realtime_the_rest(waiting: list[tuple[bool, bool]]) -> None:
    """Of any `BULK_EVERY` turns in which both wait, exactly the last is bulk's; alone, a lane has every turn."""
    turns = Turns()
    passed_over = 0
    for realtime, bulk in waiting:
        lane = turns.next(realtime=realtime, bulk=bulk)
        if not (realtime and bulk):
            assert lane == ("realtime" if realtime else "bulk" if bulk else None)
            passed_over = passed_over if lane is None else 0
        elif lane == "bulk":
            assert passed_over == BULK_EVERY - 1
            passed_over = 0
        else:
            passed_over += 1
            assert passed_over < BULK_EVERY


def test_a_lone_record_does_not_wait_for_company() -> None:
    """Under light load a record rides at once, alone."""
    cut = filled(realtime=1, bulk=0).cut(now=0.0)
    assert (len(cut.items), cut.reason) == (1, "idle")


def learned(*passes: tuple[int, float]) -> CostModel:
    model = CostModel()
    for records, seconds in passes:
        model.observe(records, seconds)
    return model


@pytest.mark.parametrize(
    ("pass_seconds", "records"),
    [(0.0, 32), (0.0001, 8), (0.010, 16), (0.020, 24), (0.040, 24), (1.0, 32)],
)
def test_bulk_is_kept_short_while_realtime_comes(pass_seconds: float, records: int) -> None:
    """As short as costs a record a tenth more, in quarters of a full batch; after ten seconds full."""
    costs = (
        learned((32, 0.1))
        if not pass_seconds
        else learned((1, pass_seconds + 0.005), (33, pass_seconds + 0.165))
    )
    batcher: Batcher[int] = Batcher(32, costs=costs)
    for number in range(100):
        batcher.add(number, "bulk")
    assert len(batcher.cut(0.0).items) == 32
    batcher.add(100, "realtime")
    assert batcher.cut(1.0).items == [100]
    short = batcher.cut(2.0)
    assert (len(short.items), short.reason) == (records, "full" if records == 32 else "realtime")
    later = batcher.cut(1.0 + REALTIME_COMES_SECONDS)
    assert (len(later.items), later.reason) == (32, "full")
    assert costs.seconds(records) / records <= SHORT_COSTS * costs.seconds(32) / 32
    if pass_seconds and records > 8:
        assert costs.seconds(records - 8) / (records - 8) > SHORT_COSTS * costs.seconds(32) / 32


def test_realtime_batches_are_not_kept_short() -> None:
    """Real-time records ride together as far as the limits let them."""
    batcher = filled(realtime=8, bulk=8, limit=8)
    batcher.costs = learned((1, 0.015), (8, 0.050))
    cut = batcher.cut(0.0)
    assert (len(cut.items), cut.reason) == (8, "full")


def test_a_batch_waits_while_what_is_decoded_will_fill_it() -> None:
    """With a full batch's records here, the device waits for them, no longer than that batch will take."""
    batcher = filled(realtime=0, bulk=3, limit=8)
    batcher.costs.observe(8, 0.8)
    cut = batcher.cut(10.0, Coming({"bulk": 5}, 0.01))
    assert (cut.items, cut.wait_until) == ([], 10.8)
    assert batcher.cut(10.5, Coming({"bulk": 5}, 0.01)).wait_until == 10.8
    late = batcher.cut(10.8, Coming({"bulk": 5}, 0.01))
    assert (len(late.items), late.reason) == (3, "deadline")


def test_too_few_to_fill_a_batch_do_not_wait() -> None:
    """Records whose company would not fill the batch go at once, as long as a pass costs little in itself."""
    batcher = filled(realtime=0, bulk=3, limit=8)
    batcher.costs.observe(8, 0.8)
    cut = batcher.cut(10.0, Coming({"bulk": 4}, 0.01))
    assert (len(cut.items), cut.reason) == (3, "idle")


def test_a_costly_pass_is_shared_with_the_next_record() -> None:
    """A record waits for the next one when a pass of its own would cost more than the wait."""
    for pass_seconds, waits in ((0.040, True), (0.020, False)):
        batcher = filled(realtime=1, bulk=0, limit=8)
        for records in (1, 8):
            batcher.costs.observe(records, pass_seconds + 0.005 * records)
        cut = batcher.cut(10.0, Coming({"realtime": 1}, 0.010))
        assert (cut.wait_until is not None) == waits


def test_stopping_waits_for_nobody() -> None:
    """A worker that stops sends what is ready."""
    batcher = filled(realtime=0, bulk=3, limit=8)
    cut = batcher.cut(10.0, Coming({"bulk": 5}, 0.01), draining=True)
    assert (len(cut.items), cut.reason) == (3, "drain")


def test_a_deadline_makes_a_batch_smaller_and_the_wait_shorter() -> None:
    """As many ride as can be done by the nearest deadline, and nobody waits past the moment it needs."""
    batcher: Batcher[int] = Batcher(32, costs=learned((1, 0.2), (11, 1.2)))  # 0.1 s a pass, 0.1 s a record
    for number in range(20):
        batcher.add(number, "bulk", 10.55 if number == 2 else None)
    cut = batcher.cut(10.0)
    assert (cut.items, cut.reason) == ([0, 1, 2, 3], "deadline")
    batcher = Batcher(8, costs=learned((8, 0.8)))
    batcher.add(0, "bulk", 10.5)
    wait_until = batcher.cut(10.0, Coming({"bulk": 7}, 0.01)).wait_until
    assert wait_until is not None
    assert math.isclose(wait_until, 10.5 - 0.2)


def test_what_cannot_be_ready_in_time_costs_nothing() -> None:
    """A record that would be late even alone is handed back, but a belief about costs is put to the test."""
    batcher: Batcher[int] = Batcher(4, costs=learned((1, 1.0)))
    for number in range(2 * TRY_EVERY):
        batcher.add(number, "realtime", 10.5)
    cut = batcher.cut(10.0)
    assert len(cut.expired) == 2 * TRY_EVERY - 2
    assert cut.items == [TRY_EVERY - 1]


def test_bytes_limit_a_batch_too() -> None:
    """Large pictures make small batches; one alone always rides."""
    batcher: Batcher[int] = Batcher(8, 100)
    for number, size_bytes in enumerate((40, 50, 20, 300, 10)):
        batcher.add(number, "bulk", None, size_bytes)
    cuts = [batcher.cut(0.0) for _ in range(4)]
    assert [cut.items for cut in cuts] == [[0, 1], [2], [3], [4]]
    assert [cut.reason for cut in cuts] == ["memory", "memory", "memory", "idle"]


@relaxed
@given(st.floats(0, 0.1), st.floats(0.0001, 0.1), st.integers(0, 1000))
def test_costs_are_learned_through_disturbances(each: float, record: float, seed: int) -> None:
    """Every seventh pass taking ten times as long does not bend the line."""
    model, random = CostModel(), Random(seed)
    for number in range(300):
        records = 2 ** random.randrange(6)
        model.observe(records, (each + record * records) * (10 if number % 7 == 0 else 1))
    assert model.record_seconds == pytest.approx(record, rel=0.5)
    assert model.seconds(32) == pytest.approx(each + 32 * record, rel=0.5)


def test_costs_follow_a_device_that_slows_down() -> None:
    """After a few passes of each size the old ones are forgotten."""
    model = CostModel()
    for pace in (1.0, 2.0):
        for _ in range(20):
            for records in (1, 8, 32):
                model.observe(records, pace * (0.01 + 0.002 * records))
    assert model.pass_seconds == pytest.approx(0.02)
    assert model.record_seconds == pytest.approx(0.004)


def test_one_size_says_nothing_about_passes() -> None:
    """While only one size was seen, all its time is the records': nobody waits because of it."""
    model = learned((4, 0.4), (4, 0.4))
    assert (model.pass_seconds, model.record_seconds) == (0.0, 0.1)
    assert CostModel().seconds(7) == 0.0


def test_realtime_is_not_padded_with_bulk() -> None:
    """A real-time batch with room left stays small, because bulk would make it slower."""
    cut = filled(realtime=2, bulk=50, limit=32).cut(now=0.0)
    assert [item.lane for item in cut.items] == ["realtime", "realtime"]


def test_a_flood_of_realtime_leaves_bulk_its_share() -> None:
    """With both lanes always full, bulk has one batch in `BULK_EVERY`."""
    batcher = filled(realtime=400, bulk=400)
    served = [batcher.cut(now=0.0).items[0].lane for _ in range(8 * BULK_EVERY)]
    assert served.count("bulk") == 8


def test_an_expired_record_costs_no_turn() -> None:
    """Bulk's turn is not spent on a batch that turns out empty."""
    batcher = filled(realtime=100, bulk=0)
    batcher.add(Arrival(0, "bulk", 1.0), "bulk", 1.0)
    cuts = [batcher.cut(now=2.0) for _ in range(BULK_EVERY + 1)]
    assert [len(cut.items) for cut in cuts] == [4] * (BULK_EVERY + 1)
    assert [item.lane for item in cuts[0].expired] == ["bulk"]


def test_every_cut_says_why() -> None:
    """Full, idle, drain and memory are told apart."""
    batcher = filled(realtime=0, bulk=12, limit=8)
    assert batcher.cut(now=0.0).reason == "full"
    assert batcher.cut(now=0.0, draining=True).reason == "drain"
    batcher = filled(realtime=0, bulk=7, limit=8)
    batcher.ran_out_of_memory(8)
    assert [batcher.cut(now=0.0).reason for _ in range(2)] == ["memory", "idle"]


def test_memory_halves_the_limit_and_it_grows_back() -> None:
    """Running out of memory halves, only batches that fill the lowered limit raise it, never above the first."""
    batcher: Batcher[Arrival] = Batcher(32)
    batcher.ran_out_of_memory(32)
    assert batcher.limit == 16
    batcher.ran_out_of_memory(9)
    assert batcher.limit == 4
    for _ in range(10 * GROW_AFTER_BATCHES):
        batcher.fitted(1)
    assert batcher.limit == 4
    limits = []
    for _ in range(20 * GROW_AFTER_BATCHES):
        batcher.fitted(batcher.limit)
        limits.append(batcher.limit)
    assert [limit for limit, _ in itertools.groupby(limits)] == [4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 32]


def test_the_limit_never_falls_below_one() -> None:
    """However little memory there is, a record alone is tried."""
    batcher: Batcher[Arrival] = Batcher(2)
    for size in (2, 1, 1):
        batcher.ran_out_of_memory(size)
    assert batcher.limit == 1
