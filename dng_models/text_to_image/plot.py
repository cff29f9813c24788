"""Results of a run in figures like the paper's.

Every function takes records, the lines of ``images.jsonl``, and returns a Matplotlib figure;
:func:`draw_all` reads a run's folder and writes all figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dng_math import checks
from dng_models.support import extras, style
from dng_models.support.printable import plain
from dng_models.support.style import (
    BLACK,
    BLUE,
    BROWN,
    DASHED,
    GREEN,
    GREY,
    INDIGO,
    OLIVE,
    ORANGE,
    PURPLE,
    SKY,
    TEAL,
    VERMILLION,
    WIDTH,
    WINE,
    YELLOW,
)
from dng_models.text_to_image import compare, store
from dng_models.text_to_image.compare import FEW_RULES, PAPER_Q, Cell, Record, Summary
from dng_models.text_to_image.config import IDEAL, KINDS, METHODS, UNGUIDED
from dng_models.text_to_image.prompts import file_name, split
from dng_models.text_to_image.store import RunFolder

with extras.needed_by("dng_models.text_to_image.plot"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

Array = NDArray[np.float64]
AGAIN = f"'{store.COMMAND} generate', with the options that it was drawn with, draws it again"
THUMBNAIL = 160  # pixels of an image's longer side in a grid
# With more than a few rules, figures of images show the most important, or each at one scale.
MAIN_RULES = ("np", "dng", IDEAL)


@dataclass(frozen=True)
class _Look:
    """The colour and marker of a rule."""

    color: str
    marker: str


LOOKS: dict[str, _Look] = {
    "np": _Look(ORANGE, "^"),
    "dng": _Look(GREEN, "o"),
    "dng-empty": _Look(SKY, "v"),
    "dng-bare": _Look(WINE, "X"),
    "dng-log-odds": _Look(BLUE, "s"),
    "dng-path": _Look(YELLOW, "p"),
    "sld": _Look(PURPLE, "P"),
    "sld-weak": _Look(PURPLE, "$w$"),
    "sld-medium": _Look(PURPLE, "$m$"),
    "sld-strong": _Look(PURPLE, "$s$"),
    "sld-max": _Look(PURPLE, "$x$"),
    "perp-neg": _Look(GREY, "D"),
    "ccfg": _Look(VERMILLION, "<"),
    "ccfg-published": _Look(VERMILLION, "8"),
    "geoguide": _Look(INDIGO, "X"),
    "crg": _Look(TEAL, "p"),
    "ask": _Look(INDIGO, "h"),
    "nag": _Look(TEAL, ">"),
    "nag-gated": _Look(OLIVE, "d"),
    "vsf": _Look(BROWN, "H"),
    IDEAL: _Look(BLACK, "*"),
}
KIND_COLORS = {"related": VERMILLION, "unrelated": BLUE}


def _panels(figure: Figure, count: int, columns: int = 3) -> list[Axes]:
    """Axes in rows; surplus ones in the last row are removed."""
    columns = min(columns, count)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def _height(count: int, each: float, columns: int = 3) -> float:
    return each * math.ceil(count / min(columns, count))


# ---------------------------------------------------------------------- similarities


@style.applied
def similarities(records: Sequence[Record]) -> Figure:
    """Similarity to the unguided image, unrelated against related negative (paper, Fig. 6).

    A panel for each prompt shows the points of every rule, larger for larger scales, with standard
    errors and the fitted line.  The last panel shows Q with 95% intervals, and the averages that
    the paper prints; with one scale, which defines no line, it shows the mean gap instead.

    Parameters
    ----------
    records : sequence of mapping
        Measured images.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As :func:`dng_models.text_to_image.compare.summaries`.
    """
    found = compare.summaries(records)
    cells = compare.cells(records)
    prompts = list(dict.fromkeys(each.prompt for each in found))
    rules = [rule for rule in METHODS if any(each.rule == rule for each in found)]
    few = len(rules) <= FEW_RULES
    each = 2.62 + 0.15 * len(rules) if few else 2.3
    count = len(prompts) + 1
    figure = Figure(figsize=(WIDTH, 0.55 + _height(count, each)), layout="constrained")
    panels = _panels(figure, count)
    for place, prompt in enumerate(prompts):
        of = [one for one in found if one.prompt == prompt]
        _draw_similarities(panels[place], of, cells)
        legend = panels[place].get_legend()
        if legend is not None and not few:
            legend.remove()  # Q is in the last panel
        style.title(panels[place], style.letter(place), plain(prompt))
    lines = any(math.isfinite(one.selectivity.q.value) for one in found)
    judged = compare.by_the_judge(records)
    _draw_q(panels[-1], found, prompts, rules, "q" if lines else "gap", judged)
    style.title(
        panels[-1],
        style.letter(len(prompts)),
        "Q (Eq. 23)" if lines else "one scale: no line, no Q",
    )
    handles = [*_rule_handles(rules), *_similarity_handles()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


@style.applied
def similarity(records: Sequence[Record], prompt: str) -> Figure:
    """The panel of one prompt in :func:`similarities` as a figure (paper, Fig. 6a).

    Parameters
    ----------
    records : sequence of mapping
        Measured images.
    prompt : str
        Name of the prompt.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If the prompt has no images with both negatives, or as for :func:`similarities`.
    """
    found = [one for one in compare.summaries(records) if one.prompt == prompt]
    if not found:
        raise ValueError(f"there are no images of {prompt!r} with both of its negatives")
    rules = [one.rule for one in found]
    figure = Figure(figsize=(3.8, 4.1 + 0.1 * len(rules)), layout="constrained")
    axes = figure.subplots()
    _draw_similarities(axes, found, compare.cells(records))
    figure.suptitle(plain(prompt))
    # One legend for all: each rule's Q replaces its plain label.
    _, labels = axes.get_legend_handles_labels()
    legend = axes.get_legend()
    assert legend is not None
    legend.remove()
    handles = [*_rule_handles(rules), *_similarity_handles()]
    labels += [handle.get_label() for handle in handles[len(rules) :]]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _rule_handles(rules: Sequence[str]) -> list[Any]:
    return [
        Line2D([], [], color=LOOKS[r].color, marker=LOOKS[r].marker, ls="-", label=METHODS[r].label)
        for r in rules
    ]


def _similarity_handles() -> list[Any]:
    return [
        Line2D([], [], color=BLACK, marker="*", ls="none", ms=7, label="unguided"),
        Line2D([], [], color=GREY, ls=DASHED, lw=0.8, label="changed equally by both"),
        Line2D([], [], ls="none", label="larger points: larger scales"),
    ]


def _draw_similarities(axes: Axes, found: Sequence[Summary], cells: Sequence[Cell]) -> None:
    """Draw the panel of a prompt."""
    low = 1.0
    for one in found:
        look, result = LOOKS[one.rule], one.selectivity
        x, y = result.related, result.unrelated
        errors = [_standard_errors(one, cells, kind) for kind in KINDS]
        axes.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=look.color, elinewidth=0.6
        )
        sizes = np.linspace(10.0, 34.0, len(x))
        known = math.isfinite(result.q.value)
        said = f"Q = {compare.fixed(result.q.value, 3)}" if known else "no line, no Q"
        label = f"{METHODS[one.rule].label}: {said}"
        axes.scatter(x, y, s=sizes, color=look.color, marker=look.marker, lw=0, zorder=3)
        ends = np.array([x.min(), x.max()])
        if math.isfinite(result.slope):
            fitted = result.intercept + result.slope * ends
            axes.plot(ends, fitted, color=look.color, label=label)
            low = min(low, float(fitted.min()))
        else:
            axes.plot([], [], color=look.color, marker=look.marker, ls="none", label=label)
        low = min(low, float((x - errors[0]).min()), float((y - errors[1]).min()))
    margin = 0.06 * (1.0 - low) or 1e-3
    axes.plot([low, 1.0], [low, 1.0], color=GREY, ls=DASHED, lw=0.8, zorder=1)
    axes.plot(1.0, 1.0, "*", color=BLACK, ms=7, zorder=4, clip_on=False)
    axes.set_xlim(low - margin, 1.0 + margin)
    axes.set_ylim(low - margin, 1.0 + margin)
    axes.set_box_aspect(1.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    axes.ticklabel_format(useOffset=False)
    axes.set_xlabel("related negative: similarity")
    axes.set_ylabel("unrelated negative: similarity")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.24), handlelength=1.2)


def _standard_errors(found: Summary, cells: Sequence[Cell], kind: str) -> Array:
    """Standard error of the mean similarity at each scale; 0 for a single image."""
    errors = []
    for scale in found.scales:
        (cell,) = (
            c
            for c in cells
            if (c.prompt, c.rule, c.kind, c.guidance_scale)
            == (found.prompt, found.rule, kind, scale)
        )
        cosines = cell.cosines()
        single = len(cosines) < 2
        errors.append(0.0 if single else float(np.std(cosines, ddof=1)) / math.sqrt(len(cosines)))
    return np.array(errors)


def _draw_q(
    axes: Axes,
    found: Sequence[Summary],
    prompts: Sequence[str],
    rules: Sequence[str],
    name: str,
    judged: bool,
) -> None:
    """Draw Q or the mean gap of every rule: a row for each prompt and one for the average."""
    names = [*prompts, "average"]
    offsets = np.linspace(-0.22, 0.22, len(rules)) if len(rules) > 1 else np.zeros(1)
    for rule, offset in zip(rules, offsets, strict=True):
        look = LOOKS[rule]
        each = {one.prompt: getattr(one.selectivity, name) for one in found if one.rule == rule}
        of = {prompt: value for prompt, value in each.items() if math.isfinite(value.value)}
        for prompt, value in of.items():
            row = names.index(prompt) + offset
            axes.plot([value.low, value.high], [row, row], color=look.color, lw=0.8)
            axes.plot(value.value, row, look.marker, color=look.color)
        row = len(prompts) + offset
        if of:
            average = float(np.mean([value.value for value in of.values()]))
            axes.plot(average, row, look.marker, color=look.color, ms=6)
        paper = PAPER_Q.get(rule) if name == "q" and not judged else None
        if paper is not None:
            axes.plot(
                paper[0], row, look.marker, mfc="none", mec=look.color, ms=6, gid=f"paper-{rule}"
            )
    axes.axvline(0.0, color=GREY, ls=DASHED, lw=0.8, zorder=0)
    axes.axhline(len(prompts) - 0.5, color=GREY, lw=0.5)
    axes.set_yticks(range(len(names)), [textwrap.fill(plain(each), 12) for each in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("Q" if name == "q" else "mean gap: unrelated minus related")
    if name == "q" and not judged and any(rule in PAPER_Q for rule in rules):
        axes.text(
            1.0, -0.32, "hollow: average in the paper", transform=axes.transAxes, size=6.5,
            ha="right", va="top",
        )  # fmt: skip


# ---------------------------------------------------------------------- scales over time


@style.applied
def scales(records: Sequence[Record], rule: str) -> Figure:
    """The scale of a dynamic rule over time, at its largest guidance scale (paper, Fig. 12).

    For both negatives of each prompt, a thin line for each image and a thick one for the median.

    Parameters
    ----------
    records : sequence of mapping
        Drawn images.
    rule : str
        A name of :data:`dng_models.text_to_image.config.METHODS`.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there are no images of the rule.
    """
    cells = [cell for cell in compare.cells(records) if cell.rule == rule]
    if not cells:
        raise ValueError(f"there are no images of rule {rule!r}")
    prompts = list(dict.fromkeys(cell.prompt for cell in cells))
    figure = Figure(figsize=(WIDTH, 0.35 + _height(len(prompts), 2.0)), layout="constrained")
    panels = _panels(figure, len(prompts))
    largest = {p: max(cell.guidance_scale for cell in cells if cell.prompt == p) for p in prompts}
    shown = [cell for cell in cells if cell.guidance_scale == largest[cell.prompt]]
    values = np.concatenate([_trace(record, "scale") for c in shown for record in c.records])
    values = values[np.isfinite(values)]
    logarithmic = bool(values.size and 0.0 < 30.0 * values.min() < values.max())
    for place, (axes, prompt) in enumerate(zip(panels, prompts, strict=True)):
        for kind in KINDS:
            for cell in shown:
                if (cell.prompt, cell.kind) == (prompt, kind):
                    _draw_scales(axes, cell, KIND_COLORS[kind])
        if logarithmic:
            style.log_axis(axes.yaxis, values.min() / 1.3, values.max() * 1.3)
        _time_axis(axes)
        axes.set_ylabel(r"scale $\lambda$")
        style.title(axes, style.letter(place), f"{plain(prompt)}, $g={largest[prompt]:g}$")
    handles: list[Any] = [
        Line2D([], [], color=KIND_COLORS[kind], lw=1.6, label=f"{kind} negative") for kind in KINDS
    ]
    handles.append(Line2D([], [], color=GREY, lw=0.6, alpha=0.6, label="one image"))
    handles.append(Line2D([], [], color=GREY, lw=1.6, label="median"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{METHODS[rule].label}: guidance scale over time")
    return figure


def _trace(record: Record, name: str) -> Array:
    """A trace of a record as an array; NaN for missing values."""
    return np.array([math.nan if value is None else value for value in record[name]])


def _draw_scales(axes: Axes, cell: Cell, color: str) -> None:
    lines = np.array([_trace(record, "scale") for record in cell.records])
    time = np.array(cell.records[0]["time"])
    axes.plot(time, lines.T, color=color, lw=0.5, alpha=0.35)
    axes.plot(time, np.median(lines, axis=0), color=color, lw=1.6)


def _time_axis(axes: Axes) -> None:
    axes.set_xlim(1.02, -0.02)
    axes.set_xlabel("diffusion time (noise left)")


# ---------------------------------------------------------------------- ways through time


@style.applied
def trajectories(records: Sequence[Record], prompt: str, root: Path | str) -> Figure:
    """One image of a prompt along its runs, with scales and posteriors (paper, Fig. 5).

    Each row shows decoded latents: unguided, then each rule and negative at its largest scale, and
    whether the detector finds the related negative in the result; of more than three rules, NP, DNG
    and the ideal.  Below are the scales and the
    tracked posteriors.  The image is the first followed one in which the related negative is found
    without guidance, or else the first followed one.

    Parameters
    ----------
    records : sequence of mapping
        Drawn images.
    prompt : str
        Name of the prompt.
    root : Path or str
        Folder of the run, in which the files of the records are.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If no image of that prompt was followed, or a file is damaged.
    FileNotFoundError
        If a file is missing.
    """
    chosen = _followed(records, prompt)
    if not chosen:
        raise ValueError(f"there is no image of {prompt!r} that was followed through time")
    related = _concepts(records, prompt, "related")
    strips = [_apart(_read(Path(root) / r["path"]["file"]), len(r["path"]["time"])) for r in chosen]
    count = max(len(record["path"]["time"]) for record in chosen)
    guided = [record for record in chosen if record["rule"] not in (UNGUIDED, IDEAL)]
    tracked = [record for record in guided if record["log_posterior"] is not None]
    lines = (1 if guided else 0) + (1 if tracked else 0)
    left, right, top, plot = 1.35, 0.1, 0.42, 1.15
    columns = min(4, max(len(guided), 1))
    below = 0.55 + 0.17 * math.ceil(len(guided) / columns)
    strip = (WIDTH - left - right) / count * strips[0].shape[0] * count / strips[0].shape[1]
    height = top + len(chosen) * (strip + 0.05) + 0.15 + lines * (plot + 0.12) + below
    figure = Figure(figsize=(WIDTH, height))
    inner = (WIDTH - left - right) / WIDTH
    at = height - top
    figure.text(0.1 / WIDTH, 1.0 - 0.08 / height, plain(prompt), size=9, va="top", weight="bold")
    told = f"decoded latents, seed {chosen[0]['seed']}"
    if _whether_found(chosen[0], related):
        told += f"; found: {plain(', '.join(related))} in the image"
    figure.text(1.0 - right / WIDTH, 1.0 - 0.08 / height, told, size=7.5, va="top", ha="right")
    for row, (record, pixels) in enumerate(zip(chosen, strips, strict=True)):
        at -= strip + 0.05
        axes = figure.add_axes((left / WIDTH, at / height, inner, strip / height))
        axes.imshow(pixels, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        axes.text(
            -0.01, 0.5, f"{_name(record)}{_whether_found(record, related)}",
            transform=axes.transAxes, ha="right", va="center", size=7,
        )  # fmt: skip
        if row == 0:
            times = record["path"]["time"]
            for place, time in enumerate(times):
                x = (place + 0.5) / len(times)
                label = f"{time:.2f}" if time > 0 else "image"
                axes.text(x, 1.03, label, transform=axes.transAxes, ha="center", size=6.5)
            axes.text(-0.01, 1.03, "diffusion time", transform=axes.transAxes, ha="right", size=6.5)
    at -= 0.15
    for quantity, shown in (("scale", guided), ("log_posterior", tracked)):
        if not shown:
            continue
        at -= plot + 0.12
        axes = figure.add_axes((left / WIDTH, at / height, inner, plot / height))
        values = np.concatenate([_draw_way(axes, record, quantity) for record in shown])
        values = values[np.isfinite(values) & (values > 0.0)]
        if values.size:
            top = 1.0 if quantity == "log_posterior" else np.inf
            style.log_axis(
                axes.yaxis, values.min() / 1.3, max(min(1.3 * values.max(), top), values.max())
            )
        axes.set_xlim(1.02, -0.02)
        last = quantity == "log_posterior" or not tracked
        axes.tick_params(labelbottom=last)
        axes.set_ylabel(r"scale $\lambda$" if quantity == "scale" else r"posterior $p(c\mid x)$")
        if last:
            axes.set_xlabel("diffusion time (noise left)")
    handles = [
        Line2D([], [], **_way_look(record), label=_name(record).replace("\n", " "))
        for record in guided
    ]
    figure.legend(handles=handles, loc="lower center", ncols=columns)
    return figure


def _followed(records: Sequence[Record], prompt: str) -> list[Record]:
    """Records of the followed image: unguided, then each rule and negative at the largest scale."""
    of = [record for record in records if record["prompt"] == prompt and "path" in record]
    images = sorted({record["image"] for record in of})
    forbidden = compare.would_be_forbidden(of, prompt, _concepts(records, prompt, "related"))
    of = [record for record in of if record["image"] in [*forbidden, *images][:1]]
    chosen = [record for record in of if record["rule"] == UNGUIDED]
    rules = [rule for rule in METHODS if any(record["rule"] == rule for record in of)]
    if len(rules) > FEW_RULES:
        main = [rule for rule in rules if rule in MAIN_RULES]
        rules = main or rules[:FEW_RULES]
    for rule in rules:
        for kind in KINDS:
            each = [record for record in of if (record["rule"], record["kind"]) == (rule, kind)]
            if each:
                chosen.append(max(each, key=lambda record: float(record["guidance_scale"])))
    return chosen


def _concepts(records: Sequence[Record], prompt: str, kind: str) -> tuple[str, ...]:
    """Concepts of a prompt's negative; empty if there is no image with it."""
    of = [r["negative"] for r in records if (r["prompt"], r["kind"]) == (prompt, kind)]
    return split(of[0]) if of else ()


