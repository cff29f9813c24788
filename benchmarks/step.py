"""One step of Dynamic Negative Guidance: ours, the published operations, torch.compile, a copy.

Like is compared with like: steps that are given their noise with each other, steps that make it
with each other, launched one by one or replayed from a CUDA graph.  Every contender's values are
checked at every size before it is timed.  Bandwidth is the same for all: the bytes that a step must
move (each input read once, each output written once) over its time.
"""

from __future__ import annotations

import math
import os
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contender, Goal, Settings
from dng_kernels import StepPlan, dng_step
from dng_kernels.plan import COLUMNS
from dng_math import equations
from dng_math.guidance import DynamicNegativeGuidance
from dng_math.posterior import PaperTracker
from dng_math.schedules import DDPM, NoiseSchedule

COEFFICIENTS = NoiseSchedule.linear().coefficients(DDPM("large"))
BETAS = COEFFICIENTS.beta_ts[::-1].copy()  # index 0 the cleanest, as the published code counts
RULE = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, variance="published"))
TIME = len(BETAS) // 2  # t of the step that is timed: any other costs the same
STEP = len(BETAS) - 1 - TIME  # the same step, counted from the noisiest
SEED = 0
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05}
# Float32 sums of two large squares leave this much of log p; ours never forms them.
PUBLISHED_LOG_P = {torch.float64: 1e-9, torch.float32: 1e-2}
LOG_P = 1e-3  # two orders of adding up the same float32 products


class Case(NamedTuple):
    """A size that people use."""

    name: str
    shape: tuple[int, ...]
    stable_diffusion: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


CASES = (
    Case("CIFAR-10, 1 image", (1, 3, 32, 32)),
    Case("SD 1.5 latents, batch 1", (1, 4, 64, 64), True),
    Case("SD 1.5 latents, batch 8", (8, 4, 64, 64), True),
    Case("SD 1.5 latents, batch 64", (64, 4, 64, 64), True),
    Case("SDXL latents, batch 1", (1, 4, 128, 128)),
    Case("SDXL latents, batch 8", (8, 4, 128, 128)),
    Case("SDXL latents, batch 64", (64, 4, 128, 128)),
    # Wan 2.1: 81 frames of 832 x 480
    Case("video latents, 480p", (1, 16, 21, 60, 104)),
    Case("2^24 elements", (64, 4, 256, 256)),
    Case("2^26 elements", (64, 4, 512, 512)),
    Case("2^28 elements", (64, 4, 1024, 1024)),
)
QUICK = CASES[:2]
DTYPES = (torch.float32, torch.bfloat16)
LARGEST_ON_CPU = 2**22  # beyond it nothing new happens, and a run would take minutes more
SLOW = 0.5  # seconds of a step, from which on two rounds must do
SLOW_ROUNDS = 2
LARGE = 64 * 2**20  # bytes of a tensor from which on bandwidth is all that counts

# Contenders, by what makes their noise.
GIVEN, OWN = "given noise", "own noise"
PUBLISHED, REFERENCE, FUSED, COMPILED = "published", "reference", "fused", "torch.compile"
COPY, EMPTY = "copy", "empty kernel"
PLAIN, GRAPH = "plain", "graph"


# ---------------------------------------------------------------------- the published sequence


