"""What is loaded once is left out of full collections of garbage.

A full collection looks at every object while no thread runs: with torch and a model loaded that was 260 ms every
half minute or so of load, the longest waits of real-time pictures.
"""

import asyncio
import gc
import time
from collections.abc import Callable

# How often a busy process is asked whether it is idle, and how long at most what is no more needed may stay.
LOOK_SECONDS = 1.0
MAX_WAIT_SECONDS = 600.0


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


async def set_apart_again(is_idle: Callable[[], bool]) -> None:
    """Collect what was set apart and is not needed any more, such as models that were replaced, in an idle moment.

    Most of it went with its last reference; what is left would stay for ever. Who is never idle waits for it once.
    """
    until = time.monotonic() + MAX_WAIT_SECONDS
    while not is_idle() and time.monotonic() < until:  # noqa: ASYNC110 (the clock decides)
        await asyncio.sleep(LOOK_SECONDS)
    gc.unfreeze()
    set_apart()
