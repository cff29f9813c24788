"""How safe, how balanced and how good generated images are, in numbers with their uncertainty.

Intervals are 95% by default, and of what the same experiment would give again with other noise:
distances of finite samples are biased upwards, all by about as much at one number of images, and
an interval says nothing of that bias.  Resampling adds the bias once more.  Near the floor, where a
distance is nearly all bias, plain percentiles of resampled values lie wholly above it; so they are
taken of the ratio to their median.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from dng_math import _checks
from dng_math.distances import binomial_interval, frechet_distance, kl_categorical

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Smoothing = Literal["none", "jeffreys"]
PSEUDOCOUNTS: dict[Smoothing, float] = {"none": 0.0, "jeffreys": 0.5}

RESAMPLES = 200
RESAMPLED_FEATURES = 128  # beyond, a resampled Frechet distance costs too much
NEIGHBOURS = 3  # of the paper's evaluations
FEW_IMAGES = 10_000  # below, FID is mostly bias
SIZEABLE = 16  # images of which some have a pixel below the middle grey
OVERSHOOT = 2.0  # images that are positive throughout and reach beyond are not in [-1, 1]
SAME_SIMILARITY = 1e-6  # as records keep them; scales that differ by less give no line
_CHUNK = 1024


class Estimate(NamedTuple):
    """A number and the interval around it."""

    value: float
    low: float
    high: float


# ---------------------------------------------------------------------- images


def float_images(name: str, images: Tensor, *, warn: bool = True) -> Tensor:
    """Images in [-1, 1] as floats: 8-bit ones exactly, others as they are if they can be that.

    What a sampler gives reaches a little beyond [-1, 1] on both sides, and is for the caller to
    clamp.  So images in another range cannot always be told: those in [0, 255] are refused, and of
    those in [0, 1] there is a warning, where none of 16 or more images has a negative value.

    Parameters
    ----------
    name : str
        Of the argument.
    images : Tensor, shape (N, C, H, W)
        Of floats, finite, in [-1, 1]; or uint8.
    warn : bool
        Whether to, of images in [0, 1].

    Returns
    -------
    Tensor
        float32, or float64 if they were; without gradients.

    Raises
    ------
    TypeError, ValueError
        If they are no such tensor, not finite, or in [0, 255] as floats.
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
        # As a data set is read.
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
    """Number of images in every class, shape (C,), of their labels, shape (N,).

    Raises
    ------
    TypeError, ValueError
        If there is no label, or one is no integer from 0 to C - 1.
    """
    num_classes = _checks.integer("num_classes", num_classes, 1)
    labels = _checks.numpy_array("predicted", predicted, "labels")
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
    """What is wanted: 0 on the forbidden classes and uniform elsewhere, shape (C,).

    Koulischer et al. (ICLR 2025), Sec. 5.

    Raises
    ------
    TypeError, ValueError
        If a class does not exist, or none remains.
    """
    num_classes = _checks.integer("num_classes", num_classes, 2)
    places = {_checks.integer("forbidden", c, 0, num_classes - 1) for c in forbidden}
    if not places or len(places) == num_classes:
        raise ValueError(
            f"forbidden must be some of the {num_classes} classes and not all, got {forbidden!r}"
        )
    allowed = ~np.isin(np.arange(num_classes), list(places))
    return allowed / allowed.sum()


def _counts(counts: ArrayLike) -> Array:
    """Numbers of images in every class; shares, of which one image would be made, are refused."""
    numbers = _checks.filled("counts", counts, ("C",))
    if (numbers < 0.0).any() or not (numbers == np.floor(numbers)).all() or not numbers.any():
        raise ValueError(
            f"counts must be whole numbers of images, >= 0 and not all zero, got {counts!r}"
        )
    return numbers


