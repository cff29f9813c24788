"""Noise schedules, and the coefficients of the reverse step between two of their times.

A schedule is a list of pairs ``(alpha, sigma)`` with ``x_t = alpha x0 + sigma eps``, from the
data at index 0 (``alpha = 1``, ``sigma = 0``) to the noise at index T.  A sampler turns each
pair of neighbouring times t -> s into one row ``x_s = A x_t + B x0 + sqrt(V) z``.  Every
first-order sampler has that form, so a chain runs all of them with the same code.  Rows go from
noisy to clean: row 0 of the coefficients starts at index T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks, equations

Array = NDArray[np.float64]
TrackerVariance = Literal["matched", "small", "large", "published"]
TRACKER_VARIANCES: tuple[TrackerVariance, ...] = ("matched", "small", "large", "published")
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


def x0_of(prediction_type: str, x: Any, prediction: Any, alpha: Any, sigma: Any) -> Any:
    """x0 from a network's prediction; numbers, arrays or tensors of shapes that broadcast.

    Parameters
    ----------
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        The noise, v = alpha eps - sigma x0, x0 itself, or eps - x0.
    x, prediction : float, ndarray or Tensor
        x_t = alpha x0 + sigma eps, and the prediction there.
    alpha, sigma : float or ndarray
        Noise level of x.

    Raises
    ------
    ValueError
        If ``prediction_type`` is none of these.
    """
    match prediction_type:
        case "epsilon":
            return equations.x0_from_noise(x, prediction, alpha, sigma)
        case "v_prediction":
            return equations.x0_from_velocity(x, prediction, alpha, sigma)
        case "flow_prediction":
            return equations.x0_from_flow(x, prediction, sigma)
        case "sample":
            return prediction
    raise ValueError(
        f"prediction_type must be one of {', '.join(map(repr, PREDICTION_TYPES))}, got "
        f"{prediction_type!r}"
    )


@dataclass(frozen=True, eq=False)
class StepCoefficients(checks.ReadOnly):
    """The reverse step of every interval of a schedule, noisiest first; float64, shape (N,).

    All arrays are read-only.

    Attributes
    ----------
    time : ndarray
        Time of the noisier end, in (0, 1].
    alpha_t, sigma_t, alpha_s, sigma_s : ndarray
        Noise levels of the noisier end t and the cleaner end s.
    alpha_ts, beta_ts : ndarray
        ``p(x_t | x_s) = N(alpha_ts x_s, beta_ts)``; for one DDPM step beta_ts is beta_t.
    x_factor, x0_factor, step_var : ndarray
        A, B and V of ``x_s = A x_t + B x0 + sqrt(V) z``.
    eta : ndarray
        Reverse noise relative to the DDPM posterior's: 1 ancestral, 0 deterministic.
    transition_x_factor, transition_x0_factor, transition_var : ndarray
        The transition that trackers compare: the sampler's own where eta = 1, the DDPM
        posterior's otherwise (a tracker's update is only defined for a noisy step).
    """

    time: Array
    alpha_t: Array
    sigma_t: Array
    alpha_s: Array
    sigma_s: Array
    alpha_ts: Array
    beta_ts: Array
    x_factor: Array
    x0_factor: Array
    step_var: Array
    eta: Array
    transition_x_factor: Array
    transition_x0_factor: Array
    transition_var: Array

    def __post_init__(self) -> None:
        columns = {name: checks.array(name, value, ("N",)) for name, value in vars(self).items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all columns must have the same length, got {lengths}")
        for name, column in columns.items():
            object.__setattr__(self, name, checks.frozen(column))

    def __len__(self) -> int:
        return len(self.time)

    def tracker_variance(self, choice: str = "matched") -> Array:
        """Variance that a tracker divides by; 0 where it must not update.

        Parameters
        ----------
        choice : {"matched", "small", "large", "published"}
            "matched" is ``transition_var``, which is the variance of the step's own noise if
            eta = 1.  "small" is the DDPM posterior's.  "large" is beta_ts.  "published" is the
            small one, but beta_ts at a last step that ends at sigma = 0, as in the published
            implementation.

        Returns
        -------
        ndarray, shape (N,)

        Raises
        ------
        ValueError, TypeError
            If ``choice`` is none of these.
        """
        checks.choice("choice", choice, TRACKER_VARIANCES)
        if choice == "matched":
            return self.transition_var
        if choice == "large":
            return self.beta_ts
        small = equations.posterior_variance(self.beta_ts, self.sigma_s, self.sigma_t)
        if choice == "published":
            return np.where(self.sigma_s == 0, self.beta_ts, small)
        return np.asarray(small)


class Sampler(Protocol):
    """Interface of a sampler: its coefficients on a schedule."""

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row per step, noisiest first."""
        ...


