"""Which steps raise the tracked posterior: one step of a coarse run, in two dimensions.

The paper's tracker asks whether x_s is nearer to the forbidden mean mu_c than to the base mean
mu; the log-odds tracker asks whether it is nearer to mu_c than to the mean of all the rest,
mu_rest = mu - o d with d = mu_c - mu and o = p/(1-p).  Both boundaries are perpendicular
bisectors.  The run has only twenty steps, so that the distances of the means are visible beside
the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from dng_math import GaussianMixture, LogOddsTracker, NoiseSchedule, PaperTracker, equations
from figures import style

Array = NDArray[np.float64]

PAPER = "Fig. 2"
TITLE = "Geometry of one posterior update: which steps raise p(c|x)"

MIXTURE = GaussianMixture(
    [0.3, 0.4, 0.3], [[1.6, 0.5], [-0.8, 1.4], [-1.2, -1.3]], [0.09, 0.09, 0.09]
)
FORBIDDEN = 0
STEPS = 20
STEP = 14
X = np.array([0.3, 0.2])
# In the frame along d and across it, in units of the step's standard deviation.
# The second lies between the two trackers' boundaries.
EXAMPLES = np.array([[1.3, 0.9], [0.22, -1.1], [-1.0, 0.8]])
CLOUD = 300
GRID = 161
HALF_WIDTH = 2.1  # of the panels, in standard deviations of the step


@dataclass(frozen=True, eq=False)
class Data:
    """One step from t to s; E examples, G grid points a side."""

    time: tuple[float, float]  # t and s over T
    x: Array  # (2,)
    mean: Array  # (2,), of x_s
    mean_forbidden: Array  # (2,)
    mean_rest: Array  # (2,)
    deviation: float
    posterior: float  # p(c|x_t)
    cloud: Array  # (CLOUD, 2)
    examples: Array  # (E, 2)
    # Changes of log p(c|x) in nats, at the examples and on the grid.
    paper: Array  # (E,)
    log_odds: Array  # (E,)
    exact: Array  # (E,)
    grid: tuple[Array, Array]  # (G,) each
    paper_grid: Array  # (G, G)
    log_odds_grid: Array  # (G, G)
    exact_grid: Array  # (G, G)


def _change(
    tracker: PaperTracker | LogOddsTracker,
    state: float,
    points: Array,
    mean: Array,
    gap: Array,
    variance: float,
) -> Array:
    """Change of a tracker's log p(c|x) for a step to each point (N, 2)."""
    residual = points - mean
    before = np.full(len(points), state)
    gap_sq = np.full(len(points), gap @ gap)
    after = tracker.update(before, gap_sq, residual @ gap, variance, STEPS)
    return tracker.log_posterior(after) - tracker.log_posterior(before)


