"""The command that feeds GPU telemetry from a machine with GPUs."""

from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from pipeline.settings import Settings

app = typer.Typer()

_SHORTEST_SECONDS = 0.1


@app.command()
def collect(
    interval: Annotated[
        str, typer.Option(metavar="10s", help="Publish so often; from 100ms. XID errors go at once.")
    ] = "10s",
    sample_interval: Annotated[
        str | None, typer.Option(metavar="1s", help="Read so often, at most as seldom as published.")
    ] = None,
    from_exporter: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Scrape a dcgm-exporter, such as http://node:9400, not NVML."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="host|NAME",
            help="Whose GPUs are compared with each other: the host's, or all that say the same name.",
        ),
    ] = "host",
    host: Annotated[
        str | None, typer.Option(help="Name of the host; none: this machine's, or the exporter's.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Read and publish once, then end.")] = False,
    as_json: Json = False,
) -> None:
    """Publish what the GPUs of this machine measure.

    Runs until Ctrl-C or SIGTERM, which publish what is held. While Kafka is away samples wait in memory.
    MILLRACE_WORKER_PORT adds /livez, /readyz and /metrics.
    """
    published = _seconds(interval, "--interval")
    sampled = published if sample_interval is None else _seconds(sample_interval, "--sample-interval")
    if sampled > published:
        raise typer.BadParameter("is longer than --interval", param_hint="--sample-interval")
    exporter_url = None if from_exporter is None else _address(from_exporter)
    for value, name in ((peers, "--peers"), (host, "--host")):
        if value is not None and not (0 < len(value) <= 255 and value.isprintable()):
            raise typer.BadParameter("is no name of 1 to 255 printable characters", param_hint=name)

    def body(settings: "Settings") -> int:
        import asyncio
        import socket

        from millrace import collect as module

        wishes = module.Wishes(
            host=host or socket.gethostname(),
            interval_seconds=published,
            sample_interval_seconds=sampled,
            peers=None if peers == "host" else peers,
            exporter_url=exporter_url,
            has_host=host is not None,
            once=once,
            as_json=as_json,
        )
        return asyncio.run(module.collect(settings, wishes))

    run(body)


def _address(url: str) -> str:
    """Read the address of an exporter; one without a path means its metrics."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        is_one = parts.scheme in {"http", "https"} and parts.hostname is not None and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        # Not quoted: there may be a password in it.
        raise typer.BadParameter("is no http:// or https:// address", param_hint="--from-exporter")
    return parts._replace(path="/metrics").geturl() if parts.path in {"", "/"} else url


def _seconds(text: str, option: str) -> float:
    from millrace import durations

    try:
        seconds = durations.parse(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if not _SHORTEST_SECONDS <= seconds <= 3600:
        raise typer.BadParameter(f"{text!r} is not between 100ms and 1h", param_hint=option)
    return seconds
