"""The GPUs that share a record key: who they are, their open windows, and what is remembered of each.

Rows only grow while a worker owns the key, so that a row means the same GPU in every chunk; a GPU that stays away
is let go and gets a new row when it comes back.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline import telemetry
from pipeline.detection.aggregates import Chunk
from pipeline.detection.plan import MICROSECONDS, Plan

# GPUs of one key; more are not looked at. A pass over so many takes some hundred MB.
MAX_GPUS = 20_000
# Codes of XID errors that hold for one GPU at once; a sane driver knows fewer at a time.
MAX_HELD = 64
# A label with one of these names says that somebody uses the GPU.
_USERS = ("container", "pod", "job", "hpc_job", "slurm_job_id")


@dataclass(frozen=True, slots=True, order=True)
class XidEvent:
    """An XID error of a GPU; ordered by time."""

    time: int
    row: int
    code: int


@dataclass(eq=False)
class OpenWindow:
    """Samples of one key whose window has not closed."""

    start: int
    chunks: list[Chunk] = field(default_factory=list)
    samples: int = 0
    #: Whose records they are, in order of arrival.
    tokens: dict[Hashable, None] = field(default_factory=dict)
    xids: list[XidEvent] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)  # (row, time)


@dataclass(frozen=True)
class Member:
    """What is known of a GPU."""

    gpu_uuid: str
    host: str
    index: int | None = None
    model: str | None = None
    is_instance: bool = False
    is_assigned: bool = False


class Roster:
    """One key."""

    def __init__(self, plan: Plan, key: str) -> None:
        self.key = key
        self.plan = plan
        self.members: list[Member | None] = []
        self.row_of: dict[str, int] = {}
        self.hosts: list[int] = []
        self.state: NDArray[np.float64] = np.empty((0, plan.layout.width))
        self.last_seen: NDArray[np.int64] = np.empty(0, np.int64)
        #: Of a GPU whose state was read back 0: it was there before.
        self.first_seen: NDArray[np.int64] = np.empty(0, np.int64)
        #: Of a row: since and until when an XID's condition holds, by code.
        self.xids: dict[int, dict[int, tuple[int, int]]] = {}
        self.open: dict[int, OpenWindow] = {}
        #: Windows that take no more samples and are not scored yet, in their order.
        self.closing: list[OpenWindow] = []
        self.closed_until: int | None = None
        self.watermark: int | None = None
        self._host_numbers: dict[str, int] = {}

    def host_number(self, host: str) -> int:
        """Return a small number for a host."""
        return self._host_numbers.setdefault(host, len(self._host_numbers))

    def refused(self, uuids: Iterable[str]) -> set[str]:
        """Return the GPUs for which there is no room."""
        fresh = dict.fromkeys(uuid for uuid in uuids if uuid not in self.row_of)
        return set(list(fresh)[max(0, MAX_GPUS - len(self.row_of)) :])

    def rows(self, uuids: Iterable[str], host: str, time: int) -> NDArray[np.int64]:
        """Return the rows of GPUs, new ones for those that were not seen before."""
        uuids = list(uuids)
        try:
            return np.array([self.row_of[uuid] for uuid in uuids], np.int64)
        except KeyError:
            fresh = dict.fromkeys(uuid for uuid in uuids if uuid not in self.row_of)
            self.add([Member(uuid, host) for uuid in fresh], time, time)
        return np.array([self.row_of[uuid] for uuid in uuids], np.int64)

    def add(self, members: list[Member], last_seen: int, first_seen: int = 0) -> None:
        """Give members rows with nothing remembered."""
        for member in members:
            self.row_of[member.gpu_uuid] = len(self.members)
            self.members.append(member)
            self.hosts.append(self.host_number(member.host))
        empty = np.full((len(members), self.plan.layout.width), np.nan)
        self.state = np.vstack([self.state, empty])
        self.last_seen = np.r_[self.last_seen, np.full(len(members), last_seen, np.int64)]
        self.first_seen = np.r_[self.first_seen, np.full(len(members), first_seen, np.int64)]

    def describe(self, gpus: Iterable[telemetry.Gpu]) -> None:
        """Note what a publisher says of GPUs; of those that were seen."""
        for gpu in gpus:
            row = self.row_of.get(gpu.gpu_uuid)
            known = None if row is None else self.members[row]
            if row is None or known is None:
                continue
            self.members[row] = Member(
                gpu.gpu_uuid, known.host,
                known.index if gpu.index is None else gpu.index,
                gpu.model or known.model,
                gpu.parent_uuid is not None or known.is_instance,
                any(gpu.labels.get(name) for name in _USERS),
            )  # fmt: skip

    def move(self, row: int, host: str) -> None:
        """Note that a GPU is on another host now."""
        member = self.members[row]
        assert member is not None
        self.members[row] = Member(
            member.gpu_uuid, host, member.index, member.model, member.is_instance, member.is_assigned
        )
        self.hosts[row] = self.host_number(host)

    def hold(self, events: Iterable[XidEvent]) -> None:
        """Let XID errors hold from their time on; one that holds already holds longer."""
        table = self.plan.book.xids
        for event in sorted(events):
            if not table.find(event.code).benign:
                held = self.xids.setdefault(event.row, {})
                if event.code not in held and len(held) >= MAX_HELD:
                    continue
                held[event.code] = _extended(held.get(event.code), event.time, table.hold(event.code))

    def holding(self, end: int) -> dict[int, dict[int, tuple[int, int]]]:
        """Return what XIDs hold at a window's end, by row and code; those that are over are let go."""
        for row, held in list(self.xids.items()):
            self.xids[row] = {code: span for code, span in held.items() if span[1] > end}
            if not self.xids[row]:
                del self.xids[row]
        return {row: dict(held) for row, held in self.xids.items()}

    def since(self, row: int, code: int, time: int) -> int:
        """Say since when an XID holds that comes at a moment, after those that came before it."""
        table = self.plan.book.xids
        span = self.xids.get(row, {}).get(code)
        windows = (*self.closing, *self.open.values())
        waiting = (event for window in windows for event in window.xids)
        for earlier in sorted(event.time for event in waiting if (event.row, event.code) == (row, code)):
            if earlier <= time:
                span = _extended(span, earlier, table.hold(code))
        return _extended(span, time, table.hold(code))[0]

    def anew(self) -> "Roster":
        """Return a roster without GPUs that goes on at the same time; this one may have windows to be scored."""
        fresh = Roster(self.plan, self.key)
        fresh.closed_until, fresh.watermark = self.closed_until, self.watermark
        return fresh

    def forget(self, before: int) -> list[Member]:
        """Let go of GPUs that were last seen before a moment, and return them."""
        gone = []
        for row in np.flatnonzero(self.last_seen < before):
            member = self.members[row]
            if member is not None:
                self.members[row] = None
                if self.row_of.get(member.gpu_uuid) == row:
                    gone.append(member)
                    del self.row_of[member.gpu_uuid]
        return gone


def _extended(span: tuple[int, int] | None, time: int, seconds: float) -> tuple[int, int]:
    """Return since and until when an XID holds after it came once more."""
    until = time + round(seconds * MICROSECONDS)
    if span is None or time > span[1]:
        return time, until
    return span[0], max(span[1], until)
