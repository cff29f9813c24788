"""A block for modular pipelines that shows latents and scheduler to a guider."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines import (
    BlockState,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
)
from torch import Tensor

from dng_models.pipelines.guider import NO_NEGATIVE, DynamicNegativeGuider

# Inputs of a pipeline that hold its negative prompt.
NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


def _check_negative_prompt(components: Any, block_state: BlockState) -> None:
    """Refuse a missing negative prompt, because pipelines would encode the empty one instead."""
    if getattr(block_state, "prompt", None) is None:
        return  # no prompt is encoded here: the pipeline is given embeddings
    read = {name for block in _leaves(components.blocks) for name in block.input_names}
    given = [getattr(block_state, name, None) for name in NEGATIVE_PROMPTS if name in read]
    if not given:
        raise ValueError(
            "negative_prompt is unknown to this pipeline: call guider.encode_negative(pipe, "
            "prompt) with what is unwanted"
        )
    texts = [text for each in given for text in (each if isinstance(each, list) else [each])]
    if not any(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(NO_NEGATIVE)


def _eta(scheduler: Any, block_state: BlockState) -> float | None:
    """The eta that the loop gives its scheduler's step; None if the step takes none."""
    if "eta" not in inspect.signature(scheduler.step).parameters:
        return None
    eta = getattr(block_state, "eta", None)
    return 0.0 if eta is None else float(eta)


def _mask(components: Any, block_state: BlockState, latents: Tensor) -> Tensor | None:
    """Mask that is 1 where the scheduler decides the latents; None: everywhere."""
    mask = getattr(block_state, "mask", None)
    if isinstance(mask, Tensor):
        # Networks made for inpainting read the mask, and repaint everything.
        reads_mask = getattr(block_state, "masked_image_latents", None) is not None
        if reads_mask and getattr(components, "num_channels_unet", None) == 9:
            return None
        return mask
    kept = getattr(block_state, "conditioning_mask", None)
    if isinstance(kept, Tensor):
        kept = kept.reshape(*kept.shape, *[1] * (latents.ndim - kept.ndim))
        return 1 - kept
    return None


BLOCK_NAME = "show_latents"


class ShowLatents(ModularPipelineBlocks):  # type: ignore[misc]
    """Loop block that shows latents and scheduler to a :class:`DynamicNegativeGuider`.

    Insert it before the block that predicts.  It changes no data, and does nothing with other
    guiders.
    """

    @property
    def description(self) -> str:
        """The description that diffusers prints."""
        return "Loop step that shows latents and scheduler to dynamic negative guidance."

    @property
    def inputs(self) -> list[InputParam]:
        """The inputs that it reads, to check that there is a negative prompt."""
        return [InputParam(name) for name in ("prompt", *NEGATIVE_PROMPTS)]

    def __call__(
        self, components: Any, block_state: BlockState, i: int, t: Tensor
    ) -> tuple[Any, BlockState]:
        """Show step i to the guider.

        Parameters
        ----------
        components : ModularPipeline
            The pipeline, with a ``scheduler`` and any number of guiders.
        block_state : BlockState
            The loop's state, with ``latents``.
        i : int
            Index of the loop's step.
        t : Tensor
            The step's timestep.

        Returns
        -------
        tuple of ModularPipeline and BlockState
            Both unchanged.

        Raises
        ------
        ValueError
            If the loop has no latents or no scheduler, if its pipeline has two different guiders
            of this class, or if a negative prompt is needed and not given.
        """
        guiders = {
            name: part
            for name, part in components.components.items()
            if isinstance(part, DynamicNegativeGuider)
        }
        if not guiders:
            return components, block_state
        if len({id(guider) for guider in guiders.values()}) > 1:
            raise ValueError(
                f"{' and '.join(guiders)} must be the same object, for the posterior of an image "
                "is one: pipe.update_components("
                + ", ".join(f"{name}=guider" for name in guiders)
                + ")"
            )
        scheduler = getattr(components, "scheduler", None)
        latents = getattr(block_state, "latents", None)
        if scheduler is None or not isinstance(latents, Tensor):
            raise ValueError(
                "the denoising loop must have a scheduler and a tensor latents, got a "
                f"{type(scheduler).__name__} and a {type(latents).__name__}"
            )
        guider = next(iter(guiders.values()))
        if i > 0:
            guider.show_latents(scheduler, latents, t)
            return components, block_state
        if guider.needs_negative_prompt:
            _check_negative_prompt(components, block_state)
        mask = _mask(components, block_state, latents)
        guider.show_latents(scheduler, latents, t, mask=mask, eta=_eta(scheduler, block_state))
        return components, block_state


def add_latents_block(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """Copy a pipeline's blocks, with a block that shows the latents to the guider in each loop.

    Parameters
    ----------
    blocks : ModularPipelineBlocks
        Blocks of a modular pipeline (``StableDiffusionXLAutoBlocks()``, ``pipe.blocks``), or a
        denoising loop.

    Returns
    -------
    ModularPipelineBlocks
        A copy with a :class:`ShowLatents` in every denoising loop that has a guider.

    Raises
    ------
    ValueError
        If there is no such loop, if its guider cannot be exchanged (LTX-2), or if one block takes
        many steps (Helios).
    TypeError
        If ``blocks`` are not ModularPipelineBlocks.
    """
    if not isinstance(blocks, ModularPipelineBlocks):
        raise TypeError(
            "blocks must be ModularPipelineBlocks, such as StableDiffusionXLAutoBlocks() or "
            f"pipe.blocks, got a {type(blocks).__name__}"
        )
    blocks = copy.deepcopy(blocks)
    found = False
    for loop in _loops(blocks):
        place = _place(loop)
        if place is None:
            continue
        found = True
        if not any(isinstance(block, ShowLatents) for block in loop.sub_blocks.values()):
            loop.sub_blocks.insert(BLOCK_NAME, ShowLatents(), place)
    if not found:
        raise ValueError(
            f"blocks must have a denoising loop with a guider, {type(blocks).__name__} has none"
        )
    return blocks


def _place(loop: LoopSequentialPipelineBlocks) -> int | None:
    """Index of the loop's first block with a guider; None if there is none."""
    first = None
    for index, block in enumerate(loop.sub_blocks.values()):
        for spec in block.expected_components:
            kind = spec.type_hint
            if not (isinstance(kind, type) and issubclass(kind, BaseGuidance)):
                continue
            if not issubclass(kind, ClassifierFreeGuidance):
                raise ValueError(
                    f"blocks must have a guider that can be exchanged: {type(loop).__name__} is "
                    f"made for its {kind.__name__}"
                )
            if not {"i", "t"} <= set(inspect.signature(block.__call__).parameters):
                raise ValueError(
                    "blocks must take one step in a turn of their loop, where the latents can be "
                    f"shown: {type(block).__name__} of {type(loop).__name__} takes many"
                )
            first = index if first is None else first
    return first


def _loops(blocks: Any) -> Iterator[LoopSequentialPipelineBlocks]:
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        yield blocks
        return
    for block in blocks.sub_blocks.values():
        yield from _loops(block)


def _leaves(blocks: Any) -> Iterator[ModularPipelineBlocks]:
    """The blocks without sub-blocks, except ShowLatents."""
    if not blocks.sub_blocks and not isinstance(blocks, ShowLatents):
        yield blocks
    for block in blocks.sub_blocks.values():
        yield from _leaves(block)
