"""Tiny pipelines of the first diffusion transformers, of AnimateDiff, IF, Kandinsky and audio."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    MotionAdapter,
    PixArtTransformer2DModel,
    PriorTransformer,
    SparseControlNetModel,
    StableCascadeUNet,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
from PIL import Image
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from dng_models.pipelines import tiny
from tests.helpers.families.base import drawn, family, silent

WIDTH = 32
FRAMES = 2


def _ddpm(**config: Any) -> DDPMScheduler:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDPMScheduler(**{"clip_sample": False, **betas, **config})


def _t5(**tokenizer: Any) -> tuple[ByT5Tokenizer, T5EncoderModel]:
    read = ByT5Tokenizer(**tokenizer)
    config = T5Config(
        vocab_size=len(read), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4
    )
    return read, T5EncoderModel(config)


def _clip() -> dict[str, Any]:
    return {"tokenizer": tiny._tokenizer(), "text_encoder": CLIPTextModel(tiny._text_config())}


def _projected_clip() -> dict[str, Any]:
    return {
        "tokenizer": tiny._tokenizer(),
        "text_encoder": CLIPTextModelWithProjection(tiny._text_config()),
    }


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _picture(size: int = 16) -> Tensor:
    return _random(1, 3, size, size).tanh()


def _mask(size: int = 16) -> Tensor:
    """A mask that is white on the left half, which is repainted."""
    white = torch.zeros(1, 1, size, size)
    white[..., : size // 2] = 1.0
    return white


def _film() -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (40 + 80 * frame, 120, 200)) for frame in range(FRAMES)]


def _patches(kind: type = PixArtTransformer2DModel, **config: Any) -> Any:
    """A PixArt-like transformer for 4 x 8 x 8 latents, which predicts a variance too."""
    network = kind(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        **config,
    )
    drawn(network)
    return network


def _pixart(pipeline: type) -> Any:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    return silent(
        pipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=tiny._vae(),
            transformer=_patches(caption_channels=WIDTH, cross_attention_dim=WIDTH),
            scheduler=_ddpm(),
        )
    )


def _pixart_call() -> dict[str, Any]:
    return {
        "height": 16,
        "width": 16,
        "max_sequence_length": 64,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "latent",
    }


@family("PixArtAlphaPipeline", _pixart_call)
def pixart_alpha() -> Any:
    return _pixart(diffusers.PixArtAlphaPipeline)


@family("PixArtSigmaPipeline", _pixart_call)
def pixart_sigma() -> Any:
    return _pixart(diffusers.PixArtSigmaPipeline)


@family("PixArtSigmaPAGPipeline", _pixart_call)
def pixart_sigma_pag() -> Any:
    return _pixart(diffusers.PixArtSigmaPAGPipeline)


@family(
    "LattePipeline",
    lambda: {
        "height": 16,
        "width": 16,
        "video_length": FRAMES,
        "clean_caption": False,
        "output_type": "latent",
    },
)
def latte() -> Any:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    transformer = _patches(
        diffusers.LatteTransformer3DModel,
        caption_channels=WIDTH,
        cross_attention_dim=WIDTH,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        video_length=FRAMES,
    )
    return silent(
        diffusers.LattePipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=tiny._vae(),
            transformer=transformer,
            scheduler=_ddpm(),
        )
    )


@family("DiTPipeline", lambda: {"class_labels": [7], "output_type": "pt"}, prompted=False)
def dit() -> Any:
    torch.manual_seed(0)
    transformer = _patches(diffusers.DiTTransformer2DModel, norm_type="ada_norm_zero")
    return silent(
        diffusers.DiTPipeline(transformer=transformer, vae=tiny._vae(), scheduler=_ddpm())
    )


def _hunyuan_size() -> dict[str, Any]:
    return {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": WIDTH,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": 16,
    }


def _hunyuan(pipeline: type, layers: int = 2, **parts: Any) -> Any:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=WIDTH,
        max_position_embeddings=128,
    )
    # The pipeline assumes that the VAE makes images 8 times smaller.
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    transformer = HunyuanDiT2DModel(num_layers=layers, **_hunyuan_size())
    drawn(transformer)
    return silent(
        pipeline(
            vae=vae,
            text_encoder=BertModel(bert),
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=_ddpm(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=text_encoder,
            tokenizer_2=tokenizer,
            **parts,
        )
    )


def _hunyuan_call() -> dict[str, Any]:
    return {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "latent"}


@family("HunyuanDiTPipeline", _hunyuan_call)
def hunyuan_dit() -> Any:
    return _hunyuan(diffusers.HunyuanDiTPipeline)


@family("HunyuanDiTPAGPipeline", _hunyuan_call)
def hunyuan_dit_pag() -> Any:
    return _hunyuan(diffusers.HunyuanDiTPAGPipeline)


@family("HunyuanDiTControlNetPipeline", lambda: {**_hunyuan_call(), "control_image": _picture(64)})
def hunyuan_dit_controlnet() -> Any:
    torch.manual_seed(1)
    controlnet = HunyuanDiT2DControlNetModel(transformer_num_layers=4, **_hunyuan_size())
    drawn(controlnet)
    return _hunyuan(diffusers.HunyuanDiTControlNetPipeline, layers=4, controlnet=controlnet)


def _animatediff(pipeline: type, *, xl: bool = False, **parts: Any) -> Any:
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(WIDTH, WIDTH),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        use_motion_mid_block=not xl,
    )
    if xl:
        second = _projected_clip()
        parts["tokenizer_2"] = second["tokenizer"]
        parts["text_encoder_2"] = second["text_encoder"]
    pipe = pipeline(
        vae=tiny._vae(),
        unet=tiny._unet(xl=xl),
        motion_adapter=adapter,
        scheduler=_ddpm(),
        **_clip(),
        **parts,
    )
    drawn(pipe.unet)
    return silent(pipe)


def _animatediff_call() -> dict[str, Any]:
    return {"height": 16, "width": 16, "num_frames": FRAMES, "output_type": "latent"}


def _video_call() -> dict[str, Any]:
    size = {"height": 16, "width": 16, "output_type": "latent"}
    return {"video": _film(), "strength": 1.0, **size}


@family("AnimateDiffPipeline", _animatediff_call)
def animatediff() -> Any:
    return _animatediff(diffusers.AnimateDiffPipeline)


@family("AnimateDiffPAGPipeline", _animatediff_call)
def animatediff_pag() -> Any:
    return _animatediff(diffusers.AnimateDiffPAGPipeline)


@family("AnimateDiffSDXLPipeline", _animatediff_call)
def animatediff_sdxl() -> Any:
    return _animatediff(diffusers.AnimateDiffSDXLPipeline, xl=True)


def _frame_controlnet() -> ControlNetModel:
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(
        tiny._unet(), conditioning_channels=3, conditioning_embedding_out_channels=(16, WIDTH)
    )
    drawn(controlnet)
    return controlnet


@family(
    "AnimateDiffControlNetPipeline",
    lambda: {**_animatediff_call(), "conditioning_frames": _film()},
)
def animatediff_controlnet() -> Any:
    return _animatediff(diffusers.AnimateDiffControlNetPipeline, controlnet=_frame_controlnet())


@family(
    "AnimateDiffSparseControlNetPipeline",
    lambda: {
        **_animatediff_call(),
        "conditioning_frames": _film()[:1],
        "controlnet_frame_indices": [0],
    },
)
def animatediff_sparse() -> Any:
    torch.manual_seed(1)
    controlnet = SparseControlNetModel(
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(16, WIDTH),
        norm_num_groups=8,
        motion_max_seq_length=8,
        motion_num_attention_heads=4,
        use_simplified_condition_embedding=True,
    )
    drawn(controlnet)
    return _animatediff(diffusers.AnimateDiffSparseControlNetPipeline, controlnet=controlnet)


@family("AnimateDiffVideoToVideoPipeline", _video_call)
def animatediff_video() -> Any:
    return _animatediff(diffusers.AnimateDiffVideoToVideoPipeline)


@family(
    "AnimateDiffVideoToVideoControlNetPipeline",
    lambda: {**_video_call(), "conditioning_frames": _film()},
)
def animatediff_video_controlnet() -> Any:
    return _animatediff(
        diffusers.AnimateDiffVideoToVideoControlNetPipeline, controlnet=_frame_controlnet()
    )


def _variance_unet(channels: int = 4, **config: Any) -> UNet2DConditionModel:
    """A UNet like IF's and Kandinsky 2's, which predicts as many channels of variance."""
    network = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 8,
            "layers_per_block": 1,
            "block_out_channels": (WIDTH, WIDTH),
            "norm_num_groups": 8,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "cross_attention_dim": WIDTH,
            "encoder_hid_dim": WIDTH,
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
            **config,
        }
    )
    drawn(network)
    return network


def _if(pipeline: type, *, upscaled: bool = False) -> Any:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    unet = _variance_unet(
        channels=6 if upscaled else 3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        class_embed_type="timestep" if upscaled else None,
    )
    return silent(
        pipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=_ddpm(variance_type="fixed_small"),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
            **({"image_noising_scheduler": _ddpm()} if upscaled else {}),
        )
    )


def _if_call(**call: Any) -> dict[str, Any]:
    return {"clean_caption": False, "output_type": "pt", **call}


@family("IFPipeline", _if_call)
def deepfloyd_if() -> Any:
    return _if(diffusers.IFPipeline)


@family("IFImg2ImgPipeline", lambda: _if_call(image=_picture(8), strength=1.0))
def deepfloyd_if_image() -> Any:
    return _if(diffusers.IFImg2ImgPipeline)


@family("IFInpaintingPipeline", lambda: _if_call(image=_picture(8), mask_image=_mask(8)))
def deepfloyd_if_inpainting() -> Any:
    return _if(diffusers.IFInpaintingPipeline)


@family("IFSuperResolutionPipeline", lambda: _if_call(image=_picture(4)))
def deepfloyd_if_upscaled() -> Any:
    return _if(diffusers.IFSuperResolutionPipeline, upscaled=True)


def _if_upscaled_call(**call: Any) -> dict[str, Any]:
    return _if_call(image=_picture(4), original_image=_picture(8), strength=1.0, **call)


@family("IFImg2ImgSuperResolutionPipeline", _if_upscaled_call)
def deepfloyd_if_image_upscaled() -> Any:
    return _if(diffusers.IFImg2ImgSuperResolutionPipeline, upscaled=True)


@family("IFInpaintingSuperResolutionPipeline", lambda: _if_upscaled_call(mask_image=_mask(8)))
def deepfloyd_if_inpainting_upscaled() -> Any:
    return _if(diffusers.IFInpaintingSuperResolutionPipeline, upscaled=True)


def _movq() -> VQModel:
    return VQModel(
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_num_groups=8,
        norm_type="spatial",
    )


def _kandinsky(pipeline: type, channels: int = 4) -> Any:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    config = MCLIPConfig(
        numDims=WIDTH,
        transformerDimensions=WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=128,
    )
    unet = _variance_unet(
        channels, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"
    )
    return silent(
        pipeline(
            text_encoder=MultilingualCLIP(config),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=_ddpm(),
            movq=_movq(),
        )
    )


def _kandinsky_call(output_type: str = "latent", **call: Any) -> dict[str, Any]:
    return {
        "image_embeds": _random(1, WIDTH),
        "negative_image_embeds": _random(1, WIDTH, seed=2),
        "height": 16,
        "width": 16,
        "output_type": output_type,
        **call,
    }


@family("KandinskyPipeline", lambda: _kandinsky_call("pt"))
def kandinsky() -> Any:
    return _kandinsky(diffusers.KandinskyPipeline)


@family("KandinskyImg2ImgPipeline", lambda: _kandinsky_call("pt", image=_picture(), strength=1.0))
def kandinsky_image() -> Any:
    return _kandinsky(diffusers.KandinskyImg2ImgPipeline)


def _inpainting() -> dict[str, Any]:
    return {"image": _picture(), "mask_image": _mask()}


@family("KandinskyInpaintPipeline", lambda: _kandinsky_call("pt", **_inpainting()))
def kandinsky_inpainting() -> Any:
    return _kandinsky(diffusers.KandinskyInpaintPipeline, channels=9)


def _kandinsky_prior(pipeline: type) -> Any:
    torch.manual_seed(0)
    prior = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH
    )
    drawn(prior)
    prior.clip_std.data.fill_(1.0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    square = {"height": 16, "width": 16}
    return silent(
        pipeline(
            prior=prior,
            image_encoder=CLIPVisionModelWithProjection(vision),
            scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
            ),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square),
            **_projected_clip(),
        )
    )


@family("KandinskyPriorPipeline")
def kandinsky_prior() -> Any:
    return _kandinsky_prior(diffusers.KandinskyPriorPipeline)


@family("KandinskyV22PriorPipeline")
def kandinsky_22_prior() -> Any:
    return _kandinsky_prior(diffusers.KandinskyV22PriorPipeline)


@family("KandinskyV22PriorEmb2EmbPipeline", lambda: {"image": _random(1, WIDTH), "strength": 1.0})
def kandinsky_22_prior_image() -> Any:
    return _kandinsky_prior(diffusers.KandinskyV22PriorEmb2EmbPipeline)


def _kandinsky_22(pipeline: type, channels: int = 4, addition: str = "image") -> Any:
    torch.manual_seed(0)
    unet = _variance_unet(channels, addition_embed_type=addition, encoder_hid_dim_type="image_proj")
    scheduler = _ddpm(variance_type="fixed_small")
    return silent(pipeline(unet=unet, scheduler=scheduler, movq=_movq()))


@family("KandinskyV22Pipeline", _kandinsky_call, prompted=False)
def kandinsky_22() -> Any:
    return _kandinsky_22(diffusers.KandinskyV22Pipeline)


@family(
    "KandinskyV22Img2ImgPipeline",
    lambda: _kandinsky_call(image=_picture(), strength=1.0),
    prompted=False,
)
def kandinsky_22_image() -> Any:
    return _kandinsky_22(diffusers.KandinskyV22Img2ImgPipeline)


@family("KandinskyV22InpaintPipeline", lambda: _kandinsky_call(**_inpainting()), prompted=False)
def kandinsky_22_inpainting() -> Any:
    return _kandinsky_22(diffusers.KandinskyV22InpaintPipeline, channels=9)


@family(
    "KandinskyV22ControlnetPipeline",
    lambda: _kandinsky_call("pt", hint=_picture(64)),
    prompted=False,
)
def kandinsky_22_controlnet() -> Any:
    return _kandinsky_22(
        diffusers.KandinskyV22ControlnetPipeline, channels=8, addition="image_hint"
    )


@family(
    "KandinskyV22ControlnetImg2ImgPipeline",
    lambda: _kandinsky_call("pt", hint=_picture(64), image=_picture(), strength=1.0),
    prompted=False,
)
def kandinsky_22_controlnet_image() -> Any:
    return _kandinsky_22(
        diffusers.KandinskyV22ControlnetImg2ImgPipeline, channels=8, addition="image_hint"
    )


def _kandinsky_3(pipeline: type) -> Any:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5()
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, WIDTH),
        cross_attention_dim=16,
        encoder_hid_dim=WIDTH,
    )
    drawn(unet)
    return silent(
        pipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=_ddpm(),
            movq=_movq(),
        )
    )


@family("Kandinsky3Pipeline", lambda: {"height": 64, "width": 64, "output_type": "latent"})
def kandinsky_3() -> Any:
    return _kandinsky_3(diffusers.Kandinsky3Pipeline)


@family(
    "Kandinsky3Img2ImgPipeline",
    lambda: {"image": _picture(), "strength": 1.0, "output_type": "latent"},
)
def kandinsky_3_image() -> Any:
    return _kandinsky_3(diffusers.Kandinsky3Img2ImgPipeline)


def _cascade(**config: Any) -> StableCascadeUNet:
    network = StableCascadeUNet(
        conditioning_dim=WIDTH,
        block_out_channels=(WIDTH, WIDTH),
        num_attention_heads=(4, 4),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.0, 0.0),
        **config,
    )
    drawn(network)
    return network


@family("StableCascadePriorPipeline", lambda: {"height": 256, "width": 256})
def stable_cascade_prior() -> Any:
    torch.manual_seed(0)
    prior = _cascade(
        switch_level=(False,), clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH
    )
    return silent(
        diffusers.StableCascadePriorPipeline(
            prior=prior, scheduler=DDPMWuerstchenScheduler(), **_projected_clip()
        )
    )


@family(
    "StableCascadeDecoderPipeline",
    lambda: {
        "image_embeddings": _random(1, 4, 4, 4),
        "guidance_scale": 4.0,
        "output_type": "latent",
    },
)
def stable_cascade_decoder() -> Any:
    torch.manual_seed(0)
    decoder = _cascade(
        in_channels=4,
        out_channels=4,
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        effnet_in_channels=4,
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        )
        * 2,
        switch_level=None,
        patch_size=2,
    )
    return silent(
        diffusers.StableCascadeDecoderPipeline(
            decoder=decoder,
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=PaellaVQModel(num_vq_embeddings=2, embed_dim=8, bottleneck_blocks=1),
            latent_dim_scale=2.0,
            **_projected_clip(),
        )
    )


# The class always uses the empty prompt as the negative one.
@family(
    "LDMTextToImagePipeline",
    lambda: {
        "prompt": "a breakfast of two",
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
        "output_type": "pt",
    },
    prompted=False,
)
def latent_diffusion() -> Any:
    torch.manual_seed(0)
    text = _clip()
    return silent(
        diffusers.LDMTextToImagePipeline(
            vqvae=tiny._vae(),
            bert=text["text_encoder"],
            tokenizer=text["tokenizer"],
            unet=tiny._unet(),
            scheduler=_ddpm(),
        )
    )


@family("StableAudioPipeline", lambda: {"output_type": "latent"})
def stable_audio() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    drawn(transformer)
    tokenizer, text_encoder = _t5(model_max_length=48)
    return silent(
        diffusers.StableAudioPipeline(
            vae=diffusers.AutoencoderOobleck(
                encoder_hidden_size=8,
                downsampling_ratios=[1, 2],
                channel_multiples=[1, 2],
                decoder_channels=8,
                decoder_input_channels=4,
                audio_channels=2,
                sampling_rate=16,
            ),
            text_encoder=text_encoder,
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=16
            ),
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_min=0.3,
                sigma_max=500,
                sigma_data=1.0,
                sigma_schedule="exponential",
                prediction_type="v_prediction",
            ),
        )
    )


@family(
    "StableAudio3Pipeline",
    lambda: {"duration": 1.0, "guidance_scale": 4.0, "output_type": "latent"},
)
def stable_audio_3() -> Any:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(model_max_length=48)
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=WIDTH,
        depth=1,
        num_heads=4,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=2,
        use_differential_attention=False,
    )
    drawn(transformer)
    text = transformers.T5GemmaModuleConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=64,
        layer_types=["full_attention"],
    ).to_dict()
    return silent(
        diffusers.StableAudio3Pipeline(
            vae=diffusers.AutoencoderSAME(
                audio_channels=2,
                patch_size=2,
                encoder_channels=8,
                encoder_c_mults=(2,),
                encoder_strides=(2,),
                encoder_transformer_depths=(1,),
                latent_dim=4,
                use_differential_attention=False,
                dim_heads=4,
                ff_mult=2,
                sampling_rate=32,
            ),
            text_encoder=transformers.T5GemmaEncoderModel(
                transformers.T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)
            ),
            tokenizer=tokenizer,
            duration_embedder=diffusers.StableAudio3DurationEmbedder(
                output_dim=WIDTH, fourier_dim=16
            ),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        )
    )


@family("DreamLitePipeline", lambda: {"height": 16, "width": 16, "output_type": "latent"})
def dreamlite() -> Any:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    heads = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 4}
    text = {
        **heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {**heads, "depth": 1, "num_heads": 4, "out_hidden_size": WIDTH}
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(WIDTH, WIDTH),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )
    drawn(unet)
    return silent(
        diffusers.DreamLitePipeline(
            text_encoder=transformers.Qwen3VLForConditionalGeneration(
                transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
            ),
            tokenizer=tokenizer,
            processor=None,
            vae=diffusers.AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            ),
            unet=unet,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def _roberta() -> RobertaTokenizer:
    """A tokenizer of bytes, of a class that AudioLDM 2 accepts."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *tiny._vocabulary()]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: i for i, word in enumerate(words)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return RobertaTokenizer.from_pretrained(folder, model_max_length=48)


@family("AudioLDM2Pipeline", lambda: {"audio_length_in_s": 1.0, "output_type": "latent"})
def audioldm_2() -> Any:
    torch.manual_seed(0)
    tokenizer = _roberta()
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    audio = {
        "spec_size": 8,
        "num_mel_bins": 8,
        "window_size": 4,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "projection_dim": WIDTH,
    }
    language = GPT2Config(
        n_embd=WIDTH,
        n_head=4,
        n_layer=1,
        vocab_size=len(tokenizer),
        n_positions=64,
        bos_token_id=0,
        eos_token_id=2,
    )
    language.max_new_tokens = 4
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4
    )
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(None, WIDTH),
    )
    drawn(unet)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=64,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
    )
    return silent(
        diffusers.AudioLDM2Pipeline(
            vae=vae,
            text_encoder=ClapModel(
                ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)
            ),
            text_encoder_2=T5EncoderModel(t5),
            projection_model=diffusers.AudioLDM2ProjectionModel(
                text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=WIDTH
            ),
            language_model=GPT2LMHeadModel(language),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            feature_extractor=ClapFeatureExtractor(),
            unet=unet,
            scheduler=_ddpm(),
            vocoder=SpeechT5HifiGan(vocoder),
        )
    )
