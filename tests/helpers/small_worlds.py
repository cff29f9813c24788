"""A world small enough to list: all its pictures as one flat mixture."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from hypothesis import strategies as st

from dng_math import GaussianMixture
from dng_models.text_to_image.laboratory.captions import Event
from dng_models.text_to_image.laboratory.worlds import Scene, World

OBJECTS = ("ball", "cup", "egg")
SCENES = (
    Scene("a room", (0.2, 0.1, 0.4), {"ball": 0.3, "cup": 0.1}),
    Scene("the sea", (0.1, 0.5, 0.3), {"egg": 0.25}),
)


@functools.cache
def small_world(rows: int = 2, columns: int = 2, cell: int = 2) -> World:
    """Three objects in two variants each, of random pixels."""
    rng = np.random.default_rng(0)
    alpha = rng.uniform(0.2, 1.0, (len(OBJECTS), 2, cell, cell, 1))
    colours = alpha * rng.uniform(0.0, 1.0, (len(OBJECTS), 2, cell, cell, 3))
    sprites = np.concatenate([colours, alpha], -1)
    return World(OBJECTS, sprites, SCENES, rows, columns, bandwidth=0.3, scale=0.8, unlisted=0.05)


class Listed:
    """Every picture of a world, found without the code under test.

    Attributes
    ----------
    mixture : GaussianMixture
        One component a picture, over flattened latents.
    scenes : list of str
        The scene of each picture.
    shown : list of tuple of str or None
        What its cells show.
    """

    def __init__(self, world: World) -> None:
        colours, alpha = world.sprites[..., :3], world.sprites[..., 3:]
        states = [(None, 0), *itertools.product(range(len(world.objects)), range(world.variants))]
        weights, means = [], []
        self.scenes, self.shown = [], []
        for scene in world.scenes:
            tint = np.array(scene.tint)
            chances = [scene.shares.get(name, world.unlisted) for name in world.objects]
            for picture in itertools.product(states, repeat=world.cells):
                weight = 1.0 / len(world.scenes)
                pixels = np.zeros((3, world.rows * world.cell, world.columns * world.cell))
                for place, (kind, variant) in enumerate(picture):
                    row, column = divmod(place, world.columns)
                    if kind is None:
                        patch = np.broadcast_to(tint, (world.cell, world.cell, 3))
                        weight *= 1.0 - math.fsum(chances)
                    else:
                        patch = colours[kind, variant] + (1.0 - alpha[kind, variant]) * tint
                        weight *= chances[kind] / world.variants
                    top, left = row * world.cell, column * world.cell
                    bottom, right = top + world.cell, left + world.cell
                    pixels[:, top:bottom, left:right] = patch.transpose(2, 0, 1)
                weights.append(weight)
                means.append(pixels)
                self.scenes.append(scene.name)
                names = [None if kind is None else world.objects[kind] for kind, _ in picture]
                self.shown.append(tuple(names))
        flat = 2.0 * np.stack(means) - 1.0
        centre = np.einsum("n,ncyx->c", weights, flat) / (flat.shape[2] * flat.shape[3])
        self.centre = centre
        latents = world.scale * (flat - centre[:, None, None])
        # One cell at each position, with channel, row and column of its pixels as channels.
        shape = (len(flat), 3, world.rows, world.cell, world.columns, world.cell)
        cells = latents.reshape(shape).transpose(0, 1, 3, 5, 2, 4)
        self.mixture = GaussianMixture(
            np.array(weights),
            cells.reshape(len(flat), -1),
            np.full(len(flat), (world.scale * world.bandwidth) ** 2),
        )

    def where(self, event: Event) -> np.ndarray:
        """Indices of the pictures of an event."""
        found = [
            event.scene in (None, scene)
            and all(any(name in each for name in shown) for each in event.required)
            and not any(name in event.excluded for name in shown)
            for scene, shown in zip(self.scenes, self.shown, strict=True)
        ]
        return np.flatnonzero(found)


@functools.cache
def listed(rows: int = 2, columns: int = 2) -> Listed:
    return Listed(small_world(rows, columns))


@st.composite
def events(draw: st.DrawFn, most_lists: int = 2) -> Event:
    """Events of the small world that can happen in four cells."""
    excluded = draw(st.frozensets(st.sampled_from(OBJECTS), max_size=2))
    rest = [name for name in OBJECTS if name not in excluded]
    lists = st.frozensets(st.sampled_from(rest), min_size=1)
    required = draw(st.frozensets(lists, max_size=most_lists))
    scene = draw(st.sampled_from([None, *(scene.name for scene in SCENES)]))
    return Event(scene, required, excluded)
