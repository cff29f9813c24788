"""Class removal with trained networks: the paper's curves for the digits, with shipped networks.

The networks, their classifier and the calibration are those of ``dng_models``, and so is the sweep,
here over fewer images.  The baselines have the settings that ``tune`` chose for the digit
(docs/results.md).
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
SAFE = 0.01  # forbidden share at which methods are compared

Row = dict[str, Any]


def compute(quick: bool = False, seed: int = 0) -> list[Row]:
    """Run the sweep with the shipped networks, and return its rows."""
    from dng_models.class_removal.config import Config
    from dng_models.class_removal.materials import Materials
    from dng_models.class_removal.methods import settings
    from dng_models.class_removal.run_folder import SHIPPED, RunFolder
    from dng_models.class_removal.sweeps import sweep
    from dng_models.support.progress import is_shown

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
    """Plot the distances of every method against the forbidden share."""
    from dng_models.class_removal import plot

    return {"class_removal_networks": plot.curves(rows)}


def summary(rows: list[Row]) -> str:
    """A table of the methods at equal safety."""
    from dng_models.class_removal import compare

    chosen = "; ".join(
        f"{method} {', '.join(f'{name} {value}' for name, value in fields.items())}"
        for method, fields in CHOSEN.items()
    )
    return f"{compare.safety_table(rows, SAFE)}  with what tune chose for the 0: {chosen}"
