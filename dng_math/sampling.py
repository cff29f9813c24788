"""Reverse chains on exact mixtures: any rule, tracker, sampler and schedule.

Two engines run the same chain with the same random numbers.  ``"fused"`` is the compiled one
(:mod:`dng_math._chain_kernel`); for the model of a data set (spherical, one bandwidth, many
components) its predictions are two matrix products a block.  ``"reference"`` is the slow
obvious one: the public methods of the mixture, the rule and the tracker, one line each.  Tests
hold them against each other and against an independent transcription.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from dng_math import _chain_kernel as fused
from dng_math import _checks, equations, guidance, noise
from dng_math._codes import rule_code, tracker_code
from dng_math._jit import available_threads, run_blocks
from dng_math._mixture_kernels import BLOCK, DIAGONAL, FULL
from dng_math.guidance import RatioTracker, Rule, innermost, tracker_of
from dng_math.mixture import GaussianMixture
from dng_math.posterior import (
    LogOddsTracker,
    PaperTracker,
    at_steps,
    temperatures,
)
from dng_math.prediction import (
    Roles,
    checked_mixture,
    checked_rule,
    divergence_correction,
    guided_by,
    predictions_at,
    roles_of,
)
from dng_math.schedules import NoiseSchedule, Sampler, StepCoefficients

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Tracker = PaperTracker | LogOddsTracker | RatioTracker

RECORDS = ("trajectory", "scale", "tracked", "exact")
MATRIX_COMPONENTS = 128  # from here on two matrix products beat the loop over components
CHUNK_BLOCKS = 8


@dataclass(frozen=True, eq=False)
class ChainResult:
    """What a chain leaves; N samples, D dimensions, M forbidden concepts, S steps.

    Attributes
    ----------
    x : ndarray, shape (N, D)
        The samples.
    time : ndarray, shape (S + 1,)
        From 1 (noise) to 0 (data): times of the rows of the records.
    log_posterior : ndarray, shape (M, N), or None
        log p(c_k | x) as tracked, at the end; for feedback guidance the log ratio L.
    trajectory : ndarray, shape (S + 1, N, D), or None
        x at every time.
    scale : ndarray, shape (S, M, N), or None
        The scale lambda of every step (for SLD its mean over dimensions).
    tracked, exact : ndarray, shape (S + 1, M, N), or None
        log p(c_k | x_t), as tracked and as it is.
    """

    x: Array
    time: Array
    log_posterior: Array | None
    trajectory: Array | None
    scale: Array | None
    tracked: Array | None
    exact: Array | None


@dataclass(frozen=True, eq=False)
class _Chain:
    """Arguments of :func:`sample` after checking."""

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

    @property
    def rows(self) -> int:
        """Rows of states and scales: one a concept, and one where there is none."""
        return max(1, len(self.roles.concepts))

    @property
    def variances(self) -> Array:
        """What the tracker divides by."""
        choice = "matched" if self.tracker is None else self.tracker.variance
        return self.coefficients.tracker_variance(choice)


def sample(
    mixture: GaussianMixture,
    schedule: NoiseSchedule,
    rule: Rule | None = None,
    *,
    n: int,
    forbidden: ArrayLike | Sequence[ArrayLike] | None = None,
    positive: ArrayLike | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    first_sample: int = 0,
    initial: Literal["noise", "exact"] | ArrayLike = "noise",
    record: Collection[str] = (),
    threads: int | None = None,
    engine: Literal["fused", "reference"] = "fused",
) -> ChainResult:
    """Sample a mixture through its reverse diffusion, guided.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    schedule : NoiseSchedule
        Its steps are taken from the noisy end; respace it for fewer.
    rule : Rule, optional
        From :mod:`dng_math.guidance`; default unguided.
    n : int
        Number of samples.
    forbidden : component indices, mask, or a list of several such, optional
        The unwanted components; several concepts must be disjoint.
    positive : component indices or mask, optional
        What rules with a positive prediction lead to; default everything not forbidden.
    sampler : DDPM, DDIM, EulerMaruyama or ProbabilityFlow, optional
        Default ``DDPM("small")``.
    seed, first_sample : int
        Sample i of the result is a function of (seed, first_sample + i) alone: the same bits
        in any batch and on any number of threads.
    initial : "noise", "exact" or array_like of shape (n, D)
        x_T: drawn from N(0, sigma_T^2), as samplers do; from the mixture diffused to T; given.
    record : collection of {"trajectory", "scale", "tracked", "exact"}
        What to keep of every step.  Without it memory does not depend on the number of steps.
    threads : int, optional
        Default: all cores.
    engine : {"fused", "reference"}
        The compiled chain, or the plain NumPy one that it is tested against.

    Returns
    -------
    ChainResult

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.

    Warns
    -----
    UserWarning
        Where the sampler adds less noise than DDPM (eta < 1) and the rule's tracker has not
        ``divergence=True``: its posterior is then wrong.
    """
    mixture = checked_mixture(mixture)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {_checks.shown(schedule)}")
    rule = checked_rule(rule)
    record = _records(record)
    _checks.choice("engine", engine, ("fused", "reference"))
    coefficients = schedule.coefficients(sampler)

    roles = roles_of(mixture, rule, forbidden, positive)
    concepts = roles.concepts
    tracker = tracker_of(rule, coefficients)
    for name, missing in (("tracked", tracker is None), ("exact", not concepts)):
        if name in record and missing:
            needed = "a rule with a tracked posterior" if name == "tracked" else "forbidden"
            raise ValueError(
                f"record must not hold {name!r} without what it needs, {needed}; got "
                f"{sorted(record)}"
            )
    eta_matters = tracker is not None and tracker.divergence
    if eta_matters and np.any(coefficients.sigma_t == 0):
        raise ValueError("schedule must have sigma > 0 where the divergence is corrected")

    own_weights = [mixture.weights[concept].sum() for concept in concepts] or [1.0]
    given = None if tracker is None else getattr(tracker, "prior", None)
    chain = _Chain(
        roles=roles,
        coefficients=coefficients,
        rule=rule,
        tracker=tracker,
        prior=np.array(own_weights if given is None else [given] * max(1, len(concepts))),
        n=_checks.size("n", n, 0),
        seed=_checks.integer("seed", seed, 0, 2**64 - 1),
        first_sample=_checks.integer("first_sample", first_sample, 0, 2**62),
        record=record,
        threads=available_threads() if threads is None else _checks.integer("threads", threads, 1),
    )
    guidance.warn_where_noise_is_missing(tracker, coefficients, stacklevel=2)
    x = _initial(chain, schedule, initial)
    run = _reference if engine == "reference" else _fused
    x, state, records = run(chain, x)
    log_posterior = None
    if tracker is not None and state is not None:
        log_posterior = tracker.log_posterior(state)
        if "tracked" in records:
            records["tracked"] = tracker.log_posterior(records["tracked"])
    if "exact" in records:
        records["exact"][-1] = [mixture.log_posterior(x, concept) for concept in concepts]
    time = np.append(coefficients.time, 0.0)
    return ChainResult(
        x=x,
        time=time,
        log_posterior=log_posterior,
        **{name: records.get(name) for name in RECORDS},
    )


def _records(record: object) -> frozenset[str]:
    if isinstance(record, (str, bytes)) or not isinstance(record, Collection):
        raise TypeError(f"record must be a collection of {RECORDS}, got {_checks.shown(record)}")
    if any(not isinstance(name, str) or name not in RECORDS for name in record):
        raise ValueError(f"record must be a collection of {RECORDS}, got {_checks.shown(record)}")
    return frozenset(record)


def _initial(chain: _Chain, schedule: NoiseSchedule, initial: object) -> Array:
    dimensions = chain.roles.mixture.dim
    if not isinstance(initial, str):
        return _checks.array("initial", initial, (chain.n, dimensions))  # type: ignore[arg-type]
    _checks.choice("initial", initial, ("noise", "exact"))
    z = noise.standard_normal(
        chain.seed,
        chain.n,
        dimensions,
        first_sample=chain.first_sample,
        stream=noise.INITIAL_STREAM,
        threads=chain.threads,
    )
    if initial == "noise":
        return np.asarray(schedule.sigma[-1] * z)
    u = noise.standard_uniform(
        chain.seed, chain.n, first_sample=chain.first_sample, stream=noise.CHOICE_STREAM
    )
    bounds = np.cumsum(chain.roles.mixture.weights)
    chosen = np.searchsorted(bounds / bounds[-1], u, side="right")
    return chain.roles.mixture.diffuse(schedule.alpha[-1], schedule.sigma[-1])._draw(chosen, z)


# ---------------------------------------------------------------------- the reference engine


def _reference(chain: _Chain, x: Array) -> tuple[Array, Array | None, dict[str, Array]]:
    roles, c, rule, tracker = chain.roles, chain.coefficients, chain.rule, chain.tracker
    mixture = roles.mixture
    memory = rule.init(chain.n, mixture.dim)
    state = None
    if tracker is not None:
        state = tracker.init(np.repeat(chain.prior[:, None], chain.n, axis=1))
    trackers = None if tracker is None else at_steps(tracker, c)
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
            odds=None if tracker is None or state is None else tracker.odds(state),
            step=i,
            time=float(c.time[i]),
        )
        guided, scale, memory = guided_by(rule, predictions, memory)
        x_next = equations.step_mean(x, guided, c.x_factor[i], c.x0_factor[i])
        if c.step_var[i] > 0:
            z = noise.standard_normal(
                chain.seed, chain.n, mixture.dim, step=i, first_sample=chain.first_sample
            )
            x_next = equations.step(x_next, np.sqrt(c.step_var[i]), z)
        keep("trajectory", x)
        keep("scale", scale)
        keep("tracked", state)
        if "exact" in rows:
            noisy = mixture.diffuse(alpha, sigma)
            keep("exact", np.array([noisy.log_posterior(x, part) for part in roles.concepts]))
        if tracker is not None and trackers is not None and state is not None:
            base, others = predictions.base, predictions.negative
            if isinstance(tracker, RatioTracker):
                assert predictions.positive is not None
                others = predictions.positive[None]
            gap = c.kernel_x0_factor[i] * (others - base)
            residual = x_next - equations.step_mean(
                x, base, c.kernel_x_factor[i], c.kernel_x0_factor[i]
            )
            correction: Array | float = 0.0
            if not isinstance(tracker, RatioTracker) and tracker.divergence:
                correction = divergence_correction(
                    mixture, x, c, i, tracker, state, forbidden=roles.concepts
                )
            state = trackers[i].update(
                state,
                np.sum(gap * gap, axis=-1),
                np.sum(residual * gap, axis=-1),
                float(variance),
                len(c),
                correction,
            )
        x = x_next
    keep("trajectory", x)
    keep("tracked", state)
    if "exact" in rows:
        keep("exact", np.zeros((len(roles.concepts), chain.n)))
    return x, state, {name: np.array(values) for name, values in rows.items()}


# ---------------------------------------------------------------------- the fused engine


def _rule_parameters(rule: Rule) -> tuple[int, Array]:
    """The kernel's code of a rule, and its parameters in the order that `guide` reads them."""
    coded = rule_code(rule)
    if coded is None:
        raise TypeError(
            f"rule must be one of dng_math.guidance for engine='fused', got {innermost(rule)!r}; "
            "engine='reference' runs any object with init and guide"
        )
    values = [coded.guidance_scale, *coded.parameters.values()]
    return coded.code, np.array(values, dtype=np.float64)


