"""Several devices: what their setting may say, and what each process gets of it."""

import os
from pathlib import Path

import pytest

from agents import devices
from millrace.parts import describe_parts
from pipeline.errors import ConfigurationError
from pipeline.settings import load


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("cuda:0,", "empty place"),
        (",", "empty place"),
        ("cuda:0, ,cuda:1", "empty place"),
        ("cuda:0,cuda:1,cuda:0", "'cuda:0' is there twice"),
        ("cuda:0,cuda", "'cuda' cannot be in a list"),
        ("cpu,auto", "'auto' cannot be in a list"),
        ("cuda:01,cuda:1", "'cuda:01' cannot be in a list"),
        ("cuda:0,cuda:all", "'cuda:all' cannot be in a list"),
    ],
)
def test_a_wrong_list_is_refused(value: str, reason: str) -> None:
    """A list has different GPUs by number, or the CPU; the message names the setting and what is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        devices.listed(value)
    assert caught.value.message.startswith("MILLRACE_DEVICE: ")
    assert reason in caught.value.message


def test_each_device_has_settings_of_its_own() -> None:
    """Ports follow each other, names differ, cores are shared; what is set stays, and one device is as it was."""
    assert [devices.listed(one) for one in ("auto", "cuda:3", "nonsense")] == [
        ("auto",),
        ("cuda:3",),
        ("nonsense",),
    ]
    assert devices.listed(" cuda:1, cpu,cpu") == ("cuda:1", "cpu", "cpu")
    given = load(worker_port=8041, replica="pod-7", torch_threads=5)
    first, second = devices.shares(given, ("cuda:1", "cuda:0"))
    assert [(one.device, one.worker_port, one.replica) for one in (first, second)] == [
        ("cuda:1", 8041, "pod-7-0"), ("cuda:0", 8042, "pod-7-1"),
    ]  # fmt: skip
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(one.decode_threads, one.torch_threads) for one in (first, second)} == {(share, 5)}
    anywhere = devices.shares(load(), ("cpu", "cpu"))
    assert [one.worker_port for one in anywhere] == [0, 0]
    assert len({one.replica for one in anywhere}) == 2
    with pytest.raises(ConfigurationError, match="MILLRACE_WORKER_PORT"):
        devices.shares(load(worker_port=65535), ("cpu", "cpu"))


def test_up_has_a_worker_for_each_device(tmp_path: Path) -> None:
    """`millrace up` supervises a `predict` for each device, or as many as are wanted on them in turn."""
    for replicas, wanted in (({}, ["cuda:0", "cuda:1"]), ({"predict": 3}, ["cuda:0", "cuda:1", "cuda:0"])):
        parts = describe_parts(load(data_dir=tmp_path, device="cuda:0,cuda:1"), replicas)
        found = [(part.spec.argv[-1], part.spec.env.get("MILLRACE_DEVICE")) for part in parts]
        assert [device for step, device in found if step == "predict"] == wanted
        assert [device for step, device in found if step == "watch"] == ["cuda:0"]
