"""What a sweep came to, in figures like the paper's.

Every function takes data that somebody else computed, rows of the table ``sweep.jsonl`` above all
(:mod:`dng_models.class_removal.compare`), and returns a Matplotlib figure; :func:`draw_all` reads a
run's folder and writes them.

Two numbers of a row can be off a logarithmic axis, and neither is dropped, since they are the
safest and the worst of a sweep: a share of none in n images is drawn at half an image, and a
divergence that is infinite, because a remembered class is empty, is drawn with half a count added
to every class.  Both are hollow points with an arrow to where the number is.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import _checks
from dng_math.distances import binomial_interval
from dng_models import foreign
from dng_models.class_removal.compare import (
    QUANTITIES,
    UNSCALED,
    Measured,
    Method,
    Quantity,
    Row,
    at_equal_safety,
    base_is_bad,
    checked,
    classes_forgotten,
    comparison,
    csv_table,
    forbidden_share,
    forgotten_by,
    measured,
    methods_of,
    none_forbidden,
    read_rows,
    scale_of,
    table,
    tuning_table,
    weakest_safe,
)
from dng_models.class_removal.config import BUILT_IN, TRACKERS
from dng_models.class_removal.files import load_tensors, read_json, write_atomically, write_text
from dng_models.printable import drawable, plain

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    from matplotlib.transforms import ScaledTranslation
except ImportError as error:
    raise ImportError(
        "dng_models.class_removal.plot needs Matplotlib: pip install 'dng-toolkit[figures]'"
    ) from error

__all__ = [
    "at_equal_safety",
    "curves",
    "draw_all",
    "grid",
    "histogram",
    "read_rows",
    "reliability",
    "save",
    "table",
    "trajectories",
    "weakest_safe",
]

Array = NDArray[np.float64]

BLACK = "#000000"
GREY = "#7F7F7F"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"

WIDTH = 7.2  # inches: the text width of a page
DPI = 200
FEWEST_TICKS, MOST_TICKS = 3, 8  # of a logarithmic axis
RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "font.size": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}

P = ParamSpec("P")
R = TypeVar("R")


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run a function in this style, and leave Matplotlib's settings as they were."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class _Look:
    """The colour, line and marker of a method."""

    color: str
    linestyle: Any
    marker: str


SOLID, DASHED, DOTTED, MIXED = "-", (0, (4, 2)), (0, (1, 1)), "-."
LOOKS: dict[tuple[str, ...], _Look] = {
    ("none",): _Look(GREY, "none", "v"),
    ("np",): _Look(ORANGE, MIXED, "^"),
    ("sld",): _Look(PURPLE, MIXED, "P"),
    ("ccfg",): _Look(VERMILLION, MIXED, "X"),
    ("perp-neg",): _Look(YELLOW, MIXED, "h"),
    ("cfg",): _Look(BLUE, DOTTED, "8"),
    ("cg",): _Look(BLACK, DOTTED, "d"),
    ("fbg",): _Look(VERMILLION, SOLID, "*"),
    ("dng", "paper", "paper"): _Look(GREEN, SOLID, "o"),
    ("dng", "paper", "calibrated"): _Look(BLUE, SOLID, "s"),
    ("dng", "paper", "calibrated-constant"): _Look(SKY, SOLID, "<"),
    ("dng", "log-odds", "paper"): _Look(SKY, SOLID, "D"),
    ("dng", "log-odds", "calibrated"): _Look(BLACK, SOLID, "p"),
}
# Of whatever has no look of its own, in this order.
SPARE = tuple(
    _Look(color, line, marker)
    for line, markers in ((DOTTED, "<>*8hdPX"), (MIXED, "Dps^v<>o"))
    for color, marker in zip(
        (VERMILLION, BLUE, BLACK, GREEN, YELLOW, SKY, PURPLE, ORANGE), markers, strict=True
    )
)
# A conditional network keeps the colour of its method.
OTHER_MARKER = dict(zip("v^PXh8d*oDsp<", "><XPH*D8*dh8>", strict=True))

LABELS: dict[Quantity, str] = {
    "kl": r"KL(ideal $\Vert$ class histogram) (nats)",
    "frechet": "Fréchet distance of features",
    "frechet_pixels": "Fréchet distance of pixels",
}


def _look(config: Mapping[str, Any]) -> _Look | None:
    rule = config["rule"]
    key: tuple[str, ...] = (rule,)
    if rule == "dng":
        key = (rule, config.get("tracker", "paper"), config.get("hyperparameters", "paper"))
    look = LOOKS.get(key)
    if look is not None and config.get("networks") == "conditional":
        line = look.linestyle if rule == "none" else DASHED
        return replace(look, linestyle=line, marker=OTHER_MARKER[look.marker])
    return look


def _looks(methods: Sequence[Method]) -> dict[str, _Look]:
    """A look for each method, by name, that no other has."""
    looks: dict[str, _Look] = {}
    for method in methods:
        look = _look(method.rows[0]["config"])
        if look is None or look in looks.values():
            # Beyond them all looks repeat, and no reader could tell that many apart.
            look = next((spare for spare in SPARE if spare not in looks.values()), SPARE[-1])
        looks[method.name] = look
    return looks


@_styled
def curves(rows: Sequence[Row]) -> Figure:
    """KL and Frechet distances against the share of forbidden images, all methods on one pair.

    A row of panels for each class forgotten, a column for each distance that was measured.  Lines
    join the scales of a method in their order; bars are the intervals of the rows, in both
    directions.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of a sweep's table.

    Returns
    -------
    Figure
        With Frechet (1957) distances of the classifier's features and of pixels beside the
        divergence.

    Raises
    ------
    ValueError
        If a row is not one, or there is none.
    """
    rows = checked(rows)
    methods, forgotten = methods_of(rows), classes_forgotten(rows)
    looks = _looks(methods)
    shown = [q for q in QUANTITIES if any(measured(row, q) for row in rows)]
    if not shown:
        raise ValueError(f"rows must have one of {', '.join(QUANTITIES)} in their metrics")
    columns = 3 if max(len(method.name) for method in methods) < 36 else 2
    height = 2.35 * len(forgotten) + 0.4 + 0.17 * math.ceil((len(methods) + 4) / columns)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(forgotten), len(shown), sharex=True, sharey="col", squeeze=False)
    _percent_axis(panels[0, 0], rows)
    for column, quantity in zip(panels.T, shown, strict=True):
        _distance_axis(column[0], [m for row in rows if (m := measured(row, quantity))])
        for axes in column:
            axes.set_ylabel(LABELS[quantity])
    for axes in panels[-1]:
        axes.set_xlabel("forbidden images (%)")
    for place, axes in enumerate(panels.flat):
        forget = forgotten[place // len(shown)]
        quantity = shown[place % len(shown)]
        if quantity == "kl":
            _draw_chance(axes, [row for row in rows if forgotten_by(row) == forget])
        for method in methods:
            _draw_curve(axes, method, looks[method.name], method.of(forget), quantity)
        _title(axes, _letter(place), f"{_named_class(forget)} forgotten")
    _mark_bases(figure, rows)
    figure.legend(
        *_legend_of_curves(looks, panels.flat),
        loc="outside lower center",
        ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.1)},
    )
    # The scales are named where there is room, which is known once the layout is, and stays.
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    for place, axes in enumerate(panels.flat):
        forget, quantity = forgotten[place // len(shown)], shown[place % len(shown)]
        _name_scales(axes, [(looks[m.name], m.of(forget)) for m in methods], quantity)
    return figure


def _named_class(forget: str) -> str:
    return f"{'classes' if ', ' in forget else 'class'} {plain(forget)}"


def _title(axes: Axes, letter: str, text: str) -> None:
    axes.set_title(rf"$\mathbf{{{letter}}}$  {text}", loc="left")


def _percent_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Logarithmic; where it shows half an image for none, the tick says 0."""
    shares = [forbidden_share(row) for row in rows]
    # A bar that ends near 0 would stretch the axis: it runs into its end.
    low = 90.0 * min(max(share.low, 0.5 * share.value) for share in shares)
    high = min(100.0, 115.0 * max(share.high for share in shares))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    apart = 0.1 * math.log10(high / low)  # closer than this labels would touch
    ticks = {100.0 * forbidden_share(row).value: "0" for row in rows if none_forbidden(row)}
    least = max([low, *ticks])  # nothing is less than 0
    usual = [float(f"{m}e{power}") for m in (1, 5, 2) for power in range(-4, 3)]
    for some in (usual, _log_ticks(low, high)):
        for tick in some:
            room = all(abs(math.log10(tick / other)) > apart for other in ticks)
            if least <= tick <= high and room:
                ticks[tick] = f"{tick:g}"
        if len(ticks) >= FEWEST_TICKS:
            break
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)


