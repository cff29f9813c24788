"""The league where keeping out is hard: rare and frequent, overlapping, and exact digits.

Every rule stands at the strength of its grid that is nearest to the target among those that leak
no more than the limit: 1 %, or a tenth of the forbidden share where that is less, beyond what the
target's own samples have where classes overlap.  The distance of digits is Frechet's, of pixels.
Rules of attention and weighted DNG take part.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dng_models.league.entries import LEAGUE, MORE
from dng_models.league.experiments import HARD, experiment
from dng_models.league.measures import SAMPLERS, Case, Stage, runs
from dng_models.support.progress import progress_bar
from figures import style
from figures.league import (
    IDEAL,
    LOOKS,
    SHOWN_STEPS,
    Data,
    Result,
    case_lines,
    cost,
    gate_lines,
    gates_of,
    overall,
)

PAPER = "beyond it"
TITLE = "The league where it is hard: rare, frequent and overlapping classes, and exact digits"
MINUTES = 3

ENTRIES = (*LEAGUE, *MORE)
IMAGES_OF = 2  # samples of the others to one image of the digits, which take longest
FILLED = {"ancestral": True, "deterministic": False}
APART = 0.17  # of the two samplers of a rule, in rows
UNGUIDED: dict[str, Any] = {"color": style.GREY, "lw": 0.9, "ls": ":"}
NEVER = "#F3DCDC"  # where a rule stands that leaks more at every strength
NEAREST, FARTHEST = 0.5, 8000.0  # in units of the ideal's distance
LABELS = {
    **{name: look.label for name, look in LOOKS.items()},
    "SLD, medium": "SLD, medium",
    "DNG, weighted": "DNG, exact and weighted",
}


def compute(quick: bool, seed: int) -> Data:
    n = 250 if quick else 1000
    cases = [Case(name, sampler, SHOWN_STEPS) for name in HARD for sampler in SAMPLERS]
    done = progress_bar(cases, "league_hard", unit="case", leave=False)
    results = {case: result_of(case, n, seed) for case in done}
    return Data(results, n, gates_of(HARD, n, seed))


def result_of(case: Case, n: int, seed: int) -> Result:
    """Measure every rule; with half as many samples, and strengths, of the digits."""
    pixels, limit = experiment(case.experiment).pixels, experiment(case.experiment).limit
    n = n // IMAGES_OF if pixels else n
    stage = Stage(case, n, seed)
    curves = [
        stage.curve(
            entry,
            (entry.few if pixels else entry.strengths) if runs(entry, case) else (),
            every_error=True,
            limit=limit,
        )
        for entry in ENTRIES
    ]
    return Result(tuple(curves), stage.kept, stage.unguided, stage.ideal, n, limit)


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Distance at the limit, a panel for each experiment, a row for each rule."""
    figure = Figure(figsize=(style.WIDTH, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for panel, name, letter in zip(axes.flat, HARD, "abcdef", strict=True):
        for sampler in SAMPLERS:
            _draw_sampler(panel, data.cases[Case(name, sampler, SHOWN_STEPS)], sampler)
        panel.axvspan(0.62 * FARTHEST, 1.7 * FARTHEST, color=NEVER, lw=0, zorder=0)
        panel.axvline(1, zorder=0, **IDEAL)
        panel.set(xscale="log", xlim=(NEAREST, 1.7 * FARTHEST), ylim=(len(ENTRIES) - 0.5, -0.5))
        panel.set_yticks(range(len(ENTRIES)), [LABELS.get(e.name, e.name) for e in ENTRIES])
        panel.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        panel.set_xticks([], minor=True)
        panel.grid(True)
        style.title(panel, letter, f"{name} (Fréchet)" if experiment(name).pixels else name)
    for panel in axes[-1]:
        panel.set_xlabel("distance, in units of the ideal's")
    handles = [
        *(Line2D([], [], label=name, **_marker(name, style.BLACK)) for name in SAMPLERS),
        Line2D([], [], label="unguided, which leaks", **UNGUIDED),
        Line2D([], [], label="the target's own samples", **IDEAL),
        Patch(color=NEVER, lw=0, label="leaks too much at every strength"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return {"league_hard": figure}


def _marker(sampler: str, color: str) -> dict[str, Any]:
    face = color if FILLED[sampler] else "white"
    return {"color": color, "marker": "o", "ls": "", "markersize": 4.5, "markerfacecolor": face}


def _draw_sampler(panel: Axes, result: Result, sampler: str) -> None:
    """A dot and an interval for every rule that reaches the limit, a cross for the others."""
    ideal = float(result.ideal.nearness[0])
    for row, (entry, curve) in enumerate(zip(ENTRIES, result.curves, strict=True)):
        color = style.BLUE if entry.name.startswith("DNG") else style.VERMILLION
        if not curve.strengths:
            if entry.weights is None:
                panel.text(2 * NEAREST, row, "  not run", va="center", fontsize=6, color=style.GREY)
            continue
        y = row + (-APART if FILLED[sampler] else APART)
        i = curve.best(result.n, result.limit)
        if i is None:
            panel.plot(FARTHEST, y, **{**_marker(sampler, color), "marker": "X"})
            continue
        distance = curve.nearness[i] / ideal
        if curve.frechet is None:
            bar = 1.96 * curve.error[i] / ideal
            ends = [max(distance - bar, NEAREST), distance + bar]
            panel.plot(ends, [y, y], color=color, lw=1.0)
        panel.plot(min(distance, 0.5 * FARTHEST), y, **_marker(sampler, color))
    distance = float(result.unguided.nearness[0]) / ideal
    panel.axvline(distance, zorder=0, **UNGUIDED)


def table(data: Data) -> list[str]:
    """Distances at the limit, in units of the ideal's, as Markdown: ancestral, deterministic."""
    lines = [f"| rule | {' | '.join(HARD)} |", f"|---|{'---:|' * len(HARD)}"]
    for k, entry in enumerate(ENTRIES):
        cells = []
        for name in HARD:
            told = [_told(data.cases[Case(name, sampler, SHOWN_STEPS)], k) for sampler in SAMPLERS]
            cells.append(", ".join(filter(None, told)) or "not run")
        lines.append(f"| {LABELS.get(entry.name, entry.name)} | {' | '.join(cells)} |")
    return lines


def _told(result: Result, k: int) -> str:
    """A dash for a rule that leaks more at every strength, nothing for one that was not run."""
    curve = result.curves[k]
    i = curve.best(result.n, result.limit)
    if i is None:
        return "–" if curve.strengths else ""
    return f"{curve.nearness[i] / result.ideal.nearness[0]:.1f}"


def _every_strength(case: Case, result: Result) -> list[str]:
    """Leak, distance and share outside of every rule at every strength."""
    return [
        f"{case.experiment}, {case.sampler}, {entry.name}, {entry.knob}: "
        + "; ".join(
            f"{strength:g}: {leaked / result.n:.3f}, {distance:.3g}, {left / result.n:.3f}"
            for strength, leaked, distance, left in zip(
                curve.strengths, curve.leaked, curve.nearness, curve.left, strict=True
            )
        )
        for entry, curve in zip(ENTRIES, result.curves, strict=True)
        if curve.strengths
    ]


def summary(data: Data) -> str:
    """The table, the medians, every case at its limit and as published, then every strength."""
    lines = [
        f"n = {data.n}, {data.n // IMAGES_OF} images; at a leak within the limit of each "
        "experiment, at the strength that is then nearest, distance in units of the ideal's, "
        f"{', '.join(SAMPLERS)}:",
        *table(data),
        "cases that reach the limit, median distance, median KL of the classes and collateral:",
    ]
    for sampler in SAMPLERS:
        lines.append(f"{SHOWN_STEPS} steps, {sampler}")
        lines += [
            f"  {entry.name} ({cost(data, entry, k, sampler, SHOWN_STEPS)}): "
            f"{overall(data, k, sampler, SHOWN_STEPS)}"
            for k, entry in enumerate(ENTRIES)
        ]
    for case, result in data.cases.items():
        lines.append(f"limit {result.limit:.4f}, {result.kept} of {result.n} kept unguided")
        lines += case_lines(case, result, ENTRIES)
    lines.append("every strength: leak, distance (Frechet's for digits), outside")
    for case, result in data.cases.items():
        lines += _every_strength(case, result)
    return "\n".join([*lines, *gate_lines(data.gates)])
