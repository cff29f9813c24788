"""Checks of all arguments of the public calls; each is made once and names the argument."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from dng_kernels import normal
from dng_kernels.layout import batch_stride, empty_like, is_channels_last
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import StepPlan
from dng_math import checks

Backend = Literal["auto", "triton", "cpu", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "cpu", "reference")
REDUCED = {torch.float32, torch.float16, torch.bfloat16}
DTYPES = REDUCED | {torch.float64}
NEEDED = ("eps", "eps_neg", "x_next")  # of the tensors like x, those that must not be None
HAS_TRITON = find_spec("triton") is not None

# ---------------------------------------------------------------------- transforms of torch


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


def transforms_active() -> bool:
    """Whether a transform of torch.func or forward_ad is active; cheap enough for every call."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_transforms(**arguments: object) -> None:
    """Refuse forward derivatives and vmap, which the operator's outputs could not carry."""
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


# ---------------------------------------------------------------------- tensors


def _mismatch(name: str, tensor: object, like_name: str, like: Tensor) -> Exception:
    """The error for a tensor that does not match another one."""
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name} must be a tensor, got {tensor!r}")
    if tensor.layout is not torch.strided:
        return TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")
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


def check_events(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor has the shape, device and precision of the first."""
    if not isinstance(like, Tensor) or like.ndim < 1 or like.dtype not in DTYPES:
        got = f"{like.dtype} of shape {tuple(like.shape)}" if isinstance(like, Tensor) else like
        raise TypeError(
            f"{like_name} must be a floating-point tensor of shape (batch, ...), got {got}"
        )
    shape, device, dtype = like.shape, like.device, like.dtype
    with_grad = torch.is_grad_enabled()
    if (with_grad and like.requires_grad) or like.layout is not torch.strided:
        raise _mismatch(like_name, like, like_name, like)
    for name, tensor in others.items():
        if tensor is None and name not in NEEDED:
            continue
        if not (
            isinstance(tensor, Tensor)
            and tensor.layout is torch.strided
            and tensor.shape == shape
            and tensor.device == device
            and not (with_grad and tensor.requires_grad)
            and (tensor.dtype is dtype or {dtype, tensor.dtype} <= REDUCED)
        ):
            raise _mismatch(name, tensor, like_name, like)


def _check_per_sample(name: str, tensor: object, like: Tensor) -> None:
    """Check for one float32 number per sample (float64 is allowed if ``like`` is float64)."""
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


def check_keys(keys: Tensor, batch: int, device: torch.device) -> None:
    """Check the keys: seed and sample index of every sample, int64, (B, 2)."""
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


def _needed(name: str, value: object, needed: bool, why: str) -> None:
    """Raise unless an argument is given exactly when the plan reads it."""
    if (value is not None) != needed:
        if needed:
            raise ValueError(f"{name} must be given: this plan needs it, as do {why}")
        raise ValueError(f"{name} must be None: nothing in this plan reads it, only {why} do")


# ---------------------------------------------------------------------- plain arguments


def seed_bits(seed: object) -> int:
    """Check a 64-bit seed and return the int64 with the same bits."""
    if type(seed) is not int or not 0 <= seed < 2**64:
        seed = checks.integer("seed", seed, 0, 2**64 - 1)
    return seed - 2**64 if seed >= 2**63 else seed


def check_first_sample(first_sample: object) -> None:
    """Check a sample index."""
    if type(first_sample) is not int or not 0 <= first_sample < 2**62:
        checks.integer("first_sample", first_sample, 0, 2**62 - 1)


def check_dtype(name: str, dtype: object) -> None:
    """Check that a dtype is one of the floating-point types that a step supports."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(
            f"{name} must be torch.float32, float64, float16 or bfloat16, got {dtype!r}"
        )


def shape_of(shape: object) -> tuple[int, ...]:
    """Check a shape (batch, ...) and return it as integers."""
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple of integers (batch, ...), got {shape!r}")
    if not shape:
        raise ValueError(f"shape must be (batch, ...), got {shape!r}")
    return tuple(checks.integer("shape", length, 0) for length in shape)


# ---------------------------------------------------------------------- a call


