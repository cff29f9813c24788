"""The league of rules as a table: one line for every experiment, sampler, rule and strength.

Nothing is timed: rows are measures against the exact truth.  Cases are independent and run in two
processes, one thread each, and are written as they end.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

from threadpoolctl import threadpool_limits

from benchmarks import harness
from benchmarks.harness import Settings
from dng_math._jit import available_threads
from dng_math.distances import binomial_interval
from dng_models.league.entries import LEAGUE, MORE, Entry
from dng_models.league.experiments import EASY, HARD, experiment
from dng_models.league.measures import SAMPLERS, Case, Curve, Stage, evaluations, runs
from dng_models.support import extras
from dng_models.support.progress import Progress, say

PROCESSES = 2
SEED = 0
STEPS = (1000, 50, 10)  # a thousand in one dimension only, for time
SAMPLES = {False: 2000, True: 200}  # by quick
IMAGES = {False: 1000, True: 60}  # of the digits
NOT_RULES = ("unguided", "ideal")


@dataclass(frozen=True)
class LeagueRow:
    """A rule at one strength in one case: a line of the CSV.

    Shares are of the n samples but for ``collateral``, of those that are allowed and in the data
    without guidance; intervals are of 95 %, ``distance_error`` is a standard error.  ``ratio`` is
    the distance, Frechet's where there is one, over that of the target's own samples.  ``best`` is
    "yes" at the strength where that is least within ``limit``, ``published`` at the authors'.
    """

    benchmark: str  # the experiment
    contender: str  # the rule
    sampler: str
    steps: int
    n: int
    knob: str
    strength: float | None
    leak: float
    leak_low: float
    leak_high: float
    limit: float
    distance: float
    distance_error: float | None
    frechet: float | None
    ratio: float
    kl: float
    collateral: float | None
    outside: float
    evaluations: float
    state: int
    best: str = ""
    published: str = ""
    goal: str = ""
    measured: str = ""
    met: str = ""


ROW = LeagueRow
UNIT = ("benchmark", "sampler", "steps")  # what is measured, and gone on with, as one


def rows_of(case: Case, n: int, *, few: bool) -> list[LeagueRow]:
    """Measure every rule in one case, at all of its strengths or at every second one."""
    limit = experiment(case.experiment).limit
    with threadpool_limits(1, user_api="blas"):
        stage = Stage(case, n, SEED, threads=1)
        rows = _rows(stage, limit, None, NOT_RULES[0], stage.unguided)
        rows += _rows(stage, limit, None, NOT_RULES[1], stage.ideal)
        for entry in (*LEAGUE, *MORE):
            if runs(entry, case):
                strengths = entry.few if few else entry.strengths
                curve = stage.curve(entry, strengths, every_error=True, limit=limit)
                rows += _rows(stage, limit, entry, entry.name, curve)
    return rows


def _rows(
    stage: Stage, limit: float, entry: Entry | None, name: str, curve: Curve
) -> list[LeagueRow]:
    case, n = stage.case, stage.n
    rows, best, ideal = [], curve.best(n, limit), stage.ideal.nearness[0]
    for i, strength in enumerate(curve.strengths):
        leaked = int(curve.leaked[i])
        low, high = binomial_interval(leaked, n)
        rows.append(
            LeagueRow(
                benchmark=case.experiment,
                contender=name,
                sampler=case.sampler,
                steps=case.steps,
                n=n,
                knob="" if entry is None else entry.knob,
                strength=None if entry is None else strength,
                leak=leaked / n,
                leak_low=low,
                leak_high=high,
                limit=limit,
                distance=float(curve.distance[i]),
                distance_error=curve.error.get(i),
                frechet=None if curve.frechet is None else float(curve.frechet[i]),
                ratio=float(curve.nearness[i] / ideal),
                kl=float(curve.kl[i]),
                collateral=None if curve.hurt is None else int(curve.hurt[i]) / stage.kept,
                outside=int(curve.left[i]) / n,
                evaluations=1 if entry is None else evaluations(entry, curve, i),
                state=0 if entry is None else entry.state(stage.experiment.mixture.dim),
                best="yes" if entry is not None and i == best else "",
                published="yes" if entry is not None and strength == entry.published else "",
            )
        )
    return rows


def _measured(settings: Settings, names: Sequence[str]) -> list[LeagueRow]:
    """Measure all cases of some experiments that are not known, and keep each when it is there."""
    cases = [
        Case(name, sampler, steps)
        for name in names
        for sampler in SAMPLERS
        for steps in (STEPS[1:2] if settings.quick or name in HARD else STEPS)
        if steps < STEPS[0] or name.startswith("1D")
    ]
    todo = [
        case
        for case in cases
        if not settings.is_known(case.experiment, case.sampler, str(case.steps))
    ]
    found: dict[Case, list[LeagueRow]] = {}
    with Progress(len(todo), unit="case", leave=False) as progress:
        for case, rows in _done(todo, settings):
            found[case] = rows
            settings.keep(rows)
            progress.update()
    return [row for case in todo for row in found.get(case, [])]


def _done(todo: Sequence[Case], settings: Settings) -> Iterator[tuple[Case, list[LeagueRow]]]:
    """The cases that begin before the deadline, as they end."""

    def arguments(case: Case) -> tuple[Case, int]:
        pixels = experiment(case.experiment).pixels
        return case, (IMAGES if pixels else SAMPLES)[settings.quick]

    def in_time() -> Iterator[Case]:
        for case in todo:
            if time.monotonic() > settings.deadline:
                return
            yield case

    # New processes import for seconds, which is not worth it for one case.
    processes = min(PROCESSES, available_threads(), len(todo))
    if processes < 2:
        for case in in_time():
            yield case, rows_of(*arguments(case), few=settings.quick)
        return
    waiting, running = in_time(), dict[Future[list[LeagueRow]], Case]()
    # Forked processes would have locks of threads that are not there.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        while True:
            for case in islice(waiting, processes - len(running)):
                running[pool.submit(rows_of, *arguments(case), few=settings.quick)] = case
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def apart(settings: Settings) -> list[LeagueRow]:
    """Classes that lie apart, in 1, 2, 3 and 64 dimensions; 1000, 50 and 10 steps."""
    return _measured(settings, list(EASY))


def shares(settings: Settings) -> list[LeagueRow]:
    """Forbidden shares of 1 %, 50 % and 90 %, and a forbidden class that overlaps another."""
    return _measured(settings, [name for name in HARD if "digit" not in name])


def digits(settings: Settings) -> list[LeagueRow]:
    """Exact digits in 64 dimensions, one forbidden and three."""
    if find_spec("sklearn") is None:
        say(f"left out: the digits need scikit-learn: {extras.cure('sklearn')}")
        return []
    return _measured(settings, [name for name in HARD if "digit" in name])


PARTS: dict[str, Callable[[Settings], list[LeagueRow]]] = {
    "apart": apart,
    "shares": shares,
    "digits": digits,
}


def shown(rows: Sequence[LeagueRow]) -> str:
    """The table that is printed: every rule at its best strength; the CSV has them all."""
    best = [row for row in rows if row.best or row.contender in NOT_RULES]
    return harness.table(best) if best else "nothing new"


def report(rows: Sequence[LeagueRow]) -> list[str]:
    """Every rule in every experiment, at its best strength, as Markdown."""
    lines = []
    for sampler, steps in dict.fromkeys((row.sampler, row.steps) for row in rows):
        own = [row for row in rows if (row.sampler, row.steps) == (sampler, steps)]
        names = list(dict.fromkeys(row.benchmark for row in own))
        lines += ["", f"{steps} steps, {sampler}: distance in units of the ideal's (collateral)"]
        lines += ["", f"| rule | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        for rule in dict.fromkeys(row.contender for row in own):
            if rule in NOT_RULES:
                continue
            cells = [
                _cell([row for row in own if (row.contender, row.benchmark) == (rule, name)])
                for name in names
            ]
            lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[LeagueRow]) -> str:
    """The best row's distance and collateral; a dash where every strength leaks too much."""
    best = next((row for row in rows if row.best), None)
    if best is None:
        return "–" if rows else ""
    ratio = f"{best.ratio:.3g}"
    return ratio if best.collateral is None else f"{ratio} ({best.collateral:.2f})"
