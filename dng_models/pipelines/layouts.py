"""A table of how each diffusers pipeline shows its network the prompts of a call.

Guidance stands between a pipeline and its network (:mod:`.hook`), where names, order and units of
prompts, latents and times differ from class to class.  They are not guessed: a class in
:data:`LAYOUTS` (or a subclass of one) is read as its row says, and the first call checks the row
against the network's arguments.  A class in :data:`REFUSED` is refused with the reason given there.
For any other class the error says how to declare a layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dng_math import checks

Calls = Literal["batch", "separate", "alone"]
Half = Literal["negative", "positive"]
Place = Literal["first", "last"]
TimeUnit = Literal["timestep", "fraction", "reversed", "reversed fraction", "other"]


@dataclass(frozen=True)
class Control:
    """A control network: called before the pipeline's main network, with the same prompts.

    Attributes
    ----------
    name : str
        Name of the pipeline's attribute that holds it.
    text, batched, shared : tuple of str
        As for :class:`Layout`.
    latents : str
        Name of its argument with the latents.
    gives : tuple of str
        Names of the main network's arguments that its outputs become.
    """

    name: str
    text: tuple[str, ...]
    batched: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    latents: str = "sample"
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How the pipelines of a class show prompts, latents and times to their network.

    Names of arguments are those of the network's ``forward``; entries of dictionaries and lists
    follow after a dot (``added_cond_kwargs.text_embeds``), and ``*`` stands for any.

    Attributes
    ----------
    network : tuple of str
        The pipeline's attributes that hold its networks; one of them is called at every step.
    calls : {"batch", "separate", "alone"}
        Whether the network sees negative and positive prompt in one doubled batch, is called once
        for each of them, or takes no prompt.
    first : {"negative", "positive"}
        Which of the two comes first, in the batch or in the order of the calls.
    text : tuple of str
        Arguments that depend on the prompt: embeddings, masks, pooled embeddings, lengths.
    whole : bool
        Whether an added prompt replaces all of these arguments, the positive prompt's rows too.
        This is needed where the rows are lists, are not on the first axis, or are padded to the
        longest prompt.
    batched : tuple of str, optional
        Other arguments with rows for both prompts of a doubled batch.  If given, added prompts
        become further rows of the batch; None: they are evaluated in calls of their own, of the
        same size.
    shared : tuple of str
        Tensor arguments without such rows.
    blanks : tuple of str
        For separate calls: text arguments that the pipeline always leaves empty in the negative
        prompt's call.  Unwanted concepts get the positive prompt's values instead, because the
        difference would otherwise decide the posterior.
    latents : str
        Argument with the latents; conditions may follow them in further channels.
    time, time_unit : str
        Argument with the time, and its unit in terms of the scheduler's timestep t in [0, T]: t,
        t/T, T - t or 1 - t/T; a time in the unit "other" is not checked.
    times : bool
        Whether tokens or frames may have times of their own; the noisiest is then the step's.
    sign : {1, -1}
        Factor from the network's output to what the scheduler is given.
    arranged : callable, optional
        How the pipeline rearranges the network's output and latents for its scheduler: maps the
        pipeline, a tensor and the network's arguments to the same elements, or some of them, in
        another shape (packed tokens to frames).
    kept : (int, {"first", "last"}), optional
        Axis along which the scheduler is given only the first or last entries of the output, as
        many as the latents have.  The others belong to pictures that the network also sees.
    guided : int, optional
        Number of channels that are guided, from the first; the others keep the positive prediction.
    variance : bool or "always"
        Whether half of the output's channels are a variance, which the scheduler is not given.
        True: only if the network is configured with twice as many output as input channels.
    doubled_step : bool
        Whether the scheduler steps the doubled batch itself.
    control : tuple of Control
        Control networks, which are called before the main network.
    guidance_scale, above : str and float
        The pipeline evaluates the negative prompt if this argument of its call is larger than
        ``above``; None: it always does.
    fixed : mapping of str to tuple
        Arguments of the call with their allowed values; with others the pipeline changes the
        prediction in a way that guidance does not know.
    labels : str, optional
        Argument with class labels, for pipelines that have classes in place of prompts.
    negatives : tuple of str, optional
        Arguments of the call with the negative embeddings, if their names are not
        ``negative_prompt...``.
    perturbs : bool
        Whether a third part of the batch may hold perturbed attention (PAG).
    overwrites : bool or "always"
        Whether the pipeline overwrites a part of the latents after every step.  True: only if the
        network was not made for inpainting, which takes further input channels.
    overwrites_with : tuple of str
        Arguments of the call that make the pipeline overwrite latents.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    network: tuple[str, ...] = ("unet",)
    calls: Calls = "batch"
    first: Half = "negative"
    text: tuple[str, ...] = ("encoder_hidden_states",)
    whole: bool = False
    batched: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    blanks: tuple[str, ...] = ()
    latents: str = "sample"
    time: str = "timestep"
    time_unit: TimeUnit = "timestep"
    times: bool = False
    sign: int = 1
    arranged: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None
    kept: tuple[int, Place] | None = None
    guided: int | None = None
    variance: bool | Literal["always"] = False
    doubled_step: bool = False
    control: tuple[Control, ...] = ()
    guidance_scale: str | None = "guidance_scale"
    above: float = 1.0
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    labels: str | None = None
    negatives: tuple[str, ...] | None = None
    perturbs: bool = False
    overwrites: bool | Literal["always"] = False
    overwrites_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.choice("calls", self.calls, ("batch", "separate", "alone"))
        checks.choice("first", self.first, ("negative", "positive"))
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {self.sign!r}")
        for name in ("network", "text", "shared"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                raise TypeError(f"{name} must be a tuple of str, got {value!r}")
        if not self.network:
            raise ValueError("network must name an attribute of the pipeline, got ()")
        if self.calls != "alone" and not self.text:
            raise ValueError("text must name the arguments that depend on the prompt, got ()")


# ---------------------------------------------------------------------- the table

_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_SIZES = "added_cond_kwargs.time_ids"
_PICTURES = "added_cond_kwargs.image_embeds"

# Guidance that is rescaled is another prediction than the one that the chain knows.
_UNSCALED = {"guidance_rescale": (0.0,)}

_SD = Layout(
    batched=("sample", _PICTURES, *_RESIDUALS, "down_intrablock_additional_residuals"),
    shared=("timestep", "cross_attention_kwargs"),
    fixed=_UNSCALED,
)
_SD_INPAINT = replace(_SD, overwrites=True)
_XL_TEXT = ("encoder_hidden_states", "added_cond_kwargs.text_embeds")
_XL = replace(
    _SD,
    text=_XL_TEXT,
    batched=(*(_SD.batched or ()), _SIZES),
    shared=(*_SD.shared, "added_cond_kwargs.control_type"),
)
_XL_INPAINT = replace(_XL, overwrites=True)
_SD3_TEXT = ("encoder_hidden_states", "pooled_projections")
_SD3 = Layout(
    network=("transformer",),
    text=_SD3_TEXT,
    batched=(
        "hidden_states",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs.ip_adapter_image_embeds",
    ),
    latents="hidden_states",
    fixed={"skip_guidance_layers": (None,)},
)
_SD_CONTROL = Control(
    "controlnet",
    text=("encoder_hidden_states",),
    batched=("sample", "controlnet_cond"),
    shared=("timestep",),
    gives=_RESIDUALS,
)
_XL_CONTROL = replace(
    _SD_CONTROL,
    text=_XL_TEXT,
    batched=("sample", "controlnet_cond", _SIZES, "control_type"),
    shared=("timestep", "control_type_idx"),
)
_SD3_CONTROL = Control(
    "controlnet",
    text=_SD3_TEXT,
    batched=("hidden_states", "timestep", "controlnet_cond"),
    latents="hidden_states",
    gives=("block_controlnet_hidden_states",),
)


_DIT = Layout(
    network=("transformer",), batched=("hidden_states", "timestep"), latents="hidden_states"
)
_MASKED_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_MASKED_DIT = replace(_DIT, text=_MASKED_TEXT)
# Some networks are given t * transformer.config.timestep_scale as the time.
_SANA = replace(_MASKED_DIT, time_unit="other", variance=True)
_SANA_CONTROL = Control(
    "controlnet",
    text=_MASKED_TEXT,
    batched=("hidden_states", "timestep", "controlnet_cond"),
    latents="hidden_states",
    gives=("controlnet_block_samples",),
)
_LTX = replace(_MASKED_DIT, fixed=_UNSCALED)
_COGVIDEOX = replace(_DIT, shared=("image_rotary_emb",), fixed={"use_dynamic_cfg": (False,)})
_EASYANIMATE = replace(
    _DIT,
    batched=("hidden_states", "timestep", "inpaint_latents"),
    variance=True,
    fixed=_UNSCALED,
)


def _one_frame(pipe: Any, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Drop the frame axis of Z-Image's tensors, which are videos of one frame."""
    return value.squeeze(2)


