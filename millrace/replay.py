"""`millrace replay`: stream a DCGM dump to `gpu.samples.v1` as if it were happening now.

`time` is the moment of the replay, `source_time` the dump's. Samples of a host that fall into one publish interval
travel in one record.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from millrace.dumps import Dump, Moment, open_text
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


async def replay(settings: Settings, path: Path, wishes: Wishes) -> int:
    """Publish and report; return the exit code.

    Raises:
        ContractError: the file is no dump.
        DependencyError: the broker stopped answering; what was published stays so.
    """
    dump = Dump(path, limit=wishes.limit)
    publisher = Publisher(settings, client_id="millrace-replay", timeout_seconds=PUBLISH_SECONDS)
    await publisher.start(wait=False)
    feed = Feed(settings, publisher, peers=wishes.peers, as_json=wishes.as_json)
    ticks = Ticks(dump, wishes, datetime.now(UTC))
    began = time.monotonic()
    try:
        rows = None if wishes.loop else (lambda: _lines(path))
        with Progress("replaying", rows, wishes.limit) as progress:
            await feed.run(iter(ticks), progress, is_paced=wishes.speed is not None)
    except BaseExceptionGroup as errors:
        expected, others = errors.split(MillraceError)
        if expected is None or others is not None:
            raise
        raise expected.exceptions[0] from None
    finally:
        await publisher.stop()
        _report(dump, feed, time.monotonic() - began)
    if not feed.samples:
        say(f"{path} has nothing that can be replayed")
        return EXIT_FAILED
    return EXIT_FAILED if wishes.strict and dump.rejects.counts else 0


class Ticks:
    """A dump as ticks; iterate once.

    Args:
        dump: To read.
        wishes: The pace.
        begin: The moment of the first sample, unless the dump's own times are kept.
    """

    def __init__(self, dump: Dump, wishes: Wishes, begin: datetime) -> None:
        self._dump = dump
        self._wishes = wishes
        # PostgreSQL's and our precision: a microsecond, which nobody can read.
        self._begin = begin.replace(microsecond=begin.microsecond // 1000 * 1000)
        self._described: dict[tuple[str, str], datetime] = {}

    def __iter__(self) -> Iterator[Tick]:
        interval = self._wishes.interval_seconds
        number, size = 0, 0
        hosts: dict[str, list[Sample]] = defaultdict(list)
        for offset, moment in self._moments():
            mine = math.ceil(round(offset / interval, 6))
            if mine > number and hosts:
                yield self._tick(number, hosts, size)
                hosts, size = defaultdict(list), 0
            number = mine
            size += moment.rows
            for host, gpus in moment.hosts.items():
                hosts[host].extend(self._samples(offset, moment.time, gpus))
        if hosts:
            yield self._tick(number, hosts, size)

    def _moments(self) -> Iterator[tuple[float, Moment]]:
        """Yield moments with their offset in seconds on the replay's clock, round by round."""
        base = 0.0
        while True:
            first: datetime | None = None
            count, last = 0, 0.0
            for moment in self._dump.moments():
                first = first or moment.time
                count += 1
                last = (moment.time - first).total_seconds() / (self._wishes.speed or 1.0)
                yield base + last, moment
            if not self._wishes.loop or first is None:
                return
            # The next round begins one step later, as long as the dump's are on average.
            base += last + (last / (count - 1) if count > 1 else self._wishes.interval_seconds)

    def _samples(
        self, offset: float, source_time: datetime, gpus: Mapping[str, Mapping[str, float]]
    ) -> list[Sample]:
        moment = self._begin + timedelta(seconds=offset)
        return [
            Sample(
                gpu_uuid=gpu_uuid,
                time=source_time if self._wishes.keep_time else moment,
                values=dict(values),
                source_time=source_time,
            )
            for gpu_uuid, values in gpus.items()
        ]

    def _tick(self, number: int, hosts: dict[str, list[Sample]], size: int) -> Tick:
        records = [
            Samples(
                host=host, source=SOURCE, samples=tuple(samples), gpus=tuple(self._describe(host, samples))
            )
            for host, samples in hosts.items()
        ]
        return Tick(number * self._wishes.interval_seconds, records, size)

    def _describe(self, host: str, samples: list[Sample]) -> Iterator[Gpu]:
        for sample in samples:
            key = (host, sample.gpu_uuid)
            before = self._described.get(key)
            if before is None or sample.time - before >= _DESCRIBE_EVERY:
                self._described[key] = sample.time
                yield self._dump.gpus[host][sample.gpu_uuid]


def _lines(path: Path) -> Iterator[object]:
    """Yield about as many items as the dump has rows."""
    with open_text(path) as file:
        next(file, None)
        yield from file


def _report(dump: Dump, feed: Feed, seconds: float) -> None:
    counts, lines = dump.rejects.counts, dump.rejects.lines
    for reason, count in counts.most_common():
        where = ", ".join(map(str, lines[reason]))
        say(
            f"{counted(count, 'row')}: {reason} (line {where}{', ...' if count > len(lines[reason]) else ''})"
        )
    hosts, gpus = len(dump.gpus), sum(map(len, dump.gpus.values()))
    rate = f" ({feed.values / seconds:,.0f} values per second)" if seconds > 0 else ""
    samples = f"{counted(feed.samples, 'sample')} of {counted(gpus, 'GPU')} on {counted(hosts, 'host')}"
    values = f"{counted(feed.values, 'value')} of {counted(dump.rows, 'row')}"
    parts = [f"replayed {values} as {samples} in {seconds:.1f} s{rate}"]
    if dump.blanks:
        parts.append(f"{counted(dump.blanks, 'blank value')} left out")
    if counts:
        parts.append(f"{counted(counts.total(), 'bad row')} left out")
    say("; ".join(parts))
