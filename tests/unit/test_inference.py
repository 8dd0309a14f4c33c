"""The engine gives each record exactly one outcome, in good time and order."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest import images
from pipeline.batching import Coming
from pipeline.errors import DependencyError, MissingImageError
from pipeline.imaging import Limits, View
from pipeline.inference import Dropped, Engine, EngineOptions, Predicted
from pipeline.models import load_models
from pipeline.settings import load
from pipeline.topics import Lane
from tests.support import models, pictures
from tests.support.engines import (
    CPU,
    GOOD,
    GUILTY,
    OPTIONS,
    Bench,
    Gate,
    Store,
    batches,
    decoded,
    describe,
    nothing_to_fetch,
    predicted,
    running,
)


async def test_samples_are_predicted_with_the_built_in_models() -> None:
    """Sample pictures come back with their label, a fingerprint and a complete receipt."""
    samples = list(images.draw(11, 12))
    async with running(*load_models("builtin:quality,builtin:fingerprint", CPU)) as bench:
        for sample in samples:
            bench.submit(sample.data, name=sample.id, lane="realtime")
        outcomes = await bench.finished()
    for sample in samples:
        quality, fingerprint = predicted(outcomes[sample.id]).results
        assert quality.label == sample.expected_label
        assert set(quality.scores) == {"sharpness", "exposure", "contrast", "noise"}
        assert (fingerprint.dimension, len(fingerprint.embedding or "")) == (256, 1368)
        receipt = predicted(outcomes[sample.id]).receipt
        assert receipt.input_sha256 == hashlib.sha256(sample.data).hexdigest()
        assert receipt.input_bytes == len(sample.data)
        assert (receipt.topic, receipt.partition, receipt.device) == ("images.bulk.v1", 3, "cpu")
        assert (receipt.width or 0) > 100
        assert (receipt.height or 0) > 100
        assert 1 <= (receipt.batch_size or 0) <= 8
        assert receipt.batch_id
        assert receipt.batch_cut in (
            "full",
            "idle",
            "deadline",
        )  # the last: decoding took longer than was waited for
        for seconds in (receipt.queue_seconds, receipt.decode_seconds, receipt.forward_seconds):
            assert seconds is not None
            assert 0 <= seconds < 20


async def test_a_batch_is_delivered_together_and_shares_its_id() -> None:
    """Records that rode together are delivered in one call and say so in their receipts."""
    gate = Gate()
    full, idle = batches("full"), batches("idle")
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        names = [bench.submit() for _ in range(8)]
        await decoded(bench, 8)
        gate.opened.set()
        outcomes = await bench.finished()
    assert sorted(bench.calls[-1]) == sorted(names)
    receipts = [predicted(outcomes[name]).receipt for name in names]
    assert len({receipt.batch_id for receipt in receipts}) == 1
    assert {(receipt.batch_size, receipt.batch_cut) for receipt in receipts} == {(8, "full")}
    assert (batches("full"), batches("idle")) == (full + 1, idle + 1)


async def test_a_nearer_deadline_shortens_a_wait_that_has_begun() -> None:
    """A record that must go soon does not wait with one that may wait long: it is predicted, not expired."""
    cut = batches("deadline")
    async with running() as bench:
        # A full batch is believed to take a minute, and what would fill it to be on its way.
        bench.engine._batcher.costs.observe(8, 60.0)
        bench.engine._decoder.coming = lambda: Coming({"bulk": 8}, 0.01)  # type: ignore[method-assign]
        patient = bench.submit()
        await decoded(bench, 1)
        urgent = bench.submit(expires_at=datetime.now(UTC) + timedelta(seconds=22.8))  # 22.5 of it for three
        outcomes = await bench.finished()
    receipts = [predicted(outcomes[name]).receipt for name in (patient, urgent)]
    assert {(receipt.batch_size, receipt.batch_cut) for receipt in receipts} == {(2, "deadline")}
    assert batches("deadline") == cut + 1


async def test_realtime_overtakes_bulk() -> None:
    """Real-time records that come after bulk ones ride before them."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        bulk = [bench.submit(lane="bulk") for _ in range(6)]
        realtime = [bench.submit(lane="realtime") for _ in range(3)]
        await decoded(bench, 9)
        gate.opened.set()
        await bench.finished()
    assert [sorted(call) for call in bench.calls[1:]] == [sorted(realtime), sorted(bulk)]


