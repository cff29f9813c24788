"""A guided run inside a diffusers pipeline: what the hook and the guider share.

The pipeline owns the loop, the network and the scheduler.  At each step its caller (hook or guider)
passes the predictions to :meth:`GuidedChain.guide` and hands the guided prediction to the pipeline.
The sampler's step then updates the posteriors (DNG Algorithm 2).  A caller that sees the
scheduler's step reports it at once (:meth:`GuidedChain.begin`, :meth:`GuidedChain.took`); one that
sees only the latents passes those (:meth:`GuidedChain.observe`), and the update comes a step later.

Inside, everything is in the coordinates of the network's input: that is the x of the schedule
(alpha, sigma), whatever the scheduler keeps (:mod:`dng_models.pipelines.transitions`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dng_kernels import PathMemory, StepPlan, guide, update_path, update_posterior
from dng_math import checks
from dng_math.rules import (
    CRG,
    SPELL,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    ImageReferenced,
    LimitedInterval,
    PerpNeg,
    Rule,
    SafeLatentDiffusion,
    Unguided,
    innermost,
)
from dng_math.schedules import NoiseSchedule
from dng_math.trackers import LogOddsTracker, PaperTracker, PathTracker, at_steps
from dng_models.pairs.divergence import Predictions
from dng_models.pairs.points import points_prediction, refuse_no_density, shielded, stepped_by
from dng_models.pairs.sampling import union_of_concepts
from dng_models.pipelines.divergence import divergence_gaps, with_divergence
from dng_models.pipelines.dynamic_prompts import DynamicPrompts, Questions, asking_rule
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.noise_levels import scheduler_levels
from dng_models.pipelines.scheduler_reading import advice
from dng_models.pipelines.skipping import LONGEST_SKIP, expect, matters, scale_bound
from dng_models.pipelines.trace import RunTrace, Trace
from dng_models.pipelines.transitions import SchedulerRun, scheduler_run

Reference = Literal["positive", "unconditional"]
REFERENCES: tuple[str, ...] = get_args(Reference)
SAME_TIMESTEP = 1e-5  # float32 keeps seven digits of a timestep
ANY_RUN = NoiseSchedule.linear(2).coefficients()


class GuidedChain:
    """The posteriors of a batch along a pipeline's run, and the guided predictions.

    Parameters
    ----------
    rule : Rule or sequence of Rule
        A rule of :mod:`dng_math.rules`; its posterior must be tracked, from a given prior.  A
        sequence has one :class:`dng_math.DynamicNegativeGuidance` for each of ``concepts``, with
        its own prior and scale: ``base - sum_k g_k p_k (eps_k - eps)/(1 - sum_j p_j)``.
        :class:`dng_models.DynamicPrompts` has several concepts of its own.
    concepts : int, optional
        Number of unwanted concepts, each with its own posterior; None: one.  Rules other than DNG
        and DynamicPrompts take at most one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional).  None: base = positive.
    reference : {"positive", "unconditional"}
        What trackers compare the unwanted predictions with.  "unconditional" tracks the posterior
        among all images, p(c | x) without the positive prompt; the push stays from what the rule's
        own ``reference`` says.  A rule that pushes from the unconditional prediction, beneath which
        there is ``cfg_scale``, compares with it too.
    eta : float, optional
        The eta that a DDIM scheduler's step is given; None: that given to :meth:`begin`, or 0.
    divergence_probes : int
        Number of random vectors for Hutchinson's estimate of the divergence, which the posterior
        needs if eta < 1; 0: no estimate, and a warning if it is needed.  A path tracker has its own
        number.
    skip_below : float, optional
        Unwanted predictions are skipped for an image while an upper bound of its scale is below
        this; a tenth of the first scale, g prior / (1 - prior), is a good choice.
    mask : Tensor, optional
        1 where the sampler's steps decide the latents, 0 where something else overwrites them;
        broadcasts to the latents.  The posterior is updated from the former only, but by a path
        tracker, which follows the latents as they are.
    initial_log_posterior : Tensor, optional
        log p(c | x) at the first step in place of the prior, shape (B,), or (M, B) for M concepts:
        for a chain that continues another one.  With a further dimension in front, as in
        :attr:`RunTrace.log_posterior`, the last step's is taken.
    points : Tensor, shape (K, ...), optional
        The unwanted, as latents of the network's x0, in place of its prediction.
    trace : Trace, optional
        The trace that records the run; default: a new one.
    has_network : bool
        Whether :meth:`guide` can be given the network; if not, no warning advises
        ``divergence_probes``.

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
        reference: Reference = "positive",
        eta: float | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        mask: Tensor | None = None,
        initial_log_posterior: Tensor | None = None,
        points: Tensor | None = None,
        trace: Trace | None = None,
        has_network: bool = True,
    ) -> None:
        self.asking = asking_rule(rule)
        rules = _rules(rule, concepts)
        inner = innermost(rules[0])
        if self.asking is not None:
            _check_asking(self.asking, concepts, skip_below)
        elif concepts is not None:
            checks.integer("concepts", concepts, 1)
            if concepts > 1 and not isinstance(inner, DynamicNegativeGuidance | Unguided):
                raise ValueError(
                    f"concepts must be 1 for {rule!r}, got {concepts}: only DNG gives each its "
                    "own posterior"
                )
        self.leads = isinstance(inner, ClassifierFreeGuidance | CFGPlusPlus | FeedbackGuidance)
        self.shield = _shield(rule)
        if concepts is not None and self.leads:
            raise ValueError(
                f"concepts must be None for {rule!r}, which leads to the positive prompt and away "
                f"from nothing; got {concepts}"
            )
        if cfg_scale is not None:
            checks.finite("cfg_scale", cfg_scale)
            if self.leads or isinstance(inner, PerpNeg):
                raise ValueError(
                    f"cfg_scale must be None for {rule!r}, which leads to the positive prompt "
                    f"itself; got {cfg_scale!r}"
                )
        elif _compares_both(inner):
            raise ValueError(
                f"cfg_scale must be given for {rule!r}, which compares the positive prediction "
                "with the unconditional one; got None"
            )
        if eta is not None:
            checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.integer("divergence_probes", divergence_probes, 0)
        if skip_below is not None:
            checks.positive("skip_below", skip_below)
        if mask is not None:
            _check_mask(mask)
        probes = [_path_probes(each) for each in rules]
        self.follows = any(probes)
        if self.follows:
            _check_path(rule, probes, divergence_probes, skip_below, has_network)
            divergence_probes = max(probes)
        for each in rules:
            posterior = getattr(innermost(each), "posterior", None)
            if getattr(posterior, "divergence", False) and not divergence_probes:
                raise ValueError(
                    "divergence_probes must be at least 1 for a tracker with divergence=True, got 0"
                )
        self.rule = rule
        self.concepts = concepts
        self.cfg_scale = cfg_scale
        self.reference = checks.choice("reference", reference, REFERENCES)
        self.eta = eta
        self.divergence_probes = divergence_probes
        self.skip_below = skip_below
        self.mask = mask
        self.has_network = has_network
        self.trace = Trace() if trace is None else trace
        self.points = points
        if points is not None:
            _check_points(rule, rules, concepts, skip_below)
        self.by_points = points is not None or self.shield is not None
        self.needs_negative = not (self.leads or isinstance(inner, Unguided) or self.by_points)
        self.needs_unconditional = (
            self.leads
            or isinstance(inner, PerpNeg)
            or cfg_scale is not None
            or self.reference == "unconditional"
        )
        self.tracks = isinstance(inner, FeedbackGuidance) or isinstance(
            getattr(inner, "posterior", None), PaperTracker | LogOddsTracker | PathTracker
        )
        self._check_reference()
        self._measured_from = _reference_of(rule, rules)
        self._from_uncond = cfg_scale is not None and self._measured_from == "unconditional"
        if self._from_uncond:
            self.reference = "unconditional"
        self._initial = self._first_log_posterior(initial_log_posterior)
        self._rules = rules
        # Whether scale 0 means that the guided prediction is the base.
        self._plain = not (self.leads or isinstance(inner, PerpNeg | SafeLatentDiffusion))
        self._plain &= not (isinstance(inner, ContrastiveCFG) and inner.positive_factor)
        self._run: GuidedRun | None = None

    def _check_reference(self) -> None:
        if self.reference == "positive":
            return
        if self.leads or not self.tracks:
            raise ValueError(
                f"reference must be 'positive' for {self.rule!r}, which tracks no posterior of "
                "something unwanted, got 'unconditional'"
            )
        if self.skip_below is not None:
            raise ValueError(
                "skip_below must be None with reference='unconditional', where a skipped "
                f"prediction would be evidence, got {self.skip_below!r}"
            )

    def check_prompted(self) -> None:
        """Refuse a rule that would silently measure its push from another prediction.

        For pipelines with prompts, where the unconditional prediction is made for ``cfg_scale``
        alone; without prompts it is the base.

        Raises
        ------
        ValueError
            If the rule's ``reference`` is "unconditional" and there is no ``cfg_scale``.
        """
        asked = self._measured_from if self.asking is None else self.asking.reference
        if asked == "unconditional" and self.cfg_scale is None:
            raise ValueError(
                f"cfg_scale must be given for {self.rule!r}, whose push is measured from the "
                "unconditional prediction (cfg_scale=1.0 where the positive prediction is to be "
                "the base), or the rule's reference be 'positive'; got None"
            )

    def _first_log_posterior(self, given: Tensor | None) -> Tensor | None:
        """The checked ``initial_log_posterior``, (B,) or (M, B); None: begin with the prior."""
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

    @property
    def probes(self) -> str:
        """The argument that asks for derivatives of the network, for messages."""
        return "the tracker's probes" if self.follows else "divergence_probes"

    # ------------------------------------------------------------------ called by the loop

    def reset(self) -> None:
        """Forget the run; the next step begins a new one."""
        self._run = None

    @property
    def step(self) -> int | None:
        """Index of the scheduler's step under way, 0 the noisiest; None between runs."""
        return None if self._run is None else self._run.step

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps of the run under way; None between runs."""
        return None if self._run is None else self._run.timesteps

    @property
    def input_scale(self) -> float:
        """The network's input divided by the scheduler's latents, at this step.

        Raises
        ------
        ValueError
            If no run is under way.
        """
        run = self._shown()
        return float(run.steps.input_scale[run.step])

    def belongs_to(self, scheduler: Any) -> bool:
        """Whether the run under way uses this scheduler with its present timesteps.

        Every call of a pipeline sets the scheduler's timesteps to a new tensor.
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
        """Begin a run whose steps are reported to :meth:`took`.

        Parameters
        ----------
        scheduler : SchedulerMixin
            The scheduler, with its timesteps set.
        step : int
            Index of the scheduler's timestep at which the run begins.
        eta : float, optional
            The eta that the scheduler's step will be given (DDIM).
        noise_of_limited : bool
            Whether DDIM's step will be given ``use_clipped_model_output``.
        device : torch.device
            Device of the predictions; default: the CPU.

        Raises
        ------
        ValueError
            If the scheduler cannot be described, or eta differs from the chain's.
        """
        if eta is not None and self.eta is not None and abs(eta - self.eta) > 1e-6:
            raise ValueError(
                f"eta must be what the pipeline's call is given, {eta:g}, got {self.eta:g}"
            )
        if self.follows:
            steps = scheduler_levels(scheduler)
        else:
            steps = scheduler_run(scheduler, eta=self.eta if eta is None else eta)
        if noise_of_limited:
            steps = replace(steps, limit=replace(steps.limit, keeps_noise=False))
        checks.integer("step", step, 0, len(steps) - 1)
        record = RunTrace(steps.scheduler, self.concepts)
        if isinstance(innermost(self._rules[0]), FeedbackGuidance):
            record.quantity = "ratio of conditional to base"
        if isinstance(innermost(self._rules[0]), CRG):
            record.quantity = "ratio of negative to unconditional"
        plans, update_plans = self._plans(steps, torch.device("cpu" if device is None else device))
        run = GuidedRun(scheduler, scheduler.timesteps, steps, plans, update_plans, record, step)
        if self.asking is not None:
            run.questions = Questions(self.asking, len(steps), record)
        self._run = run
        self._warn(run)
        self._warn_of_blindness(run)

    @torch.no_grad()
    def took(self, x: Tensor, x_next: Tensor) -> None:
        """Update the posteriors after the sampler's step.

        Parameters
        ----------
        x, x_next : Tensor, shape (B, ...)
            The scheduler's latents at the noisier and at the cleaner end of the step.

        Raises
        ------
        ValueError
            If :meth:`guide` was not called, or the shapes are not those of the predictions.
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

    def _advance(self, run: GuidedRun, x: Tensor | None) -> None:
        run.step, run.x = run.step + 1, x
        run.base, run.guided, run.others, run.gaps = None, None, [], []
        if run.state is not None:
            run.record.final = run.log_posterior(run.state)

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
        """Begin a step from the network's input, and update the posteriors for the step before.

        A new run begins when the scheduler's timesteps were set anew.  The update takes x as the
        sampler's result, so nothing else may have changed the latents in between.

        Parameters
        ----------
        scheduler : SchedulerMixin
            The scheduler, with its timesteps set.
        x : Tensor, shape (B, ...)
            The network's input, one row per image, or the scheduler's latents.
        timestep : Tensor or float
            The scheduler's timestep; a tensor may have one element or the same for all images.
        scaled : bool
            Whether x is the network's input; False: the scheduler's latents.
        eta : float, optional
            The eta that the scheduler's step is given (DDIM); read at the first step.

        Returns
        -------
        int
            Index of the step in the scheduler's timesteps, 0 the noisiest.

        Raises
        ------
        ValueError
            If the step does not follow the last one: another timestep, batch or scheduler, or
            :meth:`guide` was not called.
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
        """Mask of the images whose unwanted concepts must be predicted at this step.

        Parameters
        ----------
        batch : int, optional
            Number of images B; not needed after :meth:`observe`.
        together : bool
            Whether the images can only be evaluated all together.

        Returns
        -------
        Tensor, shape (B,), bool, on the CPU, or None
            None means all.  :meth:`guide` ignores the negative predictions of the other images.
            For :class:`dng_models.DynamicPrompts` shape (M, B): each concept has its own images.

        Raises
        ------
        ValueError
            If no run is under way, or the batch size is needed and not given.
        """
        run = self._shown()
        if (self.skip_below is None and run.questions is None) or not self.needs_negative:
            return None
        if batch is None:
            if run.x is None:
                raise ValueError("batch must be given where the latents were not shown")
            batch = len(run.x)
        if run.questions is not None:
            run.evaluated = run.questions.holds(batch) & (run.column("active") > 0)
            if together:
                run.evaluated = run.evaluated.any(1, keepdim=True).repeat(1, batch)
            return run.evaluated
        assert self.skip_below is not None
        evaluated = scale_bound(run, batch) >= self.skip_below
        if run.skipped is not None:
            evaluated |= run.skipped >= LONGEST_SKIP
        if run.gap_sq is None:
            evaluated = torch.ones_like(evaluated)
        if not matters(run):
            evaluated = torch.zeros_like(evaluated)
        if together:
            evaluated = evaluated.any().expand_as(evaluated).clone()
        run.evaluated = evaluated
        return evaluated.cpu()

    @property
    def asks(self) -> bool:
        """Whether :meth:`look` must come before the negatives of this step."""
        run = self._run
        return run is not None and run.questions is not None and run.questions.is_due(run.step)

    @torch.no_grad()
    def look(
        self, positive: Tensor, unconditional: Tensor | None = None, *, x: Tensor | None = None
    ) -> None:
        """Show the rule's ``ask`` the clean images that the prediction without negatives implies.

        Parameters
        ----------
        positive, unconditional
            As for :meth:`guide`.
        x : Tensor, shape (B, ...), optional
            The network's input; not needed after :meth:`observe`.

        Raises
        ------
        ValueError
            If no question is due at this step, or the network's input is not known.
        Exception
            As :meth:`.dynamic_prompts.Questions.put`.
        """
        run = self._shown()
        if run.questions is None or not self.asks:
            raise ValueError(f"look() must be called where a question is due, not at {run.step}")
        if x is not None:
            run.x = x
        if run.x is None:
            raise ValueError(
                f"x must be given for {self.rule!r}, which looks at the image that a prediction "
                "implies: what the network of this pipeline is shown is not the scheduler's latents"
            )
        wide = torch.promote_types(positive.dtype, torch.float32)
        base = self._combined(positive.to(wide), unconditional)
        x0 = run.unlimited_x0(run.x.to(base), base)
        x0 = run.steps.limit(x0) if run.steps.limit else x0
        run.questions.put(x0, run.step, float(run.steps.coefficients.time[run.step]))

    @torch.no_grad()
    def guide(
        self,
        positive: Tensor,
        negatives: Tensor | Sequence[Tensor] = (),
        unconditional: Tensor | None = None,
        *,
        network: Predictions | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction of the step under way.

        Parameters
        ----------
        positive : Tensor, shape (B, ...)
            Prediction for the positive prompt, in the form that the scheduler's step takes.
        negatives : Tensor or sequence of Tensor, shape (B, ...) each
            Predictions of the unwanted concepts, one per concept.
        unconditional : Tensor, shape (B, ...), optional
            The unconditional prediction, for ``cfg_scale``, Perp-Neg, CFG and FBG, and as the
            trackers' reference.
        network : callable, optional
            Maps x (B, ...) to the reference's and the concepts' predictions, for the divergence.
        x : Tensor, shape (B, ...), optional
            The network's input, for the divergence; not needed after :meth:`observe`.

        Returns
        -------
        Tensor, shape (B, ...), dtype of ``positive``

        Raises
        ------
        ValueError
            If no step is under way or it was guided already, if a prediction is missing or has
            another shape, or if the divergence is needed and the network not given.
        """
        run = self._shown()
        if run.base is not None:
            raise ValueError(f"guide() was called twice at step {run.step}")
        if self.asks:
            raise ValueError(f"look() must come before guide() at step {run.step}, which asks")
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
                f"unconditional must be given for {self.rule!r} with cfg_scale={self.cfg_scale} "
                f"and reference={self.reference!r}"
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
        if run.evaluated is not None and run.questions is None:
            keep = _per_image(run.evaluated.to(positive.device), positive)
            seen = self._seen(positive, unconditional)
            others = [torch.where(keep, other, seen) for other in others]
        if self.points is not None:
            others = [self._of_points(run, self._network_input(run), positive)]
            network = self._with_points(run, network, positive)
        # Autocast, meant for networks, would compute sums over an image in 16 bits.
        with torch.autocast(positive.device.type, enabled=False):
            if not run.begun:
                self._first(run, positive)
            if self.follows:
                compared = self._compared(positive, unconditional)
                self._arrive(run, compared, others, network)
            result, scale = self._guided(run, positive, others, unconditional)
            if self.shield is not None and run.column("active") > 0:
                factors = run.column("x0_x_factor"), run.column("x0_factor")
                x_seen = self._network_input(run)
                result, scale = shielded(self.shield, x_seen, result, *factors)
            self._record(run, scale)
            self._count(run, len(others) if self.points is None else 0, len(positive))
            self._remember(run, positive, others, unconditional, result, network)
        return result

    def _network_input(self, run: GuidedRun) -> Tensor:
        """What the network was shown at this step; raises ValueError if it is not known."""
        if run.x is None:
            raise ValueError(
                f"x must be given for {self.rule!r} with images or points: what the network of "
                "this pipeline is shown is not the scheduler's latents, and they compare with these"
            )
        return run.x

    def _of_points(self, run: GuidedRun, x: Tensor, like: Tensor) -> Tensor:
        """The unwanted prediction at x of the given points, in the dtype of another one."""
        assert self.points is not None
        if tuple(self.points.shape[1:]) != tuple(x.shape[1:]):
            raise ValueError(
                "images must be of the size that the pipeline makes, as its network sees them: "
                f"latents of shape {tuple(x.shape[1:])}, got {tuple(self.points.shape[1:])}"
            )
        c, i = run.steps.coefficients, run.step
        level = float(c.alpha_t[i]), float(c.sigma_t[i])
        found = points_prediction(self.points, x, *level, 0.0, run.steps.prediction_type)
        return found.to(torch.promote_types(like.dtype, x.dtype))

    def _with_points(
        self, run: GuidedRun, network: Predictions | None, like: Tensor
    ) -> Predictions | None:
        """The network's predictions, and that of the points, as functions of x."""
        if network is None:
            return None
        # One point is the same x0 everywhere: a derivative that vanishes says nothing here.
        own, run.has_derivative = network, True
        return lambda at: [*own(at), self._of_points(run, at, like)]

    def _seen(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction that the unwanted ones are measured from."""
        if not self._from_uncond:
            return positive
        assert unconditional is not None
        return unconditional

    # ------------------------------------------------------------------ runs

    def _shown(self) -> GuidedRun:
        if self._run is None:
            raise ValueError(
                "the latents of this step were not shown: observe() must come before guide()"
            )
        if self._run.step >= len(self._run.steps):
            raise ValueError(
                f"the run is over: its {self._run.steps.scheduler} has {len(self._run.steps)} steps"
            )
        return self._run

    def _record(self, run: GuidedRun, scale: Tensor) -> None:
        if run.record not in self.trace.runs:
            self.trace.runs.append(run.record)
        run.record.add(
            run.step,
            float(run.steps.timesteps[run.step]),
            float(run.steps.coefficients.time[run.step]),
            None if run.state is None else run.log_posterior(run.state),
            scale,
        )

    def forget_unconfirmed(self) -> None:
        """Remove the run from the trace if none of its steps was completed."""
        run = self._run
        if run is not None and run.record.unconfirmed and run.record in self.trace.runs:
            self.trace.runs.remove(run.record)

    def _follows(self, run: GuidedRun, scheduler: Any, x: Tensor, t: float) -> bool:
        """Whether a step continues the run rather than beginning a new one."""
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

    def _warn_of_blindness(self, run: GuidedRun) -> None:
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
        """Plans for guiding and plans for updating posteriors, each with one plan per rule."""
        noiseless = bool(np.any(steps.coefficients.eta[:-1] < 1.0 - 1e-6))
        probed = self.divergence_probes > 0 and noiseless
        rules = [with_divergence(rule, probed) for rule in self._rules]
        plans = [
            StepPlan(
                steps.coefficients,
                rule,
                prediction_type=steps.prediction_type,
                cfg_scale=self.cfg_scale,
                clip=steps.limit.clip,
                device=device,
                _warn=False,
            )
            for rule in rules
        ]
        expressed = steps.limit.quantile is None and not (steps.limit and steps.limit.keeps_noise)
        if expressed or plans[0].tracker is None:
            return plans, plans
        # No plan can express these limits: posteriors are updated with the limited x0 itself.
        return plans, [
            StepPlan(steps.coefficients, rule, prediction_type="sample", device=device, _warn=False)
            for rule in rules
        ]

    def _warn(self, run: GuidedRun) -> None:
        eta = run.steps.coefficients.eta[:-1]
        if run.plan.tracker is None or self.follows or not np.any(eta < 1.0 - 1e-6):
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

    def _first(self, run: GuidedRun, positive: Tensor) -> None:
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

    def _state_of(self, run: GuidedRun, log_posterior: Tensor) -> Tensor:
        """The trackers' states at a log posterior, (B,) or (M, B)."""

        def of(plan: StepPlan, own: Tensor) -> Tensor:
            if not isinstance(plan.tracker, PaperTracker | LogOddsTracker | PathTracker):
                return own  # FBG's state is the log ratio itself
            low, high = math.log(plan.tracker.p_min), math.log(plan.tracker.p_max)
            own = own.clamp(low, high)
            if plan.has_log_odds:
                return own - torch.log1p(-torch.exp(own))
            return own

        if len(run.plans) == 1:
            return of(run.plan, log_posterior)
        return torch.stack([of(p, own) for p, own in zip(run.plans, log_posterior, strict=True)])

    # ------------------------------------------------------------------ a step

    def _guided(
        self, run: GuidedRun, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and the scale of every image."""
        if run.questions is not None:
            return self._guided_by_answers(run, run.questions, positive, others, unconditional)
        state = run.state
        combined_with = None if self.cfg_scale is None else unconditional
        base, third, along = positive, combined_with, None
        if self.leads:
            assert unconditional is not None
            base, other, third = unconditional, positive, None
        elif isinstance(innermost(self._rules[0]), PerpNeg):
            assert unconditional is not None
            base, other, third, along = unconditional, others[0], None, positive
        elif not others:
            other = positive
        elif self.concepts is None or state is None or run.plan.tracks_evidence:
            other = others[0]
        elif len(run.plans) > 1:
            return self._guided_by_each(run, positive, others, combined_with)
        else:
            joint, state = union_of_concepts(run.plan, torch.stack(others), state)
            other = joint.to(positive.dtype)
        several = run.plan.tracks_evidence and self.concepts is not None
        taken = guide(
            run.plan,
            run.step,
            base,
            other,
            state[0] if several and state is not None else state,
            eps_uncond=third,
            eps_pos=along,
            momentum=run.momentum,
            return_scale=True,
        )
        run.momentum = taken.momentum
        if taken.state is not None:
            run.evidence = taken.state[None] if several else taken.state
        assert taken.eps_guided is not None and taken.scale is not None
        result = taken.eps_guided
        if third is not None and self._plain:
            # Where the scale is 0, return diffusers' CFG combination bit for bit.
            assert self.cfg_scale is not None
            combined = third + self.cfg_scale * (positive - third)
            result = torch.where(_per_image(taken.scale == 0, result), combined, result)
        return result, taken.scale

    def _combined(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction without a negative, as diffusers combines it; dtype of the positive."""
        if unconditional is None or self.cfg_scale is None:
            return positive
        unconditional = unconditional.to(positive.dtype)
        return unconditional + self.cfg_scale * (positive - unconditional)

    def _guided_by_answers(
        self,
        run: GuidedRun,
        questions: Questions,
        positive: Tensor,
        others: list[Tensor],
        unconditional: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Guide away from what is held: base - g mean_k (eps_k - reference)."""
        assert self.asking is not None
        wide = torch.promote_types(positive.dtype, torch.float32)
        held = questions.holds(len(positive)).to(positive.device)
        strength = run.column("guidance_scale") * run.column("active")
        scale = strength * held.any(0).to(wide)
        from_empty = unconditional is not None and self.asking.reference != "positive"
        measured_from = (unconditional if from_empty else positive).to(wide)  # type: ignore[union-attr]
        pushes = torch.zeros_like(measured_from)
        for own, other in zip(held, others, strict=True):
            gap = other.to(wide) - measured_from
            pushes += torch.where(_per_image(own, gap), gap, 0.0)
        pushes /= _per_image(held.sum(0).clamp(min=1), pushes)
        result = self._combined(positive.to(wide), unconditional)
        result = (result - _per_image(scale, pushes) * pushes).to(positive.dtype)
        # Where nothing is pushed, the very numbers of the pipeline's own guidance.
        nothing = _per_image(scale == 0, result)
        return torch.where(nothing, self._combined(positive, unconditional), result), scale

    def _guided_by_each(
        self, run: GuidedRun, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Guide each concept by its rule: base - sum_k g_k p_k (eps_k - eps)/(1 - sum_j p_j)."""
        assert run.state is not None
        trackers = [plan.tracker for plan in run.plans]
        kinds = PaperTracker | LogOddsTracker | PathTracker
        highest = max(t.p_max for t in trackers if isinstance(t, kinds))
        # As in union_of_concepts: each p is capped at its own p_max, the sum at the largest p_max.
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
        seen = self._seen(positive, unconditional).to(wide)
        for scale, other in zip(scales, others, strict=True):
            gap = other.to(wide) - seen
            result = result - _per_image(scale.to(wide), gap) * gap
        return result.to(positive.dtype), scales.sum(0)

    def _compared(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction that trackers compare those of the concepts with."""
        if self.reference == "positive":
            return positive
        assert unconditional is not None
        return unconditional

    def _remember(
        self,
        run: GuidedRun,
        positive: Tensor,
        others: list[Tensor],
        unconditional: Tensor | None,
        result: Tensor,
        network: Predictions | None,
    ) -> None:
        """Keep what the update needs; copied, because a network may reuse its outputs' memory."""
        run.guided = result
        if run.plan.tracker is None:
            run.base = positive
            return
        if self.leads:
            assert unconditional is not None
            run.base, run.others = unconditional.clone(), [positive.clone()]
        else:
            run.base = self._compared(positive, unconditional).clone()
            run.others = [other.clone() for other in others]
        run.gaps = [None] * len(run.others)
        if run.plan.needs_divergence:
            run.gaps = list(self._divergence_gaps(run, network))
        if run.evaluated is not None:
            expect(run)

    def _divergence_gaps(self, run: GuidedRun, network: Predictions | None) -> Tensor:
        if network is None or run.x is None:
            raise ValueError(
                f"{self.probes} must be 0 here: the network itself is not at hand, only its "
                "predictions"
            )
        return divergence_gaps(run, run.x, network, self.divergence_probes, named=self.probes)

    def _arrive(
        self, run: GuidedRun, compared: Tensor, others: list[Tensor], network: Predictions | None
    ) -> None:
        """Update the posteriors to the point whose predictions were made, along the path to it."""
        assert run.state is not None
        gaps = self._divergence_gaps(run, network)
        assert run.x is not None
        begins = not run.paths
        if begins:
            run.paths = [PathMemory() for _ in others]
        c, step = run.steps.coefficients, run.step
        wide = torch.float64 if compared.dtype == torch.float64 else torch.float32
        x = run.x.to(torch.promote_types(run.x.dtype, wide))
        states = run.state if self.concepts is not None else run.state[None]
        plans = run.plans * (len(states) // len(run.plans))
        updated = []
        for plan, memory, other, own, gap in zip(
            plans, run.paths, others, states, gaps, strict=True
        ):
            assert isinstance(plan.tracker, PathTracker)
            tracker = at_steps(plan.tracker, c)[max(step - 1, 0)]  # of the way here
            assert isinstance(tracker, PathTracker)
            following = update_path(
                tracker,
                memory,
                x,
                compared.to(x.dtype) if wide == torch.float64 else compared,
                other.to(x.dtype) if wide == torch.float64 else other,
                own,
                float(c.alpha_t[step]),
                float(c.sigma_t[step]),
                divergence_gap=gap,
                prediction_type=run.steps.prediction_type,
                offset=tracker.offset_nats / len(c),
            )
            # What was given as the first posterior is that of the first point already.
            updated.append(own if begins and self._initial is not None else following)
        run.state = torch.stack(updated) if self.concepts is not None else updated[0]

    def _update(self, run: GuidedRun, x: Tensor, x_next: Tensor) -> None:
        """Update the posteriors to the cleaner end of the step that was taken."""
        run.record.unconfirmed = False
        if run.evidence is not None:
            run.state, run.evidence = run.evidence, None
        if run.plan.tracker is None or run.state is None or self.follows:
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

    def _count(self, run: GuidedRun, concepts: int, batch: int) -> None:
        if run.evaluated is None:
            now = [concepts] * batch
        elif run.evaluated.ndim == 1:
            now = (concepts * run.evaluated.long()).tolist()
        else:
            now = run.evaluated.sum(0).tolist()
        record, made = run.record, sum(now)
        record.evaluations += made
        record.evaluations_saved += concepts * batch - made
        before = record.evaluations_of_images or [0] * batch
        record.evaluations_of_images = [a + b for a, b in zip(before, now, strict=True)]


def position(scheduler: Any, t: float) -> int:
    """Index of a timestep in a scheduler's timesteps.

    Parameters
    ----------
    scheduler : SchedulerMixin
        The scheduler, with its timesteps set; its own count decides between repeated timesteps.
    t : float
        One of its timesteps.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If t is none of the timesteps.
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
    """The given rule or rules as a list, each checked."""
    several = isinstance(rule, Sequence) and not isinstance(rule, str)
    rules = [_resolved(each) for each in (rule if several else [rule])]
    if not rules:
        raise ValueError(f"rule must be a rule, or one for each unwanted concept, got {rule!r}")
    for each in rules:
        if isinstance(each, type) or not hasattr(each, "guide"):
            raise TypeError(f"rule must be one of dng_math.rules, got {each!r}")
        # Refuse a rule that cannot begin a run now, not in the middle of a pipeline's call.
        beneath = 1.0 if _compares_both(innermost(each)) else None
        StepPlan(ANY_RUN, each, cfg_scale=beneath, _warn=False).init_state(0)
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


def _resolved(rule: Any) -> Any:
    """The rule that steps are planned with.

    A path tracker without probes means a tracker of transitions, and DynamicPrompts a push whose
    negatives are chosen as the run goes on.
    """
    if isinstance(rule, LimitedInterval):
        return replace(rule, rule=_resolved(rule.rule))
    if isinstance(rule, DynamicPrompts):
        return rule.push
    if isinstance(rule, SPELL | ImageReferenced):
        refuse_no_density(rule)
        return stepped_by(rule)
    posterior = getattr(rule, "posterior", None)
    if isinstance(posterior, PathTracker) and posterior.probes == 0:
        return replace(rule, posterior=posterior.first_order)
    return rule


def _check_asking(asking: DynamicPrompts, concepts: int | None, skip_below: float | None) -> None:
    """Refuse what cannot be with a rule that asks."""
    wanted = len(asking.names)
    if concepts != wanted:
        raise ValueError(
            f"concepts must be {wanted}, those of {asking!r}, which leads away from each of its "
            f"own, got {concepts}"
        )
    if skip_below is not None:
        raise ValueError(
            f"skip_below must be None for {asking!r}, which evaluates what it holds and nothing "
            f"else, got {skip_below!r}"
        )


def _shield(rule: Any) -> SPELL | None:
    """SPELL inside any limited intervals, which moves predictions before an unguided step."""
    inner = innermost(rule)
    return inner if isinstance(inner, SPELL) else None


def _compares_both(inner: Any) -> bool:
    """Whether a rule itself compares the positive prediction with the unconditional one."""
    return isinstance(inner, CRG) or bool(getattr(inner, "positive_factor", False))


def _reference_of(rule: Any, rules: Sequence[Rule]) -> str:
    """What the rules measure the unwanted from, all the same."""
    found = {getattr(innermost(each), "reference", "positive") for each in rules}
    if len(found) > 1:
        raise ValueError(
            f"rule must have one reference for all concepts, got {sorted(found)} of {rule!r}"
        )
    return str(found.pop())


def _check_points(
    rule: Any, rules: Sequence[Rule], concepts: int | None, skip_below: float | None
) -> None:
    """Refuse what cannot be with the unwanted given as points."""
    inner = innermost(rules[0])
    leads = ClassifierFreeGuidance | CFGPlusPlus | FeedbackGuidance
    if len(rules) > 1 or isinstance(inner, leads | Unguided) or asking_rule(rule) is not None:
        raise ValueError(
            f"images must be None for {rule!r}: they are one unwanted concept, for a rule that "
            "leads away from one (SPELL has points of its own)"
        )
    for name, given in (("concepts", concepts), ("skip_below", skip_below)):
        if given is not None:
            raise ValueError(f"{name} must be None with images, got {given!r}")


def _path_probes(rule: Rule) -> int:
    """Probes of a rule's path tracker; 0 for any other."""
    posterior = getattr(innermost(rule), "posterior", None)
    return posterior.probes if isinstance(posterior, PathTracker) else 0


def _check_path(
    rule: object,
    probes: list[int],
    divergence_probes: int,
    skip_below: float | None,
    has_network: bool,
) -> None:
    """Refuse what cannot be with trackers that follow the path of the latents."""
    if len(set(probes)) > 1:
        raise ValueError(
            "rule must have path trackers with one number of probes for all concepts, or for "
            f"none, got {probes} of {rule!r}"
        )
    if divergence_probes:
        raise ValueError(
            "divergence_probes must be 0 for a path tracker, which has probes of its own, got "
            f"{divergence_probes}"
        )
    if skip_below is not None:
        raise ValueError(
            "skip_below must be None for a path tracker, which needs the predictions of every "
            f"point, got {skip_below!r}"
        )
    if not has_network:
        raise ValueError(
            "the tracker's probes must be 0 where guide() is given predictions and no network "
            f"(has_network=False), got {rule!r}"
        )


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {mask!r}")
    if mask.is_complex() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must be 1 where the sampler's steps decide and 0 elsewhere, in [0, 1], got "
            f"{mask.dtype} of {tuple(mask.shape)} with other values"
        )


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), reshaped to broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _same(a: float, b: float) -> bool:
    """Whether two timesteps are equal up to float32 rounding."""
    return math.isclose(a, b, rel_tol=SAME_TIMESTEP, abs_tol=SAME_TIMESTEP)
