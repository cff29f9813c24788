"""What the negative is measured from, with classifier-free guidance beneath a rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dng_math import (
    CRG,
    DDIM,
    DDPM,
    SPELL,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GaussianMixture,
    GeoGuide,
    ImageReferenced,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    PerpNeg,
    SafeLatentDiffusion,
    SignedNegative,
    Unguided,
    predict,
    sample,
)
from tests.helpers import textbook
from tests.helpers.mixtures import KINDS, mixtures, moderate, points
from tests.helpers.tolerances import CHAIN, error

DNG = DynamicNegativeGuidance
seeds = st.integers(0, 2**32 - 1)
SCHEDULE = NoiseSchedule.linear().respace(20)
TOO_LITTLE_NOISE = pytest.mark.filterwarnings("ignore:the sampler adds:UserWarning")
REFERENCES = ("positive", "unconditional")
# Component 1 is forbidden: within what is led to, or beside it.
WITHIN, BESIDE = [0, 1, 2], [0, 2]


def rules_of(reference, *, shares):
    """Every rule that pushes; ``shares`` adds those that need the forbidden within the whole."""
    trackers = {
        "paper": PaperTracker(offset_nats=1.0),
        "log-odds": LogOddsTracker(prior=0.3),
        "path, base, no probe": PathTracker(compare="base", probes=0),
    }
    if shares:
        trackers |= {
            "path": PathTracker(),
            "path, base": PathTracker(compare="base"),
            "divergence": LogOddsTracker(divergence=True),
        }
    made = {name: DNG(0.8, tracker, reference) for name, tracker in trackers.items()}
    if shares:
        made["exact"] = DNG(1.5, reference=reference)
    return made | {
        "np": NegativePrompting(0.4, reference),
        "sld": SafeLatentDiffusion(0.5, reference=reference),
        "ccfg": ContrastiveCFG(1.0, 0.5, False, reference),
        "ccfg, both": ContrastiveCFG(1.0, 0.5, True, reference),
        "geoguide": GeoGuide(1.0, reference),
    }


CASES = [
    (f"{name}, {reference}, {'within' if positive == WITHIN else 'beside'}", rule, positive)
    for reference in REFERENCES
    for positive in (WITHIN, BESIDE)
    for name, rule in rules_of(
        reference, shares=positive == WITHIN or reference == "unconditional"
    ).items()
] + [
    (f"{name}, {'within' if positive == WITHIN else 'beside'}", rule, positive)
    for positive in (WITHIN, BESIDE)
    for name, rule in (
        ("unguided", Unguided()),
        ("crg", CRG(1.0, threshold=0.5)),
        ("spell", SPELL([[0.5, 0.0], [-1.0, 1.0]], 1.5)),
    )
]
by_case = pytest.mark.parametrize(
    ("rule", "positive"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@TOO_LITTLE_NOISE
@by_case
@pytest.mark.thinned(3)
def test_fused_engine_is_the_reference_with_guidance_beneath(rule, positive):
    tracked = isinstance(getattr(rule, "posterior", None), PaperTracker | LogOddsTracker)
    for kind, sampler in zip(KINDS, (DDPM(), DDIM(0.5), DDIM(0.0)), strict=True):
        mixture = moderate(7, kind, 5, 2)
        fused, reference = (
            sample(
                mixture, SCHEDULE, rule, n=37, forbidden=[1], positive=positive, cfg_scale=1.3,
                sampler=sampler, first_sample=300, engine=engine, initial="exact",
                record=["trajectory", "scale", "exact"] + tracked * ["tracked"],
            )
            for engine in ("fused", "reference")
        )  # fmt: skip
        for name in ("trajectory", "exact", "tracked", "log_posterior"):
            left, right = getattr(fused, name), getattr(reference, name)
            assert (left is None) == (right is None)
            assert left is None or error(left, right) < CHAIN, name
        assert error(fused.scale, reference.scale) < 10 * CHAIN


def test_matrix_products_are_the_reference_with_guidance_beneath():
    """A data set of 150 points takes the other way to its predictions."""
    rng = np.random.default_rng(0)
    mixture = GaussianMixture.from_points(rng.normal(size=(150, 6)) + 3.0, 0.4)
    for reference, positive in (
        ("positive", np.arange(60)),
        ("positive", np.arange(50, 90)),
        ("unconditional", np.arange(60)),
    ):
        for rule in (
            NegativePrompting(0.3, reference),
            SafeLatentDiffusion(0.3, reference=reference),
        ):
            fused, plain = (
                sample(
                    mixture, SCHEDULE, rule, n=37, forbidden=np.arange(40), positive=positive,
                    cfg_scale=1.3, engine=engine, record=["trajectory"],
                )
                for engine in ("fused", "reference")
            )  # fmt: skip
            assert error(fused.trajectory, plain.trajectory) < CHAIN


# ---------------------------------------------------------------- what the words mean


@given(mixtures(max_dim=4, min_components=4), seeds, st.floats(-1, 8), st.floats(-1, 3))
def test_a_rule_adds_to_guidance_what_it_measures(mixture, seed, w, g):
    """``u + w (c - u) - scale (n - c)``, or ``(n - u)``, for the rules that are linear."""
    x, alpha, sigma = points(mixture, seed), 0.7, 0.6
    null, positive, negative = (
        part.noise_prediction(x, alpha, sigma)
        for part in (mixture, mixture.restrict([0, 1]), mixture.restrict([1, 2]))
    )
    beneath = textbook.cfg_beneath(null, positive, w)
    options = {"forbidden": [1, 2], "positive": [0, 1], "cfg_scale": w}
    allowed = 1e-11 * (1 + abs(w) + abs(g))
    for reference, start in (("positive", positive), ("unconditional", null)):
        got = predict(mixture, x, alpha, sigma, NegativePrompting(g, reference), **options)
        assert error(got.base, beneath) < allowed
        assert error(got.guided, beneath - g * (negative - start)) < allowed
        posterior = np.log(0.3)
        rule = DNG(g, PaperTracker(), reference)
        got = predict(mixture, x, alpha, sigma, rule, log_posterior=posterior, **options)
        pushed = textbook.dng_scale(0.3, g) * (negative - start)
        assert error(got.guided, beneath - pushed) < allowed
    signed = predict(mixture, x, alpha, sigma, SignedNegative(g), **options)
    assert error(signed.guided, beneath - g * (negative - null)) < allowed


@given(mixtures(max_dim=4, min_components=4), seeds, st.floats(0.05, 3.0))
def test_exact_guidance_knows_what_it_is_measured_from(mixture, seed, sigma):
    """From the positive: what of it is allowed.  From the unconditional: the whole, less n."""
    x, alpha = points(mixture, seed), 0.7
    options = {"forbidden": [1], "positive": [0, 1], "cfg_scale": 1.0, "prediction_type": "sample"}
    got = predict(mixture, x, alpha, sigma, DNG(1.0), **options)
    assert error(got.guided, mixture.restrict([0]).posterior_mean(x, alpha, sigma)) < 1e-10
    got = predict(mixture, x, alpha, sigma, DNG(1.0, reference="unconditional"), **options)
    rest = [0, *range(2, mixture.n_components)]
    allowed = mixture.restrict(rest).posterior_mean(x, alpha, sigma)
    null = mixture.posterior_mean(x, alpha, sigma)
    assert error(got.guided, got.base + allowed - null) < 1e-10


WORLDS = {
    "exact": DNG(1.3),
    "paper": DNG(0.8, PaperTracker()),
    "log-odds": DNG(0.8, LogOddsTracker(divergence=True)),
    "path": DNG(0.8, PathTracker()),
    "np": NegativePrompting(0.4),
    "sld": SafeLatentDiffusion(0.5),
    "geoguide": GeoGuide(1.0),
}


@TOO_LITTLE_NOISE
@pytest.mark.parametrize("name", WORLDS)
def test_measured_from_the_positive_is_a_world_of_its_own(name):
    """With CFG at 1 a whole chain, its posterior too, is that of the positive components alone."""
    rule = WORLDS[name]
    for d, kind in enumerate(KINDS, 1):
        mixture = moderate(3, kind, 5, d)
        options = {"n": 20, "sampler": DDIM(0.5), "record": ["trajectory", "scale", "exact"]}
        own = sample(
            mixture, SCHEDULE, rule, forbidden=[3], positive=[1, 3, 4], cfg_scale=1.0, **options
        )
        alone = sample(mixture.restrict([1, 3, 4]), SCHEDULE, rule, forbidden=[1], **options)
        for record in ("trajectory", "exact"):
            assert error(getattr(own, record), getattr(alone, record)) < CHAIN
        assert error(own.scale, alone.scale) < 10 * CHAIN
        if own.log_posterior is not None:
            assert error(own.log_posterior, alone.log_posterior) < CHAIN


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_nothing_but_guidance_beneath_is_classifier_free_guidance(engine):
    mixture = moderate(2, "diagonal", 4, 2)
    options = {"n": 20, "positive": [1, 2], "engine": engine, "record": ["trajectory"]}
    beneath = sample(mixture, SCHEDULE, cfg_scale=1.7, **options)
    itself = sample(mixture, SCHEDULE, ClassifierFreeGuidance(1.7), **options)
    assert error(beneath.trajectory, itself.trajectory) < CHAIN


@pytest.mark.parametrize("reference", REFERENCES)
def test_without_guidance_beneath_there_is_one_prediction(reference):
    """The reference then says nothing, and a positive is not read."""
    mixture = moderate(2, "diagonal", 4, 2)
    for rule in rules_of(reference, shares=True).values():
        if getattr(rule, "positive_factor", False):
            continue
        default = type(rule)(
            **{k: v for k, v in vars(rule).items() if k != "reference"}  # the same, by default
        )
        pair = [
            sample(mixture, SCHEDULE, r, n=10, forbidden=[0], positive=[1]).x
            for r in (rule, default)
        ]
        assert np.array_equal(*pair)


@pytest.mark.parametrize("reference", REFERENCES)
def test_guidance_beneath_at_zero_from_the_unconditional_is_none(reference):
    mixture = moderate(2, "diagonal", 4, 2)
    rule = NegativePrompting(0.4, reference)
    plain = sample(mixture, SCHEDULE, rule, n=20, forbidden=[0]).x
    beneath = sample(mixture, SCHEDULE, rule, n=20, forbidden=[0], positive=[1], cfg_scale=0.0).x
    assert (error(plain, beneath) < 1e-12) == (reference == "unconditional")


def test_perp_neg_may_be_measured_from_either():
    """What of n - c is orthogonal to c - u is what of n - u is."""
    null, positive, negative = np.random.default_rng(0).normal(size=(3, 5, 3))
    led = positive - null
    from_null, from_positive = (
        textbook.perp_neg(start, negative, led, 1.0) - start for start in (null, positive)
    )
    assert error(from_null, from_positive) < 1e-13


# ---------------------------------------------------------------- bad input

BAD = [
    ({"rule": CRG()}, ValueError, "cfg_scale must be given for CRG.*None"),
    ({"rule": ContrastiveCFG.published()}, ValueError, "cfg_scale must be given for Contrastive"),
    *(
        (
            {"rule": rule, "cfg_scale": 1.0},
            ValueError,
            f"cfg_scale must be None for {type(rule).__name__}",
        )
        for rule in (ClassifierFreeGuidance(), FeedbackGuidance(), PerpNeg())
    ),
    ({"rule": Unguided(), "forbidden": None, "cfg_scale": 1.0, "positive": None}, ValueError,
     "positive must name what cfg_scale leads to"),
    ({"rule": DNG(), "cfg_scale": 1.0, "positive": [1]}, ValueError,
     "forbidden must lie within positive for an exact posterior.*'positive'"),
    ({"rule": DNG(1.0, PathTracker()), "cfg_scale": 1.0, "positive": None}, ValueError,
     "forbidden must lie within positive.*divergence"),
    ({"rule": DNG(), "cfg_scale": 1.0, "positive": [0]}, ValueError,
     "leave some positive components with weight"),
    ({"rule": DNG(), "cfg_scale": "1"}, TypeError, "cfg_scale must be a real number"),
    ({"rule": ImageReferenced([[0.0]], 0.1)}, ValueError, r"points must have the mixture's 2"),
    ({"rule": SPELL([[0.0]], 1.0)}, ValueError, r"points must have the mixture's 2 dim.*\(1, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_what_does_not_go_together_is_refused(change, kind, message):
    mixture = moderate(2, "diagonal", 4, 2)
    options = {"forbidden": [0], "positive": [0, 1], **change}
    rule = options.pop("rule")
    with pytest.raises(kind, match=message):
        sample(mixture, SCHEDULE, rule, n=2, **options)
    with pytest.raises(kind, match=message):
        predict(
            mixture, np.zeros((2, 2)), 0.8, 0.6, rule, step=3,
            coefficients=SCHEDULE.coefficients(), **options,
        )  # fmt: skip


def test_rules_that_read_the_step_want_to_know_it():
    mixture = moderate(2, "diagonal", 4, 2)
    at = (mixture, np.zeros((2, 2)), 0.8, 0.6, GeoGuide(1.0))
    with pytest.raises(ValueError, match="coefficients must be given for GeoGuide.*None"):
        predict(*at, forbidden=[0], step=3)
    with pytest.raises(ValueError, match="step must be given with coefficients"):
        predict(*at, forbidden=[0], coefficients=SCHEDULE.coefficients())
