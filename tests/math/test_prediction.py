"""A rule's prediction as a function of x: against the chain, and against 50 digits."""

from __future__ import annotations

import numpy as np
import pytest

from dng_math import (
    DDIM,
    DDPM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GaussianMixture,
    GeoGuide,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    PerpNeg,
    SafeLatentDiffusion,
    TimeProfile,
    Unguided,
    divergence_correction,
    divergence_gap,
    equations,
    predict,
    sample,
)
from dng_math.prediction import QUANTITIES
from dng_math.rules import innermost, tracker_of
from dng_math.trackers import at_steps
from tests.helpers import textbook, textbook_mixtures
from tests.helpers.mixtures import moderate, points
from tests.helpers.tolerances import error

SCHEDULE = NoiseSchedule.linear().respace(12)
SAMPLER = DDIM(0.0)
TOO_LITTLE_NOISE = pytest.mark.filterwarnings("ignore:the sampler adds:UserWarning")

RULES = {
    "unguided": Unguided(),
    "cfg": ClassifierFreeGuidance(1.5),
    "classifier": ClassifierGuidance(1.5),
    "np": NegativePrompting(0.7),
    "sld": SafeLatentDiffusion(0.5),
    "sld absolute, warm-up": SafeLatentDiffusion(0.5, 0.3, "absolute", warmup_steps=3),
    "sld without momentum": SafeLatentDiffusion(0.5, momentum_scale=0.0),
    "perp-neg": PerpNeg(0.8, 0.6),
    "ccfg": ContrastiveCFG(1.0, 0.5),
    "exact": DynamicNegativeGuidance(1.5),
    "paper": DynamicNegativeGuidance(1.0, PaperTracker()),
    "log-odds": DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.3)),
    "log-odds, path": DynamicNegativeGuidance(1.0, PathTracker(prior=0.3)),
    "path, base": DynamicNegativeGuidance(1.0, PathTracker(compare="base")),
    "fbg": FeedbackGuidance(),
    "fbg, hybrid": FeedbackGuidance(cfg_scale=2.0, sigma_lo=0.2, sigma_hi=3.0),
    "geoguide": GeoGuide(1.0),
    "cfg++": CFGPlusPlus(0.6),
    "interval, np": LimitedInterval(NegativePrompting(0.4), 0.2, 0.7),
    "interval, sld": LimitedInterval(SafeLatentDiffusion(0.4), 0.2, 0.7),
    "interval, log-odds": LimitedInterval(DynamicNegativeGuidance(1.0, LogOddsTracker()), 0.2, 0.9),
}


def walk(mixture, rule, coefficients, x, state_of, **roles):
    """A loop of one's own with :func:`predict`: x at the cleaner end of every step, and scales."""
    tracker = tracker_of(rule, coefficients)
    memory = rule.init(*x.shape)
    for i in range(len(coefficients)):
        result = predict(
            mixture,
            x,
            float(coefficients.alpha_t[i]),
            float(coefficients.sigma_t[i]),
            rule,
            prediction_type="sample",
            log_posterior=None if tracker is None else state_of(i),
            memory=memory,
            step=i,
            time=float(coefficients.time[i]),
            coefficients=coefficients,
            **roles,
        )
        memory = result.memory
        x = coefficients.x_factor[i] * x + coefficients.x0_factor[i] * result.guided
        yield x, result.scale


