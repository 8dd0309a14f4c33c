"""The completion ledger of one partition: which offset may be committed.

It knows offsets and sizes, never records, threads or Kafka. The one invariant: `committable` never
passes a record that was opened and is not finished, in whatever order records finish.
"""

from collections import deque


class PartitionLedger:
    """Open and finished records of one partition during one ownership of it.

    Not thread-safe. Offsets are opened in increasing order; gaps (transaction markers, compaction) are
    normal, because only records that exist are opened.
    """

    def __init__(self) -> None:
        self._order: deque[int] = deque()  # opened, not yet released; increasing
        self._open_bytes: dict[int, int] = {}  # opened, not yet finished
        self._position: int | None = None
        self._last_opened = -1
        self._committable: int | None = None
        self.open_bytes = 0

    @property
    def open_records(self) -> int:
        """Records opened and not finished."""
        return len(self._open_bytes)

    @property
    def waiting_records(self) -> int:
        """Records finished but behind an elder one that is open."""
        return len(self._order) - len(self._open_bytes)

    @property
    def committable(self) -> int | None:
        """The next offset to read after a crash, or None while nothing is known to be finished."""
        if not self._order and self._position is not None:
            return self._position
        return self._committable

    @property
    def next_offset(self) -> int:
        """The offset after everything that was opened or passed by fetching; 0 before the first fetch."""
        return max(self._last_opened + 1, self._position or 0)

    def open(self, offset: int, size_bytes: int) -> bool:
        """Enter a record; False if it is not newer than the last one opened (delivered twice)."""
        if offset <= self._last_opened:
            return False
        self._last_opened = offset
        self._order.append(offset)
        self._open_bytes[offset] = size_bytes
        self.open_bytes += size_bytes
        if self._committable is None:
            self._committable = offset
        return True

    def advance(self, position: int) -> None:
        """Note the fetch position after every record below it has been opened.

        With nothing open this is committed, so that markers at the end leave no lag.
        """
        if position > self._last_opened and (self._position is None or position > self._position):
            self._position = position

    def finish(self, offset: int) -> bool:
        """Note that everything the record causes is durable; False if it is not open."""
        size_bytes = self._open_bytes.pop(offset, None)
        if size_bytes is None:
            return False
        self.open_bytes -= size_bytes
        while self._order and self._order[0] not in self._open_bytes:
            self._committable = self._order.popleft() + 1
        if self._order:
            # Offsets that hold no record (markers) lie between: the next record is where reading goes on.
            self._committable = self._order[0]
        return True
