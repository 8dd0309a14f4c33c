"""Of the ways to run a network the fastest is taken, if it says the same."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.imaging import View
from pipeline.models import LoadOptions, Output, packing, precision, ways
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.specification import Specification
from pipeline.models.tasks import Classify
from pipeline.models.ways import Course, Way, fastest
from tests.support import logged as logs

CPU = torch.device("cpu")
PLAIN, PACKED, HALF, HALF_PACKED = "float32", "float32 packed", "bfloat16", "bfloat16 packed"


@pytest.fixture(autouse=True)
def _nobody_has_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_raced", {})


class Network(nn.Module):
    """Looks at mean colours; a coarse one says something else in fewer bits."""

    def __init__(self, *, is_coarse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.is_coarse = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3), is_coarse

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(self.first(pixels)).mean((2, 3))
        if self.is_coarse and torch.is_autocast_enabled("cpu"):
            return logits + 3 * torch.arange(logits.shape[1])
        return logits


def load(network: nn.Module, wanted: str = "auto") -> ModuleModel:
    options = LoadOptions(Path("nowhere"), precision=wanted, max_batch_size=2)  # type: ignore[arg-type]
    reader, preprocessing = Classify(("a", "b", "c")), Preprocessing(View(24, 16))
    return ModuleModel(Specification.parse("test:network"), network, preprocessing, reader, {}, CPU, options)


def way_of(model: ModuleModel) -> str:
    is_packed = any(isinstance(layer, packing.Packed) for layer in model._network.modules())
    return model.precision + " packed" * is_packed


def pace(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, Sequence[float]]) -> list[str]:
    """Have each way take what is said, for a picture and for a batch; return what was timed."""
    timed: list[str] = []

    def take(_: Any, way: Way, __: Any, batch: Any) -> float:
        timed.append(way.name)
        return seconds[way.name][len(batch) > 1]

    monkeypatch.setattr(ways, "_seconds", take)
    monkeypatch.setattr(precision, "dtype_of", lambda wanted, _: None if wanted == "fp32" else torch.bfloat16)
    return timed


@pytest.mark.parametrize(
    ("plain", "packed", "half", "half_packed", "taken"),
    [
        ((1, 8), (1, 8), (1, 8), (1, 8), PLAIN),
        ((1, 8), (0.96, 7.7), (0.97, 7.9), (0.96, 7.8), PLAIN),
        ((1, 8), (0.8, 6), (0.78, 5.9), (1, 8), PACKED),
        ((1, 8), (0.9, 8), (1.1, 6), (0.9, 5), HALF_PACKED),
        ((1, 8), (1, 8), (0.7, 5), (0.69, 4.9), HALF),
        # One that loses as much alone as it gains in a batch is no better.
        ((1, 8), (1.4, 5.8), (1.5, 7), (1.45, 7), PLAIN),
        ((1, 8), (1.1, 8), (1.2, 4), (2, 4), HALF),
    ],
)
def test_the_way_that_is_nowhere_far_from_the_fastest_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    plain: Sequence[float],
    packed: Sequence[float],
    half: Sequence[float],
    half_packed: Sequence[float],
    taken: str,
) -> None:
    """For a picture alone and for a batch; a gain that a busy machine could feign is none."""
    pace(monkeypatch, {PLAIN: plain, PACKED: packed, HALF: half, HALF_PACKED: half_packed})
    found = load(Network())
    found.warm_up()
    assert way_of(found) == taken


def test_what_says_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of those that say the same is, and the log tells what was left out."""
    pace(monkeypatch, {PLAIN: (1, 8), PACKED: (0.7, 6), HALF: (0.5, 4), HALF_PACKED: (0.4, 3)})
    logged = logs.capture(monkeypatch, ways)
    coarse = load(Network(is_coarse=True))
    coarse.warm_up()
    assert way_of(coarse) == PACKED
    said = [(entry["event"], entry["way"]) for entry in logged.entries]
    assert said == [
        ("a fast way is not taken: the outputs differ", HALF_PACKED),
        ("a fast way is not taken: the outputs differ", HALF),
        ("fastest way chosen", PACKED),
    ]
    # In float32 hardly a digit may change.
    monkeypatch.setattr(ways, "disagreement", lambda *_: 0.06)
    strict = load(Network())
    strict.warm_up()
    assert way_of(strict) == HALF_PACKED
    only = load(Network(), "fp32")
    only.warm_up()
    assert way_of(only) == PLAIN