def _distance_axis(axes: Axes, numbers: Sequence[Measured]) -> None:
    """Logarithmic, for the numbers: a bar that ends near 0 does not stretch it."""
    low = min(max(number.low, 0.5 * number.value) for number in numbers)
    high = max(min(number.high, 2.0 * number.value) for number in numbers)
    _logarithmic(axes)
    axes.set_ylim(0.8 * low, 1.3 * high)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis that can be read, whatever it spans."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_LogTicks())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """Ticks of a logarithmic axis, at least three between any limits: all are labelled."""

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Between two limits."""
        return _log_ticks(min(vmin, vmax), max(vmin, vmax))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, or the fewest more that make three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [float(f"{m}e{power}") for power in powers for m in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= FEWEST_TICKS:
            return ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    # Over less than that a logarithmic axis is nearly a linear one.
    for count in range(FEWEST_TICKS, 12):
        ticks = [tick for tick in MaxNLocator(count).tick_values(low, high) if low <= tick <= high]
        if len(ticks) >= FEWEST_TICKS:
            break
    return [float(tick) for tick in ticks]


def _draw_chance(axes: Axes, rows: Sequence[Row]) -> None:
    """The mean divergence of as many images of the ideal: 2 n KL is chi-squared (Wilks 1938)."""
    sizes = {
        (row["metrics"]["num_images"], len(row["metrics"].get("histogram") or ())) for row in rows
    }
    images, classes = sizes.pop()
    freedom = classes - len(rows[0]["config"]["forget"]) - 1
    if sizes or freedom < 1:
        return
    chance = freedom / (2.0 * images)
    axes.axhline(chance, color=BLACK, ls=DASHED, lw=0.6, gid="chance")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.7 * chance), high)


