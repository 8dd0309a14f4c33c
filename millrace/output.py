"""What every command prints, and where: data on stdout, messages on stderr.

With `--json` stdout carries one JSON object per line and nothing else. An exit code is all a script needs to
look at; `EXIT_CODES` is what `millrace --help` and `docs/` show.
"""

import asyncio
import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from pipeline.errors import (
    EXIT_CONFIGURATION,
    EXIT_FATAL,
    ConfigurationError,
    DependencyError,
    FatalError,
    MillraceError,
)

_PIPE_POLL_SECONDS = 0.5

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69  # sysexits.h EX_UNAVAILABLE
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

EXIT_CODES = {
    0: "done",
    EXIT_FAILED: "something failed: a file was not published, an id has no prediction, a check found a fault",
    EXIT_USAGE: "the command line is wrong",
    EXIT_UNAVAILABLE: "Kafka, the database, the object store or what is collected from does not answer",
    EXIT_FATAL: "the process could no longer be trusted and ended without acknowledging",
    EXIT_CONFIGURATION: "a setting is wrong; the message names it",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
    EXIT_BROKEN_PIPE: "the reader of stdout went away",
}


def exit_code_of(error: MillraceError) -> int:
    """Return the exit code of an error that ended a command."""
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    if isinstance(error, DependencyError):
        return EXIT_UNAVAILABLE
    return EXIT_FATAL if isinstance(error, FatalError) else EXIT_FAILED


def guarded(body: Callable[[], int]) -> int:
    """Run a command to its exit code; expected errors become one line on stderr, never a traceback."""
    try:
        code = body()
        sys.stdout.flush()
        return code
    except MillraceError as error:
        say(f"millrace: {error.message}")
        return exit_code_of(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def say(message: str) -> None:
    """Print a message for a person."""
    # A closed stderr is no reason to fail.
    with contextlib.suppress(BrokenPipeError):
        print(printable(message), file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Print one value as a line of JSON, at once: the reader may be waiting for it."""
    print(msgspec.json.encode(value).decode(), flush=True)


def show(text: str) -> None:
    """Print a line of data, at once."""
    print(printable(text), flush=True)


def printable(text: str) -> str:
    """Escape what a terminal would act on: ids, reasons and file names come from strangers."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text
    )


async def stdout_closed() -> None:
    """Return when the reader of stdout has gone away; never, if stdout is no pipe.

    A command that waits for data would notice only with its next line, which may never come.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # only what is always reported: the other end is closed
    while not poll.poll(0):  # noqa: ASYNC110
        await asyncio.sleep(_PIPE_POLL_SECONDS)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 picture, 1,200 pictures."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns under a header; numbers to the right."""
    cells = [
        [printable("" if value is None else _text(value)).replace("\n", " ") for value in row] for row in rows
    ]
    numeric = [bool(cells) and all(_is_number(row[index]) for row in cells) for index in range(len(columns))]
    widths = [max([len(name), *(len(row[index]) for row in cells)]) for index, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        fields = (
            value.rjust(width) if is_numeric else value.ljust(width)
            for value, width, is_numeric in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(fields).rstrip())
    sys.stdout.flush()


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(text: str) -> bool:
    return not text or text.replace(",", "").replace(".", "").isdigit()
