"""Outputs that make no sense: the record is run again alone, and a reference picture says whose fault it is."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigurationError, FatalError, ImageError, ModelError
from pipeline.imaging import View
from pipeline.inference import Predicted
from pipeline.inference.forward import _stacked
from pipeline.models import LoadOptions, Output
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.specification import Specification
from pipeline.models.tasks import Classify, Detect, Embed, Reader, Score
from tests.support import models
from tests.support.engines import CPU, GOOD, GUILTY, Gate, decoded, error_of, predicted, running

VIEW = View(models.SIDE_PIXELS, models.SIDE_PIXELS)
NAN = torch.nan


def classes(guilty: torch.Tensor) -> torch.Tensor:
    return torch.where(guilty[:, None], torch.tensor([0.0, NAN]), torch.tensor([0.0, 1.0]))


def too_many_classes(guilty: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(guilty), 2 + int(guilty.any()))


def vectors(guilty: torch.Tensor) -> torch.Tensor:
    return torch.where(guilty[:, None], torch.tensor([1.0, torch.inf]), torch.tensor([3.0, 4.0]))


def numbers(guilty: torch.Tensor) -> torch.Tensor:
    return torch.where(guilty, NAN, 1.0)


def boxes(guilty: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    found = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([1])}
    return [{**found, "scores": torch.tensor([NAN if one else 0.9])} for one in guilty.tolist()]


def boxes_without_labels(guilty: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    kept = ("boxes", "scores") if guilty.any() else ("boxes", "scores", "labels")
    return [{name: found[name] for name in kept} for found in boxes(torch.zeros_like(guilty))]


CLASSES, BOXES = Classify(("a", "b")), Detect({1: "cat"}, 0.5)
CASES: list[tuple[Callable[[torch.Tensor], Any], Reader]] = [
    (classes, CLASSES),
    (too_many_classes, CLASSES),
    (vectors, Embed()),
    (numbers, Score()),
    (boxes, BOXES),
    (boxes_without_labels, BOXES),
]


class Judging(nn.Module):
    """Returns what is given for pictures that are guilty or not; once it is `broken`, all of them are."""

    def __init__(self, judge: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.judge = judge
        self.broken = False

    def forward(self, pixels: torch.Tensor) -> Any:
        guilty = torch.tensor(models.is_guilty(pixels * 255)) | self.broken
        return self.judge(guilty)


def judging(judge: Callable[[torch.Tensor], Any], reader: Reader) -> tuple[Judging, ModuleModel]:
    network = Judging(judge)
    options = LoadOptions(Path("nowhere"), precision="fp32", max_batch_size=8)
    specification = Specification.parse("test:judging")
    return network, ModuleModel(specification, network, Preprocessing(VIEW), reader, {}, CPU, options)


@pytest.mark.parametrize(("judge", "reader"), CASES)
async def test_a_picture_without_a_sound_output_fails_alone(judge: Any, reader: Reader) -> None:
    """NaN or another shape, whatever the task: the picture is at fault, and its neighbours are predicted."""
    _, model = judging(judge, reader)
    gate = Gate()
    async with running(gate.model, model) as bench:
        bench.submit()
        await gate.is_entered()
        good = [bench.submit() for _ in range(4)]
        guilty = bench.submit(GUILTY)
        await decoded(bench, 5)
        gate.opened.set()
        outcomes = await bench.finished()
    assert all(predicted(outcomes[name]).results for name in good)
    error = error_of(outcomes[guilty])
    assert type(error) is ImageError
    assert str(error).startswith("test:judging: ")
    assert str(error).endswith("; for a reference picture it is as it should be")


@pytest.mark.parametrize(("judge", "reader"), CASES)
async def test_a_model_without_a_sound_output_is_at_fault(judge: Any, reader: Reader) -> None:
    """Where the reference picture fares no better it is the model's fault, which the limiter counts."""
    network, model = judging(judge, reader)
    async with running(model) as bench:
        network.broken = True
        for _ in range(3):
            bench.submit()
        outcomes = await bench.finished()
    assert {type(error_of(outcome)) for outcome in outcomes.values()} == {ModelError}


