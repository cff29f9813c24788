"""Rules that act on a network's attention to the prompt: NAG, NASA and VSF."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dng_math import checks, equations
from dng_math.rules.dynamic import DynamicNegativeGuidance
from dng_math.rules.protocol import Array, Predictions, Reference, _constant, _Memoryless
from dng_math.trackers import ExactPosterior


class _AttentionRule(_Memoryless):
    """Interface of the rules that act on a network's attention to the prompt.

    On exact mixtures they have a form in x0: the posterior mean of x0 of an isotropic mixture is a
    softmax attention over its components (docs/attention.md).
    """

    end: float
    gate: DynamicNegativeGuidance | None
    gate_bound: float

    def __post_init__(self) -> None:
        checks.real("end", self.end, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.real("gate_bound", self.gate_bound, "in [0, 1]", 0.0, 1.0, closed="[]")
        if self.gate is None:
            if self.gate_bound > 0.0:
                raise ValueError(
                    f"gate_bound must be 0 without a gate, whose bound it is, got {self.gate_bound}"
                )
        elif not isinstance(self.gate, DynamicNegativeGuidance):
            raise TypeError(
                "gate must be a DynamicNegativeGuidance, whose posterior opens the rule, or None, "
                f"got {checks.shown(self.gate)}"
            )

    @property
    def reference(self) -> Reference:
        """What the posterior of the gate is relative to; without one nothing is measured."""
        return "positive" if self.gate is None else self.gate.reference

    @property
    def strength(self) -> float:
        """The number that a closed gate makes 0, which records hold as the scale."""
        raise NotImplementedError

    def acts_at(self, time: float) -> bool:
        """Whether the rule acts at a time in [0, 1], 1 at the noisy end."""
        return self.end > 0.0 and time >= 1.0 - self.end

    def opening(self, posterior: Any) -> Any:
        """How far the gate opens: min(1, g p), and 0 where that is below ``gate_bound``.

        Parameters
        ----------
        posterior : ndarray or Tensor, shape (N,)
            p(c | x).

        Returns
        -------
        ndarray or Tensor, shape (N,)
        """
        assert self.gate is not None
        opened = (self.gate.guidance_scale * posterior).clip(min=0.0, max=1.0)
        return opened * (opened >= self.gate_bound)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        """The guided prediction of x0 from that of the positive and of the negative."""
        raise NotImplementedError

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`; the scale is :attr:`strength` times the opening of the gate."""
        scale = _constant(predictions, self.strength)
        if not self.acts_at(predictions.time):
            return predictions.base, np.zeros_like(scale), None
        # Classifier-free guidance is made of the guided positive prediction.
        positive, share = predictions.base, 1.0
        if predictions.unconditional is not None:
            assert predictions.positive is not None
            positive, share = predictions.positive, predictions.cfg_scale
        own = predictions.as_x0(positive)
        shift = self._guided_x0(own, predictions.as_x0(predictions.negative[0]), predictions) - own
        if self.gate is not None:
            opening = self.opening(self._posterior(predictions))
            shift, scale = opening[:, None] * shift, scale * opening
        return predictions.base + predictions.from_x0 * (share * shift), scale, None

    def _posterior(self, predictions: Predictions) -> Array:
        assert self.gate is not None
        if isinstance(self.gate.posterior, ExactPosterior):
            assert predictions.log_ratio is not None
            return np.exp(-np.logaddexp(0.0, -predictions.log_ratio[0]))
        assert predictions.odds is not None
        return predictions.odds[0] / (1.0 + predictions.odds[0])


