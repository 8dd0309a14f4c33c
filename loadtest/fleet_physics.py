"""The physics of a made-up fleet: from what jobs demand and faults do to what sensors say, all GPUs at once.

Arrays have one value per GPU. In a step, clocks follow limits, power and heat of the step before; GPUs of one
synchronous job go at the pace of the slowest and wait busily for it; temperature follows power with inertia.
"""

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt

from loadtest.fleet_faults import Stress
from loadtest.fleet_jobs import Job
from loadtest.fleet_models import GpuModel
from loadtest.fleet_sensors import Sensors
from pipeline.dcgm import CLOCK_EVENTS
from pipeline.telemetry import Sample

Floats = npt.NDArray[np.float64]

# Dynamic power grows with the clock and the square of the voltage, which falls with the clock.
_POWER_EXPONENT = 2.4
# What heavy kernels would need if nothing limited them, over the board's limit: SXM boards in training run into it.
_UNLIMITED = 1.08
# A GPU that spins in a collective operation draws a part of what it draws at work.
_WAITING = 0.45
_DAY_SECONDS = 86_400.0
_SHOWS_CELSIUS = 5.0
_SHOWS_SHARE = 0.02


class Physics:
    """State of all GPUs.

    Args:
        models: Of each GPU.
        rng: Draws what differs between them, and noise.
    """

    def __init__(self, models: Sequence[GpuModel], rng: np.random.Generator) -> None:
        self._rng = rng
        count = len(models)
        self.models = models

        def of(name: str) -> Floats:
            return np.array([float(getattr(model, name)) for model in models])

        self.idle_watts, self.limit_watts = of("idle_watts"), of("limit_watts")
        self.clock_mhz, self.operating, self.inertia = (
            of("clock_mhz"),
            of("operating_celsius"),
            of("inertia_seconds"),
        )
        self.slowdown = of("slowdown_celsius")
        self.has_fan = of("has_fan") > 0
        # Silicon and mounting differ; the second row of a chassis gets the air of the first.
        self.idle_watts = self.idle_watts * rng.normal(1.0, 0.04, count)
        self._need = _UNLIMITED * rng.normal(1.0, 0.015, count)
        self._resistance = of("resistance") * np.clip(rng.normal(1.0, 0.04, count), 0.88, 1.12)
        self._behind = np.where(np.arange(count) % 8 >= 4, 3.0, 0.0)
        hosts = -(-count // 8)
        self._inlet = np.repeat(rng.uniform(21.0, 26.0, hosts), 8)[:count]
        self._wander = rng.standard_normal(count)
        self.throttle = np.ones(count)
        self.temperature = self._inlet + self._behind + self._resistance * self.idle_watts
        # As it would be without any fault: what tells when a fault shows.
        self._healthy_temperature = self.temperature.copy()
        self.fan_percent = np.full(count, 30.0)
        self.memory_share = np.zeros(count)
        self.activity = np.zeros(count)
        self.busy = np.zeros(count)
        self.clock_share = np.zeros(count)
        self.power_watts = self.idle_watts.copy()
        self.intensity = np.zeros(count)
        self.reasons = np.zeros(count)
        self.power_limit_watts = self.limit_watts.copy()
        self.is_synchronous = np.zeros(count, dtype=np.bool_)
        self.stress = Stress(count)
        self.sensors = Sensors(models, rng)

    def step(self, seconds: float, interval: float, jobs: Sequence[Job], stress: Stress) -> None:
        """Go on by one interval.

        Args:
            seconds: Since the fleet's beginning.
            interval: Length of the step in seconds.
            jobs: That hold GPUs now.
            stress: What faults do now.
        """
        self.stress = stress
        keep = np.exp(-interval / 120.0)
        self._wander = keep * self._wander + np.sqrt(1 - keep**2) * self._rng.standard_normal(
            len(self.models)
        )
        groups = self._demand(seconds, jobs)
        self.activity[stress.hung] = 0.0
        wanted_power_share = self._set_clocks(interval, stress)
        self._set_pace(groups, stress)
        working = self.busy + _WAITING * (1.0 - self.busy) * self.is_synchronous
        dynamic = self.activity * working * wanted_power_share * self.clock_share**_POWER_EXPONENT
        noise = self._rng.normal(1.0, 0.008, len(self.models))
        self.power_watts = (self.idle_watts + dynamic * (self.limit_watts - self.idle_watts)) * noise
        held = self.memory_share > 0.01
        # A context on the GPU keeps it out of its deepest sleep.
        self.power_watts += np.where(held & (self.activity < 0.02), 0.04 * self.limit_watts, 0.0)
        self._heat(seconds, interval, stress)
        self.sensors.count(self, interval, stress)

    def shows(self, fault: str, gpu: int) -> bool:
        """Whether a fault that is on makes a difference to sensors by now."""
        if fault in ("thermal", "fan"):
            return bool(self.temperature[gpu] - self._healthy_temperature[gpu] >= _SHOWS_CELSIUS)
        if fault == "memory_leak":
            return bool(self.stress.leaked_share[gpu] >= _SHOWS_SHARE)
        return fault not in ("ecc", "nvlink", "pcie") or self.sensors.erred(fault, gpu)

    def reload_if_idle(self, gpus: npt.NDArray[np.int64]) -> bool:
        """Load the driver of a host anew if nothing runs there; whether it was done."""
        if self.memory_share[gpus].any():
            return False
        self.sensors.reset(gpus)
        return True

    def samples(self, uuids: Sequence[str], time: datetime, stress: Stress) -> list[Sample | None]:
        """Return what each GPU's sensors say now; None of one that nothing reports."""
        return self.sensors.read(self, uuids, time, stress)

    def _demand(self, seconds: float, jobs: Sequence[Job]) -> npt.NDArray[np.int64]:
        """Take over what jobs want; return the number of the synchronous job of each GPU, or -1."""
        groups = np.full(len(self.models), -1)
        self.activity[:] = 0.0
        self.intensity[:] = 0.0
        self.memory_share[:] = 0.0
        for number, job in enumerate(jobs):
            activity, intensity, memory = job.demand(seconds, self._wander[job.gpus])
            self.activity[job.gpus] = activity
            self.intensity[job.gpus] = intensity
            self.memory_share[job.gpus] = memory
            if job.is_synchronous and memory:
                groups[job.gpus] = number
        self.is_synchronous = groups >= 0
        leaking = (self.stress.leaked_share > 0) & (self.memory_share > 0)
        self.memory_share = np.where(
            leaking, np.minimum(0.999, self.memory_share + self.stress.leaked_share), self.memory_share
        )
        return groups

    def _set_clocks(self, interval: float, stress: Stress) -> Floats:
        """Let limits set clocks, and say why; return the power wanted at full clock as a share of what there is."""
        # The driver's slow controller keeps a GPU at its highest operating temperature.
        step = 0.0004 * interval * (self.operating - self.temperature)
        self.throttle = np.clip(self.throttle + step, 0.25, 1.0)
        self.power_limit_watts = np.where(
            stress.brake, self.limit_watts, self.limit_watts * stress.power_limit
        )
        real_limit = self.limit_watts * stress.power_limit
        wanted = self.intensity * self._need
        room = (real_limit - self.idle_watts) / (self.limit_watts - self.idle_watts)
        load = np.maximum(wanted * np.maximum(self.activity, 0.05), 1e-6)
        by_power = np.minimum(1.0, (room / load) ** (1.0 / _POWER_EXPONENT))
        clock = np.minimum(np.minimum(by_power, self.throttle), stress.clock)
        runs = self.activity > 0.01
        self.clock_share = np.where(runs, clock, 1.0)
        capped = runs & (by_power < 0.995) & (by_power <= clock + 1e-9)
        events = CLOCK_EVENTS
        self.reasons = np.where(runs, 0, events["gpu_idle"])
        self.reasons += np.where(capped & ~stress.brake, events["power_cap"], 0)
        self.reasons += np.where(stress.brake, events["hw_power_brake"] + events["hw_slowdown"], 0)
        self.reasons += np.where(self.throttle < 0.995, events["sw_thermal"], 0)
        hot = self.temperature >= self.slowdown
        self.reasons += np.where(hot, events["hw_thermal"] + events["hw_slowdown"] * ~stress.brake, 0)
        return wanted

    def _set_pace(self, groups: npt.NDArray[np.int64], stress: Stress) -> None:
        """Let the GPUs of a synchronous job wait for the slowest."""
        speed = np.maximum(self.clock_share * stress.feed, 1e-3)
        together = groups >= 0
        pace = np.full(int(groups.max(initial=-1)) + 1, np.inf)
        np.minimum.at(pace, groups[together], speed[together])
        # The rest of a step it spins in the collective operation, until the slowest has come.
        self.busy = np.ones(len(speed))
        self.busy[together] = pace[groups[together]] / speed[together]
        # One that waits for its input runs no kernel.
        self.activity = self.activity * stress.feed

    def _heat(self, seconds: float, interval: float, stress: Stress) -> None:
        air = self._inlet + self._behind + 1.5 * np.sin(2 * np.pi * seconds / _DAY_SECONDS)
        follow = 1.0 - np.exp(-interval / self.inertia)
        wanted_fan = np.clip(30.0 + 1.6 * (self.temperature - 45.0), 30.0, 95.0)
        self.fan_percent = np.where(self.has_fan, wanted_fan * stress.fan, 0.0)
        # Half the air at a third of the speed; without its fan a card still has that of the chassis.
        cooling = np.where(
            self.has_fan, 1.0 + 0.5 * (1.0 - np.maximum(self.fan_percent, 0.0) / 95.0) ** 2, 1.0
        )
        cooling = np.where(self.has_fan & (stress.fan == 0.0), 2.2, cooling)
        goal = air + self._resistance * stress.resistance * cooling * self.power_watts
        self.temperature += (goal - self.temperature) * follow
        healthy = air + self._resistance * np.minimum(cooling, 1.5) * self.power_watts
        self._healthy_temperature += (healthy - self._healthy_temperature) * follow
