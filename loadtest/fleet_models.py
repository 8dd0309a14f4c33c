"""Kinds of GPUs of a made-up fleet: limits, clocks, sensors; from data sheets and `nvidia-smi -q` as published."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuModel:
    """One kind."""

    name: str
    #: Of ten hosts.
    share: float
    idle_watts: float
    limit_watts: float
    memory_mebibytes: float
    reserved_mebibytes: float
    clock_mhz: float
    idle_clock_mhz: float
    memory_clock_mhz: float
    idle_memory_clock_mhz: float
    #: Degrees above the air for each watt, with all fans at work.
    resistance: float
    #: How long heat takes to follow power: 63 % of the way.
    inertia_seconds: float
    #: Software slows down here, hardware above.
    operating_celsius: float
    slowdown_celsius: float
    shutdown_celsius: float
    has_margin: bool = True
    has_fan: bool = False
    has_nvlink: bool = True
    has_memory_temperature: bool = True
    has_profiling: bool = True
    has_ecc: bool = True


MODELS = (
    GpuModel(
        "NVIDIA H100 80GB HBM3", 5, idle_watts=72, limit_watts=700, memory_mebibytes=81_559,
        reserved_mebibytes=551, clock_mhz=1980, idle_clock_mhz=345, memory_clock_mhz=2619,
        idle_memory_clock_mhz=2619, resistance=0.058, inertia_seconds=45, operating_celsius=87,
        slowdown_celsius=89, shutdown_celsius=92,
    ),
    GpuModel(
        "NVIDIA A100-SXM4-80GB", 3, idle_watts=62, limit_watts=400, memory_mebibytes=81_920,
        reserved_mebibytes=669, clock_mhz=1410, idle_clock_mhz=210, memory_clock_mhz=1593,
        idle_memory_clock_mhz=1593, resistance=0.095, inertia_seconds=45, operating_celsius=85,
        slowdown_celsius=89, shutdown_celsius=92, has_margin=False,
    ),
    GpuModel(
        "NVIDIA L40S", 1, idle_watts=34, limit_watts=350, memory_mebibytes=46_068, reserved_mebibytes=600,
        clock_mhz=2520, idle_clock_mhz=210, memory_clock_mhz=9001, idle_memory_clock_mhz=405,
        resistance=0.134, inertia_seconds=60, operating_celsius=88, slowdown_celsius=93,
        shutdown_celsius=96, has_nvlink=False, has_memory_temperature=False,
    ),
    GpuModel(
        "NVIDIA RTX A6000", 1, idle_watts=24, limit_watts=300, memory_mebibytes=49_140,
        reserved_mebibytes=454, clock_mhz=2100, idle_clock_mhz=210, memory_clock_mhz=8001,
        idle_memory_clock_mhz=405, resistance=0.150, inertia_seconds=70, operating_celsius=93,
        slowdown_celsius=95, shutdown_celsius=98, has_margin=False, has_fan=True, has_nvlink=False,
        has_memory_temperature=False, has_profiling=False, has_ecc=False,
    ),
)  # fmt: skip
