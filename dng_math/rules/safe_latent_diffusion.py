"""Safe latent diffusion (SLD), with its published levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import REFERENCES, Array, Predictions, Reference, _Memoryless

SafetyLevel = Literal["weak", "medium", "strong", "max"]

# Warm-up, slope, threshold, momentum scale and decay of the published configurations.
SAFETY_LEVELS: dict[SafetyLevel, tuple[int, float, float, float, float]] = {
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SafeLatentDiffusion(_Memoryless):
    """SLD (arXiv 2211.05105; DNG Eq. 21): an elementwise scale, gated by a threshold.

    With classifier-free guidance beneath, gate and scale compare the positive prediction with the
    negative, and ``reference`` says what the push is measured from; ``"unconditional"`` with g the
    scale of classifier-free guidance is the authors' pipeline.

    Parameters
    ----------
    guidance_scale : float
        Factor g of the correction.
    threshold : float
        The gate is open where ``eps - eps_neg`` is below it; in units of the noise.
    gate : {"signed", "absolute"}
        What is compared with the threshold: the signed difference (as in the paper's equation and
        the published code) or its absolute value (as in the paper's text).
    slope : float
        s_s; the elementwise scale is min(1, s_s |eps - eps_neg|).
    momentum_scale, momentum_decay : float
        The paper's s_m and beta_m.
    warmup_steps : int
        Number of first steps in which the momentum builds up but no correction is applied.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    guidance_scale: float = 1.0
    threshold: float = 0.04
    gate: Literal["signed", "absolute"] = "signed"
    slope: float = 100.0
    momentum_scale: float = 0.1
    momentum_decay: float = 0.2
    warmup_steps: int = 0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.finite("threshold", self.threshold)
        checks.choice("gate", self.gate, ("signed", "absolute"))
        checks.non_negative("slope", self.slope)
        checks.finite("momentum_scale", self.momentum_scale)
        checks.real("momentum_decay", self.momentum_decay, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.integer("warmup_steps", self.warmup_steps, 0)
        checks.choice("reference", self.reference, REFERENCES)

    @classmethod
    def preset(cls, level: SafetyLevel, guidance_scale: float = 7.5) -> SafeLatentDiffusion:
        """One of the four published configurations, measured from the unconditional prediction.

        Parameters
        ----------
        level : {"weak", "medium", "strong", "max"}
            Name of the configuration.
        guidance_scale : float
            Factor of the correction; in the authors' pipeline that of classifier-free guidance.

        Raises
        ------
        ValueError, TypeError
            If there is no such level or the scale is not a finite number.
        """
        checks.choice("level", level, tuple(SAFETY_LEVELS))
        warmup, slope, threshold, momentum_scale, decay = SAFETY_LEVELS[level]
        return cls(
            guidance_scale,
            threshold,
            "signed",
            slope,
            momentum_scale,
            decay,
            warmup,
            "unconditional",
        )

    def init(self, n: int, dimensions: int) -> Array:
        """Zero momentum, shape (n, dimensions), in units of the noise."""
        return np.zeros((n, dimensions))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`; the scale is the mean over dimensions of the elementwise one."""
        assert memory is not None
        difference = predictions.difference[0] * predictions.to_noise
        compared = difference
        if predictions.unconditional is not None:
            assert predictions.positive is not None
            compared = (predictions.negative[0] - predictions.positive) * predictions.to_noise
        magnitude = np.abs(compared)
        gated = magnitude if self.gate == "absolute" else -compared
        scale = np.where(gated < self.threshold, np.minimum(1.0, self.slope * magnitude), 0.0)
        correction = equations.safe_correction(scale, difference, self.momentum_scale, memory)
        momentum = equations.safe_momentum(memory, correction, self.momentum_decay)
        mean_scale = self.guidance_scale * scale.mean(axis=-1)[None]
        # At alpha = 0 the noise does not depend on x0, and there is nothing to correct.
        if predictions.step < self.warmup_steps or predictions.to_noise == 0:
            return predictions.base, np.zeros_like(mean_scale), momentum
        guided = equations.away(
            predictions.base, correction / predictions.to_noise, self.guidance_scale
        )
        return guided, mean_scale, momentum
