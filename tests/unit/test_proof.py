"""A GPU that nobody asked for predicts only if it works, and says what the CPU says."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import predict
from agents.predict import Predict
from agents.replica import Use, in_thread
from agents.watch import WatchStep
from pipeline.deployments import Version
from pipeline.energy import EnergyMeter
from pipeline.errors import ConfigurationError
from pipeline.events import Box, ImageEvent, Record
from pipeline.inference import Outcome, Predicted, Request, proof
from pipeline.inference.proof import Placed, load_where_proved
from pipeline.models import LoadOptions, Model, Output, load_models, precision, resolve_device
from pipeline.settings import Settings, load
from tests.support import logged as logs
from tests.support import pictures
from tests.support.nvml import Script
from tests.support.twins import GPU

CPU = torch.device("cpu")
OPTIONS = LoadOptions(allow_python=True)
UNPROVED = "the GPU is not proved: predicting on the CPU; MILLRACE_DEVICE=cuda takes the GPU unproved"


def placed(*names: str) -> Placed:
    return load_where_proved(",".join(f"python:tests.support.twins:{name}" for name in names), GPU, OPTIONS)


@pytest.mark.parametrize("on_gpu", ["right", "rounds"])
def test_a_gpu_that_says_the_same_is_taken(monkeypatch: pytest.MonkeyPatch, on_gpu: str) -> None:
    """Other last digits are no difference, whatever the task; of detectors those of float32."""
    logged = logs.capture(monkeypatch, proof)
    found = placed(*(f"{name}?on_gpu={on_gpu}" for name in ("classifier", "embedder", "scorer", "detector")))
    assert (found.device, [model.task for model in found.models]) == (
        GPU,
        ["classify", "embed", "score", "detect"],
    )
    (entry,) = logged.entries
    assert (entry["event"], entry["log_level"]) == ("the GPU is proved", "info")
    assert (entry["of_tolerance"] == 0) == (on_gpu == "right")
    assert torch.backends.cudnn.allow_tf32  # as before


def test_labels_that_flip_are_no_disagreement() -> None:
    """Of random weights' thousand labels other five may be the best, no better than the rest."""
    models = [
        load_models("python:tests.support.twins:classifier?on_gpu=rounds", device, OPTIONS)[0]
        for device in (CPU, GPU)
    ]
    ours, theirs = (model.forward(precision.structured_pictures(model.view, 4, CPU)) for model in models)
    assert all(set(one.scores) != set(other.scores) for one, other in zip(ours, theirs, strict=True))
    assert precision.disagreement(ours, theirs) < 0.1


@pytest.mark.parametrize(
    ("name", "on_gpu", "said"),
    [
        ("scorer", "old", "'python:tests.support.twins:scorer?on_gpu=old': does not load: RuntimeError: CUDA"),
        ("scorer", "small", "'test:score' fails its warm-up: OutOfMemoryError: CUDA out of memory"),
        ("scorer", "lost", "'test:score': RuntimeError: CUDA error: an illegal memory access"),
        ("scorer", "overflows", "'test:score' fails its warm-up: its output is not a finite number"),
        ("detector", "overflows", "'test:detect' fails its warm-up: its output is not a finite number"),
        ("embedder", "errs", "'test:embed': its outputs are "),
        ("scorer", "errs", "'test:score': its outputs are "),
        ("detector", "errs", "'test:detect': its outputs are 9.78 times as far from the CPU's as is tolerated"),
    ],
)  # fmt: skip
def test_one_that_fails_or_says_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, on_gpu: str, said: str
) -> None:
    """Whatever is wrong with it, all models run on the CPU, and one line says which failed there and why."""
    logged = logs.capture(monkeypatch, proof)
    found = placed("classifier", f"{name}?on_gpu={on_gpu}")
    assert found.device == CPU
    assert precision.disagreement(_outputs(found.models[1]), _outputs(placed(name).models[0])) < 1e-3
    entry = logged.entries[0]
    assert (entry["event"], entry["log_level"]) == (UNPROVED, "warning")
    assert said in entry["reason"]


def test_models_that_fail_everywhere_say_nothing_about_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused as ever, and the next ones are tried on the GPU."""
    logged = logs.capture(monkeypatch, proof)
    with pytest.raises(ConfigurationError, match="fails its warm-up: RuntimeError: no kernel image"):
        load_where_proved("python:tests.support.models:failing_warm_up", GPU, OPTIONS)
    assert logged.entries == []


async def test_predict_comes_out_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where torch sees a GPU that does not work, `auto` starts on the CPU; what was asked for is an error."""
    logged = logs.capture(monkeypatch, proof)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    step = await _started(load(data_dir=tmp_path, device="auto"), monkeypatch)
    try:
        assert step._device == CPU
        (entry,) = logged.entries
        assert (entry["event"], entry["device"]) == (UNPROVED, "cuda")
        assert entry["reason"].startswith("'builtin:fingerprint': does not load: ")
        # Another version, once it runs: where the first one does.
        await step._swap(Version(revision=1, models=("builtin:quality",)), step._load(["builtin:quality"]))
        assert len(logged.entries) == 1
    finally:
        await step.stop()
    with pytest.raises(ConfigurationError, match="'builtin:fingerprint': does not load"):
        await _started(load(data_dir=tmp_path, device="cuda"), monkeypatch)
    assert len(logged.entries) == 1


