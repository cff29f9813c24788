"""The published neighbours of DNG: each against its transcription, its identities and its numbers.

Predictions are made of the noise here, as in the papers; that a rule reads the same for every kind
of prediction is checked on mixtures.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dng_math import (
    CRG,
    DDIM,
    DDPM,
    SPELL,
    CFGPlusPlus,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GaussianMixture,
    GeoGuide,
    ImageReferenced,
    NegativePrompting,
    NoiseSchedule,
    SafeLatentDiffusion,
    SignedNegative,
    Unguided,
    equations,
    predict,
    sample,
)
from dng_math.rules import Predictions, StepNumbers
from tests.helpers import textbook
from tests.helpers.mixtures import KINDS, mixtures, moderate, points
from tests.helpers.tolerances import CHAIN, error

seeds = st.integers(0, 2**32 - 1)
SCHEDULE = NoiseSchedule.linear().respace(20)
COEFFICIENTS = SCHEDULE.coefficients()
FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)


def predictions(seed, w=None, reference="positive", step=7, **changes):
    """Noise predictions of five samples in three dimensions; with CFG of scale w beneath."""
    null, positive, negative = np.random.default_rng(seed).normal(size=(3, 5, 3))
    fields = {
        "base": null if w is None else textbook.cfg_beneath(null, positive, w),
        "negative": negative[None],
        "positive": positive,
        "rest": None,
        "log_ratio": None,
        "odds": None,
        "to_noise": 1.0,
        "step": step,
        "time": 0.5,
        "numbers": StepNumbers.of(COEFFICIENTS, step),
        "from_x0": -float(COEFFICIENTS.alpha_t[step] / COEFFICIENTS.sigma_t[step]),
        "noise_ratio": 1.3,
    }
    if w is not None:
        fields |= {"unconditional": null, "cfg_scale": w}
        fields["reference"] = positive if reference == "positive" else null
    return Predictions(**{**fields, **changes}), null, positive, negative


# ---------------------------------------------------------------- feedback guidance


def karras(steps=50, rho=7.0):
    """Stable Diffusion's noise levels on a Karras grid, with the times at which it trained them."""
    trained = NoiseSchedule.scaled_linear(1000)
    levels = trained.sigma[1:] / trained.alpha[1:]
    ends = levels[[0, -1]] ** (1 / rho)
    grid = np.append(0.0, np.linspace(*ends, steps) ** rho)
    time = np.append(0.0, np.interp(np.log(grid[1:]), np.log(levels), np.arange(1, 1001) / 1000))
    time[-1] = 1.0
    scale = np.sqrt(1 + grid**2)
    return NoiseSchedule(1 / scale, grid / scale, time=time).coefficients()


def temperatures_of(c):
    """The temperature that the paper's settings give, and that of t1 read as a diffusion time."""
    rule = FeedbackGuidance.published()
    tracker, small = rule.tracker(c), c.tracker_variance("small")
    at_time = np.interp(rule.t1, c.time[::-1], small[::-1])
    return tracker.temperature, textbook.fbg_temperature(at_time, tracker.step_offset)


def test_feedback_counts_its_times_in_steps():
    """On a Karras grid t1 as a diffusion time would give 1.43 times the temperature."""
    by_steps, by_time = temperatures_of(karras())
    assert abs(by_steps - 0.00491) < 0.5e-5 and abs(by_time - 0.00702) < 0.5e-5
    by_steps, by_time = temperatures_of(NoiseSchedule.linear().coefficients())
    assert 0.0 < abs(by_steps / by_time - 1.0) < 0.003  # one step of a thousand


def test_published_settings_of_feedback_guidance():
    plain, hybrid = FeedbackGuidance.published(), FeedbackGuidance.published(hybrid=True)
    for rule in (plain, hybrid):
        assert (rule.pi, rule.lambda_max, rule.t0) == (0.999, 10.0, 0.556)
        assert (rule.lambda_ref, rule.log_ratio_max) == (3.0, 3.0)
    assert (plain.t1, plain.cfg_scale) == (0.429, 1.0)
    assert (hybrid.t1, hybrid.cfg_scale) == (0.492, 2.6)
    assert (hybrid.sigma_lo, hybrid.sigma_hi) == (0.48, 6.84)