def _whether_found(record: Record, concepts: Sequence[str]) -> str:
    """The detector's result for an image as a line of text; empty if no detector was run."""
    found = compare.any_found(record, concepts)
    return "" if found is None else "\nfound" if found else "\nnot found"


def _name(record: Record) -> str:
    if record["rule"] == UNGUIDED:
        return "unguided"
    return f"{_method(record['rule'], record['guidance_scale'])}\n{record['kind']}"


def _method(rule: str, scale: float) -> str:
    """Name of a rule with its scale."""
    label = METHODS[rule].label
    return label if rule == IDEAL else f"{label}, $g={scale:g}$"


def _way_look(record: Record) -> dict[str, Any]:
    return {
        "color": LOOKS[record["rule"]].color,
        "ls": "-" if record["kind"] == "related" else DASHED,
    }


def _draw_way(axes: Axes, record: Record, quantity: str) -> Array:
    """Draw a record's scale, or each concept's posterior, over time; return the values."""
    time = np.array(record["time"])
    if quantity == "scale":
        lines = [np.abs(_trace(record, "scale"))]
    else:
        rows = record["log_posterior"]
        rows = rows if isinstance(rows[0], list) else [rows]
        lines = [np.exp(_trace({"row": row}, "row")) for row in rows]
    for line in lines:
        axes.plot(time, line, **_way_look(record))
    return np.concatenate(lines)


