"""Tiny randomly initialised pipelines: real classes of diffusers and transformers, nothing to load.

They make noise, not pictures, but run every line that the large ones run, in tenths of a second on
one core: what tests and a first try of a command line need.  All weights are a function of the
seed.  Text is read byte by byte, so that different words are different to the networks; 75 bytes
of a prompt are seen.
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

from dng_math import _checks

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
        Of the weights, in [0, 2^63).
    scheduler : SchedulerMixin, optional
        By default DDIM with Stable Diffusion's betas.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        What the default scheduler takes the network's output to be.  A given scheduler says so
        itself.

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
    """:func:`tiny_stable_diffusion` with a ControlNet; its conditioning image is 16 x 16 RGB."""
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
        # A new ControlNet's outputs are zero, and its image would change nothing.
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
    """Stable Diffusion XL of 16 x 16 images and 4 x 8 x 8 latents; arguments as for SD.

    Two text encoders; the network also takes the pooled text and six sizes.
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

    Its third text encoder is a T5 that reads bytes, as ByT5.

    Parameters
    ----------
    seed : int
        Of the weights, in [0, 2^63).
    scheduler : SchedulerMixin, optional
        By default flow-matching Euler with shift 3, as SD3's.

    Returns
    -------
    StableDiffusion3Pipeline
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
    """The network of :func:`tiny_ddpm`; another seed serves as the forgetful one."""
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
    """CLIP of 32 x 32 images and the pipelines' tokenizer: model and processor."""
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
    """Draw weights from the seed, and leave the global generators as they were."""
    _checks.integer("seed", seed, 0, 2**63 - 1)
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
    _checks.choice("prediction_type", prediction_type, PREDICTIONS)
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
    # Byte-level BPE writes a byte as its own character where that is printable, and as one above
    # 255 where it is not (GPT-2's bytes_to_unicode).
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters = [chr(byte) for byte in sorted(printable)]
    characters += [chr(256 + i) for i in range(256 - len(printable))]
    words = [*characters, *(character + "</w>" for character in characters)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def _tokenizer() -> CLIPTokenizer:
    # Through files, because the names of the arguments that take a vocabulary depend on the
    # version of transformers, and a wrong one is ignored.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}),
            encoding="utf-8",
        )
        return CLIPTokenizer.from_pretrained(folder)
