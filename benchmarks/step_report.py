"""Report of the times of a step: rows, Markdown tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import style
from benchmarks.contenders import (
    BOUND,
    CASES,
    COMPILED,
    COPY,
    EAGER,
    EMPTY,
    GIVEN,
    KERNEL,
    NAIVE,
    OURS,
    OWN,
    PUBLISHED,
    SEEDED,
    label_of,
)
from benchmarks.device import GRAPH, PLAIN
from benchmarks.style import Look, seconds_text
from dng_models.support.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION, save

SKIPPED = "skipped: "


@dataclass(frozen=True)
class StepRow:
    """Result of one contender at one size: a line of the table and of the CSV.

    ``ratio`` is its time over that of ``baseline`` in the same round and mode; ``bandwidth``, in
    GB/s, is ``bytes`` over its time, and ``peak_percent`` its part of what the card's memory moves
    at most; the floor is the time of a copy of as many bytes in the same run.  ``host_s`` is what
    the host takes to start a call on a GPU.
    """

    benchmark: str
    case: str
    dtype: str
    elements: int
    contender: str
    mode: str = PLAIN
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    bytes: int | None = None
    bandwidth: float | None = None
    peak_percent: float | None = None
    floor_s: float | None = None
    times_floor: float | None = None
    ratio: float | None = None
    baseline: str = ""
    operations: int | None = None
    host_s: float | None = None
    sets: int | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


# ---------------------------------------------------------------------- tables


def report(rows: Sequence[StepRow]) -> list[str]:
    """Times and ratios by size as Markdown, ranges of the ratios, and what was skipped."""
    lines = []
    timed = [row for row in rows if row.median_s is not None]
    groups = dict.fromkeys((row.benchmark, row.dtype, row.mode) for row in timed)
    for device, dtype, mode in groups:
        own = [
            row for row in timed if (row.benchmark, row.dtype, row.mode) == (device, dtype, mode)
        ]
        captured = (device, dtype, GRAPH) in groups
        lines += _group_report(f"{device}, {dtype}{f', {mode}' if captured else ''}", own)
    lines += [
        f"{row.note}: {row.benchmark}, {row.case}, {row.dtype}, {row.contender}"
        for row in rows
        if row.note.startswith(SKIPPED)
    ]
    return lines


def _group_report(where: str, rows: Sequence[StepRow]) -> list[str]:
    cases = list(dict.fromkeys(row.case for row in sorted(rows, key=lambda row: row.elements)))
    made = [row for row in rows if row.contender.endswith((OWN, SEEDED))]
    given = [row for row in rows if row not in made]
    lines = []
    for title, own in (("noise given", given), ("noise made in the step", made)):
        lines += ["", f"{where}, {title}: time of a step", ""]
        lines += _table(
            cases,
            {(_bare(row.contender), row.case): seconds_text(row.median_s or 0.0) for row in own},
        )
    if rows[0].benchmark == "gpu":
        lines += _gpu_tables(where, cases, rows)
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.ratio is not None and row.contender not in (row.baseline, COPY, EMPTY):
            noise = GIVEN if row.contender.endswith(GIVEN) else OWN
            pair = f"{_bare(row.contender)} / {_bare(row.baseline)}, {noise}"
            ratios.setdefault(pair, {})[row.case] = row.ratio
    for row in given:
        if row.times_floor is not None and row.contender != COPY:
            pair = f"{_bare(row.contender)} / {COPY} of its bytes"
            ratios.setdefault(pair, {})[row.case] = row.times_floor
    cells = {
        (pair, case): _times(ratio) for pair, own in ratios.items() for case, ratio in own.items()
    }
    lines += ["", f"{where}: how many times the time", "", *_table(cases, cells), ""]
    for pair, found in ratios.items():
        low, high = min(found.values()), max(found.values())
        lines.append(f"{where}: {pair}: {_times(low)} to {_times(high)} the time")
    return lines


def _gpu_tables(where: str, cases: Sequence[str], rows: Sequence[StepRow]) -> list[str]:
    """Bandwidth, its part of the card's peak, and what the host takes to start a call."""
    tables = {
        "GB/s": {(r.contender, r.case): f"{r.bandwidth:.4g}" for r in rows if r.bandwidth},
        "percent of the card's peak bandwidth": {
            (r.contender, r.case): f"{r.peak_percent:.0f}%" for r in rows if r.peak_percent
        },
        "host time of a call": {
            (r.contender, r.case): seconds_text(r.host_s) for r in rows if r.host_s
        },
    }
    lines = []
    for title, cells in tables.items():
        if cells:
            lines += ["", f"{where}: {title}", "", *_table(cases, cells)]
    if not any(row.peak_percent for row in rows):
        lines += ["", f"{where}: this torch does not tell the card's peak bandwidth"]
    return lines