def _tracker_parameters(tracker: Tracker | None, c: StepCoefficients) -> tuple[int, Array]:
    """The kernel's code of a tracker, and a row (temperature, offset, nats, low, high) a step."""
    rows = np.zeros((len(c), 5))
    if tracker is not None:
        rows[:, 0] = temperatures(tracker, c)
        if isinstance(tracker, RatioTracker):
            offsets = [0.0, tracker.step_offset]
        else:
            offsets = [tracker.offset, tracker.offset_nats / len(c)]
        rows[:, 1:] = [*offsets, *tracker.bounds]
    return tracker_code(tracker), rows


def _component_arrays(
    mixture: GaussianMixture, order: Indices, centre: Array
) -> tuple[Array, Array, Array, Array]:
    """log weights, means, covariances (K, D, 1 or D) and squared norms, for the kernel."""
    mean = mixture.means[order] - centre
    if mixture.kind == "full":
        covariance = mixture.covariances[order]
    else:
        covariance = mixture._per_dimension(mixture.covariances)[order][:, :, None]
    return mixture._log_weights[order], mean, covariance, np.sum(mean * mean, axis=1)


def _fused(chain: _Chain, x: Array) -> tuple[Array, Array | None, dict[str, Array]]:
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
        if isinstance(innermost(chain.rule), guidance.PerpNeg) and len(roles.opposite):
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
        c.kernel_x_factor,
        c.kernel_x0_factor,
        c.eta,
        c.beta_ts,
    )
    # Blocks start at multiples of BLOCK in the sample index, so that a sample has its own lane.
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
        fused.chain(
            np.uint64(chain.seed),
            np.uint64(chain.first_sample - skip + chunk * size * BLOCK),
            blocks[span],
            state[span],
            *fixed,
            chunk * size * BLOCK,
            *records.values(),
        )

    # One BLAS thread: ours already use the cores, and a product split over threads could round
    # differently.
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
    """Steps inside every limited interval around a rule."""
    active = np.ones(len(c), dtype=bool)
    while isinstance(rule, guidance.LimitedInterval):
        active &= (rule.t_lo <= c.time) & (c.time <= rule.t_hi)
        rule = rule.rule
    return active
