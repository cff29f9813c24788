"""Families that call their network once for the prompt and once for the negative prompt.

Classes are looked up inside the builders, because many are not in the oldest supported version of
diffusers.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import ByT5Tokenizer

from dng_models.pipelines import tiny
from tests.helpers.families.base import NEGATIVE, PROMPT, drawn, family, silent

SQUARE = {"height": 16, "width": 16, "output_type": "latent"}
LARGER = {**SQUARE, "height": 32, "width": 32}
SHORT = {"max_sequence_length": 32}
VIDEO = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
BYTES = len(ByT5Tokenizer())
FIFTH = int(transformers.__version__.split(".")[0]) >= 5
WIDTH = 32


def picture(size: int = 16) -> Image.Image:
    """A colour gradient."""
    levels = torch.linspace(0, 255, size).to(torch.uint8)
    rows, columns = levels[:, None].expand(size, size), levels[None].expand(size, size)
    return Image.fromarray(torch.stack([rows, columns, rows.flip(0)], dim=-1).numpy())


def mask(size: int = 16) -> Image.Image:
    """A mask that is white on the left half, which is repainted."""
    half = torch.zeros(size, size, dtype=torch.uint8)
    half[:, : size // 2] = 255
    return Image.fromarray(half.numpy())


def clip(prefix: str = "") -> dict[str, Any]:
    return {
        f"text_encoder{prefix}": transformers.CLIPTextModel(tiny._text_config()),
        f"tokenizer{prefix}": tiny._tokenizer(),
    }


def t5(prefix: str = "", model: str = "T5", width: int = WIDTH) -> dict[str, Any]:
    """T5 or UMT5 with a tokenizer of bytes."""
    config = getattr(transformers, f"{model}Config")(
        vocab_size=BYTES, d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=4
    )
    return {
        f"text_encoder{prefix}": getattr(transformers, f"{model}EncoderModel")(config),
        f"tokenizer{prefix}": ByT5Tokenizer(),
    }


def sees(image_size: int = 32, width: int = 8) -> dict[str, Any]:
    """CLIP's image encoder and image processor."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
    )
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config),
        "image_processor": transformers.CLIPImageProcessor(
            crop_size={"height": image_size, "width": image_size},
            size={"shortest_edge": image_size},
        ),
    }


def completed(part: Any, name: str, substitute: Any) -> Any:
    """Put a substitute into a class's module for what a missing package would provide."""
    module = sys.modules[type(part).__module__]
    if not hasattr(module, name):
        setattr(module, name, substitute)
    return part


def spelled(pipe: Any) -> Any:
    """Leave text unchanged where ftfy, which repairs broken characters, is not installed."""
    return completed(pipe, "ftfy", SimpleNamespace(fix_text=str))


def resized(network: Any) -> Any:
    """Replace the only function of torchvision that Cosmos needs: it resizes the padding mask."""

    def resize(mask: Any, size: list[int], interpolation: Any) -> Any:
        return torch.nn.functional.interpolate(mask, size)

    substitute = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST=None),
    )
    return completed(network, "transforms", substitute)


def shrunken(pipe: Any) -> Any:
    """Resize condition images to 32 x 32 pixels, where the class would use a megapixel."""
    module: Any = sys.modules[type(pipe).__module__]
    given = module.calculate_dimensions
    if given.__module__ == module.__name__:
        module.calculate_dimensions = lambda area, ratio: given(area and 32 * 32, ratio)
    return pipe


def flow(**arguments: Any) -> dict[str, Any]:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(**arguments)}


def flux_network(name: str = "FluxTransformer2DModel", **arguments: Any) -> Any:
    network = getattr(diffusers, name)(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 4, 8),
            **arguments,
        }
    )
    drawn(network)
    return network


def flux_like(name: str, **parts: Any) -> Any:
    torch.manual_seed(0)
    return silent(
        getattr(diffusers, name)(
            **flow(),
            **clip(),
            **t5("_2"),
            vae=tiny._vae(shift_factor=0.0609),
            transformer=flux_network(pooled_projection_dim=WIDTH, guidance_embeds=True),
            **parts,
        )
    )


TRUE = {**SQUARE, **SHORT, "true_cfg_scale": 4.0}


@family("FluxPipeline", lambda: TRUE)
def flux() -> Any:
    return flux_like("FluxPipeline")


@family("FluxImg2ImgPipeline", lambda: {**TRUE, "image": picture()})
def flux_image_to_image() -> Any:
    return flux_like("FluxImg2ImgPipeline")


@family("FluxInpaintPipeline", lambda: {**TRUE, "image": picture(), "mask_image": mask()})
def flux_inpaint() -> Any:
    return flux_like("FluxInpaintPipeline")


