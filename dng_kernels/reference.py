"""The step in plain torch: the specification in code, and the path of CPUs and of float64.

Whatever a rule computes is linear in a few tensors: x, eps, delta = eps_neg - eps, the noise, and
what the rule adds to these.  So the equations run on linear forms (:class:`Form`), which costs
nothing, and memory is touched once a term.  ``(x_next - mu_base) . delta`` is the same form with
dot products in place of the tensors: neither the residual nor a large norm is ever formed.

Tensors are taken a block at a time, so that what is between input and output stays in the cache.
What there is one of a sample is computed by NumPy on a CPU, where a call of torch costs more than
the numbers do, and by torch on a GPU, where nothing may wait for the host.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dng_kernels import normal
from dng_kernels.plan import (
    COLUMNS,
    CONTRASTIVE,
    FEEDBACK,
    LARGEST,
    LOG_ODDS,
    PAPER,
    PERPENDICULAR,
    SAFE,
    TOWARD,
    TRACKED,
)
from dng_math import equations

STEP, GUIDE, UPDATE = range(3)
BLOCK = 2**17  # elements at a time: a handful of float32 blocks stay in the cache


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


Block = dict[str, Tensor]  # of the same rows and columns of several tensors
EVENTS_IN, EVENTS_OUT = Inputs._fields[:7], Outputs._fields[:3]


# Floats on the host, tensors of no dimension on a GPU; a tuple, which a compiler sees through.
_Row = namedtuple("_Row", COLUMNS)  # type: ignore[misc]
Row: TypeAlias = Any


class Form(dict[str, Any]):
    """A linear form: names of tensors and their factors, numbers or one number a sample."""

    def __add__(self, other: Form) -> Form:
        return Form(self | {name: self.get(name, 0.0) + c for name, c in other.items()})

    def __sub__(self, other: Form) -> Form:
        return Form(self | {name: self.get(name, 0.0) - c for name, c in other.items()})

    def dot(self, dots: dict[str, Any]) -> Any:
        """The form of the dot products of its tensors with something."""
        return sum((c * dots[name] for name, c in self.items() if name in dots), 0.0)


class Factor:
    """What an equation multiplies a form by: a number, or one number a sample."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __mul__(self, form: Form) -> Form:
        return Form({name: self.value * c for name, c in form.items()})


class _Job(NamedTuple):
    """What every block of a call shares."""

    variant: Variant
    at: Row
    guided: Form
    x_next: Form
    residual: Form
    tracked: bool  # whether the sums are wanted
    apart: bool  # whether x_next shares no memory with an input, and is of the table's precision


def run(inputs: Inputs, outputs: Outputs, variant: Variant, table: Tensor, index: Tensor) -> None:
    """Write every output that is not None.

    Parameters
    ----------
    table : Tensor, shape (N, WIDTH)
        Of a plan; its dtype, float32 or float64, is that of the arithmetic, in ``torch.autocast``
        too.
    index : 0-dim int64 Tensor
        Row of the table.
    """
    kind = table.device.type
    if torch.is_autocast_enabled(kind):
        # It would take the dot products in 16 bits, on which the posterior stands.
        with torch.autocast(kind, enabled=False):
            _run(inputs, outputs, variant, table, index)
    else:
        _run(inputs, outputs, variant, table, index)


def _run(inputs: Inputs, outputs: Outputs, variant: Variant, table: Tensor, index: Tensor) -> None:
    # A compiler sees through the arithmetic of torch, and fuses whole tensors better than blocks.
    traced = torch.compiler.is_compiling()
    on_host = table.device.type == "cpu" and not traced
    xp: Any = np if on_host else torch
    noisy = inputs.noise is not None or inputs.keys is not None
    if on_host:
        prepared = _prepared(variant, noisy, tuple(table[int(index)].tolist()))
        at = prepared.at
    else:
        # Indexing with a tensor of no dimensions would wait for its value.
        at = _named(table.index_select(0, index.reshape(1))[0].unbind())

    def numbers(values: Tensor) -> Any:
        values = _as(values.detach(), table.dtype)
        return values.numpy() if on_host else values

    blocks = _Blocks(inputs, outputs, table.dtype, index, traced)
    state = odds = scale = None
    if inputs.state is not None:
        state = numbers(inputs.state)
        odds = tracked_odds(xp, variant.tracker, at, state)
    if variant.mode == UPDATE:
        forms = Form(), Form(), update_form(at)
    else:
        before: Block = {}
        if variant.rule in (CONTRASTIVE, PERPENDICULAR):
            before = blocks.sums(lambda block, into, rows: first_sums(variant.rule, block))
        known = {name: numbers(values) for name, values in before.items()}
        scale, projection = scale_of(xp, variant.rule, at, odds, known)
        if on_host:
            forms = prepared.forms(scale, projection)
        else:
            forms = step_forms(variant, at, scale, projection, noisy)
    guided, x_next, residual = (_columns(form) for form in forms)
    job = _Job(variant, at, guided, x_next, residual, outputs.state is not None, blocks.apart)
    sums = {name: numbers(values) for name, values in blocks.sums(partial(block_step, job)).items()}
    blocks.finish()
    if outputs.scale is not None:
        if variant.rule == SAFE:
            mean = sums.get("scale", 0.0) / max(1, blocks.elements)
            scale = at.guidance_scale * at.applied * mean
        _write(outputs.scale, scale)
    if outputs.state is not None:
        norm_sq = sums.get("delta", 0.0)
        residual_dot = sums.get("x_next", 0.0) if variant.mode == UPDATE else forms[2].dot(sums)
        gap = None if inputs.divergence_gap is None else numbers(inputs.divergence_gap)
        _write(
            outputs.state, updated_state(xp, variant, at, state, odds, norm_sq, residual_dot, gap)
        )


