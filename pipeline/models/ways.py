"""Ways to run a network, tried where it runs: the fastest of those that say the same.

A picture alone and a batch are timed, all ways in turns, and the shortest of each counts, since a device may be at
work for others meanwhile: the models that these are to replace. To them a race is a burden, so that networks that
differ in their weights alone have one in a process; what they say is compared for each.
"""

import contextlib
import operator
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from typing import Any

import torch
from torch import nn

from pipeline import logs
from pipeline.models.disagreement import disagreement
from pipeline.models.protocol import Output
from pipeline.models.weights import one_line

# A plainer way is left only for one that gains more than a timing on a busy machine errs by.
WORTHWHILE = 0.95
# A batch of so many pictures is timed, or of as many as take so long; outputs are compared on it.
_BATCH = 8
_BATCH_SECONDS = 0.5
# So many turns, the first of which is cold, or as many as take so long, and two at least.
_TURNS = 8
_TURNS_SECONDS = 2.0
# What takes so many times as long as another way, and longer than cold starts and hiccups, has no more turns: two
# pictures took vit_b_16 13 s in bfloat16, 0.8 s in float32.
_HOPELESS = 2.0
_HICCUP_SECONDS = 2.0

#: Evaluates a batch with a network in a precision (None: float32).
Run = Callable[[nn.Module, torch.dtype | None, Any], list[Output]]
Clock = Callable[[], float]
#: The least seconds of each way, for a picture alone (on a CPU) and for a batch.
Timings = Mapping[str, Sequence[float]]

_log = logs.get(__name__)
_raced: dict[Hashable, tuple[Timings, int]] = {}


@dataclass(frozen=True)
class Way:
    """A way to run a network: `make` returns it ready; `tolerance` is a share of what fewer bits may change."""

    name: str
    make: Callable[[], nn.Module]
    dtype: torch.dtype | None = None
    tolerance: float = 1.0

    @cached_property
    def network(self) -> nn.Module:
        """What is to run, made when it is needed."""
        return self.make()


@dataclass(frozen=True)
class Course:
    """Where ways are tried; `pictures(n)` draws a batch for `run`.

    `full` says in float32 what outputs should be; `alike` is the same for networks that differ in weights alone.
    """

    model: str
    full: nn.Module
    run: Run
    pictures: Callable[[int], Any]
    device: torch.device
    alike: Hashable
    #: The largest batch there is.
    most: int = _BATCH


def fastest(ways: Sequence[Way], course: Course) -> Way:
    """Return the way to run; plainer ones come first, and the first is taken as it is if no other can be."""
    if len(ways) == 1:
        return ways[0]
    remembered = _raced.get(course.alike)
    timings, count = remembered or _race(ways, course)
    batch = course.pictures(count)
    expected = cache(lambda: course.run(course.full, None, batch))
    for way in _ranked(ways, timings):
        share = 0.0 if way is ways[0] else _difference(way, course, batch, expected)
        if share is None:
            continue
        is_sound = share <= way.tolerance
        _log.info(
            "fastest way chosen" if is_sound else "a fast way is not taken: the outputs differ",
            model=course.model,
            way=way.name,
            of_tolerance=round(share, 3),
            seconds={name: [round(each, 5) for each in seconds] for name, seconds in timings.items()},
            pictures=count,
            remembered=remembered is not None,
        )
        if is_sound:
            return way
    return ways[0]


def _difference(way: Way, course: Course, batch: Any, expected: Callable[[], list[Output]]) -> float | None:
    """Return how far a way's outputs are from what they should be, as a share of what fewer bits may change.

    None: it does not work.
    """
    try:
        return disagreement(expected(), course.run(way.network, way.dtype, batch))
    except Exception as error:  # libraries raise anything
        _say_left_out(way, course, error)
        return None


def _ranked(ways: Sequence[Way], timings: Timings) -> Iterator[Way]:
    """Yield those that were timed: first the one that is nowhere far from the fastest, or a plainer one as good."""
    leaders = list(map(min, zip(*timings.values(), strict=True)))
    regrets = {name: max(map(operator.truediv, of, leaders)) for name, of in timings.items()}
    while regrets:
        least = min(regrets.values())
        way = next(way for way in ways if regrets.get(way.name, inf) * WORTHWHILE <= least)
        del regrets[way.name]
        yield way


def _race(ways: Sequence[Way], course: Course) -> tuple[Timings, int]:
    """Return what each way took that came to the end, and how many pictures its batch had.

    It is remembered if every way worked: one that did not may have lacked memory beside other models, or had
    weights that are no numbers.
    """
    race, heats, count = _Race(ways, course), [], min(_BATCH, course.most)
    with _clock(course.device) as clock:
        # On a GPU a picture alone shows how fast the host gives out work.
        if course.device.type == "cpu":
            heats.append(race.heat(clock, 1))
            count = min(count, max(2, int(_BATCH_SECONDS / min(heats[0].values(), default=inf))))
        heats.append(race.heat(clock, count))
    timings = {name: [heat[name] for heat in heats] for name in heats[-1]}
    if not race.failed:
        _raced[course.alike] = timings, count
    return timings, count


class _Race:
    """Who is still in a race, and whether a way did not work."""

    def __init__(self, ways: Sequence[Way], course: Course) -> None:
        self.failed = False
        self._course = course
        self._left = list(ways)

    def heat(self, clock: Clock, size: int) -> dict[str, float]:
        """Time a batch all ways in turns; return the least of each, and leave the hopeless out from now on."""
        batch, least = self._course.pictures(size), dict[str, float]()
        until = time.monotonic() + _TURNS_SECONDS
        for turn in range(_TURNS):
            for way in list(self._left):
                try:
                    seconds = _seconds(clock, way, self._course, batch)
                except Exception as error:  # where an operation has no such kernel, or no memory
                    _say_left_out(way, self._course, error)
                    self.failed = True
                    self._left.remove(way)
                    least.pop(way.name, None)
                else:
                    least[way.name] = min(seconds, least.get(way.name, seconds))
            if turn or self._course.device.type == "cpu":  # a GPU's libraries may take seconds to load
                most = min(least.values(), default=0.0) * _HOPELESS + _HICCUP_SECONDS
                self._left = [way for way in self._left if least[way.name] <= most]
            if turn and time.monotonic() > until:
                break
        return least


def _say_left_out(way: Way, course: Course, error: Exception) -> None:
    _log.info("a way does not work", model=course.model, way=way.name, error=one_line(error))


@contextlib.contextmanager
def _clock(device: torch.device) -> Iterator[Clock]:
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


def _seconds(clock: Clock, way: Way, course: Course, batch: Any) -> float:
    network = way.network  # made before the clock starts
    started = clock()
    course.run(network, way.dtype, batch)  # ends with a transfer to the host: what is on the device is done
    return max(clock() - started, 1e-6)  # a clock may be coarse
