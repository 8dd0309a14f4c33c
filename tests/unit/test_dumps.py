"""DCGM dumps: every good value once and unchanged, every bad row left out with its reason and line."""

import gzip
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from millrace import replay
from millrace.dump_files import DumpFile
from millrace.dumps import Dump
from pipeline.errors import ContractError
from tests.support import dumps
from tests.support.dumps import Value, values, write

NOW = datetime(2026, 1, 31, 12, 0, 0, 250_999, tzinfo=UTC)


def read(path: Path, **options: Any) -> tuple[Dump, set[tuple[datetime, str, str, str, float]]]:
    dump = Dump(DumpFile(path), **options)
    found = [
        (moment.time, host, gpu, name, value)
        for moment in dump.moments()
        for host, gpus in moment.hosts.items()
        for gpu, reading in gpus.items()
        for name, value in reading.values.items()
    ]
    assert len(found) == len(set(found))
    return dump, set(found)


def as_read(rows: list[Value]) -> set[tuple[datetime, str, str, str, float]]:
    return {(row.time, row.host, row.gpu_uuid, row.name, row.value) for row in rows}


def test_the_public_layout(tmp_path: Path) -> None:
    """Of a dump of 247 GPUs each value is read, and each GPU is known by what its rows say."""
    rows = values()
    path = write(tmp_path / "dump.csv", [row.row() for row in rows])
    dump, found = read(path)
    assert found == as_read(rows)
    assert (dump.rows, dump.rejects.counts, dump.blanks) == (2470, {}, 0)
    assert (len(dump.gpus), sum(map(len, dump.gpus.values()))) == (31, 247)
    gpu = dump.gpus[rows[9].host][rows[9].gpu_uuid]
    assert (gpu.index, gpu.device, gpu.model, gpu.driver_version) == (
        1, "nvidia1", "NVIDIA H100 80GB HBM3", "535.129.03",
    )  # fmt: skip
    # Prometheus's own `job` and `instance` are not the GPU's: `job` would say that somebody uses it.
    assert gpu.labels == {}


def test_other_spellings_of_the_same(tmp_path: Path) -> None:
    """Order and case of columns, compression, both names of the host, and labels alone make no difference."""
    rows = values(gpus=3)
    plain = [row.row() for row in rows]
    shuffled = write(tmp_path / "shuffled.csv", plain, tuple(reversed(dumps.COLUMNS)))
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(shuffled.read_text().replace("Hostname", "hostname"), "utf-8-sig")
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(shuffled.read_bytes()))
    few = ("timestamp", "metric_name", "value", "labels_raw")
    labelled = write(tmp_path / "labels.csv", [{name: row[name] for name in few} for row in plain], few)
    for path in (shuffled, renamed, zipped, labelled):
        dump, found = read(path)
        assert found == as_read(rows)
        assert dump.rejects.counts == {}
        assert dump.gpus[rows[0].host][rows[0].gpu_uuid].model == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"value": "warm"}, "the value is not a number"),
        ({"value": "nan"}, "the value is not a number"),
        ({"value": "-inf"}, "the value is not a number"),
        ({"value": "1_0"}, "the value is not a number"),
        (
            {"value": "-5", "metric_name": "DCGM_FI_DEV_POWER_USAGE"},
            "the value is below minimum of power_watts",
        ),
        ({"value": "900"}, "the value is above maximum of utilization_percent"),
        ({"timestamp": "yesterday"}, "the timestamp is no time"),
        ({"timestamp": "inf"}, "the timestamp is no time"),
        ({"timestamp": "nan"}, "the timestamp is no time"),
        ({"timestamp": "1e400"}, "the timestamp is no time"),
        ({"timestamp": "-" + "9" * 400}, "the timestamp is no time"),
        ({"timestamp": "1970-01-01T00:00:00Z"}, "the time is far in the past or the future"),
        ({"timestamp": "9999-12-31T00:00:00Z"}, "the time is far in the past or the future"),
        ({"metric_name": "GPU utilisation, %"}, "no name of a metric"),
        ({"uuid": "", "labels_raw": ""}, "no GPU UUID"),
        ({"Hostname": "", "labels_raw": ""}, "no host name"),
        ({"uuid": "GPU 1\x07"}, "the GPU or its host cannot be called so"),
        ({"labels_raw": 'a="b'}, "labels_raw cannot be read (the value is kept)"),
        ({"labels_raw": 'a="b"}\nx{c="d"'}, "labels_raw cannot be read (the value is kept)"),
    ],
)
def test_a_bad_row_is_left_out_alone(tmp_path: Path, changed: dict[str, str], reason: str) -> None:
    """A row that cannot be meant is counted with its reason and line, and its neighbours are read."""
    rows = values(gpus=3)
    cells = [row.row() for row in rows]
    cells[1] |= changed
    dump, found = read(write(tmp_path / "dump.csv", cells))
    is_kept = "kept" in reason
    assert found == as_read(rows if is_kept else rows[:1] + rows[2:])
    (given,) = dump.rejects.counts
    assert given.startswith(reason)
    assert dump.rejects.lines[given] == [3]
    assert dump.rejects.rows == (0 if is_kept else 1)


