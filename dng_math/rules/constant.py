"""Rules whose scale is a constant: none, CFG, classifier guidance, negative prompting, NOT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dng_math import checks, equations
from dng_math.rules.protocol import (
    REFERENCES,
    Array,
    Predictions,
    Reference,
    _constant,
    _Memoryless,
)


@dataclass(frozen=True)
class Unguided(_Memoryless):
    """No guidance: the base prediction itself."""

    several_concepts: ClassVar[bool] = True

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        return predictions.base, _constant(predictions, 0.0), None


@dataclass(frozen=True)
class ClassifierFreeGuidance(_Memoryless):
    """``base + g (positive - base)``: CFG Eq. 6; g = 1 is the positive prediction itself.

    In an exact mixture with the rest as positive this is DNG with the exact posterior.

    Parameters
    ----------
    guidance_scale : float
        g, finite.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number.
    """

    guidance_scale: float = 1.0
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None
        guided = equations.toward(
            predictions.base, predictions.positive - predictions.base, self.guidance_scale
        )
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class ClassifierGuidance(ClassifierFreeGuidance):
    """``s + g grad log p(positive | x)`` (Dhariwal and Nichol 2021) with the exact classifier.

    The exact classifier's gradient is ``s_positive - s``, so in an exact mixture the rule is
    CFG; with networks the two differ by their errors.  Parameters are those of
    :class:`ClassifierFreeGuidance`.
    """


@dataclass(frozen=True)
class NegativePrompting(_Memoryless):
    """``base - g (negative - base)``: negative prompting, with the same scale at every step.

    docs/theory.md, section 5.3.

    Parameters
    ----------
    guidance_scale : float
        g, finite.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number or the reference none of these.
    """

    guidance_scale: float = 1.0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        guided = equations.away(predictions.base, predictions.difference[0], self.guidance_scale)
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class SignedNegative(NegativePrompting):
    """``null + w (positive - null) - g (negative - null)``: composable NOT.

    docs/theory.md, section 5.9.

    That is negative prompting measured from the unconditional prediction, with classifier-free
    guidance of scale w beneath.  Parameters are those of :class:`NegativePrompting`.
    """

    reference: Reference = "unconditional"