_ZIMAGE = replace(
    _DIT,
    text=("cap_feats",),
    whole=True,
    batched=None,
    first="positive",
    latents="x",
    time="t",
    time_unit="reversed fraction",
    sign=-1,
    arranged=_one_frame,
    above=0.0,
    fixed={"cfg_normalization": (False, None), "cfg_truncation": (1.0,)},
)
_ZIMAGE_CONTROL = Control(
    "controlnet", text=("cap_feats",), latents="x", gives=("controlnet_block_samples",)
)
_FIBO = replace(
    _DIT,
    text=(
        "encoder_hidden_states",
        "text_encoder_layers",
        "joint_attention_kwargs.attention_mask",
        "txt_ids",
    ),
    whole=True,
    batched=None,
)


def _ltx_frames(pipe: Any, tokens: Any, arguments: Mapping[str, Any]) -> Any:
    """Unpack LTX's tokens to frames."""
    return pipe._unpack_latents(
        tokens,
        arguments["num_frames"],
        arguments["height"],
        arguments["width"],
        pipe.transformer_spatial_patch_size,
        pipe.transformer_temporal_patch_size,
    )


# One call for each prompt
_IP_PICTURES = "joint_attention_kwargs.ip_adapter_image_embeds"
_TWO_CALLS = Layout(
    network=("transformer",), calls="separate", first="positive", latents="hidden_states"
)
_FLUX = replace(
    _TWO_CALLS,
    text=("encoder_hidden_states", "pooled_projections", "txt_ids", _IP_PICTURES),
    time_unit="fraction",
    guidance_scale="true_cfg_scale",
)
_CHROMA = replace(
    _FLUX,
    text=("encoder_hidden_states", "attention_mask", "txt_ids", _IP_PICTURES),
    guidance_scale="guidance_scale",
)
_QWEN = replace(
    _TWO_CALLS,
    text=("encoder_hidden_states", "encoder_hidden_states_mask"),
    time_unit="fraction",
    guidance_scale="true_cfg_scale",
)
_WAN = replace(_TWO_CALLS, network=("transformer", "transformer_2"))
_TWO_TEXTS = (*_MASKED_TEXT, "encoder_hidden_states_2", "encoder_attention_mask_2")
_HUNYUAN_VIDEO = replace(
    _TWO_CALLS, text=(*_MASKED_TEXT, "pooled_projections"), guidance_scale="true_cfg_scale"
)
# In these pipelines a guider switches the negative prompt on, not an argument.
_HUNYUAN_IMAGE = replace(_TWO_CALLS, text=_TWO_TEXTS, guidance_scale=None)
_KANDINSKY5 = replace(
    _TWO_CALLS, text=("encoder_hidden_states", "pooled_projections", "text_rope_pos")
)
_COSMOS_CONTROL = Control(
    "controlnet",
    text=("encoder_hidden_states",),
    latents="latents",
    gives=("block_controlnet_hidden_states",),
)
_PACKED_TEXT = (
    "input_ids",
    "text_indexes",
    "position_ids",
    "und_len",
    "sequence_length",
    "vision_sequence_indexes",
    "vision_mse_loss_indexes",
)
_LONGCAT = replace(_TWO_CALLS, text=("encoder_hidden_states", "txt_ids"), time_unit="fraction")
_FLUX2 = replace(_LONGCAT, kept=(1, "first"))


