"""A guided run of somebody else's sampler: what the hook and the guider share.

A pipeline owns the loop, the network and the scheduler.  Whoever sits in the loop shows
:class:`GuidedChain` the network's input at every step (:meth:`GuidedChain.observe`) and the
predictions (:meth:`GuidedChain.guide`), and gives the pipeline the guided prediction instead.
What the sampler did with it is seen at the next step, whose input is the x_next of this one: there
the posteriors are updated, with no scheduler wrapped (DNG Algorithm 2, a step late).

Everything is said in the coordinates of the network's input: that is the x of the schedule
(alpha, sigma) whatever the scheduler keeps for itself (:mod:`dng_models.transition`).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dng_kernels import StepPlan, guide, standard_normal, update_posterior
from dng_kernels.plan import COLUMNS
from dng_math import _checks
from dng_math.guidance import (
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LimitedInterval,
    PerpNeg,
    Rule,
    SafeLatentDiffusion,
    Unguided,
    innermost,
)
from dng_math.posterior import LogOddsTracker, PaperTracker, TimeProfile
from dng_math.schedules import TrackerVariance
from dng_models.sampling import union_of_concepts
from dng_models.schedulers import sample_keys
from dng_models.trace import RunTrace, Trace
from dng_models.transition import SchedulerRun, advice, scheduler_run

# Skipping predictions: how many standard deviations the evidence that was not looked at is given,
# and after how many steps one looks in any case.
BOUND_DEVIATIONS = 3.0
LONGEST_SKIP = 8
# How far a measured eta may lie from 0, 1 or what was said, beside its standard error.
ETA_TOLERANCE = 0.05
SAME_TIMESTEP = 1e-5  # float32 keeps seven digits of a timestep

Network = Callable[[Tensor], Sequence[Tensor]]


class DynamicNegative(DynamicNegativeGuidance):
    """DNG with a tracked posterior, its hyperparameters in one line (DNG Eqs. 10 and 12).

    Parameters
    ----------
    guidance_scale : float
        g of lambda = g p / (1 - p).
    prior : float
        p(c) at the noisy end, in (0, 1).
    temperature : float or TimeProfile
        Factor of the log likelihood ratio, >= 0; below 1 for networks.
    offset : float
        The paper's, added as offset / (2 v) at each step.
    offset_nats : float
        Added over the whole run in equal parts, whatever the number of steps.
    p_min, p_max : float
        Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
    tracker : {"paper", "log_odds"}
        :class:`dng_math.PaperTracker` or :class:`dng_math.LogOddsTracker`.
    variance : {"matched", "small", "large", "published"}
        That the tracker divides by.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        guidance_scale: float = 1.0,
        prior: float = 0.01,
        temperature: float | TimeProfile = 1.0,
        offset: float = 0.0,
        *,
        offset_nats: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
        tracker: Literal["paper", "log_odds"] = "paper",
        variance: TrackerVariance = "matched",
    ) -> None:
        _checks.choice("tracker", tracker, ("paper", "log_odds"))
        _checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
        kind = PaperTracker if tracker == "paper" else LogOddsTracker
        super().__init__(
            guidance_scale,
            kind(
                prior=prior,
                temperature=temperature,
                offset=offset,
                offset_nats=offset_nats,
                p_min=p_min,
                p_max=p_max,
                variance=variance,
            ),
        )


def _with_divergence(rule: Rule, wanted: bool) -> Rule:
    """The rule with the divergence term of its tracker switched on or off."""
    if isinstance(rule, LimitedInterval):
        return replace(rule, rule=_with_divergence(rule.rule, wanted))
    if isinstance(rule, DynamicNegativeGuidance) and isinstance(
        rule.posterior, PaperTracker | LogOddsTracker
    ):
        posterior = replace(rule.posterior, divergence=wanted)
        return DynamicNegativeGuidance(rule.guidance_scale, posterior)
    return rule


