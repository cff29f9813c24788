"""The guidance rules, as frozen sets of hyperparameters with a pure ``init`` and ``guide``.

A rule turns the predictions at x_t into a guided prediction.  It has no state of its own: its
memory from step to step (SLD's momentum) is passed in and returned, and the posterior is tracked
by the object in its ``posterior`` field (:mod:`dng_math.trackers`).  Predictions may be of the
noise or of x0; the rules that threshold a difference do so in units of the noise, as their papers
do.

Signs: ``difference = negative - base`` and ``guided = base - scale difference``, so a positive
scale pushes away from what is forbidden.

With classifier-free guidance beneath a rule there are two predictions that the negative can be
measured from, the positive one and the unconditional one: the rule's ``reference`` says which.
Without it there is one, the base, whatever ``reference`` says (docs/theory.md, section 5.9).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dng_math import checks, equations
from dng_math.schedules import TRACKER_VARIANCES, StepCoefficients, TrackerVariance
from dng_math.trackers import (
    TRACKERS,
    ExactPosterior,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    RatioTracker,
    TimeProfile,
    Tracker,
    TrackerName,
    refuse_no_coefficients,
)

Array = NDArray[np.float64]
Reference = Literal["positive", "unconditional"]
REFERENCES: tuple[Reference, ...] = ("positive", "unconditional")
ROUNDING_SQ = 1e-24  # |a|^2 <= ROUNDING_SQ |b|^2: to double precision a may be 0


class StepNumbers(NamedTuple):
    """The step that will be taken, for rules that read it; see :class:`StepCoefficients`."""

    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    alpha_ts: float
    beta_ts: float
    x0_factor: float
    steps: int

    @classmethod
    def of(cls, coefficients: StepCoefficients, step: int) -> StepNumbers:
        """The numbers of one row of the coefficients."""
        row = {name: float(getattr(coefficients, name)[step]) for name in cls._fields[:-1]}
        return cls(**row, steps=len(coefficients))


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a rule reads at one step; N samples, D dimensions, M forbidden concepts.

    Attributes
    ----------
    base : ndarray, shape (N, D)
        Prediction that guidance is added to: the unguided one, or with classifier-free guidance
        beneath the rule ``unconditional + cfg_scale (positive - unconditional)``.
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
        Index of the step from the noisy end; time in (0, 1], 1 at the noisy end.
    direction : ndarray, shape (N, D), or None
        A positive multiple of ``positive - base`` that is accurate even where those two agree to
        rounding; None stands for their difference itself.  In an exact mixture it is positive
        minus the prediction of all other components.
    unconditional, reference : ndarray, shape (N, D), or None
        With classifier-free guidance beneath the rule: where that starts, and what the negative is
        measured from.  Without it both are the base, and None.
    cfg_scale : float
        Scale of classifier-free guidance beneath the rule.
    x0 : ndarray, shape (N, D), or None
        The base as a prediction of x0.
    from_x0 : float
        These predictions per unit of x0: 1 for x0, -alpha/sigma for the noise.
    noise_ratio : float
        sigma/alpha, infinite at alpha = 0.
    numbers : StepNumbers or None
        The step that will be taken from here.
    pointwise : (ndarray, shape (N, D), ndarray, shape (N,)), or None
        For a rule whose negatives are points: their prediction, and the log of their density over
        that of what they are measured from.
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
    unconditional: Array | None = None
    reference: Array | None = None
    cfg_scale: float = 0.0
    x0: Array | None = None
    from_x0: float = 1.0
    noise_ratio: float = np.inf
    numbers: StepNumbers | None = None
    pointwise: tuple[Array, Array] | None = None

    @property
    def measured_from(self) -> Array:
        """The prediction that the negative is measured from, shape (N, D)."""
        return self.base if self.reference is None else self.reference

    @property
    def difference(self) -> Array:
        """Negative minus what it is measured from, shape (M, N, D)."""
        return self.negative - self.measured_from

    def as_x0(self, prediction: Array) -> Array:
        """One of these predictions, (N, D), as a prediction of x0; for rules with :attr:`x0`.

        Where the predictions do not depend on x0 (the noise at alpha = 0) it is that of the base.
        """
        assert self.x0 is not None
        if prediction is self.base or self.from_x0 == 0:
            return self.x0
        return self.x0 + (prediction - self.base) / self.from_x0


class Rule(Protocol):
    """Interface of a guidance rule."""

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
    """Raise TypeError unless the value is a rule; a rule's class is not one."""
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
            f"{checks.shown(value)} without {', '.join(missing)}"
        )


class _Memoryless:
    """Defaults of a rule: no memory, no positive prediction, a single concept."""

    needs_positive: ClassVar[bool] = False
    several_concepts: ClassVar[bool] = False

    def init(self, n: int, dimensions: int) -> Array | None:
        """None: the rule has no memory."""
        return None


def _constant(predictions: Predictions, scale: float) -> Array:
    return np.full(predictions.negative.shape[:2], scale)


@dataclass(frozen=True)
class Unguided(_Memoryless):
    """No guidance: the base prediction itself."""

    several_concepts: ClassVar[bool] = True

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        return predictions.base, _constant(predictions, 0.0), None


