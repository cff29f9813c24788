"""Guided sampling with a pair of networks: any rule of dng_math, through the fused step.

A denoiser is a network or any callable ``(x, t) -> prediction``; the base one knows everything,
the forgetful one only what is to be avoided.  All that is random about image i is a function of
(seed, i), and networks are always called with whole batches that start at a multiple of
``batch_size``: image i of a seed has the same bits however many images are made, by how many
processes, and after any interruption.  Another batch size gives it up to the rounding of the
networks, which may choose other algorithms for another shape.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from dng_kernels import StepPlan, StepResult, dng_step, standard_normal, update_posterior
from dng_kernels.plan import PREDICTION_TYPES, PredictionType
from dng_math import _checks
from dng_math.guidance import (
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    Rule,
    Unguided,
    innermost,
)
from dng_math.posterior import LogOddsTracker, PaperTracker
from dng_math.schedules import NoiseSchedule, Sampler
from dng_models.progress import Progress
from dng_models.threads import torch_threads, work_of

Denoiser = Callable[[Tensor, Tensor], Any]
Evaluation = Literal["auto", "separate", "stacked"]
EVALUATIONS: tuple[Evaluation, ...] = ("auto", "separate", "stacked")
RECORDS = ("log_posterior", "scale", "x", "x0")


class NoiseSource(Protocol):
    """Where the random numbers come from, if not from a seed."""

    def __call__(self, step: int | None, first_image: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals of a step, or with None those of x_T, for images first_image + i."""
        ...


@dataclass(frozen=True, eq=False)
class Labelled:
    """A class-conditional network at one label: a denoiser.

    Denoisers of one network are evaluated in one batch.

    Parameters
    ----------
    net : callable
        ``net(x, t, class_labels=labels)``, such as a UNet2DModel with class embeddings.
    label : int
        The label of every image; for no label, the index that the network keeps for it.
    """

    net: Callable[..., Any]
    label: int

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        """Prediction, of the shape of x."""
        return self.net(x, t, class_labels=torch.full_like(t, self.label))


@dataclass(frozen=True, eq=False)
class Samples:
    """Images, and what was recorded on the way; on the CPU.

    Attributes
    ----------
    images : Tensor, shape (N, ...)
        x at the clean end; not clamped.
    log_posterior : Tensor, shape (N,) or (M, N), or None
        Of what is unwanted, as tracked, at the clean end; for FBG the log ratio L.  M rows if a
        sequence of forgetful denoisers was given.
    time : ndarray, shape (S + 1,)
        Diffusion time of every state, from 1 to 0.
    records : dict of str to Tensor
        ``log_posterior`` (S + 1, N) or (S + 1, M, N); ``scale`` (S, N); ``x`` (S + 1, N, ...);
        ``x0`` (S, N, ...), what the guided prediction takes the image to be.
    """

    images: Tensor
    log_posterior: Tensor | None
    time: NDArray[np.float64]
    records: dict[str, Tensor]


