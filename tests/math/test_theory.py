"""The derivations of docs/theory.md that no other test checks, exactly or by quadrature.

The equations are arithmetic, so they run on fractions, without any rounding, and on the numbers of
mpmath, which takes the derivatives too, of the densities of a mixture that is written out here.
"""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from dng_math import DDPM, GaussianMixture, NoiseSchedule, equations
from tests.helpers.mixtures import mixtures, points
from tests.helpers.tolerances import error

seeds = st.integers(0, 2**32 - 1)
fractions = st.fractions(-3, 3, max_denominator=1000)
positive = st.fractions(Fraction(1, 20), 3, max_denominator=1000)
shares = st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=1000)

# A few examples are enough for identities of polynomials, and shrinking fractions takes minutes.
few = settings(max_examples=20, phases=[Phase.explicit, Phase.generate])

DIGITS = 60
EXACT = mpf("1e-20")  # mpmath's derivatives at 60 digits keep far more than this

# Weights, means and variances; component 0 is forbidden, in some tests component 1 too.
WEIGHTS, MEANS, VARIANCES = (0.2, 0.3, 0.5), (-1.0, 0.3, 1.5), (0.2, 0.1, 0.4)


def density(x, alpha, sigma, chosen=(0, 1, 2)):
    """The joint density of x at (alpha, sigma) and of some components, an mpf."""
    total = mpf(0)
    for k in chosen:
        variance = alpha**2 * mpf(VARIANCES[k]) + sigma**2
        distance = (x - alpha * mpf(MEANS[k])) ** 2 / variance
        total += mpf(WEIGHTS[k]) * mpmath.exp(-distance / 2) / mpmath.sqrt(2 * mp.pi * variance)
    return total


def log_density(x, alpha, sigma, chosen=(0, 1, 2)):
    """log p(x | chosen) but for a constant, an mpf."""
    return mpmath.log(density(x, alpha, sigma, chosen))


def score(x, alpha, sigma, chosen=(0, 1, 2), order=1):
    """The derivative of log p(x | chosen), of the given order, by mpmath."""
    return mpmath.diff(lambda y: log_density(y, alpha, sigma, chosen), x, order)


def posterior(x, alpha, sigma, chosen=(0,)):
    """p(chosen | x), an mpf."""
    return density(x, alpha, sigma, chosen) / density(x, alpha, sigma)


def in_digits(value: Fraction):
    """A fraction as an mpf, rounded in its last digit."""
    return mpf(value.numerator) / value.denominator


def close(actual, expected, tolerance=EXACT) -> bool:
    return abs(actual - expected) <= tolerance * (1 + abs(expected))


# Times of three processes: alpha and sigma as functions of a time tau that grows with the noise.
PROCESSES = {
    "variance preserving": (
        lambda t: mpmath.exp(-t),
        lambda t: mpmath.sqrt(1 - mpmath.exp(-2 * t)),
    ),
    "variance exploding": (lambda t: mpf(1), lambda t: t),
    "flow matching": (lambda t: 1 - t, lambda t: t),
}
each_process = pytest.mark.parametrize(("alpha", "sigma"), PROCESSES.values(), ids=PROCESSES)


def drift_and_diffusion(alpha, sigma, t):
    """f'(t) = d log alpha/dtau and G^2 = d sigma^2/dtau - 2 sigma^2 d log alpha/dtau."""
    rate = mpmath.diff(lambda u: mpmath.log(alpha(u)), t)
    return rate, mpmath.diff(lambda u: sigma(u) ** 2, t) - 2 * sigma(t) ** 2 * rate


# ---------------------------------------------------------------- process and predictions


@each_process
def test_drift_and_diffusion_are_the_limits_of_a_step(alpha, sigma):
    """alpha_ts = 1 + f h and beta_ts = G^2 h up to h^2; flow matching: -1/(1-t), 2t/(1-t)."""
    with mp.workdps(DIGITS):
        t, h = mpf("0.3"), mpf("1e-30")
        ratio = equations.transition_alpha(alpha(t), alpha(t - h))
        beta = equations.transition_variance(sigma(t), sigma(t - h), ratio)
        rate, diffusion = drift_and_diffusion(alpha, sigma, t)
        assert close((ratio - 1) / h, rate)
        assert close(beta / h, diffusion)
        if alpha(t) == 1 - t:
            assert close(rate, -1 / (1 - t)) and close(diffusion, 2 * t / (1 - t))