@TOO_LITTLE_NOISE
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_that_of_the_chain(name):
    """Whole deterministic chains of the reference engine, from predictions alone."""
    rule = RULES[name]
    for kind, d in (("spherical", 1), ("diagonal", 2), ("full", 3)):
        mixture = moderate(d, kind, 5, d)
        roles = {"forbidden": [1, 3], "positive": [0, 1] if d == 2 else None}
        record = ["trajectory", "scale"]
        if tracker_of(rule, SCHEDULE.coefficients()) is not None:
            record.append("tracked")
        chain = sample(
            mixture, SCHEDULE, rule, n=20, sampler=SAMPLER, engine="reference", record=record,
            initial="exact", **roles,
        )  # fmt: skip
        own = walk(
            mixture,
            rule,
            SCHEDULE.coefficients(SAMPLER),
            chain.trajectory[0],
            lambda i, chain=chain: chain.tracked[i],
            **roles,
        )
        # Log odds that come back from log p carry its rounding.
        allowed = 1e-11 if "log-odds" in name else 0.0
        for i, (x, scale) in enumerate(own):
            assert error(x, chain.trajectory[i + 1]) <= allowed
            assert error(scale, chain.scale[i]) <= allowed


def test_several_concepts_are_those_of_the_chain():
    mixture = moderate(3, "full", 6, 2)
    roles = {"forbidden": [[0], [2, 3]]}
    for rule in (DynamicNegativeGuidance(1.3), DynamicNegativeGuidance(1.3, PaperTracker())):
        tracked = tracker_of(rule, SCHEDULE.coefficients()) is not None
        record = ["trajectory", "scale"] + tracked * ["tracked"]
        chain = sample(
            mixture, SCHEDULE, rule, n=20, sampler=DDIM(1.0), engine="reference", record=record,
            **roles,
        )  # fmt: skip
        for i in (0, 5, 11):
            at = (float(SCHEDULE.alpha[12 - i]), float(SCHEDULE.sigma[12 - i]))
            got = predict(
                mixture, chain.trajectory[i], *at, rule, prediction_type="sample",
                log_posterior=chain.tracked[i] if tracked else None, **roles,
            )  # fmt: skip
            assert got.negative.shape == (2, 20, 2) and got.scale.shape == (2, 20)
            assert np.array_equal(got.scale, chain.scale[i])


# ---------------------------------------------------------------- fifty digits


def exact_noise(mixture, x, alpha, sigma, components):
    """E[eps | x] of some components at each point, from fifty digits."""
    own = (mixture.weights[components], mixture.means[components], mixture.covariances[components])
    return np.array(
        [
            [float(-sigma * s) for s in textbook_mixtures.exact_score(row, *own, alpha, sigma)]
            for row in x
        ]
    )


