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
from pipeline.detection.inputs import Inputs
from pipeline.detection.past import Past
from pipeline.detection.plan import MICROSECONDS, Plan
from pipeline.detection.rules import Clause, Rule

Tensor = torch.Tensor


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
        layout = plan.layout
        self.parts = (layout.since, layout.held, layout.seen, layout.value, layout.which)
        #: Which rules hold anywhere: of the others, which are most, nothing needs to be read.
        self.is_active: list[bool] = (~self.state[:, layout.since].isnan()).any(dim=0).tolist()
        self.starts, self.ends = tensor(given.starts).double(), tensor(given.ends).double()
        self.groups, self.assigned = tensor(given.groups), tensor(given.assigned)
        self.given = {"model_score": tensor(given.model), "lost": tensor(given.lost)}
        self.floors = tensor(plan.floor_absolute), tensor(plan.floor_relative)
        self.inputs = Inputs(plan, found, self.state, self.starts, self.ends, device)

    def run(self) -> Scored:
        plan = self.plan
        compared = self.inputs.compared()  # (N, P)
        self.peers = peers.compare(compared, self.groups, *self.floors, plan.book.comparison.min_peers)
        past = Past(plan, self.state, compared, self.inputs.loaded())
        self.history = past.scores()
        self.inputs.carry()
        self.derived = self.inputs.derive(self.peers, self.assigned, self.given)
        now = torch.stack([self._rule(index, rule) for index, rule in enumerate(plan.rules)], dim=1)  # (N, R)
        past.learn(self._is_odd())
        return Scored(
            state=self.state.cpu().numpy(),
            peers=self.peers,
            peer_score=_largest(self.peers.score),
            history_score=_largest(self.history),
            holding=torch.nonzero(~self.state[:, plan.layout.since].isnan()).cpu().numpy(),
            now=now.cpu().numpy(),
        )

    def _is_odd(self) -> Tensor:
        """Say of which GPUs something holds, but not for so long that it may be how they are, (N,)."""
        longest = self.plan.book.comparison.hold_history_seconds * MICROSECONDS
        since = self.state[:, self.plan.layout.since]
        return (self.ends.unsqueeze(1) - since <= longest).any(dim=1)

    def _values(self, clause: Clause) -> tuple[Tensor, Tensor]:
        """Return what a clause compares, and what it shows to a person, both (N,)."""
        name, inputs = clause.field, self.inputs
        if name in self.derived:
            return self.derived[name], self.derived[name]
        if clause.compare != "value":
            scores = self.peers.score if clause.compare == "peers" else self.history
            return scores[:, self.plan.compare[name]], inputs.field(name)
        if clause.statistic == "share":
            found = inputs.share(clause.mask)
        elif clause.statistic == "increase":
            found = inputs.increase(name)
        elif clause.statistic == "hourly":
            found = inputs.hourly(name)
        else:
            found = inputs.field(name, clause.statistic)
        return found, found

    def _rule(self, index: int, rule: Rule) -> Tensor:
        """Bring a rule's condition up to date in the state; return where it held in this window."""
        columns = [part.start + index for part in self.parts]
        since, held, seen, value, clause = (self.state[:, column] for column in columns)
        met = self._evaluate(rule, ~since.isnan() if self.is_active[index] else None)
        holds = met.holds
        if not self.is_active[index] and not holds.any():
            return holds
        active = ~since.isnan()
        shown, which = met.shown()
        comparison = self.plan.book.comparison
        patience = torch.where(
            met.known(), rule.keep_seconds, max(rule.keep_seconds, comparison.stale_seconds)
        )
        kept = active & ~holds & (self.ends - seen <= patience * MICROSECONDS)
        stays = holds | kept
        # Where it held in the window before, the time between the two is of it too.
        closed = self.inputs.closed_before
        lasted = torch.where(seen == closed, self.ends - closed, self.plan.window)
        updates = (
            torch.where(active, since, self.starts),
            torch.nan_to_num(held) + torch.where(holds, lasted, 0.0),
            torch.where(holds, self.ends, seen),
            torch.where(holds, shown, value),
            torch.where(holds, which, clause),
        )
        for column, new in zip(columns, updates, strict=True):
            self.state[:, column] = torch.where(stays, new, torch.nan)
        return holds

    def _evaluate(self, rule: Rule, active: Tensor | None) -> "_Met":
        """Say where a rule holds; where it already does, if it does anywhere, clear limits count."""
        met = _Met(alternatives=len(rule.any_of))
        for clause in rule.clauses:
            value, display = self._values(clause)
            limit: Tensor | float = clause.limit
            if active is not None and clause.clear is not None:
                limit = torch.where(active, clause.clear, clause.limit)
            met.add(value > limit if clause.above is not None else value < limit, value, display)
        met.combine(
            [
                self.derived[name] if name in self.derived else self.inputs.field(name)
                for name in rule.unless_known
            ]
        )
        return met


class _Met:
    """Where the clauses of one rule are true, those of `any_of` first."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._true: list[Tensor] = []
        self._values: list[Tensor] = []
        self._display: list[Tensor] = []
        self._trues = torch.empty(0)
        self._better: list[Tensor] = []
        self.holds = torch.empty(0)

    def add(self, true: Tensor, value: Tensor, display: Tensor) -> None:
        """Note one clause, what it compares, and what a person sees."""
        self._true.append(true)
        self._values.append(value)
        self._display.append(display)

    def combine(self, better: list[Tensor]) -> None:
        """Find where the rule holds: not where something better is known."""
        number = self._alternatives
        true = self._true[number:]
        if number:
            true = [*true, torch.stack(self._true[:number]).any(dim=0)]
        self._trues, self._better = torch.stack(true), better
        self.holds = self._trues.all(dim=0)
        for known in better:
            self.holds = self.holds & known.isnan()

    def known(self) -> Tensor:
        """Return where it is known whether the rule holds."""
        number = self._alternatives
        missing = [value.isnan() for value in self._values[number:]]
        if number:
            missing.append(torch.stack([value.isnan() for value in self._values[:number]]).all(dim=0))
        missings = torch.stack(missing)
        known = (~self._trues & ~missings).any(dim=0) | ~missings.any(dim=0)
        for better in self._better:
            known = known | ~better.isnan()
        return known

    def shown(self) -> tuple[Tensor, Tensor]:
        """Return what a person sees, and by which clause: the first one that is true."""
        shown, which = self._display[0].clone(), torch.zeros_like(self._display[0])
        for number in reversed(range(self._alternatives)):
            shown = torch.where(self._true[number], self._display[number], shown)
            which = torch.where(self._true[number], float(number), which)
        return shown, which


def _largest(scores: Tensor) -> NDArray[np.float64]:
    """Return the largest absolute score of each GPU; NaN without any."""
    absolute = torch.where(scores.isnan(), -1.0, scores.abs())
    found = absolute.amax(dim=1) if scores.shape[1] else torch.full((len(scores),), -1.0)
    return torch.where(found < 0, torch.nan, found).cpu().numpy()
