"""Pictures behind datarefs: waited for patiently, judged fairly, in nobody's way."""

import pytest

from pipeline.errors import DependencyError, ImageTooLargeError, MissingImageError
from pipeline.inference import Dropped, EngineOptions, Predicted, fetching
from tests.support.engines import GOOD, Store, error_of, predicted, running
from tests.support.eventually import eventually


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_RETRY_SECONDS", 0.002)
    monkeypatch.setattr(fetching, "MAX_RETRY_SECONDS", 0.005)


async def test_pictures_behind_datarefs_are_fetched() -> None:
    """A fetched picture is predicted; a store that fails or an object that comes late is waited for."""
    down = DependencyError("the object store does not answer")
    store = Store(
        there=[GOOD],
        late=[MissingImageError("no such object"), MissingImageError("no such object"), GOOD],
        flaky=[down, down, OSError("connection reset"), down, GOOD],
    )
    async with running(fetch=store.fetch) as bench:
        names = [bench.submit(dataref=name) for name in ("there", "late", "flaky")]
        outcomes = await bench.finished()
    assert [predicted(outcomes[name]).receipt.input_bytes for name in names] == [len(GOOD)] * 3
    assert [store.asked.count(name) for name in ("there", "late", "flaky")] == [1, 3, 5]


async def test_objects_that_are_wrong_fail_their_record() -> None:
    """Missing beyond the grace, of another digest, or too large: the record's own fault."""
    store = Store(
        gone=[MissingImageError("images/gone does not exist")],
        other=[GOOD],
        large=[ImageTooLargeError("the object has 99,999,999 bytes")],
    )
    async with running(fetch=store.fetch) as bench:
        gone, large = bench.submit(dataref="gone"), bench.submit(dataref="large")
        other = bench.submit(dataref="other", sha256="0" * 64)
        outcomes = await bench.finished()
    assert str(error_of(outcomes[gone])) == "images/gone does not exist"
    assert type(error_of(outcomes[large])) is ImageTooLargeError
    assert type(error_of(outcomes[other])) is MissingImageError
    assert 2 <= store.asked.count("gone") < 40


async def test_missing_objects_do_not_keep_present_ones_waiting() -> None:
    """Many records that wait for objects hold no slot of those whose objects are there."""
    store = Store(gone=[MissingImageError("gone")], there=[GOOD])
    options = EngineOptions(max_batch_size=8, decode_threads=1, missing_object_grace_seconds=60)
    async with running(fetch=store.fetch, options=options) as bench:
        for _ in range(5 * fetching.SLOTS_PER_LANE):
            bench.submit(dataref="gone")
        present = [bench.submit(dataref="there") for _ in range(5 * fetching.SLOTS_PER_LANE)]
        inline = bench.submit()
        outcomes = await bench.finished(len(present) + 1)
        assert all(isinstance(outcomes[name], Predicted) for name in [*present, inline])


async def test_a_forgotten_record_is_not_fetched_for_ever() -> None:
    """A record given back to Kafka while the store is down is dropped at its next attempt."""
    store = Store(down=[DependencyError("down")])
    forgotten = False
    async with running(fetch=store.fetch) as bench:
        name = bench.submit(dataref="down", is_forgotten=lambda: forgotten)
        await eventually(lambda: len(store.asked) >= 3, 5)
        forgotten = True
        outcomes = await bench.finished()
    assert outcomes[name] == Dropped()
    assert bench.claims == []
