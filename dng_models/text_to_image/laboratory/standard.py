"""The laboratory's world: twenty objects and six scenes, after the paper's five prompts."""

from __future__ import annotations

import functools

from dng_models.text_to_image.laboratory.objects import DRAWINGS, sprites
from dng_models.text_to_image.laboratory.worlds import Scene, World

CELL = 16
VARIANTS = 16
SEED = 0
# In every scene the related objects (the first two) are in .70 of pictures, and an unrelated one
# in .012.
SCENES = (
    Scene(
        "a medieval feast",
        (0.34, 0.06, 0.10),
        {
            **{"chalice": 0.13, "candle": 0.13, "bread": 0.15, "fish": 0.10},
            **{"wine glass": 0.05, "sausage": 0.05},
        },
    ),
    Scene(
        "a dinner table",
        (0.05, 0.26, 0.16),
        {
            **{"flower": 0.13, "wine glass": 0.13, "fish": 0.13, "candle": 0.08},
            **{"bread": 0.10, "egg": 0.03},
        },
    ),
    Scene(
        "an art workshop",
        (0.09, 0.13, 0.40),
        {
            **{"paintbrush": 0.13, "canvas": 0.13, "jar": 0.15, "flower": 0.07},
            **{"book": 0.05, "lamp": 0.05},
        },
    ),
    Scene(
        "an antique store",
        (0.32, 0.19, 0.05),
        {
            **{"lamp": 0.13, "book": 0.13, "clock": 0.15, "candle": 0.06, "jar": 0.06},
            **{"chalice": 0.05, "canvas": 0.04},
        },
    ),
    Scene(
        "an english breakfast",
        (0.25, 0.25, 0.28),
        {"egg": 0.13, "sausage": 0.13, "tomato": 0.15, "bread": 0.13, "flower": 0.03},
    ),
    Scene(
        "a holiday",
        (0.03, 0.32, 0.46),
        {
            "football": 0.13,
            "sunglasses": 0.13,
            "bicycle": 0.13,
            "toothbrush": 0.13,
            "skyline": 0.13,
        },
    ),
)


@functools.cache
def laboratory_world() -> World:
    """Draw the laboratory's world, once in a process; about 0.3 s."""
    return World(tuple(DRAWINGS), sprites(CELL, VARIANTS, SEED), SCENES)
