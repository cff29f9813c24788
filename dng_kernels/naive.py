"""The step as it is written, on whole tensors: the specification, to be read first.

A rule moves the prediction ``eps`` by a shift, mostly along ``delta = eps_neg - eps``; the sampler
takes its step from there; and the tracker compares the step that was taken with the one that
``eps`` alone would have given, along ``delta``::

    guided = eps + shift
    x_next = x_factor x + factor guided + deviation noise
    state  = state + temperature log_ratio(|gap|^2, residual . gap) + offsets

with ``gap = mu_neg - mu = transition_factor delta`` and ``residual = x_next - mu``.  The numbers of
a step are a row of the plan's table, by name (:data:`dng_kernels.plan.COLUMN`).

``torch.compile`` traces and fuses these functions.  :mod:`dng_kernels.cpu` and
:mod:`dng_kernels.fused` compute the same faster, and are tested against them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dng_kernels import normal
from dng_kernels.plan import GUIDE, LARGEST, STEP, UPDATE, Row, Variant, named
from dng_math import equations
from dng_math._codes import (
    CONTRASTIVE,
    FEEDBACK,
    LOG_ODDS,
    PAPER,
    PERPENDICULAR,
    SAFE,
    TOWARD,
    TRACKED,
)


class Inputs(NamedTuple):
    """What a step reads: x to momentum (B, ...), keys (B, 2), state and divergence_gap (B,).

    ``eps_third`` is the unconditional prediction of CFG or the positive one of Perp-Neg.  x_next
    is read by UPDATE alone, and x not by GUIDE.
    """

    x: Tensor | None
    x_next: Tensor | None
    eps: Tensor
    eps_neg: Tensor
    eps_third: Tensor | None
    noise: Tensor | None
    momentum: Tensor | None
    keys: Tensor | None
    state: Tensor | None
    divergence_gap: Tensor | None


class StepResult(NamedTuple):
    """Results of a step, or tensors to write them into; None for what is absent or not wanted.

    Attributes
    ----------
    x_next : Tensor, shape (B, ...)
        x at the cleaner end, dtype of x.
    state : Tensor, shape (B,)
        The tracker's state at the cleaner end: log p, log p/(1-p) or L; float32 or float64.
    eps_guided : Tensor, shape (B, ...)
        The guided prediction, of the kind and dtype of ``eps``.
    scale : Tensor, shape (B,)
        The scale that was used; for SLD the mean of the elementwise one.
    momentum : Tensor, shape (B, ...)
        SLD's momentum for the next step, float32 or float64.
    """

    x_next: Tensor | None = None
    state: Tensor | None = None
    eps_guided: Tensor | None = None
    scale: Tensor | None = None
    momentum: Tensor | None = None


def run(
    inputs: Inputs, outputs: StepResult, variant: Variant, table: Tensor, index: Tensor
) -> None:
    """Write every output that is not None, which may be an input; see :func:`compute`."""
    found = compute(inputs, variant, table, index)
    for target, values in zip(outputs, found, strict=True):
        if target is not None:
            assert values is not None
            target.copy_(values)


def compute(inputs: Inputs, variant: Variant, table: Tensor, index: Tensor) -> StepResult:
    """What an operation computes, in the precision of the table.

    Parameters
    ----------
    inputs : Inputs
        Tensors of any floating-point types.
    variant : Variant
        Which operation, rule and tracker.
    table : Tensor, shape (N, WIDTH)
        ``plan.table``, float32, or ``plan.table64``.
    index : Tensor, shape (), int64
        Row of the table.

    Returns
    -------
    StepResult
        Shapes are those of the inputs; None for what the operation or the rule does not have.
    """
    shape, elements = inputs.eps.shape, inputs.eps[0].numel()
    # Indexing with a 0-dim tensor would synchronise to read its value.
    at = named(table.index_select(0, index.reshape(1))[0].unbind())
    if inputs.keys is not None:
        inputs = inputs._replace(noise=normal.normals(inputs.keys, elements, index))

    def rows(values: Tensor | None) -> Any:
        return None if values is None else values.reshape(shape[0], elements).to(table.dtype)

    def numbers(values: Tensor | None) -> Any:
        return None if values is None else values.to(table.dtype)

    x, then, eps, neg, third, z, momentum = map(rows, inputs[:7])
    state, divergence_gap = map(numbers, inputs[8:])
    z = 0.0 if z is None else z

    odds: Any = None if state is None else tracked_odds(variant.tracker, at, state)
    guided: Any = None
    scale = x_next = residual = following = None
    if variant.mode != UPDATE:
        shift, scale, momentum = guide(variant, at, eps, neg, third, odds, momentum)
        guided = end = eps + shift
    if variant.mode != GUIDE and variant.clip:
        # From here on predictions are of x0, clipped.
        eps, neg = x0_of(at, x, eps), x0_of(at, x, neg)
        if guided is not None:
            end = x0_of(at, x, guided)
            shift = end - eps
    if variant.mode == STEP:
        mean = equations.step_mean(x, end, at.x_factor, at.factor)
        x_next = equations.step(mean, at.deviation, z)
        # x_next - mu, from what guidance and noise add: accurate where x and x_next are close.
        residual = equations.step_residual(
            x, eps, shift, z, at.x_drift, at.drift, at.factor, at.deviation
        )
    if variant.mode == UPDATE:
        residual = then - equations.step_mean(x, eps, at.transition_x_factor, at.transition_factor)
    if residual is not None and state is not None:
        following = updated_state(variant, at, state, odds, neg - eps, residual, divergence_gap)
    x_next, guided, momentum = (
        None if v is None else v.reshape(shape) for v in (x_next, guided, momentum)
    )
    scale = None if scale is None else scale.expand(shape[:1])
    return StepResult(x_next, following, guided, scale, momentum)


def tracked_odds(tracker: int, at: Row, state: Tensor) -> Tensor:
    """p / (1 - p) of a posterior, e^L of a ratio; (B,) -> (B,)."""
    if tracker == LOG_ODDS:
        return torch.exp(torch.minimum(state, at.log_odds_cap))
    state = state.clamp(at.low, at.high)
    if tracker == PAPER:
        return torch.exp(state) / -torch.expm1(state)
    return torch.exp(state)


def guide(
    variant: Variant,
    at: Row,
    eps: Tensor,
    eps_neg: Tensor,
    third: Any,
    odds: Any,
    momentum: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """How far a rule moves the prediction (B, D), its scale (B,) or (), and SLD's next momentum."""
    delta, rule, scale = eps_neg - eps, variant.rule, at.guidance_scale
    push: Any = 0.0  # the shift by CFG beneath the rule
    if variant.cfg:
        push = equations.toward(third - eps, eps - third, at.cfg_scale)
    if rule == SAFE:
        strength = at.guidance_scale * at.applied
        correction, gate, momentum = safe(at, delta * at.to_noise, momentum)
        shift = equations.away(push, correction * at.from_noise, strength)
        return shift, strength * gate.sum(-1) / max(1, gate.shape[-1]), momentum
    if rule == TRACKED:
        scale = equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    elif rule == FEEDBACK:
        scale = equations.feedback_scale(odds, at.pi)
    elif rule == CONTRASTIVE:
        norm_sq = dot(delta * at.to_noise, delta * at.to_noise)
        decay = torch.exp(-at.contrastive_temperature * norm_sq)
        scale = equations.contrastive_scale(at.guidance_scale, decay)
    scale = at.active * scale
    along = scale[:, None] if scale.ndim else scale
    if rule == PERPENDICULAR:
        direction = third - eps
        norm_sq = dot(direction, direction)
        known = norm_sq > at.rounding_sq * dot(eps, eps)
        projection = torch.where(known, dot(delta, direction) / norm_sq, 0.0)[:, None]
        push = equations.toward(0.0, direction, at.active * at.positive_scale)
        delta = equations.perpendicular(delta, direction, projection)
    move: Any = equations.toward if rule in (TOWARD, FEEDBACK) else equations.away
    return move(push, delta, along), scale, momentum


