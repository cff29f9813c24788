"""Check that a base network draws the data at all, before results of guiding it are trusted.

A network that was trained too briefly draws blanks or noise.  A classifier has no class for these
and assigns them to one of its classes, so forbidden shares, and the effect of guidance on them,
mean nothing.  The check therefore compares unguided images with held-out ones, which no network
has seen.

F is the Frechet distance of a set of images to the training data.  The unguided and the held-out
set have the same size m, so small samples bias F(unguided) and F(held out) alike.  F(without), of
all data without the forgotten classes, measures how much forgetting changes.  The base is good if
F(unguided) - F(held out) <= F(without), both in features of the classifier and in pixels.  It is
bad if this fails in either even with the lower end of F(unguided)'s 95% interval: a base that is
farther from the data than forgetting is hides what forgetting does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dng_math.distances import frechet_distance
from dng_models.class_removal.config import Config
from dng_models.class_removal.evaluation import pixels_of
from dng_models.class_removal.generation import generate
from dng_models.class_removal.materials import Materials
from dng_models.support import metrics
from dng_models.support.metrics import Moments

if TYPE_CHECKING:
    from torch import Tensor

    from dng_models.class_removal.data import Dataset
    from dng_models.class_removal.judge import Judge

Array = NDArray[np.float64]

CHECKED = 256  # at most so many unguided, and as many held-out, images are compared
FEWEST = 32  # with fewer images nothing can be concluded
GOOD, UNSURE, BAD, UNCHECKED = "good", "unsure", "bad", "unchecked"
SUBSETS = 8  # random subsets of the held-out images, over which their distance is averaged
QUANTITIES = {"frechet": "features", "frechet_pixels": "pixels"}


def checked(config: Config, materials: Materials) -> dict[str, Any] | None:
    """Check the base network of a setting with :func:`check`; every process calls this.

    Parameters
    ----------
    config : Config
        Any setting that uses the base; the images of :func:`unguided` are drawn for it.
    materials : Materials

    Returns
    -------
    dict, or None in processes other than the main one
        The result of :func:`check`, with the ``key`` of the setting of :func:`unguided`.  With
        fewer than 32 images or held-out images the ``verdict`` is "unchecked", and nothing was
        measured.
    """
    dataset = materials.dataset(config)
    few = unguided(config, materials)
    if few.num_images < FEWEST:
        return {"key": few.key, "num_images": few.num_images, "verdict": UNCHECKED}
    generated = generate(few, materials)
    if generated is None:
        return None
    with materials.threads(few):
        images = torch.nan_to_num(generated.images, nan=0.0, posinf=1.0, neginf=-1.0)
        told = check(images.clamp(-1.0, 1.0), dataset, materials.judge(config), config.forget)
    return {"key": few.key, **told}


def unguided(config: Config, materials: Materials) -> Config:
    """The setting that is drawn to check the base of another: no guidance, and few images."""
    held_out = len(materials.dataset(config).held_out)
    names = (
        *("networks", "base", "dataset", "image_column", "label_column", "split", "held_out"),
        *("image_size", "channels", "like", "forget", "classifier", "steps", "variance", "eta"),
        *("clip", "seed", "batch_size", "autocast"),
    )
    kept = {name: getattr(config, name) for name in names}
    return Config(
        rule="none",
        guidance_scale=0.0,
        num_images=min(CHECKED, held_out, config.num_images),
        **kept,
    )


@dataclass(frozen=True)
class _Space:
    """The training, held-out and unguided images as vectors: features or pixels."""

    train: Array
    held_out: Array
    images: Array


def check(
    images: Tensor, dataset: Dataset, judge: Judge, forget: tuple[str, ...]
) -> dict[str, Any]:
    """Compare unguided images with held-out ones.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        In [-1, 1]; N >= 4.
    dataset : Dataset
        All data, with its training and held-out parts.
    judge : Judge
    forget : tuple of str
        The forgotten classes.

    Returns
    -------
    dict of str to int, float or str
        ``num_images``, the number m that was compared; ``frechet`` (of the judge's features) and
        ``frechet_pixels``, the distances of m unguided images.  Each has a 95% interval, ``_low``
        to ``_high``, and for comparison ``_held_out``, the distance of m held-out images, and
        ``_without``, that of the data without the forgotten classes.  ``forbidden`` and
        ``forbidden_held_out`` are the shares of the unguided and of all held-out images that the
        judge calls forbidden; ``verdict`` is "good", "unsure" or "bad".
    """
    train, held_out = dataset.train, dataset.held_out
    count = min(len(images), len(held_out), CHECKED)
    images = images[:count]
    forgotten = np.isin(train.labels.numpy(), [dataset.index_of(name) for name in forget])
    _, train_features = judge.judge(train.images)
    truth, own_features = judge.judge(held_out.images)
    judged, features = judge.judge(images)
    spaces = {
        "frechet": _Space(train_features, own_features, features),
        "frechet_pixels": _Space(*map(pixels_of, (train.images, held_out.images, images))),
    }
    indices = [dataset.index_of(name) for name in forget]
    found: dict[str, Any] = {
        "num_images": count,
        "forbidden": float(np.isin(judged, indices).mean()),
        "forbidden_held_out": float(np.isin(truth, indices).mean()),
    }
    verdict = GOOD
    for name, space in spaces.items():
        reference = Moments.of(space.train)
        value, low, high = metrics.frechet_interval(space.images, reference)
        parts = _subsets(space.held_out, count)
        own = float(np.mean([frechet_distance(Moments.of(part), reference) for part in parts]))
        without = frechet_distance(Moments.of(space.train[~forgotten]), reference)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        found |= {f"{name}_held_out": own, f"{name}_without": without}
        if low - own > without:
            verdict = BAD
        elif value - own > without and verdict == GOOD:
            verdict = UNSURE
    return found | {"verdict": verdict}


def _subsets(rows: Array, count: int) -> list[Array]:
    """Random subsets of ``count`` rows; all rows, once, if there are only ``count``."""
    rng = np.random.default_rng(0)
    times = 1 if count == len(rows) else SUBSETS
    return [rows[rng.permutation(len(rows))[:count]] for _ in range(times)]


def warning(told: Mapping[str, Any], config: Config) -> str:
    """The message that says why a base is not known to be good, and what to do about it."""
    network = config.base or ("conditional" if config.networks == "conditional" else "base")
    verdict = told["verdict"]
    if verdict == UNCHECKED:
        return (
            f"the network {network} was not checked: that needs {FEWEST} unguided and held-out "
            f"images, and there are {told['num_images']} (--num-images, --held-out)"
        )
    worse = [
        f"in {where} {told[name]:.3g} [{told[f'{name}_low']:.3g}, {told[f'{name}_high']:.3g}], "
        f"where as many held-out images have {told[f'{name}_held_out']:.3g}, and forgetting "
        f"{', '.join(config.forget)} changes {told[f'{name}_without']:.3g}"
        for name, where in QUANTITIES.items()
        if told[name] - told[f"{name}_held_out"] > told[f"{name}_without"]
    ]
    found = (
        f"the Frechet distance of its {told['num_images']} unguided images to the data is "
        f"{'; '.join(worse)}"
    )
    if verdict == UNSURE:
        return (
            f"the network {network} may not be good enough to be guided: {found}.  More images "
            "(--num-images) would tell"
        )
    return (
        f"WARNING: the network {network} is not good enough to be guided: {found}.  The classifier "
        f"calls {100 * told['forbidden']:.0f}% of them forbidden, and "
        f"{100 * told['forbidden_held_out']:.0f}% of held-out images; it does so also where they "
        "are blank or noise.  Numbers of guided images mean little with it: train it longer "
        "(--train-steps, into another --out), with more images, or at a smaller --image-size"
    )