@pytest.mark.parametrize(("judge", "reader"), CASES)
async def test_a_model_without_a_sound_output_does_not_start(judge: Any, reader: Reader) -> None:
    """Its warm-up fails, in one line that names it, and the models that run go on."""
    network, model = judging(judge, reader)
    network.broken = True
    async with running() as bench:
        with pytest.raises(ConfigurationError, match="'test:judging' fails its warm-up: "):
            await asyncio.to_thread(bench.engine.warm_up, [model])
        name = bench.submit()
        outcomes = await bench.finished()
    assert predicted(outcomes[name]).results[0].model == "test:doing_nothing"


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("failing_on_guilty", {}, {4: 4, 2: 2, 1: 1}),  # halves of eight, of four, of two
        ("out_of_memory", {"above": "3"}, {2: 8}),
        ("not_a_number", {}, {8: 7}),  # all but one are of the whole batch
        ("not_a_number", {"spoils_batch": "true"}, {1: 7}),
    ],
)
async def test_receipts_name_the_pass_that_they_are_of(
    name: str, options: dict[str, str], sizes: dict[int, int]
) -> None:
    """Who shares a batch's id was in one pass, of the size that the receipts say; a part is named `BATCH.N`."""
    gate, model = Gate(), getattr(models, name)(CPU, **options)
    async with running(gate.model, model) as bench:
        bench.submit()
        await gate.is_entered()
        names = [
            bench.submit(GUILTY if index == 3 and "above" not in options else GOOD) for index in range(8)
        ]
        await decoded(bench, 8)
        gate.opened.set()
        outcomes = await bench.finished()
    receipts = [one.receipt for name in names if isinstance(one := outcomes[name], Predicted)]
    assert Counter(receipt.batch_size for receipt in receipts) == sizes
    passes = Counter((receipt.batch_id or "", receipt.batch_size) for receipt in receipts)
    assert len({batch_id for batch_id, _ in passes}) == len(passes)
    assert len({batch_id.partition(".")[0] for batch_id, _ in passes}) == 1
    for (batch_id, size), count in passes.items():
        assert count == (7 if size == 8 else size)
        assert ("." in batch_id) == (size != 8)


def test_pictures_are_stacked_into_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned or not, a batch has the same pixels; what allocates stands in for torch's, which needs a GPU."""
    asked: list[bool] = []
    empty = torch.empty

    def allocate(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    pictures = [np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8) for seed in range(3)]
    for pinned in (False, True):
        assert np.array_equal(_stacked(pictures, pinned=pinned).numpy(), np.stack(pictures))
    assert asked == [True]


async def test_a_device_that_is_lost_with_the_reference_is_nobodys_fault() -> None:
    """A GPU that dies after a senseless output ends the process: no record is blamed for it."""

    def behave(batch: torch.Tensor) -> list[Output]:
        if calls := len(model.batch_sizes) - 1:
            raise RuntimeError(f"CUDA error: an illegal memory access, call {calls}")
        return [Output(score=float("nan"))]

    model = models.BehavingModel("dying", behave)
    async with running(model) as bench:
        bench.submit()
        with pytest.raises(FatalError, match="the device is lost: test:dying: RuntimeError: CUDA error"):
            await asyncio.wait_for(bench.engine.fatal, 20)
        assert not bench.outcomes


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (Output(score=np.float32(1)), "float32"),  # type: ignore[arg-type]
        (Output(label=7, score=1.0), "Expected `str | null`, got `int`"),  # type: ignore[arg-type]
    ],
)
async def test_an_output_that_cannot_be_published_does_not_start(output: Output, reason: str) -> None:
    """Numbers that are not Python's would end the process at its first publication."""
    model = models.BehavingModel("odd", lambda batch: [output] * len(batch))
    model.warm_up = lambda: None  # type: ignore[method-assign]
    async with running() as bench:
        with pytest.raises(
            ConfigurationError, match="'test:odd' fails its warm-up: its output cannot be"
        ) as error:
            await asyncio.to_thread(bench.engine.warm_up, [model])
    assert reason in str(error.value)
