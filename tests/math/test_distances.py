"""dng_math.distances against SciPy, closed forms, brute quadrature and invariances."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, linalg, special, stats

from dng_math import GaussianMixture
from dng_math.distances import (
    TargetDensity1D,
    binomial_interval,
    forbidden_mass,
    frechet_distance,
    guided_density,
    kl_categorical,
    kl_to_target,
    ks_critical_value,
    ks_statistic,
    sliced_wasserstein,
    wasserstein1,
)
from tests.helpers.statistical import FALSE_ALARM, assert_distribution_1d, assert_mean_close
from tests.helpers.tolerances import QUADRATURE, error

few = settings(max_examples=40, deadline=None)
samples_1d = hnp.arrays(
    np.float64, st.integers(1, 12), elements=st.floats(-20.0, 20.0, allow_subnormal=False)
)


class SphericalMixture(GaussianMixture):
    """A mixture whose densities and posteriors are SciPy's: weights (K,), means (K, D) or (K,)."""

    def __init__(self, weights, means, deviations):
        means = np.reshape(np.asarray(means, dtype=float), (len(weights), -1))
        variances = np.asarray(deviations, dtype=float) ** 2
        super().__init__(weights, means, variances, covariance_type="spherical")

    @property
    def deviations(self):
        return np.sqrt(self.covariances)

    def _log_joint(self, x):
        x = np.asarray(x, dtype=float)
        gap = stats.norm.logpdf(x[:, None, :], self.means, self.deviations[:, None])
        return np.log(self.weights) + gap.sum(axis=2)

    def log_prob(self, x):
        return special.logsumexp(self._log_joint(x), axis=1)

    def log_posterior(self, x, components, complement=False):
        chosen = np.zeros(len(self.weights), dtype=bool)
        chosen[np.asarray(components)] = True
        joint = self._log_joint(x)
        part = special.logsumexp(np.where(chosen != complement, joint, -np.inf), axis=1)
        return part - special.logsumexp(joint, axis=1)

    def cdf(self, x):
        x = np.asarray(x, dtype=float)[..., None]
        return (self.weights * stats.norm.cdf(x, self.means[:, 0], self.deviations)).sum(axis=-1)


FOUR = SphericalMixture([0.1, 0.2, 0.3, 0.4], [-4.0, -1.0, 1.0, 4.0], [0.3, 0.5, 0.4, 0.2])
FOUR_TARGET = guided_density(FOUR, [0], 0.0)
NORMAL = TargetDensity1D(lambda x: -0.5 * x**2, -12.0, 12.0)
UNIFORM = TargetDensity1D(np.zeros_like, 0.0, 1.0)


# TargetDensity1D


def test_normal_density_agrees_with_scipy_everywhere():
    x = np.linspace(-14.0, 14.0, 5001)
    assert error(NORMAL.log_normaliser, 0.5 * math.log(2.0 * math.pi)) < 1e-14
    assert error(NORMAL.cdf(x), stats.norm.cdf(x)) < 1e-14
    assert error(NORMAL.pdf(x), np.where(np.abs(x) <= 12.0, stats.norm.pdf(x), 0.0)) < 1e-14
    assert abs(NORMAL.mean) < 1e-14
    q = np.concatenate([[1e-300, 1e-12], np.linspace(0.001, 0.999, 999), [1.0 - 1e-9]])
    assert np.abs(stats.norm.cdf(NORMAL.quantile(q)) - q).max() < 1e-14
    # The left tail is known relatively, not only absolutely.
    assert error(NORMAL.quantile(1e-18), stats.norm.ppf(1e-18)) < 1e-10


@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3])
def test_narrow_modes_are_found_without_being_told(width):
    # The density's own constant is arbitrary, so it is made one that underflows.
    rng = np.random.default_rng(0)
    for centre in rng.uniform(0.01, 0.99, 12):
        mixture = SphericalMixture([0.4, 0.6], [centre, 0.5], [width, 0.3])
        target = TargetDensity1D(lambda x, m=mixture: m.log_prob(x[:, None]) - 1e4, 0.0, 1.0)
        base, whole = mixture.cdf(0.0), mixture.cdf(1.0) - mixture.cdf(0.0)
        x = np.concatenate([rng.normal(centre, 2.0 * width, 300), rng.uniform(0.0, 1.0, 300)])
        x = np.clip(x, 0.0, 1.0)
        assert abs(target.log_normaliser + 1e4 - math.log(whole)) < 1e-10
        assert np.abs(target.cdf(x) - (mixture.cdf(x) - base) / whole).max() < 1e-10
        assert np.abs(target.cdf(target.quantile(target.cdf(x))) - target.cdf(x)).max() < 1e-10


def test_breakpoints_frame_a_mode_that_panels_would_miss():
    mixture = SphericalMixture([0.5, 0.5], [0.3, 0.5], [1e-7, 0.05])
    frame = 0.3 + 1e-7 * np.array([-9.0, -6.0, 0.0, 6.0, 9.0])
    target = TargetDensity1D(lambda x: mixture.log_prob(x[:, None]), 0.0, 1.0, frame)
    assert abs(target.log_normaliser) < 1e-8
    assert abs(target.mean - 0.4) < 1e-8


