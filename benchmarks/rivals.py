"""The computations of dng_math as written with NumPy, torch, JAX, SciPy or scikit-learn.

The chain is one job: a mixture in one dimension with one forbidden component, DNG with the paper's
tracker, DDPM.  Only the coefficients come from the package; the arithmetic is independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from dng_math import DynamicNegativeGuidance, GaussianMixture, NoiseSchedule, PaperTracker

Array = NDArray[np.float64]
CHUNK = 50_000
INITIAL = -1  # the "step" number under which x_T's noise is drawn
Draw = Callable[[int, Any], object]  # (step, out): standard normals into out, shape (N,)


@dataclass(frozen=True)
class Job:
    """Settings of a chain in one dimension, guided away from one component."""

    mixture: GaussianMixture
    schedule: NoiseSchedule
    tracker: PaperTracker = field(default_factory=PaperTracker)
    guidance_scale: float = 1.0
    forbidden: int = 1

    @property
    def rule(self) -> DynamicNegativeGuidance:
        """The rule, for :func:`dng_math.sample`."""
        return DynamicNegativeGuidance(self.guidance_scale, self.tracker)

    @property
    def log_prior(self) -> float:
        """log p(c), from which the tracker starts."""
        return float(np.log(self.mixture.weights[self.forbidden]))

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the tracked log p(c | x)."""
        return float(np.log(self.tracker.p_min)), float(np.log(self.tracker.p_max))

    def components(self) -> tuple[Array, Array, Array, Array]:
        """alpha m, -1/(2v), log w - log(v)/2 and d E[x0]/dx of every step, shape (S, K, 1)."""
        c = self.schedule.coefficients()
        alpha, sigma = c.alpha_t[:, None, None], c.sigma_t[:, None, None]
        covariance = self.mixture.covariances[:, None]
        v = alpha**2 * covariance + sigma**2
        peak = np.log(self.mixture.weights)[:, None] - 0.5 * np.log(v)
        return alpha * self.mixture.means, -0.5 / v, peak, alpha * covariance / v

    def steps(self) -> tuple[Array, Array, Array, Array]:
        """x_factor, x0_factor, deviation and 1/(2v) (0 if v = 0) of every step, shape (S,)."""
        c = self.schedule.coefficients()
        v = c.tracker_variance(self.tracker.variance)
        half = np.divide(0.5, v, out=np.zeros_like(v), where=v > 0)
        return c.x_factor, c.x0_factor, np.sqrt(c.step_var), half


def four_modes(steps: int) -> Job:
    """The job of the comparison: four narrow modes, of which the second is forbidden."""
    mixture = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
    return Job(mixture, NoiseSchedule.linear(1000).respace(steps))


def eager_chain(xp: Any, job: Job, n: int, draw: Draw) -> tuple[Any, Any]:
    """x and log p(c | x), shape (N,), float64, computed in place.

    ``xp`` is numpy or torch, whose function names agree here.  Arrays of shape (K, N) are
    allocated once.
    """
    tables = [xp.asarray(values) for values in job.components()]
    columns = zip(*(values.tolist() for values in job.steps()), strict=True)
    means = xp.asarray(job.mixture.means.copy())
    low, high = job.bounds
    value = xp.empty((len(means), n), dtype=xp.float64)
    weight = xp.empty((len(means), n), dtype=xp.float64)
    x = xp.empty(n, dtype=xp.float64)
    p, gap, z = (xp.empty(n, dtype=xp.float64) for _ in range(3))
    log_p = xp.full((n,), min(max(job.log_prior, low), high), dtype=xp.float64)
    draw(INITIAL, x)
    x *= float(job.schedule.sigma[-1])
    for i, (x_factor, x0_factor, deviation, half) in enumerate(columns):
        centre, minus_half_precision, peak, gain = (values[i] for values in tables)
        # Component k's prediction of x0, and its share of the posterior (unnormalised).
        xp.subtract(x, centre, out=value)
        xp.multiply(value, value, out=weight)
        weight *= minus_half_precision
        weight += peak
        weight -= xp.amax(weight, 0)
        xp.exp(weight, out=weight)
        total = xp.sum(weight, 0)
        value *= gain
        value += means
        weight *= value
        x0 = xp.sum(weight, 0)
        x0 /= total
        # gap = mu_c - mu, and the guided mean is mu - lambda gap.
        xp.subtract(value[job.forbidden], x0, out=gap)
        gap *= x0_factor
        xp.exp(log_p, out=p)
        p /= 1.0 - p
        p *= -job.guidance_scale
        p *= gap
        if deviation > 0.0:
            draw(i, z)
            z *= deviation
            p += z
        x *= x_factor
        x0 *= x0_factor
        x += x0
        x += p
        if half > 0.0:
            # p is the residual x_next - mu: the log ratio is (2 p gap - gap^2) / 2v.
            p *= 2.0
            p -= gap
            p *= gap
            p *= half
            log_p += p
            xp.clip(log_p, low, high, out=log_p)
    return x, log_p


