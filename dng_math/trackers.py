"""The posterior p(c | x_t) of an unwanted component along a chain: exact, or tracked.

At each step a tracker compares the likelihoods of the step that was taken under the unwanted and
under the base transition, and adds the log ratio to its state (DNG Eq. 12).  It reads two numbers
per sample: ``gap_sq = |mu_c - mu|^2`` and ``residual_gap = (x_next - mu) . (mu_c - mu)``.

The paper's tracker keeps log p and clamps it.  The log-odds tracker compares with the rest of
the distribution instead of with the whole, so p stays in (0, 1) by construction.  Both assume that
the step is the DDPM transition; with less noise (eta < 1) they are wrong however many steps are
taken, unless the divergence of the scores is known (``divergence=True``; exact for mixtures).

The path tracker assumes no step.  The log ratio is a function of x and of the noise level, so its
difference between two points is a line integral, whoever moved the point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks, equations
from dng_math.schedules import TRACKER_VARIANCES, StepCoefficients, TrackerVariance

Array = NDArray[np.float64]
T = TypeVar("T")


def log_posterior_from_log_odds(log_odds: ArrayLike) -> Array:
    """log p from log p/(1-p), without overflow; any shape, float64."""
    return -np.logaddexp(0.0, -checks.known("log_odds", log_odds))


def log_odds_from_log_posterior(log_posterior: ArrayLike) -> Array:
    """log p/(1-p) from log p <= 0, any shape, float64; infinite at p = 1."""
    log_p = checks.known("log_posterior", log_posterior)
    if np.any(log_p > 0):
        raise ValueError(f"log_posterior must be <= 0, got {log_p.max()}")
    with np.errstate(divide="ignore"):
        return log_p - np.log(-np.expm1(log_p))


def refuse_no_coefficients(value: object) -> None:
    """Raise TypeError unless the value is a StepCoefficients."""
    if not isinstance(value, StepCoefficients):
        raise TypeError(
            "coefficients must be StepCoefficients (schedule.coefficients(sampler)), got "
            f"{checks.shown(value)}"
        )


def checked_statistics(
    state: ArrayLike, gap_sq: ArrayLike, residual_gap: ArrayLike, correction: ArrayLike
) -> None:
    """Check the shapes and values of the statistics that a tracker's update takes."""
    shape = checks.known("state", state).shape
    for name, value in (("gap_sq", gap_sq), ("residual_gap", residual_gap)):
        given = checks.reals(name, value)
        if given.shape != shape:
            raise ValueError(f"{name} must have the shape of state, {shape}, got {given.shape}")
        checks.array(name, given, shape)  # raises if not finite
        if name == "gap_sq" and np.any(given < 0):
            raise ValueError(f"gap_sq must be >= 0, got {given.min()}")
    given = checks.reals("correction", correction)
    if given.ndim and given.shape != shape:
        raise ValueError(f"correction must be a number or have shape {shape}, got {given.shape}")
    if not np.isfinite(given).all():
        raise ValueError(f"correction must be finite, got {given[~np.isfinite(given)][0]}")


def _probabilities(prior: ArrayLike) -> Array:
    values = checks.known("prior", prior)
    if np.any((values < 0) | (values > 1)):
        raise ValueError(f"prior must be in [0, 1], got {values[(values < 0) | (values > 1)][0]}")
    return values


