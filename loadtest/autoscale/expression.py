"""The part of expr-lang 1.17 that a KEDA formula needs: numbers, nil, ternaries, ??, arithmetic, functions.

Division by zero gives infinity and 0/0 NaN, as in Go; a formula that does arithmetic on nil fails, as in KEDA.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping

Value = float | bool | None
Variables = Mapping[str, float | None]
Node = Callable[[Variables], Value]

_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?)|([A-Za-z_]\w*)|(\?\?|\*\*|[<>=!]=|&&|\|\||[-+*/%^<>!?:(),]))"
)
# parser/operator/operator.go of expr-lang; ?? binds closer than anything else.
_BINDING = {
    "||": 10, "or": 10, "&&": 15, "and": 15,
    "==": 20, "!=": 20, "<": 20, ">": 20, "<=": 20, ">=": 20,
    "+": 30, "-": 30, "*": 60, "/": 60, "**": 100, "^": 100, "??": 500,
}  # fmt: skip
_NEGATION = {"!": 50, "not": 50, "-": 90, "+": 90}


class FormulaError(ValueError):
    """A formula that cannot be read or computed."""


def compile_formula(text: str) -> Callable[[Variables], float]:
    """Read a formula once; the result computes it for values of the triggers, None for one that failed.

    Raises:
        FormulaError: it cannot be read. The returned callable raises it for what cannot be computed.
    """
    parser = _Parser(_tokens(text))
    node = parser.ternary()
    if parser.here:
        raise FormulaError(f"unexpected {parser.here!r}")

    def compute(variables: Variables) -> float:
        return _number(node(variables))

    return compute


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise FormulaError(f"cannot read {text[place : place + 20]!r}")
        found.append(match[0].strip())
        place = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def here(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, wanted: str | None = None) -> str:
        token = self.here
        if not token or (wanted is not None and token != wanted):
            raise FormulaError(f"expected {wanted or 'a value'}, found {token or 'the end'}")
        self._at += 1
        return token

    def ternary(self) -> Node:
        condition = self._binary(0)
        if self.here != "?":
            return condition
        self._take()
        yes = self.ternary()
        self._take(":")
        no = self.ternary()
        return lambda variables: yes(variables) if _truth(condition(variables)) else no(variables)

    def _binary(self, least: int) -> Node:
        left = self._unary()
        while (binding := _BINDING.get(self.here, -1)) >= max(least, 1):
            operator = self._take()
            # Only powers associate to the right.
            right = self._binary(binding if operator in ("**", "^") else binding + 1)
            left = _combine(operator, left, right)
        return left

    def _unary(self) -> Node:
        if self.here not in _NEGATION:
            return self._primary()
        operator = self._take()
        inner = self._binary(_NEGATION[operator])
        if operator in ("!", "not"):
            return lambda variables: not _truth(inner(variables))
        sign = -1.0 if operator == "-" else 1.0
        return lambda variables: sign * _number(inner(variables))

    def _primary(self) -> Node:
        token = self._take()
        if token == "(":
            inner = self.ternary()
            self._take(")")
            return inner
        if token[0].isdigit():
            number = float(token)
            return lambda _: number
        if token in ("true", "false", "nil"):
            constant = {"true": True, "false": False, "nil": None}[token]
            return lambda _: constant
        if not token[0].isalpha() and token[0] != "_":
            raise FormulaError(f"unexpected {token!r}")
        return self._call(token) if self.here == "(" else _variable(token)

    def _call(self, name: str) -> Node:
        function = _FUNCTIONS.get(name)
        if function is None:
            raise FormulaError(f"unknown function {name}")
        self._take("(")
        arguments = [self.ternary()]
        while self.here == ",":
            self._take()
            arguments.append(self.ternary())
        self._take(")")
        return lambda variables: function([_number(argument(variables)) for argument in arguments])


def _variable(name: str) -> Node:
    def look_up(variables: Variables) -> Value:
        if name not in variables:
            raise FormulaError(f"unknown trigger {name}")
        return variables[name]

    return look_up


def _combine(operator: str, left: Node, right: Node) -> Node:
    if operator == "??":
        return lambda variables: right(variables) if left(variables) is None else left(variables)
    if operator in ("&&", "and"):
        return lambda variables: _truth(left(variables)) and _truth(right(variables))
    if operator in ("||", "or"):
        return lambda variables: _truth(left(variables)) or _truth(right(variables))
    if operator in ("==", "!="):
        return lambda variables: (left(variables) == right(variables)) == (operator == "==")
    function = _ARITHMETIC[operator]
    return lambda variables: function(_number(left(variables)), _number(right(variables)))


def _divide(left: float, right: float) -> float:
    if right:
        return left / right
    return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)


def _whole(rounding: Callable[[float], int]) -> Callable[[list[float]], float]:
    return lambda values: float(rounding(values[0])) if math.isfinite(values[0]) else values[0]


_ARITHMETIC: dict[str, Callable[[float, float], Value]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
    "**": math.pow,
    "^": math.pow,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}
_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "min": min,
    "sum": math.fsum,
    "mean": statistics.fmean,
    "median": statistics.median,
    "abs": lambda values: abs(values[0]),
    "ceil": _whole(math.ceil),
    "floor": _whole(math.floor),
    "round": _whole(lambda value: math.floor(value + 0.5)),
}


def _number(value: Value) -> float:
    if value is None or isinstance(value, bool):
        raise FormulaError("not a number: " + ("nil" if value is None else str(value).lower()))
    return value


def _truth(value: Value) -> bool:
    if not isinstance(value, bool):
        raise FormulaError("a condition must be true or false")
    return value