@family("FluxControlNetPipeline", lambda: {**TRUE, "control_image": picture()})
def flux_controlnet() -> Any:
    torch.manual_seed(1)
    controlnet = flux_network(
        "FluxControlNetModel", pooled_projection_dim=WIDTH, guidance_embeds=True
    )
    return flux_like("FluxControlNetPipeline", controlnet=controlnet)


KONTEXT = {**TRUE, "max_area": 16 * 16, "_auto_resize": False}


@family("FluxKontextPipeline", lambda: {**KONTEXT, "image": picture()})
def flux_kontext() -> Any:
    return flux_like("FluxKontextPipeline")


@family(
    "FluxKontextInpaintPipeline",
    lambda: {**KONTEXT, "image": picture(), "mask_image": mask(), "strength": 0.6},
)
def flux_kontext_inpaint() -> Any:
    return flux_like("FluxKontextInpaintPipeline")


def chroma_like(name: str) -> Any:
    torch.manual_seed(0)
    network = flux_network(
        "ChromaTransformer2DModel",
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    # The inpainting class reads this setting, which the network's configuration lacks.
    network.register_to_config(guidance_embeds=False)
    return silent(
        getattr(diffusers, name)(
            **flow(), **t5(), vae=tiny._vae(shift_factor=0.0609), transformer=network
        )
    )


@family("ChromaPipeline", lambda: {**SQUARE, **SHORT})
def chroma() -> Any:
    return chroma_like("ChromaPipeline")


@family("ChromaImg2ImgPipeline", lambda: {**SQUARE, **SHORT, "image": picture(), "strength": 0.6})
def chroma_image_to_image() -> Any:
    return chroma_like("ChromaImg2ImgPipeline")


@family(
    "ChromaInpaintPipeline",
    lambda: {**SQUARE, **SHORT, "image": picture(), "mask_image": mask()},
)
def chroma_inpaint() -> Any:
    return chroma_like("ChromaInpaintPipeline")


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def wan_network(name: str = "WanTransformer3DModel", **arguments: Any) -> Any:
    network = getattr(diffusers, name)(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": WIDTH,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 1,
            "cross_attn_norm": True,
            "rope_max_seq_len": 32,
            **arguments,
        }
    )
    drawn(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".attn2.to_" in name and parameter.ndim > 1:
                parameter *= 4
    return network


def wan_like(name: str, **parts: Any) -> Any:
    pipe = getattr(diffusers, name)(
        **{**flow(shift=3.0), **t5(model="UMT5"), "vae": wan_vae(), **parts}
    )
    return spelled(silent(pipe))


@family("WanPipeline", lambda: {**VIDEO, **SHORT})
def wan() -> Any:
    torch.manual_seed(0)
    return wan_like("WanPipeline", transformer=wan_network())


TWO = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}


@family("WanPipeline (two networks)", lambda: {**VIDEO, **SHORT, **TWO})
def wan_two() -> Any:
    torch.manual_seed(0)
    return wan_like(
        "WanPipeline", transformer=wan_network(), transformer_2=wan_network(), boundary_ratio=0.5
    )


@family("WanPipeline (a time per token)", lambda: {**VIDEO, **SHORT})
def wan_tokens() -> Any:
    torch.manual_seed(0)
    return wan_like("WanPipeline", transformer=wan_network(), expand_timesteps=True)


