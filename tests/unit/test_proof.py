"""A GPU that nobody asked for predicts only if it works, and says what the CPU says."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from agents import predict
from agents.predict import Predict
from agents.replica import Use, in_thread
from agents.watch import WatchStep
from pipeline.deployments import Version
from pipeline.energy import EnergyMeter
from pipeline.errors import ConfigurationError
from pipeline.events import ImageEvent, Record
from pipeline.inference import Outcome, Predicted, Request, proof
from pipeline.inference.proof import Placed, load_where_proved
from pipeline.models import LoadOptions, Model, Output, resolve_device
from pipeline.models.disagreement import disagreement, structured_pictures
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
    assert disagreement(_outputs(found.models[1]), _outputs(placed(name).models[0])) < 1e-3
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
    return model.forward(structured_pictures(model.view, 4, CPU))


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proved where torch sees nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
