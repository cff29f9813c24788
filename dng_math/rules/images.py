"""Rules whose negatives are points, images or latents: SPELL, and DNG away from images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import REFERENCES, Array, Predictions, Reference, _Memoryless


@dataclass(frozen=True, eq=False)
class SPELL(_Memoryless):
    """SPELL (arXiv 2410.06025): predictions of x0 are pushed out of balls around given points.

    ``D + g sum_k max(r/|D - z_k| - 1, 0) (D - z_k)`` for the base's x0 D.  With one point and
    g = 1 a D within r of it ends at the distance r (docs/theory.md, section 5.12).  No negative
    prediction is read, and there is no memory.

    Parameters
    ----------
    points : array_like, shape (K, D)
        What the predictions keep away from: images, latents.
    radius : float
        r > 0, in units of x0; the paper's 38.7 is for latents of Stable Diffusion.
    guidance_scale : float
        g, finite.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    points: Array
    radius: float
    guidance_scale: float = 1.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points(self.points))
        checks.positive("radius", self.radius)
        checks.finite("guidance_scale", self.guidance_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`; the scale is that of all points together."""
        assert predictions.x0 is not None
        shift, total = np.zeros_like(predictions.base), np.zeros(len(predictions.base))
        for point in self.points:
            difference = predictions.x0 - point
            distance = np.sqrt(np.sum(difference * difference, axis=-1))
            share = np.maximum(equations.shield(self.radius, np.maximum(distance, 1e-150)), 0.0)
            share = self.guidance_scale * share
            shift = equations.toward(shift, difference, share[:, None])
            total = total + share
        guided = predictions.base + shift * predictions.from_x0
        rows = len(predictions.negative)
        return guided, np.broadcast_to(total, (rows, len(total))), None


@dataclass(frozen=True, eq=False)
class ImageReferenced(_Memoryless):
    """DNG whose negatives are given as points, images or latents (theory of arXiv 2502.08011).

    Their kernel mixture is the unwanted: its prediction of x0 is the negative one, and the
    posterior is ``prior`` times its density over that of the base (docs/theory.md, section 5.13).
    Points that are components of the mixture, with its bandwidth and their weight as prior, give
    exact DNG.  No negative prediction is read, and there is no memory.

    Parameters
    ----------
    points : array_like, shape (K, D)
        The unwanted.
    prior : float
        Their share of the data, in (0, 1).
    guidance_scale : float
        g, finite.
    bandwidth : float
        Standard deviation of the kernel on each point, >= 0.
    p_max : float
        Cap of the posterior, in (0, 1), which may pass 1 if the points are not in the data.
    reference : {"positive", "unconditional"}
        What the negative is measured from, and its posterior relative to, where there is
        classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    points: Array
    prior: float
    guidance_scale: float = 1.0
    bandwidth: float = 0.0
    p_max: float = 0.99
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points(self.points))
        checks.real("prior", self.prior, "in (0, 1)", 0.0, 1.0, closed="()")
        checks.finite("guidance_scale", self.guidance_scale)
        checks.non_negative("bandwidth", self.bandwidth)
        checks.real("p_max", self.p_max, "in (0, 1)", 0.0, 1.0, closed="()")
        checks.choice("reference", self.reference, REFERENCES)

    def kernel_mixture(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        """Prediction of x0 (N, D) and log density (N,) of the points' diffused mixture at x."""
        variance = (alpha * self.bandwidth) ** 2 + sigma * sigma
        squares = np.array([np.sum((x - alpha * z) ** 2, axis=-1) for z in self.points])
        log_terms = -0.5 * (squares / variance + x.shape[-1] * np.log(2.0 * np.pi * variance))
        log_terms -= np.log(len(self.points))
        log_density = np.logaddexp.reduce(log_terms, axis=0)
        centre = np.exp(log_terms - log_density).T @ self.points
        gain = alpha * self.bandwidth**2 / variance
        return centre + gain * (x - alpha * centre), log_density

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.pointwise is not None
        negative, log_ratio = predictions.pointwise
        p = np.exp(np.minimum(np.log(self.prior) + log_ratio, np.log(self.p_max)))
        scale = equations.dynamic_scale(self.guidance_scale, p, 1.0 - p)
        difference = negative - predictions.measured_from
        guided = equations.away(predictions.base, difference, scale[:, None])
        return guided, np.broadcast_to(scale, (len(predictions.negative), len(scale))), None


def _points(value: object) -> Array:
    """Checked points (K, D), at least one; read-only."""
    points = checks.array("points", value, ("K", "D"))  # type: ignore[arg-type]
    if points.size == 0:
        raise ValueError(f"points must not be empty, got shape {points.shape}")
    return checks.frozen(points)
