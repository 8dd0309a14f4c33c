"""`millrace dead-letters`: what could not be finished, from the database; redriving is publishing again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime
from pathlib import Path

import msgspec

from millrace.output import EXIT_FAILED, counted, emit, say, show, show_table
from pipeline import broker, deadletters
from pipeline.broker import Place
from pipeline.database import Database
from pipeline.errors import ContractError, DependencyError, MillraceError
from pipeline.objects import ObjectStore
from pipeline.results import StoredDeadLetter
from pipeline.settings import Settings
from pipeline.topics import MAX_DEAD_LETTER_RECORD_BYTES

_PAGE = 500
_MAX_REASON_CHARACTERS = 60


class Filters(msgspec.Struct, frozen=True):
    """Which dead letters are meant."""

    code: str | None = None
    group: str | None = None
    topic: str | None = None
    image_id: str | None = None
    open_only: bool = True


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter as `--json` prints it; headers and key only by `show`."""

    number: int
    code: str
    reason: str
    group: str
    topic: str
    partition: int
    offset: int
    image_id: str | None
    attempts: int
    failed_at: datetime
    stored_at: datetime
    redriven_at: datetime | None
    value_bytes: int | None
    value_ref: str | None
    key: str | None = None
    headers: tuple[tuple[str, str], ...] | None = None


