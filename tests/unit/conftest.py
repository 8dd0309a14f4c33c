"""Unit tests need no service and no network."""

import ctypes
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.nvml import Script

# The machine's load must fail no test: laws are checked by examples, not by their time.
settings.register_profile("millrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("millrace")


@pytest.fixture
def script(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a script of two GPUs that the library of this process follows."""
    import pynvml

    from pipeline import nvml, nvml_xids

    script = Script(tmp_path / "script")
    monkeypatch.setenv("NVML_STAND_IN", str(script.path))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(nvml, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(nvml_xids, "_WAIT_MILLISECONDS", 20)
    return script
