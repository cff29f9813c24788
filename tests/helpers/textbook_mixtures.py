"""Independent Gaussian mixtures for the tests: in float64 with SciPy, and to 50 digits with mpmath.

With mpmath the weights, means, covariances, alpha, sigma and x are the exact rationals that the
floats represent, and at least 50 digits of every result are right.  An mpf keeps its digits, but
arithmetic on it uses the current precision: subtract within ``mpmath.workdps(60)``.  Nothing here
is imported from the packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mpmath
import numpy as np
from mpmath import mp, mpf
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

# ---- the Gaussian mixture in float64: x (N, D), weights (K,), means (K, D),
# ---- covariances (K,) times the identity, (K, D) on the diagonal, or (K, D, D)


def _float_components(
    weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> list[tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(weight, alpha m, alpha^2 C + sigma^2 I, m, C) of each component, C always a matrix."""
    weights, means = np.asarray(weights, dtype=float), np.asarray(means, dtype=float)
    covariances = np.asarray(covariances, dtype=float)
    identity = np.eye(means.shape[1])
    components = []
    for k in range(len(weights)):
        if covariances.ndim == 1:
            c = covariances[k] * identity
        elif covariances.ndim == 2:
            c = np.diag(covariances[k])
        else:
            c = covariances[k]
        noisy = alpha**2 * c + sigma**2 * identity
        components.append((weights[k] / weights.sum(), alpha * means[k], noisy, means[k], c))
    return components


