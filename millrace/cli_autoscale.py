"""Commands about how many workers there should be: the simulator and the plan. Neither needs a cluster."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from millrace.command import Json, run

app = typer.Typer(rich_markup_mode=None)


class PolicyName(StrEnum):
    """How replicas are decided on."""

    deadline = "deadline"
    lag = "lag"


def rate_of(text: str, option: str) -> float:
    """Return an option's rate; what is none is a wrong command line."""
    from millrace.plan import parse_rate

    try:
        return parse_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def seconds_of(text: str, option: str) -> float:
    """Return an option's length of time; what is none is a wrong command line."""
    from millrace import durations

    try:
        seconds = durations.parse(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if seconds <= 0:
        raise typer.BadParameter("it must be longer than nothing", param_hint=option)
    return seconds


@app.command("plan")
def plan(
    rate: Annotated[str, typer.Option(metavar="50/s", help="Images that arrive, at the usual peak.")],
    deadline: Annotated[
        str, typer.Option(metavar="5m", help="How long an image may wait for its prediction.")
    ],
    pod_rate: Annotated[
        str,
        typer.Option(metavar="120/s", help="Images one worker predicts, as `millrace bench-engine` has it."),
    ],
    start: Annotated[
        str,
        typer.Option(metavar="90s", help="From the order of a pod to its readiness: node, image, models."),
    ],
    price: Annotated[float, typer.Option(min=0, help="Of one GPU for one hour, in MILLRACE_CURRENCY.")] = 2.0,
    policy: Annotated[PolicyName, typer.Option(help="Whose ScaledObject is printed.")] = PolicyName.deadline,
    deployment: Annotated[str, typer.Option(help="The deployment of models to be scaled.")] = "default",
    bootstrap_servers: Annotated[
        str, typer.Option(help="Kafka as KEDA reaches it.")
    ] = "millrace-kafka-bootstrap.millrace.svc:9092",
    prometheus: Annotated[
        str, typer.Option(help="Prometheus as KEDA reaches it.")
    ] = "http://prometheus-operated.monitoring.svc:9090",
    as_json: Json = False,
) -> None:
    """Work out partitions, thresholds, replicas and cost, and print the ScaledObject.

    What it prints can be given to `kubectl apply -f -`; what it found out stands above it in comments.
    """
    rates = rate_of(rate, "--rate"), rate_of(pod_rate, "--pod-rate")
    lengths = seconds_of(deadline, "--deadline"), seconds_of(start, "--start")

    from loadtest.autoscale.policies import Facts
    from millrace.plan import show_plan

    facts = Facts(
        pod_images_per_second=rates[1],
        start_seconds=lengths[1],
        deadline_seconds=lengths[0],
        deployment=deployment,
        bootstrap_servers=bootstrap_servers,
        prometheus=prometheus,
    )
    run(lambda settings: show_plan(settings, rates[0], facts, policy.value, price, as_json=as_json))


@app.command("bench-autoscale")
def bench_autoscale(
    seed: Annotated[int, typer.Option(min=0, help="Draws the same arrivals and pods again.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each trace at the main deadline.")] = 5,
    deadline: Annotated[str, typer.Option(metavar="300s", help="The main deadline.")] = "300s",
    pod_rate: Annotated[str, typer.Option(metavar="120/s", help="Images one worker predicts.")] = "120/s",
    start: Annotated[
        str, typer.Option(metavar="90s", help="From the order of a pod to its readiness.")
    ] = "90s",
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw each trace there, as SVG.", file_okay=False)
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Keep it in docs/benchmarks/autoscaling.json, drawn in docs/autoscaling.md."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Simulate KEDA, the HPA and a consumer group over traces of arrivals, beside an optimum that knows them.

    Exit 1 if the deadline policy is late for more than 1 % of the records of a trace, or costs more than 1.3 times
    the optimum.
    """
    lengths = seconds_of(deadline, "--deadline"), seconds_of(start, "--start")
    images_per_second = rate_of(pod_rate, "--pod-rate")

    from loadtest.autoscale.bench import Plan
    from millrace import benchmarks

    plan = Plan(
        seed=seed,
        repeats=repeats,
        deadline_seconds=lengths[0],
        start_seconds=lengths[1],
        pod_images_per_second=images_per_second,
    )
    run(lambda settings: benchmarks.run_autoscale(plan, plots, as_json=as_json, write=write))