def _draw_curve(
    axes: Axes, method: Method, look: _Look, rows: Sequence[Row], quantity: Quantity
) -> None:
    """The line, the bars and the points of a method; hollow ones with arrows."""
    points = [(row, number) for row in rows if (number := measured(row, quantity))]
    if not points:
        return
    shares = [forbidden_share(row) for row, _ in points]
    x = 100.0 * np.array([share.value for share in shares])
    y = np.array([number.value for _, number in points])
    axes.plot(x, y, color=look.color, ls=look.linestyle, label=method.name)
    bars: dict[str, Any] = {"color": look.color, "lw": 0.5, "alpha": 0.7}
    axes.hlines(y, [100.0 * s.low for s in shares], [100.0 * s.high for s in shares], **bars)
    axes.vlines(x, [n.low for _, n in points], [n.high for _, n in points], **bars)
    none = np.array([none_forbidden(row) for row, _ in points])
    infinite = np.array([number.infinite for _, number in points])
    hollow = none | infinite
    point: dict[str, Any] = {"color": look.color, "marker": look.marker, "ls": "none"}
    axes.plot(x[~hollow], y[~hollow], **point)
    axes.plot(x[hollow], y[hollow], mfc="white", zorder=2.5, gid="hollow", **point)
    aside = 6.0 / 72.0  # inches
    for off, mark, arrow, shift in (
        (none, "none forbidden", "<", (-aside, 0.0)),
        (infinite, "infinite", "^", (0.0, aside)),
    ):
        away = ScaledTranslation(*shift, axes.figure.dpi_scale_trans)
        axes.plot(
            x[off],
            y[off],
            color=look.color,
            marker=arrow,
            ms=2.5,
            ls="none",
            transform=axes.transData + away,
            gid=mark,
        )


def _legend_of_curves(
    looks: Mapping[str, _Look], panels: Iterable[Axes]
) -> tuple[list[Any], list[str]]:
    """Handles and labels: the methods, and what the marks mean that are drawn."""
    drawn = {
        line.get_gid() for axes in panels for line in axes.get_lines() if np.size(line.get_xdata())
    }
    entries: dict[str, Any] = {}
    for name, look in looks.items():
        handle = Line2D([], [], color=look.color, ls=look.linestyle, marker=look.marker)
        entries[plain(name)] = handle
    grey: dict[str, Any] = {"color": "#555555", "ls": "none"}
    for mark, arrow, text in (
        ("none forbidden", "<", "none forbidden, drawn at half an image"),
        ("infinite", "^", "a class is empty: KL is infinite"),
    ):
        if mark in drawn:
            away = Line2D([], [], marker=arrow, ms=2.5, **grey)
            entries[text] = away, Line2D([], [], marker="o", mfc="white", **grey)
    if "chance" in drawn:
        entries["as many images of the ideal"] = Line2D([], [], color=BLACK, ls=DASHED, lw=0.6)
    entries["bars: 95%; numbers: scale $g$"] = Line2D([], [], ls="none")
    return list(entries.values()), list(entries)


def _name_scales(
    axes: Axes, members: Sequence[tuple[_Look, list[Row]]], quantity: Quantity
) -> None:
    """The scale beside the first and the last point of each method, where there is room."""
    point = axes.figure.dpi / 72.0
    drawn = []
    for look, rows in members:
        found = [
            (100.0 * forbidden_share(row).value, number.value, scale_of(row))
            for row in rows
            if (number := measured(row, quantity))
        ]
        if found:
            xy = np.array(found)
            drawn.append((look, rows, xy, axes.transData.transform(xy[:, :2])))
    if not drawn:
        return
    lines = np.concatenate([_along(pixels) for *_, pixels in drawn])
    markers = np.concatenate([pixels for *_, pixels in drawn])
    arrows = [
        line.get_transform().transform(line.get_xydata())
        for line in axes.get_lines()
        if line.get_gid() in ("none forbidden", "infinite")
    ]
    markers = np.concatenate([markers, *arrows])
    boxes: list[tuple[Array, Array]] = []
    for look, rows, xy, pixels in drawn:
        if rows[0]["config"]["rule"] in UNSCALED:
            continue
        for at in sorted({0, len(xy) - 1}):
            text = f"{xy[at, 2]:g}"
            half = point * np.array([1.8 * len(text) + 0.3, 2.6])
            centre = _free_place(axes, pixels[at], half, point, lines, markers, boxes)
            if centre is None:
                continue
            boxes.append((centre - half, centre + half))
            axes.annotate(
                text,
                (xy[at, 0], xy[at, 1]),
                tuple((centre - pixels[at]) / point),
                textcoords="offset points",
                size=6,
                color=_darker(look.color),
                ha="center",
                va="center_baseline",
            )


def _along(pixels: Array) -> Array:
    """Points along a line, a few pixels apart."""
    steps = np.linspace(0.0, 1.0, 40)[:, None, None]
    between = (1.0 - steps) * pixels[:-1] + steps * pixels[1:]
    return np.concatenate([pixels, between.reshape(-1, 2)])


def _free_place(
    axes: Axes,
    start: Array,
    half: Array,
    point: float,
    lines: Array,
    markers: Array,
    boxes: Sequence[tuple[Array, Array]],
) -> Array | None:
    """The centre beside a point, in pixels, of a text that covers no marker and no other text.

    Of several the one that covers the fewest lines; None if there is no place.
    """
    window = axes.get_window_extent().get_points()
    best, least = None, math.inf
    for gap in (3.0 * point, 6.0 * point):
        for side in ((1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1)):
            centre = start + np.array(side) * (half + gap)
            low, high = centre - half, centre + half
            rim = 2.2 * point
            if (
                (low < window[0]).any()
                or (high > window[1]).any()
                or any(((low < top) & (bottom < high)).all() for bottom, top in boxes)
                or ((markers > low - rim) & (markers < high + rim)).all(axis=1).any()
            ):
                continue
            covered = int(((lines > low) & (lines < high)).all(axis=1).sum())
            if covered < least:
                best, least = centre, covered
    return best


