"""Contenders that compute the same step: published, naive and ours; eager, compiled, as a kernel.

``published`` is the published sequence of operations (:mod:`benchmarks.published`), ``naive`` the
specification in whole-tensor torch (:mod:`dng_kernels.naive`), ``dng_step`` the function for users.

All contenders get the same tensors, and their values are checked before they are timed
(:func:`check_entry`).  A copy of as many bytes and an empty kernel are timed for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.device import Device
from benchmarks.harness import first_words
from benchmarks.published import Published
from dng_kernels import BoundStep, StepPlan, dng_step, naive
from dng_kernels import plan as plans
from dng_math.rules import DynamicNegativeGuidance
from dng_math.schedules import DDPM, NoiseSchedule
from dng_math.trackers import PaperTracker

COEFFICIENTS = NoiseSchedule.linear().coefficients(DDPM("large"))
BETAS = COEFFICIENTS.beta_ts[::-1].copy()  # index 0 the cleanest, as the published code counts
RULE = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, variance="published"))
TIME = len(BETAS) // 2  # t of the timed step; all steps cost the same
STEP = len(BETAS) - 1 - TIME  # the same step, counted from the noisiest
SEED = 0
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05}
LOG_P = 1e-3  # tolerance: the same float32 products are added up in different orders
# Tolerances of the published log p.  It is a difference of two squared norms of about n/2 nats
# each, n the elements of a sample, which ours never forms.  The absolute part is for small n, the
# relative part for a few roundings (1.2e-7 in float32) of n/2.
PUBLISHED_LOG_P = {torch.float64: (1e-9, 1e-14), torch.float32: (1e-2, 5e-7)}

# A contender is a name, a form in which it runs, and a source of noise.
PUBLISHED, NAIVE, OURS, BOUND = "published", "naive", "dng_step", "BoundStep"
EAGER, COMPILED, TUNED, KERNEL = "eager", "compiled", "compiled max-autotune", "Triton kernel"
GIVEN, OWN, SEEDED = "given noise", "own noise", "noise of a seed"
COPY, EMPTY = "copy", "empty kernel"


class Case(NamedTuple):
    """A size that occurs in practice; ``short`` is its name in a table or a plot."""

    name: str
    shape: tuple[int, ...]
    short: str = ""
    stable_diffusion: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


CASES = (
    Case("CIFAR-10, 1 image", (1, 3, 32, 32), "CIFAR-10 x 1"),
    Case("SD 1.5 latents, batch 1", (1, 4, 64, 64), "SD x 1", True),
    Case("SD 1.5 latents, batch 8", (8, 4, 64, 64), "SD x 8", True),
    Case("SD 1.5 latents, batch 64", (64, 4, 64, 64), "SD x 64", True),
    Case("SDXL latents, batch 1", (1, 4, 128, 128), "SDXL x 1"),
    Case("SDXL latents, batch 8", (8, 4, 128, 128), "SDXL x 8"),
    Case("SDXL latents, batch 64", (64, 4, 128, 128), "SDXL x 64"),
    # Wan 2.1: 81 frames of 832 x 480
    Case("video latents, 480p", (1, 16, 21, 60, 104), "video 480p"),
    Case("2^24 elements", (64, 4, 256, 256), "2^24"),
    Case("2^26 elements", (64, 4, 512, 512), "2^26"),
    Case("2^28 elements", (64, 4, 1024, 1024), "2^28"),
)


def make_plan(device: Device) -> StepPlan:
    return StepPlan(COEFFICIENTS, RULE, device=device.place)


# ---------------------------------------------------------------------- tensors


class Tensors(NamedTuple):
    """Inputs of a step: tensors (B, ...), log p (B,) as ``state`` for ours, p (B,) for theirs."""

    x: Tensor
    eps: Tensor
    eps_neg: Tensor
    noise: Tensor
    state: Tensor
    p: Tensor


def make_tensors(case: Case, dtype: torch.dtype, plan: StepPlan, seed: int = SEED) -> Tensors:
    """Random inputs for which one step changes log p by about 1, as in a chain."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    precision = torch.float64 if dtype == torch.float64 else torch.float32

    def normal() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=plan.device, dtype=precision)

    row = plan.row(STEP)
    elements = math.prod(case.shape[1:])
    gap = math.sqrt(2.0 * row.variance / elements) / abs(row.transition_factor)
    eps = normal()
    eps_neg = (eps + gap * normal()).to(dtype)
    state = plan.init_state(len(eps), precision)
    assert state is not None
    p = torch.exp(state).to(dtype)
    return Tensors(normal().to(dtype), eps.to(dtype), eps_neg, normal().to(dtype), state, p)


