"""The guided target in any dimension: its log density, score, exact draws and normaliser."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dng_math import (
    DynamicNegativeGuidance,
    GaussianMixture,
    guided_density,
    guided_log_density,
    predict,
)
from dng_math.distances import ks_critical_value, ks_statistic
from tests.helpers.mixtures import KINDS, mixtures, moderate, points
from tests.helpers.tolerances import QUADRATURE, error

seeds = st.integers(0, 2**32 - 1)
SCALES = (-0.3, 0.5, 2.0, 5.0)
LINE = GaussianMixture([0.3, 0.3, 0.4], [[-1.5], [0.2], [2.0]], [0.3, 0.5, 0.2])
# 5 standard errors: a false alarm in 1.7 million.
ERRORS = 5.0


def spread_out(kind: str, d: int) -> GaussianMixture:
    """LINE along a direction of d dimensions, the same Gaussian in all of them across it.

    So the posterior depends on one coordinate alone, and the guided density is a product.
    """
    means = np.zeros((3, d))
    means[:, 0] = LINE.means[:, 0]
    if kind == "diagonal":
        variances = np.full((3, d), 0.7)
        variances[:, 0] = LINE.covariances
        return GaussianMixture(LINE.weights, means, variances, covariance_type="diag")
    axes = np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]
    full = np.array([axes @ np.diag([v, *[0.7] * (d - 1)]) @ axes.T for v in LINE.covariances])
    full = 0.5 * (full + full.transpose(0, 2, 1))
    return GaussianMixture(LINE.weights, means @ axes.T, full, covariance_type="full")


def along(kind: str, x: np.ndarray) -> np.ndarray:
    """The coordinate along the direction that the means of :func:`spread_out` lie on."""
    d = x.shape[1]
    if kind == "diagonal":
        return x[:, 0]
    return x @ np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0][:, 0]


# ---------------------------------------------------------------- the function


@given(mixtures(max_dim=4), seeds)
def test_whole_scales_are_mixtures(mixture, seed):
    """g = 0 is the mixture, g = 1 what restrict() leaves, times its weight."""
    x, rest = points(mixture, seed), np.arange(1, mixture.n_components)
    assert np.array_equal(guided_log_density(mixture, [0], 0.0)(x), mixture.log_prob(x))
    left, target = mixture.restrict(rest), guided_log_density(mixture, [0], 1.0)
    weight = math.log(mixture.weights[rest].sum())
    assert error(target(x), left.log_prob(x) + weight) < 1e-11
    assert error(target.score(x), left.score(x)) < 1e-10
    assert error(target.log_normaliser(), (weight, 0.0)) < 1e-15


@given(mixtures(max_dim=4), seeds, st.floats(-2.0, 5.0))
def test_the_score_is_that_of_exact_dng_and_the_gradient(mixture, seed, g):
    """Eq. 10, at a noise level of its own; and central differences."""
    x = points(mixture, seed)
    noisy = mixture.diffuse(0.8, 0.6)
    target = guided_log_density(noisy, [0], g)
    rule = DynamicNegativeGuidance(g)
    expected = predict(mixture, x, 0.8, 0.6, rule, forbidden=[0], prediction_type="score").guided
    assert error(target.score(x), expected) < 1e-11
    h = 1e-5
    for axis in np.eye(mixture.dim):
        slope = (target(x + h * axis) - target(x - h * axis)) / (2.0 * h)
        size = 1.0 + np.abs(target(x)).max()
        assert np.abs(slope - target.score(x) @ axis).max() < 1e-5 * size


def test_in_one_dimension_it_is_the_density_that_was_there():
    x = np.linspace(-4, 4, 50)
    for g in SCALES:
        known = guided_density(LINE, [1], g)
        target = guided_log_density(LINE, [1], g)
        log_z, allowed = target.log_normaliser()
        assert error(np.exp(target(x[:, None]) - log_z), known.pdf(x)) < QUADRATURE
        assert error(log_z, known.log_normaliser) < 1e-12 and allowed < 1e-10


def test_a_mask_names_components_too():
    assert guided_log_density(LINE, [False, True, True], 2.0).forbidden.tolist() == [1, 2]


# ---------------------------------------------------------------- its normaliser


@pytest.mark.parametrize("g", SCALES)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_cubature_is_the_product(kind, g):
    """A product of a one-dimensional density and a Gaussian has the normaliser of the first."""
    got = guided_log_density(spread_out(kind, 2), [1], g).log_normaliser()
    assert error(got.value, guided_density(LINE, [1], g).log_normaliser) < QUADRATURE
    assert 0.0 < got.error < QUADRATURE


@pytest.mark.parametrize("kind", KINDS)
def test_cubature_knows_the_weight_that_is_left(kind):
    """At g = 1, where the answer is known: the quadrature itself, with narrow modes too."""
    mixture = moderate(3, kind, 5, 2)
    narrow = GaussianMixture(
        [0.2, 0.5, 0.3], [[0.0, 0.0], [3.0, 1.0], [-2.0, 4.0]], [1e-8, 1.0, 1e-5],
        covariance_type="spherical",
    )  # fmt: skip
    # A ridge along the diagonal, 0.07 of its length wide.
    ridge = np.array([[1.0, 0.99], [0.99, 1.0]])
    ridges = GaussianMixture([0.5, 0.5], [[0.0, 0.01], [30.0, 9.0]], [ridge, np.eye(2)],
                             covariance_type="full")  # fmt: skip
    cases = [(mixture, [0, 2])]
    if kind == "spherical":
        cases += [(narrow, [1]), (narrow, [0])]
    if kind == "full":
        cases += [(ridges, [1])]
    for m, forbidden in cases:
        target = guided_log_density(m, forbidden, 1.0)
        got, known = target._by_cubature(), target.log_normaliser()
        assert error(got.value, known.value) < QUADRATURE
        assert got.error < QUADRATURE


@pytest.mark.parametrize("g", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_draws_are_within_their_error(d, g):
    mixture = LINE if d == 1 else spread_out("full", d)
    target = guided_log_density(mixture, [1], g)
    exact = guided_density(LINE, [1], g).log_normaliser
    got = target.log_normaliser(draws=20_000, rng=d)
    if g == 1.0:
        assert got.error == 0.0
        assert error(got.value, exact) < 1e-11
    else:
        assert abs(got.value - exact) < ERRORS * got.error
        assert 1e-4 < got.error < 0.02


def test_the_error_of_draws_is_that_of_many_estimates():
    """The spread of 400 estimates of 500 draws is their mean error, to 18% (5 sigma)."""
    target = guided_log_density(LINE, [1], 3.0)
    rng = np.random.default_rng(0)
    estimates = [target.log_normaliser(draws=500, rng=rng) for _ in range(400)]
    values, errors = np.array(estimates).T
    assert abs(np.std(values) / np.mean(errors) - 1.0) < 5.0 / math.sqrt(2 * 400) + 0.01
    assert abs(np.mean(values) - guided_density(LINE, [1], 3.0).log_normaliser) < (
        ERRORS * np.mean(errors) / math.sqrt(400) + np.mean(errors) ** 2
    )


# ---------------------------------------------------------------- exact draws


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_draws_follow_the_density(d, g):
    """Kolmogorov-Smirnov at 1e-6 along the direction where guidance acts, and across it."""
    kind = "diagonal" if d == 2 else "full"
    mixture, n = LINE if d == 1 else spread_out(kind, d), 20_000
    x = guided_log_density(mixture, [1], g).sample(n, rng=7)
    assert x.shape == (n, d)
    first = x[:, 0] if d == 1 else along(kind, x)
    critical = ks_critical_value(n, 1e-6)
    assert ks_statistic(first, guided_density(LINE, [1], g).cdf) < critical
    if g > 0:
        assert ks_statistic(first, guided_density(LINE, [1], 0.0).cdf) > 2 * critical
    if d == 2:
        assert ks_statistic(x[:, 1], stats.norm(scale=math.sqrt(0.7)).cdf) < critical


def test_draws_are_a_function_of_the_seed():
    target = guided_log_density(spread_out("full", 3), [0], 2.0)
    assert np.array_equal(target.sample(50, 3), target.sample(50, np.random.default_rng(3)))
    assert target.sample(0, 3).shape == (0, 3)


# ---------------------------------------------------------------- what is refused


TARGET = guided_log_density(spread_out("full", 3), [0], 2.0)
ATTRACTED = guided_log_density(spread_out("full", 3), [0], -0.5)
REFUSED = [
    (lambda: guided_log_density("m", [0], 1.0), TypeError, "mixture must be a GaussianMixture"),
    (lambda: guided_log_density(LINE, [3], 1.0), ValueError, "components must be from 0 to 2"),
    (lambda: guided_log_density(LINE, [], 1.0), ValueError, "components must not be empty"),
    (lambda: guided_log_density(LINE, [0, 1, 2], 1.0), ValueError, "some component allowed"),
    (lambda: guided_log_density(LINE, [0], math.nan), ValueError, "guidance_scale must be finite"),
    (lambda: guided_log_density(LINE, [0], "2"), TypeError, "guidance_scale must be a real"),
    (lambda: guided_density(spread_out("full", 2), [0], 2.0), ValueError, "guided_log_density"),
    (lambda: TARGET(np.zeros(3)), ValueError, r"x must have shape \(N, 3\)"),
    (lambda: TARGET.score(np.full((1, 3), np.inf)), ValueError, "x must be finite"),
    (lambda: TARGET.log_normaliser(), ValueError, "draws must be given in 3 dimensions"),
    (lambda: TARGET.log_normaliser(draws=10), ValueError, "draws must be an integer >= 100"),
    (lambda: TARGET.log_normaliser(draws=1e4), TypeError, "draws must be an integer"),
    (lambda: TARGET.log_normaliser(1000, rng="a"), TypeError, "rng must be a numpy.random.Gen"),
    (lambda: TARGET.sample(-1), ValueError, "n must be an integer >= 0"),
    (lambda: TARGET.sample(1, rng=-1), ValueError, "rng must be an integer >= 0"),
    (lambda: ATTRACTED.sample(1), ValueError, "guidance_scale must be >= 0 for sample"),
    (lambda: ATTRACTED.log_normaliser(1000), ValueError, "guidance_scale must be >= 0 for draws"),
    (
        lambda: guided_log_density(spread_out("full", 3), [0, 1], 1e4).log_normaliser(1000, 0),
        ValueError,
        "the effective number is",
    ),
    (
        lambda: guided_log_density(moderate(1, "full", 3, 2), [0], -30.0).log_normaliser(),
        ValueError,
        "can be normalised",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_what_cannot_be_known_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