LOG_P = np.log([0.2, 0.05, 0.7, 0.4])
MEMORY = 0.1 * np.random.default_rng(3).normal(size=(4, 2))
# A rule with its options, and the guided noise from (eps, eps_neg, eps_pos, exact p).
BOOKS = {
    "unguided": (Unguided(), {}, lambda e, n, p, q: e),
    "cfg": (ClassifierFreeGuidance(1.5), {}, lambda e, n, p, q: textbook.cfg(e, p, 1.5)),
    "classifier": (ClassifierGuidance(1.5), {}, lambda e, n, p, q: textbook.cfg(e, p, 1.5)),
    "np": (NegativePrompting(0.7), {}, lambda e, n, p, q: textbook.negative_prompting(e, n, 0.7)),
    "sld": (
        SafeLatentDiffusion(0.5, momentum_scale=0.0),
        {},
        lambda e, n, p, q: textbook.sld(e, n, 0 * e, 0, 0.5, s_m=0.0)[0],
    ),
    "sld with its momentum": (
        SafeLatentDiffusion(0.5, 0.3, "absolute", warmup_steps=2),
        {"memory": MEMORY, "step": 4},
        lambda e, n, p, q: textbook.sld(e, n, MEMORY, 4, 0.5, 0.3, gate="absolute")[0],
    ),
    "perp-neg": (
        PerpNeg(0.8, 0.6),
        {},
        lambda e, n, p, q: textbook.perp_neg(e, n, p - e, 0.8) + 0.6 * (p - e),
    ),
    "ccfg": (
        ContrastiveCFG(1.2, 0.3),
        {},
        lambda e, n, p, q: textbook.contrastive_cfg(e, n, 1.2, 0.3),
    ),
    "exact": (DynamicNegativeGuidance(1.4), {}, lambda e, n, p, q: textbook.dng(e, n, q, 1.4)),
    "paper": (
        DynamicNegativeGuidance(1.4, PaperTracker()),
        {"log_posterior": LOG_P},
        lambda e, n, p, q: textbook.dng(e, n, np.exp(LOG_P), 1.4),
    ),
    "log-odds": (
        DynamicNegativeGuidance(1.4, LogOddsTracker()),
        {"log_posterior": LOG_P[None]},
        lambda e, n, p, q: textbook.dng(e, n, np.exp(LOG_P), 1.4),
    ),
    "one number": (
        DynamicNegativeGuidance(1.4, PaperTracker()),
        {"log_posterior": np.log(0.3)},
        lambda e, n, p, q: textbook.dng(e, n, np.full(len(e), 0.3), 1.4),
    ),
    "clamped": (
        DynamicNegativeGuidance(1.4, PaperTracker(p_max=0.9)),
        {"log_posterior": 0.0},
        lambda e, n, p, q: textbook.dng(e, n, np.full(len(e), 0.9), 1.4),
    ),
    "fbg": (
        FeedbackGuidance(0.9, 8.0),
        {"log_posterior": [0.0, 1.0, -2.0, 2.5]},
        lambda e, n, p, q: textbook.fbg(e, p, np.array([0.0, 1.0, -2.0, 2.5]), 0.9),
    ),
    "inside": (
        LimitedInterval(NegativePrompting(0.7), 0.2, 0.6),
        {"time": 0.6},
        lambda e, n, p, q: textbook.negative_prompting(e, n, 0.7),
    ),
    "outside": (
        LimitedInterval(NegativePrompting(0.7), 0.2, 0.6),
        {"time": 0.7},
        lambda e, n, p, q: e,
    ),
}
BOOKS["fbg"] = (
    *BOOKS["fbg"][:2],
    lambda e, n, p, q: textbook.fbg(
        e, p, np.maximum([0.0, 1.0, -2.0, 2.5], textbook.fbg_floor(0.9, 8.0)), 0.9
    ),
)


@pytest.mark.parametrize("kind", ["spherical", "full"])
@pytest.mark.parametrize("name", BOOKS)
def test_predictions_are_the_textbook_in_fifty_digits(name, kind):
    rule, options, book = BOOKS[name]
    mixture, (alpha, sigma) = moderate(4, kind, 4, 2), (0.7, 0.6)
    x = np.random.default_rng(1).normal(size=(4, 2))
    forbidden, positive = [1, 3], [0, 1]
    parameters = (mixture.weights, mixture.means, mixture.covariances, alpha, sigma)
    p = np.array(
        [
            float(np.exp(float(textbook_mixtures.exact_log_posterior(r, forbidden, *parameters))))
            for r in x
        ]
    )
    eps, negative, toward = (
        exact_noise(mixture, x, alpha, sigma, part) for part in (range(4), forbidden, positive)
    )
    expected = book(eps, negative, toward, p)
    got = {
        kind: predict(
            mixture, x, alpha, sigma, rule, forbidden=forbidden, positive=positive,
            prediction_type=kind, **options,
        )
        for kind in QUANTITIES
    }  # fmt: skip
    x0 = (x - sigma * expected) / alpha
    assert error(got["epsilon"].guided, expected) < 1e-12
    assert error(got["epsilon"].base, eps) < 1e-12
    assert error(got["epsilon"].negative, negative[None]) < 1e-12
    assert error(got["epsilon"].positive, toward) < 1e-12
    assert error(got["sample"].guided, x0) < 1e-12
    assert error(got["v_prediction"].guided, alpha * expected - sigma * x0) < 1e-12
    assert error(got["flow_prediction"].guided, expected - x0) < 1e-12
    assert error(got["score"].guided, -expected / sigma) < 1e-12
    for result in got.values():
        assert error(result.scale, got["epsilon"].scale) < 1e-11


