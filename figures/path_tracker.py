"""Error of the tracked posterior against the number of steps: trackers of steps, and of the path.

Chains are unguided and start exactly, so that the error is the tracker's.  It is the mean over
samples of |tracked - exact| at its worst time of the chain.  The trackers of transitions know the
noise of the step, and assume that of DDPM; with the divergence they are right to first order for
deterministic samplers too.  The path tracker knows neither step nor sampler.  Left: an inner mode
of four in one dimension; then one of six components in eight and in 64 dimensions.

Printed too: what estimates of the divergence, as networks need them, leave of that in 50 steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from dng_math.equations import path_end, path_rate
from dng_math.hadamard import signs_of_row
from dng_math.trackers import LARGEST_WEIGHED, path_way
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
    estimated: dict[str, tuple[float, ...]]  # the same in 50 steps, for ESTIMATED_CASES


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
    points = [_points(case, n // 4, seed) for case in ESTIMATED_CASES]
    estimated = {
        name: tuple(_estimated_error(at, make(at, seed)) for at in points)
        for name, make in ESTIMATES.items()
    }
    return Data(steps=steps, error=error, n=n, estimated=estimated)


# ---------------------------------------------------------------------- estimates of divergences

ESTIMATED_CASES = ("8D", "64D")
ESTIMATED_STEPS = 50
Estimate = Callable[[int, Array], Array]  # from the step and the odds, sigma^2 (div s_c - div s)


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a chain of an isotropic mixture: levels, x, predictions and their Jacobian.

    That of the difference of the scores, times sigma^2, is ``scale (cov_c - cov)``, of the
    components' means with their shares ``of_c`` and ``of_all``.
    """

    alpha: float
    sigma: float
    x: Array
    eps: Array
    apart: Array
    scale: float
    means: Array
    of_c: Array
    of_all: Array

    def times(self, v: Array) -> Array:
        """The Jacobian times vectors (n, D)."""
        found = np.zeros_like(v)
        for sign, shares in ((1.0, self.of_c), (-1.0, self.of_all)):
            along = v @ self.means.T
            along = shares * (along - np.sum(shares * along, axis=1, keepdims=True))
            found += sign * (along @ self.means)
        return self.scale * found

    def trace(self) -> Array:
        """The Jacobian's trace, (n,)."""

        def spread(shares: Array) -> Array:
            return shares @ np.sum(self.means**2, axis=1) - np.sum((shares @ self.means) ** 2, 1)

        return self.scale * (spread(self.of_c) - spread(self.of_all))

    def known(self, v: Array, odds: Array) -> Array:
        """What is taken off the estimate with v: dng_models.pairs.divergence.quieter."""
        return odds * (np.sum(v * self.apart, axis=1) ** 2 - np.sum(self.apart**2, axis=1))

    def estimate(self, v: Array, odds: Array) -> Array:
        return np.sum(v * self.times(v), axis=1) + self.known(v, odds)


@dataclass(frozen=True, eq=False)
class Points:
    """Those of deterministic chains, and the exact posterior at each."""

    chain: list[Point]
    exact: Array
    prior: float
    mixture: GaussianMixture


def _points(case: str, n: int, seed: int) -> Points:
    mixture, forbidden = CASES[case]
    schedule = NoiseSchedule.linear(1000).respace(ESTIMATED_STEPS)
    run = sample(
        mixture, schedule, DynamicNegativeGuidance(0.0, PathTracker()), n=n,
        forbidden=[forbidden], sampler=DDIM(0.0), seed=seed, initial="exact",
        record=["trajectory", "exact"],
    )  # fmt: skip
    assert run.exact is not None and run.trajectory is not None
    c, variance = schedule.coefficients(DDIM(0.0)), mixture.covariances[0]
    chain = []
    for step, x in enumerate(run.trajectory[:-1]):
        alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
        spread = alpha**2 * variance + sigma**2
        shares = mixture.diffuse(alpha, sigma).responsibilities(x)
        of_c = np.zeros_like(shares)
        of_c[:, forbidden] = 1.0
        eps, eps_c = (
            sigma * (x - alpha * each @ mixture.means) / spread for each in (shares, of_c)
        )
        chain.append(
            Point(
                alpha, sigma, x, eps, eps_c - eps, (alpha * sigma / spread) ** 2, mixture.means,
                of_c, shares,
            )
        )  # fmt: skip
    return Points(chain, np.exp(run.exact[:-1, 0]), float(mixture.weights[forbidden]), mixture)


def _estimated_error(points: Points, estimate: Estimate) -> float:
    """Mean |tracked - exact| at its worst time, as for the figure."""
    tracker = PathTracker(prior=points.prior, p_max=P_MAX)
    state = tracker.init(np.full(points.exact.shape[1], points.prior))
    before: Point | None = None
    rate_before, worst = np.zeros_like(state), 0.0
    for step, (at, exact) in enumerate(zip(points.chain, points.exact, strict=True)):
        p = np.minimum(np.exp(tracker.log_posterior(state)), LARGEST_WEIGHED)
        product = np.sum(at.apart * (2.0 * at.eps + at.apart), axis=1)
        rate = path_rate(product, estimate(step, p / (1.0 - p)))
        ends = (-rate, -rate)
        if before is not None:
            way = path_way(before.alpha, before.sigma, at.alpha, at.sigma)
            moved = way.here * at.x + way.there * before.x
            ends = tuple(
                path_end(-factor * end.sigma / end.alpha * np.sum(end.apart * moved, 1), r, weight)
                for factor, end, r, weight in (
                    (way.pull_before, before, rate_before, way.weight_before),
                    (way.pull, at, rate, way.weight),
                )
            )
        state = tracker.update(state, *ends, len(points.chain))
        worst = max(worst, float(np.abs(np.exp(tracker.log_posterior(state)) - exact).mean()))
        before, rate_before = at, rate
    return worst


