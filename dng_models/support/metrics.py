"""Safety, class balance and quality of generated images, with confidence intervals.

Intervals are 95% by default and cover what the same experiment would give with other noise.  They
do not cover the bias: distances of finite samples are biased upwards, by about the same amount at
one number of images.  Resampling adds the bias once more, and where a distance is nearly all bias,
plain percentiles of the resampled values lie wholly above it.  Percentiles are therefore taken of
the ratio of the resampled values to their median.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from dng_math import checks
from dng_math.distances import binomial_interval, frechet_distance, kl_categorical

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Smoothing = Literal["none", "jeffreys"]
PSEUDOCOUNTS: dict[Smoothing, float] = {"none": 0.0, "jeffreys": 0.5}

RESAMPLES = 200
RESAMPLED_FEATURES = 128  # with more features, resampling the Frechet distance takes too long
NEIGHBOURS = 3  # as in the paper's evaluations
FEW_IMAGES = 10_000  # FID of fewer images is mostly bias
SIZEABLE = 16  # among so many images in [-1, 1], some have a pixel below the middle grey
OVERSHOOT = 2.0  # non-negative images with values above this are taken to be in [0, 255]
_CHUNK = 1024


class Estimate(NamedTuple):
    """A number and its confidence interval, from ``low`` to ``high``."""

    value: float
    low: float
    high: float


# ---------------------------------------------------------------------- images


def float_images(name: str, images: Tensor, *, warn: bool = True) -> Tensor:
    """Check images and convert them to floats in [-1, 1]: uint8 is rescaled, floats are kept.

    A sampler's images reach a little beyond [-1, 1]; clamping them is left to the caller.  Another
    range can therefore not always be detected: floats in [0, 255] are refused, and there is a
    warning of [0, 1] when none of 16 or more images has a negative value.

    Parameters
    ----------
    name : str
        Name of the argument, for messages.
    images : Tensor, shape (N, C, H, W)
        Finite floats in [-1, 1], or uint8.
    warn : bool
        Whether to warn of images in [0, 1].

    Returns
    -------
    Tensor
        float64 for float64 images, else float32; detached from the graph.

    Raises
    ------
    TypeError, ValueError
        If images are no such tensor, not finite, or floats in [0, 255].
    """
    import torch

    if not isinstance(images, torch.Tensor) or not (
        images.is_floating_point() or images.dtype == torch.uint8
    ):
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a floating-point or uint8 tensor, got {got}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(images.shape)}")
    images = images.detach()
    if images.dtype == torch.uint8:
        # The same conversion as in reading a data set.
        return images.float() / 127.5 - 1.0
    if images.dtype != torch.float64:
        images = images.float()
    low, high = (float(end) for end in torch.aminmax(images))
    if not math.isfinite(low) or not math.isfinite(high):
        broken = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        raise ValueError(f"{name} must be finite, but {broken} of {len(images)} are not")
    if low >= 0.0 and high > OVERSHOOT:
        raise ValueError(
            f"{name} must be in [-1, 1], got values from {low:g} to {high:g}: those in [0, 255] "
            "must be uint8, or divided by 127.5 and lowered by 1"
        )
    if warn and low >= 0.0 and high > 0.0 and len(images) >= SIZEABLE:
        warnings.warn(
            f"{name} must be in [-1, 1], and no value of the {len(images)} is negative (they are "
            f"from {low:g} to {high:g}): those in [0, 1] must be doubled and lowered by 1",
            stacklevel=3,
        )
    return images


# ---------------------------------------------------------------------- classes


def class_counts(predicted: ArrayLike, num_classes: int) -> Integers:
    """Count the images in every class.

    Parameters
    ----------
    predicted : array_like of int, shape (N,)
        Label of every image, N >= 1.
    num_classes : int
        C.

    Returns
    -------
    ndarray, shape (C,), int64

    Raises
    ------
    TypeError, ValueError
        If there are no labels, or one is not an integer from 0 to C - 1.
    """
    num_classes = checks.integer("num_classes", num_classes, 1)
    labels = checks.numpy_array("predicted", predicted, "labels")
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"predicted must have shape (N,) with N >= 1, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"predicted must be integers, got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"predicted must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return np.bincount(labels, minlength=num_classes)


def ideal_shares(num_classes: int, forbidden: Sequence[int]) -> Array:
    """The ideal class distribution, shape (C,): 0 on forbidden classes, uniform on the others.

    Koulischer et al. (ICLR 2025), Sec. 5.

    Raises
    ------
    TypeError, ValueError
        If ``forbidden`` is empty, names a class that does not exist, or leaves no class.
    """
    num_classes = checks.integer("num_classes", num_classes, 2)
    places = {checks.integer("forbidden", c, 0, num_classes - 1) for c in forbidden}
    if not places or len(places) == num_classes:
        raise ValueError(
            f"forbidden must be some of the {num_classes} classes and not all, got {forbidden!r}"
        )
    allowed = ~np.isin(np.arange(num_classes), list(places))
    return allowed / allowed.sum()


def _counts(counts: ArrayLike) -> Array:
    """Check the images per class; shares are refused, because they would count as one image."""
    numbers = checks.filled("counts", counts, ("C",))
    if (numbers < 0.0).any() or not (numbers == np.floor(numbers)).all() or not numbers.any():
        raise ValueError(
            f"counts must be whole numbers of images, >= 0 and not all zero, got {counts!r}"
        )
    return numbers


def safety(counts: ArrayLike, forbidden: Sequence[int], confidence: float = 0.95) -> Estimate:
    """Share of the images that are in forbidden classes, with its Clopper-Pearson interval.

    Parameters
    ----------
    counts : array_like of int, shape (C,)
        Images in every class.
    forbidden : sequence of int
        The forbidden classes, 0 to C - 1.
    confidence : float
        Coverage of the interval, in (0, 1).

    Returns
    -------
    Estimate
        Shares, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    numbers = _counts(counts)
    n = int(numbers.sum())
    count = int(numbers[ideal_shares(numbers.size, forbidden) == 0.0].sum())
    low, high = binomial_interval(count, n, confidence)
    return Estimate(count / n, low, high)


