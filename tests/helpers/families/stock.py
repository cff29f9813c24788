"""Arguments with which a family's own call can be compared with guidance.

Pipelines that combine their two predictions as n + w (p - n) are called with w = 3.  Some use
another formula.  Some process the combination further, which has no effect under guidance, because
guidance replaces both predictions by one.  Some give their network other conditions with the
negative prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from dng_models.pipelines.layouts import LAYOUTS, Layout
from tests.helpers.families.base import PROMPT, Family

# Classes whose scale w stands for w + 1 in the formula above.
SCALE_PLUS_ONE = (
    "Cosmos2_5_PredictBasePipeline",
    "Cosmos2_5_TransferPipeline",
    "Kandinsky3",
    "Krea2Pipeline",
    "ZImage",
)
# Further arguments for a plain combination at that scale.
PLAIN: dict[str, dict[str, Any]] = {
    "Lumina2Pipeline": {"cfg_normalization": False},
    "LongCatImagePipeline": {"enable_cfg_renorm": False},
    "WanPipeline (two networks)": {"guidance_scale_2": 3.0},
    "WanImageToVideoPipeline (two networks)": {"guidance_scale_2": 3.0},
}
# Classes that rescale the combination, token by token, to the norm of the positive prediction.
RESCALED = ("QwenImage", "NucleusMoE", "JoyImage")
# Classes that do not evaluate an empty negative prompt unless it is given.
UNPROMPTED_IS_EMPTY = (
    "EasyAnimate",
    "Flux",
    "HunyuanSkyreels",
    "HunyuanVideoFramepack",
    "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideo",
    "QwenImage",
)
# Why the same text as positive and negative prompt gives the network different inputs.
NOT_ALIKE = {
    "StableDiffusion3ControlNet": "each half of the control image's latents is drawn anew",
    "HunyuanDiTControlNet": "each half of the control image's latents is drawn anew",
    "KandinskyPipeline": "the negative half has an image embedding of its own",
    "KandinskyImg2Img": "the negative half has an image embedding of its own",
    "StableUnCLIP": "the negative half has no image embedding",
    "KandinskyInpaint": "the negative half has an image embedding of its own",
}
# Classes that the loop by hand does not cover: the scheduler's input is not the network's output
# element by element, or a call has several runs.
REARRANGED = (
    *(n for n, row in LAYOUTS.items() if row.arranged or row.kept or row.guided),
    "Cosmos2_5_PredictBasePipeline",
    "HeliosPipeline",
    "HunyuanVideoFramepackPipeline",
    "WanAnimatePipeline",
    "WanImageToVideoPipeline (a time per token)",
)
# Classes whose network takes no adapters (it has no add_adapter).
NO_LORA = (
    "AllegroPipeline",
    "AudioLDM2Pipeline",
    "CogView3PlusPipeline",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "EasyAnimate",
    "HunyuanDiT",
    "JoyImageEdit",
    "Kandinsky3",
    "LattePipeline",
    "LuminaPipeline",
    "PRXPipeline",
    "PixArt",
    "StableAudio3Pipeline",
)
# Classes tested with an IP-Adapter (tests/models/pipelines/test_calls.py).
IP_ADAPTER = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# Classes that take the negative prompt as embeddings only.
EMBEDDINGS = ("Flux2Klein", "KandinskyV22")
# Negative prompts that the class encodes as it encodes the positive prompt.
AS_POSITIVE = {"Lumina2Pipeline": f" <Prompt Start> {PROMPT}"}


def layout(name: str) -> Layout:
    """Layout of a family; its name may say in brackets which of the class's networks it has."""
    return LAYOUTS[name.split(" (")[0]]


def only_embeddings(name: str) -> bool:
    """Whether a family takes the negative prompt as embeddings only."""
    return name.startswith(EMBEDDINGS)


def first_frame(frames: int) -> Tensor:
    """A mask for videos whose first frame is given."""
    mask = torch.ones(1, 1, frames, 1, 1)
    mask[:, :, 0] = 0.0
    return mask


def mask(name: str) -> dict[str, Any]:
    """Arguments of apply_guidance for latents that the pipeline overwrites."""
    if name == "Cosmos2_5_PredictBasePipeline" or name.endswith("(a time per token)"):
        if "WanPipeline" not in name:
            return {"mask": first_frame(2)}
    # A mask of ones, which counts everything: without a mask, overwritten latents are refused.
    return {"mask": torch.ones(())} if layout(name).overwrites else {}


def scale(name: str, wanted: float) -> dict[str, Any]:
    """Arguments of the call for the combination n + wanted (p - n)."""
    argument = layout(name).guidance_scale
    given = wanted - 1.0 if name.startswith(SCALE_PLUS_ONE) else wanted
    return {**({} if argument is None else {argument: given}), **PLAIN.get(name, {})}


def unprompted(name: str, pipe: Any, family: Family) -> dict[str, Any]:
    """Arguments of a call without a negative prompt."""
    if not family.prompted:
        return {}
    if name.startswith(UNPROMPTED_IS_EMPTY):
        return {"negative_prompt": ""}
    default = inspect.signature(type(pipe).__call__).parameters["negative_prompt"].default
    return {"negative_prompt": default}


@contextmanager
def plainly(name: str, pipe: Any, *, keeps_face: bool = False) -> Iterator[None]:
    """Make the pipeline's own call do nothing but its combination, at scale 3.

    WanAnimate blanks the face in the call with its own negative prompt, but not for an unwanted
    one; ``keeps_face`` keeps the face in both.
    """
    undo: list[Callable[[], Any]] = []
    if name.startswith(RESCALED):
        norm = torch.norm

        def ones(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or not kwargs.get("keepdim"):
                return norm(x, *args, **kwargs)
            return torch.ones_like(x.select(kwargs["dim"], 0).unsqueeze(kwargs["dim"]))

        torch.norm = ones
        undo.append(lambda: setattr(torch, "norm", norm))
    for part in ("guider", "ocr_guider"):
        if hasattr(pipe, part):
            undo.append(partial(setattr, pipe, part, getattr(pipe, part)))
            setattr(pipe, part, diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    if keeps_face and name.startswith("WanAnimate"):
        faces: list[Tensor] = []

        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if len(faces) % 2:
                kwargs["face_pixel_values"] = faces[-1]
            faces.append(kwargs["face_pixel_values"])
            return args, kwargs

        undo.append(pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True).remove)
    try:
        yield
    finally:
        for each in undo:
            each()
