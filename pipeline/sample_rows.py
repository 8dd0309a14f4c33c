"""Samples as rows of `gpu_samples`: which columns a batch fills, which days and minutes it touches. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import chain
from operator import itemgetter
from typing import Any

import msgspec

from pipeline import dcgm
from pipeline.plain_samples import AnySamples, PlainSample, PlainSamples
from pipeline.telemetry import Sample, Samples

#: Columns that every batch fills, before those of the fields that it has.
KEY_COLUMNS = ("gpu_id", "time")
_EXTRA_COLUMNS = ("lost", "source_time", "xids", "other")
_OURS = frozenset(dcgm.NAMES)

Row = tuple[Any, ...]
Columns = tuple[str, ...]


class SampleRows:
    """Rows for `COPY`, by day."""

    def __init__(self, batch: Sequence[AnySamples], gpu_ids: Mapping[str, int]) -> None:
        """Take samples, and the ids of all their GPUs."""
        odd = [samples for samples in batch if isinstance(samples, Samples)]
        present: set[str] = set().union(*(sample.values for samples in odd for sample in samples.samples))
        # Only what these have: a column that is not named is NULL, and costs nothing.
        self._fields = tuple(name for name in dcgm.NAMES if name in present)
        self._has_unknown = not present <= _OURS
        # In the order of the batch: runs of rows with the same columns.
        self._by_day: dict[date, list[tuple[Columns, list[Row]]]] = defaultdict(list)
        #: The GPUs whose roll-up of a minute changes.
        self.minutes: dict[datetime, set[int]] = defaultdict(set)
        self.count = 0
        self._gpu_ids = gpu_ids
        for samples in batch:
            self._add(samples)

    @property
    def days(self) -> Iterable[date]:
        """Of which there are rows."""
        return self._by_day.keys()

    def by_columns(self) -> Iterator[tuple[date, Columns, list[Row]]]:
        """Yield all rows, together those of a day that have the same columns."""
        for day, runs in self._by_day.items():
            alike: dict[Columns, list[list[Row]]] = defaultdict(list)
            for columns, rows in runs:
                alike[columns].append(rows)
            for columns, parts in alike.items():
                yield day, columns, parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))

    def in_order(self) -> Iterator[tuple[date, Columns, list[Row]]]:
        """Yield all rows by day, in the order of the batch: each with all columns of its day."""
        for day, runs in self._by_day.items():
            present = {name for columns, _ in runs for name in columns}
            everything = _columns(tuple(name for name in dcgm.NAMES if name in present))
            yield day, everything, [row for run in runs for row in _widened(*run, everything)]

    def _add(self, samples: AnySamples) -> None:
        if isinstance(samples, PlainSamples):
            earliest, latest = samples.earliest, samples.latest
        else:
            times = [sample.time for sample in samples.samples]
            earliest, latest = min(times), max(times)
        minute = _minute(earliest)
        if _minute(latest) == minute:  # one publish interval of a host: nearly always
            self._add_of_minute(samples, samples.samples, minute)
            return
        by_minute: dict[datetime, list[Any]] = defaultdict(list)
        for sample in samples.samples:
            by_minute[_minute(sample.time)].append(sample)
        for minute, some in by_minute.items():
            self._add_of_minute(samples, some, minute)

    def _add_of_minute(self, samples: AnySamples, some: Sequence[Any], minute: datetime) -> None:
        if isinstance(samples, PlainSamples):
            columns, rows = _columns(samples.fields), self._plain_rows(some, len(samples.fields))
        else:
            columns, rows = _columns(self._fields), self._rows(some)
        runs = self._by_day[minute.date()]
        if runs and runs[-1][0] == columns:
            runs[-1][1].extend(rows)
        else:
            runs.append((columns, rows))
        self.minutes[minute].update([row[0] for row in rows])
        self.count += len(rows)

    def _rows(self, samples: Sequence[Sample]) -> list[Row]:
        ids, fields = self._gpu_ids, self._fields
        other = _unknown if self._has_unknown else _nothing
        return [
            (
                ids[sample.gpu_uuid], sample.time, sample.state == "lost", _plausible(sample.source_time),
                sample.xids or None, other(sample.values), *map(sample.values.get, fields),
            )
            for sample in samples
        ]  # fmt: skip

    def _plain_rows(self, samples: Sequence[PlainSample[msgspec.Struct]], width: int) -> list[Row]:
        ids, values_of, absent = self._gpu_ids, msgspec.structs.astuple, (None,) * width
        return [
            (
                ids[sample.gpu_uuid], sample.time, sample.state == "lost",
                sample.source_time and _plausible(sample.source_time), sample.xids or None, None,
                *(absent if sample.values is None else values_of(sample.values)),
            )
            for sample in samples
        ]  # fmt: skip


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


def _columns(fields: Columns) -> Columns:
    return (*KEY_COLUMNS, *_EXTRA_COLUMNS, *fields)


def _widened(columns: Columns, rows: list[Row], wanted: Columns) -> list[Row]:
    """Give rows other columns, in which those that they have not are NULL."""
    if columns == wanted:
        return rows
    place = {name: number for number, name in enumerate(columns)}
    pick = itemgetter(*(place.get(name, len(columns)) for name in wanted))
    return [pick((*row, None)) for row in rows]


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
