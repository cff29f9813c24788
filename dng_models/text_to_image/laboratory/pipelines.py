"""A real Stable Diffusion pipeline on a laboratory's world, whose predictions are exact."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin, StableDiffusionPipeline

from dng_models.text_to_image.laboratory.cells_vae import CellVAE
from dng_models.text_to_image.laboratory.denoiser import PREDICTIONS, ExactDenoiser
from dng_models.text_to_image.laboratory.reader import (
    CaptionEncoder,
    EmbeddingReader,
    caption_tokenizer,
)
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.laboratory.worlds import World

# Stable Diffusion's schedule.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PICTURES_OF = 8  # pipelines take heights and widths that this divides


def laboratory_pipeline(
    world: World | None = None,
    scheduler: SchedulerMixin | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """An unmodified ``StableDiffusionPipeline`` whose predictions are those of a known world.

    Prompts are captions of the world (:mod:`.captions`), and other prompts are errors.

    Parameters
    ----------
    world : World, optional
        Default: the laboratory's.
    scheduler : SchedulerMixin, optional
        Default: DDPM with Stable Diffusion's betas, from the last timestep on.  Its betas and its
        prediction type are the network's; another scheduler may take its place if it has the
        same.
    dtype : torch.dtype
        Dtype of the latents.

    Returns
    -------
    StableDiffusionPipeline

    Raises
    ------
    ValueError, TypeError
        If an argument is not allowed, or pipelines cannot draw pictures of the world's size.

    Examples
    --------
    >>> pipe = laboratory_pipeline()
    >>> pipe("an english breakfast with egg", num_inference_steps=50, guidance_scale=1).images[0]
    """
    if world is None:
        world = laboratory_world()
    if not isinstance(world, World):
        raise TypeError(f"world must be a World or None, got {world!r}")
    sizes = [count * world.cell for count in (world.rows, world.columns)]
    if any(size % PICTURES_OF for size in sizes):
        raise ValueError(
            f"world must have pictures whose height and width {PICTURES_OF} divides, got {sizes}"
        )
    if scheduler is None:
        scheduler = DDPMScheduler(
            **BETAS, clip_sample=False, steps_offset=1, timestep_spacing="trailing"
        )
    if isinstance(scheduler, type) or not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(
            "scheduler must be a diffusers scheduler with alphas_cumprod, or None, got "
            f"{scheduler!r}"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"scheduler must predict one of {', '.join(PREDICTIONS)}, got {kind}")
    tokenizer = caption_tokenizer(world)
    pipe: Any = StableDiffusionPipeline(
        vae=CellVAE(world.cell, world.centre, world.scale),
        text_encoder=CaptionEncoder(dtype=dtype),
        tokenizer=tokenizer,
        unet=ExactDenoiser(
            EmbeddingReader(world, tokenizer),
            scheduler.alphas_cumprod,
            prediction_type=kind,
            dtype=dtype,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
