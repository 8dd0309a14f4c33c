"""`millrace bench-autoscale`: both policies on every trace beside the optimum, and lag alone with many thresholds.

The JSON of `Result` is what `docs/benchmarks/autoscaling.json` holds.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

import msgspec

from loadtest.autoscale import policies, traces
from loadtest.autoscale.cluster import Pods
from loadtest.autoscale.objects import ScaledObject
from loadtest.autoscale.optimum import optimum, unforeseeable
from loadtest.autoscale.policies import Facts
from loadtest.autoscale.simulate import Run, run
from loadtest.report import Circumstances, Machine, rounded

MOST_VIOLATIONS = 0.01
MOST_COST = 1.3


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated."""

    seed: int = 1
    #: Runs of each trace, each with arrivals and pods of its own.
    repeats: int = 5
    pod_images_per_second: float = 120.0
    start_seconds: float = 90.0
    deadline_seconds: float = 300.0
    #: Two that are harder: hardly longer than pods take to start, and far shorter.
    other_deadlines_seconds: tuple[float, ...] = (180.0, 5.0)
    #: Of the deadline: how long one replica may need for the lag that `lagThreshold` allows it.
    lag_shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    #: For the harder deadlines and the other thresholds.
    fewer_repeats: int = 2
    seconds: int = traces.SECONDS


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace: means over the repeats, and the worst of them."""

    violations_ratio: float
    violations_ratio_worst: float
    gpu_hours: float
    gpu_hours_ratio_to_optimum: float
    gpu_hours_ratio_to_optimum_worst: float
    replica_changes: float
    rebalances: float
    most_replicas: int

    @property
    def reached(self) -> bool:
        """Say whether the result asked for was reached in every repeat."""
        return (
            self.violations_ratio_worst <= MOST_VIOLATIONS
            and self.gpu_hours_ratio_to_optimum_worst <= MOST_COST
        )


class OnTrace(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace is, what the optimum needs for it, and what the policies did."""

    records: int
    #: Records times seconds for each: what no schedule can be below.
    work_gpu_hours: float
    optimum_gpu_hours: float
    #: What is late at least at 1.3 times the optimum for who cannot know of a rise before it comes.
    unforeseeable_violations_ratio: float
    policies: dict[str, Outcome]


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """Lag alone with one threshold: how many traces it manages, and its worst one."""

    lag_threshold: int
    reached: tuple[str, ...]
    violations_ratio_worst: float
    gpu_hours_ratio_to_optimum_worst: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole benchmark; `traces` is for the plan's deadline."""

    commit: str | None
    machine: Machine
    seed: int
    circumstances: Circumstances
    plan: Plan
    traces: dict[str, OnTrace]
    other_deadlines: dict[str, dict[str, OnTrace]]
    lag_thresholds: tuple[Threshold, ...]

    @property
    def reached(self) -> bool:
        """Say whether the deadline policy keeps to both limits on every trace."""
        return all(found.policies["deadline"].reached for found in self.traces.values())


def measure(plan: Plan, circumstances: Circumstances, say: Callable[[str], None]) -> Result:
    """Simulate everything; takes a minute or two of processor time."""
    bench = _Bench(plan)
    found = {}
    for name in traces.NAMES:
        say(f"{name}, deadline {plan.deadline_seconds:g} s")
        found[name] = bench.on_trace(name, bench.facts(plan.deadline_seconds), plan.repeats)
    others = {}
    for seconds in plan.other_deadlines_seconds:
        say(f"all, deadline {seconds:g} s")
        facts = bench.facts(seconds)
        others[f"{seconds:g}"] = {
            name: bench.on_trace(name, facts, plan.fewer_repeats) for name in traces.NAMES
        }
    say("lag alone, other thresholds")
    return Result(
        commit=circumstances.commit,
        machine=circumstances.machine,
        seed=plan.seed,
        circumstances=circumstances,
        plan=plan,
        traces=found,
        other_deadlines=others,
        lag_thresholds=tuple(bench.threshold(share) for share in plan.lag_shares),
    )


