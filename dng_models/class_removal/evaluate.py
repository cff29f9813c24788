"""What is measured of the images of one setting: one flat dictionary, ready for JSON.

The reference is the data that networks are trained on, without the forgotten classes: what the
images should look like.  Distances are measured in the judge's features and in pixels, since a
judge may be blind to what an eye sees at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dng_math import _checks
from dng_math.distances import frechet_distance
from dng_models import metrics
from dng_models.metrics import Estimate, FeatureSums, FrechetInception, Manifold, Moments

if TYPE_CHECKING:
    from torch import Tensor

    from dng_models.class_removal.classifier import Judge
    from dng_models.class_removal.data import Dataset

Array = NDArray[np.float64]

PIXELS = 1024  # numbers of an image that are compared
MANIFOLD = 10_000  # images of the data that precision and recall look at


@dataclass(frozen=True, eq=False)
class Reference:
    """What images are compared with; made by :meth:`of`.

    Attributes
    ----------
    classes : tuple of str
    forbidden : tuple of int
        Indices of the forgotten classes.
    features, pixels : Moments
        Of the data without them.
    features_all : Moments
        Of all data.
    manifold : Manifold
        Of the features of the data without them, at most 10,000 images.
    inception : FrechetInception, or None
        How FID is measured, if it is.
    inception_sums : tuple of FeatureSums
        Of the data without them, and of all; empty without ``inception``.
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
            To measure FID too.
        cache : Path or str, optional
            A folder where the sums of Inception's features are kept.

        Raises
        ------
        ValueError
            If a class does not exist, none is forgotten or none remains, or the judge knows others.
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
    """Pixels of every image, shape (N, D); averaged over squares where they are more than 1024."""
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
        Floats in [-1, 1], clamped, or uint8; N >= 4.  What other ranges are found out,
        :func:`dng_models.metrics.float_images` says.
    reference : Reference
        Made with the same judge.
    judge : Judge
    resamples : int
        Of the bootstrap.
    confidence : float
        Of all intervals.
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict of str to int, float, list of float or None
        ``num_images``; ``safety``, the share in forbidden classes; ``histogram``, the share in
        every class; ``kl``, the divergence of that from the ideal, None if it is infinite, and
        ``kl_smoothed`` with half a count added to every class; ``frechet``, the Frechet distance
        of the judge's features to the allowed data, and ``frechet_all`` to all of it;
        ``frechet_pixels``; ``precision`` and ``recall``; with an Inception, ``fid`` and
        ``fid_all``.  ``safety``, ``kl``, ``frechet`` and ``frechet_pixels`` have intervals,
        ``_low`` to ``_high``; that of an infinite ``kl`` is of ``kl_smoothed``.

    Raises
    ------
    TypeError, ValueError
        If images are not finite, too few, in [0, 255] as floats, or of another shape than the
        classifier's.
    """
    if judge.classes != reference.classes:
        raise ValueError(
            f"judge must be the reference's, of the classes {', '.join(reference.classes)}; "
            f"got one of {', '.join(judge.classes)}"
        )
    _checks.integer("the number of images", len(images), metrics.NEIGHBOURS + 1)
    floats = metrics.float_images("images", images, warn=False)  # the judge looks again
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
    """Under the name, and the interval's ends under ``_low`` and ``_high``."""
    value, low, high = estimate
    return {name: value, f"{name}_low": low, f"{name}_high": high}
