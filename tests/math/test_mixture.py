"""The exact mixture: 50-digit references, and the identities of the theory."""

from __future__ import annotations

import copy
import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.spatial.transform import Rotation
from scipy.special import logsumexp

from dng_math import GaussianMixture, NoiseSchedule, sample
from dng_math.distances import kl_categorical, wasserstein1
from dng_math.trackers import (
    TimeProfile,
    log_odds_from_log_posterior,
    log_posterior_from_log_odds,
)
from tests.helpers import textbook_mixtures
from tests.helpers.mixtures import TYPES, extreme, mixtures, moderate, points
from tests.helpers.statistical import assert_mean_close, assert_proportion
from tests.helpers.tolerances import LOG_POSTERIOR, LOG_PROB, SCORE, error

levels = st.tuples(st.floats(0.0, 1.0), st.floats(0.05, 5.0))
seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------- 50 digits


def check_against_references(seed: int) -> int:
    """Every query of one extreme mixture within its stated bound; returns the points checked."""
    case = extreme(seed)
    if case is None:
        return 0
    parameters = (case.weights, case.means, case.covariances, case.alpha, case.sigma)
    which = TYPES[case.covariances.ndim]
    mixture = GaussianMixture(*parameters[:3], covariance_type=which)
    mixture = mixture.diffuse(case.alpha, case.sigma)
    log_prob, score = mixture.log_prob(case.points), mixture.score(case.points)
    log_posterior = [
        mixture.log_posterior(case.points, case.chosen, complement=complement)
        for complement in (False, True)
    ]
    for i, x in enumerate(case.points):
        with mpmath.workdps(150):
            parts = textbook_mixtures._mp_components(x, *parameters)
        squares = float(max(part.maha for part in parts))
        # What double-double leaves of a difference of squared distances (see mixture.py).
        limit = mixture.dim * 2.0**-104 * squares

        expected = float(textbook_mixtures.exact_log_prob(x, *parameters))
        assert abs(log_prob[i] - expected) <= LOG_PROB * max(1.0, abs(expected)), (seed, i)

        for complement in (False, True):
            value = float(
                textbook_mixtures.exact_log_posterior(
                    x, case.chosen, *parameters, complement=complement
                )
            )
            got = log_posterior[complement][i]
            if value == -np.inf:
                assert got == -np.inf
            else:
                allowed = LOG_POSTERIOR * max(1.0, abs(value)) + limit
                assert abs(got - value) <= allowed, (seed, i, complement, got, value)

        exact = np.array([float(v) for v in textbook_mixtures.exact_score(x, *parameters)])
        share = np.array(
            [float(v) for v in textbook_mixtures.exact_responsibilities(x, *parameters)]
        )
        own = np.array([[float(v) for v in part.gradient] for part in parts])
        pull = share @ np.linalg.norm(own - exact, axis=1)
        size = max(1.0, float(np.linalg.norm(exact)))
        gap = np.linalg.norm(score[i] - exact)
        assert gap <= SCORE * size + (1e-12 + limit) * pull, (seed, i)
    return len(case.points)


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 4))]
)
def test_fifty_digits(block):
    """150 mixtures at the edges of what is promised; the slow test has ten times as many."""
    checked = sum(check_against_references(seed) for seed in range(40 * block, 40 * block + 40))
    assert checked > 100


@pytest.mark.slow
@pytest.mark.parametrize("block", range(15))
def test_fifty_digits_many(block):
    checked = sum(check_against_references(10_000 + 100 * block + i) for i in range(100))
    assert checked > 300


def test_complement_far_below_the_smallest_double():
    """p(rest | x) = e^-2e20: the complement of a posterior that is 1 in double."""
    mixture = GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [1e-12, 1e-12])
    x = np.array([[-1e8]])
    parameters = (mixture.weights, mixture.means, mixture.covariances)
    exact = float(textbook_mixtures.exact_log_posterior(x[0], [0], *parameters, complement=True))
    assert exact < -1e19
    assert error(mixture.log_posterior(x, [0], complement=True)[0], exact) < 1e-14
    assert mixture.log_posterior(x, [0])[0] == 0.0


def test_diffused_parameters_are_not_rounded():
    """Means 1e-11 apart, far away: the posterior follows alpha m, not its rounding."""
    from_rounded = []
    for offset in (1.1e-11, 1.7e-11, 2.3e-11):
        base = GaussianMixture([0.5, 0.5], [[1.1], [1.1 + offset]], [1e-6, 1e-6])
        x = np.array([[1e6]])
        noisy = base.diffuse(1 / 3, 1e-3)
        exact = float(
            textbook_mixtures.exact_log_posterior(
                x[0], [0], base.weights, base.means, base.covariances, 1 / 3, 1e-3
            )
        )
        assert error(noisy.log_posterior(x, [0]), exact) < LOG_POSTERIOR
        rounded = GaussianMixture(noisy.weights, noisy.means, noisy.covariances)
        from_rounded.append(error(rounded.log_posterior(x, [0]), exact))
    assert max(from_rounded) > 1e-6


