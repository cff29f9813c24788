"""Read a diffusers scheduler's steps from the state that it has after set_timesteps.

Each family of schedulers keeps its schedule in its own way (cumulative alphas by timestep, or
sigmas).  A short reader for each turns that into the two ends of every step, and into the factors
where they are not those of DDIM's family.  A scheduler without a first-order step, or with another
step than its class, is refused; the error names the one to use instead.  To add a scheduler, write
its reader and add it to ``_READERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_math import checks, equations
from dng_math.schedules import PredictionType, added_variance, step_factors

Array = NDArray[np.float64]
Ends = tuple[Array, Array, Array, Array]  # alpha_t, sigma_t, alpha_s, sigma_s
Factors = tuple[Array, Array, Array]  # A, B, V

# A subclass that overrides one of these takes steps that are not known here.
STEP_METHODS = (
    "step",
    "scale_model_input",
    "convert_model_output",
    "dpm_solver_first_order_update",
)

# Repeated times are set apart by this much: less than any real step, but enough that differences
# of times keep a relative precision of 1e-7.
SMALLEST_INTERVAL = 1e-9
SAME_TIMESTEP = 1e-5  # float32 keeps seven digits of a timestep


@dataclass(frozen=True)
class X0Limit:
    """How a scheduler limits every predicted x0; by default not at all.

    Parameters
    ----------
    clip : float, optional
        x0 is clamped to [-clip, clip].
    quantile, largest : float, optional
        Dynamic thresholding (arXiv 2205.11487, section 2.3): x0 is clamped to [-s, s] and divided
        by s, where s is this quantile of |x0| of each sample, clamped to [1, largest].
    keeps_noise : bool
        Whether the step's noise direction is computed from the unlimited x0, as DDIM does:
        ``x_s = alpha_s limited + sqrt(sigma_s^2 - V) (x_t - alpha_t x0)/sigma_t + ...``.
        Otherwise it is computed from the limited x0.
    """

    clip: float | None = None
    quantile: float | None = None
    largest: float | None = None
    keeps_noise: bool = False

    def __bool__(self) -> bool:
        """Whether x0 is limited at all."""
        return self.clip is not None or self.quantile is not None

    def __call__(self, x0: Tensor) -> Tensor:
        """Limit x0.

        Parameters
        ----------
        x0 : Tensor, shape (B, ...)
            Predicted images.

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
class Steps:
    """All steps of a run, in the coordinates of the latents.

    Attributes
    ----------
    timesteps, time : ndarray, shape (N,)
        Timesteps as the network is given them, and diffusion times in (0, 1], strictly decreasing.
    ends : tuple of ndarray, each of shape (N,)
        alpha_t, sigma_t, alpha_s and sigma_s of ``x = alpha x0 + sigma eps``.
    factors : tuple of ndarray, each of shape (N,)
        A, B and V of the step ``x_s = A x_t + B x0 + sqrt(V) z``.
    input_scale : ndarray, shape (N + 1,)
        Factor from latents to the network's input, before each step and after the last one.
    eta : float
        Noise of the steps relative to that of the DDPM posterior.
    prediction_type : str
        What the network predicts, by diffusers' names.
    limit : X0Limit
        How every predicted x0 is limited.
    """

    timesteps: Array
    time: Array
    ends: Ends
    factors: Factors
    input_scale: Array
    eta: float
    prediction_type: PredictionType
    limit: X0Limit


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a reader found in a scheduler's state.

    A configuration may also hold options of other schedulers (``from_config`` keeps unknown ones),
    so only the reader of a class that has an option looks at it.
    """

    time: Array
    ends: Ends
    # Allowed values of prediction_type; none for schedulers that take flow predictions only.
    predictions: tuple[str, ...] = ()
    eta: float = 0.0
    limit: X0Limit = NO_LIMIT
    # Given only where they do not follow from eta.
    factors: Factors | None = None
    input_scale: Array | None = None


def read(scheduler: Any, eta: float | None) -> Steps:
    """Read and check all steps of a run; arguments and errors as for ``scheduler_run``."""
    family, ours = family_of(scheduler)
    name, timesteps = type(scheduler).__name__, timesteps_of(scheduler)
    reading = _READERS[family](scheduler, timesteps)
    # DDIM's own step takes the noise of the unlimited x0; ours takes that of the limited x0.
    limit = replace(reading.limit, keeps_noise=reading.limit.keeps_noise and not ours)
    own_eta = float(scheduler.config.eta) if ours else reading.eta
    if eta is not None:
        eta = checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
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
    prediction_type = _prediction_type(scheduler, reading, timesteps)
    _check_ends(name, reading.ends)
    scale = np.ones(len(timesteps) + 1) if reading.input_scale is None else reading.input_scale
    return Steps(
        timesteps=timesteps,
        time=strictly_decreasing(reading.time),
        ends=reading.ends,
        factors=reading.factors or step_factors(*reading.ends, own_eta),
        input_scale=scale,
        eta=own_eta,
        prediction_type=prediction_type,
        limit=limit,
    )


_OURS: list[tuple[str, type]] = []


def has_eta(family: str) -> Callable[[type], type]:
    """Class decorator that registers a scheduler whose configuration has the eta of its steps.

    Parameters
    ----------
    family : str
        Name of the diffusers class whose state the scheduler has.
    """

    def known(cls: type) -> type:
        _OURS.append((family, cls))
        return cls

    return known


def known_class(
    scheduler: Any, names: Iterable[str], methods: Iterable[str]
) -> tuple[str, type, list[str]] | None:
    """Family and class by which a scheduler is known, and the methods that it has otherwise.

    Our schedulers are looked for first, then diffusers' classes with these names; None for others.
    """
    for family, base in [*_OURS, *((name, getattr(diffusers, name)) for name in names)]:
        if isinstance(scheduler, base):
            own = type(scheduler)
            changed = [m for m in methods if getattr(own, m, None) is not getattr(base, m, None)]
            return family, base, changed
    return None


def family_of(scheduler: Any) -> tuple[str, bool]:
    """Name of the diffusers class whose state a scheduler has, and whether it is one of ours.

    Parameters
    ----------
    scheduler : SchedulerMixin
        The scheduler.

    Returns
    -------
    family : str
        A key of ``_READERS``.
    ours : bool
        Whether its class was registered with :func:`has_eta`.

    Raises
    ------
    TypeError
        If it is not a scheduler.
    ValueError
        If its steps are not known; the message says why, and which scheduler to use instead.
    """
    name = type(scheduler).__name__
    known = known_class(scheduler, _READERS, STEP_METHODS)
    if known is not None:
        family, base, changed = known
        if changed:
            raise ValueError(
                f"{name} cannot be guided: it is a {base.__name__} with another "
                f"{', '.join(changed)}, so its steps are not known. The nearest that can be is "
                f"{base.__name__}"
            )
        return family, base.__name__ != family
    reason, instead = _reason(scheduler)
    path = ""
    if name in _FOLLOWED:
        path = ", or a rule with tracker='path', which follows it"
    raise ValueError(
        f"{name} cannot be guided: {reason}. The nearest that can be is {instead}{path}"
    )


def _reason(scheduler: Any) -> tuple[str, str]:
    """Why a scheduler's steps are not known, and the nearest one whose steps are."""
    if not hasattr(scheduler, "set_timesteps"):
        name = type(scheduler).__name__
        raise TypeError(f"scheduler must be a diffusers scheduler, got {name}")
    return _REFUSED.get(type(scheduler).__name__, _UNKNOWN)