async def test_predict_measures_with_the_meter_of_the_proof(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Script
) -> None:
    """What the GPU draws idle is known from before the proof's passes, and is charged to predictions."""
    meter = EnergyMeter(script.uuid(1), lambda: None)
    monkeypatch.setattr(proof, "meter_of", lambda device: meter if device == GPU else None)
    monkeypatch.setattr(predict, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(
        predict, "load_where_proved", lambda names, _, options: load_where_proved(names, GPU, options)
    )
    outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    def deliver(step: Predict, pairs: Sequence[tuple[Request, Outcome]]) -> None:
        for _, outcome in pairs:
            outcomes.put_nowait(outcome)

    monkeypatch.setattr(Predict, "_deliver", deliver)
    step = await _started(load(data_dir=tmp_path, device="auto"), monkeypatch)
    try:
        assert step._device == GPU
        assert step._engine is not None
        record = Record(topic="images.bulk.v1", partition=0, offset=0, timestamp_ms=0)
        event = ImageEvent(id="one", data=pictures.jpeg())
        step._engine.submit(Request(event, record, "bulk", time.monotonic(), claim=lambda: True))
        outcome = await asyncio.wait_for(outcomes.get(), 20)
        assert isinstance(outcome, Predicted)
        assert outcome.receipt.gpu_uuid == script.uuid(1)
    finally:
        await step.stop()


async def _started(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Start the step as it is, but without a broker to say what to run."""
    step = Predict(settings)

    async def begin(use: Use) -> None:
        version = step._replica._specified
        await use(version, await in_thread(lambda: step._load(version.models)))

    monkeypatch.setattr(step._replica, "start", begin)
    monkeypatch.setattr(step._publisher, "start", _nothing)
    await step.start()
    return step


async def test_watch_takes_no_gpu_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It needs none, and nothing would prove it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    step = WatchStep(load(data_dir=tmp_path, device="auto"))
    monkeypatch.setattr(step._publisher, "start", _nothing)
    await step.start()
    assert step._device == CPU
    await step.stop()


async def _nothing() -> None:
    pass


def _outputs(model: Model) -> list[Output]:
    return model.forward(precision.structured_pictures(model.view, 4, CPU))


def test_scores_of_either_side_count() -> None:
    """A label that only one of the two has among its best must be about as good as the other's last."""
    one = Output(label="a", score=0.5, scores={"a": 0.5, "b": 0.5})
    other = Output(label="c", score=0.9, scores={"c": 0.9, "a": 0.5})
    for pair in ((one, other), (other, one)):
        assert precision.disagreement(*([output] for output in pair)) == pytest.approx(0.4 / 0.02)


def found(*boxes: tuple[str, float, float]) -> Output:
    """Return 100 x 100 boxes of these labels, scores and left edges."""
    return Output(boxes=tuple(Box(label, score, left, 0, left + 100, 100) for label, score, left in boxes))


CAT, DOG, FAINT = ("cat", 0.9, 0.0), ("dog", 0.8, 200.0), ("cat", 0.51, 500.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "lacking"),
    [
        ([CAT, DOG], [("cat", 0.89, 10.0), ("dog", 0.81, 190.0)], 0),  # moved
        ([CAT, FAINT], [CAT], 0),  # just above the threshold on one side
        ([CAT], [], 1),
        ([CAT, DOG], [CAT], 1 / 3),  # of three boxes on either side one has no like
        ([CAT], [("dog", 0.9, 0.0)], 1),
        ([CAT], [("cat", 0.9, 60.0)], 1),
        ([CAT], [("cat", 0.8, 0.0)], 1),
        ([CAT], [("cat", 0.9, float("nan"))], 1),
        ([], [], 0),
        ([("cat", 0.3, 0.0), ("cat", 0.1, 200.0)], [("cat", 0.3, 0.0)], 0),  # thresholds may be lower
        ([("cat", 0.8, 300.0 * n) for n in range(100)], [("cat", 0.8, 300.0 * n) for n in range(50, 150)], 0),
    ],
)  # fmt: skip
def test_boxes_are_looked_for_on_either_side(
    ours: Sequence[Any], theirs: Sequence[Any], lacking: float
) -> None:
    """Boxes clear of the threshold must be on both sides, with the same label, about the same place and score."""
    expected = pytest.approx(lacking / precision.BOX_TOLERANCE)
    assert precision.disagreement([found(*ours)], [found(*theirs)]) == expected
    assert precision.disagreement([found(*theirs)], [found(*ours)]) == expected


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proved where torch sees nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
