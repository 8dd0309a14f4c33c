"""What a forward pass costs in energy, by NVML's counter for the whole GPU.

The counter is the board's: whatever else runs on the GPU at the time is in it, and it moves in steps of some ten
milliseconds, so that one short pass may read as nothing or too much, and only many tell the truth. Who divides it
by the pictures of a batch allocates, and does not measure. Where NVML has no counter nothing is said. Blocks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import logs

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one pass; absent is not known."""

    gpu_uuid: str | None = None
    joules: float | None = None
    #: What the GPU would have drawn in that time had it stood idle.
    idle_joules: float | None = None


@dataclass(frozen=True, slots=True)
class _Begun:
    at: float
    millijoules: int | None


class EnergyMeter:
    """Reads a GPU's counter at both ends of a pass; for one thread.

    `synchronise` returns when the GPU has done all that it was given. What the GPU draws when the meter is made,
    before any pass, is taken as what it draws idle.
    """

    def __init__(self, gpu_uuid: str, synchronise: Callable[[], None]) -> None:
        self.gpu_uuid = gpu_uuid
        self._synchronise = synchronise
        self._nvml: Any = None
        self._handle: Any = None
        self._idle_watts: float | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
            self._nvml = pynvml
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._idle_watts = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        except (
            Exception
        ) as error:  # no package, no library, no such GPU, no counter: predictions go on without
            _log.info("receipts will lack joules or their idle share", gpu_uuid=gpu_uuid, error=str(error))

    def begin(self) -> _Begun:
        """Say that a pass begins."""
        self._synchronise()
        return _Begun(time.monotonic(), self._millijoules())

    def end(self, begun: _Begun) -> Energy:
        """Return what was drawn since `begun`; a counter that fell was reset, and says nothing."""
        self._synchronise()
        now = self._millijoules()
        if begun.millijoules is None or now is None or now < begun.millijoules:
            return Energy(self.gpu_uuid)
        seconds = time.monotonic() - begun.at
        idle = None if self._idle_watts is None else self._idle_watts * seconds
        return Energy(self.gpu_uuid, (now - begun.millijoules) / 1000, idle)

    def _millijoules(self) -> int | None:
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None


def meter_of(device: torch.device) -> EnergyMeter | None:
    """Return the meter of a CUDA device; of any other there is none."""
    if device.type != "cuda":
        return None
    # torch counts devices as CUDA_VISIBLE_DEVICES says, NVML counts all; the UUID is the same, less its prefix.
    gpu_uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return EnergyMeter(gpu_uuid, lambda: torch.cuda.synchronize(device))