def timesteps(schedule: NoiseSchedule, steps: int | None = None) -> list[int]:
    """The training timestep 0 ... T - 1 of every step of a respaced run, noisiest first.

    Index k of the schedule, its k-th noisy time, is timestep k - 1 of the networks.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
    kept = schedule if steps is None else schedule.respace(steps)
    index = np.searchsorted(schedule.time, kept.time[:0:-1] - 0.5 / len(schedule))
    return [int(i) - 1 for i in index]


def sample(
    base: Denoiser,
    forgetful: Denoiser | Sequence[Denoiser] | None,
    guidance: Rule,
    *,
    shape: tuple[int, ...],
    num_images: int,
    schedule: NoiseSchedule | None = None,
    steps: int | None = None,
    sampler: Sampler | None = None,
    prediction: PredictionType = "epsilon",
    clip: float | None = None,
    positive: Denoiser | None = None,
    seed: int = 0,
    noise: NoiseSource | None = None,
    first_image: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    evaluation: Evaluation = "auto",
    record: Collection[str] = (),
    progress: str | None = None,
) -> Samples:
    """Images of the base denoiser that avoid what the forgetful one draws.

    Parameters
    ----------
    base, forgetful : callable
        UNet2DModels, other networks, or callables ``(x, t) -> prediction`` with x (B, ...) and t
        (B,) int64, the training timestep; an output object with ``.sample`` is unwrapped.
        ``forgetful`` may be a sequence of several, each with its own posterior, for DNG; and None
        for rules that do not look at it.
    guidance : Rule
        From :mod:`dng_math.guidance`; posteriors are tracked, with a given prior.
    shape : tuple of int
        Of one image, such as (channels, height, width).
    num_images : int
        Images ``first_image`` to ``first_image + num_images - 1`` of the seed are returned.
    schedule : NoiseSchedule, optional
        That the networks were trained on; default DDPM's 1000 linear betas.
    steps : int, optional
        Steps of the run, evenly spaced in the schedule; default all.
    sampler : Sampler, optional
        Default DDPM with the small variance.
    prediction : {"epsilon", "v_prediction", "sample", "flow"}
        What the denoisers return.
    clip : float, optional
        Bound of predicted |x0|; None, as in the paper, clips nothing.
    positive : callable, optional
        For rules that lead somewhere: CFG, FBG and Perp-Neg.
    seed : int
        In [0, 2^64).
    noise : NoiseSource, optional
        Random numbers to use instead of those of the seed.
    batch_size : int
        Images that the networks see at once; the last batch is filled up, so that a count that it
        does not divide costs a whole batch more.
    device : torch.device or str, optional
        Default: that of the base denoiser's parameters, or the CPU.
    dtype : torch.dtype
        Of x, float32 or float64.
    autocast : torch.dtype, optional
        bfloat16 or float16 for the networks; x and the posteriors keep their precision.
    evaluation : {"auto", "separate", "stacked"}
        Two networks of one architecture can be one with stacked weights, evaluated at once
        (``torch.func``): that is "auto" on a GPU, where small networks leave it idle; on a CPU it
        is slower than one after the other.
    record : collection of {"log_posterior", "scale", "x", "x0"}
        What to keep of every step.
    progress : str, optional
        Name on a progress bar (in a log: on a line now and then); None shows none.

    Returns
    -------
    Samples

    Notes
    -----
    Small networks run on one of torch's threads on a CPU
    (:func:`~dng_models.threads.torch_threads` says which are small).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    schedule = NoiseSchedule.linear() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
    num_images = _checks.integer("num_images", num_images, 1)
    first_image = _checks.integer("first_image", first_image, 0)
    batch_size = _checks.integer("batch_size", batch_size, 1)
    _checks.choice("prediction", prediction, PREDICTION_TYPES)
    _checks.choice("evaluation", evaluation, EVALUATIONS)
    if isinstance(record, str) or not isinstance(record, Collection):
        raise TypeError(f"record must be a collection of {', '.join(RECORDS)}, got {record!r}")
    for name in record:
        _checks.choice("record", name, RECORDS)
    shape = _shape(shape)
    if isinstance(sampler, type):
        raise TypeError(f"sampler must be a sampler such as DDPM(), got the class {sampler!r}")
    if noise is not None and not callable(noise):
        raise TypeError(f"noise must be a callable (step, first_image, shape), got {noise!r}")
    if progress is not None and not isinstance(progress, str):
        raise TypeError(f"progress must be a name to show or None, got {progress!r}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
    respaced = schedule if steps is None else schedule.respace(steps)
    coefficients = respaced.coefficients(sampler)
    if isinstance(guidance, type) or not hasattr(guidance, "guide"):
        raise TypeError(f"guidance must be a rule of dng_math.guidance, got {guidance!r}")
    plan = StepPlan(
        coefficients,
        guidance,
        prediction=prediction,
        clip=clip,
        device=device_of(base) if device is None else device,
        _warn=False,
    )
    device = plan.device
    _check_tracker(plan)
    roles = _denoisers(guidance, base, forgetful, positive)
    denoisers = list(roles.values())
    chain = _Chain(
        plan=plan,
        timesteps=timesteps(schedule, steps),
        predict=Predictor(denoisers, device, evaluation, autocast, names=list(roles)),
        concepts=len(forgetful) if isinstance(forgetful, Sequence) else None,
        record=frozenset(record),
    )

    first_batch = first_image // batch_size
    last_batch = (first_image + num_images - 1) // batch_size
    batches = range(first_batch, last_batch + 1)
    parts = []
    total = len(batches) * len(plan)
    nets = [each.net if isinstance(each, Labelled) else each for each in denoisers]
    work = work_of((batch_size, *shape), nets)
    with (
        evaluating(denoisers),
        nullcontext() if device.type != "cpu" else torch_threads(work=work),
        Progress(total, progress, shown=progress is not None) as bar,
    ):
        for batch in batches:
            start = batch * batch_size
            draw = _Draw(seed, noise, start, (batch_size, *shape), device, dtype)
            part = chain.run(draw, float(respaced.sigma[-1]), bar)
            kept = slice(
                max(first_image - start, 0), min(first_image + num_images - start, batch_size)
            )
            parts.append({name: _images(name, values, kept) for name, values in part.items()})
    joined = {
        name: torch.cat([part[name] for part in parts], dim=_image_axis(name, parts[0][name]))
        for name in parts[0]
    }
    images = joined.pop("images")
    broken = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    if broken:
        warnings.warn(
            f"{broken} of {num_images} images are not finite: the guidance scale is too large for "
            f"these networks ({guidance!r})",
            stacklevel=2,
        )
    log_posterior = joined.pop("final", None)
    time = np.append(coefficients.time, 0.0)
    return Samples(images, log_posterior, time, joined)


def _image_axis(name: str, values: Tensor) -> int:
    """Which axis of an output counts images."""
    if name == "images":
        return 0
    return values.ndim - 1 if name in ("log_posterior", "scale", "final") else 1


def _images(name: str, values: Tensor, kept: slice) -> Tensor:
    return values.movedim(_image_axis(name, values), 0)[kept].movedim(0, _image_axis(name, values))


def _shape(shape: Any) -> tuple[int, ...]:
    """Of one image."""
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) == 0:
        raise TypeError(
            "shape must be a tuple of int, of one image, such as (channels, height, width), got "
            f"{shape!r}"
        )
    return tuple(_checks.integer("shape", length, 1) for length in shape)