def test_rows_that_are_no_rows(tmp_path: Path) -> None:
    """A row with too few cells, a value given twice and a row from the past are counted; blanks are no faults."""
    rows = values(gpus=3)
    cells = [row.row() for row in rows]
    cells[4]["value"] = ""
    cells[5]["value"] = "9223372036854775794"
    path = write(tmp_path / "dump.csv", [*cells, cells[0]])
    path.write_text(path.read_text() + "2025-07-18T20:42:34Z,DCGM_FI_DEV_GPU_TEMP\n\n")
    dump, found = read(path)
    assert found == as_read(rows[:4] + rows[6:])
    assert dump.blanks == 2
    assert dump.rejects.counts == {
        "the same metric of the same GPU and moment again": 1, "another number of columns than the header": 1,
    }  # fmt: skip
    past, _ = read(path, lookahead_rows=20)
    assert past.rejects.counts["its moment is past (--sort puts any dump in order)"] == 1


def test_unknown_metrics_keep_their_name(tmp_path: Path) -> None:
    """A metric that nobody knows is read under its own name; labels keep commas and quotes."""
    cells = values(gpus=1)[0].row() | {
        "metric_name": "acme_fan_rpm", "value": "1200.5", "labels_raw": 'team="red, \\"fast\\"",rack="7"',
    }  # fmt: skip
    dump, found = read(write(tmp_path / "dump.csv", [cells]))
    assert [row[3:] for row in found] == [("acme_fan_rpm", 1200.5)]
    (gpu,) = dump.gpus[cells["Hostname"]].values()
    assert gpu.labels == {"team": 'red, "fast"', "rack": "7"}


def test_parts_of_a_gpu_are_gpus(tmp_path: Path) -> None:
    """A MIG instance has an identity of its own, and its GPU's beside it."""
    cells = values(gpus=1)[0].row()
    part = cells | {"labels_raw": cells["labels_raw"] + ',GPU_I_ID="3",GPU_I_PROFILE="1g.10gb"', "value": "7"}
    dump, found = read(write(tmp_path / "dump.csv", [cells, part]))
    uuid = cells["uuid"]
    assert {row[2]: row[4] for row in found} == {uuid: float(cells["value"]), f"MIG-{uuid}:3": 7.0}
    gpu = dump.gpus[cells["Hostname"]][f"MIG-{uuid}:3"]
    assert (gpu.parent_uuid, gpu.device) == (uuid, "1g.10gb")


def test_parts_of_a_gpu_by_columns(tmp_path: Path) -> None:
    """MIG instances are told apart by columns, too."""
    cells = values(gpus=1)[0].row()
    part = cells | {"GPU_I_ID": "3", "GPU_I_PROFILE": "1g.10gb"}
    path = write(tmp_path / "dump.csv", [cells, part], (*dumps.COLUMNS, "GPU_I_ID", "GPU_I_PROFILE"))
    dump, found = read(path)
    uuid = cells["uuid"]
    assert {row[2] for row in found} == {uuid, f"MIG-{uuid}:3"}
    gpu = dump.gpus[cells["Hostname"]][f"MIG-{uuid}:3"]
    assert (gpu.parent_uuid, gpu.device, gpu.labels) == (uuid, "1g.10gb", {})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ('job="gpus",instance="10.0.0.1:9400",rack="7"', {"rack": "7"}),
        (
            'pod="dcgm-exporter-x2x",namespace="monitoring",exported_pod="train-0",exported_container="torch"',
            {"pod": "train-0", "container": "torch"},
        ),
        ('pod="nvidia-dcgm-exporter-x2x",namespace="monitoring",container="exporter"', {}),
        ('DCGM_FI_DEV_GPU_TEMP{pod="train-0",container="torch"}', {"pod": "train-0", "container": "torch"}),
    ],
)
def test_who_uses_a_gpu(tmp_path: Path, labels: str, expected: dict[str, str]) -> None:
    """Labels of the scrape and of the exporter's own pod are not taken for those of whoever uses the GPU."""
    cells = values(gpus=1)[0].row() | {"labels_raw": labels}
    dump, _ = read(write(tmp_path / "dump.csv", [cells]))
    (gpu,) = dump.gpus[cells["Hostname"]].values()
    assert gpu.labels == expected
    assert dump.rejects.counts == {}


