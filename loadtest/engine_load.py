"""The engine under a bulk backlog: real-time beside it, a swap in the middle of it, a small one and a large one.

It takes addresses, as `loadtest/engine.py` does: Kafka from the settings, where one `predict` worker of the
plan's first model runs, and the worker's HTTP site. Backlogs are there from the start, in one transaction.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise

import msgspec

from loadtest.engine import WEIGHTS_SEED, Say, specification
from loadtest.engine_results import Backlog, Depth, Plan, Result, Swap
from loadtest.images import draw_photo
from loadtest.meter import Meter, require_all
from loadtest.report import median, percentile, rounded
from loadtest.soak import MIN_GROWTH_BYTES, Trend, trend
from pipeline import events, garbage, registry
from pipeline.deployments import Registry
from pipeline.errors import DependencyError
from pipeline.events import Record
from pipeline.registry import Follower
from pipeline.settings import Settings

# Measured once the device has its usual batches and the lane's budget is full.
WARM_UP_SHARE = 0.05
# What of the backlog must be left while something is measured beside it.
LEFT_SHARE = 0.1
# A version of a torchvision model is loaded, timed and warmed up beside the load; 4 s on two cores.
SWAP_SECONDS = 120.0
MEMORY_SAMPLES = 100
# Kept of each picture by a process that leaks (see `loadtest/soak.py`); below that an allocator's moods show.
MAX_GROWTH_BYTES_PER_IMAGE = 1.1 * 1024
# Predicted when the new version has said that it runs: a few batches.
AFTERWARDS_IMAGES = 128
# 15 kB as a JPEG.
SMALL_WIDTH, SMALL_HEIGHT = 308, 231


class LoadBench:
    """Runs the plan's parts under load for one worker."""

    def __init__(self, settings: Settings, plan: Plan, worker_url: str, *, say: Say = print) -> None:
        self._settings = settings
        self._plan = plan
        self._say = say
        self._meter = Meter(settings, worker_url=worker_url)

    async def run(self, result: Result) -> Result:
        """Add the plan's parts to a result.

        Raises:
            DependencyError: as its parts do.
        """
        parts = set(self._plan.parts)
        return msgspec.structs.replace(
            result,
            backlog=await self.backlog() if "backlog" in parts else None,
            swap=await self.swap() if "swap" in parts else None,
            # Last: it leaves the worker with the costs of small pictures.
            depth=await self.depth() if "depth" in parts else None,
        )

    async def backlog(self) -> Backlog:
        """Send real-time pictures while a bulk backlog is worked off.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan, count = self._plan, self._plan.backlog_images
        self._say(f"backlog: preloading {count:,} pictures")
        pictures = await self._pictures()
        ids = self._meter.new_ids(count)
        done: dict[str, int] = {"realtime": 0, "bulk": 0}

        def note(_: Record, prediction: events.Prediction) -> None:
            done[prediction.lane] += 1

        async def while_it_lasts() -> None:
            until = time.monotonic() + plan.realtime_seconds
            # The clock and the worker decide.
            while time.monotonic() < until and count - done["bulk"] > LEFT_SHARE * count:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

        async with self._meter.reading(note) as outcomes, self._meter.preloaded(pictures, ids) as commit:
            async with self._watching_memory(lambda: done["bulk"]) as memory:
                await commit()
                await outcomes.wait(ids, share=WARM_UP_SHARE)
                # A full collection of this process takes 150 ms, which would count as the worker's.
                garbage.set_apart()
                started, done_before, before = time.monotonic(), dict(done), await self._batches()
                seen = await self._meter.arrive(
                    outcomes, pictures, plan.realtime_images_per_second, plan.seed, "realtime",
                    until=while_it_lasts,
                )  # fmt: skip
                gc.unfreeze()
                left = count - done["bulk"]
                seconds, after = time.monotonic() - started, await self._batches()
                images = sum(done.values()) - sum(done_before.values())
                await outcomes.wait(ids)
            require_all(outcomes, ids)
        mean_batch_size = (after[1] - before[1]) / (after[0] - before[0])
        batch_seconds = self._settings.max_batch_size / (images / seconds)
        p99 = percentile(seen.latencies, 0.99)
        found = Backlog(
            images=count,
            images_per_second=rounded(images / seconds),
            mean_batch_size=rounded(mean_batch_size),
            batch_seconds=rounded(batch_seconds),
            realtime_images_per_second=plan.realtime_images_per_second,
            realtime_sent=seen.sent,
            realtime_p50_seconds=rounded(percentile(seen.latencies, 0.5)),
            realtime_p99_seconds=rounded(p99),
            realtime_p99_batches=rounded(p99 / batch_seconds),
            left_images=left,
            resident_bytes=_growth(memory),
        )
        self._say(f"backlog: {found.images_per_second:g} images/s, p99 {found.realtime_p99_batches} batches")
        return found

    async def swap(self) -> Swap:
        """Activate another version of the model while a backlog is worked off.

        Raises:
            DependencyError: Kafka or the worker does not answer, or the worker refuses the version.
        """
        count = self._plan.swap_images
        self._say(f"swap: preloading {count:,} pictures")
        pictures = await self._pictures()
        made: list[tuple[int, events.Prediction]] = []

        def note(record: Record, prediction: events.Prediction) -> None:
            made.append((record.timestamp_ms, prediction))

        async with (
            Follower(self._settings, client_id="millrace-bench") as follower,
            self._meter.reading(note) as outcomes,
        ):
            started = time.monotonic()
            ids = await self._add(pictures, count)
            await outcomes.wait(ids, share=2 * WARM_UP_SHARE)
            activating = asyncio.create_task(self._activate(follower))
            while not (await asyncio.wait({activating}, timeout=0.05))[0]:
                if len(ids) - len(outcomes.seen) < count / 2:
                    ids += await self._add(pictures, count // 2)
            begun, ended = activating.result()
            left = len(ids) - len(outcomes.seen)
            ids += await self._add(pictures, AFTERWARDS_IMAGES)
            await outcomes.wait(ids)
            seconds = max(outcomes.seen.values(), default=started) - started
        return conclude_swap(made, ids, begun, ended, left, len(ids) / seconds)

    async def depth(self) -> Depth:
        """Work off small backlogs and a large one of small pictures.

        Raises:
            DependencyError: Kafka or the worker does not answer, or predictions stay away.
        """
        plan = self._plan
        self._say(f"depth: {plan.shallow_images:,} and {plan.deep_images:,} small pictures")
        pictures = await self._pictures(SMALL_WIDTH, SMALL_HEIGHT)
        await self._meter.offline(pictures, plan.shallow_images)

        async def rate(count: int) -> float:
            timing = await self._meter.offline(pictures, count)
            self._say(f"depth, backlog of {count:,}: {timing.images_per_second:.1f} images/s")
            return timing.images_per_second

        before = (plan.shallow_repeats + 1) // 2
        repeats = [await rate(plan.shallow_images) for _ in range(before)]
        deep = await rate(plan.deep_images)
        repeats += [await rate(plan.shallow_images) for _ in range(plan.shallow_repeats - before)]
        shallow = median(repeats)
        return Depth(
            mean_bytes=round(sum(map(len, pictures)) / len(pictures)),
            shallow_images=plan.shallow_images,
            shallow_images_per_second=rounded(shallow),
            deep_images=plan.deep_images,
            deep_images_per_second=rounded(deep),
            ratio_of_deep=rounded(deep / shallow),
            repeats=tuple(map(rounded, repeats)),
        )

    async def _pictures(self, width: int | None = None, height: int | None = None) -> list[bytes]:
        plan = self._plan
        width, height = width or plan.width, height or plan.height
        return await asyncio.to_thread(
            lambda: [draw_photo(plan.seed, number, width, height) for number in range(plan.pictures)]
        )

    async def _add(self, pictures: Sequence[bytes], count: int) -> list[str]:
        """Put so many pictures into the backlog, and return their ids."""
        ids = self._meter.new_ids(count)
        async with self._meter.preloaded(pictures, ids) as commit:
            await commit()
        return ids

    async def _batches(self) -> tuple[float, float]:
        """Return how many batches the worker has made, and how many pictures were in them."""
        metrics = await self._meter.worker()
        return metrics["millrace_batch_size_count"], metrics["millrace_batch_size_sum"]

    async def _activate(self, follower: Follower) -> tuple[datetime, datetime]:
        """Have another version run; return when it was activated and when the worker said that it runs."""
        name, deployment = self._plan.models[0], self._settings.deployment
        desired = await registry.activate(
            self._settings,
            deployment,
            [specification(name, WEIGHTS_SEED + 1)],
            activated_by="millrace bench-engine",
        )
        revision = desired.version.revision

        def is_settled(known: Registry) -> bool:
            running, now = known[deployment], datetime.now(UTC)
            states = running.states(now).values()
            return running.revision == revision and bool(states) and running.is_settled(now)

        await follower.wait_until(is_settled, SWAP_SECONDS)
        running = follower.registry[deployment]
        since = [status.since for status in running.replicas.values() if status.revision == revision]
        if len(since) != len(running.replicas) or not since or None in since:
            states = ", ".join(running.states(datetime.now(UTC)).values()) or "none"
            raise DependencyError(
                f"the other version does not run within {SWAP_SECONDS:g} s: replicas: {states}"
            )
        return desired.activated_at, max(moment for moment in since if moment is not None)

    @asynccontextmanager
    async def _watching_memory(self, images: Callable[[], int]) -> AsyncIterator[list[tuple[float, float]]]:
        """Note the pictures predicted so far and the worker's resident memory, a hundred times in all."""
        samples = [(0.0, (await self._meter.worker())["process_resident_memory_bytes"])]
        step = self._plan.backlog_images / MEMORY_SAMPLES

        async def watch() -> None:
            while True:
                if images() >= samples[-1][0] + step:
                    resident = (await self._meter.worker())["process_resident_memory_bytes"]
                    samples.append((images(), resident))
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        try:
            yield samples
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            if not watching.cancelled():
                watching.result()
        if images() > samples[-1][0]:
            samples.append((images(), (await self._meter.worker())["process_resident_memory_bytes"]))