@few
@given(fractions, fractions, fractions, fractions, positive, positive)
def test_differences_of_predictions_in_units_of_the_noise(x, one, other, v, alpha, sigma):
    """-(alpha/sigma) delta x0, alpha/(alpha^2 + sigma^2) delta v, and alpha delta u for flow."""

    def to_noise(x0, at):
        return (x - at * x0) / sigma

    def gap(convert, at=alpha):
        return to_noise(convert(other), at) - to_noise(convert(one), at)

    delta = other - one
    assert gap(lambda x0: x0) == -alpha / sigma * delta
    norm_sq = alpha * alpha + sigma * sigma
    velocity = gap(lambda v: equations.x0_from_velocity(x, v, alpha, sigma))
    assert velocity == alpha / norm_sq * delta
    flow = gap(lambda v: equations.x0_from_flow(x, v, sigma), 1 - sigma)
    assert flow == (1 - sigma) * delta
    assert gap(lambda eps: equations.x0_from_noise(x, eps, alpha, sigma)) == delta


@few
@given(fractions, fractions, shares, positive, shares, positive)
def test_the_step_from_a_noise_prediction(x, eps, ratio, alpha_s, kept, sigma_t):
    """A x + B x0(eps) = (x - beta_ts eps/sigma_t)/alpha_ts for the DDPM posterior, exactly."""
    alpha_t, sigma_s = ratio * alpha_s, kept * sigma_t / ratio
    beta = equations.transition_variance(sigma_t, sigma_s, ratio)
    x_factor = ratio * sigma_s**2 / sigma_t**2
    x0_factor = alpha_s * beta / sigma_t**2
    assert x_factor * alpha_t + x0_factor == alpha_s
    v = equations.posterior_variance(beta, sigma_s, sigma_t)
    assert x_factor**2 * sigma_t**2 + v == sigma_s**2
    x0 = equations.x0_from_noise(x, eps, alpha_t, sigma_t)
    mean = equations.step_mean(x, x0, x_factor, x0_factor)
    assert mean == (x - beta / sigma_t * eps) / ratio


@each_process
@pytest.mark.parametrize("eta", ["0", "0.6", "1"])
def test_steps_with_a_constant_prediction_solve_the_reverse_equation(alpha, sigma, eta):
    """x0 constant: the DDPM step.  eps constant: DDIM at eta = 0, SDE-DPM-Solver-1 at eta = 1.

    Mean and variance of x at the time s obey dm = (f m + k) ds and dV = (2 f V - noise) ds, where k
    and f hold what the prediction adds to the drift.
    """
    with mp.workdps(DIGITS):
        t, s, eta, x, told = mpf("0.4"), mpf("0.3"), mpf(eta), mpf("0.7"), mpf("-0.2")
        rate, diffusion = drift_and_diffusion(alpha, sigma, s)

        def solves(step, slope, constant, noise):
            mean, variance = (mpmath.diff(lambda u, i=i: step(u)[i], s) for i in (0, 1))
            now = step(s)
            assert close(mean, slope * now[0] + constant)
            assert close(variance, 2 * slope * now[1] - noise)
            assert close(step(t)[0], x) and close(step(t)[1], mpf(0))

        def times(u):
            ratio = equations.transition_alpha(alpha(t), alpha(u))
            return ratio, equations.transition_variance(sigma(t), sigma(u), ratio)

        def constant_noise(u):
            ratio, beta = times(u)
            moved = (1 + eta**2) * (sigma(t) / ratio - sigma(u))
            return x / ratio - moved * told, eta**2 * beta / ratio**2

        constant = (1 + eta**2) / 2 * diffusion * told / sigma(s)
        solves(constant_noise, rate, constant, eta**2 * diffusion)

        def constant_x0(u):
            ratio, beta = times(u)
            x_factor = ratio * sigma(u) ** 2 / sigma(t) ** 2
            x0_factor = alpha(u) * beta / sigma(t) ** 2
            v = equations.posterior_variance(beta, sigma(u), sigma(t))
            return equations.step_mean(x, told, x_factor, x0_factor), v

        if eta == 1:
            slope = rate + diffusion / sigma(s) ** 2
            constant = -diffusion * alpha(s) * told / sigma(s) ** 2
            solves(constant_x0, slope, constant, diffusion)
        if eta == 0:
            x0 = equations.x0_from_noise(x, told, alpha(t), sigma(t))
            x_factor = sigma(s) / sigma(t)
            ddim = equations.step_mean(x, x0, x_factor, alpha(s) - alpha(t) * x_factor)
            assert close(constant_noise(s)[0], ddim)