def test_ill_conditioned_covariance():
    """Condition number 1e15: squared distances keep their digits through double-double."""
    axes = Rotation.from_euler("xyz", [0.3, 0.5, 0.7]).as_matrix()
    covariance = axes @ np.diag([1e3, 1.0, 1e-12]) @ axes.T
    covariance = 0.5 * (covariance + covariance.T)
    mixture = GaussianMixture([1.0], np.zeros((1, 3)), covariance[None])
    x = np.random.default_rng(0).normal(size=(4, 3))
    for row, got in zip(x, mixture.log_prob(x), strict=True):
        exact = textbook_mixtures.exact_log_prob(row, [1.0], np.zeros((1, 3)), covariance[None])
        assert error(got, float(exact)) < LOG_PROB


@given(mixtures(), seeds)
def test_scipy(mixture, seed):
    x = points(mixture, seed)
    joint = [
        np.log(w) + stats.multivariate_normal(m, c if c.ndim else c * np.eye(mixture.dim)).logpdf(x)
        if mixture.kind != "diagonal"
        else np.log(w) + stats.multivariate_normal(m, np.diag(c)).logpdf(x)
        for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    ]
    joint = np.reshape(joint, (mixture.n_components, len(x)))
    assert error(mixture.log_prob(x), logsumexp(joint, axis=0)) < 1e-11
    share = np.exp(joint - logsumexp(joint, axis=0)).T
    np.testing.assert_allclose(mixture.responsibilities(x), share, atol=1e-11)


def test_density_integrates_to_one():
    mixture = moderate(3, "spherical", 4, 1).diffuse(0.7, 0.3)
    total, _ = integrate.quad(lambda v: np.exp(mixture.log_prob([[v]])[0]), -20, 20, limit=200)
    assert total == pytest.approx(1.0, abs=1e-9)


# -------------------------------------------------- identities (docs/theory.md, section 4)


@given(mixtures(), seeds, levels)
def test_score_is_the_average_of_the_parts(mixture, seed, level):
    """s = p s_c + (1 - p) s_r, and grad log p(c|x) = s_c - s."""
    noisy = mixture.diffuse(*level)
    x, chosen = points(mixture, seed), [0]
    rest = np.arange(1, mixture.n_components)
    p = np.exp(noisy.log_posterior(x, chosen))[:, None]
    score = noisy.score(x)
    own, other = noisy.restrict(chosen).score(x), noisy.restrict(rest).score(x)
    assert error(score, p * own + (1 - p) * other) < 1e-10
    assert error(noisy.log_posterior_gradient(x, chosen), own - score) < 1e-9


@given(mixtures(), seeds, levels, st.floats(-3, 3))
def test_guidance_towards_the_rest_is_guidance_away(mixture, seed, level, scale):
    """s + lambda (s_r - s) = s - lambda o (s_c - s), for every lambda."""
    noisy = mixture.diffuse(*level)
    x = points(mixture, seed)
    odds = np.exp(np.minimum(noisy.log_odds(x, [0]), 600.0))[:, None]
    score = noisy.score(x)
    rest = noisy.restrict(np.arange(1, mixture.n_components)).score(x)
    away = score - scale * odds * noisy.log_posterior_gradient(x, [0])
    toward = score + scale * (rest - score)
    # odds of 1e10 multiply the rounding of what they multiply
    assert np.all(np.abs(away - toward) <= 1e-11 * (1 + np.abs(toward)) * (10 + odds))


@given(mixtures(), seeds, levels, levels)
def test_diffusing_twice_composes(mixture, seed, first, second):
    """(alpha, sigma) then (a, b) is (a alpha, sqrt(a^2 sigma^2 + b^2))."""
    (alpha, sigma), (a, b) = first, second
    twice = mixture.diffuse(alpha, sigma).diffuse(a, b)
    once = mixture.diffuse(a * alpha, np.hypot(a * sigma, b))
    x = points(mixture, seed)
    assert error(twice.log_prob(x), once.log_prob(x)) < 1e-11
    assert error(twice.score(x), once.score(x)) < 1e-10


