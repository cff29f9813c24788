"""Training of the small classifier that judges images.

Forbidden shares are measured by the classifier, so its own errors are the floor of every curve; its
confusion matrix on held-out images is stored beside its weights.  Training shifts, turns and scales
the images slightly and adds a little noise, because generated images are often slightly off-centre
or noisy; stronger augmentation would make the classifier confident about broken images.

All randomness of training step k is a function of (seed, k).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dng_math import checks
from dng_models.support import files
from dng_models.support.progress import Progress, seconds_of
from dng_models.support.threads import torch_threads, work_of

if TYPE_CHECKING:
    from dng_models.class_removal.data import Dataset
from dng_models.class_removal.judge import Judge, _own
from dng_models.class_removal.small_classifier import (
    CONFIG,
    KIND,
    WEIGHTS,
    SmallClassifier,
    device_of,
)

# ---------------------------------------------------------------------- training


@dataclass(frozen=True)
class ClassifierConfig:
    """How the small classifier is trained.

    Parameters
    ----------
    steps, batch_size : int
        Number of updates, and of images in each.
    learning_rate : float
        Largest rate of AdamW; it warms up for 50 steps and falls to 0 as a cosine.
    seed : int
        Seed of the initial weights, the batches and the augmentation.
    width, layers : int
        Size of the :class:`SmallClassifier`; ``width`` is a multiple of 8.
    shift : float
        Largest shift, as a share of the side.
    turn : float
        Largest angle, in degrees.
    zoom : float
        Largest relative change of scale.
    noise : float
        Largest standard deviation of the added noise, in units of pixels in [-1, 1].
    flips : bool
        Whether images are mirrored left to right at random; not for digits.
    """

    steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    width: int = 24
    layers: int = 1
    shift: float = 0.08
    turn: float = 8.0
    zoom: float = 0.1
    noise: float = 0.3
    flips: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "layers"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("seed", self.seed, 0)
        if checks.integer("width", self.width, 8) % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        checks.positive("learning_rate", self.learning_rate)
        for name in ("shift", "turn", "zoom", "noise"):
            checks.non_negative(name, getattr(self, name))
        checks.boolean("flips", self.flips)


def train_classifier(
    dataset: Dataset,
    out: Path | str,
    config: ClassifierConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train a classifier on ``dataset.train`` and count its errors on ``dataset.held_out``.

    The folder gets ``model.safetensors`` and, last, ``config.json`` with the classes, the
    configuration, the held-out accuracy and the confusion matrix (rows are true classes, columns
    predicted ones).  If the folder already holds a classifier of the same data set and
    configuration, nothing is trained.

    Parameters
    ----------
    dataset : Dataset
        Square images, some of them held out.
    out : Path or str
        Folder to write.
    config : ClassifierConfig, optional
    device : torch.device or str, optional
        Default: a GPU if there is one.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    ValueError
        If the folder holds another classifier, the images are not square, or none are held out.
    OSError
        If the disk is full or the folder cannot be written.
    """
    config = ClassifierConfig() if config is None else config
    out = Path(out)
    made_from = _made_from(dataset, config)
    if (out / CONFIG).is_file():
        _require_same(out, made_from)
        if (out / WEIGHTS).is_file():
            return out
    _, channels, height, width = dataset.images.shape
    if height != width:
        raise ValueError(f"dataset must have square images, got {height} x {width} pixels")
    held_out = dataset.held_out
    if not len(held_out):
        raise ValueError("dataset must hold out images to count errors on, and holds out none")

    where = device_of(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = SmallClassifier(height, channels, len(dataset.classes), config.width, config.layers)
    net.to(where).train()
    # A step costs three forward calls: the backward pass has two, for weights and for inputs.
    work = 3 * work_of((config.batch_size, channels, height, height), [net])
    with torch_threads(work=work if where.type == "cpu" else None):
        _fit(net, dataset.train, config, where, progress)

    judge = judge_of(net, dataset.classes, where)
    confusion = _confusion(held_out.labels, judge.judge(held_out.images)[0], len(dataset.classes))
    files.save_tensors(out / WEIGHTS, net.state_dict(), {"format": "pt"})
    accuracy = float(np.trace(confusion) / confusion.sum())
    description = {"kind": KIND, "held_out_accuracy": accuracy, "confusion": confusion.tolist()}
    files.write_json(out / CONFIG, made_from | description | {"torch": torch.__version__})
    return out


def updates_left(dataset: Dataset, out: Path | str, config: ClassifierConfig) -> int:
    """The number of updates :func:`train_classifier` would do; raises ValueError as it would."""
    out = Path(out)
    if (out / CONFIG).is_file():
        _require_same(out, _made_from(dataset, config))
        if (out / WEIGHTS).is_file():
            return 0
    return config.steps


def seconds_per_update(
    dataset: Dataset, config: ClassifierConfig, device: torch.device | str | None = None
) -> float:
    """Seconds that an update of :func:`train_classifier` takes here, measured on a few updates."""
    where, train = device_of(device), dataset.train
    _, channels, side, _ = dataset.images.shape
    with torch.random.fork_rng(devices=[]):
        net = SmallClassifier(side, channels, len(dataset.classes), config.width, config.layers)
    net.to(where).train()
    few = dataclasses.replace(config, steps=1)
    work = 3 * work_of((config.batch_size, channels, side, side), [net])
    with torch_threads(work=work if where.type == "cpu" else None):
        return seconds_of(lambda: _fit(net, train, few, where, False))


def _made_from(dataset: Dataset, config: ClassifierConfig) -> dict[str, Any]:
    """What a trained classifier depends on: data set, image shape, classes and configuration."""
    return {
        "classes": list(dataset.classes),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.images.shape[1:]),
        "training": dataclasses.asdict(config),
    }


