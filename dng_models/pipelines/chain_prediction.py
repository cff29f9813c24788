"""How the predictions of a step are combined into the guided one.

A single push is made by the fused step, :func:`dng_kernels.guide`.  Pushes that it does not know
are made here: away from what a question found, and from several concepts with a rule for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dng_kernels import guide
from dng_math.rules import ContrastiveCFG, PerpNeg, Rule, SafeLatentDiffusion
from dng_math.trackers import LogOddsTracker, PaperTracker, PathTracker
from dng_models.pairs.divergence import Predictions
from dng_models.pairs.points import points_prediction
from dng_models.pairs.sampling import union_of_concepts
from dng_models.pipelines.chain_rules import leads
from dng_models.pipelines.dynamic_prompts import DynamicPrompts, Questions
from dng_models.pipelines.guided_run import GuidedRun


@dataclass(frozen=True, eq=False)
class Combination:
    """How a rule combines the predictions of a step.

    Parameters
    ----------
    inner : Rule
        The rule, or the first of several, inside any limited intervals.
    asking : DynamicPrompts, optional
        The rule, if it is one whose concepts are chosen as the run goes on.
    concepts : int, optional
        Number of unwanted concepts, each with its own posterior; None: one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule; None: none.
    from_unconditional : bool
        Whether the unwanted predictions are measured from the unconditional one.
    """

    inner: Rule
    asking: DynamicPrompts | None
    concepts: int | None
    cfg_scale: float | None
    from_unconditional: bool

    def guided(
        self, run: GuidedRun, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and the scale of every image.

        Parameters
        ----------
        run : GuidedRun
            The run, at the step to guide; its momentum and evidence are updated.
        positive : Tensor, shape (B, ...)
            Prediction for the positive prompt.
        others : list of Tensor, shape (B, ...) each
            Predictions of the unwanted concepts; empty for rules without.
        unconditional : Tensor, shape (B, ...), optional
            The unconditional prediction, where it is needed.

        Returns
        -------
        guided : Tensor, shape (B, ...), dtype of ``positive``
        scale : Tensor, shape (B,)
        """
        if run.questions is not None:
            return self._by_answers(run, run.questions, positive, others, unconditional)
        state = run.state
        combined_with = None if self.cfg_scale is None else unconditional
        base, third, along = positive, combined_with, None
        if leads(self.inner):
            assert unconditional is not None
            base, other, third = unconditional, positive, None
        elif isinstance(self.inner, PerpNeg):
            assert unconditional is not None
            base, other, third, along = unconditional, others[0], None, positive
        elif not others:
            other = positive
        elif self.concepts is None or state is None or run.plan.tracks_evidence:
            other = others[0]
        elif len(run.plans) > 1:
            return self._by_each(run, positive, others, combined_with)
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
            result = torch.where(per_image(taken.scale == 0, result), combined, result)
        return result, taken.scale

    def without_negative(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction without a negative, as diffusers combines it; dtype of the positive."""
        if unconditional is None or self.cfg_scale is None:
            return positive
        unconditional = unconditional.to(positive.dtype)
        return unconditional + self.cfg_scale * (positive - unconditional)

    def measured_from(self, positive: Tensor, unconditional: Tensor | None) -> Tensor:
        """The prediction that the unwanted ones are measured from."""
        if not self.from_unconditional:
            return positive
        assert unconditional is not None
        return unconditional

    @property
    def _plain(self) -> bool:
        """Whether scale 0 means that the guided prediction is the base."""
        inner = self.inner
        plain = not (leads(inner) or isinstance(inner, PerpNeg | SafeLatentDiffusion))
        return plain and not (isinstance(inner, ContrastiveCFG) and inner.positive_factor)

    def _by_answers(
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
            pushes += torch.where(per_image(own, gap), gap, 0.0)
        pushes /= per_image(held.sum(0).clamp(min=1), pushes)
        result = self.without_negative(positive.to(wide), unconditional)
        result = (result - per_image(scale, pushes) * pushes).to(positive.dtype)
        # Where nothing is pushed, the very numbers of the pipeline's own guidance.
        nothing = per_image(scale == 0, result)
        return torch.where(nothing, self.without_negative(positive, unconditional), result), scale

    def _by_each(
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
        seen = self.measured_from(positive, unconditional).to(wide)
        for scale, other in zip(scales, others, strict=True):
            gap = other.to(wide) - seen
            result = result - per_image(scale.to(wide), gap) * gap
        # As with a single push, diffusers' own combination bit for bit where nothing is pushed.
        unpushed = per_image((scales == 0).all(0), result)
        own = self.without_negative(positive, unconditional)
        return torch.where(unpushed, own, result.to(positive.dtype)), scales.sum(0)


def of_points(points: Tensor, run: GuidedRun, x: Tensor, like: Tensor) -> Tensor:
    """The unwanted prediction at x of the given points, in a dtype that fits another one's."""
    if tuple(points.shape[1:]) != tuple(x.shape[1:]):
        raise ValueError(
            "images must be of the size that the pipeline makes, as its network sees them: "
            f"latents of shape {tuple(x.shape[1:])}, got {tuple(points.shape[1:])}"
        )
    c, i = run.steps.coefficients, run.step
    level = float(c.alpha_t[i]), float(c.sigma_t[i])
    found = points_prediction(points, x, *level, 0.0, run.steps.prediction_type)
    if like.dtype != torch.float64 and found.dtype == torch.float64:
        return found.float()  # the fused step takes float64 beside float64 alone
    return found.to(torch.promote_types(like.dtype, found.dtype))


def with_points(
    points: Tensor, run: GuidedRun, network: Predictions | None, like: Tensor
) -> Predictions | None:
    """The network's predictions, and that of the points, as functions of x."""
    if network is None:
        return None
    # One point is the same x0 everywhere: a derivative that vanishes says nothing here.
    own, run.has_derivative = network, True
    return lambda at: [*own(at), of_points(points, run, at, like)]


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), reshaped to broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
