"""How the plots of benchmarks look, and how they are written.

Matplotlib is imported when something is drawn: the measurements do without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dng_models.class_removal import files

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLACK = "#000000"
GREY = "#7F7F7F"
ORANGE = "#E69F00"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
DPI = 200
RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "font.size": 8,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


@dataclass(frozen=True)
class Look:
    """The colour and marker of a contender, and its name beside its line."""

    name: str
    color: str
    marker: str


def styled() -> AbstractContextManager[None]:
    """A block in which Matplotlib draws in this style.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    context: AbstractContextManager[None] = import_module("matplotlib").rc_context(RC)
    return context


def new_figure(width: float, height: float) -> Any:
    return import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    files.write_atomically(path, lambda part: figure.savefig(part, dpi=DPI, format="png"))


def seconds_text(seconds: float) -> str:
    """A time with its unit, in three digits."""
    if not seconds:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def seconds_axis(axes: Any) -> None:
    """A logarithmic axis of times, with a tick and its unit at every power of ten."""
    ticker = import_module("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=20))
    axes.yaxis.set_major_formatter(lambda value, position: seconds_text(value))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as it takes to have a gap between each two."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(values[index])
        while len(groups) > 1 and (
            centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
            centres.pop()
            centres[-1] = sum(values[i] for i in groups[-1]) / len(groups[-1])
    moved = [0.0] * len(values)
    for centre, group in zip(centres, groups, strict=True):
        for place, index in enumerate(group):
            moved[index] = centre + gap * (place - (len(group) - 1) / 2)
    return moved


def name_lines(axes: Any, ends: Mapping[Look, tuple[float, float]], gap: float = 0.06) -> None:
    """Write every line's name beside its end, on logarithmic axes whose limits are set.

    ``gap``: between names, as a share of the axis' height.
    """
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = [(math.log(y) - low) / (high - low) for _, y in ends.values()]
    for look, height, (x, y) in zip(ends, apart(heights, gap), ends.values(), strict=True):
        axes.annotate(
            look.name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=look.color,
            va="center",
            annotation_clip=False,
        )