def test_without_a_positive_the_rest_is_led_to():
    mixture, x = moderate(2, "diagonal", 4, 2), np.zeros((1, 2))
    at = (mixture, x, 0.5, 0.8)
    left = predict(*at, ClassifierFreeGuidance(1.0), forbidden=[0])
    right = predict(*at, ClassifierFreeGuidance(1.0), positive=[1, 2, 3])
    dng = predict(*at, DynamicNegativeGuidance(1.0), forbidden=[0])
    assert np.array_equal(left.guided, right.guided)
    assert np.array_equal(left.positive, mixture.restrict([1, 2, 3]).noise_prediction(*at[1:]))
    assert error(dng.guided, left.guided) < 1e-14
    assert right.negative.shape == (0, 1, 2) and right.scale.shape == (1, 1)


def test_no_signal_and_no_points():
    """At alpha = 0 nothing of x tells what x0 is."""
    mixture = moderate(2, "full", 4, 2)
    x = points(mixture, 0, 3)
    for name, rule in RULES.items():
        if name in ("sld", "sld absolute, warm-up", "interval, sld"):
            options = {"memory": np.zeros((3, 2))}
        elif tracker_of(rule, SCHEDULE.coefficients()) is not None:
            options = {"log_posterior": -1.0}
        else:
            options = {}
        options |= {"forbidden": [0], "step": 5, "time": 0.5}
        options["coefficients"] = SCHEDULE.coefficients()
        for kind in QUANTITIES:
            got = predict(mixture, x, 0.0, 2.0, rule, prediction_type=kind, **options)
            assert np.isfinite(got.guided).all()
        assert error(predict(mixture, x, 0.0, 2.0, rule, **options).base, x / 2.0) < 1e-14
        if "memory" in options:
            options["memory"] = np.zeros((0, 2))
        assert predict(mixture, x[:0], 0.5, 0.5, rule, **options).guided.shape == (0, 2)


class Nudge:
    """A rule of one's own that counts its steps."""

    needs_positive = several_concepts = False
    result = ...

    def init(self, n, dimensions):
        return 0

    def guide(self, predictions, memory):
        if self.result is not ...:
            return self.result
        scale = np.full((1, len(predictions.base)), predictions.time)
        return predictions.base + predictions.time, scale, memory + 1


def test_a_rule_of_ones_own():
    mixture = moderate(2, "diagonal", 4, 2)
    at = (mixture, np.zeros((3, 2)), 0.5, 0.8)
    got = predict(*at, Nudge(), forbidden=[0], memory=4, step=3, time=0.25)
    assert error(got.guided, got.base + 0.25) == 0 and got.memory == 5
    with pytest.raises(ValueError, match="step must be given"):
        predict(*at, Nudge(), forbidden=[0], memory=4, time=0.25)
    with pytest.raises(ValueError, match="time must be given"):
        predict(*at, Nudge(), forbidden=[0], memory=4, step=3)
    with pytest.raises(ValueError, match="memory must be given"):
        predict(*at, Nudge(), forbidden=[0], step=3, time=0.25)


NOTHING = (
    (None, TypeError, r"rule.guide must return \(guided, scale, memory\), got None"),
    (np.zeros((3, 2)), TypeError, r"rule.guide must return \(guided, scale, memory\)"),
    ((np.zeros(3), np.ones((1, 3)), 0), ValueError, r"guided prediction.*shape \(3, 2\)"),
    ((None, np.ones((1, 3)), 0), TypeError, "real numbers"),
    ((np.zeros((3, 2)), np.ones(3), 0), ValueError, r"scale.*shape \(1, 3\), got \(3,\)"),
    ((np.full((3, 2), np.nan), np.ones((1, 3)), 0), ValueError, "finite"),
)


