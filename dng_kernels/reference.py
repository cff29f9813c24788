"""The step in plain torch: the specification in code, and the path of CPUs and of float64.

Tensors are taken a block at a time, so that what is between input and output stays in the cache.
``(x_next - mu_base) . delta`` is linear in what the step is made of, so it needs the dot products
of those with ``delta`` and never the residual itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from dng_kernels import normal
from dng_kernels.plan import (
    COLUMNS,
    CONTRASTIVE,
    FEEDBACK,
    LARGEST,
    LOG_ODDS,
    NO_TRACKER,
    PAPER,
    PERPENDICULAR,
    SAFE,
    TOWARD,
    TRACKED,
)
from dng_math import equations

STEP, GUIDE, UPDATE = range(3)
BLOCK = 2**16  # elements at a time: a handful of float32 blocks fit the second-level cache


class Variant(NamedTuple):
    """What is fixed when a kernel is compiled."""

    mode: int
    rule: int
    tracker: int
    cfg: bool
    clip: bool
    drift: bool
    divergence: bool


class Inputs(NamedTuple):
    """x, x_next, predictions, noise and momentum (B, ...); keys (B, 2); the rest (B,).

    ``eps_third`` is the unconditional prediction of CFG or the positive one of Perp-Neg; x_next is
    read by UPDATE only.
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


class Outputs(NamedTuple):
    """What is asked for; x_next, eps_guided and momentum (B, ...), state and scale (B,)."""

    x_next: Tensor | None
    eps_guided: Tensor | None
    momentum: Tensor | None
    state: Tensor | None
    scale: Tensor | None


EVENTS_IN, EVENTS_OUT = Inputs._fields[:7], Outputs._fields[:3]


