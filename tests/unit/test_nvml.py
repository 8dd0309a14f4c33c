"""GPUs by the real pynvml against a library that follows a script: units, faults, MIG, XID errors."""

import queue
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import dcgm, nvml
from pipeline.errors import DependencyError
from pipeline.telemetry import Sample
from tests.support.eventually import eventually_sync
from tests.support.nvml import USUAL, Script

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
EXPECTED = {
    "sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "clock_event_reasons": 4, "temperature_celsius": 51,
    "temperature_margin_celsius": 36, "memory_temperature_celsius": 62, "power_watts": 351.25,
    "power_instant_watts": 349.1, "power_limit_watts": 700, "energy_millijoules": 987_654_321,
    "slowdown_temperature_celsius": 87, "shutdown_temperature_celsius": 92, "performance_state": 0,
    "utilization_percent": 97, "memory_copy_percent": 41, "encoder_percent": 3, "decoder_percent": 2,
    "pcie_replays": 7, "power_violation_nanoseconds": 1_000_000, "thermal_violation_nanoseconds": 2_000_000,
    "memory_total_mebibytes": 81_559, "memory_used_mebibytes": 1_024, "memory_reserved_mebibytes": 512,
    "memory_free_mebibytes": 80_023, "ecc_corrected_volatile": 5, "ecc_uncorrected_volatile": 1,
    "ecc_corrected_lifetime": 50, "ecc_uncorrected_lifetime": 10, "rows_remapped_corrected": 3,
    "rows_remapped_uncorrected": 2, "row_remap_pending": 1, "row_remap_failed": 0,
    "nvlink_crc_flit_errors": 11, "nvlink_crc_data_errors": 12, "nvlink_replays": 13, "nvlink_recoveries": 14,
}  # fmt: skip
Opened = Callable[[], nvml.Nvml]


@pytest.fixture
def xids() -> "queue.SimpleQueue[tuple[str, int]]":
    """Return what was reported."""
    return queue.SimpleQueue()


@pytest.fixture
def opened(script: Script, xids: "queue.SimpleQueue[tuple[str, int]]") -> Iterator[Opened]:
    """Open NVML; it is closed after the test."""
    readers = []

    def make() -> nvml.Nvml:
        reader = nvml.Nvml(lambda uuid, code: xids.put((uuid, code)))
        reader.open()
        readers.append(reader)
        return reader

    yield make
    for reader in readers:
        reader.close()


def by_uuid(samples: list[Sample]) -> dict[str, Sample]:
    found = {sample.gpu_uuid: sample for sample in samples}
    assert len(found) == len(samples)
    return found


def test_every_value_is_in_the_units_of_the_table(opened: Opened, script: Script) -> None:
    """What the table says NVML gives is read, by its name and in DCGM's units; what is not supported is absent."""
    reader = opened()
    samples = by_uuid(reader.sample(NOW))
    assert samples.keys() == {script.uuid(0), script.uuid(1)}
    assert samples[script.uuid(0)].values == pytest.approx(EXPECTED)
    readable = {field.name for field in dcgm.FIELDS if field.nvml}
    # The script has no fan, and remaps rows instead of retiring pages.
    assert {name.split("_")[0] for name in readable - EXPECTED.keys()} == {"fan", "pages"}
    assert all(dcgm.why_dropped(name, value) is None for name, value in EXPECTED.items())
    gpu = reader.gpus[1]
    assert (gpu.gpu_uuid, gpu.index, gpu.device, gpu.model) == (script.uuid(1), 1, "nvidia1", USUAL["name"])
    assert (gpu.pci_bus_id, gpu.driver_version) == (USUAL["pci_bus_id"], "550.54.15")


