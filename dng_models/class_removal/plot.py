"""Figures of a sweep, like those of the paper.

Every function takes computed data, mostly rows of the table ``sweep.jsonl``
(:mod:`dng_models.class_removal.compare`), and returns a Matplotlib figure.  :func:`draw_all` reads
a run's folder and writes all figures.

Two values of a row cannot lie on a logarithmic axis, and neither is dropped, since they belong to
the safest and the worst points of a sweep.  A share of 0 in n images is drawn at half an image.  A
divergence that is infinite, because a remembered class is empty, is drawn with half a count added
to every class.  Both are hollow points with an arrow towards the actual value.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from dng_math.distances import binomial_interval
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
    read_tables,
    scale_of,
    table,
    tuning_table,
    weakest_safe,
)
from dng_models.support import extras, foreign, style
from dng_models.support.files import load_tensors, read_json, write_text
from dng_models.support.printable import plain
from dng_models.support.style import (
    BLACK,
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    MIXED,
    ORANGE,
    PURPLE,
    SKY,
    SOLID,
    VERMILLION,
    WIDTH,
    YELLOW,
)

with extras.needed_by("dng_models.class_removal.plot"):
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation
from dng_models.class_removal.plot_pictures import grid, is_ink, trajectories
from dng_models.class_removal.plot_reliability import reliability

__all__ = [
    "at_equal_safety",
    "curves",
    "draw_all",
    "grid",
    "histogram",
    "read_rows",
    "reliability",
    "table",
    "trajectories",
    "weakest_safe",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Look:
    """The colour, line and marker of a method."""

    color: str
    linestyle: Any
    marker: str


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
    ("dng", "path", "own"): _Look(PURPLE, SOLID, "v"),
}
# Looks of methods that have none in LOOKS, in this order.
SPARE = tuple(
    _Look(color, line, marker)
    for line, markers in ((DOTTED, "<>*8hdPX"), (MIXED, "Dps^v<>o"))
    for color, marker in zip(
        (VERMILLION, BLUE, BLACK, GREEN, YELLOW, SKY, PURPLE, ORANGE), markers, strict=True
    )
)
# A conditional network has its method's colour, but another marker.
OTHER_MARKER = dict(zip("v^PXh8d*oDsp<", "><XPH*D8*dh8>", strict=True))

LABELS: dict[Quantity, str] = {
    "kl": r"KL(ideal $\Vert$ class histogram) (nats)",
    "frechet": "Fréchet distance of features",
    "frechet_pixels": "Fréchet distance of pixels",
}


def _look(config: Mapping[str, Any]) -> _Look | None:
    rule = config["rule"]
    key: tuple[str, ...] = (rule,)
    if config.get("negative") == "images":
        key = (rule, "images")
    elif rule == "dng":
        key = (rule, config.get("tracker", "paper"), config.get("hyperparameters", "paper"))
    look = LOOKS.get(key)
    if look is not None and config.get("networks") == "conditional":
        line = look.linestyle if rule == "none" else DASHED
        return replace(look, linestyle=line, marker=OTHER_MARKER[look.marker])
    return look


def _looks(methods: Sequence[Method]) -> dict[str, _Look]:
    """A unique look for each method, by its name."""
    looks: dict[str, _Look] = {}
    for method in methods:
        look = _look(method.rows[0]["config"])
        if look is None or look in looks.values():
            # After all spares the last one repeats; no reader could tell so many apart anyway.
            look = next((spare for spare in SPARE if spare not in looks.values()), SPARE[-1])
        looks[method.name] = look
    return looks


@style.applied
def curves(rows: Sequence[Row]) -> Figure:
    """KL and Frechet distances of all methods against the share of forbidden images.

    There is a row of panels for each forgotten class and a column for each measured distance.
    Lines join the guidance scales of a method in order; bars are the 95% intervals in both
    directions.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of a sweep's table.

    Returns
    -------
    Figure
        Panels of the KL divergence and of the Frechet (1957) distances of the classifier's features
        and of pixels.

    Raises
    ------
    ValueError
        If a row is invalid, there is no row, or no row has any of these distances.
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
        style.title(axes, style.letter(place), f"{_named_class(forget)} forgotten")
    _mark_bases(figure, rows)
    figure.legend(
        *_legend_of_curves(looks, panels.flat),
        loc="outside lower center",
        ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.1)},
    )
    # Scales are labelled where there is room, so the layout must be computed first and then fixed.
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