def test_jumps_and_kinks_are_resolved():
    def box(x):
        return np.where((x > 0.2) & (x < 0.7), 3.0, -np.inf)

    target = TargetDensity1D(box, 0.0, 1.0)
    x = np.linspace(-0.5, 1.5, 999)
    assert error(target.cdf(x), np.clip((x - 0.2) / 0.5, 0.0, 1.0)) < 1e-12
    assert error(target.log_normaliser, 3.0 + math.log(0.5)) < 1e-12
    assert abs(target.mean - 0.45) < 1e-12
    laplace = TargetDensity1D(lambda x: -np.abs(x - 0.1), -40.0, 40.0)
    x = np.linspace(-30.0, 30.0, 999)
    assert error(laplace.cdf(x), stats.laplace.cdf(x, 0.1)) < 1e-12


def test_quantile_is_the_smallest_point_where_the_density_has_a_gap():
    def two_boxes(x):
        return np.where((x < 0.25) | (x > 0.75), 0.0, -np.inf)

    target = TargetDensity1D(two_boxes, 0.0, 1.0, [0.25, 0.75])
    assert target.quantile(0.5) == pytest.approx(0.25, abs=1e-12)
    assert target.quantile(0.5 + 1e-9) == pytest.approx(0.75, abs=1e-8)
    late = TargetDensity1D(lambda x: np.where(x > 0.25, 0.0, -np.inf), 0.0, 1.0)
    assert late.quantile(0.0) == 0.0
    assert late.quantile(1.0) == pytest.approx(1.0, abs=1e-12)


def test_mass_is_relative_in_both_tails_and_additive():
    lo = np.array([-9.0, -6.0, -1.0, 5.0, 8.0])
    hi = lo + 0.5
    exact = np.where(
        lo < 0.0,
        stats.norm.cdf(hi) - stats.norm.cdf(lo),
        stats.norm.sf(lo) - stats.norm.sf(hi),
    )
    assert np.abs(NORMAL.mass(lo, hi) / exact - 1.0).max() < 1e-9
    assert NORMAL.mass(-np.inf, np.inf) == pytest.approx(1.0, abs=1e-15)
    assert NORMAL.mass(2.0, 2.0) == 0.0
    edges = np.linspace(-13.0, 13.0, 57)
    assert NORMAL.mass(edges[:-1], edges[1:]).sum() == pytest.approx(1.0, abs=1e-14)


@few
@given(st.floats(-8.0, 8.0), st.floats(0.05, 5.0), st.floats(0.0, 1.0))
def test_a_density_moves_and_stretches_with_its_argument(shift, scale, q):
    moved = TargetDensity1D(
        lambda x: -0.5 * ((x - shift) / scale) ** 2, shift - 12.0 * scale, shift + 12.0 * scale
    )
    assert error(moved.log_normaliser, NORMAL.log_normaliser + math.log(scale)) < 1e-12
    assert error(moved.mean, shift) < 1e-12
    assume(1e-9 < q < 1.0 - 1e-9)
    assert error(moved.quantile(q), shift + scale * NORMAL.quantile(q)) < 1e-6


def test_quantile_is_monotone_and_ends_in_the_support():
    q = np.sort(np.random.default_rng(1).random(20000))
    x = NORMAL.quantile(q)
    assert (np.diff(x) >= 0.0).all()
    assert NORMAL.quantile(0.0) == -12.0
    assert 6.0 < NORMAL.quantile(1.0) <= 12.0
    assert_distribution_1d(NORMAL.quantile(np.random.default_rng(2).random(20000)), stats.norm.cdf)


