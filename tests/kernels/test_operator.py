"""The step as an operator of torch: its schema, compilation, export, and life without Triton."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from dng_kernels import (
    StepPlan,
    StepResult,
    _operator,
    dng_step,
    guide,
    noise_keys,
    standard_normal,
    update_posterior,
)
from dng_kernels._border import HAS_TRITON
from dng_math import (
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
from tests.helpers.versions import before

STEPS, BATCH, SHAPE = 10, 2, (2, 3, 4, 4)
C = NoiseSchedule.linear(STEPS).coefficients()
RULES = {
    "dng": DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1)),
    "log-odds": DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.1)),
    "divergence": DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, divergence=True)),
    "fbg": FeedbackGuidance(),
    "sld": SafeLatentDiffusion(),
    "contrastive": ContrastiveCFG(1.0, 0.01),
}
PLANS = {name: StepPlan(C, rule) for name, rule in RULES.items()}
PLANS["cfg"] = StepPlan(C, NegativePrompting(2.0), cfg_scale=3.0, clip=1.0)
# A compilation takes seconds.
MOSTLY_SLOW = [
    name if name in ("dng", "sld") else pytest.param(name, marks=pytest.mark.slow) for name in PLANS
]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# Inductor writes and builds C++ on a CPU.
has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
COMPILED = [
    ("auto", "aot_eager"),
    ("cpu", "aot_eager"),
    pytest.param("triton", "aot_eager", marks=needs_triton),
    pytest.param("auto", "inductor", marks=[needs_compiler, pytest.mark.slow]),
]
# torch.compile imports parts of torch that use what torch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.*is deprecated:DeprecationWarning",
)


OPERATORS = ["cpu", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=["auto", *OPERATORS])
def place(request, kernel_device):
    """A backend, and a device where it runs; "auto" is the reference under a compiler."""
    return request.param, kernel_device if request.param == "triton" else "cpu"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before, and what is compiled now goes with the test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    # Plain C++, and no header built beforehand: two functions are compiled here, not hundreds.
    plain = {"cpp_cache_precompile_headers": False, "cpp.simdlen": 1}
    plain = {name: value for name, value in plain.items() if name in inductor_config._config}
    with inductor_config.patch(plain):
        yield
    torch._dynamo.reset()


def draw(*names, seed=0, device="cpu", dtype=torch.float32):
    """Tensors of numbers, the same ones for a name and a seed."""
    return [
        standard_normal(seed, SHAPE, step=step, device=device, dtype=dtype)
        for step, _ in enumerate(names)
    ]


# ---------------------------------------------------------------- the schema


def call_plain(plan, backend, device):
    x, eps, eps_neg, z = draw("x", "eps", "eps_neg", "z", device=device)
    dng_step(plan, 3, x, eps, eps_neg, plan.init_state(BATCH), noise=z, backend=backend)


def call_in_place(plan, backend, device):
    x, eps, eps_neg = draw("x", "eps", "eps_neg", device=device)
    state = plan.init_state(BATCH)
    out = StepResult(x, state, eps, None, None)
    dng_step(plan, 3, x, eps, eps_neg, state, seed=3, out=out, backend=backend)


def call_keys(plan, backend, device):
    x, eps, eps_neg = draw("x", "eps", "eps_neg", device=device, dtype=torch.bfloat16)
    state, keys = plan.init_state(BATCH), noise_keys(2**64 - 1, BATCH, device=device)
    step = torch.tensor(3, device=device)
    dng_step(plan, step, x, eps, eps_neg, state, seed=keys, return_scale=True, backend=backend)


def call_everything(plan, backend, device):
    x, eps, eps_neg, uncond = draw("x", "eps", "eps_neg", "uncond", device=device)
    more = {
        "eps_uncond": uncond if plan.needs_uncond else None,
        "momentum": plan.init_momentum(x),
        "divergence_gap": torch.ones(BATCH, device=device) if plan.needs_divergence else None,
    }
    state = plan.init_state(BATCH)
    dng_step(
        plan,
        3,
        x,
        eps,
        eps_neg,
        state,
        seed=3,
        first_sample=2**40,
        return_guided=True,
        return_scale=True,
        backend=backend,
        **more,
    )


def call_guide(plan, backend, device):
    eps, eps_neg, uncond = draw("eps", "eps_neg", "uncond", device=device)
    more = {
        "eps_uncond": uncond if plan.needs_uncond else None,
        "momentum": plan.init_momentum(eps),
        "state": plan.init_state(BATCH),
    }
    guide(plan, 3, eps, eps_neg, return_scale=True, backend=backend, **more)


def call_update(plan, backend, device):
    x, x_next, eps, eps_neg = draw("x", "x_next", "eps", "eps_neg", device=device)
    gap = torch.ones(BATCH, device=device) if plan.needs_divergence else None
    state = plan.init_state(BATCH)
    update_posterior(plan, 3, x, x_next, eps, eps_neg, state, divergence_gap=gap, backend=backend)


CALLS = [
    *((call_plain, "dng"), (call_in_place, "dng"), (call_keys, "dng")),
    *((call_everything, plan) for plan in ("divergence", "sld", "contrastive", "cfg")),
    *((call_guide, plan) for plan in ("dng", "sld")),
    (call_update, "divergence"),
]


def recorded(monkeypatch, call, plan, place):
    """The arguments with which a call reaches the operator."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(_operator, "_launch", lambda *arguments: launches.append(arguments))
        call(PLANS[plan].to(place[1]), *place)
    (arguments,) = launches
    return arguments


