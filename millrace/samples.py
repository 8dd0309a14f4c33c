"""The sample pictures of `millrace up`: drawn from a seed, published to both lanes, and judged.

The pictures of a seed are always the same; their ids are new in each run, so that earlier results stay.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

from loadtest.images import SamplePicture, draw
from millrace.publish import Sender
from millrace.results import TRIAGE_MODEL
from pipeline import events
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.deadletters import DeadLetter
from pipeline.settings import Settings
from pipeline.topics import Lane

SOURCE = "millrace/up"
_KINDS = 6  # loadtest.images draws its kinds in turns of six


class Samples:
    """One run's samples and what came of each."""

    def __init__(self, settings: Settings, seed: int, count: int) -> None:
        self._settings = settings
        self._seed = seed
        self._count = count
        self._run = secrets.token_hex(4)
        self._labels: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._open: set[str] = set()
        self._published = False
        self.progressed = asyncio.Event()

    @property
    def ids(self) -> list[str]:
        """Ids of what was published."""
        return list(self._labels)

    @property
    def are_done(self) -> bool:
        """Whether each published sample has an outcome."""
        return self._published and not self._open

    async def publish(self, publisher: Publisher) -> None:
        """Draw and publish all, half of each kind to each lane.

        Raises:
            DependencyError: the broker does not take them.
        """
        sender = Sender(self._settings, publisher)
        pictures = draw(self._seed, self._count)
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(self._count):
                    picture = await asyncio.to_thread(_next, pictures)
                    event = self._event(picture)
                    self._labels[event.id] = picture.expected_label
                    self._open.add(event.id)
                    group.create_task(sender.send(event, _lane(index)))
        finally:
            sender.close()
        self._published = True
        self.progressed.set()

    def has(self, image_id: str) -> bool:
        """Whether this is the id of a sample."""
        return image_id in self._labels

    def see(self, prediction: events.Prediction) -> None:
        """Judge a prediction if it is of a sample."""
        expected = self._labels.get(prediction.image_id)
        if expected is None or prediction.deployment != self._settings.deployment:
            return
        fault = self._fault(prediction, expected)
        if fault is not None:
            self._faults[prediction.image_id] = fault
        self._close(prediction.image_id)

    def see_dead_letter(self, letter: DeadLetter) -> None:
        """Note that a sample was given up."""
        if letter.image_id in self._labels:
            self._faults[letter.image_id] = f"dead-lettered by {letter.group}: {letter.code}: {letter.reason}"
            self._close(letter.image_id)

    async def wait(self, quiet_seconds: float) -> None:
        """Return when all are done, or when nothing happened for so long."""
        while not self.are_done:
            self.progressed.clear()
            try:
                async with asyncio.timeout(quiet_seconds):
                    await self.progressed.wait()
            except TimeoutError:
                return

    async def check_stored(self, database: Database, timeout_seconds: float) -> None:
        """Wait until the database has what the topic had; what is missing at the end is a fault."""
        wanted = [
            image_id for image_id in self._labels if image_id not in self._faults | dict.fromkeys(self._open)
        ]
        missing = set(wanted)
        try:
            async with asyncio.timeout(timeout_seconds):
                while missing:
                    found = await database.accounting(image_ids=list(missing))
                    missing -= {
                        result.image_id
                        for result in found.results
                        if result.deployment == self._settings.deployment
                    }
                    if missing:
                        await asyncio.sleep(0.1)
        except TimeoutError:
            self._faults |= dict.fromkeys(missing, "its prediction is not in the database")

    def faults(self) -> Iterator[str]:
        """Yield a line for each sample that did not come out as it should."""
        for image_id in self._labels:
            if image_id in self._faults:
                yield f"{image_id}: {self._faults[image_id]}"
            elif image_id in self._open:
                yield f"{image_id}: no prediction came"

    def _event(self, picture: SamplePicture) -> events.ImageEvent:
        return events.ImageEvent(
            id=f"{picture.id}-{self._run}",
            data=picture.data,
            sha256=hashlib.sha256(picture.data).hexdigest(),
            source=SOURCE,
            time=datetime.now(UTC),
            content_type=picture.media_type,
        )

    def _fault(self, prediction: events.Prediction, expected: str) -> str | None:
        if prediction.outcome != "predicted":
            return f"{prediction.outcome}: {prediction.reason}"
        wanted = len([name for name in self._settings.models.split(",") if name.strip()])
        # Of an activated version the setting says nothing.
        if prediction.revision == 0 and len(prediction.models) != wanted:
            return f"{len(prediction.models)} of {wanted} models answered"
        triage = next((result for result in prediction.models if result.model == TRIAGE_MODEL), None)
        if triage is not None and triage.label != expected:
            return f"{TRIAGE_MODEL} says {triage.label}, expected {expected}"
        return None

    def _close(self, image_id: str) -> None:
        self._open.discard(image_id)
        self.progressed.set()


def _lane(index: int) -> Lane:
    """Alternate, and the other way round in the next turn of kinds: each kind goes to both lanes."""
    return "realtime" if (index + index // _KINDS) % 2 == 0 else "bulk"


def _next(pictures: Iterator[SamplePicture]) -> SamplePicture:
    # next() itself may not be handed to a thread: StopIteration cannot pass through a future.
    return next(pictures)
