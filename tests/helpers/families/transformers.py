"""Tiny pipelines around a diffusion transformer: Sana, LTX, CogVideoX, Z-Image and others."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    ConsisIDTransformer3DModel,
    DDPMScheduler,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)

# diffusers itself does not export it without OpenCV, which only its helpers need.
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from PIL import Image
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dng_models.pipelines import tiny
from tests.helpers.families.base import drawn, family, silent

WIDTH = 32
TEXT = 32  # maximal length of prompts, in bytes; the default is hundreds of tokens


def _flow(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def _noise() -> DDPMScheduler:
    return DDPMScheduler(
        clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )


def _louder(module: torch.nn.Module, factor: float, *names: str) -> None:
    """Multiply the weights whose names contain one of the given ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.mul_(factor)


def _read_as_it_is(pipeline_class: Any) -> Any:
    """Return the class; without ftfy, make its module's text cleaning leave text unchanged."""
    module = sys.modules[pipeline_class.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)
    return pipeline_class


def _bytes(*, chat: bool = False) -> ByT5Tokenizer:
    """A tokenizer of bytes; its chat template gives the text of the messages alone."""
    tokenizer = ByT5Tokenizer()
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{% set said = m.content %}"
            "{{ said if said is string else said[0].text }}"
            "{% endfor %}"
        )
    return tokenizer


def _t5() -> dict[str, Any]:
    config = T5Config(vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4)
    return {"text_encoder": T5EncoderModel(config), "tokenizer": _bytes()}


def _umt5() -> dict[str, Any]:
    config = UMT5Config(
        vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4
    )
    return {"text_encoder": UMT5EncoderModel(config), "tokenizer": _bytes()}


def _decoder(config_class: Any = LlamaConfig, **settings: Any) -> Any:
    """Configuration of a language model that reads bytes."""
    return config_class(
        **{
            "vocab_size": 384,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "initializer_range": 0.2,
            **settings,
        }
    )


def _gemma() -> dict[str, Any]:
    return {"text_encoder": Gemma2Model(_decoder(Gemma2Config)), "tokenizer": _bytes()}


def _llama() -> dict[str, Any]:
    return {"text_encoder": LlamaModel(_decoder()), "tokenizer": _bytes(chat=True)}


def _picture(size: int = 32) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((size, size))


def _film() -> list[Image.Image]:
    return [_picture().rotate(10 * frame) for frame in range(9)]


def _film_tensor() -> Tensor:
    """A video of five frames with values in [0, 1]."""
    return torch.linspace(0, 1, 3 * 5 * 32 * 32).reshape(1, 3, 5, 32, 32)


def _sana_network(network_class: Any = SanaTransformer2DModel, layers: int = 1) -> Any:
    network = network_class(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=32,
    )
    drawn(network)
    return network


def _sana() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return {"vae": vae, "scheduler": _flow(shift=3.0), "transformer": _sana_network(), **_gemma()}


def _sana_call() -> dict[str, Any]:
    return {
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": TEXT,
        "output_type": "latent",
    }


@family("SanaPipeline", _sana_call)
def sana() -> Any:
    return silent(SanaPipeline(**_sana()))


@family("SanaPAGPipeline", _sana_call)
def sana_pag() -> Any:
    return silent(SanaPAGPipeline(**_sana(), pag_applied_layers="transformer_blocks.0"))


@family("SanaControlNetPipeline", lambda: {"control_image": _picture(), **_sana_call()})
def sana_controlnet() -> Any:
    parts = _sana()
    parts["transformer"] = _sana_network(layers=2)  # the first layer ignores the ControlNet
    return silent(SanaControlNetPipeline(**parts, controlnet=_sana_network(SanaControlNetModel)))


def _ltx() -> dict[str, Any]:
    torch.manual_seed(0)
    network = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        num_layers=1,
        caption_channels=WIDTH,
    )
    drawn(network)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    return {"vae": vae, "scheduler": _flow(), "transformer": network, **_t5()}