# ---------------------------------------------------------------- exact mixtures


@pytest.mark.parametrize("x", [-2.0, 0.1, 3.0])
def test_divergence_of_a_score_is_the_second_derivative(x):
    """sum_k rho_k (|s_k - s|^2 - tr S_k^-1), against the derivative of log p."""
    mixture = GaussianMixture(WEIGHTS, np.array(MEANS)[:, None], VARIANCES).diffuse(0.7, 0.6)
    with mp.workdps(DIGITS):
        exact = score(mpf(x), mpf(0.7), mpf(0.6), order=2)
    assert error(mixture.score_divergence([[x]]), float(exact)) < 1e-13
    rho, variances = mixture.responsibilities([[x]])[0], mixture.covariances
    scores = -(x - mixture.means[:, 0]) / variances
    formula = rho @ ((scores - rho @ scores) ** 2 - 1 / variances)
    assert error(formula, float(exact)) < 1e-13


@few
@given(mixtures(max_dim=4), seeds, st.floats(0.3, 0.95), st.floats(0.4, 0.9))
def test_moments_of_the_exact_reverse_transition(mixture, seed, alpha_s, ratio):
    """Mean A x + B E[x0|x] as the DDPM step; covariance V + B^2 Cov[x0|x], more than its V."""
    alpha_t = ratio * alpha_s
    sigma_t, sigma_s = np.sqrt(1 - alpha_t**2), np.sqrt(1 - alpha_s**2)
    schedule = NoiseSchedule([1.0, alpha_s, alpha_t], [0.0, sigma_s, sigma_t])
    c, x = schedule.coefficients(DDPM()), points(mixture, seed, 1)
    exact = mixture.reverse_transition(x[0], alpha_t, sigma_t, alpha_s, sigma_s)
    mean = exact.weights @ exact.means
    expected = c.x_factor[0] * x + c.x0_factor[0] * mixture.posterior_mean(x, alpha_t, sigma_t)
    assert error(mean, expected[0]) < 1e-9
    offset = exact.means - mean
    covariance = np.einsum("k,kd,ke->de", exact.weights, offset, offset)
    identity = np.eye(mixture.dim)
    for weight, part in zip(exact.weights, exact.covariances, strict=True):
        covariance += weight * (part if np.ndim(part) == 2 else part * identity)
    within = c.x0_factor[0] ** 2 * mixture.posterior_covariance(x, alpha_t, sigma_t)[0]
    assert error(covariance, c.step_var[0] * identity + within) < 1e-9


@few
@given(mixtures(max_dim=4), seeds, st.floats(0.3, 0.95), st.floats(0.4, 0.9))
def test_the_exact_update_of_a_posterior(mixture, seed, alpha_s, ratio):
    """p(c|x_s) = p(c|x_t) p(x_s|x_t,c)/p(x_s|x_t) at any x_s, wherever guidance has moved it."""
    alpha_t = ratio * alpha_s
    sigma_t, sigma_s = np.sqrt(1 - alpha_t**2), np.sqrt(1 - alpha_s**2)
    x_t, *x_s = points(mixture, seed, 4)
    times = (alpha_t, sigma_t, alpha_s, sigma_s)
    whole = mixture.reverse_transition(x_t, *times).log_prob(x_s)
    forbidden = mixture.restrict([0]).reverse_transition(x_t, *times).log_prob(x_s)
    before = mixture.diffuse(alpha_t, sigma_t).log_posterior(x_t[None], [0])[0]
    after = mixture.diffuse(alpha_s, sigma_s).log_posterior(x_s, [0])
    scale = 1 + np.abs(whole) + np.abs(forbidden)
    assert np.all(np.abs(before + forbidden - whole - after) < 1e-9 * scale)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("g", [-0.5, 1.0, 2.5])
