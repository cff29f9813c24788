"""Random mixtures for the tests: moderate ones for identities, extreme ones for accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from dng_math import GaussianMixture

KINDS = ("spherical", "diagonal", "full")
TYPES = (None, "spherical", "diag", "full")  # indexed by the covariances' number of dimensions


def covariances(rng: np.random.Generator, kind: str, variances: np.ndarray) -> np.ndarray:
    """Covariances of a kind with the given variances (K, D) along random axes."""
    k, d = variances.shape
    if kind == "spherical":
        return variances[:, 0].copy()
    if kind == "diagonal":
        return variances
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    full = np.einsum("kij,kj,klj->kil", axes, variances, axes)
    return 0.5 * (full + full.transpose(0, 2, 1))


def moderate(seed: int, kind: str, k: int, d: int) -> GaussianMixture:
    """Means of order 2, standard deviations 0.3 to 1: overlapping, as in the figures."""
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.1, 1.0, (k, d))
    means = 2.0 * rng.normal(size=(k, d))
    given = covariances(rng, kind, variances)
    return GaussianMixture(
        rng.uniform(0.2, 1.0, k), means, given, covariance_type=TYPES[given.ndim]
    )


@st.composite
def mixtures(draw: st.DrawFn, max_dim: int = 8, min_components: int = 2) -> GaussianMixture:
    """A moderate mixture of any kind in 1 to ``max_dim`` dimensions."""
    return moderate(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(KINDS)),
        draw(st.integers(min_components, 6)),
        draw(st.integers(1, max_dim)),
    )


def points(mixture: GaussianMixture, seed: int, n: int = 5) -> np.ndarray:
    """Points around the components, shape (n, D)."""
    return 3.0 * np.random.default_rng(seed).normal(size=(n, mixture.dim))


@dataclass(frozen=True)
class Extreme:
    """Parameters and points at the limits of the promised ranges."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    alpha: float
    sigma: float
    points: np.ndarray
    chosen: list[int]


def extreme(seed: int) -> Extreme | None:
    """Draw a mixture and points from the limits of the promised ranges.

    alpha is in [0, 1], sigma in [0, 80]; weights go down to 1e-300, variances from 1e-12 to 1e3,
    D up to 16 and K up to 64.  Points are in a component, between two, and up to 1e6 from all of
    them.  Returns None if a full covariance, once rounded, is not positive definite.
    """
    rng = np.random.default_rng(seed)
    d = int(rng.choice([1, 2, 3, 5, 8, 16], p=[0.3, 0.25, 0.15, 0.1, 0.1, 0.1]))
    k = int(rng.choice([1, 2, 3, 5, 8, 64], p=[0.05, 0.3, 0.3, 0.2, 0.1, 0.05]))
    kind = str(rng.choice(KINDS))
    if kind == "full" and d == 16:
        k = min(k, 5)  # the reference inverts each matrix in a hundred digits
    weights = 10.0 ** rng.uniform(-300 if rng.random() < 0.3 else -3, 0, k)
    means = rng.normal(size=(k, d)) * 10.0 ** rng.uniform(-6, 2)
    low, high = -12.0, 3.0
    if rng.random() < 0.5:
        low = rng.uniform(-12, 2)
        high = low + 1
    variances = 10.0 ** rng.uniform(low, high, (k, d))
    if rng.random() < 0.3:
        variances[:] = variances[0, 0]
    covariance = covariances(rng, kind, variances)
    alpha = float(rng.choice([0.0, 1.0, rng.uniform(), 10.0 ** rng.uniform(-3, 0)]))
    sigma = float(rng.choice([0.0, 80 * rng.uniform(), 10.0 ** rng.uniform(-7, 1.9)]))
    if alpha == 0 and sigma == 0:
        sigma = 1.0
    try:
        GaussianMixture(weights, means, covariance, covariance_type=TYPES[covariance.ndim])
    except ValueError:
        if kind == "full":
            return None
        raise
    a, b = (int(i) for i in rng.integers(0, k, 2))
    variance = {1: lambda: covariance[a], 2: lambda: covariance[a]}.get(
        covariance.ndim, lambda: np.diag(covariance[a])
    )()
    deviation = np.sqrt(alpha**2 * variance + sigma**2)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    x = np.stack(
        [
            alpha * means[a] + deviation * rng.normal(size=d),
            direction * 10.0 ** rng.uniform(-3, 6),
            alpha * (means[a] + (means[b] - means[a]) * rng.uniform()),
            alpha * means[a] + direction * 1e6,
        ]
    )
    chosen = sorted(set(rng.integers(0, k, max(1, k // 2)).tolist()))
    return Extreme(weights, means, covariance, alpha, sigma, x, chosen)
