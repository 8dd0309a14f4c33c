"""Prometheus itself reads the rules, and runs the unit tests of every alert."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.promtool import ALERTS, plain_rules, promtool, rules

TESTS = sorted(file.name for file in (ALERTS / "tests").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain_rules(tmp_path / "alerts")
    return tmp_path / "alerts"


def run(*arguments: str | Path) -> str:
    """Run promtool; a failure shows what it said."""
    ended = subprocess.run(
        [promtool(), *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.timeout(400)
def test_prometheus_accepts_the_rules(folder: Path) -> None:
    """`promtool check rules` finds nothing wrong with any file, duplicate rules included."""
    said = run("check", "rules", *sorted(folder.glob("*.yaml")))
    assert said.count("SUCCESS") == len(rules())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", TESTS)
def test_alerts_fire_when_they_should(folder: Path, name: str) -> None:
    """Each alert fires in the installation that is in trouble, in these words, and in no other."""
    run("test", "rules", folder / "tests" / name)


def test_every_alert_is_tested_both_ways() -> None:
    """For each alert there is a moment in which it fires, and one in which it does not."""
    checks = [
        check
        for name in TESTS
        for case in yaml.safe_load((ALERTS / "tests" / name).read_text())["tests"]
        for check in case["alert_rule_test"]
    ]
    alerts = {
        str(rule["alert"])
        for spec in rules().values()
        for group in spec["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == alerts
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == alerts