def rows_of_one(*changes: dict[str, str], step: int = 10) -> list[dict[str, str]]:
    """Return rows of one GPU, each after the other but where `after` says when."""
    row = values(gpus=1)[0]
    return [
        row.row()
        | {"timestamp": (row.time + timedelta(seconds=step * int(change.get("after", number)))).isoformat()}
        | {name: text for name, text in change.items() if name != "after"}
        for number, change in enumerate(changes)
    ]


def xids_of(path: Path) -> list[tuple[int, ...]]:
    dump = Dump(DumpFile(path))
    found = [r.xids for m in dump.moments() for gpus in m.hosts.values() for r in gpus.values()]
    assert dump.rejects.counts == {}
    return found


def test_xid_errors_by_their_gauge(tmp_path: Path) -> None:
    """A gauge of the last XID that changes is an error; one that stays, or that a dump begins with, is none."""
    changes = [{"metric_name": "DCGM_FI_DEV_XID_ERRORS", "value": v} for v in ("31", "31", "79", "79", "0")]
    assert xids_of(write(tmp_path / "dump.csv", rows_of_one(*changes))) == [(), (), (79,), (), ()]


def test_a_gauge_of_xid_errors_that_comes_up_later(tmp_path: Path) -> None:
    """An exporter that shows the gauge only after an error tells it then; parts of a scrape may be apart."""
    xid, clock = ({"metric_name": f"DCGM_FI_DEV_{name}"} for name in ("XID_ERRORS", "SM_CLOCK"))
    apart = [clock | {"after": "0"}, xid | {"after": "1", "value": "31"}, clock | {"after": "2"}]
    again = [clock | {"after": "3"}, xid | {"after": "4", "value": "31"}]
    assert xids_of(write(tmp_path / "old.csv", rows_of_one(*apart, *again))) == 5 * [()]
    later = [clock, clock, clock | {"after": "2"}, xid | {"after": "2", "value": "79"}, clock]
    assert xids_of(write(tmp_path / "later.csv", rows_of_one(*later))) == [(), (), (79,), ()]
    zero_first = [clock, clock, xid | {"value": "0"}, xid | {"value": "79"}]
    assert xids_of(write(tmp_path / "zero.csv", rows_of_one(*zero_first))) == [(), (), (), (79,)]


def test_xid_errors_by_their_counts(tmp_path: Path) -> None:
    """What a count of XID errors grew by are errors, by code; a code that comes up later was not there before."""
    counts = [{"13": 2}, {"13": 2, "79": 1}, {"13": 4, "79": 1}, {}, {"13": 1}]
    changes = []
    for after, by_code in enumerate(counts):
        changes.append({"after": str(after)})
        for code, count in by_code.items():
            labels = values(gpus=1)[0].row()["labels_raw"] + f',xid="{code}"'
            changes.append(
                {"after": str(after), "metric_name": "DCGM_EXP_XID_ERRORS_COUNT", "value": str(count)}
                | {"labels_raw": labels}
            )
    path = write(tmp_path / "dump.csv", rows_of_one(*changes))
    assert xids_of(path) == [(), (79,), (13, 13), (), (13,)]
    samples = [s for tick in ticks(path, interval_seconds=1.0) for r in tick.records for s in r.samples]
    assert [sample.xids for sample in samples] == [(), (79,), (13, 13), (), (13,)]


def test_several_series_of_a_metric(tmp_path: Path) -> None:
    """Clock events are kept by kind, and NVLinks are added up."""
    clock, link = "DCGM_EXP_CLOCK_EVENTS_COUNT", "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"
    given = [
        (clock, "3", 'clock_event="power_cap"'), (clock, "1", 'clock_event="gpu_idle"'),
        (link, "5", 'nvlink="0"'), (link, "7", 'nvlink="1"'),
    ]  # fmt: skip
    changes = [
        {"after": "0", "metric_name": metric, "value": value, "labels_raw": labels}
        for metric, value, labels in given
    ]
    dump, found = read(write(tmp_path / "dump.csv", rows_of_one(*changes)))
    assert {row[3]: row[4] for row in found} == {
        f"{clock}:power_cap": 3.0, f"{clock}:gpu_idle": 1.0, "nvlink_crc_flit_errors": 12.0,
    }  # fmt: skip
    assert dump.rejects.counts == {}


