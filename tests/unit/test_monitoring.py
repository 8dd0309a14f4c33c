"""Dashboards, alerts and KEDA ask for what is there, and say what to do."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from millrace import dashboards
from pipeline import dcgm
from tests.support.queries import TARGET_LABELS, Query, alerts, below, known, labels, panels, parse, queries
from tests.unit.test_docs import anchors, page


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.place)
def test_every_metric_and_label_exists(query: Query) -> None:
    """An expression parses and asks for metrics and labels that somebody shows, and its text names no other."""
    expression = parse(query.text)
    for each in below(expression):
        if isinstance(each, promql.VectorSelector):
            assert each.name in known(), f"{query.place}: nobody shows {each.name}"
            matched = {matcher.name for matcher in each.matchers.matchers} | {
                matcher.name for group in each.matchers.or_matchers for matcher in group
            }
            assert matched <= known()[each.name] | TARGET_LABELS
        if isinstance(each, promql.AggregateExpr) and each.modifier is not None:
            assert set(each.modifier.labels) <= labels(each.expr, known()), query.place
    shown = set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", query.legend))
    assert shown <= labels(expression, known()), query.place


@pytest.mark.parametrize("source", dashboards.sources(), ids=lambda source: source.stem)
def test_dashboards_are_as_their_sources_say(source: Path) -> None:
    """The JSON beside a source was made from it, and its ConfigMap carries it."""
    made = source.with_suffix(".json")
    assert made.read_text("utf-8") == dashboards.render(source), "run `make dashboards`"
    assert f"files: [{made.name}]" in (dashboards.FOLDER / "kustomization.yaml").read_text("utf-8")


@pytest.mark.parametrize("source", dashboards.sources(), ids=lambda source: source.stem)
def test_every_panel_can_be_read(source: Path) -> None:
    """A panel has a title of its own, a unit and words on what to do; none covers another."""
    made = json.loads(dashboards.render(source))
    shown = panels(source)
    assert len({panel["title"] for panel in shown}) == len(shown)
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells
        assert max(x for x, _ in covered) < 24
        cells |= covered
    for panel in shown:
        assert len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for name in re.findall(r"\bMillrace[A-Z]\w+", panel["description"]):
            assert name in {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """An alert has a severity, says what it saw, leads into the runbook, and keeps its namespace for routing."""
    assert rule["labels"] == {"severity": rule["labels"]["severity"], "app": "millrace"}
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    said = rule["annotations"]
    assert said["summary"]
    assert "$value" in said["description"]
    file, _, anchor = said["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    assert anchor in anchors(page(file))
    assert "namespace" in labels(promql.parse(rule["expr"]), known())


def test_the_runbook_knows_no_other_alerts() -> None:
    """Every heading of the runbook that looks like an alert is one."""
    named = set(re.findall(r"^### (Millrace\w+)$", page("docs/runbook.md"), re.MULTILINE))
    assert named == {rule["alert"] for rule in alerts()}


def test_names_of_dcgm_are_those_that_we_read() -> None:
    """What dashboards ask of dcgm-exporter is in our own table of its fields."""
    asked = {name for query in queries() for name in re.findall(r"\bDCGM_FI_(\w+)", query.text)}
    assert asked
    assert {name for name in asked if dcgm.find(f"DCGM_FI_{name}") is None} == set()
