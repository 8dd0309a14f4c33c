"""The rules, as data: what is looked at, limits with hysteresis, how long, and what a person should do.

`rules.yaml` and `xid.yaml` beside this file are read and checked once; an operator's file adds to them, replaces
rules of the same name, or all of them. A mistake in it is a `ConfigurationError` that names the rule. No torch.
"""

import re
import string
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from pipeline import dcgm
from pipeline.errors import ConfigurationError
from pipeline.telemetry import Name, Severity, Text

Statistic = Literal["mean", "minimum", "maximum", "last", "increase", "hourly", "share"]
Compare = Literal["value", "peers", "history"]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]

#: What is made of fields, by name: unit and meaning. `score.py` computes them.
DERIVED: dict[str, tuple[str, str]] = {
    "thermal_margin_celsius": (
        "C",
        "degrees left to slowdown: the margin (0 or less: if clocks agree), else slowdown less temperature",
    ),
    "thermal_violation_ratio": ("", "the share of the time that it was slowed down by heat, by its counter"),
    "power_moved_watts": (
        "W",
        "how far power went up and down between windows while the temperature stood at the very same degree",
    ),
    "memory_used_ratio": ("", "used memory of all memory"),
    "power_ratio": ("", "power of the enforced limit, else of what it drew under load in its past"),
    "memory_trend": (
        "",
        "Kendall's tau of used memory over the last windows: 1 grows always, -1 shrinks always",
    ),
    "memory_growth_ratio": ("", "what used memory grew by over the last windows, of all memory"),
    "memory_before_ratio": ("", "used memory of all memory at the beginning of those windows"),
    "peers_alike": (
        "",
        "1: it and most peers hold about the same memory, as GPUs of one job do, or memory is not known; 0: not so",
    ),
    "busy_percent": ("%", "utilization, else the graphics engine's share"),
    "peers_utilization_percent": ("%", "median utilization of the GPUs that share the key"),
    "allocated": ("", "1: memory is held, or labels name a container, pod or job; 0: nobody uses it"),
    "model_score": ("", "what the learned model says, where one is configured"),
    "lost": ("", "1: the driver lost it, or it sends nothing while its host goes on; 0: it is there"),
}
Decoded = TypeVar("Decoded")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_COUNTERS = frozenset(field.name for field in dcgm.FIELDS if field.kind == "counter")
#: What a message may use.
MESSAGE_NAMES = frozenset({"value", "limit", "field", "minutes", "gpu_uuid", "host", "index"})


class Clause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison: a statistic of a field over the window, or something derived, against a limit."""

    field: Name
    statistic: Statistic = "mean"
    #: `peers`: modified z-score among the GPUs that share the key; `history`: z-score against its own past.
    compare: Compare = "value"
    #: Of a bitmask: the share of samples with any of these.
    bits: tuple[str, ...] = ()
    above: float | None = None
    below: float | None = None
    #: A condition that holds ends only beyond this; the limit itself when not given.
    clear: float | None = None

    @property
    def limit(self) -> float:
        """The number that begins a condition."""
        return self.above if self.above is not None else float(self.below or 0.0)

    @property
    def mask(self) -> int:
        """The bits as a number."""
        return sum(dcgm.CLOCK_EVENTS[name] for name in self.bits)


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition of a GPU: it holds while all of `when` and, if there are any, one of `any_of` hold."""

    name: Name
    severity: Severity
    when: tuple[Clause, ...] = ()
    any_of: tuple[Clause, ...] = ()
    #: Not applied where one of these is known: a better rule looks at it.
    unless_known: tuple[Name, ...] = ()
    #: It fires when it held for so long, and in so many windows; gaps that `keep_seconds` bridges do not count.
    for_seconds: NotNegative = 0.0
    for_windows: Annotated[int, msgspec.Meta(ge=1)] = 1
    #: It stays so long after it last held: for what comes and goes, or is seen once and matters longer.
    keep_seconds: NotNegative = 0.0
    message: Text
    action: Name
    runbook: Text
    source: Text

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """`any_of` first: the one of them that holds says what was seen."""
        return self.any_of + self.when


class Xid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an XID error means; a benign one raises nothing."""

    code: Annotated[int, msgspec.Meta(ge=0, le=100_000)]
    name: Text
    action: Name
    severity: Severity = "critical"
    benign: bool = False
    #: The condition stays so long after the error was last seen.
    hold_seconds: NotNegative | None = None


class XidTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`xid.yaml`."""

    version: str
    source: Text
    hold_seconds: Positive = 1800.0
    #: How codes that are not listed are treated.
    unknown: Xid
    runbooks: dict[Name, Text]
    xids: tuple[Xid, ...]

    @cached_property
    def _by_code(self) -> dict[int, Xid]:
        return {xid.code: xid for xid in self.xids}

    def find(self, code: int) -> Xid:
        """Return what is known of a code."""
        return self._by_code.get(code, self.unknown)

    def hold(self, code: int) -> float:
        """Return for how many seconds its condition stays."""
        found = self.find(code).hold_seconds
        return self.hold_seconds if found is None else found


