"""The path tracker: its integrand, its order, and the posterior of any chain of points."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    EulerMaruyama,
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    ProbabilityFlow,
    TimeProfile,
    path_ends,
    predict,
    sample,
)
from dng_math.rules import tracker_of
from dng_math.trackers import at_steps, log_odds_from_log_posterior
from tests.helpers.mixtures import mixtures, moderate, points
from tests.helpers.tolerances import error

FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)
seeds = st.integers(0, 2**32 - 1)
levels = st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 2.0))


def log_ratio(mixture, x, alpha, sigma, part):
    """log p(x | c) / p(x), exactly."""
    noisy = mixture.diffuse(alpha, sigma)
    return noisy.log_posterior(x, part) - math.log(mixture.weights[part].sum())


# ---------------------------------------------------------------- the integrand


@settings(max_examples=8)
@given(seeds, st.integers(1, 3), levels)
def test_path_ends_are_the_derivatives_of_the_log_ratio(seed, d, level):
    """Rate and gradient in 50 digits: tau d/dtau at fixed u, and d/du at fixed tau."""
    alpha, sigma = level
    rng = np.random.default_rng(seed)
    mixture = moderate(seed, "diagonal", 3, d)
    x = points(mixture, seed, 2)
    moved = x + 1e-3 * rng.normal(size=x.shape)
    start, _ = path_ends(mixture, x, alpha, sigma, forbidden=[0, 1])
    _, pull = path_ends(mixture, moved, alpha, sigma, forbidden=[0, 1], previous=(x, alpha, sigma))

    def ratio(u, tau):
        logs = []
        for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
            each = mpmath.log(mpf(w))
            for j in range(d):
                v = mpf(c[j]) + tau
                each -= (u[j] - mpf(m[j])) ** 2 / (2 * v) + mpmath.log(v) / 2
            logs.append(each)
        part = mpmath.log(sum(mpmath.exp(each) for each in logs[:2]))
        return part - mpmath.log(sum(mpmath.exp(each) for each in logs))

    with mpmath.mp.workdps(50):
        tau = (mpf(sigma) / mpf(alpha)) ** 2
        for i in range(len(x)):
            u = [mpf(value) / mpf(alpha) for value in x[i]]
            rate = tau * mpmath.diff(lambda t, u=u: ratio(u, t), tau)
            assert abs(start[0, i] + float(rate)) < 1e-9 * (1 + abs(float(rate)))
            end = [mpf(value) / mpf(alpha) for value in moved[i]]
            along = [b - a for a, b in zip(u, end, strict=True)]
            slope = mpmath.diff(
                lambda h, end=end, along=along: ratio(
                    [e + h * a for e, a in zip(end, along, strict=True)], tau
                ),
                0,
            )
            assert abs(pull[0, i] - float(slope)) < 1e-9 * (1e-3 + abs(float(slope)))


def smooth(mixture, seed, x, count, bend):
    """``count`` steps on a smooth curve from x at (0.4, 0.9) to a point at (0.95, 0.3)."""
    rng = np.random.default_rng(seed)
    end, side = x + rng.normal(size=x.shape), bend * rng.normal(size=x.shape)
    for h in np.linspace(0.0, 1.0, count + 1):
        yield (1 - h) * x + h * end + h * (1 - h) * side, 0.4 + 0.55 * h, 0.9 - 0.6 * h


def integral(mixture, route, part):
    """The trapezoid of the log ratio along a route, and the exact difference of its ends."""
    total, previous, first = 0.0, None, None
    for point in route:
        if previous is not None:
            before, after = path_ends(mixture, *point, forbidden=part, previous=previous)
            total = total + 0.5 * (before + after)[0]
        first = point if first is None else first
        previous = point
    assert previous is not None and first is not None
    return total, log_ratio(mixture, *previous, part) - log_ratio(mixture, *first, part)


@settings(max_examples=10)
@given(mixtures(max_dim=6), seeds)
def test_path_integral_is_of_second_order(mixture, seed):
    """Twice the points leave a quarter of the error, here at most a third of it."""
    x = points(mixture, seed)
    errors = []
    for count in (50, 100):
        found, exact = integral(mixture, smooth(mixture, seed, x, count, 1.0), [0])
        errors.append(np.abs(found - exact).max())
    assert errors[1] < max(errors[0] / 3.0, 1e-9)


@pytest.mark.slow
@settings(max_examples=8)
@given(mixtures(max_dim=6), seeds)
def test_two_routes_between_the_same_points_agree(mixture, seed):
    """A line and a detour: the difference shrinks with the square of the step, and is small."""
    x = points(mixture, seed)
    gaps = []
    for count in (40, 160):
        line, exact = integral(mixture, smooth(mixture, seed, x, count, 0.0), [0])
        detour, same = integral(mixture, smooth(mixture, seed, x, count, 3.0), [0])
        assert error(exact, same) < 1e-9
        gaps.append(np.abs(line - detour).max())
    assert gaps[1] < max(gaps[0] / 12.0, 1e-9)


@given(mixtures(max_dim=6, min_components=3), seeds, levels)
def test_the_rest_is_one_plus_odds_times_the_base(mixture, seed, level):
    """Gradient and rate of log p/(1-p) are those of log p times 1 + o (section 6.11)."""
    x = points(mixture, seed)
    alpha, sigma = level
    noisy = mixture.diffuse(alpha, sigma)
    log_odds = log_odds_from_log_posterior(np.minimum(noisy.log_posterior(x, [0]), -1e-9))
    odds = np.exp(np.minimum(log_odds, 8.0))
    rest = mixture.restrict(np.arange(1, mixture.n_components)).diffuse(alpha, sigma)
    own = mixture.restrict([0]).diffuse(alpha, sigma)
    s_c, s_r = own.score(x), rest.score(x)
    divergences = own.score_divergence(x) - rest.score_divergence(x)
    eps = -sigma * (s_c + s_r)
    product = np.sum(-sigma * (s_c - s_r) * eps, axis=-1)
    rate = 0.5 * (product + sigma**2 * divergences)
    start, _ = path_ends(mixture, x, alpha, sigma, forbidden=[0])
    near = log_odds < 8.0
    assert error(rate[near], (-(1.0 + odds) * start[0])[near]) < 1e-7 * (1 + np.abs(product).max())


# ---------------------------------------------------------------- the update


@given(seeds, st.floats(0.0, 1.5), st.floats(-2.0, 2.0), st.sampled_from(["rest", "base"]))
def test_path_tracker_is_the_textbook(seed, temperature, nats, compare):
    """An independent transcription, one number at a time."""
    rng = np.random.default_rng(seed)
    p_max = 0.95
    tracker = PathTracker(
        temperature=temperature, offset_nats=nats, p_min=1e-4, p_max=p_max, compare=compare
    )
    prior = rng.uniform(1e-4, p_max, 20)
    before, after = rng.normal(size=(2, 20))
    got = tracker.log_posterior(tracker.update(tracker.init(prior), before, after, 10))
    for p, b, a, log_p in zip(prior, before, after, got, strict=True):
        linear = math.log(p) + temperature * (b + a) / 2
        if compare == "base":
            expected = min(max(linear + nats / 10, math.log(1e-4)), math.log(p_max))
        else:
            guess = min(math.exp(linear), p_max)  # p_max is below the weights' 0.99
            level = math.log(p / (1 - p)) + nats / 10
            level += temperature * (b / (1 - p) + a / (1 - guess)) / 2
            level = max(level, math.log(1e-4 / (1 - 1e-4)))
            expected = -math.log1p(math.exp(-level)) if level > -700 else level
        assert abs(log_p - expected) < 1e-12 * (1 + abs(expected))


def test_without_probes_it_is_the_tracker_of_transitions():
    c = NoiseSchedule.linear().respace(10).coefficients()
    for compare, kind in (("rest", LogOddsTracker), ("base", PaperTracker)):
        path = PathTracker(0.2, 0.7, 1.0, 1e-5, 0.9, compare, probes=0)
        transitions = kind(0.2, 0.7, offset_nats=1.0, p_min=1e-5, p_max=0.9)
        assert path.first_order == transitions
        assert tracker_of(DynamicNegativeGuidance(1.0, path), c) == transitions
        kept = replace(path, probes=2)
        assert tracker_of(DynamicNegativeGuidance(1.0, kept), c) == kept
    options = {"n": 50, "forbidden": [1], "record": ["tracked"]}
    schedule = NoiseSchedule.linear().respace(10)
    runs = [
        sample(FOUR_MODES, schedule, DynamicNegativeGuidance(1.0, tracker), **options)
        for tracker in (PathTracker(probes=0), LogOddsTracker())
    ]
    assert np.array_equal(runs[0].tracked, runs[1].tracked)
    assert np.array_equal(runs[0].x, runs[1].x)


def test_a_prediction_takes_the_odds_of_either_form():
    x = np.array([[-1.0], [0.5]])
    for compare in ("rest", "base"):
        rule = DynamicNegativeGuidance(1.0, PathTracker(compare=compare))
        found = predict(
            FOUR_MODES, x, 0.8, 0.6, rule, forbidden=[1], log_posterior=np.log([0.5, 0.2])
        )
        assert error(found.scale, np.array([[1.0, 0.25]])) < 1e-12


def test_the_usual_rule_in_one_line():
    made = DynamicNegativeGuidance.tracked(2.0, 0.1, 0.5, tracker="path", offset_nats=1.0, probes=3)
    assert made == DynamicNegativeGuidance(2.0, PathTracker(0.1, 0.5, 1.0, probes=3))
    for wrong in ({"offset": 1e-4}, {"variance": "small"}, {"probes": -1}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            DynamicNegativeGuidance.tracked(tracker="path", **wrong)
    with pytest.raises(ValueError, match="probes"):
        DynamicNegativeGuidance.tracked(tracker="log-odds", probes=2)


# ---------------------------------------------------------------- whole chains


def tracked_error(mixture, schedule, sampler, *, g=0.0, tracker=None, forbidden=(1,), n=2000):
    """Largest over the steps of the mean |tracked - exact| posterior, and the run."""
    rule = DynamicNegativeGuidance(g, PathTracker() if tracker is None else tracker)
    run = sample(
        mixture, schedule, rule, n=n, forbidden=list(forbidden), sampler=sampler,
        initial="exact", record=["tracked", "exact", "trajectory"],
    )  # fmt: skip
    gap = np.abs(np.exp(run.tracked[:-1]) - np.exp(run.exact[:-1]))
    return gap.mean(axis=(1, 2)).max(), run


def test_halving_a_deterministic_step_quarters_the_error():
    """Of the mean error at a common time; an uneven start (the prior) is taken out of it."""
    fine = NoiseSchedule.linear()
    errors = []
    for steps in (50, 100, 200, 400):
        schedule = fine.respace(steps)
        run = sample(
            FOUR_MODES, schedule, DynamicNegativeGuidance(0.0, PathTracker()), n=500,
            forbidden=[1], sampler=DDIM(0.0), record=["trajectory"],
        )  # fmt: skip
        c = schedule.coefficients(DDIM(0.0))
        total, previous = 0.0, None
        for i in range(len(c) // 2):
            point = run.trajectory[i], float(c.alpha_t[i]), float(c.sigma_t[i])
            if previous is not None:
                ends = path_ends(FOUR_MODES, *point, forbidden=[1], previous=previous)
                total = total + 0.5 * (ends[0] + ends[1])[0]
            previous = point
        start = run.trajectory[0], float(c.alpha_t[0]), float(c.sigma_t[0])
        exact = log_ratio(FOUR_MODES, *previous, [1]) - log_ratio(FOUR_MODES, *start, [1])
        errors.append(np.abs(total - exact).mean())
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert np.all((ratios > 3.2) & (ratios < 5.0)), ratios


@pytest.mark.parametrize("g", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("compare", ["rest", "base"])
def test_any_chain_has_its_posterior(compare, g):
    """Deterministic ones nearly exactly; with noise better than the tracker that knows the step."""
    tracker = PathTracker(compare=compare)
    for schedule in (
        NoiseSchedule.linear().respace(50),
        NoiseSchedule.variance_exploding(50, rho=7.0),
        NoiseSchedule.flow(50),
    ):
        for sampler in (DDIM(0.0), DDIM(0.4)):
            found, _ = tracked_error(FOUR_MODES, schedule, sampler, g=g, tracker=tracker)
            with pytest.warns(UserWarning, match="adds"):
                old, _ = tracked_error(
                    FOUR_MODES, schedule, sampler, g=g, tracker=tracker.first_order
                )
            assert found < 0.5 * old
            if sampler.eta == 0.0 and g == 0.0:
                assert found < 0.003
    mixture = moderate(4, "full", 5, 6)
    found, _ = tracked_error(mixture, NoiseSchedule.linear().respace(50), DDIM(0.0), g=g)
    assert found < 0.02
    for sampler in (DDPM(), DDPM("large")):
        schedule = NoiseSchedule.linear().respace(200)
        found, _ = tracked_error(FOUR_MODES, schedule, sampler, g=g, tracker=tracker)
        old, _ = tracked_error(FOUR_MODES, schedule, sampler, g=g, tracker=tracker.first_order)
        assert found < old


def test_ddpm_at_an_inner_mode_is_better_than_the_papers_tracker():
    """theory: .017 against .05 to .07 at 50 steps; a factor of two is asked for."""
    schedule = NoiseSchedule.linear().respace(50)
    found, _ = tracked_error(FOUR_MODES, schedule, DDPM())
    old, _ = tracked_error(FOUR_MODES, schedule, DDPM(), tracker=PaperTracker())
    assert found < 0.5 * old


def test_infinite_noise_is_a_point_of_the_path():
    """Flow matching starts at alpha = 0; a chain that starts near it keeps the prior's error."""
    found, run = tracked_error(FOUR_MODES, NoiseSchedule.flow(20), DDIM(0.0))
    assert error(run.tracked[0], np.full((1, 2000), math.log(0.25))) < 1e-12
    assert np.abs(np.exp(run.tracked[1]) - np.exp(run.exact[1])).mean() < 1e-4
    assert found < 0.005
    # Stable Diffusion's alpha_T = 0.068: the start takes off three quarters of the prior's error.
    _, run = tracked_error(FOUR_MODES, NoiseSchedule.scaled_linear().respace(50), DDIM(0.0))
    exact = np.exp(run.exact[0])
    assert np.abs(np.exp(run.tracked[0]) - exact).mean() < 0.25 * np.abs(0.25 - exact).mean()


