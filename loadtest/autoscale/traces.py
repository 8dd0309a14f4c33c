"""Arrivals to scale for: seeded, by second, lane and partition."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LANES = 2
PARTITIONS = 12
SECONDS = 3 * 3600
# Nothing comes at the end, so that all that came can be judged and replicas that are kept too long are seen.
TAIL_SECONDS = 600


@dataclass(frozen=True)
class Trace:
    """How many records arrive: `arrivals` is (seconds, lanes, partitions), `rates` is what they were drawn from."""

    name: str
    arrivals: Floats
    rates: Floats
    weights: Floats

    @property
    def seconds(self) -> int:
        """Return how long it is."""
        return int(self.arrivals.shape[0])

    @property
    def partitions(self) -> int:
        """Return the partitions of one lane."""
        return int(self.arrivals.shape[2])


def constant(rate: float, seconds: int = SECONDS) -> Floats:
    """The same rate all the time."""
    return np.full(seconds, rate)


def step(seconds: int, _seed: int) -> Floats:
    """From one pod's load to more than four pods', and back to two's."""
    rates = constant(90.0, seconds)
    rates[seconds // 6 : seconds * 2 // 3] = 520.0
    rates[seconds * 2 // 3 :] = 200.0
    return rates


def ramp(seconds: int, _seed: int) -> Floats:
    """Up to the most that the partitions allow in an hour and a half, and down again."""
    return np.interp(
        np.arange(seconds),
        [0, seconds * 0.1, seconds * 0.6, seconds * 0.7, seconds],
        [60, 60, 1150, 1150, 60],
    )


def diurnal(seconds: int, _seed: int) -> Floats:
    """A day in three hours, with a night in which little comes."""
    phase = 2 * np.pi * np.arange(seconds) / seconds
    return 40.0 + 860.0 * ((1 - np.cos(phase)) / 2) ** 1.5


def burst(seconds: int, seed: int) -> Floats:
    """A low base, and out of nothing ten minutes or so of much more."""
    draw = np.random.default_rng(seed)
    rates = constant(80.0, seconds)
    at = 600.0
    while at < seconds - 1200:
        length = draw.uniform(400, 900)
        rates[int(at) : int(at + length)] = draw.uniform(300, 900)
        at += length + draw.uniform(900, 2400)
    return rates


def sawtooth(seconds: int, _seed: int) -> Floats:
    """Rising for half an hour, then nothing left at once; a minute of silence between."""
    tooth = 1800
    phase = np.arange(seconds) % tooth
    return np.where(phase < 60, 0.0, 40.0 + 680.0 * phase / tooth)


_SHAPES: dict[str, Callable[[int, int], Floats]] = {
    "step": step,
    "ramp": ramp,
    "diurnal": diurnal,
    "burst": burst,
    "sawtooth": sawtooth,
    "skewed": lambda seconds, seed: 0.55 * diurnal(seconds, seed),
}
NAMES = tuple(_SHAPES)


def make(
    name: str,
    seed: int,
    *,
    seconds: int = SECONDS,
    realtime_share: float = 0.25,
    partitions: int = PARTITIONS,
) -> Trace:
    """Draw a trace: Poisson arrivals around its shape, keys spread evenly or, where it is skewed, unevenly."""
    # Zipf with exponent 0.6: the hottest of twelve partitions gets a fifth of the records, not a twelfth.
    weights = np.arange(1.0, partitions + 1.0) ** -0.6 if name == "skewed" else np.ones(partitions)
    return draw(name, _SHAPES[name](seconds, seed), weights, seed, realtime_share)


def draw(name: str, rates: Floats, weights: Floats, seed: int, realtime_share: float = 0.25) -> Trace:
    """Draw arrivals of these rates; which partition is the hot one, the seed decides."""
    generator = np.random.default_rng(seed)
    rates = np.concatenate([rates, np.zeros(TAIL_SECONDS)])
    weights = generator.permutation(weights / weights.sum())
    lanes = np.array([realtime_share, 1.0 - realtime_share])
    expected = rates[:, None, None] * lanes[None, :, None] * weights[None, None, :]
    return Trace(name, generator.poisson(expected).astype(np.float64), rates, weights)
