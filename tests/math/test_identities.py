"""Identities of the theory about paths: trackers, divergence, flows, and weights for g != 1.

Each is checked on exact mixtures with quantities from the mixture's public methods alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    equations,
    sample,
)
from dng_math.distances import guided_density
from tests.helpers.mixtures import mixtures, points
from tests.helpers.statistical import mean_bound
from tests.helpers.tolerances import error

seeds = st.integers(0, 2**32 - 1)


def schedule_of(alpha_t, sigma_t, alpha_s, sigma_s):
    """Two steps: the one that is looked at, and the one to the data."""
    return NoiseSchedule([1.0, alpha_s, alpha_t], [0.0, sigma_s, sigma_t])


def parts(mixture, x, alpha, sigma):
    """Posterior of component 0, and predictions of x0: whole, component 0, rest."""
    rest = np.arange(1, mixture.n_components)
    p = np.exp(mixture.diffuse(alpha, sigma).log_posterior(x, [0]))
    predictions = [
        part.posterior_mean(x, alpha, sigma)
        for part in (mixture, mixture.restrict([0]), mixture.restrict(rest))
    ]
    return p, *predictions


@given(mixtures(), seeds, st.floats(0.3, 0.95), st.floats(0.4, 0.9))
def test_the_rest_steps_to_mu_minus_odds_gap(mixture, seed, alpha_s, ratio):
    """mu_rest = mu - o (mu_c - mu): what the log-odds tracker compares with.

    docs/theory.md, section 6.3.
    """
    alpha_t = ratio * alpha_s
    sigma_t, sigma_s = np.sqrt(1 - alpha_t**2), np.sqrt(1 - alpha_s**2)
    c = schedule_of(alpha_t, sigma_t, alpha_s, sigma_s).coefficients(DDPM())
    x = points(mixture, seed)
    p, base, negative, rest = parts(mixture, x, alpha_t, sigma_t)
    assume(p.max() < 1 - 1e-6)
    mean, mean_c, mean_rest = (
        equations.step_mean(x, x0, c.x_factor[0], c.x0_factor[0]) for x0 in (base, negative, rest)
    )
    odds = (p / (1 - p))[:, None]
    # The odds multiply the rounding of mu_c - mu.
    assert np.all(np.abs(mean - odds * (mean_c - mean) - mean_rest) < 1e-12 * (10 + 10 * odds))


@given(mixtures(), seeds, st.floats(0.3, 0.9), st.floats(0.0, 1.0))
def test_trackers_need_two_sums_of_the_predictions(mixture, seed, alpha_t, guidance_scale):
    """r = -lambda d + sqrt(v) z in a guided DDPM step: |delta|^2 and z.delta are enough."""
    alpha_s = 0.5 * (1 + alpha_t)
    sigma_t, sigma_s = np.sqrt(1 - alpha_t**2), np.sqrt(1 - alpha_s**2)
    c = schedule_of(alpha_t, sigma_t, alpha_s, sigma_s).coefficients(DDPM())
    x = points(mixture, seed)
    rng = np.random.default_rng(seed)
    z, scale = rng.normal(size=x.shape), guidance_scale * rng.uniform(0, 3, (len(x), 1))
    eps = mixture.noise_prediction(x, alpha_t, sigma_t)
    delta = mixture.restrict([0]).noise_prediction(x, alpha_t, sigma_t) - eps
    v = c.step_var[0]

    def mean(noise):
        return (x - c.beta_ts[0] / c.sigma_t[0] * noise) / c.alpha_ts[0]  # DDPM Eq. 11

    x_next = mean(equations.away(eps, delta, scale)) + np.sqrt(v) * z
    far = np.sum((x_next - mean(eps + delta)) ** 2, axis=-1)
    near = np.sum((x_next - mean(eps)) ** 2, axis=-1)
    m = -c.beta_ts[0] / (c.alpha_ts[0] * c.sigma_t[0])
    delta_sq, z_delta = np.sum(delta**2, axis=-1), np.sum(z * delta, axis=-1)
    residual_gap = m * (np.sqrt(v) * z_delta - scale[:, 0] * m * delta_sq)
    got = equations.log_likelihood_ratio(m**2 * delta_sq, residual_gap, v)
    assert error(got, (near - far) / (2 * v)) < 1e-9 * (1 + np.max(far + near) / v)


@given(mixtures(max_dim=4), seeds, st.floats(0.2, 0.9))
def test_change_of_the_posterior_along_the_probability_flow(mixture, seed, alpha):
    """d log p(c|x) along a noiseless path: the kernel's log ratio and the divergence term.

    One step so short that what is left is its own square: error below 1e-3 of the change.
    """
    sigma = np.sqrt(1 - alpha**2)
    alpha_s = alpha + 1e-6 * sigma**2 / alpha
    schedule = schedule_of(alpha, sigma, alpha_s, np.sqrt(1 - alpha_s**2))
    x = points(mixture, seed)
    before = mixture.diffuse(alpha, sigma)
    after = mixture.diffuse(float(schedule.alpha[1]), float(schedule.sigma[1]))
    for tracker in (PaperTracker, LogOddsTracker):
        rule = DynamicNegativeGuidance(0.0, tracker(p_min=0.0, p_max=1 - 1e-9, divergence=True))
        # Tracking starts at the exact posterior of a point: one point, one prior.
        for row in x:
            p = float(np.exp(before.log_posterior(row[None], [0]))[0])
            if not 1e-4 < p < 1 - 1e-4:
                continue
            one = tracker(prior=p, p_min=0.0, p_max=1 - 1e-9, divergence=True)
            result = sample(
                mixture,
                schedule,
                DynamicNegativeGuidance(rule.guidance_scale, one),
                n=1,
                forbidden=[0],
                sampler=DDIM(0.0),
                initial=row[None],
                record=["trajectory", "tracked"],
            )
            x_next = result.trajectory[1]
            exact = after.log_posterior(x_next, [0])[0] - np.log(p)
            tracked = result.tracked[1, 0, 0] - np.log(p)
            size = abs(exact) + 1e-6 * (1 + np.sum(before.score(row[None]) ** 2))
            assert abs(tracked - exact) < 1e-3 * size + 1e-12


@given(mixtures(), seeds, st.floats(0.05, 0.95))
def test_flow_velocities_and_scores(mixture, seed, t):
    """s_c - s = -((1 - t)/t)(v_c - v) with v = E[eps - x0 | x], alpha = 1 - t, sigma = t."""
    x, alpha = points(mixture, seed), 1 - t
    noisy, own = mixture.diffuse(alpha, t), mixture.restrict([0])

    def velocity(part):
        x0 = part.posterior_mean(x, alpha, t)
        return (x - alpha * x0) / t - x0

    gap = own.diffuse(alpha, t).score(x) - noisy.score(x)
    assert error(gap, -alpha / t * (velocity(own) - velocity(mixture))) < 1e-8 / t**2


@given(mixtures(), seeds, st.floats(0.1, 1.0), st.floats(0.1, 3.0))
def test_divergences_of_the_parts(mixture, seed, alpha, sigma):
    """div s_c - div s_rest from what a tracker has: (1 + o)(div s_c - div s + o |s_c - s|^2)."""
    noisy, x = mixture.diffuse(alpha, sigma), points(mixture, seed)
    x = x[noisy.log_odds(x, [0]) < 7.0]  # the odds multiply the rounding of what is subtracted
    odds = np.exp(noisy.log_odds(x, [0]))
    own, rest = noisy.restrict([0]), noisy.restrict(np.arange(1, mixture.n_components))
    gap = own.score_divergence(x) - noisy.score_divergence(x)
    score_gap_sq = np.sum((own.score(x) - noisy.score(x)) ** 2, axis=-1)
    got = equations.rest_divergence_gap(odds, gap, score_gap_sq)
    expected = own.score_divergence(x) - rest.score_divergence(x)
    scale = (1 + odds) ** 2 * (1 + np.abs(own.score_divergence(x)) + score_gap_sq)
    assert np.all(np.abs(got - expected) < 1e-11 * scale)


@pytest.mark.slow
def test_weights_correct_guidance_with_another_scale():
    """At g = 2 exact DNG does not sample p (1 - p_c)^2, but weighted it does.

    d log w = (g^2_diff/2) g (g - 1) o^2 |s_c - s|^2 dtau (docs/theory.md, section 7.2).  The mass
    right of 2 of 20,000 chains; the bounds hold at a false-alarm rate of 1e-6 each, the weighted
    one through the effective sample size.
    """
    mixture = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
    n, g, schedule = 20_000, 2.0, NoiseSchedule.linear()
    result = sample(mixture, schedule, DynamicNegativeGuidance(g), n=n, forbidden=[1],
                    record=["trajectory"])  # fmt: skip
    c = schedule.coefficients()
    log_weight = np.zeros(n)
    for i in range(len(c)):
        noisy, x = mixture.diffuse(float(c.alpha_t[i]), float(c.sigma_t[i])), result.trajectory[i]
        odds = np.exp(np.minimum(noisy.log_odds(x, [1]), 50.0))
        gap_sq = np.sum(noisy.log_posterior_gradient(x, [1]) ** 2, axis=-1)
        log_weight += 0.5 * c.beta_ts[i] * g * (g - 1) * odds**2 * gap_sq
    weight = np.exp(log_weight - log_weight.max())
    right = result.x[:, 0] > 2.0
    target = guided_density(mixture, [1], g).mass(2.0, 10.0)
    plain = right.mean()
    corrected = weight @ right / weight.sum()
    effective = weight.sum() ** 2 / np.sum(weight**2)
    assert abs(plain - target) > 2 * mean_bound(n, value_range=1.0)
    assert effective > 500
    bound = mean_bound(int(effective), value_range=1.0)
    assert abs(corrected - target) < bound < abs(plain - target) + bound
