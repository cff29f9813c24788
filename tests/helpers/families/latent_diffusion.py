"""Tiny pipelines of Stable Diffusion 1, 2, XL and 3, and others that are made of their parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PriorTransformer,
    SD3ControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from dng_models.pipelines import tiny
from tests.helpers.families.base import drawn, family, silent

SIZE, WIDTH = tiny.IMAGE_SIZE, tiny.WIDTH
LATENT: dict[str, Any] = {"output_type": "latent"}
SIZED: dict[str, Any] = {**LATENT, "height": SIZE, "width": SIZE}


def picture(*shape: int, seed: int = 1) -> Tensor:
    """An image with values in [0, 1]; the same one for the same shape."""
    return torch.rand(shape or (1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """A mask that is one on the right half, which is repainted."""
    right = torch.zeros(1, 1, SIZE, SIZE)
    right[..., SIZE // 2 :] = 1.0
    return right


def ddpm() -> DDPMScheduler:
    return DDPMScheduler(
        clip_sample=False,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,  # else Stable Diffusion pipelines warn
    )


def sd(**unet: Any) -> dict[str, Any]:
    """Parts of Stable Diffusion; arguments change the network's configuration."""
    return _parts(tiny.tiny_stable_diffusion(scheduler=ddpm()), unet)


def sdxl(**unet: Any) -> dict[str, Any]:
    parts = _parts(tiny.tiny_stable_diffusion_xl(scheduler=ddpm()), unet)
    parts["vae"].register_to_config(force_upcast=False)  # avoids a message at every call
    return parts


