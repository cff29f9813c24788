"""Exact mixtures on the CPU: dng_math against NumPy, SciPy, scikit-learn, torch and JAX.

Every part checks values before it times them.  dng_math uses all cores; the others use as many
threads as they do by default, which the rows say.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks import fresh, harness, rivals
from benchmarks.harness import (
    Contender,
    Goal,
    Row,
    Settings,
    check_close,
    compare,
    nothing,
    skipped,
)
from benchmarks.style import seconds_text
from dng_math import (
    DynamicNegativeGuidance,
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    noise,
    sample,
)
from dng_models.support.threads import torch_threads

Array = NDArray[np.float64]
SLOW_ROUNDS = 3


# ---------------------------------------------------------------------- chain


def fused_chain(job: rivals.Job, n: int, seed: int, threads: int | None = None) -> Array:
    """Samples, shape (N,), by dng_math."""
    result = sample(
        job.mixture,
        job.schedule,
        job.rule,
        n=n,
        forbidden=[job.forbidden],
        seed=seed,
        threads=threads,
    )
    return result.x[:, 0]


def same_noise(n: int, seed: int) -> rivals.Draw:
    """A source of the normals that dng_math's own chain uses."""

    def draw(step: int, out: Array) -> None:
        initial = step == rivals.INITIAL
        stream = noise.INITIAL_STREAM if initial else noise.STEP_STREAM
        z = noise.standard_normal(seed, n, 1, step=0 if initial else step, stream=stream)
        out[:] = z[:, 0]

    return draw


def check_modes(what: str, job: rivals.Job, x: Array, expected: Array) -> None:
    """Raise if the modes' shares in two independent samples (N,) differ by more than chance."""
    means = np.sort(job.mixture.means[:, 0])
    edges = [-np.inf, *(0.5 * (a + b) for a, b in pairwise(means)), np.inf]
    share, wanted = (np.histogram(sample, edges)[0] / len(sample) for sample in (x, expected))
    pooled = 0.5 * (share + wanted)
    # Six standard deviations, and some counts for modes too rare for the normal approximation.
    bound = 6.0 * np.sqrt(2.0 * pooled * (1.0 - pooled) / len(x)) + 20.0 / len(x)
    if not np.all(np.abs(share - wanted) <= bound):
        raise RuntimeError(f"{what} has {share} in the modes and not {wanted}: not timed")


def _torch(job: rivals.Job, n: int, expected: Array) -> list[Contender]:
    torch = import_module("torch")

    def run(threads: int) -> Array:
        with torch_threads(count=threads):
            return rivals.torch_chain(torch, job, n, 0)

    # On small arrays, and beside other processes, one thread can be the faster.
    found = []
    for name, threads in (("torch", torch.get_num_threads()), ("torch, one thread", 1)):
        check_modes(name, job, run(threads), expected)
        note = f"eager, {threads} threads" if threads > 1 else "eager"
        found.append(Contender(name, partial(run, threads), nothing, SLOW_ROUNDS, note=note))
    return found


def _jax(job: rivals.Job, n: int, expected: Array) -> list[Contender]:
    run = partial(rivals.jax_chain(import_module("jax"), job, n), 0)
    check_modes("jax", job, run(), expected)
    goal = Goal("dng_math at least 3x faster", least_ratio=3.0)
    return [Contender("jax", run, nothing, SLOW_ROUNDS, goal, "float32: half the precision")]