@given(mixtures(), seeds, st.floats(0.05, 1.0), st.floats(0.1, 0.95), st.floats(0.05, 1.0))
def test_reverse_transition_is_bayes_rule(mixture, seed, alpha_s, ratio, sigma_s):
    """p(x_s | x_t) p(x_t) = p(x_t | x_s) p(x_s), at every pair of points."""
    alpha_t, beta = ratio * alpha_s, 0.3
    sigma_t = np.hypot(ratio * sigma_s, np.sqrt(beta))
    x_t, *x_s = points(mixture, seed, 4)
    x_s = np.array(x_s)
    transition = mixture.reverse_transition(x_t, alpha_t, sigma_t, alpha_s, sigma_s)
    forward = stats.norm(ratio * x_s, np.sqrt(beta)).logpdf(x_t).sum(axis=1)
    joint = forward + mixture.diffuse(alpha_s, sigma_s).log_prob(x_s)
    marginal = mixture.diffuse(alpha_t, sigma_t).log_prob(x_t[None])[0]
    assert error(transition.log_prob(x_s) + marginal, joint) < 1e-9


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_posterior_is_a_martingale(kind):
    """E[p(c | x_s) | x_t] = p(c | x_t) along the unguided reverse process.

    10^5 draws of x_s in [0, 1]: a bias of 0.01 fails with probability 1 - 1e-6.
    """
    mixture = moderate(5, kind, 3, 2)
    x_t = np.array([0.5, -0.3])
    s, t = (0.9, 0.4), (0.6, np.sqrt((0.6 / 0.9) ** 2 * 0.16 + 0.3))
    transition = mixture.reverse_transition(x_t, *t, *s)
    x_s = transition.sample(100_000, 0)
    p = np.exp(mixture.diffuse(*s).log_posterior(x_s, [0]))
    now = np.exp(mixture.diffuse(*t).log_posterior(x_t[None], [0]))[0]
    assert 0.1 < now < 0.9
    assert_mean_close(np.clip(p, 0, 1), now, bounds=(0.0, 1.0))


@given(mixtures(), seeds, st.floats(0.1, 1.0), st.floats(0.1, 3.0))
def test_tweedie(mixture, seed, alpha, sigma):
    """E[x0 | x] = (x + sigma^2 s)/alpha, and Cov = (sigma^2/alpha) times its Jacobian."""
    noisy = mixture.diffuse(alpha, sigma)
    x = points(mixture, seed)
    mean = mixture.posterior_mean(x, alpha, sigma)
    assert error(mean, (x + sigma**2 * noisy.score(x)) / alpha) < 1e-8
    eps = mixture.noise_prediction(x, alpha, sigma)
    assert error(alpha * mean + sigma * eps, x) < 1e-10
    covariance = mixture.posterior_covariance(x, alpha, sigma)
    assert error(covariance, covariance.transpose(0, 2, 1)) < 1e-12
    # div E[x0|x] = alpha/sigma^2 tr Cov, and div s = (alpha div E[x0|x] - D)/sigma^2
    trace = np.trace(covariance, axis1=1, axis2=2)
    divergence = ((alpha / sigma) ** 2 * trace - mixture.dim) / sigma**2
    assert error(noisy.score_divergence(x), divergence) < 1e-7
    point = mixture.reverse_transition(x[0], alpha, sigma)
    assert error(point.weights @ point.means, mean[0]) < 1e-9


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_covariance_is_the_jacobian(kind):
    mixture = moderate(8, kind, 3, 3)
    x, alpha, sigma, h = points(mixture, 1, 3), 0.7, 0.5, 1e-5
    steps = h * np.eye(3)
    jacobian = np.stack(
        [
            mixture.posterior_mean(x + step, alpha, sigma)
            - mixture.posterior_mean(x - step, alpha, sigma)
            for step in steps
        ],
        axis=-1,
    ) / (2 * h)
    covariance = mixture.posterior_covariance(x, alpha, sigma)
    assert error(covariance, jacobian * sigma**2 / alpha) < 1e-8


@given(mixtures(), seeds)
def test_gradients_by_differences(mixture, seed):
    x, h = points(mixture, seed, 3), 1e-5
    steps = h * np.eye(mixture.dim)

    def gradient(function):
        return np.stack([function(x + e) - function(x - e) for e in steps], axis=-1) / (2 * h)

    assert error(mixture.score(x), gradient(mixture.log_prob)) < 1e-6
    wanted = gradient(lambda v: mixture.log_posterior(v, [0]))
    assert error(mixture.log_posterior_gradient(x, [0]), wanted) < 1e-6


def test_posterior_mean_at_pure_noise_is_the_mean():
    for kind in ("spherical", "diagonal", "full"):
        mixture = moderate(2, kind, 3, 2)
        mean = mixture.posterior_mean(points(mixture, 0), 0.0, 1.0)
        assert error(mean, mixture.weights @ mixture.means) < 1e-14
        np.testing.assert_allclose(
            mixture.diffuse(0.0, 2.0).responsibilities([[1e6, 0.0]])[0], mixture.weights, rtol=1e-14
        )


