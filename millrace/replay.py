"""`millrace replay`: stream a DCGM dump to `gpu.samples.v1` as if it were happening now.

`time` is the moment of the replay, `source_time` the dump's. Samples of a host that fall into one publish interval
travel in one record. A silence of hours in the dump is not waited for.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from millrace.dump_files import DumpFile
from millrace.dumps import Dump, Moment, Reading
from millrace.feed import PUBLISH_SECONDS, Feed, Tick
from millrace.output import EXIT_FAILED, counted, say
from millrace.progress import Progress
from pipeline.broker import Publisher
from pipeline.errors import MillraceError
from pipeline.settings import Settings
from pipeline.telemetry import Gpu, Sample, Samples

SOURCE = "replay"
# What a GPU is, is repeated so often, for whoever begins to read later.
_DESCRIBE_EVERY = timedelta(minutes=5)
# A dump of several days has its nights left out, or one row from another year.
_LONGEST_GAP = timedelta(hours=1)
# Values of one tick: a loop at a thousand times the speed has many rounds in one interval.
_MAX_TICK = 200_000


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    interval_seconds: float = 1.0
    #: None: as fast as the broker takes it.
    speed: float | None = 1.0
    loop: bool = False
    limit: int | None = None
    peers: str = "host"
    keep_time: bool = False
    strict: bool = False
    as_json: bool = False
    #: Put the dump in order of time first, even if it seems to be.
    sort: bool = False


async def replay(settings: Settings, path: Path, wishes: Wishes) -> int:
    """Publish and report; return the exit code.

    Raises:
        ContractError: the file is no dump.
        DependencyError: the broker stopped answering; what was published stays so.
        MillraceError: there is no room to sort the dump.
    """
    file = DumpFile(path)
    try:
        # In threads, as who writes to a pipe may take long, and a gzipped dump has to be unpacked for a look at it.
        dump = await asyncio.to_thread(Dump, file, limit=wishes.limit)
        publisher = Publisher(settings, client_id="millrace-replay", timeout_seconds=PUBLISH_SECONDS)
        # Before a dump is sorted, which may take minutes: whether there is a broker.
        await publisher.start(wait=False)
        try:
            if wishes.sort or not await asyncio.to_thread(dump.seems_in_order):
                await _sort(dump, file, wishes)
            return await _publish(settings, publisher, dump, file, wishes)
        finally:
            dump.close()
            await publisher.stop()
    finally:
        file.stop()


async def _sort(dump: Dump, file: DumpFile, wishes: Wishes) -> None:
    why = "as --sort asks for" if wishes.sort else "as its rows are far from the order of time"
    say(f"{file}: sorting it first, {why}")
    began = time.monotonic()
    with Progress("sorting", file.lines, wishes.limit) as progress:
        await asyncio.to_thread(dump.sort, lambda count: progress.advance(count=count))
    say(f"{file}: sorted {counted(dump.rows, 'row')} in {time.monotonic() - began:.1f} s")


async def _publish(
    settings: Settings, publisher: Publisher, dump: Dump, file: DumpFile, wishes: Wishes
) -> int:
    feed = Feed(settings, publisher, peers=wishes.peers, as_json=wishes.as_json)
    ticks = Ticks(dump, wishes, datetime.now(UTC), timedelta(days=settings.sample_retention_days))
    began = time.monotonic()
    try:
        with Progress("replaying", None if wishes.loop else file.lines, wishes.limit) as progress:
            await feed.run(iter(ticks), progress, is_paced=wishes.speed is not None)
    except BaseExceptionGroup as errors:
        expected, others = errors.split(MillraceError)
        if expected is None or others is not None:
            raise
        raise expected.exceptions[0] from None
    finally:
        _report(file, dump, feed, ticks, time.monotonic() - began)
    if not feed.samples:
        say(f"{file} has nothing that can be replayed")
        return EXIT_FAILED
    return EXIT_FAILED if dump.past or (wishes.strict and dump.rejects.counts) else 0


class Ticks:
    """A dump as ticks; iterate once.

    Args:
        dump: To read.
        wishes: The pace.
        begin: The moment of the first sample, unless the dump's own times are kept.
        retention: What is older than this before `begin` is stored by nobody.
    """

    def __init__(self, dump: Dump, wishes: Wishes, begin: datetime, retention: timedelta) -> None:
        self._dump = dump
        self._wishes = wishes
        # PostgreSQL's and our precision: a microsecond, which nobody can read.
        self._begin = begin.replace(microsecond=begin.microsecond // 1000 * 1000)
        self._oldest = begin - retention
        self._described: dict[tuple[str, str], tuple[datetime, Gpu]] = {}
        #: Silences of the dump that were played as one interval.
        self.gaps = 0
        self.silence = timedelta()
        #: Samples that are older than what is kept.
        self.expired = 0

    def __iter__(self) -> Iterator[Tick]:
        interval = self._wishes.interval_seconds
        number, size = 0, 0
        hosts: dict[str, list[tuple[Sample, Gpu]]] = defaultdict(list)
        for offset, moment in self._moments():
            mine = math.ceil(round(offset / interval, 6))
            if hosts and (mine > number or size >= _MAX_TICK):
                yield self._tick(number, hosts, size)
                hosts, size = defaultdict(list), 0
            number = mine
            size += moment.rows
            for host, gpus in moment.hosts.items():
                hosts[host].extend(
                    (self._sample(offset, moment.time, gpu_uuid, reading), reading.gpu)
                    for gpu_uuid, reading in gpus.items()
                    if reading.gpu is not None
                )
        if hosts:
            yield self._tick(number, hosts, size)

    def _moments(self) -> Iterator[tuple[float, Moment]]:
        """Yield moments with their offset in seconds on the replay's clock, round by round."""
        base = 0.0
        while True:
            first: datetime | None = None
            latest = first
            count, last = 0, 0.0
            silence, gaps = timedelta(), 0
            for moment in self._dump.moments():
                first = first or moment.time
                if latest is not None and moment.time - latest > _LONGEST_GAP:
                    silence += moment.time - latest
                    gaps += 1
                    self.silence += moment.time - latest
                    self.gaps += 1
                latest = moment.time
                count += 1
                last = (moment.time - first - silence).total_seconds() / (self._wishes.speed or 1.0)
                last += gaps * self._wishes.interval_seconds
                yield base + last, moment
            if not self._wishes.loop or first is None:
                return
            # The next round begins one step later, as long as the dump's are on average.
            base += last + (last / (count - 1) if count > 1 else self._wishes.interval_seconds)

    def _sample(self, offset: float, source_time: datetime, gpu_uuid: str, reading: Reading) -> Sample:
        moment = source_time if self._wishes.keep_time else self._begin + timedelta(seconds=offset)
        if moment < self._oldest:
            self._warn(source_time)
        return Sample(
            gpu_uuid=gpu_uuid, time=moment, values=reading.values, xids=reading.xids, source_time=source_time
        )

    def _warn(self, source_time: datetime) -> None:
        if not self.expired:
            say(
                f"--keep-time: the dump is of {source_time:%Y-%m-%d}, and `record` leaves out what is older than"
                f" MILLRACE_SAMPLE_RETENTION_DAYS: it is published, but not stored"
            )
        self.expired += 1

    def _tick(self, number: int, hosts: dict[str, list[tuple[Sample, Gpu]]], size: int) -> Tick:
        records = [
            Samples(
                host=host,
                source=SOURCE,
                samples=tuple([sample for sample, _ in samples]),
                gpus=tuple(self._describe(host, samples)),
            )
            for host, samples in hosts.items()
        ]
        return Tick(number * self._wishes.interval_seconds, records, size)

    def _describe(self, host: str, samples: list[tuple[Sample, Gpu]]) -> Iterable[Gpu]:
        """Return what of GPUs is news by the end of the tick, or was not said for long."""
        news = {}
        for sample, gpu in samples:
            key = (host, sample.gpu_uuid)
            before = self._described.get(key)
            if before is None or gpu != before[1] or sample.time - before[0] >= _DESCRIBE_EVERY:
                self._described[key] = (sample.time, gpu)
                news[gpu.gpu_uuid] = gpu
        return news.values()


