"""One batched pass over all GPUs whose windows close: inputs of rules, peers, own past, and which conditions hold.

Only sums, products, comparisons and square roots, which are exact to the last bit however the batch is composed:
a window that is computed again comes out the same. State is one row of float64 per GPU (`plan.Layout`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.detection import peers
from pipeline.detection.aggregates import Aggregates
from pipeline.detection.plan import MICROSECONDS, THERMAL, Plan
from pipeline.detection.rules import Clause, Rule

Tensor = torch.Tensor
# A step of a GPU's past is cut to so many deviations: a fault must not become the norm at once.
_MAX_STEP = 4.0
# Steps of used memory below this are noise, MiB.
_TREND_DEADBAND = 1.0
# Shares of all memory by which GPUs of one job differ at most: its own from the middle, and the others among them.
_ALIKE_OWN, _ALIKE_PEERS = 0.05, 0.03


@dataclass(frozen=True)
class Given:
    """What a pass needs of N GPUs beside their aggregates."""

    state: NDArray[np.float64]  # (N, W), brought up to date in place
    groups: NDArray[np.int64]  # (N,) GPUs with the same number are peers
    starts: NDArray[np.int64]  # (N,) microseconds
    ends: NDArray[np.int64]  # (N,)
    assigned: NDArray[np.bool_]  # (N,) labels say that somebody uses it
    lost: NDArray[np.float64]  # (N,) 1, 0, or NaN: not known
    model: NDArray[np.float64]  # (N,) score of the learned model; NaN without one


@dataclass(frozen=True)
class Scored:
    """What a pass finds of N GPUs and R rules."""

    state: NDArray[np.float64]  # (N, W)
    peers: peers.Peers
    peer_score: NDArray[np.float64]  # (N,) the largest of the compared fields, NaN: none
    history_score: NDArray[np.float64]  # (N,)
    #: (K, 2) GPU and rule of each condition that holds.
    holding: NDArray[np.int64]
    #: Whether it held in this window, by rule; else it is kept for a while.
    now: NDArray[np.bool_]  # (N, R)


def score(plan: Plan, found: Aggregates, given: Given, device: torch.device) -> Scored:
    """Score windows that close together."""
    with torch.inference_mode():
        return _Pass(plan, found, given, device).run()


class _Pass:
    def __init__(self, plan: Plan, found: Aggregates, given: Given, device: torch.device) -> None:
        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.plan = plan
        self.state = tensor(given.state)
        # By rule and contiguous: rules read and write one after the other.
        layout = plan.layout
        parts = (layout.since, layout.seen, layout.value, layout.which)
        self.held = [self.state[:, part].T.contiguous() for part in parts]  # 4 x (R, N)
        self.fields: dict[tuple[str, str], Tensor] = {}
        self.groups = tensor(given.groups)
        self.starts, self.ends = tensor(given.starts).double(), tensor(given.ends).double()
        self.assigned, self.lost = tensor(given.assigned), tensor(given.lost)
        self.model = tensor(given.model)
        self.statistics = {
            "mean": tensor(found.mean), "minimum": tensor(found.minimum), "maximum": tensor(found.maximum),
            "last": tensor(found.last),
        }  # fmt: skip
        self.increase = tensor(found.increase)  # (N, C)
        self.share = tensor(found.share)  # (N, M)
        self.absolute, self.relative = tensor(plan.floor_absolute), tensor(plan.floor_relative)
        self.present = tensor(found.samples > 0)
        self.last_time = tensor(found.last_time).double()

    def run(self) -> Scored:
        plan, layout = self.plan, self.plan.layout
        compared = self.statistics["mean"][:, torch.from_numpy(plan.columns_of(plan.compared))]  # (N, P)
        comparison = plan.book.comparison
        self.peers = peers.compare(compared, self.groups, self.absolute, self.relative, comparison.min_peers)
        self.history = self._history(compared)
        self._carry()
        self.derived = self._derive()
        now = torch.stack([self._rule(index, rule) for index, rule in enumerate(plan.rules)], dim=1)  # (N, R)
        parts = (layout.since, layout.seen, layout.value, layout.which)
        for part, held in zip(parts, self.held, strict=True):
            self.state[:, part] = held.T
        holding = torch.nonzero(~self.held[0].T.isnan())
        return Scored(
            state=self.state.cpu().numpy(),
            peers=self.peers,
            peer_score=_largest(self.peers.score),
            history_score=_largest(self.history),
            holding=holding.cpu().numpy(),
            now=now.cpu().numpy(),
        )

    def _history(self, values: Tensor) -> Tensor:
        """Score values against each GPU's own past, then add them to it."""
        layout, comparison = self.plan.layout, self.plan.book.comparison
        mean, variance, count = (
            torch.nan_to_num(self.state[:, part]) for part in (layout.mean, layout.variance, layout.count)
        )
        spread = torch.maximum(variance.sqrt(), torch.maximum(self.absolute, self.relative * mean.abs()))
        step = values - mean
        known = count >= comparison.min_history
        scores = torch.where(known, step / spread, torch.nan)
        step = torch.where(known, step.clamp(-_MAX_STEP * spread, _MAX_STEP * spread), step)
        weight = torch.clamp(1.0 / (count + 1.0), min=comparison.history_weight)
        measured = ~values.isnan()
        new_mean = mean + weight * step
        new_variance = torch.where(count > 0, (1.0 - weight) * (variance + weight * step * step), 0.0)
        for part, new in (
            (layout.mean, new_mean),
            (layout.variance, new_variance),
            (layout.count, count + 1.0),
        ):
            self.state[:, part] = torch.where(measured, new, self.state[:, part])
        return scores

    def _carry(self) -> None:
        """Remember counters, their hourly sums, and the last windows of used memory."""
        plan, layout = self.plan, self.plan.layout
        at = layout.last_seen.start
        self.state[:, at] = torch.where(self.present, self.last_time, self.state[:, at])
        last = self.statistics["last"][:, torch.from_numpy(plan.columns_of(plan.carried))]
        self.state[:, layout.carried] = torch.where(last.isnan(), self.state[:, layout.carried], last)
        hourly = self.state[:, layout.hourly]
        decayed = (
            torch.nan_to_num(hourly) * max(0.0, 1.0 - plan.window / (3600 * MICROSECONDS)) + self.increase
        )
        self.state[:, layout.hourly] = torch.where(self.increase.isnan(), hourly, decayed)
        used = self._field("memory_used_mebibytes")
        trend = self.state[:, layout.trend]
        shifted = torch.cat([trend[:, 1:], used.unsqueeze(1)], dim=1)
        self.state[:, layout.trend] = torch.where(used.isnan().unsqueeze(1), trend, shifted)

    def _field(self, name: str, statistic: str = "mean") -> Tensor:
        found = self.fields.get((name, statistic))
        if found is None:
            found = self.statistics[statistic][:, self.plan.column[name]].contiguous()
            self.fields[name, statistic] = found
        return found

    def _derive(self) -> dict[str, Tensor]:
        """Compute what `rules.DERIVED` names, each (N,)."""
        used, free = self._field("memory_used_mebibytes"), self._field("memory_free_mebibytes")
        total = self._field("memory_total_mebibytes")
        total = torch.where(
            total.isnan(), used + free + torch.nan_to_num(self._field("memory_reserved_mebibytes")), total
        )
        busy = self._field("utilization_percent")
        busy = torch.where(busy.isnan(), 100.0 * self._field("graphics_engine_ratio"), busy)
        held = torch.where(
            used.isnan(), used, (used >= self.plan.book.comparison.allocated_mebibytes).double()
        )
        trend = self.state[:, self.plan.layout.trend]  # (N, T)
        complete = ~trend.isnan().any(dim=1)
        utilization = self.plan.compare.get("utilization_percent")
        nothing = torch.full_like(used, torch.nan)
        return {
            "thermal_margin_celsius": self._thermal_margin(),
            "memory_used_ratio": used / total,
            "power_ratio": self._field("power_watts") / self._field("power_limit_watts"),
            "busy_percent": busy,
            "memory_trend": torch.where(complete & self.present, _kendall(trend), torch.nan),
            "memory_growth_ratio": (trend[:, -1] - trend[:, 0]) / total,
            "memory_before_ratio": trend[:, 0] / total,
            "peers_alike": self._alike(used, total),
            "peers_utilization_percent": nothing
            if utilization is None
            else self.peers.median[:, utilization],
            "allocated": torch.where(self.assigned, torch.where(self.present, 1.0, torch.nan), held),
            "model_score": self.model,
            "lost": self.lost,
        }

    def _thermal_margin(self) -> Tensor:
        """Return the margin, else what is left to slowdown.

        A margin of 0 or less is what some drivers say when they do not know; a GPU that is so hot slows down.
        """
        margin = self._field("temperature_margin_celsius")
        room = self._field("slowdown_temperature_celsius") - self._field("temperature_celsius")
        slows = self.share[:, self.plan.masks.index(THERMAL)] > 0
        return torch.where((margin > 0) | ((margin <= 0) & slows), margin, room)

    def _alike(self, used: Tensor, total: Tensor) -> Tensor:
        """Tell GPUs that seem to share a job with most of their peers: such jobs need as much memory everywhere."""
        place = self.plan.compare.get("memory_used_mebibytes")
        if place is None:
            return torch.ones_like(used)
        near = (used - self.peers.median[:, place]).abs() <= _ALIKE_OWN * total
        close = self.peers.deviation[:, place] <= _ALIKE_PEERS * total
        return torch.where(used.isnan(), 1.0, (near & close).double())

    def _values(self, clause: Clause) -> tuple[Tensor, Tensor]:
        """Return what a clause compares, and what it shows to a person, both (N,)."""
        name = clause.field
        if name in self.derived:
            return self.derived[name], self.derived[name]
        if clause.compare != "value":
            scores = self.peers.score if clause.compare == "peers" else self.history
            return scores[:, self.plan.compare[name]], self._field(name)
        if clause.statistic == "share":
            found = self.share[:, self.plan.masks.index(clause.mask)]
        elif clause.statistic == "increase":
            found = self.increase[:, self.plan.counter[name]]
        elif clause.statistic == "hourly":
            hourly = self.state[:, self.plan.layout.hourly][:, self.plan.counter[name]]
            found = torch.where(self.increase[:, self.plan.counter[name]].isnan(), torch.nan, hourly)
        else:
            found = self._field(name, clause.statistic)
        return found, found

    def _rule(self, index: int, rule: Rule) -> Tensor:
        """Bring a rule's condition up to date in the state; return where it held in this window."""
        since, seen, value, clause = (held[index] for held in self.held)
        active = ~since.isnan()
        holds, known, shown, which = self._evaluate(rule, active)
        for name in rule.unless_known:
            better = self.derived[name] if name in self.derived else self._field(name)
            holds, known = holds & better.isnan(), known | ~better.isnan()
        comparison = self.plan.book.comparison
        patience = torch.where(known, rule.keep_seconds, max(rule.keep_seconds, comparison.stale_seconds))
        kept = active & ~holds & (self.ends - seen <= patience * MICROSECONDS)
        stays = holds | kept
        updates = (
            torch.where(active, since, self.starts),
            torch.where(holds, self.ends, seen),
            torch.where(holds, shown, value),
            torch.where(holds, which, clause),
        )
        for held, new in zip(self.held, updates, strict=True):
            held[index] = torch.where(stays, new, torch.nan)
        return holds

    def _evaluate(self, rule: Rule, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where it holds, where that is known, what was seen, and by which clause."""
        holds = torch.ones_like(active)
        denied, unknown = torch.zeros_like(active), torch.zeros_like(active)
        shown = torch.full_like(self.ends, torch.nan)
        which = torch.full_like(self.ends, torch.nan)
        alternatives = len(rule.any_of)
        any_holds, any_known = torch.zeros_like(active), torch.zeros_like(active)
        for number, clause in enumerate(rule.clauses):
            value, display = self._values(clause)
            clear = clause.limit if clause.clear is None else clause.clear
            limit = torch.where(active, clear, clause.limit)
            true = value > limit if clause.above is not None else value < limit
            missing = value.isnan()
            if number < alternatives:
                first = true & ~any_holds
                any_holds, any_known = any_holds | true, any_known | ~missing
            else:
                first = torch.full_like(true, number == 0)
                holds, denied, unknown = holds & true, denied | (~true & ~missing), unknown | missing
            shown, which = torch.where(first, display, shown), torch.where(first, float(number), which)
        if alternatives:
            holds = holds & any_holds
            unknown, denied = unknown | ~any_known, denied | (any_known & ~any_holds)
        return holds, holds | denied | ~unknown, shown, which


def _kendall(trend: Tensor) -> Tensor:
    """Return Kendall's tau of the columns of (N, T): 1 where each is above those before it."""
    tau = torch.zeros(len(trend), dtype=trend.dtype, device=trend.device)
    # Used memory mostly stands still, which no pair of windows contradicts.
    moves = torch.nonzero(trend.amax(dim=1) - trend.amin(dim=1) > _TREND_DEADBAND).squeeze(1)
    moving, width = trend[moves], trend.shape[1]
    total = torch.zeros(len(moves), dtype=torch.int64, device=trend.device)
    for lag in range(1, width):
        step = moving[:, lag:] - moving[:, :-lag]
        total += (step > _TREND_DEADBAND).sum(dim=1) - (step < -_TREND_DEADBAND).sum(dim=1)
    tau[moves] = total.to(trend.dtype) / (width * (width - 1) / 2)
    return tau


def _largest(scores: Tensor) -> NDArray[np.float64]:
    """Return the largest absolute score of each GPU; NaN without any."""
    absolute = torch.where(scores.isnan(), -1.0, scores.abs())
    found = absolute.amax(dim=1) if scores.shape[1] else torch.full((len(scores),), -1.0)
    return torch.where(found < 0, torch.nan, found).cpu().numpy()