@pytest.mark.parametrize("place", OPERATORS, indirect=True)
@pytest.mark.parametrize(("call", "plan"), CALLS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.thinned(5)
def test_the_operator_does_what_its_schema_says(call, plan, place, monkeypatch, fresh):
    """It writes into nothing else, its fake is true, and compiled code gives what eager does."""
    arguments = recorded(monkeypatch, call, plan, place)
    results = torch.library.opcheck(torch.ops.dng_kernels.step.default, arguments)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


def test_the_operator_takes_its_arguments_by_name(monkeypatch):
    """Compilers call it so; a name that one of their wrappers uses too would clash."""
    arguments = recorded(monkeypatch, call_plain, "dng", ("cpu", "cpu"))
    operator = torch.ops.dng_kernels.step.default
    names = [argument.name for argument in operator._schema.arguments]
    named = dict(zip(names, arguments, strict=True))
    x_next = named["out_x_next"].fill_(float("nan"))
    operator(**named)
    assert torch.isfinite(x_next).all()
    assert not {"mode", "self", "func", "op", "args", "kwargs"} & set(names)


def test_fake_tensors_step_into_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        plan = PLANS["dng"]
        x, state = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(BATCH)
        x = x.to(memory_format=torch.channels_last)
        result = dng_step(plan, 3, x, x, x, state, seed=3, return_scale=True)
        guided = guide(plan, 3, x, x, state)
        updated = update_posterior(plan, 3, x, x, x, x, state)
    for tensor in (*result[:2], result.scale, guided.eps_guided, updated.state):
        assert tensor.fake_mode is mode
    assert (result.x_next.shape, result.x_next.dtype) == (SHAPE, torch.bfloat16)
    assert result.x_next.stride() == guided.eps_guided.stride() == x.stride()
    assert result.state.shape == updated.state.shape == result.scale.shape == (BATCH,)


# ---------------------------------------------------------------- torch.compile


def compiled(function, compiler):
    """The function compiled in one piece, and a count of how often it was."""
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True), counter


