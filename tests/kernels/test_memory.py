"""Results that would be written over what is still read are refused, in every engine.

A GPU's programs run in any order, and the CPU's engine takes large tensors a block at a time: a
result beside an input, half on it, gave wrong numbers without a word.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dng_kernels import StepPlan, StepResult, dng_step, guide, update_posterior
from dng_kernels._border import Memory, names_of
from dng_kernels.naive import Inputs
from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PerpNeg,
    SafeLatentDiffusion,
    SignedNegative,
)

C = NoiseSchedule.linear(4).coefficients(DDPM())
DNG = DynamicNegativeGuidance.tracked(1.0, prior=0.2, temperature=0.3)
DIVERGENT = DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.2, divergence=True))
PLANS = {
    "dng": StepPlan(C, DNG),
    "cfg": StepPlan(C, DNG, cfg_scale=2.0),
    "signed": StepPlan(C, SignedNegative(0.5), cfg_scale=2.0),
    "sld": StepPlan(C, SafeLatentDiffusion(0.5, threshold=0.5)),
    "perp_neg": StepPlan(C, PerpNeg(0.5, 1.0)),
    "np": StepPlan(C, NegativePrompting(0.5)),
    "divergence": StepPlan(NoiseSchedule.linear(4).coefficients(DDIM(0.5)), DIVERGENT),
}
SHAPE = (2, 3, 4, 4)
COUNT = 2 * 3 * 4 * 4


def arguments(plan, shape=SHAPE):
    """Tensors of a step by name."""
    generator = torch.Generator().manual_seed(0)
    names = ["x", "eps", "eps_neg", "noise"]
    names += ["eps_uncond"] * plan.needs_uncond + ["eps_pos"] * plan.needs_positive
    names += ["momentum"] * plan.needs_momentum
    found = {name: torch.randn(shape, generator=generator) for name in names}
    if plan.has_state:
        found["state"] = plan.init_state(shape[0])
    if plan.needs_divergence:
        found["divergence_gap"] = torch.tensor([0.5, -1.0])
    return found


@pytest.fixture(params=["reference", "cpu", "triton"])
def engine(request):
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and reads no tensors of the CPU")
    return request.param


EVENTS = ("x", "eps", "eps_neg", "eps_uncond", "eps_pos", "noise", "momentum")
HALF = [
    (plan, output, name)
    for plan in ("cfg", "signed", "sld", "perp_neg")
    for output in ("x_next", "eps_guided", "momentum")
    for name in EVENTS
    if name in arguments(PLANS[plan]) and (output != "momentum" or PLANS[plan].needs_momentum)
]


@pytest.mark.parametrize(("plan", "output", "name"), HALF)
def test_a_result_half_on_an_input_is_refused(plan, output, name, engine):
    plan = PLANS[plan]
    found = arguments(plan)
    memory = torch.zeros(COUNT + 4)
    found[name] = memory[:COUNT].view(SHAPE).copy_(found[name])
    before = memory.clone()
    out = StepResult()._replace(**{output: memory[4:].view(SHAPE)})
    itself = f"be {name} place by place, or " if output != "momentum" or name == output else ""
    message = rf"out\.{output} must {itself}lie outside the memory that {name} spans"
    with pytest.raises(ValueError, match=message):
        dng_step(plan, 1, **found, out=out, backend=engine)
    assert torch.equal(memory, before)


@pytest.mark.parametrize(("plan", "output", "name"), HALF)
def test_a_result_may_be_an_input_place_by_place(plan, output, name, engine):
    plan = PLANS[plan]
    found = arguments(plan)
    expected = dng_step(plan, 1, **found, return_guided=True, backend=engine)
    out = StepResult()._replace(**{output: found[name]})
    if output == "momentum" and name != "momentum":  # a rule reads more after it wrote this
        with pytest.raises(ValueError, match=rf"out\.momentum must lie outside the .* {name}"):
            dng_step(plan, 1, **found, out=out, backend=engine)
        return
    result = dng_step(plan, 1, **found, out=out, return_guided=True, backend=engine)
    for left, right in zip(result, expected, strict=True):
        assert (left is None) == (right is None) and (left is None or torch.equal(left, right))


def test_numbers_of_samples_have_memory_of_their_own(engine):
    plan, pair = PLANS["divergence"], torch.zeros(3)
    found = arguments(plan)
    for output, name in (
        ("scale", "state"),
        ("scale", "divergence_gap"),
        ("state", "divergence_gap"),
    ):
        out = StepResult()._replace(**{output: found[name]})
        with pytest.raises(ValueError, match=rf"out\.{output} must lie outside .* {name} spans"):
            dng_step(plan, 1, **found, out=out, backend=engine)
    expected = dng_step(plan, 1, **found, backend=engine).state
    half = found | {"state": pair[:2].copy_(found["state"])}
    with pytest.raises(
        ValueError, match=r"out\.state must be state place by place, or lie outside"
    ):
        dng_step(plan, 1, **half, out=StepResult(state=pair[1:]), backend=engine)
    out = StepResult(state=found["state"])
    assert torch.equal(dng_step(plan, 1, **found, out=out, backend=engine).state, expected)


def test_one_element_a_sample_is_not_one_number_a_sample(engine):
    plan = PLANS["dng"]
    found = arguments(plan, (2,))
    with pytest.raises(ValueError, match=r"out\.x_next must lie outside the memory that state"):
        dng_step(plan, 1, **found, out=StepResult(found["state"]), backend=engine)


def test_both_halves_of_a_step_refuse_it_too(engine):
    plan = PLANS["dng"]
    found = arguments(plan)
    memory, state = torch.zeros(COUNT + 4), torch.full((3,), -1.0)
    eps = memory[:COUNT].view(SHAPE)
    with pytest.raises(ValueError, match=r"out\.eps_guided must be eps place by place"):
        out = StepResult(eps_guided=memory[4:].view(SHAPE))
        guide(plan, 1, eps, found["eps_neg"], state[:2], out=out, backend=engine)
    with pytest.raises(ValueError, match=r"out\.state must be state place by place"):
        pair = (found["eps"], found["eps_neg"], state[:2])
        out = StepResult(state=state[1:])
        update_posterior(plan, 1, found["x"], found["noise"], *pair, out=out, backend=engine)
    with pytest.raises(ValueError, match=r"out\.state must lie outside the memory that x_next"):
        out = StepResult(state=memory[:2])
        update_posterior(plan, 1, found["x"], eps, *pair, out=out, backend=engine)


def test_one_address_is_not_one_place(engine):
    """The same numbers in another order, and one image for the whole batch."""
    plan = PLANS["np"]
    found = arguments(plan)
    turned = found | {"eps": found["x"].transpose(2, 3)}
    with pytest.raises(ValueError, match=r"out\.x_next must lie outside the memory that eps"):
        dng_step(plan, 1, **turned, out=StepResult(found["x"]), backend=engine)
    repeated = found | {"eps": found["x"][:1].expand(SHAPE)}
    with pytest.raises(ValueError, match=r"out\.x_next must lie outside the memory that eps"):
        dng_step(plan, 1, **repeated, out=StepResult(found["x"]), backend=engine)


def test_neighbours_share_nothing(engine):
    plan = PLANS["np"]
    found = arguments(plan)
    doubled = torch.zeros(4, *SHAPE[1:])
    doubled[:2] = found["x"]
    expected = dng_step(plan, 1, **found, backend=engine).x_next
    out = StepResult(doubled[2:])
    result = dng_step(plan, 1, **found | {"x": doubled[:2]}, out=out, backend=engine)
    assert torch.equal(result.x_next, expected)
    # Axes of one element have any stride.
    one = {name: value[:1] for name, value in found.items()}
    strided = doubled[::2][:1].copy_(one["x"])
    assert strided.stride() != one["x"].stride()
    result = dng_step(plan, 1, **one | {"x": strided}, out=StepResult(doubled[:1]), backend=engine)
    assert torch.equal(result.x_next, dng_step(plan, 1, **one, backend=engine).x_next)


@st.composite
def views(draw):
    """A view of a piece of memory, of two axes, with any strides and gaps."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    strides = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    return shape, strides, draw(st.integers(0, 24))


@settings(max_examples=300, deadline=None)
@given(read=views(), rows=st.integers(1, 3), columns=st.integers(1, 4), start=st.integers(0, 24))
def test_what_shares_memory_is_refused_unless_it_is_the_same(read, rows, columns, start):
    """Against the addresses of all elements; what lies apart is never refused."""
    shape, strides, offset = read
    memory = torch.arange(64.0)
    eps = memory.as_strided(shape, strides, offset)
    x_next = memory.as_strided((rows, columns), (columns, 1), start)
    inputs = Inputs(*(None,) * 2, eps, torch.zeros(1), *(None,) * 6)
    outputs = StepResult(x_next)
    own, other = (set(tensor.flatten().tolist()) for tensor in (x_next, eps))
    same = torch.equal(eps, x_next) and len(own) == eps.numel()
    apart = max(other) < min(own) or max(own) < min(other)
    memory_of_call = Memory(inputs, outputs, names_of(PLANS["cfg"]))
    if own & other and not same:
        with pytest.raises(ValueError, match=r"out\.x_next must"):
            memory_of_call.check(inputs, outputs)
    elif apart or same:
        memory_of_call.check(inputs, outputs)