def _with(layout: Layout, **changes: Any) -> Layout:
    """A copy of a layout with some fields changed."""
    return replace(layout, **changes)


_SPARSE_CONTROL = replace(
    _SD_CONTROL,
    batched=("sample",),
    shared=("timestep", "controlnet_cond", "conditioning_mask"),
)
_ANIMATE = replace(_SD, fixed={})
_IF = Layout(batched=("sample", "class_labels"), shared=("timestep",), variance="always")
_KANDINSKY = Layout(
    text=(*_XL_TEXT,),
    batched=("sample", _PICTURES),
    shared=("timestep",),
    variance="always",
)
_KANDINSKY_22 = Layout(
    text=(_PICTURES,),
    negatives=("negative_image_embeds",),
    batched=("sample", "added_cond_kwargs.hint"),
    shared=("timestep",),
    variance="always",
)
_KANDINSKY_3 = Layout(
    text=("encoder_hidden_states", "encoder_attention_mask"),
    batched=("sample",),
    shared=("timestep",),
)
_PIXART = Layout(
    network=("transformer",),
    text=("encoder_hidden_states", "encoder_attention_mask"),
    batched=("hidden_states", "timestep", "added_cond_kwargs"),
    latents="hidden_states",
    variance=True,
)
_HUNYUAN_TEXT = (
    "encoder_hidden_states",
    "text_embedding_mask",
    "encoder_hidden_states_t5",
    "text_embedding_mask_t5",
)
_HUNYUAN_DIT = Layout(
    network=("transformer",),
    text=_HUNYUAN_TEXT,
    batched=("hidden_states", "timestep", "image_meta_size", "style", "controlnet_block_samples"),
    shared=("image_rotary_emb",),
    latents="hidden_states",
    variance="always",
    fixed=_UNSCALED,
)
_HUNYUAN_CONTROL = Control(
    "controlnet",
    text=_HUNYUAN_TEXT,
    batched=("hidden_states", "timestep", "image_meta_size", "style", "controlnet_cond"),
    shared=("image_rotary_emb",),
    latents="hidden_states",
    gives=("controlnet_block_samples",),
)