def chain(settings: Settings) -> list[Row]:
    """DDPM chains away from one of four modes, by DNG with the paper's tracker."""
    n, steps = (10_000, 100) if settings.quick else (100_000, 1000)
    job, few = rivals.four_modes(steps), min(n, 1000)
    for fed, _ in (
        rivals.plain_chain(job, few, same_noise(few, 0)),
        rivals.eager_chain(np, job, few, same_noise(few, 0)),
    ):
        check_close("the NumPy chain", fed, fused_chain(job, few, 0), 1e-9)
    expected = fused_chain(job, n, 1)
    contenders = [
        Contender("dng_math", partial(fused_chain, job, n, 0), note="all cores"),
        Contender("dng_math, one thread", partial(fused_chain, job, n, 0, 1)),
        Contender(
            "numpy",
            partial(rivals.numpy_chain, job, n, 0, in_place=False),
            warm_up=partial(rivals.numpy_chain, rivals.four_modes(10), n, 0, in_place=False),
            rounds=SLOW_ROUNDS,
            goal=Goal("dng_math at least 15x faster", least_ratio=15.0),
            note="one thread; the formulas as they stand",
        ),
        Contender(
            "numpy, in place",
            partial(rivals.numpy_chain, job, n, 0, in_place=True),
            warm_up=partial(rivals.numpy_chain, rivals.four_modes(10), n, 0, in_place=True),
            rounds=SLOW_ROUNDS,
            note="one thread; (K, N) arrays written by hand, no temporaries",
        ),
        Contender(
            "numpy primitives",
            rivals.primitives(n, steps, job.mixture.n_components),
            goal=Goal("dng_math at least 2x faster", least_ratio=2.0),
            note="one thread; exp and standard_normal alone",
        ),
    ]
    missing = []
    for name, build in {"torch": _torch, "jax": _jax}.items():
        try:
            contenders += build(job, n, expected)
        except ImportError as error:
            missing.append(skipped("chain", name, n, steps, error))
    return [*compare("chain", contenders, settings, n=n, steps=steps), *missing]


# ---------------------------------------------------------------------- densities and scores


def _mixture(kind: str) -> GaussianMixture:
    rng = np.random.default_rng(0)
    weights, means = rng.dirichlet(np.full(8, 4.0)), 3.0 * rng.standard_normal((8, 2))
    if kind == "diagonal":
        return GaussianMixture(weights, means, rng.uniform(0.2, 2.0, (8, 2)))
    root = rng.standard_normal((8, 2, 2))
    return GaussianMixture(weights, means, root @ root.transpose(0, 2, 1) + 0.2 * np.eye(2))


def densities(settings: Settings) -> list[Row]:
    """log_prob and score at many points in 2D, 8 components."""
    n = 10_000 if settings.quick else 1_000_000
    rows = []
    for kind in ("full", "diagonal"):
        mixture = _mixture(kind)
        x = mixture.sample(n, 1)
        own = {"log_prob": mixture.log_prob, "score": mixture.score}
        rival = {"log_prob": rivals.scipy_log_prob, "score": rivals.scipy_score}
        for what, run in own.items():
            benchmark, expected = f"{what} ({kind})", run(x)
            goal = Goal("dng_math at least 5x faster", least_ratio=5.0) if what == "score" else None
            others: dict[str, Callable[[Array], Array]] = {"scipy": partial(rival[what], mixture)}
            missing = []
            try:
                others["scikit-learn"] = rivals.sklearn_functions(mixture)[what]
            except ImportError as error:
                missing.append(skipped(benchmark, "scikit-learn", n, None, error))
            contenders = [Contender("dng_math", partial(run, x), note="all cores")]
            for name, function in others.items():
                run_chunks = partial(rivals.in_chunks, function, x)
                check_close(f"{benchmark} by {name}", run_chunks(), expected, 1e-9)
                note = f"{rivals.CHUNK} points at a time"
                contender = Contender(name, run_chunks, nothing, SLOW_ROUNDS, note=note)
                contenders.append(replace(contender, goal=goal if name == "scipy" else None))
            rows += [*compare(benchmark, contenders, settings, n=n), *missing]
    return rows


# ---------------------------------------------------------------------- the digits oracle


def digits(settings: Settings) -> list[Row]:
    """One step of the memorised digits (seconds per step), and its matrix products alone."""
    steps, sizes = (10, (32,)) if settings.quick else (250, (1024, 512))
    try:
        data = import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        return [skipped("digits step", "dng_math", n, steps, error) for n in sizes]
    mixture = GaussianMixture.from_points(data.data / 8.0 - 1.0, 0.15, data.target)
    schedule = NoiseSchedule.linear(1000)
    rule = DynamicNegativeGuidance(posterior=LogOddsTracker())
    forbidden = mixture.components(0)

    def run(n: int, steps: int, **options: str) -> Array:
        coarse = schedule.respace(steps)
        return sample(mixture, coarse, rule, n=n, forbidden=forbidden, **options).x  # type: ignore[arg-type]

    check_close("the digits oracle", run(16, 10), run(16, 10, engine="reference"), 1e-6)
    rows = []
    for n in sizes:
        products = _products(mixture.means, n, steps)
        contenders = [
            Contender("dng_math", partial(run, n, steps), note="all cores"),
            Contender(
                "numpy products",
                products,
                goal=Goal("dng_math in at most 1.5x the time", least_ratio=1.0 / 1.5),
                note="two matrix products, BLAS with its own threads",
            ),
            Contender("numpy products, one thread", partial(_on_one_thread, products)),
        ]
        rows += compare("digits step", contenders, settings, n=n, steps=steps, per=steps)
    return rows


