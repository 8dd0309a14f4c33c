"""How good detection is: the detector over made-up fleets whose faults are known, without Kafka.

A fault counts as found if an alert of a rule that means it fires on its GPU while it lasts. Every alert on a GPU
that has no fault is false, also one on the peers of a faulty GPU; what else fires on the faulty GPU is neither.
Only warnings and worse are alerts. Delays are counted in windows from the first sample that shows the fault.
"""

import multiprocessing
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import repeat

import msgspec
import torch

from loadtest.fleet import Fleet, Plan
from loadtest.fleet_faults import FAULTS, Injected
from pipeline.detection import RuleBook, Watch, WatchOptions, close_all
from pipeline.telemetry import Windows

#: Rules and fleets may be compared and changed by looking at these seeds; the others are only reported.
TUNING_SEEDS = (1, 2, 3, 101, 102, 103)
REPORTING_SEEDS = (4, 5, 6)
_BEGIN = datetime(2026, 1, 31, tzinfo=UTC)
# What a fault did may still be seen in the windows after its end: rates over an hour, rows that wait for a reset.
_AFTERMATH = timedelta(hours=2)
_LINES_KEPT = 100
_HOT = frozenset(
    {
        "thermal_margin", "temperature", "temperature_peers", "memory_temperature", "memory_temperature_peers",
        "clock_throttle",
    }
)  # fmt: skip
_SLOW = frozenset({"straggler", "straggler_load", "power_anomaly", "clock_drop"})
#: Which rules mean a fault; of a benign Xid none does.
MEANT: Mapping[str, frozenset[str]] = {
    "thermal": _HOT,
    "fan": _HOT,
    "power_cap": _SLOW | {"power_cap", "clock_throttle"},
    "clock_stuck": _SLOW,
    "straggler": _SLOW,
    "ecc": frozenset({"ecc_corrected"}),
    "row_remap": frozenset({"row_remap_pending", "row_remap_failed", "ecc_uncorrected"}),
    "xid_critical": frozenset({"xid", "gpu_lost"}),
    "xid_benign": frozenset(),
    "nvlink": frozenset({"nvlink_errors"}),
    "pcie": frozenset({"pcie_replays"}),
    "idle_waste": frozenset({"idle_waste", "zombie_memory"}),
    "memory_leak": frozenset({"memory_leak"}),
    "lost": frozenset({"gpu_lost"}),
}


class Score(msgspec.Struct, frozen=True):
    """Of one kind of fault, or of all."""

    injected: int
    found: int
    #: Alerts of rules that mean it on GPUs without a fault.
    false_alerts: int
    precision: float
    recall: float
    #: From the first sample that shows it to the window in which its alert fires, and its condition is seen.
    median_delay_windows: float | None
    median_seen_windows: float | None


class Quiet(msgspec.Struct, frozen=True):
    """Of one kind of event that is nobody's fault."""

    injected: int
    #: On GPUs that had it: all of them are false.
    alerts: int


class Result(msgspec.Struct, frozen=True):
    """What `docs/benchmarks/telemetry.json` keeps as `detection`."""

    precision: float
    recall: float
    median_delay_windows: float
    median_seen_windows: float
    kinds: dict[str, Score]
    #: Kinds of which no rule may say anything.
    quiet: dict[str, Quiet]
    healthy_gpu_hours: float
    healthy_alerts: int
    seeds: tuple[int, ...]
    gpus: int
    hours: float
    window_seconds: float
    rules_version: str
    #: Of which nothing was found, and what was wrongly said, for a person to look at.
    missed: tuple[str, ...]
    false: tuple[str, ...]


@dataclass(frozen=True)
class DetectionPlan:
    """What is run."""

    seeds: tuple[int, ...] = REPORTING_SEEDS
    gpus: int = 768
    seconds: float = 4 * 3600.0
    #: Of each kind, in each fleet.
    faults_of_each: int = 3
    kinds: tuple[str, ...] = tuple(FAULTS)
    healthy_gpus: int = 512
    healthy_seconds: float = 8 * 3600.0
    processes: int = 2