@dataclass(frozen=True)
class TimeProfile:
    """A hyperparameter as a function of diffusion time: linear between knots, constant beyond.

    Networks err differently at different noise levels, so how far their log ratios can be trusted
    depends on the time.

    Parameters
    ----------
    times : sequence of float
        Knots, increasing, in [0, 1]; 1 is the noisy end (:attr:`StepCoefficients.time`).
    values : sequence of float
        Value at each knot, >= 0.

    Raises
    ------
    ValueError, TypeError
        If a knot is out of order or a value out of range.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        times = checks.array("times", self.times, ("knots",))
        values = checks.array("values", self.values, ("knots",))
        if len(times) == 0 or len(times) != len(values):
            raise ValueError(
                "times and values must have the same length, at least 1; "
                f"got {len(times)} and {len(values)}"
            )
        if times[0] < 0 or times[-1] > 1 or np.any(np.diff(times) <= 0):
            raise ValueError(f"times must increase strictly within [0, 1], got {self.times}")
        if np.any(values < 0):
            raise ValueError(f"values must be >= 0, got {self.values}")
        object.__setattr__(self, "times", tuple(times.tolist()))
        object.__setattr__(self, "values", tuple(values.tolist()))

    def over(self, coefficients: StepCoefficients) -> Array:
        """Mean of the profile over the interval of every step, shape (N,).

        Parameters
        ----------
        coefficients : StepCoefficients
            Steps of the run.

        Returns
        -------
        ndarray, shape (N,), float64

        Raises
        ------
        TypeError
            If ``coefficients`` are not StepCoefficients.
        """
        refuse_no_coefficients(coefficients)
        edges = np.append(coefficients.time, 0.0)
        # With every knot among the points the trapezoidal rule is exact.
        points = np.union1d(edges, self.times)
        value = np.interp(points, self.times, self.values)
        area = np.append(0.0, np.cumsum(np.diff(points) * (value[1:] + value[:-1]) / 2.0))
        return np.diff(np.interp(edges, points, area)) / np.diff(edges)


@dataclass(frozen=True)
class ExactPosterior:
    """The exact posterior p(c | x_t), computed from the mixture."""


@dataclass(frozen=True)
class _Tracker:
    """Hyperparameters that the trackers share.

    Parameters
    ----------
    prior : float, optional
        p(c) at the noisy end, in (0, 1) and within the tracker's limits (at least p_min; for a
        PaperTracker at most p_max).  Default: the mixture's own weight of c.
    temperature : float or TimeProfile
        Factor of the log likelihood ratio, >= 0; below 1 for networks, whose errors make the
        ratio overconfident.
    offset : float
        The paper's offset, added as offset / (2 v) at each step; its sum depends on the
        schedule and grows with the number of steps.
    offset_nats : float
        Offset in nats over the whole run, spread equally over its steps; its sum does not depend
        on the number of steps.
    p_min, p_max : float
        Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
    variance : {"matched", "small", "large", "published"}
        Variance that the tracker divides by; "matched" is that of the transition (of the drawn
        noise if eta = 1), and "published" with ``DDPM("large")`` is the published implementation.
        See :meth:`dng_math.StepCoefficients.tracker_variance`.
    divergence : bool
        Add the term that a sampler with eta < 1 needs; in a user-written loop, pass it to
        ``update`` as ``correction``, from :func:`dng_math.divergence_correction`.

    Raises
    ------
    ValueError, TypeError
        If a value is out of range.

    Examples
    --------
    Step i of a user-written deterministic loop, with ``c = schedule.coefficients(DDIM(0.0))`` and
    ``at = dng_math.predict(..., prediction_type="sample")``::

        x_next = c.x_factor[i] * x + c.x0_factor[i] * at.guided
        gap = c.transition_x0_factor[i] * (at.negative - at.base)
        residual = x_next - c.transition_x_factor[i] * x - c.transition_x0_factor[i] * at.base
        term = dng_math.divergence_correction(mixture, x, c, i, tracker, state, forbidden=[1])
        state = tracker.update(state, (gap**2).sum(-1), (residual * gap).sum(-1),
                               c.tracker_variance(tracker.variance)[i], len(c), term)
    """

    prior: float | None = None
    temperature: float | TimeProfile = 1.0
    offset: float = 0.0
    offset_nats: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99
    variance: TrackerVariance = "matched"
    divergence: bool = False
    _clamped_above: ClassVar[bool] = True  # p_max clamps the state, not only the odds

    def __post_init__(self) -> None:
        if self.prior is not None:
            checks.real("prior", self.prior, "in (0, 1)", 0.0, 1.0, closed="()")
        if not isinstance(self.temperature, TimeProfile):
            checks.non_negative("temperature", self.temperature)
        checks.finite("offset", self.offset)
        checks.finite("offset_nats", self.offset_nats)
        checks.real("p_max", self.p_max, "in (0, 1)", 0.0, 1.0, closed="()")
        checks.real("p_min", self.p_min, "in [0, p_max)", 0.0, self.p_max, closed="[)")
        ceiling = self.p_max if self._clamped_above else 1.0
        if self.prior is not None and not self.p_min <= self.prior <= ceiling:
            allowed = "[p_min, p_max]" if self._clamped_above else "[p_min, 1)"
            raise ValueError(
                f"prior must be in {allowed}, where the posterior is kept, with p_min = "
                f"{self.p_min!r} and p_max = {self.p_max!r}; got {self.prior!r}"
            )
        checks.choice("variance", self.variance, TRACKER_VARIANCES)
        checks.boolean("divergence", self.divergence)

    def _updated(self, state: Array, log_ratio: Array, variance: float, steps: int) -> Array:
        if isinstance(self.temperature, TimeProfile):
            raise TypeError(
                "temperature must be a number in an update: dng_math.trackers.at_steps gives "
                f"the tracker of each step; got {self.temperature!r}"
            )
        return equations.tracker_update(
            state,
            log_ratio,
            variance,
            self.temperature,
            self.offset,
            self.offset_nats / steps,
        )


def _with_parameters(tracker: type[T]) -> type[T]:
    """Append the shared parameters to a docstring (there are no docstrings under python -OO)."""
    if tracker.__doc__ and _Tracker.__doc__:
        tracker.__doc__ += _Tracker.__doc__.partition("\n")[2]
    return tracker


@_with_parameters
@dataclass(frozen=True)
class PaperTracker(_Tracker):
    """DNG Eq. 12 and Algorithm 2: log p, clamped to [log p_min, log p_max] after each step.

    The update is not normalised: without the clamp, p exceeds 1 for many samples.
    The state is log p, float64, any shape.
    """

    def init(self, prior: Array) -> Array:
        """State from p(c) at the noisy end, in [0, 1], any shape."""
        with np.errstate(divide="ignore"):
            return self._clamped(np.log(_probabilities(prior)))

    def update(
        self,
        state: Array,
        gap_sq: Array,
        residual_gap: Array,
        variance: float,
        steps: int,
        correction: Array | float = 0.0,
    ) -> Array:
        """State at the cleaner end of a step.

        Parameters
        ----------
        state, gap_sq, residual_gap : ndarray, same shape
            log p, |mu_c - mu|^2 and (x_next - mu) . (mu_c - mu).
        variance : float
            Variance of the transition, >= 0; at 0 the state is returned unchanged.
        steps : int
            Number of steps of the run, over which ``offset_nats`` is spread.
        correction : ndarray or float
            Divergence correction of the log ratio of c to the base.

        Raises
        ------
        ValueError, TypeError
            If the variance is negative or not finite, or steps is not a positive integer; or if
            a statistic has another shape than the state or is not finite.
        """
        checks.integer("steps", steps, 1)
        checked_statistics(state, gap_sq, residual_gap, correction)
        if checks.non_negative("variance", variance) == 0:
            return state
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, variance) + correction
        return self._clamped(self._updated(state, log_ratio, variance, steps))

    @property
    def bounds(self) -> tuple[float, float]:
        """log p_min and log p_max, between which the state is kept."""
        with np.errstate(divide="ignore"):
            return float(np.log(self.p_min)), float(np.log(self.p_max))

    def _clamped(self, log_posterior: Array) -> Array:
        return np.clip(log_posterior, *self.bounds)

    def log_posterior(self, state: Array) -> Array:
        """log p(c | x_t), which is the state; raises if it holds NaN."""
        return checks.known("state", state)

    def odds(self, state: Array) -> Array:
        """p / (1 - p) of a state."""
        posterior = np.exp(checks.known("state", state))
        return posterior / (1.0 - posterior)


@_with_parameters
@dataclass(frozen=True)
class LogOddsTracker(_Tracker):
    """The normalised tracker: c against the rest, whose mean is mu - odds gap.

    Derived; docs/theory.md, section 6.3.

    The state is log p/(1-p), float64, any shape, never below that of p_min; the odds that
    enter the update and the scale are capped at p_max / (1 - p_max).

    Use it with g >= 1/2.  A step that consists of the rule's own push alone, x_next - mu =
    -g o gap, adds -(1 + o) (1 + (2g - 1) o) |gap|^2 / (2v).  For g < 1/2 that is positive as soon
    as o > 1/(1 - 2g), and the tracked posterior grows without bound.
    """

    _clamped_above: ClassVar[bool] = False

    def init(self, prior: Array) -> Array:
        """State from p(c) at the noisy end, in [0, 1], any shape."""
        p = _probabilities(prior)
        with np.errstate(divide="ignore"):
            return self._clamped(np.log(p) - np.log1p(-p))

    def update(
        self,
        state: Array,
        gap_sq: Array,
        residual_gap: Array,
        variance: float,
        steps: int,
        correction: Array | float = 0.0,
    ) -> Array:
        """State at the cleaner end of a step; arguments as for :meth:`PaperTracker.update`.

        ``correction`` is the divergence correction of the log ratio of c to the rest.
        """
        checks.integer("steps", steps, 1)
        checked_statistics(state, gap_sq, residual_gap, correction)
        if checks.non_negative("variance", variance) == 0:
            return state
        log_ratio = equations.log_odds_ratio(self.odds(state), gap_sq, residual_gap, variance)
        return self._clamped(self._updated(state, log_ratio + correction, variance, steps))

    @property
    def bounds(self) -> tuple[float, float]:
        """The log-odds of p_min, which the state stays above, and of p_max, which caps the odds."""
        with np.errstate(divide="ignore"):
            low, high = (np.log(p) - np.log1p(-p) for p in (self.p_min, self.p_max))
        return float(low), float(high)

    def _clamped(self, log_odds: Array) -> Array:
        return np.maximum(log_odds, self.bounds[0])

    def log_posterior(self, state: Array) -> Array:
        """log p(c | x_t) of a state; raises if it holds NaN."""
        return log_posterior_from_log_odds(checks.known("state", state))

    def odds(self, state: Array) -> Array:
        """p / (1 - p) of a state, capped at p_max / (1 - p_max)."""
        return np.exp(np.minimum(checks.known("state", state), self.bounds[1]))


class PathWay(NamedTuple):
    """The numbers of the way between two points, for a path tracker.

    Derived; docs/theory.md, section 6.11.

    With ``w = here x_s + there x_t``, and differences of predictions of x0, the ends of the line
    integral are ``pull (difference . w) - weight rate``, each with the numbers of its end.
    """

    here: float
    there: float
    pull: float
    pull_before: float
    weight: float
    weight_before: float


# Largest posterior in the weights 1 + o of the log-odds' update.  They amplify every error of the
# log ratio: with larger ones a chain with noise runs away upward, and forgets what it then sees.
LARGEST_WEIGHED = 0.99

# Up to this alpha/sigma at the noisier point the trapezoid is in x/sigma and alpha/sigma, from
# there on in x/alpha and log(sigma/alpha): measured, docs/theory.md, section 6.11.
NOISY = 2.0


def path_way(alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> PathWay:
    """The way from a point at (alpha_t, sigma_t) to one at (alpha_s, sigma_s).

    Parameters
    ----------
    alpha_t, sigma_t, alpha_s, sigma_s : float
        Noise levels, sigma > 0 and alpha_s > 0; sigma/alpha does not grow.
    """
    rho_t, rho_s = alpha_t / sigma_t, alpha_s / sigma_s
    if rho_t == 0.0:
        return PathWay(0.0, 1.0 / sigma_t, -rho_s, rho_s, 2.0, 0.0)
    k = rho_s / rho_t
    here, there = -1.0 / (k * sigma_s), 1.0 / sigma_t
    if rho_t < NOISY:
        return PathWay(here, there, -rho_s, -rho_s, 2.0 * (1.0 - 1.0 / k), 2.0 * (k - 1.0))
    log_ratio = 2.0 * math.log(k)
    return PathWay(here, there, -k * rho_s, -rho_t, log_ratio, log_ratio)


@dataclass(frozen=True)
class PathTracker:
    """The posterior as a line integral along the points that were evaluated, for any sampler.

    Derived; docs/theory.md, section 6.11.

    log p(x_t | c) / p(x_t) is a function of the point and its noise level.  Its gradient is the
    difference of two scores, and its rate in the noise level follows from both scores and their
    divergences.  The trapezoid of both between consecutive points is all that is added: nothing
    is assumed of the sampler, its noise, guidance, or whatever else moved the point.  It needs the
    divergence: exact for mixtures, estimated with ``probes`` forward derivatives for networks.

    The state is log p/(1-p) for ``compare="rest"`` and log p for ``compare="base"``, float64, any
    shape.  It is that of the last point at which predictions were made, and so it is updated
    before a step and not after it.

    Parameters
    ----------
    prior : float, optional
        p(c) at infinite noise, in (0, 1) and at least p_min, with ``compare="base"`` at most
        p_max.  Default: the mixture's own weight of c.
    temperature : float or TimeProfile
        Factor of the log ratio, >= 0; below 1 for networks, whose errors make it overconfident.
    offset_nats : float
        Offset in nats over the whole run, spread equally over its steps.
    p_min, p_max : float
        Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
    compare : {"rest", "base"}
        "rest" multiplies the change of log p by 1 + o, with the tracked odds o of p up to 0.99, so
        that p stays in (0, 1).  "base" is linear in the predictions, but p can pass 1 before it is
        clamped; it is for a base that is no mixture with c in it, such as another prompt.
    probes : int
        Random directions for each divergence of networks, >= 0.  With 0 there are no derivatives:
        the tracker is then the :class:`LogOddsTracker` (or, for "base", the
        :class:`PaperTracker`), and right for samplers with DDPM's noise only.

    Raises
    ------
    ValueError, TypeError
        If a value is out of range.

    Examples
    --------
    A user-written loop over noise levels, with any step::

        previous = None
        state = tracker.init(np.full((1, len(x)), 0.25))
        for alpha, sigma in levels:
            before, after = dng_math.path_ends(
                mixture, x, alpha, sigma, previous=previous, forbidden=[1]
            )
            state = tracker.update(state, before, after, len(levels))
            previous = x, alpha, sigma
            x = any_step(x, tracker.odds(state))
    """

    prior: float | None = None
    temperature: float | TimeProfile = 1.0
    offset_nats: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99
    compare: Literal["rest", "base"] = "rest"
    probes: int = 1
    offset: ClassVar[float] = 0.0  # the paper's is divided by a variance, and there is none
    variance: ClassVar[TrackerVariance] = "matched"
    divergence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.choice("compare", self.compare, ("rest", "base"))
        checks.integer("probes", self.probes, 0)
        self.first_order  # noqa: B018 - checks what the trackers share

    @property
    def first_order(self) -> PaperTracker | LogOddsTracker:
        """The tracker of transitions with these hyperparameters; the one that probes=0 means."""
        kind = LogOddsTracker if self.compare == "rest" else PaperTracker
        return kind(
            prior=self.prior,
            temperature=self.temperature,
            offset_nats=self.offset_nats,
            p_min=self.p_min,
            p_max=self.p_max,
        )

    def init(self, prior: Array) -> Array:
        """State from p(c) at infinite noise, in [0, 1], any shape."""
        return self.first_order.init(prior)

    def update(self, state: Array, before: Array, after: Array, steps: int) -> Array:
        """State at a point, from the state at the point before it.

        Parameters
        ----------
        state : ndarray
            State at the previous point, or of :meth:`init` for the first point.
        before, after : ndarray, shape of state
            The two ends of the line integral of log p(x | c)/p(x), in nats:
            :func:`dng_math.path_ends`.
        steps : int
            Number of steps of the run, for ``offset_nats``.

        Returns
        -------
        ndarray, shape of state

        Raises
        ------
        ValueError, TypeError
            If the temperature is a profile (:func:`dng_math.trackers.at_steps`), steps is not a
            positive integer, or an end has another shape than the state or is not finite.
        """
        checks.integer("steps", steps, 1)
        if isinstance(self.temperature, TimeProfile):
            raise TypeError(
                "temperature must be a number in an update: dng_math.trackers.at_steps gives "
                f"the tracker of each step; got {self.temperature!r}"
            )
        shape = checks.known("state", state).shape
        for name, value in (("before", before), ("after", after)):
            given = checks.reals(name, value)
            if given.shape != shape:
                raise ValueError(f"{name} must have the shape of state, {shape}, got {given.shape}")
            checks.array(name, given, shape)  # raises if not finite
        odds: Array | float = 0.0
        next_odds: Array | float = 0.0
        if self.compare == "rest":
            p_max = min(self.p_max, LARGEST_WEIGHED)
            odds = np.minimum(self.odds(state), p_max / (1.0 - p_max))
            # The odds at the point itself, predicted by the linear form: an explicit second order.
            predicted = -np.logaddexp(0.0, -state) + self.temperature * 0.5 * (before + after)
            p = np.exp(np.minimum(predicted, np.log(p_max)))
            next_odds = p / (1.0 - p)
        log_ratio = equations.path_log_ratio(before, after, odds, next_odds)
        return self._clamped(state + self.temperature * log_ratio + self.offset_nats / steps)

    @property
    def bounds(self) -> tuple[float, float]:
        """As for the tracker of :attr:`first_order`."""
        return self.first_order.bounds

    def _clamped(self, state: Array) -> Array:
        return self.first_order._clamped(state)

    def log_posterior(self, state: Array) -> Array:
        """log p(c | x_t) of a state; raises if it holds NaN."""
        return self.first_order.log_posterior(state)

    def odds(self, state: Array) -> Array:
        """p / (1 - p) of a state, capped at p_max / (1 - p_max)."""
        return self.first_order.odds(state)


@dataclass(frozen=True)
class RatioTracker:
    """FBG's estimate of L = log p(positive | x_t) / p(positive) up to a constant, clamped."""

    temperature: float
    step_offset: float
    low: float
    high: float
    divergence: ClassVar[bool] = False
    variance: ClassVar[Literal["matched"]] = "matched"

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest L."""
        return self.low, self.high

    def init(self, prior: Array) -> Array:
        """L = 0 at the noisy end, whatever the prior, or the limit nearest to 0."""
        return np.clip(np.zeros_like(prior), self.low, self.high)

    def update(
        self,
        state: Array,
        gap_sq: Array,
        residual_gap: Array,
        variance: float,
        steps: int,
        correction: Array | float = 0.0,
    ) -> Array:
        """L at the cleaner end of a step; see :meth:`PaperTracker.update`."""
        checked_statistics(state, gap_sq, residual_gap, correction)
        if checks.non_negative("variance", variance) == 0:
            return state
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, variance)
        updated = equations.tracker_update(
            state, log_ratio, variance, self.temperature, 0.0, self.step_offset
        )
        return np.clip(updated, self.low, self.high)

    def log_posterior(self, state: Array) -> Array:
        """The state L itself, which is a log ratio and not a log probability."""
        return state

    def odds(self, state: Array) -> Array:
        """e^L."""
        return np.exp(state)


Tracker = PaperTracker | LogOddsTracker | PathTracker | RatioTracker
TrackerName = Literal["paper", "log-odds", "path"]
TRACKERS: dict[TrackerName, type[PaperTracker] | type[LogOddsTracker] | type[PathTracker]] = {
    "paper": PaperTracker,
    "log-odds": LogOddsTracker,
    "path": PathTracker,
}


def temperatures(tracker: Tracker, coefficients: StepCoefficients) -> Array:
    """Temperature of every step, shape (N,): the number, or a profile's mean over the step."""
    refuse_no_coefficients(coefficients)
    if isinstance(tracker, type) or not hasattr(tracker, "temperature"):
        raise TypeError(
            f"tracker must be a PaperTracker, LogOddsTracker or PathTracker, got "
            f"{checks.shown(tracker)}"
        )
    if isinstance(tracker.temperature, TimeProfile):
        return tracker.temperature.over(coefficients)
    return np.full(len(coefficients), tracker.temperature)


def at_steps(tracker: Tracker, coefficients: StepCoefficients) -> list[Tracker]:
    """One tracker for each step, with the temperature of that step as a number."""
    return [
        replace(tracker, temperature=float(value)) for value in temperatures(tracker, coefficients)
    ]