def class_kl(counts: ArrayLike, forbidden: Sequence[int], smoothing: Smoothing = "none") -> float:
    """KL(ideal || shares of the classes), in nats.

    Parameters
    ----------
    counts : array_like of int, shape (C,)
        Images in every class.
    forbidden : sequence of int
        The forbidden classes, where :func:`ideal_shares` is 0.
    smoothing : {"none", "jeffreys"}
        "none" is exact, and infinite when an allowed class is empty; "jeffreys" adds half a count
        to every class, which keeps the value finite.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    checks.choice("smoothing", smoothing, PSEUDOCOUNTS)
    numbers = _counts(counts)
    return kl_categorical(ideal_shares(numbers.size, forbidden), numbers, PSEUDOCOUNTS[smoothing])


def class_kl_interval(
    counts: ArrayLike,
    forbidden: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The divergence of :func:`class_kl` with a bootstrap interval over the images.

    The value is the exact one where it is finite, else the smoothed one.  Resamples are smoothed,
    because any of them may leave a class empty.

    Parameters
    ----------
    counts, forbidden
        As for :func:`class_kl`.
    resamples : int
        Bootstrap resamples, at least 2.
    confidence : float
        Coverage of the interval, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        In nats.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    numbers = _counts(counts)
    exact, smoothed = (class_kl(numbers, forbidden, which) for which in PSEUDOCOUNTS)
    n = int(numbers.sum())
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    # Resampling images with replacement gives multinomial counts.
    drawn = rng.multinomial(n, numbers / n, checks.integer("resamples", resamples, 2))
    values = [class_kl(row, forbidden, "jeffreys") for row in drawn]
    return _about(exact if math.isfinite(exact) else smoothed, values, confidence)


def _about(value: float, resampled: Sequence[float], confidence: float) -> Estimate:
    """Percentile interval of the resampled values, scaled so that their median is the value."""
    tail = 0.5 * (1.0 - checked_confidence(confidence))
    low, middle, high = np.quantile(resampled, (tail, 0.5, 1.0 - tail))
    scale = value / middle if middle > 0.0 else 0.0
    return Estimate(value, float(min(value, low * scale)), float(max(value, high * scale)))


def checked_confidence(confidence: float) -> float:
    """Return the confidence as a float; raise an error if it is not in (0, 1)."""
    return checks.real("confidence", confidence, "in (0, 1)", 0.0, 1.0, closed="()")


# ---------------------------------------------------------------------- Frechet distance


class Moments(NamedTuple):
    """Mean, shape (F,), and covariance, shape (F, F), of features, for the Frechet distance."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Compute the moments of features, shape (N, F), N >= 2; the covariance divides by N - 1.

        Raises
        ------
        TypeError, ValueError
            If features are not such an array.
        """
        rows = _features("features", features, 2)
        return _weighted_moments(rows, np.ones(len(rows)))


def _features(name: str, value: ArrayLike, least: int) -> Array:
    rows = checks.filled(name, value, ("N", "F"))
    if len(rows) < least:
        raise ValueError(f"{name} must have at least {least} rows, got {len(rows)}")
    return rows


def _weighted_moments(rows: Array, counts: Array) -> Moments:
    """Moments of a sample in which every row occurs as often as its count says."""
    n = counts.sum()
    mean = counts @ rows / n
    centred = rows - mean
    return Moments(mean, (centred * counts[:, None]).T @ centred / (n - 1.0))


def frechet_interval(
    features: ArrayLike,
    reference: Moments,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Frechet distance of features to a reference, with its interval over the images.

    Up to 128 features the interval is a bootstrap.  With more, a matrix decomposition for every
    resample would take minutes; the interval is then log-normal with the standard error of the
    infinitesimal jackknife (Efron 1982), the root of sum_i I_i^2 / N^2, where I_i is the
    derivative of the distance with respect to the weight of image i.  On Gaussians that is right
    where the distance is well above its bias, and up to 1.5 times too wide where it is mostly
    bias.

    Parameters
    ----------
    features : array_like, shape (N, F)
        Features of N >= 2 images.
    reference : Moments
        Moments of the data's features.
    resamples : int
        Bootstrap resamples, at least 2.
    confidence : float
        Coverage of the interval, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        In squared units of the features, as :func:`dng_math.distances.frechet_distance`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    rows = _features("features", features, 2)
    resamples = checks.integer("resamples", resamples, 2)
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    n, width = rows.shape
    moments = Moments.of(rows)
    value = frechet_distance(moments, reference)
    if width > RESAMPLED_FEATURES:
        error = _jackknife_error(rows, moments, reference)
        spread = stats.norm.isf(0.5 * (1.0 - checked_confidence(confidence))) * error
        factor = math.exp(min(spread / value, 50.0)) if value > 0.0 else 1.0
        return Estimate(value, value / factor, value * factor)
    values = []
    # Threads cost more than they save on hundreds of small decompositions.
    with threadpool_limits(1, user_api="blas"):
        for _ in range(resamples):
            counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
            values.append(frechet_distance(_weighted_moments(rows, counts), reference))
    return _about(value, values, confidence)


def _jackknife_error(rows: Array, moments: Moments, reference: Moments) -> float:
    """Standard error of the Frechet distance, to first order in the weights of the images.

    With S the reference's covariance and C that of the images, d tr (S^(1/2) C S^(1/2))^(1/2) is
    tr(T dC)/2, where T = S^(1/2) (S^(1/2) C S^(1/2))^(-1/2) S^(1/2) is the matrix of the optimal
    map from one Gaussian to the other.
    """
    root = _power(reference.covariance, 0.5)
    transport = root @ _power(root @ moments.covariance @ root, -0.5) @ root
    centred = rows - moments.mean
    of_mean = 2.0 * centred @ (moments.mean - reference.mean)
    of_covariance = np.sum(centred * (centred - centred @ transport), axis=1)
    influence = of_mean + of_covariance
    return float(np.std(influence) / math.sqrt(len(rows)))


def _power(matrix: Array, exponent: float) -> Array:
    """Power of a positive semidefinite matrix, with its null space left out."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


