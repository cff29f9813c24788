"""One step of Dynamic Negative Guidance: published, plain torch and ours; eager and compiled.

Only like is compared with like: eager with eager and compiled with compiled steps, given with given
and own with own noise, launched one by one or replayed from a CUDA graph.  Every contender's values
are checked at every size before it is timed.  Bandwidth has one definition for all: the bytes that
a step must move (each input read once, each output written once) over its time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from benchmarks import harness
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
    Case,
    Entry,
    Tensors,
    check_entry,
    check_published,
    compiled_entries,
    eager_entries,
    kernel_entries,
    label_of,
    make_plan,
    make_tensors,
    no_compiler,
    other_entries,
    step_bytes,
)
from benchmarks.device import GRAPH, PLAIN, Device, cpu_device, gpu_device, named_devices
from benchmarks.harness import Contender, Goal, Settings, Timing, first_words
from benchmarks.step_report import SKIPPED, StepRow, draw, report
from dng_kernels import StepPlan
from dng_models.support.progress import Progress, is_shown, say

__all__ = ["PARTS", "ROW", "draw", "named_devices", "report"]

QUICK = CASES[:2]
DTYPES = (torch.float32, torch.bfloat16)
LARGEST_ON_CPU = 2**22  # elements; larger sizes show nothing new and take minutes more
SLOW = 0.5  # seconds: slower steps are timed in SLOW_ROUNDS rounds only
SLOW_ROUNDS = 2
LARGE = 64 * 2**20  # bytes: the time of a step on larger tensors is limited by bandwidth
MOST_SETS = 256  # input sets, and steps in a graph
LONGEST_LAP = 0.05  # seconds: a lap that takes longer does not use every set
OUTGROW = 2.0  # size of all sets over that of the cache: a set has left it before its next turn


# ---------------------------------------------------------------------- what is compared


def form_of_ours(device: Device) -> str:
    return KERNEL if device.kernel else EAGER


def baseline_of(entry: Entry, device: Device) -> str:
    """Label of our step in the form, and with the source of noise, that compare with an entry."""
    form = form_of_ours(device)
    if not device.kernel and entry.form == COMPILED and entry.name != OURS:
        form = COMPILED
    made_there = SEEDED if device.kernel else OWN
    if not device.kernel and (entry.name, entry.form, entry.noise) == (PUBLISHED, EAGER, GIVEN):
        return label_of(BOUND, EAGER, GIVEN)
    return label_of(OURS, form, GIVEN if entry.noise in ("", GIVEN) else made_there)


def goal_of(entry: Entry, mode: str, case: Case, tensors: Tensors, device: Device) -> Goal | None:
    """The goal of our step against this contender, if there is one."""
    ours = label_of(OURS, form_of_ours(device))
    if not device.kernel:
        if (entry.name, entry.form, entry.noise) == (PUBLISHED, EAGER, GIVEN):
            return Goal(f"{label_of(BOUND, EAGER)} at least 2x faster", least_ratio=2.0)
        return None
    if case.stable_diffusion and entry.noise == GIVEN:
        if (entry.name, entry.form) == (PUBLISHED, EAGER):
            return Goal(f"{ours} at least 15x faster", least_ratio=15.0)
        if entry.form.startswith(COMPILED):
            return Goal(f"{ours} at least 3x faster", least_ratio=3.0)
    if case.stable_diffusion and entry.name == EMPTY and mode == GRAPH:
        return Goal(f"{ours} in at most 1.5x the time", least_ratio=1.0 / 1.5)
    large = tensors.x.numel() * tensors.x.element_size() >= LARGE
    if large and entry.name == COPY and mode == GRAPH:
        return Goal(f"{ours} at no less than 90 % of its bandwidth", least_ratio=0.9)
    return None


# ---------------------------------------------------------------------- one size


def number_of_sets(tensors: Tensors, device: Device) -> int:
    """Number of input sets such that a set has left the cache before its next turn."""
    return min(MOST_SETS, max(1, math.ceil(OUTGROW * device.cache / step_bytes(tensors, GIVEN))))


def lap(
    run: Callable[[Tensors], object], sets: Sequence[Tensors], calls: int
) -> Callable[[], None]:
    """A function that takes many steps in a row, each with the next set."""

    def go() -> None:
        for i in range(calls):
            run(sets[i % len(sets)])

    return go


def calls_of_lap(once: float, sets: Sequence[Tensors], device: Device) -> int:
    """Number of steps that is long enough for the clock and uses every set.

    Slow contenders use fewer sets, which outgrow the cache with what they allocate themselves.
    """
    wanted = math.ceil(device.least_lap / max(once, 1e-9))
    affordable = math.ceil(LONGEST_LAP / max(once, 1e-9))
    return min(MOST_SETS, max(wanted, min(len(sets), affordable)))


def check(
    entries: Sequence[Entry], what: str, tensors: Tensors, plan: StepPlan, dtype: torch.dtype
) -> None:
    """Raise unless every contender's values are right; the first calls, here, compile."""
    compiled = sum(entry.form.startswith(COMPILED) for entry in entries)
    if compiled and is_shown() and not sys.stderr.isatty():
        say(f"{what}: compiling {compiled} steps, a few seconds each", sys.stderr)
    with Progress(len(entries), unit="step", leave=False) as progress:
        for entry in entries:
            doing = "compiling" if entry.form.startswith(COMPILED) else "checking"
            progress.set_description(f"{what}: {doing} {entry.label}")
            check_entry(entry, tensors, plan, dtype)
            progress.update()


