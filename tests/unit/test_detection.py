"""Detection: samples to windows, and windows to conditions that hold."""

import random
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.detection import (
    RuleBook,
    Watch,
    WatchOptions,
    close_all,
    document,
    load_rules,
    load_window_model,
    roster,
)
from pipeline.errors import ConfigurationError
from pipeline.telemetry import Gpu, Sample, Samples, Windows
from tests.support.gpus import START, Fault, by_gpu, conditions, feed, record, uuid

BOOK = load_rules()
MINUTES = 30


def rules_of(fault: Fault, minutes: int = MINUTES, **options: float) -> dict[str, dict[str, int]]:
    """Return, by GPU, which rules fire and from which minute on."""
    watch = Watch(BOOK, WatchOptions(**options))  # type: ignore[arg-type]
    found: dict[str, dict[str, int]] = {}
    for minute, gpu, condition in conditions(
        feed(watch, (record(s, fault) for s in range(0, minutes * 60, 10)))
    ):
        if condition.state == "firing":
            found.setdefault(gpu, {}).setdefault(condition.rule, minute)
    return found


def faulty(since: float, values: Mapping[str, float], gpu: int = 3) -> Fault:
    """One GPU of eight measures other values from a moment on."""
    return lambda number, at: values if number == gpu and at >= since else {}


def grows(name: str, since: float, per_minute: float, first: float = 0.0, gpu: int = 3) -> Fault:
    """A value of one GPU grows from a moment on."""
    return lambda number, at: {
        name: first + (max(0.0, at - since) / 60 * per_minute if number == gpu else 0.0)
    }


@pytest.mark.parametrize(
    ("fault", "rule", "minute"),
    [
        (faulty(600, {"temperature_margin_celsius": 1.0}), "thermal_margin", 10),
        (faulty(600, {"memory_temperature_celsius": 99.0}), "memory_temperature", 11),
        (faulty(600, {"temperature_celsius": 84.0}), "temperature_peers", 11),
        (faulty(600, {"clock_event_reasons": 64.0}), "clock_throttle", 10),
        (faulty(600, {"power_limit_watts": 400.0}), "power_cap", 10),
        (faulty(600, {"power_watts": 300.0}), "power_anomaly", 12),
        (faulty(600, {"sm_clock_mhz": 1200.0}), "straggler", 10),
        (faulty(600, {"utilization_percent": 60.0}), "straggler_load", 12),
        (faulty(600, {"utilization_percent": 0.0}), "idle_waste", 24),
        (faulty(600, {"row_remap_pending": 1.0}), "row_remap_pending", 10),
        (faulty(600, {"ecc_uncorrected_volatile": 1.0}), "ecc_uncorrected", 10),
        (grows("ecc_corrected_volatile", 600, 6.0), "ecc_corrected", 11),
        (grows("nvlink_replays", 600, 20.0), "nvlink_errors", 10),
        (grows("pcie_replays", 600, 20.0), "pcie_replays", 10),
        (grows("memory_used_mebibytes", 600, 500.0, first=60_000), "memory_leak", 18),
        (lambda gpu, at: None if gpu == 3 and at >= 600 else {}, "gpu_lost", 11),
    ],
)  # fmt: skip
def test_a_fault_raises_its_rule_on_its_gpu_alone(fault: Fault, rule: str, minute: int) -> None:
    """Each fault fires its rule in time, and nothing on the other GPUs."""
    found = rules_of(fault)
    assert found.keys() == {uuid(3)}
    assert found[uuid(3)][rule] == minute


@pytest.mark.parametrize(
    ("values", "rules"),
    [
        ({}, set()),
        ({"slowdown_temperature_celsius": 90.0}, set()),
        ({"slowdown_temperature_celsius": 57.0, "temperature_celsius": 56.0}, {"thermal_margin"}),
        ({"clock_event_reasons": 32.0}, {"thermal_margin", "clock_throttle"}),
        # Slow for its power limit, which says nothing of heat.
        ({"clock_event_reasons": 4.0}, set()),
        ({"temperature_celsius": 92.0}, {"temperature", "temperature_peers"}),
    ],
)
def test_no_margin_is_believed_of_a_gpu_that_slows_down(values: Mapping[str, float], rules: set[str]) -> None:
    """A margin of 0 or less alone is a reading that cannot be trusted: the temperature is asked, or the clocks."""
    for margin in (0.0, -40.0):
        found = rules_of(faulty(0, {"temperature_margin_celsius": margin, **values}), minutes=5)
        assert found.get(uuid(3), {}).keys() == rules


