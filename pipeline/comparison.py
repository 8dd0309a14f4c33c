"""Two deployments side by side on the images that both have seen: agreement, latency, cost, and who lacks what.

Results are walked from the latest stored to the oldest through a cursor, a thousand at a time, so that memory does
not grow with their number. Receipts tell the time; of a pass they tell the whole batch's.
"""

import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

import asyncpg
import msgspec

from pipeline.agreement import Agreement, Distribution, Tally, paired
from pipeline.events import ModelResult
from pipeline.postgres import QUERIES, Connection, Pool

# Of embeddings of 1,000 numbers 4 MB on the server; a fetch takes milliseconds.
_FETCH_ROWS = 1000
DEFAULT_LIMIT = 100_000
# One result after the other through indexes: anything else reads the whole table before the first one comes, and
# that is what the planner chooses for a table it has no statistics of yet.
_PREFERENCES = {"enable_hashjoin": "off", "enable_mergejoin": "off", "enable_sort": "off", "jit": "off"}
_SIDE = re.compile(r"(?P<deployment>[a-z0-9][a-z0-9-]{0,62})(?:@(?P<revision>[0-9]{1,15}))?")


class SideName(msgspec.Struct, frozen=True):
    """What is compared: the newest results of a deployment, or those of one revision of its models."""

    deployment: str
    revision: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SideName":
        """Read `default` or `default@3`.

        Raises:
            ValueError: it is neither; the message says so.
        """
        found = _SIDE.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is neither a deployment, such as default, nor one's revision, default@3"
            )
        return cls(found["deployment"], None if found["revision"] is None else int(found["revision"]))

    def __str__(self) -> str:
        """Return it as it is parsed."""
        return self.deployment if self.revision is None else f"{self.deployment}@{self.revision}"


class Seconds(msgspec.Struct, frozen=True):
    """How long something takes: half of the times, and all but a hundredth, within 1 %."""

    p50: float
    p99: float


