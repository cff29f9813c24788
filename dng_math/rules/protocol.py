"""What a guidance rule reads and returns, and what the rules share.

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

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dng_math import checks
from dng_math.schedules import StepCoefficients

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
