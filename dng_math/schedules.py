"""Noise schedules, and the coefficients of the reverse step between two of their times.

A schedule is a list of pairs ``(alpha, sigma)`` with ``x_t = alpha x0 + sigma eps``, from the
data at index 0 (``alpha = 1``, ``sigma = 0``) to the noise at index T.  A sampler turns each
pair of neighbouring times t -> s into one row ``x_s = A x_t + B x0 + sqrt(V) z``; every
first-order sampler has that form, so the chain that runs them knows none of them by name.
Times are crossed from noisy to clean: row 0 of the coefficients starts at index T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import _checks, equations

Array = NDArray[np.float64]
TrackerVariance = Literal["matched", "small", "large", "published"]
TRACKER_VARIANCES: tuple[TrackerVariance, ...] = ("matched", "small", "large", "published")


def x0_of(kind: str, x: Any, prediction: Any, alpha: Any, sigma: Any) -> Any:
    """x0 of what a network returns; numbers, arrays or tensors of shapes that broadcast.

    Parameters
    ----------
    kind : {"epsilon", "v_prediction", "sample", "flow"}
        The noise, v = alpha eps - sigma x0, x0 itself, or eps - x0.
    x, prediction : float, ndarray or Tensor
        x_t = alpha x0 + sigma eps, and the prediction there.
    alpha, sigma : float or ndarray
        Of the schedule.
    """
    match kind:
        case "epsilon":
            return equations.x0_from_noise(x, prediction, alpha, sigma)
        case "v_prediction":
            return equations.x0_from_velocity(x, prediction, alpha, sigma)
        case "flow":
            return equations.x0_from_flow(x, prediction, sigma)
        case "sample":
            return prediction
    raise ValueError(f"kind must be 'epsilon', 'v_prediction', 'sample' or 'flow', got {kind!r}")


@dataclass(frozen=True, eq=False)
class StepCoefficients(_checks.ReadOnly):
    """The reverse step of every interval of a schedule, noisiest first; float64, shape (N,).

    All arrays are read-only.

    Attributes
    ----------
    time : ndarray
        Index of the noisier end over T, in (0, 1].
    alpha_t, sigma_t, alpha_s, sigma_s : ndarray
        The noisier end t and the cleaner end s.
    alpha_ts, beta_ts : ndarray
        ``p(x_t | x_s) = N(alpha_ts x_s, beta_ts)``; for one DDPM step beta_ts is beta_t.
    x_factor, x0_factor, step_var : ndarray
        A, B and V of ``x_s = A x_t + B x0 + sqrt(V) z``.
    eta : ndarray
        Reverse noise relative to the DDPM posterior's: 1 ancestral, 0 deterministic.
    kernel_x_factor, kernel_x0_factor, kernel_var : ndarray
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
    kernel_x_factor: Array
    kernel_x0_factor: Array
    kernel_var: Array

    def __post_init__(self) -> None:
        columns = {name: _checks.array(name, value, ("N",)) for name, value in vars(self).items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all columns must have the same length, got {lengths}")
        for name, column in columns.items():
            object.__setattr__(self, name, _checks.frozen(column))

    def __len__(self) -> int:
        return len(self.time)

    def tracker_variance(self, choice: str = "matched") -> Array:
        """Variance that a tracker divides by; 0 where it must not update.

        Parameters
        ----------
        choice : {"matched", "small", "large", "published"}
            "matched" is the variance of the step's own noise.  "small" is the DDPM posterior's.
            "large" is beta_ts.  "published" is the small one with beta_ts at a last step that
            ends at sigma = 0, as the published implementation has it.

        Returns
        -------
        ndarray, shape (N,)
        """
        _checks.choice("choice", choice, TRACKER_VARIANCES)
        if choice == "matched":
            return self.kernel_var
        if choice == "large":
            return self.beta_ts
        small = equations.posterior_variance(self.beta_ts, self.sigma_s, self.sigma_t)
        if choice == "published":
            return np.where(self.sigma_s == 0, self.beta_ts, small)
        return np.asarray(small)


class Sampler(Protocol):
    """What :func:`dng_math.sample` needs of a sampler: its coefficients on a schedule."""

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row a step, noisiest first."""
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
        "beta_ts": equations.transition_variance(sigma_t, sigma_s, alpha_ts),
    }


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
        Of the noise: that of p(x_s | x_t, x0), or beta_ts.  A step that ends at sigma = 0 adds
        no noise with either.
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        _checks.choice("variance", self.variance, ("small", "large"))

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row a step, noisiest first; see :class:`StepCoefficients`."""
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
            kernel_x_factor=x_factor,
            kernel_x0_factor=x0_factor,
            kernel_var=variance,
        )


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021), from deterministic (eta = 0) to the DDPM posterior (eta = 1).

    Parameters
    ----------
    eta : float
        In [0, 1]; the noise variance is eta^2 times DDPM's small one (Eq. 16).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        _checks.real("eta", self.eta, "in [0, 1]", 0.0, 1.0, closed="[]")

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row a step, noisiest first; see :class:`StepCoefficients`."""
        at = _intervals(schedule)
        kernel_x, kernel_x0, small = _posterior_factors(at)
        # sqrt(sigma_s^2 - V) / sigma_t with V = eta^2 small, written without the subtraction.
        kept = (at["alpha_ts"] * at["sigma_s"] / at["sigma_t"]) ** 2
        noise_kept = np.sqrt((1.0 - self.eta**2) + self.eta**2 * kept)
        x_factor = at["sigma_s"] / at["sigma_t"] * noise_kept
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=at["alpha_s"] - at["alpha_t"] * x_factor,
            step_var=self.eta**2 * small,
            eta=np.full_like(small, self.eta),
            kernel_x_factor=kernel_x,
            kernel_x0_factor=kernel_x0,
            kernel_var=small,
        )


def _euler(schedule: NoiseSchedule, noise: float) -> tuple[dict[str, Array], Array, Array, Array]:
    """x + (-log alpha_ts) x + (1 + noise)/2 beta_ts score, as factors of x and x0."""
    at = _intervals(schedule)
    if np.any(at["alpha_t"] == 0):
        raise ValueError(
            "schedule must have alpha > 0 for an Euler step: its drift is infinite at alpha = 0. "
            "Use DDPM or DDIM, or schedule.select(...) without that time"
        )
    drift = -np.log(at["alpha_ts"])
    pull = 0.5 * (1.0 + noise) * at["beta_ts"] / at["sigma_t"] ** 2
    # A step to sigma = 0 would leave noise behind (the drift is singular there): it goes to x0.
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
        """One row a step, noisiest first; raises ValueError where alpha is 0."""
        at, x_factor, x0_factor, variance = _euler(schedule, 1.0)
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=variance,
            eta=np.ones_like(variance),
            kernel_x_factor=x_factor,
            kernel_x0_factor=x0_factor,
            kernel_var=variance,
        )


@dataclass(frozen=True)
class ProbabilityFlow:
    """Explicit Euler on the probability-flow ODE (Song et al. 2021, Eq. 13).

    The last step, to sigma = 0, returns the predicted x0.  ``DDIM(eta=0)`` solves the same ODE
    exactly for a constant x0 prediction, and is the better integrator at few steps.
    """

    def coefficients(self, schedule: NoiseSchedule) -> StepCoefficients:
        """One row a step, noisiest first; raises ValueError where alpha is 0."""
        at, x_factor, x0_factor, variance = _euler(schedule, 0.0)
        kernel_x, kernel_x0, small = _posterior_factors(at)
        return StepCoefficients(
            **at,
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=variance,
            eta=np.zeros_like(variance),
            kernel_x_factor=kernel_x,
            kernel_x0_factor=kernel_x0,
            kernel_var=small,
        )


@dataclass(frozen=True, eq=False)
class NoiseSchedule(_checks.ReadOnly):
    """Pairs (alpha, sigma) of ``x_t = alpha x0 + sigma eps``, from clean to noisy.

    Parameters
    ----------
    alpha, sigma : array_like, shape (T + 1,)
        Index 0 is the data: alpha = 1, sigma = 0.  alpha must not increase and
        sigma / alpha must increase strictly; alpha may reach 0 at index T.
    time : array_like, shape (T + 1,), optional
        Increasing from 0 to 1; default index / T.  A respaced schedule keeps its times.

    Raises
    ------
    ValueError
        If the schedule is not monotone, or does not start at the data.
    """

    alpha: Array
    sigma: Array
    time: Array

    def __init__(self, alpha: ArrayLike, sigma: ArrayLike, time: ArrayLike | None = None) -> None:
        alphas = _checks.array("alpha", alpha, ("T + 1",))
        sigmas = _checks.array("sigma", sigma, ("T + 1",))
        if len(alphas) != len(sigmas) or len(alphas) < 2:
            raise ValueError(
                f"alpha and sigma must have the same length, at least 2; "
                f"got {len(alphas)} and {len(sigmas)}"
            )
        if time is None:
            time = np.arange(len(alphas)) / (len(alphas) - 1)
        times = _checks.array("time", time, (len(alphas),))
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
        object.__setattr__(self, "alpha", _checks.frozen(alphas))
        object.__setattr__(self, "sigma", _checks.frozen(sigmas))
        object.__setattr__(self, "time", _checks.frozen(times))

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
        """Variance preserving, from alpha_bar at t = 1 ... T (diffusers' alphas_cumprod).

        Parameters
        ----------
        alpha_bar : array_like, shape (T,)
            In [0, 1), strictly decreasing; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).
        """
        bar = _checks.array("alpha_bar", alpha_bar, ("T",))
        if len(bar) == 0 or np.any((bar < 0) | (bar >= 1)):
            raise ValueError(f"alpha_bar must be non-empty and in [0, 1), got {bar}")
        if np.any(np.diff(bar) >= 0):
            raise ValueError(f"alpha_bar must be strictly decreasing, got {bar}")
        bar = np.concatenate([[1.0], bar])
        return cls(np.sqrt(bar), np.sqrt(1.0 - bar))

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """Variance preserving, from beta_1 ... beta_T in (0, 1); DDPM section 2."""
        values = _checks.array("betas", betas, ("T",))
        if len(values) == 0 or np.any((values <= 0) | (values > 1)):
            raise ValueError(f"betas must be non-empty and in (0, 1], got {values}")
        return cls.from_alpha_bar(np.cumprod(1.0 - values))

    @classmethod
    def power(
        cls, steps: int = 1000, rho: float = 1.0, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> NoiseSchedule:
        """beta_t^(1/rho) linear in t, the published implementation's family.

        rho = 1 is :meth:`linear`, rho = 2 has the shape of :meth:`scaled_linear`.
        """
        steps = _checks.size("steps", steps, 1)
        rho = _checks.positive("rho", rho)
        low = _checks.real("beta_min", beta_min, "in (0, 1)", 0.0, 1.0, closed="()")
        high = _checks.real("beta_max", beta_max, "in [beta_min, 1)", low, 1.0, closed="[)")
        return cls.from_betas(np.linspace(low ** (1 / rho), high ** (1 / rho), steps) ** rho)

    @classmethod
    def linear(
        cls, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> NoiseSchedule:
        """DDPM's schedule, beta_t linear in t.  For fewer steps of it, :meth:`respace`."""
        return cls.power(steps, 1.0, beta_min, beta_max)

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule, sqrt(beta_t) linear in t."""
        return cls.power(steps, 2.0, beta_min, beta_max)

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
        """alpha_bar = cos^2((t/T + s)/(1 + s) pi/2), betas capped (arXiv 2102.09672, Eq. 17)."""
        steps = _checks.size("steps", steps, 1)
        s = _checks.non_negative("s", s)
        cap = _checks.real("beta_max", beta_max, "in (0, 1)", 0.0, 1.0, closed="()")
        bar = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * (np.pi / 2)) ** 2
        return cls.from_betas(np.minimum(1.0 - bar[1:] / bar[:-1], cap))

    @classmethod
    def flow(cls, steps: int = 1000) -> NoiseSchedule:
        """Flow matching: sigma = t/T and alpha = 1 - sigma, to pure noise at T."""
        sigma = np.linspace(0.0, 1.0, _checks.size("steps", steps, 1) + 1)
        return cls(1.0 - sigma, sigma)

    @classmethod
    def variance_exploding(
        cls,
        steps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float | None = None,
    ) -> NoiseSchedule:
        """Alpha = 1 and sigma from sigma_min (t = 1) to sigma_max (t = T), then 0 at t = 0.

        Parameters
        ----------
        rho : float, optional
            None: geometric (Song et al. 2021).  Otherwise sigma^(1/rho) is linear in t; 7 is
            EDM's (arXiv 2206.00364, Eq. 5).
        """
        steps = _checks.size("steps", steps, 2)
        low = _checks.positive("sigma_min", sigma_min)
        high = _checks.real("sigma_max", sigma_max, "> sigma_min", low, np.inf, closed="()")
        if rho is None:
            sigma = np.geomspace(low, high, steps)
        else:
            rho = _checks.positive("rho", rho)
            sigma = np.linspace(low ** (1 / rho), high ** (1 / rho), steps) ** rho
        return cls(np.ones(steps + 1), np.concatenate([[0.0], sigma]))

    def select(
        self, indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]
    ) -> NoiseSchedule:
        """The schedule that visits only the given times.

        Index 0, the data, is added if it is missing.  The first-order coefficients between the
        times that are left are exact, so nothing else changes.

        Parameters
        ----------
        indices : sequence of int, or bool mask of shape (T + 1,)
            Into 0 ... T, in any order.
        """
        given = _checks.numpy_array("indices", indices, "integers")
        if given.dtype == np.bool_:
            if given.shape != (len(self) + 1,):
                raise ValueError(
                    f"indices as a mask must have shape ({len(self) + 1},), got {given.shape}"
                )
            given = np.flatnonzero(given)
        if given.ndim != 1 or given.size == 0:
            raise ValueError(f"indices must be a non-empty list, got {_checks.shown(indices)}")
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"indices must be integers, got {_checks.shown(indices)}")
        chosen = np.unique(np.concatenate([[0], given]))
        if len(chosen) < 2 or chosen[0] < 0 or chosen[-1] > len(self):
            raise ValueError(f"indices must be from 1 to {len(self)}, got {_checks.shown(indices)}")
        time = self.time[chosen]
        return NoiseSchedule(self.alpha[chosen], self.sigma[chosen], time / time[-1])

    def respace(self, steps: int) -> NoiseSchedule:
        """The schedule in ``steps`` steps, evenly spaced in the index, from T to the data."""
        steps = _checks.integer("steps", steps, 1, len(self))
        return self.select(np.round(np.linspace(0, len(self), steps + 1)).astype(np.int64))

    def coefficients(self, sampler: Sampler | None = None) -> StepCoefficients:
        """Coefficients of every step for a sampler (default: DDPM with the small variance)."""
        sampler = DDPM() if sampler is None else sampler
        if isinstance(sampler, type) or not hasattr(sampler, "coefficients"):
            raise TypeError(
                "sampler must be a DDPM, DDIM, EulerMaruyama or ProbabilityFlow (an object, not "
                f"the class), got {_checks.shown(sampler)}"
            )
        coefficients = sampler.coefficients(self)
        if not isinstance(coefficients, StepCoefficients) or len(coefficients) != len(self):
            raise TypeError(
                f"sampler must return StepCoefficients of {len(self)} steps from its coefficients, "
                f"got {_checks.shown(coefficients)} from {_checks.shown(sampler)}"
            )
        return coefficients