@dataclass(eq=False)
class _Run:
    """One call of a pipeline, between two of its steps."""

    scheduler: Any
    timesteps: Any  # the scheduler's own tensor: every call of a pipeline makes a new one
    steps: SchedulerRun
    plan: StepPlan
    update_plan: StepPlan
    eta_is_assumed: bool
    record: RunTrace
    step: int
    x: Tensor
    begun: bool = False
    state: Tensor | None = None
    momentum: Tensor | None = None
    guided: Tensor | None = None
    base: Tensor | None = None
    others: list[Tensor] = field(default_factory=list)
    gaps: list[Tensor | None] = field(default_factory=list)
    # Of the probes of the divergence, (B, 2).
    keys: Tensor | None = None
    # For predictions that are skipped, (M, B) or (B,): |delta|^2 when last seen; mean and variance
    # of the evidence since; and per sample whether this step's is made, and how long it was not.
    gap_sq: Tensor | None = None
    unseen_mean: Tensor | None = None
    unseen_var: Tensor | None = None
    evaluated: Tensor | None = None
    skipped: Tensor | None = None

    def column(self, name: str, step: int | None = None) -> float:
        """A number of the plan's table."""
        row = self.plan.table64[self.step if step is None else step]
        return float(row[COLUMNS.index(name)])

    def x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The image whose step ``A x + B x0`` is the one that the prediction's limits lead to."""
        raw, limit = self.unlimited_x0(x, prediction), self.steps.limit
        if not (limit and limit.keeps_noise):
            return limit(raw)
        # alpha_s limited + A (x - alpha_t raw), in the form A x + B x0.
        c, i = self.steps.coefficients, self.step
        of_limited, of_raw = float(c.alpha_s[i]), float(c.kernel_x_factor[i] * c.alpha_t[i])
        return (of_limited * limit(raw) - of_raw * raw) / float(c.kernel_x0_factor[i])

    def unlimited_x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The image that a prediction means, in the precision of x."""
        return self.column("x0_x_factor") * x + self.column("x0_factor") * prediction.to(x.dtype)


class GuidedChain:
    """The posteriors of a batch along a pipeline's run, and the guided predictions.

    Parameters
    ----------
    rule : Rule
        From :mod:`dng_math.guidance`; posteriors are tracked, with a given prior.
    concepts : int, optional
        Number of unwanted concepts, each with its own posterior; None: one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional).  None: base = positive.
    eta : float, optional
        Of a DDIM scheduler, as given to the pipeline; None: it is measured on the first step.
    divergence_probes : int
        Random vectors for Hutchinson's estimate of the divergence that a sampler with eta < 1
        needs; 0: none is made, and such a sampler warns.
    skip_below : float, optional
        Predictions of what is unwanted are skipped for an image while an upper bound of its scale
        is below this; a tenth of the first one, g prior / (1 - prior), is a good choice.
    mask : Tensor, optional
        1 where the sampler's steps decide the latents, 0 where something else overwrites them;
        broadcasts to them.  Only the former count in the posterior.
    trace : Trace, optional
        Where to record; default: a new one.
    has_network : bool
        Whether :meth:`guide` can be given the network, which the divergence needs.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        concepts: int | None = None,
        cfg_scale: float | None = None,
        eta: float | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        mask: Tensor | None = None,
        trace: Trace | None = None,
        has_network: bool = True,
    ) -> None:
        if not hasattr(rule, "guide"):
            raise TypeError(f"rule must be one of dng_math.guidance, got {rule!r}")
        inner = innermost(rule)
        if concepts is not None:
            _checks.integer("concepts", concepts, 1)
            if not isinstance(inner, DynamicNegativeGuidance | Unguided):
                raise ValueError(
                    f"concepts must be None for {rule!r}, got {concepts}: only DNG gives each its "
                    "own posterior"
                )
        self.leads = isinstance(inner, ClassifierFreeGuidance | FeedbackGuidance)
        if cfg_scale is not None:
            _checks.finite("cfg_scale", cfg_scale)
            if self.leads or isinstance(inner, PerpNeg):
                raise ValueError(
                    f"cfg_scale must be None for {rule!r}, which leads to the positive prompt "
                    f"itself; got {cfg_scale!r}"
                )
        if eta is not None:
            _checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        _checks.integer("divergence_probes", divergence_probes, 0)
        if skip_below is not None:
            _checks.positive("skip_below", skip_below)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {mask!r}")
        posterior = getattr(inner, "posterior", None)
        if getattr(posterior, "divergence", False) and not divergence_probes:
            raise ValueError(
                "divergence_probes must be at least 1 for a tracker with divergence=True, got 0"
            )
        self.rule = rule
        self.concepts = concepts
        self.cfg_scale = cfg_scale
        self.eta = eta
        self.divergence_probes = divergence_probes
        self.skip_below = skip_below
        self.mask = mask
        self.has_network = has_network
        self.trace = Trace() if trace is None else trace
        self.needs_negative = not (self.leads or isinstance(inner, Unguided))
        self.needs_unconditional = self.leads or isinstance(inner, PerpNeg) or cfg_scale is not None
        self.tracks = isinstance(inner, FeedbackGuidance) or isinstance(
            posterior, PaperTracker | LogOddsTracker
        )
        # Where the scale is one number a sample, and 0 means that the prediction is the base's.
        self._plain = not (self.leads or isinstance(inner, PerpNeg | SafeLatentDiffusion))
        self._run: _Run | None = None

    # ------------------------------------------------------------------ the loop's side

    def reset(self) -> None:
        """Forget the run; the next step begins one."""
        self._run = None

    @torch.no_grad()
    def observe(
        self, scheduler: Any, x: Tensor, timestep: Tensor | float, *, scaled: bool = True
    ) -> int:
        """Show it a step: what the network is about to see.

        Parameters
        ----------
        scheduler : SchedulerMixin
            With its timesteps set.
        x : Tensor, shape (B, ...)
            The network's input, one row an image; with ``scaled=False`` the scheduler's latents.
        timestep : Tensor or float
            As the network is given it, of one element or the same for all.

        Returns
        -------
        int
            Step of the scheduler's run, 0 the noisiest.

        Raises
        ------
        ValueError
            If the step does not follow the last one: another batch or another scheduler.
        """
        value = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
        t = float(value)
        run = self._run
        if run is None or not self._follows(run, scheduler, x, t):
            run = self._run = self._begin(scheduler, x, t)
            if not scaled:
                run.x = run.x * float(run.steps.input_scale[run.step])
            return run.step
        step = run.step + 1
        if not scaled:
            x = x * float(run.steps.input_scale[step])
        if run.base is None:
            raise ValueError(
                f"step {run.step} was shown but not guided: guide() must be called at every step"
            )
        self._update(run, x)
        run.step, run.x = step, x
        run.base, run.guided, run.others, run.gaps = None, None, [], []
        return step

    def to_evaluate(self) -> Tensor | None:
        """Images whose unwanted concepts must be predicted at this step.

        Returns
        -------
        Tensor, shape (B,), bool, on the CPU
            None for all.  In ``guide``, rows of the others may hold anything.
        """
        run = self._shown()
        if self.skip_below is None or not self.needs_negative:
            return None
        evaluated = self._bound(run) >= self.skip_below
        if run.skipped is not None:
            evaluated |= run.skipped >= LONGEST_SKIP
        if run.gap_sq is None:
            evaluated = torch.ones_like(evaluated)
        if not self._matters(run):
            evaluated = torch.zeros_like(evaluated)
        # The posterior stays what it was: evidence that nobody saw changes nothing on average, for
        # p is a martingale.  Only the bound counts it.
        run.evaluated = evaluated
        return evaluated.cpu()

    @torch.no_grad()
    def guide(
        self,
        positive: Tensor,
        negatives: Tensor | Sequence[Tensor] = (),
        unconditional: Tensor | None = None,
        *,
        network: Network | None = None,
    ) -> Tensor:
        """The guided prediction.

        Parameters
        ----------
        positive : Tensor, shape (B, ...)
            Prediction for what is wanted, as the network gives it.
        negatives : Tensor or sequence of Tensor, shape (B, ...) each
            Of what is unwanted, one a concept.
        unconditional : Tensor, shape (B, ...), optional
            For ``cfg_scale``, Perp-Neg, CFG and FBG.
        network : callable, optional
            From x (B, ...) to the positive prediction and the concepts', for the divergence.

        Returns
        -------
        Tensor, shape (B, ...), dtype of ``positive``
        """
        run = self._shown()
        if run.base is not None:
            raise ValueError(f"guide() was called twice at step {run.step}")
        others = [negatives] if isinstance(negatives, Tensor) else list(negatives)
        if self.needs_negative:
            wanted = 1 if self.concepts is None else self.concepts
            if len(others) != wanted:
                raise ValueError(
                    f"negatives must be {wanted} predictions, one a concept, got {len(others)}"
                )
        else:
            others = []
        if self.needs_unconditional and unconditional is None:
            raise ValueError(
                f"unconditional must be given for {self.rule!r} with cfg_scale={self.cfg_scale}"
            )
        if not self.needs_unconditional:
            unconditional = None
        shape = tuple(run.x.shape)
        for name, tensor in (("positive", positive), *(("negatives", o) for o in others)):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have the shape of the latents, {shape}, got {tuple(tensor.shape)}"
                )
        if run.evaluated is not None:
            keep = _per_image(run.evaluated.to(positive.device), positive)
            others = [torch.where(keep, other, positive) for other in others]
        if not run.begun:
            self._first(run, positive)
        result, scale = self._guided(run, positive, others, unconditional)
        log_posterior = None if run.state is None else run.plan.log_posterior(run.state)
        run.record.add(
            run.step,
            float(run.steps.timesteps[run.step]),
            float(run.steps.coefficients.time[run.step]),
            log_posterior,
            scale,
        )
        self._count(run, len(others), len(positive))
        self._remember(run, positive, others, unconditional, result, network)
        return result

    # ------------------------------------------------------------------ runs

    def _shown(self) -> _Run:
        if self._run is None:
            raise ValueError(
                "the latents of this step were not shown: observe() must come before guide()"
            )
        return self._run

    def _follows(self, run: _Run, scheduler: Any, x: Tensor, t: float) -> bool:
        """Whether a step continues the run, rather than beginning one."""
        known = run.steps.timesteps
        following = run.step + 1
        expected = following < len(known) and _same(known[following], t)
        if scheduler is not run.scheduler:
            if expected and x.shape == run.x.shape:
                raise ValueError(
                    "pipe.scheduler must stay the same during a run: at step "
                    f"{following} a {type(scheduler).__name__} stands where the run began with a "
                    f"{type(run.scheduler).__name__}"
                )
            return False
        if scheduler.timesteps is not run.timesteps:
            return False
        if not expected:
            if any(_same(value, t) for value in known[:following]):
                return False
            raise ValueError(
                f"timestep must be {known[following] if following < len(known) else 'none'} at "
                f"step {following} of this run, got {t}: a step was left out or is not the "
                "scheduler's"
            )
        if x.shape != run.x.shape:
            raise ValueError(
                f"the batch must stay the same during a run: step {run.step} had latents of shape "
                f"{tuple(run.x.shape)}, step {following} has {tuple(x.shape)}. A callback that "
                "cuts guidance off (sets the pipeline's guidance scale to 0 and drops the negative "
                "prompt) cannot be used: limit the rule to an interval instead "
                "(dng_math.LimitedInterval)"
            )
        return True

    def _begin(self, scheduler: Any, x: Tensor, t: float) -> _Run:
        steps = scheduler_run(scheduler, eta=self.eta)
        at = [i for i, value in enumerate(steps.timesteps) if _same(value, t)]
        if not at:
            raise ValueError(f"timestep must be one of the scheduler's, {steps.timesteps}, got {t}")
        if self.mask is not None:
            self._check_mask(self.mask, x)
        record = RunTrace(steps.scheduler, self.concepts)
        if isinstance(innermost(self.rule), FeedbackGuidance):
            record.quantity = "ratio of conditional to base"
        self.trace.runs.append(record)
        # DDIM's eta is said in each call of its step, where only the pipeline sees it.
        assumed = "eta" in inspect.signature(scheduler.step).parameters
        plans = self._plans(steps, x.device)
        run = _Run(scheduler, scheduler.timesteps, steps, *plans, assumed, record, at[0], x)
        if not assumed:
            self._warn(run)
        self._warn_of_blindness(plans[0])
        return run

    def _warn_of_blindness(self, plan: StepPlan) -> None:
        if self.skip_below is None or not isinstance(plan.tracker, PaperTracker | LogOddsTracker):
            return
        odds = plan.tracker.odds(plan.tracker.init(np.array(plan.tracker.prior)))
        start = abs(getattr(innermost(self.rule), "guidance_scale", 0.0)) * float(odds)
        if self.skip_below > start / 2.0:
            warnings.warn(
                "skip_below should be well below the scale that guidance starts with, "
                f"g prior / (1 - prior) = {start:.3g} (a tenth costs nothing), got "
                f"{self.skip_below:g}: what is hardly looked at is hardly tracked",
                stacklevel=2,
            )

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        try:
            fits = np.broadcast_shapes(mask.shape, x.shape) == tuple(x.shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask must broadcast to the latents, {tuple(x.shape)}, got {tuple(mask.shape)}"
            )

    def _plans(self, steps: SchedulerRun, device: torch.device) -> tuple[StepPlan, StepPlan]:
        """To guide with, and to update posteriors with."""
        noiseless = bool(np.any(steps.coefficients.eta[:-1] < 1.0 - 1e-6))
        rule = _with_divergence(self.rule, self.divergence_probes > 0 and noiseless)
        plan = StepPlan(
            steps.coefficients,
            rule,
            prediction=steps.prediction,
            cfg_scale=self.cfg_scale,
            clip=steps.limit.clip,
            device=device,
        )
        if steps.limit.quantile is None and not (steps.limit and steps.limit.keeps_noise):
            return plan, plan
        # Such limits belong to no table: the images themselves are compared.
        return plan, StepPlan(steps.coefficients, rule, prediction="sample", device=device)

    def _warn(self, run: _Run) -> None:
        eta = run.steps.coefficients.eta[:-1]
        if run.plan.tracker is None or not np.any(eta < 1.0 - 1e-6):
            return
        if run.plan.needs_divergence:
            return
        advised = advice(run.scheduler)
        way_out = (
            f"Set {advised}"
            if not self.has_network
            else (
                f"Either set {advised}, or give divergence_probes=1, which estimates the missing "
                "term with one more evaluation a step"
            )
        )
        warnings.warn(
            f"{run.steps.scheduler} adds {'no' if eta.min() == 0 else 'too little'} noise "
            f"(eta = {eta.min():g}, and the tracker takes it to be 1): the tracked posterior is "
            f"wrong however many steps are taken. {way_out}",
            stacklevel=2,
        )

    def _first(self, run: _Run, positive: Tensor) -> None:
        dtype = torch.float64 if positive.dtype == torch.float64 else torch.float32
        state = run.plan.init_state(len(positive), dtype)
        if state is not None and self.concepts is not None:
            state = state.expand(self.concepts, -1).contiguous()
        run.state = state
        run.momentum = run.plan.init_momentum(positive)
        run.begun = True

    # ------------------------------------------------------------------ a step

    def _guided(
        self, run: _Run, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and the scale of every image."""
        state = run.state
        base, third, along = positive, unconditional, None
        if self.leads:
            assert unconditional is not None
            base, other, third = unconditional, positive, None
        elif isinstance(innermost(self.rule), PerpNeg):
            assert unconditional is not None
            base, other, third, along = unconditional, others[0], None, positive
        elif not others:
            other = positive
        elif self.concepts is None or state is None:
            other = others[0]
        else:
            joint, state = union_of_concepts(run.plan, torch.stack(others), state)
            other = joint.to(positive.dtype)
        taken = guide(
            run.plan,
            run.step,
            base,
            other,
            state,
            eps_uncond=third,
            eps_pos=along,
            momentum=run.momentum,
            return_scale=True,
        )
        run.momentum = taken.momentum
        assert taken.eps_guided is not None and taken.scale is not None
        result = taken.eps_guided
        if third is not None and self._plain:
            # Where nothing is avoided the prediction is that of diffusers, to the last bit.
            assert self.cfg_scale is not None
            combined = third + self.cfg_scale * (positive - third)
            result = torch.where(_per_image(taken.scale == 0, result), combined, result)
        return result, taken.scale

    def _remember(
        self,
        run: _Run,
        positive: Tensor,
        others: list[Tensor],
        unconditional: Tensor | None,
        result: Tensor,
        network: Network | None,
    ) -> None:
        """What the update needs of this step; copies, for a network may reuse its memory."""
        if run.plan.tracker is None:
            run.base, run.guided = positive, result
            return
        if self.leads:
            assert unconditional is not None
            run.base, run.others = unconditional.clone(), [positive.clone()]
        else:
            run.base, run.others = positive.clone(), [other.clone() for other in others]
        run.guided = result
        run.gaps = [None] * len(run.others)
        if run.plan.needs_divergence:
            if network is None:
                raise ValueError(
                    "divergence_probes must be 0 here: the network itself is not at hand, only "
                    "its predictions"
                )
            run.gaps = list(self._divergence_gaps(run, network))
        if run.evaluated is not None:
            self._expect(run)

    def _update(self, run: _Run, x_next: Tensor) -> None:
        """The posteriors at the cleaner end of the step that was taken."""
        if run.plan.tracker is None or run.state is None:
            return
        if run.eta_is_assumed:
            self._measure(run, x_next)
        assert run.base is not None
        plan, base, x, others = run.update_plan, run.base, run.x, run.others
        if plan is not run.plan:
            base, *others = (run.x0(x.float(), p) for p in (base, *others))
            x, x_next = x.float(), x_next.float()
        if self.mask is not None:
            counts = (self.mask.to(base.device) > 0.5).expand(base.shape)
            others = [torch.where(counts, other, base) for other in others]
        if base.dtype == torch.float64 or x.dtype == torch.float64:
            base, x, x_next = base.double(), x.double(), x_next.double()
            others = [other.double() for other in others]
        states = run.state if self.concepts is not None else run.state[None]
        gaps: list[Tensor | None] = run.gaps if plan.needs_divergence else [None] * len(others)
        following = [
            update_posterior(plan, run.step, x, x_next, base, other, own, divergence_gap=gap)
            for other, own, gap in zip(others, states, gaps, strict=True)
        ]
        run.state = torch.stack(following) if self.concepts is not None else following[0]

    # ------------------------------------------------------------------ samplers without noise

    def _measure(self, run: _Run, x_next: Tensor) -> None:
        """How much noise the first step really had.

        DDIM's eta is an argument of its step, which a hook does not see.  With
        ``y = x_next - alpha_s x0 = c eps + sqrt(V) z`` the part of y that is not along eps is the
        noise, whose size is known to 1 / sqrt(2 D).
        """
        assert run.guided is not None
        c, i = run.steps.coefficients, run.step
        small = float(c.tracker_variance("small")[i])
        if small == 0:
            return  # a last step: nothing to tell from
        x = run.x.double()
        raw = run.unlimited_x0(x, run.guided)
        eps = (x - c.alpha_t[i] * raw) / c.sigma_t[i]
        y = x_next.double() - c.alpha_s[i] * run.steps.limit(raw)
        counts = torch.isfinite(y) & torch.isfinite(eps)  # an image may have broken
        if self.mask is not None:
            counts &= self.mask.to(y.device) > 0.5
        y, eps = y[counts], eps[counts]
        if not y.numel():
            return
        along = float((y * eps).sum() / (eps * eps).sum())
        elements = y.numel()
        measured = math.sqrt(float((y - along * eps).square().mean()) / small)
        tolerance = ETA_TOLERANCE + 6.0 / math.sqrt(2.0 * elements)
        nearest = next((e for e in (0.0, 1.0) if abs(measured - e) < tolerance), None)
        eta = round(min(measured, 1.0), 2) if nearest is None else nearest
        if self.eta is not None:
            if abs(measured - self.eta) > tolerance:
                raise ValueError(
                    f"eta must be what the pipeline's call is given, {measured:.2f} by the noise "
                    f"of its first step, got {self.eta}"
                )
            eta = self.eta
        run.eta_is_assumed = False
        if eta != float(c.eta[i]):
            run.steps = scheduler_run(run.scheduler, eta=eta)
            run.plan, run.update_plan = self._plans(run.steps, run.x.device)
        self._warn(run)

    def _divergence_gaps(self, run: _Run, network: Network) -> Tensor:
        """Hutchinson's estimate of div s_c - div s, one a concept and image, (M, B).

        The score is (alpha x0 - x) / sigma^2, so its divergence differs by alpha / sigma^2 times
        that of x0, of which v . J v is an unbiased estimate for random signs v.  They are a
        function of the image's first latents: were they the same for all images, all estimates of
        a run would be wrong in the same direction.
        """
        x = run.x.float()
        if run.keys is None:
            run.keys = sample_keys(run.x).to(x.device)
        c, i = run.steps.coefficients, run.step

        def images(at: Tensor) -> Tensor:
            return torch.stack([run.x0(at, p) for p in network(at)])

        total: Tensor | None = None
        for probe in range(self.divergence_probes):
            # Apart from the noise that PosteriorFlowScheduler draws with the keys themselves.
            v = standard_normal(run.keys + (probe + 1), x.shape, step=i).sign()
            # Fused attention has no forward derivative, and neither has compiled code.
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                tangent = torch.func.jvp(images, (x,), (v,))[1]
            dots = (v * tangent).flatten(2).sum(-1)
            total = dots if total is None else total + dots
        assert total is not None
        factor = c.alpha_t[i] / c.sigma_t[i] ** 2 / self.divergence_probes
        assert run.state is not None
        return ((total[1:] - total[:1]) * factor).to(run.state.dtype)

    # ------------------------------------------------------------------ skipping

    def _matters(self, run: _Run) -> bool:
        """Whether what is unwanted can still change anything: not after the rule's interval."""
        active = run.plan.table64[:, COLUMNS.index("active")].cpu()
        if run.plan.tracker is None:
            return bool(active[run.step] > 0)
        return bool((active[run.step :] > 0).any())

    def _bound(self, run: _Run) -> Tensor:
        """An upper bound of the scale of every image, (B,).

        The state, and what the steps that were not looked at may have added under either
        hypothesis: their log ratios have mean at most tau q / 2 and variance tau^2 q, with
        q = |gap|^2 / v of the gap last seen.
        """
        batch = len(run.x)
        if run.state is None or run.plan.tracker is None:
            return torch.full((batch,), math.inf, device=run.x.device)
        bound = run.state
        if run.unseen_mean is not None and run.unseen_var is not None:
            bound = bound + run.unseen_mean + BOUND_DEVIATIONS * run.unseen_var.sqrt()
        p = run.plan.log_posterior(bound).exp()
        total = (p.sum(0) if self.concepts is not None else p).clamp(max=1.0 - 1e-6)
        return abs(run.column("guidance_scale")) * total / (1.0 - total)

    def _expect(self, run: _Run) -> None:
        """After the predictions of a step: sizes that were seen, evidence that was not."""
        assert run.base is not None and run.evaluated is not None
        if run.state is None:
            return
        seen = run.evaluated.to(run.state.device)
        sizes = torch.stack([(o - run.base).float().flatten(1).square().sum(1) for o in run.others])
        if self.concepts is None:
            sizes = sizes[0]
        if run.gap_sq is None:
            run.gap_sq = torch.zeros_like(sizes)
            run.unseen_mean = torch.zeros_like(sizes)
            run.unseen_var = torch.zeros_like(sizes)
            run.skipped = torch.zeros_like(seen, dtype=torch.int64)
        assert run.unseen_mean is not None and run.unseen_var is not None
        assert run.skipped is not None
        run.gap_sq = torch.where(seen, sizes, run.gap_sq)
        factor = run.column("kernel_factor")
        if run.plan.clip is not None:
            factor *= run.column("x0_factor")
        variance, temperature = run.column("variance"), run.column("temperature")
        q = run.gap_sq * (factor * factor / variance) if variance > 0 else 0.0 * run.gap_sq
        zero = torch.zeros_like(q)
        run.unseen_mean = torch.where(seen, zero, run.unseen_mean + temperature * q / 2.0)
        run.unseen_var = torch.where(seen, zero, run.unseen_var + temperature**2 * q)
        run.skipped = torch.where(seen, 0, run.skipped + 1)

    def _count(self, run: _Run, concepts: int, batch: int) -> None:
        made = batch if run.evaluated is None else int(run.evaluated.sum())
        run.record.evaluations += concepts * made
        run.record.evaluations_saved += concepts * (batch - made)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """One value an image, broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _same(a: float, b: float) -> bool:
    """One timestep, whatever precision it went through."""
    return math.isclose(a, b, rel_tol=SAME_TIMESTEP, abs_tol=SAME_TIMESTEP)
