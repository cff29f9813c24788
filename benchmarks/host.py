"""What the host does to start a step on a GPU, measured without one.

In a new process, Triton has a driver that counts launches and starts nothing
(:mod:`benchmarks.stand_in`).  Times are multiples of an empty Triton kernel's, launched the
usual way: the ratio is what holds on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from benchmarks import fresh, harness
from benchmarks.harness import Goal, Settings
from benchmarks.style import seconds_text

EMPTY = "empty kernel, usual launch"
CODE = """
import json, time, warnings
warnings.simplefilter("ignore")
import torch
from benchmarks import stand_in
stand_in.install()
from dng_kernels import BoundStep, StepPlan, StepResult, dng_step, fused, guide, update_posterior
from dng_kernels.naive import Inputs
from dng_math import DDPM, DynamicNegativeGuidance, NoiseSchedule

torch.set_num_threads(1)
plan = StepPlan(
    NoiseSchedule.linear(50).coefficients(DDPM()),
    DynamicNegativeGuidance.tracked(1.0, prior=0.1, temperature=0.1),
)
x, eps, eps_neg, noise = torch.randn(4, 1, 4, 64, 64)
state = plan.init_state(1)
out = StepResult(torch.empty_like(x), torch.empty_like(state))
bound = BoundStep(plan, x, eps, eps_neg, state, noise=noise, out=out, backend="triton")
inputs = Inputs(x, None, eps, eps_neg, None, noise, None, None, state, None)
more = (plan.variants[0], plan.table, plan.indices[3], None, 0, *plan.workspace(1, x[0].numel()))
grid, named = fused.arguments(inputs, out, *more)
given = dict(noise=noise, backend="triton")
x_next, alone = x + 0.1 * noise, dict(backend="triton")

def rebound():
    bound.rebind(x=x, eps=eps, eps_neg=eps_neg)
    bound(3)

runs = {
    "EMPTY": lambda: stand_in.empty[(1,)](x),
    "step's kernel, usual launch": lambda: fused.fused_step[grid](**named, **fused.options(named)),
    "dng_step": lambda: dng_step(plan, 3, x, eps, eps_neg, state, **given),
    "dng_step, outputs given": lambda: dng_step(plan, 3, x, eps, eps_neg, state, out=out, **given),
    "BoundStep": lambda: bound(3),
    "BoundStep, three tensors rebound": rebound,
    "guide": lambda: guide(plan, 3, eps, eps_neg, state, return_scale=True, **alone),
    "update_posterior": lambda: update_posterior(plan, 3, x, x_next, eps, eps_neg, state, **alone),
}
rounds, calls = ROUNDS, CALLS
found = {name: [] for name in runs}
for run in runs.values():
    for _ in range(20):
        run()
for _ in range(rounds):
    for name, run in runs.items():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        found[name].append((time.perf_counter() - start) / calls)
print(json.dumps(found))
"""
GOALS = {
    "dng_step": Goal("at most 2.5x an empty kernel", least_ratio=0.4),
    "dng_step, outputs given": Goal("at most 2.5x an empty kernel", least_ratio=0.4),
    "BoundStep": Goal("at most 1x an empty kernel", least_ratio=1.0),
}


@dataclass(frozen=True)
class HostRow:
    """Host time of one kind of call: a line of the table and of the CSV.

    ``times_empty`` is the median over rounds of its time over the empty kernel's in the same round.
    """

    benchmark: str
    contender: str
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    times_empty: float | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


def calls(settings: Settings) -> list[HostRow]:
    """Host seconds of a call that starts the step at one Stable Diffusion latent."""
    if find_spec("triton") is None or find_spec("torch") is None:
        return [HostRow("calls", EMPTY, note="skipped: torch and Triton must be installed")]
    rounds, number = (2, 50) if settings.quick else (settings.repeats, 2000)
    code = CODE.replace("EMPTY", EMPTY).replace("ROUNDS", str(rounds))
    seconds = json.loads(fresh.said_by(code.replace("CALLS", str(number)), TRITON_INTERPRET="0"))
    rows = []
    for name, own in seconds.items():
        times = float(np.median(np.divide(own, seconds[EMPTY])))
        q25, median, q75 = (float(q) for q in np.quantile(own, [0.25, 0.5, 0.75]))
        row = {"goal": "", "measured": "", "met": ""}
        if (goal := GOALS.get(name)) is not None:
            met = harness.verdict(goal.reached(1.0 / times, median), settings)
            row = {"goal": goal.text, "measured": f"{times:.3g}x", "met": met}
        rows.append(HostRow("calls", name, median, q25, q75, times, **row))
    return rows


PARTS: dict[str, Callable[[Settings], list[HostRow]]] = {"calls": calls}
ROW = HostRow


def report(rows: Sequence[HostRow]) -> list[str]:
    """Host time of every kind of call, and as a multiple of the empty kernel's."""
    return [
        f"{row.contender}: {row.note}"
        if row.median_s is None
        else f"{row.contender}: {seconds_text(row.median_s)}, {row.times_empty:.3g} times the "
        "empty kernel"
        for row in rows
    ]
