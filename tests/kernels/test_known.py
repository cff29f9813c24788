"""Steps that are launched again without their checks, and steps that were bound.

On a CPU the kernel runs in Triton's interpreter, which has nothing to launch directly.  So a
program of its own, with a driver that counts (benchmarks.stand_in), looks at what would be
launched: this file is also that program.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dng_kernels import BoundStep, StepPlan, StepResult, dng_step, noise_keys
from dng_kernels import bound as bound_module
from dng_kernels._compiled_cpu import can_take
from dng_kernels.naive import Inputs
from dng_math import (
    CRG,
    DDIM,
    DDPM,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LimitedInterval,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
)

ROOT = Path(__file__).parents[2]
STEPS = 6
C = NoiseSchedule.linear(STEPS).coefficients(DDPM())
DNG = DynamicNegativeGuidance.tracked(1.0, prior=0.2, temperature=0.3)
PLANS = {
    "np": StepPlan(C, NegativePrompting(0.5)),
    "dng": StepPlan(C, DNG),
    "cfg": StepPlan(C, DNG, cfg_scale=2.0),
    "from uncond": StepPlan(C, replace(DNG, reference="unconditional"), cfg_scale=2.0),
    "crg": StepPlan(C, CRG(), cfg_scale=2.0),
    "weighted": StepPlan(C, DNG, weighted=True),
    "sld": StepPlan(C, SafeLatentDiffusion(0.5, threshold=0.5)),
    "contrastive": StepPlan(C, ContrastiveCFG()),
    "perp_neg": StepPlan(C, PerpNeg(0.5, 1.0)),
    "no noise": StepPlan(NoiseSchedule.linear(STEPS).coefficients(DDIM()), NegativePrompting(0.5)),
}
SHAPE = (2, 3, 4, 4)


def arguments(plan, seed=0, shape=SHAPE, dtype=torch.float32):
    """Tensors of a step by name, x and predictions first."""
    generator = torch.Generator().manual_seed(seed)
    given = {
        name: torch.randn(shape, generator=generator).to(dtype) for name in ("x", "eps", "eps_neg")
    }
    if plan.has_state:
        given["state"] = plan.init_state(shape[0])
    if plan.needs_uncond:
        given["eps_uncond"] = torch.randn(shape, generator=generator).to(dtype)
    if plan.needs_positive:
        given["eps_pos"] = torch.randn(shape, generator=generator).to(dtype)
    if plan.needs_momentum:
        given["momentum"] = torch.randn(shape, generator=generator)
    if plan.noisy[0]:
        given["noise"] = torch.randn(shape, generator=generator).to(dtype)
    return given


def same(a, b):
    return all(
        (left is None) == (right is None) and (left is None or torch.equal(left, right))
        for left, right in zip(a, b, strict=True)
    )


def close(a, b):
    """Equal to a few roundings, of numbers of about 1 and sums over a sample of them."""
    return all(
        (left is None) == (right is None)
        and (left is None or torch.allclose(left, right, rtol=3e-6, atol=3e-6))
        for left, right in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("name", PLANS)
def test_a_bound_step_is_the_step(name, backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    plan = PLANS[name]
    given = arguments(plan)
    bound = BoundStep(plan, **given, return_guided=True, return_scale=True, backend=backend)
    for step in (0, 3, STEPS - 1):
        options = {"return_guided": True, "return_scale": True, "backend": backend}
        expected = dng_step(plan, plan.indices[step], **given, **options)
        assert bound(step) is bound.result
        if backend == "cpu":
            assert close(bound.result, expected), step  # by another loop, for most rules
        else:
            assert same(bound.result, expected), step


@pytest.mark.parametrize("noise", [{"seed": 5}, {"seed": 2**64 - 1, "first_sample": 3}])
def test_a_bound_step_makes_its_noise(noise):
    plan = PLANS["dng"]
    given = arguments(plan)
    del given["noise"]
    bound = BoundStep(plan, **given, **noise)
    for step in (0, 2):
        assert same(bound(step), dng_step(plan, plan.indices[step], **given, **noise))


def test_a_loop_in_place_is_the_loop():
    plan = PLANS["dng"]
    given = arguments(plan)
    x, state, expected = given["x"].clone(), given["state"].clone(), None
    own = given | {"x": x, "state": state}
    bound = BoundStep(plan, **own, out=StepResult(x, state))
    for step in range(STEPS):
        taken = (
            given if expected is None else given | {"x": expected.x_next, "state": expected.state}
        )
        expected = dng_step(plan, plan.indices[step], **taken)
        bound(step)
        assert close((x, state), (expected.x_next, expected.state))


def test_other_tensors_can_be_bound():
    plan = PLANS["perp_neg"]
    first, second = arguments(plan, 0), arguments(plan, 1)
    bound = BoundStep(plan, **first)
    assert bound(1) is bound.result
    bound.rebind(eps=second["eps"], eps_pos=second["eps_pos"])
    mixed = first | {"eps": second["eps"], "eps_pos": second["eps_pos"]}
    assert same(bound(1), dng_step(plan, plan.indices[1], **mixed))
    with pytest.raises(ValueError, match="eps_uncond must be one of the tensors that were bound"):
        bound.rebind(eps_uncond=second["eps"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"eps": torch.zeros(2, 3, 4, 5)}, r"eps must be torch.float32 of shape \(2, 3, 4, 4\)"),
        ({"eps": torch.zeros(SHAPE, dtype=torch.float64)}, "eps must be torch.float32.*float64"),
        ({"eps": torch.zeros(SHAPE).transpose(2, 3)}, "eps must be.*strides"),
        ({"eps": torch.zeros(SHAPE, requires_grad=True)}, "eps must be.*without grad"),
        ({"eps": None}, "eps must be a tensor, got None"),
        ({"eps_pos": torch.zeros(SHAPE)}, "eps_pos must be one of the tensors that were bound"),
        ({"eps_third": torch.zeros(SHAPE)}, "eps_third must be one of the tensors"),
        ({"epsilon": torch.zeros(SHAPE)}, "epsilon must be one of the tensors that were bound"),
    ],
)
def test_other_kinds_of_tensors_cannot(tensors, message):
    plan = PLANS["dng"]
    given = arguments(plan)
    bound = BoundStep(plan, **given)
    with pytest.raises((ValueError, TypeError), match=message):
        bound.rebind(**tensors)
    assert close(bound(1), dng_step(plan, plan.indices[1], **given))


LOOPED = {
    "interval": StepPlan(C, LimitedInterval(DNG, 0.0, 0.5), cfg_scale=3.0),
    "fbg": StepPlan(C, FeedbackGuidance(0.9)),
    "toward": StepPlan(C, ClassifierFreeGuidance(1.5)),
    "log-odds, drift": StepPlan(
        NoiseSchedule.linear(STEPS).coefficients(DDIM(0.5)),
        DynamicNegativeGuidance.tracked(0.8, prior=0.2, temperature=0.3, tracker="log-odds"),
        _warn=False,
    ),
    "divergence": StepPlan(
        NoiseSchedule.linear(STEPS).coefficients(DDIM(0.5)),
        DynamicNegativeGuidance(0.8, PaperTracker(prior=0.2, divergence=True)),
    ),
} | {name: PLANS[name] for name in ("np", "dng", "cfg", "no noise")}


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_loop_is_the_reference(name, dtype):
    plan = LOOPED[name]
    given = arguments(plan, 3, (3, 5, 7, 3), dtype)
    if dtype == torch.float64 and plan.has_state:
        given["state"] = given["state"].double()
    if plan.needs_divergence:
        given["divergence_gap"] = torch.tensor([0.5, -2.0, 0.0], dtype=given["state"].dtype)
    bound = BoundStep(plan, **given, return_guided=True, return_scale=True)
    assert can_take(plan.variants[0], bound._inputs, bound.result)
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2.0**-7}
    wide = {key: value.double() for key, value in given.items()}
    for step in (0, 3, STEPS - 1):
        expected = dng_step(
            plan,
            plan.indices[step],
            **wide,
            return_guided=True,
            return_scale=True,
            backend="reference",
        )
        for left, right in zip(bound(step), expected, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                close_to = tolerance.get(dtype, 2.0**-10)
                torch.testing.assert_close(left.double(), right, rtol=close_to, atol=close_to)


def test_a_sample_has_the_same_bits_in_any_batch_of_the_loop():
    plan = PLANS["cfg"]
    given = arguments(plan, 5, (7, 3, 33, 31))
    together = [t.clone() for t in BoundStep(plan, **given)(2) if t is not None]
    for i in (0, 3, 6):
        alone = {key: value[i : i + 1].clone() for key, value in given.items()}
        single = [t for t in BoundStep(plan, **alone)(2) if t is not None]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, single, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("layout", ["channels last", "transposed", "a slice", "repeated"])
def test_tensors_that_do_not_lie_in_c_order_are_read_as_they_are(layout, backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    plan = PLANS["dng"]
    given = arguments(plan)
    eps = given["eps"]
    given["eps"] = {
        "channels last": lambda: eps.to(memory_format=torch.channels_last),
        "transposed": lambda: eps.transpose(2, 3).contiguous().transpose(2, 3),
        "a slice": lambda: torch.cat([eps, eps], 1)[:, :3],
        "repeated": lambda: eps[:1].expand(SHAPE),
    }[layout]()
    bound = BoundStep(plan, **given, backend=backend)
    for step in (1, 2, 3):
        expected = dng_step(plan, plan.indices[step], **given, backend=backend)
        assert close(bound(step), expected)
        if layout != "repeated":
            given["eps"].mul_(0.5)  # a loop writes new predictions into it


def test_without_numba_a_bound_step_has_the_bits_of_the_step(monkeypatch):
    monkeypatch.setattr(bound_module, "HAS_NUMBA", False)
    plan = PLANS["dng"]
    first, second = arguments(plan, 0), arguments(plan, 1)
    bound = BoundStep(plan, **first)
    for given in (first, second):
        bound.rebind(**given)
        assert same(bound(1), dng_step(plan, plan.indices[1], **given))


def test_numbers_that_are_none_are_gone_with_the_step():
    plan = PLANS["dng"]
    given = arguments(plan)
    bound = BoundStep(plan, **given)
    kept = given["eps"].clone()
    given["eps"].fill_(float("nan"))
    assert bound(1).x_next.isnan().all()
    given["eps"].copy_(kept)
    assert close(bound(1), dng_step(plan, plan.indices[1], **given))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_a_result_may_lie_on_an_input_or_beside_it(backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    plan = PLANS["dng"]
    given = arguments(plan)
    count = given["x"].numel()
    memory = torch.zeros(2 * count)
    own = memory[:count].view(SHAPE).copy_(given["x"])
    expected = dng_step(plan, plan.indices[1], **given, backend=backend)
    for at in (count, 0):  # last on x itself
        out = StepResult(memory[at : at + count].view(SHAPE))
        bound = BoundStep(plan, **given | {"x": own}, out=out, backend=backend)
        assert close(bound(1), expected)


def test_other_tensors_must_not_lie_half_on_a_result():
    plan = PLANS["dng"]
    given = arguments(plan)
    count = given["x"].numel()
    memory = torch.zeros(count + 8)
    result = memory[8:].view(SHAPE)
    bound = BoundStep(plan, **given, out=StepResult(result))
    for shift in (1, 7):
        half = memory[8 - shift : 8 - shift + count].view(SHAPE)
        for name in ("x", "eps", "noise"):
            with pytest.raises(ValueError, match=rf"out.x_next must be {name} place by place, or"):
                bound.rebind(**{name: half})
    expected = dng_step(plan, plan.indices[1], **given)
    assert close(bound(1), expected)  # with the tensors of before
    result.copy_(given["x"])
    bound.rebind(x=result)
    assert close(bound(1), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("kind", ["c order", "bfloat16", "transposed", "misaligned", "by keys"])
@pytest.mark.parametrize("name", ["cfg", "sld", "perp_neg"])
@pytest.mark.thinned(5)
def test_what_was_bound_later_is_what_was_bound_first(name, kind, backend):
    """Every tensor replaced, one after the other and together, has the bits of a new bound step."""
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    plan = PLANS[name]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32

    def made(seed):
        tensors = arguments(plan, seed, dtype=dtype)
        for key, value in tensors.items():
            if kind == "transposed" and value.ndim > 1:
                tensors[key] = value.transpose(2, 3).contiguous().transpose(2, 3)
            if kind == "misaligned" and seed:
                memory = torch.empty(value.numel() + 1, dtype=value.dtype)
                tensors[key] = memory[1:].view(value.shape).copy_(value)
        if kind == "by keys":
            del tensors["noise"]
            tensors["seed"] = noise_keys(seed, SHAPE[0])
        return tensors

    first, second = made(0), made(1)
    options = {"return_guided": True, "return_scale": True, "backend": backend}
    bound = BoundStep(plan, **first, **options)
    bound(0)
    mixed = dict(first)
    for key, value in second.items():
        bound.rebind(**{key: value})
        mixed[key] = value
        assert same(bound(1), BoundStep(plan, **mixed, **options)(1)), key
    bound.rebind(**first)
    assert same(bound(2), BoundStep(plan, **first, **options)(2))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_tensors_that_a_kernel_reads_alike_are_only_exchanged(backend):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    plan = PLANS["dng"]
    first, second = arguments(plan, 0), arguments(plan, 1)
    bound = BoundStep(plan, **first, backend=backend)
    before = bound._take
    bound.rebind(**second)
    assert bound._take is before
    misaligned = torch.empty(second["eps"].numel() + 1)[1:].view(SHAPE)
    bound.rebind(eps=misaligned)  # for which Triton compiles another kernel
    assert (bound._take is before) == (backend != "triton")


def test_sums_over_large_samples_keep_their_digits():
    plan = PLANS["dng"]
    given = arguments(plan, 1, (1, 2**21))
    gap = 1e-3 * given["eps_neg"]
    given["eps_neg"] = given["eps"] + gap
    wide = {key: value.double() for key, value in given.items()}
    expected = dng_step(plan, plan.indices[1], **wide).state
    found = BoundStep(plan, **given)(1).state
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "dng"}, "plan must be a StepPlan, got a str"),
        ({"eps": torch.zeros(3)}, "eps must"),
        ({"noise": None}, "noise or seed must be given"),
        ({"state": None}, "state must be given"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_refused_when_they_are_bound(change, message):
    plan = PLANS["dng"]
    given = {"plan": plan, **arguments(plan)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        BoundStep(**given)


@pytest.mark.parametrize("step", [-1, STEPS, 1.5, "1", None, True])
def test_a_bound_step_takes_steps_of_its_plan(step):
    bound = BoundStep(PLANS["np"], **arguments(PLANS["np"]))
    with pytest.raises((ValueError, TypeError), match="step must be"):
        bound(step)


def test_nothing_is_taken_of_an_empty_batch():
    plan = PLANS["dng"]
    bound = BoundStep(plan, **arguments(plan, shape=(0, 3, 4, 4)))
    assert bound(2).x_next.shape == (0, 3, 4, 4)


# ---------------------------------------------------------------------- what would be launched


def test_known_calls_launch_what_the_usual_way_would():
    """In a process with the stand-in driver; see :func:`main`."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "all the same"