@pytest.mark.parametrize("sampler", [EulerMaruyama(), ProbabilityFlow(), DDPM(), DDIM(0.0)])
def test_a_loop_of_ones_own_is_the_chain(sampler):
    """With points from the chain; a profile of temperatures and several concepts too."""
    mixture, forbidden = moderate(6, "full", 5, 2), [[0], [2, 3]]
    tracker = PathTracker(temperature=TimeProfile((0.1, 0.5), (0.4, 1.0)), offset_nats=0.5)
    schedule = NoiseSchedule.linear().respace(12)
    c = schedule.coefficients(sampler)
    for engine in ("fused", "reference"):
        chain = sample(
            mixture, schedule, DynamicNegativeGuidance(1.0, tracker), n=30, forbidden=forbidden,
            sampler=sampler, engine=engine, record=["trajectory", "tracked"],
        )  # fmt: skip
        state = tracker.init(np.array([[mixture.weights[part].sum()] * 30 for part in forbidden]))
        previous = None
        own = at_steps(tracker, c)
        for i in range(len(c)):
            point = chain.trajectory[i], float(c.alpha_t[i]), float(c.sigma_t[i])
            ends = path_ends(mixture, *point, forbidden=forbidden, previous=previous)
            of_step = own[max(i - 1, 0)]
            assert isinstance(of_step, PathTracker)
            state = of_step.update(state, *ends, len(c))
            assert error(tracker.log_posterior(state), chain.tracked[i]) < 1e-8
            previous = point
        assert error(chain.tracked[-1], chain.tracked[-2]) == 0.0


