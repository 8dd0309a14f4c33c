"""`millrace k8s doctor` on a real API server: what it says of an empty, a sound and a broken installation."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import external_metrics, sound
from tests.cluster.control_plane import ControlPlane

pytestmark = pytest.mark.timeout(600)

HERE = "sound"


def doctor(plane: ControlPlane, namespace: str = HERE) -> tuple[int, list[dict[str, Any]], str]:
    """Run the command as a person would; return its exit code, its findings, and what it said on stderr."""
    command = [sys.executable, "-m", "millrace", "k8s", "doctor", "--json", "--namespace", namespace]
    ran = subprocess.run(command, env=plane.environment(), capture_output=True, text=True)
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr


def faults(findings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["check"], each["detail"]) for each in findings if each["status"] == "fault"]


@pytest.fixture(scope="module")
def installed(
    plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ControlPlane, external_metrics.Adapter]]:
    """Have a sound installation, as far as the API server can tell."""
    sound.install(plane, HERE)
    with external_metrics.serving(plane, tmp_path_factory.mktemp("adapter")) as adapter:
        yield plane, adapter


Installed = tuple[ControlPlane, external_metrics.Adapter]


def test_a_namespace_that_is_not_there(plane: ControlPlane) -> None:
    """Of a cluster without Millrace it says what to apply."""
    code, findings, _ = doctor(plane, "nowhere")
    assert code == 1
    assert ("namespace", "nowhere is not there") in faults(findings)
    assert [each["mend"] for each in findings if each["check"] == "namespace"] == [
        "apply an overlay: kubectl apply -k k8s/strimzi/overlays/dev"
    ]


def test_nothing_is_at_fault(installed: Installed) -> None:
    """Of an installation that is as its operators would have it, no check finds a fault."""
    code, findings, _ = doctor(installed[0])
    assert faults(findings) == []
    assert code == 0
    assert "4 nvidia.com/gpu on 1 nodes" in [each["detail"] for each in findings if each["check"] == "gpus"]


@pytest.mark.parametrize("metric", ["s0-kafka-predictions-v1", "composite-metric"])
def test_a_metric_that_keda_cannot_read(installed: Installed, metric: str) -> None:
    """A lag that the HPA does not see is a fault, and so is a formula without result."""
    plane, adapter = installed
    adapter.broken = {metric}
    code, findings, _ = doctor(plane)
    adapter.broken = set()
    assert code == 1
    (found,) = faults(findings)
    assert found[0] == "lag"
    assert f"no value of {metric} for" in found[1]


def test_a_secret_that_is_missing(installed: Installed) -> None:
    """A secret that pods wait for is named, and how it is made; its value is never asked for."""
    plane, _ = installed
    kept = plane.items("secret", "millrace-database", f"--namespace={HERE}")[0]
    plane.kubectl("delete", "secret", "millrace-database", f"--namespace={HERE}")
    code, findings, _ = doctor(plane)
    kept["metadata"] = {"name": "millrace-database", "namespace": HERE}
    sound.create(plane, kept)
    assert code == 1
    assert ("secrets", "secret millrace-database is missing") in faults(findings)


def test_someone_who_may_not_look(installed: Installed) -> None:
    """What a user may not read is not known, and no fault."""
    plane, _ = installed
    plane.kubectl("create", "serviceaccount", "nobody", "--namespace=default")
    token = plane.kubectl("create", "token", "nobody", "--namespace=default").strip()
    config = json.loads(plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    limited = plane.folder / "limited"
    limited.write_text(json.dumps(config))
    command = [sys.executable, "-m", "millrace", "k8s", "doctor", "--json", "--namespace", HERE]
    environment = plane.environment() | {"KUBECONFIG": str(limited)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    findings = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [each["status"] for each in findings if each["check"] in ("pods", "secrets", "kafka", "gpus")] == [
        "off"
    ] * 4


def test_no_cluster(plane: ControlPlane, tmp_path: Path) -> None:
    """Where nobody answers it ends with 69 and one line."""
    config = json.loads(plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "config").write_text(json.dumps(config))
    environment = plane.environment() | {"KUBECONFIG": str(tmp_path / "config")}
    command = [sys.executable, "-m", "millrace", "k8s", "doctor"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 69
    assert len(ran.stderr.splitlines()) == 1
    assert os.linesep not in ran.stdout
