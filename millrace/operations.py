"""`millrace lag`, `topics`, `migrate` and `retention`: what an operator looks at and runs."""

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from millrace.output import EXIT_UNAVAILABLE, counted, emit, say, show, show_table
from pipeline import admin, broker
from pipeline.deployments import Artefact
from pipeline.errors import DependencyError
from pipeline.retention import Removed
from pipeline.settings import Settings
from pipeline.telemetry_retention import RemovedTelemetry
from pipeline.topics import TOPICS

if TYPE_CHECKING:
    from pipeline.database import Database
    from pipeline.objects import ObjectStore

_WATCH_SECONDS = 2.0


class GroupLag(msgspec.Struct, frozen=True):
    """One line of `lag --total --json`."""

    group: str
    topic: str
    partitions: int
    lag: int


class TopicLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `topics --json`."""

    topic: str
    state: str
    partitions: int
    wanted_partitions: int
    replication_factor: int
    unhealthy_partitions: int
    differences: dict[str, tuple[str | None, str]]


class Retained(msgspec.Struct, frozen=True):
    """What `retention --json` prints."""

    before: datetime
    dry_run: bool
    removed: Removed
    telemetry: RemovedTelemetry


async def lag(settings: Settings, groups: list[str] | None, total: bool, watch: bool, as_json: bool) -> int:
    """Print lag once, or again and again until cancelled.

    Raises:
        DependencyError: no broker answers.
    """
    while True:
        rows = await broker.lag(settings, groups)
        lines = _totals(rows) if total else rows
        if as_json:
            for line in lines:
                emit(line)
        elif total:
            show_table(
                ("GROUP", "TOPIC", "PARTITIONS", "LAG"),
                [(line.group, line.topic, line.partitions, line.lag) for line in _totals(rows)],
            )
        else:
            show_table(
                ("GROUP", "TOPIC", "PARTITION", "COMMITTED", "START", "END", "LAG"),
                [
                    (row.group, row.topic, row.partition, row.committed, row.start, row.end, row.lag)
                    for row in rows
                ],
            )
        if not rows:
            if groups:
                say(f"nothing is known of {', '.join(groups)}: `millrace lag` shows the groups there are")
            else:
                say("no group reads any topic here: are the topics there? see `millrace topics`")
        if not watch:
            return 0
        if not as_json:
            show("")
        await asyncio.sleep(_WATCH_SECONDS)


def _totals(rows: list[admin.PartitionLag]) -> list[GroupLag]:
    sums: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        sums[row.group, row.topic].append(row.lag)
    return [GroupLag(group, topic, len(lags), sum(lags)) for (group, topic), lags in sums.items()]


async def list_topics(settings: Settings, as_json: bool) -> int:
    """Print each topic of the table as it is on the broker.

    Raises:
        DependencyError: no broker answers.
    """
    lines = [
        TopicLine(
            topic=state.topic,
            state=_state(state),
            partitions=state.partitions,
            wanted_partitions=state.wanted_partitions,
            replication_factor=state.replication_factor,
            unhealthy_partitions=state.unhealthy_partitions,
            differences=state.differences,
        )
        for state in await broker.describe_topics(settings)
    ]
    if as_json:
        for line in lines:
            emit(line)
        return 0
    kept = {
        settings.topic(topic.name): "latest" if topic.compacted else f"{topic.retention_seconds / 86400:g}d"
        for topic in TOPICS
    }
    show_table(
        ("TOPIC", "PARTITIONS", "REPLICAS", "RETENTION", "STATE"),
        [
            (
                line.topic,
                line.partitions,
                line.replication_factor,
                kept[line.topic],
                line.state,
            )
            for line in lines
        ],
    )
    if any(line.state != "ok" for line in lines):
        say("`millrace topics apply` creates and mends topics")
    return 0


def _state(state: admin.TopicState) -> str:
    if not state.exists:
        return "missing"
    faults = []
    if state.partitions < state.wanted_partitions:
        faults.append(f"{state.wanted_partitions} partitions wanted")
    faults += [f"{name} is {found}, wanted {wanted}" for name, (found, wanted) in state.differences.items()]
    if state.unhealthy_partitions:
        faults.append(f"{state.unhealthy_partitions} partitions lack a replica or a leader")
    return ", ".join(faults) or "ok"


async def apply_topics(settings: Settings, as_json: bool) -> int:
    """Create and mend topics; print what was done.

    Raises:
        ConfigurationError, DependencyError: as `admin.apply_topics` says.
    """
    changes = await broker.apply_topics(settings)
    if as_json:
        for change in changes:
            emit(change)
    else:
        show_table(
            ("TOPIC", "CHANGE", "DETAIL"),
            [(change.topic, change.change, change.detail) for change in changes],
        )
    return 0


async def migrate(settings: Settings, as_json: bool) -> int:
    """Apply migrations; print those that were applied now.

    Raises:
        ConfigurationError, DependencyError: as `postgres.migrate` says.
    """
    from pipeline.database import migrate as apply_migrations

    applied = await apply_migrations(settings.resolved_database, settings.database_password_file)
    for name in applied:
        if as_json:
            emit({"migration": name})
        else:
            show(name)
    say(f"applied {counted(len(applied), 'migration')}" if applied else "the database is up to date")
    return 0


async def retain(settings: Settings, age: timedelta | None, dry_run: bool, as_json: bool) -> int:
    """Delete what is older than `age`, or than the setting says; print counts.

    Files of models are deleted only if Kafka says that no deployment needs them; 69 if it does not answer.

    Raises:
        DependencyError: the database or the object store does not answer.
    """
    from pipeline import telemetry_retention
    from pipeline.database import Database
    from pipeline.objects import ObjectStore
    from pipeline.retention import remove_expired
    from pipeline.telemetry_database import TelemetryDatabase

    before = datetime.now(UTC) - (timedelta(days=settings.result_retention_days) if age is None else age)
    code = 0
    database = await Database.open(settings)
    gpus = await TelemetryDatabase.open(settings)
    objects = ObjectStore.open(settings)
    try:
        if dry_run:
            telemetry = await telemetry_retention.expired(gpus, settings)
            old = await database.count_expired(before)
            counts = Removed(
                images=old.images, predictions=old.predictions, dead_letters=old.dead_letters,
                model_versions=await database.expire_models(before, dry_run=True),
            )  # fmt: skip
        else:
            counts = await remove_expired(database, objects, before)
            telemetry = await telemetry_retention.remove_expired(gpus, settings)
            try:
                files = await _remove_model_files(settings, database, objects, before)
                counts = msgspec.structs.replace(counts, model_files=files)
            except DependencyError as error:
                say(f"files of models were not deleted: {error.message}")
                code = EXIT_UNAVAILABLE
    finally:
        objects.close()
        await gpus.close()
        await database.close()
    if as_json:
        emit(Retained(before, dry_run, counts, telemetry))
        return code
    say(f"{'would delete' if dry_run else 'deleted'} what was stored before {before:%Y-%m-%d %H:%M:%S} UTC")
    shown = msgspec.structs.asdict(counts) | {
        "alerts": telemetry.alerts,
        "partitions of GPU telemetry": len(telemetry.partitions),
    }
    if dry_run:
        del shown["objects"], shown["model_files"]  # known only when the rows are gone
    show_table(("KIND", "COUNT"), [(name.replace("_", " "), count) for name, count in shown.items()])
    return code


async def _remove_model_files(
    settings: Settings, database: "Database", objects: "ObjectStore", before: datetime
) -> int:
    from pipeline import artefacts, registry

    async def used() -> set[Artefact]:
        known = await registry.read(settings)
        if known.unreadable:
            names = ", ".join(sorted(known.unreadable))
            raise DependencyError(f"it cannot be read what {names} should run, see `millrace models list`")
        return artefacts.named_in(known) | await database.artefacts()

    return await artefacts.remove_unused(objects, before, used)
