"""The border of a guided chain: its rules and arguments, checked, and the rules' plans of a run.

What cannot be is refused when the chain is made, before a pipeline's call begins.  Arguments are
those of :class:`dng_models.pipelines.guided_chain.GuidedChain`, and ``inner`` is the rule, or the
first of several, inside any limited intervals.  Every function that checks raises ValueError or
TypeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dng_kernels import StepPlan
from dng_math import checks
from dng_math.rules import (
    CRG,
    SPELL,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    ImageReferenced,
    LimitedInterval,
    PerpNeg,
    Rule,
    Unguided,
    innermost,
)
from dng_math.schedules import NoiseSchedule
from dng_math.trackers import LogOddsTracker, PaperTracker, PathTracker
from dng_models.pairs.divergence import Predictions
from dng_models.pairs.points import refuse_no_density, stepped_by
from dng_models.pipelines.divergence import with_divergence
from dng_models.pipelines.dynamic_prompts import DynamicPrompts, asking_rule
from dng_models.pipelines.transitions import SchedulerRun

ANY_RUN = NoiseSchedule.linear(2).coefficients()


# ---------------------------------------------------------------------- what a rule is


def checked_rules(rule: Any, concepts: int | None) -> list[Rule]:
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


def leads(inner: Any) -> bool:
    """Whether a rule leads to the positive prompt, and away from nothing."""
    return isinstance(inner, ClassifierFreeGuidance | CFGPlusPlus | FeedbackGuidance)


def tracks(inner: Any) -> bool:
    """Whether a rule tracks a posterior, or the ratio that FBG has in its place."""
    return isinstance(inner, FeedbackGuidance) or isinstance(
        getattr(inner, "posterior", None), PaperTracker | LogOddsTracker | PathTracker
    )


def shield_of(rule: Any) -> SPELL | None:
    """SPELL inside any limited intervals, which moves predictions before an unguided step."""
    inner = innermost(rule)
    return inner if isinstance(inner, SPELL) else None


def _compares_both(inner: Any) -> bool:
    """Whether a rule itself compares the positive prediction with the unconditional one."""
    return isinstance(inner, CRG) or bool(getattr(inner, "positive_factor", False))


def reference_of(rule: Any, rules: Sequence[Rule]) -> str:
    """What the rules measure the unwanted from, all the same."""
    found = {getattr(innermost(each), "reference", "positive") for each in rules}
    if len(found) > 1:
        raise ValueError(
            f"rule must have one reference for all concepts, got {sorted(found)} of {rule!r}"
        )
    return str(found.pop())


def path_probes(rule: Rule) -> int:
    """Probes of a rule's path tracker; 0 for any other."""
    posterior = getattr(innermost(rule), "posterior", None)
    return posterior.probes if isinstance(posterior, PathTracker) else 0


# ---------------------------------------------------------------------- what can be with it


def check_concepts(
    rule: Any,
    inner: Rule,
    asking: DynamicPrompts | None,
    concepts: int | None,
    skip_below: float | None,
) -> None:
    """Refuse a number of concepts that the rule cannot lead away from."""
    if asking is not None:
        _check_asking(asking, concepts, skip_below)
    elif concepts is not None:
        checks.integer("concepts", concepts, 1)
        if concepts > 1 and not isinstance(inner, DynamicNegativeGuidance | Unguided):
            raise ValueError(
                f"concepts must be 1 for {rule!r}, got {concepts}: only DNG gives each its "
                "own posterior"
            )
    if concepts is not None and leads(inner):
        raise ValueError(
            f"concepts must be None for {rule!r}, which leads to the positive prompt and away "
            f"from nothing; got {concepts}"
        )


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


def check_cfg_scale(rule: Any, inner: Rule, cfg_scale: float | None) -> None:
    """Refuse classifier-free guidance beneath a rule that is one itself, or its lack."""
    if cfg_scale is not None:
        checks.finite("cfg_scale", cfg_scale)
        if leads(inner) or isinstance(inner, PerpNeg):
            raise ValueError(
                f"cfg_scale must be None for {rule!r}, which leads to the positive prompt "
                f"itself; got {cfg_scale!r}"
            )
    elif _compares_both(inner):
        raise ValueError(
            f"cfg_scale must be given for {rule!r}, which compares the positive prediction "
            "with the unconditional one; got None"
        )


