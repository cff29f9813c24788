"""Diffusers pipelines with an exact Gaussian mixture as the network.

The error of a tracked posterior comes partly from the network and partly from the scheduler, whose
steps are finite and have more or less noise.  To measure the scheduler's part alone, the network
must be exact.  A diffused mixture has scores and posteriors in closed form, so
:class:`MixtureDenoiser` can take the place of ``pipe.unet`` in a real pipeline with any scheduler,
and also gives the exact posterior.

With ``V_k = alpha^2 C_k + sigma^2 I`` and ``y_k = V_k^-1 (x - alpha m_k)``, component k predicts
``eps_k = sigma y_k`` and ``x0_k = m_k + alpha C_k y_k``.  A set of components predicts their mean,
weighted by responsibilities (Tweedie's formula, exact for Gaussians, finite at alpha = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

from dng_math import GaussianMixture, checks
from dng_math.rules import Rule
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.mixture_denoiser import MixtureDenoiser, MixtureTransformer
from dng_models.support.threads import torch_threads

_FLOW = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)


def mixture_pipeline(
    mixture: GaussianMixture,
    concepts: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
    scheduler: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A real pipeline whose network is an exact mixture, without text encoder and VAE.

    Parameters
    ----------
    mixture, concepts, shape, scheduler, dtype
        As for :class:`MixtureDenoiser`.

    Returns
    -------
    StableDiffusionPipeline, or StableDiffusion3Pipeline for flow-matching schedulers
        Call it with :meth:`MixtureDenoiser.prompts` and ``output_type="latent"``.

    Raises
    ------
    ValueError, TypeError
        As for :class:`MixtureDenoiser`.

    Examples
    --------
    >>> pipe = mixture_pipeline(mixture, [[0]], (2, 2, 2), DDPMScheduler(clip_sample=False))
    >>> pipe(**pipe.unet.prompts(16), guidance_scale=2.0, output_type="latent").images.shape
    torch.Size([16, 2, 2, 2])
    """
    if isinstance(scheduler, _FLOW):
        pipe = StableDiffusion3Pipeline(
            transformer=MixtureTransformer(mixture, concepts, shape, scheduler, dtype=dtype),
            scheduler=scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    else:
        pipe = StableDiffusionPipeline(
            unet=MixtureDenoiser(mixture, concepts, shape, scheduler, dtype=dtype),
            scheduler=scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True, eq=False)
class MixtureRun:
    """Result of a guided run over an exact mixture; S steps, B images.

    Attributes
    ----------
    latents : Tensor, shape (B, channels, height, width)
        The latents that the pipeline returned.
    tracked, exact : Tensor, shape (S, B), float64
        p(c | x_t) at the beginning of every step: as tracked, and the exact value.
    scale : Tensor, shape (S, B)
        The scale lambda of every step and image.
    evaluations, evaluations_saved : int
        Numbers of unwanted predictions that were made and that were skipped.
    """

    latents: Tensor
    tracked: Tensor
    exact: Tensor
    scale: Tensor
    evaluations: int
    evaluations_saved: int

    @property
    def error(self) -> float:
        """Mean |tracked - exact| over the images at the beginning of the last step."""
        return float((self.tracked[-1] - self.exact[-1]).abs().mean())

    @property
    def correlation(self) -> float:
        """Correlation of tracked and exact posterior over the images, as for :attr:`error`."""
        return float(torch.corrcoef(torch.stack([self.tracked[-1], self.exact[-1]]))[0, 1])


def run_mixture(
    pipe: Any,
    rule: Rule,
    *,
    images: int,
    steps: int,
    seed: int = 0,
    eta: float = 0.0,
    divergence_probes: int = 0,
    skip_below: float | None = None,
) -> MixtureRun:
    """Run a pipeline of :func:`mixture_pipeline` under guidance away from its first concept.

    Parameters
    ----------
    pipe : StableDiffusionPipeline or StableDiffusion3Pipeline
        From :func:`mixture_pipeline`.
    rule : Rule
        A rule that tracks a posterior, such as :meth:`dng_math.DynamicNegativeGuidance.tracked`.
    images, steps, seed : int
        Batch size, number of inference steps, and seed of the pipeline's generator.
    eta : float
        The ``eta`` of the pipeline's call, for a DDIM scheduler.
    divergence_probes, skip_below
        As for :func:`dng_models.apply_guidance`.

    Returns
    -------
    MixtureRun

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    if not isinstance(getattr(pipe, "unet", getattr(pipe, "transformer", None)), MixtureDenoiser):
        raise TypeError(f"pipe must be a pipeline of mixture_pipeline, got {pipe!r}")
    checks.integer("images", images, 1)
    checks.integer("steps", steps, 1)
    checks.integer("seed", seed, 0)
    checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
    flow = isinstance(pipe, StableDiffusion3Pipeline)
    network = pipe.transformer if flow else pipe.unet
    exact: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, t = (named["hidden_states"], named["timestep"]) if flow else given
        exact.append(network.log_posterior(x[:images], t).exp())

    watching = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with (
            torch_threads(work=images * network.mixture.means.size),
            apply_guidance(
                pipe, rule, divergence_probes=divergence_probes, skip_below=skip_below
            ) as trace,
        ):
            latents = pipe(
                **network.prompts(images),
                **({} if flow else {"eta": eta}),
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images
    finally:
        watching.remove()
    if trace.log_posterior is None:
        raise ValueError(f"rule must track a posterior, got {rule!r}")
    return MixtureRun(
        latents=latents,
        tracked=trace.log_posterior.double().exp(),
        # The first call, with which the layout is checked, begins a run that is stopped.
        exact=torch.stack(exact[-len(trace.log_posterior) :]).cpu(),
        scale=trace.scale,
        evaluations=trace.evaluations,
        evaluations_saved=trace.evaluations_saved,
    )
