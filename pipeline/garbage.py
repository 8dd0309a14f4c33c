"""What is loaded once is left out of full collections of garbage.

A full collection looks at every object while no thread runs: with torch and a model loaded that was 260 ms every
half minute or so of load, the longest waits of real-time pictures.
"""

import asyncio
import gc
import time
from collections.abc import Callable

# How often a process is asked how long it has been idle.
LOOK_SECONDS = 1.0
# It is idle between any two pictures; of 40 a second 10 to 20 would wait for a collection.
QUIET_SECONDS = 2.0
# How long at most what is no more needed may stay.
MAX_WAIT_SECONDS = 60.0


def pause() -> None:
    """Collect nothing until `resume`: of what is imported next to nothing is garbage.

    Looking at it again and again was 1.2 s of the 5.6 s of processor time that importing takes with torch.
    """
    gc.disable()


def resume() -> None:
    """Leave all that there is out of collections, and collect from now on."""
    gc.freeze()
    gc.enable()


def set_apart() -> None:
    """Collect garbage and leave all that remains out of collections to come."""
    gc.collect()
    gc.freeze()


async def set_apart_again(idle_seconds: Callable[[], float]) -> None:
    """Collect what was set apart and is not needed any more, such as models that were replaced, once it is quiet.

    Most of it went with its last reference; what is left would stay for ever. Who is never idle waits for it once.
    """
    until = time.monotonic() + MAX_WAIT_SECONDS
    while idle_seconds() < QUIET_SECONDS and time.monotonic() < until:  # noqa: ASYNC110 (the clock decides)
        await asyncio.sleep(LOOK_SECONDS)
    gc.unfreeze()
    set_apart()
