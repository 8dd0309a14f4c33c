"""What every step must bear before it has started."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from agents import app
from pipeline import allocator, metrics, settings


@pytest.mark.parametrize("name", app.STEPS)
async def test_a_step_can_be_stopped_before_it_has_started(name: str, tmp_path: Path) -> None:
    """SIGTERM while a step connects, or loads its models, ends it as quietly as later."""
    step = app.load(name, settings.load(data_dir=tmp_path))
    await step.stop()


@pytest.mark.parametrize("name", app.STEPS)
def test_only_predict_keeps_what_is_freed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that is kept from the kernel is worth it where a batch needs it again, however the step is started."""
    asked = []
    monkeypatch.setattr(allocator, "keep_freed", lambda: asked.append(name))
    monkeypatch.setattr(app, "run_step", lambda *_: 0)
    assert app.run(name, settings.load(data_dir=tmp_path, device="cpu")) == 0
    assert asked == (["predict"] if name == "predict" else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_step_is_imported(number: signal.Signals) -> None:
    """A signal is heard from the start, also by the first process of a container, and nothing was begun."""
    program = f"""
import os, sys
from agents import __main__, app
app.run = lambda *_: os.kill(os.getpid(), {int(number)})
sys.argv = ["agents", "store"]
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_alerts_ask_about_is_there_before_it_happens() -> None:
    """A worker shows 0 of what has not happened: Prometheus sees no increase from nothing to 1."""
    metrics.show_zeros("nobody", ["some.topic"])
    labels = {"step": "nobody"}
    assert REGISTRY.get_sample_value("millrace_ready", labels) == 0
    assert REGISTRY.get_sample_value("millrace_dead_letters_total", {**labels, "code": "process_killed"}) == 0
    assert REGISTRY.get_sample_value("millrace_offsets_expired_total", {**labels, "topic": "some.topic"}) == 0
