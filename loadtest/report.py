"""What a measurement was taken on, and how its numbers are put in words.

A result names the commit, the versions and the machine (never its name), so that two of them can be compared
or be seen not to be comparable.
"""

import os
import platform
import re
import resource
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import DependencyError

_PACKAGES = ("millrace", "torch", "pillow", "numpy", "aiokafka", "faust-streaming")
_GIBIBYTE = 1024**3


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What it ran on."""

    cores: int
    cpu_model: str
    memory_gibibytes: float
    system: str

    @classmethod
    def this(cls) -> "Machine":
        """Describe this machine; cores are those this process may use."""
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return cls(
            cores=len(os.sched_getaffinity(0)),
            cpu_model=_cpu_model(),
            memory_gibibytes=round(pages * page_bytes / _GIBIBYTE, 1),
            system=f"{platform.system()} {platform.machine()}",
        )


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """When, on what, and with which versions something was measured."""

    time: datetime
    #: None outside a git checkout; `+` at the end when files differ from the commit.
    commit: str | None
    machine: Machine
    versions: dict[str, str]
    #: Load average of the last minute before anything of ours was started: what else ran.
    load_before: float

    @classmethod
    def now(cls, load_before: float) -> "Circumstances":
        """Describe the present ones."""
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(
            time=datetime.now(UTC).replace(microsecond=0),
            commit=commit(),
            machine=Machine.this(),
            versions=versions,
            load_before=round(load_before, 2),
        )


class Timing(msgspec.Struct, frozen=True):
    """How long a number of pictures took one way."""

    images: int
    seconds: float
    #: Processor time of the process that predicted, all its threads; None where it could not be asked.
    cpu_seconds: float | None = None

    @property
    def images_per_second(self) -> float:
        """The rate by the wall clock."""
        return self.images / self.seconds

    @property
    def cpu_milliseconds_per_image(self) -> float | None:
        """What other programs on the machine hardly change."""
        return None if self.cpu_seconds is None else 1000 * self.cpu_seconds / self.images


class Others:
    """How much processor time other programs took since this was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def busy_cores(self) -> float:
        """Return it in cores, on average; children count as ours once they have ended and were waited for."""
        seconds = time.monotonic() - self._started
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return round(max(0.0, others / seconds), 2)


class CpuSeconds:
    """How much processor time processes took since this was made: this one, those named, the whole machine."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._before = self._now()

    def spent(self) -> dict[str, float]:
        """Return it by name; `client` is this process, `machine` everything, kernel threads and others included."""
        return {name: max(0.0, now - self._before[name]) for name, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        named = {name: _process_seconds(pid) for name, pid in self._pids.items()}
        return named | {"client": time.process_time(), "machine": _busy_seconds()}


def commit() -> str | None:
    """Return the commit of this checkout; None if it is none."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile: a value that was measured, never one in between.

    `share` is above 0 and at most 1; `values` are in any order and not empty.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def median(values: Iterable[float]) -> float:
    """Return the middle value, of an even number the mean of both."""
    return statistics.median(values)


def rounded(value: float, digits: int = 3) -> float:
    """Cut a measurement to significant digits: more would pretend to be known."""
    return float(f"{value:.{digits}g}")


def read_metrics(url: str) -> dict[str, float]:
    """Read the numbers of a worker's `/metrics`, by name with labels; blocks.

    Raises:
        DependencyError: it does not answer.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise DependencyError(f"the worker at {url} does not answer: {error}") from None
    samples = re.finditer(r"^([a-zA-Z_:][^ {]*(?:\{[^}]*\})?) ([^ \n]+)", text, re.MULTILINE)
    return {match[1]: float(match[2]) for match in samples}


def keep(result: Any, path: Path) -> None:
    """Write a result as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


def _busy_seconds() -> float:
    """Return the time all cores together were not idle: proc(5), /proc/stat."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float:
    """Return what a process and its threads have used: proc(5), /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