def _intervals(schedule: NoiseSchedule) -> dict[str, Array]:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}")
    alpha_t, alpha_s = schedule.alpha[:0:-1], schedule.alpha[-2::-1]
    sigma_t, sigma_s = schedule.sigma[:0:-1], schedule.sigma[-2::-1]
    alpha_ts = equations.transition_alpha(alpha_t, alpha_s)
    return {
        "time": schedule.time[:0:-1],
        "alpha_t": alpha_t,
        "sigma_t": sigma_t,
        "alpha_s": alpha_s,
        "sigma_s": sigma_s,
        "alpha_ts": alpha_ts,
        "beta_ts": added_variance(alpha_t, sigma_t, alpha_s, sigma_s),
    }


def added_variance(alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Array:
    """beta_ts, the variance of p(x_t | x_s), clamped at 0 against rounding; shape (N,)."""
    alpha_ts = equations.transition_alpha(alpha_t, alpha_s)
    return np.maximum(equations.transition_variance(sigma_t, sigma_s, alpha_ts), 0.0)


def step_factors(
    alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array, eta: float
) -> tuple[Array, Array, Array]:
    """A, B and V of the first-order step with noise eta (DDIM Eq. 12 and 16).

    ``V = eta^2 beta_ts sigma_s^2/sigma_t^2``, ``A = sqrt(sigma_s^2 - V)/sigma_t`` and
    ``B = alpha_s - alpha_t A``: eta = 1 is the DDPM posterior, eta = 0 the deterministic step.

    Parameters
    ----------
    alpha_t, sigma_t, alpha_s, sigma_s : ndarray, shape (N,)
        The two ends of each step; sigma_t > 0.
    eta : float
        Reverse noise relative to the DDPM posterior's, in [0, 1].

    Returns
    -------
    tuple of ndarray, each of shape (N,)
    """
    beta_ts = added_variance(alpha_t, sigma_t, alpha_s, sigma_s)
    variance = eta**2 * equations.posterior_variance(beta_ts, sigma_s, sigma_t)
    # sqrt(sigma_s^2 - V)/sigma_t without the subtraction, which cancels for small alpha_t.
    kept = (equations.transition_alpha(alpha_t, alpha_s) * sigma_s / sigma_t) ** 2
    x_factor = sigma_s / sigma_t * np.sqrt((1.0 - eta**2) + eta**2 * kept)
    return x_factor, alpha_s - alpha_t * x_factor, variance


def _posterior_factors(at: dict[str, Array]) -> tuple[Array, Array, Array]:
    """A, B and the small variance of p(x_s | x_t, x0); DDPM Eq. 7."""
    x_factor = at["alpha_ts"] * (at["sigma_s"] / at["sigma_t"]) ** 2
    x0_factor = at["alpha_s"] * at["beta_ts"] / at["sigma_t"] ** 2
    small = equations.posterior_variance(at["beta_ts"], at["sigma_s"], at["sigma_t"])
    return x_factor, x0_factor, np.asarray(small)


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho et al. 2020).

    Parameters
    ----------
    variance : {"small", "large"}
        Variance of the added noise: that of p(x_s | x_t, x0), or beta_ts.  A step that ends at
        sigma = 0 adds no noise with either.

    Raises
    ------
    ValueError, TypeError
        If ``variance`` is neither.
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        checks.choice("variance", self.variance, ("small", "large"))

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row per step, noisiest first; see :class:`StepCoefficients`."""
        at = _intervals(schedule)
        x_factor, x0_factor, small = _posterior_factors(at)
        variance = small
        if self.variance == "large":
            variance = np.where(at["sigma_s"] == 0, 0.0, at["beta_ts"])
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=variance,
            eta=np.ones_like(small),
            transition_x_factor=x_factor,
            transition_x0_factor=x0_factor,
            transition_var=variance,
        )


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021), from deterministic (eta = 0) to the DDPM posterior (eta = 1).

    Parameters
    ----------
    eta : float
        In [0, 1]; the noise variance is eta^2 times DDPM's small one (Eq. 16).

    Raises
    ------
    ValueError, TypeError
        If eta is not a number in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        checks.real("eta", self.eta, "in [0, 1]", 0.0, 1.0, closed="[]")

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row per step, noisiest first; see :class:`StepCoefficients`."""
        at = _intervals(schedule)
        mean_x, mean_x0, small = _posterior_factors(at)
        ends = (at["alpha_t"], at["sigma_t"], at["alpha_s"], at["sigma_s"])
        x_factor, x0_factor, step_var = step_factors(*ends, self.eta)
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=step_var,
            eta=np.full_like(small, self.eta),
            transition_x_factor=mean_x,
            transition_x0_factor=mean_x0,
            transition_var=small,
        )


