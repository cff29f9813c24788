"""The guidance of each rule as vector fields at one noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dng_math import (
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    GaussianMixture,
    NegativePrompting,
    NoiseSchedule,
    predict,
)
from dng_math.rules import Rule
from figures import style

Array = NDArray[np.float64]

PAPER = "Figs. 7, 8, 9"
TITLE = "Score fields of CFG, negative prompting and DNG: base, guidance term and total"

MEANS = np.array([[-1.5, 1.0], [1.5, 1.0], [0.0, -1.5]])
DEVIATION = 0.05
MIXTURE = GaussianMixture(np.ones(3), MEANS, np.full(3, DEVIATION**2))
FORBIDDEN = 2
WANTED = 1
SCALE = 2.0
STEPS = 1000
STEP = 200  # the noise level, as an index into the schedule

# Each with its guidance term in LaTeX; the total is s plus that.
RULES: tuple[tuple[str, str, Rule], ...] = (
    ("CFG to one kept mode", r"2\,(s_+-s)", ClassifierFreeGuidance(SCALE)),
    ("negative prompting", r"-2\,(s_c-s)", NegativePrompting(SCALE)),
    ("DNG, exact posterior", r"-2\,\frac{p}{1-p}\,(s_c-s)", DynamicNegativeGuidance(SCALE)),
)

ARROWS = 17
FINE = 121
X_MIN, X_MAX, Y_MIN, Y_MAX = -2.4, 2.4, -2.5, 2.1
LOWEST, HIGHEST = 0.01, 30.0  # magnitudes that the colours cover


@dataclass(frozen=True, eq=False)
class Field:
    """One rule; a grid of A x A points."""

    name: str
    term: str  # LaTeX
    guidance: Array  # (A, A, 2)
    total: Array  # (A, A, 2)


@dataclass(frozen=True, eq=False)
class Data:
    """All fields at one noise level, in inverse units of x."""

    time: float
    means: Array  # (K, 2), of the modes at this noise level
    points: Array  # (A, A, 2)
    score: Array  # (A, A, 2), unguided
    fields: tuple[Field, ...]
    density_grid: tuple[Array, Array]
    density: Array


def compute(quick: bool, seed: int) -> Data:
    schedule = NoiseSchedule.linear(STEPS)
    alpha, sigma, time = (float(v[STEP]) for v in (schedule.alpha, schedule.sigma, schedule.time))
    axis = np.linspace(-2.25, 2.25, ARROWS)
    points = np.stack(np.meshgrid(axis, axis - 0.2), axis=-1)
    fields = []
    for name, term, rule in RULES:
        found = predict(
            MIXTURE,
            points.reshape(-1, 2),
            alpha,
            sigma,
            rule,
            forbidden=[FORBIDDEN],
            positive=[WANTED],
            prediction_type="score",
        )
        guidance = (found.guided - found.base).reshape(points.shape)
        fields.append(Field(name, term, guidance, found.guided.reshape(points.shape)))
    grid = (np.linspace(X_MIN, X_MAX, FINE), np.linspace(Y_MIN, Y_MAX, FINE))
    fine = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2)
    return Data(
        time=time,
        means=alpha * MEANS,
        points=points,
        score=found.base.reshape(points.shape),  # the same for every rule
        fields=tuple(fields),
        density_grid=grid,
        density=np.exp(MIXTURE.diffuse(alpha, sigma).log_prob(fine)).reshape(FINE, FINE),
    )


KEPT: dict[str, Any] = {
    "ls": "",
    "marker": "o",
    "ms": 6,
    "mfc": "white",
    "mec": style.BLACK,
    "mew": 1.2,
}
UNWANTED: dict[str, Any] = {
    "ls": "",
    "marker": "X",
    "ms": 7.5,
    "color": style.FORBIDDEN,
    "mec": "white",
    "mew": 0.6,
}
CONTOUR = "#BBBBBB"


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """The unguided score once, and below it a column for each rule."""
    figure = Figure(figsize=(style.WIDTH, 7.6), layout="constrained")
    axes = figure.subplots(3, len(data.fields), sharex=True, sharey=True)
    norm = LogNorm(LOWEST, HIGHEST)
    shown = [(axes[0, 0], data.score)]
    shown += [(panel, field.guidance) for panel, field in zip(axes[1], data.fields, strict=True)]
    shown += [(panel, field.total) for panel, field in zip(axes[2], data.fields, strict=True)]
    for panel, vectors in shown:
        _draw_field(panel, data, vectors, norm)
    style.title(axes[0, 0], "a", "unguided score $s$")
    for i, field in enumerate(data.fields):
        style.title(axes[1, i], "bcd"[i], f"{field.name}:\n${field.term}$")
        joined = field.term if field.term.startswith("-") else f"+{field.term}"
        style.title(axes[2, i], "efg"[i], f"$s{joined}$")
    axes[0, 0].tick_params(labelbottom=True)
    axes[0, 0].set_xlabel("$x_1$")
    for panel in axes[2]:
        panel.set_xlabel("$x_1$")
    for panel, name in zip(
        axes[:, 0], ("", "guidance term\n", "score with guidance\n"), strict=True
    ):
        panel.set_ylabel(f"{name}$x_2$")
    _draw_key(axes[0, 1:], figure, data, norm)
    return {"score_fields": figure}


def _draw_field(panel: Axes, data: Data, vectors: Array, norm: LogNorm) -> None:
    panel.contour(*data.density_grid, data.density, 6, colors=CONTOUR, linewidths=0.5)
    cell = data.points[0, 1, 0] - data.points[0, 0, 0]
    size = np.linalg.norm(vectors, axis=-1)
    seen = size >= LOWEST
    # The length grows with the logarithm of the magnitude, which the colour shows.
    decades = np.log(size[seen] / LOWEST) / np.log(HIGHEST / LOWEST)
    length = cell * (0.25 + 0.7 * np.clip(decades, 0.0, 1.0))
    panel.quiver(
        *data.points[seen].T,
        *(vectors[seen].T / size[seen] * length),
        size[seen],
        cmap=style.SEQUENTIAL,
        norm=norm,
        angles="xy",
        scale_units="xy",
        scale=1.0,
        pivot="mid",
        width=0.0065,
        headwidth=3.6,
        headlength=4.0,
        headaxislength=3.6,
    )
    panel.plot(*data.points[~seen].T, ls="", marker=".", ms=1.2, color=style.GREY)
    panel.plot(*np.delete(data.means, FORBIDDEN, axis=0).T, **KEPT)
    panel.plot(*data.means[FORBIDDEN], **UNWANTED)
    panel.set(aspect="equal", xlim=(X_MIN, X_MAX), ylim=(Y_MIN, Y_MAX))


def _draw_key(panels: Sequence[Axes], figure: Figure, data: Data, norm: LogNorm) -> None:
    """Draw the legend and the colour bar of all panels, in the place of two panels."""
    for panel in panels:
        panel.set_axis_off()
    key = panels[0].legend(
        handles=[
            Line2D([], [], label="kept mode", **KEPT),
            Line2D([], [], label="forbidden mode $c$", **UNWANTED),
            Line2D([], [], color=CONTOUR, lw=0.8, label="density without guidance"),
            Line2D(
                [], [], ls="", marker=".", ms=3, color=style.GREY, label=f"magnitude < {LOWEST:g}"
            ),
        ],
        title=(
            f"noise level $t/T={data.time:.1f}$, scale {SCALE:g}; $s_+$: score of the right\n"
            "mode, $s_c$: of the forbidden mode, $p=p(c\\,|\\,x)$"
        ),
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(0.1, 1.0),
    )
    key.set_in_layout(False)  # the legend and the bar are wider than one panel
    place = panels[0].inset_axes((0.15, 0.2, 1.9, 0.07))
    place.set_in_layout(False)
    bar = figure.colorbar(
        ScalarMappable(norm, style.SEQUENTIAL),
        cax=place,
        orientation="horizontal",
        label="magnitude (1 / unit of $x$)",
        extend="min",
    )
    style.log_ticks(bar.ax.xaxis)


def summary(data: Data) -> str:
    kept = np.delete(data.means, FORBIDDEN, axis=0)
    parts = []
    for field in data.fields:
        push = np.linalg.norm(field.guidance, axis=-1)
        at_kept = [
            push.flat[np.argmin(np.linalg.norm(data.points - mean, axis=-1))] for mean in kept
        ]
        parts.append(
            f"{field.name}: {' and '.join(f'{value:.2g}' for value in at_kept)}, "
            f"largest {push.max():.2g}"
        )
    return f"guidance term at the two kept modes (1/unit of x): {'; '.join(parts)}"
