"""How each field of the table (`pipeline/dcgm.py`) is read from NVML, in DCGM's units.

What NVML knows by field id is asked for in one call per GPU. What a GPU does not support is remembered and not
asked for again; the fallback for older drivers is asked instead, if there is one. NVML's calls block: for a
thread. PCIe throughput is left out, as each of its calls counts for 20 ms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pynvml

from pipeline.dcgm import FIELDS

# pynvml's handles are ctypes pointers.
Handle = Any
Values = dict[str, float]

_MEBIBYTE = 1024 * 1024

#: The GPU, the driver or this process's rights do not have it: asking again would not help.
UNSUPPORTED = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,  # also of a field id or a sensor that the driver does not know
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_NOT_FOUND,
    }
)


def _clocks(handle: Handle) -> Values:
    return {
        "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
    }


def _clock_events(handle: Handle) -> Values:
    return {"clock_event_reasons": pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)}


def _throttle_reasons(handle: Handle) -> Values:
    return {"clock_event_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)}


def _temperature(handle: Handle) -> Values:
    return {"temperature_celsius": pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU)}


def _temperature_before_13(handle: Handle) -> Values:
    return {"temperature_celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)}


def _margin(handle: Handle) -> Values:
    return {"temperature_margin_celsius": pynvml.nvmlDeviceGetMarginTemperature(handle)}


def _power(handle: Handle) -> Values:
    return {"power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def _power_limit(handle: Handle) -> Values:
    return {"power_limit_watts": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000}


def _energy(handle: Handle) -> Values:
    return {"energy_millijoules": pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)}


def _slowdown(handle: Handle) -> Values:
    threshold = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    return {"slowdown_temperature_celsius": pynvml.nvmlDeviceGetTemperatureThreshold(handle, threshold)}


def _shutdown(handle: Handle) -> Values:
    threshold = pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
    return {"shutdown_temperature_celsius": pynvml.nvmlDeviceGetTemperatureThreshold(handle, threshold)}


def _performance_state(handle: Handle) -> Values:
    return {"performance_state": pynvml.nvmlDeviceGetPerformanceState(handle)}


def _fan(handle: Handle) -> Values:
    return {"fan_speed_percent": pynvml.nvmlDeviceGetFanSpeed(handle)}


def _utilization(handle: Handle) -> Values:
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"utilization_percent": rates.gpu, "memory_copy_percent": rates.memory}


def _encoder(handle: Handle) -> Values:
    return {"encoder_percent": pynvml.nvmlDeviceGetEncoderUtilization(handle)[0]}


def _decoder(handle: Handle) -> Values:
    return {"decoder_percent": pynvml.nvmlDeviceGetDecoderUtilization(handle)[0]}


def _memory(handle: Handle) -> Values:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return _frame_buffer(memory) | {"memory_reserved_mebibytes": memory.reserved // _MEBIBYTE}


def _memory_v1(handle: Handle) -> Values:
    return _frame_buffer(pynvml.nvmlDeviceGetMemoryInfo(handle))


def _frame_buffer(memory: Any) -> Values:
    return {
        "memory_total_mebibytes": memory.total // _MEBIBYTE,  # whole ones, as DCGM has them
        "memory_free_mebibytes": memory.free // _MEBIBYTE,
        "memory_used_mebibytes": memory.used // _MEBIBYTE,
    }


def _pcie_replays(handle: Handle) -> Values:
    return {"pcie_replays": pynvml.nvmlDeviceGetPcieReplayCounter(handle)}


def _ecc(handle: Handle) -> Values:
    def count(error: int, counter: int) -> int:
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, error, counter))

    corrected, uncorrected = (
        pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    )
    return {
        "ecc_corrected_volatile": count(corrected, pynvml.NVML_VOLATILE_ECC),
        "ecc_uncorrected_volatile": count(uncorrected, pynvml.NVML_VOLATILE_ECC),
        "ecc_corrected_lifetime": count(corrected, pynvml.NVML_AGGREGATE_ECC),
        "ecc_uncorrected_lifetime": count(uncorrected, pynvml.NVML_AGGREGATE_ECC),
    }


def _remapped_rows(handle: Handle) -> Values:
    corrected, uncorrected, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return {
        "rows_remapped_corrected": corrected,
        "rows_remapped_uncorrected": uncorrected,
        "row_remap_pending": pending,
        "row_remap_failed": failed,
    }


#: By what `Field.nvml` says; more than one field may come from one call.
CALLS: Mapping[str, Callable[[Handle], Values]] = {
    "nvmlDeviceGetClockInfo": _clocks,
    "nvmlDeviceGetCurrentClocksEventReasons": _clock_events,
    "nvmlDeviceGetTemperatureV": _temperature,
    "nvmlDeviceGetMarginTemperature": _margin,
    "nvmlDeviceGetPowerUsage": _power,
    "nvmlDeviceGetEnforcedPowerLimit": _power_limit,
    "nvmlDeviceGetTemperatureThreshold(SLOWDOWN)": _slowdown,
    "nvmlDeviceGetTemperatureThreshold(SHUTDOWN)": _shutdown,
    "nvmlDeviceGetPerformanceState": _performance_state,
    "nvmlDeviceGetFanSpeed": _fan,
    "nvmlDeviceGetUtilizationRates": _utilization,
    "nvmlDeviceGetEncoderUtilization": _encoder,
    "nvmlDeviceGetDecoderUtilization": _decoder,
    "nvmlDeviceGetMemoryInfo": _memory,
}
#: What drivers had before, or GPUs have that do not know a field id.
FALLBACKS: Mapping[str, Callable[[Handle], Values]] = {
    "nvmlDeviceGetCurrentClocksEventReasons": _throttle_reasons,
    "nvmlDeviceGetTemperatureV": _temperature_before_13,
    "nvmlDeviceGetMemoryInfo": _memory_v1,
    "NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION": _energy,
    "NVML_FI_DEV_PCIE_REPLAY_COUNTER": _pcie_replays,
    "NVML_FI_DEV_ECC_SBE_VOL_TOTAL": _ecc,
    "NVML_FI_DEV_REMAPPED_COR": _remapped_rows,
}
_BY_FIELD_ID = {
    getattr(pynvml, field.nvml): field for field in FIELDS if field.nvml.startswith("NVML_FI_DEV_")
}
# NVML gives power in mW.
_SCALE = {"power_instant_watts": 0.001}
_INSTANCE_CALLS = frozenset({"nvmlDeviceGetMemoryInfo"})
_MEMBERS = {
    pynvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
}


class Reader:
    """Reads one GPU, and remembers what it does not support.

    Of a MIG instance only memory is asked for: the rest is the whole GPU's, or not known under MIG.
    """

    def __init__(self, handle: Handle, *, is_instance: bool = False) -> None:
        self.handle = handle
        self._field_ids = [] if is_instance else list(_BY_FIELD_ID)
        names = _INSTANCE_CALLS if is_instance else CALLS.keys()
        self._calls = {name: call for name, call in CALLS.items() if name in names}
        #: The error of the last reading that was none of `UNSUPPORTED`.
        self.trouble: pynvml.NVMLError | None = None

    def read(self) -> Values:
        """Return what is known now; empty, with `trouble`, if the GPU does not answer.

        Raises:
            pynvml.NVMLError: the batched call failed as a whole, or one of the library, not of a value.
        """
        self.trouble = None
        values = self._read_fields()
        for name in tuple(self._calls):
            values.update(self._call(name))
        return values

    def _call(self, name: str) -> Values:
        try:
            return self._calls[name](self.handle)
        except pynvml.NVMLError as error:
            if error.value not in UNSUPPORTED:
                self.trouble = error
                return {}
        fallback = FALLBACKS.get(name)
        if fallback is None or self._calls[name] is fallback:
            del self._calls[name]
            return {}
        self._calls[name] = fallback
        return self._call(name)

    def _read_fields(self) -> Values:
        if not self._field_ids:
            return {}
        values = {}
        try:
            found = pynvml.nvmlDeviceGetFieldValues(self.handle, self._field_ids)
        except pynvml.NVMLError as error:
            if error.value not in UNSUPPORTED:
                raise
            found = ()
            self._without(self._field_ids)
        for value in found:
            name = _BY_FIELD_ID[value.fieldId].name
            if value.nvmlReturn == pynvml.NVML_SUCCESS:
                member = _MEMBERS.get(value.valueType)
                if member is not None:
                    values[name] = getattr(value.value, member) * _SCALE.get(name, 1)
            elif value.nvmlReturn in UNSUPPORTED:
                self._without([value.fieldId])
            else:
                self.trouble = pynvml.NVMLError(value.nvmlReturn)
        return values

    def _without(self, field_ids: list[int]) -> None:
        """Ask no more for some fields by id, but by the call that older drivers have, if there is one."""
        self._field_ids = [field_id for field_id in self._field_ids if field_id not in field_ids]
        for field_id in field_ids:
            name = _BY_FIELD_ID[field_id].nvml
            if name in FALLBACKS:
                self._calls[name] = FALLBACKS[name]
