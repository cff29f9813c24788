"""How the posteriors of a run's images begin, and are carried from point to point.

A tracker of transitions is updated after the sampler's step, from its two ends and the predictions
at the noisier one (DNG Algorithm 2).  A path tracker is updated on arriving at a point, from the
predictions there.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dng_kernels import PathMemory, StepPlan, update_path, update_posterior
from dng_math.trackers import LogOddsTracker, PaperTracker, PathTracker, at_steps
from dng_models.pairs.divergence import Predictions
from dng_models.pipelines.divergence import divergence_gaps
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.scheduler_reading import advice
from dng_models.pipelines.skipping import expect


@dataclass(frozen=True, eq=False)
class Posteriors:
    """How the posteriors of a batch are tracked along a run, whose state :class:`GuidedRun` has.

    Parameters
    ----------
    concepts : int, optional
        Number of unwanted concepts, each with its own posterior; None: one.
    initial : Tensor, shape (B,) or (M, B), optional
        log p(c | x) at the first step; None: the prior.
    reference : {"positive", "unconditional"}
        The prediction that those of the concepts are compared with.
    leads : bool
        Whether the rule leads to the positive prompt, and compares it with the unconditional one.
    follows : bool
        Whether the trackers follow the path of the latents.
    mask : Tensor, optional
        1 where the sampler's steps decide the latents: only these are evidence.
    divergence_probes : int
        Number of random vectors for the divergence.
    named : str
        The argument that asks for derivatives of the network, for messages.
    """

    concepts: int | None
    initial: Tensor | None
    reference: str
    leads: bool
    follows: bool
    mask: Tensor | None
    divergence_probes: int
    named: str

    def warn_of_noise(self, run: GuidedRun, *, has_network: bool) -> None:
        """Warn if the sampler adds less noise than the trackers take it to add.

        Parameters
        ----------
        run : GuidedRun
            The run, at its beginning.
        has_network : bool
            Whether there is a network, so that ``divergence_probes`` would help.
        """
        eta = run.steps.coefficients.eta[:-1]
        if run.plan.tracker is None or self.follows or not np.any(eta < 1.0 - 1e-6):
            return
        if run.plan.needs_divergence:
            return
        advised = advice(run.scheduler)
        ways = [] if advised is None else [f"set {advised}"]
        if has_network:
            ways.append(
                "give divergence_probes=1, which estimates the missing term with one more "
                "evaluation a step"
            )
        way_out = ", or ".join(ways)
        if len(ways) > 1:
            way_out = f"either {way_out}"
        cure = f". {way_out[0].upper()}{way_out[1:]}" if ways else ""
        warnings.warn(
            f"{run.steps.scheduler} adds {'no' if eta.min() == 0 else 'too little'} noise "
            f"(eta = {eta.min():g}, and the tracker takes it to be 1): the tracked posterior is "
            f"wrong however many steps are taken{cure}",
            stacklevel=2,
        )

    def begin(self, run: GuidedRun, positive: Tensor) -> None:
        """Begin with the prior, or with the given posterior.

        Parameters
        ----------
        run : GuidedRun
            The run, at its first step.
        positive : Tensor, shape (B, ...)
            A prediction, whose batch, dtype and device count.

        Raises
        ------
        ValueError
            If the given posterior is of another number of images.
        """
        dtype = torch.float64 if positive.dtype == torch.float64 else torch.float32
        run.batch = len(positive)
        states = [plan.init_state(run.batch, dtype) for plan in run.plans]
        state = states[0]
        if state is not None and self.concepts is not None:
            each = [own for own in states if own is not None]
            state = torch.stack([each[min(k, len(each) - 1)] for k in range(self.concepts)])
        if state is not None and self.initial is not None:
            if self.initial.shape != state.shape:
                raise ValueError(
                    f"initial_log_posterior must have shape {tuple(state.shape)} in this run, got "
                    f"{tuple(self.initial.shape)}"
                )
            state = _state_of(run, self.initial.to(state))
        run.state = state
        run.momentum = run.plan.init_momentum(positive)
        run.begun = True

    def compared(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction that trackers compare those of the concepts with."""
        if self.reference == "positive":
            return positive
        assert unconditional is not None
        return unconditional

    def arrive(
        self, run: GuidedRun, compared: Tensor, others: list[Tensor], network: Predictions | None
    ) -> None:
        """Update the posteriors to the point whose predictions were made, along the path to it.

        Parameters
        ----------
        run : GuidedRun
            The run, at the step of this point.
        compared : Tensor, shape (B, ...)
            The prediction that those of the concepts are compared with.
        others : list of Tensor, shape (B, ...) each
            Predictions of the concepts.
        network : callable, optional
            Maps x to all of these predictions.

        Raises
        ------
        ValueError
            If the network or its input is not known, or it has no forward derivative.
        """
        assert run.state is not None
        gaps = self._divergence_gaps(run, network)
        assert run.x is not None
        begins = not run.paths
        if begins:
            run.paths = [PathMemory() for _ in others]
        c, step = run.steps.coefficients, run.step
        wide = _widest(compared, run.x, run.state)
        x = run.x.to(wide)
        if wide == torch.float64:
            compared, others = compared.double(), [other.double() for other in others]
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
                compared,
                other,
                own,
                float(c.alpha_t[step]),
                float(c.sigma_t[step]),
                divergence_gap=gap,
                prediction_type=run.steps.prediction_type,
                offset=tracker.offset_nats / len(c),
            )
            # What was given as the first posterior is that of the first point already.
            updated.append(own if begins and self.initial is not None else following)
        run.state = torch.stack(updated) if self.concepts is not None else updated[0]

    def remember(
        self,
        run: GuidedRun,
        positive: Tensor,
        others: list[Tensor],
        unconditional: Tensor | None,
        network: Predictions | None,
    ) -> None:
        """Keep what the update needs; copied, because a network may reuse its outputs' memory.

        Parameters
        ----------
        run : GuidedRun
            The run, at the step that is guided.
        positive, unconditional : Tensor, shape (B, ...)
            Predictions for the positive and the empty prompt.
        others : list of Tensor, shape (B, ...) each
            Predictions of the concepts.
        network : callable, optional
            As for :meth:`arrive`.

        Raises
        ------
        ValueError
            As for :meth:`arrive`, if the trackers need the divergence.
        """
        if run.plan.tracker is None:
            run.base = positive
            return
        if self.leads:
            assert unconditional is not None
            run.base, run.others = unconditional.clone(), [positive.clone()]
        else:
            run.base = self.compared(positive, unconditional).clone()
            run.others = [other.clone() for other in others]
        run.gaps = [None] * len(run.others)
        if run.plan.needs_divergence:
            run.gaps = list(self._divergence_gaps(run, network))
        if run.evaluated is not None:
            expect(run)

    def update(self, run: GuidedRun, x: Tensor, x_next: Tensor) -> None:
        """Update the posteriors to the cleaner end of the step that was taken.

        Parameters
        ----------
        run : GuidedRun
            The run, at this step.
        x, x_next : Tensor, shape (B, ...)
            The network's input at the noisier end, and what it would be shown at the cleaner one.
        """
        run.record.unconfirmed = False
        if run.evidence is not None:
            run.state, run.evidence = run.evidence, None
        if run.plan.tracker is None or run.state is None or self.follows:
            return
        assert run.base is not None
        base, others = run.base, run.others
        wide = _widest(base, x, x_next, run.state)
        if run.update_plans is not run.plans:
            base, *others = (run.x0(x.to(wide), p) for p in (base, *others))
            x, x_next = x.to(wide), x_next.to(wide)
        if self.mask is not None:
            counts = (self.mask.to(base.device) > 0.5).expand(base.shape)
            others = [torch.where(counts, other, base) for other in others]
        if wide == torch.float64:
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

    def _divergence_gaps(self, run: GuidedRun, network: Predictions | None) -> Tensor:
        """The difference of the divergences of every concept and image, (M, B)."""
        if network is None or run.x is None:
            raise ValueError(
                f"{self.named} must be 0 here: the network itself is not at hand, only its "
                "predictions"
            )
        return divergence_gaps(run, run.x, network, self.divergence_probes, named=self.named)


def _widest(*tensors: Tensor) -> torch.dtype:
    """The dtype in which posteriors are updated: float64 where any tensor has it, or float32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _state_of(run: GuidedRun, log_posterior: Tensor) -> Tensor:
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
