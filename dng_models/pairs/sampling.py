"""Guided sampling with a pair of networks: any rule of dng_math, through the fused step.

A denoiser is a network or any callable ``(x, t) -> prediction``; the base one knows everything,
the unwanted one only what is to be avoided.  The noise of image i depends only on (seed, i), and
networks are always called with whole batches that start at a multiple of ``batch_size``.  Image i
of a seed therefore has the same bits for any number of images and processes, and after any
interruption.  Another batch size changes it only by the rounding of the networks, which may choose
other algorithms for another shape.

With weights (:class:`dng_math.FeynmanKac`) the images of a call are one population, which is
resampled as a whole: it is a function of the seed, its images and the steps, in any batches, and
an image is no longer independent of the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import (
    PathMemory,
    StepPlan,
    StepResult,
    dng_step,
    noise_keys,
    standard_normal,
    update_path,
    update_posterior,
)
from dng_math import checks
from dng_math.rules import (
    SPELL,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    Rule,
    Unguided,
    innermost,
)
from dng_math.schedules import PREDICTION_TYPES, NoiseSchedule, PredictionType, Sampler
from dng_math.trackers import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    at_steps,
)
from dng_math.weights import FeynmanKac, Indices, Population
from dng_models.pairs.denoisers import (
    EVALUATIONS,
    Denoiser,
    Evaluation,
    Labelled,
    Predictor,
    device_of,
    evaluating,
)
from dng_models.pairs.divergence import predictions_and_traces, quieter
from dng_models.pairs.points import refuse_no_density, shielded, stepped_by
from dng_models.support.progress import Progress
from dng_models.support.threads import torch_threads, work_of

RECORDS = ("log_posterior", "scale", "x", "x0")


class NoiseSource(Protocol):
    """A source of random numbers that replaces the seed."""

    def __call__(self, step: int | None, first_image: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normals of a step (None: of x_T), for images first_image + i."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """Generated images, and what was recorded on the way; all tensors are on the CPU.

    Attributes
    ----------
    images : Tensor, shape (N, ...), float32
        x at the clean end; not clamped.
    log_posterior : Tensor, shape (N,) or (M, N), or None
        Tracked log posterior of the unwanted concept at the clean end; for FBG the log ratio L, for
        CRG the sum of its evidence.  M rows if a sequence of M unwanted denoisers was given; None
        if the rule tracks nothing.
    time : ndarray, shape (S + 1,)
        Diffusion time before each of the S steps and after the last, from 1 to 0.
    records : dict of str to Tensor
        ``log_posterior`` (S + 1, N) or (S + 1, M, N); ``scale`` (S, N); ``x`` (S + 1, N, ...);
        ``x0`` (S, N, ...), the clean image that the guided prediction implies.
    log_weights : Tensor, shape (N,), float64, or None
        With ``weights``: log weight of every image, of which only differences matter.
    ess : Tensor, shape (S + 1,), float64, or None
        With ``weights``: effective sample size at every time, before resampling there.
    """

    images: Tensor
    log_posterior: Tensor | None
    time: NDArray[np.float64]
    records: dict[str, Tensor]
    log_weights: Tensor | None = None
    ess: Tensor | None = None


def timesteps(schedule: NoiseSchedule, steps: int | None = None) -> list[int]:
    """The training timestep 0 ... T - 1 of every step of a respaced run, noisiest first.

    Index k of the schedule, its k-th noisy time, is timestep k - 1 of the networks.

    Parameters
    ----------
    schedule : NoiseSchedule
        Schedule of the networks' training, with T steps.
    steps : int, optional
        Steps of the run; default T.

    Raises
    ------
    TypeError
        If ``schedule`` is not a NoiseSchedule.
    ValueError
        If ``steps`` is out of range.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
    kept = schedule if steps is None else schedule.respace(steps)
    index = np.searchsorted(schedule.time, kept.time[:0:-1] - 0.5 / len(schedule))
    return [int(i) - 1 for i in index]


