"""Run an engine in a test: submit records, wait for outcomes, hold the device, script the object store."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from prometheus_client import REGISTRY

from pipeline.events import ImageEvent, Record
from pipeline.inference import Engine, EngineOptions, Failed, Outcome, Predicted, Request
from pipeline.models import Model, Output
from pipeline.topics import Lane
from tests.support import models, pictures

CPU = torch.device("cpu")
GOOD = pictures.solid((10, 200, 10))
GUILTY = pictures.guilty()
OPTIONS = EngineOptions(
    max_batch_size=8, decode_threads=2, torch_threads=1, missing_object_grace_seconds=0.02
)
Fetch = Callable[[str], Awaitable[bytes]]


async def nothing_to_fetch(dataref: str) -> bytes:
    raise AssertionError("no record of this test has a dataref")


class Bench:
    """An engine with its outcomes."""

    def __init__(self, model: Sequence[Model], options: EngineOptions, fetch: Fetch) -> None:
        self._room = asyncio.Event()
        self.engine = Engine(model, options, fetch=fetch, deliver=self._deliver, on_room=self._room.set)
        self.outcomes: dict[str, Outcome] = {}
        self.calls: list[list[str]] = []
        self.claims: list[str] = []
        self._submitted = 0
        self._changed = asyncio.Event()

    def submit(
        self,
        data: bytes = GOOD,
        *,
        name: str | None = None,
        lane: Lane = "bulk",
        ours: bool = True,
        is_forgotten: Callable[[], bool] = lambda: False,
        **event: Any,
    ) -> str:
        """Submit a record and return its name."""
        name = name or f"record-{self._submitted}"
        self._submitted += 1

        def claim() -> bool:
            self.claims.append(name)
            return ours

        record = Record(topic="images.bulk.v1", partition=3, offset=self._submitted, timestamp_ms=0)
        event_value = ImageEvent(id=name, data=b"" if "dataref" in event else data, **event)
        self.engine.submit(
            Request(event_value, record, lane, time.monotonic(), claim, self, is_forgotten=is_forgotten)
        )
        return name

    async def finished(self, count: int | None = None) -> dict[str, Outcome]:
        """Wait for the outcomes of everything submitted, or of some."""
        async with asyncio.timeout(20):
            while len(self.outcomes) < (self._submitted if count is None else count):
                self._changed.clear()
                await self._changed.wait()
        return self.outcomes

    async def wait_for_room(self, lane: Lane = "bulk") -> None:
        """Wait until the engine has room for a record of a lane."""
        async with asyncio.timeout(20):
            while lane not in self.engine.room():
                self._room.clear()
                await self._room.wait()

    def _deliver(self, outcomes: Sequence[tuple[Request, Outcome]]) -> None:
        self.calls.append([request.event.id for request, _ in outcomes])
        for request, outcome in outcomes:
            assert request.context is self
            assert request.event.id not in self.outcomes, "a second outcome"
            self.outcomes[request.event.id] = outcome
        self._changed.set()


@asynccontextmanager
async def running(
    *model: Model, options: EngineOptions = OPTIONS, fetch: Fetch = nothing_to_fetch
) -> AsyncIterator[Bench]:
    """Run an engine for the length of a block."""
    bench = Bench(model or [models.doing_nothing(CPU)], options, fetch)
    await bench.engine.start()
    try:
        yield bench
    finally:
        await bench.engine.stop(drain_seconds=0.0)


class Gate:
    """A model whose forward pass waits until it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.model = models.BehavingModel("gate", self._wait)

    def _wait(self, batch: torch.Tensor) -> list[Output]:
        self.entered.set()
        assert self.opened.wait(20)
        return [Output(score=1.0)] * len(batch)

    async def is_entered(self) -> None:
        await asyncio.to_thread(self.entered.wait, 20)


def predicted(outcome: Outcome) -> Predicted:
    assert isinstance(outcome, Predicted), outcome
    return outcome


def error_of(outcome: Outcome) -> Exception:
    assert isinstance(outcome, Failed), outcome
    return outcome.error


class Store:
    """An object store that answers as scripted: bytes, or errors to raise first."""

    def __init__(self, **answers: Sequence[bytes | Exception]) -> None:
        self.answers = {name: list(script) for name, script in answers.items()}
        self.asked: list[str] = []

    async def fetch(self, dataref: str) -> bytes:
        self.asked.append(dataref)
        await asyncio.sleep(0)
        script = self.answers[dataref]
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def batches(cut: str) -> float:
    """Return how many batches of this process were cut for a reason."""
    return REGISTRY.get_sample_value("millrace_batches_total", {"cut": cut}) or 0.0


def describe(outcome: Outcome) -> str:
    return outcome.error.code if isinstance(outcome, Failed) else type(outcome).__name__


async def decoded(bench: Bench, count: int) -> None:
    """Wait until so many records are decoded and wait for the device."""
    async with asyncio.timeout(20):
        while len(bench.engine._batcher) < count:  # noqa: ASYNC110, no event for what only a test asks
            await asyncio.sleep(0.001)
