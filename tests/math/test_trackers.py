"""Trackers and rules against the textbook transcription, and the equations behind them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from dng_math import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    ExactPosterior,
    FeedbackGuidance,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
    TimeProfile,
    Unguided,
    equations,
    rules,
)
from dng_math.rules import Predictions, innermost, tracker_of
from dng_math.trackers import (
    RatioTracker,
    at_steps,
    log_odds_from_log_posterior,
    log_posterior_from_log_odds,
    temperatures,
)
from tests.helpers import textbook
from tests.helpers.tolerances import error

seeds = st.integers(0, 2**32 - 1)
variances = st.floats(1e-6, 2.0)


def step(seed: int, n: int = 6, d: int = 3):
    """x_next and the two means of a step, close together as in a chain."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(n, d))
    return mean + 0.1 * rng.normal(size=(n, d)), mean, mean + 0.05 * rng.normal(size=(n, d))


def statistics(x_next, mean, mean_neg):
    gap = mean_neg - mean
    return np.sum(gap**2, axis=-1), np.sum((x_next - mean) * gap, axis=-1)


# ---------------------------------------------------------------- trackers


@given(seeds, variances, st.floats(0.0, 2.0), st.floats(-1e-3, 1e-3))
def test_paper_tracker_is_the_textbook(seed, variance, temperature, offset):
    x_next, mean, mean_neg = step(seed)
    tracker = PaperTracker(temperature=temperature, offset=offset, p_min=1e-5, p_max=0.9)
    state = np.log(np.random.default_rng(seed).uniform(1e-5, 0.9, 6))
    got = tracker.update(state, *statistics(x_next, mean, mean_neg), variance, 100)
    expected = textbook.paper_update(
        state, x_next, mean, mean_neg, variance, temperature, offset, 1e-5, 0.9
    )
    assert error(got, expected) < 1e-9


@given(seeds, variances, st.floats(0.0, 2.0), st.floats(-5, 5))
def test_log_odds_tracker_is_the_textbook(seed, variance, temperature, nats):
    x_next, mean, mean_neg = step(seed)
    tracker = LogOddsTracker(temperature=temperature, offset_nats=nats, p_min=0.0, p_max=0.95)
    state = np.random.default_rng(seed).normal(size=6)
    got = tracker.update(state, *statistics(x_next, mean, mean_neg), variance, 50)
    expected = textbook.log_odds_update(
        state, x_next, mean, mean_neg, variance, temperature, nats / 50, 0.95 / 0.05
    )
    scale = np.abs(np.array(statistics(x_next, mean, mean_neg))).max() * 400 / variance
    assert np.max(np.abs(got - expected)) < 1e-13 * (1 + scale)


@given(seeds, st.floats(0.01, 2.0))
def test_log_odds_update_is_bayes_rule(seed, variance):
    """If x_next ~ p N(mu_c) + (1-p) N(mu_r) and mu = p mu_c + (1-p) mu_r, the update is exact."""
    rng = np.random.default_rng(seed)
    x_next, mean_rest, mean_neg = rng.normal(size=(3, 4, 2))
    p = rng.uniform(0.05, 0.9, 4)
    mean = p[:, None] * mean_neg + (1 - p[:, None]) * mean_rest
    tracker = LogOddsTracker(p_min=0.0, p_max=0.999)
    got = tracker.update(np.log(p / (1 - p)), *statistics(x_next, mean, mean_neg), variance, 1)
    deviation = math.sqrt(variance)
    ours = stats.norm(mean_neg, deviation).logpdf(x_next).sum(axis=1)
    theirs = stats.norm(mean_rest, deviation).logpdf(x_next).sum(axis=1)
    assert error(got, np.log(p / (1 - p)) + ours - theirs) < 1e-9


@given(seeds, variances)
def test_trackers_agree_to_first_order(seed, variance):
    """For p -> 0 the rest is everything: both trackers add the same log ratio."""
    x_next, mean, mean_neg = step(seed)
    s = statistics(x_next, mean, mean_neg)
    state = np.full(6, -25.0)
    paper = PaperTracker(p_min=0.0).update(state, *s, variance, 1) - state
    odds = LogOddsTracker(p_min=0.0).update(state, *s, variance, 1) - state
    kept = (state + paper < np.log(0.99)) & (paper < 20)
    assert error(odds[kept], paper[kept]) < 1e-6