@family("WanImageToVideoPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def wan_image() -> Any:
    torch.manual_seed(0)
    network = wan_network(in_channels=36, image_dim=8, added_kv_proj_dim=24)
    return wan_like("WanImageToVideoPipeline", transformer=network, **sees())


@family(
    "WanImageToVideoPipeline (two networks)",
    lambda: {**VIDEO, **SHORT, **TWO, "image": picture(32)},
)
def wan_image_two() -> Any:
    torch.manual_seed(0)
    return wan_like(
        "WanImageToVideoPipeline",
        transformer=wan_network(in_channels=36),
        transformer_2=wan_network(in_channels=36),
        boundary_ratio=0.5,
        image_encoder=None,
        image_processor=None,
    )


@family(
    "WanImageToVideoPipeline (a time per token)",
    lambda: {**VIDEO, **SHORT, "image": picture(32)},
)
def wan_image_tokens() -> Any:
    torch.manual_seed(0)
    return wan_like(
        "WanImageToVideoPipeline",
        transformer=wan_network(),
        expand_timesteps=True,
        image_encoder=None,
        image_processor=None,
    )


@family(
    "WanVideoToVideoPipeline",
    lambda: {
        **{name: value for name, value in VIDEO.items() if name != "num_frames"},
        **SHORT,
        "video": [picture(32)] * 5,
    },
)
def wan_video() -> Any:
    torch.manual_seed(0)
    return wan_like("WanVideoToVideoPipeline", transformer=wan_network())


@family(
    "WanVACEPipeline",
    lambda: {**VIDEO, **SHORT, "video": [picture(32)] * 5, "mask": [mask(32)] * 5},
)
def wan_vace() -> Any:
    torch.manual_seed(0)
    network = wan_network(
        "WanVACETransformer3DModel", num_layers=2, vace_layers=[0], vace_in_channels=96
    )
    return wan_like("WanVACEPipeline", transformer=network, transformer_2=None)


@family(
    "WanAnimatePipeline",
    lambda: {
        "height": 16,
        "width": 16,
        "output_type": "latent",
        **SHORT,
        "image": picture(16),
        "pose_video": [picture(16)] * 5,
        "face_video": [picture(16)] * 5,
        "segment_frame_length": 5,
        "guidance_scale": 3.0,
    },
)
def wan_animate() -> Any:
    torch.manual_seed(0)
    network = wan_network(
        "WanAnimateTransformer3DModel",
        in_channels=36,
        latent_channels=16,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    return wan_like("WanAnimatePipeline", transformer=network, **sees())


def cogview4_like(name: str, channels: int) -> Any:
    torch.manual_seed(0)
    config = transformers.GlmConfig(
        vocab_size=BYTES,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=4,
    )
    drawn(network)
    with torch.no_grad():
        network.patch_embed.text_proj.weight *= 8
    return silent(
        getattr(diffusers, name)(
            **flow(
                base_shift=0.25,
                max_shift=0.75,
                base_image_seq_len=256,
                use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
            text_encoder=transformers.GlmModel(config),
            tokenizer=ByT5Tokenizer(),
            vae=tiny._vae(),
            transformer=network,
        )
    )


@family("CogView4Pipeline", lambda: {**SQUARE, **SHORT})
def cogview4() -> Any:
    return cogview4_like("CogView4Pipeline", 4)


@family("CogView4ControlPipeline", lambda: {**SQUARE, **SHORT, "control_image": picture()})
def cogview4_control() -> Any:
    return cogview4_like("CogView4ControlPipeline", 8)


IMAGE, VISION = "<|image_pad|>", ("<|vision_start|>", "<|vision_end|>")
# Only the last message, because system prompts have too many bytes.
CHAT = (
    "{% set m = messages[-1] %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}"
)


def reader() -> Any:
    """A tokenizer of bytes with Qwen's special tokens."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens([IMAGE, *VISION, "<|video_pad|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


class Processor:
    """Qwen's processor without torchvision: 16 patches of an image make four tokens."""

    def __init__(self, patch: int = 4) -> None:
        self.tokenizer = reader()
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.image_token = IMAGE
        self.image_processor = self
        self.merge_size = 2
        self.patch = patch
        self.decode, self.batch_decode = self.tokenizer.decode, self.tokenizer.batch_decode

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **settings: Any) -> Any:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return [self.tokenizer(text)["input_ids"]] if tokenize else text

    def __call__(
        self, text: Any = None, images: Any = None, videos: Any = None, **settings: Any
    ) -> Any:
        found: dict[str, Any] = {}
        if images is not None:
            images = images if isinstance(images, list) else [images]
            found["pixel_values"] = torch.cat([self._patches(image) for image in images])
            found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(images))
        if text is not None:
            text = [text] if isinstance(text, str) else text
            found.update(self.tokenizer([t.replace(IMAGE, 4 * IMAGE) for t in text], **settings))
            if images is not None and FIFTH:
                found["mm_token_type_ids"] = (found["input_ids"] == self.image_token_id).long()
        return transformers.BatchFeature(found)

    def _patches(self, image: Any) -> torch.Tensor:
        side = 4 * self.patch
        small = image.convert("RGB").resize((side, side))
        levels = torch.tensor(list(small.tobytes()), dtype=torch.float32) / 127.5 - 1
        patches = levels.view(4, self.patch, 4, self.patch, 3).permute(0, 2, 4, 1, 3)
        return patches.reshape(16, 3, 1, -1).expand(-1, -1, 2, -1).reshape(16, -1)


def qwen(
    head: str = "ForConditionalGeneration", version: str = "Qwen2_5_VL", layers: int = 2
) -> Any:
    """A tiny Qwen model with vision."""
    tokenizer = reader()
    identity = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if head == "TextModel":
        return _loud(
            getattr(transformers, f"{version}TextModel")(
                getattr(transformers, f"{version}TextConfig")(**text)
            )
        )
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if version == "Qwen3VL":
        vision["deepstack_visual_indexes"] = [0]
    config = getattr(transformers, f"{version}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=identity(IMAGE),
        video_token_id=identity("<|video_pad|>"),
        vision_start_token_id=identity(VISION[0]),
        vision_end_token_id=identity(VISION[1]),
    )
    return _loud(getattr(transformers, f"{version}{head}")(config))


def _loud(model: Any) -> Any:
    """Draw large embeddings of tokens: some classes use the states before the last norm."""
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def untemplated(pipe: Any) -> Any:
    """Remove the chat template around the prompt."""
    pipe.prompt_template_encode = pipe.prompt_template = "{}"
    pipe.prompt_template_encode_start_idx = 0
    pipe.prompt_template_encode_prefix = pipe.prompt_template_encode_suffix = ""
    pipe.tokenizer_max_length = 32
    return pipe


def qwen_vae(channels: int = 4, **arguments: Any) -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        **arguments,
    )


