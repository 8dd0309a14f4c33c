"""Faults that the generator does not have, made by hand: each raises what it should, once, and nothing else."""

from collections.abc import Callable, Iterable, Mapping

import pytest

from pipeline.detection import Watch, WatchOptions, close_all, load_rules
from pipeline.telemetry import Samples
from tests.support.gpus import Fault, alerts, by_gpu, conditions, feed, record, uuid

BOOK = load_rules()
ALL = {uuid(gpu) for gpu in range(8)}
#: What a small dump has: no reasons of clocks, no limits.
TEN = (
    "utilization_percent", "temperature_celsius", "power_watts", "sm_clock_mhz", "memory_clock_mhz",
    "memory_used_mebibytes", "memory_free_mebibytes", "fan_speed_percent", "memory_copy_percent", "last_xid",
)  # fmt: skip
REST = {
    "memory_clock_mhz": 2619.0, "memory_free_mebibytes": 21_000.0, "fan_speed_percent": 40.0,
    "memory_copy_percent": 45.0, "last_xid": 0.0,
}  # fmt: skip


def small_dump(fault: Fault, minutes: int, gpus: int = 8) -> dict[str, dict[str, list[int]]]:
    """Return the alerts of a host that measures ten fields."""

    def values(gpu: int, at: float) -> Mapping[str, float] | None:
        found = fault(gpu, at)
        return found if found is None else {**REST, **found}

    records = (record(s, values, gpus=gpus, fields=TEN) for s in range(0, minutes * 60, 20))
    return alerts(feed(Watch(BOOK), records))


def one(since: int, values: Mapping[str, float]) -> Fault:
    """One GPU measures other values from a minute on."""
    return lambda gpu, at: values if gpu == 3 and at >= since * 60 else {}


def everyone(since: int, values: Mapping[str, float]) -> Fault:
    """All GPUs of the host do."""
    return lambda gpu, at: values if at >= since * 60 else {}


def at_times(minutes: Iterable[int], period: int, values: Mapping[str, float]) -> Fault:
    """One GPU does in some minutes of each period."""
    chosen = frozenset(minutes)
    return lambda gpu, at: values if gpu == 3 and at // 60 % period in chosen else {}


def run(fault: Fault, minutes: int, gpus: int = 8) -> dict[str, dict[str, list[int]]]:
    """Return the alerts of a host that measures all."""
    return alerts(feed(Watch(BOOK), (record(s, fault, gpus=gpus) for s in range(0, minutes * 60, 20))))


@pytest.mark.parametrize("window_seconds", [60.0, 300.0])
def test_a_scrape_that_was_cut_off_loses_nobody(window_seconds: float) -> None:
    """Of GPUs whose rows the end of a dump, or one scrape of a minute, does not have no alert fires."""

    def fault(gpu: int, at: float) -> Mapping[str, float] | None:
        return None if gpu > 2 and (at == 1200 or at >= 2400) else {}

    watch = Watch(BOOK, WatchOptions(window_seconds=window_seconds))
    closed = feed(watch, (record(s, fault) for s in range(0, 2401, 300)))
    closed += close_all(watch.close_silent(["node-1"]))[0]
    assert {c.rule for _, _, c in conditions(closed)} == {"gpu_lost"}
    assert alerts(closed) == {}


def test_a_gpu_is_not_lost_before_it_was_seen() -> None:
    """One that comes while the window before it is still open is not in that window."""
    fault: Fault = lambda gpu, at: None if gpu == 7 and at < 600 else {}  # noqa: E731
    closed = feed(Watch(BOOK), (record(s, fault) for s in range(0, 1200, 20)))
    assert conditions(closed) == []
    first = min(start for name, start in by_gpu(closed) if name == uuid(7))
    assert first == min(
        w.windows.start for w in closed if (w.windows.start.minute, w.windows.start.hour) == (10, 0)
    )


