"""Batches are cut within their limits, lose nothing and keep each lane's order, whatever arrives when."""

import itertools
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.batching import BULK_EVERY, GROW_AFTER_BATCHES, Batcher, Cut, Turns
from pipeline.topics import Lane


class Arrival(NamedTuple):
    number: int
    lane: Lane
    deadline: float | None


lanes: st.SearchStrategy[Lane] = st.sampled_from(["realtime", "bulk"])
arrivals = st.tuples(st.just("arrive"), lanes, st.none() | st.floats(0, 30))
moves = st.lists(
    arrivals | st.just(("cut",)) | st.tuples(st.just("wait"), st.floats(0, 5)) | st.just(("no memory",)),
    max_size=60,
)
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
@given(moves, st.integers(1, 9))
def test_any_order_of_arrivals_is_cut_within_the_law(script: list[tuple[object, ...]], limit: int) -> None:
    """Nothing is lost or taken twice, no batch is too large or of two lanes, none holds an expired record."""
    batcher: Batcher[Arrival] = Batcher(limit)
    added: list[Arrival] = []
    taken: list[Arrival] = []
    expired: list[Arrival] = []
    now = 0.0

    def check(cut: Cut[Arrival]) -> None:
        assert len(cut.items) <= batcher.limit <= limit
        assert len({item.lane for item in cut.items}) <= 1
        assert all(item.deadline is None or item.deadline > now for item in cut.items)
        assert all(item.deadline is not None and item.deadline <= now for item in cut.expired)
        assert cut.items or not len(batcher)  # a free device is never left idle beside ready work
        assert (cut.reason in ("full", "memory")) == (len(cut.items) == batcher.limit)
        taken.extend(cut.items)
        expired.extend(cut.expired)

    for move in script:
        if move[0] == "arrive":
            _, lane, deadline = move
            arrival = Arrival(len(added), lane, deadline)  # type: ignore[arg-type]
            added.append(arrival)
            batcher.add(arrival, arrival.lane, arrival.deadline)
        elif move[0] == "cut":
            check(batcher.cut(now))
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
