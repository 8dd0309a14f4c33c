"""Steady load for minutes: does memory stay flat, does the ledger stay flat, is everything accounted for?

It takes addresses: Kafka and PostgreSQL from the settings, and the HTTP site of each process to watch. Both
lanes get pictures at seeded arrivals, one in `BROKEN_EVERY` of them is no picture. A number grows when a line
through the second half of the run does, as the first half warms caches up and fills pools; the line is that of
Theil and Sen, the median of the slopes between all pairs of samples, which a few peaks do not tilt.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from loadtest import faults
from loadtest.drive import Driver
from loadtest.images import draw
from loadtest.report import Circumstances, read_metrics
from pipeline import admin, events
from pipeline.database import Database
from pipeline.errors import DependencyError
from pipeline.settings import Settings
from pipeline.topics import Lane

MEBIBYTE = 1024 * 1024
# One picture in so many cannot be decoded: what a dead letter leaves behind must not grow either.
BROKEN_EVERY = 50
# A process leaks if it grows faster. At 30 pictures a second this is 1.1 KiB kept of each, less than one event
# or one prediction; the line through five minutes of a healthy worker moves by a tenth of it.
MAX_GROWTH_BYTES_PER_MINUTE = 2 * MEBIBYTE
# In a short run an allocator that takes one more arena (glibc: up to 64 MiB, touched a bit at a time) is no leak.
MIN_GROWTH_BYTES = 8 * MEBIBYTE
# Open records are those of the last moments, so their number follows the arrivals of about a second (a commit
# interval, a fetch, a batch); a step that falls behind, or never finishes some record, adds to it for ever.
MAX_GROWTH_SECONDS_OF_LOAD = 1.0
# Without any outcome for so long after the load has stopped, the rest is lost.
SETTLE_SECONDS = 60.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much load, and for how long."""

    seconds: float = 600.0
    images_per_second: float = 30.0
    seed: int = 7
    pictures: int = 120
    sample_seconds: float = 5.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at everything."""

    at_seconds: float
    resident_bytes: dict[str, int]
    ledger_records: dict[str, int]
    lag_records: int


class Trend(msgspec.Struct, frozen=True, kw_only=True):
    """How one number moved over the second half of the run."""

    middle: float
    last: float
    most: float
    growth: float
    allowed_growth: float

    @property
    def is_flat(self) -> bool:
        """Whether it grew no more than is allowed; shrinking is flat too."""
        return self.growth <= self.allowed_growth


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole soak."""

    circumstances: Circumstances
    plan: Plan
    samples: int
    resident_bytes: dict[str, Trend]
    ledger_records: dict[str, Trend]
    lag_records: Trend
    #: Open records per step when everything was through.
    ledger_at_end: dict[str, int]
    sent: int
    results: int
    dead_letters: int
    lost: int
    visible_duplicates: int
    unexpected: int
    repeated: int
    #: Load average of the last minute at the end: far above the cores, others took what the load needed.
    load_after: float
    #: Why the verdict is bad; empty when it is good.
    faults: tuple[str, ...]
    #: Cores that other programs kept busy on average, from before the start until everything had ended.
    others_busy_cores: float | None = None