@given(seeds, st.floats(1.0, 6.0), st.floats(0.2, 2.0))
def test_hybrid_feedback_is_the_textbook(seed, c, sigma):
    """lambda + c - 1, always or inside a window; lambda_max bounds what is used."""
    log_ratio = np.random.default_rng(seed).uniform(-2.0, 3.0, 5)
    for rule, inside in (
        (FeedbackGuidance(0.9, 8.0, cfg_scale=c), True),
        (
            FeedbackGuidance(0.9, 8.0, cfg_scale=c, sigma_lo=0.48, sigma_hi=1.5),
            0.48 <= sigma <= 1.5,
        ),
    ):
        floor = np.log((1 - 0.9) * (8.0 - c + 1) / (8.0 - c))
        tracker = rule.tracker(COEFFICIENTS)
        assert error(tracker.low, floor) < 1e-14
        tracked = np.clip(log_ratio, floor, 3.0)
        p, null, positive, _ = predictions(seed, noise_ratio=sigma, odds=np.exp(tracked)[None])
        guided, scale, _ = rule.guide(p, None)
        wanted = textbook.fbg_scale(tracked, 0.9) + inside * (c - 1)
        assert error(scale[0], wanted) < 1e-13
        assert error(guided, null + wanted[:, None] * (positive - null)) < 1e-13
        assert scale.max() <= 8.0 * (1 + 1e-12)
        assert rule.added(np.inf) == (c - 1 if rule.sigma_hi is None else 0.0)


# ---------------------------------------------------------------- SLD and contrastive CFG

PRESETS = {
    "weak": (15, 20, 0, 0, 0),
    "medium": (10, 1000, 0.01, 0.3, 0.4),
    "strong": (7, 2000, 0.025, 0.5, 0.7),
    "max": (0, 5000, 1.0, 0.5, 0.7),
}


@pytest.mark.parametrize("level", PRESETS)
def test_sld_presets_are_the_pipeline(level):
    """Twenty steps with its warm-up, its momentum, and what it compares and measures from."""
    warmup, slope, threshold, momentum_scale, decay = PRESETS[level]
    rule = SafeLatentDiffusion.preset(level, 7.5)
    memory, book = rule.init(5, 3), np.zeros((5, 3))
    applied = 0
    for step in range(20):
        p, null, positive, negative = predictions(step, 7.5, "unconditional", step)
        guided, _, memory = rule.guide(p, memory)
        wanted, book = textbook.sld_pipeline(
            null, positive, negative, book, step, 7.5, warmup, slope, threshold, momentum_scale,
            decay,
        )  # fmt: skip
        assert error(guided, wanted) < 1e-13 and error(memory, book) < 1e-13
        applied += error(guided, p.base) > 0
    assert applied == 20 - warmup


@given(seeds, st.floats(0.0, 10.0), st.floats(0.0, 1.0))
def test_contrastive_with_both_factors_is_the_textbook(seed, w, tau):
    p, null, positive, negative = predictions(seed, w, "unconditional")
    guided, _, _ = ContrastiveCFG.published(w, tau).guide(p, None)
    assert error(guided, textbook.contrastive_cfg_both(null, positive, negative, w, tau)) < 1e-12


def test_the_factors_of_contrastive_cfg():
    """The negative one is 1 where the predictions agree, and 0 where they are far apart."""
    rule = ContrastiveCFG.published()
    assert (rule.guidance_scale, rule.temperature) == (7.5, 0.2)
    assert rule.positive_factor and rule.reference == "unconditional"
    for far, attraction, repulsion in ((0.0, 1.0, 1.0), (1e3, 2.0, 0.0)):
        decay = np.exp(-0.2 * far**2)
        assert equations.contrastive_attraction(decay) == attraction
        assert equations.contrastive_scale(1.0, decay) == repulsion


# ---------------------------------------------------------------- signed negatives


@given(seeds, st.floats(-3, 8), st.floats(-3, 8))
def test_signed_negative_is_the_textbook(seed, w, g):
    p, null, positive, negative = predictions(seed, w, "unconditional")
    guided, scale, _ = SignedNegative(g).guide(p, None)
    assert error(guided, null + w * (positive - null) - g * (negative - null)) < 1e-12
    assert np.all(scale == g)
    assert SignedNegative(g).reference == "unconditional"
    assert SignedNegative(g) != NegativePrompting(g)


# ---------------------------------------------------------------- GeoGuide


