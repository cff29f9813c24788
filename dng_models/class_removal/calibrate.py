"""The tracker's temperature and offset, fitted where the truth is known.

A labelled image that is noised step by step, read backwards, is a true reverse path of the data
with a known label.  So the tracker can be run along it with the networks' predictions, and its
posterior compared with the label at every diffusion time.  Exact networks would want temperature
1 and no offset; trained ones are overconfident, mostly near the data, and by how much is what is
fitted here: by maximum likelihood, on images that no network was trained on (a memorised image
looks like certainty).

What is fitted is the mean over diffusion time of the log loss of the tracked posterior.  Either one
temperature, or a temperature that varies with time, piecewise linear between :data:`KNOTS`, with a
random walk as prior of its logarithm; and an offset in nats per run.  Both carry over to other
numbers of steps, since the log likelihood ratio of a stretch of time does not depend on how many
steps cross it (the sum of the paper's offset / (2 v) does).  They do so the better the more steps
there are: the transition over a long step is no Gaussian about the predicted mean, for which even
exact networks want a temperature below 1 near the data, about 0.4 at 50 steps and 1 at 500.

The paths of one image are not independent, so all uncertainties are over images: the sandwich
estimator with one term an image for the parameters, a bootstrap of images for the curves.  The
curves after fitting are cross-fitted: every image is judged by what was fitted to the others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special
from torch import Tensor

from dng_kernels import standard_normal
from dng_kernels.plan import PredictionType
from dng_math import _checks, equations
from dng_math.posterior import (
    LogOddsTracker,
    PaperTracker,
    TimeProfile,
    at_steps,
    log_odds_from_log_posterior,
)
from dng_math.schedules import DDPM, NoiseSchedule, StepCoefficients, x0_of
from dng_models import foreign
from dng_models.class_removal import files
from dng_models.progress import Progress, seconds_of
from dng_models.sampling import Denoiser, Predictor, device_of, evaluating, timesteps

Array = NDArray[np.float64]
Kind = Literal["paper", "log-odds"]
TRACKERS: dict[Kind, type[PaperTracker] | type[LogOddsTracker]] = {
    "paper": PaperTracker,
    "log-odds": LogOddsTracker,
}
# Beyond odds of 1 the log-odds tracker takes |mu_c - mu|^2, to which every error of the networks
# adds, for evidence of the class: capped there it is calibrated best, and its loss is smooth.
P_MAX: dict[Kind, float] = {"paper": 0.99, "log-odds": 0.5}
# Close together near the data, where the networks' errors are.
KNOTS = (0.0, 0.03, 0.07, 0.15, 0.3, 0.6)
LOWEST = 1e-4  # temperatures, so that their logarithms have a range
HIGHEST = 5.0
Z95 = 1.959963984540054
# Of the reliability diagram: fine where most probabilities are, near 0 and 1.
EDGES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
JUDGED_TIMES = 25
SLOPE_STEP = 1e-4
RADIUS = 0.3  # of log temperatures and of nats
FEWEST_IMAGES = 5  # in a bin, or nothing is said of it
VERSION = 1
# A step of the minimiser takes the loss at so many places, and its slopes; the fits of both
# trackers, of one temperature and of several, to all images and to both halves, together take
# about so many steps of such a size: 420 where the digit 1 is fitted, 560 for the 0.
LOSSES_A_STEP, LOSSES_A_CALIBRATION = 15, 490
_ENDS = ("", "_low", "_high")


# ---------------------------------------------------------------------- evidence


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the networks said along reversed noising paths of labelled images; S steps, N paths.

    Attributes
    ----------
    unwanted : ndarray, shape (N,), bool
        Whether the image is of the forbidden class.
    image : ndarray, shape (N,)
        Which image a path starts from.
    gap_sq, residual_gap : ndarray, shape (S, N)
        |mu_c - mu|^2 and (x_s - mu) . (mu_c - mu) of every step, noisiest first.
    coefficients : StepCoefficients
        Of the S steps.
    """

    unwanted: NDArray[np.bool_]
    image: NDArray[np.int64]
    gap_sq: Array
    residual_gap: Array
    coefficients: StepCoefficients

    def of(self, paths: NDArray[np.bool_]) -> Evidence:
        """Only some of the paths."""
        return replace(
            self,
            unwanted=self.unwanted[paths],
            image=self.image[paths],
            gap_sq=self.gap_sq[:, paths],
            residual_gap=self.residual_gap[:, paths],
        )

    def gain(self) -> Array:
        """Log likelihood ratio of each path summed over time, in nats, shape (S + 1, N)."""
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
    forgetful: Denoiser,
    images: Tensor,
    unwanted: NDArray[np.bool_],
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 100,
    paths: int = 4,
    prediction: PredictionType = "epsilon",
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
    base, forgetful : callable
        As for :func:`dng_models.sampling.sample`.
    images : Tensor, shape (N, ...)
        Held-out images in [-1, 1].
    unwanted : ndarray, shape (N,), bool
        Which of them are of the forbidden class.
    schedule, steps, prediction, clip, seed, batch_size, device, autocast, progress
        As for :func:`dng_models.sampling.sample`.
    paths : int
        Noising paths of each image.

    Returns
    -------
    Evidence
        Of N * paths paths.
    """
    schedule = NoiseSchedule.linear() if schedule is None else schedule
    paths = _checks.integer("paths", paths, 1)
    unwanted = np.asarray(unwanted, dtype=bool)
    if len(images) != len(unwanted) or not 0 < unwanted.sum() < len(unwanted):
        raise ValueError(
            "unwanted must say of every image whether it is of the forbidden class, and be true of "
            f"some, not of all; got {int(unwanted.sum())} of {len(unwanted)} for {len(images)} "
            "images"
        )
    device = device_of(base) if device is None else torch.device(device)
    c = schedule.respace(steps).coefficients(DDPM())
    times = timesteps(schedule, steps)
    predict = Predictor([base, forgetful], device, autocast=autocast)
    source = np.repeat(np.arange(len(images)), paths)
    gap_sq, residual_gap = (np.zeros((len(c), len(source))) for _ in range(2))
    batches = range(0, len(source), batch_size)
    with (
        torch.no_grad(),
        evaluating([base, forgetful]),
        Progress(len(batches) * steps, progress, shown=progress is not None) as bar,
    ):
        for first in batches:
            rows = slice(first, first + batch_size)
            x = images[torch.from_numpy(source[rows])].to(device, torch.float32)
            for step, (now, following) in enumerate(_reversed_path(c, x, seed, first)):
                if c.kernel_var[step] > 0:
                    mean, mean_neg = (
                        _mean(c, step, now, eps, prediction, clip)
                        for eps in predict(now, times[step])
                    )
                    gap = (mean_neg - mean).flatten(1)
                    residual = (following.double() - mean).flatten(1)
                    gap_sq[step, rows] = (gap * gap).sum(1).cpu().numpy()
                    residual_gap[step, rows] = (residual * gap).sum(1).cpu().numpy()
                bar.update()
    return Evidence(unwanted[source], source, gap_sq, residual_gap, c)


def _reversed_path(
    c: StepCoefficients, x: Tensor, seed: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The two ends of every step of a noising path, the noisier first, from noise to data."""
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
    """Mean of the step that a prediction means, in float64: differences of means are small."""
    x, prediction = x.double(), prediction.double()
    alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
    x0 = x0_of(kind, x, prediction, alpha, sigma)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return equations.step_mean(x, x0, c.kernel_x_factor[step], c.kernel_x0_factor[step])


