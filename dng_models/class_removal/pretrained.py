"""Load base networks that others trained: diffusers pipelines, from a directory or the hub.

The configuration of the pipeline's scheduler has what a sampler must know besides the network: the
noise schedule, what is predicted, and whether predicted images are clipped.  Three layouts exist:
``unet/`` and ``scheduler/`` beside a ``model_index.json``; the same files all at the top, as in
``google/ddpm-cifar10-32``; and a network alone, which is assumed to use DDPM's schedule.

The scheduler's spacing of steps and its choice of noise are not read; the sampler decides them.
Options that would change the images but are no setting of the sampler are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from dng_math import NoiseSchedule, checks
from dng_models.support import foreign

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

INDEX = "model_index.json"
NETWORK = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A network with what is needed to sample from it.

    Attributes
    ----------
    net : UNet2DModel
        In evaluation mode, without gradients.
    schedule : NoiseSchedule
        Schedule of its training; index t + 1 belongs to the time step t that the network is given.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        What it predicts.
    clip : float or None
        Its pipeline clips predicted images to [-clip, clip]; None for no clipping.
    shape : tuple of int
        Shape of an image: (C, H, W).
    num_classes : int or None
        Number of labels that it takes, 0 ... num_classes - 1; None for a network without labels.
        In the networks that are trained here the last label is "no label".
    """

    net: UNet2DModel
    schedule: NoiseSchedule
    prediction_type: Prediction
    clip: float | None
    shape: tuple[int, int, int]
    num_classes: int | None


def load_denoiser(
    name_or_path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Pretrained:
    """Load the network of a DDPM or DDIM pipeline, or a network alone.

    Parameters
    ----------
    name_or_path : Path or str
        A directory, or a name on the Hugging Face hub such as ``"google/ddpm-cifar10-32"``.  It
        holds a pipeline or a bare ``UNet2DModel``.  The latter is assumed to predict noise on
        DDPM's linear schedule of 1000 steps, with images clipped to [-1, 1], unless a scheduler's
        configuration lies beside it.
    device : torch.device or str, optional
        Default: the CPU.
    dtype : torch.dtype, optional
        Data type of the weights; default float32.

    Returns
    -------
    Pretrained

    Raises
    ------
    FileNotFoundError
        If it is neither a directory nor on the hub or in the hub's cache, or lacks a file; the
        message says which files are needed.
    ValueError
        If it is of another kind or damaged, its weights are pickles or not finite, or it needs
        options that the sampler does not have.

    Notes
    -----
    Weights must be safetensors, and no code in a repository is run: see
    :mod:`dng_models.support.foreign`.
    """
    folder = _folder(name_or_path)
    where = _network_folder(folder)
    _check(folder, where)
    shape = _shape(where / NETWORK)
    schedule, prediction, clip = _settings(folder, where)
    net = _network(where, dtype).to(device)
    return Pretrained(net, schedule, prediction, clip, shape, net.config.num_class_embeds)


# ---------------------------------------------------------------------- where the files are


def _folder(name_or_path: Path | str) -> Path:
    """The local directory with all files, downloaded if a hub name is given."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(
            f"base must be a directory or a name on the hub, got the file {folder} (a checkpoint "
            "in the published layout can be converted: the command convert)"
        )
    foreign.require_hub_name("base", name_or_path)
    return _download(str(name_or_path))


def _download(name: str) -> Path:
    """Download the configurations and then the weights of a repository; return the snapshot."""
    from huggingface_hub import snapshot_download

    local = not foreign.ask_hub(name, "model")

    def fetch(*patterns: str) -> Path:
        try:
            return Path(
                snapshot_download(name, allow_patterns=list(patterns), local_files_only=local)
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"there is no directory {name}, and {name} could not be had from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Where there is a "
                f"network: hf download {name} --include '*.json' '*.safetensors', with --local-dir "
                f"DIR to carry DIR here; needed are {NETWORK} and {WEIGHTS}.safetensors of the "
                f"network, and {INDEX} and {SCHEDULER} of the pipeline"
            ) from error

    folder = fetch("*.json")
    where = _network_folder(folder)
    prefix = f"{where.relative_to(folder).as_posix()}/".removeprefix("./")
    fetch(f"{prefix}{WEIGHTS}.safetensors", f"{prefix}{WEIGHTS}-*-of-*.safetensors")
    return folder


def _network_folder(folder: Path) -> Path:
    """The folder of the network, which is ``unet`` in a pipeline of separate folders."""
    index = folder / INDEX
    where = folder
    if index.is_file():
        parts = {part for part in foreign.read_object(index) if not part.startswith("_")}
        if parts != {"unet", "scheduler"}:
            raise ValueError(
                f"{index} must be of a pipeline of a unet and a scheduler, as DDPMPipeline, "
                f"got one of {', '.join(sorted(parts)) or 'nothing'}"
            )
        if (folder / "unet").is_dir():
            where = folder / "unet"
    if not (where / NETWORK).is_file():
        raise FileNotFoundError(
            f"{folder} must hold a pipeline ({INDEX}) or a UNet2DModel ({NETWORK}); there is no "
            f"{where / NETWORK}"
        )
    return where


def _check(folder: Path, where: Path) -> None:
    """Raise an error if the folder contains code, or the weights are pickles or incomplete."""
    if (folder / INDEX).is_file():
        foreign.check_pipeline(folder, weights=False)
    foreign.check_model(where)


# ---------------------------------------------------------------------- the network


def _shape(path: Path) -> tuple[int, int, int]:
    """Shape (C, H, W) of an image, from a network's configuration; refuses other networks."""
    config = foreign.read_object(path)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(
            f"{path} must describe a UNet2DModel, got {kind!r}: networks of other kinds do not "
            "predict from an image and a time step alone"
        )
    channels, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if not all(isinstance(each, int) for each in (channels, out)):
        raise ValueError(
            f"{path} must have whole numbers as in_channels and out_channels, got "
            f"{foreign.shown(channels)} and {foreign.shown(out)}"
        )
    if out == 2 * channels:
        raise ValueError(
            f"{path} has out_channels = {out} for in_channels = {channels}: the network predicts "
            "the variances of its steps too, and here they follow from the schedule, as trackers "
            "of the posterior need it"
        )
    if out != channels:
        raise ValueError(f"{path} has out_channels = {out}, other than in_channels = {channels}")
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{path} has class_embed_type = {config['class_embed_type']!r}: only labels that are "
            "class numbers (num_class_embeds) can be given"
        )
    size = config.get("sample_size")
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(
            f"{path} must say the size of the images in pixels, one number or two, in "
            f"sample_size; got {size!r}"
        )
    return channels, sides[0], sides[1]


