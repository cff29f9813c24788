"""Rules that chains of mixtures have and the step of dng_kernels has not are refused by name."""

from __future__ import annotations

import pytest

from dng_kernels import StepPlan
from dng_math import (
    CRG,
    SPELL,
    CFGPlusPlus,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GeoGuide,
    ImageReferenced,
    LimitedInterval,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    SafeLatentDiffusion,
    SignedNegative,
)

C = NoiseSchedule.linear().respace(5).coefficients()
REFUSED = [
    GeoGuide(),
    CRG(),
    SPELL([[0.0]], 1.0),
    ImageReferenced([[0.0]], 0.1),
    CFGPlusPlus(),
    SignedNegative(),
    NegativePrompting(1.0, "unconditional"),
    SafeLatentDiffusion.preset("weak"),
    ContrastiveCFG.published(),
    ContrastiveCFG(positive_factor=True),
    DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1), "unconditional"),
    FeedbackGuidance.published(hybrid=True),
    LimitedInterval(GeoGuide(), 0.1, 0.9),
]


@pytest.mark.parametrize("rule", REFUSED, ids=repr)
def test_a_rule_that_the_step_has_not_is_refused_by_name(rule):
    name = type(getattr(rule, "rule", rule)).__name__
    with pytest.raises(ValueError, match=rf"rule must be one that the step.*so far: {name}\("):
        StepPlan(C, rule)


def test_what_it_has_is_taken():
    for rule in (NegativePrompting(), ContrastiveCFG(), FeedbackGuidance.published()):
        StepPlan(C, rule)
