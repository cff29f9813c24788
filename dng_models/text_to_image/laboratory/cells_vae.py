"""A VAE without weights: the latents of a picture are its pixels, one cell at each position."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin
from diffusers import ModelMixin as ModelMixin  # looked for here when a saved pipeline is loaded
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn import functional

from dng_math import checks

LOG_VARIANCE = -30.0  # of an exact encoding, as diffusers clamps it


class CellVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """``latents = scaling_factor (pixels - centre)``, with the pixels of a cell as channels.

    It has the interface of diffusers' ``AutoencoderKL``, whose users multiply by the scaling
    factor themselves.

    Parameters
    ----------
    cell : int
        Width and height of a cell in pixels, a power of 2; pipelines take it for their latents'
        scale factor.
    centre : tuple of three floats
        The colour, in [-1, 1], that becomes 0.
    scaling_factor : float
        Factor from pixels to latents.
    block_out_channels, latent_channels : None
        Their values follow from ``cell``; a saved configuration has them for those who read it.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        cell: int = 16,
        centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
        scaling_factor: float = 0.5,
        block_out_channels: tuple[int, ...] | None = None,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__()
        checks.integer("cell", cell, 1)
        if cell & (cell - 1):
            raise ValueError(f"cell must be a power of 2, got {cell}")
        checks.positive("scaling_factor", scaling_factor)
        values = checks.array("centre", centre, (3,))
        # Pipelines read the scale factor from the number of an AutoencoderKL's blocks.
        self.register_to_config(
            block_out_channels=[1] * cell.bit_length(), latent_channels=3 * cell**2
        )
        centre_of_channels = torch.tensor(values, dtype=torch.float32)[:, None, None]
        self.register_buffer("middle", centre_of_channels)

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Latents of pictures, before the scaling factor, as a distribution without variance.

        Parameters
        ----------
        x : Tensor, shape (B, 3, height, width)
            Pixels in [-1, 1].
        return_dict : bool
            Whether to return an output object or a tuple.
        """
        mean = functional.pixel_unshuffle(x - self.middle, self.config.cell)
        moments = torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], 1)
        found = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures of latents that were divided by the scaling factor.

        Parameters
        ----------
        z : Tensor, shape (B, 3 cell^2, rows, columns)
            The latents.
        return_dict : bool
            Whether to return an output object or a tuple.
        generator : None
            Not used.
        """
        pixels = functional.pixel_shuffle(z, self.config.cell) + self.middle
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
