"""What a plan refuses by the rule: each with its reason, and with what to do instead."""

from __future__ import annotations

import pytest
import torch

from dng_kernels import StepPlan, dng_step, guide
from dng_math import (
    CRG,
    DDIM,
    SPELL,
    AskedNegative,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    ImageReferenced,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    NormalizedAttention,
    PathTracker,
    SafeLatentDiffusion,
    SignedNegative,
)

LINEAR = NoiseSchedule.linear().respace(5)
C = LINEAR.coefficients()
DNG = DynamicNegativeGuidance(2.0, LogOddsTracker(prior=0.1))


@pytest.mark.parametrize(
    ("rule", "cure"),
    [
        (SPELL([[0.0]], 1.0), "dng_models.sample and apply_guidance move the prediction"),
        (ImageReferenced([[0.0]], 0.1), "track it, with a DynamicNegativeGuidance"),
        (LimitedInterval(SPELL([[0.0]], 1.0), 0.1, 0.9), "before an unguided step"),
    ],
    ids=repr,
)
def test_a_rule_that_the_step_has_not_is_refused_by_name(rule, cure):
    name = type(getattr(rule, "rule", rule)).__name__
    with pytest.raises(ValueError, match=rf"rule must be one that the step.*{name}") as caught:
        StepPlan(C, rule)
    assert cure in str(caught.value)


def test_rules_of_attention_act_elsewhere():
    with pytest.raises(ValueError, match="rule must act on predictions.*NormalizedAttention"):
        StepPlan(C, NormalizedAttention())


def test_a_rule_that_asks_is_another_one_in_pipelines():
    rule = AskedNegative(lambda x0, step: [True] * len(x0))
    for asked in (rule, LimitedInterval(rule, 0.1, 0.9)):
        with pytest.raises(ValueError, match="needs predictions only.*DynamicPrompts.*got Ask"):
            StepPlan(C, asked)


@pytest.mark.parametrize("rule", [CRG(), ContrastiveCFG(1.0, 1.0, True)], ids=repr)
def test_a_rule_that_compares_positive_and_unconditional_needs_both(rule):
    with pytest.raises(ValueError, match="cfg_scale must be given for .*got None"):
        StepPlan(C, rule)
    assert StepPlan(C, rule, cfg_scale=1.0).needs_uncond


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": NegativePrompting()}, "the rule is DynamicNegativeGuidance"),
        ({"cfg_scale": 2.0}, "cfg_scale is None"),
        ({"clip": 1.0}, "clip is None"),
        ({"coefficients": LINEAR.coefficients(DDIM())}, "all steps but the last add noise"),
        ({"coefficients": LINEAR.coefficients(DDIM(0.5))}, "or the tracker a PathTracker"),
    ],
)
def test_weights_that_two_sums_do_not_hold_are_refused(options, words):
    given = {"coefficients": C, "rule": DNG, "weighted": True, "_warn": False} | options
    with pytest.raises(ValueError, match=f"weighted must be False unless .*{words}"):
        StepPlan(**given)
    with pytest.raises(TypeError, match="weighted must be True or False, got 1"):
        StepPlan(C, DNG, weighted=1)


def test_a_path_tracker_has_weights_with_any_noise():
    rule = DynamicNegativeGuidance(2.0, PathTracker(prior=0.1))
    plan = StepPlan(LINEAR.coefficients(DDIM(0.5)), rule, weighted=True)
    x = torch.zeros(2, 3)
    taken = dng_step(plan, 0, x, x, x + 1.0, plan.init_state(2), noise=x)
    assert taken.log_weight is not None and bool((taken.log_weight < 0).all())


@pytest.mark.parametrize(
    "rule",
    [
        SignedNegative(0.5),
        NegativePrompting(0.5, "unconditional"),
        SafeLatentDiffusion.preset("medium"),
        DynamicNegativeGuidance(0.5, LogOddsTracker(prior=0.1), "unconditional"),
    ],
    ids=repr,
)
def test_without_guidance_beneath_there_is_one_prediction_to_measure_from(rule):
    """So the reference says nothing, and a step takes no other prediction."""
    plan = StepPlan(C, rule)
    assert not plan.from_uncond and not plan.needs_uncond
    beneath = StepPlan(C, rule, cfg_scale=2.0)
    assert beneath.from_uncond and beneath.needs_uncond
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="eps_uncond must be None"):
        guide(plan, 0, x, x, plan.init_state(1), eps_uncond=x, momentum=plan.init_momentum(x))