def plain_chain(job: Job, n: int, draw: Draw) -> tuple[Array, Array]:
    """x and log p(c | x), shape (N,), by the formulas as written, on arrays of shape (N, K)."""
    means = job.mixture.means[:, 0]
    low, high = job.bounds
    z = np.empty(n)
    draw(INITIAL, z)
    x = float(job.schedule.sigma[-1]) * z
    log_p = np.full(n, min(max(job.log_prior, low), high))
    rows = zip(*(values[..., 0] for values in job.components()), *job.steps(), strict=True)
    for i, row in enumerate(rows):
        centre, minus_half_precision, peak, gain, x_factor, x0_factor, deviation, half = row
        offset = x[:, None] - centre
        logit = peak + minus_half_precision * offset**2
        weight = np.exp(logit - logit.max(axis=1, keepdims=True))
        weight = weight / weight.sum(axis=1, keepdims=True)
        value = means + gain * offset
        x0, x0_negative = (weight * value).sum(axis=1), value[:, job.forbidden]
        p = np.exp(log_p)
        guided = x0 - job.guidance_scale * p / (1.0 - p) * (x0_negative - x0)
        mean, mean_negative = (x_factor * x + x0_factor * y for y in (x0, x0_negative))
        x = x_factor * x + x0_factor * guided
        if deviation > 0.0:
            draw(i, z)
            x = x + deviation * z
        if half > 0.0:
            log_p = log_p - half * ((x - mean_negative) ** 2 - (x - mean) ** 2)
            log_p = np.clip(log_p, low, high)
    return x, log_p


def numpy_chain(job: Job, n: int, seed: int, *, in_place: bool) -> Array:
    """Samples, shape (N,), with NumPy's default generator."""
    generator = np.random.default_rng(seed)

    def draw(step: int, out: Array) -> None:
        generator.standard_normal(out=out)

    return eager_chain(np, job, n, draw)[0] if in_place else plain_chain(job, n, draw)[0]


def torch_chain(torch: Any, job: Job, n: int, seed: int) -> Array:
    """Samples, shape (N,), by eager torch on the CPU in float64, with torch's threads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        x, _ = eager_chain(torch, job, n, lambda step, out: out.normal_(generator=generator))
    return np.asarray(x)


def jax_chain(jax: Any, job: Job, n: int) -> Callable[[int], Array]:
    """A function from a seed to samples (N,): one jitted scan, in float32, JAX's default."""
    jnp = jax.numpy
    rows = tuple(jnp.asarray(values, jnp.float32) for values in (*job.components(), *job.steps()))
    means = jnp.asarray(job.mixture.means, jnp.float32)
    low, high = job.bounds

    def step(state: Any, row: Any) -> tuple[Any, None]:
        x, log_p, key = state
        centre, minus_half_precision, peak, gain, x_factor, x0_factor, deviation, half = row
        key, own = jax.random.split(key)
        offset = x - centre
        logit = peak + minus_half_precision * offset * offset
        weight = jnp.exp(logit - logit.max(0))
        value = means + gain * offset
        x0 = (weight * value).sum(0) / weight.sum(0)
        gap = x0_factor * (value[job.forbidden] - x0)
        p = jnp.exp(log_p)
        noise = deviation * jax.random.normal(own, x.shape, x.dtype)
        residual = noise - job.guidance_scale * p / (1.0 - p) * gap
        log_p = jnp.clip(log_p + half * (2.0 * residual - gap) * gap, low, high)
        return (x_factor * x + x0_factor * x0 + residual, log_p, key), None

    @jax.jit  # type: ignore[untyped-decorator]
    def chain(key: Any) -> Any:
        key, own = jax.random.split(key)
        x = float(job.schedule.sigma[-1]) * jax.random.normal(own, (n,), jnp.float32)
        start = jnp.full(n, min(max(job.log_prior, low), high), jnp.float32)
        return jax.lax.scan(step, (x, start, key), rows)[0][0]

    return lambda seed: np.asarray(chain(jax.random.key(seed)))