def _percent_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Make a logarithmic x axis in percent; the tick at half an image, drawn for none, says 0."""
    shares = [forbidden_share(row) for row in rows]
    # A bar that ends near 0 would stretch the axis, so the axis cuts it off.
    low = 90.0 * min(max(share.low, 0.5 * share.value) for share in shares)
    high = min(100.0, 115.0 * max(share.high for share in shares))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    apart = 0.1 * math.log10(high / low)  # closer than this labels would touch
    ticks = {100.0 * forbidden_share(row).value: "0" for row in rows if none_forbidden(row)}
    least = max([low, *ticks])  # nothing is less than 0
    usual = [float(f"{m}e{power}") for m in (1, 5, 2) for power in range(-4, 3)]
    for some in (usual, style.ticks_between(low, high)):
        for tick in some:
            room = all(abs(math.log10(tick / other)) > apart for other in ticks)
            if least <= tick <= high and room:
                ticks[tick] = f"{tick:g}"
        if len(ticks) >= style.FEWEST:
            break
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)


def _distance_axis(axes: Axes, numbers: Sequence[Measured]) -> None:
    """Make a logarithmic y axis for the values; bars that end near 0 do not stretch it."""
    low = min(max(number.low, 0.5 * number.value) for number in numbers)
    high = max(min(number.high, 2.0 * number.value) for number in numbers)
    axes.set_yscale("log")
    style.log_ticks(axes.yaxis)
    axes.set_ylim(0.8 * low, 1.3 * high)


def _draw_chance(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the mean KL of as many ideal images, since 2 n KL is chi-squared (Wilks 1938).

    Nothing is drawn if the rows differ in the number of images or of classes.
    """
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
    """Draw the line, bars and points of a method; values off the axis get hollow points."""
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
    """Handles and labels of the legend: the methods, and the special marks that are drawn."""
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
    """Write the scale beside the first and the last point of each method, where there is room."""
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
    """Where to centre a text beside a point, in pixels, so that it covers no marker or other text.

    Of several places the one that covers the least of the lines; None if there is no place.
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
    """A darker shade of a colour, readable as text on white."""
    return tuple(0.7 * part for part in to_rgb(color))


@style.applied
def histogram(rows: Sequence[Row], classes: Sequence[str] | None = None) -> Figure:
    """Shares of the predicted classes against the ideal (paper, Fig. 13).

    Parameters
    ----------
    rows : sequence of mapping
        Rows to show, one panel each, for instance those of :func:`weakest_safe`.
    classes : sequence of str, optional
        Names in the order of the histogram; "0", "1", ... if not given.

    Returns
    -------
    Figure
        Bars with exact 95% intervals (Clopper and Pearson 1934), the forbidden classes in another
        colour, and the ideal: no image of a forbidden class, equal shares of the others.

    Raises
    ------
    ValueError
        If a row is invalid or lacks a histogram, ``classes`` is not as long as the histogram, or a
        forgotten class is not in ``classes``.
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
        style.title(axes, style.letter(place), textwrap.fill(text, 40))
        if place % columns == 0:
            axes.set_ylabel("images (%)")
        if place + columns >= len(rows):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("class, as classified")
    _mark_bases(figure, rows)
    # Leave room above the highest bar for the numbers.
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
    """Write a warning above the panels if the base of some rows is not good enough."""
    bad = [row for row in rows if base_is_bad(row)]
    if bad:
        some = "all" if len(bad) == len(rows) else f"{len(bad)} of {len(rows)}"
        figure.suptitle(
            "The base network is not good enough to be guided: its unguided images are farther from"
            f"\nthe data than forgetting is.  These numbers mean little ({some} settings).",
            color=VERMILLION,
            size=8,
        )


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


