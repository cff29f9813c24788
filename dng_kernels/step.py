"""The public operations: check, allocate, dispatch.

All of them are one operator of ``torch.library``, ``dng_kernels::step``, which writes into given
tensors; so they go through ``torch.compile`` and export, and a captured graph replays them.  On a
GPU it is the Triton kernel, elsewhere (and in float64) the torch reference.  ``torch.compile`` is
shown the reference itself instead of the operator, and fuses it.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from dng_kernels import normal, reference
from dng_kernels.layout import batch_stride, empty_like, is_channels_last
from dng_kernels.plan import NO_TRACKER, StepPlan
from dng_kernels.reference import GUIDE, STEP, UPDATE, Inputs, Outputs, Variant
from dng_math import _checks

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "reference")
REDUCED = {torch.float32, torch.float16, torch.bfloat16}
DTYPES = REDUCED | {torch.float64}
NEEDED = ("eps", "eps_neg", "x_next")  # of the tensors like x, those that every call has
HAS_TRITON = find_spec("triton") is not None


class StepResult(NamedTuple):
    """What a step returns; None where it was not asked for or does not exist.

    Attributes
    ----------
    x_next : Tensor, shape (B, ...)
        x at the cleaner end, dtype of x.
    state : Tensor, shape (B,)
        Of the tracker, at the cleaner end: log p, log p/(1-p) or L; float32 or float64.
    eps_guided : Tensor, shape (B, ...)
        The guided prediction, of the kind and dtype of ``eps``.
    scale : Tensor, shape (B,)
        The scale that was used; for SLD the mean of the elementwise one.
    momentum : Tensor, shape (B, ...)
        SLD's, for the next step.
    """

    x_next: Tensor | None
    state: Tensor | None
    eps_guided: Tensor | None
    scale: Tensor | None
    momentum: Tensor | None


_NOTHING = StepResult(None, None, None, None, None)


# ---------------------------------------------------------------------- the operator


# ``task`` is the mode of the variant, a name that torch keeps for itself.
# Low-level registration: a call through ``torch.library.custom_op`` costs 40 microseconds.
_SCHEMA = """(
    int task, int rule, int tracker, bool cfg, bool clip, bool drift, bool divergence,
    Tensor table, Tensor index,
    Tensor? x, Tensor? x_next, Tensor eps, Tensor eps_neg, Tensor? eps_third, Tensor? noise,
    Tensor? momentum, Tensor? keys, Tensor? state, Tensor? divergence_gap,
    Tensor(a!)? out_x_next, Tensor(b!)? out_eps_guided, Tensor(c!)? out_momentum,
    Tensor(d!)? out_state, Tensor(e!)? out_scale,
    Tensor(f!)? counters, Tensor(g!)? partials,
    int? seed, int first_sample
) -> ()"""
torch.library.define("dng_kernels::step", " ".join(_SCHEMA.split()))


@torch.library.impl("dng_kernels::step", ("cpu", "cuda"))
def _operator(
    task: int,
    rule: int,
    tracker: int,
    cfg: bool,
    clip: bool,
    drift: bool,
    divergence: bool,
    table: Tensor,
    index: Tensor,
    x: Tensor | None,
    x_next: Tensor | None,
    eps: Tensor,
    eps_neg: Tensor,
    eps_third: Tensor | None,
    noise: Tensor | None,
    momentum: Tensor | None,
    keys: Tensor | None,
    state: Tensor | None,
    divergence_gap: Tensor | None,
    out_x_next: Tensor | None,
    out_eps_guided: Tensor | None,
    out_momentum: Tensor | None,
    out_state: Tensor | None,
    out_scale: Tensor | None,
    counters: Tensor | None,
    partials: Tensor | None,
    seed: int | None,
    first_sample: int,
) -> None:
    """Fused where there are counters, else the reference."""
    variant = Variant(task, rule, tracker, cfg, clip, drift, divergence)
    inputs = Inputs(
        x, x_next, eps, eps_neg, eps_third, noise, momentum, keys, state, divergence_gap
    )
    outputs = Outputs(out_x_next, out_eps_guided, out_momentum, out_state, out_scale)
    if counters is not None and partials is not None:
        fused = import_module("dng_kernels.fused")
        fused.run(inputs, outputs, variant, table, index, seed, first_sample, counters, partials)
        return
    if seed is not None:
        inputs = inputs._replace(keys=_keys(seed, len(eps), first_sample, eps.device))
    reference.run(inputs, outputs, variant, table, index)


# Nothing is returned, and what is written into exists.
torch.library.register_fake("dng_kernels::step", lambda *arguments: None)

_launch = torch.ops.dng_kernels.step.default


def _keys(bits: int, batch: int, first_sample: int, device: torch.device | str | None) -> Tensor:
    """Seed and sample index of consecutive samples, (batch, 2)."""
    samples = torch.arange(first_sample, first_sample + batch, device=device)
    return torch.stack([torch.full_like(samples, bits), samples], dim=1)


# ---------------------------------------------------------------------- the border


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return value - 2**64 if value >= 2**63 else value


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _transform(tensor: Tensor) -> str | None:
    """What a tensor carries that a step would lose: a forward derivative or a batch of vmap."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        # The compiler cannot look beneath the innermost transform.
        if functorch.is_batchedtensor(tensor):
            return "vmap"
        return "jvp" if _has_tangent(tensor) else None
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    while True:
        if functorch.is_batchedtensor(tensor):
            return "vmap"
        with ExitStack() as outer:
            # The tangent of an outer transform is seen from its own level only.
            level = max(0, functorch.maybe_get_level(tensor))
            while (functorch.maybe_current_level() or 0) > level:
                outer.enter_context(temporarily_pop_interpreter_stack())
            if _has_tangent(tensor):
                return "jvp"
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)


