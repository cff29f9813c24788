"""Q (DNG Eq. 23): how much more guidance changes related images than unrelated ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks
from dng_models.support.metrics import RESAMPLES, Array, Estimate, checked_confidence

SAME_SIMILARITY = 1e-6  # precision of the records; a smaller range of similarities gives no line


class Selectivity(NamedTuple):
    """How well guidance leaves images alone that the negative has nothing to do with; S scales.

    Attributes
    ----------
    q : Estimate
        The paper's Q (Eq. 23): height of the line of unrelated against related similarity above
        the diagonal, at the middle of the related range; NaN where there is no line.
    gap : Estimate
        Unrelated minus related similarity, mean over the scales; not in the paper.
    ratio : Estimate
        Change by the unrelated negative per unit of change by the related one: 1 for a rule that
        does not tell them apart, 0 for one that leaves the image unchanged.  Unlike the others it
        does not depend on how large the scales are.
    slope, intercept : float
        Parameters of the line of unrelated against related similarity; NaN where one point, or one
        related similarity, defines no line.
    related, unrelated : ndarray, shape (S,)
        Mean similarities over the images.
    """

    q: Estimate
    gap: Estimate
    ratio: Estimate
    slope: float
    intercept: float
    related: Array
    unrelated: Array


def selectivity(
    related: ArrayLike,
    unrelated: ArrayLike,
    *,
    resamples: int = 10 * RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Selectivity:
    """The Q metric of Koulischer et al. (ICLR 2025) with bootstrap intervals over the images.

    With the line y = a x + b, fitted by least squares to unrelated (y) against related (x) mean
    similarity at the S scales, ``Q = (a - 1) (x_max + x_min) / 2 + b`` (Eq. 23).  One scale, or
    scales that all have the same related similarity, define no line and no Q.  The mean gap over
    the scales equals Q where the mean of the related similarities is the middle of their range, as
    for two scales.  The unguided image, whose similarity to itself is 1, does not count as a scale.

    The ratio is the slope of the line through the unguided image, (1, 1), by least squares.

    Parameters
    ----------
    related, unrelated : array_like, shape (S, N)
        Similarities, at most 1, of guided and unguided images at S guidance scales, for the same
        N seeds.
    resamples : int
        Bootstrap resamples of the seeds; a seed keeps all its scales and both negatives.
    confidence : float
        Coverage of the intervals, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Selectivity

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    x = checks.filled("related", related, ("S", "N"))
    y = checks.filled("unrelated", unrelated, x.shape)
    for name, similarities in (("related", x), ("unrelated", y)):
        # The tolerance is for float32 rounding; the check finds similarities in percent.
        if similarities.max() > 1.0 + 1e-3:
            raise ValueError(
                f"{name} must be similarities of at most 1, got {similarities.max():g}"
            )
    resamples = checks.integer("resamples", resamples, 2)
    tail = 0.5 * (1.0 - checked_confidence(confidence))
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    images = x.shape[1]
    weights = rng.multinomial(images, np.full(images, 1.0 / images), resamples) / images
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    found = _selectivity(mean_x, mean_y)
    resampled = _selectivity(x @ weights.T, y @ weights.T)
    estimates = []
    for value, others in zip(found[:3], resampled[:3], strict=True):
        known = others[np.isfinite(others)] if np.isfinite(value) else np.array([])
        ends = np.quantile(known, (tail, 1.0 - tail)) if known.size else (np.nan, np.nan)
        estimates.append(Estimate(float(value), float(ends[0]), float(ends[1])))
    q, gap, ratio = estimates
    slope, intercept = float(found[3]), float(found[4])
    return Selectivity(q, gap, ratio, slope, intercept, mean_x, mean_y)


def _selectivity(x: Array, y: Array) -> tuple[Array, ...]:
    """Q, mean gap, ratio, slope and intercept of related x and unrelated y; axis 0 is scales."""
    middle_x, middle_y = x.mean(axis=0), y.mean(axis=0)
    apart = x - middle_x
    wide = x.max(axis=0) - x.min(axis=0) > SAME_SIMILARITY
    slope = _quotient(np.sum(apart * (y - middle_y), axis=0), np.sum(apart**2, axis=0), wide)
    intercept = middle_y - slope * middle_x
    q = (slope - 1.0) * 0.5 * (x.max(axis=0) + x.min(axis=0)) + intercept
    moved = np.sum((1.0 - x) ** 2, axis=0)
    ratio = _quotient(np.sum((1.0 - x) * (1.0 - y), axis=0), moved, moved > SAME_SIMILARITY**2)
    return q, middle_y - middle_x, ratio, slope, intercept


def _quotient(above: Array, below: Array, known: NDArray[np.bool_]) -> Array:
    """Quotient where ``known``, NaN elsewhere."""
    found: Array = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=known)
    return found