def _named(row: Sequence[Any]) -> Row:
    """A row of the table by the names of its columns."""
    return _Row(*row[: len(COLUMNS)])


class _Prepared(NamedTuple):
    """A row of the table, and the forms of its step as functions of the scale.

    They are affine in the scale and in the scale times Perp-Neg's projection: of every factor
    there is the constant and what multiplies the one and the other.
    """

    at: Row
    factors: tuple[dict[str, tuple[float, float, float]], ...]

    def forms(self, scale: Any, projection: Any) -> tuple[Form, Form, Form]:
        """The guided prediction, x_next and the residual."""
        if isinstance(scale, np.ndarray) and len(scale) == 1:
            scale = float(scale[0])
        guided, x_next, residual = (
            Form(
                {
                    name: factor
                    + (by_scale * scale if by_scale else 0.0)
                    + (by_both * (scale * projection) if by_both else 0.0)
                    for name, (factor, by_scale, by_both) in form.items()
                }
            )
            for form in self.factors
        )
        return guided, x_next, residual


@lru_cache(maxsize=4096)  # a few runs of a thousand steps; an entry takes kilobytes
def _prepared(variant: Variant, noisy: bool, row: tuple[float, ...]) -> _Prepared:
    at = _named(row)
    if variant.mode == UPDATE:
        return _Prepared(at, ())
    corners = (
        step_forms(variant, at, scale, projection, noisy)
        for scale, projection in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    )
    factors = []
    for none, scaled, projected in zip(*corners, strict=True):
        of_form = {}
        for name, factor in projected.items():
            constant, once = none.get(name, 0.0), scaled.get(name, 0.0)
            if (constant, once, factor) != (0.0, 0.0, 0.0):
                of_form[name] = constant, once - constant, factor - once
        factors.append(of_form)
    return _Prepared(at, tuple(factors))


class _Blocks:
    """The tensors of a call, a block at a time."""

    def __init__(
        self,
        inputs: Inputs,
        outputs: Outputs,
        dtype: torch.dtype,
        index: Tensor,
        traced: bool,
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
            name: tensor
            for name, tensor in zip(EVENTS_OUT, outputs, strict=False)
            if tensor is not None
        }
        self.targets = {
            name: tensor.view(shape) if tensor.is_contiguous() else tensor.new_empty(shape)
            for name, tensor in self.asked.items()
        }

        self.whole = traced or self.batch * self.elements <= BLOCK
        place = None if traced else _storage(self.targets.get("x_next"))
        self.apart = (
            outputs.x_next is not None
            and not traced
            and outputs.x_next.dtype is dtype
            and all(_storage(tensor) != place for tensor in self.sources.values())
        )

    def sums(self, function: Callable[[Block, Block, slice], Block]) -> Block:
        """Call with every block, where its outputs go, and its rows; add up what is returned.

        That is one number a sample under each name.
        """
        if self.whole:
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
        """Copy to outputs that are not in C order."""
        for name, tensor in self.asked.items():
            if not tensor.is_contiguous():
                tensor.copy_(self.targets[name].view(tensor.shape))


def _columns(form: Form) -> Form:
    """The terms that are there, with factors that multiply a block."""
    return Form(
        {
            name: _column(factor)
            for name, factor in form.items()
            if not (isinstance(factor, float) and factor == 0.0)
        }
    )


