"""VL-DNP: negative prompting of what a judge sees, and the steps at which it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dng_math import checks, equations
from dng_math.rules.protocol import REFERENCES, Array, Predictions, Reference, _Memoryless

# Steps at which VL-DNP asks, of a run of 50.
ASKED_AT, ASKED_OF = (5, 6, 7, 9, 12, 16, 21, 27, 34, 42), 50


def checked_steps(at: object, of: int | None) -> tuple[int, ...]:
    """The steps at which a rule asks, of a run of ``of`` steps: sorted, each once."""
    if isinstance(at, str | bytes) or not isinstance(at, Sequence) or not at:
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
