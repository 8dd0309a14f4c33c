"""`millrace gpus` and `millrace alerts` against a real PostgreSQL."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner, Result

from millrace import cli
from millrace.alerts import line_of, parse_labels
from millrace.gpus import badness
from pipeline.gpu_views import Firing, GpuView, Latest
from pipeline.settings import load
from pipeline.telemetry import Condition, Gpu, GpuWindow, Sample, Samples, Windows, alert_id
from pipeline.telemetry_database import TelemetryDatabase
from tests.support import services
from tests.support.receivers import alert

NOW = datetime.now(UTC).replace(microsecond=0)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


async def _fill(database: str) -> None:
    opened = await TelemetryDatabase.open(load(database_url=database))
    for host, uuid, state in (
        ("node-1", "GPU-1", "ok"),
        ("node-2", "GPU-2", "lost"),
        ("node-3", "GPU-3", "ok"),
    ):
        sample = Sample(gpu_uuid=uuid, time=NOW, values={"temperature_celsius": 61.0}, state=state)  # type: ignore[arg-type]
        gpus = (Gpu(gpu_uuid=uuid, model="H100"),)
        await opened.save_samples([(host, Samples(host=host, samples=(sample,), gpus=gpus))])
    condition = Condition(
        rule="thermal", severity="critical", state="firing", since=NOW, message="hot", action="inspect"
    )
    window = GpuWindow(gpu_uuid="GPU-3", host="node-3", conditions=(condition,))
    await opened.save_windows(
        [Windows(key="node-3", start=NOW, end=NOW + timedelta(minutes=1), gpus=(window,))]
    )
    await opened.close()


@pytest.fixture
def filled(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_DATABASE_URL", database)
    services.run_apart(_fill(database))


@pytest.mark.usefixtures("filled")
def test_gpus() -> None:
    """`list` goes by host, `top` by what is worst, `show` tells all of one; `--json` is a line each."""
    listed = run("gpus", "list", "--json")
    assert [json.loads(line)["gpu_uuid"] for line in listed.stdout.splitlines()] == [
        "GPU-1",
        "GPU-2",
        "GPU-3",
    ]
    assert run("gpus", "--json").stdout == listed.stdout
    top = run("gpus", "top")  # not a terminal: one look
    assert [line.split()[0] for line in top.stdout.splitlines()] == ["GPU", "GPU-2", "GPU-3", "GPU-1"]
    assert "1 critical" in top.stdout
    shown = run("gpus", "show", "GPU-3")
    assert "firing critical thermal" in shown.stdout
    assert "temperature_celsius" in shown.stdout
    assert run("gpus", "show", "GPU-9").exit_code == 1
    assert run("gpus", "energy").exit_code == 0
    assert run("gpus", "energy", "--from", "1h", "--to", "2h").exit_code == 2


@pytest.mark.usefixtures("filled")
def test_alerts_and_silences() -> None:
    """Alerts are listed and shown; a silence begins, is listed and ends once."""
    identity = alert_id("GPU-3", "thermal", NOW)
    assert json.loads(run("alerts", "list", "--json").stdout)["id"] == identity
    assert "there is no such alert" in run("alerts", "list", "--severity", "info").output
    assert "inspect" in run("alerts", "show", identity).stdout
    assert run("alerts").stdout == run("alerts", "list").stdout
    assert identity in run("alerts", "show", identity[:8]).stdout
    assert run("alerts", "show", identity[:7]).exit_code == 1
    assert run("alerts", "show", "none").exit_code == 1
    made = run("alerts", "silence", "host=node-*", "host=gpu-*", "rule=thermal", "--for", "2h", "--json")
    silence = json.loads(made.stdout)
    assert silence["match"] == {"host": ["node-*", "gpu-*"], "rule": "thermal"}
    assert "host=node-*|gpu-*, rule=thermal" in run("alerts", "silences").stdout
    assert [run("alerts", "unsilence", str(silence["id"])).exit_code for _ in range(2)] == [0, 1]
    assert run("alerts", "silence", "node-7", "--for", "2h").exit_code == 2
    assert run("alerts", "silence", "host=a", "--for", "0").exit_code == 2


def test_the_worst_comes_first() -> None:
    """Lost before critical before warning before silent before hot."""

    def gpu(state: str = "ok", age: float = 0.0, celsius: float = 50.0, **firing: int) -> GpuView:
        seen = NOW - timedelta(seconds=age)
        return GpuView(
            gpu_uuid="GPU", host="h", peer_key="h", state=state, first_seen=seen, last_seen=seen,
            firing=Firing(**firing), latest=Latest(seen, {"temperature_celsius": celsius}),
        )  # fmt: skip

    ordered = [
        gpu("lost"), gpu(critical=2), gpu(critical=1, warning=9), gpu(warning=1), gpu(age=999.0), gpu(celsius=90.0),
        gpu(),
    ]  # fmt: skip
    assert sorted(ordered, key=lambda one: badness(one, NOW), reverse=True) == ordered


def test_a_line_of_an_alert_has_its_id() -> None:
    """What `tail` and `up` print of an alert names it as `show` takes it, and says what to do next."""
    firing = alert(1)
    line = line_of(firing)
    assert line.split()[0] == firing.id
    assert line.endswith("next: inspect")


@pytest.mark.parametrize("given", [["host"], ["=a"], ["a b=c"], [f"host={'x' * 300}"]])
def test_labels_that_cannot_be(given: list[str]) -> None:
    """What is no label with a pattern is refused before anything is silenced."""
    with pytest.raises(ValueError, match=r"LABEL|label|value"):
        parse_labels(given)