def qwen_network(name: str = "QwenImageTransformer2DModel", **arguments: Any) -> Any:
    network = getattr(diffusers, name)(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (8, 4, 4),
            **arguments,
        }
    )
    drawn(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".add_v_proj." in name:
                parameter *= 4
    return network


def qwen_like(name: str, **parts: Any) -> Any:
    torch.manual_seed(0)
    return untemplated(
        silent(
            getattr(diffusers, name)(
                **{
                    **flow(),
                    "text_encoder": qwen(),
                    "tokenizer": reader(),
                    "vae": qwen_vae(),
                    "transformer": qwen_network(),
                    **parts,
                }
            )
        )
    )


@family("QwenImagePipeline", lambda: SQUARE)
def qwen_image() -> Any:
    return qwen_like("QwenImagePipeline")


@family("QwenImageImg2ImgPipeline", lambda: {**SQUARE, "image": picture()})
def qwen_image_to_image() -> Any:
    return qwen_like("QwenImageImg2ImgPipeline")


@family("QwenImageInpaintPipeline", lambda: {**SQUARE, "image": picture(), "mask_image": mask()})
def qwen_inpaint() -> Any:
    return qwen_like("QwenImageInpaintPipeline")


@family("QwenImageEditPipeline", lambda: {**SQUARE, "image": picture(32)})
def qwen_edit() -> Any:
    pipe = shrunken(qwen_like("QwenImageEditPipeline", processor=Processor()))
    pipe.prompt_template_encode = VISION[0] + IMAGE + VISION[1] + "{}"
    return pipe


@family(
    "QwenImageEditInpaintPipeline",
    lambda: {**LARGER, "image": picture(32), "mask_image": mask(32)},
)
def qwen_edit_inpaint() -> Any:
    pipe = shrunken(qwen_like("QwenImageEditInpaintPipeline", processor=Processor()))
    pipe.prompt_template_encode = VISION[0] + IMAGE + VISION[1] + "{}"
    return pipe


@family("QwenImageEditPlusPipeline", lambda: {**SQUARE, "image": [picture(32), picture(32)]})
def qwen_edit_plus() -> Any:
    return shrunken(qwen_like("QwenImageEditPlusPipeline", processor=Processor()))


@family("QwenImageControlNetPipeline", lambda: {**SQUARE, "control_image": picture()})
def qwen_controlnet() -> Any:
    torch.manual_seed(1)
    return qwen_like(
        "QwenImageControlNetPipeline", controlnet=qwen_network("QwenImageControlNetModel")
    )


@family(
    "QwenImageControlNetInpaintPipeline",
    lambda: {**SQUARE, "control_image": picture(), "control_mask": mask()},
)
def qwen_controlnet_inpaint() -> Any:
    torch.manual_seed(1)
    return qwen_like(
        "QwenImageControlNetInpaintPipeline",
        controlnet=qwen_network("QwenImageControlNetModel", extra_condition_channels=4),
    )


@family(
    "QwenImageLayeredPipeline",
    lambda: {"output_type": "pt", "image": picture(32).convert("RGBA"), "layers": 1},
)
def qwen_layered() -> Any:
    torch.manual_seed(0)
    vae = qwen_vae(8, input_channels=4)
    network = qwen_network(
        in_channels=32, out_channels=8, use_additional_t_cond=True, use_layer3d_rope=True
    )
    return shrunken(
        qwen_like("QwenImageLayeredPipeline", processor=Processor(), vae=vae, transformer=network)
    )


class Permissive:
    """A Cosmos guardrail that lets everything through."""

    def to(self, device: Any) -> Any:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_network(channels: int, **arguments: Any) -> Any:
    network = diffusers.CosmosTransformer3DModel(
        **{
            "in_channels": channels,
            "out_channels": channels // 4 * 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "mlp_ratio": 2,
            "text_embed_dim": WIDTH,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": True,
            "extra_pos_embed_type": "learnable",
            **arguments,
        }
    )
    drawn(network)
    return resized(network)


def cosmos_like(name: str, **parts: Any) -> Any:
    return silent(
        getattr(diffusers, name)(
            **{
                **flow(use_karras_sigmas=True),
                **t5(),
                "vae": wan_vae(),
                "safety_checker": Permissive(),
                **parts,
            }
        )
    )


def cosmos1_like(name: str, channels: int) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    return cosmos_like(name, vae=vae, scheduler=scheduler, transformer=cosmos_network(channels))


@family("CosmosTextToWorldPipeline", lambda: {**VIDEO, **SHORT})
def cosmos_text() -> Any:
    return cosmos1_like("CosmosTextToWorldPipeline", 4)


@family("CosmosVideoToWorldPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def cosmos_video() -> Any:
    return cosmos1_like("CosmosVideoToWorldPipeline", 5)


@family("Cosmos2TextToImagePipeline", lambda: {**LARGER, **SHORT})
def cosmos2_text() -> Any:
    torch.manual_seed(0)
    return cosmos_like("Cosmos2TextToImagePipeline", transformer=cosmos_network(16))


@family("Cosmos2VideoToWorldPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def cosmos2_video() -> Any:
    torch.manual_seed(0)
    return cosmos_like("Cosmos2VideoToWorldPipeline", transformer=cosmos_network(17))


def cosmos25_like(name: str, settings: dict[str, Any] | None = None, **parts: Any) -> Any:
    torch.manual_seed(0)
    return cosmos_like(
        name,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        text_encoder=qwen(),
        tokenizer=reader(),
        transformer=cosmos_network(17, text_embed_dim=2 * WIDTH, **settings or {}),
        **parts,
    )


@family(
    "Cosmos2_5_PredictBasePipeline",
    lambda: {
        **VIDEO,
        **SHORT,
        "video": [picture(32)] * 5,
        "num_latent_conditional_frames": 1,
    },
)
def cosmos25_predict() -> Any:
    return cosmos25_like("Cosmos2_5_PredictBasePipeline")


def hunyuan_network(name: str, **arguments: Any) -> Any:
    network = getattr(diffusers, name)(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            **arguments,
        }
    )
    drawn(network)
    return network


def hunyuan_vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": BYTES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def hunyuan_like(name: str, **parts: Any) -> Any:
    return silent(
        getattr(diffusers, name)(
            **{
                **flow(shift=7.0),
                **clip("_2"),
                "text_encoder": transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)),
                "tokenizer": ByT5Tokenizer(),
                "vae": hunyuan_vae(),
                **parts,
            }
        )
    )


