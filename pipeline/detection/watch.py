"""Which samples make a window, and when it closes: for all keys of one partition.

A key's clock is the latest time any of its samples had (its watermark). A window closes when the clock has passed
its end by the lateness that is allowed, when the key is silent, or when too much is held; what comes for it after
that is late. All of it follows from the records in their order and from the times Kafka gave them, so that a
second reading closes the same windows with the same samples. Not thread-safe.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline import logs
from pipeline.detection import describe
from pipeline.detection.aggregates import Chunk, Integers
from pipeline.detection.closing import Cause, Closing
from pipeline.detection.plan import MICROSECONDS, Plan, microseconds
from pipeline.detection.roster import OpenWindow, Roster, XidEvent
from pipeline.detection.rules import RuleBook
from pipeline.telemetry import Sample, Samples, Windows

log = logs.get(__name__)


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How samples become windows."""

    window_seconds: float = 60.0
    #: How long after a window's end, by the key's own clock, its samples may come.
    lateness_seconds: float = 20.0
    #: A key of which nothing came for so long, by Kafka's clock, is silent: its windows close.
    silence_seconds: float = 120.0
    #: A key that was silent for so long is forgotten: its GPUs begin anew.
    forget_key_seconds: float = 3600.0
    #: More samples of one partition are not held: the oldest windows close before their time.
    max_samples: int = 500_000


@dataclass
class Fed:
    """What one record did."""

    closings: list[Closing] = field(default_factory=list)
    #: XID errors, to be published at once.
    events: list[Windows] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    #: How many open windows hold samples of it; with none it can be finished.
    windows: int = 0


