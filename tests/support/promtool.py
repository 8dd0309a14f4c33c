"""Prometheus' own checker, and the rules under k8s/strimzi/alerts as it wants them: without Kubernetes around.

promtool is looked for on PATH, then in a cache folder, where Debian's package is unpacked: nothing is installed and
no daemon is started.
"""

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ALERTS = Path(__file__).resolve().parents[2] / "k8s" / "strimzi" / "alerts"
# The package is 19 MB; lists of packages are fetched first where there are none.
FETCH_SECONDS = 300.0


@functools.cache
def promtool() -> str:
    """Return the command; without it a test is skipped, in CI it fails."""
    if found := shutil.which("promtool"):
        return found
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / "promtool"
    home.mkdir(parents=True, exist_ok=True)
    target = home / "usr" / "bin" / "promtool"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() and (why := _fetch(home)):
            message = f"promtool is not on PATH, and Debian's package cannot be had: {why}"
            if os.environ.get("CI"):
                raise AssertionError(message)
            pytest.skip(message)
    return str(target)


def plain_rules(folder: Path) -> None:
    """Write the rules and their tests into a folder as promtool reads them."""
    (folder / "tests").mkdir(parents=True)
    for name, spec in rules().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    for file in (ALERTS / "tests").glob("*.yaml"):
        shutil.copy(file, folder / "tests")


@functools.cache
def rules() -> dict[str, dict[str, Any]]:
    """Return what is in each PrometheusRule, by file."""
    found = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(ALERTS.glob("*.yaml"))}
    return {name: each["spec"] for name, each in found.items() if each["kind"] == "PrometheusRule"}


def _fetch(home: Path) -> str:
    """Unpack Debian's package; return why that did not work, or nothing."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "this is no Debian"
    download = ["apt-get", "download", "-qq", "prometheus"]
    ended = _run(download, home)
    if ended.returncode and os.geteuid() == 0:
        _run(["apt-get", "update", "-qq"], home)
        ended = _run(download, home)
    packages = sorted(home.glob("prometheus_*.deb"))
    if ended.returncode or not packages:
        return ended.stderr.strip() or "apt-get downloaded nothing"
    new = home / "new"
    ended = _run(["dpkg-deb", "-x", str(packages[-1]), str(new)], home)
    if ended.returncode:
        return ended.stderr.strip()
    (home / "usr" / "bin").mkdir(parents=True, exist_ok=True)
    (new / "usr" / "bin" / "promtool").rename(home / "usr" / "bin" / "promtool")
    shutil.rmtree(new)
    for package in packages:
        package.unlink()
    return ""


def _run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=FETCH_SECONDS,
        check=False,
    )