async def test_models_with_different_inputs_share_a_decode() -> None:
    """Each model gets pixels of its own size; results are in the order of the models."""
    small = models.doing_nothing(CPU)
    large, _ = load_models("builtin:quality,builtin:fingerprint", CPU)
    async with running(large, small) as bench:
        name = bench.submit(images.draw_one(1, 0).data)
        outcomes = await bench.finished()
    assert [result.model for result in predicted(outcomes[name]).results] == [
        "builtin:quality",
        "test:doing_nothing",
    ]


async def test_room_opens_when_the_device_goes_on() -> None:
    """A caller that waits for room is held at two batches ahead and let go when the device takes one."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        for _ in range(16):
            await asyncio.wait_for(bench.wait_for_room(), 5)
            bench.submit()
        waiting = asyncio.ensure_future(bench.wait_for_room())
        await decoded(bench, 16)
        assert not waiting.done()
        gate.opened.set()
        await asyncio.wait_for(waiting, 5)
        await bench.finished()


async def test_large_pictures_have_less_room() -> None:
    """A lane's room is bounded in bytes, whatever the size of a batch, and one record always finds some."""
    cases = {View(4096, 4096): 5, View(4096, 2048): 10, View(1333, 800, "inside"): 16, View(16384, 16384): 1}
    for view, records in cases.items():
        model = models.doing_nothing(CPU)
        model.view = view
        engine = Engine(
            [model], OPTIONS, fetch=nothing_to_fetch, deliver=lambda _: None, on_room=lambda: None
        )
        assert engine._room() == records
        assert records == 1 or records * view.width * view.height * 3 <= 256 * 2**20


async def test_realtime_has_room_of_its_own() -> None:
    """A real-time record goes in, and next onto the device, however many bulk ones wait for it."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        while "bulk" in bench.engine.room():
            bench.submit()
        assert bench.engine.room() == ["realtime"]
        urgent = bench.submit(lane="realtime")
        await decoded(bench, 17)
        gate.opened.set()
        await bench.finished()
    assert bench.calls[1] == [urgent]


def test_options_come_from_the_settings() -> None:
    """Every setting of the inference section reaches the engine."""
    values = load(
        max_batch_size=5,
        max_batch_bytes=11,
        decode_threads=3,
        torch_threads=2,
        max_image_bytes=10,
        max_image_pixels=20,
        missing_object_grace_seconds=1.5,
        batch_hang_seconds=7.5,
    )
    assert EngineOptions.from_settings(values, CPU) == EngineOptions(
        CPU, 5, 11, 3, 2, Limits(10, 20), 1.5, 7.5
    )


async def test_idleness_begins_with_the_last_outcome() -> None:
    """Whoever waits for a quiet moment is told how long it has been one: between two records it begins anew."""
    gate = Gate()
    async with running(gate.model) as bench:
        assert bench.engine.idle_seconds > 0.0
        bench.submit()
        await gate.is_entered()
        assert bench.engine.idle_seconds == 0.0
        opened_at = time.monotonic()
        gate.opened.set()
        await bench.finished()
        assert 0.0 < bench.engine.idle_seconds <= time.monotonic() - opened_at


async def test_stopping_finishes_what_was_submitted() -> None:
    """Within the drain everything is predicted, and late submissions are dropped."""
    bench = Bench([models.doing_nothing(CPU)], OPTIONS, nothing_to_fetch)
    await bench.engine.start()
    drained = batches("drain")
    names = [bench.submit() for _ in range(30)]
    await bench.engine.stop(drain_seconds=20)
    assert batches("drain") > drained
    assert all(isinstance(bench.outcomes[name], Predicted) for name in names)
    late = bench.submit()
    assert bench.outcomes[late] == Dropped()
    await asyncio.wait_for(bench.wait_for_room(), 5)


async def test_a_caller_that_waits_for_room_is_let_go_at_the_end() -> None:
    """Stopping with a full engine leaves nobody waiting."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        for _ in range(16):
            bench.submit()
        waiting = asyncio.ensure_future(bench.wait_for_room())
        await bench.engine.stop(drain_seconds=0)
        await asyncio.wait_for(waiting, 5)
        gate.opened.set()


