"""How fast the engine is: torchvision models through Kafka, beside the loops people write by hand.

It takes addresses: Kafka from the settings, where one `predict` worker of the model runs. It starts nothing but
the loops of `loadtest/engine_loops.py`, each in a process of its own, on the same cores and in the same run.

Offline: 1280 x 960 JPEGs that are all there from the start. Online: Poisson arrivals; the best loop has them
without Kafka, the aiokafka loop and the worker from publication to prediction.
"""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from loadtest import loop_process
from loadtest.images import draw_photo
from loadtest.meter import Meter
from loadtest.report import Circumstances, Machine, Timing, median, percentile, rounded
from loadtest.results import in_turn
from pipeline import admin
from pipeline.settings import PREFIX, Settings

ARMS = ("pipeline", "kafka", "best", "naive")
# As in `loadtest/engine_loops.py`, which this process does not import: torch and torchvision are slow to.
WEIGHTS_SEED = 7
LOOPS = "loadtest.engine_loops"
LOOP_PREFIX = "loop-"
# What a person waits for at most: MLPerf's and most front ends' order of magnitude.
GOOD_SECONDS = 0.5

Say = Callable[[str], None]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    seed: int = 7
    models: tuple[str, ...] = ("mobilenet_v3_small", "resnet50")
    #: Different pictures; they are repeated under new ids.
    pictures: int = 120
    #: Through the pipeline and the loops beside it; a naive loop gets a quarter, its rate is steady.
    offline_images: int = 2000
    repeats: int = 3
    online_images_per_second: float = 40.0
    online_seconds: float = 40.0


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


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    offline: Offline
    online: Online
    #: At 40 % and 80 % of the best loop's rate.
    online_at_40_percent: Online
    online_at_80_percent: Online


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark."""

    commit: str | None
    machine: Machine
    seed: int
    circumstances: Circumstances
    plan: Plan
    models: dict[str, Measured]
    others_busy_cores: float | None = None


def specification(model: str) -> str:
    """Return the model as `MILLRACE_MODELS` names it, with the weights that the loops draw."""
    return f"torchvision:{model}?weights=random&seed={WEIGHTS_SEED}"


class EngineBench:
    """Runs the plan for the model of one worker."""

    def __init__(self, settings: Settings, plan: Plan, worker_url: str, *, say: Say = print) -> None:
        self._settings = settings
        self._plan = plan
        self._say = say
        self._pipeline = Meter(settings, worker_url=worker_url)
        self._kafka = Meter(settings.model_copy(update={"topic_prefix": LOOP_PREFIX}))

    async def run(self, model: str) -> Measured:
        """Measure everything.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan = self._plan
        self._say(f"{model}: drawing {plan.pictures} pictures")
        pictures = await asyncio.to_thread(
            lambda: [draw_photo(plan.seed, number) for number in range(plan.pictures)]
        )
        await admin.apply_topics(self._kafka.settings)
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
            for number, picture in enumerate(pictures):
                (Path(name) / f"{number:06d}.jpg").write_bytes(picture)
            async with self._kafka_loop(model):
                offline = await self._offline(model, pictures, name)
                best = offline.best_images_per_second
                rates = (plan.online_images_per_second, 0.4 * best, 0.8 * best)
                online = [await self._online(model, pictures, name, rate) for rate in rates]
        return Measured(
            offline=offline, online=online[0], online_at_40_percent=online[1], online_at_80_percent=online[2]
        )

    async def _offline(self, model: str, pictures: Sequence[bytes], folder: str) -> Offline:
        plan = self._plan
        for meter in (self._pipeline, self._kafka):  # passes of every size, so that costs are known
            await meter.offline(pictures, plan.offline_images // 4)
        timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
        batch_sizes = []
        for number in range(plan.repeats):
            for arm in in_turn(ARMS, number):
                if arm == "pipeline":
                    before = await self._pipeline.batches()
                    timing = await self._pipeline.offline(pictures, plan.offline_images)
                    batch_sizes.append(plan.offline_images / (await self._pipeline.batches() - before))
                elif arm == "kafka":
                    timing = await self._kafka.offline(pictures, plan.offline_images)
                else:
                    count = plan.offline_images // (4 if arm == "naive" else 1)
                    timing = msgspec.json.decode(
                        await loop_process.output_of(LOOPS, arm, model, folder, str(count)), type=Timing
                    )
                rate = timing.images_per_second
                self._say(f"{model}, {arm} {number + 1}/{plan.repeats}: {rate:.1f} images/s")
                timings[arm].append(timing)
        rates = {arm: median(timing.images_per_second for timing in found) for arm, found in timings.items()}
        return Offline(
            pipeline_images_per_second=rounded(rates["pipeline"]),
            naive_images_per_second=rounded(rates["naive"]),
            best_images_per_second=rounded(rates["best"]),
            kafka_images_per_second=rounded(rates["kafka"]),
            ratio_to_naive=rounded(rates["pipeline"] / rates["naive"]),
            ratio_to_best=rounded(rates["pipeline"] / rates["best"]),
            ratio_to_kafka=rounded(rates["pipeline"] / rates["kafka"]),
            mean_batch_size=rounded(median(batch_sizes)),
            repeats={
                arm: tuple(rounded(timing.images_per_second) for timing in found)
                for arm, found in timings.items()
            },
        )

    async def _online(self, model: str, pictures: Sequence[bytes], folder: str, rate: float) -> Online:
        plan, seconds = self._plan, self._plan.online_seconds
        said = await loop_process.output_of(
            LOOPS, "online", model, folder, f"{rate}", f"{seconds}", f"{plan.seed}"
        )
        best = msgspec.json.decode(said, type=list[float])
        kafka = (await self._kafka.online(pictures, rate, seconds, plan.seed)).latencies
        seen = await self._pipeline.online(pictures, rate, seconds, plan.seed)
        found = Online(
            images_per_second=rounded(rate),
            p50_seconds=rounded(percentile(seen.latencies, 0.5)),
            p99_seconds=rounded(percentile(seen.latencies, 0.99)),
            goodput=rounded(sum(latency <= GOOD_SECONDS for latency in seen.latencies) / seen.sent, 4),
            best_p50_seconds=rounded(percentile(best, 0.5)),
            best_p99_seconds=rounded(percentile(best, 0.99)),
            kafka_p50_seconds=rounded(percentile(kafka, 0.5)),
            kafka_p99_seconds=rounded(percentile(kafka, 0.99)),
        )
        self._say(f"{model}, {rate:.0f} images/s: {_latencies(found)}")
        return found

    @asynccontextmanager
    async def _kafka_loop(self, model: str) -> AsyncIterator[None]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", LOOPS, "kafka", model, LOOP_PREFIX,
            env=loop_process.ENVIRONMENT
            | os.environ
            | {f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": self._settings.resolved_kafka},
        )  # fmt: skip
        try:
            yield
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


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
        for online in (measured.online, measured.online_at_40_percent, measured.online_at_80_percent):
            said.append((f"{model}, {online.images_per_second:.0f} images/s", _latencies(online)))
    machine = result.machine
    said += [
        ("machine", f"{machine.cores} cores, {machine.cpu_model}, {machine.memory_gibibytes:g} GiB"),
        ("cores busy with other programs", f"{result.others_busy_cores}"),
    ]
    return said


def _latencies(online: Online) -> str:
    def pair(p50: float, p99: float) -> str:
        return f"{1000 * p50:.0f} / {1000 * p99:.0f} ms"

    return (
        f"p50 / p99 {pair(online.p50_seconds, online.p99_seconds)}, "
        f"{online.goodput:.1%} within {1000 * GOOD_SECONDS:.0f} ms; "
        f"aiokafka loop {pair(online.kafka_p50_seconds, online.kafka_p99_seconds)}; "
        f"best loop without Kafka {pair(online.best_p50_seconds, online.best_p99_seconds)}"
    )
