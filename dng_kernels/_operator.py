"""The step as one operator of ``torch.library``, ``dng_kernels::step``.

It writes into given tensors and returns nothing, so that it can be exported, and replayed in a
captured graph.  Its arguments are those of :class:`Variant`, :class:`Inputs` and
:class:`StepResult`, in their order.
"""

from __future__ import annotations

from importlib import import_module
from string import ascii_lowercase
from typing import Any

import torch

from dng_kernels import cpu, naive, normal
from dng_kernels._border import Call
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import Variant, capturing, keep_captured

# Where table, inputs, outputs and the rest begin among the operator's arguments.
_TABLE = len(Variant._fields)
_INPUTS = _TABLE + 2
_OUTPUTS = _INPUTS + len(Inputs._fields)
_REST = _OUTPUTS + len(StepResult._fields)


def _schema() -> str:
    # ``task`` is the mode of the variant, a name that torch keeps for itself.
    arguments = ["int task", "int rule", "int tracker"]
    arguments += [f"bool {name}" for name in Variant._fields[3:]]
    arguments += ["Tensor table", "Tensor index"]
    arguments += [
        f"Tensor{'' if name in ('eps', 'eps_neg') else '?'} {name}" for name in Inputs._fields
    ]
    written = [f"out_{name}" for name in StepResult._fields] + ["counters", "partials"]
    arguments += [
        f"Tensor({letter}!)? {name}" for letter, name in zip(ascii_lowercase, written, strict=False)
    ]
    return f"({', '.join([*arguments, 'int? seed', 'int first_sample'])}) -> ()"


# Low-level registration: a call through ``torch.library.custom_op`` costs 40 microseconds.
torch.library.define("dng_kernels::step", _schema())


@torch.library.impl("dng_kernels::step", ("cpu", "cuda"))
def _run(*arguments: Any) -> None:
    """Run the Triton kernel if counters are given, else the CPU path."""
    variant = Variant._make(arguments[:_TABLE])
    table, index = arguments[_TABLE:_INPUTS]
    inputs = Inputs._make(arguments[_INPUTS:_OUTPUTS])
    outputs = StepResult._make(arguments[_OUTPUTS:_REST])
    counters, partials, seed, first_sample = arguments[_REST:]
    if counters is not None:
        fused = import_module("dng_kernels.fused")
        if capturing(table.device):
            keep_captured(table, index, counters, partials)
        fused.run(inputs, outputs, variant, table, index, seed, first_sample, counters, partials)
        return
    if seed is not None:
        inputs = with_keys(inputs, seed, first_sample)
    cpu.run(inputs, outputs, variant, table, index)


# The fake does nothing: the operator returns nothing, and its outputs already exist.
torch.library.register_fake("dng_kernels::step", lambda *arguments: None)

_launch = torch.ops.dng_kernels.step.default


def launch(
    call: Call,
    mode: int,
    inputs: Inputs,
    outputs: StepResult,
    seed: int | None = None,
    first_sample: int = 0,
) -> None:
    """Run a checked call: the reference as it stands, the other engines as the operator.

    Parameters
    ----------
    call : Call
        Plan, step and engine.
    mode : int
        STEP, GUIDE or UPDATE.
    inputs, outputs : Inputs, StepResult
        What to read and to write.
    seed : int, optional
        A seed as an int64, to make the noise in the step.
    first_sample : int
        Sample index of the first row.
    """
    plan, index, eps = call.plan, call.index, inputs.eps
    batch, variant = eps.shape[0], plan.variants[mode]
    if batch == 0:
        return
    table = plan.table64 if eps.dtype == torch.float64 else plan.table
    if call.engine == "reference":
        if seed is not None:
            inputs = with_keys(inputs, seed, first_sample)
        naive.run(inputs, outputs, variant, table, index)
        return
    counters = partials = None
    if call.engine == "triton":
        counters, partials = plan.workspace(batch, eps.numel() // batch)
    _launch(*variant, table, index, *inputs, *outputs, counters, partials, seed, first_sample)


def with_keys(inputs: Inputs, seed: int, first_sample: int) -> Inputs:
    """The inputs with the keys of every sample in place of a seed."""
    keys = normal.keys_of(seed, len(inputs.eps), first_sample, inputs.eps.device)
    return inputs._replace(keys=keys)