def sample(
    base: Denoiser,
    unwanted: Denoiser | Sequence[Denoiser] | None,
    rule: Rule,
    *,
    shape: tuple[int, ...],
    num_images: int,
    schedule: NoiseSchedule | None = None,
    steps: int | None = None,
    sampler: Sampler | None = None,
    prediction_type: PredictionType = "epsilon",
    clip: float | None = None,
    positive: Denoiser | None = None,
    cfg_scale: float | None = None,
    weights: FeynmanKac | None = None,
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
    """Draw images from the base denoiser that avoid what the unwanted one knows.

    Parameters
    ----------
    base, unwanted : callable
        UNet2DModels, other networks, or callables ``(x, t) -> prediction`` with x (B, ...) and t
        (B,) int64, the training timestep; an output object with ``.sample`` is unwrapped.
        For DNG, ``unwanted`` may be a sequence of several, each with its own posterior, and a
        :class:`dng_models.PointsDenoiser` of images in place of a network; it is None for rules
        that do not use it.
    rule : Rule
        From :mod:`dng_math.rules`.  A :class:`dng_math.PathTracker` is right for any sampler, and
        takes forward derivatives of the denoisers: with one probe a step costs about twice as much.
        The other trackers must work without divergences, and with the noise of DDPM.
    shape : tuple of int
        Shape of one image, such as (channels, height, width).
    num_images : int
        Images ``first_image`` to ``first_image + num_images - 1`` of the seed are returned.
    schedule : NoiseSchedule, optional
        Schedule that the networks were trained on; default DDPM's 1000 linear betas.
    steps : int, optional
        Steps of the run, evenly spaced in the schedule; default all.
    sampler : Sampler, optional
        Default DDPM with the small variance.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What the denoisers return.
    clip : float, optional
        Bound of predicted |x0|; None, as in the paper, clips nothing.
    positive : callable, optional
        Denoiser that guidance leads to, for CFG, CFG++, FBG and Perp-Neg, and with ``cfg_scale``.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: w of ``base + w (positive - base)``.  The rule's
        ``reference`` says which of the two the unwanted is measured from.
    weights : FeynmanKac, optional
        Weights with which the images of :class:`dng_math.DynamicNegativeGuidance` follow
        p (1 - p_c)^g for g other than 1, as far as the tracked posterior is right; for samplers
        with noise, a last step without it is taken unguided.  The images of this call are then one
        population: all stay in memory at once, none is independent of the others, and image i of
        another ``num_images`` is another one.  Rows of the records are populations, not paths.
    seed : int
        In [0, 2^64); with ``weights`` also that of the resampling.
    noise : NoiseSource, optional
        Random numbers to use instead of those of the seed.
    first_image : int
        Number of the first image, at least 0.
    batch_size : int
        Images per network call.  Every batch is computed whole, so a partial one costs as much.
    device : torch.device or str, optional
        Default: that of the base denoiser's parameters, or the CPU.
    dtype : torch.dtype
        Precision of x, float32 or float64.
    autocast : torch.dtype, optional
        bfloat16 or float16 for the networks; x and the posteriors keep their precision.
    evaluation : {"auto", "separate", "stacked"}
        "stacked" evaluates networks of one architecture at once, as one network with stacked
        weights (``torch.func``); "separate" one after the other.  "auto" stacks on a GPU where it
        can, because small networks leave it idle; on a CPU stacking is slower.
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
    (:func:`~dng_models.support.threads.torch_threads` says which are small).

    Raises
    ------
    ValueError, TypeError
        If an argument is not allowed; the message names it, its value and what is allowed.
    """
    schedule = NoiseSchedule.linear() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
    num_images = checks.integer("num_images", num_images, 1)
    first_image = checks.integer("first_image", first_image, 0)
    batch_size = checks.integer("batch_size", batch_size, 1)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    checks.choice("evaluation", evaluation, EVALUATIONS)
    if isinstance(record, str) or not isinstance(record, Collection):
        raise TypeError(f"record must be a collection of {', '.join(RECORDS)}, got {record!r}")
    for name in record:
        checks.choice("record", name, RECORDS)
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
    if isinstance(rule, type) or not hasattr(rule, "guide"):
        raise TypeError(f"rule must be a rule of dng_math.rules, got {rule!r}")
    refuse_no_density(rule)
    if cfg_scale is not None:
        checks.finite("cfg_scale", cfg_scale)
    if weights is not None and not isinstance(weights, FeynmanKac):
        raise TypeError(f"weights must be a FeynmanKac, got {weights!r}")
    inner = innermost(rule)
    shield = inner if isinstance(inner, SPELL) else None
    plan = StepPlan(
        coefficients,
        stepped_by(rule),
        prediction_type=prediction_type,
        cfg_scale=None if shield is not None else cfg_scale,
        clip=clip,
        weighted=weights is not None,
        device=device_of(base) if device is None else device,
        _warn=False,
    )
    device = plan.device
    _check_tracker(plan)
    roles = _denoisers(rule, base, unwanted, positive, cfg_scale)
    denoisers = list(roles.values())
    chain = _Chain(
        plan=plan,
        timesteps=timesteps(schedule, steps),
        predict=Predictor(denoisers, device, evaluation, autocast, names=list(roles)),
        concepts=len(unwanted) if isinstance(unwanted, Sequence) else None,
        record=frozenset(record),
        shield=shield,
        cfg_scale=cfg_scale,
        weights=weights,
        batch_size=batch_size,
    )

    first_batch = first_image // batch_size
    last_batch = (first_image + num_images - 1) // batch_size
    batches = range(first_batch, last_batch + 1)
    at_once = batch_size
    if weights is not None:
        at_once, batches = len(batches) * batch_size, range(1)
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
            start = first_batch * batch_size if weights is not None else batch * batch_size
            draw = _Draw(seed, noise, start, (at_once, *shape), device, dtype)
            kept = slice(
                max(first_image - start, 0), min(first_image + num_images - start, at_once)
            )
            part = chain.run(draw, float(respaced.sigma[-1]), bar, kept)
            ess = part.pop("ess", None)
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
            f"these networks ({rule!r})",
            stacklevel=2,
        )
    log_posterior = joined.pop("final", None)
    time = np.append(coefficients.time, 0.0)
    return Samples(images, log_posterior, time, joined, joined.pop("log_weights", None), ess)