def xids(records: Iterable[Samples]) -> set[tuple[str, str]]:
    return {(gpu, c.rule) for _, gpu, c in conditions(feed(Watch(BOOK), records))}


def test_a_last_xid_that_comes_up_later_is_an_error() -> None:
    """DCGM's gauge that is there only after an error tells it; one that was there from the beginning does not."""

    def later(gpu: int, at: float) -> Mapping[str, float]:
        return {"last_xid": 79.0} if gpu == 3 and at >= 610 else {}

    assert xids(record(s, later) for s in range(0, 900, 10)) == {(uuid(3), "xid_79")}
    within: Fault = lambda gpu, at: {"last_xid": 79.0} if gpu == 3 and at >= 30 else {}  # noqa: E731
    assert xids(record(s, within) for s in range(0, 300, 10)) == {(uuid(3), "xid_79")}
    always: Fault = lambda gpu, at: {"last_xid": 79.0}  # noqa: E731
    assert xids(record(s, always) for s in range(0, 300, 10)) == set()


@pytest.mark.parametrize(("first", "second"), [(0, 1), (58, 62)])
def test_parts_of_the_first_scrape_may_be_apart(first: int, second: int) -> None:
    """A gauge that comes a moment after the other fields of the same scrape was there from the beginning."""
    steps = [
        (first, ["power_watts"]),
        (second, ["last_xid"]),
        (first + 10, ["power_watts"]),
        (second + 10, ["last_xid"]),
        (first + 150, ["power_watts"]),
    ]
    old: Fault = lambda gpu, at: {"last_xid": 79.0}  # noqa: E731
    assert xids(record(s, old, fields=fields) for s, fields in steps) == set()


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"temperature_margin_celsius": 1.0}, "thermal_margin"),
        ({"clock_event_reasons": 64.0}, "clock_throttle"),
        ({"sm_clock_mhz": 1200.0}, "straggler"),
        ({"temperature_celsius": 92.0, "temperature_margin_celsius": 25.0}, "temperature_peers"),
    ],
)
def test_what_comes_and_goes_is_one_alert(values: Mapping[str, float], rule: str) -> None:
    """A fault that is there every other minute of an hour opens one alert."""
    found = run(at_times([0], 2, values), 60)
    assert found.keys() == {uuid(3)}
    assert len(found[uuid(3)][rule]) == 1


@pytest.mark.parametrize(
    ("values", "rule"),
    [({"utilization_percent": 60.0}, "straggler_load"), ({"power_watts": 300.0}, "power_anomaly")],
)
def test_what_is_slow_now_and_then_is_slow(values: Mapping[str, float], rule: str) -> None:
    """What holds two minutes of five fires, though it never holds as long as it must without a break."""
    assert run(at_times([0, 1], 5, values), 40) == {uuid(3): {rule: [5]}}


def test_what_happens_once_does_not_add_up() -> None:
    """Two bad minutes fire nothing that asks for three, and those of ten minutes later begin anew."""
    assert run(at_times([0, 1], 12, {"utilization_percent": 60.0}), 60) == {}


def test_all_gpus_of_a_host_slow_down_together() -> None:
    """A power cap on the whole machine shows against each GPU's own past, and goes on while it lasts."""
    drop = everyone(30, {"sm_clock_mhz": 1300.0, "power_watts": 380.0})
    found = small_dump(drop, 80)
    assert found == {gpu: {"clock_drop": [32]} for gpu in ALL}
    back: Fault = lambda gpu, at: drop(gpu, at) if at < 2400 else {}  # noqa: E731
    records = (record(s, back, gpus=2) for s in range(0, 3600, 20))
    last = max(m for m, _, c in conditions(feed(Watch(BOOK), records)) if c.rule == "clock_drop")
    assert last == 44


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_small_hosts(gpus: int) -> None:
    """One slow GPU of four shows among its peers, and where there are too few of them against its past."""
    fault: Fault = lambda gpu, at: (  # noqa: E731
        {"sm_clock_mhz": 1200.0, "power_watts": 400.0} if gpu == 0 and at >= 1800 else {}
    )
    found = small_dump(fault, 40, gpus)
    assert found.keys() == {uuid(0)}
    assert found[uuid(0)].keys() >= {"clock_drop"} | ({"straggler"} if gpus == 4 else set())