def _refuse_transforms(**arguments: object) -> None:
    """Neither forward derivatives nor vmap: the operator writes into tensors that know of none."""
    for name, given in arguments.items():
        fields = given._asdict() if isinstance(given, StepResult) else {"": given}
        for field, tensor in fields.items():
            kind = _transform(tensor) if isinstance(tensor, Tensor) else None
            where = f"{name}.{field}" if field else name
            if kind == "jvp":
                raise ValueError(
                    f"{where} carries a forward derivative (torch.func.jvp or forward_ad), and a "
                    f"step has no derivative: give {where}.detach(), or take differences of two "
                    "steps"
                )
            if kind == "vmap":
                raise ValueError(
                    f"{where} is batched by torch.vmap, and a step has no rule for that: call it "
                    "outside, on a batch of all samples (B, ...), which are independent"
                )


def _transforms_active() -> bool:
    """Whether tensors may be those of torch.func or of forward_ad; two looks, in every call."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _mismatch(name: str, tensor: object, like_name: str, like: Tensor) -> Exception:
    """What is wrong with a tensor that is not like another one."""
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name} must be a tensor, got {tensor!r}")
    if tensor.shape != like.shape:
        return ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        return ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        return ValueError(
            f"{name} requires grad, and a step has no gradient: call it under torch.no_grad(), "
            f"or give {name}.detach()"
        )
    allowed = "float64" if like.dtype == torch.float64 else "float32, float16 or bfloat16"
    return TypeError(
        f"{name} must be {allowed} beside a {like.dtype} {like_name}, got {tensor.dtype}"
    )


def _check_events(
    like_name: str,
    like: Tensor,
    others: tuple[tuple[str, Tensor | None], ...],
) -> None:
    """Every tensor has the shape, device and precision of the first."""
    if not isinstance(like, Tensor) or like.ndim < 1 or like.dtype not in DTYPES:
        got = f"{like.dtype} of shape {tuple(like.shape)}" if isinstance(like, Tensor) else like
        raise TypeError(
            f"{like_name} must be a floating-point tensor of shape (batch, ...), got {got}"
        )
    shape, device, dtype = like.shape, like.device, like.dtype
    with_grad = torch.is_grad_enabled()
    if with_grad and like.requires_grad:
        raise _mismatch(like_name, like, like_name, like)
    for name, tensor in others:
        if tensor is None and name not in NEEDED:
            continue
        if not (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.device == device
            and not (with_grad and tensor.requires_grad)
            and (tensor.dtype is dtype or {dtype, tensor.dtype} <= REDUCED)
        ):
            raise _mismatch(name, tensor, like_name, like)


def _check_per_sample(name: str, tensor: object, like: Tensor) -> None:
    """One float32 number a sample (or float64, beside float64)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {tensor!r}")
    if tensor.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(like)},), one number a sample, got {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if tensor.dtype != torch.float32 and (
        tensor.dtype != torch.float64 or like.dtype != torch.float64
    ):
        raise TypeError(f"{name} must be float32 (float64 in a float64 step), got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise _mismatch(name, tensor, name, tensor)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_keys(keys: Tensor, batch: int, device: torch.device) -> None:
    """Seed and sample index of every sample."""
    if (
        keys.dtype != torch.int64
        or keys.shape != (batch, 2)
        or keys.device != device
        or not keys.is_contiguous()
    ):
        raise ValueError(
            f"seed must be an int or a contiguous int64 tensor of shape ({batch}, 2) on {device} "
            f"(see noise_keys), got {keys.dtype} of shape {tuple(keys.shape)}, strides "
            f"{keys.stride()}, on {keys.device}"
        )


def _check_target(name: str, given: object) -> None:
    """A tensor, and none that a graph of gradients remembers."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {given!r}")
    if given.requires_grad:
        raise ValueError(f"{name} requires grad, and is written into: give a detached tensor")


def _needed(name: str, value: object, needed: bool, why: str) -> None:
    """An argument is there if and only if the plan reads it."""
    if (value is not None) != needed:
        if needed:
            raise ValueError(f"{name} must be given: this plan needs it, as do {why}")
        raise ValueError(f"{name} must be None: nothing in this plan reads it, only {why} do")


class _Call:
    """The part of a call that its kind does not matter for."""

    __slots__ = ("index", "like", "name", "plan", "triton")

    def __init__(
        self, plan: StepPlan, step: int | Tensor, name: str, like: Tensor, backend: Backend
    ) -> None:
        if not isinstance(plan, StepPlan):
            raise TypeError(f"plan must be a StepPlan, got a {type(plan).__name__}")
        self.plan, self.name, self.like = plan, name, like
        if like.device != plan.device:
            raise ValueError(
                f"{name} must be on the device of the plan, {plan.device}, got {like.device}; "
                "plan.to(device) makes a plan for another"
            )
        self.index = self._index(step)
        if backend not in BACKENDS:
            _checks.choice("backend", backend, BACKENDS)
        double = like.dtype == torch.float64
        self.triton = backend == "triton" or (
            backend == "auto" and like.is_cuda and HAS_TRITON and not double
        )
        if backend == "triton" and (double or not HAS_TRITON):
            reason = "it computes in float32" if double else "Triton is not installed"
            raise ValueError(f"backend must not be 'triton': {reason}")

    def _index(self, step: int | Tensor) -> Tensor:
        if isinstance(step, Tensor):
            if step.dtype != torch.int64 or step.ndim != 0 or step.device != self.like.device:
                raise ValueError(
                    f"step must be an int or a 0-dimensional int64 tensor on {self.like.device}, "
                    f"got {step.dtype} of shape {tuple(step.shape)} on {step.device}"
                )
            # On a GPU its value is not known here, and in a compiled graph it is not known yet.
            if step.device.type == "cpu" and not torch.compiler.is_compiling():
                _checks.integer("step", int(step), 0, len(self.plan) - 1)
            return step
        if type(step) is not int or not 0 <= step < len(self.plan):
            step = _checks.integer("step", step, 0, len(self.plan) - 1)
        return self.plan.index_of[step]

    def per_sample(self, name: str, tensor: Tensor | None, needed: bool, why: str) -> None:
        """Check a state or the like."""
        if (tensor is not None) != needed:
            _needed(name, tensor, needed, why)
        if tensor is not None:
            _check_per_sample(name, tensor, self.like)

    def randomness(
        self, step: int | Tensor, noise: Tensor | None, seed: int | Tensor | None, first_sample: int
    ) -> tuple[Tensor | None, Tensor | None, int | None]:
        """Noise, keys and seed: at most one of them, and one where the step needs it."""
        plan = self.plan
        noisy = plan.ever_noisy if isinstance(step, Tensor) else plan.noisy[step]
        if noise is not None and seed is not None:
            raise ValueError("noise and seed must not both be given")
        if not noisy:
            return None, None, None
        if noise is None and seed is None:
            raise ValueError(
                "noise or seed must be given: the step adds noise (its variance is not 0)"
            )
        if isinstance(seed, Tensor):
            _check_keys(seed, self.like.shape[0], self.like.device)
            return None, seed, None
        if seed is not None:
            if type(seed) is not int or not 0 <= seed < 2**64:
                seed = _checks.integer("seed", seed, 0, 2**64 - 1)
            if type(first_sample) is not int or not 0 <= first_sample < 2**62:
                _checks.integer("first_sample", first_sample, 0, 2**62 - 1)
            if self.like.numel() > normal.LARGEST_SAMPLE * self.like.shape[0] > 0:
                raise ValueError(
                    f"{self.name} must have at most 2**34 elements a sample for noise made from a "
                    "seed"
                )
            return None, None, _signed(seed)
        return noise, None, None

    def target(
        self, name: str, given: Tensor | None, asked: bool, like: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Where an output of the shape of ``like`` goes."""
        if not asked:
            if given is not None:
                raise ValueError(f"{name} must be None: this call does not return it")
            return None
        if given is None:
            return empty_like(like, dtype)
        _check_target(name, given)
        if given.dtype is not dtype or given.shape != like.shape or given.device != like.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(like.shape)} on {like.device}, "
                f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}"
            )
        if (
            not (given.is_contiguous() and self.like.is_contiguous())
            and given.numel()
            and (batch_stride(given, is_channels_last(self.like)) != given[:1].numel())
        ):
            raise ValueError(
                f"{name} must lie in memory as {self.name} does, without gaps; got strides "
                f"{given.stride()}"
            )
        return given

    def per_sample_target(
        self, name: str, given: Tensor | None, asked: bool, dtype: torch.dtype
    ) -> Tensor | None:
        """Where one number a sample goes."""
        if not asked:
            if given is not None:
                raise ValueError(f"{name} must be None: this call does not return it")
            return None
        if given is None:
            return torch.empty(self.like.shape[0], dtype=dtype, device=self.like.device)
        _check_target(name, given)
        _check_per_sample(name, given, self.like)
        return given

    def launch(
        self,
        mode: int,
        tracker: int,
        inputs: Inputs,
        outputs: Outputs,
        seed: int | None,
        first_sample: int,
    ) -> None:
        """Call the operator, or show a compiler what is in it."""
        plan = self.plan
        if self.like.shape[0] == 0:
            return
        counters = partials = None
        if self.triton:
            counters, partials = plan.workspace(
                self.like.shape[0], self.like.numel() // self.like.shape[0]
            )
        variant = Variant(
            mode,
            plan.rule_code,
            tracker,
            plan.needs_uncond and mode != UPDATE,
            plan.clip is not None and mode != GUIDE,
            plan.has_drift and mode == STEP,
            plan.needs_divergence and mode != GUIDE,
        )
        table = plan.table64 if self.like.dtype == torch.float64 else plan.table
        if counters is None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            if seed is not None:
                keys = _keys(seed, self.like.shape[0], first_sample, self.like.device)
                inputs = inputs._replace(keys=keys)
            reference.run(inputs, outputs, variant, table, self.index)
            return
        _launch(
            *variant, table, self.index, *inputs, *outputs, counters, partials, seed, first_sample
        )


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
    CFG combination with ``eps_uncond`` (DNG Eq. 10); ``x_next`` from it by the plan's sampler; and
    the tracker's state from how likely that x_next is under ``eps_neg`` and under ``eps`` (DNG
    Eq. 12, Algorithms 1 and 2).

    Parameters
    ----------
    plan : StepPlan
        Schedule, sampler, rule and kind of prediction.
    step : int or 0-dim int64 Tensor
        Row of the plan, 0 the noisiest; a tensor is read on the device, without synchronising.
    x : Tensor, shape (B, ...)
        At the noisier end; float32, float16, bfloat16 or (reference only) float64.
    eps, eps_neg : Tensor, shape (B, ...)
        Prediction, and the one of what is unwanted (the positive one for CFG and FBG), of the
        plan's kind.  They may be of 16 bits beside a float32 x.
    state : Tensor, shape (B,)
        Of the tracker, float32; see :meth:`StepPlan.init_state`.  None for rules without one.
    eps_uncond : Tensor, shape (B, ...)
        For a plan with ``cfg_scale``.
    eps_pos : Tensor, shape (B, ...)
        For Perp-Neg: what guidance leads to.
    noise : Tensor, shape (B, ...)
        Standard normals; or
    seed : int or Tensor of shape (B, 2), int64
        to make them in the kernel, of (seed, first_sample + i, step): in [0, 2^64), or seed and
        sample index of every sample on the device (:func:`noise_keys`).
    first_sample : int
        Sample index of the first row, with an integer seed.
    momentum : Tensor, shape (B, ...)
        SLD's, float32; see :meth:`StepPlan.init_momentum`.
    divergence_gap : Tensor, shape (B,)
        div s_neg - div s, for trackers with ``divergence=True``.
    out : StepResult, optional
        Tensors to write into, which may be the inputs; what is None is allocated.
    return_guided, return_scale : bool
        Whether to return the guided prediction and the scale.
    backend : {"auto", "triton", "reference"}
        "auto" is the kernel on a GPU and the torch reference elsewhere and in float64.

    Returns
    -------
    StepResult

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.  A step has no derivative, forward or
        backward, and none of its tensors may be batched by ``torch.vmap``.
    """
    if _transforms_active():
        _refuse_transforms(
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
    _check_events(
        "x",
        x,
        (
            ("eps", eps),
            ("eps_neg", eps_neg),
            ("eps_uncond", eps_uncond),
            ("eps_pos", eps_pos),
            ("noise", noise),
        ),
    )
    call = _Call(plan, step, "x", x, backend)
    third = _third(plan, eps_uncond, eps_pos)
    tracked = plan.tracker_code != NO_TRACKER
    call.per_sample("state", state, tracked, "rules that track a posterior")
    call.per_sample(
        "divergence_gap", divergence_gap, plan.needs_divergence, "trackers with divergence=True"
    )
    _check_momentum(plan, momentum, x)
    given, keys, seed_bits = call.randomness(step, noise, seed, first_sample)
    into = _given(out)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = StepResult(
        call.target("out.x_next", into.x_next, True, x, x.dtype),
        call.per_sample_target(
            "out.state", into.state, tracked, accumulator if state is None else state.dtype
        ),
        call.target(
            "out.eps_guided",
            into.eps_guided,
            return_guided or into.eps_guided is not None,
            x,
            eps.dtype,
        ),
        call.per_sample_target(
            "out.scale", into.scale, return_scale or into.scale is not None, accumulator
        ),
        call.target("out.momentum", into.momentum, plan.needs_momentum, x, accumulator),
    )
    if out is not None:
        _refuse_shared(result)
    call.launch(
        STEP,
        plan.tracker_code,
        Inputs(x, None, eps, eps_neg, third, given, momentum, keys, state, divergence_gap),
        Outputs(result.x_next, result.eps_guided, result.momentum, result.state, result.scale),
        seed_bits,
        first_sample,
    )
    return result


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

    Arguments as for :func:`dng_step`.  The result has ``eps_guided``, on request ``scale``, and
    for SLD ``momentum``; the state changes with :func:`update_posterior`.
    """
    if _transforms_active():
        _refuse_transforms(
            step=step,
            eps=eps,
            eps_neg=eps_neg,
            state=state,
            eps_uncond=eps_uncond,
            eps_pos=eps_pos,
            momentum=momentum,
            out=out,
        )
    _check_events(
        "eps", eps, (("eps_neg", eps_neg), ("eps_uncond", eps_uncond), ("eps_pos", eps_pos))
    )
    call = _Call(plan, step, "eps", eps, backend)
    third = _third(plan, eps_uncond, eps_pos)
    call.per_sample("state", state, plan.tracker_code != NO_TRACKER, "rules that track a posterior")
    _check_momentum(plan, momentum, eps)
    into = _given(out)
    accumulator = torch.float64 if eps.dtype == torch.float64 else torch.float32
    result = StepResult(
        call.target("out.x_next", into.x_next, False, eps, eps.dtype),
        call.per_sample_target("out.state", into.state, False, accumulator),
        call.target("out.eps_guided", into.eps_guided, True, eps, eps.dtype),
        call.per_sample_target(
            "out.scale", into.scale, return_scale or into.scale is not None, accumulator
        ),
        call.target("out.momentum", into.momentum, plan.needs_momentum, eps, accumulator),
    )
    if out is not None:
        _refuse_shared(result)
    call.launch(
        GUIDE,
        plan.tracker_code,
        Inputs(None, None, eps, eps_neg, third, None, momentum, None, state, None),
        Outputs(None, result.eps_guided, result.momentum, None, result.scale),
        None,
        0,
    )
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
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The tracker's state at the cleaner end of a step that was taken elsewhere.

    Arguments as for :func:`dng_step`, with the x_next that the step gave; keep it in float32, for
    the update sees a difference of x and x_next.

    Returns
    -------
    Tensor, shape (B,)
    """
    if _transforms_active():
        _refuse_transforms(
            step=step,
            x=x,
            x_next=x_next,
            eps=eps,
            eps_neg=eps_neg,
            state=state,
            divergence_gap=divergence_gap,
            out=out,
        )
    _check_events("x", x, (("x_next", x_next), ("eps", eps), ("eps_neg", eps_neg)))
    call = _Call(plan, step, "x", x, backend)
    if plan.tracker_code == NO_TRACKER:
        raise ValueError(f"plan must have a rule that tracks a posterior, got {plan.rule!r}")
    call.per_sample("state", state, True, "rules that track a posterior")
    call.per_sample(
        "divergence_gap", divergence_gap, plan.needs_divergence, "trackers with divergence=True"
    )
    following = call.per_sample_target("out", out, True, state.dtype)
    assert following is not None
    call.launch(
        UPDATE,
        plan.tracker_code,
        Inputs(x, x_next, eps, eps_neg, None, None, None, None, state, divergence_gap),
        Outputs(None, None, None, following, None),
        None,
        0,
    )
    return following


def _given(out: StepResult | None) -> StepResult:
    if out is None:
        return _NOTHING
    if not isinstance(out, StepResult):
        raise TypeError(f"out must be a StepResult of tensors and None, got {type(out).__name__}")
    return out


def _refuse_shared(out: StepResult) -> None:
    """Refuse outputs of which one would be written over by another."""
    if torch.compiler.is_compiling():
        return  # its tensors have no address
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in zip(StepResult._fields, out, strict=True)
        if tensor is not None
        and tensor.numel()
        and not (isinstance(tensor, FakeTensor) or tensor.is_meta)
    ]
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"out.{name} and out.{other} must not share memory: one result would be written "
                "over the other; give a tensor of its own to each"
            )


def _third(plan: StepPlan, eps_uncond: Tensor | None, eps_pos: Tensor | None) -> Tensor | None:
    if (eps_uncond is not None) != plan.needs_uncond:
        _needed("eps_uncond", eps_uncond, plan.needs_uncond, "plans with a cfg_scale")
    if (eps_pos is not None) != plan.needs_positive:
        _needed("eps_pos", eps_pos, plan.needs_positive, "plans with PerpNeg")
    return eps_uncond if eps_pos is None else eps_pos


def _check_momentum(plan: StepPlan, momentum: Tensor | None, like: Tensor) -> None:
    if (momentum is not None) != plan.needs_momentum:
        _needed("momentum", momentum, plan.needs_momentum, "plans with SafeLatentDiffusion")
    if momentum is not None:
        if isinstance(momentum, Tensor) and momentum.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"momentum must be float32 (float64 in a float64 step), got {momentum.dtype}"
            )
        _check_events("x", like, (("momentum", momentum),))


# ---------------------------------------------------------------------- noise


def noise_keys(
    seed: int,
    batch: int,
    *,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Seed and sample index of every row, shape (batch, 2), int64: a ``seed`` on the device.

    Samples of different runs, or in any order, can share a batch by stacking rows; sample i of a
    seed is the same in any of them.
    """
    bits = _signed(_checks.integer("seed", seed, 0, 2**64 - 1))
    _checks.integer("first_sample", first_sample, 0, 2**62 - 1)
    return _keys(bits, _checks.integer("batch", batch, 0), first_sample, device)


