"""Commands that measure: each starts a stack of its own on free ports and takes it down again."""

from enum import StrEnum
from typing import Annotated

import typer

from millrace.command import Json, run

app = typer.Typer(rich_markup_mode=None)


class Part(StrEnum):
    """What the benchmark of the engine consists of."""

    speed = "speed"
    backlog = "backlog"
    swap = "swap"
    depth = "depth"


Seed = Annotated[int, typer.Option(min=0, help="Draws the same pictures and arrivals again.")]


@app.command()
def bench(
    seed: Seed = 7,
    images: Annotated[int, typer.Option(min=64, help="Pictures in each offline repeat.")] = 1200,
    repeats: Annotated[int, typer.Option(min=1, help="Of each offline measurement.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="How long the online measurement takes.")] = 60.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Pictures per second in it.")] = 30.0,
    write: Annotated[bool, typer.Option("--write", help="Keep it in docs/benchmarks/spine.json.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the spine beside bare loops.

    Offline: images/s from Kafka to the predictions topic, and of the same models over the same pictures in a
    bare loop, in turn. Online: latency from publication to prediction at a steady rate. Exit 1 if a picture
    got no outcome.
    """
    from loadtest.results import Plan
    from millrace import benchmarks

    plan = Plan(
        seed=seed,
        offline_images=images,
        offline_repeats=repeats,
        online_seconds=seconds,
        online_images_per_second=rate,
    )
    run(lambda settings: benchmarks.run_bench(settings, plan, as_json=as_json, write=write))


@app.command("bench-engine")
def bench_engine(
    seed: Seed = 7,
    parts: Annotated[
        list[Part] | None, typer.Option("--part", help="One of them; may be repeated. All if left out.")
    ] = None,
    models: Annotated[
        str, typer.Option(help="torchvision's names, comma-separated; under load the first one.")
    ] = "mobilenet_v3_small,resnet50",
    images: Annotated[int, typer.Option(min=64, help="Pictures in each offline repeat, at most.")] = 2000,
    repeats: Annotated[int, typer.Option(min=1, help="Of each offline measurement.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="How long each online measurement takes.")] = 40.0,
    backlog: Annotated[
        int, typer.Option(min=200, help="Pictures behind which real-time is measured.")
    ] = 20_000,
    swap_images: Annotated[
        int, typer.Option(min=200, help="Pictures during which models are swapped.")
    ] = 1_000,
    deep: Annotated[
        int, typer.Option(min=200, help="Pictures of the large backlog; the small one has 1,000.")
    ] = 100_000,
    write: Annotated[bool, typer.Option("--write", help="Keep it in docs/benchmarks/engine.json.")] = False,
    as_json: Json = False,
) -> None:
    """Measure torchvision models through Kafka beside loops written by hand, and under load.

    speed: images/s beside a naive loop, the best loop without Kafka, and the best loop behind aiokafka, in turn;
    latency at 40 images/s, at 40 % and 80 % of the best loop's rate, and at 80 % of its own. backlog: real-time
    pictures and memory while bulk pictures wait. swap: the gap that another version leaves. depth: a small
    backlog beside a large one.
    """
    from loadtest.engine_results import PARTS, Plan
    from millrace import benchmarks

    plan = Plan(
        seed=seed,
        parts=tuple(part.value for part in parts) if parts else PARTS,
        models=tuple(models.split(",")),
        offline_images=images,
        repeats=repeats,
        online_seconds=seconds,
        backlog_images=backlog,
        swap_images=swap_images,
        deep_images=deep,
    )
    run(lambda settings: benchmarks.run_engine(settings, plan, as_json=as_json, write=write))


@app.command("bench-search")
def bench_search(
    seed: Seed = 7,
    pictures: Annotated[int, typer.Option(min=100, help="Drawn pictures.")] = 3_000,
    vectors: Annotated[int, typer.Option(min=1_000, help="Made-up vectors.")] = 50_000,
    queries: Annotated[int, typer.Option(min=10, help="Searches in each set and mode.")] = 200,
    write: Annotated[bool, typer.Option("--write", help="Keep it in docs/benchmarks/search.json.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what search by image finds, and how fast.

    Recall of the index beside an exact search, that beside a computation of everything, and the latency of both.
    """
    from loadtest.search import Plan
    from millrace import benchmarks

    plan = Plan(seed=seed, pictures=pictures, vectors=vectors, queries=queries)
    run(lambda settings: benchmarks.run_search(settings, plan, as_json=as_json, write=write))


@app.command("bench-steps")
def bench_steps(
    seed: Seed = 7,
    predictions: Annotated[int, typer.Option(min=100, help="For `store`, per repeat.")] = 20_000,
    pictures: Annotated[int, typer.Option(min=100, help="For `archive`, per repeat.")] = 3_000,
    repeats: Annotated[int, typer.Option(min=1, help="Of each step.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Keep it in docs/benchmarks/steps.json.")] = False,
    as_json: Json = False,
) -> None:
    """Measure how fast one `store` and one `archive` work off a backlog.

    What is printed is what the `lagThreshold` of their ScaledObjects is worked out from.
    """
    from loadtest.steps_bench import Plan
    from millrace import benchmarks

    plan = Plan(seed=seed, predictions=predictions, pictures=pictures, repeats=repeats)
    run(lambda settings: benchmarks.run_steps(settings, plan, as_json=as_json, write=write))


@app.command("bench-telemetry")
def bench_telemetry(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION]...", help="Which to measure; none: all.")
    ] = None,
    seed: Seed = 7,
    records: Annotated[int, typer.Option(min=50, help="Of 64 samples each, per repeat.")] = 3_000,
    repeats: Annotated[int, typer.Option(min=1, help="Of each way.")] = 3,
    write: Annotated[
        bool, typer.Option("--write", help="Keep it in docs/benchmarks/telemetry.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure GPU telemetry beside a bare loop.

    Samples/s from Kafka into PostgreSQL with one worker, and of a loop written by hand, in turn; insertion and
    queries while the database grows.
    """
    from loadtest.telemetry_bench import Plan
    from millrace import benchmarks

    plan = Plan(seed=seed, records=records, single_records=7 * records, repeats=repeats)
    run(
        lambda settings: benchmarks.run_telemetry(
            settings, plan, sections or [], as_json=as_json, write=write
        )
    )


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=1, help="How long.")] = 10.0,
    rate: Annotated[float, typer.Option(min=1, help="Pictures per second, both lanes together.")] = 30.0,
    seed: Seed = 7,
    write: Annotated[bool, typer.Option("--write", help="Keep it in docs/benchmarks/soak.json.")] = False,
    as_json: Json = False,
) -> None:
    """Load everything for minutes and watch it.

    Exit 0 only if the memory of each process, the ledgers and lag stay flat, and every picture is accounted for.
    """
    from loadtest.soak import Plan
    from millrace import benchmarks

    plan = Plan(seconds=minutes * 60, images_per_second=rate, seed=seed)
    run(lambda settings: benchmarks.run_soak(settings, plan, as_json=as_json, write=write))
