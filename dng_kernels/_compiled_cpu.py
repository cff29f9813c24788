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
from dng_kernels.cpu import scale_of, tracked_odds, updated_state, weight_of
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import NEED_SUMS, Variant
from dng_math._codes import SAFE

# Of the factors of a sample: x_next = sum of these times x, eps, delta, gap and noise, and the
# guided prediction = sum of these times eps, delta and gap, where gap = eps - eps_third.
X, EPS, DELTA, GAP, NOISE, GUIDED_EPS, GUIDED_DELTA, GUIDED_GAP = range(8)
_OF_X_NEXT = {"x": X, "eps": EPS, "delta": DELTA, "third_gap": GAP, "noise": NOISE}
_OF_GUIDED = {"eps": GUIDED_EPS, "delta": GUIDED_DELTA, "third_gap": GUIDED_GAP}
# Dot products with delta, in the order of the sums.
_SUMS = ("delta", "x", "eps", "third_gap", "noise")


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
    return (
        not variant.clip
        and variant.rule not in (SAFE, *NEED_SUMS)
        and result.x_next is not None
        and result.x_next.is_contiguous()
        and (result.eps_guided is None or result.eps_guided.is_contiguous())
        and inputs.eps.numel() > 0
    )


class OnePass:
    """Takes a step, for tensors on a CPU that stay where they are.

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

    def __init__(
        self,
        variant: Variant,
        inputs: Inputs,
        result: StepResult,
        table: Tensor,
        rows: dict[int, Prepared],
    ) -> None:
        self._variant, self._table, self._rows = variant, table, rows
        self._dtype = table.dtype
        batch = len(inputs.eps)
        self._shape = batch, inputs.eps.numel() // batch
        number = np.float64 if self._dtype == torch.float64 else np.float32
        nothing = np.empty((0, 0), dtype=number)
        # Copies of what the loop cannot read or write as it lies, by the names of the tensors.
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._after: dict[str, tuple[Tensor, Tensor]] = {}
        self._events = dict.fromkeys(("x", "eps", "eps_neg", "eps_third", "noise"), nothing)
        self._numbers: dict[str, Callable[[], Any]] = {}
        for name, tensor in zip(Inputs._fields, inputs, strict=True):
            if tensor is not None:
                self.read(name, tensor)
        self._has = inputs.eps_third is not None, inputs.noise is not None
        self._written = [
            nothing if tensor is None else self._array(name, tensor, self._after)
            for name, tensor in (("x_next", result.x_next), ("eps_guided", result.eps_guided))
        ]
        self._factors = np.zeros((batch, 8), dtype=number)
        self._sums = np.zeros((batch, len(_SUMS)), dtype=number)
        self._state_next = None if result.state is None else result.state.numpy()
        self._scale_out = None if result.scale is None else result.scale.numpy()
        self._weight_out = None if result.log_weight is None else result.log_weight.numpy()

    def read(self, name: str, tensor: Tensor) -> bool:
        """Read this in place of the input of that name, another of the same kind."""
        if name in self._events:
            self._events[name] = self._array(name, tensor, self._before)
        else:
            self._numbers[name] = _numbers(tensor, self._dtype)
        return True

    def _array(self, name: str, tensor: Tensor, copies: dict[str, tuple[Tensor, Tensor]]) -> Any:
        """The memory of a tensor, or of a copy in the precision of the step and in C order."""
        own = tensor
        if tensor.dtype is not self._dtype or not tensor.is_contiguous():
            if name in copies:
                own, _ = copies[name]
            else:
                own = torch.empty(tensor.shape, dtype=self._dtype)
            copies[name] = own, tensor
        return own.detach().numpy().reshape(self._shape)

    def __call__(self, step: int) -> None:
        variant, numbers, factors = self._variant, self._numbers, self._factors
        has_third, has_noise = self._has
        row = self._rows.get(step)
        if row is None:
            values = tuple(self._table[step].tolist())
            row = self._rows[step] = prepared(variant, has_noise, values)
        at = row.at
        before = numbers["state"]() if "state" in numbers else None
        odds = None if before is None else tracked_odds(variant.tracker, at, before)
        scale, second = scale_of(variant, at, odds, {}, before, self._shape[1])
        forms = row.forms(scale, second)
        factors.fill(0.0)  # forms leave out what is zero
        for name, factor in forms.x_next.items():
            factors[:, _OF_X_NEXT[name]] = factor
        for name, factor in forms.guided.items():
            factors[:, _OF_GUIDED[name]] = factor
        for own, tensor in self._before.values():
            own.copy_(tensor)
        one_pass(factors, *self._events.values(), has_third, has_noise, *self._written, self._sums)
        for own, target in self._after.values():
            target.copy_(own)
        if self._scale_out is not None:
            self._scale_out[...] = scale
        if self._state_next is not None:
            dots = dict(zip(_SUMS, self._sums.T, strict=True))
            residual = forms.residual.dot(dots)
            if self._weight_out is not None:
                self._weight_out[...] = weight_of(at, scale, dots["delta"], residual)
            gap = numbers["divergence_gap"]() if "divergence_gap" in numbers else None
            self._state_next[...] = updated_state(
                variant, at, before, odds, dots["delta"], residual, gap
            )


def _numbers(values: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """What reads one number a sample, in the precision of the step."""
    if values.dtype is dtype:
        array = values.detach().numpy()
        return array.copy
    return lambda: values.detach().to(dtype).numpy()
