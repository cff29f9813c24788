"""The numbers that trackers are calibrated with: what they see along chains of a known class.

The chains are noised images in reverse, so they follow the true process, however good or bad the
networks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import standard_normal
from dng_math import checks, equations
from dng_math.schedules import DDPM, NoiseSchedule, PredictionType, StepCoefficients, x0_of
from dng_models.pairs.denoisers import Denoiser, Predictor, device_of, evaluating
from dng_models.pairs.sampling import timesteps
from dng_models.support.progress import Progress

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the networks predict along reversed noising paths of images; S steps, N paths.

    Attributes
    ----------
    forbidden : ndarray, shape (N,), bool
        Whether the image of each path is of the forbidden class.
    image : ndarray, shape (N,), int64
        Index of the image of each path.
    gap_sq, residual_gap : ndarray, shape (S, N)
        |mu_c - mu|^2 and (x_s - mu) . (mu_c - mu) of every step, noisiest first.
    coefficients : StepCoefficients
        Coefficients of the S steps.
    """

    forbidden: NDArray[np.bool_]
    image: NDArray[np.int64]
    gap_sq: Array
    residual_gap: Array
    coefficients: StepCoefficients

    def of(self, paths: NDArray[np.bool_]) -> Evidence:
        """The evidence of the paths that a mask of shape (N,) selects."""
        return replace(
            self,
            forbidden=self.forbidden[paths],
            image=self.image[paths],
            gap_sq=self.gap_sq[:, paths],
            residual_gap=self.residual_gap[:, paths],
        )

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
    paths = checks.integer("paths", paths, 1)
    forbidden = np.asarray(forbidden, dtype=bool)
    if len(images) != len(forbidden) or not 0 < forbidden.sum() < len(forbidden):
        raise ValueError(
            "forbidden must say of every image whether it is of the forbidden class, and be true "
            f"of some, not of all; got {int(forbidden.sum())} of {len(forbidden)} for "
            f"{len(images)} images"
        )
    device = device_of(base) if device is None else torch.device(device)
    c = schedule.respace(steps).coefficients(DDPM())
    times = timesteps(schedule, steps)
    predict = Predictor([base, unwanted], device, autocast=autocast)
    source = np.repeat(np.arange(len(images)), paths)
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
    return Evidence(forbidden[source], source, gap_sq, residual_gap, c)


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