HUNYUAN = {
    **VIDEO,
    **SHORT,
    "true_cfg_scale": 4.0,
    "prompt_template": {"template": "{}", "crop_start": 0},
}
ROPE3 = {"pooled_projection_dim": WIDTH, "patch_size": 1, "rope_axes_dim": (4, 6, 6)}


@family("HunyuanVideoPipeline", lambda: HUNYUAN)
def hunyuan_video() -> Any:
    torch.manual_seed(0)
    network = hunyuan_network("HunyuanVideoTransformer3DModel", guidance_embeds=True, **ROPE3)
    return hunyuan_like("HunyuanVideoPipeline", transformer=network)


def hunyuan_image_to_video(condition: str, channels: int) -> Any:
    torch.manual_seed(0)
    network = hunyuan_network(
        "HunyuanVideoTransformer3DModel",
        guidance_embeds=condition == "token_replace",
        image_condition_type=condition,
        in_channels=channels,
        **ROPE3,
    )
    pad, image = 300, 301
    config = transformers.LlavaConfig(
        vision_config=sees()["image_encoder"].config,
        text_config=transformers.LlamaConfig(**{**LLAMA, "pad_token_id": pad}),
        pad_token_id=pad,
        image_token_index=image,
    )
    return hunyuan_like(
        "HunyuanVideoImageToVideoPipeline",
        transformer=network,
        text_encoder=transformers.LlavaForConditionalGeneration(config),
        image_processor=sees()["image_processor"],
    )


HUNYUAN_IMAGE = {
    **HUNYUAN,
    "image": picture(32),
    "max_sequence_length": 64,
    "prompt_template": {
        "template": "egg: {}",
        "crop_start": 0,
        "image_emb_len": 16,
        "image_emb_start": 36,
        "image_emb_end": 52,
    },
}


@family("HunyuanVideoImageToVideoPipeline", lambda: HUNYUAN_IMAGE)
def hunyuan_video_image() -> Any:
    return hunyuan_image_to_video("latent_concat", 9)


@family("HunyuanVideoImageToVideoPipeline (first frame replaced)", lambda: HUNYUAN_IMAGE)
def hunyuan_video_replace() -> Any:
    return hunyuan_image_to_video("token_replace", 4)