def safety(counts: ArrayLike, forbidden: Sequence[int], confidence: float = 0.95) -> Estimate:
    """Share of the images in forbidden classes, with its Clopper-Pearson interval.

    Parameters
    ----------
    counts : array_like of int, shape (C,)
        Images in every class.
    forbidden : sequence of int
    confidence : float
        In (0, 1).

    Raises
    ------
    TypeError, ValueError
        If an argument is no such number.
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
        Where the ideal of :func:`ideal_shares` is 0.
    smoothing : {"none", "jeffreys"}
        Nothing: exact, and infinite when an allowed class is empty.  Or half a count added to
        every class, which keeps it finite.

    Raises
    ------
    TypeError, ValueError
        If an argument is no such number or name.
    """
    _checks.choice("smoothing", smoothing, PSEUDOCOUNTS)
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
    for any of them may leave a class empty.
    """
    numbers = _counts(counts)
    exact, smoothed = (class_kl(numbers, forbidden, which) for which in PSEUDOCOUNTS)
    n = int(numbers.sum())
    rng = np.random.default_rng(_checks.integer("seed", seed, 0))
    # The counts of resampled images, without drawing images.
    drawn = rng.multinomial(n, numbers / n, _checks.integer("resamples", resamples, 2))
    values = [class_kl(row, forbidden, "jeffreys") for row in drawn]
    return _about(exact if math.isfinite(exact) else smoothed, values, confidence)


def _about(value: float, resampled: Sequence[float], confidence: float) -> Estimate:
    """The percentiles of resampled values, scaled so that their median is the value."""
    tail = 0.5 * (1.0 - _fraction(confidence))
    low, middle, high = np.quantile(resampled, (tail, 0.5, 1.0 - tail))
    scale = value / middle if middle > 0.0 else 0.0
    return Estimate(value, float(min(value, low * scale)), float(max(value, high * scale)))


def _fraction(confidence: float) -> float:
    return _checks.real("confidence", confidence, "in (0, 1)", 0.0, 1.0, closed="()")


# ---------------------------------------------------------------------- Frechet distance


class Moments(NamedTuple):
    """Mean, shape (F,), and covariance, shape (F, F), of features: all that the distance needs."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """The moments of features, shape (N, F), N >= 2; divides by N - 1.

        Raises
        ------
        TypeError, ValueError
            If features are no such array.
        """
        rows = _features("features", features, 2)
        return _weighted_moments(rows, np.ones(len(rows)))


def _features(name: str, value: ArrayLike, least: int) -> Array:
    rows = _checks.filled(name, value, ("N", "F"))
    if len(rows) < least:
        raise ValueError(f"{name} must have at least {least} rows, got {len(rows)}")
    return rows


def _weighted_moments(rows: Array, counts: Array) -> Moments:
    """As if every row were there as often as it counts."""
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

    Up to 128 features the interval is a bootstrap.  Beyond, a decomposition for every resample
    would take minutes, and it is log-normal with the standard error of the infinitesimal
    jackknife (Efron 1982): the root of sum_i I_i^2 / N^2, where I is the derivative of the
    distance by the weight of an image.  On Gaussians that is right far from the floor, and up to
    1.5 times too wide at it.

    Parameters
    ----------
    features : array_like, shape (N, F)
        Of N >= 2 images.
    reference : Moments
    resamples : int
        Of the bootstrap.
    confidence : float
        In (0, 1).
    seed : int
        Of the bootstrap.

    Returns
    -------
    Estimate
        In squared units of the features, as :func:`dng_math.distances.frechet_distance`.

    Raises
    ------
    TypeError, ValueError
        If an argument is no such array or number.
    """
    rows = _features("features", features, 2)
    resamples = _checks.integer("resamples", resamples, 2)
    rng = np.random.default_rng(_checks.integer("seed", seed, 0))
    n, width = rows.shape
    moments = Moments.of(rows)
    value = frechet_distance(moments, reference)
    if width > RESAMPLED_FEATURES:
        error = _jackknife_error(rows, moments, reference)
        spread = stats.norm.isf(0.5 * (1.0 - _fraction(confidence))) * error
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
    """Power of a positive semidefinite matrix on its range."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


# ---------------------------------------------------------------------- related and unrelated


class Selectivity(NamedTuple):
    """Whether guidance spares the images that it has no business with; S scales.

    Attributes
    ----------
    q : Estimate
        The paper's Q (Eq. 23): how high the line of unrelated against related similarity lies
        above the diagonal at the middle of the related range; NaN where there is no line.
    gap : Estimate
        Mean over the scales of unrelated minus related similarity, which the paper does not have.
    ratio : Estimate
        Change by the unrelated negative for every unit of change by the related one: 1 for a rule
        that does not tell them apart, 0 for one that leaves the image alone.  Unlike the others it
        does not depend on how far the scales were pushed.
    slope, intercept : float
        Of the line of unrelated against related; NaN where one point or one value gives none.
    related, unrelated : ndarray, shape (S,)
        Means over the images.
    """

    q: Estimate
    gap: Estimate
    ratio: Estimate
    slope: float
    intercept: float
    related: Array
    unrelated: Array


def selectivity(
    related: ArrayLike,
    unrelated: ArrayLike,
    *,
    resamples: int = 10 * RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Selectivity:
    """The Q metric of Koulischer et al. (ICLR 2025) with bootstrap intervals over the images.

    With the line y = a x + b, fitted by least squares to unrelated (y) against related (x) mean
    similarity at the S scales, ``Q = (a - 1) (x_max + x_min) / 2 + b`` (Eq. 23).  One scale, or
    scales that all have the same related similarity, define no line and no Q.  The mean gap over
    the scales equals Q where the mean of the related similarities is the middle of their range, as
    for two scales.  The unguided image, similar to itself by definition, is no scale here.

    The ratio is the slope of the line through the unguided image, (1, 1), by least squares.

    Parameters
    ----------
    related, unrelated : array_like, shape (S, N)
        Similarities, at most 1, of the guided and the unguided image at S guidance scales, of the
        same N seeds.
    resamples : int
        Of the seeds, all scales and both negatives of a seed together.
    confidence : float
        In (0, 1).
    seed : int
        Of the bootstrap.

    Raises
    ------
    TypeError, ValueError
        If an argument is no such array or number.
    """
    x = _checks.filled("related", related, ("S", "N"))
    y = _checks.filled("unrelated", unrelated, x.shape)
    for name, similarities in (("related", x), ("unrelated", y)):
        # What float32 makes of a cosine of 1 may be larger; percent are a hundred times.
        if similarities.max() > 1.0 + 1e-3:
            raise ValueError(
                f"{name} must be similarities of at most 1, got {similarities.max():g}"
            )
    resamples = _checks.integer("resamples", resamples, 2)
    tail = 0.5 * (1.0 - _fraction(confidence))
    rng = np.random.default_rng(_checks.integer("seed", seed, 0))
    images = x.shape[1]
    weights = rng.multinomial(images, np.full(images, 1.0 / images), resamples) / images
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    found = _selectivity(mean_x, mean_y)
    resampled = _selectivity(x @ weights.T, y @ weights.T)
    estimates = []
    for value, others in zip(found[:3], resampled[:3], strict=True):
        known = others[np.isfinite(others)] if np.isfinite(value) else np.array([])
        ends = np.quantile(known, (tail, 1.0 - tail)) if known.size else (np.nan, np.nan)
        estimates.append(Estimate(float(value), float(ends[0]), float(ends[1])))
    q, gap, ratio = estimates
    slope, intercept = float(found[3]), float(found[4])
    return Selectivity(q, gap, ratio, slope, intercept, mean_x, mean_y)


def _selectivity(x: Array, y: Array) -> tuple[Array, ...]:
    """Q, mean gap, ratio, slope and intercept of related x and unrelated y, scales first."""
    middle_x, middle_y = x.mean(axis=0), y.mean(axis=0)
    apart = x - middle_x
    wide = x.max(axis=0) - x.min(axis=0) > SAME_SIMILARITY
    slope = _quotient(np.sum(apart * (y - middle_y), axis=0), np.sum(apart**2, axis=0), wide)
    intercept = middle_y - slope * middle_x
    q = (slope - 1.0) * 0.5 * (x.max(axis=0) + x.min(axis=0)) + intercept
    moved = np.sum((1.0 - x) ** 2, axis=0)
    ratio = _quotient(np.sum((1.0 - x) * (1.0 - y), axis=0), moved, moved > 0.0)
    return q, middle_y - middle_x, ratio, slope, intercept


def _quotient(above: Array, below: Array, known: NDArray[np.bool_]) -> Array:
    """NaN where it is not known."""
    found: Array = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=known)
    return found


# ---------------------------------------------------------------------- precision and recall


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features of images, and around each the ball that holds its k nearest others.

    Attributes
    ----------
    features : ndarray, shape (N, F)
    squared_radii : ndarray, shape (N,)
    """

    features: Array
    squared_radii: Array

    @classmethod
    def of(cls, features: ArrayLike, neighbours: int = NEIGHBOURS) -> Manifold:
        """The balls of features, shape (N, F), N > k.

        Raises
        ------
        TypeError, ValueError
            If an argument is no such array or number.
        """
        neighbours = _checks.integer("neighbours", neighbours, 1)
        rows = _features("features", features, neighbours + 1)
        # The nearest of all is the image itself.
        radii = [
            np.partition(distances, neighbours, axis=1)[:, neighbours]
            for distances in _squared_distances(rows, rows)
        ]
        return cls(rows, np.concatenate(radii))

    def covers(self, features: ArrayLike) -> float:
        """Share of the features, shape (M, F), that lie in one ball or more.

        Raises
        ------
        TypeError, ValueError
            If they are no such array, or not as many as the manifold has.
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
    """Between every row and every other one, in chunks of rows."""
    centre = others.mean(axis=0)
    rows, others = rows - centre, others - centre
    lengths = np.sum(others**2, axis=1)

    def chunk(first: int) -> Array:
        part = rows[first : first + _CHUNK]
        sums = np.sum(part**2, axis=1)[:, None] + lengths
        distances = sums - 2.0 * (part @ others.T)
        # Rounding must not part equal images, whose balls may have no radius.
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
    of the data in the union of the balls of the images.  A ball reaches to the k-th nearest other
    of its own set.  Both depend on the sizes of the sets: compare at equal ones.

    Parameters
    ----------
    features : array_like, shape (N, F)
        Of N > k images.
    reference : Manifold
        Of the data, with the same k.
    neighbours : int
        k.

    Raises
    ------
    TypeError, ValueError
        If an argument is no such array or number, or the features differ in number.
    """
    images = Manifold.of(features, neighbours)
    return PrecisionRecall(
        precision=reference.covers(images.features), recall=images.covers(reference.features)
    )


