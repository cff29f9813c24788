"""The numbers that trackers are calibrated with: what they see along chains of a known class.

The chains are noised images in reverse, so they follow the true process, however good or bad the
networks are.  Those of the path tracker keep the noise of an image: x_t = alpha x0 + sigma eps with
one eps at all levels.  Every point is then one of the noising process, and the way between two of
them is as smooth as that of a deterministic sampler, for which the tracker is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import noise_keys, standard_normal
from dng_math import checks, equations
from dng_math.schedules import DDPM, NoiseSchedule, PredictionType, StepCoefficients, x0_of
from dng_math.trackers import PathWay, path_way
from dng_models.pairs.denoisers import Denoiser, Predictor, device_of, evaluating
from dng_models.pairs.divergence import predictions_and_traces
from dng_models.pairs.sampling import timesteps
from dng_models.support.progress import Progress

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _OfPaths:
    """What all evidence has: whose paths they are, and the S steps; N paths.

    Attributes
    ----------
    forbidden : ndarray, shape (N,), bool
        Whether the image of each path is of the forbidden class.
    image : ndarray, shape (N,), int64
        Index of the image of each path.
    coefficients : StepCoefficients
        Coefficients of the S steps.
    """

    forbidden: NDArray[np.bool_]
    image: NDArray[np.int64]
    coefficients: StepCoefficients

    def of(self, paths: NDArray[np.bool_]) -> Self:
        """The evidence of the paths that a mask of shape (N,) selects."""
        chosen: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            if isinstance(values, np.ndarray):
                chosen[field.name] = values[..., paths]
        return replace(self, **chosen)


@dataclass(frozen=True, eq=False)
class Evidence(_OfPaths):
    """What the networks predict along reversed noising paths of images; S steps, N paths.

    Attributes
    ----------
    forbidden, image, coefficients
        Whose paths they are, shape (N,), and the S steps.
    gap_sq, residual_gap : ndarray, shape (S, N)
        |mu_c - mu|^2 and (x_s - mu) . (mu_c - mu) of every step, noisiest first.
    """

    gap_sq: Array
    residual_gap: Array

    def gain(self) -> Array:
        """Log likelihood ratio of each path, summed up to each time, in nats, shape (S + 1, N)."""
        variance = self.coefficients.tracker_variance()[:, None]
        ratio = np.divide(
            2.0 * self.residual_gap - self.gap_sq,
            2.0 * variance,
            out=np.zeros_like(self.gap_sq),
            where=variance > 0,
        )
        return np.concatenate([np.zeros((1, ratio.shape[1])), np.cumsum(ratio, axis=0)])


@dataclass(frozen=True, eq=False)
class PathEvidence(_OfPaths):
    """What the networks predict at the points of smooth noising paths; S points, N paths.

    Attributes
    ----------
    forbidden, image, coefficients
        Whose paths they are, shape (N,), and the S levels, noisiest first.
    pull, pull_before : ndarray, shape (S, N)
        Gradients of log p(x | c)/p(x) along the way to every point, there and at the point before;
        0 at the first.
    rate : ndarray, shape (S, N)
        tau dL/dtau at every point, of the estimated divergences.
    spread : ndarray, shape (S, N)
        What the odds of c times it add to the rate, so that its error is less
        (:func:`dng_models.pairs.divergence.quieter`).
    """

    pull: Array
    pull_before: Array
    rate: Array
    spread: Array

    def ways(self) -> list[PathWay]:
        """The way to every point; that to the first is the start of the path tracker."""
        c = self.coefficients
        levels = list(zip(c.alpha_t.tolist(), c.sigma_t.tolist(), strict=True))
        start = PathWay(0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
        return [start, *(path_way(*one, *other) for one, other in pairwise(levels))]

    def gain(self) -> Array:
        """log p(x | c)/p(x) of each path at each point, in nats; the last row again at time 0."""
        weights = np.array([(way.weight_before, way.weight) for way in self.ways()])
        rate_before = np.concatenate([self.rate[:1], self.rate[:-1]])
        ends = self.pull_before + self.pull
        ends = ends - weights[:, :1] * rate_before - weights[:, 1:] * self.rate
        total = np.cumsum(0.5 * ends, axis=0)
        return np.concatenate([total, total[-1:]])


def collect(
    base: Denoiser,
    unwanted: Denoiser,
    images: Tensor,
    forbidden: NDArray[np.bool_],
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 100,
    paths: int = 4,
    prediction_type: PredictionType = "epsilon",
    clip: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> Evidence:
    """Run the networks along reversed noising paths.

    Parameters
    ----------
    base, unwanted : callable
        As for :func:`dng_models.pairs.sampling.sample`.
    images : Tensor, shape (N, ...)
        Held-out images in [-1, 1].
    forbidden : ndarray, shape (N,), bool
        Which of them are of the forbidden class.
    schedule, steps, prediction_type, clip, seed, batch_size, device, autocast, progress
        As for :func:`dng_models.pairs.sampling.sample`.
    paths : int
        Number of noising paths per image.

    Returns
    -------
    Evidence
        With N * paths paths.

    Raises
    ------
    TypeError, ValueError
        If ``forbidden`` is not one value per image, or is true of no image or of all, or ``paths``
        is not a positive integer.
    """
    schedule = NoiseSchedule.linear() if schedule is None else schedule
    forbidden, source = _sources(images, forbidden, paths)
    device = device_of(base) if device is None else torch.device(device)
    c = schedule.respace(steps).coefficients(DDPM())
    times = timesteps(schedule, steps)
    predict = Predictor([base, unwanted], device, autocast=autocast)
    gap_sq, residual_gap = (np.zeros((len(c), len(source))) for _ in range(2))
    batches = range(0, len(source), batch_size)
    with (
        torch.no_grad(),
        evaluating([base, unwanted]),
        Progress(len(batches) * steps, progress, shown=progress is not None) as bar,
    ):
        for first in batches:
            rows = slice(first, first + batch_size)
            x = images[torch.from_numpy(source[rows])].to(device, torch.float32)
            for step, (now, following) in enumerate(_reversed_path(c, x, seed, first)):
                if c.transition_var[step] > 0:
                    mean, mean_neg = (
                        _mean(c, step, now, eps, prediction_type, clip)
                        for eps in predict(now, times[step])
                    )
                    gap = (mean_neg - mean).flatten(1)
                    residual = (following.double() - mean).flatten(1)
                    gap_sq[step, rows] = (gap * gap).sum(1).cpu().numpy()
                    residual_gap[step, rows] = (residual * gap).sum(1).cpu().numpy()
                bar.update()
    return Evidence(forbidden[source], source, c, gap_sq, residual_gap)


def collect_along_paths(
    base: Denoiser,
    unwanted: Denoiser,
    images: Tensor,
    forbidden: NDArray[np.bool_],
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 100,
    paths: int = 4,
    probes: int = 1,
    prediction_type: PredictionType = "epsilon",
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: str | None = None,
) -> PathEvidence:
    """Evaluate the networks and their divergences along smooth noising paths, for a path tracker.

    Parameters
    ----------
    base, unwanted, images, forbidden, paths
        As for :func:`collect`.
    schedule, steps, prediction_type, seed, batch_size, device, progress
        As for :func:`dng_models.pairs.sampling.sample`.
    probes : int
        Random directions of every divergence, each a forward derivative of the networks.

    Returns
    -------
    PathEvidence
        With N * paths paths.

    Raises
    ------
    TypeError, ValueError
        As for :func:`collect`, or if a network has no forward derivative.
    """
    schedule = NoiseSchedule.linear() if schedule is None else schedule
    forbidden, source = _sources(images, forbidden, paths)
    checks.integer("probes", probes, 1)
    device = device_of(base) if device is None else torch.device(device)
    c = schedule.respace(steps).coefficients(DDPM())
    times = timesteps(schedule, steps)
    predict = Predictor([base, unwanted], device)
    found = {name: np.zeros((len(c), len(source))) for name in _STATISTICS}
    batches = range(0, len(source), batch_size)
    with (
        torch.no_grad(),
        evaluating([base, unwanted]),
        Progress(len(batches) * steps, progress, shown=progress is not None) as bar,
    ):
        for first in batches:
            rows = slice(first, first + batch_size)
            clean = images[torch.from_numpy(source[rows])].to(device, torch.float32)
            keys = noise_keys(
                (seed + _SIGNS) % 2**64, len(clean), first_sample=first, device=device
            )
            eps = standard_normal(seed, clean.shape, first_sample=first, device=device)
            previous: _Point | None = None
            for step, t in enumerate(times):
                alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
                x = alpha * clean + sigma * eps
                predictions, traces, spreads = predictions_and_traces(
                    partial(predict, t=t),
                    x,
                    keys,
                    step,
                    probes,
                    networks=predict.denoisers,
                    check=step == 0,
                )
                at = _Point.of(x, predictions, alpha, sigma, prediction_type)
                # Of v . (J v) and (v . d)^2, with J and d of the prediction, in units of the noise.
                gap = (traces[1] - traces[0]).double() * at.to_noise
                spread = spreads[1].double() * at.to_noise**2
                told = {
                    "rate": equations.path_rate(at.product(), -sigma * gap),
                    "spread": 0.5 * spread,
                }
                if previous is not None:
                    told |= at.pulls(previous)
                for name, values in told.items():
                    found[name][step, rows] = values.cpu().numpy()
                previous = at
                bar.update()
    return PathEvidence(forbidden[source], source, c, **found)


_STATISTICS = ("pull", "pull_before", "rate", "spread")
_SIGNS = 0x2545F4914F6CDD1D  # added to a seed, so that the signs are not those of the noise


@dataclass(frozen=True, eq=False)
class _Point:
    """A point of a path in float64: x, the base's noise, and c's noise and x0 less the base's."""

    x: Tensor
    eps: Tensor
    apart: Tensor
    apart_x0: Tensor
    alpha: float
    sigma: float
    to_noise: float  # the noise is this times the prediction, and a multiple of x

    @classmethod
    def of(
        cls, x: Tensor, predictions: list[Tensor], alpha: float, sigma: float, kind: PredictionType
    ) -> _Point:
        x, base, other = (each.double() for each in (x, *predictions))
        to_x0 = float(x0_of(kind, 0.0, 1.0, alpha, sigma))
        to_noise = -alpha * to_x0 / sigma
        eps = (x - alpha * x0_of(kind, x, base, alpha, sigma)) / sigma
        apart = other - base
        return cls(x, eps, to_noise * apart, to_x0 * apart, alpha, sigma, to_noise)

    def product(self) -> Tensor:
        return (self.apart * (2.0 * self.eps + self.apart)).flatten(1).sum(1)

    def pulls(self, before: _Point) -> dict[str, Tensor]:
        """The gradients at both ends of the way here, along it."""
        way = path_way(before.alpha, before.sigma, self.alpha, self.sigma)
        moved = way.here * self.x + way.there * before.x
        return {
            "pull": way.pull * (self.apart_x0 * moved).flatten(1).sum(1),
            "pull_before": way.pull_before * (before.apart_x0 * moved).flatten(1).sum(1),
        }