class Floor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least deviation that counts, absolute or as a share of the middle, whichever is more.

    Identical GPUs with fixed clocks deviate by nothing, and any difference would be infinitely strange.
    """

    absolute: Positive
    relative: NotNegative = 0.0


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How GPUs are compared with each other and with their past."""

    min_peers: Annotated[int, msgspec.Meta(ge=2)] = 4
    #: Weight of a new window in the averages of a GPU's own past.
    history_weight: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    #: So many windows before its own past says anything.
    min_history: Annotated[int, msgspec.Meta(ge=2)] = 20
    #: Windows with less utilization at any moment are not of its past: clocks of an idle GPU say nothing.
    load_percent: NotNegative = 50.0
    #: While a condition holds the past stands still, so that a fault does not become the norm; not for longer.
    hold_history_seconds: Positive = 6 * 3600.0
    #: Windows that a trend is taken over.
    trend_windows: Annotated[int, msgspec.Meta(ge=3, le=60)] = 10
    #: From so much used memory on a GPU counts as allocated.
    allocated_mebibytes: Positive = 1024.0
    #: A GPU that is away for longer is forgotten.
    forget_seconds: Positive = 24 * 3600.0
    #: A condition whose inputs are not known any more ends after this.
    stale_seconds: Positive = 900.0
    floors: dict[Name, Floor]


class RuleBook(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """All that detection is told from outside."""

    version: str
    comparison: Comparison
    rules: tuple[Rule, ...]
    xids: XidTable


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: str
    #: In an operator's file: the built-in rules do not apply.
    replace: bool = False
    disable: tuple[Name, ...] = ()
    comparison: dict[str, object] = {}
    rules: tuple[Rule, ...] = ()
    xids: tuple[Xid, ...] = ()


def load_rules(path: Path | None = None) -> RuleBook:
    """Read the built-in rules, and an operator's file over them.

    Raises:
        ConfigurationError: what is wrong with which rule.
    """
    here = resources.files("pipeline.detection")
    table = _decode(here.joinpath("xid.yaml").read_bytes(), XidTable, "xid.yaml")
    own = _decode(here.joinpath("rules.yaml").read_bytes(), _File, "rules.yaml")
    book = _checked(own.version, own.comparison, own.rules, table, "rules.yaml")
    if path is None:
        return book
    where = f"MILLRACE_RULES_FILE: {path}"
    try:
        given = _decode(path.read_bytes(), _File, where)
    except OSError as error:
        raise ConfigurationError(f"{where}: {error.strerror}") from None
    rules = {} if given.replace else {rule.name: rule for rule in own.rules}
    unknown = [name for name in given.disable if name not in rules]
    if unknown:
        raise ConfigurationError(f"{where}: disable: there is no rule {', '.join(unknown)}")
    if len({rule.name for rule in given.rules}) < len(given.rules):
        raise ConfigurationError(f"{where}: a rule is there twice")
    rules = {name: rule for name, rule in rules.items() if name not in given.disable}
    rules |= {rule.name: rule for rule in given.rules}
    xids = {xid.code: xid for xid in table.xids} | {xid.code: xid for xid in given.xids}
    table = msgspec.structs.replace(table, xids=tuple(xids.values()))
    comparison = own.comparison | given.comparison
    floors = comparison.get("floors")
    if isinstance(floors, dict) and isinstance(base := own.comparison.get("floors"), dict):
        comparison["floors"] = base | floors
    return _checked(f"{own.version}+{given.version}", comparison, tuple(rules.values()), table, where)


def _decode(text: bytes, kind: type[Decoded], where: str) -> Decoded:
    try:
        return msgspec.yaml.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _checked(
    version: str, comparison: dict[str, object], rules: tuple[Rule, ...], xids: XidTable, where: str
) -> RuleBook:
    try:
        compared = msgspec.convert(comparison, Comparison)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: comparison: {error}") from None
    for rule in rules:
        if fault := _fault(rule, compared):
            raise ConfigurationError(f"{where}: rule {rule.name}: {fault}")
    codes = [xid.code for xid in xids.xids]
    if len(set(codes)) < len(codes):
        raise ConfigurationError(f"{where}: an XID is there twice")
    return RuleBook(version=version, comparison=compared, rules=rules, xids=xids)


def _fault(rule: Rule, comparison: Comparison) -> str | None:
    if not _NAME.fullmatch(rule.name) or rule.name.startswith("xid_"):
        return "a name has small letters, digits and _, and xid_… is taken"
    if not rule.clauses:
        return "it has no clause"
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(rule.message) if name is not None}
    except ValueError as error:
        return f"message: {error}"
    if names - MESSAGE_NAMES:
        return f"message: there is no {', '.join(sorted(names - MESSAGE_NAMES))}"
    return next((fault for clause in rule.clauses if (fault := _clause_fault(clause, comparison))), None)


def _clause_fault(clause: Clause, comparison: Comparison) -> str | None:
    where = clause.field
    if (clause.above is None) == (clause.below is None):
        return f"{where}: needs either above or below"
    if clause.clear is not None:
        wrong = clause.clear > clause.limit if clause.above is not None else clause.clear < clause.limit
        if wrong:
            return f"{where}: clear lies on the wrong side of the limit"
    if (clause.statistic == "share") != bool(clause.bits):
        return f"{where}: share and bits belong together"
    if unknown := set(clause.bits) - set(dcgm.CLOCK_EVENTS):
        return f"{where}: there is no bit {', '.join(sorted(unknown))}"
    if clause.bits and clause.field != "clock_event_reasons":
        return f"{where}: only clock_event_reasons has bits"
    if clause.statistic in {"increase", "hourly"} and clause.field not in _COUNTERS:
        return f"{where}: {clause.statistic} is for counters"
    if clause.compare != "value":
        if clause.field not in comparison.floors:
            return f"{where}: to be compared it needs a floor"
        if clause.statistic != "mean" or clause.field in DERIVED:
            return f"{where}: means of fields are compared"
    if clause.field in DERIVED and clause.statistic != "mean":
        return f"{where}: what is derived has no statistic"
    return None
