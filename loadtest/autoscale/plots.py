"""Runs as pictures: replicas over what arrives, and the backlog: for how long its oldest record has waited.

As Mermaid's text for docs/autoscaling.md, a few dozen points each, and as SVG with every point.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.autoscale import policies, traces
from loadtest.autoscale.cluster import Pods
from loadtest.autoscale.hpa import SYNC_SECONDS
from loadtest.autoscale.policies import Facts
from loadtest.autoscale.simulate import run

BEGIN, END = "<!-- begin plots -->", "<!-- end plots -->"
#: Of a line in the page: three minutes each, which a reader can tell apart.
POINTS = 64
_WIDTH, _HEIGHT, _GAP = 960, 220, 40
_COLOURS = {"arrivals": "#999999", "deadline": "#0072b2", "lag": "#d55e00"}  # told apart by all eyes

Lines = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Drawn:
    """What is drawn of a trace, every quarter of a minute; `arrivals` is what the others are compared with."""

    name: str
    seconds: int
    #: Pods ordered, and how many pods' work arrives.
    replicas: Lines
    #: For how many seconds the oldest record has waited, and the deadline.
    waits: Lines


def draw(name: str, facts: Facts, seed: int, seconds: int = traces.SECONDS) -> Drawn:
    """Run a trace once under both policies."""
    trace = traces.make(name, seed, seconds=seconds)
    pods = Pods(images_per_second=facts.pod_images_per_second, start_seconds=facts.start_seconds)
    needed = trace.rates[::SYNC_SECONDS] / facts.pod_images_per_second
    replicas, waits = {"arrivals": needed}, {"arrivals": np.full(len(needed), facts.deadline_seconds)}
    for policy, scaled in (("deadline", policies.deadline(facts)), ("lag", policies.lag(facts))):
        found = run(trace, scaled, facts.deadline_seconds, pods=pods, seed=seed)
        replicas[policy] = np.array(found.replicas, dtype=np.float64)
        waits[policy] = np.array(found.waited)
    return Drawn(name, trace.seconds, replicas, waits)


# For the page


def write_page(page: Path, facts: Facts, seed: int, seconds: int = traces.SECONDS) -> None:
    """Put the plots of all traces between the page's marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    charts = "\n\n".join(
        chart for name in traces.NAMES for chart in mermaid(draw(name, facts, seed, seconds))
    )
    page.write_text(f"{before}{BEGIN}\n{charts}\n{END}{after}", encoding="utf-8")


def mermaid(drawn: Drawn) -> tuple[str, str]:
    """Return a trace's two charts; a point is the mean of three minutes, or the longest wait in them."""
    titles = "pods ordered, and pods' work that arrives", "seconds that the oldest record has waited"
    replicas, waits = _pieces(drawn.replicas), _pieces(drawn.waits)
    means = {name: [f"{piece.mean():.1f}" for piece in pieces] for name, pieces in replicas.items()}
    longest = {name: [f"{piece.max():.0f}" for piece in pieces] for name, pieces in waits.items()}
    return (
        _mermaid(f"{drawn.name}: {titles[0]}", "pods", drawn.seconds, means),
        _mermaid(f"{drawn.name}: {titles[1]}", "seconds", drawn.seconds, longest),
    )


def _pieces(lines: Lines) -> dict[str, list[npt.NDArray[np.float64]]]:
    return {name: np.array_split(line, POINTS) for name, line in lines.items()}


def _mermaid(title: str, unit: str, seconds: int, points: dict[str, list[str]]) -> str:
    most = max(float(value) for values in points.values() for value in values)
    palette = ", ".join(_COLOURS[name] for name in points)
    sizes = f'"xyChart": {{"width": {_WIDTH}, "height": {_HEIGHT + _GAP}}}'
    colours = f'"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}'
    return "\n".join(
        [
            "```mermaid",
            f"%%{{init: {{{sizes}, {colours}}}}}%%",
            "xychart-beta",
            f'    title "{title}"',
            f'    x-axis "minutes" 0 --> {seconds // 60}',
            f'    y-axis "{unit}" 0 --> {most * 1.05 + 0.5:.0f}',
            *(f"    line [{', '.join(values)}]" for values in points.values()),
            "```",
        ]
    )


# As SVG


def draw_all(folder: Path, facts: Facts, seed: int, seconds: int = traces.SECONDS) -> list[Path]:
    """Write a picture of each trace; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in traces.NAMES:
        path = folder / f"{name}.svg"
        path.write_text(_picture(draw(name, facts, seed, seconds)), encoding="utf-8")
        written.append(path)
    return written


def _picture(drawn: Drawn) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {2 * (_HEIGHT + _GAP)}">',
            f'<rect width="{_WIDTH}" height="{2 * (_HEIGHT + _GAP)}" fill="white"/>',
            *_chart(f"{drawn.name}: replicas, and how many pods' work arrives (grey)", drawn.replicas, 0),
            *_chart(
                "seconds the oldest record has waited, and the deadline (grey)", drawn.waits, _HEIGHT + _GAP
            ),
            "</svg>",
        ]
    )


def _chart(title: str, lines: Lines, top: int) -> list[str]:
    most = max(values.max() for values in lines.values()) or 1.0
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
