"""How well the trackers follow the posterior, and how much of the forbidden mode they leave.

The lines are unguided chains, on which the tracked posterior is compared with the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dng_math import (
    DynamicNegativeGuidance,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    sample,
)
from dng_math.distances import forbidden_mass, guided_density
from dng_models.support.progress import progress_bar
from figures import style
from figures.guidance_1d import DEVIATION, MEANS, MIXTURE

Array = NDArray[np.float64]

PAPER = "Fig. 3"
TITLE = "Posteriors tracked against exact over time, and the densities sampled with them"

FORBIDDEN = 0
STEPS = 1000
LINES = 4  # lines that end allowed, and as many that end forbidden
TRACKERS: tuple[tuple[str, style.Method, PaperTracker | LogOddsTracker], ...] = (
    ("paper's tracker", style.DNG_PAPER, PaperTracker()),
    ("log-odds tracker", style.DNG_LOG_ODDS, LogOddsTracker()),
)
X_MIN, X_MAX, BINS = -4.5, 4.5, 180
EXACT: dict[str, Any] = {"lw": 1.6, "alpha": 0.4}
TRACKED: dict[str, Any] = {"lw": 0.8, "ls": (0, (3, 1))}


@dataclass(frozen=True, eq=False)
class Panel:
    """Results of one tracker; S steps, L lines, N samples."""

    name: str
    method: style.Method
    tracked: Array  # (S + 1, 2 L), p(c|x_t)
    error: float  # mean |tracked p - p(c|x_0)|
    samples: Array  # (N,), of DNG with this tracker at g = 1
    forbidden_mass: float


@dataclass(frozen=True, eq=False)
class Data:
    """Both trackers, and the exact posterior of the chains that they share."""

    panels: tuple[Panel, ...]
    time: Array  # (S + 1,), from 1 to 0
    exact: Array  # (S + 1, 2 L): L chains that end allowed, then L that end forbidden
    target_x: Array
    target_density: Array
    n: int


def compute(quick: bool, seed: int) -> Data:
    chains = 500 if quick else 5000
    n = 20_000 if quick else 100_000
    schedule = NoiseSchedule.linear(STEPS)
    panels = []
    trackers = progress_bar(TRACKERS, "posterior_tracking", unit="tracker", leave=False)
    for name, method, tracker in trackers:
        unguided = sample(
            MIXTURE,
            schedule,
            DynamicNegativeGuidance(0.0, tracker),
            n=chains,
            forbidden=[FORBIDDEN],
            seed=seed,
            record=("tracked", "exact"),
        )
        assert unguided.tracked is not None and unguided.exact is not None
        tracked, exact = np.exp(unguided.tracked[:, 0]), np.exp(unguided.exact[:, 0])
        # The first chains of either kind, so that the choice is not selective.
        allowed = np.flatnonzero(exact[-1] < 0.5)[:LINES]
        forbidden = np.flatnonzero(exact[-1] >= 0.5)[:LINES]
        shown = np.concatenate([allowed, forbidden])
        guided = sample(
            MIXTURE,
            schedule,
            DynamicNegativeGuidance(1.0, tracker),
            n=n,
            forbidden=[FORBIDDEN],
            seed=seed,
        )
        panels.append(
            Panel(
                name=name,
                method=method,
                tracked=tracked[:, shown],
                error=float(np.abs(tracked[-1] - exact[-1]).mean()),
                samples=guided.x[:, 0],
                forbidden_mass=forbidden_mass(guided.x, MIXTURE, [FORBIDDEN]),
            )
        )
    target = guided_density(MIXTURE, [FORBIDDEN], 1.0)
    target_x = np.linspace(X_MIN, X_MAX, 901)
    return Data(
        panels=tuple(panels),
        time=unguided.time,
        exact=exact[:, shown],
        target_x=target_x,
        target_density=target.pdf(target_x),
        n=n,
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    figure = Figure(figsize=(style.WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, len(data.panels), sharey="row", height_ratios=(1.3, 1.0))
    band = MEANS[FORBIDDEN] - 4 * DEVIATION, MEANS[FORBIDDEN] + 4 * DEVIATION
    colors = [style.BLUE] * LINES + [style.FORBIDDEN] * LINES
    edges = np.linspace(X_MIN, X_MAX, BINS + 1)
    for panel, letters, (top, bottom) in zip(data.panels, ("ac", "bd"), axes.T, strict=True):
        for exact, tracked, color in zip(data.exact.T, panel.tracked.T, colors, strict=True):
            top.plot(data.time, exact, color=color, **EXACT)
            top.plot(data.time, tracked, color=color, **TRACKED)
        top.set(xlim=(1.0, 0.0), ylim=(-0.02, 1.02), xlabel="diffusion time $t/T$")
        style.title(top, letters[0], f"{panel.name}: mean $|$error$|$ at the end {panel.error:.4f}")

        bottom.axvspan(*band, color=style.FORBIDDEN, alpha=0.15, lw=0)
        heights = np.histogram(panel.samples, edges)[0] / (data.n * np.diff(edges))
        bottom.stairs(heights, edges, fill=True, color=panel.method.color)
        bottom.plot(data.target_x, data.target_density, color=style.TARGET, lw=1.0)
        bottom.set(xlim=(X_MIN, X_MAX), yscale="log", ylim=(5e-4, 2.0), xlabel="$x$")
        style.log_ticks(bottom.yaxis)
        style.title(bottom, letters[1], f"forbidden mass left at $g=1$: {panel.forbidden_mass:.4f}")
    axes[0, 0].set_ylabel("$p(c\\,|\\,x_t)$")
    axes[1, 0].set_ylabel("density at $t=0$")
    figure.legend(
        handles=[
            Line2D([], [], color=style.BLUE, label="chain that ends allowed"),
            Line2D([], [], color=style.FORBIDDEN, label="chain that ends forbidden"),
            Line2D([], [], color=style.BLACK, label="exact posterior", **EXACT),
            Line2D([], [], color=style.BLACK, label="tracked posterior", **TRACKED),
            Line2D([], [], color=style.TARGET, lw=1.0, label="exact target $p(x\\,|\\,$not $c)$"),
            Patch(color=style.FORBIDDEN, alpha=0.15, lw=0, label="forbidden mode $c$"),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return {"posterior_tracking": figure}


def summary(data: Data) -> str:
    parts = [
        f"{panel.name}: mean |error of p| {panel.error:.4f}, forbidden mass left at g = 1 "
        f"{panel.forbidden_mass:.4f}"
        for panel in data.panels
    ]
    return f"{'; '.join(parts)} (n = {data.n})"
