"""The database: what `store` and `archive` write, what gateway, command line and accounting read.

Every write is one transaction, idempotent, and right under concurrent writers of the same rows. Truth about
identity is in the tables' keys (`migrations/`), not here.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pipeline import comparison, search, writes
from pipeline.comparison import Comparison, SideName
from pipeline.deadletters import DeadLetter
from pipeline.deployments import Artefact, Desired, Status
from pipeline.errors import DependencyError
from pipeline.events import Prediction
from pipeline.postgres import QUERIES, Pool
from pipeline.postgres import migrate as migrate
from pipeline.results import (
    Accounting,
    DeadLetterPlace,
    Expired,
    ImageRow,
    ImageState,
    ModelVersion,
    ResultPlace,
    Saved,
    SavedImage,
    StoredDeadLetter,
    StoredPrediction,
    TracedImage,
    read_dead_letter,
    read_model_version,
    read_prediction,
)
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS
from pipeline.vectors import After, Embedding, Filters, Found, Mode, Space

# "deletion" in ASCII: writers hold it shared, `delete_image` alone.
_DELETION_LOCK = 0x64656C6574696F6E
# Longer than any record that was published before a deletion stays readable.
_TOMBSTONE = timedelta(seconds=DEAD_LETTERS.retention_seconds)
NO_FILTERS = Filters()


class Database:
    """One process's connections to PostgreSQL and everything it may ask of it."""

    def __init__(self, pool: Pool, topic_prefix: str = "") -> None:
        self._pool = pool
        self._topic_prefix = topic_prefix

    @classmethod
    async def open(cls, settings: Settings, *, check: bool = True) -> "Database":
        """Connect, and see that the database is migrated; without `check` the first call connects.

        Raises:
            ConfigurationError: the URL is wrong, or the server refuses who we are.
            DependencyError: it does not answer or is not migrated yet.
        """
        database = cls(await Pool.open(settings), settings.topic_prefix)
        if check:
            try:
                await database.check()
            except BaseException:
                await database.close()
                raise
        return database

    @property
    def pool(self) -> Pool:
        """The connections, for reads that have a module of their own."""
        return self._pool

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        await self._pool.close()

    async def check(self) -> None:
        """See that the server can be used and is migrated; raises as `open` does."""
        await self._pool.check()

    async def ping(self, timeout_seconds: float) -> None:
        """See that the server answers.

        Raises:
            DependencyError: not within the time.
        """
        try:
            async with asyncio.timeout(timeout_seconds), self._pool.transaction() as connection:
                await connection.fetchval("SELECT 1")
        except TimeoutError:
            raise DependencyError(f"PostgreSQL does not answer within {timeout_seconds:g} s") from None

    async def save(
        self,
        predictions: Sequence[Prediction],
        dead_letters: Sequence[DeadLetter],
        published_at: Sequence[datetime | None] | None = None,
    ) -> Saved:
        """Store a batch in one transaction; what is there already is counted and left as it is.

        `published_at` says of each prediction when the broker took it, where that is known.

        Raises:
            StorageRefusedError: some record of the batch is at fault; nothing was stored.
            DependencyError: try again; whether it was stored does not matter.
        """
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["writers_share"], _DELETION_LOCK)
            times = published_at or [None] * len(predictions)
            counts = await writes.save_predictions(connection, predictions, times) if predictions else {}
            stored_letters = await writes.save_dead_letters(connection, dead_letters) if dead_letters else 0
        return Saved(**counts, dead_letters=stored_letters)

    async def save_images(self, rows: Sequence[ImageRow]) -> list[SavedImage]:
        """Store images in one transaction; the answer is in the order of `rows`.

        A second writer of the same picture fills in what the first did not know (digest, object key).

        Raises:
            StorageRefusedError, DependencyError: as `save` does.
        """
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["writers_share"], _DELETION_LOCK)
            return await writes.save_images(connection, rows) if rows else []

    async def save_models(self, values: Sequence[Desired | Status]) -> None:
        """Add what `models.v1` said to the history, in one transaction; what is there already stays.

        Raises:
            StorageRefusedError, DependencyError: as `save` does.
        """
        async with self._pool.transaction() as connection:
            await writes.save_models(connection, values)

    async def model_history(
        self, deployment: str, limit: int, before: int | None = None
    ) -> list[ModelVersion]:
        """Return a deployment's versions, newest first; `before` is the revision of the last one seen."""
        rows = await self._pool.rows("model_history", deployment, limit, before)
        return [read_model_version(row) for row in rows]

    async def expire_models(self, before: datetime, *, dry_run: bool = False) -> int:
        """Delete versions of models that another took the place of before a moment; return how many.

        What a deployment's present version would fall back to stays.
        """
        async with self._pool.transaction() as connection:
            count = await connection.fetchval(QUERIES["expire_model_versions"], before, not dry_run)
            if not dry_run:
                await connection.execute(QUERIES["expire_model_reports"], before)
        return int(count)

    async def artefacts(self) -> set[Artefact]:
        """Return the files of every version that the history keeps."""
        return {Artefact(**row) for row in await self._pool.rows("kept_artefacts")}

    async def image(self, image_id: str) -> ImageRow | None:
        """Return an image's row."""
        rows = await self._pool.rows("images", [image_id])
        return ImageRow(**rows[0]) if rows else None

    async def traced_image(self, image_id: str) -> TracedImage:
        """Return what is stored of an image itself."""
        return TracedImage(**(await self._pool.rows("traced_image", image_id))[0])

    async def companions(self, batch_id: str, deployment: str, limit: int) -> list[str]:
        """Return up to `limit` images of a batch whose predictions are stored."""
        return [row["image_id"] for row in await self._pool.rows("companions", batch_id, deployment, limit)]

    async def state(self, image_id: str, deployment: str = "default") -> ImageState | None:
        """Return an image's state in a deployment; None if nothing is known of it."""
        groups = [f"{self._topic_prefix}predict.{deployment}", f"{self._topic_prefix}store"]
        rows = await self._pool.rows("image_state", image_id, deployment, groups)
        if not rows:
            return None
        fact = rows[0]
        return ImageState(
            state=fact["fact"], code=fact["code"], reason=fact["reason"], dead_letter_id=fact["id"]
        )

    async def predictions(self, image_id: str, *, every_version: bool = False) -> list[StoredPrediction]:
        """Return an image's predictions, the newest of each deployment or those of every version, oldest first."""
        query = "predictions_of_image" if every_version else "newest_predictions_of_image"
        return [read_prediction(row) for row in await self._pool.rows(query, image_id)]

    async def recent_predictions(
        self, limit: int, before: int | None = None, deployment: str | None = None
    ) -> list[StoredPrediction]:
        """Return predictions, newest first; `before` is the position of the last one of the page before."""
        rows = await self._pool.rows("recent_predictions", limit, before, deployment)
        return [read_prediction(row) for row in rows]

    async def vectors(self, image_id: str, deployment: str) -> list[Embedding]:
        """Return the vectors of an image's newest prediction in a deployment, in the order of its models."""
        return await search.vectors_of_image(self._pool, image_id, deployment)

    async def vector(self, prediction_id: str, model: str) -> Embedding | None:
        """Return one model's vector of a prediction, newest or not."""
        return await search.vector_of_prediction(self._pool, prediction_id, model)

    async def nearest(
        self,
        space: Space,
        numbers: Sequence[float],
        deployment: str = "default",
        filters: Filters = NO_FILTERS,
        *,
        mode: Mode = "approximate",
        limit: int = 10,
        after: After | None = None,
    ) -> Found:
        """Return the images nearest to a vector, a page at a time; see `pipeline/search.py`."""
        return await search.nearest(
            self._pool, space, numbers, deployment, filters, mode=mode, limit=limit, after=after
        )

    async def compare(
        self,
        a: SideName,
        b: SideName,
        *,
        since: datetime | None = None,
        limit: int = comparison.DEFAULT_LIMIT,
    ) -> Comparison:
        """Compare two deployments on the images that both have seen; see `pipeline/comparison.py`."""
        groups = tuple(f"{self._topic_prefix}predict.{side.deployment}" for side in (a, b))
        return await comparison.compare(self._pool, a, b, (groups[0], groups[1]), since=since, limit=limit)

    async def embeddings(self, prediction_id: str) -> dict[str, list[float]]:
        """Return a prediction's vectors by model."""
        rows = await self._pool.rows("embeddings_of_prediction", prediction_id)
        return {row["model"]: row["embedding"] for row in rows}

    async def dead_letters(
        self,
        *,
        code: str | None = None,
        group: str | None = None,
        topic: str | None = None,
        image_id: str | None = None,
        open_only: bool = True,
        limit: int = 100,
        before: int | None = None,
    ) -> list[StoredDeadLetter]:
        """Return dead letters without their values, newest first; `before` is the id of the last one seen."""
        rows = await self._pool.rows("dead_letters", limit, before, code, group, topic, image_id, open_only)
        return [read_dead_letter(row) for row in rows]

    async def dead_letter(self, dead_letter_id: int) -> StoredDeadLetter | None:
        """Return one dead letter with its value."""
        rows = await self._pool.rows("dead_letter", dead_letter_id)
        return read_dead_letter(rows[0]) if rows else None

    async def mark_redriven(self, dead_letter_id: int) -> bool:
        """Close a dead letter after it was published again; False if it was closed before."""
        return bool(await self._pool.rows("mark_redriven", dead_letter_id))

    async def delete_image(self, image_id: str) -> list[str] | None:
        """Delete everything of an image and return its objects' keys, queued; None if nothing is known of it.

        What was published before comes back no more, however late it is stored. The id may be used again.
        """
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["deletion_alone"], _DELETION_LOCK)
            (row,) = await connection.fetch(QUERIES["delete_image"], image_id)
        return list(row["object_keys"]) if row["rows"] else None

    async def expire(self, before: datetime, limit: int) -> Expired:
        """Delete up to `limit` rows of each kind that were stored before a moment; call until it is empty."""
        tombstones_before = min(before, datetime.now(UTC) - _TOMBSTONE)
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["expire_tombstones"], tombstones_before, limit)
            images, predictions, dead_letters = [
                (await connection.fetch(QUERIES[f"expire_{kind}"], before, limit))[0]
                for kind in ("images", "predictions", "dead_letters")
            ]
        return Expired(
            images=images["rows"],
            predictions=predictions["rows"],
            dead_letters=dead_letters["rows"],
            object_keys=(*images["object_keys"], *dead_letters["object_keys"]),
        )

    async def count_expired(self, before: datetime) -> Expired:
        """Count what `expire` would delete; deletes nothing."""
        (row,) = await self._pool.rows("count_expired", before)
        return Expired(**row)

    async def queued_objects(self, limit: int) -> list[str]:
        """Return keys of objects whose rows are gone, oldest first."""
        async with self._pool.transaction() as connection:
            await connection.execute(QUERIES["unqueue_objects"])
            return [row["object_key"] for row in await connection.fetch(QUERIES["queued_objects"], limit)]

    async def forget_objects(self, object_keys: Sequence[str]) -> None:
        """Take objects off the queue that are gone."""
        await self._pool.rows("forget_objects", list(object_keys))

    async def objects_in_use(self, object_keys: Sequence[str]) -> set[str]:
        """Return which of these objects a row points to."""
        return {row["object_key"] for row in await self._pool.rows("objects_in_use", list(object_keys))}

    async def accounting(self, prefix: str = "", image_ids: Sequence[str] | None = None) -> Accounting:
        """Return everything stored about images by the start of their ids and, when given, by a list."""
        ids = None if image_ids is None else list(image_ids)
        # One transaction would not make the two agree more: each statement sees its own moment.
        results = await self._pool.rows("accounting_of_results", prefix, ids)
        letters = await self._pool.rows("accounting_of_dead_letters", prefix, ids)
        return Accounting(
            tuple(ResultPlace(*row) for row in results), tuple(DeadLetterPlace(*row) for row in letters)
        )