def test_schedules_that_begin_at_no_signal():
    """The cosine schedule's first alpha is 5e-5: in x/alpha alone the error would be 0.6."""
    for sampler, allowed in ((DDIM(0.0), 0.002), (DDPM(), 0.03)):
        schedule = NoiseSchedule.cosine().respace(50)
        assert schedule.alpha[-1] < 1e-4
        found, _ = tracked_error(FOUR_MODES, schedule, sampler)
        assert found < allowed


def test_large_odds_do_not_run_away():
    """With weights of up to 1/(1 - p_max) the error at 400 steps of DDPM was 0.035."""
    tracker = PathTracker(p_max=1.0 - 1e-6)
    found, _ = tracked_error(
        FOUR_MODES, NoiseSchedule.linear().respace(400), DDPM(), tracker=tracker
    )
    assert found < 0.006


def test_points_that_jump_are_tracked_too():
    """Noise that is added again, as LCM's, and an edit of a point: nothing is assumed of either."""
    rng = np.random.default_rng(0)
    schedule = NoiseSchedule.linear().respace(100)
    tracker, state, previous = PathTracker(), None, None
    x = FOUR_MODES.diffuse(float(schedule.alpha[-1]), float(schedule.sigma[-1])).sample(2000, rng)
    state = tracker.init(np.full((1, 2000), 0.25))
    worst = 0.0
    for i in range(100, 20, -1):
        alpha, sigma = float(schedule.alpha[i]), float(schedule.sigma[i])
        ends = path_ends(FOUR_MODES, x, alpha, sigma, forbidden=[1], previous=previous)
        state = tracker.update(state, *ends, 100)
        exact = np.exp(FOUR_MODES.diffuse(alpha, sigma).log_posterior(x, [1]))
        worst = max(worst, float(np.abs(np.exp(tracker.log_posterior(state))[0] - exact).mean()))
        previous = x, alpha, sigma
        x0 = FOUR_MODES.posterior_mean(x, alpha, sigma)
        noise = (x - alpha * x0) / sigma if i % 20 else rng.normal(size=x.shape)
        x = float(schedule.alpha[i - 1]) * x0 + float(schedule.sigma[i - 1]) * noise
        if i == 60:
            x = x + 0.3
    assert worst < 0.05


