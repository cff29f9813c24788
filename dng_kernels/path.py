"""The posterior along the path of the points, for any sampler: one pass over memory a point.

The tracker of :class:`dng_math.PathTracker` needs three sums over a sample: the rate at the point,
and the gradients of both ends of the way here along it (docs/theory.md, section 6.11)::

    product = (eps_c - eps) . (eps_c + eps)
    after, before = (eps_c - eps) . (u - u_before), of this point and of the one before

Predictions of other types than noise are turned into noise on the way: at a given x they are
affine in each other.  A :class:`PathMemory` keeps of every point what the next one needs.  It is
written in the same pass, so callers may reuse the memory of x and of the predictions.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dng_kernels._border import (
    HAS_TRITON,
    Backend,
    _check_per_sample,
    check_events,
    refuse_transforms,
    transforms_active,
)
from dng_kernels._path_numbers import Level, Numbers, level_of, numbers_of, way_between
from dng_kernels.layout import empty_like
from dng_math import checks, equations
from dng_math.schedules import PREDICTION_TYPES, PredictionType
from dng_math.trackers import PathTracker, PathWay, TimeProfile

BACKENDS = ("auto", "triton", "reference")


class PathMemory:
    """What :func:`update_path` keeps of the last point, for one concept; at first nothing.

    Attributes
    ----------
    level : Level or None
        The noise level of the last point; None before the first one.
    x, delta : Tensor, shape (B, ...), or None
        Its x, and ``eps_neg - eps``; float32, or float64 in a float64 run.
    rate : Tensor, shape (B,), or None
        ``tau dL/dtau`` there.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the last point: the next one begins a path."""
        self.level: Level | None = None
        self.x: Tensor | None = None
        self.delta: Tensor | None = None
        self.rate: Tensor | None = None


def update_path(
    tracker: PathTracker,
    memory: PathMemory,
    x: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor,
    alpha: float,
    sigma: float,
    *,
    divergence_gap: Tensor,
    prediction_type: PredictionType = "epsilon",
    temperature: float | None = None,
    offset: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """The state of a path tracker at a point, from that at the point before.

    Call it at every point at which predictions are made, before the step from there, with the
    points in the order in which they are made, whoever moves them.  A plan with a
    :class:`dng_math.PathTracker` then guides by the state and leaves it as it is.

    Parameters
    ----------
    tracker : PathTracker
        Its hyperparameters; ``offset_nats`` is given as ``offset``, and of a profile of
        temperatures the number as ``temperature``.
    memory : PathMemory
        Of this concept and run; it is overwritten with this point.
    x : Tensor, shape (B, ...)
        x_t = alpha x0 + sigma eps; float32, float16, bfloat16 or float64.  Keep it in float32,
        because the update depends on the difference of two of them.
    eps, eps_neg : Tensor, shape (B, ...)
        The base and the negative prediction at x.
    state : Tensor, shape (B,)
        float32 (float64 in a float64 run); at the first point ``plan.init_state(B)``.
    alpha, sigma : float
        The noise level, alpha >= 0 and sigma > 0.  sigma/alpha must not be higher than before.
    divergence_gap : Tensor, shape (B,)
        div s_neg - div s, in inverse squared units of x: exact, or an unbiased estimate of it.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What ``eps`` and ``eps_neg`` are; at alpha = 0 not "epsilon".
    temperature : float, optional
        In place of the tracker's.
    offset : float
        Added to the state, in nats.
    backend : {"auto", "triton", "reference"}
        Two Triton kernels, or plain torch.  "auto" takes the kernels on a GPU.

    Returns
    -------
    Tensor, shape (B,), dtype of ``state``

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """
    if transforms_active():
        refuse_transforms(x=x, eps=eps, eps_neg=eps_neg, state=state, divergence_gap=divergence_gap)
    if not isinstance(tracker, PathTracker):
        raise TypeError(f"tracker must be a PathTracker, got {tracker!r}")
    if not isinstance(memory, PathMemory):
        raise TypeError(f"memory must be a PathMemory, got {memory!r}")
    check_events("x", x, eps=eps, eps_neg=eps_neg)
    _check_per_sample("state", state, x)
    _check_per_sample("divergence_gap", divergence_gap, x)
    alpha = checks.non_negative("alpha", alpha)
    sigma = checks.positive("sigma", sigma)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if alpha == 0.0 and prediction_type == "epsilon":
        raise ValueError(
            "prediction_type must not be 'epsilon' at alpha = 0, where x says nothing of x0: use "
            "'v_prediction', 'sample' or 'flow_prediction'"
        )
    given = tracker.temperature if temperature is None else temperature
    if isinstance(given, TimeProfile):
        raise TypeError(
            f"temperature must be given as a number for a tracker with a profile, got {given!r}"
        )
    scale = checks.non_negative("temperature", given)
    offset = checks.finite("offset", offset)
    checks.choice("backend", backend, BACKENDS)
    at, before = level_of(prediction_type, alpha, sigma), memory.level
    if before is not None:
        assert memory.x is not None
        if memory.x.shape != x.shape or memory.x.device != x.device:
            raise ValueError(
                f"x must be of shape {tuple(memory.x.shape)} on {memory.x.device}, as at the last "
                f"point of this memory, got {tuple(x.shape)} on {x.device}; memory.reset() begins "
                "another path"
            )
        if at.alpha * before.sigma < before.alpha * at.sigma * (1.0 - 1e-6):
            raise ValueError(
                "sigma/alpha must not be higher than at the last point of this memory, "
                f"{before.sigma:g}/{before.alpha:g}, got {sigma:g}/{alpha:g}; memory.reset() "
                "begins another path"
            )
        if at.alpha == 0.0:
            raise ValueError("alpha must be above 0 after another point, got 0")
    double = x.dtype == torch.float64
    if backend == "triton" and (double or not HAS_TRITON):
        reason = "it computes in float32" if double else "Triton is not installed"
        raise ValueError(f"backend must not be 'triton': {reason}")
    fast = x.device.type == "cuda" and HAS_TRITON and not double and len(x) > 0
    run = _run
    if backend == "triton" or (backend == "auto" and fast):
        run = import_module("dng_kernels._path_kernels").run
    with torch.no_grad():
        following = run(
            _kept(memory, x),
            before is None,
            x,
            eps,
            eps_neg,
            state,
            divergence_gap,
            at,
            way_between(before, at),
            numbers_of(tracker, scale, offset),
        )
    memory.level = at
    return following


def _kept(memory: PathMemory, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The memory's tensors for batches like x, allocated at the first point."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if memory.x is None or memory.delta is None or memory.rate is None:
        memory.x, memory.delta = empty_like(x, wide), empty_like(x, wide)
        memory.rate = torch.empty(len(x), dtype=wide, device=x.device)
    return memory.x, memory.delta, memory.rate


def _run(
    kept: tuple[Tensor, Tensor, Tensor],
    first: bool,
    x: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor,
    divergence_gap: Tensor,
    at: Level,
    way: PathWay,
    numbers: Numbers,
) -> Tensor:
    """The update in plain torch; sums in float64, as everything per sample."""
    kept_x, kept_delta, kept_rate = kept
    wide = kept_x.dtype
    now, base, other = (each.to(wide) for each in (x, eps, eps_neg))
    delta = other - base
    total = 2.0 * at.on_x * now + at.on_prediction * (base + other)
    product = at.on_prediction * _dot(delta, total)
    rate = equations.path_rate(product, at.sigma**2 * divergence_gap.double())
    if first:
        before = after = -rate
    else:
        moved = way.here * now + way.there * kept_x
        pull = way.pull * _dot(delta, moved)
        pull_before = way.pull_before * _dot(kept_delta, moved)
        after = equations.path_end(pull, rate, way.weight)
        before = equations.path_end(pull_before, kept_rate.double(), way.weight_before)
    level = state.double()
    odds: Any = 0.0
    next_odds: Any = 0.0
    if numbers.rest:
        odds = level.clamp(max=numbers.high).exp()
        log_p = torch.nn.functional.logsigmoid(level)
        guess = log_p + numbers.temperature * 0.5 * (before + after)
        p = guess.clamp(max=numbers.log_p_max).exp()
        next_odds = p / (1.0 - p)
    ratio = equations.path_log_ratio(before, after, odds, next_odds)
    following = level + numbers.temperature * ratio + numbers.offset
    high = None if numbers.rest else numbers.high
    kept_x.copy_(now)
    kept_delta.copy_(delta)
    kept_rate.copy_(rate)
    return following.clamp(numbers.low, high).to(state.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over a sample, (B, ...), (B, ...) -> (B,), float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