@given(seeds, st.floats(-3, 3))
def test_geoguide_is_the_textbook(seed, kappa):
    step = seed % 19
    p, null, _, negative = predictions(seed, step=step)
    guided, scale, _ = GeoGuide(kappa).guide(p, None)
    numbers = StepNumbers.of(COEFFICIENTS, step)
    wanted = textbook.geoguide(
        null, negative, kappa, 20, numbers.alpha_ts, numbers.beta_ts, numbers.sigma_t
    )
    assert error(guided, wanted) < 1e-11
    assert error(null - scale[0][:, None] * (negative - null), wanted) < 1e-11


@given(mixtures(max_dim=4), seeds, st.floats(0.1, 3.0), st.sampled_from([DDPM(), DDIM(0.0)]))
def test_geoguide_moves_every_sample_as_far(mixture, seed, kappa, sampler):
    """The lengths of a chain's pushes add up to kappa sqrt(D), whatever p is."""
    schedule = NoiseSchedule.linear().respace(8)
    c, rule = schedule.coefficients(sampler), GeoGuide(kappa)
    chain = sample(
        mixture, schedule, rule, n=5, forbidden=[0], seed=seed, sampler=sampler,
        record=["trajectory"],
    )  # fmt: skip
    total = np.zeros(5)
    for i in range(len(c)):
        at = predict(
            mixture, chain.trajectory[i], float(c.alpha_t[i]), float(c.sigma_t[i]), rule,
            forbidden=[0], prediction_type="sample", step=i, coefficients=c,
        )  # fmt: skip
        total += c.x0_factor[i] * np.linalg.norm(at.guided - at.base, axis=1)
    assert error(total, kappa * np.sqrt(mixture.dim)) < 1e-9


def test_geoguide_pushes_where_the_forbidden_is_absent():
    """As far at p = 1e-9 as at p near 1: it knows of no posterior."""
    x = np.array([[-1.0], [3.0]])
    p = FOUR_MODES.diffuse(0.9, 0.2).posterior(x, [1])
    assert p[0] > 0.99 and p[1] < 1e-9
    options = {"forbidden": [1], "prediction_type": "sample"}
    at = predict(
        FOUR_MODES, x, 0.9, 0.2, GeoGuide(1.0), step=10, coefficients=COEFFICIENTS, **options
    )
    length = np.abs(at.guided - at.base)
    assert error(length[0], length[1]) < 1e-12 and length.min() > 1e-3
    dng = predict(FOUR_MODES, x, 0.9, 0.2, DynamicNegativeGuidance(1.0), **options)
    assert np.abs(dng.guided - dng.base)[1] < 1e-6


def test_geoguide_without_a_direction_stays():
    p, null, _, _ = predictions(0)
    p = predictions(0, negative=null[None])[0]
    guided, scale, _ = GeoGuide(2.0).guide(p, None)
    assert np.array_equal(guided, null) and np.all(scale == 0)


# ---------------------------------------------------------------- CRG


@given(seeds, st.floats(0, 3), st.floats(0.2, 3), st.floats(-2, 2))
def test_crg_is_the_textbook(seed, lambda0, gain, threshold):
    """Three steps, with the sum over the earlier ones."""
    rule = CRG(lambda0, gain, threshold)
    memory, past = rule.init(5, 3), np.zeros(5)
    for step in (2, 3, 4):
        p, null, positive, negative = predictions(seed + step, 1.0, "unconditional", step)
        guided, _, memory = rule.guide(p, memory)
        wanted = textbook.crg(positive, null, negative, past, lambda0, gain, threshold)
        assert error(guided, wanted) < 1e-11
        b = textbook.squared_distance(positive, null) - textbook.squared_distance(
            positive, negative
        )
        c = StepNumbers.of(COEFFICIENTS, step)
        kappa = textbook.crg_kappa(c.beta_ts, 20, c.alpha_ts**2, c.alpha_t**2)
        past = past + kappa * b / 20
        assert error(memory[:, 0], past) < 1e-12


@given(seeds, st.floats(0.2, 3), st.floats(-3, 3))
def test_crg_at_one_ends_on_its_threshold(seed, gain, threshold):
    p, null, _, negative = predictions(seed, 1.0, "unconditional")
    past = np.random.default_rng(seed).normal(size=(5, 1))
    guided, scale, _ = CRG(1.0, gain, threshold).guide(p, past)

    def evidence(c):
        near = textbook.squared_distance(c, null) - textbook.squared_distance(c, negative)
        return gain / 2 * near + past[:, 0]

    before = evidence(p.base)
    assert error(evidence(guided), np.minimum(before, threshold)) < 1e-11
    assert np.array_equal(scale[0] > 0, before > threshold)


