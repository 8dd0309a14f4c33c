"""The `millrace` command: what there is to say on the command line, and nothing else.

Each command imports its module when it runs, so that `millrace --help` stays quick and needs no torch.
"""

import os
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace import (
    cli_autoscale,
    cli_collect,
    cli_feed,
    cli_gpus,
    cli_k8s,
    cli_measure,
    cli_models,
    cli_operations,
    cli_search,
)
from millrace.command import Json, run

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
    help="Look at what failed, and try again.",
)
app.add_typer(cli_search.app)
app.add_typer(cli_feed.app)
app.add_typer(cli_operations.app)
app.add_typer(cli_measure.app)
app.add_typer(cli_collect.app)
app.add_typer(cli_autoscale.app)
app.add_typer(publish_app, name="publish")
app.add_typer(predictions_app, name="predictions")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_k8s.app, name="k8s")
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(cli_gpus.gpus_app, name="gpus")
app.add_typer(cli_gpus.alerts_app, name="alerts")


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
    if os.getpid() == 1:
        # The first process of a container gets no signal that it does not handle; commands end as with Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


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
        list[Path], typer.Argument(metavar="FOLDER_OR_FILE", help="Folders are searched below too.")
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

    run(body)


@predictions_app.command("get")
def predictions_get(
    image_id: Annotated[str, typer.Argument(metavar="ID", help="The image's event id.")],
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait this long for an outcome.")
    ] = 0.0,
    deployment: Annotated[str, typer.Option(help="Whose state is told.")] = "default",
    every_version: Annotated[
        bool, typer.Option("--all", help="Also what older versions of the models said.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what became of an image; exit 0 only if it has a prediction."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import results

        return asyncio.run(results.get(settings, image_id, wait, deployment, as_json, every_version))

    run(body)


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
    queries: Annotated[
        bool, typer.Option("--queries", help="Also those of pictures that were only searched with.")
    ] = False,
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

        wishes = results.TailWishes(limit, deployment, queries, as_json)
        return asyncio.run(results.tail(settings, start, wishes))

    run(body)


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

    run(body)


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

    run(body)


@dead_letters_app.command("redrive")
def dead_letters_redrive(
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="NUMBER", help="As `list` shows them.")
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

    run(body)


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