def test_a_healthy_host_raises_nothing() -> None:
    """With noise and harmless clock events no condition holds, not even a pending one."""
    bits = [0x1, 0x2, 0x4, 0x100]
    closed = feed(
        Watch(BOOK),
        (
            record(s, lambda g, at: {"clock_event_reasons": float(bits[(g + int(at)) % 4])})
            for s in range(0, 3600, 10)
        ),
    )
    assert len(closed) == 59
    assert conditions(closed) == []


def test_a_condition_ends_beyond_its_clear_limit() -> None:
    """Between limit and clear limit a condition goes on, and it ends once, with one beginning."""
    margins = {0: 25.0, 5: 2.0, 10: 5.0, 15: 7.0, 25: 5.0}

    def fault(gpu: int, at: float) -> Mapping[str, float]:
        margin = next(value for minute, value in reversed(margins.items()) if at >= minute * 60)
        return {"temperature_margin_celsius": margin} if gpu == 3 else {}

    held = conditions(feed(Watch(BOOK), (record(s, fault) for s in range(0, 1800, 10))))
    # Five minutes more: it may come and go.
    assert [minute for minute, _, _ in held] == list(range(5, 20))
    assert {condition.since for _, _, condition in held} == {START + timedelta(minutes=5)}
    assert [condition.state for _, _, condition in held] == 15 * ["firing"]


def test_what_was_seen_is_said() -> None:
    """A condition says value, limit, for how long, and what the peers have."""
    held = conditions(
        feed(Watch(BOOK), (record(s, faulty(0, {"temperature_celsius": 88.0})) for s in range(0, 240, 10)))
    )
    minute, gpu, condition = held[-1]
    assert (minute, gpu, condition.rule, condition.state) == (2, uuid(3), "temperature_peers", "firing")
    assert (condition.value, condition.limit, condition.field) == (88.0, 5.0, "temperature_celsius")
    assert condition.peers is not None
    assert condition.peers.count == 7
    assert condition.message == (
        f"88.0 C, much hotter than its peers, for 3 min; the median of 7 peers is {condition.peers.median:.4g} "
        f"(score {condition.peers.score:.1f}, limit 5)"
    )


def test_few_gpus_are_not_compared() -> None:
    """With fewer than three peers nobody is called strange."""
    closed = feed(
        Watch(BOOK),
        (record(s, faulty(0, {"sm_clock_mhz": 900.0}, gpu=1), gpus=3) for s in range(0, 600, 10)),
    )
    assert all("peers" not in gpu.scores for gpu in by_gpu(closed).values())
    assert conditions(closed) == []


def test_counters_that_begin_again() -> None:
    """After a reset a counter's increase is what it counted since; nothing negative, nothing huge."""

    def fault(gpu: int, at: float) -> Mapping[str, float]:
        return {"ecc_corrected_volatile": 500.0 if at < 300 else 2.0}

    watch = Watch(BOOK)
    assert conditions(feed(watch, (record(s, fault) for s in range(0, 900, 10)))) == []
    roster = watch.rosters["node-1"]
    hourly = roster.state[:, watch.plan.layout.hourly][:, watch.plan.hourly.index("ecc_corrected_volatile")]
    assert hourly.tolist() == 8 * [2.0]


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_any_order_within_the_lateness_gives_the_same_windows(seed: int, host_count: int) -> None:
    """Records delayed by less than the lateness, repeated or cut otherwise give the same windows to the digit."""
    draw = random.Random(seed)
    records = [record(s, gpus=3, every=5.0, count=2) for s in range(10, 260, 10)]
    arrivals = sorted(
        (samples.samples[-1].time.timestamp() + draw.uniform(0, 19), number)
        for number, samples in enumerate(records)
        for _ in range(draw.choice([1, 1, 2]))
    )
    options = WatchOptions(lateness_seconds=30.0)
    straight = feed(Watch(BOOK, options), records)
    mixed = feed(Watch(BOOK, options), [_cut(records[number], draw) for _, number in arrivals])
    assert len(straight) == 3
    assert by_gpu(mixed) == by_gpu(straight)


