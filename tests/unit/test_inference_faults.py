"""A record, model or device at fault harms no neighbour, and is told apart."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
import torch

from pipeline.errors import (
    ConfigurationError,
    ContractError,
    FatalError,
    ImageError,
    ImageTooLargeError,
    ModelError,
    UndecodableImageError,
)
from pipeline.events import ImageEvent, Record
from pipeline.inference import Dropped, Engine, EngineOptions, Expired, Failed, Outcome, Predicted, Request
from pipeline.models import Output
from tests.support import models, pictures
from tests.support.engines import (
    CPU,
    GOOD,
    GUILTY,
    OPTIONS,
    Bench,
    Gate,
    batches,
    decoded,
    error_of,
    nothing_to_fetch,
    predicted,
    running,
)


async def test_bad_records_harm_no_neighbour() -> None:
    """Each bad picture fails for its own reason; the good ones around it are predicted."""
    bad = {
        "text": (pictures.TEXT, UndecodableImageError),
        "truncated": (pictures.truncated_jpeg(), UndecodableImageError),
        "bomb": (pictures.bomb_header_png(), ImageTooLargeError),
    }
    async with running() as bench:
        good = []
        for name, (data, _) in bad.items():
            good += [bench.submit(), bench.submit()]
            bench.submit(data, name=name)
        wrong = bench.submit(sha256="0" * 64)
        right = bench.submit(sha256=hashlib.sha256(GOOD).hexdigest())
        outcomes = await bench.finished()
    for name, (_, kind) in bad.items():
        assert type(error_of(outcomes[name])) is kind
    assert type(error_of(outcomes[wrong])) is ContractError
    assert all(isinstance(outcomes[name], Predicted) for name in [*good, right])


async def test_an_expired_record_costs_nothing() -> None:
    """Past its deadline a record is neither decoded nor predicted: the outcome says when it expired."""
    model = models.doing_nothing(CPU)
    async with running(model) as bench:
        past = datetime.now(UTC) - timedelta(seconds=1)
        late = bench.submit(pictures.TEXT, expires_at=past)
        fetched = bench.submit(expires_at=past, dataref="images/never-fetched")
        in_time = bench.submit(expires_at=datetime.now(UTC) + timedelta(hours=1))
        outcomes = await bench.finished()
    for name in (late, fetched):
        outcome = outcomes[name]
        assert isinstance(outcome, Expired)
        assert past.isoformat() in outcome.reason
        receipt = outcome.receipt
        assert (receipt.partition, receipt.input_sha256, receipt.decode_seconds) == (3, None, None)
        assert receipt.queue_seconds is not None
    assert predicted(outcomes[in_time]).results
    assert sum(model.batch_sizes) == 1


async def test_a_record_that_expires_in_the_queue_is_not_predicted() -> None:
    """A deadline that passes after the decode still spares the device the work."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        late = bench.submit(expires_at=datetime.now(UTC) + timedelta(milliseconds=60))
        await decoded(bench, 1)
        await asyncio.to_thread(time.sleep, 0.06)
        gate.opened.set()
        outcomes = await bench.finished()
    outcome = outcomes[late]
    assert isinstance(outcome, Expired)
    assert gate.model.batch_sizes == [1]
    receipt = outcome.receipt
    assert receipt.width is not None
    assert receipt.decode_seconds is not None
    assert receipt.queue_seconds is not None
    assert receipt.batch_wait_seconds is not None
    assert 0 < receipt.batch_wait_seconds <= receipt.queue_seconds


