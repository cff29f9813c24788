"""Figures of the images of a sweep: side by side, and through diffusion time."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks
from dng_models.class_removal.compare import (
    Row,
)
from dng_models.class_removal.config import BUILT_IN
from dng_models.support import extras, style
from dng_models.support.printable import drawable
from dng_models.support.style import (
    DASHED,
    GREEN,
    PURPLE,
    VERMILLION,
    WIDTH,
)

with extras.needed_by("dng_models.class_removal.plot"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

Array = NDArray[np.float64]


@style.applied
def grid(
    images_by_method: Mapping[str, ArrayLike],
    marks: Mapping[str, ArrayLike] | None = None,
    *,
    negative: bool = False,
) -> Figure:
    """Images of every method from the same noise, side by side (paper, Figs. 4 and 10).

    Parameters
    ----------
    images_by_method : mapping of str to array_like, shape (n, C, H, W)
        Images in [-1, 1] (values outside are clamped); C = 1 or 3.  Each method is a labelled row;
        the images of a column share their noise.
    marks : mapping of str to array_like of bool, shape (n,), optional
        Images to frame because they are judged forbidden.  Methods may be missing.
    negative : bool
        Draw grey images as negatives, so that light digits on dark look like ink on paper.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError, ValueError
        If there are no images, shapes differ, or ``marks`` names a method without images.
    """
    if not images_by_method:
        raise ValueError("images_by_method must hold at least one method, got none")
    rows = {}
    shape: tuple[int | str, ...] = ("n", "C", "H", "W")
    for name, images in images_by_method.items():
        rows[name] = checks.filled(f"images_by_method[{name!r}]", images, shape)
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
    # Placed by hand: automatic layouts ignore the effect of the fixed aspect on the texts.
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
    """Width and height of a row's name, in inches."""
    figure = Figure()
    box = figure.text(0.0, 0.0, text, size=7).get_window_extent()
    return float(box.width / figure.dpi), float(box.height / figure.dpi)


def _show(axes: Axes, images: Array, negative: bool) -> tuple[float, float]:
    """Draw rows of images (R, n, C, H, W); return the gap between them, in axes units."""
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


@style.applied
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
    """Images through diffusion time, with the guidance scale below them (paper, Fig. 5).

    Parameters
    ----------
    times : array_like, shape (T,)
        Diffusion times t/T in [0, 1], decreasing; at least 2.
    x : array_like, shape (T, n, C, H, W)
        The n images at every time, as x_t or as predictions of the clean image, in [-1, 1];
        C = 1 or 3.
    scale : array_like, shape (T, n)
        Dynamic scale of each image.
    log_posterior : array_like, shape (T, n), optional
        log p(c | x_t), drawn as a probability.
    labels : sequence of str, optional
        A title for each image.
    snapshots : int
        Number of pictures in a strip; each stands above its time.
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
    t = checks.filled("times", times, ("T",))
    if t.size < 2 or not (np.diff(t) < 0.0).all():
        raise ValueError(f"times must decrease over at least 2 steps, got {t.size} from {t[0]:g}")
    images = checks.filled("x", x, (t.size, "n", "C", "H", "W"))
    n, channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"x must have 1 or 3 channels, got {channels}")
    strength = checks.array("scale", scale, (t.size, n))
    posterior = None
    if log_posterior is not None:
        posterior = np.exp(checks.array("log_posterior", log_posterior, (t.size, n)))
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be {n}, one for each image, got {len(labels)}")
    shown = min(checks.integer("snapshots", snapshots, 1), t.size)
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
            lines.set_yscale("log")
            style.log_ticks(lines.yaxis)
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
    """The limits of a value axis that all panels share."""
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return low / 1.5, high * 1.5
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return min(low, 0.0) - margin, high + margin


def is_ink(row: Row) -> bool:
    """Whether a row's images are digits, light on dark, which are drawn as negatives."""
    config = row["config"]
    named = config.get("like") or BUILT_IN.get(config.get("dataset", ""))
    return named in ("digits", "mnist")
