"""Rules that keep something out, each swept over its strengths, against the exact truth.

A rule is judged by the share of samples that are still forbidden (leak) and by the distance of
the allowed ones to their exact target, at the strength that suits it best and as published.  The
same random numbers without guidance say which samples it had no reason to touch (collateral).
The bounds are DNG with the exact posterior and samples of the target itself, the ideal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy import stats

from dng_math import (
    CRG,
    DDIM,
    SPELL,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    ExactPosterior,
    GaussianMixture,
    GeoGuide,
    ImageReferenced,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    SafeLatentDiffusion,
    sample,
)
from dng_math.distances import (
    TargetDensity1D,
    binomial_interval,
    guided_density,
    sliced_wasserstein,
    wasserstein1,
)
from dng_math.rules import Rule
from dng_models.support.progress import progress_bar
from figures import style
from figures.guidance_1d import MIXTURE
from figures.path_tracker import CASES

Array = NDArray[np.float64]
Labels = NDArray[np.intp]

PAPER = "beyond it"
TITLE = "The league: every rule's leak against its distance, swept, in six exact experiments"
MINUTES = 4

LEAK = 0.01  # at which rules are compared
FAR = 1e-4  # of a component's own samples are called outside of it
DIRECTIONS = 32  # of the sliced distance
GROUPS = 10  # of the jackknife
IMAGES = 16  # of the forbidden, for the rule that is given images
SAMPLERS = {"ancestral": 1.0, "deterministic": 0.0}
SHOWN_STEPS = 50
MANY_STEPS = 1000  # in one dimension only, for time
STEPS = (MANY_STEPS, SHOWN_STEPS, 10)
QUICK_STEPS = (SHOWN_STEPS,)
UNGUIDED: dict[str, Any] = {"color": style.GREY, "marker": "v", "markersize": 6}
IDEAL: dict[str, Any] = {"color": style.BLACK, "lw": 0.9, "ls": "-"}
NONE_LEFT = "#E8E8E8"


@dataclass(frozen=True, eq=False)
class Experiment:
    """A mixture, its classes (K,) and which class is forbidden."""

    mixture: GaussianMixture
    classes: Labels
    unwanted: int

    @property
    def forbidden(self) -> list[int]:
        return np.flatnonzero(self.classes == self.unwanted).tolist()

    @property
    def allowed(self) -> list[int]:
        return np.flatnonzero(self.classes != self.unwanted).tolist()

    @property
    def centre(self) -> Array:
        """Mean of the forbidden components, shape (D,)."""
        return self.mixture.means[self.forbidden].mean(axis=0)

    @property
    def gap(self) -> float:
        """Distance from there to the nearest allowed component."""
        apart = self.mixture.means[self.allowed] - self.centre
        return float(np.linalg.norm(apart, axis=1).min())

    def posterior(self, x: Array) -> Array:
        """p(class | x), shape (N, classes)."""
        logs = [
            self.mixture.log_posterior(x, np.flatnonzero(self.classes == c).tolist())
            for c in range(self.classes.max() + 1)
        ]
        return np.exp(np.stack(logs, axis=1))

    def outside(self, x: Array) -> NDArray[np.bool_]:
        """Whether x is farther from every component than all but ``FAR`` of its samples."""
        squares = np.stack([np.sum((x - mean) ** 2, axis=1) for mean in self.mixture.means])
        within = squares / np.asarray(self.mixture.covariances).reshape(-1, 1)
        outside: NDArray[np.bool_] = within.min(axis=0) > stats.chi2.isf(FAR, x.shape[1])
        return outside


def _ring(count: int, radius: float, dimensions: int) -> Array:
    """Points on a circle, (count, D); in three dimensions it rises and falls twice."""
    angle = 2 * np.pi * np.arange(count) / count
    points = [radius * np.cos(angle), radius * np.sin(angle), np.cos(2 * angle)]
    return np.stack(points[:dimensions], axis=1)


def _separate(mixture: GaussianMixture, unwanted: int) -> Experiment:
    return Experiment(mixture, np.arange(len(mixture.weights)), unwanted)


def _equal(means: Array, deviation: float) -> GaussianMixture:
    count = len(means)
    return GaussianMixture(np.full(count, 1 / count), means, [deviation**2] * count)


def _checkerboard() -> Experiment:
    """The black cells of a board of 4 x 4, each of 3 x 3 components; an inner one is forbidden."""
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    spots = 2 / 3 * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    means = np.concatenate([2 * np.array(cell) - 3 + spots for cell in cells])
    return Experiment(_equal(means, 0.25), np.repeat(np.arange(8), 9), cells.index((1, 1)))


EXPERIMENTS: dict[str, Experiment] = {
    "1D, inner mode": _separate(MIXTURE, 1),
    "1D, outer mode": _separate(MIXTURE, 0),
    "2D, ring of 8": _separate(_equal(_ring(8, 3.0, 2), 0.25), 0),
    "2D, checkerboard": _checkerboard(),
    "3D, ring of 12": _separate(_equal(_ring(12, 4.0, 3), 0.3), 0),
    "64D, six": _separate(*CASES["64D"]),
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A rule of the league.

    Attributes
    ----------
    name, look : str, style.Method
        In print and in the figure.
    knob, strengths : str, tuple of float
        What is swept and its values, weakest first.
    make : callable
        The rule of an experiment and a strength.
    published : float, optional
        The strength that its authors use, one of ``strengths``.
    evaluations : int
        Of networks in a step, with no classifier-free guidance beneath; a derivative of one
        counts as one.
    cfg_scale : float, optional
        Of classifier-free guidance towards everything, for the rule that insists on it.
    """

    name: str
    look: style.Method
    knob: str
    strengths: tuple[float, ...]
    make: Callable[[Experiment, float], Rule]
    published: float | None
    evaluations: int
    cfg_scale: float | None = None