def refuse_levels(scheduler: Any) -> NoReturn:
    """Refuse a scheduler whose noise levels are not known, or are no path from noise to data."""
    reason = _reason(scheduler)
    why = "its noise levels are not known" if reason is _UNKNOWN else reason[0]
    raise ValueError(f"{type(scheduler).__name__} cannot be followed by a path tracker: {why}")


def advice(scheduler: Any) -> str | None:
    """A line of Python that gives a pipeline a similar scheduler with eta = 1.

    Parameters
    ----------
    scheduler : SchedulerMixin
        A scheduler that :func:`read` accepts.

    Returns
    -------
    str or None
        The line, such as ``pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)``;
        None if there is no such scheduler (for CogVideoX, whose shifted schedule no other has).
    """
    family = family_of(scheduler)[0]
    if family not in _NOISY:
        return None
    name, options = _NOISY[family]
    return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{options})"


def timesteps_of(scheduler: Any) -> Array:
    """The scheduler's timesteps, which must have been set; shape (N,)."""
    name = type(scheduler).__name__
    custom = getattr(scheduler, "custom_timesteps", False)
    if not custom and getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            f"scheduler must have its timesteps set: call {name}.set_timesteps(...) first, as the "
            "pipelines do"
        )
    return numbers(scheduler.timesteps)


