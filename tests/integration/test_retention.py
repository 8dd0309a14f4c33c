"""Retention and deletion on a real database and folder."""

import json
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from agents.archive import Archive
from millrace.operations import retain
from millrace.output import EXIT_UNAVAILABLE
from pipeline import admin, artefacts, deployments, retention
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.deployments import Artefact, Desired, Refusal, Status, Version
from pipeline.errors import DependencyError
from pipeline.events import ImageEvent, Outgoing, Record, encode_image
from pipeline.objects import ObjectStore, dead_letter_key, image_key
from pipeline.registry import activate
from pipeline.results import Expired
from pipeline.retention import Removed
from pipeline.settings import load
from pipeline.topics import MODELS
from tests.support import services
from tests.support.samples import GROUP, NOW, SHA_A, SHA_B, dead_letter, image_row, prediction

OLD = "now() - interval '100 days'"


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(load(database_url=database))
    yield opened
    await opened.close()


@pytest.fixture
async def objects(tmp_path: Path) -> AsyncIterator[ObjectStore]:
    opened = ObjectStore.open(load(object_store_url=str(tmp_path)))
    yield opened
    opened.close()


async def keys(objects: ObjectStore) -> set[str]:
    return {item.key async for page in objects.list("") for item in page}


def days_ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


async def add(db: Database, objects: ObjectStore, image_id: str, offset: int) -> set[str]:
    """Store an image with its result, dead letter and objects; return the objects' keys."""
    key, value_key = image_key(image_id, SHA_A), dead_letter_key(GROUP, "t", 0, offset)
    await objects.put(key, b"picture")
    await objects.put(value_key, b"value")
    await db.save_images([image_row(image_id, object_key=key)])
    await db.save([prediction(image_id)], [dead_letter(image_id, offset=offset, value_ref=value_key)])
    return {key, value_key}


async def age(dsn: str, where: str = "true") -> None:
    for table in ("images", "predictions", "dead_letters"):
        await services.execute(dsn, f"UPDATE {table} SET stored_at = {OLD} WHERE {where}")


async def test_only_what_is_old_goes(db: Database, objects: ObjectStore, database: str) -> None:
    """Rows and objects stored before the moment go, in batches; younger ones stay."""
    for number in range(7):
        await add(db, objects, f"old-{number}", number)
    await age(database)
    young = await add(db, objects, "young", 100)
    removed = await retention.remove_expired(db, objects, days_ago(90), batch_rows=3)
    assert removed == Removed(images=7, predictions=7, dead_letters=7, objects=14)
    assert await keys(objects) == young
    assert await db.image("young") is not None
    assert await db.image("old-0") is None
    assert [row.prediction.image_id for row in await db.recent_predictions(99)] == ["young"]
    assert await db.embeddings(prediction("old-0").id) == {}
    assert await retention.remove_expired(db, objects, days_ago(90)) == Removed()


class Unplugged:
    """An object store that fails after so many deletions, as a crash in the middle would."""

    def __init__(self, objects: ObjectStore, deletions: int) -> None:
        self._objects = objects
        self._deletions = deletions

    async def delete(self, object_keys: Sequence[str]) -> None:
        for key in object_keys:
            if self._deletions == 0:
                raise DependencyError("unplugged")
            self._deletions -= 1
            await self._objects.delete([key])


@pytest.mark.parametrize("deletions", [0, 1, 3])
async def test_a_crash_leaks_no_object(
    db: Database, objects: ObjectStore, database: str, deletions: int
) -> None:
    """Wherever retention dies, the next run deletes what the first had unhooked."""
    for number in range(2):
        await add(db, objects, f"old-{number}", number)
    await age(database)
    with pytest.raises(DependencyError):
        await retention.remove_expired(db, Unplugged(objects, deletions), days_ago(90))  # type: ignore[arg-type]
    assert await db.image("old-0") is None
    await retention.remove_expired(db, objects, days_ago(90))
    assert await keys(objects) == set()
    assert await db.queued_objects(10) == []


async def test_deleting_an_image_deletes_everything_of_it(db: Database, objects: ObjectStore) -> None:
    """Row, results, vectors, dead letters and objects of one image go at once; its neighbours stay."""
    await add(db, objects, "a", 1)
    kept = await add(db, objects, "b", 2)
    assert await retention.delete_image(db, objects, "a")
    assert not await retention.delete_image(db, objects, "a")
    assert not await retention.delete_image(db, objects, "never there")
    assert await keys(objects) == kept
    assert await db.state("a") is None
    assert await db.state("b") is not None


