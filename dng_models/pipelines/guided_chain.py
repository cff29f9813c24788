"""A guided run inside a diffusers pipeline: what the hook and the guider share.

The pipeline owns the loop, the network and the scheduler.  At each step its caller (hook or guider)
passes the predictions to :meth:`GuidedChain.guide` and hands the guided prediction to the pipeline.
The sampler's step then updates the posteriors (DNG Algorithm 2).  A caller that sees the
scheduler's step reports it at once (:meth:`GuidedChain.begin`, :meth:`GuidedChain.took`); one that
sees only the latents passes those (:meth:`GuidedChain.observe`), and the update comes a step later.

What is given is checked in :mod:`dng_models.pipelines.chain_rules`.  The guided prediction is made
in :mod:`dng_models.pipelines.chain_prediction`, and posteriors are carried from point to point in
:mod:`dng_models.pipelines.chain_posterior`.

Inside, everything is in the coordinates of the network's input: that is the x of the schedule
(alpha, sigma), whatever the scheduler keeps (:mod:`dng_models.pipelines.transitions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dng_math import checks
from dng_math.rules import (
    CRG,
    REFERENCES,
    FeedbackGuidance,
    PerpNeg,
    Reference,
    Rule,
    Unguided,
    innermost,
)
from dng_models.pairs.divergence import Predictions
from dng_models.pairs.points import shielded
from dng_models.pipelines.chain_posterior import Posteriors
from dng_models.pipelines.chain_prediction import Combination, of_points, per_image, with_points
from dng_models.pipelines.chain_rules import (
    check_cfg_scale,
    check_concepts,
    check_divergence,
    check_mask_values,
    check_path,
    check_points,
    check_prediction,
    check_reference,
    checked_network,
    checked_rules,
    first_log_posterior,
    leads,
    path_probes,
    plans_of,
    reference_of,
    shield_of,
    tracks,
)
from dng_models.pipelines.dynamic_prompts import Questions, asking_rule
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.noise_levels import scheduler_levels
from dng_models.pipelines.scheduler_reading import position
from dng_models.pipelines.skipping import LONGEST_SKIP, matters, scale_bound, warn_of_blindness
from dng_models.pipelines.trace import RunTrace, Trace
from dng_models.pipelines.transitions import scheduler_run


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
        self._rules = rules = checked_rules(rule, concepts)
        inner = innermost(rules[0])
        check_concepts(rule, inner, self.asking, concepts, skip_below)
        check_cfg_scale(rule, inner, cfg_scale)
        if eta is not None:
            checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.integer("divergence_probes", divergence_probes, 0)
        if skip_below is not None:
            checks.positive("skip_below", skip_below)
        if mask is not None:
            check_mask_values(mask)
        probes = [path_probes(each) for each in rules]
        self.follows = any(probes)
        if self.follows:
            check_path(rule, probes, divergence_probes, skip_below, has_network)
            divergence_probes = max(probes)
        check_divergence(rules, divergence_probes)
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
            check_points(rule, rules, concepts, skip_below)
        self.leads, self.tracks, self.shield = leads(inner), tracks(inner), shield_of(rule)
        self.by_points = points is not None or self.shield is not None
        self.needs_negative = not (self.leads or isinstance(inner, Unguided) or self.by_points)
        self.needs_unconditional = (
            self.leads
            or isinstance(inner, PerpNeg)
            or cfg_scale is not None
            or self.reference == "unconditional"
        )
        check_reference(rule, inner, self.reference, skip_below)
        self._measured_from = reference_of(rule, rules)
        from_unconditional = cfg_scale is not None and self._measured_from == "unconditional"
        if from_unconditional:
            self.reference = "unconditional"
        self._combination = Combination(inner, self.asking, concepts, cfg_scale, from_unconditional)
        self._posteriors = Posteriors(
            concepts=concepts,
            initial=first_log_posterior(initial_log_posterior, rule, inner, concepts),
            reference=self.reference,
            leads=self.leads,
            follows=self.follows,
            mask=mask,
            divergence_probes=divergence_probes,
            named=self.probes,
        )
        self._run: GuidedRun | None = None

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
        plans, update_plans = plans_of(
            self._rules,
            steps,
            cfg_scale=self.cfg_scale,
            divergence_probes=self.divergence_probes,
            device=torch.device("cpu" if device is None else device),
        )
        run = GuidedRun(scheduler, scheduler.timesteps, steps, plans, update_plans, record, step)
        if self.asking is not None:
            run.questions = Questions(self.asking, len(steps), record)
        self._run = run
        self._posteriors.warn_of_noise(run, has_network=self.has_network)
        if self.skip_below is not None:
            warn_of_blindness(run, self._rules, self.skip_below)

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
        self._posteriors.update(run, x * float(before), x_next * float(after))
        run.advance(None)

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
        if run is None or not run.continues(scheduler, x, t):
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
        self._posteriors.update(run, run.x, x)
        run.advance(x)
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
            None means all, and so does a step without this call.  :meth:`guide` ignores the
            negative predictions of the other images.  For :class:`dng_models.DynamicPrompts` shape
            (M, B): each concept has its own images.

        Raises
        ------
        ValueError, TypeError
            If no run is under way, or the batch size is needed and not given, or not that of the
            run.
        """
        run = self._shown()
        if (self.skip_below is None and run.questions is None) or not self.needs_negative:
            return None
        if batch is None:
            if run.x is None:
                raise ValueError("batch must be given where the latents were not shown")
            batch = len(run.x)
        checks.integer("batch", batch, 1)
        known = run.batch if run.begun else batch if run.x is None else len(run.x)
        if batch != known:
            raise ValueError(
                f"batch must be {known}, the number of images in this run, got {batch}"
            )
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
        ValueError, TypeError
            If no question is due at this step, or the network's input is not known, or as for
            :meth:`guide`, if a prediction is missing or of another shape.
        Exception
            As :meth:`.dynamic_prompts.Questions.put`.
        """
        run = self._shown()
        if run.questions is None or not self.asks:
            raise ValueError(f"look() must be called where a question is due, not at {run.step}")
        unconditional = self._given(positive, [], unconditional, x)
        if run.x is None:
            raise ValueError(
                f"x must be given for {self.rule!r}, which looks at the image that a prediction "
                "implies: what the network of this pipeline is shown is not the scheduler's latents"
            )
        wide = torch.promote_types(positive.dtype, torch.float32)
        base = self._combination.without_negative(positive.to(wide), unconditional)
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
        ValueError, TypeError
            If no step is under way or it was guided already, if a prediction is missing, no tensor
            or of another shape than the latents, those of the network too, or if the divergence is
            needed and the network not given.
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
        unconditional = self._given(positive, others, unconditional, x)
        if network is not None:
            network = checked_network(network, 1 + len(others))
        if run.begun and len(positive) != run.batch:
            raise ValueError(
                f"the batch must stay the same during a run: it began with {run.batch} images, "
                f"step {run.step} has {len(positive)}"
            )
        if self.skip_below is not None and self.needs_negative and run.evaluated is None:
            # Nobody asked at this step: all are made.
            run.evaluated = torch.ones(len(positive), dtype=torch.bool)
        if run.evaluated is not None and run.evaluated.shape[-1] != len(positive):
            raise ValueError(
                f"positive must have {run.evaluated.shape[-1]} images, the batch that "
                f"to_evaluate() was told of at this step, got {len(positive)}"
            )
        if run.evaluated is not None and run.questions is None:
            keep = per_image(run.evaluated.to(positive.device), positive)
            seen = self._combination.measured_from(positive, unconditional)
            others = [torch.where(keep, other, seen) for other in others]
        if self.points is not None:
            others = [of_points(self.points, run, self._network_input(run), positive)]
            network = with_points(self.points, run, network, positive)
        # Autocast, meant for networks, would compute sums over an image in 16 bits.
        with torch.autocast(positive.device.type, enabled=False):
            if not run.begun:
                self._posteriors.begin(run, positive)
            if self.follows:
                compared = self._posteriors.compared(positive, unconditional)
                self._posteriors.arrive(run, compared, others, network)
            result, scale = self._guided(run, positive, others, unconditional)
            if self.shield is not None and run.column("active") > 0:
                factors = run.column("x0_x_factor"), run.column("x0_factor")
                x_seen = self._network_input(run)
                result, scale = shielded(self.shield, x_seen, result, *factors)
            self._record(run, scale)
            run.count(len(others) if self.points is None else 0, len(positive))
            self._posteriors.remember(run, positive, others, unconditional, network)
        return result

    def _guided(
        self, run: GuidedRun, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and the scale of every image."""
        return self._combination.guided(run, positive, others, unconditional)

    def _given(
        self, positive: Tensor, others: list[Tensor], unconditional: Tensor | None, x: Tensor | None
    ) -> Tensor | None:
        """Check what a step is given, and keep x; the unconditional prediction if it is read."""
        run = self._shown()
        if self.needs_unconditional and unconditional is None:
            raise ValueError(
                f"unconditional must be given for {self.rule!r} with cfg_scale={self.cfg_scale} "
                f"and reference={self.reference!r}"
            )
        if not self.needs_unconditional:
            unconditional = None
        given: list[tuple[str, Tensor | None]] = [("x", x), ("positive", positive)]
        given += [*(("negatives", other) for other in others), ("unconditional", unconditional)]
        shape = None if run.x is None else tuple(run.x.shape)
        for name, prediction in given:
            if prediction is not None or name not in ("x", "unconditional"):
                shape = check_prediction(name, prediction, shape)
        if x is not None:
            run.x = x
        return unconditional

    def _network_input(self, run: GuidedRun) -> Tensor:
        """What the network was shown at this step; raises ValueError if it is not known."""
        if run.x is None:
            raise ValueError(
                f"x must be given for {self.rule!r} with images or points: what the network of "
                "this pipeline is shown is not the scheduler's latents, and they compare with these"
            )
        return run.x

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