@pytest.mark.parametrize(
    ("instead", "is_lost"),
    # In the last cell it is the labels that cannot be read.
    [(',"NVIDIA H100 80GB HBM3,', True), (",NVIDIA H100 80GB HBM3,", False)],
)
def test_an_unclosed_quote_takes_no_neighbours(tmp_path: Path, instead: str, is_lost: bool) -> None:
    """Of rows that a quote joins only the one with the quote is lost."""
    rows = values(gpus=5)
    cells = [row.row() for row in rows]
    for row in cells:
        row["labels_raw"] = f'rack="{row["gpu_id"]}"'
    cells[1]["labels_raw"] = ""
    path = write(tmp_path / "dump.csv", cells)
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(",NVIDIA H100 80GB HBM3,", instead) + ("" if is_lost else '"rack=7')
    path.write_text("\n".join(lines) + "\n")
    dump, found = read(path)
    assert found == as_read(rows[:1] + rows[2:] if is_lost else rows)
    assert list(dump.rejects.lines.values()) == [[3]]
    assert dump.rows == len(rows)


def test_a_gpu_changes_hands(tmp_path: Path) -> None:
    """A GPU is described again when a pod begins or ends, and not otherwise."""
    changes = [{"pod": pod} for pod in ("", "train-0", "train-0", "train-1", "")]
    path = write(tmp_path / "dump.csv", rows_of_one(*changes))
    told = [[gpu.labels for r in tick.records for gpu in r.gpus] for tick in ticks(path)]
    assert told == [[{}], [{"pod": "train-0"}], [], [{"pod": "train-1"}], [{}]]


def test_odd_columns(tmp_path: Path) -> None:
    """Both names of the index, `host`, an index without bounds and the row numbers of pandas do no harm."""
    cells = values(gpus=1)[0].row()
    odd = cells | {"host": cells["Hostname"], "gpu": "0", "gpu_id": "99999999999", "": "7", "labels_raw": ""}
    columns = ("", "host", "gpu", *(name for name in dumps.COLUMNS if name != "Hostname"))
    dump, found = read(write(tmp_path / "dump.csv", [{name: odd[name] for name in columns}], columns))
    assert len(found) == 1
    (gpu,) = dump.gpus[cells["Hostname"]].values()
    assert (gpu.index, gpu.labels) == (None, {})


@pytest.mark.parametrize(
    "text",
    ["", "\n", "time,value\n1,2\n", "timestamp,metric_name,value\n1,a,2\n", "\x89PNG\r\n\x1a\n\0\0", '"open'],
)
def test_what_is_no_dump(tmp_path: Path, text: str) -> None:
    """A file without the columns of a dump is refused as such."""
    path = tmp_path / "other"
    path.write_text(text, "latin-1")
    with pytest.raises(ContractError):
        Dump(DumpFile(path))


