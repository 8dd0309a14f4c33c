"""`millrace compare`: two deployments side by side, as tables or as JSON."""

from collections.abc import Iterator
from datetime import datetime

from millrace.output import EXIT_FAILED, counted, emit, say, show, show_table
from pipeline.agreement import Agreement
from pipeline.comparison import Comparison, Seconds, SideName
from pipeline.database import Database
from pipeline.settings import Settings


async def show_comparison(
    settings: Settings, a: SideName, b: SideName, since: datetime | None, limit: int, as_json: bool
) -> int:
    """Print how two deployments compare; 1 if there is no image that both have predicted.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    database = await Database.open(settings)
    try:
        found = await database.compare(a, b, since=since, limit=limit)
    finally:
        await database.close()
    if as_json:
        emit(found)
    elif found.both:
        _show(found)
    if not found.both:
        say(_nothing(found))
    return 0 if found.both else EXIT_FAILED


def _nothing(found: Comparison) -> str:
    """Say why there is nothing to compare."""
    window = f" stored since {_moment(found.since)}" if found.since else ""
    for side in (found.a, found.b):
        if not side.images:
            return f"{side.name} has no result{window}"
    both = f"{found.a.name} has {counted(found.a.images, 'result')} and {found.b.name} {found.b.images:,}"
    return f"{both}{window}, but there is no image that both have predicted" + (
        f"; --limit looks at more than {found.a.images:,}" if found.is_cut else ""
    )


def _show(found: Comparison) -> None:
    window = f", stored since {_moment(found.since)}" if found.since else ""
    cut = "; --limit looks further back" if found.is_cut else ""
    show(f"{counted(found.both, 'image')} predicted by both{window}{cut}\n")
    show_table(("", found.a.name, found.b.name), _sides(found))
    show("")
    show_table(
        ("TASK", found.a.name.upper(), found.b.name.upper(), "IMAGES", "AGREEMENT"),
        [(one.task, one.a, one.b, one.images, agreement(one)) for one in found.models],
    )
    labels = [pair for one in found.models for pair in one.disagreements]
    if labels:
        show("")
        names = f"{found.a.name.upper()} SAYS", f"{found.b.name.upper()} SAYS"
        show_table(
            (*names, "IMAGES", "SUCH AS"), [(pair.a, pair.b, pair.images, pair.example) for pair in labels]
        )
    others = [one for one in found.outcomes if (one.a, one.b) != ("predicted", "predicted")]
    if others:
        show("")
        show_table(
            (found.a.name.upper(), found.b.name.upper(), "IMAGES"),
            [(one.a, one.b, one.images) for one in others],
        )


def _sides(found: Comparison) -> Iterator[tuple[str, str, str]]:
    sides = (found.a, found.b)

    def row(name: str, *values: str | None) -> tuple[str, str, str]:
        first, second = (value or "-" for value in values)
        return name, first, second

    yield row("results", *(f"{side.images:,}" for side in sides))
    yield row("of these alone", *(f"{side.alone:,}" for side in sides))
    yield row("queue, p50 / p99", *(_times(side.queue_seconds) for side in sides))
    yield row("decode, p50 / p99", *(_times(side.decode_seconds) for side in sides))
    yield row("forward, p50 / p99 of a batch", *(_times(side.forward_seconds) for side in sides))
    yield row("batch size", *(_number(side.batch_size, "{:.1f}") for side in sides))
    costs = [side.forward_seconds_per_image for side in sides]
    yield row("forward per image", *(None if cost is None else f"{cost * 1000:.2f} ms" for cost in costs))
    yield row("joules per image", *(_number(side.joules_per_image, "{:.3g}") for side in sides))
    yield row("devices", *(", ".join(side.devices) for side in sides))


def agreement(found: Agreement) -> str:
    """Say in one line how far two models agree."""
    parts = []
    if found.same_label is not None:
        parts.append(f"same label {found.same_label:.1%}")
    if found.same_boxes is not None:
        parts.append(f"same boxes {found.same_boxes:.1%} of {found.boxes_a} and {found.boxes_b}")
    if found.iou is not None:
        parts.append(f"IoU {found.iou:.2f}")
    if found.cosine is not None and found.cosine_p01 is not None:
        parts.append(f"cosine {found.cosine:.4f}, 99 % above {found.cosine_p01:.4f}")
    if found.score_difference is not None:
        parts.append(
            f"scores {found.score_difference:.4f} apart, 99 % below {found.score_difference_p99:.4f}"
        )
    if found.score_bias is not None:
        parts.append(f"on average {found.score_bias:+.4f}")
    if found.incomparable:
        parts.append(f"{found.incomparable:,} vectors that cannot be compared")
    return "; ".join(parts)


def _times(seconds: Seconds | None) -> str | None:
    return None if seconds is None else f"{seconds.p50 * 1000:.1f} / {seconds.p99 * 1000:.1f} ms"


def _number(number: float | None, form: str) -> str | None:
    return None if number is None else form.format(number)


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