def assert_same(actual, expected):
    """Equal to rounding: both run the same operator on the same numbers."""
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert [a is None for a in actual] == [e is None for e in expected]
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("randomness", ["noise", "seed", "keys"])
@pytest.mark.thinned(2)
def test_a_compiled_step_is_the_step(randomness, place, fresh):
    backend, device = place
    plan = PLANS["dng"].to(device)
    x, eps, eps_neg, z = draw("x", "eps", "eps_neg", "z", device=device)
    more = {
        "noise": {"noise": z},
        "seed": {"seed": 2**64 - 1, "first_sample": 5},
        "keys": {"seed": noise_keys(3, BATCH, device=device)},
    }[randomness]

    def function(x, eps, eps_neg, state):
        # Something before and after for the compiler to fuse.
        result = dng_step(
            plan,
            3,
            x * 0.5,
            eps,
            eps_neg,
            state,
            return_guided=True,
            return_scale=True,
            backend=backend,
            **more,
        )
        return result.x_next + 1.0, result.state, result.eps_guided, result.scale

    arguments = x, eps, eps_neg, plan.init_state(BATCH)
    fast, counter = compiled(function, "aot_eager")
    assert_same(fast(*arguments), function(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("plan", MOSTLY_SLOW)
def test_every_rule_compiles(plan, place, fresh):
    backend, device = place
    plan = PLANS[plan].to(device)
    x, x_next, eps, eps_neg, uncond = draw("x", "x_next", "eps", "eps_neg", "u", device=device)
    uncond = uncond if plan.needs_uncond else None
    gap = torch.ones(BATCH, device=device) if plan.needs_divergence else None

    def function(x, eps, eps_neg, state, momentum):
        third = {"eps_uncond": uncond, "momentum": momentum, "backend": backend}
        result = dng_step(plan, 3, x, eps, eps_neg, state, seed=1, divergence_gap=gap, **third)
        guided = guide(plan, 3, eps, eps_neg, state, **third)
        updated = ()
        if plan.tracker is not None:
            updated = update_posterior(
                plan, 3, x, x_next, eps, eps_neg, state, divergence_gap=gap, backend=backend
            )
        return (*result, *guided, *updated)

    arguments = x, eps, eps_neg, plan.init_state(BATCH), plan.init_momentum(x)
    fast, counter = compiled(function, "aot_eager")
    assert_same(fast(*arguments), function(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("place", "compiler"), COMPILED, indirect=["place"])
def test_a_compiled_step_writes_where_it_is_told(compiler, place, fresh):
    """In place, over x and the state: what the compiler makes pure must come back."""
    backend, device = place
    plan = PLANS["dng"].to(device)
    noise, eps, eps_neg = draw("x", "eps", "eps_neg", device=device)

    def function(x, state):
        for step in range(3):
            out = StepResult(x, state, None, None, None)
            dng_step(plan, step, x, eps, eps_neg, state, noise=noise, out=out, backend=backend)

    results = []
    for run in (function, compiled(function, compiler)[0]):
        (x,), state = draw("x", device=device), plan.init_state(BATCH)
        run(x, state)
        results.append((x, state))
    assert_same(results[1], results[0])
    assert not torch.equal(results[0][0], draw("x", device=device)[0])


class Network(torch.nn.Module):
    """Two predictions, as a doubled batch gives them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = torch.nn.Conv2d(3, 6, 1)

    def forward(self, x):
        return torch.tanh(self.mix(x)).chunk(2, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "compiler"), COMPILED, indirect=["place"])
def test_a_compiled_loop_with_a_network_is_the_loop(compiler, place, fresh):
    """Channel slices of the network's output go in as they lie."""
    backend, device = place
    plan, network = PLANS["dng"].to(device), Network().to(device)

    def function(x, state):
        for step in range(2):
            eps, eps_neg = network(x)
            result = dng_step(plan, step, x, eps, eps_neg, state, seed=7, backend=backend)
            x, state = result.x_next, result.state
        return x, state

    arguments = (*draw("x", device=device), plan.init_state(BATCH))
    fast, counter = compiled(function, compiler)
    with torch.no_grad():
        assert_same(fast(*arguments), function(*arguments))
    assert counter.frame_count == 1


def test_steps_given_as_tensors_share_one_compilation(place, fresh):
    backend, device = place
    plan, network = PLANS["dng"].to(device), Network().to(device)
    # What a first call makes and keeps would be seen as a change by the second.
    plan.workspace(BATCH, SHAPE[1] * SHAPE[2] * SHAPE[3])

    def function(step, x, state):
        eps, eps_neg = network(x)
        result = dng_step(plan, step, x, eps, eps_neg, state, seed=7, backend=backend)
        return result.x_next, result.state

    fast, counter = compiled(function, "aot_eager")
    here = there = (*draw("x", device=device), plan.init_state(BATCH))
    with torch.no_grad():
        for step in plan.indices:
            here, there = fast(step, *here), function(step, *there)
    assert_same(here, there)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_second_batch_size_is_compiled_for_all(fresh):
    plan = PLANS["dng"]

    def function(x, eps, eps_neg, state, z):
        return dng_step(plan, 3, x, eps, eps_neg, state, noise=z).x_next

    fast, counter = compiled(function, "aot_eager")
    for batch in (2, 3, 4, 5, 6):
        x, eps, eps_neg, z = (standard_normal(0, (batch, 8), step=i) for i in range(4))
        arguments = x, eps, eps_neg, plan.init_state(batch), z
        assert_same(fast(*arguments), function(*arguments))
    assert counter.frame_count == 2


def test_a_bad_argument_is_refused_under_compilation_too(fresh):
    plan = PLANS["dng"]
    x, eps = draw("x", "eps")
    fast, _ = compiled(lambda: dng_step(plan, 3, x, eps, eps[..., :3], seed=1), "aot_eager")
    # Before torch 2.8 the compiler said only what kind of error it had met.
    with pytest.raises(Exception, match="eps_neg must have the shape of x|class 'ValueError'"):
        fast()


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_a_transform_is_refused_under_compilation_too(transform, fresh):
    plan = PLANS["dng"]
    (x, eps), state = draw("x", "eps"), plan.init_state(BATCH)

    def step(x):
        return dng_step(plan, 3, x, eps, -eps, state, seed=1).x_next

    def function(x):
        if transform == "jvp":
            return torch.func.jvp(step, (x,), (x,))[1]
        return torch.vmap(step)(torch.stack([x, x]))

    # In one piece the compiler says so in its words, in several it leaves the call to torch.
    with pytest.raises(Exception, match="ValueError"):
        compiled(function, "aot_eager")[0](x)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="x (carries a forward derivative|is batched)"):
        torch.compile(function, backend="aot_eager")(x)


# ---------------------------------------------------------------- autocast


PLANS_IN_AUTOCAST = PLANS | {"perp_neg": StepPlan(C, PerpNeg())}


def everything(plan):
    """All three operations on a plan, as a function of tensors and as those tensors."""
    gap = torch.ones(BATCH) if plan.needs_divergence else None

    def function(x, x_next, eps, eps_neg, third, state, momentum):
        more = {
            "eps_uncond": third if plan.needs_uncond else None,
            "eps_pos": third if plan.needs_positive else None,
            "momentum": momentum,
        }
        found = dng_step(
            plan, 3, x, eps, eps_neg, state, seed=1, return_scale=True, divergence_gap=gap, **more
        )
        half = guide(plan, 3, eps, eps_neg, state, return_scale=True, **more)
        updated = ()
        if plan.tracker is not None:
            updated = update_posterior(plan, 3, x, x_next, eps, eps_neg, state, divergence_gap=gap)
        return tuple(t for t in (*found, *half, *updated) if t is not None)

    events = draw("x", "x_next", "eps", "eps_neg", "third")
    # Near enough for a posterior that does not come to rest at its bound, the same for all bits.
    events[1], events[3] = (near + 0.03 * by for near, by in (events[:2], events[2:4]))
    return function, (*events, plan.init_state(BATCH), plan.init_momentum(events[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS_IN_AUTOCAST)
def test_a_step_has_the_same_bits_in_autocast(plan, dtype):
    """Its dot products were of 16 bits there, and the posterior off by 5e-3 a step."""
    function, arguments = everything(PLANS_IN_AUTOCAST[plan])
    expected = function(*arguments)
    with torch.autocast("cpu", dtype):
        assert all(map(torch.equal, function(*arguments), expected))
        # What is around the step is still the caller's.
        assert torch.is_autocast_enabled("cpu")
        assert (arguments[0][0, 0] @ arguments[1][0, 0]).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])],
)
@pytest.mark.parametrize("plan", [pytest.param("divergence", marks=pytest.mark.slow), "perp_neg"])
def test_a_compiled_step_has_the_same_bits_in_autocast(plan, compiler, fresh):
    """Whether the block is around the compiled code or inside of it."""
    function, arguments = everything(PLANS_IN_AUTOCAST[plan])

    def inside(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    expected = compiled(function, compiler)[0](*arguments)
    assert all(map(torch.equal, compiled(inside, compiler)[0](*arguments), expected))
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, compiled(function, compiler)[0](*arguments), expected))