def _cut(samples: Samples, draw: random.Random) -> Samples:
    """Put a record's samples in another order."""
    order = list(samples.samples)
    draw.shuffle(order)
    return msgspec.structs.replace(samples, samples=tuple(order))


@given(st.integers(0, 10_000), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_state_that_is_read_back_continues_as_if_nothing_had_happened(cut: int, gpu: int) -> None:
    """A worker that takes over anywhere, from published windows and unfinished records, publishes the same."""
    records = [record(s, grows("ecc_corrected_volatile", 300, 3.0, gpu=gpu)) for s in range(0, 1200, 20)]
    whole = feed(Watch(BOOK), records)
    cut %= len(records)
    first = Watch(BOOK)
    before = feed(first, records[:cut])
    second = Watch(BOOK)
    if before:
        value = msgspec.json.encode(before[-1].windows)
        second.restore([msgspec.json.decode(value, type=Windows)])
    held = (
        [token for window in first.rosters["node-1"].open.values() for token in window.tokens] if cut else []
    )
    unfinished = min((token[1] for token in held if isinstance(token, tuple)), default=cut)
    after = feed(second, records[unfinished:])
    assert [msgspec.json.encode(w.windows) for w in before + after] == [
        msgspec.json.encode(w.windows) for w in whole
    ]


def test_every_key_that_is_read_back_goes_on() -> None:
    """A record of one key does not make a worker forget the state of the others, however old it is."""
    first = Watch(BOOK)
    hosts = ("node-1", "node-2")
    closed = [
        w for host in hosts for w in feed(first, (record(s, host=host) for s in range(0, 100, 10)), host)
    ]
    second = Watch(BOOK)
    second.restore(window.windows for window in closed)
    now_ms = 1_900_000_000_000
    for host in hosts:
        second.feed(host, host, record(100, host=host), now_ms)
    assert {key: len(roster.members) for key, roster in second.rosters.items()} == dict.fromkeys(hosts, 8)
    assert all((roster.state[:, 0] > 0).all() for roster in second.rosters.values())


def test_late_samples_are_counted_and_not_scored() -> None:
    """What comes after its window closed changes nothing and is finished at once."""
    watch = Watch(BOOK)
    feed(watch, [record(s) for s in (0, 30, 60, 90)])
    fed = watch.feed("late", "node-1", record(20), 0)
    assert fed.dropped["late"] == 8
    assert fed.windows == 0
    assert fed.closings == []


def test_a_record_that_spans_windows_is_held_until_the_last_closes() -> None:
    """A record is part of every window that its samples are in."""
    watch = Watch(BOOK)
    fed = watch.feed("both", "node-1", record(70, count=3), 0)
    assert fed.windows == 2
    fed = watch.feed("next", "node-1", record(100), 0)
    (first,) = fed.closings
    assert list(first.window.tokens) == ["both"]
    fed = watch.feed("last", "node-1", record(150), 0)
    assert list(fed.closings[0].window.tokens) == ["both", "next"]


def test_silent_keys_close() -> None:
    """A key of which nothing came for long, by Kafka's clock, closes although its own clock stands still."""
    watch = Watch(BOOK, WatchOptions(silence_seconds=60))
    watch.feed(1, "node-1", record(10), 10_000)
    assert watch.feed(2, "node-2", record(20, host="node-2"), 60_000).closings == []
    fed = watch.feed(3, "node-2", record(30, host="node-2"), 71_000)
    assert [(c.roster.key, c.cause) for c in fed.closings] == [("node-1", "silence")]
    assert watch.open_keys == {"node-2"}
    (closing,) = watch.close_silent(["node-1", "node-2", "unknown"])
    assert closing.roster.key == "node-2"


def test_pressure_closes_the_oldest() -> None:
    """A key whose clock stands still does not fill the memory."""
    watch = Watch(BOOK, WatchOptions(max_samples=100))
    closings = [c for n in range(30) for c in watch.feed(n, "node-1", record(n % 7), 0).closings]
    assert [c.cause for c in closings] == ["pressure"]
    assert watch.held_samples <= 100


def test_xids_are_told_at_once_and_hold() -> None:
    """An XID error is a window of zero length, then a condition until its time is over; a repeat prolongs it."""
    watch = Watch(BOOK)
    samples = record(65)
    xid = msgspec.structs.replace(samples.samples[3], xids=(31, 79))
    fed = watch.feed(1, "node-1", msgspec.structs.replace(samples, samples=(xid, *samples.samples)), 0)
    (event,) = fed.events
    (gpu,) = event.gpus
    assert event.is_event
    assert (event.start, gpu.gpu_uuid, gpu.xids) == (START + timedelta(seconds=65), uuid(3), (31, 79))
    (condition,) = gpu.conditions
    assert (condition.rule, condition.state, condition.action) == ("xid_79", "firing", "restart_machine")
    held = conditions(feed(watch, (record(s) for s in range(70, 2400, 10))))
    assert {(minute, uuid_, c.rule) for minute, uuid_, c in held} == {
        (minute, uuid(3), "xid_79") for minute in range(1, 31)
    }
    assert {c.since for _, _, c in held} == {condition.since}


def test_benign_xids_raise_nothing() -> None:
    """Errors of applications are noted in the window and alarm nobody."""
    watch = Watch(BOOK)
    sample = Sample(gpu_uuid="GPU-1", time=START, xids=(13, 31, 43, 45))
    assert watch.feed(1, "k", Samples(host="h", samples=(sample,)), 0).events == []
    (window,) = close_all(watch.close_silent(["k"]))[0]
    assert window.windows.gpus[0].xids == (13, 31, 43, 45)
    assert window.windows.gpus[0].conditions == ()


def test_a_last_xid_that_changes_is_an_event_and_one_that_stays_is_none() -> None:
    """DCGM's gauge of the last code says something when it changes, and nothing by standing there."""

    def fault(gpu: int, at: float) -> Mapping[str, float]:
        return {"last_xid": 48.0 if gpu == 3 and at >= 130 else 13.0}

    held = conditions(feed(Watch(BOOK), (record(s, fault) for s in range(0, 600, 10))))
    assert {(uuid_, c.rule, c.since) for _, uuid_, c in held} == {
        (uuid(3), "xid_48", START + timedelta(seconds=130))
    }


def test_windows_that_close_together_are_as_those_that_close_one_by_one() -> None:
    """An XID error that only the gauge tells holds in every later window, also when a backlog is caught up with."""

    def fault(gpu: int, at: float) -> Mapping[str, float]:
        return {"last_xid": 79.0 if gpu == 3 and at >= 30 else 0.0}

    records = [record(s, fault) for s in range(0, 400, 10)]
    watch = Watch(BOOK)
    closings = [c for n, r in enumerate(records) for c in watch.feed(n, "node-1", r, 0).closings]
    together = [window for round_ in close_all(closings) for window in round_]
    assert [w.windows for w in together] == [w.windows for w in feed(Watch(BOOK), records)]
    assert {(m, c.rule) for m, _, c in conditions(together)} == {(m, "xid_79") for m in range(6)}


def test_late_xids_hold_in_the_next_window() -> None:
    """An XID error that comes after its window closed is told once, and holds in the window that closes next."""
    watch = Watch(BOOK)
    feed(watch, [record(s) for s in (0, 30, 60, 90)])
    told = []
    for number in range(3):
        late = Sample(gpu_uuid=uuid(3), time=START + timedelta(seconds=20), xids=(79,))
        fed = watch.feed(f"late {number}", "node-1", Samples(host="node-1", samples=(late,)), 0)
        assert fed.windows == 1
        told += [c.since for event in fed.events for gpu in event.gpus for c in gpu.conditions]
    (closing,) = watch.close_silent(["node-1"])
    assert {f"late {number}" for number in range(3)} <= set(closing.window.tokens)
    held = conditions(close_all([closing])[0])
    assert {(c.rule, c.since) for _, _, c in held} == {("xid_79", since) for since in told}
    assert len(set(told)) == 1
    fed = watch.feed("alone", "node-1", Samples(host="node-1", samples=(late,)), 0)
    (closing,) = watch.close_silent(["node-1"])
    assert list(closing.window.tokens) == ["alone"]
    assert (fed.windows, len(close_all([closing]))) == (1, 1)


def test_a_host_that_comes_back_while_its_windows_are_scored() -> None:
    """In one batch a key falls silent, closes, and comes back with fewer GPUs long after."""
    watch = Watch(BOOK)
    closings = []
    for number, samples in enumerate([record(0), record(90), record(7290, gpus=2), record(7390, gpus=2)]):
        closings += watch.feed(number, "node-1", samples, 0).closings
        closings += watch.close_silent(["node-1"])
    rounds = close_all(closings)
    assert [[len(w.windows.gpus) for w in round_] for round_ in rounds] == [[8], [8], [2], [2]]


def test_a_deleted_part_of_a_gpu_is_not_lost() -> None:
    """Instances of MIG come and go; a whole GPU that goes is lost."""
    watch = Watch(BOOK)
    parts = tuple(Gpu(gpu_uuid=uuid(g), parent_uuid="GPU-whole") for g in range(4))
    described = msgspec.structs.replace(record(0), gpus=parts)
    later = (record(s, lambda g, at: None if g in {0, 7} else {}) for s in range(60, 300, 10))
    held = conditions(feed(watch, [described, *later]))
    assert {(gpu, c.rule) for _, gpu, c in held} == {(uuid(7), "gpu_lost")}


def test_a_gpu_that_is_let_go_is_listed_once_more() -> None:
    """When a GPU is away for a day its conditions end, and a new owner does not take it up again."""
    watch = Watch(BOOK)
    closed = feed(
        watch, (record(s, lambda g, at: None if g == 3 and at else {}) for s in range(0, 90000, 300))
    )
    listed = [(w.windows, gpu) for w in closed for gpu in w.windows.gpus if gpu.gpu_uuid == uuid(3)]
    last, gpu = listed[-1]
    assert [c.rule for c in listed[-2][1].conditions] == ["gpu_lost"]
    assert (gpu.samples, gpu.conditions) == (0, ())
    assert last.end < closed[-1].windows.end
    second = Watch(BOOK)
    second.restore([last])
    assert uuid(3) not in second.rosters["node-1"].row_of


def test_a_key_has_a_bounded_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs beyond the bound are left out and counted; those that are known go on."""
    monkeypatch.setattr(roster, "MAX_GPUS", 10)
    watch = Watch(BOOK)
    assert watch.feed(1, "job", record(0), 0).dropped["too_many_gpus"] == 0
    assert watch.feed(2, "job", record(1, host="node-2"), 0).dropped["too_many_gpus"] == 6
    fed = watch.feed(3, "job", record(2, host="node-3"), 0)
    assert (fed.dropped["too_many_gpus"], fed.windows) == (8, 0)
    assert watch.feed(4, "job", record(3), 0).dropped["too_many_gpus"] == 0
    assert watch.gpus == 10


def test_a_gpu_with_endless_errors_stays_small() -> None:
    """Of many codes a bounded number holds, and the same error many times is listed once."""
    watch = Watch(BOOK)
    sample = Sample(gpu_uuid="GPU-1", time=START, xids=tuple(range(1000, 2000)))
    for number in range(3):
        watch.feed(number, "k", Samples(host="h", samples=(sample,)), 0)
    (window,) = close_all(watch.close_silent(["k"]))[0]
    (gpu,) = window.windows.gpus
    assert len(gpu.conditions) == roster.MAX_HELD
    assert gpu.xids == tuple(range(1000, 2000))


@pytest.mark.parametrize("state", [{"xids": 5}, {"xids": [[79, 1e300, 2]]}, {"row": 5}, {"row": ["x"]}])
def test_state_that_is_nonsense_begins_anew(state: dict[str, Any]) -> None:
    """Whatever somebody else wrote into a state, the key's GPUs begin anew and the other keys go on."""
    first = Watch(BOOK)
    (closed,) = [w.windows for w in feed(first, (record(s) for s in range(0, 90, 10)))]
    known = {"plan": first.plan.fingerprint}
    bad = tuple(msgspec.structs.replace(gpu, state={**known, **state}) for gpu in closed.gpus)
    second = Watch(BOOK)
    second.restore([msgspec.structs.replace(closed, gpus=bad), msgspec.structs.replace(closed, key="other")])
    assert {key: len(r.row_of) for key, r in second.rosters.items()} == {"node-1": 0, "other": 8}
    assert second.feed("late", "node-1", record(20), 0).dropped["late"] == 8


def test_a_gpu_on_two_hosts() -> None:
    """Within a window the first host is believed; later the GPU may have moved."""
    watch = Watch(BOOK)
    one, two = record(5, gpus=1), msgspec.structs.replace(record(6, gpus=1), host="node-9")
    watch.feed(1, "job", one, 0)
    assert watch.feed(2, "job", two, 0).dropped["duplicate_uuid"] == 1
    moved = msgspec.structs.replace(record(150, gpus=1), host="node-9")
    assert watch.feed(3, "job", moved, 0).dropped["duplicate_uuid"] == 0
    assert [m.host for m in watch.rosters["job"].members if m] == ["node-9"]


def test_other_models_are_no_peers() -> None:
    """GPUs of another model, and parts of GPUs, are compared among themselves."""
    watch = Watch(BOOK)
    models = tuple(Gpu(gpu_uuid=uuid(g), model="A" if g < 6 else "B") for g in range(8))
    closed = feed(watch, (msgspec.structs.replace(record(s), gpus=models) for s in range(0, 200, 10)))
    scored = {gpu.gpu_uuid for gpu in by_gpu(closed).values() if "peers" in gpu.scores}
    assert scored == {uuid(g) for g in range(6)}


def test_the_page_of_rules_is_current() -> None:
    """docs/detection.md has the rules as they are, and the kept score (`python -m pipeline.detection.document`)."""
    root = Path(__file__).parents[2]
    page = (root / document.PAGE).read_text()
    kept = msgspec.json.decode((root / document.SCORE).read_bytes())["detection"]
    assert document.render(page, BOOK, kept) == page
    assert kept["rules_version"] == BOOK.version


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("version: 2\n", "Expected `str`"),
        ("version: '2'\nrules: [{name: x}]", "missing required field"),
        ("version: '2'\ndisable: [nothing]", "there is no rule nothing"),
        ("version: '2'\ncomparison: {min_peers: 0}", "comparison"),
        (": : :", "MILLRACE_RULES_FILE"),
    ],
)
def test_a_wrong_rules_file(text: str, fault: str, tmp_path: Path) -> None:
    """A mistake in an operator's file is told in one line."""
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=fault):
        load_rules(path)