def _report(file: DumpFile, dump: Dump, feed: Feed, ticks: Ticks, seconds: float) -> None:
    counts, lines = dump.rejects.counts, dump.rejects.lines
    for reason, count in counts.most_common():
        where = ", ".join(map(str, lines[reason]))
        more = ", ..." if count > len(lines[reason]) else ""
        say(f"{file}: {counted(count, 'row')}: {reason} (line {where}{more})")
    hosts, gpus = len(dump.gpus), sum(map(len, dump.gpus.values()))
    rate = f" ({feed.values / seconds:,.0f} values per second)" if seconds > 0 else ""
    samples = f"{counted(feed.samples, 'sample')} of {counted(gpus, 'GPU')} on {counted(hosts, 'host')}"
    values = f"{counted(feed.values, 'value')} of {counted(dump.rows, 'row')}"
    parts = [f"replayed {values} as {samples} in {seconds:.1f} s{rate}"]
    if dump.blanks:
        parts.append(f"{counted(dump.blanks, 'blank value')} left out")
    if dump.rejects.rows:
        parts.append(f"{counted(dump.rejects.rows, 'bad row')} left out")
    if ticks.gaps:
        parts.append(
            f"{counted(ticks.gaps, 'gap')} of more than an hour ({ticks.silence} in all)"
            " played as one interval each"
        )
    if ticks.expired:
        parts.append(f"{counted(ticks.expired, 'sample')} too old for `record` to store")
    say("; ".join(parts))
