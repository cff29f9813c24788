"""Tiny randomly initialised pipelines of real diffusers and transformers classes; no downloads.

They make noise, not pictures, but run the same code as the large ones, in tenths of a second on one
core, for tests and first tries of a command line.  The seed determines all weights.  Text is read
byte by byte, so that the networks see different words differently; 75 bytes of a prompt are read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)

from dng_math import checks

DiscretePrediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: tuple[DiscretePrediction, ...] = ("epsilon", "v_prediction", "sample")
WIDTH = 32
IMAGE_SIZE = 16
TOKENS = 77


def tiny_stable_diffusion(
    seed: int = 0,
    *,
    scheduler: SchedulerMixin | None = None,
    prediction_type: DiscretePrediction = "epsilon",
) -> StableDiffusionPipeline:
    """Stable Diffusion of 16 x 16 images and 4 x 8 x 8 latents.

    Parameters
    ----------
    seed : int
        Seed of the weights, in [0, 2^63).
    scheduler : SchedulerMixin, optional
        The scheduler; default: DDIM with Stable Diffusion's betas.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        Prediction type of the default scheduler.  A given scheduler has its own.

    Returns
    -------
    StableDiffusionPipeline

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    with _weights_of(seed):
        return _silent(
            StableDiffusionPipeline(
                **_latent_parts(scheduler, prediction_type),
                unet=_unet(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def tiny_controlnet(
    seed: int = 0,
    *,
    scheduler: SchedulerMixin | None = None,
    prediction_type: DiscretePrediction = "epsilon",
) -> StableDiffusionControlNetPipeline:
    """:func:`tiny_stable_diffusion` with a ControlNet; its conditioning image is 16 x 16 RGB.

    Parameters and errors as for :func:`tiny_stable_diffusion`.
    """
    with _weights_of(seed):
        parts = _latent_parts(scheduler, prediction_type)
        unet = _unet()
        controlnet = ControlNetModel(
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            conditioning_embedding_out_channels=(16, WIDTH),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        # A new ControlNet's outputs are zero, so its image would have no effect.
        for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            nn.init.normal_(layer.weight, std=0.1)
        nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
        return _silent(
            StableDiffusionControlNetPipeline(
                **parts,
                unet=unet,
                controlnet=controlnet,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def tiny_stable_diffusion_xl(
    seed: int = 0,
    *,
    scheduler: SchedulerMixin | None = None,
    prediction_type: DiscretePrediction = "epsilon",
) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL of 16 x 16 images and 4 x 8 x 8 latents.

    It has two text encoders; the network also takes the pooled text and six sizes.  Parameters and
    errors as for :func:`tiny_stable_diffusion`.
    """
    with _weights_of(seed):
        parts = _latent_parts(scheduler, prediction_type)
        return _silent(
            StableDiffusionXLPipeline(
                **parts,
                unet=_unet(xl=True),
                text_encoder_2=CLIPTextModelWithProjection(_text_config()),
                tokenizer_2=_tokenizer(),
                add_watermarker=False,
            )
        )


def tiny_stable_diffusion_3(
    seed: int = 0, *, scheduler: SchedulerMixin | None = None
) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 of 16 x 16 images and 4 x 8 x 8 latents.

    Its third text encoder is a T5 that reads bytes, like ByT5.

    Parameters
    ----------
    seed : int
        Seed of the weights, in [0, 2^63).
    scheduler : SchedulerMixin, optional
        The scheduler; default: flow-matching Euler with shift 3, as for SD3.

    Returns
    -------
    StableDiffusion3Pipeline

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    if scheduler is None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    _check_scheduler(scheduler)
    tokenizer = ByT5Tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
    )
    with _weights_of(seed):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=16,
        )
        return _silent(
            StableDiffusion3Pipeline(
                transformer=transformer,
                scheduler=scheduler,
                vae=_vae(shift_factor=0.0609),
                text_encoder=CLIPTextModelWithProjection(_text_config()),
                tokenizer=_tokenizer(),
                text_encoder_2=CLIPTextModelWithProjection(_text_config()),
                tokenizer_2=_tokenizer(),
                text_encoder_3=T5EncoderModel(t5),
                tokenizer_3=tokenizer,
            )
        )


def tiny_ddpm(seed: int = 0) -> DDPMPipeline:
    """Unconditional DDPM of 16 x 16 RGB images, around ``tiny_unet(seed)``."""
    return _silent(DDPMPipeline(unet=tiny_unet(seed), scheduler=DDPMScheduler()))


def tiny_unet(seed: int = 0) -> UNet2DModel:
    """The network of :func:`tiny_ddpm`; another seed serves as the unwanted one."""
    with _weights_of(seed):
        return UNet2DModel(
            sample_size=IMAGE_SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()


def tiny_clip(seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """Model and processor of a CLIP for 32 x 32 images, with the pipelines' tokenizer."""
    with _weights_of(seed):
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        config = CLIPModel.config_class(
            text_config=_text_config().to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=WIDTH,
        )
        model = CLIPModel(config).eval()
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    return model, CLIPProcessor(image_processor=images, tokenizer=_tokenizer())


@contextmanager
def _weights_of(seed: int) -> Iterator[None]:
    """Draw weights from the seed within a block, and restore the global generators after it."""
    checks.integer("seed", seed, 0, 2**63 - 1)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        yield


def _silent(pipe: DiffusionPipeline) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_scheduler(scheduler: object) -> None:
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"scheduler must be a diffusers scheduler or None, got {scheduler!r}")


def _latent_parts(
    scheduler: SchedulerMixin | None, prediction_type: DiscretePrediction
) -> dict[str, Any]:
    """Scheduler, VAE, text encoder and tokenizer."""
    checks.choice("prediction_type", prediction_type, PREDICTIONS)
    if scheduler is None:
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
    _check_scheduler(scheduler)
    return {
        "scheduler": scheduler,
        "vae": _vae(),
        "text_encoder": CLIPTextModel(_text_config()),
        "tokenizer": _tokenizer(),
    }


def _unet(*, xl: bool = False) -> UNet2DConditionModel:
    sizes, each = 6, 8
    return UNet2DConditionModel(
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH if xl else WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time" if xl else None,
        addition_time_embed_dim=each if xl else None,
        projection_class_embeddings_input_dim=WIDTH + sizes * each if xl else None,
    )


def _vae(shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def _text_config() -> CLIPTextConfig:
    vocabulary = _vocabulary()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )


def _vocabulary() -> dict[str, int]:
    """Every byte, every byte that ends a word, and CLIP's two markers."""
    # Byte-level BPE writes a printable byte as its own character, and any other byte as a character
    # above 255 (GPT-2's bytes_to_unicode).
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters = [chr(byte) for byte in sorted(printable)]
    characters += [chr(256 + i) for i in range(256 - len(printable))]
    words = [*characters, *(character + "</w>" for character in characters)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def _tokenizer() -> CLIPTokenizer:
    # Loaded from files, because the argument that takes a vocabulary has another name in other
    # versions of transformers, and a wrong name is ignored.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}),
            encoding="utf-8",
        )
        return CLIPTokenizer.from_pretrained(folder)
