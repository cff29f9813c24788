"""The state of a guided run between two of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dng_kernels import PathMemory, StepPlan
from dng_models.pipelines.dynamic_prompts import Questions
from dng_models.pipelines.scheduler_reading import same_timestep
from dng_models.pipelines.trace import RunTrace
from dng_models.pipelines.transitions import SchedulerRun


@dataclass(eq=False)
class GuidedRun:
    """The state of one call of a pipeline, between two of its steps."""

    scheduler: Any
    timesteps: Any  # the scheduler's own tensor, which every call of a pipeline replaces
    steps: SchedulerRun
    plans: list[StepPlan]  # for guiding and posteriors: one for all concepts, or one for each
    update_plans: list[StepPlan]  # for updating the trackers' states
    record: RunTrace
    step: int
    # The network's input, if it is known.
    x: Tensor | None = None
    batch: int = 0
    begun: bool = False
    state: Tensor | None = None
    momentum: Tensor | None = None
    # CRG's evidence with that of the step under way.
    evidence: Tensor | None = None
    base: Tensor | None = None
    others: list[Tensor] = field(default_factory=list)
    gaps: list[Tensor | None] = field(default_factory=list)
    # The last point of every concept's path tracker.
    paths: list[PathMemory] = field(default_factory=list)
    # Keys of the divergence's probes, (B, 2), and whether a derivative was looked at.
    has_derivative: bool = False
    keys: Tensor | None = None
    # What is asked of the images, for DynamicPrompts.
    questions: Questions | None = None
    # For skipped predictions.  (M, B) or (B,): |negative - base|^2 when last seen, and mean and
    # variance of the evidence since.  (B,), or (M, B) with questions: whether this step's
    # predictions are made, None for all.  (B,): the number of steps without since they were made
    # last.
    gap_sq: Tensor | None = None
    unseen_mean: Tensor | None = None
    unseen_var: Tensor | None = None
    evaluated: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def plan(self) -> StepPlan:
        """The plan of the first rule, or of the only one."""
        return self.plans[0]

    def column(self, name: str, plan: StepPlan | None = None) -> float:
        """One number of a plan's table at this step.

        Parameters
        ----------
        name : str
            Name of the column.
        plan : StepPlan, optional
            The plan; None: that of the first rule.

        Returns
        -------
        float
        """
        return float((self.plan if plan is None else plan).column(name)[self.step])

    def x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The x0 for which ``A x + B x0`` is the scheduler's step, its x0 limit included.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
            The network's input.
        prediction : Tensor, shape (B, ...)
            The network's prediction for it.

        Returns
        -------
        Tensor, shape and dtype of x
        """
        raw, limit = self.unlimited_x0(x, prediction), self.steps.limit
        if not (limit and limit.keeps_noise):
            return limit(raw)
        # alpha_s limited + A (x - alpha_t raw), in the form A x + B x0.
        c, i = self.steps.coefficients, self.step
        of_limited, of_raw = float(c.alpha_s[i]), float(c.transition_x_factor[i] * c.alpha_t[i])
        return (of_limited * limit(raw) - of_raw * raw) / float(c.transition_x0_factor[i])

    def unlimited_x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The x0 that a prediction implies, before any limit; arguments as for :meth:`x0`."""
        return self.column("x0_x_factor") * x + self.column("x0_factor") * prediction.to(x.dtype)

    def log_posterior(self, state: Tensor) -> Tensor:
        """log p(c | x) of the trackers' states, each converted by its own plan.

        Parameters
        ----------
        state : Tensor, shape (B,) or (M, B)
            State of the trackers of M concepts.

        Returns
        -------
        Tensor, of the same shape
        """
        if len(self.plans) == 1:
            return self.plan.log_posterior(state)
        return torch.stack([p.log_posterior(own) for p, own in zip(self.plans, state, strict=True)])

    def continues(self, scheduler: Any, x: Tensor, t: float) -> bool:
        """Whether a step continues the run rather than beginning a new one.

        Parameters
        ----------
        scheduler : SchedulerMixin
            The scheduler, with its timesteps set.
        x : Tensor, shape (B, ...)
            Its latents, or the network's input.
        t : float
            Its timestep.

        Returns
        -------
        bool

        Raises
        ------
        ValueError
            If it does not follow the last step: another timestep, batch or scheduler.
        """
        known = self.steps.timesteps
        following = self.step + 1
        expected = following < len(known) and same_timestep(known[following], t)
        assert self.x is not None
        if scheduler is not self.scheduler:
            if expected and x.shape == self.x.shape:
                raise ValueError(
                    "pipe.scheduler must stay the same during a run: at step "
                    f"{following} a {type(scheduler).__name__} stands where the run began with a "
                    f"{type(self.scheduler).__name__}"
                )
            return False
        if scheduler.timesteps is not self.timesteps:
            return False
        if not expected:
            raise ValueError(
                f"timestep must be {known[following] if following < len(known) else 'none'} at "
                f"step {following} of this run, got {t}: a step was left out or is not the "
                "scheduler's (a new run sets the scheduler's timesteps anew, or calls reset())"
            )
        if x.shape != self.x.shape:
            raise ValueError(
                f"the batch must stay the same during a run: step {self.step} had latents of shape "
                f"{tuple(self.x.shape)}, step {following} has {tuple(x.shape)}"
            )
        return True

    def advance(self, x: Tensor | None) -> None:
        """Go on to the next step, whose network's input is x if it is known."""
        self.step, self.x, self.evaluated = self.step + 1, x, None
        self.base, self.others, self.gaps = None, [], []
        if self.state is not None:
            self.record.final = self.log_posterior(self.state)

    def count(self, concepts: int, batch: int) -> None:
        """Count the unwanted predictions that were made at this step, and those skipped."""
        if self.evaluated is None:
            now = [concepts] * batch
        elif self.evaluated.ndim == 1:
            now = (concepts * self.evaluated.long()).tolist()
        else:
            now = self.evaluated.sum(0).tolist()
        record, made = self.record, sum(now)
        record.evaluations += made
        record.evaluations_saved += concepts * batch - made
        before = record.evaluations_of_images or [0] * batch
        record.evaluations_of_images = [a + b for a, b in zip(before, now, strict=True)]
