"""Guided predictions of a rule on an exact mixture, and the divergences of the mixture's scores.

A rule needs the predictions of the whole mixture, of what is forbidden, of the rest and of what
guidance leads to, and for some rules the posterior.  They are computed here both for
:func:`predict` and for the reference engine of :func:`dng_math.sample`, so the two agree bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import checks, equations, rules
from dng_math.mixture import GaussianMixture
from dng_math.rules import LimitedInterval, Predictions, Rule, StepNumbers, innermost
from dng_math.schedules import PREDICTION_TYPES, PredictionType, StepCoefficients
from dng_math.trackers import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    log_odds_from_log_posterior,
    path_way,
    refuse_no_coefficients,
)

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
# What a network may be trained to return, and the score, which an exact mixture has too.
Quantity = PredictionType | Literal["score"]
QUANTITIES: tuple[Quantity, ...] = (*PREDICTION_TYPES, "score")


@dataclass(frozen=True, eq=False)
class Roles:
    """Checked component indices of the forbidden concepts, of the rest and of the positive.

    ``cfg_scale`` is that of classifier-free guidance beneath the rule, None without it.
    ``within`` says that the forbidden are measured from the positive and lie in them: the rest is
    then that of the positive, and the posterior that of the forbidden among them.
    """

    mixture: GaussianMixture
    concepts: list[Indices]
    rest: Indices
    positive: Indices | None
    cfg_scale: float | None = None
    from_positive: bool = False
    within: bool = False

    @cached_property
    def forbidden_parts(self) -> list[GaussianMixture]:
        """The mixture of each concept's components."""
        return [self.mixture.restrict(concept) for concept in self.concepts]

    @cached_property
    def rest_part(self) -> GaussianMixture:
        """The mixture of everything that is not forbidden."""
        return self.mixture.restrict(self.rest)

    @cached_property
    def positive_part(self) -> GaussianMixture | None:
        """The mixture of the positive components; None if the positive is the rest."""
        return None if self.positive is None else self.mixture.restrict(self.positive)

    @cached_property
    def led_to(self) -> Indices:
        """Components that classifier-free guidance leads to."""
        return self.rest if self.positive is None else self.positive

    @cached_property
    def world_part(self) -> GaussianMixture:
        """The mixture of which the forbidden and the rest are the parts."""
        return self.mixture.restrict(self.led_to) if self.within else self.mixture

    @cached_property
    def world_concepts(self) -> list[Indices]:
        """Component indices of each concept within :attr:`world_part`."""
        if not self.within:
            return self.concepts
        return [np.searchsorted(self.led_to, concept) for concept in self.concepts]

    def log_share(self, noisy: GaussianMixture, x: Array, components: Indices) -> Array:
        """log p(components | x) among the forbidden and the rest, of the diffused mixture."""
        log_p = noisy.log_posterior(x, components)
        return log_p - noisy.log_posterior(x, self.led_to) if self.within else log_p

    @cached_property
    def opposite(self) -> Indices:
        """Components with weight that are not positive."""
        others = np.setdiff1d(np.arange(self.mixture.n_components), self.led_to)
        return others[self.mixture.weights[others] > 0]


def checked_mixture(value: object) -> GaussianMixture:
    """The value if it is a GaussianMixture; raises TypeError otherwise."""
    if not isinstance(value, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture, got {checks.shown(value)}")
    return value


def checked_rule(value: object) -> Rule:
    """The value if it is a rule, Unguided for None; raises TypeError otherwise."""
    if value is None:
        return rules.Unguided()
    rules.refuse_no_rule("rule", value)
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
            f"forbidden concepts must not share components, got {checks.shown(forbidden)}"
        )
    for concept in concepts:
        if mixture.weights[concept].sum() == 0:
            raise ValueError(
                f"forbidden must have weight: components {concept.tolist()} have no weight"
            )
    return concepts


