"""What a diffusers scheduler does in a step, as the numbers of one formula.

Every first-order sampler takes the step ``x_s = A x_t + B x0 + sqrt(V) z`` from the noisier time t
to the cleaner time s, where x0 is what the network's prediction says the image is, clipped or
thresholded where the scheduler does so.  Here A, B and V are read, in float64, from the public
state that a scheduler has after ``set_timesteps``: its cumulative alphas or its sigmas, its
timesteps and its configuration.  Nothing is asked of ``scheduler.step``, so a guidance that knows
these numbers needs no wrapper around the sampler.  Multistep solvers are described by their
first-order step, which is what they take from a fresh state.

Two systems of coordinates occur.  :class:`Transition` describes a step in the scheduler's own
latents.  :class:`SchedulerRun` describes a run in what the network is shown: the Euler schedulers
keep ``x0 + sigma eps`` and show the network that over sqrt(sigma^2 + 1), which is variance
preserving, and it is there that noise and velocity predictions mean what they mean everywhere.

Work is done in x0, which exists where alpha is 0 (pure noise: flow matching at sigma = 1, and
schedules of zero terminal signal-to-noise ratio).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels.plan import PredictionType
from dng_math import _checks, equations
from dng_math.schedules import StepCoefficients

Array = NDArray[np.float64]
Ends = tuple[Array, Array, Array, Array]  # alpha_t, sigma_t, alpha_s, sigma_s
Factors = tuple[Array, Array, Array]  # A, B, V

# A subclass that replaces one of these takes steps that nothing here knows of.
STEP_METHODS = (
    "step",
    "scale_model_input",
    "convert_model_output",
    "dpm_solver_first_order_update",
)

# Repeated times are set apart by this much: no step is shorter, and over a difference of times it
# still leaves a relative precision of 1e-7.
SMALLEST_INTERVAL = 1e-9


@dataclass(frozen=True)
class X0Limit:
    """What a scheduler does to every predicted x0; nothing by default.

    Parameters
    ----------
    clip : float, optional
        x0 is clamped to [-clip, clip].
    quantile, largest : float, optional
        Dynamic thresholding (arXiv 2205.11487, section 2.3): x0 is clamped to [-s, s] and divided
        by s, where s is this quantile of |x0| of each sample, within [1, largest].
    keeps_noise : bool
        Whether the step still points along the noise of the x0 that was not limited, as DDIM's
        does: ``x_s = alpha_s limited + sqrt(sigma_s^2 - V) (x_t - alpha_t x0)/sigma_t + ...``.
        Otherwise that noise is the limited x0's too.
    """

    clip: float | None = None
    quantile: float | None = None
    largest: float | None = None
    keeps_noise: bool = False

    def __bool__(self) -> bool:
        """Whether anything is done."""
        return self.clip is not None or self.quantile is not None

    def __call__(self, x0: Tensor) -> Tensor:
        """The limited x0.

        Parameters
        ----------
        x0 : Tensor, shape (B, ...)

        Returns
        -------
        Tensor, of the same shape and dtype
        """
        if self.quantile is not None:
            flat = x0.flatten(1)
            if flat.dtype not in (torch.float32, torch.float64):
                flat = flat.float()
            bound = torch.quantile(flat.abs(), self.quantile, dim=1, keepdim=True)
            bound = bound.clamp(min=1.0, max=self.largest)
            return (flat.clamp(-bound, bound) / bound).reshape(x0.shape).to(x0.dtype)
        if self.clip is not None:
            return x0.clamp(-self.clip, self.clip)
        return x0


NO_LIMIT = X0Limit()


@dataclass(frozen=True, eq=False)
class Transition:
    """One step of a scheduler, in the coordinates of its latents.

    Attributes
    ----------
    timestep : float
        As the network is given it.
    alpha_t, sigma_t, alpha_s, sigma_s : float
        ``x = alpha x0 + sigma eps`` at the noisier end t and at the cleaner end s.
    x_factor, x0_factor, step_var : float
        A, B and V of ``x_s = A x_t + B x0 + sqrt(V) z``.
    eta : float
        Noise relative to the DDPM posterior's: 1 ancestral, 0 deterministic.
    prediction : {"epsilon", "v_prediction", "sample", "flow"}
        What the network returns.
    input_scale : float
        The network is shown ``input_scale * x_t``.
    limit : X0Limit
        What is done to x0.
    """

    timestep: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    x_factor: float
    x0_factor: float
    step_var: float
    eta: float
    prediction: PredictionType
    input_scale: float
    limit: X0Limit

    def x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The image that a prediction means, limited as the scheduler does it.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
            Latents at t, not scaled to the network's input; 16-bit ones are computed in float32.
        prediction : Tensor, shape (B, ...)
            What the network returned for them.

        Returns
        -------
        Tensor, of the shape and dtype of x
        """
        _check_pair(x, prediction)
        return self.limit(self._raw_x0(_wide(x), _wide(prediction))).to(x.dtype)

    def step(self, x: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_s = A x_t + B x0 + sqrt(V) z (DDPM Eq. 7, DDIM Eq. 12).

        Parameters
        ----------
        x, prediction : Tensor, shape (B, ...)
            As for :meth:`x0`.
        noise : Tensor, shape (B, ...)
            Standard normals; needed where ``step_var`` > 0, unused elsewhere.

        Returns
        -------
        Tensor, of the shape and dtype of x

        Raises
        ------
        ValueError
            If the shapes differ, or a step with noise is given none.
        """
        _check_pair(x, prediction)
        wide = _wide(x)
        raw = self._raw_x0(wide, _wide(prediction))
        x0 = self.limit(raw)
        x_next = equations.step_mean(wide, x0, self.x_factor, self.x0_factor)
        if self.limit and self.limit.keeps_noise:
            x_next = x_next + self.x_factor * self.alpha_t * (x0 - raw)
        if self.step_var > 0:
            if noise is None:
                raise ValueError(
                    f"noise must be given: the step at timestep {self.timestep:g} adds noise of "
                    f"variance {self.step_var:g}"
                )
            if noise.shape != x.shape:
                raise ValueError(
                    f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}"
                )
            x_next = equations.step(x_next, self.step_var**0.5, _wide(noise))
        return x_next.to(x.dtype)

    def _raw_x0(self, x: Tensor, prediction: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return equations.x0_from_noise(x, prediction, self.alpha_t, self.sigma_t)
        if self.prediction == "v_prediction":
            scale = self.input_scale
            return equations.x0_from_velocity(
                scale * x, prediction, scale * self.alpha_t, scale * self.sigma_t
            )
        if self.prediction == "flow":
            return equations.x0_from_flow(x, prediction, self.sigma_t)
        return prediction


@dataclass(frozen=True, eq=False)
class SchedulerRun:
    """All steps of a run, in the coordinates of the network's input.

    Attributes
    ----------
    scheduler : str
        Name of the scheduler's class.
    timesteps : ndarray, shape (N,)
        As the network is given them, noisiest first.
    coefficients : StepCoefficients
        One row a step.  ``time`` is that of the noisier end in (0, 1]: (t + 1) over the number of
        training timesteps for discrete ones, sigma for flow matching; a repeated one is set
        ``SMALLEST_INTERVAL`` lower, so that it decreases strictly.  The kernel is the step's own
        where eta = 1 and the DDPM posterior elsewhere.
    input_scale : ndarray, shape (N + 1,)
        Network input over latents, before each step and after the last one.
    prediction : {"epsilon", "v_prediction", "sample", "flow"}
        What the network returns.
    limit : X0Limit
        What is done to every predicted x0.
    """

    scheduler: str
    timesteps: Array
    coefficients: StepCoefficients
    input_scale: Array
    prediction: PredictionType
    limit: X0Limit

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


def scheduler_run(scheduler: Any, *, eta: float | None = None) -> SchedulerRun:
    """Read all steps of a run from a scheduler.

    Parameters
    ----------
    scheduler : SchedulerMixin
        After ``set_timesteps``: DDPM, DDIM, Euler, Euler ancestral, DPM-Solver++ multistep (all
        four algorithm types), UniPC, DEIS, flow-matching Euler, and those of
        :mod:`dng_models.schedulers`.
    eta : float, optional
        For DDIM, whose ``step`` is given it: that value, default 0 as in diffusers.  Other
        schedulers have an eta of their own, which it must equal.

    Returns
    -------
    SchedulerRun

    Raises
    ------
    TypeError
        If it is no scheduler.
    ValueError
        If it is one that this cannot describe (the message says why, and which to use instead), if
        its options contradict each other, or if its timesteps are not set.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"scheduler must be a scheduler, not the class of one, got {scheduler!r}")
    steps = _read(scheduler, eta)
    alpha_t, sigma_t, alpha_s, sigma_s = steps.ends
    before, after = steps.input_scale[:-1], steps.input_scale[1:]
    x_factor, x0_factor, step_var = steps.factors
    kernel_x, kernel_x0, kernel_var = (
        step_factors(*steps.ends, 1.0) if steps.eta < 1 else steps.factors
    )
    coefficients = StepCoefficients(
        time=steps.time,
        alpha_t=alpha_t * before,
        sigma_t=sigma_t * before,
        alpha_s=alpha_s * after,
        sigma_s=sigma_s * after,
        alpha_ts=equations.transition_alpha(alpha_t, alpha_s) * (before / after),
        beta_ts=_beta(*steps.ends) * before**2,
        x_factor=x_factor * (after / before),
        x0_factor=x0_factor * after,
        step_var=step_var * after**2,
        eta=np.full(len(steps.time), steps.eta),
        kernel_x_factor=kernel_x * (after / before),
        kernel_x0_factor=kernel_x0 * after,
        kernel_var=kernel_var * after**2,
    )
    return SchedulerRun(
        scheduler=type(scheduler).__name__,
        timesteps=steps.timesteps,
        coefficients=coefficients,
        input_scale=steps.input_scale,
        prediction=steps.prediction,
        limit=steps.limit,
    )


