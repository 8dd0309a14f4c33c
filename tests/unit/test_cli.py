"""The command line: arguments, exit codes, and what a start costs."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millrace import cli_collect, cli_feed, durations, output, parts, results, simulate
from millrace.cli import app
from millrace.collect_sources import ExporterSource
from pipeline.errors import (
    ConfigurationError,
    DependencyError,
    FatalError,
    MillraceError,
    RecordTooLargeError,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = [
    "publish images", "predictions get", "predictions tail", "lag", "topics", "topics list", "topics apply",
    "doctor", "up",
    "dead-letters list", "dead-letters show", "dead-letters redrive", "worker", "retention", "migrate",
    "bench", "soak", "replay", "simulate", "collect",
]  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "publish images",
        "publish images . --lane fast",
        "publish images . --rate 0",
        "publish images . --id-from name",
        "predictions get",
        "predictions tail --from yesterday",
        "predictions tail --limit 0",
        "replay",
        "replay missing.csv",
        "replay LICENSE --speed fast",
        "replay LICENSE --speed max",
        "replay LICENSE --interval 0",
        "replay LICENSE --loop --keep-time",
        "replay - --loop",
        "simulate --speed 10x",
        "simulate --interval soon",
        "simulate --duration 1s",
        "collect --interval 10ms",
        "collect --interval never",
        "collect --sample-interval 20s",
        "collect --from-exporter node:9400",
        "collect --from-exporter http://[node",
        "collect --from-exporter http:///metrics",
        "alerts list --state open",
        "dead-letters redrive",
        "dead-letters redrive 1 --all",
        "dead-letters redrive 1 --code image",
        "dead-letters show one",
        "retention --older-than soon",
        "up --replicas predict",
        "up --replicas cook=2",
        "worker",
        "worker cook",
    ],
)
def test_a_wrong_command_line_ends_with_2(line: str) -> None:
    """What the command line cannot mean is refused before anything is connected to."""
    assert run(*line.split())[0] == output.EXIT_USAGE


def test_a_wrong_setting_ends_with_78_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting is one line that names its variable, whatever the command."""
    monkeypatch.setenv("MILLRACE_KAFKA_PORT", "none")
    for command in ("lag", "topics", "migrate", "gpus", "alerts"):
        code, said = run(command)
        assert code == 78
        assert said.startswith("millrace: MILLRACE_KAFKA_PORT")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://node:9400", "http://node:9400/metrics"),
        ("https://user:pass@node/", "https://user:pass@node/metrics"),
        ("http://node:9400/gpu?all=1", "http://node:9400/gpu?all=1"),
    ],
)
def test_the_address_of_an_exporter(given: str, expected: str) -> None:
    """An address without a path means the metrics there."""
    assert cli_collect._address(given) == expected


async def test_a_password_of_an_exporter_is_not_told() -> None:
    """What is said of an exporter that does not answer has its address and no password."""
    source = ExporterSource("http://user:hidden@127.0.0.1:9/metrics", None)
    with pytest.raises(DependencyError, match=r"^http://127\.0\.0\.1:9/metrics does not answer") as raised:
        await source.read()
    await source.stop()
    assert "hidden" not in raised.value.message


def test_several_faults() -> None:
    """Faults are named between commas or spaces, and the option may be repeated."""
    assert cli_feed._names(["thermal, ecc", "lost"]) == ("thermal", "ecc", "lost")
    assert cli_feed._names([""]) == ()


def test_a_fleet_of_the_past_is_another_in_each_run() -> None:
    """What begins before now has hosts and GPUs that no run before it had; what begins now has the same again."""
    now = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)

    def names(speed: float | None, moment: datetime) -> set[str]:
        fleet = simulate._make(simulate.Wishes(gpus=8, seconds=600.0, speed=speed), moment)
        hosts = {record.host for record in next(iter(fleet)).records}
        return {*fleet.uuids, *hosts}

    later = now + timedelta(minutes=1)
    assert not names(None, now) & names(None, later)
    assert not names(10.0, now) & names(10.0, later)
    assert names(1.0, now) == names(1.0, later)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_is_documented(command: str) -> None:
    """Each command explains itself, and docs/cli.md has it."""
    code, said = run(*command.split(), "--help")
    assert code == 0
    assert "--help" in said
    assert f"millrace {command}" in DOCUMENT.read_text()


