"""The log weight that a step returns from its two sums: the ratio of two densities of x_next."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dng_kernels import BoundStep, StepPlan, dng_step
from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    LimitedInterval,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
)
from tests.helpers import textbook
from tests.helpers.tolerances import STEP, STEP_UNITS, error

LINEAR = NoiseSchedule.linear().respace(6)
CASES = {
    "paper": (PaperTracker(prior=0.2), DDPM(), "epsilon"),
    "log-odds, large": (LogOddsTracker(prior=0.2), DDPM("large"), "v_prediction"),
    "path, less noise": (PathTracker(prior=0.2), DDIM(0.4), "sample"),
}
ENGINES = [
    "reference",
    "cpu",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    ),
]


def made(name, shape, dtype):
    """A plan, and inputs of a step that one of two samples is guided in a lot."""
    tracker, sampler, kind = CASES[name]
    rule = DynamicNegativeGuidance(2.0, tracker)
    plan = StepPlan(
        LINEAR.coefficients(sampler), rule, prediction_type=kind, weighted=True, _warn=False
    )
    rng = np.random.default_rng(3)
    given = {key: rng.normal(size=shape) for key in ("x", "eps", "eps_neg", "noise")}
    given["eps_neg"] = given["eps"] + 0.1 * given["eps_neg"]
    given["state"] = np.log([0.1, 0.6])
    return plan, {key: torch.from_numpy(value).to(dtype) for key, value in given.items()}


def ratio(plan, step, given, guided, x_next):
    """log N(x_next; mu(eps), v) - log N(x_next; mu(guided), v), from both squared norms."""
    c, x = plan.coefficients, given["x"].double().numpy()
    at = textbook.Interval(c.alpha_t[step], c.sigma_t[step], c.alpha_s[step], c.sigma_s[step])
    means = []
    for prediction in (given["eps"].double().numpy(), guided):
        eps = textbook.noise_of(at, x, prediction, plan.prediction_type)
        x0 = textbook.predicted_x0(at, x, eps, None)
        means.append(c.x_factor[step] * x + c.x0_factor[step] * x0)
    squares = [textbook.squared_distance(x_next, mean) for mean in means]
    return (squares[1] - squares[0]) / (2.0 * c.step_var[step])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_the_weight_of_a_step_is_the_ratio_of_densities(name, backend):
    plan, given = made(name, (2, 37), torch.float64)
    for step in range(len(plan)):
        taken = dng_step(plan, step, **given, return_guided=True, backend=backend)
        if plan.coefficients.step_var[step] == 0.0:
            # A last step without noise has no density, and is not guided.
            assert torch.equal(taken.eps_guided, given["eps"])
            assert not bool(taken.log_weight.any())
            continue
        expected = ratio(plan, step, given, taken.eps_guided.numpy(), taken.x_next.numpy())
        assert np.abs(expected).max() > 1e-3
        assert error(taken.log_weight, expected) < STEP


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("shape", [(2, 37), (2, 2500)])
def test_float32_is_float64_to_rounding(backend, shape, kernel_device):
    device = kernel_device if backend == "triton" else "cpu"
    for name in CASES:
        plan, given = made(name, shape, torch.float32)
        here = {key: value.to(device) for key, value in given.items()}
        for step in (1, len(plan) - 1):
            exact = {key: value.double() for key, value in given.items()}
            expected = dng_step(plan, step, **exact, return_scale=True, backend="reference")
            got = dng_step(plan.to(device), step, **here, backend=backend).log_weight.cpu()
            row = plan.row(step)
            # One rounding of every term of the two sums, and of what multiplies them.
            k = np.abs(row.factor * expected.scale.numpy())
            delta = np.abs((exact["eps_neg"] - exact["eps"]).numpy())
            terms = k * np.sum(delta * row.deviation * np.abs(exact["noise"].numpy()), axis=1)
            terms = (terms + k * k * np.sum(delta**2, axis=1)) / (row.deviation**2 or 1.0)
            allowed = STEP_UNITS * 2.0**-24 * 8.0 * terms
            gap = (got.double() - expected.log_weight).abs().numpy()
            assert np.all(gap <= allowed), (name, step)


def test_a_bound_step_and_an_interval_have_weights_too():
    plan, given = made("paper", (2, 37), torch.float32)
    expected = dng_step(plan, 2, **given).log_weight
    assert torch.allclose(BoundStep(plan, **given)(2).log_weight, expected, rtol=1e-5, atol=1e-6)
    never = StepPlan(plan.coefficients, LimitedInterval(plan.rule, 0.0, 0.0), weighted=True)
    assert not bool(dng_step(never, 2, **given).log_weight.any())


def test_weights_change_no_other_result():
    plan, given = made("paper", (2, 37), torch.float32)
    plain = StepPlan(plan.coefficients, plan.rule)
    for step in range(len(plan) - 1):
        got, expected = dng_step(plan, step, **given), dng_step(plain, step, **given)
        assert torch.equal(got.x_next, expected.x_next) and torch.equal(got.state, expected.state)
        assert expected.log_weight is None
