"""What a rule predicts on an exact mixture, as a function of x; and the divergence of its scores.

A rule needs the predictions of the whole mixture, of what is forbidden, of the rest and of what
guidance leads to, and for some rules the posterior.  They are put together here, for
:func:`predict` (fields, one's own sampler) and for the reference engine of
:func:`dng_math.sample` alike, so the two agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import _checks, equations, guidance
from dng_math.guidance import LimitedInterval, Predictions, Rule, innermost
from dng_math.mixture import GaussianMixture
from dng_math.posterior import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    log_odds_from_log_posterior,
    refuse_no_coefficients,
)
from dng_math.schedules import StepCoefficients

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = (
    "epsilon",
    "sample",
    "v_prediction",
    "flow",
    "score",
)


@dataclass(frozen=True, eq=False)
class Roles:
    """Which components are forbidden, allowed, and led to; checked."""

    mixture: GaussianMixture
    concepts: list[Indices]
    rest: Indices
    positive: Indices | None

    @cached_property
    def forbidden_parts(self) -> list[GaussianMixture]:
        """The mixture of each concept's components."""
        return [self.mixture.restrict(concept) for concept in self.concepts]

    @cached_property
    def rest_part(self) -> GaussianMixture:
        """The mixture of everything else."""
        return self.mixture.restrict(self.rest)

    @cached_property
    def positive_part(self) -> GaussianMixture | None:
        """The mixture that is led to, where it is not the rest."""
        return None if self.positive is None else self.mixture.restrict(self.positive)

    @cached_property
    def opposite(self) -> Indices:
        """Components with weight that are not led to."""
        led_to = self.rest if self.positive is None else self.positive
        others = np.setdiff1d(np.arange(self.mixture.n_components), led_to)
        return others[self.mixture.weights[others] > 0]