def _column(factor: Any) -> Any:
    """What multiplies a block: a float, or one number a row."""
    if isinstance(factor, np.ndarray):
        return float(factor[0]) if len(factor) == 1 else torch.from_numpy(factor)[:, None]
    if isinstance(factor, Tensor) and factor.ndim == 1:
        return factor[:, None]
    return factor


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In that precision; asking first is cheaper than a call that finds nothing to do."""
    return values if values.dtype is dtype else values.to(dtype)


def _write(target: Tensor, values: Any) -> None:
    if isinstance(values, Tensor):
        target.copy_(values)
    else:
        target.numpy()[...] = values


def _clamp(values: Any, low: Any, high: Any) -> Any:
    """Within bounds; NaN stays NaN."""
    if isinstance(values, Tensor):
        return values.clamp(low, high)
    return np.minimum(np.maximum(values, low), high)


def _storage(tensor: Tensor | None) -> int | None:
    """Which memory a tensor is a view of."""
    return None if tensor is None else tensor.untyped_storage().data_ptr()


def _norm_sq(a: Tensor) -> Tensor:
    """|a|^2 of each row, (B, D) -> (B,); without the tensor of squares that a sum would make."""
    return torch.linalg.vector_norm(a, dim=-1).square_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, (B, D), (B, D) -> (B,)."""
    return torch.linalg.vecdot(a, b)


def combined(form: Form, block: Block, rows: slice, out: Tensor | None = None) -> Tensor:
    """The form of the tensors of a block, one pass a term."""
    result: Tensor | None = None
    for name, factor in form.items():
        if isinstance(factor, Tensor) and factor.ndim == 2:
            factor = factor[rows]
        if result is None:
            result = torch.mul(block[name], factor, out=out)
        elif isinstance(factor, Tensor):
            result.addcmul_(block[name], factor)
        else:
            result.add_(block[name], alpha=factor)
    return torch.zeros_like(block["eps"]) if result is None else result


# ---------------------------------------------------------------------- what there is one of


def tracked_odds(xp: Any, tracker: int, at: Row, state: Any) -> Any:
    """p / (1 - p) of a posterior, e^L of a ratio; (B,) -> (B,)."""
    if tracker == LOG_ODDS:
        return xp.exp(_clamp(state, -LARGEST, at.log_odds_cap))
    state = _clamp(state, at.low, at.high)
    if tracker == PAPER:
        return xp.exp(state) / -xp.expm1(state)
    return xp.exp(state)


def scale_of(xp: Any, rule: int, at: Row, odds: Any, sums: dict[str, Any]) -> tuple[Any, Any]:
    """The scale of every sample, and Perp-Neg's projection, both (B,)."""
    projection = 0.0
    if rule == TRACKED:
        scale = equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    elif rule == FEEDBACK:
        scale = equations.feedback_scale(odds, at.rule_0)
    elif rule == CONTRASTIVE:
        norm_sq = sums.get("delta", 0.0)
        decay = xp.exp(-at.rule_0 * at.to_noise * at.to_noise * norm_sq)
        scale = equations.contrastive_scale(at.guidance_scale, decay)
    else:
        scale = at.guidance_scale
    if rule == PERPENDICULAR and sums:
        known = sums["direction"] > at.rule_1 * sums["eps"]
        one = xp.ones_like(sums["direction"])
        projection = xp.where(known, sums["along"], 0.0 * one)
        projection = projection / xp.where(known, sums["direction"], one)
    return at.active * scale, projection


def updated_state(
    xp: Any,
    variant: Variant,
    at: Row,
    state: Any,
    odds: Any,
    norm_sq: Any,
    residual_dot: Any,
    divergence_gap: Any,
) -> Any:
    """State at the cleaner end of the step, (B,); unchanged where the variance is 0.

    From |delta|^2, residual . delta and, where it is tracked, div s_c - div s.
    """
    if isinstance(at.variance, float) and at.variance == 0.0:
        return state
    gap_sq = at.kernel_factor * at.kernel_factor * norm_sq
    residual_gap = at.kernel_factor * residual_dot
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
    updated = _clamp(updated, at.low, at.high)
    # On a GPU the host does not know whether the variance is 0.
    return xp.where(at.variance > 0, updated, state) if xp is torch else updated


# ---------------------------------------------------------------------- the step, as forms