@given(mixtures(), seeds)
def test_rotations_translations_and_permutations(mixture, seed):
    """log p, posteriors and |s| do not depend on the frame or on the order of the components."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(mixture.dim, mixture.dim)))[0]
    shift = rng.normal(size=mixture.dim)
    order = rng.permutation(mixture.n_components)
    covariance = mixture.covariances
    if mixture.kind == "diagonal":
        covariance = covariance[:, :, None] * np.eye(mixture.dim)
    if mixture.kind != "spherical":
        covariance = turn @ covariance @ turn.T
        covariance = 0.5 * (covariance + covariance.transpose(0, 2, 1))
    moved = GaussianMixture(
        mixture.weights[order],
        (mixture.means @ turn.T + shift)[order],
        covariance[order],
        covariance_type=TYPES[covariance.ndim],
    )
    x = points(mixture, seed)
    y = x @ turn.T + shift
    assert error(moved.log_prob(y), mixture.log_prob(x)) < 1e-10
    assert error(moved.score(y), mixture.score(x) @ turn.T) < 1e-9
    where = np.flatnonzero(order == 0)
    assert error(moved.log_posterior(y, where), mixture.log_posterior(x, [0])) < 1e-10


@given(mixtures(), seeds)
def test_kinds_agree(mixture, seed):
    """The same mixture written as a more general kind."""
    x = points(mixture, seed)
    diagonal = mixture.covariances
    if mixture.kind == "spherical":
        diagonal = np.repeat(diagonal[:, None], mixture.dim, axis=1)
    if mixture.kind == "full":
        return
    full = diagonal[:, :, None] * np.eye(mixture.dim)
    for covariance in (diagonal, full):
        other = GaussianMixture(
            mixture.weights, mixture.means, covariance, covariance_type=TYPES[covariance.ndim]
        )
        assert error(other.log_prob(x), mixture.log_prob(x)) < 1e-12
        assert error(other.score(x), mixture.score(x)) < 1e-11
        assert error(other.score_divergence(x), mixture.score_divergence(x)) < 1e-10
        a, b = (m.posterior_covariance(x, 0.6, 0.8) for m in (other, mixture))
        assert error(a, b) < 1e-11


@given(mixtures(), seeds)
def test_points_are_independent_of_each_other(mixture, seed):
    """A point has the same bits alone and in any batch."""
    x = points(mixture, seed, 300)
    score, log_prob = mixture.score(x), mixture.log_prob(x)
    for i in (0, 7, 255, 256, 299):
        assert mixture.score(x[i : i + 1]).tobytes() == score[i : i + 1].tobytes()
        assert mixture.log_prob(x[i : i + 1]).tobytes() == log_prob[i : i + 1].tobytes()


def test_empty_batch():
    mixture = moderate(1, "full", 3, 2)
    none = np.empty((0, 2))
    assert mixture.log_prob(none).shape == (0,)
    assert mixture.score(none).shape == (0, 2)
    assert mixture.posterior_covariance(none, 0.5, 0.5).shape == (0, 2, 2)
    assert mixture.sample(0, 0).shape == (0, 2)


# ---------------------------------------------------------------- construction and samples


def test_samples_follow_the_mixture():
    """10^5 draws at a false-alarm rate of 1e-6 a claim."""
    for kind in ("spherical", "diagonal", "full"):
        mixture = moderate(4, kind, 3, 2)
        x, component = mixture.sample_labelled(100_000, 1)
        for k, weight in enumerate(mixture.weights):
            assert_proportion(int(np.sum(component == k)), len(x), weight)
        # Whitened within a component: uncorrelated normals.
        own = x[component == 0] - mixture.means[0]
        covariance = mixture.covariances[0]
        if covariance.ndim < 2:
            covariance = covariance * np.eye(2)
        white = np.linalg.solve(np.linalg.cholesky(covariance), own.T).T
        assert_mean_close(white, 0.0, std=1.0)
        assert_mean_close(white**2, 1.0, std=np.sqrt(2.0))
        assert_mean_close(white[:, 0] * white[:, 1], 0.0, std=1.0)
    assert np.array_equal(mixture.sample(5, 3), mixture.sample(5, np.random.default_rng(3)))


def test_from_points_and_labels():
    x = np.random.default_rng(0).normal(size=(6, 3))
    mixture = GaussianMixture.from_points(x, 0.5, labels=["a", "b", "a", "c", "a", "b"])
    assert mixture.kind == "spherical" and mixture.n_components == 6 and mixture.dim == 3
    np.testing.assert_array_equal(mixture.covariances, 0.25)
    assert mixture.components("a").tolist() == [0, 2, 4]
    kept = mixture.restrict(mixture.labels != "a")
    assert kept.labels.tolist() == ["b", "c", "b"]
    np.testing.assert_allclose(kept.weights, 1 / 3)
    assert mixture.diffuse(0.5, 0.5).labels is not None


def test_zero_weights_have_no_influence():
    mixture = GaussianMixture([0.5, 0.0, 0.5], [[-1.0], [0.0], [1.0]], [0.1, 0.1, 0.1])
    x = np.array([[0.0], [0.3]])
    assert error(mixture.log_prob(x), mixture.restrict([0, 2]).log_prob(x)) < 1e-14
    assert np.all(mixture.responsibilities(x)[:, 1] == 0)
    assert np.all(mixture.log_posterior(x, [1]) == -np.inf)
    assert np.all(mixture.log_posterior(x, [1], complement=True) == 0)
    assert np.all(mixture.log_posterior_gradient(x, [1]) == 0)


def test_immutable():
    mixture = moderate(0, "spherical", 2, 2)
    with pytest.raises(AttributeError, match="immutable"):
        mixture.means = np.zeros((2, 2))
    with pytest.raises(ValueError, match="read-only"):
        mixture.means[0, 0] = 1.0
    source = np.zeros((1, 2))
    held = GaussianMixture([1.0], source, [1.0])
    source[:] = 5.0
    assert np.all(held.means == 0)


def copies(thing):
    """Every way to a second one."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(thing, protocol))
    yield copy.deepcopy(thing)
    yield copy.copy(thing)


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_immutable_and_the_same(kind, used):
    """NumPy forgets in both that an array was read-only, and what was cached stayed as it was."""
    mixture = moderate(3, kind, 3, 2).diffuse(0.8, 0.6)
    mixture = GaussianMixture(
        mixture.weights, mixture.means, mixture.covariances, labels=["a", "b", "a"]
    ).diffuse(0.7, 0.3)
    x = points(mixture, 0)
    expected = mixture.log_prob(x)
    fresh = mixture if used else mixture.restrict([0, 1, 2])
    for other in copies(fresh):
        for name, value in vars(other).items():
            if isinstance(value, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    value[:1] = value[:1]
                np.testing.assert_array_equal(value, getattr(mixture, name))
        with pytest.raises(AttributeError, match="immutable"):
            other.means = x
        with pytest.raises(AttributeError, match="immutable"):
            del other.means
        np.testing.assert_array_equal(other.log_prob(x), expected)
        np.testing.assert_array_equal(other.components("a"), [0, 2])
    assert not {"_factors", "_quadratic"} & set(vars(copy.deepcopy(mixture)))


# ---------------------------------------------------------------- kinds of covariances


SQUARE = np.array([[0.5, 0.2], [0.2, 0.4]])  # variances of two components, or a matrix


def kinds(covariances, means=((0.0, 0.0), (1.0, 2.0)), **options):
    return GaussianMixture(np.ones(len(means)), means, covariances, **options)


def test_a_square_of_variances_that_may_be_a_matrix_is_refused():
    with pytest.raises(ValueError) as caught:
        kinds(SQUARE)
    for word in ("covariance_type must be given", "(2, 2)", "'diag'", "'tied'"):
        assert word in str(caught.value)
    diagonal, tied = (kinds(SQUARE, covariance_type=c) for c in ("diag", "tied"))
    assert "2 diagonal components" in repr(diagonal) and "2 full components" in repr(tied)
    x = np.array([[0.3, -0.2]])
    one, other = np.array([0.0, 0.0]), np.array([1.0, 2.0])
    for mixture, matrices in (
        (diagonal, [np.diag(SQUARE[0]), np.diag(SQUARE[1])]),
        (tied, [SQUARE, SQUARE]),
    ):
        parts = [
            stats.multivariate_normal(mean, matrix).pdf(x[0])
            for mean, matrix in zip((one, other), matrices, strict=True)
        ]
        assert mixture.log_prob(x)[0] == pytest.approx(np.log(np.mean(parts)), rel=1e-12)
    with pytest.raises(ValueError, match="covariance_type must be given"):
        kinds([[0.5, -0.2], [-0.2, 0.4]])
    # These are of one kind only: no symmetric matrix, and none that is positive definite.
    for variances in ([[0.5, 0.2], [0.3, 0.4]], [[0.5, 0.5], [0.5, 0.5]], [[0.2, 0.5], [0.5, 0.2]]):
        assert kinds(variances).kind == "diagonal"


def test_variances_that_may_be_of_components_or_of_dimensions_are_refused():
    with pytest.raises(ValueError) as caught:
        kinds([0.1, 0.4])
    for word in ("covariance_type must be given", "(2,)", "'spherical'", "np.tile", "'diag'"):
        assert word in str(caught.value)
    assert kinds([0.1, 0.4], covariance_type="spherical").kind == "spherical"
    assert kinds([0.1, 0.1]).kind == "spherical"
    assert kinds([0.1, 0.4], means=((0.0,), (1.0,))).kind == "spherical"
    assert GaussianMixture.from_points(np.eye(3), 0.1).kind == "spherical"


@pytest.mark.parametrize(
    ("kind", "shape", "taken"),
    [
        ("spherical", (3,), "spherical"),
        ("diag", (3, 2), "diagonal"),
        ("full", (3, 2, 2), "full"),
        ("tied", (2, 2), "full"),
    ],
)
def test_kinds_in_the_words_of_scikit_learn(kind, shape, taken):
    sklearn = pytest.importorskip("sklearn.mixture")
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 3.0]
    fitted = sklearn.GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    assert fitted.covariances_.shape == shape
    mixture = GaussianMixture(
        fitted.weights_, fitted.means_, fitted.covariances_, covariance_type=kind
    )
    assert mixture.kind == taken
    np.testing.assert_allclose(mixture.log_prob(x), fitted.score_samples(x), rtol=1e-9)
    with pytest.raises(ValueError, match=r"covariances must have shape"):
        GaussianMixture(fitted.weights_, fitted.means_, np.ones((3, 3, 3)), covariance_type=kind)


