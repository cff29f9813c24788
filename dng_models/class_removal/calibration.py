"""Fit the tracker's temperature and offset on noised images whose class is known.

A labelled image that is noised step by step is, read backwards, a true reverse path of the data
with a known label.  The tracker is run along it with the networks' predictions, and its posterior
is compared with the label at every diffusion time.  Exact networks would need temperature 1 and no
offset.  Trained ones are overconfident, mostly near the data; the fit measures by how much, by
maximum likelihood, on images that no network was trained on (networks look certain of a memorised
image).

The fit minimises the log loss of the tracked posterior, averaged over diffusion time.  Its
parameters are an offset in nats per run and either one temperature or a temperature that varies
with time, piecewise linear between :data:`KNOTS`, with a random-walk prior on its logarithm.  Both
carry over to other numbers of steps, since the log likelihood ratio of a stretch of time does not
depend on how many steps cross it (the sum of the paper's offset / (2 v) does).  They carry over
better the more steps there are: the transition over a long step is no Gaussian about the predicted
mean, so even exact networks need a temperature below 1 near the data, about 0.4 at 50 steps and 1
at 500.

The paths of one image are not independent, so all uncertainties are over images: the parameters
have the sandwich estimator with one term per image, the curves a bootstrap of images.  The curves
after fitting are cross-fitted: every image is judged by a fit to the other half of the images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from dng_math import checks, equations
from dng_math.schedules import DDPM, NoiseSchedule
from dng_math.trackers import (
    LARGEST_WEIGHED,
    TRACKERS,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    TimeProfile,
    TrackerName,
    at_steps,
    log_odds_from_log_posterior,
)
from dng_models.class_removal.evidence import Evidence, PathEvidence
from dng_models.support import files, foreign
from dng_models.support.progress import Progress, seconds_of

Array = NDArray[np.float64]
Kind = TrackerName
AnyEvidence = Evidence | PathEvidence
AnyTracker = PaperTracker | LogOddsTracker | PathTracker
# The trackers that are fitted to one kind of evidence, and so together.
OF_STEPS: tuple[Kind, ...] = ("paper", "log-odds")
OF_POINTS: tuple[Kind, ...] = ("path",)
# Beyond odds of 1 the log-odds tracker counts |mu_c - mu|^2, which every error of the networks
# increases, as evidence for the class.  Capped at 0.5 it is best calibrated and its loss is smooth.
P_MAX: dict[Kind, float] = {"paper": 0.99, "log-odds": 0.5, "path": 0.9}
# Close together near the data, where the networks' errors are largest.
KNOTS = (0.0, 0.03, 0.07, 0.15, 0.3, 0.6)
LOWEST = 1e-4  # bounds of the temperature, whose logarithm is fitted
HIGHEST = 5.0
Z95 = 1.959963984540054
# Edges of the reliability diagram's bins: narrow near 0 and 1, where most probabilities are.
EDGES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
JUDGED_TIMES = 25
SLOPE_STEP = 1e-4
RADIUS = 0.3  # in log temperature and in nats
FEWEST_IMAGES = 5  # bins with fewer images are left out
VERSION = 1
# For `seconds_to_fit`.  One step of the minimiser evaluates the loss at 15 points, for its value
# and slopes.  All fits of a calibration (both trackers, one temperature and several, all images
# and both halves) take about 490 such steps: 420 for the digit 1, 560 for the digit 0.
LOSSES_A_STEP, LOSSES_A_CALIBRATION = 15, 490
_ENDS = ("", "_low", "_high")


# ---------------------------------------------------------------------- the fit


def tracked(evidence: AnyEvidence, tracker: AnyTracker) -> Array:
    """log p/(1-p) along every path, shape (S + 1, N), from the tracker's own updates.

    Parameters
    ----------
    evidence : Evidence or PathEvidence
        S steps along N paths; a path tracker takes the latter, the others the former.
    tracker : PaperTracker, LogOddsTracker or PathTracker
        With a prior.

    Returns
    -------
    ndarray, shape (S + 1, N)
        Before every step and after the last; of a path tracker at every point, and the last again.
    """
    if isinstance(evidence, PathEvidence):
        assert isinstance(tracker, PathTracker)
        return _tracked_along(evidence, tracker)
    assert not isinstance(tracker, PathTracker)
    c = evidence.coefficients
    variance = c.tracker_variance(tracker.variance)
    assert tracker.prior is not None
    state = tracker.init(np.full(len(evidence.forbidden), tracker.prior))
    rows = [state]
    for step, at in enumerate(at_steps(tracker, c)):
        assert isinstance(at, PaperTracker | LogOddsTracker)
        state = at.update(
            state,
            evidence.gap_sq[step],
            evidence.residual_gap[step],
            float(variance[step]),
            len(c),
        )
        rows.append(state)
    states = np.array(rows)
    return _log_odds(tracker, states)


def _log_odds(tracker: AnyTracker, state: Array) -> Array:
    """log p/(1-p) of a state."""
    is_log_odds = isinstance(tracker, LogOddsTracker) or getattr(tracker, "compare", "") == "rest"
    return state if is_log_odds else log_odds_from_log_posterior(state)


def _tracked_along(evidence: PathEvidence, tracker: PathTracker) -> Array:
    """:func:`tracked` for the path tracker."""
    c, ways = evidence.coefficients, evidence.ways()
    assert tracker.prior is not None
    state = tracker.init(np.full(len(evidence.forbidden), tracker.prior))
    trackers = at_steps(tracker, c)
    rows: list[Array] = []
    rate_before: Array | None = None
    for step, way in enumerate(ways):
        of_way = trackers[max(step - 1, 0)]
        assert isinstance(of_way, PathTracker)
        p = np.minimum(np.exp(tracker.log_posterior(state)), LARGEST_WEIGHED)
        rate = evidence.rate[step] + p / (1.0 - p) * evidence.spread[step]
        rate_before = rate if rate_before is None else rate_before
        before = equations.path_end(evidence.pull_before[step], rate_before, way.weight_before)
        after = equations.path_end(evidence.pull[step], rate, way.weight)
        state = of_way.update(state, before, after, len(c))
        rows.append(state)
        rate_before = rate
    states = np.array([*rows, rows[-1]])
    return _log_odds(tracker, states)


def log_losses(log_odds: Array, forbidden: NDArray[np.bool_]) -> Array:
    """Log loss, -log of the probability given to the true class, in nats; shape of ``log_odds``."""
    return np.logaddexp(0.0, np.where(forbidden, -log_odds, log_odds))


def _kinds(evidence: AnyEvidence) -> tuple[Kind, ...]:
    """The trackers that evidence is for."""
    return OF_POINTS if isinstance(evidence, PathEvidence) else OF_STEPS


def _unfitted(kind: Kind, prior: float, p_max: float) -> AnyTracker:
    """A tracker of the form that is fitted, without a temperature and an offset."""
    if kind == "path":
        # Against the rest the errors of two networks, which are no gradients of one log ratio, feed
        # on themselves: the log loss of the digit 0 was 0.42 or more, and is 0.25 for this form.
        return PathTracker(prior=prior, p_max=p_max, compare="base")
    return TRACKERS[kind](prior=prior, p_max=p_max)


@dataclass(frozen=True)
class Fitted:
    """Fitted hyperparameters of one tracker, with 95% intervals.

    Attributes
    ----------
    tracker : {"paper", "log-odds", "path"}
    prior : float
        The class's share of the data; not fitted.
    times : tuple of float
        Knots of the temperature; one for a single temperature.
    temperature, temperature_low, temperature_high : tuple of float
        The temperature at each knot, and the ends of its interval.
    offset_nats, offset_low, offset_high : float
        The offset, in nats per run, and the ends of its interval.
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

    def make(self) -> AnyTracker:
        """The tracker with these hyperparameters."""
        temperature: float | TimeProfile = self.temperature[0]
        if len(self.times) > 1:
            temperature = TimeProfile(self.times, self.temperature)
        return dataclasses.replace(
            _unfitted(self.tracker, self.prior, self.p_max),
            temperature=temperature,
            offset_nats=self.offset_nats,
        )

    @classmethod
    def from_json(cls, told: object, where: Path | str = "a fit") -> Fitted:
        """Make a fit from its fields in a JSON object.

        Raises
        ------
        ValueError
            If they are not the fields of a fit; names ``where`` they are and which is wrong.
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
            checks.choice("tracker", fitted.tracker, TRACKERS)
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
    evidence: AnyEvidence, kind: Kind, *, prior: float, times: tuple[float, ...] = KNOTS
) -> Fitted:
    """Fit the temperature and offset of a tracker by maximum likelihood, with intervals.

    Minimises the log loss, averaged over diffusion time and paths.  The prior of the log
    temperature is a random walk from knot to knot with steps of standard deviation 1; its weight
    relative to the log loss of one image is that of a prior relative to one observation.

    Parameters
    ----------
    evidence : Evidence or PathEvidence
    kind : {"paper", "log-odds", "path"}
        The tracker: of steps for the former, "path" for the latter.
    prior : float
        Prior of the class, in (0, 1).
    times : tuple of float
        Knots of the temperature, in diffusion time; one knot fits a single temperature.

    Returns
    -------
    Fitted

    Raises
    ------
    TypeError, ValueError
        If ``kind`` or ``prior`` is not as described.
    """
    checks.choice("kind", kind, _kinds(evidence))
    prior = checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
    problem = _Problem(evidence, kind, prior, (0.0,))
    theta = problem.minimise(np.array([np.log(0.25), 0.0]))
    if len(times) > 1:
        problem = _Problem(evidence, kind, prior, tuple(times))
        # Two starts: a constant temperature, and one that falls towards the data, as it does for
        # networks.
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
    """The log loss as a function of the parameters, evaluated for many parameter vectors at once.

    A parameter vector theta holds the log temperature at each knot, then the offset in nats.
    """

    def __init__(
        self, evidence: AnyEvidence, kind: Kind, prior: float, times: tuple[float, ...]
    ) -> None:
        self.evidence, self.kind, self.prior, self.times = evidence, kind, prior, times
        c = evidence.coefficients
        # Mean of each knot's hat function over each step, shape (S, knots): times the values at
        # the knots it gives the temperature of every step.
        hats = np.eye(len(times)).tolist()
        self.hats = np.stack([TimeProfile(times, tuple(hat)).over(c) for hat in hats], axis=1)
        _, self.of_image = np.unique(evidence.image, return_inverse=True)
        self.paths = np.bincount(self.of_image)
        # Neighbouring times have almost the same loss, so the mean takes a few of them.
        self.judged = np.zeros(len(c), dtype=bool)
        self.judged[:: -(-len(c) // JUDGED_TIMES)] = True

    def per_image(self, thetas: Array) -> Array:
        """Log loss of every image, averaged over its paths and time: (P, size) -> (P, images)."""
        tracker = _unfitted(self.kind, self.prior, P_MAX[self.kind])
        temperature = (np.exp(thetas[:, :-1]) @ self.hats.T)[..., None]
        offset = thetas[:, -1:] / len(self.judged)
        forbidden = self.evidence.forbidden
        start = tracker.init(np.full((len(thetas), len(forbidden)), self.prior))
        if isinstance(tracker, PathTracker):
            states = self._along(tracker, start, temperature, offset)
        else:
            states = self._stepwise(tracker, start, temperature, offset)
        total = np.zeros_like(start)
        for step, state in enumerate(states):
            if self.judged[step]:
                total += log_losses(_log_odds(tracker, state), forbidden)
        total /= self.judged.sum()
        sums = np.array([np.bincount(self.of_image, weights=row) for row in total])
        return sums / self.paths

    def _stepwise(
        self,
        tracker: PaperTracker | LogOddsTracker,
        state: Array,
        temperature: Array,
        offset: Array,
    ) -> Iterator[Array]:
        """The states after every step, (P, N), for temperatures (P, S, 1) and offsets (P, 1)."""
        assert isinstance(self.evidence, Evidence)
        low = tracker.init(np.array(tracker.p_min))
        high = np.inf if self.kind == "log-odds" else np.log(tracker.p_max)
        for step, variance in enumerate(self.evidence.coefficients.tracker_variance()):
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
                state = np.clip(state + temperature[:, step] * ratio + offset, low, high)
            yield state

    def _along(
        self, tracker: PathTracker, state: Array, temperature: Array, offset: Array
    ) -> Iterator[Array]:
        """The states at every point, as :meth:`_stepwise`."""
        evidence = self.evidence
        assert isinstance(evidence, PathEvidence) and tracker.compare == "base"
        rate_before: Array | None = None
        for step, way in enumerate(evidence.ways()):
            p = np.minimum(np.exp(state), LARGEST_WEIGHED)
            rate = evidence.rate[step] + p / (1.0 - p) * evidence.spread[step]
            rate_before = rate if rate_before is None else rate_before
            before = equations.path_end(evidence.pull_before[step], rate_before, way.weight_before)
            after = equations.path_end(evidence.pull[step], rate, way.weight)
            ratio = equations.path_log_ratio(before, after, 0.0, 0.0)
            change = temperature[:, max(step - 1, 0)] * ratio + offset
            state = np.clip(state + change, *tracker.bounds)
            rate_before = rate
            yield state

    def objectives(self, thetas: Array) -> Array:
        """Log loss averaged over images plus the penalty of the random-walk prior, shape (P,)."""
        walk = np.sum(np.diff(thetas[:, :-1], axis=1) ** 2, axis=1) / (2.0 * len(self.paths))
        return self.per_image(thetas).mean(axis=1) + walk

    def minimise(self, start: Array) -> Array:
        """The parameters at the local minimum that L-BFGS-B reaches from a start."""
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
        """Covariance of the estimate, H^-1 G H^-1 / n, with G the covariance of images' slopes.

        Slopes and curvature come from a quadratic fitted over :data:`RADIUS`, about the size of
        the uncertainty.  The loss has kinks where paths reach a clamp, and differences over small
        steps would see one kink or none.
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
    """theta plus a step along each parameter, then theta minus each, shape (2 size, size)."""
    steps = step * np.eye(len(theta))
    return np.concatenate([theta + steps, theta - steps])


