"""Samples of a made-up host whose GPUs are healthy but for what a test says."""

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta

from pipeline.detection import Closed, Watch, close_all
from pipeline.telemetry import Condition, GpuWindow, Sample, Samples

START = datetime(2026, 3, 1, tzinfo=UTC)
HEALTHY: Mapping[str, float] = {
    "temperature_celsius": 62.0, "temperature_margin_celsius": 25.0, "memory_temperature_celsius": 70.0,
    "power_watts": 600.0, "power_limit_watts": 700.0, "utilization_percent": 98.0, "sm_clock_mhz": 1900.0,
    "memory_used_mebibytes": 60_000.0, "memory_total_mebibytes": 81_000.0, "energy_millijoules": 1e9,
    "clock_event_reasons": 4.0, "ecc_corrected_volatile": 0.0, "ecc_uncorrected_volatile": 0.0,
    "row_remap_pending": 0.0, "pcie_replays": 3.0, "nvlink_replays": 0.0,
}  # fmt: skip
#: What a GPU differs by at so many seconds after START; None: it sends nothing.
Fault = Callable[[int, float], Mapping[str, float] | None]


def healthy(gpu: int, seconds: float) -> Mapping[str, float]:
    """Differ by nothing but a little, always the same noise."""
    wave = ((gpu * 7 + int(seconds)) % 11 - 5) / 5
    return {
        "temperature_celsius": 62.0 + wave,
        "power_watts": 600.0 + 8 * wave,
        "sm_clock_mhz": 1900.0 + 10 * wave,
    }


def uuid(gpu: int, host: str = "node-1") -> str:
    """Return the identity of a host's GPU."""
    return f"GPU-{host}-{gpu}"


def record(
    seconds: float, fault: Fault = healthy, *, gpus: int = 8, host: str = "node-1", every: float = 10.0,
    count: int = 1, fields: Collection[str] | None = None,
) -> Samples:  # fmt: skip
    """Return what a host publishes at once: `count` samples of each GPU that end at a moment, or some fields."""
    samples = []
    for number in reversed(range(count)):
        at = seconds - number * every
        for gpu in range(gpus):
            if (values := fault(gpu, at)) is not None:
                time = START + timedelta(seconds=at)
                values = {**HEALTHY, **healthy(gpu, at), **values}
                if fields is not None:
                    values = {name: values[name] for name in fields}
                samples.append(Sample(gpu_uuid=uuid(gpu, host), time=time, values=values))
    return Samples(host=host, samples=tuple(samples))


def feed(watch: Watch, records: Iterable[Samples], key: str = "node-1") -> list[Closed]:
    """Feed records as if each were published when its last sample was measured; return what closed."""
    closed: list[Closed] = []
    for number, samples in enumerate(records):
        published_ms = int(samples.samples[-1].time.timestamp() * 1000)
        fed = watch.feed((key, number), key, samples, published_ms)
        closed += [window for together in close_all(fed.closings) for window in together]
    return closed


def conditions(closed: Iterable[Closed]) -> list[tuple[int, str, Condition]]:
    """Return minute after START, GPU and condition of all that holds, in order."""
    return [
        (int((window.windows.start - START).total_seconds() // 60), gpu.gpu_uuid, condition)
        for window in closed
        for gpu in window.windows.gpus
        for condition in gpu.conditions
    ]


def alerts(closed: Iterable[Closed]) -> dict[str, dict[str, list[int]]]:
    """Return, by GPU and rule, from which minutes on there were alerts that fired."""
    found: dict[str, dict[str, list[int]]] = {}
    begun: set[tuple[str, str, datetime]] = set()
    for minute, gpu, condition in conditions(closed):
        key = (gpu, condition.rule, condition.since)
        if condition.state == "firing" and key not in begun:
            begun.add(key)
            found.setdefault(gpu, {}).setdefault(condition.rule, []).append(minute)
    return found


def by_gpu(closed: Iterable[Closed]) -> dict[tuple[str, datetime], GpuWindow]:
    """Return windows by identity."""
    return {(gpu.gpu_uuid, window.windows.start): gpu for window in closed for gpu in window.windows.gpus}