def _bare(label: str) -> str:
    """A contender's label without its source of noise, unless that is a seed."""
    return label.removesuffix(f", {GIVEN}").removesuffix(f", {OWN}")


def _table(cases: Sequence[str], cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Markdown table with a line for each contender and a column for each case."""
    lines = [["", *map(_short, cases)], ["---"] * (len(cases) + 1)]
    for name in dict.fromkeys(name for name, _ in cells):
        lines.append([name, *(cells.get((name, case), "") for case in cases)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 99.5 else f"{ratio:.0f}x"


def _short(case: str) -> str:
    return next((each.short for each in CASES if each.name == case), case)


# ---------------------------------------------------------------------- a plot

LOOKS = {
    PUBLISHED: Look("published", VERMILLION, "s"),
    NAIVE: Look("naive (plain torch)", ORANGE, "^"),
    OURS: Look("dng_step", BLUE, "o"),
    BOUND: Look("BoundStep", GREEN, "D"),
    COPY: Look("copy of its bytes", BLACK, "x"),
    EMPTY: Look("empty kernel", GREY, "+"),
}


def _panels(device: str) -> dict[str, tuple[str, list[str]]]:
    """Mode and contenders of each panel, by title; all have given noise."""

    def of(*parts: tuple[str, str]) -> list[str]:
        return [*(label_of(name, form, GIVEN) for name, form in parts), COPY]

    if device == "cpu":
        eager, compiled = (
            of((PUBLISHED, form), (NAIVE, form), (OURS, form)) for form in (EAGER, COMPILED)
        )
        eager[-1:-1] = [label_of(BOUND, EAGER, GIVEN)]
        return {"called from Python": (PLAIN, eager), "under torch.compile": (PLAIN, compiled)}
    both = [*of((PUBLISHED, EAGER), (NAIVE, COMPILED), (OURS, KERNEL)), EMPTY]
    return {"started one by one": (PLAIN, both), "replayed from a CUDA graph": (GRAPH, both)}


def draw(rows: Sequence[StepRow], path: Path, where: dict[str, str]) -> str:
    """Plot time against size in float32, on the GPU if it was timed; returns a message."""
    timed = [row for row in rows if row.median_s is not None and row.dtype == "float32"]
    if not timed:
        return "no plot: nothing was timed"
    device = "gpu" if any(row.benchmark == "gpu" for row in timed) else "cpu"
    timed = sorted((row for row in timed if row.benchmark == device), key=lambda row: row.elements)
    try:
        with style.styled():
            figure = style.new_figure(7.2, 3.6)
            panels = figure.subplots(1, 2, sharey=True)
            ends: list[dict[Look, tuple[float, float]]] = []
            for axes, (title, (mode, labels)) in zip(panels, _panels(device).items(), strict=True):
                axes.set_title(title, loc="left")
                ends.append({})
                for label in labels:
                    own = [row for row in timed if (row.contender, row.mode) == (label, mode)]
                    if own:
                        look = LOOKS[label.partition(",")[0]]
                        sizes = [row.elements for row in own]
                        times = [row.median_s or 0.0 for row in own]
                        axes.plot(sizes, times, color=look.color, marker=look.marker)
                        ends[-1][look] = sizes[-1], times[-1]
                axes.set_xscale("log", base=2)
                names = {row.elements: _short(row.case) for row in timed}
                axes.set_xticks(list(names), list(names.values()), rotation=60, ha="right")
                axes.tick_params("x", which="minor", bottom=False)
                style.seconds_axis(axes)
            panels[0].set_ylabel("time of a step")
            for axes, own_ends in zip(panels, ends, strict=True):
                style.name_lines(axes, own_ends)
            figure.supxlabel(
                "what is denoised (x images at once; SD: latents of Stable Diffusion 1.5), placed "
                f"by its elements: {timed[0].elements:,} to {timed[-1].elements:,}",
                fontsize=7.5,
            )
            threads = f"{where['cpu']}, {where['torch_threads']} threads"
            machine = where["gpu"] if device == "gpu" else threads
            figure.suptitle(
                "One step of Dynamic Negative Guidance in float32, noise given: lower is faster\n"
                f"(medians; {machine}; torch {where['torch']})",
                x=0.01,
                ha="left",
            )
            save(figure, path)
    except ImportError as error:
        return f"no plot: {error}"
    return f"drawn to {path}"
