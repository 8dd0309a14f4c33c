"""`millrace alerts`: alerts and silences from the database, steps of alerts from Kafka as they come."""

import contextlib
import getpass
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from millrace import tailing
from millrace.gpus import connected
from millrace.output import EXIT_FAILED, emit, say, show, show_table
from millrace.results import Start
from pipeline import notifications, telemetry, telemetry_reads
from pipeline.broker import LiveReader
from pipeline.events import Record
from pipeline.gpu_views import AlertView
from pipeline.notifications import Notification, Silence
from pipeline.receivers import check_match
from pipeline.settings import Settings
from pipeline.telemetry import Alert
from pipeline.telemetry_reads import AlertFilter
from pipeline.topics import GPU_ALERTS

PAGE_ROWS = 1000
# Of an id's 32 characters: fewer would soon be those of several alerts.
_SHORTEST_ID = 8


class Shown(msgspec.Struct, frozen=True):
    """What `alerts show --json` prints."""

    alert: AlertView
    notifications: tuple[Notification, ...]


async def show_list(settings: Settings, chosen: AlertFilter, limit: int, as_json: bool) -> int:
    """Print alerts, the latest begun first.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    found: list[AlertView] = []
    async with connected(settings) as pool:
        after = None
        while len(found) < limit:
            size = min(PAGE_ROWS, limit - len(found))
            page = await telemetry_reads.alerts(pool, chosen, size, after)
            found += page
            if len(page) < size:
                break
            after = page[-1].since, page[-1].id
    if as_json:
        for alert in found:
            emit(alert)
    elif found:
        show_table(
            ("ID", "SINCE", "STATE", "SEVERITY", "RULE", "HOST", "GPU", "WHAT", "NEXT"),
            [
                (
                    alert.id, _moment(alert.since), alert.state, alert.severity, alert.rule, alert.host,
                    alert.gpu_uuid, alert.condition.message, alert.condition.action,
                )
                for alert in found
            ],
        )  # fmt: skip
    else:
        say("there is no such alert")
    return 0


async def show_one(settings: Settings, alert_id: str, as_json: bool) -> int:
    """Print an alert, by its id or how that begins, and who was told of it; 1 if there is none, or more than one.

    Raises as `show_list` does.
    """
    async with connected(settings) as pool:
        begins = await telemetry_reads.alerts_that_begin(pool, alert_id) if _is_long(alert_id) else []
        alert = await telemetry_reads.alert(pool, begins[0] if len(begins) == 1 else alert_id)
        told = [] if alert is None else await notifications.notifications(pool, [alert.id])
    if alert is None:
        several = len(begins) > 1
        say(f"several alerts begin with {alert_id}" if several else f"there is no alert {alert_id}")
        return EXIT_FAILED
    if as_json:
        emit(Shown(alert, tuple(told)))
        return 0
    condition = alert.condition
    show(f"{alert.id}  {alert.state}  {alert.severity}  {alert.rule}")
    facts = {
        "GPU": f"{alert.gpu_uuid} on {alert.host}" + (f", {alert.model}" if alert.model else ""),
        "what": condition.message,
        "next": condition.action,
        "how": condition.runbook,
        "since": _moment(alert.since),
        "fired": alert.fired_at and _moment(alert.fired_at),
        "seen": _moment(alert.seen_at),
        "resolved": alert.resolved_at and _moment(alert.resolved_at),
    }
    for name, value in facts.items():
        if value:
            show(f"  {name:<9} {value}")
    for each in told:
        when = f" at {_moment(each.settled_at)}" if each.settled_at else ""
        why = f": {each.reason}" if each.reason else ""
        show(f"  {each.receiver}: {each.state} {each.status}{when}{why}")
    return 0


async def tail(
    settings: Settings, start: Start, limit: int | None, severity: str | None, as_json: bool
) -> int:
    """Print steps of alerts as they are published, until cancelled or `limit` were printed.

    Raises:
        DependencyError: no broker answers, or the topic is missing.
    """
    reader = LiveReader(settings, [settings.topic(GPU_ALERTS.name)], start=start, client_id="millrace-alerts")

    def show_step(record: Record) -> bool:
        alert = telemetry.decode_alert(record)
        if severity not in (None, alert.condition.severity):
            return False
        if as_json:
            emit(alert)
        else:
            show(line_of(alert))
        return True

    return await tailing.tail(reader, show_step, limit)


async def silence(
    settings: Settings, labels: Sequence[str], length: timedelta, comment: str, as_json: bool
) -> int:
    """Begin a silence; raises as `show_list` does, and ValueError for a label that cannot be one."""
    match = parse_labels(labels)
    now = datetime.now(UTC)
    async with connected(settings) as pool:
        made = await notifications.silence(pool, match, now, now + length, comment, _who())
    if as_json:
        emit(made)
    else:
        show(f"silence {made.id} holds until {_moment(made.ends_at)} UTC: {_labels(made)}")
    return 0


async def unsilence(settings: Settings, number: int, as_json: bool) -> int:
    """End a silence; 1 if there is none that goes on. Raises as `show_list` does."""
    async with connected(settings) as pool:
        ended = await notifications.end_silence(pool, number)
    if ended is None:
        say(f"there is no silence {number} that goes on")
        return EXIT_FAILED
    if as_json:
        emit(ended)
    else:
        show(f"silence {ended.id} is over: what it held back and still fires is told")
    return 0


async def silences(settings: Settings, every: bool, limit: int, as_json: bool) -> int:
    """Print silences, newest first; raises as `show_list` does."""
    async with connected(settings) as pool:
        found = await notifications.silences(pool, every=every, limit=limit)
    if as_json:
        for each in found:
            emit(each)
    elif found:
        show_table(
            ("NUMBER", "FROM", "UNTIL", "WHAT", "BY", "COMMENT"),
            [
                (
                    str(each.id), _moment(each.starts_at), _moment(each.ends_at), _labels(each), each.created_by,
                    each.comment,
                )
                for each in found
            ],
        )  # fmt: skip
    else:
        say("nothing is silenced")
    return 0


def parse_labels(given: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """Read `host=gpu-*`; a label that is given several times may fit any of its patterns.

    Raises:
        ValueError: the message says which cannot be read.
    """
    patterns: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, separator, pattern = text.partition("=")
        if not separator:
            raise ValueError(f"{text!r} is not LABEL=PATTERN, such as host=gpu-*")
        patterns[name] = (*patterns.get(name, ()), pattern)
    match: dict[str, str | tuple[str, ...]] = {
        name: found[0] if len(found) == 1 else found for name, found in patterns.items()
    }
    check_match(match)
    return match


def line_of(alert: Alert) -> str:
    """Return a step of an alert as a line, with the id that `alerts show` takes."""
    condition = alert.condition
    action = f"  next: {condition.action}" if condition.action and alert.state == "firing" else ""
    return (
        f"{alert.id}  {_moment(alert.time)}  {alert.state:<8}  {condition.severity:<8}  {condition.rule}  "
        f"{alert.host}  {alert.gpu_uuid}  {condition.message}{action}"
    )


def _labels(silence: Silence) -> str:
    return ", ".join(
        f"{name}={wanted if isinstance(wanted, str) else '|'.join(wanted)}"
        for name, wanted in silence.match.items()
    )


def _is_long(alert_id: str) -> bool:
    return len(alert_id) >= _SHORTEST_ID


def _who() -> str:
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may run as a user without a name
        return getpass.getuser()[:255]
    return "unknown"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