# ---------------------------------------------------------------- bad input


ZERO, PROFILE = np.zeros((1, 3)), TimeProfile((0.1,), (1.0,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PathTracker(compare="paper"), "compare.*'rest', 'base'.*paper"),
        (lambda: PathTracker(probes=-1), "probes.*-1"),
        (lambda: PathTracker(probes=1.5), "probes.*1.5"),
        (lambda: PathTracker(prior=1.0), "prior.*1.0"),
        (lambda: PathTracker(prior=0.995, compare="base"), "prior.*p_max"),
        (lambda: PathTracker(temperature=-1.0), "temperature.*-1"),
        (lambda: PathTracker(offset_nats=float("nan")), "offset_nats"),
        (lambda: PathTracker().update(ZERO, ZERO[0], ZERO, 5), "before must have the shape"),
        (lambda: PathTracker().update(ZERO, ZERO, ZERO + np.nan, 5), "after.*nan"),
        (lambda: PathTracker().update(ZERO, ZERO, ZERO, 0), "steps.*0"),
        (
            lambda: PathTracker(temperature=TimeProfile((0.1,), (1.0,))).update(
                ZERO, ZERO, ZERO, 5
            ),
            "temperature must be a number",
        ),
        (
            lambda: path_ends(FOUR_MODES, [[0.0]], 0.5, 0.5, forbidden=[1], previous=[0.0]),
            "previous must be",
        ),
        (
            lambda: path_ends(
                FOUR_MODES, [[0.0]], 0.5, 0.5, forbidden=[1], previous=([[0.0]], 0.9, 0.1)
            ),
            "previous must not have less noise",
        ),
        (
            lambda: path_ends(
                FOUR_MODES, [[0.0]], 0.5, 0.5, forbidden=[1], previous=([[0.0]] * 2, 0.1, 0.9)
            ),
            "previous must have x of shape",
        ),
        (lambda: path_ends(FOUR_MODES, [[0.0]], 0.5, 0.0, forbidden=[1]), "sigma.*0"),
        (
            lambda: path_ends(
                FOUR_MODES, [[0.0]], 0.0, 1.0, forbidden=[1], previous=([[0.0]], 0.0, 1.0)
            ),
            "alpha must be > 0 after",
        ),
        (lambda: path_ends(FOUR_MODES, [[0.0]], 0.5, 0.5, forbidden=None), "forbidden"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
