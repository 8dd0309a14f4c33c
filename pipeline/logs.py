"""Structured logs on stderr: constant messages plus fields; stdlib loggers go the same way.

Call `configure` once per process. Context that holds for a whole task is bound with
`structlog.contextvars`; a record's place is logged as topic, partition, offset and event_id.
"""

import logging
import sys
from typing import Any

import structlog

from pipeline.settings import Settings

# Chatty at info about things that are ours to report (joins, retries), or repeat every second.
_QUIET = {
    "faust": "WARNING",
    "mode": "ERROR",
    "aiokafka": "WARNING",
    "asyncio": "WARNING",
    "httpx": "WARNING",
    # Faust's services log their comings and goings in the name of the module that subclasses them.
    "agents.consumer": "WARNING",
    "agents.kafka_thread": "WARNING",
}


# On every line of this process. A context variable would be missing in threads, which start without any.
_context: dict[str, str] = {}


def name_process(**context: str) -> None:
    """Put this on every line from now on."""
    _context.update(context)


def configure(settings: Settings, **context: str) -> None:
    """Set up structlog and the standard library's logging; `context` goes on every line."""
    name_process(**context)
    shared: list[structlog.typing.Processor] = [
        _add_context,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


def _add_context(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**_context, **event}


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger for a module."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