@pytest.mark.parametrize(
    "values",
    [
        {"sm_clock_mhz": 1500.0, "power_watts": 690.0},  # heavier kernels, which the power limit slows down
        {"sm_clock_mhz": 1980.0, "power_watts": 330.0},  # lighter ones
        {
            "sm_clock_mhz": 345.0,
            "power_watts": 75.0,
            "utilization_percent": 0.0,
            "memory_used_mebibytes": 4.0,
        },
    ],
)
def test_another_job_is_no_fault(values: Mapping[str, float]) -> None:
    """What all GPUs of a host do differently from one minute on need not be wrong."""
    assert small_dump(everyone(30, values), 60) == {}


@pytest.mark.parametrize("who", [one, everyone])
def test_heavier_kernels_are_no_power_cap(who: Callable[[int, Mapping[str, float]], Fault]) -> None:
    """At an unchanged limit lower clocks at more power are the job's, of all GPUs or of one among lighter jobs."""
    heavier = {"sm_clock_mhz": 1500.0, "power_watts": 690.0, "memory_used_mebibytes": 40_000.0}
    assert run(who(15, heavier), 25) == {}


@pytest.mark.parametrize("who", [one, everyone])
def test_a_power_limit_that_was_set_low(who: Callable[[int, Mapping[str, float]], Fault]) -> None:
    """A lower limit shows among peers, and where all have it against the past."""
    found = run(who(15, {"power_limit_watts": 400.0, "power_watts": 400.0, "sm_clock_mhz": 1300.0}), 25)
    assert {gpu: rules.get("power_cap") for gpu, rules in found.items()} == {
        gpu: [15] for gpu in ({uuid(3)} if who is one else ALL)
    }


def test_the_fan_runs_and_nothing_is_hot() -> None:
    """A fan at full speed for the same power and temperature is told."""
    assert small_dump(one(30, {"fan_speed_percent": 95.0}), 60) == {uuid(3): {"fan_ramp": [34]}}


def test_memory_alone_is_hot() -> None:
    """One GPU's memory far above that of its peers shows below the absolute limit too."""
    assert run(one(10, {"memory_temperature_celsius": 93.0}), 30) == {
        uuid(3): {"memory_temperature_peers": [11]}
    }


@pytest.mark.parametrize("who", [one, everyone])
def test_a_pcie_link_that_is_trained_down(who: object) -> None:
    """A link at a lower generation is told by its peers, and where all have it by its past; at rest it is right."""
    link = "DCGM_FI_DEV_PCIE_LINK_GEN"
    fault = one(30, {link: 3.0}) if who is one else everyone(30, {link: 3.0})
    found = run(lambda gpu, at: {link: 5.0, **(fault(gpu, at) or {})}, 40)
    assert found == {gpu: {"pcie_link": [31]} for gpu in ({uuid(3)} if who is one else ALL)}
    idle = {link: 1.0, "utilization_percent": 0.0, "memory_used_mebibytes": 4.0}
    assert run(lambda gpu, at: {link: 5.0} if at < 1800 else idle, 60) == {}


def test_power_falls_at_full_utilization() -> None:
    """One GPU that draws half of what its equally busy peers draw is told without clocks and limits."""
    found = small_dump(one(30, {"power_watts": 300.0}), 40)
    assert found == {uuid(3): {"power_anomaly": [32]}}


