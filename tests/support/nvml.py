"""NVML without a GPU: a library built from the tests' own C file, and the script that it follows."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).parent / "nvml_stand_in.c"
NAME = "libnvidia-ml.so.1"

#: What every GPU of a script says, in NVML's units, unless it is told to say something else.
USUAL = {
    "name": "NVIDIA H100 80GB HBM3", "pci_bus_id": "00000000:1B:00.0", "events": 1, "mig": 0,
    "sm_clock": 1980, "memory_clock": 2619, "clock_events": 4, "temperature": 51, "margin": 36,
    "memory_temperature": 62, "power": 351_250, "power_instant": 349_100, "power_limit": 700_000,
    "energy": 987_654_321, "slowdown": 87, "shutdown": 92, "pstate": 0, "utilization": 97,
    "memory_utilization": 41, "encoder": 3, "decoder": 2, "pcie_replays": 7, "power_violation": 1_000_000,
    "thermal_violation": 2_000_000, "memory_total": 85_520_809_984, "memory_used": 1_073_741_824,
    "memory_reserved": 536_870_912, "ecc_corrected": 5, "ecc_uncorrected": 1, "ecc_corrected_lifetime": 50,
    "ecc_uncorrected_lifetime": 10, "rows_corrected": 3, "rows_uncorrected": 2, "rows_pending": 1,
    "rows_failed": 0, "nvlink_flit": 11, "nvlink_data": 12, "nvlink_replay": 13, "nvlink_recovery": 14,
}  # fmt: skip


def build(folder: Path, library: int = 1) -> Path:
    """Compile the library into a folder, by the C compiler that is there or the one that is a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    # Into another file first: one that is loaded must not be written to.
    built = folder / f"{NAME}.new"
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", "-pthread", f"-DLIBRARY={library}", f"-Wl,-soname,{NAME}",
         "-o", str(built), str(SOURCE)],
        check=True,
    )  # fmt: skip
    return built.rename(folder / NAME)


class Script:
    """What the library says; each `set` is seen by its next call."""

    def __init__(self, path: Path, gpus: int = 2) -> None:
        self.path = path
        self._xids = 0
        self._lines: dict[str, object] = {"gpus": gpus}
        self._lines |= {f"gpu.*.{name}": value for name, value in USUAL.items()}
        self._lines |= {f"gpu.{index}.uuid": self.uuid(index) for index in range(gpus)}
        self.set({})

    @staticmethod
    def uuid(index: int) -> str:
        """Return the identity of a GPU."""
        return f"GPU-00000000-0000-4000-8000-{index:012d}"

    def set(self, lines: Mapping[str, object]) -> None:
        """Say something else; None takes a line away."""
        self._lines |= lines
        text = "".join(f"{key}={value}\n" for key, value in self._lines.items() if value is not None)
        # At once, and as a file that has another time even if it is written within one tick of the clock.
        new = self.path.with_suffix(".new")
        new.write_text(text)
        last = self.path.stat().st_mtime_ns if self.path.exists() else 0
        os.utime(new, ns=(0, max(new.stat().st_mtime_ns, last + 1)))
        new.rename(self.path)

    def xid(self, gpu: int, code: int, instance: tuple[int, int] | None = None) -> None:
        """Have an XID error happen."""
        self._xids += 1
        place = "" if instance is None else f" {instance[0]} {instance[1]}"
        self.set({f"xid.{self._xids}": f"{gpu} {code}{place}"})

    def divide(self, gpu: int, instances: int) -> None:
        """Turn MIG on: utilization is not known any more, and there are instances."""
        lines: dict[str, object] = {
            f"gpu.{gpu}.mig": instances, f"gpu.{gpu}.utilization": "!3", f"gpu.{gpu}.memory_utilization": "!3",
        }  # fmt: skip
        for position in range(instances):
            part = f"gpu.{gpu}.mig.{position}"
            lines |= {
                f"{part}.uuid": f"MIG-{gpu}-{position}",
                f"{part}.name": f"{USUAL['name']} MIG 1g.10gb",
                f"{part}.gpu_instance": 7 + position,
                f"{part}.compute_instance": 0,
                f"{part}.memory_total": 10 * 2**30,
                f"{part}.memory_used": 2**30,
                f"{part}.memory_reserved": 0,
            }
        self.set(lines)