@pytest.mark.parametrize("concepts", [[(0,)], [(0,), (1,)], [(0, 2)]], ids=str)
def test_guidance_is_the_score_of_its_target(concepts, g):
    """grad log p (1 - sum_j p_j)^g = s - g sum_k p_k (s_k - s)/(1 - sum_j p_j)."""
    with mp.workdps(DIGITS):
        at, x = (mpf("0.7"), mpf("0.6")), mpf("0.2")

        def log_target(y):
            rest = 1 - sum(posterior(y, *at, concept) for concept in concepts)
            return log_density(y, *at) + g * mpmath.log(rest)

        base = score(x, *at)
        p = [posterior(x, *at, concept) for concept in concepts]
        guided = base
        for concept, own in zip(concepts, p, strict=True):
            scale = equations.dynamic_scale(mpf(g), own, 1 - sum(p))
            guided = equations.away(guided, score(x, *at, concept) - base, scale)
        assert close(guided, mpmath.diff(log_target, x))
        # The form that an exact posterior is guided with: no small denominator.
        rest = tuple(k for k in range(3) if not any(k in concept for concept in concepts))
        without = base
        for concept, own in zip(concepts, p, strict=True):
            without = equations.away(
                without, score(x, *at, concept) - score(x, *at, rest), mpf(g) * own
            )
        assert close(without, guided)


@pytest.mark.parametrize("pi", ["0.3", "0.95"])
def test_feedback_undoes_a_blurred_conditional(pi):
    """If what was learned is pi q + (1 - pi) p, FBG with the exact ratio is the score of q."""
    with mp.workdps(DIGITS):
        at, x, pi = (mpf("0.7"), mpf("0.6")), mpf("-0.4"), mpf(pi)
        own = mpf(WEIGHTS[0])

        def log_learned(y):
            return mpmath.log(pi * density(y, *at, (0,)) / own + (1 - pi) * density(y, *at))

        ratio = mpmath.exp(log_learned(x)) / density(x, *at)
        base = score(x, *at)
        learned = mpmath.diff(log_learned, x)
        guided = equations.toward(base, learned - base, equations.feedback_scale(ratio, pi))
        assert close(guided, score(x, *at, (0,)))


# ---------------------------------------------------------------- trackers


@few
@given(*[fractions] * 8, positive)
def test_residual_of_a_step_is_never_formed(x, base, shift, z, a, b, a_mean, b_mean, deviation):
    """x_next - mu_base from the drifts of the factors, the shift and the noise, exactly."""
    mean = equations.step_mean(x, base + shift, a, b)
    x_next = equations.step(mean, deviation, z)
    expected = x_next - equations.step_mean(x, base, a_mean, b_mean)
    got = equations.step_residual(x, base, shift, z, a - a_mean, b - b_mean, b, deviation)
    assert got == expected


@few
@given(fractions, fractions, fractions, positive, positive)
def test_log_ratios_are_differences_of_squares(residual, gap, mean, odds, v):
    """log N(x_s; mu + d) - log N(x_s; mu), and the same against mu - o d."""
    with mp.workdps(DIGITS):
        residual, gap, mean, odds, v = map(in_digits, (residual, gap, mean, odds, v))

        def log_normal(centre):
            return -((mean + residual - centre) ** 2) / (2 * v)

        sums = gap * gap, residual * gap, v
        paper = log_normal(mean + gap) - log_normal(mean)
        assert close(equations.log_likelihood_ratio(*sums), paper)
        rest = log_normal(mean + gap) - log_normal(mean - odds * gap)
        assert close(equations.log_odds_ratio(odds, *sums), rest)


@few
@given(positive, fractions, fractions, positive)
def test_log_odds_run_away_below_half(odds, g, gap, v):
    """A step of the push alone, r = -g o d, adds -(1+o)(1 + (2g-1)o)|d|^2/(2v)."""
    runs_away = gap != 0 and g < Fraction(1, 2) and odds > 1 / (1 - 2 * g)
    with mp.workdps(DIGITS):
        odds, g, gap, v = map(in_digits, (odds, g, gap, v))
        got = equations.log_odds_ratio(odds, gap * gap, -g * odds * gap * gap, v)
        assert close(got, -(1 + odds) * (1 + (2 * g - 1) * odds) * gap * gap / (2 * v))
        assert (got > EXACT) == runs_away