@family("HunyuanImagePipeline", lambda: SQUARE)
def hunyuan_image() -> Any:
    torch.manual_seed(0)
    network = hunyuan_network(
        "HunyuanImageTransformer2DModel",
        patch_size=(1, 1),
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )
    pipe = diffusers.HunyuanImagePipeline(
        **flow(shift=7.0),
        **t5("_2"),
        text_encoder=qwen(layers=3),
        tokenizer=reader(),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=8,
            sample_size=128,
        ),
        transformer=network,
        guider=diffusers.AdaptiveProjectedMixGuidance(),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(),
    )
    pipe.tokenizer_2_max_length = 16
    return untemplated(silent(pipe))


def skyreels_network(**arguments: Any) -> Any:
    return wan_network("SkyReelsV2Transformer3DModel", **arguments)


@family("SkyReelsV2Pipeline", lambda: {**VIDEO, **SHORT})
def skyreels() -> Any:
    torch.manual_seed(0)
    return wan_like("SkyReelsV2Pipeline", transformer=skyreels_network())


@family("SkyReelsV2ImageToVideoPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def skyreels_image() -> Any:
    torch.manual_seed(0)
    network = skyreels_network(in_channels=36, image_dim=8, added_kv_proj_dim=24)
    return wan_like("SkyReelsV2ImageToVideoPipeline", transformer=network, **sees())


@family("ChronoEditPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def chronoedit() -> Any:
    torch.manual_seed(0)
    network = wan_network(
        "ChronoEditTransformer3DModel", in_channels=36, image_dim=8, added_kv_proj_dim=24
    )
    return wan_like("ChronoEditPipeline", transformer=network, **sees())


@family("Lumina2Pipeline", lambda: {**LARGER, **SHORT, "system_prompt": ""})
def lumina2() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=BYTES,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        cap_feat_dim=WIDTH,
    )
    drawn(network)
    return silent(
        diffusers.Lumina2Pipeline(
            **flow(),
            text_encoder=transformers.Gemma2Model(config),
            tokenizer=ByT5Tokenizer(),
            vae=tiny._vae(shift_factor=0.0609),
            transformer=network,
        )
    )


@family(
    "QwenImage21Pipeline",
    lambda: {**SQUARE, "height": 64, "width": 64, "true_cfg_scale": 4.0},
)
def qwen_image21() -> Any:
    torch.manual_seed(0)
    network = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    drawn(network)
    pipe = diffusers.QwenImage21Pipeline(
        **flow(),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=qwen(version="Qwen3VL"),
        processor=Processor(),
        transformer=network,
    )
    pipe.prompt_template_t2i, pipe._drop_idx = "{}", 0
    return silent(pipe)


@family("HunyuanImageRefinerPipeline", lambda: {**LARGER, "image": picture(32)})
def hunyuan_refiner() -> Any:
    torch.manual_seed(0)
    network = hunyuan_network(
        "HunyuanImageTransformer2DModel",
        in_channels=16,
        out_channels=8,
        patch_size=(1, 1, 1),
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
    )
    pipe = diffusers.HunyuanImageRefinerPipeline(
        **flow(shift=7.0),
        text_encoder=qwen(layers=3),
        tokenizer=reader(),
        vae=diffusers.AutoencoderKLHunyuanImageRefiner(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        transformer=network,
        guider=diffusers.AdaptiveProjectedMixGuidance(),
    )
    return untemplated(silent(pipe))


def hunyuan15_like(name: str, task: str, **parts: Any) -> Any:
    torch.manual_seed(0)
    network = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type=task,
    )
    drawn(network)
    pipe = getattr(diffusers, name)(
        **flow(shift=7.0),
        **t5("_2"),
        text_encoder=qwen("TextModel", layers=3),
        tokenizer=reader(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        transformer=network,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **parts,
    )
    pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 16, 4
    return untemplated(silent(pipe))


@family("HunyuanVideo15Pipeline", lambda: {**SQUARE, "num_frames": 5})
def hunyuan_video15() -> Any:
    return hunyuan15_like("HunyuanVideo15Pipeline", "t2v")


@family(
    "HunyuanVideo15ImageToVideoPipeline",
    lambda: {"image": picture(), "num_frames": 5, "output_type": "latent"},
)
def hunyuan_video15_image() -> Any:
    config = transformers.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return hunyuan15_like(
        "HunyuanVideo15ImageToVideoPipeline",
        "i2v",
        image_encoder=transformers.SiglipVisionModel(config),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
    )


@family(
    "Cosmos2_5_TransferPipeline",
    lambda: {
        **VIDEO,
        **SHORT,
        "controls": [picture(32)] * 5,
        "num_frames_per_chunk": 5,
    },
)
def cosmos25_transfer() -> Any:
    torch.manual_seed(1)
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=WIDTH,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=2 * WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        extra_pos_embed_type="learnable",
    )
    drawn(resized(controlnet))
    return cosmos25_like(
        "Cosmos2_5_TransferPipeline", {"controlnet_block_every_n": 1}, controlnet=controlnet
    )


@family(
    "Cosmos3OmniPipeline",
    lambda: {
        **VIDEO,
        "use_system_prompt": False,
        "add_resolution_template": False,
        "add_duration_template": False,
    },
)
def cosmos3() -> Any:
    torch.manual_seed(0)
    network = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=WIDTH,
        intermediate_size=32,
        latent_channel=16,
        latent_patch_size=1,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        rope_axes_dim=[2, 3, 3],
        vocab_size=len(reader()),
    )
    drawn(network)
    return silent(
        diffusers.Cosmos3OmniPipeline(
            transformer=network,
            text_tokenizer=reader(),
            vae=wan_vae(),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True
            ),
            enable_safety_checker=False,
        )
    )


