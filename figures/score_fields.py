"""Where each guidance pushes, seen as vector fields at one noise level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
)
from dng_math.guidance import Predictions, Rule
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

RULES: tuple[tuple[str, Rule], ...] = (
    ("CFG towards one kept mode", ClassifierFreeGuidance(SCALE)),
    ("negative prompting", NegativePrompting(SCALE)),
    ("DNG, exact posterior", DynamicNegativeGuidance(SCALE)),
)

ARROWS = 17
FINE = 121
X_MIN, X_MAX, Y_MIN, Y_MAX = -2.4, 2.4, -2.5, 2.1
LOWEST, HIGHEST = 0.01, 30.0  # magnitudes that the colours cover


@dataclass(frozen=True, eq=False)
class Field:
    """One rule; a grid of A x A points."""

    name: str
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


def _predictions(x: Array, alpha: float, sigma: float, time: float) -> Predictions:
    """Scores in the place of noise predictions: the rules are affine, so they read the same."""
    noisy = MIXTURE.diffuse(alpha, sigma)
    rest = np.setdiff1d(np.arange(MIXTURE.n_components), [FORBIDDEN])
    return Predictions(
        base=noisy.score(x),
        negative=noisy.restrict([FORBIDDEN]).score(x)[None],
        positive=noisy.restrict([WANTED]).score(x),
        rest=noisy.restrict(rest).score(x),
        log_ratio=noisy.log_odds(x, [FORBIDDEN])[None],
        odds=None,
        to_noise=-sigma,
        step=STEPS - STEP,
        time=time,
    )


def compute(quick: bool, seed: int) -> Data:
    schedule = NoiseSchedule.linear(STEPS)
    alpha, sigma, time = (float(v[STEP]) for v in (schedule.alpha, schedule.sigma, schedule.time))
    axis = np.linspace(-2.25, 2.25, ARROWS)
    points = np.stack(np.meshgrid(axis, axis - 0.2), axis=-1)
    predictions = _predictions(points.reshape(-1, 2), alpha, sigma, time)
    fields = []
    for name, rule in RULES:
        total = rule.guide(predictions, None)[0]
        guidance = (total - predictions.base).reshape(points.shape)
        fields.append(Field(name, guidance, total.reshape(points.shape)))
    grid = (np.linspace(X_MIN, X_MAX, FINE), np.linspace(Y_MIN, Y_MAX, FINE))
    fine = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2)
    return Data(
        time=time,
        means=alpha * MEANS,
        points=points,
        score=predictions.base.reshape(points.shape),
        fields=tuple(fields),
        density_grid=grid,
        density=np.exp(MIXTURE.diffuse(alpha, sigma).log_prob(fine)).reshape(FINE, FINE),
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    rows = len(data.fields)
    figure = Figure(figsize=(style.WIDTH, 7.0), layout="constrained")
    axes = figure.subplots(rows, 3, sharex=True, sharey=True)
    norm = LogNorm(LOWEST, HIGHEST)
    cell = data.points[0, 1, 0] - data.points[0, 0, 0]
    for row, (field, panels) in enumerate(zip(data.fields, axes, strict=True)):
        for column, (vectors, panel) in enumerate(
            zip((data.score, field.guidance, field.total), panels, strict=True)
        ):
            panel.contour(*data.density_grid, data.density, 6, colors="#BBBBBB", linewidths=0.5)
            size = np.linalg.norm(vectors, axis=-1)
            seen = size >= LOWEST
            # The length grows by equal parts per decade; the colour tells the magnitude.
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
            kept = np.delete(data.means, FORBIDDEN, axis=0)
            panel.plot(*kept.T, ls="", marker="o", ms=6, mfc="white", mec=style.BLACK, mew=1.2)
            panel.plot(
                *data.means[FORBIDDEN],
                ls="",
                marker="X",
                ms=7.5,
                color=style.FORBIDDEN,
                mec="white",
                mew=0.6,
            )
            panel.set(aspect="equal", xlim=(X_MIN, X_MAX), ylim=(Y_MIN, Y_MAX))
            style.title(panel, "abcdefghi"[3 * row + column], TITLES[row][column])
        panels[0].set_ylabel(f"{field.name}\n$x_2$")
    for panel in axes[-1]:
        panel.set_xlabel("$x_1$")
    figure.colorbar(
        ScalarMappable(norm, style.SEQUENTIAL),
        ax=axes,
        label=f"magnitude (1 / unit of $x$); dots: below {LOWEST}",
        shrink=0.6,
        extend="min",
        pad=0.01,
    )
    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                ls="",
                marker="o",
                ms=6,
                mfc="white",
                mec=style.BLACK,
                mew=1.2,
                label="kept mode",
            ),
            Line2D(
                [],
                [],
                ls="",
                marker="X",
                ms=7.5,
                color=style.FORBIDDEN,
                mec="white",
                label="forbidden mode",
            ),
            Line2D(
                [], [], color="#BBBBBB", lw=0.8, label=f"unguided density at $t/T={data.time:.1f}$"
            ),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return {"score_fields": figure}


BASE = "score $s$"
TITLES = (
    (BASE, "$2\\,(s_+-s)$", "$s+2\\,(s_+-s)$"),
    (BASE, "$-2\\,(s_c-s)$", "$s-2\\,(s_c-s)$"),
    (BASE, "$-2\\,\\frac{p}{1-p}\\,(s_c-s)$", "$s-2\\,\\frac{p}{1-p}\\,(s_c-s)$"),
)


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
