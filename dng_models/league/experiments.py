"""Mixtures, what is forbidden in them, and who is what: the experiments of the league."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from dng_math import GaussianMixture

Array = NDArray[np.float64]
Labels = NDArray[np.intp]

LEAK = 0.01  # at which rules are compared where the forbidden is neither rare nor overlapping
FAR = 1e-4  # of a component's own samples are called outside of it
REFERENCE = 20_000  # samples of the target, for what is not known in closed form
CHUNK = 2000
PIXELS = 0.15  # standard deviation of a component of the digits, for pixels in [-1, 1]


@dataclass(frozen=True, eq=False)
class Experiment:
    """A mixture of isotropic components, its classes and which of them is forbidden.

    Attributes
    ----------
    mixture : GaussianMixture
    classes : ndarray of int, shape (K,)
        Class of each component, from 0 on.
    unwanted : int
        The forbidden class.
    pixels : bool
        Whether coordinates are those of an image.
    """

    mixture: GaussianMixture
    classes: Labels
    unwanted: int
    pixels: bool = False

    @property
    def forbidden(self) -> list[int]:
        """The forbidden components."""
        return np.flatnonzero(self.classes == self.unwanted).tolist()

    @property
    def allowed(self) -> list[int]:
        """All others."""
        return np.flatnonzero(self.classes != self.unwanted).tolist()

    @property
    def target(self) -> GaussianMixture:
        """The mixture of what is allowed."""
        return self.mixture.restrict(self.allowed)

    @property
    def share(self) -> float:
        """Of the forbidden in the mixture."""
        return float(self.mixture.weights[self.forbidden].sum())

    @property
    def references(self) -> Array:
        """What a rule may be told of the forbidden: every image, or else the centre; (R, D)."""
        means = self.mixture.means[self.forbidden]
        return means if self.pixels else means.mean(axis=0)[None]

    @property
    def gap(self) -> float:
        """Least distance from there to an allowed component."""
        rows = [self.mixture.means[self.allowed] - each for each in self.references]
        return float(min(np.linalg.norm(apart, axis=1).min() for apart in rows))

    @property
    def moments(self) -> tuple[Array, Array]:
        """Mean (D,) and covariance (D, D) of the target."""
        target = self.target
        mean = target.weights @ target.means
        apart = target.means - mean
        within = float(target.weights @ self._variances(target))
        return mean, (apart.T * target.weights) @ apart + within * np.eye(target.dim)

    @cached_property
    def _of_reference(self) -> tuple[Array, float]:
        x = self.target.sample(REFERENCE, 0)
        parts = [self.posterior(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]
        posterior = np.concatenate(parts)
        leaks = self.leaks(posterior)
        counts = np.bincount(posterior[~leaks].argmax(axis=1), minlength=posterior.shape[1])
        return counts / counts.sum(), float(leaks.mean())

    @property
    def shares(self) -> Array:
        """Of the classes among the target's samples that are called allowed, (classes,)."""
        return self._of_reference[0]

    @property
    def limit(self) -> float:
        """The leak at which rules are compared.

        1 %, or a tenth of the forbidden share where that is less, beyond what the target's own
        samples have where classes overlap.
        """
        return self._of_reference[1] + min(LEAK, self.share / 10)

    @staticmethod
    def _variances(mixture: GaussianMixture) -> Array:
        return np.broadcast_to(np.asarray(mixture.covariances).reshape(-1), mixture.weights.shape)

    def _squares(self, x: Array) -> Array:
        """Squared distances to the components, in their variances, shape (N, K)."""
        means = self.mixture.means
        squares = np.sum(x**2, axis=1)[:, None] + np.sum(means**2, axis=1) - 2.0 * (x @ means.T)
        return np.maximum(squares, 0.0) / self._variances(self.mixture)

    def posterior(self, x: Array) -> Array:
        """p(class | x), shape (N, classes)."""
        logs = np.log(self.mixture.weights) - 0.5 * self._squares(x)
        logs = logs - 0.5 * self.mixture.dim * np.log(self._variances(self.mixture))
        of_class = [
            special.logsumexp(logs[:, self.classes == c], axis=1)
            for c in range(self.classes.max() + 1)
        ]
        return special.softmax(np.stack(of_class, axis=1), axis=1)

    def leaks(self, posterior: Array) -> NDArray[np.bool_]:
        """Whether it is more likely than not that a sample is forbidden, (N,)."""
        leaks: NDArray[np.bool_] = posterior[:, self.unwanted] > 0.5
        return leaks

    def shows(self, x0: Array) -> NDArray[np.bool_]:
        """What a judge says that is right of every finished sample: p(c|x0) > 1/2, (N,)."""
        return self.leaks(self.posterior(x0))

    def outside(self, x: Array) -> NDArray[np.bool_]:
        """Whether x is farther from every component than all but ``FAR`` of its samples."""
        within = self._squares(x).min(axis=1)
        outside: NDArray[np.bool_] = within > stats.chi2.isf(FAR, x.shape[1])
        return outside