@pytest.mark.parametrize(
    ("clause", "fault"),
    [
        ("{field: power_watts}", "either above or below"),
        ("{field: power_watts, above: 1, below: 2}", "either above or below"),
        ("{field: power_watts, above: 1, clear: 2}", "wrong side"),
        ("{field: power_watts, statistic: increase, above: 1}", "for counters"),
        ("{field: clock_event_reasons, statistic: share, bits: [heat], above: 1}", "no bit heat"),
        ("{field: encoder_percent, compare: peers, above: 1}", "needs a floor"),
        ("{field: power_watts, statistic: median, above: 1}", "median"),
    ],
)
def test_a_wrong_clause(clause: str, fault: str, tmp_path: Path) -> None:
    """A clause that cannot be meant is refused with the rule's name."""
    path = tmp_path / "rules.yaml"
    path.write_text(
        f"version: '2'\nrules: [{{name: mine, severity: info, when: [{clause}], message: m, action: a, "
        "runbook: r, source: s}]"
    )
    with pytest.raises(ConfigurationError, match=fault):
        load_rules(path)


def test_an_operators_rule(tmp_path: Path) -> None:
    """A rule of an operator's file applies, to fields of their own too, beside those that are built in."""
    path = tmp_path / "rules.yaml"
    path.write_text(
        "version: '7'\ndisable: [straggler]\nrules: [{name: hot_inlet, severity: info, when: "
        "[{field: inlet_celsius, above: 30}], message: '{value} C', action: inspect, runbook: r, source: us}]"
    )
    book: RuleBook = load_rules(path)
    assert book.version.endswith("+7")
    assert {rule.name for rule in book.rules} == {rule.name for rule in BOOK.rules} - {"straggler"} | {
        "hot_inlet"
    }
    closed = feed(Watch(book), (record(s, faulty(0, {"inlet_celsius": 33.0})) for s in range(0, 120, 10)))
    assert {(gpu, c.rule, c.message) for _, gpu, c in conditions(closed)} == {
        (uuid(3), "hot_inlet", "33.0 C")
    }
    assert by_gpu(closed)[uuid(3), START].values["inlet_celsius"].mean == 33.0


