"""The step as it is written, on whole tensors: the specification, to be read first.

A rule moves the prediction ``eps`` by a shift, mostly along ``delta = eps_neg - eps``; the sampler
takes its step from there; and the tracker compares the step that was taken with the one that
``eps`` alone would have given, along ``delta``::

    guided = eps + shift
    x_next = x_factor x + factor guided + deviation noise
    state  = state + temperature log_ratio(|gap|^2, residual . gap) + offsets

with ``gap = mu_neg - mu = transition_factor delta`` and ``residual = x_next - mu``.  The numbers of
a step are a row of the plan's table, by name (:data:`dng_kernels.plan.COLUMN`).  ``eps`` is the
prediction that the negative is measured from: the unconditional one if the plan says so.

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
    GEOMETRIC,
    LOG_ODDS,
    PAPER,
    PERPENDICULAR,
    REGULATED,
    SAFE,
    TOWARD,
    TRACKED,
)


class Inputs(NamedTuple):
    """What a step reads: x to momentum (B, ...), keys (B, 2), state and divergence_gap (B,).

    ``eps_third`` is the other prediction of CFG (the unconditional one, or the positive one where
    ``eps`` is unconditional), or the positive one of Perp-Neg.  x_next is read by UPDATE alone, and
    x not by GUIDE.
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
        The tracker's state at the cleaner end: log p, log p/(1-p) or L; for CRG the evidence with
        that of this step; float32 or float64.
    eps_guided : Tensor, shape (B, ...)
        The guided prediction, of the kind and dtype of ``eps``.
    scale : Tensor, shape (B,)
        The scale that was used; for SLD the mean of the elementwise one.
    momentum : Tensor, shape (B, ...)
        SLD's momentum for the next step, float32 or float64.
    log_weight : Tensor, shape (B,)
        Of a weighted plan: log of the unguided over the guided density of x_next, dtype of state.
    """

    x_next: Tensor | None = None
    state: Tensor | None = None
    eps_guided: Tensor | None = None
    scale: Tensor | None = None
    momentum: Tensor | None = None
    log_weight: Tensor | None = None


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

    odds: Any = tracked_odds(variant.tracker, at, state) if variant.tracker else None
    guided: Any = None
    scale = x_next = residual = following = log_weight = None
    if variant.mode != UPDATE:
        shift, scale, momentum = guide(variant, at, eps, neg, third, odds, momentum, state)
        guided = end = eps + shift
        if variant.rule == REGULATED:
            following = state + at.rate * evidence(at, third - eps, neg - eps)
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
    if residual is not None and variant.tracker:
        following = updated_state(variant, at, state, odds, neg - eps, residual, divergence_gap)
    if variant.weighted and scale is not None and residual is not None:
        delta = neg - eps
        log_weight = weight_of(at, scale, dot(delta, delta), dot(residual, delta))
    x_next, guided, momentum = (
        None if v is None else v.reshape(shape) for v in (x_next, guided, momentum)
    )
    scale = None if scale is None else scale.expand(shape[:1])
    return StepResult(x_next, following, guided, scale, momentum, log_weight)


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
    state: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """How far a rule moves the prediction (B, D), its scale (B,) or (), and SLD's next momentum."""
    delta, rule, scale = eps_neg - eps, variant.rule, at.guidance_scale
    push: Any = 0.0  # the shift by CFG beneath the rule
    if variant.cfg:
        cfg_scale = at.cfg_scale
        if rule == CONTRASTIVE and variant.reads_third:
            decay = decay_of(at, third - eps)
            more = equations.contrastive_attraction(decay) - 1.0
            cfg_scale = (cfg_scale + at.active * at.attraction * more)[:, None]
        push = equations.toward(third - eps, eps - third, cfg_scale)
    if rule == SAFE:
        strength = at.guidance_scale * at.applied
        difference = delta * at.to_noise
        compared = (eps_neg - third) * at.to_noise if variant.reads_third else difference
        correction, gate, momentum = safe(at, difference, compared, momentum)
        shift = equations.away(push, correction * at.from_noise, strength)
        return shift, strength * gate.sum(-1) / max(1, gate.shape[-1]), momentum
    if rule == TRACKED:
        scale = equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    elif rule == FEEDBACK:
        scale = equations.feedback_scale(odds, at.pi) + at.added
    elif rule == CONTRASTIVE:
        scale = equations.contrastive_scale(at.guidance_scale, decay_of(at, delta))
    elif rule in (GEOMETRIC, REGULATED):
        norm_sq = dot(delta, delta)
        known = norm_sq > at.rounding_sq * dot(eps, eps)
        norm_sq = torch.where(known, norm_sq, 1.0)
        if rule == GEOMETRIC:
            length = at.length * delta.shape[-1] ** 0.5
            scale = equations.geometric_scale(length, norm_sq.sqrt())
        else:
            seen = evidence(at, third - eps, delta)
            surplus = 0.5 * at.gain * seen + state - at.threshold
            known = known & (surplus > 0) & (at.to_noise != 0)
            square = torch.where(known, norm_sq * at.to_noise * at.to_noise, 1.0)
            scale = equations.regulating_scale(at.guidance_scale, surplus, at.gain, square)
        scale = torch.where(known, scale, 0.0)
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


def decay_of(at: Row, difference: Tensor) -> Tensor:
    """Contrastive CFG's exp(-tau |difference|^2), of noise predictions, (B, D) -> (B,)."""
    norm_sq = dot(difference * at.to_noise, difference * at.to_noise)
    return torch.exp(-at.contrastive_temperature * norm_sq)


def evidence(at: Row, third: Tensor, delta: Tensor) -> Tensor:
    """CRG's b of a step, (B,), from eps_third - eps and delta, both (B, D).

    With d = delta and the base w (eps_third - eps) from eps: |base|^2 - |base - d|^2, which is
    2 base . d - |d|^2, so that no two large norms are subtracted.
    """
    along, norm_sq = 2.0 * at.lead * dot(third, delta), dot(delta, delta)
    return at.to_noise * at.to_noise * equations.regulating_evidence(along, norm_sq)


def weight_of(at: Row, scale: Tensor, norm_sq: Tensor, residual_dot: Tensor) -> Tensor:
    """log of the unguided over the guided density of a step of DNG, (B,); 0 without noise.

    From its scale, |delta|^2 and residual . delta: the step was shifted by -k delta with
    k = factor scale, and residual = -k delta + deviation z.
    """
    k = at.factor * scale
    noisy = at.deviation > 0
    deviation = torch.where(noisy, at.deviation, 1.0)
    noise_shift = -k * (residual_dot + k * norm_sq) / deviation
    found = equations.log_weight(noise_shift, k * k * norm_sq, deviation)
    return torch.where(noisy, found, 0.0)


def safe(
    at: Row, difference: Tensor, compared: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SLD's correction, elementwise scale and next momentum, of noise predictions; all (B, D)."""
    magnitude = compared.abs()
    gated = torch.where(at.absolute > 0, magnitude, -compared)
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
