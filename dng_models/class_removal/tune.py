"""Every method at its best at one forbidden share, measured where nothing was chosen.

A baseline that runs with the defaults of its authors says little of the method.  So each is given
the alternatives of :data:`dng_models.class_removal.config.ALTERNATIVES`, stage after stage, and
each of these the scales that enclose the wanted forbidden share; the one that is nearest to the
data there is kept.  The images of this choice have a seed of their own.  What is told is measured
with another seed, so that being the best of many does not flatter the chosen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dng_math import _checks
from dng_models.class_removal.compare import (
    at_equal_safety,
    badness,
    chosen_settings,
    forbidden_share,
)
from dng_models.class_removal.config import ALTERNATIVES, LADDERS, TUNED, Config, settings
from dng_models.class_removal.generate import Materials
from dng_models.class_removal.sweep import Row, read_table, sweep
from dng_models.progress import say

Measure = Callable[[Config], Row]

FACTOR = 1.6  # between the scales of a setting
MOST_SCALES = 6  # of one setting


def tune(
    base: Config,
    materials: Materials,
    methods: Sequence[str] = TUNED,
    *,
    safety: float = 0.01,
    tuning_images: int = 256,
    progress: bool = True,
) -> list[Row]:
    """Choose the best setting of every method, and measure it with other images.

    The rows that were chosen from go into ``tuning.jsonl`` of the folder, with the seed after that
    of ``base`` and ``tuning_images`` images each; the rows of what was chosen into ``sweep.jsonl``.
    Which setting comes next is decided by rows alone, so a tuning that was stopped goes on, and
    ends with the same tables.

    Parameters
    ----------
    base : Config
        All that the settings share; ``num_images`` and ``seed`` are those of the final rows.
    materials : Materials
        Networks, data and classifier; the tables are in its folder.
    methods : sequence of str
        As for :func:`dng_models.class_removal.config.settings`.  One without alternatives is only
        measured, at scales that enclose the share.
    safety : float
        Forbidden share at which settings are compared, in (0, 1).
    tuning_images : int
        Images of a row that is chosen from, at least 1 / ``safety``.
    progress : bool
        Say what is tuned, and how far a row is.

    Returns
    -------
    list of dict
        The final rows.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or as for :func:`dng_models.class_removal.sweep.sweep`.
    OSError
        As for :func:`dng_models.class_removal.sweep.sweep`.
    """
    safety = _checks.real("safety", safety, "in (0, 1)", 0.0, 1.0, closed="()")
    least = math.ceil(1.0 / safety)
    for name, count in (("tuning_images", tuning_images), ("num_images", base.num_images)):
        if _checks.integer(name, count, 1) < least:
            raise ValueError(
                f"{name} must be at least {least}, of which one is {100.0 * safety:g}%, got {count}"
            )
    first = [(method, _first(base, method)) for method in methods]
    for _, config in first:
        materials.sources(config)  # what is missing should be known before anything is drawn
    folder = materials.folder
    told = progress and materials.processes.is_main_process

    def measure(config: Config) -> Row:
        final = config.seed == base.seed
        table = folder.table if final else folder.tuning
        sweep([config], materials, keep_first=final, table=table, progress=progress)
        # Only the main process was given a new row.
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
    """About as many settings as a tuning chooses from, and as it measures then.

    Three scales of each; which they are is known only on the way.
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
    """Where the search for a method's scale begins."""
    return settings(base, [method], LADDERS.get(method, LADDERS["np"])[1:2])[0]


def choose(
    start: Config, stages: Sequence[Sequence[dict[str, Any]]], safety: float, measure: Measure
) -> Config:
    """The best of a setting and its alternatives at a forbidden share, with its scale there.

    Parameters
    ----------
    start : Config
        Its scale is where the search begins.
    stages : sequence of sequence of dict
        Alternatives, as the fields that they change in what the stages before have chosen.
    safety : float
    measure : callable
        The row of a configuration.

    Returns
    -------
    Config
        Of the least product of the Frechet distances of features and of pixels.  ``start``, where
        no setting reaches the share.
    """
    best, least = start, math.inf
    for stage in ((), *stages):
        before = best
        for change in stage or ({},):
            config = replace(before, **change)
            rows = enclosing(config, safety, measure, give_up_above=least)
            (at,) = at_equal_safety(rows, safety)
            if at["scale"] is not None and badness(at) < least:
                best, least = replace(config, scale=_rounded(at["scale"])), badness(at)
    return best


def enclosing(
    config: Config, safety: float, measure: Measure, *, give_up_above: float = math.inf
) -> list[Row]:
    """Rows of a setting at scales of which two enclose a forbidden share, weakest first.

    From its own scale the setting goes to stronger or weaker ones, by a constant factor, at most
    :data:`MOST_SCALES` in all.  It gives up, and encloses nothing, where distances that are above
    a bound grow while the share is still too large.
    """
    rows = [measure(config)]
    while at_equal_safety(rows, safety)[0]["scale"] is None and len(rows) < MOST_SCALES:
        shares = [forbidden_share(row).value for row in rows]
        scales = [row["config"]["scale"] for row in rows]
        if min(shares) <= safety:
            rows.insert(0, measure(replace(config, scale=_rounded(scales[0] / FACTOR))))
            continue
        if len(rows) > 1:
            before, last = (badness(row["metrics"]) for row in rows[-2:])
            if last > max(before, give_up_above):
                break
        rows.append(measure(replace(config, scale=_rounded(scales[-1] * FACTOR))))
    return rows


def _rounded(scale: float) -> float:
    return float(f"{scale:.2g}")
