"""What all commands of the command line share: settings, quiet logs, exit codes."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on stdout.")]


def run(body: Callable[["Settings"], int], **overrides: str | None) -> None:
    """Run a command with the settings, quietly, and exit with its code; options override settings."""
    from millrace.output import guarded
    from pipeline import logs, settings

    def prepared() -> int:
        given = settings.load(**{name: value for name, value in overrides.items() if value is not None})
        # People get messages; logs only when they ask for them.
        asked = "log_level" in given.model_fields_set
        level = given.log_level if asked else "error"
        logs.configure(given.model_copy(update={"log_level": level, "log_format": "console"}))
        if not asked:
            # aiokafka logs as errors what it then retries, or what we say in one line.
            logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        return body(given)

    raise typer.Exit(guarded(prepared))