def _sources(
    images: Tensor, forbidden: NDArray[np.bool_], paths: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which images are forbidden, checked, and the index of the image of every path."""
    paths = checks.integer("paths", paths, 1)
    forbidden = np.asarray(forbidden, dtype=bool)
    if len(images) != len(forbidden) or not 0 < forbidden.sum() < len(forbidden):
        raise ValueError(
            "forbidden must say of every image whether it is of the forbidden class, and be true "
            f"of some, not of all; got {int(forbidden.sum())} of {len(forbidden)} for "
            f"{len(images)} images"
        )
    return forbidden, np.repeat(np.arange(len(images)), paths)


def _reversed_path(
    c: StepCoefficients, x: Tensor, seed: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_t, x_s) of every step of a noising path, from noise to data."""
    states = [x]
    for step in reversed(range(len(c))):
        z = standard_normal(seed, x.shape, step=step, first_sample=first, device=x.device)
        x = float(c.alpha_ts[step]) * x + float(np.sqrt(c.beta_ts[step])) * z
        states.append(x)
    return pairwise(reversed(states))


def _mean(
    c: StepCoefficients,
    step: int,
    x: Tensor,
    prediction: Tensor,
    kind: PredictionType,
    clip: float | None,
) -> Tensor:
    """Mean of the transition for a prediction; float64, because differences of means are small."""
    x, prediction = x.double(), prediction.double()
    alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
    x0 = x0_of(kind, x, prediction, alpha, sigma)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return equations.step_mean(x, x0, c.transition_x_factor[step], c.transition_x0_factor[step])