def check_mask_values(mask: Any) -> None:
    """Refuse a mask that is not a tensor of numbers in [0, 1]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {mask!r}")
    if mask.is_complex() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must be 1 where the sampler's steps decide and 0 elsewhere, in [0, 1], got "
            f"{mask.dtype} of {tuple(mask.shape)} with other values"
        )


def check_path(
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


def check_divergence(rules: Sequence[Rule], divergence_probes: int) -> None:
    """Refuse a tracker that needs the divergence where there are no probes for it."""
    for each in rules:
        posterior = getattr(innermost(each), "posterior", None)
        if getattr(posterior, "divergence", False) and not divergence_probes:
            raise ValueError(
                "divergence_probes must be at least 1 for a tracker with divergence=True, got 0"
            )


def check_points(
    rule: Any, rules: Sequence[Rule], concepts: int | None, skip_below: float | None
) -> None:
    """Refuse what cannot be with the unwanted given as points."""
    inner = innermost(rules[0])
    aimless = leads(inner) or isinstance(inner, Unguided)
    if len(rules) > 1 or aimless or asking_rule(rule) is not None:
        raise ValueError(
            f"images must be None for {rule!r}: they are one unwanted concept, for a rule that "
            "leads away from one (SPELL has points of its own)"
        )
    for name, given in (("concepts", concepts), ("skip_below", skip_below)):
        if given is not None:
            raise ValueError(f"{name} must be None with images, got {given!r}")


def check_reference(rule: Any, inner: Rule, reference: str, skip_below: float | None) -> None:
    """Refuse trackers that compare with the unconditional prediction where they cannot."""
    if reference == "positive":
        return
    if leads(inner) or not tracks(inner):
        raise ValueError(
            f"reference must be 'positive' for {rule!r}, which tracks no posterior of "
            "something unwanted, got 'unconditional'"
        )
    if skip_below is not None:
        raise ValueError(
            "skip_below must be None with reference='unconditional', where a skipped "
            f"prediction would be evidence, got {skip_below!r}"
        )


def first_log_posterior(
    given: Tensor | None, rule: Any, inner: Rule, concepts: int | None
) -> Tensor | None:
    """The checked ``initial_log_posterior``, (B,) or (M, B); None: begin with the prior."""
    if given is None:
        return None
    if not tracks(inner):
        raise ValueError(f"initial_log_posterior must be None for {rule!r}, which tracks none")
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(
            f"initial_log_posterior must be a tensor of floating-point numbers, got {given!r}"
        )
    wanted = 1 if concepts is None else 2
    last = given[-1] if given.ndim == wanted + 1 and len(given) else given
    if last.ndim != wanted or (concepts is not None and len(last) != concepts):
        shape = "(B,)" if concepts is None else f"({concepts}, B)"
        raise ValueError(
            f"initial_log_posterior must have shape {shape}, of B images, got {tuple(given.shape)}"
        )
    if not leads(inner) and not bool((last <= 0).all()):
        raise ValueError(
            "initial_log_posterior must be at most 0, logarithms of probabilities, got up to "
            f"{float(last.max()):g}"
        )
    return last.detach()


def check_prediction(name: str, given: Any, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of a prediction, or of latents, which must be that of the latents if it is known.

    Some others would broadcast to it, and guide every image by one of them.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {checks.shown(given)}")
    if shape is not None and tuple(given.shape) != shape:
        raise ValueError(
            f"{name} must have the shape of the latents, {shape}, got {tuple(given.shape)}"
        )
    return tuple(given.shape)


def checked_network(network: Predictions, wanted: int) -> Predictions:
    """The network, whose predictions are checked wherever it is evaluated."""

    def checked(x: Tensor) -> Sequence[Tensor]:
        found = list(network(x))
        shapes = [tuple(prediction.shape) for prediction in found]
        if shapes != [tuple(x.shape)] * wanted:
            raise ValueError(
                f"network must return {wanted} predictions of the shape of x, {tuple(x.shape)}, "
                f"got {len(found)}, of shapes {', '.join(map(str, shapes))}"
            )
        return found

    return checked


# ---------------------------------------------------------------------- plans


def plans_of(
    given: Sequence[Rule],
    steps: SchedulerRun,
    *,
    cfg_scale: float | None,
    divergence_probes: int,
    device: torch.device,
) -> tuple[list[StepPlan], list[StepPlan]]:
    """Plans for guiding and plans for updating posteriors, each with one plan per rule.

    Parameters
    ----------
    given : sequence of Rule
        What :func:`checked_rules` returned.
    steps : SchedulerRun
        The steps of the run.
    cfg_scale, divergence_probes
        As for :class:`dng_models.pipelines.guided_chain.GuidedChain`.
    device : torch.device
        Device of the predictions.
    """
    noiseless = bool(np.any(steps.coefficients.eta[:-1] < 1.0 - 1e-6))
    probed = divergence_probes > 0 and noiseless
    rules = [with_divergence(rule, probed) for rule in given]
    plans = [
        StepPlan(
            steps.coefficients,
            rule,
            prediction_type=steps.prediction_type,
            cfg_scale=cfg_scale,
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
