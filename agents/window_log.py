"""What `watch` writes to and reads back from its partition of the windows.

Every record says from which offset on the latest window of each key that is still watched can be found, so that
a new owner reads no more than that. A window of several records counts once all its parts are there.
"""

from collections.abc import Callable, Container, Iterator

import msgspec

from pipeline import logs, telemetry
from pipeline.errors import ContractError
from pipeline.events import Outgoing, Record
from pipeline.readers import read_from
from pipeline.settings import Settings
from pipeline.telemetry import Windows

log = logs.get(__name__)

READ_FROM = "millrace-read-from"
# GPUs of one record: with every field, state and a few conditions each takes up to 20 kB of the topic's 8 MiB.
MAX_GPUS = 200
# How many records of the end are searched for the header; somebody else may have published without it.
TAIL_RECORDS = 32
# Read back where no record has it.
BLIND_RECORDS = 2000


class WindowLog:
    """One partition of `gpu.windows.v1`, as its one writer knows it."""

    def __init__(self, end: int) -> None:
        self._end = end
        #: Where the latest window of a key begins.
        self._offsets: dict[str, int] = {}
        self._latest: dict[str, list[Windows]] = {}
        self._begun: dict[str, list[Windows]] = {}
        self._begun_at: dict[str, int] = {}

    @property
    def keys(self) -> int:
        """Number of keys whose latest window is known."""
        return len(self._offsets)

    def take_windows(self) -> list[Windows]:
        """Return the latest complete window of every key, once."""
        latest, self._latest, self._begun = self._latest, {}, {}
        return [part for parts in latest.values() for part in parts]

    def read(self, record: Record) -> None:
        """Note a record that is in the partition."""
        self._end = record.offset + 1
        try:
            windows = telemetry.decode_windows(record)
        except ContractError as error:
            log.warning("passing by what is no window", offset=record.offset, error=error.message)
            return
        if windows.is_event:
            return
        known = self._latest.get(windows.key)
        if known is not None and windows.end <= known[0].end:
            return  # a repeat
        parts = self._begun.setdefault(windows.key, [])
        if parts and (parts[0].end != windows.end or windows.part != len(parts)):
            parts.clear()  # its writer ended in between, and the next one began anew
        if windows.part != len(parts):
            return
        if not parts:
            self._begun_at[windows.key] = record.offset
        parts.append(windows)
        if len(parts) == windows.parts:
            self._latest[windows.key] = self._begun.pop(windows.key)
            self._offsets[windows.key] = self._begun_at.pop(windows.key)

    def outgoing(
        self, windows: Windows, watched: Container[str], max_gpus: int = MAX_GPUS
    ) -> Iterator[tuple[Windows, Outgoing]]:
        """Yield the parts of a window with their records; begun again with fewer GPUs each, the last try counts."""
        if not windows.is_event:
            self._offsets.setdefault(windows.key, self._end)
        self._offsets = {key: offset for key, offset in self._offsets.items() if key in watched}
        read_from = min(self._offsets.values(), default=self._end)
        for part in _parts(windows, max_gpus):
            outgoing = telemetry.encode_windows(part)
            headers = (*outgoing.headers, (READ_FROM, b"%d" % read_from))
            yield part, Outgoing(outgoing.key, outgoing.value, headers)

    def published(self, windows: Windows, offset: int) -> None:
        """Note that the broker has all of a window, of which the first record is at `offset`; -1: it forgot."""
        if offset >= 0:
            self._end = max(self._end, offset + 1)
            if not windows.is_event:
                self._offsets[windows.key] = offset


async def read_windows(settings: Settings, topic: str, partition: int) -> WindowLog:
    """Read what is needed of a partition to go on where its last writer ended.

    Raises:
        DependencyError: no broker answers, or the partition is missing.
    """
    ends: list[int] = []

    def tail(beginning: int, end: int) -> int:
        ends.append(end)
        return max(beginning, end - TAIL_RECORDS)

    first = max(0, await _read_from(settings, topic, partition, tail))
    found = WindowLog(ends[0])
    async for record in read_from(
        settings, topic, partition, lambda beginning, end: max(beginning, min(first, end))
    ):
        found.read(record)
    log.info("read windows back", partition=partition, first=first, end=ends[0], keys=found.keys)
    return found


async def _read_from(settings: Settings, topic: str, partition: int, tail: Callable[[int, int], int]) -> int:
    """Return what the last record with the header says; without any, a little before the end."""
    first = None
    offset = 0
    async for record in read_from(settings, topic, partition, tail):
        offset = record.offset
        header = record.header(READ_FROM)
        if header is not None and header.isdigit():
            first = int(header)
    return offset - BLIND_RECORDS if first is None else first


def _parts(windows: Windows, max_gpus: int) -> Iterator[Windows]:
    """Split a window that is too large for one record."""
    if len(windows.gpus) <= max_gpus:
        yield windows
        return
    parts = [windows.gpus[at : at + max_gpus] for at in range(0, len(windows.gpus), max_gpus)]
    for number, gpus in enumerate(parts):
        yield msgspec.structs.replace(windows, gpus=gpus, part=number, parts=len(parts))
