"""`millrace simulate`: publish the telemetry of a made-up fleet whose faults are known.

Times are the fleet's own, ten seconds from sample to sample whatever the speed; a fleet that lives faster than the
clock on the wall begins in the past and ends now. Its hosts and GPUs are new in each run: `watch` takes
as late what is older than what it has heard of a host.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from loadtest.fleet import Fleet, Plan
from loadtest.fleet_faults import FAULTS, Injected
from millrace.feed import PUBLISH_SECONDS, Feed, Tick
from millrace.output import counted, emit, say, show_table
from millrace.progress import Progress
from pipeline.broker import Publisher
from pipeline.errors import ConfigurationError, MillraceError
from pipeline.settings import Settings

# Without an end: the jobs of a week are drawn at once, in a tenth of a second for 2,048 GPUs.
_ENDLESS_SECONDS = 7 * 86_400.0
# Who watches wants to see faults soon.
_ENDLESS_FAULT_WINDOW = (60.0, 600.0)


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for."""

    gpus: int = 64
    faults: tuple[str, ...] = ()
    seed: int = 7
    interval_seconds: float = 10.0
    #: None: until Ctrl-C.
    seconds: float | None = None
    #: None: as fast as the broker takes it.
    speed: float | None = 1.0
    peers: str = "host"
    truth: Path | None = None
    as_json: bool = False


class Truth(msgspec.Struct, frozen=True):
    """A line of `--truth`: what was injected."""

    fault: str
    gpu_uuid: str
    host: str
    begin: datetime
    end: datetime


class FaultHelp(msgspec.Struct, frozen=True):
    """A line of `--list-faults`."""

    fault: str
    help: str


def show_faults(as_json: bool) -> int:
    """Print the kinds of faults; return the exit code."""
    if as_json:
        for name, kind in FAULTS.items():
            emit(FaultHelp(name, kind.help))
    else:
        show_table(("fault", "what happens"), [(name, kind.help) for name, kind in FAULTS.items()])
    return 0


async def simulate(settings: Settings, wishes: Wishes) -> int:
    """Publish and report; return the exit code.

    Raises:
        ConfigurationError: a fault is not known, or has no place in so small a fleet.
        DependencyError: the broker stopped answering; what was published stays so.
    """
    fleet = _make(wishes, datetime.now(UTC))
    _tell(fleet.injected, wishes.truth)
    publisher = Publisher(settings, client_id="millrace-simulate", timeout_seconds=PUBLISH_SECONDS)
    await publisher.start(wait=False)
    feed = Feed(settings, publisher, peers=wishes.peers, as_json=wishes.as_json)
    steps = int((wishes.seconds or 0.0) / wishes.interval_seconds)
    began = time.monotonic()
    try:
        with Progress("simulating", (lambda: iter(range(steps))) if steps else None) as progress:
            await feed.run(ticks(fleet, wishes.speed), progress, is_paced=wishes.speed is not None)
    except BaseExceptionGroup as errors:
        expected, others = errors.split(MillraceError)
        if expected is None or others is not None:
            raise
        raise expected.exceptions[0] from None
    finally:
        await publisher.stop()
        seconds = time.monotonic() - began
        rate = f" ({feed.samples / seconds:,.0f} per second)" if seconds > 0 else ""
        say(
            f"published {counted(feed.samples, 'sample')} of {counted(wishes.gpus, 'GPU')} in "
            f"{counted(feed.records, 'record')} in {seconds:.1f} s{rate}"
        )
    return 0


def ticks(fleet: Fleet, speed: float | None) -> Iterator[Tick]:
    """Yield a fleet's steps at a pace."""
    for step in fleet:
        offset = (step.time - fleet.plan.begin).total_seconds() / (speed or 1.0)
        yield Tick(offset, step.records, 1)


def _make(wishes: Wishes, now: datetime) -> Fleet:
    begin = now.replace(microsecond=0)
    if wishes.seconds is not None:
        ahead = 1.0 if wishes.speed is None else max(0.0, 1.0 - 1.0 / wishes.speed)
        begin -= timedelta(seconds=round(wishes.seconds * ahead))
    plan = Plan(
        begin=begin,
        seconds=wishes.seconds or _ENDLESS_SECONDS,
        gpus=wishes.gpus,
        seed=wishes.seed,
        interval_seconds=wishes.interval_seconds,
        faults=tuple(FAULTS) if wishes.faults == ("all",) else wishes.faults,
        fault_window=None if wishes.seconds else _ENDLESS_FAULT_WINDOW,
        identity=f"{int(now.timestamp()):x}" if begin < now.replace(microsecond=0) else "",
    )
    try:
        return Fleet(plan)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def _tell(injected: list[Injected], path: Path | None) -> None:
    truth = [Truth(fault.fault, fault.gpu_uuid, fault.host, fault.begin, fault.end) for fault in injected]
    for fault in truth:
        say(
            f"{fault.fault} on {fault.gpu_uuid} of {fault.host} "
            f"from {fault.begin:%Y-%m-%dT%H:%M:%SZ} to {fault.end:%Y-%m-%dT%H:%M:%SZ}"
        )
    if path is not None:
        encoder = msgspec.json.Encoder()
        try:
            path.write_bytes(encoder.encode_lines(truth))
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
