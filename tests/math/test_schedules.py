"""Schedules against diffusers' definitions; coefficients against direct Gaussian algebra."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dng_math import DDIM, DDPM, EulerMaruyama, NoiseSchedule, ProbabilityFlow
from tests.helpers import textbook

ALL = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "power": NoiseSchedule.power(rho=7.0),
    "flow": NoiseSchedule.flow(),
    "geometric": NoiseSchedule.variance_exploding(),
    "karras": NoiseSchedule.variance_exploding(rho=7.0),
}
SAMPLERS = [DDPM(), DDPM("large"), DDIM(0.0), DDIM(0.3), DDIM(1.0)]

schedules = st.sampled_from(sorted(ALL)).flatmap(
    lambda name: st.integers(2, 60).map(lambda steps: ALL[name].respace(steps))
)


def test_definitions():
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    np.testing.assert_allclose(ALL["linear"].alpha[1:] ** 2, bar, rtol=1e-12)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(
        ALL["scaled_linear"].alpha[1:] ** 2, np.cumprod(1 - betas), rtol=1e-12
    )
    # Nichol and Dhariwal: alpha_bar(t) = f(t)/f(0), except where the betas are capped.
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ALL["cosine"].alpha[:999] ** 2, f[:999] / f[0], rtol=1e-9)
    assert ALL["cosine"].alpha[1000] ** 2 == pytest.approx(0.001 * f[999] / f[0], rel=1e-9)
    np.testing.assert_allclose(ALL["flow"].alpha + ALL["flow"].sigma, 1.0, atol=1e-15)
    assert ALL["flow"].alpha[-1] == 0.0
    karras = (80 ** (1 / 7) + np.arange(1000) / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(ALL["karras"].sigma[:0:-1], karras, rtol=1e-12)
    ratio = ALL["geometric"].sigma[2:] / ALL["geometric"].sigma[1:-1]
    np.testing.assert_allclose(ratio, (80 / 0.002) ** (1 / 999), rtol=1e-12)
    same = NoiseSchedule.from_alpha_bar(bar)
    np.testing.assert_allclose(same.sigma, ALL["linear"].sigma, rtol=1e-12)


@given(schedules)
def test_variance_preserving_or_exploding_and_ends(schedule):
    assert (schedule.alpha[0], schedule.sigma[0]) == (1.0, 0.0)
    assert (schedule.time[0], schedule.time[-1]) == (0.0, 1.0)
    assert np.all(np.diff(schedule.sigma) > 0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_respacing_keeps_levels_and_ends(name):
    schedule = ALL[name]
    short = schedule.respace(7)
    assert len(short) == 7
    assert np.isin(short.sigma, schedule.sigma).all()
    assert short.sigma[-1] == schedule.sigma[-1]
    assert np.array_equal(schedule.respace(len(schedule)).sigma, schedule.sigma)
    picked = schedule.select([10, 500])
    np.testing.assert_array_equal(picked.sigma, schedule.sigma[[0, 10, 500]])


@given(schedules, st.sampled_from(SAMPLERS))
def test_first_order_steps_keep_the_marginal(schedule, sampler):
    """From x_t = alpha_t x0 + sigma_t eps and the true x0, x_s has the law of time s.

    A alpha_t + B = alpha_s and (A sigma_t)^2 + V = sigma_s^2; the large variance is too large.
    """
    c = schedule.coefficients(sampler)
    np.testing.assert_allclose(c.x_factor * c.alpha_t + c.x0_factor, c.alpha_s, atol=1e-12)
    variance = (c.x_factor * c.sigma_t) ** 2 + c.step_var
    if sampler == DDPM("large"):
        assert np.all(variance[:-1] > c.sigma_s[:-1] ** 2)
    else:
        np.testing.assert_allclose(variance, c.sigma_s**2, rtol=1e-9, atol=1e-15)


@given(schedules)
def test_the_ddpm_step_is_bayes_rule(schedule):
    """p(x_s | x_t, x0) by Gaussian conditioning of x_s on x_t."""
    c = schedule.coefficients(DDPM())
    covariance = c.alpha_ts * c.sigma_s**2
    gain = covariance / c.sigma_t**2
    np.testing.assert_allclose(c.x_factor, gain, atol=1e-14)
    np.testing.assert_allclose(c.x0_factor, c.alpha_s - gain * c.alpha_t, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(
        c.step_var, c.sigma_s**2 - gain * covariance, rtol=1e-8, atol=1e-14 * c.sigma_s.max() ** 2
    )


def test_ddim_with_eta_one_is_ddpm():
    for schedule in ALL.values():
        a, b = schedule.coefficients(DDIM(1.0)), schedule.coefficients(DDPM())
        for name in ("x_factor", "x0_factor", "step_var"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("sampler", [DDPM(), DDPM("large"), DDIM(0.0), DDIM(0.4)])
def test_steps_match_the_textbook(sampler):
    """Through a noise prediction, with the formulas as DDPM and DDIM print them."""
    steps = 100
    schedule = NoiseSchedule.linear(steps)
    c = schedule.coefficients(sampler)
    book = textbook.ddpm_coefficients(steps)
    rng = np.random.default_rng(0)
    x, eps, z = rng.normal(size=(3, 5, 2))
    for i, t in enumerate(reversed(range(steps))):
        x0 = (x - c.sigma_t[i] * eps) / c.alpha_t[i]
        got = c.x_factor[i] * x + c.x0_factor[i] * x0 + np.sqrt(c.step_var[i]) * z
        if isinstance(sampler, DDPM):
            expected = textbook.ddpm_step(book, t, x, eps, z, sampler.variance)
        else:
            bar = np.append(1.0, book.alpha_bars)
            expected = textbook.ddim_step(bar[t + 1], bar[t], x, eps, z, sampler.eta)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [EulerMaruyama(), ProbabilityFlow()])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_euler_steps_tend_to_the_exact_ones(sampler, name):
    """Halving the step halves the difference to DDPM (eta 1) or DDIM (eta 0), relative to it."""
    exact = DDPM() if isinstance(sampler, EulerMaruyama) else DDIM(0.0)
    gaps = []
    for steps in (250, 500):
        schedule = ALL[name].respace(steps)
        got, wanted = schedule.coefficients(sampler), schedule.coefficients(exact)
        # The same times in both: every second row of the finer one starts where a coarse one does.
        rows = slice(50, 150) if steps == 250 else slice(100, 300, 2)
        gaps.append(np.abs(got.x0_factor - wanted.x0_factor)[rows].mean())
    assert 3.0 < gaps[0] / gaps[1] < 5.0  # second order a step
    assert got.step_var[-1] == 0 and got.x_factor[-1] == 0 and got.x0_factor[-1] == 1


def test_euler_refuses_pure_noise():
    with pytest.raises(ValueError, match="alpha > 0"):
        NoiseSchedule.flow(10).coefficients(EulerMaruyama())


def test_published_variance_pair():
    """Small in the tracker, with beta at the last step; large in the noise."""
    schedule = NoiseSchedule.linear(1000)
    c = schedule.coefficients(DDPM("large"))
    book = textbook.ddpm_coefficients(1000)
    published = c.tracker_variance("published")
    small = [textbook.ddpm_variance(book, t, "small") for t in reversed(range(1, 1000))]
    np.testing.assert_allclose(published[:-1], small, rtol=1e-9)
    assert published[-1] == pytest.approx(1e-4, rel=1e-9)
    assert c.tracker_variance("small")[-1] == 0.0
    np.testing.assert_allclose(c.tracker_variance("matched")[:-1], c.beta_ts[:-1])
    assert c.step_var[-1] == 0.0 == c.tracker_variance("matched")[-1]
    np.testing.assert_allclose(c.tracker_variance("large"), c.beta_ts)


BAD = [
    (lambda: NoiseSchedule([1.0, 0.9, 0.95], [0.0, 0.3, 0.4]), "not monotone.*index 1"),
    (lambda: NoiseSchedule([1.0, 0.9, 0.9], [0.0, 0.4, 0.3]), "not monotone.*index 1"),
    (lambda: NoiseSchedule([0.9, 0.8], [0.0, 0.4]), "start at the data"),
    (lambda: NoiseSchedule([1.0, 0.8], [0.1, 0.4]), "start at the data"),
    (lambda: NoiseSchedule([1.0], [0.0]), "at least 2"),
    (lambda: NoiseSchedule([1.0, 0.5], [0.0, 0.5, 0.6]), "same length"),
    (lambda: NoiseSchedule([1.0, -0.5], [0.0, 0.5]), ">= 0"),
    (lambda: NoiseSchedule([1.0, np.nan], [0.0, 0.5]), "alpha must be finite.*nan"),
    (lambda: NoiseSchedule([1.0, 0.5], [0.0, 0.5], [0.0, 0.5]), "time must increase"),
    (lambda: NoiseSchedule.from_alpha_bar([0.9, 0.95]), "alpha_bar must be strictly decreasing"),
    (lambda: NoiseSchedule.from_alpha_bar([1.0, 0.9]), "alpha_bar"),
    (lambda: NoiseSchedule.from_alpha_bar([]), "alpha_bar"),
    (lambda: NoiseSchedule.from_betas([0.1, -0.1]), "betas"),
    (lambda: NoiseSchedule.linear(0), "steps.*>= 1.*0"),
    (lambda: NoiseSchedule.linear(beta_min=0.5, beta_max=0.1), "beta_max"),
    (lambda: NoiseSchedule.power(rho=0), "rho"),
    (lambda: NoiseSchedule.cosine(beta_max=1.5), "beta_max"),
    (lambda: NoiseSchedule.flow(-1), "steps"),
    (lambda: NoiseSchedule.variance_exploding(sigma_min=2.0, sigma_max=1.0), "sigma_max"),
    (lambda: NoiseSchedule.linear(10).respace(0), "steps"),
    (lambda: NoiseSchedule.linear(10).respace(11), "steps.*from 1 to 10.*11"),
    (lambda: NoiseSchedule.linear(10).select([11]), "indices"),
    (lambda: NoiseSchedule.linear(10).select([0]), "indices"),
    (lambda: NoiseSchedule.linear(10).select([]), "indices must be a non-empty list"),
    (lambda: NoiseSchedule.linear(10).select(5), "indices must be a non-empty list, got 5"),
    (lambda: NoiseSchedule.linear(10).select([[1, 2]]), "indices must be a non-empty list"),
    (lambda: NoiseSchedule.linear(10).select([True, False]), r"mask must have shape \(11,\)"),
    (lambda: DDPM("medium"), "variance.*'medium'"),
    (lambda: DDIM(1.5), r"eta.*\[0, 1\].*1.5"),
    (lambda: NoiseSchedule.linear(5).coefficients().tracker_variance("x"), "choice.*'x'"),
]


def test_a_mask_selects_the_times_that_it_marks():
    """And is not read as the indices 1 and 0."""
    schedule = NoiseSchedule.linear(10)
    marked = schedule.select(np.isin(np.arange(11), [3, 7, 10]))
    listed = schedule.select([3, 7, 10])
    for name in ("alpha", "sigma", "time"):
        assert np.array_equal(getattr(marked, name), getattr(listed, name))
    assert len(marked) == 3


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("sampler", [*SAMPLERS, EulerMaruyama(), ProbabilityFlow()], ids=repr)
def test_schedules_and_coefficients_are_read_only_and_their_copies_too(sampler):
    """What one run writes into coefficients, another one would read."""
    schedule = NoiseSchedule.linear(5)
    held = schedule.coefficients(sampler)
    for thing in (schedule, held):
        for other in (
            thing,
            pickle.loads(pickle.dumps(thing)),
            copy.deepcopy(thing),
            copy.copy(thing),
            *([dataclasses.replace(thing)] if thing is held else []),
        ):
            for field in dataclasses.fields(thing):
                values = getattr(other, field.name)
                np.testing.assert_array_equal(values, getattr(thing, field.name))
                with pytest.raises(ValueError, match="read-only"):
                    values[0] = 2.0


def test_wrong_types():
    with pytest.raises(TypeError, match="steps.*integer.*2.5"):
        NoiseSchedule.linear(2.5)
    with pytest.raises(TypeError, match="indices.*integers"):
        NoiseSchedule.linear(10).select([0.5])
    with pytest.raises(TypeError, match="alpha"):
        NoiseSchedule("ab", [0.0, 1.0])
