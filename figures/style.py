"""How every figure looks: one colour, line and marker for each method, wherever it appears.

The colours are Okabe and Ito's, which people with any colour vision tell apart; in grey the line
styles and markers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dng_models.class_removal import files

BLACK = "#000000"
GREY = "#7F7F7F"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"

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
