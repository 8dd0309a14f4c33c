"""The commands for GPU telemetry: GPUs, and alerts with their silences."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.command import Json, run

if TYPE_CHECKING:
    from pipeline.settings import Settings

gpus_app = typer.Typer(rich_markup_mode=None, help="Look at GPUs and what they take.")
alerts_app = typer.Typer(rich_markup_mode=None, help="Look at alerts, and silence them.")


class GpuState(StrEnum):
    """Whether the driver answers for a GPU."""

    ok = "ok"
    lost = "lost"


class AlertState(StrEnum):
    """Where an alert is in its life."""

    pending = "pending"
    firing = "firing"
    resolved = "resolved"


class Severity(StrEnum):
    """How bad."""

    info = "info"
    warning = "warning"
    critical = "critical"


class By(StrEnum):
    """What a row is of."""

    gpu = "gpu"
    host = "host"


Host = Annotated[str | None, typer.Option(help="Only on this host.")]
Model = Annotated[str | None, typer.Option(help="Only this model.")]
State = Annotated[GpuState | None, typer.Option(help="Only in this state.")]


@gpus_app.callback(invoke_without_command=True)
def gpus(context: typer.Context, as_json: Json = False) -> None:
    """List GPUs by host, with their latest values and what fires, from the database."""
    if context.invoked_subcommand is None:
        gpus_list(as_json=as_json)


@gpus_app.command("list")
def gpus_list(
    host: Host = None,
    model: Model = None,
    state: State = None,
    limit: Annotated[int, typer.Option(min=1, help="So many.")] = 100,
    as_json: Json = False,
) -> None:
    """List GPUs by host, with their latest values and what fires, from the database."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import gpus
        from pipeline.telemetry_reads import GpuFilter

        chosen = GpuFilter(host=host, model=model, state=state and state.value)
        return asyncio.run(gpus.show_list(settings, chosen, limit, as_json))

    run(body)


@gpus_app.command("show")
def gpus_show(
    uuid: Annotated[str, typer.Argument(metavar="UUID", help="The GPU's UUID.")], as_json: Json = False
) -> None:
    """Show all that is known of one GPU, and its open alerts."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import gpus

        return asyncio.run(gpus.show_one(settings, uuid, as_json))

    run(body)


@gpus_app.command("top")
def gpus_top(
    host: Host = None,
    model: Model = None,
    limit: Annotated[int, typer.Option(min=1, help="The worst so many.")] = 50,
    interval: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end, as into a pipe.")] = False,
    as_json: Json = False,
) -> None:
    """Watch GPUs, the worst first: lost, then by what fires, then silent, then hot."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import gpus
        from pipeline.telemetry_reads import GpuFilter

        chosen = GpuFilter(host=host, model=model)
        return asyncio.run(
            gpus.top(settings, chosen, limit, interval_seconds=interval, once=once, as_json=as_json)
        )

    run(body)


@gpus_app.command("energy")
def gpus_energy(
    by: Annotated[By, typer.Option(help="A row for each of these.")] = By.host,
    since: Annotated[
        str, typer.Option("--from", metavar="24h|TIME", help="From when; TIME as 2026-01-31T12:00Z.")
    ] = "24h",
    until: Annotated[
        str | None, typer.Option("--to", metavar="1h|TIME", help="Until when; none: now.")
    ] = None,
    host: Host = None,
    limit: Annotated[int, typer.Option(min=1, help="Those that took the most.")] = 50,
    as_json: Json = False,
) -> None:
    """Show kilowatt-hours and idle GPU-hours, and what they cost where prices are set."""
    from millrace import durations

    try:
        start = durations.moment(since)
        end = datetime.now(UTC) if until is None else durations.moment(until)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--from, --to") from None
    if end < start:
        raise typer.BadParameter("the end comes before the beginning", param_hint="--from, --to")

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import gpus

        return asyncio.run(gpus.energy(settings, by.value, start, end, host, limit, as_json))

    run(body)


