"""`millrace k8s`: manifests for a cluster, and a look at one."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.cli_autoscale import PolicyName, rate_of, seconds_of
from millrace.command import Json, run

if TYPE_CHECKING:
    from millrace.render import Rates

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Kubernetes: manifests, and a look at a cluster."
)


class OverlayName(StrEnum):
    """The overlays that come with Millrace."""

    dev = "dev"
    production = "production"


def _pairs(given: list[str] | None, option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise typer.BadParameter(f"{text!r} is not {example}", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        pairs[name] = value
    return pairs


def _rates(rate: str | None, deadline: str | None, pod_rate: str | None, start: str | None) -> "Rates | None":
    from millrace.render import Rates

    if rate is None and deadline is None and pod_rate is None and start is None:
        return None
    if rate is None or deadline is None or pod_rate is None or start is None:
        raise typer.BadParameter(
            "--rate, --deadline, --pod-rate and --start go together", param_hint="--rate"
        )
    return Rates(
        images_per_second=rate_of(rate, "--rate"),
        deadline_seconds=seconds_of(deadline, "--deadline"),
        pod_images_per_second=rate_of(pod_rate, "--pod-rate"),
        start_seconds=seconds_of(start, "--start"),
    )


@app.command("render")
def render(
    overlay: Annotated[OverlayName, typer.Option(help="What to begin with.")] = OverlayName.dev,
    namespace: Annotated[str | None, typer.Option(help="In place of millrace.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="worker=REGISTRY/NAME:TAG", help="Where an image comes from; may be repeated."),
    ] = None,
    deployment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODELS", help="A deployment of models, `default` or a new one; may be repeated."
        ),
    ] = None,
    kafka: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|HOST:PORT,…", help="The Strimzi cluster's name; or brokers that run elsewhere."
        ),
    ] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="A whole GPU for each worker, or none.")
    ] = None,
    policy: Annotated[PolicyName | None, typer.Option(help="How workers are scaled.")] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="50/s", help="As for `millrace plan`, with the next three.")
    ] = None,
    deadline: Annotated[str | None, typer.Option(metavar="5m", help="As for `millrace plan`.")] = None,
    pod_rate: Annotated[str | None, typer.Option(metavar="120/s", help="As for `millrace plan`.")] = None,
    start: Annotated[str | None, typer.Option(metavar="90s", help="As for `millrace plan`.")] = None,
    runbook: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where alerts lead: your copy of docs/runbook.md, without `#…`."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the changed kustomize tree there instead.", file_okay=False
        ),
    ] = None,
) -> None:
    """Print an overlay's manifests for other names, images and deployments; needs kustomize or kubectl.

    What it prints can be given to `kubectl apply -f -`; docs/kubernetes.md says what is in it.
    """
    from millrace.render import Wishes
    from millrace.render import render as show

    wishes = Wishes(
        overlay=overlay.value,
        namespace=namespace,
        images=_pairs(image, "--image", "IMAGE=REGISTRY/NAME:TAG"),
        deployments=_pairs(deployment, "--deployment", "NAME=MODELS"),
        kafka=kafka,
        gpu=gpu,
        policy=policy.value if policy else None,
        rates=_rates(rate, deadline, pod_rate, start),
        runbook=runbook,
    )
    run(lambda settings: show(wishes, save))


@app.command("doctor")
def doctor(
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Where Millrace is.")] = "millrace",
    context: Annotated[
        str | None, typer.Option(help="Of kubectl's configuration; none: the current one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a live cluster through kubectl and say what is missing and how to mend it; changes nothing.

    Exit 1 if something is at fault, 69 if no cluster answers.
    """

    def body(settings: object) -> int:
        from millrace.cluster import read
        from millrace.cluster_doctor import examine, report
        from millrace.kubectl import Kubectl

        return report(examine(read(Kubectl(context), namespace)), as_json=as_json)

    run(body)
