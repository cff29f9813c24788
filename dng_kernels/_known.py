"""Calls like one that was made before, launched without its checks, layout and dispatch.

A call whose tensors agree with those of an earlier call in dtype, shape, strides, device and
alignment passes the same checks and is laid out alike: only addresses, the step and the seed
differ.  So a plan keeps what it launched, and a loop pays for the checks once.  Only the Triton
kernel is launched like this, and only where torch runs eagerly and nothing watches it: a compiler,
an exporter or a dispatch mode sees the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dng_kernels._border import Call, Memory, memory_of, transforms_active
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import StepPlan, capturing, keep_captured

MOST = 64  # calls that a plan keeps

# Arguments of the kernel by the fields of Inputs and of StepResult.
READ = dict(
    zip(Inputs._fields, ("x", "x_next_in", *Inputs._fields[2:9], "divergence"), strict=True)
)
WRITTEN = dict(
    zip(
        StepResult._fields,
        ("x_next", "state_next", "guided_out", "scale_out", "momentum_out", "weight_out"),
        strict=True,
    )
)

# Private to torch, and so the slow way is taken where they are gone.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)


def eager() -> bool:
    """Whether torch runs what it is told at once, with nobody watching."""
    return not (
        torch.compiler.is_compiling() or transforms_active() or _modes() or _function_modes()
    )


def key_of(
    mode: int, options: tuple[Any, ...], inputs: Inputs, out: StepResult | None
) -> tuple[Any, ...] | None:
    """What calls have in common that are checked and laid out alike; None for unusual tensors."""
    key: list[Any] = [mode, options]
    tensors = inputs if out is None else (*inputs, *out)
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif type(tensor) is Tensor and tensor.layout is torch.strided:
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            key.append(tensor.requires_grad)
            key.append(tensor.data_ptr() % 16 == 0)
        else:
            return None
    return tuple(key)


class Known(NamedTuple):
    """A call that can be launched again."""

    launcher: Callable[..., Any]
    values: list[Any]  # arguments of the kernel, in their order
    read: list[tuple[int, int]]  # places of the inputs among the arguments, and among Inputs
    written: list[tuple[int, int]]  # and those of the outputs
    dtypes: tuple[torch.dtype | None, ...]  # of the outputs that are allocated
    seed: int  # places of these numbers
    first_sample: int
    device: torch.device
    memory: Memory  # which says whether given outputs lie on other tensors

    def launch(
        self,
        index: Tensor,
        inputs: Inputs,
        out: StepResult | None,
        seed: int = 0,
        first_sample: int = 0,
    ) -> StepResult:
        """Launch the kernel on other tensors of the same kind, and return its results."""
        eps, fields = inputs.eps, []
        if out is not None:
            self.memory.check(inputs, out)
        for number, dtype in enumerate(self.dtypes):
            given = None if out is None else out[number]
            if given is None and dtype is not None:
                # The state, the scale and the weight have one number a sample.
                given = (
                    torch.empty(len(eps), dtype=dtype, device=self.device)
                    if number in (1, 3, 5)
                    else torch.empty_like(eps, dtype=dtype)
                )
            fields.append(given)
        result = StepResult(*fields)
        values = self.values.copy()
        values[1] = index
        if capturing(self.device):
            keep_captured(*(value for value in values if isinstance(value, Tensor)))
        values[self.seed], values[self.first_sample] = seed, first_sample
        for place, number in self.read:
            values[place] = inputs[number]
        for place, number in self.written:
            values[place] = result[number]
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.launcher(*values)
        else:
            self.launcher(*values)
        return result


def remember(
    plan: StepPlan,
    key: tuple[Any, ...] | None,
    call: Call,
    mode: int,
    inputs: Inputs,
    result: StepResult,
    bits: int | None,
    first_sample: int,
) -> None:
    """Keep a call that was launched, if it can be launched again from its tensors alone."""
    if key is None or call.engine != "triton" or not len(inputs.eps):
        return
    fused = import_module("dng_kernels.fused")
    eps, variant = inputs.eps, plan.variants[mode]
    workspace = plan.workspace(len(eps), eps.numel() // len(eps))
    more = (variant, plan.table, call.index, bits, first_sample, *workspace)
    grid, named = fused.arguments(inputs, result, *more)
    launcher = fused.prepared(grid, named)
    same = all(
        named[READ[name]] is value for name, value in zip(Inputs._fields, inputs, strict=True)
    )
    same &= all(
        named[WRITTEN[name]] is value
        for name, value in zip(StepResult._fields, result, strict=True)
    )
    memory = memory_of(plan, inputs, result)
    # Otherwise some tensor was copied into another order; and outputs are allocated in C order.
    if launcher is None or not same or not eps.is_contiguous() or memory is None:
        return
    order = list(named)
    read = [
        (order.index(READ[n]), i) for i, n in enumerate(Inputs._fields) if inputs[i] is not None
    ]
    written = [
        (order.index(WRITTEN[n]), i)
        for i, n in enumerate(StepResult._fields)
        if result[i] is not None
    ]
    values = list(named.values())
    for place, _ in [(1, 0), *read, *written]:
        values[place] = None  # to keep a tensor of this call would keep its memory
    known = plan._known
    if len(known) >= MOST:
        known.clear()
    known[key] = Known(
        launcher,
        values,
        read,
        written,
        tuple(None if value is None else value.dtype for value in result),
        order.index("seed"),
        order.index("first_sample"),
        eps.device,
        memory,
    )