class Handed:
    """A record in the hands of `archive`; `outcome` is what it finished it with."""

    lane = "bulk"
    outcome: str | None = None

    def __init__(self, event: ImageEvent) -> None:
        sent = encode_image(event)
        now_ms = int(NOW.timestamp() * 1000)
        self.record = Record(
            topic="images.bulk.v1",
            partition=0,
            offset=1,
            timestamp_ms=now_ms,
            value=sent.value,
            headers=sent.headers,
        )

    def finish(self, outcome: str) -> None:
        self.outcome = outcome


async def test_a_picture_deleted_while_it_is_archived_leaves_nothing(
    db: Database, objects: ObjectStore, database: str, tmp_path: Path
) -> None:
    """A deletion between an image's row and its object leaves neither."""

    class Deleting(ObjectStore):
        async def put(self, key: str, data: bytes) -> None:
            await super().put(key, data)
            await retention.delete_image(db, objects, "a")

    settings = load(database_url=database, object_store_url=str(tmp_path))
    archive = Archive(settings)
    archive._database = db
    archive._objects = Deleting.open(settings)
    handed = Handed(ImageEvent(id="a", data=b"picture"))
    await archive._keep([handed])  # type: ignore[list-item]
    archive._objects.close()
    assert handed.outcome == "skipped"
    assert await keys(objects) == set()
    assert await db.image("a") is None


async def test_others_objects_are_never_deleted(db: Database, objects: ObjectStore, database: str) -> None:
    """What a `ce_dataref` points to is deleted only if Millrace put it there for this very image."""
    others = {"uploads/cat.jpg", "images/holiday/cat.jpg", image_key("victim", SHA_B), "dead-lettersX/1"}
    for key in others:
        await objects.put(key, b"theirs")
    for number, key in enumerate(sorted(others)):
        await db.save_images([image_row(f"i{number}", None, object_key=key)])
        await db.save([], [dead_letter(f"i{number}", offset=number, value_ref=key)])
    await db.save([], [dead_letter("trick", offset=99, value_ref="dead-letters/../../etc/passwd")])
    await db.save_images([image_row("victim", SHA_B, object_key=image_key("victim", SHA_B))])
    await retention.delete_image(db, objects, "i0")
    await age(database, "image_id <> 'victim'")
    await retention.remove_expired(db, objects, days_ago(90))
    assert await keys(objects) == others


async def test_a_picture_that_is_stored_again_keeps_its_object(db: Database, objects: ObjectStore) -> None:
    """An object that was queued for deletion and is in use again by then is left alone."""
    await add(db, objects, "a", 1)
    key = image_key("a", SHA_A)
    queued = await db.delete_image("a")
    assert queued is not None
    assert key in queued
    later = datetime.now(UTC) + timedelta(seconds=1)
    await db.save_images([image_row("a", object_key=key, published_at=later)])
    await retention.remove_queued_objects(db, objects)
    assert await keys(objects) == {key}


async def test_orphans_go_when_they_are_old(db: Database, objects: ObjectStore) -> None:
    """An upload that was never published has no row; its object goes by its own age, others' objects never."""
    orphan, theirs = image_key("orphan", SHA_A), "images/ab/theirs"
    await objects.put(orphan, b"x")
    await objects.put(theirs, b"x")
    used = await add(db, objects, "used", 1)
    assert await retention.remove_expired(db, objects, days_ago(1)) == Removed()
    assert await retention.remove_orphans(db, objects, datetime.now(UTC) + timedelta(hours=1)) == 1
    assert await keys(objects) == {theirs} | used


async def test_tombstones_go_when_kafka_has_forgotten(db: Database, database: str) -> None:
    """A deletion is remembered for as long as Kafka may still hold what was deleted, and no longer."""
    await db.save_images([image_row("a")])
    await db.delete_image("a")
    await services.execute(database, "UPDATE deleted_images SET deleted_at = now() - interval '29 days'")
    await db.expire(days_ago(1), 10)
    published = days_ago(29.5)
    assert [saved.status for saved in await db.save_images([image_row("a", published_at=published)])] == [
        "deleted"
    ]
    await services.execute(database, "UPDATE deleted_images SET deleted_at = now() - interval '31 days'")
    assert await db.expire(days_ago(1), 10) == Expired()
    published = days_ago(32)
    assert [saved.status for saved in await db.save_images([image_row("a", published_at=published)])] == [
        "stored"
    ]