@dataclass(frozen=True)
class ClassifierFreeGuidance(_Memoryless):
    """``base + g (positive - base)``: CFG Eq. 6; g = 1 is the positive prediction itself.

    In an exact mixture with the rest as positive this is DNG with the exact posterior.

    Parameters
    ----------
    guidance_scale : float
        g, finite.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number.
    """

    guidance_scale: float = 1.0
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)

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
    CFG; with networks the two differ by their errors.  Parameters are those of
    :class:`ClassifierFreeGuidance`.
    """


@dataclass(frozen=True)
class NegativePrompting(_Memoryless):
    """``base - g (negative - base)``: negative prompting, with the same scale at every step.

    docs/theory.md, section 5.3.

    Parameters
    ----------
    guidance_scale : float
        g, finite.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number or the reference none of these.
    """

    guidance_scale: float = 1.0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        guided = equations.away(predictions.base, predictions.difference[0], self.guidance_scale)
        return guided, _constant(predictions, self.guidance_scale), None


@dataclass(frozen=True)
class SignedNegative(NegativePrompting):
    """``null + w (positive - null) - g (negative - null)``: composable NOT.

    docs/theory.md, section 5.9.

    That is negative prompting measured from the unconditional prediction, with classifier-free
    guidance of scale w beneath.  Parameters are those of :class:`NegativePrompting`.
    """

    reference: Reference = "unconditional"


# Steps at which VL-DNP asks, of a run of 50.
ASKED_AT, ASKED_OF = (5, 6, 7, 9, 12, 16, 21, 27, 34, 42), 50


def checked_steps(at: object, of: int | None) -> tuple[int, ...]:
    """The steps at which a rule asks, of a run of ``of`` steps: sorted, each once."""
    if isinstance(at, str) or not isinstance(at, Sequence) or not at:
        raise TypeError(f"at must be a sequence of one or more steps, got {checks.shown(at)}")
    steps = [checks.integer("at", step, 0, None if of is None else of - 1) for step in at]
    return tuple(sorted(set(steps)))


def asked_steps(at: Sequence[int], of: int | None, steps: int) -> frozenset[int]:
    """Steps of a run at which a rule asks: ``at`` themselves, or ``step steps // of`` of them."""
    return frozenset(at if of is None else (step * steps // of for step in at))


@dataclass(frozen=True, eq=False)
class AskedNegative(_Memoryless):
    """VL-DNP (arXiv 2510.26052): negative prompting of what is seen, for as long as it is.

    ``base - g h (negative - reference)``, h being 1 for a sample whose prediction of x0 without the
    negative showed the concept when it was last looked at, and 0 for others and before the first
    question (docs/theory.md, section 5.15).  With h = 0 the guided prediction is the base itself,
    and no negative is needed.

    The memory is h, shape (N, 1).  It runs in ``engine="reference"``: compiled code cannot ask.
    In a pipeline :class:`dng_models.DynamicPrompts` is this rule.

    Parameters
    ----------
    ask : callable
        ``ask(x0, step)`` says for every sample whether it shows the concept: an array of bool,
        shape (N,).  ``x0``, shape (N, D), are predictions of the base, and ``step`` is the index
        of the step from the noisy end.  On an exact mixture ``mixture.posterior(x0, c) > 0.5`` is
        a judge that is right of every finished sample.
    guidance_scale : float
        g, finite; the published w_neg, from 7.5 to 15.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.
    at : sequence of int
        Steps at which ``ask`` is asked.
    of : int, optional
        Number of steps that ``at`` is for: of N steps, step ``at N // of`` asks.  None: the steps
        themselves, whatever their number.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.

    Examples
    --------
    >>> from dng_math import GaussianMixture, NoiseSchedule, sample
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    >>> rule = AskedNegative(
    ...     lambda x0, step: mixture.posterior(x0, [0]) > 0.5, 4.0, at=range(50)
    ... )
    >>> schedule = NoiseSchedule.linear().respace(50)
    >>> x = sample(mixture, schedule, rule, forbidden=[0], n=100, engine="reference").x
    >>> bool((x < 0).mean() < 0.05)
    True
    """

    ask: Callable[[Array, int], Any]
    guidance_scale: float = 7.5
    reference: Reference = "unconditional"
    at: Sequence[int] = ASKED_AT
    of: int | None = ASKED_OF

    def __post_init__(self) -> None:
        if isinstance(self.ask, type) or not callable(self.ask):
            raise TypeError(f"ask must be a callable (x0, step), got {checks.shown(self.ask)}")
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)
        if self.of is not None:
            checks.integer("of", self.of, 1)
        object.__setattr__(self, "at", checked_steps(self.at, self.of))

    def asked_at(self, steps: int) -> frozenset[int]:
        """The steps of a run of so many steps at which ``ask`` is asked."""
        return asked_steps(self.at, self.of, steps)

    def init(self, n: int, dimensions: int) -> Array:
        """Nothing is held, shape (n, 1)."""
        return np.zeros((n, 1))

    def held(self, predictions: Predictions, memory: Array) -> Array:
        """What is held from this step on, shape (N, 1): asked where a question is due.

        Raises
        ------
        ValueError, TypeError
            If ``ask`` does not return True or False for every sample.
        """
        assert predictions.x0 is not None and predictions.numbers is not None
        if predictions.step not in self.asked_at(predictions.numbers.steps):
            return memory
        answer = self.ask(predictions.x0, predictions.step)
        try:
            seen = np.asarray(answer)
        except ValueError:  # ragged
            seen = np.empty(0)
        if seen.dtype != np.bool_:
            raise TypeError(
                "ask must return an array of bool, True for every sample that shows the concept, "
                f"got {checks.shown(answer)}"
            )
        if seen.shape != (len(memory),):
            raise ValueError(
                f"ask must return one answer for each of {len(memory)} samples, got shape "
                f"{seen.shape}"
            )
        return seen[:, None].astype(np.float64)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`."""
        assert memory is not None
        held = self.held(predictions, memory)
        pushed = equations.away(predictions.base, predictions.difference[0], self.guidance_scale)
        guided = np.where(held != 0.0, pushed, predictions.base)
        return guided, self.guidance_scale * held.T, held


SafetyLevel = Literal["weak", "medium", "strong", "max"]
# Warm-up, slope, threshold, momentum scale and decay of the published configurations.
SAFETY_LEVELS: dict[SafetyLevel, tuple[int, float, float, float, float]] = {
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SafeLatentDiffusion(_Memoryless):
    """SLD (arXiv 2211.05105; DNG Eq. 21): an elementwise scale, gated by a threshold.

    With classifier-free guidance beneath, gate and scale compare the positive prediction with the
    negative, and ``reference`` says what the push is measured from; ``"unconditional"`` with g the
    scale of classifier-free guidance is the authors' pipeline.

    Parameters
    ----------
    guidance_scale : float
        Factor g of the correction.
    threshold : float
        The gate is open where ``eps - eps_neg`` is below it; in units of the noise.
    gate : {"signed", "absolute"}
        What is compared with the threshold: the signed difference (as in the paper's equation and
        the published code) or its absolute value (as in the paper's text).
    slope : float
        s_s; the elementwise scale is min(1, s_s |eps - eps_neg|).
    momentum_scale, momentum_decay : float
        The paper's s_m and beta_m.
    warmup_steps : int
        Number of first steps in which the momentum builds up but no correction is applied.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    guidance_scale: float = 1.0
    threshold: float = 0.04
    gate: Literal["signed", "absolute"] = "signed"
    slope: float = 100.0
    momentum_scale: float = 0.1
    momentum_decay: float = 0.2
    warmup_steps: int = 0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.finite("threshold", self.threshold)
        checks.choice("gate", self.gate, ("signed", "absolute"))
        checks.non_negative("slope", self.slope)
        checks.finite("momentum_scale", self.momentum_scale)
        checks.real("momentum_decay", self.momentum_decay, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.integer("warmup_steps", self.warmup_steps, 0)
        checks.choice("reference", self.reference, REFERENCES)

    @classmethod
    def preset(cls, level: SafetyLevel, guidance_scale: float = 7.5) -> SafeLatentDiffusion:
        """One of the four published configurations, measured from the unconditional prediction.

        Parameters
        ----------
        level : {"weak", "medium", "strong", "max"}
            Name of the configuration.
        guidance_scale : float
            Factor of the correction; in the authors' pipeline that of classifier-free guidance.

        Raises
        ------
        ValueError, TypeError
            If there is no such level or the scale is not a finite number.
        """
        checks.choice("level", level, tuple(SAFETY_LEVELS))
        warmup, slope, threshold, momentum_scale, decay = SAFETY_LEVELS[level]
        return cls(
            guidance_scale,
            threshold,
            "signed",
            slope,
            momentum_scale,
            decay,
            warmup,
            "unconditional",
        )

    def init(self, n: int, dimensions: int) -> Array:
        """Zero momentum, shape (n, dimensions), in units of the noise."""
        return np.zeros((n, dimensions))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`; the scale is the mean over dimensions of the elementwise one."""
        assert memory is not None
        difference = predictions.difference[0] * predictions.to_noise
        compared = difference
        if predictions.unconditional is not None:
            assert predictions.positive is not None
            compared = (predictions.negative[0] - predictions.positive) * predictions.to_noise
        magnitude = np.abs(compared)
        gated = magnitude if self.gate == "absolute" else -compared
        scale = np.where(gated < self.threshold, np.minimum(1.0, self.slope * magnitude), 0.0)
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

    In an exact mixture the direction of u is taken from the positive prediction minus that of all
    other components, whose difference does not vanish where u rounds to zero.  If the positive is
    everything that is not forbidden, d is exactly opposite to u (base = p negative +
    (1 - p) positive), so nothing of d is left, at any g.

    It leads to the positive prediction itself, so it takes no classifier-free guidance beneath.
    What the negative is measured from does not matter: negative - positive has the same part
    orthogonal to u.

    Parameters
    ----------
    guidance_scale : float
        g of the negative prediction, finite.
    positive_scale : float
        Scale of the positive prediction, finite.

    Raises
    ------
    ValueError, TypeError
        If a scale is not a finite number.
    """

    guidance_scale: float = 1.0
    positive_scale: float = 0.0
    ROUNDING_SQ: ClassVar[float] = ROUNDING_SQ
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.finite("positive_scale", self.positive_scale)

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

    r = tau |eps_neg - eps|^2, so the scale fades as the two predictions move apart.  It has no
    memory.  :meth:`published` is the paper's rule for text to image.

    Parameters
    ----------
    guidance_scale : float
        g, finite.
    temperature : float
        tau >= 0, for differences in units of the noise.
    positive_factor : bool
        Multiply classifier-free guidance beneath the rule by ``2 / (1 + e^-q)`` with
        q = tau |eps_pos - eps_null|^2, which grows from 1 to 2 as these move apart.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter is not a number of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    positive_factor: bool = False
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.non_negative("temperature", self.temperature)
        checks.boolean("positive_factor", self.positive_factor)
        checks.choice("reference", self.reference, REFERENCES)

    @classmethod
    def published(cls, guidance_scale: float = 7.5, temperature: float = 0.2) -> ContrastiveCFG:
        """The paper's rule: both factors, measured from the unconditional prediction.

        Parameters
        ----------
        guidance_scale : float
            w of the negative side; classifier-free guidance beneath has the same in the paper.
        temperature : float
            tau >= 0.

        Raises
        ------
        ValueError, TypeError
            If an argument is not a number of its range.
        """
        return cls(guidance_scale, temperature, True, "unconditional")

    def _decay(self, difference: Array, predictions: Predictions) -> Array:
        norm_sq = np.sum(difference * difference, axis=-1) * predictions.to_noise**2
        return np.exp(-self.temperature * norm_sq)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        base, difference = predictions.base, predictions.difference[0]
        if self.positive_factor:
            assert predictions.positive is not None and predictions.unconditional is not None
            led = predictions.positive - predictions.unconditional
            factor = equations.contrastive_attraction(self._decay(led, predictions))
            base = equations.toward(
                predictions.unconditional, led, predictions.cfg_scale * factor[:, None]
            )
        scale = equations.contrastive_scale(
            self.guidance_scale, self._decay(difference, predictions)
        )
        return equations.away(base, difference, scale[:, None]), scale[None], None


@dataclass(frozen=True)
class DynamicNegativeGuidance(_Memoryless):
    """DNG Eq. 10: ``base - lambda (negative - base)`` with lambda = g p / (1 - p), per sample.

    Several concepts: ``base - g sum_k p_k (negative_k - base) / (1 - sum_j p_j)`` (derived;
    docs/theory.md, section 5.2).

    Parameters
    ----------
    guidance_scale : float
        g; at g = 1 with the exact posterior the samples follow p(x | not c) exactly.
    posterior : ExactPosterior, PaperTracker, LogOddsTracker or PathTracker
        How p is obtained: exactly from the mixture, or tracked along the chain.
    reference : {"positive", "unconditional"}
        What the negative is measured from, and its posterior relative to, where there is
        classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number, or ``posterior`` or the reference is none of these.
    """

    guidance_scale: float = 1.0
    posterior: ExactPosterior | PaperTracker | LogOddsTracker | PathTracker = field(
        default_factory=ExactPosterior
    )
    reference: Reference = "positive"
    several_concepts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)
        if not isinstance(
            self.posterior, ExactPosterior | PaperTracker | LogOddsTracker | PathTracker
        ):
            raise TypeError(
                "posterior must be an ExactPosterior, PaperTracker, LogOddsTracker or PathTracker, "
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
        tracker: TrackerName = "paper",
        variance: TrackerVariance = "matched",
        probes: int = 1,
        reference: Reference = "positive",
    ) -> DynamicNegativeGuidance:
        """DNG with a tracked posterior, from all its hyperparameters (DNG Eqs. 10 and 12).

        Parameters
        ----------
        guidance_scale : float
            The g of lambda = g p / (1 - p).
        prior : float
            p(c) at the noisy end, in (0, 1).
        temperature : float or TimeProfile
            Factor of the log likelihood ratio, >= 0; below 1 for networks.
        offset : float
            The paper's offset, added as offset / (2 v) at each step.
        offset_nats : float
            Offset in nats over the whole run, spread equally over its steps.
        p_min, p_max : float
            Clamp of the posterior; p_max also caps the scale at g p_max / (1 - p_max).
        tracker : {"paper", "log-odds", "path"}
            :class:`PaperTracker`, :class:`LogOddsTracker` or :class:`PathTracker`.
        variance : {"matched", "small", "large", "published"}
            Variance that the first two divide by.
        probes : int
            Random directions of the path tracker, >= 0.
        reference : {"positive", "unconditional"}
            What the negative is measured from where there is classifier-free guidance beneath.

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid; the message names it, its value and what is allowed.
        """
        if isinstance(prior, Sequence) or isinstance(guidance_scale, Sequence):
            raise TypeError(
                "guidance_scale and prior must be numbers, got "
                f"{guidance_scale!r} and {prior!r}; for unwanted concepts with priors or scales of "
                "their own give apply_guidance a rule for each, a list"
            )
        checks.choice("tracker", tracker, TRACKERS)
        checks.real("prior", prior, "in (0, 1)", 0.0, 1.0, closed="()")
        if tracker == "path":
            if checks.finite("offset", offset) != 0.0:
                raise ValueError(
                    "offset must be 0 for tracker='path', which divides by no variance; "
                    f"use offset_nats; got {offset!r}"
                )
            if checks.choice("variance", variance, TRACKER_VARIANCES) != "matched":
                raise ValueError(
                    "variance must be 'matched' for tracker='path', which divides by none, "
                    f"got {variance!r}"
                )
            return cls(
                guidance_scale,
                PathTracker(
                    prior=prior,
                    temperature=temperature,
                    offset_nats=offset_nats,
                    p_min=p_min,
                    p_max=p_max,
                    probes=probes,
                ),
                reference,
            )
        if checks.integer("probes", probes, 0) != 1:
            raise ValueError(f"probes must be 1, its default, for {tracker=}, got {probes!r}")
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
            reference,
        )

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        if isinstance(self.posterior, ExactPosterior):
            return self._guide_exactly(predictions)
        assert predictions.odds is not None
        odds = predictions.odds
        posterior = odds / (1.0 + odds)
        total = posterior.sum(axis=0)
        # Several concepts are tracked independently, so their sum is capped at p_max as well.
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
class FeedbackGuidance(_Memoryless):
    """FBG (arXiv 2506.06085): ``base + lambda (positive - base)``, lambda = e^L/(e^L - (1 - pi)).

    lambda = 1 is the plain positive prediction.  L is tracked like the paper's posterior, starting
    from 0, and clamped so that lambda stays in (1, lambda_max].  With ``cfg_scale`` above 1 it is
    one of the paper's hybrids: lambda + cfg_scale - 1, at every step (FBG_CFG) or where the noise
    is between ``sigma_lo`` and ``sigma_hi`` (FBG_LIG).

    Parameters
    ----------
    pi : float
        Assumed share of the true conditional in the learned one, in (0, 1).
    lambda_max : float
        Largest scale, above 1; sets the floor of L.
    t0, t1 : float
        Where guidance should set in and where it should peak, as shares in (0, 1) of the number of
        steps, counted from the clean end; they determine ``step_offset`` and ``temperature`` where
        these are not given.
    temperature, step_offset : float, optional
        The paper's tau and delta.
    lambda_ref : float
        Scale that the offset alone would reach at t0.
    log_ratio_max : float
        Ceiling of L, above 0 and not below the floor, log((1 - pi) m/(m - 1)) with
        m = lambda_max - cfg_scale + 1.
    cfg_scale : float
        c of the hybrids, >= 1 and below ``lambda_max``; 1 is FBG itself.
    sigma_lo, sigma_hi : float
        Noise levels sigma/alpha, both included, between which c - 1 is added; None is no limit.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    pi: float = 0.95
    lambda_max: float = 10.0
    t0: float = 0.5
    t1: float = 0.4
    temperature: float | None = None
    step_offset: float | None = None
    lambda_ref: float = 3.0
    log_ratio_max: float = 3.0
    cfg_scale: float = 1.0
    sigma_lo: float = 0.0
    sigma_hi: float | None = None
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("pi", "t0", "t1"):
            checks.real(name, getattr(self, name), "in (0, 1)", 0.0, 1.0, closed="()")
        for name in ("lambda_max", "lambda_ref"):
            checks.real(name, getattr(self, name), "finite and > 1", 1.0, np.inf, closed="()")
        if self.temperature is not None:
            checks.non_negative("temperature", self.temperature)
        if self.step_offset is not None:
            checks.finite("step_offset", self.step_offset)
        checks.real("log_ratio_max", self.log_ratio_max, "finite and > 0", 0.0, np.inf, closed="()")
        checks.real(
            "cfg_scale", self.cfg_scale, "in [1, lambda_max)", 1.0, self.lambda_max, closed="[)"
        )
        if self.sigma_hi is not None:
            checks.non_negative("sigma_hi", self.sigma_hi)
        checks.real("sigma_lo", self.sigma_lo, "in [0, sigma_hi]", 0.0, self._most, closed="[]")
        if self._floor > self.log_ratio_max:
            raise ValueError(
                f"log_ratio_max must not be below the floor of L that pi = {self.pi!r} and "
                f"lambda_max = {self.lambda_max!r} give, {self._floor:g}; got "
                f"{self.log_ratio_max!r}"
            )

    @property
    def _most(self) -> float:
        return np.inf if self.sigma_hi is None else self.sigma_hi

    @property
    def _floor(self) -> float:
        """L at which the scale, with what the hybrids add, is lambda_max."""
        # log1p keeps the floor from rounding to 0 for a tiny pi and a large lambda_max.
        largest = self.lambda_max - (self.cfg_scale - 1.0)
        return float(np.log1p(-self.pi) - np.log1p(-1.0 / largest))

    @classmethod
    def published(cls, hybrid: bool = False) -> FeedbackGuidance:
        """The paper's settings, for 64 steps of its own grid.

        Parameters
        ----------
        hybrid : bool
            The hybrid with classifier-free guidance in an interval of noise (FBG_LIG), or FBG.

        Raises
        ------
        TypeError
            If ``hybrid`` is not True or False.
        """
        if checks.boolean("hybrid", hybrid):
            return cls(0.999, 10.0, 0.556, 0.492, cfg_scale=2.6, sigma_lo=0.48, sigma_hi=6.84)
        return cls(0.999, 10.0, 0.556, 0.429)

    def added(self, noise_ratio: float) -> float:
        """What the hybrids add to lambda where sigma/alpha is ``noise_ratio``; 0 for FBG itself."""
        return self.cfg_scale - 1.0 if self.sigma_lo <= noise_ratio <= self._most else 0.0

    def tracker(self, coefficients: StepCoefficients) -> RatioTracker:
        """The tracker of L for the steps of a run, with the paper's offset and temperature.

        Parameters
        ----------
        coefficients : StepCoefficients
            Steps of the run, from ``schedule.coefficients(sampler)``.

        Returns
        -------
        RatioTracker

        Raises
        ------
        TypeError
            If ``coefficients`` are not StepCoefficients.
        """
        refuse_no_coefficients(coefficients)
        pi, steps = self.pi, len(coefficients)
        offset = self.step_offset
        if offset is None:
            reference = (1.0 - pi) * self.lambda_ref / (self.lambda_ref - 1.0)
            offset = float(np.log(reference)) / ((1.0 - self.t0) * steps)
        temperature = self.temperature
        if temperature is None:
            small = coefficients.tracker_variance("small")[::-1]  # from the step onto the data on
            at_t1 = np.interp(self.t1 * steps, np.arange(steps), small)
            temperature = abs(2.0 * float(at_t1) * offset / 10.0)
        return RatioTracker(temperature, offset, self._floor, self.log_ratio_max)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None and predictions.odds is not None
        scale = equations.feedback_scale(predictions.odds[0], self.pi)
        scale = scale + self.added(predictions.noise_ratio)
        guided = equations.toward(
            predictions.base, predictions.positive - predictions.base, scale[:, None]
        )
        return guided, scale[None], None


@dataclass(frozen=True)
class GeoGuide(_Memoryless):
    """GeoGuide (arXiv 2407.12889): every step's mean moves by ``g sqrt(D)/N`` away from c.

    lambda = g sqrt(D) / (N |d|), where d is the difference of the step's means for the negative
    and for what it is measured from (docs/theory.md, section 5.10).  There is no push where d is
    zero to rounding.  It has no memory and reads no posterior, so it pushes as far where nothing
    of the concept is.

    Parameters
    ----------
    guidance_scale : float
        The paper's kappa, finite; below 0 it leads to the concept.
    reference : {"positive", "unconditional"}
        What the negative is measured from where there is classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If the scale is not a finite number or the reference none of these.
    """

    guidance_scale: float = 1.0
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.choice("reference", self.reference, REFERENCES)

    def length(self, numbers: StepNumbers, dimensions: int) -> float:
        """How far the step moves a prediction of x0; 0 where the step does not depend on it."""
        if numbers.x0_factor == 0.0:
            return 0.0
        total = self.guidance_scale * np.sqrt(dimensions)
        return float(total / (numbers.steps * abs(numbers.x0_factor)))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.numbers is not None
        base, direction = predictions.base, predictions.difference[0]
        share: Array | float = 1.0
        if predictions.rest is not None and predictions.log_ratio is not None:
            # The same direction, accurate where negative and base agree to rounding: base =
            # p negative + (1 - p) rest.
            direction = predictions.negative[0] - predictions.rest
            share = np.maximum(np.exp(-np.logaddexp(0.0, predictions.log_ratio[0])), 1e-300)
        norm_sq = np.sum(direction * direction, axis=-1)
        known = (norm_sq > ROUNDING_SQ * np.sum(base * base, axis=-1)) & (predictions.from_x0 != 0)
        distance = np.where(known, np.sqrt(norm_sq), 1.0)
        length = self.length(predictions.numbers, base.shape[-1]) * abs(predictions.from_x0)
        scale = np.where(known, equations.geometric_scale(length, distance), 0.0)
        return equations.away(base, direction, scale[:, None]), (scale / share)[None], None


@dataclass(frozen=True)
class CRG(_Memoryless):
    """CRG (arXiv 2606.29801): the least push that brings tracked evidence back to a threshold.

    With c the base, u the unconditional and n the negative prediction, in units of the noise,
    b = |c - u|^2 - |c - n|^2 is the evidence for the concept of a step.  CP is gain/2 times that
    of this step plus the sum of ``beta_ts/(2 alpha_ts^2 sigma_t^2) b`` over the earlier ones, and
    ``c - g (CP - threshold)/(gain |n - u|^2) (n - u)`` where CP exceeds the threshold
    (docs/theory.md, section 5.11).  At g = 1 the corrected c has CP equal to the threshold.

    It needs classifier-free guidance beneath; with that at scale 1, c is the positive prediction.
    The memory is the sum, shape (N, 1), in nats.

    Parameters
    ----------
    guidance_scale : float
        The paper's lambda_0, finite.
    gain : float
        K > 0, the weight of the present step.
    threshold : float
        CP above which there is a push.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter is not a number of its range.
    """

    guidance_scale: float = 2.0
    gain: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)
        checks.positive("gain", self.gain)
        checks.finite("threshold", self.threshold)

    @property
    def reference(self) -> Reference:
        """The unconditional prediction, which the rule is made of."""
        return "unconditional"

    def init(self, n: int, dimensions: int) -> Array:
        """No evidence, shape (n, 1)."""
        return np.zeros((n, 1))

    @staticmethod
    def rate(numbers: StepNumbers) -> float:
        """Nats of evidence per unit of b: the paper's kappa/T."""
        noise = numbers.alpha_ts * numbers.alpha_ts * numbers.sigma_t * numbers.sigma_t
        return numbers.beta_ts / (2.0 * noise) if noise > 0 else 0.0

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, Array]:
        """See :class:`Rule`."""
        assert memory is not None and predictions.numbers is not None
        base, difference = predictions.base, predictions.difference[0]
        to_noise_sq = predictions.to_noise**2
        from_null, from_negative = (
            np.sum((base - other) ** 2, axis=-1)
            for other in (predictions.measured_from, predictions.negative[0])
        )
        b = equations.regulating_evidence(from_null, from_negative) * to_noise_sq
        norm_sq = np.sum(difference * difference, axis=-1)
        surplus = 0.5 * self.gain * b + memory[:, 0] - self.threshold
        acts = (surplus > 0) & (norm_sq > ROUNDING_SQ * np.sum(base * base, axis=-1))
        acts &= to_noise_sq > 0
        norm_sq = np.where(acts, norm_sq * to_noise_sq, 1.0)
        scale = equations.regulating_scale(self.guidance_scale, surplus, self.gain, norm_sq)
        scale = np.where(acts, scale, 0.0)
        following = memory + (self.rate(predictions.numbers) * b)[:, None]
        return equations.away(base, difference, scale[:, None]), scale[None], following


