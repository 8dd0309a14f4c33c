"""What rules look at, of all GPUs of a pass: fields, what is made of them, and what is carried between windows.

All tensors are (N,) or (N, columns) float64. `carry` is to be called once, before `derive`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.detection.aggregates import Aggregates
from pipeline.detection.peers import Peers
from pipeline.detection.plan import MICROSECONDS, THERMAL, Plan

Tensor = torch.Tensor
# Steps of used memory below this are noise, MiB.
_TREND_DEADBAND = 1.0
# Shares of all memory by which GPUs of one job differ at most: its own from the middle, and the others among them.
_ALIKE_OWN, _ALIKE_PEERS = 0.05, 0.03
# Samples of a window whose temperature is believed to stand: fewer may be alike by chance.
_MIN_STANDING = 3
_HOUR = 3600.0 * MICROSECONDS


class Inputs:
    """What is known of N GPUs.

    Args:
        plan: What columns mean.
        found: Their aggregates.
        state: (N, W), brought up to date in place.
        starts: (N,) of their windows, microseconds.
        ends: (N,)
        device: Where tensors lie.
    """

    def __init__(
        self,
        plan: Plan,
        found: Aggregates,
        state: Tensor,
        starts: Tensor,
        ends: Tensor,
        device: torch.device,
    ) -> None:
        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._plan = plan
        self._state = state
        self._starts, self._ends = starts, ends
        self._fields: dict[tuple[str, str], Tensor] = {}
        self._statistics = {
            "mean": tensor(found.mean), "minimum": tensor(found.minimum), "maximum": tensor(found.maximum),
            "last": tensor(found.last),
        }  # fmt: skip
        self._increase = tensor(found.increase)  # (N, C)
        self._share = tensor(found.share)  # (N, M)
        self._count = tensor(found.count)  # (N, F)
        self._last_time = tensor(found.last_time).double()
        self.present = tensor(found.samples > 0)
        #: End of each GPU's window before this one; NaN: there is none.
        self.closed_before = state[:, plan.layout.closed.start].clone()
        # Counters grew since the last sample; of a GPU that was away that is longer than its window.
        seen = state[:, plan.layout.last_seen.start].clone()
        self._elapsed = torch.where(seen.isnan(), plan.window, self._last_time - seen)
        self._hourly = torch.empty(0)

    def compared(self) -> Tensor:
        """Return the means that are compared, (N, P)."""
        return self._statistics["mean"][:, torch.from_numpy(self._plan.columns_of(self._plan.compared))]

    def field(self, name: str, statistic: str = "mean") -> Tensor:
        """Return a field over the window."""
        found = self._fields.get((name, statistic))
        if found is None:
            found = self._statistics[statistic][:, self._plan.column[name]].contiguous()
            self._fields[name, statistic] = found
        return found

    def share(self, mask: int) -> Tensor:
        """Return the share of samples with any bit of a mask."""
        return self._share[:, self._plan.masks.index(mask)]

    def increase(self, name: str) -> Tensor:
        """Return what a counter grew by in the window."""
        return self._increase[:, self._plan.counter[name]]

    def hourly(self, name: str) -> Tensor:
        """Return what a counter grew by within about an hour, where it is known now."""
        return torch.where(
            self.increase(name).isnan(), torch.nan, self._hourly[:, self._plan.hourly.index(name)]
        )

    def loaded(self) -> Tensor:
        """Say which GPUs were at work at every moment."""
        least = self.field("utilization_percent", "minimum")
        engine = 100.0 * self.field("graphics_engine_ratio", "minimum")
        return torch.where(least.isnan(), engine, least) > self._plan.book.comparison.load_percent

    def carry(self) -> None:
        """Remember counters, their sums, temperatures that stand, and the last windows of used memory."""
        plan, layout, state = self._plan, self._plan.layout, self._state
        at = layout.first_seen.start
        state[:, at] = torch.where(state[:, at].isnan() & self.present, self._starts, state[:, at])
        at = layout.last_seen.start
        state[:, at] = torch.where(self.present, self._last_time, state[:, at])
        state[:, layout.closed.start] = self._ends
        last = self._statistics["last"][:, torch.from_numpy(plan.columns_of(plan.carried))]
        state[:, layout.carried] = torch.where(last.isnan(), state[:, layout.carried], last)
        self._carry_hours()
        self._carry_still()
        used = self.field("memory_used_mebibytes")
        trend = state[:, layout.trend]
        shifted = torch.cat([trend[:, 1:], used.unsqueeze(1)], dim=1)
        state[:, layout.trend] = torch.where(used.isnan().unsqueeze(1), trend, shifted)

    def _carry_hours(self) -> None:
        """Add increases to those of this hour; of the hour before so much counts as lies within an hour."""
        plan, layout, state = self._plan, self._plan.layout, self._state
        increase = self._increase[:, [plan.counter[name] for name in plan.hourly]]  # (N, H)
        hour = torch.floor(self._starts / _HOUR)
        passed = hour - torch.floor((self.closed_before - 1.0) / _HOUR)
        passed = torch.nan_to_num(passed).unsqueeze(1)
        now, before = (torch.nan_to_num(state[:, part]) for part in (layout.hourly, layout.hour_before))
        before = torch.where(passed == 0, before, torch.where(passed == 1, now, 0.0))
        now = torch.where(passed == 0, now, 0.0) + torch.nan_to_num(increase)
        unknown = increase.isnan() & state[:, layout.hourly].isnan()
        state[:, layout.hourly] = torch.where(unknown, torch.nan, now)
        state[:, layout.hour_before] = torch.where(unknown, torch.nan, before)
        within = (1.0 - (self._ends - hour * _HOUR) / _HOUR).clamp(0.0, 1.0)
        self._hourly = now + before * within.unsqueeze(1)

    def _carry_still(self) -> None:
        """Note between which powers whole windows lay since the temperature last moved: heat is slow."""
        part = self._plan.layout.still
        temperature = self.field("temperature_celsius")
        below, above = self.field("power_watts", "maximum"), self.field("power_watts", "minimum")
        stands = self.field("temperature_celsius", "minimum") == self.field("temperature_celsius", "maximum")
        stands &= self._count[:, self._plan.column["temperature_celsius"]] >= _MIN_STANDING
        degree, least, most = self._state[:, part].unbind(1)
        goes_on = stands & (temperature == degree)
        now = torch.stack(
            [
                torch.where(stands, temperature, torch.nan),
                torch.where(goes_on, torch.fmin(least, below), below),
                torch.where(goes_on, torch.fmax(most, above), above),
            ],
            dim=1,
        )
        self._state[:, part] = torch.where(temperature.isnan().unsqueeze(1), self._state[:, part], now)

    def derive(self, peers: Peers, assigned: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what `rules.DERIVED` names, each (N,); what only the caller knows is given."""
        used, total = self.field("memory_used_mebibytes"), self._total_memory()
        busy = self.field("utilization_percent")
        busy = torch.where(busy.isnan(), 100.0 * self.field("graphics_engine_ratio"), busy)
        held = torch.where(
            used.isnan(), used, (used >= self._plan.book.comparison.allocated_mebibytes).double()
        )
        trend = self._state[:, self._plan.layout.trend]  # (N, T)
        complete = ~trend.isnan().any(dim=1)
        utilization = self._plan.compare.get("utilization_percent")
        nothing = torch.full_like(used, torch.nan)
        _, least, most = self._state[:, self._plan.layout.still].unbind(1)
        stood = self.field("temperature_celsius", "maximum") - self.field("temperature_celsius", "minimum")
        return {
            "thermal_margin_celsius": self._thermal_margin(),
            # Nanoseconds of microseconds.
            "thermal_violation_ratio": self.increase("thermal_violation_nanoseconds")
            / (1000.0 * self._elapsed),
            "power_moved_watts": torch.where(stood == 0, (most - least).clamp(min=0.0), 0.0 * stood),
            "memory_used_ratio": used / total,
            "power_ratio": self.field("power_watts") / self._full_power(),
            "busy_percent": busy,
            "memory_trend": torch.where(complete & self.present, _kendall(trend), torch.nan),
            "memory_growth_ratio": (trend[:, -1] - trend[:, 0]) / total,
            "memory_before_ratio": trend[:, 0] / total,
            "peers_alike": self._alike(used, total, peers),
            "peers_utilization_percent": nothing if utilization is None else peers.median[:, utilization],
            "allocated": torch.where(assigned, torch.where(self.present, 1.0, torch.nan), held),
            **given,
        }

    def _total_memory(self) -> Tensor:
        total = self.field("memory_total_mebibytes")
        parts = self.field("memory_used_mebibytes") + self.field("memory_free_mebibytes")
        parts += torch.nan_to_num(self.field("memory_reserved_mebibytes"))
        return torch.where(total.isnan(), parts, total)

    def _full_power(self) -> Tensor:
        """Return the limit, else what the GPU drew under load until now."""
        limit = self.field("power_limit_watts")
        place = self._plan.compare.get("power_watts")
        if place is None:
            return limit
        layout = self._plan.layout
        mean, count = self._state[:, layout.mean.start + place], self._state[:, layout.count.start + place]
        past = torch.where(count >= self._plan.book.comparison.min_history, mean, torch.nan)
        return torch.where(limit.isnan(), past, limit)

    def _thermal_margin(self) -> Tensor:
        """Return the margin, else what is left to slowdown.

        A margin of 0 or less is what some drivers say when they do not know; a GPU that is so hot slows down.
        """
        margin = self.field("temperature_margin_celsius")
        room = self.field("slowdown_temperature_celsius") - self.field("temperature_celsius")
        slows = self.share(THERMAL) > 0
        return torch.where((margin > 0) | ((margin <= 0) & slows), margin, room)

    def _alike(self, used: Tensor, total: Tensor, peers: Peers) -> Tensor:
        """Tell GPUs that seem to share a job with most of their peers: such jobs need as much memory everywhere."""
        place = self._plan.compare.get("memory_used_mebibytes")
        if place is None:
            return torch.ones_like(used)
        near = (used - peers.median[:, place]).abs() <= _ALIKE_OWN * total
        close = peers.deviation[:, place] <= _ALIKE_PEERS * total
        return torch.where(used.isnan(), 1.0, (near & close).double())


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
