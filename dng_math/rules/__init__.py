"""The guidance rules, as frozen sets of hyperparameters with a pure ``init`` and ``guide``.

What a rule reads and returns is in ``protocol``.  Every method, or family of them, has a file:

``constant``                none, CFG, classifier guidance, negative prompting, composable NOT
``cfg_plus_plus``           CFG++
``dynamic``                 DNG
``feedback``                FBG and its hybrids
``safe_latent_diffusion``   SLD
``perp_neg``                Perp-Neg
``contrastive_cfg``         contrastive CFG
``geoguide``                GeoGuide
``crg``                     CRG
``images``                  SPELL, and DNG away from images
``asked``                   VL-DNP, which asks a judge
``attention``               NAG, NASA and VSF
``limited_interval``        any rule, at some times alone; ``innermost`` is the rule inside

``reading`` says what a chain has to know of a rule, and ``names`` makes one from its name.
"""

from __future__ import annotations

from dng_math.rules.asked import ASKED_AT, ASKED_OF, AskedNegative, asked_steps, checked_steps
from dng_math.rules.attention import (
    AttentionRule,
    NegativeAwareSubtraction,
    NormalizedAttention,
    ValueSignFlip,
)
from dng_math.rules.cfg_plus_plus import CFGPlusPlus
from dng_math.rules.constant import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    NegativePrompting,
    SignedNegative,
    Unguided,
)
from dng_math.rules.contrastive_cfg import ContrastiveCFG
from dng_math.rules.crg import CRG
from dng_math.rules.dynamic import DynamicNegativeGuidance
from dng_math.rules.feedback import FeedbackGuidance
from dng_math.rules.geoguide import GeoGuide
from dng_math.rules.images import SPELL, ImageReferenced
from dng_math.rules.limited_interval import LimitedInterval, innermost, limited
from dng_math.rules.names import RULES, rule_named
from dng_math.rules.perp_neg import PerpNeg
from dng_math.rules.protocol import (
    REFERENCES,
    ROUNDING_SQ,
    Predictions,
    Reference,
    Rule,
    StepNumbers,
    refuse_no_rule,
)
from dng_math.rules.reading import (
    posterior_of,
    reads_the_step,
    reads_x0,
    tracker_of,
    warn_where_noise_is_missing,
)
from dng_math.rules.safe_latent_diffusion import SAFETY_LEVELS, SafeLatentDiffusion, SafetyLevel

__all__ = [
    "ASKED_AT",
    "ASKED_OF",
    "CRG",
    "REFERENCES",
    "ROUNDING_SQ",
    "RULES",
    "SAFETY_LEVELS",
    "SPELL",
    "AskedNegative",
    "AttentionRule",
    "CFGPlusPlus",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ContrastiveCFG",
    "DynamicNegativeGuidance",
    "FeedbackGuidance",
    "GeoGuide",
    "ImageReferenced",
    "LimitedInterval",
    "NegativeAwareSubtraction",
    "NegativePrompting",
    "NormalizedAttention",
    "PerpNeg",
    "Predictions",
    "Reference",
    "Rule",
    "SafeLatentDiffusion",
    "SafetyLevel",
    "SignedNegative",
    "StepNumbers",
    "Unguided",
    "ValueSignFlip",
    "asked_steps",
    "checked_steps",
    "innermost",
    "limited",
    "posterior_of",
    "reads_the_step",
    "reads_x0",
    "refuse_no_rule",
    "rule_named",
    "tracker_of",
    "warn_where_noise_is_missing",
]