def _ltx_call(**more: Any) -> dict[str, Any]:
    size = {"height": 32, "width": 32, "num_frames": 9}
    return {**size, "max_sequence_length": TEXT, "output_type": "latent", **more}


@family("LTXPipeline", _ltx_call)
def ltx() -> Any:
    return silent(LTXPipeline(**_ltx()))


@family("LTXImageToVideoPipeline", lambda: _ltx_call(image=_picture()))
def ltx_image() -> Any:
    return silent(LTXImageToVideoPipeline(**_ltx()))


@family("LTXConditionPipeline", lambda: _ltx_call(image=_picture()))
def ltx_condition() -> Any:
    return silent(LTXConditionPipeline(**_ltx()))


@family("LTXI2VLongMultiPromptPipeline", lambda: _ltx_call(guidance_scale=3.0))
def ltx_long() -> Any:
    parts = _ltx()
    parts["scheduler"] = diffusers.LTXEulerAncestralRFScheduler()
    return silent(diffusers.LTXI2VLongMultiPromptPipeline(**parts))


_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


def _cogvideox(in_channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    network = CogVideoXTransformer3DModel(**{**_COGVIDEOX, "in_channels": in_channels})
    return {"vae": _vae_cogvideox(), "scheduler": _noise(), "transformer": network, **_t5()}


def _vae_cogvideox() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def _cogvideox_call(**more: Any) -> dict[str, Any]:
    return {
        "height": 32,
        "width": 32,
        "max_sequence_length": TEXT,
        "output_type": "latent",
        **more,
    }


@family("CogVideoXPipeline", lambda: _cogvideox_call(num_frames=9))
def cogvideox() -> Any:
    return silent(CogVideoXPipeline(**_cogvideox()))


@family("CogVideoXImageToVideoPipeline", lambda: _cogvideox_call(num_frames=9, image=_picture()))
def cogvideox_image() -> Any:
    return silent(CogVideoXImageToVideoPipeline(**_cogvideox(8)))


@family("CogVideoXVideoToVideoPipeline", lambda: _cogvideox_call(video=_film()))
def cogvideox_video() -> Any:
    return silent(CogVideoXVideoToVideoPipeline(**_cogvideox()))


@family("CogVideoXFunControlPipeline", lambda: _cogvideox_call(control_video=_film()))
def cogvideox_control() -> Any:
    return silent(CogVideoXFunControlPipeline(**_cogvideox(8)))


@family(
    "ConsisIDPipeline",
    lambda: _cogvideox_call(
        num_frames=9,
        image=_picture(),
        id_vit_hidden=[torch.ones(1, 2, 2)],
        id_cond=torch.ones(1, 2),
    ),
)
def consisid() -> Any:
    parts = _cogvideox()
    parts["transformer"] = ConsisIDTransformer3DModel(
        **{**_COGVIDEOX, "in_channels": 8},
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    return silent(ConsisIDPipeline(**parts))


@family(
    "CogView3PlusPipeline",
    lambda: {"height": 16, "width": 16, "max_sequence_length": TEXT, "output_type": "latent"},
)
def cogview3plus() -> Any:
    torch.manual_seed(0)
    network = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return silent(
        CogView3PlusPipeline(vae=tiny._vae(), scheduler=_noise(), transformer=network, **_t5())
    )


@family("HiDreamImagePipeline", lambda: {"max_sequence_length": 64, "output_type": "latent"})
def hidream() -> Any:
    torch.manual_seed(0)
    network = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )
    drawn(network)
    t5 = _t5()
    pipe = HiDreamImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=tiny._vae(),
        text_encoder=CLIPTextModelWithProjection(tiny._text_config()),
        tokenizer=tiny._tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(tiny._text_config()),
        tokenizer_2=tiny._tokenizer(),
        text_encoder_3=t5["text_encoder"],
        tokenizer_3=t5["tokenizer"],
        text_encoder_4=LlamaForCausalLM(_decoder(attn_implementation="eager")),
        tokenizer_4=_bytes(),
        transformer=network,
    )
    pipe.default_sample_size = 8  # all sizes are rescaled to this number of pixels
    return silent(pipe)


