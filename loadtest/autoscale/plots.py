"""Runs as pictures: replicas over what arrives, and below them how long the oldest records wait. Plain SVG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtest.autoscale import policies, traces
from loadtest.autoscale.cluster import Pods
from loadtest.autoscale.hpa import SYNC_SECONDS
from loadtest.autoscale.policies import Facts
from loadtest.autoscale.simulate import run

_WIDTH, _HEIGHT, _GAP = 960, 220, 40
_COLOURS = {"arrivals": "#999999", "deadline": "#0072b2", "lag": "#d55e00"}  # told apart by all eyes


def draw_all(folder: Path, facts: Facts, seed: int, seconds: int = traces.SECONDS) -> list[Path]:
    """Run each trace once under both policies and write a picture of each; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in traces.NAMES:
        path = folder / f"{name}.svg"
        path.write_text(_picture(name, facts, seed, seconds), encoding="utf-8")
        written.append(path)
    return written


def _picture(name: str, facts: Facts, seed: int, seconds: int) -> str:
    trace = traces.make(name, seed, seconds=seconds)
    pods = Pods(images_per_second=facts.pod_images_per_second, start_seconds=facts.start_seconds)
    needed = trace.rates[::SYNC_SECONDS] / facts.pod_images_per_second
    upper: dict[str, Sequence[float]] = {"arrivals": needed.tolist()}
    lower: dict[str, Sequence[float]] = {}
    for policy, scaled in (("lag", policies.lag(facts)), ("deadline", policies.deadline(facts))):
        found = run(trace, scaled, facts.deadline_seconds, pods=pods, seed=seed)
        upper[policy] = [float(count) for count in found.replicas]
        rates = np.maximum(trace.rates[::SYNC_SECONDS][: len(found.backlog)], 1.0)
        waited = np.array(found.backlog) / np.maximum(rates, facts.pod_images_per_second)
        lower[policy] = waited.tolist()
    lower["arrivals"] = [facts.deadline_seconds] * len(lower["lag"])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {2 * (_HEIGHT + _GAP)}">',
            f'<rect width="{_WIDTH}" height="{2 * (_HEIGHT + _GAP)}" fill="white"/>',
            *_chart(f"{name}: replicas, and how many pods' work arrives (grey)", upper, 0),
            *_chart("seconds of arrivals waiting, and the deadline (grey)", lower, _HEIGHT + _GAP),
            "</svg>",
        ]
    )


def _chart(title: str, lines: dict[str, Sequence[float]], top: int) -> list[str]:
    most = max(max(values) for values in lines.values()) or 1.0
    legend = "  ".join(name for name in lines if name != "arrivals")
    words = f"{title}; most {most:.0f}; {legend}"
    drawn = [f'<text font-family="sans-serif" font-size="13" x="4" y="{top + 16}">{words}</text>']
    for name, values in lines.items():
        points = " ".join(
            f"{_WIDTH * number / len(values):.1f},{top + _GAP + _HEIGHT * (1 - value / most):.1f}"
            for number, value in enumerate(values)
        )
        drawn.append(
            f'<polyline fill="none" stroke="{_COLOURS[name]}" stroke-width="1.5" points="{points}"/>'
        )
    return drawn