def test_a_copy_is_as_frozen_as_the_object():
    target = copy.deepcopy(TargetDensity1D(lambda x: -0.5 * x**2, -9.0, 9.0))
    for name in ("_edges", "_series", "_left", "_right", "_left_integral"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(target, name)[...] = 0.0
    assert target.cdf(0.0) == pytest.approx(0.5, abs=1e-12)


def test_shapes_follow_the_argument_and_the_object_is_frozen():
    for method in (NORMAL.pdf, NORMAL.cdf, NORMAL.quantile):
        assert np.ndim(method(0.5)) == 0
        assert method(np.full((2, 3), 0.5)).shape == (2, 3)
        assert method(np.zeros((0,))).shape == (0,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NORMAL.lo = 0.0
    with pytest.raises(ValueError, match="read-only"):
        NORMAL._edges[0] = 0.0


def test_rounding_of_the_log_density_does_not_send_the_panels_chasing_noise():
    target = TargetDensity1D(lambda x: 1e8 - 0.5 * x**2, -12.0, 12.0)
    assert target._edges.size < 2000
    assert np.abs(target.cdf(np.arange(-3.0, 4.0)) - stats.norm.cdf(np.arange(-3.0, 4.0))).max() < (
        1e-7
    )


def test_a_density_far_from_the_origin_loses_only_what_its_argument_has_lost():
    # Neighbouring doubles are 1e-10 apart there, 6e-9 of the narrow mode.
    mixture = SphericalMixture([0.5, 0.5], [1e6, 1e6 + 5.0], [1.0, 0.02])
    target = TargetDensity1D(lambda x: mixture.log_prob(x[:, None]), 1e6 - 12.0, 1e6 + 12.0)
    x = 1e6 + np.linspace(-4.0, 6.0, 999)
    assert target._edges.size < 2000
    assert np.abs(target.cdf(x) - mixture.cdf(x)).max() < QUADRATURE
    assert abs(target.mean - (1e6 + 2.5)) < 1e-8


# the guided target


def test_guided_density_without_guidance_is_the_mixture():
    target = guided_density(FOUR, [1], 0.0)
    x = np.linspace(-6.0, 6.0, 2001)
    assert abs(target.log_normaliser) < 1e-12
    assert error(target.cdf(x), FOUR.cdf(x)) < 1e-12
    assert error(target.mean, FOUR.weights @ FOUR.means[:, 0]) < 1e-12


def test_guided_density_sees_modes_of_any_width():
    mixture = SphericalMixture([0.25, 0.25, 0.5], [0.0, -5.0, 5.0], [1e-6, 1e-9, 2.0])
    target = guided_density(mixture, [1], 1.0)
    assert error(target.log_normaliser, math.log(0.75)) < 1e-10
    assert error(target.mean, 0.5 * 5.0 / 0.75) < 1e-10
    x = 1e-6 * np.linspace(-12.0, 12.0, 999)
    rest = SphericalMixture([0.25, 0.5], [0.0, 5.0], [1e-6, 2.0])
    assert np.abs(target.cdf(x) - rest.cdf(x)).max() < 1e-10


def test_guided_density_at_one_is_the_mixture_without_the_components():
    rest = SphericalMixture([0.1, 0.4], [-4.0, 4.0], [0.3, 0.2])
    target = guided_density(FOUR, [1, 2], 1.0)
    x = np.linspace(-6.0, 6.0, 2001)
    assert error(target.log_normaliser, math.log(0.5)) < 1e-12
    assert error(target.cdf(x), rest.cdf(x)) < 1e-12
    assert error(target.pdf(x), np.exp(rest.log_prob(x[:, None]))) < 1e-12


@pytest.mark.parametrize("g", [-0.7, 0.3, 2.0, 5.0, 40.0])
def test_guided_density_is_the_product_by_brute_quadrature(g):
    # One tail: the widest component is allowed, so q decays for every one of these g.
    mixture = SphericalMixture([0.3, 0.5, 0.2], [-1.0, 0.5, 2.0], [0.5, 0.6, 0.9])

    def q(x):
        point = np.array([[x]])
        allowed = math.exp(mixture.log_posterior(point, [1], complement=True)[0])
        return math.exp(mixture.log_prob(point)[0]) * allowed**g

    def integral(f, lo, hi):
        return integrate.quad(f, lo, hi, epsabs=1e-13, epsrel=1e-12, limit=400)[0]

    pieces = [-9.0, -1.0, 0.5, 2.0, 12.0]
    normaliser = sum(map(integral, [q] * 4, pieces[:-1], pieces[1:]))
    target = guided_density(mixture, [1], g)
    assert error(target.log_normaliser, math.log(normaliser)) < QUADRATURE
    for lo, hi in [(-2.0, 0.0), (0.0, 0.5), (0.5, 3.0)]:
        assert error(target.mass(lo, hi), integral(q, lo, hi) / normaliser) < QUADRATURE
    mean = sum(map(integral, [lambda x: x * q(x)] * 4, pieces[:-1], pieces[1:])) / normaliser
    assert error(target.mean, mean) < QUADRATURE


def test_score_of_the_guided_density_is_the_score_that_dng_follows():
    # grad log q = s - g o (s_c - s), the left side by finite differences.
    g, c = 3.0, 2
    target = guided_density(FOUR, [c], g)
    x, h = np.linspace(-4.5, 4.5, 41), 1e-4

    shares = np.exp(FOUR._log_joint(x[:, None]) - FOUR.log_prob(x[:, None])[:, None])
    scores = -(x[:, None] - FOUR.means[:, 0]) / FOUR.covariances
    s, s_c = (shares * scores).sum(axis=1), scores[:, c]
    odds = shares[:, c] / np.delete(shares, c, axis=1).sum(axis=1)
    log_q = [np.log(target.pdf(x + k * h)) for k in (-2, -1, 1, 2)]
    slope = (log_q[0] - 8.0 * log_q[1] + 8.0 * log_q[2] - log_q[3]) / (12.0 * h)
    assert error(slope, s - g * odds * (s_c - s)) < 1e-6


def test_guided_bounds_widen_until_the_mass_is_inside():
    # A wide allowed component under a forbidden one: e^1000 times more mass in its tails.
    mixture = SphericalMixture([0.999, 0.001], [0.0, 0.0], [1.0, 1.01])
    target = guided_density(mixture, [0], 1000.0)
    assert target.lo < -13.0 and target.hi > 13.0
    wider = guided_density(mixture, [0], 1000.0, bounds=(4.0 * target.lo, 4.0 * target.hi))
    assert error(target.log_normaliser, wider.log_normaliser) < 1e-10
    narrow = guided_density(mixture, [0], 1000.0, bounds=(-1.0, 1.0))
    assert narrow.log_normaliser < target.log_normaliser - 1.0


def test_guided_density_refuses_what_has_no_density():
    with pytest.raises(ValueError, match=r"mixture must have dimension 1, got 2"):
        guided_density(SphericalMixture([0.5, 0.5], [[0.0, 0.0]] * 2, [1.0, 2.0]), [0], 1.0)
    with pytest.raises(ValueError, match="components must leave some component allowed"):
        guided_density(FOUR, [0, 1, 2, 3], 1.0)
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"):
        guided_density(FOUR, [0], math.nan)
    with pytest.raises(ValueError, match="guidance_scale must leave a density"):
        guided_density(SphericalMixture([0.5, 0.5], [0.0, 0.0], [2.0, 1.0]), [0], -3.0)
    with pytest.raises(ValueError, match=r"bounds must be increasing, got \(1, 0\)"):
        guided_density(FOUR, [0], 1.0, bounds=(1, 0))
    with pytest.raises(ValueError, match="bounds must be"):
        guided_density(FOUR, [0], 1.0, bounds=(0.0, 1.0, 2.0))


# Kolmogorov-Smirnov


@few
@given(samples_1d)
def test_ks_is_the_supremum_over_both_sides_of_the_jumps(samples):
    expected = max(
        max(
            abs(np.mean(samples <= x) - stats.norm.cdf(x)),
            abs(np.mean(samples < x) - stats.norm.cdf(x)),
        )
        for x in samples
    )
    statistic = ks_statistic(samples, stats.norm.cdf)
    assert statistic == pytest.approx(expected, abs=1e-14)
    assert statistic >= 0.5 / len(samples) - 1e-15
    # No increasing map of the line changes it.
    assert ks_statistic(np.exp(0.1 * samples), lambda y: stats.norm.cdf(10.0 * np.log(y))) == (
        pytest.approx(expected, abs=1e-9)
    )


def test_ks_agrees_with_scipy_and_has_known_values():
    samples = np.random.default_rng(3).normal(size=4001)
    assert ks_statistic(samples, stats.norm.cdf) == pytest.approx(
        stats.kstest(samples, stats.norm.cdf).statistic, abs=1e-15
    )
    assert ks_statistic([0.3], UNIFORM.cdf) == pytest.approx(0.7, abs=1e-15)
    assert ks_statistic([0.5, 0.5, 0.5], UNIFORM.cdf) == pytest.approx(0.5, abs=1e-15)
    assert ks_statistic([7.0], UNIFORM.cdf) == 1.0


def test_ks_critical_value_is_exact_and_rejects_at_its_rate():
    # n = 1: P(D > d) = 2 (1 - d) for d > 1/2.
    assert ks_critical_value(1, 0.2) == pytest.approx(0.9, abs=1e-12)
    for n in (5, 100, 10**6):
        for alpha in (1e-6, 0.05):
            critical = ks_critical_value(n, alpha)
            assert critical <= math.sqrt(math.log(2.0 / alpha) / (2.0 * n)) * (1.0 + 1e-9)
            assert stats.kstwo.sf(critical, n) == pytest.approx(alpha, rel=1e-4)
    rng = np.random.default_rng(4)
    draws = rng.random((4000, 7))
    critical = ks_critical_value(7, 0.3)
    alarms = [ks_statistic(row, UNIFORM.cdf) > critical for row in draws]
    assert_mean_close(np.array(alarms, dtype=float), 0.3, bounds=(0.0, 1.0))
    assert_distribution_1d(rng.random(3000), UNIFORM.cdf)


# Wasserstein


@few
@given(st.floats(-14.0, 14.0))
def test_wasserstein_of_one_point_is_the_mean_distance_to_it(a):
    expected = 2.0 * stats.norm.pdf(a) + a * (2.0 * stats.norm.cdf(a) - 1.0)
    assert wasserstein1([a], NORMAL) == pytest.approx(expected, abs=1e-12)


@few
@given(samples_1d)
def test_wasserstein_to_a_density_by_brute_quadrature(samples):
    ordered = np.sort(samples)
    levels = np.arange(1, len(ordered)) / len(ordered)
    corners = [np.linspace(-25.0, 25.0, 200), ordered, FOUR_TARGET.quantile(levels)]
    corners = np.unique(np.concatenate(corners))
    half = 0.5 * np.diff(corners)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = corners[:-1, None] + half[:, None] * (1.0 + nodes)
    empirical = np.searchsorted(ordered, x, side="right") / len(ordered)
    expected = half @ (np.abs(empirical - FOUR.cdf(x)) @ weights)
    assert wasserstein1(samples, FOUR_TARGET) == pytest.approx(expected, abs=1e-8)


def test_wasserstein_between_shifted_gaussians_is_the_shift():
    # A sample that is stochastically larger than the target: the distance of the means.
    n = 20001
    quantiles = stats.norm.ppf((np.arange(n) + 0.5) / n)
    for shift in (-5.0, 5.0):
        assert wasserstein1(quantiles + shift, NORMAL) == pytest.approx(5.0, abs=1e-4)
        assert wasserstein1(quantiles + shift, NORMAL) == pytest.approx(
            abs(np.mean(quantiles + shift)), abs=1e-6
        )
    assert wasserstein1(quantiles, quantiles + 0.7) == pytest.approx(0.7, abs=1e-12)
    assert wasserstein1(quantiles, NORMAL) < 2e-4


def test_wasserstein_of_uniform_midpoints_is_a_quarter_of_their_spacing():
    for n in (1, 2, 9, 1000):
        midpoints = (np.arange(n) + 0.5) / n
        assert wasserstein1(midpoints, UNIFORM) == pytest.approx(0.25 / n, abs=1e-13)
    # All samples beyond the support, on either side.
    assert wasserstein1([3.0, 5.0], UNIFORM) == pytest.approx(3.5, abs=1e-13)
    assert wasserstein1([-3.0, -5.0], UNIFORM) == pytest.approx(4.5, abs=1e-13)


@few
@given(samples_1d, samples_1d, samples_1d, st.floats(-3.0, 3.0))
def test_wasserstein_is_a_metric_and_scales(a, b, c, scale):
    ab, ac, cb = wasserstein1(a, b), wasserstein1(a, c), wasserstein1(c, b)
    assert ab <= ac + cb + 1e-9
    assert ab == pytest.approx(wasserstein1(b, a), abs=1e-9)
    assert wasserstein1(a[::-1], a) == pytest.approx(0.0, abs=1e-12)
    assert wasserstein1(scale * a + 1.0, scale * b + 1.0) == pytest.approx(
        abs(scale) * ab, abs=1e-9
    )
    # The density takes part in the triangle too.
    assert wasserstein1(a, NORMAL) <= ab + wasserstein1(b, NORMAL) + 1e-9


# Kullback-Leibler


def test_kl_to_target_in_closed_form():
    samples = np.repeat([0.1, 0.3, 0.6, 0.9], [1, 2, 3, 4])
    shares = np.array([1, 2, 3, 4]) / 10.0
    forward = np.sum(0.25 * np.log(0.25 / shares))
    backward = np.sum(shares * np.log(shares / 0.25))
    assert kl_to_target(samples, UNIFORM, 4) == pytest.approx(forward, abs=1e-12)
    assert kl_to_target(samples, UNIFORM, 4, direction="sample_to_target") == pytest.approx(
        backward, abs=1e-12
    )
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert kl_to_target(samples, UNIFORM, edges) == pytest.approx(forward, abs=1e-12)
    # The two outer pieces are bins as well: 0.2 of the target lies beyond 0.8.
    outer = np.array([1, 2, 3, 4]) / 10.0
    masses = np.array([0.25, 0.25, 0.3, 0.2])
    assert kl_to_target(samples, UNIFORM, [0.0, 0.25, 0.5, 0.8]) == pytest.approx(
        np.sum(masses * np.log(masses / outer)), abs=1e-12
    )
    # The edges of the support belong to its bins.
    assert kl_to_target([0.0, 1.0], UNIFORM, 2) == pytest.approx(0.0, abs=1e-12)


def test_kl_to_target_is_infinite_where_it_should_and_smoothed_on_request():
    assert kl_to_target([0.1, 0.2], UNIFORM, 2) == math.inf
    assert kl_to_target([0.1, 0.2], UNIFORM, 2, direction="sample_to_target") == pytest.approx(
        math.log(2.0), abs=1e-12
    )
    assert kl_to_target([0.1, 1.2], UNIFORM, 1, direction="sample_to_target") == math.inf
    assert kl_to_target([0.1, 0.2], UNIFORM, 2, pseudocount=1.0) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-12
    )
    # Half the sample lies where the target has no mass: log 2, with or without a pseudocount's bin.
    assert kl_to_target([0.5, 7.0], UNIFORM, 1) == pytest.approx(math.log(2.0), abs=1e-12)


@pytest.mark.parametrize("direction", ["target_to_sample", "sample_to_target"])
def test_kl_to_target_has_the_stated_bias(direction):
    n, bins, repeats = 4000, 8, 150
    draws = np.random.default_rng(5).random((repeats, n))
    twice = sum(2 * n * kl_to_target(row, UNIFORM, bins, direction=direction) for row in draws)
    # A sum of chi-squared variables; 2 % for the next order of the expansion, bins/N at most.
    freedom = repeats * (bins - 1)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1.0 - FALSE_ALARM / 2], freedom)
    assert 0.98 * low < twice < 1.02 * high


