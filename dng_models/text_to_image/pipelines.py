"""Images of a point, from any text-to-image pipeline of diffusers.

The noise of an image, for its first latents and for every step, comes from its own generator on
the CPU.  The seed therefore decides the image in any batch and on any device, up to the rounding
of the networks.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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

from dng_models.pipelines.decoding import decoded
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler
from dng_models.pipelines.tiny import tiny_stable_diffusion
from dng_models.pipelines.transitions import scheduler_run
from dng_models.support import foreign
from dng_models.text_to_image.config import (
    DEFAULT_CLIP,
    JUDGE,
    METHODS,
    PAPER_MODEL,
    THE_LABORATORY,
    TINY,
    TRAINED,
    Config,
    Point,
)
from dng_models.text_to_image.laboratory.pipelines import laboratory_pipeline
from dng_models.text_to_image.laboratory.trained import load_trained

Pixels = NDArray[np.uint8]
SNAPSHOTS = 8  # decoded latents per followed image
ATTENTIVE = 8.0  # factor of the tiny pipeline's cross-attention weights


@dataclass(frozen=True, eq=False)
class Drawn:
    """An image, and a record of its guidance over S steps.

    Attributes
    ----------
    pixels : ndarray, shape (H, W, 3), uint8
    finite : bool
        Whether all pixels of the pipeline are finite; those that are NaN are drawn black.
    time : ndarray, shape (S,)
        Diffusion time at the start of each step; 1 is pure noise.
    scale : ndarray, shape (S,)
        The guidance scale of each step, as the rule computed it.
    log_posterior : ndarray, shape (S,) or (M, S), or None
        Log posterior that each step used, one row for each concept if they are split; None for
        rules that track nothing.
    evaluations, evaluations_saved : int
        Evaluations of the negative prompts for this image, made and skipped.
    questions : list of tuple
        For a rule that asks: the step, the concepts that were seen in this image, and the error of
        a question that had no answer, or None.
    strip : ndarray, shape (H, n W, 3), uint8, or None
        Decoded latents along the run, side by side; None if the image was not followed.
    strip_time : ndarray, shape (n,), or None
        Diffusion time of each image of the strip.
    """

    pixels: Pixels
    finite: bool
    time: NDArray[np.float64]
    scale: NDArray[np.float64]
    log_posterior: NDArray[np.float64] | None
    evaluations: int
    evaluations_saved: int
    questions: list[tuple[int, tuple[str, ...], str | None]]
    strip: Pixels | None = None
    strip_time: NDArray[np.float64] | None = None


# ---------------------------------------------------------------------- loading


def load_pipeline(config: Config, device: torch.device) -> Any:
    """Load the pipeline of a run and set its scheduler.

    A safety checker is removed: it would blacken images, guided and unguided ones differently.

    Parameters
    ----------
    config : Config
    device : torch.device
        Where the pipeline runs.

    Returns
    -------
    DiffusionPipeline

    Raises
    ------
    FileNotFoundError
        If its weights are not on this machine and cannot be downloaded; the message says what to
        download.
    ValueError
        If it is not a text-to-image pipeline, or the scheduler does not suit it; if its folder
        holds or names code, or weights that are pickles, damaged, or not finite.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.model == TINY:
        pipe: Any = _attentive(tiny_stable_diffusion())
    elif config.model == THE_LABORATORY:
        pipe = laboratory_pipeline(dtype=dtype)
    elif config.model == TRAINED:
        pipe = load_trained(dtype=dtype)
    else:
        pipe = _checked_pipeline(_pipeline_folder(config), dtype)
    if not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "vae"):
        raise ValueError(
            f"model must be a text-to-image pipeline with a VAE, such as {PAPER_MODEL}; "
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
    """The pipeline's folder, downloaded if it is a name; its contents are checked for code."""
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
    """Load the pipeline from a checked folder; its sizes and weights are checked here."""
    for part, make in _networks(folder):
        foreign.check_size(make, folder / part)
    try:
        with warnings.catch_warnings():
            # The oldest supported diffusers does not know the newer name, dtype.
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
    """Networks of a pipeline by name, each with what makes it from its configuration."""
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
    """Make a network of transformers from its configuration."""
    network: torch.nn.Module = kind(kind.config_class.from_dict(told))
    return network


def _warn_of_cut_prompts(pipe: Any, config: Config) -> None:
    """Warn once of prompts that are too long; the pipeline would warn at every batch."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return
    longest = tokenizer.model_max_length
    cut = [
        prompt.name
        for prompt in config.prompts
        if any(
            len(tokenizer(text).input_ids) > longest
            for point in config.points()
            if point.prompt == prompt
            for positive, negatives in [config.texts(point)]
            for text in (positive, *negatives)
        )
    ]
    if cut:
        warnings.warn(
            f"texts of more than {longest} tokens are cut, of the prompts {', '.join(cut)}",
            stacklevel=3,
        )


def _attentive(pipe: Any) -> Any:
    """Scale up the tiny pipeline's cross-attention, which untrained ignores the prompts."""
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
        f"{clip if clip not in (TINY, JUDGE) else DEFAULT_CLIP}' (older: huggingface-cli "
        "download). Or give --model DIR, the folder of any text-to-image pipeline that "
        "save_pretrained wrote, and --clip DIR. Without any weights: leave --model out, "
        "and the laboratory's model draws"
    )


