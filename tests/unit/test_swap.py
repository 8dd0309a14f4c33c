"""Models change between two batches: each record has one outcome, by models that saw it as they want to."""

import asyncio

import torch

from pipeline.events import Box
from pipeline.imaging import View
from pipeline.inference import Predicted
from pipeline.models import Output
from tests.support import pictures
from tests.support.engines import Gate, decoded, predicted, running
from tests.support.models import BehavingModel


def seeing(version: str, side: int = 32) -> BehavingModel:
    """Make a model that says which side it saw."""

    def behave(batch: torch.Tensor) -> list[Output]:
        assert batch.shape[1:] == (3, side, side)
        return [Output(score=float(side))] * len(batch)

    model = BehavingModel("seeing", behave)
    model.version, model.view = version, View(side, side)
    return model


async def test_an_idle_engine_swaps_at_once() -> None:
    """With nothing to do the new models have the next record."""
    async with running(seeing("1")) as bench:
        await asyncio.wait_for(bench.engine.swap([seeing("2", 16)]), 5)
        name = bench.submit()
        outcomes = await bench.finished()
    assert predicted(outcomes[name]).results[0].version == "2"


async def test_what_the_new_models_can_see_is_theirs() -> None:
    """Records that wait for the device go to the new models when both look at pictures alike."""
    gate = Gate()
    async with running(gate.model) as bench:
        first = bench.submit()
        await gate.is_entered()
        waiting = [bench.submit() for _ in range(20)]
        await decoded(bench, 20)
        swap = asyncio.ensure_future(bench.engine.swap([seeing("2")]))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.wait_for(swap, 5)
        outcomes = await bench.finished()
    assert predicted(outcomes[first]).results[0].model == "test:gate"
    assert {predicted(outcomes[name]).results[0].version for name in waiting} == {"2"}


async def test_what_only_the_old_models_can_see_is_theirs() -> None:
    """Records decoded for the old models are finished by them, then all that follow go to the new ones."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        old = [bench.submit(lane=lane) for lane in ("bulk", "realtime") for _ in range(5)]
        await decoded(bench, 10)
        swap = asyncio.ensure_future(bench.engine.swap([seeing("2", 16)]))
        await asyncio.sleep(0)
        new = [bench.submit(lane="realtime") for _ in range(10)]
        await decoded(bench, 20)
        assert not swap.done()
        gate.opened.set()
        await asyncio.wait_for(swap, 5)
        last = bench.submit()
        outcomes = await bench.finished()
    assert {predicted(outcomes[name]).results[0].model for name in old} == {"test:gate"}
    # Those that were decoded for both may ride with either, until the last of the old ones has gone.
    assert {predicted(outcomes[name]).results[0].version for name in new} <= {"1", "2"}
    assert predicted(outcomes[last]).results[0].version == "2"


async def test_swapping_under_load_loses_nothing_and_never_goes_back() -> None:
    """Through many swaps each record has one outcome, and no version follows a newer one."""
    async with running(seeing("0")) as bench:

        async def submit() -> None:
            for number in range(300):
                await bench.wait_for_room()
                bench.submit(pictures.truncated_jpeg() if number % 17 == 0 else pictures.solid((1, 2, 3)))

        async def swap() -> None:
            for version in range(1, 8):
                await bench.finished(version * 30)
                await asyncio.wait_for(bench.engine.swap([seeing(str(version), 32 - 2 * version)]), 5)

        await asyncio.gather(submit(), swap())
        # The 300 may all have been decoded for older models by the time of the last swap: this one was not.
        last = bench.submit()
        outcomes = await bench.finished()
    assert len(outcomes) == 301
    versions = [
        predicted(outcomes[name]).results[0].version
        for call in bench.calls
        for name in call
        if isinstance(outcomes[name], Predicted)
    ]
    assert versions == sorted(versions)
    assert versions[0] == "0"
    assert predicted(outcomes[last]).results[0].version == "7"


async def test_a_swap_ends_with_the_engine() -> None:
    """A swap that waits for a device that hangs is let go when the engine stops."""
    gate = Gate()
    async with running(gate.model) as bench:
        bench.submit()
        await gate.is_entered()
        swap = asyncio.ensure_future(bench.engine.swap([seeing("2")]))
        await asyncio.sleep(0)
        await bench.engine.stop(0.0)
        await asyncio.wait_for(swap, 5)
        gate.opened.set()


async def test_boxes_are_in_pixels_of_the_picture() -> None:
    """Boxes come back from what the model saw, whatever the view, cut off at the edges of the picture."""
    expected = {
        View(32, 32): Box("a", 0.5, 0.0, 30.0, 180.0, 60.0),
        View(32, 32, "crop", 40): Box("a", 0.5, 123.0, 36.0, 180.0, 60.0),
        View(64, 24, "inside"): Box("a", 0.5, 0.0, 45.71, 90.0, 91.43),
    }
    for view, box in expected.items():

        def behave(batch: torch.Tensor | list[torch.Tensor]) -> list[Output]:
            boxes = (Box("a", 0.5, -3.0, 8.0, 16.0, 16.0),)
            return [Output(boxes=boxes)] * len(batch)

        model = BehavingModel("boxes", behave)
        model.view = view
        async with running(model) as bench:
            name = bench.submit(pictures.encode(pictures.scene(360, 120), "PNG"))
            outcomes = await bench.finished()
        assert predicted(outcomes[name]).results[0].boxes == (box,), view
