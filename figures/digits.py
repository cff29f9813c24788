"""Scikit-learn's digits as an exact diffusion model, and measures of how well one is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from dng_math import GaussianMixture
from dng_math.distances import frechet_distance, kl_categorical

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

SIDE = 8
CLASSES = 10
BANDWIDTH = 0.15  # standard deviation of a component, for pixels in [-1, 1]; samples keep it
COPIES = 4
PSEUDOCOUNT = 0.5  # an empty class would make the divergence infinite


def load() -> tuple[Array, Integers]:
    """Load 1,797 images of 8 x 8 pixels in [-1, 1], shape (1797, 64), and their digits."""
    digits = load_digits()
    return digits.data / 8.0 - 1.0, digits.target


def memorised() -> GaussianMixture:
    """The exact diffusion model of the digits: a mixture with one component on each image."""
    images, digit = load()
    return GaussianMixture.from_points(images, BANDWIDTH, digit)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A support vector machine, trained on one half of the digits and tested on the other.

    Samples of the model have the noise of its bandwidth, so it is added to both halves too.
    """

    machine: SVC
    held_out: int
    accuracy: float
    false_alarms: float
    misses: float

    def __call__(self, images: Array) -> Integers:
        return np.asarray(self.machine.predict(images), dtype=np.int64)


def classifier(forbidden: int, seed: int) -> Classifier:
    """Train and test a classifier; false alarms and misses are those of the forbidden digit."""
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


@dataclass(frozen=True)
class Forgetting:
    """The task of forgetting one digit: the model, the target, and distances from the target.

    KL(ideal || histogram) is the paper's, with an ideal that is uniform over the nine remembered
    digits (their shares of the data differ from that by a KL of 1e-4).  The Frechet distance is of
    pixels, from the exact mean and covariance of the remembered mixture, so that the reference has
    no sampling error.
    """

    digit: int
    seed: int  # of the classifier's training

    @cached_property
    def mixture(self) -> GaussianMixture:
        return memorised()

    @cached_property
    def forbidden(self) -> NDArray[np.intp]:
        """Components on images of the digit."""
        return self.mixture.components(self.digit)

    @cached_property
    def remembered(self) -> GaussianMixture:
        """The mixture without the forbidden components."""
        rest = np.setdiff1d(np.arange(self.mixture.n_components), self.forbidden)
        return self.mixture.restrict(rest)

    @cached_property
    def classifier(self) -> Classifier:
        return classifier(self.digit, self.seed)

    @cached_property
    def moments(self) -> tuple[Array, Array]:
        """Mean and covariance of the pixels of the remembered mixture, exactly."""
        points = self.remembered.means
        covariance = np.cov(points.T, ddof=0) + BANDWIDTH**2 * np.eye(SIDE**2)
        return points.mean(axis=0), covariance

    @property
    def ideal(self) -> Array:
        """Ideal class shares, shape (10,)."""
        return np.where(np.arange(CLASSES) == self.digit, 0.0, 1.0 / (CLASSES - 1))

    def kl(self, judged: Integers) -> float:
        """KL(ideal || histogram of the classifier's answers), in nats."""
        counts = np.bincount(judged, minlength=CLASSES)
        return kl_categorical(self.ideal, counts, PSEUDOCOUNT)

    def frechet(self, images: Array) -> float:
        return frechet_distance(images, self.moments)

    def perfect(self, n: int, share: float, rng: np.random.Generator) -> Array:
        """Images (n, 64) drawn from the model directly; a given share of them is the digit."""
        of_digit = round(share * n)
        parts = [self.remembered.sample(n - of_digit, rng)]
        if of_digit:
            parts.append(self.mixture.restrict(self.forbidden).sample(of_digit, rng))
        return np.concatenate(parts)