async def test_stopping_drops_what_does_not_finish_in_time() -> None:
    """At the deadline unclaimed records are dropped, and those on the device have no outcome."""
    gate = Gate()
    store = Store(down=[DependencyError("down")])
    async with running(gate.model, fetch=store.fetch) as bench:
        on_device = bench.submit()
        await gate.is_entered()
        waiting = [bench.submit() for _ in range(12)]
        waiting.append(bench.submit(dataref="down"))
        await bench.engine.stop(drain_seconds=0.02)
        assert sorted(bench.outcomes) == sorted(waiting)
        assert set(map(type, bench.outcomes.values())) == {Dropped}
        gate.opened.set()
    await asyncio.to_thread(join_device_threads)
    await asyncio.sleep(0)
    assert on_device not in bench.outcomes
    assert bench.claims == [on_device]


def join_device_threads() -> None:
    """Wait until no device thread has anything left to report."""
    for thread in threading.enumerate():
        if thread.name == "device":
            thread.join(20)


KINDS = ("good", "guilty", "text", "expired", "not ours", "missing", "there", "wrong digest")


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(["realtime", "bulk"])), max_size=40))
def test_any_mix_of_records_has_one_outcome_each(mix: list[tuple[str, Lane]]) -> None:
    """Arbitrary records in arbitrary order: one outcome each, of the kind the record deserves."""
    asyncio.run(run_mix(mix))


async def run_mix(mix: list[tuple[str, Lane]]) -> None:
    store = Store(gone=[MissingImageError("gone")], there=[GOOD])
    past = datetime.now(UTC) - timedelta(seconds=1)
    options = EngineOptions(max_batch_size=4, decode_threads=2, missing_object_grace_seconds=0.004)
    expected: dict[str, str] = {}
    async with running(models.failing_on_guilty(CPU), options=options, fetch=store.fetch) as bench:
        submit: dict[str, Callable[[Lane], str]] = {
            "good": lambda lane: bench.submit(lane=lane),
            "guilty": lambda lane: bench.submit(GUILTY, lane=lane),
            "text": lambda lane: bench.submit(pictures.TEXT, lane=lane),
            "expired": lambda lane: bench.submit(lane=lane, expires_at=past),
            "not ours": lambda lane: bench.submit(lane=lane, ours=False),
            "missing": lambda lane: bench.submit(lane=lane, dataref="gone"),
            "there": lambda lane: bench.submit(lane=lane, dataref="there"),
            "wrong digest": lambda lane: bench.submit(lane=lane, sha256="f" * 64),
        }
        for kind, lane in mix:
            await bench.wait_for_room()
            expected[submit[kind](lane)] = kind
        outcomes = await bench.finished()
    found = {name: describe(outcome) for name, outcome in outcomes.items()}
    words = {
        "good": "Predicted",
        "there": "Predicted",
        "guilty": "model",
        "text": "undecodable_image",
        "expired": "Expired",
        "not ours": "Dropped",
        "missing": "missing_image",
        "wrong digest": "contract",
    }
    assert found == {name: words[kind] for name, kind in expected.items()}