async def test_a_record_that_is_no_longer_ours_is_dropped() -> None:
    """A refused claim ends in `Dropped`, before the device and before any outcome of a fault."""
    model = models.doing_nothing(CPU)
    async with running(model) as bench:
        names = [bench.submit(ours=False), bench.submit(pictures.TEXT, ours=False)]
        past = datetime.now(UTC) - timedelta(seconds=1)
        names.append(bench.submit(ours=False, expires_at=past))
        outcomes = await bench.finished()
    assert [outcomes[name] for name in names] == [Dropped()] * 3
    assert model.batch_sizes == []
    assert sorted(bench.claims) == sorted(names)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("failing_on_guilty", ModelError), ("not_a_number", ImageError), ("miscounting", ImageError)],
)
async def test_the_guilty_record_is_found_and_fails_alone(name: str, fault: type[Exception]) -> None:
    """A model that raises, gives NaN or miscounts fails exactly the record that makes it do so.

    Outputs that make no sense are the picture's fault while they do for a reference picture.
    """
    model = getattr(models, name)(CPU)
    async with running(model) as bench:
        expected = {bench.submit(GUILTY if index in (2, 5, 6) else GOOD): index for index in range(24)}
        outcomes = await bench.finished()
    for record, index in expected.items():
        if index in (2, 5, 6):
            error = error_of(outcomes[record])
            assert type(error) is fault
            assert str(error).startswith(f"test:{name}: ")
            assert "\n" not in str(error)
        else:
            assert isinstance(outcomes[record], Predicted)


async def test_a_picture_that_spoils_its_neighbours_is_run_again_alone() -> None:
    """NaN for a whole batch is only believed of the record that gets it alone."""
    model = models.not_a_number(CPU, spoils_batch="true")
    async with running(model) as bench:
        good = [bench.submit() for _ in range(5)]
        guilty = bench.submit(GUILTY)
        outcomes = await bench.finished()
    assert all(isinstance(outcomes[name], Predicted) for name in good)
    assert type(error_of(outcomes[guilty])) is ImageError


async def test_a_model_that_has_no_number_for_anything_is_at_fault() -> None:
    """NaN for a reference picture too is the model's fault, which the limiter counts."""
    async with running(models.not_a_number(CPU, always="true")) as bench:
        for _ in range(3):
            bench.submit()
        outcomes = await bench.finished()
    assert {type(error_of(outcome)) for outcome in outcomes.values()} == {ModelError}


async def test_a_model_that_fails_on_everything_fails_each_record() -> None:
    """Every record gets its own outcome, with the model's own words."""
    async with running(models.failing(CPU)) as bench:
        for _ in range(5):
            bench.submit()
        outcomes = await bench.finished()
    assert {str(error_of(outcome)) for outcome in outcomes.values()} == {
        "test:failing: RuntimeError: this model fails on everything"
    }


async def test_failures_are_told_before_more_is_claimed() -> None:
    """The caller sees a batch's failures before the next batch is claimed, and may stop there."""
    async with running(models.failing(CPU)) as bench:
        claimed: list[int] = []
        deliver = bench.engine._deliver_outcomes

        def note(outcomes: Sequence[tuple[Request, Outcome]]) -> None:
            claimed.append(len(bench.claims))
            deliver(outcomes)

        bench.engine._deliver_outcomes = note
        for _ in range(24):
            bench.submit()
        await bench.finished()
    told = 0
    for before, call in zip(claimed, bench.calls, strict=True):
        told += len(call)
        assert before == told


async def test_out_of_memory_makes_smaller_batches() -> None:
    """A batch that does not fit is halved until it does, and the next ones are cut smaller."""
    gate = Gate()
    cut = batches("memory")
    model = models.out_of_memory(CPU, above="3")
    async with running(gate.model, model) as bench:
        bench.submit()
        await gate.is_entered()
        for _ in range(16):
            bench.submit()
        await decoded(bench, 16)
        gate.opened.set()
        outcomes = await bench.finished()
    receipts = [predicted(outcome).receipt for outcome in outcomes.values()]
    assert max(receipt.batch_size or 0 for receipt in receipts) <= 3
    assert [receipt.batch_cut for receipt in receipts].count("memory") >= 14
    assert model.batch_sizes[:3] == [1, 8, 4]  # then halves of four, and no batch of eight again
    assert model.batch_sizes.count(8) == 1
    assert batches("memory") > cut