def test_a_tied_matrix_of_another_size_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"\(2, 2\) with covariance_type='tied', got \(2, 2\)"):
        kinds(SQUARE, means=((0.0, 0.0),) * 3)
    with pytest.raises(ValueError, match="covariance_type must be one of 'spherical', 'diag'"):
        kinds(SQUARE, covariance_type="diagonal")


# ---------------------------------------------------------------- arrays of strangers


def hidden(values, which=0):
    mask = np.zeros(np.shape(values), dtype=bool)
    mask.flat[which] = True
    return np.ma.array(values, mask=mask)


MASKED = {
    "weights": lambda: GaussianMixture(hidden([0.5, 0.5]), *TWO[1:]),
    "means": lambda: GaussianMixture(TWO[0], hidden([[0.0], [1.0]]), TWO[2]),
    "covariances": lambda: GaussianMixture(*TWO[:2], hidden([1.0, 2.0])),
    "labels": lambda: GaussianMixture(*TWO, labels=hidden([1, 2])),
    "components": lambda: GaussianMixture(*TWO).restrict(hidden([0, 1])),
    "x": lambda: GaussianMixture(*TWO).log_prob([hidden([0.0])]),
    "points": lambda: GaussianMixture.from_points(hidden([[0.0], [1.0]]), 1.0),
    "alpha_bar": lambda: NoiseSchedule.from_alpha_bar(hidden([0.9, 0.5])),
    "indices": lambda: NoiseSchedule.linear(10).select(hidden([2, 4])),
    "log_odds": lambda: log_posterior_from_log_odds(hidden([0.0, 1.0])),
    "log_posterior": lambda: log_odds_from_log_posterior(hidden([-1.0, -2.0])),
    "times": lambda: TimeProfile(hidden([0.0, 1.0]), (1.0, 1.0)),
    "samples": lambda: wasserstein1(hidden([0.0, 1.0]), [0.0, 1.0]),
    "target": lambda: wasserstein1([0.0, 1.0], hidden([0.0, 1.0])),
    "counts": lambda: kl_categorical([0.5, 0.5], hidden([3, 4])),
    "forbidden": lambda: sample(
        GaussianMixture(*TWO), NoiseSchedule.linear(2), n=1, forbidden=hidden([0, 1])
    ),
    "initial": lambda: sample(
        GaussianMixture(*TWO), NoiseSchedule.linear(2), n=1, initial=hidden([[1.0]])
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_values_that_a_mask_hides_are_not_brought_back(name):
    with pytest.raises(ValueError, match=f"{name} must .* masked array with 1 masked: leave"):
        MASKED[name]()


def test_a_mask_that_hides_nothing_is_no_mask():
    masked = np.ma.array(TWO[1], mask=False)
    np.testing.assert_array_equal(GaussianMixture(TWO[0], masked, TWO[2]).means, TWO[1])


def tensors():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(2)
    return {
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "requires grad": torch.ones(2, requires_grad=True),
        "meta": torch.ones(2, device="meta"),
        "sparse": torch.ones(2).to_sparse(),
        "fake": fake,
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "in a list": [torch.ones((), requires_grad=True), torch.ones(())],
    }


@pytest.mark.parametrize(
    "kind", ["bfloat16", "requires grad", "meta", "sparse", "fake", "conjugate", "in a list"]
)
def test_tensors_that_numpy_cannot_read_are_named_with_the_cure(kind):
    tensor = tensors()[kind]
    cure = r".*give {0}\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"
    for name, call in {
        "weights": lambda: GaussianMixture(tensor, *TWO[1:]),
        "covariances": lambda: GaussianMixture(*TWO[:2], tensor),
        "labels": lambda: GaussianMixture(*TWO, labels=tensor),
        "components": lambda: GaussianMixture(*TWO).restrict(tensor),
        "betas": lambda: NoiseSchedule.from_betas(tensor),
        "log_odds": lambda: log_posterior_from_log_odds(tensor),
        "samples": lambda: wasserstein1(tensor, [0.0]),
    }.items():
        with pytest.raises(TypeError, match=rf"{name} must be an array of .*{cure.format(name)}"):
            call()


def test_tensors_that_numpy_can_read_are_read():
    torch = pytest.importorskip("torch")
    means = torch.tensor(TWO[1], dtype=torch.float16)
    mixture = GaussianMixture(torch.tensor(TWO[0]), means, torch.tensor(TWO[2]).double())
    np.testing.assert_array_equal(mixture.means, TWO[1])
    assert mixture.restrict(torch.tensor([1])).n_components == 1


TWO = ([0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0])
ASYMMETRIC = [[[1.0, 0.5], [0.2, 1.0]]]
INDEFINITE = [[[1.0, 2.0], [2.0, 1.0]]]

LABELLED = GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0], labels=["a", "b"])
BAD = [
    (lambda: GaussianMixture([0.5, -0.5], *TWO[1:]), "weights must not be negative.*-0.5"),
    (lambda: GaussianMixture([0.0, 0.0], *TWO[1:]), "weights must not be all zero"),
    (lambda: GaussianMixture([0.5, np.inf], *TWO[1:]), "weights must be finite.*inf"),
    (lambda: GaussianMixture([], np.zeros((0, 1)), []), "weights.*at least one"),
    (lambda: GaussianMixture([1.0], *TWO[1:]), r"means must have shape \(1, D\).*\(2, 1\)"),
    (lambda: GaussianMixture([0.5, 0.5], [0.0, 1.0], [1.0, 1.0]), "means must have shape"),
    (lambda: GaussianMixture([1.0], np.zeros((1, 0)), [1.0]), "D >= 1"),
    (lambda: GaussianMixture(TWO[0], TWO[1], [1.0]), r"covariances must have shape \(2,\)"),
    (lambda: GaussianMixture(TWO[0], TWO[1], 1.0), "covariances must have shape"),
    (lambda: GaussianMixture(TWO[0], TWO[1], [1.0, 0.0]), "positive definite.*0.0"),
    (lambda: GaussianMixture(TWO[0], TWO[1], [1.0, -1.0]), "positive definite.*-1.0"),
    (lambda: GaussianMixture([1.0], np.zeros((1, 2)), ASYMMETRIC), r"symmetric, covariances\[0\]"),
    (lambda: GaussianMixture([1.0], np.zeros((1, 2)), INDEFINITE), r"definite, covariances\[0\]"),
    (lambda: GaussianMixture(*TWO, labels=[1]), "labels must have shape"),
    (lambda: GaussianMixture(*TWO).log_prob([[0.0, 1.0]]), r"x must have shape \(N, 1\).*\(1, 2\)"),
    (lambda: GaussianMixture(*TWO).score([0.0]), "x must have shape"),
    (lambda: GaussianMixture(*TWO).score([[np.nan]]), "x must be finite.*nan"),
    (lambda: GaussianMixture(*TWO).log_posterior([[0.0]], []), "components must not be empty"),
    (lambda: GaussianMixture(*TWO).log_posterior([[0.0]], [2]), "components.*from 0 to 1.*2"),
    (lambda: GaussianMixture(*TWO).restrict([-1]), "components.*from 0 to 1.*-1"),
    (lambda: GaussianMixture(*TWO).restrict([True]), "components as a mask"),
    (lambda: GaussianMixture([1.0, 0.0], *TWO[1:]).restrict([1]), "components.*weight zero"),
    (lambda: GaussianMixture(*TWO).components(1), "labels"),
    (
        lambda: GaussianMixture(*TWO, labels=[0, 1]).components(7),
        r"label must be one of \[0 1\].*7",
    ),
    (lambda: GaussianMixture(*TWO).diffuse(1.0, -0.1), "sigma.*>= 0.*-0.1"),
    (lambda: GaussianMixture(*TWO).diffuse(-1.0, 0.1), "alpha.*>= 0.*-1.0"),
    (lambda: GaussianMixture(*TWO).diffuse(0.0, 0.0), "alpha and sigma must not both be zero"),
    (lambda: GaussianMixture(*TWO).diffuse(np.nan, 1.0), "alpha.*nan"),
    (lambda: GaussianMixture(*TWO).diffuse(1e-200, 0.0), "cannot be represented"),
    (lambda: GaussianMixture(*TWO).diffuse(1.0, 1e160), r"sigma = 1e\+160.*cannot hold"),
    (lambda: GaussianMixture(*TWO).diffuse(1e160, 1.0), r"alpha = 1e\+160.*cannot hold"),
    (lambda: LABELLED.components(["a", "c"]), "label must be one of.*'c'"),
    (lambda: LABELLED.components([]), "label must be a label or a list of some"),
    (lambda: GaussianMixture(*TWO).reverse_transition([0.0], 0.5, 0.5, 0.4, 0.6), "less noisy"),
    (lambda: GaussianMixture(*TWO).reverse_transition([0.0], 0.0, 1.0, 0.0, 0.6), "alpha_s > 0"),
    (lambda: GaussianMixture(*TWO).reverse_transition([[0.0]], 0.5, 0.5), "x must have shape"),
    (lambda: GaussianMixture.from_points([[0.0]], 0.0), "bandwidth.*> 0.*0.0"),
    (lambda: GaussianMixture.from_points([0.0], 1.0), "points must have shape"),
    (lambda: GaussianMixture(*TWO).sample(-1), "n must be.*-1"),
]