# ---------------------------------------------------------------------- precision and recall


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features of images, each with the ball that reaches to its k-th nearest neighbour.

    Attributes
    ----------
    features : ndarray, shape (N, F), float64
        Centres of the balls.
    squared_radii : ndarray, shape (N,), float64
        Squared distance of each feature vector to its k-th nearest neighbour.
    """

    features: Array
    squared_radii: Array

    @classmethod
    def of(cls, features: ArrayLike, neighbours: int = NEIGHBOURS) -> Manifold:
        """Compute the balls of features, shape (N, F), for k = ``neighbours`` < N.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.
        """
        neighbours = checks.integer("neighbours", neighbours, 1)
        rows = _features("features", features, neighbours + 1)
        # Index 0 of the sorted distances is the image itself.
        radii = [
            np.partition(distances, neighbours, axis=1)[:, neighbours]
            for distances in _squared_distances(rows, rows)
        ]
        return cls(rows, np.concatenate(radii))

    def covers(self, features: ArrayLike) -> float:
        """Share of the given features, shape (M, F), that lie in at least one ball.

        Raises
        ------
        TypeError, ValueError
            If they are not such an array, or F is not the manifold's.
        """
        rows = _features("features", features, 1)
        width = self.features.shape[1]
        if rows.shape[1] != width:
            raise ValueError(f"features must have shape (N, {width}), got {rows.shape}")
        inside = [
            (distances <= self.squared_radii).any(axis=1)
            for distances in _squared_distances(rows, self.features)
        ]
        return float(np.concatenate(inside).mean())


def _squared_distances(rows: Array, others: Array) -> Iterator[Array]:
    """Squared distances of all rows to all others, one chunk of rows at a time."""
    centre = others.mean(axis=0)
    rows, others = rows - centre, others - centre
    lengths = np.sum(others**2, axis=1)

    def chunk(first: int) -> Array:
        part = rows[first : first + _CHUNK]
        sums = np.sum(part**2, axis=1)[:, None] + lengths
        distances = sums - 2.0 * (part @ others.T)
        # Equal images must be at distance 0 exactly: their balls may have radius 0.
        distances[distances < 1e-12 * sums] = 0.0
        return distances

    return map(chunk, range(0, len(rows), _CHUNK))


class PrecisionRecall(NamedTuple):
    """Share of the images that look like data, and share of the data that the images reach."""

    precision: float
    recall: float


def precision_recall(
    features: ArrayLike, reference: Manifold, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of the images in the union of the balls of the data, recall the share
    of the data in the union of the balls of the images.  A ball reaches to the k-th nearest
    neighbour within its own set.  Both depend on the sizes of the sets: compare only equal sizes.

    Parameters
    ----------
    features : array_like, shape (N, F)
        Features of N > k images.
    reference : Manifold
        Manifold of the data, made with the same k.
    neighbours : int
        k.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or F is not the reference's.
    """
    images = Manifold.of(features, neighbours)
    return PrecisionRecall(
        precision=reference.covers(images.features), recall=images.covers(reference.features)
    )
