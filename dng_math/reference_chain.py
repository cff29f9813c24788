"""A guided chain in plain NumPy, one line per operation: read this first.

It runs any rule object, and the fused engine is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dng_math import equations, noise
from dng_math.prediction import (
    PathPoint,
    Roles,
    divergence_correction,
    ends_of,
    guided_by,
    path_point,
    predictions_at,
)
from dng_math.rules import DynamicNegativeGuidance, Rule, StepNumbers, innermost
from dng_math.schedules import StepCoefficients
from dng_math.trackers import (
    PathTracker,
    RatioTracker,
    Tracker,
    at_steps,
)
from dng_math.weights import FeynmanKac, Population

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Chain:
    """The checked arguments of :func:`dng_math.sample`, as both engines take them."""

    roles: Roles
    coefficients: StepCoefficients
    rule: Rule
    tracker: Tracker | None
    prior: Array
    n: int
    seed: int
    first_sample: int
    record: frozenset[str]
    threads: int
    weights: FeynmanKac | None = None

    @property
    def rows(self) -> int:
        """Number of rows of states and scales: one per concept, and at least one."""
        return max(1, len(self.roles.concepts))

    @property
    def variances(self) -> Array:
        """Variance that the tracker divides by at every step, shape (N,)."""
        choice = "matched" if self.tracker is None else self.tracker.variance
        return self.coefficients.tracker_variance(choice)

    def level(self, x: Array, alpha: float, sigma: float, state: Array | None) -> Array:
        """g log(1 - p) of the samples, (N,), with the exact posterior or the tracked one."""
        rule = innermost(self.rule)
        assert isinstance(rule, DynamicNegativeGuidance)
        if self.tracker is None or state is None:
            noisy = self.roles.mixture.diffuse(alpha, sigma)
            return rule.guidance_scale * self.roles.log_share(noisy, x, self.roles.rest)
        assert not isinstance(self.tracker, RatioTracker)
        odds = self.tracker.odds(state)
        total = np.minimum(np.sum(odds / (1.0 + odds), axis=0), self.tracker.p_max)
        return rule.guidance_scale * np.log1p(-total)


def run_reference(
    chain: Chain, x: Array
) -> tuple[Array, Array | None, dict[str, Array], Population | None]:
    """Run a chain in NumPy.

    Parameters
    ----------
    chain : Chain
    x : ndarray, shape (N, D)
        x_T; it is not modified.

    Returns
    -------
    x : ndarray, shape (N, D)
        The samples.
    state : ndarray, shape (M, N), or None
        The tracker's state at the end.
    rows : dict of str to ndarray
        The recorded arrays by name.
    population : Population or None
        The weights.
    """
    roles, c, rule, tracker = chain.roles, chain.coefficients, chain.rule, chain.tracker
    mixture, parts = roles.mixture, roles.forbidden_parts
    memory = rule.init(chain.n, mixture.dim)
    state = None
    if tracker is not None:
        state = tracker.init(np.repeat(chain.prior[:, None], chain.n, axis=1))
    trackers = None if tracker is None else at_steps(tracker, c)
    previous: PathPoint | None = None
    population: Population | None = None
    if chain.weights is not None:
        level = chain.level(x, float(c.alpha_t[0]), float(c.sigma_t[0]), state)
        population = Population(chain.weights, level, chain.seed)
    rows: dict[str, list[Array]] = {name: [] for name in chain.record}

    def keep(name: str, value: Array | None) -> None:
        if name in rows and value is not None:
            rows[name].append(value)

    for i, variance in enumerate(chain.variances):
        alpha, sigma = float(c.alpha_t[i]), float(c.sigma_t[i])
        predictions = predictions_at(
            rule,
            roles,
            x,
            alpha,
            sigma,
            "sample",
            odds=None,
            step=i,
            time=float(c.time[i]),
            numbers=StepNumbers.of(c, i),
        )
        if isinstance(tracker, PathTracker) and trackers is not None and state is not None:
            # Before the step: the state is that of the point where the predictions were made.
            base, others = predictions.measured_from, predictions.negative
            noisy = roles.world_part.diffuse(alpha, sigma)
            whole = noisy.score_divergence(x)
            gaps = [part.diffuse(alpha, sigma).score_divergence(x) - whole for part in parts]
            point = path_point(x, alpha, sigma, base, others, np.array(gaps))
            of_step = trackers[max(i - 1, 0)]  # that of the way here
            assert isinstance(of_step, PathTracker)
            state = of_step.update(state, *ends_of(previous, point), len(c))
            previous = point
        if tracker is not None and state is not None:
            predictions = replace(predictions, odds=tracker.odds(state))
        guided, scale, memory = guided_by(rule, predictions, memory)
        if population is not None and c.step_var[i] == 0:  # no density to compare
            guided, scale = predictions.base, np.zeros_like(scale)
        log_ratio = np.zeros(len(x))
        x_next = equations.step_mean(x, guided, c.x_factor[i], c.x0_factor[i])
        if c.step_var[i] > 0:
            z = noise.standard_normal(
                chain.seed, chain.n, mixture.dim, step=i, first_sample=chain.first_sample
            )
            deviation = np.sqrt(c.step_var[i])
            x_next = equations.step(x_next, deviation, z)
            shift = c.x0_factor[i] * (guided - predictions.base)
            log_ratio = equations.log_weight(
                np.sum(z * shift, axis=-1), np.sum(shift * shift, axis=-1), deviation
            )
        keep("trajectory", x)
        keep("scale", scale)
        keep("tracked", state)
        if "exact" in rows:
            noisy = mixture.diffuse(alpha, sigma)
            keep("exact", np.array([roles.log_share(noisy, x, part) for part in roles.concepts]))
        if (
            tracker is not None
            and trackers is not None
            and state is not None
            and not isinstance(tracker, PathTracker)
        ):
            base, others = predictions.measured_from, predictions.negative
            if isinstance(tracker, RatioTracker):
                assert predictions.positive is not None
                others = predictions.positive[None]
            gap = c.transition_x0_factor[i] * (others - base)
            residual = x_next - equations.step_mean(
                x, base, c.transition_x_factor[i], c.transition_x0_factor[i]
            )
            correction: Array | float = 0.0
            if not isinstance(tracker, RatioTracker) and tracker.divergence:
                correction = divergence_correction(
                    roles.world_part, x, c, i, tracker, state, forbidden=roles.world_concepts
                )
            step_tracker = trackers[i]
            assert not isinstance(step_tracker, PathTracker)
            state = step_tracker.update(
                state,
                np.sum(gap * gap, axis=-1),
                np.sum(residual * gap, axis=-1),
                float(variance),
                len(c),
                correction,
            )
        x = x_next
        if population is not None:
            level = chain.level(x, float(c.alpha_s[i]), float(c.sigma_s[i]), state)
            ancestors = population.advance(i, log_ratio, level, last=i == len(c) - 1)
            if ancestors is not None:
                x = x[ancestors]
                state = None if state is None else state[:, ancestors]
                previous = None if previous is None else previous.of(ancestors)
    keep("trajectory", x)
    keep("tracked", state)
    if "exact" in rows:
        keep("exact", np.zeros((len(roles.concepts), chain.n)))
    return x, state, {name: np.array(values) for name, values in rows.items()}, population