def device_of(denoiser: object) -> torch.device:
    """Where a network's parameters are; the CPU for what has none."""
    while isinstance(denoiser, Labelled):
        denoiser = denoiser.net
    if isinstance(denoiser, nn.Module):
        return next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    return torch.device("cpu")


def _check_tracker(plan: StepPlan) -> None:
    if plan.needs_divergence:
        raise ValueError(
            "guidance must have a tracker with divergence=False: networks do not give the "
            f"divergence of their scores; got {plan.rule!r}"
        )
    eta = plan.coefficients.eta[:-1]  # the last step is not tracked
    if plan.tracker is not None and np.any(eta < 1 - 1e-6):
        warnings.warn(
            f"the sampler's eta is {eta.min():g} where the tracker assumes 1: the tracked "
            "posterior will be wrong however many steps are taken; use DDPM, or DDIM with eta=1",
            stacklevel=3,
        )


def _denoisers(
    guidance: Rule,
    base: Denoiser,
    forgetful: Denoiser | Sequence[Denoiser] | None,
    positive: Denoiser | None,
) -> dict[str, Denoiser]:
    """In the order of a step's arguments: base, what is compared with it, Perp-Neg's positive."""
    rule = innermost(guidance)
    roles: dict[str, object] = {"base": base}
    if isinstance(rule, Unguided | ClassifierFreeGuidance | FeedbackGuidance):
        pass
    elif not isinstance(forgetful, Sequence):
        roles["forgetful"] = forgetful
    elif len(forgetful) == 0:
        raise ValueError(f"forgetful must not be an empty sequence, got {forgetful!r}")
    elif not isinstance(rule, DynamicNegativeGuidance):
        raise ValueError(
            f"forgetful must be one denoiser for {rule!r}, got {len(forgetful)}: only DNG gives "
            "each its own posterior"
        )
    else:
        roles |= {f"forgetful[{i}]": denoiser for i, denoiser in enumerate(forgetful)}
    if rule.needs_positive:
        roles["positive"] = positive
    for name, denoiser in roles.items():
        if not callable(denoiser):
            raise TypeError(
                f"{name} must be a network or a callable (x, t) for {rule!r}, got {denoiser!r}"
            )
    return roles  # type: ignore[return-value]


