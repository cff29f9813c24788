"""Differences of the divergences of networks' predictions, by forward derivatives.

A posterior needs div s_c - div s where its tracker follows the points, or where a sampler adds too
little noise (docs/theory.md, sections 6.9 and 6.11).  Hutchinson's estimate of the divergence is
v . (J v) for random signs v, with J v a forward derivative of the network: no graph is kept, and
the predictions themselves come with it.  It has no error from the diagonal of J.

The signs of an image are the same at all steps, times rows of a Hadamard matrix that differ.  What
J has at (a, b) is estimated with the sign v_a v_b, and over a whole cycle of rows these signs add
up to 0: the errors of different steps cancel, as far as J does not change in between, at no cost.
A cycle has as many rows as x has numbers (the next power of 2), so that this is worth much for
small x, or several directions, and nothing for large x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from dng_kernels import standard_normal
from dng_math.hadamard import signs_of_row
from dng_math.trackers import LARGEST_WEIGHED

Predictions = Callable[[Tensor], Sequence[Tensor]]


def predictions_and_traces(
    predict: Predictions,
    x: Tensor,
    keys: Tensor,
    step: int,
    probes: int,
    *,
    networks: Sequence[object] = (),
    named: str = "probes",
    check: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Predictions at x, and an estimate of the trace of each one's Jacobian.

    Parameters
    ----------
    predict : callable
        Maps a tensor like x to K predictions of its shape.
    x : Tensor, shape (B, ...)
        float32 or float64.
    keys : Tensor, shape (B, 2), int64
        Keys of the signs of every image (:func:`dng_kernels.noise_keys`), the same at all steps.
        They must differ between images: if all shared their signs, all estimates of a run would err
        in one direction.
    step : int
        Index of the step; every step has directions of its own.
    probes : int
        Number of random directions, at least 1; each takes one forward derivative.
    networks : sequence
        What ``predict`` evaluates, to name a layer that has no forward derivative.
    named : str
        The argument of the caller that asks for derivatives, for messages.
    check : bool
        Whether to refuse a derivative that is zero throughout; once in a run is enough.

    Returns
    -------
    predictions : list of Tensor
        K tensors of the shape of x.
    traces : Tensor, shape (K, B)
        Means over the directions of v . (J v), of the dtype of x.
    spreads : Tensor, shape (K, B)
        Means of (v . d)^2 - |d|^2, with d a prediction less the first one: 0 on average, and what
        a Jacobian d d^T contributes to the error of its trace (:func:`quieter`).

    Raises
    ------
    ValueError
        If a prediction has no forward derivative, or is computed without one.
    """
    total: Tensor | None = None
    spreads: Tensor | None = None
    found: list[Tensor] = []
    signs = standard_normal(keys + 1, x.shape, dtype=x.dtype).sign()
    for probe in range(probes):
        row = hadamard_row(step * probes + probe, signs[0].numel(), x.device)
        v = signs * row.to(x.dtype).reshape(x.shape[1:])
        found, tangents = _derivatives(predict, x, v, networks, named)
        if check and probe == 0 and not all(bool(tangent.any()) for tangent in tangents):
            raise ValueError(
                f"{named} must be 0 for these networks: a prediction does not change with x to "
                "first order, as one that is computed from a detached x"
            )
        dots = torch.stack([(v * tangent).flatten(1).sum(1) for tangent in tangents])
        total = dots if total is None else total + dots
        apart = torch.stack([each.to(x.dtype) - found[0].to(x.dtype) for each in found])
        spread = (v * apart).flatten(2).sum(2).square() - apart.square().flatten(2).sum(2)
        spreads = spread if spreads is None else spreads + spread
    assert total is not None and spreads is not None
    return found, total / probes, spreads / probes


def hadamard_row(index: int, length: int, device: torch.device | None = None) -> Tensor:
    """One of the rows of a Hadamard matrix, in an order in which parts of a cycle are balanced.

    Parameters
    ----------
    index : int
        Its place in the order, which repeats after the next power of 2 from ``length``.
    length : int
        Number of signs that are wanted of it, at least 1.
    device : torch.device, optional
        Default: the CPU.

    Returns
    -------
    Tensor of int64, shape (length,)
        1 and -1.
    """
    return signs_of_row(index, torch.arange(length, device=device), length)


def quieter(gaps: Tensor, spreads: Tensor, log_posterior: Tensor) -> Tensor:
    """Estimates of div s_c - div s with the part of their error taken off that is known.

    The base is a mixture of c, with the odds o, and the rest.  Its Jacobian therefore has a part
    along the difference of the predictions, ``-(o/sigma^2) d d^T`` in that of s_c - s, with d in
    units of the noise.  The trace of this part is known, and so is its estimate's error.  Whatever
    o is, the result has the mean of the estimate.

    Parameters
    ----------
    gaps : Tensor, shape (M, B)
        The estimates, in inverse squared units of x.
    spreads : Tensor, shape (M, B)
        Those of :func:`predictions_and_traces`, times what makes d^2 a square of scores.
    log_posterior : Tensor, shape (M, B)
        log p(c | x), roughly; p counts up to 0.99.
    """
    p = log_posterior.exp().clamp(max=LARGEST_WEIGHED)
    return gaps + (p / (1.0 - p)).to(gaps.dtype) * spreads


def _derivatives(
    predict: Predictions, x: Tensor, v: Tensor, networks: Sequence[object], named: str
) -> tuple[list[Tensor], list[Tensor]]:
    try:
        return forward_derivatives(predict, x, v)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        where = _failing_layer(predict, x, v, networks)
        raise ValueError(
            f"{named} must be 0 for a network without a forward derivative{where}: torch says: "
            f"{error}. Without derivatives a posterior is right for samplers with DDPM's noise"
        ) from error


def forward_derivatives(
    predict: Predictions, x: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions at x, and their derivatives along v; raises what torch does."""
    # Neither fused attention nor compiled code has a forward derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), _Contiguous():
        found, tangents = torch.func.jvp(lambda at: tuple(predict(at)), (x,), (v,))[:2]
    return list(found), list(tangents)


class _Contiguous(TorchFunctionMode):
    """Gives group_norm derivatives that are contiguous, which torch's own takes for granted.

    After an attention they are not: its formula then fails in a view.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def _failing_layer(predict: Predictions, x: Tensor, v: Tensor, networks: Sequence[object]) -> str:
    """Where the derivative fails: the name and class of the innermost layer, for a message."""
    names = {
        id(layer): name
        for network in networks
        if isinstance(network, nn.Module)
        for name, layer in network.named_modules()
    }
    with _entered() as layers:
        try:
            forward_derivatives(predict, x, v)
        except (RuntimeError, NotImplementedError):
            pass
        if not layers:
            return ""
        layer = layers[-1]
        return f", which {names.get(id(layer)) or 'its layer'} ({type(layer).__name__}) lacks"


@contextmanager
def _entered() -> Iterator[list[nn.Module]]:
    """The modules whose forward was entered and not left, outermost first, in this block."""
    layers: list[nn.Module] = []

    def left(*_: Any) -> None:
        layers.pop()

    hooks = [
        register_module_forward_pre_hook(lambda layer, _: layers.append(layer)),
        register_module_forward_hook(left),
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