FAR = {
    "score": lambda m, x: m.score(x),
    "score_divergence": lambda m, x: m.score_divergence(x),
    "responsibilities": lambda m, x: m.responsibilities(x),
    "log_posterior": lambda m, x: m.log_posterior(x, [0]),
    "posterior": lambda m, x: m.posterior(x, [0]),
    "log_posterior_gradient": lambda m, x: m.log_posterior_gradient(x, [0]),
    "posterior_mean": lambda m, x: m.posterior_mean(x, 1.0, 1.0),
    "posterior_covariance": lambda m, x: m.posterior_covariance(x, 1.0, 1.0),
}


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
@pytest.mark.parametrize("query", FAR.values(), ids=FAR)
def test_what_float64_cannot_square_is_refused_and_never_nan(query, kind):
    mixture = moderate(0, kind, 3, 2)
    assert np.isfinite(query(mixture, [[1e150, 0.0]])).all()
    for far in (1e160, 1e300):
        with pytest.raises(ValueError, match=r"x must be.*overflow at x\[1\]"):
            query(mixture, [[0.0, 0.0], [far, 0.0]])
    assert not np.isnan(mixture.log_prob([[1e160, 0.0]])).any()


def test_the_divergence_of_tiny_variances_is_right_or_refused():
    x = [[1.0]]
    tiny = GaussianMixture(TWO[0], [[-1.0], [1.0]], [1e-140, 1e-140])
    np.testing.assert_allclose(tiny.score_divergence(x), -1e140)
    tiny = GaussianMixture(TWO[0], [[-1.0], [1.0]], [1e-160, 1e-160])
    with pytest.raises(ValueError, match="x must be"):
        tiny.score_divergence(x)


