"""Negatives given as points: the kernel mixture is a mixture, and SPELL is the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dng_kernels import standard_normal
from dng_math import (
    SPELL,
    DynamicNegativeGuidance,
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    Unguided,
)
from dng_models.pairs.points import PointsDenoiser, points_prediction, shielded
from dng_models.pairs.sampling import sample
from tests.helpers import textbook
from tests.helpers.tolerances import STEP, error

LINEAR = NoiseSchedule.linear()
RNG = np.random.default_rng(2)
POINTS = RNG.normal(size=(4, 2, 3))
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bandwidth", [0.0, 0.3])
def test_the_points_predict_what_their_mixture_does(kind, bandwidth):
    variance = np.full(6, max(bandwidth, 1e-9) ** 2)
    mixture = GaussianMixture(
        np.full(4, 0.25), POINTS.reshape(4, 6), np.broadcast_to(variance, (4, 6))
    )
    x = RNG.normal(size=(5, 6))
    for alpha, sigma in ((0.02, 0.98), (0.6, 0.4), (0.96, 0.04)):  # flow's, which fit all kinds
        at = textbook.Interval(alpha, sigma, 1.0, 0.0)
        eps = mixture.noise_prediction(x, alpha, sigma)
        got = points_prediction(
            torch.from_numpy(POINTS),
            torch.from_numpy(x).reshape(5, 2, 3),
            alpha,
            sigma,
            bandwidth,
            kind,
        )
        expected = textbook.prediction_of(at, x, eps, kind)
        assert error(got.reshape(5, 6), expected) < 1e-6, (alpha, sigma)


def test_far_from_all_points_and_at_little_noise_the_nearest_one_is_left():
    """Where float32 would lose the difference of two numbers of 1e8."""
    points = torch.tensor([[100.0] * 64, [100.001] * 64])
    x = points[1:] + 0.001 * standard_normal(1, (1, 64))
    got = points_prediction(points, x, 1.0, 1e-3, 0.0, "sample")
    assert error(got, points[1:]) < 1e-5
    assert got.dtype == torch.float32


def test_dng_away_from_points_of_the_data_avoids_them():
    """One network: everything; the unwanted one is made of points of the data themselves."""
    means = 3.0 * RNG.normal(size=(4, 2))
    everything = PointsDenoiser(means, LINEAR, 0.1)
    unwanted = PointsDenoiser(means[:1], LINEAR, 0.1)
    rule = DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.25, p_max=0.999))
    drawn = sample(everything, unwanted, rule, shape=(2,), num_images=64, steps=250)
    plain = sample(everything, None, Unguided(), shape=(2,), num_images=64, steps=250)

    def share(images):
        nearest = torch.cdist(images.double(), torch.from_numpy(means)).argmin(1)
        return float((nearest == 0).double().mean())

    # Of 64 draws with probability 1/4 at least 1: (3/4)^64 = 1e-8 is how often none is.
    assert share(plain.images) > 0.0 and share(drawn.images) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_spell_is_the_textbook(kind):
    x, eps = RNG.normal(size=(2, 3, 2, 3))
    alpha, sigma = 0.8, 0.6
    at = textbook.Interval(alpha, sigma, 1.0, 0.0)
    prediction = textbook.prediction_of(at, x, eps, kind)
    x0 = textbook.predicted_x0(at, x, eps, None)
    rule = SPELL(POINTS.reshape(4, 6), 4.0, 0.7)
    flat = x0.reshape(3, 6)
    moved = textbook.spell(flat, rule.points, 4.0, 0.7).reshape(x.shape)
    noise = (x - alpha * moved) / sigma
    expected = textbook.prediction_of(at, x, noise, kind)
    on_x, on = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v_prediction": (alpha, -sigma),
        "sample": (0.0, 1.0),
        "flow_prediction": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    }[kind]
    got, scale = shielded(rule, *(torch.from_numpy(np.array(v)) for v in (x, prediction)), on_x, on)
    assert error(got, expected) < STEP
    assert bool((scale > 0).any())


def test_outside_of_all_balls_a_prediction_keeps_its_bits():
    x, prediction = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    rule = SPELL(np.full((1, 3), 50.0), 1.0)
    got, scale = shielded(rule, x, prediction, 1.1, -0.3)
    assert torch.equal(got, prediction) and not bool(scale.any())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"points": np.zeros((0, 2))}, "points must be floating-point numbers of shape"),
        ({"points": np.zeros(3)}, "points must be floating-point numbers of shape"),
        ({"points": [[np.nan]]}, "points must be finite"),
        ({"points": [[0.0]], "bandwidth": -1.0}, "bandwidth must be"),
        ({"points": [[0.0]], "prediction_type": "x"}, "prediction_type must be"),
        ({"points": [[0.0]], "schedule": 3}, "schedule must be a NoiseSchedule"),
    ],
)
def test_bad_points_are_refused_by_name(given, words):
    with pytest.raises((ValueError, TypeError), match=words):
        PointsDenoiser(**given)


def test_points_of_another_shape_are_refused():
    denoiser = PointsDenoiser([[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"points must have the shape of the latents, \(K, \*\(3,"):
        denoiser(torch.zeros(1, 3), torch.tensor([10]))
