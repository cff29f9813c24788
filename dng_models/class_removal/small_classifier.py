"""The small classifier that is trained here, and the names of its files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
KIND = "dng_models.SmallClassifier"
FEATURES = 64
SMALLEST_SIDE = 4  # stages are added until the side is at most this


class SmallClassifier(nn.Module):
    """Convolutions, in stages that halve the side, then two linear layers.

    Parameters
    ----------
    image_size, channels : int
        Side in pixels and number of channels of the images.
    num_classes : int
    width : int
        Channels of the first stage; the second has twice as many, the others three times.
    layers : int
        Convolutions in every stage except the first, which has one.
    """

    def __init__(
        self, image_size: int, channels: int, num_classes: int, width: int = 24, layers: int = 1
    ) -> None:
        super().__init__()
        self.image_shape = (channels, image_size, image_size)
        side, stage, entering = image_size, 1, width
        body: list[nn.Module] = _convolution(channels, width, stride=1)
        while side > SMALLEST_SIDE:
            stage += 1
            leaving = width * min(stage, 3)
            body += _convolution(entering, leaving, stride=2)
            for _ in range(layers - 1):
                body += _convolution(leaving, leaving, stride=1)
            entering = leaving
            side = math.ceil(side / 2)
        self.body = nn.Sequential(
            *body, nn.Flatten(), nn.Linear(entering * side**2, FEATURES), nn.SiLU()
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Input of the last linear layer, (N, 64), for images (N, C, H, W) in [-1, 1]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (N, num_classes), for images (N, C, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(entering: int, leaving: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(entering, leaving, 3, stride=stride, padding=1)
    return [convolution, nn.GroupNorm(8, leaving), nn.SiLU()]


def device_of(device: torch.device | str | None) -> torch.device:
    """The given device; for None the GPU, or the CPU if there is no GPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
