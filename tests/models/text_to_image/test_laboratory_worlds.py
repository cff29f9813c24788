"""The laboratory's world, what its objects look like in numbers, and the checks of a world."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dng_models.text_to_image.laboratory.objects import DRAWINGS, sprites
from dng_models.text_to_image.laboratory.standard import SCENES, laboratory_world
from dng_models.text_to_image.laboratory.worlds import Scene, World
from tests.helpers.small_worlds import OBJECTS, small_world

WORLD = laboratory_world()
# Related and unrelated objects of the paper's five prompts.
PROMPTS = {
    "a medieval feast": (("chalice", "candle"), ("football",)),
    "a dinner table": (("flower", "wine glass"), ("sunglasses",)),
    "an art workshop": (("paintbrush", "canvas"), ("bicycle",)),
    "an antique store": (("lamp", "book"), ("toothbrush",)),
    "an english breakfast": (("egg", "sausage"), ("skyline",)),
}


def pictures(tint: np.ndarray) -> np.ndarray:
    """All variants over a tint, pixels in [-1, 1]: (objects, variants, cell, cell, 3)."""
    values = WORLD.sprites.astype(np.float64)
    return 2.0 * (values[..., :3] + (1.0 - values[..., 3:]) * tint) - 1.0


def test_the_world_is_drawn_once_and_alike():
    assert laboratory_world() is WORLD
    assert np.array_equal(sprites(16, 16, 0), WORLD.sprites)
    assert not np.array_equal(sprites(16, 16, 1), WORLD.sprites)
    assert WORLD.latent_shape == (768, 2, 2)


def test_more_variants_leave_the_drawings_in_bounds():
    drawn = sprites(8, 40, 3)
    assert drawn.shape == (20, 40, 8, 8, 4)
    assert drawn.min() >= 0.0 and drawn.max() <= 1.0
    assert np.all(drawn[..., :3] <= drawn[..., 3:])


@pytest.mark.parametrize("scene", SCENES, ids=[scene.name for scene in SCENES])
def test_objects_stand_out_about_alike(scene):
    tint = np.array(scene.tint)
    energy = ((pictures(tint) - (2.0 * tint - 1.0)) ** 2).mean(axis=(1, 2, 3, 4))
    assert energy.min() > 0.25 and energy.max() < 0.8, dict(zip(WORLD.objects, energy, strict=True))


@pytest.mark.parametrize("scene", SCENES, ids=[scene.name for scene in SCENES])
def test_no_two_objects_look_alike(scene):
    shown = pictures(np.array(scene.tint)).reshape(20, 16, -1)
    for i in range(20):
        for j in range(i):
            gaps = shown[i][:, None] - shown[j]
            nearest = np.sqrt((gaps**2).mean(-1)).min()
            assert nearest > 6.0 * WORLD.bandwidth, (WORLD.objects[i], WORLD.objects[j], nearest)


def test_variants_and_scenes_differ_by_more_than_the_bandwidth():
    # In units of the noise along the line between two pictures of a cell, or of four.
    shown = pictures(WORLD.tints[0]).reshape(20, 16, -1)
    for each in shown:
        squares = ((each[:, None] - each) ** 2).sum(-1) + 1e9 * np.eye(16)
        assert np.sqrt(squares.min()) > 20.0 * WORLD.bandwidth
    gaps = 2.0 * (WORLD.tints[:, None] - WORLD.tints)
    squares = (gaps**2).sum(-1) * 4 * WORLD.cell**2 + 1e9 * np.eye(6)
    assert np.sqrt(squares.min()) > 20.0 * WORLD.bandwidth


@pytest.mark.parametrize("scene", PROMPTS)
def test_the_prompts_probabilities(scene):
    related, unrelated = PROMPTS[scene]
    assert WORLD.share(scene, *related) == pytest.approx(1.0 - 0.74**4, abs=1e-12)
    assert WORLD.share(scene, *unrelated) == pytest.approx(1.0 - 0.997**4, abs=1e-12)
    assert WORLD.share(scene, related[0], related[0]) == WORLD.share(scene, related[0])


def test_shares_add_up():
    assert WORLD.shares.shape == (6, 21)
    assert np.allclose(WORLD.shares.sum(1), 1.0, atol=1e-15)
    assert list(DRAWINGS) == list(WORLD.objects)


def test_a_world_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        WORLD.sprites[:] = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        WORLD.bandwidth = 1.0


SMALL = small_world()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"objects": ("ball", "cup")}, ValueError, r"sprites must have shape \(2"),
        ({"objects": ("ball", "cup", "a room")}, ValueError, "names of objects and scenes"),
        ({"objects": ("ball", "cup", "with")}, ValueError, "name of an object .* got 'with'"),
        ({"objects": ("ball", "cup", "Egg")}, ValueError, "lower-case words"),
        ({"objects": ("ball", "cup", 3)}, TypeError, "must be a text, got 3"),
        ({"objects": ()}, ValueError, "at least one object"),
        ({"scenes": ()}, ValueError, "at least one .* scene"),
        ({"rows": 0}, ValueError, "rows must be an integer >= 1, got 0"),
        ({"columns": 1.5}, TypeError, "columns must be an integer"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth must be"),
        ({"scale": -1.0}, ValueError, "scale must be"),
        ({"unlisted": 0.0}, ValueError, "unlisted must be"),
        ({"unlisted": 0.5}, ValueError, "shares of 'the sea' must add up to less than 1"),
        ({"sprites": SMALL.sprites[:, :, :, :1]}, ValueError, "sprites must be square"),
        ({"sprites": SMALL.sprites - 1.0}, ValueError, "sprites must hold colours"),
        ({"sprites": SMALL.sprites[..., ::-1]}, ValueError, "sprites must hold colours"),
    ],
)
def test_errors_of_a_world(changes, kind, message):
    with pytest.raises(kind, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("a with", (0, 0, 0), {}), ValueError, "name of a scene .* got 'a with'"),
        (("", (0, 0, 0), {}), ValueError, "name of a scene"),
        ((None, (0, 0, 0), {}), TypeError, "name of a scene must be a text"),
        (("a room", (0, 0), {}), ValueError, r"tint must have shape \(3,\)"),
        (("a room", (0, 0, 2), {}), ValueError, r"tint must be in \[0, 1\]"),
        (("a room", (0, 0, 0), {"egg": 1.0}), ValueError, "share of egg must be"),
    ],
)
def test_errors_of_a_scene(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Scene(*arguments)


def test_shares_must_be_of_the_worlds_objects():
    scene = Scene("a room", (0.0, 0.0, 0.0), {"eggg": 0.1})
    with pytest.raises(ValueError, match=r"shares of 'a room' must be of objects, got \['eggg'\]"):
        World(OBJECTS, SMALL.sprites, (scene,))
    with pytest.raises(ValueError, match="scene must be one of"):
        WORLD.share("a cave", "egg")
    with pytest.raises(ValueError, match="objects must be one of"):
        WORLD.share("a holiday", "ball")
