"""`millrace plan`: its numbers, and a ScaledObject that KEDA's own schema accepts."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from loadtest.autoscale import policies
from loadtest.autoscale.policies import Facts
from millrace.cli import app
from millrace.plan import Planned, parse_rate, plan
from pipeline.errors import ConfigurationError

EXAMPLE = ("plan", "--rate", "50/s", "--deadline", "5s", "--pod-rate", "120/s", "--start", "90s")
PATIENT = Facts()


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


def schemas() -> Path:
    folder = os.environ.get("MILLRACE_SCHEMAS")
    if not folder:
        pytest.skip("MILLRACE_SCHEMAS is not set: KEDA's schemas are not checked against")
    return Path(folder)


def strict(schema: Any) -> Any:
    """Return a CRD's schema in which unknown fields fail."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields", False)
        found["additionalProperties"] = bool(open_ended)
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


def manifests() -> list[dict[str, Any]]:
    found = []
    for deadline in (300.0, 5.0):
        facts = Facts(deadline_seconds=deadline, deployment="wildlife", topic_prefix="test.")
        found += [policies.deadline(facts).manifest(), policies.lag(facts).manifest()]
    return found


@pytest.mark.parametrize("manifest", manifests())
def test_manifests_are_what_keda_takes(manifest: dict[str, Any]) -> None:
    """Both policies' ScaledObjects are valid for KEDA, without a field or trigger parameter it does not know."""
    crd = yaml.safe_load((schemas() / "keda.sh_scaledobjects.yaml").read_text("utf-8"))
    schema = strict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(manifest)
    catalogue = json.loads((schemas() / "keda-scalers.json").read_bytes())["scalers"]
    known = {
        each["type"]: {parameter["name"]: parameter for parameter in each["parameters"]} for each in catalogue
    }
    for trigger in manifest["spec"]["triggers"]:
        parameters = known[trigger["type"]]
        assert set(trigger["metadata"]) <= set(parameters)
        needed = {
            name
            for name, parameter in parameters.items()
            if not parameter.get("optional") and "default" not in parameter
        }
        assert needed <= set(trigger["metadata"])
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