def judge_of(net: SmallClassifier, classes: Sequence[str], device: torch.device) -> Judge:
    """A judge from a network in memory; puts the network on the device, in evaluation mode."""
    net.to(device).eval().requires_grad_(False)
    return Judge(tuple(classes), _own(net), net.image_shape, device)


def _require_same(out: Path, made_from: dict[str, Any]) -> None:
    """Raise a ValueError if the folder holds another classifier than would be trained."""
    found = files.read_json(out / CONFIG)
    for name, wanted in made_from.items():
        has = found.get(name) if isinstance(found, dict) else None
        if has != wanted:
            raise ValueError(
                f"out holds another classifier: {out / CONFIG} has {name} {has!r} and not "
                f"{wanted!r}; remove the folder, or name another one"
            )


def _fit(
    net: SmallClassifier, train: Dataset, config: ClassifierConfig, device: torch.device, bar: bool
) -> None:
    images, labels = train.images.to(device), train.labels.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.01)
    steps = Progress(config.steps, "training the classifier", shown=bar)
    for step in steps.over(range(config.steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, config.steps)
        drawn = torch.from_numpy(_batch(len(images), step, config)).to(device)
        logits = net(_augment(images[drawn], step, config))
        # Soft targets keep the classifier from being certain of images that hardly look like any
        # class.
        loss = functional.cross_entropy(logits, labels[drawn], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 50 == 0:
            steps.set_postfix(loss=f"{loss.item():.3f}")


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine to 0."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _batch(n: int, step: int, config: ClassifierConfig) -> NDArray[np.int64]:
    """Image indices of a step; every epoch visits all images in a new random order."""
    place = step * config.batch_size + np.arange(config.batch_size)
    epochs = place // n
    orders = {
        int(e): np.random.default_rng((config.seed, 0, e)).permutation(n) for e in np.unique(epochs)
    }
    return np.array([orders[int(e)][p] for e, p in zip(epochs, place % n, strict=True)])


def _augment(images: Tensor, step: int, config: ClassifierConfig) -> Tensor:
    """Shift, turn, scale, perhaps mirror, and add noise; the border is filled with black."""
    rng = np.random.default_rng((config.seed, 1, step))
    n = len(images)
    uniform = rng.uniform(-1.0, 1.0, (5, n, 1))
    angle = np.deg2rad(config.turn) * uniform[0]
    scale = 1.0 + config.zoom * uniform[1]
    # grid_sample counts in units of half a side.
    shift = 2.0 * config.shift * uniform[2:4]
    mirror = np.where(config.flips & (uniform[4] > 0.0), -1.0, 1.0)
    across = np.concatenate([mirror * scale * np.cos(angle), -scale * np.sin(angle), shift[0]], 1)
    down = np.concatenate([mirror * scale * np.sin(angle), scale * np.cos(angle), shift[1]], 1)
    noise = rng.uniform(0.0, config.noise, (n, 1, 1, 1)) * rng.standard_normal(images.shape)

    maps = torch.from_numpy(np.stack([across, down], axis=1)).to(images)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    # grid_sample pads with 0, and black is -1.
    moved = functional.grid_sample(images + 1.0, grid, align_corners=False) - 1.0
    return moved + torch.from_numpy(noise).to(images)


def _confusion(truth: Tensor, judged: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Number of images by (true class, judged class), shape (classes, classes)."""
    pairs = truth.cpu().numpy() * classes + judged
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
