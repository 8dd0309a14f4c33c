"""What a forward pass costs in energy, by NVML's counter for the whole GPU.

Reading the counter takes milliseconds and it moves in steps of about 100 ms (measured by others, on one card), so
it is not read for every pass: over half a second of passes at least, the power of a GPU at work is what was drawn,
less what an idle GPU draws between passes, over the time at work. A pass is charged that power for its time. The
counter is the board's: whatever else runs on it is in it. Where NVML has no counter nothing is said. Blocks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import logs

# Five steps of the counter; a reading of some 3 ms is then half a percent of the time.
WINDOW_SECONDS = 0.5
# Where passes are rare no window gets so long, and what was learned is forgotten after this.
_OLD_SECONDS = 5.0

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one pass; absent is not known."""

    gpu_uuid: str | None = None
    joules: float | None = None
    #: What the GPU would have drawn in that time had it stood idle.
    idle_joules: float | None = None


@dataclass(slots=True)
class _Window:
    """Passes since the counter was read last."""

    at: float
    millijoules: int
    busy_seconds: float = 0.0


class EnergyMeter:
    """Charges passes for what a GPU draws; for one thread.

    `synchronise` returns when the GPU has done all that it was given. What the GPU draws when the meter is made,
    before any pass, is taken as what it draws idle. `clock` is monotonic, in seconds.
    """

    def __init__(
        self, gpu_uuid: str, synchronise: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.gpu_uuid = gpu_uuid
        self._synchronise = synchronise
        self._clock = clock
        self._nvml: Any = None
        self._handle: Any = None
        self._idle_watts = 0.0
        self._window: _Window | None = None
        self._began_at = 0.0
        self._watts: float | None = None
        self._watts_at = 0.0
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._idle_watts = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
            self._nvml = pynvml
        except Exception as error:  # no package, library or GPU of it, no counter: predictions go on without
            _log.info("receipts will lack joules", gpu_uuid=gpu_uuid, error=str(error))

    def begin(self) -> None:
        """Say that a pass begins."""
        self._synchronise()
        if self._window is None or self._clock() > self._window.at + 2 * WINDOW_SECONDS:
            self._window = self._read()  # after a pause: its energy is nobody's
        self._began_at = self._clock()

    def end(self) -> Energy:
        """Return what the pass since `begin` is charged."""
        self._synchronise()
        seconds = self._clock() - self._began_at
        if self._window is not None:
            self._window.busy_seconds += seconds
            is_old = self._watts is None or self._clock() > self._watts_at + _OLD_SECONDS
            if is_old or self._clock() >= self._window.at + WINDOW_SECONDS:
                self._close_window(self._window)
        if self._watts is None:
            return Energy(self.gpu_uuid)
        return Energy(self.gpu_uuid, self._watts * seconds, self._idle_watts * seconds)

    def _close_window(self, window: _Window) -> None:
        """Learn what the GPU draws at work; a counter that fell was reset, and says nothing."""
        self._window = now = self._read()
        if now is None or now.millijoules < window.millijoules or window.busy_seconds <= 0:
            self._watts = None
            return
        idle_seconds = max(0.0, now.at - window.at - window.busy_seconds)
        drawn = (now.millijoules - window.millijoules) / 1000 - self._idle_watts * idle_seconds
        # At work a GPU draws no less than idle; a step of the counter that is yet to come may look like it.
        self._watts = max(self._idle_watts, drawn / window.busy_seconds)
        self._watts_at = now.at

    def _read(self) -> _Window | None:
        if self._nvml is None:
            return None
        at = self._clock()
        try:
            return _Window(at, int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)))
        except self._nvml.NVMLError:
            return None


def meter_of(device: torch.device) -> EnergyMeter | None:
    """Return the meter of a CUDA device; of any other there is none, nor of one that torch cannot name."""
    if device.type != "cuda":
        return None
    try:
        # torch counts devices as CUDA_VISIBLE_DEVICES says, NVML counts all; the UUID is the same, less its prefix.
        gpu_uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except Exception as error:  # if the device is lost, the models will say so
        _log.info("receipts will lack joules", device=str(device), error=str(error))
        return None
    return EnergyMeter(gpu_uuid, lambda: torch.cuda.synchronize(device))
