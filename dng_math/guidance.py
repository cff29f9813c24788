"""The guidance rules, as frozen sets of hyperparameters with a pure ``init`` and ``guide``.

A rule turns the predictions at x_t into a guided prediction.  It keeps nothing: what it carries
from step to step (SLD's momentum) it returns, and the posterior is tracked by the object in its
``posterior`` field (:mod:`dng_math.posterior`).  Predictions may be of the noise or of x0; the
rules that threshold a difference do so in units of the noise, as their papers do.

Signs: ``difference = negative - base`` and ``guided = base - scale difference``, so a positive
scale pushes away from what is forbidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dng_math import _checks, equations
from dng_math.posterior import (
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    TimeProfile,
    checked_statistics,
    refuse_no_coefficients,
)
from dng_math.schedules import StepCoefficients, TrackerVariance

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a rule sees at one step; N samples, D dimensions, M forbidden concepts.

    Attributes
    ----------
    base : ndarray, shape (N, D)
        Unguided prediction.
    negative : ndarray, shape (M, N, D)
        Predictions of the forbidden concepts.
    positive : ndarray, shape (N, D), or None
        Prediction of what guidance leads to.
    rest : ndarray, shape (N, D), or None
        Prediction of everything that is not forbidden.
    log_ratio : ndarray, shape (M, N), or None
        Exact log p(c_k | x) - log p(rest | x).
    odds : ndarray, shape (M, N), or None
        Tracked p_k / (1 - p_k); for feedback guidance, e^L.
    to_noise : float
        Noise units per unit of these predictions: 1 for noise, -alpha/sigma for x0.
    step, time : int, float
        Step from the noisy end; time in (0, 1], 1 at the noisy end.
    direction : ndarray, shape (N, D), or None
        A positive multiple of ``positive - base`` that keeps its digits where those two agree to
        rounding; None: their difference itself.  In an exact mixture it is positive minus the
        prediction of all other components.
    """

    base: Array
    negative: Array
    positive: Array | None
    rest: Array | None
    log_ratio: Array | None
    odds: Array | None
    to_noise: float
    step: int
    time: float
    direction: Array | None = None

    @property
    def difference(self) -> Array:
        """Negative minus base, shape (M, N, D)."""
        return self.negative - self.base


