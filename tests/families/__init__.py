"""Tiny pipelines of every family of diffusers that a negative prompt can be given to."""

from tests.families import early, latent_diffusion, separate, transformers
from tests.families.base import FAMILIES, Family, final_latents

__all__ = [
    "FAMILIES",
    "Family",
    "early",
    "final_latents",
    "latent_diffusion",
    "separate",
    "transformers",
]
