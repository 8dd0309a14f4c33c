"""Careful mode: how a record that kills its worker is found, and stopped, across deaths.

The only memory that survives a death is Kafka's, so each partition's state travels in the metadata of its
committed offset:

    ""                       the last owner handed over in good order
    "assigned X"             an owner began at offset X and has committed nothing past it
    "careful X N U"          records before U are read alone; the one at X was started alone N times
    "alone S N U X"          the same for the record at S, while records from X on are held (`Delivered.buffer`);
                             N is 0 while nothing is suspected: if this owner dies, records from S to U are

A partition assigned again with "assigned X" and still at X has seen an owner die on the spot: its next
records are suspects and read one at a time, the attempt written down before it starts. Pure.
"""

from dataclasses import dataclass

# Suspects per partition after a death. The guilty record was among the first that were in flight, so it is
# near the head; if it is not among these, the next death finds it after them.
MAX_SUSPECTS = 64
# A record is not opened again after so many deaths with it alone in flight: one may be the machine's fault.
MAX_LONE_DEATHS = 3
# While suspects and healthy records both wait they take turns: the suspects more, for they end the crashes.
CAREFUL_TURN_SECONDS = 1.0
HEALTHY_TURN_SECONDS = 0.5


@dataclass(frozen=True)
class Mark:
    """What the commit metadata of one partition says, seen by its new owner."""

    offset: int = -1  # of the suspect whose attempts are counted
    attempts: int = 0
    until: int = -1  # suspects end here
    first: int = -1  # suspects began here in this ownership

    @classmethod
    def read(cls, metadata: str, committed: int | None, end: int) -> "Mark":
        """Read the metadata of a committed offset; anything unreadable means good order.

        `end` is the partition's end now: a record that arrives later was not in flight at any death.
        """
        try:
            kind, *numbers = metadata.split()
            values = [int(number) for number in numbers]
        except ValueError:
            return cls()
        if kind == "alone" and len(values) == 4 and values[3] == committed:
            return cls(values[0], values[1], values[2], values[0])
        if not values or values[0] != committed:
            return cls()
        if kind == "assigned" and len(values) == 1:
            return cls(values[0], 0, min(values[0] + MAX_SUSPECTS, end), values[0])
        if kind == "careful" and len(values) == 3:
            return cls(values[0], values[1], values[2], values[0])
        return cls()

    def suspects(self, offset: int) -> bool:
        """Whether the record at `offset` must be read alone."""
        return self.first <= offset < self.until

    def is_condemned(self, offset: int) -> bool:
        """Whether the record has killed its worker too often to be opened again."""
        return offset == self.offset and self.attempts >= MAX_LONE_DEATHS

    def attempt(self, offset: int) -> "Mark":
        """Return the mark to write before the record at `offset` starts alone."""
        attempts = self.attempts + 1 if offset == self.offset else 1
        return Mark(offset, attempts, self.until, self.first)

    def survived(self) -> "Mark":
        """Return the mark after an ownership that ended in good order before the attempt finished."""
        return Mark(self.offset, max(0, self.attempts - 1), self.until, self.first)

    def beyond(self) -> "Mark":
        """Return the mark once all suspects are held: what follows is suspected after the next death, not now."""
        end = self.until + MAX_SUSPECTS
        return Mark(self.until, 0, end, end)

    def at_start(self, offset: int) -> str:
        """Metadata to commit when an ownership begins at `offset`."""
        return self.at_commit(offset) or f"assigned {offset}"

    def at_commit(self, offset: int) -> str:
        """Metadata to commit with a finished `offset`: suspects that are left stay suspects."""
        if offset < self.offset < self.until:
            return f"alone {self.offset} {self.attempts} {self.until} {offset}"
        if not self.suspects(offset):
            return ""
        return f"careful {offset} {self.attempts if offset == self.offset else 0} {self.until}"