@dataclass(frozen=True, eq=False)
class SPELL(_Memoryless):
    """SPELL (arXiv 2410.06025): predictions of x0 are pushed out of balls around given points.

    ``D + g sum_k max(r/|D - z_k| - 1, 0) (D - z_k)`` for the base's x0 D.  With one point and
    g = 1 a D within r of it ends at the distance r (docs/theory.md, section 5.12).  No negative
    prediction is read, and there is no memory.

    Parameters
    ----------
    points : array_like, shape (K, D)
        What the predictions keep away from: images, latents.
    radius : float
        r > 0, in units of x0; the paper's 38.7 is for latents of Stable Diffusion.
    guidance_scale : float
        g, finite.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    points: Array
    radius: float
    guidance_scale: float = 1.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points(self.points))
        checks.positive("radius", self.radius)
        checks.finite("guidance_scale", self.guidance_scale)

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`; the scale is that of all points together."""
        assert predictions.x0 is not None
        shift, total = np.zeros_like(predictions.base), np.zeros(len(predictions.base))
        for point in self.points:
            difference = predictions.x0 - point
            distance = np.sqrt(np.sum(difference * difference, axis=-1))
            share = np.maximum(equations.shield(self.radius, np.maximum(distance, 1e-150)), 0.0)
            share = self.guidance_scale * share
            shift = equations.toward(shift, difference, share[:, None])
            total = total + share
        guided = predictions.base + shift * predictions.from_x0
        rows = len(predictions.negative)
        return guided, np.broadcast_to(total, (rows, len(total))), None


