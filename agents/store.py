"""The `store` step: predictions, dead letters and the history of models into PostgreSQL, and search's indexes.

One transaction per batch; a batch the database refuses is halved until the guilty record is alone. Dead
letters end here: one is never dead-lettered again, but cut down to what the table takes. Nor is a record of
`models.v1`: the topic itself is the truth, and redriving an old version would bring it back to work. What became
of a picture that was only searched with is passed by.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from agents.delivery import Delivered, Delivery
from agents.durable import forever, isolate, publish_dead_letter
from pipeline import deployments, events, logs, metrics, vector_indexes
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.deadletters import DeadLetter, decode_dead_letter
from pipeline.deployments import Desired, Status
from pipeline.errors import ContractError, FatalError, MillraceError, StorageRefusedError
from pipeline.events import Prediction, Record
from pipeline.results import Saved
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, MODELS, PREDICTIONS
from pipeline.writes import storable

log = logs.get(__name__)

# How soon a new model's vectors get their index: until then they are searched exactly.
INDEX_INTERVAL_SECONDS = 60.0


@dataclass(frozen=True, eq=False)
class Decoded:
    """A record to store: exactly one of prediction and letter is there."""

    delivered: Delivered
    prediction: Prediction | None = None
    letter: DeadLetter | None = None


class Store:
    """Writes what `predict` says, and every dead letter."""

    name = "store"
    topics = (PREDICTIONS, DEAD_LETTERS, MODELS)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.group(self.name)
        self._dead_letters_topic = settings.topic(DEAD_LETTERS.name)
        self._models_topic = settings.topic(MODELS.name)
        self._publisher = Publisher(settings, client_id=self.name)
        self._database: Database | None = None

    async def start(self) -> None:
        """Wait for the migrated database and for the broker."""
        self._database = await forever(
            lambda: Database.open(self._settings), step=self.name, dependency="database"
        )
        await self._publisher.start()

    async def stop(self) -> None:
        """Close both."""
        await self._publisher.stop()
        if self._database is not None:
            await self._database.close()

    def unready(self) -> str | None:
        """Waiting for the database is not being unready: lag tells."""
        return None

    async def run(self, delivery: Delivery) -> None:
        """Write one batch after the other; what arrives meanwhile is the next one."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(delivery))
            group.create_task(self._maintain_indexes())

    async def _pump(self, delivery: Delivery) -> None:
        while True:
            batch = await delivery.take(self._settings.store_batch_records, self._settings.store_batch_bytes)
            await self._store([delivered for delivered in batch if delivered.claim()])

    async def _maintain_indexes(self) -> None:
        """Keep the indexes of search; whatever goes wrong with them, storing goes on."""
        settings = self._settings
        while True:
            try:
                await vector_indexes.maintain(
                    settings.resolved_database,
                    settings.search_index_embeddings,
                    settings.database_password_file,
                )
            except MillraceError as error:
                log.warning("search indexes are left as they are", error=error.message)
            except Exception:
                log.exception("search indexes are left as they are")
            # Replicas that began together do not ask together.
            await asyncio.sleep(INDEX_INTERVAL_SECONDS * random.uniform(0.75, 1.25))

    async def reject(self, delivered: Delivered, error: MillraceError) -> None:
        """Finish a record that killed us, unopened.

        A prediction becomes a dead letter; a dead letter is stored without its value.
        """
        record = delivered.record
        if record.topic == self._models_topic:
            log.error("leaving a record of the models topic out", offset=record.offset, error=error.message)
            delivered.finish("skipped")
        elif events.is_query(record):
            delivered.finish("skipped")
        elif record.topic == self._dead_letters_topic:
            letter = decode_dead_letter(msgspec.structs.replace(record, value=None))
            reason = f"{letter.reason} (its value was left out: {error.message})"
            bare = msgspec.structs.replace(
                letter, reason=reason, record=msgspec.structs.replace(letter.record, headers=())
            )
            await self._save_cut_down(bare)
            delivered.finish("stored")
        else:
            await self._dead_letter(delivered, error, _image_id(record))

    async def _store(self, batch: Sequence[Delivered]) -> None:
        """Make everything these records cause durable, then finish them."""
        await self._store_models([each for each in batch if each.record.topic == self._models_topic])
        batch = [each for each in batch if each.record.topic != self._models_topic]
        decoded: list[Decoded] = []
        undecodable: list[tuple[Delivered, MillraceError, str | None]] = []
        for delivered in batch:
            record = delivered.record
            if events.is_query(record):  # its outcome is for whoever searches
                delivered.finish("skipped")
            elif record.topic == self._dead_letters_topic:
                decoded.append(Decoded(delivered, letter=decode_dead_letter(record)))
            elif events.only_group(record) not in {None, self._group}:
                delivered.finish("skipped")
            else:
                try:
                    decoded.append(Decoded(delivered, prediction=events.decode_prediction(record)))
                except ContractError as error:
                    undecodable.append((delivered, error, _image_id(record)))
        refused = await isolate(decoded, self._save)
        guilty = {item.delivered for item, _ in refused}
        for item in decoded:
            if item.delivered not in guilty:
                item.delivered.finish("stored")
        await asyncio.gather(
            *(self._dead_letter(*fault) for fault in undecodable),
            *(self._settle(item, error) for item, error in refused),
        )

    async def _store_models(self, batch: Sequence[Delivered]) -> None:
        """Add records of `models.v1` to the history; garbage and tombstones add nothing."""
        said: list[tuple[Delivered, Desired | Status]] = []
        for delivered in batch:
            try:
                value = deployments.decode(delivered.record)
            except ContractError as error:
                log.warning(
                    "not a record of the models topic", offset=delivered.record.offset, error=error.message
                )
                value = None
            if value is None:
                delivered.finish("skipped")
            else:
                said.append((delivered, value))
        if not said:
            return
        refused = {item[0] for item, _ in await isolate(said, self._save_models)}
        for delivered, _ in said:
            if delivered in refused:
                log.error("the database refuses a record of the models topic", offset=delivered.record.offset)
            delivered.finish("skipped" if delivered in refused else "stored")

    async def _save_models(self, said: Sequence[tuple[Delivered, Desired | Status]]) -> None:
        assert self._database is not None
        database, values = self._database, [value for _, value in said]
        await forever(lambda: database.save_models(values), step=self.name, dependency="database")

    async def _save(self, items: Sequence[Decoded]) -> None:
        predicted = [
            (item.prediction, item.delivered.record.appended_at)
            for item in items
            if item.prediction is not None
        ]
        letters = [item.letter for item in items if item.letter is not None]
        await self._write(predicted, letters)

    async def _write(
        self, predicted: Sequence[tuple[Prediction, datetime | None]], letters: Sequence[DeadLetter]
    ) -> None:
        assert self._database is not None
        database = self._database
        predictions = [prediction for prediction, _ in predicted]
        published_at = [at for _, at in predicted]

        async def save() -> Saved:
            with metrics.STORE_SECONDS.time():
                return await database.save(predictions, letters, published_at)

        saved = await forever(save, step=self.name, dependency="database")
        metrics.DUPLICATES.labels("repeat").inc(saved.repeats)
        metrics.DUPLICATES.labels("conflict").inc(saved.conflicts)
        if saved.conflicts:
            log.warning("kept the first picture's prediction", conflicts=saved.conflicts)

    async def _settle(self, item: Decoded, error: StorageRefusedError) -> None:
        """Give a record that the database refuses its end."""
        if item.letter is not None:
            await self._save_cut_down(item.letter)
            item.delivered.finish("stored")
        else:
            assert item.prediction is not None
            await self._dead_letter(item.delivered, error, item.prediction.image_id)

    async def _save_cut_down(self, letter: DeadLetter) -> None:
        log.warning("cutting a dead letter down to what the database takes", letter=repr(letter.place)[:1000])
        try:
            await self._write([], [storable(letter)])
        except StorageRefusedError as error:
            raise FatalError(f"a dead letter that was cut down is refused: {error.message}") from error

    async def _dead_letter(self, delivered: Delivered, error: MillraceError, image_id: str | None) -> None:
        await publish_dead_letter(
            self._publisher, self._settings, self.name, delivered.record, error, image_id
        )
        delivered.finish("dead_lettered")


def _image_id(record: Record) -> str | None:
    """Return the key of a prediction that cannot be decoded: by contract the image's id."""
    try:
        key = (record.key or b"").decode()
        events.check_id(key)
    except (UnicodeDecodeError, ContractError):
        return None
    return key