def roles_of(
    mixture: GaussianMixture,
    rule: Rule,
    forbidden: object,
    positive: object,
    cfg_scale: object = None,
) -> Roles:
    """Forbidden, rest and positive components, checked against what the rule needs."""
    concepts = concepts_of(mixture, forbidden)
    taken = np.concatenate([*concepts, np.empty(0, dtype=np.intp)])
    rest = np.setdiff1d(np.arange(mixture.n_components), taken)
    if mixture.weights[rest].sum() == 0:
        raise ValueError(
            "forbidden must leave some components with weight: all are forbidden, got "
            f"{checks.shown(forbidden)}"
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
    unforbidden = isinstance(inner, rules.Unguided | rules.SPELL | rules.ImageReferenced) or (
        allowed is not None and rule.needs_positive and not isinstance(inner, rules.PerpNeg)
    )
    if not concepts and not unforbidden:
        raise ValueError(f"forbidden must name the unwanted components for {inner!r}, got None")
    if (
        isinstance(inner, rules.SPELL | rules.ImageReferenced)
        and inner.points.shape[1] != mixture.dim
    ):
        raise ValueError(
            f"points must have the mixture's {mixture.dim} dimensions, got shape "
            f"{inner.points.shape}"
        )
    if cfg_scale is None:
        if isinstance(inner, rules.CRG) or getattr(inner, "positive_factor", False):
            raise ValueError(
                f"cfg_scale must be given for {inner!r}, which compares the positive prediction "
                "with the unconditional one; got None"
            )
        return Roles(mixture, concepts, rest, allowed)
    scale = checks.finite("cfg_scale", cfg_scale)
    if rule.needs_positive:
        raise ValueError(
            f"cfg_scale must be None for {inner!r}, which leads to the positive prediction itself; "
            f"got {scale}"
        )
    if isinstance(inner, rules.ValueSignFlip):
        raise ValueError(
            f"cfg_scale must be None for {inner!r}, whose softmax is over the whole of an exact "
            f"mixture; got {scale}"
        )
    if not concepts and allowed is None:
        raise ValueError("positive must name what cfg_scale leads to, got None")
    from_positive = getattr(inner, "reference", "unconditional") == "positive"
    within = from_positive and allowed is not None and bool(np.isin(taken, allowed).all())
    if within:
        assert allowed is not None
        rest = np.setdiff1d(allowed, taken)
        if mixture.weights[rest].sum() == 0:
            raise ValueError(
                "forbidden must leave some positive components with weight: all are forbidden, "
                f"got {checks.shown(forbidden)}"
            )
    if from_positive and not within and _needs_shares(inner):
        raise ValueError(
            "forbidden must lie within positive for an exact posterior or a divergence measured "
            f"from the positive prediction (reference='positive'); got {checks.shown(forbidden)} "
            f"for {inner!r}"
        )
    return Roles(mixture, concepts, rest, allowed, scale, from_positive, within)


def _needs_shares(rule: Rule) -> bool:
    """Whether a rule reads a posterior or divergences of the parts of a whole."""
    posterior = rules.posterior_of(rule)
    if posterior is None:
        return False
    if isinstance(posterior, PathTracker) and posterior.probes == 0:
        posterior = posterior.first_order
    return isinstance(posterior, ExactPosterior) or posterior.divergence


def predictions_at(
    rule: Rule,
    roles: Roles,
    x: Array,
    alpha: float,
    sigma: float,
    prediction_type: Quantity,
    *,
    odds: Array | None,
    step: int,
    time: float,
    numbers: StepNumbers | None = None,
) -> Predictions:
    """The predictions that a rule reads at x of shape (N, D), as ``prediction_type``."""
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

    # At a given x all types are affine in each other: the change of eps per change of each type.
    to_noise = {
        "epsilon": 1.0,
        "sample": -alpha / sigma,
        "v_prediction": alpha / (alpha * alpha + sigma * sigma),
        "flow_prediction": alpha / (alpha + sigma),
        "score": -sigma,
    }[prediction_type]
    from_x0 = {
        "epsilon": -alpha / sigma,
        "sample": 1.0,
        "v_prediction": -(alpha * alpha + sigma * sigma) / sigma,
        "flow_prediction": -(alpha + sigma) / sigma,
        "score": alpha / (sigma * sigma),
    }[prediction_type]
    base, rest = of(roles.mixture), of(roles.rest_part)
    positive = rest if roles.positive_part is None else of(roles.positive_part)
    x0 = None
    if rules.reads_x0(rule):
        x0 = roles.mixture.posterior_mean(x, alpha, sigma)
    unconditional = reference = None
    if roles.cfg_scale is not None:
        unconditional = base
        base = equations.toward(base, positive - base, roles.cfg_scale)
        reference = positive if roles.from_positive else unconditional
        if x0 is not None:
            led = roles.mixture.restrict(roles.led_to).posterior_mean(x, alpha, sigma)
            x0 = equations.toward(x0, led - x0, roles.cfg_scale)
    direction = None
    if isinstance(innermost(rule), rules.PerpNeg):
        # base = q positive + (1 - q) opposite, so positive - opposite = (positive - base)/(1 - q).
        direction = np.zeros_like(base)
        if len(roles.opposite):
            direction = positive - of(roles.mixture.restrict(roles.opposite))
    pointwise = None
    inner = innermost(rule)
    if isinstance(inner, rules.ImageReferenced):
        unwanted, log_density = inner.kernel_mixture(x, alpha, sigma)
        if roles.from_positive:
            noisy_whole = roles.mixture.restrict(roles.led_to).diffuse(alpha, sigma)
        else:
            noisy_whole = noisy
        own_x0 = roles.mixture.posterior_mean(x, alpha, sigma)
        # Every kind is affine in x0 with the same factor, at a given x.
        unwanted = of(roles.mixture) + from_x0 * (unwanted - own_x0)
        pointwise = unwanted, log_density - noisy_whole.log_prob(x)
    negative = [of(part) for part in roles.forbidden_parts]
    log_ratio = None
    if negative and (roles.within or not roles.from_positive):
        joint = [noisy.log_posterior(x, concept) for concept in roles.concepts]
        log_ratio = np.array(joint) - noisy.log_posterior(x, roles.rest)
    return Predictions(
        base=base,
        negative=np.array(negative) if negative else base[None],
        positive=positive,
        rest=rest,
        log_ratio=log_ratio,
        odds=odds,
        to_noise=to_noise,
        step=step,
        time=time,
        direction=direction,
        unconditional=unconditional,
        reference=reference,
        cfg_scale=roles.cfg_scale or 0.0,
        x0=x0,
        from_x0=from_x0,
        noise_ratio=sigma / alpha if alpha > 0 else np.inf,
        numbers=numbers,
        pointwise=pointwise,
    )


def guided_by(rule: Rule, predictions: Predictions, memory: Any) -> tuple[Array, Array, Any]:
    """Call ``rule.guide``, and check the result of a user-written rule."""
    result = rule.guide(predictions, memory)
    if not isinstance(result, tuple) or len(result) != 3:
        raise TypeError(
            f"rule.guide must return (guided, scale, memory), got {checks.shown(result)}"
        )
    guided, scale, following = result
    if not _known(innermost(rule)):
        rows = len(predictions.negative)
        guided = checks.array("the guided prediction of rule.guide", guided, predictions.base.shape)
        scale = checks.array("the scale of rule.guide", scale, (rows, len(guided)))
    return guided, scale, following


@dataclass(frozen=True, eq=False)
class GuidedPrediction:
    """Result of :func:`predict` at N points in D dimensions, for M forbidden concepts.

    Attributes
    ----------
    guided : ndarray, shape (N, D)
        The guided prediction.  This and the next three are of the requested type.
    base : ndarray, shape (N, D)
        Prediction of the whole mixture, led to the positive one with a ``cfg_scale``.
        ``guided - base`` is the guidance term.
    negative : ndarray, shape (M, N, D)
        Predictions of the forbidden concepts.
    positive : ndarray, shape (N, D)
        Prediction of ``positive``, by default of everything that is not forbidden.
    scale : ndarray, shape (M, N)
        The scale lambda (for SLD its mean over dimensions); one row if nothing is forbidden.
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
    cfg_scale: float | None = None,
    prediction_type: Quantity = "epsilon",
    log_posterior: ArrayLike | None = None,
    memory: ArrayLike | None = None,
    step: int | None = None,
    time: float | None = None,
    coefficients: StepCoefficients | None = None,
) -> GuidedPrediction:
    """Guided prediction of a rule at given points, for plots and user-written samplers.

    With ``prediction_type="sample"`` this is what the reference engine of :func:`dng_math.sample`
    computes at a step, bit for bit.  Every rule is affine in the predictions, so it has the same
    form for each type: for the score DNG's is ``s - lambda (s_c - s)`` (DNG Eq. 10).

    Rules without memory and without a tracked posterior are functions of x alone.  The others also
    depend on the path of a sample: pass the tracked posterior as ``log_posterior`` and SLD's
    momentum as ``memory``.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        Points x_t = alpha x0 + sigma eps.
    alpha, sigma : float
        The noise level, alpha >= 0 and sigma > 0; ``schedule.alpha[i]`` and
        ``schedule.sigma[i]`` of a schedule.
    rule : Rule, optional
        From :mod:`dng_math.rules`; default unguided.
    forbidden, positive, cfg_scale : optional
        As for :func:`dng_math.sample`.
    prediction_type : {"epsilon", "sample", "v_prediction", "flow_prediction", "score"}
        E[eps | x], E[x0 | x], alpha eps - sigma x0, eps - x0, or the gradient of the log density,
        -eps/sigma.
    log_posterior : array_like, shape (M, N), (N,) for one concept, or a number; optional
        The tracked log p(c_k | x_t) of a rule with a tracker, as ``tracker.log_posterior(state)``
        and ``ChainResult.tracked`` give it, clamped to the tracker's limits; for feedback
        guidance the log ratio L.
    memory : array_like, shape (N, D), optional
        Memory of a rule that has one (SLD with ``momentum_scale`` not 0; CRG, shape (N, 1)):
        ``rule.init(N, D)`` at the first step, then ``memory`` of the last result.
    step : int, optional
        Index of the step from the noisy end, for SLD with ``warmup_steps``, and for rules that
        read the step.
    time : float, optional
        Time of the noise level in [0, 1], 1 at the noisy end, for
        :class:`dng_math.LimitedInterval`; ``schedule.time[i]`` of a schedule.
    coefficients : StepCoefficients, optional
        Steps of the run, for rules that read the step (GeoGuide, CRG, CFG++).

    Returns
    -------
    GuidedPrediction

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, if the rule needs one of the last five and it is not given, or
        if one is given that the rule cannot use.  The message names the argument and its value.

    Examples
    --------
    >>> import numpy as np
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    >>> rule = rules.DynamicNegativeGuidance(1.0)
    >>> at = (np.array([[-1.0], [0.0]]), 0.8, 0.6)
    >>> pushed = predict(mixture, *at, rule, forbidden=[0], prediction_type="score").guided
    >>> np.allclose(pushed, mixture.restrict([1]).diffuse(0.8, 0.6).score(at[0]))
    True
    """
    mixture = checked_mixture(mixture)
    points = mixture._points(x)
    alpha = checks.non_negative("alpha", alpha)
    sigma = checks.positive("sigma", sigma)
    rule = checked_rule(rule)
    roles = roles_of(mixture, rule, forbidden, positive, cfg_scale)
    checks.choice("prediction_type", prediction_type, QUANTITIES)
    numbers = _numbers(rule, step, coefficients)
    step, time = _at(rule, step, time)
    odds = _odds(rule, log_posterior, (max(1, len(roles.concepts)), len(points)))
    carried = _carried(rule, memory, points.shape)
    predictions = predictions_at(
        rule,
        roles,
        points,
        alpha,
        sigma,
        prediction_type,
        odds=odds,
        step=step,
        time=time,
        numbers=numbers,
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
    """Whether the rule is one of this package, so that the arguments it reads are known."""
    return type(rule).__module__.startswith(f"{rules.__name__}.")


def _numbers(
    rule: Rule, step: int | None, coefficients: StepCoefficients | None
) -> StepNumbers | None:
    """The numbers of the step; raises ValueError where the rule reads them and one is missing."""
    if coefficients is None:
        if rules.reads_the_step(rule):
            raise ValueError(
                f"coefficients must be given for {innermost(rule)!r}, which reads the step that "
                "will be taken: schedule.coefficients(sampler); got None"
            )
        return None
    refuse_no_coefficients(coefficients)
    if step is None:
        raise ValueError("step must be given with coefficients: the row of the step; got None")
    return StepNumbers.of(coefficients, checks.integer("step", step, 0, len(coefficients) - 1))


def _at(rule: Rule, step: int | None, time: float | None) -> tuple[int, float]:
    """Checked step and time; raises ValueError where the rule reads one that is not given."""
    inner = innermost(rule)
    foreign = not _known(inner)
    if step is not None:
        step = checks.integer("step", step, 0)
    elif foreign or (isinstance(inner, rules.SafeLatentDiffusion) and inner.warmup_steps > 0):
        raise ValueError(
            f"step must be given for {inner!r}: the index of the step from the noisy end; got None"
        )
    if time is not None:
        time = checks.real("time", time, "in [0, 1]", 0.0, 1.0, closed="[]")
    elif foreign or isinstance(rule, LimitedInterval) or getattr(inner, "end", 1.0) < 1.0:
        raise ValueError(
            f"time must be given for {rule!r}: the diffusion time of the noise level, 1 at the "
            "noisy end (of a schedule, schedule.time[i]); got None"
        )
    return 0 if step is None else step, 1.0 if time is None else time


def _odds(rule: Rule, log_posterior: ArrayLike | None, shape: tuple[int, int]) -> Array | None:
    """The odds of a tracked posterior (e^L for feedback guidance), within the tracker's limits."""
    inner = innermost(rule)
    tracker = rules.posterior_of(rule)
    if isinstance(tracker, ExactPosterior):
        tracker = None
    feedback = isinstance(inner, rules.FeedbackGuidance)
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
    values = checks.reals("log_posterior", log_posterior)
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
    if isinstance(inner, rules.FeedbackGuidance):
        return np.exp(np.clip(values, inner._floor, inner.log_ratio_max))
    assert tracker is not None
    if isinstance(tracker, PathTracker):
        tracker = tracker.first_order
    state = values if isinstance(tracker, PaperTracker) else log_odds_from_log_posterior(values)
    return tracker.odds(tracker._clamped(state))


def _carried(rule: Rule, memory: ArrayLike | None, shape: tuple[int, ...]) -> Any:
    """Checked memory of the rule; raises ValueError if it is missing or cannot be used."""
    inner = innermost(rule)
    fresh = rule.init(*shape)
    if memory is None:
        unread, cure = False, ""
        if isinstance(inner, rules.SafeLatentDiffusion):
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
            f"memory must be None for {inner!r}, which has none, got {checks.shown(memory)}"
        )
    return checks.array("memory", memory, fresh.shape)