def _image_axis(name: str, values: Tensor) -> int:
    """Axis of an output that runs over images."""
    if name == "images":
        return 0
    return values.ndim - 1 if name in ("log_posterior", "scale", "final", "log_weights") else 1


def _images(name: str, values: Tensor, kept: slice) -> Tensor:
    return values.movedim(_image_axis(name, values), 0)[kept].movedim(0, _image_axis(name, values))


def _shape(shape: Any) -> tuple[int, ...]:
    """Check the shape of one image."""
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) == 0:
        raise TypeError(
            "shape must be a tuple of int, of one image, such as (channels, height, width), got "
            f"{shape!r}"
        )
    return tuple(checks.integer("shape", length, 1) for length in shape)


def _check_tracker(plan: StepPlan) -> None:
    if plan.needs_divergence:
        raise ValueError(
            "rule must have a tracker with divergence=False: networks do not give the "
            f"divergence of their scores; got {plan.rule!r}"
        )
    eta = plan.coefficients.eta[:-1]  # the last step is not tracked
    if plan.tracker is not None and not plan.tracks_path and np.any(eta < 1 - 1e-6):
        warnings.warn(
            f"the sampler's eta is {eta.min():g} where the tracker assumes 1: the tracked "
            "posterior will be wrong however many steps are taken; use DDPM, or DDIM with eta=1, "
            "or a PathTracker",
            stacklevel=3,
        )


