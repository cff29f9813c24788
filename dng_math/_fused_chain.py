"""Lay a guided chain out as arrays and run it with the kernel of :mod:`dng_math._chain_kernel`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dng_math import _chain_kernel, rules
from dng_math._codes import POINTWISE, REGULATED, SAFE, chain_code, tracker_code
from dng_math._jit import run_blocks
from dng_math._mixture_kernels import BLOCK, DIAGONAL, FULL
from dng_math.mixture import GaussianMixture
from dng_math.reference_chain import Chain
from dng_math.rules import Rule, StepNumbers, innermost
from dng_math.schedules import StepCoefficients
from dng_math.trackers import (
    PathTracker,
    PathWay,
    RatioTracker,
    Tracker,
    path_way,
    temperatures,
)
from dng_math.weights import Population

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


MATRIX_COMPONENTS = 128  # from this number on, matrix products beat the loop over components


CHUNK_BLOCKS = 8


def _rule_parameters(rule: Rule) -> tuple[int, Array]:
    """The kernel's code of a rule, and its parameters in the order that `guide` reads them."""
    coded = chain_code(rule)
    if coded is None:
        raise TypeError(
            f"rule must be one that engine='fused' computes, got {innermost(rule)!r}; "
            "engine='reference' runs any object with init and guide"
        )
    values = [coded.guidance_scale, *coded.parameters.values()]
    return coded.code, np.array(values, dtype=np.float64)


def _of_steps(rule: Rule, c: StepCoefficients, dimensions: int) -> Array:
    """What a rule reads of every step, (N, 1), as `guide` takes it."""
    rule, column = innermost(rule), np.zeros((len(c), 1))
    for i in range(len(c)):
        numbers = StepNumbers.of(c, i)
        match rule:
            case rules.FeedbackGuidance():
                alpha, sigma = numbers.alpha_t, numbers.sigma_t
                column[i] = rule.added(sigma / alpha if alpha > 0 else np.inf)
            case rules.CFGPlusPlus():
                column[i] = rule.scale(numbers)
            case rules.GeoGuide():
                column[i] = rule.length(numbers, dimensions)
            case rules.CRG():
                column[i] = rule.rate(numbers)
    return column


def _carried(rule: int, tracker: Tracker | None, dimensions: int, concepts: int) -> int:
    """Rows of memory of a sample, of a rule or of a path tracker."""
    if isinstance(tracker, PathTracker):  # with DNG, which has no memory of its own
        return dimensions + concepts * dimensions + concepts
    return {SAFE: dimensions, REGULATED: 1}.get(rule, 0)


def _tracker_parameters(tracker: Tracker | None, c: StepCoefficients) -> tuple[int, Array]:
    """Code of a tracker, and a row (temperature, offset, offset_nats, low, high) for each step."""
    rows = np.zeros((len(c), 5))
    if tracker is not None:
        rows[:, 0] = temperatures(tracker, c)
        if isinstance(tracker, RatioTracker):
            offsets = [0.0, tracker.step_offset]
        else:
            offsets = [tracker.offset, tracker.offset_nats / len(c)]
        rows[:, 1:] = [*offsets, *tracker.bounds]
    return tracker_code(tracker), rows


def _ways(tracker: Tracker | None, c: StepCoefficients) -> Array:
    """The numbers of the way to every step's point from the one before, (6, N); zero at first."""
    ways = np.zeros((len(PathWay._fields), len(c)))
    if isinstance(tracker, PathTracker):
        levels = list(zip(c.alpha_t.tolist(), c.sigma_t.tolist(), strict=True))
        ways[:, 1:] = (
            np.array([path_way(*before, *at) for before, at in pairwise(levels)])
            .reshape(-1, len(ways))
            .T
        )
    return ways


def _component_arrays(
    mixture: GaussianMixture, order: Indices, centre: Array
) -> tuple[Array, Array, Array, Array]:
    """Log weights, means relative to centre, covariances (K, D, 1 or D) and squared norms."""
    mean = mixture.means[order] - centre
    if mixture.kind == "full":
        covariance = mixture.covariances[order]
    else:
        covariance = mixture._per_dimension(mixture.covariances)[order][:, :, None]
    return mixture._log_weights[order], mean, covariance, np.sum(mean * mean, axis=1)