# ---------------------------------------------------------------- divergences of the scores


def divergence_gap(
    mixture: GaussianMixture,
    x: ArrayLike,
    alpha: float,
    sigma: float,
    *,
    forbidden: ArrayLike | Sequence[ArrayLike],
) -> Array:
    """Exact difference div s_c - div s of the score divergences at given points of a noise level.

    With networks it would have to be estimated.  :func:`dng_math.divergence_correction` computes
    from such differences the ``correction`` of a tracker's ``update``.

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
        If an argument is invalid; the message names it, its value and what is allowed.
    """
    points, noisy, concepts = _divergence_arguments(mixture, x, alpha, sigma, forbidden)
    whole = noisy.score_divergence(points)
    return np.array([noisy.restrict(c).score_divergence(points) - whole for c in concepts])


def _divergence_arguments(
    mixture: object, x: ArrayLike, alpha: object, sigma: object, forbidden: object
) -> tuple[Array, GaussianMixture, list[Indices]]:
    checked = checked_mixture(mixture)
    points = checked._points(x)
    noisy = checked.diffuse(checks.non_negative("alpha", alpha), checks.positive("sigma", sigma))
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
    :func:`dng_math.sample`, here for user-written loops.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        x_t, before the step.
    coefficients : StepCoefficients
        Coefficients of the sampler, such as ``schedule.coefficients(DDIM(0.0))``.
    step : int
        Row of the coefficients; 0 is the noisiest step.
    tracker : PaperTracker or LogOddsTracker
        A tracker with ``divergence=True``.
    state : array_like, shape (M, N)
        The tracker's state before the update.
    forbidden : component indices, mask, or a list of several such
        As for :func:`dng_math.sample`; M concepts.

    Returns
    -------
    ndarray, shape (M, N), float64
        In nats.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """
    refuse_no_coefficients(coefficients)
    step = checks.integer("step", step, 0, len(coefficients) - 1)
    if not isinstance(tracker, PaperTracker | LogOddsTracker):
        raise TypeError(
            f"tracker must be a PaperTracker or LogOddsTracker, got {checks.shown(tracker)}"
        )
    if not tracker.divergence:
        raise ValueError(f"tracker must have divergence=True to be corrected, got {tracker!r}")
    alpha, sigma = float(coefficients.alpha_t[step]), float(coefficients.sigma_t[step])
    points, noisy, concepts = _divergence_arguments(mixture, x, alpha, sigma, forbidden)
    states = checks.known("state", state)
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


# ---------------------------------------------------------------- the path of the points


@dataclass(frozen=True, eq=False)
class PathPoint:
    """What a path tracker keeps of a point: N points in D dimensions, M concepts.

    Attributes
    ----------
    x : ndarray, shape (N, D)
    alpha, sigma : float
        Noise level of the point.
    gap : ndarray, shape (M, N, D)
        E[x0 | x, c] - E[x0 | x].
    rate : ndarray, shape (M, N)
        tau dL/dtau, :func:`dng_math.equations.path_rate`; 0 at alpha = 0.
    """

    x: Array
    alpha: float
    sigma: float
    gap: Array
    rate: Array

    def of(self, samples: Indices) -> PathPoint:
        """The points of some samples."""
        return PathPoint(
            self.x[samples],
            self.alpha,
            self.sigma,
            self.gap[:, samples],
            self.rate[:, samples],
        )


def path_point(
    x: Array, alpha: float, sigma: float, base: Array, negative: Array, divergence_gap: Array
) -> PathPoint:
    """A point from its predictions of x0, (N, D) and (M, N, D), and div s_c - div s, (M, N)."""
    gap = negative - base
    # (eps_c - eps) . (eps_c + eps) in terms of x0, with eps = (x - alpha x0)/sigma.
    product = np.sum(gap * (2.0 * x - alpha * (negative + base)), axis=-1) * (-alpha / sigma**2)
    return PathPoint(x, alpha, sigma, gap, equations.path_rate(product, sigma**2 * divergence_gap))


def ends_of(previous: PathPoint | None, point: PathPoint) -> tuple[Array, Array]:
    """The two ends of the line integral between two points, each of shape (M, N), in nats.

    Derived; docs/theory.md, section 6.11.  Without a previous point the path starts at infinite
    noise, and the gap of this end stands for that of the other one.
    """
    if previous is None:
        return -point.rate, -point.rate
    way = path_way(previous.alpha, previous.sigma, point.alpha, point.sigma)
    moved = way.here * point.x + way.there * previous.x
    before, after = (np.sum(each.gap * moved, axis=-1) for each in (previous, point))
    return (
        equations.path_end(way.pull_before * before, previous.rate, way.weight_before),
        equations.path_end(way.pull * after, point.rate, way.weight),
    )


def path_ends(
    mixture: GaussianMixture,
    x: ArrayLike,
    alpha: float,
    sigma: float,
    *,
    forbidden: ArrayLike | Sequence[ArrayLike],
    previous: tuple[ArrayLike, float, float] | None = None,
) -> tuple[Array, Array]:
    """The two ends of the line integral of log p(x | c)/p(x) from a point to the next.

    Half their sum is the change of the log ratio between the points, to second order in their
    distance, whatever lies between them (derived; docs/theory.md, section 6.11).
    :class:`dng_math.PathTracker` turns them into a posterior.

    Parameters
    ----------
    mixture : GaussianMixture
        The data distribution p_0.
    x : array_like, shape (N, D)
        The points x_t = alpha x0 + sigma eps.
    alpha, sigma : float
        Their noise level, alpha >= 0 and sigma > 0.
    forbidden : component indices, mask, or a list of several such
        As for :func:`dng_math.sample`; M concepts.
    previous : (x, alpha, sigma), optional
        The points before, at a noise level sigma/alpha that is not lower.  Without them the path
        starts at infinite noise, where the log ratio is 0.

    Returns
    -------
    before, after : ndarray, shape (M, N), float64
        In nats.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    def at(x: ArrayLike, alpha: object, sigma: object) -> PathPoint:
        points, noisy, concepts = _divergence_arguments(mixture, x, alpha, sigma, forbidden)
        a, s = float(alpha), float(sigma)  # type: ignore[arg-type]
        parts = [mixture.restrict(concept) for concept in concepts]
        whole = noisy.score_divergence(points)
        gap = [part.diffuse(a, s).score_divergence(points) - whole for part in parts]
        negative = [part.posterior_mean(points, a, s) for part in parts]
        base = mixture.posterior_mean(points, a, s)
        return path_point(points, a, s, base, np.array(negative), np.array(gap))

    point = at(x, alpha, sigma)
    if previous is None:
        return ends_of(None, point)
    if not isinstance(previous, tuple) or len(previous) != 3:
        raise TypeError(f"previous must be (x, alpha, sigma), got {checks.shown(previous)}")
    before = at(*previous)
    if before.x.shape != point.x.shape:
        raise ValueError(f"previous must have x of shape {point.x.shape}, got {before.x.shape}")
    if point.alpha == 0.0:
        raise ValueError("alpha must be > 0 after a previous point, got 0.0")
    if point.alpha * before.sigma < before.alpha * point.sigma:
        raise ValueError(
            "previous must not have less noise (sigma/alpha) than x: it has "
            f"alpha = {before.alpha:g}, sigma = {before.sigma:g}, and x has alpha = "
            f"{point.alpha:g}, sigma = {point.sigma:g}"
        )
    return ends_of(before, point)