class Watch:
    """One partition."""

    def __init__(self, book: RuleBook, options: WatchOptions | None = None) -> None:
        self.options = options or WatchOptions()
        self.plan = Plan(book, self.options.window_seconds)
        self.rosters: dict[str, Roster] = {}
        #: When keys were last heard of, by Kafka's clock; the one that was not heard of for longest is first.
        self._active: OrderedDict[str, int] = OrderedDict()
        self._dormant: OrderedDict[str, int] = OrderedDict()
        self.held_samples = 0
        self._clock_ms = 0
        self._lateness = round(self.options.lateness_seconds * MICROSECONDS)
        #: Open windows in the order in which they were begun.
        self._begun: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._columns: dict[tuple[str, ...], tuple[Integers, Integers]] = {}

    def restore(self, windows: Iterable[Windows]) -> None:
        """Take up the state that a key's last complete window carries (all its parts)."""
        broken: set[str] = set()
        for part in windows:
            if part.is_event:
                continue
            roster = self.rosters.get(part.key)
            if roster is None:
                roster = self.rosters[part.key] = Roster(self.plan, part.key)
            self._active[part.key] = self._clock_ms
            roster.closed_until = max(microseconds(part.end), roster.closed_until or 0)
            roster.watermark = max(roster.watermark or 0, roster.closed_until)
            if part.key in broken:
                continue
            try:
                describe.restore(roster, part)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
                # Somebody else writes to our topic: no reason to fail at every assignment.
                log.error("state cannot be read back, its GPUs begin anew", key=part.key, error=str(error))
                broken.add(part.key)
                self.rosters[part.key] = roster.anew()

    def feed(self, token: Hashable, key: str, samples: Samples, published_ms: int) -> Fed:
        """Add a record's samples to its key's windows, and close what can take no more."""
        fed = Fed()
        if not self._clock_ms:
            # Keys whose state was read back were heard of at some time that is not known: begin to count now.
            self._active = OrderedDict.fromkeys(self._active, published_ms)
        self._clock_ms = max(self._clock_ms, published_ms)
        roster = self.rosters.get(key)
        if roster is None:
            roster = self.rosters[key] = Roster(self.plan, key)
        self._dormant.pop(key, None)
        self._active[key] = self._clock_ms
        self._active.move_to_end(key)
        roster, latest = self._add(roster, token, samples, fed)
        if latest is not None:
            roster.watermark = max(latest, roster.watermark or latest)
            self._close_until(roster, self._closable(roster.watermark), "watermark", fed.closings)
        self._close_quiet(fed.closings)
        while self.held_samples > self.options.max_samples:
            oldest, start = next(iter(self._begun))
            self._close_until(self.rosters[oldest], start + self.plan.window, "pressure", fed.closings)
        fed.windows = sum(token in window.tokens for window in roster.open.values())
        return fed

    @property
    def open_keys(self) -> set[str]:
        """Keys with an open window."""
        return {key for key, _ in self._begun}

    @property
    def gpus(self) -> int:
        """How many GPUs are known."""
        return sum(len(roster.row_of) for roster in self.rosters.values())

    def close_silent(self, keys: Iterable[str]) -> list[Closing]:
        """Close all windows of keys that are known to be silent."""
        closings: list[Closing] = []
        for key in keys:
            if (roster := self.rosters.get(key)) is not None and roster.open:
                self._close_until(roster, max(roster.open) + self.plan.window, "silence", closings)
        return closings

    # Inside

    def _closable(self, watermark: int) -> int:
        """Return the end of the last window that a clock lets close."""
        return (watermark - self._lateness) // self.plan.window * self.plan.window

    def _add(self, roster: Roster, token: Hashable, samples: Samples, fed: Fed) -> tuple[Roster, int | None]:
        """Put samples into windows; return the key's roster and the latest time of those not left out."""
        given = samples.samples
        if refused := roster.refused(s.gpu_uuid for s in given):
            given = tuple(s for s in given if s.gpu_uuid not in refused)
            fed.dropped["too_many_gpus"] += len(samples.samples) - len(given)
            if not given:
                return roster, None
        times = np.rint(np.array([s.time.timestamp() for s in given]) * 1e6).astype(np.int64)
        forget = round(self.options.forget_key_seconds * MICROSECONDS)
        if roster.closed_until is not None and not roster.open and times.min() - roster.closed_until > forget:
            roster = self.rosters[roster.key] = roster.anew()
        rows = roster.rows((s.gpu_uuid for s in given), samples.host, int(times.max()))
        if samples.gpus:
            roster.describe(samples.gpus)
        starts = times // self.plan.window * self.plan.window
        taken = np.ones(len(given), np.bool_)
        if roster.closed_until is not None:
            taken = starts >= roster.closed_until
            fed.dropped["late"] += int(len(given) - taken.sum())
        self._check_hosts(roster, samples.host, rows, starts, taken, fed)
        np.maximum.at(roster.last_seen, rows, times)
        np.minimum.at(roster.first_seen, rows, times)
        for start in np.unique(starts[taken]):
            window = self._open(roster, int(start))
            window.tokens[token] = None
            chosen = np.flatnonzero(taken & (starts == start))
            window.samples += len(chosen)
            self.held_samples += len(chosen)
            self._add_chunks(window, given, chosen, rows, times)
        self._add_events(roster, token, given, rows, times, starts, taken, fed)
        return roster, int(times[taken].max()) if taken.any() else None

    def _open(self, roster: Roster, start: int) -> OpenWindow:
        window = roster.open.get(start)
        if window is None:
            window = roster.open[start] = OpenWindow(start)
            self._begun[roster.key, start] = None
        return window

    def _check_hosts(
        self, roster: Roster, host: str, rows: Integers, starts: Integers, taken: NDArray[np.bool_], fed: Fed
    ) -> None:
        """Leave out what a second host says of the same GPU within a window; later the GPU may have moved."""
        number = roster.host_number(host)
        if all(roster.hosts[row] == number for row in rows.tolist()):
            return
        for place, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            if roster.hosts[row] == number:
                continue
            if taken[place] and roster.last_seen[row] >= start:
                taken[place] = False
                fed.dropped["duplicate_uuid"] += 1
            elif taken[place]:
                roster.move(row, host)

    def _add_chunks(
        self, window: OpenWindow, given: Sequence[Sample], chosen: Integers, rows: Integers, times: Integers
    ) -> None:
        """Turn samples into columns, one chunk for those that have the same fields."""
        groups: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        names: tuple[str, ...] | None = None
        places: list[int] = []
        flat: list[float] = []
        for place in chosen.tolist():
            values = given[place].values
            if (found := tuple(values)) != names:
                names = found
                places, flat = groups.setdefault(names, ([], []))
            places.append(place)
            flat.extend(values.values())
        for fields, (places, flat) in groups.items():
            columns, kept = self._columns_of(fields)
            matrix = np.array(flat).reshape(len(places), len(fields))
            if len(kept) < len(fields):
                matrix = matrix[:, kept]
            at = np.array(places, np.int64)
            window.chunks.append(Chunk(rows[at], times[at], columns, matrix))

    def _columns_of(self, names: tuple[str, ...]) -> tuple[Integers, Integers]:
        """Return the columns that names lead to, and which of the names have one."""
        found = self._columns.get(names)
        if found is None:
            if len(self._columns) >= 1024:  # publishers that never repeat themselves
                self._columns.clear()
            kept = [place for place, name in enumerate(names) if name in self.plan.column]
            columns = self.plan.columns_of(tuple(names[place] for place in kept))
            found = self._columns[names] = (columns, np.array(kept, np.int64))
        return found

    def _add_events(
        self, roster: Roster, token: Hashable, given: Sequence[Sample], rows: Integers, times: Integers,
        starts: Integers, taken: NDArray[np.bool_], fed: Fed,
    ) -> None:  # fmt: skip
        for place, sample in enumerate(given):
            if sample.state == "lost" and taken[place]:
                roster.open[int(starts[place])].lost.append((int(rows[place]), int(times[place])))
            if sample.xids:
                window = self._window_of_xids(roster, int(starts[place]))
                window.tokens[token] = None
                roster.last_seen[rows[place]] = max(roster.last_seen[rows[place]], window.start)
                self._add_xids(roster, window, sample, int(rows[place]), int(times[place]), fed)

    def _window_of_xids(self, roster: Roster, start: int) -> OpenWindow:
        """Return the window that tells XID errors; of late ones the next to close: its own is published."""
        if roster.closed_until is not None and start < roster.closed_until:
            following = -(-roster.closed_until // self.plan.window) * self.plan.window
            start = min(roster.open, default=following)
        return self._open(roster, start)

    def _add_xids(
        self, roster: Roster, window: OpenWindow, sample: Sample, row: int, time: int, fed: Fed
    ) -> None:
        event = describe.xid_event(roster, row, time, sample.xids)
        if event is not None:
            fed.events.append(event)
        window.xids.extend(XidEvent(time, row, code) for code in sample.xids)

    def _close_quiet(self, closings: list[Closing]) -> None:
        """Close what keys hold that were not heard of for long by Kafka's clock, then forget them."""
        quiet_ms, forget_ms = (
            1000 * s for s in (self.options.silence_seconds, 2 * self.options.forget_key_seconds)
        )
        while self._active:
            key, heard_ms = next(iter(self._active.items()))
            if self._clock_ms - heard_ms <= quiet_ms:
                break
            closings.extend(self.close_silent([key]))
            del self._active[key]
            self._dormant[key] = heard_ms
        while self._dormant:
            key, heard_ms = next(iter(self._dormant.items()))
            if self._clock_ms - heard_ms <= forget_ms:
                break
            del self._dormant[key], self.rosters[key]

    def _close_until(self, roster: Roster, until: int, cause: Cause, closings: list[Closing]) -> None:
        """Close all windows of a key that end by then."""
        if roster.closed_until is not None and until <= roster.closed_until:
            return
        roster.closed_until = until
        for start in sorted(start for start in roster.open if start + self.plan.window <= until):
            window = roster.open.pop(start)
            del self._begun[roster.key, start]
            self.held_samples -= window.samples
            closings.append(self._closing(roster, window, cause))

    def _closing(self, roster: Roster, window: OpenWindow, cause: Cause) -> Closing:
        """Note what is known now: by the time the window is scored, later records may have come."""
        forget_seconds = self.plan.book.comparison.forget_seconds
        gone = roster.forget(window.start - round(forget_seconds * MICROSECONDS))
        roster.closing.append(window)
        # One that came only after this window was not lost in it.
        there = roster.first_seen < window.start + self.plan.window
        found = [
            (row, member) for row, member in enumerate(roster.members) if member is not None and there[row]
        ]
        rows, members = [row for row, _ in found], [member for _, member in found]
        hosts = [roster.hosts[row] for row in rows]
        return Closing(roster, window, cause, rows, hosts, members, gone)