def test_published_update_in_log_space():
    """p *= exp((-tau diff + offset)/(2 v)), clamped: the paper's tracker with its variance."""
    book = textbook.ddpm_coefficients(100)
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(2, 5, 3))
    eps_neg = eps + 0.1 * rng.normal(size=eps.shape)
    p = rng.uniform(0.01, 0.9, 5)
    c = NoiseSchedule.linear(100).coefficients()
    variance = c.tracker_variance("published")
    tracker = PaperTracker(temperature=0.2, offset=2e-4, variance="published")
    for i, t in enumerate(reversed(range(100))):
        mean = textbook.ddpm_mean(book, t, x, eps)
        x_next = mean + np.sqrt(book.betas[t]) * rng.normal(size=x.shape)
        expected = textbook.published_update(
            p, book, t, x, x_next, eps, eps_neg, 0.2, 2e-4, 1e-6, 0.99
        )
        gap = textbook.ddpm_mean(book, t, x, eps_neg) - mean
        got = tracker.update(
            np.log(p), np.sum(gap**2, -1), np.sum((x_next - mean) * gap, -1), variance[i], 100
        )
        assert error(np.exp(got), expected) < 1e-9


@given(st.floats(-1e4, 1e4))
def test_log_posterior_and_log_odds_invert(log_odds):
    log_p = log_posterior_from_log_odds(log_odds)
    assert log_p <= 0
    if -700 < log_odds < 30:  # above, log p is a rounding of -e^-l and the odds with it
        assert (
            error(log_odds_from_log_posterior(log_p), log_odds)
            < 1e-2 * math.exp(max(0.0, log_odds) - 32) + 1e-13
        )


def test_no_variance_no_update():
    for tracker in (PaperTracker(offset=1.0), LogOddsTracker(offset=1.0)):
        state = tracker.init(np.array([0.3]))
        assert tracker.update(state, np.ones(1), np.ones(1), 0.0, 10) is state
    tracker = FeedbackGuidance().tracker(NoiseSchedule.linear(10).coefficients())
    state = tracker.init(np.array([0.3]))
    assert tracker.update(state, np.ones(1), np.ones(1), 0.0, 10) is state


@given(seeds, st.floats(1e-3, 0.5))
def test_clamps(seed, variance):
    x_next, mean, mean_neg = step(seed)
    s = statistics(x_next, mean, mean_neg)
    paper = PaperTracker(p_min=0.01, p_max=0.9)
    state = paper.update(np.full(6, np.log(0.5)), 1e3 * s[0], 1e3 * s[1], variance, 1)
    assert np.all((state >= np.log(0.01)) & (state <= np.log(0.9)))
    assert np.all(paper.odds(state) <= 9 * (1 + 1e-12))
    odds = LogOddsTracker(p_min=0.01, p_max=0.9)
    state = odds.update(np.zeros(6), 1e3 * s[0], 1e3 * s[1], variance, 1)
    assert np.all(state >= np.log(0.01 / 0.99))
    assert np.all(odds.odds(state) <= 9 * (1 + 1e-12))
    assert np.all(odds.log_posterior(state) <= 0)


@given(st.integers(1, 1000), st.floats(-5, 5))
def test_offset_in_nats_does_not_depend_on_the_number_of_steps(steps, nats):
    tracker = LogOddsTracker(offset_nats=nats, p_min=0.0)
    state = np.zeros(1)
    for _ in range(steps):
        state = tracker.update(state, np.zeros(1), np.zeros(1), 0.1, steps)
    assert error(state, nats) < 1e-11


# ---------------------------------------------------------------- rules


