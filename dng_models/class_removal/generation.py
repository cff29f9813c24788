"""Draw the images of a setting in pieces that are saved as they are finished.

A piece is one batch, images [i B, (i + 1) B), saved as one file: a killed process loses only the
batch that it was drawing.  Image i depends only on the seed and on i, so the pieces may be drawn in
any order, by any number of processes and in several runs, and more of them can be added later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dng_math.rules import Rule
from dng_models.class_removal.config import Config
from dng_models.class_removal.materials import Materials, Models
from dng_models.class_removal.second_order import sample_second_order
from dng_models.pairs.sampling import Samples, sample
from dng_models.support import files


@dataclass(frozen=True, eq=False)
class Generated:
    """The n images of a setting; M forbidden concepts.

    Attributes
    ----------
    images : Tensor, shape (n, C, H, W)
        float32, in [-1, 1] up to the errors of the networks.
    log_posterior : Tensor, shape (n,) or (M, n), or None
        log p(c | x) at the end of the chain; None if the rule tracks no posterior.
    mean_scale : Tensor, shape (n,)
        Guidance scale, averaged over the steps.
    """

    images: Tensor
    log_posterior: Tensor | None
    mean_scale: Tensor


# ---------------------------------------------------------------------- pieces


def piece_count(config: Config) -> int:
    """Number of batches that hold the images of a setting."""
    return -(-config.num_images // config.batch_size)


def generate(
    config: Config,
    materials: Materials,
    *,
    advance: Callable[[int], object] | None = None,
) -> Generated | None:
    """The images of a setting, from the pieces that exist and from new ones.

    Every process that ``accelerate launch`` started calls this and draws its share.

    Parameters
    ----------
    config : Config
        A setting with class names, not numbers (:meth:`Materials.resolved`).
    materials : Materials
    advance : callable, optional
        Called after each piece with the number of pieces that all processes have drawn or found
        since the last call.

    Returns
    -------
    Generated, or None in processes other than the main one

    Raises
    ------
    OSError
        If a piece cannot be written; earlier pieces are kept.
    """
    processes, folder = materials.processes, materials.folder.work(config)
    models, rule = materials.models(config), materials.rule(config)
    label = _label(config, rule, models)
    count = piece_count(config)
    for i in range(processes.process_index, count, processes.num_processes):
        path = _path(folder, i)
        if not _is_sound(path, label, config.batch_size):
            with materials.threads(config):
                piece = _piece(_draw(config, materials, models, rule, i))
            files.save_tensors(path, piece, {"made_of": label})
        if advance is not None:
            advance(min(processes.num_processes, count - i))
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    pieces = [files.load_tensors(_path(folder, i))[0] for i in range(count)]
    return _assembled(pieces, config.num_images)


def _path(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.safetensors"


def _label(config: Config, rule: Rule, models: Models) -> str:
    """Everything that determines a piece, for its metadata: networks may change between runs."""
    made_of = {"images": config.images_key, "rule": repr(rule), "sources": models.sources}
    return json.dumps(made_of, sort_keys=True)


def _is_sound(path: Path, label: str, batch_size: int) -> bool:
    """Whether a piece exists, is complete and was made by the same setting and networks."""
    try:
        tensors, metadata = files.load_tensors(path)
    except (FileNotFoundError, ValueError):
        return False
    return metadata.get("made_of") == label and len(tensors["images"]) == batch_size


def _draw(
    config: Config,
    materials: Materials,
    models: Models,
    rule: Rule,
    batch: int,
    record: Sequence[str] = ("scale",),
    progress: str | None = None,
) -> Samples:
    """Draw one batch of images and the records of their chains."""
    unwanted = models.unwanted
    shared: dict[str, Any] = {
        "shape": tuple(materials.dataset(config).images.shape[1:]),
        "num_images": config.batch_size,
        "schedule": models.schedule,
        "steps": config.steps,
        "prediction_type": models.prediction_type,
        "seed": config.seed,
        "first_image": batch * config.batch_size,
        "device": materials.device,
        "autocast": None if config.autocast is None else getattr(torch, config.autocast),
        "record": record,
        "progress": progress,
    }
    if config.solver == "dpm++2m":
        return sample_second_order(models.base, unwanted, rule, **shared)
    return sample(
        models.base,
        unwanted if len(unwanted) > 1 else next(iter(unwanted), None),
        rule,
        sampler=config.sampler,
        clip=config.clip,
        positive=models.positive,
        batch_size=config.batch_size,
        **shared,
    )


def _piece(samples: Samples) -> dict[str, Tensor]:
    kept = {
        "images": samples.images,
        "mean_scale": samples.records["scale"].double().mean(dim=0),
    }
    if samples.log_posterior is not None:
        kept["log_posterior"] = samples.log_posterior
    return kept


def _assembled(pieces: Sequence[Mapping[str, Tensor]], num_images: int) -> Generated:
    """Join the pieces in order and cut the result to ``num_images``."""

    def joined(name: str, axis: int) -> Tensor:
        values = torch.cat([piece[name] for piece in pieces], dim=axis)
        return values.narrow(axis, 0, num_images)

    return Generated(
        images=joined("images", 0),
        log_posterior=joined("log_posterior", -1) if "log_posterior" in pieces[0] else None,
        mean_scale=joined("mean_scale", -1),
    )


def trajectories(
    config: Config,
    materials: Materials,
    images: Sequence[int],
    *,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """The chains of some images of a setting.

    Parameters
    ----------
    config : Config
    materials : Materials
    images : sequence of int
        Numbers of the n images within the setting.
    progress : str, optional
        Name on a progress bar; None shows none.

    Returns
    -------
    dict of Tensor
        For S steps: ``times`` (S,), t/T in [0, 1]; ``x`` (S, n, C, H, W), the clean image that the
        guided prediction implies; ``scale`` (S, n), the guidance scale; and, for DNG,
        ``log_posterior`` (S, n), log p(c | x_t) (of several classes, the log of their summed
        posteriors).
    """
    models, rule = materials.models(config), materials.rule(config)
    record = ["x0", "scale"]
    if config.rule == "dng":
        record.append("log_posterior")
    with materials.threads(config):
        drawn = {
            batch: _draw(config, materials, models, rule, batch, record, progress)
            for batch in sorted({i // config.batch_size for i in images})
        }

    def kept(name: str, axis: int) -> Tensor:
        rows = [
            drawn[i // config.batch_size].records[name].select(axis, i % config.batch_size)
            for i in images
        ]
        return torch.stack(rows, dim=axis)

    first = next(iter(drawn.values()))
    result = {
        "times": torch.from_numpy(first.time[:-1].copy()),
        "x": kept("x0", 1),
        "scale": kept("scale", 1),
    }
    if config.rule == "dng":
        log_posterior = kept("log_posterior", -1)[:-1]
        several = log_posterior.ndim == 3
        result["log_posterior"] = log_posterior.logsumexp(dim=1) if several else log_posterior
    return result