@pytest.mark.parametrize("fields", ["all", "ten"])
def test_busy_and_drawing_nothing(fields: str) -> None:
    """Kernels that wait for ever keep GPUs busy at hardly any power, also where the limit is not known."""
    fault = everyone(30, {"utilization_percent": 100.0, "power_watts": 85.0})
    found = run(fault, 60) if fields == "all" else small_dump(fault, 60)
    assert {gpu: rules.get("hung") for gpu, rules in found.items()} == {gpu: [34] for gpu in ALL}


def test_light_kernels_are_not_hung() -> None:
    """Small kernels draw little too, but leave gaps; one that waits for ever leaves none."""
    assert run(everyone(2, {"utilization_percent": 97.0, "power_watts": 110.0}), 12, gpus=1) == {}


def test_a_temperature_that_does_not_move() -> None:
    """A sensor that says the same while power goes up and down is told; at the same power it may say the same."""

    def phases(gpu: int, at: float) -> Mapping[str, float]:
        is_low = at // 300 % 2 == 1
        warm = (
            {"temperature_celsius": 62.0}
            if gpu == 3
            else {"temperature_celsius": (50.0 if is_low else 62.0) + at % 3}
        )
        return {**warm, "power_watts": 300.0 if is_low else 600.0}

    assert small_dump(phases, 40) == {uuid(3): {"temperature_stuck": [7]}}
    assert small_dump(everyone(0, {"temperature_celsius": 62.0}), 40) == {}


@pytest.mark.parametrize(
    ("seconds", "watts"),
    [
        (60, (300.0, 600.0)),  # one sample a window
        (30, (300.0, 300.0, 600.0, 600.0)),  # two
        (20, (200.0, 700.0, 700.0, 200.0, 200.0, 700.0)),  # means that move, of bursts in every window
    ],
)
def test_a_temperature_of_few_samples_does_not_stand(seconds: int, watts: tuple[float, ...]) -> None:
    """Few readings may be the same by chance, and within a window power is faster than heat."""

    def bursts(gpu: int, at: float) -> Mapping[str, float]:
        return {"temperature_celsius": 62.0, "power_watts": watts[int(at) // seconds % len(watts)]}

    records = (record(s, bursts, gpus=1) for s in range(0, 900, seconds))
    assert alerts(feed(Watch(BOOK), records)) == {}


@pytest.mark.parametrize(
    ("counter", "rule"),
    [
        ("ecc_corrected_volatile", "ecc_corrected"),
        ("energy_millijoules", None),
    ],
)
def test_a_counter_that_jumps_once(counter: str, rule: str | None) -> None:
    """A jump is one alert, however large it is, and forgotten after two hours."""
    jump: Fault = lambda gpu, at: {counter: 5e6 if gpu == 1 and at >= 600 else 0.0}  # noqa: E731
    closed = feed(Watch(BOOK), (record(s, jump, gpus=2) for s in range(0, 9000, 60)))
    assert alerts(closed) == ({uuid(1): {rule: [10]}} if rule else {})
    assert all(10 <= minute < 120 for minute, _, _ in conditions(closed))


def test_heat_by_its_counter() -> None:
    """A dump without reasons of clocks tells by the time that heat slowed a GPU down."""
    name = "thermal_violation_nanoseconds"
    slowed: Fault = lambda gpu, at: {name: max(0.0, at - 600) * 5e8 if gpu == 3 else 0.0}  # noqa: E731
    assert run(slowed, 20) == {uuid(3): {"clock_throttle": [10]}}


def test_heat_while_a_gpu_was_away() -> None:
    """A minute of heat that the counter tells after ten minutes without samples is a tenth of them."""

    def away(gpu: int, at: float) -> Mapping[str, float] | None:
        if gpu == 1 and 300 <= at < 900:
            return None
        return {"thermal_violation_nanoseconds": 6e10 if gpu == 1 and at >= 900 else 0.0}

    assert run(away, 20, gpus=2) == {uuid(1): {"gpu_lost": [6]}}