KNOTS = TimeProfile((0.05, 0.1, 0.4, 0.9), (0.0, 0.7, 0.2, 1.0))


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_profile_is_averaged_over_each_step(steps):
    c = NoiseSchedule.linear(200).respace(steps).coefficients()
    edges = np.append(c.time, 0.0)
    expected = [
        integrate.quad(
            lambda t: np.interp(t, KNOTS.times, KNOTS.values), low, high, points=KNOTS.times
        )[0]
        / (high - low)
        for high, low in itertools.pairwise(edges)
    ]
    assert error(KNOTS.over(c), expected) < 1e-12
    for kind in (PaperTracker, LogOddsTracker):
        trackers = at_steps(kind(temperature=KNOTS, offset_nats=2.0), c)
        assert [t.temperature for t in trackers] == KNOTS.over(c).tolist()
        assert trackers[0].offset_nats == 2.0
    assert np.all(temperatures(PaperTracker(temperature=0.3), c) == 0.3)


def test_flat_profile_is_the_number():
    c = NoiseSchedule.linear(7).coefficients()
    assert error(TimeProfile((0.3,), (0.25,)).over(c), np.full(7, 0.25)) < 1e-15


def test_update_needs_a_number():
    with pytest.raises(TypeError, match="at_steps"):
        PaperTracker(temperature=KNOTS).update(np.zeros(1), np.ones(1), np.ones(1), 0.1, 10)


def predictions(seed: int, concepts: int = 1, **changes) -> Predictions:
    rng = np.random.default_rng(seed)
    base, positive, rest = rng.normal(size=(3, 5, 3))
    fields = {
        "base": base,
        "negative": base + rng.normal(size=(concepts, 5, 3)),
        "positive": positive,
        "rest": rest,
        "log_ratio": rng.normal(size=(concepts, 5)),
        "odds": rng.uniform(0.01, 3.0, (concepts, 5)),
        "to_noise": 1.0,
        "step": 3,
        "time": 0.5,
    }
    return Predictions(**{**fields, **changes})


@given(seeds, st.floats(-3, 3))
def test_linear_rules_are_the_textbook(seed, g):
    p = predictions(seed)
    guided, scale, memory = ClassifierFreeGuidance(g).guide(p, None)
    assert error(guided, textbook.cfg(p.base, p.positive, g)) < 1e-12
    assert memory is None and scale.shape == (1, 5) and np.all(scale == g)
    assert error(ClassifierGuidance(g).guide(p, None)[0], guided) == 0
    guided, _, _ = NegativePrompting(g).guide(p, None)
    assert error(guided, textbook.negative_prompting(p.base, p.negative[0], g)) < 1e-12
    assert np.array_equal(Unguided().guide(p, None)[0], p.base)
    guided, _, _ = PerpNeg(g, 0.7).guide(p, None)
    direction = p.positive - p.base
    expected = textbook.perp_neg(p.base, p.negative[0], direction, g) + 0.7 * direction
    assert error(guided, expected) < 1e-11
    pushed = guided - p.base - 0.7 * direction
    assert np.max(np.abs(np.sum(pushed * direction, axis=-1))) < 1e-11


@given(seeds, st.floats(-2, 2), st.floats(0, 2))
def test_contrastive_is_the_textbook(seed, g, tau):
    p = predictions(seed)
    guided, scale, _ = ContrastiveCFG(g, tau).guide(p, None)
    assert error(guided, textbook.contrastive_cfg(p.base, p.negative[0], g, tau)) < 1e-12
    assert np.all(np.abs(scale) <= abs(g))


@given(seeds, st.sampled_from(["signed", "absolute"]), st.integers(0, 3), st.floats(-1, 1))
def test_sld_is_the_textbook(seed, gate, warmup, threshold):
    """Four steps, so that momentum and warm-up count."""
    rule = SafeLatentDiffusion(0.8, threshold, gate, 2.0, 0.3, 0.4, warmup)
    memory, momentum = rule.init(5, 3), np.zeros((5, 3))
    for i in range(4):
        p = predictions(seed + i, step=i)
        got, _, memory = rule.guide(p, memory)
        expected, momentum = textbook.sld(
            p.base, p.negative[0], momentum, i, 0.8, threshold, 2.0, 0.3, 0.4, warmup, gate
        )
        assert error(got, expected) < 1e-12
        assert error(memory, momentum) < 1e-12


