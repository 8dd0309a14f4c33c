"""The commands for models: what runs where, another version, the history."""

from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from pipeline.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What runs where, and another version.")


@app.command("list")
def models_list(
    deployment: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    as_json: Json = False,
) -> None:
    """Show each deployment's version of its models, and what each replica runs."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import models

        return asyncio.run(models.show_list(settings, deployment, as_json))

    run(body)


@app.command("activate")
def models_activate(
    deployment: Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Such as default.")],
    models: Annotated[str, typer.Argument(metavar="MODELS", help="Comma-separated, as in MILLRACE_MODELS.")],
    note: Annotated[str | None, typer.Option(help="What for; kept in the history.")] = None,
    expect: Annotated[
        int | None,
        typer.Option(min=0, help="Only if this revision is the active one; 0: none was activated."),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the replicas.")
    ] = 60.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the replicas.")] = False,
    as_json: Json = False,
) -> None:
    """Have every replica of a deployment go over to other models, between two batches.

    Files that `file:` models name are taken from this machine and put into the object store. Exit 0 only if
    every replica runs the version; one that cannot load it goes on with what it has, and says why.
    """
    from pipeline.deployments import check_models
    from pipeline.errors import ConfigurationError

    try:
        check_models(models)
    except ConfigurationError as error:
        raise typer.BadParameter(error.message, param_hint="MODELS") from None

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import models as module

        wish = module.Wish(deployment, models, note, expect, 0.0 if no_wait else wait, as_json)
        return asyncio.run(module.activate(settings, wish))

    run(body)


@app.command("history")
def models_history(
    deployment: Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Such as default.")],
    limit: Annotated[int, typer.Option(min=1, help="Newest so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what was activated, by whom, and what came of it, from the database."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import models

        return asyncio.run(models.history(settings, deployment, limit, as_json))

    run(body)
