"""The contracts of GPU telemetry: bytes are samples or a ContractError; what cannot be is left out and counted."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import dcgm, telemetry
from pipeline.errors import ContractError
from pipeline.events import Record

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def record(value: Any, ce_type: str | None = None) -> Record:
    data = value if isinstance(value, bytes) else msgspec.json.encode(value)
    headers = () if ce_type is None else (("ce_type", ce_type.encode()),)
    return Record(
        topic="gpu.samples.v1", partition=0, offset=0, timestamp_ms=int(NOW.timestamp() * 1000), value=data,
        headers=headers,
    )  # fmt: skip


def sample(**changed: Any) -> dict[str, Any]:
    return {"gpu_uuid": "GPU-1", "time": NOW, "values": {"temperature_celsius": 50.0}} | changed


def samples(*given_samples: Any) -> dict[str, Any]:
    return {"host": "node-1", "samples": list(given_samples)}


def test_every_name_leads_to_one_field() -> None:
    """Ids, our names, classic names and DCGM 4.6 names are each of one field."""
    names = [name for field in dcgm.FIELDS for name in field.names]
    assert len(names) == len(set(names)) == len(dcgm.BY_NAME)
    assert len({field.id for field in dcgm.FIELDS}) == len(dcgm.FIELDS)
    found = [dcgm.find(name) for name in ("DCGM_FI_DEV_GPU_TEMP", " DCGM_FI_DEV_GPU_TEMP_CELSIUS")]
    assert [field.id for field in found if field] == [150, 150]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature_celsius", 61.0, None),
        ("temperature_celsius", float(0x7FFFFFF0 + 2), "blank"),
        ("power_watts", 140737488355328.0, "blank"),
        ("memory_used_mebibytes", 9223372036854775794.0, "blank"),
        # 2.1 MJ since the driver was loaded: an hour's work, not a blank.
        ("energy_millijoules", float(0x7FFFFFF1), None),
        ("utilization_percent", 101.0, "above_maximum"),
        ("power_watts", -1.0, "below_minimum"),
        ("temperature_celsius", -20.0, None),
        ("vendor_thing", -1e12, None),
        ("vendor_thing", 140737488355329.0, "blank"),
    ],
)
def test_what_a_value_cannot_be(name: str, value: float, expected: str | None) -> None:
    """Blanks and the impossible are told from values, field by field."""
    assert dcgm.why_dropped(name, value) == expected


def test_nothing_plain_is_dropped() -> None:
    """The limits that are asked first let nothing pass that would be dropped."""
    for name, (lowest, highest) in dcgm.PLAIN.items():
        assert [dcgm.why_dropped(name, value) for value in (lowest, highest)] == [None, None]


def test_any_name_is_understood() -> None:
    """Classic, new and our own names mean the same, and a name that nobody knows is kept."""
    values = {
        "DCGM_FI_DEV_GPU_TEMP": 61.0, "DCGM_FI_DEV_BOARD_POWER_WATTS": 300.0, "utilization_percent": 5.0,
        "acme:fan.rpm": 1200.0,
    }  # fmt: skip
    found, dropped = telemetry.decode_samples(record(samples(sample(values=values))))
    assert found.samples[0].values == {
        "temperature_celsius": 61.0, "power_watts": 300.0, "utilization_percent": 5.0, "acme:fan.rpm": 1200.0,
    }  # fmt: skip
    assert dropped == {}


def test_a_bad_sample_does_not_harm_its_neighbours() -> None:
    """What is malformed, from the future or from before GPUs is left out and counted; the rest stays."""
    found, dropped = telemetry.decode_samples(
        record(
            samples(
                sample(),
                {"gpu_uuid": "GPU-2"},
                sample(time=NOW + timedelta(hours=1)),
                sample(time="1970-01-01T00:00:00Z"),
                sample(values={"temperature_celsius": 1e9, "power_watts": -5.0, "a name": 1.0}),
                sample(gpu_uuid="GPU 3"),
                7,
            )
        )
    )
    assert [each.gpu_uuid for each in found.samples] == ["GPU-1", "GPU-1"]
    assert found.samples[1].values == {}
    assert dropped == {
        "malformed": 4, "ahead": 1, "ancient": 1, "above_maximum": 1, "below_minimum": 1,
    }  # fmt: skip


def test_a_bad_value_does_not_harm_its_sample() -> None:
    """A null is blank, what is no number is malformed; the other values, the XIDs and the state stay."""
    values: dict[str, Any] = {
        "temperature_celsius": 61,
        "power_watts": None,
        "sm_clock_mhz": "1980",
        "fan_speed_percent": {},
    }
    found, dropped = telemetry.decode_samples(
        record(samples(sample(values=values, xids=[79, None, "31"], state="lost"), sample(values=None)))
    )
    assert [each.values for each in found.samples] == [{"temperature_celsius": 61.0}, {}]
    assert (found.samples[0].xids, found.samples[0].state) == ((79,), "lost")
    assert dropped == {"blank": 2, "malformed": 3}


def test_a_number_that_json_does_not_have() -> None:
    """NaN and Infinity, as Python and others write them, are blanks; what is near them stays."""
    value = json.dumps(
        samples(sample(time=NOW.isoformat(), values={"power_watts": 300.0, "sm_clock_mhz": 0.0}))
    )
    for number in ("NaN", "Infinity", "-Infinity"):
        found, dropped = telemetry.decode_samples(record(value.replace("0.0}", f"{number}}}").encode()))
        assert [each.values for each in found.samples] == [{"power_watts": 300.0}]
        assert dropped == {"blank": 1}


@given(st.text(alphabet='NaInfity-{}[]":,0\\ud8e', max_size=40))
def test_what_looks_like_nan_is_refused(text: str) -> None:
    """Whatever is around such a number, bytes are samples or a `ContractError`."""
    with pytest.raises(ContractError):
        telemetry.decode_samples(record(f'{{"host": NaN, "samples": [{text}]}}'.encode()))


def test_too_many_xids_are_cut() -> None:
    """A moment has so many XIDs: each becomes a condition, and one small record must not fill a large one."""
    codes = list(range(1, 1001))
    found, dropped = telemetry.decode_samples(
        record(samples(sample(xids=codes), sample(xids=[31] * 100 + [79])))
    )
    assert [each.xids for each in found.samples] == [tuple(codes[:64]), (31, 79) + 62 * (31,)]
    assert found.samples[0].values == {"temperature_celsius": 50.0}
    assert dropped == {"malformed": 936 + 37}


def test_a_bad_part_does_not_harm_a_description() -> None:
    """Empty labels are dropped, a number in text is one, and what cannot be is left out alone."""
    labels = {"pod": "", "namespace": "ml", "": "x", "job": 7}
    gpus = [
        {"gpu_uuid": "GPU-1", "index": "0", "model": "", "labels": labels},
        {"gpu_uuid": "GPU-2", "index": "first", "model": "H100", "labels": None, "acme": 1},
        {"gpu_uuid": "GPU-3", "labels": []},
        {"model": "H100"},
    ]
    found, dropped = telemetry.decode_samples(record(samples(sample()) | {"gpus": gpus, "source": ""}))
    assert found.gpus == (
        telemetry.Gpu(gpu_uuid="GPU-1", index=0, labels={"namespace": "ml"}),
        telemetry.Gpu(gpu_uuid="GPU-2", model="H100"),
        telemetry.Gpu(gpu_uuid="GPU-3"),
    )
    assert dropped == {"malformed": 5}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from(["index", "model", "labels", "driver_version", "parent_uuid"])


@given(
    JSON | st.dictionaries(st.text() | st.sampled_from(sorted(dcgm.BY_NAME)), JSON),
    JSON,
    st.dictionaries(PARTS, JSON | st.dictionaries(st.text(), JSON, max_size=3)),
)
def test_what_is_left_of_bad_parts_is_good(values: Any, xids: Any, gpu: Any) -> None:
    """Whatever JSON stands for a part, what is read meets the contract: written again, nothing is left out."""
    value = samples(sample(), sample(values=values, xids=xids)) | {"gpus": [{"gpu_uuid": "GPU-1"} | gpu]}
    found, _ = telemetry.decode_samples(record(json.dumps(value, default=str).encode("utf-8", "replace")))
    assert telemetry.decode_samples(record(telemetry.encode_samples(found).value)) == (found, {})


@pytest.mark.parametrize(
    "value",
    [
        b"", b"42", b"null", b"{}", b"[1]", b"\xff\xfe", b'{"host":"a","samples":[]}',
        samples({"gpu_uuid": "GPU-1"}), samples(sample(time="2026-01-31T12:00:00")),
        {"host": "", "samples": [sample()]}, {"host": "node-1\n", "samples": [sample()]},
        samples(sample(gpu_uuid="GPU-1\n")), samples(sample(time=NOW + timedelta(days=1))), b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_samples_is_refused(value: Any) -> None:
    """A record of which nothing can be used is a broken contract, with a reason."""
    with pytest.raises(ContractError):
        telemetry.decode_samples(record(value))


def test_another_type_is_refused() -> None:
    """A record that says it is something else is not read as samples."""
    with pytest.raises(ContractError, match=r"millrace\.gpu\.samples\.v2"):
        telemetry.decode_samples(record(samples(sample()), "millrace.gpu.samples.v2"))


@given(st.binary(max_size=200))
def test_any_bytes_are_samples_or_refused(value: bytes) -> None:
    """Arbitrary bytes raise ContractError and nothing else, from each of the three readers."""
    for decode in (telemetry.decode_samples, telemetry.decode_windows, telemetry.decode_alert):
        with pytest.raises(ContractError):
            decode(record(value))


def test_an_alert_is_told_by_its_beginning() -> None:
    """The same condition of the same beginning is one alert, in whatever time zone; a later one is another."""
    first = telemetry.alert_id("GPU-1", "thermal_margin", NOW)
    assert first == telemetry.alert_id("GPU-1", "thermal_margin", NOW.astimezone())
    assert first != telemetry.alert_id("GPU-1", "thermal_margin", NOW + timedelta(seconds=1))


@pytest.mark.parametrize("key", [b"\0\0\0\7", b"node\r", b"a\tb", b"\xff\x7f", b"x" * 300, b"", None])
def test_any_key_makes_windows_that_can_be_read(key: bytes | None) -> None:
    """Whatever bytes a producer uses as a key, readers accept the windows of its GPUs."""
    at = datetime(2026, 3, 1, tzinfo=UTC)
    given = Record(topic="t", partition=0, offset=0, timestamp_ms=0, key=key)
    windows = telemetry.Windows(
        key=telemetry.key_of(given, "node-1"),
        start=at,
        end=at,
        gpus=(telemetry.GpuWindow(gpu_uuid="GPU-1", host="node-1"),),
    )
    outgoing = telemetry.encode_windows(windows)
    read = telemetry.decode_windows(
        Record(topic="t", partition=0, offset=0, timestamp_ms=0, value=outgoing.value)
    )
    assert read == windows
    assert read.key == "node-1" or key
