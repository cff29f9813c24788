"""Mean and covariance of x0 given x_t against fifty digits, however ill-conditioned C is."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from dng_math import GaussianMixture
from tests.helpers import textbook_mixtures
from tests.helpers.tolerances import error

CONDITIONS = (1e4, 1e10, 1e12, 1e14)


def ill_conditioned(condition: float, seed: int, d: int = 3, k: int = 2) -> GaussianMixture:
    """Full covariances with eigenvalues from 1 to 1/condition along random axes."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(k, d, d)))[0]
    full = np.einsum("kij,j,klj->kil", axes, np.geomspace(1.0, 1.0 / condition, d), axes)
    full = 0.5 * (full + full.transpose(0, 2, 1))
    return GaussianMixture(
        rng.uniform(0.4, 0.6, k), rng.normal(size=(k, d)), full, covariance_type="full"
    )


def moments(mixture, x, alpha, sigma):
    """Mean and covariance of every component given x_t, and their shares, in many digits."""
    with mpmath.workdps(120):
        a, s = mpmath.mpf(alpha), mpmath.mpf(sigma)
        own = []
        for mean, covariance in zip(mixture.means, mixture.covariances, strict=True):
            c, m = mpmath.matrix(covariance.tolist()), mpmath.matrix(mean.tolist())
            shrink = c * (a * a * c + s * s * mpmath.eye(len(x))) ** -1
            own.append((m + a * shrink * (mpmath.matrix(x.tolist()) - a * m), s * s * shrink))
        shares = textbook_mixtures.exact_responsibilities(
            x, mixture.weights, mixture.means, mixture.covariances, alpha, sigma, digits=100
        )
        whole = mpmath.matrix(len(x), 1)
        for share, (mean, _) in zip(shares, own, strict=True):
            whole += share * mean
        spread = mpmath.matrix(len(x), len(x))
        for share, (mean, within) in zip(shares, own, strict=True):
            spread += share * (within + (mean - whole) * (mean - whole).T)
    return np.array([float(v) for v in whole]), np.array(spread.tolist(), dtype=np.float64)


@pytest.mark.parametrize("sigma", [1e-10, 1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_no_digit_is_lost_to_the_condition(condition, sigma):
    """In a component, and far out across its narrowest axis."""
    mixture = ill_conditioned(condition, int(np.log10(condition)))
    rng = np.random.default_rng(0)
    for alpha in (1.0, 0.5, 1e-6):
        inside = alpha * (mixture.means[0] + np.linalg.cholesky(mixture.covariances[0])[:, 0])
        x = np.stack([inside, rng.normal(size=3)])
        got = (
            mixture.posterior_mean(x, alpha, sigma),
            mixture.posterior_covariance(x, alpha, sigma),
        )
        for row, mean, covariance in zip(x, *got, strict=True):
            expected_mean, expected = moments(mixture, row, alpha, sigma)
            size = 1.0 + np.abs(row).max() / alpha
            assert np.abs(mean - expected_mean).max() < 1e-13 * size
            assert np.abs(covariance - expected).max() < 1e-12 * np.abs(expected).max()
        point = mixture.reverse_transition(x[0], alpha, sigma)
        size = 1.0 + np.abs(x[0]).max() / alpha
        assert error(point.weights @ point.means, got[0][0]) < 1e-9 * size


@pytest.mark.parametrize("condition", CONDITIONS)
def test_reverse_transitions_keep_their_digits_too(condition):
    """p(x_s | x_t) of one component is N(m', C') with both in closed form."""
    mixture = ill_conditioned(condition, 3, k=1)
    at_t, at_s, x = (0.5, 1e-5), (0.9, 1e-6), np.array([0.3, -0.2, 0.5])
    got = mixture.reverse_transition(x, *at_t, *at_s)
    with mpmath.workdps(80):
        (a_t, s_t), (a_s, s_s) = (tuple(map(mpmath.mpf, pair)) for pair in (at_t, at_s))
        ratio = a_t / a_s
        beta = s_t**2 - ratio**2 * s_s**2
        clean = a_s**2 * mpmath.matrix(mixture.covariances[0].tolist()) + s_s**2 * mpmath.eye(3)
        shrink = clean * (ratio**2 * clean + beta * mpmath.eye(3)) ** -1
        m = a_s * mpmath.matrix(mixture.means[0].tolist())
        mean = m + ratio * shrink * (mpmath.matrix(x.tolist()) - ratio * m)
        covariance = np.array((beta * shrink).tolist(), dtype=np.float64)
    assert np.abs(got.means[0] - [float(v) for v in mean]).max() < 1e-13
    # beta itself is a difference, good to a few units of rounding.
    assert np.abs(got.covariances[0] - covariance).max() < 1e-13 * np.abs(covariance).max()


@pytest.mark.parametrize("kind", ["spherical", "full"])
def test_shares_far_out_are_refined(kind):
    """Squared distances of 1e21 that differ by a few units decide whose mean it is."""
    covariance = np.array([1e-6, 1e-6])
    if kind == "full":
        covariance = covariance[:, None, None] * np.array([[1.0, 0.2], [0.2, 1.0]])
    # The second mean is moved across, so that the squares differ by some units only.
    mixture = GaussianMixture(
        [0.5, 0.5],
        [[0.0, 0.0], [0.0, 3e-13]],
        covariance,
        covariance_type=("spherical", kind)[kind == "full"],
    )
    x = np.array([[3e6, 1e6], [-2e6, 4e6]])
    parameters = (mixture.weights, mixture.means, mixture.covariances, 0.9, 1e-3)
    got = mixture.posterior_mean(x, 0.9, 1e-3)
    gap = np.abs(mixture.means[1]).max()
    for row, mean in zip(x, got, strict=True):
        expected = np.array(
            [float(v) for v in textbook_mixtures.exact_posterior_mean(row, *parameters)]
        )
        assert np.abs(mean - expected).max() <= 1e-13 * np.abs(row).max() / 0.9 + 1e-9 * gap


def test_far_points_belong_to_the_right_component():
    """Between two components, 4e5 widths from each, 1e-13 off the middle changes the shares."""
    mixture = GaussianMixture(
        [0.5, 0.5], [[0.0], [1.0]], [1e-12, 1e-12], covariance_type="spherical"
    )
    # Equally far from both: a share is decided by the last digits of squares of 1e23.
    x = np.array([[0.5 + 1e-13], [0.5 - 2e-13], [0.5]])
    parameters = (mixture.weights, mixture.means, mixture.covariances, 1.0, 1e-6)
    got = mixture.posterior_mean(x, 1.0, 1e-6)
    for row, mean in zip(x, got, strict=True):
        expected = float(textbook_mixtures.exact_posterior_mean(row, *parameters)[0])
        assert abs(mean[0] - expected) < 1e-9
    assert 0.4 < got[2, 0] < 0.6 and abs(got[0, 0] - got[1, 0]) > 0.01
