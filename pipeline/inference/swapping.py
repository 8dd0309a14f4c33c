"""Other models take over between two batches.

The invariant: a record is run by models that it was decoded for. While a swap waits, pictures are decoded for
both, the old models get every batch, and the new ones take over when the device is free and no open record is
left that only the old ones can run.
"""

import asyncio
from collections.abc import Iterable

from pipeline.imaging import View
from pipeline.inference.forward import Forward
from pipeline.inference.outcomes import Work


class Swap:
    """The models that run, and those that wait to take over; used on the engine's event loop."""

    def __init__(self, forward: Forward) -> None:
        #: What runs the next batch.
        self.forward = forward
        #: Held for the length of a swap: one at a time.
        self.turn = asyncio.Lock()
        self._next: Forward | None = None
        self._over: asyncio.Future[None] | None = None

    @property
    def views(self) -> tuple[View, ...]:
        """What pictures are to be decoded for."""
        following = () if self._next is None else self._next.views
        return tuple(dict.fromkeys((*self.forward.views, *following)))

    def begin(self, forward: Forward) -> "asyncio.Future[None]":
        """Have other models wait to take over; return what is done when they have, or nobody waits any more."""
        self._next = forward
        self._over = asyncio.get_running_loop().create_future()
        return self._over

    def take_over(self, open_works: Iterable[Work]) -> bool:
        """Go over to the next models, if there are any and they can run every record; the device is free."""
        forward = self._next
        if forward is None or not all(work.is_claimed or forward.can_take(work) for work in open_works):
            return False
        self.forward, self._next = forward, None
        self.end()
        return True

    def end(self) -> None:
        """Let whoever waits for the swap go."""
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
