"""Perp-Neg: only what is orthogonal to the positive direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import ROUNDING_SQ, Array, Predictions, _constant, _Memoryless


@dataclass(frozen=True)
class PerpNeg(_Memoryless):
    """Perp-Neg (arXiv 2304.04968, Eq. 5): only what is orthogonal to the positive direction.

    ``base + positive_scale u - g (d - (d.u / u.u) u)`` with u = positive - base and
    d = negative - base, per sample.  Where u is zero to rounding (|u| <= 1e-12 |base|) there is no
    direction, and nothing is projected out.

    In an exact mixture the direction of u is taken from the positive prediction minus that of all
    other components, whose difference does not vanish where u rounds to zero.  If the positive is
    everything that is not forbidden, d is exactly opposite to u (base = p negative +
    (1 - p) positive), so nothing of d is left, at any g.

    It leads to the positive prediction itself, so it takes no classifier-free guidance beneath.
    What the negative is measured from does not matter: negative - positive has the same part
    orthogonal to u.

    Parameters
    ----------
    guidance_scale : float
        g of the negative prediction, finite.
    positive_scale : float
        Scale of the positive prediction, finite.

    Raises
    ------
    ValueError, TypeError
        If a scale is not a finite number.
    """

    guidance_scale: float = 1.0
    positive_scale: float = 0.0
    ROUNDING_SQ: ClassVar[float] = ROUNDING_SQ
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.finite("positive_scale", self.positive_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None
        toward = predictions.positive - predictions.base
        direction = toward if predictions.direction is None else predictions.direction
        difference = predictions.difference[0]
        norm_sq = np.sum(direction * direction, axis=-1, keepdims=True)
        dot = np.sum(difference * direction, axis=-1, keepdims=True)
        floor = self.ROUNDING_SQ * np.sum(predictions.base**2, axis=-1, keepdims=True)
        projection = np.divide(dot, norm_sq, out=np.zeros_like(dot), where=norm_sq > floor)
        guided = equations.away(
            equations.toward(predictions.base, toward, self.positive_scale),
            equations.perpendicular(difference, direction, projection),
            self.guidance_scale,
        )
        return guided, _constant(predictions, self.guidance_scale), None