def checked_mixture(value: object) -> GaussianMixture:
    """A mixture."""
    if not isinstance(value, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture, got {_checks.shown(value)}")
    return value


def checked_rule(value: object) -> Rule:
    """A rule; unguided for None."""
    if value is None:
        return guidance.Unguided()
    guidance.refuse_no_rule("rule", value)
    return value  # type: ignore[return-value]


def concepts_of(mixture: GaussianMixture, forbidden: object) -> list[Indices]:
    """Sorted component indices of each forbidden concept."""
    if forbidden is None:
        return []
    parts: list[Any] = [forbidden]
    if isinstance(forbidden, (list, tuple)) and all(np.ndim(part) == 1 for part in forbidden):
        parts = list(forbidden)
    if len(parts) == 0:
        raise ValueError(f"forbidden must not be empty, got {forbidden!r}")
    concepts = [mixture.component_indices("forbidden", part) for part in parts]
    if sum(map(len, concepts)) > len(np.unique(np.concatenate(concepts))):
        raise ValueError(
            f"forbidden concepts must not share components, got {_checks.shown(forbidden)}"
        )
    for concept in concepts:
        if mixture.weights[concept].sum() == 0:
            raise ValueError(
                f"forbidden must have weight: components {concept.tolist()} have no weight"
            )
    return concepts


def roles_of(mixture: GaussianMixture, rule: Rule, forbidden: object, positive: object) -> Roles:
    """Forbidden, rest and positive components, as a rule needs them."""
    concepts = concepts_of(mixture, forbidden)
    taken = np.concatenate([*concepts, np.empty(0, dtype=np.intp)])
    rest = np.setdiff1d(np.arange(mixture.n_components), taken)
    if mixture.weights[rest].sum() == 0:
        raise ValueError(
            "forbidden must leave some components with weight: all are forbidden, got "
            f"{_checks.shown(forbidden)}"
        )
    allowed = None
    if positive is not None:
        allowed = mixture.component_indices("positive", positive)  # type: ignore[arg-type]
        if mixture.weights[allowed].sum() == 0:
            raise ValueError(
                f"positive must have weight: positive components {allowed.tolist()} have no weight"
            )
    inner = innermost(rule)
    if len(concepts) > 1 and not rule.several_concepts:
        raise ValueError(f"forbidden must be one concept for {inner!r}, got {len(concepts)}")
    unforbidden = isinstance(inner, guidance.Unguided) or (
        allowed is not None and rule.needs_positive and not isinstance(inner, guidance.PerpNeg)
    )
    if not concepts and not unforbidden:
        raise ValueError(f"forbidden must name the unwanted components for {inner!r}, got None")
    return Roles(mixture, concepts, rest, allowed)


def predictions_at(
    rule: Rule,
    roles: Roles,
    x: Array,
    alpha: float,
    sigma: float,
    prediction_type: PredictionType,
    *,
    odds: Array | None,
    step: int,
    time: float,
) -> Predictions:
    """What the rule sees at x of shape (N, D), in the units of ``prediction_type``."""
    noisy = roles.mixture.diffuse(alpha, sigma)

    def of(part: GaussianMixture) -> Array:
        if prediction_type == "score":
            return part.diffuse(alpha, sigma).score(x)
        if prediction_type == "sample":
            return part.posterior_mean(x, alpha, sigma)
        eps = part.noise_prediction(x, alpha, sigma)
        if prediction_type == "epsilon":
            return eps
        x0 = part.posterior_mean(x, alpha, sigma)
        return alpha * eps - sigma * x0 if prediction_type == "v_prediction" else eps - x0

    # Predictions at one x are affine in each other: how far that of the noise moves with each.
    to_noise = {
        "epsilon": 1.0,
        "sample": -alpha / sigma,
        "v_prediction": alpha / (alpha * alpha + sigma * sigma),
        "flow": alpha / (alpha + sigma),
        "score": -sigma,
    }[prediction_type]
    base, rest = of(roles.mixture), of(roles.rest_part)
    positive = rest if roles.positive_part is None else of(roles.positive_part)
    direction = None
    if isinstance(innermost(rule), guidance.PerpNeg):
        # base = q positive + (1 - q) opposite, so that this is (positive - base)/(1 - q).
        direction = np.zeros_like(base)
        if len(roles.opposite):
            direction = positive - of(roles.mixture.restrict(roles.opposite))
    negative = [of(part) for part in roles.forbidden_parts]
    joint = [noisy.log_posterior(x, concept) for concept in roles.concepts]
    return Predictions(
        base=base,
        negative=np.array(negative) if negative else base[None],
        positive=positive,
        rest=rest,
        log_ratio=np.array(joint) - noisy.log_posterior(x, roles.rest) if joint else None,
        odds=odds,
        to_noise=to_noise,
        step=step,
        time=time,
        direction=direction,
    )


def guided_by(rule: Rule, predictions: Predictions, memory: Any) -> tuple[Array, Array, Any]:
    """``rule.guide``; what a rule of one's own returns is checked."""
    result = rule.guide(predictions, memory)
    if not isinstance(result, tuple) or len(result) != 3:
        raise TypeError(
            f"rule.guide must return (guided, scale, memory), got {_checks.shown(result)}"
        )
    guided, scale, following = result
    if not _known(innermost(rule)):
        rows = len(predictions.negative)
        guided = _checks.array(
            "the guided prediction of rule.guide", guided, predictions.base.shape
        )
        scale = _checks.array("the scale of rule.guide", scale, (rows, len(guided)))
    return guided, scale, following


@dataclass(frozen=True, eq=False)
class GuidedPrediction:
    """What a rule makes of the predictions at N points in D dimensions; M forbidden concepts.

    Attributes
    ----------
    guided : ndarray, shape (N, D)
        The guided prediction, of the type that was asked for; so are the three that follow.
    base : ndarray, shape (N, D)
        That of the whole mixture.  ``guided - base`` is the guidance term.
    negative : ndarray, shape (M, N, D)
        Those of the forbidden concepts.
    positive : ndarray, shape (N, D)
        That of ``positive``, or else of everything that is not forbidden.
    scale : ndarray, shape (M, N)
        The scale lambda (for SLD its mean over dimensions); one row where nothing is forbidden.
    memory : ndarray or None
        What the rule carries to the next step.
    """

    guided: Array
    base: Array
    negative: Array
    positive: Array
    scale: Array
    memory: Any


def predict(
    mixture: GaussianMixture,
    x: ArrayLike,
    alpha: float,
    sigma: float,
    rule: Rule | None = None,
    *,
    forbidden: ArrayLike | Sequence[ArrayLike] | None = None,
    positive: ArrayLike | None = None,
    prediction_type: PredictionType = "epsilon",
    log_posterior: ArrayLike | None = None,
    memory: ArrayLike | None = None,
    step: int | None = None,
    time: float | None = None,
) -> GuidedPrediction:
    """What a rule predicts at given points of a noise level: fields, and samplers of one's own.

    With ``prediction_type="sample"`` this is what the reference engine of :func:`dng_math.sample`
    computes at a step, bit for bit.  Every rule is affine in the predictions, so it reads the same
    for each type: for the score DNG's is ``s - lambda (s_c - s)`` (DNG Eq. 10).

    Rules without memory and without a tracked posterior are functions of x alone.  The others
    depend on the path of a sample, which is given: the tracked posterior in ``log_posterior``,
    SLD's momentum in ``memory``.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        Points x_t = alpha x0 + sigma eps.
    alpha, sigma : float
        The noise level, alpha >= 0 and sigma > 0: of a schedule ``schedule.alpha[i]`` and
        ``schedule.sigma[i]``.
    rule : Rule, optional
        From :mod:`dng_math.guidance`; default unguided.
    forbidden, positive : optional
        As for :func:`dng_math.sample`.
    prediction_type : {"epsilon", "sample", "v_prediction", "flow", "score"}
        E[eps | x], E[x0 | x], alpha eps - sigma x0, eps - x0, or the gradient of the log density,
        -eps/sigma.
    log_posterior : array_like, shape (M, N), (N,) for one concept, or a number; optional
        The tracked log p(c_k | x_t) of a rule with a tracker, as ``tracker.log_posterior(state)``
        and ``ChainResult.tracked`` give it, kept within the tracker's limits; for feedback
        guidance the log ratio L.
    memory : array_like, shape (N, D), optional
        Of a rule that carries something from step to step (SLD with ``momentum_scale`` not 0):
        ``rule.init(N, D)`` at the first step, then ``memory`` of the last result.
    step : int, optional
        Index of the step from the noisy end, for SLD with ``warmup_steps``.
    time : float, optional
        In [0, 1], 1 at the noisy end, for :class:`dng_math.LimitedInterval`; of a schedule
        ``schedule.time[i]``.

    Returns
    -------
    GuidedPrediction

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed; also where the rule needs one of the
        last four and it is not given, or one is given that the rule cannot use.

    Examples
    --------
    >>> import numpy as np
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    >>> rule = guidance.DynamicNegativeGuidance(1.0)
    >>> at = (np.array([[-1.0], [0.0]]), 0.8, 0.6)
    >>> pushed = predict(mixture, *at, rule, forbidden=[0], prediction_type="score").guided
    >>> np.allclose(pushed, mixture.restrict([1]).diffuse(0.8, 0.6).score(at[0]))
    True
    """
    mixture = checked_mixture(mixture)
    points = mixture._points(x)
    alpha = _checks.non_negative("alpha", alpha)
    sigma = _checks.positive("sigma", sigma)
    rule = checked_rule(rule)
    roles = roles_of(mixture, rule, forbidden, positive)
    _checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    step, time = _at(rule, step, time)
    odds = _odds(rule, log_posterior, (max(1, len(roles.concepts)), len(points)))
    carried = _carried(rule, memory, points.shape)
    predictions = predictions_at(
        rule, roles, points, alpha, sigma, prediction_type, odds=odds, step=step, time=time
    )
    guided, scale, following = guided_by(rule, predictions, carried)
    assert predictions.positive is not None
    return GuidedPrediction(
        guided=guided,
        base=predictions.base,
        negative=predictions.negative[: len(roles.concepts)],
        positive=predictions.positive,
        scale=scale,
        memory=following,
    )


def _known(rule: Rule) -> bool:
    """Whether this package says what the rule reads."""
    return type(rule).__module__ == guidance.__name__


def _at(rule: Rule, step: int | None, time: float | None) -> tuple[int, float]:
    """Step and time, given where the rule reads them."""
    inner = innermost(rule)
    foreign = not _known(inner)
    if step is not None:
        step = _checks.integer("step", step, 0)
    elif foreign or (isinstance(inner, guidance.SafeLatentDiffusion) and inner.warmup_steps > 0):
        raise ValueError(
            f"step must be given for {inner!r}: the index of the step from the noisy end; got None"
        )
    if time is not None:
        time = _checks.real("time", time, "in [0, 1]", 0.0, 1.0, closed="[]")
    elif foreign or isinstance(rule, LimitedInterval):
        raise ValueError(
            f"time must be given for {rule!r}: the diffusion time of the noise level, 1 at the "
            "noisy end (of a schedule, schedule.time[i]); got None"
        )
    return 0 if step is None else step, 1.0 if time is None else time


def _odds(rule: Rule, log_posterior: ArrayLike | None, shape: tuple[int, int]) -> Array | None:
    """The odds of a tracked posterior (e^L for feedback guidance), within the tracker's limits."""
    inner = innermost(rule)
    tracker = None
    if isinstance(inner, guidance.DynamicNegativeGuidance):
        tracker = None if isinstance(inner.posterior, ExactPosterior) else inner.posterior
    feedback = isinstance(inner, guidance.FeedbackGuidance)
    if tracker is None and not feedback:
        if log_posterior is not None:
            raise ValueError(
                f"log_posterior must be None for {inner!r}, which tracks none; a posterior of "
                "one's own needs DynamicNegativeGuidance(g, PaperTracker())"
            )
        return None
    if log_posterior is None:
        what = "the log ratio L" if feedback else "the tracked log p(c | x)"
        raise ValueError(
            f"log_posterior must be given for {inner!r}: {what}, which depends on the path of a "
            "sample and not on x alone; got None"
        )
    values = _checks.reals("log_posterior", log_posterior)
    if values.shape not in ((), shape, shape[1:] if shape[0] == 1 else shape):
        one = f", {shape[1:]}" if shape[0] == 1 else ""
        raise ValueError(
            f"log_posterior must be a number or have shape {shape}{one}, got {values.shape}"
        )
    values = np.broadcast_to(values, shape)
    wrong = ~np.isfinite(values) if feedback else ~(values <= 0)
    if wrong.any():
        allowed = "finite" if feedback else "<= 0, as the logarithm of a probability is"
        raise ValueError(f"log_posterior must be {allowed}, got {values[wrong][0]}")
    if isinstance(inner, guidance.FeedbackGuidance):
        return np.exp(np.clip(values, inner._floor, inner.log_ratio_max))
    assert tracker is not None
    state = values if isinstance(tracker, PaperTracker) else log_odds_from_log_posterior(values)
    return tracker.odds(tracker._clamped(state))


def _carried(rule: Rule, memory: ArrayLike | None, shape: tuple[int, ...]) -> Any:
    """The rule's memory, given where it matters."""
    inner = innermost(rule)
    fresh = rule.init(*shape)
    if memory is None:
        unread, cure = False, ""
        if isinstance(inner, guidance.SafeLatentDiffusion):
            unread, cure = inner.momentum_scale == 0, "; with momentum_scale=0 it needs none"
        if fresh is None or unread:
            return fresh
        raise ValueError(
            f"memory must be given for {inner!r}, which depends on the steps before: "
            "rule.init(N, D) at the first step, then the memory of the last result"
            f"{cure}; got None"
        )
    if not _known(inner):
        return memory
    if fresh is None:
        raise ValueError(
            f"memory must be None for {inner!r}, which has none, got {_checks.shown(memory)}"
        )
    return _checks.array("memory", memory, shape)


# ---------------------------------------------------------------- divergences of the scores


def divergence_gap(
    mixture: GaussianMixture,
    x: ArrayLike,
    alpha: float,
    sigma: float,
    *,
    forbidden: ArrayLike | Sequence[ArrayLike],
) -> Array:
    """div s_c - div s at given points of a noise level: what networks would have to estimate.

    :func:`dng_math.divergence_correction` makes of it what a tracker's ``update`` takes.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        Points x_t = alpha x0 + sigma eps.
    alpha, sigma : float
        The noise level, alpha >= 0 and sigma > 0.
    forbidden : component indices, mask, or a list of several such
        As for :func:`dng_math.sample`; M concepts.

    Returns
    -------
    ndarray, shape (M, N), float64
        In inverse squared units of x.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    points, noisy, concepts = _divergence_arguments(mixture, x, alpha, sigma, forbidden)
    whole = noisy.score_divergence(points)
    return np.array([noisy.restrict(c).score_divergence(points) - whole for c in concepts])


def _divergence_arguments(
    mixture: object, x: ArrayLike, alpha: object, sigma: object, forbidden: object
) -> tuple[Array, GaussianMixture, list[Indices]]:
    checked = checked_mixture(mixture)
    points = checked._points(x)
    noisy = checked.diffuse(_checks.non_negative("alpha", alpha), _checks.positive("sigma", sigma))
    if forbidden is None:
        raise ValueError("forbidden must name the unwanted components, got None")
    return points, noisy, concepts_of(checked, forbidden)


def divergence_correction(
    mixture: GaussianMixture,
    x: ArrayLike,
    coefficients: StepCoefficients,
    step: int,
    tracker: PaperTracker | LogOddsTracker,
    state: ArrayLike,
    *,
    forbidden: ArrayLike | Sequence[ArrayLike],
) -> Array:
    """The ``correction`` of a tracker's ``update`` for a step with less noise than DDPM's.

    ``-(1 - eta^2) (beta_ts / 2) (div s_c - div s_ref)`` at the noisier end of the step (derived;
    docs/theory.md, section 6.9), with the score of the base as s_ref for a
    :class:`dng_math.PaperTracker` and that of the rest, s - o (s_c - s) with the tracked odds o,
    for a :class:`dng_math.LogOddsTracker`.  It is what ``divergence=True`` adds in
    :func:`dng_math.sample`, for loops of one's own.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        x_t, before the step.
    coefficients : StepCoefficients
        Of the sampler: ``schedule.coefficients(DDIM(0.0))``.
    step : int
        Its row: 0 is the noisiest step.
    tracker : PaperTracker or LogOddsTracker
        With ``divergence=True``.
    state : array_like, shape (M, N)
        The tracker's, before the update.
    forbidden : component indices, mask, or a list of several such
        As for :func:`dng_math.sample`; M concepts.

    Returns
    -------
    ndarray, shape (M, N), float64
        In nats.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    refuse_no_coefficients(coefficients)
    step = _checks.integer("step", step, 0, len(coefficients) - 1)
    if not isinstance(tracker, PaperTracker | LogOddsTracker):
        raise TypeError(
            f"tracker must be a PaperTracker or LogOddsTracker, got {_checks.shown(tracker)}"
        )
    if not tracker.divergence:
        raise ValueError(f"tracker must have divergence=True to be corrected, got {tracker!r}")
    alpha, sigma = float(coefficients.alpha_t[step]), float(coefficients.sigma_t[step])
    points, noisy, concepts = _divergence_arguments(mixture, x, alpha, sigma, forbidden)
    states = _checks.known("state", state)
    if states.shape != (len(concepts), len(points)):
        raise ValueError(
            f"state must have shape {(len(concepts), len(points))}, got {states.shape}"
        )
    score, divergence = noisy.score(points), noisy.score_divergence(points)
    corrections = []
    for concept, odds in zip(concepts, tracker.odds(states), strict=True):
        part = noisy.restrict(concept)
        gap = part.score_divergence(points) - divergence
        if isinstance(tracker, LogOddsTracker):
            score_gap_sq = np.sum((part.score(points) - score) ** 2, axis=-1)
            gap = equations.rest_divergence_gap(odds, gap, score_gap_sq)
        corrections.append(
            equations.divergence_correction(coefficients.eta[step], coefficients.beta_ts[step], gap)
        )
    return np.array(corrections)