def run(inputs: Inputs, outputs: Outputs, variant: Variant, table: Tensor, index: Tensor) -> None:
    """Write every output that is not None.

    Parameters
    ----------
    table : Tensor, shape (N, WIDTH)
        Of a plan; its dtype, float32 or float64, is that of the arithmetic.
    index : 0-dim int64 Tensor
        Row of the table.
    """
    at = SimpleNamespace(**dict(zip(COLUMNS, table[index].unbind(), strict=False)))
    batch = len(inputs.eps)
    elements = inputs.eps[0].numel() if batch else 0
    sources = {
        name: tensor.reshape(batch, elements)
        for name, tensor in zip(EVENTS_IN, inputs, strict=False)
        if tensor is not None
    }
    if inputs.keys is not None:
        sources["noise"] = normal.normals(inputs.keys, elements, index)
    asked = {
        name: tensor
        for name, tensor in zip(EVENTS_OUT, outputs, strict=False)
        if tensor is not None
    }
    targets = {name: _flat(tensor, batch, elements) for name, tensor in asked.items()}

    def blocks() -> Iterator[tuple[slice, SimpleNamespace, dict[str, Tensor]]]:
        rows = max(1, BLOCK // max(1, elements))
        for i in range(0, batch, rows):
            for j in range(0, elements, BLOCK):
                where = slice(i, i + rows), slice(j, j + BLOCK)
                block = {name: tensor[where].to(table.dtype) for name, tensor in sources.items()}
                into = {name: tensor[where] for name, tensor in targets.items()}
                yield where[0], SimpleNamespace(**(dict.fromkeys(EVENTS_IN) | block)), into

    state = None if inputs.state is None else inputs.state.to(table.dtype)
    odds = None if state is None else tracked_odds(variant.tracker, state, at)
    sums = table.new_zeros(3, batch)
    if variant.mode != UPDATE and variant.rule in (CONTRASTIVE, PERPENDICULAR):
        for rows, block, _ in blocks():
            sums[:, rows] += first_sums(variant.rule, block)
    scale, projection = scale_of(variant.rule, at, odds, sums)
    sums = torch.zeros_like(sums)
    for rows, block, into in blocks():
        one = (variant, at, block, scale[rows, None], projection[rows, None])
        sums[:, rows] += update_block(*one) if variant.mode == UPDATE else step_block(*one, into)
    for name, tensor in asked.items():
        if not tensor.is_contiguous():
            tensor.copy_(targets[name].view(tensor.shape))

    if outputs.scale is not None:
        if variant.rule == SAFE:
            scale = at.guidance_scale * at.applied * sums[2] / max(1, elements)
        outputs.scale.copy_(scale)
    if outputs.state is not None and state is not None and odds is not None:
        updated = updated_state(variant, at, state, odds, sums, inputs.divergence_gap)
        outputs.state.copy_(updated)


def _flat(target: Tensor, batch: int, elements: int) -> Tensor:
    """Where a block of an output is written: the output itself if it is in C order."""
    if target.is_contiguous():
        return target.view(batch, elements)
    return target.new_empty(batch, elements)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, (B, D), (B, D) -> (B,)."""
    return torch.linalg.vecdot(a, b)


def tracked_odds(tracker: int, state: Tensor, at: SimpleNamespace) -> Tensor:
    """p / (1 - p) of a posterior, e^L of a ratio; (B,) -> (B,)."""
    if tracker == LOG_ODDS:
        return torch.exp(torch.minimum(state, at.log_odds_cap))
    state = state.clamp(at.low, at.high)
    if tracker == PAPER:
        return torch.exp(state) / -torch.expm1(state)
    return torch.exp(state)


def first_sums(rule: int, block: SimpleNamespace) -> Tensor:
    """What a rule must know of a whole sample before it can guide, (3, B)."""
    delta = block.eps_neg - block.eps
    if rule == CONTRASTIVE:
        gap_sq = _dot(delta, delta)
        return torch.stack([gap_sq, torch.zeros_like(gap_sq), torch.zeros_like(gap_sq)])
    direction = block.eps_third - block.eps
    return torch.stack(
        [_dot(direction, direction), _dot(delta, direction), _dot(block.eps, block.eps)]
    )


def scale_of(
    rule: int, at: SimpleNamespace, odds: Tensor | None, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale of every sample and Perp-Neg's projection, both (B,)."""
    projection = torch.zeros_like(sums[0])
    if rule == TRACKED:
        assert odds is not None
        scale = equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    elif rule == FEEDBACK:
        scale = equations.feedback_scale(odds, at.rule_0)
    elif rule == CONTRASTIVE:
        decay = torch.exp(-at.rule_0 * at.to_noise * at.to_noise * sums[0])
        scale = equations.contrastive_scale(at.guidance_scale, decay)
    else:
        scale = at.guidance_scale.expand_as(projection)
    if rule == PERPENDICULAR:
        norm_sq, dot, base_sq = sums
        known = norm_sq > at.rule_1 * base_sq
        projection = torch.where(known, dot / torch.where(known, norm_sq, 1.0), 0.0)
    return at.active * scale, projection


def step_block(
    variant: Variant,
    at: SimpleNamespace,
    block: SimpleNamespace,
    scale: Tensor,
    projection: Tensor,
    into: dict[str, Tensor],
) -> Tensor:
    """Guide a block and take its step; |delta|^2, residual . delta and SLD's scale, (3, B)."""
    eps, delta = block.eps, block.eps_neg - block.eps
    base = (
        equations.toward(block.eps_third, eps - block.eps_third, at.cfg_scale)
        if variant.cfg
        else eps
    )
    elementwise = None
    if variant.rule == SAFE:
        guided, elementwise, momentum = safe_block(at, base, delta, block.momentum)
        if "momentum" in into:
            into["momentum"].copy_(momentum)
    elif variant.rule == PERPENDICULAR:
        direction = block.eps_third - eps
        guided = equations.away(
            equations.toward(base, direction, at.active * at.rule_0),
            equations.perpendicular(delta, direction, projection),
            scale,
        )
    elif variant.rule in (TOWARD, FEEDBACK):
        guided = equations.toward(base, delta, scale)
    else:
        guided = equations.away(base, delta, scale)
    if "eps_guided" in into:
        into["eps_guided"].copy_(guided)

    sums = scale.new_zeros(3, len(eps))
    if elementwise is not None:
        sums[2] = elementwise.sum(-1)
    if variant.mode == GUIDE:
        return sums

    end = guided
    if variant.clip:
        eps, end = clipped(at, block.x, eps), clipped(at, block.x, guided)
        delta = clipped(at, block.x, block.eps_neg) - eps
    x_next = equations.step_mean(block.x, end, at.x_factor, at.factor)
    if block.noise is not None:
        x_next = equations.step(x_next, at.deviation, block.noise)
    into["x_next"].copy_(x_next)
    if variant.tracker != NO_TRACKER:
        sums[0] = _dot(delta, delta)
        if variant.cfg or variant.clip:
            shift_gap = _dot(end - eps, delta)
        else:
            shift_gap = scale[:, 0] * sums[0]
            shift_gap = shift_gap if variant.rule == FEEDBACK else -shift_gap
        sums[1] = equations.step_residual(
            _dot(block.x, delta) if variant.drift else 0.0,
            _dot(eps, delta) if variant.drift else 0.0,
            shift_gap,
            0.0 if block.noise is None else _dot(block.noise, delta),
            at.x_drift,
            at.drift,
            at.factor,
            at.deviation,
        )
    return sums


def update_block(
    variant: Variant,
    at: SimpleNamespace,
    block: SimpleNamespace,
    scale: Tensor,
    projection: Tensor,
) -> Tensor:
    """|delta|^2 and residual . delta of a step that was taken elsewhere, (3, B)."""
    eps, eps_neg = block.eps, block.eps_neg
    if variant.clip:
        eps, eps_neg = clipped(at, block.x, eps), clipped(at, block.x, eps_neg)
    delta = eps_neg - eps
    mean = equations.step_mean(block.x, eps, at.kernel_x_factor, at.kernel_factor)
    sums = scale.new_zeros(3, len(eps))
    sums[0] = _dot(delta, delta)
    sums[1] = _dot(block.x_next - mean, delta)
    return sums


def safe_block(
    at: SimpleNamespace, base: Tensor, delta: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SLD: guided prediction, elementwise scale and next momentum."""
    difference = delta * at.to_noise
    magnitude = difference.abs()
    gated = torch.where(at.rule_4 > 0, magnitude, -difference)
    scale = torch.where(gated < at.rule_0, (at.rule_1 * magnitude).clamp(max=1.0), 0.0)
    correction = equations.safe_correction(scale, difference, at.rule_2, momentum)
    following = equations.safe_momentum(momentum, correction, at.rule_3)
    guided = equations.away(base, correction * at.from_noise, at.guidance_scale * at.applied)
    return guided, scale, torch.where(at.active > 0, following, momentum)


def clipped(at: SimpleNamespace, x: Tensor, prediction: Tensor) -> Tensor:
    """x0 of a prediction, in [-clip, clip]."""
    x0 = equations.step_mean(x, prediction, at.x0_x_factor, at.x0_factor)
    return x0.clamp(-at.clip, at.clip)


def updated_state(
    variant: Variant,
    at: SimpleNamespace,
    state: Tensor,
    odds: Tensor,
    sums: Tensor,
    divergence_gap: Tensor | None,
) -> Tensor:
    """State at the cleaner end of the step, (B,); unchanged where the variance is 0."""
    gap_sq = at.kernel_factor * at.kernel_factor * sums[0]
    residual_gap = at.kernel_factor * sums[1]
    moves = at.variance > 0
    variance = torch.where(moves, at.variance, 1.0)
    if variant.tracker == LOG_ODDS:
        log_ratio = equations.log_odds_ratio(odds, gap_sq, residual_gap, variance)
    else:
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, variance)
    if variant.divergence and divergence_gap is not None:
        gap = divergence_gap.to(state.dtype)
        if variant.tracker == LOG_ODDS:
            gap = equations.rest_divergence_gap(odds, gap, at.score_factor * sums[0])
        log_ratio = log_ratio + equations.divergence_correction(at.eta, at.beta, gap)
    log_ratio = log_ratio.clamp(-LARGEST, LARGEST)
    start = state if variant.tracker == LOG_ODDS else state.clamp(at.low, at.high)
    updated = equations.tracker_update(
        start, log_ratio, variance, at.temperature, at.offset, at.offset_nats
    )
    return torch.where(moves, updated.clamp(at.low, at.high), state)