def _darker(color: str) -> tuple[float, ...]:
    """For text on white."""
    return tuple(0.7 * part for part in matplotlib.colors.to_rgb(color))


@_styled
def histogram(rows: Sequence[Row], classes: Sequence[str] | None = None) -> Figure:
    """Shares of the classes, as classified, against the ideal (paper, Fig. 13).

    Parameters
    ----------
    rows : sequence of mapping
        The rows to show, a panel each, for instance those of :func:`weakest_safe`.
    classes : sequence of str, optional
        Names in the order of the histogram; "0", "1", ... if not given.

    Returns
    -------
    Figure
        Bars with exact 95% intervals (Clopper and Pearson 1934), the forbidden classes in another
        colour, and the ideal: none of the forbidden, and the others alike.

    Raises
    ------
    ValueError
        If a row is not one or lacks a histogram, or a forgotten class is none of ``classes``.
    """
    rows = checked(rows)
    for place, row in enumerate(rows):
        if not row["metrics"].get("histogram"):
            raise ValueError(f"rows[{place}] must have a 'histogram' in its 'metrics'")
    columns = min(3, len(rows))
    lines = math.ceil(len(rows) / columns)
    of = {id(row): method for method in methods_of(rows) for row in method.rows}
    several = len(classes_forgotten(rows)) > 1
    size = len(rows[0]["metrics"]["histogram"])
    names = [str(i) for i in range(size)] if classes is None else [str(c) for c in classes]
    if len(names) != size:
        raise ValueError(f"classes must have the {size} names of the histogram, got {names}")
    figure = Figure(figsize=(WIDTH, 1.45 * lines + 0.95), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(rows):
            axes.set_visible(False)
            continue
        row = rows[place]
        _draw_histogram(axes, row, names)
        text = of[id(row)].at(row)
        if several:
            text = f"{_named_class(forgotten_by(row))} forgotten: {text}"
        _title(axes, _letter(place), textwrap.fill(text, 40))
        if place % columns == 0:
            axes.set_ylabel("images (%)")
        if place + columns >= len(rows):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("class, as classified")
    _mark_bases(figure, rows)
    # Above the highest bar there is room for the numbers.
    panels[0, 0].set_ylim(0.0, 1.3 * max(axes.dataLim.y1 for axes in panels.flat))
    figure.legend(
        handles=[
            Line2D([], [], color=BLACK, lw=0.9, label="ideal: uniform without the forbidden"),
            Patch(color=BLUE, alpha=0.6, lw=0, label="remembered class"),
            Patch(color=VERMILLION, lw=0, label="forbidden class"),
            Line2D([], [], color=GREY, lw=0.8, label="95% interval"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def _mark_bases(figure: Figure, rows: Sequence[Row]) -> None:
    """Say above the panels where the base is not good enough for what is shown to mean much."""
    bad = [row for row in rows if base_is_bad(row)]
    if bad:
        some = "all" if len(bad) == len(rows) else f"{len(bad)} of {len(rows)}"
        figure.suptitle(
            "The base network is not good enough to be guided: its unguided images are farther from"
            f"\nthe data than forgetting is.  These numbers mean little ({some} settings).",
            color=VERMILLION,
            size=8,
        )


def _letter(place: int) -> str:
    """a, b, ... z, aa, ..."""
    return ("" if place < 26 else _letter(place // 26 - 1)) + chr(ord("a") + place % 26)


def _draw_histogram(axes: Axes, row: Row, names: Sequence[str]) -> None:
    metrics = row["metrics"]
    share = np.array(metrics["histogram"], dtype=np.float64)
    share = share / share.sum()
    n = metrics["num_images"]
    unknown = [name for name in row["config"]["forget"] if name not in names]
    if unknown:
        raise ValueError(f"classes must name the forgotten {unknown[0]!r}, got {', '.join(names)}")
    forbidden = np.isin(names, row["config"]["forget"])
    ideal = np.where(forbidden, 0.0, 1.0 / max(1, int((~forbidden).sum())))
    intervals = np.array([binomial_interval(round(s * n), n) for s in share])
    place = np.arange(len(names))
    for mask, color, alpha in ((~forbidden, BLUE, 0.6), (forbidden, VERMILLION, 1.0)):
        axes.bar(place[mask], 100.0 * share[mask], 0.7, color=color, alpha=alpha, lw=0)
    axes.vlines(place, *(100.0 * intervals.T), color=GREY, lw=0.9)
    edges = np.arange(len(names) + 1) - 0.5
    axes.stairs(100.0 * ideal, edges, baseline=None, color=BLACK, lw=0.9)
    long = max(map(len, names)) > 2
    axes.set_xticks(place, list(map(plain, names)), rotation=90 if long else 0)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(edges[0], edges[-1])
    lines = [f"{100.0 * metrics['safety']:.2f}% forbidden"]
    kl = measured(row, "kl")
    if kl is not None:
        lines.append("KL infinite" if kl.infinite else f"KL {kl.value:.3f}")
    axes.text(
        0.98, 0.98, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", size=6.5
    )


@_styled
def grid(
    images_by_method: Mapping[str, ArrayLike],
    marks: Mapping[str, ArrayLike] | None = None,
    *,
    negative: bool = False,
) -> Figure:
    """Images of one noise under every method (paper, Figs. 4 and 10).

    Parameters
    ----------
    images_by_method : mapping of str to array_like, shape (n, C, H, W)
        Images in [-1, 1], values outside are clamped; C = 1 or 3.  A row each, under its name, and
        the same seed in a column.
    marks : mapping of str to array_like of bool, shape (n,), optional
        Which images are judged forbidden: they are framed.  A method may be missing.
    negative : bool
        Draw grey images as negatives: digits, which are light on dark, as ink on paper.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError, ValueError
        If there are no images, shapes differ, or a mark is of no row.
    """
    if not images_by_method:
        raise ValueError("images_by_method must hold at least one method, got none")
    rows = {}
    shape: tuple[int | str, ...] = ("n", "C", "H", "W")
    for name, images in images_by_method.items():
        rows[name] = _checks.filled(f"images_by_method[{name!r}]", images, shape)
        shape = rows[name].shape
    sheet = np.array(list(rows.values()))
    if sheet.shape[2] not in (1, 3):
        raise ValueError(f"images_by_method must have 1 or 3 channels, got {sheet.shape[2]}")
    flags = {}
    for name, flag in (marks or {}).items():
        if name not in rows:
            raise ValueError(f"marks must be of {', '.join(rows)}; got {name!r}")
        flags[name] = np.asarray(flag, dtype=bool)
        if flags[name].shape != sheet.shape[1:2]:
            raise ValueError(
                f"marks[{name!r}] must have shape ({sheet.shape[1]},), got {flags[name].shape}"
            )
    count, columns = sheet.shape[:2]
    # Placed by hand: automatic layouts do not see what the fixed aspect does to the texts.
    texts = [
        "\n".join(textwrap.fill(line, 32) for line in drawable(name).split("\n")) for name in rows
    ]
    text_width, text_height = np.max([_text_size(text) for text in texts], axis=0)
    left = text_width + 0.15
    aspect = sheet.shape[3] / sheet.shape[4]
    cell = max(min(0.6, (WIDTH - left - 0.05) / columns), 1.05 * text_height / aspect)
    below = 0.22 if any(flag.any() for flag in flags.values()) else 0.05
    width, height = left + cell * columns + 0.05, 0.05 + cell * aspect * count + below
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (left / width, below / height, cell * columns / width, cell * aspect * count / height)
    )
    gap = _show(axes, sheet, negative)
    for row, (name, text) in enumerate(zip(rows, texts, strict=True)):
        axes.text(-0.1, row + 0.5, text, ha="right", va="center", size=7)
        for column in np.flatnonzero(flags.get(name, ())):
            corner = (column + gap[0] / 4, row + gap[1] / 4)
            size = (1.0 - gap[0] / 2, 1.0 - gap[1] / 2)
            axes.add_patch(Rectangle(corner, *size, fill=False, ec=VERMILLION, lw=1.4))
    if below > 0.1:
        axes.text(
            0.0,
            -0.05 / (cell * aspect * count),
            "framed: judged to be of a forbidden class",
            transform=axes.transAxes,
            size=6.5,
            va="top",
            color=VERMILLION,
        )
    return figure


def _text_size(text: str) -> tuple[float, float]:
    """Width and height, in inches, of the name of a row."""
    figure = Figure()
    box = figure.text(0.0, 0.0, text, size=7).get_window_extent()
    return float(box.width / figure.dpi), float(box.height / figure.dpi)


def _show(axes: Axes, images: Array, negative: bool) -> tuple[float, float]:
    """Rows of images (R, n, C, H, W) in units of an image with its gap; returns the gap's size."""
    negative = negative and images.shape[2] == 1
    rows, columns, channels, height, width = images.shape
    gap = max(1, round(min(height, width) / 16))
    cell = height + 2 * gap, width + 2 * gap
    white = -1.0 if negative else 1.0
    sheet = np.full((rows, cell[0], columns, cell[1], channels), white)
    inner = np.clip(images, -1.0, 1.0).transpose(0, 3, 1, 4, 2)
    sheet[:, gap : gap + height, :, gap : gap + width] = inner
    picture = sheet.reshape(rows * cell[0], columns * cell[1], channels)
    axes.imshow(
        picture[:, :, 0] if channels == 1 else 0.5 * (picture + 1.0),
        cmap="gray_r" if negative else "gray",
        vmin=-1.0,
        vmax=1.0,
        extent=(0.0, columns, rows, 0.0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_axis_off()
    return gap / cell[1], gap / cell[0]


@_styled
def trajectories(
    times: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike,
    log_posterior: ArrayLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    snapshots: int = 12,
    negative: bool = False,
) -> Figure:
    """Images on their way through time, with the guidance scale below them (paper, Fig. 5).

    Parameters
    ----------
    times : array_like, shape (T,)
        Diffusion time t/T in [0, 1], decreasing; at least 2.
    x : array_like, shape (T, n, C, H, W)
        States, or predictions of the clean image, in [-1, 1]; C = 1 or 3.
    scale : array_like, shape (T, n)
        Dynamic scale of each image.
    log_posterior : array_like, shape (T, n), optional
        log p(c | x_t), drawn as a probability.
    labels : sequence of str, optional
        A title for each image.
    snapshots : int
        Images in a strip, each above the time that it was taken at.
    negative : bool
        As for :func:`grid`.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError, ValueError
        If shapes do not agree, times do not decrease or ``snapshots`` is not positive.
    """
    t = _checks.filled("times", times, ("T",))
    if t.size < 2 or not (np.diff(t) < 0.0).all():
        raise ValueError(f"times must decrease over at least 2 steps, got {t.size} from {t[0]:g}")
    images = _checks.filled("x", x, (t.size, "n", "C", "H", "W"))
    n, channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"x must have 1 or 3 channels, got {channels}")
    strength = _checks.array("scale", scale, (t.size, n))
    posterior = None
    if log_posterior is not None:
        posterior = np.exp(_checks.array("log_posterior", log_posterior, (t.size, n)))
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be {n}, one for each image, got {len(labels)}")
    shown = min(_checks.integer("snapshots", snapshots, 1), t.size)
    centres = t[0] + (np.arange(shown) + 0.5) / shown * (t[-1] - t[0])
    taken = np.abs(t[:, None] - centres).argmin(axis=0)

    left, right, above, below, plot, space = 0.6, 0.55, 0.05, 0.42, 0.7, 0.12
    title = 0.0 if labels is None else 0.2
    strip = (WIDTH - left - right) / shown * height / width
    block = title + strip + plot + space
    whole = above + n * block + below
    figure = Figure(figsize=(WIDTH, whole))
    inner = (WIDTH - left - right) / WIDTH
    logarithmic = bool((strength > 0.0).all() and strength.max() > 100.0 * strength.min())
    for i in range(n):
        top = whole - above - i * block - title
        axes = figure.add_axes((left / WIDTH, (top - strip) / whole, inner, strip / whole))
        _show(axes, images[taken, i][None], negative)
        if labels is not None:
            axes.text(0.0, -0.05, drawable(labels[i]), va="bottom", size=7.5)
        lines = figure.add_axes((left / WIDTH, (top - strip - plot) / whole, inner, plot / whole))
        lines.plot(t, strength[:, i], color=GREEN, label="dynamic scale")
        lines.set_ylim(*_limits(strength, logarithmic))
        if logarithmic:
            _logarithmic(lines)
        lines.set_ylabel(r"scale $\lambda$", color=GREEN)
        lines.set_xlim(t[0], t[-1])
        if posterior is not None:
            other = lines.twinx()
            other.spines["right"].set_visible(True)
            other.plot(t, posterior[:, i], color=PURPLE, ls=DASHED, label="posterior")
            other.set_ylim(-0.03, 1.03)
            other.set_ylabel(r"$p(c\mid x_t)$", color=PURPLE)
        if i < n - 1:
            lines.tick_params(labelbottom=False)
        else:
            lines.set_xlabel("diffusion time $t/T$")
    return figure


def _limits(values: Array, logarithmic: bool) -> tuple[float, float]:
    """Of an axis that all the panels share."""
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return low / 1.5, high * 1.5
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return min(low, 0.0) - margin, high + margin


@_styled
def reliability(calibration: Mapping[str, Any]) -> Figure:
    """How far a tracked posterior can be trusted, before and after it was calibrated.

    Parameters
    ----------
    calibration : mapping
        ``times`` (T,), diffusion time; ``after``, and if they are known ``before``, ``prior``, for
        a posterior that stays where it starts, and ``constant``, for a weight that does not vary,
        each with ``log_loss`` and ``brier`` (T,), and if they are known ``log_loss_low``,
        ``log_loss_high``, ``brier_low`` and ``brier_high``; ``reliability``, with ``after`` and
        perhaps ``before``, each with ``confidence``, ``frequency``, ``low``, ``high`` and
        ``count`` (B,), where bins without a count are left out;
        ``profile``, the fitted weight of the evidence, with ``times`` and ``values`` (K,), and if
        they are known ``low`` and ``high``; ``label``, a title, if there is one.

    Returns
    -------
    Figure
        Four panels: reliability diagram, log loss, Brier score, weight.

    Raises
    ------
    ValueError
        If an entry is missing.
    """
    for name in ("times", "after", "reliability", "profile"):
        if name not in calibration:
            raise ValueError(f"calibration must have {name!r}, got {', '.join(calibration)}")
    looks = {
        "prior": ("the prior alone", GREY, DOTTED, "v"),
        "before": ("before calibration", ORANGE, MIXED, "^"),
        "constant": ("calibrated, one weight", SKY, DASHED, "D"),
        "after": ("calibrated", BLUE, SOLID, "s"),
    }
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    panels = figure.subplots(2, 2)
    if calibration.get("label"):
        figure.suptitle(drawable(calibration["label"]))
    axes = panels[0, 0]
    axes.plot([0.0, 1.0], [0.0, 1.0], color=BLACK, lw=0.6, ls=DASHED)
    for name, diagram in calibration["reliability"].items():
        _, color, line, marker = looks[name]
        _draw_reliability(axes, diagram, color, line, marker)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tracked posterior of the class")
    axes.set_ylabel("share that is of the class")
    axes.text(0.98, 0.03, "larger: fuller bins", transform=axes.transAxes, size=6.5, ha="right")
    _title(axes, "a", "reliability")
    times = np.array(calibration["times"], dtype=np.float64)
    for axes, letter, quantity, text in (
        (panels[0, 1], "b", "log_loss", "log loss (nats)"),
        (panels[1, 0], "c", "brier", "Brier score"),
    ):
        drawn = []
        for name, (label, color, line, _) in looks.items():
            losses = calibration.get(name)
            if losses is None or quantity not in losses:
                continue
            values = np.array(losses[quantity], dtype=np.float64)
            drawn.append(values)
            _band(axes, times, losses, quantity, color)
            axes.plot(times, values, color=color, ls=line, label=label)
        every = np.concatenate(drawn)
        if every.min() > 0.0 and every.max() > 30.0 * every.min():
            _logarithmic(axes)
        else:
            axes.set_ylim(bottom=0.0)
        axes.set_ylabel(text)
        _title(axes, letter, text.split(" (")[0] + " through time")
    axes = panels[1, 1]
    profile = calibration["profile"]
    at = np.array(profile["times"], dtype=np.float64)
    axes.axhline(1.0, color=BLACK, lw=0.6, ls=DASHED)
    if "low" in profile and "high" in profile:
        low, high = (np.array(profile[end], dtype=np.float64) for end in ("low", "high"))
        axes.fill_between(at, low, high, color=GREEN, alpha=0.25, lw=0, label="95% interval")
    axes.plot(at, np.array(profile["values"], dtype=np.float64), color=GREEN, label="fitted weight")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_ylabel("weight of the evidence")
    axes.legend(loc="best")
    _title(axes, "d", "fitted weight")
    start, end = max(times.max(), at.max()), min(times.min(), at.min(), 0.0)
    for axes in panels.flat[1:]:
        axes.set_xlim(start, end)
        axes.set_xlabel("diffusion time $t/T$")
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _band(axes: Axes, times: Array, values: Mapping[str, Any], quantity: str, color: str) -> None:
    """The interval of a curve, where it is known."""
    if f"{quantity}_low" in values and f"{quantity}_high" in values:
        low, high = (
            np.array(values[f"{quantity}_{end}"], dtype=np.float64) for end in ("low", "high")
        )
        axes.fill_between(times, low, high, color=color, alpha=0.2, lw=0)


def _draw_reliability(
    axes: Axes, diagram: Mapping[str, Any], color: str, line: Any, marker: str
) -> None:
    """Points with bars, as large as their bin is full."""
    count = np.array(diagram["count"], dtype=np.float64)
    kept = count > 0
    x, y, low, high = (
        np.array(diagram[name], dtype=np.float64)[kept]
        for name in ("confidence", "frequency", "low", "high")
    )
    axes.vlines(x, low, high, color=color, lw=0.6)
    axes.plot(x, y, color=color, ls=line, lw=0.8)
    size = 6.0 + 10.0 * np.log10(count[kept])
    axes.scatter(x, y, s=size, color=color, marker=marker, lw=0, zorder=2.5)


@_styled
def save(figure: Figure, path: Path | str) -> None:
    """Write a figure in the format that the suffix of the path names.

    Parameters
    ----------
    figure : Figure
    path : Path or str
        Its folder is made if it is missing.

    Raises
    ------
    OSError
        If it cannot be written; an older file is as it was.
    ValueError
        If the suffix names no format.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI, format=kind))


def draw_all(
    out: Path | str,
    *,
    classes: Sequence[str] | None = None,
    safety: float = 0.005,
    data: Path | str | None = None,
    calibrations: Path | str | None = None,
) -> list[Path]:
    """Draw everything that a run's folder has the data for.

    Parameters
    ----------
    out : Path or str
        Where ``figures`` and the tables are written.
    classes : sequence of str, optional
        Names in the order of the labels.  If not given, those of the classifier in
        ``networks/classifier``, or else "0", "1", ...; if these are not the forgotten ones there
        is no histogram, and no image is framed.
    safety : float
        Methods are compared at this forbidden share, in (0, 1).
    data : Path or str, optional
        Default: ``out``.  Holds ``sweep.jsonl``, and perhaps ``tuning.jsonl``,
        ``samples/KEY/images.safetensors`` with ``images`` and ``labels``, and
        ``samples/KEY/trajectories.safetensors`` with the arguments of :func:`trajectories`.
    calibrations : Path or str, optional
        A folder of files NAME.json as
        :class:`dng_models.class_removal.calibrate.Calibration` saves them; default:
        ``calibration`` in ``data``.

    Returns
    -------
    list of Path
        What was written: ``figures/*.png``, ``table.md`` and ``table.csv``.

    Raises
    ------
    OSError
        If there is no table, or a file cannot be read or written.
    ValueError
        If a file is damaged, naming it, and in the table the line.
    """
    out = Path(out)
    data = out if data is None else Path(data)
    calibrations = data / "calibration" if calibrations is None else Path(calibrations)
    rows = read_rows(data / "sweep.jsonl")
    written: list[Path] = []

    def keep(stem: str, figure: Figure) -> None:
        written.append(out / "figures" / (re.sub(r"[^\w.-]+", "_", stem) + ".png"))
        save(figure, written[-1])

    keep("curves", curves(rows))
    networks = sorted({row["config"].get("networks", "pair") for row in rows})
    if len(networks) > 1:
        for name in networks:
            keep(f"curves_{name}", curves([r for r in rows if r["config"].get("networks") == name]))
    names = classes if classes is not None else _class_names(data)
    safest = weakest_safe(rows, safety)
    for forget in classes_forgotten(rows):
        chosen = [row for row in safest if forgotten_by(row) == forget]
        counted = all(row["metrics"].get("histogram") for row in chosen)
        if counted and names is None:
            names = [str(i) for i in range(len(chosen[0]["metrics"]["histogram"]))]
        known = names is not None and set(chosen[0]["config"]["forget"]) <= set(names)
        if counted and known:
            keep(f"histogram_{forget}", histogram(chosen, names))
        pictures, marks = _samples(data, chosen, names if known else None)
        if pictures:
            keep(f"grid_{forget}", grid(pictures, marks, negative=all(map(_is_ink, chosen))))
    settings = _setting_names(rows)
    for path in sorted(data.glob("samples/*/trajectories.safetensors")):
        key = path.parent.name
        keep(f"trajectories_{settings.get(key, key)}", _trajectories(path))
    for path in sorted(calibrations.glob("*.json")):
        for tracker, calibration in _calibrations(path).items():
            keep(f"reliability_{path.stem}_{tracker}", reliability(calibration))
    text = comparison(rows, safety)
    if (data / "tuning.jsonl").is_file():
        tuning = tuning_table(read_rows(data / "tuning.jsonl"), safety)
        text += f"\nWhat the settings were chosen from, by other images:\n\n{tuning}"
    text += f"\nEvery row, with 95% intervals:\n\n{table(rows)}"
    tables = {"table.md": text, "table.csv": csv_table(rows)}
    for name, content in tables.items():
        write_text(out / name, content)
    return [*written, *(out / name for name in tables)]


def _setting_names(rows: Sequence[Row]) -> dict[str, str]:
    """Class, method and scale of every row by its key, where no other row has the same."""
    names = {
        str(row.get("key")): f"{forgotten_by(row)}_{method.name}_g-{scale_of(row):g}"
        for method in methods_of(rows)
        for row in method.rows
    }
    return {key: name for key, name in names.items() if list(names.values()).count(name) == 1}


def _trajectories(path: Path) -> Figure:
    tensors = {name: tensor.numpy() for name, tensor in load_tensors(path)[0].items()}
    missing = {"times", "x", "scale"} - tensors.keys()
    if missing:
        raise ValueError(f"{path} must hold {', '.join(sorted(missing))}, got {', '.join(tensors)}")
    config = path.with_name("config.json")
    return trajectories(
        tensors["times"],
        tensors["x"],
        tensors["scale"],
        tensors.get("log_posterior"),
        negative=config.is_file() and _is_ink({"config": read_json(config)}),
    )


def _is_ink(row: Row) -> bool:
    """Whether the images are digits, light on dark; grey photographs are shown as they are."""
    config = row["config"]
    named = config.get("like") or BUILT_IN.get(config.get("dataset", ""))
    return named in ("digits", "mnist")


def _calibrations(path: Path) -> dict[str, dict[str, Any]]:
    """What :func:`reliability` takes, for each tracker of a saved calibration."""
    from dng_models.class_removal.calibrate import Calibration

    saved = Calibration.load(path)
    fits = {name: asdict(each) for name, each in saved.fits.items()}
    return {
        tracker: _calibration(tracker, fits, saved.report)
        | {"label": f"class {plain(unquote(path.stem))}, {tracker} tracker"}
        for tracker in TRACKERS
    }


def _calibration(
    tracker: str, fits: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, Any]:
    fit = fits[tracker]
    others = [name for name in report if name not in fits and name not in ("prior alone", "time")]
    names = {"prior": "prior alone", "constant": f"{tracker}, constant", "after": tracker}
    # Of several settings before, those that are the tracker's own.
    own = [name for name in others if name.startswith(f"{tracker},")]
    for before in own[:1] or others[:1]:
        names["before"] = before
    judged = {role: report[name] for role, name in names.items() if name in report}
    # Beyond its last knot a weight stays as it is.
    weight = {
        "values": [*fit["temperature"], fit["temperature"][-1]],
        "low": [*fit["temperature_low"], fit["temperature_low"][-1]],
        "high": [*fit["temperature_high"], fit["temperature_high"][-1]],
    }
    return {
        **judged,
        "times": report["time"],
        "reliability": {
            role: judged[role]["reliability"] for role in ("before", "after") if role in judged
        },
        "profile": {"times": [*fit["times"], max(report["time"])], **weight},
    }


def _class_names(out: Path) -> list[str] | None:
    """As the run's own classifier has them."""
    path = out / "networks" / "classifier" / "config.json"
    names = foreign.read_object(path).get("classes") if path.is_file() else None
    if names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        return names
    raise ValueError(f"'classes' in {path} must be names, got {foreign.shown(names)}")


def _samples(
    out: Path, rows: Sequence[Row], classes: Sequence[str] | None, columns: int = 16
) -> tuple[dict[str, Array], dict[str, NDArray[np.bool_]]]:
    """The first images of the rows that kept some, and which are forbidden."""
    pictures: dict[str, Array] = {}
    marks: dict[str, NDArray[np.bool_]] = {}
    of = {id(row): method for method in methods_of(rows) for row in method.rows}
    for row in rows:
        path = out / "samples" / str(row.get("key")) / "images.safetensors"
        if not path.is_file():
            continue
        tensors = load_tensors(path)[0]
        if "images" not in tensors:
            raise ValueError(f"{path} must hold 'images', got {', '.join(tensors) or 'nothing'}")
        name = f"{of[id(row)].at(row)}\n{100.0 * row['metrics']['safety']:.2g}% forbidden"
        name += "\nbase not good enough" if base_is_bad(row) else ""
        pictures[name] = np.asarray(tensors["images"], dtype=np.float64)[:columns]
        if classes is not None and "labels" in tensors:
            forbidden = [list(classes).index(each) for each in row["config"]["forget"]]
            marks[name] = np.isin(np.asarray(tensors["labels"])[:columns], forbidden)
    fewest = min(map(len, pictures.values()), default=0)
    return {name: images[:fewest] for name, images in pictures.items()}, {
        name: flags[:fewest] for name, flags in marks.items()
    }