LAYOUTS: dict[str, Layout] = {
    # Stable Diffusion 1 and 2
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD_INPAINT,
    "StableDiffusionDepth2ImgPipeline": _SD,
    "StableDiffusionUpscalePipeline": _with(_SD, batched=("sample", "class_labels")),
    "StableDiffusionControlNetPipeline": _with(_SD, control=(_SD_CONTROL,)),
    "StableDiffusionControlNetImg2ImgPipeline": _with(_SD, control=(_SD_CONTROL,)),
    "StableDiffusionControlNetInpaintPipeline": _with(_SD_INPAINT, control=(_SD_CONTROL,)),
    "StableDiffusionAdapterPipeline": _SD,
    "StableDiffusionPAGPipeline": _with(_SD, perturbs=True),
    "StableDiffusionPAGImg2ImgPipeline": _with(_SD, perturbs=True),
    "StableDiffusionPAGInpaintPipeline": _with(_SD_INPAINT, perturbs=True),
    "StableDiffusionControlNetPAGPipeline": _with(_SD, control=(_SD_CONTROL,), perturbs=True),
    "StableDiffusionControlNetPAGInpaintPipeline": _with(
        _SD_INPAINT, control=(_SD_CONTROL,), perturbs=True
    ),
    # Stable Diffusion XL
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL_INPAINT,
    "StableDiffusionXLControlNetPipeline": _with(_XL, control=(_XL_CONTROL,)),
    "StableDiffusionXLControlNetImg2ImgPipeline": _with(_XL, control=(_XL_CONTROL,)),
    "StableDiffusionXLControlNetInpaintPipeline": _with(_XL_INPAINT, control=(_XL_CONTROL,)),
    "StableDiffusionXLControlNetUnionPipeline": _with(_XL, control=(_XL_CONTROL,)),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _with(_XL, control=(_XL_CONTROL,)),
    "StableDiffusionXLControlNetUnionInpaintPipeline": _with(_XL_INPAINT, control=(_XL_CONTROL,)),
    "StableDiffusionXLAdapterPipeline": _XL,
    "StableDiffusionXLPAGPipeline": _with(_XL, perturbs=True),
    "StableDiffusionXLPAGImg2ImgPipeline": _with(_XL, perturbs=True),
    "StableDiffusionXLPAGInpaintPipeline": _with(_XL_INPAINT, perturbs=True),
    "StableDiffusionXLControlNetPAGPipeline": _with(_XL, control=(_XL_CONTROL,), perturbs=True),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": _with(
        _XL, control=(_XL_CONTROL,), perturbs=True
    ),
    # Stable Diffusion 3
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _with(_SD3, overwrites=True),
    "StableDiffusion3ControlNetPipeline": _with(_SD3, control=(_SD3_CONTROL,)),
    "StableDiffusion3ControlNetInpaintingPipeline": _with(_SD3, control=(_SD3_CONTROL,)),
    "StableDiffusion3PAGPipeline": _with(_SD3, perturbs=True),
    "StableDiffusion3PAGImg2ImgPipeline": _with(_SD3, perturbs=True),
    # Video with Stable Diffusion's networks
    "AnimateDiffPipeline": _ANIMATE,
    "AnimateDiffVideoToVideoPipeline": _ANIMATE,
    "AnimateDiffPAGPipeline": _with(_ANIMATE, perturbs=True),
    "AnimateDiffControlNetPipeline": _with(_ANIMATE, control=(_SD_CONTROL,)),
    "AnimateDiffVideoToVideoControlNetPipeline": _with(_ANIMATE, control=(_SD_CONTROL,)),
    "AnimateDiffSparseControlNetPipeline": _with(_ANIMATE, control=(_SPARSE_CONTROL,)),
    "AnimateDiffSDXLPipeline": _XL,
    # Pixel-space pipelines, and pipelines that take embeddings made by others
    "IFPipeline": _IF,
    "IFImg2ImgPipeline": _IF,
    "IFInpaintingPipeline": _with(_IF, overwrites="always"),
    "IFSuperResolutionPipeline": _IF,
    "IFImg2ImgSuperResolutionPipeline": _IF,
    "IFInpaintingSuperResolutionPipeline": _with(_IF, overwrites="always"),
    "StableUnCLIPPipeline": _with(_SD, batched=("sample", "class_labels")),
    "StableUnCLIPImg2ImgPipeline": _with(_SD, batched=("sample", "class_labels")),
    "Kandinsky3Pipeline": _KANDINSKY_3,
    "Kandinsky3Img2ImgPipeline": _KANDINSKY_3,
    "KandinskyPipeline": _KANDINSKY,
    "KandinskyImg2ImgPipeline": _KANDINSKY,
    "KandinskyInpaintPipeline": _KANDINSKY,
    "KandinskyV22Pipeline": _KANDINSKY_22,
    "KandinskyV22Img2ImgPipeline": _KANDINSKY_22,
    "KandinskyV22ControlnetPipeline": _KANDINSKY_22,
    "KandinskyV22ControlnetImg2ImgPipeline": _KANDINSKY_22,
    "KandinskyV22InpaintPipeline": _with(_KANDINSKY_22, overwrites="always"),
    # Sound
    "AudioLDM2Pipeline": Layout(
        text=("encoder_hidden_states", "encoder_hidden_states_1", "encoder_attention_mask_1"),
        batched=("sample",),
        shared=("timestep",),
    ),
    "StableAudio3Pipeline": Layout(
        network=("transformer",),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        batched=("hidden_states", "timestep", "global_hidden_states"),
        latents="hidden_states",
    ),
    # The first transformers
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "PixArtSigmaPAGPipeline": _with(_PIXART, perturbs=True),
    "LattePipeline": _with(_PIXART, text=("encoder_hidden_states",)),
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
    "HunyuanDiTPAGPipeline": _with(_HUNYUAN_DIT, perturbs=True),
    "HunyuanDiTControlNetPipeline": _with(_HUNYUAN_DIT, control=(_HUNYUAN_CONTROL,)),
    "DiTPipeline": Layout(
        network=("transformer",),
        first="positive",
        text=("class_labels",),
        labels="class_labels",
        latents="hidden_states",
        variance=True,
        doubled_step=True,
    ),
    # Transformers that see both prompts in one batch
    "SanaPipeline": _SANA,
    "SanaPAGPipeline": _with(_SANA, perturbs=True),
    "SanaControlNetPipeline": _with(
        _SANA,
        batched=("hidden_states", "timestep", "controlnet_block_samples"),
        control=(_SANA_CONTROL,),
    ),
    "SanaVideoPipeline": _SANA,
    "SanaImageToVideoPipeline": _with(_SANA, times=True, kept=(2, "last")),
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _with(_LTX, arranged=_ltx_frames, kept=(2, "last"), times=True),
    "CogVideoXPipeline": _COGVIDEOX,
    "CogVideoXImageToVideoPipeline": _with(_COGVIDEOX, shared=("image_rotary_emb", "ofs")),
    "CogVideoXVideoToVideoPipeline": _COGVIDEOX,
    "CogVideoXFunControlPipeline": _COGVIDEOX,
    "ConsisIDPipeline": _with(_COGVIDEOX, shared=("image_rotary_emb", "id_cond", "id_vit_hidden")),
    "CogView3PlusPipeline": _with(
        _DIT,
        batched=("hidden_states", "timestep", "original_size", "target_size", "crop_coords"),
    ),
    "HiDreamImagePipeline": _with(
        _DIT,
        text=("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
        whole=True,
        batched=None,
        time="timesteps",
        sign=-1,
    ),
    "AuraFlowPipeline": _with(_DIT, time_unit="fraction"),
    "MochiPipeline": _MASKED_DIT,
    "AllegroPipeline": _with(_MASKED_DIT, shared=("image_rotary_emb",)),
    "EasyAnimatePipeline": _EASYANIMATE,
    "EasyAnimateInpaintPipeline": _with(_EASYANIMATE, overwrites=True),
    "BriaPipeline": _with(
        _DIT, shared=("txt_ids", "img_ids"), fixed={"normalize": (False,), "clip_value": (None,)}
    ),
    "BriaFiboPipeline": _FIBO,
    "BriaFiboEditPipeline": _with(_FIBO, kept=(1, "first")),
    "ErnieImagePipeline": _with(_DIT, text=("text_bth", "text_lens"), whole=True, batched=None),
    "LuminaPipeline": _with(
        _DIT,
        text=("encoder_hidden_states", "encoder_mask"),
        whole=True,
        batched=None,
        first="positive",
        time_unit="reversed fraction",
        sign=-1,
        guided=3,
        variance="always",
    ),
    "ZImagePipeline": _ZIMAGE,
    "ZImageImg2ImgPipeline": _ZIMAGE,
    "ZImageInpaintPipeline": _with(_ZIMAGE, overwrites="always"),
    "ZImageControlNetPipeline": _with(_ZIMAGE, control=(_ZIMAGE_CONTROL,)),
    "ZImageControlNetInpaintPipeline": _with(_ZIMAGE, control=(_ZIMAGE_CONTROL,)),
    "ZImageOmniPipeline": _ZIMAGE,
    "AnyFlowPipeline": _with(
        _DIT,
        batched=("hidden_states", "timestep", "r_timestep"),
        fixed={"use_mean_velocity": (False,), "video": (None,), "video_latents": (None,)},
    ),
    # The next two make a video in chunks, each a run of its own.
    "HeliosPipeline": _TWO_CALLS,
    "HunyuanVideoFramepackPipeline": _with(
        _TWO_CALLS, text=(*_MASKED_TEXT, "pooled_projections"), guidance_scale="true_cfg_scale"
    ),
    "JoyImageEditPlusPipeline": _with(
        _DIT,
        text=("encoder_hidden_states", "encoder_hidden_states_mask"),
        whole=True,
        batched=None,
        overwrites="always",
    ),
    "LucyEditPipeline": _with(_TWO_CALLS, network=("transformer", "transformer_2")),
    "MotifVideoPipeline": _with(_TWO_CALLS, text=_MASKED_TEXT, guidance_scale=None),
    "MotifVideoImage2VideoPipeline": _with(_TWO_CALLS, text=_MASKED_TEXT, guidance_scale=None),
    "HunyuanSkyreelsImageToVideoPipeline": _with(
        _TWO_CALLS, text=(*_MASKED_TEXT, "pooled_projections"), guidance_scale="true_cfg_scale"
    ),
    "PRXPipeline": _with(
        _DIT, text=("encoder_hidden_states", "attention_mask"), time_unit="fraction"
    ),
    # One call for each prompt.  Lumina 2 puts its system prompt before the positive prompt only:
    # write it before the negative prompt too, so that the two can be compared.
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _with(_FLUX, overwrites="always"),
    "FluxControlNetPipeline": _FLUX,
    "FluxKontextPipeline": _with(_FLUX, kept=(1, "first")),
    "FluxKontextInpaintPipeline": _with(_FLUX, kept=(1, "first"), overwrites="always"),
    "ChromaPipeline": _CHROMA,
    "ChromaImg2ImgPipeline": _CHROMA,
    "ChromaInpaintPipeline": _with(_CHROMA, overwrites="always"),
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _with(_QWEN, overwrites="always"),
    "QwenImageEditPipeline": _with(_QWEN, kept=(1, "first")),
    "QwenImageEditPlusPipeline": _with(_QWEN, kept=(1, "first")),
    "QwenImageEditInpaintPipeline": _with(_QWEN, kept=(1, "first"), overwrites="always"),
    "QwenImageControlNetPipeline": _QWEN,
    "QwenImageControlNetInpaintPipeline": _QWEN,
    "QwenImageLayeredPipeline": _with(_QWEN, kept=(1, "first")),
    "QwenImage21Pipeline": _with(
        _QWEN,
        # Added prompts fill their key-value caches anew at every step.
        text=(*_QWEN.text, "img_mask", "kv_cache", "kv_cache_mode"),
        kept=(1, "last"),
    ),
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _with(_WAN, times=True, overwrites=True),
    "WanVideoToVideoPipeline": _WAN,
    "WanVACEPipeline": _WAN,
    "WanAnimatePipeline": _with(
        _WAN,
        text=("encoder_hidden_states", "face_pixel_values"),
        blanks=("face_pixel_values",),
    ),
    "SkyReelsV2Pipeline": _TWO_CALLS,
    "SkyReelsV2ImageToVideoPipeline": _TWO_CALLS,
    "ChronoEditPipeline": _with(_TWO_CALLS, fixed={"enable_temporal_reasoning": (False,)}),
    "CogView4Pipeline": _TWO_CALLS,
    "CogView4ControlPipeline": _TWO_CALLS,
    "Cosmos2_5_PredictBasePipeline": _with(_TWO_CALLS, time_unit="fraction", times=True),
    "Cosmos2_5_TransferPipeline": _with(
        _TWO_CALLS, time_unit="fraction", times=True, control=(_COSMOS_CONTROL,)
    ),
    "Cosmos3OmniPipeline": _with(
        _TWO_CALLS,
        text=_PACKED_TEXT,
        latents="vision_tokens",
        time="vision_timesteps",
        fixed={"enable_sound": (False,), "action": (None,), "sound_latents": (None,)},
    ),
    "HunyuanVideoPipeline": _HUNYUAN_VIDEO,
    "HunyuanVideoImageToVideoPipeline": _with(_HUNYUAN_VIDEO, kept=(2, "last")),
    "HunyuanVideo15Pipeline": _HUNYUAN_IMAGE,
    "HunyuanVideo15ImageToVideoPipeline": _HUNYUAN_IMAGE,
    "HunyuanImagePipeline": _HUNYUAN_IMAGE,
    "HunyuanImageRefinerPipeline": _with(_HUNYUAN_IMAGE, text=_MASKED_TEXT),
    "Kandinsky5T2IPipeline": _KANDINSKY5,
    "Kandinsky5I2IPipeline": _KANDINSKY5,
    "Kandinsky5T2VPipeline": _KANDINSKY5,
    "Kandinsky5I2VPipeline": _with(_KANDINSKY5, kept=(1, "last")),
    "Kandinsky6TI2VAPipeline": _with(
        _TWO_CALLS,
        text=(*_MASKED_TEXT, "pooled_projections"),
        fixed={"sample_audio": (False,)},
        overwrites_with=("image",),
    ),
    "Krea2Pipeline": _with(_TWO_CALLS, text=_MASKED_TEXT, time_unit="fraction", above=0.0),
    "LongCatImagePipeline": _LONGCAT,
    "LongCatImageEditPipeline": _with(_LONGCAT, kept=(1, "first")),
    "Lumina2Pipeline": _with(_TWO_CALLS, text=_MASKED_TEXT, time_unit="reversed fraction", sign=-1),
    "NucleusMoEImagePipeline": _with(_QWEN, guidance_scale="guidance_scale", sign=-1),
    "OvisImagePipeline": _LONGCAT,
    "BriaFibo2Pipeline": _with(_TWO_CALLS, text=_MASKED_TEXT, time_unit="fraction"),
    "Flux2KleinPipeline": _FLUX2,
    "Flux2KleinInpaintPipeline": _with(_FLUX2, overwrites="always"),
    "JoyImageEditPipeline": _with(_TWO_CALLS, overwrites="always"),
    # No prompts
    "DDPMPipeline": Layout(calls="alone", text=(), guidance_scale=None),
    "DDIMPipeline": Layout(calls="alone", text=(), guidance_scale=None),
}

