"""What is loaded once is left out of full collections of garbage.

A full collection looks at every object while no thread runs: with torch and a model loaded that was 260 ms every
half minute or so of load, the longest waits of real-time pictures.
"""

import gc


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


def set_apart_again() -> None:
    """Let what was set apart and is not needed any more go with the next full collection, and no other one."""
    gc.unfreeze()
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)


def _freeze(phase: str, found: dict[str, int]) -> None:
    if phase == "stop" and found["generation"] == 2:
        gc.callbacks.remove(_freeze)
        gc.freeze()
