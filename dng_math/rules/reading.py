"""What a chain has to know of a rule: what it reads, its posterior and its tracker."""

from __future__ import annotations

import warnings

import numpy as np

from dng_math.rules.asked import AskedNegative
from dng_math.rules.attention import AttentionRule
from dng_math.rules.cfg_plus_plus import CFGPlusPlus
from dng_math.rules.crg import CRG
from dng_math.rules.dynamic import DynamicNegativeGuidance
from dng_math.rules.feedback import FeedbackGuidance
from dng_math.rules.geoguide import GeoGuide
from dng_math.rules.images import SPELL
from dng_math.rules.limited_interval import innermost
from dng_math.rules.protocol import Rule
from dng_math.schedules import StepCoefficients
from dng_math.trackers import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    RatioTracker,
    Tracker,
)


def reads_the_step(rule: Rule) -> bool:
    """Whether a rule reads the numbers of the step that will be taken."""
    return isinstance(innermost(rule), GeoGuide | CRG | CFGPlusPlus | AskedNegative)


def reads_x0(rule: Rule) -> bool:
    """Whether a rule reads the base as a prediction of x0, whatever is predicted."""
    return isinstance(innermost(rule), SPELL | AttentionRule | AskedNegative)


def posterior_of(
    rule: Rule,
) -> ExactPosterior | PaperTracker | LogOddsTracker | PathTracker | None:
    """How DNG, or DNG as a gate, inside any limited intervals has its posterior; None without."""
    inner = innermost(rule)
    if isinstance(inner, AttentionRule):
        return None if inner.gate is None else inner.gate.posterior
    return inner.posterior if isinstance(inner, DynamicNegativeGuidance) else None


def tracker_of(rule: Rule, coefficients: StepCoefficients) -> Tracker | None:
    """The tracker that a rule carries along a chain, if any.

    A path tracker without probes is the tracker of transitions that it means.
    """
    inner = innermost(rule)
    if isinstance(inner, FeedbackGuidance):
        return inner.tracker(coefficients)
    posterior = posterior_of(rule)
    if isinstance(posterior, PathTracker):
        return posterior if posterior.probes else posterior.first_order
    return None if isinstance(posterior, ExactPosterior) else posterior


def warn_where_noise_is_missing(
    tracker: Tracker | None,
    coefficients: StepCoefficients,
    *,
    stacklevel: int,
) -> None:
    """Warn if a tracker will be wrong: less noise than DDPM adds, and no divergence term.

    Parameters
    ----------
    tracker : PaperTracker, LogOddsTracker, RatioTracker or None
    coefficients : StepCoefficients
        Steps of the run; the last one is ignored, because no state is used after it.
    stacklevel : int
        As for :func:`warnings.warn`; 1 is the caller of this function.
    """
    eta = coefficients.eta[:-1]
    if tracker is None or tracker.divergence or not np.any(eta < 1.0 - 1e-6):
        return
    cure = "use DDPM, or DDIM with eta=1"
    if not isinstance(tracker, RatioTracker):
        cure += (
            f", or {type(tracker).__name__}(..., divergence=True), which adds the missing term, "
            "or a PathTracker, which assumes no noise"
        )
    warnings.warn(
        f"the sampler adds {'no' if eta.min() == 0 else 'too little'} noise (eta = "
        f"{eta.min():g}, and the tracker takes it to be 1): the tracked posterior is wrong however "
        f"many steps are taken; {cure}",
        stacklevel=stacklevel + 1,
    )
