"""The kernel on a GPU, at the sizes it is for: numbers, repeatability, graphs, launches, memory."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from dng_kernels import (
    BoundStep,
    StepPlan,
    StepResult,
    dng_step,
    guide,
    noise_keys,
    normal,
    standard_normal,
    update_posterior,
)
from dng_kernels.plan import COLUMN
from dng_math import (
    DDIM,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
)

pytestmark = [
    pytest.mark.gpu,
    # torch.compile imports parts of torch that use what torch deprecates, and Inductor has advice
    # on matrix products, of which there are none here.
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\._inductor.*"),
]

STEPS, STEP = 10, 3
C = NoiseSchedule.linear(STEPS).coefficients()
# Half the rounding of an output, and what float32 arithmetic adds.
ROUNDING = {torch.float32: 5e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
IMAGES = [
    *((batch, 4, 64, 64) for batch in (1, 2, 16, 64)),
    *((batch, 3, 32, 32) for batch in (1, 64)),
    (3, 3, 31, 33),
]


def difference_of(elements):
    """How far predictions are apart for a log ratio of about one.

    From the coefficients of the step in the middle: transition_factor^2 |delta|^2 = 2 variance.
    """
    row = StepPlan(C, RULES["paper"](1.0)).row(STEP)
    return (2.0 * row.variance / elements) ** 0.5 / abs(row.transition_factor)


# Rules whose scale depends on a distance are given one that makes it neither 0 nor 1.
RULES = {
    "np": lambda gap_sq: NegativePrompting(2.0),
    "paper": lambda gap_sq: DynamicNegativeGuidance(1.0, PaperTracker(prior=0.3)),
    "log_odds": lambda gap_sq: DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.3)),
    "cfg": lambda gap_sq: ClassifierFreeGuidance(3.0),
    "fbg": lambda gap_sq: FeedbackGuidance(temperature=0.5),
    # No element is at the threshold, where a rounding would open or shut the gate.
    "sld": lambda gap_sq: SafeLatentDiffusion(threshold=100.0, slope=0.5 / gap_sq**0.5),
    "contrastive": lambda gap_sq: ContrastiveCFG(2.0, 1.0 / gap_sq),
    "perp_neg": lambda gap_sq: PerpNeg(2.0),
}


def plan_for(rule, shape, **options):
    elements = torch.Size(shape[1:]).numel()
    gap_sq = elements * difference_of(elements) ** 2
    return StepPlan(C, RULES[rule](gap_sq), device="cuda", **options)


def inputs_for(plan, shape, dtype=torch.float32, seed=0):
    """x and predictions as a network would give them, the two close to each other."""
    elements = torch.Size(shape[1:]).numel()

    def draw(step):
        return standard_normal(seed, shape, step=step, device="cuda")

    eps = draw(1)
    inputs = {
        "x": draw(0).to(dtype),
        "eps": eps.to(dtype),
        "eps_neg": (eps + difference_of(elements) * draw(2)).to(dtype),
        "state": plan.init_state(shape[0]),
    }
    if plan.needs_positive:
        inputs["eps_pos"] = (eps + draw(3)).to(dtype)
    if plan.needs_uncond:
        inputs["eps_uncond"] = (eps + draw(3)).to(dtype)
    if plan.needs_momentum:
        inputs["momentum"] = 0.1 * draw(4)
    return inputs


def poisoned(plan, x):
    """Every output, full of NaN."""
    numbers = torch.full((2, len(x)), float("nan"), device="cuda")
    return StepResult(
        torch.full_like(x, float("nan")),
        None if plan.tracker is None else numbers[0],
        torch.full_like(x, float("nan")),
        numbers[1],
        torch.full_like(x, float("nan"), dtype=torch.float32) if plan.needs_momentum else None,
    )


def doubled(inputs):
    """The same numbers in float64, for the reference."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def room_for(gib):
    """Skips where the GPU has less memory free than that."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of memory on the GPU, {free:.0f} are free")


def assert_agree(result, expected, dtype):
    """The kernel's outputs are those of float64, each to its own rounding."""
    bound = ROUNDING[dtype]
    for name in ("x_next", "eps_guided"):
        actual, exact = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(actual.double(), exact, rtol=bound, atol=bound)
    # Sums over a sample of what float32 rounds; a log ratio of order one is left of them.
    for name in ("state", "scale"):
        actual, exact = getattr(result, name), getattr(expected, name)
        assert (actual is None) == (exact is None)
        if actual is not None:
            torch.testing.assert_close(actual.double(), exact.double(), rtol=2e-4, atol=2e-4)
    if expected.momentum is not None:
        torch.testing.assert_close(
            result.momentum.double(), expected.momentum, rtol=5e-6, atol=5e-6
        )


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_that_of_float64(rule, dtype, shape):
    """With noise made from a seed; every number of every output is written."""
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape, dtype)
    out = poisoned(plan, inputs["x"])
    result = dng_step(plan, STEP, **inputs, seed=2**63 + 1, first_sample=2**33, out=out)
    expected = dng_step(
        plan,
        STEP,
        **doubled(inputs),
        seed=2**63 + 1,
        first_sample=2**33,
        return_guided=True,
        return_scale=True,
    )
    assert_agree(result, expected, dtype)
    if plan.tracker is not None:
        # Else the comparison would be one of bounds.
        assert (result.state != plan.table[STEP, COLUMN["low"]]).any()
        assert (result.state - inputs["state"]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"cfg_scale": 3.0}, {"clip": 1.0}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("rule", ["paper", "log_odds", "sld", "contrastive"])
