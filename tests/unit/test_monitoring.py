"""Dashboards and alerts ask for what is there, and say what to do."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser as promql
import pytest
from prometheus_client import Counter, Gauge, Histogram

from millrace import dashboards
from pipeline import dcgm, metrics
from tests.support.promtool import rules
from tests.unit.test_docs import anchors, page

#: What Prometheus adds to every series: docs/monitoring.md, labels.
TARGET_LABELS = {"namespace", "pod", "instance", "job", "workload"}
#: Of Grafana, as it puts them into queries.
VARIABLES = {
    r"\$__rate_interval": "5m",
    r"\$__range": "3h",
    r"\$namespace": ".*",
    r"\$(gpu_hour|kwh)": "2",
}


class Query(NamedTuple):
    """An expression, where it stands, and what is shown of its result's labels."""

    place: str
    text: str
    legend: str = ""


def panels(source: Path) -> list[dict[str, Any]]:
    return [each for each in json.loads(dashboards.render(source))["panels"] if each["type"] != "row"]


def of_dashboards() -> list[Query]:
    return [
        Query(f"{source.stem}: {panel['title']}", target["expr"], target["legendFormat"])
        for source in dashboards.sources()
        for panel in panels(source)
        for target in panel["targets"]
    ]


def all_rules() -> list[dict[str, Any]]:
    return [rule for spec in rules().values() for group in spec["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in all_rules() if "alert" in rule]


def queries() -> list[Query]:
    found = [
        Query(
            rule.get("alert") or rule["record"], rule["expr"], " ".join(rule.get("annotations", {}).values())
        )
        for rule in all_rules()
    ]
    return found + of_dashboards()


def parse(text: str) -> promql.Expr:
    for variable, value in VARIABLES.items():
        text = re.sub(variable, value, text)
    return promql.parse(text)


@cache
def known() -> dict[str, set[str]]:
    """Return the labels of every metric that there is, by name, without those of the target."""
    found: dict[str, set[str]] = {"process_start_time_seconds": set(), "process_resident_memory_bytes": set()}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter):
            found[f"{metric._name}_total"] = set(metric._labelnames)
        elif isinstance(metric, Gauge):
            found[metric._name] = set(metric._labelnames)
        elif isinstance(metric, Histogram):
            found |= {f"{metric._name}_{part}": set(metric._labelnames) for part in ("sum", "count")}
            found[f"{metric._name}_bucket"] = {*metric._labelnames, "le"}
    for rule in all_rules():
        if "record" in rule:
            found[rule["record"]] = labels(promql.parse(rule["expr"]), found)
    row = re.compile(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)*) \| \[", re.MULTILINE)
    found |= {name: set(re.findall(r"\w+", said)) for name, said in row.findall(page("docs/monitoring.md"))}
    return found


def below(expression: promql.Expr) -> Iterator[promql.Expr]:
    """Yield an expression and all that it is made of."""
    yield expression
    inner: Iterable[promql.Expr | None] = ()
    match expression:
        case promql.AggregateExpr():
            inner = (expression.expr, expression.param)
        case promql.BinaryExpr():
            inner = (expression.lhs, expression.rhs)
        case promql.Call():
            inner = expression.args
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            inner = (expression.expr,)
        case promql.MatrixSelector():
            inner = (expression.vector_selector,)
    for each in inner:
        if each is not None:
            yield from below(each)


def labels(expression: promql.Expr, metrics_known: dict[str, set[str]]) -> set[str]:
    """Return the labels that a result may have."""
    match expression:
        case promql.AggregateExpr():
            kept = expression.modifier
            return set(kept.labels) if kept is not None else set()
        case promql.BinaryExpr():
            left, right = labels(expression.lhs, metrics_known), labels(expression.rhs, metrics_known)
            if str(expression.op) == "or":
                return left | right
            matching = expression.modifier.matching if expression.modifier is not None else None
            if matching is None or str(expression.op) in {"and", "unless"}:
                return left or right
            return left & set(matching.labels)
        case promql.VectorSelector():
            return metrics_known[expression.name or ""] | TARGET_LABELS
        case promql.NumberLiteral() | promql.StringLiteral():
            return set()
    found: set[str] = set()
    for each in list(below(expression))[1:]:
        found |= labels(each, metrics_known)
        if not isinstance(each, promql.NumberLiteral | promql.StringLiteral):
            break
    return found - (
        {"le"} if isinstance(expression, promql.Call) and "quantile" in str(expression.func.name) else set()
    )


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
