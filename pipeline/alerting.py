"""The life of alerts: which step follows from a window, given what is known of a GPU's alerts. Pure.

A closed window lists every condition that holds, so an open alert that it does not list is over. A window of zero
length only adds. A window that ends at or before the last one applied changes nothing, so reading records twice or
out of order opens, fires and resolves nothing twice.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal

import msgspec

from pipeline import telemetry
from pipeline.telemetry import Alert, Condition, GpuWindow

# After so long without its host's samples another host has the card.
MOVED_AFTER = timedelta(minutes=10)

State = Literal["pending", "firing", "resolved"]


class AlertRow(msgspec.Struct, frozen=True, kw_only=True):
    """An alert as it is stored."""

    alert_id: str
    gpu_id: int
    gpu_uuid: str
    host: str
    model: str | None
    state: State
    since: datetime
    #: End of the last window that had it.
    seen_at: datetime
    fired_at: datetime | None = None
    resolved_at: datetime | None = None
    #: As it was last seen.
    condition: Condition


class GpuAlerts:
    """The alerts of one GPU while windows are applied to them, in order."""

    def __init__(self, gpu_id: int, reconciled: datetime, known: Mapping[str, AlertRow]) -> None:
        """Take up to where windows were applied, and all alerts that are open or that a window names."""
        self.gpu_id = gpu_id
        self.reconciled = reconciled
        self._rows = dict(known)
        #: To store, by id; and to publish, in order.
        self.changed: dict[str, AlertRow] = {}
        self.steps: list[Alert] = []

    def apply(self, gpu: GpuWindow, start: datetime, end: datetime) -> None:
        """Take one window into account."""
        is_event = start == end
        if not is_event and end <= self.reconciled:
            return
        listed = {
            telemetry.alert_id(gpu.gpu_uuid, condition.rule, condition.since): condition
            for condition in gpu.conditions
        }
        for alert_id, condition in listed.items():
            self._hold(alert_id, condition, gpu, end)
        if not is_event:
            self.reconciled = end
            for row in list(self._rows.values()):
                # What an event after this window's end began is not for this window to end.
                if row.state != "resolved" and row.alert_id not in listed and row.seen_at < end:
                    self._resolve(row, end)

    def give_up(self, time: datetime) -> None:
        """Resolve whatever is open: no window will."""
        for row in list(self._rows.values()):
            if row.state != "resolved":
                self._resolve(row, max(time, row.seen_at))

    def _hold(self, alert_id: str, condition: Condition, gpu: GpuWindow, end: datetime) -> None:
        row = self._rows.get(alert_id)
        if row is None:
            fired_at = end if condition.state == "firing" else None
            row = AlertRow(
                alert_id=alert_id, gpu_id=self.gpu_id, gpu_uuid=gpu.gpu_uuid, host=gpu.host, model=gpu.model,
                state=condition.state, since=condition.since, seen_at=end, fired_at=fired_at, condition=condition,
            )  # fmt: skip
            self._keep(row, step_time=fired_at or condition.since)
        elif row.state == "resolved" or end < row.seen_at:
            return  # it comes once, and a later window knows better
        elif row.state == "pending" and condition.state == "firing":
            self._keep(
                msgspec.structs.replace(
                    row, state="firing", seen_at=end, fired_at=end, condition=condition, host=gpu.host
                ),
                step_time=end,
            )
        else:
            self._keep(msgspec.structs.replace(row, seen_at=end, condition=condition))

    def _resolve(self, row: AlertRow, end: datetime) -> None:
        resolved = msgspec.structs.replace(row, state="resolved", resolved_at=end)
        # Nobody was told to act on what never fired, so nobody is told that it is over.
        self._keep(resolved, step_time=end if row.state == "firing" else None)

    def _keep(self, row: AlertRow, step_time: datetime | None = None) -> None:
        self._rows[row.alert_id] = self.changed[row.alert_id] = row
        if step_time is not None:
            self.steps.append(_step(row, step_time))


def _step(row: AlertRow, time: datetime) -> Alert:
    return Alert(
        id=row.alert_id, state=row.state, gpu_uuid=row.gpu_uuid, host=row.host, since=row.since, time=time,
        condition=row.condition, model=row.model,
    )  # fmt: skip
