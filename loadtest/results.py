"""What a benchmark is asked and what it says: the plan, the result, how the loops compare, the table.

The JSON of `Result` is what `docs/benchmarks/spine.json` holds.
"""

import statistics
from collections.abc import Sequence
from io import BytesIO

import msgspec
from PIL import Image

from loadtest.images import SamplePicture
from loadtest.report import Circumstances, Timing, median, rounded

ARMS = ("spine", "naive", "best_loop")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    seed: int = 7
    #: Different pictures; they are repeated under new ids.
    pictures: int = 240
    offline_images: int = 1200
    offline_repeats: int = 5
    online_images_per_second: float = 30.0
    online_seconds: float = 60.0


class Pictures(msgspec.Struct, frozen=True, kw_only=True):
    """The pictures that were used."""

    different: int
    mean_bytes: int
    mean_pixels: int
    media_types: tuple[str, ...]

    @classmethod
    def of(cls, pictures: Sequence[SamplePicture]) -> "Pictures":
        """Describe pictures; opens each of them."""
        sizes = [Image.open(BytesIO(picture.data)).size for picture in pictures]
        return cls(
            different=len(pictures),
            mean_bytes=round(statistics.mean(len(picture.data) for picture in pictures)),
            mean_pixels=round(statistics.mean(width * height for width, height in sizes)),
            media_types=tuple(sorted({picture.media_type for picture in pictures})),
        )


class Offline(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the repeats; the ratios are of the medians."""

    images_per_second: float
    naive_images_per_second: float
    best_loop_images_per_second: float
    ratio_to_naive: float
    ratio_to_best_loop: float
    #: Processor time of the predicting process alone: what other programs on the machine hardly change.
    cpu_milliseconds_per_image: float | None
    naive_cpu_milliseconds_per_image: float | None
    best_loop_cpu_milliseconds_per_image: float | None
    images: int
    batch_size: int
    repeats: dict[str, tuple[float, ...]]


class Online(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of one open-loop run."""

    images_per_second: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    max_seconds: float
    sent: int
    received: int
    dead_letters: int
    lost: int
    #: How late the driver itself published, against its own schedule.
    driver_late_p99_seconds: float
    #: Medians of the predictions' receipts: which part of the latency is whose.
    queue_p50_seconds: float
    decode_p50_seconds: float
    forward_p50_seconds: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole benchmark."""

    circumstances: Circumstances
    plan: Plan
    models: str
    pictures: Pictures
    offline: Offline
    online: Online
    load_after: float
    #: Cores that other programs kept busy on average, from before the start until everything had ended.
    others_busy_cores: float | None = None


def in_turn(arms: Sequence[str], number: int) -> list[str]:
    """Rotate the order from one repeat to the next, so that none is always first after another."""
    shift = number % len(arms)
    return [*arms[shift:], *arms[:shift]]


def compare(timings: dict[str, list[Timing]], images: int, batch_size: int) -> Offline:
    """Compare the medians of the repeats."""
    rates = {arm: median(timing.images_per_second for timing in found) for arm, found in timings.items()}
    cpu = {arm: _median_cpu(found) for arm, found in timings.items()}
    return Offline(
        images_per_second=rounded(rates["spine"]),
        naive_images_per_second=rounded(rates["naive"]),
        best_loop_images_per_second=rounded(rates["best_loop"]),
        ratio_to_naive=rounded(rates["spine"] / rates["naive"]),
        ratio_to_best_loop=rounded(rates["spine"] / rates["best_loop"]),
        cpu_milliseconds_per_image=cpu["spine"],
        naive_cpu_milliseconds_per_image=cpu["naive"],
        best_loop_cpu_milliseconds_per_image=cpu["best_loop"],
        images=images,
        batch_size=batch_size,
        repeats={
            arm: tuple(rounded(each.images_per_second) for each in found) for arm, found in timings.items()
        },
    )


def rows(result: Result) -> list[tuple[str, str]]:
    """Say a result in words, for a table."""
    offline, online, machine = result.offline, result.online, result.circumstances.machine
    naive = _speed(offline.naive_images_per_second, offline.naive_cpu_milliseconds_per_image)
    best = _speed(offline.best_loop_images_per_second, offline.best_loop_cpu_milliseconds_per_image)
    percentiles = (online.p50_seconds, online.p95_seconds, online.p99_seconds)
    megapixels = result.pictures.mean_pixels / 1e6
    media = ", ".join(result.pictures.media_types)
    return [
        ("spine, offline", _speed(offline.images_per_second, offline.cpu_milliseconds_per_image)),
        ("naive loop", f"{naive}; the spine does {offline.ratio_to_naive:.2f} of it"),
        ("best loop", f"{best}; the spine does {offline.ratio_to_best_loop:.2f} of it"),
        (
            f"spine, {online.images_per_second:g} images/s",
            "p50, p95, p99: " + ", ".join(f"{1000 * seconds:.0f} ms" for seconds in percentiles),
        ),
        ("sent, received, lost", f"{online.sent}, {online.received}, {online.lost}"),
        ("pictures", f"{result.pictures.mean_bytes / 1000:.0f} kB, {megapixels:.2f} megapixels; {media}"),
        ("machine", f"{machine.cores} cores, {machine.cpu_model}, {machine.memory_gibibytes:g} GiB"),
        ("load average before, after", f"{result.circumstances.load_before}, {result.load_after}"),
        ("cores busy with other programs", f"{result.others_busy_cores}"),
    ]


def _speed(images_per_second: float, cpu_milliseconds: float | None) -> str:
    cpu = "" if cpu_milliseconds is None else f", {cpu_milliseconds:.1f} ms of processor time each"
    return f"{images_per_second:.0f} images/s{cpu}"


def _median_cpu(timings: Sequence[Timing]) -> float | None:
    found = [each.cpu_milliseconds_per_image for each in timings]
    known = [value for value in found if value is not None]
    return rounded(median(known)) if known and len(known) == len(found) else None
