"""Style and helpers of the benchmarks' plots.

Matplotlib is imported only when something is drawn: the measurements do not need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dng_models.support import style

RC: dict[str, Any] = style.RC | {"axes.grid": True}


@dataclass(frozen=True)
class Look:
    """Name, colour and marker of a contender in a plot."""

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


def seconds_text(seconds: float) -> str:
    """A time with its unit, to three digits."""
    if not seconds:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def seconds_axis(axes: Any) -> None:
    """Make the y axis logarithmic, with a time and its unit at every power of ten."""
    ticker = import_module("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=20))
    axes.yaxis.set_major_formatter(lambda value, position: seconds_text(value))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Move the values apart until neighbours have the gap between them; keeps their order."""
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

    ``gap`` is the least distance between names, as a share of the axis' height.
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