_FORCING = (
    "every frame has a time of its own, and is stepped by a scheduler of its own, a copy made "
    "within the call. The nearest that can be are SkyReelsV2Pipeline and its image-to-video version"
)
_TWICE = (
    "it combines predicted images, for which it lets its scheduler take every step twice, first "
    "with both prompts' predictions and then with their combination. The nearest that can be is "
    "Cosmos2_5_PredictBasePipeline"
)
_EXPLODING = (
    "its network's output is no prediction that its scheduler knows: of the noise levels up to 80 "
    "that it takes steps between, a flow-matching scheduler says something else. The nearest that "
    "can be is Cosmos2_5_PredictBasePipeline"
)

_OF_TOKENS = (
    "its scheduler steps every token from a time of its own, with the prediction's sign reversed, "
    "and no such step has the noise that a posterior is tracked with. The nearest that can be is "
)
_WITH_SOUND = (
    "its network predicts video and sound together, and each has a scheduler and a guidance of its "
    "own: the sound would be left unguided. The nearest that can be is "
)

_COMBINED = (
    "it runs two pipelines, each with a network and a scheduler of its own: guide its prior_pipe "
    "or its decoder_pipe"
)
_PRIOR = (
    "it makes two embeddings in one call, one for each prompt, with a scheduler (UnCLIPScheduler) "
    "that is told the next timestep by its pipeline. Guide the decoder that takes its embeddings"
)
_RATIOS = (
    "its network is told ratios in place of timesteps, of which its scheduler makes noise levels "
    "itself. The nearest that can be is StableDiffusionXLPipeline"
)
_PICTURE_TOO = (
    "it guides by a text and a picture at once, in three parts of its batch, two of which have the "
    "negative prompt. The nearest that can be is "
)

