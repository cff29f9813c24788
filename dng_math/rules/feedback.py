"""Feedback guidance (FBG) and its hybrids: a scale that follows a tracked ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import Array, Predictions, _Memoryless
from dng_math.schedules import StepCoefficients
from dng_math.trackers import RatioTracker, refuse_no_coefficients


@dataclass(frozen=True)
class FeedbackGuidance(_Memoryless):
    """FBG (arXiv 2506.06085): ``base + lambda (positive - base)``, lambda = e^L/(e^L - (1 - pi)).

    lambda = 1 is the plain positive prediction.  L is tracked like the paper's posterior, starting
    from 0, and clamped so that lambda stays in (1, lambda_max].  With ``cfg_scale`` above 1 it is
    one of the paper's hybrids: lambda + cfg_scale - 1, at every step (FBG_CFG) or where the noise
    is between ``sigma_lo`` and ``sigma_hi`` (FBG_LIG).

    Parameters
    ----------
    pi : float
        Assumed share of the true conditional in the learned one, in (0, 1).
    lambda_max : float
        Largest scale, above 1; sets the floor of L.
    t0, t1 : float
        Where guidance should set in and where it should peak, as shares in (0, 1) of the number of
        steps, counted from the clean end; they determine ``step_offset`` and ``temperature`` where
        these are not given.
    temperature, step_offset : float, optional
        The paper's tau and delta.
    lambda_ref : float
        Scale that the offset alone would reach at t0.
    log_ratio_max : float
        Ceiling of L, above 0 and not below the floor, log((1 - pi) m/(m - 1)) with
        m = lambda_max - cfg_scale + 1.
    cfg_scale : float
        c of the hybrids, >= 1 and below ``lambda_max``; 1 is FBG itself.
    sigma_lo, sigma_hi : float
        Noise levels sigma/alpha, both included, between which c - 1 is added; None is no limit.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    pi: float = 0.95
    lambda_max: float = 10.0
    t0: float = 0.5
    t1: float = 0.4
    temperature: float | None = None
    step_offset: float | None = None
    lambda_ref: float = 3.0
    log_ratio_max: float = 3.0
    cfg_scale: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float | None = None
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("pi", "t0", "t1"):
            checks.real(name, getattr(self, name), "in (0, 1)", 0.0, 1.0, closed="()")
        for name in ("lambda_max", "lambda_ref"):
            checks.real(name, getattr(self, name), "finite and > 1", 1.0, np.inf, closed="()")
        if self.temperature is not None:
            checks.non_negative("temperature", self.temperature)
        if self.step_offset is not None:
            checks.finite("step_offset", self.step_offset)
        checks.real("log_ratio_max", self.log_ratio_max, "finite and > 0", 0.0, np.inf, closed="()")
        checks.real(
            "cfg_scale", self.cfg_scale, "in [1, lambda_max)", 1.0, self.lambda_max, closed="[)"
        )
        if self.sigma_hi is not None:
            checks.non_negative("sigma_hi", self.sigma_hi)
        checks.real("sigma_lo", self.sigma_lo, "in [0, sigma_hi]", 0.0, self._most, closed="[]")
        if self._floor > self.log_ratio_max:
            raise ValueError(
                f"log_ratio_max must not be below the floor of L that pi = {self.pi!r} and "
                f"lambda_max = {self.lambda_max!r} give, {self._floor:g}; got "
                f"{self.log_ratio_max!r}"
            )

    @property
    def _most(self) -> float:
        return np.inf if self.sigma_hi is None else self.sigma_hi

    @property
    def _floor(self) -> float:
        """L at which the scale, with what the hybrids add, is lambda_max."""
        # log1p keeps the floor from rounding to 0 for a tiny pi and a large lambda_max.
        largest = self.lambda_max - (self.cfg_scale - 1.0)
        return float(np.log1p(-self.pi) - np.log1p(-1.0 / largest))

    @classmethod
    def published(cls, hybrid: bool = False) -> FeedbackGuidance:
        """The paper's settings, for 64 steps of its own grid.

        Parameters
        ----------
        hybrid : bool
            The hybrid with classifier-free guidance in an interval of noise (FBG_LIG), or FBG.

        Raises
        ------
        TypeError
            If ``hybrid`` is not True or False.
        """
        if checks.boolean("hybrid", hybrid):
            return cls(0.999, 10.0, 0.556, 0.492, cfg_scale=2.6, sigma_lo=0.48, sigma_hi=6.84)
        return cls(0.999, 10.0, 0.556, 0.429)

    def added(self, noise_ratio: float) -> float:
        """What the hybrids add to lambda where sigma/alpha is ``noise_ratio``; 0 for FBG itself."""
        return self.cfg_scale - 1.0 if self.sigma_lo <= noise_ratio <= self._most else 0.0

    def tracker(self, coefficients: StepCoefficients) -> RatioTracker:
        """The tracker of L for the steps of a run, with the paper's offset and temperature.

        Parameters
        ----------
        coefficients : StepCoefficients
            Steps of the run, from ``schedule.coefficients(sampler)``.

        Returns
        -------
        RatioTracker

        Raises
        ------
        TypeError
            If ``coefficients`` are not StepCoefficients.
        """
        refuse_no_coefficients(coefficients)
        pi, steps = self.pi, len(coefficients)
        offset = self.step_offset
        if offset is None:
            reference = (1.0 - pi) * self.lambda_ref / (self.lambda_ref - 1.0)
            offset = float(np.log(reference)) / ((1.0 - self.t0) * steps)
        temperature = self.temperature
        if temperature is None:
            small = coefficients.tracker_variance("small")[::-1]  # from the step onto the data on
            at_t1 = np.interp(self.t1 * steps, np.arange(steps), small)
            temperature = abs(2.0 * float(at_t1) * offset / 10.0)
        return RatioTracker(temperature, offset, self._floor, self.log_ratio_max)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None and predictions.odds is not None
        scale = equations.feedback_scale(predictions.odds[0], self.pi)
        scale = scale + self.added(predictions.noise_ratio)
        guided = equations.toward(
            predictions.base, predictions.positive - predictions.base, scale[:, None]
        )
        return guided, scale[None], None