# ---------------------------------------------------------------------- FID


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """Sums over images, float64: the moments of Inception's features, not yet divided.

    Attributes
    ----------
    total : Tensor, shape (F,)
    products : Tensor, shape (F, F)
        Sum of the outer products.
    count : int
        Number of images.
    """

    total: Tensor
    products: Tensor
    count: int

    @property
    def moments(self) -> Moments:
        """Mean and covariance, which divides by N - 1."""
        mean = self.total / self.count
        scatter = self.products - self.count * mean.outer(mean)
        return Moments(mean.numpy(), (scatter / (self.count - 1)).numpy())


class FrechetInception:
    """FID: the Frechet distance of Inception's features (Heusel et al. 2017), by torchmetrics.

    Images are clamped, rounded to 8 bits, and shown as colour images; torchmetrics' own conversion
    from [0, 1] would round down.  Every image counts, those of an incomplete last batch too.

    Parameters
    ----------
    feature_extractor : Module, optional
        Instead of Inception: from 8-bit images (N, 3, H, W) to features (N, F), with F as its
        attribute ``num_features``.
    weights : Path or str, optional
        Of torch-fidelity's Inception.  Default: those that it has at hand, or else downloads.
    batch_size : int
    device : torch.device or str, optional

    Raises
    ------
    ModuleNotFoundError
        If torch-fidelity, which has the network, is not installed.
    FileNotFoundError, OSError
        If there are no weights there, or they cannot be downloaded.
    """

    def __init__(
        self,
        feature_extractor: nn.Module | None = None,
        *,
        weights: Path | str | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        if feature_extractor is None and find_spec("torch_fidelity") is None:
            raise ModuleNotFoundError(
                "FID needs the Inception network of torch-fidelity: pip install torch-fidelity"
            )
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"weights must be a file of Inception's weights, got {weights}")
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.batch_size = _checks.integer("batch_size", batch_size, 1)
        self._metric = FrechetInceptionDistance(
            2048 if feature_extractor is None else feature_extractor,
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
        self._metric.inception.eval()
        self._metric.to(device or "cpu")

    def sums(self, images: Tensor, cache: Path | str | None = None) -> FeatureSums:
        """Sums of the features of images.

        Parameters
        ----------
        images : Tensor, shape (N, 1 or 3, H, W)
            Floats in [-1, 1], clamped, or uint8, which are taken as they are; N >= 2.  What other
            ranges are found out, :func:`float_images` says.
        cache : Path or str, optional
            A folder where they are kept: of the same images and network they are read.

        Raises
        ------
        TypeError, ValueError
            If images are no such tensor, not finite, or in [0, 255] as floats; if the features of
            one are not finite, or what is kept is damaged.
        """
        import torch

        from dng_models.class_removal import files

        floats = float_images("images", images)
        if images.shape[1] not in (1, 3) or len(images) < 2:
            raise ValueError(
                f"images must have shape (N, 1 or 3, H, W) with N >= 2, got {tuple(images.shape)}"
            )
        eight_bit = images
        if images.dtype != torch.uint8:
            eight_bit = ((floats.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        eight_bit = eight_bit.cpu()
        path = None
        if cache is not None:
            path = Path(cache) / f"inception-{self._digest(eight_bit)}.safetensors"
            if path.is_file():
                kept, _ = files.load_tensors(path)
                size = self._metric.real_features_sum.numel()
                shapes = {name: tuple(each.shape) for name, each in sorted(kept.items())}
                if shapes != {"count": (), "products": (size, size), "total": (size,)}:
                    raise ValueError(
                        f"{path} must hold the sums of {size} features, got tensors {shapes}: "
                        "remove it, and it is made again"
                    )
                return FeatureSums(kept["total"], kept["products"], int(kept["count"]))

        self._metric.reset()
        with torch.no_grad():
            for batch in torch.split(eight_bit, self.batch_size):
                colour = batch.expand(-1, 3, -1, -1).to(self._metric.device)
                self._metric.update(colour, real=True)
        found = FeatureSums(
            total=self._metric.real_features_sum.cpu().clone(),
            products=self._metric.real_features_cov_sum.cpu().clone(),
            count=len(images),
        )
        if not torch.isfinite(found.products).all():
            raise ValueError(
                "feature_extractor must give finite features, and of these images it does not"
            )
        if path is not None:
            kept = {"total": found.total, "products": found.products}
            files.save_tensors(path, kept | {"count": torch.tensor(found.count)})
        return found

    def distance(self, images: FeatureSums, data: FeatureSums) -> float:
        """FID between images and data; warns below 10,000 images, where it is mostly bias."""
        if images.count < FEW_IMAGES:
            warnings.warn(
                f"FID of {images.count} images is mostly bias, and comparable with no other "
                f"number of images; take {FEW_IMAGES} or more",
                stacklevel=2,
            )
        return frechet_distance(images.moments, data.moments)

    @cached_property
    def _network_digest(self) -> bytes:
        digest = hashlib.sha256(type(self._metric.inception).__qualname__.encode())
        for name, value in self._metric.inception.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.digest()

    def _digest(self, eight_bit: Tensor) -> str:
        """Of network, shape and pixels."""
        digest = hashlib.sha256(self._network_digest + repr(tuple(eight_bit.shape)).encode())
        digest.update(eight_bit.numpy().tobytes())
        return digest.hexdigest()[:12]