@pytest.mark.parametrize("side", [0, 1], ids=["base", "concept"])
def test_evidence_of_a_step(side):
    """With q = |d|^2/v: mean -q/2 where the base is true, q/2 where the concept is; variance q."""
    gap, v = np.array([0.3, -0.2]), 0.07
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1)
    probability = weights[:, None] * weights
    residual = side * gap + np.sqrt(v) * z
    ratio = equations.log_likelihood_ratio(gap @ gap, residual @ gap, v)
    mean, q = np.sum(probability * ratio), gap @ gap / v
    assert mean == pytest.approx((side - 0.5) * q, rel=1e-12)
    assert np.sum(probability * (ratio - mean) ** 2) == pytest.approx(q, rel=1e-12)


@each_process
def test_change_of_a_log_ratio_in_time(alpha, sigma):
    """d/dtau log p_c/p = -f x (s_c - s) + G^2/2 (div s_c - div s + s_c^2 - s^2) at a fixed x."""
    with mp.workdps(DIGITS):
        t, x = mpf("0.35"), mpf("0.4")

        def log_ratio(u):
            at = alpha(u), sigma(u)
            return log_density(x, *at, (0,)) - log_density(x, *at)

        rate, diffusion = drift_and_diffusion(alpha, sigma, t)
        at = alpha(t), sigma(t)
        own, base = score(x, *at, (0,)), score(x, *at)
        divergences = score(x, *at, (0,), 2) - score(x, *at, order=2)
        expected = -rate * x * (own - base)
        expected += diffusion / 2 * (divergences + own**2 - base**2)
        assert close(mpmath.diff(log_ratio, t), expected)


@each_process
@pytest.mark.parametrize("eta", ["0", "0.6", "1"])
@pytest.mark.parametrize("against_rest", [False, True], ids=["base", "rest"])
def test_divergence_term_completes_the_update(alpha, sigma, eta, against_rest):
    """For a sampler of any eta, averaged over the signs of its noise, up to the square of the step.

    A short step of a guided sampler: what a tracker adds, and the correction, are the change of the
    exact log ratio.  The average over z = 1 and z = -1 takes the place of z^2 = 1 on average.
    """
    with mp.workdps(DIGITS):
        t, h, x, eta, push = mpf("0.35"), mpf("1e-15"), mpf("0.4"), mpf(eta), mpf("0.8")
        at, to = (alpha(t), sigma(t)), (alpha(t - h), sigma(t - h))
        ratio = equations.transition_alpha(at[0], to[0])
        beta = equations.transition_variance(at[1], to[1], ratio)
        small = equations.posterior_variance(beta, to[1], at[1])
        x_factor = mpmath.sqrt(to[1] ** 2 - eta**2 * small) / at[1]
        full_x_factor = ratio * to[1] ** 2 / at[1] ** 2

        def x0(chosen):
            return (x + at[1] ** 2 * score(x, *at, chosen)) / at[0]

        def mean(x0, factor):
            return equations.step_mean(x, x0, factor, to[0] - at[0] * factor)

        everything, forbidden, rest = (0, 1, 2), (0,), (1, 2)
        base, own = x0(everything), x0(forbidden)
        odds = posterior(x, *at) / (1 - posterior(x, *at))
        centre = mean(base, full_x_factor)
        gap = mean(own, full_x_factor) - centre
        divergences = score(x, *at, forbidden, 2) - score(x, *at, order=2)
        if against_rest:
            score_gap = score(x, *at, forbidden) - score(x, *at)
            divergences = equations.rest_divergence_gap(odds, divergences, score_gap**2)
        other = rest if against_rest else everything
        before = log_density(x, *at, forbidden) - log_density(x, *at, other)
        tracked = exact = mpf(0)
        for z in (mpf(1), mpf(-1)):
            guided = mean(equations.away(base, own - base, push), x_factor)
            x_next = equations.step(guided, eta * mpmath.sqrt(small), z)
            sums = gap * gap, (x_next - centre) * gap, small
            if against_rest:
                log_ratio = equations.log_odds_ratio(odds, *sums)
            else:
                log_ratio = equations.log_likelihood_ratio(*sums)
            log_ratio += equations.divergence_correction(eta, beta, divergences)
            tracked += log_ratio / 2
            after = log_density(x_next, *to, forbidden) - log_density(x_next, *to, other)
            exact += (after - before) / 2
        assert close(tracked / h, exact / h, mpf("1e-12"))
        without = equations.divergence_correction(eta, beta, divergences) / h
        assert (abs(without) > 1e-3) == (eta < 1)