# ---------------------------------------------------------------------- the fit


def tracked(evidence: Evidence, tracker: PaperTracker | LogOddsTracker) -> Array:
    """log p/(1-p) along the paths, shape (S + 1, N), by the tracker itself."""
    c = evidence.coefficients
    variance = c.tracker_variance(tracker.variance)
    assert tracker.prior is not None
    state = tracker.init(np.full(len(evidence.unwanted), tracker.prior))
    rows = [state]
    for step, at in enumerate(at_steps(tracker, c)):
        state = at.update(
            state,
            evidence.gap_sq[step],
            evidence.residual_gap[step],
            float(variance[step]),
            len(c),
        )
        rows.append(state)
    states = np.array(rows)
    return states if isinstance(tracker, LogOddsTracker) else log_odds_from_log_posterior(states)


def log_losses(log_odds: Array, unwanted: NDArray[np.bool_]) -> Array:
    """-log of the probability given to the truth, in nats; shape of ``log_odds``."""
    return np.logaddexp(0.0, np.where(unwanted, -log_odds, log_odds))


@dataclass(frozen=True)
class Fitted:
    """Hyperparameters of a tracker, fitted, with 95% intervals.

    Attributes
    ----------
    tracker : {"paper", "log-odds"}
    prior : float
        The class's share of the data; not fitted.
    times : tuple of float
        Knots of the temperature; one for a single temperature.
    temperature, temperature_low, temperature_high : tuple of float
        At the knots.
    offset_nats, offset_low, offset_high : float
        Nats per run.
    p_max : float
        Cap of the posterior; not fitted (:data:`P_MAX`).
    """

    tracker: Kind
    prior: float
    times: tuple[float, ...]
    temperature: tuple[float, ...]
    temperature_low: tuple[float, ...]
    temperature_high: tuple[float, ...]
    offset_nats: float
    offset_low: float
    offset_high: float
    p_max: float

    def make(self) -> PaperTracker | LogOddsTracker:
        """The tracker."""
        temperature: float | TimeProfile = self.temperature[0]
        if len(self.times) > 1:
            temperature = TimeProfile(self.times, self.temperature)
        return TRACKERS[self.tracker](
            prior=self.prior,
            temperature=temperature,
            offset_nats=self.offset_nats,
            p_max=self.p_max,
        )

    @classmethod
    def from_json(cls, told: object, where: Path | str = "a fit") -> Fitted:
        """From the fields as JSON has them.

        Raises
        ------
        ValueError
            If they are not those of a fit, naming ``where`` they are and which is wrong.
        """
        if not isinstance(told, dict):
            raise ValueError(f"{where} must be an object, got {foreign.shown(told)}")
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if "tuple" in str(field.type):
                fields[field.name] = foreign.numbers(told, field.name, where)
            else:
                kind = str if field.name == "tracker" else (int, float)
                fields[field.name] = foreign.member(told, field.name, kind, where)
        fitted = cls(**fields)
        try:
            _checks.choice("tracker", fitted.tracker, TRACKERS)
            for name in ("temperature", "temperature_low", "temperature_high"):
                if len(getattr(fitted, name)) != len(fitted.times):
                    raise ValueError(
                        f"{name} must have a number for each of the {len(fitted.times)} times, got "
                        f"{len(getattr(fitted, name))}"
                    )
            fitted.make()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is no fit: {error}") from None
        return fitted


