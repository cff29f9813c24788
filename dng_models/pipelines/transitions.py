"""The steps of diffusers' schedulers, as the numbers A, B and V of one formula.

Every first-order sampler takes the step ``x_s = A x_t + B x0 + sqrt(V) z`` from the noisier time t
to the cleaner time s, where x0 is the image that the network's prediction implies, clipped or
thresholded if the scheduler does so.  A, B and V are computed in float64 from the public state that
a scheduler has after ``set_timesteps``: its cumulative alphas or sigmas, its timesteps and its
configuration.  ``scheduler.step`` is not called, so a guidance that knows these numbers needs no
wrapper around the sampler.  Multistep solvers are described by their first-order step, which is the
first step that they take.

There are two coordinate systems.  :class:`Transition` describes a step in the scheduler's own
latents.  :class:`SchedulerRun` describes a run in the network's input.  They differ for the Euler
schedulers, which keep ``x0 + sigma eps`` and show the network that divided by sqrt(sigma^2 + 1):
this is variance preserving, and noise and velocity predictions have their usual meaning there.

The formulas use x0, because it is finite where alpha is 0 (pure noise: flow matching at sigma = 1,
and schedules of zero terminal signal-to-noise ratio).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_math import checks, equations
from dng_math.schedules import PredictionType, StepCoefficients, added_variance, step_factors, x0_of
from dng_models.pipelines.scheduler_reading import X0Limit, read

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transition:
    """One step of a scheduler, in the coordinates of its latents.

    Attributes
    ----------
    timestep : float
        The timestep that the network is given.
    alpha_t, sigma_t, alpha_s, sigma_s : float
        ``x = alpha x0 + sigma eps`` at the noisier end t and at the cleaner end s.
    x_factor, x0_factor, step_var : float
        A, B and V of ``x_s = A x_t + B x0 + sqrt(V) z``.
    eta : float
        Noise relative to the DDPM posterior's: 1 is ancestral, 0 deterministic.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What the network returns.
    input_scale : float
        The network is shown ``input_scale * x_t``.
    limit : X0Limit
        How the predicted x0 is limited.
    """

    timestep: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    x_factor: float
    x0_factor: float
    step_var: float
    eta: float
    prediction_type: PredictionType
    input_scale: float
    limit: X0Limit

    def x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The x0 that a prediction implies, limited as the scheduler does.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
            Latents at t, not scaled to the network's input; 16-bit ones are computed in float32.
        prediction : Tensor, shape (B, ...)
            The network's output for them.

        Returns
        -------
        Tensor, of the shape and dtype of x

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        _check_pair(x, prediction)
        return self.limit(self._raw_x0(_wide(x), _wide(prediction))).to(x.dtype)

    def step(self, x: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_s = A x_t + B x0 + sqrt(V) z (DDPM Eq. 7, DDIM Eq. 12).

        Parameters
        ----------
        x, prediction : Tensor, shape (B, ...)
            As for :meth:`x0`.
        noise : Tensor, shape (B, ...)
            Standard normal noise; needed if ``step_var`` > 0, not used otherwise.

        Returns
        -------
        Tensor, of the shape and dtype of x

        Raises
        ------
        ValueError
            If the shapes differ, or a step with noise is given none.
        """
        _check_pair(x, prediction)
        wide = _wide(x)
        raw = self._raw_x0(wide, _wide(prediction))
        x0 = self.limit(raw)
        x_next = equations.step_mean(wide, x0, self.x_factor, self.x0_factor)
        if self.limit and self.limit.keeps_noise:
            x_next = x_next + self.x_factor * self.alpha_t * (x0 - raw)
        if self.step_var > 0:
            if noise is None:
                raise ValueError(
                    f"noise must be given: the step at timestep {self.timestep:g} adds noise of "
                    f"variance {self.step_var:g}"
                )
            if noise.shape != x.shape:
                raise ValueError(
                    f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}"
                )
            x_next = equations.step(x_next, self.step_var**0.5, _wide(noise))
        return x_next.to(x.dtype)

    def _raw_x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        # A velocity refers to the network's input; other predictions don't depend on x's scale.
        scale = self.input_scale if self.prediction_type == "v_prediction" else 1.0
        at = (scale * self.alpha_t, scale * self.sigma_t)
        return x0_of(self.prediction_type, scale * x, prediction, *at)


