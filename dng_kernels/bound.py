"""A step whose arguments are checked and laid out once, for loops that take it many times."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dng_kernels import cpu, naive
from dng_kernels._border import Backend
from dng_kernels._operator import with_keys
from dng_kernels.naive import StepResult
from dng_kernels.plan import STEP, StepPlan
from dng_kernels.step import check_step
from dng_math import checks

HAS_NUMBA = find_spec("numba") is not None
# What can be bound to other tensors, by the names of the arguments, and where it stands in Inputs.
_FIELDS = {
    **{name: name for name in ("x", "eps", "eps_neg", "noise", "momentum", "state")},
    **{"eps_uncond": "eps_third", "eps_pos": "eps_third"},
    **{"seed": "keys", "divergence_gap": "divergence_gap"},
}


class BoundStep:
    """A step on fixed tensors: ``bound(step)`` takes it with the arguments of :func:`dng_step`.

    Checks, allocation and layout are done here, once, so that a call costs little more than
    starting the kernel.  The loop writes each new prediction into the tensors that were bound, or
    names other ones with :meth:`rebind`.  To go on from a step, let it write where it reads::

        bound = BoundStep(plan, x, eps, eps_neg, state, noise=z, out=StepResult(x, state))
        for step in range(len(plan)):
            eps.copy_(network(x, step)), eps_neg.copy_(unwanted(x, step)), z.normal_()
            bound(step)

    The result is that of ``dng_step(plan, plan.indices[step], ...)``: as with a step that is a
    tensor, noise must be given if any step of the plan adds some.  It has the same bits from the
    Triton kernel and from the reference; on a CPU, given noise and no clipping, a loop that is
    compiled at its first use on a machine takes the step of most rules
    (:mod:`dng_kernels._compiled_cpu`), and agrees to rounding.  Not for use inside a
    function that ``torch.compile`` compiles, where :func:`dng_step` costs nothing to check.

    Parameters
    ----------
    plan, x, eps, eps_neg, state, eps_uncond, eps_pos, noise, seed, first_sample, momentum, \
    divergence_gap, out, return_guided, return_scale, backend
        As for :func:`dng_step`.

    Attributes
    ----------
    plan : StepPlan
    result : StepResult
        The tensors that every call writes into, and returns.

    Raises
    ------
    ValueError, TypeError
        As :func:`dng_step`.
    """

    def __init__(
        self,
        plan: StepPlan,
        x: Tensor,
        eps: Tensor,
        eps_neg: Tensor,
        state: Tensor | None = None,
        *,
        eps_uncond: Tensor | None = None,
        eps_pos: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
        momentum: Tensor | None = None,
        divergence_gap: Tensor | None = None,
        out: StepResult | None = None,
        return_guided: bool = False,
        return_scale: bool = False,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(plan, StepPlan):
            raise TypeError(f"plan must be a StepPlan, got a {type(plan).__name__}")
        checked = check_step(
            plan,
            plan.indices[0],
            x,
            eps,
            eps_neg,
            state,
            eps_uncond=eps_uncond,
            eps_pos=eps_pos,
            noise=noise,
            seed=seed,
            first_sample=first_sample,
            momentum=momentum,
            divergence_gap=divergence_gap,
            out=out,
            return_guided=return_guided,
            return_scale=return_scale,
            backend=backend,
        )
        self.plan, self.result = plan, checked.result
        self._engine, self._inputs, self._bits = checked.call.engine, checked.inputs, checked.bits
        self._first_sample, self._steps = first_sample, len(plan)
        other = (
            "eps_pos" if plan.needs_uncond else "eps_uncond"
        )  # shares its place with one that is
        self._names = _FIELDS.keys() - {other}
        self._rows: dict[int, Any] = {}  # of the table, prepared for the loop of a CPU
        self._take = self._bound()

    def __call__(self, step: int) -> StepResult:
        """Take a step.

        Parameters
        ----------
        step : int
            Row of the plan, 0 the noisiest.

        Returns
        -------
        StepResult
            :attr:`result`.
        """
        if type(step) is not int or not 0 <= step < self._steps:
            step = checks.integer("step", step, 0, self._steps - 1)
        self._take(step)
        return self.result

    def rebind(self, **tensors: Tensor) -> None:
        """Read other tensors from now on.

        Parameters
        ----------
        **tensors : Tensor
            By the names of the arguments that were bound, each of the shape, dtype, device and
            strides of the one that it replaces.

        Raises
        ------
        ValueError, TypeError
            If a tensor is another kind than the one that it replaces, or there was none.
        """
        for name, tensor in tensors.items():
            old = getattr(self._inputs, _FIELDS[name]) if name in self._names else None
            if old is None:
                raise ValueError(f"{name} must be one of the tensors that were bound, and is not")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {tensor!r}")
            if (
                tensor.dtype is not old.dtype
                or tensor.shape != old.shape
                or tensor.stride() != old.stride()
                or tensor.device != old.device
                or tensor.requires_grad
            ):
                raise ValueError(
                    f"{name} must be {old.dtype} of shape {tuple(old.shape)} and strides "
                    f"{old.stride()} on {old.device}, without grad, as was bound; got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
                    f"on {tensor.device}"
                )
        self._inputs = self._inputs._replace(
            **{_FIELDS[name]: tensor for name, tensor in tensors.items()}
        )
        self._take = self._bound()

    def _bound(self) -> Callable[[int], None]:
        """What takes a step, for the present tensors."""
        inputs, result, plan = self._inputs, self.result, self.plan
        eps, variant = inputs.eps, plan.variants[STEP]
        batch = len(eps)
        if batch == 0:
            return lambda step: None
        table = plan.table64 if eps.dtype == torch.float64 else plan.table
        if self._engine == "triton":
            return self._by_triton(table)
        seed, first = self._bits, self._first_sample
        given = inputs if seed is None else with_keys(inputs, seed, first)
        run = naive.run if self._engine == "reference" else cpu.run
        if self._engine == "cpu" and given.keys is None and HAS_NUMBA:
            compiled = import_module("dng_kernels._compiled_cpu")
            if compiled.can_take(variant, given, result):
                take: Callable[[int], None] = compiled.bind(
                    variant, given, result, table, self._rows
                )
                return take
        indices = plan.indices
        return lambda step: run(given, result, variant, table, indices[step])

    def _by_triton(self, table: Tensor) -> Callable[[int], None]:
        fused = import_module("dng_kernels.fused")
        inputs, plan, eps = self._inputs, self.plan, self._inputs.eps
        workspace = plan.workspace(len(eps), eps.numel() // len(eps))
        variant, index = plan.variants[STEP], plan.indices[0]
        more = (self._bits, self._first_sample, *workspace)
        grid, named = fused.arguments(inputs, self.result, variant, table, index, *more)
        fused.check_device(eps.device)
        given = [tensor for tensor in (*inputs, *self.result) if tensor is not None]
        known = {id(value) for value in named.values()}
        if any(id(tensor) not in known for tensor in given):
            # A tensor that the kernel cannot read as it lies is copied anew in every step.
            return lambda step: fused.run(
                inputs, self.result, variant, table, plan.indices[step], *more
            )
        place = list(named).index("index")
        values: list[Any] = list(named.values())
        launcher: Callable[..., Any] | None = None
        indices = plan.indices

        def take(step: int) -> None:
            nonlocal launcher
            with fused.on_device(eps.device):
                if launcher is None:
                    # Compiled by the first step, where no process has done so before.
                    fused.launch(grid, named | {"index": indices[step]})
                    launcher = fused.prepared(grid, named)
                else:
                    values[place] = indices[step]
                    launcher(*values)

        return take