class Soak:
    """Runs a plan against running processes."""

    def __init__(
        self, settings: Settings, plan: Plan, urls: Mapping[str, str], *, say: Callable[[str], None] = print
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._urls = dict(urls)
        self._say = say
        self._samples: list[Sample] = []

    async def run(self, load_before: float) -> Result:
        """Load, watch, stop, account.

        Raises:
            DependencyError: Kafka, PostgreSQL or a watched process does not answer.
        """
        plan = self._plan
        self._say(f"drawing {plan.pictures} pictures")
        pictures = await asyncio.to_thread(lambda: [each.data for each in draw(plan.seed, plan.pictures)])
        bulk, realtime = (self._driver(lane, pictures) for lane in ("bulk", "realtime"))
        self._say(f"{plan.images_per_second:g} images/s for {plan.seconds / 60:g} min")
        async with bulk, realtime:
            await self._watch()
            journals = [await driver.stop() for driver in (bulk, realtime)]
        journal = faults.Journal()
        for each in journals:
            journal.places.update(each.places)
        accounting = await self._account(journal)
        ledger_at_end = (await self._look()).ledger_records
        return conclude(
            Circumstances.now(load_before), plan, self._samples, accounting, ledger_at_end=ledger_at_end
        )

    def _driver(self, lane: Lane, pictures: Sequence[bytes]) -> Driver:
        def picture(number: int) -> events.ImageEvent:
            broken = number % BROKEN_EVERY == BROKEN_EVERY - 1
            data = b"not a picture" if broken else pictures[number % len(pictures)]
            return events.ImageEvent(id=f"soak-{lane}-{number}", data=data)

        rate = self._plan.images_per_second / 2
        return Driver(self._settings, picture, rate_per_second=rate, lane=lane, seed=self._plan.seed)

    async def _watch(self) -> None:
        """Sample until the time is over."""
        started = time.monotonic()
        for number in itertools.count():
            at = started + number * self._plan.sample_seconds
            if at - started > self._plan.seconds:
                return
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            sample = await self._look(time.monotonic() - started)
            self._samples.append(sample)
            if number % 12 == 0:
                sizes = ", ".join(
                    f"{name} {size / MEBIBYTE:.0f}" for name, size in sample.resident_bytes.items()
                )
                self._say(
                    f"{sample.at_seconds / 60:4.1f} min: MiB {sizes}; open {sum(sample.ledger_records.values())}; "
                    f"lag {sample.lag_records}"
                )

    async def _look(self, at_seconds: float = 0.0) -> Sample:
        names = list(self._urls)
        found = await asyncio.gather(*(asyncio.to_thread(read_metrics, self._urls[name]) for name in names))
        metrics = dict(zip(names, found, strict=True))
        return Sample(
            at_seconds=at_seconds,
            resident_bytes={name: int(of["process_resident_memory_bytes"]) for name, of in metrics.items()},
            ledger_records={
                name: int(
                    sum(value for key, value in of.items() if key.startswith("millrace_ledger_records{"))
                )
                for name, of in metrics.items()
                if any(key.startswith("millrace_ledger_records{") for key in of)
            },
            lag_records=await self._lag(),
        )

    async def _lag(self) -> int:
        return sum(row.lag for row in await admin.lag(self._settings))

    async def _account(self, journal: faults.Journal) -> faults.Accounting:
        """Wait until everything is stored and committed, or nothing more comes; then account."""
        database = await Database.open(self._settings)
        try:
            stored, news_at = 0, time.monotonic()
            while time.monotonic() - news_at < SETTLE_SECONDS:
                seen = faults.seen_ids(self._settings, await database.accounting())
                lag = await self._lag()
                if lag == 0 and not journal.places.keys() - seen:
                    break
                if len(seen) > stored:
                    stored, news_at = len(seen), time.monotonic()
                await asyncio.sleep(0.5)
            return await faults.account_database(self._settings, database, journal, whole=True)
        finally:
            await database.close()


def conclude(
    circumstances: Circumstances,
    plan: Plan,
    samples: Sequence[Sample],
    accounting: faults.Accounting,
    *,
    ledger_at_end: Mapping[str, int],
) -> Result:
    """Judge a run by its samples and its accounting."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        raise DependencyError(f"{len(samples)} samples are too few to judge: soak for longer")
    at = [sample.at_seconds for sample in half]
    minutes = (at[-1] - at[0]) / 60
    memory_allowed = max(MIN_GROWTH_BYTES, MAX_GROWTH_BYTES_PER_MINUTE * minutes)
    records_allowed = MAX_GROWTH_SECONDS_OF_LOAD * plan.images_per_second
    memory = {
        name: trend(at, [sample.resident_bytes[name] for sample in half], memory_allowed)
        for name in half[0].resident_bytes
    }
    ledger = {
        name: trend(at, [sample.ledger_records[name] for sample in half], records_allowed)
        for name in half[0].ledger_records
    }
    # Records pass three groups one after the other, each of which has its second of them.
    lag = trend(at, [sample.lag_records for sample in half], 3 * records_allowed)
    wrong = [
        f"{name} grew by {found.growth / MEBIBYTE:.1f} MiB in {minutes:.1f} min"
        for name, found in memory.items()
        if not found.is_flat
    ]
    counted = {f"the ledger of {name}": found for name, found in ledger.items()} | {"lag": lag}
    wrong += [
        f"{what} grew by {found.growth:.0f} records in {minutes:.1f} min"
        for what, found in counted.items()
        if not found.is_flat
    ]
    wrong += [
        f"{records} records of {name} are still open" for name, records in ledger_at_end.items() if records
    ]
    if not accounting.is_clean:
        wrong.append(f"the accounting is not clean: {accounting.line()}")
    return Result(
        circumstances=circumstances,
        plan=plan,
        samples=len(samples),
        resident_bytes=memory,
        ledger_records=ledger,
        lag_records=lag,
        ledger_at_end=dict(ledger_at_end),
        sent=accounting.sent,
        results=accounting.results,
        dead_letters=accounting.dead_letters,
        lost=len(accounting.lost),
        visible_duplicates=len(accounting.visible_duplicates),
        unexpected=len(accounting.unexpected),
        repeated=accounting.repeated,
        load_after=round(os.getloadavg()[0], 2),
        faults=tuple(wrong),
    )


def trend(at_seconds: Sequence[float], values: Sequence[float], allowed_growth: float) -> Trend:
    """Fit a line and say by how much it rose from the first moment to the last."""
    return Trend(
        middle=values[0],
        last=values[-1],
        most=max(values),
        growth=round(slope(at_seconds, values) * (at_seconds[-1] - at_seconds[0]), 1),
        allowed_growth=round(allowed_growth, 1),
    )


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Return the Theil-Sen slope: the median over all pairs of points; `at` strictly increases."""
    pairs = itertools.combinations(zip(at, values, strict=True), 2)
    return statistics.median((later[1] - earlier[1]) / (later[0] - earlier[0]) for earlier, later in pairs)


def rows(result: Result) -> list[tuple[str, str]]:
    """Say a result in words, for a table."""
    memory = [
        (f"memory of {name}", f"{_mebibytes(found.last)} MiB, grew by {_mebibytes(found.growth)}")
        for name, found in result.resident_bytes.items()
    ]
    ledger = [
        (f"open records of {name}", f"at most {found.most:.0f}, grew by {found.growth:+.1f}")
        for name, found in result.ledger_records.items()
    ]
    return [
        *memory,
        *ledger,
        (
            "lag of all groups",
            f"at most {result.lag_records.most:.0f}, grew by {result.lag_records.growth:+.1f}",
        ),
        ("sent", f"{result.sent} in {result.plan.seconds / 60:g} min"),
        ("results, dead letters", f"{result.results}, {result.dead_letters}"),
        ("lost, visible duplicates", f"{result.lost}, {result.visible_duplicates}"),
        ("repeated on topics", f"{result.repeated}"),
        ("load average before, after", f"{result.circumstances.load_before}, {result.load_after}"),
        ("cores busy with other programs", f"{result.others_busy_cores}"),
        ("verdict", "; ".join(result.faults) or "flat"),
    ]


def _mebibytes(size: float) -> str:
    return f"{size / MEBIBYTE:.1f}"