def position(scheduler: Any, t: float) -> int:
    """Index of a timestep in a scheduler's timesteps.

    Parameters
    ----------
    scheduler : SchedulerMixin
        The scheduler, with its timesteps set; its own count decides between repeated timesteps.
    t : float
        One of its timesteps.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If t is none of the timesteps.
    """
    timesteps = numbers(scheduler.timesteps)
    at = [i for i, value in enumerate(timesteps) if same_timestep(value, t)]
    if not at:
        raise ValueError(f"timestep must be one of the scheduler's, {timesteps}, got {t}")
    for counted in ("step_index", "begin_index"):
        index = getattr(scheduler, counted, None)
        if index is not None and int(index) in at:
            return int(index)
    return at[0]


def same_timestep(a: float, b: float) -> bool:
    """Whether two timesteps are equal up to float32 rounding."""
    return math.isclose(a, b, rel_tol=SAME_TIMESTEP, abs_tol=SAME_TIMESTEP)


def numbers(values: Any) -> Array:
    """A float64 copy on the CPU of a scheduler's tensor."""
    return torch.as_tensor(values).detach().cpu().double().numpy().copy()


def discrete(scheduler: Any, timesteps: Array) -> tuple[Array, Array]:
    """alpha_bar and diffusion time at every discrete timestep of a run."""
    alpha_bar = numbers(scheduler.alphas_cumprod)
    index = timesteps.astype(np.int64)
    if np.any((index < 0) | (index >= len(alpha_bar))):
        bad = int(index[np.argmax((index < 0) | (index >= len(alpha_bar)))])
        raise ValueError(
            f"scheduler.timesteps must be from 0 to {len(alpha_bar) - 1}, got {bad}: choose "
            "another number of steps or another timestep_spacing"
        )
    return alpha_bar[index], time_of(timesteps, len(alpha_bar))


def time_of(timesteps: Array, training: int) -> Array:
    """Diffusion time in (0, 1] of discrete timesteps, of which there were ``training``."""
    # For some numbers of steps (61 of 1000) trailing spacing ends at -1, with the sigma of 0.
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
    at_t, time = discrete(scheduler, timesteps)
    # A step goes to the run's next timestep, and the last one to the data.
    ends = (*roots(at_t), *roots(np.append(at_t[1:], 1.0)))
    factors = step_factors(*ends, 1.0)
    if variance == "fixed_large":
        # This variance is added in the last step too, unless its timestep is 0.
        factors = (*factors[:2], np.where(timesteps > 0, added_variance(*ends), 0.0))
    limit = _limit(scheduler.config, clips=True)
    return _Reading(time, ends, _PREDICTED, 1.0, limit, factors)


def _ddim(scheduler: Any, timesteps: Array, *, clips: bool = True) -> _Reading:
    at_t, time = discrete(scheduler, timesteps)
    # A step goes a fixed stride down, which for some spacings is not the run's next timestep.
    alpha_bar = numbers(scheduler.alphas_cumprod)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    following = timesteps.astype(np.int64) - stride
    final = float(scheduler.final_alpha_cumprod)
    at_s = np.where(following >= 0, alpha_bar[np.maximum(following, 0)], final)
    limit = replace(_limit(scheduler.config, clips=True), keeps_noise=True) if clips else NO_LIMIT
    return _Reading(time, (*roots(at_t), *roots(at_s)), _PREDICTED, 0.0, limit)


def _cogvideox_ddim(scheduler: Any, timesteps: Array) -> _Reading:
    # DDIM with another schedule, which never clips or adds noise, whatever its options say.
    return _ddim(scheduler, timesteps, clips=False)


def roots(alpha_bar: Array) -> tuple[Array, Array]:
    """alpha and sigma of cumulative alphas."""
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


def sigmas_of(scheduler: Any, timesteps: Array) -> Array:
    """Sigmas at the ends of all steps, shape (N + 1,)."""
    sigmas = numbers(scheduler.sigmas)
    if len(sigmas) <= len(timesteps) or not np.isfinite(sigmas).all():
        raise ValueError(
            "scheduler.sigmas must be finite numbers, one more than there are timesteps "
            f"({len(timesteps)}), got {sigmas}"
        )
    # Euler with interpolation_type="log_linear" has one more sigma, which no step reaches.
    return sigmas[: len(timesteps) + 1]


def _euler(scheduler: Any, timesteps: Array) -> _Reading:
    reading = _variance_exploding(scheduler, timesteps)
    if scheduler.config.timestep_type == "continuous":
        # The timestep is a function of sigma: the time is sigma's place among those of training.
        alpha_bar = numbers(scheduler.alphas_cumprod)
        known = np.log((1.0 - alpha_bar) / alpha_bar) / 2.0
        index = np.interp(np.log(reading.ends[1]), known, np.arange(len(known)))
        reading = replace(reading, time=(index + 1.0) / len(known))
    return replace(reading, predictions=(*_PREDICTED, "original_sample"))