def fit(
    evidence: Evidence, kind: Kind, *, prior: float, times: tuple[float, ...] = KNOTS
) -> Fitted:
    """The temperature and offset that make the tracked posterior most likely, with intervals.

    Minimises the log loss, averaged over diffusion time and paths.  The logarithm of the
    temperature is a random walk from knot to knot with steps of standard deviation 1, which
    counts as much against one image's log loss as a prior does against one observation.

    Parameters
    ----------
    evidence : Evidence
    kind : {"paper", "log-odds"}
    prior : float
        Of the class, in (0, 1).
    times : tuple of float
        Knots; one for a single temperature.

    Returns
    -------
    Fitted
    """
    _checks.choice("kind", kind, TRACKERS)
    prior = _checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
    problem = _Problem(evidence, kind, prior, (0.0,))
    theta = problem.minimise(np.array([np.log(0.25), 0.0]))
    if len(times) > 1:
        problem = _Problem(evidence, kind, prior, tuple(times))
        # From one temperature, and from one that falls towards the data, as it does for networks.
        falls = (0.0, 2.0)
        tilted = [theta[0] - fall * np.linspace(1.0, 0.0, len(times)) for fall in falls]
        found = [problem.minimise(np.append(start, theta[1])) for start in tilted]
        theta = found[int(np.argmin(problem.objectives(np.array(found))))]
    spread = Z95 * np.sqrt(np.diag(problem.covariance(theta)))
    low, high = theta - spread, theta + spread
    return Fitted(
        tracker=kind,
        prior=prior,
        times=tuple(times),
        temperature=tuple(np.exp(theta[:-1]).tolist()),
        temperature_low=tuple(np.exp(np.maximum(low[:-1], np.log(LOWEST))).tolist()),
        temperature_high=tuple(np.exp(np.minimum(high[:-1], np.log(HIGHEST))).tolist()),
        offset_nats=float(theta[-1]),
        offset_low=float(low[-1]),
        offset_high=float(high[-1]),
        p_max=P_MAX[kind],
    )


