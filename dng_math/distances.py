"""Distances between a sample and its target distribution.

Guidance promises a distribution, so a sampler is judged by the distance of its samples from that
distribution.  In one dimension the target is known to twelve digits (:mod:`dng_math.density`), and
the distances are exact functions of the sample:

    Kolmogorov-Smirnov     sup |F_n - F|
    Wasserstein            int |F_n - F| dx, and its sliced form in any dimension
    Kullback-Leibler       between bin masses, or between class frequencies
    Frechet                between the first two moments of features (FID when the features are
                           Inception's)
    forbidden mass         the expected share of the sample that belongs to c

None of them says how much of a distance is due to chance.  For that see
:func:`ks_critical_value`, :func:`binomial_interval` and the bias stated in
:func:`kl_to_target`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from dng_math import checks
from dng_math.density import (
    GuidedLogDensity,
    LogNormaliser,
    TargetDensity1D,
    guided_density,
    guided_log_density,
)
from dng_math.mixture import GaussianMixture

__all__ = [
    "GuidedLogDensity",
    "LogNormaliser",
    "TargetDensity1D",
    "binomial_interval",
    "forbidden_mass",
    "frechet_distance",
    "guided_density",
    "guided_log_density",
    "kl_categorical",
    "kl_to_target",
    "ks_critical_value",
    "ks_statistic",
    "sliced_wasserstein",
    "wasserstein1",
]

Array = NDArray[np.float64]


def ks_statistic(samples: ArrayLike, cdf: Callable[[Array], Array]) -> float:
    """Two-sided Kolmogorov-Smirnov statistic sup_x |F_n(x) - F(x)|.

    The supremum over both sides of each jump of the empirical distribution function F_n:
    max_i max(i/n - F(x_(i)), F(x_(i)) - (i-1)/n) (Kolmogorov 1933).

    Parameters
    ----------
    samples : array_like, shape (N,)
        Finite real numbers, in any order.
    cdf : callable, (N,) float64 -> (N,) float64
        A continuous distribution function, for instance ``TargetDensity1D.cdf``.

    Returns
    -------
    float
        In [1/(2N), 1].

    Raises
    ------
    TypeError
        If ``samples`` are not real or ``cdf`` cannot be called.
    ValueError
        If ``samples`` are empty or not finite, or if ``cdf`` returns another shape or numbers
        outside [0, 1].
    """
    ordered = np.sort(checks.filled("samples", samples, ("N",)))
    if not callable(cdf):
        raise TypeError(f"cdf must be callable, got {cdf!r}")
    values = checks.reals("the result of cdf", cdf(ordered))
    if values.shape != ordered.shape:
        raise ValueError(
            f"cdf must return the shape it is given, {ordered.shape}, got {values.shape}"
        )
    if not ((values >= 0.0) & (values <= 1.0)).all():
        bad = np.argmin((values >= 0.0) & (values <= 1.0))
        raise ValueError(f"cdf must return values in [0, 1], got {values[bad]} at {ordered[bad]!r}")
    n = ordered.size
    above = (np.arange(1, n + 1) / n - values).max()
    below = (values - np.arange(n) / n).max()
    return float(max(above, below))


def ks_critical_value(n: int, alpha: float) -> float:
    """Value that :func:`ks_statistic` exceeds with probability alpha for samples of its cdf.

    The exact finite-n distribution of the statistic (Simard and L'Ecuyer 2011, as computed by
    :data:`scipy.stats.kstwo`); never more than sqrt(log(2/alpha)/(2n)) (Massart 1990).

    Parameters
    ----------
    n : int
        Number of independent samples, at least 1.
    alpha : float
        False-alarm rate in (0, 1).

    Returns
    -------
    float
        In (0, 1).

    Raises
    ------
    TypeError, ValueError
        If n is not a positive integer or alpha not a number in (0, 1).
    """
    n = checks.integer("n", n, 1)
    alpha = checks.real("alpha", alpha, "in (0, 1)", 0.0, 1.0, closed="()")
    return float(stats.kstwo.isf(alpha, n))


def wasserstein1(samples: ArrayLike, target: TargetDensity1D | ArrayLike) -> float:
    """Wasserstein-1 distance int |F_n(x) - F(x)| dx, in the units of x.

    Against a density the integral is exact up to the quadrature of the density (about 1e-12 of
    the interval): between two neighbouring samples F_n is a constant c, F - c changes sign at
    most once, at the quantile of c, and int F is known in closed form on either side.

    Parameters
    ----------
    samples : array_like, shape (N,)
        Finite real numbers, in any order.
    target : TargetDensity1D or array_like, shape (M,)
        An exact target, or a second sample.

    Returns
    -------
    float
        Zero or more.

    Raises
    ------
    TypeError
        If an argument is not real.
    ValueError
        If a sample is empty or not finite.
    """
    ordered = np.sort(checks.filled("samples", samples, ("N",)))
    if not isinstance(target, TargetDensity1D):
        return float(stats.wasserstein_distance(ordered, checks.filled("target", target, ("M",))))
    n = ordered.size
    # int |F_n - F| over (-inf, x_(1)), where F_n = 0, and over (x_(n), inf), where F_n = 1.
    integral = target._by_chunks(target._cdf_integral, ordered)
    whole = float(target._left_integral[-1])
    outer = integral[0] + max(target.hi - ordered[-1], 0.0) - max(whole - integral[-1], 0.0)

    level = np.arange(1, n) / n
    a, b = ordered[:-1], ordered[1:]
    below, above = target.cdf(a), target.cdf(b)
    middle = np.where(below >= level, a, b)
    crosses = (below < level) & (level < above)
    middle[crosses] = np.clip(target.quantile(level[crosses]), a[crosses], b[crosses])
    at_middle = np.where(below >= level, integral[:-1], integral[1:])
    at_middle[crosses] = target._by_chunks(target._cdf_integral, middle[crosses])
    deficit = level * (middle - a) - (at_middle - integral[:-1])
    excess = (integral[1:] - at_middle) - level * (b - middle)
    return max(0.0, math.fsum(deficit) + math.fsum(excess) + float(outer))


def kl_to_target(
    samples: ArrayLike,
    target: TargetDensity1D,
    bins: int | ArrayLike,
    *,
    direction: Literal["target_to_sample", "sample_to_target"] = "target_to_sample",
    pseudocount: float = 0.0,
) -> float:
    """Kullback-Leibler divergence, in nats, between a 1D target and a histogram.

    Both distributions are reduced to the masses of the bins and of the two outer pieces of the
    line, the target's exactly, so the result is a lower bound of the divergence between
    densities.  For a sample *from* the target it is not zero but about (bins - 1)/(2N) on
    average, in both directions: 2 N KL is asymptotically chi-squared with bins - 1 degrees of
    freedom (Wilks 1938).

    Parameters
    ----------
    samples : array_like, shape (N,)
        Finite real numbers, in any order.
    target : TargetDensity1D
        The exact distribution.
    bins : int or array_like, shape (E,)
        Number of equal bins of [target.lo, target.hi], or E >= 2 increasing edges.
    direction : {"target_to_sample", "sample_to_target"}
        KL(target || histogram), infinite when a bin where the target has mass is empty, or
        KL(histogram || target), infinite when a sample lies where the target has none.
    pseudocount : float
        Added to the count of every bin where the target has mass.  0, the default, is exact;
        1/2 is Jeffreys' choice and keeps the first direction finite.

    Returns
    -------
    float
        In [0, inf].

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If samples or edges are empty or not finite, edges do not increase, ``direction`` is
        another string or ``pseudocount`` is negative.
    """
    values = checks.filled("samples", samples, ("N",))
    if not isinstance(target, TargetDensity1D):
        raise TypeError(f"target must be a TargetDensity1D, got {target!r}")
    checks.choice("direction", direction, ("target_to_sample", "sample_to_target"))
    pseudocount = checks.non_negative("pseudocount", pseudocount)
    if not isinstance(bins, (list, tuple, np.ndarray)):
        edges = np.linspace(target.lo, target.hi, checks.size("bins", bins, 1) + 1)
    else:
        edges = checks.filled("bins", bins, ("E",))
        if edges.size < 2 or not (np.diff(edges) > 0.0).all():
            raise ValueError(f"bins must be a number or at least 2 increasing edges, got {bins!r}")
    whole = np.concatenate([[-np.inf], edges, [np.inf]])
    masses = target.mass(whole[:-1], whole[1:])
    # As in np.histogram, a bin includes its left edge, and the last bin both of its edges.
    place = np.searchsorted(edges, values, side="right")
    place[values == edges[-1]] = edges.size - 1
    counts = np.bincount(place, minlength=masses.size).astype(np.float64)
    counts[masses > 0.0] += pseudocount
    shares = counts / counts.sum()
    if direction == "target_to_sample":
        return _kl(masses, shares)
    return _kl(shares, masses)


def _kl(p: Array, q: Array) -> float:
    """The sum of p log(p/q) with 0 log 0 = 0; p and q are distributions on the same bins."""
    return max(0.0, float(special.rel_entr(p, q).sum()))


def forbidden_mass(samples: ArrayLike, mixture: GaussianMixture, components: ArrayLike) -> float:
    """Expected share of the samples that belong to the forbidden components.

    The mean over samples of the exact posterior p(components | x).  For samples of the mixture
    itself its expectation is the weight of the components, with less variance than counting.

    Parameters
    ----------
    samples : array_like, shape (N, D)
        Finite real numbers.
    mixture : GaussianMixture
        The distribution whose components are meant, in D dimensions.
    components : array_like of int
        The forbidden components, as ``mixture.log_posterior`` takes them.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError
        If ``samples`` are not real or ``mixture`` is not a GaussianMixture.
    ValueError
        If ``samples`` are empty, not finite or of another dimension than the mixture, or if
        ``components`` do not name components of it.
    """
    points = checks.filled("samples", samples, ("N", "D"))
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture, got {checks.shown(mixture)}")
    if points.shape[1] != mixture.dim:
        raise ValueError(
            f"samples must have shape (N, {mixture.dim}), as the mixture has, got {points.shape}"
        )
    posterior = np.exp(np.asarray(mixture.log_posterior(points, components)))
    return min(1.0, float(posterior.mean()))


def sliced_wasserstein(
    samples: ArrayLike,
    reference: ArrayLike,
    n_projections: int = 128,
    seed: int = 0,
    p: float = 1.0,
) -> float:
    """Sliced Wasserstein-p distance of two samples, in the units of x.

    (mean over directions of W_p^p between the projected samples)^(1/p) (Bonneel et al. 2015).
    In one dimension this is W_p.  In two the directions have the angles pi j / n_projections, which
    converges fast for a smooth dependence on the angle.  In more they are uniform on the sphere,
    drawn from ``seed``, and so the same for every call.

    Parameters
    ----------
    samples : array_like, shape (N, D)
        Finite real numbers.
    reference : array_like, shape (M, D)
        Finite real numbers; M may differ from N.
    n_projections : int
        Number of directions, at least 1.
    seed : int
        Seed of the directions, zero or more; used when D > 2.
    p : float
        Order of the distance, at least 1.

    Returns
    -------
    float
        Zero or more.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range, or if the dimensions differ.
    """
    x = checks.filled("samples", samples, ("N", "D"))
    y = checks.filled("reference", reference, ("M", "D"))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"reference must have shape (M, {x.shape[1]}), got {y.shape}")
    n_projections = checks.integer("n_projections", n_projections, 1)
    seed = checks.integer("seed", seed, 0)
    p = checks.real("p", p, "finite and >= 1", 1.0, math.inf, closed="[)")
    dimensions = x.shape[1]
    if dimensions == 1:
        directions = np.ones((1, 1))
    elif dimensions == 2:
        angle = np.pi * np.arange(n_projections) / n_projections
        directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        directions = np.random.default_rng(seed).standard_normal((n_projections, dimensions))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    # The optimal coupling of two sorted samples pairs quantiles; in units of 1/(N M) the levels
    # where either quantile function jumps are integers, hence exact.
    n, m = x.shape[0], y.shape[0]
    jumps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    of_x, of_y = (jumps - 1) // m, (jumps - 1) // n
    share = np.diff(jumps, prepend=0) / (n * m)
    total = 0.0
    for direction in directions:
        gap = np.abs(np.sort(x @ direction)[of_x] - np.sort(y @ direction)[of_y])
        total += float(share @ gap**p)
    return float((total / len(directions)) ** (1.0 / p))


def kl_categorical(ideal: ArrayLike, counts: ArrayLike, pseudocount: float = 0.0) -> float:
    """KL(ideal || counts / sum), in nats: the class balance of a class-removal experiment.

    The ideal is 0 on the forbidden class and uniform elsewhere (Koulischer et al., ICLR 2025).
    A share f of forbidden images adds log(1/(1 - f)), since it is missing from the allowed classes.
    For N counts drawn from the ideal the expectation is not zero but about (C_allowed - 1)/(2N).

    Parameters
    ----------
    ideal : array_like, shape (C,)
        Probabilities, with sum 1.
    counts : array_like, shape (C,)
        Number of images in each class, zero or more, not all zero.
    pseudocount : float
        Added to the count of every class.  With 0, the default, the result is exact, and infinite
        when an allowed class has no image.

    Returns
    -------
    float
        In [0, inf].

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or range, or if the shapes differ.
    """
    probabilities = checks.filled("ideal", ideal, ("C",))
    if (probabilities < 0.0).any() or abs(probabilities.sum() - 1.0) > 1e-6:
        raise ValueError(f"ideal must be probabilities with sum 1, got {ideal!r}")
    numbers = checks.filled("counts", counts, ("C",))
    if numbers.shape != probabilities.shape:
        raise ValueError(f"counts must have shape {probabilities.shape}, got {numbers.shape}")
    pseudocount = checks.non_negative("pseudocount", pseudocount)
    if (numbers < 0.0).any() or not numbers.sum() > 0.0:
        raise ValueError(f"counts must be >= 0 and not all zero, got {counts!r}")
    smoothed = numbers + pseudocount
    return _kl(probabilities / probabilities.sum(), smoothed / smoothed.sum())


Moments = tuple[ArrayLike, ArrayLike]


def frechet_distance(
    samples: ArrayLike | Moments,
    reference: ArrayLike | Moments,
) -> float:
    """Squared Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two feature sets.

    The squared Wasserstein-2 distance of the two Gaussians with these moments (Dowson and
    Landau 1982); with Inception features, FID (Heusel et al. 2017).  The eigenvalues of
    C1^(1/2) C2 C1^(1/2), which are those of C1 C2, are the squared singular values of
    C1^(1/2) C2^(1/2).  Using these avoids squaring, and so keeps the digits that a singular
    covariance (fewer images than features) would lose to a matrix square root.

    Parameters
    ----------
    samples, reference : array_like, shape (N, D), or tuple (mean (D,), covariance (D, D))
        Features, at least two rows, or their moments.  Covariances divide by N - 1.

    Returns
    -------
    float
        Zero or more, in squared units of the features.  Between samples of one distribution it is
        about tr(C)/N, and more when N is not large against D.

    Raises
    ------
    TypeError
        If an argument is not real.
    ValueError
        If an argument has fewer than two rows, is not finite, or is a covariance that is not
        symmetric and positive semidefinite, or if the dimensions differ.
    """
    mean, root, trace = _moments("samples", samples)
    other_mean, other_root, other_trace = _moments("reference", reference)
    if mean.shape != other_mean.shape:
        raise ValueError(
            f"reference must have {mean.size} features, as samples have, got {other_mean.size}"
        )
    coupling = np.linalg.svd(root @ other_root, compute_uv=False).sum()
    distance = float(np.sum((mean - other_mean) ** 2) + trace + other_trace - 2.0 * coupling)
    return max(0.0, distance)


def _moments(name: str, value: ArrayLike | Moments) -> tuple[Array, Array, float]:
    """Mean, symmetric square root of the covariance, and trace of the covariance."""
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{name} must be features or (mean, covariance), got {len(value)}")
        mean = checks.filled(f"{name}[0]", value[0], ("D",))
        covariance = checks.filled(f"{name}[1]", value[1], ("D", "D"))
        if covariance.shape != (mean.size, mean.size):
            raise ValueError(
                f"{name}[1] must have shape ({mean.size}, {mean.size}), got {covariance.shape}"
            )
        largest = np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > 1e-8 * largest:
            raise ValueError(f"{name}[1] must be symmetric, got an asymmetric covariance")
    else:
        features = checks.filled(name, value, ("N", "D"))
        if features.shape[0] < 2:
            raise ValueError(f"{name} must have at least 2 rows, got shape {features.shape}")
        mean = features.mean(axis=0)
        centred = features - mean
        covariance = centred.T @ centred / (features.shape[0] - 1)
    eigenvalues, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
    size = np.abs(eigenvalues).max()
    if eigenvalues.min() < -1e-8 * size:
        raise ValueError(
            f"{name}[1] must be positive semidefinite, got the eigenvalue {eigenvalues.min()!r}"
        )
    # An eigenvalue below the rounding of the decomposition is noise that a root would enlarge.
    eigenvalues[eigenvalues < mean.size * np.finfo(np.float64).eps * size] = 0.0
    root = (vectors * np.sqrt(eigenvalues)) @ vectors.T
    return mean, root, float(np.trace(covariance))


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact Clopper-Pearson interval of a proportion, with coverage of at least ``confidence``.

    It holds every probability p for which neither tail of Binomial(n, p) at ``successes`` is below
    (1 - confidence)/2 (Clopper and Pearson 1934).

    Parameters
    ----------
    successes : int
        Number of successes, from 0 to n.
    n : int
        Number of independent trials, at least 1.
    confidence : float
        Least coverage, in (0, 1).

    Returns
    -------
    (float, float)
        Lower and upper end, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number of its range.
    """
    n = checks.integer("n", n, 1)
    successes = checks.integer("successes", successes, 0, n)
    confidence = checks.real("confidence", confidence, "in (0, 1)", 0.0, 1.0, closed="()")
    tail = 0.5 * (1.0 - confidence)
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.isf(tail, successes + 1, n - successes))
    return low, high
