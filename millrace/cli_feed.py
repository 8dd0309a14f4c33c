"""Commands that bring GPU telemetry in from elsewhere than a GPU: a dump, a made-up fleet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta

    from pipeline.settings import Settings

app = typer.Typer(rich_markup_mode=None)

Peers = Annotated[
    str,
    typer.Option(
        metavar="host|KEY",
        help="Whose GPUs are compared with each other: each host's, or all under this key.",
    ),
]
Speed = Annotated[str, typer.Option(metavar="10x|max", help="Times as fast as the source.")]


@app.command()
def replay(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            dir_okay=False,
            readable=True,
            help="CSV, also gzipped; - is standard input.",
        ),
    ],
    interval: Annotated[
        str, typer.Option(metavar="100ms", help="How often what has become due is published.")
    ] = "1s",
    speed: Speed = "1x",
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows.")] = None,
    peers: Peers = "host",
    keep_time: Annotated[
        bool, typer.Option("--keep-time", help="Samples keep the dump's time, and not that of the replay.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if any row is bad.")] = False,
    sort: Annotated[
        bool,
        typer.Option("--sort", help="Put it in order of time first, and not only if it seems to need that."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Stream a dump of dcgm-exporter to Kafka as if it were happening now, with a progress bar on a terminal.

    The long format: a row for each value, with the columns timestamp, metric_name and value, uuid and Hostname or
    labels_raw, and what else there is, in any order. A dump whose rows are far from the order of time is sorted
    first, in a temporary folder. Bad rows are left out, counted and listed with their line.
    """
    # Not by typer's `exists`: with that it takes no dash (0.29).
    if not file.exists() and str(file) != "-":
        raise typer.BadParameter(f"file '{file}' does not exist", param_hint="FILE")
    seconds = _length(interval, "--interval").total_seconds()
    if seconds < 0.001:
        raise typer.BadParameter("at least 1ms", param_hint="--interval")
    times = _times(speed)
    if loop and (keep_time or times is None):
        raise typer.BadParameter("goes neither with --keep-time nor with --speed max", param_hint="--loop")
    if loop and not sort and not file.is_file():
        raise typer.BadParameter("a pipe is read only once: name a file, or add --sort", param_hint="--loop")
    if times is None and not keep_time:
        raise typer.BadParameter(
            "max needs --keep-time: else all would be at one moment", param_hint="--speed"
        )

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import replay

        wishes = replay.Wishes(seconds, times, loop, limit, peers, keep_time, strict, as_json, sort)
        return asyncio.run(replay.replay(settings, file, wishes))

    run(body)


@app.command()
def simulate(
    gpus: Annotated[int, typer.Option(min=1, max=100_000, help="Eight to a host.")] = 64,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND,...",
            help="What breaks, each on one GPU: see --list-faults; or all. May be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Makes the same fleet and the same faults again.")] = 7,
    interval: Annotated[str, typer.Option(metavar="10s", help="Between two samples of a GPU.")] = "10s",
    duration: Annotated[
        str | None, typer.Option(metavar="8h", help="How much of the fleet's life; none: until Ctrl-C.")
    ] = None,
    speed: Speed = "1x",
    peers: Peers = "host",
    truth: Annotated[
        Path | None, typer.Option(help="Write what was injected to this file as JSON lines.", dir_okay=False)
    ] = None,
    list_faults: Annotated[bool, typer.Option("--list-faults", help="Show the kinds of faults.")] = False,
    as_json: Json = False,
) -> None:
    """Publish the telemetry of a made-up fleet with known faults, with a progress bar on a terminal.

    Faster than life, its times begin so far in the past that they end now, and its hosts and GPUs have new names in
    each run, as what is older than what a host said before comes too late to be watched.
    """
    seconds = _length(interval, "--interval").total_seconds()
    if seconds < 0.1:
        raise typer.BadParameter("at least 100ms", param_hint="--interval")
    length = None if duration is None else _length(duration, "--duration").total_seconds()
    if length is not None and not seconds <= length <= 30 * 86_400:
        raise typer.BadParameter("from one interval to 30d", param_hint="--duration")
    times = _times(speed)
    if length is None and (times is None or times > 1):
        raise typer.BadParameter("faster than life needs --duration", param_hint="--speed")

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import simulate

        if list_faults:
            return simulate.show_faults(as_json)
        wishes = simulate.Wishes(
            gpus, _names(fault or ()), seed, seconds, length, times, peers, truth, as_json
        )
        return asyncio.run(simulate.simulate(settings, wishes))

    run(body)


def _names(given: "Iterable[str]") -> tuple[str, ...]:
    """Read names between commas or spaces."""
    return tuple(name for text in given for name in text.replace(",", " ").split())


def _times(text: str) -> float | None:
    """Read 10x, 0.5x, or max as None."""
    if text == "max":
        return None
    try:
        times = float(text.removesuffix("x"))
    except ValueError:
        times = 0.0
    if not 0.001 <= times <= 1_000_000:
        raise typer.BadParameter(f"{text!r} is neither 10x nor max", param_hint="--speed")
    return times


def _length(text: str, option: str) -> "timedelta":
    from millrace import durations

    try:
        return durations.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
