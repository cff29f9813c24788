"""The step on a CPU: what :mod:`dng_kernels.naive` computes, with few passes over memory.

Tensors are taken a block at a time, so that what is between input and output stays in the cache,
and a block is combined by linear forms (:mod:`dng_kernels._forms`), one pass a term.  The residual
is never formed: ``residual . delta`` is the residual's form of the dot products with delta.

Per-sample numbers are computed with NumPy, where a call costs less than one of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dng_kernels import normal
from dng_kernels._forms import Form, Forms, prepared
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import GUIDE, LARGEST, NEED_SUMS, STEP, UPDATE, Row, Variant
from dng_math import equations
from dng_math._codes import (
    CONTRASTIVE,
    FEEDBACK,
    GEOMETRIC,
    LOG_ODDS,
    NO_TRACKER,
    PAPER,
    PERPENDICULAR,
    REGULATED,
    SAFE,
    TRACKED,
)

BLOCK = 2**17  # elements at a time: a handful of float32 blocks stay in the cache
EVENTS_IN, EVENTS_OUT = Inputs._fields[:7], ("x_next", "eps_guided", "momentum")

Block = dict[str, Tensor]  # the same rows and columns of several tensors


def run(
    inputs: Inputs, outputs: StepResult, variant: Variant, table: Tensor, index: Tensor
) -> None:
    """Write every output that is not None; arguments as for :func:`dng_kernels.naive.run`."""
    if torch.is_autocast_enabled("cpu"):
        # Autocast would take dot products, on which the posterior depends, in 16 bits.
        with torch.autocast("cpu", enabled=False):
            _run(inputs, outputs, variant, table, index)
    else:
        _run(inputs, outputs, variant, table, index)


def _run(
    inputs: Inputs, outputs: StepResult, variant: Variant, table: Tensor, index: Tensor
) -> None:
    noisy = inputs.noise is not None or inputs.keys is not None
    row = prepared(variant, noisy, tuple(table[int(index)].tolist()))
    at = row.at

    def numbers(values: Tensor) -> Any:
        return _as(values.detach(), table.dtype).numpy()

    blocks = _Blocks(inputs, outputs, table.dtype, index)
    state = odds = None
    scale = second = 0.0
    known: dict[str, Any] = {}
    if inputs.state is not None:
        state = numbers(inputs.state)
        if variant.tracker:
            odds = tracked_odds(variant.tracker, at, state)
    if variant.mode != UPDATE:
        before: Block = {}
        if variant.rule in NEED_SUMS:
            before = blocks.sums(lambda block, into, rows: first_sums(variant, block))
        known = {name: numbers(values) for name, values in before.items()}
        scale, second = scale_of(variant, at, odds, known, state, blocks.elements)
    forms = row.forms(scale, second)
    job = _Job(
        variant,
        at,
        Forms(*map(_columns, forms)),
        tracked=outputs.state is not None and variant.tracker != NO_TRACKER,
        apart=blocks.apart,
    )
    sums = {name: numbers(values) for name, values in blocks.sums(partial(block_step, job)).items()}
    blocks.finish()
    if outputs.scale is not None:
        if variant.rule == SAFE:
            mean = sums.get("scale", 0.0) / max(1, blocks.elements)
            scale = at.guidance_scale * at.applied * mean
        outputs.scale.numpy()[...] = scale
    if outputs.state is not None and variant.rule == REGULATED:
        outputs.state.numpy()[...] = state + at.rate * evidence(at, known)
    elif outputs.state is not None:
        residual_dot = (
            sums.get("residual", 0.0) if variant.mode == UPDATE else forms.residual.dot(sums)
        )
        if outputs.log_weight is not None:
            found = weight_of(at, scale, sums.get("delta", 0.0), residual_dot)
            outputs.log_weight.numpy()[...] = found
        gap = None if inputs.divergence_gap is None else numbers(inputs.divergence_gap)
        outputs.state.numpy()[...] = updated_state(
            variant, at, state, odds, sums.get("delta", 0.0), residual_dot, gap
        )


class _Job(NamedTuple):
    """What every block of a call shares."""

    variant: Variant
    at: Row
    forms: Forms  # with factors that multiply a block
    tracked: bool  # whether the sums are wanted
    apart: bool  # whether x_next shares no memory with an input, and is of the table's precision


class _Blocks:
    """The tensors of a call, a block at a time."""

    def __init__(
        self, inputs: Inputs, outputs: StepResult, dtype: torch.dtype, index: Tensor
    ) -> None:
        self.batch, self.elements = len(inputs.eps), inputs.eps[0].numel()
        shape = self.batch, self.elements
        self.dtype, self.index, self.keys = dtype, index, inputs.keys
        self.sources = {
            name: tensor.reshape(shape)
            for name, tensor in zip(EVENTS_IN, inputs, strict=False)
            if tensor is not None
        }
        self.asked = {
            name: tensor for name in EVENTS_OUT if (tensor := getattr(outputs, name)) is not None
        }
        self.targets = {
            name: tensor.view(shape) if tensor.is_contiguous() else tensor.new_empty(shape)
            for name, tensor in self.asked.items()
        }
        place = _storage(self.targets.get("x_next"))
        self.apart = (
            outputs.x_next is not None
            and outputs.x_next.dtype is dtype
            and all(_storage(tensor) != place for tensor in self.sources.values())
        )

    def sums(self, function: Callable[[Block, Block, slice], Block]) -> Block:
        """Call function(block, outputs, rows) for every block and add up what it returns.

        The result holds one number per sample under each name.
        """
        if self.batch * self.elements <= BLOCK:
            block = {name: _as(tensor, self.dtype) for name, tensor in self.sources.items()}
            if self.keys is not None:
                z = normal.normals(self.keys, self.elements, self.index)
                block["noise"] = _as(z, self.dtype)
            return function(block, self.targets, slice(None))
        totals: Block = {}
        rows = max(1, BLOCK // self.elements)
        for i in range(0, self.batch, rows):
            for j in range(0, self.elements, BLOCK):
                piece = slice(i, i + rows), slice(j, j + BLOCK)
                block = {name: _as(t[piece], self.dtype) for name, t in self.sources.items()}
                if self.keys is not None:
                    length = min(BLOCK, self.elements - j)
                    z = normal.normals(self.keys[piece[0]], length, self.index, first=j)
                    block["noise"] = _as(z, self.dtype)
                into = {name: t[piece] for name, t in self.targets.items()}
                for name, values in function(block, into, piece[0]).items():
                    if name not in totals:
                        totals[name] = values.new_zeros(self.batch)
                    totals[name][piece[0]] += values
        return totals

    def finish(self) -> None:
        """Copy the results to outputs that are not in C order."""
        for name, tensor in self.asked.items():
            if not tensor.is_contiguous():
                tensor.copy_(self.targets[name].view(tensor.shape))


def _columns(form: Form) -> Form:
    """The terms that are not zero, with factors that multiply a block."""
    return Form(
        {
            name: _column(factor)
            for name, factor in form.items()
            if not (isinstance(factor, float) and factor == 0.0)
        }
    )


def _column(factor: Any) -> Any:
    """A factor as a float, or as a column of one number a row."""
    if isinstance(factor, np.ndarray):
        return float(factor[0]) if len(factor) == 1 else torch.from_numpy(factor)[:, None]
    return factor


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a dtype; comparing first is cheaper than a call that has nothing to do."""
    return values if values.dtype is dtype else values.to(dtype)


