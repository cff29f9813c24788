"""Rules that keep something out, each swept over its strengths, against the exact truth.

A rule is judged by the share of samples that are still forbidden (leak) and by the distance of
the allowed ones to their exact target, at the strength that suits it best and as published.  The
same random numbers without guidance say which samples it had no reason to touch (collateral).
The bounds are DNG with the exact posterior and samples of the target itself, the ideal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dng_math.distances import binomial_interval
from dng_models.league.entries import LEAGUE, Entry
from dng_models.league.experiments import EASY, LEAK, experiment
from dng_models.league.looking import Gate, gate
from dng_models.league.measures import SAMPLERS, Case, Curve, Stage, evaluations, published, runs
from dng_models.support.progress import progress_bar
from figures import style

PAPER = "beyond it"
TITLE = "The league: every rule's leak against its distance, swept, in six exact experiments"
MINUTES = 4

SHOWN_STEPS = 50
MANY_STEPS = 1000  # in one dimension only, for time
STEPS = (MANY_STEPS, SHOWN_STEPS, 10)
QUICK_STEPS = (SHOWN_STEPS,)
UNGUIDED: dict[str, Any] = {"color": style.GREY, "marker": "v", "markersize": 6}
IDEAL: dict[str, Any] = {"color": style.BLACK, "lw": 0.9, "ls": "-"}
NONE_LEFT = "#E8E8E8"
LOOKS = {
    "DNG, exact": style.DNG_EXACT,
    "DNG, paper's": style.DNG_PAPER,
    "DNG, log-odds": style.DNG_LOG_ODDS,
    "DNG, path": style.DNG_PATH,
    "DNG, 16 images": style.Method("DNG, 16 images", "#8C564B", "-", "*"),
    "NP": style.NP,
    "SLD, medium": style.SLD,
    "CCFG": style.CCFG,
    "GeoGuide": style.Method("GeoGuide", style.BLUE, "--", "<"),
    "CRG": style.Method("CRG", "#E377C2", "--", "h"),
    "SPELL": style.Method("SPELL", "#7F7F00", "-", ">"),
    "VL-DNP": style.Method("VL-DNP, 10 questions", "#332288", "-", "d"),
    "VL-DNP, 50 questions": style.Method("VL-DNP, 50 questions", "#9467BD", "-", "s"),
}


@dataclass(frozen=True, eq=False)
class Result:
    """All of one case."""

    curves: tuple[Curve, ...]  # as the entries
    kept: int  # samples that are allowed and in the data without guidance
    unguided: Curve
    ideal: Curve
    n: int
    limit: float  # of the leak, at which rules are compared


@dataclass(frozen=True, eq=False)
class Data:
    """All results, the samples of each chain, and when the oracle sees the forbidden."""

    cases: dict[Case, Result]
    n: int
    gates: dict[str, Gate] = field(default_factory=dict)  # by experiment


def compute(quick: bool, seed: int) -> Data:
    n = 1000 if quick else 4000
    cases = [
        Case(name, sampler, steps)
        for name in EASY
        for sampler in SAMPLERS
        for steps in (QUICK_STEPS if quick else STEPS)
        if steps < MANY_STEPS or experiment(name).mixture.dim == 1
    ]
    done = progress_bar(cases, "league", unit="case", leave=False)
    results = {case: _result(case, n, seed) for case in done}
    return Data(results, n, gates_of(EASY, n, seed))


def gates_of(names: Iterable[str], n: int, seed: int) -> dict[str, Gate]:
    """When the oracle sees the forbidden in unguided chains with noise, by experiment."""
    return {name: gate(Case(name, "ancestral", SHOWN_STEPS), n, seed) for name in names}


def _result(case: Case, n: int, seed: int) -> Result:
    stage = Stage(case, n, seed)
    curves = [
        stage.curve(
            entry, entry.strengths if runs(entry, case) else (), every_error=False, limit=LEAK
        )
        for entry in LEAGUE
    ]
    return Result(tuple(curves), stage.kept, stage.unguided, stage.ideal, n, LEAK)


def best(data: Data, case: Case, k: int) -> int | None:
    """Index of the strength of rule k that is nearest to the target at a leak of 1 %, if any."""
    return data.cases[case].curves[k].best(data.n, LEAK)


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Leak against distance at 50 steps, a panel for each experiment and sampler."""
    figure = Figure(figsize=(style.WIDTH, 8.4), layout="constrained")
    axes = figure.subplots(4, 3, sharex=True)
    for i, name in enumerate(EASY):
        pair = axes[2 * (i // 3) : 2 * (i // 3) + 2, i % 3]
        for panel, sampler in zip(pair, SAMPLERS, strict=True):
            draw_panel(panel, data.cases[Case(name, sampler, SHOWN_STEPS)], LEAGUE, LOOKS)
            number = list(axes.T.flat).index(panel)
            row, column = number % 4, number // 4
            style.title(panel, "abcdefghijkl"[3 * row + column], f"{name},\n{sampler}")
    for panel in axes[:, 0]:
        panel.set_ylabel("distance of the allowed")
    for panel in axes[-1]:
        panel.set_xlabel("leak: forbidden share")
    figure.legend(
        handles=handles(LEAGUE, LOOKS, f"leak less than 1 in {data.n:,}"),
        loc="outside lower center",
        ncols=4,
    )
    return {"league": figure}


def draw_panel(
    panel: Axes, result: Result, entries: Sequence[Entry], looks: dict[str, style.Method]
) -> None:
    """Leak against distance of one case, on logarithmic axes; the left is of samples that leak."""
    floor = 0.5 / result.n
    for entry, curve in zip(entries, result.curves, strict=True):
        leak = np.maximum(curve.leaked / result.n, floor)
        panel.plot(leak, curve.distance, **look(entry, looks))
    distance = float(result.unguided.distance[0])
    panel.plot(result.unguided.leaked / result.n, result.unguided.distance, ls="", **UNGUIDED)
    panel.axhline(result.ideal.distance[0], **IDEAL)
    panel.axvspan(floor / 1.6, 1 / result.n, color=NONE_LEFT, lw=0)
    panel.axvline(result.limit, color=style.GREY, lw=0.6, ls="--", zorder=0)
    panel.set(xscale="log", yscale="log", xlim=(floor / 1.6, 0.5))
    curves = (c.distance.min() for c in result.curves if len(c.distance))
    low = 0.7 * min(float(result.ideal.distance[0]), *curves)
    panel.set_ylim(low, max(100 * low, 12 * distance))
    style.log_ticks(panel.yaxis)
    panel.grid(True)


def handles(
    entries: Sequence[Entry], looks: dict[str, style.Method], none_left: str
) -> list[Line2D | Patch]:
    """Of the legend: rules, the unguided, the ideal, and the part where nothing leaks."""
    return [
        *(Line2D([], [], label=looks[e.name].label, **look(e, looks)) for e in entries),
        Line2D([], [], label="unguided", ls="", **UNGUIDED),
        Line2D([], [], label="ideal: the target's own samples", **IDEAL),
        Patch(color=NONE_LEFT, lw=0, label=none_left),
    ]


def look(entry: Entry, looks: dict[str, style.Method]) -> dict[str, Any]:
    first = looks[entry.name] is style.DNG_EXACT
    return {
        **looks[entry.name].line,
        "markersize": 5.5 if first else 3.5,
        "lw": 1.0,
        "zorder": 4 if first else 3 if entry.name.startswith("DNG") else 2,
    }


def cell(result: Result, entry: Entry, curve: Curve, i: int) -> str:
    """Strength, leak with its interval, distance with its error, and the other measures."""
    leaked, n = int(curve.leaked[i]), result.n
    low, high = binomial_interval(leaked, n)
    told = (
        f"{entry.knob} {curve.strengths[i]:g}: leak {leaked / n:.4f} "
        f"[{low:.4f}, {high:.4f}], distance {curve.distance[i]:.3f} +- {1.96 * curve.error[i]:.3f}"
    )
    if curve.hurt is not None:
        told += f", collateral {curve.hurt[i] / result.kept:.3f}"
    told += f", outside {curve.left[i] / n:.3f}, KL {curve.kl[i]:.4f}"
    if curve.frechet is not None:
        told += f", Frechet {curve.frechet[i]:.2f}"
    if curve.evaluations is not None:
        told += f", {curve.evaluations[i]:.3f} evaluations a step"
    return told


def case_lines(case: Case, result: Result, entries: Sequence[Entry]) -> list[str]:
    """A case: the bounds, then every rule at its best within the limit, and as published."""
    told = (
        f"{name} leak {curve.leaked[0] / result.n:.4f}, distance {curve.distance[0]:.3f}, "
        f"KL {curve.kl[0]:.4f}"
        + ("" if curve.frechet is None else f", Frechet {curve.frechet[0]:.2f}")
        for name, curve in (("unguided", result.unguided), ("ideal", result.ideal))
    )
    lines = [f"{case.experiment}, {case.sampler}, {case.steps} steps: {'; '.join(told)}"]
    for entry, curve in zip(entries, result.curves, strict=True):
        if not curve.strengths:
            continue
        at, as_published = curve.best(result.n, result.limit), published(entry, curve.strengths)
        told_best = f"leaks more at every {entry.knob}"
        if at is not None:
            told_best = cell(result, entry, curve, at)
        if as_published is not None and as_published != at:
            told_best += f" | published {cell(result, entry, curve, as_published)}"
        lines.append(f"  {entry.name}: {told_best}")
    return lines


def cost(data: Data, entry: Entry, k: int, sampler: str, steps: int) -> str:
    """Evaluations a step; the median at the best strengths where the samples decide."""
    if entry.evaluations is not None:
        return f"{entry.evaluations} a step"
    found = [
        evaluations(entry, result.curves[k], i)
        for case, result in data.cases.items()
        if (case.sampler, case.steps) == (sampler, steps)
        and (i := result.curves[k].best(result.n, result.limit)) is not None
    ]
    return f"{np.median(found):.2f} a step" if found else "1 to 2 a step"


def overall(data: Data, k: int, sampler: str, steps: int) -> str:
    """In how many cases a rule reaches the limit, and its medians there."""
    chosen = [
        result
        for case, result in data.cases.items()
        if (case.sampler, case.steps) == (sampler, steps) and result.curves[k].strengths
    ]
    found = [
        (result, result.curves[k], i)
        for result in chosen
        if (i := result.curves[k].best(result.n, result.limit)) is not None
    ]
    if not chosen:
        return "not run"
    if not found:
        return f"0 of {len(chosen)}"
    ratio = np.median([curve.nearness[i] / r.ideal.nearness[0] for r, curve, i in found])
    kl = np.median([curve.kl[i] for _, curve, i in found])
    hurt = [curve.hurt[i] / r.kept for r, curve, i in found if curve.hurt is not None]
    collateral = f", {np.median(hurt):.3f}" if hurt else ""
    return f"{len(found)} of {len(chosen)}, {ratio:.1f} x, KL {kl:.4f}{collateral}"


def gate_lines(gates: Mapping[str, Gate]) -> list[str]:
    """Two tables, as Markdown: when the oracle is right, and how far the answer is from p."""
    if not gates:
        return []
    times = next(iter(gates.values())).time
    heading = [
        f"| time | {' | '.join(f'{time:.2f}' for time in times)} |",
        f"|---|{'---:|' * len(times)}",
    ]
    lines = [
        "the oracle's answer along unguided chains with noise: agreement with the exact posterior "
        "> 1/2 (of those that end forbidden, seen)",
        *heading,
    ]
    for name, of in gates.items():
        cells = [f"{a:.3f} ({f:.3f})" for a, f in zip(of.agrees, of.found, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "mean distance from the exact posterior: of the answer, of the log-odds tracker's",
        *heading,
    ]
    for name, of in gates.items():
        cells = [f"{e:.3f}, {t:.3f}" for e, t in zip(of.error, of.tracked, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def summary(data: Data) -> str:
    """First the medians, then every case at a leak of 1 % and as published."""
    lines = [
        f"n = {data.n}; at a leak of {LEAK:.0%} or less, at the strength that is then nearest: "
        "cases that reach it, median distance in units of the ideal's, median KL of the classes, "
        "median collateral"
    ]
    for steps in sorted({case.steps for case in data.cases}, reverse=True):
        for sampler in SAMPLERS:
            lines.append(f"{steps} steps, {sampler}")
            lines += [
                f"  {entry.name} ({cost(data, entry, k, sampler, steps)}): "
                f"{overall(data, k, sampler, steps)}"
                for k, entry in enumerate(LEAGUE)
            ]
    for case, result in data.cases.items():
        lines += case_lines(case, result, LEAGUE)
    return "\n".join([*lines, *gate_lines(data.gates)])