@family(
    "AuraFlowPipeline",
    lambda: {"height": 16, "width": 16, "max_sequence_length": TEXT, "output_type": "latent"},
)
def auraflow() -> Any:
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    drawn(network)
    _louder(network, 8.0, "context_embedder", "norm1", "add_v_proj", "to_v", "to_out")
    return silent(
        AuraFlowPipeline(vae=tiny._vae(), scheduler=_flow(), transformer=network, **_umt5())
    )


@family(
    "MochiPipeline",
    lambda: {
        "height": 32,
        "width": 32,
        "num_frames": 7,
        "max_sequence_length": TEXT,
        "output_type": "latent",
    },
)
def mochi() -> Any:
    torch.manual_seed(0)
    network = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    drawn(network)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return silent(MochiPipeline(vae=vae, scheduler=_flow(), transformer=network, **_t5()))


@family(
    "AllegroPipeline",
    lambda: {
        "height": 32,
        "width": 32,
        "num_frames": 8,
        "clean_caption": False,
        "max_sequence_length": TEXT,
        "output_type": "latent",
    },
)
def allegro() -> Any:
    torch.manual_seed(0)
    network = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return silent(AllegroPipeline(vae=vae, scheduler=_noise(), transformer=network, **_t5()))


def _easyanimate(in_channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    network = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        patch_size=2,
        resize_inpaint_mask_directly=False,  # True needs a setting that no VAE has
    )
    drawn(network)
    vae = AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return {"vae": vae, "scheduler": _flow(), "transformer": network, **_llama()}


def _easyanimate_call(**more: Any) -> dict[str, Any]:
    return {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent", **more}


@family("EasyAnimatePipeline", _easyanimate_call)
def easyanimate() -> Any:
    return silent(EasyAnimatePipeline(**_easyanimate()))


@family(
    "EasyAnimateInpaintPipeline",
    lambda: _easyanimate_call(video=_film_tensor(), mask_video=_film_tensor()[:, :1].round()),
)
def easyanimate_inpaint() -> Any:
    return silent(EasyAnimateInpaintPipeline(**_easyanimate(12)))


def _zimage(*, siglip: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        rope_theta=256.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **({} if siglip is None else {"siglip_feat_dim": siglip}),
    )
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token"):  # uninitialised
            torch.nn.init.normal_(parameter)
    drawn(network)
    return {
        "vae": tiny._vae(shift_factor=0.1),
        "scheduler": _flow(),
        "transformer": network,
        **_llama(),
    }


def _zimage_call(**more: Any) -> dict[str, Any]:
    return {
        "height": 16,
        "width": 16,
        "max_sequence_length": TEXT,
        "output_type": "latent",
        **more,
    }


@family("ZImagePipeline", _zimage_call)
def zimage() -> Any:
    return silent(diffusers.ZImagePipeline(**_zimage()))


@family("ZImageImg2ImgPipeline", lambda: _zimage_call(image=_picture(16), strength=1.0))
def zimage_image() -> Any:
    return silent(diffusers.ZImageImg2ImgPipeline(**_zimage()))


@family(
    "ZImageInpaintPipeline",
    lambda: _zimage_call(image=_picture(16), mask_image=_picture(16).convert("L")),
)
def zimage_inpaint() -> Any:
    return silent(diffusers.ZImageInpaintPipeline(**_zimage()))


def _zimage_controlnet(control_in_dim: int) -> Any:
    network = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=control_in_dim,
        add_control_noise_refiner="control_noise_refiner",
        dim=WIDTH,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    drawn(network)
    return network


@family("ZImageControlNetPipeline", lambda: _zimage_call(control_image=_picture(16)))
def zimage_controlnet() -> Any:
    parts = _zimage()
    return silent(diffusers.ZImageControlNetPipeline(**parts, controlnet=_zimage_controlnet(4)))


@family(
    "ZImageControlNetInpaintPipeline",
    lambda: _zimage_call(
        control_image=_picture(16), image=_picture(16), mask_image=_picture(16).convert("L")
    ),
)
def zimage_controlnet_inpaint() -> Any:
    parts = _zimage()
    return silent(
        diffusers.ZImageControlNetInpaintPipeline(**parts, controlnet=_zimage_controlnet(9))
    )


@family("ZImageOmniPipeline", lambda: _zimage_call(image=[_picture(64)]))
def zimage_omni() -> Any:
    parts = _zimage(siglip=16)
    parts["vae"].to(torch.bfloat16)  # the pipeline encodes images in bfloat16
    siglip = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_patches=16,
            patch_size=4,
        )
    )
    images = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    return silent(diffusers.ZImageOmniPipeline(**parts, siglip=siglip, siglip_processor=images))