def kandinsky5_like(name: str, vae: Any, *, condition: bool) -> Any:
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=WIDTH,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        visual_cond=condition,
    )
    drawn(network)
    pipe = getattr(diffusers, name)(
        **flow(shift=7.0),
        **clip("_2"),
        text_encoder=qwen(),
        tokenizer=Processor(),
        vae=vae,
        transformer=network,
    )
    pipe.resolutions = [(32, 32)]
    return untemplated(spelled(silent(pipe)))


def eightfold_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


@family("Kandinsky5T2IPipeline", lambda: {**LARGER, **SHORT})
def kandinsky5_image() -> Any:
    torch.manual_seed(0)
    return kandinsky5_like("Kandinsky5T2IPipeline", eightfold_vae(), condition=False)


@family("Kandinsky5I2IPipeline", lambda: {**LARGER, **SHORT, "image": picture(32)})
def kandinsky5_image_to_image() -> Any:
    torch.manual_seed(0)
    pipe = kandinsky5_like("Kandinsky5I2IPipeline", eightfold_vae(), condition=True)
    pipe.prompt_template = VISION[0] + IMAGE + VISION[1] + "{}"
    return pipe


@family("Kandinsky5T2VPipeline", lambda: {**VIDEO, **SHORT})
def kandinsky5_video() -> Any:
    torch.manual_seed(0)
    return kandinsky5_like("Kandinsky5T2VPipeline", hunyuan_vae(), condition=False)


@family("Kandinsky5I2VPipeline", lambda: {**VIDEO, **SHORT, "image": picture(32)})
def kandinsky5_image_to_video() -> Any:
    torch.manual_seed(0)
    return kandinsky5_like("Kandinsky5I2VPipeline", hunyuan_vae(), condition=True)


@family("Krea2Pipeline", lambda: {**SQUARE, **SHORT})
def krea2() -> Any:
    torch.manual_seed(0)
    network = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    drawn(network)
    pipe = diffusers.Krea2Pipeline(
        **flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=qwen_vae(),
        text_encoder=qwen("Model", "Qwen3VL"),
        tokenizer=reader(),
        transformer=network,
        text_encoder_select_layers=(0, 1, 2),
    )
    pipe.prompt_template_encode_num_suffix_tokens = 1
    return untemplated(silent(pipe))


def longcat_like(name: str) -> Any:
    torch.manual_seed(0)
    network = flux_network(
        "LongCatImageTransformer2DModel", in_channels=64, pooled_projection_dim=WIDTH
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=0.0609,
    )
    pipe = getattr(diffusers, name)(
        **flow(),
        vae=vae,
        text_encoder=qwen(),
        tokenizer=reader(),
        text_processor=Processor(),
        transformer=network,
    )
    pipe = untemplated(silent(pipe))
    pipe.prompt_template_encode_suffix = "."
    return pipe


@family("LongCatImagePipeline", lambda: {**SQUARE, "enable_prompt_rewrite": False})
def longcat() -> Any:
    return longcat_like("LongCatImagePipeline")


@family("LongCatImageEditPipeline", lambda: {"output_type": "latent", "image": picture(32)})
def longcat_edit() -> Any:
    pipe = shrunken(longcat_like("LongCatImageEditPipeline"))
    pipe.prompt_template_encode_prefix = VISION[0] + IMAGE + VISION[1]
    # With a longer prompt the class fails when it warns that the prompt is cut off.
    pipe.tokenizer_max_length = 128
    return pipe


