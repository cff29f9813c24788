"""CFG++: classifier-free guidance with a scale that reads the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dng_math import checks, equations
from dng_math.rules.protocol import Array, Predictions, StepNumbers, _constant, _Memoryless


@dataclass(frozen=True)
class CFGPlusPlus(_Memoryless):
    """CFG++ (arXiv 2406.08070) for DDIM: classifier-free guidance with a scale that reads the step.

    w = g alpha_s sigma_t / (alpha_s sigma_t - alpha_t sigma_s), with which DDIM's step is
    CFG++'s: the guided x0, and the unguided noise again (docs/theory.md, section 5.14).

    Parameters
    ----------
    guidance_scale : float
        The paper's lambda, finite, in [0, 1] there.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number.
    """

    guidance_scale: float = 0.6
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)

    def scale(self, numbers: StepNumbers) -> float:
        """w of a step."""
        levels = (numbers.alpha_t, numbers.sigma_t, numbers.alpha_s, numbers.sigma_s)
        return float(equations.plus_plus_scale(self.guidance_scale, *levels))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None and predictions.numbers is not None
        scale = self.scale(predictions.numbers)
        guided = equations.toward(predictions.base, predictions.positive - predictions.base, scale)
        return guided, _constant(predictions, scale), None