def _vae_wan(**settings: Any) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        **{
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            **settings,
        }
    )


def _sana_video() -> dict[str, Any]:
    torch.manual_seed(0)
    network = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    drawn(network)
    return {"vae": _vae_wan(), "scheduler": _flow(), "transformer": network, **_gemma()}


def _sana_video_call(**more: Any) -> dict[str, Any]:
    return {**_sana_call(), "frames": 5, "complex_human_instruction": [], **more}


@family("SanaVideoPipeline", _sana_video_call)
def sana_video() -> Any:
    return silent(diffusers.SanaVideoPipeline(**_sana_video()))


@family("SanaImageToVideoPipeline", lambda: _sana_video_call(image=_picture()))
def sana_video_image() -> Any:
    return silent(diffusers.SanaImageToVideoPipeline(**_sana_video()))


@family(
    "SanaWMPipeline",
    lambda: {
        "image": _picture(64),
        "action": "w-8",
        "intrinsics": [64.0, 64.0, 32.0, 32.0],
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "chi_prompt": ["Prompt: "],
        "max_sequence_length": TEXT,
        "output_type": "latent",
    },
)
def sana_wm() -> Any:
    torch.manual_seed(0)
    network = diffusers.SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=1,
        hidden_size=48,
        num_attention_heads=2,
        linear_head_dim=24,
        softmax_every_n=1,
        chunk_plucker_channels=48,
        caption_channels=WIDTH,
    )
    drawn(network, 0.1)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    parts = {"vae": vae, "scheduler": _flow(), "transformer": network, **_gemma()}
    return silent(diffusers.SanaWMPipeline(**parts))


@family(
    "LuminaPipeline",
    lambda: {"height": 64, "width": 64, "clean_caption": False, "output_type": "latent"},
)
def lumina() -> Any:
    torch.manual_seed(0)
    network = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    drawn(network)
    torch.nn.init.normal_(network.layers[0].gate)  # the gate of the cross-attention starts at zero
    parts = {"vae": tiny._vae(), "scheduler": _flow(), "transformer": network, **_gemma()}
    return silent(LuminaPipeline(**parts))


def _prx_network(channels: int, **settings: Any) -> Any:
    network = diffusers.PRXTransformer2DModel(
        patch_size=2,
        in_channels=channels,
        context_in_dim=WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
        **settings,
    )
    drawn(network)
    return network


def _prx_call() -> dict[str, Any]:
    size = {"height": 16, "width": 16}
    return {**size, "use_resolution_binning": False, "output_type": "latent"}


@family("PRXPipeline", _prx_call)
def prx() -> Any:
    torch.manual_seed(0)
    parts = _gemma()
    parts["tokenizer"].model_max_length = TEXT
    return silent(
        _read_as_it_is(diffusers.PRXPipeline)(
            vae=tiny._vae(), scheduler=_flow(), transformer=_prx_network(4), **parts
        )
    )


@family("PRXPixelPipeline", _prx_call)
def prx_pixel() -> Any:
    torch.manual_seed(0)
    network = _prx_network(3, bottleneck_size=8, resolution_embeds=True)
    return silent(
        _read_as_it_is(diffusers.PRXPixelPipeline)(
            scheduler=_flow(), transformer=network, prompt_max_tokens=TEXT, **_llama()
        )
    )


