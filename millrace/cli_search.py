"""The commands that ask about images and results: search, trace, compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from pipeline.settings import Settings

app = typer.Typer()


@app.command()
def search(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A picture to search with."),
    ] = None,
    image_id: Annotated[
        str | None, typer.Option("--id", help="Search with the image of this id instead.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most images to show.")] = 10,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every image.")] = False,
    deployment: Annotated[str | None, typer.Option(help="Whose embeddings; none: the gateway's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model's; none: the first that embeds.")] = None,
    label: Annotated[str | None, typer.Option(help="Only images with this label.")] = None,
    source: Annotated[str | None, typer.Option(help="Only images from this source.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME|5m", help="Only images published then or later."),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", metavar="TIME|5m", help="Only images published before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find images like this one, most similar first; the score is cosine similarity, 1 for the same.

    It asks the gateway. A picture in a file is embedded by a worker and kept nowhere.
    """
    if (file is None) == (image_id is None):
        raise typer.BadParameter("give a FILE or an --id", param_hint="FILE")
    given = {
        "mode": "exact" if exact else None,
        "deployment": deployment,
        "model": model,
        "label": label,
        "source": source,
        "from": _moment(since, "--from"),
        "to": _moment(until, "--to"),
    }
    parameters = {name: value for name, value in given.items() if value is not None}

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import search as module

        return asyncio.run(module.search(settings, file, image_id, parameters, limit, as_json))

    run(body)


@app.command()
def trace(
    image_id: Annotated[str, typer.Argument(metavar="ID", help="The image's event id.")],
    as_json: Json = False,
) -> None:
    """Show the whole way of one image, from publication to its results, with times and durations.

    For each deployment: received, queued, decoded, batched with whom and why, forwarded, stored; or what went
    wrong, or where it waits. Exit 1 if nothing is known of it.
    """

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import tracing

        return asyncio.run(tracing.show_trace(settings, image_id, as_json))

    run(body)


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A deployment, or a revision of its models: default@3.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME|7d", help="Only results stored since then.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Latest so many results of A; none: 100,000.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two deployments on the images that both have seen: agreement, latency, cost.

    From the database. Exit 1 if there is no image that both have predicted.
    """
    from millrace import comparing
    from pipeline.comparison import DEFAULT_LIMIT, SideName

    try:
        sides = SideName.parse(a), SideName.parse(b)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="A, B") from None
    if sides[0] == sides[1]:
        hint = f"two deployments, or two revisions of one, such as {a}@3 and {a}@4"
        raise typer.BadParameter(f"{a} is the same as {b}: name {hint}", param_hint="A, B")
    start = _moment(since, "--since")

    def body(settings: "Settings") -> int:
        import asyncio
        from datetime import datetime

        moment = None if start is None else datetime.fromisoformat(start)
        return asyncio.run(
            comparing.show_comparison(settings, *sides, moment, limit or DEFAULT_LIMIT, as_json)
        )

    run(body)


def _moment(text: str | None, option: str) -> str | None:
    from millrace import durations

    if text is None:
        return None
    try:
        return durations.moment(text).isoformat()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
