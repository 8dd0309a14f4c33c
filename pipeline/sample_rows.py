"""Samples as rows of `gpu_samples`: which columns a batch fills, which days and minutes it touches. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec

from pipeline import dcgm
from pipeline.telemetry import Sample, Samples

#: Columns that every batch fills, before those of the fields that it has.
KEY_COLUMNS = ("gpu_id", "time")
_EXTRA_COLUMNS = ("lost", "source_time", "xids", "other")
_OURS = frozenset(dcgm.NAMES)

Row = tuple[Any, ...]


class SampleRows:
    """Rows for `COPY`, by day."""

    def __init__(self, batch: Sequence[Samples], gpu_ids: Mapping[str, int]) -> None:
        """Take samples, and the ids of all their GPUs."""
        present: set[str] = set().union(*(sample.values for samples in batch for sample in samples.samples))
        #: Only what the batch has: a column that is not named is NULL, and costs nothing.
        self.fields = [name for name in dcgm.NAMES if name in present]
        self.columns = (*KEY_COLUMNS, *_EXTRA_COLUMNS, *self.fields)
        self.by_day: dict[date, list[Row]] = defaultdict(list)
        #: The GPUs whose roll-up of a minute changes.
        self.minutes: dict[datetime, set[int]] = defaultdict(set)
        self.count = 0
        self._has_unknown = not present <= _OURS
        self._gpu_ids = gpu_ids
        for samples in batch:
            self._add(samples.samples)

    def _add(self, samples: Sequence[Sample]) -> None:
        times = [sample.time for sample in samples]
        minute = _minute(min(times))
        if _minute(max(times)) == minute:  # one publish interval of a host: nearly always
            self._add_of_minute(samples, minute)
            return
        by_minute: dict[datetime, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_minute[_minute(sample.time)].append(sample)
        for minute, some in by_minute.items():
            self._add_of_minute(some, minute)

    def _add_of_minute(self, samples: Sequence[Sample], minute: datetime) -> None:
        ids, fields = self._gpu_ids, self.fields
        other = _unknown if self._has_unknown else _nothing
        self.by_day[minute.date()].extend(
            (
                ids[sample.gpu_uuid], sample.time, sample.state == "lost", _plausible(sample.source_time),
                sample.xids or None, other(sample.values), *map(sample.values.get, fields),
            )
            for sample in samples
        )  # fmt: skip
        self.minutes[minute].update([ids[sample.gpu_uuid] for sample in samples])
        self.count += len(samples)


def merged(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Make one row of those with the same GPU and time, and count those that say something else.

    Of each column the first value counts.
    """
    first: dict[Any, Row] = {}
    conflicts = 0
    for row in rows:
        known = first.get(row[:2])
        if known is None:
            first[row[:2]] = row
            continue
        pairs = list(zip(known, row, strict=True))
        conflicts += any(old != new for old, new in pairs if old is not None and new is not None)
        first[row[:2]] = tuple(new if old is None else old for old, new in pairs)
    return list(first.values()), conflicts


def _minute(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(second=0, microsecond=0)


def _plausible(time: datetime | None) -> datetime | None:
    # PostgreSQL's driver computes in UTC, where the first and last years of the calendar have no place.
    return time if time is not None and 1 < time.year < 9999 else None


def _nothing(values: Mapping[str, float]) -> None:
    return None


def _unknown(values: Mapping[str, float]) -> str | None:
    """Return the fields that are not ours as JSON."""
    other = {name: value for name, value in values.items() if name not in _OURS}
    return msgspec.json.encode(other).decode() if other else None