def set_scheduler(pipe: Any, name: str) -> None:
    """Set a pipeline's scheduler by name, with the configuration of its present one.

    "ddpm", "ddim" with eta = 1, "euler-ancestral" and "sde-dpm++" are for pipelines with a noise
    schedule; "flow" is the posterior step of flow matching; "auto" is "flow" for flow-matching
    pipelines and "ddpm" for others; "own" keeps the scheduler.  Latents are not clipped.

    Raises
    ------
    ValueError
        If the scheduler does not suit the pipeline.
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


# ---------------------------------------------------------------------- drawing


def draw(
    pipe: Any,
    config: Config,
    point: Point,
    images: Sequence[int],
    *,
    followed: Collection[int] = (),
    ask: Any = None,
) -> list[Drawn]:
    """Draw some images of a point, as one batch.

    Parameters
    ----------
    pipe : DiffusionPipeline
        From :func:`load_pipeline`.
    config : Config
    point : Point
    images : sequence of int
        Numbers of the images; image i has the seed ``config.seed + i``.
    followed : collection of int
        Those of the images whose latents are decoded along the run.
    ask : callable, optional
        As for :meth:`.config.Config.rule`.

    Returns
    -------
    list of Drawn
        In the order of ``images``.
    """
    generators = [torch.Generator("cpu").manual_seed(config.seed + image) for image in images]
    positive, negatives = config.texts(point)
    asks = ask is not None
    # The concepts of a rule that asks are its own.
    separate = asks or (config.split_negatives and len(negatives) > 0)
    rows = [row for row, image in enumerate(images) if image in followed]
    snapshots = _Snapshots(pipe, config.steps, rows) if rows else None
    given: dict[str, Any] = {
        name: value
        for name, value in (("height", config.height), ("width", config.width))
        if value is not None
    }
    if config.attends(point):
        # The pipeline's own guidance keeps its effect, and 1 is its plain prediction.
        given["guidance_scale"] = 1.0 if config.cfg_scale is None else config.cfg_scale
    guidance = apply_guidance(
        pipe,
        config.rule(point, ask),
        negative_prompts=negatives if separate and not asks else None,
        cfg_scale=config.cfg_of(point),
        reference=config.reference_of(point),
    )
    with guidance as trace:
        found = pipe(
            [positive] * len(images),
            negative_prompt=["" if separate or not negatives else negatives[0]] * len(images),
            num_inference_steps=config.steps,
            generator=generators,
            output_type="pt",
            callback_on_step_end=snapshots,
            **given,
        ).images
    time, scale = trace.time, trace.scale.double().numpy()
    made = trace.last.evaluations_of_images or [0] * len(images)
    every = (trace.evaluations + trace.evaluations_saved) // len(images)
    method = METHODS.get(point.rule)
    # CRG's evidence is none.
    log_posterior = trace.log_posterior if method is not None and method.tracker else None
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
            evaluations=made[row],
            evaluations_saved=every - made[row],
            questions=[(one.step, one.shown[row], one.error) for one in trace.questions],
            strip=strips.get(row),
            strip_time=strip_time if row in strips else None,
        )
        for row in range(len(images))
    ]


def _pixels(images: Tensor) -> Pixels:
    """Convert images (N, 3, H, W) in [0, 1] to 8-bit pixels (N, H, W, 3)."""
    clamped = images.float().nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
    eight_bit: Pixels = (clamped * 255.0).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return eight_bit


class _Snapshots:
    """Latents of some rows of a batch, kept along a run and decoded afterwards.

    They are kept with the scheduler's input scaling, as the network sees them, so that those of
    all schedulers are comparable.
    """

    def __init__(self, pipe: Any, steps: int, rows: Sequence[int]) -> None:
        self._pipe, self._rows = pipe, list(rows)
        # Steps after which latents are kept, evenly spaced from the first to the last.
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
        """Decode the latents; one strip of images side by side for each row."""
        shown = [_pixels(decoded(self._pipe, latents)) for latents in self._latents]
        return [
            np.concatenate([pixels[i] for pixels in shown], axis=1) for i in range(len(self._rows))
        ]


def quiet() -> None:
    """Silence the messages of diffusers and transformers on loading a model."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
