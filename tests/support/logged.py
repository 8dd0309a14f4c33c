"""What a module logs, whatever logging is set up to do by then."""

from types import ModuleType

import pytest
import structlog
from structlog.testing import LogCapture


def capture(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> LogCapture:
    """Have a module log into what is returned."""
    logged = LogCapture()
    monkeypatch.setattr(module, "_log", structlog.wrap_logger(None, processors=[logged]))
    return logged