def test_what_is_not_supported_is_not_asked_again(
    opened: Opened, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that one GPU lacks is asked for once, until the driver was reloaded; other GPUs keep it."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("NVML_STAND_IN_CALLS", str(calls))
    script.set({"gpu.0.margin": "!3", "gpu.0.ecc_corrected_lifetime": "!3"})
    reader = opened()
    for _ in range(3):
        samples = by_uuid(reader.sample(NOW))
    lacking = EXPECTED.keys() - samples[script.uuid(0)].values.keys()
    assert lacking == {"temperature_margin_celsius", "ecc_corrected_lifetime"}
    assert samples[script.uuid(1)].values == pytest.approx(EXPECTED)
    asked = calls.read_text().splitlines()
    assert [asked.count(f"0 {name}") for name in ("margin", "ecc_corrected_lifetime", "power")] == [1, 1, 3]
    assert asked.count("1 margin") == 3
    script.set({"gpu.0.margin": 30, "reloads": 1})
    assert by_uuid(reader.sample(NOW))[script.uuid(0)].values["temperature_margin_celsius"] == 30


def test_a_value_that_fails_once_is_asked_for_again(opened: Opened, script: Script) -> None:
    """An error of one value leaves out that value, this time."""
    reader = opened()
    script.set({"gpu.0.power": "!999", "gpu.0.energy": "!999"})
    broken = by_uuid(reader.sample(NOW))[script.uuid(0)]
    assert broken.state == "ok"
    assert EXPECTED.keys() - broken.values.keys() == {"power_watts", "energy_millijoules"}
    script.set({"gpu.0.power": 100_000, "gpu.0.energy": 5})  # a counter that fell is published as it is
    values = by_uuid(reader.sample(NOW))[script.uuid(0)].values
    assert (values["power_watts"], values["energy_millijoules"]) == (100, 5)


def test_older_drivers_are_asked_in_their_way(opened: Opened, script: Script) -> None:
    """Where a driver lacks a call or a field id, the one it had before is used."""
    script.set(
        {
            "gpu.*.temperature": "!13", "gpu.*.temperature_old": 48, "gpu.*.clock_events": "!13",
            "gpu.*.clock_throttle": 8, "gpu.*.memory_reserved": "!25", "gpu.*.pcie_replays": "!3",
            "gpu.*.pcie_replays_old": 6, "gpu.*.ecc_corrected": "!3", "gpu.*.ecc_corrected_old": 4,
            "gpu.*.ecc_uncorrected_old": 2, "gpu.*.rows_corrected": "!2", "gpu.*.rows_old": 9,
        }
    )  # fmt: skip
    reader = opened()
    values = by_uuid(reader.sample(NOW))[script.uuid(0)].values
    changed = {
        "temperature_celsius": 48, "clock_event_reasons": 8, "pcie_replays": 6, "ecc_corrected_volatile": 4,
        "ecc_uncorrected_volatile": 2, "ecc_corrected_lifetime": 4, "ecc_uncorrected_lifetime": 2,
        "rows_remapped_corrected": 9, "rows_remapped_uncorrected": 0, "memory_free_mebibytes": 80_535,
    }  # fmt: skip
    expected = EXPECTED | changed
    del expected["memory_reserved_mebibytes"]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("fault", [{"gpu.1.lost": 1}, {f"gpu.1.{name}": "!999" for name in USUAL}])
def test_a_lost_gpu_is_reported_until_it_is_back(
    opened: Opened, script: Script, fault: dict[str, object]
) -> None:
    """A GPU that falls off the bus is lost in every sample, its neighbour goes on, and it is found again."""
    reader = opened()
    reader.sample(NOW)
    script.set(fault)
    for _ in range(3):
        samples = by_uuid(reader.sample(NOW))
        assert (samples[script.uuid(1)].state, samples[script.uuid(1)].values) == ("lost", {})
        assert samples[script.uuid(0)].values == pytest.approx(EXPECTED)
    assert {gpu.gpu_uuid for gpu in reader.gpus} == samples.keys()
    assert reader.lost == {script.uuid(1)}
    script.set(dict.fromkeys(fault))
    assert by_uuid(reader.sample(NOW))[script.uuid(1)].values == pytest.approx(EXPECTED)
    assert reader.lost == frozenset()


def test_a_reloaded_driver_is_survived(opened: Opened, script: Script) -> None:
    """After a reload the next sample has values; while there is no driver, every GPU is lost."""
    reader = opened()
    reader.sample(NOW)
    script.set({"reloads": 1, "driver_version": "560.1"})
    assert {sample.state for sample in reader.sample(NOW)} == {"ok"}
    assert {gpu.driver_version for gpu in reader.gpus} == {"560.1"}
    script.set({"reloads": 2, "init": "!9"})
    assert [sample.state for sample in reader.sample(NOW)] == ["lost", "lost"]
    assert [sample.state for sample in reader.sample(NOW)] == ["lost", "lost"]
    script.set({"init": None})
    assert [sample.state for sample in reader.sample(NOW)] == ["ok", "ok"]


def test_instances_of_mig_are_gpus_of_their_own(
    opened: Opened, script: Script, xids: "queue.SimpleQueue[tuple[str, int]]"
) -> None:
    """Each instance has its memory and its XID errors; nobody's utilization is known; deleted ones are not lost."""
    script.divide(0, 2)
    reader = opened()
    samples = by_uuid(reader.sample(NOW))
    assert samples.keys() == {script.uuid(0), script.uuid(1), "MIG-0-0", "MIG-0-1"}
    assert samples["MIG-0-1"].values == {
        "memory_total_mebibytes": 10_240, "memory_used_mebibytes": 1_024, "memory_free_mebibytes": 9_216,
        "memory_reserved_mebibytes": 0,
    }  # fmt: skip
    unknown = EXPECTED.keys() - samples[script.uuid(0)].values.keys()
    assert unknown == {"utilization_percent", "memory_copy_percent"}
    instance = next(gpu for gpu in reader.gpus if gpu.gpu_uuid == "MIG-0-1")
    assert (instance.parent_uuid, instance.device, instance.index) == (script.uuid(0), "1g.10gb", 0)
    assert instance.labels == {"gpu_instance": "8", "compute_instance": "0"}
    script.xid(0, 94, instance=(8, 0))
    script.xid(0, 63)
    assert [xids.get(timeout=10), xids.get(timeout=10)] == [("MIG-0-1", 94), (script.uuid(0), 63)]
    script.set({"gpu.0.mig": 0, "gpu.0.utilization": None, "gpu.0.memory_utilization": None, "reloads": 1})
    samples = by_uuid(reader.sample(NOW))
    assert {uuid: sample.state for uuid, sample in samples.items()} == {
        script.uuid(0): "ok",
        script.uuid(1): "ok",
    }
    assert samples[script.uuid(0)].values == pytest.approx(EXPECTED)


def test_xid_errors_are_heard_beside_a_lost_gpu(
    opened: Opened, script: Script, xids: "queue.SimpleQueue[tuple[str, int]]"
) -> None:
    """Repeats of one code are events each, and a GPU that is lost does not make the others silent."""
    reader = opened()
    reader.sample(NOW)
    script.xid(0, 31)
    script.xid(0, 31)
    script.xid(1, 79)
    reported = [xids.get(timeout=10) for _ in range(3)]
    assert reported == [(script.uuid(0), 31), (script.uuid(0), 31), (script.uuid(1), 79)]
    script.set({"gpu.1.lost": 1})
    watch = reader._watch
    assert watch is not None
    eventually_sync(lambda: watch.has_ended, 10)
    reader.sample(NOW)
    script.xid(0, 13)
    assert xids.get(timeout=10) == (script.uuid(0), 13)


def test_a_gpu_that_never_answered_is_counted(opened: Opened, script: Script) -> None:
    """A GPU that is lost from the beginning has no UUID to report; it is counted until it answers."""
    script.set({"gpu.1.lost": 1})
    reader = opened()
    assert [sample.gpu_uuid for sample in reader.sample(NOW)] == [script.uuid(0)]
    assert reader.nameless == 1
    script.set({"gpu.1.lost": None})
    assert {sample.state for sample in reader.sample(NOW)} == {"ok"}
    assert (reader.nameless, len(reader.gpus)) == (0, 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"init": "!12"}, "there is no NVML here: libnvidia-ml.so.1"),
        ({"init": "!9"}, "NVML does not start: Driver Not Loaded"),
        ({"gpus": 0}, "NVML knows no GPU"),
        ({"gpu.0.lost": 1, "gpu.1.lost": 1}, "NVML knows no GPU"),
    ],
)
def test_no_nvml_is_one_clear_line(
    opened: Opened, script: Script, lines: dict[str, object], message: str
) -> None:
    """Without library, driver or GPU there is an error that says which."""
    script.set(lines)
    with pytest.raises(DependencyError, match=message):
        opened()