def draw_all(
    out: Path | str,
    *,
    classes: Sequence[str] | None = None,
    safety: float = 0.005,
    data: Path | str | Sequence[Path | str] | None = None,
    calibrations: Path | str | None = None,
) -> list[Path]:
    """Draw all figures and tables for which a run's folder has the data.

    Parameters
    ----------
    out : Path or str
        Folder where ``figures`` and the tables are written.
    classes : sequence of str, optional
        Names in the order of the labels.  If not given, those of the classifier in
        ``networks/classifier``, or else "0", "1", ...  If a forgotten class is not among them,
        there is no histogram and no image is framed.
    safety : float
        Forbidden share at which the methods are compared, in (0, 1).
    data : Path or str, or a sequence of them, optional
        Folder with ``sweep.jsonl``, and optionally ``tuning.jsonl``,
        ``samples/KEY/images.safetensors`` with ``images`` and ``labels``, and
        ``samples/KEY/trajectories.safetensors`` with the arguments of :func:`trajectories`;
        default: ``out``.  Several are drawn as one run.
    calibrations : Path or str, optional
        Folder of files NAME.json as
        :class:`dng_models.class_removal.calibration.Calibration` saves them; default:
        ``calibration`` in the first of ``data``.

    Returns
    -------
    list of Path
        The written files: ``figures/*.png``, ``table.md`` and ``table.csv``.

    Raises
    ------
    OSError
        If there is no table, or a file cannot be read or written.
    ValueError
        If a file is damaged; the message names it, and the line of a table.
    """
    out = Path(out)
    data = out if data is None else data
    folders = [Path(data)] if isinstance(data, Path | str) else [Path(each) for each in data]
    if not folders:
        raise ValueError("data must name at least one folder, got none")
    calibrations = folders[0] / "calibration" if calibrations is None else Path(calibrations)
    rows = read_tables(folders, "sweep.jsonl")
    written: list[Path] = []

    def keep(stem: str, figure: Figure) -> None:
        written.append(out / "figures" / (re.sub(r"[^\w.-]+", "_", stem) + ".png"))
        style.save(figure, written[-1])

    keep("curves", curves(rows))
    networks = sorted({row["config"].get("networks", "pair") for row in rows})
    if len(networks) > 1:
        for name in networks:
            keep(f"curves_{name}", curves([r for r in rows if r["config"].get("networks") == name]))
    names = classes
    for folder in folders if classes is None else ():
        names = _class_names(folder) if names is None else names
    safest = weakest_safe(rows, safety)
    for forget in classes_forgotten(rows):
        chosen = [row for row in safest if forgotten_by(row) == forget]
        counted = all(row["metrics"].get("histogram") for row in chosen)
        if counted and names is None:
            names = [str(i) for i in range(len(chosen[0]["metrics"]["histogram"]))]
        known = names is not None and set(chosen[0]["config"]["forget"]) <= set(names)
        if counted and known:
            keep(f"histogram_{forget}", histogram(chosen, names))
        pictures, marks = _samples(folders, chosen, names if known else None)
        if pictures:
            keep(f"grid_{forget}", grid(pictures, marks, negative=all(map(is_ink, chosen))))
    settings = _setting_names(rows)
    for path in sorted(
        path for each in folders for path in each.glob("samples/*/trajectories.safetensors")
    ):
        key = path.parent.name
        keep(f"trajectories_{settings.get(key, key)}", _trajectories(path))
    for path in sorted(calibrations.glob("*.json")):
        for tracker, calibration in _calibrations(path).items():
            keep(f"reliability_{path.stem}_{tracker}", reliability(calibration))
    text = comparison(rows, safety)
    tuned = [each for each in folders if (each / "tuning.jsonl").is_file()]
    if tuned:
        tuning = tuning_table(read_tables(tuned, "tuning.jsonl"), safety)
        text += f"\nWhat the settings were chosen from, by other images:\n\n{tuning}"
    text += f"\nEvery row, with 95% intervals:\n\n{table(rows)}"
    tables = {"table.md": text, "table.csv": csv_table(rows)}
    for name, content in tables.items():
        write_text(out / name, content)
    return [*written, *(out / name for name in tables)]


def _setting_names(rows: Sequence[Row]) -> dict[str, str]:
    """A name from class, method and scale by the key of each row, if no other row shares it."""
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
        negative=config.is_file() and is_ink({"config": read_json(config)}),
    )


def _calibrations(path: Path) -> dict[str, dict[str, Any]]:
    """The argument of :func:`reliability` for each tracker of a saved calibration."""
    from dng_models.class_removal.calibration import Calibration

    saved = Calibration.load(path)
    fits = {name: asdict(each) for name, each in saved.fits.items()}
    return {
        tracker: _calibration(tracker, fits, saved.report)
        | {"label": f"class {plain(unquote(path.stem))}, {tracker} tracker"}
        for tracker in saved.kinds
    }


def _calibration(
    tracker: str, fits: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, Any]:
    fit = fits[tracker]
    others = [name for name in report if name not in fits and name not in ("prior alone", "time")]
    names = {"prior": "prior alone", "constant": f"{tracker}, constant", "after": tracker}
    # If there are several uncalibrated settings, prefer the tracker's own.
    own = [name for name in others if name.startswith(f"{tracker},")]
    for before in own[:1] or others[:1]:
        names["before"] = before
    judged = {role: report[name] for role, name in names.items() if name in report}
    # The weight is constant beyond its last knot.
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
    """The class names of the run's own classifier, or None if it has none."""
    path = out / "networks" / "classifier" / "config.json"
    names = foreign.read_object(path).get("classes") if path.is_file() else None
    if names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        return names
    raise ValueError(f"'classes' in {path} must be names, got {foreign.shown(names)}")


def _samples(
    folders: Sequence[Path],
    rows: Sequence[Row],
    classes: Sequence[str] | None,
    columns: int = 16,
) -> tuple[dict[str, Array], dict[str, NDArray[np.bool_]]]:
    """The first images of the rows that kept some, and masks of those judged forbidden."""
    pictures: dict[str, Array] = {}
    marks: dict[str, NDArray[np.bool_]] = {}
    of = {id(row): method for method in methods_of(rows) for row in method.rows}
    for row in rows:
        kept = Path("samples", str(row.get("key")), "images.safetensors")
        path = next((each / kept for each in folders if (each / kept).is_file()), None)
        if path is None:
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