def time_case(case: Case, dtype: torch.dtype, device: Device, settings: Settings) -> list[StepRow]:
    """Check and time every contender at one size, interleaved."""
    dtype_name = str(dtype).removeprefix("torch.")
    blank = StepRow(device.name, case.name, dtype_name, case.elements, "")
    # Inputs, the copy's buffers and the temporaries of the published sequence.
    needed, free = 24 * case.elements * dtype.itemsize, device.free()
    if needed > free:
        reason = f"needs {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} are free"
        return [replace(blank, contender="all", note=f"{SKIPPED}{reason}")]
    plan = make_plan(device)
    sets = [make_tensors(case, dtype, plan)]
    count = number_of_sets(sets[0], device)
    sets += [make_tensors(case, dtype, plan, seed) for seed in range(1, count)]

    entries = [*eager_entries(plan, dtype, device), *kernel_entries(plan, device)]
    compiled = compiled_entries(plan, dtype, device, case)
    rows = []
    if compiled and (reason := no_compiler(device)):
        note = f"{SKIPPED}{reason}"
        rows += [replace(blank, contender=entry.label, note=note) for entry in compiled]
    else:
        entries += compiled
    check(entries, f"{case.name}, {dtype_name}", sets[0], plan, dtype)
    entries += other_entries(sets[0], device)

    jobs: list[tuple[Entry, str, Contender, int | None, float | None]] = []
    for entry in entries:
        own = sets[:1] if entry.one_set else sets
        entry.run(own[0])
        once = min(device.clock(partial(entry.run, own[0])) for _ in range(3))
        calls = calls_of_lap(once, own, device)
        operations = device.launches(partial(entry.run, own[0]))
        host = None if device.host is None else device.host(partial(entry.run, own[0]))
        for mode in (PLAIN, GRAPH):
            go: Callable[[], object] = lap(entry.run, own, calls)
            note = entry.note
            if mode == GRAPH:
                if device.capture is None:
                    continue
                try:
                    go = device.capture(lap(entry.in_graph or entry.run, own, calls))
                except RuntimeError as error:
                    reason = f"{SKIPPED}no graph can hold it: {first_words(error)}"
                    rows.append(replace(blank, contender=entry.label, mode=mode, note=reason))
                    continue
                note = "; ".join(filter(None, [entry.note, entry.graph_note]))
            contender = Contender(
                f"{entry.label} ({mode})",
                go,
                warm_up=harness.nothing if once > SLOW else None,
                rounds=SLOW_ROUNDS if once > SLOW else None,
                goal=goal_of(entry, mode, case, sets[0], device),
                note=note,
                calls=calls,
                baseline=f"{baseline_of(entry, device)} ({mode})",
                clock=device.clock,
            )
            jobs.append((entry, mode, contender, operations, host if mode == PLAIN else None))
    contenders = [contender for _, _, contender, *_ in jobs]
    timings = harness.measure(contenders, settings.repeats, settings.deadline)

    floor = copy_per_byte(entries, timings)
    found = []
    for entry, mode, contender, operations, host in jobs:
        row = replace(
            timed_row(blank, entry, contender, timings[contender.name], settings),
            mode=mode,
            baseline=contender.baseline.removesuffix(f" ({mode})"),
            operations=operations,
            host_s=host,
            sets=1 if entry.one_set else min(len(sets), contender.calls),
        )
        moved = entry.moved or (step_bytes(sets[0], entry.noise) if entry.noise else 0)
        if moved and row.median_s is not None:
            row = replace(
                row,
                bytes=moved,
                bandwidth=moved / row.median_s * 1e-9,
                peak_percent=100.0 * moved / row.median_s / device.peak if device.peak else None,
                floor_s=moved * floor,
                times_floor=row.median_s / (moved * floor),
            )
        if case.stable_diffusion and operations and entry.label == label_of(OURS, KERNEL, GIVEN):
            met = harness.verdict(operations == 1, settings)
            row = replace(row, goal="one launch", measured=f"{operations}", met=met)
        found.append(row)
    return found + rows