def safe(at: Row, difference: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SLD's correction, elementwise scale and next momentum, of noise predictions; all (B, D)."""
    magnitude = difference.abs()
    gated = torch.where(at.absolute > 0, magnitude, -difference)
    scale = torch.where(gated < at.threshold, (at.slope * magnitude).clamp(max=1.0), 0.0)
    correction = equations.safe_correction(scale, difference, at.momentum_scale, momentum)
    following = equations.safe_momentum(momentum, correction, at.momentum_decay)
    return correction, scale, torch.where(at.active > 0, following, momentum)


def x0_of(at: Row, x: Tensor, prediction: Tensor) -> Tensor:
    """x0 of a prediction, in [-clip, clip]; (B, D)."""
    x0 = equations.step_mean(x, prediction, at.x0_x_factor, at.x0_factor)
    return x0.clamp(-at.clip, at.clip)


def updated_state(
    variant: Variant,
    at: Row,
    state: Tensor,
    odds: Tensor,
    delta: Tensor,
    residual: Tensor,
    divergence_gap: Tensor | None,
) -> Tensor:
    """The tracker's state at the cleaner end, (B,); unchanged where the variance is 0."""
    norm_sq, factor, start = dot(delta, delta), at.transition_factor, state
    gap_sq, residual_gap = factor * factor * norm_sq, factor * dot(residual, delta)
    if variant.tracker == LOG_ODDS:
        log_ratio = equations.log_odds_ratio(odds, gap_sq, residual_gap, at.variance)
    else:
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, at.variance)
        start = state.clamp(at.low, at.high)
    if variant.divergence:
        if variant.tracker == LOG_ODDS:
            score_gap_sq = at.score_factor * norm_sq
            divergence_gap = equations.rest_divergence_gap(odds, divergence_gap, score_gap_sq)
        log_ratio = log_ratio + equations.divergence_correction(at.eta, at.beta, divergence_gap)
    updated = equations.tracker_update(
        start,
        log_ratio.clamp(-LARGEST, LARGEST),
        at.variance,
        at.temperature,
        at.offset,
        at.offset_nats,
    )
    return torch.where(at.variance > 0, updated.clamp(at.low, at.high), state)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over a sample, (B, D), (B, D) -> (B,)."""
    return (a * b).sum(-1)
