"""Dynamic Negative Guidance (DNG): a scale that follows the posterior of the forbidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import REFERENCES, Array, Predictions, Reference, _Memoryless
from dng_math.schedules import TRACKER_VARIANCES, TrackerVariance
from dng_math.trackers import (
    TRACKERS,
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    TimeProfile,
    TrackerName,
)


@dataclass(frozen=True)
class DynamicNegativeGuidance(_Memoryless):
    """DNG Eq. 10: ``base - lambda (negative - base)`` with lambda = g p / (1 - p), per sample.

    Several concepts: ``base - g sum_k p_k (negative_k - base) / (1 - sum_j p_j)`` (derived;
    docs/theory.md, section 5.2).

    Parameters
    ----------
    guidance_scale : float
        g; at g = 1 with the exact posterior the samples follow p(x | not c) exactly.
    posterior : ExactPosterior, PaperTracker, LogOddsTracker or PathTracker
        How p is obtained: exactly from the mixture, or tracked along the chain.
    reference : {"positive", "unconditional"}
        What the negative is measured from, and its posterior relative to, where there is
        classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number, or ``posterior`` or the reference is none of these.
    """

    guidance_scale: float = 1.0
    posterior: ExactPosterior | PaperTracker | LogOddsTracker | PathTracker = field(
        default_factory=ExactPosterior
    )
    reference: Reference = "positive"
    several_concepts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)
        if not isinstance(
            self.posterior, ExactPosterior | PaperTracker | LogOddsTracker | PathTracker
        ):
            raise TypeError(
                "posterior must be an ExactPosterior, PaperTracker, LogOddsTracker or PathTracker, "
                f"got {self.posterior!r}"
            )

    @classmethod
    def tracked(
        cls,
        guidance_scale: float = 1.0,
        prior: float = 0.01,
        temperature: float | TimeProfile = 1.0,
        offset: float = 0.0,
        *,
        offset_nats: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
        tracker: TrackerName = "paper",
        variance: TrackerVariance = "matched",
        probes: int = 1,
        reference: Reference = "positive",
    ) -> DynamicNegativeGuidance:
        """DNG with a tracked posterior, from all its hyperparameters (DNG Eqs. 10 and 12).

        Parameters
        ----------
        guidance_scale : float
            The g of lambda = g p / (1 - p).
        prior : float
            p(c) at the noisy end, in (0, 1).
        temperature : float or TimeProfile
            Factor of the log likelihood ratio, >= 0; below 1 for networks.
        offset : float
            The paper's offset, added as offset / (2 v) at each step.
        offset_nats : float
            Offset in nats over the whole run, spread equally over its steps.
        p_min, p_max : float
            Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
        tracker : {"paper", "log-odds", "path"}
            :class:`PaperTracker`, :class:`LogOddsTracker` or :class:`PathTracker`.
        variance : {"matched", "small", "large", "published"}
            Variance that the first two divide by.
        probes : int
            Random directions of the path tracker, >= 0.
        reference : {"positive", "unconditional"}
            What the negative is measured from where there is classifier-free guidance beneath.

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid; the message names it, its value and what is allowed.
        """
        if isinstance(prior, Sequence) or isinstance(guidance_scale, Sequence):
            raise TypeError(
                "guidance_scale and prior must be numbers, got "
                f"{guidance_scale!r} and {prior!r}; for unwanted concepts with priors or scales of "
                "their own give apply_guidance a rule for each, a list"
            )
        checks.choice("tracker", tracker, TRACKERS)
        checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
        if tracker == "path":
            if checks.finite("offset", offset) != 0.0:
                raise ValueError(
                    "offset must be 0 for tracker='path', which divides by no variance; "
                    f"use offset_nats; got {offset!r}"
                )
            if checks.choice("variance", variance, TRACKER_VARIANCES) != "matched":
                raise ValueError(
                    "variance must be 'matched' for tracker='path', which divides by none, "
                    f"got {variance!r}"
                )
            return cls(
                guidance_scale,
                PathTracker(
                    prior=prior,
                    temperature=temperature,
                    offset_nats=offset_nats,
                    p_min=p_min,
                    p_max=p_max,
                    probes=probes,
                ),
                reference,
            )
        if checks.integer("probes", probes, 0) != 1:
            raise ValueError(f"probes must be 1, its default, for {tracker=}, got {probes!r}")
        kind = PaperTracker if tracker == "paper" else LogOddsTracker
        return cls(
            guidance_scale,
            kind(
                prior=prior,
                temperature=temperature,
                offset=offset,
                offset_nats=offset_nats,
                p_min=p_min,
                p_max=p_max,
                variance=variance,
            ),
            reference,
        )

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        if isinstance(self.posterior, ExactPosterior):
            return self._guide_exactly(predictions)
        assert predictions.odds is not None
        odds = predictions.odds
        posterior = odds / (1.0 + odds)
        total = posterior.sum(axis=0)
        # Several concepts are tracked independently, so their sum is capped at p_max as well.
        posterior = posterior * np.minimum(1.0, self.posterior.p_max / np.maximum(total, 1e-300))
        scale = equations.dynamic_scale(self.guidance_scale, posterior, 1.0 - posterior.sum(axis=0))
        guided = predictions.base
        for difference, factor in zip(predictions.difference, scale, strict=True):
            guided = equations.away(guided, difference, factor[:, None])
        return guided, scale, None

    def _guide_exactly(self, predictions: Predictions) -> tuple[Array, Array, None]:
        # sum_k p_k (negative_k - base) = (1 - sum_j p_j) sum_k p_k (negative_k - rest), so the
        # vanishing denominator cancels and the rule stays accurate as p -> 1.
        assert predictions.log_ratio is not None and predictions.rest is not None
        log_ratio = predictions.log_ratio
        log_rest = -np.logaddexp.reduce([np.zeros_like(log_ratio[0]), *log_ratio], axis=0)
        guided = predictions.base
        for negative, posterior in zip(
            predictions.negative, np.exp(log_ratio + log_rest), strict=True
        ):
            guided = equations.away(
                guided, negative - predictions.rest, self.guidance_scale * posterior[:, None]
            )
        return guided, self.guidance_scale * np.exp(np.minimum(log_ratio, 700.0)), None
