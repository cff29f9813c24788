"""The rules by the names that configurations, command lines and tables have for them."""

from __future__ import annotations

from collections.abc import Callable

from dng_math import checks
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
from dng_math.rules.perp_neg import PerpNeg
from dng_math.rules.protocol import Rule
from dng_math.rules.safe_latent_diffusion import SafeLatentDiffusion

RULES: dict[str, Callable[..., Rule]] = {
    "none": Unguided,
    "np": NegativePrompting,
    "sld": SafeLatentDiffusion,
    "dng": DynamicNegativeGuidance,
    "ccfg": ContrastiveCFG,
    "cfg": ClassifierFreeGuidance,
    "cg": ClassifierGuidance,
    "fbg": FeedbackGuidance,
    "perp-neg": PerpNeg,
    "signed": SignedNegative,
    "geoguide": GeoGuide,
    "crg": CRG,
    "spell": SPELL,
    "images": ImageReferenced,
    "cfg++": CFGPlusPlus,
}


def rule_named(name: str, guidance_scale: float, **parameters: object) -> Rule:
    """A rule by its name.

    Parameters
    ----------
    name : str
        A key of :data:`RULES`.
    guidance_scale : float
        g; "none" and "fbg" have none and ignore it.
    **parameters
        Further hyperparameters of the rule, by name.

    Raises
    ------
    ValueError, TypeError
        If there is no such rule, or a hyperparameter is invalid.
    """
    checks.choice("name", name, tuple(RULES))
    if name not in ("none", "fbg"):
        parameters["guidance_scale"] = guidance_scale
    return RULES[name](**parameters)
