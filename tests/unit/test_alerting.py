"""The life of alerts: each opens, fires and resolves once, whatever order windows come in and however often."""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from pipeline import telemetry
from pipeline.alerting import AlertRow, GpuAlerts
from pipeline.telemetry import Condition, GpuWindow

START = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
NEVER = datetime.min.replace(tzinfo=UTC)
Step = tuple[str, str, int]


def condition(rule: str, state: Literal["pending", "firing"], since: int, **more: Any) -> Condition:
    return Condition(rule=rule, severity="warning", state=state, since=START + since * MINUTE, **more)


class Gpu:
    """One GPU's alerts as they are stored, each window applied in a round of its own."""

    def __init__(self) -> None:
        self.rows: dict[str, AlertRow] = {}
        self.reconciled = NEVER
        self.steps: list[Step] = []

    def window(self, minute: int, *conditions: Condition, length: int = 1) -> list[Step]:
        alerts = GpuAlerts(1, self.reconciled, self.rows)
        start = START + minute * MINUTE
        alerts.apply(
            GpuWindow(gpu_uuid="GPU-1", host="node", conditions=conditions), start, start + length * MINUTE
        )
        self.rows |= alerts.changed
        self.reconciled = alerts.reconciled
        new: list[Step] = [
            (s.condition.rule, s.state, round((s.time - START) / MINUTE)) for s in alerts.steps
        ]
        self.steps += new
        return new


def test_a_condition_fires_and_is_over() -> None:
    """An alert is pending from its condition's beginning, fires when a window says so, ends when none lists it."""
    gpu = Gpu()
    assert gpu.window(0, condition("hot", "pending", 0)) == [("hot", "pending", 0)]
    assert gpu.window(1, condition("hot", "pending", 0)) == []
    assert gpu.window(2, condition("hot", "firing", 0, value=91.0)) == [("hot", "firing", 3)]
    assert gpu.window(3, condition("hot", "firing", 0, value=95.0)) == []
    assert gpu.window(4) == [("hot", "resolved", 5)]
    (row,) = gpu.rows.values()
    assert (row.fired_at, row.seen_at, row.resolved_at) == (
        START + 3 * MINUTE,
        START + 4 * MINUTE,
        START + 5 * MINUTE,
    )
    assert row.condition.value == 95.0


def test_what_never_fired_ends_in_silence() -> None:
    """A pending alert whose condition ends is closed, and nobody is told."""
    gpu = Gpu()
    gpu.window(0, condition("hot", "pending", 0))
    assert gpu.window(1) == []
    assert [(row.state, row.fired_at) for row in gpu.rows.values()] == [("resolved", None)]


def test_an_event_adds_and_ends_nothing() -> None:
    """A window of zero length opens alerts; a closed window from before it does not end them, a later one does."""
    gpu = Gpu()
    gpu.window(0, condition("hot", "firing", 0))
    assert gpu.window(3, condition("xid_79", "firing", 3), length=0) == [("xid_79", "firing", 3)]
    assert gpu.window(1, condition("hot", "firing", 0)) == []
    assert gpu.window(3, condition("hot", "firing", 0)) == [("xid_79", "resolved", 4)]


def test_a_condition_that_comes_back_is_another_alert() -> None:
    """The same rule with another beginning opens again; the one that is over stays over."""
    gpu = Gpu()
    gpu.window(0, condition("hot", "firing", 0))
    gpu.window(1)
    assert gpu.window(2, condition("hot", "firing", 0), condition("hot", "firing", 2)) == [
        ("hot", "firing", 3)
    ]
    assert sorted(row.state for row in gpu.rows.values()) == ["firing", "resolved"]


@given(
    st.lists(st.lists(st.sampled_from(["hot", "cold", "slow"]), unique=True), min_size=1, max_size=12),
    st.data(),
)
def test_repeated_and_late_windows_change_nothing(story: list[list[str]], data: st.DataObject) -> None:
    """Reading from any earlier window again, as after a crash, leaves the same alerts and makes no step twice."""
    windows = []
    since: dict[str, int] = {}
    for minute, rules in enumerate(story):
        since = {rule: since.get(rule, minute) for rule in rules}
        windows.append(
            [condition(r, "firing" if minute - s >= 2 else "pending", s) for r, s in since.items()]
        )
    smooth, shaken = Gpu(), Gpu()
    for minute, conditions in enumerate(windows):
        smooth.window(minute, *conditions)
        shaken.window(minute, *conditions)
        for again in range(data.draw(st.integers(0, minute)), minute + 1):
            shaken.window(again, *windows[again])
    assert shaken.rows == smooth.rows
    assert shaken.steps == smooth.steps
    assert len(set(smooth.steps)) == len(smooth.steps)
    assert all(
        key == telemetry.alert_id("GPU-1", r.condition.rule, r.since) for key, r in smooth.rows.items()
    )
