"""Contrastive CFG: a scale that fades as two predictions move apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import REFERENCES, Array, Predictions, Reference, _Memoryless


@dataclass(frozen=True)
class ContrastiveCFG(_Memoryless):
    """Contrastive CFG (arXiv 2411.17077): scale ``2 g e^-r / (1 + e^-r)``.

    r = tau |eps_neg - eps|^2, so the scale fades as the two predictions move apart.  It has no
    memory.  :meth:`published` is the paper's rule for text to image.

    Parameters
    ----------
    guidance_scale : float
        g, finite.
    temperature : float
        tau >= 0, for differences in units of the noise.
    positive_factor : bool
        Multiply classifier-free guidance beneath the rule by ``2 / (1 + e^-q)`` with
        q = tau |eps_pos - eps_null|^2, which grows from 1 to 2 as these move apart.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter is not a number of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    positive_factor: bool = False
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.non_negative("temperature", self.temperature)
        checks.boolean("positive_factor", self.positive_factor)
        checks.choice("reference", self.reference, REFERENCES)

    @classmethod
    def published(cls, guidance_scale: float = 7.5, temperature: float = 0.2) -> ContrastiveCFG:
        """The paper's rule: both factors, measured from the unconditional prediction.

        Parameters
        ----------
        guidance_scale : float
            w of the negative side; classifier-free guidance beneath has the same in the paper.
        temperature : float
            tau >= 0.

        Raises
        ------
        ValueError, TypeError
            If an argument is not a number of its range.
        """
        return cls(guidance_scale, temperature, True, "unconditional")

    def _decay(self, difference: Array, predictions: Predictions) -> Array:
        norm_sq = np.sum(difference * difference, axis=-1) * predictions.to_noise**2
        return np.exp(-self.temperature * norm_sq)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        base, difference = predictions.base, predictions.difference[0]
        if self.positive_factor:
            assert predictions.positive is not None and predictions.unconditional is not None
            led = predictions.positive - predictions.unconditional
            factor = equations.contrastive_attraction(self._decay(led, predictions))
            base = equations.toward(
                predictions.unconditional, led, predictions.cfg_scale * factor[:, None]
            )
        scale = equations.contrastive_scale(
            self.guidance_scale, self._decay(difference, predictions)
        )
        return equations.away(base, difference, scale[:, None]), scale[None], None
