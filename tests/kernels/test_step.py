"""The step against its transcription, in float64; the kernel and float32 against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dng_kernels import StepPlan, StepResult, dng_step, guide, update_posterior
from dng_kernels._border import HAS_TRITON
from dng_kernels.plan import COLUMN, LARGEST, OWN, SHARED, WIDTH
from dng_math import (
    CRG,
    DDIM,
    DDPM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    EulerMaruyama,
    FeedbackGuidance,
    GeoGuide,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
    SignedNegative,
    TimeProfile,
    Unguided,
    noise,
    sample,
)
from dng_math._codes import chain_code
from dng_math.rules import innermost
from tests.helpers import textbook
from tests.helpers.mixtures import moderate
from tests.helpers.tolerances import (
    CHAIN_FLOAT32,
    LOG_POSTERIOR_FLOAT32,
    STEP,
    STEP_UNITS,
    WHOLE_CHAIN,
    error,
)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
IN_TORCH = ("reference", "cpu")
BACKENDS = [*IN_TORCH, pytest.param("triton", marks=needs_triton)]
# For tests that call the interpreter often, which takes milliseconds a call.
MOSTLY_TORCH = [*IN_TORCH, pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for Hypothesis, which takes no fixture
BLOCK = 1024  # elements from which a sample is more than one chunk

# ---------------------------------------------------------------- what there is to combine

PAPER = {"temperature": 0.7, "offset": 1e-3, "offset_nats": 0.5, "p_min": 1e-4, "p_max": 0.95}


@dataclass(frozen=True)
class Book:
    """A rule of the package and its transcription, on noise predictions."""

    rule: Any
    # (eps, eps_neg, eps_pos, state, momentum, step) -> (guided, scale, next momentum), where eps
    # is what the negative is measured from
    guide: Callable[..., Any] | None = None
    # (state, x_next, mean, mean_neg, v, steps) -> state
    update: Callable[..., Any] | None = None
    variance: str = "matched"
    # For rules that combine three predictions themselves, or read the step:
    # (eps, eps_neg, eps_uncond, state, momentum, plan, step) -> the same and the next state, or
    # None where only ``guide`` is meant.
    whole: Callable[..., Any] | None = None
    cfg_scales: tuple[float | None, ...] = (None, 3.0)


def _paper(variance: str = "matched", reference: str = "positive") -> Book:
    def update(state, x_next, mean, mean_neg, v, steps):
        # The textbook has the paper's offset only; nats are offset / (2 v).
        offset = PAPER["offset"] + 2.0 * v * PAPER["offset_nats"] / steps
        return textbook.paper_update(
            state, x_next, mean, mean_neg, v, PAPER["temperature"], offset, 1e-4, 0.95
        )

    return Book(
        DynamicNegativeGuidance(1.3, PaperTracker(variance=variance, **PAPER), reference),
        lambda e, n, p, state, m, i: (
            textbook.dng(e, n, np.exp(state), 1.3),
            textbook.dng_scale(np.exp(state), 1.3),
            m,
        ),
        update,
        variance,
    )


def _log_odds(reference: str = "positive") -> Book:
    def guide(e, n, p, state, m, i):
        odds = np.minimum(np.exp(state), 19.0)
        posterior = odds / (1.0 + odds)
        return textbook.dng(e, n, posterior, 1.3), textbook.dng_scale(posterior, 1.3), m

    def update(state, x_next, mean, mean_neg, v, steps):
        nats = PAPER["offset_nats"] / steps + PAPER["offset"] / (2.0 * v)
        updated = textbook.log_odds_update(
            state, x_next, mean, mean_neg, v, PAPER["temperature"], nats, 19.0
        )
        return np.maximum(updated, np.log(1e-4 / (1.0 - 1e-4)))

    return Book(DynamicNegativeGuidance(1.3, LogOddsTracker(**PAPER), reference), guide, update)


def _sld(gate: str, threshold: float, warmup: int) -> Book:
    rule = SafeLatentDiffusion(0.8, threshold, gate, 9.0, 0.3, 0.4, warmup)

    def guide(e, n, p, state, momentum, i):
        guided, following = textbook.sld(
            e, n, momentum, i, 0.8, threshold, 9.0, 0.3, 0.4, warmup, gate
        )
        measured = e - n if gate == "signed" else np.abs(e - n)
        scale = np.where(measured < threshold, np.minimum(1.0, 9.0 * np.abs(e - n)), 0.0)
        applied = 0.8 if i >= warmup else 0.0
        return guided, applied * scale.mean(axis=1), following

    return Book(rule, guide)


def _constant(rule: Any, guided: Callable[..., Any], scale: float, **more: Any) -> Book:
    return Book(rule, lambda e, n, p, state, m, i: (guided(e, n, p), scale, m), **more)


def _contrastive(e, n, p, state, m, i):
    decay = np.exp(-0.3 * textbook.squared_distance(n, e))
    return textbook.contrastive_cfg(e, n, 1.2, 0.3), 1.2 * 2 * decay / (1 + decay), m


def _sld_from_unconditional() -> Book:
    """With CFG of scale 3 the authors' pipeline, without it the same as ever."""
    plain = _sld("signed", 0.04, 2)
    rule = SafeLatentDiffusion(3.0, 0.04, "signed", 9.0, 0.3, 0.4, 2, "unconditional")

    def without(e, n, p, state, momentum, i):
        guided, following = textbook.sld(e, n, momentum, i, 3.0, 0.04, 9.0, 0.3, 0.4, 2)
        return guided, 3.0 / 0.8 * plain.guide(e, n, p, state, momentum, i)[1], following

    def whole(e, n, u, state, momentum, plan, i):
        if u is None:
            return None
        guided, following = textbook.sld_pipeline(u, e, n, momentum, i, 3.0, 2, 9.0, 0.04, 0.3, 0.4)
        scale = np.where(e - n < 0.04, np.minimum(1.0, 9.0 * np.abs(e - n)), 0.0)
        return guided, (3.0 if i >= 2 else 0.0) * scale.mean(axis=1), following, state

    return Book(rule, without, whole=whole)


def _contrastive_both(reference: str) -> Book:
    g, tau = (3.0 if reference == "unconditional" else 1.2), 0.3

    def whole(e, n, u, state, m, plan, i):
        seen = u if reference == "unconditional" else e
        decay = np.exp(-tau * textbook.squared_distance(n, seen))
        scale = 2.0 * g * decay / (1.0 + decay)
        guided = textbook.contrastive_cfg_both(u, e, n, 3.0, tau)
        if reference == "positive":
            led = 2.0 / (1.0 + np.exp(-tau * textbook.squared_distance(e, u)))
            guided = u + 3.0 * textbook.per_sample(led, u) * (e - u)
            guided = guided - textbook.per_sample(scale, u) * (n - e)
        return guided, scale, m, state

    return Book(ContrastiveCFG(g, tau, True, reference), whole=whole, cfg_scales=(3.0,))


def _geoguide(reference: str) -> Book:
    """A step of the same length from everywhere: of its own mean, whatever the sampler."""

    def whole(e, n, u, state, m, plan, i):
        base = e if u is None else textbook.cfg(u, e, 3.0)
        seen = u if reference == "unconditional" and u is not None else e
        at, c = interval(plan, i), plan.coefficients
        moved = c.x0_factor[i] * at.sigma_t / at.alpha_t  # of the mean, a unit of noise
        length = 0.4 * np.sqrt(e[0].size) / len(plan)
        scale = length / np.sqrt(textbook.squared_distance(moved * n, moved * seen))
        return base - textbook.per_sample(scale, e) * (n - seen), scale, m, state

    return Book(GeoGuide(0.4, reference), whole=whole)