def make_autoencoder(path: Path) -> None:
    """Train a tiny autoencoder on healthy windows and save it."""
    features = ["temperature_celsius", "power_watts", "sm_clock_mhz"]
    closed = feed(Watch(BOOK), (record(s) for s in range(0, 1800, 10)))
    data = torch.tensor([[gpu.values[name].mean for name in features] for gpu in by_gpu(closed).values()])
    mean, scale = data.mean(0), data.std(0)
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    normal = (data - mean) / scale
    for _ in range(150):
        optimizer.zero_grad()
        (network(normal) - normal).square().mean().backward()
        optimizer.step()
    layers = {
        f"{n}.{part}": getattr(network[2 * n], part).detach() for n in range(2) for part in ("weight", "bias")
    }
    metadata = {"features": msgspec.json.encode(features).decode()}
    save_file({"mean": mean, "scale": scale, **layers}, path, metadata)


def test_a_learned_model_scores_windows(tmp_path: Path) -> None:
    """A trained autoencoder finds a window unlike those it knows stranger, and a rule may use its score."""
    make_autoencoder(tmp_path / "model.safetensors")
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: '1'\nreplace: true\nrules: [{name: strange, severity: warning, when: [{field: model_score, "
        "above: 4}], message: 'score {value:.1f}', action: inspect, runbook: r, source: s}]"
    )
    model = load_window_model(
        f"file:{tmp_path / 'model.safetensors'}", torch.device("cpu"), allow_python=False
    )
    watch, closed = Watch(load_rules(rules)), []
    for s in range(0, 600, 10):
        fault = faulty(300, {"temperature_celsius": 75.0, "power_watts": 520.0})
        fed = watch.feed(s, "node-1", record(s, fault), s * 1000)
        closed += [window for together in close_all(fed.closings, model=model) for window in together]
    assert {(minute, gpu, c.rule) for minute, gpu, c in conditions(closed)} == {
        (minute, uuid(3), "strange") for minute in range(5, 9)
    }
    assert all(gpu.scores["model"] < 3 for (name, _), gpu in by_gpu(closed).items() if name != uuid(3))


@pytest.mark.parametrize(
    ("specification", "fault"),
    [
        ("file:nothing.safetensors", "No such file"),
        ("builtin:quality", "neither file:PATH nor python"),
        ("python:tests.support.gpus:healthy", "MILLRACE_WATCH_MODEL: .*ALLOW_PYTHON_MODELS"),
    ],
)
def test_a_learned_model_that_cannot_be_used(specification: str, fault: str) -> None:
    """What is wrong with a model is told in one line."""
    with pytest.raises(ConfigurationError, match=fault):
        load_window_model(specification, torch.device("cpu"), allow_python=False)
