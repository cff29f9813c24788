"""A bound step on a CPU: one pass over memory, compiled by Numba.

:mod:`dng_kernels.cpu` makes one pass a term with torch, whose calls cost more than the arithmetic
on a few latents.  Here the forms of a step (:mod:`dng_kernels._forms`) are evaluated element by
element, together with the dot products that the tracker needs, in one loop over each sample.  It is
compiled at the first use on a machine, so only a step that is bound uses it.  What has other sums
first, or is clipped, is left to :mod:`dng_kernels.cpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dng_kernels._forms import Prepared, prepared
from dng_kernels.cpu import scale_of, tracked_odds, updated_state
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import Variant
from dng_math._codes import CONTRASTIVE, PERPENDICULAR, SAFE

# Of the factors of a sample: x_next = sum of these times x, eps, delta, gap and noise, and the
# guided prediction = sum of these times eps, delta and gap, where gap = eps - eps_uncond.
X, EPS, DELTA, GAP, NOISE, GUIDED_EPS, GUIDED_DELTA, GUIDED_GAP = range(8)
_OF_X_NEXT = {"x": X, "eps": EPS, "delta": DELTA, "uncond_gap": GAP, "noise": NOISE}
_OF_GUIDED = {"eps": GUIDED_EPS, "delta": GUIDED_DELTA, "uncond_gap": GUIDED_GAP}
# Dot products with delta, in the order of the sums.
_SUMS = ("delta", "x", "eps", "uncond_gap", "noise")


# Sums may be reordered, for SIMD: in an order that the length of a sample decides, so a sample has
# the same bits in any batch.
@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def one_pass(  # type: ignore[no-untyped-def]
    factors, x, eps, eps_neg, third, noise, has_third, has_noise, x_next, guided, sums
):
    """Write x_next and, if it is not empty, guided; add up the sums; arrays (B, D), sums (B, 5)."""
    for i in range(x.shape[0]):
        f = factors[i]
        dd = xd = ed = gd = nd = 0.0  # in float64, whatever the tensors are
        for j in range(x.shape[1]):
            e = eps[i, j]
            d = eps_neg[i, j] - e
            value = f[0] * x[i, j] + f[1] * e + f[2] * d
            dd += d * d
            xd += x[i, j] * d
            ed += e * d
            g = f[5] * e + f[6] * d
            if has_third:
                gap = e - third[i, j]
                value += f[3] * gap
                gd += gap * d
                g += f[7] * gap
            if has_noise:
                value += f[4] * noise[i, j]
                nd += noise[i, j] * d
            x_next[i, j] = value
            if guided.shape[0]:
                guided[i, j] = g
        sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3], sums[i, 4] = dd, xd, ed, gd, nd


def can_take(variant: Variant, inputs: Inputs, result: StepResult) -> bool:
    """Whether the loop computes what this step needs."""
    tensors = (*inputs[:7], result.x_next, result.eps_guided)
    targets = [each for each in (result.x_next, result.eps_guided) if each is not None]
    sources = [each for each in inputs[:7] if each is not None]
    return (
        not variant.clip
        and not any(_overlap(target, source) for target in targets for source in sources)
        and variant.rule not in (SAFE, CONTRASTIVE, PERPENDICULAR)
        and result.x_next is not None
        and result.x_next.is_contiguous()
        and (result.eps_guided is None or result.eps_guided.is_contiguous())
        and inputs.eps.numel() > 0
        and not any(tensor is not None and tensor.is_conj() for tensor in tensors)
    )


def _overlap(target: Tensor, source: Tensor) -> bool:
    """Whether memory is shared other than place by place, so that a write could come too early."""
    first, last = (each.untyped_storage().data_ptr() for each in (target, source))
    return first == last and target.data_ptr() != source.data_ptr()


def bind(
    variant: Variant,
    inputs: Inputs,
    result: StepResult,
    table: Tensor,
    rows: dict[int, Prepared],
) -> Callable[[int], None]:
    """What takes a step, for tensors on a CPU that stay where they are.

    Parameters
    ----------
    variant : Variant
    inputs : Inputs
        Without keys.
    result : StepResult
        With x_next.
    table : Tensor, shape (N, columns)
        Of the plan, in the precision of the step.
    rows : dict
        Rows of the table that were prepared, by step; filled here.
    """
    dtype = table.dtype
    batch, eps = len(inputs.eps), inputs.eps
    shape = (batch, eps.numel() // batch)
    noisy = inputs.noise is not None

    numpy = np.float64 if dtype == torch.float64 else np.float32

    def array(tensor: Tensor | None, copies: list[tuple[Tensor, Tensor]]) -> Any:
        """The memory of a tensor, or of a copy in the precision of the step and in C order."""
        if tensor is None:
            return np.empty((0, 0), dtype=numpy)
        own = tensor
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            own = torch.empty(tensor.shape, dtype=dtype)
            copies.append((own, tensor))
        return own.detach().view(shape).numpy()

    before_step: list[tuple[Tensor, Tensor]] = []
    after_step: list[tuple[Tensor, Tensor]] = []
    given = (inputs.x, inputs.eps, inputs.eps_neg, inputs.eps_third, inputs.noise)
    arrays = [array(tensor, before_step) for tensor in given]
    x_next, guided = (array(target, after_step) for target in (result.x_next, result.eps_guided))
    factors = np.zeros((batch, 8), dtype=numpy)
    sums = np.zeros((batch, len(_SUMS)), dtype=numpy)
    state = _numbers(inputs.state, dtype)
    gap = _numbers(inputs.divergence_gap, dtype)
    state_next = None if result.state is None else result.state.numpy()
    scale_out = None if result.scale is None else result.scale.numpy()
    has_third, has_noise = inputs.eps_third is not None, noisy

    def take(step: int) -> None:
        row = rows.get(step)
        if row is None:
            row = rows[step] = prepared(variant, noisy, tuple(table[step].tolist()))
        at = row.at
        before = None if state is None else state()
        odds = None if before is None else tracked_odds(variant.tracker, at, before)
        scale, projection = scale_of(variant.rule, at, odds, {})
        forms = row.forms(scale, projection)
        factors.fill(0.0)  # forms leave out what is zero
        for name, factor in forms.x_next.items():
            factors[:, _OF_X_NEXT[name]] = factor
        for name, factor in forms.guided.items():
            factors[:, _OF_GUIDED[name]] = factor
        for own, tensor in before_step:
            own.copy_(tensor)
        one_pass(factors, *arrays, has_third, has_noise, x_next, guided, sums)
        for own, target in after_step:
            target.copy_(own)
        if scale_out is not None:
            scale_out[...] = scale
        if state_next is not None:
            dots = dict(zip(_SUMS, sums.T, strict=True))
            residual = forms.residual.dot(dots)
            told = None if gap is None else gap()
            state_next[...] = updated_state(
                variant, at, before, odds, dots["delta"], residual, told
            )

    return take


def _numbers(values: Tensor | None, dtype: torch.dtype) -> Callable[[], Any] | None:
    """What reads one number a sample, in the precision of the step."""
    if values is None:
        return None
    if values.dtype is dtype:
        array = values.detach().numpy()
        return array.copy
    return lambda: values.detach().to(dtype).numpy()
