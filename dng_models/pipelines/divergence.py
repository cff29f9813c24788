"""Estimate with the network the divergence that a tracker needs if eta < 1.

Derived; docs/theory.md, section 6.9.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dng_math.rules import DynamicNegativeGuidance, LimitedInterval, Rule
from dng_math.trackers import LogOddsTracker, PaperTracker
from dng_models.pairs.divergence import Predictions, predictions_and_traces, quieter
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.schedulers import sample_keys


def with_divergence(rule: Rule, wanted: bool) -> Rule:
    """The rule, with the divergence term of its tracker switched on or off.

    Parameters
    ----------
    rule : Rule
        Rules without such a tracker are returned as they are.
    wanted : bool
        Whether the tracker uses the term.

    Returns
    -------
    Rule
    """
    if isinstance(rule, LimitedInterval):
        return replace(rule, rule=with_divergence(rule.rule, wanted))
    if isinstance(rule, DynamicNegativeGuidance) and isinstance(
        rule.posterior, PaperTracker | LogOddsTracker
    ):
        return replace(rule, posterior=replace(rule.posterior, divergence=wanted))
    return rule


def divergence_gaps(
    run: GuidedRun, x: Tensor, network: Predictions, probes: int, *, named: str
) -> Tensor:
    """Hutchinson's estimate of div s_c - div s for every concept c and image.

    The score is s = (alpha x0 - x) / sigma^2, so div s_c - div s is alpha / sigma^2 times the
    difference of the divergences of x0.  v . J v, with J the Jacobian of x0, estimates the
    latter without bias for random signs v.  The signs are a function of the image's first
    latents: if all images shared them, all estimates of a run would err in the same direction.

    Parameters
    ----------
    run : GuidedRun
        The run, at the step whose predictions the network makes.
    x : Tensor, shape (B, ...)
        The network's input.
    network : callable
        Maps a tensor like x to the base prediction and those of the M concepts.
    probes : int
        Number of random sign vectors; each takes one forward derivative of the network.
    named : str
        The argument that asks for derivatives, for messages.

    Returns
    -------
    Tensor, shape (M, B), dtype of the trackers' state

    Raises
    ------
    ValueError
        If the network has no forward derivative.
    """
    x = x.float()
    if run.keys is None:
        run.keys = sample_keys(x).to(x.device)
    c, i = run.steps.coefficients, run.step

    def images(at: Tensor) -> list[Tensor]:
        return [run.x0(at, prediction) for prediction in network(at)]

    # Keys apart from PosteriorFlowScheduler's, which draws its noise from those of the image.
    # Where alpha is 0, x0 is the same everywhere.
    check = c.alpha_t[i] > 0 and not run.has_derivative
    _, traces, spreads = predictions_and_traces(
        images, x, run.keys, i, probes, named=named, check=check
    )
    run.has_derivative = run.has_derivative or check
    assert run.state is not None
    to_score = float(c.alpha_t[i] / c.sigma_t[i] ** 2)
    log_p = run.log_posterior(run.state).reshape(len(traces) - 1, -1)
    gaps = quieter((traces[1:] - traces[:1]) * to_score, spreads[1:] * to_score**2, log_p)
    return gaps.to(run.state.dtype)