@given(seeds, st.floats(-3, 3))
def test_tracked_dng_is_the_textbook(seed, g):
    rule = DynamicNegativeGuidance(g, LogOddsTracker())
    p = predictions(seed)
    posterior = p.odds[0] / (1 + p.odds[0])
    guided, scale, _ = rule.guide(p, None)
    assert error(guided, textbook.dng(p.base, p.negative[0], posterior, g)) < 1e-12
    assert error(scale[0], textbook.dng_scale(posterior, g)) < 1e-12


@given(seeds, st.floats(-3, 3))
def test_several_concepts(seed, g):
    """base - g sum_k p_k (negative_k - base)/(1 - sum_j p_j), and their sum capped at p_max."""
    rule = DynamicNegativeGuidance(g, PaperTracker(p_max=0.8))
    small = predictions(seed, 3, odds=np.random.default_rng(seed).uniform(0.01, 0.2, (3, 5)))
    p = small.odds / (1 + small.odds)
    expected = small.base - g * np.einsum(
        "kn,knd->nd", p / (1 - p.sum(axis=0)), small.negative - small.base
    )
    assert error(rule.guide(small, None)[0], expected) < 1e-12
    large = predictions(seed, 3, odds=np.full((3, 5), 4.0))
    scale = rule.guide(large, None)[1]
    assert error(scale.sum(axis=0), g * 0.8 / 0.2) < 1e-12


@given(seeds, st.floats(-3, 3), st.integers(1, 3))
def test_exact_dng_is_the_formula(seed, g, concepts):
    """With base = sum_k p_k negative_k + p_rest rest, as in a mixture."""
    p = predictions(seed, concepts)
    share = np.exp(p.log_ratio)
    rest = 1 / (1 + share.sum(axis=0))
    share = share * rest
    base = np.einsum("kn,knd->nd", share, p.negative) + rest[:, None] * p.rest
    p = predictions(seed, concepts, base=base, negative=p.negative, rest=p.rest)
    expected = base - g * np.einsum("kn,knd->nd", share / rest, p.negative - base)
    guided, scale, _ = DynamicNegativeGuidance(g).guide(p, None)
    assert error(guided, expected) < 1e-11
    assert error(scale, g * share / rest) < 1e-11


def test_exact_dng_deep_in_the_forbidden():
    """p/(1-p) = e^5000: the guided prediction is still the rest's."""
    p = predictions(0, log_ratio=np.full((1, 5), 5000.0))
    p = predictions(0, base=p.negative[0], log_ratio=p.log_ratio)
    guided, scale, _ = DynamicNegativeGuidance(1.0).guide(p, None)
    assert error(guided, p.rest) < 1e-14
    assert np.all(np.isfinite(scale))


@given(seeds)
def test_feedback_is_the_textbook(seed):
    rule = FeedbackGuidance(pi=0.9, lambda_max=8.0, t0=0.6, t1=0.3)
    c = NoiseSchedule.linear(50).coefficients()
    tracker = rule.tracker(c)
    assert error(tracker.step_offset, textbook.fbg_step_offset(0.9, 0.6, 50)) < 1e-14
    assert error(tracker.low, textbook.fbg_floor(0.9, 8.0)) < 1e-14
    small = c.tracker_variance("small")
    at_t1 = small[::-1][15]  # position 0.3 N, counted from the step onto the data
    wanted = textbook.fbg_temperature(at_t1, tracker.step_offset)
    assert error(tracker.temperature, wanted) < 1e-14
    x_next, mean, mean_pos = step(seed)
    state = np.zeros(6)
    got = tracker.update(state, *statistics(x_next, mean, mean_pos), 0.01, 50)
    expected = textbook.fbg_update(
        state,
        x_next,
        mean,
        mean_pos,
        0.01,
        tracker.temperature,
        tracker.step_offset,
        tracker.low,
        3.0,
    )
    assert error(got, expected) < 1e-11
    p = predictions(seed, odds=np.exp(got[None, :5]))
    guided, scale, _ = rule.guide(p, None)
    assert error(guided, textbook.fbg(p.base, p.positive, got[:5], 0.9)) < 1e-12
    assert np.all((scale > 1) & (scale <= 8.0 * (1 + 1e-12)))


