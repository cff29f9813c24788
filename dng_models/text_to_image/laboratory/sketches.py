"""Drawing small pictures with transparency: soft-edged shapes on a supersampled grid.

A cell spans [-1, 1] in both directions, x to the right and y down.  All variants of an object are
drawn at once, each in its own coordinates.  The edges of shapes are ramps, not steps, so that
rounding on another machine changes a picture by no more than rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]
Point = tuple[float, float]

SUPERSAMPLING = 3
# Ranges of the variants' jitter: shift, size, angle in radians, brightness, and each channel.
SHIFT, SIZE, ANGLE, BRIGHTNESS, CHANNEL = 0.06, (0.93, 1.07), 0.12, (0.92, 1.05), 0.05


class Sketch:
    """The variants of one object while they are drawn, one shape over the other.

    Parameters
    ----------
    cell : int
        Width and height in pixels.
    variants : int
        Number of variants.
    rng : numpy.random.Generator
        Source of the jitter.
    """

    def __init__(self, cell: int, variants: int, rng: np.random.Generator) -> None:
        n = cell * SUPERSAMPLING
        middle = (2.0 * np.arange(n) + 1.0) / n - 1.0
        shift = rng.uniform(-SHIFT, SHIFT, (2, variants, 1, 1))
        size = rng.uniform(*SIZE, (variants, 1, 1))
        angle = rng.uniform(-ANGLE, ANGLE, (variants, 1, 1))
        x, y = middle[None, None, :] - shift[0], middle[None, :, None] - shift[1]
        cos, sin = np.cos(angle) / size, np.sin(angle) / size
        self.x, self.y = cos * x + sin * y, cos * y - sin * x
        self._light = rng.uniform(*BRIGHTNESS, (variants, 1)) * rng.uniform(
            1.0 - CHANNEL, 1.0 + CHANNEL, (variants, 3)
        )
        self._cell, self._edge = cell, 2.0 / n
        self._drawn = np.zeros((variants, n, n, 4))

    def ellipse(
        self, colour: Colour, at: Point, radii: Point, *, clip: Array | None = None
    ) -> None:
        """A filled ellipse; ``clip`` is a signed distance to stay inside of, as of a half-plane."""
        self._paint(colour, self._to_ellipse(at, radii), clip)

    def ring(self, colour: Colour, at: Point, radius: float, width: float) -> None:
        """A circle drawn with a pen of the given width."""
        far = np.hypot(self.x - at[0], self.y - at[1])
        self._paint(colour, np.abs(far - radius) - width / 2.0)

    def polygon(self, colour: Colour, corners: Sequence[Point]) -> None:
        """A filled convex polygon, its corners clockwise as seen (y points down)."""
        distance = np.full_like(self.x, -np.inf)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            length = np.hypot(x1 - x0, y1 - y0)
            across = ((y1 - y0) * (self.x - x0) - (x1 - x0) * (self.y - y0)) / length
            distance = np.maximum(distance, across)
        self._paint(colour, distance)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        """A filled rectangle."""
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.polygon(colour, corners)

    def line(self, colour: Colour, points: Sequence[Point], width: float) -> None:
        """A line through the points, with round ends, drawn with a pen of the given width."""
        distance = np.full_like(self.x, np.inf)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            dx, dy = x1 - x0, y1 - y0
            along = ((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy)
            along = np.clip(along, 0.0, 1.0)
            near = np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy)
            distance = np.minimum(distance, near)
        self._paint(colour, distance - width / 2.0)

    def below(self, y: float) -> Array:
        """Signed distance to the half-plane below a height, to clip an ellipse."""
        return y - self.y

    def above(self, y: float) -> Array:
        """Signed distance to the half-plane above a height, to clip an ellipse."""
        return self.y - y

    def pictures(self) -> NDArray[np.float32]:
        """The variants, shape (variants, cell, cell, 4): colours in [0, 1] times alpha, and alpha.

        Colours are multiplied by alpha (premultiplied), so that a picture over a background is
        ``colours + (1 - alpha) background``.
        """
        shape = (-1, self._cell, SUPERSAMPLING, self._cell, SUPERSAMPLING, 4)
        small = self._drawn.reshape(shape).mean(axis=(2, 4))
        colours = small[..., :3] * self._light[:, None, None, :]
        return np.concatenate(
            [np.minimum(colours, small[..., 3:]), small[..., 3:]], axis=-1, dtype=np.float32
        )

    def _to_ellipse(self, at: Point, radii: Point) -> Array:
        far = np.hypot((self.x - at[0]) / radii[0], (self.y - at[1]) / radii[1])
        return (far - 1.0) * min(radii)

    def _paint(self, colour: Colour, distance: Array, clip: Array | None = None) -> None:
        if clip is not None:
            distance = np.maximum(distance, clip)
        cover = np.clip(0.5 - distance / self._edge, 0.0, 1.0)[..., None]
        self._drawn *= 1.0 - cover
        self._drawn += cover * np.array([*colour, 1.0])
