"""Dumps in any order, from files and pipes: the same moments as those of a dump in order of time."""

import gzip
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from pathlib import Path

import pytest

from millrace.dump_files import DumpFile
from millrace.dump_sort import SortedValues, rows_behind
from millrace.dumps import Dump, Moment
from pipeline.errors import ContractError, MillraceError
from tests.support.dumps import COLUMNS, Value, piped, series, values, write

LOOKAHEAD = 100
Order = Callable[[list[Value]], list[Value]]


def by_time(rows: list[Value]) -> list[Value]:
    return sorted(rows, key=lambda row: row.time)


def appended(rows: list[Value]) -> list[Value]:
    """Two dumps of the same time, one after the other."""
    return [*by_time(rows[:600]), *by_time(rows[600:])]


def shuffled(rows: list[Value]) -> list[Value]:
    return random.Random(3).sample(rows, len(rows))


def said(moments: Iterator[Moment]) -> list[object]:
    """Return what moments say, in their order."""
    return [
        (moment.time, host, gpu, sorted(reading.values.items()), reading.gpu, reading.xids)
        for moment in moments
        for host, gpus in sorted(moment.hosts.items())
        for gpu, reading in sorted(gpus.items())
    ]


@contextmanager
def opened(path: Path, lookahead_rows: int = LOOKAHEAD) -> Iterator[Dump]:
    dump = Dump(DumpFile(path), lookahead_rows=lookahead_rows)
    try:
        yield dump
    finally:
        dump.close()


def in_order(folder: Path, rows: list[Value]) -> list[object]:
    """Return what moments of these rows say when they lie in order of time."""
    with opened(write(folder / "in order.csv", [row.row() for row in by_time(rows)])) as dump:
        assert dump.seems_in_order()
        return said(dump.moments())


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        *((kind, order) for kind in ("plain", "gzipped") for order in (list, appended, shuffled)),
        ("pipe", list),
        ("pipe", shuffled),
    ],
)
def test_any_order_gives_the_same_moments(tmp_path: Path, kind: str, order: Order) -> None:
    """A dump whose rows are far from the order of time is told apart, sorted, and loses nothing, in every round."""
    rows = series()
    expected = in_order(tmp_path, rows)
    path = write(tmp_path / "dump.csv", [row.row() for row in order(rows)])
    if kind == "gzipped":
        path.write_bytes(gzip.compress(path.read_bytes()))
    with piped(path.read_bytes()) as pipe, opened(pipe if kind == "pipe" else path) as dump:
        assert not dump.seems_in_order()
        counted: list[int] = []
        dump.sort(counted.append)
        assert said(dump.moments()) == expected
        assert said(dump.moments()) == expected
        assert (sum(counted), dump.rows, dump.rejects.counts) == (len(rows), len(rows), {})


def test_a_pipe_that_falls_back_late(tmp_path: Path) -> None:
    """Of a pipe only the first rows can be looked at: what comes too late is counted, unless it is sorted."""
    rows = series()
    expected = in_order(tmp_path, rows)
    text = write(tmp_path / "dump.csv", [row.row() for row in appended(rows)]).read_bytes()
    with piped(text) as pipe, opened(pipe) as dump:
        assert dump.seems_in_order()
        values = sum(moment.rows for moment in dump.moments())
        assert (values + dump.past, dump.rejects.rows) == (len(rows), dump.past)
        assert dump.past > 400
        assert list(dump.moments()) == []
    with piped(gzip.compress(text)) as pipe, opened(pipe) as dump:
        dump.sort(lambda more: None)
        assert said(dump.moments()) == expected


def test_what_the_lookahead_mends_is_not_sorted(tmp_path: Path) -> None:
    """Rows that are less out of order than the lookahead are streamed, and none is lost."""
    rows = series()
    nearly = by_time(rows)
    for begin in range(0, len(nearly), 40):
        nearly[begin : begin + 40] = reversed(nearly[begin : begin + 40])
    expected = in_order(tmp_path, rows)
    text = write(tmp_path / "dump.csv", [row.row() for row in nearly]).read_bytes()
    with piped(text) as pipe, opened(pipe) as from_pipe, opened(tmp_path / "dump.csv") as from_file:
        for dump in (from_pipe, from_file):
            assert dump.seems_in_order()
            assert said(dump.moments()) == expected
            assert dump.rejects.counts == {}


def test_the_look_at_a_few_rows(tmp_path: Path) -> None:
    """With a limit only the rows up to it are looked at, and sorted."""
    rows = appended(series())
    path = write(tmp_path / "dump.csv", [row.row() for row in rows])
    dump = Dump(DumpFile(path), limit=400, lookahead_rows=LOOKAHEAD)
    assert dump.seems_in_order()
    dump.sort(lambda more: None)
    assert said(dump.moments()) == in_order(tmp_path, rows[:400])
    dump.close()