def _slopes(values: Array, step: float) -> Array:
    """Central differences of values at the points of :func:`_around`."""
    forth, back = np.split(values, 2)
    return (forth - back) / (2.0 * step)


# ---------------------------------------------------------------------- what it gained


def cross_fitted(
    evidence: AnyEvidence,
    kind: Kind,
    *,
    prior: float,
    times: tuple[float, ...] = KNOTS,
    seed: int = 0,
) -> Array:
    """log p/(1-p) of each path under a fit to the other half of the images, shape (S + 1, N).

    Parameters
    ----------
    evidence : Evidence
    kind, prior, times
        As for :func:`fit`.
    seed : int
        Seed of the split into halves.
    """
    half = _halves(evidence, seed)
    out = np.empty((len(evidence.coefficients) + 1, len(half)))
    for side in (half, ~half):
        tracker = fit(evidence.of(~side), kind, prior=prior, times=times).make()
        out[:, side] = tracked(evidence.of(side), tracker)
    return out


def _halves(evidence: AnyEvidence, seed: int) -> NDArray[np.bool_]:
    """Mask of the paths of a random half of the images, with half of the forbidden ones."""
    rng = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for group in (evidence.forbidden, ~evidence.forbidden):
        images = rng.permutation(np.unique(evidence.image[group]))
        chosen.append(images[: len(images) // 2])
    return np.isin(evidence.image, np.concatenate(chosen))


def curves(evidence: AnyEvidence, log_odds: Array, *, resamples: int = 400) -> dict[str, Any]:
    """Log loss (nats) and Brier score over diffusion time, with 95% intervals over images.

    Parameters
    ----------
    evidence : Evidence
    log_odds : ndarray, shape (S + 1, N)
        log p/(1-p) of every path (:func:`tracked`).
    resamples : int
        Number of bootstrap resamples.

    Returns
    -------
    dict
        ``log_loss`` and ``brier``, lists of S + 1 numbers, each with ``_low`` and ``_high``, and
        ``mean_log_loss`` and ``mean_brier``, the mean over time and the ends of its interval.
    """
    truth = evidence.forbidden.astype(float)
    scores = {
        "log_loss": log_losses(log_odds, evidence.forbidden),
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
        # The fit minimises the mean over time.
        low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
        out[f"mean_{name}"] = [float(score.mean()), float(low), float(high)]
    return out


def _bootstrap(image: NDArray[np.int64], resamples: int, seed: int = 0) -> Array:
    """Weights of the paths in bootstrap resamples of whole images; each row adds up to 1."""
    rng = np.random.default_rng(seed)
    _, of_image = np.unique(image, return_inverse=True)
    n = int(of_image.max()) + 1
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)[:, of_image].astype(float)
    return counts / counts.sum(axis=1, keepdims=True)


def reliability(
    evidence: AnyEvidence, log_odds: Array, *, resamples: int = 400
) -> dict[str, list[float]]:
    """How often the class is the true one, in bins of tracked probability, over all times.

    Parameters
    ----------
    evidence, log_odds, resamples
        As for :func:`curves`.

    Returns
    -------
    dict of str to list of float
        For each bin with at least :data:`FEWEST_IMAGES` images: ``confidence``, the mean
        probability; ``frequency``, the share that is of the class, with its 95% interval ``low``
        to ``high``; and ``count``, the number of (time, path) pairs.
    """
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
            drawn = (weights @ (of_path * evidence.forbidden)) / (weights @ of_path)
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        values = (
            posterior[here].mean(),
            (here & evidence.forbidden).sum() / here.sum(),
            low,
            high,
            here.sum(),
        )
        for name, value in zip(out, values, strict=True):
            out[name].append(float(value))
    return out


# ---------------------------------------------------------------------- how long it takes


def seconds_to_fit(images: int, paths: int, steps: int) -> float:
    """Estimated seconds that :func:`calibrate` takes here, from timing the loss at that size."""
    count = images * paths
    coefficients = NoiseSchedule.linear().respace(steps).coefficients(DDPM())
    nothing = np.zeros((len(coefficients), count))
    image = np.repeat(np.arange(images), paths)
    evidence = Evidence(image < 1, image, coefficients, nothing, nothing)
    problem = _Problem(evidence, "paper", 0.5, KNOTS)
    thetas = np.zeros((LOSSES_A_STEP, len(KNOTS) + 1))
    return LOSSES_A_CALIBRATION * seconds_of(lambda: problem.per_image(thetas), 0.1)


# ---------------------------------------------------------------------- the calibration


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted hyperparameters of trackers, and what they gained, for one forgotten class.

    Attributes
    ----------
    about : dict
        Data set, classes, networks, and numbers of images, paths and steps.
    fits : dict of str to Fitted
        "paper" and "log-odds", or "path", have a temperature that varies over time; those with
        ", constant" after the name have one temperature.
    report : dict
        ``time``, a list of S + 1 numbers, and for each fit, for the settings that it is compared
        with and for "prior alone" the result of :func:`curves` and, as ``reliability``, that of
        :func:`reliability`.
    """

    about: dict[str, Any]
    fits: dict[str, Fitted]
    report: dict[str, Any]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The trackers that were fitted."""
        return tuple(kind for kind in TRACKERS if kind in self.fits)

    def tracker(self, kind: Kind, *, varying: bool = True) -> AnyTracker:
        """The calibrated tracker.

        Parameters
        ----------
        kind : {"paper", "log-odds", "path"}
        varying : bool
            Whether the temperature varies over time; otherwise there is one.

        Raises
        ------
        ValueError
            If ``kind`` is not one that was fitted.
        """
        checks.choice("kind", kind, self.kinds)
        return self.fits[_fit_name(kind, varying)].make()

    def save(self, path: Path | str) -> None:
        """Write a JSON file; an interrupted write leaves no partial file.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        told = {
            "version": VERSION,
            "about": self.about,
            "fits": {name: asdict(each) for name, each in self.fits.items()},
            "report": _shortened(self.report),
        }
        files.write_text(path, json.dumps(told, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read a calibration that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, of another version or no calibration.
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
        for kind in OF_POINTS if OF_POINTS[0] in listed else OF_STEPS:
            for name in (_fit_name(kind, True), _fit_name(kind, False)):
                where = f"{name!r} in {path}"
                fits[name] = Fitted.from_json(foreign.member(listed, name, dict, path), where)
                if fits[name].tracker != kind:
                    raise ValueError(f"{where} is a fit of the {fits[name].tracker!r} tracker")
        report = foreign.member(told, "report", dict, path)
        _check_report(report, path)
        return cls(about, fits, report)


def _check_report(report: dict[str, Any], path: Path) -> None:
    """Raise a ValueError unless every curve of a report has a number for each time."""
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
    """The same with every number rounded to five digits, which are enough for figures."""
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return float(f"{value:.5g}")


def _fit_name(kind: Kind, varying: bool) -> str:
    return kind if varying else f"{kind}, constant"


def calibrate(
    evidence: AnyEvidence,
    *,
    prior: float,
    before: Mapping[str, AnyTracker] | None = None,
    about: dict[str, Any] | None = None,
    progress: str | None = None,
) -> Calibration:
    """Fit trackers, with one temperature and with one that varies, and judge every fit.

    Parameters
    ----------
    evidence : Evidence or PathEvidence
        Evidence from held-out images: of :func:`dng_models.class_removal.evidence.collect` for the
        paper's and the log-odds tracker, of
        :func:`dng_models.class_removal.evidence.collect_along_paths` for the path tracker.
    prior : float
        The forbidden class's share of the data, in (0, 1).
    before : dict of str to tracker, optional
        Uncalibrated trackers to compare with, such as the paper's, by name.
    about : dict, optional
        Description of the data and the networks, stored with the calibration.
    progress : str, optional
        Name on a progress bar; None shows none.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        If ``prior`` is no number in (0, 1).
    """
    share = float(np.mean(evidence.forbidden))
    nothing = np.full(
        (len(evidence.coefficients) + 1, len(evidence.forbidden)), special.logit(share)
    )
    judged: dict[str, Array] = {"prior alone": nothing}
    judged |= {name: tracked(evidence, tracker) for name, tracker in (before or {}).items()}
    fits = {}
    variants = [(kind, times) for kind in _kinds(evidence) for times in (KNOTS, (0.0,))]
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
        "num_forbidden": len(np.unique(evidence.image[evidence.forbidden])),
        "num_paths": len(evidence.image),
        "steps": len(evidence.coefficients),
        "prior": prior,
        # With exact networks the mean over forbidden images ends at ln 1/p(c).
        "gain_forbidden": gain[:, evidence.forbidden].mean(axis=1).tolist(),
        "gain_others": gain[:, ~evidence.forbidden].mean(axis=1).tolist(),
    }
    report["time"] = np.append(evidence.coefficients.time, 0.0).tolist()
    return Calibration(told, fits, report)


def report_table(calibrations: Mapping[str, Calibration]) -> str:
    """A Markdown table of what calibrating gained, and of the evidence that the networks give.

    Parameters
    ----------
    calibrations : mapping of str to Calibration
        Calibrations of the same trackers, by forgotten class.

    Returns
    -------
    str
        One row per class.  First the log loss of the tracked posterior, averaged over diffusion
        time, in nats: for the class's share alone, for the settings before and for every fit
        (cross-fitted: each half of the images is judged by a fit to the other half).  Then the
        evidence for the class in images of it, in nats: where exact networks would end, ln 1/p(c);
        the largest mean that these networks reach, and when; and where they end.
    """
    lines: list[tuple[str, ...]] = []
    for name, calibration in calibrations.items():
        report, about = calibration.report, calibration.about
        fitted = ("prior alone", "time", *calibration.fits)
        losses = {
            "share alone": "prior alone",
            **{each: each for each in report if each not in fitted},
        }
        for i, kind in enumerate(calibration.kinds):
            titles = ("one temperature", "varying")
            if i:
                titles = (f"{kind}, one temperature", f"{kind}, varying")
            losses |= dict(zip(titles, (f"{kind}, constant", kind), strict=True))
        cells = {
            title: f"{report[each]['mean_log_loss'][0]:#.3g}".rstrip(".")
            for title, each in losses.items()
        }
        gain = np.array(about["gain_forbidden"])
        most = int(gain.argmax())
        cells["exact evidence"] = f"{-np.log(about['prior']):.1f}"
        cells["most, at t/T"] = f"{gain[most]:.1f}, {report['time'][most]:.2f}"
        cells["at the end"] = f"{gain[-1]:.1f}"
        if not lines:
            lines += [("forgotten", *cells), ("---", *("---:" for _ in cells))]
        lines.append((name.replace("|", r"\|"), *cells.values()))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