async def test_a_record_that_does_not_fit_alone_fails() -> None:
    """Out of memory on one picture is that record's end, not the engine's."""
    async with running(models.out_of_memory(CPU, above="0")) as bench:
        name = bench.submit()
        outcomes = await bench.finished()
    assert "out of memory" in str(error_of(outcomes[name]))


async def test_a_lost_device_is_fatal() -> None:
    """A CUDA context error ends the engine without an outcome: no record is blamed or acknowledged."""
    async with running(models.losing_the_device(CPU)) as bench:
        bench.submit()
        with pytest.raises(FatalError, match="the device is lost: test:losing_the_device"):
            await asyncio.wait_for(bench.engine.fatal, 5)
    assert bench.outcomes == {}


async def test_a_pass_that_hangs_is_fatal() -> None:
    """A forward pass longer than the limit is reported; the record gets no outcome."""
    gate = Gate()
    options = EngineOptions(max_batch_size=8, decode_threads=1, batch_hang_seconds=0.05)
    async with running(gate.model, options=options) as bench:
        bench.submit()
        with pytest.raises(FatalError, match="a forward pass of a batch of 1 has run for"):
            await asyncio.wait_for(bench.engine.fatal, 5)
        gate.opened.set()
    assert bench.outcomes == {}


async def test_many_passes_of_one_batch_are_no_hang() -> None:
    """Bisection takes several passes; only a single one that is too long is fatal."""
    options = EngineOptions(max_batch_size=8, decode_threads=1, batch_hang_seconds=0.15)

    def behave(batch: torch.Tensor) -> list[Output]:
        time.sleep(0.05)
        raise ValueError("slow and wrong")

    async with running(models.BehavingModel("slow", behave), options=options) as bench:
        for _ in range(8):
            bench.submit()
        outcomes = await bench.finished()
        assert not bench.engine.fatal.done()
    assert all(isinstance(outcome, Failed) for outcome in outcomes.values())


async def test_a_failing_warm_up_is_a_configuration_error() -> None:
    """A model that cannot work here ends the start with one line that names it and the setting."""
    engine = Engine(
        [models.failing_warm_up(CPU)],
        OPTIONS,
        fetch=nothing_to_fetch,
        deliver=lambda _: None,
        on_room=lambda: None,
    )
    with pytest.raises(ConfigurationError) as refused:
        await engine.start()
    assert refused.value.message == (
        "MILLRACE_MODELS: 'test:failing_warm_up' fails its warm-up: RuntimeError: no kernel image is available"
    )


async def test_outcomes_that_cannot_be_delivered_are_fatal() -> None:
    """An error of the caller's own code is not swallowed."""

    def deliver(outcomes: Sequence[tuple[Request, Outcome]]) -> None:
        raise KeyError("a bug")

    bench = Bench([models.doing_nothing(CPU)], OPTIONS, nothing_to_fetch)
    bench.engine = Engine(
        [models.doing_nothing(CPU)], OPTIONS, fetch=nothing_to_fetch, deliver=deliver, on_room=lambda: None
    )
    await bench.engine.start()
    bench.submit()
    with pytest.raises(FatalError, match="could not be delivered: KeyError"):
        await asyncio.wait_for(bench.engine.fatal, 5)
    await bench.engine.stop(0)


async def test_a_claim_that_raises_is_fatal() -> None:
    """A bug of the caller's ends the engine instead of leaving the device idle for ever."""

    def claim() -> bool:
        raise RuntimeError("a bug")

    async with running() as bench:
        record = Record(topic="t", partition=0, offset=0, timestamp_ms=0)
        event = ImageEvent(id="x", data=GOOD)
        bench.engine.submit(Request(event, record, "bulk", time.monotonic(), claim, bench))
        with pytest.raises(FatalError, match="could not be claimed: RuntimeError: a bug"):
            await asyncio.wait_for(bench.engine.fatal, 5)