def _clamp(values: Any, low: float, high: float) -> Any:
    """Clamp to [low, high]; NaN stays NaN."""
    return np.minimum(np.maximum(values, low), high)


def _storage(tensor: Tensor | None) -> int | None:
    """Address of the memory that a tensor is a view of."""
    return None if tensor is None else tensor.untyped_storage().data_ptr()


def _norm_sq(a: Tensor) -> Tensor:
    """|a|^2 of each row, (B, D) -> (B,); without the tensor of squares that a sum would make."""
    return torch.linalg.vector_norm(a, dim=-1).square_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a . b of each row, (B, D), (B, D) -> (B,)."""
    return torch.linalg.vecdot(a, b)


def combined(form: Form, block: Block, rows: slice, out: Tensor | None = None) -> Tensor:
    """The form of the tensors of a block, one pass a term."""
    result: Tensor | None = None
    for name, factor in form.items():
        if isinstance(factor, Tensor):
            factor = factor[rows]
        if result is None:
            result = torch.mul(block[name], factor, out=out)
        elif isinstance(factor, Tensor):
            result.addcmul_(block[name], factor)
        else:
            result.add_(block[name], alpha=factor)
    return torch.zeros_like(block["eps"]) if result is None else result


# ---------------------------------------------------------------------- one number a sample


def tracked_odds(tracker: int, at: Row, state: Any) -> Any:
    """p / (1 - p) of a posterior, e^L of a ratio; (B,) -> (B,)."""
    if tracker == LOG_ODDS:
        return np.exp(_clamp(state, -LARGEST, at.log_odds_cap))
    state = _clamp(state, at.low, at.high)
    if tracker == PAPER:
        return np.exp(state) / -np.expm1(state)
    return np.exp(state)


def scale_of(
    variant: Variant, at: Row, odds: Any, sums: dict[str, Any], state: Any, elements: int
) -> tuple[Any, Any]:
    """The scale of every sample, and the second number of its forms; both (B,) or one number."""
    rule, second = variant.rule, 0.0
    if rule == TRACKED:
        scale = equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    elif rule == FEEDBACK:
        scale = equations.feedback_scale(odds, at.pi) + at.added
    elif rule == CONTRASTIVE:
        factor = -at.contrastive_temperature * at.to_noise * at.to_noise
        scale = equations.contrastive_scale(
            at.guidance_scale, np.exp(factor * sums.get("delta", 0.0))
        )
        if variant.reads_third:
            decay = np.exp(factor * sums.get("third", 0.0))
            second = equations.contrastive_attraction(decay) - 1.0
    elif rule in (GEOMETRIC, REGULATED) and sums:
        scale = geometry(variant, at, sums, state, elements)
    else:
        scale = at.guidance_scale
    scale = at.active * scale
    if rule == PERPENDICULAR and sums:
        known = sums["direction"] > at.rounding_sq * sums["eps"]
        one = np.ones_like(sums["direction"])
        projection = np.where(known, sums["along"], 0.0 * one)
        second = scale * (projection / np.where(known, sums["direction"], one))
    return scale, second


def geometry(variant: Variant, at: Row, sums: dict[str, Any], state: Any, elements: int) -> Any:
    """GeoGuide's and CRG's scale, (B,); 0 where the two predictions agree to rounding."""
    known = sums["delta"] > at.rounding_sq * sums["eps"]
    one = np.ones_like(sums["delta"])
    if variant.rule == GEOMETRIC:
        distance = np.sqrt(np.where(known, sums["delta"], one))
        scale = equations.geometric_scale(at.length * elements**0.5, distance)
    else:
        surplus = 0.5 * at.gain * evidence(at, sums) + state - at.threshold
        known &= (surplus > 0) & (at.to_noise != 0)
        norm_sq = np.where(known, sums["delta"] * (at.to_noise * at.to_noise), one)
        scale = equations.regulating_scale(at.guidance_scale, surplus, at.gain, norm_sq)
    return np.where(known, scale, 0.0 * one)


def evidence(at: Row, sums: dict[str, Any]) -> Any:
    """CRG's b of a step, (B,); see :func:`dng_kernels.naive.evidence`."""
    along = 2.0 * at.lead * sums.get("along", 0.0)
    return at.to_noise * at.to_noise * equations.regulating_evidence(along, sums.get("delta", 0.0))


