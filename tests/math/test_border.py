"""Bad input at every public function and class of dng_math: one table, each refused clearly.

A refusal is a TypeError or ValueError whose message names the argument, says what is allowed
("must"), and shows what was given: the value, its type, or its shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import dng_math
from dng_math import (
    CRG,
    DDIM,
    DDPM,
    SPELL,
    AskedNegative,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    EulerMaruyama,
    ExactPosterior,
    FeedbackGuidance,
    FeynmanKac,
    GaussianMixture,
    GeoGuide,
    ImageReferenced,
    LimitedInterval,
    LogOddsTracker,
    NegativeAwareSubtraction,
    NegativePrompting,
    NoiseSchedule,
    NormalizedAttention,
    PaperTracker,
    PathTracker,
    PerpNeg,
    ProbabilityFlow,
    SafeLatentDiffusion,
    SignedNegative,
    StepCoefficients,
    TimeProfile,
    ValueSignFlip,
    distances,
    divergence_correction,
    divergence_gap,
    guided_density,
    guided_log_density,
    noise,
    path_ends,
    predict,
    sample,
)
from dng_math.density import TargetDensity1D
from dng_math.trackers import (
    at_steps,
    log_odds_from_log_posterior,
    log_posterior_from_log_odds,
    temperatures,
)

MIXTURE = GaussianMixture([0.3, 0.3, 0.4], [[-1.0], [0.0], [2.0]], [0.1, 0.2, 0.3], ["a", "b", "a"])
LABELLED = MIXTURE
SCHEDULE = NoiseSchedule.linear(10)
COEFFICIENTS = SCHEDULE.coefficients()
TARGET = guided_density(MIXTURE, [0], 1.0)
GUIDED = guided_log_density(MIXTURE, [0], 2.0)
X = np.zeros((2, 1))


class Own:
    """A rule of one's own that returns what it is made with."""

    needs_positive = several_concepts = False

    def __init__(self, result: Any) -> None:
        self.result = result

    def init(self, n: int, dimensions: int) -> None:
        return None

    def guide(self, predictions: Any, memory: Any) -> Any:
        return self.result


