"""The commands for operators: lag, topics, worker, retention, migrate, doctor, up."""

from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from pipeline.settings import Settings

app = typer.Typer()
topics_app = typer.Typer(rich_markup_mode=None, help="Compare topics with the table, or create them.")
app.add_typer(topics_app, name="topics")


@app.command()
def lag(
    group: Annotated[
        list[str] | None, typer.Option(help="Only this consumer group, by its full name; may be repeated.")
    ] = None,
    total: Annotated[bool, typer.Option("--total", help="One line per group and topic.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show how far behind the consumer groups are.

    One line per group, topic and partition; a group that never committed is behind by all that is kept.
    """

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.lag(settings, group or None, total, watch, as_json))

    run(body)


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

    run(body)


@topics_app.command("apply")
def topics_apply(as_json: Json = False) -> None:
    """Create and mend topics; safe to repeat.

    Creates what is missing, adds partitions, corrects configuration; deletes nothing.
    """

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.apply_topics(settings, as_json))

    run(body)


@app.command()
def worker(
    step: Annotated[
        str, typer.Argument(metavar="STEP", help="predict, store, archive, watch, record or notify.")
    ],
    deployment: Annotated[str | None, typer.Option(help="Name of the set of models (predict).")] = None,
    models: Annotated[str | None, typer.Option(help="Models, comma-separated (predict).")] = None,
) -> None:
    """Run one step in the foreground.

    SIGTERM or Ctrl-C drain it: started records are finished and committed, the others are left to the group.
    """
    from agents.app import STEPS, leave, run
    from millrace.output import guarded

    if step not in STEPS:
        raise typer.BadParameter(f"{step!r} is not one of {', '.join(STEPS)}", param_hint="STEP")

    def body() -> int:
        from pipeline.settings import load

        given = {"deployment": deployment, "models": models}
        return run(step, load(**{name: value for name, value in given.items() if value is not None}))

    leave(guarded(body))


@app.command()
def retention(
    older_than: Annotated[
        str | None, typer.Option(metavar="90d", help="Age; none: MILLRACE_RESULT_RETENTION_DAYS.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old images, results and objects.

    Dead letters too. What was stored before that age goes; safe to break off and repeat.
    """
    from millrace import durations

    try:
        age = None if older_than is None else durations.parse(older_than)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--older-than") from None

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.retain(settings, age, dry_run, as_json))

    run(body)


@app.command()
def migrate(as_json: Json = False) -> None:
    """Bring the database up to date; safe to repeat."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import operations

        return asyncio.run(operations.migrate(settings, as_json))

    run(body)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what is needed, and how to mend it.

    Exit 1 if something is at fault; a part that is merely not running is none.
    """
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
    fleet: Annotated[
        bool, typer.Option("--fleet/--no-fleet", help="Publish a made-up fleet of GPUs with a fault.")
    ] = True,
    deployment: Annotated[str | None, typer.Option(help="Name of the set of models.")] = None,
    models: Annotated[str | None, typer.Option(help="Models, comma-separated.")] = None,
    as_json: Json = False,
) -> None:
    """Run everything on this machine.

    Kafka and PostgreSQL unless settings say where they are, the gateway and the steps; then sample pictures and
    the telemetry of a small fleet are published, and what comes of them is printed. Ctrl-C stops everything.
    """
    from millrace import parts
    from millrace import up as stack

    try:
        counts = parts.parse_replicas(replicas)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--replicas") from None

    wishes = stack.Wishes(counts, once, samples, seed, as_json, fleet)
    run(lambda settings: stack.up(settings, wishes), deployment=deployment, models=models)
