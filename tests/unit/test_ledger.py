"""The ledger's law: nothing unfinished is ever passed."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger import PartitionLedger

_gaps = st.lists(st.integers(min_value=1, max_value=4), min_size=1, max_size=40)


@given(gaps=_gaps, data=st.data())
def test_never_passes_an_open_record(gaps: list[int], data: st.DataObject) -> None:
    """Whatever the gaps and the order of finishing, the committable offset stays at the eldest open record."""
    ledger = PartitionLedger()
    offsets = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    for offset in offsets:
        assert ledger.open(offset, 10)
    ledger.advance(offsets[-1] + 3)
    open_offsets = set(offsets)
    previous = ledger.committable
    for offset in data.draw(st.permutations(offsets)):
        assert min(open_offsets) == ledger.committable
        assert ledger.finish(offset)
        open_offsets.discard(offset)
        assert ledger.open_records == len(open_offsets)
        assert ledger.open_bytes == 10 * len(open_offsets)
        assert ledger.committable is not None
        assert previous is not None
        assert ledger.committable >= previous
        previous = ledger.committable
    assert ledger.committable == offsets[-1] + 3
    assert ledger.waiting_records == 0


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["open", "finish", "advance"]), st.integers(0, 60)), max_size=200
    )
)
def test_holds_for_any_interleaving(steps: list[tuple[str, int]]) -> None:
    """Opening, finishing and advancing in any interleaving never releases an unfinished record."""
    ledger = PartitionLedger()
    opened: set[int] = set()
    finished: set[int] = set()
    for verb, number in steps:
        if verb == "open":
            accepted = ledger.open(number, 1)
            assert accepted == (not opened or number > max(opened))
            if accepted:
                opened.add(number)
        elif verb == "finish":
            assert ledger.finish(number) == (number in opened - finished)
            if number in opened:
                finished.add(number)
        else:
            # The caller advances only to positions whose records were all opened.
            ledger.advance(max(opened, default=-1) + 1 + number % 3)
        unfinished = opened - finished
        if unfinished and ledger.committable is not None:
            assert ledger.committable <= min(unfinished)


def test_commits_the_position_when_nothing_is_open() -> None:
    """Transaction markers after the last record leave no lag of one."""
    ledger = PartitionLedger()
    ledger.advance(7)
    assert ledger.committable == 7
    ledger.open(7, 1)
    assert ledger.committable == 7
    ledger.finish(7)
    ledger.advance(9)
    assert ledger.committable == 9


def test_refuses_a_record_delivered_twice() -> None:
    """A record fetched again within one ownership is not opened again."""
    ledger = PartitionLedger()
    assert ledger.open(3, 1)
    assert not ledger.open(3, 1)
    assert not ledger.open(2, 1)


def test_an_unfinished_position_is_not_trusted() -> None:
    """A position at or before an opened record says nothing about that record."""
    ledger = PartitionLedger()
    ledger.open(5, 1)
    ledger.advance(5)
    ledger.finish(5)
    assert ledger.committable == 6