@dataclass(frozen=True)
class NormalizedAttention(_AttentionRule):
    """NAG (arXiv 2505.21179): attention pushed away from the negative's, within a norm.

    Per token, of the joined heads Z+ and Z- for the positive and the negative text:
    ``Zt = Z+ + scale (Z+ - Z-)``, shortened to at most ``tau |Z+|`` in the L1 norm, and mixed
    with Z+ by ``alpha`` (docs/attention.md).  :func:`dng_models.apply_guidance` puts it into the
    attention of a pipeline's network.  In :func:`dng_math.sample` Z+ and Z- are the predictions of
    x0; without a limit (``tau=math.inf``) and at ``alpha=1`` it is :class:`NegativePrompting`.

    Parameters
    ----------
    scale : float
        The paper's phi, finite; 0 is the unguided prediction.  The authors' code counts from 1.
    tau : float
        Largest ratio of the L1 norms, >= 1; infinite for none.
    alpha : float
        Share of the pushed features, in [0, 1].
    end : float
        Share of the diffusion time, from the noisy end, in which the rule acts: at times from
        1 - end to 1; 0 is never.
    gate : DynamicNegativeGuidance, optional
        Opens alpha for each sample by its posterior p, to ``alpha min(1, g p)``.  In a pipeline it
        must be tracked, and costs a prediction for the negative prompt at every step.
    gate_bound : float
        Openings min(1, g p) below this are 0.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float = 2.0
    tau: float = 2.5
    alpha: float = 0.5
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        if not (isinstance(self.tau, float) and math.isinf(self.tau) and self.tau > 0):
            checks.real("tau", self.tau, ">= 1, or infinite", 1.0, math.inf, closed="[]")
        checks.real("alpha", self.alpha, "in [0, 1]", 0.0, 1.0, closed="[]")
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The share alpha."""
        return self.alpha

    def features(self, positive: Any, negative: Any) -> Any:
        """The guided features of every token.

        Parameters
        ----------
        positive, negative : ndarray or Tensor, shape (..., D)
            Z+ and Z-; the norm is taken over the last axis.

        Returns
        -------
        ndarray or Tensor, shape (..., D)
        """
        pushed = equations.away(positive, negative - positive, self.scale)
        if self.tau < math.inf:
            length = abs(pushed).sum(-1)[..., None]
            allowed = self.tau * abs(positive).sum(-1)[..., None]
            # Of length 0 there is nothing to shorten.
            pushed = pushed * (allowed / (length + (length == 0))).clip(max=1.0)
        return equations.toward(positive, pushed - positive, self.alpha)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        guided: Array = self.features(positive, negative)
        return guided


@dataclass(frozen=True)
class NegativeAwareSubtraction(_AttentionRule):
    """NASA (SNOOPI, arXiv 2412.02687): the negative's attention is subtracted, ``Z+ - scale Z-``.

    As :class:`NormalizedAttention`, without a limit.  The features shrink with the scale, also
    where both texts say the same.

    Parameters
    ----------
    scale : float
        Finite; 0 is the unguided prediction.
    end, gate, gate_bound
        As for :class:`NormalizedAttention`; the gate opens the scale.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The scale."""
        return self.scale

    def features(self, positive: Any, negative: Any) -> Any:
        """The guided features; arguments and result as for :class:`NormalizedAttention`."""
        return equations.away(positive, negative, self.scale)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        guided: Array = self.features(positive, negative)
        return guided


@dataclass(frozen=True)
class ValueSignFlip(_AttentionRule):
    """VSF (arXiv 2508.10931): the negative's tokens join the keys, with values times -scale.

    One softmax is over both texts, so the negative takes attention where it is alike, and gives
    it back with the sign reversed: on an exact mixture ``(1 - p) D_rest - scale p D_negative``
    with the exact posterior p.  At ``scale=0`` the negative still takes attention.

    Parameters
    ----------
    scale : float
        Finite; the authors' example for Stable Diffusion 3.5 has 3.5, with an offset of the
        negative's logits that is left out here.
    end, gate, gate_bound
        As for :class:`NormalizedAttention`; the gate mixes guided and unguided features.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float = 3.5
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The scale."""
        return self.scale

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        assert predictions.log_ratio is not None and predictions.rest is not None
        log_ratio = predictions.log_ratio[0][:, None]
        share = np.exp(-np.logaddexp(0.0, -log_ratio))
        rest = np.exp(-np.logaddexp(0.0, log_ratio)) * predictions.as_x0(predictions.rest)
        return equations.away(rest, share * negative, self.scale)


AttentionRule = NormalizedAttention | NegativeAwareSubtraction | ValueSignFlip
