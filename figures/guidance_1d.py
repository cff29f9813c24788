"""The effect of each guidance in one dimension, where the target is known exactly.

All guidance scales are 1, as in the paper.  CFG towards everything that is allowed and DNG with the
exact posterior are then the same rule: s + (s_allowed - s) = s - p/(1-p) (s_c - s).  DNG reaches
the target without a model of what is allowed.

Every panel runs the same particles with the same noise, so a line starts at the same point
everywhere, and its colour says where it would have ended without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dng_math import (
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    GaussianMixture,
    NegativePrompting,
    NoiseSchedule,
    Unguided,
    sample,
)
from dng_math.distances import (
    forbidden_mass,
    guided_density,
    ks_critical_value,
    ks_statistic,
    wasserstein1,
)
from dng_math.rules import Rule
from dng_models.support.progress import progress_bar
from figures import style

Array = NDArray[np.float64]

PAPER = "Fig. 1"
TITLE = "Guidance in one dimension: trajectories, densities over time and final histograms"

# The figures on posteriors and trackers use this mixture too.
MEANS = (-3.0, -1.0, 1.0, 3.0)
DEVIATION = 0.2
MIXTURE = GaussianMixture([0.25] * 4, np.array(MEANS)[:, None], [DEVIATION**2] * 4)
FORBIDDEN = 1

METHODS: tuple[tuple[str, style.Method, Rule], ...] = (
    ("unguided", style.UNGUIDED, Unguided()),
    ("CFG towards all\nthat is allowed, $\\lambda=1$", style.CFG, ClassifierFreeGuidance(1.0)),
    ("negative prompting,\n$\\lambda=1$", style.NP, NegativePrompting(1.0)),
    (
        "DNG, exact posterior,\n$\\lambda=p/(1-p)$: equals $\\mathbf{b}$",
        style.DNG_EXACT,
        DynamicNegativeGuidance(1.0),
    ),
)

STEPS = 1000
STRIDE = 4  # steps between two rows of the images
LINES = 15
X_MIN, X_MAX, BIN = -6.5, 8.5, 0.05
CHUNK = 10_000  # particles whose whole trajectories are in memory at once


@dataclass(frozen=True, eq=False)
class Panel:
    """Results of one method; T rows of time, X bins, L lines."""

    title: str
    method: style.Method
    density: Array  # (T, X), of x_t
    lines: Array  # (T, L)
    samples: Array  # (N,), of x_0
    forbidden_mass: float
    ks: float
    w1: float


@dataclass(frozen=True, eq=False)
class Data:
    """All panels, and the data that they share."""

    panels: tuple[Panel, ...]
    time: Array  # (T,), from 1 to 0
    edges: Array  # (X + 1,)
    heads_for_forbidden: NDArray[np.bool_]  # (L,), without guidance
    target_x: Array
    target_density: Array
    ks_critical: float  # what chance explains, at a false-alarm rate of 1e-6
    cfg_minus_dng: float  # largest difference between their samples
    n: int


def _run(rule: Rule, n: int, seed: int, edges: Array) -> tuple[Array, Array, Array]:
    """Density over time (T, X), lines (T, L) and samples (N,)."""
    bins = len(edges) - 1
    counts = np.zeros((STEPS // STRIDE + 1, bins))
    lines = np.empty((0, 0))
    samples = []
    for first in range(0, n, CHUNK):
        result = sample(
            MIXTURE,
            NoiseSchedule.linear(STEPS),
            rule,
            n=min(CHUNK, n - first),
            forbidden=[FORBIDDEN],
            seed=seed,
            first_sample=first,
            record=("trajectory",),
        )
        assert result.trajectory is not None
        x = result.trajectory[::STRIDE, :, 0]
        place = np.floor((x - edges[0]) / BIN).astype(np.intp)
        for row, places in zip(counts, place, strict=True):
            row += np.bincount(places[(places >= 0) & (places < bins)], minlength=bins)
        if first == 0:
            lines = x[:, :LINES].copy()
        samples.append(result.x[:, 0])
    return counts / (n * BIN), lines, np.concatenate(samples)


def compute(quick: bool, seed: int) -> Data:
    n = 20_000 if quick else 100_000
    edges = np.linspace(X_MIN, X_MAX, round((X_MAX - X_MIN) / BIN) + 1)
    target = guided_density(MIXTURE, [FORBIDDEN], 1.0)
    panels = []
    for title, method, rule in progress_bar(METHODS, "guidance_1d", unit="chain", leave=False):
        density, lines, samples = _run(rule, n, seed, edges)
        if isinstance(rule, Unguided):
            density = _exact_density(0.5 * (edges[1:] + edges[:-1]))
        panels.append(
            Panel(
                title=title,
                method=method,
                density=density,
                lines=lines,
                samples=samples,
                forbidden_mass=forbidden_mass(samples[:, None], MIXTURE, [FORBIDDEN]),
                ks=ks_statistic(samples, target.cdf),
                w1=wasserstein1(samples, target),
            )
        )
    ends = panels[0].lines[-1][:, None]
    samples_of = {panel.method: panel.samples for panel in panels}
    target_x = np.linspace(X_MIN, X_MAX, 1501)
    return Data(
        panels=tuple(panels),
        time=np.linspace(1.0, 0.0, STEPS // STRIDE + 1),
        edges=edges,
        heads_for_forbidden=MIXTURE.log_posterior(ends, [FORBIDDEN]) > np.log(0.5),
        target_x=target_x,
        target_density=target.pdf(target_x),
        ks_critical=ks_critical_value(n, 1e-6),
        cfg_minus_dng=float(np.abs(samples_of[style.CFG] - samples_of[style.DNG_EXACT]).max()),
        n=n,
    )


def _exact_density(x: Array) -> Array:
    """The forward process's marginal, which is the unguided chain's too, on the rows of time."""
    schedule = NoiseSchedule.linear(STEPS)
    levels = zip(schedule.alpha[::-STRIDE], schedule.sigma[::-STRIDE], strict=True)
    return np.array(
        [np.exp(MIXTURE.diffuse(alpha, sigma).log_prob(x[:, None])) for alpha, sigma in levels]
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    figure = Figure(figsize=(style.WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, len(data.panels), sharex=True, sharey="row", height_ratios=(1.9, 1.0))
    band = MEANS[FORBIDDEN] - 4 * DEVIATION, MEANS[FORBIDDEN] + 4 * DEVIATION
    norm = PowerNorm(0.5, 0.0, 0.7)
    for panel, letter, (top, bottom) in zip(data.panels, "abcd", axes.T, strict=True):
        top.imshow(
            panel.density,
            extent=(X_MIN, X_MAX, 0.0, 1.0),
            aspect="auto",
            cmap="Greys",
            norm=norm,
            interpolation="bilinear",
        )
        for line, forbidden in zip(panel.lines.T, data.heads_for_forbidden, strict=True):
            color = style.FORBIDDEN if forbidden else style.BLUE
            top.plot(line, data.time, color=color, lw=0.6, zorder=3 if forbidden else 2)
        style.title(top, letter, panel.title)

        bottom.axvspan(*band, color=style.FORBIDDEN, alpha=0.15, lw=0)
        heights = np.histogram(panel.samples, data.edges)[0] / (data.n * BIN)
        bottom.stairs(heights, data.edges, fill=True, color=panel.method.color, alpha=0.55)
        bottom.plot(data.target_x, data.target_density, color=style.TARGET, lw=0.8)
        bottom.set_title(
            f"forbidden mass {panel.forbidden_mass:.3f}\nKS {panel.ks:.3f}, $W_1$ {panel.w1:.3f}",
            size=7,
        )
        bottom.set_xlabel("$x$")
        bottom.set_xlim(X_MIN, X_MAX)
    axes[0, 0].set_ylabel("diffusion time $t/T$")
    axes[1, 0].set_ylabel("density at $t=0$")
    figure.colorbar(
        ScalarMappable(norm, "Greys"), ax=axes[0], label="density of $x_t$", fraction=0.05, pad=0.01
    )
    figure.legend(
        handles=[
            Line2D([], [], color=style.BLUE, lw=1, label="path, allowed if unguided"),
            Line2D([], [], color=style.FORBIDDEN, lw=1, label="path, forbidden if unguided"),
            Line2D(
                [], [], color=style.TARGET, lw=1, label="exact target $p(x\\,|\\,$not forbidden$)$"
            ),
            Patch(color=style.FORBIDDEN, alpha=0.15, lw=0, label="forbidden mode"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return {"guidance_1d": figure}


def summary(data: Data) -> str:
    parts = [
        f"{panel.method.label}: forbidden {panel.forbidden_mass:.4f}, "
        f"KS {panel.ks:.4f}, W1 {panel.w1:.4f}"
        for panel in data.panels
    ]
    chance = f"n = {data.n}, for which chance explains KS up to {data.ks_critical:.4f}"
    same = f"samples of CFG and exact DNG differ by at most {data.cfg_minus_dng:.1e}"
    return f"{'; '.join(parts)} ({chance}); {same}"
