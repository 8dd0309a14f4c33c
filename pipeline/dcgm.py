"""The one table of GPU fields: what each is called, its unit, its kind, and which values mean "not known".

It drives the collector, the scraper, replay, storage, the API and the docs. A field is keyed by its DCGM id; the
classic name (dumps, dashboards), the name of DCGM 4.6 and ours, which carries the unit, all lead to it. Values stay
in DCGM's units: what a dump says comes back from the API unchanged. A blank or unsupported value is absent, never
zero. No I/O.

Sources: DCGM 4.6 `dcgm_fields.py` and `dcgm_fields.h` (ids, names), the NVML API reference (calls), OpenTelemetry
semantic conventions `hw.gpu` (status: development).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

#: A counter never falls but by a reset; a bitmask and a state have no mean.
Kind = Literal["gauge", "counter", "bitmask", "state"]

# DCGM's blanks and the three codes after each (not found, not supported, not permitted), `dcgm_structs.h`.
_FP64_BLANK = 140737488355328.0
_INT64_BLANK = 0x7FFFFFFFFFFFFFF0
_INT32_BLANK = 0x7FFFFFF0
# As a float the 64-bit blanks round to 2**63, and nothing real is so large.
_INT64_BLANK_AS_FLOAT = float(_INT64_BLANK)

_PERCENT = 100.0
_NANOSECONDS = 1e18  # thirty years
_COUNT = 2.0**53  # what a float holds exactly


@dataclass(frozen=True, slots=True)
class Field:
    """One field; see the module for names and units."""

    id: int
    #: Ours: a column of `gpu_samples`, a key of `Sample.values`, a field of the API.
    name: str
    #: Without `DCGM_FI_`.
    classic: str
    unit: str
    kind: Kind
    help: str
    #: Without `DCGM_FI_`; empty: DCGM 4.6 kept the classic name.
    modern: str = ""
    #: The NVML call or field that gives it; empty: NVML has none that is cheap.
    nvml: str = ""
    otel: str = ""
    minimum: float = 0.0
    maximum: float = _COUNT

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that leads to the field."""
        long = [f"DCGM_FI_{self.classic}", *([f"DCGM_FI_{self.modern}"] if self.modern else [])]
        return (self.name, *long)


