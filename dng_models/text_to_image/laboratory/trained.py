"""Loading pipelines that were trained on the laboratory's world."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

# Diffusers loads classes only of modules that were imported.
import dng_models.text_to_image.laboratory.cells_vae  # noqa: F401
from dng_models.support import foreign

INDEX = "model_index.json"


SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "trained"


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
    pipe.set_progress_bar_config(disable=True)
    return pipe