def _denoisers(
    rule: Rule,
    base: Denoiser,
    unwanted: Denoiser | Sequence[Denoiser] | None,
    positive: Denoiser | None,
    cfg_scale: float | None,
) -> dict[str, Denoiser]:
    """Denoisers by name, in the order of a step's arguments: base, unwanted ones, positive."""
    rule = innermost(rule)
    roles: dict[str, object] = {"base": base}
    leads = isinstance(rule, ClassifierFreeGuidance | CFGPlusPlus | FeedbackGuidance)
    if leads and cfg_scale is not None:
        raise ValueError(
            f"cfg_scale must be None for {rule!r}, which leads to the positive prediction itself; "
            f"got {cfg_scale!r}"
        )
    if leads or isinstance(rule, Unguided | SPELL):
        pass
    elif not isinstance(unwanted, Sequence):
        roles["unwanted"] = unwanted
    elif len(unwanted) == 0:
        raise ValueError(f"unwanted must not be an empty sequence, got {unwanted!r}")
    elif not isinstance(rule, DynamicNegativeGuidance):
        raise ValueError(
            f"unwanted must be one denoiser for {rule!r}, got {len(unwanted)}: only DNG gives "
            "each its own posterior"
        )
    else:
        roles |= {f"unwanted[{i}]": denoiser for i, denoiser in enumerate(unwanted)}
    if rule.needs_positive or cfg_scale is not None:
        roles["positive"] = positive
    for name, denoiser in roles.items():
        if not callable(denoiser):
            raise TypeError(
                f"{name} must be a network or a callable (x, t) for {rule!r}, got {denoiser!r}"
            )
    return roles  # type: ignore[return-value]


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
        """Keyword arguments of a step that set its noise."""
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
    """Everything that a run needs except its random numbers."""

    plan: StepPlan
    timesteps: list[int]
    predict: Predictor
    concepts: int | None
    record: frozenset[str]
    shield: SPELL | None
    cfg_scale: float | None
    weights: FeynmanKac | None
    batch_size: int

    def predictions(self, x: Tensor, t: int) -> list[Tensor]:
        """The denoisers at x, in batches; in the order of :func:`_denoisers`."""
        if len(x) <= self.batch_size:
            return self.predict(x, t)
        parts = [self.predict(part, t) for part in torch.split(x, self.batch_size)]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def level(self, state: Tensor, members: slice) -> NDArray[np.float64]:
        """g log(1 - p) of the images of the population."""
        rule, plan = innermost(self.plan.rule), self.plan
        assert isinstance(rule, DynamicNegativeGuidance) and not isinstance(
            rule.posterior, ExactPosterior
        )
        log_p = plan.log_posterior(state.double())[..., members]
        log_p = log_p.clamp(max=math.log(rule.posterior.p_max))
        if log_p.ndim == 2:
            log_p = torch.logsumexp(log_p, dim=0).clamp(max=math.log(rule.posterior.p_max))
        level: NDArray[np.float64] = torch.log1p(-torch.exp(log_p)).cpu().numpy()
        return rule.guidance_scale * level

    @torch.no_grad()
    def run(self, draw: _Draw, noisiest: float, bar: Progress, members: slice) -> dict[str, Tensor]:
        """Run one batch, or the population of its ``members``.

        Returns ``images``, ``final`` log posteriors, the records, ``log_weights`` and ``ess``.
        """
        plan = self.plan
        c = plan.coefficients
        x = noisiest * draw.initial()
        momentum = plan.init_momentum(x)
        state = plan.init_state(len(x), x.dtype)
        if state is not None and self.concepts is not None:
            state = state.expand(self.concepts, -1).contiguous()
        rows: dict[str, list[Tensor]] = {name: [] for name in self.record}
        path = _Path(self, draw) if plan.tracks_path else None
        population: Population | None = None
        if self.weights is not None and state is not None:
            population = Population(self.weights, self.level(state, members), draw.seed)

        def keep(name: str, values: Tensor | None) -> None:
            if name in rows and values is not None:
                rows[name].append(values.cpu())

        for step, t in enumerate(self.timesteps):
            keep("x", x)
            if path is None or state is None:
                found = self.predictions(x, t)
            else:
                found, state = path.arrive(step, t, x, state)
            keep("log_posterior", None if state is None else plan.log_posterior(state))
            noise = draw.at(step, plan.noisy[step])
            if self.shield is None:
                taken, state = self._step(step, x, found, state, momentum, noise)
            else:
                taken = self._shielded_step(self.shield, step, x, found, noise)
            keep("scale", taken.scale)
            if "x0" in rows:
                assert taken.eps_guided is not None
                keep("x0", _x0(plan, step, x, taken.eps_guided))
            assert taken.x_next is not None
            x, momentum = taken.x_next, taken.momentum
            if population is not None:
                assert state is not None and taken.log_weight is not None
                ancestors = population.advance(
                    step,
                    taken.log_weight[members].cpu().double().numpy(),
                    self.level(state, members),
                    last=step == len(plan) - 1,
                )
                if ancestors is not None:
                    index = _index(ancestors, members, x)
                    x, state = x[index], state[..., index].contiguous()
                    if path is not None:
                        path.resample(index)
            bar.update()
        assert len(self.timesteps) == len(c)
        keep("x", x)
        final = None if state is None else plan.log_posterior(state)
        keep("log_posterior", final)
        out = {name: torch.stack(values) for name, values in rows.items() if values}
        out["images"] = x.float().cpu()
        if final is not None:
            out["final"] = final.cpu()
        if population is not None:
            weights = torch.zeros(len(x), dtype=torch.float64)
            weights[members] = torch.from_numpy(population.log_weights)
            out |= {
                "log_weights": weights,
                "ess": torch.tensor(population.ess, dtype=torch.float64),
            }
        return out

    def _shielded_step(
        self, rule: SPELL, step: int, x: Tensor, found: list[Tensor], noise: dict[str, Any]
    ) -> StepResult:
        """Move the prediction out of SPELL's balls, and take an unguided step from there."""
        plan, row, eps = self.plan, self.plan.row(step), found[0]
        if self.cfg_scale is not None:
            eps = eps + self.cfg_scale * (found[-1].to(eps.dtype) - eps)
        scale = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if row.active:
            eps, scale = shielded(rule, x, eps, row.x0_x_factor, row.x0_factor)
        taken = dng_step(plan, step, x, eps, eps, return_guided="x0" in self.record, **noise)
        return taken._replace(scale=scale if "scale" in self.record else None)

    def _step(
        self,
        step: int,
        x: Tensor,
        found: list[Tensor],
        state: Tensor | None,
        momentum: Tensor | None,
        noise: dict[str, Any],
    ) -> tuple[StepResult, Tensor | None]:
        """Take one step; returns its result and the tracker's state after it."""
        plan, eps, unconditional = self.plan, found[0], None
        if self.cfg_scale is not None:
            eps, unconditional = found[-1], found[0]
        if self.concepts is None or state is None:
            others = found[1:] if unconditional is None else found[1:-1]
            given = dict(zip(("eps_neg", "eps_pos"), others, strict=False))
            taken = dng_step(
                plan,
                step,
                x,
                eps,
                given.get("eps_neg", eps),
                state,
                eps_uncond=unconditional,
                eps_pos=given.get("eps_pos"),
                momentum=momentum,
                return_scale="scale" in self.record,
                return_guided="x0" in self.record,
                **noise,
            )
            return taken, taken.state
        # Guidance away from several concepts is guidance away from their union, whose prediction
        # is their posterior-weighted mean: g sum_k p_k (eps_k - eps) / (1 - sum_j p_j).
        compared = unconditional if unconditional is not None and plan.from_uncond else eps
        others = found[1:] if unconditional is None else found[1:-1]
        union, union_state = union_of_concepts(plan, torch.stack(others), state)
        taken = dng_step(
            plan,
            step,
            x,
            eps,
            union.to(eps.dtype),
            union_state,
            eps_uncond=unconditional,
            return_scale="scale" in self.record,
            return_guided="x0" in self.record,
            **noise,
        )
        if plan.tracks_path:
            return taken, state
        assert taken.x_next is not None
        updated = [
            update_posterior(plan, step, x, taken.x_next, compared, other, own)
            for other, own in zip(others, state, strict=True)
        ]
        return taken, torch.stack([found.state for found in updated if found.state is not None])