def transition(scheduler: Any, step: int, *, eta: float | None = None) -> Transition:
    """Read one step of a run from a scheduler.

    Parameters
    ----------
    scheduler, eta
        As for :func:`scheduler_run`.
    step : int
        Index into ``scheduler.timesteps``, 0 the noisiest.

    Returns
    -------
    Transition

    Raises
    ------
    TypeError, ValueError
        As :func:`scheduler_run`, and if there is no such step.
    """
    steps = _read(scheduler, eta)
    step = _checks.integer("step", step, 0, len(steps.timesteps) - 1)
    alpha_t, sigma_t, alpha_s, sigma_s = (float(end[step]) for end in steps.ends)
    x_factor, x0_factor, step_var = (float(factor[step]) for factor in steps.factors)
    return Transition(
        timestep=float(steps.timesteps[step]),
        alpha_t=alpha_t,
        sigma_t=sigma_t,
        alpha_s=alpha_s,
        sigma_s=sigma_s,
        x_factor=x_factor,
        x0_factor=x0_factor,
        step_var=step_var,
        eta=steps.eta,
        prediction=steps.prediction,
        input_scale=float(steps.input_scale[step]),
        limit=steps.limit,
    )


def advice(scheduler: Any) -> str | None:
    """How to give a pipeline a scheduler with eta = 1 like this one.

    Parameters
    ----------
    scheduler : SchedulerMixin
        One that :func:`scheduler_run` reads.

    Returns
    -------
    str or None
        A line of Python, such as
        ``pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)``; None where diffusers
        has none (CogVideoX, whose shifted schedule no other scheduler builds).
    """
    family = _family(scheduler)[0]
    if family not in _NOISY:
        return None
    name, options = _NOISY[family]
    return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{options})"