@dataclass
class Raised:
    """One alert: a condition from its first window on."""

    gpu_uuid: str
    rule: str
    since: datetime
    seen: datetime
    fired: datetime | None = None
    message: str = ""


@dataclass
class Outcome:
    """What one fleet's faults came to: each with the first alert that means it, and all false alerts."""

    faults: list[tuple[Injected, Raised | None]] = field(default_factory=list)
    false: list[Raised] = field(default_factory=list)


def measure(book: RuleBook, plan: DetectionPlan, tell: Callable[[str], None] = lambda _: None) -> Result:
    """Run all fleets and judge what the detector says of them; takes two cores for two minutes."""
    options = WatchOptions()
    fleets = [
        Plan(
            _BEGIN, plan.seconds, gpus=plan.gpus, seed=seed,
            faults=tuple(kind for kind in plan.kinds for _ in range(plan.faults_of_each)),
        )
        for seed in plan.seeds
    ]  # fmt: skip
    if plan.healthy_seconds:
        fleets.append(Plan(_BEGIN, plan.healthy_seconds, gpus=plan.healthy_gpus, seed=plan.seeds[0]))
    outcomes = []
    for fleet, outcome in zip(fleets, _live_all(fleets, book, options, plan.processes), strict=True):
        tell(f"seed {fleet.seed}: {fleet.gpus} GPUs, {fleet.seconds / 3600:g} h, {len(fleet.faults)} faults")
        outcomes.append(outcome)
    healthy = outcomes.pop().false if plan.healthy_seconds else []
    return _result(plan, options, book, outcomes, healthy)


def _live_all(
    plans: Sequence[Plan], book: RuleBook, options: WatchOptions, processes: int
) -> Iterator[Outcome]:
    """Yield what comes of each fleet, in order; fleets do not depend on each other."""
    if processes == 1:
        yield from map(_live, plans, repeat(book), repeat(options))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_live_alone, plans, repeat(book), repeat(options))


def _live_alone(plan: Plan, book: RuleBook, options: WatchOptions) -> Outcome:
    torch.set_num_threads(1)
    return _live(plan, book, options)


def _live(plan: Plan, book: RuleBook, options: WatchOptions) -> Outcome:
    fleet = Fleet(plan)
    raised = alerts(windows(fleet, book, options))
    return judge(fleet.injected, raised)


def windows(fleet: Fleet, book: RuleBook, options: WatchOptions) -> Iterator[Windows]:
    """Yield what `watch` would publish for a fleet."""
    watch = Watch(book, options)
    for step in fleet:
        closings = []
        published_ms = round(step.time.timestamp() * 1000)
        for record in step.records:
            fed = watch.feed(None, record.host, record, published_ms)
            closings += fed.closings
            yield from fed.events
        for together in close_all(closings):
            yield from (closed.windows for closed in together)
    for together in close_all(watch.close_silent(watch.open_keys)):
        yield from (closed.windows for closed in together)


def alerts(published: Iterable[Windows]) -> list[Raised]:
    """Gather the alerts that fire, each once."""
    found: dict[tuple[str, str, datetime], Raised] = {}
    for each in published:
        for gpu in each.gpus:
            for condition in gpu.conditions:
                if condition.severity == "info":
                    continue
                key = (gpu.gpu_uuid, condition.rule, condition.since)
                raised = found.get(key)
                if raised is None:
                    raised = found[key] = Raised(*key, seen=each.end)
                if condition.state == "firing" and raised.fired is None:
                    raised.fired, raised.message = each.end, condition.message
    return [raised for raised in found.values() if raised.fired is not None]