@alerts_app.callback(invoke_without_command=True)
def alerts(context: typer.Context, as_json: Json = False) -> None:
    """List alerts, the latest begun first, from the database."""
    if context.invoked_subcommand is None:
        alerts_list(as_json=as_json)


@alerts_app.command("list")
def alerts_list(
    state: Annotated[
        list[AlertState] | None, typer.Option(help="Only in this state; may be repeated.")
    ] = None,
    severity: Annotated[list[Severity] | None, typer.Option(help="Only these; may be repeated.")] = None,
    rule: Annotated[str | None, typer.Option(help="Only of this rule.")] = None,
    host: Host = None,
    gpu: Annotated[str | None, typer.Option(metavar="UUID", help="Only of this GPU.")] = None,
    since: Annotated[str | None, typer.Option(metavar="1d|TIME", help="Only those that began since.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The latest so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List alerts, the latest begun first, from the database."""
    from millrace import durations

    try:
        began = None if since is None else durations.moment(since)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from None

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import alerts
        from pipeline.telemetry_reads import AlertFilter

        chosen = AlertFilter(
            states=tuple(each.value for each in state or ()),
            severities=tuple(each.value for each in severity or ()),
            rule=rule,
            host=host,
            gpu_uuid=gpu,
            since=began,
        )
        return asyncio.run(alerts.show_list(settings, chosen, limit, as_json))

    run(body)


@alerts_app.command("show")
def alerts_show(
    alert: Annotated[
        str, typer.Argument(metavar="ID", help="As `list` shows it, or its first 8 characters or more.")
    ],
    as_json: Json = False,
) -> None:
    """Show one alert: what was seen, what to do next, and who was told."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import alerts

        return asyncio.run(alerts.show_one(settings, alert, as_json))

    run(body)


@alerts_app.command("tail")
def alerts_tail(
    since: Annotated[
        str,
        typer.Option(
            "--from", metavar="latest|earliest|5m|TIME", help="From where; TIME as 2026-01-31T12:00Z."
        ),
    ] = "latest",
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    severity: Annotated[Severity | None, typer.Option(help="Only these.")] = None,
    as_json: Json = False,
) -> None:
    """Print steps of alerts as they are published to Kafka, until Ctrl-C."""
    from millrace import results

    try:
        start = results.parse_start(since)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--from") from None

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import alerts

        return asyncio.run(alerts.tail(settings, start, limit, severity and severity.value, as_json))

    run(body)


@alerts_app.command("silence")
def alerts_silence(
    labels: Annotated[
        list[str],
        typer.Argument(metavar="LABEL=PATTERN...", help="Such as host=gpu-* rule=power_cap; all must fit."),
    ],
    length: Annotated[str, typer.Option("--for", metavar="2h", help="How long.")],
    comment: Annotated[str, typer.Option(help="Why.")] = "",
    as_json: Json = False,
) -> None:
    """Have nobody told of what fits, for a while; alerts themselves go on."""
    from millrace import alerts, durations

    try:
        alerts.parse_labels(labels)
        lasts = durations.parse(length)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="LABEL=PATTERN, --for") from None
    if not lasts or lasts.days > 366 or len(comment) > 1000:
        raise typer.BadParameter(
            "a silence lasts a year at most, its comment has 1,000 characters", param_hint="--for"
        )

    def body(settings: "Settings") -> int:
        import asyncio

        return asyncio.run(alerts.silence(settings, labels, lasts, comment, as_json))

    run(body)


@alerts_app.command("unsilence")
def alerts_unsilence(
    number: Annotated[int, typer.Argument(min=0, metavar="NUMBER", help="As `silences` shows it.")],
    as_json: Json = False,
) -> None:
    """End a silence; what it held back and still fires is told."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import alerts

        return asyncio.run(alerts.unsilence(settings, number, as_json))

    run(body)


@alerts_app.command("silences")
def alerts_silences(
    every: Annotated[bool, typer.Option("--all", help="Those that are over, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Newest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List silences that hold or will hold."""

    def body(settings: "Settings") -> int:
        import asyncio

        from millrace import alerts

        return asyncio.run(alerts.silences(settings, every, limit, as_json))

    run(body)
