"""Times of imports, of the first use on a machine, and of later first uses in a new process.

Everything is timed in new processes of the same Python, in turns, from their start until they
print that they are done.  All of these times include Python's own start, which is also timed alone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

from benchmarks import fresh, harness
from benchmarks.harness import Contender, Goal, Settings
from benchmarks.style import seconds_text
from dng_models.support import extras

PYTHON = "Python alone"
SLOW_ROUNDS = 3
# Ends the process at once, so that Python's shutdown is not timed.
RETURNED = """
import os
print("returned", flush=True)
os._exit(0)
"""
# Packages that each statement needs.  dng_math and dng_models load most names on first use.
IMPORTS = {
    "import numpy": ("numpy",),
    "import dng_math": (),
    "from dng_math import sample": (),
    "import torch": ("torch",),
    "import dng_kernels": ("torch",),
    "import dng_models": (),
    "import diffusers": ("diffusers",),
    "from diffusers import DiffusionPipeline": ("diffusers",),
    "from dng_models import apply_guidance": ("diffusers",),
}
SAMPLE = """
from dng_math import DynamicNegativeGuidance, GaussianMixture, NoiseSchedule, PaperTracker, sample
mixture = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
rule = DynamicNegativeGuidance(posterior=PaperTracker())
sample(mixture, NoiseSchedule.linear(100), rule, n=1000, forbidden=[1])
"""
STEP = """
import torch
from dng_kernels import StepPlan, dng_step
from dng_math import DDPM, DynamicNegativeGuidance, NoiseSchedule, PaperTracker
rule = DynamicNegativeGuidance(posterior=PaperTracker(prior=0.1))
plan = StepPlan(NoiseSchedule.linear().coefficients(DDPM()), rule)
x, eps, eps_neg = torch.randn(3, 1, 4, 64, 64)
dng_step(plan, 0, x, eps, eps_neg, plan.init_state(1), seed=0)
"""


@dataclass(frozen=True)
class StartRow:
    """Result for one kind of process: a line of the table and of the CSV.

    ``beyond_python_s`` is its median minus that of Python alone.
    """

    benchmark: str
    contender: str
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    beyond_python_s: float | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


def timed(benchmark: str, contenders: Sequence[Contender], settings: Settings) -> list[StartRow]:
    """Time every kind of process, and Python alone."""
    alone = Contender(PYTHON, partial(fresh.said_by, RETURNED))
    timings = harness.measure([alone, *contenders], settings.repeats)
    rows = []
    for contender in (alone, *contenders):
        found = timings[contender.name]
        beyond = found.median - timings[PYTHON].median
        row = StartRow(benchmark, contender.name, found.median, found.q25, found.q75, beyond)
        row = replace(row, note=contender.note)
        if (goal := contender.goal) is not None:
            met = harness.verdict(goal.reached(1.0, found.median), settings)
            measured = goal.measured(1.0, found.median)
            row = replace(row, goal=goal.text, measured=measured, met=met)
        rows.append(row)
    return rows


def imports(settings: Settings) -> list[StartRow]:
    """Seconds that a new process takes to import each package, with its files in the page cache."""
    contenders, missing = [], []
    for line, packages in IMPORTS.items():
        absent = [package for package in packages if find_spec(package) is None]
        if absent:
            note = f"skipped: {absent[0]} is not installed: {extras.cure(absent[0])}"
            missing.append(StartRow("imports", line, note=note))
        else:
            contenders.append(Contender(line, partial(fresh.said_by, line + RETURNED)))
    return [*timed("imports", contenders, settings), *missing]


def first_use(settings: Settings) -> list[StartRow]:
    """Seconds until the first sample of a new process, with and without compiled code on disk."""
    with tempfile.TemporaryDirectory() as folder:
        sample = partial(fresh.said_by, SAMPLE + RETURNED, NUMBA_CACHE_DIR=folder)

        def without_cache() -> None:
            shutil.rmtree(folder)
            os.mkdir(folder)
            sample()

        contenders = [
            Contender(
                "first sample of a mixture, ever",
                without_cache,
                harness.nothing,
                1 if settings.quick else SLOW_ROUNDS,
                Goal("at most 20 s", most_seconds=20.0),
                "Numba's cache is empty, and everything is compiled",
            ),
            # The contender before it has filled the cache.
            Contender(
                "first sample of a mixture, later", sample, harness.nothing, note="compiled before"
            ),
        ]
        missing = []
        if find_spec("torch") is None:
            note = f"skipped: torch is not installed: {extras.cure('torch')}"
            missing.append(StartRow("first use", "first dng_step on the CPU", note=note))
        else:
            run = partial(fresh.said_by, STEP + RETURNED)
            contenders.append(Contender("first dng_step on the CPU", run, note="nothing compiles"))
        return [*timed("first use", contenders, settings), *missing]


PARTS: dict[str, Callable[[Settings], list[StartRow]]] = {
    "imports": imports,
    "first use": first_use,
}
ROW = StartRow


def report(rows: Sequence[StartRow]) -> list[str]:
    """Time of every kind of process from its start, and how much of it exceeds Python alone."""
    return [
        f"{row.benchmark}: {row.contender}: {row.note}"
        if row.median_s is None or row.beyond_python_s is None
        else f"{row.benchmark}: {row.contender}: {seconds_text(row.median_s)}, "
        f"{seconds_text(max(row.beyond_python_s, 0.0))} beyond Python alone"
        for row in rows
    ]
