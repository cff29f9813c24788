"""The numbers of a path tracker's update: of a noise level, of the way there, of the tracker."""

from __future__ import annotations

import math
from typing import NamedTuple

from dng_math.schedules import PredictionType, x0_of
from dng_math.trackers import LARGEST_WEIGHED, PathTracker, PathWay, path_way


class Level(NamedTuple):
    """A noise level, and what turns predictions there into noise and into x0.

    ``eps = on_x x + on_prediction prediction``, and a difference of predictions times ``to_x0`` is
    one of x0.
    """

    alpha: float
    sigma: float
    on_x: float
    on_prediction: float
    to_x0: float


def level_of(prediction_type: PredictionType, alpha: float, sigma: float) -> Level:
    """The level at alpha >= 0 and sigma > 0; "epsilon" only with alpha > 0."""
    if prediction_type == "epsilon":
        return Level(alpha, sigma, 0.0, 1.0, -sigma / alpha)
    x0_x = float(x0_of(prediction_type, 1.0, 0.0, alpha, sigma))
    x0_prediction = float(x0_of(prediction_type, 0.0, 1.0, alpha, sigma))
    on_x, on_prediction = (1.0 - alpha * x0_x) / sigma, -alpha * x0_prediction / sigma
    return Level(alpha, sigma, on_x, on_prediction, x0_prediction)


def way_between(before: Level | None, at: Level) -> PathWay:
    """The way between two levels, for differences of predictions as they are."""
    if before is None:
        return PathWay(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    way = path_way(before.alpha, before.sigma, at.alpha, at.sigma)
    return way._replace(pull=way.pull * at.to_x0, pull_before=way.pull_before * before.to_x0)


class Numbers(NamedTuple):
    """What the update takes of a tracker: temperature, offset, bounds, and which form.

    Against the rest ``high`` and ``log_p_max`` bound the odds in its weights, and else the state.
    """

    temperature: float
    offset: float
    low: float
    high: float
    log_p_max: float
    rest: bool


def numbers_of(tracker: PathTracker, temperature: float, offset: float) -> Numbers:
    low, high = tracker.bounds
    rest = tracker.compare == "rest"
    p_max = min(tracker.p_max, LARGEST_WEIGHED)
    if rest:
        high = min(high, math.log(p_max / (1.0 - p_max)))
    return Numbers(temperature, offset, low, high, math.log(p_max), rest)
