"""How a pipeline is trained on a laboratory's world."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dng_math import checks
from dng_models.support.options import between, check, integer, option, settings


@settings
class LaboratoryTraining:
    """The hyperparameters of a training, which determine the pipeline."""

    steps: int = option(9_000, "updates of the UNet's weights", check=integer(1))
    batch_size: int = option(96, "captions an update with pictures of the world", check=integer(1))
    chains: int = option(
        40, "captions an update with pictures that the network is drawing", check=integer(0)
    )
    learning_rate: float = option(1.2e-3, "largest learning rate", check=checks.positive)
    warmup_steps: int = option(100, "updates in which it rises", check=integer(0))
    decay_from: float = option(
        0.25,
        "share of its updates after which it falls, linearly to a hundredth",
        check=between(0.0, 1.0, "[)"),
    )
    ema_decay: float = option(
        0.998,
        "decay of the average of the weights, which is the result; less in the first updates",
        check=between(0.0, 1.0, "[)"),
    )
    grad_clip: float = option(1.0, "largest norm of the gradient", check=checks.positive)
    channels: int = option(160, "width of the UNet, a multiple of 8", check=integer(8))
    mismatched: float = option(
        0.3,
        "share of noisy pictures of the scene alone, where the caption names objects too",
        check=between(0.0, 1.0, "[]"),
    )
    difference_weight: float = option(
        0.1, "weight w of the loss on differences of predictions", check=checks.non_negative
    )
    difference_floor: float = option(
        0.02, "floor b of these differences, in latents", check=checks.positive
    )
    relevant: float = option(
        0.05,
        "posterior r of the caption below which a difference counts less",
        check=between(0.0, 1.0, "(]"),
    )
    text_width: int = option(96, "size of a token's embedding", check=integer(4))
    text_layers: int = option(2, "layers of the text encoder", check=integer(1))
    text_steps: int = option(600, "updates of the text encoder", check=integer(1))
    text_batch_size: int = option(128, "captions in each of these", check=integer(1))
    text_learning_rate: float = option(
        3e-3, "largest learning rate of the text encoder", check=checks.positive
    )
    seed: int = option(0, "seed of the first weights and of every batch", check=integer(0, 2**31))
    checkpoint_every: int = option(250, "updates between states on the disk", check=integer(1))
    log_every: int = option(50, "updates between lines of loss.jsonl", check=integer(1))

    def __post_init__(self) -> None:
        check(self)

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that the finished pipeline depends on, by their names."""
        reports = ("checkpoint_every", "log_every")
        return {name: value for name, value in asdict(self).items() if name not in reports}


# Shows in seconds that everything works; the networks learn nothing to speak of.
QUICK = LaboratoryTraining(
    steps=6,
    batch_size=12,
    chains=4,
    channels=16,
    text_width=16,
    text_layers=1,
    text_steps=4,
    text_batch_size=8,
    checkpoint_every=2,
    log_every=2,
)
