"""The `millrace` command: what there is to say on the command line, and nothing else.

Each command imports its module when it runs, so that `millrace --help` stays quick and needs no torch.
"""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.settings import Settings

app = typer.Typer(
    name="millrace",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Images on Kafka, turned into predictions.",
    epilog="Settings are MILLRACE_* environment variables (docs/configuration.md); exit codes: docs/cli.md.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
publish_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Publish to the input topics.")
predictions_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at results.")
topics_app = typer.Typer(
    rich_markup_mode=None, help="Compare the broker's topics with the table, or create them."
)
dead_letters_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Records that could not be finished: look, and try again.",
)
app.add_typer(publish_app, name="publish")
app.add_typer(predictions_app, name="predictions")
app.add_typer(topics_app, name="topics")
app.add_typer(dead_letters_app, name="dead-letters")

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on stdout.")]


class LaneName(StrEnum):
    """The two lanes."""

    bulk = "bulk"
    realtime = "realtime"


class IdSource(StrEnum):
    """What an id is made from."""

    content = "content"
    path = "path"
    random = "random"


def main() -> None:
    """Run the command line."""
    app()


def _run(body: Callable[["Settings"], int], **overrides: Any) -> None:
    """Run a command with the settings, quietly, and exit with its code."""
    import logging

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


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("millrace"))
        raise typer.Exit