def _network(where: Path, dtype: torch.dtype | None) -> UNet2DModel:
    """Load the network, and check that the weights are complete, matching and finite."""
    from diffusers import UNet2DModel

    config = foreign.read_object(where / NETWORK)
    held = foreign.require_tensors(where)
    foreign.require_size(
        foreign.outline(UNet2DModel.from_config, config, where / NETWORK, held), where
    )
    try:
        net, report = UNet2DModel.from_pretrained(
            where,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights in {where} cannot be loaded as tensors of the network in {NETWORK}: "
            f"they are damaged, or of another network ({foreign.reason(error)})"
        ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if report[problem]:
            raise ValueError(
                f"the weights in {where} are not those of the network in {NETWORK}: "
                f"{problem.replace('_', ' ')} {', '.join(sorted(report[problem])[:4])}"
            )
    foreign.require_finite_network(where, net)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------- the scheduler


def _settings(folder: Path, where: Path) -> tuple[NoiseSchedule, Prediction, float | None]:
    """Schedule, prediction type and clip bound; those of DDPM if there is no scheduler."""
    beside = where.parent if where.name == "unet" else folder
    candidates = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER]
    candidates.append(beside / "scheduler" / SCHEDULER)
    found = [path for path in candidates if path.is_file()]
    if not found:
        if (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} is a pipeline without scheduler/{SCHEDULER}")
        return NoiseSchedule.linear(1000), "epsilon", 1.0
    config = foreign.read_object(found[0])
    try:
        return schedule_of(config), prediction_of(config), clip_of(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found[0]} describes what cannot be sampled from: {error}") from error


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler, its ``alphas_cumprod``, in float64.

    Parameters
    ----------
    config : mapping
        Configuration of a ``DDPMScheduler`` or ``DDIMScheduler``; missing fields have diffusers'
        defaults.

    Raises
    ------
    ValueError, TypeError
        For another scheduler, an unknown ``beta_schedule``, betas outside (0, 1), or a schedule
        rescaled to pure noise at its end (``rescale_betas_zero_snr``) for a network that predicts
        noise.
    """
    checks.choice("_class_name", config.get("_class_name", SCHEDULERS[0]), SCHEDULERS)
    steps = config.get("num_train_timesteps", 1000)
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"])
    elif kind == "linear":
        schedule = NoiseSchedule.linear(steps, low, high)
    elif kind == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(steps, low, high)
    elif kind == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(steps)
    else:
        checks.choice("beta_schedule", kind, BETA_SCHEDULES)
        share = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, checks.integer("steps", steps, 1))))
        schedule = NoiseSchedule.from_betas(share * (high - low) + low)
    if not config.get("rescale_betas_zero_snr", False):
        return schedule
    if prediction_of(config) == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr must not be with prediction_type 'epsilon': at the last time "
            "step there is nothing but noise in x, and predicted noise tells nothing of the image"
        )
    # arXiv 2305.08891, Algorithm 1: the last alpha goes to 0, the first stays.
    first, last = schedule.alpha[1], schedule.alpha[-1]
    return NoiseSchedule.from_alpha_bar(
        ((schedule.alpha[1:] - last) * (first / (first - last))) ** 2
    )


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """What a network predicts, from its scheduler's configuration.

    Raises
    ------
    ValueError
        If the prediction type is unknown.
    """
    old = "epsilon" if config.get("predict_epsilon", True) else "sample"
    prediction = config.get("prediction_type", old)
    return cast(Prediction, checks.choice("prediction_type", prediction, PREDICTIONS))


def clip_of(config: Mapping[str, Any]) -> float | None:
    """Bound to which a network's scheduler clips predicted images, or None.

    Raises
    ------
    TypeError, ValueError
        If each image has a bound of its own (``thresholding``), or the bound is not positive.
    """
    if config.get("thresholding", False):
        raise ValueError(
            "thresholding must be false: it divides each predicted image by a quantile of its "
            "own, and the step here clips all of them to one range"
        )
    if not config.get("clip_sample", True):
        return None
    return checks.positive("clip_sample_range", config.get("clip_sample_range", 1.0))
