"""What every step must bear before it has started."""

import subprocess
import sys
from pathlib import Path

import pytest

from agents import app
from pipeline import settings


@pytest.mark.parametrize("name", app.STEPS)
async def test_a_step_can_be_stopped_before_it_has_started(name: str, tmp_path: Path) -> None:
    """SIGTERM while a step connects, or loads its models, ends it as quietly as later."""
    step = app.load(name, settings.load(data_dir=tmp_path))
    await step.stop()


def test_sigterm_while_a_step_is_imported() -> None:
    """SIGTERM is heard from the start, also by the first process of a container, and nothing was begun."""
    program = """
import os, signal, sys
from agents import __main__, app
app.run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["agents", "store"]
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