def separate(mixture: GaussianMixture, unwanted: int) -> Experiment:
    """Make an experiment in which every component is a class."""
    return Experiment(mixture, np.arange(len(mixture.weights)), unwanted)


def _equal(means: ArrayLike, deviation: float) -> GaussianMixture:
    count = len(np.asarray(means))
    return GaussianMixture(np.full(count, 1 / count), means, [deviation**2] * count)


def _modes(share: float, unwanted: int = 1) -> Experiment:
    """Four modes in one dimension, of which the forbidden one has a share of its own."""
    weights = np.full(4, (1 - share) / 3)
    weights[unwanted] = share
    return separate(GaussianMixture(weights, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4), unwanted)


def _circle(count: int, radius: float, dimensions: int) -> Array:
    """Points on a circle, (count, D); in three dimensions it rises and falls twice."""
    angle = 2 * np.pi * np.arange(count) / count
    points = [radius * np.cos(angle), radius * np.sin(angle), np.cos(2 * angle)]
    return np.stack(points[:dimensions], axis=1)


def _checkerboard() -> Experiment:
    """The black cells of a board of 4 x 4, each of 3 x 3 components; an inner one is forbidden."""
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    spots = 2 / 3 * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    means = np.concatenate([2 * np.array(cell) - 3 + spots for cell in cells])
    return Experiment(_equal(means, 0.25), np.repeat(np.arange(8), 9), cells.index((1, 1)))


def _six() -> Experiment:
    means = 0.5 * np.random.default_rng(1).standard_normal((6, 64))
    return separate(_equal(means, 0.3), 1)


def _overlap() -> Experiment:
    """A ring of eight, of which the forbidden one stands two deviations beside its neighbour."""
    means = _circle(8, 3.0, 2)
    step = means[1] - means[0]
    means[0] = means[1] - 2 * 0.4 * step / np.linalg.norm(step)
    return separate(_equal(means, 0.4), 0)


def _digits(unwanted: Sequence[int]) -> Experiment:
    """Scanned digits of 8 x 8 pixels, a component on each; the unwanted ones are one class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    mixture = GaussianMixture.from_points(data.data / 8.0 - 1.0, PIXELS, data.target)
    rest = [digit for digit in range(10) if digit not in unwanted]
    number = {digit: 0 for digit in unwanted} | {digit: i for i, digit in enumerate(rest, 1)}
    return Experiment(mixture, np.array([number[d] for d in data.target.tolist()]), 0, pixels=True)


EASY: dict[str, Callable[[], Experiment]] = {
    "1D, inner mode": lambda: _modes(0.25),
    "1D, outer mode": lambda: _modes(0.25, 0),
    "2D, ring of 8": lambda: separate(_equal(_circle(8, 3.0, 2), 0.25), 0),
    "2D, checkerboard": _checkerboard,
    "3D, ring of 12": lambda: separate(_equal(_circle(12, 4.0, 3), 0.3), 0),
    "64D, six": _six,
}
HARD: dict[str, Callable[[], Experiment]] = {
    "1D, 1 % forbidden": lambda: _modes(0.01),
    "1D, 50 % forbidden": lambda: _modes(0.5),
    "1D, 90 % forbidden": lambda: _modes(0.9),
    "2D, overlap": _overlap,
    "64D, digit 0": lambda: _digits([0]),
    "64D, digits 0, 1, 8": lambda: _digits([0, 1, 8]),
}


@cache
def experiment(name: str) -> Experiment:
    """Make the experiment of a name in ``EASY`` or ``HARD``; the digits need scikit-learn."""
    return (EASY | HARD)[name]()