@given(seeds, st.integers(0, 18))
def test_crg_adds_the_expected_evidence_of_a_step(seed, step):
    """kappa b/T is the mean of the log ratio of n to u of a step towards c, with variance beta.

    docs/theory.md, section 5.11.
    """
    null, positive, negative = np.random.default_rng(seed).normal(size=(3, 5, 3))
    c = StepNumbers.of(COEFFICIENTS, step)
    m = -c.beta_ts / (c.alpha_ts * c.sigma_t)
    gap, residual = m * (negative - null), m * (positive - null)  # the noise has mean 0
    expected = equations.log_likelihood_ratio(
        np.sum(gap * gap, axis=1), np.sum(gap * residual, axis=1), c.beta_ts
    )
    b = textbook.squared_distance(positive, null) - textbook.squared_distance(positive, negative)
    assert error(CRG.rate(c) * b, expected) < 1e-12


# ---------------------------------------------------------------- SPELL


@given(seeds, st.integers(1, 4), st.floats(0.1, 4.0), st.floats(-1, 2))
def test_spell_is_the_textbook(seed, count, radius, scale):
    rng = np.random.default_rng(seed)
    given_points, x0 = rng.normal(size=(count, 3)), rng.normal(size=(5, 3))
    p = predictions(seed, x0=x0)[0]
    guided, _, _ = SPELL(given_points, radius, scale).guide(p, None)
    moved = (guided - p.base) / p.from_x0
    assert error(x0 + moved, textbook.spell(x0, given_points, radius, scale)) < 1e-11


@given(mixtures(max_dim=4), seeds, st.floats(0.1, 6.0))
def test_spell_ends_on_the_sphere(mixture, seed, radius):
    """One point and scale 1: a predicted x0 inside the ball goes to its surface, others stay."""
    x, point = points(mixture, seed), points(mixture, seed + 1, 1)
    at = predict(mixture, x, 0.8, 0.6, SPELL(point, radius, 1.0), prediction_type="sample")
    before, after = (np.linalg.norm(d - point, axis=1) for d in (at.base, at.guided))
    assert error(after, np.maximum(before, radius)) < 1e-11


def test_spell_at_the_point_itself_has_no_direction():
    p = predictions(0, x0=np.zeros((5, 3)))[0]
    guided, scale, _ = SPELL(np.zeros((1, 3)), 1.0).guide(p, None)
    assert np.array_equal(guided, p.base) and np.isfinite(scale).all()


# ---------------------------------------------------------------- negatives given as points


@given(mixtures(max_dim=4, min_components=3), seeds, st.floats(0.1, 2.0))
def test_points_of_the_mixture_are_exact_dng(mixture, seed, g):
    """Components of one width, by their means: D + o (D - D_unsafe) is DNG, at any g."""
    width, chosen, weights = 0.4, [0, 1], mixture.weights.copy()
    weights[chosen] = weights[chosen].mean()  # a kernel mixture has no others
    model = GaussianMixture(weights, mixture.means, np.full(len(weights), width**2))
    rule = ImageReferenced(
        mixture.means[chosen], float(model.weights[chosen].sum()), g, width, p_max=1 - 1e-9
    )
    for alpha, sigma in ((0.9, 0.4), (0.5, 0.9), (0.1, 1.0)):
        x = points(mixture, seed)
        p = model.diffuse(alpha, sigma).posterior(x, chosen)
        at = (model, x, alpha, sigma)
        got = predict(*at, rule, prediction_type="sample")
        wanted = predict(
            *at, DynamicNegativeGuidance(g), forbidden=chosen, prediction_type="sample"
        )
        # 1 - p loses the digits that p and 1 share.
        size = (1 + np.abs(wanted.guided).max(axis=1)) / (1 - np.minimum(p, 1 - 1e-9))
        gap = np.abs(got.guided - wanted.guided).max(axis=1)
        assert np.all((gap < 1e-12 * size) | (p > 1 - 1e-6))


