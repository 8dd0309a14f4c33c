"""What every step must bear before it has started."""

from pathlib import Path

import pytest

from agents import app
from pipeline import settings


@pytest.mark.parametrize("name", app.STEPS)
async def test_a_step_can_be_stopped_before_it_has_started(name: str, tmp_path: Path) -> None:
    """SIGTERM while a step connects, or loads its models, ends it as quietly as later."""
    step = app.load(name, settings.load(data_dir=tmp_path))
    await step.stop()
