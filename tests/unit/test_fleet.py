"""The made-up fleet: the same plan gives the same samples, its physics hold, and each fault shows and ends."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest

from loadtest.fleet import Fleet, Plan, Step
from loadtest.fleet_faults import FAULTS
from loadtest.fleet_models import MODELS
from pipeline import dcgm
from pipeline.telemetry import Sample

BEGIN = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def run(seconds: float = 600.0, **changed: object) -> tuple[Fleet, list[Step]]:
    fleet = Fleet(Plan(begin=BEGIN, seconds=seconds, **changed))  # type: ignore[arg-type]
    return fleet, list(fleet)


def series(steps: list[Step], gpu_uuid: str) -> dict[datetime, Sample]:
    """The samples of one GPU by time; repeats are the same."""
    found: dict[datetime, Sample] = {}
    for step in steps:
        for record in step.records:
            for sample in record.samples:
                if sample.gpu_uuid == gpu_uuid:
                    assert found.setdefault(sample.time, sample) == sample
    return found


def test_the_same_plan_gives_the_same_samples() -> None:
    """Samples and truth follow from the plan; another seed is another fleet."""
    first, steps = run(300.0, gpus=48, faults=("thermal", "xid_critical"), seed=11)
    again, same = run(300.0, gpus=48, faults=("thermal", "xid_critical"), seed=11)
    assert (steps, first.injected) == (same, again.injected)
    _, other = run(300.0, gpus=48, faults=("thermal", "xid_critical"), seed=12)
    assert steps != other


def test_what_a_fleet_says_can_be() -> None:
    """Every value is one of a known field and possible; free, used and reserved memory are all there is."""
    _, steps = run(600.0, gpus=100)
    total = {model.name: model.memory_mebibytes for model in MODELS}
    models = {gpu.gpu_uuid: gpu.model for step in steps for record in step.records for gpu in record.gpus}
    assert len(models) == 100
    assert set(models.values()) == set(total)
    for step in steps:
        for record in step.records:
            for sample in record.samples:
                assert sample.values.keys() <= set(dcgm.NAMES)
                assert [n for n, v in sample.values.items() if dcgm.why_dropped(n, v) is not None] == []
                memory = [
                    sample.values.get(f"memory_{part}_mebibytes") for part in ("free", "used", "reserved")
                ]
                if None not in memory:
                    assert sum(m for m in memory if m is not None) == total[models[sample.gpu_uuid] or ""]


def test_energy_is_power_over_time() -> None:
    """Between two samples the energy counter grows by the power of the second."""
    fleet, steps = run(300.0, gpus=8)
    found = [sample.values for sample in series(steps, fleet.uuids[3]).values()]
    fields = ("energy_millijoules", "power_watts")
    pairs = [
        (after[fields[0]] - before[fields[0]], after[fields[1]])
        for before, after in pairwise(found)
        if all(name in values for name in fields for values in (before, after))
    ]
    assert len(pairs) > 20
    assert all(abs(joules - watts * 10_000) < 20 for joules, watts in pairs)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_and_ends(name: str) -> None:
    """Each kind of fault makes a difference that physics says it must, and none before it began."""
    fleet, steps = run(3000.0, gpus=96, faults=(name,), fault_window=(900.0, 1200.0), seed=5)
    (fault,) = fleet.injected
    assert fault.fault == name
    assert fault.visible is not None
    assert timedelta(0) <= fault.visible - fault.begin <= timedelta(minutes=10)
    found = series(steps, fault.gpu_uuid)
    before = [sample for time, sample in found.items() if time < fault.begin]
    during = [sample for time, sample in found.items() if fault.visible <= time < fault.end]
    assert len(before) > 80
    xids = {xid for sample in during for xid in sample.xids}
    assert not any(sample.xids or sample.state != "ok" for sample in before)

    def mean(samples: list[Sample], field: str) -> float:
        return float(np.mean([sample.values[field] for sample in samples if field in sample.values]))

    def gained(field: str) -> float:
        values = [sample.values[field] for sample in during if field in sample.values]
        return values[-1] - values[0]

    if name in ("thermal", "fan"):
        assert mean(during, "temperature_celsius") > mean(before[-30:], "temperature_celsius") + 3
    elif name == "power_cap":
        assert mean(during, "power_watts") < 0.7 * fleet.models[fault.gpu].limit_watts
    elif name in ("clock_stuck", "straggler"):
        peers = [
            mean(list(series(steps, fleet.uuids[gpu]).values()), field)
            for gpu in range(fault.gpu // 8 * 8, fault.gpu // 8 * 8 + 8)
            if gpu != fault.gpu
            for field in ("sm_clock_mhz",)
        ]
        slower = mean(during, "sm_clock_mhz") < 0.9 * float(np.median(peers))
        assert slower or mean(during, "utilization_percent") < 90
    elif name in ("ecc", "pcie", "nvlink"):
        field = {"ecc": "ecc_corrected_volatile", "pcie": "pcie_replays", "nvlink": "nvlink_crc_flit_errors"}[
            name
        ]
        assert gained(field) > 50
    elif name == "row_remap":
        assert xids & {63, 64}
        assert mean(during, "row_remap_pending") == 1.0
    elif name in ("xid_critical", "xid_benign"):
        assert len(xids) == 1
    elif name == "idle_waste":
        assert mean(during, "utilization_percent") == 0.0
        assert min(sample.values["memory_used_mebibytes"] for sample in during) > 5_000
    elif name == "memory_leak":
        assert gained("memory_used_mebibytes") > 0.05 * fleet.models[fault.gpu].memory_mebibytes
    else:
        assert name == "lost"
        assert all(sample.state == "lost" for sample in during)


def test_peers_wait_for_the_slowest() -> None:
    """GPUs of a synchronous job draw less while one of them is slow, and none is less busy for it."""
    fleet, steps = run(2400.0, gpus=16, faults=("clock_stuck",), fault_window=(900.0, 900.0), seed=3)
    (fault,) = fleet.injected
    host = fault.gpu // 8 * 8
    peers = [fleet.uuids[gpu] for gpu in range(host, host + 8) if gpu != fault.gpu]
    for peer in peers:
        found = series(steps, peer)
        watts = {
            is_during: np.median(
                [
                    sample.values["power_watts"]
                    for time, sample in found.items()
                    if (fault.begin <= time < fault.end) == is_during and "power_watts" in sample.values
                ]
            )
            for is_during in (False, True)
        }
        busy = np.median(
            [s.values.get("utilization_percent", 100.0) for time, s in found.items() if time >= fault.begin]
        )
        assert watts[True] < 0.85 * watts[False]
        assert busy > 90


def test_what_a_fleet_cannot_be() -> None:
    """Unknown faults and faults without a place are refused."""
    with pytest.raises(ValueError, match="no fault is called smoke"):
        Fleet(Plan(begin=BEGIN, seconds=60.0, faults=("smoke",)))
    with pytest.raises(ValueError, match="take more GPUs"):
        Fleet(Plan(begin=BEGIN, seconds=60.0, gpus=8, faults=("thermal", "ecc")))