@dataclass(frozen=True, eq=False)
class SchedulerRun:
    """All steps of a run, in the coordinates of the network's input.

    Attributes
    ----------
    scheduler : str
        Name of the scheduler's class.
    timesteps : ndarray, shape (N,)
        Timesteps as the network is given them, noisiest first.
    coefficients : StepCoefficients
        One row per step.  ``time`` is that of the noisier end in (0, 1]: (t + 1) over the number of
        training timesteps for discrete ones, sigma for flow matching; a repeated one is set
        ``SMALLEST_INTERVAL`` lower, so that it decreases strictly.  The transition is the step's
        own if eta = 1, and the DDPM posterior otherwise.
    input_scale : ndarray, shape (N + 1,)
        Factor from latents to the network's input, before each step and after the last one.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What the network returns.
    limit : X0Limit
        How every predicted x0 is limited.
    """

    scheduler: str
    timesteps: Array
    coefficients: StepCoefficients
    input_scale: Array
    prediction_type: PredictionType
    limit: X0Limit

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


def scheduler_run(scheduler: Any, *, eta: float | None = None) -> SchedulerRun:
    """Read all steps of a run from a scheduler.

    Parameters
    ----------
    scheduler : SchedulerMixin
        A scheduler with its timesteps set: DDPM, DDIM, CogVideoX's DDIM, Euler, Euler ancestral,
        DPM-Solver++ multistep (all four algorithm types), UniPC, DEIS, flow-matching Euler, or one
        of :mod:`dng_models.pipelines.schedulers`.
    eta : float, optional
        For DDIM the ``eta`` that its ``step`` will be given; default 0, as in diffusers.  Other
        schedulers have an eta of their own, which this must equal.

    Returns
    -------
    SchedulerRun

    Raises
    ------
    TypeError
        If it is not a scheduler.
    ValueError
        If its steps cannot be described (the message says why, and which scheduler to use instead),
        if its options contradict each other, or if its timesteps are not set.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"scheduler must be a scheduler, not the class of one, got {scheduler!r}")
    steps = read(scheduler, eta)
    alpha_t, sigma_t, alpha_s, sigma_s = steps.ends
    before, after = steps.input_scale[:-1], steps.input_scale[1:]
    x_factor, x0_factor, step_var = steps.factors
    mean_x, mean_x0, transition_var = (
        step_factors(*steps.ends, 1.0) if steps.eta < 1 else steps.factors
    )
    coefficients = StepCoefficients(
        time=steps.time,
        alpha_t=alpha_t * before,
        sigma_t=sigma_t * before,
        alpha_s=alpha_s * after,
        sigma_s=sigma_s * after,
        alpha_ts=equations.transition_alpha(alpha_t, alpha_s) * (before / after),
        beta_ts=added_variance(*steps.ends) * before**2,
        x_factor=x_factor * (after / before),
        x0_factor=x0_factor * after,
        step_var=step_var * after**2,
        eta=np.full(len(steps.time), steps.eta),
        transition_x_factor=mean_x * (after / before),
        transition_x0_factor=mean_x0 * after,
        transition_var=transition_var * after**2,
    )
    return SchedulerRun(
        scheduler=type(scheduler).__name__,
        timesteps=steps.timesteps,
        coefficients=coefficients,
        input_scale=steps.input_scale,
        prediction_type=steps.prediction_type,
        limit=steps.limit,
    )


def transition(scheduler: Any, step: int, *, eta: float | None = None) -> Transition:
    """Read one step of a run from a scheduler.

    Parameters
    ----------
    scheduler, eta
        As for :func:`scheduler_run`.
    step : int
        Index into ``scheduler.timesteps``, 0 the noisiest.

    Returns
    -------
    Transition

    Raises
    ------
    TypeError, ValueError
        As for :func:`scheduler_run`, or if there is no such step.
    """
    steps = read(scheduler, eta)
    step = checks.integer("step", step, 0, len(steps.timesteps) - 1)
    alpha_t, sigma_t, alpha_s, sigma_s = (float(end[step]) for end in steps.ends)
    x_factor, x0_factor, step_var = (float(factor[step]) for factor in steps.factors)
    return Transition(
        timestep=float(steps.timesteps[step]),
        alpha_t=alpha_t,
        sigma_t=sigma_t,
        alpha_s=alpha_s,
        sigma_s=sigma_s,
        x_factor=x_factor,
        x0_factor=x0_factor,
        step_var=step_var,
        eta=steps.eta,
        prediction_type=steps.prediction_type,
        input_scale=float(steps.input_scale[step]),
        limit=steps.limit,
    )


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _check_pair(x: Tensor, prediction: Tensor) -> None:
    if x.shape != prediction.shape:
        raise ValueError(
            f"prediction must have the shape of x, {tuple(x.shape)}, got {tuple(prediction.shape)}"
        )