def _euler(schedule: NoiseSchedule, noise: float) -> tuple[dict[str, Array], Array, Array, Array]:
    """Factors of the Euler step x - log(alpha_ts) x + (1 + noise)/2 beta_ts score, and variance."""
    at = _intervals(schedule)
    if np.any(at["alpha_t"] == 0):
        raise ValueError(
            "schedule must have alpha > 0 for an Euler step: its drift is infinite at alpha = 0. "
            "Use DDPM or DDIM, or schedule.select(...) without that time"
        )
    drift = -np.log(at["alpha_ts"])
    pull = 0.5 * (1.0 + noise) * at["beta_ts"] / at["sigma_t"] ** 2
    # The drift is singular at sigma = 0 and a step there would leave noise: return x0 instead.
    last = at["sigma_s"] == 0
    x_factor = np.where(last, 0.0, 1.0 + drift - pull)
    x0_factor = np.where(last, at["alpha_s"], pull * at["alpha_t"])
    return at, x_factor, x0_factor, np.where(last, 0.0, noise * at["beta_ts"])


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama on the reverse-time SDE (Song et al. 2021, Eq. 6), in time -log alpha.

    The last step, to sigma = 0, returns the predicted x0.
    """

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row per step, noisiest first; raises ValueError where alpha is 0."""
        at, x_factor, x0_factor, variance = _euler(schedule, 1.0)
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=variance,
            eta=np.ones_like(variance),
            transition_x_factor=x_factor,
            transition_x0_factor=x0_factor,
            transition_var=variance,
        )