def step_forms(
    variant: Variant, at: Row, scale: Any, projection: Any, noisy: bool
) -> tuple[Form, Form, Form]:
    """The guided prediction, x_next and x_next - mu_base.

    In terms of x, eps, delta and noise, and of what :func:`block_step` adds: uncond_gap = eps -
    eps_uncond, direction = eps_pos - eps, SLD's correction.  With clipping, eps and delta are
    those of the clipped x0, and shift is how far guidance moves it.
    """
    x, eps, delta = Form(x=1.0), Form(eps=1.0), Form(delta=1.0)
    noise = Form(noise=1.0) if noisy else Form()
    base = eps
    if variant.cfg:
        gap = Form(uncond_gap=1.0)
        base = equations.toward(eps - gap, gap, Factor(at.cfg_scale))
    if variant.rule == SAFE:
        correction = Form(correction=at.from_noise)
        guided = equations.away(base, correction, Factor(at.guidance_scale * at.applied))
    elif variant.rule == PERPENDICULAR:
        direction = Form(direction=1.0)
        guided = equations.away(
            equations.toward(base, direction, Factor(at.active * at.rule_0)),
            equations.perpendicular(delta, direction, Factor(projection)),
            Factor(scale),
        )
    elif variant.rule in (TOWARD, FEEDBACK):
        guided = equations.toward(base, delta, Factor(scale))
    else:
        guided = equations.away(base, delta, Factor(scale))
    shift = Form(shift=1.0) if variant.clip else guided - eps
    factor, deviation = Factor(at.factor), Factor(at.deviation)
    mean = equations.step_mean(x, eps + shift, Factor(at.x_factor), factor)
    x_next = equations.step(mean, deviation, noise)
    residual = equations.step_residual(
        x, eps, shift, noise, Factor(at.x_drift), Factor(at.drift), factor, deviation
    )
    return guided, x_next, residual


def update_form(at: Row) -> Form:
    """x_next - mu_base of a step that was taken elsewhere."""
    factors = Factor(at.kernel_x_factor), Factor(at.kernel_factor)
    return Form(x_next=1.0) - equations.step_mean(Form(x=1.0), Form(eps=1.0), *factors)


# ---------------------------------------------------------------------- a block


def first_sums(rule: int, block: Block) -> Block:
    """What a rule must know of whole samples before it can guide."""
    delta = block["eps_neg"] - block["eps"]
    if rule == CONTRASTIVE:
        return {"delta": _norm_sq(delta)}
    direction = block["eps_third"] - block["eps"]
    return {
        "direction": _norm_sq(direction),
        "along": _dot(delta, direction),
        "eps": _norm_sq(block["eps"]),
    }


def block_step(job: _Job, block: Block, into: Block, rows: slice) -> Block:
    """Write the outputs of a block; the sums that the state and SLD's scale need."""
    variant, at, eps = job.variant, job.at, block["eps"]
    found: Block = {}
    block["delta"] = block["eps_neg"] - eps
    if variant.mode != UPDATE:
        if variant.cfg:
            block["uncond_gap"] = eps - block["eps_third"]
        if variant.rule == PERPENDICULAR:
            block["direction"] = block["eps_third"] - eps
        if variant.rule == SAFE:
            found["scale"] = _safe(at, block, into)
    clips = variant.clip and variant.mode != GUIDE
    guided = None
    if "eps_guided" in into or (clips and variant.mode == STEP):
        guided = combined(job.guided, block, rows)
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
            found["x_next"] = _dot(combined(job.residual, block, rows), delta)
        else:
            found |= {name: _dot(block[name], delta) for name in job.residual if name != "delta"}
    # Written last: an output may be an input, and is then not the place to add up in.
    if "x_next" in into:
        target = into["x_next"]
        x_next = combined(job.x_next, block, rows, target if job.apart else None)
        if x_next is not target:
            target.copy_(x_next)
    if "eps_guided" in into and guided is not None:
        into["eps_guided"].copy_(guided)
    return found


def _safe(at: Row, block: Block, into: Block) -> Tensor:
    """SLD: its correction into the block, its momentum out; the sum of the elementwise scale."""
    difference = block["delta"] * at.to_noise
    magnitude = difference.abs()
    gated = torch.where(torch.as_tensor(at.rule_4 > 0), magnitude, -difference)
    scale = torch.where(gated < at.rule_0, (at.rule_1 * magnitude).clamp(max=1.0), 0.0)
    momentum = block["momentum"]
    block["correction"] = equations.safe_correction(scale, difference, at.rule_2, momentum)
    following = equations.safe_momentum(momentum, block["correction"], at.rule_3)
    into["momentum"].copy_(torch.where(torch.as_tensor(at.active > 0), following, momentum))
    return scale.sum(-1)


def clipped(at: Row, x: Tensor, prediction: Tensor) -> Tensor:
    """x0 of a prediction, in [-clip, clip]."""
    x0 = equations.step_mean(x, prediction, at.x0_x_factor, at.x0_factor)
    return x0.clamp(-at.clip, at.clip)