def test_a_dump_that_was_cut_off(tmp_path: Path) -> None:
    """What lies before the end of a broken gzip file is read."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=40)])
    path.write_bytes(gzip.compress(path.read_bytes())[:-200])
    dump, found = read(path)
    assert dump.seems_in_order()
    assert len(found) > 300
    assert [reason.split(":")[0] for reason in dump.rejects.counts] == ["the file ends too early"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1752871354", 0.0),
        ("1752871354250", 0.25),
        ("1752871354250000", 0.25),
        ("1752871354250000000", 0.25),
        ("1.752871354e9", 0),
        ("2025-07-18T22:42:34.5+02:00", 0.5),
        ("2025-07-18 20:42:34", 0),
        ("20250718T204234Z", 0),
        ("2025-07-18 20:42:34 UTC", 0),
        ("2025-07-18 20:42:34.5 +0000 UTC", 0.5),
        ("2025-07-18 22:42:34.500000001 +0200 CEST m=+0.000031", 0.5),
        ("2025/07/18 20:42:34.000", 0),
    ],
)
def test_spellings_of_a_moment(tmp_path: Path, text: str, seconds: float) -> None:
    """ISO 8601 with and without a zone and numbers since 1970 are moments."""
    cells = values(gpus=1)[0].row() | {"timestamp": text}
    _, found = read(write(tmp_path / "dump.csv", [cells]))
    assert {row[0] for row in found} == {
        datetime(2025, 7, 18, 20, 42, 34, tzinfo=UTC) + timedelta(seconds=seconds)
    }


def test_numbers_that_look_like_a_date(tmp_path: Path) -> None:
    """Milliseconds whose digits are those of a day in 1752 are milliseconds."""
    cells = values(gpus=1)[0].row() | {"timestamp": "1752112231122"}
    _, found = read(write(tmp_path / "dump.csv", [cells]))
    assert {row[0] for row in found} == {datetime(2025, 7, 10, 1, 50, 31, 122_000, tzinfo=UTC)}


def ticks(path: Path, **wishes: Any) -> replay.Ticks:
    return replay.Ticks(Dump(DumpFile(path)), replay.Wishes(**wishes), NOW, timedelta(days=14))


def test_ticks_at_ten_times_the_speed(tmp_path: Path) -> None:
    """What falls into one interval is one record for each host; samples have both times."""
    rows = values(gpus=9)
    path = write(tmp_path / "dump.csv", [row.row() for row in rows])
    found = list(ticks(path, interval_seconds=0.25, speed=10.0))
    times = sorted({row.time for row in rows})
    assert len(times) == 4
    # 4 s are 0.4 s: moments at 0, 0.133, 0.267 and 0.4 s, published at 0, 0.25 and 0.5 s.
    assert [tick.offset_seconds for tick in found] == [0.0, 0.25, 0.5]
    assert [len(tick.records) for tick in found] == [2, 2, 2]
    samples = [sample for tick in found for record in tick.records for sample in record.samples]
    begin = NOW.replace(microsecond=250_000)
    assert {sample.source_time: sample.time for sample in samples} == {
        time: begin + (time - times[0]) / 10 for time in times
    }
    assert sum(tick.size for tick in found) == sum(len(sample.values) for sample in samples) == len(rows)
    # Each GPU is described once.
    assert sorted(len(record.gpus) for tick in found for record in tick.records) == [0, 0, 0, 0, 1, 8]


def test_a_loop_never_repeats_a_moment(tmp_path: Path) -> None:
    """Rounds follow each other by the dump's own step, and no GPU has two samples of one moment."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=1)])
    endless = iter(ticks(path, interval_seconds=0.1, loop=True))
    samples = [sample for _ in range(12) for record in next(endless).records for sample in record.samples]
    times = [sample.time for sample in samples]
    assert times == sorted(set(times))
    steps = {round((b - a).total_seconds(), 3) for a, b in pairwise(times)}
    assert max(steps) - min(steps) <= 0.002
    assert len({sample.source_time for sample in samples}) == 4


def test_kept_times(tmp_path: Path) -> None:
    """With `keep_time` samples have the dump's time."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=1)])
    samples = [s for tick in ticks(path, keep_time=True, speed=None) for r in tick.records for s in r.samples]
    assert [sample.time for sample in samples] == [sample.source_time for sample in samples]


def test_a_silence_is_not_waited_for(tmp_path: Path) -> None:
    """Hours without a row are one interval, and told; what lies around them keeps its pace."""
    path = write(tmp_path / "dump.csv", rows_of_one(*[{"after": str(n)} for n in (0, 1, 30_000, 30_001)]))
    played = ticks(path, interval_seconds=1.0)
    assert [tick.offset_seconds for tick in played] == [0.0, 10.0, 11.0, 21.0]
    assert (played.gaps, played.silence) == (1, timedelta(seconds=299_990))


def test_kept_times_that_nobody_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept times before what `record` keeps are counted, and told once."""
    path = write(tmp_path / "dump.csv", rows_of_one({}, {}, {}))
    kept, moved = ticks(path, keep_time=True, speed=None), ticks(path)
    assert len(list(kept)) == len(list(moved)) == 3
    assert (kept.expired, moved.expired) == (3, 0)
    assert capsys.readouterr().err.count("MILLRACE_SAMPLE_RETENTION_DAYS") == 1


def test_a_fast_loop_is_cut_by_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval with very many rounds is several ticks: memory does not grow with the speed."""
    monkeypatch.setattr(replay, "_MAX_TICK", 100)
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=1)])
    endless = iter(ticks(path, interval_seconds=1.0, loop=True, speed=1_000_000.0))
    sizes = [next(endless).size for _ in range(3)]
    assert max(sizes) < 120