def _crg() -> Book:
    def whole(e, n, u, past, m, plan, i):
        base, at = textbook.cfg(u, e, 3.0), interval(plan, i)
        guided = textbook.crg(base, u, n, past, 1.5, 0.8, 0.1)
        pushed, moved = (textbook.squared_distance(a, b) for a, b in ((base, guided), (n, u)))
        b = textbook.squared_distance(base, u) - textbook.squared_distance(base, n)
        a, beta = at.alpha_t / at.alpha_s, textbook.step_variance(*at, "large")
        kappa = textbook.crg_kappa(beta, len(plan), a * a, 1.0 - at.sigma_t**2)
        return guided, np.sqrt(pushed / moved), m, past + kappa / len(plan) * b

    return Book(CRG(1.5, 0.8, 0.1), whole=whole, cfg_scales=(3.0,))


def _cfg_plus_plus() -> Book:
    """The scale that turns DDIM's step into that of the paper."""

    def whole(e, n, u, state, m, plan, i):
        at = interval(plan, i)
        w = 0.6 * at.alpha_s * at.sigma_t / (at.alpha_s * at.sigma_t - at.alpha_t * at.sigma_s)
        base = e if u is None else textbook.cfg(u, e, 3.0)
        return base + w * (n - e), w, m, state

    return Book(CFGPlusPlus(0.6), whole=whole)


def _hybrid() -> Book:
    """FBG with CFG between two noise levels, at some steps of every schedule here."""

    def whole(e, n, u, state, m, plan, i):
        at = interval(plan, i)
        scale = textbook.fbg_scale(state, 0.9)
        if 0.3 <= at.sigma_t / at.alpha_t <= 4.0:
            scale = scale + 2.5 - 1.0
        base = e if u is None else textbook.cfg(u, e, 3.0)
        return base + textbook.per_sample(scale, e) * (n - e), scale, m, state

    rule = FeedbackGuidance(
        0.9, 8.0, temperature=0.3, step_offset=-0.02, cfg_scale=2.5, sigma_lo=0.3, sigma_hi=4.0
    )
    return Book(
        rule,
        update=lambda state, x_next, mean, mean_pos, v, steps: textbook.fbg_update(
            state, x_next, mean, mean_pos, v, 0.3, -0.02, textbook.fbg_floor(0.9, 6.5)
        ),
        whole=whole,
    )


BOOKS = {
    "unguided": _constant(Unguided(), lambda e, n, p: e, 0.0),
    "cfg": _constant(ClassifierFreeGuidance(1.5), lambda e, n, p: textbook.cfg(e, n, 1.5), 1.5),
    "np": _constant(
        NegativePrompting(0.7), lambda e, n, p: textbook.negative_prompting(e, n, 0.7), 0.7
    ),
    "sld": _sld("signed", 0.04, 0),
    "sld, absolute, warm-up": _sld("absolute", 0.06, 2),
    "perp-neg": _constant(
        PerpNeg(0.9, 0.6),
        lambda e, n, p: textbook.perp_neg(e, n, p - e, 0.9) + 0.6 * (p - e),
        0.9,
        cfg_scales=(None,),
    ),
    "ccfg": Book(ContrastiveCFG(1.2, 0.3), _contrastive),
    "paper": _paper(),
    "paper, small variance": _paper("small"),
    "published": _paper("published"),
    "log-odds": _log_odds(),
    "fbg": Book(
        FeedbackGuidance(0.9, 8.0, temperature=0.3, step_offset=-0.02),
        lambda e, n, p, state, m, i: (
            textbook.fbg(e, n, state, 0.9),
            textbook.fbg_scale(state, 0.9),
            m,
        ),
        lambda state, x_next, mean, mean_pos, v, steps: textbook.fbg_update(
            state, x_next, mean, mean_pos, v, 0.3, -0.02, textbook.fbg_floor(0.9, 8.0)
        ),
    ),
}

BOOKS |= {
    "signed": _constant(
        SignedNegative(0.7), lambda e, n, p: textbook.negative_prompting(e, n, 0.7), 0.7
    ),
    "sld, unconditional": _sld_from_unconditional(),
    "ccfg, unconditional": Book(ContrastiveCFG(1.2, 0.3, reference="unconditional"), _contrastive),
    "ccfg, both": _contrastive_both("unconditional"),
    "ccfg, both, positive": _contrastive_both("positive"),
    "paper, unconditional": _paper("matched", "unconditional"),
    "log-odds, unconditional": _log_odds("unconditional"),
    "geoguide": _geoguide("positive"),
    "geoguide, unconditional": _geoguide("unconditional"),
    "crg": _crg(),
    "cfg++": _cfg_plus_plus(),
    "fbg, hybrid": _hybrid(),
}

BOOKS |= {
    f"interval, {name}": replace(book, rule=LimitedInterval(book.rule, 0.4, 0.9))
    for name, book in list(BOOKS.items())
    if name in ("np", "sld", "perp-neg", "paper", "log-odds", "crg", "ccfg, both")
}

# Seven or eight steps each, the last to sigma = 0; alpha > 0 everywhere, so that every kind of
# prediction says the same as one of the noise.
DDPM_TIMES = NoiseSchedule.linear().respace(8)
FLOW_TIMES = NoiseSchedule.flow(8).select(np.arange(8))
VE_TIMES = NoiseSchedule.variance_exploding(8, sigma_min=0.05, sigma_max=20.0, rho=7.0)
SAMPLERS = {
    "DDPM small": (DDPM(), DDPM_TIMES),
    "DDPM large": (DDPM("large"), DDPM_TIMES),
    "DDIM 0.3": (DDIM(0.3), DDPM_TIMES),
    "Euler-Maruyama": (EulerMaruyama(), DDPM_TIMES),
    "Euler ancestral": (DDPM(), VE_TIMES),  # what DDPM's posterior is where alpha = 1
    "flow": (DDPM(), FLOW_TIMES),
}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
CFG_SCALES, CLIPS = (None, 3.0), (None, 1.2)


def combinations(rule: str) -> list[tuple[str, str, float | None, float | None]]:
    """Every sampler, kind of prediction, CFG scale and clip that go with a rule."""
    return [
        (sampler, kind, cfg_scale, clip)
        for sampler in SAMPLERS
        for kind in KINDS
        for cfg_scale in BOOKS[rule].cfg_scales
        for clip in CLIPS
        if kind != "flow_prediction" or sampler == "flow"
    ]


def plan_of(rule, sampler, kind="epsilon", cfg_scale=None, clip=None, device=None) -> StepPlan:
    method, schedule = SAMPLERS[sampler]
    return StepPlan(
        schedule.coefficients(method),
        rule,
        prediction_type=kind,
        cfg_scale=cfg_scale,
        clip=clip,
        device=device,
        _warn=False,  # a step is compared with a step, whatever its posterior is worth
    )


def plain_plan(name: str, device: Any = None) -> StepPlan:
    """A rule with nothing more than it needs."""
    return plan_of(
        BOOKS[name].rule, "DDPM small", cfg_scale=BOOKS[name].cfg_scales[0], device=device
    )


def interval(plan: StepPlan, step: int) -> textbook.Interval:
    c = plan.coefficients
    ends = (c.alpha_t[step], c.sigma_t[step], c.alpha_s[step], c.sigma_s[step])
    return textbook.Interval(*(float(value) for value in ends))


def arguments(
    plan: StepPlan,
    step: int,
    seed: int = 0,
    shape: tuple[int, ...] = (3, 37),
    x_dtype: Any = torch.float64,
    dtype: Any = None,
    spread: float = 0.1,
) -> dict[str, Any]:
    """Inputs of a step as they come up in a chain: predictions ``spread`` apart, on the CPU."""
    rng = np.random.default_rng(seed)
    at = interval(plan, step)
    double = x_dtype == torch.float64
    one = torch.float64 if double else torch.float32
    x = np.hypot(at.alpha_t, at.sigma_t) * rng.normal(size=shape)
    eps = rng.normal(size=shape)

    def prediction(distance: float) -> Any:
        value = eps + distance * rng.normal(size=shape)
        return tensor(textbook.prediction_of(at, x, value, plan.prediction_type), dtype or x_dtype)

    given = {
        "x": tensor(x, x_dtype),
        "eps": prediction(0.0),
        "eps_neg": prediction(spread),
        "noise": tensor(rng.normal(size=shape), dtype or x_dtype),
    }
    if plan.needs_uncond:
        given["eps_uncond"] = prediction(0.5)
    if plan.needs_positive:
        given["eps_pos"] = prediction(0.5)
    if plan.needs_momentum:
        given["momentum"] = tensor(0.1 * rng.normal(size=shape), one)
    if plan.tracker is not None:
        row = plan.row(step)
        cap = row.log_odds_cap or row.high
        given["state"] = tensor(
            rng.uniform(max(row.low, -7.0), min(row.high, cap + 1.0), shape[0]), one
        )
    if plan.tracks_evidence:
        given["state"] = tensor(rng.normal(size=shape[0]), one)
    if plan.needs_divergence:
        given["divergence_gap"] = tensor(rng.normal(size=shape[0]), one)
    return given


