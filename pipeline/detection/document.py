"""The tables of docs/detection.md, from the rules and the kept score: `python -m pipeline.detection.document`.

A test keeps the page current.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.detection.rules import DERIVED, Clause, Rule, RuleBook, load_rules

PAGE = Path("docs/detection.md")
#: What `millrace bench-telemetry detection --write` keeps.
SCORE = Path("docs/benchmarks/telemetry.json")
_SIGNS = {"value": "", "peers": ", score among peers", "history": ", score against its past"}


def render(page: str, book: RuleBook, score: Mapping[str, Any]) -> str:
    """Return the page with its tables brought up to date; `score` is what `SCORE` keeps as `detection`."""
    for name, table in (
        ("score", _score(score)),
        ("rules", _rules(book)),
        ("inputs", _inputs()),
        ("xids", _xids(book)),
        ("floors", _floors(book)),
    ):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


def _score(score: Mapping[str, Any]) -> str:
    rows = [
        f"| `{name}` | {kind['found']} of {kind['injected']} | {kind['false_alerts']} "
        f"| {kind['precision']:g} | {kind['recall']:g} | {kind['median_delay_windows']} |"
        for name, kind in score["kinds"].items()
    ]
    rows += [
        f"| `{name}`: nobody's fault | nothing to find in {kind['injected']} | {kind['alerts']} | | | |"
        for name, kind in score["quiet"].items()
    ]
    slow = [f"`{name}`" for name, kind in score["kinds"].items() if (kind["median_delay_windows"] or 0) > 2]
    intro = (
        f"Rules of version {score['rules_version']}. All kinds: precision {score['precision']:g}, recall "
        f"{score['recall']:g}, median delay {score['median_delay_windows']:g} windows; "
        f"{score['healthy_alerts']} alerts in {score['healthy_gpu_hours']:g} hours of healthy GPUs. "
        f"More than two windows: {', '.join(slow) or 'none'}."
    )
    head = "fault | found | false alerts | precision | recall | median delay, windows of a minute"
    return _table(intro, head, rows)


def _rules(book: RuleBook) -> str:
    rows = [
        f"| `{rule.name}` | {rule.severity} | {_conditions(rule)} | {_patience(rule)} "
        f"| `{rule.action}` | {rule.source} |"
        for rule in book.rules
    ]
    return _table(
        f"Version {book.version}.", "rule | severity | holds while | patience | action | source", rows
    )


def _conditions(rule: Rule) -> str:
    parts = [_clause(clause) for clause in rule.when]
    if rule.any_of:
        parts.append("one of: " + "; ".join(_clause(clause) for clause in rule.any_of))
    if rule.unless_known:
        parts.append("not where known: " + ", ".join(f"`{name}`" for name in rule.unless_known))
    return "<br>".join(parts)


def _clause(clause: Clause) -> str:
    what = f"`{clause.field}`" + _SIGNS[clause.compare]
    if clause.bits:
        what = "share of samples with " + ", ".join(f"`{bit}`" for bit in clause.bits)
    elif clause.statistic != "mean":
        what += f", {clause.statistic}"
    sign = ">" if clause.above is not None else "<"
    return f"{what} {sign} {clause.limit:g}" + (
        "" if clause.clear is None else f" (ends at {clause.clear:g})"
    )


def _patience(rule: Rule) -> str:
    texts = [f"fires after {rule.for_seconds:g} s" if rule.for_seconds else "fires at once"]
    if rule.for_windows > 1:
        texts.append(f"{rule.for_windows} windows at least")
    if rule.keep_seconds:
        texts.append(f"stays {rule.keep_seconds:g} s")
    return ", ".join(texts)


def _inputs() -> str:
    rows = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in DERIVED.items()]
    return _table("", "input | unit | is", rows)


def _floors(book: RuleBook) -> str:
    rows = [
        f"| `{name}` | {floor.absolute:g} | {floor.relative:.0%} |"
        for name, floor in book.comparison.floors.items()
    ]
    return _table("", "field | least deviation | of the middle", rows)


def _xids(book: RuleBook) -> str:
    table = book.xids
    rows = [
        f"| {xid.code} | {xid.name} | `{xid.action}` | {'none: benign' if xid.benign else xid.severity} |"
        for xid in table.xids
    ]
    intro = f"Version {table.version}: {table.source} A condition stays for {table.hold_seconds:g} s."
    return _table(intro, "XID | is | action | alert", rows)


def _table(intro: str, head: str, rows: list[str]) -> str:
    line = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([*([intro, ""] if intro else []), f"| {head} |", line, *rows])


if __name__ == "__main__":
    kept = json.loads(SCORE.read_text())["detection"]
    PAGE.write_text(render(PAGE.read_text(), load_rules(), kept))
    print(f"{PAGE} is current", file=sys.stderr)