def run_fused(
    chain: Chain, x: Array
) -> tuple[Array, Array | None, dict[str, Array], Population | None]:
    """Run a chain with the compiled engine; see :func:`dng_math.reference_chain.run_reference`."""
    roles, c = chain.roles, chain.coefficients
    mixture = roles.mixture
    steps, dimensions = len(c), mixture.dim
    live = [part[mixture.weights[part] > 0] for part in (*roles.concepts, roles.rest)]
    order = np.concatenate(live)
    groups = np.concatenate([[0], np.cumsum([len(part) for part in live])])
    matrix = (
        mixture.kind == "spherical"
        and len(order) >= MATRIX_COMPONENTS
        and bool(np.all(mixture.covariances == mixture.covariances[0]))
        and not isinstance(innermost(chain.rule), rules.ImageReferenced)  # a bandwidth of its own
    )
    centre = mixture.weights @ mixture.means if matrix else np.zeros(dimensions)
    positive, p_groups = order[:0], np.array([0, 0])
    if roles.positive is not None and chain.rule.needs_positive:
        positive = roles.positive[mixture.weights[roles.positive] > 0]
        p_groups = np.array([0, len(positive)])
        if isinstance(innermost(chain.rule), rules.PerpNeg) and len(roles.opposite):
            positive = np.concatenate([positive, roles.opposite])
            p_groups = np.append(p_groups, len(positive))
    if roles.cfg_scale is not None:
        # The end of classifier-free guidance that the groups are not the parts of.
        positive = np.arange(mixture.n_components) if roles.within else roles.led_to
        positive = positive[mixture.weights[positive] > 0]
        p_groups = np.array([0, len(positive)])
    log_weight, mean, covariance, norm_sq = _component_arrays(mixture, order, centre)
    p_log_weight, p_mean, p_covariance, p_norm_sq = _component_arrays(mixture, positive, centre)
    inner = innermost(chain.rule)
    if isinstance(inner, rules.ImageReferenced):
        count = len(inner.points)
        p_groups = np.append(p_groups if len(positive) else [0], len(positive) + count)
        own_log_weight = np.full(count, -np.log(count))
        kernels = np.zeros((count, *p_covariance.shape[1:]))
        for d in range(dimensions):
            kernels[:, d, d if kernels.shape[2] > 1 else 0] = inner.bandwidth**2
        p_log_weight = np.concatenate([p_log_weight, own_log_weight])
        p_mean = np.concatenate([p_mean, inner.points])
        p_covariance = np.concatenate([p_covariance, kernels])
        p_norm_sq = np.concatenate([p_norm_sq, np.zeros(count)])  # not read without products
    rule, parameters = _rule_parameters(chain.rule)
    if rule == POINTWISE and roles.from_positive:
        # The kernel's densities of the positive are joint ones, with their weight in the whole.
        parameters[1] *= mixture.weights[roles.led_to].sum()
    tracker, tracker_parameters = _tracker_parameters(chain.tracker, c)

    columns = (
        c.alpha_t,
        c.sigma_t,
        c.x_factor,
        c.x0_factor,
        np.sqrt(c.step_var),
        c.transition_x_factor,
        c.transition_x0_factor,
        c.eta,
        c.beta_ts,
        *_ways(chain.tracker, c),
    )
    # Blocks start at multiples of BLOCK in the sample index, so a sample always has the same lane.
    points = inner.points if isinstance(inner, rules.SPELL) else np.zeros((0, dimensions))
    beneath = np.array(
        [
            float(roles.cfg_scale is not None),
            roles.cfg_scale or 0.0,
            float(roles.within),
            float(roles.from_positive and not roles.within),
            float(getattr(inner, "positive_factor", False)),
        ]
    )
    active = _active(chain.rule, c)
    if chain.weights is not None:
        active &= c.step_var > 0  # no density to compare
    skip = chain.first_sample % BLOCK
    n_blocks = -(-(skip + chain.n) // BLOCK)
    lanes = n_blocks * BLOCK
    blocks = np.zeros((lanes, dimensions))
    blocks[skip : skip + chain.n] = x
    blocks = np.ascontiguousarray(blocks.reshape(n_blocks, BLOCK, dimensions).transpose(0, 2, 1))
    state = np.zeros((n_blocks, chain.rows, BLOCK))
    if chain.tracker is not None:
        state += chain.tracker.init(chain.prior)[:, None]

    def record(name: str, *shape: int) -> Array:
        return np.empty(shape if name in chain.record else (0,) * len(shape))

    records = {
        "trajectory": record("trajectory", steps + 1, lanes, dimensions),
        "scale": record("scale", steps, lanes, chain.rows),
        "tracked": record("tracked", steps + 1, lanes, chain.rows),
        "exact": record("exact", steps + 1, lanes, chain.rows),
    }
    fixed = (
        np.ascontiguousarray(np.stack(columns, axis=1)),
        np.ascontiguousarray(chain.variances),
        active,
        _of_steps(chain.rule, c, dimensions),
        beneath,
        points.copy(),  # one that is read-only would be compiled for again
        FULL if mixture.kind == "full" else DIAGONAL,
        matrix,
        groups,
        log_weight,
        mean,
        covariance,
        norm_sq,
        centre,
        p_groups,
        p_log_weight,
        p_mean,
        p_covariance,
        p_norm_sq,
        rule,
        parameters,
        tracker,
        tracker_parameters,
        chain.tracker is not None and chain.tracker.divergence,
    )
    memory = np.zeros((n_blocks, _carried(rule, chain.tracker, dimensions, chain.rows), BLOCK))
    log_ratio = np.zeros((n_blocks, BLOCK if chain.weights is not None else 0))
    size = max(1, min(CHUNK_BLOCKS, -(-n_blocks // chain.threads)))

    def run(chunk: int, first: int, last: int) -> None:
        span = slice(chunk * size, (chunk + 1) * size)
        _chain_kernel.chain(
            np.uint64(chain.seed),
            np.uint64(chain.first_sample - skip + chunk * size * BLOCK),
            blocks[span],
            state[span],
            memory[span],
            log_ratio[span],
            first,
            last,
            *fixed,
            chunk * size * BLOCK,
            *records.values(),
        )

    # One BLAS thread: our own threads already use the cores, and a product split over threads
    # could round differently.
    own = slice(skip, skip + chain.n)

    def by_sample(rows: Array) -> Array:
        """(blocks, rows, BLOCK) as (N, rows)."""
        return rows.transpose(0, 2, 1).reshape(lanes, rows.shape[1])[own]

    def draw_anew(rows: Array, ancestors: Indices) -> None:
        """Put the ancestors' rows in the samples' places."""
        flat = rows.transpose(0, 2, 1).reshape(lanes, rows.shape[1])
        flat[own] = flat[own][ancestors]
        rows[...] = flat.reshape(n_blocks, BLOCK, rows.shape[1]).transpose(0, 2, 1)

    population: Population | None = None
    chunks = -(-n_blocks // size)
    with threadpool_limits(1, user_api="blas"):
        if chain.weights is None:
            run_blocks(lambda chunk: run(chunk, 0, steps), chunks, chain.threads)
        else:
            start = chain.level(
                x, float(c.alpha_t[0]), float(c.sigma_t[0]), _state_of(chain, by_sample(state))
            )
            population = Population(chain.weights, start, chain.seed)
            for n in range(steps):
                run_blocks(lambda chunk, n=n: run(chunk, n, n + 1), chunks, chain.threads)  # type: ignore[misc]
                level = chain.level(
                    by_sample(blocks),
                    float(c.alpha_s[n]),
                    float(c.sigma_s[n]),
                    _state_of(chain, by_sample(state)),
                )
                ratio = log_ratio.reshape(lanes)[own]
                ancestors = population.advance(n, ratio, level, last=n == steps - 1)
                if ancestors is not None:
                    for rows in (blocks, state, memory):
                        draw_anew(rows, ancestors)

    kept = {name: records[name][:, own] for name in chain.record}
    for name in ("scale", "tracked", "exact"):
        if name in kept:
            kept[name] = kept[name].transpose(0, 2, 1)
    return by_sample(blocks), by_sample(state).T, kept, population


def _state_of(chain: Chain, state: Array) -> Array | None:
    """The tracker's state (M, N) of rows (N, M); None without a tracker."""
    return None if chain.tracker is None else state.T


def _active(rule: Rule, c: StepCoefficients) -> NDArray[np.bool_]:
    """Mask (N,) of the steps inside every limited interval around a rule."""
    active = np.ones(len(c), dtype=bool)
    while isinstance(rule, rules.LimitedInterval):
        active &= (rule.t_lo <= c.time) & (c.time <= rule.t_hi)
        rule = rule.rule
    return active
