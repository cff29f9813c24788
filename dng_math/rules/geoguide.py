"""GeoGuide: a push of the same length at every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import (
    REFERENCES,
    ROUNDING_SQ,
    Array,
    Predictions,
    Reference,
    StepNumbers,
    _Memoryless,
)


@dataclass(frozen=True)
class GeoGuide(_Memoryless):
    """GeoGuide (arXiv 2407.12889): every step's mean moves by ``g sqrt(D)/N`` away from c.

    lambda = g sqrt(D) / (N |d|), where d is the difference of the step's means for the negative
    and for what it is measured from (docs/theory.md, section 5.10).  There is no push where d is
    zero to rounding.  It has no memory and reads no posterior, so it pushes as far where nothing
    of the concept is.

    Parameters
    ----------
    guidance_scale : float
        The paper's kappa, finite; below 0 it leads to the concept.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If the scale is not a finite number or the reference none of these.
    """

    guidance_scale: float = 1.0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)

    def length(self, numbers: StepNumbers, dimensions: int) -> float:
        """How far the step moves a prediction of x0; 0 where the step does not depend on it."""
        if numbers.x0_factor == 0.0:
            return 0.0
        total = self.guidance_scale * np.sqrt(dimensions)
        return float(total / (numbers.steps * abs(numbers.x0_factor)))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.numbers is not None
        base, direction = predictions.base, predictions.difference[0]
        share: Array | float = 1.0
        if predictions.rest is not None and predictions.log_ratio is not None:
            # The same direction, accurate where negative and base agree to rounding: base =
            # p negative + (1 - p) rest.
            direction = predictions.negative[0] - predictions.rest
            share = np.maximum(np.exp(-np.logaddexp(0.0, predictions.log_ratio[0])), 1e-300)
        norm_sq = np.sum(direction * direction, axis=-1)
        known = (norm_sq > ROUNDING_SQ * np.sum(base * base, axis=-1)) & (predictions.from_x0 != 0)
        distance = np.where(known, np.sqrt(norm_sq), 1.0)
        length = self.length(predictions.numbers, base.shape[-1]) * abs(predictions.from_x0)
        scale = np.where(known, equations.geometric_scale(length, distance), 0.0)
        return equations.away(base, direction, scale[:, None]), (scale / share)[None], None
