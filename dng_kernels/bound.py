"""A step whose arguments are checked and laid out once, for loops that take it many times."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from dng_kernels import cpu, naive
from dng_kernels._border import Backend, memory_of, names_of
from dng_kernels._known import READ
from dng_kernels._operator import with_keys
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import STEP, StepPlan, capturing, keep_captured
from dng_kernels.step import check_step
from dng_math import checks

HAS_NUMBA = find_spec("numba") is not None


class Taker(Protocol):
    """What takes a step on the tensors that are bound."""

    def __call__(self, step: int) -> None:
        """Take a step."""

    def read(self, name: str, tensor: Tensor) -> bool:
        """Read another tensor of the same kind from now on, for the input of that name.

        False if all must be bound anew for it.
        """
        ...


class _Anew:
    """An engine that is called with whole tensors in every step."""

    def __init__(self, run: Callable[..., None], inputs: Inputs, *more: Any) -> None:
        self._run, self._inputs = run, inputs
        *self._more, self._indices, self._rest = more

    def __call__(self, step: int) -> None:
        self._run(self._inputs, *self._more, self._indices[step], *self._rest)

    def read(self, name: str, tensor: Tensor) -> bool:
        self._inputs = self._inputs._replace(**{name: tensor})
        return True


class _Launched:
    """The Triton kernel, launched on a list of arguments in which the step index changes."""

    def __init__(
        self,
        fused: Any,
        grid: tuple[int, ...],
        named: dict[str, Any],
        indices: tuple[Tensor, ...],
    ) -> None:
        self._fused, self._grid, self._indices = fused, grid, indices
        self._order = {name: place for place, name in enumerate(named)}
        self._values: list[Any] = list(named.values())
        self._index = self._order["index"]
        self._of_plan = [self._order[name] for name in ("table", "index", "counters", "partials")]
        self._device: torch.device = named["eps"].device
        self._launcher: Callable[..., Any] | None = None

    def __call__(self, step: int) -> None:
        fused, values = self._fused, self._values
        values[self._index] = self._indices[step]
        with fused.on_device(self._device):
            if capturing(self._device):
                keep_captured(*(values[place] for place in self._of_plan))
            if self._launcher is None:
                # Compiled by the first step, where no process has done so before.
                named = dict(zip(self._order, values, strict=True))
                fused.launch(self._grid, named)
                self._launcher = fused.prepared(self._grid, named)
            else:
                self._launcher(*values)

    def read(self, name: str, tensor: Tensor) -> bool:
        place = self._order[READ[name]]
        aligned = self._values[place].data_ptr() % 16 == 0
        if (tensor.data_ptr() % 16 == 0) != aligned:
            return False  # another kernel
        self._values[place] = tensor
        return True


class _Nothing:
    """No step, of an empty batch."""

    def __call__(self, step: int) -> None:
        pass

    def read(self, name: str, tensor: Tensor) -> bool:
        return True


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


class BoundStep:
    """A step on fixed tensors: ``bound(step)`` takes it with the arguments of :func:`dng_step`.

    Checks, allocation and layout are done here, once, so that a call costs little more than
    starting the kernel.  The loop writes each new prediction into the tensors that were bound, or
    names other ones with :meth:`rebind`, which for three of them takes about as long as a call.  To
    go on from a step, let it write where it reads::

        bound = BoundStep(plan, x, eps, eps_neg, state, noise=z, out=StepResult(x, state))
        for step in range(len(plan)):
            eps.copy_(network(x, step)), eps_neg.copy_(unwanted(x, step)), z.normal_()
            bound(step)

    The result is that of ``dng_step(plan, plan.indices[step], ...)``: as with a step that is a
    tensor, noise must be given if any step of the plan adds some.  It has the same bits from the
    Triton kernel and from the reference; on a CPU, given noise and no clipping, a loop that is
    compiled at its first use on a machine takes the step of most rules
    (:mod:`dng_kernels._compiled_cpu`), and agrees to rounding.  Not for use inside a
    function that ``torch.compile`` compiles, where :func:`dng_step` costs nothing to check.  Keep
    what was bound, and :attr:`result`, as long as a captured graph whose steps it took.

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
        # Where what can be exchanged stands in Inputs, by the names of the arguments.
        self._fields = {name: field for field, name in names_of(plan).items() if name != "x_next"}
        self._rows: dict[int, Any] = {}  # of the table, prepared for the loop of a CPU
        self._memory = memory_of(plan, self._inputs, self.result)
        self._kinds = {
            name: None if tensor is None else _kind(tensor)
            for name, field in self._fields.items()
            for tensor in [getattr(self._inputs, field)]
        }
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

        Only addresses change, unless the Triton kernel reads the new ones in another way: where one
        is a multiple of 16 and the other is not, all is bound anew.

        Parameters
        ----------
        **tensors : Tensor
            By the names of the arguments that were bound, each of the shape, dtype, device and
            strides of the one that it replaces.

        Raises
        ------
        ValueError, TypeError
            If a tensor is another kind than the one that it replaces, or there was none, or a
            result would be written over it.
        """
        inputs, kinds = self._inputs, self._kinds
        for name, tensor in tensors.items():
            kind = kinds.get(name)
            if kind is None:
                raise ValueError(f"{name} must be one of the tensors that were bound, and is not")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {tensor!r}")
            if _kind(tensor) != kind or tensor.requires_grad:
                dtype, shape, strides, device = kind
                raise ValueError(
                    f"{name} must be {dtype} of shape {tuple(shape)} and strides {strides} on "
                    f"{device}, without grad, as was bound; got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
                )
        fields = {self._fields[name]: tensor for name, tensor in tensors.items()}
        inputs = inputs._replace(**fields)
        if self._memory is not None:
            self._memory.check(inputs, self.result)
        self._inputs = inputs
        if not all([self._take.read(name, tensor) for name, tensor in fields.items()]):
            self._take = self._bound()

    def _bound(self) -> Taker:
        """What takes a step, for the present tensors."""
        inputs, result, plan = self._inputs, self.result, self.plan
        eps, variant = inputs.eps, plan.variants[STEP]
        if len(eps) == 0:
            return _Nothing()
        table = plan.table64 if eps.dtype == torch.float64 else plan.table
        if self._engine == "triton":
            return self._by_triton(table)
        seed, first = self._bits, self._first_sample
        given = inputs if seed is None else with_keys(inputs, seed, first)
        if self._engine == "cpu" and given.keys is None and HAS_NUMBA:
            compiled = import_module("dng_kernels._compiled_cpu")
            if compiled.can_take(variant, given, result):
                take: Taker = compiled.OnePass(variant, given, result, table, self._rows)
                return take
        run = naive.run if self._engine == "reference" else cpu.run
        return _Anew(run, given, result, variant, table, plan.indices, ())

    def _by_triton(self, table: Tensor) -> Taker:
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
            return _Anew(fused.run, inputs, self.result, variant, table, plan.indices, more)
        return _Launched(fused, grid, named, plan.indices)
