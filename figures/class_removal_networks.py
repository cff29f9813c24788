"""Class removal with trained networks: the curves of the paper on the digits that ship with it.

The networks, their classifier and the calibration are those of ``dng_models``; this is its sweep
over fewer images.  The rivals of DNG have the settings that its ``tune`` chose for the digit
(docs/results.md).  Where torch or diffusers are missing the figure is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

PAPER = "Figs. 4, 14, 15"
TITLE = "Class removal with trained networks (needs torch and diffusers)"
NEEDS = ("torch", "diffusers", "accelerate", "datasets")

METHODS = {
    "none": (0.0,),
    "np": (0.33, 0.53, 0.8),
    "sld": (4.8, 7.7),
    "ccfg": (0.44, 0.7),
    "dng-paper": (1.0, 3.0),
    "dng-calibrated": (2.0, 5.0),
}
CHOSEN: dict[str, dict[str, Any]] = {
    "np": {"t_lo": 0.25, "t_hi": 0.7},
    "sld": {"gate": "absolute", "threshold": 0.3, "slope": 1.0, "t_lo": 0.25},
    "ccfg": {"contrast": 0.2},
}
SAFE = 0.01  # methods are compared where they leave this share

Row = dict[str, Any]


def compute(quick: bool = False, seed: int = 0) -> list[Row]:
    """The rows of a sweep over the shipped networks."""
    from dng_models.class_removal.config import SHIPPED, Config, RunFolder, settings
    from dng_models.class_removal.generate import Materials
    from dng_models.class_removal.sweep import sweep
    from dng_models.progress import is_shown

    base = Config(
        forget=("0",),
        steps=25 if quick else 100,
        num_images=64 if quick else 256,
        batch_size=64 if quick else 128,
        seed=seed,
    )
    configs = [
        config
        for method, scales in METHODS.items()
        for config in settings(replace(base, **CHOSEN.get(method, {})), [method], scales)
    ]
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder), shipped=SHIPPED / "digits")
        return sweep(configs, Materials(run, device="cpu"), progress=is_shown())


def draw(rows: list[Row]) -> dict[str, Figure]:
    """One figure: distances against the forbidden share, every method."""
    from dng_models.class_removal import plot

    return {"class_removal_networks": plot.curves(rows)}


def summary(rows: list[Row]) -> str:
    """The methods at equal safety."""
    from dng_models.class_removal import compare

    chosen = "; ".join(
        f"{method} {', '.join(f'{name} {value}' for name, value in fields.items())}"
        for method, fields in CHOSEN.items()
    )
    return f"{compare.safety_table(rows, SAFE)}  with what tune chose for the 0: {chosen}"
