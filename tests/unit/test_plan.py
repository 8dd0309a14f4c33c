"""`millrace plan`: its numbers, and a ScaledObject that KEDA's own schema accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from loadtest.autoscale import policies
from loadtest.autoscale.policies import Facts
from millrace.cli import app
from millrace.plan import Planned, parse_rate, plan
from pipeline.errors import ConfigurationError
from tests.support import scaling

EXAMPLE = ("plan", "--rate", "50/s", "--deadline", "5s", "--pod-rate", "120/s", "--start", "90s")
PATIENT = Facts()
COMPONENTS = Path(__file__).parents[2] / "k8s/strimzi/components"


def planned(rate: float, facts: Facts = PATIENT, price: float = 2.0) -> Planned:
    return plan(rate, facts, "deadline", price)


@pytest.mark.parametrize(
    ("text", "expected"), [("50/s", 50.0), ("3000/m", 50.0), ("7200/h", 2.0), ("0.5", 0.5)]
)
def test_rates_are_read(text: str, expected: float) -> None:
    """A rate is images for each second, minute or hour."""
    assert parse_rate(text) == expected


@pytest.mark.parametrize("text", ["", "0/s", "fast", "-1/s", "5/d", "1e9/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    """What is no rate gets an error that says what is one."""
    with pytest.raises(ValueError, match="no rate such as"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("rate", "partitions", "replicas"),
    [(50, 12, 1), (490, 12, 6), (700, 12, 6), (730, 24, 8), (3000, 60, 30)],
)
def test_a_plan_has_room_and_shares_evenly(rate: float, partitions: int, replicas: int) -> None:
    """Partitions are enough for twice the rate, and replicas the fewest that carry it and share them evenly."""
    found = planned(rate)
    assert (found.partitions, found.replicas) == (partitions, replicas)
    assert found.replicas in found.useful_replicas
    assert found.max_replicas == found.partitions
    assert found.replicas * PATIENT.pod_images_per_second >= rate


def test_too_much_is_refused() -> None:
    """A rate that no number of partitions carries is an error that says so."""
    with pytest.raises(ConfigurationError, match="360 partitions"):
        planned(1_000_000)


def test_costs_are_those_of_the_replicas() -> None:
    """A million images cost what all planned replicas cost for as long as they take to arrive."""
    found = planned(600.0, price=2.0)
    assert found.replicas == 6
    assert found.gpu_hours_per_million == round(6 * 1e6 / 600 / 3600, 2)
    assert found.cost_per_million == round(2 * 6 * 1e6 / 600 / 3600, 2)


def test_a_price_has_its_currency() -> None:
    """What a million images cost is said with what an hour costs, in the currency of the settings."""
    command = [*EXAMPLE, "--deadline", "5m", "--price", "3"]
    said = CliRunner().invoke(app, command, env={"MILLRACE_CURRENCY": "EUR"}).output
    assert "5.56 GPU hours, 16.67 at 3 EUR an hour" in said


@pytest.mark.parametrize(("deadline", "least"), [(300.0, 0), (140.0, 0), (139.0, 1), (5.0, 1)])
def test_only_who_starts_in_time_scales_to_zero(deadline: float, least: int) -> None:
    """With a deadline shorter than a pod takes to come, one is kept."""
    found = planned(50.0, Facts(deadline_seconds=deadline))
    assert (found.min_replicas, found.starts_in_time) == (least, least == 0)


def test_the_example_of_the_docs() -> None:
    """What is printed is one YAML document with the findings above it; with --json it is one object."""
    printed = CliRunner().invoke(app, EXAMPLE)
    assert printed.exit_code == 0
    as_json = CliRunner().invoke(app, [*EXAMPLE, "--json"])
    found = json.loads(as_json.output)
    assert yaml.safe_load(printed.output) == found["manifest"]
    assert found["lag_threshold"] == 300
    assert "past the deadline" in printed.output


@pytest.mark.parametrize("option", ["--rate", "--deadline", "--pod-rate", "--start"])
def test_bad_values_are_named(option: str) -> None:
    """A value that cannot be read ends with 2 and names its option."""
    arguments = list(EXAMPLE)
    arguments[arguments.index(option) + 1] = "soon"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert option in result.output


def manifests() -> list[dict[str, Any]]:
    found = []
    for deadline in (300.0, 5.0):
        facts = Facts(deadline_seconds=deadline, deployment="wildlife", topic_prefix="test.")
        found += [policies.deadline(facts).manifest(), policies.lag(facts).manifest()]
    return found


@pytest.mark.parametrize("manifest", manifests())
def test_manifests_are_what_keda_takes(manifest: dict[str, Any]) -> None:
    """Both policies' ScaledObjects are valid for KEDA, without a field or trigger parameter it does not know."""
    scaling.check(manifest)


@pytest.mark.parametrize("policy", ["deadline", "lag"])
def test_the_shipped_scaled_objects_are_planned(policy: str) -> None:
    """A component's ScaledObject is what `millrace plan` prints for the arguments in its first line."""
    made_by, _, text = (COMPONENTS / f"scaling-{policy}" / "scaled-object.yaml").read_text().partition("\n")
    command = made_by.removeprefix("# Made by: millrace ").split()
    assert command[:3] == ["plan", "--policy", policy]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0
    assert printed.output == text


@pytest.mark.parametrize("manifest", manifests())
def test_what_is_read_is_what_was_written(manifest: dict[str, Any]) -> None:
    """The simulator reads from a manifest the object that it was made from."""
    assert scaling.read(manifest).manifest() == manifest
