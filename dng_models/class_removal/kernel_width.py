"""The width of the kernels on training images that stand for a network of the forbidden class."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import pdist, squareform
from scipy.special import logsumexp
from torch import Tensor


def likeliest_bandwidth(images: Tensor) -> float:
    """The standard deviation of the kernels under which each image is likeliest beside the others.

    It maximises ``sum_k log sum_{j != k} N(z_k; z_j, h^2)``, the likelihood of every image under
    the kernels on all the others; images that are there twice count once.

    Parameters
    ----------
    images : Tensor, shape (K, ...)
        At least two different ones.

    Returns
    -------
    float
        h > 0, in units of the images.

    Raises
    ------
    ValueError
        If there are fewer than two different images.
    """
    points = np.unique(images.flatten(1).double().numpy(), axis=0)
    if len(points) < 2:
        raise ValueError(
            "bandwidth must be given where there are fewer than two different training images of "
            f"a forgotten class, whose distances would tell it; got {len(points)}"
        )
    dimensions = points.shape[1]
    squares = squareform(pdist(points, "sqeuclidean"))
    np.fill_diagonal(squares, math.inf)

    def loss(log_h: float) -> float:
        log_terms = -0.5 * squares * math.exp(-2.0 * log_h)
        return float(dimensions * log_h - np.mean(logsumexp(log_terms, axis=1)))

    # With one image near each other one, h^2 would be its squared distance over the dimensions.
    nearest = squares.min(axis=1)
    ends = 0.5 * np.log([nearest.min() / dimensions / 4.0, 4.0 * squares[squares < math.inf].max()])
    found = minimize_scalar(loss, bounds=tuple(ends), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