# ---------------------------------------------------------------------- the predictions


def _unwrapped(output: Any) -> Tensor:
    return getattr(output, "sample", output) if not isinstance(output, Tensor) else output


@contextmanager
def evaluating(denoisers: Sequence[Denoiser]) -> Iterator[None]:
    """Networks without dropout, and left as they were."""
    nets = [d.net if isinstance(d, Labelled) else d for d in denoisers]
    training = [net for net in nets if isinstance(net, nn.Module) and net.training]
    for net in training:
        net.eval()
    try:
        yield
    finally:
        for net in training:
            net.train()


class Predictor:
    """All predictions at (x, t), in as few calls as the denoisers allow.

    Parameters
    ----------
    denoisers : sequence of callable
        As for :func:`sample`.
    device : torch.device
        Where they are.
    evaluation, autocast
        As for :func:`sample`.
    names : sequence of str, optional
        Of the denoisers, for messages; default "denoisers[0]" and so on.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        device: torch.device,
        evaluation: Evaluation = "auto",
        autocast: torch.dtype | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.denoisers = denoisers
        self.names = names or [f"denoisers[{i}]" for i in range(len(denoisers))]
        self.device = device
        self.autocast = autocast
        self.stacked: Callable[[Tensor, Tensor], Tensor] | None = None
        wanted = evaluation == "stacked" or (evaluation == "auto" and device.type == "cuda")
        if wanted and len(denoisers) > 1:
            obstacle = _unlike(denoisers)
            if obstacle is None:
                self.stacked = _stack(denoisers)
            elif evaluation == "stacked":
                raise ValueError(f"evaluation='stacked' needs networks of one shape: {obstacle}")

    def __call__(self, x: Tensor, t: int | Tensor) -> list[Tensor]:
        """One prediction of the shape of x from each denoiser.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
        t : int or Tensor, shape (B,)
            A training timestep, or the time of every image as networks are to be given it.
        """
        if isinstance(t, Tensor):
            times = t
        else:
            times = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        context = (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self.device.type, dtype=self.autocast)
        )
        with context:
            predictions = self._predictions(x, times)
        for name, prediction in zip(self.names, predictions, strict=True):
            _check_prediction(name, prediction, x)
        # Sixteen bits are read as they are beside a float32 x.
        return [p.to(x.dtype) if x.dtype == torch.float64 else p for p in predictions]

    def _predictions(self, x: Tensor, times: Tensor) -> list[Tensor]:
        if self.stacked is not None:
            return list(self.stacked(x, times))
        found: dict[int, Tensor] = {}
        for i, denoiser in enumerate(self.denoisers):
            if i in found:
                continue
            if not isinstance(denoiser, Labelled):
                found[i] = _unwrapped(denoiser(x, times))
                continue
            mates = {
                j: other
                for j, other in enumerate(self.denoisers)
                if isinstance(other, Labelled) and other.net is denoiser.net
            }
            labels = torch.cat([torch.full_like(times, mate.label) for mate in mates.values()])
            output = denoiser.net(
                x.repeat(len(mates), *[1] * (x.ndim - 1)),
                times.repeat(len(mates)),
                class_labels=labels,
            )
            found |= dict(zip(mates, _unwrapped(output).chunk(len(mates)), strict=True))
        return [found[i] for i in range(len(self.denoisers))]


def _check_prediction(name: str, prediction: Any, x: Tensor) -> None:
    """What a denoiser returned is a prediction for x."""
    wanted = f"predictions of shape {tuple(x.shape)}, tensors of floating-point numbers"
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"{name} must return {wanted} or outputs with one as their sample, got a "
            f"{type(prediction).__name__}"
        )
    if not prediction.is_floating_point():
        raise TypeError(f"{name} must return {wanted}, got {prediction.dtype}")
    if prediction.shape != x.shape:
        raise ValueError(f"{name} must return {wanted}, got shape {tuple(prediction.shape)}")


def _unlike(denoisers: Sequence[Denoiser]) -> str | None:
    """Why the denoisers cannot share one stacked network; None if they can."""
    first = denoisers[0]
    for denoiser in denoisers:
        if not isinstance(denoiser, nn.Module) or not isinstance(first, nn.Module):
            return f"{type(denoiser).__name__} is not a torch module"
        if type(denoiser) is not type(first):
            return f"{type(first).__name__} and {type(denoiser).__name__}"
        settings = [
            {k: v for k, v in dict(getattr(net, "config", {})).items() if not k.startswith("_")}
            for net in (first, denoiser)
        ]
        if settings[0] != settings[1]:
            differ = sorted(k for k in settings[0] if settings[0][k] != settings[1].get(k))
            return f"their configurations differ in {', '.join(differ)}"
        shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (first, denoiser)]
        if shapes[0] != shapes[1]:
            return "their parameters have different shapes"
    return None


def _stack(denoisers: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    parameters, buffers = stack_module_state(list(denoisers))
    skeleton = copy.deepcopy(denoisers[0]).to("meta")

    def one(weights: dict[str, Tensor], kept: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return _unwrapped(functional_call(skeleton, (weights, kept), (x, t)))

    every = torch.vmap(one, in_dims=(0, 0, None, None))
    return lambda x, t: every(parameters, buffers, x, t)


# ---------------------------------------------------------------------- the chain


@dataclass(frozen=True, eq=False)
class _Draw:
    """The random numbers of one batch."""

    seed: int
    source: NoiseSource | None
    first_image: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def initial(self) -> Tensor:
        if self.source is not None:
            return self._given(None)
        return standard_normal(
            self.seed,
            self.shape,
            first_sample=self.first_image,
            device=self.device,
            dtype=self.dtype,
        )

    def at(self, step: int, noisy: bool) -> dict[str, Any]:
        """What a step takes for its noise."""
        if not noisy:
            return {}
        if self.source is not None:
            return {"noise": self._given(step)}
        return {"seed": self.seed, "first_sample": self.first_image}

    def _given(self, step: int | None) -> Tensor:
        assert self.source is not None
        given = self.source(step, self.first_image, self.shape)
        if not isinstance(given, Tensor) or given.shape != self.shape:
            got = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
            raise ValueError(f"noise must return a tensor of shape {self.shape}, got {got}")
        return given.to(self.device, self.dtype)


@dataclass(frozen=True, eq=False)
class _Chain:
    """Everything about a run but its random numbers."""

    plan: StepPlan
    timesteps: list[int]
    predict: Predictor
    concepts: int | None
    record: frozenset[str]

    @torch.no_grad()
    def run(self, draw: _Draw, noisiest: float, bar: Progress) -> dict[str, Tensor]:
        """One batch: ``images``, ``final`` log posteriors, and the records."""
        plan = self.plan
        c = plan.coefficients
        x = noisiest * draw.initial()
        momentum = plan.init_momentum(x)
        state = plan.init_state(len(x), x.dtype)
        if state is not None and self.concepts is not None:
            state = state.expand(self.concepts, -1).contiguous()
        rows: dict[str, list[Tensor]] = {name: [] for name in self.record}

        def keep(name: str, values: Tensor | None) -> None:
            if name in rows and values is not None:
                rows[name].append(values.cpu())

        for step, t in enumerate(self.timesteps):
            keep("x", x)
            keep("log_posterior", None if state is None else plan.log_posterior(state))
            eps, *others = self.predict(x, t)
            noise = draw.at(step, plan.noisy[step])
            taken, state = self._step(step, x, eps, others, state, momentum, noise)
            keep("scale", taken.scale)
            if "x0" in rows:
                assert taken.eps_guided is not None
                keep("x0", _x0(plan, step, x, taken.eps_guided))
            assert taken.x_next is not None
            x, momentum = taken.x_next, taken.momentum
            bar.update()
        assert len(self.timesteps) == len(c)
        keep("x", x)
        final = None if state is None else plan.log_posterior(state)
        keep("log_posterior", final)
        out = {name: torch.stack(values) for name, values in rows.items() if values}
        out["images"] = x.float().cpu()
        if final is not None:
            out["final"] = final.cpu()
        return out

    def _step(
        self,
        step: int,
        x: Tensor,
        eps: Tensor,
        others: list[Tensor],
        state: Tensor | None,
        momentum: Tensor | None,
        noise: dict[str, Any],
    ) -> tuple[StepResult, Tensor | None]:
        """One step, and the state after it."""
        plan = self.plan
        if self.concepts is None or state is None:
            given = dict(zip(("eps_neg", "eps_pos"), others, strict=False))
            taken = dng_step(
                plan,
                step,
                x,
                eps,
                given.get("eps_neg", eps),
                state,
                eps_pos=given.get("eps_pos"),
                momentum=momentum,
                return_scale="scale" in self.record,
                return_guided="x0" in self.record,
                **noise,
            )
            return taken, taken.state
        # Guidance by several concepts is guidance by their union, whose prediction is the mean of
        # theirs weighted with the posteriors: g sum_k p_k (eps_k - eps) / (1 - sum_j p_j).
        union, union_state = union_of_concepts(plan, torch.stack(others), state)
        taken = dng_step(
            plan,
            step,
            x,
            eps,
            union.to(eps.dtype),
            union_state,
            return_scale="scale" in self.record,
            return_guided="x0" in self.record,
            **noise,
        )
        assert taken.x_next is not None
        updated = [
            update_posterior(plan, step, x, taken.x_next, eps, other, own)
            for other, own in zip(others, state, strict=True)
        ]
        return taken, torch.stack([found.state for found in updated if found.state is not None])


def union_of_concepts(plan: StepPlan, others: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and tracker state of all concepts together; states are (M, B)."""
    assert isinstance(plan.tracker, PaperTracker | LogOddsTracker)
    highest = math.log(plan.tracker.p_max)
    each = plan.log_posterior(state).clamp(max=highest)
    total = torch.logsumexp(each, dim=0)
    share = torch.exp(each - total)
    union = torch.einsum("mb,mb...->b...", share.to(others.dtype), others)
    # Trackers of several concepts do not know of each other: their sum is capped like one.
    log_p = total.clamp(max=highest)
    if isinstance(plan.tracker, LogOddsTracker):
        return union, log_p - torch.log1p(-torch.exp(log_p))
    return union, log_p


def _x0(plan: StepPlan, step: int, x: Tensor, prediction: Tensor) -> Tensor:
    """The image that a prediction means."""
    row = plan.row(step)
    x0 = row.x0_x_factor * x + row.x0_factor * prediction.to(x.dtype)
    return x0 if plan.clip is None else x0.clamp(-plan.clip, plan.clip)
