"""How fast the engine is: torchvision models through Kafka, beside the loops people write by hand.

It takes addresses: Kafka from the settings, where one `predict` worker of the model runs. It starts nothing but
the loops of `loadtest/engine_loops.py`, in processes of their own, on the same cores and in the same run.

Offline: 1280 x 960 JPEGs that are all there from the start. Online: Poisson arrivals; the best loop has them
without Kafka, the aiokafka loop and the worker from publication to prediction.
"""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtest import loop_process, meter
from loadtest.engine_results import GOOD_SECONDS, Measured, Offline, Online, Plan
from loadtest.images import draw_photo
from loadtest.meter import Meter
from loadtest.report import Timing, median, percentile, rounded
from loadtest.results import in_turn
from pipeline import admin
from pipeline.settings import PREFIX, Settings

ARMS = ("pipeline", "kafka", "best", "naive")
# As in `loadtest/engine_loops.py`, which this process does not import: torch and torchvision are slow to.
WEIGHTS_SEED = 7
LOOPS = "loadtest.engine_loops"
LOOP_PREFIX = "loop-"
# Before anything counts: batches of every size, so that their costs are known, and how long a pass may be.
PROBE_IMAGES = 256
# A pass of a slow model has at least so many: a few batches.
MIN_IMAGES = 128

Say = Callable[[str], None]


def specification(model: str, seed: int = WEIGHTS_SEED) -> str:
    """Return the model as `MILLRACE_MODELS` names it, with weights drawn from a seed, as those of the loops are."""
    return f"torchvision:{model}?weights=random&seed={seed}"


@dataclass(frozen=True)
class Loops:
    """The loops of one model, over the pictures of a folder."""

    process: loop_process.LoopProcess
    #: Of the naive loop alone, which has nothing tuned.
    naive: loop_process.LoopProcess
    model: str
    folder: str
    #: As JSON: `loadtest.engine_loops.Tuning`.
    tuning: str

    async def run(self, kind: str, *arguments: str) -> bytes:
        """Run one of them to its end."""
        if kind == "naive":
            return await self.naive.ask(kind, *arguments)
        return await self.process.ask(kind, self.tuning, *arguments)


