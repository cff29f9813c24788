"""A rule inside an interval of time, and the rule inside the intervals."""

from __future__ import annotations

from dataclasses import dataclass

from dng_math import checks
from dng_math.rules.asked import AskedNegative
from dng_math.rules.protocol import Array, Predictions, Rule, _constant, refuse_no_rule


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


def limited(rule: Rule, t_lo: float, t_hi: float) -> Rule:
    """The rule at times in [t_lo, t_hi]; the rule itself where that is all times."""
    return rule if (t_lo, t_hi) == (0.0, 1.0) else LimitedInterval(rule, t_lo, t_hi)
