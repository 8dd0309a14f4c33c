"""Pages of dcgm-exporter become samples: any release's labels, XID errors as events, nothing made up."""

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import exporter
from pipeline.errors import ContractError
from tests.support.exporter import UUIDS, page

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
INSTANCE = f"MIG-{UUIDS[0]}:7"


@pytest.mark.parametrize(("host_label", "uuid_label"), [("Hostname", "UUID"), ("hostname", "uuid")])
def test_a_page_becomes_samples(host_label: str, uuid_label: str) -> None:
    """Values have our names, unknown metrics their own, links are summed, what is blank is left out and counted."""
    hosts, _, dropped = exporter.parse(page(host_label, uuid_label), NOW, "else", None)
    assert [host.host for host in hosts] == ["node-7"]
    values = {sample.gpu_uuid: sample.values for sample in hosts[0].samples}
    assert values == {
        UUIDS[0]: {
            "sm_clock_mhz": 1980, "energy_millijoules": 15812034129, "power_watts": 71.456, "last_xid": 31,
            "DCGM_EXP_CLOCK_EVENTS_COUNT:hw_thermal": 4, "DCGM_EXP_CLOCK_EVENTS_COUNT:power_cap": 2,
            "nvlink_crc_flit_errors": 7, "DCGM_FI_DEV_FANTASY_COUNT": 42,
        },
        UUIDS[1]: {"sm_clock_mhz": 1965},
        INSTANCE: {"sm_active_ratio": 0.5},
    }  # fmt: skip
    assert dropped == {"blank": 2}
    assert all(sample.time == NOW and sample.xids == () for sample in hosts[0].samples)
    gpus = {gpu.gpu_uuid: gpu for gpu in hosts[0].gpus}
    assert gpus.keys() == values.keys()
    gpu = gpus[UUIDS[1]]
    assert (gpu.index, gpu.device, gpu.model) == (1, "nvidia1", "NVIDIA H100 80GB HBM3")
    assert (gpu.pci_bus_id, gpu.driver_version) == ("00000000:1B:00.0", "550.54.15")
    assert gpu.labels == {"container": "train", "namespace": "ml", "pod": "job-1"}
    assert (gpus[INSTANCE].parent_uuid, gpus[INSTANCE].device) == (UUIDS[0], "1g.10gb")


def test_xid_errors_are_counts_that_grew() -> None:
    """Each growth of a count is that many events; the gauge of the last code, a first page and a fall are none."""
    before: exporter.XidCounts | None = None
    reported = []
    for counts in ({31: 2}, {31: 2}, {31: 4}, {31: 1, 79: 1}, {}, {31: 1}):
        hosts, before, _ = exporter.parse(page(xids=counts), NOW, "else", before)
        reported.append({sample.gpu_uuid: sample.xids for sample in hosts[0].samples if sample.xids})
    gpu = UUIDS[0]
    assert reported == [{}, {}, {gpu: (31, 31)}, {gpu: (79,)}, {}, {gpu: (31,)}]


def test_a_series_without_a_host_is_of_the_one_that_was_asked() -> None:
    """A host that no label names is the one that the caller knows."""
    text = f'DCGM_FI_DEV_GPU_TEMP{{gpu="0",UUID="{UUIDS[0]}"}} 50\n'
    hosts, _, _ = exporter.parse(text, NOW, "node-1", None)
    assert [(host.host, host.samples[0].values) for host in hosts] == [
        ("node-1", {"temperature_celsius": 50})
    ]


def test_wrong_uuids_and_numbers_are_left_out() -> None:
    """A UUID that none can be and values that cannot be true are counted, their neighbours stay."""
    text = (
        'DCGM_FI_DEV_GPU_TEMP{UUID="GPU 1"} 50\n'
        'DCGM_FI_DEV_GPU_TEMP{UUID="GPU-2"} 5000\n'
        'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-2"} -1\n'
        'DCGM_FI_DEV_SM_CLOCK{UUID="GPU-2"} 1\n'
    )
    hosts, _, dropped = exporter.parse(text, NOW, "node-1", None)
    assert [sample.values for host in hosts for sample in host.samples] == [{"sm_clock_mhz": 1}]
    assert dropped == {"malformed": 1, "above_maximum": 1, "below_minimum": 1}


@pytest.mark.parametrize(
    "bad",
    [
        'DCGM_FI_DEV_POWER_USAGE{UUID="GPU-1"} N/A',
        'DCGM_FI_DEV_POWER_USAGE{UUID="GPU-1"} ',
        'DCGM_FI_DEV_POWER_USAGE{UUID="GPU-1",pod="a"b"} 70',
        f'DCGM_FI_DEV_POWER_USAGE{{UUID="GPU-1"}} {"9" * 400}',
    ],
)
def test_a_bad_line_hides_no_other(bad: str) -> None:
    """A line that cannot be read is left out and counted; with nothing else it is no page."""
    good = (f'DCGM_FI_DEV_{name}{{UUID="GPU-1"}} 50\n' for name in ("GPU_TEMP", "SM_CLOCK"))
    hosts, _, dropped = exporter.parse(f"{next(good)}{bad}\n{next(good)}", NOW, "node-1", None)
    assert hosts[0].samples[0].values == {"temperature_celsius": 50, "sm_clock_mhz": 50}
    assert dropped == {"malformed": 1}
    with pytest.raises(ContractError, match="not Prometheus"):
        exporter.parse(f"# HELP x\n{bad}\n", NOW, "node-1", None)


def test_a_count_that_jumps_is_not_as_many_events() -> None:
    """However far a count grew, a sample has few events of it, and those of other codes."""
    hosts, _, _ = exporter.parse(page(xids={31: 10**9, 79: 2}), NOW, "else", {})
    (xids,) = (sample.xids for host in hosts for sample in host.samples if sample.xids)
    assert (xids.count(31), xids.count(79)) == (63, 1)


@given(st.one_of(st.text(), st.text(alphabet='ab{}=",\\ 1.\n#TYPEgauge')))
def test_any_text_is_samples_or_a_contract_error(text: str) -> None:
    """A page of anything raises ContractError and nothing else."""
    with contextlib.suppress(ContractError):
        exporter.parse(text, NOW, "node-1", {})
