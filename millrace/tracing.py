"""`millrace trace`: the whole way of one picture as a table, or as JSON."""

from datetime import datetime

from millrace.output import EXIT_FAILED, emit, say, show, show_table
from pipeline import trace
from pipeline.database import Database
from pipeline.settings import Settings
from pipeline.trace import DeploymentTrace, Step, Trace

# Of a batch's other pictures the table names so many; JSON has them all.
SHOWN_COMPANIONS = 5


async def show_trace(settings: Settings, image_id: str, as_json: bool) -> int:
    """Print a picture's way; 0 if anything is known of it.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    database = await Database.open(settings)
    try:
        found = await trace.trace(settings, database, image_id)
    finally:
        await database.close()
    if found is None:
        say(f"nothing is stored of {image_id!r}")
        return EXIT_FAILED
    if as_json:
        emit(found)
    else:
        _show(found)
    return 0


def _show(found: Trace) -> None:
    image = found.image
    parts = [found.id]
    if image.topic is not None:
        parts += [image.lane or "", f"{image.topic}[{image.partition}] at {image.offset}"]
    if image.size_bytes is not None:
        parts.append(f"{image.size_bytes:,} bytes")
    if image.source is not None:
        parts.append(f"from {image.source}")
    show("  ".join(parts))
    if image.deleted_at is not None:
        show(f"deleted at {image.deleted_at.isoformat()}")
    for deployment in found.deployments:
        show(f"\n{deployment.deployment}: {deployment.state}")
        _show_steps(found, deployment)
    if found.unknown:
        say(found.unknown)


def _show_steps(found: Trace, deployment: DeploymentTrace) -> None:
    image = found.image
    begin = image.published_at or next((step.at for step in deployment.steps if step.at), None)
    steps: list[Step] = []
    if image.published_at is not None:
        published = image.published_at.isoformat(timespec="milliseconds")
        steps.append(Step(step="published", at=image.published_at, detail=published))
    steps += deployment.steps
    if image.stored_at is not None:
        steps.append(Step(step="archived", at=image.stored_at, detail="the images row was written"))
    # Of what is told of the same moment the earlier station stays first.
    steps.sort(key=lambda step: (step.at is None, step.at.timestamp() if step.at else 0.0))
    rows = [
        (
            _milliseconds(_since(begin, step.at)),
            _milliseconds(step.seconds),
            step.step,
            step.detail + _companions(step),
        )
        for step in steps
    ]
    show_table(("AFTER", "TOOK", "STEP", "WHAT"), rows)


def _companions(step: Step) -> str:
    if step.batch is None or not step.batch.companions:
        return ""
    names = step.batch.companions
    return ": " + ", ".join(names[:SHOWN_COMPANIONS]) + (", …" if len(names) > SHOWN_COMPANIONS else "")


def _since(begin: datetime | None, at: datetime | None) -> float | None:
    return None if begin is None or at is None else (at - begin).total_seconds()


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:,.1f} ms"