def test_limited_interval():
    rule = LimitedInterval(NegativePrompting(0.7), 0.4, 0.6)
    inside, outside = predictions(0, time=0.4), predictions(0, time=0.61)
    assert np.array_equal(rule.guide(inside, None)[0], rule.rule.guide(inside, None)[0])
    guided, scale, _ = rule.guide(outside, None)
    assert np.array_equal(guided, outside.base) and np.all(scale == 0)
    sld = LimitedInterval(SafeLatentDiffusion(), 0.4, 0.6)
    momentum = np.ones((5, 3))
    assert sld.guide(outside, momentum)[2] is momentum
    assert sld.init(5, 3).shape == (5, 3)
    nested = LimitedInterval(
        LimitedInterval(DynamicNegativeGuidance(1.0, PaperTracker()), 0.5), 0.1
    )
    assert innermost(nested) == nested.rule.rule
    assert tracker_of(nested, NoiseSchedule.linear(5).coefficients()) == PaperTracker()
    assert nested.several_concepts and not nested.needs_positive


@given(seeds)
def test_rules_read_the_same_for_noise_and_for_x0(seed):
    """Guidance of x0 predictions, converted, is guidance of noise predictions."""
    alpha, sigma = 0.6, 0.8
    p = predictions(seed)
    x = np.random.default_rng(seed + 1).normal(size=(5, 3))

    def to_x0(eps):
        return equations.x0_from_noise(x, eps, alpha, sigma)

    q = predictions(
        seed,
        base=to_x0(p.base),
        negative=to_x0(p.negative),
        positive=to_x0(p.positive),
        rest=to_x0(p.rest),
        to_noise=-alpha / sigma,
    )
    for rule in (
        ClassifierFreeGuidance(1.5),
        NegativePrompting(0.5),
        SafeLatentDiffusion(0.8, threshold=0.3, slope=0.5),
        PerpNeg(1.0, 0.5),
        ContrastiveCFG(1.0, 0.3),
        DynamicNegativeGuidance(1.0),
        DynamicNegativeGuidance(1.0, PaperTracker()),
        FeedbackGuidance(),
    ):
        a, scale_a, memory_a = rule.guide(p, rule.init(5, 3))
        b, scale_b, memory_b = rule.guide(q, rule.init(5, 3))
        assert error(b, to_x0(a)) < 1e-10, rule
        assert error(scale_b, scale_a) < 1e-10
        if memory_a is not None:
            assert error(memory_b, memory_a) < 1e-10


def test_model_outputs_invert_each_other():
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 10))
    for alpha, sigma in ((0.6, 0.8), (1.0, 3.0), (0.7, 0.3)):
        x = alpha * x0 + sigma * eps
        score = -eps / sigma
        velocity = alpha * eps - sigma * x0
        assert error(equations.noise_from_score(score, sigma), eps) < 1e-13
        assert error(equations.x0_from_noise(x, eps, alpha, sigma), x0) < 1e-13
        assert error(equations.x0_from_velocity(x, velocity, alpha, sigma), x0) < 1e-13
    x = 0.7 * x0 + 0.3 * eps
    assert error(equations.x0_from_flow(x, eps - x0, 0.3), x0) < 1e-13


def test_the_step_from_x0_is_ddpms_from_the_noise():
    c = NoiseSchedule.scaled_linear(100).coefficients()
    x, eps = np.random.default_rng(0).normal(size=(2, 100))
    x0 = equations.x0_from_noise(x, eps, c.alpha_t, c.sigma_t)
    a = (x - c.beta_ts / c.sigma_t * eps) / c.alpha_ts  # DDPM Eq. 11
    assert error(a, equations.step_mean(x, x0, c.x_factor, c.x0_factor)) < 1e-11