def _signs(points: Points, seed: int) -> Callable[[], Array]:
    rng = np.random.default_rng(seed)
    return lambda: rng.choice([-1.0, 1.0], size=points.chain[0].x.shape)


def _independent(probes: int) -> Callable[[Points, int], Estimate]:
    def make(points: Points, seed: int) -> Estimate:
        draw = _signs(points, seed)

        def estimate(step: int, odds: Array) -> Array:
            found = [points.chain[step].estimate(draw(), odds) for _ in range(probes)]
            return np.mean(found, axis=0)

        return estimate

    return make


def _row(index: int, length: int) -> Array:
    return signs_of_row(index, np.arange(length), length)


def _rows(probes: int) -> Callable[[Points, int], Estimate]:
    """What the package does."""

    def make(points: Points, seed: int) -> Estimate:
        signs = _signs(points, seed)()

        def estimate(step: int, odds: Array) -> Array:
            rows = [_row(step * probes + i, signs.shape[1]) for i in range(probes)]
            return np.mean([points.chain[step].estimate(signs * row, odds) for row in rows], axis=0)

        return estimate

    return make


def _gaussian(points: Points, seed: int) -> Estimate:
    """A row, less the part of two Gaussians with the covariances of class and data.

    That part is known, and taken off as far as is best over the chains at each step: no estimate of
    the share can do better.
    """
    signs = _signs(points, seed)()
    mixture = points.mixture
    centred = mixture.means - mixture.weights @ mixture.means
    _, lengths, axes = np.linalg.svd(
        np.sqrt(mixture.weights)[:, None] * centred, full_matrices=False
    )

    def estimate(step: int, odds: Array) -> Array:
        at = points.chain[step]
        spread = at.alpha**2 * mixture.covariances[0] + at.sigma**2
        values = at.sigma**2 * (1.0 / (spread + (at.alpha * lengths) ** 2) - 1.0 / spread)
        v = signs * _row(step, signs.shape[1])
        known = (v @ axes.T) ** 2 @ values - values.sum()
        wrong = np.sum(v * at.times(v), axis=1) - at.trace()
        return at.estimate(v, odds) - known * (known @ wrong) / (known @ known)

    return estimate


def _same(points: Points, seed: int) -> Estimate:
    signs = _signs(points, seed)()
    return lambda step, odds: points.chain[step].estimate(signs, odds)


def _from_the_last(points: Points, seed: int) -> Estimate:
    """The last estimate, less half of what it would have been with the new signs."""
    draw = _signs(points, seed)
    last: list[Array] = []

    def estimate(step: int, odds: Array) -> Array:
        v = draw()
        found = points.chain[step].estimate(v, odds)
        if last:
            found = found + 0.5 * (last[0] - points.chain[step - 1].estimate(v, last[1]))
        last[:] = [found, odds]
        return found

    return estimate


def _deflated(points: Points, seed: int) -> Estimate:
    """Exact along the last change of the difference, random across it."""
    draw = _signs(points, seed)

    def estimate(step: int, odds: Array) -> Array:
        at, v = points.chain[step], draw()
        if step == 0:
            return at.estimate(v, odds)
        along = at.apart - points.chain[step - 1].apart
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-300)
        across = v - np.sum(v * along, axis=1, keepdims=True) * along
        size = odds * np.sum(at.apart**2, axis=1)
        return (
            sum(
                np.sum(w * at.times(w), axis=1) + odds * np.sum(w * at.apart, axis=1) ** 2
                for w in (along, across)
            )
            - size
        )

    return estimate


ESTIMATES: dict[str, Callable[[Points, int], Estimate]] = {
    "independent signs, 1 derivative": _independent(1),
    "independent signs, 2": _independent(2),
    "independent signs, 4": _independent(4),
    "rows of a Hadamard matrix, 1": _rows(1),
    "rows of a Hadamard matrix, 2": _rows(2),
    "rows of a Hadamard matrix, 4": _rows(4),
    "a row less the Gaussian part, 1": _gaussian,
    "the same signs at all steps, 1": _same,
    "the last step's as control variate, 2": _from_the_last,
    "exact along the last change, 2": _deflated,
}


# ---------------------------------------------------------------------- the figure


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
    lines.append(
        f"deterministic, {ESTIMATED_STEPS} steps, estimated divergences ({data.n // 4} chains); "
        f"{', '.join(ESTIMATED_CASES)}"
    )
    for name, errors in data.estimated.items():
        lines.append(f"  {name}: {' '.join(f'{value:.4f}' for value in errors)}")
    return "\n".join(lines)