def _dng(
    posterior: ExactPosterior | PaperTracker | LogOddsTracker | PathTracker,
) -> Callable[[Experiment, float], Rule]:
    return lambda _, g: DynamicNegativeGuidance(g, posterior)


def _images(experiment: Experiment, g: float) -> Rule:
    """Examples of the forbidden, the same in every chain, under a kernel by Silverman's rule."""
    mixture, forbidden = experiment.mixture, experiment.forbidden
    points = mixture.restrict(forbidden).sample(IMAGES, np.random.default_rng(0))
    narrower = (4 / ((mixture.dim + 2) * IMAGES)) ** (1 / (mixture.dim + 4))
    bandwidth = narrower * float(points.std(axis=0, ddof=1).mean())
    return ImageReferenced(points, float(mixture.weights[forbidden].sum()), g, bandwidth)


PUSHES = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.5)
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
LEAGUE: tuple[Entry, ...] = (
    Entry("DNG, exact", style.DNG_EXACT, "g", SCALES, _dng(ExactPosterior()), 1.0, 2),
    Entry("DNG, paper's", style.DNG_PAPER, "g", SCALES, _dng(PaperTracker()), 1.0, 2),
    Entry("DNG, log-odds", style.DNG_LOG_ODDS, "g", SCALES, _dng(LogOddsTracker()), 1.0, 2),
    Entry("DNG, path", style.DNG_PATH, "g", SCALES, _dng(PathTracker()), 1.0, 4),
    Entry(
        "DNG, 16 images",
        style.Method("DNG, 16 images", "#8C564B", "-", "*"),
        "g",
        SCALES,
        _images,
        None,
        1,
    ),
    Entry("NP", style.NP, "scale", PUSHES, lambda _, g: NegativePrompting(g), 1.0, 2),
    Entry(
        "SLD, medium",
        style.SLD,
        "scale",
        PUSHES,
        # Its warm-up of ten steps is all of the shortest chains.
        lambda _, g: replace(SafeLatentDiffusion.preset("medium", g), warmup_steps=0),
        7.5,
        2,
    ),
    Entry("CCFG", style.CCFG, "w", PUSHES, lambda _, w: ContrastiveCFG(w, 0.2), 7.5, 2),
    Entry(
        "GeoGuide",
        style.Method("GeoGuide", style.BLUE, "--", "<"),
        "kappa",
        (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
        lambda _, kappa: GeoGuide(kappa),
        None,
        2,
    ),
    Entry(
        "CRG",
        style.Method("CRG", "#E377C2", "--", "h"),
        "-CP",
        (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        lambda _, below: CRG(threshold=-below),
        0.0,
        2,
        cfg_scale=1.0,
    ),
    Entry(
        "SPELL",
        style.Method("SPELL", "#7F7F00", "-", ">"),
        "radius",
        (0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2),
        lambda experiment, share: SPELL(experiment.centre[None], share * experiment.gap),
        None,
        1,
    ),
)


@dataclass(frozen=True)
class Case:
    """A chain: name of the experiment, of the sampler, number of steps."""

    experiment: str
    sampler: str
    steps: int


@dataclass(frozen=True, eq=False)
class Curve:
    """One rule in one case, over its S strengths; counts are of samples."""

    leaked: Labels  # (S,), of n
    distance: Array  # (S,)
    hurt: Labels  # (S,), of ``kept``
    left: Labels  # (S,), of n, outside of the data
    error: dict[int, float]  # standard error of the distance, at the strengths that are printed


@dataclass(frozen=True, eq=False)
class Result:
    """All of one case."""

    curves: tuple[Curve, ...]  # as LEAGUE
    kept: int  # samples that are allowed and in the data without guidance
    unguided: tuple[int, float]  # leaked, distance
    ideal: tuple[int, float]


@dataclass(frozen=True, eq=False)
class Data:
    """All results, and the samples of each chain."""

    cases: dict[Case, Result]
    n: int


def compute(quick: bool, seed: int) -> Data:
    n = 1000 if quick else 4000
    cases = [
        Case(name, sampler, steps)
        for name, experiment in EXPERIMENTS.items()
        for sampler in SAMPLERS
        for steps in (QUICK_STEPS if quick else STEPS)
        if steps < MANY_STEPS or experiment.mixture.dim == 1
    ]
    # The warning says that trackers of transitions are wrong for eta < 1, which the league shows.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sampler adds", UserWarning)
        done = progress_bar(cases, "league", unit="case", leave=False)
        return Data({case: _result(case, n, seed) for case in done}, n)


class _Judge:
    """The measures of one experiment: what is allowed is what is so with p(c|x) < 1/2."""

    def __init__(self, experiment: Experiment, n: int, seed: int) -> None:
        self.experiment = experiment
        rng = np.random.default_rng([seed, 1])
        target = experiment.mixture.restrict(experiment.allowed)
        self.density: TargetDensity1D | None = None
        if experiment.mixture.dim == 1:
            self.density = guided_density(experiment.mixture, experiment.forbidden, 1.0)
        self.target, ideal = target.sample(n, rng), target.sample(n, rng)
        self.target = self.target[~self.leaks(experiment.posterior(self.target))]
        leaks = self.leaks(experiment.posterior(ideal))
        self.ideal = int(leaks.sum()), self.distance(ideal[~leaks])

    def leaks(self, posterior: Array) -> NDArray[np.bool_]:
        leaks: NDArray[np.bool_] = posterior[:, self.experiment.unwanted] > 0.5
        return leaks

    def distance(self, allowed: Array) -> float:
        """Of allowed samples to their target: W1, sliced beyond one dimension."""
        if len(allowed) == 0:
            return np.inf
        if self.density is not None:
            return wasserstein1(allowed[:, 0], self.density)
        return sliced_wasserstein(allowed, self.target, DIRECTIONS)

    def error(self, allowed: Array) -> float:
        """Standard error of the distance: the delete-a-group jackknife."""
        group = np.arange(len(allowed)) % GROUPS
        values = [self.distance(allowed[group != g]) for g in range(GROUPS)]
        return float(np.sqrt((GROUPS - 1) * np.var(values)))


def _result(case: Case, n: int, seed: int) -> Result:
    experiment = EXPERIMENTS[case.experiment]
    judge = _Judge(experiment, n, seed)
    schedule = NoiseSchedule.linear(1000).respace(case.steps)
    everything = list(range(len(experiment.classes)))

    def run(rule: Rule | None, cfg_scale: float | None = None) -> Array:
        return sample(
            experiment.mixture,
            schedule,
            rule,
            n=n,
            forbidden=None if rule is None else experiment.forbidden,
            positive=None if cfg_scale is None else everything,
            cfg_scale=cfg_scale,
            sampler=DDIM(SAMPLERS[case.sampler]),
            seed=seed,
        ).x

    unguided = run(None)
    posterior = experiment.posterior(unguided)
    classes, leaks = posterior.argmax(axis=1), judge.leaks(posterior)
    fine = ~leaks & ~experiment.outside(unguided)
    curves = []
    for entry in LEAGUE:
        shape = len(entry.strengths)
        leaked, hurt, left = (np.zeros(shape, dtype=np.intp) for _ in range(3))
        distance, allowed = np.zeros(shape), []
        for i, strength in enumerate(entry.strengths):
            x = run(entry.make(experiment, strength), entry.cfg_scale)
            posterior, outside = experiment.posterior(x), experiment.outside(x)
            leaked[i], left[i] = judge.leaks(posterior).sum(), outside.sum()
            hurt[i] = (fine & (outside | (posterior.argmax(axis=1) != classes))).sum()
            allowed.append(x[~judge.leaks(posterior)])
            distance[i] = judge.distance(allowed[-1])
        printed = {_best(leaked / n, distance), _as_published(entry)}
        error = {i: judge.error(allowed[i]) for i in printed if i is not None}
        curves.append(Curve(leaked, distance, hurt, left, error))
    return Result(
        curves=tuple(curves),
        kept=int(fine.sum()),
        unguided=(int(leaks.sum()), judge.distance(unguided[~leaks])),
        ideal=judge.ideal,
    )


def _best(leak: Array, distance: Array) -> int | None:
    """Index of the nearest strength that leaks no more than ``LEAK``, if there is one."""
    safe = np.flatnonzero(leak <= LEAK)
    return int(safe[distance[safe].argmin()]) if len(safe) else None


def _as_published(entry: Entry) -> int | None:
    return None if entry.published is None else entry.strengths.index(entry.published)


def best(data: Data, case: Case, k: int) -> int | None:
    """Index of the strength of rule k that is nearest to the target at a leak of 1 %, if any."""
    curve = data.cases[case].curves[k]
    return _best(curve.leaked / data.n, curve.distance)


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Leak against distance at 50 steps, a panel for each experiment and sampler."""
    figure = Figure(figsize=(style.WIDTH, 8.4), layout="constrained")
    axes = figure.subplots(4, 3, sharex=True)
    floor = 0.5 / data.n
    for i, name in enumerate(EXPERIMENTS):
        pair = axes[2 * (i // 3) : 2 * (i // 3) + 2, i % 3]
        for panel, sampler in zip(pair, SAMPLERS, strict=True):
            result = data.cases[Case(name, sampler, SHOWN_STEPS)]
            for entry, curve in zip(LEAGUE, result.curves, strict=True):
                panel.plot(np.maximum(curve.leaked / data.n, floor), curve.distance, **_look(entry))
            leaked, distance = result.unguided
            panel.plot(leaked / data.n, distance, ls="", **UNGUIDED)
            panel.axhline(result.ideal[1], **IDEAL)
            panel.axvspan(floor / 1.6, 1 / data.n, color=NONE_LEFT, lw=0)
            panel.axvline(LEAK, color=style.GREY, lw=0.6, ls="--", zorder=0)
            panel.set(xscale="log", yscale="log", xlim=(floor / 1.6, 0.5))
            low = 0.7 * min(result.ideal[1], *(c.distance.min() for c in result.curves))
            panel.set_ylim(low, max(100 * low, 12 * distance))
            style.log_ticks(panel.yaxis)
            panel.grid(True)
            number = list(axes.T.flat).index(panel)
            row, column = number % 4, number // 4
            style.title(panel, "abcdefghijkl"[3 * row + column], f"{name},\n{sampler}")
    for panel in axes[:, 0]:
        panel.set_ylabel("distance of the allowed")
    for panel in axes[-1]:
        panel.set_xlabel("leak: forbidden share")
    figure.legend(
        handles=[
            *(Line2D([], [], label=entry.look.label, **_look(entry)) for entry in LEAGUE),
            Line2D([], [], label="unguided", ls="", **UNGUIDED),
            Line2D([], [], label="ideal: the target's own samples", **IDEAL),
            Patch(color=NONE_LEFT, lw=0, label=f"leak less than 1 in {data.n:,}"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return {"league": figure}


def _look(entry: Entry) -> dict[str, Any]:
    first = entry.look is style.DNG_EXACT
    return {
        **entry.look.line,
        "markersize": 5.5 if first else 3.5,
        "lw": 1.0,
        "zorder": 4 if first else 3 if entry.name.startswith("DNG") else 2,
    }


def _cell(data: Data, case: Case, k: int, i: int) -> str:
    """Strength, leak with its interval, distance with its error, collateral, share outside."""
    entry, result = LEAGUE[k], data.cases[case]
    curve = result.curves[k]
    low, high = binomial_interval(int(curve.leaked[i]), data.n)
    return (
        f"{entry.knob} {entry.strengths[i]:g}: leak {curve.leaked[i] / data.n:.4f} "
        f"[{low:.4f}, {high:.4f}], distance {curve.distance[i]:.3f} +- {1.96 * curve.error[i]:.3f},"
        f" collateral {curve.hurt[i] / result.kept:.3f}, outside {curve.left[i] / data.n:.3f}"
    )


def _overall(data: Data, k: int, sampler: str, steps: int) -> str:
    """In how many cases a rule reaches the leak, and its medians there."""
    chosen = [case for case in data.cases if (case.sampler, case.steps) == (sampler, steps)]
    found = {case: i for case in chosen if (i := best(data, case, k)) is not None}
    if not found:
        return f"0 of {len(chosen)}"
    results = {case: data.cases[case] for case in found}
    ratio = np.median([r.curves[k].distance[found[c]] / r.ideal[1] for c, r in results.items()])
    hurt = np.median([r.curves[k].hurt[found[c]] / r.kept for c, r in results.items()])
    return f"{len(found)} of {len(chosen)}, {ratio:.1f} x, {hurt:.3f}"


def summary(data: Data) -> str:
    """First the medians, then every case at a leak of 1 % and as published."""
    lines = [
        f"n = {data.n}; at a leak of {LEAK:.0%} or less, at the strength that is then nearest: "
        "cases that reach it, median distance in units of the ideal's, median collateral"
    ]
    for steps in sorted({case.steps for case in data.cases}, reverse=True):
        for sampler in SAMPLERS:
            lines.append(f"{steps} steps, {sampler}")
            lines += [
                f"  {entry.name} ({entry.evaluations} a step): {_overall(data, k, sampler, steps)}"
                for k, entry in enumerate(LEAGUE)
            ]
    for case, result in data.cases.items():
        told = (
            f"{name} leak {leaked / data.n:.4f}, distance {distance:.3f}"
            for name, (leaked, distance) in (
                ("unguided", result.unguided),
                ("ideal", result.ideal),
            )
        )
        lines.append(f"{case.experiment}, {case.sampler}, {case.steps} steps: {'; '.join(told)}")
        for k, entry in enumerate(LEAGUE):
            at, published = best(data, case, k), _as_published(entry)
            cell = f"leaks more at every {entry.knob}" if at is None else _cell(data, case, k, at)
            if published is not None and published != at:
                cell += f" | published {_cell(data, case, k, published)}"
            lines.append(f"  {entry.name}: {cell}")
    return "\n".join(lines)