class Rule(Protocol):
    """A guidance rule."""

    @property
    def needs_positive(self) -> bool:
        """Whether it reads the positive prediction."""
        ...

    @property
    def several_concepts(self) -> bool:
        """Whether it takes more than one forbidden concept."""
        ...

    def init(self, n: int, dimensions: int) -> Array | None:
        """Memory before the first step."""
        ...

    def guide(
        self, predictions: Predictions, memory: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Guided prediction (N, D), scale (M, N) and memory for the next step."""
        ...


def refuse_no_rule(name: str, value: object) -> None:
    """Refuse what is no rule; a class of rules is none either."""
    needed = ("init", "guide", "needs_positive", "several_concepts")
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a guidance rule, got the class {value.__name__}: "
            f"{value.__name__}(...) makes one"
        )
    missing = [attribute for attribute in needed if not hasattr(value, attribute)]
    if missing:
        raise TypeError(
            f"{name} must be a guidance rule, with {', '.join(needed)}; got "
            f"{_checks.shown(value)} without {', '.join(missing)}"
        )


class _Memoryless:
    """Rules that carry nothing from step to step, need no positive, and take one concept."""

    needs_positive: ClassVar[bool] = False
    several_concepts: ClassVar[bool] = False

    def init(self, n: int, dimensions: int) -> Array | None:
        """Nothing to remember."""
        return None


def _constant(predictions: Predictions, scale: float) -> Array:
    return np.full(predictions.negative.shape[:2], scale)


@dataclass(frozen=True)
class Unguided(_Memoryless):
    """The base prediction as it is."""

    several_concepts: ClassVar[bool] = True

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        return predictions.base, _constant(predictions, 0.0), None


@dataclass(frozen=True)
class ClassifierFreeGuidance(_Memoryless):
    """``base + g (positive - base)``: CFG Eq. 6, g = 1 is the positive prediction itself.

    In an exact mixture with the rest as positive this is DNG with the exact posterior.
    """

    guidance_scale: float = 1.0
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None
        guided = equations.toward(
            predictions.base, predictions.positive - predictions.base, self.guidance_scale
        )
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class ClassifierGuidance(ClassifierFreeGuidance):
    """``s + g grad log p(positive | x)`` (Dhariwal and Nichol 2021) with the exact classifier.

    The exact classifier's gradient is ``s_positive - s``, so in an exact mixture the rule is
    CFG; with networks the two differ by their errors.
    """


@dataclass(frozen=True)
class NegativePrompting(_Memoryless):
    """``base - g (negative - base)``: the same push for every sample and every step."""

    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        guided = equations.away(predictions.base, predictions.difference[0], self.guidance_scale)
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class SafeLatentDiffusion(_Memoryless):
    """SLD (arXiv 2211.05105; DNG Eq. 21): an elementwise scale behind a threshold.

    Parameters
    ----------
    guidance_scale : float
        Factor g of the correction.
    threshold : float
        The gate opens where ``eps - eps_neg`` is below it; noise units.
    gate : {"signed", "absolute"}
        Which: the signed difference (as printed and published) or its absolute value (as the
        prose describes).
    scale : float
        s_s; the elementwise scale is min(1, s_s |eps - eps_neg|).
    momentum_scale, momentum_decay : float
        s_m and beta_m.
    warmup_steps : int
        Steps during which the momentum builds up but nothing is applied.
    """

    guidance_scale: float = 1.0
    threshold: float = 0.04
    gate: Literal["signed", "absolute"] = "signed"
    scale: float = 100.0
    momentum_scale: float = 0.1
    momentum_decay: float = 0.2
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)
        _checks.finite("threshold", self.threshold)
        _checks.choice("gate", self.gate, ("signed", "absolute"))
        _checks.non_negative("scale", self.scale)
        _checks.finite("momentum_scale", self.momentum_scale)
        _checks.real("momentum_decay", self.momentum_decay, "in [0, 1]", 0.0, 1.0, closed="[]")
        _checks.integer("warmup_steps", self.warmup_steps, 0)

    def init(self, n: int, dimensions: int) -> Array:
        """Zero momentum, shape (n, dimensions), in units of the noise."""
        return np.zeros((n, dimensions))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`; the scale is the mean over dimensions of the elementwise one."""
        assert memory is not None
        difference = predictions.difference[0] * predictions.to_noise
        magnitude = np.abs(difference)
        gated = magnitude if self.gate == "absolute" else -difference
        scale = np.where(gated < self.threshold, np.minimum(1.0, self.scale * magnitude), 0.0)
        correction = equations.safe_correction(scale, difference, self.momentum_scale, memory)
        momentum = equations.safe_momentum(memory, correction, self.momentum_decay)
        mean_scale = self.guidance_scale * scale.mean(axis=-1)[None]
        # At alpha = 0 the noise does not depend on x0, and there is nothing to correct.
        if predictions.step < self.warmup_steps or predictions.to_noise == 0:
            return predictions.base, np.zeros_like(mean_scale), momentum
        guided = equations.away(
            predictions.base, correction / predictions.to_noise, self.guidance_scale
        )
        return guided, mean_scale, momentum


@dataclass(frozen=True)
class PerpNeg(_Memoryless):
    """Perp-Neg (arXiv 2304.04968, Eq. 5): only what is orthogonal to the positive direction.

    ``base + positive_scale u - g (d - (d.u / u.u) u)`` with u = positive - base and
    d = negative - base, per sample.  Where u is zero to rounding (|u| <= 1e-12 |base|) there is no
    direction, and nothing is projected out.

    In an exact mixture u has a direction wherever the positive components differ from the others,
    however little of it is left: it is taken from their two predictions, whose difference does not
    vanish.  With everything that is not forbidden as the positive, d points exactly away from it
    (base = p negative + (1 - p) positive), so nothing of d is left, at any g.
    """

    guidance_scale: float = 1.0
    positive_scale: float = 0.0
    ROUNDING_SQ: ClassVar[float] = 1e-24
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)
        _checks.finite("positive_scale", self.positive_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None
        toward = predictions.positive - predictions.base
        direction = toward if predictions.direction is None else predictions.direction
        difference = predictions.difference[0]
        norm_sq = np.sum(direction * direction, axis=-1, keepdims=True)
        dot = np.sum(difference * direction, axis=-1, keepdims=True)
        floor = self.ROUNDING_SQ * np.sum(predictions.base**2, axis=-1, keepdims=True)
        projection = np.divide(dot, norm_sq, out=np.zeros_like(dot), where=norm_sq > floor)
        guided = equations.away(
            equations.toward(predictions.base, toward, self.positive_scale),
            equations.perpendicular(difference, direction, projection),
            self.guidance_scale,
        )
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class ContrastiveCFG(_Memoryless):
    """Contrastive CFG (arXiv 2411.17077): scale ``2 g e^-r / (1 + e^-r)``.

    r = tau |eps_neg - eps|^2.  Stateless: it fades as the two predictions move apart.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)
        _checks.non_negative("temperature", self.temperature)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        difference = predictions.difference[0]
        norm_sq = np.sum(difference * difference, axis=-1) * predictions.to_noise**2
        scale = equations.contrastive_scale(
            self.guidance_scale, np.exp(-self.temperature * norm_sq)
        )
        return equations.away(predictions.base, difference, scale[:, None]), scale[None], None


@dataclass(frozen=True)
class DynamicNegativeGuidance(_Memoryless):
    """DNG Eq. 10: ``base - lambda (negative - base)`` with lambda = g p / (1 - p), per sample.

    Several concepts: ``base - g sum_k p_k (negative_k - base) / (1 - sum_j p_j)`` (derived;
    docs/theory.md, section 5.2).

    Parameters
    ----------
    guidance_scale : float
        g; at g = 1 with the exact posterior the samples follow p(x | not c) exactly.
    posterior : ExactPosterior, PaperTracker or LogOddsTracker
        Where p comes from.
    """

    guidance_scale: float = 1.0
    posterior: ExactPosterior | PaperTracker | LogOddsTracker = field(
        default_factory=ExactPosterior
    )
    several_concepts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.finite("guidance_scale", self.guidance_scale)
        if not isinstance(self.posterior, ExactPosterior | PaperTracker | LogOddsTracker):
            raise TypeError(
                "posterior must be an ExactPosterior, PaperTracker or LogOddsTracker, "
                f"got {self.posterior!r}"
            )

    @classmethod
    def tracked(
        cls,
        guidance_scale: float = 1.0,
        prior: float = 0.01,
        temperature: float | TimeProfile = 1.0,
        offset: float = 0.0,
        *,
        offset_nats: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
        tracker: Literal["paper", "log-odds"] = "paper",
        variance: TrackerVariance = "matched",
    ) -> DynamicNegativeGuidance:
        """With a tracked posterior, its hyperparameters in one line (DNG Eqs. 10 and 12).

        Parameters
        ----------
        guidance_scale : float
            g of lambda = g p / (1 - p).
        prior : float
            p(c) at the noisy end, in (0, 1).
        temperature : float or TimeProfile
            Factor of the log likelihood ratio, >= 0; below 1 for networks.
        offset : float
            The paper's, added as offset / (2 v) at each step.
        offset_nats : float
            Added over the whole run in equal parts, whatever the number of steps.
        p_min, p_max : float
            Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
        tracker : {"paper", "log-odds"}
            :class:`PaperTracker` or :class:`LogOddsTracker`.
        variance : {"matched", "small", "large", "published"}
            That the tracker divides by.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, its value and what is allowed.
        """
        if isinstance(prior, Sequence) or isinstance(guidance_scale, Sequence):
            raise TypeError(
                "guidance_scale and prior must be numbers, got "
                f"{guidance_scale!r} and {prior!r}; for unwanted concepts with priors or scales of "
                "their own give apply_guidance a rule for each, a list"
            )
        _checks.choice("tracker", tracker, ("paper", "log-odds"))
        _checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
        kind = PaperTracker if tracker == "paper" else LogOddsTracker
        return cls(
            guidance_scale,
            kind(
                prior=prior,
                temperature=temperature,
                offset=offset,
                offset_nats=offset_nats,
                p_min=p_min,
                p_max=p_max,
                variance=variance,
            ),
        )

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        if isinstance(self.posterior, ExactPosterior):
            return self._guide_exactly(predictions)
        assert predictions.odds is not None
        odds = predictions.odds
        posterior = odds / (1.0 + odds)
        total = posterior.sum(axis=0)
        # Trackers of several concepts do not know of each other: their sum is capped like one.
        posterior = posterior * np.minimum(1.0, self.posterior.p_max / np.maximum(total, 1e-300))
        scale = equations.dynamic_scale(self.guidance_scale, posterior, 1.0 - posterior.sum(axis=0))
        guided = predictions.base
        for difference, factor in zip(predictions.difference, scale, strict=True):
            guided = equations.away(guided, difference, factor[:, None])
        return guided, scale, None

    def _guide_exactly(self, predictions: Predictions) -> tuple[Array, Array, None]:
        # sum_k p_k (negative_k - base) = (1 - sum_j p_j) sum_k p_k (negative_k - rest), so the
        # vanishing denominator cancels and the rule stays accurate as p -> 1.
        assert predictions.log_ratio is not None and predictions.rest is not None
        log_ratio = predictions.log_ratio
        log_rest = -np.logaddexp.reduce([np.zeros_like(log_ratio[0]), *log_ratio], axis=0)
        guided = predictions.base
        for negative, posterior in zip(
            predictions.negative, np.exp(log_ratio + log_rest), strict=True
        ):
            guided = equations.away(
                guided, negative - predictions.rest, self.guidance_scale * posterior[:, None]
            )
        return guided, self.guidance_scale * np.exp(np.minimum(log_ratio, 700.0)), None


@dataclass(frozen=True)
class RatioTracker:
    """FBG's estimate of L = log p(positive | x_t) / p(positive) up to a constant, clamped."""

    temperature: float
    step_offset: float
    low: float
    high: float
    divergence: ClassVar[bool] = False
    variance: ClassVar[Literal["matched"]] = "matched"

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which L is kept."""
        return self.low, self.high

    def init(self, prior: Array) -> Array:
        """L = 0 at the noisy end, whatever the prior, or the limit that is nearest to 0."""
        return np.clip(np.zeros_like(prior), self.low, self.high)

    def update(
        self,
        state: Array,
        gap_sq: Array,
        residual_gap: Array,
        variance: float,
        steps: int,
        correction: Array | float = 0.0,
    ) -> Array:
        """L at the cleaner end of a step; see :meth:`dng_math.PaperTracker.update`."""
        checked_statistics(state, gap_sq, residual_gap, correction)
        if _checks.non_negative("variance", variance) == 0:
            return state
        log_ratio = equations.log_likelihood_ratio(gap_sq, residual_gap, variance)
        updated = equations.tracker_update(
            state, log_ratio, variance, self.temperature, 0.0, self.step_offset
        )
        return np.clip(updated, self.low, self.high)

    def log_posterior(self, state: Array) -> Array:
        """L itself: a log ratio, not a log probability."""
        return state

    def odds(self, state: Array) -> Array:
        """e^L."""
        return np.exp(state)


@dataclass(frozen=True)
class FeedbackGuidance(_Memoryless):
    """FBG (arXiv 2506.06085): ``base + lambda (positive - base)``, lambda = e^L/(e^L - (1 - pi)).

    lambda = 1 is the plain positive prediction.  L is tracked like the paper's posterior, from
    0, and clamped so that lambda stays in (1, lambda_max].

    Parameters
    ----------
    pi : float
        In (0, 1): how much of the learned conditional is the true one.
    lambda_max : float
        Largest scale, above 1; sets the floor of L.
    t0, t1 : float
        In (0, 1): where guidance should set in and where it should peak, as shares of the
        diffusion time; they set the offset and the temperature that are not given.
    temperature, step_offset : float, optional
        tau and delta, if given instead.
    lambda_ref : float
        Scale that the offset alone would reach at t0.
    log_ratio_max : float
        Ceiling of L, above 0 and not below the floor, log((1 - pi) lambda_max/(lambda_max - 1)).
    """

    pi: float = 0.95
    lambda_max: float = 10.0
    t0: float = 0.5
    t1: float = 0.4
    temperature: float | None = None
    step_offset: float | None = None
    lambda_ref: float = 3.0
    log_ratio_max: float = 3.0
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("pi", "t0", "t1"):
            _checks.real(name, getattr(self, name), "in (0, 1)", 0.0, 1.0, closed="()")
        for name in ("lambda_max", "lambda_ref"):
            _checks.real(name, getattr(self, name), "finite and > 1", 1.0, np.inf, closed="()")
        if self.temperature is not None:
            _checks.non_negative("temperature", self.temperature)
        if self.step_offset is not None:
            _checks.finite("step_offset", self.step_offset)
        _checks.real(
            "log_ratio_max", self.log_ratio_max, "finite and > 0", 0.0, np.inf, closed="()"
        )
        if self._floor > self.log_ratio_max:
            raise ValueError(
                f"log_ratio_max must not be below the floor of L that pi = {self.pi!r} and "
                f"lambda_max = {self.lambda_max!r} give, {self._floor:g}; got "
                f"{self.log_ratio_max!r}"
            )

    @property
    def _floor(self) -> float:
        """L at which the scale is lambda_max."""
        # log1p: for a tiny pi and a large lambda_max the floor is almost 0, and must not reach it.
        return float(np.log1p(-self.pi) - np.log1p(-1.0 / self.lambda_max))

    def tracker(self, coefficients: StepCoefficients) -> RatioTracker:
        """The tracker of L on a schedule, with the paper's offset and temperature."""
        refuse_no_coefficients(coefficients)
        pi, steps = self.pi, len(coefficients)
        offset = self.step_offset
        if offset is None:
            reference = (1.0 - pi) * self.lambda_ref / (self.lambda_ref - 1.0)
            offset = float(np.log(reference)) / ((1.0 - self.t0) * steps)
        temperature = self.temperature
        if temperature is None:
            small = coefficients.tracker_variance("small")
            at_t1 = np.interp(self.t1, coefficients.time[::-1], small[::-1])
            temperature = abs(2.0 * float(at_t1) * offset / 10.0)
        return RatioTracker(temperature, offset, self._floor, self.log_ratio_max)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None and predictions.odds is not None
        scale = equations.feedback_scale(predictions.odds[0], self.pi)
        guided = equations.toward(
            predictions.base, predictions.positive - predictions.base, scale[:, None]
        )
        return guided, scale[None], None


@dataclass(frozen=True)
class LimitedInterval:
    """Any rule inside [t_lo, t_hi], nothing outside (arXiv 2404.07724).

    Time is 1 at the noisy end and 0 at the data.  A posterior is tracked outside too.
    """

    rule: Rule
    t_lo: float = 0.0
    t_hi: float = 1.0

    def __post_init__(self) -> None:
        refuse_no_rule("rule", self.rule)
        _checks.real("t_hi", self.t_hi, "in [0, 1]", 0.0, 1.0, closed="[]")
        _checks.real("t_lo", self.t_lo, "in [0, t_hi]", 0.0, self.t_hi, closed="[]")

    @property
    def needs_positive(self) -> bool:
        """That of the rule inside."""
        return self.rule.needs_positive

    @property
    def several_concepts(self) -> bool:
        """That of the rule inside."""
        return self.rule.several_concepts

    def init(self, n: int, dimensions: int) -> Array | None:
        """Memory of the rule inside."""
        return self.rule.init(n, dimensions)

    def guide(
        self, predictions: Predictions, memory: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """See :class:`Rule`."""
        if self.t_lo <= predictions.time <= self.t_hi:
            return self.rule.guide(predictions, memory)
        return predictions.base, _constant(predictions, 0.0), memory


def innermost(rule: Rule) -> Rule:
    """The rule inside any limited intervals."""
    while isinstance(rule, LimitedInterval):
        rule = rule.rule
    return rule


def tracker_of(
    rule: Rule, coefficients: StepCoefficients
) -> PaperTracker | LogOddsTracker | RatioTracker | None:
    """The tracker that a rule carries along a chain, if any."""
    inner = innermost(rule)
    if isinstance(inner, FeedbackGuidance):
        return inner.tracker(coefficients)
    if isinstance(inner, DynamicNegativeGuidance) and not isinstance(
        inner.posterior, ExactPosterior
    ):
        return inner.posterior
    return None


def warn_where_noise_is_missing(
    tracker: PaperTracker | LogOddsTracker | RatioTracker | None,
    coefficients: StepCoefficients,
    *,
    stacklevel: int,
) -> None:
    """Warn where a tracker will be wrong: with less noise than DDPM's and no divergence term.

    Parameters
    ----------
    tracker : PaperTracker, LogOddsTracker, RatioTracker or None
    coefficients : StepCoefficients
        The last step is not looked at: no state is used after it.
    stacklevel : int
        As of :func:`warnings.warn`, 1 for the caller of this function.
    """
    eta = coefficients.eta[:-1]
    if tracker is None or tracker.divergence or not np.any(eta < 1.0 - 1e-6):
        return
    cure = "use DDPM, or DDIM with eta=1"
    if not isinstance(tracker, RatioTracker):
        cure += f", or {type(tracker).__name__}(..., divergence=True), which adds the missing term"
    warnings.warn(
        f"the sampler adds {'no' if eta.min() == 0 else 'too little'} noise (eta = "
        f"{eta.min():g}, and the tracker takes it to be 1): the tracked posterior is wrong however "
        f"many steps are taken; {cure}",
        stacklevel=stacklevel + 1,
    )
