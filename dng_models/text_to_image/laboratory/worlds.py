"""A world of pictures: scenes, objects, and how likely each object is in a scene.

A picture has rows x columns cells and one scene.  The scene's tint is the background of all cells;
a cell is blank or shows one variant of one object.  Given the scene, cells are independent.  Pixels
are in [-1, 1], and every picture has Gaussian noise of a small bandwidth, so that the world is an
explicit mixture with a density.

The latents of a world hold one cell at each position: ``scale (pixels - centre)``, with the pixels
of a cell as channels (pixel unshuffle).  The centre is the world's mean colour, so that latents
have mean zero and a chain may start from N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dng_math import checks

Array = NDArray[np.float64]
WORDS_OF_CAPTIONS = frozenset({"with", "without", "and", "or", "a", "an", "the"})


@dataclass(frozen=True)
class Scene:
    """A kind of picture.

    Parameters
    ----------
    name : str
        As captions write it, with its article: "an english breakfast".
    tint : tuple of three floats
        Colour of the background, in [0, 1].
    shares : mapping of str to float
        Probability of an object in each cell.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    name: str
    tint: tuple[float, float, float]
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("scene", self.name)
        tint = checks.array("tint", self.tint, (3,))
        if tint.min() < 0.0 or tint.max() > 1.0:
            raise ValueError(f"tint must be in [0, 1], got {self.tint}")
        for name, share in self.shares.items():
            checks.real(f"share of {name}", share, "in (0, 1)", 0.0, 1.0, closed="()")


@dataclass(frozen=True, eq=False)
class World:
    """A distribution of pictures and its vocabulary.

    Parameters
    ----------
    objects : tuple of str
        Names of the K objects, without article.
    sprites : ndarray, shape (K, E, cell, cell, 4)
        E variants of each: colours in [0, 1], multiplied by alpha, and alpha.
    scenes : tuple of Scene
        S scenes, equally likely.
    rows, columns : int
        Cells of a picture.
    bandwidth : float
        Standard deviation of the noise of every pixel, in units of pixels in [-1, 1].
    scale : float
        Factor from pixels to latents.
    unlisted : float
        Probability in each cell of an object that a scene does not list.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    objects: tuple[str, ...]
    sprites: NDArray[np.floating]
    scenes: tuple[Scene, ...]
    rows: int = 2
    columns: int = 2
    bandwidth: float = 0.05
    scale: float = 0.375
    unlisted: float = 0.003

    def __post_init__(self) -> None:
        checks.integer("rows", self.rows, 1)
        checks.integer("columns", self.columns, 1)
        checks.positive("bandwidth", self.bandwidth)
        checks.positive("scale", self.scale)
        checks.real("unlisted", self.unlisted, "in (0, 1)", 0.0, 1.0, closed="()")
        names = [*self.objects, *(scene.name for scene in self.scenes)]
        if not self.objects or not self.scenes:
            raise ValueError("a world must have at least one object and one scene")
        if len(set(names)) < len(names):
            raise ValueError(f"names of objects and scenes must differ, got {names}")
        for name in self.objects:
            _check_name("object", name)
        sprites = checks.filled("sprites", self.sprites, (len(self.objects), "E", "n", "n", 4))
        if sprites.shape[2] != sprites.shape[3]:
            raise ValueError(f"sprites must be square, got {sprites.shape[2:4]}")
        if sprites.min() < 0.0 or np.any(sprites[..., :3] > sprites[..., 3:] + 1e-6):
            raise ValueError("sprites must hold colours multiplied by alpha, from 0 to alpha")
        object.__setattr__(self, "sprites", checks.frozen(sprites))
        for scene in self.scenes:
            unknown = sorted(scene.shares.keys() - set(self.objects))
            if unknown:
                raise ValueError(f"shares of {scene.name!r} must be of objects, got {unknown}")
        if self.shares[:, 0].min() <= 0.0:
            name = self.scenes[int(self.shares[:, 0].argmin())].name
            raise ValueError(f"shares of {name!r} must add up to less than 1, with unlisted ones")

    @property
    def cells(self) -> int:
        """Number of cells of a picture."""
        return self.rows * self.columns

    @property
    def cell(self) -> int:
        """Width and height of a cell in pixels."""
        return int(self.sprites.shape[2])

    @property
    def variants(self) -> int:
        """Number E of variants of each object."""
        return int(self.sprites.shape[1])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (3 cell^2, rows, columns) of the latents of a picture."""
        return 3 * self.cell**2, self.rows, self.columns

    @cached_property
    def tints(self) -> Array:
        """Tints of the scenes, shape (S, 3), in [0, 1]."""
        return np.array([scene.tint for scene in self.scenes], dtype=np.float64)

    @cached_property
    def shares(self) -> Array:
        """Probability of each class in a cell, shape (S, 1 + K); class 0 is blank."""
        given = [
            [scene.shares.get(o, self.unlisted) for o in self.objects] for scene in self.scenes
        ]
        objects = np.array(given)
        return np.column_stack([1.0 - objects.sum(axis=1), objects])

    @cached_property
    def centre(self) -> tuple[float, float, float]:
        """Mean colour of all pictures, in [-1, 1]."""
        objects = self.sprites.mean(axis=(1, 2, 3), dtype=np.float64)
        over = objects[:, :3] + (1.0 - objects[:, 3:]) * self.tints[:, None]
        colours = np.concatenate([self.tints[:, None], over], axis=1)
        mean = 2.0 * np.einsum("sk,skc->c", self.shares, colours) / len(self.scenes) - 1.0
        red, green, blue = (float(value) for value in mean)
        return red, green, blue

    def share(self, scene: str, *objects: str) -> float:
        """Probability that at least one of the objects is in a picture of the scene."""
        names = [each.name for each in self.scenes]
        checks.choice("scene", scene, names)
        for name in objects:
            checks.choice("objects", name, self.objects)
        row = self.shares[names.index(scene)]
        none = 1.0 - math.fsum(row[1 + self.objects.index(name)] for name in set(objects))
        return 1.0 - none**self.cells


def _check_name(what: str, name: object) -> None:
    """Refuse names that captions could not be parsed with."""
    article = "an" if what == "object" else "a"
    if not isinstance(name, str):
        raise TypeError(f"the name of {article} {what} must be a text, got {name!r}")
    words = name.split()
    plain = all(word.isascii() and word.isalpha() and word.islower() for word in words)
    free = words[1:] if what == "scene" else words
    if not words or not plain or name != " ".join(words) or WORDS_OF_CAPTIONS & set(free):
        exception = ", but for an article in front" if what == "scene" else ""
        raise ValueError(
            f"the name of {article} {what} must be lower-case words, none of them "
            f"{', '.join(sorted(WORDS_OF_CAPTIONS))}{exception}; got {name!r}"
        )