def weight_of(at: Row, scale: Any, norm_sq: Any, residual_dot: Any) -> Any:
    """The log weight of a step, (B,) or 0; see :func:`dng_kernels.naive.weight_of`."""
    if at.deviation == 0.0:
        return 0.0
    k = at.factor * scale
    noise_shift = -k * (residual_dot + k * norm_sq) / at.deviation
    return equations.log_weight(noise_shift, k * k * norm_sq, at.deviation)


def updated_state(
    variant: Variant,
    at: Row,
    state: Any,
    odds: Any,
    norm_sq: Any,
    residual_dot: Any,
    divergence_gap: Any,
) -> Any:
    """The tracker's state at the cleaner end, (B,); unchanged where the variance is 0.

    From |delta|^2, residual . delta and, where it is tracked, div s_c - div s.
    """
    if at.variance == 0.0:
        return state
    gap_sq = at.transition_factor * at.transition_factor * norm_sq
    residual_gap = at.transition_factor * residual_dot
    start = state
    if variant.tracker == LOG_ODDS:
        log_ratio = equations.log_odds_ratio(odds, gap_sq, residual_gap, at.variance)
    else:
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, at.variance)
        start = _clamp(state, at.low, at.high)
    if variant.divergence:
        if variant.tracker == LOG_ODDS:
            score_gap_sq = at.score_factor * norm_sq
            divergence_gap = equations.rest_divergence_gap(odds, divergence_gap, score_gap_sq)
        log_ratio = log_ratio + equations.divergence_correction(at.eta, at.beta, divergence_gap)
    updated = equations.tracker_update(
        start,
        _clamp(log_ratio, -LARGEST, LARGEST),
        at.variance,
        at.temperature,
        at.offset,
        at.offset_nats,
    )
    return _clamp(updated, at.low, at.high)


