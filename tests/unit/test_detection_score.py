"""The score of detection: what counts as found and as false, and that a small fleet's faults are found."""

from datetime import UTC, datetime, timedelta

from loadtest.detection import DetectionPlan, Quiet, Raised, alerts, count_by_rule, judge, measure
from loadtest.fleet_faults import FAULTS, Injected
from pipeline.detection import load_rules
from pipeline.telemetry import Condition, GpuWindow, Windows

BEGIN = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def minutes(count: float) -> datetime:
    return BEGIN + timedelta(minutes=count)


def injected(fault: str, gpu_uuid: str = "GPU-1") -> Injected:
    return Injected(fault, 1, gpu_uuid, "node-1", minutes(10), minutes(30), 0.5, False, visible=minutes(11))


def raised(rule: str, fired: float, gpu_uuid: str = "GPU-1") -> Raised:
    return Raised(gpu_uuid, rule, minutes(fired - 2), minutes(fired - 1), minutes(fired))


def test_what_is_found_and_what_is_false() -> None:
    """Only a rule that means the fault finds it, on its GPU, in its time; on healthy GPUs alerts are false."""
    early, other, late = (
        raised("thermal_margin", 5),
        raised("pcie_replays", 14),
        raised("thermal_margin", 200),
    )
    right, peer = raised("thermal_margin", 13), raised("straggler", 14, "GPU-2")
    outcome = judge([injected("thermal")], [early, right, other, late, peer])
    assert [alert for _, alert in outcome.faults] == [right]
    assert outcome.false == [early, late, peer]
    missed = judge([injected("thermal")], [other])
    assert ([alert for _, alert in missed.faults], missed.false) == ([None], [])


def test_a_benign_error_must_raise_nothing() -> None:
    """An alert about an application's mistake is false."""
    alert = raised("xid_31", 11)
    assert judge([injected("xid_benign")], [alert]).false == [alert]
    assert judge([injected("xid_critical")], [alert]).false == []


def test_alerts_of_windows() -> None:
    """A condition is one alert from its first window on, once it fires; mere information is none."""

    def window(minute: int, state: str, severity: str = "warning") -> Windows:
        condition = Condition(rule="r", severity=severity, state=state, since=BEGIN)  # type: ignore[arg-type]
        gpu = GpuWindow(gpu_uuid="GPU-1", host="node-1", conditions=(condition,))
        return Windows(key="node-1", start=minutes(minute), end=minutes(minute + 1), gpus=(gpu,))

    (alert,) = alerts([window(0, "pending"), window(1, "firing"), window(2, "firing")])
    assert (alert.since, alert.seen, alert.fired) == (BEGIN, minutes(1), minutes(2))
    assert alerts([window(0, "pending"), window(0, "firing", "info")]) == []


def test_a_small_fleet_is_judged_rightly() -> None:
    """One fault of each kind is found, in three windows in the median, and nothing is said of healthy GPUs."""
    plan = DetectionPlan(
        seeds=(101,),
        gpus=160,
        seconds=4200.0,
        faults_of_each=1,
        healthy_gpus=64,
        healthy_seconds=1800.0,
        processes=1,
    )
    result = measure(load_rules(), plan)
    assert result.missed == ()
    assert count_by_rule(result.false) == {}
    # Of so few; the fleets that are reported have nine of each.
    assert result.median_delay_windows <= 3
    assert result.quiet == {"xid_benign": Quiet(injected=1, alerts=0)}
    assert sum(kind.injected for kind in result.kinds.values()) == len(FAULTS) - 1
