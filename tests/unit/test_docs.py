"""Documentation agrees with the code: nothing that can be set, seen or sent is missing, and no link is broken."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import typer
from prometheus_client import Counter, Gauge, Histogram
from pydantic_core import PydanticUndefined

from millrace import cli
from pipeline import dcgm, errors, metrics
from pipeline.errors import MillraceError
from pipeline.settings import PREFIX, Settings
from pipeline.topics import DAY_SECONDS, TOPICS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("k8s/**/*.md")]
)
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_NODE = re.compile(r"(?P<path>tests/[\w/]+\.py)::(?P<name>\w+)")
_PATH = re.compile(
    r"`((?:pipeline|agents|gateway|loadtest|millrace|tests|docs|requirements|k8s)/[\w./*<>-]*)`"
)


@cache
def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Each link to a file, heading or test of this repository is one that exists."""
    broken = []
    for link in _LINK.finditer(_FENCE.sub("", page(name))):
        target, _, anchor = unquote(link["target"]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        test = link["text"].strip("`")
        exists = path.exists() and (not anchor or anchor in anchors(path.read_text("utf-8")))
        if not exists or (test.startswith("test_") and test not in functions(path)):
            broken.append(link[0])
    for node in _NODE.finditer(page(name)):
        path = ROOT / node["path"]
        if not path.exists() or node["name"] not in functions(path):
            broken.append(node[0])
    assert broken == []


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    """A file or folder of ours that a page names in code style exists, by name or by pattern."""
    named = (re.sub(r"<[^>]*>", "*", path) for path in _PATH.findall(page(name)))
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", PAGES)
def test_named_settings_exist(name: str) -> None:
    """A page names no setting that is not there."""
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    known.add("MILLRACE_SCHEMAS")  # a folder that tests of manifests read
    named = set(re.findall(rf"\b{PREFIX}[A-Z][A-Z_]*[A-Z]\b", page(name)))
    assert {name for name in named - known if not name.startswith(f"{PREFIX}TEST_")} == set()


def setting_row(name: str) -> str:
    """Return the row of the tables in docs/configuration.md that a setting must have."""
    field = Settings.model_fields[name]
    assert field.default is not PydanticUndefined
    default = field.default
    if default is None or default == "":
        shown = ""
    elif isinstance(default, bool):
        shown = f"`{str(default).lower()}`"
    else:
        shown = f"`{default}`"
    values = get_args(field.annotation)
    choices = [f"`{value}`" for value in values if isinstance(value, str)]
    meaning = f"{field.description} One of {', '.join(choices)}." if choices else field.description
    return f"| `{PREFIX}{name.upper()}` | {shown} | {meaning} |"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    """docs/configuration.md has each setting with its default and its meaning."""
    assert setting_row(name) in page("docs/configuration.md").splitlines()


def metric_row(metric: Counter | Gauge | Histogram) -> str:
    """Return how the row of docs/metrics.md that a metric must have begins."""
    kind = type(metric).__name__.lower()
    name = metric._name + ("_total" if kind == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{name}` | {kind} | {labels} | {metric._documentation} |"


@pytest.mark.parametrize(
    "metric",
    [value for value in vars(metrics).values() if isinstance(value, Counter | Gauge | Histogram)],
    ids=lambda metric: metric._name,
)
def test_every_metric_is_documented(metric: Counter | Gauge | Histogram) -> None:
    """docs/metrics.md has each metric with its labels, its meaning, and what to do about it."""
    begin = metric_row(metric)
    rows = [line for line in page("docs/metrics.md").splitlines() if line.startswith(begin)]
    assert len(rows) == 1, begin
    assert rows[0].removeprefix(begin).strip(" |")


def error_classes(root: type[MillraceError] = MillraceError) -> list[type[MillraceError]]:
    return [root, *(found for child in root.__subclasses__() for found in error_classes(child))]


def test_every_error_code_is_documented() -> None:
    """docs/delivery.md says of each error code of the tree what it means and what happens."""
    codes = {found.code for found in error_classes() if found.__module__ == errors.__name__}
    documented = set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", page("docs/delivery.md"), re.MULTILINE))
    assert documented == codes


def test_every_topic_is_documented() -> None:
    """docs/architecture.md has each topic as the table has it."""
    for topic in TOPICS:
        kept = (
            "the latest of each key" if topic.compacted else f"{topic.retention_seconds // DAY_SECONDS} days"
        )
        readers = ", ".join((*topic.consumers, *topic.followers))
        row = (
            f"| `{topic.name}` | {topic.key} | {topic.partitions} | {kept} "
            f"| {topic.max_record_bytes:,} bytes | {', '.join(topic.producers)} | {readers} |"
        )
        assert row in page("docs/architecture.md").splitlines()


def commands(group: Any, path: str = "millrace") -> list[str]:
    """Return every command below a group, without the groups themselves."""
    found = []
    for name, command in group.commands.items():
        inner = f"{path} {name}"
        found += commands(command, inner) if hasattr(command, "commands") else [inner]
    return found


def test_every_command_is_documented() -> None:
    """docs/cli.md has each command of the command line."""
    rows = set(re.findall(r"^\| `(millrace [a-z0-9 -]+)` \|", page("docs/cli.md"), re.MULTILINE))
    assert rows == set(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", PAGES)
def test_named_tests_exist(name: str) -> None:
    """A test that a page names is one of ours, so that a renamed test does not leave a promise unproved."""
    known = {found for path in ROOT.glob("tests/**/*.py") for found in functions(path) | {path.stem}}
    assert set(re.findall(r"`(test_\w+)`", page(name))) <= known


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/decisions/")])
def test_every_decision_is_proved(name: str) -> None:
    """A decision names the tests that fail when it is broken."""
    assert re.search(r"\btests/\w+/test_\w+\.py\b", page(name))


def test_the_fields_of_gpus_are_listed() -> None:
    """The page on telemetry has the field table as the code has it."""
    rows = [
        f"| {field.id} | `{field.name}` | {', '.join(f'`{name}`' for name in field.names[1:])} | {field.unit} "
        f"| {field.kind} | {field.help} |"
        for field in dcgm.FIELDS
    ]
    table = "\n".join(["| id | name | DCGM | unit | kind | what |", "|---|---|---|---|---|---|", *rows])
    assert table in page("docs/telemetry.md")