class EngineBench:
    """Runs the plan for the model of one worker; `pids` are the `worker` and, if it is ours, the `broker`."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        worker_url: str,
        *,
        pids: Mapping[str, int] | None = None,
        say: Say = print,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._say = say
        self._pids = dict(pids or {})
        self._pipeline = Meter(settings, worker_url=worker_url, pids=self._pids)

    async def run(self, model: str) -> Measured:
        """Measure everything.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan = self._plan
        self._say(f"{model}: drawing {plan.pictures} pictures")
        pictures = await asyncio.to_thread(
            lambda: [
                draw_photo(plan.seed, number, plan.width, plan.height) for number in range(plan.pictures)
            ]
        )
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
            for number, picture in enumerate(pictures):
                (Path(name) / f"{number:06d}.jpg").write_bytes(picture)
            async with AsyncExitStack() as stack:
                process, naive = [
                    await stack.enter_async_context(loop_process.LoopProcess(LOOPS, "serve", model, name))
                    for _ in range(2)
                ]
                tuning = (await process.ask("tune")).decode().strip()
                self._say(f"{model}: the best loop runs with {tuning}")
                loops = Loops(process, naive, model, name, tuning)
                kafka = await stack.enter_async_context(self._kafka_loop(loops))
                offline = await self._offline(loops, pictures, kafka)
                best, own = offline.best_images_per_second, offline.pipeline_images_per_second
                found = {
                    rate: await self._online(loops, pictures, kafka, rate)
                    for rate in sorted({self._usual_rate(best), 0.4 * best, 0.8 * best, 0.8 * own})
                }
        return Measured(
            offline=offline,
            online=found[self._usual_rate(best)],
            online_at_40_percent=found[0.4 * best],
            online_at_80_percent=found[0.8 * best],
            online_at_80_percent_of_own=found[0.8 * own],
        )

    def _usual_rate(self, best: float) -> float:
        # A model that cannot keep up with the usual rate would only show how long its queue becomes.
        return min(self._plan.online_images_per_second, 0.4 * best)

    async def _offline(self, loops: Loops, pictures: Sequence[bytes], kafka: Meter) -> Offline:
        plan = self._plan
        probe = min(PROBE_IMAGES, plan.offline_images)
        probed = [await each.offline(pictures, probe) for each in (kafka, self._pipeline)]
        images = max(MIN_IMAGES, round(plan.offline_seconds * probed[-1].images_per_second))
        images = min(images, plan.offline_images)
        timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
        batch_sizes = []
        for number in range(plan.repeats):
            for arm in in_turn(ARMS, number):
                if arm == "pipeline":
                    before = await self._batches()
                    timing = await self._pipeline.offline(pictures, images)
                    batch_sizes.append(images / (await self._batches() - before))
                elif arm == "kafka":
                    timing = await kafka.offline(pictures, images)
                else:
                    count = images // (4 if arm == "naive" else 1)
                    timing = msgspec.json.decode(await loops.run(arm, str(count)), type=Timing)
                rate = timing.images_per_second
                self._say(f"{loops.model}, {arm} {number + 1}/{plan.repeats}: {rate:.1f} images/s")
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
            images=images,
            cpu_milliseconds={
                arm: rounded(median(timing.cpu_milliseconds_per_image or 0.0 for timing in found))
                for arm, found in timings.items()
            },
            repeats={
                arm: tuple(rounded(timing.images_per_second) for timing in found)
                for arm, found in timings.items()
            },
        )

    async def _batches(self) -> float:
        return (await self._pipeline.worker())["millrace_batch_size_count"]

    async def _online(self, loops: Loops, pictures: Sequence[bytes], kafka: Meter, rate: float) -> Online:
        plan, seconds = self._plan, self._plan.online_seconds
        said = await loops.run("online", f"{rate}", f"{seconds}", f"{plan.seed}")
        best = msgspec.json.decode(said, type=list[float])
        beside = await kafka.online(pictures, rate, seconds, plan.seed)
        seen = await self._pipeline.online(pictures, rate, seconds, plan.seed)
        found = Online(
            images_per_second=rounded(rate),
            p50_seconds=rounded(percentile(seen.latencies, 0.5)),
            p99_seconds=rounded(percentile(seen.latencies, 0.99)),
            goodput=_goodput(seen),
            best_p50_seconds=rounded(percentile(best, 0.5)),
            best_p99_seconds=rounded(percentile(best, 0.99)),
            kafka_p50_seconds=rounded(percentile(beside.latencies, 0.5)),
            kafka_p99_seconds=rounded(percentile(beside.latencies, 0.99)),
            kafka_goodput=_goodput(beside),
            cpu_milliseconds=_cpu_milliseconds(seen),
            kafka_cpu_milliseconds=_cpu_milliseconds(beside),
        )
        self._say(
            f"{loops.model}, {rate:.0f} images/s: p50 {1000 * found.p50_seconds:.0f} ms, "
            f"aiokafka loop {1000 * found.kafka_p50_seconds:.0f} ms"
        )
        return found

    @asynccontextmanager
    async def _kafka_loop(self, loops: Loops) -> AsyncIterator[Meter]:
        """Run the aiokafka loop on topics of its own, and yield what measures it."""
        settings = self._settings.model_copy(update={"topic_prefix": LOOP_PREFIX})
        await admin.apply_topics(settings)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", LOOPS, "kafka", loops.model, loops.folder, loops.tuning, LOOP_PREFIX,
            env=loop_process.ENVIRONMENT
            | os.environ
            | {f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": self._settings.resolved_kafka},
        )  # fmt: skip
        try:
            yield Meter(settings, pids=self._pids | {"worker": process.pid})
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


def _goodput(seen: meter.Online) -> float:
    return rounded(sum(latency <= GOOD_SECONDS for latency in seen.latencies) / seen.sent, 4)


def _cpu_milliseconds(seen: meter.Online) -> dict[str, float]:
    return {name: rounded(1000 * seconds / seen.sent) for name, seconds in seen.cpu_seconds.items()}
