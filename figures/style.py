"""How every figure looks: one colour, line and marker for each method, wherever it appears.

The colours are Okabe and Ito's and one of Tol's, which people with any colour vision tell apart;
in grey the line styles and markers do.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullFormatter

from dng_models.class_removal import files

BLACK = "#000000"
GREY = "#7F7F7F"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
WINE = "#882255"  # Tol's

# Samples and regions, as opposed to methods.
FORBIDDEN = VERMILLION
ALLOWED = "#333333"
TARGET = BLACK


@dataclass(frozen=True)
class Method:
    """The look of a method."""

    label: str
    color: str
    linestyle: Any
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of a curve with markers."""
        return {"color": self.color, "linestyle": self.linestyle, "marker": self.marker}


UNGUIDED = Method("unguided", GREY, (0, (1, 1)), "v")
CFG = Method("CFG", BLUE, "--", "s")
NP = Method("negative prompting", ORANGE, "-.", "^")
SLD = Method("SLD", PURPLE, (0, (3, 1, 1, 1)), "P")
CCFG = Method("contrastive CFG", WINE, (0, (5, 1)), "p")
DNG_PAPER = Method("DNG, paper's tracker", GREEN, "-", "o")
DNG_LOG_ODDS = Method("DNG, log-odds tracker", SKY, "-", "D")
DNG_EXACT = Method("DNG, exact posterior", BLACK, ":", "x")

WIDTH = 7.2  # inches: the text width of a page
DPI = 300

RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "font.size": 8,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.hashsalt": "dng-toolkit",  # the same figure is the same file
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}

P = ParamSpec("P")
R = TypeVar("R")


def applied(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run a function in this style, and leave Matplotlib's settings as they were."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return styled


# Light for little, dark for much, and nothing too light to be seen on white.
SEQUENTIAL = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.2, 1.0, 256)))


# Leading digits of the labelled ticks of a logarithmic axis, the plainest first.
LEADS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
FEWEST, MOST = 3, 7  # labels


class _LogTicks(Locator):
    """Where :func:`log_ticks` labels an axis."""

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = sorted((vmin, vmax))
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for leads in LEADS:
            ticks = [float(f"{lead}e{power}") for power in powers for lead in leads]
            ticks = [
                tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)
            ]
            if len(ticks) >= FEWEST:
                return ticks[:: math.ceil(len(ticks) / MOST)]
        narrow = MaxNLocator(FEWEST + 1, steps=[1, 2, 5, 10])
        return [tick for tick in narrow.tick_values(low, high) if tick > 0]


def _written(value: float, place: object = None) -> str:
    """A tick of a logarithmic axis: 0.002, 50, or with a power of ten beyond 10,000ths."""
    if 1e-4 <= value < 1e5:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    lead, power = f"{value:.3e}".split("e")
    lead = lead.rstrip("0").rstrip(".")
    factor = "" if lead == "1" else rf"{lead}\times"
    return rf"${factor}10^{{{int(power)}}}$"


def log_ticks(*axes: Axis) -> None:
    """Label logarithmic axes so that values can be read: each with three labels or more."""
    for axis in axes:
        axis.set_major_locator(_LogTicks())
        axis.set_major_formatter(FuncFormatter(_written))
        axis.set_minor_formatter(NullFormatter())


def plain(label: str) -> str:
    """A label without its mathematics' markup, for text that is printed."""
    spaced = re.sub(r"\\([a-zA-Z]+)", r"\1", label.replace("$", ""))
    return " ".join(spaced.replace("=", " = ").replace("<", " < ").split())


def title(axes: Axes, letter: str, text: str) -> None:
    """A panel's letter, bold, and what it shows."""
    axes.set_title(rf"$\mathbf{{{letter}}}$  {text}", loc="left")


@applied
def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the suffix of the path names; whole or not at all."""
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    files.write_atomically(
        path,
        lambda temporary: figure.savefig(temporary, dpi=DPI, metadata=metadata, format=kind),
    )