@pytest.mark.skipif(before("torch", "2.8"), reason="torch 2.7 exports no tensors of a closure")
def test_an_exported_step_has_the_same_bits_in_autocast(fresh):
    """The program holds the operator, and is run wherever its user likes."""
    function, arguments = everything(PLANS["dng"])

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    with torch.no_grad():
        program = torch.export.export(Module(), arguments).module()
        expected = program(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, program(*arguments), expected))


class OneStep(torch.nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.network, self.plan = Network(), plan

    def forward(self, step, x, state, keys):
        eps, eps_neg = self.network(x)
        result = dng_step(self.plan, step, x, eps, eps_neg, state, seed=keys)
        return result.x_next, result.state


def test_a_module_that_takes_a_step_is_exported(fresh):
    plan = PLANS["dng"]
    module = OneStep(plan)
    (x,) = draw("x")
    arguments = torch.tensor(3), x, plan.init_state(BATCH), noise_keys(3, BATCH)
    with torch.no_grad():
        program = torch.export.export(module, arguments)
        operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert torch.ops.dng_kernels.step.default in operators
        # Other numbers than those of the export: nothing of them was frozen in.
        later = torch.tensor(5), -x, plan.init_state(BATCH) - 1, noise_keys(9, BATCH)
        assert_same(program.module()(*later), module(*later))


# ---------------------------------------------------------------- imports


def run_python(*parts):
    script = "".join(map(textwrap.dedent, parts))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CPU_STEP = """
    import torch
    from dng_kernels import StepPlan, dng_step
    from dng_math import DynamicNegativeGuidance, NoiseSchedule, PaperTracker

    rule = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1))
    plan = StepPlan(NoiseSchedule.linear(10).coefficients(), rule)
    x = torch.ones(2, 3)
    result = dng_step(plan, 0, x, x, 2 * x, plan.init_state(2), seed=1)
    assert torch.isfinite(result.x_next).all() and torch.isfinite(result.state).all()
"""


def test_without_triton_a_cpu_takes_its_steps_and_the_kernel_says_what_is_missing():
    """None in sys.modules is what an import and a look for a module find of one that is absent."""
    blocked = """
    import sys

    sys.modules["triton"] = None
    """
    refused = """
    try:
        dng_step(plan, 0, x, x, x, plan.init_state(2), seed=1, backend="triton")
    except ValueError as error:
        print(error)
    """
    message = run_python(blocked, CPU_STEP, refused)
    assert message.strip() == "backend must not be 'triton': Triton is not installed"


@needs_triton
def test_the_kernel_is_refused_on_a_cpu_by_name():
    """Outside of the interpreter, which the other tests run in."""
    compiled = """
    import os

    os.environ.pop("TRITON_INTERPRET", None)
    """
    refused = """
    try:
        dng_step(plan, 0, x, x, x, plan.init_state(2), seed=1, backend="triton")
    except ValueError as error:
        print(error)
    """
    message = run_python(compiled, CPU_STEP, refused)
    assert message.startswith("backend must not be 'triton' for tensors on cpu: the kernel runs on")


def test_a_cpu_step_imports_no_compiler_and_nothing_for_figures():
    modules = run_python(CPU_STEP, "import sys; print(*sorted(sys.modules))").split()
    unwanted = {"numba", "scipy", "matplotlib", "sklearn", "triton", "dng_kernels.fused"}
    assert "dng_kernels.step" in modules and not unwanted & set(modules)
