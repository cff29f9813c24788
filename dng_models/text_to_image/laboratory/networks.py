"""The networks of the trained pipeline: CLIP's text encoder and Stable Diffusion's UNet, small.

All are diffusers' and transformers' own classes, with random weights.  A picture of two by two
cells is 768 x 2 x 2 latents, so that the UNet has one level, and a padded 3x3 convolution on it is
one matrix product with 2.25 times fewer multiplications: :func:`folded_convolutions`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dng_models.text_to_image.laboratory.cells_vae import CellVAE
from dng_models.text_to_image.laboratory.pipelines import BETAS
from dng_models.text_to_image.laboratory.reader import caption_tokenizer
from dng_models.text_to_image.laboratory.worlds import World

TOKENS = 24  # of a prompt; the longest of those that are trained on has 19
HEADS = 4
GROUPS = 8
LINEAR = 2.0


def trained_tokenizer(world: World) -> CLIPTokenizer:
    """The tokenizer of the trained pipeline: the laboratory's, for short prompts."""
    tokenizer = caption_tokenizer(world)
    tokenizer.model_max_length = TOKENS
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A CLIPTextModel with random weights, from torch's global generator.

    Parameters
    ----------
    tokenizer : CLIPTokenizer
        Whose tokens it reads.
    width : int
        Size of the embedding of a token, a multiple of 4.
    layers : int
        Number of layers.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(world: World, channels: int, text_width: int) -> UNet2DConditionModel:
    """A UNet2DConditionModel with random weights, from torch's global generator.

    Parameters
    ----------
    world : World
        Whose latents it sees.
    channels : int
        Width of all its layers, a multiple of 8.
    text_width : int
        Size of the embedding of a token.
    """
    pixels, rows, columns = world.latent_shape
    return UNet2DConditionModel(
        sample_size=rows if rows == columns else (rows, columns),
        in_channels=pixels,
        out_channels=pixels,
        block_out_channels=(channels,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",),
        conv_in_kernel=1,
        conv_out_kernel=1,
        norm_num_groups=GROUPS,
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=HEADS,
    )


def start_from_pictures(net: UNet2DConditionModel, latents: Tensor, seed: int) -> None:
    """Set a UNet's first and last weights to the principal components of the cells of pictures.

    The objects of a world lie in a space of about a hundred of the 768 dimensions of a cell.
    Knowing it from the start takes a third off the first few hundred updates.

    Parameters
    ----------
    net : UNet2DConditionModel
        Of :func:`make_unet`, on the CPU.
    latents : Tensor, shape (N, pixels, rows, columns)
        Pictures of the world.
    seed : int
        Of the rotations, which spread the components over all groups of channels.
    """
    cells = latents.detach().cpu().double().transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(cells @ cells.T / cells.shape[1])
    channels = min(net.conv_in.out_channels, len(values))
    values, vectors = values[-channels:].clamp(min=0.0), vectors[:, -channels:]
    generator = torch.Generator().manual_seed(seed)

    def rotation() -> Tensor:
        noise = torch.randn(net.conv_in.out_channels, channels, generator=generator)
        return torch.linalg.qr(noise.double())[0]

    with torch.no_grad():
        net.conv_in.weight.copy_((rotation() @ vectors.T)[:, :, None, None])
        # Small, so that the first prediction is about the mean picture.
        last = 0.1 * (vectors * values.sqrt()) @ rotation().T
        net.conv_out.weight.copy_(last[:, :, None, None])
        # Here the last activation is almost linear, so that a clear picture may pass through.
        net.conv_norm_out.bias.fill_(LINEAR)
        net.conv_out.bias.copy_(-functional.silu(torch.tensor(LINEAR)) * last.sum(1))


def trained_pipeline(
    world: World,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """An unmodified StableDiffusionPipeline of trained networks, with a DDPM scheduler."""
    pipe: Any = StableDiffusionPipeline(
        vae=CellVAE(world.cell, world.centre, world.scale),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            **BETAS,
            clip_sample=False,
            steps_offset=1,
            timestep_spacing="trailing",
            prediction_type="sample",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- fast convolutions


@contextmanager
def folded_convolutions(net: nn.Module) -> Iterator[None]:
    """Within the context, a network's convolutions of few pixels are matrix products.

    The weights stay those of the convolutions, and gradients reach them.

    Parameters
    ----------
    net : Module
        All of whose two-dimensional convolutions have stride 1 and keep the size.
    """
    convolutions = [each for each in net.modules() if isinstance(each, nn.Conv2d)]
    for each in convolutions:
        each.forward = functools.partial(_folded, each)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for each in convolutions:
            del each.forward


@functools.lru_cache(maxsize=16)
def _places(side: int, rows: int, columns: int) -> Tensor:
    """Which weight links two pixels: 0 or 1, shape (side^2, pixels to x pixels from)."""
    y, x = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    down, right = (each[None] - each[:, None] + side // 2 for each in (y, x))
    there = (down >= 0) & (down < side) & (right >= 0) & (right < side)
    weight = torch.where(there, down * side + right, -1)
    return (weight == torch.arange(side**2)[:, None, None]).float().flatten(1)


def _folded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution's result, by one matrix product."""
    images, inward, rows, columns = x.shape
    side, outward, pixels = conv.kernel_size[0], conv.out_channels, rows * columns
    if side == 1:
        weight = conv.weight[:, :, 0, 0]
        # Contiguous, because a product of the view takes up to eighteen times as long.
        flat = functional.linear(x.flatten(2).transpose(1, 2).contiguous(), weight, conv.bias)
        return flat.transpose(1, 2).reshape(images, outward, rows, columns)
    places = _places(side, rows, columns).to(conv.weight)
    matrix = (conv.weight.reshape(-1, side**2) @ places).reshape(outward, inward, pixels, pixels)
    matrix = matrix.transpose(1, 2).reshape(outward * pixels, inward * pixels)
    found = functional.linear(x.reshape(images, -1), matrix)
    found = found.reshape(images, outward, rows, columns)
    return found if conv.bias is None else found + conv.bias[:, None, None]