class _Bench:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pods = Pods(images_per_second=plan.pod_images_per_second, start_seconds=plan.start_seconds)
        self._cheapest: dict[tuple[str, int, float], float] = {}

    def facts(self, deadline_seconds: float) -> Facts:
        return Facts(self._plan.pod_images_per_second, self._plan.start_seconds, deadline_seconds)

    def on_trace(self, name: str, facts: Facts, repeats: int) -> OnTrace:
        wanted = {"deadline": policies.deadline(facts), "lag": policies.lag(facts)}
        seeds = range(self._plan.seed, self._plan.seed + repeats)
        drawn = [self._trace(name, seed) for seed in seeds]
        records = fmean(trace.arrivals.sum() for trace in drawn)
        best = [self._optimum(name, seed, facts) for seed in seeds]
        blind = [
            unforeseeable(trace, self._pods, facts.deadline_seconds, MOST_COST * cheapest)
            for trace, cheapest in zip(drawn, best, strict=True)
        ]
        return OnTrace(
            records=round(records),
            work_gpu_hours=rounded(records / facts.pod_images_per_second / 3600),
            optimum_gpu_hours=rounded(fmean(best) / 3600),
            unforeseeable_violations_ratio=rounded(fmean(blind)),
            policies={policy: self._outcome(name, seeds, facts, scaled) for policy, scaled in wanted.items()},
        )

    def threshold(self, share: float) -> Threshold:
        facts = self.facts(self._plan.deadline_seconds)
        lag_threshold = max(1, int(share * facts.pod_images_per_second * facts.deadline_seconds))
        seeds = range(self._plan.seed, self._plan.seed + self._plan.fewer_repeats)
        scaled = policies.lag(facts, lag_threshold)
        found = {name: self._outcome(name, seeds, facts, scaled) for name in traces.NAMES}
        return Threshold(
            lag_threshold=lag_threshold,
            reached=tuple(name for name, outcome in found.items() if outcome.reached),
            violations_ratio_worst=max(outcome.violations_ratio_worst for outcome in found.values()),
            gpu_hours_ratio_to_optimum_worst=max(
                outcome.gpu_hours_ratio_to_optimum_worst for outcome in found.values()
            ),
        )

    def _trace(self, name: str, seed: int) -> traces.Trace:
        return traces.make(name, seed, seconds=self._plan.seconds)

    def _optimum(self, name: str, seed: int, facts: Facts) -> float:
        key = (name, seed, facts.deadline_seconds)
        if key not in self._cheapest:
            self._cheapest[key] = optimum(
                self._trace(name, seed), self._pods, facts.deadline_seconds, min_replicas=facts.min_replicas
            )
        return self._cheapest[key]

    def _outcome(self, name: str, seeds: Sequence[int], facts: Facts, scaled: ScaledObject) -> Outcome:
        runs: list[Run] = []
        for seed in seeds:
            trace = self._trace(name, seed)
            runs.append(run(trace, scaled, facts.deadline_seconds, pods=self._pods, seed=seed))
        ratios = [
            found.gpu_seconds / self._optimum(name, seed, facts)
            for found, seed in zip(runs, seeds, strict=True)
        ]
        late = [found.violations_ratio for found in runs]
        return Outcome(
            violations_ratio=rounded(fmean(late)),
            violations_ratio_worst=rounded(max(late)),
            gpu_hours=rounded(fmean(found.gpu_seconds for found in runs) / 3600),
            gpu_hours_ratio_to_optimum=rounded(fmean(ratios)),
            gpu_hours_ratio_to_optimum_worst=rounded(max(ratios)),
            replica_changes=rounded(fmean(found.replica_changes for found in runs)),
            rebalances=rounded(fmean(found.rebalances for found in runs)),
            most_replicas=max(found.most_replicas for found in runs),
        )


COLUMNS = ("trace", "deadline", "policy", "late", "worst", "of the optimum", "worst", "GPU hours", "changes")


def markdown(result: Result) -> list[str]:
    """Return the tables' lines for docs/autoscaling.md, both deadlines and the other thresholds."""
    lines = ["| " + " | ".join(row) + " |" for row in rows(result)]
    lines += [
        f"| {found.lag_threshold:,} | {', '.join(found.reached) or 'none'} | {found.violations_ratio_worst:.1%} "
        f"| {found.gpu_hours_ratio_to_optimum_worst:.2f} |"
        for found in result.lag_thresholds
    ]
    return lines


def rows(result: Result) -> list[tuple[str, ...]]:
    """Say a result in words, for a table."""
    sets = {f"{result.plan.deadline_seconds:g}": result.traces, **result.other_deadlines}
    return [
        (
            name,
            f"{seconds} s",
            policy,
            f"{outcome.violations_ratio:.2%}",
            f"{outcome.violations_ratio_worst:.2%}",
            f"{outcome.gpu_hours_ratio_to_optimum:.2f}",
            f"{outcome.gpu_hours_ratio_to_optimum_worst:.2f}",
            f"{outcome.gpu_hours:.1f}",
            f"{outcome.replica_changes:.0f}",
        )
        for seconds, found in sets.items()
        for name, on_trace in found.items()
        for policy, outcome in on_trace.policies.items()
    ]