def in_order(
    plan: StepPlan, eps: Tensor, eps_uncond: Tensor | None, eps_pos: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The predictions that the fields eps and eps_third of Inputs hold."""
    if plan.from_uncond and eps_uncond is not None:
        return eps_uncond, eps
    return eps, eps_uncond if eps_pos is None else eps_pos


def names_of(plan: StepPlan) -> dict[str, str]:
    """What the fields of Inputs are called by those who give them."""
    names = {name: name for name in Inputs._fields} | {"keys": "seed"}
    third = "eps_pos" if plan.needs_positive else "eps_uncond"
    eps, third = ("eps_uncond", "eps") if plan.from_uncond else ("eps", third)
    return names | {"eps": eps, "eps_third": third}


class Call:
    """Checks shared by the three operations, and their results.

    Attributes
    ----------
    plan : StepPlan
    like : Tensor, shape (B, ...)
        The first tensor of the call, whose name is ``name``.
    index : Tensor, shape (), int64
        The step, on the device.
    engine : {"triton", "cpu", "reference"}
        The implementation that runs the call.
    """

    __slots__ = ("engine", "index", "like", "name", "plan")

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
        self.engine = self._engine(backend)

    def _index(self, step: int | Tensor) -> Tensor:
        if isinstance(step, Tensor):
            if step.dtype != torch.int64 or step.ndim != 0 or step.device != self.like.device:
                raise ValueError(
                    f"step must be an int or a 0-dimensional int64 tensor on {self.like.device}, "
                    f"got {step.dtype} of shape {tuple(step.shape)} on {step.device}"
                )
            # On a GPU its value is not known here, and in a compiled graph it is not known yet.
            if step.device.type == "cpu" and not torch.compiler.is_compiling():
                checks.integer("step", int(step), 0, len(self.plan) - 1)
            return step
        if type(step) is not int or not 0 <= step < len(self.plan):
            step = checks.integer("step", step, 0, len(self.plan) - 1)
        return self.plan.indices[step]

    def _engine(self, backend: Backend) -> Backend:
        if backend not in BACKENDS:
            checks.choice("backend", backend, BACKENDS)
        double, kind = self.like.dtype == torch.float64, self.like.device.type
        if backend == "triton" and (double or not HAS_TRITON):
            reason = "it computes in float32" if double else "Triton is not installed"
            raise ValueError(f"backend must not be 'triton': {reason}")
        if backend == "cpu" and kind != "cpu":
            raise ValueError(f"backend must not be 'cpu': {self.name} is on {self.like.device}")
        if backend != "auto":
            return backend
        if kind == "cuda" and HAS_TRITON and not double:
            return "triton"
        # A compiler fuses the reference; an exported program holds the operator.
        traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        return "cpu" if kind == "cpu" and not traced else "reference"

    def state(self, state: Tensor | None) -> None:
        """Check a tracker's state."""
        needed = self.plan.has_state
        if (state is not None) != needed:
            _needed("state", state, needed, "rules that track a posterior, and CRG")
        if state is not None:
            _check_per_sample("state", state, self.like)

    def divergence(self, divergence_gap: Tensor | None) -> None:
        """Check the divergence of the scores."""
        needed = self.plan.needs_divergence
        if (divergence_gap is not None) != needed:
            _needed("divergence_gap", divergence_gap, needed, "trackers with divergence=True")
        if divergence_gap is not None:
            _check_per_sample("divergence_gap", divergence_gap, self.like)

    def predictions(
        self, eps: Tensor, eps_uncond: Tensor | None, eps_pos: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the negative is measured from, and the third prediction if the plan reads one."""
        plan = self.plan
        if (eps_uncond is not None) != plan.needs_uncond:
            _needed("eps_uncond", eps_uncond, plan.needs_uncond, "plans with a cfg_scale")
        if (eps_pos is not None) != plan.needs_positive:
            _needed("eps_pos", eps_pos, plan.needs_positive, "plans with PerpNeg")
        return in_order(plan, eps, eps_uncond, eps_pos)

    def momentum(self, momentum: Tensor | None) -> None:
        """Check SLD's momentum."""
        needed = self.plan.needs_momentum
        if (momentum is not None) != needed:
            _needed("momentum", momentum, needed, "plans with SafeLatentDiffusion")
        if momentum is not None:
            if isinstance(momentum, Tensor) and momentum.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(
                    f"momentum must be float32 (float64 in a float64 step), got {momentum.dtype}"
                )
            check_events(self.name, self.like, momentum=momentum)

    def randomness(
        self, step: int | Tensor, noise: Tensor | None, seed: int | Tensor | None, first_sample: int
    ) -> tuple[Tensor | None, Tensor | None, int | None]:
        """Noise, keys and seed: at most one of them, and exactly one if the step adds noise."""
        plan, like, bits = self.plan, self.like, None
        if noise is not None and seed is not None:
            raise ValueError("noise and seed must not both be given")
        check_first_sample(first_sample)
        if isinstance(seed, Tensor):
            check_keys(seed, like.shape[0], like.device)
        elif seed is not None:
            bits = seed_bits(seed)
        if not (plan._ever_noisy if isinstance(step, Tensor) else plan.noisy[step]):
            return None, None, None
        if noise is None and seed is None:
            raise ValueError(
                "noise or seed must be given: the step adds noise (its variance is not 0)"
            )
        if seed is not None and like.numel() > normal.LARGEST_SAMPLE * like.shape[0] > 0:
            raise ValueError(
                f"{self.name} must have at most 2**34 elements a sample for noise made from a seed"
            )
        return noise, seed if isinstance(seed, Tensor) else None, bits

    def results(
        self,
        out: StepResult | None,
        *,
        x_next: torch.dtype | None = None,
        state: torch.dtype | None = None,
        eps_guided: torch.dtype | None = None,
        scale: torch.dtype | None = None,
        momentum: torch.dtype | None = None,
        log_weight: torch.dtype | None = None,
        return_guided: bool = True,
        return_scale: bool = True,
    ) -> StepResult:
        """The tensors to write the results into: those of ``out``, and new ones.

        Parameters
        ----------
        out : StepResult, optional
            Tensors given by the caller.
        x_next, state, eps_guided, scale, momentum, log_weight : torch.dtype, optional
            The dtype of each result that this call has.
        return_guided, return_scale : bool
            Whether to allocate these results if ``out`` has no tensor for them.
        """
        if type(return_guided) is not bool:
            checks.boolean("return_guided", return_guided)
        if type(return_scale) is not bool:
            checks.boolean("return_scale", return_scale)
        given = _NOTHING if out is None else out
        if not isinstance(given, StepResult):
            raise TypeError(
                f"out must be a StepResult of tensors and None, got {type(out).__name__}"
            )
        return StepResult(
            self._event("out.x_next", given.x_next, x_next),
            self._per_sample("out.state", given.state, state),
            self._event("out.eps_guided", given.eps_guided, eps_guided, return_guided),
            self._per_sample("out.scale", given.scale, scale, return_scale),
            self._event("out.momentum", given.momentum, momentum),
            self._per_sample("out.log_weight", given.log_weight, log_weight),
        )

    def _event(
        self, name: str, given: Tensor | None, dtype: torch.dtype | None, asked: bool = True
    ) -> Tensor | None:
        """The given or a new tensor for an output like the first tensor; None if not wanted."""
        like = self.like
        if given is None:
            return empty_like(like, dtype) if asked and dtype is not None else None
        _check_target(name, given, dtype)
        if given.dtype is not dtype or given.shape != like.shape or given.device != like.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(like.shape)} on {like.device}, "
                f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}"
            )
        if (
            not (given.is_contiguous() and like.is_contiguous())
            and given.numel()
            and (batch_stride(given, is_channels_last(like)) != given[:1].numel())
        ):
            raise ValueError(
                f"{name} must lie in memory as {self.name} does, without gaps; got strides "
                f"{given.stride()}"
            )
        return given

    def _per_sample(
        self, name: str, given: Tensor | None, dtype: torch.dtype | None, asked: bool = True
    ) -> Tensor | None:
        """The given or a new tensor for one number per sample; None if not wanted."""
        like = self.like
        if given is None:
            if dtype is None or not asked:
                return None
            return torch.empty(like.shape[0], dtype=dtype, device=like.device)
        _check_target(name, given, dtype)
        _check_per_sample(name, given, like)
        return given