def test_components_of_a_list_of_labels():
    """Not compared elementwise: two labels of two components, and more than there are."""
    assert LABELLED.components("b").tolist() == [1]
    for labels in (["b", "a"], ("a", "b"), {"a", "b"}, np.array(["a", "b", "a"])):
        assert LABELLED.components(labels).tolist() == [0, 1]
    numbered = GaussianMixture([1, 1, 1], np.zeros((3, 1)), np.ones(3), labels=[7, 8, 7])
    assert numbered.components([7]).tolist() == [0, 2]
    assert numbered.components([8, 7, 7]).tolist() == [0, 1, 2]


def test_posterior_is_that_of_its_logarithm():
    mixture = moderate(1, "full", 4, 2)
    x = mixture.sample(50, 0)
    p, rest = mixture.posterior(x, [0, 2]), mixture.posterior(x, [0, 2], complement=True)
    np.testing.assert_allclose(p, mixture.responsibilities(x)[:, [0, 2]].sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(p + rest, 1.0, rtol=1e-12)
    assert np.array_equal(p, np.exp(mixture.log_posterior(x, [0, 2])))


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WRONG_TYPES = [
    (lambda: GaussianMixture(["a", "b"], *TWO[1:]), "weights must be an array of real numbers"),
    (lambda: GaussianMixture([1j, 1], *TWO[1:]), "weights must be an array of real numbers"),
    (lambda: GaussianMixture(["0.5", "0.5"], *TWO[1:]), "weights must be.*got strings"),
    (lambda: GaussianMixture([True, False], *TWO[1:]), "weights must be.*got booleans"),
    (lambda: GaussianMixture([0.5, 0.5], [[b"0"], [b"1"]], [1, 1]), "means must be.*got bytes"),
    (lambda: GaussianMixture(np.array([True, 0.5], dtype=object), *TWO[1:]), "weights must be"),
    (lambda: GaussianMixture(*TWO).restrict([0.5]), "components must be component indices"),
    (lambda: GaussianMixture(*TWO).diffuse("1", 1.0), "alpha must be a real number"),
    (lambda: GaussianMixture(*TWO).diffuse(True, 1.0), "alpha must be a real number"),
    (lambda: GaussianMixture(*TWO).sample(1.5), "n must be an integer.*1.5"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
