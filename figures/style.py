"""Style of the figures: each method has the same colour, line and marker everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dng_models.support import style
from dng_models.support.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    WINE,
    applied,
    log_ticks,
    title,
)

__all__ = [
    "BLACK",
    "BLUE",
    "GREY",
    "ORANGE",
    "VERMILLION",
    "WIDTH",
    "applied",
    "log_ticks",
    "title",
]

DPI = 300

# Colours of samples and regions; methods have their own below.
FORBIDDEN = VERMILLION
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
DNG_PATH = Method("DNG, path tracker", VERMILLION, "-", "X")
DNG_EXACT = Method("DNG, exact posterior", BLACK, ":", "x")

# From light to dark, without the colours that are too light on white.
SEQUENTIAL = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.2, 1.0, 256)))


def plain(label: str) -> str:
    """A label without LaTeX markup, for printed text."""
    spaced = re.sub(r"\\([a-zA-Z]+)", r"\1", label.replace("$", ""))
    return " ".join(spaced.replace("=", " = ").replace("<", " < ").split())


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format that the suffix of the path names."""
    style.save(figure, path, DPI)
