"""Receipts say what a prediction cost in energy, by the real pynvml against a library that follows a script."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY

from pipeline.energy import Energy, EnergyMeter, meter_of
from pipeline.errors import FatalError
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


class Clock:
    """Time that goes on when told, while the GPU draws."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.now, self.millijoules = 100.0, 1_000_000

    def __call__(self) -> float:
        return self.now

    def go_on(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.millijoules += round(seconds * watts * 1000)
        self._script.set({"gpu.1.energy": self.millijoules})


@pytest.fixture
def clock(script: Script) -> Clock:
    """Return a clock, of a GPU that draws 80 W idle."""
    script.set({"gpu.1.power": 80_000, "gpu.1.energy": 1_000_000})
    return Clock(script)


def passed(meter: EnergyMeter, clock: Clock, seconds: float, watts: float) -> Energy:
    meter.begin()
    clock.go_on(seconds, watts)
    return meter.end()


def test_the_counter_tells_what_passes_draw(
    script: Script, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes are charged for their time at the power of a GPU at work; what is drawn between them is not theirs."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("NVML_STAND_IN_CALLS", str(calls))
    meter = EnergyMeter(script.uuid(1), lambda: None, clock)
    for _ in range(40):
        charged = passed(meter, clock, 0.025, 480)
        clock.go_on(0.025, 80)
    assert charged.joules == pytest.approx(12)
    assert charged.idle_joules == pytest.approx(2)
    assert calls.read_text().splitlines().count("1 energy") < 10  # not for each of 40 passes
    clock.go_on(3600, 95)  # of an hour's pause nothing is anybody's
    charged = [passed(meter, clock, 0.1, 300) for _ in range(20)][-1]
    assert charged.joules == pytest.approx(30)
    assert passed(meter, clock, 0.1, 0).joules == pytest.approx(30)
    clock.go_on(60, 80)
    charged = passed(meter, clock, 0.1, 0)  # the counter's next step is yet to come
    assert charged.joules == charged.idle_joules == pytest.approx(8)


async def test_receipts_share_the_energy_of_their_batch(
    script: Script, mapped: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture of a batch is charged an equal part, which is no less than what the GPU draws idle."""
    script.set({"gpu.1.power": 80_000, "gpu.1.energy": 1_000_000})
    meter = meter_of(CUDA)
    counted = REGISTRY.get_sample_value("millrace_forward_joules_total") or 0.0
    monkeypatch.setattr("pipeline.inference.engine.meter_of", lambda device: meter)
    drawn = 1_000_000

    def draw(batch: torch.Tensor) -> list[Output]:
        nonlocal drawn
        drawn += 60_000
        script.set({"gpu.1.energy": drawn})
        return [Output(score=1.0)] * len(batch)

    async with engines.running(models.BehavingModel("costly", draw)) as bench:
        names = [bench.submit() for _ in range(6)]
        outcomes = await bench.finished()
    receipts = [predicted(outcomes[name]).receipt for name in names]
    batches = {receipt.batch_id: receipt for receipt in receipts}
    for receipt in receipts:
        assert receipt.gpu_uuid == script.uuid(1)
        assert receipt.joules is not None
        assert receipt.idle_joules is not None
        assert receipt.forward_seconds is not None
        assert 0 < receipt.idle_joules <= receipt.joules
        assert receipt.joules == batches[receipt.batch_id].joules
        assert receipt.idle_joules <= 80 * receipt.forward_seconds / (receipt.batch_size or 1) + 1e-6
    assert mapped == [CUDA] * 2 * len(batches)
    charged = sum(receipt.joules or 0.0 for receipt in receipts)
    assert REGISTRY.get_sample_value("millrace_forward_joules_total") == pytest.approx(
        counted + charged, abs=1e-4
    )


def test_what_nvml_does_not_say_is_absent(script: Script, clock: Clock) -> None:
    """A counter that fell, that fails or that is not there gives no joules; the GPU is named all the same."""
    meter = EnergyMeter(script.uuid(1), lambda: None, clock)
    assert passed(meter, clock, 1.0, 100).joules == pytest.approx(100)
    clock.millijoules = 5
    after_reset = passed(meter, clock, 1.0, 100)
    assert passed(meter, clock, 1.0, 100).joules == pytest.approx(100)
    script.set({"gpu.1.lost": 1})
    lost = passed(meter, clock, 1.0, 100)
    script.set({"gpu.1.lost": None})
    assert passed(meter, clock, 1.0, 100).joules == pytest.approx(100)
    script.set({"gpu.*.energy": "!3", "gpu.1.energy": None})
    unsupported = EnergyMeter(script.uuid(1), lambda: None)
    unsupported.begin()
    for energy in (after_reset, lost, unsupported.end()):
        assert (energy.gpu_uuid, energy.joules, energy.idle_joules) == (script.uuid(1), None, None)


async def test_a_device_that_is_lost_between_passes_is_no_models_fault(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails while the meter waits for the device is not laid on the model that was at work last."""
    errors = iter(["", "", "CUDA error: unspecified launch failure"])

    def synchronise() -> None:
        if error := next(errors):
            raise RuntimeError(error)

    meter = EnergyMeter(script.uuid(1), synchronise)
    monkeypatch.setattr("pipeline.inference.engine.meter_of", lambda device: meter)
    async with engines.running() as bench:
        bench.submit()
        await bench.finished()
        bench.submit()
        with pytest.raises(FatalError, match=r"the device is lost: RuntimeError: CUDA error: unspecified"):
            await asyncio.wait_for(bench.engine.fatal, 20)


def test_there_is_no_meter_without_a_gpu(
    script: Script, mapped: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no meter, nor a GPU without a name; one that NVML does not know has one that says nothing."""
    assert meter_of(torch.device("cpu")) is None
    script.set({"init": "!12"})
    meter = meter_of(CUDA)
    assert meter is not None
    meter.begin()
    assert meter.end().joules is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert meter_of(CUDA) is None
