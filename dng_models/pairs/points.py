"""Negatives that are given as points, images or latents: SPELL's balls, and a kernel mixture.

Both are formulas of x or of a prediction of x0 alone, so they run beside the fused step, in torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dng_math import checks, equations
from dng_math.rules import SPELL, ImageReferenced, LimitedInterval, Rule, Unguided, innermost
from dng_math.schedules import PREDICTION_TYPES, NoiseSchedule, PredictionType, x0_of

SMALLEST_DISTANCE = 1e-30  # of float32, whose squares of differences are exact there


class PointsDenoiser:
    """The denoiser of a kernel mixture on given points: what an unwanted network would predict.

    ``p(x0) = mean_k N(x0; z_k, bandwidth^2)`` (docs/theory.md, section 5.13).  As ``unwanted`` of
    :func:`dng_models.sample` with :class:`dng_math.DynamicNegativeGuidance` it gives DNG away from
    images, at one evaluation of a network a step.

    Parameters
    ----------
    points : array_like or Tensor, shape (K, ...)
        The unwanted images or latents, K >= 1, scaled as the network's own x0.
    schedule : NoiseSchedule, optional
        As for :func:`dng_models.sample`; default DDPM's 1000 linear betas.
    bandwidth : float
        Standard deviation of the kernel on each point, >= 0.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What it returns.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    def __init__(
        self,
        points: ArrayLike | Tensor,
        schedule: NoiseSchedule | None = None,
        bandwidth: float = 0.0,
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        self.points = checked_points(points)
        self.schedule = NoiseSchedule.linear() if schedule is None else schedule
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
        self.bandwidth = checks.non_negative("bandwidth", bandwidth)
        checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
        self.prediction_type: PredictionType = prediction_type

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction at x (B, ...) and training timesteps t (B,), all of one value."""
        index = int(t[0]) + 1
        alpha, sigma = float(self.schedule.alpha[index]), float(self.schedule.sigma[index])
        return points_prediction(self.points, x, alpha, sigma, self.bandwidth, self.prediction_type)


def checked_points(points: Any) -> Tensor:
    """Points (K, ...) as a tensor on the CPU, at least one, all finite."""
    if isinstance(points, Tensor):
        found = points.detach().cpu()
    else:
        found = torch.from_numpy(np.array(points, dtype=np.float64))
    if found.ndim < 2 or found.numel() == 0 or not found.is_floating_point():
        raise ValueError(
            "points must be floating-point numbers of shape (K, ...), K of them and at least one, "
            f"got {found.dtype} of shape {tuple(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ValueError("points must be finite, got some that are not")
    return found


def points_prediction(
    points: Tensor,
    x: Tensor,
    alpha: float,
    sigma: float,
    bandwidth: float,
    prediction_type: PredictionType,
) -> Tensor:
    """Prediction of the points' kernel mixture at x, (B, ...), in the dtype of x.

    Parameters
    ----------
    points : Tensor, shape (K, ...)
    x : Tensor, shape (B, ...)
        x = alpha x0 + sigma eps.
    alpha, sigma : float
        sigma > 0.
    bandwidth : float
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}

    Raises
    ------
    ValueError
        If the points and x differ in the shape of one of them.
    """
    if points.shape[1:].numel() != x.shape[1:].numel():
        raise ValueError(
            f"points must have the shape of the latents, (K, *{tuple(x.shape[1:])}), got "
            f"{tuple(points.shape)}"
        )
    # At little noise the logits are differences of numbers some 1e8 large.
    now, z = x.double().flatten(1), points.to(x.device, torch.float64).flatten(1)
    variance = (alpha * bandwidth) ** 2 + sigma * sigma
    # |x - alpha z|^2 but for |x|^2, which all points share.
    logits = (alpha * (now @ z.T) - 0.5 * alpha * alpha * (z * z).sum(1)) / variance
    centre = torch.softmax(logits, dim=1) @ z
    gain = alpha * bandwidth**2 / variance
    x0 = centre + gain * (now - alpha * centre)
    # x0 = on_x x + on_prediction prediction
    on_x, on_prediction = (
        float(x0_of(prediction_type, *at, alpha, sigma)) for at in ((1.0, 0.0), (0.0, 1.0))
    )
    return ((x0 - on_x * now) / on_prediction).reshape(x.shape).to(x.dtype)


def stepped_by(rule: Rule) -> Rule:
    """The rule that steps are planned with: SPELL moves predictions before an unguided step."""
    if isinstance(rule, LimitedInterval):
        inside = stepped_by(rule.rule)
        return rule if inside is rule.rule else LimitedInterval(inside, rule.t_lo, rule.t_hi)
    return Unguided() if isinstance(rule, SPELL) else rule


def refuse_no_density(rule: Rule) -> None:
    """Refuse ImageReferenced, whose posterior networks cannot give."""
    inner = innermost(rule)
    if isinstance(inner, ImageReferenced):
        raise ValueError(
            "rule must have a posterior that networks can give, and that of ImageReferenced needs "
            "the density of x: give DynamicNegativeGuidance.tracked(...) with "
            "unwanted=PointsDenoiser(points) to sample, with images= to apply_guidance; got "
            f"{type(inner).__name__} of {len(inner.points)} points"
        )


def shielded(
    rule: SPELL, x: Tensor, prediction: Tensor, on_x: float, on_prediction: float
) -> tuple[Tensor, Tensor]:
    """A prediction moved out of SPELL's balls, (B, ...), and the scale of all points, (B,).

    Parameters
    ----------
    rule : SPELL
        Its points have as many numbers as one of x.
    x, prediction : Tensor, shape (B, ...)
    on_x, on_prediction : float
        ``x0 = on_x x + on_prediction prediction``.

    Raises
    ------
    ValueError
        If the points and x differ in their number of dimensions.
    """
    if rule.points.shape[1] != math.prod(x.shape[1:]):
        raise ValueError(
            f"points of SPELL must have the {math.prod(x.shape[1:])} numbers of the latents, got "
            f"shape {rule.points.shape}"
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, prediction.dtype), torch.float32)
    x0 = (on_x * x.to(wide) + on_prediction * prediction.to(wide)).flatten(1)
    shift, total = torch.zeros_like(x0), x0.new_zeros(len(x0))
    for point in torch.tensor(rule.points, dtype=wide, device=x.device):
        difference = x0 - point
        distance = torch.linalg.vector_norm(difference, dim=1).clamp(min=SMALLEST_DISTANCE)
        share = rule.guidance_scale * equations.shield(rule.radius, distance).clamp(min=0.0)
        shift = equations.toward(shift, difference, share[:, None])
        total = total + share
    moved = prediction.to(wide) + (shift / on_prediction).reshape(prediction.shape)
    # Where no ball is entered the prediction keeps its bits.
    inside = (total != 0).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(inside, moved.to(prediction.dtype), prediction), total
