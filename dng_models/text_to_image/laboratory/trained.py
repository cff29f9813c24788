"""Saving and loading pipelines that were trained on the laboratory's world."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

# Diffusers loads classes only of modules that were imported.
import dng_models.text_to_image.laboratory.cells_vae  # noqa: F401
from dng_models.support import files, foreign
from dng_models.text_to_image.laboratory.reader import write_vocabulary
from dng_models.text_to_image.laboratory.worlds import World

INDEX = "model_index.json"
TEXT_WEIGHTS = Path("text_encoder", "model.safetensors")
# Before the name of each weight in transformers 4, which version 5 reads too.
TEXT_PREFIX = "text_model."

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "trained"


def save_trained(pipe: StableDiffusionPipeline, world: World, folder: Path) -> None:
    """Save a pipeline in diffusers' layout, as transformers 4 and 5 read it.

    Version 5 leaves the tokenizer's vocabulary and merges out, without which version 4 loads none,
    and gives the text encoder's weights other names, in place of which version 4 takes random ones
    and warns.

    Parameters
    ----------
    pipe : StableDiffusionPipeline
        Of :func:`.networks.trained_pipeline`.
    world : World
        Of its captions.
    folder : Path

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    pipe.save_pretrained(folder, safe_serialization=True)
    write_vocabulary(world, folder / "tokenizer")
    weights, metadata = files.load_tensors(folder / TEXT_WEIGHTS)
    files.save_tensors(
        folder / TEXT_WEIGHTS,
        {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): each for name, each in weights.items()},
        metadata,
    )


def load_trained(
    folder: Path | str = SHIPPED, *, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Load a pipeline that ``train-laboratory`` left, by diffusers' ``from_pretrained``.

    Parameters
    ----------
    folder : Path or str
        Of a finished training.  Its weights are safetensors.  Default: the one that ships with the
        package.
    dtype : torch.dtype
        Of the networks and latents.

    Returns
    -------
    StableDiffusionPipeline
        On the CPU, with a DDPM scheduler.

    Raises
    ------
    FileNotFoundError
        If there is no finished pipeline.
    ValueError
        If the installed transformers does not read all weights of the text encoder.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} must hold a finished pipeline, with {INDEX}: train-laboratory makes one"
        )
    foreign.check_pipeline(folder)
    with warnings.catch_warnings():
        # The oldest supported diffusers does not know the newer name, dtype.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    _check_text_encoder(pipe.text_encoder, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_text_encoder(encoder: Any, folder: Path) -> None:
    """Refuse random weights, in place of those that transformers does not find by its names."""
    saved, _ = files.load_tensors(folder / TEXT_WEIGHTS)
    saved = {name.removeprefix(TEXT_PREFIX): each for name, each in saved.items()}
    for name, value in encoder.state_dict().items():
        weight = saved.get(name.removeprefix(TEXT_PREFIX))
        if weight is None or not torch.equal(weight.to(value), value):
            raise ValueError(
                f"{folder / TEXT_WEIGHTS} must hold {name} as the installed transformers reads it, "
                "and what was loaded is another one: save the pipeline anew with train-laboratory, "
                "or install the transformers that it was saved with"
            )
