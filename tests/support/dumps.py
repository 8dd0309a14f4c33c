"""A DCGM dump in the layout of the public ones: 10 metrics of 247 GPUs on 31 hosts, a second each, long format."""

import csv
import itertools
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline import dcgm

COLUMNS = (
    "timestamp", "metric_name", "gpu_id", "device", "uuid", "modelName", "Hostname", "container", "pod",
    "namespace", "value", "labels_raw",
)  # fmt: skip
METRICS = {
    "DCGM_FI_DEV_GPU_UTIL": (0, 100), "DCGM_FI_DEV_MEM_COPY_UTIL": (0, 100), "DCGM_FI_DEV_ENC_UTIL": (0, 0),
    "DCGM_FI_DEV_DEC_UTIL": (0, 0), "DCGM_FI_DEV_GPU_TEMP": (25, 80), "DCGM_FI_DEV_POWER_USAGE": (68.5, 700.0),
    "DCGM_FI_DEV_SM_CLOCK": (345, 1980), "DCGM_FI_DEV_MEM_CLOCK": (2619, 2619),
    "DCGM_FI_DEV_FB_FREE": (0, 81_000), "DCGM_FI_DEV_FB_USED": (0, 81_000),
}  # fmt: skip
_MODEL = "NVIDIA H100 80GB HBM3"
_ROUND = timedelta(seconds=15)
_BEGIN = datetime(2025, 7, 18, 20, 42, 34, tzinfo=UTC)


@dataclass(frozen=True)
class Value:
    """A row of the dump."""

    time: datetime
    metric: str
    host: str
    index: int
    gpu_uuid: str
    value: float

    @property
    def name(self) -> str:
        """Our name of the field."""
        return dcgm.BY_NAME[self.metric].name

    def row(self) -> dict[str, str]:
        """Return the row's cells by column."""
        labels = {
            "DCGM_FI_DRIVER_VERSION": "535.129.03", "Hostname": self.host, "UUID": self.gpu_uuid,
            "__name__": self.metric, "device": f"nvidia{self.index}", "gpu": str(self.index),
            "instance": f"{self.host}:9400", "job": "dgx_dcgm_exporter", "modelName": _MODEL,
        }  # fmt: skip
        return {
            "timestamp": self.time.isoformat().replace("+00:00", "Z"), "metric_name": self.metric,
            "gpu_id": str(self.index), "device": f"nvidia{self.index}", "uuid": self.gpu_uuid,
            "modelName": _MODEL, "Hostname": self.host, "container": "", "pod": "", "namespace": "",
            "value": f"{self.value:.10g}",
            "labels_raw": ",".join(f'{name}="{text}"' for name, text in labels.items()),
        }  # fmt: skip


def values(gpus: int = 247, seed: int = 7, rounds: int = 1) -> list[Value]:
    """Draw a dump: in each round one value for each metric and GPU, metric by metric, over four moments."""
    drawn = random.Random(seed)
    found = []
    for turn, (number, (metric, (lowest, highest))) in itertools.product(
        range(rounds), enumerate(METRICS.items())
    ):
        time = _BEGIN + turn * _ROUND + timedelta(seconds=4 * number // len(METRICS) * 4 / 3)
        for gpu in range(gpus):
            value = (
                drawn.randint(lowest, highest)
                if isinstance(lowest, int) and isinstance(highest, int)
                else round(drawn.uniform(lowest, highest), 3)
            )
            host = f"mtv5-dgx1-hgpu-{gpu // 8 + 1:03d}"
            uuid = f"GPU-{gpu:08x}-5e1c-4b2a-9d3f-0123456789ab"
            found.append(Value(time, metric, host, gpu % 8, uuid, float(value)))
    return found


def series(gpus: int = 5, steps: int = 24) -> list[Value]:
    """Return several moments of each series, one series after the other, as Prometheus exports a range."""
    return [
        Value(row.time + timedelta(seconds=15 * step), row.metric, row.host, row.index, row.gpu_uuid, step)
        for row in values(gpus)
        for step in range(steps)
    ]


def write(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """Write rows as CSV and return the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


@contextmanager
def piped(text: bytes) -> Iterator[Path]:
    """Yield the path of a pipe from which the text comes."""
    reader, writer = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(writer, "wb") as file:
            file.write(text)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        thread.join(10)
