"""A guided run of somebody else's sampler: what the hook and the guider share.

A pipeline owns the loop, the network and the scheduler.  Whoever sits in the loop gives
:class:`GuidedChain` the predictions of a step (:meth:`GuidedChain.guide`), and the pipeline the
guided prediction instead.  What the sampler did with it updates the posteriors (DNG Algorithm 2).
Who sees the scheduler's step says so at once (:meth:`GuidedChain.begin`,
:meth:`GuidedChain.took`); who sees only the latents of every step shows those
(:meth:`GuidedChain.observe`), and the update comes a step late.

Inside, everything is in the coordinates of the network's input: that is the x of the schedule
(alpha, sigma) whatever the scheduler keeps for itself (:mod:`dng_models.transition`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dng_kernels import StepPlan, guide, standard_normal, update_posterior
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
from dng_math.posterior import LogOddsTracker, PaperTracker
from dng_math.schedules import NoiseSchedule
from dng_models.sampling import union_of_concepts
from dng_models.schedulers import sample_keys
from dng_models.trace import RunTrace, Trace
from dng_models.transition import SchedulerRun, advice, scheduler_run

# Skipping predictions: how many standard deviations the evidence that was not looked at is given,
# and after how many steps one looks in any case.
BOUND_DEVIATIONS = 3.0
LONGEST_SKIP = 8
SAME_TIMESTEP = 1e-5  # float32 keeps seven digits of a timestep
ANY_RUN = NoiseSchedule.linear(2).coefficients()

Network = Callable[[Tensor], Sequence[Tensor]]


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
    plans: list[StepPlan]  # to guide with, and to track each concept with: one for all, or each
    update_plans: list[StepPlan]  # to update posteriors with
    record: RunTrace
    step: int
    # The network's input, where it was shown.
    x: Tensor | None = None
    batch: int = 0
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

    @property
    def plan(self) -> StepPlan:
        """What the steps of the first rule, or of the only one, are guided with."""
        return self.plans[0]

    def column(self, name: str, plan: StepPlan | None = None) -> float:
        """A number of a plan's table at this step."""
        return float((self.plan if plan is None else plan).column(name)[self.step])

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
    rule : Rule or sequence of Rule
        From :mod:`dng_math.guidance`; posteriors are tracked, with a given prior.  A sequence has
        one :class:`dng_math.DynamicNegativeGuidance` for each of ``concepts``, with its own prior
        and scale:
        ``base - sum_k g_k p_k (eps_k - eps)/(1 - sum_j p_j)``.
    concepts : int, optional
        Number of unwanted concepts, each with its own posterior; None: one.  Rules other than DNG
        take at most one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional).  None: base = positive.
    eta : float, optional
        Of a DDIM scheduler, as its step is given it; None: what :meth:`begin` is told, or 0.
    divergence_probes : int
        Random vectors for Hutchinson's estimate of the divergence that a sampler with eta < 1
        needs; 0: none is made, and such a sampler warns.
    skip_below : float, optional
        Predictions of what is unwanted are skipped for an image while an upper bound of its scale
        is below this; a tenth of the first one, g prior / (1 - prior), is a good choice.
    mask : Tensor, optional
        1 where the sampler's steps decide the latents, 0 where something else overwrites them;
        broadcasts to them.  Only the former count in the posterior.
    initial_log_posterior : Tensor, optional
        log p(c | x) at the first step, shape (B,), or (M, B) for M concepts, in place of the
        prior: for a chain that goes on where another one stopped.  With one more dimension in
        front, as in :attr:`RunTrace.log_posterior`, the last step's is taken.
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
        rule: Rule | Sequence[Rule],
        *,
        concepts: int | None = None,
        cfg_scale: float | None = None,
        eta: float | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        mask: Tensor | None = None,
        initial_log_posterior: Tensor | None = None,
        trace: Trace | None = None,
        has_network: bool = True,
    ) -> None:
        rules = _rules(rule, concepts)
        inner = innermost(rules[0])
        if concepts is not None:
            _checks.integer("concepts", concepts, 1)
            if concepts > 1 and not isinstance(inner, DynamicNegativeGuidance | Unguided):
                raise ValueError(
                    f"concepts must be 1 for {rule!r}, got {concepts}: only DNG gives each its "
                    "own posterior"
                )
        self.leads = isinstance(inner, ClassifierFreeGuidance | FeedbackGuidance)
        if concepts is not None and self.leads:
            raise ValueError(
                f"concepts must be None for {rule!r}, which leads to the positive prompt and away "
                f"from nothing; got {concepts}"
            )
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
        if mask is not None:
            _check_mask(mask)
        for each in rules:
            posterior = getattr(innermost(each), "posterior", None)
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
            getattr(inner, "posterior", None), PaperTracker | LogOddsTracker
        )
        self._initial = self._first_log_posterior(initial_log_posterior)
        self._rules = rules
        # Where the scale is one number a sample, and 0 means that the prediction is the base's.
        self._plain = not (self.leads or isinstance(inner, PerpNeg | SafeLatentDiffusion))
        self._run: _Run | None = None

    def _first_log_posterior(self, given: Tensor | None) -> Tensor | None:
        """What a chain begins with in place of the prior, (B,) or (M, B)."""
        if given is None:
            return None
        if not self.tracks:
            raise ValueError(
                f"initial_log_posterior must be None for {self.rule!r}, which tracks none"
            )
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(
                f"initial_log_posterior must be a tensor of floating-point numbers, got {given!r}"
            )
        wanted = 1 if self.concepts is None else 2
        last = given[-1] if given.ndim == wanted + 1 and len(given) else given
        if last.ndim != wanted or (self.concepts is not None and len(last) != self.concepts):
            shape = "(B,)" if self.concepts is None else f"({self.concepts}, B)"
            raise ValueError(
                f"initial_log_posterior must have shape {shape}, of B images, got "
                f"{tuple(given.shape)}"
            )
        if not self.leads and not bool((last <= 0).all()):
            raise ValueError(
                "initial_log_posterior must be at most 0, logarithms of probabilities, got up to "
                f"{float(last.max()):g}"
            )
        return last.detach()

    # ------------------------------------------------------------------ the loop's side

    def reset(self) -> None:
        """Forget the run; the next step begins one."""
        self._run = None

    @property
    def step(self) -> int | None:
        """The scheduler's step that is being guided, 0 the noisiest; None between runs."""
        return None if self._run is None else self._run.step

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps of the run under way; None between runs."""
        return None if self._run is None else self._run.timesteps

    @property
    def input_scale(self) -> float:
        """What the network is shown, over the scheduler's latents, at this step."""
        run = self._shown()
        return float(run.steps.input_scale[run.step])

    def belongs_to(self, scheduler: Any) -> bool:
        """Whether the run under way is over this scheduler's present timesteps.

        Every call of a pipeline sets its timesteps anew.
        """
        run = self._run
        return (
            run is not None
            and scheduler is run.scheduler
            and scheduler.timesteps is run.timesteps
            and run.step < len(run.steps)
        )

    def begin(
        self,
        scheduler: Any,
        step: int,
        *,
        eta: float | None = None,
        noise_of_limited: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Begin a run whose steps :meth:`took` will be told of.

        Parameters
        ----------
        scheduler : SchedulerMixin
            With its timesteps set.
        step : int
            Of the scheduler's timesteps, where the run begins.
        eta : float, optional
            That the scheduler's step will be given, of DDIM.
        noise_of_limited : bool
            Whether DDIM's step will be given ``use_clipped_model_output``.
        device : torch.device
            Of the predictions.

        Raises
        ------
        ValueError
            If the scheduler cannot be described, or eta is not what the chain was told.
        """
        if eta is not None and self.eta is not None and abs(eta - self.eta) > 1e-6:
            raise ValueError(
                f"eta must be what the pipeline's call is given, {eta:g}, got {self.eta:g}"
            )
        steps = scheduler_run(scheduler, eta=self.eta if eta is None else eta)
        if noise_of_limited:
            steps = replace(steps, limit=replace(steps.limit, keeps_noise=False))
        _checks.integer("step", step, 0, len(steps) - 1)
        record = RunTrace(steps.scheduler, self.concepts)
        if isinstance(innermost(self._rules[0]), FeedbackGuidance):
            record.quantity = "ratio of conditional to base"
        plans, update_plans = self._plans(steps, torch.device("cpu" if device is None else device))
        run = _Run(scheduler, scheduler.timesteps, steps, plans, update_plans, record, step)
        self._run = run
        self._warn(run)
        self._warn_of_blindness(run)

    @torch.no_grad()
    def took(self, x: Tensor, x_next: Tensor) -> None:
        """Say what the sampler's step did with the guided prediction.

        Parameters
        ----------
        x, x_next : Tensor, shape (B, ...)
            The scheduler's latents at the noisier and at the cleaner end of the step.

        Raises
        ------
        ValueError
            If their shape is not the predictions'.
        """
        run = self._shown()
        if run.base is None:
            raise ValueError(f"took() must come after guide(), at step {run.step}")
        if x.shape != run.base.shape or x_next.shape != run.base.shape:
            raise ValueError(
                f"x and x_next must have the shape of the predictions, {tuple(run.base.shape)}, "
                f"got {tuple(x.shape)} and {tuple(x_next.shape)}"
            )
        self.check_mask(x)
        before, after = run.steps.input_scale[run.step], run.steps.input_scale[run.step + 1]
        self._update(run, x * float(before), x_next * float(after))
        self._advance(run, None)

    def _advance(self, run: _Run, x: Tensor | None) -> None:
        run.step, run.x = run.step + 1, x
        run.base, run.guided, run.others, run.gaps = None, None, [], []
        if run.state is not None:
            run.record.final = self._log_posterior(run, run.state)

    @torch.no_grad()
    def observe(
        self,
        scheduler: Any,
        x: Tensor,
        timestep: Tensor | float,
        *,
        scaled: bool = True,
        eta: float | None = None,
    ) -> int:
        """Show it a step: what the network is about to see.

        A run begins with a scheduler whose timesteps were set anew.  The step before is updated
        here, from x, so that nothing but the sampler may have changed the latents in between.

        Parameters
        ----------
        scheduler : SchedulerMixin
            With its timesteps set.
        x : Tensor, shape (B, ...)
            The network's input, one row an image; with ``scaled=False`` the scheduler's latents.
        timestep : Tensor or float
            The scheduler's, of one element or the same for all.
        eta : float, optional
            That the scheduler's step is given, of DDIM; read at the first step.

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
            self.begin(scheduler, position(scheduler, t), eta=eta, device=x.device)
            run = self._shown()
            self.check_mask(x)
            run.x = x if scaled else x * float(run.steps.input_scale[run.step])
            return run.step
        if run.base is None:
            raise ValueError(
                f"step {run.step} was shown but not guided: guide() must be called at every step"
            )
        if not scaled:
            x = x * float(run.steps.input_scale[run.step + 1])
        assert run.x is not None
        self._update(run, run.x, x)
        self._advance(run, x)
        return run.step

    def to_evaluate(self, batch: int | None = None, *, together: bool = False) -> Tensor | None:
        """Images whose unwanted concepts must be predicted at this step.

        Parameters
        ----------
        batch : int
            Number of images; not needed after :meth:`observe`.
        together : bool
            Whether the images can only be evaluated all or none.

        Returns
        -------
        Tensor, shape (B,), bool, on the CPU
            None for all.  In ``guide``, rows of the others may hold anything.
        """
        run = self._shown()
        if self.skip_below is None or not self.needs_negative:
            return None
        if batch is None:
            if run.x is None:
                raise ValueError("batch must be given where the latents were not shown")
            batch = len(run.x)
        evaluated = self._bound(run, batch) >= self.skip_below
        if run.skipped is not None:
            evaluated |= run.skipped >= LONGEST_SKIP
        if run.gap_sq is None:
            evaluated = torch.ones_like(evaluated)
        if not self._matters(run):
            evaluated = torch.zeros_like(evaluated)
        if together:
            evaluated = evaluated.any().expand_as(evaluated).clone()
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
        x: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction.

        Parameters
        ----------
        positive : Tensor, shape (B, ...)
            Prediction for what is wanted, as the scheduler's step would be given it.
        negatives : Tensor or sequence of Tensor, shape (B, ...) each
            Of what is unwanted, one a concept.
        unconditional : Tensor, shape (B, ...), optional
            For ``cfg_scale``, Perp-Neg, CFG and FBG.
        network : callable, optional
            From x (B, ...) to the positive prediction and the concepts', for the divergence.
        x : Tensor, shape (B, ...), optional
            What the network was shown, for the divergence; not needed after :meth:`observe`.

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
        if x is not None:
            run.x = x
        shape = tuple(positive.shape if run.x is None else run.x.shape)
        for name, tensor in (("positive", positive), *(("negatives", o) for o in others)):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have the shape of the latents, {shape}, got {tuple(tensor.shape)}"
                )
        if run.begun and len(positive) != run.batch:
            raise ValueError(
                f"the batch must stay the same during a run: it began with {run.batch} images, "
                f"step {run.step} has {len(positive)}"
            )
        if run.evaluated is not None:
            keep = _per_image(run.evaluated.to(positive.device), positive)
            others = [torch.where(keep, other, positive) for other in others]
        # What adds up over an image is no network's: autocast would do it in sixteen bits.
        with torch.autocast(positive.device.type, enabled=False):
            if not run.begun:
                self._first(run, positive)
            result, scale = self._guided(run, positive, others, unconditional)
            self._record(run, scale)
            self._count(run, len(others), len(positive))
            self._remember(run, positive, others, unconditional, result, network)
        return result

    # ------------------------------------------------------------------ runs

    def _shown(self) -> _Run:
        if self._run is None:
            raise ValueError(
                "the latents of this step were not shown: observe() must come before guide()"
            )
        if self._run.step >= len(self._run.steps):
            raise ValueError(
                f"the run is over: its {self._run.steps.scheduler} has {len(self._run.steps)} steps"
            )
        return self._run

    def _record(self, run: _Run, scale: Tensor) -> None:
        if run.record not in self.trace.runs:
            self.trace.runs.append(run.record)
        run.record.add(
            run.step,
            float(run.steps.timesteps[run.step]),
            float(run.steps.coefficients.time[run.step]),
            None if run.state is None else self._log_posterior(run, run.state),
            scale,
        )

    def _log_posterior(self, run: _Run, state: Tensor) -> Tensor:
        if len(run.plans) == 1:
            return run.plan.log_posterior(state)
        return torch.stack([p.log_posterior(own) for p, own in zip(run.plans, state, strict=True)])

    def forget_unconfirmed(self) -> None:
        """Take a run of which no step was completed out of the trace."""
        run = self._run
        if run is not None and run.record.unconfirmed and run.record in self.trace.runs:
            self.trace.runs.remove(run.record)

    def _follows(self, run: _Run, scheduler: Any, x: Tensor, t: float) -> bool:
        """Whether a step continues the run, rather than beginning one."""
        known = run.steps.timesteps
        following = run.step + 1
        expected = following < len(known) and _same(known[following], t)
        assert run.x is not None
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
            raise ValueError(
                f"timestep must be {known[following] if following < len(known) else 'none'} at "
                f"step {following} of this run, got {t}: a step was left out or is not the "
                "scheduler's (a new run sets the scheduler's timesteps anew, or calls reset())"
            )
        if x.shape != run.x.shape:
            raise ValueError(
                f"the batch must stay the same during a run: step {run.step} had latents of shape "
                f"{tuple(run.x.shape)}, step {following} has {tuple(x.shape)}"
            )
        return True

    def _warn_of_blindness(self, run: _Run) -> None:
        if self.skip_below is None:
            return
        for rule, plan in zip(self._rules, run.plans, strict=True):
            if not isinstance(plan.tracker, PaperTracker | LogOddsTracker):
                return
            odds = plan.tracker.odds(plan.tracker.init(np.array(plan.tracker.prior)))
            start = abs(getattr(innermost(rule), "guidance_scale", 0.0)) * float(odds)
            if self.skip_below > start / 2.0:
                warnings.warn(
                    "skip_below should be well below the scale that guidance starts with, "
                    f"g prior / (1 - prior) = {start:.3g} (a tenth costs nothing), got "
                    f"{self.skip_below:g}: a posterior is only updated where predictions are made",
                    stacklevel=2,
                )
                return

    def check_mask(self, x: Tensor) -> None:
        """Raise a ValueError if there is a mask that does not broadcast to latents x."""
        if self.mask is None:
            return
        try:
            fits = np.broadcast_shapes(self.mask.shape, x.shape) == tuple(x.shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                "mask must broadcast to the latents, "
                f"{tuple(x.shape)}, got {tuple(self.mask.shape)}"
            )

    def _plans(
        self, steps: SchedulerRun, device: torch.device
    ) -> tuple[list[StepPlan], list[StepPlan]]:
        """To guide with, and to update posteriors with; one for all rules or one for each."""
        noiseless = bool(np.any(steps.coefficients.eta[:-1] < 1.0 - 1e-6))
        probed = self.divergence_probes > 0 and noiseless
        rules = [_with_divergence(rule, probed) for rule in self._rules]
        plans = [
            StepPlan(
                steps.coefficients,
                rule,
                prediction=steps.prediction,
                cfg_scale=self.cfg_scale,
                clip=steps.limit.clip,
                device=device,
                _warn=False,
            )
            for rule in rules
        ]
        if steps.limit.quantile is None and not (steps.limit and steps.limit.keeps_noise):
            return plans, plans
        # Such limits belong to no table: the images themselves are compared.
        return plans, [
            StepPlan(steps.coefficients, rule, prediction="sample", device=device, _warn=False)
            for rule in rules
        ]

    def _warn(self, run: _Run) -> None:
        eta = run.steps.coefficients.eta[:-1]
        if run.plan.tracker is None or not np.any(eta < 1.0 - 1e-6):
            return
        if run.plan.needs_divergence:
            return
        advised = advice(run.scheduler)
        ways = [] if advised is None else [f"set {advised}"]
        if self.has_network:
            ways.append(
                "give divergence_probes=1, which estimates the missing term with one more "
                "evaluation a step"
            )
        way_out = ", or ".join(ways)
        way_out = f"{'Either ' if len(ways) > 1 else ''}{way_out}"
        way_out = f"{way_out[:1].upper()}{way_out[1:]}"
        warnings.warn(
            f"{run.steps.scheduler} adds {'no' if eta.min() == 0 else 'too little'} noise "
            f"(eta = {eta.min():g}, and the tracker takes it to be 1): the tracked posterior is "
            f"wrong however many steps are taken. {way_out}",
            stacklevel=2,
        )

    def _first(self, run: _Run, positive: Tensor) -> None:
        dtype = torch.float64 if positive.dtype == torch.float64 else torch.float32
        run.batch = len(positive)
        states = [plan.init_state(run.batch, dtype) for plan in run.plans]
        state = states[0]
        if state is not None and self.concepts is not None:
            each = [own for own in states if own is not None]
            state = torch.stack([each[min(k, len(each) - 1)] for k in range(self.concepts)])
        if state is not None and self._initial is not None:
            if self._initial.shape != state.shape:
                raise ValueError(
                    f"initial_log_posterior must have shape {tuple(state.shape)} in this run, got "
                    f"{tuple(self._initial.shape)}"
                )
            state = self._state_of(run, self._initial.to(state))
        run.state = state
        run.momentum = run.plan.init_momentum(positive)
        run.begun = True

    def _state_of(self, run: _Run, log_posterior: Tensor) -> Tensor:
        """The trackers' states at a log posterior, (B,) or (M, B)."""

        def of(plan: StepPlan, own: Tensor) -> Tensor:
            if not isinstance(plan.tracker, PaperTracker | LogOddsTracker):
                return own  # FBG's log ratio is its own state
            low, high = math.log(plan.tracker.p_min), math.log(plan.tracker.p_max)
            own = own.clamp(low, high)
            if isinstance(plan.tracker, LogOddsTracker):
                return own - torch.log1p(-torch.exp(own))
            return own

        if len(run.plans) == 1:
            return of(run.plan, log_posterior)
        return torch.stack([of(p, own) for p, own in zip(run.plans, log_posterior, strict=True)])

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
        elif isinstance(innermost(self._rules[0]), PerpNeg):
            assert unconditional is not None
            base, other, third, along = unconditional, others[0], None, positive
        elif not others:
            other = positive
        elif self.concepts is None or state is None:
            other = others[0]
        elif len(run.plans) > 1:
            return self._guided_by_each(run, positive, others, unconditional)
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
            # Where nothing is avoided the prediction is that of diffusers' own combination.
            assert self.cfg_scale is not None
            combined = third + self.cfg_scale * (positive - third)
            result = torch.where(_per_image(taken.scale == 0, result), combined, result)
        return result, taken.scale

    def _guided_by_each(
        self, run: _Run, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each concept by its own rule: base - sum_k g_k p_k (eps_k - eps)/(1 - sum_j p_j)."""
        assert run.state is not None
        trackers = [plan.tracker for plan in run.plans]
        highest = max(t.p_max for t in trackers if isinstance(t, PaperTracker | LogOddsTracker))
        # As in union_of_concepts: each is capped by its own tracker, and the sum like one.
        log_p = torch.stack(
            [
                plan.log_posterior(own).clamp(max=math.log(plan.tracker.p_max))  # type: ignore[union-attr]
                for plan, own in zip(run.plans, run.state, strict=True)
            ]
        )
        total = torch.logsumexp(log_p, dim=0)
        capped = total.clamp(max=math.log(highest))
        rest = -torch.expm1(capped)
        strengths = [
            run.column("guidance_scale", plan) * run.column("active", plan) for plan in run.plans
        ]
        scales = torch.tensor(strengths, dtype=log_p.dtype, device=log_p.device)[:, None]
        scales = scales * torch.exp(log_p + (capped - total)) / rest
        wide = torch.promote_types(positive.dtype, torch.float32)
        result = positive.to(wide)
        if unconditional is not None:
            assert self.cfg_scale is not None
            result = unconditional.to(wide) + self.cfg_scale * (result - unconditional.to(wide))
        for scale, other in zip(scales, others, strict=True):
            gap = other.to(wide) - positive.to(wide)
            result = result - _per_image(scale.to(wide), gap) * gap
        return result.to(positive.dtype), scales.sum(0)

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
        run.guided = result
        if run.plan.tracker is None:
            run.base = positive
            return
        if self.leads:
            assert unconditional is not None
            run.base, run.others = unconditional.clone(), [positive.clone()]
        else:
            run.base, run.others = positive.clone(), [other.clone() for other in others]
        run.gaps = [None] * len(run.others)
        if run.plan.needs_divergence:
            if network is None or run.x is None:
                raise ValueError(
                    "divergence_probes must be 0 here: the network itself is not at hand, only "
                    "its predictions"
                )
            run.gaps = list(self._divergence_gaps(run, run.x, network))
        if run.evaluated is not None:
            self._expect(run)

    def _update(self, run: _Run, x: Tensor, x_next: Tensor) -> None:
        """The posteriors at the cleaner end of the step that was taken."""
        run.record.unconfirmed = False
        if run.plan.tracker is None or run.state is None:
            return
        assert run.base is not None
        base, others = run.base, run.others
        if run.update_plans is not run.plans:
            base, *others = (run.x0(x.float(), p) for p in (base, *others))
            x, x_next = x.float(), x_next.float()
        if self.mask is not None:
            counts = (self.mask.to(base.device) > 0.5).expand(base.shape)
            others = [torch.where(counts, other, base) for other in others]
        if base.dtype == torch.float64 or x.dtype == torch.float64:
            base, x, x_next = base.double(), x.double(), x_next.double()
            others = [other.double() for other in others]
        states = run.state if self.concepts is not None else run.state[None]
        plans = run.update_plans * (len(states) // len(run.update_plans))
        gaps: list[Tensor | None] = run.gaps if plans[0].needs_divergence else [None] * len(others)
        with torch.autocast(base.device.type, enabled=False):
            updated = [
                update_posterior(plan, run.step, x, x_next, base, other, own, divergence_gap=gap)
                for plan, other, own, gap in zip(plans, others, states, gaps, strict=True)
            ]
        following = [found.state for found in updated if found.state is not None]
        run.state = torch.stack(following) if self.concepts is not None else following[0]

    # ------------------------------------------------------------------ samplers without noise

    def _divergence_gaps(self, run: _Run, x: Tensor, network: Network) -> Tensor:
        """Hutchinson's estimate of div s_c - div s, one a concept and image, (M, B).

        The score is (alpha x0 - x) / sigma^2, so its divergence differs by alpha / sigma^2 times
        that of x0, of which v . J v is an unbiased estimate for random signs v.  They are a
        function of the image's first latents: were they the same for all images, all estimates of
        a run would be wrong in the same direction.
        """
        x = x.float()
        if run.keys is None:
            run.keys = sample_keys(x).to(x.device)
        c, i = run.steps.coefficients, run.step

        def images(at: Tensor) -> Tensor:
            return torch.stack([run.x0(at, p) for p in network(at)])

        total: Tensor | None = None
        for probe in range(self.divergence_probes):
            # Apart from the noise that PosteriorFlowScheduler draws with the keys themselves.
            v = standard_normal(run.keys + (probe + 1), x.shape, step=i).sign()
            # Fused attention has no forward derivative, and neither has compiled code.
            try:
                with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                    tangent = torch.func.jvp(images, (x,), (v,))[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(
                    "divergence_probes must be 0 for a network without a forward derivative, got "
                    f"{self.divergence_probes}; torch says: {error}"
                ) from error
            dots = (v * tangent).flatten(2).sum(-1)
            total = dots if total is None else total + dots
        assert total is not None
        factor = c.alpha_t[i] / c.sigma_t[i] ** 2 / self.divergence_probes
        assert run.state is not None
        return ((total[1:] - total[:1]) * factor).to(run.state.dtype)

    # ------------------------------------------------------------------ skipping

    def _matters(self, run: _Run) -> bool:
        """Whether what is unwanted can still change anything: not after the rule's interval."""
        active = torch.stack([plan.column("active") for plan in run.plans])
        if run.plan.tracker is None:
            return bool((active[:, run.step] > 0).any())
        return bool((active[:, run.step :] > 0).any())

    def _bound(self, run: _Run, batch: int) -> Tensor:
        """An upper bound of the scale of every image, (B,).

        The state, and what the steps that were not looked at may have added under either
        hypothesis: their log ratios have mean at most tau q / 2 and variance tau^2 q, with
        q = |gap|^2 / v of the gap last seen.
        """
        if run.state is None or run.plan.tracker is None:
            return torch.full((batch,), math.inf, device=run.plan.device)
        bound = run.state
        if run.unseen_mean is not None and run.unseen_var is not None:
            bound = bound + run.unseen_mean + BOUND_DEVIATIONS * run.unseen_var.sqrt()
        p = self._log_posterior(run, bound).exp()
        total = (p.sum(0) if self.concepts is not None else p).clamp(max=1.0 - 1e-6)
        strongest = max(abs(run.column("guidance_scale", plan)) for plan in run.plans)
        return strongest * total / (1.0 - total)

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
        variance = run.column("variance")
        temperature = max(run.column("temperature", plan) for plan in run.plans)
        q = run.gap_sq * (factor * factor / variance) if variance > 0 else 0.0 * run.gap_sq
        zero = torch.zeros_like(q)
        run.unseen_mean = torch.where(seen, zero, run.unseen_mean + temperature * q / 2.0)
        run.unseen_var = torch.where(seen, zero, run.unseen_var + temperature**2 * q)
        run.skipped = torch.where(seen, 0, run.skipped + 1)

    def _count(self, run: _Run, concepts: int, batch: int) -> None:
        made = batch if run.evaluated is None else int(run.evaluated.sum())
        run.record.evaluations += concepts * made
        run.record.evaluations_saved += concepts * (batch - made)


def position(scheduler: Any, t: float) -> int:
    """Where in a scheduler's timesteps a run begins that is shown the timestep t first.

    Parameters
    ----------
    scheduler : SchedulerMixin
        With its timesteps set; one that keeps count knows it.
    t : float
        One of its timesteps.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If t is none of the timesteps, or not the one that the scheduler is at.
    """
    timesteps = np.asarray(torch.as_tensor(scheduler.timesteps).detach().double().cpu())
    at = [i for i, value in enumerate(timesteps) if _same(value, t)]
    if not at:
        raise ValueError(f"timestep must be one of the scheduler's, {timesteps}, got {t}")
    for counted in ("step_index", "begin_index"):
        index = getattr(scheduler, counted, None)
        if index is not None and int(index) in at:
            return int(index)
    return at[0]


def _rules(rule: Any, concepts: int | None) -> list[Rule]:
    """The rules that were given, each checked."""
    several = isinstance(rule, Sequence) and not isinstance(rule, str)
    rules = list(rule) if several else [rule]
    if not rules:
        raise ValueError(f"rule must be a rule, or one for each unwanted concept, got {rule!r}")
    for each in rules:
        if isinstance(each, type) or not hasattr(each, "guide"):
            raise TypeError(f"rule must be one of dng_math.guidance, got {each!r}")
        # What no run can begin with is refused here, not in the middle of a pipeline's call.
        StepPlan(ANY_RUN, each, _warn=False).init_state(0)
    if not several:
        return rules
    if len(rules) == 1 and concepts in (None, 1):
        return rules
    if len(rules) != (concepts or 1):
        raise ValueError(
            f"rule must be one rule, or one for each unwanted concept, {concepts or 1}, got "
            f"{len(rules)}"
        )
    for each in rules:
        if not isinstance(innermost(each), DynamicNegativeGuidance):
            raise ValueError(
                "rule must be DynamicNegativeGuidance for each concept where several are given, "
                f"got {each!r}: only DNG gives each its own posterior"
            )
    return rules


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {mask!r}")
    if mask.is_complex() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must be 1 where the sampler's steps decide and 0 elsewhere, in [0, 1], got "
            f"{mask.dtype} of {tuple(mask.shape)} with other values"
        )


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """One value an image, broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _same(a: float, b: float) -> bool:
    """One timestep, whatever precision it went through."""
    return math.isclose(a, b, rel_tol=SAME_TIMESTEP, abs_tol=SAME_TIMESTEP)
