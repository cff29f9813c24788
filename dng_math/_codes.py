"""Integer codes of rules and trackers, and the hyperparameters that compiled code reads.

The fused chain of this package and the fused step of ``dng_kernels`` share them.
"""

from __future__ import annotations

from typing import NamedTuple

from dng_math import rules
from dng_math.rules import Rule, innermost
from dng_math.trackers import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    Tracker,
)

# TOWARD is classifier-free guidance; EXACT and TRACKED are DNG with an exact or tracked posterior.
UNGUIDED, TOWARD, NEGATIVE, SAFE, PERPENDICULAR, CONTRASTIVE, EXACT, TRACKED, FEEDBACK = range(9)
# GeoGuide, CRG, SPELL, CFG++, and points.
GEOMETRIC, REGULATED, SHIELDED, TOWARD_BY_STEP, POINTWISE = range(9, 14)
# PATH and PATH_BASE are the path tracker's two states, log p/(1-p) and log p.
NO_TRACKER, PAPER, LOG_ODDS, RATIO, PATH, PATH_BASE = range(6)


class RuleCode(NamedTuple):
    """A rule in numbers: its code, its g, and its other hyperparameters by name, in order."""

    code: int
    guidance_scale: float
    parameters: dict[str, float]


def chain_code(rule: Rule) -> RuleCode | None:
    """Code of the rule inside any limited intervals; None if it has no compiled version."""
    match innermost(rule):
        case rules.Unguided():
            return RuleCode(UNGUIDED, 0.0, {})
        case rules.ClassifierFreeGuidance(g):
            return RuleCode(TOWARD, g, {})
        case rules.NegativePrompting(g):
            return RuleCode(NEGATIVE, g, {})
        case rules.SafeLatentDiffusion(g, threshold, gate, slope, scale, decay, warmup):
            parameters = {
                "threshold": threshold,
                "slope": slope,
                "momentum_scale": scale,
                "momentum_decay": decay,
                "absolute": float(gate == "absolute"),
                "warmup_steps": warmup,
            }
            return RuleCode(SAFE, g, parameters)
        case rules.PerpNeg(g, positive_scale) as rule:
            parameters = {"positive_scale": positive_scale, "rounding_sq": rule.ROUNDING_SQ}
            return RuleCode(PERPENDICULAR, g, parameters)
        case rules.ContrastiveCFG(g, temperature):
            return RuleCode(CONTRASTIVE, g, {"contrastive_temperature": temperature})
        case rules.DynamicNegativeGuidance(g, ExactPosterior()):
            return RuleCode(EXACT, g, {})
        case rules.DynamicNegativeGuidance(
            g, PaperTracker() | LogOddsTracker() | PathTracker() as tracker
        ):
            return RuleCode(TRACKED, g, {"p_max": tracker.p_max})
        case rules.FeedbackGuidance(pi):
            return RuleCode(FEEDBACK, 1.0, {"pi": pi})
        case rules.GeoGuide(g):
            return RuleCode(GEOMETRIC, g, {})
        case rules.CRG(g, gain, threshold):
            return RuleCode(REGULATED, g, {"gain": gain, "threshold": threshold})
        case rules.SPELL(_, radius, g):
            return RuleCode(SHIELDED, g, {"radius": radius})
        case rules.ImageReferenced(_, prior, g, _, p_max):
            return RuleCode(POINTWISE, g, {"prior": prior, "p_max": p_max})
        case rules.CFGPlusPlus(g):
            return RuleCode(TOWARD_BY_STEP, g, {})
    return None


def tracker_code(tracker: Tracker | None) -> int:
    """Code of a tracker; NO_TRACKER for None."""
    match tracker:
        case None:
            return NO_TRACKER
        case LogOddsTracker():
            return LOG_ODDS
        case PaperTracker():
            return PAPER
        case PathTracker(compare=compare):
            return PATH if compare == "rest" else PATH_BASE
    return RATIO