@few
@given(hnp.arrays(np.int64, 6, elements=st.integers(0, 50)), st.floats(0.0, 3.0))
def test_kl_categorical_agrees_with_scipy(counts, pseudocount):
    assume(counts.sum() > 0)
    ideal = np.array([0.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    smoothed = counts + pseudocount
    expected = stats.entropy(ideal, smoothed / smoothed.sum())
    assert kl_categorical(ideal, counts, pseudocount) == pytest.approx(expected, abs=1e-12)
    if pseudocount == 0.0:
        assert kl_categorical(ideal, 7.0 * counts) == pytest.approx(expected, abs=1e-12)


def test_kl_categorical_charges_the_forbidden_share():
    ideal = np.array([0.0] + [1 / 9] * 9)
    assert kl_categorical(ideal, [0] + [10] * 9) == 0.0
    assert kl_categorical(ideal, [10] * 10) == pytest.approx(math.log(10 / 9), abs=1e-12)
    assert kl_categorical(ideal, [0, 0] + [10] * 8) == math.inf
    assert math.isfinite(kl_categorical(ideal, [0, 0] + [10] * 8, pseudocount=0.5))


# any dimension


def test_forbidden_mass_is_the_mean_posterior():
    plane = SphericalMixture([0.5, 0.25, 0.25], [[0, 0], [4, 0], [0, 4]], [1.0, 1.0, 1.0])
    # As far from all three: the weights decide.
    assert forbidden_mass([[2.0, 2.0]], plane, [1]) == pytest.approx(0.25, abs=1e-12)
    assert forbidden_mass([[2.0, 2.0]] * 3, plane, [0, 2]) == pytest.approx(0.75, abs=1e-12)
    assert forbidden_mass([[2.0, 0.0], [40.0, 0.0]], plane, [1]) == pytest.approx(
        0.5 * (0.25 / (0.75 + 0.25 * math.exp(-6.0))) + 0.5, abs=1e-2
    )
    rng = np.random.default_rng(6)
    labels = rng.choice(3, size=20000, p=plane.weights)
    points = plane.means[labels] + rng.normal(size=(20000, 2))
    assert forbidden_mass(points, plane, [1]) + forbidden_mass(points, plane, [0, 2]) == (
        pytest.approx(1.0, abs=1e-12)
    )
    posterior = [forbidden_mass(row[None], plane, [1]) for row in points[:2000]]
    assert np.mean(posterior) == pytest.approx(forbidden_mass(points[:2000], plane, [1]), abs=1e-12)
    assert_mean_close(posterior, 0.25, bounds=(0.0, 1.0))


def test_sliced_wasserstein_in_one_dimension_is_wasserstein():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=31), rng.normal(size=53) * 2.0
    assert sliced_wasserstein(a[:, None], b[:, None]) == pytest.approx(
        stats.wasserstein_distance(a, b), abs=1e-12
    )
    c = rng.normal(size=31)
    assert sliced_wasserstein(a[:, None], c[:, None], p=2.0) == pytest.approx(
        math.sqrt(np.mean((np.sort(a) - np.sort(c)) ** 2)), abs=1e-12
    )


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    rng = np.random.default_rng(8)
    cloud, shift = rng.normal(size=(50, 2)), np.array([0.3, -0.4])
    assert sliced_wasserstein(cloud, cloud + shift, n_projections=2000) == pytest.approx(
        0.5 * 2.0 / math.pi, abs=1e-6
    )
    assert sliced_wasserstein(cloud, cloud + shift, n_projections=6, p=2.0) == pytest.approx(
        0.5 / math.sqrt(2.0), abs=1e-12
    )
    # In three dimensions |cos| of the angle to a fixed axis is uniform on (0, 1).
    cloud, shift = rng.normal(size=(4, 3)), np.array([0.0, 3.0, 4.0])
    each = [sliced_wasserstein(cloud, cloud + shift, 1, seed=i) / 5.0 for i in range(1000)]
    assert_mean_close(each, 0.5, bounds=(0.0, 1.0 + 1e-12))
    assert_distribution_1d(each, UNIFORM.cdf)


def test_sliced_wasserstein_invariances():
    rng = np.random.default_rng(9)
    a, b, c = rng.normal(size=(40, 2)), rng.normal(size=(25, 2)) + 1.0, rng.normal(size=(30, 2))
    n = 24
    reference = sliced_wasserstein(a, b, n)
    # Turned by one step of the directions, mirrored, moved, repeated, in another order.
    turn = math.pi / n
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    assert sliced_wasserstein(a @ rotation, b @ rotation, n) == pytest.approx(reference, abs=1e-12)
    assert sliced_wasserstein(a * [1, -1], b * [1, -1], n) == pytest.approx(reference, abs=1e-12)
    assert sliced_wasserstein(a + 5.0, b + 5.0, n) == pytest.approx(reference, abs=1e-12)
    assert sliced_wasserstein(b, a, n) == pytest.approx(reference, abs=1e-12)
    assert sliced_wasserstein(np.repeat(a, 3, axis=0)[::-1], b, n) == pytest.approx(
        reference, abs=1e-12
    )
    assert sliced_wasserstein(a, np.tile(a, (2, 1)), n) == pytest.approx(0.0, abs=1e-12)
    for p in (1.0, 2.0, 3.5):
        triangle = sliced_wasserstein(a, c, n, p=p) + sliced_wasserstein(c, b, n, p=p)
        assert sliced_wasserstein(a, b, n, p=p) <= triangle + 1e-12
    high = rng.normal(size=(10, 5)), rng.normal(size=(10, 5))
    assert sliced_wasserstein(*high, 16, seed=1) == sliced_wasserstein(*high, 16, seed=1)
    assert sliced_wasserstein(*high, 16, seed=1) != sliced_wasserstein(*high, 16, seed=2)


def test_frechet_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)) + 0.3
    m1, c1, m2, c2 = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2.0 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance((m1, c1), y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance((m1, c1), (m2, c2)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)
    turn = linalg.qr(rng.normal(size=(5, 5)))[0]
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(3.0 * x, 3.0 * y) == pytest.approx(9.0 * expected, rel=1e-10)


def test_frechet_of_one_feature_is_closed():
    x, y = np.array([[0.0], [2.0]]), np.array([[5.0], [13.0]])
    expected = 64.0 + (math.sqrt(2.0) - math.sqrt(32.0)) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-13)


