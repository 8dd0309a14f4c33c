"""The accounting that ends every fault run: what became of every record that was sent.

`sent` is the publisher's journal, kept outside the system under test. Results are what a user sees (rows
in PostgreSQL); repeats are work done twice, counted on the topics and never visible.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from pipeline import deadletters, events, topics
from pipeline.broker import Place
from pipeline.database import Database
from pipeline.errors import ContractError
from pipeline.readers import read_all
from pipeline.results import Accounting as Stored
from pipeline.settings import Settings

Key = tuple[str, int, int]  # topic, partition, offset


@dataclass
class Journal:
    """What the broker acknowledged to the publisher: event id -> places."""

    places: dict[str, list[Key]] = field(default_factory=dict)

    def add(self, image_id: str, place: Place) -> None:
        """Note an acknowledged record."""
        self.places.setdefault(image_id, []).append((place.topic, place.partition, place.offset))

    def __len__(self) -> int:
        return len(self.places)


class Accounting(msgspec.Struct, frozen=True, kw_only=True):
    """What became of every id; ids are listed, so that a loss can be looked for."""

    sent: int
    results: int
    dead_letters: int
    #: Sent, and neither a result nor a dead letter.
    lost: tuple[str, ...]
    #: More than one result, or a result and a dead letter, for one id.
    visible_duplicates: tuple[str, ...]
    #: A result or a dead letter of something nobody sent.
    unexpected: tuple[str, ...]
    #: Records on the output topics beyond the first for an id: work done again, never seen.
    repeated: int
    #: Results in whose place those of a newer version of the models are shown: a record that was delivered again
    #: after a swap has one of each, and shows one.
    superseded: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether every id sent is exactly once in the results or in the dead letters."""
        return not (self.lost or self.visible_duplicates or self.unexpected)

    def line(self) -> str:
        """Return the accounting in one line."""
        return (
            f"sent {self.sent}, results {self.results}, dead letters {self.dead_letters}, lost {len(self.lost)}, "
            f"visible duplicates {len(self.visible_duplicates)}, unexpected {len(self.unexpected)}, "
            f"repeated {self.repeated}, superseded {self.superseded}"
        )


def account(
    journal: Journal,
    results: Mapping[str, int],
    dead_letters: Mapping[str, int],
    repeated: int = 0,
    superseded: int = 0,
) -> Accounting:
    """Compare the journal with results that are shown and dead letters, each counted per event id."""
    seen = Counter(results) + Counter(dead_letters)
    return Accounting(
        sent=len(journal),
        results=len(results),
        dead_letters=len(dead_letters),
        lost=tuple(sorted(image_id for image_id in journal.places if image_id not in seen)),
        visible_duplicates=tuple(sorted(image_id for image_id, count in seen.items() if count > 1)),
        unexpected=tuple(sorted(image_id for image_id in seen if image_id not in journal.places)),
        repeated=repeated,
        superseded=superseded,
    )


@dataclass
class TopicCounts:
    """How often each event id is on the output topics."""

    predictions: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)

    @property
    def repeated(self) -> int:
        """Records beyond the first of each id."""
        counted = self.predictions + self.dead_letters
        return sum(counted.values()) - len(counted)

    def repeated_of(self, journal: Journal) -> int:
        """Records beyond the first of each id in the journal; an id that was sent twice has two results."""
        counted = self.predictions + self.dead_letters
        return sum(max(0, counted[image_id] - len(places)) for image_id, places in journal.places.items())


async def count_topics(settings: Settings, deployment: str | None = None) -> TopicCounts:
    """Read the output topics from their beginning to their present end, for one deployment or all."""
    counts = TopicCounts()
    for record in await read_all(settings, settings.topic(topics.PREDICTIONS.name)):
        try:
            prediction = events.decode_prediction(record)
        except ContractError:
            continue  # anybody's garbage; `store` dead-letters it
        if deployment in (None, prediction.deployment):
            counts.predictions[prediction.image_id] += 1
    for record in await read_all(settings, settings.topic(topics.DEAD_LETTERS.name)):
        letter = deadletters.decode_dead_letter(record)
        counts.dead_letters[letter.image_id or letter.record.default_id] += 1
    return counts


async def account_topics(settings: Settings, journal: Journal) -> Accounting:
    """Account by the output topics alone: for runs without a database, where repeats are not visible."""
    counts = await count_topics(settings)
    once = dict.fromkeys(counts.predictions, 1)
    letters = dict.fromkeys(counts.dead_letters, 1)
    return account(journal, once, letters, counts.repeated)


async def account_database(
    settings: Settings, database: Database, journal: Journal, *, whole: bool = False
) -> Accounting:
    """Account by what the database has of one deployment: results, and dead letters of `predict` and `store`.

    Repeats are counted on the topics. With `whole` the database holds nothing but this run, so that what
    nobody sent shows too. A redriven dead letter no longer counts: its record was sent again.
    """
    stored = await database.accounting(image_ids=None if whole else list(journal.places))
    results, letters = _seen(settings, stored)
    counts = await count_topics(settings, settings.deployment)
    superseded = sum(not row.is_newest for row in stored.results if row.deployment == settings.deployment)
    return account(journal, results, letters, counts.repeated_of(journal), superseded)


def seen_ids(settings: Settings, stored: Stored) -> set[str]:
    """Return the ids that have a result or a dead letter in the deployment."""
    results, letters = _seen(settings, stored)
    return results.keys() | letters.keys()


def _seen(settings: Settings, stored: Stored) -> tuple[Counter[str], Counter[str]]:
    """Count the results that are shown and the open dead letters of the deployment per image id."""
    groups = {settings.group("predict"), settings.group("store")}
    results = Counter(
        row.image_id for row in stored.results if row.deployment == settings.deployment and row.is_newest
    )
    letters = Counter(
        row.image_id or f"{row.topic}:{row.partition}:{row.offset}"
        for row in stored.dead_letters
        if row.group in groups and not row.redriven
    )
    return results, letters


def identify(record: events.Record) -> str:
    """Return the id a record will be accounted under: its own, or its place when that cannot be an id."""
    try:
        return events.image_id(record)
    except ContractError:
        return record.default_id