def test_a_cap_of_the_odds_does_not_limit_the_log_odds_trackers_prior():
    """Its state goes above p_max; only what enters the scale does not."""
    tracker = LogOddsTracker(prior=0.7, p_max=0.5)
    state = tracker.init(np.array(0.7))
    np.testing.assert_allclose(np.exp(tracker.log_posterior(state)), 0.7)
    np.testing.assert_allclose(tracker.odds(state), 1.0)


@pytest.mark.parametrize("pi", [1e-9, 0.01, 0.5, 0.95])
def test_feedback_starts_within_its_largest_scale(pi):
    """With a small pi the floor of L is above 0, where a scale would be 1/pi."""
    rule = FeedbackGuidance(pi=pi, lambda_max=8.0)
    tracker = rule.tracker(NoiseSchedule.linear(10).coefficients())
    state = tracker.init(np.array(0.5))
    assert 1.0 < float(equations.feedback_scale(tracker.odds(state), pi)) < 8.0 * (1 + 1e-6)
    assert state == max(0.0, tracker.low)


# ---------------------------------------------------------------- bad input

ZERO = np.zeros(1)
BAD = [
    (lambda: PaperTracker(prior=0.0), r"prior must be in \(0, 1\), got 0.0"),
    (lambda: PaperTracker(prior=1.0), "prior"),
    (lambda: LogOddsTracker(prior=float("nan")), "prior.*nan"),
    (lambda: PaperTracker(temperature=-1.0), "temperature.*-1.0"),
    (lambda: LogOddsTracker(temperature=float("inf")), "temperature.*inf"),
    (lambda: PaperTracker(p_max=1.0), "p_max.*1.0"),
    (lambda: PaperTracker(p_min=0.99), r"p_min must be in \[0, p_max\)"),
    (lambda: PaperTracker(p_min=-0.1), "p_min"),
    (lambda: PaperTracker(offset=float("inf")), "offset"),
    (lambda: LogOddsTracker(offset_nats=float("nan")), "offset_nats"),
    (lambda: PaperTracker(variance="other"), "variance must be one of 'matched'"),
    (lambda: SafeLatentDiffusion(gate="both"), "gate must be one of"),
    (lambda: SafeLatentDiffusion(momentum_decay=1.5), "momentum_decay"),
    (lambda: SafeLatentDiffusion(warmup_steps=-1), "warmup_steps"),
    (lambda: SafeLatentDiffusion(slope=-1.0), "slope"),
    (lambda: ContrastiveCFG(temperature=-1.0), "temperature"),
    (lambda: NegativePrompting(float("nan")), "guidance_scale"),
    (lambda: ClassifierFreeGuidance(float("inf")), "guidance_scale"),
    (lambda: DynamicNegativeGuidance(float("inf")), "guidance_scale"),
    (lambda: PerpNeg(1.0, float("nan")), "positive_scale"),
    (lambda: FeedbackGuidance(pi=1.0), "pi"),
    (lambda: FeedbackGuidance(lambda_max=1.0), "lambda_max.*> 1"),
    (lambda: FeedbackGuidance(t0=0.0), "t0"),
    (lambda: FeedbackGuidance(temperature=-1.0), "temperature"),
    (lambda: FeedbackGuidance(log_ratio_max=0.0), "log_ratio_max"),
    (lambda: FeedbackGuidance(pi=1e-9, log_ratio_max=0.01), "log_ratio_max.*floor.*0.105.*0.01"),
    (lambda: PaperTracker(prior=0.995), r"prior must be in \[p_min, p_max\].*0.99;.*0.995"),
    (lambda: LogOddsTracker(prior=1e-7), r"prior must be in \[p_min, 1\).*1e-06.*1e-07"),
    (lambda: PaperTracker().update(ZERO, ZERO, ZERO, -1.0, 5), "variance.*>= 0.*-1.0"),
    (lambda: LogOddsTracker().update(ZERO, ZERO, ZERO, float("nan"), 5), "variance.*nan"),
    (lambda: RatioTracker(1.0, 0.0, -1.0, 1.0).update(ZERO, ZERO, ZERO, -1.0, 5), "variance"),
    (lambda: PaperTracker().update(ZERO, ZERO, ZERO, 1.0, 0), "steps.*>= 1.*0"),
    (lambda: TimeProfile((), ()), "at least 1"),
    (lambda: TimeProfile((0.1, 0.2), (1.0,)), "same length.*2 and 1"),
    (lambda: TimeProfile((0.2, 0.1), (1.0, 1.0)), "times must increase"),
    (lambda: TimeProfile((0.2, 1.1), (1.0, 1.0)), r"within \[0, 1\]"),
    (lambda: TimeProfile((0.2, 0.3), (1.0, -1.0)), "values must be >= 0"),
    (lambda: LimitedInterval(Unguided(), 0.6, 0.4), r"t_lo must be in \[0, t_hi\]"),
    (lambda: LimitedInterval(Unguided(), 0.0, 1.4), "t_hi"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WRONG_TYPES = [
    (lambda: NegativePrompting("1"), "guidance_scale must be a real number"),
    (lambda: DynamicNegativeGuidance(1.0, "exact"), "posterior must be an ExactPosterior"),
    (lambda: LimitedInterval("rule"), "rule must be a guidance rule"),
    (lambda: PaperTracker(divergence=1), "divergence must be True or False"),
    (lambda: SafeLatentDiffusion(warmup_steps=1.5), "warmup_steps must be an integer"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_rules_are_values():
    assert DynamicNegativeGuidance(1.0, PaperTracker()) == DynamicNegativeGuidance(
        1.0, PaperTracker()
    )
    assert hash(DynamicNegativeGuidance(1.0)) == hash(
        DynamicNegativeGuidance(1.0, ExactPosterior())
    )
    with pytest.raises(AttributeError):
        NegativePrompting().guidance_scale = 2.0


def test_docstrings_hold_the_shared_parameters_and_may_be_stripped():
    for tracker in (PaperTracker, LogOddsTracker):
        assert "p_min, p_max : float" in tracker.__doc__
    code = "from dng_math import PaperTracker; PaperTracker()"
    subprocess.run([sys.executable, "-OO", "-c", code], check=True)


def test_the_usual_rule_in_one_line():
    """The same object as with its tracker written out, so that equality and replace hold."""
    found = DynamicNegativeGuidance.tracked(18.0, 0.01, 0.3, 0.003, p_max=0.9)
    tracker = PaperTracker(prior=0.01, temperature=0.3, offset=0.003, p_max=0.9)
    assert found == DynamicNegativeGuidance(18.0, tracker)
    assert replace(found, guidance_scale=2.0) == DynamicNegativeGuidance(2.0, tracker)
    other = DynamicNegativeGuidance.tracked(prior=0.2, tracker="log-odds", offset_nats=1.0)
    assert other == DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.2, offset_nats=1.0))
    for wrong in (
        {"prior": None},
        {"prior": 1.0},
        {"tracker": "log_odds"},
        {"guidance_scale": [1]},
    ):
        (name,) = wrong
        with pytest.raises((TypeError, ValueError), match=name):
            DynamicNegativeGuidance.tracked(**wrong)


def test_rules_have_one_name_each_and_an_interval_only_where_there_is_one():
    given = {
        "dng": {"posterior": PaperTracker()},
        "fbg": {"pi": 0.9},
        "spell": {"points": [[0.0]], "radius": 1.0},
        "images": {"points": [[0.0]], "prior": 0.3},
    }
    made = {name: rules.rule_named(name, 2.5, **given.get(name, {})) for name in rules.RULES}
    assert {type(rule) for rule in made.values()} == set(rules.RULES.values())
    assert all(getattr(rule, "guidance_scale", 2.5) == 2.5 for rule in made.values())
    assert rules.limited(made["np"], 0.0, 1.0) is made["np"]
    assert rules.limited(made["np"], 0.1, 1.0) == LimitedInterval(made["np"], 0.1, 1.0)
    with pytest.raises(ValueError, match="name must be one of 'none'.*got 'dgn'"):
        rules.rule_named("dgn", 1.0)