def test_frechet_of_singular_covariances_keeps_its_digits():
    rng = np.random.default_rng(11)
    few_images = rng.normal(size=(4, 30))
    # Square roots of rounding errors would leave 1e-7 here.
    assert frechet_distance(few_images, few_images[::-1]) < 1e-12
    assert frechet_distance(few_images, few_images + 0.5) == pytest.approx(30 * 0.25, rel=1e-12)
    u, v, zero = rng.normal(size=8), rng.normal(size=8), np.zeros(8)
    expected = u @ u + v @ v - 2.0 * abs(u @ v)
    rank_one = frechet_distance((zero, np.outer(u, u)), (zero, np.outer(v, v)))
    assert rank_one == pytest.approx(expected, rel=1e-12)
    covariance = np.cov(rng.normal(size=(8, 40)))
    expected = u @ u + np.trace(covariance) - 2.0 * math.sqrt(u @ covariance @ u)
    assert frechet_distance((zero, np.outer(u, u)), (zero, covariance)) == pytest.approx(
        expected, rel=1e-12
    )
    assert all(frechet_distance(x, x) >= 0.0 for x in rng.normal(size=(30, 20, 4)))
    assert frechet_distance((zero, np.zeros((8, 8))), (zero, np.outer(v, v))) == pytest.approx(
        v @ v
    )


