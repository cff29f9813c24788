"""How a diffusion network is trained, with defaults for each kind of data."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from dng_math import checks
from dng_models.class_removal.config import TrainingPrecision
from dng_models.class_removal.data import Dataset
from dng_models.class_removal.networks import Size
from dng_models.support.options import between, check, integer, option, settings

Kind = Literal["base", "class", "conditional"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCHEDULE_STEPS = 1000


@settings
class TrainConfig:
    """The hyperparameters of a training, which with the data determine the network."""

    steps: int = option(4000, "updates of the weights", check=integer(1))
    batch_size: int = option(64, "images an update, over all processes", check=integer(1))
    learning_rate: float = option(
        5e-3,
        "largest learning rate of Adam, which rises from 0 and falls to 0 as a cosine",
        check=checks.positive,
    )
    warmup_steps: int = option(100, "updates in which the learning rate rises", check=integer(0))
    ema_decay: float = option(
        0.995,
        "decay of the average of the weights, which is the result; less in the first updates",
        check=between(0.0, 1.0, "[)"),
    )
    grad_clip: float = option(1.0, "largest norm of the gradient", check=checks.positive)
    label_dropout: float = option(
        0.1,
        "share of images whose label a conditional network is not told",
        check=between(0.0, 1.0, "[]"),
    )
    flip: bool = option(False, "mirror images at random; for photographs, not for digits")
    size: Size | None = option(
        None,
        "size of the networks: for a laptop, or for a GPU",
        shown="small up to 28 pixels",
    )
    mixed_precision: TrainingPrecision = option(
        "no", "precision of the networks; bf16 where the processor has instructions for it"
    )
    seed: int = option(0, "seed of the first weights and of every batch", check=integer(0))
    checkpoint_every: int = option(500, "updates between states on the disk", check=integer(1))
    log_every: int = option(50, "updates between lines of loss.jsonl", check=integer(1))
    grid_every: int = option(
        0, "updates between grids of samples; 0 draws one at the end", check=integer(0)
    )
    keep_state: bool = option(False, "keep the state of a finished training")

    def __post_init__(self) -> None:
        check(self)

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that the finished network depends on, by their names."""
        reports = ("checkpoint_every", "log_every", "grid_every", "keep_state")
        return {name: value for name, value in asdict(self).items() if name not in reports}


_DIGITS = TrainConfig()
_MNIST = TrainConfig(steps=3000, learning_rate=2e-3, checkpoint_every=250)
_CIFAR = TrainConfig(
    steps=60_000,
    batch_size=128,
    learning_rate=2e-4,
    warmup_steps=1000,
    ema_decay=0.9995,
    flip=True,
    checkpoint_every=2000,
    log_every=100,
)


def default_config(dataset: Dataset, kind: Kind) -> TrainConfig:
    """Return the default configuration for the size of a data set's images.

    Parameters
    ----------
    dataset : Dataset
        Images of up to 8 pixels (digits), up to 28 (MNIST) or more (CIFAR-10).
    kind : {"base", "class", "conditional"}
        A network of all classes, of one, or one that takes labels.

    Raises
    ------
    ValueError
        If ``kind`` is another.
    """
    checks.choice("kind", kind, KINDS)
    if dataset.image_size <= 8:
        steps = {"base": 4000, "class": 2200, "conditional": 5000}
        return replace(_DIGITS, steps=steps[kind])
    if dataset.image_size <= 28:
        steps = {"base": 3000, "class": 1200, "conditional": 3500}
        return replace(_MNIST, steps=steps[kind])
    steps = {"base": 60_000, "class": 20_000, "conditional": 80_000}
    return replace(_CIFAR, steps=steps[kind])
