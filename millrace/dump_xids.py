"""XID errors of a dump: a count that grew, or a gauge of the last code that changed; no I/O.

Give it the moments of a GPU in order of time. What a dump begins with is not news; a gauge that comes up later is:
some exporters show it only once there was an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COUNT = "DCGM_EXP_XID_ERRORS_COUNT"
MAX_CODE = 100_000
# Of one code at one moment; more tells nobody anything.
_MAX_REPEATS = 100


@dataclass(slots=True)
class GpuXids:
    """What one GPU showed so far."""

    _counts: dict[int, int] = field(default_factory=dict)
    #: By code: what was scraped together with its count.
    _beside: dict[int, frozenset[str]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    #: A whole scrape has passed: something came twice. Parts of one scrape may have moments of their own.
    _again: bool = False
    _last: float | None = None

    def step(self, values: Mapping[str, float], counts: Mapping[int, int]) -> tuple[int, ...]:
        """Return the errors since the moment before, given all of this one."""
        found: list[int] = []
        if counts or self._counts:
            found += self._grown(values, counts)
        self._again = self._again or not self._seen.isdisjoint(values)
        self._seen.update(values)
        if counts:
            self._seen.add(COUNT)
        last = values.get("last_xid")
        if last is not None:
            # Where there are counts they tell the same, and repeats, too.
            before = self._last if self._last is not None or not self._again else 0.0
            if before is not None and last != before and last and int(last) not in self._counts:
                found.append(int(last))
            self._last = last
        return tuple(found)

    def _grown(self, values: Mapping[str, float], counts: Mapping[int, int]) -> list[int]:
        names = frozenset((*values, COUNT) if counts else values)
        for code in self._counts.keys() - counts.keys():
            # Scraped again without it: the exporter's window has passed.
            if names & self._beside[code]:
                self._counts[code] = 0
        # A code that comes up in a later scrape was not counted before.
        is_later = not names.isdisjoint(self._seen)
        found = []
        for code, count in counts.items():
            before = self._counts.get(code, 0 if is_later else count)
            found += [code] * min(max(0, count - before), _MAX_REPEATS)
            self._counts[code] = count
            self._beside[code] = names
        return found