def test_binomial_interval_agrees_with_scipy_and_covers():
    for successes, n, confidence in [
        (0, 10, 0.95),
        (10, 10, 0.9),
        (3, 17, 0.99),
        (400, 10240, 0.95),
    ]:
        exact = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
        assert binomial_interval(successes, n, confidence) == pytest.approx(tuple(exact), abs=1e-12)
    assert binomial_interval(0, 5)[0] == 0.0 and binomial_interval(5, 5)[1] == 1.0
    n = 25
    intervals = np.array([binomial_interval(k, n, 0.9) for k in range(n + 1)])
    for p in np.linspace(0.01, 0.99, 99):
        inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        assert stats.binom.pmf(np.arange(n + 1), n, p)[inside].sum() >= 0.9


# the border

PLANE = np.zeros((3, 2))
BAD = [
    (ValueError, "lo must be below hi, got lo=1.0", lambda: TargetDensity1D(np.zeros_like, 1, 0)),
    (ValueError, "hi must be finite, got inf", lambda: TargetDensity1D(np.zeros_like, 0, math.inf)),
    (TypeError, "lo must be a real number", lambda: TargetDensity1D(np.zeros_like, "0", 1)),
    (TypeError, "log_density must be callable", lambda: TargetDensity1D(0.0, 0, 1)),
    (
        ValueError,
        "log_density must return the shape it is given",
        lambda: TargetDensity1D(lambda x: 0.0, 0, 1),
    ),
    (
        ValueError,
        "log_density must be finite or -inf, got nan",
        lambda: TargetDensity1D(lambda x: np.where(x > 0.5, np.nan, 0.0), 0, 1),
    ),
    (
        ValueError,
        "log_density must be finite or -inf, got inf",
        lambda: TargetDensity1D(lambda x: np.where(x > 0.5, np.inf, 0.0), 0, 1),
    ),
    (
        ValueError,
        "log_density must be above -inf somewhere",
        lambda: TargetDensity1D(lambda x: np.full_like(x, -np.inf), 0, 1),
    ),
    (
        ValueError,
        "log_density must be piecewise smooth",
        lambda: TargetDensity1D(lambda x: np.sin(1e6 * x**2), 0, 10),
    ),
    (
        ValueError,
        r"breakpoints must lie in \[0.0, 1.0\], got \[2.0\]",
        lambda: TargetDensity1D(np.zeros_like, 0, 1, [2.0]),
    ),
    (ValueError, r"q must be in \[0, 1\], got .*1.5", lambda: UNIFORM.quantile([0.5, 1.5])),
    (ValueError, "q must not be NaN", lambda: UNIFORM.quantile(math.nan)),
    (ValueError, "x must not be NaN", lambda: UNIFORM.cdf([0.0, math.nan])),
    (TypeError, "x must be an array of real numbers", lambda: UNIFORM.pdf("zero")),
    (ValueError, "lo must not exceed hi", lambda: UNIFORM.mass(1.0, 0.0)),
    (TypeError, "guidance_scale must be a real number", lambda: guided_density(FOUR, [0], "1")),
    (ValueError, r"samples must have shape \(N,\)", lambda: ks_statistic(PLANE, UNIFORM.cdf)),
    (ValueError, r"samples must not be empty", lambda: ks_statistic([], UNIFORM.cdf)),
    (TypeError, "samples must be an array of real", lambda: ks_statistic([1j], UNIFORM.cdf)),
    (TypeError, "cdf must be callable, got 0.5", lambda: ks_statistic([0.5], 0.5)),
    (ValueError, "cdf must return the shape", lambda: ks_statistic([0.5], lambda x: 0.5)),
    (ValueError, r"cdf must return values in \[0, 1\]", lambda: ks_statistic([2.0], lambda x: x)),
    (ValueError, "n must be an integer >= 1, got 0", lambda: ks_critical_value(0, 0.1)),
    (TypeError, "n must be an integer >= 1, got 2.5", lambda: ks_critical_value(2.5, 0.1)),
    (ValueError, r"alpha must be in \(0, 1\), got 1", lambda: ks_critical_value(5, 1)),
    (
        ValueError,
        r"samples must be finite, got nan at index \(1,\)",
        lambda: wasserstein1([0, math.nan], UNIFORM),
    ),
    (ValueError, r"target must have shape \(M,\)", lambda: wasserstein1([0.0], PLANE)),
    (ValueError, "bins must be an integer >= 1, got 0", lambda: kl_to_target([0.5], UNIFORM, 0)),
    (
        ValueError,
        "bins must be a number or at least 2",
        lambda: kl_to_target([0.5], UNIFORM, [1, 0]),
    ),
    (TypeError, "target must be a TargetDensity1D", lambda: kl_to_target([0.5], [0.5], 3)),
    (
        ValueError,
        "direction must be one of 'target_to_sample', 'sample_to_target'; got 'both'",
        lambda: kl_to_target([0.5], UNIFORM, 3, direction="both"),
    ),
    (
        ValueError,
        "pseudocount must be finite and >= 0, got -1",
        lambda: kl_to_target([0.5], UNIFORM, 3, pseudocount=-1),
    ),
    (ValueError, r"samples must have shape \(N, 1\)", lambda: forbidden_mass(PLANE, FOUR, [0])),
    (ValueError, r"samples must have shape \(N, D\)", lambda: forbidden_mass([0.0], FOUR, [0])),
    (ValueError, r"reference must have shape \(M, 2\)", lambda: sliced_wasserstein(PLANE, [[1.0]])),
    (ValueError, "n_projections must be", lambda: sliced_wasserstein(PLANE, PLANE, 0)),
    (ValueError, "seed must be an integer >= 0", lambda: sliced_wasserstein(PLANE, PLANE, seed=-1)),
    (ValueError, "p must be finite and >= 1", lambda: sliced_wasserstein(PLANE, PLANE, p=0.5)),
    (ValueError, "ideal must be probabilities", lambda: kl_categorical([0.5, 0.6], [1, 1])),
    (ValueError, r"counts must have shape \(2,\)", lambda: kl_categorical([0.5, 0.5], [1])),
    (ValueError, "counts must be >= 0", lambda: kl_categorical([0.5, 0.5], [0, 0])),
    (ValueError, "counts must be >= 0", lambda: kl_categorical([0.5, 0.5], [3, -1])),
    (ValueError, "samples must have at least 2 rows", lambda: frechet_distance([[1.0]], PLANE)),
    (
        ValueError,
        "reference must have 2 features",
        lambda: frechet_distance(PLANE, np.zeros((3, 4))),
    ),
    (
        ValueError,
        r"samples\[1\] must be symmetric",
        lambda: frechet_distance(([0, 0], [[1, 1], [0, 1]]), PLANE),
    ),
    (
        ValueError,
        r"reference\[1\] must be positive semidefinite, got the eigenvalue",
        lambda: frechet_distance(PLANE, ([0, 0], [[1, 0], [0, -1]])),
    ),
    (
        ValueError,
        r"samples\[1\] must have shape \(2, 2\)",
        lambda: frechet_distance(([0, 0], [[1.0]]), PLANE),
    ),
    (
        ValueError,
        r"samples must be features or \(mean, covariance\), got 3",
        lambda: frechet_distance(([0], [[1]], 5), PLANE),
    ),
    (ValueError, "successes must be an integer from 0 to 4", lambda: binomial_interval(5, 4)),
    (TypeError, "successes must be an integer", lambda: binomial_interval(True, 4)),
    (ValueError, "confidence must be in", lambda: binomial_interval(1, 4, 1.0)),
]


@pytest.mark.parametrize(
    ("kind", "message", "call"), BAD, ids=[f"{i}-{m[:24]}" for i, (_, m, _) in enumerate(BAD)]
)
def test_bad_arguments_are_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