def standard_normal(
    seed: int | Tensor,
    shape: tuple[int, ...] | torch.Size,
    *,
    step: int | None = None,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The standard normals of a step, or, by default, those of x_T.

    Parameters
    ----------
    seed : int or Tensor of shape (B, 2), int64
        As for :func:`dng_step`.
    shape : tuple of int
        (B, ...).
    step : int, optional
        Below 2^16: the noise that :func:`dng_step` makes there.  None: the noise of x_T.
    first_sample : int
        Sample index of the first row, with an integer seed.

    Returns
    -------
    Tensor, of that shape, in C order
    """
    if _transforms_active():
        _refuse_transforms(seed=seed)
    shape = tuple(_checks.integer("shape", length, 0) for length in shape)
    if not shape:
        raise ValueError("shape must be (batch, ...), got ()")
    if isinstance(seed, Tensor):
        _check_keys(seed, shape[0], seed.device if device is None else torch.device(device))
        keys = seed
    else:
        keys = noise_keys(seed, shape[0], first_sample=first_sample, device=device)
    if step is None:
        step, stream = 0, normal.INITIAL_STREAM
    else:
        step, stream = _checks.integer("step", step, 0, 2**16 - 1), normal.STEP_STREAM
    elements = torch.Size(shape[1:]).numel()
    if elements > normal.LARGEST_SAMPLE:
        raise ValueError(f"shape must have at most 2**34 elements a sample, got {shape}")
    return normal.normals(keys, elements, step, stream).contiguous().view(shape).to(dtype)
