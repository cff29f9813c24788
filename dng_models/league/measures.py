"""What is measured of a rule in a chain: leak, distance, classes, collateral, outside."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from dng_math import DDIM, NoiseSchedule, sample
from dng_math.distances import (
    TargetDensity1D,
    frechet_distance,
    guided_density,
    kl_categorical,
    sliced_wasserstein,
    wasserstein1,
)
from dng_math.rules import Rule
from dng_math.weights import systematic
from dng_models.league.entries import Entry
from dng_models.league.experiments import Array, Experiment, Labels, experiment

DIRECTIONS = 32  # of the sliced distance
GROUPS = 10  # of the jackknife
PSEUDOCOUNT = 0.5  # an empty class would make the divergence infinite
BEYOND = 1e9  # what is farther counts as this far: some pushes overflow
SAMPLERS = {"ancestral": 1.0, "deterministic": 0.0}


@dataclass(frozen=True)
class Case:
    """A chain: name of the experiment, of the sampler, number of steps."""

    experiment: str
    sampler: str
    steps: int


@dataclass(frozen=True, eq=False)
class Curve:
    """One rule in one case, over S strengths; counts are of samples.

    Attributes
    ----------
    strengths : tuple of float
    leaked, left : ndarray of int, shape (S,)
        Of all samples, the forbidden ones and those outside of the data.
    hurt : ndarray of int, shape (S,), or None
        Of those that are allowed and in the data without guidance, how many changed their class
        or left.  None for samples that have no unguided counterpart.
    distance, kl : ndarray, shape (S,)
    frechet : ndarray, shape (S,), or None
    error : dict
        Standard error of the distance, at the strengths (their indices) where it is asked for.
    evaluations : ndarray, shape (S,), or None
        Of networks in a step, the mean over samples and steps, where the samples decide.
    """

    strengths: tuple[float, ...]
    leaked: Labels
    left: Labels
    hurt: Labels | None
    distance: Array
    kl: Array
    frechet: Array | None
    error: dict[int, float] = field(default_factory=dict)
    evaluations: Array | None = None

    @property
    def nearness(self) -> Array:
        """What tells the nearest strength, (S,): the distance, or Frechet's where there is one.

        A tenth of forbidden digits moves the sliced distance by less than its error.
        """
        return self.distance if self.frechet is None else self.frechet

    def best(self, n: int, limit: float) -> int | None:
        """Index of the nearest strength that leaks no more than the limit, if there is one."""
        return nearest(self.leaked / n, self.nearness, limit)


def nearest(leak: Array, distance: Array, limit: float) -> int | None:
    """Index of the least distance whose leak is within the limit, if there is one."""
    safe = np.flatnonzero(leak <= limit)
    return int(safe[distance[safe].argmin()]) if len(safe) else None


class Judge:
    """The measures of one experiment: what is allowed is what is so with p(c|x) < 1/2.

    Parameters
    ----------
    experiment : Experiment
    n : int
        Samples of the target that others are compared with, and of the ideal.
    seed : int
    """

    def __init__(self, experiment: Experiment, n: int, seed: int) -> None:
        self.experiment = experiment
        rng = np.random.default_rng([seed, 1])
        self.density: TargetDensity1D | None = None
        if experiment.mixture.dim == 1:
            self.density = guided_density(experiment.mixture, experiment.forbidden, 1.0)
        self.moments = experiment.moments if experiment.pixels else None
        self.target = experiment.target.sample(n, rng)
        self.ideal = experiment.target.sample(n, rng)
        self.target = self.target[~experiment.leaks(experiment.posterior(self.target))]

    def distance(self, allowed: Array) -> float:
        """Of allowed samples (M, D) to their target: W1, sliced beyond one dimension."""
        if len(allowed) == 0:
            return np.inf
        if self.density is not None:
            return wasserstein1(allowed[:, 0], self.density)
        return sliced_wasserstein(allowed, self.target, DIRECTIONS)

    def error(self, allowed: Array) -> float:
        """Standard error of the distance: the delete-a-group jackknife."""
        group = np.arange(len(allowed)) % GROUPS
        values = [self.distance(allowed[group != g]) for g in range(GROUPS)]
        if not np.isfinite(values).all():
            return np.inf
        return float(np.sqrt((GROUPS - 1) * np.var(values)))

    def kl(self, classes: Labels) -> float:
        """KL(target's shares || those of the classes (M,) of allowed samples), in nats."""
        if len(classes) == 0:
            return np.inf
        wanted = np.arange(len(self.experiment.shares)) != self.experiment.unwanted
        counts = np.bincount(classes, minlength=len(wanted))
        return kl_categorical(self.experiment.shares[wanted], counts[wanted], PSEUDOCOUNT)

    def frechet(self, allowed: Array) -> float | None:
        """Squared Frechet distance of pixels to the target's exact moments; None without any."""
        if self.moments is None:
            return None
        return frechet_distance(allowed, self.moments) if len(allowed) > 1 else np.inf


class Stage:
    """A case with its judge and its unguided samples, on which rules are measured.

    Parameters
    ----------
    case : Case
    n : int
        Samples of a chain.
    seed : int
    threads : int, optional
        Of the chains; default all cores.
    """

    def __init__(self, case: Case, n: int, seed: int, threads: int | None = None) -> None:
        self.case, self.n, self.seed, self.threads = case, n, seed, threads
        self.experiment = experiment(case.experiment)
        self.judge = Judge(self.experiment, n, seed)
        self.schedule = NoiseSchedule.linear(1000).respace(case.steps)
        self._x, _ = self._run(None, None)
        posterior = self.experiment.posterior(self._x)
        self._classes, leaks = posterior.argmax(axis=1), self.experiment.leaks(posterior)
        self._fine = ~leaks & ~self.experiment.outside(self._x)

    @property
    def kept(self) -> int:
        """Samples that are allowed and in the data without guidance."""
        return int(self._fine.sum())

    @cached_property
    def unguided(self) -> Curve:
        """The unguided chain, as a curve of one strength."""
        return self._measured((0.0,), [self._x], np.zeros(1, dtype=np.intp))

    @cached_property
    def ideal(self) -> Curve:
        """Independent samples of the target, as a curve of one strength."""
        return self._measured((0.0,), [self.judge.ideal], None)

    def curve(
        self, entry: Entry, strengths: tuple[float, ...], *, every_error: bool, limit: float
    ) -> Curve:
        """Run a rule at some strengths.

        Parameters
        ----------
        entry : Entry
        strengths : tuple of float
            S of the entry's.
        every_error : bool
            Whether to find the error of every distance, or of the published strength and of the
            nearest one that leaks no more than ``limit`` alone.
        limit : float
        """
        runs = [self._run(entry, entry.make(self.experiment, value)) for value in strengths]
        ends, pushed = [x for x, _ in runs], [share for _, share in runs if share is not None]
        hurt = None
        if entry.weights is None:
            hurt = np.array([self._hurt(x) for x in ends], dtype=np.intp)
        curve = self._measured(strengths, ends, hurt)
        if entry.evaluations is None:
            curve = replace(curve, evaluations=1.0 + np.array(pushed))
        wanted = {curve.best(self.n, limit), published(entry, strengths)} - {None}
        for i in range(len(strengths)) if every_error else wanted:
            assert i is not None
            curve.error[i] = self.judge.error(self._allowed(ends[i]))
        return curve

    def _run(self, entry: Entry | None, rule: Rule | None) -> tuple[Array, float | None]:
        """The samples, and of an entry whose cost is measured the share of steps that push."""
        measured = entry is not None and entry.evaluations is None
        everything = list(range(len(self.experiment.classes)))
        cfg_scale = None if entry is None else entry.cfg_scale
        # The warning says that trackers of transitions are wrong for eta < 1: the league shows it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the sampler adds", UserWarning)
            result = sample(
                self.experiment.mixture,
                self.schedule,
                rule,
                n=self.n,
                forbidden=None if rule is None else self.experiment.forbidden,
                positive=None if cfg_scale is None else everything,
                cfg_scale=cfg_scale,
                sampler=DDIM(SAMPLERS[self.case.sampler]),
                seed=self.seed,
                threads=self.threads,
                engine="fused" if entry is None else entry.engine,
                weights=None if entry is None else entry.weights,
                record=("scale",) if measured else (),
            )
        x = np.nan_to_num(result.x, nan=BEYOND, posinf=BEYOND, neginf=-BEYOND)
        if result.log_weights is not None:
            u = np.random.default_rng([self.seed, 2]).random()
            x = x[systematic(result.log_weights, u)]
        pushes = None if result.scale is None else float(np.mean(result.scale != 0))
        return np.clip(x, -BEYOND, BEYOND), pushes

    def _allowed(self, x: Array) -> Array:
        allowed: Array = x[~self.experiment.leaks(self.experiment.posterior(x))]
        return allowed

    def _hurt(self, x: Array) -> int:
        classes = self.experiment.posterior(x).argmax(axis=1)
        return int((self._fine & (self.experiment.outside(x) | (classes != self._classes))).sum())

    def _measured(
        self, strengths: tuple[float, ...], ends: list[Array], hurt: Labels | None
    ) -> Curve:
        leaked, left = (np.zeros(len(ends), dtype=np.intp) for _ in range(2))
        distance, kl = np.zeros(len(ends)), np.zeros(len(ends))
        frechet = []
        for i, x in enumerate(ends):
            posterior = self.experiment.posterior(x)
            leaks = self.experiment.leaks(posterior)
            leaked[i], left[i] = leaks.sum(), self.experiment.outside(x).sum()
            distance[i] = self.judge.distance(x[~leaks])
            kl[i] = self.judge.kl(posterior[~leaks].argmax(axis=1))
            frechet.append(self.judge.frechet(x[~leaks]))
        of_pixels = [value for value in frechet if value is not None]
        return Curve(
            strengths, leaked, left, hurt, distance, kl, np.array(of_pixels) if of_pixels else None
        )


def runs(entry: Entry, case: Case) -> bool:
    """Whether a rule takes part in a case.

    Weights need noise, and the plain chain takes minutes on the components of the digits, and for
    rules that ask in a thousand steps.
    """
    if entry.most_steps is not None and case.steps > entry.most_steps:
        return False
    if entry.weights is not None and SAMPLERS[case.sampler] == 0:
        return False
    return entry.engine == "fused" or not experiment(case.experiment).pixels


def evaluations(entry: Entry, curve: Curve, i: int) -> float:
    """Of networks in a step of a rule at strength i: what it takes, or what its samples took."""
    if entry.evaluations is not None:
        return entry.evaluations
    assert curve.evaluations is not None
    return float(curve.evaluations[i])


def published(entry: Entry, strengths: tuple[float, ...]) -> int | None:
    """Index of the published strength among these, if there is one."""
    return strengths.index(entry.published) if entry.published in strengths else None