def test_how_far_a_time_is_behind() -> None:
    """What counts is before which time the most later ones stand."""
    begin = values(gpus=1)[0].time
    for given, expected in (([], 0), ([1, 2, 2, 3], 0), ([1, 3, 2, 4], 1), ([5, 6, 7, 1, 8, 7], 3)):
        assert rows_behind([begin + timedelta(seconds=second) for second in given]) == expected


def test_a_full_disk(tmp_path: Path) -> None:
    """What does not fit into memory is in a file without a name; without room for it the error says where."""
    with opened(write(tmp_path / "dump.csv", [row.row() for row in series()])) as dump:
        many = list(dump._read_all()) * 10
    room = SortedValues(memory_kibibytes=64)
    room.add(many, lambda more: None)
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert any("etilqs_" in link and link.endswith(" (deleted)") for link in links)
    assert len(list(room.values())) == len(many)
    none = SortedValues(memory_kibibytes=64)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(MillraceError, match=r"cannot sort the dump: .* TMPDIR"):
            none.add(many, lambda more: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    room.close()
    none.close()


def test_what_waits_or_sorts_can_be_ended(tmp_path: Path) -> None:
    """Ctrl-C ends a thread that waits for a pipe, and one that sorts."""
    reader, writer = os.pipe()
    file = DumpFile(Path(f"/dev/fd/{reader}"))
    errors: list[str] = []

    def wait() -> None:
        with pytest.raises(ContractError, match="no column timestamp") as error:
            Dump(file)
        errors.append(error.value.message)

    waiting = threading.Thread(target=wait)
    waiting.start()
    file.stop()
    waiting.join(10)
    assert errors
    os.close(reader)
    os.close(writer)

    with opened(write(tmp_path / "dump.csv", [values(gpus=1)[0].row()])) as dump:
        value = next(dump._read_all())
    endless, began = SortedValues(), threading.Event()
    sorting = threading.Thread(target=endless.add, args=(repeat(value), lambda more: began.set()))
    sorting.start()
    assert began.wait(10)
    endless.close()
    sorting.join(10)
    assert not sorting.is_alive()
    assert list(endless.values()) == []


def test_joined_files(tmp_path: Path) -> None:
    """Files that were joined, each with its header, columns in an order of its own, are one dump."""
    rows = [row.row() for row in values(gpus=3)]
    odd = tuple(reversed(COLUMNS))
    parts = [write(tmp_path / "1.csv", rows[:10]), write(tmp_path / "2.csv", rows[10:20], odd)]
    parts.append(write(tmp_path / "3.csv", rows[20:], (*COLUMNS, "rack")))
    whole = tmp_path / "dump.csv"
    whole.write_bytes(b"".join(b"\xef\xbb\xbf" + part.read_bytes() for part in parts))
    with opened(whole) as dump:
        found = said(dump.moments())
        assert (dump.rows, dump.rejects.counts) == (len(rows), {})
        assert said(dump.moments()) == found
    with opened(write(tmp_path / "one.csv", rows)) as dump:
        assert found == said(dump.moments())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace(b",", b";"), "line 1: columns are separated by ';'"),
        (lambda text: text.replace(b",", b"\t"), r"line 1: columns are separated by '\\t'"),
        (lambda text: text.decode().encode("utf-16"), "UTF-16, and not UTF-8 text"),
        (lambda text: text.replace(b"timestamp", b"time"), "line 1: no column timestamp"),
        (lambda text: text.replace(b"uuid", b"value"), "line 1: the column 'value' twice"),
        (lambda text: b"", "line 1: no column timestamp, metric_name, value"),
        (lambda text: gzip.compress(text)[:12], "no CSV that can be read"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, change: Callable[[bytes], bytes], reason: str) -> None:
    """A file in another format is refused with its name and what is wrong."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=1)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ContractError, match=f"^{path}(, |: ){reason}"):
        Dump(DumpFile(path))


@pytest.mark.parametrize("ends", [b"\r\n", b"\n", b"\r"])
def test_ends_of_lines_and_exponents(tmp_path: Path, ends: bytes) -> None:
    """Any end of a line will do, and any way to write a number; lines are counted as an editor counts them."""
    rows = [row.row() | {"value": "1.25e+01"} for row in values(gpus=3)]
    rows[4]["value"] = "1,5"
    path = write(tmp_path / "dump.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", ends))
    with opened(path) as dump:
        found = {
            v
            for moment in dump.moments()
            for host in moment.hosts.values()
            for r in host.values()
            for v in r.values.values()
        }
        assert found == {12.5}
        assert dump.rejects.lines == {"the value is not a number": [6]}