class _Path:
    """A path tracker along one batch: predictions with their divergences, and states."""

    def __init__(self, chain: _Chain, draw: _Draw) -> None:
        self.plan, self.chain = chain.plan, chain
        self.several = chain.concepts is not None
        self.memories = [PathMemory() for _ in range(chain.concepts or 1)]
        tracker = chain.plan.tracker
        assert isinstance(tracker, PathTracker)
        self.trackers = at_steps(tracker, chain.plan.coefficients)
        # The signs of the probes are an image's, and other numbers than its noise.
        signs = (draw.seed + _SIGNS) % 2**64
        self.keys = noise_keys(
            signs, draw.shape[0], first_sample=draw.first_image, device=draw.device
        )

    def arrive(self, step: int, t: int, x: Tensor, state: Tensor) -> tuple[list[Tensor], Tensor]:
        """Predictions at a point, and the state there, from that of the point before."""
        plan, c = self.plan, self.plan.coefficients
        tracker = self.trackers[max(step - 1, 0)]  # of the way here
        assert isinstance(tracker, PathTracker)
        found, traces, spreads = predictions_and_traces(
            lambda at: self._ordered(self.chain.predictions(at, t)),
            x,
            self.keys,
            step,
            tracker.probes,
            networks=self.chain.predict.denoisers,
            named="the tracker's probes",
            # At alpha = 0 a prediction of x0 is the same everywhere.
            check=c.alpha_t[step] > 0 and (step == 0 or c.alpha_t[step - 1] == 0),
        )
        alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
        to_score = -plan.row(step).to_noise / sigma
        states = state if self.several else state[None]
        compared, others = found[0], found[1 : len(self.memories) + 1]
        gaps = quieter(
            (traces[1 : len(others) + 1] - traces[:1]) * to_score,
            spreads[1 : len(others) + 1] * to_score**2,
            plan.log_posterior(states),
        )
        updated = [
            update_path(
                tracker,
                memory,
                x,
                compared,
                other,
                own,
                alpha,
                sigma,
                divergence_gap=gap.to(own.dtype),
                prediction_type=plan.prediction_type,
                offset=tracker.offset_nats / len(plan),
            )
            for memory, other, own, gap in zip(self.memories, others, states, gaps, strict=True)
        ]
        return self._ordered(found), torch.stack(updated) if self.several else updated[0]

    def _ordered(self, found: list[Tensor]) -> list[Tensor]:
        """Predictions with the first and the last exchanged if unwanted ones are compared with it.

        Of what is compared with the positive prediction, its own divergence is taken off.
        """
        if self.chain.cfg_scale is None or self.plan.from_uncond:
            return found
        return [found[-1], *found[1:-1], found[0]]

    def resample(self, index: Tensor) -> None:
        """Go on from the points of these images."""
        for memory in self.memories:
            if memory.x is not None and memory.delta is not None and memory.rate is not None:
                memory.x, memory.delta = memory.x[index], memory.delta[index]
                memory.rate = memory.rate[index]