def test_a_step_of_every_kind_is_that_of_float64(rule, layout, options):
    """Classifier-free guidance beneath, clipping, a sampler that drifts, predictions narrower."""
    shape = (3, 4, 64, 64)
    elements = torch.Size(shape[1:]).numel()
    coefficients = NoiseSchedule.linear(STEPS).coefficients(DDIM(0.5))
    chosen = RULES[rule](elements * difference_of(elements) ** 2)
    # The posterior is wrong with so little noise; a step is compared with a step.
    plan = StepPlan(coefficients, chosen, device="cuda", _warn=False, **options)
    inputs = inputs_for(plan, shape)
    for name in ("eps", "eps_neg", "eps_uncond"):
        if name in inputs:
            inputs[name] = inputs[name].bfloat16()
    inputs["noise"] = standard_normal(5, shape, device="cuda")
    if layout == "channels last":
        inputs |= {
            name: value.to(memory_format=torch.channels_last)
            for name, value in inputs.items()
            if value is not None and value.ndim == 4
        }
    both = [
        dng_step(plan, STEP, **given, return_guided=True, return_scale=True)
        for given in (inputs, doubled(inputs))
    ]
    assert both[0].x_next.stride() == inputs["x"].stride()
    torch.testing.assert_close(both[0].x_next.double(), both[1].x_next, rtol=5e-6, atol=5e-6)
    both = [result._replace(x_next=result.eps_guided) for result in both]
    assert_agree(both[0], both[1], torch.bfloat16)


@pytest.mark.parametrize("rule", ["paper", "contrastive", "perp_neg"])
def test_a_large_sample_is_that_of_float64(rule):
    """2^26 elements, 1024 chunks of 64 blocks."""
    room_for(10)
    shape = (1, 2**26)
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    result = dng_step(plan, STEP, **inputs, seed=1, out=poisoned(plan, inputs["x"]))
    more = {"return_guided": True, "return_scale": True}
    expected = dng_step(plan, STEP, **doubled(inputs), seed=1, **more)
    assert_agree(result, expected, torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_and_update_alone_are_those_of_float64(rule):
    shape = (5, 4, 64, 64)
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    x = inputs.pop("x")
    both = [guide(plan, STEP, **given, return_scale=True) for given in (inputs, doubled(inputs))]
    for actual, exact in zip(*both, strict=True):
        assert (actual is None) == (exact is None)
        if actual is not None:
            torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-5, atol=1e-5)
    if plan.tracker is not None:
        taken = dng_step(plan, STEP, x, **inputs, seed=3)
        given = {"x": x, "x_next": taken.x_next} | inputs
        updated = update_posterior(plan, STEP, **given).state
        exact = update_posterior(plan, STEP, **doubled(given)).state
        torch.testing.assert_close(updated.double(), exact, rtol=2e-4, atol=2e-4)
        # x_next was rounded when it was stored, which a difference of it and x sees.
        torch.testing.assert_close(updated, taken.state, rtol=1e-3, atol=1e-3)