def tensor(values: Any, dtype: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def upcast(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in given.items()}


def take(plan: StepPlan, step: Any, given: dict[str, Any], backend: str = "reference", **options):
    """A step, with everything that it can return, on the plan's device; results on the CPU."""
    given = {name: value.to(plan.device) for name, value in given.items()}
    options = {"return_guided": True, "return_scale": True, **options}
    # The interpreter is NumPy, which warns where a GPU makes an infinity of a number too large.
    with np.errstate(over="ignore") if backend == "triton" else nullcontext():
        result = dng_step(plan, step, **given, backend=backend, **options)
    return StepResult(*(None if value is None else value.cpu() for value in result))


# ---------------------------------------------------------------- the transcription, float64


def by_the_book(book: Book, plan: StepPlan, step: int, sampler: str, given: dict[str, Any]):
    """The step from both means and both squared norms."""
    at, c = interval(plan, step), plan.coefficients
    method, _ = SAMPLERS[sampler]
    a = {name: value.numpy() for name, value in given.items()}
    x, state = a["x"], a.get("state")

    def eps_of(name: str) -> Any:
        return textbook.noise_of(at, x, a[name], plan.prediction_type) if name in a else None

    eps, eps_neg, uncond = eps_of("eps"), eps_of("eps_neg"), eps_of("eps_uncond")
    base = eps if uncond is None else textbook.cfg(uncond, eps, 3.0)
    reference = getattr(innermost(plan.rule), "reference", "positive")
    seen = uncond if reference == "unconditional" and uncond is not None else eps
    time, momentum, found = float(c.time[step]), a.get("momentum"), None
    lo, hi = getattr(plan.rule, "t_lo", 0.0), getattr(plan.rule, "t_hi", 1.0)
    if lo <= time <= hi:
        if book.whole is not None:
            found = book.whole(eps, eps_neg, uncond, state, momentum, plan, step)
        if found is None:
            guided, scale, momentum = book.guide(
                seen, eps_neg, eps_of("eps_pos"), state, momentum, step
            )
            found = base + (guided - seen), scale, momentum, state
        guided, scale, momentum, state = found
    else:
        guided, scale = base, 0.0

    small, large = (textbook.step_variance(*at, which) for which in ("small", "large"))
    last = at.sigma_s == 0.0
    eta = method.eta if isinstance(method, DDIM) else 1.0
    wide = isinstance(method, EulerMaruyama) or method == DDPM("large")
    drawn = (0.0 if last else large) if wide else eta**2 * small
    compared = {
        "matched": (0.0 if last else large) if wide else small,
        "small": small,
        "published": large if last else small,
    }[book.variance]

    def transition(prediction: Any, eta: float) -> Any:
        x0 = textbook.predicted_x0(at, x, prediction, plan.clip)
        if isinstance(method, EulerMaruyama):
            return textbook.euler_maruyama_mean(at, x, x0)
        return textbook.family_mean(at, x, x0, eta)

    x_next = transition(guided, eta) + np.sqrt(drawn) * a["noise"]
    # The tracker compares noisy transitions: the DDPM posterior's where eta < 1.
    mean, mean_neg = transition(seen, 1.0), transition(eps_neg, 1.0)
    if book.update is not None and compared > 0.0:
        state = book.update(state, x_next, mean, mean_neg, compared, len(c))
    guided = textbook.prediction_of(at, x, guided, plan.prediction_type)
    scale = np.broadcast_to(scale, len(x))
    return StepResult(x_next, state, guided, scale, momentum)


def assert_equal(got: StepResult, expected: StepResult, tolerance: float, what: Any) -> None:
    for name, actual, wanted in zip(StepResult._fields, got, expected, strict=True):
        assert (actual is None) == (wanted is None), (name, what)
        if actual is not None:
            assert error(actual, wanted) < tolerance, (name, what)


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.thinned(3)
def test_step_is_the_textbook(name):
    """All samplers, kinds of prediction, CFG beneath and clipping; first, middle and last step."""
    book = BOOKS[name]
    for seed, combination in enumerate(combinations(name)):
        plan = plan_of(book.rule, *combination)
        for step in (0, len(plan) // 2, len(plan) - 1):
            given = arguments(plan, step, seed, (2, 11))
            expected = by_the_book(book, plan, step, combination[0], given)
            for backend in IN_TORCH:
                got = take(plan, step, given, backend)
                assert_equal(got, expected, STEP, (backend, combination, step))


@pytest.mark.parametrize("tracker", [PaperTracker, LogOddsTracker])
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("backend", IN_TORCH)
def test_divergence_correction_is_the_textbook(tracker, kind, clip, backend):
    """What a step with eta < 1 lacks: -(1 - eta^2) beta/2 (div s_c - div s) in the log ratio.

    A clip that clips nothing takes the step on x0 all the same.
    """
    with_gap, without = (
        plan_of(
            DynamicNegativeGuidance(1.3, tracker(divergence=on, **PAPER)),
            "DDIM 0.3",
            kind,
            clip=clip,
        )
        for on in (True, False)
    )
    for step in range(len(with_gap) - 1):
        given = arguments(with_gap, step, step)
        at = interval(with_gap, step)
        # Where a clamp would hide the correction nothing is compared.
        given["state"] = given["state"].clamp(-2.0, -1.0)
        gap = given.pop("divergence_gap")
        plain = take(without, step, given, backend).state
        got = take(with_gap, step, given, backend, divergence_gap=gap).state
        divergence_neg = gap.numpy()
        if tracker is LogOddsTracker:
            odds = given["state"].exp().numpy()
            x = given["x"].numpy()
            score, score_neg = (
                -textbook.noise_of(at, x, given[name].numpy(), kind) / at.sigma_t
                for name in ("eps", "eps_neg")
            )
            rest = textbook.rest_divergence(
                odds / (1.0 + odds), score_neg - score, 0.0, divergence_neg
            )
            divergence_neg = divergence_neg - rest
        beta = textbook.step_variance(*at, "large")
        expected = PAPER["temperature"] * -(1.0 - 0.3**2) * beta / 2.0 * divergence_neg
        low, high = with_gap.row(step).low, with_gap.row(step).high
        inside = (plain > low) & (plain < high) & (got > low) & (got < high)
        assert inside.any() or step > 3
        assert error((got - plain)[inside], expected[inside.numpy()]) < STEP


# ---------------------------------------------------------------- the table


def test_columns_have_names_and_places_of_their_own():
    """But for the rules' own, of which a plan has one set; a name has one place for all."""
    assert len(COLUMN) == len(SHARED) + len({name for names in OWN for name in names})
    assert all(names.index(name) == COLUMN[name] - len(SHARED) for names in OWN for name in names)
    assert sorted(COLUMN[name] for name in SHARED) == list(range(len(SHARED)))
    for names in OWN:
        places = [COLUMN[name] for name in names]
        assert len(set(places)) == len(names)
        assert len(SHARED) <= min(places) and max(places) < WIDTH


@pytest.mark.parametrize("name", BOOKS)
def test_every_hyperparameter_of_a_rule_is_in_the_table(name):
    """Or a kernel would read a zero; the warm-up is in ``applied``, p_max in the bounds."""
    plan = plain_plan(name)
    coded, row = chain_code(plan.rule), plan.row(0)
    if not isinstance(plan.rule, CFGPlusPlus):  # whose scale is another one at every step
        assert row.guidance_scale == coded.guidance_scale
    for parameter in coded.parameters.keys() - {"warmup_steps", "p_max"}:
        assert getattr(row, parameter) == coded.parameters[parameter], parameter


# ---------------------------------------------------------------- float32 against float64


def rounding(plan: StepPlan, step: int, given: dict[str, Any], expected: StepResult) -> StepResult:
    """What one rounding of 2^-24 of every term makes of each result, to first order.

    The formulas of the step with every term positive: how far the terms cancel is what decides how
    many digits are left, and no way of adding them up has more.  Elements of SLD within rounding of
    its gate are NaN: they may fall on either side.
    """
    r, unit = plan.row(step), 2.0**-24
    a = {
        name: value.numpy().reshape(len(value), value.shape[1:].numel())
        for name, value in upcast(given).items()
    }
    inner = innermost(plan.rule)
    if plan.from_uncond:  # as the step has them: eps is what the negative is measured from
        a["eps"], a["eps_uncond"] = a["eps_uncond"], a["eps"]
    x, eps, neg = a.get("x"), np.abs(a["eps"]), np.abs(a["eps_neg"])
    delta = a["eps_neg"] - a["eps"]
    distance = np.abs(delta)
    base = eps
    if plan.needs_uncond:
        third = np.abs(a["eps_uncond"])
        # As eps_uncond + s (eps - eps_uncond), or as eps - (1 - s) (eps - eps_uncond).
        led = abs(r.cfg_scale) + 4.0 * abs(r.attraction) * isinstance(inner, ContrastiveCFG)
        base = third + eps + led * (third + eps)
    scale = np.abs(expected.scale.numpy())[:, None]
    # The relative error of a scale is that of the exponential in it: its exponent, and more where
    # something of nearly its size is subtracted.
    condition = np.ones_like(scale)
    state = given.get("state") if plan.tracker is not None else None
    if state is not None:
        state = np.clip(state.double().numpy()[:, None], max(r.low, -700.0), 700.0)
        condition = 4.0 + np.abs(np.minimum(state, max(r.high, r.log_odds_cap)))
        if isinstance(inner, FeedbackGuidance):
            condition = condition * (1.0 + scale)
    scale_error = condition * scale
    evidence = None
    if plan.tracks_evidence:
        terms = 2.0 * abs(r.lead) * np.abs(a["eps_uncond"] - a["eps"]) * distance + distance**2
        terms = r.to_noise**2 * np.sum(terms, axis=1)
        evidence = abs(r.rate) * terms + np.abs(a["state"][:, 0])
        surplus = 0.5 * r.gain * terms + np.abs(a["state"][:, 0]) + abs(r.threshold)
        norm_sq = r.gain * r.to_noise**2 * np.sum(distance**2, axis=1)
        of_surplus = np.divide(surplus, norm_sq, out=np.zeros_like(norm_sq), where=norm_sq > 0)
        scale_error = 4.0 * scale + r.active * abs(r.guidance_scale) * of_surplus[:, None]
    gate = np.zeros_like(delta)
    momentum = None
    if isinstance(inner, ContrastiveCFG):
        exponent = (
            r.contrastive_temperature * r.to_noise**2 * np.sum(delta**2, axis=1, keepdims=True)
        )
        scale_error = (1.0 + exponent) * scale
    pushed = scale_error * distance
    if isinstance(inner, SafeLatentDiffusion):
        difference = compared = delta * r.to_noise
        if plan.from_uncond:
            compared = (a["eps_neg"] - a["eps_uncond"]) * r.to_noise
        gated = np.abs(compared) if inner.gate == "absolute" else -compared
        close = np.abs(gated - r.threshold) <= 4 * unit * (np.abs(gated) + abs(r.threshold))
        gate = np.where(close, np.nan, 0.0)
        correction = np.abs(difference) + abs(r.momentum_scale) * np.abs(a["momentum"]) + gate
        momentum = r.momentum_decay * np.abs(a["momentum"]) + correction
        pushed = abs(r.guidance_scale * r.applied) * correction * abs(r.from_noise)
        scale_error = abs(r.guidance_scale) * (1.0 + np.sum(close, axis=1) / unit / close.shape[1])
    if plan.needs_positive:
        u = a["eps_pos"] - a["eps"]
        norm = np.sum(u * u, axis=1, keepdims=True)
        along = np.abs(u) * np.sum(np.abs(u) * distance, axis=1, keepdims=True)
        along = np.divide(along, norm, out=np.zeros_like(u), where=norm > 0)
        pushed = scale * (distance + along)
        base = base + abs(r.active * r.positive_scale) * np.abs(u)
    guided = base + pushed

    drawn = r.deviation * np.abs(a["noise"]) if "noise" in a else 0.0
    moved, end, gap, gap_error = guided + gate, guided, delta, distance
    if plan.clip is not None:
        on_x, on = abs(r.x0_x_factor) * np.abs(x), abs(r.x0_factor)
        end = on_x + on * guided
        x0, x0_neg = (
            np.clip(r.x0_x_factor * x + r.x0_factor * a[name], -plan.clip, plan.clip)
            for name in ("eps", "eps_neg")
        )
        gap = x0_neg - x0
        gap_error = on_x + on * (eps + neg)
        base = on_x + on * base
    x_next = np.abs(r.x_factor * x) + abs(r.factor) * end + drawn + gate

    following = evidence
    if state is not None:
        kernel = abs(r.transition_factor)
        mean_x, mean = r.transition_x_factor * x, r.transition_factor * a["eps"]
        if plan.clip is not None:
            mean = r.transition_factor * x0
        residual = expected.x_next.numpy().reshape(x.shape) - mean_x - mean
        terms = abs(r.factor) * (end - base * (not plan.needs_uncond and plan.clip is None))
        terms = terms + drawn + np.abs(r.x_drift * x) + np.abs(r.drift) * base
        dot = np.sum(terms * np.abs(gap) + np.abs(residual) * gap_error, axis=1)
        square = np.sum(2.0 * np.abs(gap) * gap_error, axis=1)
        odds = np.exp(np.minimum(state[:, 0], r.log_odds_cap))
        log_odds = isinstance(plan.tracker, LogOddsTracker)
        ratio = 2.0 * kernel * dot + kernel**2 * square
        if log_odds:
            ratio = (1.0 + odds) * (2.0 * kernel * dot + (1.0 + odds) * kernel**2 * square)
            ratio = condition[:, 0] * ratio
        if plan.needs_divergence:
            divergence = np.abs(a["divergence_gap"][:, 0])
            if log_odds:
                scores = r.score_factor * np.sum(gap**2, axis=1)
                divergence = condition[:, 0] * (1.0 + odds) * (divergence + odds * scores)
            ratio = ratio + (r.variance * (1.0 - r.eta**2) * r.beta) * divergence
        v = r.variance or np.inf
        nats = abs(r.offset_nats) + abs(r.offset) / (2.0 * v)
        following = r.temperature * ratio / (2.0 * v) + nats
        following = following + np.abs(np.clip(a["state"][:, 0], -LARGEST, LARGEST))
        following = following + np.abs(expected.state.numpy())  # a limit of the clamp, rounded

    shape = given["eps"].shape
    return StepResult(
        *(
            None if values is None else unit * np.broadcast_to(values, size).reshape(size)
            for values, size in (
                (x_next.reshape(shape), shape),
                (following, shape[:1]),
                (moved.reshape(shape), shape),
                (scale_error.reshape(-1), shape[:1]),
                (None if momentum is None else momentum.reshape(shape), shape),
            )
        )
    )


def units(got: StepResult, expected: StepResult, one: StepResult, interpreted: bool = False):
    """Largest error of each result, in units of rounding, beyond that of a 16-bit result itself."""
    found = {}
    for name, actual, wanted, unit in zip(StepResult._fields, got, expected, one, strict=True):
        assert (actual is None) == (wanted is None), name
        if actual is None:
            continue
        info = torch.finfo(actual.dtype)
        assert not torch.isnan(actual).any() and not torch.isnan(wanted).any(), name
        kind = actual.dtype
        # What is infinite in a small type, or nearly, is compared as its largest number.
        actual, wanted = (value.double().clamp(info.min, info.max) for value in (actual, wanted))
        stored = 0.0
        if info.bits == 16:
            # Triton's interpreter cuts bfloat16 off, where a GPU rounds it.
            ulps = 1.0 if interpreted and kind == torch.bfloat16 else 0.5
            stored = ulps * (1 + 2e-3) * info.eps * wanted.abs().numpy()
        gap = (actual - wanted).abs().numpy() - stored
        with np.errstate(invalid="ignore"):
            found[name] = float(np.nanmax(gap / (unit + info.tiny), initial=0.0))
    return found


def largest_error(plan: StepPlan, step: int, given: dict[str, Any], device: str, *backends: str):
    """The largest error of a float32 step against float64, in units of rounding."""
    expected = take(plan, step, upcast(given))
    one, largest = rounding(plan, step, given, expected), 0.0
    for backend in backends:
        here = plan.to(device) if backend == "triton" else plan
        got = take(here, step, given, backend)
        interpreted = backend == "triton" and device == "cpu"
        largest = max(largest, *units(got, expected, one, interpreted).values())
    return largest


TYPES = [  # of x and of the predictions
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.thinned(3)
def test_float32_is_float64_to_rounding(name):
    for seed, combination in enumerate(combinations(name)):
        plan = plan_of(BOOKS[name].rule, *combination)
        step = (0, len(plan) // 2, len(plan) - 1)[seed % 3]
        given = arguments(plan, step, seed, (3, 37), *TYPES[seed % 5])
        found = largest_error(plan, step, given, "cpu", *IN_TORCH)
        assert found < STEP_UNITS, (combination, step, TYPES[seed % 5])


@needs_triton
@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.thinned(3)
def test_kernel_is_float64_to_rounding(name, kernel_device):
    """Every 7th combination: 7 has no factor with what is combined, so all pairs come up."""
    for seed, combination in enumerate(combinations(name)):
        if seed % 7 == 0:
            plan = plan_of(BOOKS[name].rule, *combination)
            step = (0, len(plan) // 2, len(plan) - 1)[seed % 3]
            given = arguments(plan, step, seed, (2, 37), *TYPES[seed % 5])
            found = largest_error(plan, step, given, kernel_device, "triton")
            assert found < STEP_UNITS, (combination, step, TYPES[seed % 5])


@st.composite
def trackers(draw: st.DrawFn) -> dict[str, Any]:
    p_max = draw(st.sampled_from([0.5, 0.99, 0.999999, 1.0 - 1e-9]))
    return {
        "temperature": draw(st.sampled_from([0.0, 0.2, 1.0, 2.0])),
        "offset": draw(st.sampled_from([0.0, 2e-4, -1e-2])),
        "offset_nats": draw(st.sampled_from([0.0, 3.0, -30.0])),
        "p_min": draw(st.sampled_from([0.0, 1e-6, 0.3])),
        "p_max": p_max,
        "variance": draw(st.sampled_from(["matched", "small", "large", "published"])),
        "divergence": draw(st.booleans()),
    }


@st.composite
def rules(draw: st.DrawFn) -> Any:
    scale = draw(st.sampled_from([0.0, 1.0, -2.0, 27.0, 1e6]) | st.floats(-30, 30))
    kind = draw(st.sampled_from(["np", "cfg", "sld", "ccfg", "perp", "fbg", "paper", "log-odds"]))
    if kind not in ("paper", "log-odds") and draw(st.booleans()):
        kind = draw(st.sampled_from(["cfg++", "geo", "crg"]))
    reference = draw(st.sampled_from(["positive", "unconditional"]))
    if kind in ("paper", "log-odds"):
        tracker = PaperTracker if kind == "paper" else LogOddsTracker
        rule = DynamicNegativeGuidance(scale, tracker(**draw(trackers())), reference)
    elif kind == "fbg":
        rule = FeedbackGuidance(
            draw(st.floats(0.05, 0.99)),
            draw(st.sampled_from([1.5, 10.0, 1e4])),
            temperature=draw(st.sampled_from([0.0, 0.1, 1.0])),
            step_offset=draw(st.floats(-1, 1)),
            cfg_scale=draw(st.sampled_from([1.0, 1.4])),
        )
    elif kind == "sld":
        rule = SafeLatentDiffusion(
            scale,
            draw(st.floats(-1, 1)),
            draw(st.sampled_from(["signed", "absolute"])),
            draw(st.sampled_from([0.0, 1.0, 5000.0])),
            draw(st.floats(-1, 1)),
            draw(st.floats(0, 1)),
            draw(st.integers(0, 7)),
            reference,
        )
    else:
        rule = {
            "np": lambda: NegativePrompting(scale, reference),
            "cfg": lambda: ClassifierFreeGuidance(scale),
            "cfg++": lambda: CFGPlusPlus(scale),
            "ccfg": lambda: ContrastiveCFG(
                scale, draw(st.sampled_from([0.0, 0.01, 10.0])), draw(st.booleans()), reference
            ),
            "perp": lambda: PerpNeg(scale, draw(st.floats(-5, 5))),
            "geo": lambda: GeoGuide(scale, reference),
            "crg": lambda: CRG(scale, draw(st.sampled_from([0.1, 1.0])), draw(st.floats(-1, 1))),
        }[kind]()
    if draw(st.booleans()):
        rule = LimitedInterval(rule, 0.2, draw(st.sampled_from([0.6, 1.0])))
    return rule


# One element, odd lengths, one more and one less than a block, several chunks, no samples.
SHAPES = [
    (1,),
    (2,),
    (1, 1),
    (3, 127),
    (2, 129),
    (1, 1023),
    (2, 1025),
    (2, 3, 5, 7),
    (1, 4, 33, 17),
    (2, 2050),
    (0, 5),
]
FAR = [float("-inf"), -1e30, -80.0, 0.0, 5.0, 80.0, 1e30]


@dataclass(frozen=True)
class Case:
    """A plan, a step and inputs, ordinary or absurd."""

    rule: Any
    sampler: str
    kind: str
    cfg_scale: float | None
    clip: float | None
    step: int
    types: tuple[Any, Any]
    shape: tuple[int, ...]
    seed: int
    spread: float
    size: float
    state: float | None

    def made(self) -> tuple[StepPlan, int, dict[str, Any]]:
        plan = plan_of(self.rule, self.sampler, self.kind, self.cfg_scale, self.clip)
        step = self.step % len(plan)
        given = arguments(plan, step, self.seed, self.shape, *self.types, self.spread)
        for name in ("eps", "eps_neg", "eps_uncond", "eps_pos"):
            if name in given:
                value = given[name].float() * self.size
                given[name] = value.clamp(-1e4, 1e4).to(given[name].dtype)
        if "state" in given and self.state is not None:
            given["state"] = torch.full_like(given["state"], self.state)
            if plan.tracks_evidence:  # a sum of finite terms
                given["state"] = given["state"].clamp(-80.0, 80.0)
        return plan, step, given


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rule = draw(rules())
    sampler = draw(st.sampled_from(list(SAMPLERS)))
    kinds = KINDS if sampler == "flow" else KINDS[:3]
    perp = isinstance(innermost(rule), PerpNeg)
    led = isinstance(innermost(rule), CRG) or getattr(innermost(rule), "positive_factor", False)
    beneath = [0.0, 7.5, 1e3] if led else [None, 0.0, 7.5, 1e3]
    return Case(
        rule,
        sampler,
        draw(st.sampled_from(kinds)),
        None if perp else draw(st.sampled_from(beneath)),
        draw(st.sampled_from([None, 1.0, 20.0])),
        draw(st.integers(0, 7)),
        draw(st.sampled_from(TYPES)),
        draw(st.sampled_from(SHAPES)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from([0.0, 0.01, 1.0])),
        draw(st.sampled_from([1.0, 1.0, 30.0, 1e4])),
        draw(st.sampled_from([None, None, *FAR])),
    )


def check(case: Case, device: str, *backends: str) -> None:
    plan, step, given = case.made()
    assert largest_error(plan, step, given, device, *backends) < STEP_UNITS
    if plan.tracker is None:
        return
    row, here = plan.row(step), plan.to(device)
    for backend in backends:
        check_state(plan, row, take(here, step, given, backend).state, given["state"])


def check_state(plan: StepPlan, row: Any, state: Any, before: Any) -> None:
    """Unchanged where nothing is compared, else within its bounds, and a probability."""
    if row.variance == 0.0:  # nothing to compare: not even the clamps touch it
        assert torch.equal(state, before)
        return
    low, high = np.float32(row.low), np.float32(row.high)
    assert bool(((state >= low) & (state <= high)).all())
    if not isinstance(innermost(plan.rule), FeedbackGuidance):
        posterior = plan.log_posterior(state).exp()
        assert bool(((posterior >= 0.0) & (posterior <= 1.0)).all())


@settings(max_examples=300)
@given(cases())
def test_float32_at_extremes(case):
    check(case, "cpu", *IN_TORCH)


@needs_triton
@given(cases())
def test_kernel_at_extremes(case):
    check(case, DEVICE, "triton")


# ---------------------------------------------------------------- precision


def precision_inputs(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of every step: 16,384 numbers a sample, predictions 1% apart, float32."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        eps, other, z = torch.randn(3, 1, 16384, generator=generator)
        made.append({"eps": eps, "eps_neg": eps + 0.01 * other, "noise": z})
    return made


def two_norms(plan: StepPlan, step: int, x, state, given: dict[str, Any]):
    """The step as it is written: both means, both squared norms, all in float32."""
    r = plan.row(step)
    posterior = state.exp()[:, None]
    eps, eps_neg = given["eps"], given["eps_neg"]
    guided = eps - r.guidance_scale * posterior / (1 - posterior) * (eps_neg - eps)
    mean, mean_neg, mean_guided = (
        r.x_factor * x + r.factor * value for value in (eps, eps_neg, guided)
    )
    x_next = mean_guided + r.deviation * given["noise"]
    difference = ((x_next - mean_neg) ** 2).sum(1) - ((x_next - mean) ** 2).sum(1)
    updated = state - r.temperature * difference / (2 * r.variance)
    return x_next, updated.clamp(r.low, r.high)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
@pytest.mark.parametrize(("first", "steps"), [(25, 1), (0, 49)])
def test_log_posterior_keeps_the_digits_that_two_norms_lose(backend, first, steps, kernel_device):
    """After one step, and after a chain of 50 (the last of which has no noise to compare)."""
    rule = DynamicNegativeGuidance(5.0, PaperTracker(prior=0.25, p_min=0.0))
    plan = StepPlan(NoiseSchedule.linear().respace(50).coefficients(), rule)
    here = plan.to(kernel_device) if backend == "triton" else plan
    x = torch.randn(1, 16384, generator=torch.Generator().manual_seed(1))
    ways = {
        "exact": (x.double(), plan.init_state(1, torch.float64)),
        "ours": (x, plan.init_state(1)),
        "two norms": (x, plan.init_state(1)),
    }
    for step, tensors in enumerate(precision_inputs(steps), first):
        for name, (now, state) in ways.items():
            if name == "two norms":
                ways[name] = two_norms(plan, step, now, state, tensors)
            else:
                exact = name == "exact"
                inputs = {**tensors, "x": now, "state": state}
                inputs = upcast(inputs) if exact else inputs
                got = take(*((plan, step, inputs) if exact else (here, step, inputs, backend)))
                ways[name] = got.x_next, got.state
    exact = ways["exact"][1]
    assert bool((exact < np.log(0.99)).all()), "the clamp would hide every error"
    ours, theirs = (
        float(((ways[name][1] - exact) / exact).abs().max()) for name in ("ours", "two norms")
    )
    assert ours < LOG_POSTERIOR_FLOAT32
    assert theirs > 100 * ours, (theirs, ours)


# ---------------------------------------------------------------- the paper, whole


def smooth_networks(book: textbook.Coefficients):
    """Exact noise predictions of N(0, 0.5) and N(1, 0.3), smooth and bounded in the chain."""

    def of(mean: float, variance: float):
        def predict(x: Any, t: int) -> Any:
            bar = book.alpha_bars[t]
            return np.sqrt(1 - bar) * (x - np.sqrt(bar) * mean) / (bar * variance + 1 - bar)

        return predict

    return of(0.0, 0.5), of(1.0, 0.3)


TRACK = {"temperature": 0.3, "prior": 0.2}
PAPERS = {
    "algorithms 1 and 2": (DDPM(), PaperTracker(offset=1e-4, **TRACK)),
    "published": (DDPM("large"), PaperTracker(offset=1e-4, variance="published", **TRACK)),
    "log-odds": (
        DDPM("large"),
        LogOddsTracker(offset_nats=2.0, p_min=0.0, p_max=0.95, variance="small", **TRACK),
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_thousand_steps_are_the_papers(name):
    book = textbook.ddpm_coefficients()
    predict, predict_neg = smooth_networks(book)
    rng = np.random.default_rng(0)
    x_noise, noises = rng.normal(size=(3, 5)), rng.normal(size=(1000, 3, 5))
    common = (book, predict, predict_neg, x_noise, noises, 2.0, 0.2, 0.3)
    if name == "algorithms 1 and 2":
        expected, posterior = textbook.paper_chain(*common, 1e-4)
    elif name == "published":
        expected, posterior = textbook.published_chain(*common, 1e-4)
        posterior = np.log(posterior)
    else:
        expected, posterior = textbook.log_odds_chain(
            *common, 2.0 / 1000, 19.0, noise_variance="large"
        )
    sampler, tracker = PAPERS[name]
    rule = DynamicNegativeGuidance(2.0, tracker)
    plan = StepPlan(NoiseSchedule.linear().coefficients(sampler), rule)
    x, state = torch.from_numpy(x_noise), plan.init_state(3, torch.float64)
    tracked = []
    for step in range(1000):
        t = 999 - step
        eps, eps_neg = (torch.from_numpy(f(x.numpy(), t)) for f in (predict, predict_neg))
        x, state, *_ = dng_step(
            plan, step, x, eps, eps_neg, state, noise=torch.from_numpy(noises[t])
        )
        tracked.append(state)
    assert error(x, expected) < STEP
    assert error(state, posterior) < STEP
    # Neither always at a clamp nor constant: there was something to compare.
    assert len(torch.stack(tracked).unique()) > 1000


# ---------------------------------------------------------------- chains of exact mixtures

MIXTURE = moderate(5, "diagonal", 4, 5)
FORBIDDEN, POSITIVE, OTHERS = [1, 3], [0], [0, 2]
WEIGHT = float(MIXTURE.weights[FORBIDDEN].sum() / MIXTURE.weights.sum())
LINEAR, FLOW = NoiseSchedule.linear().respace(20), NoiseSchedule.flow(20)
DNG = DynamicNegativeGuidance
MILD = {"prior": WEIGHT, "temperature": 0.2, "p_min": 0.0}  # so that states end at no clamp
VARYING = {"temperature": TimeProfile((0.1, 0.3, 0.8), (0.05, 0.3, 0.1))}
CHAINS = {
    "paper": (DNG(1.5, PaperTracker(**MILD)), LINEAR, DDPM(), "epsilon"),
    "paper, v": (DNG(1.0, PaperTracker(prior=0.1)), LINEAR, DDPM("large"), "v_prediction"),
    "log-odds": (DNG(1.0, LogOddsTracker(**MILD)), LINEAR, DDPM(), "sample"),
    "log-odds, flow": (DNG(1.0, LogOddsTracker(**MILD)), FLOW, DDPM(), "flow_prediction"),
    "profile": (DNG(1.5, PaperTracker(**MILD | VARYING)), LINEAR, DDPM(), "epsilon"),
    "log-odds, profile": (
        DNG(1.0, LogOddsTracker(**MILD | VARYING)),
        FLOW,
        DDPM(),
        "flow_prediction",
    ),
    "negative prompting": (NegativePrompting(0.5), LINEAR, EulerMaruyama(), "epsilon"),
    "sld": (
        SafeLatentDiffusion(0.5, 0.3, slope=2.0, warmup_steps=3),
        FLOW,
        DDPM(),
        "flow_prediction",
    ),
    "sld, x0": (SafeLatentDiffusion(0.5, 0.1, "absolute"), LINEAR, DDPM(), "sample"),
    "fbg": (FeedbackGuidance(temperature=0.2, step_offset=-0.1), LINEAR, DDPM(), "v_prediction"),
    "contrastive": (ContrastiveCFG(1.0, 0.5), FLOW, DDPM(), "v_prediction"),
    # While there is noise: later the positive prediction is the base, and has no direction.
    "perp-neg": (LimitedInterval(PerpNeg(0.7, 0.4), 0.5), LINEAR, DDPM(), "sample"),
    "interval": (
        LimitedInterval(DNG(1.5, PaperTracker(**MILD)), 0.2, 0.7),
        LINEAR,
        DDPM(),
        "epsilon",
    ),
    "divergence, paper": (
        DNG(1.0, PaperTracker(divergence=True, **MILD)),
        LINEAR,
        DDIM(0.5),
        "epsilon",
    ),
    "divergence, log-odds": (
        DNG(1.0, LogOddsTracker(divergence=True, **MILD)),
        LINEAR,
        DDIM(0.5),
        "v_prediction",
    ),
    "hybrid": (
        FeedbackGuidance(temperature=0.2, step_offset=-0.1, cfg_scale=1.5, sigma_hi=5.0),
        LINEAR,
        DDPM(),
        "epsilon",
    ),
    "cfg++": (CFGPlusPlus(0.6), LINEAR, DDIM(), "epsilon"),
    # While the two predictions differ by more than rounding, for float32.
    "geoguide": (LimitedInterval(GeoGuide(0.7), 0.4), LINEAR, DDPM(), "sample"),
}
# With classifier-free guidance beneath, towards all components but one.
LED_TO, CFG_SCALE = [0, 1, 3], 1.5
BENEATH = {
    "signed": (SignedNegative(0.4), LINEAR, EulerMaruyama(), "epsilon"),
    "from the positive": (DNG(1.0, PaperTracker(**MILD)), LINEAR, DDPM(), "epsilon"),
    "from the unconditional": (
        DNG(1.0, LogOddsTracker(**MILD), "unconditional"),
        LINEAR,
        DDPM(),
        "v_prediction",
    ),
    "sld, unconditional": (SafeLatentDiffusion.preset("weak", 0.5), LINEAR, DDPM(), "epsilon"),
    "contrastive, both": (ContrastiveCFG.published(0.8, 0.5), FLOW, DDPM(), "flow_prediction"),
    "geoguide, unconditional": (
        LimitedInterval(GeoGuide(0.7, "unconditional"), 0.4),
        LINEAR,
        DDPM(),
        "epsilon",
    ),
    "crg": (LimitedInterval(CRG(0.05), 0.4), LINEAR, DDPM("large"), "epsilon"),
}
CHAINS |= BENEATH


def run_chain(name: str, dtype: Any, backend: str, device: str, n: int, seed: int = 3):
    """The mixture as a network: samples, and log posteriors along a chain of dng_step."""
    rule, schedule, sampler, kind = CHAINS[name]
    c = schedule.coefficients(sampler)
    cfg_scale = CFG_SCALE if name in BENEATH else None
    plan = StepPlan(c, rule, prediction_type=kind, cfg_scale=cfg_scale, device=device)
    parts = {"eps": MIXTURE, "eps_neg": MIXTURE.restrict(FORBIDDEN)}
    if name in BENEATH:
        parts |= {"eps": MIXTURE.restrict(LED_TO), "eps_uncond": MIXTURE}
    if rule.needs_positive and not isinstance(innermost(rule), PerpNeg):
        parts["eps_neg"] = MIXTURE.restrict(OTHERS)
    if isinstance(innermost(rule), PerpNeg):
        parts["eps_pos"] = MIXTURE.restrict(POSITIVE)
    start = noise.standard_normal(seed, n, MIXTURE.dim, stream=noise.INITIAL_STREAM)
    x = tensor(schedule.sigma[-1] * start, dtype)
    state = plan.init_state(n, dtype)
    momentum = plan.init_momentum(x.to(device))
    tracks = plan.tracker is not None
    tracked = [plan.log_posterior(state).cpu()] if tracks else []
    for step in range(len(plan)):
        now = x.double().numpy()
        alpha, sigma = c.alpha_t[step], c.sigma_t[step]
        given = {"x": x}
        for argument, part in parts.items():
            x0 = part.posterior_mean(now, alpha, sigma)
            eps = (now - alpha * x0) / sigma
            given[argument] = tensor(
                {
                    "epsilon": eps,
                    "v_prediction": alpha * eps - sigma * x0,
                    "sample": x0,
                    "flow_prediction": eps - x0,
                }[kind],
                dtype,
            )
        given["noise"] = tensor(noise.standard_normal(seed, n, MIXTURE.dim, step=step), dtype)
        if plan.needs_divergence:
            noisy = MIXTURE.diffuse(alpha, sigma)
            gap = noisy.restrict(FORBIDDEN).score_divergence(now) - noisy.score_divergence(now)
            given["divergence_gap"] = tensor(gap, dtype)
        given |= {"state": state} if state is not None else {}
        given |= {"momentum": momentum} if momentum is not None else {}
        taken = take(plan, step, given, backend)
        x, state, momentum = taken.x_next, taken.state, taken.momentum
        tracked += [plan.log_posterior(state)] if tracks else []
    return x, torch.stack(tracked) if tracked else None


def whole_chain(name: str, n: int):
    rule, schedule, sampler, _ = CHAINS[name]
    positive = POSITIVE if isinstance(innermost(rule), PerpNeg) else None
    options = {"n": n, "forbidden": FORBIDDEN, "sampler": sampler, "seed": 3}
    if name in BENEATH:
        positive, options["cfg_scale"] = LED_TO, CFG_SCALE
    record = ["tracked"] if hasattr(innermost(rule), "posterior") else []
    if isinstance(rule, FeedbackGuidance):
        record = ["tracked"]
    return sample(MIXTURE, schedule, rule, positive=positive, record=record, **options)


@pytest.mark.parametrize("backend", IN_TORCH)
@pytest.mark.parametrize("name", CHAINS)
def test_chain_of_steps_is_the_chain_of_the_exact_theory(name, backend):
    expected = whole_chain(name, 24)
    x, log_posterior = run_chain(name, torch.float64, backend, "cpu", 24)
    assert error(x, expected.x) < WHOLE_CHAIN
    assert (log_posterior is None) == (expected.tracked is None)
    if log_posterior is not None:
        assert error(log_posterior, expected.tracked[:, 0]) < WHOLE_CHAIN
        # A good part of them between the clamps, or nothing would be compared.
        assert len(log_posterior.unique()) > log_posterior.numel() / 3


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
@pytest.mark.parametrize("name", CHAINS)
def test_chain_in_float32_stays_with_the_exact_theory(name, backend, kernel_device):
    expected = whole_chain(name, 6)
    device = kernel_device if backend == "triton" else "cpu"
    x, log_posterior = run_chain(name, torch.float32, backend, device, 6)
    assert error(x, expected.x) < CHAIN_FLOAT32
    if log_posterior is not None:
        assert error(log_posterior, expected.tracked[:, 0]) < CHAIN_FLOAT32


# ---------------------------------------------------------------- the step in two halves

HALVES = ("paper", "log-odds", "fbg", "interval, paper", "log-odds, unconditional")


def in_halves(plan: StepPlan, step: int, given: dict[str, Any], backend: str):
    """Guide, a step of one's own in float64, rounded to the type of x, and the update."""
    c = plan.coefficients
    here = {name: value.to(plan.device) for name, value in given.items()}
    third = {name: here[name] for name in ("eps_uncond",) if name in here}
    found = guide(plan, step, here["eps"], here["eps_neg"], here["state"], backend=backend, **third)
    at, x = interval(plan, step), given["x"].double().numpy()
    eps = textbook.noise_of(at, x, found.eps_guided.cpu().double().numpy(), plan.prediction_type)
    x0 = textbook.predicted_x0(at, x, eps, plan.clip)
    x_next = c.x_factor[step] * x + c.x0_factor[step] * x0
    x_next = x_next + np.sqrt(c.step_var[step]) * given["noise"].double().numpy()
    x_next = tensor(x_next, given["x"].dtype)
    updated = update_posterior(
        plan,
        step,
        here["x"],
        x_next.to(plan.device),
        here["eps_uncond" if plan.from_uncond else "eps"],
        here["eps_neg"],
        here["state"],
        backend=backend,
    )
    return x_next, updated.state.cpu(), found.eps_guided.cpu()


@pytest.mark.parametrize("name", HALVES)
def test_guide_and_update_are_the_step(name):
    for seed, combination in enumerate(combinations(name)):
        plan = plan_of(BOOKS[name].rule, *combination)
        step = (0, len(plan) // 2, len(plan) - 1)[seed % 3]
        given = arguments(plan, step, seed, (2, 11))
        whole = take(plan, step, given)
        x_next, state, guided = in_halves(plan, step, given, "reference")
        assert error(x_next, whole.x_next) < STEP
        assert error(state, whole.state) < STEP
        assert torch.equal(guided, whole.eps_guided)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
@pytest.mark.parametrize("name", HALVES)
def test_guide_and_update_are_the_step_in_float32(name, backend, kernel_device):
    """What is lost is what rounding x_next to float32 hides of x_next - mu, nothing more."""
    for seed, combination in enumerate(combinations(name)):
        if seed % 5:
            continue
        plan = plan_of(
            BOOKS[name].rule, *combination, kernel_device if backend == "triton" else None
        )
        step = (0, len(plan) // 2, len(plan) - 2)[seed % 3]
        given = arguments(plan, step, seed, (2, 1100), torch.float32)
        exact = plan.to("cpu")
        whole = take(exact, step, upcast(given))
        _, state, guided = in_halves(plan, step, given, backend)
        assert torch.equal(guided, take(plan, step, given, backend).eps_guided)
        one = rounding(exact, step, given, whole)
        # The terms of the means, which a whole step never forms, and their rounding with them.
        r, a = exact.row(step), {k: v.double().numpy() for k, v in given.items()}
        seen = a["eps_uncond" if plan.from_uncond else "eps"]
        gap = np.abs(a["eps_neg"] - seen)
        on = abs(r.transition_factor) * (abs(r.x0_factor) if plan.clip is not None else 1.0)
        size = np.abs(whole.x_next.numpy()) + np.abs(r.transition_x_factor * a["x"])
        size = size + abs(r.transition_factor) * (
            plan.clip if plan.clip is not None else np.abs(seen)
        )
        odds = np.exp(a["state"]) if name.startswith("log-odds") else 0.0
        lost = (1.0 + np.minimum(odds, 19.0)) * r.temperature / r.variance
        lost = lost * on * np.sum(size * gap, axis=1)
        allowed = STEP_UNITS * (one.state + 2.0**-24 * lost)
        assert np.all((state.double() - whole.state).abs().numpy() < allowed), combination


# ---------------------------------------------------------------- memory and bits

SHAPED = [(3, 37), (2, 2 * BLOCK + 77)]


def variants() -> list[Any]:
    """Each rule with one of its variants at least; 3 has no factor with what is combined."""
    chosen = list(all_variants())[::3]
    return chosen + [case for case in all_variants() if case[0] not in {name for name, _ in chosen}]


def all_variants():
    for name in ("paper", "log-odds", "sld", "perp-neg", "ccfg", "fbg", "np"):
        for sampler in ("DDPM small", "DDIM 0.3"):
            for clip in CLIPS:
                for cfg_scale in BOOKS[name].cfg_scales:
                    yield name, (sampler, "epsilon", cfg_scale, clip)
    for name in ("sld, unconditional", "ccfg, both", "geoguide", "crg", "paper, unconditional"):
        for clip in CLIPS:
            yield name, ("DDIM 0.3", "epsilon", 3.0, clip)


def same(a: StepResult, b: StepResult, what: Any = None) -> None:
    for name, left, right in zip(StepResult._fields, a, b, strict=True):
        assert (left is None) == (right is None), (name, what)
        assert left is None or torch.equal(left, right), (name, what)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
@pytest.mark.parametrize("shape", SHAPED)
def test_outputs_may_be_the_inputs_and_hold_nothing_of_before(backend, shape, kernel_device):
    device = kernel_device if backend == "triton" else "cpu"
    for name, combination in variants():
        plan = plan_of(BOOKS[name].rule, *combination, device)
        given = arguments(plan, 4, 0, shape, torch.float32)
        given = {key: value.to(device) for key, value in given.items()}
        fresh = take(plan, 4, given, backend)
        same(take(plan, 4, given, backend), fresh, "a second run")
        own = {key: value.clone() for key, value in given.items()}
        out = StepResult(own["x"], own.get("state"), None, None, own.get("momentum"))
        same(take(plan, 4, own, backend, out=out), fresh, ("in place", name, combination))
        for prediction in ("eps", "eps_neg"):
            own = {key: value.clone() for key, value in given.items()}
            out = StepResult(None, None, own[prediction], None, None)
            same(take(plan, 4, own, backend, out=out), fresh, (prediction, name, combination))
            assert torch.equal(own[prediction].cpu(), fresh.eps_guided)
        blank = StepResult(
            *(None if v is None else torch.full_like(v, np.nan).to(device) for v in fresh)
        )
        same(take(plan, 4, given, backend, out=blank), fresh, ("NaN before", name, combination))
        same(StepResult(*(None if v is None else v.cpu() for v in blank)), fresh, "written into")


@needs_triton
@pytest.mark.parametrize("shape", SHAPED)
def test_a_sample_is_the_same_bits_alone_and_in_a_batch(shape, kernel_device):
    for name, combination in variants():
        plan = plan_of(BOOKS[name].rule, *combination, kernel_device)
        given = arguments(plan, 4, 0, shape, torch.float32)
        together = take(plan, 4, given, "triton")
        alone = take(plan, 4, {key: value[1:2] for key, value in given.items()}, "triton")
        cut = StepResult(*(None if value is None else value[1:2] for value in together))
        same(alone, cut, (name, combination))


@needs_triton
@pytest.mark.parametrize("name", ["paper", "sld", "ccfg", "ccfg, both", "perp-neg", "crg", "np"])
@pytest.mark.thinned(3)
def test_every_launch_leaves_its_counters_at_zero(name, kernel_device):
    """Or the next one would add up sums that are not there yet."""
    plan = plain_plan(name, kernel_device)
    for shape in ((3, 5), (3, BLOCK + 1), (2, 4 * BLOCK)):
        for step in (0, 4, 4, len(plan) - 1):
            given = arguments(plan, step, step, shape, torch.float32)
            take(plan, step, given, "triton")
            counters, _ = plan.workspace(shape[0], shape[1])
            assert not bool(counters.any()), (shape, step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.thinned(5)
def test_step_may_be_a_tensor(name, backend, kernel_device):
    device = kernel_device if backend == "triton" else "cpu"
    plan = plain_plan(name, device)
    for step in (0, 4, len(plan) - 1):
        given = arguments(plan, step, step, (2, 11), torch.float32)
        index = torch.tensor(step, device=device)
        same(take(plan, index, given, backend), take(plan, step, given, backend), step)
