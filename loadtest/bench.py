"""How fast the spine is: beside bare loops over the same pictures, and from publication to prediction.

It takes addresses: Kafka from the settings, where one `predict` worker of the same settings must run, and the
worker's process, to ask for its processor time. It starts nothing but the loops, each in a process of
its own. As many of the same pictures go through the loops in turn with it, and medians are compared.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from loadtest import loop_process
from loadtest.images import SamplePicture, draw
from loadtest.meter import Meter
from loadtest.report import Circumstances, Timing, median, percentile, rounded
from loadtest.results import ARMS, Offline, Online, Pictures, Plan, Result, compare, in_turn
from pipeline.settings import Settings

Say = Callable[[str], None]


class Bench:
    """Runs a plan against one worker."""

    def __init__(
        self, settings: Settings, plan: Plan, *, pids: Mapping[str, int] | None = None, say: Say = print
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._meter = Meter(settings, pids=pids)
        self._say = say

    async def run(self, load_before: float) -> Result:
        """Measure everything.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan = self._plan
        self._say(f"drawing {plan.pictures} pictures")
        pictures = await asyncio.to_thread(lambda: list(draw(plan.seed, plan.pictures)))
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
            folder = Path(name)
            for picture in pictures:
                (folder / picture.id).write_bytes(picture.data)
            offline = await self._offline(pictures, folder)
        online = await self._online(pictures)
        return Result(
            circumstances=Circumstances.now(load_before),
            plan=plan,
            models=self._settings.models,
            pictures=await asyncio.to_thread(Pictures.of, pictures),
            offline=offline,
            online=online,
            load_after=round(os.getloadavg()[0], 2),
        )

    async def _offline(self, pictures: Sequence[SamplePicture], folder: Path) -> Offline:
        plan = self._plan
        data = [picture.data for picture in pictures]
        await self._meter.offline(data, min(plan.offline_images, 10 * self._settings.max_batch_size))
        timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
        for number in range(plan.offline_repeats):
            for arm in in_turn(ARMS, number):
                if arm == "spine":
                    timing = await self._meter.offline(data, plan.offline_images)
                else:
                    timing = await self._loop(arm, folder)
                self._say(
                    f"{arm} {number + 1}/{plan.offline_repeats}: {timing.images_per_second:.0f} images/s"
                )
                timings[arm].append(timing)
        return compare(timings, plan.offline_images, self._settings.max_batch_size)

    async def _loop(self, arm: str, folder: Path) -> Timing:
        """Run one of the bare loops in a process of its own."""
        kind = arm.removesuffix("_loop")
        size = self._settings.max_batch_size
        arguments = [kind, str(folder), str(self._plan.offline_images), str(size)]
        out = await loop_process.output_of("loadtest.loops", *arguments, environment=_given(self._settings))
        return msgspec.json.decode(out, type=Timing)

    async def _online(self, pictures: Sequence[SamplePicture]) -> Online:
        plan = self._plan
        rate = plan.online_images_per_second
        self._say(f"online: {rate:g} images/s for {plan.online_seconds:g} s")
        seen = await self._meter.online(
            [picture.data for picture in pictures], rate, plan.online_seconds, plan.seed
        )
        latencies, receipts = seen.latencies, seen.receipts
        return Online(
            images_per_second=rate,
            p50_seconds=rounded(percentile(latencies, 0.50)),
            p95_seconds=rounded(percentile(latencies, 0.95)),
            p99_seconds=rounded(percentile(latencies, 0.99)),
            max_seconds=rounded(max(latencies)),
            sent=seen.sent,
            received=len(latencies),
            dead_letters=seen.dead_letters,
            lost=seen.sent - len(latencies) - seen.dead_letters,
            driver_late_p99_seconds=rounded(percentile(seen.lateness, 0.99)),
            queue_p50_seconds=rounded(median(receipt.queue_seconds or 0.0 for receipt in receipts)),
            decode_p50_seconds=rounded(median(receipt.decode_seconds or 0.0 for receipt in receipts)),
            forward_p50_seconds=rounded(median(receipt.forward_seconds or 0.0 for receipt in receipts)),
        )


def _given(settings: Settings) -> dict[str, str]:
    """Hand the loops what decides about models and threads, wherever the settings came from."""
    names = (
        "models", "allow_python_models", "allow_exported_models", "device", "precision", "torch_compile",
        "max_batch_size", "decode_threads", "torch_threads",
    )  # fmt: skip
    given = {f"MILLRACE_{name.upper()}": str(getattr(settings, name)) for name in names}
    return given | {"MILLRACE_MODEL_CACHE": str(settings.resolved_model_cache)}