def sd3(channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    parts = dict(tiny.tiny_stable_diffusion_3().components)
    if channels != 4:
        wider = {"in_channels": channels, "out_channels": channels}
        parts["vae"] = changed(parts["vae"], latent_channels=channels)
        parts["transformer"] = changed(parts["transformer"], **wider)
    return parts


def _parts(pipe: Any, unet: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    parts = dict(pipe.components)
    if unet:
        parts["unet"] = changed(parts["unet"], **unet)
    return {**parts, "requires_safety_checker": False, "add_watermarker": False}


def changed(network: Any, **config: Any) -> Any:
    """A new network of the same class with a changed configuration."""
    return type(network).from_config(network.config, **config)


def made(name: str, parts: dict[str, Any], **more: Any) -> Any:
    """Make a pipeline of this class from those of the parts that it takes."""
    kind = getattr(diffusers, name)
    given = {**parts, **more}
    taken = inspect.signature(kind.__init__).parameters
    return silent(kind(**{part: value for part, value in given.items() if part in taken}))


def control(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts, and a ControlNet."""
    network = ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(16, WIDTH)
    )
    drawn(network)
    return {**parts, "controlnet": network}


def union(parts: dict[str, Any]) -> dict[str, Any]:
    # from_unet leaves the transformer over the kinds of control at its full width.
    shared = inspect.signature(ControlNetUnionModel.__init__).parameters
    network = ControlNetUnionModel(
        **{name: value for name, value in parts["unet"].config.items() if name in shared},
        conditioning_embedding_out_channels=(16, WIDTH),
        num_trans_channel=WIDTH,
        num_trans_head=4,
        num_proj_channel=WIDTH,
    )
    drawn(network)
    return {**parts, "controlnet": network}


def control_sd3(parts: dict[str, Any], *, mask_channels: int) -> dict[str, Any]:
    shared = inspect.signature(SD3ControlNetModel.__init__).parameters
    config = {key: value for key, value in parts["transformer"].config.items() if key in shared}
    config |= {"num_layers": 1, "extra_conditioning_channels": mask_channels}
    network = SD3ControlNetModel(**config)
    drawn(network)
    return {**parts, "controlnet": network}


def entered(parts: Callable[[], dict[str, Any]], call: dict[str, Any], *names: str) -> None:
    """Register classes that are built of the same parts and called alike."""
    for name in names:
        family(name, functools.partial(dict, call))(functools.partial(_build, name, parts))


def _build(name: str, parts: Callable[[], dict[str, Any]]) -> Any:
    return made(name, parts())


# A third of the strength of XL's image to image is no step of three.
REDRAWN = {**LATENT, "image": picture(), "strength": 0.8}
REPAINTED = {**SIZED, "image": picture(), "mask_image": mask()}
OUTLINE = {"control_image": picture(seed=2)}
OUTLINES = {"control_image": [picture(seed=2)], "control_mode": [0]}

entered(sd, SIZED, "StableDiffusionPipeline", "StableDiffusionPAGPipeline")
entered(sd, REDRAWN, "StableDiffusionImg2ImgPipeline", "StableDiffusionPAGImg2ImgPipeline")
entered(sd, REPAINTED, "StableDiffusionInpaintPipeline", "StableDiffusionPAGInpaintPipeline")
entered(sdxl, SIZED, "StableDiffusionXLPipeline", "StableDiffusionXLPAGPipeline")
entered(sdxl, REDRAWN, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPAGImg2ImgPipeline")
entered(sdxl, REPAINTED, "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPAGInpaintPipeline")
entered(sd3, SIZED, "StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline")
entered(sd3, REDRAWN, "StableDiffusion3Img2ImgPipeline", "StableDiffusion3PAGImg2ImgPipeline")


@family("StableDiffusion3InpaintPipeline", lambda: dict(REPAINTED, strength=1.0))
def sd3_inpaint() -> Any:
    # With 16 channels the pipeline takes the network for one that does not read the mask.
    return made("StableDiffusion3InpaintPipeline", sd3(channels=16))


entered(
    lambda: control(sd()),
    {**SIZED, "image": picture(seed=2)},
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetPAGPipeline",
)
entered(lambda: control(sd()), {**REDRAWN, **OUTLINE}, "StableDiffusionControlNetImg2ImgPipeline")
entered(
    lambda: control(sd()),
    {**REPAINTED, **OUTLINE},
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
)
entered(
    lambda: control(sdxl()),
    {**SIZED, "image": picture(seed=2)},
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
)
entered(
    lambda: control(sdxl()),
    {**REDRAWN, **OUTLINE},
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
)
entered(
    lambda: control(sdxl()), {**REPAINTED, **OUTLINE}, "StableDiffusionXLControlNetInpaintPipeline"
)
entered(lambda: union(sdxl()), {**SIZED, **OUTLINES}, "StableDiffusionXLControlNetUnionPipeline")
entered(
    lambda: union(sdxl()),
    {**REDRAWN, **OUTLINES},
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
)
entered(
    lambda: union(sdxl()),
    {**REPAINTED, **OUTLINES},
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)
entered(
    lambda: control_sd3(sd3(), mask_channels=0),
    {**SIZED, **OUTLINE},
    "StableDiffusion3ControlNetPipeline",
)
entered(
    lambda: control_sd3(sd3(), mask_channels=1),
    {**SIZED, **OUTLINE, "control_mask": mask()},
    "StableDiffusion3ControlNetInpaintingPipeline",
)


@family("StableDiffusionDepth2ImgPipeline", lambda: dict(REDRAWN, depth_map=picture(1, SIZE, SIZE)))
def depth() -> Any:
    return made(
        "StableDiffusionDepth2ImgPipeline",
        sd(in_channels=5),
        depth_estimator=None,
        feature_extractor=None,
    )


entered(
    lambda: sd(in_channels=8),
    {**LATENT, "image": picture()},
    "StableDiffusionInstructPix2PixPipeline",
)
entered(
    lambda: sdxl(in_channels=8),
    {**SIZED, "image": picture()},
    "StableDiffusionXLInstructPix2PixPipeline",
)


@family("StableDiffusionUpscalePipeline", lambda: dict(LATENT, image=picture(1, 3, 8, 8)))
def upscale() -> Any:
    parts = sd(in_channels=7, num_class_embeds=1000)
    parts["vae"] = changed(parts["vae"], scaling_factor=0.08333)
    return made("StableDiffusionUpscalePipeline", parts, low_res_scheduler=ddpm())


@family("StableDiffusionLatentUpscalePipeline", lambda: dict(LATENT, image=picture(1, 4, 4, 4)))
def latent_upscale() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        # The first up block must be as wide as the time embedding, twice the first down block.
        block_out_channels=(WIDTH, 2 * WIDTH, 2 * WIDTH),
        layers_per_block=1,
        time_cond_proj_dim=128 + WIDTH,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        in_channels=8,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    drawn(unet)
    # The loop reads the scheduler's sigmas, and turns the output into a prediction of x_0.
    return made(
        "StableDiffusionLatentUpscalePipeline",
        sd(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="sample",
        ),
    )


def unclip() -> dict[str, Any]:
    """Parts of Stable Diffusion, with a network that is conditioned on an image's embedding."""
    parts = sd(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    return {
        **parts,
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


@family("StableUnCLIPPipeline", lambda: dict(SIZED, prior_num_inference_steps=2))
def stable_unclip() -> Any:
    parts = unclip()
    return made(
        "StableUnCLIPPipeline",
        parts,
        prior_tokenizer=parts["tokenizer"],
        prior_text_encoder=CLIPTextModelWithProjection(tiny._text_config()),
        prior=PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, embedding_dim=WIDTH, num_layers=1
        ),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
    )


@family("StableUnCLIPImg2ImgPipeline", lambda: dict(SIZED, image=picture(1, 3, 32, 32)))
def stable_unclip_image() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return made(
        "StableUnCLIPImg2ImgPipeline",
        unclip(),
        image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
    )


@family("StableDiffusionAdapterPipeline", lambda: dict(SIZED, image=picture()))
def adapter() -> Any:
    # The adapter's features have the size of a block's output before it is halved; only blocks
    # with attention add them there.
    parts = sd(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return made("StableDiffusionAdapterPipeline", parts, adapter=_adapter("full_adapter", 2))


@family("StableDiffusionXLAdapterPipeline", lambda: dict(SIZED, image=picture()))
def adapter_xl() -> Any:
    return made("StableDiffusionXLAdapterPipeline", sdxl(), adapter=_adapter("full_adapter_xl", 4))


def _adapter(kind: str, factor: int) -> T2IAdapter:
    return T2IAdapter(
        in_channels=3,
        channels=[WIDTH, WIDTH],
        num_res_blocks=1,
        downscale_factor=factor,
        adapter_type=kind,
    )
