"""Lay a guided chain out as arrays and run it with the kernel of :mod:`dng_math._chain_kernel`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dng_math import _chain_kernel, rules
from dng_math._codes import rule_code, tracker_code
from dng_math._jit import run_blocks
from dng_math._mixture_kernels import BLOCK, DIAGONAL, FULL
from dng_math.mixture import GaussianMixture
from dng_math.reference_chain import Chain
from dng_math.rules import Rule, innermost
from dng_math.schedules import StepCoefficients
from dng_math.trackers import (
    PathTracker,
    PathWay,
    RatioTracker,
    Tracker,
    path_way,
    temperatures,
)

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


MATRIX_COMPONENTS = 128  # from this number on, matrix products beat the loop over components


CHUNK_BLOCKS = 8


def _rule_parameters(rule: Rule) -> tuple[int, Array]:
    """The kernel's code of a rule, and its parameters in the order that `guide` reads them."""
    coded = rule_code(rule)
    if coded is None:
        raise TypeError(
            f"rule must be one of dng_math.rules for engine='fused', got {innermost(rule)!r}; "
            "engine='reference' runs any object with init and guide"
        )
    values = [coded.guidance_scale, *coded.parameters.values()]
    return coded.code, np.array(values, dtype=np.float64)


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


def run_fused(chain: Chain, x: Array) -> tuple[Array, Array | None, dict[str, Array]]:
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
    )
    centre = mixture.weights @ mixture.means if matrix else np.zeros(dimensions)
    positive, p_groups = order[:0], np.array([0, 0])
    if roles.positive is not None and chain.rule.needs_positive:
        positive = roles.positive[mixture.weights[roles.positive] > 0]
        p_groups = np.array([0, len(positive)])
        if isinstance(innermost(chain.rule), rules.PerpNeg) and len(roles.opposite):
            positive = np.concatenate([positive, roles.opposite])
            p_groups = np.append(p_groups, len(positive))
    log_weight, mean, covariance, norm_sq = _component_arrays(mixture, order, centre)
    p_log_weight, p_mean, p_covariance, p_norm_sq = _component_arrays(mixture, positive, centre)
    rule, parameters = _rule_parameters(chain.rule)
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
        _active(chain.rule, c),
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
    size = max(1, min(CHUNK_BLOCKS, -(-n_blocks // chain.threads)))

    def run(chunk: int) -> None:
        span = slice(chunk * size, (chunk + 1) * size)
        _chain_kernel.chain(
            np.uint64(chain.seed),
            np.uint64(chain.first_sample - skip + chunk * size * BLOCK),
            blocks[span],
            state[span],
            *fixed,
            chunk * size * BLOCK,
            *records.values(),
        )

    # One BLAS thread: our own threads already use the cores, and a product split over threads
    # could round differently.
    with threadpool_limits(1, user_api="blas"):
        run_blocks(run, -(-n_blocks // size), chain.threads)

    own = slice(skip, skip + chain.n)
    kept = {name: records[name][:, own] for name in chain.record}
    for name in ("scale", "tracked", "exact"):
        if name in kept:
            kept[name] = kept[name].transpose(0, 2, 1)
    samples = blocks.transpose(0, 2, 1).reshape(lanes, dimensions)[own]
    final_state = state.transpose(1, 0, 2).reshape(chain.rows, lanes)[:, own]
    return samples, final_state, kept


def _active(rule: Rule, c: StepCoefficients) -> NDArray[np.bool_]:
    """Mask (N,) of the steps inside every limited interval around a rule."""
    active = np.ones(len(c), dtype=bool)
    while isinstance(rule, rules.LimitedInterval):
        active &= (rule.t_lo <= c.time) & (c.time <= rule.t_hi)
        rule = rule.rule
    return active
