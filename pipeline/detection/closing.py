"""Windows that take no more samples: scored in one pass for all keys, and described, in the order of each key."""

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.detection import describe
from pipeline.detection.aggregates import Chunk, Integers, aggregate
from pipeline.detection.describe import Held
from pipeline.detection.learned import WindowModel, score_windows
from pipeline.detection.plan import moment
from pipeline.detection.roster import Member, OpenWindow, Roster, XidEvent
from pipeline.detection.score import Given, score
from pipeline.telemetry import Windows

Cause = Literal["watermark", "silence", "pressure"]
_CPU = torch.device("cpu")


@dataclass(eq=False)
class Closing:
    """A window that takes no more samples, with what was known of its GPUs at that moment.

    XID errors that hold are not: those that a gauge tells are known once the windows before it are scored.
    """

    roster: Roster
    window: OpenWindow
    cause: Cause
    rows: list[int]
    hosts: list[int]
    members: list[Member]
    #: GPUs that are let go with this window.
    gone: list[Member]

    @property
    def end(self) -> int:
        """Its end in microseconds."""
        return self.window.start + self.roster.plan.window


@dataclass(eq=False)
class Closed:
    """A closed window as it is published, and the records whose samples are in it."""

    windows: Windows
    tokens: list[Hashable]
    cause: Cause
    roster: Roster
    #: Processor time of the pass that scored it with all others.
    score_seconds: float = 0.0


def close_all(
    closings: Sequence[Closing], device: torch.device = _CPU, model: WindowModel | None = None
) -> list[list[Closed]]:
    """Score windows that take no more samples, round by round."""
    return [close_round(together, device, model) for together in rounds_of(closings)]


def rounds_of(closings: Iterable[Closing]) -> list[list[Closing]]:
    """Return windows in as few rounds as a key has of them; each is to be scored and published before the next."""
    rounds: list[list[Closing]] = []
    depth: Counter[str] = Counter()
    for closing in closings:
        number = depth[closing.roster.key]
        depth[closing.roster.key] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(closing)
    return rounds


def close_round(
    closings: Sequence[Closing], device: torch.device = _CPU, model: WindowModel | None = None
) -> list[Closed]:
    """Score windows of different keys in one pass."""
    plan = closings[0].roster.plan
    sizes = [len(closing.rows) for closing in closings]
    offsets = np.r_[0, np.cumsum(sizes)]
    chunks: list[Chunk] = []
    for closing, offset in zip(closings, offsets[:-1].tolist(), strict=True):
        place = np.full(len(closing.roster.members), -1, np.int64)
        place[closing.rows] = np.arange(len(closing.rows)) + offset
        chunks += [Chunk(place[c.rows], c.times, c.columns, c.values) for c in closing.window.chunks]
    state = np.concatenate([closing.roster.state[closing.rows] for closing in closings])
    layout = plan.layout
    starts = np.repeat([closing.window.start for closing in closings], sizes)
    # In the window after its first one the first scrape of a GPU may still go on.
    was_known = state[:, layout.first_seen.start] < starts - plan.window
    found = aggregate(plan, int(offsets[-1]), chunks, state[:, layout.carried], was_known)
    scores = np.full(len(state), np.nan)
    if model is not None and len(state):
        scores = score_windows(model, found.mean, device)
        scores[found.samples == 0] = np.nan
    given = Given(
        model=scores,
        state=state,
        groups=_groups(closings),
        starts=starts,
        ends=np.repeat([closing.end for closing in closings], sizes),
        assigned=np.array([m.is_assigned for closing in closings for m in closing.members], np.bool_),
        lost=np.concatenate(
            [
                _lost(closing, found.samples[a:b], found.last_time[a:b])
                for closing, a, b in zip(closings, offsets[:-1], offsets[1:], strict=True)
            ]
        ),
    )
    begun = time.thread_time()
    scored = score(plan, found, given, device)
    seconds = time.thread_time() - begun
    texts = describe.Describer(plan, found, scored, given)
    closed = []
    for closing, a, b in zip(closings, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        roster = closing.roster
        roster.state[closing.rows] = scored.state[a:b]
        held = _held(
            closing, [(row - a, time, code) for row, time, code in found.xid_changes if a <= row < b]
        )
        gpus = texts.gpus(roster, closing.members, closing.rows, a, closing.end, held, closing.window.xids)
        gpus += describe.farewell(closing.gone)
        windows = Windows(
            key=roster.key, start=moment(closing.window.start), end=moment(closing.end), gpus=gpus,
            rules_version=plan.book.version,
        )  # fmt: skip
        closed.append(Closed(windows, list(closing.window.tokens), closing.cause, roster, seconds))
    return closed


def _held(closing: Closing, changes: Sequence[tuple[int, int, int]]) -> Held:
    """Return which XIDs hold after a window; a last XID that became another one is an error of its moment."""
    roster, window = closing.roster, closing.window
    roster.hold(window.xids)  # first, as those told at once said since when they hold
    events = [XidEvent(time, closing.rows[row], code) for row, time, code in changes]
    roster.hold(events)
    window.xids.extend(events)
    roster.closing.remove(window)
    return roster.holding(closing.end)


def _groups(closings: Sequence[Closing]) -> Integers:
    """Number the groups of peers: same key, same model, and parts of GPUs apart from whole ones."""
    numbers: dict[tuple[int, str | None, bool], int] = {}
    return np.array(
        [
            numbers.setdefault((place, member.model, member.is_instance), len(numbers))
            for place, closing in enumerate(closings)
            for member in closing.members
        ],
        np.int64,
    )


def _lost(closing: Closing, samples: Integers, last_time: Integers) -> NDArray[np.float64]:
    """Say which GPUs are lost: by their driver, or silent while others of their host are not."""
    hosts = np.array(closing.hosts, np.int64)
    present = samples > 0
    heard = np.isin(hosts, hosts[present])
    # A part of a GPU that is gone was deleted: that is how MIG is used.
    is_whole = np.array([not member.is_instance for member in closing.members], np.bool_)
    lost = np.where(present, 0.0, np.where(heard & is_whole, 1.0, np.nan))
    place = {row: number for number, row in enumerate(closing.rows)}
    for row, at in closing.window.lost:
        number = place[row]
        if at >= last_time[number]:
            lost[number] = 1.0
    return lost
