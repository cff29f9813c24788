"""The exact judge on pictures of the laboratory's world, and on what are none."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from dng_models.text_to_image.laboratory.exact_model import Pictures
from dng_models.text_to_image.laboratory.judge import Judge, Judged
from dng_models.text_to_image.laboratory.standard import laboratory_world

WORLD = laboratory_world()
JUDGE = Judge(WORLD)


@functools.cache
def drawn() -> Pictures:
    return JUDGE.model.sample("", 512, generator=1)


@functools.cache
def looked() -> Judged:
    return JUDGE.look(drawn().latents)


def images(latents: torch.Tensor) -> np.ndarray:
    """As a pipeline returns them: (N, height, width, 3), uint8."""
    n, cell = len(latents), WORLD.cell
    pixels = latents.reshape(n, 3, cell, cell, 2, 2).permute(0, 4, 2, 5, 3, 1)
    pixels = pixels.reshape(n, 2 * cell, 2 * cell, 3) / WORLD.scale + torch.tensor(WORLD.centre)
    return np.rint(255.0 * ((pixels + 1.0) / 2.0).clamp(0.0, 1.0).numpy()).astype(np.uint8)


def test_every_cell_of_its_own_pictures_is_seen():
    assert np.array_equal(looked().scene, drawn().scene.numpy())
    assert np.array_equal(looked().cells, drawn().cells.numpy())
    assert np.array_equal(looked().variants, drawn().variants.numpy())
    assert looked().certainty.min() > 0.999


def test_its_own_pictures_are_a_bandwidth_away_and_no_ghosts():
    # A cell has 768 independent normal numbers.  By Chernoff's bound the root of their mean square
    # is off by 18% in one of 2,048 cells with probability at most 2048 (e^-23.3 + e^-26.6) < 1e-6.
    assert np.all(np.abs(looked().distance / WORLD.bandwidth - 1.0) < 0.18)
    assert not looked().ghosts.any()
    assert not looked().changed(looked()).any()


def test_images_are_judged_as_latents_are():
    pixels = images(drawn().latents[:64])
    for given in (pixels, pixels / 255.0, [Image.fromarray(each) for each in pixels]):
        found = JUDGE.look(given)
        assert np.array_equal(found.cells, looked().cells[:64])
        assert not found.changed(JUDGE.look(drawn().latents[:64])).any()


def test_an_inverted_object_is_a_ghost():
    football = 1 + WORLD.objects.index("football")
    cells = torch.tensor([[football, 0, 0, 0]])
    zeros = torch.zeros_like(cells)
    scene = torch.tensor([4])
    real = JUDGE.model.pictures(scene, cells, zeros)
    blank = JUDGE.model.pictures(scene, zeros, zeros)
    both = JUDGE.look(torch.cat([real, 2.0 * blank - real]))
    assert both.ghosts.tolist() == [[False] * 4, [True, False, False, False]]
    assert both.has("football").tolist() == [True, False]


def test_what_a_picture_has():
    egg = (drawn().cells == 1 + WORLD.objects.index("egg")).numpy()
    fish = (drawn().cells == 1 + WORLD.objects.index("fish")).numpy()
    assert egg.any() and fish.any()
    assert np.array_equal(looked().shows("egg"), egg)
    assert np.array_equal(looked().has("egg", "fish"), (egg | fish).any(1))
    assert np.array_equal(
        JUDGE.probability(drawn().latents, "egg, fish") > 0.5, (egg | fish).any(1)
    )
    both = egg.any(1) & fish.any(1)
    assert np.array_equal(JUDGE.probability(drawn().latents, "an egg and a fish") > 0.5, both)
    captions = [scene.name for scene in WORLD.scenes]
    found = JUDGE.probability(drawn().latents, [captions[i] for i in looked().scene])
    assert found.min() > 0.999


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "egg, fish",
        "an egg and a fish",
        "a holiday",
        "a dinner table with egg, fish without jar",
    ],
)
def test_what_holds_for_a_picture(caption):
    found = looked().holds(caption)
    assert np.array_equal(found, JUDGE.probability(drawn().latents, caption) > 0.5)
    assert found.any()


def test_cells_that_changed():
    scene, cells, variants = (
        each[:3].clone() for each in (drawn().scene, drawn().cells, drawn().variants)
    )
    before = JUDGE.look(JUDGE.model.pictures(scene, cells, variants))
    cells[0, 1] = (cells[0, 1] + 1) % 21
    filled = int(torch.nonzero(cells[1])[0])
    variants[1, filled] = (variants[1, filled] + 1) % 16
    scene[2] = (scene[2] + 1) % 6
    after = JUDGE.look(JUDGE.model.pictures(scene, cells, variants))
    expected = np.zeros((3, 4), dtype=bool)
    expected[0, 1] = expected[1, filled] = True
    expected[2] = True
    assert np.array_equal(after.changed(before), expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: looked().has("eggs"), ValueError, "objects must be of chalice, .* got eggs"),
        (
            lambda: looked().changed(JUDGE.look(drawn().latents[:2])),
            ValueError,
            "512 pictures, got 2",
        ),
        (lambda: JUDGE.look(np.zeros((2, 24, 32, 3))), ValueError, r"\(N, 32, 32, 3\), got"),
        (lambda: JUDGE.look(np.zeros((2, 32, 32, 3), dtype=int)), TypeError, "uint8 or floating"),
        (lambda: JUDGE.look(torch.zeros(2, 3, 32, 32)), ValueError, "x must be latents"),
        (lambda: JUDGE.probability(drawn().latents, "eggg"), ValueError, "no 'eggg'"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
