"""What `predictions tail` and `alerts tail` share: records are shown as they come, as long as somebody reads."""

import asyncio
from collections.abc import Callable

from millrace.output import say, stdout_closed
from pipeline.broker import LiveReader
from pipeline.errors import ContractError
from pipeline.events import Record


async def tail(reader: LiveReader, show_record: Callable[[Record], bool], limit: int | None) -> int:
    """Show records until cancelled or `limit` were shown; `show_record` says whether it showed one.

    What breaks its contract is named on stderr and passed by.

    Raises:
        DependencyError: no broker answers, or a topic is missing.
        BrokenPipeError: nobody reads stdout any more.
    """
    await reader.start(wait=False)
    showing = asyncio.create_task(_show_all(reader, show_record, limit))
    closed = asyncio.create_task(stdout_closed())
    try:
        await asyncio.wait({showing, closed}, return_when=asyncio.FIRST_COMPLETED)
        if not showing.done():
            raise BrokenPipeError
        showing.result()
        return 0
    finally:
        for task in (showing, closed):
            task.cancel()
        await asyncio.wait({showing, closed})
        await reader.stop()


async def _show_all(reader: LiveReader, show_record: Callable[[Record], bool], limit: int | None) -> None:
    shown = 0
    async for record in reader:
        try:
            is_shown = show_record(record)
        except ContractError as error:
            say(f"{record.default_id}: {error.message}")
            continue
        if is_shown:
            shown += 1
            if shown == limit:
                return
