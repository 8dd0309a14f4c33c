"""How many records a second one `store` takes from Kafka into PostgreSQL, and one `archive` into the object store.

The `lagThreshold` of their ScaledObjects is worked out from these rates. It takes the settings of a stack with a
migrated database, and a way to run a worker on it.
"""

import asyncio
import base64
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime

import msgspec

from loadtest import images
from loadtest.report import Circumstances, Machine, read_metrics, rounded
from pipeline import admin, events
from pipeline.broker import Publisher
from pipeline.errors import DependencyError
from pipeline.events import ImageEvent, ModelResult, Outgoing, Prediction, Receipt
from pipeline.settings import Settings
from pipeline.topics import IMAGES_BULK, PREDICTIONS

Say = Callable[[str], None]
#: Runs a step on a stack; yields the address of its HTTP site.
Worker = Callable[[Settings, str], AbstractContextManager[str]]

_STALL_SECONDS = 120.0
_POLL_SECONDS = 0.1
_FINISHED = re.compile(r"millrace_records_finished_total\{.*\}")
_DIMENSION = 128
_EMBEDDING = base64.b64encode(struct.pack(f"<{_DIMENSION}f", *(0.01 * n for n in range(_DIMENSION)))).decode()
# What the built-in models say of a picture.
_MODELS = (
    ModelResult(
        model="builtin:quality",
        version="1",
        digest="sha256:0f1e",
        task="classify",
        label="keep",
        score=0.91,
        scores={"sharpness": 0.88, "exposure": 0.47, "contrast": 0.21, "noise": 0.002},
    ),
    ModelResult(
        model="builtin:fingerprint",
        version="1",
        digest="sha256:1a2b",
        task="embed",
        embedding=_EMBEDDING,
        dimension=_DIMENSION,
    ),
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    seed: int = 7
    repeats: int = 3
    predictions: int = 20_000
    pictures: int = 3_000
    #: Drawn pictures; they are published again and again under other ids.
    different: int = 60


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step: the slowest of the repeats, which are all listed.

    Of `store` that is the last: from 10,000 vectors on it keeps an index for search, which costs half its rate.
    """

    records_per_second: float
    mean_bytes: int
    records: int
    repeats: tuple[float, ...]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole benchmark."""

    commit: str | None
    machine: Machine
    seed: int
    circumstances: Circumstances
    plan: Plan
    store: Step
    archive: Step
    others_busy_cores: float = 0.0


def measure(settings: Settings, plan: Plan, worker: Worker, circumstances: Circumstances, say: Say) -> Result:
    """Measure both steps, each over a backlog of its own."""
    pictures = [images.draw_one(plan.seed, number).data for number in range(plan.different)]
    return Result(
        commit=circumstances.commit,
        machine=circumstances.machine,
        seed=plan.seed,
        circumstances=circumstances,
        plan=plan,
        store=_measured(settings, plan, worker, "store", plan.predictions, _prediction, say),
        archive=_measured(
            settings, plan, worker, "archive", plan.pictures, lambda id_: _picture(id_, pictures), say
        ),
    )


def rows(result: Result) -> list[tuple[str, str]]:
    """Return what a person wants to read of a result."""
    return [
        (name, f"{step.records_per_second:g} records/s of {step.mean_bytes:,} bytes")
        for name, step in (("store", result.store), ("archive", result.archive))
    ]


def _measured(
    settings: Settings,
    plan: Plan,
    worker: Worker,
    step: str,
    records: int,
    make: Callable[[str], Outgoing],
    say: Say,
) -> Step:
    topic = PREDICTIONS if step == "store" else IMAGES_BULK
    rates, sizes = [], 0
    for repeat in range(plan.repeats):
        own = settings.model_copy(update={"topic_prefix": f"bench-{step}-{repeat}-"})
        say(f"{step}, repeat {repeat + 1}: publishing {records} records")
        outgoing = (make(f"{step}-{plan.seed}-{repeat}-{number}") for number in range(records))
        sizes = asyncio.run(_publish(own, own.topic(topic.name), outgoing))
        with worker(own, step) as url:
            rates.append(_rate(list(_finished(url, records))))
        say(f"  {rounded(rates[-1])} records/s")
    return Step(
        records_per_second=rounded(min(rates)),
        mean_bytes=sizes // records,
        records=records,
        repeats=tuple(map(rounded, rates)),
    )


def _prediction(image_id: str) -> Outgoing:
    versions = tuple((model.model, model.version) for model in _MODELS)
    return events.encode_prediction(
        Prediction(
            id=events.prediction_id(image_id, "default", versions),
            image_id=image_id,
            deployment="default",
            lane="bulk",
            outcome="predicted",
            time=datetime.now(UTC),
            receipt=Receipt(topic=IMAGES_BULK.name, partition=0, offset=0),
            models=_MODELS,
        )
    )


def _picture(image_id: str, pictures: list[bytes]) -> Outgoing:
    number = int(image_id.rpartition("-")[2])
    return events.encode_image(ImageEvent(id=image_id, data=pictures[number % len(pictures)]))


async def _publish(settings: Settings, topic: str, outgoing: Iterable[Outgoing]) -> int:
    """Publish everything; return how many bytes the values had."""
    await admin.apply_topics(settings)
    publisher = Publisher(settings, client_id="bench")
    await publisher.start()
    size = 0
    try:
        batch: list[Outgoing] = []
        for each in outgoing:
            batch.append(each)
            size += len(each.value or b"")
            if len(batch) == 500:
                await asyncio.gather(*(publisher.publish_forever(topic, one, step="bench") for one in batch))
                batch.clear()
        await asyncio.gather(*(publisher.publish_forever(topic, one, step="bench") for one in batch))
    finally:
        await publisher.stop()
    return size


def _finished(url: str, records: int) -> Iterator[tuple[float, float]]:
    """Yield (time, records finished) at once, then from the first batch to the last."""
    started = time.monotonic()
    yield started, 0.0
    finished = 0.0
    while finished < records:
        found = read_metrics(url)
        now = time.monotonic()
        finished = sum(value for name, value in found.items() if _FINISHED.fullmatch(name))
        if finished:
            yield now, finished
        if now > started + _STALL_SECONDS:
            raise DependencyError(f"{finished:.0f} of {records} records finished after {_STALL_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


def _rate(points: list[tuple[float, float]]) -> float:
    """Return records/s from the first batch seen to the last."""
    (begun, first), (ended, last) = points[min(1, len(points) - 2)], points[-1]
    return (last - first) / (ended - begun)
