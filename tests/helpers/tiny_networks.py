"""Networks with a few thousand random weights, for tests that do not depend on trained ones."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel


def tiny(seed: int, *, labels: int | None = None, channels: int = 1, side: int = 8) -> UNet2DModel:
    """A network with random weights; by default for images of the size of the digits."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=labels,
    )