# ---------------------------------------------------------------------- a block


def first_sums(variant: Variant, block: Block) -> Block:
    """Sums over whole samples that a rule needs before it can guide."""
    eps, rule = block["eps"], variant.rule
    delta = block["eps_neg"] - eps
    if rule == CONTRASTIVE:
        found = {"delta": _norm_sq(delta)}
        if variant.reads_third:
            found["third"] = _norm_sq(block["eps_third"] - eps)
        return found
    found = {"eps": _norm_sq(eps)}
    if rule in (GEOMETRIC, REGULATED):
        found["delta"] = _norm_sq(delta)
    if rule in (PERPENDICULAR, REGULATED):
        direction = block["eps_third"] - eps
        found["along"] = _dot(delta, direction)
        if rule == PERPENDICULAR:
            found["direction"] = _norm_sq(direction)
    return found


def block_step(job: _Job, block: Block, into: Block, rows: slice) -> Block:
    """Write the outputs of a block; return the sums that the state and SLD's scale need."""
    variant, at, forms, eps = job.variant, job.at, job.forms, block["eps"]
    found: Block = {}
    block["delta"] = block["eps_neg"] - eps
    if variant.mode != UPDATE:
        if variant.cfg:
            block["third_gap"] = eps - block["eps_third"]
        if variant.rule == PERPENDICULAR:
            block["direction"] = block["eps_third"] - eps
        if variant.rule == SAFE:
            found["scale"] = _safe(variant, at, block, into)
    clips = variant.clip and variant.mode != GUIDE
    guided = None
    if "eps_guided" in into or (clips and variant.mode == STEP):
        guided = combined(forms.guided, block, rows)
    if clips:
        block["eps"] = clipped(at, block["x"], eps)
        block["delta"] = clipped(at, block["x"], block["eps_neg"]) - block["eps"]
        if guided is not None:
            block["shift"] = clipped(at, block["x"], guided) - block["eps"]
    if job.tracked:
        delta = block["delta"]
        found["delta"] = _norm_sq(delta)
        if variant.mode == UPDATE:
            # x and x_next are close: here only the difference is accurate.
            found["residual"] = _dot(combined(forms.residual, block, rows), delta)
        else:
            terms = (name for name in forms.residual if name != "delta")
            found |= {name: _dot(block[name], delta) for name in terms}
    # Written last: an output may be an input.  Terms are added up in place only if it is not.
    if "x_next" in into:
        target = into["x_next"]
        x_next = combined(forms.x_next, block, rows, target if job.apart else None)
        if x_next is not target:
            target.copy_(x_next)
    if "eps_guided" in into and guided is not None:
        into["eps_guided"].copy_(guided)
    return found


def _safe(variant: Variant, at: Row, block: Block, into: Block) -> Tensor:
    """Write SLD's correction and momentum; return the sum of its elementwise scale."""
    difference = compared = block["delta"] * at.to_noise
    if variant.reads_third:
        compared = (block["eps_neg"] - block["eps_third"]) * at.to_noise
    magnitude = compared.abs()
    gated = magnitude if at.absolute > 0 else -compared
    scale = torch.where(gated < at.threshold, (at.slope * magnitude).clamp(max=1.0), 0.0)
    momentum = block["momentum"]
    block["correction"] = equations.safe_correction(scale, difference, at.momentum_scale, momentum)
    following = equations.safe_momentum(momentum, block["correction"], at.momentum_decay)
    into["momentum"].copy_(following if at.active > 0 else momentum)
    return scale.sum(-1)


def clipped(at: Row, x: Tensor, prediction: Tensor) -> Tensor:
    """x0 of a prediction, in [-clip, clip]."""
    x0 = equations.step_mean(x, prediction, at.x0_x_factor, at.x0_factor)
    return x0.clamp(-at.clip, at.clip)
