"""Error of the trackers with fewer steps and less noise, with and without the divergence.

Both trackers assume that every step is the DDPM transition, eta = 1.  With less noise they lack a
term with the divergence of the scores, which does not shrink with more steps.  With that term, the
error that remains at many steps comes from the start: the schedule keeps some signal at T, so that
p(c|x_T) is not quite the prior, and a chain without noise never forgets the difference.  The
forbidden mode is an outer one of four in a row, or an inner one, which is harder.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dng_math import (
    DDIM,
    DynamicNegativeGuidance,
    ExactPosterior,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    sample,
)
from dng_math.distances import forbidden_mass
from dng_models.support.progress import progress_bar
from figures import style
from figures.guidance_1d import MIXTURE

Array = NDArray[np.float64]
Posterior = ExactPosterior | PaperTracker | LogOddsTracker

PAPER = "beyond it"
TITLE = "Trackers against the number of steps and the sampler's noise, two places of the mode"

PLACES = {"outer": 0, "inner": 1}  # the forbidden mode
ETAS = (1.0, 0.5, 0.0)
STEPS = (1000, 500, 200, 100, 50, 20, 10)
QUICK_STEPS = (1000, 200, 50, 10)
POSTERIORS: tuple[tuple[str, style.Method, Posterior], ...] = (
    ("paper's tracker", style.DNG_PAPER, PaperTracker()),
    ("log-odds tracker", style.DNG_LOG_ODDS, LogOddsTracker()),
    ("paper's, with divergence", style.DNG_PAPER, PaperTracker(divergence=True)),
    ("log-odds, with divergence", style.DNG_LOG_ODDS, LogOddsTracker(divergence=True)),
    ("exact", style.DNG_EXACT, ExactPosterior()),
)
START: dict[str, Any] = {"color": style.GREY, "lw": 1.0, "ls": ":"}
NONE_LEFT = "#E8E8E8"
# Factors by which markers are shifted along the axis of steps, so that equal ones stay visible.
BESIDE = {style.DNG_PAPER: 0.95, style.DNG_LOG_ODDS: 1.05}


@dataclass(frozen=True, eq=False)
class Data:
    """Axes: place of the forbidden mode, eta, posterior, number of steps."""

    steps: tuple[int, ...]
    error: Array  # mean |tracked p - p(c|x_0)| over unguided chains; 0 for the exact posterior
    mass: Array  # forbidden mass left at g = 1
    prior_error: Array  # per place, mean |prior - p(c|x_T)|
    n: int


def compute(quick: bool, seed: int) -> Data:
    n = 1000 if quick else 10_000
    steps = QUICK_STEPS if quick else STEPS
    shape = (len(PLACES), len(ETAS), len(POSTERIORS), len(steps))
    error, mass = np.zeros(shape), np.zeros(shape)
    # The warning says that trackers are wrong for eta < 1, which the figure shows.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sampler adds", UserWarning)
        _fill(error, mass, steps, n, seed)
    return Data(steps=steps, error=error, mass=mass, prior_error=_prior_error(n, seed), n=n)


def _fill(error: Array, mass: Array, steps: tuple[int, ...], n: int, seed: int) -> None:
    """Run every chain, and write its error and mass into (places, etas, posteriors, steps)."""
    shape = error.shape
    runs = progress_bar(
        np.ndindex(shape), "tracker_steps", total=error.size, unit="run", leave=False
    )
    for i, j, k, m in runs:
        eta, posterior = ETAS[j], POSTERIORS[k][2]
        if _same_as_uncorrected(eta, posterior):
            error[i, j, k, m], mass[i, j, k, m] = error[i, j, k - 2, m], mass[i, j, k - 2, m]
            continue
        forbidden = [list(PLACES.values())[i]]
        schedule = NoiseSchedule.linear(1000).respace(steps[m])
        if not isinstance(posterior, ExactPosterior):
            unguided = sample(
                MIXTURE,
                schedule,
                DynamicNegativeGuidance(0.0, posterior),
                n=n,
                forbidden=forbidden,
                sampler=DDIM(eta),
                seed=seed,
            )
            assert unguided.log_posterior is not None
            exact = MIXTURE.log_posterior(unguided.x, forbidden)
            error[i, j, k, m] = np.abs(np.exp(unguided.log_posterior[0]) - np.exp(exact)).mean()
        guided = sample(
            MIXTURE,
            schedule,
            DynamicNegativeGuidance(1.0, posterior),
            n=n,
            forbidden=forbidden,
            sampler=DDIM(eta),
            seed=seed,
        )
        mass[i, j, k, m] = forbidden_mass(guided.x, MIXTURE, forbidden)


def _prior_error(n: int, seed: int) -> Array:
    schedule = NoiseSchedule.linear(1000)
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    x = sigma * np.random.default_rng(seed).standard_normal((n, 1))
    noisy = MIXTURE.diffuse(alpha, sigma)
    return np.array(
        [
            np.abs(MIXTURE.weights[k] - np.exp(noisy.log_posterior(x, [k]))).mean()
            for k in PLACES.values()
        ]
    )


def _same_as_uncorrected(eta: float, posterior: Posterior) -> bool:
    """Whether a divergence correction is zero, as for eta = 1."""
    return eta == 1.0 and getattr(posterior, "divergence", False)


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    return {f"tracker_steps_{place}": _figure(data, i, place) for i, place in enumerate(PLACES)}


def _look(k: int) -> dict[str, Any]:
    _, method, posterior = POSTERIORS[k]
    look = {**method.line, "markersize": 4.5, "markeredgewidth": 1.0}
    if getattr(posterior, "divergence", False):
        look |= {"linestyle": "--", "markerfacecolor": "white"}
    return look


def _figure(data: Data, place: int, name: str) -> Figure:
    figure = Figure(figsize=(style.WIDTH, 4.5), layout="constrained")
    axes = figure.subplots(2, len(ETAS), sharex=True, sharey="row")
    floor = 0.5 / data.n
    for j, (eta, (top, bottom)) in enumerate(zip(ETAS, axes.T, strict=True)):
        for k, (_, method, posterior) in enumerate(POSTERIORS):
            if _same_as_uncorrected(eta, posterior):
                continue
            steps = np.array(data.steps) * BESIDE.get(method, 1.0)
            if not isinstance(posterior, ExactPosterior):
                top.plot(steps, data.error[place, j, k], **_look(k))
            bottom.plot(steps, np.maximum(data.mass[place, j, k], floor), **_look(k))
        top.axhline(data.prior_error[place], **START)
        noise = {1.0: " (DDPM)", 0.0: " (deterministic)"}.get(eta, "")
        style.title(top, "abc"[j], f"$\\eta={eta:g}${noise}")
        style.title(bottom, "def"[j], "")
        for panel in (top, bottom):
            panel.set(xscale="log", yscale="log")
            style.log_ticks(panel.yaxis)
            panel.grid(True)
        bottom.axhspan(floor / 2, 1 / data.n, color=NONE_LEFT, lw=0)
        top.set_ylim(1e-3, 0.4)
        bottom.set_ylim(floor / 2, 0.4)
        bottom.set_xlabel("steps")
        bottom.set_xticks(data.steps, labels=[str(s) for s in data.steps], rotation=45)
        bottom.minorticks_off()
    axes[0, 0].set_ylabel("mean $|$tracked $-$ exact$|$ of\n$p(c\\,|\\,x_0)$, unguided chains")
    axes[1, 0].set_ylabel("forbidden mass left\nat $g=1$")
    figure.suptitle(f"The forbidden mode is an {name} one of four in a row", size=8)
    figure.legend(
        handles=[
            *(Line2D([], [], label=name, **_look(k)) for k, (name, *_) in enumerate(POSTERIORS)),
            Line2D([], [], label="$|$prior $-$ exact$|$ at $t=T$", **START),
            Patch(color=NONE_LEFT, lw=0, label=f"less than 1 in {data.n:,}"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def summary(data: Data) -> str:
    lines = ["mean error of p | forbidden mass left, at 1000 and 50 steps"]
    chosen = [data.steps.index(1000), data.steps.index(50)]
    for i, place in enumerate(PLACES):
        for j, eta in enumerate(ETAS):
            parts = []
            for k, (name, *_) in enumerate(POSTERIORS):
                error, mass = data.error[i, j, k, chosen], data.mass[i, j, k, chosen]
                parts.append(f"{name} {error[0]:.4f} {error[1]:.4f} | {mass[0]:.4f} {mass[1]:.4f}")
            lines.append(f"  {place} mode, eta {eta:g}: {'; '.join(parts)}")
    start = " and ".join(
        f"{error:.4f} ({place})" for place, error in zip(PLACES, data.prior_error, strict=True)
    )
    lines.append(f"  n = {data.n}; mean error already at t = T, from the prior: {start}")
    return "\n".join(lines)