def test_networks_that_differ_in_weights_alone_race_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their outputs are compared each time: a new version that is bad in fewer bits is not run in them."""
    timed = pace(monkeypatch, {PLAIN: (1, 8), PACKED: (1, 8), HALF: (0.5, 4), HALF_PACKED: (0.5, 4)})
    first, second, coarse = load(Network()), load(Network()), load(Network(is_coarse=True))
    first.warm_up()
    assert way_of(first) == HALF
    assert timed
    timed.clear()
    second.warm_up()
    coarse.warm_up()
    assert (way_of(second), way_of(coarse)) == (HALF, PLAIN)
    assert not timed
    load(Network(), "fp32").warm_up()  # between other ways
    assert timed


def test_a_network_that_fails_in_fewer_bits_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asked for and does not work here is left, and no reason to refuse the model."""
    monkeypatch.setattr(precision, "dtype_of", lambda *_: torch.bfloat16)
    network = Network()

    class Picky(nn.Module):
        def forward(self, pixels: torch.Tensor) -> Any:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError('"picky" not implemented for BFloat16')
            return network(pixels)

    found = load(Picky())
    found.warm_up()
    assert found.precision == "float32"
    with pytest.raises(RuntimeError, match="picky"):
        load(Picky(), "bf16").warm_up()


def test_a_race_in_which_a_way_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have failed for lack of memory, or for the weights of that network: the next one races again."""
    pace(monkeypatch, {PLAIN: (1, 8), PACKED: (1, 8), HALF: (0.5, 4), HALF_PACKED: (0.3, 2)})
    take = ways._seconds

    def fail(clock: Any, way: Way, at: Any, batch: Any) -> float:
        if way.name == HALF_PACKED and len(batch) > 1:
            raise MemoryError("not enough memory")
        return take(clock, way, at, batch)

    first, second = load(Network()), load(Network())
    with monkeypatch.context() as without:
        without.setattr(ways, "_seconds", fail)
        first.warm_up()
    second.warm_up()
    assert (way_of(first), way_of(second)) == (HALF, HALF_PACKED)


def course(run: ways.Run = lambda *_: [Output(score=1.0)], alike: str = "") -> Course:
    return Course("network", nn.Identity(), run, lambda count: [0] * count, CPU, alike)


def test_what_is_hopelessly_slow_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start does not wait for turns of what takes many times as long; a hiccup leaves nothing out."""
    slow, quick = Way("slow", nn.Identity), Way("quick", nn.Identity)
    for seconds, turns in ((12.0, 9), (1.0, 16)):
        timed = pace(monkeypatch, {"quick": (0.2, 0.2), "slow": (0.1, seconds)})
        assert fastest([slow, quick], course(alike=f"{seconds}")).name == "quick"
        assert timed.count("slow") == turns
        assert timed.count("quick") == 16


def test_a_busy_machine_does_not_decide() -> None:
    """What a pass waits for while others have the cores does not count: only what it computes does."""
    pixels = torch.rand(200, 200)

    def run(network: nn.Module, _: Any, batch: Any) -> list[Output]:
        is_large = isinstance(network, nn.Flatten)
        time.sleep(0.0 if is_large else 0.01)
        for _ in range(12 if is_large else 4):
            pixels @ pixels
        return [Output(score=1.0)] * len(batch)

    threads = torch.get_num_threads()
    large, small = Way("large", nn.Flatten), Way("small", nn.Identity)
    assert fastest([large, small], course(run, "first")).name == "small"
    assert fastest([small, large], course(run, "second")).name == "small"
    assert torch.get_num_threads() == threads