class _Problem:
    """The log loss as a function of the parameters, for many of them at once."""

    def __init__(
        self, evidence: Evidence, kind: Kind, prior: float, times: tuple[float, ...]
    ) -> None:
        self.evidence, self.kind, self.prior, self.times = evidence, kind, prior, times
        c = evidence.coefficients
        self.variance = c.tracker_variance()
        # Mean of each knot's hat function over each step: temperatures are these times values.
        hats = np.eye(len(times)).tolist()
        self.hats = np.stack([TimeProfile(times, tuple(hat)).over(c) for hat in hats], axis=1)
        _, self.of_image = np.unique(evidence.image, return_inverse=True)
        self.paths = np.bincount(self.of_image)
        # The loss is a mean over times, and neighbouring ones say the same.
        self.judged = np.zeros(len(c), dtype=bool)
        self.judged[:: -(-len(c) // JUDGED_TIMES)] = True

    def per_image(self, thetas: Array) -> Array:
        """Mean log loss of every image over time and paths, shape (P, images); thetas (P, size)."""
        tracker = TRACKERS[self.kind](prior=self.prior, p_max=P_MAX[self.kind])
        temperature = np.exp(thetas[:, :-1]) @ self.hats.T
        offset = thetas[:, -1:] / len(self.variance)
        unwanted = self.evidence.unwanted
        state = tracker.init(np.full((len(thetas), len(unwanted)), self.prior))
        low = tracker.init(np.array(tracker.p_min))
        high = np.inf if self.kind == "log-odds" else np.log(tracker.p_max)
        total = np.zeros_like(state)
        for step, variance in enumerate(self.variance):
            if variance > 0:
                gap_sq, residual_gap = (
                    values[step] for values in (self.evidence.gap_sq, self.evidence.residual_gap)
                )
                if self.kind == "log-odds":
                    ratio = equations.log_odds_ratio(
                        tracker.odds(state), gap_sq, residual_gap, variance
                    )
                else:
                    ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, variance)
                state = np.clip(state + temperature[:, step, None] * ratio + offset, low, high)
            if self.judged[step]:
                odds = state if self.kind == "log-odds" else log_odds_from_log_posterior(state)
                total += log_losses(odds, unwanted)
        total /= self.judged.sum()
        sums = np.array([np.bincount(self.of_image, weights=row) for row in total])
        return sums / self.paths

    def objectives(self, thetas: Array) -> Array:
        """The mean of that, and what the random walk of the log temperatures adds; shape (P,)."""
        walk = np.sum(np.diff(thetas[:, :-1], axis=1) ** 2, axis=1) / (2.0 * len(self.paths))
        return self.per_image(thetas).mean(axis=1) + walk

    def minimise(self, start: Array) -> Array:
        """The best parameters near a start."""
        bounds = [(np.log(LOWEST), np.log(HIGHEST))] * (len(start) - 1) + [(-50.0, 50.0)]

        def with_slope(theta: Array) -> tuple[float, Array]:
            values = self.objectives(np.concatenate([theta[None], _around(theta, SLOPE_STEP)]))
            return float(values[0]), _slopes(values[1:], SLOPE_STEP)

        found = optimize.minimize(
            with_slope,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-8, "maxiter": 100},
        )
        return np.asarray(found.x)

    def covariance(self, theta: Array) -> Array:
        """Of the estimate: H^-1 G H^-1 / n, with G the covariance of the images' slopes.

        Slopes and curvature are those of a quadratic fitted over :data:`RADIUS`, about the size
        of the uncertainty: where paths reach a clamp the loss has kinks, of which differences over
        small steps see one or none.
        """
        size = len(theta)
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        points = 4 * (1 + size + len(pairs))
        away = np.random.default_rng(0).uniform(-1.0, 1.0, (points, size))
        products = np.stack([away[:, i] * away[:, j] for i, j in pairs], axis=1)
        design = np.concatenate([np.ones((points, 1)), away, products], axis=1)
        thetas = theta + RADIUS * away
        of_mean = np.linalg.lstsq(design, self.objectives(thetas), rcond=None)[0]
        of_images = np.linalg.lstsq(design, self.per_image(thetas), rcond=None)[0]
        hessian = np.zeros((size, size))
        for (i, j), value in zip(pairs, of_mean[1 + size :], strict=True):
            hessian[i, j] += value / RADIUS**2
            hessian[j, i] += value / RADIUS**2
        slopes = of_images[1 : 1 + size] / RADIUS
        inverse = np.linalg.pinv(hessian, rcond=1e-9, hermitian=True)
        return np.asarray(inverse @ np.cov(slopes) @ inverse / slopes.shape[1])


