"""The style of all plots of this project: figures, experiments, benchmarks and traces.

The colours are Okabe and Ito's and one of Tol's, which people with any colour vision can tell
apart; line styles and markers tell curves apart in grey.  Matplotlib is imported only when
something is drawn, so that a module can use the colours without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dng_models.support import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

BLACK = "#000000"
GREY = "#7F7F7F"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
WINE = "#882255"  # Tol's, as the next
INDIGO = "#332288"
TEAL = "#44AA99"
OLIVE = "#999933"
BROWN = "#661100"

SOLID, DASHED, DOTTED, MIXED = "-", (0, (4, 2)), (0, (1, 1)), "-."

WIDTH = 7.2  # inches: the text width of a page
DPI = 200

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
    "svg.hashsalt": "dng-toolkit",  # makes the file of a figure reproducible
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}

P = ParamSpec("P")
R = TypeVar("R")


def applied(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run a function in this style and restore Matplotlib's settings afterwards.

    Raises
    ------
    ImportError
        From the decorated function, if Matplotlib is not installed.
    """

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(
                "drawing needs Matplotlib: pip install 'dng-toolkit[figures]'"
            ) from error
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return styled


def letter(place: int) -> str:
    """Letter of the panel with index ``place``: a to z, then aa, ab and so on."""
    return (letter(place // 26 - 1) if place >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[
        place % 26
    ]


def title(axes: Axes, panel: str, text: str) -> None:
    """Write a panel's bold letter and its title above it."""
    axes.set_title(rf"$\mathbf{{{panel}}}$  {text}", loc="left")


@applied
def save(figure: Figure, path: Path | str, dpi: int | None = None) -> None:
    """Write a figure in the format that the suffix of the path names.

    Parameters
    ----------
    figure : Figure
    path : Path or str
        Where it goes; the folder is made if it is missing.
    dpi : int, optional
        Pixels per inch, for formats that have pixels; default :data:`DPI`.

    Raises
    ------
    OSError
        If it cannot be written; an existing file stays unchanged.
    ValueError
        If the suffix names no known format.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    files.write_atomically(
        path, lambda part: figure.savefig(part, dpi=dpi or DPI, metadata=metadata, format=kind)
    )


# ---------------------------------------------------------------------- logarithmic axes

# Leading digits of the labelled ticks; the first tuple that gives enough ticks is used.
LEADS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
FEWEST, MOST = 3, 7  # labels


def log_ticks(*axes: Axis) -> None:
    """Label logarithmic axes with three to seven plain numbers each.

    Parameters
    ----------
    *axes : matplotlib.axis.Axis
        Their limits may be set before or after this call.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in axes:
        axis.set_major_locator(_locator())
        axis.set_major_formatter(FuncFormatter(_written))
        axis.set_minor_formatter(NullFormatter())


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Make an axis logarithmic between two limits, with labels as :func:`log_ticks` sets them.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
    low, high : float
        Its limits, 0 < low < high.
    """
    name = "x" if axis is axis.axes.xaxis else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    log_ticks(axis)


def ticks_between(low: float, high: float) -> list[float]:
    """Three to seven plain numbers between two positive ones, with 1 if it lies between.

    Parameters
    ----------
    low, high : float
        0 < low < high.

    Returns
    -------
    list of float
        In increasing order.
    """
    least, most = low * (1.0 - 1e-9), high * (1.0 + 1e-9)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in LEADS:
        ticks = [float(f"{lead}e{power}") for power in powers for lead in leads]
        ticks = [tick for tick in ticks if least <= tick <= most]
        if len(ticks) >= FEWEST:
            every = math.ceil(len(ticks) / MOST)
            return ticks[(ticks.index(1.0) if 1.0 in ticks else 0) % every :: every]
    # Over so short a range a logarithmic axis is nearly linear.
    step = 10.0 ** math.floor(math.log10((high - low) / FEWEST))
    for each in (5.0 * step, 2.0 * step, step):
        first, last = math.ceil(least / each), math.floor(most / each)
        if last - first + 1 >= FEWEST:
            break
    return [each * number for number in range(first, last + 1)]


@functools.cache
def _locator_class() -> type[Locator]:
    from matplotlib.ticker import Locator

    class LogTicks(Locator):
        """Matplotlib locator of the ticks that :func:`log_ticks` sets."""

        def __call__(self) -> Any:
            assert self.axis is not None
            return self.tick_values(*self.axis.get_view_interval())

        def tick_values(self, vmin: float, vmax: float) -> Any:
            return ticks_between(*sorted((vmin, vmax)))

    return LogTicks


def _locator() -> Locator:
    return _locator_class()()


def _written(value: float, place: object = None) -> str:
    """Label of a tick: 0.002 or 50, with a power of ten below 1e-4 and from 1e5 on."""
    if 1e-4 <= value < 1e5:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    lead, power = f"{value:.3e}".split("e")
    lead = lead.rstrip("0").rstrip(".")
    factor = "" if lead == "1" else rf"{lead}\times"
    return rf"${factor}10^{{{int(power)}}}$"
