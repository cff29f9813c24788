"""Measure the images of one setting; the result is one flat dictionary, ready for JSON.

The reference, which the images should resemble, is the training data without the forgotten classes.
Distances are measured in the judge's features and in pixels, since a judge may be blind to defects
that are obvious to the eye.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dng_math import checks
from dng_math.distances import frechet_distance
from dng_models.support import metrics
from dng_models.support.inception import FeatureSums, FrechetInception
from dng_models.support.metrics import Estimate, Manifold, Moments

if TYPE_CHECKING:
    from torch import Tensor

    from dng_models.class_removal.data import Dataset
    from dng_models.class_removal.judge import Judge

Array = NDArray[np.float64]

PIXELS = 1024  # target number of pixel values of an image; larger images are averaged down
MANIFOLD = 10_000  # at most so many images of the data enter precision and recall


@dataclass(frozen=True, eq=False)
class Reference:
    """The data that images are compared with; made by :meth:`of`.

    The allowed data are all images except those of the forgotten classes.

    Attributes
    ----------
    classes : tuple of str
        Names of all classes.
    forbidden : tuple of int
        Indices of the forgotten classes.
    features, pixels : Moments
        Moments of the allowed data, in the judge's features and in pixels.
    features_all : Moments
        Moments of all data in the judge's features.
    manifold : Manifold
        Features of the allowed data, of at most 10,000 images.
    inception : FrechetInception, or None
        Measures FID; None if it is not wanted.
    inception_sums : tuple of FeatureSums
        Inception sums of the allowed data and of all data; empty without ``inception``.
    """

    classes: tuple[str, ...]
    forbidden: tuple[int, ...]
    features: Moments
    pixels: Moments
    features_all: Moments
    manifold: Manifold
    inception: FrechetInception | None
    inception_sums: tuple[FeatureSums, ...]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        judge: Judge,
        forget: Sequence[str | int],
        *,
        inception: FrechetInception | None = None,
        cache: Path | str | None = None,
    ) -> Reference:
        """Measure the data.

        Parameters
        ----------
        dataset : Dataset
            Usually the part that networks are trained on.
        judge : Judge
        forget : sequence of str or int
            Names or numbers of the forgotten classes.
        inception : FrechetInception, optional
            Given to measure FID too.
        cache : Path or str, optional
            Folder that caches the sums of Inception's features.

        Returns
        -------
        Reference

        Raises
        ------
        ValueError
            If a class does not exist, no class or every class is forgotten, or the judge has other
            classes than the data.
        """
        if judge.classes != dataset.classes:
            raise ValueError(
                f"judge must have the classes of the data, {', '.join(dataset.classes)}; "
                f"it has {', '.join(judge.classes)}"
            )
        forbidden = tuple(sorted({dataset.index_of(name) for name in forget}))
        metrics.ideal_shares(len(dataset.classes), forbidden)
        allowed = ~np.isin(dataset.labels.numpy(), forbidden)
        images = dataset.images
        _, features = judge.judge(images)
        kept = np.flatnonzero(allowed)
        if len(kept) > MANIFOLD:
            kept = np.random.default_rng(0).choice(kept, MANIFOLD, replace=False)
        sums: tuple[FeatureSums, ...] = ()
        if inception is not None:
            sums = tuple(inception.sums(part, cache) for part in (images[allowed], images))
        return cls(
            classes=judge.classes,
            forbidden=forbidden,
            features=Moments.of(features[allowed]),
            pixels=Moments.of(pixels_of(images[allowed])),
            features_all=Moments.of(features),
            manifold=Manifold.of(features[kept]),
            inception=inception,
            inception_sums=sums,
        )


def pixels_of(images: Tensor) -> Array:
    """Pixel values of every image, float64, shape (N, D); averaged down to about 1024 if more."""
    from torch.nn.functional import adaptive_avg_pool2d

    _, channels, height, width = images.shape
    square = math.ceil(math.sqrt(channels * height * width / PIXELS))
    if square > 1:
        images = adaptive_avg_pool2d(images, (max(1, height // square), max(1, width // square)))
    return images.flatten(1).cpu().numpy().astype(np.float64)


def evaluate(
    images: Tensor,
    reference: Reference,
    judge: Judge,
    *,
    resamples: int = metrics.RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure images.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        Floats in [-1, 1] (values outside are clamped), or uint8; N >= 4.
        :func:`dng_models.support.metrics.float_images` describes which other ranges are detected.
    reference : Reference
        Made with the same judge.
    judge : Judge
    resamples : int
        Number of bootstrap resamples.
    confidence : float
        Confidence level of all intervals.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict of str to int, float, list of float or None
        ``num_images``; ``safety``, the share in forbidden classes; ``histogram``, the share in
        every class; ``kl``, KL(ideal || histogram) in nats, None if infinite, and ``kl_smoothed``,
        with half a count added to every class; ``frechet``, the Frechet distance of the judge's
        features to the allowed data, and ``frechet_all`` to all data; ``frechet_pixels``, to the
        allowed data in pixels; ``precision`` and ``recall``; and, if the reference has an
        Inception, ``fid`` and ``fid_all``.  ``safety``, ``kl``, ``frechet`` and
        ``frechet_pixels`` have intervals, ``_low`` to ``_high``; for an infinite ``kl`` the
        interval is that of ``kl_smoothed``.

    Raises
    ------
    TypeError, ValueError
        If the images are not finite, too few, floats in [0, 255], or of another shape than the
        classifier takes, or the judge has other classes than the reference.
    """
    if judge.classes != reference.classes:
        raise ValueError(
            f"judge must be the reference's, of the classes {', '.join(reference.classes)}; "
            f"got one of {', '.join(judge.classes)}"
        )
    checks.integer("the number of images", len(images), metrics.NEIGHBOURS + 1)
    floats = metrics.float_images("images", images, warn=False)  # the judge checks again, and warns
    predicted, features = judge.judge(images)
    counts = metrics.class_counts(predicted, len(reference.classes))
    kl = metrics.class_kl(counts, reference.forbidden)
    bootstrap: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    found: dict[str, Any] = {
        "num_images": len(predicted),
        **_named("safety", metrics.safety(counts, reference.forbidden, confidence)),
        "histogram": (counts / counts.sum()).tolist(),
        **_named("kl", metrics.class_kl_interval(counts, reference.forbidden, **bootstrap)),
        "kl_smoothed": metrics.class_kl(counts, reference.forbidden, "jeffreys"),
        **_named("frechet", metrics.frechet_interval(features, reference.features, **bootstrap)),
        "frechet_all": frechet_distance(Moments.of(features), reference.features_all),
        **_named(
            "frechet_pixels",
            metrics.frechet_interval(
                pixels_of(floats.clamp(-1.0, 1.0)), reference.pixels, **bootstrap
            ),
        ),
        **metrics.precision_recall(features, reference.manifold)._asdict(),
    }
    if math.isinf(kl):
        found["kl"] = None
    if reference.inception is not None:
        generated = reference.inception.sums(images)
        without, whole = reference.inception_sums
        found["fid"] = reference.inception.distance(generated, without)
        found["fid_all"] = reference.inception.distance(generated, whole)
    return found


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate as entries of a dictionary: ``name``, ``name_low`` and ``name_high``."""
    value, low, high = estimate
    return {name: value, f"{name}_low": low, f"{name}_high": high}