REFUSED: dict[str, str] = {
    # Several networks, or predictions other than noise, velocity or image
    **dict.fromkeys(
        (
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintCombinedPipeline",
        ),
        _COMBINED,
    ),
    "StableCascadeCombinedPipeline": _RATIOS,
    "StableCascadePriorPipeline": _RATIOS,
    "StableCascadeDecoderPipeline": _RATIOS,
    "KandinskyPriorPipeline": _PRIOR,
    "KandinskyV22PriorPipeline": _PRIOR,
    "KandinskyV22PriorEmb2EmbPipeline": _PRIOR,
    "StableDiffusionInstructPix2PixPipeline": _PICTURE_TOO + "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLInstructPix2PixPipeline": _PICTURE_TOO + "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionLatentUpscalePipeline": (
        "it mixes its network's output with the latents (EDM's preconditioning) before its "
        "scheduler is given it. The nearest that can be is StableDiffusionUpscalePipeline"
    ),
    "StableAudioPipeline": (
        "its network's output is mixed with its input by EDM's preconditioning, in a scheduler "
        "whose steps are not known. The nearest that can be is StableAudio3Pipeline"
    ),
    "DreamLitePipeline": (
        "its network is shown latents and a picture side by side, and with a picture a third part "
        "of the batch. The nearest that can be is SanaPipeline"
    ),
    "LEditsPPPipelineStableDiffusion": (
        "it takes no positive prompt, and steps the noise that it inverted a picture to. The "
        "nearest that can be is StableDiffusionImg2ImgPipeline"
    ),
    "LEditsPPPipelineStableDiffusionXL": (
        "it takes no positive prompt, and steps the noise that it inverted a picture to. The "
        "nearest that can be is StableDiffusionXLImg2ImgPipeline"
    ),
    "StableDiffusionPanoramaPipeline": (
        "its network sees overlapping windows, whose predictions it averages after the steps of "
        "several schedulers. The nearest that can be is StableDiffusionPipeline"
    ),
    "StableDiffusionPipelineSafe": (
        "it guides in a way of its own, in three parts of its batch. Guide a "
        "StableDiffusionPipeline with the rule dng_math.SafeLatentDiffusion"
    ),
    "StableDiffusionSAGPipeline": (
        "it calls its network once more in every step (self-attention guidance). The nearest that "
        "can be is StableDiffusionPAGPipeline"
    ),
    # Transformers that see both prompts in one batch
    "SanaWMPipeline": _OF_TOKENS + "SanaImageToVideoPipeline",
    "LTXConditionPipeline": _OF_TOKENS + "LTXImageToVideoPipeline",
    "LTXI2VLongMultiPromptPipeline": (
        "it makes a video in windows, each with prompts and timesteps of its own, the last of "
        "which it leaves out, and overwrites what a window shares with the one before at every "
        "step. The nearest that can be is LTXImageToVideoPipeline"
    ),
    "LTX2Pipeline": _WITH_SOUND + "LTXPipeline",
    "LTX2ImageToVideoPipeline": _WITH_SOUND + "LTXImageToVideoPipeline",
    "LTX2ConditionPipeline": _WITH_SOUND + "LTXImageToVideoPipeline",
    "LTX2InContextPipeline": _WITH_SOUND + "LTXPipeline",
    "LTX2HDRPipeline": (
        "it combines denoised latents, in which tokens of its reference video are then put back, "
        "and steps those with the rest. The nearest that can be is LTXPipeline"
    ),
    "LTX2DFRPipeline": "it takes no negative prompt. The nearest that can be is LTXPipeline",
    "EasyAnimateControlPipeline": (
        "its call fails in diffusers itself, which hands encode_prompt an argument that it does "
        "not take. The nearest that can be is EasyAnimatePipeline"
    ),
    "PRXPixelPipeline": (
        "it begins with noise of another standard deviation (noise_scale) than its scheduler knows "
        "of, so that evidence would be divided by a wrong variance. The nearest that can be is "
        "PRXPipeline"
    ),
    "AnyFlowFARPipeline": (
        "its network reads keys and values that it kept of both prompts from earlier frames, "
        "and has none of a prompt that is added. The nearest that can be is AnyFlowPipeline with "
        "use_mean_velocity=False"
    ),
    "HeliosPyramidPipeline": (
        "its network predicts the velocity between two noise levels of a stage, not from noise to "
        "video, and latents change their size between stages. The nearest that can be is "
        "HeliosPipeline"
    ),
    # One call for each prompt
    "SkyReelsV2DiffusionForcingPipeline": _FORCING,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _FORCING,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _FORCING,
    "CosmosTextToWorldPipeline": _TWICE,
    "CosmosVideoToWorldPipeline": _TWICE,
    "Cosmos2TextToImagePipeline": _EXPLODING,
    "Cosmos2VideoToWorldPipeline": _EXPLODING,
    "LongCatAudioDiTPipeline": (
        "its scheduler goes from sigma = 0 to 1 (invert_sigmas), with noise and data exchanged, "
        "and it works with no other. The nearest that can be is AudioLDM2Pipeline"
    ),
    "GlmImagePipeline": (
        "it takes no negative prompt as text, and where it is given one as embeddings it leaves "
        "out the image's tokens too, which would decide the posterior. The nearest that can be is "
        "CogView4Pipeline"
    ),
    "Flux2KleinKVPipeline": (
        "it evaluates its network for the prompt alone. The nearest that can be is "
        "Flux2KleinPipeline, with the network that is not distilled"
    ),
    "Flux2Pipeline": (
        "its network is distilled from guidance and evaluated for the prompt alone; guidance_scale "
        "is an input of it. The nearest that can be is Flux2KleinPipeline, with the network that "
        "is not distilled"
    ),
    "Ideogram4Pipeline": (
        "what it combines with the prompt's prediction comes from a second network without any "
        "text. The nearest that can be is QwenImagePipeline"
    ),
    "OmniGenPipeline": (
        "it takes no negative prompt: its processor writes the empty one itself. The nearest that "
        "can be is QwenImageEditPlusPipeline"
    ),
}


