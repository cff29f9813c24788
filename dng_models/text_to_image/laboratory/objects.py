"""The objects of the laboratory, each told at a glance in sixteen pixels.

All scenes are dark, so that objects are bright and saturated; each covers a third to a half of its
cell, so that none is much easier to see through noise than another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dng_models.text_to_image.laboratory.sketches import Sketch

WHITE = (1.0, 1.0, 1.0)
PAPER = (0.94, 0.93, 0.9)
BLACK = (0.02, 0.02, 0.04)
GOLD = (1.0, 0.80, 0.12)
WOOD = (0.88, 0.55, 0.20)
GREEN = (0.25, 0.85, 0.25)


def chalice(s: Sketch) -> None:
    """A golden cup on a foot, with a red stone."""
    s.polygon(GOLD, [(-0.66, -0.85), (0.66, -0.85), (0.5, -0.15), (-0.5, -0.15)])
    s.ellipse(GOLD, (0.0, -0.18), (0.5, 0.3))
    s.box(GOLD, -0.14, 0.0, 0.14, 0.7)
    s.ellipse(GOLD, (0.0, 0.8), (0.58, 0.28), clip=s.above(0.86))
    s.ellipse((0.62, 0.38, 0.02), (0.0, -0.8), (0.54, 0.12))
    s.ellipse((0.95, 0.05, 0.15), (0.0, -0.3), (0.2, 0.2))


def candle(s: Sketch) -> None:
    """A cream candle with a large flame, on a plate."""
    s.ellipse((1.0, 0.72, 0.1), (0.0, -0.6), (0.27, 0.36))
    s.ellipse((1.0, 1.0, 0.75), (0.0, -0.53), (0.13, 0.2))
    s.box((1.0, 0.95, 0.8), -0.34, -0.22, 0.34, 0.72)
    s.line((0.95, 0.80, 0.6), [(0.2, -0.1), (0.2, 0.3)], 0.12)
    s.ellipse((0.85, 0.5, 0.25), (0.0, 0.76), (0.7, 0.15))


def flower(s: Sketch) -> None:
    """Five pink petals around a yellow middle."""
    for turn in range(5):
        angle = 2.0 * np.pi * (turn / 5.0 - 0.25)
        at = (0.5 * float(np.cos(angle)), 0.5 * float(np.sin(angle)))
        s.ellipse((1.0, 0.35, 0.78), at, (0.37, 0.37))
    s.ellipse((1.0, 0.9, 0.15), (0.0, 0.0), (0.28, 0.28))


def wine_glass(s: Sketch) -> None:
    """A pale glass of red wine on a thin stem."""
    glass = (0.80, 0.96, 1.0)
    s.ellipse(glass, (0.0, -0.4), (0.58, 0.62), clip=s.below(-0.85))
    s.ellipse((0.9, 0.05, 0.2), (0.0, -0.36), (0.42, 0.48), clip=s.below(-0.5))
    s.box(glass, -0.1, 0.15, 0.1, 0.8)
    s.ellipse(glass, (0.0, 0.82), (0.55, 0.14))


def paintbrush(s: Sketch) -> None:
    """A wooden handle, a silver band, and bristles full of blue paint."""
    handle, paint = (1.0, 0.72, 0.28), (0.25, 0.65, 1.0)
    s.line(handle, [(-0.68, 0.7), (0.1, -0.08)], 0.46)
    s.line(WHITE, [(0.08, -0.08), (0.24, -0.24)], 0.62)
    s.line(paint, [(0.38, -0.38), (0.5, -0.5)], 0.78)
    s.line(paint, [(0.6, -0.6), (0.8, -0.8)], 0.36)


def canvas(s: Sketch) -> None:
    """A landscape in a wooden frame on an easel."""
    s.line(WOOD, [(-0.35, 0.3), (-0.6, 0.92)], 0.18)
    s.line(WOOD, [(0.35, 0.3), (0.6, 0.92)], 0.18)
    s.box(WOOD, -0.8, -0.82, 0.8, 0.46)
    s.box(PAPER, -0.64, -0.66, 0.64, 0.3)
    s.polygon((0.15, 0.65, 0.25), [(-0.58, 0.22), (-0.15, -0.46), (0.3, 0.22)])
    s.polygon((0.1, 0.5, 0.85), [(-0.1, 0.22), (0.28, -0.25), (0.6, 0.22)])


def lamp(s: Sketch) -> None:
    """A table lamp with a bright yellow shade."""
    s.polygon((1.0, 0.95, 0.35), [(-0.36, -0.88), (0.36, -0.88), (0.82, 0.05), (-0.82, 0.05)])
    s.box((0.35, 0.9, 0.8), -0.14, 0.05, 0.14, 0.65)
    s.ellipse((0.35, 0.9, 0.8), (0.0, 0.85), (0.5, 0.28), clip=s.above(0.86))


def book(s: Sketch) -> None:
    """A closed blue book with a golden title and white pages."""
    s.polygon((0.1, 0.35, 0.85), [(-0.66, -0.7), (0.5, -0.84), (0.64, 0.68), (-0.54, 0.82)])
    s.polygon(PAPER, [(0.42, -0.76), (0.62, -0.79), (0.76, 0.62), (0.54, 0.68)])
    s.polygon((0.25, 0.6, 1.0), [(-0.47, -0.7), (0.42, -0.79), (0.54, 0.66), (-0.35, 0.8)])
    s.line(GOLD, [(-0.2, -0.42), (0.22, -0.46)], 0.2)
    s.line(GOLD, [(-0.14, -0.04), (0.26, -0.08)], 0.2)


def egg(s: Sketch) -> None:
    """A fried egg."""
    s.ellipse(PAPER, (-0.1, 0.05), (0.62, 0.54))
    s.ellipse(PAPER, (0.28, -0.2), (0.44, 0.4))
    s.ellipse(PAPER, (0.22, 0.34), (0.44, 0.33))
    s.ellipse((1.0, 0.62, 0.05), (0.04, 0.0), (0.36, 0.34))


def sausage(s: Sketch) -> None:
    """A bent sausage with three dark cuts."""
    bend = [(-0.62, -0.3), (-0.4, 0.18), (0.0, 0.36), (0.4, 0.18), (0.62, -0.3)]
    s.line((1.0, 0.5, 0.38), bend, 0.7)
    for x, y in ((-0.42, 0.12), (0.0, 0.34), (0.42, 0.12)):
        s.line((0.6, 0.12, 0.08), [(x - 0.04, y - 0.18), (x + 0.08, y + 0.16)], 0.12)


def bread(s: Sketch) -> None:
    """A slice of toast with a brown crust."""
    crust, crumb = (0.80, 0.42, 0.10), (1.0, 0.82, 0.48)
    for colour, edge in ((crust, 0.0), (crumb, 0.16)):
        s.ellipse(colour, (-0.4, -0.45), (0.45 - edge, 0.42 - edge))
        s.ellipse(colour, (0.4, -0.45), (0.45 - edge, 0.42 - edge))
        s.box(colour, -0.4, -0.87 + edge, 0.4, -0.3)
        s.box(colour, -0.7 + edge, -0.4, 0.7 - edge, 0.85 - edge)


def fish(s: Sketch) -> None:
    """A light blue fish that swims to the left."""
    blue = (0.35, 0.85, 1.0)
    s.polygon(blue, [(0.25, 0.0), (0.9, -0.62), (0.9, 0.62)])
    s.ellipse(blue, (-0.2, 0.0), (0.7, 0.52))
    s.ellipse((0.95, 1.0, 1.0), (-0.25, 0.22), (0.5, 0.22))
    s.ellipse(BLACK, (-0.55, -0.14), (0.13, 0.13))


def jar(s: Sketch) -> None:
    """A jar of green jelly with a red lid and a white label."""
    s.box((0.25, 0.9, 0.3), -0.6, -0.5, 0.6, 0.86)
    s.box((1.0, 0.25, 0.2), -0.66, -0.88, 0.66, -0.5)
    s.box(PAPER, -0.36, -0.1, 0.36, 0.46)


def clock(s: Sketch) -> None:
    """A white dial with a golden rim and black hands."""
    s.ellipse(GOLD, (0.0, 0.0), (0.78, 0.78))
    s.ellipse(PAPER, (0.0, 0.0), (0.56, 0.56))
    s.line(BLACK, [(0.0, -0.44), (0.0, 0.0), (0.32, 0.2)], 0.2)


def tomato(s: Sketch) -> None:
    """A red tomato with a green star."""
    s.ellipse((1.0, 0.12, 0.1), (0.0, 0.12), (0.85, 0.74))
    s.ellipse((1.0, 0.6, 0.5), (-0.42, -0.02), (0.16, 0.22))
    for tip in ((-0.48, -0.42), (0.0, -0.15), (0.48, -0.42), (0.05, -0.88)):
        s.line(GREEN, [(0.0, -0.5), tip], 0.22)


def football(s: Sketch) -> None:
    """A white ball with black patches."""
    s.ellipse(PAPER, (0.0, 0.0), (0.78, 0.78))
    s.ellipse(BLACK, (0.0, 0.0), (0.29, 0.29))
    for turn in range(5):
        angle = 2.0 * np.pi * (turn / 5.0 - 0.25)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        s.ellipse(BLACK, (0.67 * cos, 0.67 * sin), (0.16, 0.16))


def sunglasses(s: Sketch) -> None:
    """Two large violet lenses in a yellow frame."""
    yellow, violet = (1.0, 0.9, 0.1), (0.55, 0.2, 0.95)
    s.line(yellow, [(-0.85, -0.3), (0.85, -0.3)], 0.22)
    for x in (-0.46, 0.46):
        s.ellipse(yellow, (x, 0.05), (0.46, 0.5))
        s.ellipse(violet, (x, 0.06), (0.3, 0.34))
        s.ellipse((0.9, 0.75, 1.0), (x - 0.1, -0.06), (0.1, 0.1))


def bicycle(s: Sketch) -> None:
    """Two white wheels and a red frame."""
    for x in (-0.48, 0.48):
        s.ring(WHITE, (x, 0.35), 0.36, 0.17)
    red = (1.0, 0.35, 0.1)
    s.line(red, [(-0.48, 0.35), (-0.18, -0.32), (0.36, -0.32), (0.0, 0.35), (-0.48, 0.35)], 0.19)
    s.line(red, [(0.48, 0.35), (0.28, -0.62)], 0.19)
    s.line(WHITE, [(0.12, -0.66), (0.5, -0.66)], 0.19)
    s.line(WHITE, [(-0.36, -0.5), (-0.04, -0.5)], 0.19)


def toothbrush(s: Sketch) -> None:
    """An upright mint-green toothbrush with white bristles at its side."""
    mint = (0.2, 1.0, 0.75)
    s.line(mint, [(0.28, -0.72), (0.28, 0.72)], 0.36)
    s.box(WHITE, -0.5, -0.86, 0.12, -0.62)
    s.box((0.45, 0.75, 1.0), -0.5, -0.62, 0.12, -0.38)
    s.box(WHITE, -0.5, -0.38, 0.12, -0.12)


def skyline(s: Sketch) -> None:
    """Three towers with lit windows."""
    near, far = (0.75, 0.55, 1.0), (0.5, 0.75, 1.0)
    s.box(near, -0.88, -0.3, -0.34, 0.9)
    s.box(far, -0.3, -0.9, 0.26, 0.9)
    s.box(near, 0.3, 0.0, 0.88, 0.9)
    for x, ys in ((-0.61, (-0.05, 0.4)), (-0.02, (-0.6, -0.15, 0.3)), (0.59, (0.25, 0.65))):
        for y in ys:
            s.box((1.0, 0.95, 0.3), x - 0.15, y - 0.11, x + 0.15, y + 0.11)


DRAWINGS: dict[str, Callable[[Sketch], None]] = {
    **{"chalice": chalice, "candle": candle, "flower": flower, "wine glass": wine_glass},
    **{"paintbrush": paintbrush, "canvas": canvas, "lamp": lamp, "book": book, "egg": egg},
    **{"sausage": sausage, "bread": bread, "fish": fish, "jar": jar, "clock": clock},
    **{"tomato": tomato, "football": football, "sunglasses": sunglasses, "bicycle": bicycle},
    **{"toothbrush": toothbrush, "skyline": skyline},
}


def sprites(cell: int, variants: int, seed: int) -> NDArray[np.float32]:
    """Variants of all objects, shape (objects, variants, cell, cell, 4), in the order of DRAWINGS.

    Parameters
    ----------
    cell : int
        Width and height in pixels.
    variants : int
        Number of variants of each object.
    seed : int
        Seed of the variants' position, size, angle and colour.

    Returns
    -------
    ndarray, float32
        As :meth:`~.sketches.Sketch.pictures` returns them.
    """
    drawn = []
    for i, draw in enumerate(DRAWINGS.values()):
        # A generator for each object: redrawing one leaves the others as they are.
        sketch = Sketch(cell, variants, np.random.default_rng([seed, i]))
        draw(sketch)
        drawn.append(sketch.pictures())
    return np.stack(drawn)