def step_factors(
    alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array, eta: float
) -> Factors:
    """A, B and V of the first-order step with noise eta (DDIM Eq. 12 and 16).

    ``V = eta^2 beta_ts sigma_s^2/sigma_t^2``, ``A = sqrt(sigma_s^2 - V)/sigma_t`` and
    ``B = alpha_s - alpha_t A``: eta = 1 is the DDPM posterior, eta = 0 the deterministic step.

    Parameters
    ----------
    alpha_t, sigma_t, alpha_s, sigma_s : ndarray, shape (N,)
        The two ends of each step; sigma_t > 0.
    eta : float
        In [0, 1].

    Returns
    -------
    tuple of ndarray, each of shape (N,)
    """
    beta_ts = _beta(alpha_t, sigma_t, alpha_s, sigma_s)
    variance = eta**2 * equations.posterior_variance(beta_ts, sigma_s, sigma_t)
    # sqrt(sigma_s^2 - V)/sigma_t without the subtraction, which leaves nothing at alpha_t = 0.
    kept = (equations.transition_alpha(alpha_t, alpha_s) * sigma_s / sigma_t) ** 2
    x_factor = sigma_s / sigma_t * np.sqrt((1.0 - eta**2) + eta**2 * kept)
    return x_factor, alpha_s - alpha_t * x_factor, variance


