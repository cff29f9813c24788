"""The noise levels at which a scheduler shows its points to the network: all a path tracker needs.

A path tracker (:class:`dng_math.PathTracker`) does not ask how a scheduler moves its latents, so
here are no steps, and schedulers of every kind are read: those of several stages, multistep ones,
and those that draw their noise anew.  What is read is the level of every evaluation, in the order
in which a pipeline's loop makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dng_math.schedules import PredictionType, StepCoefficients, added_variance, step_factors
from dng_models.pipelines.scheduler_reading import (
    NO_LIMIT,
    discrete,
    known_class,
    numbers,
    refuse_levels,
    roots,
    sigmas_of,
    strictly_decreasing,
    time_of,
    timesteps_of,
)
from dng_models.pipelines.transitions import SchedulerRun

Array = NDArray[np.float64]
# alpha and sigma of the network's input, diffusion time, and the input's factor on the latents.
Levels = tuple[Array, Array, Array, Array]

# A subclass that overrides one of these may show the network other points.
_METHODS = ("step", "scale_model_input", "set_timesteps")
_FLOW: PredictionType = "flow_prediction"


def scheduler_levels(scheduler: Any) -> SchedulerRun:
    """Read the noise level of every evaluation of a run, for a tracker that needs no steps.

    Parameters
    ----------
    scheduler : SchedulerMixin
        A scheduler with its timesteps set: any that :func:`~dng_models.scheduler_run` reads, and
        Heun, KDPM2 (also ancestral), DPM-Solver single step, its SDE (with torchsde), PNDM, LMS,
        LCM, TCD, SA-Solver, CogVideoX's DPM, and flow-matching Heun and LCM.

    Returns
    -------
    SchedulerRun
        ``alpha_t`` and ``sigma_t`` of its coefficients are the levels of the network's inputs.  The
        other columns are of the deterministic first-order step between two of them, which need not
        be the scheduler's own.

    Raises
    ------
    TypeError
        If it is not a scheduler.
    ValueError
        If its levels are not known, its network returns something else than a prediction, or its
        timesteps are not set.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"scheduler must be a scheduler, not the class of one, got {scheduler!r}")
    name, family = type(scheduler).__name__, _family(scheduler)
    timesteps = timesteps_of(scheduler)
    alpha, sigma, time, scale = _READERS[family](scheduler, timesteps)
    prediction_type = _prediction_type(scheduler, family, alpha)
    ends = (alpha, sigma, np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0))
    falls = ends[3] * alpha <= sigma * ends[2] * (1.0 + 1e-6)
    wrong = ~falls | (sigma <= 0)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"scheduler must go from noise to data, but evaluation {i} of this {name} is at "
            f"(alpha, sigma) = ({alpha[i]:g}, {sigma[i]:g}) and the next one at ({ends[2][i]:g}, "
            f"{ends[3][i]:g})"
        )
    x_factor, x0_factor, step_var = step_factors(*ends, 0.0)
    mean_x, mean_x0, transition_var = step_factors(*ends, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        coefficients = StepCoefficients(
            time=strictly_decreasing(time),
            alpha_t=alpha,
            sigma_t=sigma,
            alpha_s=ends[2],
            sigma_s=ends[3],
            alpha_ts=alpha / ends[2],
            beta_ts=added_variance(*ends),
            x_factor=x_factor,
            x0_factor=x0_factor,
            step_var=step_var,
            eta=np.zeros(len(alpha)),
            transition_x_factor=mean_x,
            transition_x0_factor=mean_x0,
            transition_var=transition_var,
        )
    return SchedulerRun(
        scheduler=name,
        timesteps=timesteps,
        coefficients=coefficients,
        input_scale=np.append(scale, 1.0),
        prediction_type=prediction_type,
        limit=NO_LIMIT,
    )


def _family(scheduler: Any) -> str:
    """Name of the diffusers class whose levels a scheduler has; a key of ``_READERS``."""
    known = known_class(scheduler, _READERS, _METHODS)
    if known is None:
        refuse_levels(scheduler)
    family, base, changed = known
    if changed:
        raise ValueError(
            f"{type(scheduler).__name__} cannot be followed: it is a {base.__name__} with another "
            f"{', '.join(changed)}, so its noise levels are not known"
        )
    return family


def _prediction_type(scheduler: Any, family: str, alpha: Array) -> PredictionType:
    name = type(scheduler).__name__
    if family.startswith("FlowMatch"):
        return _FLOW
    given: PredictionType = scheduler.config.prediction_type
    allowed: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
    if family == "DPMSolverSDEScheduler":
        allowed.remove("sample")  # its step refuses it
    if getattr(scheduler.config, "use_flow_sigmas", False):
        # v would be read as if alpha^2 + sigma^2 were 1.
        allowed = ["epsilon", "sample", _FLOW]
    if given not in allowed:
        raise ValueError(
            f"prediction_type of this {name} must be one of {', '.join(map(repr, allowed))}, got "
            f"{given!r}"
        )
    if given == "epsilon" and np.any(alpha == 0):
        raise ValueError(
            f"prediction_type of this {name} must not be 'epsilon': its first evaluation is of "
            "pure noise (zero terminal signal-to-noise ratio), of which a noise prediction says "
            "nothing. Use 'v_prediction' or 'sample', or timestep_spacing='leading'"
        )
    variance = getattr(scheduler.config, "variance_type", None)
    if family == "DDPMScheduler" and variance in ("learned", "learned_range"):
        raise ValueError(
            f"{name} with variance_type={variance!r} cannot be followed: half of the network's "
            "output is no prediction. Use variance_type='fixed_small' with the noise half of it"
        )
    return given


# ---------------------------------------------------------------------- readers


def _by_timestep(scheduler: Any, timesteps: Array) -> Levels:
    alpha_bar, time = discrete(scheduler, timesteps)
    return (*roots(alpha_bar), time, np.ones_like(time))


def _exploding(scheduler: Any, timesteps: Array, sigmas: Array | None = None) -> Levels:
    """Latents x0 + sigma eps, shown to the network divided by sqrt(1 + sigma^2)."""
    if sigmas is None:
        sigmas = sigmas_of(scheduler, timesteps)[:-1]
    scale = 1.0 / np.sqrt(1.0 + sigmas**2)
    return scale, sigmas * scale, time_of(timesteps, scheduler.config.num_train_timesteps), scale


def _kdpm2(scheduler: Any, timesteps: Array) -> Levels:
    # Every second evaluation is between two sigmas.
    sigmas = sigmas_of(scheduler, timesteps)[:-1]
    between = numbers(scheduler.sigmas_interpol)
    ancestral = hasattr(scheduler, "sigmas_up")
    odd = np.arange(1, len(timesteps), 2)
    sigmas[odd] = between[odd - 1] if ancestral else between[odd]
    return _exploding(scheduler, timesteps, sigmas)


def _dpm_sde(scheduler: Any, timesteps: Array) -> Levels:
    # Every second evaluation is half-way between two sigmas, in their logarithm.
    sigmas = sigmas_of(scheduler, timesteps)[:-1]
    sigmas[1::2] = np.sqrt(sigmas[0:-1:2] * sigmas[1::2])
    return _exploding(scheduler, timesteps, sigmas)


def _solver(scheduler: Any, timesteps: Array) -> Levels:
    """``sigmas`` are sigma/alpha, or flow matching's sigma."""
    config = scheduler.config
    if config.use_flow_sigmas:
        return _flow(scheduler, timesteps)
    sigmas = sigmas_of(scheduler, timesteps)[:-1]
    alpha = 1.0 / np.sqrt(1.0 + sigmas**2)
    time = time_of(timesteps, config.num_train_timesteps)
    return alpha, sigmas * alpha, time, np.ones_like(time)


def _flow(scheduler: Any, timesteps: Array) -> Levels:
    name = type(scheduler).__name__
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError(
            f"{name} with invert_sigmas=True cannot be followed: it runs from sigma = 0 to 1, with "
            "noise and image exchanged"
        )
    sigmas = sigmas_of(scheduler, timesteps)[:-1]
    if sigmas.max() > 1:
        raise ValueError(
            f"{name} cannot be followed with these sigmas, up to {sigmas.max():g}: flow matching "
            "ends at 1, beyond which alpha is negative"
        )
    return 1.0 - sigmas, sigmas, sigmas, np.ones_like(sigmas)


_READERS: dict[str, Callable[[Any, Array], Levels]] = {
    **dict.fromkeys(
        (
            "DDPMScheduler",
            "DDIMScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "PNDMScheduler",
            "LCMScheduler",
            "TCDScheduler",
        ),
        _by_timestep,
    ),
    **dict.fromkeys(
        (
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LMSDiscreteScheduler",
        ),
        _exploding,
    ),
    "KDPM2DiscreteScheduler": _kdpm2,
    "KDPM2AncestralDiscreteScheduler": _kdpm2,
    "DPMSolverSDEScheduler": _dpm_sde,
    **dict.fromkeys(
        (
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "UniPCMultistepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
        ),
        _solver,
    ),
    **dict.fromkeys(
        (
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
        ),
        _flow,
    ),
}