def step_bytes(tensors: Tensors, noise: str) -> int:
    """Bytes that a step must move: every input read once, every output written once."""
    read = [tensors.x, tensors.eps, tensors.eps_neg, tensors.state]
    if noise == GIVEN:
        read.append(tensors.noise)
    written = [tensors.x, tensors.state]
    return sum(tensor.numel() * tensor.element_size() for tensor in read + written)


# ---------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Entry:
    """A contender: a function of one set of tensors.

    A step returns x_next and the posterior, as log p if ``log`` and else as p.  ``in_graph`` is
    the variant that a graph can hold, if ``run`` is not; ``moved`` are the bytes of a contender
    that is not a step.  With ``one_set`` it is timed on one set of tensors, which stays in the
    cache.
    """

    name: str
    run: Callable[[Tensors], Any]
    form: str = ""
    noise: str = ""
    log: bool = True
    in_graph: Callable[[Tensors], Any] | None = None
    moved: int = 0
    note: str = ""
    graph_note: str = ""
    one_set: bool = False

    @property
    def label(self) -> str:
        return label_of(self.name, self.form, self.noise)


def label_of(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def given_or_none(noise: str, t: Tensors) -> Tensor | None:
    return t.noise if noise == GIVEN else None


def ours(
    plan: StepPlan, step: int | Tensor, backend: Any, noise: str, t: Tensors
) -> tuple[Tensor, Tensor]:
    """One call of dng_step with the given source of noise."""
    source: dict[str, Any]
    if noise == SEEDED:
        source = {"seed": SEED}
    else:
        source = {"noise": t.noise if noise == GIVEN else torch.randn_like(t.x)}
    result = dng_step(plan, step, t.x, t.eps, t.eps_neg, t.state, backend=backend, **source)
    assert result.x_next is not None and result.state is not None
    return result.x_next, result.state


def bound_step(
    plan: StepPlan, backend: Any, known: dict[int, BoundStep], t: Tensors
) -> tuple[Tensor, Tensor]:
    """One call of a step that was bound to the tensors the first time."""
    bound = known.get(id(t))
    if bound is None or bound._inputs.x is not t.x:
        given = (t.x, t.eps, t.eps_neg, t.state)
        bound = known[id(t)] = BoundStep(plan, *given, noise=t.noise, backend=backend)
    result = bound(STEP)
    assert result.x_next is not None and result.state is not None
    return result.x_next, result.state


BOUND_NOTE = "checked and laid out before"


def naive_step(plan: StepPlan, index: Tensor, noise: str, t: Tensors) -> tuple[Tensor, Tensor]:
    """The specification on whole tensors, without any optimisation."""
    z = t.noise if noise == GIVEN else torch.randn_like(t.x)
    inputs = naive.Inputs(t.x, None, t.eps, t.eps_neg, None, z, None, None, t.state, None)
    table = plan.table64 if t.x.dtype == torch.float64 else plan.table
    found = naive.compute(inputs, plan.variants[plans.STEP], table, index)
    assert found.x_next is not None and found.state is not None
    return found.x_next.to(t.x.dtype), found.state


def eager_entries(plan: StepPlan, dtype: torch.dtype, device: Device) -> list[Entry]:
    """The published sequence, plain torch and ours, called from Python."""
    published = Published(BETAS, dtype, device.place, guidance_scale=RULE.guidance_scale)

    def theirs(noise: str, assertion: bool, t: Tensors) -> tuple[Tensor, Tensor]:
        given = given_or_none(noise, t)
        return published.step(TIME, t.x, t.eps, t.eps_neg, t.p, given, assertion=assertion)

    entries = []
    for noise in (GIVEN, OWN):
        entries.append(
            Entry(
                PUBLISHED,
                partial(theirs, noise, True),
                EAGER,
                noise,
                log=False,
                in_graph=partial(theirs, noise, False),
                note="" if noise == GIVEN else "randn_like, as published",
                graph_note="without its assertion, which waits for the device",
            )
        )
    index = plan.indices[STEP]
    entries += [
        Entry(NAIVE, partial(naive_step, plan, index, noise), EAGER, noise)
        for noise in (GIVEN, OWN)
    ]
    if not device.kernel:
        entries += [
            Entry(OURS, partial(ours, plan, STEP, "auto", noise), EAGER, noise, note=note)
            for noise, note in OUR_NOTES.items()
        ]
        run = partial(bound_step, plan, "auto", {})
        entries.append(Entry(BOUND, run, EAGER, GIVEN, note=BOUND_NOTE))
    return entries


OUR_NOTES = {GIVEN: "", OWN: "randn_like, then given", SEEDED: "made in the step"}


def kernel_entries(plan: StepPlan, device: Device) -> list[Entry]:
    """Our step as one Triton kernel; none on a device without Triton."""
    if not device.kernel:
        return []
    entries = [
        Entry(OURS, partial(ours, plan, STEP, "triton", noise), KERNEL, noise, note=note)
        for noise, note in OUR_NOTES.items()
    ]
    run = partial(bound_step, plan, "triton", {})
    entries.append(Entry(BOUND, run, KERNEL, GIVEN, note=BOUND_NOTE))
    if device.cache:
        note = "the same tensors again and again"
        form = f"{KERNEL} from the cache"
        run = partial(ours, plan, STEP, "triton", GIVEN)
        entries.append(Entry(OURS, run, form, GIVEN, note=note, one_set=True))
    return entries


def compiled_entries(plan: StepPlan, dtype: torch.dtype, device: Device, case: Case) -> list[Entry]:
    """Each contender under torch.compile, for one shape and dtype.

    On a GPU ours is the kernel, compiled or not.  There only the latents of Stable Diffusion are
    compiled for, because every size and dtype takes half a minute.
    """
    if device.kernel and not case.stable_diffusion:
        return []
    # Without a reset torch reaches its limit at the ninth shape, and goes on without compiling.
    torch.compiler.reset()
    published = Published(BETAS, dtype, device.place, guidance_scale=RULE.guidance_scale)
    index = plan.indices[STEP]

    def theirs(noise: str, t: Tensors) -> tuple[Tensor, Tensor]:
        given = given_or_none(noise, t)
        return published.step(TIME, t.x, t.eps, t.eps_neg, t.p, given, assertion=False)

    made = partial(torch.compile, fullgraph=True, dynamic=False)
    without = "without its assertion, which no compiled graph holds; each t compiles again"
    entries = []
    for noise in (GIVEN, OWN):
        entries += [
            Entry(
                PUBLISHED, made(partial(theirs, noise)), COMPILED, noise, log=False, note=without
            ),
            Entry(NAIVE, made(partial(naive_step, plan, index, noise)), COMPILED, noise),
        ]
        if not device.kernel:
            run = made(partial(ours, plan, index, "auto", noise))
            entries.append(Entry(OURS, run, COMPILED, noise, note=OUR_NOTES[noise]))
    if device.kernel:
        # The CUDA graphs of plain max-autotune copy their inputs; ours are captured here without.
        step = partial(naive_step, plan, index, GIVEN)
        tuned = made(step, mode="max-autotune-no-cudagraphs")
        entries.append(Entry(NAIVE, tuned, TUNED, GIVEN))
    return entries


def no_compiler(device: Device) -> str:
    """Why torch.compile does not work here; empty if it does."""
    try:
        torch.compile(torch.add)(*torch.ones(2, 8, device=device.place))
    except Exception as error:
        return first_words(error)
    return ""


def empty_kernel(place):  # type: ignore[no-untyped-def]
    """Do nothing, to time the launch alone.  Triton would read annotations as its own types."""


def other_entries(tensors: Tensors, device: Device) -> list[Entry]:
    """A copy of as many bytes, and an empty kernel."""
    # Always in float32, because torch splits work among threads by the number of elements.
    half = step_bytes(tensors, GIVEN) // 8
    # Every set of tensors, known by its x, gets its own buffers, to use the cache as a step does.
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
    if device.kernel:
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


def published_log_p(dtype: torch.dtype, x: Tensor) -> float:
    """Tolerance of the published log p, for the rounding of its sums."""
    absolute, relative = PUBLISHED_LOG_P[dtype]
    return absolute + relative * math.prod(x.shape[1:])


def check_entry(entry: Entry, tensors: Tensors, plan: StepPlan, dtype: torch.dtype) -> None:
    """Raise unless a step equals the specification's, or its own noise has the right moments."""
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
        elif dtype in PUBLISHED_LOG_P:  # in 16 bits its sums are too inaccurate to check
            error = largest_error(posterior.log(), expected.state)
            bound = published_log_p(dtype, t.x)
            harness.check_close(f"log p of {entry.label}", error, 0.0, bound)
        return
    without = one(noise=torch.zeros_like(t.x)).x_next
    assert without is not None
    deviation = plan.row(STEP).deviation
    z = (x_next.float() - without.float()) / deviation
    # Six standard deviations of the mean and of the mean square, and the rounding of 16 bits.
    rounding = tolerance if dtype == torch.bfloat16 else 0.0
    bound = 6.0 * math.sqrt(2.0 / z.numel()) + rounding
    found = [float(z.mean()), float(z.square().mean()) - 1.0]
    harness.check_close(f"the noise of {entry.label}", found, [0.0, 0.0], bound)


def check_published(device: Device, dtype: torch.dtype) -> None:
    """Raise unless the published sequence and ours give the same x_next and posterior."""
    plan = make_plan(device)
    t = make_tensors(Case("", (5, 3, 32, 32)), dtype, plan)
    entries = {entry.label: entry for entry in eager_entries(plan, dtype, device)}
    check_entry(entries[label_of(PUBLISHED, EAGER, GIVEN)], t, plan, dtype)
