"""Receipts say what a prediction cost in energy, by the real pynvml against a library that follows a script."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.energy import meter_of
from pipeline.models import Output
from tests.support import engines, models
from tests.support.engines import predicted
from tests.support.nvml import Script

CUDA = torch.device("cuda:0")


@pytest.fixture
def mapped(script: Script, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Have torch know the script's GPU 1 as its device 0; return how often it was synchronised with."""
    synchronised: list[torch.device] = []
    properties = SimpleNamespace(uuid=script.uuid(1).removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)
    return synchronised


async def test_receipts_share_the_energy_of_their_batch(
    script: Script, mapped: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture of a batch gets an equal part of what the GPU drew, and of that what it draws idle."""
    script.set({"gpu.1.power": 80_000, "gpu.1.energy": 1_000_000})
    meter = meter_of(CUDA)
    monkeypatch.setattr("pipeline.inference.engine.meter_of", lambda device: meter)
    drawn = 1_000_000

    def draw(batch: torch.Tensor) -> list[Output]:
        nonlocal drawn
        drawn += 6_000
        script.set({"gpu.1.energy": drawn})
        return [Output(score=1.0)] * len(batch)

    async with engines.running(models.BehavingModel("costly", draw)) as bench:
        names = [bench.submit() for _ in range(6)]
        outcomes = await bench.finished()
    receipts = [predicted(outcomes[name]).receipt for name in names]
    assert {receipt.gpu_uuid for receipt in receipts} == {script.uuid(1)}
    for receipt in receipts:
        assert receipt.batch_size is not None
        assert receipt.joules == pytest.approx(6 / receipt.batch_size)
        assert receipt.idle_joules is not None
        assert receipt.forward_seconds is not None
        assert 0 < receipt.idle_joules <= 80 * receipt.forward_seconds / receipt.batch_size + 1e-6
    batches = {receipt.batch_id for receipt in receipts}
    assert mapped == [CUDA] * 2 * len(batches)


def test_what_nvml_does_not_say_is_absent(script: Script, mapped: list[torch.device]) -> None:
    """A counter that fell, that fails or that is not there gives no joules; the GPU is named all the same."""
    meter = meter_of(CUDA)
    assert meter is not None
    begun = meter.begin()
    script.set({"gpu.1.energy": 5})
    after_reset = meter.end(begun)
    script.set({"gpu.1.lost": 1})
    lost = meter.end(meter.begin())
    script.set({"gpu.1.lost": None, "gpu.*.energy": "!3", "gpu.1.energy": None})
    unsupported = meter_of(CUDA)
    assert unsupported is not None
    without = unsupported.end(unsupported.begin())
    for energy in (after_reset, lost, without):
        assert (energy.gpu_uuid, energy.joules, energy.idle_joules) == (script.uuid(1), None, None)


def test_there_is_no_meter_without_a_gpu(script: Script, mapped: list[torch.device]) -> None:
    """A CPU has no meter, and a GPU that NVML does not know has one that says nothing."""
    assert meter_of(torch.device("cpu")) is None
    script.set({"init": "!12"})
    meter = meter_of(CUDA)
    assert meter is not None
    assert meter.end(meter.begin()).joules is None
