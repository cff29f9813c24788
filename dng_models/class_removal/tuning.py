"""Tune every method at one forbidden share, and measure the chosen settings on new images.

A baseline with its authors' defaults says little about the method.  So each method tries the
alternatives of :data:`dng_models.class_removal.methods.ALTERNATIVES`, stage by stage, each at
guidance scales that enclose the wanted forbidden share, and keeps the one that is nearest to the
data there.  The images for this choice have a seed of their own.  The reported numbers are measured
with another seed, so that the selection does not bias them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dng_math import checks
from dng_models.class_removal.compare import (
    at_equal_safety,
    badness,
    chosen_settings,
    forbidden_share,
    scale_of,
)
from dng_models.class_removal.config import Config
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.methods import ALTERNATIVES, LADDERS, TUNED, settings
from dng_models.class_removal.sweeps import Row, read_table, sweep
from dng_models.support.progress import say

Measure = Callable[[Config], Row]

FACTOR = 1.6  # ratio between neighbouring guidance scales of a setting
RADIUS_FACTOR = 1.15  # of SPELL's radii: a ball of twice the radius holds next to every image
MOST_SCALES = 6  # at most so many scales of one setting are measured


def tune(
    base: Config,
    materials: Materials,
    methods: Sequence[str] = TUNED,
    *,
    safety: float = 0.01,
    tuning_images: int = 256,
    progress: bool = True,
) -> list[Row]:
    """Choose the best setting of every method, and measure it on other images.

    The rows of the candidates go into ``tuning.jsonl`` of the folder, each with ``tuning_images``
    images and the seed of ``base`` plus 1; the rows of the chosen settings go into ``sweep.jsonl``.
    The next setting is determined by the existing rows alone, so a stopped tuning can be resumed
    and ends with the same tables.

    Parameters
    ----------
    base : Config
        Everything that the settings share; ``num_images`` and ``seed`` are those of the final rows.
    materials : Materials
        Networks, data and classifier; the tables are in its folder.
    methods : sequence of str
        As for :func:`dng_models.class_removal.methods.settings`.  A method without alternatives is
        only measured, at scales that enclose the share.
    safety : float
        Forbidden share at which settings are compared, in (0, 1).
    tuning_images : int
        Number of images per candidate row, at least 1 / ``safety``.
    progress : bool
        Whether to print the chosen settings and show the progress of each row.

    Returns
    -------
    list of dict
        The final rows.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or :func:`dng_models.class_removal.sweeps.sweep` raises.
    OSError
        As for :func:`dng_models.class_removal.sweeps.sweep`.
    """
    safety = checks.real("safety", safety, "in (0, 1)", 0.0, 1.0, closed="()")
    least = math.ceil(1.0 / safety)
    for name, count in (("tuning_images", tuning_images), ("num_images", base.num_images)):
        if checks.integer(name, count, 1) < least:
            raise ValueError(
                f"{name} must be at least {least}, of which one is {100.0 * safety:g}%, got {count}"
            )
    first = [(method, _first(base, method)) for method in methods]
    for _, config in first:
        materials.sources(config)  # raises before anything is drawn if something is missing
    folder = materials.folder
    told = progress and materials.processes.is_main_process

    def measure(config: Config) -> Row:
        final = config.seed == base.seed
        table = folder.table if final else folder.tuning
        sweep([config], materials, keep_first=final, table=table, progress=progress)
        # Read from the table, because `sweep` returns a new row only in the main process.
        return next(row for row in read_table(table) if row["key"] == config.key)

    found: list[Row] = []
    with materials.only_writer(folder.path):
        for method, config in first:
            if config.rule == "none":
                found.append(measure(config))
                continue
            if method in ALTERNATIVES:
                trial = replace(config, num_images=tuning_images, seed=base.seed + 1)
                chosen = choose(trial, ALTERNATIVES[method], safety, measure)
                config = replace(chosen, num_images=base.num_images, seed=base.seed)
                if told:
                    setting = chosen_settings(config.to_json()) or "as it is"
                    say(f"{config.rule}, without {', '.join(base.forget)}: {setting}", sys.stderr)
            found += enclosing(config, safety, measure)
    return found


def expected(
    base: Config, methods: Sequence[str], tuning_images: int
) -> tuple[list[Config], list[Config]]:
    """Stand-ins for the settings of a tuning, to estimate its time: (candidates, final ones).

    Every setting is counted with three scales, because the actual ones depend on the rows.
    """
    trials, finals = [], []
    for method in methods:
        config = _first(base, method)
        finals += [config] * (1 if config.rule == "none" else 3)
        if method in ALTERNATIVES:
            trial = replace(config, num_images=tuning_images, seed=base.seed + 1)
            trials += [trial] * (3 * (1 + sum(map(len, ALTERNATIVES[method]))))
    return trials, finals


def _first(base: Config, method: str) -> Config:
    """The setting at which the search for a method's scale begins."""
    return settings(base, [method], LADDERS.get(method, LADDERS["np"])[1:2])[0]


def choose(
    start: Config, stages: Sequence[Sequence[dict[str, Any]]], safety: float, measure: Measure
) -> Config:
    """The best of a setting and its alternatives at a forbidden share, with its scale there.

    Parameters
    ----------
    start : Config
        The setting without changes; the search begins at its scale.
    stages : sequence of sequence of dict
        The alternatives of each stage, as fields to change in the choice of the earlier stages.
    safety : float
        Forbidden share in (0, 1).
    measure : callable
        Returns the row of a configuration.

    Returns
    -------
    Config
        The one with the smallest product of the Frechet distances of features and of pixels
        (:func:`dng_models.class_removal.compare.badness`); ``start`` if none reaches the share.
    """
    best, least = start, math.inf
    for stage in ((), *stages):
        before = best
        for change in stage or ({},):
            config = replace(before, **change)
            rows = enclosing(config, safety, measure, give_up_above=least)
            (at,) = at_equal_safety(rows, safety)
            if at["guidance_scale"] is not None and badness(at) < least:
                best, least = config.at(_rounded(at["guidance_scale"])), badness(at)
    return best


def enclosing(
    config: Config, safety: float, measure: Measure, *, give_up_above: float = math.inf
) -> list[Row]:
    """Rows of a setting at scales of which two enclose a forbidden share, weakest first.

    The search starts at the setting's own scale and multiplies or divides it by :data:`FACTOR`, or
    a radius by :data:`RADIUS_FACTOR`, for at most :data:`MOST_SCALES` scales.  It stops without
    enclosing the share if the distances (:func:`dng_models.class_removal.compare.badness`) exceed
    ``give_up_above`` and still grow while the share is too large.
    """
    factor = RADIUS_FACTOR if config.rule == "spell" else FACTOR
    rows = [measure(config)]
    while at_equal_safety(rows, safety)[0]["guidance_scale"] is None and len(rows) < MOST_SCALES:
        shares = [forbidden_share(row).value for row in rows]
        scales = [scale_of(row) for row in rows]
        if min(shares) <= safety:
            rows.insert(0, measure(config.at(_rounded(scales[0] / factor))))
            continue
        if len(rows) > 1:
            before, last = (badness(row["metrics"]) for row in rows[-2:])
            if last > max(before, give_up_above):
                break
        rows.append(measure(config.at(_rounded(scales[-1] * factor))))
    return rows


def _rounded(scale: float) -> float:
    return float(f"{scale:.2g}")
