"""Reverse chains on exact mixtures: any rule, tracker, sampler and schedule.

Two engines run the same chain with the same random numbers.  ``"fused"`` is the compiled one
(:mod:`dng_math._fused_chain`); for the model of a data set (spherical, one bandwidth, many
components) its predictions are two matrix products per block.  ``"reference"`` is slow and easy to
read (:mod:`dng_math.reference_chain`): it calls the public methods of the mixture, the rule and the
tracker.  Tests compare both with each other and with an independent transcription.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks, noise, rules
from dng_math._fused_chain import run_fused
from dng_math._jit import available_threads
from dng_math.mixture import GaussianMixture
from dng_math.prediction import (
    checked_mixture,
    checked_rule,
    roles_of,
)
from dng_math.reference_chain import Chain, run_reference
from dng_math.rules import Rule, tracker_of
from dng_math.schedules import NoiseSchedule, Sampler, StepCoefficients
from dng_math.weights import FeynmanKac

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

RECORDS = ("trajectory", "scale", "tracked", "exact")


@dataclass(frozen=True, eq=False)
class ChainResult:
    """Result of :func:`sample`; N samples, D dimensions, M forbidden concepts, S steps.

    Attributes
    ----------
    x : ndarray, shape (N, D)
        The samples.
    time : ndarray, shape (S + 1,)
        Times of the rows of the records, from 1 (noise) to 0 (data).
    log_posterior : ndarray, shape (M, N), or None
        Tracked log p(c_k | x) at the end; for feedback guidance the log ratio L.
    trajectory : ndarray, shape (S + 1, N, D), or None
        x at every time.
    scale : ndarray, shape (S, M, N), or None
        The scale lambda of every step (for SLD its mean over dimensions).
    tracked, exact : ndarray, shape (S + 1, M, N), or None
        log p(c_k | x_t), the tracked and the exact one, among what the negative is measured from.
    log_weights : ndarray, shape (N,), or None
        With ``weights``: log weights of the samples.  The mean of ``exp(log_weights)`` estimates
        the mean of (1 - p_c)^g of unguided samples, with or without resampling.
    ess : ndarray, shape (S + 1,), or None
        With ``weights``: effective sample size at every time, before resampling there.
    """

    x: Array
    time: Array
    log_posterior: Array | None
    trajectory: Array | None
    scale: Array | None
    tracked: Array | None
    exact: Array | None
    log_weights: Array | None = None
    ess: Array | None = None


def sample(
    mixture: GaussianMixture,
    schedule: NoiseSchedule,
    rule: Rule | None = None,
    *,
    n: int,
    forbidden: ArrayLike | Sequence[ArrayLike] | None = None,
    positive: ArrayLike | None = None,
    cfg_scale: float | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    first_sample: int = 0,
    initial: Literal["noise", "exact"] | ArrayLike = "noise",
    record: Collection[str] = (),
    threads: int | None = None,
    engine: Literal["fused", "reference"] = "fused",
    weights: FeynmanKac | None = None,
) -> ChainResult:
    """Sample a mixture by guided reverse diffusion.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    schedule : NoiseSchedule
        Its steps are taken from the noisy end; ``schedule.respace(steps)`` has fewer.
    rule : Rule, optional
        From :mod:`dng_math.rules`; default unguided.
    n : int
        Number of samples.
    forbidden : component indices, mask, or a list of several such, optional
        The unwanted components; several concepts must be disjoint.
    positive : component indices or mask, optional
        What rules with a positive prediction lead to; default everything that is not forbidden.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: w of ``u + w (c - u)``, to which the rule adds,
        with u the prediction of the whole mixture and c that of ``positive``.  The rule's
        ``reference`` says which of them the negative is measured from.
    sampler : DDPM, DDIM, EulerMaruyama or ProbabilityFlow, optional
        Default ``DDPM("small")``.
    seed, first_sample : int
        Sample i of the result is a function of (seed, first_sample + i) alone: the same bits
        in any batch and on any number of threads.  With ``weights`` that holds of the whole
        result: it is a function of seed, first_sample and n.
    initial : "noise", "exact" or array_like of shape (n, D)
        x_T: "noise" draws it from N(0, sigma_T^2), as samplers do, "exact" from the mixture
        diffused to T; an array is x_T itself.
    record : collection of {"trajectory", "scale", "tracked", "exact"}
        What to record at every step; without it memory does not depend on the number of steps.
    threads : int, optional
        Number of threads; default all cores.
    engine : {"fused", "reference"}
        The compiled chain, or the plain NumPy one that it is tested against.
    weights : FeynmanKac, optional
        Weights with which the samples of :class:`dng_math.DynamicNegativeGuidance` follow
        p (1 - p_c)^g, exactly for any number of steps if its posterior is exact.  They need a
        sampler with noise; a step without (DDPM's last) is taken unguided.  Samples are then
        one population and not independent of each other, and rows of the records are
        populations and not paths.

    Returns
    -------
    ChainResult

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.

    Warns
    -----
    UserWarning
        If the sampler adds less noise than DDPM (eta < 1) and the rule's tracker lacks
        ``divergence=True``: the tracked posterior is then wrong.
    """
    mixture = checked_mixture(mixture)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {checks.shown(schedule)}")
    rule = checked_rule(rule)
    record = _records(record)
    checks.choice("engine", engine, ("fused", "reference"))
    coefficients = schedule.coefficients(sampler)

    roles = roles_of(mixture, rule, forbidden, positive, cfg_scale)
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

    _check_weights(weights, rule, coefficients)
    whole = mixture.weights[roles.led_to].sum() if roles.within else 1.0
    own_weights = [mixture.weights[concept].sum() / whole for concept in concepts] or [1.0]
    given = None if tracker is None else getattr(tracker, "prior", None)
    chain = Chain(
        roles=roles,
        coefficients=coefficients,
        rule=rule,
        tracker=tracker,
        prior=np.array(own_weights if given is None else [given] * max(1, len(concepts))),
        n=checks.size("n", n, 0),
        seed=checks.integer("seed", seed, 0, 2**64 - 1),
        first_sample=checks.integer("first_sample", first_sample, 0, 2**62),
        record=record,
        threads=available_threads() if threads is None else checks.integer("threads", threads, 1),
        weights=weights,
    )
    rules.warn_where_noise_is_missing(tracker, coefficients, stacklevel=2)
    x = _initial(chain, schedule, initial)
    run = run_reference if engine == "reference" else run_fused
    x, state, records, population = run(chain, x)
    log_posterior = None
    if tracker is not None and state is not None:
        log_posterior = tracker.log_posterior(state)
        if "tracked" in records:
            records["tracked"] = tracker.log_posterior(records["tracked"])
    if "exact" in records:
        records["exact"][-1] = [roles.log_share(mixture, x, concept) for concept in concepts]
    time = np.append(coefficients.time, 0.0)
    return ChainResult(
        x=x,
        time=time,
        log_posterior=log_posterior,
        **{name: records.get(name) for name in RECORDS},
        log_weights=None if population is None else population.log_weights,
        ess=None if population is None else np.array(population.ess),
    )


def _check_weights(weights: object, rule: Rule, coefficients: StepCoefficients) -> None:
    if weights is None:
        return
    if not isinstance(weights, FeynmanKac):
        raise TypeError(f"weights must be a FeynmanKac, got {checks.shown(weights)}")
    inner = rules.innermost(rule)
    if not isinstance(inner, rules.DynamicNegativeGuidance):
        raise ValueError(
            "weights must be None unless the rule is DynamicNegativeGuidance, whose target they "
            f"are for; got {inner!r}"
        )
    silent = int(np.sum(coefficients.step_var[:-1] == 0))
    if silent:
        raise ValueError(
            "weights must be None for a sampler with steps without noise before the last, which "
            f"have no density to compare; got one with {silent}"
        )


def _records(record: object) -> frozenset[str]:
    if isinstance(record, (str, bytes)) or not isinstance(record, Collection):
        raise TypeError(f"record must be a collection of {RECORDS}, got {checks.shown(record)}")
    if any(not isinstance(name, str) or name not in RECORDS for name in record):
        raise ValueError(f"record must be a collection of {RECORDS}, got {checks.shown(record)}")
    return frozenset(record)


def _initial(chain: Chain, schedule: NoiseSchedule, initial: object) -> Array:
    dimensions = chain.roles.mixture.dim
    if not isinstance(initial, str):
        return checks.array("initial", initial, (chain.n, dimensions))  # type: ignore[arg-type]
    checks.choice("initial", initial, ("noise", "exact"))
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