def _euler_ancestral(scheduler: Any, timesteps: Array) -> _Reading:
    return replace(_variance_exploding(scheduler, timesteps), eta=1.0)


def _variance_exploding(scheduler: Any, timesteps: Array) -> _Reading:
    sigmas = sigmas_of(scheduler, timesteps)
    one = np.ones(len(timesteps))
    return _Reading(
        time_of(timesteps, scheduler.config.num_train_timesteps),
        (one, sigmas[:-1], one, sigmas[1:]),
        ("epsilon", "v_prediction"),
        input_scale=1.0 / np.sqrt(1.0 + sigmas**2),
    )


def _solver(scheduler: Any, timesteps: Array, *, on_noise: bool = False) -> _Reading:
    """Read DEIS, DPM-Solver++ or UniPC, whose ``sigmas`` are sigma/alpha, or flow matching's sigma.

    ``on_noise``: the solver works on noise predictions, and does not take flow predictions.
    """
    name, config = type(scheduler).__name__, scheduler.config
    sigmas = sigmas_of(scheduler, timesteps)
    limit = _limit(config, clips=False)
    if not config.use_flow_sigmas:
        alphas = 1.0 / np.sqrt(1.0 + sigmas**2)
        time, sigmas = time_of(timesteps, config.num_train_timesteps), sigmas * alphas
        predictions = _PREDICTED
    else:
        if sigmas.max() > 1:
            raise ValueError(
                f"{name} with use_flow_sigmas=True cannot be guided with these sigmas, up to "
                f"{sigmas.max():g}: flow matching ends at 1, beyond which alpha is negative. Leave "
                "use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas out"
            )
        alphas, time = 1.0 - sigmas, sigmas[:-1]
        # No "v_prediction": these solvers read v as if alpha^2 + sigma^2 were 1.
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
    # Working on noise predictions it never limits x0, whatever its configuration says.
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
    sigmas = sigmas_of(scheduler, timesteps)
    ends = (1.0 - sigmas[:-1], sigmas[:-1], 1.0 - sigmas[1:], sigmas[1:])
    return _Reading(sigmas[:-1], ends)


# Prediction types that every scheduler with a noise schedule takes.
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

# For each family a scheduler with the noise of the DDPM posterior: class, and further arguments
# of from_config.
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


# Those that noise_levels can read: a path tracker needs no step.
_FOLLOWED = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "FlowMatchLCMScheduler",
    "CogVideoXDPMScheduler",
)


# ---------------------------------------------------------------------- parts of a step


def _noise_integrator(alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Factors:
    """A, B and V of SDE-DPM-Solver-1 (arXiv 2211.01095, appendix B), with eps constant in a step.

    ``x_s = x_t/alpha_ts - 2 (sigma_t/alpha_ts - sigma_s) eps + sqrt(beta_ts)/alpha_ts z``.
    """
    alpha_ts = equations.transition_alpha(alpha_t, alpha_s)
    on_noise = -2.0 * (sigma_t / alpha_ts - sigma_s)
    variance = added_variance(alpha_t, sigma_t, alpha_s, sigma_s) / alpha_ts**2
    return 1.0 / alpha_ts + on_noise / sigma_t, -on_noise * alpha_t / sigma_t, variance


def strictly_decreasing(time: Array) -> Array:
    """Times with repeated ones set apart by SMALLEST_INTERVAL, or less than all before."""
    if np.all(np.diff(time) < 0):
        return time
    apart = SMALLEST_INTERVAL * np.arange(len(time))
    return np.minimum.accumulate(time + apart) - apart


def _check_ends(name: str, ends: Ends) -> None:
    """Check that a run goes from noise to data, with sigma_t > 0 and alpha_s > 0 at every step."""
    alpha_t, sigma_t, alpha_s, sigma_s = ends
    # sigma/alpha must not grow; compared without division, up to float32 rounding.
    grows = sigma_s * alpha_t > sigma_t * alpha_s * (1.0 + 1e-6)
    wrong = grows | (sigma_t <= 0) | (alpha_s <= 0)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"scheduler must go from noise to data, but step {i} of this {name} goes from (alpha, "
            f"sigma) = ({alpha_t[i]:g}, {sigma_t[i]:g}) to ({alpha_s[i]:g}, {sigma_s[i]:g}): "
            "choose other timesteps or sigmas"
        )


def _prediction_type(scheduler: Any, reading: _Reading, timesteps: Array) -> PredictionType:
    if not reading.predictions:
        return "flow_prediction"
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
    named: dict[str, PredictionType] = {"original_sample": "sample"}
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
