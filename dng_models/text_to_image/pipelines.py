"""Images of a point, from any text-to-image pipeline of diffusers.

The noise of an image, its first latents and that of every step, comes from a generator of its own
on the CPU: whatever else is in the batch, and on whatever device, the seed decides the image, up to
the rounding of the networks.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from numpy.typing import NDArray
from torch import Tensor

import dng_math
from dng_models import foreign
from dng_models.hook import apply_guidance
from dng_models.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler
from dng_models.text_to_image.config import DEFAULT_CLIP, DEFAULT_MODEL, TINY, Config, Point
from dng_models.tiny import tiny_stable_diffusion
from dng_models.transition import scheduler_run

Pixels = NDArray[np.uint8]
SNAPSHOTS = 8  # on the way of an image through time
ATTENTIVE = 8.0


@dataclass(frozen=True, eq=False)
class Drawn:
    """An image, and what guidance did to it in S steps.

    Attributes
    ----------
    pixels : ndarray, shape (H, W, 3), uint8
    finite : bool
        Whether the pipeline gave numbers: what is none is drawn black.
    time : ndarray, shape (S,)
        Diffusion time at the start of each step; 1 is pure noise.
    scale : ndarray, shape (S,)
        Of the guidance.
    log_posterior : ndarray, shape (S,) or (M, S), or None
        That the step used, of each concept if they are split; None for rules that track nothing.
    evaluations, evaluations_saved : int
        Of the negative prompts, made and skipped, for this image.
    strip : ndarray, shape (H, n W, 3), uint8, or None
        The image on its way: its latents, decoded, at ``strip_time`` (n,).
    """

    pixels: Pixels
    finite: bool
    time: NDArray[np.float64]
    scale: NDArray[np.float64]
    log_posterior: NDArray[np.float64] | None
    evaluations: int
    evaluations_saved: int
    strip: Pixels | None = None
    strip_time: NDArray[np.float64] | None = None


# ---------------------------------------------------------------------- loading


def load_pipeline(config: Config, device: torch.device) -> Any:
    """The pipeline of a run, with its scheduler set.

    A safety checker is taken off: it would blacken images, guided and unguided ones differently.

    Raises
    ------
    FileNotFoundError
        If its weights are not on this machine and cannot be had, saying what to download.
    ValueError
        If it is no text-to-image pipeline, or there is no such scheduler for it; if its folder
        holds code or names some, or weights that are pickles, damaged, or not finite.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.model == TINY:
        pipe: Any = _attentive(tiny_stable_diffusion())
    else:
        pipe = _checked_pipeline(_pipeline_folder(config), dtype)
    if not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "vae"):
        raise ValueError(
            f"model must be a text-to-image pipeline with a VAE, such as {DEFAULT_MODEL}; "
            f"{config.model} is a {type(pipe).__name__}"
        )
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if config.model != TINY:
        _warn_of_cut_prompts(pipe, config)
    set_scheduler(pipe, config.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def _pipeline_folder(config: Config) -> Path:
    """The pipeline's folder, downloaded if it is a name; what it would run is looked at first."""
    folder = Path(config.model)
    try:
        if folder.is_dir():
            foreign.check_pipeline(folder)
            return folder
        told, revision = foreign.hub_folder(config.model)
        foreign.check_pipeline(told, weights=False)
        where = {} if revision is None else {"revision": revision}
        folder = Path(
            DiffusionPipeline.download(
                config.model, use_safetensors=True, trust_remote_code=False, **where
            )
        )
    except OSError as error:
        raise FileNotFoundError(_what_to_download(config.model, config.clip, error)) from error
    foreign.check_pipeline(folder)
    return folder


def _checked_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline in a folder that was looked through, its weights numbers."""
    for part, make in _networks(folder):
        foreign.check_size(make, folder / part)
    try:
        with warnings.catch_warnings():
            # The lowest diffusers that is supported knows its newer name, dtype, not yet.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise ValueError(
            f"the pipeline in {folder} cannot be loaded ({foreign.reason(error)}): a file in it "
            "was damaged, or is of another version of diffusers or transformers"
        ) from error
    for part, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            foreign.require_finite_network(folder / part, network)
    return pipe


def _networks(folder: Path) -> list[tuple[str, Callable[[dict[str, Any]], torch.nn.Module]]]:
    """Parts of a pipeline that are networks, and what makes them of their configurations."""
    found: list[tuple[str, Callable[[dict[str, Any]], torch.nn.Module]]] = []
    for part, kind in foreign.parts(folder).items():
        if not issubclass(kind, torch.nn.Module) or not (folder / part / "config.json").is_file():
            continue
        if hasattr(kind, "config_class"):
            found.append((part, partial(_transformer, kind)))
        elif hasattr(kind, "from_config"):
            found.append((part, kind.from_config))
    return found


def _transformer(kind: Any, told: dict[str, Any]) -> torch.nn.Module:
    """A network of transformers' from its configuration."""
    network: torch.nn.Module = kind(kind.config_class.from_dict(told))
    return network


def _warn_of_cut_prompts(pipe: Any, config: Config) -> None:
    """Say once what the pipeline would say at every batch."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return
    longest = tokenizer.model_max_length
    cut = [
        prompt.name
        for prompt in config.prompts
        if any(
            len(tokenizer(text).input_ids) > longest
            for text in (prompt.prompt, prompt.related, prompt.unrelated)
        )
    ]
    if cut:
        warnings.warn(
            f"texts of more than {longest} tokens are cut, of the prompts {', '.join(cut)}",
            stacklevel=3,
        )


def _attentive(pipe: Any) -> Any:
    """The tiny pipeline, made to hear its prompts: untrained attention averages them away."""
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".attn2.to_" in name and name.endswith("weight"):
                parameter.mul_(ATTENTIVE)
    return pipe


def _what_to_download(model: str, clip: str, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 120, placeholder=" ...")
    if Path(model).exists():
        return f"there is no diffusers pipeline in {model} ({reason})"
    return (
        f"the pipeline {model!r} is not on this machine and could not be downloaded ({reason}). "
        f"Where there is a network: 'hf download {model}' and 'hf download "
        f"{clip if clip != TINY else DEFAULT_CLIP}' (older: huggingface-cli download). Or give "
        "--model DIR, the folder of any text-to-image pipeline that save_pretrained wrote, and "
        "--clip DIR. To see the experiment run without any weights: --tiny"
    )


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline a scheduler by its name, made from the configuration of its own.

    "ddpm", "ddim" with eta = 1, "euler-ancestral" and "sde-dpm++" are for pipelines with a noise
    schedule, "flow" is the posterior step of flow matching; "auto" is "flow" for flow-matching
    pipelines and else "ddpm"; "own" leaves the scheduler.  Latents are not clipped.

    Raises
    ------
    ValueError
        If the scheduler is not of the pipeline's kind.
    """
    config = pipe.scheduler.config
    flow = "Flow" in type(pipe.scheduler).__name__
    if name == "auto":
        name = "flow" if flow else "ddpm"
    if name == "own":
        return
    if flow != (name == "flow"):
        kinds = "flow, auto or own" if flow else "ddpm, ddim, euler-ancestral, sde-dpm++ or auto"
        raise ValueError(
            f"scheduler must be {kinds} for this pipeline, whose own is a "
            f"{type(pipe.scheduler).__name__}; got {name!r}"
        )
    make: dict[str, Callable[[], Any]] = {
        "ddpm": lambda: DDPMScheduler.from_config(
            config, clip_sample=False, variance_type="fixed_small"
        ),
        "ddim": lambda: EtaDDIMScheduler.from_config(config, clip_sample=False, eta=1.0),
        "euler-ancestral": lambda: EulerAncestralDiscreteScheduler.from_config(config),
        "sde-dpm++": lambda: DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="sde-dpmsolver++"
        ),
        "flow": lambda: PosteriorFlowScheduler.from_config(config),
    }
    pipe.scheduler = make[name]()