def test_every_exit_code_is_documented() -> None:
    """docs/cli.md lists each exit code with its meaning."""
    text = DOCUMENT.read_text()
    for code, meaning in output.EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text


def test_help_imports_nothing_heavy() -> None:
    """`millrace --help` starts without torch, Faust, Kafka, database or image libraries."""
    heavy = [
        "torch",
        "numpy",
        "PIL",
        "faust",
        "aiokafka",
        "asyncpg",
        "fastapi",
        "pydantic",
        "httpx",
        "rich.progress",
    ]
    code = f"import sys, millrace.cli; print([name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), 78),
        (DependencyError("x"), 69),
        (FatalError("x"), 70),
        (RecordTooLargeError("x"), 1),
        (MillraceError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_expected_error_becomes_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected errors end a command with their code and one line at most."""

    def body() -> int:
        raise error

    assert output.guarded(body) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("millrace: x\n" if isinstance(error, MillraceError) else "")


def test_what_strangers_wrote_cannot_drive_the_terminal() -> None:
    """Escape sequences in ids and reasons are shown, not acted on; other scripts stay readable."""
    assert output.printable("a\x1b[2Jb\u202ec\x00 Größe 猫") == "a\\x1b[2Jb\\u202ec\\x00 Größe 猫"


def test_table_aligns_and_survives_odd_cells(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stand to the right, text to the left, a line break stays in its cell."""
    output.show_table(("NAME", "COUNT"), [("a", 1200), ("long\nname", 3), (None, 0)])
    assert capsys.readouterr().out.splitlines() == [
        "NAME       COUNT",
        "a          1,200",
        "long name      3",
        "               0",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("5m", 300),
        ("12h", 43_200),
        ("90d", 7_776_000),
        ("2w", 1_209_600),
        ("7", 7),
        ("0.5s", 0.5),
    ],
)
def test_lengths_of_time_are_read(text: str, seconds: float) -> None:
    """Lengths of time are read with their unit, or as seconds."""
    assert durations.parse(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "m", "-5m", "5 minutes", "1e3", "99999999999d", "٣d"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    """Anything else is refused with an example."""
    with pytest.raises(ValueError, match="such as"):
        durations.parse(text)


def test_tail_starts_where_it_is_told() -> None:
    """A start is a word, an age or a moment; a moment without a zone is UTC."""
    assert results.parse_start("earliest") == "earliest"
    age = results.parse_start("5m")
    assert isinstance(age, datetime)
    assert abs(datetime.now(UTC) - timedelta(minutes=5) - age) < timedelta(seconds=5)
    assert results.parse_start("2026-01-31T12:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert results.parse_start("2026-01-31T12:00+02:00") == datetime(2026, 1, 31, 10, tzinfo=UTC)


def test_replicas_are_read() -> None:
    """Replicas are given by step; nothing means one each."""
    assert parts.parse_replicas("") == {}
    assert parts.parse_replicas("predict=3, store=0") == {"predict": 3, "store": 0}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name in ("z.jpg", "a.png", "b/c.webp", "b/.hidden.jpg", "b/.git/d.jpg", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "round").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "z.jpg")
    return tmp_path


def test_folders_are_searched_below_in_order(tree: Path) -> None:
    """Files come in order of names, without hidden ones; links to files count, links to folders do not."""
    from millrace.publish import find

    assert [found.name for found in find([tree])] == ["a.png", "link.jpg", "z.jpg", "b/c.webp"]
    (named,) = find([tree / "b" / ".hidden.jpg"])
    assert (named.name, named.is_named) == (".hidden.jpg", True)