def primitives(n: int, steps: int, components: int) -> Callable[[], None]:
    """Only the calls of NumPy's ``exp`` and ``standard_normal`` that the job needs.

    Per particle and step there is one exponential for each component (the largest component's is
    exp(0), which dng_math and the NumPy chain compute too), one for the posterior, which is tracked
    as a logarithm, and one normal: S - 1 steps have noise, and x_T needs one more.  Two choices
    favour NumPy: all calls use the same two arrays, which stay in the cache, and arguments are
    between -8 and 0, so that no result is subnormal.
    """
    generator = np.random.default_rng(0)
    source, target = generator.uniform(-8.0, 0.0, n), np.empty(n)

    def run() -> None:
        for _ in range(steps):
            for _ in range(components + 1):
                np.exp(source, out=target)
            generator.standard_normal(out=target)

    return run


# ---------------------------------------------------------------------- densities and scores


def _scipy_joint(mixture: GaussianMixture, x: Array) -> Array:
    """log w_k N(x; k), shape (K, N)."""
    parts = zip(mixture.means, mixture.covariances, strict=True)
    joint = np.stack([multivariate_normal.logpdf(x, mean, cov) for mean, cov in parts])
    joint += np.log(mixture.weights)[:, None]
    return joint


def _score(mixture: GaussianMixture, x: Array, responsibilities: Array) -> Array:
    """sum_k r_k C_k^-1 (m_k - x), shape (N, D), from responsibilities (K, N)."""
    full = mixture.kind == "full"
    precisions = np.linalg.inv(mixture.covariances) if full else 1.0 / mixture.covariances
    total = np.zeros_like(x)
    for r, mean, precision in zip(responsibilities, mixture.means, precisions, strict=True):
        pull = (mean - x) @ precision if full else (mean - x) * precision
        pull *= r[:, None]
        total += pull
    return total


def in_chunks(function: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function to chunks that fit the cache (3 times faster at 10^6 points)."""
    return np.concatenate([function(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])


def scipy_log_prob(mixture: GaussianMixture, x: Array) -> Array:
    return np.asarray(logsumexp(_scipy_joint(mixture, x), axis=0))


def scipy_score(mixture: GaussianMixture, x: Array) -> Array:
    joint = _scipy_joint(mixture, x)
    joint -= logsumexp(joint, axis=0)
    return _score(mixture, x, np.exp(joint, out=joint))


def sklearn_functions(mixture: GaussianMixture) -> dict[str, Callable[[Array], Array]]:
    """log_prob and score by scikit-learn's GaussianMixture with the same parameters."""
    kind = {"full": "full", "diagonal": "diag"}[mixture.kind]
    model = import_module("sklearn.mixture").GaussianMixture(8, covariance_type=kind)
    model.weights_, model.means_ = mixture.weights, mixture.means
    model.covariances_ = mixture.covariances
    if kind == "full":
        lower = np.linalg.cholesky(mixture.covariances)
        model.precisions_cholesky_ = np.linalg.inv(lower).transpose(0, 2, 1)
    else:
        model.precisions_cholesky_ = 1.0 / np.sqrt(mixture.covariances)
    return {
        "log_prob": model.score_samples,
        "score": lambda x: _score(mixture, x, model.predict_proba(x).T),
    }
