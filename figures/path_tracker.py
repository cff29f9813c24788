"""Error of the tracked posterior against the number of steps: trackers of steps, and of the path.

Chains are unguided and start exactly, so that the error is the tracker's.  It is the mean over
samples of |tracked - exact| at its worst time of the chain.  The trackers of transitions know the
noise of the step, and assume that of DDPM; with the divergence they are right to first order for
deterministic samplers too.  The path tracker knows neither step nor sampler.  Left: an inner mode
of four in one dimension; then one of six components in eight and in 64 dimensions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dng_math import (
    DDIM,
    DynamicNegativeGuidance,
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    sample,
)
from dng_models.support.progress import progress_bar
from figures import style
from figures.guidance_1d import MIXTURE

Array = NDArray[np.float64]
Tracker = PaperTracker | LogOddsTracker | PathTracker

PAPER = "beyond it"
TITLE = "The tracker that follows the path, against steps, in 1, 8 and 64 dimensions"
MINUTES = 1

ETAS = {0.0: "deterministic", 1.0: "DDPM"}
STEPS = (1000, 500, 200, 100, 50, 20, 10, 5)
QUICK_STEPS = (200, 50, 20, 10)
P_MAX = 0.9999  # of all: at 0.99, the default, the cap itself is an error of 0.001
TRACKERS: tuple[tuple[str, style.Method, Tracker], ...] = (
    ("paper's tracker", style.DNG_PAPER, PaperTracker(p_max=P_MAX)),
    ("log-odds tracker", style.DNG_LOG_ODDS, LogOddsTracker(p_max=P_MAX)),
    (
        "log-odds, with divergence",
        style.DNG_LOG_ODDS,
        LogOddsTracker(p_max=P_MAX, divergence=True),
    ),
    ("path tracker", style.DNG_PATH, PathTracker(p_max=P_MAX)),
)


def _six(dimensions: int, spread: float) -> GaussianMixture:
    rng = np.random.default_rng(1)
    means = spread * rng.standard_normal((6, dimensions))
    return GaussianMixture(np.full(6, 1 / 6), means, [0.09] * 6)


CASES: dict[str, tuple[GaussianMixture, int]] = {
    "1D": (MIXTURE, 1),
    "8D": (_six(8, 1.0), 1),
    "64D": (_six(64, 0.5), 1),
}


@dataclass(frozen=True, eq=False)
class Data:
    """Axes: case, eta, tracker, number of steps."""

    steps: tuple[int, ...]
    error: Array  # mean |tracked p - exact p| at its worst time
    n: int


def compute(quick: bool, seed: int) -> Data:
    n = 500 if quick else 4000
    steps = QUICK_STEPS if quick else STEPS
    shape = (len(CASES), len(ETAS), len(TRACKERS), len(steps))
    error = np.zeros(shape)
    # The warning says that trackers of transitions are wrong for eta < 1, which the figure shows.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sampler adds", UserWarning)
        runs = progress_bar(
            np.ndindex(shape), "path_tracker", total=error.size, unit="run", leave=False
        )
        for i, j, k, m in runs:
            mixture, forbidden = list(CASES.values())[i]
            run = sample(
                mixture,
                NoiseSchedule.linear(1000).respace(steps[m]),
                DynamicNegativeGuidance(0.0, TRACKERS[k][2]),
                n=n,
                forbidden=[forbidden],
                sampler=DDIM(list(ETAS)[j]),
                seed=seed,
                initial="exact",
                record=["tracked", "exact"],
            )
            assert run.tracked is not None and run.exact is not None
            # The last state is that of the last point with predictions.
            apart = np.abs(np.exp(run.tracked[:-1]) - np.exp(run.exact[:-1]))
            error[i, j, k, m] = apart.mean(axis=(1, 2)).max()
    return Data(steps=steps, error=error, n=n)


def _look(k: int) -> dict[str, Any]:
    _, method, tracker = TRACKERS[k]
    look = {**method.line, "markersize": 4.5, "markeredgewidth": 1.0}
    if isinstance(tracker, LogOddsTracker) and tracker.divergence:
        look |= {"linestyle": "--", "markerfacecolor": "white"}
    return look


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """One panel for each case and sampler."""
    figure = Figure(figsize=(style.WIDTH, 4.4), layout="constrained")
    axes = figure.subplots(len(ETAS), len(CASES), sharex=True, sharey=True)
    for i, case in enumerate(CASES):
        for j, told in enumerate(ETAS.values()):
            panel = axes[j, i]
            for k in range(len(TRACKERS)):
                if (
                    list(ETAS)[j] == 1.0
                    and getattr(TRACKERS[k][2], "divergence", False)
                    and (not isinstance(TRACKERS[k][2], PathTracker))
                ):
                    continue  # the correction is zero there
                panel.plot(data.steps, data.error[i, j, k], **_look(k))
            style.title(panel, "abcdef"[3 * j + i], f"{case}, {told}")
            panel.set(xscale="log", yscale="log", ylim=(1e-5, 0.5))
            style.log_ticks(panel.yaxis)
            panel.grid(True)
            panel.set_xticks(data.steps, labels=[str(s) for s in data.steps], rotation=45)
            panel.minorticks_off()
            if j == len(ETAS) - 1:
                panel.set_xlabel("steps")
    for panel in axes[:, 0]:
        panel.set_ylabel("mean $|$tracked $-$ exact$|$\nof $p(c\\,|\\,x_t)$, worst time")
    figure.legend(
        handles=[Line2D([], [], label=name, **_look(k)) for k, (name, *_) in enumerate(TRACKERS)],
        loc="outside lower center",
        ncols=4,
    )
    return {"path_tracker": figure}


def summary(data: Data) -> str:
    """The errors at the numbers of steps that are drawn, a line for each case and sampler."""
    lines = [f"mean |tracked - exact| at its worst time; steps {', '.join(map(str, data.steps))}"]
    for i, case in enumerate(CASES):
        for j, told in enumerate(ETAS.values()):
            for k, (name, *_) in enumerate(TRACKERS):
                row = " ".join(f"{value:.4f}" for value in data.error[i, j, k])
                lines.append(f"  {case}, {told}, {name}: {row}")
    lines.append(f"  n = {data.n}")
    return "\n".join(lines)
