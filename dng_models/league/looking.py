"""When an oracle that looks sees the forbidden: beside the exact posterior, and a tracked one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from dng_math import DDIM, DynamicNegativeGuidance, LogOddsTracker, NoiseSchedule, sample
from dng_math.rules import ASKED_AT, ASKED_OF, asked_steps
from dng_models.league.experiments import Array, experiment
from dng_models.league.measures import SAMPLERS, Case


@dataclass(frozen=True, eq=False)
class Gate:
    """What is seen in E[x0 | x_t] along unguided chains, at S steps.

    Attributes
    ----------
    steps : tuple of int
        The first step, those at which the published method asks, and the last.
    time : ndarray, shape (S,)
        Their times, 1 at the noisy end.
    posterior, seen : ndarray, shape (S,)
        Mean of the exact posterior, and share of the samples in which the forbidden is seen.
    agrees : ndarray, shape (S,)
        Share of the samples whose answer is that of the exact posterior, p(c | x_t) > 1/2.
    found : ndarray, shape (S,)
        Of the samples that end forbidden, the share in which it is seen; NaN if none does.
    error, tracked : ndarray, shape (S,)
        Mean distance from the exact posterior: of the answer, and of the log-odds tracker's.
    """

    steps: tuple[int, ...]
    time: Array
    posterior: Array
    seen: Array
    agrees: Array
    found: Array
    error: Array
    tracked: Array


def gate(case: Case, n: int, seed: int, threads: int | None = None) -> Gate:
    """Ask about unguided chains, as the league's rules of VL-DNP do, without acting on it.

    Parameters
    ----------
    case : Case
    n : int
        Samples of the chain, which are those of the league's unguided one.
    seed : int
    threads : int, optional
        Of the chain; default all cores.
    """
    of = experiment(case.experiment)
    schedule = NoiseSchedule.linear(1000).respace(case.steps)
    tracked = DynamicNegativeGuidance(0.0, LogOddsTracker())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sampler adds", UserWarning)
        run = sample(
            of.mixture,
            schedule,
            tracked,
            n=n,
            forbidden=of.forbidden,
            sampler=DDIM(SAMPLERS[case.sampler]),
            seed=seed,
            record=("trajectory", "exact", "tracked"),
            threads=threads,
        )
    assert run.trajectory is not None and run.exact is not None and run.tracked is not None
    steps = sorted({0, *asked_steps(ASKED_AT, ASKED_OF, case.steps), case.steps - 1})
    ends = of.shows(run.x)
    rows = []
    for step in steps:
        level = case.steps - step  # of the schedule, whose first is the data
        alpha, sigma = float(schedule.alpha[level]), float(schedule.sigma[level])
        seen = of.shows(of.mixture.posterior_mean(run.trajectory[step], alpha, sigma))
        exact, own = np.exp(run.exact[step, 0]), np.exp(run.tracked[step, 0])
        rows.append(
            (
                exact.mean(),
                seen.mean(),
                (seen == (exact > 0.5)).mean(),
                seen[ends].mean() if ends.any() else np.nan,
                np.abs(seen - exact).mean(),
                np.abs(own - exact).mean(),
            )
        )
    return Gate(tuple(steps), run.time[steps], *np.array(rows).T)
