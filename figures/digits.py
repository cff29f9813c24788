"""Scikit-learn's digits as an exact diffusion model, and a classifier that judges its samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from dng_math import GaussianMixture

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

SIDE = 8
CLASSES = 10
BANDWIDTH = 0.15  # of pixels in [-1, 1]; sample images keep this much noise
COPIES = 4


def load() -> tuple[Array, Integers]:
    """1,797 images of 8 x 8 pixels in [-1, 1], shape (1797, 64), and their digits."""
    digits = load_digits()
    return digits.data / 8.0 - 1.0, digits.target


def memorised() -> GaussianMixture:
    """The exact diffusion model of the digits: one component on each image."""
    images, digit = load()
    return GaussianMixture.from_points(images, BANDWIDTH, digit)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A support vector machine that saw one half of the digits, and was tested on the other.

    Samples of the model carry the noise of its bandwidth, so both halves do too.
    """

    machine: SVC
    held_out: int
    accuracy: float
    false_alarms: float
    misses: float

    def __call__(self, images: Array) -> Integers:
        return np.asarray(self.machine.predict(images), dtype=np.int64)


def classifier(forbidden: int, seed: int) -> Classifier:
    """Train and test; false alarms and misses are those of the forbidden digit."""
    rng = np.random.default_rng(seed)
    images, digit = load()
    train, test = train_test_split(
        np.arange(len(digit)), test_size=0.5, stratify=digit, random_state=seed
    )

    def noised(half: Integers) -> tuple[Array, Integers]:
        half = np.tile(half, COPIES)
        return images[half] + BANDWIDTH * rng.standard_normal((len(half), SIDE**2)), digit[half]

    machine = SVC(C=10.0, gamma=0.02).fit(*noised(train))
    shown, truth = noised(test)
    judged = machine.predict(shown)
    is_forbidden = truth == forbidden
    return Classifier(
        machine=machine,
        held_out=len(test),
        accuracy=float(np.mean(judged == truth)),
        false_alarms=float(np.mean(judged[~is_forbidden] == forbidden)),
        misses=float(np.mean(judged[is_forbidden] != forbidden)),
    )