@dataclass(frozen=True, eq=False)
class ImageReferenced(_Memoryless):
    """DNG whose negatives are given as points, images or latents (theory of arXiv 2502.08011).

    Their kernel mixture is the unwanted: its prediction of x0 is the negative one, and the
    posterior is ``prior`` times its density over that of the base (docs/theory.md, section 5.13).
    Points that are components of the mixture, with its bandwidth and their weight as prior, give
    exact DNG.  No negative prediction is read, and there is no memory.

    Parameters
    ----------
    points : array_like, shape (K, D)
        The unwanted.
    prior : float
        Their share of the data, in (0, 1).
    guidance_scale : float
        g, finite.
    bandwidth : float
        Standard deviation of the kernel on each point, >= 0.
    p_max : float
        Cap of the posterior, in (0, 1), which may pass 1 if the points are not in the data.
    reference : {"positive", "unconditional"}
        What the negative is measured from, and its posterior relative to, where there is
        classifier-free guidance beneath.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """

    points: Array
    prior: float
    guidance_scale: float = 1.0
    bandwidth: float = 0.0
    p_max: float = 0.99
    reference: Reference = "positive"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points(self.points))
        checks.real("prior", self.prior, "in (0, 1)", 0.0, 1.0, closed="()")
        checks.finite("guidance_scale", self.guidance_scale)
        checks.non_negative("bandwidth", self.bandwidth)
        checks.real("p_max", self.p_max, "in (0, 1)", 0.0, 1.0, closed="()")
        checks.choice("reference", self.reference, REFERENCES)

    def kernel_mixture(self, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        """Prediction of x0 (N, D) and log density (N,) of the points' diffused mixture at x."""
        variance = (alpha * self.bandwidth) ** 2 + sigma * sigma
        squares = np.array([np.sum((x - alpha * z) ** 2, axis=-1) for z in self.points])
        log_terms = -0.5 * (squares / variance + x.shape[-1] * np.log(2.0 * np.pi * variance))
        log_terms -= np.log(len(self.points))
        log_density = np.logaddexp.reduce(log_terms, axis=0)
        centre = np.exp(log_terms - log_density).T @ self.points
        gain = alpha * self.bandwidth**2 / variance
        return centre + gain * (x - alpha * centre), log_density

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.pointwise is not None
        negative, log_ratio = predictions.pointwise
        p = np.exp(np.minimum(np.log(self.prior) + log_ratio, np.log(self.p_max)))
        scale = equations.dynamic_scale(self.guidance_scale, p, 1.0 - p)
        difference = negative - predictions.measured_from
        guided = equations.away(predictions.base, difference, scale[:, None])
        return guided, np.broadcast_to(scale, (len(predictions.negative), len(scale))), None


def _points(value: object) -> Array:
    """Checked points (K, D), at least one; read-only."""
    points = checks.array("points", value, ("K", "D"))  # type: ignore[arg-type]
    if points.size == 0:
        raise ValueError(f"points must not be empty, got shape {points.shape}")
    return checks.frozen(points)


@dataclass(frozen=True)
class CFGPlusPlus(_Memoryless):
    """CFG++ (arXiv 2406.08070) for DDIM: classifier-free guidance with a scale that reads the step.

    w = g alpha_s sigma_t / (alpha_s sigma_t - alpha_t sigma_s), with which DDIM's step is
    CFG++'s: the guided x0, and the unguided noise again (docs/theory.md, section 5.14).

    Parameters
    ----------
    guidance_scale : float
        The paper's lambda, finite, in [0, 1] there.

    Raises
    ------
    ValueError, TypeError
        If g is not a finite number.
    """

    guidance_scale: float = 0.6
    needs_positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.finite("guidance_scale", self.guidance_scale)

    def scale(self, numbers: StepNumbers) -> float:
        """w of a step."""
        levels = (numbers.alpha_t, numbers.sigma_t, numbers.alpha_s, numbers.sigma_s)
        return float(equations.plus_plus_scale(self.guidance_scale, *levels))

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`."""
        assert predictions.positive is not None and predictions.numbers is not None
        scale = self.scale(predictions.numbers)
        guided = equations.toward(predictions.base, predictions.positive - predictions.base, scale)
        return guided, _constant(predictions, scale), None


# ---------------------------------------------------------------- rules of attention


class _AttentionRule(_Memoryless):
    """Interface of the rules that act on a network's attention to the prompt.

    On exact mixtures they have a form in x0: the posterior mean of x0 of an isotropic mixture is a
    softmax attention over its components (docs/attention.md).
    """

    end: float
    gate: DynamicNegativeGuidance | None
    gate_bound: float

    def __post_init__(self) -> None:
        checks.real("end", self.end, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.real("gate_bound", self.gate_bound, "in [0, 1]", 0.0, 1.0, closed="[]")
        if self.gate is None:
            if self.gate_bound > 0.0:
                raise ValueError(
                    f"gate_bound must be 0 without a gate, whose bound it is, got {self.gate_bound}"
                )
        elif not isinstance(self.gate, DynamicNegativeGuidance):
            raise TypeError(
                "gate must be a DynamicNegativeGuidance, whose posterior opens the rule, or None, "
                f"got {checks.shown(self.gate)}"
            )

    @property
    def reference(self) -> Reference:
        """What the posterior of the gate is relative to; without one nothing is measured."""
        return "positive" if self.gate is None else self.gate.reference

    @property
    def strength(self) -> float:
        """The number that a closed gate makes 0, which records hold as the scale."""
        raise NotImplementedError

    def acts_at(self, time: float) -> bool:
        """Whether the rule acts at a time in [0, 1], 1 at the noisy end."""
        return self.end > 0.0 and time >= 1.0 - self.end

    def opening(self, posterior: Any) -> Any:
        """How far the gate opens: min(1, g p), and 0 where that is below ``gate_bound``.

        Parameters
        ----------
        posterior : ndarray or Tensor, shape (N,)
            p(c | x).

        Returns
        -------
        ndarray or Tensor, shape (N,)
        """
        assert self.gate is not None
        opened = (self.gate.guidance_scale * posterior).clip(min=0.0, max=1.0)
        return opened * (opened >= self.gate_bound)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        """The guided prediction of x0 from that of the positive and of the negative."""
        raise NotImplementedError

    def guide(self, predictions: Predictions, memory: Array | None) -> tuple[Array, Array, None]:
        """See :class:`Rule`; the scale is :attr:`strength` times the opening of the gate."""
        scale = _constant(predictions, self.strength)
        if not self.acts_at(predictions.time):
            return predictions.base, np.zeros_like(scale), None
        # Classifier-free guidance is made of the guided positive prediction.
        positive, share = predictions.base, 1.0
        if predictions.unconditional is not None:
            assert predictions.positive is not None
            positive, share = predictions.positive, predictions.cfg_scale
        own = predictions.as_x0(positive)
        shift = self._guided_x0(own, predictions.as_x0(predictions.negative[0]), predictions) - own
        if self.gate is not None:
            opening = self.opening(self._posterior(predictions))
            shift, scale = opening[:, None] * shift, scale * opening
        return predictions.base + predictions.from_x0 * (share * shift), scale, None

    def _posterior(self, predictions: Predictions) -> Array:
        assert self.gate is not None
        if isinstance(self.gate.posterior, ExactPosterior):
            assert predictions.log_ratio is not None
            return np.exp(-np.logaddexp(0.0, -predictions.log_ratio[0]))
        assert predictions.odds is not None
        return predictions.odds[0] / (1.0 + predictions.odds[0])


@dataclass(frozen=True)
class NormalizedAttention(_AttentionRule):
    """NAG (arXiv 2505.21179): attention pushed away from the negative's, within a norm.

    Per token, of the joined heads Z+ and Z- for the positive and the negative text:
    ``Zt = Z+ + scale (Z+ - Z-)``, shortened to at most ``tau |Z+|`` in the L1 norm, and mixed
    with Z+ by ``alpha`` (docs/attention.md).  :func:`dng_models.apply_guidance` puts it into the
    attention of a pipeline's network.  In :func:`dng_math.sample` Z+ and Z- are the predictions of
    x0; without a limit (``tau=math.inf``) and at ``alpha=1`` it is :class:`NegativePrompting`.

    Parameters
    ----------
    scale : float
        The paper's phi, finite; 0 is the unguided prediction.  The authors' code counts from 1.
    tau : float
        Largest ratio of the L1 norms, >= 1; infinite for none.
    alpha : float
        Share of the pushed features, in [0, 1].
    end : float
        Share of the diffusion time, from the noisy end, in which the rule acts: at times from
        1 - end to 1; 0 is never.
    gate : DynamicNegativeGuidance, optional
        Opens alpha for each sample by its posterior p, to ``alpha min(1, g p)``.  In a pipeline it
        must be tracked, and costs a prediction for the negative prompt at every step.
    gate_bound : float
        Openings min(1, g p) below this are 0.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float = 2.0
    tau: float = 2.5
    alpha: float = 0.5
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        if not (isinstance(self.tau, float) and math.isinf(self.tau) and self.tau > 0):
            checks.real("tau", self.tau, ">= 1, or infinite", 1.0, math.inf, closed="[]")
        checks.real("alpha", self.alpha, "in [0, 1]", 0.0, 1.0, closed="[]")
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The share alpha."""
        return self.alpha

    def features(self, positive: Any, negative: Any) -> Any:
        """The guided features of every token.

        Parameters
        ----------
        positive, negative : ndarray or Tensor, shape (..., D)
            Z+ and Z-; the norm is taken over the last axis.

        Returns
        -------
        ndarray or Tensor, shape (..., D)
        """
        pushed = equations.away(positive, negative - positive, self.scale)
        if self.tau < math.inf:
            length = abs(pushed).sum(-1)[..., None]
            allowed = self.tau * abs(positive).sum(-1)[..., None]
            # Of length 0 there is nothing to shorten.
            pushed = pushed * (allowed / (length + (length == 0))).clip(max=1.0)
        return equations.toward(positive, pushed - positive, self.alpha)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        guided: Array = self.features(positive, negative)
        return guided


@dataclass(frozen=True)
class NegativeAwareSubtraction(_AttentionRule):
    """NASA (SNOOPI, arXiv 2412.02687): the negative's attention is subtracted, ``Z+ - scale Z-``.

    As :class:`NormalizedAttention`, without a limit.  The features shrink with the scale, also
    where both texts say the same.

    Parameters
    ----------
    scale : float
        Finite; 0 is the unguided prediction.
    end, gate, gate_bound
        As for :class:`NormalizedAttention`; the gate opens the scale.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The scale."""
        return self.scale

    def features(self, positive: Any, negative: Any) -> Any:
        """The guided features; arguments and result as for :class:`NormalizedAttention`."""
        return equations.away(positive, negative, self.scale)

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        guided: Array = self.features(positive, negative)
        return guided


@dataclass(frozen=True)
class ValueSignFlip(_AttentionRule):
    """VSF (arXiv 2508.10931): the negative's tokens join the keys, with values times -scale.

    One softmax is over both texts, so the negative takes attention where it is alike, and gives
    it back with the sign reversed: on an exact mixture ``(1 - p) D_rest - scale p D_negative``
    with the exact posterior p.  At ``scale=0`` the negative still takes attention.

    Parameters
    ----------
    scale : float
        Finite; the authors' example for Stable Diffusion 3.5 has 3.5, with an offset of the
        negative's logits that is left out here.
    end, gate, gate_bound
        As for :class:`NormalizedAttention`; the gate mixes guided and unguided features.

    Raises
    ------
    ValueError, TypeError
        If a hyperparameter has the wrong type or is out of range.
    """

    scale: float = 3.5
    end: float = 1.0
    gate: DynamicNegativeGuidance | None = None
    gate_bound: float = 0.0

    def __post_init__(self) -> None:
        checks.finite("scale", self.scale)
        super().__post_init__()

    @property
    def strength(self) -> float:
        """The scale."""
        return self.scale

    def _guided_x0(self, positive: Array, negative: Array, predictions: Predictions) -> Array:
        assert predictions.log_ratio is not None and predictions.rest is not None
        log_ratio = predictions.log_ratio[0][:, None]
        share = np.exp(-np.logaddexp(0.0, -log_ratio))
        rest = np.exp(-np.logaddexp(0.0, log_ratio)) * predictions.as_x0(predictions.rest)
        return equations.away(rest, share * negative, self.scale)


AttentionRule = NormalizedAttention | NegativeAwareSubtraction | ValueSignFlip


@dataclass(frozen=True)
class LimitedInterval:
    """Applies a rule at times in [t_lo, t_hi] and no guidance outside (arXiv 2404.07724).

    Time is 1 at the noisy end and 0 at the data.  A posterior is tracked outside too, and a rule
    that asks is answered there.

    Parameters
    ----------
    rule : Rule
        The rule inside; it may be a LimitedInterval itself.
    t_lo, t_hi : float
        Ends of the interval, both included, with 0 <= t_lo <= t_hi <= 1.

    Raises
    ------
    ValueError, TypeError
        If ``rule`` is not a rule or the ends are out of range.
    """

    rule: Rule
    t_lo: float = 0.0
    t_hi: float = 1.0

    def __post_init__(self) -> None:
        refuse_no_rule("rule", self.rule)
        checks.real("t_hi", self.t_hi, "in [0, 1]", 0.0, 1.0, closed="[]")
        checks.real("t_lo", self.t_lo, "in [0, t_hi]", 0.0, self.t_hi, closed="[]")

    @property
    def needs_positive(self) -> bool:
        """Whether the rule inside reads the positive prediction."""
        return self.rule.needs_positive

    @property
    def several_concepts(self) -> bool:
        """Whether the rule inside takes more than one forbidden concept."""
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
        inner = innermost(self.rule)
        if isinstance(inner, AskedNegative):
            assert memory is not None
            memory = inner.held(predictions, memory)
        return predictions.base, _constant(predictions, 0.0), memory


def innermost(rule: Rule) -> Rule:
    """The rule inside any limited intervals."""
    while isinstance(rule, LimitedInterval):
        rule = rule.rule
    return rule


def reads_the_step(rule: Rule) -> bool:
    """Whether a rule reads the numbers of the step that will be taken."""
    return isinstance(innermost(rule), GeoGuide | CRG | CFGPlusPlus | AskedNegative)


def reads_x0(rule: Rule) -> bool:
    """Whether a rule reads the base as a prediction of x0, whatever is predicted."""
    return isinstance(innermost(rule), SPELL | AttentionRule | AskedNegative)


def posterior_of(
    rule: Rule,
) -> ExactPosterior | PaperTracker | LogOddsTracker | PathTracker | None:
    """How DNG, or DNG as a gate, inside any limited intervals has its posterior; None without."""
    inner = innermost(rule)
    if isinstance(inner, AttentionRule):
        return None if inner.gate is None else inner.gate.posterior
    return inner.posterior if isinstance(inner, DynamicNegativeGuidance) else None


def limited(rule: Rule, t_lo: float, t_hi: float) -> Rule:
    """The rule at times in [t_lo, t_hi]; the rule itself where that is all times."""
    return rule if (t_lo, t_hi) == (0.0, 1.0) else LimitedInterval(rule, t_lo, t_hi)


# The names that configurations, command lines and tables have for the rules.
RULES: dict[str, Callable[..., Rule]] = {
    "none": Unguided,
    "np": NegativePrompting,
    "sld": SafeLatentDiffusion,
    "dng": DynamicNegativeGuidance,
    "ccfg": ContrastiveCFG,
    "cfg": ClassifierFreeGuidance,
    "cg": ClassifierGuidance,
    "fbg": FeedbackGuidance,
    "perp-neg": PerpNeg,
    "signed": SignedNegative,
    "geoguide": GeoGuide,
    "crg": CRG,
    "spell": SPELL,
    "images": ImageReferenced,
    "cfg++": CFGPlusPlus,
}


def rule_named(name: str, guidance_scale: float, **parameters: object) -> Rule:
    """A rule by its name.

    Parameters
    ----------
    name : str
        A key of :data:`RULES`.
    guidance_scale : float
        g; "none" and "fbg" have none and ignore it.
    **parameters
        Further hyperparameters of the rule, by name.

    Raises
    ------
    ValueError, TypeError
        If there is no such rule, or a hyperparameter is invalid.
    """
    checks.choice("name", name, tuple(RULES))
    if name not in ("none", "fbg"):
        parameters["guidance_scale"] = guidance_scale
    return RULES[name](**parameters)


def tracker_of(rule: Rule, coefficients: StepCoefficients) -> Tracker | None:
    """The tracker that a rule carries along a chain, if any.

    A path tracker without probes is the tracker of transitions that it means.
    """
    inner = innermost(rule)
    if isinstance(inner, FeedbackGuidance):
        return inner.tracker(coefficients)
    posterior = posterior_of(rule)
    if isinstance(posterior, PathTracker):
        return posterior if posterior.probes else posterior.first_order
    return None if isinstance(posterior, ExactPosterior) else posterior


def warn_where_noise_is_missing(
    tracker: Tracker | None,
    coefficients: StepCoefficients,
    *,
    stacklevel: int,
) -> None:
    """Warn if a tracker will be wrong: less noise than DDPM adds, and no divergence term.

    Parameters
    ----------
    tracker : PaperTracker, LogOddsTracker, RatioTracker or None
    coefficients : StepCoefficients
        Steps of the run; the last one is ignored, because no state is used after it.
    stacklevel : int
        As for :func:`warnings.warn`; 1 is the caller of this function.
    """
    eta = coefficients.eta[:-1]
    if tracker is None or tracker.divergence or not np.any(eta < 1.0 - 1e-6):
        return
    cure = "use DDPM, or DDIM with eta=1"
    if not isinstance(tracker, RatioTracker):
        cure += (
            f", or {type(tracker).__name__}(..., divergence=True), which adds the missing term, "
            "or a PathTracker, which assumes no noise"
        )
    warnings.warn(
        f"the sampler adds {'no' if eta.min() == 0 else 'too little'} noise (eta = "
        f"{eta.min():g}, and the tracker takes it to be 1): the tracked posterior is wrong however "
        f"many steps are taken; {cure}",
        stacklevel=stacklevel + 1,
    )