def _growth(samples: Sequence[tuple[float, float]]) -> Trend:
    """Say how memory moved over the second half of the pictures."""
    half = samples[len(samples) // 2 :] if len(samples) > 3 else samples
    at = [images for images, _ in half]
    allowed = max(MIN_GROWTH_BYTES, MAX_GROWTH_BYTES_PER_IMAGE * (at[-1] - at[0]))
    return trend(at, [resident for _, resident in half], allowed)


def conclude_swap(
    made: Sequence[tuple[int, events.Prediction]],
    ids: Sequence[str],
    begun: datetime,
    ended: datetime,
    left: int,
    images_per_second: float,
) -> Swap:
    """Find the longest silence of a swap among all predictions, each with its publication in milliseconds."""
    begun_ms, ended_ms = begun.timestamp() * 1000, ended.timestamp() * 1000
    ordered = sorted(made, key=lambda each: each[0])
    gaps = [
        (later - earlier, earlier <= ended_ms and later >= begun_ms)
        for (earlier, _), (later, _) in pairwise(ordered)
    ]
    batches = [
        prediction.receipt.forward_seconds or 0.0
        for at_ms, prediction in ordered
        if begun_ms <= at_ms <= ended_ms
    ]
    old = min(prediction.revision for _, prediction in made)
    predicted = [prediction.image_id for _, prediction in made]
    by_old = sum(prediction.revision == old for _, prediction in made)
    return Swap(
        images=len(ids),
        images_per_second=rounded(images_per_second),
        seconds=rounded((ended - begun).total_seconds()),
        longest_gap_seconds=max((gap for gap, is_during in gaps if is_during), default=0) / 1000,
        longest_batch_seconds=rounded(max(batches, default=0.0)),
        longest_gap_otherwise_seconds=max((gap for gap, is_during in gaps if not is_during), default=0)
        / 1000,
        predicted_by_old=by_old,
        predicted_by_new=len(made) - by_old,
        left_images=left,
        lost=len(set(ids) - set(predicted)),
        repeated=len(predicted) - len(set(predicted)),
    )
