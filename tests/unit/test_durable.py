"""Isolation of what a database refuses, and waiting out faults: pure logic, no database."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies

from agents import durable
from pipeline.errors import DependencyError, StorageRefusedError


class Table:
    """Takes a batch whole, or refuses it if something in it is guilty."""

    def __init__(self, guilty: set[int]) -> None:
        self.guilty = guilty
        self.saved: list[int] = []
        self.calls = 0

    async def save(self, items: Sequence[int]) -> None:
        self.calls += 1
        if self.guilty.intersection(items):
            raise StorageRefusedError(f"refused: {sorted(self.guilty.intersection(items))}")
        self.saved += items


@settings(max_examples=40)
@given(size=strategies.integers(0, 200), data=strategies.data())
async def test_exactly_the_guilty_are_refused(size: int, data: strategies.DataObject) -> None:
    """Whichever records are guilty, they are refused one by one and every other is saved exactly once."""
    guilty = data.draw(strategies.sets(strategies.integers(0, max(size - 1, 0)), max_size=size))
    table = Table(guilty)
    refused = await durable.isolate(range(size), table.save)
    assert [item for item, _ in refused] == sorted(guilty)
    assert all(str(error) == f"refused: [{item}]" for item, error in refused)
    assert sorted(table.saved) == sorted(set(range(size)) - guilty)


@settings(max_examples=40)
@given(size=strategies.integers(1, 500), data=strategies.data())
async def test_one_guilty_record_costs_little(size: int, data: strategies.DataObject) -> None:
    """One guilty record among N costs about 2 log2(N) calls, none costs one."""
    table = Table({data.draw(strategies.integers(0, size - 1))})
    await durable.isolate(range(size), table.save)
    assert table.calls <= 1 + 2 * math.ceil(math.log2(size))
    innocent = Table(set())
    await durable.isolate(range(size), innocent.save)
    assert innocent.calls == 1


async def test_faults_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency's fault is tried again until it is over; any other error passes through at once."""
    monkeypatch.setattr(durable, "backoff_seconds", lambda: iter([0.0] * 10))
    answers: list[Exception | str] = [DependencyError("down"), DependencyError("starting"), "done"]

    async def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await durable.forever(call, step="store", dependency="database") == "done"
    answers[:] = [DependencyError("down"), StorageRefusedError("no"), "never"]
    with pytest.raises(StorageRefusedError):
        await durable.forever(call, step="store", dependency="database")
    assert answers == ["never"]
