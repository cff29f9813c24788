"""The public operations: check, allocate, launch.

On a GPU they run the Triton kernel, on a CPU the fast path in torch and NumPy, and otherwise (for
float64 on a GPU, without Triton, and under ``torch.compile`` on a CPU, which fuses it) the
reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dng_kernels._border import (
    Backend,
    Call,
    check_events,
    in_order,
    refuse_shared,
    refuse_transforms,
    transforms_active,
)
from dng_kernels._known import eager, key_of, remember
from dng_kernels._operator import launch
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import GUIDE, STEP, UPDATE, StepPlan


def dng_step(
    plan: StepPlan,
    step: int | Tensor,
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
) -> StepResult:
    """Guide, take the step and update the posterior, in one pass over memory.

    ``guided = base - lambda (eps_neg - eps)`` with the rule's lambda, where base is ``eps`` or its
    CFG combination with ``eps_uncond`` (DNG Eq. 10).  The plan's sampler takes the step to
    ``x_next`` from it, and the tracker's state is updated by the likelihoods of that x_next under
    ``eps_neg`` and under ``eps`` (DNG Eq. 12, Algorithms 1 and 2).  A rule that measures the
    negative from the unconditional prediction (``plan.from_uncond``) has ``eps_uncond`` for ``eps``
    in both places.

    Parameters
    ----------
    plan : StepPlan
        Schedule, sampler, rule and kind of prediction.
    step : int or 0-dim int64 Tensor
        Row of the plan, 0 the noisiest; a tensor is read on the device, without synchronising.
    x : Tensor, shape (B, ...)
        x at the noisier end; float32, float16, bfloat16 or (not with the Triton kernel) float64.
    eps, eps_neg : Tensor, shape (B, ...)
        The base and the negative prediction (for CFG and FBG the positive one), of the plan's
        prediction type.  They may have 16 bits when x is float32.
    state : Tensor, shape (B,)
        The state of the tracker, or CRG's evidence, float32; see :meth:`StepPlan.init_state`.
        None for rules without one.
    eps_uncond : Tensor, shape (B, ...)
        Unconditional prediction, for a plan with ``cfg_scale``.
    eps_pos : Tensor, shape (B, ...)
        Positive prediction, for Perp-Neg.
    noise : Tensor, shape (B, ...)
        Standard normals.  A step that adds noise takes either these or a ``seed``.
    seed : int or Tensor of shape (B, 2), int64
        Makes the normals in the step, from (seed, first_sample + i, step): a number in [0, 2^64),
        or seed and sample index of every sample on the device (:func:`noise_keys`).
    first_sample : int
        Sample index of the first row, with an integer seed.
    momentum : Tensor, shape (B, ...)
        SLD's momentum, float32; see :meth:`StepPlan.init_momentum`.
    divergence_gap : Tensor, shape (B,)
        div s_neg - div s, for trackers with ``divergence=True``.
    out : StepResult, optional
        Tensors to write into; what is None is allocated.  x_next and eps_guided may be any input
        of their shape, place by place, state and momentum the input of that name; nothing else may
        share memory.
    return_guided, return_scale : bool
        Whether to return the guided prediction and the scale.
    backend : {"auto", "triton", "cpu", "reference"}
        The Triton kernel, the fast path of CPUs, or the naive form on whole tensors
        (:mod:`dng_kernels.naive`).  "auto" takes the fastest that can do it.

    Returns
    -------
    StepResult

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.  A step has
        no derivative, forward or backward, and none of its tensors may be batched by
        ``torch.vmap``.
    """
    key = None
    options = (backend, return_guided, return_scale, eps_uncond is None, eps_pos is None)
    if eager() and _plain(plan, step, out, seed, first_sample, options):
        first, third = in_order(plan, eps, eps_uncond, eps_pos)
        keys = seed if isinstance(seed, Tensor) else None
        given = Inputs(x, None, first, eps_neg, third, noise, momentum, keys, state, divergence_gap)
        own = type(seed) is int
        key = key_of(STEP, (*options, own, plan.noisy[step]), given, out)
        known = plan._known.get(key) if key else None
        if known is not None:
            bits = seed if own else 0
            return known.launch(plan.indices[step], given, out, bits, first_sample)
    checked = check_step(
        plan,
        step,
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
    call, inputs, result, bits = checked
    launch(call, STEP, inputs, result, bits, first_sample)
    remember(plan, key, call, STEP, inputs, result, bits, first_sample)
    return result


_USUAL = frozenset({bool, str})


def _plain(
    plan: object,
    step: object,
    out: object,
    seed: object = None,
    first_sample: object = 0,
    options: tuple[object, ...] = (),
) -> bool:
    """Whether a call has the usual types, so that it may be one that is known."""
    return (
        type(plan) is StepPlan
        and type(step) is int
        and 0 <= step < len(plan)
        and (out is None or type(out) is StepResult)
        and (seed is None or type(seed) is Tensor or (type(seed) is int and 0 <= seed < 2**63))
        and type(first_sample) is int
        and 0 <= first_sample < 2**62
        and _USUAL.issuperset(map(type, options))
    )


class CheckedStep(NamedTuple):
    """A step after its checks: what :func:`dng_step` launches, and a bound step keeps."""

    call: Call
    inputs: Inputs
    result: StepResult
    bits: int | None  # of an integer seed


def check_step(
    plan: StepPlan,
    step: int | Tensor,
    x: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor | None,
    *,
    eps_uncond: Tensor | None,
    eps_pos: Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    momentum: Tensor | None,
    divergence_gap: Tensor | None,
    out: StepResult | None,
    return_guided: bool,
    return_scale: bool,
    backend: Backend,
) -> CheckedStep:
    """Check the arguments of :func:`dng_step`, and allocate what is not given for its results."""
    if transforms_active():
        refuse_transforms(
            step=step,
            x=x,
            eps=eps,
            eps_neg=eps_neg,
            state=state,
            eps_uncond=eps_uncond,
            eps_pos=eps_pos,
            noise=noise,
            seed=seed,
            momentum=momentum,
            divergence_gap=divergence_gap,
            out=out,
        )
    check_events(
        "x", x, eps=eps, eps_neg=eps_neg, eps_uncond=eps_uncond, eps_pos=eps_pos, noise=noise
    )
    call = Call(plan, step, "x", x, backend)
    first, third = call.predictions(eps, eps_uncond, eps_pos)
    call.state(state)
    call.divergence(divergence_gap)
    call.momentum(momentum)
    noise, keys, bits = call.randomness(step, noise, seed, first_sample)
    result = call.results(
        out,
        x_next=x.dtype,
        state=None if state is None else state.dtype,
        eps_guided=eps.dtype,
        scale=torch.float64 if x.dtype == torch.float64 else torch.float32,
        momentum=None if momentum is None else momentum.dtype,
        log_weight=state.dtype if plan.weighted and state is not None else None,
        return_guided=return_guided,
        return_scale=return_scale,
    )
    inputs = Inputs(x, None, first, eps_neg, third, noise, momentum, keys, state, divergence_gap)
    if out is not None:
        refuse_shared(plan, inputs, result)
    return CheckedStep(call, inputs, result, bits)


def guide(
    plan: StepPlan,
    step: int | Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor | None = None,
    *,
    eps_uncond: Tensor | None = None,
    eps_pos: Tensor | None = None,
    momentum: Tensor | None = None,
    out: StepResult | None = None,
    return_scale: bool = False,
    backend: Backend = "auto",
) -> StepResult:
    """The guided prediction alone, for samplers that take their own step.

    Arguments and errors are those of :func:`dng_step`.  The state is read here and changed by
    :func:`update_posterior`, but for CRG's evidence, which needs no step and is changed here.

    Returns
    -------
    StepResult
        With ``eps_guided``, on request ``scale``, for SLD ``momentum`` and for CRG ``state``.
    """
    if transforms_active():
        refuse_transforms(
            step=step,
            eps=eps,
            eps_neg=eps_neg,
            state=state,
            eps_uncond=eps_uncond,
            eps_pos=eps_pos,
            momentum=momentum,
            out=out,
        )
    key = None
    options = (backend, return_scale, eps_uncond is None, eps_pos is None)
    if eager() and _plain(plan, step, out, options=options):
        first, third = in_order(plan, eps, eps_uncond, eps_pos)
        given = Inputs(None, None, first, eps_neg, third, None, momentum, None, state, None)
        key = key_of(GUIDE, options, given, out)
        known = plan._known.get(key) if key else None
        if known is not None:
            return known.launch(plan.indices[step], given, out)
    check_events("eps", eps, eps_neg=eps_neg, eps_uncond=eps_uncond, eps_pos=eps_pos)
    call = Call(plan, step, "eps", eps, backend)
    first, third = call.predictions(eps, eps_uncond, eps_pos)
    call.state(state)
    call.momentum(momentum)
    result = call.results(
        out,
        state=state.dtype if plan.tracks_evidence and state is not None else None,
        eps_guided=eps.dtype,
        scale=torch.float64 if eps.dtype == torch.float64 else torch.float32,
        momentum=None if momentum is None else momentum.dtype,
        return_scale=return_scale,
    )
    inputs = Inputs(None, None, first, eps_neg, third, None, momentum, None, state, None)
    if out is not None:
        refuse_shared(plan, inputs, result)
    launch(call, GUIDE, inputs, result)
    remember(plan, key, call, GUIDE, inputs, result, None, 0)
    return result


def update_posterior(
    plan: StepPlan,
    step: int | Tensor,
    x: Tensor,
    x_next: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor,
    *,
    divergence_gap: Tensor | None = None,
    out: StepResult | None = None,
    backend: Backend = "auto",
) -> StepResult:
    """The tracker's state at the cleaner end of a step that was taken elsewhere.

    Arguments and errors are those of :func:`dng_step`, with the x_next that the step gave.  Keep it
    in float32, because the update depends on the difference of x and x_next.  ``eps`` is what the
    negative is measured from: the unconditional prediction for a plan with ``from_uncond``.

    Returns
    -------
    StepResult
        With ``state``.
    """
    if transforms_active():
        refuse_transforms(
            step=step,
            x=x,
            x_next=x_next,
            eps=eps,
            eps_neg=eps_neg,
            state=state,
            divergence_gap=divergence_gap,
            out=out,
        )
    key = None
    if eager() and _plain(plan, step, out, options=(backend,)):
        given = Inputs(x, x_next, eps, eps_neg, None, None, None, None, state, divergence_gap)
        key = key_of(UPDATE, (backend,), given, out)
        known = plan._known.get(key) if key else None
        if known is not None:
            return known.launch(plan.indices[step], given, out)
    check_events("x", x, x_next=x_next, eps=eps, eps_neg=eps_neg)
    call = Call(plan, step, "x", x, backend)
    if plan.tracker is None:
        raise ValueError(f"plan must have a rule that tracks a posterior, got {plan.rule!r}")
    if plan.tracks_path:
        raise ValueError(
            "plan must have a tracker of transitions here; the state of a PathTracker is updated "
            f"by update_path, got {plan.rule!r}"
        )
    call.state(state)
    call.divergence(divergence_gap)
    result = call.results(out, state=state.dtype)
    inputs = Inputs(x, x_next, eps, eps_neg, None, None, None, None, state, divergence_gap)
    if out is not None:
        refuse_shared(plan, inputs, result)
    launch(call, UPDATE, inputs, result)
    remember(plan, key, call, UPDATE, inputs, result, None, 0)
    return result
