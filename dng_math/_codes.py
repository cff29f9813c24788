"""What compiled code knows a rule or a tracker by: a number, and the numbers that it reads.

The fused chain of this package and the fused step of ``dng_kernels`` use the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

from dng_math import guidance
from dng_math.guidance import RatioTracker, Rule, innermost
from dng_math.posterior import ExactPosterior, LogOddsTracker, PaperTracker

# TOWARD is classifier-free guidance; EXACT and TRACKED are DNG with that posterior.
UNGUIDED, TOWARD, NEGATIVE, SAFE, PERPENDICULAR, CONTRASTIVE, EXACT, TRACKED, FEEDBACK = range(9)
NO_TRACKER, PAPER, LOG_ODDS, RATIO = range(4)


class RuleCode(NamedTuple):
    """A rule in numbers: which one, its g, and its other hyperparameters by name, in order."""

    code: int
    guidance_scale: float
    parameters: dict[str, float]


def rule_code(rule: Rule) -> RuleCode | None:
    """The numbers of the rule inside any limited intervals; None if compiled code has no such."""
    match innermost(rule):
        case guidance.Unguided():
            return RuleCode(UNGUIDED, 0.0, {})
        case guidance.ClassifierFreeGuidance(g):
            return RuleCode(TOWARD, g, {})
        case guidance.NegativePrompting(g):
            return RuleCode(NEGATIVE, g, {})
        case guidance.SafeLatentDiffusion(g, threshold, gate, slope, scale, decay, warmup):
            parameters = {
                "threshold": threshold,
                "slope": slope,
                "momentum_scale": scale,
                "momentum_decay": decay,
                "absolute": float(gate == "absolute"),
                "warmup_steps": warmup,
            }
            return RuleCode(SAFE, g, parameters)
        case guidance.PerpNeg(g, positive_scale) as rule:
            parameters = {"positive_scale": positive_scale, "rounding_sq": rule.ROUNDING_SQ}
            return RuleCode(PERPENDICULAR, g, parameters)
        case guidance.ContrastiveCFG(g, temperature):
            return RuleCode(CONTRASTIVE, g, {"contrastive_temperature": temperature})
        case guidance.DynamicNegativeGuidance(g, ExactPosterior()):
            return RuleCode(EXACT, g, {})
        case guidance.DynamicNegativeGuidance(g, PaperTracker() | LogOddsTracker() as tracker):
            return RuleCode(TRACKED, g, {"p_max": tracker.p_max})
        case guidance.FeedbackGuidance(pi):
            return RuleCode(FEEDBACK, 1.0, {"pi": pi})
    return None


def tracker_code(tracker: PaperTracker | LogOddsTracker | RatioTracker | None) -> int:
    """The number of a tracker."""
    match tracker:
        case None:
            return NO_TRACKER
        case LogOddsTracker():
            return LOG_ODDS
        case PaperTracker():
            return PAPER
    return RATIO
