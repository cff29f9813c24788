"""What a run would do: its models, scheduler, texts, evaluations and time; nothing is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dng_models.pipelines.noise_levels import scheduler_levels
from dng_models.pipelines.transitions import scheduler_run
from dng_models.text_to_image.config import (
    IDEAL,
    METHODS,
    THE_LABORATORY,
    TRAINED,
    UNGUIDED,
    Config,
    Point,
)
from dng_models.text_to_image.generation import Materials

GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """A measured evaluation of a network, in a batch of eight on one H100 in bfloat16.

    Attributes
    ----------
    name : str
    parameters : int
        Of the network.
    latents : int
        Height and width of its latents.
    seconds : float
        Of one evaluation of the batch, by ``make benchmark BENCHMARKS=overhead`` on that GPU
        (``benchmarks/results/overhead_h100.csv``).
    """

    name: str
    parameters: int
    latents: int
    seconds: float


BATCH = 8
H100 = (
    Measured("SD 1.5", 859_520_964, 64, 0.05728),
    Measured("SDXL", 2_567_463_684, 128, 0.2824),
)
LABORATORY_STEP = 2.5e-4  # seconds of an image and an evaluation with all scenes, on one CPU core
TRAINED_STEP = 6e-4  # of the trained network


def rows(config: Config, point: Point) -> int:
    """Rows of the network's batch for every image and step of a point.

    Parameters
    ----------
    config : Config
    point : Point

    Returns
    -------
    int
        The positive prompt, every negative one, and the empty one where it is needed.  The forward
        derivative of a path tracker, which takes about as long again, is not counted; of a rule
        that asks, all negatives are, which it evaluates at most.
    """
    if config.attends(point):
        # The negative is in the attention; a gate compares its prediction with the positive one.
        gated = METHODS[point.rule].tracker is not None
        return 1 + 2 * gated + (config.cfg_scale is not None)
    plain = point.rule in (UNGUIDED, IDEAL)
    negatives = 0 if plain else len(config.concepts(point))
    needed = config.reference_of(point) == "unconditional" or point.rule == "perp-neg"
    return 1 + negatives + (needed or config.cfg_of(point) is not None)


def evaluations(config: Config) -> int:
    """Evaluations of the network for a whole run, each of one row.

    Parameters
    ----------
    config : Config
    """
    return config.num_images * config.steps * sum(rows(config, each) for each in config.points())


def report(config: Config, materials: Materials) -> str:
    """Load what a run needs, check it, and say what the run would do.

    Parameters
    ----------
    config : Config
    materials : Materials

    Returns
    -------
    str
        Lines of text.

    Raises
    ------
    FileNotFoundError, ValueError
        As a run would, if something is missing or does not fit.
    """
    pipe = materials.pipeline(config)
    clip = materials.clip(config)
    materials.detector(config)
    materials.check_asked(config)
    points = config.points()
    found = [
        f"model       {config.model}: {type(pipe).__name__}, {config.dtype} on {materials.device}",
        *_memory(pipe, clip, materials.device),
        *_scheduler(pipe, config),
        *_texts(pipe, config),
        f"images      {len(points) * config.num_images:,}: {len(points)} points (prompts x "
        f"negatives x rules x scales), {config.num_images} images each",
        f"evaluations {evaluations(config):,} of one row each, {config.steps} steps; "
        f"{materials.batch(config.model)} images at once",
        _time(pipe, config),
        f"folder      {materials.folder.path}: nothing was written",
    ]
    return "\n".join(found) + "\n"


def _memory(pipe: Any, clip: Any, device: torch.device) -> list[str]:
    networks = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    networks += [clip.model] if isinstance(getattr(clip, "model", None), nn.Module) else []
    parameters = [p for network in networks for p in network.parameters()]
    used = sum(p.numel() * p.element_size() for p in parameters) / GIB
    count = sum(p.numel() for p in parameters)
    told = f"memory      {used:.2f} GiB of weights ({count:,} parameters)"
    if device.type == "cuda":
        free, whole = (size / GIB for size in torch.cuda.mem_get_info(device))
        told += f", {free:.1f} of {whole:.1f} GiB free with them in place"
    return [told]


def _scheduler(pipe: Any, config: Config) -> list[str]:
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(config.steps)
    trackers = {METHODS[rule].tracker for rule in config.rules} - {None}
    if trackers <= {"path"}:
        scheduler_levels(scheduler)
        return [f"scheduler   {type(scheduler).__name__}: its noise levels are known"]
    steps = scheduler_run(scheduler)
    eta = float(steps.coefficients.eta[:-1].min(initial=1.0))
    told = f"scheduler   {type(scheduler).__name__}, {steps.prediction_type}, eta {eta:g}"
    if eta < 1.0 - 1e-6:
        return [
            f"{told}: TOO LITTLE NOISE for {', '.join(sorted(map(str, trackers - {'path'})))} "
            "trackers, whose posterior will be wrong: take --scheduler auto, or the rule dng-path"
        ]
    return [f"{told}: trackers can follow it"]


def _texts(pipe: Any, config: Config) -> list[str]:
    texts = dict.fromkeys(
        text
        for point in config.points()
        for positive, negatives in [config.texts(point)]
        for text in (positive, *negatives)
    )
    told = f"prompts     {len(config.prompts)} with {len(texts)} texts"
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return [told]
    lengths = {text: len(tokenizer(text).input_ids) for text in texts}
    longest = tokenizer.model_max_length
    cut = [text for text, length in lengths.items() if length > longest]
    told += f", of at most {max(lengths.values())} tokens; {longest} fit"
    shown = [f"            CUT at {longest} tokens: {text!r}" for text in cut]
    priors = f"            priors are {config.prior}"
    return [told, priors, *shown]


def _time(pipe: Any, config: Config) -> str:
    count = evaluations(config)
    if config.model == THE_LABORATORY:
        minutes = count * LABORATORY_STEP / 60.0
        return f"time        about {max(minutes, 0.1):.1f} minutes on one core, and the figures"
    if config.model == TRAINED:
        minutes = count * TRAINED_STEP / 60.0
        return f"time        about {max(minutes, 0.1):.1f} minutes on one core, and the figures"
    network = getattr(pipe, "unet", None)
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if network is None or not isinstance(size, int):
        return "time        not known: only U-Nets were measured"
    factor = getattr(pipe, "vae_scale_factor", 8)
    height, width = (
        size if pixels is None else pixels // factor for pixels in (config.height, config.width)
    )
    parameters = sum(p.numel() for p in network.parameters())
    expected, near = hours(count, parameters, height * width)
    return (
        f"time        about {expected:.2g} hours of an H100, from {near.name}'s {near.seconds:g} s "
        f"for a batch of {BATCH}, in proportion to parameters and latents; VAE and CLIP come on top"
    )


def hours(count: int, parameters: int, latents: int) -> tuple[float, Measured]:
    """Expected hours of an H100 for a number of evaluations of a U-Net, and what they are based on.

    The measured time of the U-Net with the nearest number of parameters, in proportion to
    parameters and latents.

    Parameters
    ----------
    count : int
        Evaluations, each of one row of a batch.
    parameters : int
        Of the U-Net.
    latents : int
        Height times width of its latents.
    """
    near = min(H100, key=lambda each: abs(each.parameters - parameters))
    share = latents / near.latents**2 * parameters / near.parameters
    return count * near.seconds / BATCH * share / 3600.0, near
