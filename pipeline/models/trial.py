"""Another way to run a network, tried where it runs: what it says, and how long it takes, beside the one before.

Both are timed in turns and the shortest of each counts, since a device may be at work for others meanwhile: the
models that these are to replace. To them a timing is a burden, so that networks that differ in their weights alone
are timed once in a process; what they say is compared for each.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.models.disagreement import disagreement
from pipeline.models.protocol import Output

# It must gain more than a timing on a busy machine errs by.
WORTHWHILE = 0.95
# A timing of this many pictures, or as many as take a second, tells which is faster.
_TIMED_PICTURES = 8
_TIMED_SECONDS = 1.0
_TIMED_RUNS = 7
# So much slower that no more turns are needed: a vit_b_16 took 12 times as long in bfloat16, 10 s a turn.
_HOPELESS = 4

Run = Callable[[Any], list[Output]]

# What was timed: seconds before, seconds after, pictures.
_timed: dict[Hashable, tuple[float, float, int]] = {}


@dataclass(frozen=True)
class Trial:
    """How `after` did beside `before`; `difference` is a share of what fewer bits may change."""

    difference: float
    before_seconds: float
    after_seconds: float
    pictures: int

    @property
    def is_faster(self) -> bool:
        """Whether it gains more than a timing errs by."""
        return self.after_seconds < self.before_seconds * WORTHWHILE

    @property
    def is_slower(self) -> bool:
        """Whether it loses more than a timing errs by."""
        return self.before_seconds < self.after_seconds * WORTHWHILE


def trial(
    before: Run,
    after: Run,
    pictures: Callable[[int], Any],
    device: torch.device,
    reference: Run | None = None,
    most: int = _TIMED_PICTURES,
    alike: Hashable = None,
) -> Trial:
    """Time two ways to run a network, the first of which is warm; `pictures(n)` draws a batch.

    `reference` says what outputs should be: `before` unless told. `most` bounds how many pictures are timed. Trials
    that are `alike` and not None are timed once.
    """
    if alike is not None and alike in _timed:
        before_seconds, after_seconds, count = _timed[alike]
        batch = pictures(count)
        difference = disagreement((reference or before)(batch), after(batch))
        return Trial(difference, before_seconds, after_seconds, count)
    with _clock(device) as clock:
        seconds = _seconds(clock, before, pictures(1))
        count = max(1, min(most, int(_TIMED_SECONDS / max(seconds, 1e-6))))
        batch = pictures(count)
        difference = disagreement((reference or before)(batch), after(batch))
        timings: list[tuple[float, float]] = []
        for _ in range(_TIMED_RUNS):
            timings.append((_seconds(clock, before, batch), _seconds(clock, after, batch)))
            if timings[-1][1] > timings[-1][0] * _HOPELESS:
                break
    before_seconds, after_seconds = (min(column) for column in zip(*timings, strict=True))
    if alike is not None:
        _timed[alike] = before_seconds, after_seconds, count
    return Trial(difference, before_seconds, after_seconds, count)


@contextlib.contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield what to time a device's work with.

    On a CPU that is the time this thread was computing, all of it in this thread, so that neither decoding nor the
    models at work count: in seconds of the wall a network beside them could look slower in fewer bits.
    """
    if device.type != "cpu":
        yield time.perf_counter
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time
    finally:
        torch.set_num_threads(threads)


def _seconds(clock: Callable[[], float], run: Run, batch: Any) -> float:
    started = clock()
    run(batch)  # ends with a transfer to the host: what is on the device is done
    return clock() - started
