"""What the benchmark of the engine is asked and what it says: the plan, the result, the table.

The JSON of `Result` is what `docs/benchmarks/engine.json` holds.
"""

from typing import Literal, get_args

import msgspec

from loadtest.report import Circumstances, Machine
from loadtest.soak import Trend

Part = Literal["speed", "backlog", "swap", "depth"]
PARTS: tuple[Part, ...] = get_args(Part)
#: What a person waits for at most: MLPerf's and most front ends' order of magnitude.
GOOD_SECONDS = 0.5
MEBIBYTE = 1024 * 1024


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    seed: int = 7
    parts: tuple[Part, ...] = PARTS
    #: The first one alone is used by the parts other than `speed`.
    models: tuple[str, ...] = ("mobilenet_v3_small", "resnet50")
    #: Different pictures; they are repeated under new ids.
    pictures: int = 120
    width: int = 1280
    height: int = 960

    #: At most so many, through the pipeline and the loops beside it, and at most so long through the pipeline.
    offline_images: int = 2000
    offline_seconds: float = 20.0
    repeats: int = 3
    online_images_per_second: float = 40.0
    online_seconds: float = 40.0

    backlog_images: int = 20_000
    realtime_images_per_second: float = 5.0
    #: While the backlog lasts.
    realtime_seconds: float = 60.0

    #: At least; more are added while the other version is being loaded.
    swap_images: int = 1_000

    shallow_images: int = 1_000
    shallow_repeats: int = 6
    deep_images: int = 100_000