@dataclass(frozen=True)
class ProbabilityFlow:
    """Explicit Euler on the probability-flow ODE (Song et al. 2021, Eq. 13).

    The last step, to sigma = 0, returns the predicted x0.  ``DDIM(eta=0)`` solves the same ODE
    exactly for a constant x0 prediction, and is the better integrator at few steps.
    """

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row per step, noisiest first; raises ValueError where alpha is 0."""
        at, x_factor, x0_factor, variance = _euler(schedule, 0.0)
        mean_x, mean_x0, small = _posterior_factors(at)
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=variance,
            eta=np.zeros_like(variance),
            transition_x_factor=mean_x,
            transition_x0_factor=mean_x0,
            transition_var=small,
        )


@dataclass(frozen=True, eq=False)
class NoiseSchedule(checks.ReadOnly):
    """Pairs (alpha, sigma) of ``x_t = alpha x0 + sigma eps``, from clean to noisy.

    Parameters
    ----------
    alpha, sigma : array_like, shape (T + 1,)
        Index 0 is the data: alpha = 1, sigma = 0.  alpha must not increase and
        sigma / alpha must increase strictly; alpha may reach 0 at index T.
    time : array_like, shape (T + 1,), optional
        Time of every index, increasing from 0 to 1; default index / T.  A respaced schedule keeps
        its times.

    Raises
    ------
    ValueError, TypeError
        If the schedule is not monotone or does not start at the data, or an argument is not a
        finite array of its shape.
    """

    alpha: Array
    sigma: Array
    time: Array

    def __init__(self, alpha: ArrayLike, sigma: ArrayLike, time: ArrayLike | None = None) -> None:
        alphas = checks.array("alpha", alpha, ("T + 1",))
        sigmas = checks.array("sigma", sigma, ("T + 1",))
        if len(alphas) != len(sigmas) or len(alphas) < 2:
            raise ValueError(
                f"alpha and sigma must have the same length, at least 2; "
                f"got {len(alphas)} and {len(sigmas)}"
            )
        if time is None:
            time = np.arange(len(alphas)) / (len(alphas) - 1)
        times = checks.array("time", time, (len(alphas),))
        if alphas[0] != 1 or sigmas[0] != 0:
            raise ValueError(
                f"alpha and sigma must start at the data, alpha[0] = 1 and sigma[0] = 0; "
                f"got {alphas[0]} and {sigmas[0]}"
            )
        if np.any(alphas < 0) or np.any(sigmas < 0):
            raise ValueError("alpha and sigma must be >= 0")
        falling = np.diff(alphas) <= 0
        # sigma / alpha increases, written without the division (alpha may end at 0).
        rising = sigmas[1:] * alphas[:-1] > sigmas[:-1] * alphas[1:]
        for rule, ok in (
            ("alpha must not increase", falling),
            ("sigma / alpha must increase strictly", rising),
        ):
            if not ok.all():
                i = int(np.argmin(ok))
                raise ValueError(
                    f"schedule is not monotone: {rule} from clean to noisy, but between index "
                    f"{i} and {i + 1} (alpha, sigma) goes from ({alphas[i]}, {sigmas[i]}) to "
                    f"({alphas[i + 1]}, {sigmas[i + 1]})"
                )
        if times[0] != 0 or times[-1] != 1 or np.any(np.diff(times) <= 0):
            raise ValueError(f"time must increase strictly from 0 to 1, got {times}")
        object.__setattr__(self, "alpha", checks.frozen(alphas))
        object.__setattr__(self, "sigma", checks.frozen(sigmas))
        object.__setattr__(self, "time", checks.frozen(times))

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.alpha) - 1

    def __repr__(self) -> str:
        """Number of steps and the noisy end."""
        return (
            f"NoiseSchedule({len(self)} steps, "
            f"alpha[-1]={self.alpha[-1]:.4g}, sigma[-1]={self.sigma[-1]:.4g})"
        )

    @classmethod
    def from_alpha_bar(cls, alpha_bar: ArrayLike) -> NoiseSchedule:
        """Variance-preserving schedule from alpha_bar at t = 1 ... T (diffusers' alphas_cumprod).

        Parameters
        ----------
        alpha_bar : array_like, shape (T,)
            In [0, 1), strictly decreasing; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

        Raises
        ------
        ValueError, TypeError
            If ``alpha_bar`` is not such an array.
        """
        bar = checks.array("alpha_bar", alpha_bar, ("T",))
        if len(bar) == 0 or np.any((bar < 0) | (bar >= 1)):
            raise ValueError(f"alpha_bar must be non-empty and in [0, 1), got {bar}")
        if np.any(np.diff(bar) >= 0):
            raise ValueError(f"alpha_bar must be strictly decreasing, got {bar}")
        bar = np.concatenate([[1.0], bar])
        return cls(np.sqrt(bar), np.sqrt(1.0 - bar))

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """Variance-preserving schedule from beta_1 ... beta_T; DDPM section 2.

        Parameters
        ----------
        betas : array_like, shape (T,)
            In (0, 1]; only the last may be 1.

        Raises
        ------
        ValueError, TypeError
            If ``betas`` are not such an array.
        """
        values = checks.array("betas", betas, ("T",))
        if len(values) == 0 or np.any((values <= 0) | (values > 1)):
            raise ValueError(f"betas must be non-empty and in (0, 1], got {values}")
        return cls.from_alpha_bar(np.cumprod(1.0 - values))

    @classmethod
    def power(
        cls, steps: int = 1000, rho: float = 1.0, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> NoiseSchedule:
        """Schedule with beta_t^(1/rho) linear in t, the published implementation's family.

        rho = 1 is :meth:`linear`, rho = 2 has the shape of :meth:`scaled_linear`.

        Parameters
        ----------
        steps : int
            Number of steps T, at least 1.
        rho : float
            Exponent, > 0.
        beta_min, beta_max : float
            beta_1 and beta_T, with 0 < beta_min <= beta_max < 1.

        Raises
        ------
        ValueError, TypeError
            If an argument is not a number of its range.
        """
        steps = checks.size("steps", steps, 1)
        rho = checks.positive("rho", rho)
        low = checks.real("beta_min", beta_min, "in (0, 1)", 0.0, 1.0, closed="()")
        high = checks.real("beta_max", beta_max, "in [beta_min, 1)", low, 1.0, closed="[)")
        return cls.from_betas(np.linspace(low ** (1 / rho), high ** (1 / rho), steps) ** rho)

    @classmethod
    def linear(
        cls, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> NoiseSchedule:
        """DDPM's schedule, beta_t linear in t; :meth:`respace` it for fewer steps.

        Arguments and errors are those of :meth:`power`.
        """
        return cls.power(steps, 1.0, beta_min, beta_max)

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule, sqrt(beta_t) linear in t.

        Arguments and errors are those of :meth:`power`.
        """
        return cls.power(steps, 2.0, beta_min, beta_max)

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
        """alpha_bar = cos^2((t/T + s)/(1 + s) pi/2), betas capped (arXiv 2102.09672, Eq. 17).

        Parameters
        ----------
        steps : int
            Number of steps T, at least 1.
        s : float
            Offset of t/T, >= 0.
        beta_max : float
            Cap of beta_t, in (0, 1).

        Raises
        ------
        ValueError, TypeError
            If an argument is not a number of its range.
        """
        steps = checks.size("steps", steps, 1)
        s = checks.non_negative("s", s)
        cap = checks.real("beta_max", beta_max, "in (0, 1)", 0.0, 1.0, closed="()")
        bar = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * (np.pi / 2)) ** 2
        return cls.from_betas(np.minimum(1.0 - bar[1:] / bar[:-1], cap))

    @classmethod
    def flow(cls, steps: int = 1000) -> NoiseSchedule:
        """Flow matching with ``steps`` steps: sigma = t/T, alpha = 1 - sigma, pure noise at T.

        Raises ValueError or TypeError if ``steps`` is not an integer >= 1.
        """
        sigma = np.linspace(0.0, 1.0, checks.size("steps", steps, 1) + 1)
        return cls(1.0 - sigma, sigma)

    @classmethod
    def variance_exploding(
        cls,
        steps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float | None = None,
    ) -> NoiseSchedule:
        """Alpha = 1 and sigma from sigma_min (t = 1) to sigma_max (t = T); sigma = 0 at t = 0.

        Parameters
        ----------
        steps : int
            Number of steps T, at least 2.
        sigma_min, sigma_max : float
            With 0 < sigma_min < sigma_max, in the units of the data.
        rho : float, optional
            None: geometric (Song et al. 2021).  Otherwise sigma^(1/rho) is linear in t; 7 is
            EDM's (arXiv 2206.00364, Eq. 5).

        Raises
        ------
        ValueError, TypeError
            If an argument is not a number of its range.
        """
        steps = checks.size("steps", steps, 2)
        low = checks.positive("sigma_min", sigma_min)
        high = checks.real("sigma_max", sigma_max, "> sigma_min", low, np.inf, closed="()")
        if rho is None:
            sigma = np.geomspace(low, high, steps)
        else:
            rho = checks.positive("rho", rho)
            sigma = np.linspace(low ** (1 / rho), high ** (1 / rho), steps) ** rho
        return cls(np.ones(steps + 1), np.concatenate([[0.0], sigma]))

    def select(
        self, indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]
    ) -> NoiseSchedule:
        """The schedule that visits only the given times.

        Index 0, the data, is added if it is missing.  The first-order coefficients between the
        remaining times are exact.  Times are kept, divided by the last one.

        Parameters
        ----------
        indices : sequence of int, or bool mask of shape (T + 1,)
            Indices from 0 to T, in any order.

        Raises
        ------
        ValueError, TypeError
            If ``indices`` are empty, not integers or a mask, or out of range.
        """
        given = checks.numpy_array("indices", indices, "integers")
        if given.dtype == np.bool_:
            if given.shape != (len(self) + 1,):
                raise ValueError(
                    f"indices as a mask must have shape ({len(self) + 1},), got {given.shape}"
                )
            given = np.flatnonzero(given)
        if given.ndim != 1 or given.size == 0:
            raise ValueError(f"indices must be a non-empty list, got {checks.shown(indices)}")
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"indices must be integers, got {checks.shown(indices)}")
        chosen = np.unique(np.concatenate([[0], given]))
        if len(chosen) < 2 or chosen[0] < 0 or chosen[-1] > len(self):
            raise ValueError(f"indices must be from 1 to {len(self)}, got {checks.shown(indices)}")
        time = self.time[chosen]
        return NoiseSchedule(self.alpha[chosen], self.sigma[chosen], time / time[-1])

    def respace(self, steps: int) -> NoiseSchedule:
        """The schedule in ``steps`` steps, evenly spaced in the index, from T to the data.

        Raises ValueError or TypeError if ``steps`` is not an integer from 1 to T.
        """
        steps = checks.integer("steps", steps, 1, len(self))
        return self.select(np.round(np.linspace(0, len(self), steps + 1)).astype(np.int64))

    def coefficients(self, sampler: Sampler | None = None) -> StepCoefficients:
        """Coefficients of every step for a sampler (default: DDPM with the small variance).

        Parameters
        ----------
        sampler : DDPM, DDIM, EulerMaruyama or ProbabilityFlow, optional

        Returns
        -------
        StepCoefficients

        Raises
        ------
        TypeError
            If ``sampler`` is not a sampler, or its result is not StepCoefficients of this schedule.
        ValueError
            If the sampler needs alpha > 0 and the schedule ends at alpha = 0.
        """
        sampler = DDPM() if sampler is None else sampler
        if isinstance(sampler, type) or not hasattr(sampler, "coefficients"):
            raise TypeError(
                "sampler must be a DDPM, DDIM, EulerMaruyama or ProbabilityFlow (an object, not "
                f"the class), got {checks.shown(sampler)}"
            )
        coefficients = sampler.coefficients(self)
        if not isinstance(coefficients, StepCoefficients) or len(coefficients) != len(self):
            raise TypeError(
                f"sampler must return StepCoefficients of {len(self)} steps from its coefficients, "
                f"got {checks.shown(coefficients)} from {checks.shown(sampler)}"
            )
        return coefficients