def _bria_call(**more: Any) -> dict[str, Any]:
    return {"height": 64, "width": 64, "output_type": "latent", **more}


@family("BriaPipeline", lambda: _bria_call(height=16, width=16, max_sequence_length=TEXT))
def bria() -> Any:
    torch.manual_seed(0)
    network = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[0, 8, 8],
    )
    drawn(network)
    return silent(
        diffusers.BriaPipeline(
            vae=tiny._vae(shift_factor=0.0), scheduler=_flow(), transformer=network, **_t5()
        )
    )


def _fibo() -> dict[str, Any]:
    torch.manual_seed(0)
    network = diffusers.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH,
        axes_dims_rope=[0, 8, 8],
    )
    drawn(network)
    vae = _vae_wan(
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
    )
    # The class encodes an empty prompt as the token 128000, whatever the tokenizer.
    encoder = LlamaModel(_decoder(vocab_size=128_001))
    return {
        "vae": vae,
        "scheduler": _flow(),
        "transformer": network,
        "text_encoder": encoder,
        "tokenizer": _bytes(),
    }


@family("BriaFiboPipeline", _bria_call)
def bria_fibo() -> Any:
    return silent(diffusers.BriaFiboPipeline(**_fibo()))


@family(
    "BriaFiboEditPipeline",
    lambda: _bria_call(image=_picture(64), prompt='{"edit_instruction": "a breakfast of two"}'),
)
def bria_fibo_edit() -> Any:
    return silent(diffusers.BriaFiboEditPipeline(**_fibo()))


@family("ErnieImagePipeline", lambda: {"height": 32, "width": 32, "output_type": "latent"})
def ernie() -> Any:
    torch.manual_seed(0)
    network = diffusers.ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=WIDTH,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    drawn(network)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    return silent(
        diffusers.ErnieImagePipeline(vae=vae, scheduler=_flow(), transformer=network, **_llama())
    )


class _Processor:
    """A processor like Qwen3-VL's that ignores images."""

    def __init__(self) -> None:
        self.tokenizer = _bytes()

    def __call__(self, text: list[str], images: Any = None, **settings: Any) -> Any:
        return self.tokenizer(text, **settings)


@family(
    "JoyImageEditPlusPipeline",
    lambda: {"images": [_picture(16)], "height": 16, "width": 16, "output_type": "latent"},
)
def joyimage() -> Any:
    torch.manual_seed(0)
    network = diffusers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
        theta=256,
    )
    drawn(network)
    _louder(network, 3.0, "attn")
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
    }
    words = _decoder(transformers.Qwen3VLTextConfig).to_dict()
    config = transformers.Qwen3VLConfig(text_config=words, vision_config=vision)
    pipe = diffusers.JoyImageEditPlusPipeline(
        vae=_vae_wan(),
        scheduler=_flow(),
        transformer=network,
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config),
        tokenizer=_bytes(),
        processor=_Processor(),
    )
    # By default the class resizes images to a million pixels.
    pipe.image_processor.get_default_height_width = lambda *_: (16, 16)
    return silent(pipe)