def copy_per_byte(entries: Sequence[Entry], timings: Mapping[str, Timing]) -> float:
    """Seconds per byte of the copy, replayed from a graph where there are graphs."""
    mode = GRAPH if f"{COPY} ({GRAPH})" in timings else PLAIN
    moved = next(entry.moved for entry in entries if entry.name == COPY)
    return timings[f"{COPY} ({mode})"].median / moved


def timed_row(
    blank: StepRow, entry: Entry, contender: Contender, timing: Timing, settings: Settings
) -> StepRow:
    """Row with a contender's times and the verdict on its goal."""
    row = replace(
        blank,
        contender=entry.label,
        median_s=timing.median,
        q25=timing.q25,
        q75=timing.q75,
        ratio=None if math.isnan(timing.ratio) else timing.ratio,
        note=contender.note,
    )
    if contender.goal is None or row.ratio is None:
        return row
    return replace(
        row,
        goal=contender.goal.text,
        measured=contender.goal.measured(row.ratio, timing.median),
        met=harness.verdict(contender.goal.reached(row.ratio, timing.median), settings),
    )


def time_cases(device: Device, cases: Sequence[Case], settings: Settings) -> list[StepRow]:
    for dtype in (torch.float64, torch.float32):
        check_published(device, dtype)
    rows = []
    jobs = list(product(cases, DTYPES[:1] if settings.quick else DTYPES))
    with torch.inference_mode(), Progress(len(jobs), unit="size", leave=False) as progress:
        for i, (case, dtype) in enumerate(jobs):
            name = str(dtype).removeprefix("torch.")
            progress.set_description(f"{case.name}, {name}")
            if not settings.is_known(device.name, case.name, name):
                found = time_case(case, dtype, device, settings.share(len(jobs) - i))
                settings.keep(found)
                rows += found
            torch.cuda.empty_cache()
            progress.update()
    return rows


# ---------------------------------------------------------------------- parts


def cpu(settings: Settings) -> list[StepRow]:
    """Steps on the CPU, all threads that torch takes."""
    cases = QUICK if settings.quick else [c for c in CASES if c.elements <= LARGEST_ON_CPU]
    return time_cases(cpu_device(), cases, settings)


def gpu(settings: Settings) -> list[StepRow]:
    """Steps on the GPU, launched one by one and replayed from CUDA graphs."""
    if not torch.cuda.is_available():
        reason = f"{SKIPPED}torch sees no GPU"
        steps = [(PUBLISHED, EAGER), (PUBLISHED, COMPILED), (NAIVE, EAGER), (NAIVE, COMPILED)]
        steps += [(OURS, KERNEL), (BOUND, KERNEL)]
        names = [label_of(name, form, GIVEN) for name, form in steps]
        names += [label_of(OURS, KERNEL, SEEDED), COPY, EMPTY]
        return [StepRow("gpu", "all", "all", 0, name, note=reason) for name in names]
    return time_cases(gpu_device(), QUICK if settings.quick else CASES, settings)


PARTS: dict[str, Callable[[Settings], list[StepRow]]] = {"cpu": cpu, "gpu": gpu}
ROW = StepRow
