"""Negatives given by training images: SPELL's balls, and kernels in place of a network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dng_math import SPELL
from dng_models.class_removal import compare, sweeps
from dng_models.class_removal.config import Config
from dng_models.class_removal.generation import generate
from dng_models.class_removal.kernel_width import likeliest_bandwidth
from dng_models.class_removal.methods import settings
from dng_models.pairs.points import PointsDenoiser
from dng_models.pairs.sampling import sample

FEW = Config(rule="none", guidance_scale=0.0, steps=4, num_images=6, batch_size=6)
# Untrained networks predict values of hundreds.
SPELL_CONFIG = replace(FEW, rule="spell", radius=1e5, guidance_scale=1.6)
IMAGES = replace(FEW, rule="dng", guidance_scale=1.0, negative="images")


def test_the_width_is_the_likeliest_of_a_grid():
    z = np.random.default_rng(0).normal(size=(20, 3))
    found = likeliest_bandwidth(torch.from_numpy(z))

    def log_likelihood(h):
        total = 0.0
        for k in range(20):
            squares = np.sum((np.delete(z, k, axis=0) - z[k]) ** 2, axis=1)
            total += np.log(np.mean(np.exp(-0.5 * squares / h**2) / h**3))
        return total

    grid = np.exp(np.linspace(-1.0, 1.5, 251))
    best = grid[np.argmax([log_likelihood(h) for h in grid])]
    assert found == pytest.approx(best, rel=0.006)
    twice = torch.from_numpy(np.concatenate([z, z[:5]])).reshape(25, 1, 3)
    assert likeliest_bandwidth(twice) == pytest.approx(found)
    with pytest.raises(ValueError, match="bandwidth must be given where there are fewer than two"):
        likeliest_bandwidth(torch.zeros(3, 4))


@pytest.mark.parametrize("config", [SPELL_CONFIG, IMAGES, replace(IMAGES, rule="np")])
def test_a_setting_is_drawn_as_by_hand(materials, config):
    config = materials.resolved(config)
    train = materials.dataset(config).train
    zeros = train.images[train.labels == 0]
    assert len(zeros) > 100
    models, rule = materials.models(config), materials.rule(config)
    assert set(models.sources) == {"base", "images-0"}
    unwanted = None
    if config.rule == "spell":
        assert isinstance(rule, SPELL) and rule.points.shape == (len(zeros), 64)
        assert models.unwanted == ()
        np.testing.assert_array_equal(rule.points, zeros.flatten(1).double())
    else:
        unwanted = PointsDenoiser(zeros, models.schedule, likeliest_bandwidth(zeros))
    by_hand = sample(
        models.base, unwanted, rule, shape=(1, 8, 8), num_images=6, schedule=models.schedule,
        steps=4, batch_size=6,
    ).images  # fmt: skip
    drawn = generate(config, materials)
    assert torch.equal(drawn.images, by_hand)
    assert float(drawn.mean_scale.abs().min()) > 0.0
    unguided = generate(materials.resolved(FEW), materials).images
    assert not torch.equal(drawn.images, unguided)


def test_several_classes_and_one_conditional_network(materials):
    both = materials.resolved(replace(IMAGES, forget=("0", "1"), bandwidth=0.3))
    models = materials.models(both)
    assert [each.bandwidth for each in models.unwanted] == [0.3, 0.3]
    assert {"images-0", "images-1"} <= set(models.sources)
    assert generate(both, materials).log_posterior.shape == (2, 6)
    spell = materials.resolved(replace(SPELL_CONFIG, forget=("0", "1"), networks="conditional"))
    train = materials.dataset(spell).train
    assert len(materials.rule(spell).points) == int((train.labels < 2).sum())
    assert generate(spell, materials).images.shape == (6, 1, 8, 8)


def test_without_noise_and_of_second_order(materials):
    """An image's own track stays unguided where no ball reaches."""
    for solver in ("first-order", "dpm++2m"):
        without_noise = {"eta": 0.0, "solver": solver}
        spell = materials.resolved(replace(SPELL_CONFIG, **without_noise))
        far = replace(spell, radius=1e-6)
        unguided = materials.resolved(replace(FEW, **without_noise))
        images = [generate(each, materials).images for each in (spell, far, unguided)]
        assert not torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
        path = {"tracker": "path", "hyperparameters": "own", "temperature": 0.1}
        follows = materials.resolved(replace(IMAGES, **path, **without_noise))
        assert torch.isfinite(generate(follows, materials).log_posterior).all()


def test_a_table_has_the_radius_as_strength():
    def row(config, forbidden):
        metrics = {"num_images": 100, "safety": forbidden, "safety_low": 0.0, "safety_high": 0.1}
        metrics |= dict.fromkeys(("kl", "frechet", "frechet_pixels"), 1.0)
        return {"config": config.to_json(), "key": config.key, "metrics": metrics}

    shares = (0.1, 0.002)
    configs = settings(FEW, ["spell", "dng-images"], [1.0, 3.0])
    rows = [row(c, share) for c, share in zip(configs, shares * 2, strict=True)]
    spell, images = compare.at_equal_safety(rows, 0.01)
    assert (spell["method"], spell["setting"]) == ("SPELL", "g 1.6")
    assert images["method"] == "DNG from images, paper settings"
    assert 1.0 < spell["guidance_scale"] == images["guidance_scale"] < 3.0
    assert [compare.scale_of(each) for each in rows] == [1.0, 3.0] * 2
    (method,) = compare.methods_of(rows[:2])
    assert method.at(rows[1]) == "SPELL, $r=3$"
    assert ",SPELL,g 1.6,3," in compare.csv_table(rows)
    assert [sweeps.label(c) for c in configs[1:3]] == [
        "spell r=3",
        "dng paper paper from images g=1",
    ]
