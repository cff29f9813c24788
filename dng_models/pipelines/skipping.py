"""Decide which unwanted predictions can be skipped, because they would hardly change the image.

A skipped prediction leaves the posterior as it was: unseen evidence does not change it on average,
since p is a martingale.  Only the upper bound of the scale allows for evidence that was missed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dng_math.rules import Rule, innermost
from dng_math.trackers import LogOddsTracker, PaperTracker
from dng_models.pipelines.guided_run import GuidedRun

# Standard deviations of unseen evidence in the upper bound, and the number of skipped steps after
# which a prediction is made in any case.
BOUND_DEVIATIONS = 3.0
LONGEST_SKIP = 8


def matters(run: GuidedRun) -> bool:
    """Whether unwanted predictions can still have an effect: not after the rule's interval."""
    active = torch.stack([plan.column("active") for plan in run.plans])
    if run.plan.tracker is None:
        return bool((active[:, run.step] > 0).any())
    return bool((active[:, run.step :] > 0).any())


def scale_bound(run: GuidedRun, batch: int) -> Tensor:
    """An upper bound of every image's scale; infinite while no posterior is tracked.

    It is the scale at the tracked state plus the evidence that skipped steps may have added under
    either hypothesis: each log ratio has mean at most tau q / 2 and variance tau^2 q, where
    q = |gap|^2 / v for the gap that was seen last.

    Parameters
    ----------
    run : GuidedRun
        The run, at the step to decide about.
    batch : int
        Number of images B.

    Returns
    -------
    Tensor, shape (B,)
    """
    if run.state is None or run.plan.tracker is None:
        return torch.full((batch,), math.inf, device=run.plan.device)
    bound = run.state
    if run.unseen_mean is not None and run.unseen_var is not None:
        bound = bound + run.unseen_mean + BOUND_DEVIATIONS * run.unseen_var.sqrt()
    p = run.log_posterior(bound).exp()
    total = (p.sum(0) if p.ndim == 2 else p).clamp(max=1.0 - 1e-6)
    strongest = max(abs(run.column("guidance_scale", plan)) for plan in run.plans)
    return strongest * total / (1.0 - total)


def expect(run: GuidedRun) -> None:
    """Record after a step's predictions which gaps were seen, and bound the unseen evidence.

    Parameters
    ----------
    run : GuidedRun
        Its ``gap_sq``, ``unseen_mean``, ``unseen_var`` and ``skipped`` are updated.
    """
    assert run.base is not None and run.evaluated is not None
    if run.state is None:
        return
    seen = run.evaluated.to(run.state.device)
    sizes = torch.stack([(o - run.base).float().flatten(1).square().sum(1) for o in run.others])
    if run.state.ndim == 1:
        sizes = sizes[0]
    if run.gap_sq is None:
        run.gap_sq = torch.zeros_like(sizes)
        run.unseen_mean = torch.zeros_like(sizes)
        run.unseen_var = torch.zeros_like(sizes)
        run.skipped = torch.zeros_like(seen, dtype=torch.int64)
    assert run.unseen_mean is not None and run.unseen_var is not None
    assert run.skipped is not None
    run.gap_sq = torch.where(seen, sizes, run.gap_sq)
    factor = run.column("transition_factor")
    if run.plan.clip is not None:
        factor *= run.column("x0_factor")
    variance = run.column("variance")
    temperature = max(run.column("temperature", plan) for plan in run.plans)
    q = run.gap_sq * (factor * factor / variance) if variance > 0 else 0.0 * run.gap_sq
    zero = torch.zeros_like(q)
    run.unseen_mean = torch.where(seen, zero, run.unseen_mean + temperature * q / 2.0)
    run.unseen_var = torch.where(seen, zero, run.unseen_var + temperature**2 * q)
    run.skipped = torch.where(seen, 0, run.skipped + 1)


def warn_of_blindness(run: GuidedRun, rules: Sequence[Rule], skip_below: float) -> None:
    """Warn if predictions are skipped as soon as the posterior falls a little.

    Parameters
    ----------
    run : GuidedRun
        The run, at its beginning.
    rules : sequence of Rule
        One for each of its plans.
    skip_below : float
        Predictions are skipped while the bound of the scale is below this.
    """
    for rule, plan in zip(rules, run.plans, strict=True):
        if not isinstance(plan.tracker, PaperTracker | LogOddsTracker):
            return
        odds = plan.tracker.odds(plan.tracker.init(np.array(plan.tracker.prior)))
        start = abs(getattr(innermost(rule), "guidance_scale", 0.0)) * float(odds)
        if skip_below > start / 2.0:
            warnings.warn(
                "skip_below should be well below the scale that guidance starts with, "
                f"g prior / (1 - prior) = {start:.3g} (a tenth costs nothing), got "
                f"{skip_below:g}: a posterior is only updated where predictions are made",
                stacklevel=2,
            )
            return