def main():
    """Launch each kind of call twice, and compare the second launch with the usual dispatch's."""
    from benchmarks import stand_in

    stand_in.install()
    from dng_kernels import _known, fused, guide, update_posterior
    from dng_kernels import plan as plans

    names = [parameter.name for parameter in fused.fused_step.params]
    launcher = stand_in.Launcher
    launcher.keeps = True

    def launched(function, *args, **options):
        """The result of a call, and the one launch that it makes."""
        launcher.launched.clear()
        result = function(*args, **options)
        (launch,) = launcher.launched
        return result, launch

    def told(launch):
        """Grid, compiled kernel, and arguments with tensors as addresses."""
        arguments = [
            (value.data_ptr(), value.dtype) if isinstance(value, torch.Tensor) else value
            for value in launch[10:]
        ]
        return launch[:4], arguments

    def in_order(plan, given):
        """Whether the arguments are in the kernel's order, which a direct launch takes."""
        inputs = Inputs(**dict.fromkeys(Inputs._fields) | given)
        more = (plan.table, plan.indices[1], None, 0, *plan.workspace(2, 48))
        _, named = fused.arguments(inputs, StepResult(), plan.variants[0], *more)
        return list(named) == names

    def usual(function, plan, step, **options):
        """What the same call launches where nothing is known."""
        known, prepared = dict(plan._known), fused.prepared
        plan._known.clear()
        fused.prepared = lambda grid, named: None
        try:
            return told(launched(function, plan, step, **options)[1])
        finally:
            fused.prepared = prepared
            plan._known.update(known)

    def check(plan, function, given, **options):
        results = function(plan, 1, **given, **options)
        out = StepResult(*[None if t is None else torch.empty_like(t) for t in results])
        function(plan, 1, **given, **options, out=out)
        assert plan._known, "nothing was remembered"
        for step in (2, 0):
            other = {
                name: value if value.ndim < 3 else value.clone().normal_()
                for name, value in given.items()
            }
            call = {**other, **options, "out": out}
            found, launch = launched(function, plan, step, **call)
            assert told(launch) == usual(function, plan, step, **call), function.__name__
            assert all(a is b for a, b in zip(found, out, strict=True))

    assert in_order(PLANS["np"], arguments(PLANS["np"]))
    for name, plan in PLANS.items():
        given = arguments(plan)
        check(plan, dng_step, given, backend="triton")
        if "noise" in given:
            own = {key: value for key, value in given.items() if key != "noise"}
            check(plan, dng_step, own, backend="triton", seed=7, first_sample=5)
        rest = {key: value for key, value in given.items() if key not in ("x", "noise")}
        if name in ("dng", "sld"):
            check(plan, guide, rest, backend="triton", return_scale=True)
        if name == "dng":
            pair = {key: given[key] for key in ("x", "eps", "eps_neg", "state")}
            check(plan, update_posterior, {**pair, "x_next": given["noise"]}, backend="triton")
        bound = BoundStep(plan, **given, backend="triton")
        bound(0)
        other = arguments(plan, 1)
        apart = torch.empty(given["eps"].numel() + 1)[1:].view(SHAPE).copy_(other["eps"])
        for tensors in (given, other, {"eps": apart}, {"eps_neg": given["eps_neg"]}, given):
            bound.rebind(**tensors)
            given = given | tensors
            for step in (1, 2):
                _, launch = launched(bound, step)
                options = {**given, "out": bound.result, "backend": "triton"}
                assert told(launch) == usual(dng_step, plan, step, **options)

    # No tensor of a call is kept: only the plan's table, counters and partial sums.
    for plan in PLANS.values():
        for known in plan._known.values():
            assert sum(isinstance(value, torch.Tensor) for value in known.values) == 3
        assert pickle.loads(pickle.dumps(plan))._known == {}
        assert copy.deepcopy(plan)._known == {}

    # In a capture, a known call keeps the plan's table, step, counters and partial sums.
    plan = StepPlan(C, DNG)
    given = {**arguments(plan), "backend": "triton"}
    for _ in range(2):
        dng_step(plan, 1, **given)
    assert len(plan._known) == 1 and StepPlan.release_captured() == 0
    ready, _known.capturing = _known.capturing, lambda device: True
    dng_step(plan, 2, **given)
    _known.capturing = ready
    kept = {plan.table.data_ptr(), plan.indices[2].data_ptr()}
    kept |= {tensor.data_ptr() for tensor in plan.workspace(2, 48)}
    assert {tensor.data_ptr() for tensor in plans._CAPTURED.values()} == kept
    assert StepPlan.release_captured() == 4

    # Another alignment is another kernel, and another entry.
    plan = PLANS["np"]
    given = arguments(plan)
    moved = given | {"eps": torch.empty(given["eps"].numel() + 1)[1:].view(SHAPE)}
    for each in (given, moved, given, moved):
        out = StepResult(torch.empty_like(given["x"]))
        options = {**each, "out": out, "backend": "triton"}
        dng_step(plan, 1, **options)
        found = told(launched(dng_step, plan, 1, **options)[1])
        assert found == usual(dng_step, plan, 1, **options)

    # A known call sees where its results would be written.
    count = given["x"].numel()
    memory = torch.zeros(2 * count)
    options = {**given, "x": memory[:count].view(SHAPE), "backend": "triton"}
    for at in (count, 0):
        options["out"] = StepResult(memory[at : at + count].view(SHAPE))
        for _ in range(2):
            launched(dng_step, plan, 1, **options)
    entries = len(plan._known)
    options["out"] = StepResult(memory[16 : 16 + count].view(SHAPE))
    launcher.launched.clear()
    with pytest.raises(ValueError, match=r"out.x_next must be x place by place, or lie outside"):
        dng_step(plan, 1, **options)
    assert not launcher.launched and len(plan._known) == entries

    # A dispatch mode sees the operator.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Seen():
        dng_step(plan, 1, **given, backend="triton")
    assert any("dng_kernels.step" in name for name in names), names
    print("all the same")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