@given(mixtures(max_dim=3), seeds, st.floats(0.01, 0.3))
def test_image_referenced_is_the_textbook(mixture, seed, prior):
    """Points that are not in the data, without a bandwidth."""
    x, given_points, alpha, sigma = points(mixture, seed), points(mixture, seed + 1, 3), 0.6, 0.8
    rule = ImageReferenced(given_points, prior, p_max=0.999)
    got = predict(mixture, x, alpha, sigma, rule, prediction_type="sample")
    density = np.exp(mixture.diffuse(alpha, sigma).log_prob(x))
    wanted = textbook.image_referenced(x, got.base, density, given_points, alpha, sigma, prior)
    free = got.scale[0] < 900  # the others are capped
    assert error(got.guided[free], wanted[free]) < 1e-10
    assert np.all(got.scale[0] <= 999 * (1 + 1e-9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["positive", "unconditional"])
@pytest.mark.parametrize("options", [
    {},
    {"forbidden": [1]},
    {"positive": [0, 1, 2], "cfg_scale": 1.2},
    {"positive": [0, 2], "cfg_scale": 1.2, "forbidden": [1]},
], ids=str)  # fmt: skip
def test_image_referenced_fused_is_the_reference(kind, reference, options):
    mixture = moderate(4, kind, 5, 2)
    rule = ImageReferenced(mixture.means[[1, 4]], 0.3, 0.8, 0.4, reference=reference)
    fused, plain = (
        sample(
            mixture, SCHEDULE, rule, n=37, engine=engine, record=["trajectory", "scale"], **options
        )
        for engine in ("fused", "reference")
    )  # fmt: skip
    assert error(fused.trajectory, plain.trajectory) < CHAIN
    assert error(fused.scale, plain.scale) < 10 * CHAIN


def test_a_chain_of_images_is_exact_dng():
    """Fifty of 200 points of a data set, given as images or as components."""
    data = np.random.default_rng(3).normal(size=(200, 3))
    model = GaussianMixture.from_points(data, 0.15)
    options = {"n": 100, "forbidden": np.arange(50)}
    rule = ImageReferenced(data[:50], 0.25, bandwidth=0.15, p_max=1 - 1e-9)
    images = sample(model, SCHEDULE, rule, **options).x
    classes = sample(model, SCHEDULE, DynamicNegativeGuidance(1.0), **options).x
    # At p = 1 - 1e-6 six of sixteen digits of 1 - p are lost.
    assert error(images, classes) < 1e-6


# ---------------------------------------------------------------- CFG++


@given(seeds, st.floats(-1, 2), st.floats(0.001, 0.9), st.floats(0.001, 0.999))
def test_cfg_plus_plus_is_cfg_with_a_scale_of_the_step(seed, g, bar_t, share):
    """DDIM's step with it is the paper's: the guided x0, and the unguided noise again."""
    bar_s = bar_t + share * (1.0 - bar_t)
    rng = np.random.default_rng(seed)
    x, null, positive = rng.normal(size=(3, 5, 3))
    alpha_t, sigma_t = np.sqrt(bar_t), np.sqrt(1 - bar_t)
    alpha_s, sigma_s = np.sqrt(bar_s), np.sqrt(1 - bar_s)
    numbers = StepNumbers(alpha_t, sigma_t, alpha_s, sigma_s, alpha_t / alpha_s, np.nan, np.nan, 1)
    scale = CFGPlusPlus(g).scale(numbers)
    guided = textbook.cfg_beneath(null, positive, scale)
    got = textbook.ddim_step(bar_t, bar_s, x, guided, 0 * x, 0.0)
    wanted = textbook.cfg_plus_plus_step(bar_t, bar_s, x, null, positive, g)
    assert error(got, wanted) < 1e-12 * (1 + abs(scale))


def test_a_chain_of_cfg_plus_plus_is_the_paper():
    """Twenty deterministic steps of an exact mixture, the last of which has w = g."""
    schedule = SCHEDULE
    chain = sample(
        FOUR_MODES, schedule, CFGPlusPlus(0.6), n=20, positive=[2, 3], sampler=DDIM(0.0),
        record=["trajectory", "scale"],
    )  # fmt: skip
    x, alpha, sigma = chain.trajectory[0], schedule.alpha[::-1], schedule.sigma[::-1]
    led = FOUR_MODES.restrict([2, 3])
    for i in range(20):
        null, positive = (
            part.noise_prediction(x, float(alpha[i]), float(sigma[i])) for part in (FOUR_MODES, led)
        )
        x = textbook.cfg_plus_plus_step(alpha[i] ** 2, alpha[i + 1] ** 2, x, null, positive, 0.6)
        assert error(chain.trajectory[i + 1], x) < CHAIN
    assert error(chain.scale[-1], 0.6) < 1e-14 and chain.scale[:-1].min() > 0.6


# ---------------------------------------------------------------- on mixtures

ON_MIXTURES = {
    "geoguide": (GeoGuide(1.0), {}),
    "geoguide, beneath": (GeoGuide(1.0), {"cfg_scale": 1.5}),
    "spell": (SPELL([[0.5, 0.0], [-1.0, 1.0]], 1.5), {}),
    "spell, beneath": (SPELL([[0.5, 0.0], [-1.0, 1.0]], 1.5), {"cfg_scale": 1.5}),
    "images": (ImageReferenced([[0.5, 0.0], [-1.0, 1.0]], 0.1, bandwidth=0.2), {}),
    "images, beneath": (
        ImageReferenced([[0.5, 0.0], [-1.0, 1.0]], 0.1, reference="unconditional"),
        {"cfg_scale": 1.5},
    ),
    "crg": (CRG(threshold=-1.0), {"cfg_scale": 1.5}),
    "cfg++": (CFGPlusPlus(0.7), {}),
    "signed": (SignedNegative(0.6), {"cfg_scale": 1.5}),
    "ccfg": (ContrastiveCFG.published(1.0), {"cfg_scale": 1.5}),
    "sld": (SafeLatentDiffusion.preset("max", 0.7), {"cfg_scale": 1.5}),
}


@pytest.mark.parametrize("name", ON_MIXTURES)
def test_published_rules_read_the_same_for_every_prediction(name):
    """Noise, x0, v, flow and score; the guided x0 is the same."""
    rule, options = ON_MIXTURES[name]
    mixture, (alpha, sigma) = moderate(4, "full", 4, 2), (0.7, 0.6)
    x = np.random.default_rng(1).normal(size=(4, 2))
    got = {
        kind: predict(
            mixture, x, alpha, sigma, rule, forbidden=[1], positive=[0, 1], prediction_type=kind,
            memory=rule.init(4, 2), step=5, coefficients=COEFFICIENTS, **options,
        )
        for kind in ("epsilon", "sample", "v_prediction", "flow_prediction", "score")
    }  # fmt: skip
    x0 = got["sample"].guided
    eps = (x - alpha * x0) / sigma
    assert error(x0, got["sample"].base) > 1e-3
    for kind, wanted in (
        ("epsilon", eps),
        ("v_prediction", alpha * eps - sigma * x0),
        ("flow_prediction", eps - x0),
        ("score", -eps / sigma),
    ):
        assert error(got[kind].guided, wanted) < 1e-12
        assert error(got[kind].scale, got["sample"].scale) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_spell_needs_no_concept(kind):
    mixture = moderate(4, kind, 4, 2)
    rule = SPELL([[0.5, 0.0], [-1.0, 1.0]], 1.5)
    pair = [
        sample(mixture, SCHEDULE, rule, n=20, engine=engine, record=["trajectory", "scale"])
        for engine in ("fused", "reference")
    ]
    assert error(pair[0].trajectory, pair[1].trajectory) < CHAIN
    assert error(pair[0].scale, pair[1].scale) < 10 * CHAIN
    assert pair[0].scale.shape == (20, 1, 20)


# Forbidden shares that others measured of 4,000 samples: four modes in a row at -3, -1, 1 and 3,
# of standard deviation 0.4, the second forbidden, 200 steps of DDPM's linear schedule.
MEASURED = {
    "none": (Unguided(), 0.254),
    "np 0.5": (NegativePrompting(0.5), 0.062),
    "np 2": (NegativePrompting(2.0), 0.001),
    "dng 1": (DynamicNegativeGuidance(1.0), 0.004),
    "dng 2": (DynamicNegativeGuidance(2.0), 0.0),
    "ccfg 1": (ContrastiveCFG(1.0, 0.2), 0.020),
    "ccfg 2": (ContrastiveCFG(2.0, 2.0), 0.045),
    "geoguide 0.5": (GeoGuide(0.5), 0.206),
    "geoguide 2": (GeoGuide(2.0), 0.096),
    "spell 1.6": (SPELL([[-1.0]], 1.2), 0.0),
    "spell 1": (SPELL([[-1.0]], 1.2, 1.0), 0.0),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_each_rule_leaves_is_what_was_measured(name):
    """Fisher's exact test of two counts, at a false-alarm rate of 1e-6 each."""
    rule, share = MEASURED[name]
    n = 20_000
    x = sample(FOUR_MODES, NoiseSchedule.linear().respace(200), rule, n=n, forbidden=[1]).x
    left, counted = int(np.sum(np.abs(x + 1.0) < 1.0)), round(4000 * share)
    table = [[left, n - left], [counted, 4000 - counted]]
    assert stats.fisher_exact(table).pvalue > 1e-6, left / n
