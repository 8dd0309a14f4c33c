"""DCGM dumps: every good value once and unchanged, every bad row left out with its reason and line."""

import gzip
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from millrace import replay
from millrace.dumps import Dump
from pipeline.errors import ContractError
from tests.support import dumps
from tests.support.dumps import Value, values, write

NOW = datetime(2026, 1, 31, 12, 0, 0, 250_999, tzinfo=UTC)


def read(path: Path, **options: Any) -> tuple[Dump, set[tuple[datetime, str, str, str, float]]]:
    dump = Dump(path, **options)
    found = [
        (moment.time, host, gpu, name, value)
        for moment in dump.moments()
        for host, gpus in moment.hosts.items()
        for gpu, by_name in gpus.items()
        for name, value in by_name.items()
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
    assert gpu.labels == {"instance": "mtv5-dgx1-hgpu-002:9400", "job": "dgx_dcgm_exporter"}


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
        "the same metric of the same GPU and moment again": 1, "another number of columns than the first line": 1,
    }  # fmt: skip
    past, _ = read(path, lookahead_rows=20)
    assert past.rejects.counts["its moment is past: sort the dump by time"] == 1


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


@pytest.mark.parametrize(
    "text",
    ["", "\n", "time,value\n1,2\n", "timestamp,metric_name,value\n1,a,2\n", "\x89PNG\r\n\x1a\n\0\0", '"open'],
)
def test_what_is_no_dump(tmp_path: Path, text: str) -> None:
    """A file without the columns of a dump is refused as such."""
    path = tmp_path / "other"
    path.write_text(text, "latin-1")
    with pytest.raises(ContractError):
        Dump(path)


def test_a_dump_that_was_cut_off(tmp_path: Path) -> None:
    """What lies before the end of a broken gzip file is read."""
    path = write(tmp_path / "dump.csv", [row.row() for row in values(gpus=40)])
    path.write_bytes(gzip.compress(path.read_bytes())[:-200])
    dump, found = read(path)
    assert len(found) > 300
    assert [reason.split(":")[0] for reason in dump.rejects.counts] == ["the file ends too early"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1752871354", 0.0),
        ("1752871354250", 0.25),
        ("2025-07-18T22:42:34.5+02:00", 0.5),
        ("2025-07-18 20:42:34", 0),
    ],
)
def test_spellings_of_a_moment(tmp_path: Path, text: str, seconds: float) -> None:
    """ISO 8601 with and without a zone and numbers since 1970 are moments."""
    cells = values(gpus=1)[0].row() | {"timestamp": text}
    _, found = read(write(tmp_path / "dump.csv", [cells]))
    assert {row[0] for row in found} == {
        datetime(2025, 7, 18, 20, 42, 34, tzinfo=UTC) + timedelta(seconds=seconds)
    }


def ticks(path: Path, **wishes: Any) -> replay.Ticks:
    return replay.Ticks(Dump(path), replay.Wishes(**wishes), NOW)


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
