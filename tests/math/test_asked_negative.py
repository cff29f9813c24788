"""VL-DNP on exact mixtures: what is seen in the predictions of x0 is pushed until asked again."""

from __future__ import annotations

import doctest
import math
import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dng_math import (
    DDIM,
    AskedNegative,
    GaussianMixture,
    LimitedInterval,
    NegativePrompting,
    NoiseSchedule,
    Unguided,
    predict,
    sample,
)
from dng_math.rules import ASKED_AT
from tests.helpers import textbook
from tests.helpers.mixtures import moderate
from tests.helpers.tolerances import CHAIN, error

STEPS = 10
SCHEDULE = NoiseSchedule.linear().respace(STEPS)
COEFFICIENTS = SCHEDULE.coefficients()
MODES = GaussianMixture([0.2, 0.3, 0.5], [[-2.0, 0.0], [0.3, 1.0], [2.0, -1.0]], [0.1] * 3)
FORBIDDEN = [0]
RECORD = ("trajectory", "scale")

seeds = st.integers(0, 2**32 - 1)


def judge(x0: np.ndarray, step: int) -> np.ndarray:
    """What the mixture's own classifier says of a finished sample."""
    return MODES.posterior(x0, FORBIDDEN) > 0.5


def always(x0: np.ndarray, step: int) -> np.ndarray:
    return np.ones(len(x0), dtype=bool)


def never(x0: np.ndarray, step: int) -> np.ndarray:
    return np.zeros(len(x0), dtype=bool)


def chain(rule: Any, mixture: GaussianMixture = MODES, n: int = 40, **options: Any) -> Any:
    options = {"forbidden": FORBIDDEN, "engine": "reference", "record": RECORD, **options}
    return sample(mixture, SCHEDULE, rule, n=n, **options)


# ---------------------------------------------------------------------- the textbook


@pytest.mark.parametrize("w", [None, 3.0])
def test_a_chain_is_the_papers_program(w):
    """In noise, step by step: look, choose the negatives, guide, hold, with DDIM's step."""
    at, g, led = (1, 2, 4, 7), 1.5, [0, 1]
    options = {} if w is None else {"cfg_scale": w, "positive": led}
    rule = AskedNegative(judge, g, at=at, of=None)
    found = chain(rule, sampler=DDIM(0.0), **options)
    x, alpha_bar = found.trajectory[0], SCHEDULE.alpha[::-1] ** 2
    positive_of = MODES if w is None else MODES.restrict(led)
    shown, seen = np.zeros(len(x), dtype=bool), []
    for i in range(STEPS):
        level = (float(SCHEDULE.alpha[::-1][i]), float(SCHEDULE.sigma[::-1][i]))
        null, positive, negative = (
            part.noise_prediction(x, *level)
            for part in (MODES, positive_of, MODES.restrict(FORBIDDEN))
        )
        plain = textbook.vl_dnp(null, positive, negative, w or 0.0, g, never(x, i))
        if i in at:
            shown = judge((x - level[1] * plain) / level[0], i)
        guided = textbook.vl_dnp(null, positive, negative, w or 0.0, g, shown)
        x = textbook.ddim_step(alpha_bar[i], alpha_bar[i + 1], x, guided, np.zeros_like(x), 0.0)
        assert error(found.trajectory[i + 1], x) < CHAIN
        assert np.array_equal(found.scale[i, 0], g * shown)
        seen.append(shown)
    held = np.array(seen)
    assert 0 < held.mean() < 0.7 and (held[1:] != held[:-1]).any()  # some begin and some end


@given(seeds, st.floats(-2.0, 15.0), st.sampled_from(["positive", "unconditional"]))
@settings(max_examples=20)
def test_it_reads_the_same_for_every_prediction(seed, g, reference):
    """Noise, x0, v, flow and score; x0 is what is asked about, and the guided x0 the same."""
    mixture, (alpha, sigma) = moderate(4, "full", 4, 2), (0.7, 0.6)
    x = np.random.default_rng(seed).normal(size=(6, 2))
    shown: list[np.ndarray] = []

    def ask(x0: np.ndarray, step: int) -> np.ndarray:
        shown.append(x0)
        return np.arange(6) % 2 == 0

    rule = AskedNegative(ask, g, reference, at=(3,), of=10)
    got = {
        kind: predict(
            mixture, x, alpha, sigma, rule, forbidden=[1], positive=[0, 1], cfg_scale=1.5,
            prediction_type=kind, memory=rule.init(6, 2), step=3, coefficients=COEFFICIENTS,
        )
        for kind in ("sample", "epsilon", "v_prediction", "flow_prediction", "score")
    }  # fmt: skip
    x0 = got["sample"].guided
    eps = (x - alpha * x0) / sigma
    for kind, wanted in (
        ("epsilon", eps),
        ("v_prediction", alpha * eps - sigma * x0),
        ("flow_prediction", eps - x0),
        ("score", -eps / sigma),
    ):
        assert error(got[kind].guided, wanted) < 1e-11
    for looked, each in zip(shown, got.values(), strict=True):
        assert error(looked, got["sample"].base) < 1e-12
        assert np.array_equal(each.guided[1::2], each.base[1::2])
        assert np.array_equal(each.scale[0], [g, 0.0] * 3)
        assert np.array_equal(each.memory[:, 0], [1.0, 0.0] * 3)