def judge(injected: Sequence[Injected], raised: Sequence[Raised]) -> Outcome:
    """Say which faults were found by which alert, and which alerts are false."""
    by_gpu: dict[str, list[Raised]] = defaultdict(list)
    for alert in raised:
        by_gpu[alert.gpu_uuid].append(alert)
    outcome = Outcome()
    for fault in injected:
        mine = by_gpu.pop(fault.gpu_uuid, [])
        meant = [
            alert
            for alert in mine
            if _kind(alert.rule) in MEANT[fault.fault]
            and fault.begin <= (alert.fired or fault.begin) <= fault.end + _AFTERMATH
        ]
        outcome.faults.append((fault, min(meant, key=lambda alert: alert.fired or alert.seen, default=None)))
        # Before the fault, long after it, or with a benign Xid there was nothing to tell.
        outcome.false += [
            alert
            for alert in mine
            if not MEANT[fault.fault]
            or not fault.begin <= (alert.fired or fault.begin) <= fault.end + _AFTERMATH
        ]
    outcome.false += [alert for rest in by_gpu.values() for alert in rest]
    return outcome


def _result(
    plan: DetectionPlan,
    options: WatchOptions,
    book: RuleBook,
    outcomes: Sequence[Outcome],
    healthy: Sequence[Raised],
) -> Result:
    faults = [pair for outcome in outcomes for pair in outcome.faults if MEANT[pair[0].fault]]
    false = [alert for outcome in outcomes for alert in outcome.false]
    kinds = {}
    for kind in plan.kinds:
        if MEANT[kind]:
            kinds[kind] = _score(
                [pair for pair in faults if pair[0].fault == kind],
                sum(_kind(alert.rule) in MEANT[kind] for alert in false),
                options.window_seconds,
            )
    quiet = {kind: _quiet(kind, outcomes) for kind in plan.kinds if not MEANT[kind]}
    total = _score(faults, len(false), options.window_seconds)
    return Result(
        precision=total.precision,
        recall=total.recall,
        median_delay_windows=total.median_delay_windows or 0.0,
        median_seen_windows=total.median_seen_windows or 0.0,
        kinds=kinds,
        quiet=quiet,
        healthy_gpu_hours=plan.healthy_gpus * plan.healthy_seconds / 3600,
        healthy_alerts=len(healthy),
        seeds=plan.seeds,
        gpus=plan.gpus,
        hours=plan.seconds / 3600,
        window_seconds=options.window_seconds,
        rules_version=book.version,
        missed=tuple(
            f"{fault.fault} on {fault.gpu_uuid} from {fault.begin:%H:%M:%S}, severity {fault.severity:.2f}"
            for fault, alert in faults
            if alert is None
        ),
        false=tuple(_line(alert) for alert in [*false, *healthy])[:_LINES_KEPT],
    )


def _quiet(kind: str, outcomes: Sequence[Outcome]) -> Quiet:
    injected = alerts_of = 0
    for outcome in outcomes:
        mine = {fault.gpu_uuid for fault, _ in outcome.faults if fault.fault == kind}
        injected += len(mine)
        alerts_of += sum(alert.gpu_uuid in mine for alert in outcome.false)
    return Quiet(injected, alerts_of)


def _score(pairs: Sequence[tuple[Injected, Raised | None]], false: int, window_seconds: float) -> Score:
    found = [(fault, alert) for fault, alert in pairs if alert is not None]

    def median(moment: Callable[[Raised], datetime]) -> float | None:
        delays = [
            max(0.0, (moment(alert) - (fault.visible or fault.begin)).total_seconds()) / window_seconds
            for fault, alert in found
        ]
        return round(statistics.median(delays), 2) if delays else None

    return Score(
        injected=len(pairs),
        found=len(found),
        false_alerts=false,
        precision=round(len(found) / max(1, len(found) + false), 4),
        recall=round(len(found) / max(1, len(pairs)), 4),
        median_delay_windows=median(lambda alert: alert.fired or alert.seen),
        median_seen_windows=median(lambda alert: alert.seen),
    )


def _kind(rule: str) -> str:
    """Return the rule, or `xid` for any of those."""
    return "xid" if rule.startswith("xid") else rule


def _line(alert: Raised) -> str:
    fired = alert.fired or alert.seen
    return f"{alert.rule} on {alert.gpu_uuid} at {fired:%H:%M:%S}: {alert.message}"


def count_by_rule(false: Iterable[str]) -> Counter[str]:
    """Count the lines of `Result.false` by rule."""
    return Counter(line.split(" ", 1)[0] for line in false)
