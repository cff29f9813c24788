"""CRG: the least push that brings tracked evidence back to a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import (
    ROUNDING_SQ,
    Array,
    Predictions,
    Reference,
    StepNumbers,
    _Memoryless,
)


@dataclass(frozen=True)
class CRG(_Memoryless):
    """CRG (arXiv 2606.29801): the least push that brings tracked evidence back to a threshold.

    With c the base, u the unconditional and n the negative prediction, in units of the noise,
    b = |c - u|^2 - |c - n|^2 is the evidence for the concept of a step.  CP is gain/2 times that
    of this step plus the sum of ``beta_ts/(2 alpha_ts^2 sigma_t^2) b`` over the earlier ones, and
    ``c - g (CP - threshold)/(gain |n - u|^2) (n - u)`` where CP exceeds the threshold
    (docs/theory.md, section 5.11).  At g = 1 the corrected c has CP equal to the threshold.

    It needs classifier-free guidance beneath; with that at scale 1, c is the positive prediction.
    The memory is the sum, shape (N, 1), in nats.

    Parameters
    ----------
    guidance_scale : float
        The paper's lambda_0, finite.
    gain : float
        K > 0, the weight of the present step.
    threshold : float
        CP above which there is a push.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter is not a number of its range.
    """

    guidance_scale: float = 2.0
    gain: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.positive("gain", self.gain)
        checks.finite("threshold", self.threshold)

    @property
    def reference(self) -> Reference:
        """The unconditional prediction, which the rule is made of."""
        return "unconditional"

    def init(self, n: int, dimensions: int) -> Array:
        """No evidence, shape (n, 1)."""
        return np.zeros((n, 1))

    @staticmethod
    def rate(numbers: StepNumbers) -> float:
        """Nats of evidence per unit of b: the paper's kappa/T."""
        noise = numbers.alpha_ts * numbers.alpha_ts * numbers.sigma_t * numbers.sigma_t
        return numbers.beta_ts / (2.0 * noise) if noise > 0 else 0.0

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`."""
        assert memory is not None and predictions.numbers is not None
        base, difference = predictions.base, predictions.difference[0]
        to_noise_sq = predictions.to_noise**2
        from_null, from_negative = (
            np.sum((base - other) ** 2, axis=-1)
            for other in (predictions.measured_from, predictions.negative[0])
        )
        b = equations.regulating_evidence(from_null, from_negative) * to_noise_sq
        norm_sq = np.sum(difference * difference, axis=-1)
        surplus = 0.5 * self.gain * b + memory[:, 0] - self.threshold
        acts = (surplus > 0) & (norm_sq > ROUNDING_SQ * np.sum(base * base, axis=-1))
        acts &= to_noise_sq > 0
        norm_sq = np.where(acts, norm_sq * to_noise_sq, 1.0)
        scale = equations.regulating_scale(self.guidance_scale, surplus, self.gain, norm_sq)
        scale = np.where(acts, scale, 0.0)
        following = memory + (self.rate(predictions.numbers) * b)[:, None]
        return equations.away(base, difference, scale[:, None]), scale[None], following
