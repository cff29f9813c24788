"""Perp-Neg on exact mixtures, where the positive prediction and the base agree to rounding."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from dng_math import GaussianMixture, NoiseSchedule, PerpNeg, predict, sample
from tests.helpers import textbook_mixtures
from tests.helpers.mixtures import moderate, points
from tests.helpers.tolerances import error

FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)


def exact_perp_neg(mixture, x, alpha, sigma, g, positive_scale, forbidden, positive):
    """Eq. 5 at one point in fifty digits, of predictions of x0: no difference is lost."""

    def mean(part):
        own = (mixture.weights[part], mixture.means[part], mixture.covariances[part])
        return textbook_mixtures.exact_posterior_mean(x, *own, alpha, sigma, digits=400)

    with mpmath.workdps(420):
        base, negative, toward = (
            mean(part) for part in (list(range(mixture.n_components)), forbidden, positive)
        )
        u = [a - b for a, b in zip(toward, base, strict=True)]
        d = [a - b for a, b in zip(negative, base, strict=True)]
        along = mpmath.fsum(a * b for a, b in zip(d, u, strict=True)) / mpmath.fsum(
            a * a for a in u
        )
        guided = [
            b + positive_scale * v - g * (w - along * v) for b, v, w in zip(base, u, d, strict=True)
        ]
        return [float(v) for v in guided], float(mpmath.sqrt(mpmath.fsum(v * v for v in u)))


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_the_direction_keeps_its_digits(kind):
    """Down to |u| below 1e-50, where the difference of two doubles is nothing but rounding."""
    lengths = []
    for d, seed in ((2, 1), (3, 2)):
        wide = moderate(seed, kind, 5, d)
        mixture = GaussianMixture(
            wide.weights,
            wide.means,
            wide.covariances / 40.0,
            covariance_type={"spherical": kind, "diagonal": "diag", "full": kind}[kind],
        )
        for sigma in (0.9, 0.4, 0.05):
            alpha = float(np.sqrt(1.0 - sigma**2))
            x = alpha * mixture.means + 0.5 * sigma * points(mixture, seed, 5)
            got = predict(
                mixture, x, alpha, sigma, PerpNeg(0.8, 0.6), forbidden=[1, 3], positive=[0, 1],
                prediction_type="sample",
            )  # fmt: skip
            for row, guided in zip(x, got.guided, strict=True):
                expected, length = exact_perp_neg(
                    mixture, row, alpha, sigma, 0.8, 0.6, [1, 3], [0, 1]
                )
                lengths.append(length)
                assert error(guided, expected) < 1e-11
    assert min(lengths) < 1e-50 and max(lengths) > 0.1


@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
def test_nothing_is_orthogonal_to_the_rest(kind):
    """base = p negative + (1 - p) rest: the negative lies on the line that is led along."""
    for d in (1, 2, 4):
        mixture = moderate(d, kind, 5, d)
        for alpha, sigma in ((0.0, 1.0), (0.3, 0.95), (0.8, 0.6), (1.0, 1e-3)):
            x = alpha * 2.0 * points(mixture, d, 200)
            got = predict(
                mixture, x, alpha, sigma, PerpNeg(2.0), forbidden=[1, 3], prediction_type="sample"
            )
            assert error(got.guided, got.base) < 1e-12


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_rounding_decides_nothing(engine):
    """The case that was found: a push of up to 1.25 in a quarter of the samples."""
    options = {"n": 2000, "engine": engine, "forbidden": [1], "seed": 3}
    schedule = NoiseSchedule.linear().respace(50)
    guided = sample(FOUR_MODES, schedule, PerpNeg(1.0), **options)
    assert error(guided.x, sample(FOUR_MODES, schedule, **options).x) < 1e-12


def test_a_positive_that_is_everything_leads_nowhere():
    """Then the negative is pushed from as by negative prompting; nothing else is known."""
    mixture = moderate(1, "full", 4, 2)
    x = points(mixture, 0, 20)
    got = predict(
        mixture, x, 0.8, 0.6, PerpNeg(0.7, 0.5), forbidden=[1], positive=[0, 1, 2, 3],
        prediction_type="sample",
    )  # fmt: skip
    assert error(got.guided, got.base - 0.7 * (got.negative[0] - got.base)) < 1e-13


def test_components_without_weight_are_no_opposite():
    """They would be a direction of nothing."""
    mixture = moderate(1, "diagonal", 4, 2)
    more = GaussianMixture(
        [*mixture.weights, 0.0],
        [*mixture.means, [50.0, 50.0]],
        [*mixture.covariances, [1.0, 1.0]],
    )
    options = {"forbidden": [1], "positive": [0, 1, 2, 3], "n": 20}
    schedule = NoiseSchedule.linear().respace(10)
    for engine in ("fused", "reference"):
        plain, extended = (
            sample(m, schedule, PerpNeg(0.7), engine=engine, **options) for m in (mixture, more)
        )
        assert error(extended.x, plain.x) < 1e-12