def _wan_like(**settings: Any) -> dict[str, Any]:
    """Common configuration of the networks that descend from Wan's."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": WIDTH,
        "num_layers": 1,
        "cross_attn_norm": True,
        **settings,
    }


def _video_call(num_frames: int = 9, **more: Any) -> dict[str, Any]:
    size = {"height": 32, "width": 32, "num_frames": num_frames}
    return {**size, "max_sequence_length": TEXT, "output_type": "latent", **more}


def _anyflow(network_class: Any, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    network = network_class(**_wan_like(rope_max_seq_len=32, **settings))
    drawn(network)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return {"vae": _vae_wan(), "scheduler": scheduler, "transformer": network, **_umt5()}


# The default, a mean velocity over the step, cannot be described as a scheduler's prediction.
@family("AnyFlowPipeline", lambda: _video_call(guidance_scale=4.0, use_mean_velocity=False))
def anyflow() -> Any:
    parts = _anyflow(diffusers.AnyFlowTransformer3DModel)
    parts["scheduler"] = _flow(shift=5.0)
    return silent(diffusers.AnyFlowPipeline(**parts))


@family("AnyFlowFARPipeline", lambda: _video_call(guidance_scale=4.0))
def anyflow_far() -> Any:
    parts = _anyflow(
        diffusers.AnyFlowFARTransformer3DModel,
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        chunk_partition=(1, 1, 1),
    )
    return silent(diffusers.AnyFlowFARPipeline(**parts))


# Three chunks, each of which sets the timesteps again.
@family("HeliosPipeline", lambda: _video_call(num_frames=13, num_latent_frames_per_chunk=2))
def helios() -> Any:
    torch.manual_seed(0)
    network = diffusers.HeliosTransformer3DModel(
        **_wan_like(
            rope_dim=(4, 4, 4),
            guidance_cross_attn=True,
            zero_history_timestep=True,
            has_multi_term_memory_patch=True,
        )
    )
    drawn(network)
    scheduler = _flow(use_dynamic_shifting=True)
    parts = {"vae": _vae_wan(), "scheduler": scheduler, "transformer": network, **_umt5()}
    return silent(_read_as_it_is(diffusers.HeliosPipeline)(**parts))


@family("LucyEditPipeline", lambda: _video_call(video=_film()))
def lucy() -> Any:
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(**_wan_like(in_channels=8, rope_max_seq_len=32))
    drawn(network)
    parts = {"vae": _vae_wan(), "scheduler": _flow(), "transformer": network, **_umt5()}
    return silent(_read_as_it_is(diffusers.LucyEditPipeline)(**parts))


def _motif(image_width: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    network = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=2,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
        **({} if image_width is None else {"image_embed_dim": image_width}),
    )
    drawn(network)
    return {
        "vae": _vae_wan(),
        "scheduler": _flow(shift=7.0),
        "transformer": network,
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }


@family("MotifVideoPipeline", _video_call)
def motif() -> Any:
    return silent(diffusers.MotifVideoPipeline(**_motif(), **_gemma()))


@family("MotifVideoImage2VideoPipeline", lambda: _video_call(image=_picture()))
def motif_image() -> Any:
    parts = _motif(16)
    encoder = _gemma()
    encoder["text_encoder"].vision_tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    return silent(
        diffusers.MotifVideoImage2VideoPipeline(**parts, **encoder, feature_extractor=images)
    )


def _hunyuan(network_class: Any, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    network = network_class(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": tiny.WIDTH,
            "rope_axes_dim": (4, 4, 4),
            **settings,
        }
    )
    drawn(network)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return {
        "vae": vae,
        "scheduler": _flow(shift=7.0),
        "transformer": network,
        "text_encoder": LlamaModel(_decoder()),
        "tokenizer": _bytes(),
        "text_encoder_2": CLIPTextModel(tiny._text_config()),
        "tokenizer_2": tiny._tokenizer(),
    }


def _hunyuan_call(**more: Any) -> dict[str, Any]:
    template = {"template": "{}", "crop_start": 0}
    return _video_call(image=_picture(), prompt_template=template, true_cfg_scale=6.0, **more)


@family("HunyuanSkyreelsImageToVideoPipeline", _hunyuan_call)
def hunyuan_skyreels() -> Any:
    parts = _hunyuan(diffusers.HunyuanVideoTransformer3DModel, in_channels=8)
    return silent(diffusers.HunyuanSkyreelsImageToVideoPipeline(**parts))


# Two sections, each of which sets the timesteps again.
@family("HunyuanVideoFramepackPipeline", lambda: _hunyuan_call(num_frames=13, latent_window_size=3))
def hunyuan_framepack() -> Any:
    parts = _hunyuan(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return silent(
        diffusers.HunyuanVideoFramepackPipeline(
            **parts,
            image_encoder=SiglipVisionModel(vision),
            feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        )
    )
