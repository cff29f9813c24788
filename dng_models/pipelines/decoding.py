"""Decode a pipeline's latents to images, as the pipeline does at the end of a run."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Images of latents in the scheduler's units.

    Parameters
    ----------
    pipe : DiffusionPipeline
        With a VAE of images; without a VAE the latents are the pixels, in [-1, 1].
    latents : Tensor, shape (N, C, height, width)
        Such as a prediction of x0.

    Returns
    -------
    Tensor, shape (N, 3, H, W), float32
        In [0, 1], but for what the decoder makes beyond it.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 0.5 * latents.float() + 0.5
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    latents = latents.to(vae.dtype)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        mean_, std_ = (torch.tensor(each).to(latents).view(shape) for each in (mean, std))
        latents = latents * std_ / vae.config.scaling_factor + mean_
    else:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = latents / vae.config.scaling_factor + shift
    # SDXL's VAE overflows in float16.
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
        latents = latents.float()
    try:
        found = vae.decode(latents, return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    return 0.5 * found.float() + 0.5


class ImageDecoder:
    """Decodes latents of a pipeline to PIL images.

    Parameters
    ----------
    pipe : DiffusionPipeline
        Whose VAE makes images of latents of shape (N, C, height, width), or whose latents are the
        pixels.

    Raises
    ------
    ValueError
        If the pipeline is known to make something else.
    """

    def __init__(self, pipe: Any) -> None:
        vae, name = getattr(pipe, "vae", None), type(pipe).__name__
        if vae is None:
            network = getattr(pipe, "unet", None)
            channels = getattr(getattr(network, "config", None), "in_channels", None)
            if channels not in (3, 6):  # 6: the pixels and a picture to be enlarged
                raise ValueError(
                    f"decode must be given, a callable from latents to images: this {name} has no "
                    "VAE, and its latents are not known to be pixels; got None"
                )
        elif not hasattr(getattr(vae, "config", None), "scaling_factor"):
            raise ValueError(
                f"decode must be given, a callable from latents to images: the VAE of this {name} "
                f"is a {type(vae).__name__} without a scaling_factor; got None"
            )
        self._pipe = pipe

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """The images of latents, shape (N, C, height, width).

        Raises
        ------
        ValueError
            If the latents have another shape: those of videos, or packed to tokens.
        """
        pipe = self._pipe
        vae = getattr(pipe, "vae", None)
        channels = getattr(vae.config, "latent_channels", None) if vae is not None else 3
        if latents.ndim != 4 or (channels is not None and latents.shape[1] != channels):
            raise ValueError(
                "decode must be given, a callable from latents to images: those of this "
                f"{type(pipe).__name__} have shape {tuple(latents.shape)}, which its VAE does not "
                "decode as they are (a video's, or packed to tokens); got None"
            )
        pixels = decoded(pipe, latents).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
        eight_bit = (pixels * 255.0).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        return [Image.fromarray(each) for each in eight_bit]