def _log_joint(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> np.ndarray:
    """log w_k + log N(x; alpha m_k, alpha^2 C_k + sigma^2 I), shape (N, K)."""
    columns = []
    with np.errstate(divide="ignore"):
        for w, mean, covariance, _, _ in _float_components(
            weights, means, covariances, alpha, sigma
        ):
            columns.append(
                np.log(w) + np.atleast_1d(multivariate_normal.logpdf(x, mean, covariance))
            )
    return np.stack(columns, axis=1)


def log_prob(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """log sum_k w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I), shape (N,)."""
    return logsumexp(_log_joint(x, weights, means, covariances, alpha, sigma), axis=1)


def responsibilities(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """p(k | x), shape (N, K)."""
    joint = _log_joint(x, weights, means, covariances, alpha, sigma)
    return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def log_posterior(
    x: Any,
    components: Iterable[int],
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    complement: bool = False,
) -> np.ndarray:
    """log p(components | x), or of the other components, shape (N,)."""
    joint = _log_joint(x, weights, means, covariances, alpha, sigma)
    chosen = set(components)
    kept = [k for k in range(joint.shape[1]) if (k in chosen) != complement]
    if not kept:
        return np.full(len(joint), -np.inf)
    return logsumexp(joint[:, kept], axis=1) - logsumexp(joint, axis=1)


def score(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """grad log p(x) = -sum_k p(k|x) S_k^{-1} (x - alpha m_k), shape (N, D)."""
    x = np.asarray(x, dtype=float)
    shares = responsibilities(x, weights, means, covariances, alpha, sigma)
    result = np.zeros_like(x)
    for k, (_, mean, covariance, _, _) in enumerate(
        _float_components(weights, means, covariances, alpha, sigma)
    ):
        for n in range(len(x)):
            result[n] -= shares[n, k] * np.linalg.solve(covariance, x[n] - mean)
    return result


def posterior_mean(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """E[x_0 | x] = sum_k p(k|x) (m_k + alpha C_k S_k^{-1} (x - alpha m_k)), shape (N, D)."""
    x = np.asarray(x, dtype=float)
    shares = responsibilities(x, weights, means, covariances, alpha, sigma)
    result = np.zeros_like(x)
    for k, (_, mean, noisy, clean_mean, clean) in enumerate(
        _float_components(weights, means, covariances, alpha, sigma)
    ):
        for n in range(len(x)):
            gain = alpha * clean @ np.linalg.solve(noisy, x[n] - mean)
            result[n] += shares[n, k] * (clean_mean + gain)
    return result


# ---- the Gaussian mixture in many digits: one point x (D,), results are mpf


class _Component(NamedTuple):
    log_weight: Any  # log w_k, -inf for a component without weight
    maha: Any  # (x - alpha m)^T S^{-1} (x - alpha m)
    log_det: Any  # log det S
    gradient: list[Any]  # -S^{-1} (x - alpha m), the component's own score
    trace_inverse: Any  # tr S^{-1}
    gain: list[Any]  # m + alpha C S^{-1} (x - alpha m), the component's posterior mean
    lost_digits: int  # digits lost to the condition number of S


def _mp_cholesky(matrix: list[list[Any]]) -> list[list[Any]]:
    size = len(matrix)
    lower = [[mpf(0)] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - mpmath.fsum(lower[i][k] * lower[j][k] for k in range(j))
            if i == j:
                if rest <= 0:
                    raise ValueError("the covariance is not positive definite")
                lower[i][i] = mpmath.sqrt(rest)
            else:
                lower[i][j] = rest / lower[j][j]
    return lower


def _mp_solve_lower(lower: list[list[Any]], b: list[Any]) -> list[Any]:
    y: list[Any] = []
    for i in range(len(b)):
        y.append((b[i] - mpmath.fsum(lower[i][k] * y[k] for k in range(i))) / lower[i][i])
    return y


def _mp_solve_upper(lower: list[list[Any]], y: list[Any]) -> list[Any]:
    size = len(y)
    z: list[Any] = [mpf(0)] * size
    for i in reversed(range(size)):
        tail = mpmath.fsum(lower[k][i] * z[k] for k in range(i + 1, size))
        z[i] = (y[i] - tail) / lower[i][i]
    return z


def _mp_component(
    x: list[Any], w: Any, m: list[Any], c: Any, form: int, alpha: Any, sigma: Any
) -> _Component:
    size = len(x)
    gap = [x[d] - alpha * m[d] for d in range(size)]
    if form < 3:
        clean = [c] * size if form == 1 else c
        noisy = [alpha**2 * clean[d] + sigma**2 for d in range(size)]
        solved = [gap[d] / noisy[d] for d in range(size)]
        log_det = mpmath.fsum(mpmath.log(s) for s in noisy)
        trace_inverse = mpmath.fsum(1 / s for s in noisy)
        gain = [m[d] + alpha * clean[d] * solved[d] for d in range(size)]
        maha = mpmath.fsum(gap[d] * solved[d] for d in range(size))
        lost = 0
    else:
        matrix = [
            [alpha**2 * c[i][j] + (sigma**2 if i == j else 0) for j in range(size)]
            for i in range(size)
        ]
        lower = _mp_cholesky(matrix)
        whitened = _mp_solve_lower(lower, gap)
        solved = _mp_solve_upper(lower, whitened)
        maha = mpmath.fsum(y * y for y in whitened)
        log_det = 2 * mpmath.fsum(mpmath.log(lower[i][i]) for i in range(size))
        columns = [_mp_solve_lower(lower, [mpf(i == j) for i in range(size)]) for j in range(size)]
        trace_inverse = mpmath.fsum(y * y for column in columns for y in column)
        gain = [
            m[i] + alpha * mpmath.fsum(c[i][j] * solved[j] for j in range(size))
            for i in range(size)
        ]
        # tr S tr S^{-1} is at least the condition number.
        condition = mpmath.fsum(matrix[i][i] for i in range(size)) * trace_inverse
        lost = _digits(condition)
    log_weight = mpmath.log(w) if w > 0 else mpf("-inf")
    return _Component(
        log_weight, maha, log_det, [-value for value in solved], trace_inverse, gain, lost
    )


def _digits(value: Any) -> int:
    """Number of decimal digits before the point."""
    return max(0, int(mpmath.mag(value) * 0.302) + 1) if value > 0 else 0


def _mp_components(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> list[_Component]:
    covariances = np.asarray(covariances, dtype=np.float64)
    form = covariances.ndim
    if form == 1:
        exact = [mpf(float(c)) for c in covariances]
    elif form == 2:
        exact = [[mpf(float(v)) for v in row] for row in covariances]
    else:
        exact = [[[mpf(float(v)) for v in row] for row in c] for c in covariances]
    point = [mpf(float(v)) for v in np.asarray(x).ravel()]
    ws = [mpf(float(w)) for w in np.asarray(weights).ravel()]
    total = mpmath.fsum(ws)
    return [
        _mp_component(
            point,
            ws[k] / total,
            [mpf(float(v)) for v in np.asarray(means)[k]],
            exact[k],
            form,
            mpf(float(alpha)),
            mpf(float(sigma)),
        )
        for k in range(len(ws))
    ]


def _in_many_digits(
    finish: Callable[[list[_Component]], Any],
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float,
    sigma: float,
    digits: int,
) -> Any:
    """``finish(components)`` with as many working digits as its subtractions need.

    Log-densities of size maha are subtracted from each other and exponentiated, so an error of
    10^-digits in a result needs log10(maha) more digits in them.  Solving with S loses the digits
    of its condition number, twice where a solution is used in another product.  A first pass
    measures both; its result is returned if it had enough digits.
    """
    working = digits + 60
    while True:
        with mp.workdps(working):
            components = _mp_components(x, weights, means, covariances, alpha, sigma)
            size = max(_digits(c.maha) + _digits(abs(c.log_det)) for c in components)
            needed = digits + 20 + size + 2 * max(c.lost_digits for c in components)
            if needed <= working:
                return finish(components)
        working = needed + 20


def _log_joints(components: list[_Component]) -> list[Any]:
    """log w_k N_k(x) without the (2 pi)^{-D/2}."""
    return [c.log_weight - (c.maha + c.log_det) / 2 for c in components]


def _mp_logsumexp(values: list[Any]) -> Any:
    top = max(values)
    if top == mpf("-inf"):
        return top
    index = values.index(top)
    others = [mpmath.exp(v - top) for i, v in enumerate(values) if i != index]
    # log1p keeps a second term of e^(-10^20), with which 1 + e^(-10^20) would round to 1.
    return top + mpmath.log1p(mpmath.fsum(others))


def _mp_shares(components: list[_Component]) -> list[Any]:
    joints = _log_joints(components)
    total = _mp_logsumexp(joints)
    return [mpmath.exp(v - total) for v in joints]


def exact_log_prob(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> Any:
    """log p(x) at one point x (D,), an mpf."""

    def finish(components: list[_Component]) -> Any:
        size = len(components[0].gradient)
        return _mp_logsumexp(_log_joints(components)) - size * mpmath.log(2 * mp.pi) / 2

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_log_posterior(
    x: Any,
    chosen: Iterable[int],
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    complement: bool = False,
    digits: int = 50,
) -> Any:
    """log p(chosen | x) at one point, or of the other components, an mpf.

    Computed as -log(1 + e^{-l}) from the log odds l by log1p, so that both ends keep their digits:
    a posterior near one has the logarithm -e^{-|l|}, which may be as small as e^(-10^20) but is
    not zero.
    """
    inside = set(chosen)

    def finish(components: list[_Component]) -> Any:
        joints = _log_joints(components)
        ours = [v for k, v in enumerate(joints) if (k in inside) != complement]
        theirs = [v for k, v in enumerate(joints) if (k in inside) == complement]
        minus_infinity = mpf("-inf")
        a = _mp_logsumexp(ours) if ours else minus_infinity
        b = _mp_logsumexp(theirs) if theirs else minus_infinity
        if a == minus_infinity:
            return minus_infinity
        if b == minus_infinity:
            return mpf(0)
        if b <= a:
            return -mpmath.log1p(mpmath.exp(b - a))
        return (a - b) - mpmath.log1p(mpmath.exp(a - b))

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_responsibilities(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """p(k | x) at one point, K mpf."""
    return _in_many_digits(_mp_shares, x, weights, means, covariances, alpha, sigma, digits)


def exact_score(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """grad log p at one point, D mpf."""

    def finish(components: list[_Component]) -> list[Any]:
        return _weighted(_mp_shares(components), [c.gradient for c in components])

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_posterior_mean(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """E[x_0 | x] at one point, D mpf."""

    def finish(components: list[_Component]) -> list[Any]:
        return _weighted(_mp_shares(components), [c.gain for c in components])

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_score_divergence(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> Any:
    """The Laplacian of log p at one point: sum_k p(k|x) (|s_k - s|^2 - tr S_k^{-1}), an mpf.

    From lap p_k = p_k (|s_k|^2 - tr S_k^{-1}) and lap log p = lap p / p - |s|^2; the variance of
    the s_k replaces a difference of squares.
    """

    def finish(components: list[_Component]) -> Any:
        shares = _mp_shares(components)
        mean = _weighted(shares, [c.gradient for c in components])
        return mpmath.fsum(
            share
            * (
                mpmath.fsum((a - b) ** 2 for a, b in zip(c.gradient, mean, strict=True))
                - c.trace_inverse
            )
            for share, c in zip(shares, components, strict=True)
        )

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def _weighted(shares: list[Any], vectors: list[list[Any]]) -> list[Any]:
    return [
        mpmath.fsum(share * vector[d] for share, vector in zip(shares, vectors, strict=True))
        for d in range(len(vectors[0]))
    ]