class Side(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the two: times and cost are of the images that both have predicted."""

    name: str
    #: Images of which it has a result that was looked at.
    images: int
    #: Of these, such as the other has no result of.
    alone: int
    queue_seconds: Seconds | None = None
    decode_seconds: Seconds | None = None
    #: Of a pass over a whole batch.
    forward_seconds: Seconds | None = None
    batch_size: float | None = None
    #: A batch's pass, divided among its pictures.
    forward_seconds_per_image: float | None = None
    #: Where receipts have it.
    joules_per_image: float | None = None
    #: Images by device.
    devices: dict[str, int] = {}


class Outcomes(msgspec.Struct, frozen=True):
    """Images by what became of them on both sides: predicted, expired, dead_lettered or absent."""

    a: str
    b: str
    images: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Two deployments side by side."""

    a: Side
    b: Side
    #: Images that both have predicted.
    both: int
    outcomes: tuple[Outcomes, ...]
    models: tuple[Agreement, ...] = ()
    #: Results stored before this moment were not looked at.
    since: datetime | None = None
    #: Whether a has older results since then, which the limit left out.
    is_cut: bool = False


class _Receipt(msgspec.Struct):
    """What a comparison reads of a receipt."""

    queue_seconds: float | None = None
    decode_seconds: float | None = None
    forward_seconds: float | None = None
    batch_size: int | None = None
    device: str | None = None
    joules: float | None = None


class _Times:
    """Receipts of one side."""

    def __init__(self) -> None:
        self._queue, self._decode, self._forward = Distribution(), Distribution(), Distribution()
        self._per_image, self._sizes, self._joules = Distribution(), Distribution(), Distribution()
        self._devices: Counter[str] = Counter()

    def add(self, receipt: _Receipt) -> None:
        size = max(1, receipt.batch_size or 1)
        for distribution, number in (
            (self._queue, receipt.queue_seconds),
            (self._decode, receipt.decode_seconds),
            (self._forward, receipt.forward_seconds),
            (self._per_image, None if receipt.forward_seconds is None else receipt.forward_seconds / size),
            (self._sizes, receipt.batch_size),
            (self._joules, receipt.joules),
        ):
            if number is not None:
                distribution.add(number)
        if receipt.device is not None:
            self._devices[receipt.device] += 1

    def side(self, name: SideName, images: int, alone: int) -> Side:
        return Side(
            name=str(name), images=images, alone=alone,
            queue_seconds=_seconds(self._queue), decode_seconds=_seconds(self._decode),
            forward_seconds=_seconds(self._forward), batch_size=_mean(self._sizes, 2),
            forward_seconds_per_image=_mean(self._per_image), joules_per_image=_mean(self._joules),
            devices=dict(self._devices.most_common()),
        )  # fmt: skip


_models_decoder = msgspec.json.Decoder(tuple[ModelResult, ...])
_receipt_decoder = msgspec.json.Decoder(_Receipt)


async def compare(
    pool: Pool,
    a: SideName,
    b: SideName,
    groups: tuple[str, str],
    *,
    since: datetime | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Comparison:
    """Compare up to `limit` of a's latest results with b's of the same images; `groups` are their consumer groups.

    What b has alone is counted over the same time. Images that both gave up, without a result, are not seen.
    """
    gathered = _Gathered()
    async with pool.transaction() as connection:
        await connection.execute(QUERIES["prefer_index"], list(_PREFERENCES), list(_PREFERENCES.values()))
        query = (a.deployment, a.revision, b.deployment, b.revision, groups[1], since, limit + 1)
        async for rows in _pages(connection, "compare_results", *query):
            room = limit - gathered.images
            gathered.is_cut = len(rows) > room
            await gathered.add(connection, rows[:room])
        start = gathered.oldest if gathered.is_cut else since
        query_alone = (b.deployment, b.revision, a.deployment, a.revision, groups[0], start)
        async for rows in _pages(connection, "compare_absences", *query_alone):
            gathered.add_alone(rows)
    return gathered.result(a, b, start)


class _Gathered:
    """What was seen so far."""

    def __init__(self) -> None:
        self.images = 0
        self.oldest: datetime | None = None
        self.is_cut = False
        self._both = 0
        self._of_b = 0
        self._alone = [0, 0]
        self._times = _Times(), _Times()
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._tallies: dict[tuple[str, str, str], Tally] = {}

    async def add(self, connection: Connection, rows: Sequence[asyncpg.Record]) -> None:
        vectors: list[tuple[Tally, tuple[str, str, str, str]]] = []
        for row in rows:
            self.images += 1
            self.oldest = row["stored_at"]
            self._outcomes[row["outcome"], row["other_outcome"]] += 1
            if row["other_id"] is None:
                self._alone[0] += 1
            elif (row["outcome"], row["other_outcome"]) == ("predicted", "predicted"):
                vectors += self._add_pair(row)
        if not vectors:
            return
        columns = [list(column) for column in zip(*(key for _, key in vectors), strict=True)]
        for row in await connection.fetch(QUERIES["compare_vectors"], *columns):
            vectors[row["number"]][0].add_cosine(row["cosine"])

    def add_alone(self, rows: Sequence[asyncpg.Record]) -> None:
        """Take in results of b, and count those that a lacks."""
        for row in rows:
            self._of_b += 1
            if not row["is_shared"]:
                self._alone[1] += 1
                self._outcomes[row["other_outcome"], row["outcome"]] += 1

    def result(self, a: SideName, b: SideName, since: datetime | None) -> Comparison:
        return Comparison(
            a=self._times[0].side(a, self.images, self._alone[0]),
            b=self._times[1].side(b, self._of_b, self._alone[1]),
            both=self._both,
            outcomes=tuple(Outcomes(*key, images) for key, images in self._outcomes.most_common()),
            models=tuple(tally.result() for tally in self._tallies.values()),
            since=since,
            is_cut=self.is_cut,
        )

    def _add_pair(self, row: asyncpg.Record) -> list[tuple[Tally, tuple[str, str, str, str]]]:
        """Take in an image that both have predicted; return whose vectors are to be compared."""
        self._both += 1
        self._times[0].add(_receipt_decoder.decode(row["receipt"]))
        self._times[1].add(_receipt_decoder.decode(row["other_receipt"]))
        vectors = []
        results = _models_decoder.decode(row["models"]), _models_decoder.decode(row["other_models"])
        for one, other in paired(*results):
            names = f"{one.model} {one.version}", f"{other.model} {other.version}"
            tally = self._tallies.setdefault((one.task, *names), Tally(one.task, *names))
            tally.add(row["image_id"], one, other)
            if one.task == "embed":
                vectors.append((tally, (row["prediction_id"], one.model, row["other_id"], other.model)))
        return vectors


async def _pages(
    connection: Connection, name: str, *arguments: object
) -> AsyncIterator[list[asyncpg.Record]]:
    cursor = await connection.cursor(QUERIES[name], *arguments)
    while rows := await cursor.fetch(_FETCH_ROWS):
        yield rows


def _seconds(times: Distribution) -> Seconds | None:
    if not times.count:
        return None
    return Seconds(round(times.quantile(0.5), 6), round(times.quantile(0.99), 6))


def _mean(numbers: Distribution, digits: int = 6) -> float | None:
    return round(numbers.mean, digits) if numbers.count else None