@app.callback()
def millrace(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Images on Kafka, turned into predictions."""


@publish_app.command("images")
def publish_images(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FOLDER_OR_FILE...", help="Folders are searched below too.")
    ],
    lane: Annotated[LaneName, typer.Option(help="realtime: somebody is waiting.")] = LaneName.bulk,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Most pictures per second.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most pictures in all.")] = None,
    deadline_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, help="A prediction later than this is worth nothing: `expired`."),
    ] = None,
    id_from: Annotated[
        IdSource,
        typer.Option(
            help="content: img- and half the SHA-256, so the same picture has one result however often it is "
            "published; path: the path below the folder; random: a new one each time."
        ),
    ] = IdSource.content,
    as_json: Json = False,
) -> None:
    """Publish pictures, with a progress bar on a terminal.

    Hidden files are passed by. Files in folders that neither are nor claim to be pictures are skipped.
    """

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import publish

        wishes = publish.Wishes(lane.value, rate, limit, deadline_seconds, id_from.value, as_json)
        return asyncio.run(publish.publish_images(settings, paths, wishes))

    _run(body)


@predictions_app.command("get")
def predictions_get(
    image_id: Annotated[str, typer.Argument(metavar="ID", help="The image's event id.")],
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait this long for an outcome.")
    ] = 0.0,
    deployment: Annotated[str, typer.Option(help="Whose state is told.")] = "default",
    as_json: Json = False,
) -> None:
    """Show what became of an image; exit 0 only if it has a prediction."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import results

        return asyncio.run(results.get(settings, image_id, wait, deployment, as_json))

    _run(body)


@predictions_app.command("tail")
def predictions_tail(
    since: Annotated[
        str,
        typer.Option(
            "--from", metavar="latest|earliest|5m|TIME", help="From where; TIME as 2026-01-31T12:00Z."
        ),
    ] = "latest",
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    deployment: Annotated[str | None, typer.Option(help="Only this deployment's.")] = None,
    as_json: Json = False,
) -> None:
    """Print predictions as they are published, until Ctrl-C."""
    from millrace import results

    try:
        start = results.parse_start(since)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--from") from None

    def body(settings: "Settings") -> int:
        import asyncio

        return asyncio.run(results.tail(settings, start, limit, deployment, as_json))

    _run(body)


@app.command()
def lag(
    group: Annotated[
        list[str] | None, typer.Option(help="Only this consumer group, by its full name; may be repeated.")
    ] = None,
    total: Annotated[bool, typer.Option("--total", help="One line per group and topic.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show how far behind each consumer group is, by topic and partition."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.lag(settings, group or None, total, watch, as_json))

    _run(body)


@topics_app.callback(invoke_without_command=True)
def topics(context: typer.Context, as_json: Json = False) -> None:
    """Show each topic of the table as it is on the broker."""
    if context.invoked_subcommand is None:
        topics_list(as_json)


@topics_app.command("list")
def topics_list(as_json: Json = False) -> None:
    """Show each topic of the table as it is on the broker."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.list_topics(settings, as_json))

    _run(body)


@topics_app.command("apply")
def topics_apply(as_json: Json = False) -> None:
    """Create missing topics, add partitions, mend configuration; safe to repeat, deletes nothing."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.apply_topics(settings, as_json))

    _run(body)


Code = Annotated[str | None, typer.Option(help="Only this error code, such as undecodable_image.")]
Group = Annotated[str | None, typer.Option(help="Only of this consumer group, by its full name.")]
TopicName = Annotated[str | None, typer.Option("--topic", help="Only from this topic, by its full name.")]
ImageId = Annotated[str | None, typer.Option("--image-id", help="Only of this image.")]


@dead_letters_app.command("list")
def dead_letters_list(
    code: Code = None,
    group: Group = None,
    topic: TopicName = None,
    image_id: ImageId = None,
    closed: Annotated[bool, typer.Option("--closed", help="Those that were redriven, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Newest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List dead letters, newest first, without their values."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import deadletters

        chosen = deadletters.Filters(code, group, topic, image_id, open_only=not closed)
        return asyncio.run(deadletters.show_list(settings, chosen, limit, as_json))

    _run(body)


@dead_letters_app.command("show")
def dead_letters_show(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="As `list` shows it.")],
    save_value: Annotated[
        Path | None,
        typer.Option("--save-value", help="Write the record's value to this file.", dir_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter: why, where, how often, its headers."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import deadletters

        return asyncio.run(deadletters.show_one(settings, number, save_value, as_json))

    _run(body)


@dead_letters_app.command("redrive")
def dead_letters_redrive(
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="[NUMBER...]", help="As `list` shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All open ones that the filters leave.")] = False,
    code: Code = None,
    group: Group = None,
    topic: TopicName = None,
    image_id: ImageId = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Publish dead letters again, each for the group that gave it up; ids stay, attempts are counted."""
    filters = (code, group, topic, image_id)
    if bool(numbers) == everything:
        raise typer.BadParameter("name dead letters by number, or give --all", param_hint="NUMBER")
    if numbers and any(filters):
        raise typer.BadParameter("filters go with --all", param_hint="NUMBER")

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import deadletters

        chosen = numbers or deadletters.Filters(*filters, open_only=True)
        return asyncio.run(deadletters.redrive(settings, chosen, _confirm(yes), as_json))

    _run(body)


def _confirm(yes: bool) -> Callable[[str], bool]:
    def ask(question: str) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            from millrace.output import say

            say(f"{question} Give --yes to do it without being asked.")
            return False
        return typer.confirm(question, err=True)

    return ask


@app.command()
def worker(
    step: Annotated[str, typer.Argument(metavar="STEP", help="predict, store or archive.")],
    deployment: Annotated[str | None, typer.Option(help="Name of the set of models (predict).")] = None,
    models: Annotated[str | None, typer.Option(help="Models, comma-separated (predict).")] = None,
) -> None:
    """Run one step in the foreground until SIGTERM or Ctrl-C, which drain it."""
    from millrace.output import guarded

    def body() -> int:
        from agents.app import run
        from pipeline.settings import load

        given = {"deployment": deployment, "models": models}
        return run(step, load(**{name: value for name, value in given.items() if value is not None}))

    raise typer.Exit(guarded(body))


@app.command()
def retention(
    older_than: Annotated[
        str | None, typer.Option(metavar="90d", help="Age; none: MILLRACE_RESULT_RETENTION_DAYS.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Delete images, results, dead letters and objects that are older."""
    from millrace import durations

    try:
        age = None if older_than is None else durations.parse(older_than)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--older-than") from None

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.retain(settings, age, dry_run, as_json))

    _run(body)


@app.command()
def migrate(as_json: Json = False) -> None:
    """Bring the database's tables up to date; safe to repeat."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.migrate(settings, as_json))

    _run(body)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what Millrace needs and say how to mend what is missing; exit 1 if something is."""
    import asyncio
    import logging

    from millrace import doctor as module
    from millrace.output import guarded

    # Not `_run`: wrong settings are a finding here. Clients log what the findings say.
    logging.disable(logging.CRITICAL)
    raise typer.Exit(guarded(lambda: asyncio.run(module.examine(as_json))))


@app.command()
def up(
    replicas: Annotated[
        str, typer.Option(metavar="STEP=N,...", help="Such as predict=3,store=2; 0 leaves a step out.")
    ] = "",
    once: Annotated[
        bool, typer.Option("--once", help="End after the samples; exit 0 if all came out right.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="How many pictures to draw and publish.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Draws the same pictures again.")] = 7,
    as_json: Json = False,
) -> None:
    """Run everything on this machine: Kafka, PostgreSQL, the gateway and the steps; Ctrl-C stops it."""
    from millrace import up as stack

    try:
        counts = stack.parse_replicas(replicas)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--replicas") from None

    _run(lambda settings: stack.up(settings, stack.Wishes(counts, once, samples, seed, as_json)))
