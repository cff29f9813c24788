"""Feynman-Kac weights: with them DNG at any scale samples its target; docs/theory.md, section 7."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    EulerMaruyama,
    FeynmanKac,
    GaussianMixture,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    guided_density,
    sample,
)
from dng_math.distances import wasserstein1
from dng_math.weights import Population, effective_sample_size, systematic
from tests.helpers.mixtures import mixtures, moderate
from tests.helpers.statistical import assert_mean_close, mean_bound
from tests.helpers.tolerances import CHAIN, error

DNG = DynamicNegativeGuidance
FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)
LINEAR = NoiseSchedule.linear()
seeds = st.integers(0, 2**32 - 1)

RULES = {
    "exact": DNG(2.0),
    "exact, below 1": DNG(0.5),
    "paper": DNG(2.0, PaperTracker()),
    "log-odds": DNG(1.5, LogOddsTracker(prior=0.3)),
    "path": DNG(2.0, PathTracker()),
    "interval": LimitedInterval(DNG(2.0), 0.1, 0.8),
}
SETTINGS = {
    "half": FeynmanKac(),
    "always": FeynmanKac(1.0),
    "never": FeynmanKac(0.0),
    "bounded": FeynmanKac(1.0, 1.0),
}


# ---------------------------------------------------------------- two engines, one population


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.thinned(3)
def test_fused_engine_is_the_reference_with_weights(rule, settings):
    for kind, sampler in (("spherical", DDPM()), ("full", DDPM("large")), ("diagonal", DDIM(1.0))):
        mixture = moderate(3, kind, 4, 2)
        fused, reference = (
            sample(
                mixture, LINEAR.respace(20), rule, n=300, forbidden=[1], first_sample=100,
                sampler=sampler, engine=engine, weights=settings, record=["trajectory", "exact"],
            )
            for engine in ("fused", "reference")
        )  # fmt: skip
        for name in ("trajectory", "exact", "log_weights", "log_posterior"):
            left, right = getattr(fused, name), getattr(reference, name)
            assert left is right is None or error(left, right) < CHAIN, name
        assert error(fused.ess, reference.ess) < CHAIN
        assert fused.ess.shape == (21,) and fused.log_weights.shape == (300,)


@pytest.mark.parametrize("rule", ["exact", "log-odds", "path"])
def test_a_population_does_not_depend_on_threads(rule):
    """A function of seed, n and step alone; alone, its samples depend on the others."""
    run = (moderate(1, "spherical", 3, 3), LINEAR.respace(12), RULES[rule])
    options = {"forbidden": [0], "seed": 5, "weights": FeynmanKac(1.0)}
    one, several = (sample(*run, n=5000, threads=threads, **options) for threads in (1, 3))
    assert one.x.tobytes() == several.x.tobytes()
    assert one.log_weights.tobytes() == several.log_weights.tobytes()
    assert np.array_equal(one.ess, several.ess)
    fewer = sample(*run, n=700, **options)
    assert not np.array_equal(fewer.x, one.x[:700])
    unweighed = sample(*run, n=700, forbidden=[0], seed=5, weights=FeynmanKac(0.0)).x
    assert not np.array_equal(fewer.x, unweighed)


def test_without_resampling_a_sample_has_the_same_bits_in_any_batch():
    run = (moderate(1, "spherical", 3, 3), LINEAR.respace(12), DNG(2.0))
    options = {"forbidden": [0], "seed": 5, "weights": FeynmanKac(0.0)}
    whole = sample(*run, n=700, **options)
    part = sample(*run, n=20, first_sample=600, threads=1, **options)
    assert part.x.tobytes() == whole.x[600:620].tobytes()
    assert part.log_weights.tobytes() == whole.log_weights[600:620].tobytes()


def test_no_samples_have_no_weights():
    result = sample(FOUR_MODES, LINEAR.respace(4), DNG(2.0), n=0, forbidden=[1],
                    weights=FeynmanKac())  # fmt: skip
    assert result.log_weights.shape == (0,) and np.array_equal(result.ess, np.zeros(5))


# ---------------------------------------------------------------- the weights themselves


def log_normal(x, mean, variance):
    return -0.5 * np.sum((x - mean) ** 2, axis=-1) / variance


@settings(max_examples=25)
@given(mixtures(max_dim=3), seeds, st.floats(-0.5, 3.0), st.sampled_from(["exact", "log-odds"]))
def test_weights_are_the_ratio_of_two_laws(mixture, seed, g, posterior):
    """log w = g log(1 - p) at the end, plus that of both laws of every step, from its means."""
    rule = DNG(g) if posterior == "exact" else DNG(g, LogOddsTracker())
    c = LINEAR.respace(6).coefficients()
    chain = sample(
        mixture, LINEAR.respace(6), rule, n=5, forbidden=[0], seed=seed,
        weights=FeynmanKac(0.0), record=["trajectory", "scale"],
    )  # fmt: skip
    log_w = np.zeros(5)
    x = chain.trajectory
    for i in range(5):  # the last step has no noise, and is taken unguided
        at = x[i], float(c.alpha_t[i]), float(c.sigma_t[i])
        base, negative = mixture.posterior_mean(*at), mixture.restrict([0]).posterior_mean(*at)
        guided = base - chain.scale[i, 0][:, None] * (negative - base)
        means = [c.x_factor[i] * x[i] + c.x0_factor[i] * x0 for x0 in (base, guided)]
        free, pushed = (log_normal(x[i + 1], mean, c.step_var[i]) for mean in means)
        log_w += free - pushed
    if posterior == "exact":
        log_w += g * mixture.log_posterior(chain.x, [0], complement=True)
    else:
        odds = np.minimum(np.exp(chain.log_posterior[0]), 0.99)
        log_w += g * np.log1p(-odds)
    assert np.all(chain.scale[-1] == 0)
    size = 1 + np.abs(log_w) + np.max(chain.scale) ** 2
    assert np.all(np.abs(chain.log_weights - log_w) < 1e-8 * size)


@given(st.lists(st.floats(-30, 5), min_size=1, max_size=50), st.floats(1e-9, 1 - 1e-9))
def test_systematic_resampling_keeps_the_shares(log_weights, u):
    """Every sample has n w descendants, rounded up or down."""
    log_weights = np.array(log_weights)
    weights = np.exp(log_weights - log_weights.max())
    expected = len(weights) * weights / weights.sum()
    counts = np.bincount(systematic(log_weights, u), minlength=len(weights))
    assert counts.sum() == len(weights)
    assert np.all(np.abs(counts - expected) < 1 + 1e-9)


@given(st.lists(st.floats(-30, 5), min_size=1, max_size=50), st.floats(-500, 500))
def test_effective_sample_size(log_weights, shift):
    log_weights = np.array(log_weights)
    size = effective_sample_size(log_weights)
    assert 1 - 1e-12 <= size <= len(log_weights) * (1 + 1e-12)
    assert error(effective_sample_size(log_weights + shift), size) < 1e-9
    assert error(effective_sample_size(np.full(7, shift)), 7) < 1e-12


def test_a_bound_of_the_increments_holds():
    """No sample gains more than the bound above the mean of a step."""
    population = Population(FeynmanKac(0.0, 0.5), np.array([0.0, 1.0, 0.0]), 0)
    ratio, level = np.array([0.0, 4.0, 1.0]), np.array([0.0, 2.0, 0.0])
    assert population.advance(0, ratio, level, last=False) is None
    assert error(population.log_weights, [0.0, 1.0 + 2.5, 1.0]) < 1e-14
    options = {"n": 2000, "forbidden": [1], "seed": 1}
    schedule = LINEAR.respace(10)
    free = sample(FOUR_MODES, schedule, DNG(3.0), weights=FeynmanKac(0.0), **options)
    bound = sample(FOUR_MODES, schedule, DNG(3.0), weights=FeynmanKac(0.0, 0.05), **options)
    assert np.array_equal(free.x, bound.x)
    assert bound.ess[-1] > 2 * free.ess[-1]


# ---------------------------------------------------------------- what they are for


def test_few_steps_are_exact_too():
    """E[w phi] under guidance is E[(1 - p)^g phi] without, at ten steps, for bounded functions.

    docs/theory.md, section 7.1: an identity of chains, whose ends are not yet the mixture.  Two
    independent means of 80,000 each, at a false-alarm rate of 1e-6 for all four functions by the
    central limit theorem: no weight is more than a thousandth of all.
    """
    g, n, schedule = 0.5, 80_000, LINEAR.respace(10)
    options = {"n": n, "forbidden": [1]}
    guided = sample(FOUR_MODES, schedule, DNG(g), seed=1, weights=FeynmanKac(0.0), **options)
    free = sample(FOUR_MODES, schedule, seed=2, **options)
    weight = np.exp(guided.log_weights)
    assert weight.max() < 1e-3 * weight.sum()
    target = np.exp(g * FOUR_MODES.log_posterior(free.x, [1], complement=True))
    for phi in (np.ones_like, lambda x: x > 2.0, lambda x: x < -2.0, np.sin):
        left, right = weight * phi(guided.x[:, 0]), target * phi(free.x[:, 0])
        deviation = np.sqrt(left.var(ddof=1) + right.var(ddof=1))
        assert_mean_close(left[:, None], right.mean(), std=deviation, alpha=2.5e-7)


@pytest.mark.parametrize("posterior", ["exact", "tracked"])
@pytest.mark.parametrize("resample_below", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("g", [0.5, 2.0])
@pytest.mark.thinned(3)
def test_weighted_shares_are_those_of_the_target(g, resample_below, posterior):
    """The far mode of 20,000 chains of 200 steps, through the least effective sample size.

    False-alarm rate 1e-6 by Hoeffding's inequality for that many independent samples, which
    resampled ones are not quite; without weights the share is wrong by more than twice the bound.
    The tracked posterior is wrong by a little, which gets 0.02.
    """
    n, schedule = 20_000, LINEAR.respace(200)
    target = guided_density(FOUR_MODES, [1], g).mass(2.0, 10.0)
    rule = DNG(g) if posterior == "exact" else DNG(g, LogOddsTracker())
    options = {"n": n, "forbidden": [1], "seed": 4}
    plain = np.mean(sample(FOUR_MODES, schedule, rule, **options).x[:, 0] > 2.0)
    result = sample(FOUR_MODES, schedule, rule, weights=FeynmanKac(resample_below), **options)
    weight = np.exp(result.log_weights - result.log_weights.max())
    share = weight @ (result.x[:, 0] > 2.0) / weight.sum()
    bound = mean_bound(int(result.ess.min()), value_range=1.0)
    assert abs(share - target) < bound + (0.02 if posterior == "tracked" else 0.0)
    if posterior == "exact":
        assert abs(plain - target) > 2 * mean_bound(n, value_range=1.0)
        assert abs(share - target) < abs(plain - target)


def test_a_scale_of_three_puts_its_mass_where_it_belongs():
    """Measured by others of 20,000 chains: .49 on the far mode without weights, .33 with."""
    n, target = 20_000, guided_density(FOUR_MODES, [1], 3.0).mass(2.0, 10.0)
    options = {"n": n, "forbidden": [1]}
    schedule = LINEAR.respace(100)
    plain = np.mean(sample(FOUR_MODES, schedule, DNG(3.0), **options).x[:, 0] > 2.0)
    assert abs(plain - 0.49) < 2 * mean_bound(n, value_range=1.0)
    result = sample(FOUR_MODES, schedule, DNG(3.0), weights=FeynmanKac(), **options)
    weight = np.exp(result.log_weights)
    share = weight @ (result.x[:, 0] > 2.0) / weight.sum()
    assert abs(target - 0.33) < 0.01
    assert abs(share - target) < mean_bound(int(result.ess.min()), value_range=1.0)
    assert result.ess.min() > 0.3 * n


# W1 to the exact target without and with weights, 20,000 chains of seed 0, by steps and g.
DISTANCES = {
    (100, 0.5): (0.205, 0.036), (100, 2.0): (0.336, 0.084), (100, 3.0): (0.621, 0.125),
    (1000, 0.5): (0.178, 0.041), (1000, 2.0): (0.347, 0.045), (1000, 3.0): (0.631, 0.132),
}  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "g"),
    [pytest.param(*at, marks=pytest.mark.slow if at[0] > 100 else ()) for at in DISTANCES],
)
def test_distances_with_weights_are_those_told(steps, g):
    """The numbers of docs/theory.md, section 7.3; of one seed, so that rounding is all that moves.

    A sample that rounding puts elsewhere moves W1 by 1e-4 of its way.
    """
    n, schedule, target = 20_000, LINEAR.respace(steps), guided_density(FOUR_MODES, [1], g)
    plain = sample(FOUR_MODES, schedule, DNG(g), n=n, forbidden=[1]).x[:, 0]
    result = sample(FOUR_MODES, schedule, DNG(g), n=n, forbidden=[1], weights=FeynmanKac())
    drawn = result.x[systematic(result.log_weights, 0.5), 0]
    without, with_weights = DISTANCES[steps, g]
    assert abs(wasserstein1(plain, target) - without) < 0.002
    assert abs(wasserstein1(drawn, target) - with_weights) < 0.01
    assert with_weights < 0.3 * without


def test_at_one_every_weight_tends_to_the_allowed_share():
    """Exact DNG at g = 1 samples its target, so that in the limit of short steps w = 1 - p(c)."""
    spread = []
    for steps in (50, 200, 800):
        result = sample(FOUR_MODES, LINEAR.respace(steps), DNG(1.0), n=4000, forbidden=[1],
                        weights=FeynmanKac(0.0))  # fmt: skip
        spread.append(np.std(result.log_weights))
    assert spread[0] > spread[1] > spread[2]
    assert abs(np.mean(result.log_weights) - np.log(0.75)) < 0.05


# ---------------------------------------------------------------- bad input

BAD = [
    ({"weights": 0.5}, TypeError, "weights must be a FeynmanKac, got 0.5"),
    ({"weights": FeynmanKac}, TypeError, "weights must be a FeynmanKac"),
    ({"rule": NegativePrompting()}, ValueError, "weights must be None unless.*NegativePrompting"),
    ({"rule": None, "forbidden": None}, ValueError, "weights must be None unless.*Unguided"),
    ({"sampler": DDIM(0.0)}, ValueError, "weights must be None for a sampler.*got one with 3"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_weights_are_for_noisy_chains_with_a_posterior(change, kind, message):
    options = {"rule": DNG(2.0), "n": 3, "forbidden": [1], "weights": FeynmanKac(), **change}
    with pytest.raises(kind, match=message):
        sample(FOUR_MODES, LINEAR.respace(4), options.pop("rule"), **options)
    for enough in (DDPM("large"), DDIM(0.3), EulerMaruyama()):
        sample(FOUR_MODES, LINEAR.respace(4), DNG(2.0), n=3, forbidden=[1], sampler=enough,
               weights=FeynmanKac())  # fmt: skip
