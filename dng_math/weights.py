"""Feynman-Kac weights: samples of p (1 - p_c)^g at scales g other than 1.

A chain guided with another scale than 1 does not sample its target.  Importance weights correct
it exactly, for any number of steps where the posterior is exact (derived; docs/theory.md, section
7.1), and resampling keeps them from degenerating.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dng_math import checks, noise

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

RESAMPLING_STREAM = 3  # the one uniform of each resampling


@dataclass(frozen=True)
class FeynmanKac:
    """Weights of a chain, and when to resample by them.

    Parameters
    ----------
    resample_below : float
        Share of n in [0, 1]: after a step that leaves the effective sample size below it the
        samples are drawn anew by their weights, systematically (Kitagawa 1996).  0 never does, 1
        after every step whose weights differ.
    largest_increment : float, optional
        Bound in nats, > 0, of what a step adds to a sample's log weight beyond the mean of all.
        It makes the weights steadier and no longer exact.

    Raises
    ------
    ValueError, TypeError
        If a value is out of range.
    """

    resample_below: float = 0.5
    largest_increment: float | None = None

    def __post_init__(self) -> None:
        checks.real("resample_below", self.resample_below, "in [0, 1]", 0.0, 1.0, closed="[]")
        if self.largest_increment is not None:
            checks.positive("largest_increment", self.largest_increment)


def effective_sample_size(log_weights: Array) -> float:
    """(sum w)^2 / sum w^2 of log weights (N,): N if they are equal, 1 if one has all."""
    if len(log_weights) == 0:
        return 0.0
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / np.sum(weights**2))


def systematic(log_weights: Array, u: float) -> Indices:
    """Ancestors (N,) of a systematic resampling with one uniform u in (0, 1).

    Sample i has n w_i / sum w descendants, rounded up or down.
    """
    weights = np.exp(log_weights - log_weights.max())
    edges = np.cumsum(weights)
    positions = (np.arange(len(weights)) + u) * (edges[-1] / len(weights))
    return np.minimum(np.searchsorted(edges, positions, side="right"), len(weights) - 1)


class Population:
    """The weights of a chain's samples, from step to step, the same for both engines.

    A weight is the product of a step's ratio of densities and of the change of a level,
    g log(1 - p), at the samples themselves.

    Parameters
    ----------
    settings : FeynmanKac
    level : ndarray, shape (N,)
        g log(1 - p) of x_T, with which the weights start.
    seed : int
        Of the chain.
    """

    def __init__(self, settings: FeynmanKac, level: Array, seed: int) -> None:
        self.settings, self.level, self.seed = settings, level, seed
        self.log_weights = level.copy()
        self.ess = [effective_sample_size(level)]

    def advance(self, step: int, log_ratio: Array, level: Array, *, last: bool) -> Indices | None:
        """Weigh a step's samples; the ancestors if they are to be drawn anew, else None.

        Parameters
        ----------
        step : int
            Index of the step.
        log_ratio : ndarray, shape (N,)
            log of the unguided over the guided density of the step.
        level : ndarray, shape (N,)
            g log(1 - p) after the step.
        last : bool
            After the last step the samples keep their weights.
        """
        increment = log_ratio + (level - self.level)
        largest = self.settings.largest_increment
        if largest is not None and len(increment):
            mean = increment.mean()
            increment = mean + np.minimum(increment - mean, largest)
        self.log_weights = self.log_weights + increment
        self.level = level
        ess = effective_sample_size(self.log_weights)
        self.ess.append(ess)
        n = len(level)
        # The last digits of N equal weights may be missing.
        if last or ess >= min(self.settings.resample_below * n, n * (1.0 - 1e-12)):
            return None
        u = noise.standard_uniform(self.seed, 1, first_sample=step, stream=RESAMPLING_STREAM)
        ancestors = systematic(self.log_weights, float(u[0]))
        top = self.log_weights.max()
        # All have the mean weight now: that of all descendants is what it was.
        self.log_weights = np.full(n, top + np.log(np.mean(np.exp(self.log_weights - top))))
        self.level = level[ancestors]
        return ancestors
