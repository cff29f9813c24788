"""The compared methods, with the guidance scales and settings at which each is tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dng_math import checks
from dng_models.class_removal.config import REFUSED, RULES, Config

# The name of each method in a sweep, and the configuration fields that define it.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"rule": "none"},
    "np": {"rule": "np"},
    "sld": {"rule": "sld"},
    "ccfg": {"rule": "ccfg"},
    "dng-paper": {"rule": "dng", "tracker": "paper", "hyperparameters": "paper"},
    "dng-calibrated": {"rule": "dng", "tracker": "paper", "hyperparameters": "calibrated"},
    "dng-constant": {
        "rule": "dng",
        "tracker": "paper",
        "hyperparameters": "calibrated-constant",
    },
    "dng-log-odds": {"rule": "dng", "tracker": "log-odds", "hyperparameters": "calibrated"},
    "dng-path": {"rule": "dng", "tracker": "path", "hyperparameters": "own"},
    "dng-path-calibrated": {"rule": "dng", "tracker": "path", "hyperparameters": "calibrated"},
    "dng-images": {
        **{"rule": "dng", "tracker": "paper", "hyperparameters": "paper"},
        "negative": "images",
    },
    "geoguide": {"rule": "geoguide"},
    "spell": {"rule": "spell", "guidance_scale": 1.6},  # its authors' scale
}


DEFAULT_METHODS = ("none", "np", "sld", "dng-paper", "dng-calibrated")


# Guidance scales at which the forbidden share on digits runs from a few percent to a few tenths of
# a percent.
LADDERS: dict[str, tuple[float, ...]] = {
    "np": (0.2, 0.4, 0.6, 0.8),
    "sld": (0.3, 0.5, 0.75, 1.0),
    "ccfg": (0.2, 0.5, 1.0, 2.0),
    "dng-paper": (1.0, 2.0, 4.0),
    # Calibrated trackers start from the class's own share, which is below the paper's prior, so
    # they need larger scales.
    "dng-calibrated": (2.0, 5.0, 10.0),
    "dng-constant": (2.0, 4.0, 8.0),
    "dng-log-odds": (3.0, 6.0, 12.0),
    "dng-path": (1.0, 2.0, 4.0),
    "dng-path-calibrated": (2.0, 5.0, 10.0),
    "dng-images": (1.0, 2.0, 4.0),
    "dng": (1.0, 2.0, 4.0),
    "geoguide": (0.5, 1.0, 2.0),
    "spell": (1.5, 2.5, 4.0),  # radii
}


# The methods that a tuning compares.
TUNED = ("none", "np", "sld", "ccfg", "dng-paper", "dng-constant", "dng-calibrated", "dng-log-odds")


# The alternatives a tuning tries for each method, stage by stage: an alternative changes the
# setting that the earlier stages chose.  DNG has none; it uses the paper's settings or its
# calibration.
_INTERVALS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"t_lo": 0.25}, {"t_lo": 0.4}),
    ({"t_hi": 0.7},),
)


ALTERNATIVES: dict[str, tuple[tuple[dict[str, Any], ...], ...]] = {
    "np": _INTERVALS,
    "sld": (
        (
            {"gate": "absolute", "threshold": 0.3},
            {"gate": "absolute", "threshold": 0.1},
            {"gate": "absolute", "threshold": 1.0},
            {"gate": "signed", "threshold": 0.3},
        ),
        ({"slope": 10.0}, {"slope": 1.0}),
        # A slope that does not saturate may need another threshold.
        ({"gate": "absolute", "threshold": 1.0},),
        *_INTERVALS,
    ),
    "ccfg": (({"contrast": 0.2}, {"contrast": 5.0}), *_INTERVALS),
    "geoguide": _INTERVALS,
    "spell": (({"guidance_scale": 1.0},), *_INTERVALS),
}


def settings(
    base: Config, methods: Sequence[str] = DEFAULT_METHODS, scales: Sequence[float] | None = None
) -> list[Config]:
    """The settings of a sweep: every method at each of its guidance scales, in that order.

    Parameters
    ----------
    base : Config
        Everything that the settings share.
    methods : sequence of str
        Names in :data:`METHODS`, or names of rules, which take their hyperparameters from ``base``.
    scales : sequence of float, optional
        Guidance scales for every method, of SPELL radii; default: those of :data:`LADDERS`.

    Returns
    -------
    list of Config
        Without repetitions; the unguided method has the single scale 0.

    Raises
    ------
    ValueError
        If a method does not exist.
    """
    configs = []
    for method in methods:
        if method in REFUSED:
            raise ValueError(f"rules must not have {method!r}, which {REFUSED[method]}")
        if method not in METHODS and method not in RULES:
            checks.choice("rules", method, tuple(dict.fromkeys([*METHODS, *RULES])))
        fields: dict[str, Any] = METHODS.get(method, {"rule": method})
        ladder = LADDERS.get(method, LADDERS["np"]) if scales is None else tuple(scales)
        if method == "none":
            ladder = (0.0,)
        strength = "radius" if fields["rule"] == "spell" else "guidance_scale"
        configs += [dataclasses.replace(base, **(fields | {strength: s})) for s in ladder]
    return list(dict.fromkeys(configs))