# ---------------------------------------------------------------------- reading a scheduler


@dataclass(frozen=True, eq=False)
class _Steps:
    """All steps of a run, in the coordinates of the latents."""

    timesteps: Array
    time: Array
    ends: Ends
    factors: Factors
    input_scale: Array
    eta: float
    prediction: PredictionType
    limit: X0Limit


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a scheduler's state says.

    A configuration also holds what other schedulers were built with (``from_config`` keeps what it
    does not know), so an option is only looked at by the reader of a class that has it.
    """

    time: Array
    ends: Ends
    # What prediction_type may be; nothing for schedulers that take flow predictions only.
    predictions: tuple[str, ...] = ()
    eta: float = 0.0
    limit: X0Limit = NO_LIMIT
    # Where they are not those of eta.
    factors: Factors | None = None
    input_scale: Array | None = None


def _read(scheduler: Any, eta: float | None) -> _Steps:
    """Everything about a run, checked."""
    family, ours = _family(scheduler)
    name, timesteps = type(scheduler).__name__, _timesteps(scheduler)
    reading = _READERS[family](scheduler, timesteps)
    # DDIM's own step keeps the noise of the x0 that was not limited; ours does not.
    limit = replace(reading.limit, keeps_noise=reading.limit.keeps_noise and not ours)
    own_eta = float(scheduler.config.eta) if ours else reading.eta
    if eta is not None:
        eta = _checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        if family == "DDIMScheduler" and not ours:
            own_eta = eta
        elif eta != own_eta:
            advised = advice(scheduler)
            cure = (
                "" if advised is None else f". For steps with the DDPM posterior's noise: {advised}"
            )
            raise ValueError(
                f"eta must be {own_eta:g} or None for this {name}, got {eta:g}: its steps do not "
                f"take one{cure}"
            )
    prediction = _prediction(scheduler, reading, timesteps)
    _check_ends(name, reading.ends)
    scale = np.ones(len(timesteps) + 1) if reading.input_scale is None else reading.input_scale
    return _Steps(
        timesteps=timesteps,
        time=_strictly_decreasing(reading.time),
        ends=reading.ends,
        factors=reading.factors or step_factors(*reading.ends, own_eta),
        input_scale=scale,
        eta=own_eta,
        prediction=prediction,
        limit=limit,
    )


def _family(scheduler: Any) -> tuple[str, bool]:
    """Name of the diffusers class whose steps a scheduler takes, and whether it is ours."""
    # Imported here because it builds on this module.
    from dng_models import schedulers

    known = [
        ("DDIMScheduler", schedulers.EtaDDIMScheduler),
        ("FlowMatchEulerDiscreteScheduler", schedulers.PosteriorFlowScheduler),
        *((name, getattr(diffusers, name)) for name in _READERS),
    ]
    name = type(scheduler).__name__
    for family, base in known:
        if not isinstance(scheduler, base):
            continue
        changed = [
            method
            for method in STEP_METHODS
            if getattr(type(scheduler), method, None) is not getattr(base, method, None)
        ]
        if changed:
            raise ValueError(
                f"{name} cannot be guided: it is a {base.__name__} with another "
                f"{', '.join(changed)}, so its steps are not known. The nearest that can be is "
                f"{base.__name__}"
            )
        return family, base.__name__ != family
    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"scheduler must be a diffusers scheduler, got {name}")
    reason, instead = _REFUSED.get(name, _UNKNOWN)
    raise ValueError(f"{name} cannot be guided: {reason}. The nearest that can be is {instead}")


def _timesteps(scheduler: Any) -> Array:
    name = type(scheduler).__name__
    custom = getattr(scheduler, "custom_timesteps", False)
    if not custom and getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            f"scheduler must have its timesteps set: call {name}.set_timesteps(...) first, as the "
            "pipelines do"
        )
    return _numbers(scheduler.timesteps)


def _numbers(values: Any) -> Array:
    """A tensor of the scheduler, wherever it is, copied in float64."""
    return torch.as_tensor(values).detach().cpu().double().numpy().copy()


def _discrete(scheduler: Any, timesteps: Array) -> tuple[Array, Array]:
    """alpha_bar at every discrete timestep of a run, and its time."""
    alpha_bar = _numbers(scheduler.alphas_cumprod)
    index = timesteps.astype(np.int64)
    if np.any((index < 0) | (index >= len(alpha_bar))):
        bad = int(index[np.argmax((index < 0) | (index >= len(alpha_bar)))])
        raise ValueError(
            f"scheduler.timesteps must be from 0 to {len(alpha_bar) - 1}, got {bad}: choose "
            "another number of steps or another timestep_spacing"
        )
    return alpha_bar[index], _time(timesteps, len(alpha_bar))


def _time(timesteps: Array, training: int) -> Array:
    # Trailing spacing ends at -1 for some numbers of steps (61 of 1000): the sigma is that of 0.
    return np.asarray((np.maximum(timesteps, 0.0) + 1.0) / training)


def _ddpm(scheduler: Any, timesteps: Array) -> _Reading:
    variance = scheduler.config.variance_type
    if variance in ("learned", "learned_range"):
        raise ValueError(
            f"DDPMScheduler with variance_type={variance!r} cannot be guided: the network predicts "
            "the variance of each step, so it is not known beforehand. Use "
            "variance_type='fixed_small' with the noise half of the network's output"
        )
    if variance == "fixed_large_log":
        raise ValueError(
            "DDPMScheduler with variance_type='fixed_large_log' cannot be guided: its step takes "
            "the root of the logarithm of a variance, which is not a number. Use 'fixed_large'"
        )
    at_t, time = _discrete(scheduler, timesteps)
    # Its next timestep is the next of the run, and the data after the last.
    ends = (*_roots(at_t), *_roots(np.append(at_t[1:], 1.0)))
    factors = step_factors(*ends, 1.0)
    if variance == "fixed_large":
        # Added in the last step too, unless that is timestep 0.
        factors = (*factors[:2], np.where(timesteps > 0, _beta(*ends), 0.0))
    limit = _limit(scheduler.config, clips=True)
    return _Reading(time, ends, _PREDICTED, 1.0, limit, factors)


def _ddim(scheduler: Any, timesteps: Array, *, clips: bool = True) -> _Reading:
    at_t, time = _discrete(scheduler, timesteps)
    # Its next timestep is a fixed stride away, which is not the next of the run in all spacings.
    alpha_bar = _numbers(scheduler.alphas_cumprod)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    following = timesteps.astype(np.int64) - stride
    final = float(scheduler.final_alpha_cumprod)
    at_s = np.where(following >= 0, alpha_bar[np.maximum(following, 0)], final)
    limit = replace(_limit(scheduler.config, clips=True), keeps_noise=True) if clips else NO_LIMIT
    return _Reading(time, (*_roots(at_t), *_roots(at_s)), _PREDICTED, 0.0, limit)


def _cogvideox_ddim(scheduler: Any, timesteps: Array) -> _Reading:
    # DDIM with another schedule, which neither clips nor adds noise whatever it is told.
    return _ddim(scheduler, timesteps, clips=False)


def _roots(alpha_bar: Array) -> tuple[Array, Array]:
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


def _sigmas(scheduler: Any, timesteps: Array) -> Array:
    """Sigma at both ends of every step."""
    sigmas = _numbers(scheduler.sigmas)
    if len(sigmas) <= len(timesteps) or not np.isfinite(sigmas).all():
        raise ValueError(
            "scheduler.sigmas must be finite numbers, one more than there are timesteps "
            f"({len(timesteps)}), got {sigmas}"
        )
    # Euler with interpolation_type="log_linear" has one more, which no step reaches.
    return sigmas[: len(timesteps) + 1]


def _euler(scheduler: Any, timesteps: Array) -> _Reading:
    reading = _variance_exploding(scheduler, timesteps)
    if scheduler.config.timestep_type == "continuous":
        # The network is given a function of sigma: its time is its place among those of training.
        alpha_bar = _numbers(scheduler.alphas_cumprod)
        known = np.log((1.0 - alpha_bar) / alpha_bar) / 2.0
        index = np.interp(np.log(reading.ends[1]), known, np.arange(len(known)))
        reading = replace(reading, time=(index + 1.0) / len(known))
    return replace(reading, predictions=(*_PREDICTED, "original_sample"))


def _euler_ancestral(scheduler: Any, timesteps: Array) -> _Reading:
    return replace(_variance_exploding(scheduler, timesteps), eta=1.0)


def _variance_exploding(scheduler: Any, timesteps: Array) -> _Reading:
    sigmas = _sigmas(scheduler, timesteps)
    one = np.ones(len(timesteps))
    return _Reading(
        _time(timesteps, scheduler.config.num_train_timesteps),
        (one, sigmas[:-1], one, sigmas[1:]),
        ("epsilon", "v_prediction"),
        input_scale=1.0 / np.sqrt(1.0 + sigmas**2),
    )


def _solver(scheduler: Any, timesteps: Array, *, on_noise: bool = False) -> _Reading:
    """DEIS, and what DPM-Solver++ and UniPC share with it: a list of sigma/alpha, or of flow's.

    ``on_noise``: it works on noise predictions, and takes no flow ones.
    """
    name, config = type(scheduler).__name__, scheduler.config
    sigmas = _sigmas(scheduler, timesteps)
    limit = _limit(config, clips=False)
    if not config.use_flow_sigmas:
        alphas = 1.0 / np.sqrt(1.0 + sigmas**2)
        time, sigmas = _time(timesteps, config.num_train_timesteps), sigmas * alphas
        predictions = _PREDICTED
    else:
        if sigmas.max() > 1:
            raise ValueError(
                f"{name} with use_flow_sigmas=True cannot be guided with these sigmas, up to "
                f"{sigmas.max():g}: flow matching ends at 1, beyond which alpha is negative. Leave "
                "use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas out"
            )
        alphas, time = 1.0 - sigmas, sigmas[:-1]
        # They read v as if alpha^2 + sigma^2 were 1.
        predictions = ("epsilon", "sample", *(() if on_noise else ("flow_prediction",)))
    ends = (alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])
    return _Reading(time, ends, predictions, 0.0, limit)


def _dpm_solver(scheduler: Any, timesteps: Array) -> _Reading:
    config = scheduler.config
    algorithm: str = config.algorithm_type
    if config.variance_type in ("learned", "learned_range"):
        raise ValueError(
            f"{type(scheduler).__name__} with variance_type={config.variance_type!r} cannot be "
            "guided: the network's output has more channels than its input. Use "
            "variance_type=None with the noise half of the network's output"
        )
    reading = _solver(scheduler, timesteps, on_noise=not algorithm.endswith("++"))
    if algorithm == "sde-dpmsolver":
        reading = replace(reading, factors=_noise_integrator(*reading.ends))
    return replace(reading, eta=1.0) if algorithm.startswith("sde-") else reading


def _unipc(scheduler: Any, timesteps: Array) -> _Reading:
    if scheduler.solver_p is not None:
        raise ValueError(
            f"{type(scheduler).__name__} with solver_p cannot be guided: its steps are those of "
            f"another solver. Use solver_p=None, or the {type(scheduler.solver_p).__name__} itself"
        )
    reading = _solver(scheduler, timesteps, on_noise=not scheduler.predict_x0)
    # On noise predictions it limits no x0, whatever its configuration says.
    return reading if scheduler.predict_x0 else replace(reading, limit=NO_LIMIT)


def _flow(scheduler: Any, timesteps: Array) -> _Reading:
    name, config = type(scheduler).__name__, scheduler.config
    if config.stochastic_sampling:
        raise ValueError(
            f"{name} with stochastic_sampling=True cannot be guided: {_ANEW}. The nearest that can "
            "be is PosteriorFlowScheduler, with stochastic_sampling=False"
        )
    if config.invert_sigmas:
        raise ValueError(
            f"{name} with invert_sigmas=True cannot be guided: it runs from sigma = 0 to 1, with "
            f"noise and image exchanged. The nearest that can be is {name} with "
            "invert_sigmas=False"
        )
    sigmas = _sigmas(scheduler, timesteps)
    ends = (1.0 - sigmas[:-1], sigmas[:-1], 1.0 - sigmas[1:], sigmas[1:])
    return _Reading(sigmas[:-1], ends)


# What every scheduler of noise schedules takes.
_PREDICTED = ("epsilon", "v_prediction", "sample")

_READERS: dict[str, Callable[[Any, Array], _Reading]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _cogvideox_ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _solver,
    "FlowMatchEulerDiscreteScheduler": _flow,
}

# With the noise of the DDPM posterior: class, and what from_config is given besides.
_SDE = ("DPMSolverMultistepScheduler", ', algorithm_type="sde-dpmsolver++"')
_NOISY = {
    "DDPMScheduler": ("DDPMScheduler", ""),
    "DDIMScheduler": ("EtaDDIMScheduler", ", eta=1.0"),
    "EulerDiscreteScheduler": ("EulerAncestralDiscreteScheduler", ""),
    "EulerAncestralDiscreteScheduler": ("EulerAncestralDiscreteScheduler", ""),
    "DPMSolverMultistepScheduler": _SDE,
    "UniPCMultistepScheduler": _SDE,
    "DEISMultistepScheduler": _SDE,
    "FlowMatchEulerDiscreteScheduler": ("PosteriorFlowScheduler", ", eta=1.0"),
}

_ANEW = (
    "it draws all of its noise anew at every step, which is not the reverse of the process that "
    "networks are trained on"
)
_TWICE = "a step of it is made of several network evaluations at different times"
_HISTORY = "a step of it combines the predictions of earlier steps and has no first-order form"
_UNKNOWN = (
    "its steps are not known to be of the form A x + B x0 + noise",
    "DDPMScheduler, or PosteriorFlowScheduler for flow matching",
)
_REFUSED = {
    "HeunDiscreteScheduler": (_TWICE, "EulerDiscreteScheduler"),
    "KDPM2DiscreteScheduler": (_TWICE, "EulerDiscreteScheduler"),
    "KDPM2AncestralDiscreteScheduler": (_TWICE, "EulerAncestralDiscreteScheduler"),
    "DPMSolverSDEScheduler": (
        _TWICE,
        "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'",
    ),
    "DPMSolverSinglestepScheduler": (_HISTORY, "DPMSolverMultistepScheduler"),
    "FlowMatchHeunDiscreteScheduler": (_TWICE, "FlowMatchEulerDiscreteScheduler"),
    "PNDMScheduler": (_HISTORY, "DDIMScheduler"),
    "LMSDiscreteScheduler": (_HISTORY, "EulerDiscreteScheduler"),
    "IPNDMScheduler": (_HISTORY, "DDIMScheduler"),
    "SASolverScheduler": (
        _HISTORY,
        "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'",
    ),
    "LCMScheduler": (_ANEW, "EulerAncestralDiscreteScheduler"),
    "TCDScheduler": (
        "it steps to a time that the network's distillation defines and draws noise from there",
        "EulerAncestralDiscreteScheduler",
    ),
    "FlowMatchLCMScheduler": (_ANEW, "PosteriorFlowScheduler"),
    "EDMEulerScheduler": (
        "its network's output is mixed with its input by EDM's preconditioning",
        "EulerDiscreteScheduler, for networks with noise or velocity output",
    ),
    "EDMDPMSolverMultistepScheduler": (
        "its network's output is mixed with its input by EDM's preconditioning",
        "DPMSolverMultistepScheduler, for networks with noise or velocity output",
    ),
    "DDIMInverseScheduler": ("it adds noise to an image instead of removing it", "DDIMScheduler"),
    "DPMSolverMultistepInverseScheduler": (
        "it adds noise to an image instead of removing it",
        "DPMSolverMultistepScheduler",
    ),
    "CogVideoXDPMScheduler": (
        _HISTORY,
        "CogVideoXDDIMScheduler, with divergence_probes=1 where a posterior is tracked",
    ),
    "FlowMapEulerDiscreteScheduler": (
        "its network predicts the mean velocity between two times, not the one at a time",
        "PosteriorFlowScheduler, for networks that predict the latter",
    ),
    "HeliosScheduler": (
        "its stages have noise levels of their own, and its solver combines earlier predictions",
        "PosteriorFlowScheduler",
    ),
    "DDPMWuerstchenScheduler": (
        "its timesteps are ratios, of which it makes noise levels itself",
        "DDPMScheduler",
    ),
    "UnCLIPScheduler": ("its step is told the next timestep by its pipeline", "DDPMScheduler"),
    "CosineDPMSolverMultistepScheduler": (
        "its network's output is mixed with its input by EDM's preconditioning",
        "DPMSolverMultistepScheduler, for networks with noise or velocity output",
    ),
    "DDPMParallelScheduler": ("it takes all steps of a run at once", "DDPMScheduler"),
    "DDIMParallelScheduler": ("it takes all steps of a run at once", "DDIMScheduler"),
}


# ---------------------------------------------------------------------- parts of a step


def _beta(alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Array:
    """beta_ts, where a step of length zero has none, and not its rounding error."""
    alpha_ts = equations.transition_alpha(alpha_t, alpha_s)
    return np.maximum(equations.transition_variance(sigma_t, sigma_s, alpha_ts), 0.0)


def _noise_integrator(alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Factors:
    """A, B and V of SDE-DPM-Solver-1 (arXiv 2211.01095, appendix B): eps constant in the step.

    ``x_s = x_t/alpha_ts - 2 (sigma_t/alpha_ts - sigma_s) eps + sqrt(beta_ts)/alpha_ts z``.
    """
    alpha_ts = equations.transition_alpha(alpha_t, alpha_s)
    on_noise = -2.0 * (sigma_t / alpha_ts - sigma_s)
    variance = _beta(alpha_t, sigma_t, alpha_s, sigma_s) / alpha_ts**2
    return 1.0 / alpha_ts + on_noise / sigma_t, -on_noise * alpha_t / sigma_t, variance


def _strictly_decreasing(time: Array) -> Array:
    if np.all(np.diff(time) < 0):
        return time
    apart = SMALLEST_INTERVAL * np.arange(len(time))
    return np.minimum.accumulate(time + apart) - apart


def _check_ends(name: str, ends: Ends) -> None:
    """A run goes from noise to data, and x_t holds some noise."""
    alpha_t, sigma_t, alpha_s, sigma_s = ends
    # sigma/alpha falls, written without the division; equal up to the rounding of float32.
    grows = sigma_s * alpha_t > sigma_t * alpha_s * (1.0 + 1e-6)
    wrong = grows | (sigma_t <= 0) | (alpha_s <= 0)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"scheduler must go from noise to data, but step {i} of this {name} goes from (alpha, "
            f"sigma) = ({alpha_t[i]:g}, {sigma_t[i]:g}) to ({alpha_s[i]:g}, {sigma_s[i]:g}): "
            "choose other timesteps or sigmas"
        )


def _prediction(scheduler: Any, reading: _Reading, timesteps: Array) -> PredictionType:
    if not reading.predictions:
        return "flow"
    name, given = type(scheduler).__name__, scheduler.config.prediction_type
    if given not in reading.predictions:
        raise ValueError(
            f"prediction_type of this {name} must be one of "
            f"{', '.join(map(repr, reading.predictions))}, got {given!r}, which its step does not "
            "take, or misreads with these options (flow predictions and use_flow_sigmas go "
            "together)"
        )
    alpha_t = reading.ends[0]
    if given == "epsilon" and np.any(alpha_t == 0):
        raise ValueError(
            f"prediction_type of this {name} must not be 'epsilon': timestep "
            f"{timesteps[np.argmin(alpha_t)]:g} is pure noise (zero terminal signal-to-noise "
            "ratio), of which a noise prediction says nothing. Use 'v_prediction' or 'sample', or "
            "timestep_spacing='leading'"
        )
    named: dict[str, PredictionType] = {"flow_prediction": "flow", "original_sample": "sample"}
    kind: PredictionType = named.get(given, given)
    return kind


def _limit(config: Any, *, clips: bool) -> X0Limit:
    if config.thresholding:
        return X0Limit(
            quantile=float(config.dynamic_thresholding_ratio),
            largest=float(config.sample_max_value),
        )
    if clips and config.clip_sample:
        return X0Limit(clip=float(config.clip_sample_range))
    return NO_LIMIT


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _check_pair(x: Tensor, prediction: Tensor) -> None:
    if x.shape != prediction.shape:
        raise ValueError(
            f"prediction must have the shape of x, {tuple(x.shape)}, got {tuple(prediction.shape)}"
        )
