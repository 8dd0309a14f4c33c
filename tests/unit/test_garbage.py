"""What is loaded is left out of collections, until models are replaced."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from pipeline import garbage


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Leave nothing apart for other tests."""
    yield
    gc.enable()
    gc.unfreeze()


async def test_what_is_loaded_is_not_looked_at_until_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection passes over what was set apart; after a replacement it goes, once it is quiet."""
    monkeypatch.setattr(garbage, "LOOK_SECONDS", 0.001)
    loaded = Ring()
    seen = weakref.ref(loaded)
    garbage.set_apart()
    assert gc.get_freeze_count() > 10_000
    del loaded
    gc.collect()
    assert seen() is not None, "looked at"
    answers = [0.0, garbage.QUIET_SECONDS / 2, garbage.QUIET_SECONDS]
    await garbage.set_apart_again(lambda: answers.pop(0))
    assert not answers
    assert seen() is None
    assert gc.get_freeze_count() > 10_000


async def test_who_is_never_idle_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was replaced under a load that never ends does not stay for ever."""
    monkeypatch.setattr(garbage, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(garbage, "MAX_WAIT_SECONDS", 0.01)
    loaded = Ring()
    seen = weakref.ref(loaded)
    garbage.set_apart()
    del loaded
    await garbage.set_apart_again(lambda: 0.0)
    assert seen() is None


def test_nothing_is_collected_while_a_step_is_imported() -> None:
    """What was made meanwhile is left alone for good; what comes after it is collected as ever."""
    garbage.pause()
    assert not gc.isenabled()
    loaded = Ring()
    seen = weakref.ref(loaded)
    garbage.resume()
    assert gc.isenabled()
    del loaded
    later = Ring()
    seen_later = weakref.ref(later)
    del later
    gc.collect()
    assert seen() is not None
    assert seen_later() is None


def test_garbage_that_is_there_goes() -> None:
    """What nobody needs when the rest is set apart is collected first."""
    loaded = Ring()
    seen = weakref.ref(loaded)
    del loaded
    garbage.set_apart()
    assert seen() is None
