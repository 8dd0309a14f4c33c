"""Each GPU against its own past: exponentially weighted means and variances of what it measured under load."""

import torch

from pipeline.detection.plan import Plan

Tensor = torch.Tensor
# A step of a GPU's past is cut to so many deviations: a fault must not become the norm at once.
_MAX_STEP = 4.0


class Past:
    """What N GPUs showed before, in their state.

    Args:
        plan: Where it lies.
        state: (N, W), brought up to date in place by `learn`.
        values: (N, P) of this window.
        loaded: (N,) which GPUs were at work; nothing is said of the others, and nothing learnt.
    """

    def __init__(self, plan: Plan, state: Tensor, values: Tensor, loaded: Tensor) -> None:
        self._plan, self._state = plan, state
        values = torch.where(loaded.unsqueeze(1), values, torch.nan)
        self._width = values.shape[1]
        self._used = torch.nonzero(~values.isnan().all(dim=0)).squeeze(1)  # (U,)
        self._values = values[:, self._used]
        layout = plan.layout
        parts = (layout.mean, layout.variance, layout.count)
        self._columns = [self._used + part.start for part in parts]
        self._mean, self._variance, self._count = (
            torch.nan_to_num(state[:, columns]) for columns in self._columns
        )
        absolute, relative = (
            torch.from_numpy(floor).to(state.device)[self._used]
            for floor in (plan.floor_absolute, plan.floor_relative)
        )
        self._spread = torch.maximum(
            self._variance.sqrt(), torch.maximum(absolute, relative * self._mean.abs())
        )
        self._known = self._count >= plan.book.comparison.min_history

    def scores(self) -> Tensor:
        """Return how many deviations each value is from the past, (N, P); NaN where too little is known."""
        scores = torch.full((len(self._values), self._width), torch.nan, dtype=self._values.dtype)
        scores = scores.to(self._values.device)
        found = (self._values - self._mean) / self._spread
        scores[:, self._used] = torch.where(self._known, found, torch.nan)
        return scores

    def learn(self, stands: Tensor) -> None:
        """Add the values to the past, but for GPUs whose past stands still, (N,)."""
        step = self._values - self._mean
        furthest = _MAX_STEP * self._spread
        step = torch.where(self._known, step.clamp(-furthest, furthest), step)
        weight = torch.clamp(1.0 / (self._count + 1.0), min=self._plan.book.comparison.history_weight)
        variance = torch.where(self._count > 0, (1.0 - weight) * (self._variance + weight * step * step), 0.0)
        learnt = ~self._values.isnan() & ~stands.unsqueeze(1)
        new = (self._mean + weight * step, variance, self._count + 1.0)
        for columns, values in zip(self._columns, new, strict=True):
            self._state[:, columns] = torch.where(learnt, values, self._state[:, columns])
