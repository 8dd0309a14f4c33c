"""The rules made into columns: which fields are kept, where each number lies, what is compared.

A plan is made once. Its fingerprint tells state that was written under another plan.
"""

import hashlib
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline import dcgm
from pipeline.detection.rules import DERIVED, Clause, Rule, RuleBook

MICROSECONDS = 1_000_000
#: The clock events with which a GPU itself says that it is too hot.
THERMAL = sum(dcgm.CLOCK_EVENTS[name] for name in ("hw_slowdown", "sw_thermal", "hw_thermal"))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Layout:
    """Where what is remembered of a GPU lies in its row of state; see `score.py`."""

    first_seen: slice  # start of the first window that had samples of it, microseconds
    last_seen: slice  # time of its last sample
    closed: slice  # end of its last window
    carried: slice  # last value of every counter
    hourly: slice  # increase of counters since the full hour
    hour_before: slice  # and in the hour before that
    still: slice  # a temperature that stands, the least maximum of power since, and the greatest minimum
    mean: slice  # own past of every compared field, of windows under load
    variance: slice
    count: slice
    trend: slice  # used memory in the last windows
    since: slice  # of every rule: start of its condition, microseconds; NaN: it does not hold
    held: slice  # for how long it held since then, microseconds
    seen: slice  # end of the window in which it last held
    value: slice  # what was seen then
    which: slice  # by which clause
    width: int


class Plan:
    """What the numbers of a window and of a state mean."""

    def __init__(self, book: RuleBook, window_seconds: float) -> None:
        self.book = book
        self.rules: tuple[Rule, ...] = book.rules
        self.window = round(window_seconds * MICROSECONDS)
        clauses = [clause for rule in book.rules for clause in rule.clauses]
        names = [clause.field for clause in clauses if clause.field not in DERIVED]
        names += [name for rule in book.rules for name in rule.unless_known if name not in DERIVED]
        extra = dict.fromkeys(name for name in [*names, *book.comparison.floors] if name not in dcgm.NAMES)
        self.columns: tuple[str, ...] = (*dcgm.NAMES, *extra)
        self.column = {name: number for number, name in enumerate(self.columns)}
        kinds = {field.name: field.kind for field in dcgm.FIELDS}
        self.counters = tuple(name for name in dcgm.NAMES if kinds[name] == "counter")
        self.counter = {name: number for number, name in enumerate(self.counters)}
        #: Carried from window to window: counters, and the last XID, of which a change is an event.
        self.carried = (*self.counters, "last_xid")
        #: Counters of which some rule asks what they grew by in an hour.
        self.hourly = tuple(dict.fromkeys(c.field for c in clauses if c.statistic == "hourly"))
        masks = [clause.mask for clause in clauses if clause.bits]
        self.masks = tuple(dict.fromkeys([*masks, THERMAL]))
        self.compared = tuple(book.comparison.floors)
        self.compare = {name: number for number, name in enumerate(self.compared)}
        floors = book.comparison.floors.values()
        self.floor_absolute: NDArray[np.float64] = np.array([floor.absolute for floor in floors])
        self.floor_relative: NDArray[np.float64] = np.array([floor.relative for floor in floors])
        #: How long each rule must have held before it fires, microseconds.
        self.patience = tuple(
            max(round(rule.for_seconds * MICROSECONDS), rule.for_windows * self.window) for rule in book.rules
        )
        self.layout = self._lay_out()
        self.fingerprint = self._fingerprint()

    def columns_of(self, names: tuple[str, ...]) -> NDArray[np.int64]:
        """Return the columns of fields."""
        return np.array([self.column[name] for name in names], np.int64)

    def _lay_out(self) -> Layout:
        rules, compared = len(self.rules), len(self.compared)
        widths = {
            "first_seen": 1, "last_seen": 1, "closed": 1, "carried": len(self.carried),
            "hourly": len(self.hourly), "hour_before": len(self.hourly), "still": 3,
            "mean": compared, "variance": compared, "count": compared, "trend": self.book.comparison.trend_windows,
            # Last, so that nothing is written for rules that do not hold.
            "since": rules, "held": rules, "seen": rules, "value": rules, "which": rules,
        }  # fmt: skip
        slices, at = {}, 0
        for name, width in widths.items():
            slices[name] = slice(at, at + width)
            at += width
        return Layout(width=at, **slices)

    def _fingerprint(self) -> str:
        """Digest of what the columns of a state mean; not of limits, which may change under a running state."""
        rules = [[rule.name, [_identity(clause) for clause in rule.clauses]] for rule in self.rules]
        trend = self.book.comparison.trend_windows
        parts = [field.name for field in fields(Layout)]
        text = msgspec.json.encode([self.window, self.carried, self.compared, trend, rules, parts])
        return hashlib.sha256(text).hexdigest()[:12]


def _identity(clause: Clause) -> list[object]:
    return [clause.field, clause.statistic, clause.compare, clause.bits, clause.above is None]


def moment(microseconds: int) -> datetime:
    """Return a time that is so long after 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds(moment: datetime) -> int:
    """Return how long after 1970 a time is."""
    return (moment - _EPOCH) // timedelta(microseconds=1)