# ---------------------------------------------------------------------- what it must reduce to


def test_what_is_never_seen_is_the_unguided_chain_and_always_is_negative_prompting():
    """Bit for bit, with noise."""
    plain = chain(Unguided())
    assert np.array_equal(chain(AskedNegative(never, 5.0)).trajectory, plain.trajectory)
    pushed = chain(NegativePrompting(2.0))
    seen = chain(AskedNegative(always, 2.0, at=(0,)))
    assert np.array_equal(seen.trajectory, pushed.trajectory)
    assert np.array_equal(seen.scale, pushed.scale)
    # Nothing is held before the first question.
    later = chain(AskedNegative(always, 2.0, at=(4,), of=None))
    assert np.array_equal(later.trajectory[:5], plain.trajectory[:5])
    assert np.array_equal(later.scale[:, 0].max(axis=1), [0.0] * 4 + [2.0] * 6)


def test_the_steps_that_ask_are_those_of_a_run_of_any_length():
    assert AskedNegative(never).asked_at(50) == set(ASKED_AT)
    assert AskedNegative(never).asked_at(1000) == {20 * step for step in ASKED_AT}
    assert AskedNegative(never).asked_at(10) == {1, 2, 3, 4, 5, 6, 8}
    assert AskedNegative(never, at=(7, 3, 3), of=None).at == (3, 7)
    asked: list[int] = []

    def ask(x0: np.ndarray, step: int) -> np.ndarray:
        asked.append(step)
        return never(x0, step)

    chain(AskedNegative(ask))
    assert asked == [1, 2, 3, 4, 5, 6, 8]


def test_inside_an_interval_it_is_asked_at_all_times_and_pushes_there_only():
    asked: list[int] = []

    def ask(x0: np.ndarray, step: int) -> np.ndarray:
        asked.append(step)
        return always(x0, step)

    rule = LimitedInterval(AskedNegative(ask, 2.0, at=(2,), of=None), 0.0, 0.5)
    found = chain(LimitedInterval(rule, 0.2, 1.0))
    time = SCHEDULE.time[:0:-1]
    inside = (0.2 <= time) & (time <= 0.5)
    assert asked == [2] and not inside[2] and 0 < inside.sum() < STEPS
    assert np.array_equal(found.scale[:, 0].min(axis=1), 2.0 * inside)


def test_the_example_in_the_docstring():
    _, example = AskedNegative.__doc__.split("Examples")
    found = doctest.DocTestParser().get_doctest(
        textwrap.dedent(example), {"AskedNegative": AskedNegative}, "example", None, None
    )
    assert doctest.DocTestRunner().run(found).failed == 0 and len(found.examples) == 6


# ---------------------------------------------------------------------- mean and judge


def test_the_judge_of_the_mean_is_the_posterior_in_the_end_and_not_before():
    """The posterior is the mean of the judge's answers (docs/theory.md, section 5.15)."""
    rng = np.random.default_rng(0)
    x0, alpha = MODES.sample(400, rng), 0.999
    for level, most in ((alpha, 0.01), (0.1, 1.0)):
        sigma = math.sqrt(1 - level**2)
        x = level * x0 + sigma * rng.standard_normal(x0.shape)
        mean = MODES.posterior_mean(x, level, sigma)
        exact = MODES.diffuse(level, sigma).posterior(x, FORBIDDEN)
        wrong = np.abs(judge(mean, 0) - exact).mean()
        assert wrong < most
    # At much noise the mean is near the middle mode, so that an outer one is not seen at all.
    assert not judge(mean, 0).any() and exact.min() > 0.05 and wrong > 0.15


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (None, TypeError, "ask must return an array of bool.*got None"),
        ([0.2] * 40, TypeError, "ask must return an array of bool"),
        ([[True], [True, False]], TypeError, "ask must return an array of bool"),
        (
            np.ones(3, dtype=bool),
            ValueError,
            r"one answer for each of 40 .*shape \(3,\)",
        ),
        (True, ValueError, r"one answer for each of 40 .*shape \(\)"),
        (np.ones((40, 1), dtype=bool), ValueError, r"got shape \(40, 1\)"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(answer, kind, message):
    with pytest.raises(kind, match=message):
        chain(AskedNegative(lambda x0, step: answer, at=(0,)))


def test_places_where_it_cannot_be():
    rule = AskedNegative(never)
    with pytest.raises(TypeError, match="engine='fused' computes, got AskedNeg.*'reference' runs"):
        chain(rule, engine="fused")
    with pytest.raises(ValueError, match="forbidden must be one concept for AskedNegative"):
        chain(rule, forbidden=[[0], [1]])
    at = (MODES, np.zeros((2, 2)), 0.8, 0.6, rule)
    with pytest.raises(ValueError, match="coefficients must be given for AskedNegative"):
        predict(*at, forbidden=[0], memory=rule.init(2, 2))
    with pytest.raises(ValueError, match="memory must be given for AskedNegative"):
        predict(*at, forbidden=[0], step=1, coefficients=COEFFICIENTS)