def _apart(strip: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Insert a white gap after each of the images of a strip."""
    images = np.split(strip, count, axis=1)
    height, width, channels = images[0].shape
    gap = np.full((height, max(1, width // 32), channels), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)], axis=1)


def _read(path: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise FileNotFoundError(f"the image {path} is gone: {AGAIN}")
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow raises for a damaged PNG
        raise ValueError(f"the image {path} is damaged ({error}): {AGAIN}") from None


# ---------------------------------------------------------------------- images


@style.applied
def grid(
    records: Sequence[Record], prompt: str, kind: str, root: Path | str, *, columns: int = 6
) -> Figure:
    """Images of the same seeds under every rule and scale (paper, Figs. 16-23).

    Seeds whose unguided image contains the negative, by the detector, are marked; if there are
    any, at least one of them is shown.  More than three rules are shown at their largest scales.
    Where the laboratory's judge looked, a frame says what it saw.

    Parameters
    ----------
    records : sequence of mapping
        Drawn images.
    prompt : str
        Name of the prompt.
    kind : {"related", "unrelated"}
        Which negative.
    root : Path or str
        Folder of the run, in which the files of the records are.
    columns : int
        Images in a row, at least 1.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there are no images of that prompt and negative, no seed has all of them, or a file is
        damaged.
    FileNotFoundError
        If an image is missing.
    """
    checks.choice("kind", kind, KINDS)
    columns = checks.integer("columns", columns, 1)
    cells = [cell for cell in compare.cells(records) if cell.prompt == prompt]
    rows = [cell for cell in cells if cell.rule == UNGUIDED]
    for rule in METHODS:
        of = [cell for cell in cells if (cell.rule, cell.kind) == (rule, kind)]
        rows += sorted(of, key=lambda cell: cell.guidance_scale)
    if len({cell.rule for cell in rows}) > 1 + FEW_RULES:
        last = {cell.rule: cell.guidance_scale for cell in rows}
        rows = [cell for cell in rows if cell.guidance_scale == last[cell.rule]]
    if not any(cell.kind == kind for cell in rows):
        raise ValueError(f"there are no images of {prompt!r} with its {kind} negative")
    every = sorted(set(rows[0].images).intersection(*(cell.images for cell in rows)))
    found = compare.would_be_forbidden(records, prompt, _concepts(records, prompt, kind))
    images = every[:columns]
    others = [image for image in every if image in found]
    if others and not set(images) & set(others):
        images[-1] = others[0]
    if not images:
        raise ValueError(f"no image of {prompt!r} was drawn under every rule and scale")
    files = [[_file(cell, image) for image in images] for cell in rows]
    pictures = [[_thumbnail(Path(root) / name) for name in row] for row in files]
    tall, wide = pictures[0][0].shape[:2]
    judged = all(record.get("seen") for cell in rows for record in cell.records)
    concepts = _concepts(records, prompt, kind)
    left, top, gap = 1.15, 0.62, 0.05 if judged else 0.03
    size = min(1.0, (WIDTH - left - 0.1) / len(images) - gap)
    cell_height = size * tall / wide
    width = left + len(images) * (size + gap) + 0.1
    # The text above needs this width even if there are few images.
    width = max(width, 4.2)
    height = top + len(rows) * (cell_height + gap) + 0.05
    figure = Figure(figsize=(width, height))
    negative = next(cell.records[0]["negative"] for cell in rows if cell.kind == kind)
    figure.text(0.1 / width, 1.0 - 0.08 / height, plain(prompt), size=9, va="top", weight="bold")
    figure.text(
        0.1 / width,
        1.0 - 0.26 / height,
        f"{kind} negative: {plain(negative)}"
        + (" (found: in the unguided image)" if found else ""),
        size=7.5,
        va="top",
        color=KIND_COLORS[kind],
    )
    if judged:
        for x, color, label in (
            (0.62, VERMILLION, "frame: still there"),
            (0.62, BLUE, "frame: something else changed, or is no object"),
        ):
            y = 1.0 - (0.08 if color == VERMILLION else 0.26) / height
            figure.text(x, y, label, size=7, va="top", color=color)
    for row, cell in enumerate(rows):
        bottom = height - top - (row + 1) * (cell_height + gap)
        for column, picture in enumerate(pictures[row]):
            axes = figure.add_axes(
                (
                    (left + column * (size + gap)) / width,
                    bottom / height,
                    size / width,
                    cell_height / height,
                )
            )
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
            record = cell.records[cell.images.index(images[column])]
            frame = _frame(record, concepts) if judged and cell.rule != UNGUIDED else None
            for spine in axes.spines.values():
                spine.set(visible=frame is not None, color=frame, linewidth=2.0)
            if row == 0:
                seed = cell.records[cell.images.index(images[column])]["seed"]
                there = images[column] in found
                axes.set_title(
                    f"seed {seed}{': found' if there else ''}",
                    size=6.5,
                    pad=2,
                    weight="bold" if there else "normal",
                )
        text = "unguided"
        if cell.rule != UNGUIDED:
            text = _method(cell.rule, cell.guidance_scale)
        figure.text(
            (left - 0.06) / width,
            (bottom + 0.5 * cell_height) / height,
            text,
            ha="right",
            va="center",
            size=7,
        )
    return figure


def _frame(record: Record, concepts: Sequence[str]) -> str | None:
    """Colour of the frame of a guided image, by what the judge saw; None for no frame."""
    if compare.any_found(record, concepts):
        return VERMILLION
    seen = record["seen"]
    others = [
        c for c, cell in zip(seen["changed"], seen["before"], strict=True) if cell not in concepts
    ]
    return BLUE if any(others) or any(seen["ghosts"]) else None


def _file(cell: Cell, image: int) -> str:
    return str(cell.records[cell.images.index(image)]["file"])


def _thumbnail(path: Path) -> NDArray[np.uint8]:
    pixels = Image.fromarray(_read(path))
    # thumbnail() only shrinks: enlarged images would be blurred.
    pixels.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(pixels)


# ---------------------------------------------------------------------- detections


@style.applied
def detections(records: Sequence[Record]) -> Figure:
    """Share of images in which a concept of the negative is found, over the guidance scale.

    Scales are fractions of each rule's largest one; 0 stands for the unguided images.

    Parameters
    ----------
    records : sequence of mapping
        Images that were measured with a detector.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there are no detections.
    """
    cells = compare.cells(records)
    unguided = compare.unguided_of(cells)
    prompts = [prompt for prompt in unguided if any(c.prompt == prompt for c in cells)]
    rules = [rule for rule in METHODS if any(cell.rule == rule for cell in cells)]
    figure = Figure(figsize=(WIDTH, 0.45 + _height(len(prompts), 1.95)), layout="constrained")
    drawn = False
    for place, (axes, prompt) in enumerate(
        zip(_panels(figure, len(prompts)), prompts, strict=True)
    ):
        for turn, rule in enumerate(rules):
            for kind in KINDS:
                of = [c for c in cells if (c.prompt, c.rule, c.kind) == (prompt, rule, kind)]
                of.sort(key=lambda cell: cell.guidance_scale)
                drawn |= _draw_detections(axes, unguided[prompt], of, turn - 0.5 * (len(rules) - 1))
        axes.set_ylim(-4, 104)
        axes.set_xlim(-0.06, 1.06)
        axes.set_xlabel("scale / largest scale")
        axes.set_ylabel("concept found (% of images)")
        style.title(axes, style.letter(place), plain(prompt))
    if not drawn:
        raise ValueError("records must have detections, and have none: score with a detector")
    handles: list[Any] = [
        Line2D([], [], color=LOOKS[r].color, marker=LOOKS[r].marker, label=METHODS[r].label)
        for r in rules
    ]
    handles += [
        Line2D([], [], color=BLACK, ls="-", label="related negative"),
        Line2D([], [], color=BLACK, ls=DASHED, label="unrelated negative"),
        Line2D([], [], color=GREY, lw=0.5, label="95% interval"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def _draw_detections(axes: Axes, unguided: Cell, cells: Sequence[Cell], shift: float) -> bool:
    """Draw the curve of a rule and a negative; return whether there was one."""
    if not cells:
        return False
    concepts = split(cells[-1].records[0]["negative"])
    found = [compare.presence(cell, concepts) for cell in (unguided, *cells)]
    if any(each is None for each in found):
        return False
    known = [each for each in found if each is not None]
    look = LOOKS[cells[0].rule]
    # Shifted, so that the bars of two rules do not overlap.
    scales = np.array([0.0, *(cell.guidance_scale for cell in cells)])
    x = scales / cells[-1].guidance_scale + 0.02 * shift
    y = 100.0 * np.array([each.value for each in known])
    line = "-" if cells[0].kind == "related" else DASHED
    if cells[0].rule == IDEAL:  # it has no scale
        x, y, known, line = x[1:], y[1:], known[1:], "none"
    axes.plot(x, y, color=look.color, ls=line, marker=look.marker, ms=3.5)
    low, high = (100.0 * np.array([getattr(e, end) for e in known]) for end in ("low", "high"))
    axes.vlines(x, low, high, color=look.color, lw=0.5, alpha=0.5)
    return True


# ---------------------------------------------------------------------- all of them


def draw_all(out: Path | str, *, columns: int = 6) -> list[Path]:
    """Draw every figure that a run's folder has data for, into its ``figures``.

    Parameters
    ----------
    out : Path or str
        Folder of the run.
    columns : int
        Images in a row of a grid.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    OSError
        If there are no images, or a file cannot be read or written.
    ValueError
        If a file is damaged, or the images were not measured.
    """
    folder = RunFolder(Path(out))
    records = store.read_table(folder)
    written: list[Path] = []

    def keep(stem: str, figure: Figure) -> None:
        written.append(folder.figures / f"{stem}.png")
        style.save(figure, written[-1])

    keep("similarities", similarities(records))
    for one in dict.fromkeys(summary.prompt for summary in compare.summaries(records)):
        keep(f"similarities_{file_name(one)}", similarity(records, one))
    if any(record.get("presence") for record in records):
        keep("detections", detections(records))
    for rule in METHODS:
        if rule not in ("np", "perp-neg", IDEAL) and any(
            record["rule"] == rule for record in records
        ):
            keep(f"scales_{rule}", scales(records, rule))
    for prompt in dict.fromkeys(record["prompt"] for record in records):
        name = file_name(prompt)
        if followed := _followed(records, prompt):
            stem = f"trajectories_{name}_seed-{followed[0]['seed']}"
            keep(stem, trajectories(records, prompt, folder.path))
        for kind in KINDS:
            if _has(records, {"prompt": prompt, "kind": kind}):
                keep(f"grid_{name}_{kind}", grid(records, prompt, kind, out, columns=columns))
    return written


def _has(records: Sequence[Record], fields: Mapping[str, str]) -> bool:
    return any(all(r[name] == value for name, value in fields.items()) for r in records)