_NOTHING = StepResult()


def _check_target(name: str, given: object, dtype: torch.dtype | None) -> None:
    """Check that the call has this result and that the tensor given for it is writable."""
    if dtype is None:
        raise ValueError(f"{name} must be None: this call does not return it")
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {given!r}")
    if given.requires_grad:
        raise ValueError(f"{name} requires grad, and is written into: give a detached tensor")


# ---------------------------------------------------------------------- memory

_EVENTS = frozenset(Inputs._fields[:7])
# Inputs that an output may be, place by place: every engine has read them before it writes there.
_MAY_BE: dict[str, frozenset[str]] = {
    "x_next": _EVENTS,
    "state": frozenset({"state"}),
    "eps_guided": _EVENTS,
    "scale": frozenset(),
    "momentum": frozenset({"momentum"}),
    "log_weight": frozenset(),
}


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that begin at one address are the same, place by place."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True) if a.shape == b.shape else ()
    return (
        a.shape == b.shape
        and a.element_size() == b.element_size()
        and all(n == 1 or own == other for n, own, other in strides)
    )


class Memory:
    """Which outputs of a call share memory with other tensors of it, for tensors of one kind.

    Made from tensors with memory; what depends on their shapes and strides is computed once, so
    that a check costs about as much as reading their addresses.

    Parameters
    ----------
    inputs, outputs : Inputs, StepResult
    names : dict of str to str
        What the fields of the inputs are called.
    """

    __slots__ = ("_names", "_read", "_spans", "_written")

    def __init__(self, inputs: Inputs, outputs: StepResult, names: dict[str, str]) -> None:
        self._read = [i for i, tensor in enumerate(inputs) if tensor is not None and tensor.numel()]
        read = [tensor for i in self._read if (tensor := inputs[i]) is not None]
        self._spans = [_span(tensor) for tensor in read]
        self._names = [names[name] for name in Inputs._fields]
        self._written: list[tuple[int, int, list[bool]]] = []
        for i, (name, tensor) in enumerate(zip(StepResult._fields, outputs, strict=True)):
            if tensor is not None and tensor.numel():
                may_be = [
                    Inputs._fields[j] in _MAY_BE[name] and _alike(tensor, other)
                    for j, other in zip(self._read, read, strict=True)
                ]
                self._written.append((i, _span(tensor), may_be))

    def check(self, inputs: Inputs, outputs: StepResult) -> None:
        """Raise unless each output has memory of its own, or is an input that it may be."""
        starts = [inputs[i].data_ptr() for i in self._read]  # type: ignore[union-attr]
        spans = self._spans
        written: list[tuple[int, int, int]] = []
        for i, span, may_be in self._written:
            tensor = outputs[i]
            if tensor is None:
                continue
            first = tensor.data_ptr()
            end = first + span
            for k, start in enumerate(starts):
                if start < end and first < start + spans[k] and (start != first or not may_be[k]):
                    raise self._over_input(i, self._names[self._read[k]], may_be[k])
            for j, start, other_end in written:
                if start < end and first < other_end:
                    name, other = (f"out.{StepResult._fields[n]}" for n in (j, i))
                    raise ValueError(
                        f"{name} and {other} must not share memory: one result would be written "
                        "over the other; give a tensor of its own to each"
                    )
            written.append((i, first, end))

    def _over_input(self, output: int, name: str, may_be: bool) -> ValueError:
        itself = f"be {name} place by place, or " if may_be else ""
        return ValueError(
            f"out.{StepResult._fields[output]} must {itself}lie outside the memory that {name} "
            f"spans: it would be written while {name} is still read; give it a tensor of its own"
        )


def memory_of(plan: StepPlan, inputs: Inputs, outputs: StepResult) -> Memory | None:
    """The memory of a call; None where tensors have no address: compiling, or fake tensors."""
    if torch.compiler.is_compiling() or any(
        isinstance(tensor, FakeTensor) or (tensor is not None and tensor.is_meta)
        for tensor in (*inputs, *outputs)
    ):
        return None
    return Memory(inputs, outputs, names_of(plan))


def refuse_shared(plan: StepPlan, inputs: Inputs, outputs: StepResult) -> None:
    """Refuse outputs that overlap in memory with another tensor of the call."""
    memory = memory_of(plan, inputs, outputs)
    if memory is not None:
        memory.check(inputs, outputs)
