"""The numbers read from a scheduler against the scheduler's own step, in every configuration.

Precision.  The state of a scheduler (its cumulative alphas or sigmas) is float32, and so is most of
its arithmetic; that, and not the formula, is what a comparison with an untouched scheduler shows.
So the same numbers are given to the scheduler in float64, with float64 latents, and there both must
agree to ALLOWED; an untouched scheduler is compared within what its rounding leaves.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from dng_kernels import StepPlan, dng_step
from dng_math import DynamicNegativeGuidance, PaperTracker, Unguided
from dng_models.pipelines import scheduler_reading as module
from dng_models.pipelines import schedulers as own_schedulers
from dng_models.pipelines.scheduler_reading import SMALLEST_INTERVAL, X0Limit, advice
from dng_models.pipelines.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler
from dng_models.pipelines.transitions import Transition, scheduler_run, transition
from tests.helpers.versions import before

pytestmark = [
    # Two of DPM-Solver's algorithm types are deprecated, and served as long as they are there.
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*deprecated:FutureWarning"),
]

# Relative to the largest element.  DPM-Solver++, Euler and flow matching round float64 latents to
# float32 (6e-8); DDIM subtracts std^2 from 1 - alpha_bar, which leaves 1e-8 at the noisy end.
ALLOWED = 1e-6
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 3, 4, 4)
CLIPPED: dict[str, Any] = {"clip_sample": True}
UNCLIPPED: dict[str, Any] = {"clip_sample": False}
THRESHOLDED: dict[str, Any] = {"thresholding": True, "sample_max_value": 1.5}
STOCK = [
    DDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
]
FINAL: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
SIGMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


def built(cls: type, steps: int, **options: Any) -> Any:
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def in_float64(scheduler: Any) -> Any:
    """The same state with room for the digits of the arithmetic."""
    for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


@functools.cache
def takes_generator(cls: type) -> bool:
    return "generator" in inspect.signature(cls.step).parameters  # type: ignore[attr-defined]


def at_step(scheduler: Any, step: int) -> Any:
    """A copy with no history, about to take that step."""
    fresh = copy.copy(scheduler)
    for name in ("model_outputs", "timestep_list"):
        if hasattr(fresh, name):
            setattr(fresh, name, list(getattr(fresh, name)))
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(step)
    return fresh


def own_step(
    scheduler: Any, step: int, x: Tensor, prediction: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """What the scheduler does from a fresh state, and the noise that it drew."""
    fresh = at_step(scheduler, step)
    time, dtype = fresh.timesteps[step], prediction.dtype
    if takes_generator(type(fresh)):
        options["generator"] = torch.Generator().manual_seed(step)
    if isinstance(fresh, DPMSolverMultistepScheduler):
        dtype = torch.float32  # of its noise, always
    if hasattr(fresh, "scale_model_input"):
        fresh.scale_model_input(x, time)
    taken = fresh.step(prediction, time, x, return_dict=False, **options)[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=dtype)
    return taken, noise.to(x.dtype)


def state_of(at: Transition, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Latents of the step's noise level, and a prediction."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps, prediction = torch.randn((3, *SHAPE), generator=generator).to(dtype)
    return at.alpha_t * x0 + at.sigma_t * eps, prediction


def check_steps(scheduler: Any, *, eta: float | None = None, allowed: float = ALLOWED) -> None:
    """Every step of the run."""
    in_float64(scheduler)
    options = {} if eta is None else {"eta": eta}
    for step in range(len(scheduler.timesteps)):
        at = transition(scheduler, step, eta=eta)
        if eta == 1.0 and at.alpha_t == 0:
            # diffusers takes the root of a rounding, which is below zero on some CPUs: a test of
            # its own has what the step is.
            continue
        x, prediction = state_of(at, step)
        expected, noise = own_step(scheduler, step, x, prediction, **options)
        actual = at.step(x, prediction, noise)
        difference = float((actual - expected).abs().max() / expected.abs().max())
        assert difference < allowed, (step, difference)


# ---------------------------------------------------------------------- against scheduler.step


@pytest.mark.parametrize("steps", [1, 2, 10, 30])
@pytest.mark.parametrize(
    ("cls", "eta"),
    [
        (DDPMScheduler, None),
        (DDIMScheduler, 0.0),
        (DDIMScheduler, 0.5),
        (DDIMScheduler, 1.0),
        (EulerDiscreteScheduler, None),
        (EulerAncestralDiscreteScheduler, None),
        (DPMSolverMultistepScheduler, None),
        (UniPCMultistepScheduler, None),
        (DEISMultistepScheduler, None),
    ],
)
def test_steps(cls: type, eta: float | None, steps: int) -> None:
    predictions = PREDICTIONS
    if cls is EulerAncestralDiscreteScheduler:
        predictions = PREDICTIONS[:2]  # the third is not implemented in diffusers
    for spacing, prediction in itertools.product(SPACINGS, predictions):
        options = {"prediction_type": prediction, "timestep_spacing": spacing}
        check_steps(built(cls, steps, **options), eta=eta)


@pytest.mark.parametrize("cls", STOCK)
def test_fifty_steps(cls: type) -> None:
    check_steps(built(cls, 50))


@pytest.mark.parametrize("limit", [UNCLIPPED, CLIPPED, THRESHOLDED])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(variance: str, prediction: str, limit: dict[str, Any]) -> None:
    # Trailing: the last step is from timestep 99, where the large variance is added.
    for spacing in ("leading", "trailing"):
        options = {"timestep_spacing": spacing, "prediction_type": prediction}
        check_steps(built(DDPMScheduler, 10, variance_type=variance, **options, **limit))


@pytest.mark.parametrize("limit", [UNCLIPPED, CLIPPED, THRESHOLDED])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta: float, prediction: str, limit: dict[str, Any]) -> None:
    for one, spacing, offset in itertools.product((True, False), SPACINGS, (0, 1)):
        options = {
            "set_alpha_to_one": one,
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "prediction_type": prediction,
        }
        check_steps(built(DDIMScheduler, 5, **options, **limit), eta=eta)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_zero_terminal_signal(spacing: str, prediction: str) -> None:
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
    }
    check_steps(built(DDPMScheduler, 10, **options))
    check_steps(built(DDIMScheduler, 10, **options), eta=0.0)
    check_steps(built(DDIMScheduler, 10, **options), eta=1.0)
    check_steps(built(EulerDiscreteScheduler, 10, **options))
    check_steps(built(DPMSolverMultistepScheduler, 10, **options))
    check_steps(built(UniPCMultistepScheduler, 10, **options))
    if prediction == "v_prediction":
        check_steps(built(EulerAncestralDiscreteScheduler, 10, **options))


@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("final", [{}, FINAL])
@pytest.mark.parametrize("steps", [1, 10])
def test_sigmas(steps: int, final: dict[str, Any], sigmas: str) -> None:
    for prediction in PREDICTIONS:
        options = SIGMAS[sigmas] | final | {"prediction_type": prediction}
        check_steps(built(EulerDiscreteScheduler, steps, **options))
        check_steps(built(DPMSolverMultistepScheduler, steps, **options))
        check_steps(built(UniPCMultistepScheduler, steps, **options))
        if not final:
            check_steps(built(DEISMultistepScheduler, steps, **options))
    if not final:
        for shift in (1.0, 3.0):
            flow = built(FlowMatchEulerDiscreteScheduler, steps, shift=shift, **SIGMAS[sigmas])
            check_steps(flow)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}),
        (
            EulerDiscreteScheduler,
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        ),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
        (EulerDiscreteScheduler, {"prediction_type": "original_sample"}),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}),
        (DPMSolverMultistepScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
        (DPMSolverMultistepScheduler, {"euler_at_final": True, "solver_order": 3}),
        (UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh1", **FINAL}),
        (DEISMultistepScheduler, {"solver_order": 3}),
        (DDPMScheduler, {"beta_schedule": "sigmoid", "num_train_timesteps": 200}),
        (FlowMatchEulerDiscreteScheduler, {"shift_terminal": 0.1}),
    ],
)
def test_other_options(cls: type, options: dict[str, Any]) -> None:
    check_steps(built(cls, 7, **options))


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("limit", [{}, THRESHOLDED])
@pytest.mark.parametrize(
    "algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
)
def test_dpm_solver(algorithm: str, limit: dict[str, Any], order: int, prediction: str) -> None:
    flow = prediction == "flow_prediction"
    if flow and not algorithm.endswith("++"):
        pytest.skip("not implemented in diffusers")
    options = limit | {"use_flow_sigmas": flow, "flow_shift": 2.0, "solver_order": order}
    if not algorithm.endswith("++"):
        options |= FINAL
    scheduler = built(
        DPMSolverMultistepScheduler,
        10,
        algorithm_type=algorithm,
        prediction_type=prediction,
        **options,
    )
    check_steps(scheduler)
    assert transition(scheduler, 0).eta == float(algorithm.startswith("sde"))


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_flow_sigmas(cls: type, prediction: str) -> None:
    for limit in ({}, THRESHOLDED):
        options = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": prediction}
        check_steps(built(cls, 10, **options, **limit))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unipc_on_noise_predictions_limits_nothing(prediction: str) -> None:
    options = {"predict_x0": False, "prediction_type": prediction, **FINAL, **THRESHOLDED}
    scheduler = built(UniPCMultistepScheduler, 10, **options)
    check_steps(scheduler)
    assert not transition(scheduler, 0).limit


def test_custom_schedules() -> None:
    ddpm = DDPMScheduler()
    ddpm.set_timesteps(timesteps=[900, 500, 499, 20, 3])
    check_steps(ddpm)
    assert scheduler_run(ddpm).timesteps.tolist() == [900, 500, 499, 20, 3]
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[9.0, 4.0, 1.0, 0.2, 0.0])
    check_steps(euler)
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow.set_timesteps(sigmas=[1.0, 0.7, 0.3, 0.1], mu=0.8)
    check_steps(flow)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("cls", STOCK)
def test_untouched_scheduler(cls: type, steps: int) -> None:
    """Float32 throughout: 1 - alpha_t^2/alpha_s^2 there has the rounding of 1, not its own."""
    scheduler = built(cls, steps)
    run = scheduler_run(scheduler)
    for step in range(steps):
        at = transition(scheduler, step)
        x, prediction = state_of(at, step, torch.float32)
        expected, noise = own_step(scheduler, step, x, prediction)
        actual = at.step(x, prediction, noise)
        assert actual.dtype == torch.float32
        size = max(float(x.abs().max()), float(expected.abs().max()))
        allowed = 2**-22 * (1.0 + 1.0 / run.coefficients.beta_ts[step]) * size
        assert float((actual - expected).abs().max()) < allowed, step


SOURCES = [
    (DDPMScheduler, {**THRESHOLDED, "variance_type": "fixed_large"}),
    (DDIMScheduler, {"clip_sample": True, "set_alpha_to_one": False}),
    (EtaDDIMScheduler, {"eta": 0.7}),
    (EulerDiscreteScheduler, {"timestep_type": "continuous", "use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", **THRESHOLDED}),
    (UniPCMultistepScheduler, {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize("source", SOURCES, ids=[cls.__name__ for cls, _ in SOURCES])
@pytest.mark.parametrize("cls", STOCK[:-1])
def test_options_that_a_scheduler_keeps_but_does_not_have(cls: type, source: Any) -> None:
    """from_config hands on what the other scheduler was built with."""
    options = {"algorithm_type": "deis"} if cls is DEISMultistepScheduler else {}
    scheduler = cls.from_config(source[0](**source[1]).config, **options)
    scheduler.set_timesteps(5)
    check_steps(scheduler)


def test_flow_euler_from_our_configuration_is_deterministic() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(PosteriorFlowScheduler().config)
    scheduler.set_timesteps(5)
    check_steps(scheduler)
    assert transition(scheduler, 0).eta == 0


# ---------------------------------------------------------------------- what stock steps get wrong


def test_ddim_with_noise_from_pure_noise_is_finite() -> None:
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    scheduler = built(DDIMScheduler, 10, **options)
    at = transition(scheduler, 0, eta=1.0)
    assert at.alpha_t == 0
    x, prediction = state_of(at, 0, torch.float32)
    # Of diffusers' own step nothing is asked: it takes the root of 1 - alpha_bar - std^2, which is
    # a rounding below zero on some CPUs and not on others.
    _, noise = own_step(scheduler, 0, x, prediction, eta=1.0)
    ours = at.step(x, prediction, noise)
    expected = at.alpha_s * -prediction + at.sigma_s * noise
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_repeated_timesteps_have_no_length() -> None:
    scheduler = built(DPMSolverMultistepScheduler, 1000, algorithm_type="sde-dpmsolver++")
    run = scheduler_run(scheduler)
    repeated = np.flatnonzero(np.diff(run.timesteps) == 0)
    assert len(repeated) > 0
    c = run.coefficients
    assert (np.diff(c.time) <= -0.5 * SMALLEST_INTERVAL).all()
    assert (c.beta_ts[repeated] == 0).all() and (c.step_var[repeated] == 0).all()
    assert (c.x_factor[repeated] == 1).all() and (c.x0_factor[repeated] == 0).all()
    for values in vars(c).values():
        assert np.isfinite(values).all()
    at = transition(scheduler, int(repeated[0]))
    x, prediction = state_of(at, 0)
    assert torch.equal(at.step(x, prediction), x)


def test_deis_ends_with_a_step_of_no_length() -> None:
    scheduler = built(DEISMultistepScheduler, 5, use_karras_sigmas=True)
    last = transition(scheduler, 4)
    assert (last.x_factor, last.x0_factor, last.step_var) == (1.0, 0.0, 0.0)


def test_trailing_timesteps_that_end_at_minus_one() -> None:
    for cls in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        scheduler = built(cls, 61, timestep_spacing="trailing")
        run = scheduler_run(scheduler)
        assert run.timesteps[-1] == -1 and len(run) == 62  # one more than was asked for
        assert (np.diff(run.coefficients.time) < 0).all() and run.coefficients.time[-1] > 0
        check_steps(scheduler)
    # Here -1 is the noisiest of all.
    with pytest.raises(ValueError, match="timesteps must be from 0 to 999, got -1: .* number of"):
        scheduler_run(built(DDPMScheduler, 61, timestep_spacing="trailing"))


# ---------------------------------------------------------------------- network coordinates

RUNS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, UNCLIPPED),
    "ddpm-large": (DDPMScheduler, {**UNCLIPPED, "variance_type": "fixed_large"}),
    "ddpm-clip": (DDPMScheduler, CLIPPED),
    "ddim": (DDIMScheduler, UNCLIPPED),
    "eta-ddim": (EtaDDIMScheduler, {**CLIPPED, "eta": 0.3}),
    "euler": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-min": (EulerDiscreteScheduler, FINAL),
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "sde-dpm": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "sde-noise": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver", **FINAL}),
    "dpm-flow": (
        DPMSolverMultistepScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
    "unipc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "flow": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "posterior": (PosteriorFlowScheduler, {"shift": 3.0}),
    "posterior-half": (PosteriorFlowScheduler, {"eta": 0.5}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("prediction", ["own", "v_prediction"])
def test_a_plan_takes_the_same_steps_in_the_networks_coordinates(
    name: str, prediction: str
) -> None:
    cls, options = RUNS[name]
    if prediction != "own":
        if "flow" in name or "posterior" in name:
            pytest.skip("flow predictions only")
        options = options | {"prediction_type": prediction}
    scheduler = built(cls, 9, **options)
    run = scheduler_run(scheduler)
    assert len(run) == len(run.coefficients) == 9 and run.scheduler == cls.__name__
    plan = StepPlan(
        run.coefficients, Unguided(), prediction_type=run.prediction_type, clip=run.limit.clip
    )
    for step in range(9):
        at = transition(scheduler, step)
        x, output = state_of(at, step)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).double()
        expected = run.input_scale[step + 1] * at.step(x, output, noise)
        shown = run.input_scale[step] * x
        if hasattr(scheduler, "scale_model_input"):
            fresh = at_step(scheduler, step)
            scaled = fresh.scale_model_input(x, scheduler.timesteps[step])
            torch.testing.assert_close(shown, scaled, rtol=1e-6, atol=0)  # float32 sigmas there
        taken = dng_step(plan, step, shown, output, output, noise=noise).x_next
        assert taken is not None
        # Float64 both, but the folded factors of x cancel where alpha is small.
        torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_rows_of_a_run(name: str) -> None:
    cls, options = RUNS[name]
    scheduler = built(cls, 12, **options)
    run = scheduler_run(scheduler)
    c = run.coefficients
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert run.input_scale.shape == (13,) and (np.diff(c.time) < 0).all()
    assert 0 < c.time[-1] and c.time[0] <= 1
    if "flow" not in name and "posterior" not in name:
        np.testing.assert_allclose(c.alpha_t**2 + c.sigma_t**2, 1.0, rtol=1e-6)
    # p(x_t | x_s): what x_s has, carried on, and beta more.
    np.testing.assert_allclose(c.alpha_ts * c.alpha_s, c.alpha_t, **close)
    np.testing.assert_allclose((c.alpha_ts * c.sigma_s) ** 2 + c.beta_ts, c.sigma_t**2, **close)
    # The step takes a perfectly denoised x_t to the right mean.
    np.testing.assert_allclose(c.x_factor * c.alpha_t + c.x0_factor, c.alpha_s, **close)
    kernel_mean = c.transition_x_factor * c.alpha_t + c.transition_x0_factor
    np.testing.assert_allclose(kernel_mean, c.alpha_s, **close)
    if (c.eta < 1).all():
        # The DDPM posterior: cov(x_s, x_t) = alpha_ts sigma_s^2, and what is left of sigma_s^2.
        covariance = c.alpha_ts * c.sigma_s**2
        np.testing.assert_allclose(c.transition_x_factor * c.sigma_t**2, covariance, **close)
        left = c.sigma_s**2 - covariance**2 / c.sigma_t**2
        np.testing.assert_allclose(c.transition_var, left, rtol=1e-9, atol=1e-14)
        # Whatever eta, x_s has the noise that its time says.
        total = (c.x_factor * c.sigma_t) ** 2 + c.step_var
        np.testing.assert_allclose(total, c.sigma_s**2, **close)
    else:
        assert (c.eta == 1).all()
        for kind in ("x_factor", "x0_factor"):
            assert np.array_equal(getattr(c, f"transition_{kind}"), getattr(c, kind))
        assert np.array_equal(c.transition_var, c.step_var)
    tracked = DynamicNegativeGuidance(2.0, PaperTracker(prior=0.1, temperature=0.2))
    StepPlan(c, tracked, prediction_type=run.prediction_type, clip=run.limit.clip, _warn=False)


def test_three_names_of_one_sampler() -> None:
    """DDPM, DDIM with eta = 1 and Euler ancestral: same A, B and V, same images.

    docs/theory.md, section 3.2.
    """
    options = {"timestep_spacing": "trailing"}
    runs = [
        scheduler_run(built(DDPMScheduler, 20, **UNCLIPPED, **options)),
        scheduler_run(built(DDIMScheduler, 20, **UNCLIPPED, **options), eta=1.0),
        scheduler_run(built(EtaDDIMScheduler, 20, **UNCLIPPED, **options)),
        scheduler_run(built(EulerAncestralDiscreteScheduler, 20, **options)),
    ]
    for run in runs[1:]:
        for name, values in vars(runs[0].coefficients).items():
            # Euler's sigmas are float32.
            np.testing.assert_allclose(
                getattr(run.coefficients, name), values, rtol=1e-5, atol=1e-7, err_msg=name
            )


def test_three_names_of_one_chain() -> None:
    generator = torch.Generator().manual_seed(3)
    start, *noises = torch.randn((21, *SHAPE), generator=generator)
    options = {"timestep_spacing": "trailing"}

    def image(scheduler: Any, eta: float | None = None) -> Tensor:
        run = scheduler_run(scheduler, eta=eta)
        x = start / run.input_scale[0]
        for step in range(len(run)):
            shown = run.input_scale[step] * x
            prediction = torch.tanh(shown) + 0.1 * run.coefficients.sigma_t[step] * shown
            x = transition(scheduler, step, eta=eta).step(x, prediction, noises[step])
        return x

    expected = image(built(DDPMScheduler, 20, **UNCLIPPED, **options))
    for scheduler, eta in [
        (built(DDIMScheduler, 20, **UNCLIPPED, **options), 1.0),
        (built(EulerAncestralDiscreteScheduler, 20, **options), None),
    ]:
        # Twenty steps of float32, of latents up to sigma = 157 on one side.
        torch.testing.assert_close(image(scheduler, eta), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_time_of_discrete_timesteps(cls: type) -> None:
    run = scheduler_run(built(cls, 10, timestep_spacing="trailing"))
    np.testing.assert_allclose(run.coefficients.time, np.linspace(1.0, 0.1, 10), rtol=1e-12)
    np.testing.assert_allclose(run.timesteps, np.linspace(999, 99, 10), rtol=1e-12)


def test_time_of_flow_matching_is_sigma() -> None:
    for cls in (FlowMatchEulerDiscreteScheduler, PosteriorFlowScheduler):
        scheduler = built(cls, 10, shift=3.0)
        run = scheduler_run(scheduler)
        np.testing.assert_allclose(run.coefficients.time, scheduler.sigmas[:-1], rtol=1e-12)
        np.testing.assert_allclose(run.timesteps, 1000 * run.coefficients.time, rtol=1e-6)


def test_time_of_continuous_timesteps_is_that_of_their_sigma() -> None:
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    run = scheduler_run(built(EulerDiscreteScheduler, 10, **options))
    discrete = scheduler_run(built(EulerDiscreteScheduler, 10, prediction_type="v_prediction"))
    assert (run.timesteps < 2).all()  # log sigma / 4
    # Between two training sigmas one interpolates sigma and the other its logarithm.
    np.testing.assert_allclose(run.coefficients.time, discrete.coefficients.time, atol=1e-3)


# ---------------------------------------------------------------------- a step by itself


@pytest.mark.parametrize("cls", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_thresholding_is_the_schedulers(cls: type) -> None:
    scheduler = built(cls, 5, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2)
    limit = transition(scheduler, 0).limit
    assert limit == X0Limit(quantile=0.9, largest=2.0) and limit
    x0 = 3.0 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        expected = scheduler._threshold_sample(x0.to(dtype))
        assert torch.equal(limit(x0.to(dtype)), expected) and expected.abs().max() == 1


def test_nothing_limits_by_default() -> None:
    x0 = 3.0 * torch.randn(SHAPE)
    assert not X0Limit() and X0Limit()(x0) is x0
    assert float(X0Limit(clip=0.5)(x0).abs().max()) == 0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("cls", [DDPMScheduler, EulerDiscreteScheduler])
def test_x0_is_the_schedulers(cls: type, prediction: str) -> None:
    scheduler = in_float64(built(cls, 10, prediction_type=prediction))
    at = transition(scheduler, 4)
    x, output = state_of(at, 0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(4)
    scheduler.scale_model_input(x, scheduler.timesteps[4])
    expected = scheduler.step(output, scheduler.timesteps[4], x).pred_original_sample
    torch.testing.assert_close(at.x0(x, output), expected.double(), rtol=1e-6, atol=1e-6)


def test_sixteen_bits_are_computed_in_float32() -> None:
    at = transition(built(DDPMScheduler, 10, **UNCLIPPED), 5)
    x, output = (values.bfloat16() for values in state_of(at, 0))
    noise = torch.randn(SHAPE).bfloat16()
    taken = at.step(x, output, noise)
    assert taken.dtype == torch.bfloat16 and at.x0(x, output).dtype == torch.bfloat16
    assert torch.equal(taken, at.step(x.float(), output.float(), noise.float()).bfloat16())


def test_bad_tensors() -> None:
    at = transition(built(DDPMScheduler, 10), 5)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="noise must be given"):
        at.step(x, x)
    with pytest.raises(ValueError, match="noise must have the shape of x"):
        at.step(x, x, x[:1])
    with pytest.raises(ValueError, match="prediction must have the shape of x"):
        at.step(x, x[:1], x)
    with pytest.raises(ValueError, match="prediction must have the shape of x"):
        at.x0(x, torch.zeros(2, 6, 4, 4))


# ---------------------------------------------------------------------- eta


def test_eta_is_ddims() -> None:
    scheduler = built(DDIMScheduler, 10)
    assert (scheduler_run(scheduler).coefficients.eta == 0).all()
    assert (scheduler_run(scheduler, eta=0.4).coefficients.eta == 0.4).all()
    assert transition(scheduler, 3, eta=0.4).eta == 0.4
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
            scheduler_run(scheduler, eta=bad)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDPMScheduler(), 1.0),
        (EulerDiscreteScheduler(), 0.0),
        (EulerAncestralDiscreteScheduler(), 1.0),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 1.0),
        (EtaDDIMScheduler(eta=0.5), 0.5),
        (PosteriorFlowScheduler(), 1.0),
    ],
)
def test_eta_of_others_is_their_own(scheduler: Any, eta: float) -> None:
    scheduler.set_timesteps(4)
    assert transition(scheduler, 1, eta=eta).eta == transition(scheduler, 1).eta == eta
    with pytest.raises(ValueError, match=f"eta must be {eta:g} or None .*from_config"):
        scheduler_run(scheduler, eta=0.25)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DDPMScheduler, {}),
        (DDIMScheduler, {}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", **FINAL}),
        (
            UniPCMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
        (DEISMultistepScheduler, {}),
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        (PosteriorFlowScheduler, {"eta": 0.0}),
        (EtaDDIMScheduler, {"eta": 0.2}),
    ],
)
def test_advice_is_a_line_that_runs(cls: type, options: dict[str, Any]) -> None:
    scheduler = cls(**options)

    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = scheduler  # type: ignore[attr-defined]
    exec(advice(scheduler), vars(diffusers) | vars(own_schedulers) | {"pipe": pipe})
    advised = pipe.scheduler  # type: ignore[attr-defined]
    advised.set_timesteps(6)
    run = scheduler_run(advised)
    assert (run.coefficients.eta == 1).all() and (run.coefficients.step_var[:-1] > 0).all()
    for name in ("shift", "use_flow_sigmas", "prediction_type"):
        if name in scheduler.config:
            assert advised.config[name] == scheduler.config[name]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(module._REFUSED))
def test_refused(name: str) -> None:
    if not before("diffusers", "0.42"):
        assert hasattr(diffusers, name)  # fails where diffusers has dropped it
    # A stand-in: some need packages that are not there.
    scheduler = type(name, (), {"set_timesteps": lambda self: None})()
    with pytest.raises(ValueError, match=rf"{name} cannot be guided: \w.*The nearest .*Scheduler"):
        scheduler_run(scheduler)


def test_every_scheduler_of_diffusers_is_read_or_refused() -> None:
    read = set()
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
            continue
        if cls is SchedulerMixin:
            continue
        try:
            scheduler_run(cls.__new__(cls))
        except ValueError as error:
            if f"{name} cannot be guided" not in str(error):
                assert "must have its timesteps set" in str(error)
                read.add(name)
        except AttributeError:  # it was never initialised: got past the refusals
            read.add(name)
    assert read == set(module._READERS)


def test_a_subclass_with_another_step_is_refused() -> None:
    class Mine(DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    class Named(DDIMScheduler):
        pass

    with pytest.raises(
        ValueError, match="Mine cannot be guided: .*DDIMScheduler with another step"
    ):
        scheduler_run(built(Mine, 3))
    check_steps(built(Named, 3))

    class OfOurs(PosteriorFlowScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match="OfOurs cannot .* PosteriorFlowScheduler with another"):
        scheduler_run(built(OfOurs, 3))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DDPMScheduler, {"variance_type": "learned_range"}, "variance_type='learned_range'.*fixed"),
        (DDPMScheduler, {"variance_type": "fixed_large_log"}, "not a number. Use 'fixed_large'"),
        (
            DPMSolverMultistepScheduler,
            {"variance_type": "learned"},
            "variance_type='learned'.*channels",
        ),
        (
            FlowMatchEulerDiscreteScheduler,
            {"stochastic_sampling": True},
            "stochastic_sampling=True.*PosteriorFlowScheduler",
        ),
        (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}, "invert_sigmas=True"),
        (UniPCMultistepScheduler, {"solver_p": DDIMScheduler()}, "solver_p.*DDIMScheduler"),
        (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True, "use_karras_sigmas": True},
            "use_flow_sigmas=True cannot",
        ),
        (
            UniPCMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
            "prediction_type of this UniPC.*got 'v_prediction'",
        ),
        (
            DEISMultistepScheduler,
            {"prediction_type": "flow_prediction"},
            "prediction_type of this DEIS.*got 'flow_prediction'",
        ),
        (EulerAncestralDiscreteScheduler, {"prediction_type": "sample"}, "got 'sample'"),
        (
            DDPMScheduler,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "must not be 'epsilon': timestep 999 is pure noise",
        ),
    ],
)
def test_options_that_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    scheduler = built(cls, 5, **options)
    with pytest.raises(ValueError, match=message):
        scheduler_run(scheduler)


@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt:RuntimeWarning")
def test_the_refused_variance_is_not_a_number() -> None:
    scheduler = built(DDPMScheduler, 5, variance_type="fixed_large_log")
    x = torch.zeros(SHAPE)
    assert scheduler.step(x, scheduler.timesteps[1], x).prev_sample.isnan().all()


def test_noise_that_grows_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.3, 0.5])
    with pytest.raises(ValueError, match="from noise to data, but step 1 of this Flow"):
        scheduler_run(scheduler)
    scheduler.set_timesteps(sigmas=[0.9, 0.3, 0.0])
    with pytest.raises(ValueError, match="from noise to data, but step 2 of this Flow"):
        scheduler_run(scheduler)


def test_sigmas_that_are_no_numbers_are_refused() -> None:
    scheduler = built(FlowMatchEulerDiscreteScheduler, 5)
    scheduler.sigmas[1] = float("nan")  # as shift_terminal=1 makes them
    with pytest.raises(ValueError, match="scheduler.sigmas must be finite numbers, one more than"):
        scheduler_run(scheduler)


def test_zero_terminal_signal_is_no_matter_where_it_is_not_visited() -> None:
    scheduler = built(DDPMScheduler, 10, rescale_betas_zero_snr=True, timestep_spacing="leading")
    assert (scheduler_run(scheduler).coefficients.alpha_t > 0).all()


@pytest.mark.parametrize(
    "cls", [*(getattr(diffusers, name) for name in module._READERS), PosteriorFlowScheduler]
)
def test_timesteps_must_be_set(cls: type) -> None:
    with pytest.raises(ValueError, match=rf"call {cls.__name__}.set_timesteps\(...\) first"):
        scheduler_run(cls())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got int"):
        scheduler_run(3)
    scheduler = built(DDPMScheduler, 5)
    for bad in (-1, 5):
        with pytest.raises(ValueError, match="step must be an integer from 0 to 4"):
            transition(scheduler, bad)
    with pytest.raises(TypeError, match="step must be an integer"):
        transition(scheduler, 1.0)  # type: ignore[arg-type]
    ddim = built(DDIMScheduler, 1000, steps_offset=1)
    with pytest.raises(ValueError, match="timesteps must be from 0 to 999, got 1000"):
        scheduler_run(ddim)


@pytest.mark.parametrize("read", [module, own_schedulers])
def test_no_private_name_of_diffusers_is_used(read: Any) -> None:
    source = ast.parse(Path(read.__file__).read_text())
    own = {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}
    used = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    names = {name for name in used if not name.endswith("__")} - own
    assert names == set()  # what is leaned on is listed in tests.helpers.private
