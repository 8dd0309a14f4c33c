"""Careful mode's memory: what the commit metadata of a partition says after deaths."""

from hypothesis import given
from hypothesis import strategies as st

from agents.careful import MAX_LONE_DEATHS, MAX_SUSPECTS, Mark


def test_good_order_suspects_nothing() -> None:
    """A partition handed over in good order is read normally."""
    mark = Mark.read("", 10, 500)
    assert not mark.suspects(10)
    assert mark.at_start(10) == "assigned 10"
    assert mark.at_commit(11) == ""


def test_progress_clears_the_suspicion() -> None:
    """An owner that committed past its start before it died leaves no suspects."""
    assert not Mark.read("assigned 10", 11, 500).suspects(11)


def test_a_death_without_progress_makes_suspects() -> None:
    """A partition whose owner died where it began is read one record at a time, within a bound."""
    mark = Mark.read("assigned 10", 10, 5000)
    assert mark.suspects(10)
    assert mark.suspects(10 + MAX_SUSPECTS - 1)
    assert not mark.suspects(10 + MAX_SUSPECTS)


def test_records_that_came_later_are_no_suspects() -> None:
    """A record that was not there at the death is read normally."""
    assert not Mark.read("assigned 10", 10, 12).suspects(12)
    assert not Mark.read("assigned 10", 10, 10).suspects(10)


def test_the_third_lone_death_condemns() -> None:
    """Each attempt is counted in the metadata before it starts; after three deaths alone it is not opened."""
    metadata, committed = "assigned 10", 10
    for _ in range(MAX_LONE_DEATHS):
        mark = Mark.read(metadata, committed, 100)
        assert not mark.is_condemned(10)
        metadata = mark.attempt(10).at_commit(10)
    assert Mark.read(metadata, committed, 100).is_condemned(10)


def test_attempts_belong_to_one_record() -> None:
    """The next suspect starts with no attempts, and suspects that are left stay suspects."""
    mark = Mark.read("careful 10 2 50", 10, 100).attempt(10)
    after = Mark.read(mark.at_commit(11), 11, 100)
    assert after.suspects(11)
    assert not after.is_condemned(11)
    assert after.attempt(11).at_commit(11) == "careful 11 1 50"


def test_a_hand_over_in_good_order_is_no_death() -> None:
    """An attempt that was handed over before it finished does not count."""
    mark = Mark.read("careful 10 1 50", 10, 100)
    assert mark.attempt(10).survived().at_commit(10) == "careful 10 1 50"


@given(metadata=st.text(max_size=60), committed=st.none() | st.integers(0, 10), end=st.integers(0, 100))
def test_any_metadata_is_read(metadata: str, committed: int | None, end: int) -> None:
    """Whatever another client wrote into the metadata, reading it never fails."""
    Mark.read(metadata, committed, end)


def test_a_suspect_behind_records_that_are_held() -> None:
    """While elder records are held their offset is committed, and the suspect is remembered beside it."""
    metadata = Mark.read("assigned 10", 10, 100).attempt(14).at_commit(10)
    assert metadata == "alone 14 1 74 10"
    mark = Mark.read(metadata, 10, 100)
    assert not mark.suspects(10)
    assert mark.suspects(14)
    assert mark.attempt(14).attempts == 2
    assert Mark.read(metadata, 11, 100) == Mark()


def test_after_suspects_that_are_held_the_next_ones_are_suspected() -> None:
    """What follows suspects that are all held is not suspected now, but after the next death."""
    mark = Mark.read("alone 73 1 74 10", 10, 500).beyond()
    assert not any(mark.suspects(offset) for offset in range(300))
    assert mark.at_commit(10) == "alone 74 0 138 10"
    assert mark.at_commit(74) == ""
    after = Mark.read(mark.at_commit(10), 10, 500)
    assert [offset for offset in range(300) if after.suspects(offset)] == list(range(74, 138))
    assert after.attempt(74).attempts == 1
