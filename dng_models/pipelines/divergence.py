"""Estimate with the network the divergence that a tracker needs if eta < 1.

Derived; docs/theory.md, section 6.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dng_kernels import standard_normal
from dng_math.rules import DynamicNegativeGuidance, LimitedInterval, Rule
from dng_math.trackers import LogOddsTracker, PaperTracker
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.schedulers import sample_keys

Network = Callable[[Tensor], Sequence[Tensor]]


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
        posterior = replace(rule.posterior, divergence=wanted)
        return DynamicNegativeGuidance(rule.guidance_scale, posterior)
    return rule


def divergence_gaps(run: GuidedRun, x: Tensor, network: Network, probes: int) -> Tensor:
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

    def images(at: Tensor) -> Tensor:
        return torch.stack([run.x0(at, p) for p in network(at)])

    total: Tensor | None = None
    for probe in range(probes):
        # Offset the keys: PosteriorFlowScheduler draws its noise from the keys themselves.
        v = standard_normal(run.keys + (probe + 1), x.shape, step=i).sign()
        # Neither fused attention nor compiled code has a forward derivative.
        try:
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                tangent = torch.func.jvp(images, (x,), (v,))[1]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "divergence_probes must be 0 for a network without a forward derivative, got "
                f"{probes}; torch says: {error}"
            ) from error
        dots = (v * tangent).flatten(2).sum(-1)
        total = dots if total is None else total + dots
    assert total is not None
    factor = c.alpha_t[i] / c.sigma_t[i] ** 2 / probes
    assert run.state is not None
    return ((total[1:] - total[:1]) * factor).to(run.state.dtype)