class Published:
    """The class removal code of the DNG paper, one step of it, operation by operation.

    Its operations and their order, a new tensor each time.  What only hinders it is left out: its
    schedule is on the tensors' device, where the original copies coefficients there at every step;
    its numbers have no dimension, so that 16-bit tensors stay what they are.

    Parameters
    ----------
    betas : ndarray, shape (T,)
        Index 0 the cleanest.
    guidance_scale, temperature, offset, p_min, p_max : float
        As in the paper.
    """

    def __init__(
        self,
        betas: np.ndarray[Any, np.dtype[np.float64]],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        guidance_scale: float = RULE.guidance_scale,
        temperature: float = 1.0,
        offset: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
    ) -> None:
        # A schedule in 16 bits would be no schedule.
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.betas = torch.from_numpy(betas).to(device, precision)
        self.alphas = torch.from_numpy(1.0 - betas).to(device, precision)
        self.alpha_bars = torch.from_numpy(np.cumprod(1.0 - betas)).to(device, precision)
        self.guidance_scale, self.temperature, self.offset = guidance_scale, temperature, offset
        self.p_min, self.p_max = p_min, p_max

    def mean(self, t: int, x: Tensor, eps: Tensor) -> Tensor:
        factor = (1 - self.alphas[t]) / torch.sqrt(1 - self.alpha_bars[t])
        return 1 / torch.sqrt(self.alphas[t]) * (x - factor * eps)

    def step(
        self,
        t: int,
        x: Tensor,
        eps: Tensor,
        eps_neg: Tensor,
        p: Tensor,
        noise: Tensor | None = None,
        *,
        assertion: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """x_next (B, ...) and p (B,) from x, eps, eps_neg (B, ...), p (B,) and maybe noise.

        ``assertion``: look for NaN as the original does, which waits for the device.
        """
        scale = (self.guidance_scale * p / (1 - p)).reshape(-1, *[1] * (x.ndim - 1))
        guided = eps - scale * (eps_neg - eps)
        beta, deviation = self.betas[t], torch.sqrt(1 - self.alpha_bars[t])
        x_next = (x - beta / deviation * guided) / torch.sqrt(1.0 - beta)
        if t != 0:
            z = torch.randn_like(x) if noise is None else noise
            x_next = x_next + torch.sqrt(beta) * z
        p = self.posterior(t, x, x_next, eps, eps_neg, p)
        if assertion:
            assert not torch.isnan(p).any(), "the posterior is NaN"
        return x_next, torch.clamp(p, min=self.p_min, max=self.p_max)

    def posterior(
        self, t: int, x: Tensor, x_next: Tensor, eps: Tensor, eps_neg: Tensor, p: Tensor
    ) -> Tensor:
        """p (B,) before the clamp."""
        before = self.alpha_bars[t - 1] if t > 0 else self.alpha_bars[t]
        variance = (1 - before) / (1 - self.alpha_bars[t]) * (1 - self.alphas[t])
        x, x_next = torch.flatten(x, 1), torch.flatten(x_next, 1)
        mean = self.mean(t, x, torch.flatten(eps, 1))
        mean_neg = self.mean(t, x, torch.flatten(eps_neg, 1))
        distance_neg = torch.sum((x_next - mean_neg).pow(2), dim=1)
        distance = torch.sum((x_next - mean).pow(2), dim=1)
        difference = distance_neg - distance
        return p * torch.exp(1 / (2 * variance) * (-self.temperature * difference + self.offset))


# ---------------------------------------------------------------------- for torch.compile


# One row of a plan's table: a tuple, which the compiler sees through.
_Row: Any = namedtuple("_Row", COLUMNS)  # type: ignore[misc]


def whole_step(
    table: Tensor,
    index: Tensor,
    x: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    noise: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The reference's arithmetic on whole tensors, for the paper's tracker.

    Our operator is opaque to a compiler, and its blocks would be unrolled: this is what torch can
    fuse best.  Arguments as for :func:`dng_kernels.dng_step`, with a table (N, columns) and a 0-dim
    index into it.
    """
    at: Any = _Row(*table.index_select(0, index.reshape(1))[0].unbind()[: len(COLUMNS)])
    z = torch.randn_like(x) if noise is None else noise
    now, base, negative, z = (v.reshape(len(x), -1).to(table.dtype) for v in (x, eps, eps_neg, z))
    start = state.clamp(at.low, at.high)
    odds = torch.exp(start) / -torch.expm1(start)
    scale = at.active * equations.dynamic_scale(at.guidance_scale, odds, 1.0)
    delta = negative - base
    guided = equations.away(base, delta, scale[:, None])
    mean = equations.step_mean(now, guided, at.x_factor, at.factor)
    x_next = equations.step(mean, at.deviation, z)
    gap_sq = (delta * delta).sum(-1)
    residual_gap = -at.factor * scale * gap_sq + at.deviation * (z * delta).sum(-1)
    log_ratio = equations.log_likelihood_ratio(
        at.kernel_factor * at.kernel_factor * gap_sq, at.kernel_factor * residual_gap, at.variance
    )
    updated = equations.tracker_update(
        start, log_ratio, at.variance, at.temperature, at.offset, at.offset_nats
    )
    return x_next.to(x.dtype).reshape(x.shape), updated.clamp(at.low, at.high)


# ---------------------------------------------------------------------- the device


@dataclass(frozen=True)
class Device:
    """Where steps are timed, and how.

    ``cache`` is what input sets must outgrow (0: one set); ``capture`` makes a replay of a lap.
    """

    name: str
    place: torch.device
    clock: Callable[[Callable[[], object]], float]
    fused: bool = False
    cache: int = 0
    capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None
    launches: Callable[[Callable[[], object]], int | None] = lambda run: None
    free: Callable[[], float] = lambda: math.inf
    least_lap: float = 0.005  # seconds that a lap of many steps should take

    @property
    def ours(self) -> str:
        return FUSED if self.fused else REFERENCE


def _free_on_cpu() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not told here
        return math.inf


def awake(run: Callable[[], object]) -> float:
    """Seconds on the wall, after a pause, with torch's threads awake again.

    The first parallel operation after a pause waits for them, for milliseconds on some machines.
    """
    time.sleep(harness.PAUSE)
    spare = torch.zeros(2**18)
    for _ in range(3):
        spare.add_(1.0)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_device() -> Device:
    return Device("cpu", torch.device("cpu"), awake, free=_free_on_cpu)


def event_clock(run: Callable[[], object]) -> float:
    """Seconds between two events on the device, around whatever is launched in between."""
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def captured(lap: Callable[[], object]) -> Callable[[], object]:
    """A replay of what a lap launches."""
    # Whatever happens once (compiling, workspaces, handles of libraries) happens before.
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lap()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lap()
    return graph.replay


def device_operations(run: Callable[[], object]) -> int | None:
    """Kernels and copies that a call starts; None where the profiler cannot see the device."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kinds = [str(event.device_type) for event in profile.events() or []]
    return sum(kind.endswith("CUDA") for kind in kinds) or None


def gpu_device() -> Device:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        "gpu",
        torch.device("cuda"),
        event_clock,
        fused=True,
        cache=properties.L2_cache_size,
        capture=captured,
        launches=device_operations,
        free=lambda: float(torch.cuda.mem_get_info()[0]),
        least_lap=0.002,
    )


# ---------------------------------------------------------------------- what is timed


class Tensors(NamedTuple):
    """What a step reads: (B, ...); of the posterior log p (B,) for ours and p (B,) for theirs."""

    x: Tensor
    eps: Tensor
    eps_neg: Tensor
    noise: Tensor
    state: Tensor
    p: Tensor


def make_tensors(case: Case, dtype: torch.dtype, plan: StepPlan, seed: int = SEED) -> Tensors:
    """Random ones, where one step moves log p by about 1, as in a chain."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    precision = torch.float64 if dtype == torch.float64 else torch.float32

    def normal() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=plan.device, dtype=precision)

    row = dict(zip(COLUMNS, plan.table64[STEP].tolist(), strict=False))
    elements = math.prod(case.shape[1:])
    gap = math.sqrt(2.0 * row["variance"] / elements) / abs(row["kernel_factor"])
    eps = normal()
    eps_neg = (eps + gap * normal()).to(dtype)
    state = plan.init_state(len(eps), precision)
    assert state is not None
    p = torch.exp(state).to(dtype)
    return Tensors(normal().to(dtype), eps.to(dtype), eps_neg, normal().to(dtype), state, p)


def step_bytes(tensors: Tensors, noise: str) -> int:
    """What a step must move: every input read once, every output written once."""
    read = [tensors.x, tensors.eps, tensors.eps_neg, tensors.state]
    if noise == GIVEN:
        read.append(tensors.noise)
    written = [tensors.x, tensors.state]
    return sum(tensor.numel() * tensor.element_size() for tensor in read + written)


@dataclass(frozen=True)
class Entry:
    """A contender: what it does with one set of tensors.

    A step returns x_next and the posterior, as p or as log p.  ``in_graph`` is what of it a graph
    can hold, if that is not all; ``moved`` are the bytes where it is no step.
    """

    name: str
    run: Callable[[Tensors], Any]
    noise: str = ""
    log: bool = True
    in_graph: Callable[[Tensors], Any] | None = None
    moved: int = 0
    note: str = ""
    graph_note: str = ""
    one_set: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.noise}" if self.noise else self.name


def step_entries(plan: StepPlan, dtype: torch.dtype, device: Device) -> list[Entry]:
    """The published sequence and ours."""
    published = Published(BETAS, dtype, device.place)

    def theirs(noise: str, assertion: bool, t: Tensors) -> tuple[Tensor, Tensor]:
        given = t.noise if noise == GIVEN else None
        return published.step(TIME, t.x, t.eps, t.eps_neg, t.p, given, assertion=assertion)

    def ours(backend: Any, t: Tensors, **noise: Any) -> tuple[Tensor, Tensor | None]:
        result = dng_step(plan, STEP, t.x, t.eps, t.eps_neg, t.state, backend=backend, **noise)
        assert result.x_next is not None
        return result.x_next, result.state

    def given(backend: str, t: Tensors) -> Any:
        return ours(backend, t, noise=t.noise)

    def drawn(backend: str, t: Tensors) -> Any:
        return ours(backend, t, noise=torch.randn_like(t.x))

    def seeded(backend: str, t: Tensors) -> Any:
        return ours(backend, t, seed=SEED)

    entries = []
    for noise in (GIVEN, OWN):
        entries.append(
            Entry(
                PUBLISHED,
                partial(theirs, noise, True),
                noise,
                log=False,
                in_graph=partial(theirs, noise, False),
                note="" if noise == GIVEN else "randn_like, as published",
                graph_note="without its assertion, which waits for the device",
            )
        )
    backends = {REFERENCE: "reference"} | ({FUSED: "triton"} if device.fused else {})
    for name, backend in backends.items():
        entries += [
            Entry(name, partial(given, backend), GIVEN),
            Entry(name, partial(drawn, backend), OWN, note="randn_like, then given"),
            Entry(f"{name}, seed", partial(seeded, backend), OWN, note="made in the step"),
        ]
    if device.fused and device.cache:
        note = "the same tensors again and again"
        run = partial(given, "triton")
        entries.append(Entry(f"{FUSED}, from the cache", run, GIVEN, note=note, one_set=True))
    return entries


def compiled_entries(plan: StepPlan, device: Device) -> list[Entry]:
    """What torch.compile makes of the reference's arithmetic, for one shape and dtype."""
    # Else the ninth shape is one too many, and torch goes on without compiling.
    torch.compiler.reset()
    modes = {COMPILED: "default"}
    if device.capture is not None:
        # The graphs of its other mode copy their inputs; captured here, it has graphs without.
        modes[f"{COMPILED} max-autotune"] = "max-autotune-no-cudagraphs"
    entries = []
    for name, mode in modes.items():
        step = torch.compile(whole_step, fullgraph=True, dynamic=False, mode=mode)
        for noise in (GIVEN, OWN):

            def run(t: Tensors, step: Any = step, noise: str = noise) -> Any:
                z = t.noise if noise == GIVEN else None
                return step(plan.table, plan.index_of[STEP], t.x, t.eps, t.eps_neg, z, t.state)

            entries.append(Entry(name, run, noise, note="compiled before it is timed"))
    if not device.fused:
        # On a GPU the operator is the kernel, compiled or not.
        def ours(step: Tensor, t: Tensors) -> Any:
            result = dng_step(plan, step, t.x, t.eps, t.eps_neg, t.state, noise=t.noise)
            return result.x_next, result.state

        compiled = torch.compile(ours, fullgraph=True, dynamic=False)
        run_ours = partial(compiled, plan.index_of[STEP])
        note = "ours, compiled before it is timed"
        entries.append(Entry(f"{COMPILED} of dng_step", run_ours, GIVEN, note=note))
    return entries


def empty_kernel(place):  # type: ignore[no-untyped-def]
    """Nothing: what is left is the launch.  Triton reads annotations as its own types."""


def other_entries(tensors: Tensors, device: Device) -> list[Entry]:
    """A copy of as many bytes, and a launch of nothing."""
    # In four bytes an element: what torch gives to a thread is a number of elements.
    half = step_bytes(tensors, GIVEN) // 8
    # By the identity of x: every set of tensors has buffers of its own, in the cache or not.
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(t: Tensors) -> None:
        if id(t.x) not in buffers:
            buffers[id(t.x)] = (
                torch.ones(half, dtype=torch.float32, device=device.place),
                torch.zeros(half, dtype=torch.float32, device=device.place),
            )
        source, target = buffers[id(t.x)]
        target.copy_(source)

    entries = [Entry(COPY, copy, moved=8 * half, note="reads and writes as many bytes")]
    if device.fused:
        launch = import_module("triton").jit(empty_kernel)[(1,)]
        entries.append(Entry(EMPTY, lambda t: launch(t.state)))
    return entries


# ---------------------------------------------------------------------- values before times


def largest_error(actual: Tensor, expected: Tensor | None) -> float:
    """Largest |actual - expected| / max(1, |expected|); NaN where one is NaN."""
    assert expected is not None
    double = expected.dtype == torch.float64
    actual, expected = (v if double else v.float() for v in (actual, expected))
    return float(((actual - expected).abs() / expected.abs().clamp(min=1.0)).max())


def check_entry(entry: Entry, tensors: Tensors, plan: StepPlan, dtype: torch.dtype) -> None:
    """Raise unless a step is the reference's with the same noise, or of its law with its own."""
    x_next, posterior = entry.run(tensors)
    t, tolerance = tensors, TOLERANCE[dtype]
    one = partial(dng_step, plan, STEP, t.x, t.eps, t.eps_neg, t.state, backend="reference")
    if entry.noise == GIVEN:
        expected = one(noise=t.noise)
        error = largest_error(x_next, expected.x_next)
        harness.check_close(f"x_next of {entry.label}", error, 0.0, tolerance)
        if entry.log:
            error = largest_error(posterior, expected.state)
            harness.check_close(f"log p of {entry.label}", error, 0.0, LOG_P)
        return
    without = one(noise=torch.zeros_like(t.x)).x_next
    assert without is not None
    deviation = float(plan.table64[STEP, COLUMNS.index("deviation")])
    z = (x_next.float() - without.float()) / deviation
    # Six standard deviations of the mean and of the mean square, and what 16 bits round off.
    rounding = tolerance if dtype == torch.bfloat16 else 0.0
    bound = 6.0 * math.sqrt(2.0 / z.numel()) + rounding
    found = [float(z.mean()), float(z.square().mean()) - 1.0]
    harness.check_close(f"the noise of {entry.label}", found, [0.0, 0.0], bound)


def check_published(device: Device, dtype: torch.dtype) -> None:
    """Raise unless the published sequence and ours are the same step, x_next and posterior."""
    plan = make_plan(device)
    t = make_tensors(Case("", (5, 3, 32, 32)), dtype, plan)
    x_next, p = Published(BETAS, dtype, device.place).step(
        TIME, t.x, t.eps, t.eps_neg, t.p, t.noise
    )
    ours = dng_step(plan, STEP, t.x, t.eps, t.eps_neg, t.state, noise=t.noise, backend="reference")
    error = largest_error(x_next, ours.x_next)
    harness.check_close("the published x_next", error, 0.0, TOLERANCE[dtype])
    error = largest_error(p.log(), ours.state)
    harness.check_close("the published log p", error, 0.0, PUBLISHED_LOG_P[dtype])


# ---------------------------------------------------------------------- one size


@dataclass(frozen=True)
class StepRow:
    """One contender at one size: a line of the table and of the CSV.

    ``ratio`` is its time over that of the baseline in the same round and mode; ``bandwidth``, in
    GB/s, is ``bytes`` over its time; the floor is the time of a copy of as many bytes in the same
    run.
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
    floor_s: float | None = None
    times_floor: float | None = None
    ratio: float | None = None
    baseline: str = ""
    operations: int | None = None
    sets: int | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


def make_plan(device: Device) -> StepPlan:
    return StepPlan(COEFFICIENTS, RULE, device=device.place)


def goal_of(entry: Entry, mode: str, case: Case, tensors: Tensors, device: Device) -> Goal | None:
    """What ours shall reach against this contender."""
    ours = device.ours
    if not device.fused:
        if (entry.name, entry.noise) == (PUBLISHED, GIVEN):
            return Goal(f"{ours} at least 2x faster", least_ratio=2.0)
        return None
    if case.stable_diffusion and entry.noise == GIVEN and entry.name == PUBLISHED:
        return Goal(f"{ours} at least 15x faster", least_ratio=15.0)
    if case.stable_diffusion and entry.noise == GIVEN and entry.name.startswith(COMPILED):
        return Goal(f"{ours} at least 3x faster", least_ratio=3.0)
    if case.stable_diffusion and entry.name == EMPTY and mode == GRAPH:
        return Goal(f"{ours} in at most 1.5x the time", least_ratio=1.0 / 1.5)
    large = tensors.x.numel() * tensors.x.element_size() >= LARGE
    if large and entry.name == COPY and mode == GRAPH:
        return Goal(f"{ours} at no less than 90 % of its bandwidth", least_ratio=0.9)
    return None


def baseline_of(entry: Entry, mode: str, device: Device) -> str:
    """Ours, with noise from where this contender has it, started as it is."""
    if entry.noise != OWN:
        label = f"{device.ours}, {GIVEN}"
    elif device.fused:
        label = f"{FUSED}, seed, {OWN}"
    else:
        label = f"{REFERENCE}, {OWN}"
    return f"{label} ({mode})"


MOST_SETS = 256  # and steps in a graph
OUTGROW = 2.0  # times the cache: whoever reads a set again finds nothing of it there


def number_of_sets(tensors: Tensors, device: Device) -> int:
    """Input sets to go through, so that none is in the cache when its turn comes again."""
    return min(MOST_SETS, max(1, math.ceil(OUTGROW * device.cache / step_bytes(tensors, GIVEN))))


def lap(
    run: Callable[[Tensors], object], sets: Sequence[Tensors], calls: int
) -> Callable[[], None]:
    """Many steps in a row, each with the next set."""

    def go() -> None:
        for i in range(calls):
            run(sets[i % len(sets)])

    return go


def calls_of_lap(once: float, sets: Sequence[Tensors], device: Device) -> int:
    """Steps that take long enough for the clock, and see every set."""
    wanted = math.ceil(device.least_lap / max(once, 1e-9))
    return min(MOST_SETS, max(wanted, len(sets)))


def first_words(error: BaseException) -> str:
    """What an error says in one line."""
    said = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {said}"[:160]


def time_case(case: Case, dtype: torch.dtype, device: Device, settings: Settings) -> list[StepRow]:
    """Every contender at one size, interleaved."""
    dtype_name = str(dtype).removeprefix("torch.")
    blank = StepRow(device.name, case.name, dtype_name, case.elements, "")

    def skip(name: str, reason: str, mode: str = PLAIN) -> StepRow:
        return replace(blank, contender=name, mode=mode, note=f"skipped: {reason}")

    # Inputs, the copy's buffers and whatever the published sequence keeps alive at once.
    needed, free = 24 * case.elements * dtype.itemsize, device.free()
    if needed > free:
        reason = f"needs {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} are free"
        return [skip("all", reason)]
    plan = make_plan(device)
    sets = [make_tensors(case, dtype, plan)]
    count = number_of_sets(sets[0], device)
    sets += [make_tensors(case, dtype, plan, seed) for seed in range(1, count)]

    rows, entries = [], []
    for entry in [*step_entries(plan, dtype, device), *compiled_entries(plan, device)]:
        try:
            check_entry(entry, sets[0], plan, dtype)
        except Exception as error:
            # No C++ compiler, or none that the installed torch can use; a wrong value is no excuse.
            if not entry.name.startswith(COMPILED) or "not timed" in str(error):
                raise
            rows.append(skip(entry.label, first_words(error)))
        else:
            entries.append(entry)
    entries += other_entries(sets[0], device)

    contenders: dict[tuple[int, str], Contender] = {}
    operations = {}
    for number, entry in enumerate(entries):
        own = sets[:1] if entry.one_set else sets
        entry.run(own[0])
        once = min(device.clock(partial(entry.run, own[0])) for _ in range(3))
        calls = calls_of_lap(once, own, device)
        operations[number] = device.launches(partial(entry.run, own[0]))
        for mode in (PLAIN, GRAPH):
            go: Callable[[], object] = lap(entry.run, own, calls)
            note = entry.note
            if mode == GRAPH:
                if device.capture is None:
                    continue
                try:
                    go = device.capture(lap(entry.in_graph or entry.run, own, calls))
                except RuntimeError as error:
                    reason = f"no graph can hold it: {first_words(error)}"
                    rows.append(skip(entry.label, reason, GRAPH))
                    continue
                note = "; ".join(filter(None, [entry.note, entry.graph_note]))
            contenders[number, mode] = Contender(
                f"{entry.label} ({mode})",
                go,
                warm_up=harness.nothing if once > SLOW else None,
                rounds=SLOW_ROUNDS if once > SLOW else None,
                goal=goal_of(entry, mode, case, sets[0], device),
                note=note,
                calls=calls,
                baseline=baseline_of(entry, mode, device),
                clock=device.clock,
            )
    timings = harness.measure(list(contenders.values()), settings.repeats)

    copy_mode = GRAPH if f"{COPY} ({GRAPH})" in timings else PLAIN
    copy_s = timings[f"{COPY} ({copy_mode})"].median
    copy_bytes = next(entry.moved for entry in entries if entry.name == COPY)
    found = []
    for (number, mode), contender in contenders.items():
        entry, timing = entries[number], timings[contender.name]
        row = replace(
            blank,
            contender=entry.label,
            mode=mode,
            median_s=timing.median,
            q25=timing.q25,
            q75=timing.q75,
            ratio=None if math.isnan(timing.ratio) else timing.ratio,
            baseline=contender.baseline.removesuffix(f" ({mode})"),
            operations=operations[number],
            sets=1 if entry.one_set else len(sets),
            note=contender.note,
        )
        moved = entry.moved or (step_bytes(sets[0], entry.noise) if entry.noise else 0)
        if moved:
            floor = moved * copy_s / copy_bytes
            row = replace(
                row,
                bytes=moved,
                bandwidth=moved / timing.median * 1e-9,
                floor_s=floor,
                times_floor=timing.median / floor,
            )
        goal = contender.goal
        if goal is not None and not math.isnan(ratio := timing.ratio):
            reached = goal.reached(ratio, timing.median)
            row = replace(row, goal=goal.text, met=harness.verdict(reached, settings))
            row = replace(row, measured=goal.measured(ratio, timing.median))
        elif case.stable_diffusion and row.operations and entry.label == f"{FUSED}, {GIVEN}":
            met = harness.verdict(row.operations == 1, settings)
            row = replace(row, goal="one launch", measured=f"{row.operations}", met=met)
        found.append(row)
    return found + rows


def time_cases(device: Device, cases: Sequence[Case], settings: Settings) -> list[StepRow]:
    for dtype in (torch.float64, torch.float32):
        check_published(device, dtype)
    rows = []
    with torch.inference_mode():
        for case in cases:
            for dtype in DTYPES[:1] if settings.quick else DTYPES:
                rows += time_case(case, dtype, device, settings)
                torch.cuda.empty_cache()
    return rows


# ---------------------------------------------------------------------- parts


def cpu(settings: Settings) -> list[StepRow]:
    """Steps on the CPU, all threads that torch takes."""
    cases = QUICK if settings.quick else [c for c in CASES if c.elements <= LARGEST_ON_CPU]
    return time_cases(cpu_device(), cases, settings)


def gpu(settings: Settings) -> list[StepRow]:
    """Steps on the GPU, launched one by one and replayed from CUDA graphs."""
    if not torch.cuda.is_available():
        reason = "skipped: torch sees no GPU"
        names = [f"{name}, {GIVEN}" for name in (PUBLISHED, REFERENCE, COMPILED, FUSED)]
        names += [f"{FUSED}, seed, {OWN}", COPY, EMPTY]
        return [StepRow("gpu", "all", "all", 0, name, note=reason) for name in names]
    return time_cases(gpu_device(), QUICK if settings.quick else CASES, settings)


PARTS: dict[str, Callable[[Settings], list[StepRow]]] = {"cpu": cpu, "gpu": gpu}


def devices() -> dict[str, str]:
    return {"gpu": harness.gpu(), "torch_threads": str(torch.get_num_threads())}


# ---------------------------------------------------------------------- what it comes to


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def report(rows: Sequence[StepRow]) -> list[str]:
    """For every size the floor, what ours takes, and what is between them."""
    lines = []
    for row in rows:
        if row.note.startswith("skipped"):
            lines.append(f"{row.note}: {row.benchmark}, {row.case}, {row.dtype}, {row.contender}")
            continue
        ours = FUSED if row.benchmark == "gpu" else REFERENCE
        same = [
            other
            for other in rows
            if (other.benchmark, other.case, other.dtype) == (row.benchmark, row.case, row.dtype)
        ]
        best = GRAPH if any(other.mode == GRAPH for other in same) else PLAIN
        if row.contender != f"{ours}, {GIVEN}" or row.mode != best:
            continue
        assert row.median_s is not None and row.floor_s is not None and row.bytes is not None
        rest = row.median_s - row.floor_s
        line = (
            f"{row.benchmark}, {row.case}, {row.dtype}: floor {microseconds(row.floor_s)} "
            f"({row.bytes / 2**20:.3g} MiB at {row.bytes / row.floor_s * 1e-9:.3g} GB/s, a copy); "
            f"{row.contender} ({row.mode}) {microseconds(row.median_s)}, "
            f"{row.times_floor:.3g}x the floor; {microseconds(max(rest, 0.0))} remain"
        )
        for other in same:
            if other.contender == EMPTY and other.mode == best and other.median_s is not None:
                line += f", an empty kernel takes {microseconds(other.median_s)}"
            published = f"{PUBLISHED}, {GIVEN}"
            if other.contender == published and other.mode == PLAIN and other.ratio is not None:
                line += f"; published {other.ratio:.3g}x its time (plain)"
        lines.append(line)
    return lines


# Okabe and Ito's colours, which people with any colour vision tell apart.
LOOKS: dict[str, tuple[str, str]] = {
    f"{PUBLISHED}, {GIVEN}": ("#D55E00", "s"),
    f"{COMPILED}, {GIVEN}": ("#E69F00", "^"),
    f"{COMPILED} max-autotune, {GIVEN}": ("#CC79A7", "v"),
    f"{REFERENCE}, {GIVEN}": ("#56B4E9", "D"),
    f"{COMPILED} of dng_step, {GIVEN}": ("#0072B2", "o"),
    f"{FUSED}, {GIVEN}": ("#0072B2", "o"),
    f"{FUSED}, seed, {OWN}": ("#009E73", "P"),
    COPY: ("#000000", "x"),
    EMPTY: ("#7F7F7F", "+"),
}
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}


def draw(rows: Sequence[StepRow], path: Path, where: dict[str, str]) -> str:
    """Time and bandwidth against size, on the GPU if there is one; what became of it."""
    try:
        matplotlib = import_module("matplotlib")
        figure_of = import_module("matplotlib.figure").Figure
    except ImportError as error:
        return f"no plot: {error}"
    timed = [row for row in rows if row.median_s is not None and row.dtype == "float32"]
    if not timed:
        return "no plot: nothing was timed"
    device = "gpu" if any(row.benchmark == "gpu" for row in timed) else "cpu"
    timed = [row for row in timed if row.benchmark == device]
    with matplotlib.rc_context(STYLE):
        figure = figure_of(figsize=(7.2, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        for label, (color, marker) in LOOKS.items():
            for mode, dashes in ((PLAIN, "--"), (GRAPH, "-")):
                own = [row for row in timed if (row.contender, row.mode) == (label, mode)]
                own.sort(key=lambda row: row.elements)
                if not own:
                    continue
                graphs = any(row.mode == GRAPH for row in timed)
                # One line a contender: where there are graphs, the sequence that cannot be
                # captured as published is the only one that is drawn without.
                if graphs and (mode == PLAIN) != label.startswith(PUBLISHED):
                    continue
                look = {"color": color, "marker": marker, "linestyle": dashes if graphs else "-"}
                name = f"{label} ({mode})" if graphs else label
                size = [row.elements for row in own]
                left.plot(size, [(row.median_s or 0.0) * 1e6 for row in own], label=name, **look)
                if own[0].bandwidth is not None:
                    right.plot(size, [row.bandwidth for row in own], **look)
        left.set(xscale="log", yscale="log", ylabel="time of a step (microseconds)")
        right.set(yscale="log", ylabel="bytes of a step over its time (GB/s)")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("elements of x")
        for case in CASES:
            if case.elements <= max(row.elements for row in timed):
                for axes in (left, right):
                    axes.axvline(case.elements, color="#EEEEEE", linewidth=3, zorder=0)
                place = {"xy": (case.elements, 1.0), "xycoords": ("data", "axes fraction")}
                offset = {"xytext": (0, 2), "textcoords": "offset points", "rotation": 60}
                left.annotate(case.name, **place, **offset, fontsize=5.5, annotation_clip=False)
        threads = f"{where['cpu']}, torch threads: {where['torch_threads']}"
        machine = where["gpu"] if device == "gpu" else threads
        right.set_title(
            "One step of DNG, float32, lower is faster on the left,\nhigher on the right.  "
            f"Medians on\n{machine}",
            fontsize=7,
            loc="left",
        )
        figure.legend(loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    return f"drawn to {path}"