def _around(theta: Array, step: float) -> Array:
    """A step forth and, below all those, a step back along each parameter, (2 size, size)."""
    steps = step * np.eye(len(theta))
    return np.concatenate([theta + steps, theta - steps])


def _slopes(values: Array, step: float) -> Array:
    """Central differences of values at the points of :func:`_around`."""
    forth, back = np.split(values, 2)
    return (forth - back) / (2.0 * step)


# ---------------------------------------------------------------------- what it gained


def cross_fitted(
    evidence: Evidence, kind: Kind, *, prior: float, times: tuple[float, ...] = KNOTS, seed: int = 0
) -> Array:
    """log p/(1-p) of each path under what was fitted to the other half of the images."""
    half = _halves(evidence, seed)
    out = np.empty((len(evidence.coefficients) + 1, len(half)))
    for side in (half, ~half):
        tracker = fit(evidence.of(~side), kind, prior=prior, times=times).make()
        out[:, side] = tracked(evidence.of(side), tracker)
    return out


def _halves(evidence: Evidence, seed: int) -> NDArray[np.bool_]:
    """One half of the images, and of the unwanted among them, as a mask of paths."""
    rng = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for group in (evidence.unwanted, ~evidence.unwanted):
        images = rng.permutation(np.unique(evidence.image[group]))
        chosen.append(images[: len(images) // 2])
    return np.isin(evidence.image, np.concatenate(chosen))


def curves(evidence: Evidence, log_odds: Array, *, resamples: int = 400) -> dict[str, Any]:
    """Log loss (nats) and Brier score over diffusion time, with 95% intervals over images."""
    truth = evidence.unwanted.astype(float)
    scores = {
        "log_loss": log_losses(log_odds, evidence.unwanted),
        "brier": (special.expit(log_odds) - truth) ** 2,
    }
    weights = _bootstrap(evidence.image, resamples)
    out: dict[str, Any] = {}
    for name, score in scores.items():
        drawn = weights @ score.T
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        out |= {
            name: score.mean(axis=1).tolist(),
            f"{name}_low": low.tolist(),
            f"{name}_high": high.tolist(),
        }
        # The mean over time is what is fitted.
        low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
        out[f"mean_{name}"] = [float(score.mean()), float(low), float(high)]
    return out


def _bootstrap(image: NDArray[np.int64], resamples: int, seed: int = 0) -> Array:
    """Weights of the paths in resamples of whole images, each row adding up to 1."""
    rng = np.random.default_rng(seed)
    _, of_image = np.unique(image, return_inverse=True)
    n = int(of_image.max()) + 1
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)[:, of_image].astype(float)
    return counts / counts.sum(axis=1, keepdims=True)


def reliability(
    evidence: Evidence, log_odds: Array, *, resamples: int = 400
) -> dict[str, list[float]]:
    """How often what was given a probability is true, over all times, in bins of probability."""
    posterior = special.expit(log_odds)
    member = np.digitize(posterior, EDGES)
    weights = _bootstrap(evidence.image, resamples)
    out: dict[str, list[float]] = {
        name: [] for name in ("confidence", "frequency", "low", "high", "count")
    }
    for b in range(len(EDGES) + 1):
        here = member == b
        if len(np.unique(evidence.image[here.any(axis=0)])) < FEWEST_IMAGES:
            continue
        of_path = here.sum(axis=0).astype(float)
        with np.errstate(invalid="ignore"):
            drawn = (weights @ (of_path * evidence.unwanted)) / (weights @ of_path)
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        values = (
            posterior[here].mean(),
            (here & evidence.unwanted).sum() / here.sum(),
            low,
            high,
            here.sum(),
        )
        for name, value in zip(out, values, strict=True):
            out[name].append(float(value))
    return out


# ---------------------------------------------------------------------- how long it takes


def seconds_to_fit(images: int, paths: int, steps: int) -> float:
    """About how long :func:`calibrate` takes here, by timing the loss on numbers of that size."""
    count = images * paths
    coefficients = NoiseSchedule.linear().respace(steps).coefficients(DDPM())
    nothing = np.zeros((len(coefficients), count))
    image = np.repeat(np.arange(images), paths)
    evidence = Evidence(image < 1, image, nothing, nothing, coefficients)
    problem = _Problem(evidence, "paper", 0.5, KNOTS)
    thetas = np.zeros((LOSSES_A_STEP, len(KNOTS) + 1))
    return LOSSES_A_CALIBRATION * seconds_of(lambda: problem.per_image(thetas), 0.1)


# ---------------------------------------------------------------------- all of it


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted hyperparameters of both trackers, and what they gained, for one forgotten class.

    Attributes
    ----------
    about : dict
        Data set, classes, networks, numbers of images, paths and steps.
    fits : dict of str to Fitted
        "paper", "log-odds": temperature over time; "paper, constant", "log-odds, constant": one.
    report : dict of str to dict
        For each of these and for the settings before: curves and reliability.
    """

    about: dict[str, Any]
    fits: dict[str, Fitted]
    report: dict[str, Any]

    def tracker(self, kind: Kind, *, varying: bool = True) -> PaperTracker | LogOddsTracker:
        """The calibrated tracker, with a temperature that varies over time or with one."""
        _checks.choice("kind", kind, TRACKERS)
        return self.fits[_fit_name(kind, varying)].make()

    def save(self, path: Path | str) -> None:
        """Write as JSON, whole or not at all."""
        told = {
            "version": VERSION,
            "about": self.about,
            "fits": {name: asdict(each) for name, each in self.fits.items()},
            "report": _shortened(self.report),
        }
        files.write_text(path, json.dumps(told, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or it is another file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} must be a calibration, and there is none: run the calibrate command first"
            )
        told = foreign.read_object(path, finite=True)
        version = foreign.member(told, "version", int, path)
        if version != VERSION:
            raise ValueError(
                f"{path} is a calibration of version {version}, and here that is {VERSION}: make "
                "it again with the calibrate command"
            )
        about = foreign.member(told, "about", dict, path)
        listed = foreign.member(told, "fits", dict, path)
        fits = {}
        for kind in TRACKERS:
            for name in (_fit_name(kind, True), _fit_name(kind, False)):
                where = f"{name!r} in {path}"
                fits[name] = Fitted.from_json(foreign.member(listed, name, dict, path), where)
                if fits[name].tracker != kind:
                    raise ValueError(f"{where} is a fit of the {fits[name].tracker!r} tracker")
        report = foreign.member(told, "report", dict, path)
        _check_report(report, path)
        return cls(about, fits, report)


def _check_report(report: dict[str, Any], path: Path) -> None:
    """Whether all curves of a report are numbers, one for each time."""
    count = len(foreign.numbers(report, "time", path))
    for name, judged in report.items():
        if name == "time":
            continue
        where = f"{name!r} in {path}"
        if not isinstance(judged, dict):
            raise ValueError(f"{where} must be an object, got {foreign.shown(judged)}")
        for curve in (f"{score}{end}" for score in ("log_loss", "brier") for end in _ENDS):
            foreign.numbers(judged, curve, where, count)
        diagram = foreign.member(judged, "reliability", dict, where)
        bins = len(foreign.member(diagram, "count", list, where))
        for column in ("count", "confidence", "frequency", "low", "high"):
            foreign.numbers(diagram, column, where, bins)


def _shortened(value: Any) -> Any:
    """The same with five digits of every number: curves are for looking at."""
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return float(f"{value:.5g}")


def _fit_name(kind: Kind, varying: bool) -> str:
    return kind if varying else f"{kind}, constant"


def calibrate(
    evidence: Evidence,
    *,
    prior: float,
    before: dict[str, PaperTracker | LogOddsTracker] | None = None,
    about: dict[str, Any] | None = None,
    progress: str | None = None,
) -> Calibration:
    """Fit both trackers, with one temperature and with one that varies, and judge every fit.

    Parameters
    ----------
    evidence : Evidence
        Of held-out images.
    prior : float
        The forbidden class's share of the data.
    before : dict of str to tracker, optional
        Settings to compare with, such as the paper's.
    about : dict, optional
        What to remember of the data and the networks.
    progress : str, optional
        Name on a progress bar.
    """
    share = float(np.mean(evidence.unwanted))
    nothing = np.full(
        (len(evidence.coefficients) + 1, len(evidence.unwanted)), special.logit(share)
    )
    judged: dict[str, Array] = {"prior alone": nothing}
    judged |= {name: tracked(evidence, tracker) for name, tracker in (before or {}).items()}
    fits = {}
    variants = [(kind, times) for kind in TRACKERS for times in (KNOTS, (0.0,))]
    shown = progress is not None
    for kind, times in Progress(len(variants), progress, unit="fit", shown=shown).over(variants):
        name = _fit_name(kind, len(times) > 1)
        fits[name] = fit(evidence, kind, prior=prior, times=times)
        judged[name] = cross_fitted(evidence, kind, prior=prior, times=times)
    report: dict[str, Any] = {
        name: {
            **curves(evidence, log_odds),
            "reliability": reliability(evidence, log_odds),
        }
        for name, log_odds in judged.items()
    }
    gain = evidence.gain()
    told = {
        **(about or {}),
        "num_images": len(np.unique(evidence.image)),
        "num_unwanted": len(np.unique(evidence.image[evidence.unwanted])),
        "num_paths": len(evidence.image),
        "steps": len(evidence.coefficients),
        "prior": prior,
        # Exact networks give ln 1/p(c) in the mean over forbidden images, at the last step.
        "gain_unwanted": gain[:, evidence.unwanted].mean(axis=1).tolist(),
        "gain_others": gain[:, ~evidence.unwanted].mean(axis=1).tolist(),
    }
    report["time"] = np.append(evidence.coefficients.time, 0.0).tolist()
    return Calibration(told, fits, report)


def report_table(calibrations: Mapping[str, Calibration]) -> str:
    """A Markdown table of what calibrating gained, and of the evidence that the networks give.

    Parameters
    ----------
    calibrations : mapping of str to Calibration
        By the forgotten class.

    Returns
    -------
    str
        The mean log loss of the tracked posterior over diffusion time, in nats, with the class's
        share alone, with the settings before and with every fit (cross-fitted: each half of the
        images is judged by what was fitted to the other).  Then the evidence for the class in
        images of it, in nats: what exact networks would end with, ln 1/p(c); the most that these
        reach in the mean, and when; and what they end with.
    """
    fits = ("paper, constant", "paper", "log-odds, constant", "log-odds")
    lines: list[tuple[str, ...]] = []
    for name, calibration in calibrations.items():
        report, about = calibration.report, calibration.about
        before = [each for each in report if each not in ("prior alone", "time", *fits)]
        losses = {
            "share alone": "prior alone",
            **{each: each for each in before},
            "one temperature": "paper, constant",
            "varying": "paper",
            "log-odds, one temperature": "log-odds, constant",
            "log-odds, varying": "log-odds",
        }
        cells = {
            title: f"{report[each]['mean_log_loss'][0]:#.3g}".rstrip(".")
            for title, each in losses.items()
        }
        gain = np.array(about["gain_unwanted"])
        most = int(gain.argmax())
        cells["exact evidence"] = f"{-np.log(about['prior']):.1f}"
        cells["most, at t/T"] = f"{gain[most]:.1f}, {report['time'][most]:.2f}"
        cells["at the end"] = f"{gain[-1]:.1f}"
        if not lines:
            lines += [("forgotten", *cells), ("---", *("---:" for _ in cells))]
        lines.append((name.replace("|", r"\|"), *cells.values()))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def transferred(calibration: Calibration, evidence: Evidence, kind: Kind) -> list[float]:
    """Mean log loss of a class under what was fitted to another, with its 95% interval.

    The prior is that of the class that is judged.
    """
    own = float(np.mean(evidence.unwanted))
    tracker = replace(calibration.tracker(kind), prior=own)
    told = curves(evidence, tracked(evidence, tracker))["mean_log_loss"]
    return [float(value) for value in told]