def test_sum_of_the_papers_offset():
    """2e-4/(2v), summed: 29 nats over 1000 steps, 0.6 of it in the last tenth; 0.08 over 50."""
    thousand, fifty = (
        [2e-4 / (2 * v) for v in NoiseSchedule.linear().respace(steps).coefficients().step_var if v]
        for steps in (1000, 50)
    )
    assert sum(thousand) == pytest.approx(29, abs=0.5)
    assert sum(thousand[-99:]) / sum(thousand) == pytest.approx(0.6, abs=0.02)
    assert sum(fifty) == pytest.approx(0.08, abs=0.005)


# ---------------------------------------------------------------- weights


@few
@given(st.floats(-1, 3), st.floats(-1, 3), seeds)
def test_weights_of_a_step_are_exact(g, scale, seed):
    """Guided and weighted is unguided and tilted by (h_s/h_t)^g, for any scale and any function.

    Both sides by quadrature over a step of a mixture; h = 1 - p.
    """
    mixture = GaussianMixture(WEIGHTS, np.array(MEANS)[:, None], VARIANCES)
    schedule = NoiseSchedule.linear().respace(20)
    c, i = schedule.coefficients(), 15
    at, to = (c.alpha_t[i], c.sigma_t[i]), (c.alpha_s[i], c.sigma_s[i])
    x = points(mixture, seed, 1)
    v, base = c.step_var[i], mixture.posterior_mean(x, *at)
    own = mixture.restrict([0]).posterior_mean(x, *at)
    mean = equations.step_mean(x, base, c.x_factor[i], c.x0_factor[i])[0, 0]
    gap = c.x0_factor[i] * (own - base)[0, 0]
    before = mixture.diffuse(*at).log_posterior(x, [0], complement=True)[0]

    def gain(x_next):
        after = mixture.diffuse(*to).log_posterior(x_next[:, None], [0], complement=True)
        return g * (after - before)

    def function(x_next):
        return 1.0 + np.sin(3.0 * x_next)

    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    unguided = mean + np.sqrt(v) * nodes
    expected = weights @ (np.exp(gain(unguided)) * function(unguided))
    guided = unguided - scale * gap
    log_weight = gain(guided) + scale * nodes * gap / np.sqrt(v) - scale**2 * gap**2 / (2 * v)
    got = weights @ (np.exp(log_weight) * function(guided))
    assert error(got, expected) < 1e-12


@each_process
@pytest.mark.parametrize("g", ["-0.5", "0.5", "1", "2", "3"])
def test_weights_tend_to_their_continuous_form(alpha, sigma, g):
    """With lambda = g o: (G^2/2) g (g - 1) o^2 (s_c - s)^2 dtau, and nothing at g = 1.

    Averaged over z = 1 and z = -1, as in the test of the divergence term.
    """
    with mp.workdps(DIGITS):
        t, h, x, g = mpf("0.35"), mpf("1e-15"), mpf("0.4"), mpf(g)
        at, to = (alpha(t), sigma(t)), (alpha(t - h), sigma(t - h))
        ratio = equations.transition_alpha(at[0], to[0])
        beta = equations.transition_variance(at[1], to[1], ratio)
        v = equations.posterior_variance(beta, to[1], at[1])
        odds = posterior(x, *at) / (1 - posterior(x, *at))
        scale = equations.dynamic_scale(g, posterior(x, *at), 1 - posterior(x, *at))
        score_gap = score(x, *at, (0,)) - score(x, *at)
        mean = (x + beta * score(x, *at)) / ratio
        gap = beta * score_gap / ratio
        got = mpf(0)
        for z in (mpf(1), mpf(-1)):
            x_next = mean - scale * gap + mpmath.sqrt(v) * z
            gain = mpmath.log(1 - posterior(x_next, *to)) - mpmath.log(1 - posterior(x, *at))
            drawn = scale * z * gap / mpmath.sqrt(v) - scale**2 * gap**2 / (2 * v)
            got += (g * gain + drawn) / 2
        diffusion = drift_and_diffusion(alpha, sigma, t)[1]
        expected = diffusion / 2 * g * (g - 1) * odds**2 * score_gap**2
        assert close(got / h, expected, mpf("1e-12"))
        assert (abs(expected) > 1e-4) == (g != 1)