class Redriven(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one dead letter, a line of `redrive --json`."""

    number: int
    image_id: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    error: str | None = None


async def show_list(settings: Settings, filters: Filters, limit: int, as_json: bool) -> int:
    """Print the newest dead letters.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    async with _database(settings) as database:
        found = await _listed(database, filters, limit)
    if as_json:
        for stored in found:
            emit(_line(stored))
        return 0
    show_table(
        ("NUMBER", "FAILED AT", "CODE", "GROUP", "PLACE", "IMAGE", "TRIES", "BYTES", "REASON"),
        [
            (
                str(line.number),
                f"{line.failed_at:%Y-%m-%d %H:%M:%S}",
                line.code,
                line.group,
                f"{line.topic}:{line.partition}:{line.offset}",
                line.image_id,
                line.attempts,
                line.value_bytes,
                _short(line.reason) + (" (redriven)" if line.redriven_at else ""),
            )
            for line in map(_line, found)
        ],
    )
    if len(found) == limit:
        say(f"the newest {limit}; more with --limit")
    return 0


async def show_one(settings: Settings, number: int, save_value: Path | None, as_json: bool) -> int:
    """Print one dead letter, and write its value to a file if asked.

    Raises:
        DependencyError, ConfigurationError: the database or the object store does not answer or refuses us.
    """
    async with _database(settings) as database:
        stored = await database.dead_letter(number)
    if stored is None:
        say(f"there is no dead letter {number}")
        return EXIT_FAILED
    line = _line(stored, whole=True)
    if as_json:
        emit(line)
    else:
        for name, value in msgspec.structs.asdict(line).items():
            if name == "headers":
                for header, text in value:
                    show(f"{'header ' + header:<32} {text}")
            elif value is not None:
                show(f"{name.replace('_', ' '):<32} {value}")
    if save_value is not None:
        whole = await _whole(settings, stored)
        data = whole.record.value or b""
        try:
            await asyncio.to_thread(save_value.write_bytes, data)
        except OSError as error:
            say(f"{save_value}: {error.strerror}")
            return EXIT_FAILED
        say(f"wrote {len(data):,} bytes to {save_value}")
    return 0


async def redrive(
    settings: Settings, chosen: list[int] | Filters, confirm: Callable[[str], bool], as_json: bool
) -> int:
    """Publish dead letters again and close them; a fault of one does not keep the others.

    A process that dies between publishing and closing leaves a dead letter open whose record is out already:
    redriving it once more is harmless, as ids stay the same.

    Raises:
        DependencyError: the broker, database or object store does not answer.
    """
    async with _database(settings) as database:
        if isinstance(chosen, Filters):
            numbers = [stored.id for stored in await _listed(database, chosen, None)]
            if not numbers:
                say("no dead letter is open that matches")
                return 0
            if not confirm(f"Redrive {counted(len(numbers), 'dead letter')}?"):
                say("nothing was redriven")
                return EXIT_FAILED
        else:
            numbers = list(dict.fromkeys(chosen))
        publisher = broker.Publisher(settings, client_id="millrace-redrive")
        await publisher.start(wait=False)
        failed = 0
        try:
            for number in numbers:
                result = await _redrive_one(settings, database, publisher, number)
                failed += result.error is not None
                _tell(result, as_json)
        finally:
            await publisher.stop()
    say(
        f"redrove {counted(len(numbers) - failed, 'dead letter')}"
        + (f"; {failed:,} failed" if failed else "")
    )
    return EXIT_FAILED if failed else 0


async def _redrive_one(
    settings: Settings, database: Database, publisher: broker.Publisher, number: int
) -> Redriven:
    stored = await database.dead_letter(number)
    if stored is None:
        return Redriven(number, error="there is no such dead letter")
    image_id = stored.letter.image_id
    if stored.redriven_at is not None:
        return Redriven(
            number, image_id, error=f"was redriven already at {stored.redriven_at:%Y-%m-%d %H:%M:%S}"
        )
    try:
        letter = await _whole(settings, stored)
        place: Place = await publisher.publish(letter.record.topic, deadletters.redriven(letter))
    except DependencyError:
        raise
    except MillraceError as error:
        return Redriven(number, image_id, error=error.message)
    await database.mark_redriven(number)
    return Redriven(number, image_id, place.topic, place.partition, place.offset)


async def _whole(settings: Settings, stored: StoredDeadLetter) -> deadletters.DeadLetter:
    """Return the letter with its value, from the object store if the broker would not carry it."""
    letter = stored.letter
    if letter.value_ref is None:
        return letter
    objects = ObjectStore.open(settings)
    try:
        value = await objects.get(letter.value_ref, max_bytes=MAX_DEAD_LETTER_RECORD_BYTES)
    except ContractError as error:
        raise ContractError(f"value_ref {letter.value_ref[:80]!r}: {error.message}") from None
    finally:
        objects.close()
    return msgspec.structs.replace(letter, record=msgspec.structs.replace(letter.record, value=value))


async def _listed(database: Database, filters: Filters, limit: int | None) -> list[StoredDeadLetter]:
    """Return dead letters page by page, newest first; values stay in the database."""
    found: list[StoredDeadLetter] = []
    before: int | None = None
    while limit is None or len(found) < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = await database.dead_letters(
            code=filters.code, group=filters.group, topic=filters.topic, image_id=filters.image_id,
            open_only=filters.open_only, limit=size, before=before,
        )  # fmt: skip
        found += page
        if len(page) < size:
            break
        before = page[-1].id
    return found


@contextlib.asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Database]:
    database = await Database.open(settings)
    try:
        yield database
    finally:
        await database.close()


def _tell(result: Redriven, as_json: bool) -> None:
    if as_json:
        emit(result)
    elif result.error is not None:
        say(f"{result.number}: {result.error}")
    else:
        show(
            f"{result.number}  {result.image_id or '-'}  -> {result.topic}:{result.partition}:{result.offset}"
        )


def _line(stored: StoredDeadLetter, *, whole: bool = False) -> Line:
    letter = stored.letter
    record = letter.record
    return Line(
        number=stored.id,
        code=letter.code,
        reason=letter.reason,
        group=letter.group,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        image_id=letter.image_id,
        attempts=letter.attempts,
        failed_at=letter.failed_at,
        stored_at=stored.stored_at,
        redriven_at=stored.redriven_at,
        value_bytes=stored.value_bytes,
        value_ref=letter.value_ref,
        key=_readable(record.key) if whole else None,
        headers=tuple(_readable_headers(record.headers)) if whole else None,
    )


def _readable_headers(headers: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, str]]:
    return ((name, _readable(value) or "") for name, value in headers)


def _readable(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")


def _short(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON_CHARACTERS else reason[: _MAX_REASON_CHARACTERS - 1] + "…"