def _index(ancestors: Indices, members: slice, x: Tensor) -> Tensor:
    """The rows of a batch that its rows go on from: only the members are drawn anew."""
    index = torch.arange(len(x))
    index[members] = members.start + torch.from_numpy(ancestors)
    return index.to(x.device)


_SIGNS = 0x5851F42D4C957F2D  # added to a seed, so that signs are not those of the noise


def union_of_concepts(plan: StepPlan, others: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and tracker state of the union of all concepts.

    Parameters
    ----------
    plan : StepPlan
        With a DNG tracker.
    others : Tensor, shape (M, B, ...)
        Prediction of each of M concepts.
    state : Tensor, shape (M, B)
        Tracker state of each concept.

    Returns
    -------
    prediction : Tensor, shape (B, ...)
        Mean of the predictions, weighted with the posteriors.
    state : Tensor, shape (B,)
        Tracker state of the summed posteriors.
    """
    assert isinstance(plan.tracker, PaperTracker | LogOddsTracker | PathTracker)
    highest = math.log(plan.tracker.p_max)
    each = plan.log_posterior(state).clamp(max=highest)
    total = torch.logsumexp(each, dim=0)
    share = torch.exp(each - total)
    union = torch.einsum("mb,mb...->b...", share.to(others.dtype), others)
    # Each concept is tracked on its own, so the sum can exceed the cap p_max.
    log_p = total.clamp(max=highest)
    if plan.has_log_odds:
        return union, log_p - torch.log1p(-torch.exp(log_p))
    return union, log_p


def _x0(plan: StepPlan, step: int, x: Tensor, prediction: Tensor) -> Tensor:
    """The clean image that a prediction implies, clipped as the plan says."""
    row = plan.row(step)
    x0 = row.x0_x_factor * x + row.x0_factor * prediction.to(x.dtype)
    return x0 if plan.clip is None else x0.clamp(-plan.clip, plan.clip)