def _products(means: Array, n: int, steps: int) -> Callable[[], None]:
    components, dimensions = means.shape
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((dimensions, n)), rng.random((components, n))
    logit, value = np.empty((components, n)), np.empty((dimensions, n))

    def run() -> None:
        for _ in range(steps):
            np.matmul(means, x, out=logit)
            np.matmul(means.T, weight, out=value)

    return run


def _on_one_thread(run: Callable[[], None]) -> None:
    with threadpool_limits(1, user_api="blas"):
        run()


# ---------------------------------------------------------------------- memory


def memory_growth(n: int, steps: int, record: str) -> float:
    """MiB that a chain adds to the peak of this process's resident memory."""
    job = rivals.four_modes(steps)
    run = partial(sample, job.mixture, rule=job.rule, forbidden=[job.forbidden])
    names = [record] if record else []
    # A first chain loads and allocates what is needed once (machine code, threads).
    run(schedule=job.schedule.respace(2), n=5000, record=names)
    before = _peak(renew=True)
    run(schedule=job.schedule, n=n, record=names)
    return (_peak() - before) / 2**20


def _peak(*, renew: bool = False) -> int:
    """Peak of the resident memory so far, in bytes; ``renew`` resets it to the present value."""
    own = Path("/proc/self")
    try:
        # ru_maxrss does not work on Linux: it cannot be reset after the imports, and a child
        # process starts with its parent's.
        if renew:
            (own / "clear_refs").write_text("5")
        lines = (own / "status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(settings: Settings) -> list[Row]:
    """Peak of resident memory (MiB) that chains of two lengths, and a recorded one, add."""
    n, few = (10_000 if settings.quick else 100_000), 100
    rows = []
    for steps, record in ((few, ""), (10 * few, ""), (few, "trajectory")):
        code = "from benchmarks.mixture import memory_growth\n"
        said = [
            float(fresh.said_by(f"{code}print(memory_growth({n}, {steps}, {record!r}))"))
            for _ in range(1 if settings.quick else SLOW_ROUNDS)
        ]
        name = f"dng_math, {record} recorded" if record else "dng_math"
        rows.append(Row("memory", name, n, steps, memory_mib=float(np.median(said))))
    short, long = (row.memory_mib or 0.0 for row in rows[:2])
    met = harness.verdict(long - short <= 1.0, settings)
    goal, more = "at most 1 MiB more in ten times the steps", f"{long - short:.3g} MiB more"
    rows[1] = replace(rows[1], goal=goal, measured=more, met=met)
    return rows


PARTS: dict[str, Callable[[Settings], list[Row]]] = {
    "chain": chain,
    "log_prob and score": densities,
    "digits step": digits,
    "memory": memory,
}
ROW = Row


def report(rows: Sequence[Row]) -> list[str]:
    """Every comparison as Markdown: our time, and the others' times and their ratio to ours."""
    lines = ["", "| | dng_math | others, and how many times its time |", "| --- | --- | --- |"]
    jobs = dict.fromkeys((row.benchmark, row.n, row.steps) for row in rows)
    for name, n, steps in jobs:
        own = [row for row in rows if (row.benchmark, row.n, row.steps) == (name, n, steps)]
        times = {row.contender: seconds_text(row.median_s) for row in own if row.median_s}
        if harness.BASELINE not in times:
            continue
        others = [
            f"{row.contender} {times[row.contender]} ({row.ratio_to_dng_math:.3g}x)"
            for row in own
            if row.contender in times and row.contender != harness.BASELINE
        ]
        size = f"n = {n:,}" + (f", {steps} steps" if steps else "")
        lines.append(f"| {name}, {size} | {times[harness.BASELINE]} | {'; '.join(others)} |")
    return lines
