"""Assertions about random samples, with known error rates.

After TensorFlow Probability's ``statistical_testing``: every claim has

- a *false-alarm rate* ``alpha``: the probability that correct code fails the assertion.  It is
  1e-6 for a whole call, however many numbers the call compares, so that a suite of a thousand
  claims fails by chance once in a thousand fresh seeds;
- a *false-pass rate* ``beta``: the probability that code which is wrong by a stated amount
  passes.  It depends on the sample size; :func:`min_detectable` converts one into the other.

All bounds hold for every sample size, except where a docstring assumes a normal law.  Samples must
be independent.  Seeds are fixed in the tests, so the rates are over the choice of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-6
FALSE_PASS = 1e-3


def mean_bound(
    n: int,
    *,
    value_range: float | None = None,
    sample_std: float | None = None,
    std: float | None = None,
    alpha: float = FALSE_ALARM,
) -> float:
    """Distance from its expectation that a mean of n samples exceeds with probability alpha.

    - ``value_range`` alone: Hoeffding (1963), range sqrt(log(2/alpha)/(2n)).  False-alarm rate at
      most alpha for any law on an interval of that length.
    - ``value_range`` and ``sample_std`` (dividing by n - 1): empirical Bernstein (Maurer and
      Pontil 2009, Theorem 4, on both sides), smaller when the variance is.  The same guarantee.
    - ``std``: the exact bound for normal samples of that standard deviation.  For other laws it
      is the central limit theorem's, whose tail at 1e-6 is not to be trusted below n = 10^4 and
      never for skewed ones.

    False-pass rate: a mean that is wrong by twice the bound passes with probability at most
    alpha/2 (first and third form).
    """
    if std is not None:
        return float(std * stats.norm.isf(alpha / 2.0) / math.sqrt(n))
    if value_range is None:
        raise ValueError("mean_bound needs value_range or std")
    if sample_std is None:
        return value_range * math.sqrt(math.log(2.0 / alpha) / (2.0 * n))
    log_term = math.log(4.0 / alpha)
    return sample_std * math.sqrt(2.0 * log_term / n) + value_range * 7.0 * log_term / (
        3.0 * (n - 1)
    )


def assert_mean_close(
    samples: Any,
    expected: Any,
    *,
    bounds: tuple[float, float] | None = None,
    std: Any = None,
    alpha: float = FALSE_ALARM,
) -> None:
    """Assert that the mean over the first axis of samples (N, ...) has the given expectation.

    Give ``bounds`` = (lo, hi), which every sample must respect, for the smaller of Hoeffding's
    and the empirical Bernstein bound; or ``std`` for the normal one (see :func:`mean_bound`).

    False-alarm rate: at most alpha for the whole array (each of its entries, and each of the two
    bounds, gets its share).  False-pass rate: at most alpha when some entry is wrong by twice
    Hoeffding's or the normal bound; see :func:`min_detectable` for other rates.
    """
    samples = np.asarray(samples, dtype=np.float64)
    n = samples.shape[0]
    mean = samples.mean(axis=0)
    share = alpha / mean.size
    if bounds is not None:
        assert samples.min() >= bounds[0] and samples.max() <= bounds[1], (
            f"samples leave {bounds}: {samples.min()}, {samples.max()}"
        )
        width = bounds[1] - bounds[0]
        hoeffding = mean_bound(n, value_range=width, alpha=share / 2.0)
        deviation = samples.std(axis=0, ddof=1)
        unit = mean_bound(n, value_range=0.0, sample_std=1.0, alpha=share / 2.0)
        constant = mean_bound(n, value_range=width, sample_std=0.0, alpha=share / 2.0)
        allowed = np.minimum(hoeffding, deviation * unit + constant)
    else:
        allowed = np.asarray(std) * mean_bound(n, std=1.0, alpha=share)
    gap = np.abs(mean - expected)
    assert (gap <= allowed).all(), (
        f"mean {mean} of {n} samples, expected {expected}: off by {gap}, chance explains {allowed}"
    )


def assert_proportion(successes: int, n: int, expected: float, alpha: float = FALSE_ALARM) -> None:
    """Assert that a count of successes among n is Binomial(n, expected).

    False-alarm rate: at most alpha, exactly, for every n (neither tail may be below alpha/2).
    False-pass rate: at most beta when the true proportion is off by
    ``min_detectable(n, value_range=1.0, alpha=alpha, beta=beta)`` or more.
    """
    lower = stats.binom.cdf(successes, n, expected)
    upper = stats.binom.sf(successes - 1, n, expected)
    assert min(lower, upper) >= alpha / 2.0, (
        f"{successes} of {n} is {successes / n:.6g}, expected {expected:.6g}: "
        f"probability {2.0 * min(lower, upper):.3g}"
    )


def assert_distribution_1d(
    samples: Any, cdf: Callable[[Any], Any], alpha: float = FALSE_ALARM
) -> None:
    """Assert that samples (N,) follow a continuous distribution function (Kolmogorov-Smirnov).

    False-alarm rate: alpha, from the exact distribution of the statistic at this N.
    False-pass rate: at most beta when the true distribution function is somewhere off by
    ``min_detectable_distribution(N, alpha=alpha, beta=beta)`` or more.
    """
    samples = np.asarray(samples, dtype=np.float64)
    n = samples.size
    statistic = stats.ks_1samp(samples, cdf, method="asymp").statistic
    allowed = stats.kstwo.isf(alpha, n)
    assert statistic <= allowed, (
        f"Kolmogorov-Smirnov distance {statistic:.6g} of {n} samples, chance explains {allowed:.6g}"
    )


def min_detectable(
    n: int,
    *,
    value_range: float | None = None,
    std: float | None = None,
    alpha: float = FALSE_ALARM,
    beta: float = FALSE_PASS,
) -> float:
    """The smallest error of a mean or proportion that passes with probability at most beta.

    The threshold of the test (false-alarm rate alpha) plus the one-sided deviation of the mean on
    the wrong side of it: Hoeffding's for samples in an interval of length ``value_range`` (1.0
    for a proportion), exact for normal samples of standard deviation ``std``.
    """
    return mean_bound(n, value_range=value_range, std=std, alpha=alpha) + mean_bound(
        n, value_range=value_range, std=std, alpha=2.0 * beta
    )


def min_detectable_distribution(
    n: int, *, alpha: float = FALSE_ALARM, beta: float = FALSE_PASS
) -> float:
    """The smallest sup |F - F_0| that :func:`assert_distribution_1d` misses with probability beta.

    The exact threshold plus the Dvoretzky-Kiefer-Wolfowitz deviation (Massart 1990).
    """
    return float(stats.kstwo.isf(alpha, n)) + math.sqrt(math.log(2.0 / beta) / (2.0 * n))