FIELDS: tuple[Field, ...] = (
    Field(100, "sm_clock_mhz", "DEV_SM_CLOCK", "MHz", "gauge", "SM clock.",
          nvml="nvmlDeviceGetClockInfo", maximum=20_000),
    Field(101, "memory_clock_mhz", "DEV_MEM_CLOCK", "MHz", "gauge", "Memory clock.",
          nvml="nvmlDeviceGetClockInfo", maximum=50_000),
    Field(112, "clock_event_reasons", "DEV_CLOCK_THROTTLE_REASONS", "bits", "bitmask",
          "Why clocks are lower than they could be; see CLOCK_EVENTS.",
          modern="DEV_CLOCKS_EVENT_REASONS", nvml="nvmlDeviceGetCurrentClocksEventReasons"),
    Field(140, "memory_temperature_celsius", "DEV_MEMORY_TEMP", "Cel", "gauge", "Temperature of the memory.",
          modern="DEV_MEMORY_TEMP_CELSIUS", nvml="NVML_FI_DEV_MEMORY_TEMP", otel="hw.temperature",
          minimum=-60, maximum=250),
    Field(150, "temperature_celsius", "DEV_GPU_TEMP", "Cel", "gauge", "Temperature of the GPU.",
          modern="DEV_GPU_TEMP_CELSIUS", nvml="nvmlDeviceGetTemperatureV", otel="hw.temperature",
          minimum=-60, maximum=250),
    Field(153, "temperature_margin_celsius", "DEV_GPU_TEMP_LIMIT", "Cel", "gauge",
          "Degrees left to the nearest slowdown threshold.",
          modern="DEV_GPU_TEMP_MARGIN_CELSIUS", nvml="nvmlDeviceGetMarginTemperature",
          minimum=-250, maximum=250),
    Field(155, "power_watts", "DEV_POWER_USAGE", "W", "gauge", "Power drawn by the board, averaged by the driver.",
          modern="DEV_BOARD_POWER_WATTS", nvml="nvmlDeviceGetPowerUsage", otel="hw.power", maximum=20_000),
    Field(156, "energy_millijoules", "DEV_TOTAL_ENERGY_CONSUMPTION", "mJ", "counter",
          "Energy since the driver was loaded.",
          nvml="NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION", otel="hw.energy"),
    Field(157, "power_instant_watts", "DEV_POWER_USAGE_INSTANT", "W", "gauge", "Power drawn at this moment.",
          modern="DEV_BOARD_POWER_RAW_WATTS", nvml="NVML_FI_DEV_POWER_INSTANT", maximum=20_000),
    Field(158, "slowdown_temperature_celsius", "DEV_SLOWDOWN_TEMP", "Cel", "gauge", "Clocks fall from here on.",
          modern="DEV_GPU_TEMP_SLOWDOWN_CELSIUS", nvml="nvmlDeviceGetTemperatureThreshold(SLOWDOWN)",
          minimum=-60, maximum=250),
    Field(159, "shutdown_temperature_celsius", "DEV_SHUTDOWN_TEMP", "Cel", "gauge", "The GPU shuts down here.",
          modern="DEV_GPU_TEMP_SHUTDOWN_CELSIUS", nvml="nvmlDeviceGetTemperatureThreshold(SHUTDOWN)",
          minimum=-60, maximum=250),
    Field(164, "power_limit_watts", "DEV_ENFORCED_POWER_LIMIT", "W", "gauge", "Limit that the driver enforces.",
          modern="DEV_BOARD_POWER_LIMIT_ENFORCED_WATTS", nvml="nvmlDeviceGetEnforcedPowerLimit",
          maximum=20_000),
    Field(190, "performance_state", "DEV_PSTATE", "P", "state", "0 is the fastest, 15 the slowest.",
          modern="DEV_GPU_PSTATE", nvml="nvmlDeviceGetPerformanceState", maximum=32),
    Field(191, "fan_speed_percent", "DEV_FAN_SPEED", "%", "gauge", "Speed of the fan.",
          nvml="nvmlDeviceGetFanSpeed", maximum=200),
    Field(200, "pcie_tx_kilobytes_per_second", "DEV_PCIE_TX_THROUGHPUT", "kBy/s", "gauge", "Sent over PCIe."),
    Field(201, "pcie_rx_kilobytes_per_second", "DEV_PCIE_RX_THROUGHPUT", "kBy/s", "gauge", "Received over PCIe."),
    Field(202, "pcie_replays", "DEV_PCIE_REPLAY_COUNTER", "1", "counter", "Packets that PCIe sent again.",
          modern="DEV_PCIE_REPLAY_TOTAL", nvml="NVML_FI_DEV_PCIE_REPLAY_COUNTER"),
    Field(203, "utilization_percent", "DEV_GPU_UTIL", "%", "gauge",
          "Share of time in which a kernel ran; not known under MIG.",
          modern="DEV_GPU_UTIL_RATIO", nvml="nvmlDeviceGetUtilizationRates", otel="hw.gpu.utilization",
          maximum=_PERCENT),
    Field(204, "memory_copy_percent", "DEV_MEM_COPY_UTIL", "%", "gauge", "Share of time in which memory was used.",
          nvml="nvmlDeviceGetUtilizationRates", maximum=_PERCENT),
    Field(206, "encoder_percent", "DEV_ENC_UTIL", "%", "gauge", "Utilization of the video encoder.",
          nvml="nvmlDeviceGetEncoderUtilization", otel="hw.gpu.utilization", maximum=_PERCENT),
    Field(207, "decoder_percent", "DEV_DEC_UTIL", "%", "gauge", "Utilization of the video decoder.",
          nvml="nvmlDeviceGetDecoderUtilization", otel="hw.gpu.utilization", maximum=_PERCENT),
    Field(230, "last_xid", "DEV_XID_ERRORS", "1", "state",
          "Code of the last XID error; it stays, and a repeat does not show: `Sample.xids` has events.",
          modern="DEV_XID_ERROR", maximum=100_000),
    Field(240, "power_violation_nanoseconds", "DEV_POWER_VIOLATION", "ns", "counter",
          "Time slowed down by the power limit.", nvml="NVML_FI_DEV_PERF_POLICY_POWER", maximum=_NANOSECONDS),
    Field(241, "thermal_violation_nanoseconds", "DEV_THERMAL_VIOLATION", "ns", "counter",
          "Time slowed down by heat.", nvml="NVML_FI_DEV_PERF_POLICY_THERMAL", maximum=_NANOSECONDS),
    Field(250, "memory_total_mebibytes", "DEV_FB_TOTAL", "MiBy", "gauge", "Frame buffer.",
          nvml="nvmlDeviceGetMemoryInfo", otel="hw.gpu.memory.limit", maximum=1e9),
    Field(251, "memory_free_mebibytes", "DEV_FB_FREE", "MiBy", "gauge", "Free frame buffer.",
          nvml="nvmlDeviceGetMemoryInfo", maximum=1e9),
    Field(252, "memory_used_mebibytes", "DEV_FB_USED", "MiBy", "gauge", "Used frame buffer.",
          nvml="nvmlDeviceGetMemoryInfo", otel="hw.gpu.memory.usage", maximum=1e9),
    Field(253, "memory_reserved_mebibytes", "DEV_FB_RESERVED", "MiBy", "gauge", "Reserved by driver and firmware.",
          nvml="nvmlDeviceGetMemoryInfo", maximum=1e9),
    Field(310, "ecc_corrected_volatile", "DEV_ECC_SBE_VOL_TOTAL", "1", "counter",
          "Corrected memory errors since the driver was loaded.",
          nvml="NVML_FI_DEV_ECC_SBE_VOL_TOTAL", otel="hw.errors"),
    Field(311, "ecc_uncorrected_volatile", "DEV_ECC_DBE_VOL_TOTAL", "1", "counter",
          "Uncorrected memory errors since the driver was loaded.",
          nvml="NVML_FI_DEV_ECC_DBE_VOL_TOTAL", otel="hw.errors"),
    Field(312, "ecc_corrected_lifetime", "DEV_ECC_SBE_AGG_TOTAL", "1", "counter",
          "Corrected memory errors in the GPU's life.", nvml="NVML_FI_DEV_ECC_SBE_AGG_TOTAL"),
    Field(313, "ecc_uncorrected_lifetime", "DEV_ECC_DBE_AGG_TOTAL", "1", "counter",
          "Uncorrected memory errors in the GPU's life.", nvml="NVML_FI_DEV_ECC_DBE_AGG_TOTAL"),
    Field(390, "pages_retired_corrected", "DEV_RETIRED_SBE", "1", "counter", "Pages retired for corrected errors.",
          modern="DEV_PAGE_RETIRED_SBE_TOTAL", nvml="NVML_FI_DEV_RETIRED_SBE"),
    Field(391, "pages_retired_uncorrected", "DEV_RETIRED_DBE", "1", "counter",
          "Pages retired for uncorrected errors.",
          modern="DEV_PAGE_RETIRED_DBE_TOTAL", nvml="NVML_FI_DEV_RETIRED_DBE"),
    Field(392, "pages_retired_pending", "DEV_RETIRED_PENDING", "1", "gauge", "Pages that wait for a reset.",
          modern="DEV_PAGE_RETIRED_PENDING", nvml="NVML_FI_DEV_RETIRED_PENDING"),
    Field(393, "rows_remapped_uncorrected", "DEV_UNCORRECTABLE_REMAPPED_ROWS", "1", "counter",
          "Rows remapped for uncorrected errors.",
          modern="DEV_ROW_REMAP_UNCORRECTABLE_TOTAL", nvml="NVML_FI_DEV_REMAPPED_UNC"),
    Field(394, "rows_remapped_corrected", "DEV_CORRECTABLE_REMAPPED_ROWS", "1", "counter",
          "Rows remapped for corrected errors.",
          modern="DEV_ROW_REMAP_CORRECTABLE_TOTAL", nvml="NVML_FI_DEV_REMAPPED_COR"),
    Field(395, "row_remap_failed", "DEV_ROW_REMAP_FAILURE", "bool", "state", "A row could not be remapped.",
          modern="DEV_ROW_REMAP_FAILED", nvml="NVML_FI_DEV_REMAPPED_FAILURE", maximum=1e6),
    Field(396, "row_remap_pending", "DEV_ROW_REMAP_PENDING", "bool", "state", "A row waits for the next reset.",
          nvml="NVML_FI_DEV_REMAPPED_PENDING", maximum=1e6),
    Field(409, "nvlink_crc_flit_errors", "DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", "1", "counter",
          "NVLink flow-control errors, all links.",
          modern="DEV_NVLINK_CRC_FLIT_ERROR_TOTAL", nvml="NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),
    Field(419, "nvlink_crc_data_errors", "DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", "1", "counter",
          "NVLink data errors, all links.",
          modern="DEV_NVLINK_CRC_DATA_ERROR_TOTAL", nvml="NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL"),
    Field(429, "nvlink_replays", "DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL", "1", "counter",
          "NVLink packets sent again, all links.",
          modern="DEV_NVLINK_REPLAY_ERROR_TOTAL", nvml="NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL"),
    Field(439, "nvlink_recoveries", "DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL", "1", "counter",
          "NVLink recoveries, all links.",
          modern="DEV_NVLINK_RECOVERY_ERROR_TOTAL", nvml="NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),
    Field(449, "nvlink_bandwidth", "DEV_NVLINK_BANDWIDTH_TOTAL", "MBy/s", "gauge", "Throughput of all NVLinks.",
          modern="DEV_NVLINK_THROUGHPUT_TOTAL"),
    Field(1001, "graphics_engine_ratio", "PROF_GR_ENGINE_ACTIVE", "1", "gauge", "Graphics or compute engine busy.",
          modern="PROF_GR_ENGINE_UTIL_RATIO", maximum=1.5),
    Field(1002, "sm_active_ratio", "PROF_SM_ACTIVE", "1", "gauge", "Cycles an SM has a warp.",
          modern="PROF_SM_UTIL_RATIO", maximum=1.5),
    Field(1003, "sm_occupancy_ratio", "PROF_SM_OCCUPANCY", "1", "gauge", "Warps resident of those possible.",
          modern="PROF_SM_OCCUPANCY_RATIO", maximum=1.5),
    Field(1004, "tensor_active_ratio", "PROF_PIPE_TENSOR_ACTIVE", "1", "gauge", "Tensor pipe active.",
          modern="PROF_TENSOR_UTIL_RATIO", maximum=1.5),
    Field(1005, "dram_active_ratio", "PROF_DRAM_ACTIVE", "1", "gauge", "Memory interface active.",
          modern="PROF_DRAM_UTIL_RATIO", maximum=1.5),
    Field(1009, "pcie_tx_bytes_per_second", "PROF_PCIE_TX_BYTES", "By/s", "gauge", "Sent over PCIe."),
    Field(1010, "pcie_rx_bytes_per_second", "PROF_PCIE_RX_BYTES", "By/s", "gauge", "Received over PCIe."),
    Field(1011, "nvlink_tx_bytes_per_second", "PROF_NVLINK_TX_BYTES", "By/s", "gauge", "Sent over NVLink."),
    Field(1012, "nvlink_rx_bytes_per_second", "PROF_NVLINK_RX_BYTES", "By/s", "gauge", "Received over NVLink."),
)  # fmt: skip

BY_NAME: Mapping[str, Field] = {name: field for field in FIELDS for name in field.names}
NAMES = tuple(field.name for field in FIELDS)
_CANONICAL = frozenset(NAMES)
#: Of a value between these nothing needs to be asked; what is outside is judged by `why_dropped`.
PLAIN: Mapping[str, tuple[float, float]] = {
    field.name: (
        field.minimum,
        min(field.maximum, (_FP64_BLANK if field.kind == "counter" else float(_INT32_BLANK)) - 1),
    )
    for field in FIELDS
}
_LIMITS = {field.name: (field.minimum, field.maximum, field.kind) for field in FIELDS}

#: Bits of `clock_event_reasons`, named as dcgm-exporter's `clock_event` label.
CLOCK_EVENTS: Mapping[str, int] = {
    "gpu_idle": 0x1,
    "clocks_setting": 0x2,
    "power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
    "display_clocks": 0x100,
}

#: Why a value is not used.
Drop = Literal["blank", "below_minimum", "above_maximum"]


def find(name: str) -> Field | None:
    """Return the field that a name of any kind leads to, upper or lower case as NVIDIA and we write them."""
    return BY_NAME.get(name.strip())


def is_blank(value: float, kind: Kind = "gauge") -> bool:
    """Whether DCGM means "no value" by a number; a counter may rightly pass the 32-bit blanks."""
    if value >= _INT64_BLANK_AS_FLOAT or _FP64_BLANK <= value <= _FP64_BLANK + 3:
        return True
    return kind != "counter" and _INT32_BLANK <= value <= _INT32_BLANK + 3


def why_dropped(name: str, value: float) -> Drop | None:
    """Say why a value cannot be one of its field, or None; of an unknown field only blanks are known."""
    minimum, maximum, kind = _LIMITS.get(name, (-_INT64_BLANK_AS_FLOAT, _INT64_BLANK_AS_FLOAT, "counter"))
    if is_blank(value, kind):
        return "blank"
    if value < minimum:
        return "below_minimum"
    return "above_maximum" if value > maximum else None


def canonical(values: Mapping[str, float]) -> dict[str, float]:
    """Give values our names, and leave out blanks and what cannot be; unknown names stay as they are.

    Where two names lead to one field the first one counts.
    """
    return {name: value for name, value, reason in judged(values) if reason is None}


def judged(values: Mapping[str, float]) -> Iterable[tuple[str, float, Drop | None]]:
    """Yield every value under our name with the reason why it cannot be used, or None."""
    seen: set[str] = set()
    for given, value in values.items():
        name = given
        if given not in _CANONICAL and (field := find(given)) is not None:
            name = field.name
        if name not in seen:
            seen.add(name)
            yield name, value, why_dropped(name, value)