class Offline(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the repeats; ratios are of the pipeline to the others."""

    pipeline_images_per_second: float
    naive_images_per_second: float
    best_images_per_second: float
    kafka_images_per_second: float
    ratio_to_naive: float
    ratio_to_best: float
    ratio_to_kafka: float
    mean_batch_size: float
    #: In each repeat; the naive loop gets a quarter: its rate is steady.
    images: int
    #: Processor time for each picture of the process that predicts; medians.
    cpu_milliseconds: dict[str, float]
    repeats: dict[str, tuple[float, ...]]


class Online(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies at one rate, of the pipeline and of the loops beside it."""

    images_per_second: float
    p50_seconds: float
    p99_seconds: float
    #: Share of the pictures sent that had their prediction within `GOOD_SECONDS`.
    goodput: float
    best_p50_seconds: float
    best_p99_seconds: float
    kafka_p50_seconds: float
    kafka_p99_seconds: float
    kafka_goodput: float
    #: Processor time for each picture by process: `worker`, `broker`, `client` (which publishes and reads),
    #: `machine` (everything, what the kernel and other programs did included).
    cpu_milliseconds: dict[str, float]
    kafka_cpu_milliseconds: dict[str, float]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    offline: Offline
    #: At the plan's rate, or 40 % of the best loop's if that is less.
    online: Online
    #: At 40 % and 80 % of the best loop's rate.
    online_at_40_percent: Online
    online_at_80_percent: Online
    #: At 80 % of what the pipeline itself does offline, with the driver and the broker on the same cores.
    online_at_80_percent_of_own: Online | None = None

    @property
    def at_each_rate(self) -> tuple[Online, ...]:
        """The rates, slowest first, each once."""
        found = (
            self.online,
            self.online_at_40_percent,
            self.online_at_80_percent,
            self.online_at_80_percent_of_own,
        )
        known = sorted((online for online in found if online is not None), key=_rate)
        return tuple({online.images_per_second: online for online in known}.values())


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """Real-time pictures while a bulk backlog is worked off, and the worker's memory until it is gone.

    A batch takes `batch_seconds`: a full one of bulk pictures, at the images/s under the backlog. The mean size
    counts the small batches of real-time pictures, too.
    """

    images: int
    images_per_second: float
    mean_batch_size: float
    batch_seconds: float
    realtime_images_per_second: float
    realtime_sent: int
    realtime_p50_seconds: float
    realtime_p99_seconds: float
    realtime_p99_batches: float
    #: Bulk pictures without a prediction when the last real-time one was published.
    left_images: int
    resident_bytes: Trend


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """Another version of the model is activated while a backlog is worked off.

    Gaps are between one prediction and the next, by the moments at which the worker published them; `longest_gap`
    lies between the activation and the worker's report that it runs the version, `longest_batch` is the
    longest forward pass of that time.
    """

    images: int
    images_per_second: float
    #: From the activation to the report.
    seconds: float
    longest_gap_seconds: float
    longest_batch_seconds: float
    longest_gap_otherwise_seconds: float
    predicted_by_old: int
    predicted_by_new: int
    #: Without a prediction when the new version said that it runs; 0 would mean that the gap is of no backlog.
    left_images: int
    lost: int
    repeated: int


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """Images/s of small pictures with a backlog of few and of many; of few the median of the repeats."""

    mean_bytes: int
    shallow_images: int
    shallow_images_per_second: float
    deep_images: int
    deep_images_per_second: float
    ratio_of_deep: float
    #: Half of them before the deep one.
    repeats: tuple[float, ...]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The benchmark; parts that were left out are absent, or were measured before, as `commits` says.

    What stands beside `commits` is of the newest run.
    """

    commit: str | None
    #: By model for `speed`, by name for the other parts.
    commits: dict[str, str | None] = {}
    machine: Machine
    seed: int
    circumstances: Circumstances
    plan: Plan
    models: dict[str, Measured]
    backlog: Backlog | None = None
    swap: Swap | None = None
    depth: Depth | None = None
    others_busy_cores: float | None = None


def merged(kept: Result, new: Result) -> Result:
    """Return a result with what it left out as it was measured before."""
    parts = {
        part: getattr(new, part) if getattr(new, part) is not None else getattr(kept, part)
        for part in ("backlog", "swap", "depth")
    }
    return msgspec.structs.replace(
        new, models=kept.models | new.models, commits=_commits(kept) | _commits(new), **parts
    )


def _commits(result: Result) -> dict[str, str | None]:
    there = [*result.models, *(part for part in PARTS[1:] if getattr(result, part) is not None)]
    return dict.fromkeys(there, result.commit) | result.commits


def _rate(online: Online) -> float:
    return online.images_per_second


def rows(result: Result) -> list[tuple[str, str]]:
    """Say a result in words, for a table."""
    said = []
    for model, measured in result.models.items():
        offline = measured.offline
        said += [
            (f"{model}, offline", f"{offline.pipeline_images_per_second:.0f} images/s"),
            ("  naive loop", f"{offline.naive_images_per_second:.0f}: {offline.ratio_to_naive:.2f} of it"),
            ("  aiokafka loop", f"{offline.kafka_images_per_second:.0f}: {offline.ratio_to_kafka:.2f} of it"),
            ("  best loop", f"{offline.best_images_per_second:.0f}: {offline.ratio_to_best:.2f} of it"),
        ]
        for online in measured.at_each_rate:
            said.append((f"{model}, {online.images_per_second:.0f} images/s", _latencies(online)))
            said.append(("  processor time each", _processor_time(online)))
    if result.backlog is not None:
        said += _backlog_rows(result.backlog)
    if result.swap is not None:
        said += _swap_rows(result.swap)
    if result.depth is not None:
        said.append(_depth_row(result.depth))
    machine = result.machine
    said += [
        ("machine", f"{machine.cores} cores, {machine.cpu_model}, {machine.memory_gibibytes:g} GiB"),
        ("cores busy with other programs", f"{result.others_busy_cores}"),
    ]
    return said


def _backlog_rows(found: Backlog) -> list[tuple[str, str]]:
    memory = found.resident_bytes
    latency = f"p50 / p99 {_pair(found.realtime_p50_seconds, found.realtime_p99_seconds)}"
    batches = f"{found.realtime_p99_batches:.2f} batches of {_milliseconds(found.batch_seconds)}"
    size = f"{memory.last / MEBIBYTE:.0f} MiB, {'flat' if memory.is_flat else 'not flat'}"
    growth = f"grew by {memory.growth / MEBIBYTE:.1f} MiB in the second half"
    return [
        (f"real-time under a backlog of {found.images:,}", f"{latency}: {batches}"),
        ("  memory of the worker meanwhile", f"{size}, {growth}"),
    ]


def _swap_rows(found: Swap) -> list[tuple[str, str]]:
    gaps = f"longest gap {_milliseconds(found.longest_gap_seconds)}"
    batch = f"longest batch {_milliseconds(found.longest_batch_seconds)}"
    otherwise = f"gap otherwise {_milliseconds(found.longest_gap_otherwise_seconds)}"
    return [
        (f"swap under load, {found.seconds:.1f} s", f"{gaps}, {batch}; {otherwise}"),
        ("  lost, repeated", f"{found.lost}, {found.repeated} of {found.images}"),
    ]


def _depth_row(found: Depth) -> tuple[str, str]:
    rates = f"{found.shallow_images_per_second:.0f} and {found.deep_images_per_second:.0f} images/s"
    ratio = f"of {found.mean_bytes / 1000:.0f} kB: {found.ratio_of_deep:.3f} of it"
    return f"backlog of {found.shallow_images:,} and of {found.deep_images:,}", f"{rates} {ratio}"


def _latencies(online: Online) -> str:
    return (
        f"p50 / p99 {_pair(online.p50_seconds, online.p99_seconds)}, "
        f"{online.goodput:.1%} within {_milliseconds(GOOD_SECONDS)}; "
        f"aiokafka loop {_pair(online.kafka_p50_seconds, online.kafka_p99_seconds)}, "
        f"{online.kafka_goodput:.1%}; "
        f"best loop without Kafka {_pair(online.best_p50_seconds, online.best_p99_seconds)}"
    )


def _processor_time(online: Online) -> str:
    def each(of: dict[str, float]) -> str:
        return ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in of.items()) + " ms"

    return f"{each(online.cpu_milliseconds)}; aiokafka loop: {each(online.kafka_cpu_milliseconds)}"


def _pair(p50: float, p99: float) -> str:
    return f"{1000 * p50:.0f} / {1000 * p99:.0f} ms"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
