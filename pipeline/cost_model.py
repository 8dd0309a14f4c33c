"""What a forward pass costs, learned while it runs: seconds = a + b * records.

Pure. `a` is what each pass costs whatever its size, `b` what each record adds. Passes of one size vary with
whatever else the machine does, so that sizes are first reduced to medians, and the line is drawn through them
by medians too (Theil-Sen): neither one slow pass nor a size that is seen much more often than the others bends
it.
"""

from collections import deque
from statistics import median

# Passes remembered of each range of sizes (1, 2-3, 4-7, ...): enough for a median, few enough to follow a clock
# that changes.
REMEMBERED = 9


class CostModel:
    """The cost of a pass by its size; zero until something was seen."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        self._pass_seconds = 0.0
        self._record_seconds = 0.0

    @property
    def pass_seconds(self) -> float:
        """What a pass costs whatever its size; 0 while only one size is known."""
        return self._pass_seconds

    @property
    def record_seconds(self) -> float:
        """What a record adds."""
        return self._record_seconds

    def observe(self, records: int, seconds: float) -> None:
        """Learn from a pass that went well."""
        self._seen.setdefault(records.bit_length(), deque(maxlen=REMEMBERED)).append((records, seconds))
        points = [
            (median(size for size, _ in passes), median(spent for _, spent in passes))
            for passes in self._seen.values()
        ]
        slopes = [
            (spent - other_spent) / (size - other_size)
            for index, (size, spent) in enumerate(points)
            for other_size, other_spent in points[:index]
        ]
        if slopes:
            self._record_seconds = max(0.0, median(slopes))
            self._pass_seconds = max(
                0.0, median(spent - self._record_seconds * size for size, spent in points)
            )
        else:  # one size: all of it is taken to be the records', which never makes a record wait
            self._record_seconds = points[0][1] / points[0][0]

    def seconds(self, records: int) -> float:
        """Return what a pass of so many records will cost."""
        return self._pass_seconds + self._record_seconds * records
