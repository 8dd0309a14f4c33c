"""What a window says: aggregates, scores, conditions in words, and state; and how state is taken up again."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.detection.aggregates import Aggregates
from pipeline.detection.plan import Plan, microseconds, moment
from pipeline.detection.roster import Member, Roster, XidEvent
from pipeline.detection.rules import Rule
from pipeline.detection.score import Given, Scored
from pipeline.telemetry import Aggregate, Condition, GpuWindow, Peers, Windows

Held = Mapping[int, Mapping[int, tuple[int, int]]]


class Describer:
    """Turns the numbers of a pass into what is published."""

    def __init__(self, plan: Plan, found: Aggregates, scored: Scored, given: Given) -> None:
        self._plan = plan
        self._scored = scored
        self._given = given
        self._samples = found.samples.tolist()
        used = np.flatnonzero(found.count.any(axis=0))
        self._names = [plan.columns[column] for column in used.tolist()]
        self._aggregates = [
            part[:, used].tolist()
            for part in (found.count, found.minimum, found.maximum, found.mean, found.last)
        ]
        self._is_whole: list[bool] = np.all(found.count[:, used] > 0, axis=1).tolist()
        self._peer_scores = scored.peer_score.tolist()
        self._history_scores = scored.history_score.tolist()
        self._model_scores = given.model.tolist()
        known = ~np.isnan(scored.state)
        self._widths = np.where(
            known.any(axis=1), known.shape[1] - np.argmax(known[:, ::-1], axis=1), 0
        ).tolist()
        self._holding: dict[int, list[int]] = {}
        for row, rule in scored.holding.tolist():
            self._holding.setdefault(row, []).append(rule)

    def gpus(
        self, roster: Roster, members: Sequence[Member], rows: Sequence[int], first: int, end: int,
        xids: Held, events: Iterable[XidEvent],
    ) -> tuple[GpuWindow, ...]:  # fmt: skip
        """Return a key's GPUs, whose numbers begin at `first`."""
        codes: dict[int, list[int]] = {}
        for event in sorted(set(events)):
            codes.setdefault(event.row, []).append(event.code)
        described = []
        for place, (member, row) in enumerate(zip(members, rows, strict=True), first):
            conditions = [self._condition(place, rule, member, end) for rule in self._holding.get(place, ())]
            held = xids.get(row, {})
            conditions += [xid_condition(roster, code, since) for code, (since, _) in sorted(held.items())]
            described.append(
                GpuWindow(
                    gpu_uuid=member.gpu_uuid,
                    host=member.host,
                    model=member.model,
                    samples=self._samples[place],
                    values=self._values(place),
                    scores=self._scores(place),
                    conditions=tuple(conditions),
                    xids=tuple(codes.get(row, ())),
                    state=self._state(place, member, held),
                )
            )
        return tuple(described)

    def _values(self, place: int) -> dict[str, Aggregate]:
        found = map(Aggregate, *(part[place] for part in self._aggregates))
        if self._is_whole[place]:
            return dict(zip(self._names, found, strict=True))
        return {name: value for name, value in zip(self._names, found, strict=True) if value.count}

    def _scores(self, place: int) -> dict[str, float]:
        scores = {
            "peers": self._peer_scores[place],
            "history": self._history_scores[place],
            "model": self._model_scores[place],
        }
        return {name: score for name, score in scores.items() if not math.isnan(score)}

    def _state(self, place: int, member: Member, held: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
        """Return what `restore` reads; NaN is written as null."""
        numbers: list[float | None] = self._scored.state[place, : self._widths[place]].tolist()
        state: dict[str, Any] = {
            "plan": self._plan.fingerprint,
            "row": [None if number != number else number for number in numbers],
        }
        if member.index is not None:
            state["index"] = member.index
        if member.is_instance:
            state["instance"] = True
        if member.is_assigned:
            state["assigned"] = True
        if held:
            state["xids"] = [[code, since, until] for code, (since, until) in sorted(held.items())]
        return state

    def _condition(self, place: int, number: int, member: Member, end: int) -> Condition:
        layout, rule = self._plan.layout, self._plan.rules[number]
        state = self._scored.state[place]
        since = int(state[layout.since][number])
        value, which = float(state[layout.value][number]), int(state[layout.which][number])
        clause = rule.clauses[which]
        peers = None
        if clause.compare == "peers" and self._scored.now[place, number]:
            peers = self._peers(place, clause.field)
        seconds = (end - since) / 1e6
        patience = self._plan.patience[number]
        return Condition(
            rule=rule.name,
            severity=rule.severity,
            state="firing" if state[layout.held][number] >= patience else "pending",
            since=moment(since),
            for_seconds=rule.for_seconds,
            value=None if math.isnan(value) else value,
            limit=clause.limit,
            field=clause.field,
            peers=peers,
            message=_message(rule, value, clause.limit, clause.field, seconds, member, peers),
            action=rule.action,
            runbook=rule.runbook,
        )

    def _peers(self, place: int, field: str) -> Peers | None:
        column, found = self._plan.compare[field], self._scored.peers
        score = float(found.score[place, column])
        if math.isnan(score):
            return None
        return Peers(
            count=int(found.count[place, column]),
            median=float(found.median[place, column]),
            deviation=float(found.deviation[place, column]),
            score=score,
        )


def _message(
    rule: Rule, value: float, limit: float, field: str, seconds: float, member: Member, peers: Peers | None
) -> str:
    text = rule.message.format(
        value=value, limit=limit, field=field, minutes=round(seconds / 60, 1), gpu_uuid=member.gpu_uuid,
        host=member.host, index="?" if member.index is None else member.index,
    )  # fmt: skip
    if peers is not None:
        text += f"; the median of {peers.count} peers is {peers.median:.4g}"
        text += f" (score {peers.score:.1f}, limit {limit:g})"
    return text[:1000]


def xid_condition(roster: Roster, code: int, since: int) -> Condition:
    """Describe an XID error that holds."""
    table = roster.plan.book.xids
    known = table.find(code)
    return Condition(
        rule=f"xid_{code}",
        severity=known.severity,
        state="firing",
        since=moment(since),
        value=float(code),
        field="xid",
        message=f"XID {code}: {known.name}",
        action=known.action,
        runbook=table.runbooks.get(known.action),
    )


def xid_event(roster: Roster, row: int, time: int, codes: Sequence[int]) -> Windows | None:
    """Return XID errors as a window of zero length; None when all of them are benign."""
    table = roster.plan.book.xids
    member = roster.members[row]
    bad = sorted({code for code in codes if not table.find(code).benign})
    if not bad or member is None:
        return None
    gpu = GpuWindow(
        gpu_uuid=member.gpu_uuid,
        host=member.host,
        model=member.model,
        conditions=tuple(xid_condition(roster, code, roster.since(row, code, time)) for code in bad),
        xids=tuple(codes),
    )
    at = moment(time)
    return Windows(key=roster.key, start=at, end=at, gpus=(gpu,), rules_version=roster.plan.book.version)


def farewell(members: Iterable[Member]) -> tuple[GpuWindow, ...]:
    """Describe GPUs that are let go, once and without conditions: whatever held for them is over."""
    return tuple(
        GpuWindow(gpu_uuid=m.gpu_uuid, host=m.host, model=m.model, state={"forgotten": True}) for m in members
    )


def restore(roster: Roster, windows: Windows) -> None:
    """Take up what a closed window says of its GPUs."""
    plan, end = roster.plan, microseconds(windows.end)
    gpus = [gpu for gpu in windows.gpus if not gpu.state.get("forgotten")]
    members = [
        Member(
            gpu.gpu_uuid, gpu.host, gpu.state.get("index"), gpu.model,
            bool(gpu.state.get("instance")), bool(gpu.state.get("assigned")),
        )
        for gpu in gpus
    ]  # fmt: skip
    first = len(roster.members)
    roster.add(members, end)
    for row, gpu in enumerate(gpus, first):
        roster.xids[row] = {
            int(code): (microseconds(moment(since)), int(until))
            for code, since, until in gpu.state.get("xids", ())
        }
        if gpu.state.get("plan") == plan.fingerprint:
            numbers = gpu.state["row"]
            roster.state[row, : len(numbers)] = [math.nan if number is None else number for number in numbers]
        else:
            _restore_conditions(roster, row, gpu, end)
        seen = roster.state[row, plan.layout.last_seen.start]
        if not np.isnan(seen):
            roster.last_seen[row] = int(seen)


def _restore_conditions(roster: Roster, row: int, gpu: GpuWindow, end: int) -> None:
    """Keep at least since when conditions hold, whatever else of the rules has changed."""
    plan, layout = roster.plan, roster.plan.layout
    places = {rule.name: number for number, rule in enumerate(plan.rules)}
    for condition in gpu.conditions:
        if (number := places.get(condition.rule)) is not None:
            value = math.nan if condition.value is None else condition.value
            since = microseconds(condition.since)
            held = end - since
            if condition.state == "firing":
                held = max(held, plan.patience[number])
            numbers = (since, held, end, value, 0)
            parts = (layout.since, layout.held, layout.seen, layout.value, layout.which)
            for part, found in zip(parts, numbers, strict=True):
                roster.state[row, part.start + number] = found