@pytest.mark.parametrize(("result", "kind", "message"), NOTHING)
def test_what_a_rule_of_ones_own_returns_is_looked_at(result, kind, message):
    rule = Nudge()
    rule.result = result
    mixture = moderate(2, "diagonal", 4, 2)
    with pytest.raises(kind, match=message):
        predict(mixture, np.zeros((3, 2)), 0.5, 0.8, rule, forbidden=[0], memory=4, step=3, time=1)
    with pytest.raises(kind, match=message):
        sample(mixture, SCHEDULE, rule, n=3, forbidden=[0], engine="reference")


FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
DNG = DynamicNegativeGuidance
NEEDED = [
    (DNG(1.0, PaperTracker()), {}, "log_posterior must be given"),
    (FeedbackGuidance(), {}, "log_posterior must be given.*log ratio L"),
    (SafeLatentDiffusion(), {}, "memory must be given.*momentum_scale=0"),
    (SafeLatentDiffusion(warmup_steps=2, momentum_scale=0.0), {}, "step must be given"),
    (LimitedInterval(NegativePrompting(), 0.2, 0.5), {}, "time must be given"),
    (NegativePrompting(), {"log_posterior": -1.0}, "log_posterior must be None.*PaperTracker"),
    (DNG(1.0), {"log_posterior": -1.0}, "log_posterior must be None"),
    (NegativePrompting(), {"memory": np.zeros((2, 1))}, "memory must be None"),
    (SafeLatentDiffusion(), {"memory": np.zeros((3, 1))}, r"memory must have shape \(2, 1\)"),
    (DNG(1.0, PaperTracker()), {"log_posterior": 0.5}, "log_posterior must be <= 0"),
    (DNG(1.0, PaperTracker()), {"log_posterior": np.nan}, "log_posterior must be <= 0"),
    (DNG(1.0, PaperTracker()), {"log_posterior": [-1.0] * 3}, r"shape \(1, 2\), \(2,\), got \(3,"),
    (FeedbackGuidance(), {"log_posterior": np.inf}, "log_posterior must be finite"),
    (LimitedInterval(Unguided(), 0.1), {"time": 1.5}, r"time must be in \[0, 1\]"),
    (NegativePrompting(), {"forbidden": None}, "forbidden must name"),
    (NegativePrompting(), {"forbidden": [[0], [1]]}, "one concept"),
    (NegativePrompting(), {"prediction_type": "noise"}, "prediction_type must be one of"),
    (NegativePrompting(), {"sigma": 0.0}, "sigma must be finite and > 0"),
    (NegativePrompting(), {"alpha": -1.0}, "alpha must be finite and >= 0"),
]


@pytest.mark.parametrize(("rule", "change", "message"), NEEDED)
def test_what_depends_on_the_path_is_asked_for(rule, change, message):
    options = {"x": np.zeros((2, 1)), "alpha": 0.6, "sigma": 0.8, "forbidden": [0], **change}
    with pytest.raises(ValueError, match=message):
        predict(FOUR_MODES, rule=rule, **options)


# ---------------------------------------------------------------- the divergence term


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_divergence_gap_in_fifty_digits(kind):
    mixture, (alpha, sigma) = moderate(5, kind, 4, 2), (0.6, 0.5)
    x = points(mixture, 2, 4)
    got = divergence_gap(mixture, x, alpha, sigma, forbidden=[[0], [1, 3]])

    def divergence(part, row):
        parameters = (mixture.weights[part], mixture.means[part], mixture.covariances[part])
        return float(textbook_mixtures.exact_score_divergence(row, *parameters, alpha, sigma))

    expected = [
        [divergence(part, row) - divergence(range(4), row) for row in x] for part in ([0], [1, 3])
    ]
    assert got.shape == (2, 4)
    assert error(got, expected) < 1e-11


