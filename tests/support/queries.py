"""What dashboards and rules ask Prometheus, taken apart: which metrics, with which labels."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser as promql
import yaml
from prometheus_client import Counter, Gauge, Histogram

from millrace import dashboards
from pipeline import metrics
from tests.support.manifests import COMPONENTS
from tests.support.promtool import rules

_OTHERS = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
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


def of_scaled_objects() -> list[Query]:
    """Return what KEDA asks Prometheus."""
    documents = [
        each
        for file in sorted(COMPONENTS.glob("scaling-*/*.yaml"))
        for each in yaml.safe_load_all(file.read_text("utf-8"))
    ]
    return [
        Query(f"KEDA: {trigger['name']}", trigger["metadata"]["query"])
        for each in documents
        if each["kind"] == "ScaledObject"
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "prometheus"
    ]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in all_rules() if "alert" in rule]


def queries() -> list[Query]:
    found = [
        Query(
            rule.get("alert") or rule["record"], rule["expr"], " ".join(rule.get("annotations", {}).values())
        )
        for rule in all_rules()
    ]
    return found + of_dashboards() + of_scaled_objects()


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
    found |= {name: set(re.findall(r"\w+", said)) for name, said in row.findall(_OTHERS.read_text("utf-8"))}
    return found


def selectors(expression: promql.Expr) -> Iterator[promql.VectorSelector]:
    """Yield what an expression asks for."""
    return (each for each in below(expression) if isinstance(each, promql.VectorSelector))


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
