"""Unwanted images as points in a pipeline's latents, for guidance without a negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dng_models.pairs.points import checked_points

Images = Tensor | Sequence[Image.Image | np.ndarray[Any, Any]]


@torch.no_grad()
def points_of(pipe: Any, images: Images) -> Tensor:
    """Images as x0 of a pipeline's network, (K, ...), on the CPU.

    Parameters
    ----------
    pipe : DiffusionPipeline
        With a VAE that has a scaling factor, or none: its latents then are the pixels, in [-1, 1].
    images : Tensor or sequence of images
        A tensor is taken as it is, as K latents, scaled as the network's own x0.  PIL images, or
        arrays (height, width, channels) as diffusers' ``image_processor`` reads them, all of one
        size, are encoded.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    if isinstance(images, Tensor):
        try:
            return checked_points(images)
        except ValueError as error:
            raise ValueError(f"images, as latents: {error}") from None
    if isinstance(images, str | bytes) or not isinstance(images, Sequence) or len(images) == 0:
        raise TypeError(
            f"images must be a tensor of latents, or a sequence of images, at least one; got "
            f"{images!r}"
        )
    for image in images:
        if not isinstance(image, Image.Image | np.ndarray):
            raise TypeError(f"images must be PIL images or NumPy arrays, got {image!r}")
    vae, processor = getattr(pipe, "vae", None), getattr(pipe, "image_processor", None)
    config, name = getattr(vae, "config", None), type(pipe).__name__
    if vae is None:
        return torch.cat([_pixels(image) for image in images])
    mean = getattr(config, "latents_mean", None)
    scaling = getattr(config, "scaling_factor", None)
    if processor is None or scaling is None or mean is not None:
        raise ValueError(
            f"images must be given as latents, a tensor (K, ...) as the network of this {name} "
            f"sees its x0: how its {type(vae).__name__} scales them is not known"
        )
    sizes = {image.size if isinstance(image, Image.Image) else image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images must have one size, got {sorted(sizes)}")
    pixels = processor.preprocess(list(images)).to(vae.device, vae.dtype)
    found = vae.encode(pixels)
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    shift = getattr(config, "shift_factor", None) or 0.0
    return checked_points((latents.float() - shift) * scaling)


def _pixels(image: Image.Image | np.ndarray[Any, Any]) -> Tensor:
    """An image as pixels in [-1, 1], (1, channels, height, width)."""
    array = np.asarray(image)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255.0
    if array.ndim == 2:
        array = array[..., None]
    return checked_points(
        torch.from_numpy(2.0 * array.astype(np.float32) - 1.0).movedim(-1, 0)[None]
    )