FAR = 2**31 + 2**20  # elements


def test_a_sample_may_have_more_than_2_31_elements():
    """Its head, its tail and what is around 2^31 are those of the reference on these parts."""
    room_for(24)
    plan = StepPlan(C, NegativePrompting(2.0), device="cuda")
    pattern = standard_normal(0, (3, 2**20), device="cuda").half()
    x, eps, eps_neg = (row.repeat(FAR // 2**20).view(1, FAR) for row in pattern)
    x_next = torch.full_like(x, float("nan"))
    out = StepResult(x_next, None, None, None, None)
    dng_step(plan, STEP, x, eps, eps_neg, seed=3, out=out)
    keys = noise_keys(3, 1, device="cuda")
    for first in (0, 2**20 + 4, 2**31 - 2**15, FAR - 2**16):
        part = slice(first, first + 2**16)
        z = normal.normals(keys, 2**16, STEP, first=first)
        given = (tensor[:, part].double() for tensor in (x, eps, eps_neg))
        expected = dng_step(plan, STEP, *given, noise=z.double()).x_next
        torch.testing.assert_close(x_next[:, part].double(), expected, rtol=2.0**-11, atol=2.0**-11)
    assert not torch.isnan(x_next).any()


def test_sums_may_be_over_more_than_2_31_elements():
    """Of equal numbers, whose sums are known; a small temperature leaves half a nat of 10^9."""
    room_for(24)
    numbers = {"x": 0.5, "x_next": 0.375, "eps": 0.25, "eps_neg": 0.2509765625}
    row = plan_for("paper", (1, FAR)).row(STEP)
    mean = row.transition_x_factor * numbers["x"] + row.transition_factor * numbers["eps"]
    gap = row.transition_factor * (numbers["eps_neg"] - numbers["eps"])
    log_ratio = FAR * (numbers["x_next"] - mean - 0.5 * gap) * gap / row.variance
    tracker = PaperTracker(prior=0.3, temperature=0.5 / abs(log_ratio))
    plan = StepPlan(C, DynamicNegativeGuidance(1.0, tracker), device="cuda")
    state = plan.init_state(1)
    wide = {
        name: torch.full((1, FAR), value, dtype=torch.float16, device="cuda")
        for name, value in numbers.items()
    }
    updated = update_posterior(plan, STEP, **wide, state=state).state
    expected = state.item() + (0.5 if log_ratio > 0 else -0.5)
    # Sums of 2^11 equal numbers a lane, which float32 rounds one way: 2^-13 of them at the worst.
    assert abs(updated.item() - expected) < 0.5 * 2.0**-12


@pytest.mark.parametrize(("batch", "apart"), [(2, 2**31 - 1), (3, 2**30 + 8)], ids=str)
def test_samples_may_be_2_31_elements_apart(batch, apart):
    room_for(10)
    shape = (batch, 1301)
    plan = plan_for("paper", shape)
    buffer = torch.empty(2**31 + 2**14, dtype=torch.float16, device="cuda")
    inputs = inputs_for(plan, shape, torch.float16)
    far = {}
    for i, name in enumerate(("x", "eps", "eps_neg")):
        far[name] = buffer.as_strided(shape, (apart, 1), storage_offset=2048 * i)
        far[name].copy_(inputs[name])
    result = dng_step(plan, STEP, **inputs | far, seed=1)
    expected = dng_step(plan, STEP, **inputs, seed=1)
    torch.testing.assert_close(result.x_next, expected.x_next, rtol=2.0**-10, atol=2.0**-10)
    torch.testing.assert_close(result.state, expected.state, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_noise_on_the_gpu_is_that_of_the_cpu(seed):
    """The words are the same bits; a product and a sum may be one rounding."""
    options = {"step": STEP, "first_sample": 2**32 - 2}
    here, there = (
        standard_normal(seed, (4, 3, 33, 31), device=device, **options)
        for device in ("cuda", "cpu")
    )
    torch.testing.assert_close(here.cpu(), there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("as_keys", [False, True])
def test_noise_of_the_kernel_is_that_of_the_cpu(as_keys, layout):
    plan = StepPlan(C, NegativePrompting(0.0), device="cuda")
    zero = torch.zeros(4, 3, 32, 32, device="cuda").to(memory_format=layout)
    seed, first = 2**63 + 9, 2**32 - 2
    given = {"seed": seed, "first_sample": first}
    if as_keys:
        given = {"seed": noise_keys(seed, 4, first_sample=first, device="cuda")}
    x_next = dng_step(plan, STEP, zero, zero, zero, **given).x_next
    deviation = plan.row(STEP).deviation
    z = standard_normal(seed, (4, 3, 32, 32), step=STEP, first_sample=first)
    torch.testing.assert_close(x_next.cpu() / deviation, z, rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------- repeatability


@pytest.mark.parametrize("shape", [(16, 4, 64, 64), (1, 2**22), (64, 3, 32, 32)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_runs_are_bit_equal(rule, shape):
    """Whatever order the programs of a launch end in; and no run leaves anything to the next."""
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    more = {"seed": 1, "return_guided": True, "return_scale": True}
    first = dng_step(plan, STEP, **inputs, **more)
    for _ in range(20):
        again = dng_step(plan, STEP, **inputs, **more, out=poisoned(plan, inputs["x"]))
        for a, b in zip(first, again, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    counters, _ = plan.workspace(shape[0], torch.Size(shape[1:]).numel())
    assert not counters.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_does_not_depend_on_its_batch(rule):
    shape = (8, 4, 64, 64)
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    more = {"return_guided": True, "return_scale": True}
    whole = dng_step(plan, STEP, **inputs, seed=1, **more)
    for part in (slice(0, 1), slice(5, 6), slice(2, 7)):
        some = {name: None if v is None else v[part] for name, v in inputs.items()}
        alone = dng_step(plan, STEP, **some, seed=1, first_sample=part.start, **more)
        for a, b in zip(alone, whole, strict=True):
            assert (a is None and b is None) or torch.equal(a, b[part])


# ---------------------------------------------------------------- what a step costs the host


def full_call(rule, shape=(4, 4, 64, 64)):
    """A step whose outputs all exist, ready to be taken again and again."""
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    out = poisoned(plan, inputs["x"])
    step = torch.tensor(STEP, device="cuda")
    keys = noise_keys(3, shape[0], device="cuda")

    def take():
        dng_step(plan, STEP, **inputs, seed=3, out=out)
        dng_step(plan, step, **inputs, seed=keys, out=out)

    take()  # compiles, and makes the workspace
    torch.cuda.synchronize()
    return take


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("rule", RULES)
def test_a_step_does_not_wait_for_the_gpu(rule):
    take = full_call(rule)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_into_given_tensors_allocates_nothing(rule):
    take = full_call(rule)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    take()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def kernels_of(function):
    """Names of the kernels, copies and fills that a function starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about its own versions
        with torch.profiler.profile(activities=activities) as profile:
            function()
            torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@pytest.mark.parametrize("shape", [(4, 4, 64, 64), (4, 3, 16, 16)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_one_launch(rule, shape):
    """Of several chunks a sample, or of one; the two calls are two launches and nothing else."""
    take = full_call(rule, shape)
    kernels_of(take)  # the profiler's own start is not seen by the second
    assert kernels_of(take) == ["fused_step"] * 2


# ---------------------------------------------------------------- graphs and compilers


def captured_step(rule, bound):
    """A graph of one step, its inputs and its results; the plan is gone, and what it made."""
    shape = (3, 4, 64, 64)
    plan = plan_for(rule, shape)
    inputs = inputs_for(plan, shape)
    out = poisoned(plan, inputs["x"])
    if bound:
        step = BoundStep(plan, **inputs, seed=1, out=out)

        def take():
            step(STEP)
    else:

        def take():
            dng_step(plan, STEP, **inputs, seed=1, out=out)

    take()
    torch.cuda.synchronize()
    expected = [None if value is None else value.clone() for value in out]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take()
    return graph, inputs, out, expected, weakref.ref(plan)


@pytest.mark.parametrize("bound", [False, True], ids=["a call", "a bound step"])
@pytest.mark.parametrize("rule", RULES)
def test_a_graph_outlives_its_plan(rule, bound):
    """Its kernels too: everything that could be freed is freed, and written over."""
    StepPlan.release_captured()
    graph, _inputs, out, expected, plan = captured_step(rule, bound)
    gc.collect()
    assert plan() is None
    # Small tensors in place of those that were freed, with numbers that no counter has.
    filled = [torch.full((2**i,), 7, dtype=torch.int32, device="cuda") for i in range(18)] * 8
    for value in out:
        if value is not None:
            value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for value, wanted in zip(out, expected, strict=True):
        assert value is None or torch.equal(value, wanted)
    assert all(bool((each == 7).all()) for each in filled)
    del graph
    assert StepPlan.release_captured() >= 4


class Network(torch.nn.Module):
    """Two predictions of a tiny network: every operation gives the same bits every time."""

    def __init__(self):
        super().__init__()
        weights = standard_normal(1, (2, 4, 1, 1))
        self.weights = torch.nn.Parameter(weights, requires_grad=False)

    def forward(self, x):
        x = x + 0.1 * x.roll(1, dims=1)
        return torch.tanh(self.weights[0] * x), torch.tanh(self.weights[1] * x)


def run_of(rule, shape=(3, 4, 64, 64)):
    """A run of all steps in place; what it starts from, and where it ends."""
    plan = plan_for(rule, shape)
    network = Network().cuda()
    start = standard_normal(2, shape, device="cuda")
    keys = noise_keys(2**64 - 1, shape[0], device="cuda")
    kept = {
        "x": start.clone(),
        "state": plan.init_state(shape[0]),
        "momentum": plan.init_momentum(start),
        "step": torch.zeros((), dtype=torch.int64, device="cuda"),
    }
    kept = {name: value for name, value in kept.items() if value is not None}
    initial = {name: value.clone() for name, value in kept.items()}

    def reset():
        for name, value in kept.items():
            value.copy_(initial[name])

    def loop():
        for _ in range(STEPS):
            eps, eps_neg = network(kept["x"])
            state, momentum = kept.get("state"), kept.get("momentum")
            third = {"eps_pos": 0.5 * eps} if plan.needs_positive else {}
            out = StepResult(kept["x"], state, None, None, momentum)
            dng_step(
                plan,
                kept["step"],
                kept["x"],
                eps,
                eps_neg,
                state,
                momentum=momentum,
                seed=keys,
                out=out,
                **third,
            )
            kept["step"] += 1

    return kept, reset, loop


@pytest.mark.parametrize("rule", RULES)
def test_a_graph_replays_a_run(rule):
    """A tiny network, the step, and a step index that the graph itself moves on; twice."""
    kept, reset, loop = run_of(rule)
    with torch.no_grad():
        loop()
        expected = {name: value.clone() for name, value in kept.items()}
        assert expected["step"].item() == STEPS and torch.isfinite(expected["x"]).all()
        reset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        for _ in range(2):
            reset()
            graph.replay()
            for name, value in kept.items():
                assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # for it was refused
def test_a_capture_without_a_workspace_says_what_to_do():
    shape = (3, 4, 64, 64)
    warm = plan_for("paper", shape)
    inputs = inputs_for(warm, shape)
    dng_step(warm, STEP, **inputs, seed=1)  # compiled, so that the workspace alone is missing
    plan = warm.to("cuda")
    torch.cuda.synchronize()
    message = r"workspace .* before a graph is captured.*plan.workspace\(3, 16384\)"
    with pytest.raises(RuntimeError, match=message):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            dng_step(plan, STEP, **inputs, seed=1)
    # And that helps.
    plan.workspace(3, 16384)
    expected = dng_step(warm, STEP, **inputs, seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dng_step(plan, STEP, **inputs, seed=1)
    graph.replay()
    assert torch.equal(captured.x_next, expected.x_next)
    assert torch.equal(captured.state, expected.state)


@pytest.mark.parametrize("rule", ["paper", "sld", "perp_neg"])
def test_a_compiled_run_is_the_run(rule):
    """In one piece; the compiler may fuse the network otherwise, so to rounding."""
    torch._dynamo.reset()
    plan, network = plan_for(rule, (3, 4, 64, 64)), Network().cuda()
    start = standard_normal(2, (3, 4, 64, 64), device="cuda")
    plan.workspace(3, 4 * 64 * 64)

    def loop(x, state, momentum):
        for step in range(4):
            eps, eps_neg = network(x)
            third = {"eps_pos": 0.5 * eps} if plan.needs_positive else {}
            result = dng_step(
                plan, step, x, eps, eps_neg, state, momentum=momentum, seed=7, **third
            )
            x, state, momentum = result.x_next, result.state, result.momentum
        return x, state

    initial = start, plan.init_state(3), plan.init_momentum(start)
    with torch.no_grad():
        expected = loop(*initial)
        actual = torch.compile(loop, fullgraph=True)(*initial)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    if plan.tracker is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


# ---------------------------------------------------------------- compute-sanitizer

SMALL_RUN = """
import torch

from dng_kernels import StepPlan, dng_step, guide, noise_keys, update_posterior
from dng_math import (
    ContrastiveCFG,
    DynamicNegativeGuidance,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
)

coefficients = NoiseSchedule.linear(10).coefficients()
tracked = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1))
rules = [NegativePrompting(), tracked, ContrastiveCFG(), PerpNeg(), SafeLatentDiffusion()]
# Several chunks, one, and one with room to spare; aligned or not.
for shape in ((2, 4, 32, 32), (2, 3, 31, 33), (3, 3, 5, 7)):
    x, eps, eps_neg = (torch.rand(shape).cuda() for _ in range(3))
    for rule in rules:
        plan = StepPlan(coefficients, rule, device="cuda")
        more = {"state": plan.init_state(len(x)), "momentum": plan.init_momentum(x)}
        if plan.needs_positive:
            more["eps_pos"] = 2 * eps
        for seed in (3, noise_keys(3, len(x), device="cuda")):
            result = dng_step(
                plan, 2, x, eps, eps_neg, **more, seed=seed, return_guided=True, return_scale=True
            )
        dng_step(plan, 2, x, eps, eps_neg, **more, noise=torch.rand(shape).cuda())
        guide(plan, 2, eps, eps_neg, **more, return_scale=True)
        if plan.tracker is not None:
            update_posterior(plan, 2, x, result.x_next, eps, eps_neg, more["state"])
        assert torch.isfinite(result.x_next).all()
print("all steps were taken")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "small_run.py"
    script.write_text(textwrap.dedent(SMALL_RUN))
    environment = os.environ | {
        # Every tensor in an allocation of its own, so that its end is seen.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    options = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    if "--kernel-regex" in options:
        # The kernel alone: what torch's kernels do is not judged here.
        command += ["--kernel-regex", "kns=fused_step"]
    done = subprocess.run(
        [*command, sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=570,
    )
    printed = done.stdout + done.stderr
    assert "all steps were taken" in printed, printed[-4000:]
    clean = "0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert done.returncode == 0 and clean in printed, printed[-4000:]