def compute(quick: bool, seed: int) -> Data:
    coefficients = NoiseSchedule.linear(1000).respace(STEPS).coefficients()
    alpha_t, sigma_t = coefficients.alpha_t[STEP], coefficients.sigma_t[STEP]
    noisy = MIXTURE.diffuse(alpha_t, sigma_t)
    clean = MIXTURE.diffuse(coefficients.alpha_s[STEP], coefficients.sigma_s[STEP])
    rest = np.setdiff1d(np.arange(MIXTURE.n_components), [FORBIDDEN])

    def mean_of(mixture: GaussianMixture) -> Array:
        x0 = mixture.posterior_mean(X[None], alpha_t, sigma_t)[0]
        return np.asarray(
            equations.step_mean(X, x0, coefficients.x_factor[STEP], coefficients.x0_factor[STEP])
        )

    mean, mean_forbidden = mean_of(MIXTURE), mean_of(MIXTURE.restrict([FORBIDDEN]))
    gap = mean_forbidden - mean
    variance = float(coefficients.step_var[STEP])
    deviation = variance**0.5
    log_posterior = float(noisy.log_posterior(X[None], [FORBIDDEN])[0])
    log_odds = float(noisy.log_odds(X[None], [FORBIDDEN])[0])

    along = gap / np.linalg.norm(gap)
    across = np.array([-along[1], along[0]])
    examples = mean + deviation * EXAMPLES @ np.array([along, across])
    offsets = HALF_WIDTH * deviation * np.linspace(-1.0, 1.0, GRID)
    grid = (mean[0] + offsets, mean[1] + offsets)
    points = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2)

    def changes(at: Array) -> tuple[Array, Array, Array]:
        paper = _change(PaperTracker(), log_posterior, at, mean, gap, variance)
        normalised = _change(LogOddsTracker(), log_odds, at, mean, gap, variance)
        exact = clean.log_posterior(at, [FORBIDDEN]) - log_posterior
        return paper, normalised, exact

    paper, normalised, exact = changes(examples)
    paper_grid, normalised_grid, exact_grid = (
        values.reshape(GRID, GRID) for values in changes(points)
    )
    noise = np.random.default_rng(seed).standard_normal((CLOUD, 2))
    return Data(
        time=(float(coefficients.time[STEP]), float(coefficients.time[STEP + 1])),
        x=X,
        mean=mean,
        mean_forbidden=mean_forbidden,
        mean_rest=mean_of(MIXTURE.restrict(rest)),
        deviation=deviation,
        posterior=float(np.exp(log_posterior)),
        cloud=mean + deviation * noise,
        examples=examples,
        paper=paper,
        log_odds=normalised,
        exact=exact,
        grid=grid,
        paper_grid=paper_grid,
        log_odds_grid=normalised_grid,
        exact_grid=exact_grid,
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    figure = Figure(figsize=(style.WIDTH, 4.45), layout="constrained")
    figure.suptitle(
        f"One step of a {STEPS}-step run, $t/T$ from {data.time[0]:.2f} to {data.time[1]:.2f}, "
        f"with $p(c|x_t)={data.posterior:.2f}$",
        size=8,
    )
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _panel(left, data, data.paper_grid, data.paper)
    style.title(left, "a", "paper's tracker: nearer to $\\mu_c$ than to $\\mu$?")
    _panel(right, data, data.log_odds_grid, data.log_odds)
    style.title(right, "b", "log-odds tracker: nearer to $\\mu_c$ than to $\\mu_{\\mathrm{rest}}$?")
    _mean(right, data.mean_rest, "$\\mu_{\\mathrm{rest}}$", style.BLUE)
    left.set_ylabel("$x_2$")
    figure.legend(
        handles=[
            Patch(
                color=style.FORBIDDEN, alpha=0.15, lw=0, label="$\\log p(c|x)$ rises, as tracked"
            ),
            Line2D([], [], color=style.FORBIDDEN, lw=1.2, label="tracker's boundary"),
            Line2D([], [], color=style.BLACK, lw=1.2, ls=":", label="exact boundary"),
            Line2D(
                [],
                [],
                color=style.GREY,
                lw=0.8,
                ls="--",
                label=r"$\sqrt{v}$ and $2\sqrt{v}$, the step's noise",
            ),
            Line2D([], [], color=style.GREY, ls="", marker=".", ms=3, label="possible $x_s$"),
            Line2D(
                [],
                [],
                color=style.BLACK,
                ls="",
                marker="D",
                ms=4,
                mfc="white",
                label="example $x_s$: change of $\\log p$ in nats, tracked (exact)",
            ),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return {"update_geometry": figure}


def _panel(axes: Axes, data: Data, grid: Array, changes: Array) -> None:
    axes.contourf(*data.grid, grid, [0.0, np.inf], colors=style.FORBIDDEN, alpha=0.15)
    axes.contour(*data.grid, grid, [0.0], colors=style.FORBIDDEN, linewidths=1.2)
    axes.contour(
        *data.grid, data.exact_grid, [0.0], colors=style.BLACK, linestyles=":", linewidths=1.2
    )
    axes.plot(*data.cloud.T, ls="", marker=".", ms=1.5, color=style.GREY, zorder=1)
    for radius in (1, 2):
        axes.add_patch(
            Circle(
                tuple(data.mean),
                radius * data.deviation,
                fill=False,
                ec=style.GREY,
                lw=0.8,
                ls="--",
            )
        )
    axes.plot(*data.x, ls="", marker="*", ms=7, color=style.BLACK)
    _label(axes, data.x, "$x_t$", (0, -12))
    _mean(axes, data.mean, "$\\mu$", style.BLACK)
    _mean(axes, data.mean_forbidden, "$\\mu_c$", style.FORBIDDEN)
    for point, change, exact in zip(data.examples, changes, data.exact, strict=True):
        axes.plot(*point, ls="", marker="D", ms=4, mfc="white", mec=style.BLACK, zorder=4)
        text = f"{change:+.2f} ({exact:+.2f})".replace("-", "\N{MINUS SIGN}")
        _label(axes, point, text, (0, -13))
    axes.set(xlabel="$x_1$", aspect="equal")
    axes.set_xlim(data.grid[0][0], data.grid[0][-1])
    axes.set_ylim(data.grid[1][0], data.grid[1][-1])


def _mean(axes: Axes, point: Array, name: str, color: str) -> None:
    axes.plot(*point, ls="", marker="o", ms=5, color=color, zorder=3)
    _label(axes, point, name, (0, 5), color)


def _label(
    axes: Axes, point: Array, text: str, offset: tuple[int, int], color: str = style.BLACK
) -> None:
    axes.annotate(
        text,
        tuple(point),
        offset,
        textcoords="offset points",
        ha="center",
        color=color,
        size=7.5,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )


def summary(data: Data) -> str:
    odds = data.posterior / (1 - data.posterior)
    changes = [
        f"example {i + 1}: paper {data.paper[i]:+.2f}, log-odds {data.log_odds[i]:+.2f}, "
        f"exact {data.exact[i]:+.2f} nats"
        for i in range(len(data.examples))
    ]
    distance = np.linalg.norm(data.mean_forbidden - data.mean)
    return (
        f"t/T = {data.time[0]:.2f} to {data.time[1]:.2f}, p = {data.posterior:.3f}, "
        f"o = {odds:.3f}, |d| = {distance:.3f}, sqrt(v) = {data.deviation:.3f}; "
        f"change of log p: {'; '.join(changes)}"
    )
