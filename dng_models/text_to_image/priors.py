"""The prior of a negative prompt: the share of unguided images that have what it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dng_math import checks
from dng_math.distances import binomial_interval
from dng_models.support import files
from dng_models.text_to_image.compare import PRESENT
from dng_models.text_to_image.prompts import split

if TYPE_CHECKING:
    from dng_models.text_to_image.scores import Detector

HIGHEST = 0.98


@dataclass(frozen=True)
class Prior:
    """A share that was counted in unguided images.

    Parameters
    ----------
    found, images : int
        Images in which at least one concept was found, and all of them.

    Raises
    ------
    TypeError, ValueError
        If they are no such numbers.
    """

    found: int
    images: int

    def __post_init__(self) -> None:
        checks.integer("images", self.images, 1)
        checks.integer("found", self.found, 0, self.images)

    @property
    def value(self) -> float:
        """The prior, (found + 1/2) / (images + 1), which is never 0 (Jeffreys' estimate).

        It is at most .98, because trackers bound the posterior at .99.
        """
        return min((self.found + 0.5) / (self.images + 1), HIGHEST)

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper-Pearson interval of the share, of confidence .95."""
        low, high = binomial_interval(self.found, self.images)
        return float(low), float(high)


def estimate_prior(
    pipe: Any,
    prompt: str,
    negative: str,
    *,
    detector: Detector | None = None,
    images: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    **call: Any,
) -> Prior:
    """Draw unguided images of a prompt, and count those that have what a negative names.

    The prior of a negative that is composed with its prompt (``negative_template`` of
    :func:`dng_models.apply_guidance`) is this share.

    Parameters
    ----------
    pipe : DiffusionPipeline
        A text-to-image pipeline that is not guided.
    prompt, negative : str
        The commas of the negative separate its concepts; one of them is enough.
    detector : Detector, optional
        Gives the probability of every concept in every image; at least 1/2 counts as found.  Needed
        unless the model is the laboratory's, whose judge then decides.  For others
        ``dng_models.text_to_image.scores.ZeroShot(load_clip(name))``.
    images, batch_size, seed : int
        Number of images, how many at once, and the seed of the first one.
    **call
        Arguments of the pipeline's call, such as ``num_inference_steps`` and ``guidance_scale``.

    Returns
    -------
    Prior

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    import numpy as np
    import torch

    checks.integer("images", images, 1)
    checks.integer("batch_size", batch_size, 1)
    checks.integer("seed", seed, 0)
    concepts = split(negative)
    if not concepts:
        raise ValueError(f"negative must name at least one concept, got {negative!r}")
    if detector is None:
        detector = _judge(pipe)
    found = 0
    for first in range(0, images, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, images))
        drawn = pipe(
            [prompt] * len(seeds),
            generator=[torch.Generator().manual_seed(each) for each in seeds],
            output_type="pil",
            **call,
        ).images
        probabilities = np.asarray(detector(drawn, concepts), dtype=np.float64)
        if probabilities.shape != (len(drawn), len(concepts)):
            raise ValueError(
                f"detector must give probabilities of shape {(len(drawn), len(concepts))}, got "
                f"{probabilities.shape}"
            )
        found += int((probabilities >= PRESENT).any(axis=1).sum())
    return Prior(found, images)


def _judge(pipe: Any) -> Detector:
    from dng_models.text_to_image.laboratory.denoiser import ExactDenoiser
    from dng_models.text_to_image.laboratory.judge_scores import JudgeScores
    from dng_models.text_to_image.laboratory.standard import laboratory_world

    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, ExactDenoiser) or unet.world is not laboratory_world():
        raise ValueError(
            "detector must be given for a pipeline that is not the laboratory's, such as "
            f"dng_models.text_to_image.scores.ZeroShot, got None for a {type(pipe).__name__}"
        )
    return JudgeScores(unet.device)


# ---------------------------------------------------------------------- the file


def write(path: Path, known: Mapping[str, Mapping[str, Prior]]) -> None:
    """Write priors by prompt and kind of negative."""
    told = {
        name: {
            kind: {"found": prior.found, "images": prior.images} for kind, prior in kinds.items()
        }
        for name, kinds in known.items()
    }
    files.write_text(path, json.dumps(told, indent=2) + "\n")


def read(path: Path) -> dict[str, dict[str, Prior]]:
    """Read what :func:`write` wrote; empty if there is no file.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    if not path.is_file():
        return {}
    found = files.read_json(path)
    try:
        return {
            name: {kind: Prior(**prior) for kind, prior in kinds.items()}
            for name, kinds in found.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} does not hold the priors of a run: remove it") from None


def table(known: Mapping[str, Mapping[str, Prior]], names: Sequence[str]) -> str:
    """The priors of some prompts with their intervals, as Markdown; empty if none is known."""
    lines = []
    for name in names:
        if name not in known:
            continue
        row = [name]
        for kind in ("related", "unrelated"):
            prior = known[name][kind]
            low, high = prior.interval
            row += [
                f"{prior.found} of {prior.images} [{low:.3f}, {high:.3f}]",
                f"{prior.value:.3f}",
            ]
        lines.append(f"| {' | '.join(row)} |")
    if not lines:
        return ""
    header = [
        "| prompt | related: found without guidance | prior | unrelated: found without guidance "
        "| prior |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*header, *lines]) + "\n"