class Steps:
    """A sampler of one's own that returns what it is made with."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def coefficients(self, schedule: Any) -> Any:
        return self.result


# ---------------------------------------------------------------- kinds of bad values

NAN, INF = float("nan"), float("inf")
RAGGED = [[1.0, 2.0], [3.0]]
NO_REAL: list[Any] = ["0.5", True, None, 1j, [0.5], {}, NAN, INF, 10**400, np.array([0.5, 0.5])]
NO_INTEGER: list[Any] = [1.5, "3", True, None, NAN, [2], -1, object()]
NO_BOOLEAN: list[Any] = [1, "yes", None, 0.0]
NO_CHOICE: list[Any] = ["nope", 5, None, ["small"], b"small"]
NO_ARRAY: list[Any] = [
    RAGGED,
    "abc",
    {},
    {1.0, 2.0},
    [1j, 2j],
    [None, None],
    [True, False],
    ["1", "2"],
    np.array(["2020-01-01"], dtype="M8[D]"),
    np.zeros(3, dtype=[("a", float)]),
    lambda x: x,
    iter([1.0]),
    [[[[1.0]]]],
]
NO_FINITE_ARRAY: list[Any] = [*NO_ARRAY, [[NAN]], [[INF]]]
NO_COMPONENTS: list[Any] = [
    RAGGED, "a", 1.0, [0.5], [-1], [3], [], {}, [None], [True], [[0], [0.5]], [1j], 10**30,
]  # fmt: skip
NO_GENERATOR: list[Any] = ["seed", 1.5, -1, [1, 2], np.random.default_rng, True]
NO_MIXTURE: list[Any] = ["mixture", None, GaussianMixture, X]
NO_RULE: list[Any] = ["dng", 1.0, NegativePrompting, DynamicNegativeGuidance, {}]
NO_SAMPLER: list[Any] = ["ddpm", DDPM, DDIM, 0.0, Steps(None), Steps([1, 2])]
NO_SCHEDULE: list[Any] = ["linear", None, NoiseSchedule, [1.0, 0.5], NoiseSchedule.linear, 10]
NO_TRACKER: list[Any] = ["paper", None, PaperTracker, LogOddsTracker, 0.5]
HUGE = 10**15


@dataclass(frozen=True)
class Case:
    """One bad value of one argument of a call that is right otherwise."""

    call: Callable[..., Any]
    options: dict[str, Any]
    argument: str
    value: Any
    named: str  # what the message must call it

    def __str__(self) -> str:
        name = getattr(self.call, "__qualname__", type(self.call).__name__)
        shown = re.sub(r"0x[0-9a-f]+|[^ -~]", "", repr(self.value))[:40]
        return f"{name}({self.argument}={shown})"


def bad(
    call: Callable[..., Any], options: dict[str, Any], named: str | None = None, **values: list[Any]
) -> Iterator[Case]:
    """Each bad value of each argument in place of the good one in ``options``."""
    for argument, wrong in values.items():
        for value in wrong:
            yield Case(call, options, argument, value, named or argument)


def without(values: list[Any], *fine: Any) -> list[Any]:
    """A kind of bad values less those that an argument takes."""
    return [v for v in values if not any(v is f or (type(v) is type(f) and v == f) for f in fine)]


WEIGHTS = {"weights": [0.5, 0.5], "means": [[0.0], [1.0]], "covariances": [1.0, 1.0]}
LEVEL = {"alpha": 0.8, "sigma": 0.6}
CHAIN = {"mixture": MIXTURE, "schedule": SCHEDULE, "rule": NegativePrompting(), "n": 2,
         "forbidden": [0]}  # fmt: skip
PREDICT = {"mixture": MIXTURE, "x": X, **LEVEL, "rule": NegativePrompting(), "forbidden": [0]}
UPDATE = {
    "state": np.full((1, 2), -1.0), "gap_sq": np.ones((1, 2)), "residual_gap": np.zeros((1, 2)),
    "variance": 0.1, "steps": 10,
}  # fmt: skip
CORRECTION = {
    "mixture": MIXTURE, "x": X, "coefficients": SCHEDULE.coefficients(DDIM(0.0)), "step": 2,
    "tracker": PaperTracker(divergence=True), "state": np.full((1, 2), -1.0), "forbidden": [0],
}  # fmt: skip
ONES = np.ones((1, 2))
OPTIONAL_REAL = without(NO_REAL, None)
OPTIONAL_INTEGER = without(NO_INTEGER, None)
PARTS = {name: getattr(COEFFICIENTS, name) for name in vars(COEFFICIENTS)}

TABLE: list[Case] = [
    # the mixture
    *bad(
        GaussianMixture,
        WEIGHTS,
        weights=[*NO_FINITE_ARRAY, [], [-1.0, 1.0], [0.0, 0.0], 1.0],
        means=[*NO_FINITE_ARRAY, [[], []], [0.0, 1.0], [[1.0]]],
        covariances=[
            *NO_FINITE_ARRAY,
            [0.0, 1.0],
            [-1.0, 1.0],
            1.0,
            [[[1.0, 2.0], [0.0, 1.0]]] * 2,
        ],
        labels=[["a"], [["a", "b"]], "ab", 5, RAGGED],
        covariance_type=[*without(NO_CHOICE, None), "Full"],
    ),
    *bad(
        GaussianMixture.from_points,
        {"points": [[0.0], [1.0]], "bandwidth": 0.1},
        points=[*NO_FINITE_ARRAY, [], [0.0, 1.0]],
        bandwidth=[*NO_REAL, 0.0, -1.0],
        labels=[["a"], RAGGED],
        weights=[RAGGED, [1.0], [NAN, 1.0], [-1.0, 2.0], "ab"],
    ),
    *bad(MIXTURE.diffuse, LEVEL, alpha=[*NO_REAL, -0.5], sigma=[*NO_REAL, -0.5]),
    *bad(LABELLED.components, {}, label=["c", 5, [], ["a", "c"], None, [["a"]], [["a", "b"]]]),
    *bad(MIXTURE.component_indices, {"name": "c"}, named="c", components=NO_COMPONENTS),
    *bad(MIXTURE.restrict, {}, components=NO_COMPONENTS),
    *(
        case
        for call in (
            MIXTURE.log_prob,
            MIXTURE.responsibilities,
            MIXTURE.score,
            MIXTURE.score_divergence,
        )
        for case in bad(call, {}, x=[*NO_FINITE_ARRAY, [0.0], [[0.0, 0.0]]])
    ),
    *(
        case
        for call in (
            MIXTURE.log_odds,
            MIXTURE.log_posterior,
            MIXTURE.posterior,
            MIXTURE.log_posterior_gradient,
        )
        for case in bad(
            call,
            {"x": X, "components": [0]},
            x=[RAGGED, None, [0.0], [[NAN]]],
            components=NO_COMPONENTS,
        )
    ),
    *bad(MIXTURE.log_posterior, {"x": X, "components": [0]}, complement=NO_BOOLEAN),
    *(
        case
        for call in (
            MIXTURE.noise_prediction,
            MIXTURE.posterior_mean,
            MIXTURE.posterior_covariance,
        )
        for case in bad(
            call,
            {"x": X, **LEVEL},
            x=[RAGGED, None, [0.0], [[NAN]]],
            alpha=[*NO_REAL, -0.5],
            sigma=[*NO_REAL, -0.5],
        )
    ),
    *bad(
        MIXTURE.reverse_transition,
        {"x": [0.0], "alpha_t": 0.5, "sigma_t": 0.8, "alpha_s": 0.9, "sigma_s": 0.3},
        x=[*NO_FINITE_ARRAY, [[0.0]], [0.0, 0.0]],
        alpha_t=[*NO_REAL, -0.5],
        sigma_t=[*NO_REAL, -0.5, 0.1],
        alpha_s=[*NO_REAL, 0.0],
        sigma_s=[*NO_REAL, 5.0],
    ),
    *bad(MIXTURE.sample, {"n": 2}, n=[*NO_INTEGER, HUGE], rng=NO_GENERATOR),
    *bad(MIXTURE.sample_labelled, {"n": 2}, n=NO_INTEGER, rng=NO_GENERATOR),
    # schedules and samplers
    *bad(
        NoiseSchedule,
        {"alpha": [1.0, 0.5], "sigma": [0.0, 0.8]},
        alpha=[*NO_FINITE_ARRAY, [1.0], [0.9, 0.5], [1.0, 1.5], [1.0, -0.5]],
        sigma=[*NO_FINITE_ARRAY, [0.0], [0.1, 0.8], [0.0, 0.0], [0.0, -0.5]],
        time=[*without(NO_FINITE_ARRAY, None), [0.0, 0.5], [1.0, 0.0], [0.0]],
    ),
    *bad(
        NoiseSchedule.from_alpha_bar, {}, alpha_bar=[*NO_FINITE_ARRAY, [], [1.0], [0.5, 0.6], 0.5]
    ),
    *bad(NoiseSchedule.from_betas, {}, betas=[*NO_FINITE_ARRAY, [], [0.0], [1.5], 0.5]),
    *bad(
        NoiseSchedule.power,
        {"steps": 5},
        steps=[*NO_INTEGER, 0, HUGE],
        rho=[*NO_REAL, 0.0],
        beta_min=[*NO_REAL, 0.0, 1.0],
        beta_max=[*NO_REAL, 0.0, 1.0],
    ),
    *(
        case
        for call in (NoiseSchedule.linear, NoiseSchedule.scaled_linear)
        for case in bad(
            call,
            {"steps": 5},
            steps=[*NO_INTEGER, 0],
            beta_min=[*NO_REAL, 0.0],
            beta_max=[*NO_REAL, 1.0],
        )
    ),
    *bad(
        NoiseSchedule.cosine,
        {"steps": 5},
        steps=[*NO_INTEGER, 0],
        s=[*NO_REAL, -1.0],
        beta_max=[*NO_REAL, 0.0, 1.0],
    ),
    *bad(NoiseSchedule.flow, {}, steps=[*NO_INTEGER, 0, HUGE]),
    *bad(
        NoiseSchedule.variance_exploding,
        {"steps": 5},
        steps=[*NO_INTEGER, 1],
        sigma_min=[*NO_REAL, 0.0, 100.0],
        sigma_max=[*NO_REAL, 0.001],
        rho=[*OPTIONAL_REAL, 0.0],
    ),
    *bad(
        SCHEDULE.select,
        {},
        indices=[
            RAGGED,
            "a",
            3,
            [0.5],
            [-1],
            [11],
            [],
            {},
            [None],
            [True],
            [[1]],
            [1j],
            [0],
            10**30,
        ],
    ),
    *bad(SCHEDULE.respace, {}, steps=[*NO_INTEGER, 0, 11]),
    *bad(SCHEDULE.coefficients, {}, sampler=NO_SAMPLER),
    *bad(DDPM, {}, variance=NO_CHOICE),
    *bad(DDIM, {}, eta=[*NO_REAL, -0.1, 1.1]),
    *(
        case
        for sampler in (DDPM(), DDIM(), EulerMaruyama(), ProbabilityFlow())
        for case in bad(sampler.coefficients, {}, schedule=NO_SCHEDULE)
    ),
    *bad(EulerMaruyama().coefficients, {}, schedule=[NoiseSchedule.flow(5)]),
    *bad(COEFFICIENTS.tracker_variance, {}, choice=NO_CHOICE),
    *bad(
        StepCoefficients,
        PARTS,
        time=[RAGGED, None, "abc", [NAN] * 10, [0.5]],
        step_var=[RAGGED, None, "abc", [NAN] * 10, [0.5] * 3],
    ),
    # rules
    *(
        case
        for rule in (
            ClassifierFreeGuidance,
            ClassifierGuidance,
            NegativePrompting,
            ContrastiveCFG,
            PerpNeg,
            DynamicNegativeGuidance,
            SafeLatentDiffusion,
            SignedNegative,
            GeoGuide,
            CRG,
            CFGPlusPlus,
        )
        for case in bad(rule, {}, guidance_scale=NO_REAL)
    ),
    *(
        case
        for rule in (
            NegativePrompting,
            SignedNegative,
            SafeLatentDiffusion,
            ContrastiveCFG,
            DynamicNegativeGuidance,
            DynamicNegativeGuidance.tracked,
            GeoGuide,
        )
        for case in bad(rule, {}, reference=[*NO_CHOICE, "Positive", "null"])
    ),
    *bad(
        SafeLatentDiffusion.preset,
        {"level": "weak"},
        level=[*NO_CHOICE, "Weak"],
        guidance_scale=NO_REAL,
    ),
    *bad(ContrastiveCFG.published, {}, guidance_scale=NO_REAL, temperature=[*NO_REAL, -1.0]),
    *bad(ContrastiveCFG, {}, positive_factor=NO_BOOLEAN),
    *bad(FeedbackGuidance.published, {}, hybrid=NO_BOOLEAN),
    *(
        case
        for rule in (NormalizedAttention, ValueSignFlip, NegativeAwareSubtraction)
        for case in bad(
            rule,
            {"scale": 1.0},
            scale=NO_REAL,
            end=[*NO_REAL, -0.1, 1.1],
            gate=["dng", 3.0, NegativePrompting()],
            gate_bound=[*NO_REAL, -0.1, 1.1],
        )
    ),
    *bad(
        NormalizedAttention,
        {},
        tau=[*without(NO_REAL, INF), 0.5],
        alpha=[*NO_REAL, -0.1, 1.1],
    ),
    *bad(CRG, {}, gain=[*NO_REAL, 0.0], threshold=NO_REAL),
    *bad(
        AskedNegative,
        {"ask": lambda x0, step: [True] * len(x0)},
        ask=["it", None, NegativePrompting, [True, False]],
        guidance_scale=NO_REAL,
        reference=[*NO_CHOICE, "null"],
        at=[3, "5", (), None, [1.5], [-1], [50], {}, [[1]], [True]],
        of=[*OPTIONAL_INTEGER, 0],
    ),
    *bad(
        SPELL,
        {"points": [[0.0], [1.0]], "radius": 1.0},
        points=[*NO_FINITE_ARRAY, [], [[], []], [0.0, 1.0]],
        radius=[*NO_REAL, 0.0],
        guidance_scale=NO_REAL,
    ),
    *bad(
        ImageReferenced,
        {"points": [[0.0], [1.0]], "prior": 0.2},
        points=[*NO_FINITE_ARRAY, [], [[], []], [0.0, 1.0]],
        prior=[*NO_REAL, 0.0, 1.0],
        guidance_scale=NO_REAL,
        bandwidth=[*NO_REAL, -1.0],
        p_max=[*NO_REAL, 0.0, 1.0],
        reference=[*NO_CHOICE, "null"],
    ),
    *bad(
        FeynmanKac,
        {},
        resample_below=[*NO_REAL, -0.1, 1.1],
        largest_increment=[*OPTIONAL_REAL, 0.0],
    ),
    *bad(
        SafeLatentDiffusion,
        {},
        threshold=NO_REAL,
        gate=NO_CHOICE,
        slope=[*NO_REAL, -1.0],
        momentum_scale=NO_REAL,
        momentum_decay=[*NO_REAL, 1.5],
        warmup_steps=NO_INTEGER,
    ),
    *bad(PerpNeg, {}, positive_scale=NO_REAL),
    *bad(ContrastiveCFG, {}, temperature=[*NO_REAL, -1.0]),
    *bad(DynamicNegativeGuidance, {}, posterior=[*NO_TRACKER, ExactPosterior]),
    *bad(
        FeedbackGuidance,
        {},
        pi=[*NO_REAL, 0.0, 1.0],
        lambda_max=[*NO_REAL, 1.0],
        t0=[*NO_REAL, 0.0],
        t1=[*NO_REAL, 1.0],
        temperature=[*OPTIONAL_REAL, -1.0],
        step_offset=OPTIONAL_REAL,
        lambda_ref=[*NO_REAL, 1.0],
        log_ratio_max=[*NO_REAL, 0.0],
        cfg_scale=[*NO_REAL, 0.9, 10.0],
        sigma_lo=[*NO_REAL, -0.1],
        sigma_hi=[*OPTIONAL_REAL, -0.1],
    ),
    *bad(FeedbackGuidance, {"sigma_lo": 0.5, "sigma_hi": 2.0}, sigma_lo=[2.1]),
    *bad(
        LimitedInterval,
        {"rule": NegativePrompting(), "t_lo": 0.2, "t_hi": 0.8},
        rule=[*NO_RULE, None],
        t_lo=[*NO_REAL, -0.1, 0.9],
        t_hi=[*NO_REAL, 1.1, 0.1],
    ),
    *bad(FeedbackGuidance().tracker, {}, coefficients=[None, SCHEDULE, "c", StepCoefficients]),
    # trackers
    *(
        case
        for tracker in (PaperTracker, LogOddsTracker)
        for case in bad(
            tracker,
            {},
            prior=[*OPTIONAL_REAL, 0.0, 1.0, 1e-9],
            temperature=[*NO_REAL, -1.0],
            offset=NO_REAL,
            offset_nats=NO_REAL,
            p_min=[*NO_REAL, -0.1, 0.995],
            p_max=[*NO_REAL, 1.0],
            variance=NO_CHOICE,
            divergence=NO_BOOLEAN,
        )
    ),
    *(
        case
        for tracker in (PaperTracker(), LogOddsTracker())
        for case in (
            *bad(
                tracker.update,
                UPDATE,
                state=[RAGGED, None, "a", [[NAN, 0.0]], [True, False], [1j, 0], [-1.0] * 5],
                gap_sq=[RAGGED, None, "a", [[NAN, 0.0]], [-1.0], [INF], [1.0] * 5],
                residual_gap=[RAGGED, None, "a", [[NAN, 0.0]], [INF], [1.0] * 5],
                variance=[*NO_REAL, -1.0],
                steps=[*NO_INTEGER, 0],
                correction=[RAGGED, None, "a", NAN, [INF], [1.0] * 5],
            ),
            *bad(tracker.init, {}, prior=[RAGGED, None, "a", NAN, -0.5, 2.0, [True], 1j]),
            *bad(tracker.odds, {}, state=[RAGGED, None, "a", NAN, [True], [1j]]),
            *bad(tracker.log_posterior, {}, state=[RAGGED, None, "a", NAN, [True], [1j]]),
        )
    ),
    *bad(
        PathTracker,
        {},
        prior=[*OPTIONAL_REAL, 0.0, 1.0, 1e-9],
        temperature=[*NO_REAL, -1.0],
        offset_nats=NO_REAL,
        p_min=[*NO_REAL, -0.1, 0.995],
        p_max=[*NO_REAL, 1.0],
        compare=NO_CHOICE,
        probes=[*NO_INTEGER, -1],
    ),
    *bad(
        PathTracker().update,
        {"state": np.full((1, 2), -1.0), "before": ONES, "after": ONES, "steps": 10},
        state=[RAGGED, None, "a", [[NAN, 0.0]], [True, False], [1j, 0], [-1.0] * 5],
        before=[RAGGED, None, "a", [[NAN, 0.0]], [INF], [1.0] * 5],
        after=[RAGGED, None, "a", [[NAN, 0.0]], [INF], [1.0] * 5],
        steps=[*NO_INTEGER, 0],
    ),
    *bad(
        TimeProfile,
        {"times": (0.2, 0.8), "values": (0.5, 1.0)},
        times=[*NO_FINITE_ARRAY, (0.8, 0.2), (-0.1, 0.5), (0.5,), ()],
        values=[*NO_FINITE_ARRAY, (-1.0, 1.0), (1.0,)],
    ),
    *bad(TimeProfile((0.5,), (1.0,)).over, {}, coefficients=[None, SCHEDULE, "c"]),
    *(
        case
        for call in (at_steps, temperatures)
        for case in bad(
            call,
            {"tracker": PaperTracker(), "coefficients": COEFFICIENTS},
            tracker=NO_TRACKER,
            coefficients=[None, SCHEDULE, "c", StepCoefficients],
        )
    ),
    *bad(log_posterior_from_log_odds, {}, log_odds=[*NO_ARRAY[:-1], NAN]),
    *bad(log_odds_from_log_posterior, {}, log_posterior=[*NO_ARRAY[:-1], NAN, 0.5, INF]),
    # chains
    *bad(
        sample,
        CHAIN,
        mixture=NO_MIXTURE,
        schedule=NO_SCHEDULE,
        rule=NO_RULE,
        n=[*NO_INTEGER, HUGE],
        forbidden=[*NO_COMPONENTS, [0, 1, 2], [[0], [0]], None, [[0], [1]]],
        positive=without(NO_COMPONENTS, None),
        sampler=NO_SAMPLER,
        seed=[*NO_INTEGER, 2**64],
        first_sample=[*NO_INTEGER, 2**63],
        initial=[
            "zero",
            RAGGED,
            None,
            5,
            [[NAN], [0.0]],
            [[0.0]],
            [["a"], ["b"]],
            [[True], [False]],
        ],
        record=[
            "exact",
            5,
            None,
            ["all"],
            [5],
            {"scale": 1, "x": 2},
            ["tracked"],
            [["scale"]],
            True,
        ],
        threads=[*OPTIONAL_INTEGER, 0],
        engine=["gpu", 5, None, ["fused"]],
        cfg_scale=OPTIONAL_REAL,
        weights=[0.5, True, "half", FeynmanKac, FeynmanKac(), {}],
    ),
    *bad(
        sample,
        {**CHAIN, "engine": "reference"},
        named="rule",
        rule=[
            Own(None),
            Own(np.zeros((2, 1))),
            Own((None, None, None)),
            Own(("a", "b", None)),
            Own((np.zeros(2), np.ones((1, 2)), None)),
            Own((X, np.ones(2), None)),
            Own((X + NAN, np.ones((1, 2)), None)),
            Own((X, np.full((1, 2), INF), None)),
        ],
    ),
    *bad(
        predict,
        PREDICT,
        mixture=NO_MIXTURE,
        x=[*NO_FINITE_ARRAY, [0.0], [[0.0, 0.0]]],
        alpha=[*NO_REAL, -1.0],
        sigma=[*NO_REAL, 0.0],
        rule=NO_RULE,
        forbidden=[*NO_COMPONENTS, None, [0, 1, 2]],
        positive=without(NO_COMPONENTS, None),
        prediction_type=NO_CHOICE,
        log_posterior=[-1.0, "a"],
        memory=[X, "a"],
        step=OPTIONAL_INTEGER,
        time=[*OPTIONAL_REAL, -0.1, 1.1],
        cfg_scale=OPTIONAL_REAL,
        coefficients=[SCHEDULE, "c", StepCoefficients, 5],
    ),
    *bad(
        predict,
        {**PREDICT, "rule": GeoGuide(), "step": 3, "coefficients": COEFFICIENTS},
        step=[*NO_INTEGER, 10],
        coefficients=[None, SCHEDULE, "c", StepCoefficients],
    ),
    *bad(
        predict,
        {**PREDICT, "rule": DynamicNegativeGuidance(1.0, PaperTracker())},
        log_posterior=[None, "a", NAN, 0.5, INF, RAGGED, [[True, False]], [1j, 1j], [-1.0] * 3],
    ),
    *bad(
        predict,
        {**PREDICT, "rule": SafeLatentDiffusion()},
        memory=[None, "a", RAGGED, [[NAN], [0.0]], [0.0, 0.0], [[True], [False]]],
    ),
    *bad(
        divergence_gap,
        {"mixture": MIXTURE, "x": X, **LEVEL, "forbidden": [0]},
        mixture=NO_MIXTURE,
        x=[RAGGED, None, [0.0]],
        alpha=[*NO_REAL, -1.0],
        sigma=[*NO_REAL, 0.0],
        forbidden=[*NO_COMPONENTS, None],
    ),
    *bad(
        path_ends,
        {"mixture": MIXTURE, "x": X, **LEVEL, "forbidden": [0], "previous": (X, 0.7, 0.7)},
        mixture=NO_MIXTURE,
        x=[RAGGED, None, [0.0]],
        alpha=[*NO_REAL, -1.0],
        sigma=[*NO_REAL, 0.0],
        forbidden=[*NO_COMPONENTS, None],
        previous=["a", X, (X, 0.7), (X, 0.9, 0.1), (X[:1], 0.7, 0.7)],
    ),
    *bad(
        divergence_correction,
        CORRECTION,
        mixture=NO_MIXTURE,
        x=[RAGGED, None, [0.0]],
        coefficients=[None, SCHEDULE, "c", StepCoefficients],
        step=[*NO_INTEGER, 10],
        tracker=[*NO_TRACKER, PaperTracker(), ExactPosterior()],
        state=[RAGGED, None, "a", -1.0, [[NAN, 0.0]], [[True, False]]],
        forbidden=[*NO_COMPONENTS, None],
    ),
    # densities and distances
    *bad(
        guided_log_density,
        {"mixture": MIXTURE, "components": [0], "guidance_scale": 2.0},
        mixture=NO_MIXTURE,
        components=[*NO_COMPONENTS, [0, 1, 2]],
        guidance_scale=NO_REAL,
    ),
    *bad(
        guided_density,
        {"mixture": MIXTURE, "components": [0], "guidance_scale": 2.0},
        mixture=NO_MIXTURE,
        components=[*NO_COMPONENTS, [0, 1, 2]],
        guidance_scale=NO_REAL,
        bounds=["ab", 5, (0.0,), (1.0, 0.0), (NAN, 1.0), ("a", "b"), RAGGED, (0.0, INF), {}],
    ),
    *bad(GUIDED, {}, x=[*NO_FINITE_ARRAY, [0.0]]),
    *bad(GUIDED.score, {}, x=[RAGGED, None, [0.0]]),
    *bad(GUIDED.sample, {"n": 2}, n=[*NO_INTEGER, HUGE], rng=NO_GENERATOR),
    *bad(GUIDED.log_normaliser, {"draws": 1000}, draws=[*OPTIONAL_INTEGER, 5], rng=NO_GENERATOR),
    *bad(
        TargetDensity1D,
        {"log_density": lambda x: -0.5 * x * x, "lo": -8.0, "hi": 8.0},
        log_density=[
            "a",
            None,
            5,
            lambda x: None,
            lambda x: "a",
            lambda x: x[:1],
            lambda x: x * NAN,
            lambda x: x > 0,
            lambda x: x * 1j,
            lambda x: 0.0 * x - INF,
        ],
        lo=[*NO_REAL, 9.0],
        hi=[*NO_REAL, -9.0],
        breakpoints=[RAGGED, "a", [NAN], [99.0], [True], [None], {}],
    ),
    *bad(TARGET.pdf, {}, x=[*NO_ARRAY[:-1], NAN]),
    *bad(TARGET.cdf, {}, x=[*NO_ARRAY[:-1], NAN]),
    *bad(TARGET.quantile, {}, q=[*NO_ARRAY[:-1], NAN, -0.1, 1.1]),
    *bad(
        TARGET.mass,
        {"lo": 0.0, "hi": 1.0},
        lo=[RAGGED, None, "a", NAN, 2.0],
        hi=[RAGGED, None, "a", NAN, -1.0, [1.0, 2.0, NAN]],
    ),
    *bad(TARGET.mass, {"lo": [0.0, 0.0], "hi": 1.0}, hi=[[1.0, 1.0, 1.0]]),
    *bad(
        distances.ks_statistic,
        {"samples": [0.0, 1.0], "cdf": TARGET.cdf},
        samples=[*NO_FINITE_ARRAY, []],
        cdf=["a", None, lambda x: None, lambda x: x[:1], lambda x: x + 5, lambda x: x * NAN],
    ),
    *bad(
        distances.ks_critical_value,
        {"n": 5, "alpha": 0.1},
        n=[*NO_INTEGER, 0],
        alpha=[*NO_REAL, 0.0, 1.0],
    ),
    *bad(
        distances.wasserstein1,
        {"samples": [0.0, 1.0], "target": TARGET},
        samples=[*NO_FINITE_ARRAY, []],
        target=[*NO_FINITE_ARRAY, []],
    ),
    *bad(
        distances.kl_to_target,
        {"samples": [0.0, 1.0], "target": TARGET, "bins": 5},
        samples=[RAGGED, None, []],
        target=[None, "a", [0.0], TARGET.pdf],
        bins=[*NO_INTEGER[:-1], 0, [1.0], [1.0, 0.0], [0.0, NAN], RAGGED, HUGE],
        direction=NO_CHOICE,
        pseudocount=[*NO_REAL, -1.0],
    ),
    *bad(
        distances.forbidden_mass,
        {"samples": X, "mixture": MIXTURE, "components": [0]},
        samples=[*NO_FINITE_ARRAY, [], [0.0], np.zeros((2, 2))],
        mixture=NO_MIXTURE,
        components=NO_COMPONENTS,
    ),
    *bad(
        distances.sliced_wasserstein,
        {"samples": X, "reference": X},
        samples=[*NO_FINITE_ARRAY, []],
        reference=[*NO_FINITE_ARRAY, [], np.zeros((2, 2))],
        n_projections=[*NO_INTEGER, 0],
        seed=NO_INTEGER,
        p=[*NO_REAL, 0.5],
    ),
    *bad(
        distances.kl_categorical,
        {"ideal": [0.5, 0.5], "counts": [1, 2]},
        ideal=[*NO_FINITE_ARRAY, [], [0.5, 0.6], [-0.5, 1.5]],
        counts=[*NO_FINITE_ARRAY, [], [1.0], [-1, 2], [0, 0]],
        pseudocount=[*NO_REAL, -1.0],
    ),
    *bad(
        distances.frechet_distance,
        {"samples": np.eye(2), "reference": np.eye(2)},
        samples=[*NO_FINITE_ARRAY, [], [[0.0, 0.0]], ([0.0],), ([0.0], [[1.0]], 3)],
        reference=[
            *NO_FINITE_ARRAY,
            [],
            np.eye(3),
            ([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
            ([0.0, 0.0], -np.eye(2)),
            ([0.0], np.eye(2)),
        ],
    ),
    *bad(
        distances.binomial_interval,
        {"successes": 1, "n": 5},
        successes=[*NO_INTEGER, 6],
        n=[*NO_INTEGER, 0],
        confidence=[*NO_REAL, 0.0, 1.0],
    ),
    # noise
    *bad(
        noise.standard_normal,
        {"seed": 0, "n": 2, "dimensions": 1},
        seed=[*NO_INTEGER, 2**64],
        n=[*NO_INTEGER, HUGE],
        dimensions=[*NO_INTEGER, 2**40],
        step=[*NO_INTEGER, 2**40],
        first_sample=[*NO_INTEGER, 2**63],
        stream=[*NO_INTEGER, 2**20],
        threads=[*OPTIONAL_INTEGER, 0],
    ),
    *bad(
        noise.standard_uniform,
        {"seed": 0, "n": 2},
        seed=[*NO_INTEGER, 2**64],
        n=[*NO_INTEGER, HUGE],
        first_sample=[*NO_INTEGER, 2**63],
        stream=[*NO_INTEGER, 2**20],
    ),
]


def verdict(case: Case) -> str:
    """ "clear", or what is wrong with the refusal."""
    try:
        case.call(**{**case.options, case.argument: case.value})
    except (TypeError, ValueError) as error:
        message = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    if not re.search(rf"\b{case.named}\b", message):
        return f"does not name {case.named}: {message}"
    if "must" not in message:
        return f"does not say what is allowed: {message}"
    if not re.search(r"\bgot\b|\bis not\b|\d", message):
        return f"does not say what was given: {message}"
    if len(message) > 600:
        return f"is {len(message)} characters long"
    return "clear"


CALLS = sorted({str(case).partition("(")[0] for case in TABLE})


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_refused_clearly(name):
    cases = [case for case in TABLE if str(case).partition("(")[0] == name]
    wrong = {str(case): verdict(case) for case in cases}
    assert cases and {case: said for case, said in wrong.items() if said != "clear"} == {}


def test_every_good_call_is_accepted():
    """What is refused in the table is refused for the one value that was put in."""
    good = {id(case.options): case for case in TABLE if case.argument in case.options}
    assert len(good) > 30
    for case in good.values():
        case.call(**case.options)


def test_every_public_name_is_in_the_table():
    """Classes and functions; samplers and rules without parameters have nothing to refuse."""
    seen = {str(case).partition("(")[0].partition(".")[0] for case in TABLE}
    public = {name for name in dng_math.__all__ if not name.startswith("__")}
    results = {"ChainResult", "GuidedPrediction"}
    assert public - seen - results == {"ExactPosterior", "Unguided"}
