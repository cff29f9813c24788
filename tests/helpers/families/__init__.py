"""Tiny pipelines of every family of diffusers that takes a negative prompt."""

from tests.helpers.families import early, latent_diffusion, separate, transformers
from tests.helpers.families.base import FAMILIES, Family, built, final_latents

__all__ = [
    "FAMILIES",
    "Family",
    "built",
    "early",
    "final_latents",
    "latent_diffusion",
    "separate",
    "transformers",
]