@family("LongCatAudioDiTPipeline", lambda: {"audio_duration_s": 0.01, "output_type": "latent"})
def longcat_audio() -> Any:
    torch.manual_seed(0)
    network = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=1, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    drawn(network)
    return silent(
        diffusers.LongCatAudioDiTPipeline(
            **flow(shift=1.0, invert_sigmas=True),
            **t5(model="UMT5"),
            vae=diffusers.LongCatAudioDiTVae(
                channels=16,
                c_mults=[1, 2],
                strides=[2],
                latent_dim=8,
                encoder_latent_dim=16,
                downsampling_ratio=16,
            ),
            transformer=network,
        )
    )


@family("NucleusMoEImagePipeline", lambda: {**SQUARE, **SHORT, "return_index": -1})
def nucleus() -> Any:
    torch.manual_seed(0)
    network = qwen_network(
        "NucleusMoEImageTransformer2DModel", moe_enabled=False, capacity_factors=[8.0]
    )
    return silent(
        diffusers.NucleusMoEImagePipeline(
            **flow(),
            vae=qwen_vae(),
            text_encoder=qwen(version="Qwen3VL"),
            processor=Processor(),
            transformer=network,
        )
    )


@family("OvisImagePipeline", lambda: {**SQUARE, **SHORT})
def ovis() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(reader()),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    pipe = diffusers.OvisImagePipeline(
        **flow(),
        vae=tiny._vae(shift_factor=0.0609),
        text_encoder=transformers.Qwen3Model(config),
        tokenizer=reader(),
        transformer=flux_network("OvisImageTransformer2DModel", out_channels=16),
    )
    pipe.system_prompt, pipe.user_prompt_begin_id = "", 0
    return silent(pipe)


@family("BriaFibo2Pipeline", lambda: SQUARE)
def bria_fibo2() -> Any:
    torch.manual_seed(0)
    network = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
    )
    drawn(network)
    pipe = diffusers.BriaFibo2Pipeline(
        **flow(),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=qwen(version="Qwen3VL"),
        processor=Processor(),
        transformer=network,
    )
    pipe.text_encoder_out_layers = ((0, 1, 2), (0, 1, 2))
    return untemplated(silent(pipe))


@family("JoyImageEditPipeline", lambda: {**LARGER, **SHORT, "image": picture(32)})
def joy_edit() -> Any:
    torch.manual_seed(0)
    network = diffusers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=16,
        hidden_size=WIDTH,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
    )
    drawn(network)
    pipe = diffusers.JoyImageEditPipeline(
        **flow(),
        vae=wan_vae(),
        text_encoder=qwen(version="Qwen3VL"),
        tokenizer=reader(),
        processor=Processor(),
        transformer=network,
    )
    pipe.prompt_template_encode = {"image": "{}", "multiple_images": "{}"}
    pipe.prompt_template_encode_start_idx = {"image": 0, "multiple_images": 0}
    images = pipe.vae_image_processor
    sys.modules[type(images).__module__].BUCKETS[32] = [(32, 32)]
    images.register_to_config(basesize=32)
    return silent(pipe)


@family("Kandinsky6TI2VAPipeline", lambda: {**VIDEO, **SHORT, "sample_audio": False})
def kandinsky6() -> Any:
    torch.manual_seed(0)
    network = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=WIDTH,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    drawn(network)
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        **flow(shift=7.0),
        **clip("_2"),
        text_encoder=qwen(),
        tokenizer=Processor(),
        vae=hunyuan_vae(),
        transformer=network,
    )
    module: Any = sys.modules[type(pipe).__module__]
    module._PROMPT_TEMPLATE, module._QWEN_CROP_START = "{}", 0
    return silent(pipe)


# ---------------------------------------------------------------------- Flux 2


def _klein(name: str) -> Any:
    torch.manual_seed(0)
    tokenizer = reader()
    text_encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=0,
        )
    )
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    drawn(transformer)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    return silent(getattr(diffusers, name)(**flow(), **parts, transformer=transformer))


def klein_call(**more: Any) -> dict[str, Any]:
    """Arguments with the negative prompt as embeddings, because the class takes no text."""
    layers = (1, 2, 3)
    with torch.no_grad():
        unwanted = _klein("Flux2KleinPipeline").encode_prompt(
            NEGATIVE, max_sequence_length=32, text_encoder_out_layers=layers
        )[0]
    return {
        **LARGER,
        **SHORT,
        "text_encoder_out_layers": layers,
        "prompt": PROMPT,
        "negative_prompt_embeds": unwanted,
        **more,
    }


@family("Flux2KleinPipeline", klein_call, prompted=False)
def flux2_klein() -> Any:
    return _klein("Flux2KleinPipeline")


@family(
    "Flux2KleinInpaintPipeline",
    lambda: klein_call(height=64, width=64, image=picture(64), mask_image=mask(64)),
    prompted=False,
)
def flux2_klein_inpaint() -> Any:
    return _klein("Flux2KleinInpaintPipeline")