def layout_of(pipe: Any) -> Layout:
    """The layout of a pipeline's class, or of its nearest parent class that has one.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        If the class cannot be guided (the message says why), or its layout is unknown.
    """
    found = standing(type(pipe))
    if isinstance(found, Layout):
        return found
    name = type(pipe).__name__
    if found is not None:
        raise ValueError(
            f"pipe must be of a class that can be guided, and a {name} cannot: {found}"
        )
    raise ValueError(
        f"pipe must be of a class whose layout is known, and that of {name} is not "
        "(dng_models.pipelines.layouts.LAYOUTS lists them). If it evaluates its negative prompt "
        "beside the positive one, say how in a dng_models.Layout, and give that to apply_guidance "
        "as layout=; the first call checks it"
    )


def standing(kind: type) -> Layout | str | None:
    """The layout of a pipeline class, or the reason why it cannot be guided.

    Parameters
    ----------
    kind : type
        A pipeline class of diffusers, or a subclass of one.

    Returns
    -------
    Layout, str or None
        The layout, the reason, or None if the class is unknown.
    """
    bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "diffusers"]
    for base in bases:
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
        if base.__name__ in REFUSED:
            return REFUSED[base.__name__]
    call: Any = kind.__call__
    if not any(name.startswith("negative_") for name in inspect.signature(call).parameters):
        return (
            "its call takes no negative prompt. If its network knows of no prompts at all, give "
            "apply_guidance unwanted= and "
            'layout=dng_models.Layout(calls="alone", text=(), guidance_scale=None)'
        )
    if any(".deprecated." in base.__module__ for base in bases):
        return (
            "diffusers has deprecated it, and it was not tried here. If it evaluates its negative "
            "prompt beside the positive one, give apply_guidance a layout=, such as that of "
            "another class in dng_models.pipelines.layouts.LAYOUTS; the first call checks it"
        )
    return None