TRACKERS = {
    "paper": PaperTracker(divergence=True),
    "log-odds": LogOddsTracker(divergence=True),
    "profile": LogOddsTracker(
        divergence=True, temperature=TimeProfile((0.1, 0.5), (0.2, 1.0)), variance="large"
    ),
}


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_loop_of_ones_own_is_the_chain(name, eta, engine):
    """With the correction a tracker is fed as ``sample(..., divergence=True)`` feeds it."""
    tracker, mixture = TRACKERS[name], moderate(6, "full", 5, 2)
    rule, forbidden = DNG(1.0, tracker), [[0], [2, 3]]
    chain = sample(
        mixture, SCHEDULE, rule, n=30, forbidden=forbidden, sampler=DDIM(eta), engine=engine,
        record=["trajectory", "tracked"],
    )  # fmt: skip
    c = SCHEDULE.coefficients(DDIM(eta))
    x = chain.trajectory[0]
    prior = np.array([[mixture.weights[part].sum()] * 30 for part in forbidden])
    state = tracker.init(prior)
    for i, own in enumerate(at_steps(tracker, c)):
        result = predict(
            mixture, x, float(c.alpha_t[i]), float(c.sigma_t[i]), rule, forbidden=forbidden,
            prediction_type="sample", log_posterior=tracker.log_posterior(state),
        )  # fmt: skip
        assert error(tracker.log_posterior(state), chain.tracked[i]) < 1e-8
        x_next = c.x_factor[i] * x + c.x0_factor[i] * result.guided
        if eta > 0 and i < len(c) - 1:
            x_next = chain.trajectory[i + 1]  # the noise is the chain's
        assert error(x_next, chain.trajectory[i + 1]) < 1e-8
        gap = c.transition_x0_factor[i] * (result.negative - result.base)
        mean = equations.step_mean(
            x, result.base, c.transition_x_factor[i], c.transition_x0_factor[i]
        )
        state = own.update(
            state,
            np.sum(gap**2, axis=-1),
            np.sum((x_next - mean) * gap, axis=-1),
            float(c.tracker_variance(tracker.variance)[i]),
            len(c),
            divergence_correction(mixture, x, c, i, tracker, state, forbidden=forbidden),
        )
        x = x_next
    assert error(tracker.log_posterior(state), chain.log_posterior) < 1e-8


CORRECTION = {
    "mixture": FOUR_MODES,
    "x": np.zeros((3, 1)),
    "coefficients": SCHEDULE.coefficients(SAMPLER),
    "step": 2,
    "tracker": PaperTracker(divergence=True),
    "state": np.full((1, 3), -1.0),
    "forbidden": [0],
}
REFUSED = [
    ({"mixture": None}, TypeError, "mixture must be a GaussianMixture"),
    ({"x": np.zeros(3)}, ValueError, r"x must have shape \(N, 1\)"),
    ({"coefficients": SCHEDULE}, TypeError, "coefficients must be StepCoefficients"),
    ({"step": 12}, ValueError, "step must be an integer from 0 to 11"),
    ({"tracker": innermost(RULES["exact"]).posterior}, TypeError, "tracker must be a PaperTracker"),
    ({"tracker": PaperTracker()}, ValueError, "divergence=True"),
    ({"state": np.full(3, -1.0)}, ValueError, r"state must have shape \(1, 3\)"),
    ({"state": np.full((1, 3), np.nan)}, ValueError, "state must not be NaN"),
    ({"forbidden": None}, ValueError, "forbidden must name"),
    ({"forbidden": [9]}, ValueError, "forbidden must be from 0 to 3"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED)
def test_a_correction_that_is_none_is_refused(change, kind, message):
    assert divergence_correction(**CORRECTION).shape == (1, 3)
    with pytest.raises(kind, match=message):
        divergence_correction(**{**CORRECTION, **change})


def test_no_correction_for_the_noise_of_ddpm():
    options = {**CORRECTION, "coefficients": SCHEDULE.coefficients(DDPM())}
    assert np.array_equal(divergence_correction(**options), np.zeros((1, 3)))