def versions(device: torch.device) -> dict[str, str]:
    """Of what the images are made with, and on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": python_version(),
        "device": name,
        "dng": dng_math.__version__,
        **{each: version(each) for each in ("torch", "numpy", "diffusers", "transformers")},
    }


# ---------------------------------------------------------------------- drawing


def draw(
    pipe: Any,
    config: Config,
    point: Point,
    images: Sequence[int],
    *,
    followed: Collection[int] = (),
) -> list[Drawn]:
    """Draw some images of a point, as one batch.

    Parameters
    ----------
    pipe : DiffusionPipeline
        Of :func:`load_pipeline`.
    config : Config
    point : Point
    images : sequence of int
        Their numbers.
    followed : collection of int
        Those of them that are followed through time.

    Returns
    -------
    list of Drawn
    """
    generators = [torch.Generator("cpu").manual_seed(config.seed + image) for image in images]
    concepts = config.concepts(point)
    separate = config.split_negatives and len(concepts) > 0
    rows = [row for row, image in enumerate(images) if image in followed]
    snapshots = _Snapshots(pipe, config.steps, rows) if rows else None
    sizes = {
        name: value
        for name, value in (("height", config.height), ("width", config.width))
        if value is not None
    }
    guidance = apply_guidance(
        pipe,
        config.rule(point),
        negative_prompts=concepts if separate else None,
        cfg_scale=config.cfg_of(point),
    )
    with guidance as trace:
        found = pipe(
            [point.prompt.prompt] * len(images),
            negative_prompt=["" if separate else point.negative or ""] * len(images),
            num_inference_steps=config.steps,
            generator=generators,
            output_type="pt",
            callback_on_step_end=snapshots,
            **sizes,
        ).images
    time, scale = trace.time, trace.scale.double().numpy()
    log_posterior = trace.log_posterior
    finite = torch.isfinite(found).flatten(1).all(dim=1).tolist()
    pixels = _pixels(found)
    strips: dict[int, Pixels] = {}
    strip_time = None
    if snapshots is not None:
        strips = dict(zip(rows, snapshots.strips(), strict=True))
        strip_time = np.append(time, 0.0)[[step + 1 for step in snapshots.steps]]
    return [
        Drawn(
            pixels=pixels[row],
            finite=finite[row],
            time=time,
            scale=scale[:, row],
            log_posterior=None
            if log_posterior is None
            else log_posterior[..., row].double().numpy().T,
            evaluations=trace.evaluations // len(images),
            evaluations_saved=trace.evaluations_saved // len(images),
            strip=strips.get(row),
            strip_time=strip_time if row in strips else None,
        )
        for row in range(len(images))
    ]


def _pixels(images: Tensor) -> Pixels:
    """8-bit pixels, shape (N, H, W, 3), of images (N, 3, H, W) in [0, 1]."""
    clamped = images.float().nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
    eight_bit: Pixels = (clamped * 255.0).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return eight_bit


class _Snapshots:
    """Latents of some rows of a batch, kept along a run and decoded afterwards.

    They are what a step starts from, as the network sees it: of any scheduler on one scale.
    """

    def __init__(self, pipe: Any, steps: int, rows: Sequence[int]) -> None:
        self._pipe, self._rows = pipe, list(rows)
        # After the first step, and so on to the last one.
        self._after = sorted({round(s) for s in np.linspace(0, steps - 1, min(SNAPSHOTS, steps))})
        self._latents: list[Tensor] = []
        self.steps: list[int] = []

    def __call__(
        self, pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if step in self._after:
            scale = float(scheduler_run(pipe.scheduler).input_scale[step + 1])
            self._latents.append(given["latents"][self._rows].detach() * scale)
            self.steps.append(step)
        return given

    def strips(self) -> list[Pixels]:
        """For each row the decoded images side by side."""
        shown = [_pixels(_decoded(self._pipe, latents)) for latents in self._latents]
        return [
            np.concatenate([pixels[i] for pixels in shown], axis=1) for i in range(len(self._rows))
        ]


@torch.no_grad()
def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of latents."""
    vae = pipe.vae
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    latents = latents.to(vae.dtype)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        mean_, std_ = (torch.tensor(each).to(latents).view(shape) for each in (mean, std))
        latents = latents * std_ / vae.config.scaling_factor + mean_
    else:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = latents / vae.config.scaling_factor + shift
    # The VAE of XL overflows in float16.
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
        latents = latents.float()
    try:
        decoded = vae.decode(latents, return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    return 0.5 * decoded.float() + 0.5


def quiet() -> None:
    """Silence what diffusers and transformers say about themselves on every load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