async def test_retention_passes_rows_by_that_are_in_use(db: Database, database: str) -> None:
    """Retention never waits for a writer's lock, nor deadlocks with one: what is locked goes next time."""
    import asyncpg

    await db.save([prediction("a"), prediction("b")], [])
    await age(database)
    blocker = await asyncpg.connect(database)
    async with blocker.transaction():
        await blocker.execute("SELECT FROM predictions WHERE image_id = 'a' FOR UPDATE")
        assert (await db.expire(days_ago(90), 10)).predictions == 1
    await blocker.close()
    assert (await db.expire(days_ago(90), 10)).predictions == 1
    assert msgspec.structs.asdict(await db.expire(days_ago(90), 10))["predictions"] == 0


def a_version(revision: int, *files: Artefact, predecessor: int | None = None) -> Desired:
    before = None if predecessor is None else Version(revision=predecessor, models=("builtin:x",))
    return Desired(
        deployment="default", version=Version(revision=revision, models=("builtin:x",), artefacts=files),
        activated_by="t", activated_at=NOW + timedelta(hours=revision), predecessor=before,
    )  # fmt: skip


async def test_versions_that_were_replaced_long_ago_are_forgotten(
    db: Database, objects: ObjectStore, database: str
) -> None:
    """The history keeps a version as long as the results of those days are kept, and what is fallen back to."""
    refused = Status(deployment="default", replica="r", time=NOW, refused=Refusal(1, "no", NOW))
    versions = [a_version(number, predecessor=2 if number == 5 else None) for number in range(1, 6)]
    await db.save_models([*versions, refused])
    for table in ("model_versions", "model_reports"):
        await services.execute(database, f"UPDATE {table} SET stored_at = {OLD}")
    await services.execute(database, "UPDATE model_versions SET stored_at = now() WHERE revision = 5")
    assert await db.expire_models(days_ago(90), dry_run=True) == 2
    assert len(await db.model_history("default", 10)) == 5
    removed = await retention.remove_expired(db, objects, days_ago(90))
    assert removed == Removed(model_versions=2)
    # 4 was at work until 5 came, 2 is what replicas fall back to.
    assert [version.revision for version in await db.model_history("default", 10)] == [5, 4, 2]
    await db.save_models(versions[:1])
    assert (await db.model_history("default", 10))[-1].reports == ()


async def test_files_of_models_go_with_the_last_version_that_names_them(
    kafka: str, topic_prefix: str, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files stay while a deployment should run them, may fall back to them, or the history has them."""
    settings = load(
        kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, database_url=database,
        object_store_url=str(tmp_path / "objects"),
    )  # fmt: skip
    await admin.apply_topics(settings, [MODELS])
    objects = ObjectStore.open(settings)
    files = {}
    for name in ("fallback", "present", "history", "unused"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(name.encode())
        _, (files[name],) = await artefacts.upload(objects, [f"file:{path}#torchvision:resnet18"])
        os.utime(tmp_path / "objects" / artefacts.object_key(files[name]), (0, 0))
    for name in ("fallback", "present"):
        await activate(settings, "default", ["file:x"], artefacts=[files[name]], activated_by="t")
    opened = await Database.open(settings)
    await opened.save_models([a_version(1, files["history"])])
    await opened.close()
    publisher = Publisher(settings, client_id="test")
    await publisher.start()
    garbage, gone = Outgoing(b"other", b"garbage", ()), deployments.tombstone("other")
    await publisher.publish(settings.topic(MODELS.name), garbage)
    assert await retain(settings, timedelta(days=90), dry_run=False, as_json=True) == EXIT_UNAVAILABLE
    assert "cannot be read what other should run" in capsys.readouterr().err
    await publisher.publish(settings.topic(MODELS.name), gone)
    await publisher.stop()
    assert len(await keys(objects)) == 4
    assert await retain(settings, timedelta(days=90), dry_run=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["removed"]["model_files"] == 1
    kept = ("fallback", "present", "history")
    assert await keys(objects) == {artefacts.object_key(files[name]) for name in kept}
    objects.close()
