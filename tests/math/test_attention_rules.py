"""NAG, VSF and NASA on exact mixtures, where their attention is the posterior mean of x0."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dng_math import (
    DynamicNegativeGuidance,
    GaussianMixture,
    LimitedInterval,
    NegativeAwareSubtraction,
    NegativePrompting,
    NoiseSchedule,
    NormalizedAttention,
    PathTracker,
    Unguided,
    ValueSignFlip,
    predict,
    sample,
)
from tests.helpers.mixtures import moderate, points
from tests.helpers.tolerances import WHOLE_CHAIN, error

FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)
SCHEDULE = NoiseSchedule.linear().respace(12)
# A few roundings of numbers up to a hundred.
ROUNDING = 1e-13

seeds = st.integers(0, 2**32 - 1)
levels = st.floats(0.05, 0.99)
strengths = st.floats(0.0, 5.0)


def world(seed: int) -> tuple[GaussianMixture, np.ndarray, list[int]]:
    """A mixture in three dimensions, points, and its forbidden components."""
    mixture = moderate(seed, "spherical", 5, 3)
    return mixture, points(mixture, seed), [0, 3]


def parts(
    mixture: GaussianMixture, x: np.ndarray, alpha: float, sigma: float, forbidden: list[int]
) -> tuple[np.ndarray, ...]:
    """x0 of the whole, of the forbidden and of the rest, and p(forbidden | x), shape (N, 1)."""
    rest = np.setdiff1d(np.arange(mixture.n_components), forbidden)
    noisy = mixture.diffuse(alpha, sigma)
    posterior = np.exp(noisy.log_posterior(x, np.array(forbidden)))[:, None]
    whole, bad, good = (
        part.posterior_mean(x, alpha, sigma)
        for part in (mixture, mixture.restrict(forbidden), mixture.restrict(rest))
    )
    return whole, bad, good, posterior


def guided(mixture, x, alpha, rule, forbidden, **options) -> np.ndarray:
    """The guided prediction of x0."""
    options = {"prediction_type": "sample", **options}
    sigma = math.sqrt(1.0 - alpha**2)
    return predict(mixture, x, alpha, sigma, rule, forbidden=forbidden, **options).guided


# ---------------------------------------------------------------------- closed forms


@given(seeds, levels, strengths)
def test_without_a_limit_nag_is_negative_prompting(seed: int, alpha: float, phi: float) -> None:
    mixture, x, forbidden = world(seed)
    found = guided(mixture, x, alpha, NormalizedAttention(phi, tau=math.inf, alpha=1.0), forbidden)
    expected = guided(mixture, x, alpha, NegativePrompting(phi), forbidden)
    assert error(found, expected) < ROUNDING


@given(seeds, levels, strengths, st.floats(1.0, 4.0), st.floats(0.0, 1.0))
def test_nag_in_a_textbooks_words(
    seed: int, alpha: float, phi: float, tau: float, share: float
) -> None:
    mixture, x, forbidden = world(seed)
    whole, bad, _, _ = parts(mixture, x, alpha, math.sqrt(1.0 - alpha**2), forbidden)
    expected = []
    for plus, minus in zip(whole, bad, strict=True):
        pushed = plus + phi * (plus - minus)
        ratio = np.linalg.norm(pushed, 1) / np.linalg.norm(plus, 1)
        expected.append(share * pushed * min(ratio, tau) / ratio + (1 - share) * plus)
    found = guided(mixture, x, alpha, NormalizedAttention(phi, tau, share), forbidden)
    assert error(found, expected) < ROUNDING


@given(seeds, levels, strengths)
def test_vsf_and_nasa_in_closed_form(seed: int, alpha: float, scale: float) -> None:
    mixture, x, forbidden = world(seed)
    whole, bad, good, p = parts(mixture, x, alpha, math.sqrt(1.0 - alpha**2), forbidden)
    found = guided(mixture, x, alpha, ValueSignFlip(scale), forbidden)
    assert error(found, (1.0 - p) * good - scale * p * bad) < ROUNDING
    found = guided(mixture, x, alpha, NegativeAwareSubtraction(scale), forbidden)
    assert error(found, whole - scale * bad) < ROUNDING


@pytest.mark.parametrize(
    "rule",
    [
        NormalizedAttention(0.0),
        NormalizedAttention(0.0, tau=1.0, alpha=1.0),
        NormalizedAttention(3.0, alpha=0.0),
        NegativeAwareSubtraction(0.0),
        NormalizedAttention(3.0, end=0.0),
        NormalizedAttention(3.0, gate=DynamicNegativeGuidance(0.0)),
        ValueSignFlip(3.0, gate=DynamicNegativeGuidance(1.0), gate_bound=1.0),
    ],
)
def test_no_strength_changes_no_bit(rule) -> None:
    # Of so few samples none is certain to be forbidden, at which the last gate would open.
    run = {"n": 20, "forbidden": [1], "engine": "reference", "seed": 4}
    found = sample(FOUR_MODES, SCHEDULE, rule, **run)
    assert np.array_equal(found.x, sample(FOUR_MODES, SCHEDULE, None, **run).x)


@given(seeds, levels, st.sampled_from(["epsilon", "v_prediction", "flow_prediction", "score"]))
def test_the_type_of_the_predictions_does_not_matter(seed: int, alpha: float, kind: str) -> None:
    mixture, x, forbidden = world(seed)
    sigma = math.sqrt(1.0 - alpha**2)
    of_eps, of_x0 = {
        "epsilon": (1.0, 0.0),
        "v_prediction": (alpha, -sigma),
        "flow_prediction": (1.0, -1.0),
        "score": (-1.0 / sigma, 0.0),
    }[kind]
    for rule in (NormalizedAttention(2.0), ValueSignFlip(1.5), NegativeAwareSubtraction(0.5)):
        x0 = guided(mixture, x, alpha, rule, forbidden)
        found = guided(mixture, x, alpha, rule, forbidden, prediction_type=kind)
        eps = (x - alpha * x0) / sigma
        # x0 is recovered by a division by alpha.
        assert error(found, of_eps * eps + of_x0 * x0) < 1e-10 / alpha**2


@given(seeds, levels, st.floats(-1.0, 4.0))
def test_classifier_free_guidance_takes_the_guided_positive(
    seed: int, alpha: float, w: float
) -> None:
    mixture, x, forbidden = world(seed)
    sigma = math.sqrt(1.0 - alpha**2)
    rule = NormalizedAttention(2.0, 1.5, 0.7)
    u = mixture.posterior_mean(x, alpha, sigma)
    c = mixture.restrict([0, 1, 3]).posterior_mean(x, alpha, sigma)
    n = mixture.restrict(forbidden).posterior_mean(x, alpha, sigma)
    found = guided(mixture, x, alpha, rule, forbidden, positive=[0, 1, 3], cfg_scale=w)
    assert error(found, u + w * (rule.features(c, n) - u)) < ROUNDING


# ---------------------------------------------------------------------- features


@given(seeds, strengths, st.floats(1.0, 4.0))
def test_the_norm_stays_within_its_limit_token_by_token(seed: int, phi: float, tau: float) -> None:
    rng = np.random.default_rng(seed)
    plus, minus = rng.normal(size=(2, 3, 4, 6))
    plus[0, 0] = 0.0
    minus[1, 1] = plus[1, 1]
    rule = NormalizedAttention(phi, tau, alpha=1.0)
    found = rule.features(plus, minus)
    assert np.all(abs(found).sum(-1) <= tau * abs(plus).sum(-1) * (1.0 + 1e-12))
    assert np.isfinite(found).all()
    each = [[rule.features(plus[i, j], minus[i, j]) for j in range(4)] for i in range(3)]
    assert np.array_equal(found, each)
    assert error(found[1, 1], plus[1, 1]) < ROUNDING


def test_where_the_rule_acts() -> None:
    mixture, x, forbidden = world(3)
    rule = NormalizedAttention(2.0)
    ends = NormalizedAttention(2.0, end=0.6)
    plain, pushed = (guided(mixture, x, 0.5, r, forbidden) for r in (Unguided(), rule))
    for time, acts in ((1.0, True), (0.4, True), (0.39, False)):
        expected = pushed if acts else plain
        for limited in (ends, LimitedInterval(rule, 0.4, 1.0)):
            assert np.array_equal(guided(mixture, x, 0.5, limited, forbidden, time=time), expected)
    with pytest.raises(ValueError, match="time must be given for"):
        guided(mixture, x, 0.5, ends, forbidden)


# ---------------------------------------------------------------------- gates


@given(seeds, levels, st.floats(0.0, 3.0), st.floats(0.0, 1.0))
def test_a_gate_opens_by_the_posterior(seed: int, alpha: float, g: float, bound: float) -> None:
    mixture, x, forbidden = world(seed)
    whole, _, _, p = parts(mixture, x, alpha, math.sqrt(1.0 - alpha**2), forbidden)
    opening = np.minimum(1.0, g * p)
    near = np.abs(opening - bound) < 1e-9
    opening = np.where(opening >= bound, opening, 0.0)
    for make in (NormalizedAttention, NegativeAwareSubtraction, ValueSignFlip):
        open_always = guided(mixture, x, alpha, make(1.5), forbidden)
        expected = whole + opening * (open_always - whole)
        exact = make(1.5, gate=DynamicNegativeGuidance(g), gate_bound=bound)
        found = guided(mixture, x, alpha, exact, forbidden)
        assert error(np.where(near, 0.0, found), np.where(near, 0.0, expected)) < 1e-11
        tracked = make(
            1.5,
            gate=DynamicNegativeGuidance.tracked(g, p_min=1e-12, p_max=1.0 - 1e-9),
            gate_bound=bound,
        )
        told = {"log_posterior": np.log(np.clip(p.T, 1e-12, 1.0 - 1e-9))}
        found = guided(mixture, x, alpha, tracked, forbidden, **told)
        assert error(np.where(near, 0.0, found), np.where(near, 0.0, expected)) < 1e-7


@pytest.mark.parametrize("tracker", ["paper", "log-odds", "path"])
def test_a_gate_tracks_as_dng_does(tracker: str) -> None:
    # A gate that never opens, and DNG that never pushes, follow the posterior of the same samples.
    gate = DynamicNegativeGuidance.tracked(0.0, prior=0.25, tracker=tracker)
    run = {"n": 20, "forbidden": [1], "engine": "reference", "record": ["tracked", "scale"]}
    dng = sample(FOUR_MODES, SCHEDULE, gate, **run)
    nag = sample(FOUR_MODES, SCHEDULE, NormalizedAttention(4.0, gate=gate), **run)
    assert error(nag.tracked, dng.tracked) < WHOLE_CHAIN
    opened = NormalizedAttention(
        4.0, gate=DynamicNegativeGuidance.tracked(1.0, prior=0.25, tracker=tracker)
    )
    found = sample(FOUR_MODES, SCHEDULE, opened, **run)
    # What is used is capped at p_max, as in DNG's scale.
    used = np.minimum(np.exp(found.tracked[:-1]), 0.99)
    assert error(found.scale, 0.5 * used) < WHOLE_CHAIN


def test_what_each_does_with_four_modes() -> None:
    """Shares of 1,000 samples against those of 20,000 with another seed.

    Six deviations are passed once in 5e8 comparisons; where an event is rare, the deviation is
    that of one in a hundred, and more than 28 in place of 9 come once in 1e7.
    """
    run = {"n": 1000, "forbidden": [1], "engine": "reference", "seed": 7}
    steps = NoiseSchedule.linear().respace(100)

    def shares(rule) -> tuple[float, float]:
        """What is left of the forbidden mode, and what leaves the data."""
        x = sample(FOUR_MODES, steps, rule, **run).x
        near = np.abs(x - FOUR_MODES.means.T)
        return float((near[:, 1] < 1.0).mean()), float((near.min(-1) > 1.6).mean())

    expected = {
        NormalizedAttention(4.0, alpha=0.25): (0.0817, 0.6133),
        NormalizedAttention(1.0, alpha=0.5): (0.0893, 0.3787),
        ValueSignFlip(0.0): (0.0568, 0.0),
        ValueSignFlip(1.5): (0.0, 0.0),
        # Gated by the exact posterior nothing leaves the data, even where all is pushed far.
        NormalizedAttention(8.0, alpha=1.0, gate=DynamicNegativeGuidance(1.0)): (0.0089, 0.0),
    }
    for rule, values in expected.items():
        for found, value in zip(shares(rule), values, strict=True):
            deviation = math.sqrt(max(value, 0.01) * (1.0 - value) * (1 / 1000 + 1 / 20000))
            assert abs(found - value) < 6.0 * deviation


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: NormalizedAttention(math.nan), ValueError, "scale must be finite"),
        (lambda: NormalizedAttention(1.0, tau=0.9), ValueError, "tau must be >= 1, or infinite"),
        (lambda: NormalizedAttention(1.0, tau=-math.inf), ValueError, "tau must be >= 1"),
        (lambda: NormalizedAttention(1.0, tau="2"), TypeError, "tau must be a real number"),
        (lambda: NormalizedAttention(1.0, alpha=1.1), ValueError, r"alpha must be in \[0, 1\]"),
        (lambda: NormalizedAttention(1.0, alpha=-0.1), ValueError, r"alpha must be in \[0, 1\]"),
        (lambda: NormalizedAttention(1.0, end=2.0), ValueError, r"end must be in \[0, 1\]"),
        (lambda: ValueSignFlip("1"), TypeError, "scale must be a real number"),
        (lambda: NegativeAwareSubtraction(math.inf), ValueError, "scale must be finite"),
        (lambda: ValueSignFlip(gate=PathTracker()), TypeError, "gate must be a Dynamic"),
        (lambda: ValueSignFlip(gate_bound=0.5), ValueError, "gate_bound must be 0 without a gate"),
        (
            lambda: NormalizedAttention(gate=DynamicNegativeGuidance(), gate_bound=1.5),
            ValueError,
            r"gate_bound must be in \[0, 1\]",
        ),
    ],
)
def test_hyperparameters_out_of_range(make, error_type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        make()


def test_runs_that_cannot_be() -> None:
    run = {"n": 2, "forbidden": [1]}
    with pytest.raises(TypeError, match=r"got NormalizedAttention.*engine='reference' runs any"):
        sample(FOUR_MODES, SCHEDULE, NormalizedAttention(), **run)
    with pytest.raises(ValueError, match="cfg_scale must be None for ValueSignFlip"):
        sample(
            FOUR_MODES,
            SCHEDULE,
            ValueSignFlip(1.0),
            cfg_scale=2.0,
            positive=[0],
            engine="reference",
            **run,
        )
    gated = NormalizedAttention(gate=DynamicNegativeGuidance())
    with pytest.raises(ValueError, match="forbidden must lie within positive"):
        sample(FOUR_MODES, SCHEDULE, gated, cfg_scale=2.0, positive=[0, 2], **run)
    with pytest.raises(ValueError, match="forbidden must be one concept for NormalizedAttention"):
        sample(FOUR_MODES, SCHEDULE, NormalizedAttention(), n=2, forbidden=[[0], [1]])
