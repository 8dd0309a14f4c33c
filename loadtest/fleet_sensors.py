"""The sensors of a made-up fleet: what counts up, how values are rounded, and which each kind of GPU has."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loadtest.fleet_faults import Stress
from loadtest.fleet_models import GpuModel
from pipeline.telemetry import Sample

if TYPE_CHECKING:
    from loadtest.fleet_physics import Physics

Floats = npt.NDArray[np.float64]

# Healthy memory has a corrected error now and then; some GPUs have one every few hours.
_CORRECTED_PER_SECOND = 1.0 / (10 * 86_400)
_WEAK_CORRECTED_PER_SECOND = 1.0 / (8 * 3600)
_WEAK_SHARE = 0.02
_REPLAYS_PER_SECOND = 1.0 / (3 * 86_400)
_NVLINK_ERRORS_PER_SECOND = 1.0 / (5 * 86_400)
# A value that one scrape did not bring.
_MISSING = 0.0005
_PCIE_BYTES_PER_SECOND = 12e9
_NVLINK_BYTES_PER_SECOND = 180e9


class Sensors:
    """Counters and values of all GPUs."""

    def __init__(self, models: Sequence[GpuModel], rng: np.random.Generator) -> None:
        count = len(models)
        self._rng = rng
        self._models = models
        self._columns: dict[str, list[str]] = {}
        hours = rng.uniform(10, 2000, count)
        self.energy_millijoules = hours * 3600 * 1000 * 200
        self.power_violation = rng.uniform(0, 1e12, count)
        self.thermal_violation = np.zeros(count)
        self.corrected = np.zeros(count)
        self.corrected_before = rng.poisson(0.5, count).astype(float)
        self.uncorrected = np.zeros(count)
        self.uncorrected_before = np.zeros(count)
        self.remapped = (rng.random(count) < 0.02).astype(float)
        self.remapped_uncorrected = np.zeros(count)
        self.remap_pending = np.zeros(count)
        self.remap_failed = np.zeros(count)
        self.replays = rng.poisson(2.0, count).astype(float)
        self.nvlink_errors = np.zeros(count)
        self.nvlink_replays = np.zeros(count)
        self.nvlink_recoveries = np.zeros(count)
        self.last_xid = np.zeros(count)
        self._weak = np.where(
            rng.random(count) < _WEAK_SHARE, _WEAK_CORRECTED_PER_SECOND, _CORRECTED_PER_SECOND
        )
        self._new: dict[str, npt.NDArray[np.bool_]] = {}

    def count(self, physics: "Physics", interval: float, stress: Stress) -> None:
        """Count up what happened in a step."""
        rng, count = self._rng, len(self._models)
        self.energy_millijoules += physics.power_watts * interval * 1000.0
        reasons = physics.reasons.astype(int)
        self.power_violation += np.where(reasons & 0x84, interval * 1e9 * (1.0 - physics.clock_share), 0.0)
        self.thermal_violation += np.where(reasons & 0x60, interval * 1e9 * (1.0 - physics.throttle), 0.0)
        errors = rng.poisson((self._weak + stress.corrected_per_second) * interval)
        self.corrected += errors
        replays = rng.poisson((_REPLAYS_PER_SECOND + stress.replays_per_second) * interval)
        self.replays += replays
        crc = rng.poisson((_NVLINK_ERRORS_PER_SECOND + stress.nvlink_errors_per_second) * interval)
        self.nvlink_errors += crc
        again = rng.random(count) < np.minimum(1.0, 0.3 * crc)
        self.nvlink_replays += again * np.ceil(crc * 0.3)
        self.nvlink_recoveries += rng.random(count) < np.minimum(0.5, 0.002 * crc)
        self._new = {
            "ecc": (errors > 0) & (stress.corrected_per_second > 0),
            "pcie": (replays > 0) & (stress.replays_per_second > 0),
            "nvlink": (crc > 0) & (stress.nvlink_errors_per_second > 0),
        }
        for gpu, fails in stress.uncorrected.items():
            self.uncorrected[gpu] += 1
            self.remapped_uncorrected[gpu] += not fails
            self.remap_pending[gpu] = 1
            self.remap_failed[gpu] = fails
        for gpu, xids in stress.xids.items():
            self.last_xid[gpu] = xids[-1]

    def erred(self, fault: str, gpu: int) -> bool:
        """Whether a fault that makes errors made one in the last step."""
        return bool(self._new[fault][gpu])

    def reset(self, gpus: npt.NDArray[np.int64]) -> None:
        """Load the driver anew: what it counts begins at zero, and rows that wait are remapped."""
        self.corrected_before[gpus] += self.corrected[gpus]
        self.uncorrected_before[gpus] += self.uncorrected[gpus]
        for counter in (
            self.energy_millijoules, self.power_violation, self.thermal_violation, self.corrected, self.uncorrected,
            self.replays, self.nvlink_errors, self.nvlink_replays, self.nvlink_recoveries, self.remap_pending,
            self.last_xid,
        ):  # fmt: skip
            counter[gpus] = 0.0

    def read(
        self, physics: "Physics", uuids: Sequence[str], time: datetime, stress: Stress
    ) -> list[Sample | None]:
        """Return a sample of each GPU; None of one that nothing reports."""
        values = self._values(physics, stress)
        table = np.stack(list(values.values()), axis=1)  # (N, F)
        names = list(values)
        columns = {model.name: self._columns_of(model, names) for model in set(self._models)}
        indices = {name: [names.index(column) for column in own] for name, own in columns.items()}
        missing = dict.fromkeys(
            np.flatnonzero(self._rng.random(len(uuids)) < _MISSING * len(names)).tolist(), ""
        )
        found: list[Sample | None] = []
        rows = table.tolist()
        for gpu, row in enumerate(rows):
            if stress.silent[gpu]:
                found.append(None)
                continue
            xids = tuple(stress.xids.get(gpu, ()))
            if stress.lost[gpu]:
                found.append(Sample(gpu_uuid=uuids[gpu], time=time, state="lost", xids=xids))
                continue
            model = self._models[gpu].name
            own = {names[index]: row[index] for index in indices[model]}
            if gpu in missing:
                own.pop(columns[model][int(self._rng.integers(len(own)))])
            found.append(Sample(gpu_uuid=uuids[gpu], time=time, values=own, xids=xids))
        return found

    def _values(self, physics: "Physics", stress: Stress) -> dict[str, Floats]:
        rng, models = self._rng, self._models
        count = len(models)

        def of(name: str) -> Floats:
            return np.array([float(getattr(model, name)) for model in models])

        runs = physics.activity > 0.01
        temperature = np.round(physics.temperature + rng.normal(0.0, 0.3, count))
        sm_clock = np.where(runs, physics.clock_share * physics.clock_mhz, of("idle_clock_mhz"))
        busy = physics.activity * physics.busy
        heavy = physics.intensity * busy
        utilization = np.clip(100.0 * physics.activity + rng.normal(0.0, 0.6, count) * runs, 0, 100)
        total, reserved = of("memory_mebibytes"), of("reserved_mebibytes")
        used = np.round(physics.memory_share * (total - reserved - 10.0))
        power = np.round(physics.power_watts, 3)
        bus = np.clip(0.1 * busy * rng.normal(1.0, 0.1, count), 0.0, 1.0) * stress.link
        link = np.clip(heavy * physics.is_synchronous * rng.normal(1.0, 0.04, count), 0.0, 1.5) * stress.link
        return {
            "sm_clock_mhz": np.round(sm_clock / 15.0) * 15.0,
            "memory_clock_mhz": np.where(runs, of("memory_clock_mhz"), of("idle_memory_clock_mhz")),
            "clock_event_reasons": physics.reasons.astype(float),
            "memory_temperature_celsius": np.round(physics.temperature + 5.0 + 6.0 * heavy),
            "temperature_celsius": temperature,
            "temperature_margin_celsius": physics.operating - temperature,
            "power_watts": power,
            "energy_millijoules": np.floor(self.energy_millijoules),
            "slowdown_temperature_celsius": physics.slowdown,
            "power_limit_watts": np.round(physics.power_limit_watts, 3),
            "performance_state": np.where(
                runs | (physics.memory_share > 0.01), 0.0, np.where(of("has_nvlink") > 0, 0.0, 8.0)
            ),
            "fan_speed_percent": np.round(physics.fan_percent),
            "pcie_replays": self.replays.copy(),
            "utilization_percent": np.round(utilization),
            "memory_copy_percent": np.round(
                np.clip(55.0 * heavy + rng.normal(0.0, 1.0, count) * runs, 0, 100)
            ),
            "last_xid": self.last_xid.copy(),
            "power_violation_nanoseconds": np.floor(self.power_violation),
            "thermal_violation_nanoseconds": np.floor(self.thermal_violation),
            "memory_free_mebibytes": total - reserved - used,
            "memory_used_mebibytes": used,
            "memory_reserved_mebibytes": reserved,
            "ecc_corrected_volatile": self.corrected.copy(),
            "ecc_uncorrected_volatile": self.uncorrected.copy(),
            "ecc_corrected_lifetime": self.corrected_before + self.corrected,
            "ecc_uncorrected_lifetime": self.uncorrected_before + self.uncorrected,
            "rows_remapped_uncorrected": self.remapped_uncorrected.copy(),
            "rows_remapped_corrected": self.remapped.copy(),
            "row_remap_failed": self.remap_failed.copy(),
            "row_remap_pending": self.remap_pending.copy(),
            "nvlink_crc_flit_errors": self.nvlink_errors.copy(),
            "nvlink_crc_data_errors": np.floor(self.nvlink_errors * 0.1),
            "nvlink_replays": self.nvlink_replays.copy(),
            "nvlink_recoveries": self.nvlink_recoveries.copy(),
            "graphics_engine_ratio": np.round(physics.activity, 4),
            "sm_active_ratio": np.round(np.clip(busy * 0.9 + 0.05 * runs, 0, 1), 4),
            "tensor_active_ratio": np.round(np.clip(heavy * 0.6 * rng.normal(1.0, 0.02, count), 0, 1), 4),
            "dram_active_ratio": np.round(np.clip(heavy * 0.5 * rng.normal(1.0, 0.03, count), 0, 1), 4),
            "pcie_tx_bytes_per_second": np.round(_PCIE_BYTES_PER_SECOND * bus),
            "pcie_rx_bytes_per_second": np.round(_PCIE_BYTES_PER_SECOND * 1.4 * bus),
            "nvlink_tx_bytes_per_second": np.round(_NVLINK_BYTES_PER_SECOND * link),
            "nvlink_rx_bytes_per_second": np.round(_NVLINK_BYTES_PER_SECOND * link),
        }

    def _columns_of(self, model: GpuModel, names: Sequence[str]) -> list[str]:
        """Return the names of the values that a kind of GPU has."""
        known = self._columns.get(model.name)
        if known is None:
            absent: set[str] = set()
            if not model.has_margin:
                absent.add("temperature_margin_celsius")
            if not model.has_fan:
                absent.add("fan_speed_percent")
            if not model.has_memory_temperature:
                absent.add("memory_temperature_celsius")
            absent |= {
                name
                for name in names
                if (name.startswith("nvlink") and not model.has_nvlink)
                or (name.startswith(("ecc", "row")) and not model.has_ecc)
                or (name.endswith(("_ratio", "_bytes_per_second")) and not model.has_profiling)
            }
            known = self._columns[model.name] = [name for name in names if name not in absent]
        return known
