"""The quick way to read samples says what the careful way says."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import dcgm, telemetry
from pipeline.errors import ContractError
from pipeline.events import Record
from pipeline.plain_samples import AnySamples, PlainSamples, SampleReader
from pipeline.sample_rows import SampleRows

NOW = datetime(2026, 1, 31, 23, 59, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def record(value: Any, **more: Any) -> Record:
    return Record(
        topic="gpu.samples.v1", partition=0, offset=0, timestamp_ms=int(NOW.timestamp() * 1000),
        value=value if isinstance(value, bytes) else msgspec.json.encode(value), **more,
    )  # fmt: skip


def sample(**changed: Any) -> dict[str, Any]:
    return {"gpu_uuid": "GPU-1", "time": NOW, "values": {"temperature_celsius": 50.0}} | changed


def samples(*given_samples: Any) -> dict[str, Any]:
    return {"host": "node-1", "samples": list(given_samples)}


def stored(*batch: AnySamples) -> Sequence[Mapping[str, Any]]:
    """Return what a batch puts into the database: each row's values that are not NULL, in order."""
    ids = {each.gpu_uuid: len(each.gpu_uuid) for part in batch for each in part.samples}
    rows = SampleRows(batch, ids)
    found = [
        {name: value for name, value in zip(columns, row, strict=True) if value is not None}
        for _, columns, of_day in rows.in_order()
        for row in of_day
    ]
    assert len(found) == rows.count
    return found


def reader_of(*fields: str) -> SampleReader:
    """Return a reader that has met some fields."""
    reader = SampleReader()
    reader.decode(record(samples(sample(values=dict.fromkeys(fields, 1.0)))))
    return reader


NAMES = st.sampled_from(
    ["temperature_celsius", "power_watts", "energy_millijoules", "DCGM_FI_DEV_GPU_TEMP", "odd"]
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([50, 50.0, -0.0, 250.0, 250.5, -1.0, 2**31, 2.0**47, 2**63, 1e400, None, "1", [], True]),
    st.floats(allow_nan=False, allow_infinity=False),
)
SAMPLES = st.fixed_dictionaries(
    {"gpu_uuid": st.sampled_from(["GPU-1", "GPU-22", "GPU 3"])},
    optional={
        "time": st.sampled_from([NOW, NOW + MINUTE, NOW + 60 * MINUTE, "1999-01-01T00:00:00Z", 7]),
        "values": st.one_of(st.none(), st.dictionaries(NAMES, VALUES)),
        "xids": st.lists(st.sampled_from([79, 31, -1, None])),
        "state": st.sampled_from(["ok", "lost", "asleep"]),
        "source_time": st.sampled_from([NOW, "0001-01-01T00:00:00Z", "yesterday"]),
        "more": st.just({}),
    },
)  # fmt: skip


@given(st.lists(SAMPLES, max_size=3), st.sets(st.sampled_from(dcgm.NAMES), max_size=5))
def test_both_ways_say_the_same(some: list[Any], fields: set[str]) -> None:
    """Of any samples the same is stored, the same counted and the same refused, whatever was read before."""
    value = record(samples(*some))
    reader = reader_of(*fields)
    try:
        expected, dropped = telemetry.decode_samples(value)
    except ContractError as error:
        with pytest.raises(ContractError, match=f"^{re.escape(error.message)}$"):
            reader.decode(value)
        return
    for _ in range(2):  # it has met all fields the second time
        found, left_out = reader.decode(value)
        assert (left_out, stored(found)) == (dropped, stored(expected))
        assert (found.host, found.gpus) == (expected.host, expected.gpus)


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_any_bytes_are_samples_or_refused(value: bytes) -> None:
    """Arbitrary bytes raise `ContractError` and nothing else."""
    with pytest.raises(ContractError):
        SampleReader().decode(record(value))


def test_most_records_are_plain() -> None:
    """What our publishers send is read the quick way, but for the first record with a field."""
    reader = SampleReader()
    value = record(samples(sample(), sample(gpu_uuid="GPU-22", xids=[79], state="lost", values={})))
    assert not isinstance(reader.decode(value)[0], PlainSamples)
    assert isinstance(reader.decode(value)[0], PlainSamples)


@pytest.mark.parametrize(
    "odd",
    [
        record(samples(sample(values={"temperature_celsius": 250.5}))),
        record(samples(sample(values={"temperature_celsius": None}))),
        record(samples(sample(values={"odd": 1.0}))),
        record(samples(sample(), sample(time=NOW + 6 * MINUTE))),
        record(samples(sample(), sample(time="1999-12-31T23:59:59Z"))),
        record(samples(sample()), headers=(("ce_type", b"millrace.gpu.windows.v1"),)),
    ],
)
def test_what_is_odd_is_not_plain(odd: Record) -> None:
    """A value that must be judged, a name that must be kept and a time that cannot be take the careful way."""
    assert reader_of("temperature_celsius")._plain(odd) is None


def test_a_batch_of_both_kinds_keeps_its_order() -> None:
    """Of records with other columns each row has its own values, over midnight too, in the order of the batch."""
    reader = reader_of("temperature_celsius")
    plain, _ = reader.decode(record(samples(sample(), sample(time=NOW + MINUTE))))
    odd, _ = telemetry.decode_samples(record(samples(sample(values={"power_watts": 300.0, "odd": 1.0}))))
    assert isinstance(plain, PlainSamples)
    of_first_day = [{"temperature_celsius": 50.0}, {"power_watts": 300.0, "other": '{"odd":1.0}'}]
    keys = {"gpu_id", "time", "lost"}
    found = [{name: row[name] for name in row.keys() - keys} for row in stored(plain, odd, plain)]
    assert found == [*of_first_day, {"temperature_celsius": 50.0}, *[{"temperature_celsius": 50.0}] * 2]
    rows = SampleRows([plain, odd, plain], {"GPU-1": 1})
    assert [(day.day, len(of_kind)) for day, _, of_kind in rows.by_columns()] == [(31, 2), (31, 1), (1, 2)]
